"""`signround-edge models`: what will work for a model."""

from __future__ import annotations

import click

from signround_edge.commands.options import json_option
from signround_edge.commands.output import print_json, show


@click.command()
@click.argument("model", required=False)
@json_option
def models(model: str | None, as_json: bool) -> None:
    """What will work for MODEL (a folder, or a name such as org/model); without it, which families were tried."""
    from signround_edge.terminal.models import render_outlook, render_tested

    if model is None:
        from signround_edge.tested_models import TestedModels

        tested = TestedModels.read()
        print_json(tested.to_json()) if as_json else show(render_tested(tested))
        return
    from signround_edge.outlook import outlook

    found = outlook(model)
    print_json(found.to_json()) if as_json else show(render_outlook(found))
