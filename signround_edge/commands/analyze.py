"""`signround-edge analyze`: what tuning did to a run."""

from __future__ import annotations

from pathlib import Path

import click

from signround_edge.commands.options import PATH, json_option, run_argument
from signround_edge.commands.output import print_json, say, show


@click.command()
@run_argument
@click.option("--out", type=PATH, help="Folder for pictures, page and analysis.json.")
@json_option
def analyze(run: Path, out: Path | None, as_json: bool) -> None:
    """What tuning did to RUN: altered roundings, salient channels, V, losses (arXiv 2309.05516, figures 2 to 4)."""
    from signround_edge.analysis.report import write_report
    from signround_edge.analysis.roundings import analyze as run_analyze
    from signround_edge.outputs import check_output
    from signround_edge.run_directory import RunDirectory
    from signround_edge.terminal.analysis import render

    if out is not None:
        check_output("--out", out / "analysis.json", {"the run": run})
    analysis = run_analyze(RunDirectory.open(run))
    for path in write_report(analysis, out) if out is not None else ():
        say(f"wrote {path}")
    if as_json:
        print_json(analysis.to_json())
    else:
        show(render(analysis))
