"""The group of commands, and what becomes of their errors."""

from __future__ import annotations

from typing import Any

import click

from signround_edge.commands.output import say
from signround_edge.errors import CheckFailed, ToldElsewhere, UserError

EXIT_CHECK_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class Group(click.Group):
    """Turns the library's errors into one sentence on stderr and the contract's exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ToldElsewhere:
            ctx.exit(EXIT_BAD_INPUT)
        except (UserError, CheckFailed, OSError) as error:
            if ctx.params.get("debug"):
                raise
            say(f"error: {_one_sentence(error)}")
            ctx.exit(EXIT_CHECK_FAILED if isinstance(error, CheckFailed) else EXIT_BAD_INPUT)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            what = f"{type(error).__name__}: {_one_sentence(error)}"
            say(f"error: unexpected {what}; this is a bug, please report it with what --debug shows")
            ctx.exit(EXIT_BAD_INPUT)


def _one_sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}; nothing half-written was kept, free space or fix access and try again"
    return " ".join(str(error).split())
