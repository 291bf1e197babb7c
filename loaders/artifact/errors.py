"""The one exception that a user is meant to read."""


class PrecastError(Exception):
    """Something the user can put right.

    The message is one sentence: where, what was expected, what was found, what to do. The command line prints
    it without a traceback and exits with code 2.
    """
