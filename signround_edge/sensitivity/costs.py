"""The table of what each type costs on each tensor of a model; what it lacks is computed and kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from signround_edge.formats import get_grid
from signround_edge.formats.threads import over_chunks
from signround_edge.manifest import TensorEntry
from signround_edge.model.weights import ModelWeights
from signround_edge.progress import Progress
from signround_edge.schemes.plan import Plan
from signround_edge.sensitivity.cost import Cost, head_cost, lookup_cost, matrix_cost
from signround_edge.sensitivity.measured import Measured
from signround_edge.sensitivity.store import Store

_KEPT_AFTER_S = 5.0  # what a killed plan computes again


@dataclass
class Costs:
    """Costs of types on tensors, in nats a token.

    Attributes:
        plan: of any run of the model: it says which tensor is the head and which is looked up by token.
        measured: as `measure` found it.
        store: where costs are kept.
    """

    weights: ModelWeights
    plan: Plan
    measured: Measured
    store: Store
    progress: Progress = field(repr=False)

    def of(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
        """Parameter name → type → cost, for the types wanted."""
        costs = self.store.costs
        missing = {name: [kind for kind in kinds if kind not in costs.get(name, {})] for name, kinds in wanted.items()}
        missing = {name: kinds for name, kinds in missing.items() if kinds}
        entries = {entry.name: entry for entry in self.plan.tensors}
        kept = time.monotonic()
        for number, (name, kinds) in enumerate(missing.items()):
            with torch.no_grad():
                parts = self._parts(name, self._weight(entries[name]))

                def cost(kind: str, parts: list[Cost] = parts) -> float:
                    grid = get_grid(kind)
                    return sum(part(grid) for part in parts)

                found = over_chunks(cost, kinds)
            costs.setdefault(name, {}).update(zip(kinds, found, strict=True))
            if time.monotonic() - kept > _KEPT_AFTER_S:
                self.store.keep_costs()
                kept = time.monotonic()
            self.progress.parts(number + 1, len(missing))
        if missing:
            self.store.keep_costs()
        return {name: {kind: costs[name][kind] for kind in kinds} for name, kinds in wanted.items()}

    def _weight(self, entry: TensorEntry) -> Tensor:
        weight = self.weights.tensor(entry.name)
        return weight.T if entry.transposed else weight

    def _parts(self, name: str, weight: Tensor) -> list[Cost]:
        """What a tensor's cost is the sum of: a tied embedding is looked up and is the head."""
        if name in self.measured.matrices:
            return [matrix_cost(self.measured.matrices[name], weight)]
        parts = []
        if name in self.measured.lookups:
            parts.append(lookup_cost(self.measured.lookups[name], weight))
        if name == self.plan.head:
            parts.append(head_cost(self.measured.head, weight))
        return parts
