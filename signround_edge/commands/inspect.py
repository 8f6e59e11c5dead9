"""`signround-edge inspect`: tensors of a run or an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from signround_edge.commands.options import PATH, json_option
from signround_edge.commands.output import print_json, show


@click.command()
@click.argument("path", type=PATH)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """List the tensors of a run directory or an artifact: format, shape, bytes, bits a weight."""
    from signround_edge import api
    from signround_edge.terminal.inspection import render

    found = api.inspect(path)
    if as_json:
        print_json(found.to_json())
    else:
        show(render(found))
