"""`plan`: from a model and a budget to a type for every tensor, and what that is expected to cost."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.model.source import model_name
from signround_edge.model.weights import ModelWeights
from signround_edge.planning.candidates import allowed_types, check_wishes, types_of
from signround_edge.planning.file_bytes import FileBytes, Sizes
from signround_edge.planning.found_plan import FoundPlan
from signround_edge.planning.knapsack import Option, frontier, least_bytes, most_bytes, solve
from signround_edge.planning.memory import Needs
from signround_edge.planning.problem import Group, as_nodes, grouped
from signround_edge.planning.request import Finished, Request
from signround_edge.planning.untuned_run import untuned_run
from signround_edge.progress import Progress
from signround_edge.schemes.gguf_presets import GGUF_PRESETS
from signround_edge.schemes.plan import Plan, make_plan
from signround_edge.schemes.planned_types import PlannedTypes
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.sensitivity.costs import Costs
from signround_edge.sensitivity.measure import measure
from signround_edge.sensitivity.store import Store

# All matrices in 8 bits: what has a type at all, and blocks for nearly all rows.
_EVERYTHING = {"gguf": "gguf:q8_0", "onnx": "onnx:w8g32"}
_REFERENCES = {
    "gguf": tuple(f"gguf:{name}" for name in GGUF_PRESETS),
    "onnx": ("onnx:w2g32-asym", "onnx:w2g128-asym", "onnx:w4g32-asym", "onnx:w4g64-asym", "onnx:w4g128-asym",
             "onnx:w8g32-asym", "onnx:w8g128-asym"),
}  # fmt: skip
_TRIES = 8  # until an exporter that tells only the sum of bytes agrees


def find_plan(
    model: Path,
    request: Request,
    sizes: Sizes,
    tokens: Tensor,
    cache: Path,
    device: torch.device,
    progress: Progress,
    finished: Finished | None = None,
) -> FoundPlan:
    """The types of least predicted KL divergence under a budget.

    Args:
        sizes: of the target's exporter.
        tokens: calibration samples, int64 [samples, seqlen].
        cache: folder of what earlier plans have measured.
        finished: corrects the factor between prediction and measurement.
    Raises:
        UserError: a budget below the smallest file, or a wish that nothing fits.
    """
    weights, target = ModelWeights.open(model), request.target
    config: Any = weights.decoder.model.config
    for line in weights.notes():
        progress.line(line)
    files = weights.source.hashes()
    base = make_plan(weights, parse_scheme(_EVERYTHING[target]), float_fallback=True)
    allowed = allowed_types(target, request.types)
    kinds = {
        entry.name: types_of(entry, target, allowed, request.wishes, config, request.types is not None)
        for entry in base.tensors
        if entry.format is not None or entry.fallback_from is not None
    }
    check_wishes(request.wishes, list(kinds), config.model_type)
    kinds = {name: own for name, own in kinds.items() if own}
    with tempfile.TemporaryDirectory() as folder:
        run = untuned_run(weights, base, f"{target}:plan", files, Path(folder) / "run")
        # Before the long pass: an exporter refuses a model that it has no file for.
        nodes = sizes.one_node(run)
        kinds, in_nodes = as_nodes(kinds, nodes, request.types is None)
        groups = {n: _shared(n, kinds) for n in grouped(kinds, [*sizes.tensor_bytes(run), *in_nodes])}
        stored = FileBytes(base, groups, sizes, run, nodes)
        budget, needs = stored.budget(request, config)
        store = Store.open(cache, files, tokens, request.seed)
        if not store.is_measured:
            progress.line(f"measuring what each tensor matters, on {tokens.numel():,} tokens; kept in {store.folder}")
        measured = store.measured(
            # Of modules of its own: the pass leaves them loaded, and a head that is tied would no longer be.
            lambda: measure(ModelWeights.open(model), tokens, device, request.seed, progress, store.folder)
        )
        problem = _Problem(weights, base, files, stored, Costs(weights, base, measured, store, progress))
        return problem.solved(request, budget, needs, finished, progress)


class _Problem:
    """Groups, and their options with bytes and costs."""

    def __init__(
        self, weights: ModelWeights, base: Plan, files: dict[str, str], stored: FileBytes, costs: Costs
    ) -> None:
        self.weights, self.files, self.stored, self.costs = weights, files, stored, costs
        self.entries = {entry.name: entry for entry in base.tensors}
        cost = costs.of({name: own for names, own in stored.kinds.items() for name in names})
        self.groups = [
            Group(
                names,
                sum(math.prod(self.entries[name].shape) for name in names),
                tuple(Option(k, stored.stored[names][k], sum(cost[name][k] for name in names)) for k in own),
            )
            for names, own in stored.kinds.items()
        ]

    @functools.cached_property
    def options(self) -> list[tuple[Option, ...]]:
        """Of the groups."""
        return [group.options for group in self.groups]

    def solved(
        self, request: Request, budget: int, needs: Needs, finished: Finished | None, progress: Progress
    ) -> FoundPlan:
        """The plan."""
        fixed, named = self.stored.fixed, {name for group in self.groups for name in group.names}
        least, most = least_bytes(self.options) + fixed, most_bytes(self.options) + fixed
        if budget > most:
            progress.line(
                f"note: {request.budget.asked} leaves {budget:,} bytes for the file, and with these types none has "
                f"more than {most:,}"
            )
        factor = 1.0 if finished is None else self._factor(finished)
        chosen, size = self._fit(budget)
        planned = PlannedTypes(
            target=request.target,
            model=model_name(self.weights.source.path),
            files=self.files,
            types=self._types(chosen),
            floats=[e.name for e in self.entries.values() if (e.format or e.fallback_from) and e.name not in named],
            file_bytes=size,
            budget_bytes=budget,
            bits_per_weight=8 * (size - self.stored.head) / self.stored.parameters,
            predicted_kl=factor * sum(option.cost for option in chosen),
            factor=factor,
            settings={
                "asked": request.budget.asked, "context": request.context, "calibration": request.calibration,
                "wishes": [wish.text for wish in request.wishes], "types": request.types, "seed": request.seed,
                **({} if request.cache_types is None else {"cache": request.cache_types.text}),
            },
        )  # fmt: skip
        return FoundPlan(
            planned,
            self.groups,
            chosen,
            fixed,
            [(size + fixed, factor * cost) for size, cost in frontier(self.options)],
            {name: (size, factor * cost) for name, (size, cost) in self._presets(request.target).items()},
            {more: factor * cost for more, cost in self._neighbours(budget, least, most).items()},
            needs,
            self.stored.exact,
        )

    def _factor(self, finished: Finished) -> float:
        """Measured over predicted."""
        wanted = {name: [kind] for name, kind in finished.types.items() if name in self.entries}
        found = self.costs.of(wanted)
        predicted = sum(sum(own.values()) for own in found.values())
        if predicted <= 0:
            raise UserError("--from-run: no error is predicted of this run, so nothing can be corrected; leave it out")
        return finished.kl / predicted

    def _fit(self, budget: int) -> tuple[list[Option], int]:
        """The best options whose file has at most `budget` bytes, and its bytes."""
        room = budget - self.stored.fixed
        for _ in range(_TRIES):
            chosen = solve(self.options, room)
            size = self.stored.of(self._types(chosen))
            if size is None:
                return chosen, self.stored.fixed + sum(option.nbytes for option in chosen)
            if size <= budget:
                return chosen, size
            room = sum(option.nbytes for option in chosen) - (size - budget)  # so that these are not chosen again
            if room < least_bytes(self.options):
                break
        raise UserError(f"no types were found whose file has at most {budget:,} bytes; give a little more")

    def _types(self, chosen: list[Option]) -> dict[str, str]:
        """Parameter name → type of chosen options."""
        return {name: option.kind for group, option in zip(self.groups, chosen, strict=True) for name in group.names}

    def _neighbours(self, budget: int, least: int, most: int) -> dict[int, float]:
        step = 10**6 if budget >= 5 * 10**7 else max(1, budget // 50)
        found = {}
        for more in (-step, step):
            if least <= budget + more <= most:
                found[more] = sum(option.cost for option in solve(self.options, budget + more - self.stored.fixed))
        return found

    def _presets(self, target: str) -> dict[str, tuple[int, float]]:
        """Scheme → (bytes, cost), of those whose types are all among the groups' options."""
        found = {}
        for text in _REFERENCES[target]:
            plan = make_plan(self.weights, parse_scheme(text), float_fallback=True)
            kinds = {entry.name: entry.format for entry in plan.tensors}
            if target == "onnx":  # its embeddings and heads are symmetric; the same bytes
                kinds = {name: "w8g32-asym" if kind == "Q8_0" else kind for name, kind in kinds.items()}
            own = [group.option(kinds[group.names[0]]) for group in self.groups]
            known = [option for option in own if option is not None]
            if len(known) == len(own):
                found[text] = self.stored.fixed + sum(o.nbytes for o in known), sum(o.cost for o in known)
        return found


def _shared(names: tuple[str, ...], kinds: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The types that all of a group may have."""
    found = tuple(kind for kind in kinds[names[0]] if all(kind in kinds[name] for name in names))
    if not found:
        raise UserError(f"{names[0]} and {names[-1]} are one tensor in the file, and no type is allowed for both")
    return found
