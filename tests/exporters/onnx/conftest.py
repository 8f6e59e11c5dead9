"""Tiny random models with a tokenizer of their own, and their ONNX exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from exporters.onnx import OnnxExporter
from exporters.onnx.options import OnnxOptions
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import Scheme
from tests.support import make_run, save_random_model

VOCABULARY = 600

# Weights large enough for logits that spread (standard deviation about 1), so that a wrong graph shows in the KL.
BASE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Exported:
    run: RunDirectory
    folder: Path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in transformers' layout."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 10,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the people of the world have told the world of the people"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_random_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., RunDirectory]:
    """A run directory of a random model with that config and scheme."""
    transformers.utils.logging.disable_progress_bar()

    def make(config: PretrainedConfig, scheme: str | Scheme) -> RunDirectory:
        folder = tmp_path_factory.mktemp("run")
        save_random_model(config, folder / "model", tokenizer_folder)
        return make_run(folder / "model", folder / "run", scheme)

    return make


@pytest.fixture(scope="session")
def llama_run(make_random_run: Callable[..., RunDirectory]) -> RunDirectory:
    """A tied Llama with biases, decoder Q4_0, embedding and head Q6_K."""
    config = transformers.LlamaConfig(**BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    return make_random_run(config, "gguf:q4_0,onnx:w4g32")


@pytest.fixture(scope="session")
def llama_export(llama_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Its export; tests that change files copy it first."""
    return Exported(llama_run, export(llama_run, tmp_path_factory.mktemp("export") / "out"))


def export(run: RunDirectory, out: Path, log: Callable[[str], None] = lambda line: None, **options: object) -> Path:
    return OnnxExporter().export(run, out, OnnxOptions(log=log, **options))  # type: ignore[arg-type]
