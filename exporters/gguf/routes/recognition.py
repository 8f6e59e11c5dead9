"""How a tensor of someone else's file follows from the run's parameters, found by its values.

Tried in turn, with the parameters that may be meant (`candidates`): the parameter itself, its rows in another order, a
function of its values (-exp of A_log), another shape of the same values; some of its rows, or rows of several (fused
and split projections, stacks of matrices); matrices stored transposed; and its columns in another order. For the
experts of a layer the first decides, and the others must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

from exporters.gguf.container.reader import GgufFile
from exporters.gguf.families.family import Stored
from exporters.gguf.families.row_orders import RowOrder
from exporters.gguf.placement import Piece, Placement, place
from exporters.gguf.routes.matching import Matrix, find_row_order, find_rows, find_vector
from exporters.gguf.tensors import dequantized
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory

_PIECES = 8  # of one matrix; more would be rows that look alike by chance
Stack = tuple[str, ...]  # one parameter, or that of each expert of a layer


@dataclass
class Recognition:
    """The two sides that are compared, and what is known of the orders of rows.

    Attributes:
        heads: counts of heads, for orders of rows within them.
        orders: name of a weight → the order of its rows that was found: its bias has the same.
    """

    run: RunDirectory
    file: GgufFile
    heads: list[int]
    orders: dict[str, RowOrder]

    def same(self, name: str, stack: Stack, named: bool = True) -> Placement | None:
        """The tensor as one parameter or one of each expert, perhaps its rows in another order or a function of it.

        Args:
            named: gguf's table says so; see `find_vector`.
        """
        plain = place(self.run, stack, Stored(name))
        stored = self.file.tensors[name]
        if math.prod(plain.shape) != math.prod(stored.shape):
            return self._filled_up(name, stack)
        here = replace(plain, shape=stored.shape)
        placement = None
        if len(plain.shape) > 1 and plain.shape[-1] == stored.shape[-1]:
            placement = self._same_matrices(here)
        if placement is None and not self.run.is_quantized(stack[0]):
            placement = self._same_vector(here, named)
        return placement

    def _filled_up(self, name: str, stack: Stack) -> Placement | None:
        """A table that the file has more rows of, for tokens without one: they take the first, as in transformers."""
        shape, stored = self.run.entry(stack[0]).out_in_shape, self.file.tensors[name].shape
        rows = shape[0]
        if len(stack) > 1 or len(shape) != 2 or len(stored) != 2 or stored[1] != shape[1] or stored[0] < rows:
            return None
        found, order = find_row_order(self._ours(Piece(stack[0])), float_rows(self.file, name, slice(rows)), [])
        if not found or order is not None:
            return None
        filled = np.concatenate([np.arange(rows), np.zeros(stored[0] - rows)]).astype(np.intp)
        return Placement(name, (Piece(stack[0], filled),), stored)

    def _same_matrices(self, plain: Placement) -> Placement | None:
        rows = math.prod(plain.shape[:-1]) // len(plain.pieces)
        order: RowOrder | None = None
        for number, piece in enumerate(plain.pieces):
            ours = self._ours(piece)
            theirs = float_rows(self.file, plain.gguf_name, slice(number * rows, (number + 1) * rows))
            if number and order is not None:
                ours = ours[order]
            found, here = find_row_order(ours, theirs, self.heads if number == 0 else [])
            if not found or (number and here is not None):
                return None
            order = here if number == 0 else order
        return self._ordered(plain, order)

    def _same_vector(self, plain: Placement, named: bool) -> Placement | None:
        ours = np.concatenate([self._ours(piece).reshape(-1) for piece in plain.pieces])
        theirs = float_rows(self.file, plain.gguf_name).reshape(-1)
        single = len(plain.pieces) == 1
        weight = self.orders.get(plain.pieces[0].hf_name.removesuffix(".bias") + ".weight") if single else None
        found = find_vector(ours, theirs, [] if weight is None else [weight], named)
        return None if found is None else self._ordered(replace(plain, function=found.function), found.order)

    def _ordered(self, plain: Placement, order: RowOrder | None) -> Placement:
        return replace(plain, pieces=tuple(replace(piece, rows=order) for piece in plain.pieces))

    def changed(self, name: str, candidates: Sequence[Stack]) -> Placement | None:
        """The tensor as something else that is made of the candidates."""
        for stack in candidates:
            placement = self.same(name, stack, named=False)
            if placement is not None:
                return placement
        shape = self.file.tensors[name].shape
        for attempt in (self._of_rows, self._transposed, self._of_columns):
            placement = attempt(name, shape, candidates)
            if placement is not None:
                return placement
        return None

    def _of_rows(self, name: str, shape: tuple[int, ...], candidates: Sequence[Stack]) -> Placement | None:
        """Rows of one or several parameters; of experts, the same rows of each."""
        rows = math.prod(shape[:-1])
        sources = [stack for stack in candidates if self._row_values(stack[0]) == shape[-1]]
        per_expert = [stack for stack in sources if len(shape) == 3 and len(stack) == shape[0]]
        if per_expert:
            found = self._rows_of(name, slice(rows // shape[0]), [stack[0] for stack in per_expert])
            if found is None:
                return None
            pieces = [Piece(per_expert[which][expert], order) for expert in range(shape[0]) for which, order in found]
            placement = Placement(name, tuple(pieces), shape)
            return placement if self._agrees(placement) else None
        singles = [stack[0] for stack in sources if len(stack) == 1]
        found = self._rows_of(name, slice(rows), singles)
        return None if found is None else Placement(name, tuple(Piece(singles[i], order) for i, order in found), shape)

    def _rows_of(self, name: str, rows: slice, sources: list[str]) -> list[tuple[int, RowOrder | None]] | None:
        """(number of the source, its rows) one after the other, that make up these rows of a tensor."""
        if not sources:
            return None
        matrices = [self._ours(Piece(source)) for source in sources]
        order = find_rows(np.concatenate(matrices), float_rows(self.file, name, rows))
        return None if order is None else _runs_of(order, [len(matrix) for matrix in matrices])

    def _transposed(self, name: str, shape: tuple[int, ...], candidates: Sequence[Stack]) -> Placement | None:
        """Matrices of a parameter's rows, each stored transposed (the key half of DeepSeek's kv_b_proj)."""
        if len(shape) != 3:
            return None
        stored = float_rows(self.file, name).reshape(shape).transpose(0, 2, 1).reshape(-1, shape[1])
        for (source,) in (stack for stack in candidates if len(stack) == 1):
            if self._row_values(source) == shape[1]:
                ours = self._ours(Piece(source))
                order = find_rows(ours, stored)
                if order is not None:
                    return Placement(name, (Piece(source, _all_or(order, len(ours))),), shape, transposed=True)
        return None

    def _of_columns(self, name: str, shape: tuple[int, ...], candidates: Sequence[Stack]) -> Placement | None:
        """A matrix whose values are in another order in each row."""
        if len(shape) != 2:
            return None
        for (source,) in (stack for stack in candidates if len(stack) == 1):
            if self.run.entry(source).out_in_shape == shape:
                order = find_rows(self._ours(Piece(source)).T, float_rows(self.file, name).T)
                if order is not None:
                    return Placement(name, (Piece(source),), shape, columns=order)
        return None

    def _agrees(self, placement: Placement) -> bool:
        """Whether all rows are what the placement makes of the run's, one matrix in memory at a time."""
        count, rows, _ = placement.shape
        each = len(placement.pieces) // count
        for number in range(count):
            pieces = placement.pieces[number * each : (number + 1) * each]
            ours = dequantized(self.run, replace(placement, pieces=pieces, shape=placement.shape[1:]))
            theirs = float_rows(self.file, placement.gguf_name, slice(number * rows, (number + 1) * rows))
            found, order = find_row_order(ours, theirs, [])
            if not found or order is not None:
                return False
        return True

    def _row_values(self, hf_name: str) -> int:
        return self.run.entry(hf_name).out_in_shape[-1]

    def _ours(self, piece: Piece) -> Matrix:
        """A parameter as f32 [rows, values a row]."""
        return dequantized(self.run, place(self.run, [piece.hf_name], Stored("", piece.rows)))


