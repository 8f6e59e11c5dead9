"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

import click


def say(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def print_json(document: Any) -> None:
    """A document on stdout."""
    click.echo(json.dumps(document, indent=1))


def show(renderable: Any) -> None:
    """A table or text of rich on stdout."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(renderable)
