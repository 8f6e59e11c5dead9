"""E[x²] from, or for, another program: what tuning needs of it. llama.cpp's files are `exporters.gguf.imatrix`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from signround_edge.errors import UserError
from signround_edge.progress import Progress
from signround_edge.schemes.plan import Plan


class ImportanceSource(Protocol):
    """E[x²] of input channels from elsewhere than the calibration pass.

    Attributes:
        label: its name for the user.
        sha256: hash of its file: part of what decides whether a run may be resumed.
    """

    label: str
    sha256: str

    def of(self, parameter: str, length: int) -> Tensor | None:
        """E[x²] f32 [length] of a parameter's input channels, or None; UserError when its length is another."""
        ...


class ImportanceSink(Protocol):
    """Takes the E[x²] that a run collects."""

    def check(self, parameters: Iterable[str]) -> None:
        """Called before tuning starts; UserError when it could not take one of these parameters."""
        ...

    def write(self, importance: Mapping[str, Tensor], samples: int, seqlen: int) -> str:
        """Take parameter name → E[x²] f32 [in features] over `samples` × `seqlen` tokens; returns where it is now."""
        ...


@dataclass
class Importance:
    """E[x²] of a run's matrices: given from elsewhere, or collected by the calibration pass.

    Attributes:
        given: parameter name → E[x²] f32 [in features] that replaces the collected one.
        sink: takes what is collected, or None.
        collected: what was collected so far, for the sink.
    """

    given: dict[str, Tensor]
    sink: ImportanceSink | None = None
    collected: dict[str, Tensor] = field(default_factory=dict)

    def to_collect(self, every: dict[str, nn.Module], quantized: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Of `every` matrix: all for a sink, else those to be quantized whose E[x²] is not given."""
        if self.sink is not None:
            return every
        return {name: module for name, module in quantized.items() if name not in self.given}

    def settle(self, found: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Keep what the calibration pass found; returns, on `device`, the E[x²] to tune with."""
        if self.sink is not None:
            self.collected |= {name: tensor.cpu() for name, tensor in found.items()}
        return {**found, **{name: tensor.to(device) for name, tensor in self.given.items()}}

    def save(self, samples: int, seqlen: int) -> str:
        """Hand what was collected over `samples` × `seqlen` tokens to the sink; returns where it is now."""
        assert self.sink is not None
        return self.sink.write(self.collected, samples, seqlen)


def given_importance(source: ImportanceSource, plan: Plan, scale_init: str, progress: Progress) -> dict[str, Tensor]:
    """What `source` holds of the run's matrices: parameter name → E[x²] f32 [in features].

    Matrices that it lacks keep the calibration's own figure, and the user is told. Embeddings have none (their input
    is a token number) and take equal weights unless the source holds some.

    Raises:
        UserError: a vector of the wrong length, no matrix of this model at all, or scales that no search looks for.
    """
    if scale_init != "search":
        raise UserError(
            f"--imatrix {source.label} weighs the search of scales, which --scale-init {scale_init} (or the recipe) "
            "leaves out; add --scale-init search, or leave --imatrix out"
        )
    found: dict[str, Tensor] = {}
    lacking: list[str] = []
    for entry in plan.tensors:
        if entry.format is None:
            continue
        vector = source.of(entry.name, entry.shape[0] if entry.transposed else entry.shape[1])
        if vector is not None:
            found[entry.name] = vector
        elif entry.name not in plan.lookups:
            lacking.append(entry.name)
    if not set(found) - set(plan.lookups):
        raise UserError(
            f"--imatrix {source.label} holds no matrix of this model; give an importance matrix of the same model"
        )
    if lacking:
        example = f"{lacking[0]}{', …' if len(lacking) > 1 else ''}"
        progress.line(
            f"note: {source.label} lacks {len(lacking)} of {len(lacking) + len(found)} matrices ({example}); "
            "their E[x²] comes from the calibration text"
        )
    return found
