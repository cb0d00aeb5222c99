"""The error for problems that the user can fix."""


class LaunchError(Exception):
    """An option, a file or a machine is not as the launcher needs it.

    The message says what is wrong, what was expected and what to do.
    """


def require(condition: bool, message: str) -> None:
    """Raise a LaunchError with this message unless the condition holds."""
    if not condition:
        raise LaunchError(message)
