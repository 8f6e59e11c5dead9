"""The figures of `analyze`, from a run directory alone: altered roundings, salient channels, V, losses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signround_edge.errors import UserError
from signround_edge.manifest import OUTSIDE
from signround_edge.run_directory import RunDirectory

SALIENT = 0.05  # share of a matrix's input channels, those of largest E[x²], that are called salient
SALIENCE_BINS = 20

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Roundings:
    """Shares of the codes of one or several matrices.

    A code is raised or lowered when it is above or below (as a weight) what plain rounding on the initial scales gives.

    Attributes:
        weights: codes in all.
        raised, lowered, altered: shares; altered is their sum.
        overruled: share of codes that are not the nearest ones on the tuned scales: what V and GPTQ decided.
    """

    weights: int
    raised: float
    lowered: float
    altered: float
    overruled: float


@dataclass(frozen=True)
class TensorRoundings:
    """One matrix.

    Attributes:
        name, block, type: parameter, number of its decoder block, grid.
        roundings: of all its codes.
        salient_altered, other_altered: share altered among salient input channels, and among all others.
        salient_overlap: how many of the channels that were altered most are salient, as a share; by chance `SALIENT`.
        altered_by_salience: share altered in each of `SALIENCE_BINS` equal groups of channels, by rising E[x²].
        v_histogram: counts of V in equal bins over [−0.5, 0.5].
    """

    name: str
    block: int
    type: str
    roundings: Roundings
    salient_altered: float
    other_altered: float
    salient_overlap: float
    altered_by_salience: list[float]
    v_histogram: list[int]

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {"name": data.pop("name"), "block": data.pop("block"), "type": data.pop("type"), **_flat(data)}


@dataclass(frozen=True)
class UnitLoss:
    """Held-out losses of what was tuned together.

    Attributes:
        block: number of the decoder block.
        unit: "block", or the matrix's name where each was tuned alone.
        rounded, start, tuned: after plain rounding, of the codes from which tuning started (GPTQ's, or the rounded
            ones), and of what was kept; each is never above the one before.
        best_step: steps after which that was found; 0 is the start itself.
    """

    block: int
    unit: str
    rounded: float
    start: float
    tuned: float
    best_step: int


@dataclass(frozen=True)
class Analysis:
    """All that `analyze` says about a run.

    Attributes:
        model, scheme, settings: of the run.
        total: over all tuned matrices; None where the run has no statistics, as are the next three then empty.
        blocks: decoder block → roundings of its matrices.
        kinds: kind of matrix ("q_proj") → roundings over all blocks.
        tensors: each matrix.
        losses: each tuned unit.
        whole_model: held-out KL divergence before and after the whole-model stage, where there was one.
        notes: sentences about what is missing, and why.
    """

    model: str
    scheme: str
    settings: dict[str, Any]
    total: Roundings | None
    blocks: dict[int, Roundings]
    kinds: dict[str, Roundings]
    tensors: list[TensorRoundings]
    losses: list[UnitLoss]
    whole_model: dict[str, Any] | None
    notes: list[str]

    @property
    def worse_than_rounding(self) -> list[str]:
        """Units whose kept loss is above plain rounding's; tuning never keeps such a one."""
        return [f"block {loss.block}: {loss.unit}" for loss in self.losses if loss.tuned > loss.rounded]

    def v_histogram(self) -> list[int]:
        """Counts of V over all matrices."""
        return [int(n) for n in np.sum([t.v_histogram for t in self.tensors], axis=0)] if self.tensors else []

    def to_json(self) -> dict[str, Any]:
        """The contract of `analyze --json`: shares between 0 and 1, losses and KL divergences as tuning has them."""
        histogram = self.v_histogram()
        return {
            "model": self.model,
            "scheme": self.scheme,
            "settings": self.settings,
            "total": None if self.total is None else asdict(self.total),
            "blocks": [{"block": index, **asdict(r)} for index, r in self.blocks.items()],
            "kinds": [{"kind": kind, **asdict(r)} for kind, r in self.kinds.items()],
            "tensors": [t.to_json() for t in self.tensors],
            "v_histogram": {"edges": np.linspace(-0.5, 0.5, len(histogram) + 1).tolist(), "counts": histogram}
            if histogram
            else None,
            "salient_share": SALIENT,
            "losses": [asdict(loss) for loss in self.losses],
            "worse_than_rounding": self.worse_than_rounding,
            "whole_model": self.whole_model,
            "notes": self.notes,
        }


