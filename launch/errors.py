"""The error for problems that the user can fix."""


class LaunchError(Exception):
    """An option, a file or a machine is not as the launcher needs it.

    The message says what is wrong, what was expected and what to do.
    """
