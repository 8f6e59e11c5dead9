"""What the whole-model stage tunes: fp16 fields and codes of quantized matrices, and float tensors.

Each has a `value` that goes into the model, receives that value's gradient, and has a `stored` form for the run
directory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from signround_edge.formats import Grid, QuantizedTensor
from signround_edge.formats.grid import Fields, to_fp16

# How near to a rounding boundary a position may be: one half, less what f32 cannot tell from it at 255 codes.
_HALF = 0.4999
# Of a `TunedMatrix` between steps: a code, and 16 bits of its position.
BYTES_A_WEIGHT = 3
_RANGE = (-32760, 32760)  # of 16 bits, short of the boundary itself


class TunedMatrix:
    """A quantized matrix: each fp16 field times 1 + a, and codes that move by the sign of the gradient.

    A code q has a real-valued position p with q = clip(round(p)), the tuner's u + V. With the scale s,

        ∂L/∂p = s·G straight through the rounding,    p ← p − rate·sign(s·G)

    which is SignRound's step, driven by the loss of the whole model. Between steps a weight takes three bytes: its
    code, and what its position has beyond it.

    Attributes:
        grid: of the matrix.
        transposed: whether the module's weight is [in, out].
        shifts: a of each fp16 field, f32, shaped as the field.
        codes: as they are now, [R, K].
        fields: before this stage.
        beyond: p less its code, int16 [R, B, S] in units of `_unit`; None when the codes are frozen.
    """

    def __init__(
        self,
        tensor: QuantizedTensor,
        transposed: bool,
        original: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        home: torch.device | None = None,
    ) -> None:
        """`tensor` is where the steps are computed. `original`: the full-precision weight f32 [out, in], which tells
        the codes that nearly became others; None freezes the codes. `dtype`: of the products, so that neither weight
        nor gradient is converted at every step. `home`: where codes and positions are between steps."""
        self.grid, self.fields = tensor.grid, tensor.fields
        self.transposed = transposed
        self._dtype, self._device = dtype, tensor.codes.device
        self._home = self._device if home is None else home
        self.shifts = {
            name: nn.Parameter(torch.zeros(field.shape, device=field.device))
            for name, field in tensor.fields.items()
            if field.dtype == torch.float16
        }
        self.codes = tensor.codes.to(self._home)
        self.beyond: Tensor | None = None
        if original is not None:
            self._keep(tensor.codes, starting_positions(tensor, original))

    def stored(self) -> QuantizedTensor:
        """The matrix with its fields as stored now, where codes are between steps."""
        return QuantizedTensor(self.grid, self.codes, self._fields_now()).to(self._home)

    def value(self) -> Tensor:
        """The weight now, in the dtype of the products and the module's own orientation."""
        weight = self._now().dequantize().to(self._dtype)
        return weight.T.contiguous() if self.transposed else weight

    def receive(self, gradient: Tensor, code_rate: float) -> None:
        """Set the gradients of the shifts from G = ∂L/∂ŵ, in the module's own orientation, and move the codes."""
        gradient = gradient.float()
        if self.transposed:
            gradient = gradient.T.contiguous()
        grid, now = self.grid, self._now()
        leaves: Fields = {name: now.fields[name].float().requires_grad_() for name in self.shifts}
        with torch.enable_grad():
            weight = grid.dequantize_blocks(grid.blocked(now.codes), {**now.fields, **leaves})
        slopes = torch.autograd.grad(weight, list(leaves.values()), grid.blocked(gradient))
        for (name, shift), slope in zip(self.shifts.items(), slopes, strict=True):
            shift.grad = slope * self.fields[name].float()
        if self.beyond is not None and code_rate:
            self._move_codes(now, self.beyond, grid.blocked(gradient), code_rate)

    def _move_codes(self, now: QuantizedTensor, beyond: Tensor, gradient: Tensor, rate: float) -> None:
        grid = self.grid
        scale, _ = grid.affine_view(now.fields)
        low, high = grid.offset_range
        positions = (
            beyond.to(self._device).float().mul_(_unit(grid)).add_(grid.blocked(now.codes).float() - grid.anchor)
        )
        positions.sub_((gradient * scale.unsqueeze(-1)).sign_(), alpha=rate).clamp_(low - _HALF, high + _HALF)
        codes = grid.pack_tensor(grid.nearest_offsets(positions.clone()) + grid.anchor, now.fields).codes
        self.codes = codes.to(self._home)
        self._keep(codes, positions)

    def _keep(self, codes: Tensor, positions: Tensor) -> None:
        """Positions f32 [R, B, S] that round to `codes`; they are overwritten."""
        grid = self.grid
        beyond = positions.sub_(grid.blocked(codes).float() - grid.anchor).div_(_unit(grid)).round_().clamp_(*_RANGE)
        self.beyond = beyond.to(torch.int16).to(self._home)

    def _now(self) -> QuantizedTensor:
        return QuantizedTensor(self.grid, self.codes.to(self._device), self._fields_now())

    def _fields_now(self) -> Fields:
        moved = {name: to_fp16(self.fields[name].float() * (1 + a.detach())) for name, a in self.shifts.items()}
        return {**self.fields, **moved}


def _unit(grid: Grid) -> float:
    """In what `TunedMatrix.beyond` is counted: half a code is all of 16 bits, eight codes where vectors are chosen,
    which are not the nearest of each value."""
    return 2.0**-16 if grid.group == 1 else 2.0**-12


class FloatShift:
    """A float tensor moved by unit·a, where the unit is its root mean square.

    Attributes:
        initial: the tensor before this stage, as stored.
        shifts: {"value": a}, f32, shaped as the tensor.
    """

    def __init__(self, initial: Tensor) -> None:
        self.initial = initial
        self._unit = initial.float().square().mean().sqrt()
        self.shifts = {"value": nn.Parameter(torch.zeros(initial.shape, device=initial.device))}

    def stored(self) -> Tensor:
        """The tensor as stored now: f32, because 16 bits would round away what is tuned."""
        return self.initial.float() + self._unit * self.shifts["value"].detach()

    def value(self) -> Tensor:
        """The tensor now, f32."""
        return self.stored()

    def receive(self, gradient: Tensor, _code_rate: float) -> None:
        """Set the gradient of a from that of the tensor."""
        self.shifts["value"].grad = gradient * self._unit


Tunable = TunedMatrix | FloatShift


def starting_positions(tensor: QuantizedTensor, original: Tensor) -> Tensor:
    """Positions f32 [R, B, S], less the grid's anchor, that round to the tensor's codes.

    Where the code is the nearest one it is the weight's own position. Where block-wise tuning chose another, the
    position is mirrored at the boundary that V made it cross: a weight that crossed by a little is as near to crossing
    back. V itself is not stored. Values whose codes are chosen together are at their codes where others were nearer.
    """
    grid = tensor.grid
    codes = grid.blocked(tensor.codes).float() - grid.anchor
    away = grid.offsets(grid.blocked(original), tensor.fields) - codes
    distance = away.abs()
    inside = torch.where(distance <= 0.5, distance, (1 - distance).clamp_min(0)).clamp_max(_HALF)
    found = codes + inside * away.sign()
    if grid.group == 1:
        return found
    other = (grid.nearest_offsets(found.clone()) != codes).view(len(codes), -1, grid.group).any(-1)
    return torch.where(other.repeat_interleave(grid.group, dim=1).view(codes.shape), codes, found)
