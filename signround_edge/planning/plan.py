"""`plan`: from a model and a budget to a type for every tensor, and what that is expected to cost."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.model.cache_shape import cache_shape
from signround_edge.model.source import model_name
from signround_edge.model.weights import ModelWeights
from signround_edge.planning.candidates import allowed_types, check_wishes, types_of
from signround_edge.planning.found_plan import FoundPlan
from signround_edge.planning.knapsack import Option, frontier, least_bytes, most_bytes, solve
from signround_edge.planning.memory import Needs, needs_of
from signround_edge.planning.problem import Group, as_nodes, bytes_by_type, grouped
from signround_edge.planning.request import Finished, Request
from signround_edge.planning.untuned_run import UntunedRun, untuned_run
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


class Sizes(Protocol):
    """What of an exporter is needed: see `FileSizes`."""

    def tensor_bytes(self, run: UntunedRun) -> dict[tuple[str, ...], int]: ...

    def file_bytes(self, run: UntunedRun) -> int | None: ...

    def one_node(self, run: UntunedRun) -> dict[tuple[str, ...], tuple[str, ...]]: ...


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
        problem = _Problem(weights, base, groups, sizes, files, run, target, nodes)
        problem.check(request)
        store = Store.open(cache, files, tokens, request.seed)
        if not store.is_measured:
            progress.line(f"measuring what each tensor matters, on {tokens.numel():,} tokens; kept in {store.folder}")
        measured = store.measured(
            # Of modules of its own: the pass leaves them loaded, and a head that is tied would no longer be.
            lambda: measure(ModelWeights.open(model), tokens, device, request.seed, progress, store.folder)
        )
        problem.weigh(Costs(weights, base, measured, store, progress))
        return problem.solved(request, finished, progress)


class _Problem:
    """Groups, their options, and the file's bytes of any choice.

    What they cost is computed last: a budget that no file keeps is refused before the long pass over the model.
    """

    def __init__(
        self,
        weights: ModelWeights,
        base: Plan,
        groups: dict[tuple[str, ...], tuple[str, ...]],
        sizes: Sizes,
        files: dict[str, str],
        run: UntunedRun,
        target: str,
        nodes: Mapping[tuple[str, ...], tuple[str, ...]],
    ) -> None:
        self.weights, self.base, self.kinds, self.sizes, self.files = weights, base, groups, sizes, files
        self.target, self.entries = target, {entry.name: entry for entry in base.tensors}
        fast = {name: own for names, own in nodes.items() for name in names}
        named = {name for names in groups for name in names}
        self.in_floats = [e.name for e in base.tensors if (e.format or e.fallback_from) and e.name not in named]
        largest = {name: _largest(own, fast.get(names[0], ())) for names, own in groups.items() for name in names}
        kept: dict[str, str | None] = {name: largest.get(name) for name in base_formats(base)}
        self.run = run.with_types(kept)
        self.stored = bytes_by_type(groups, self.entries, lambda types: sizes.tensor_bytes(self.run.with_types(types)))
        whole = sizes.file_bytes(self.run)
        self.exact = whole is not None
        in_groups = sum(self.stored[names][largest[names[0]]] for names in groups)
        self.fixed = (whole if whole is not None else self._floats() + in_groups) - in_groups
        self.head, self.parameters = self.fixed - self._floats(), sum(math.prod(e.shape) for e in base.tensors)
        self.groups: list[Group] = []

    def check(self, request: Request) -> None:
        """UserError for a budget that the smallest file does not keep."""
        budget, needs = self._budget(request)
        least = self.fixed + sum(min(self.stored[names][kind] for kind in own) for names, own in self.kinds.items())
        if budget < least:
            enough = request.budget.holding(least, self.parameters, self.head, needs)
            raise UserError(
                f"{request.budget.asked}: {budget:,} bytes for the file are too few; the smallest file of this model "
                f"with these types has {least:,}; give {enough}, or other types"
            )

    def weigh(self, costs: Costs) -> None:
        """Compute what the options cost."""
        self.costs = costs
        cost = costs.of({name: own for names, own in self.kinds.items() for name in names})
        self.groups = [
            Group(
                names,
                sum(math.prod(self.entries[name].shape) for name in names),
                tuple(Option(k, self.stored[names][k], sum(cost[name][k] for name in names)) for k in own),
            )
            for names, own in self.kinds.items()
        ]

    @functools.cached_property
    def options(self) -> list[tuple[Option, ...]]:
        """Of the groups."""
        return [group.options for group in self.groups]

    def _floats(self) -> int:
        kept = [entry for entry in self.run.manifest.tensors if entry.format is None]
        return sum(4 * math.prod(entry.shape) for entry in kept)

    def _budget(self, request: Request) -> tuple[int, Needs]:
        """Bytes that the file may have, and what a runtime needs besides."""
        config: Any = self.weights.decoder.model.config
        needs = needs_of(cache_shape(config), self.target, request.context, request.cache_types)
        return request.budget.file_bytes(self.parameters, self.head, needs), needs

    def solved(self, request: Request, finished: Finished | None, progress: Progress) -> FoundPlan:
        """The plan."""
        budget, needs = self._budget(request)
        least, most = least_bytes(self.options) + self.fixed, most_bytes(self.options) + self.fixed
        if budget > most:
            progress.line(
                f"note: {request.budget.asked} leaves {budget:,} bytes for the file, and with these types none has "
                f"more than {most:,}"
            )
        factor = 1.0 if finished is None else self._factor(finished)
        chosen, size = self._fit(budget)
        planned = PlannedTypes(
            target=self.target,
            model=model_name(self.weights.source.path),
            files=self.files,
            types=self._types(chosen),
            floats=self.in_floats,
            file_bytes=size,
            budget_bytes=budget,
            bits_per_weight=8 * (size - self.head) / self.parameters,
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
            self.fixed,
            [(size + self.fixed, factor * cost) for size, cost in frontier(self.options)],
            {name: (size, factor * cost) for name, (size, cost) in self._presets().items()},
            {more: factor * cost for more, cost in self._neighbours(budget, least, most).items()},
            needs,
            self.exact,
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
        room = budget - self.fixed
        for _ in range(_TRIES):
            chosen = solve(self.options, room)
            size = self.sizes.file_bytes(self.run.with_types(self._types(chosen)))
            if size is None:
                return chosen, self.fixed + sum(option.nbytes for option in chosen)
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
                found[more] = sum(option.cost for option in solve(self.options, budget + more - self.fixed))
        return found

    def _presets(self) -> dict[str, tuple[int, float]]:
        """Scheme → (bytes, cost), of those whose types are all among the groups' options."""
        found = {}
        for text in _REFERENCES[self.target]:
            plan = make_plan(self.weights, parse_scheme(text), float_fallback=True)
            kinds = {entry.name: entry.format for entry in plan.tensors}
            if self.target == "onnx":  # its embeddings and heads are symmetric; the same bytes
                kinds = {name: "w8g32-asym" if kind == "Q8_0" else kind for name, kind in kinds.items()}
            own = [group.option(kinds[group.names[0]]) for group in self.groups]
            known = [option for option in own if option is not None]
            if len(known) == len(own):
                found[text] = self.fixed + sum(o.nbytes for o in known), sum(o.cost for o in known)
        return found


def _shared(names: tuple[str, ...], kinds: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The types that all of a group may have."""
    found = tuple(kind for kind in kinds[names[0]] if all(kind in kinds[name] for name in names))
    if not found:
        raise UserError(f"{names[0]} and {names[-1]} are one tensor in the file, and no type is allowed for both")
    return found


def base_formats(plan: Plan) -> dict[str, str]:
    """Parameter name → type, of those that have one."""
    return {entry.name: entry.format for entry in plan.tensors if entry.format is not None}


def _largest(kinds: Sequence[str], preferred: Sequence[str]) -> str:
    """The type of most bits; of experts, of those that make them one node, as planned ones mostly are: a graph without
    takes long to trace."""
    return max(kinds, key=lambda kind: (kind in preferred, _bits(kind)))


def _bits(kind: str) -> float:
    return get_grid(kind).bits_per_weight
