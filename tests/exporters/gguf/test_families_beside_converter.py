"""What our file of a family holds beside what llama.cpp's own converter writes of the same model: keys and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.exporters.gguf.converter import Converter, why_unavailable
from transformers import AutoModelForImageTextToText, Qwen2VLConfig, Qwen3VLConfig

from exporters.gguf.container.reader import GgufFile
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, export
from tests.exporters.gguf.family_table import FAMILIES, VARIANTS
from tests.support import dequantized_model, make_run

RunOf = Callable[..., RunDirectory]

CONFIGS = {name: row.config for name, row in FAMILIES.items()} | VARIANTS

# Row or variant → keys and tensors that we write otherwise.
COMPARED: dict[str, tuple[str, ...]] = {
    "gemma4": (),
    "gemma4_e2b": (),
    "gemma4_moe": (),
    # The converter writes one number for each layer, and zeros for tokens that take the first row in transformers.
    "gemma3n": ("feed_forward_length", "per_layer_token_embd.weight"),
    "llama4": (),
    "glm4_moe": (),
    # The converter divides the width of dense layers by the heads of keys; in published models that is the same.
    "ernie4_5_moe": ("expert_shared_feed_forward_length",),
    "ministral3": (),
    "exaone4": (),
    "exaone4_of_64_layers": ("rope_freqs.weight",),  # ours are computed in 64 bits
    "seed_oss": (),
    # Configs that transformers 5 saves do not say how experts are scored (scoring_func), and which layers have some in
    # words that the converter does not know.
    "deepseek_v2": ("expert_gating_func",),
    "deepseek_v2_lite": ("expert_gating_func", "attention.q_lora_rank"),  # llama.cpp loads none without it
    "deepseek_v3": ("expert_gating_func",),
    "glm4_moe_lite": ("expert_gating_func", "leading_dense_block_count"),
    # The converter writes YaRN's defaults too.
    "gpt_oss": ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}

# Said of every architecture by us; by the converter of some, and llama.cpp's default is the same.
OURS = ("vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length")


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with Converter() as process:
        yield process


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in VARIANTS else name for name in COMPARED]
)
def test_a_file_holds_what_the_converters_does(
    name: str, converter: Converter, run_of: RunOf, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    kind = "sentencepiece_folder" if name.startswith("gemma") else "byte_level_folder"
    tokenizer: Path = request.getfixturevalue(kind)
    run = run_of(CONFIGS[name], tokenizer=tokenizer)
    folder = tmp_path / "dequantized"
    dequantized_model(run).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    options = ("--no-mtp",) if name.startswith("glm4_moe") else ()  # transformers leaves out what predicts more tokens
    theirs = GgufFile.open(converter.convert(folder, tmp_path / "theirs.gguf", options=options, pre="gpt-2"))
    ours = GgufFile.open(export(run, tmp_path / "ours.gguf", dtype="f32"))
    assert types_and_shapes(ours) == types_and_shapes(theirs)
    tensors = {tensor for tensor in theirs.tensors if not np.array_equal(ours.raw(tensor), theirs.raw(tensor))}
    assert differing_keys(ours, theirs) | tensors == set(COMPARED[name])


_SIZES = {key: value for key, value in BASE.items() if key not in ("hidden_size", "initializer_range")}
_TEXT = {**_SIZES, "hidden_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_VISION = {"depth": 1, "hidden_size": 128, "num_heads": 2, "intermediate_size": 64}
_VISION3 = {**_VISION, "out_hidden_size": 128, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
READ_IMAGES = {
    "qwen2vl": Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]}},
        vision_config={**_VISION, "embed_dim": 64},
    ),
    "qwen3vl": Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 32, "rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5]}},
        vision_config=_VISION3,
    ),
}


@pytest.mark.parametrize("arch", READ_IMAGES)
def test_of_a_model_that_reads_images_the_language_model_is_what_the_converter_makes_of_it(
    arch: str, converter: Converter, byte_level_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(READ_IMAGES[arch], dtype=torch.float32).save_pretrained(tmp_path / "whole")
    for file in byte_level_folder.iterdir():
        (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
    weights = ModelWeights.open(tmp_path / "whole")
    weights.load(weights.decoder.model, "", torch.device("cpu"))
    weights.decoder.model.save_pretrained(tmp_path / "text")
    run = make_run(tmp_path / "text", tmp_path / "run", "gguf:q4_0")
    theirs = GgufFile.open(converter.convert(tmp_path / "whole", tmp_path / "theirs.gguf", pre="gpt-2"))
    ours = GgufFile.open(export(run, tmp_path / "ours.gguf", dtype="f32"))
    assert ours.architecture == theirs.architecture == arch
    assert differing_keys(ours, theirs) == set()
    assert types_and_shapes(ours) == types_and_shapes(theirs)


def differing_keys(ours: GgufFile, theirs: GgufFile) -> set[str]:
    """Keys of the architecture whose values differ, without its name."""
    values = [
        {key.removeprefix(prefix): entry for key, entry in file.metadata.items() if key.startswith(prefix)}
        for file, prefix in ((file, f"{file.architecture}.") for file in (ours, theirs))
    ]
    named = set(values[0]) | set(values[1])
    both = set(values[0]) & set(values[1])
    return {key for key in named if (key in both or key not in OURS) and values[0].get(key) != values[1].get(key)}


def types_and_shapes(file: GgufFile) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.ggml_type.name, tensor.shape) for name, tensor in file.tensors.items()}
