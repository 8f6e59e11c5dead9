"""What every grid is: the arithmetic between real weights, integer codes and stored scale fields.

A grid is everything that a runtime's dequantizer can represent. The tuner, the exporters and the verifier
all call the same grid; no other module computes a dequantized weight.

Shapes used throughout: R rows (output features), K values a row (input features), B blocks a row,
S values a block, so K = B·S. `blocked` tensors are [R, B, S]; per-block tensors are [R, B].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

FP16_MAX = 65504.0
_FP16_EXPONENT = 0x7C00  # all bits of the exponent: NaN or infinity

Fields = dict[str, Tensor]

_ROWS_AT_ONCE = 4096


def to_fp16(value: Tensor) -> Tensor:
    """Round to the nearest fp16 (ties to even), saturating at ±65504 instead of overflowing to infinity."""
    return value.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def safe_reciprocal(value: Tensor) -> Tensor:
    """1/value, and 0 where value is 0 or so small that the reciprocal overflows: such blocks hold zeros."""
    return value.reciprocal().nan_to_num(0.0, 0.0, 0.0)


def zero_position(scale: Tensor, minimum: Tensor) -> Tensor:
    """The code position of weight zero for w = scale·q + minimum; 0 where the scale is 0."""
    return (-minimum / scale).nan_to_num(0.0, 0.0, 0.0)


def field_rows(fields: Fields, rows: slice | Tensor) -> Fields:
    """Some rows (a view where `rows` is a slice) of every scale field."""
    return {name: take(field, rows) for name, field in fields.items()}


def take(values: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows, a view where `rows` is a slice. For numbers of rows index_select is several times faster."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


@dataclass(frozen=True)
class BlockScales:
    """Real-valued scales before storage: weight ≈ scale·level(code) + minimum.

    Attributes:
        scale: f32 [R, B]; may be negative.
        minimum: f32 [R, B], the weight of code 0, or None for symmetric grids.
        super_scale, super_minimum: f32 [R, super-blocks], the units of the integer sub-scales and sub-minimums; None on
            grids without super-blocks, and where the grid is to derive them from the largest scale.
    """

    scale: Tensor
    minimum: Tensor | None = None
    super_scale: Tensor | None = None
    super_minimum: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockScales:
        """The same change to every tensor."""
        return BlockScales(*(None if t is None else change(t) for t in self._tensors()))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: Sequence[BlockScales]) -> BlockScales:
        """The scales of groups of rows, one group below the other."""
        columns = zip(*(part._tensors() for part in parts), strict=True)
        joined = (None if column[0] is None else torch.cat([t for t in column if t is not None]) for column in columns)
        return BlockScales(*joined)  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.scale, self.minimum, self.super_scale, self.super_minimum


class Grid(ABC):
    """One block format. Subclasses are small, stateless and found by name in `signround_edge.formats`.

    Attributes:
        name: format name as stored in run directories ("Q4_0", "w4g128-asym").
        block_size: values that share one scale (S).
        row_multiple: a row's length must be a multiple of this (the super-block, where there is one).
        code_min, code_max: the inclusive range of codes.
        code_dtype: torch.uint8, or torch.int8 where codes are signed.
        anchor: the code that does not move when the scale changes: the code of weight zero for symmetric
            grids; 0, the code of the minimum, for affine ones.
        affine: whether there is a minimum (or zero point) besides the scale.
        integer_zero: whether affine codes have an integer zero point in the place of a minimum.
        even: whether levels are evenly spaced, which makes them the code offsets themselves.
        group: how many neighbouring values have their codes chosen together; 1 where each has its own.
        fp16_scales: whether the scale of every block is an fp16 value, not a product of two stored ones.
        positive_scales: whether scales are stored without a sign.
        minimum_at_most_zero: whether the minimum of a block cannot be positive.
        field_ranges: inclusive range of each integer field that does not use all values of its dtype.
        bits_per_weight: stored bits a weight, scale fields included.
    """

    name: str
    block_size: int
    row_multiple: int
    code_min: int
    code_max: int
    code_dtype: torch.dtype = torch.uint8
    anchor: int
    affine: bool
    integer_zero: bool = False
    even: bool = True
    group: int = 1
    fp16_scales: bool = True
    positive_scales: bool = False
    minimum_at_most_zero: bool = False
    field_ranges: Mapping[str, tuple[int, int]] = MappingProxyType({})
    bits_per_weight: float

    @abstractmethod
    def store(self, scales: BlockScales) -> Fields:
        """Round real-valued scales to the fields that the format stores. Shapes per subclass."""

    @abstractmethod
    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """(scale, zero) of every block as f32 [R, B], so that w/scale + zero is the code position of evenly spaced
        levels; see `offsets` for others."""

    @abstractmethod
    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        """Weights f32 [R, B, S] of the levels of codes, f32 [R, B, S], bit for bit what runtimes compute."""

    @abstractmethod
    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        """Scales that minimise Σ importance·(w − ŵ)² per block.

        Args:
            blocks: weights f32 [R, B, S].
            importance: E[x²] of the input channels, f32, broadcastable to [R, B, S].
        """

    @abstractmethod
    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → (shape, dtype) of each stored scale field of a [rows, cols] tensor."""

    def scales_at_their_limits(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """Which blocks (or super-blocks) have no scale but zero, and which the largest that there is: bool [R, n]."""
        scales = [field for field in fields.values() if field.is_floating_point()]
        none, most = (scales[0] == 0), (scales[0].abs() >= FP16_MAX)
        for other in scales[1:]:
            none, most = none & (other == 0), most | (other.abs() >= FP16_MAX)
        return none, most

    @property
    def scales_hold(self) -> str:
        """Which scales other than zero a block (or super-block) may have, in a few words."""
        return "fp16 scales hold 6e-8 to 65504"

    def codes_problem(self, codes: Tensor) -> str | None:
        """What is wrong with codes [R, K], each in its range, beside one another, in a few words; None: nothing."""
        return None

    def levels(self, offsets: Tensor) -> Tensor:
        """How many scales above the minimum (or above zero) the weight of each code offset is.

        Between codes it is interpolated. On most grids levels are evenly spaced and are the offsets themselves.
        """
        return offsets

    def offsets_of_levels(self, levels: Tensor) -> Tensor:
        """The inverse of `levels`."""
        return levels

    def nearest_offsets(self, positions: Tensor, weights: Tensor | None = None) -> Tensor:
        """The nearest codes less the anchor to real-valued positions f32 [R, B, S], which are overwritten.

        Args:
            weights: of the squared differences of the values of a group, f32 [group]; where each value has a code of
                its own they change nothing.
        """
        return positions.round_().clamp_(*self.offset_range)

    def nearest_levels(self, levels: Tensor) -> Tensor:
        """The nearest level of a code to real-valued levels f32 [R, B, S], which are overwritten."""
        return levels.round_().clamp_(*self.offset_range)

    def level_rule(self, device: torch.device) -> tuple[int, int, Tensor | None]:
        """`nearest_levels` for kernels: lowest and highest level, and the nearest one of each interval of 1/2 from the
        lowest on, f32; None where that is the nearest integer. Where codes are chosen together there is none."""
        return *self.offset_range, None

    def from_offsets(self, offsets: Tensor, fields: Fields) -> Tensor:
        """Weights f32 [R, B, S] of codes less the anchor, f32 [R, B, S], bit for bit what runtimes compute."""
        return self.from_levels(self.levels(offsets), fields)

    def offsets(self, blocks: Tensor, fields: Fields) -> Tensor:
        """Code positions less the anchor, real-valued [R, B, S], of weights f32 [R, B, S].

        scale·levels(offset) + minimum = w. The code itself is offset + anchor; tuning works with offsets because most
        grids need no addition for them.
        """
        return self.offsets_of_levels(self._real_levels(blocks, fields))

    def round_levels(self, blocks: Tensor, fields: Fields) -> Tensor:
        """Levels of the nearest codes of weights f32 [R, B, S]: `levels(round_offsets(…))`, faster on uneven grids."""
        return self.nearest_levels(self._real_levels(blocks, fields))

    def _real_levels(self, blocks: Tensor, fields: Fields) -> Tensor:
        """(w − minimum)/scale."""
        scale, zero = self.affine_view(fields)
        ratio = blocks * safe_reciprocal(scale).unsqueeze(-1)
        return ratio.add_(zero.unsqueeze(-1)) if self.affine else ratio

    @property
    def codes_a_value(self) -> float:
        """How many codes a value has to choose among; the mean where several are chosen together."""
        return self.code_max - self.code_min + 1

    @property
    def offset_range(self) -> tuple[int, int]:
        """The inclusive range of codes less the anchor."""
        return self.code_min - self.anchor, self.code_max - self.anchor

    def round_offsets(self, blocks: Tensor, fields: Fields, shift: Tensor | None = None) -> Tensor:
        """clip(round(offset + V)) of `blocks`, f32 [R, B, S]; `shift` is V [R, B, S] or None."""
        offsets = self.offsets(blocks, fields)
        if shift is not None:
            offsets += shift
        return self.nearest_offsets(offsets)

    def dequantize_blocks(self, codes: Tensor, fields: Fields) -> Tensor:
        """Weights f32 [R, B, S] of codes (float or integer, [R, B, S]), bit for bit what runtimes compute."""
        return self.from_offsets(codes.float() - self.anchor, fields)

    def blocked(self, matrix: Tensor) -> Tensor:
        """View [R, K] as [R, B, S]."""
        return matrix.view(matrix.shape[0], -1, self.block_size)

    def round_codes(self, blocks: Tensor, fields: Fields, shift: Tensor | None = None) -> Tensor:
        """Codes of `blocks` as f32 [R, B, S]; `shift` is V [R, B, S] or None."""
        return self.round_offsets(blocks, fields, shift).add_(self.anchor)

    def quantize(self, weight: Tensor, scales: BlockScales) -> QuantizedTensor:
        """Round weight f32 [R, K] to nearest on the grid of `scales`, some rows at a time: heads are large."""
        fields = self.store(scales)
        codes = torch.empty(weight.shape, dtype=self.code_dtype, device=weight.device)
        for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            found = self.round_codes(self.blocked(weight[rows]), field_rows(fields, rows))
            codes[rows] = found.reshape(-1, weight.shape[1]).to(self.code_dtype)
        return self.pack_tensor(self.blocked(codes), fields)

    def pack_tensor(self, codes: Tensor, fields: Fields) -> QuantizedTensor:
        """A QuantizedTensor of codes [R, B, S] (float or integer) and stored fields."""
        flat = codes.reshape(codes.shape[0], -1).to(self.code_dtype)
        return QuantizedTensor(self, flat, {k: v.contiguous() for k, v in fields.items()})

    def unit_order(self, columns: Tensor) -> Tensor | None:
        """The order of a row's blocks (super-blocks, where there are) when its values are put in the order `columns`.

        None when blocks do not stay whole.
        """
        if len(columns) % self.row_multiple:
            return None
        units = columns.view(-1, self.row_multiple)
        first = units[:, :1]
        whole = (first % self.row_multiple == 0).all() and torch.equal(units, first + torch.arange(self.row_multiple))
        return first[:, 0] // self.row_multiple if whole else None

    def stored_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a [rows, cols] tensor in the target file."""
        return round(rows * cols * self.bits_per_weight / 8)


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes and stored scale fields of one weight matrix: the source of truth.

    Attributes:
        grid: the format whose arithmetic gives the weights.
        codes: integers [R, K] in grid.code_dtype.
        fields: the stored scale fields, as `grid.field_shapes` says.
    """

    grid: Grid
    codes: Tensor
    fields: Fields

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, values a row)."""
        return self.codes.shape[0], self.codes.shape[1]

    def take_rows(self, rows: slice | Tensor) -> QuantizedTensor:
        """Some rows (a view where `rows` is a slice) in the given order; rows are independent of one another."""
        return QuantizedTensor(self.grid, take(self.codes, rows), field_rows(self.fields, rows))

    def take_columns(self, columns: Tensor) -> QuantizedTensor:
        """The values of each row in the order `columns` [K], in which blocks stay whole (`Grid.unit_order`)."""
        order = self.grid.unit_order(columns)
        if order is None:
            raise ValueError(f"blocks of {self.grid.name} do not stay whole in this order of columns")

        def moved(values: Tensor) -> Tensor:
            units = values.view(len(values), len(order), -1)
            return units[:, order].reshape(values.shape)

        return QuantizedTensor(self.grid, moved(self.codes), {k: moved(v) for k, v in self.fields.items()})

    def dequantize(self) -> Tensor:
        """Weights f32 [R, K], bit for bit what the runtime's own dequantizer returns."""
        blocks = self.grid.dequantize_blocks(self.grid.blocked(self.codes), self.fields)
        return blocks.reshape(self.codes.shape)

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same tensor on a device."""
        return QuantizedTensor(self.grid, self.codes.to(device), {k: v.to(device) for k, v in self.fields.items()})

    def problem(self) -> str | None:
        """What is wrong with shapes, dtypes or code range, in a few words; None when all is right."""
        return self.form_problem() or self.codes_problem()

    def codes_problem(self) -> str | None:
        """What is wrong with the range of codes: all of `problem` that has to read them."""
        if _leaves(self.codes, self.grid.code_min, self.grid.code_max):
            return f"codes leave the range {self.grid.code_min}..{self.grid.code_max}"
        return self.grid.codes_problem(self.codes)

    def form_problem(self) -> str | None:
        """What is wrong with shapes, dtypes or scale fields."""
        if self.codes.ndim != 2 or self.codes.dtype != self.grid.code_dtype:
            return f"codes are {self.codes.dtype} {list(self.codes.shape)}"
        rows, cols = self.shape
        if cols % self.grid.row_multiple:
            return f"rows of {cols} values are not a multiple of {self.grid.row_multiple}"
        expected = self.grid.field_shapes(rows, cols)
        if set(expected) != set(self.fields):
            return f"scale fields are {sorted(self.fields)}, expected {sorted(expected)}"
        for name, (shape, dtype) in expected.items():
            field = self.fields[name]
            if tuple(field.shape) != shape or field.dtype != dtype:
                return f"field {name} is {field.dtype} {list(field.shape)}, expected {dtype} {list(shape)}"
            if field.is_floating_point() and not _is_finite(field):
                return f"field {name} holds NaN or infinity"
        for name, (low, high) in self.grid.field_ranges.items():
            if _leaves(self.fields[name], low, high):
                return f"field {name} leaves the range {low}..{high}"
        return None


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinity; of fp16 by its bits, as torch goes through f32 for each value."""
    if values.dtype != torch.float16 or not values.numel():
        return bool(values.isfinite().all())
    return int((values.view(torch.int16) & _FP16_EXPONENT).max()) < _FP16_EXPONENT


def _leaves(values: Tensor, low: int, high: int) -> bool:
    """Whether integers leave an inclusive range; a limit that is the dtype's own needs no look at them."""
    limits = torch.iinfo(values.dtype)
    if not values.numel():
        return False
    return (low > limits.min and int(values.min()) < low) or (high < limits.max and int(values.max()) > high)


def joined(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One tensor of several on the same grid, row after row."""
    fields = {name: torch.cat([part.fields[name] for part in parts]) for name in parts[0].fields}
    return QuantizedTensor(parts[0].grid, torch.cat([part.codes for part in parts]), fields)
