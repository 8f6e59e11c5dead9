"""The bytes of a model's file under any choice of types: what no choice changes, and what each type adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.model.cache_shape import cache_shape
from signround_edge.planning.memory import Needs, needs_of
from signround_edge.planning.problem import bytes_by_type
from signround_edge.planning.request import Request
from signround_edge.planning.untuned_run import UntunedRun
from signround_edge.schemes.plan import Plan


class Sizes(Protocol):
    """What of an exporter is needed: see `FileSizes`."""

    def tensor_bytes(self, run: UntunedRun) -> dict[tuple[str, ...], int]: ...

    def file_bytes(self, run: UntunedRun) -> int | None: ...

    def one_node(self, run: UntunedRun) -> dict[tuple[str, ...], tuple[str, ...]]: ...


class FileBytes:
    """What an exporter says of groups of tensors, each of one type.

    Attributes:
        kinds: names of a group → the types that it may have.
        stored: names of a group → type → bytes.
        run: with the largest types, in the place of which others are put.
        fixed: bytes of the file that no choice changes; of these `head` are no tensor's.
        parameters: of the model.
        exact: whether the file's bytes are known to the byte.
    """

    def __init__(
        self,
        base: Plan,
        kinds: dict[tuple[str, ...], tuple[str, ...]],
        sizes: Sizes,
        run: UntunedRun,
        nodes: Mapping[tuple[str, ...], tuple[str, ...]],
    ) -> None:
        """`base`: every matrix that has a type at all has one. `nodes`: types by which experts are one node."""
        self.kinds, self._sizes = kinds, sizes
        fast = {name: own for names, own in nodes.items() for name in names}
        largest = {name: _largest(own, fast.get(names[0], ())) for names, own in kinds.items() for name in names}
        kept: dict[str, str | None] = {e.name: largest.get(e.name) for e in base.tensors if e.format}
        self.run = run.with_types(kept)
        entries = {entry.name: entry for entry in base.tensors}
        self.stored = bytes_by_type(kinds, entries, lambda types: sizes.tensor_bytes(self.run.with_types(types)))
        whole, in_floats = sizes.file_bytes(self.run), self._floats()
        in_groups = sum(self.stored[names][largest[names[0]]] for names in kinds)
        self.exact = whole is not None
        self.fixed = (whole if whole is not None else in_floats + in_groups) - in_groups
        self.head = self.fixed - in_floats
        self.parameters = sum(math.prod(entry.shape) for entry in base.tensors)

    def of(self, types: dict[str, str]) -> int | None:
        """Of the file with these types, by parameter name; None where only sums of tensors are known."""
        return self._sizes.file_bytes(self.run.with_types(types))

    def budget(self, request: Request, config: Any) -> tuple[int, Needs]:
        """Bytes that the file may have, and what a runtime needs besides.

        Raises:
            UserError: the smallest file has more.
        """
        needs = needs_of(cache_shape(config), request.target, request.context, request.cache_types)
        budget = request.budget.file_bytes(self.parameters, self.head, needs)
        least = self.fixed + sum(min(self.stored[names][kind] for kind in own) for names, own in self.kinds.items())
        if budget < least:
            enough = request.budget.holding(least, self.parameters, self.head, needs)
            raise UserError(
                f"{request.budget.asked}: {budget:,} bytes for the file are too few; the smallest file of this model "
                f"with these types has {least:,}; give {enough}, or other types"
            )
        return budget, needs

    def _floats(self) -> int:
        kept = [entry for entry in self.run.manifest.tensors if entry.format is None]
        return sum(4 * math.prod(entry.shape) for entry in kept)


def _largest(kinds: Sequence[str], preferred: Sequence[str]) -> str:
    """The type of most bits; of experts, of those that make them one node, as planned ones mostly are: a graph without
    takes long to trace."""
    return max(kinds, key=lambda kind: (kind in preferred, _bits(kind)))


def _bits(kind: str) -> float:
    return get_grid(kind).bits_per_weight
