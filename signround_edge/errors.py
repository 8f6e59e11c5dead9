"""The errors that a user can cause and can mend; the command line prints them as one sentence."""


class UserError(Exception):
    """Bad usage or bad input (exit code 2): one sentence that names the file or flag and the way out."""


class LostProcess(UserError):
    """Another of the processes that tune a run together has ended."""


class ToldElsewhere(UserError):
    """Another of the processes that work together has failed before this one, and says why."""


class CheckFailed(Exception):
    """A check that ran and failed (exit code 1): one sentence that says what is wrong."""


def first_line(error: Exception) -> str:
    """What an exception of a library says, for use within a sentence: its first line, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_lines(output: str, count: int = 4) -> str:
    """What a program said last, for use within a sentence: its last lines that are not empty, if any."""
    return " | ".join([line.strip() for line in output.splitlines() if line.strip()][-count:])
