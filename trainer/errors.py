"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An error in a config, an image, a checkpoint, a path or the environment.

    The message says what is wrong, what was expected and what to do. It is printed without a traceback, and the
    program exits with code 2.
    """
