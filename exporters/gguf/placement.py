"""Where the parameters of a run lie in a GGUF file: the tensor's name, and how its values follow from theirs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import gguf

from exporters.gguf.families.family import TEMPLATE_HINT, Family, Stored
from exporters.gguf.families.row_orders import Config, RowOrder
from exporters.gguf.families.table import family_of, row_order
from exporters.gguf.functions import ONE_PLUS, Function
from signround_edge.errors import UserError
from signround_edge.model.experts import stacks
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.gguf_names import name_table

_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Piece:
    """A parameter of the run, or some of its rows.

    Attributes:
        hf_name: its name in the run (for tied parameters: the one that holds the data).
        rows: numbers of the rows in the order wanted, of a vector those of its values; None takes all as they are.
    """

    hf_name: str
    rows: RowOrder | None = None


@dataclass(frozen=True)
class Placement:
    """One tensor of the file: the rows of its pieces one after the other, perhaps changed.

    Attributes:
        gguf_name: the tensor's name in the file.
        pieces: what it is made of; the matrices of a layer's experts are one tensor, for example.
        shape: of the tensor, rows first: [n], [rows, values a row] or [matrices, rows, values a row].
        columns: stored value j of each row is the parameter's value columns[j]; None when the order is the same.
        transposed: the rows of the pieces are shape[0] matrices, each of which is stored transposed.
        function: what is stored of each value x, where it is not x itself.
    """

    gguf_name: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    columns: RowOrder | None = None
    transposed: bool = False
    function: Function | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The parameters that it is made of, each once."""
        return tuple(dict.fromkeys(piece.hf_name for piece in self.pieces))


def place(run: RunDirectory, hf_names: Sequence[str], stored: Stored) -> Placement:
    """The placement of one parameter, or of one of each expert of a layer. Its name has to be known."""
    one = run.entry(hf_names[0]).out_in_shape
    if len(one) == 3 and one[1] == 1:  # the filters of a convolution over time
        one = (one[0], one[2])
    if stored.rows is not None:
        one = (len(stored.rows), *one[1:])
    shape = one if len(hf_names) == 1 and not stored.stacked else (len(hf_names), *one)
    assert stored.name is not None
    return Placement(
        stored.name,
        tuple(Piece(name, stored.rows) for name in hf_names),
        shape if stored.shape is None else stored.shape,
        stored.columns,
        stored.transposed,
        stored.function,
    )


def builtin_placements(run: RunDirectory, config: Config) -> list[Placement]:
    """Placement of every parameter, for the built-in families. UserError when one has no place.

    Args:
        config: as `canonical_config` gives it.
    """
    family = family_of(config)
    names = name_table(family.arch, int(config["num_hidden_layers"]))
    found: dict[str, Placement] = {}
    for stack, hf_names in stacks(run.names()).items():
        shape = run.entry(hf_names[0]).out_in_shape
        ways = family.stored(config, stack, shape)
        if ways is None:
            one_plus = ONE_PLUS if family.norm_added and stack.endswith("norm.weight") else None
            ways = (Stored(rows=row_order(family, config, stack, shape[0]), function=one_plus),)
        for way in ways:
            if way.name is None:
                way = replace(way, name=_table_name(family, names, stack, hf_names[0]))
            placed = place(run, hf_names, way)
            before = found.get(placed.gguf_name)
            found[placed.gguf_name] = placed if before is None else _joined(before, placed, way.stacked)
    return list(found.values())


def _table_name(family: Family, names: gguf.TensorNameMap, stack: str, hf_name: str) -> str:
    """The name that gguf's table has for a parameter. UserError where it has none."""
    for part, spelt in family.respelled:
        stack = stack.replace(part, spelt)
    spellings = (names.get_name(spelling, try_suffixes=_SUFFIXES) for spelling in _spellings(stack))
    gguf_name = next(filter(None, spellings), None)
    if gguf_name is None or hf_name.endswith(family.without):
        raise UserError(
            f"parameter {hf_name} has no place in llama.cpp's {family.model_type} architecture; {TEMPLATE_HINT}"
        )
    return str(gguf_name)


def _joined(first: Placement, second: Placement, stacked: bool) -> Placement:
    """One tensor of two parameters, row after row; of the parameters of experts, one expert after the other."""
    if stacked:
        matrices = first.shape[0] + second.shape[0]
        return replace(first, pieces=(*first.pieces, *second.pieces), shape=(matrices, *first.shape[1:]))
    matrices = math.prod(first.shape[:-2])
    a, b = len(first.pieces) // matrices, len(second.pieces) // matrices
    pieces = [
        piece
        for i in range(matrices)
        for piece in (*first.pieces[i * a : (i + 1) * a], *second.pieces[i * b : (i + 1) * b])
    ]
    shape = (*first.shape[:-2], first.shape[-2] + second.shape[-2], first.shape[-1])
    return replace(first, pieces=tuple(pieces), shape=shape)


def candidate_names(run: RunDirectory, block_count: int, arch: str) -> dict[str, tuple[str, ...]]:
    """GGUF name → HF names (see `place`) that a template of architecture `arch` may use, tied ones included."""
    archs = [known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    maps = [name_table(known, block_count) for known in archs]
    found: dict[str, tuple[str, ...]] = {}
    for stack, data_names in _with_tied(run):
        for names in maps:
            for spelling in _spellings(stack):
                gguf_name = names.get_name(spelling, try_suffixes=_SUFFIXES)
                if gguf_name is not None:
                    found.setdefault(gguf_name, data_names)
    return found


def _with_tied(run: RunDirectory) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, names of the parameters that hold its data); for experts, the name without a number."""
    yield from ((stack, tuple(names)) for stack, names in stacks(run.names()).items())
    yield from ((name, (owner,)) for name, owner in run.manifest.tied.items())


def names_of(placements: Iterable[Placement]) -> set[str]:
    """The parameters that have a place."""
    return {name for placement in placements for name in placement.hf_names}


def _spellings(hf_name: str) -> list[str]:
    """The name itself, and as base models (without a head on top) spell it."""
    known = ("model.", "transformer.", "gpt_neox.", "language_model.")
    bare = next((hf_name.removeprefix(prefix) for prefix in known if hf_name.startswith(prefix)), hf_name)
    return list(dict.fromkeys([hf_name, bare, f"model.{bare}", f"transformer.{bare}"]))
