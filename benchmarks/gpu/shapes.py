"""Decoder blocks by their shape, and how many floating-point operations a tuning step of one takes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

# Rows of embedding and head where a model is one block: it costs next to nothing outside it.
VOCABULARY = 1024


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder block.

    Attributes:
        family: "llama" or "qwen3" (which norms queries and keys).
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int = 128

    def config(self) -> PretrainedConfig:
        """Of a model with one such block."""
        kind = Qwen3Config if self.family == "qwen3" else LlamaConfig
        return kind(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=1,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            architectures=["Qwen3ForCausalLM" if self.family == "qwen3" else "LlamaForCausalLM"],
            dtype="bfloat16",
        )

    def products(self) -> list[tuple[int, int, int]]:
        """(rows, columns, how many) of the matrices of one shape, those of the block's input first."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return [
            (queries, self.hidden, 1),
            (keys, self.hidden, 2),
            (self.hidden, queries, 1),
            (self.intermediate, self.hidden, 2),
            (self.hidden, self.intermediate, 1),
        ]

    def weights(self) -> int:
        """Of all matrices."""
        return sum(rows * cols * count for rows, cols, count in self.products())

    def step_flops(self, samples: int, seqlen: int) -> int:
        """Of the forward and the backward pass, a multiplication and an addition being two.

        A matrix of R × K takes 2·R·K a token forward, as much for ∂L/∂ŵ, and as much for ∂L/∂x but where x is the
        block's input (q, k, v). Attention takes 4·seqlen·(heads · head size) a token forward, the half above the
        diagonal counted as torch's flop counter does, and twice that backward (without what kernels compute again).
        """
        forward = sum(2 * rows * cols * count for rows, cols, count in self.products())
        of_input = sum(2 * rows * cols * count for rows, cols, count in self.products()[:2])
        attention = 4 * seqlen * self.heads * self.head_size
        return samples * seqlen * (3 * forward - of_input + 3 * attention)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Qwen3-0.6B", "qwen3", 1024, 3072, 16, 8),
        Shape("Llama-3-8B", "llama", 4096, 14336, 32, 8),
        Shape("Llama-3-70B", "llama", 8192, 28672, 64, 8),
    )
}

# What stands for each on one CPU core; the rows of one hold a super-block.
TINY_SHAPES = {
    "Qwen3-0.6B": Shape("tiny Qwen3", "qwen3", 64, 128, 2, 1, 32),
    "Llama-3-8B": Shape("tiny Llama", "llama", 256, 256, 4, 2, 64),
    "Llama-3-70B": Shape("tiny Llama, smaller", "llama", 64, 128, 4, 1, 16),
}
