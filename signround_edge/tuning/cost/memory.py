"""How much memory a run takes, counted from shapes and settings, in bytes a weight where nothing else is said.

    loading            4 (f32, in the modules) + what the checkpoint has (2 in 16 bits)
    the start          loading, 4·K² an input for its hessian, 4 a corrected weight, 4 a candidate for positions, and
                       of one matrix at a time 8·K² for the factor of its hessian, and 8
    a step             what the checkpoint has + 4 (positions, V) + 3 (codes: nearest, best, candidate)
                       + weight and gradient in the dtype of the products, the gradient of all matrices at once on a GPU
    activations        inputs and outputs of all matrices, of the samples that go through a step together, and
                       probabilities of attention

Beside it, for all samples, hidden states of the exact and of the quantized model: 4 bytes a value each, or 2 in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from signround_edge.tuning.cost.work import BlockShape, hidden_width
from signround_edge.tuning.settings import TuningSettings

_STORED, _F32 = 2, 4
_CODES = 3  # nearest, best, and a candidate's
_STATE = 4
_CANDIDATES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        block: of the block that is tuned, with its activations, at the worst moment.
        hidden: hidden states of all samples.
        outside: of embedding or head while they are rounded, before and after the blocks.
        codes: of the embedding meanwhile.
        whole_model: of the whole-model stage, after the blocks.
    """

    block: float
    hidden: float
    outside: float = 0.0
    codes: float = 0.0
    whole_model: float = 0.0

    @property
    def peak(self) -> float:
        """At the worst moment."""
        return self.hidden + max(self.codes + max(self.block, self.outside), self.whole_model)


def outside_bytes(sizes: Sequence[int], tables: Sequence[int], per_token: bool) -> tuple[float, float]:
    """(`Memory.outside`, `Memory.codes`): f32 before and after rounding, and codes.

    Args:
        sizes: values of each matrix outside the blocks.
        tables: of those that are looked up by token.
        per_token: whether they are needed while blocks are tuned, in f32.
    """
    return 2 * _F32 * max(sizes, default=0), sum(tables) * (1 + (_F32 if per_token else 0))


def hidden_bytes(block: BlockShape, settings: TuningSettings, samples: int) -> int:
    """Of the exact and the quantized model's hidden states."""
    return 2 * hidden_width(settings) * samples * settings.seqlen * block.hidden


def pinned_bytes(hidden: int) -> int:
    """`hidden_bytes` in pinned memory, where torch's allocator rounds each of the two models' up to a power of two."""
    return 2 * (1 << (hidden // 2 - 1).bit_length())


def block_bytes(block: BlockShape, settings: TuningSettings, samples: int, width: int, on_gpu: bool) -> float:
    """Of one block while it is tuned.

    Args:
        width: bytes of a value in the dtype of the products.
        on_gpu: whether a step's gradients all exist at once.
    """
    weights = block.weights
    loading = weights * (_STORED + _F32)
    if not settings.steps:
        return loading + weights
    batch = min(settings.batch_size, samples)
    passing = activation_bytes(block, settings.seqlen, width) * batch
    start = float(loading)
    if settings.start == "gptq":
        hessians = sum(_F32 * cols**2 for cols, _ in block.inputs().values())
        writers = [m for m in block.matrices if m.corrected and settings.correct_drift]
        solving = max((_F32 * (m.cols**2 + 2 * m.weights) for m in writers), default=0)
        start += sum(_F32 * m.weights for m in writers) + hessians + max(solving, passing / 2)  # no backward pass
        codes = weights * _STORED + _while_compensated(block, settings)
        start = max(start, codes, weights * (_STORED + _CODES + _CANDIDATES * _STATE + width))
    largest = max((m.weights for m in block.matrices), default=0)
    parts = settings.step_parts
    gradients = weights if on_gpu or parts > 1 else largest
    step = weights * (_STORED + _STATE + _CODES + width) + gradients * width + passing / parts
    return max(loading, start, step)


def _while_compensated(block: BlockShape, settings: TuningSettings) -> float:
    """Beside the weights, while GPTQ goes from matrix to matrix: what is found of those before, what those to come
    wait with, and of its own a factor and its transposed copy, the weight and its errors."""
    peak, done = 0.0, 0
    for number, matrix in enumerate(block.matrices):
        waiting = block.matrices[number:]
        hessians = sum(_F32 * cols**2 for cols in {m.source: m.cols for m in waiting}.values())
        corrected = sum(_F32 * m.weights for m in waiting if m.corrected and settings.correct_drift)
        own = 2 * _F32 * (matrix.cols**2 + matrix.weights)
        peak = max(peak, done * (1 + _CANDIDATES * _STATE) + hessians + corrected + own)
        done += matrix.weights
    return peak


def activation_bytes(block: BlockShape, seqlen: int, width: int) -> float:
    """Bytes of a sample that a forward pass keeps for the backward one."""
    inputs = sum(cols * share for cols, share in block.inputs().values())
    outputs = sum(m.rows * m.share for m in block.matrices)
    # Between matrices a gate, an activation, a norm and a rotation keep about half as much again.
    values = 1.5 * (inputs + outputs) * width + 3 * block.hidden * _F32
    return seqlen * (values + block.heads * seqlen / 2 * width)


def largest_block(
    blocks: Sequence[BlockShape], settings: TuningSettings, samples: int, width: int, on_gpu: bool
) -> float:
    """Of the block that takes most."""
    return max((block_bytes(block, settings, samples, width, on_gpu) for block in blocks), default=0.0)
