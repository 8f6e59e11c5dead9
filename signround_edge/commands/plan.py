"""`signround-edge plan`: types for every tensor under a budget of bytes."""

from __future__ import annotations

from pathlib import Path

import click

from signround_edge.commands.options import PATH, cache_type_k_option, cache_type_v_option, json_option, model_argument
from signround_edge.commands.output import print_json, say, show
from signround_edge.errors import UserError
from signround_edge.tuning.settings import DEVICES


@click.command()
@model_argument
@click.option("--target-size", help="Bytes of the file: 1.5G, 800M.  [one of these four]")
@click.option("--target-bpw", type=float, help="Bits a weight, over all tensors.")
@click.option("--device", help="A device profile's memory, for file, cache and buffers.")
@click.option("--memory", help="Memory for file, cache and buffers: 2G.")
@click.option("--format", "target", default="gguf", show_default=True, help="gguf or onnx.")
@click.option("--context", type=int, default=4096, show_default=True, help="Tokens that the cache is to hold.")
@cache_type_k_option
@cache_type_v_option
@click.option("--pin", multiple=True, help="PATTERN=TYPE: matrices by name have this type. Repeatable.")
@click.option("--at-least", multiple=True, help="PATTERN=TYPE: they have at least as many bits. Repeatable.")
@click.option("--types", help="Types to choose from: Q3_K,Q4_K,Q6_K (default: all of the format).")
@click.option("--template", type=PATH, help="The GGUF file that `export` will be given as --template.")
@click.option("-o", "--out", type=PATH, help="plan.json to write, for `quantize --plan`; plan.svg beside it.")
@click.option("--calibration", default=None, help="Text file, JSON lines or dataset name (default: shipped speeches).")
@click.option("--samples", type=int, default=32, show_default=True, help="Samples that weights are judged on.")
@click.option("--seqlen", type=int, default=256, show_default=True, help="Tokens a sample.")
@click.option("--from-run", type=PATH, help="A finished run of MODEL, which corrects the prediction.")
@click.option("--text", type=PATH, help="UTF-8 text to measure that run on (default: shipped speeches).")
@click.option("--cache", type=PATH, help="Folder of what is measured once for a model.")
@click.option("--compute", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to measure.")
@json_option
def plan(
    model: str, target_size: str | None, target_bpw: float | None, device: str | None, memory: str | None, target: str,
    context: int, cache_type_k: str | None, cache_type_v: str | None, pin: tuple[str, ...],
    at_least: tuple[str, ...], types: str | None, template: Path | None,
    out: Path | None, calibration: str | None, samples: int, seqlen: int, from_run: Path | None, text: Path | None,
    cache: Path | None, compute: str, as_json: bool,
) -> None:  # fmt: skip
    """Find a type for every tensor of MODEL under a budget of bytes, and say what it is expected to cost."""
    from signround_edge import api
    from signround_edge.outputs import check_output
    from signround_edge.planning.picture import picture
    from signround_edge.schemes.planned_types import PlannedTypes
    from signround_edge.terminal.plan import render
    from signround_edge.terminal.progress import terminal_progress

    if device is not None:
        if memory is not None:
            raise UserError("--device says how much memory there is, and --memory does too; give one of them")
        memory = api.device_memory(device)
    if out is not None:
        check_output("-o", out, {"--from-run": from_run, "--text": text, "--template": template})
        PlannedTypes.check_out(out)
    with terminal_progress("measuring") as progress:
        found = api.plan(
            model, target_size=target_size, target_bpw=target_bpw, memory=memory, memory_of=device, format=target,
            context=context, cache_type_k=cache_type_k, cache_type_v=cache_type_v, pin=pin, at_least=at_least,
            types=types, template=template, calibration=calibration, samples=samples, seqlen=seqlen,
            from_run=from_run, text=text, cache=cache, device=compute, progress=progress,
        )  # fmt: skip
    if out is not None:
        found.planned.save(out)
        out.with_suffix(".svg").write_text(picture(found), encoding="utf-8")
    if as_json:
        print_json(found.to_json())
    else:
        show(render(found))
    if out is not None:
        say(f"wrote {out} and {out.with_suffix('.svg').name}: `signround-edge quantize {model} --plan {out} -o RUN`")
