"""How much there is to compute in a decoder block, from shapes and settings alone.

With P the weights that a token meets, T all tokens and B·S those of a step, a block costs

    2·P·T floating-point operations a pass of all samples: the exact model, the quantized one, and the start's,
    6·P·B·S a step: forward, and backward to weights and inputs,
    T·K² for the hessian of an input of K features (one triangle),
    R·K² + K³/3 for GPTQ's codes of a matrix [R, K], for each damping,

4·A·S/2 more a token and pass for attention of width A, and some work a weight that is no matrix product: the search of
scales, the sign step, the rounding of GPTQ's columns.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from signround_edge.model.decoder import Decoder
from signround_edge.model.experts import split_expert, stacks
from signround_edge.schemes.plan import Plan
from signround_edge.schemes.roles import is_attention_output, writes_to_stream
from signround_edge.tuning.block.gptq import DAMPING
from signround_edge.tuning.settings import TuningSettings

# How configs call the number of experts that a token is given to.
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True)
class MatrixShape:
    """A matrix that is tuned.

    Attributes:
        rows, cols: [out, in].
        grid: name of its grid.
        share: of the tokens, that come to it: less than 1 for an expert.
        source: matrices of the same one have the same input.
        corrected: whether it takes back drift.
    """

    rows: int
    cols: int
    grid: str
    share: float = 1.0
    source: str = ""
    corrected: bool = False

    @property
    def weights(self) -> int:
        """How many."""
        return self.rows * self.cols


@dataclass(frozen=True)
class BlockShape:
    """A decoder block.

    Attributes:
        matrices: those that are tuned.
        hidden: features of what enters it; of several streams all of them.
        heads, attention: heads, and features of all of them together; 0 where there is no attention.
    """

    matrices: tuple[MatrixShape, ...]
    hidden: int
    heads: int
    attention: int

    @property
    def weights(self) -> int:
        """How many are tuned."""
        return sum(m.weights for m in self.matrices)

    def flops_of_a_token(self, seqlen: int) -> float:
        """Of one forward pass."""
        return sum(2 * m.weights * m.share for m in self.matrices) + 2 * self.attention * seqlen

    def inputs(self) -> dict[str, tuple[int, float]]:
        """The distinct inputs of matrices: features, and share of the tokens."""
        return {m.source: (m.cols, m.share) for m in self.matrices}


@dataclass(frozen=True)
class Work:
    """What is to be computed.

    Attributes:
        flops: of matrix products, in the dtype of tuning.
        flops_f32: of those that are always f32.
        searched, stepped, compensated: grid → weights whose scales are searched, that take a step (each of them), and
            that GPTQ rounds (with each damping).
        bus_bytes: of hidden states from the host's memory to a GPU, where they are there.
    """

    flops: float = 0.0
    flops_f32: float = 0.0
    searched: Counter[str] = field(default_factory=Counter)
    stepped: Counter[str] = field(default_factory=Counter)
    compensated: Counter[str] = field(default_factory=Counter)
    bus_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


def block_shapes(plan: Plan, decoder: Decoder) -> list[BlockShape]:
    """The blocks of a model, of which no data is needed."""
    config: Any = decoder.model.config
    entries = {entry.name: entry for entry in plan.tensors}
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    chosen = next((int(k) for name in _CHOSEN if isinstance(k := getattr(config, name, None), int)), 1)
    streams = int(getattr(config, "altup_num_inputs", 1) or 1)
    found = []
    for index in range(len(decoder.blocks)):
        names = [name for name in decoder.matrices(index) if entries[name].format is not None]
        shares = {
            name: min(1.0, chosen / len(several))
            for several in stacks(names).values()
            for name in several
            if split_expert(name)[1] is not None
        }
        matrices = []
        for name in names:
            rows, cols = entries[name].out_in_shape
            corrected = writes_to_stream(name, str(config.model_type))
            source = f"{name.rpartition('.')[0].rpartition('.')[0]} {cols} {corrected}"
            matrices.append(
                MatrixShape(rows, cols, str(entries[name].format), shares.get(name, 1.0), source, corrected)
            )
        # The output projection reads all heads; layers may differ, or have none.
        width = next((entries[n].out_in_shape[1] for n in names if is_attention_output(n, str(config.model_type))), 0)
        found.append(BlockShape(tuple(matrices), config.hidden_size * streams, heads if width else 0, width))
    return found


def hidden_width(settings: TuningSettings) -> int:
    """Bytes of a value of the hidden states that are kept; "auto" counts as f32."""
    return 2 if settings.hidden_dtype == "bfloat16" else 4


def block_work(block: BlockShape, settings: TuningSettings, samples: int) -> tuple[Work, Work]:
    """What is done before the steps (passes of all samples, the start), and the steps themselves."""
    seqlen = settings.seqlen
    tokens, held_out = samples * seqlen, samples * seqlen * settings.held_out
    step = min(settings.batch_size, samples) * seqlen
    a_pass, state = block.flops_of_a_token(seqlen), hidden_width(settings) * block.hidden
    before = Work(2 * a_pass * tokens, bus_bytes=3 * state * tokens)
    before += Work(a_pass * held_out, bus_bytes=2 * state * held_out)
    for m in block.matrices:
        before.searched[m.grid] += m.weights
    if not settings.steps:
        return before, Work()
    if settings.start == "gptq":
        corrected = [m for m in block.matrices if m.corrected and settings.correct_drift]
        passes = max(1, len({m.source for m in corrected}))
        hessians = sum(tokens * share * cols**2 for cols, share in block.inputs().values())
        factors = sum(m.rows * m.cols**2 + m.cols**3 / 3 for m in block.matrices) * len(DAMPING)
        looks = passes + 1 + len(DAMPING)
        before += Work(a_pass * (passes * tokens + looks * held_out), hessians + factors)
        before += Work(bus_bytes=2 * state * (passes * tokens + looks * held_out))
        for m in block.matrices:
            before.compensated[m.grid] += len(DAMPING) * m.weights
        for m in corrected:
            before.searched[m.grid] += m.weights
    steps = Work(
        a_pass * (3 * step * settings.steps + held_out * settings.checks),
        bus_bytes=2 * state * (step * settings.steps + held_out * settings.checks),
    )
    for m in block.matrices:
        # An expert that no sample of a step comes to takes none.
        steps.stepped[m.grid] += round(m.weights * settings.steps * min(1.0, m.share * step))
    return before, steps
