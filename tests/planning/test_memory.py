"""What `plan` counts besides the file is what llama.cpp says that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from signround_edge import api
from signround_edge.evaluation.cache_types import CacheTypes
from signround_edge.model.cache_shape import cache_shape
from signround_edge.planning.memory import needs_of
from tests.support import TOKENS, make_run, save_random_model

SMALL = {
    "vocab_size": 3072, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
GEMMA = transformers.Gemma3TextConfig(
    **SMALL, **TOKENS, num_hidden_layers=6, head_dim=64, sliding_window=64, query_pre_attn_scalar=64,
    layer_types=[*["sliding_attention"] * 5, "full_attention"],
)  # fmt: skip
LFM2 = transformers.Lfm2Config(
    **SMALL, **TOKENS, num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"],
    block_auto_adjust_ff_dim=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "config", [None, GEMMA, LFM2], ids=["tiny-llama", "sliding windows", "convolutions beside attention"]
)
def test_memory_besides_the_file_is_what_llama_cpp_allocates(
    config: transformers.PretrainedConfig | None, tiny_llama: Path, tmp_path: Path
) -> None:
    model = tiny_llama if config is None else save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    file = api.export(make_run(model, tmp_path / "run", "gguf:q4_0"), "gguf", tmp_path / "model.gguf").path
    command = [sys.executable, "-m", "tests.planning.llama_cpp_memory", str(file)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shape = cache_shape(transformers.AutoConfig.from_pretrained(model))
    for what, (cache, buffers) in json.loads(told).items():
        kind, context = what.split()
        needs = needs_of(shape, "gguf", int(context), CacheTypes(kind, kind))
        # The log has two digits behind the point.
        assert needs.cache == pytest.approx(cache, abs=0.02 * 2**20), what
        # Masks of long contexts reuse other room where they are larger than a small model's logits.
        most = 1.1 if config is None else 1.25
        assert 0.9 * buffers <= needs.buffers <= most * buffers, what