def analyze(run: RunDirectory) -> Analysis:
    """Read what a run recorded while it was tuned; UserError where a statistics file is missing or was changed."""
    manifest = run.manifest
    tensors: list[TensorRoundings] = []
    counts: list[_Counts] = []
    statistics = {n: s for part in manifest.parts if part != OUTSIDE for n, s in run.statistics(part).items()}
    for entry in manifest.tensors:
        if entry.name not in statistics:
            continue
        stored = statistics[entry.name]
        try:
            found = _Counts(entry.name, int(entry.part), **{k: t.numpy() for k, t in stored.items()})
        except TypeError as error:
            raise UserError(
                f"{run.path}: statistics of {entry.name} are {', '.join(sorted(stored))}, which this version does not "
                "know; use the version that tuned the run"
            ) from error
        counts.append(found)
        tensors.append(_tensor(found, str(entry.format), run.entry(entry.name).shape))
    by_block = {block: list(group) for block, group in groupby(counts, key=lambda c: c.block)}
    kinds = dict.fromkeys(c.kind for c in counts)
    return Analysis(
        model=str(manifest.source.get("model", "")),
        scheme=manifest.scheme,
        settings=manifest.settings,
        total=_shares(counts) if counts else None,
        blocks={block: _shares(group) for block, group in by_block.items()},
        kinds={kind: _shares([c for c in counts if c.kind == kind]) for kind in kinds},
        tensors=tensors,
        losses=_losses(run),
        whole_model=manifest.whole_model,
        notes=_notes(run, bool(counts)),
    )


@dataclass(frozen=True)
class _Counts:
    """One matrix's counts as the run stores them; see `tuning.statistics.RoundingStatistics`."""

    name: str
    block: int
    v_histogram: Counts
    raised: Counts
    lowered: Counts
    overruled: Counts
    importance: NDArray[np.float32]

    @property
    def kind(self) -> str:
        """Its module's own name: "q_proj"."""
        return self.name.split(".")[-2]

    @property
    def weights(self) -> int:
        return int(self.v_histogram.sum())


def _shares(group: list[_Counts]) -> Roundings:
    weights = sum(c.weights for c in group)
    raised, lowered, overruled = (
        sum(int(getattr(c, name).sum()) for c in group) / weights for name in ("raised", "lowered", "overruled")
    )
    return Roundings(weights, raised, lowered, raised + lowered, overruled)


def _tensor(counts: _Counts, grid: str, shape: list[int]) -> TensorRoundings:
    rows = counts.weights // len(counts.importance)
    altered = (counts.raised + counts.lowered) / rows  # share of each input channel
    rising = np.argsort(counts.importance, kind="stable")
    number = max(1, round(SALIENT * len(rising)))
    salient, others = rising[-number:], rising[:-number]
    most_altered = np.argsort(altered, kind="stable")[-number:]
    return TensorRoundings(
        counts.name,
        counts.block,
        grid,
        _shares([counts]),
        float(altered[salient].mean()),
        float(altered[others].mean()) if len(others) else 0.0,
        len(np.intersect1d(salient, most_altered)) / number,
        [float(altered[part].mean()) for part in np.array_split(rising, min(SALIENCE_BINS, len(rising)))],
        counts.v_histogram.tolist(),
    )


def _losses(run: RunDirectory) -> list[UnitLoss]:
    def of(part: str, unit: str, r: dict[str, Any]) -> UnitLoss:
        start = r.get("start", r["rounded"])  # runs before November 2026 all started from the rounded codes
        return UnitLoss(int(part), unit, float(r["rounded"]), float(start), float(r["tuned"]), int(r["best_step"]))

    return [
        of(part, unit, r)
        for part in run.manifest.parts
        if part != OUTSIDE
        for unit, r in run.manifest.complete[part].report.items()
    ]


def _notes(run: RunDirectory, counted: bool) -> list[str]:
    notes = []
    settings = run.manifest.settings
    if not counted:
        notes.append(
            "the run holds no statistics of its roundings, because its version did not record them or nothing in it "
            "was tuned; quantize it anew to see altered roundings, salient channels and V"
        )
    elif settings.get("steps") == 0:
        notes.append("--steps 0 rounds to nearest, so nothing is altered")
    if counted and run.manifest.whole_model is not None:
        notes.append("altered roundings and V are those of block-wise tuning; the whole-model stage came after that")
    return notes


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """The roundings of a matrix beside its other figures."""
    return {**data.pop("roundings"), **data}
