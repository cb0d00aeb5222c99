"""The one exception for what a user can mend."""


class UserError(Exception):
    """What was wrong, what was expected, and what to do: shown as it stands, without a traceback.

    Raise it for everything that comes from outside the program: configs, images, checkpoints, folder
    names, the environment. `main` prints its text on rank 0 and leaves with exit code 2.
    """
