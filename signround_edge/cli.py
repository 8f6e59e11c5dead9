"""The command line: parse, call the library, render. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from exporters.interface import DTYPES
from exporters.onnx.options import ACCURACY_LEVELS, IO_DTYPES, LAYOUTS, OPERATORS, SCALE_DTYPES
from signround_edge import __version__
from signround_edge.arguments import path_of
from signround_edge.errors import CheckFailed, LostProcess, ToldElsewhere, UserError
from signround_edge.tuning.settings import DEVICES, RECIPES, SOURCE_CHECKS, choices

EXIT_CHECK_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class _Group(click.Group):
    """Turns the library's errors into one sentence on stderr and the contract's exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ToldElsewhere:
            ctx.exit(EXIT_BAD_INPUT)
        except (UserError, CheckFailed, OSError) as error:
            if ctx.params.get("debug"):
                raise
            _say(f"error: {_one_sentence(error)}")
            ctx.exit(EXIT_CHECK_FAILED if isinstance(error, CheckFailed) else EXIT_BAD_INPUT)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            what = f"{type(error).__name__}: {_one_sentence(error)}"
            _say(f"error: unexpected {what}; this is a bug, please report it with what --debug shows")
            ctx.exit(EXIT_BAD_INPUT)


def _one_sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}; nothing half-written was kept, free space or fix access and try again"
    return " ".join(str(error).split())


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="signround-edge")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Tune weights of 2 to 8 bits with SignRound, export them unchanged to GGUF or ONNX, and prove parity."""


def _transforms(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...] | None:
    from signround_edge.transforms import parse_transforms

    return parse_transforms(values) if values else None  # None: as the recipe says


def _choice(setting: str) -> click.Choice[str]:
    """The command line's form of a setting that names a choice."""
    return click.Choice(choices(setting))


