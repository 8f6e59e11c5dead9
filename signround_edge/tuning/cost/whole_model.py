"""What the whole-model stage takes, counted from shapes and settings; what is left out here is as for a block.

With W weights in the blocks, F fp16 fields of theirs, T tokens of a step, V tokens in the vocabulary and H features:

    operations   4·(those of a token's forward pass)·T a step: forward twice, backward to weights and inputs
                 4·V·H·T a step and 2·V·H for every token once, f32: logits and their gradient
    weights      twice made of their codes, once stepped on: 2.4 times what the sign step of a block takes (measured)
    memory       4·W: a code, three bytes with its position, and the best codes so far
                 18·F: the field, its shift, slope and two moments
                 of one block its weights and their gradients, and f32 of one matrix while its codes move
                 4·H a token and block of a step; 4·(H + 2·K) a token of all: what enters, and the K most likely tokens
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from signround_edge.formats import get_grid
from signround_edge.manifest import OUTSIDE
from signround_edge.schemes.plan import Plan
from signround_edge.tuning.cost.memory import activation_bytes
from signround_edge.tuning.cost.work import BlockShape, Work
from signround_edge.tuning.settings import TuningSettings
from signround_edge.tuning.whole_model.divergence import KEPT_TOKENS
from signround_edge.tuning.whole_model.stage import TOKENS_AT_ONCE
from signround_edge.tuning.whole_model.tunables import BYTES_A_WEIGHT

_F32 = 4
_STEPS_A_STEP = 2.4  # of `Work.stepped`
_OF_A_FIELD = 2 + 4 * _F32
_MOVED = 4  # f32 values of a weight while its codes move
_LOGITS = 5  # tensors of [tokens, vocabulary]


@dataclass(frozen=True)
class WholeModelShape:
    """A model as the stage has it.

    Attributes:
        blocks: its decoder blocks.
        tables: values of the embedding, the head, and what else is outside the blocks.
        vocabulary, hidden: rows and columns of the head.
    """

    blocks: Sequence[BlockShape]
    tables: int
    vocabulary: int
    hidden: int

    @classmethod
    def of(cls, plan: Plan, blocks: Sequence[BlockShape]) -> WholeModelShape:
        """From what each tensor becomes."""
        outside = {entry.name: entry for entry in plan.of_part(OUTSIDE)}
        rows, cols = outside[plan.head].out_in_shape
        return cls(blocks, sum(math.prod(entry.shape) for entry in outside.values()), rows, cols)

    @property
    def weights(self) -> int:
        """How many are tuned."""
        return sum(block.weights for block in self.blocks)

    @property
    def fields(self) -> float:
        """fp16 fields of all matrices."""
        return sum(m.weights * _fields_a_weight(m.grid) for block in self.blocks for m in block.matrices)


@dataclass(frozen=True)
class WholeModelMemory:
    """Bytes.

    Attributes:
        codes: codes and positions of this process; on a GPU where they fit, else on the host.
        samples: of all samples, on the host.
        rest: where it is computed.
    """

    codes: float = 0.0
    samples: float = 0.0
    rest: float = 0.0


def whole_model_work(shape: WholeModelShape, settings: TuningSettings, samples: int, sharers: int = 1) -> Work:
    """What is to be computed by one of the processes that share the stage.

    Args:
        samples: of this process.
    """
    steps, seqlen = settings.whole_model_steps, settings.seqlen
    if not steps:
        return Work()
    step = min(settings.whole_model_batch_size / sharers, samples) * seqlen
    tokens, held_out = samples * seqlen, samples * seqlen * settings.held_out * (1 + settings.checks)
    a_pass = sum(block.flops_of_a_token(seqlen) for block in shape.blocks)
    logits = 2 * shape.vocabulary * shape.hidden
    work = Work(a_pass * (4 * step * steps + held_out), logits * (2 * step * steps + held_out + tokens), Counter())
    for block in shape.blocks:
        for m in block.matrices:
            work.stepped[m.grid] += round(_STEPS_A_STEP * m.weights * steps / sharers)
    return work


def whole_model_memory(
    shape: WholeModelShape, settings: TuningSettings, samples: int, width: int, sharers: int = 1
) -> WholeModelMemory:
    """What is in memory on one of the processes that share the stage, besides the hidden states that blocks had;
    nothing without such steps.

    Args:
        samples: of this process.
        width: bytes of a value in the dtype of the products.
    """
    if not settings.whole_model_steps:
        return WholeModelMemory()
    seqlen, batch = settings.seqlen, min(math.ceil(settings.whole_model_batch_size / sharers), samples)
    codes = (BYTES_A_WEIGHT + 1) * shape.weights / sharers
    most_likely = 2 * _F32 * min(KEPT_TOKENS, shape.vocabulary)
    of_samples = samples * seqlen * (_F32 * shape.hidden + most_likely)
    block = max(
        2 * width * b.weights
        + batch * activation_bytes(b, seqlen, width)
        + _MOVED * _F32 * max((m.weights for m in b.matrices), default=0)
        for b in shape.blocks
    )
    passing = _F32 * batch * seqlen * sum(b.hidden for b in shape.blocks)
    logits = _LOGITS * _F32 * min(TOKENS_AT_ONCE, batch * seqlen) * shape.vocabulary
    rest = _OF_A_FIELD * shape.fields / sharers + _F32 * shape.tables + passing + max(block, logits)
    return WholeModelMemory(codes, of_samples, rest)


@functools.cache
def _fields_a_weight(grid_name: str) -> float:
    """fp16 values that a format stores for each weight."""
    grid = get_grid(grid_name)
    weight = torch.zeros(1, grid.row_multiple)
    fields = grid.store(grid.search(grid.blocked(weight), torch.ones(1, 1, grid.block_size)))
    return sum(field.numel() for field in fields.values() if field.dtype == torch.float16) / weight.numel()
