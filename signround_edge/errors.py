"""The errors that a user can cause and can mend; the command line prints them as one sentence."""


class UserError(Exception):
    """Bad usage or bad input (exit code 2): one sentence that names the file or flag and the way out."""


class CheckFailed(Exception):
    """A check that ran and failed (exit code 1): one sentence that says what is wrong."""


def first_line(error: Exception) -> str:
    """What an exception of a library says, for use within a sentence: its first line, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
