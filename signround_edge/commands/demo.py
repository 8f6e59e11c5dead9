"""`signround-edge demo`: the whole chain on the shipped tiny model."""

from __future__ import annotations

from pathlib import Path

import click

from signround_edge.commands.options import PATH, json_option
from signround_edge.commands.output import print_json, show
from signround_edge.errors import CheckFailed


@click.command()
@click.option("-o", "--out", type=PATH, help="Keep run, files and report here.")
@json_option
def demo(out: Path | None, as_json: bool) -> None:
    """The whole chain on the shipped tiny model: quantize, export to GGUF and ONNX, verify; one table."""
    from signround_edge.demo.chain import run_demo
    from signround_edge.terminal.demo import render
    from signround_edge.terminal.progress import terminal_progress

    with terminal_progress("demo") as progress:
        result = run_demo(out, progress)
    if as_json:
        print_json(result.to_json())
    else:
        show(render(result))
    if not result.passed:
        raise CheckFailed("the demo's verification failed; see the table above")
