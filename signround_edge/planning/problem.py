"""The problem that a budget poses: groups of tensors that share a type, and what each type takes and costs there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from signround_edge.formats import get_grid
from signround_edge.formats.matmul_nbits import matmul_nbits_bytes
from signround_edge.manifest import TensorEntry
from signround_edge.model.experts import stacks
from signround_edge.planning.knapsack import Option

Types = Mapping[str, str]


@dataclass(frozen=True)
class Group:
    """Tensors that have one type: mostly one, or the matrices of a layer's experts.

    Attributes:
        names: of the parameters.
        weights: how many there are.
        options: the types that it may have.
    """

    names: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]

    def option(self, kind: str | None) -> Option | None:
        """The option of a type, or None where it is none."""
        return next((option for option in self.options if option.kind == kind), None)


def grouped(names: Iterable[str], together: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Names that share a type, each once: experts of a layer, and those that a file keeps in one tensor.

    Args:
        names: of the parameters, in order.
        together: names that a file keeps in one tensor.
    """
    ordered = list(names)
    owner = {name: name for name in ordered}

    def find(name: str) -> str:
        while owner[name] != name:
            name = owner[name]
        return name

    for members in [*stacks(ordered).values(), *together]:
        known = [name for name in members if name in owner]
        for name in known[1:]:
            owner[find(name)] = find(known[0])
    found: dict[str, list[str]] = {}
    for name in ordered:
        found.setdefault(find(name), []).append(name)
    return [tuple(members) for members in found.values()]


def as_nodes(
    kinds: Mapping[str, tuple[str, ...]], nodes: Mapping[tuple[str, ...], tuple[str, ...]], only: bool
) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, ...]]]:
    """Types of matrices that a runtime computes much faster where they have one of some types.

    Args:
        kinds: parameter name → types that it may have.
        nodes: names → those types.
        only: they have no others where no pin forbids all of these.
    Returns:
        kinds, and the names that are to have one type.
    """
    found, together = dict(kinds), []
    for names, fast in nodes.items():
        possible = [kind for kind in fast if all(kind in kinds.get(name, ()) for name in names)]
        if possible:
            together.append(names)
            if only:
                found |= {name: tuple(kind for kind in kinds[name] if kind in possible) for name in names}
    return found, together


def bytes_by_type(
    groups: Mapping[tuple[str, ...], Sequence[str]],
    entries: Mapping[str, TensorEntry],
    tensor_bytes: Callable[[Types], dict[tuple[str, ...], int]],
) -> dict[tuple[str, ...], dict[str, int]]:
    """Group → type → bytes in the file.

    Args:
        groups: names → types.
        tensor_bytes: parameter name → type to bytes of a file's tensors; {} where the exporter tells only the sum.
    """
    kinds = dict.fromkeys(kind for own in groups.values() for kind in own)
    found: dict[tuple[str, ...], dict[str, int]] = {names: {} for names in groups}
    for kind in kinds:
        having = [names for names, own in groups.items() if kind in own]
        stored = tensor_bytes({name: kind for names in having for name in names})
        of_name: dict[str, int] = {}
        for members, size in stored.items():
            of_name[members[0]] = of_name.get(members[0], 0) + size
        for names in having:
            found[names][kind] = (
                sum(of_name.get(name, 0) for name in names)
                if stored
                else sum(_onnx_bytes(entries[name], kind) for name in names)
            )
    return found


def _onnx_bytes(entry: TensorEntry, kind: str) -> int:
    found = matmul_nbits_bytes(get_grid(kind), *entry.out_in_shape)
    assert found is not None, kind
    return found
