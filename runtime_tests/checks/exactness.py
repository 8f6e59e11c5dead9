"""Exactness: every weight of an artifact, through the runtime's own dequantizer, against the run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from runtime_tests.interface import StoredTensor
from signround_edge.evaluation.metrics import FloatArray


@dataclass(frozen=True)
class Difference:
    """One tensor of an artifact that is not the run's.

    Attributes:
        tensor: the artifact's name of it.
        values: how many of its values differ (0 where the tensor as a whole is missing, foreign or of another shape).
        what: in a few words.
    """

    tensor: str
    values: int
    what: str


@dataclass
class Exactness:
    """The outcome for one artifact.

    Attributes:
        tensors_checked: tensors of the run that were compared value by value.
        values_checked: values in them.
        differences: tensors that are not equal, in the artifact's order; missing ones at the end.
    """

    tensors_checked: int = 0
    values_checked: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether something was compared and nothing differs."""
        return self.tensors_checked > 0 and not self.differences


def check_exactness(expected: Mapping[str, Callable[[], FloatArray]], stored: Iterable[StoredTensor]) -> Exactness:
    """Compare value by value, one tensor in memory at a time.

    Args:
        expected: the artifact's name of every tensor → what makes its weights, f32 [rows, values a row] in the
            artifact's orientation.
        stored: what the runtime's dequantizer makes of the artifact.
    """
    result = Exactness()
    missing = dict.fromkeys(expected)
    for tensor in stored:
        make = expected.get(tensor.name)
        if make is None:
            result.differences.append(Difference(tensor.name, 0, "is not of this run"))
            continue
        missing.pop(tensor.name, None)
        weights = make()
        result.tensors_checked += 1
        result.values_checked += weights.size
        difference = _compare(tensor, weights)
        if difference is not None:
            result.differences.append(difference)
    result.differences += [Difference(name, 0, "is missing") for name in missing]
    return result


def _compare(tensor: StoredTensor, expected: FloatArray) -> Difference | None:
    found = tensor.weights
    if found.size != expected.size or found.shape[-1] != expected.shape[-1]:
        return Difference(tensor.name, 0, f"has shape {list(found.shape)}, the run's has {list(expected.shape)}")
    found, expected = (array.reshape(-1, array.shape[-1]) for array in (found, expected))
    different = found != expected  # NaN differs from everything; +0 and −0 are the same weight
    count = int(different.sum())
    if not count:
        return None
    row, col = (int(i) for i in np.argwhere(different)[0])
    return Difference(
        tensor.name,
        count,
        f"({tensor.stored_type}) differs in {count} of {found.size} values, first at row {row}, column {col}: "
        f"{float(found[row, col]):.9g}, not {float(expected[row, col]):.9g}",
    )
