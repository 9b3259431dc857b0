"""The one exception that users are meant to see."""


class OffrlError(Exception):
    """Bad input: one sentence that names the file, key or option and says what to do.

    The command line prints it without a traceback and leaves with status 2.
    """
