"""The yardstick GPTQ (Frantar et al. 2023, arXiv 2210.17323) on our grids: a reference implementation.

    python -m benchmarks.gptq ROUNDED_RUN --model HF_FOLDER --calibration C.txt -o weights.safetensors

No kept library has these grids (K-quants, asymmetric blocks of 32 with integer zero points, 2 bits), and ONNX Runtime's
own GPTQ gives the bytes of an identity Hessian, so it is written here. With H = Σ x·xᵀ of the inputs that the quantized
model gives a matrix, damped by 1 % of its mean diagonal, and U the upper Cholesky factor of H⁻¹ (algorithm 1 there),
columns are rounded one after another and the error of each is spread over those that are still to come:

    E_j = (w_j − ŵ_j) / U_jj,    w_k ← w_k − E_j·U_jk  for k > j

With `act_order` columns go by falling H_jj, and scales are taken from the original weights, since a block's columns
are then not neighbours. Otherwise a block's scales are taken when its turn comes, from what its weights have become.
Decoder blocks are done in order, and within one q, k, v, then o, then gate, up, then down (`--true-sequential` of the
authors).
Embedding and output head are those of a run of ours, rounded to nearest.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from signround_edge.formats import Grid, QuantizedTensor
from signround_edge.formats.grid import Fields
from signround_edge.model.decoder import (
    Decoder,
    out_in,
    set_out_in,
    set_tensor,
)
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import RunDirectory
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.calibration.activations import Stream, run_block
from signround_edge.tuning.calibration.shell import Shell, block_returns_tuple
from signround_edge.tuning.calibration.text import calibration_tokens
from signround_edge.tuning.cpu.attention import use_blocked_attention

# Matrices whose inputs differ, in the order in which a block computes them; matrices of unknown names come last.
_STAGES = (("q_proj", "k_proj", "v_proj", "c_attn"), ("o_proj",), ("gate_proj", "up_proj", "c_fc"), ("down_proj",))
_COLUMNS_AT_ONCE = 128  # errors reach the columns behind such a group in one product
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """How GPTQ goes about it.

    Attributes:
        act_order: columns by falling H_jj instead of from left to right.
        damping: added to the diagonal of H, as a share of its mean.
        scale_init: "absmax" (each block's extremes, as the authors do) or "search" (our search, weighted by H_jj).
    """

    act_order: bool = True
    damping: float = 0.01
    scale_init: str = "search"


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, options: Options) -> QuantizedTensor:
    """Quantize one matrix.

    Args:
        weight: f32 [out, in].
        hessian: Σ x·xᵀ f32 [in, in] over the inputs x.
    """
    rows, cols = weight.shape
    order = hessian.diagonal().argsort(descending=True, stable=True) if options.act_order else torch.arange(cols)
    factor = inverse_factor(hessian[order][:, order], options.damping)
    assert factor is not None, "the inputs hold NaN or infinities"
    units = _Units(grid, hessian.diagonal(), options.scale_init)
    if options.act_order or grid.row_multiple > 2 * _COLUMNS_AT_ONCE:
        units.take_scales(weight)
    work, codes = weight[:, order].clone(), torch.empty(rows, cols)
    at_once = _COLUMNS_AT_ONCE if units.known(cols) else min(grid.row_multiple, cols)
    for start in range(0, cols, at_once):
        end = min(start + at_once, cols)
        if not units.known(end):
            units.take_scales(work[:, start:end], start)
        errors = torch.empty(rows, end - start)
        for j in range(start, end):
            column = int(order[j])
            offsets, rounded = units.nearest(work[:, j], column)
            codes[:, column] = offsets + grid.anchor
            errors[:, j - start] = (work[:, j] - rounded) / factor[j, j]
            work[:, j + 1 : end].addr_(errors[:, j - start], factor[j, j + 1 : end], alpha=-1)
        work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return grid.pack_tensor(grid.blocked(codes), units.fields())


class _Units:
    """Scale fields by units of columns: the fewest columns that have scale fields of their own."""

    def __init__(self, grid: Grid, importance: Tensor, scale_init: str) -> None:
        self._grid = grid
        self._importance = importance
        self._scale_init = scale_init
        self._fields: list[Fields] = []

    def known(self, columns: int) -> bool:
        """Whether the first `columns` columns have their scales."""
        return len(self._fields) * self._grid.row_multiple >= columns

    def take_scales(self, weight: Tensor, start: int = 0) -> None:
        """Append the scales of weight f32 [rows, n], whose first column has the number `start` in the matrix."""
        grid, width = self._grid, self._grid.row_multiple
        importance = self._importance[start : start + weight.shape[1]]
        for first in range(0, weight.shape[1], width):
            part = slice(first, first + width)
            scales = initial_scales(grid, weight[:, part].contiguous(), importance[part], self._scale_init)
            self._fields.append(grid.store(scales))

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """(code offsets, weights) f32 [rows] nearest to values f32 [rows] of one column."""
        grid = self._grid
        unit, inside = divmod(column, grid.row_multiple)
        fields = self._fields[unit]
        # The grid knows whole rows only: the column is rounded in every block of the unit, and its own one is taken.
        repeated = values.view(-1, 1, 1).expand(-1, grid.row_multiple // grid.block_size, 1)
        offsets = grid.round_offsets(repeated, fields)
        block = inside // grid.block_size
        return offsets[:, block, 0], grid.from_offsets(offsets, fields)[:, block, 0]

    def fields(self) -> Fields:
        """The fields of the whole matrix."""
        return {name: torch.cat([fields[name] for fields in self._fields], dim=1) for name in self._fields[0]}


def quantize(model: Path, rounded: RunDirectory, tokens: Tensor, options: Options) -> dict[str, QuantizedTensor]:
    """GPTQ on the decoder matrices of a model: parameter name → codes and scales.

    Args:
        model: Hugging Face folder; the whole model is held in memory, f32.
        rounded: a run of the same model: gives each matrix's grid, and embedding and output head.
        tokens: calibration samples int64 [samples, seqlen].
    """
    decoder = _load(model, rounded)
    use_blocked_attention(decoder.model, _CPU)
    shell = Shell(decoder, block_returns_tuple(decoder, tokens[:1, :2]))
    stream = Stream(torch.cat([shell.embed(part) for part in tokens.split(_SAMPLES)]))
    found: dict[str, QuantizedTensor] = {}
    for index in range(len(decoder.blocks)):
        matrices = {n: m for n, m in decoder.matrices(index).items() if rounded.is_quantized(n)}
        for stage in _stages(matrices):
            with _hessians(stage) as hessians:
                _forward(decoder, shell, index, tokens, stream)
            for name, module in stage.items():
                grid = rounded.quantized(name).grid
                found[name] = gptq(out_in(module).contiguous(), hessians[name], grid, options)
                set_out_in(module, found[name].dequantize())
        stream = _forward(decoder, shell, index, tokens, stream)
    return found


_SAMPLES = 8


def _forward(decoder: Decoder, shell: Shell, index: int, tokens: Tensor, stream: Stream) -> Stream:
    return run_block(decoder, shell, index, tokens, stream, _SAMPLES, _CPU, torch.autocast("cpu", enabled=False))


def _load(model: Path, rounded: RunDirectory) -> Decoder:
    """The exact decoder blocks between the run's embedding and head."""
    weights = ModelWeights.open(model)
    decoder = weights.decoder
    inside = {name for index in range(len(decoder.blocks)) for name in decoder.matrices(index)}
    for name, _ in list(decoder.model.named_parameters()):
        exact = name in inside or not rounded.is_quantized(name)
        value = weights.tensor(name).float() if exact else rounded.dequantized(name)
        set_tensor(decoder.model, name, value)
    decoder.model.tie_weights()  # type: ignore[operator]
    return decoder


def _stages(matrices: dict[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """The matrices of a block in groups that are quantized together, because their inputs are the same."""
    stages = []
    for leaves in _STAGES:
        stages.append({n: m for n, m in matrices.items() if n.split(".")[-2] in leaves})
    stages.append({n: m for n, m in matrices.items() if not any(n in stage for stage in stages)})
    return [stage for stage in stages if stage]


@contextlib.contextmanager
def _hessians(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within, Σ x·xᵀ f32 [in, in] of each module's inputs adds up in the dictionary."""
    sums: dict[str, Tensor] = {}
    last: list[Tensor] = []  # an input and its product: q, k and v share theirs

    def add(name: str, value: Tensor) -> None:
        if not last or last[0] is not value:
            rows = value.reshape(-1, value.shape[-1])
            last[:] = [value, rows.T @ rows]
        sums[name] = sums[name] + last[1] if name in sums else last[1]

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    """Command line: writes the dequantized weights of the decoder matrices, f32, under their parameter names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of the same model, rounded to nearest")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--act-order", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scale-init", choices=("search", "absmax"), default="search")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    tokens = calibration_tokens(args.calibration, load_tokenizer(args.model), args.samples, args.seqlen)
    options = Options(act_order=args.act_order, scale_init=args.scale_init)
    found = quantize(args.model, RunDirectory.open(args.run), tokens, options)
    save_file({name: tensor.dequantize() for name, tensor in found.items()}, args.out)


if __name__ == "__main__":
    main()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor f32 of the inverse of the damped hessian [K, K], or None where there is none.

    Channels that never fired get a diagonal of 1.
    """
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed or not lower.isfinite().all():
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed else upper.float()
