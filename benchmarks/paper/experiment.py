"""One cell of a table: a way to quantize, measured with one seed, and kept so that it is measured once."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import nn

from benchmarks import gptq
from benchmarks.scoring import RememberingSession
from signround_edge.evaluation.perplexity import TorchSession, evaluate, text_windows
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.files import write_atomically
from signround_edge.model.decoder import set_tensor
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.calibration.text import calibration_tokens
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings, settings_from


@dataclass(frozen=True)
class Setup:
    """What all cells share.

    Attributes:
        model: Hugging Face folder.
        calibration: calibration text.
        texts: texts to score on.
        samples, seqlen, steps, batch_size: of tuning, where a cell does not say otherwise.
        seeds: of the sample order; methods without chance are measured once.
        n_ctx, windows: of scoring, as `evaluate` has them.
    """

    model: Path
    calibration: Path
    texts: tuple[Path, ...]
    samples: int = 32
    seqlen: int = 128
    steps: int = 100
    batch_size: int = 4
    seeds: tuple[int, ...] = (42, 43, 44)
    n_ctx: int = 256
    windows: int = 24

    @property
    def protocol(self) -> str:
        """All that decides a figure besides the cell and its seed, for the row's key."""
        texts = "+".join(text.name for text in self.texts)
        return f"{self.model.name}, {self.calibration.name} → {texts}, {self.windows} × {self.n_ctx}"


@dataclass(frozen=True)
class Cell:
    """A way to quantize.

    Attributes:
        label: its name in the table.
        scheme: as for `quantize --scheme`.
        recipe: settings that `changes` are changes of; None is GPTQ.
        changes: settings by name, or `gptq.Options` by name.
    """

    label: str
    scheme: str
    recipe: str | None
    changes: dict[str, Any] = field(default_factory=dict)

    def settings(self, setup: Setup) -> TuningSettings:
        """The settings of tuning (of GPTQ: of the run that gives it grids, embedding and head)."""
        sizes = {name: getattr(setup, name) for name in ("samples", "seqlen", "steps", "batch_size")}
        if self.recipe is None:
            return settings_from("default", {**sizes, "steps": 0})
        chosen = {**sizes, **self.changes}
        if self.recipe.startswith("paper"):  # those fix a rate of 1/steps for the steps of the paper
            chosen = {"lr": 1 / max(1, chosen["steps"]), **chosen}
            chosen |= {} if "scale_lr" in chosen else {"scale_lr": chosen["lr"]}
        return settings_from(self.recipe, chosen)

    def seeds(self, setup: Setup) -> tuple[int, ...]:
        """The seeds to measure."""
        return setup.seeds if self.settings(setup).steps else setup.seeds[:1]

    def key(self, setup: Setup, seed: int) -> str:
        """What names a row, whatever the label."""
        settings = {k: v for k, v in self.settings(setup).to_json().items() if k != "seed"}
        method = f"gptq {sorted(self.changes.items())}" if self.recipe is None else "signround"
        default = TuningSettings().to_json()
        own = {k: v for k, v in settings.items() if v != default[k]}
        return f"{method} {self.scheme} {json.dumps(own)} seed {seed}; {setup.protocol}"


class Results:
    """Rows in a JSON file, by key."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def rows(self) -> dict[str, dict[str, Any]]:
        """Key → row of all that was measured."""
        return {r["key"]: r for r in json.loads(self.file.read_text())} if self.file.is_file() else {}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row in the place of an older one."""
        rows = self.rows() | {row["key"]: row}
        write_atomically(self.file, (json.dumps(list(rows.values()), indent=1) + "\n").encode())


def measure(cell: Cell, setup: Setup, seed: int) -> dict[str, Any]:
    """Quantize and score; returns the row."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        model = _gptq_model(cell, setup) if cell.recipe is None else _tuned_model(cell, setup, seed, Path(folder))
        cpu_s = time.process_time() - began
        session = TorchSession(model)
        scores = {}
        for text in setup.texts:
            windows = text_windows(setup.model, text, setup.n_ctx, setup.windows)
            scores[text.stem] = asdict(evaluate(session, windows, _reference(setup.model)))
    return {"key": cell.key(setup, seed), "label": cell.label, "seed": seed, "cpu_s": cpu_s, "scores": scores}


@functools.cache
def _reference(model: Path) -> RememberingSession:
    return RememberingSession(TorchSession(load_source_model(model)))


def _tuned_model(cell: Cell, setup: Setup, seed: int, folder: Path) -> nn.Module:
    settings = TuningSettings(**{**vars(cell.settings(setup)), "seed": seed})
    run = quantize(setup.model, parse_scheme(cell.scheme), folder / "run", str(setup.calibration), settings)
    return load_run_model(run)


def _gptq_model(cell: Cell, setup: Setup) -> nn.Module:
    settings = cell.settings(setup)
    run = _rounded_run(cell.scheme, setup)
    tokens = calibration_tokens(str(setup.calibration), load_tokenizer(setup.model), settings.samples, settings.seqlen)
    model = load_run_model(run)
    for name, tensor in gptq.quantize(setup.model, run, tokens, gptq.Options(**cell.changes)).items():
        set_tensor(model, name, nn.Parameter(tensor.dequantize(), requires_grad=False))
    return model


@functools.cache
def _rounded_run(scheme: str, setup: Setup) -> RunDirectory:
    """A run that gives GPTQ each matrix's grid, and embedding and head as all other rows have them."""
    folder = Path(_TEMPORARY.name) / scheme.replace(":", "-")
    settings = TuningSettings(steps=0, samples=2, seqlen=setup.seqlen, batch_size=setup.batch_size)
    return quantize(setup.model, parse_scheme(scheme), folder, str(setup.calibration), settings)


_TEMPORARY = tempfile.TemporaryDirectory(prefix="signround-paper-")


@dataclass(frozen=True)
class Summary:
    """A cell over its seeds.

    Attributes:
        seeds: number of measurements.
        ppl, kld: text → mean.
        kld_spread: text → standard deviation over the seeds; None of one measurement.
        cpu_s: mean CPU seconds of quantizing.
    """

    seeds: int
    ppl: dict[str, float]
    kld: dict[str, float]
    kld_spread: dict[str, float | None]
    cpu_s: float


def summary(cell: Cell, setup: Setup, rows: dict[str, dict[str, Any]]) -> Summary | None:
    """The mean over what was measured of a cell; None where nothing was."""
    found = [rows[key] for seed in cell.seeds(setup) if (key := cell.key(setup, seed)) in rows]
    if not found:
        return None
    texts = list(found[0]["scores"])

    def values(text: str, name: str) -> list[float]:
        return [float(r["scores"][text][name]) for r in found]

    return Summary(
        len(found),
        {t: mean(values(t, "ppl")) for t in texts},
        {t: mean(values(t, "kld_mean")) for t in texts},
        {t: stdev(values(t, "kld_mean")) if len(found) > 1 else None for t in texts},
        mean(float(r["cpu_s"]) for r in found),
    )


def planned(cells: Iterable[Cell], setup: Setup, rows: dict[str, dict[str, Any]]) -> list[tuple[Cell, int]]:
    """(cell, seed) of what was not measured yet: first seeds of all cells first."""
    cells = list(cells)
    wanted = [
        (cell, cell.seeds(setup)[i]) for i in range(len(setup.seeds)) for cell in cells if i < len(cell.seeds(setup))
    ]
    known = set(rows)
    left = []
    for cell, seed in wanted:
        if cell.key(setup, seed) not in known:
            known.add(cell.key(setup, seed))
            left.append((cell, seed))
    return left
