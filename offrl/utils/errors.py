"""The one exception that users are meant to see."""


class OffrlError(Exception):
    """Bad input: one sentence that names the file, key or option and says what to do.

    The command line prints it without a traceback and leaves with status 2.
    """


def one_line(text: object, most: int = 300) -> str:
    """Text of others (a server's, a damaged file's) as a part of a sentence: printable, on one line, not endless."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))
    return line if len(line) <= most else line[: most - 3] + "..."
