"""Correction of drift: the errors that a block inherits from the quantized blocks before it.

A block's output is h + a + f: what came in, and what attention and feed-forward network add to it. In the quantized
model h has drifted, and rounding this block's own weights better does not bring it back. But the matrices that write
into this residual stream can take a part of the drift back, as far as it can be told from their inputs x:

    ΔW = argmin Σ_t ω_t·‖e_t − ΔW·x_t‖² + λ·‖ΔW‖²    =    (Σ ω·e·xᵀ)·(Σ ω·x·xᵀ + λ·I)⁻¹

over the training tokens t of weight ω, with e the exact output of the block less its output in the quantized model.
W + ΔW is then what is rounded. The attention's output projection comes first, the down projection sees what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from signround_edge.tuning.block.ldl import factored
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.calibration.input_moments import Hessians

# λ as a share of the mean diagonal of Σ ω·x·xᵀ. See docs/LOG.md.
_RIDGE = 1.0


@dataclass(frozen=True)
class Corrected:
    """A unit whose matrices have taken back what they can of its drift; dictionaries are by matrix name.

    Attributes:
        weights: f32 [out, in] in the place of the exact ones, where those lower the loss.
        hessians: Σ ω·x·xᵀ f32 [in, in] of what the training samples give each matrix among these weights; experts
            that see no token have none.
        loss: the unit's with these weights.
    """

    weights: dict[str, Tensor]
    hessians: dict[str, Tensor]
    loss: float


def correct_drift(
    unit: Unit, batch_size: int, autocast: torch.autocast, loss: Callable[[], float], correct: bool = True
) -> Corrected:
    """Correct one matrix after another; the unit's modules hold the exact weights before and the found ones after.

    A matrix has no influence on what those called before it are given, so each pass over the training samples also
    sums up the inputs of the matrices up to the one that it corrects.

    Args:
        autocast: context of the forward passes.
        loss: the unit's loss on the held-out samples for the weights that are in it.
        correct: whether to change anything; without it only `hessians` and `loss` are found.
    """
    waiting = _in_order_of_calls(unit, autocast)
    weights, hessians, best = dict[str, Tensor](), dict[str, Tensor](), loss()
    for writer in [m for m in waiting if m.writes_to_stream and correct]:
        until = waiting.index(writer) + 1
        found, errors = _sums(unit, waiting[:until], batch_size, autocast)
        waiting, hessians = waiting[until:], hessians | found
        change = _ridge(found[writer.name], errors)
        if change is None:
            continue
        corrected = writer.exact + change
        writer.install(corrected)
        if (now := loss()) < best:
            weights[writer.name], best = corrected, now
        else:
            writer.install(writer.exact)
    if waiting:
        hessians |= _sums(unit, waiting, batch_size, autocast)[0]
    return Corrected(weights, hessians, best)


def _in_order_of_calls(unit: Unit, autocast: torch.autocast) -> list[Matrix]:
    """The matrices as a sample passes them; those that this one does not come to, as an expert may be, at the end."""
    called: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.setdefault(name)

    hooks = [m.module.register_forward_pre_hook(note(m.name)) for m in unit.matrices]
    try:
        with torch.no_grad(), autocast:
            unit.forward(unit.train[:1])
    finally:
        for hook in hooks:
            hook.remove()
    order = unit.ranks.of_first(list(called))  # experts come in another order to other samples
    return sorted(unit.matrices, key=lambda m: order.index(m.name) if m.name in order else len(order))


def _sums(
    unit: Unit, matrices: list[Matrix], batch_size: int, autocast: torch.autocast
) -> tuple[dict[str, Tensor], Tensor]:
    """Over all training samples: Σ ω·x·xᵀ of the inputs of matrices, and Σ ω·e·xᵀ f32 [out, in] of the last of them."""
    last = matrices[-1]
    hessians, errors = Hessians(unit.token_weights), torch.zeros_like(last.weight, dtype=torch.float32)
    with hessians.watching(unit.module, {m.name: m.module for m in matrices}):
        for index in unit.train.split(batch_size):
            with torch.no_grad(), autocast:
                output = unit.forward(index).float()
            target = unit.target(index)
            weights = unit.token_weights(target)
            if last.writes_to_stream and target.ndim == 3:  # of several streams it feeds them all, by weights
                inputs = hessians.waiting(last.name).flatten(0, -2).float()
                errors.addmm_((target - output).mul_(weights).flatten(0, -2).T, inputs)
            hessians.settle(weights)
    hessians.sum_over(unit.ranks, last.weight.device)
    return hessians.result(), unit.ranks.sum(errors)


def _ridge(hessian: Tensor, errors: Tensor) -> Tensor | None:
    """ΔW f32 [out, in], or None where the inputs are all zero or not finite."""
    damped = hessian.clone()
    damped.diagonal().add_(_RIDGE * damped.diagonal().mean())  # by which f32 is enough
    lower = factored(damped)
    return None if lower is None else torch.cholesky_solve(errors.T, lower).T.contiguous()
