"""One model from its checkpoint to files that run, stage by stage: what worked, with its figure, or why it did not."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.onnx_forms import GENAI, PROMPT, TEXT, agreeing, decode, greedy_text, reason_of
from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from exporters.onnx import OnnxExporter
from exporters.onnx.artifact.comparison import divergence
from exporters.onnx.artifact.sidecar import Sidecar
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.verify import verify
from signround_edge.demo import calibration_text_path, evaluation_text_path
from signround_edge.errors import CheckFailed, UserError
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

SCHEME = "gguf:q4_0,onnx:w4g32"  # one run for both formats
SETTINGS = TuningSettings(steps=2, samples=4, seqlen=64, batch_size=2, lr=0.02)
WINDOW, WINDOWS = 128, 2
POSITIONS = 200
# Four windows in batches of two, each with so many single tokens after it.
PAIRS, CACHED_STEPS = 2, 20
DECODED = 64  # tokens that onnxruntime-genai is timed with

# In the order of the table's columns.
FORMATS = {
    "gguf": ("GGUF built in", "GGUF template", "llama.cpp", "F16 top-1"),
    "onnx": ("ONNX", "KV cache", "ONNX route", "KL, texts", "KL, steps", "genai", "tokens/CPU s"),
}
STAGES = ("source check", "tune", *FORMATS["gguf"], *FORMATS["onnx"])

Convert = Callable[[Path, Path], Path]
Found = dict[str, str]  # stage → "yes", a figure, or "no: " and the reason


def run_stages(model: Path, work: Path, convert: Convert | None, formats: Collection[str] = tuple(FORMATS)) -> Found:
    """What becomes of the model in the folder `model`.

    Args:
        work: an empty folder for everything that is made.
        convert: llama.cpp's converter, (model, file to write) → file; None leaves out the template route.
        formats: which to export to, of `FORMATS`.
    Returns:
        The stages of these formats, and those before.
    """
    left_out = [stage for name in FORMATS if name not in formats for stage in FORMATS[name]]
    found: Found = {stage: "" for stage in STAGES if stage not in left_out}
    try:
        run = quantize(
            model, parse_scheme(SCHEME), work / "run", str(calibration_text_path()), SETTINGS, float_fallback=True
        )
    except UserError as error:
        found["source check"] = found["tune"] = f"no: {_short(error)}"
        return found
    check = run.manifest.source_check
    found["source check"] = "not done" if check is None or check["error"] is None else f"{check['error']:.0e}"
    found["tune"] = "yes"
    if "gguf" in formats:
        found |= _gguf(run, work, convert and (lambda: convert(model, work / "template.gguf")))
    if "onnx" in formats:
        found |= _onnx(run, work)
    return found


class ConverterRefused(Exception):
    """llama.cpp's converter does not take the model."""


def _gguf(run: RunDirectory, work: Path, make_template: Callable[[], Path] | None) -> Found:
    found: Found = dict.fromkeys(FORMATS["gguf"], "")
    ways = {"GGUF built in": None, "GGUF template": make_template}
    for stage, make in ways.items():
        if stage == "GGUF template" and make is None:
            continue
        try:
            template = None if make is None else make()
            options = ExportOptions(template=template, log=lambda line: None)
            file = GgufExporter().export(run, work / f"{stage.replace(' ', '-')}.gguf", options)
        except (UserError, CheckFailed, ConverterRefused) as error:
            found[stage] = f"no: {_short(error)}"
            continue
        found[stage], figure = _verified(run, file)
        if found["llama.cpp"] in ("", "no"):
            found["llama.cpp"] = figure
            with contextlib.suppress(UserError):  # llama.cpp refuses the file: the line above says so
                found["F16 top-1"] = f"{_top1(run, work / 'f16.gguf', template):.1%}"
    return found


