"""What a program calls, in the words of the command line, which calls the same functions and shows their results.

Paths may be strings. Progress goes to `progress`, a function that takes a line of text (`print`), or a `Progress`.
Every function raises `UserError` for bad usage or input, with one sentence that names what is wrong and the way out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from signround_edge import arguments
from signround_edge.arguments import bytes_of, of_kind, path_of, several
from signround_edge.errors import UserError
from signround_edge.outputs import check_output
from signround_edge.progress import SILENT, Progress

if TYPE_CHECKING:
    from runtime_tests.report.report import VerifyReport
    from signround_edge.evaluation.metrics import Scores
    from signround_edge.inspection import Inspection
    from signround_edge.planning.found_plan import FoundPlan
    from signround_edge.planning.request import Finished
    from signround_edge.run_directory import RunDirectory
    from signround_edge.schemes.scheme import Scheme
    from signround_edge.tuning.ranks import Ranks
    from signround_edge.tuning.settings import TuningSettings

StrPath = str | os.PathLike[str]
OnProgress = Progress | Callable[[str], None] | None


def quantize(
    model: StrPath,
    scheme: str | None,
    out: StrPath,
    *,
    plan: StrPath | None = None,
    calibration: StrPath | None = None,
    settings: TuningSettings | None = None,
    tensor_type: str | Sequence[str] = (),
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
    imatrix: StrPath | None = None,
    save_imatrix: StrPath | None = None,
    float_fallback: bool = False,
    device: str = "auto",
    resume: bool = False,
    source_check: str = "auto",
    max_memory: str | int | None = None,
    max_gpu_memory: str | int | None = None,
    progress: OnProgress = None,
) -> RunDirectory:
    """Tune a model on the grids of a scheme, one decoder block in memory at a time, and write a run directory.

    Args:
        model: a Hugging Face folder, or a name such as "org/model" to download.
        scheme: "gguf:q4_k_m", "onnx:w4g128-asym", …; a comma joins those of one grid.
        out: run directory to write.
        plan: plan.json of this model, instead of a scheme.
        calibration: text file, JSON lines or the name of a dataset; None takes the shipped speeches.
        settings: all that decides the result besides; `RECIPES` has named ones.
        tensor_type: "PATTERN=TYPE" for matrices by name, such as "ffn_down=Q6_K"; the first that matches counts.
        token_embedding_type, output_tensor_type: types of embedding and output head; None leaves them to the scheme.
        imatrix: llama.cpp's importance matrix, for E[x²] of the scale search.
        save_imatrix: where to write the calibration's own E[x²] for llama-quantize.
        float_fallback: keep matrices that no block size divides in floats instead of refusing the model.
        device: "auto", "cpu" or "cuda".
        resume: continue `out` after its last complete block.
        source_check: whether the blocks are first compared with transformers' own model: "full" (all of it in memory),
            "blocks" (its weights read from disk), "auto" (either, by the memory that is free) or "off".
        max_memory: most of the host's memory that it may be estimated to take ("10G", or bytes); hidden states go to
            a file where they do not fit.
        max_gpu_memory: the same of a GPU's; None: what is free. What does not fit stays in the host's memory, and a
            step goes through the block in parts.

    Where torchrun has started several processes, all of them call this with the same arguments and share the samples.
    """
    memory, gpu_memory = _size("--max-memory", max_memory), _size("--max-gpu-memory", max_gpu_memory)
    from exporters.gguf.imatrix.importance import importance_files
    from signround_edge.model.source import resolve_model
    from signround_edge.tuning.cost.estimate import Limits
    from signround_edge.tuning.quantize import quantize as tune
    from signround_edge.tuning.settings import TuningSettings

    with _ranks() as ranks:
        target = path_of("-o (out)", out)
        shown = _progress(progress) if ranks is None or ranks.first else SILENT
        chosen = TuningSettings() if settings is None else settings
        of_kind("settings", chosen, TuningSettings, 'TuningSettings, such as RECIPES["fast"]')
        parsed = _scheme(scheme, plan, tensor_type, token_embedding_type, output_tensor_type)
        text = None if calibration is None else _text("--calibration", calibration)
        given, saved = _path("--imatrix", imatrix), _path("--save-imatrix", save_imatrix)
        folder = resolve_model(_text("model", model))
        inputs = {"the model": folder, "--calibration": _path("--calibration", text), "--imatrix": given}
        inputs["--plan"] = _path("--plan", plan)
        check_output("-o", target, inputs)
        if saved is not None:
            check_output("--save-imatrix", saved, {**inputs, "-o": target})
        if text is None:
            from signround_edge.demo import calibration_text_path

            text = str(calibration_text_path())
            shown.line(
                "note: calibrating on the shipped speeches; text like your application's (--calibration) is better"
            )
        source, sink = importance_files(given, saved, folder, text)
        return tune(
            folder,
            parsed,
            target,
            text,
            chosen,
            device,
            resume,
            float_fallback,
            shown,
            source,
            sink,
            source_check,
            ranks,
            Limits(memory, gpu_memory),
        )


def _size(flag: str, size: str | int | None) -> int | None:
    return None if size is None else bytes_of(flag, size)


def _scheme(
    scheme: str | None,
    plan: StrPath | None,
    tensor_type: str | Sequence[str],
    embedding: str | None,
    head: str | None,
) -> Scheme:
    """What a run is to be quantized to: a scheme with types by name, or a plan, which has every type."""
    from signround_edge.schemes.planned_types import PlannedTypes
    from signround_edge.schemes.scheme import parse_scheme, planned_scheme

    if (scheme is None) == (plan is None):
        raise UserError("give either --scheme, such as gguf:q4_k_m, or --plan, a file that `plan` wrote")
    types = several("--tensor-type", tensor_type)
    if plan is not None:
        flags = {"--tensor-type": types, "--token-embedding-type": embedding, "--output-tensor-type": head}
        given = next((flag for flag, value in flags.items() if value), None)
        if given is not None:
            raise UserError(f"--plan has a type for every matrix, so {given} has no say; pin it in `plan` instead")
        return planned_scheme(PlannedTypes.read(path_of("--plan", plan)))
    of_kind("--scheme", scheme, str, "a text such as gguf:q4_k_m")
    assert scheme is not None
    return parse_scheme(scheme).with_overrides(types).with_outside_types(embedding, head)


@contextlib.contextmanager
def _ranks() -> Iterator[Ranks | None]:
    """The processes that torchrun has started, this one among them; None where it has started none."""
    from signround_edge.tuning.launch import Place

    if Place.of_environment().world == 1:
        yield None
        return
    from signround_edge.tuning.ranks import joined

    with joined() as ranks:
        yield ranks


@dataclass(frozen=True)
class Export:
    """What `export` wrote; usable wherever a path is.

    Attributes:
        format: "gguf" or "onnx".
        path: of the file or folder that a runtime loads.
    """

    format: str
    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def to_json(self) -> dict[str, str]:
        """Format and path."""
        return {"format": self.format, "path": str(self.path)}


def export(
    run: StrPath | RunDirectory,
    format: str,
    out: StrPath,
    *,
    template: StrPath | None = None,
    dtype: str | None = None,
    split_max_size: str | int | None = None,
    accuracy_level: int | None = None,
    scale_dtype: str | None = None,
    operators: str | None = None,
    ort_format: bool = False,
    layout: str | None = None,
    io_dtype: str | None = None,
    no_cache: bool = False,
    card_text: StrPath | None = None,
    mmproj: StrPath | None = None,
    mmproj_from: StrPath | None = None,
    progress: OnProgress = None,
) -> Export:
    """Write the integers and scales of a run, unchanged, as a GGUF file or an ONNX folder, whole or not at all.

    Args:
        format: "gguf", "onnx", or the name of an installed exporter.
        out: file or folder to write.
        template: GGUF: a file whose metadata to copy; ONNX: a float graph of the model.
        dtype: "f32" or "f16" writes the dequantized weights as floats instead.
        split_max_size: split the data into files of at most this size: 500_000_000, "500M" or "4G".
        accuracy_level, scale_dtype, operators, ort_format, layout, io_dtype, no_cache: ONNX: see
            `exporters.onnx.options.OnnxOptions`.
        card_text: ONNX: text on which the card says what accuracy level 4 costs; None takes shipped speeches.
        mmproj, mmproj_from: GGUF: see `exporters.gguf.options.GgufOptions`.

    Raises:
        CheckFailed: what was written is not the run's; the message names the tensor.
    """
    from exporters.interface import foreign_option, options_for
    from exporters.onnx.options import OnnxOptions
    from signround_edge.plugins import exporters

    shown, known, target = _progress(progress), exporters(), path_of("-o (out)", out)
    if format not in known:
        raise UserError(f"--format {format} is unknown; known are {', '.join(known)}")
    split_flag = "--max-shard-size" if format == "onnx" else "--split-max-size"  # two names of one option
    given = {
        "template": _path("--template", template), "dtype": dtype, "log": shown.line,
        "split_max_bytes": None if split_max_size is None else bytes_of(split_flag, split_max_size),
        "accuracy_level": accuracy_level, "scale_dtype": scale_dtype,
        "operators": operators, "ort_format": ort_format or None, "layout": layout,
        "io_dtype": io_dtype, "no_cache": no_cache or None,
        "mmproj": _path("--mmproj", mmproj),
        "mmproj_from": None if mmproj_from is None else _text("--mmproj-from", mmproj_from),
    }  # fmt: skip
    options, text = options_for(format, known, given), _path("--card-text", card_text)
    if text is not None and not isinstance(options, OnnxOptions):
        raise foreign_option("card_text", ["onnx"], format)
    if text is not None:
        from runtime_tests.accuracy_levels import check_card_text  # late: GGUF needs no ONNX Runtime

        if isinstance(options, OnnxOptions) and not options.has_level_4:
            asked = f"--dtype {options.dtype}" if options.dtype is not None else f"--io-dtype {options.io_dtype}"
            raise UserError(f"--card-text is for measuring accuracy level 4, and {asked} has none; leave it out")
        check_card_text(text)
    opened = _run(run)
    if text is not None:
        check_card_text(text, opened.config_dir)
    check_output("-o", target, {"the run": opened.path, "--template": options.template, "--card-text": text})
    path = known[format].export(opened, target, options)
    if isinstance(options, OnnxOptions) and options.has_level_4:
        from exporters.onnx.artifact.level_cost import add_level_cost, said_of_level_4
        from runtime_tests.accuracy_levels import level_4_cost

        shown.line("onnx: measuring what accuracy level 4 costs on this model")
        cost = level_4_cost(path, opened.config_dir, text)
        add_level_cost(path, cost)
        shown.line(f"onnx: {said_of_level_4(cost, options.accuracy_level)}")
    return Export(format, path)


def verify(
    run: StrPath | RunDirectory,
    artifacts: StrPath | Sequence[StrPath],
    text: StrPath,
    *,
    devices: str | Sequence[str] = ("cpu-x86",),
    reference: StrPath | None = None,
    llama_bin: StrPath | None = None,
    windows: int | None = None,
    n_ctx: int = 512,
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
    report: StrPath | None = None,
    progress: OnProgress = None,
) -> VerifyReport:
    """Prove on the real runtimes that artifacts hold a run's weights exactly and behave like them.

    What does not hold is no exception: `passed` of the result says it, and its reasons name the first tensor, key or
    layer that is off.

    Args:
        artifacts: one exported file or folder, or several.
        text: UTF-8 text to score.
        devices: names of device profiles.
        reference: the original model, to say how far the artifacts are from it.
        llama_bin: folder of llama.cpp binaries for the devices.
        windows: windows of `n_ctx` tokens to score at most.
        cache_type_k, cache_type_v: of llama.cpp's cache: f16, q8_0 or q4_0.
        report: folder for certificate.json and certificate.html.
    """
    from runtime_tests.certificate.write import certificate_files, write_certificate
    from runtime_tests.verify import DEFAULT_WINDOWS
    from runtime_tests.verify import verify as check
    from signround_edge.evaluation.cache_types import CacheTypes
    from signround_edge.model.source import resolve_model

    shown = _progress(progress)
    given = [artifacts] if isinstance(artifacts, str | os.PathLike) else list(artifacts)
    files, scored = [path_of("artifacts", one) for one in given], path_of("--text", text)
    proof = _path("--report", report)
    opened = _run(run)
    original = None if reference is None else resolve_model(_text("--reference", reference))
    for written in certificate_files(proof) if proof is not None else ():
        check_output("--report", written, {"the run": opened.path, "--text": scored, "--reference": original})
    found = check(
        opened,
        files,
        scored,
        devices=several("--device", devices),
        reference=original,
        n_ctx=n_ctx,
        max_windows=DEFAULT_WINDOWS if windows is None else windows,
        llama_bin=_path("--llama-bin", llama_bin),
        cache_types=CacheTypes.of(cache_type_k, cache_type_v),
        log=shown.line,
    )
    for path in write_certificate(found, proof) if proof is not None else ():
        shown.line(f"wrote {path}")
    return found


def plan(
    model: StrPath,
    *,
    target_size: str | int | None = None,
    target_bpw: float | None = None,
    memory: str | int | None = None,
    memory_of: str | None = None,
    format: str = "gguf",
    context: int = 4096,
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
    pin: str | Sequence[str] = (),
    at_least: str | Sequence[str] = (),
    types: str | None = None,
    template: StrPath | None = None,
    calibration: StrPath | None = None,
    samples: int = 32,
    seqlen: int = 256,
    from_run: StrPath | RunDirectory | None = None,
    text: StrPath | None = None,
    cache: StrPath | None = None,
    device: str = "auto",
    progress: OnProgress = None,
) -> FoundPlan:
    """Types for every tensor of a model under a budget of bytes, of the least predicted KL divergence once tuned.

    Args:
        target_size: bytes of the file: 1_500_000_000, "1.5G" or "800M".
        target_bpw: bits a weight, over all tensors.
        memory: bytes for file, cache and buffers together.
        memory_of: name of the device whose memory that is, for messages.
        format: "gguf" or "onnx".
        context: tokens that the runtime's cache is to hold.
        cache_type_k, cache_type_v: of llama.cpp's cache: f16, q8_0 or q4_0.
        pin, at_least: "PATTERN=TYPE" for matrices by name: this type, or one of at least as many bits a weight.
        types: the types to choose from, such as "Q3_K,Q4_K,Q6_K"; None: all of the format.
        template: the GGUF file that `export` will be given as a template.
        calibration: text file, JSON lines or the name of a dataset; None takes the shipped speeches.
        samples, seqlen: how much of it.
        from_run: a finished run of the model, whose measured KL divergence corrects the prediction.
        text: what to measure it on; None takes the shipped speeches that calibration has not seen.
        cache: folder of what is measured once for a model; None: see docs/plan.md.
        device: "auto", "cpu" or "cuda", for the pass through the model.
    """
    from signround_edge.demo import calibration_text_path
    from signround_edge.evaluation.cache_types import CacheTypes
    from signround_edge.model.source import resolve_model
    from signround_edge.model.tokenizer import load_tokenizer
    from signround_edge.planning.budget import Budget
    from signround_edge.planning.candidates import parse_wish
    from signround_edge.planning.plan import find_plan
    from signround_edge.planning.request import Request
    from signround_edge.planning.sizes import exporter_sizes
    from signround_edge.sensitivity.store import default_cache, usable_cache
    from signround_edge.tuning.calibration.text import calibration_tokens
    from signround_edge.tuning.quantize import chosen_device

    shown = _progress(progress)
    budget = Budget.of(target_size, target_bpw, memory, memory_of)
    where = usable_cache(default_cache() if cache is None else path_of("--cache", cache))
    sizes = exporter_sizes(format, where, _path("--template", template))
    cache_types = CacheTypes.of(cache_type_k, cache_type_v)
    if cache_types is not None and format != "gguf":
        raise UserError("--cache-type-k and --cache-type-v are llama.cpp's; leave them out with --format onnx")
    for flag, value, low in (("--context", context, 1), ("--samples", samples, 1), ("--seqlen", seqlen, 2)):
        arguments.at_least(flag, value, low)
    wishes = [parse_wish(one, True, format) for one in several("--pin", pin)]
    wishes += [parse_wish(one, False, format) for one in several("--at-least", at_least)]
    folder = resolve_model(_text("model", model))
    named = str(calibration_text_path()) if calibration is None else _text("--calibration", calibration)
    tokens = calibration_tokens(named, load_tokenizer(folder), samples, seqlen)
    finished = None if from_run is None else _finished(_run(from_run), folder, text, shown)
    request = Request(format, budget, context, tuple(wishes), types, Path(named).name, cache_types=cache_types)
    return find_plan(folder, request, sizes, tokens, where, chosen_device(device), shown, finished)


def device_memory(name: str) -> str:
    """Bytes that an app may take on a device, by its profile; UserError where the profile does not say."""
    from devices import get_device

    megabytes = get_device(name).memory_budget_mb
    if megabytes is None:
        raise UserError(f"--device {name}: its profile has no memory_budget_mb; add one, or give --memory 2G")
    return f"{megabytes}M"


def _finished(run: RunDirectory, model: Path, text: StrPath | None, progress: Progress) -> Finished:
    """A run's types, and its KL divergence from the model on a text that tuning has not seen."""
    from signround_edge.demo import evaluation_text_path
    from signround_edge.evaluation.scoring import score
    from signround_edge.model.source import SourceModel
    from signround_edge.planning.request import Finished

    if run.manifest.source["files"] != SourceModel.open(model).hashes():
        raise UserError(f"--from-run {run.path} is of another model; give a run of {model}")
    scored = evaluation_text_path() if text is None else path_of("--text", text)
    kl = score(str(run.path), scored, str(model), 512, 16).kld_mean
    assert kl is not None
    progress.line(f"{run.path}: KL divergence {kl:.4g} on {scored.name}")
    return Finished({t.name: t.format for t in run.manifest.tensors if t.format is not None}, kl)


