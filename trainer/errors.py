"""The exceptions that end a command with a message instead of a traceback."""


class UserError(Exception):
    """An error in a config, an image, a checkpoint, a path or the environment.

    The message says what is wrong, what was expected and what to do. It is printed without a traceback, and the
    program exits with code 2.
    """


class OutOfMemory(Exception):
    """An attempt ran out of memory; the next one takes smaller micro-batches.

    The message is printed without a traceback, and the program exits with code 1, so that torchrun restarts it. The
    launcher reads the name of this class.
    """