def _onnx(run: RunDirectory, work: Path) -> Found:
    try:
        folder = OnnxExporter().export(run, work / "onnx", ExportOptions(log=lambda line: None))
    except (UserError, CheckFailed) as error:
        return {"ONNX": f"no: {_short(error)}"}
    sidecar = Sidecar.read(folder)
    made_by = sidecar.provenance["graph_builder"]
    return {
        "ONNX": _verified(run, folder)[0],
        "KV cache": "yes" if sidecar.kv_cache else "no",
        "ONNX route": "traced" if made_by.startswith("torch") else "builder",
        **_divergence(run, folder),
        **_in_genai(run, folder),
    }


def _divergence(run: RunDirectory, folder: Path) -> Found:
    """Mean KL divergence of transformers from the graph at level 1: of texts, two at a time, and of single tokens."""
    try:
        found = [divergence(run, folder / "model.onnx", CACHED_STEPS, seed) for seed in range(PAIRS)]
    except Exception as error:  # onnxruntime's error classes share no base but Exception
        return {"KL, texts": f"no: {_short(error)}", "KL, steps": ""}
    return {
        "KL, texts": f"{max(abs(one.texts) for one in found):.0e}",
        "KL, steps": f"{max(abs(one.steps) for one in found):.0e}",
    }


def _in_genai(run: RunDirectory, folder: Path) -> Found:
    """Whether onnxruntime-genai writes transformers' greedy text, in a process of its own, and how fast it decodes."""
    prompt = [int(token) for token in load_tokenizer(run.config_dir)(PROMPT)["input_ids"]]
    try:
        found = decode(folder, GENAI, prompt, TEXT, DECODED)
    except subprocess.CalledProcessError as error:
        return {"genai": f"no: {_shortened(reason_of(error))}", "tokens/CPU s": ""}
    expected = greedy_text(run, prompt)
    same = agreeing(found["tokens"], expected)
    loads = "yes" if same == len(expected) else f"no: only {same} of {len(expected)} greedy tokens are transformers'"
    return {"genai": loads, "tokens/CPU s": f"{found['tokens_per_cpu_s']:.0f}"}


def _verified(run: RunDirectory, artifact: Path) -> tuple[str, str]:
    """("yes", or what failed; the mean KL of the runtime in floats, "no" where there is none)."""
    text = evaluation_text_path()
    report = verify(run, [artifact], text, n_ctx=WINDOW, max_windows=WINDOWS, log=lambda line: None)
    (weights,), (runtime,) = report.artifacts, report.runtimes
    scores = runtime.control or runtime.parity
    figure = "no" if scores is None or scores.kld_mean is None else f"{scores.kld_mean:.0e}"
    if report.passed:
        return "yes", figure
    return f"no: {_shortened(weights.reason or runtime.reason or 'it failed')}", figure


def _top1(run: RunDirectory, file: Path, template: Path | None) -> float:
    """The share of positions at which an F16 file's most likely token in llama.cpp is torch's."""
    GgufExporter().export(run, file, ExportOptions(dtype="f16", template=template, log=lambda line: None))
    tokens = np.random.default_rng(0).integers(10, 3000, POSITIONS)
    with torch.no_grad():
        theirs = load_run_model(run)(input_ids=torch.from_numpy(tokens)[None]).logits[0].argmax(-1).numpy()
    with LlamaCppRuntime().open(file) as session:
        ours = session.logits(tokens.astype(np.int32))[:POSITIONS].argmax(-1)
    file.unlink()
    return float((ours == theirs).mean())


def _short(error: Exception) -> str:
    return _shortened(str(error))


def _shortened(text: str) -> str:
    """The first clause, without the names of temporary files."""
    text = re.sub(r"\S*/(\S+)", r"\1", text.partition(" (there is for")[0])
    return text.partition("; ")[0].replace("|", "/")[:300]


def to_json(results: dict[str, Found], versions: dict[str, Any]) -> str:
    """The file of all results."""
    return json.dumps({"versions": versions, "models": results}, indent=1) + "\n"
