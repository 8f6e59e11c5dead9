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

import torch
from torch import Tensor

from signround_edge.tuning.unit import Matrix, Unit

# λ as a share of the mean diagonal of Σ ω·x·xᵀ. See docs/LOG.md.
_RIDGE = 1.0


def corrected_weights(
    unit: Unit, batch_size: int, autocast: torch.autocast, loss: Callable[[], float]
) -> tuple[dict[str, Tensor], float]:
    """Weights f32 [out, in] in the place of exact ones, by matrix name: those that lower the loss; and that loss.

    The unit's modules hold the exact weights before, and with these in them after.

    Args:
        autocast: context of the forward passes.
        loss: the unit's loss on the held-out samples for the weights that are in it.
    """
    found: dict[str, Tensor] = {}
    best = loss()
    for matrix in unit.matrices:
        if not matrix.writes_to_stream:
            continue
        change = _least_squares(unit, matrix, batch_size, autocast)
        if change is None:
            continue
        corrected = matrix.weight + change
        matrix.install(corrected)
        if (now := loss()) < best:
            found[matrix.name], best = corrected, now
        else:
            matrix.install(matrix.weight)
    return found, best


def _least_squares(unit: Unit, matrix: Matrix, batch_size: int, autocast: torch.autocast) -> Tensor | None:
    """ΔW f32 [out, in], or None where the inputs are all zero or not finite."""
    rows, cols = matrix.weight.shape
    products, cross = (torch.zeros(n, cols, device=matrix.weight.device) for n in (cols, rows))
    seen: list[Tensor] = []
    hook = matrix.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        for index in unit.train.split(batch_size):
            with torch.no_grad(), autocast:
                output = unit.forward(index).float()
            target = unit.target(index)
            roots = unit.token_weights(target).reshape(-1, 1).sqrt()
            inputs = seen.pop().reshape(-1, cols).float() * roots
            products.addmm_(inputs.T, inputs)
            cross.addmm_(((target - output).reshape(-1, rows) * roots).T, inputs)
    finally:
        hook.remove()
    damped = products.double()
    damped.diagonal().add_(_RIDGE * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed or not lower.isfinite().all():
        return None
    return torch.cholesky_solve(cross.double().T, lower).T.float().contiguous()
