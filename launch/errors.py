"""The error that a user can mend."""


class LaunchError(Exception):
    """Something outside the launcher is wrong: an option, a file, a machine.

    Its text says what was wrong, what was expected and what to do.
    """
