"""The transform `channel-scales` in the block loop: each block's folds, kept where rounding then does it less harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from signround_edge.formats import QuantizedTensor
from signround_edge.model.decoder import set_tensor
from signround_edge.model.experts import stacks
from signround_edge.schemes.roles import head_size
from signround_edge.transforms.block_transform import BlockTransform
from signround_edge.transforms.channel_scales import Consumer, search_scales
from signround_edge.transforms.find_folds import find_folds
from signround_edge.transforms.folds import Fold, is_norm
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.block.transforming import Transforming, transformed_matrix
from signround_edge.tuning.block.unit import Matrix


def choose_channel_scales(
    model: Transforming, index: int, matrices: list[Matrix], loss: Callable[[], float], scale_init: str
) -> tuple[BlockTransform, dict[str, Any]]:
    """The channel scales of a loaded block, and a report of them.

    Each fold's scales are kept only where they lower the block's loss with all matrices rounded to nearest.

    Args:
        model: the model so far.
        index: the block's.
        matrices: those to quantize, with the source's weights.
        loss: the block's loss on the held-out samples for the weights that are in it.
    """
    block, prefix = model.shell.decoder.blocks[index], model.shell.decoder.block_prefix(index)
    own = {m.name.removeprefix(prefix): m for m in matrices}
    folds = _folds(model, index, own)
    source = dict(block.named_parameters())
    best, rounded = BlockTransform(), {name: _rounded(m, scale_init) for name, m in own.items()}
    _install(own, rounded)
    plain = lowest = loss()
    kept: dict[str, float] = {}
    for fold in folds:
        names = [f"{name}.weight" for name in fold.consumers]
        scaled = [transformed_matrix(own[name], best.of(name)) for name in names]
        found = search_scales(fold, [Consumer(m.exact, m.importance, m.grid) for m in scaled])
        if found is None:
            continue
        trial = best.with_fold(_restored(block, source), fold, found[0])
        changed = [*names, f"{fold.producer}.weight"]
        again = {n: _rounded(transformed_matrix(own[n], trial.of(n)), scale_init) for n in changed if n in own}
        _install(own, {**rounded, **again})
        trial.install_vectors(block)
        if (now := loss()) < lowest:
            best, rounded, lowest = trial, {**rounded, **again}, now
            kept[str(fold)] = found[1]
    _restored(block, source)
    less = 1 - lowest / plain if plain else 0.0
    model.progress.line(
        f"{index + 1}/{len(model.shell.decoder.blocks)} channel scales: held-out loss of rounding {plain:.3e} → "
        f"{lowest:.3e} ({less:.0%} less) by {len(kept)} of {len(folds)} folds"
    )
    return best, {"rounded_before": plain, "rounded": lowest, "weighted_errors": kept}


def _folds(model: Transforming, index: int, own: dict[str, Matrix]) -> list[Fold]:
    """The block's folds whose matrices are all quantized; on the first block the user is told of the others."""
    block = model.shell.decoder.blocks[index]
    with torch.no_grad():
        found = find_folds(
            block, lambda: model.try_original(index), model.original, head_size(model.shell.decoder.model.config)
        )
    folds = [fold for fold in found if all(name in own for name in _matrices(block, fold))]
    if index == 0:
        reached = {f"{name}.weight" for fold in folds for name in fold.consumers}
        left = stacks([name for name in own if name not in reached])
        model.progress.line(f"channel scales: {'; '.join(map(str, folds)) or 'this model has no place for them'}")
        if left:
            model.progress.line(f"no channel scales before {', '.join(left)}: what they read cannot be scaled")
    return folds


def _restored(block: nn.Module, source: dict[str, nn.Parameter]) -> nn.Module:
    for name, parameter in source.items():
        set_tensor(block, name, parameter)
    return block


def _matrices(block: nn.Module, fold: Fold) -> list[str]:
    layers = fold.consumers if is_norm(block.get_submodule(fold.producer)) else (*fold.consumers, fold.producer)
    return [f"{name}.weight" for name in layers]


def _rounded(matrix: Matrix, scale_init: str) -> QuantizedTensor:
    return matrix.grid.quantize(matrix.exact, initial_scales(matrix.grid, matrix.exact, matrix.importance, scale_init))


def _install(own: dict[str, Matrix], tensors: dict[str, QuantizedTensor]) -> None:
    for name, matrix in own.items():
        matrix.install(tensors[name].dequantize())
