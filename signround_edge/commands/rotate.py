"""`signround-edge rotate`: a model with a rotated residual stream."""

from __future__ import annotations

from pathlib import Path

import click

from signround_edge.commands.options import PATH, model_argument
from signround_edge.commands.output import say


@click.command()
@model_argument
@click.option("-o", "--out", type=PATH, required=True, help="Model folder to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random rotation.")
def rotate(model: str, out: Path, seed: int) -> None:
    """Write MODEL with a rotated residual stream: the same function, to be quantized instead."""
    from signround_edge.model.source import resolve_model
    from signround_edge.outputs import check_output
    from signround_edge.transforms.rotation import rotate as run_rotate

    source = resolve_model(model)
    check_output("-o", out, {"the model": source})
    divergence = run_rotate(source, out, seed)
    say(f"wrote {out} in f32 with an output head of its own; KL divergence from the original {divergence:.1e}")
