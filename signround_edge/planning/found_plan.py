"""What `plan` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from signround_edge.planning.knapsack import Option
from signround_edge.planning.memory import Needs
from signround_edge.planning.problem import Group
from signround_edge.schemes.planned_types import PlannedTypes


@dataclass(frozen=True)
class FoundPlan:
    """A plan and what stands beside it.

    Attributes:
        planned: what plan.json holds.
        groups: with all their options.
        chosen: the options of the groups.
        fixed: bytes of the file that no choice changes.
        frontier, presets: (bytes, predicted KL), of mixtures and by name of schemes.
        neighbours: bytes more (or less, negative) → predicted KL.
        needs: of a runtime besides the file.
        exact: whether the file's bytes are known to the byte.
    """

    planned: PlannedTypes
    groups: list[Group]
    chosen: list[Option]
    fixed: int
    frontier: list[tuple[int, float]]
    presets: dict[str, tuple[int, float]]
    neighbours: dict[int, float]
    needs: Needs
    exact: bool

    def to_json(self) -> dict[str, Any]:
        """The document of `plan --json`: plan.json, and what stands beside it."""
        return {
            **self.planned.to_json(),
            "cache_bytes": self.needs.cache,
            "buffer_bytes": self.needs.buffers,
            "exact": self.exact,
            "neighbours": [{"bytes": more, "predicted_kl": kl} for more, kl in self.neighbours.items()],
            "presets": [{"scheme": n, "bytes": size, "predicted_kl": kl} for n, (size, kl) in self.presets.items()],
            "frontier": [{"bytes": size, "predicted_kl": kl} for size, kl in self.frontier],
        }