def inspect(path: StrPath) -> Inspection:
    """The tensors of a run directory or an artifact: format, shape, bytes, bits a weight."""
    from signround_edge.inspection import inspect as look

    return look(path_of("path", path))


def evaluate(
    path: StrPath,
    text: StrPath,
    *,
    reference: StrPath | None = None,
    windows: int | None = None,
    n_ctx: int = 512,
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
) -> Scores:
    """Perplexity of a model folder, a run directory or an artifact on its runtime, as `llama-perplexity` defines it.

    Args:
        text: UTF-8 text to score.
        reference: the full-precision model; with it also KL divergence and top-1 agreement.
        windows: windows of `n_ctx` tokens to score at most.
        cache_type_k, cache_type_v: of llama.cpp's cache: f16, q8_0 or q4_0.
    """
    from signround_edge.evaluation.cache_types import CacheTypes
    from signround_edge.evaluation.scoring import score

    original = None if reference is None else _text("--reference", reference)
    types = CacheTypes.of(cache_type_k, cache_type_v)
    return score(_text("path", path), path_of("--text", text), original, n_ctx, windows, types)


def _progress(given: OnProgress) -> Progress:
    if given is None:
        return SILENT
    if isinstance(given, Progress):
        return given
    if not callable(given):
        raise UserError(f"progress must be a function that takes a line of text, such as print, not {given!r:.80}")
    return Progress(given)


def _run(given: StrPath | RunDirectory) -> RunDirectory:
    from signround_edge.run_directory import RunDirectory

    return given if isinstance(given, RunDirectory) else RunDirectory.open(path_of("run", given))


def _path(name: str, given: StrPath | None) -> Path | None:
    return None if given is None else path_of(name, given)


def _text(name: str, given: StrPath) -> str:
    """A folder or a name such as "org/model", as it was given."""
    path_of(name, given)
    return os.fspath(given)
