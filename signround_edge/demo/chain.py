"""`demo`: the whole chain on the shipped tiny model: round, tune, export to both formats, verify; one table."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.interface import ExportOptions
from runtime_tests.report.report import VerifyReport
from runtime_tests.verify import verify
from signround_edge.demo import calibration_text_path, evaluation_text_path, tiny_llama_path
from signround_edge.evaluation.metrics import Scores
from signround_edge.evaluation.perplexity import TorchSession, evaluate, text_windows
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.inspection import Inspection, inspect
from signround_edge.outputs import check_output
from signround_edge.plugins import exporters
from signround_edge.progress import Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

if TYPE_CHECKING:
    pass

SCHEME = "gguf:q4_0,onnx:w4g32"
SETTINGS = TuningSettings(steps=100, samples=64, seqlen=128)
N_CTX, WINDOWS = 256, 16


@dataclass(frozen=True)
class DemoResult:
    """Figures of the demo.

    Attributes:
        rounded, tuned: torch with rounded and with tuned weights, against the original model.
        files: artifact path → what it holds.
        verified: exactness and each runtime's figures.
    """

    rounded: Scores
    tuned: Scores
    files: dict[str, Inspection]
    verified: VerifyReport

    @property
    def passed(self) -> bool:
        """Whether every check of `verify` passed."""
        return self.verified.passed

    def to_json(self) -> dict[str, Any]:
        """One document with all figures."""
        return {
            "rounded": vars(self.rounded),
            "tuned": vars(self.tuned),
            "files": {
                path: {"total_bytes": found.total_bytes, "bits_per_weight": found.bits_per_weight}
                for path, found in self.files.items()
            },
            "verify": self.verified.to_json(),
        }


def run_demo(out: Path | None, progress: Progress) -> DemoResult:
    """Run the chain in `out` (a temporary folder when None)."""
    with _folder(out) as folder:
        model, text = tiny_llama_path(), evaluation_text_path()
        runs = {}
        for name, steps in (("rounded", 0), ("tuned", SETTINGS.steps)):
            progress.line(f"quantize: {SCHEME}, {steps} steps a block")
            settings = TuningSettings(**{**vars(SETTINGS), "steps": steps})
            calibration = str(calibration_text_path())
            runs[name] = quantize(model, parse_scheme(SCHEME), folder / name, calibration, settings, progress=progress)
        progress.line("evaluate: original, rounded and tuned weights in torch")
        scores = {name: _score(run, model, text) for name, run in runs.items()}
        options = ExportOptions(log=progress.line)
        artifacts = [
            exporters()["gguf"].export(runs["tuned"], folder / "tiny-llama-q4_0.gguf", options),
            exporters()["onnx"].export(runs["tuned"], folder / "tiny-llama-onnx-w4g32", options),
        ]
        progress.line("verify: llama.cpp and ONNX Runtime")
        verified = verify(
            runs["tuned"], artifacts, text, reference=model, n_ctx=N_CTX, max_windows=WINDOWS, log=progress.line
        )
        files = {str(path): inspect(path) for path in artifacts}
        return DemoResult(scores["rounded"], scores["tuned"], files, verified)


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        check_output("-o", out / "tuned", {})
        out.mkdir(parents=True, exist_ok=True)
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="signround-demo-") as folder:
        yield Path(folder)


def _score(run: RunDirectory, model: Path, text: Path) -> Scores:
    windows = text_windows(model, text, N_CTX, WINDOWS)
    return evaluate(TorchSession(load_run_model(run)), windows, TorchSession(load_source_model(model)))