def float_rows(file: GgufFile, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Rows of a stored tensor as f32 [rows, values a row], through gguf's dequantizer (numpy)."""
    info = file.tensors[name]
    try:
        weights: NDArray[np.float32] = quants.dequantize(
            file.raw(name)[rows], gguf.GGMLQuantizationType(info.ggml_type.number)
        )
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{file.path}: tensor {name} has type {info.ggml_type.name}, which cannot be read; "
            "use an f16 or f32 template"
        ) from error
    return weights.reshape(-1, info.shape[-1])


def _runs_of(order: RowOrder, lengths: list[int]) -> list[tuple[int, RowOrder | None]] | None:
    """Row numbers of matrices that lie one below the other → (number of the matrix, rows of it), in order."""
    starts = np.cumsum([0, *lengths])
    owner = np.searchsorted(starts, order, side="right") - 1
    cuts = np.flatnonzero(np.diff(owner)) + 1
    if len(cuts) >= _PIECES * max(1, len(lengths)):
        return None
    return [
        (int(owner[part[0]]), _all_or(order[part] - starts[owner[part[0]]], lengths[owner[part[0]]]))
        for part in np.split(np.arange(len(order)), cuts)
    ]


def _all_or(order: RowOrder, length: int) -> RowOrder | None:
    """None for all rows as they are."""
    return None if np.array_equal(order, np.arange(length)) else order
