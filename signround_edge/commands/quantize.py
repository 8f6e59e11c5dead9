"""`signround-edge quantize`: tune a model on the grids of a scheme."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from signround_edge.commands.group import EXIT_INTERRUPTED
from signround_edge.commands.options import PATH, choice, model_argument
from signround_edge.commands.output import say
from signround_edge.errors import LostProcess
from signround_edge.tuning.settings import DEVICES, RECIPES, SOURCE_CHECKS, choices


def _transforms(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...] | None:
    from signround_edge.transforms import parse_transforms

    return parse_transforms(values) if values else None  # None: as the recipe says


@click.command()
@model_argument
@click.option("--scheme", help="gguf:q4_k_m, onnx:w4g128-asym, …; a comma joins those of one grid.  [this or --plan]")
@click.option("--plan", type=PATH, help="A type for every matrix, as `plan` found them.  [this or --scheme]")
@click.option("--tensor-type", multiple=True, help="PATTERN=TYPE for matrices by name: ffn_down=Q6_K. Repeatable.")
@click.option("--token-embedding-type", help="Type of the token embedding: w4g32, Q6_K (default by the scheme).")
@click.option("--output-tensor-type", help="Type of the output head (default by the scheme; onnx: w8g32).")
@click.option("-o", "--out", type=PATH, required=True, help="Run directory to write.")
@click.option("--calibration", default=None, help="Text file, JSON lines or dataset name (default: shipped speeches).")
@click.option("--recipe", default="default", show_default=True, help=f"{', '.join(RECIPES)}.")
@click.option("--samples", type=int, help="Calibration samples.")
@click.option("--seqlen", type=int, help="Tokens a sample.")
@click.option("--steps", type=int, help="Gradient steps a block; 0 rounds to nearest.")
@click.option("--batch-size", type=int, help="Samples a step.")
@click.option("--start", type=choice("start"), help="Codes from which tuning starts.")
@click.option("--correct-drift/--no-correct-drift", default=None, help="With gptq: take inherited errors back first.")
@click.option("--lr", type=float, help="Learning rate of the rounding (default 0.7/steps, from GPTQ's codes less).")
@click.option("--scale-lr", type=float, help="Learning rate of scales (default: --lr over the range of codes).")
@click.option("--tune-scales/--no-tune-scales", default=None, help="Let scales and minima move.")
@click.option(
    "--positions",
    type=choice("positions"),
    help="Codes are taken on the initial scales, or follow the tuned ones (the paper's clip tuning).",
)
@click.option("--scale-init", type=choice("scale_init"), help="Initial scales.")
@click.option("--loss", type=choice("loss"), help="Squared error of tokens: relative or plain.")
@click.option("--granularity", type=choice("granularity"), help="Reconstruct blocks, or each layer alone.")
@click.option("--optimizer", type=choice("optimizer"), help="Optimizer of the rounding.")
@click.option("--compute-dtype", type=choice("compute_dtype"), help="Matrix products in tuning.")
@click.option("--hidden-dtype", type=choice("hidden_dtype"), help="Hidden states that are kept between blocks.")
@click.option("--compile-blocks", is_flag=True, default=None, help="Steps by kernels that torch.compile makes.")
@click.option("--whole-model-steps", type=int, help="Steps of tuning the whole model on its KL divergence; 0: none.")
@click.option("--whole-model-batch-size", type=int, help="Samples a step there.")
@click.option("--whole-model-lr", type=float, help="Relative learning rate of scales and norms there.")
@click.option("--whole-model-code-lr", type=float, help="Learning rate of codes there; 0: frozen.")
@click.option(
    "--transform",
    "transforms",
    multiple=True,
    callback=_transforms,
    help=f"{', '.join(choices('transforms'))}, none: change the weights, not the function, so that rounding costs "
    "less.",
)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--gpus", type=int, help="Processes that share the samples, a GPU each (with --device cpu: without).")
@click.option("--max-memory", help="Most memory to plan for (10G): hidden states go to disk where they do not fit.")
@click.option("--max-gpu-memory", help="The same of the GPU's memory (8G; default: what is free).")
@click.option("--seed", type=int, help="Seed of the sample order.")
@click.option("--imatrix", type=PATH, help="llama.cpp's imatrix file: E[x²] for scales.")
@click.option("--save-imatrix", type=PATH, help="Write E[x²] for llama-quantize here.")
@click.option("--resume", is_flag=True, help="Continue after the last complete block.")
@click.option(
    "--source-check",
    type=click.Choice(SOURCE_CHECKS),
    default="auto",
    show_default=True,
    help="Compare blocks with transformers' model first: all in memory, or read from disk block by block.",
)
@click.option("--float-fallback", is_flag=True, help="Keep matrices that no block size divides in 16-bit floats.")
def quantize(
    model: str, scheme: str | None, plan: Path | None, tensor_type: tuple[str, ...], token_embedding_type: str | None,
    output_tensor_type: str | None, out: Path, calibration: str | None, recipe: str, device: str,
    gpus: int | None, imatrix: Path | None, save_imatrix: Path | None, resume: bool, source_check: str,
    float_fallback: bool, max_memory: str | None, max_gpu_memory: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Tune MODEL (a folder or a Hugging Face name) on the grids of a scheme."""
    from signround_edge import api
    from signround_edge.terminal.progress import terminal_progress
    from signround_edge.tuning.launch import EXIT_LOST, Place, check_gpus, run_processes
    from signround_edge.tuning.settings import settings_from

    chosen, place = settings_from(recipe, settings), Place.of_environment()
    shared = gpus is not None and place.world > 1  # one of the processes of `--gpus`, whose parent says what becomes
    try:
        if gpus is not None and not shared:
            check_gpus(gpus, device)
            if gpus > 1:
                run_processes(gpus, sys.argv[1:])
                return
        with terminal_progress("tuning") if place.rank == 0 else contextlib.nullcontext() as progress:
            api.quantize(
                model, scheme, out, plan=plan, calibration=calibration, settings=chosen, tensor_type=tensor_type,
                token_embedding_type=token_embedding_type, output_tensor_type=output_tensor_type, imatrix=imatrix,
                save_imatrix=save_imatrix, float_fallback=float_fallback, device=device, resume=resume,
                source_check=source_check, max_memory=max_memory, max_gpu_memory=max_gpu_memory, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        if place.rank == 0 and not shared:
            say(f"interrupted; {out} keeps every finished block: run the same command with --resume to continue")
        sys.exit(EXIT_INTERRUPTED)
    except LostProcess:
        if shared:
            sys.exit(EXIT_LOST)
        raise
    if place.rank == 0:
        say(f"wrote {out}")
