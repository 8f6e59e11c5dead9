"""The plan of a run, made before tuning starts: every tensor, its format, its bytes and every fallback."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from signround_edge.errors import UserError
from signround_edge.formats import Grid, get_grid
from signround_edge.formats.matmul_nbits import matmul_nbits_bytes
from signround_edge.manifest import OUTSIDE, TensorEntry
from signround_edge.model.decoder import Decoder, is_transposed
from signround_edge.model.experts import stacks
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import dtype_name
from signround_edge.schemes.gguf_names import gguf_name
from signround_edge.schemes.gguf_presets import Place, Role
from signround_edge.schemes.planned_types import PlannedTypes
from signround_edge.schemes.roles import columns_together, model_traits, places_of, stays_in_floats
from signround_edge.schemes.scheme import Scheme, after_fallback


@dataclass(frozen=True)
class Plan:
    """What the run will hold.

    Attributes:
        tensors: one entry per parameter, in model order.
        parts: part names in the order in which they are written.
        tied: alias → owner of shared parameters.
        target: whose bytes are counted: the scheme's first target.
        lookups: parameter names of the tables that are looked up by token; the token embedding is the first.
        head: parameter name of the output head, which is the token embedding's where they are tied.
    """

    tensors: list[TensorEntry]
    parts: list[str]
    tied: dict[str, str]
    target: str
    lookups: tuple[str, ...]
    head: str

    @property
    def embedding(self) -> str:
        """Parameter name of the token embedding."""
        return self.lookups[0]

    def of_part(self, part: str) -> list[TensorEntry]:
        """The entries of one part."""
        return [t for t in self.tensors if t.part == part]

    def tensor_bytes(self) -> int:
        """Bytes of all tensor data in the target file."""
        return sum(entry_bytes(t, self.target) for t in self.tensors)

    def bits_per_weight(self) -> float:
        """Stored bits a parameter over the whole model."""
        return 8 * self.tensor_bytes() / sum(math.prod(t.shape) for t in self.tensors)


def entry_bytes(entry: TensorEntry, target: str) -> int:
    """Bytes of one tensor in the target file ("gguf" or "onnx").

    Floats: GGUF holds what no scheme quantizes (norms, biases, routers, learned positions) as F32 and other matrices in
    their own dtype; the ONNX graph computes in F32.
    """
    if entry.format is None:
        own = entry.fallback_from is not None and target == "gguf"
        width = getattr(torch, entry.dtype).itemsize if own else 4
        return math.prod(entry.shape) * int(width)
    rows, cols = entry.out_in_shape
    grid = get_grid(entry.format)
    in_onnx = matmul_nbits_bytes(grid, rows, cols) if target == "onnx" else None
    return grid.stored_bytes(rows, cols) if in_onnx is None else in_onnx


def part_of_block(index: int) -> str:
    """Part name of decoder block `index`: "0007"."""
    return f"{index:04d}"


def make_plan(weights: ModelWeights, scheme: Scheme, float_fallback: bool) -> Plan:
    """Decide the format of every parameter; stored buffers stay in floats.

    Args:
        float_fallback: keep matrices whose rows no block size divides in floats instead of refusing.
    Raises:
        UserError: a row that no block size of the scheme divides.
    """
    decoder = weights.decoder
    model = decoder.model
    tied = decoder.tied_parameters()
    embedding, head = decoder.embedding._parameters["weight"], decoder.head._parameters["weight"]
    if embedding is head:
        scheme = scheme.for_tied_embedding()
    config: Any = model.config
    traits, layers = model_traits(config), len(decoder.blocks)
    places: dict[int, tuple[Place, bool]] = {}
    matrices = {name: (index, module) for index in range(layers) for name, module in decoder.matrices(index).items()}
    for name, place in places_of([(name, index) for name, (index, _) in matrices.items()], config).items():
        if not stays_in_floats(gguf_name(name, config.model_type)):
            module = matrices[name][1]
            places[id(module._parameters["weight"])] = (place, is_transposed(module))
    for module in decoder.lookups.values():  # where the head is the embedding, llama.cpp takes all tables for it
        role = Role.OUTPUT if embedding is head else Role.EMBEDDING
        places[id(module._parameters["weight"])] = (Place(role), False)
    places[id(head)] = (Place(Role.OUTPUT), False)
    known_names: list[tuple[str, ...]] = []
    tensors: list[TensorEntry] = []
    for name, parameter in [*model.named_parameters(), *decoder.stored_buffers().items()]:
        shape = list(parameter.shape)
        entry = TensorEntry(name, _part_of(name, decoder), shape, dtype_name(weights.dtype(name)))
        if id(parameter) in places:
            place, entry.transposed = places[id(parameter)]
            known_as = (name, gguf_name(name, config.model_type) or name)
            known_names.append(known_as)
            cols = entry.shape[0] if entry.transposed else entry.shape[1]
            if scheme.planned is not None:
                entry.format = scheme.planned.types.get(name)
                entry.fallback_from = None if entry.format else scheme.preset.base
            else:
                asked, together = scheme.asked_for(known_as, place, traits, cols), columns_together(name, config)
                fitting = after_fallback(asked, cols, scheme.targets, together)
                _choose_format(entry, asked, fitting, scheme, float_fallback)
        tensors.append(entry)
    scheme.check_overrides(known_names)
    if scheme.planned is not None:
        _check_planned(tensors, scheme.planned)
    _check_experts(tensors)
    parts = [part_of_block(i) for i in range(len(decoder.blocks))] + [OUTSIDE]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    lookups = tuple(names[id(module._parameters["weight"])] for module in decoder.lookups.values())
    return Plan(tensors, parts, tied, scheme.targets[0], lookups, names[id(head)])


def _part_of(name: str, decoder: Decoder) -> str:
    if name.startswith(f"{decoder.prefix}."):
        return part_of_block(int(name[len(decoder.prefix) + 1 :].split(".")[0]))
    return OUTSIDE


def _choose_format(entry: TensorEntry, asked: Grid, grid: Grid | None, scheme: Scheme, float_fallback: bool) -> None:
    if grid is None and not float_fallback:
        raise UserError(
            f"tensor {entry.name} has rows of {entry.out_in_shape[-1]} values, which no block size of --scheme "
            f"{scheme.text} divides; add --float-fallback to keep such tensors in 16-bit floats"
        )
    entry.format = None if grid is None else grid.name
    entry.fallback_from = None if entry.format == asked.name else asked.name


def _check_planned(tensors: list[TensorEntry], planned: PlannedTypes) -> None:
    """UserError for a type whose blocks do not divide a matrix, or of a matrix that the model has not."""
    quantized = {entry.name for entry in tensors if entry.format is not None}
    unknown = sorted(set(planned.types) - quantized)
    if unknown:
        raise UserError(f"--plan names {unknown[0]}, which is no matrix of this model; make it again with `plan`")
    left = [e.name for e in tensors if e.format is None and e.fallback_from and e.name not in planned.floats]
    if left:
        raise UserError(f"--plan has no type for {left[0]}; give it one there, or make it again with `plan`")
    for entry in tensors:
        if entry.format is not None and entry.out_in_shape[-1] % get_grid(entry.format).row_multiple:
            raise UserError(
                f"--plan gives {entry.name} the type {entry.format}, whose blocks do not divide its rows of "
                f"{entry.out_in_shape[-1]} values; make it again with `plan`"
            )


def _check_experts(tensors: list[TensorEntry]) -> None:
    """UserError where the experts of a layer, which are one tensor in a file, have several types."""
    formats = {entry.name: entry.format for entry in tensors}
    for stack, names in stacks(list(formats)).items():
        types = sorted({formats[name] or "floats" for name in names})
        if len(types) > 1:
            raise UserError(
                f"--tensor-type gives the experts of {stack} several types ({', '.join(types)}), and they are one "
                "tensor in a GGUF file; give a pattern that matches all of them, such as ffn_down_exps"
            )


def listing(plan: Plan) -> list[str]:
    """Lines for the user: tensors and bytes by format, the total, and every fallback."""
    lines = []
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in plan.tensors:
        kind = entry.format or (entry.dtype if entry.fallback_from else "F32")
        counts[kind] += 1
        sizes[kind] += entry_bytes(entry, plan.target)
    for kind, size in sorted(sizes.items(), key=lambda item: -item[1]):
        lines.append(f"{kind:>10}  {counts[kind]:5d} tensors  {size:15,d} bytes")
    lines.append(f"{'total':>10}  {len(plan.tensors):5d} tensors  {plan.tensor_bytes():15,d} bytes")
    lines[-1] += f"  {plan.bits_per_weight():.3f} bits/weight as {plan.target.upper()}"
    for entry in plan.tensors:
        if entry.name in plan.lookups[1:]:
            size, kind = entry_bytes(entry, plan.target), entry.format or entry.dtype
            lines.append(f"looked up by token: {entry.name} {entry.shape} {kind}, {size:,d} bytes")
    entries = {entry.name: entry for entry in plan.tensors if entry.fallback_from}
    for stack, names in stacks(list(entries)).items():
        entry = entries[names[0]]
        shape = entry.shape if len(names) == 1 else f"{len(names)} × {entry.shape}"
        lines.append(f"fallback: {stack} {shape} {entry.fallback_from} → {entry.format or 'floats'}")
    return lines
