"""The command line: `main`, and the commands of `signround_edge.commands`."""

from __future__ import annotations

from collections.abc import Callable

import click

from signround_edge import __version__
from signround_edge.commands.analyze import analyze
from signround_edge.commands.demo import demo
from signround_edge.commands.devices import devices
from signround_edge.commands.evaluate import evaluate
from signround_edge.commands.export import export
from signround_edge.commands.group import Group
from signround_edge.commands.inspect import inspect
from signround_edge.commands.models import models
from signround_edge.commands.plan import plan
from signround_edge.commands.quantize import quantize
from signround_edge.commands.rotate import rotate
from signround_edge.commands.verify import verify


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="signround-edge")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Tune weights of 2 to 8 bits with SignRound, export them unchanged to GGUF or ONNX, and prove parity."""


for _command in (quantize, plan, rotate, export, verify, inspect, models, analyze, evaluate, devices, demo):
    main.add_command(_command)


if __name__ == "__main__":
    run: Callable[[], None] = main
    run()
