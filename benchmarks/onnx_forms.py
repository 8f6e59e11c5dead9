"""Every form of ONNX of one run: bytes, who loads it, KL divergence from torch, decoding speed, the same text.

    python -m benchmarks.onnx_forms RUN [--name NAME]            # a finished run directory
    python -m benchmarks.onnx_forms path/to/hf-model --name NAME # or a model, which gets a quick run of onnx:w4g32

The run is exported in each form, and each form opened in the runtimes that it is for, all in one go. Text and speed
come from a process of its own for each, on one thread, after the same prompt; rounds begin at another row each, so that
what else the machine does meets all alike. Speed is in tokens a second of CPU time, the ratio the median of the rounds'
ratios to the first row. The text is compared with transformers' greedy one of the run's dequantized weights; KL
divergence is from the same weights in torch, on windows whose last tokens are fed one by one where there is a cache.
Written to benchmarks/results/forms/NAME.json; `python -m benchmarks.table` renders it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.processor import processor
from benchmarks.scoring import RememberingSession
from benchmarks.table import forms_section
from exporters.onnx import OnnxExporter
from exporters.onnx.options import OnnxOptions
from runtime_tests.runtimes.onnx_genai import OnnxRuntimeGenai
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.runtimes.openvino import OpenVinoRuntime
from runtime_tests.setup.npm import TRANSFORMERS_JS as PACKAGE
from runtime_tests.worker.onnxruntime_engine import model_file
from signround_edge.demo import calibration_text_path, evaluation_text_path
from signround_edge.errors import UserError, first_line
from signround_edge.evaluation.perplexity import TorchSession, evaluate, text_windows
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.files import write_atomically
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

RESULTS = Path(__file__).parent / "results" / "forms"
CACHE = Path(__file__).parent.parent / ".cache" / "onnx-forms"
SETTINGS = TuningSettings(steps=5, samples=16, seqlen=128)
PROMPT, TEXT = "The state of the union", 20
WINDOWS, WINDOW = 4, 128

GENAI, ORT, OPENVINO, NODE = "onnxruntime-genai", "onnxruntime", "openvino", "transformers.js (Node)"
LOGITS = {GENAI: OnnxRuntimeGenai(), ORT: OnnxRuntime(), OPENVINO: OpenVinoRuntime()}


@dataclass(frozen=True)
class Form:
    """One way to export a run.

    Attributes:
        flags: of `signround-edge export`, as the table names it.
        options: the same.
        runtimes: those that it is for.
    """

    flags: str
    options: dict[str, Any] = field(default_factory=dict)
    runtimes: tuple[str, ...] = (GENAI,)


FORMS = (
    Form("--accuracy-level 1", {"accuracy_level": 1}, (GENAI, ORT)),
    Form("--accuracy-level 4", {"accuracy_level": 4}),
    Form("--io-dtype f16", {"io_dtype": "f16"}),
    Form("--layout transformers.js", {"layout": "transformers.js"}, (GENAI, NODE)),
    Form("--layout transformers.js --io-dtype f16", {"layout": "transformers.js", "io_dtype": "f16"}, (GENAI, NODE)),
    Form("--operators qdq", {"operators": "qdq"}, (GENAI, ORT, OPENVINO)),
    Form("--no-cache", {"no_cache": True}, (ORT,)),
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run directory, or a Hugging Face folder")
    parser.add_argument("--name", help="name of the result file (default: that of the folder)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    name = args.name or args.model.resolve().name
    run = _run(args.model, CACHE / name / "run")
    rows = measure(run, CACHE / name, args.tokens, args.rounds)
    what = f"{args.rounds} rounds of {args.tokens} tokens, one thread, {processor()}"
    found = {"what": what, "scheme": run.manifest.scheme, "rows": rows}
    write_atomically(RESULTS / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())
    print(forms_section(name, found))


def _run(model: Path, out: Path) -> RunDirectory:
    if (model / "manifest.json").is_file():
        return RunDirectory.open(model)
    if (out / "manifest.json").is_file():
        return RunDirectory.open(out)
    return quantize(model, parse_scheme("onnx:w4g32"), out, str(calibration_text_path()), SETTINGS)


def measure(run: RunDirectory, folder: Path, decoded: int, rounds: int) -> list[dict[str, Any]]:
    """The rows, each with `form`, `bytes`, `runtime` and `loads`; with figures where it loads.

    Args:
        folder: where the exports go.
        decoded: tokens that are timed in a round.
    """
    prompt = [int(token) for token in load_tokenizer(run.config_dir)(PROMPT)["input_ids"]]
    expected = greedy_text(run, prompt)
    torch_logits = RememberingSession(TorchSession(load_run_model(run)))
    windows = text_windows(run.config_dir, evaluation_text_path(), WINDOW, WINDOWS)
    rows = []
    for form in FORMS:
        out = folder / form.flags.replace("--", "").replace(" ", "-")
        try:
            OnnxExporter().export(run, out, OnnxOptions(log=_say, **form.options))
        except UserError as error:
            rows.append({"form": form.flags, "bytes": 0, "runtime": "–", "loads": f"not exported: {error}"})
            continue
        model = model_file(out)
        size = sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))
        for runtime in form.runtimes:
            row: dict[str, Any] = {"form": form.flags, "bytes": size, "runtime": runtime, "loads": "yes", "folder": out}
            rows.append(row)
            try:
                if runtime in LOGITS:
                    with LOGITS[runtime].open(out) as session:
                        row["kld_mean"] = evaluate(session, windows, torch_logits).kld_mean
                row["same_tokens"] = agreeing(decode(out, runtime, prompt, TEXT)["tokens"], expected)
                row["text_tokens"] = len(expected)
            except (UserError, subprocess.CalledProcessError) as error:
                row["loads"] = f"no: {reason_of(error)}"
    alive = [row for row in rows if row["loads"] == "yes"]
    for first in range(rounds):
        for row in (*alive[first % len(alive) :], *alive[: first % len(alive)]):
            speed = decode(row["folder"], row["runtime"], prompt, 0, decoded)
            row.setdefault("all_tokens_per_cpu_s", []).append(speed["tokens_per_cpu_s"])
            row.setdefault("all_tokens_per_s", []).append(speed["tokens_per_s"])
            _say(f"{row['form']} in {row['runtime']}: {speed['tokens_per_cpu_s']:.1f} tokens a CPU second")
    for row in alive:
        ratios = zip(row["all_tokens_per_cpu_s"], alive[0]["all_tokens_per_cpu_s"], strict=True)
        row["ratio"] = statistics.median(ours / first for ours, first in ratios)
        row["tokens_per_cpu_s"] = statistics.median(row["all_tokens_per_cpu_s"])
    return [{key: value for key, value in row.items() if key != "folder"} for row in rows]


def greedy_text(run: RunDirectory, prompt: list[int]) -> list[int]:
    """transformers' continuation of a prompt with a run's dequantized weights, of TEXT tokens if it does not end."""
    model: Any = load_run_model(run)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=TEXT, do_sample=False)
    return [int(token) for token in made[0][len(prompt) :]]


def agreeing(found: list[int], expected: list[int]) -> int:
    """How many tokens of two texts are the same, from the beginning."""
    differing = (i for i, (ours, theirs) in enumerate(zip(found, expected, strict=False)) if ours != theirs)
    return next(differing, min(len(found), len(expected)))


def decode(folder: Path, runtime: str, prompt: list[int], count: int, decoded: int = 2) -> dict[str, Any]:
    """What a process of its own says of a folder in a runtime: see `onnx_forms_process.measure`.

    Raises:
        subprocess.CalledProcessError: it does not load there, or does not run.
    """
    numbers = [",".join(map(str, prompt)), str(count), str(decoded)]
    if runtime == NODE:
        if PACKAGE.missing() is not None:
            PACKAGE.install(_say)
        script = str(Path(__file__).with_suffix(".mjs"))
        command = ["node", script, str(PACKAGE.path), f"{folder.resolve().parent}/", folder.name, *numbers]
    else:
        command = [sys.executable, "-m", "benchmarks.onnx_forms_process", str(folder), runtime, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def reason_of(error: UserError | subprocess.CalledProcessError) -> str:
    """What a process said last, or our own sentence."""
    said = (error.stderr or "").strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
    return (said[-1] if said else first_line(error)).replace("|", "/")[:200]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
