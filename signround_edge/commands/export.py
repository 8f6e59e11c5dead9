"""`signround-edge export`: a run as GGUF or ONNX."""

from __future__ import annotations

from pathlib import Path

import click

from exporters.interface import DTYPES
from exporters.onnx.options import ACCURACY_LEVELS, IO_DTYPES, LAYOUTS, OPERATORS, SCALE_DTYPES
from signround_edge.commands.options import PATH, run_argument
from signround_edge.commands.output import say


@click.command()
@run_argument
@click.option("--format", "target", required=True, help="gguf or onnx.")
@click.option("-o", "--out", type=PATH, required=True, help="File or folder to write.")
@click.option("--template", type=PATH, help="GGUF: metadata to copy; ONNX: your float graph.")
@click.option("--mmproj", type=PATH, help="GGUF: file for images to write, too.")
@click.option("--mmproj-from", metavar="MODEL", help="GGUF: the model that RUN was made from, for --mmproj.")
@click.option("--accuracy-level", type=click.Choice(list(map(str, ACCURACY_LEVELS))), help="Of MatMulNBits, ONNX only.")
@click.option("--scale-dtype", type=click.Choice(SCALE_DTYPES), help="Stored scales, ONNX only.")
@click.option("--operators", type=click.Choice(OPERATORS), help="ONNX: which operators hold the integers.")
@click.option("--card-text", type=PATH, help="ONNX: text to measure level 4 on, for the card.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Write the dequantized weights as floats instead.")
@click.option("--split-max-size", "--max-shard-size", help="Split the data into files of at most this size (500M, 4G).")
@click.option("--ort-format", is_flag=True, help="ONNX: also write model.ort and the list of operators that it needs.")
@click.option("--layout", type=click.Choice(LAYOUTS), help="ONNX: whose names and places of files.")
@click.option("--io-dtype", type=click.Choice(IO_DTYPES), help="ONNX: what the graph computes in.")
@click.option("--no-cache", is_flag=True, help="ONNX: a traced graph that takes whole texts.")
def export(
    run: Path, target: str, out: Path, template: Path | None, accuracy_level: str | None, scale_dtype: str | None,
    operators: str | None, card_text: Path | None, dtype: str | None, split_max_size: str | None, ort_format: bool,
    mmproj: Path | None, mmproj_from: str | None, layout: str | None, io_dtype: str | None, no_cache: bool,
) -> None:  # fmt: skip
    """Write the integers and scales of RUN, unchanged, as GGUF or ONNX."""
    from signround_edge import api

    written = api.export(
        run, target, out, template=template, dtype=dtype, split_max_size=split_max_size,
        accuracy_level=None if accuracy_level is None else int(accuracy_level), scale_dtype=scale_dtype,
        operators=operators, ort_format=ort_format, layout=layout, io_dtype=io_dtype, no_cache=no_cache,
        card_text=card_text, mmproj=mmproj, mmproj_from=mmproj_from, progress=say,
    )  # fmt: skip
    say(f"wrote {written.path}")