class _Path(click.Path):
    """A path; an empty text is none, which `Path` would take for the folder where the command runs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        assert param is not None
        return path_of(param.opts[0], value)


_PATH = _Path()
_model = click.argument("model")
_run = click.argument("run", type=_PATH)
_text = click.option("--text", type=_PATH, required=True, help="UTF-8 text to score.")
_windows = click.option("--windows", type=int, default=None, help="Windows to score at most.")
_n_ctx = click.option("--n-ctx", type=int, default=512, show_default=True, help="Tokens a window.")
_cache_type_k = click.option("--cache-type-k", help="llama.cpp's cache of keys: f16, q8_0 or q4_0.")
_cache_type_v = click.option("--cache-type-v", help="llama.cpp's cache of values: f16, q8_0 or q4_0.")
_reference = click.option("--reference", default=None, help="The full-precision model to compare with.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")


@main.command()
@_model
@click.option("--scheme", help="gguf:q4_k_m, onnx:w4g128-asym, …; a comma joins those of one grid.  [this or --plan]")
@click.option("--plan", type=_PATH, help="A type for every matrix, as `plan` found them.  [this or --scheme]")
@click.option("--tensor-type", multiple=True, help="PATTERN=TYPE for matrices by name: ffn_down=Q6_K. Repeatable.")
@click.option("--token-embedding-type", help="Type of the token embedding: w4g32, Q6_K (default by the scheme).")
@click.option("--output-tensor-type", help="Type of the output head (default by the scheme; onnx: w8g32).")
@click.option("-o", "--out", type=_PATH, required=True, help="Run directory to write.")
@click.option("--calibration", default=None, help="Text file, JSON lines or dataset name (default: shipped speeches).")
@click.option("--recipe", default="default", show_default=True, help=f"{', '.join(RECIPES)}.")
@click.option("--samples", type=int, help="Calibration samples.")
@click.option("--seqlen", type=int, help="Tokens a sample.")
@click.option("--steps", type=int, help="Gradient steps a block; 0 rounds to nearest.")
@click.option("--batch-size", type=int, help="Samples a step.")
@click.option("--start", type=_choice("start"), help="Codes from which tuning starts.")
@click.option("--correct-drift/--no-correct-drift", default=None, help="With gptq: take inherited errors back first.")
@click.option("--lr", type=float, help="Learning rate of the rounding (default 0.7/steps, from GPTQ's codes less).")
@click.option("--scale-lr", type=float, help="Learning rate of scales (default: --lr over the range of codes).")
@click.option("--tune-scales/--no-tune-scales", default=None, help="Let scales and minima move.")
@click.option(
    "--positions",
    type=_choice("positions"),
    help="Codes are taken on the initial scales, or follow the tuned ones (the paper's clip tuning).",
)
@click.option("--scale-init", type=_choice("scale_init"), help="Initial scales.")
@click.option("--loss", type=_choice("loss"), help="Squared error of tokens: relative or plain.")
@click.option("--granularity", type=_choice("granularity"), help="Reconstruct blocks, or each layer alone.")
@click.option("--optimizer", type=_choice("optimizer"), help="Optimizer of the rounding.")
@click.option("--compute-dtype", type=_choice("compute_dtype"), help="Matrix products in tuning.")
@click.option("--whole-model-steps", type=int, help="Steps of tuning the whole model on its KL divergence; 0: none.")
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
@click.option("--imatrix", type=_PATH, help="llama.cpp's imatrix file: E[x²] for scales.")
@click.option("--save-imatrix", type=_PATH, help="Write E[x²] for llama-quantize here.")
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
            _say(f"interrupted; {out} keeps every finished block: run the same command with --resume to continue")
        sys.exit(EXIT_INTERRUPTED)
    except LostProcess:
        if shared:
            sys.exit(EXIT_LOST)
        raise
    if place.rank == 0:
        _say(f"wrote {out}")


@main.command()
@_model
@click.option("--target-size", help="Bytes of the file: 1.5G, 800M.  [one of these four]")
@click.option("--target-bpw", type=float, help="Bits a weight, over all tensors.")
@click.option("--device", help="A device profile's memory, for file, cache and buffers.")
@click.option("--memory", help="Memory for file, cache and buffers: 2G.")
@click.option("--format", "target", default="gguf", show_default=True, help="gguf or onnx.")
@click.option("--context", type=int, default=4096, show_default=True, help="Tokens that the cache is to hold.")
@_cache_type_k
@_cache_type_v
@click.option("--pin", multiple=True, help="PATTERN=TYPE: matrices by name have this type. Repeatable.")
@click.option("--at-least", multiple=True, help="PATTERN=TYPE: they have at least as many bits. Repeatable.")
@click.option("--types", help="Types to choose from: Q3_K,Q4_K,Q6_K (default: all of the format).")
@click.option("--template", type=_PATH, help="The GGUF file that `export` will be given as --template.")
@click.option("-o", "--out", type=_PATH, help="plan.json to write, for `quantize --plan`; plan.svg beside it.")
@click.option("--calibration", default=None, help="Text file, JSON lines or dataset name (default: shipped speeches).")
@click.option("--samples", type=int, default=32, show_default=True, help="Samples that weights are judged on.")
@click.option("--seqlen", type=int, default=256, show_default=True, help="Tokens a sample.")
@click.option("--from-run", type=_PATH, help="A finished run of MODEL, which corrects the prediction.")
@click.option("--text", type=_PATH, help="UTF-8 text to measure that run on (default: shipped speeches).")
@click.option("--cache", type=_PATH, help="Folder of what is measured once for a model.")
@click.option("--compute", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to measure.")
@_json
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
        _print_json(found.to_json())
    else:
        _render(render(found))
    if out is not None:
        _say(f"wrote {out} and {out.with_suffix('.svg').name}: `signround-edge quantize {model} --plan {out} -o RUN`")


@main.command()
@_model
@click.option("-o", "--out", type=_PATH, required=True, help="Model folder to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random rotation.")
def rotate(model: str, out: Path, seed: int) -> None:
    """Write MODEL with a rotated residual stream: the same function, to be quantized instead."""
    from signround_edge.model.source import resolve_model
    from signround_edge.outputs import check_output
    from signround_edge.transforms.rotation import rotate as run_rotate

    source = resolve_model(model)
    check_output("-o", out, {"the model": source})
    divergence = run_rotate(source, out, seed)
    _say(f"wrote {out} in f32 with an output head of its own; KL divergence from the original {divergence:.1e}")


@main.command()
@_run
@click.option("--format", "target", required=True, help="gguf or onnx.")
@click.option("-o", "--out", type=_PATH, required=True, help="File or folder to write.")
@click.option("--template", type=_PATH, help="GGUF: metadata to copy; ONNX: your float graph.")
@click.option("--mmproj", type=_PATH, help="GGUF: file for images to write, too.")
@click.option("--mmproj-from", metavar="MODEL", help="GGUF: the model that RUN was made from, for --mmproj.")
@click.option("--accuracy-level", type=click.Choice(list(map(str, ACCURACY_LEVELS))), help="Of MatMulNBits, ONNX only.")
@click.option("--scale-dtype", type=click.Choice(SCALE_DTYPES), help="Stored scales, ONNX only.")
@click.option("--operators", type=click.Choice(OPERATORS), help="ONNX: which operators hold the integers.")
@click.option("--card-text", type=_PATH, help="ONNX: text to measure level 4 on, for the card.")
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
        card_text=card_text, mmproj=mmproj, mmproj_from=mmproj_from, progress=_say,
    )  # fmt: skip
    _say(f"wrote {written.path}")


@main.command()
@click.argument("run", required=False, type=_PATH)
@click.argument("artifacts", nargs=-1, type=_PATH)
@click.option("--text", type=_PATH, help="UTF-8 text to score.  [required]")
@click.option("--device", "devices", multiple=True, default=("cpu-x86",), show_default=True, help="Device profile.")
@_reference
@click.option("--llama-bin", type=_PATH, help="Folder of llama.cpp binaries for the device.")
@click.option("--report", type=_PATH, help="Folder for certificate.json and certificate.html.")
@click.option("--check", "certificate", type=_PATH, help="Re-check a certificate.json; run nothing.")
@_windows
@_n_ctx
@_cache_type_k
@_cache_type_v
@_json
def verify(
    run: Path | None, artifacts: tuple[Path, ...], text: Path | None, devices: tuple[str, ...], reference: str | None,
    llama_bin: Path | None, report: Path | None, certificate: Path | None, windows: int | None, n_ctx: int,
    cache_type_k: str | None, cache_type_v: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Prove on the real runtime that ARTIFACTS hold RUN's weights exactly and behave like them."""
    if certificate is not None:
        if run is not None or text is not None:
            raise click.UsageError("--check takes a certificate.json and nothing else: it runs nothing")
        _check_certificate(certificate, as_json)
        return
    if run is None or not artifacts or text is None:
        missing = "argument 'RUN'" if run is None else "argument 'ARTIFACTS...'" if not artifacts else "option '--text'"
        raise click.UsageError(f"Missing {missing}.")
    from signround_edge import api
    from signround_edge.terminal.progress import terminal_progress
    from signround_edge.terminal.verification import render

    try:
        with terminal_progress("verifying") as progress, _interrupted_by_signals():
            result = api.verify(
                run, artifacts, text, devices=devices, reference=reference, llama_bin=llama_bin, windows=windows,
                n_ctx=n_ctx, cache_type_k=cache_type_k, cache_type_v=cache_type_v, report=report, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        _say("interrupted; nothing was verified, and nothing is left running")
        sys.exit(EXIT_INTERRUPTED)
    if as_json:
        _print_json(result.to_json())
    else:
        _render(render(result))
    if not result.passed:
        raise CheckFailed("verification failed or could not be made; see the reasons above")


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, so that temporary files go and workers end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    before = {getattr(signal, name): signal.signal(getattr(signal, name), interrupt) for name in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_certificate(certificate: Path, as_json: bool) -> None:
    from runtime_tests.certificate.recheck import recheck

    sentence = recheck(certificate)
    if as_json:
        _print_json({"status": "pass", "certificate": str(certificate), "reason": sentence})
    else:
        click.echo(sentence)


@main.command()
@click.argument("path", type=_PATH)
@_json
def inspect(path: Path, as_json: bool) -> None:
    """List the tensors of a run directory or an artifact: format, shape, bytes, bits a weight."""
    from signround_edge import api
    from signround_edge.terminal.inspection import render

    found = api.inspect(path)
    if as_json:
        _print_json(found.to_json())
    else:
        _render(render(found))


@main.command()
@click.argument("model", required=False)
@_json
def models(model: str | None, as_json: bool) -> None:
    """What will work for MODEL (a folder, or a name such as org/model); without it, which families were tried."""
    from signround_edge.terminal.models import render_outlook, render_tested

    if model is None:
        from signround_edge.tested_models import TestedModels

        tested = TestedModels.read()
        _print_json(tested.to_json()) if as_json else _render(render_tested(tested))
        return
    from signround_edge.outlook import outlook

    found = outlook(model)
    _print_json(found.to_json()) if as_json else _render(render_outlook(found))


@main.command()
@_run
@click.option("--out", type=_PATH, help="Folder for pictures, page and analysis.json.")
@_json
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
        _say(f"wrote {path}")
    if as_json:
        _print_json(analysis.to_json())
    else:
        _render(render(analysis))


@main.command()
@click.argument("path")
@click.option("--text", type=_PATH, help="UTF-8 text to score.")
@click.option("--tasks", help="Zero-shot tasks of lm-evaluation-harness instead: hellaswag,piqa,…")
@click.option("--task-dir", type=_PATH, help="Folder with task files of your own.")
@click.option("--limit", type=int, help="Documents of each task at most.")
@_reference
@_windows
@_n_ctx
@_cache_type_k
@_cache_type_v
@_json
def evaluate(
    path: str, text: Path | None, tasks: str | None, task_dir: Path | None, limit: int | None, reference: str | None,
    windows: int | None, n_ctx: int, cache_type_k: str | None, cache_type_v: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Perplexity (with --reference also KL divergence) or zero-shot tasks of a model folder, run or artifact."""
    if (text is None) == (tasks is None):
        raise UserError("give either --text FILE for perplexity, or --tasks NAMES for zero-shot tasks")
    if tasks is not None:
        if cache_type_k or cache_type_v:
            raise UserError("--cache-type-k and --cache-type-v go with --text; leave them out")
        _evaluate_tasks(path, tasks, reference, task_dir, limit, as_json)
        return
    assert text is not None
    from signround_edge import api
    from signround_edge.evaluation.cache_types import CacheTypes

    types = CacheTypes.of(cache_type_k, cache_type_v)
    if types is not None:
        _say(types.text)
    found = api.evaluate(
        path, text, reference=reference, windows=windows, n_ctx=n_ctx, cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
    )  # fmt: skip
    scores = found.to_json()
    if as_json:
        _print_json(scores)
        return
    for key, value in scores.items():
        click.echo(f"{key:>16}  {value:.6g}")


def _evaluate_tasks(
    path: str, tasks: str, reference: str | None, task_dir: Path | None, limit: int | None, as_json: bool
) -> None:
    from signround_edge.evaluation.zero_shot import score_tasks
    from signround_edge.terminal.task_scores import render

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task; give some of lm-evaluation-harness, such as hellaswag,piqa")
    found, original = score_tasks(path, names, reference, task_dir, limit)
    if as_json:
        _print_json({"tasks": found} if original is None else {"tasks": found, "reference_tasks": original})
    else:
        _render(render(found, original))


@main.command()
@click.option("--setup", multiple=True, metavar="NAME", help="Get what a device needs from package registries.")
@_json
def devices(setup: tuple[str, ...], as_json: bool) -> None:
    """List the device profiles: which are ready here, and the command that makes the others so."""
    from devices import get_device
    from runtime_tests.device_status import list_devices, status_of
    from runtime_tests.setup.devices import set_up
    from signround_edge.terminal.devices import render

    profiles = [get_device(name) for name in setup]
    for profile in profiles:
        set_up(profile, _say)
    rows = [status_of(profile) for profile in profiles] if profiles else list_devices()
    if as_json:
        _print_json([row.to_json() for row in rows])
    else:
        click.echo("\n".join(render(rows)))


@main.command()
@click.option("-o", "--out", type=_PATH, help="Keep run, files and report here.")
@_json
def demo(out: Path | None, as_json: bool) -> None:
    """The whole chain on the shipped tiny model: quantize, export to GGUF and ONNX, verify; one table."""
    from signround_edge.demo.chain import run_demo
    from signround_edge.terminal.demo import render
    from signround_edge.terminal.progress import terminal_progress

    with terminal_progress("demo") as progress:
        result = run_demo(out, progress)
    if as_json:
        _print_json(result.to_json())
    else:
        _render(render(result))
    if not result.passed:
        raise CheckFailed("the demo's verification failed; see the table above")


def _render(renderable: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(renderable)


if __name__ == "__main__":
    run: Callable[[], None] = main
    run()
