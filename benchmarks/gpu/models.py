"""Model folders for whole runs: of random weights, or the first blocks of tiny-llama; both with its tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from signround_edge.demo import tiny_llama_path

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Sizes:
    """Of a Llama with tied embedding; the defaults are SmolLM2-135M's."""

    hidden: int = 576
    intermediate: int = 1536
    blocks: int = 30
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152

    def config(self) -> PretrainedConfig:
        """As transformers has it."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )


def tiny_sizes(blocks: int) -> Sizes:
    """Of a model that a CPU core tunes in a second; the vocabulary is that of the tokenizer."""
    return Sizes(64, 128, blocks, 2, 1, 3072)


def write_random(folder: Path, config: PretrainedConfig) -> None:
    """A model with random bf16 weights; its tokens are the first 3,072 of the vocabulary."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copy(tiny_llama_path() / name, folder / name)


def write_tiny_llama(folder: Path, blocks: int) -> None:
    """The first blocks of tiny-llama, and what is outside its blocks."""
    shutil.copytree(tiny_llama_path(), folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = blocks
    config.save_pretrained(folder)

    def cut(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers." in name and int(name.split(".")[2]) >= blocks]:
            del tensors[name]

    change_weights(folder, cut)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a model's tensors, which are given by name, in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
