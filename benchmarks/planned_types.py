"""Rows of planned types: what `signround-edge plan` makes of the very bytes that a scheme takes.

`--scheme plan:gguf:q3_k_m` of `benchmarks.run` is the plan that has at most the bytes of gguf:q3_k_m, tuned like it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import PLANNED
from signround_edge import api

_NO_LIMIT = "1000G"  # a budget that every file keeps, to learn what the schemes take


@dataclass(frozen=True)
class PlannedFile:
    """A plan on disk, the bytes of the model's file, and the KL divergence in nats that it predicts."""

    file: Path
    file_bytes: int
    predicted_kl: float


def plan_beside(
    model: Path, row_scheme: str, calibration: Path, samples: int, seqlen: int, folder: Path
) -> PlannedFile:
    """Make the plan of a row's scheme, "plan:gguf:q3_k_m", in a folder, which also keeps what is measured for it."""
    scheme = row_scheme.removeprefix(PLANNED)
    plan = functools.partial(
        api.plan,
        model,
        format=scheme.partition(":")[0],
        calibration=calibration,
        samples=samples,
        seqlen=seqlen,
        cache=folder / "measured",
    )
    every = plan(target_size=_NO_LIMIT).presets
    if scheme not in every:
        raise SystemExit(f"{row_scheme}: `plan` knows the bytes of {', '.join(every)} for this model")
    size, _ = every[scheme]
    found = plan(target_size=size).planned
    file = folder / f"{scheme.replace(':', '-')}.json"
    found.save(file)
    return PlannedFile(file, found.file_bytes, found.predicted_kl)
