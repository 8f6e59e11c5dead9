"""A file of the built-in route is what llama.cpp's own converter writes: metadata, tensors, and every value.

Both get the same weights: the run's, dequantized, are the model that the converter is given. And the converter's file,
as a template, leads to the same tensors as the built-in route.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import TokenType
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from benchmarks.llama_converter import ConversionFailed, Converter, OutType, why_unavailable
from exporters.gguf.container.reader import GgufFile, MetadataValue
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, export
from tests.exporters.gguf.family_table import FAMILIES, VARIANTS, Row
from tests.exporters.gguf.test_gguf_families import tokenizer_folder
from tests.support import dequantized_model, make_run

RunOf = Callable[..., RunDirectory]

# Entries of published configs that transformers no longer writes and the converter wants, by name of the row.
CONFIG_EDITS: dict[str, dict[str, object]] = {
    "gpt2": {"n_ctx": 256},
    # transformers 5 takes rotary_pct out of the config that it gives the converter, unless it does not know the model.
    "gpt_neox": {"rotary_pct": 0.25, "model_type": "pythia"},
    "bloom": {"seq_length": 2048},
    "falcon": {"num_kv_heads": 1},  # it does not know multi_query
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},  # as they were called before transformers 5
}
# Layers that predict more than one token, which transformers leaves out.
WITHOUT_MORE_TOKENS = ("glm4_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe")
# Rows for which the converter is no reference, with the reason.
UNFIT = {
    "nemotron_h": "under transformers 5 the converter takes every Nemotron-H for one with experts",
    "bamba": "the converter orders q and k for rotation of a whole head, the model rotates half of it",
}
# Tensors whose values differ, by name of the row.
OTHER_VALUES = {
    # A token that has no row of its own takes the first in transformers, and zeros in the converter's file.
    "gemma3n": ["per_layer_token_embd.weight"],
}

# Keys that may differ in every family, `*` for the architecture, each with the reason.
ALWAYS = {
    "general.name": "the converter makes a title of the folder's name",
    "general.size_label": "for lists of models on Hugging Face; the converter counts parameters, llama.cpp never reads",
    "signround_edge.version": "where the weights come from",
    "signround_edge.scheme": "where the weights come from",
    "signround_edge.manifest_sha256": "where the weights come from",
    "tokenizer.ggml.add_bos_token": "what the tokenizer does; the converter leaves it out where its config is silent",
    "tokenizer.ggml.add_eos_token": "what the tokenizer does; the converter leaves it out where its config is silent",
}
# What else differs, by name of the row.
_END = "config.json ends texts at a token more than the tokenizer says: llama.cpp is told of it"
_SEPARATOR = "the converter writes llama.cpp's own assumption, that texts end without a separator"
_GEMMA = {"tokenizer.ggml.eot_token_id": _END, "tokenizer.ggml.add_sep_token": _SEPARATOR}
_SCORES = {"*.expert_gating_func": "transformers 5 saves no scoring_func; without the key llama.cpp takes softmax"}
_INTERVAL = {"*.full_attention_interval": "the converter writes 4 where config.json does not say it"}
_FALCON = {"*.context_length": "the converter writes 2048 whatever the config says"}
DIFFERENT: dict[str, dict[str, str]] = {
    "falcon": _FALCON,
    "falcon_new_decoder": _FALCON,
    "gemma3n": {
        **_GEMMA,
        "*.feed_forward_length": "the converter writes the number of all layers for each",
    },
    "gpt_oss": dict.fromkeys(
        ("*.rope.scaling.yarn_beta_fast", "*.rope.scaling.yarn_beta_slow"), "llama.cpp's own assumption, written out"
    ),
    "deepseek_v2": _SCORES,
    "deepseek_v3": _SCORES,
    "glm4_moe_lite": {
        **_SCORES,
        "*.leading_dense_block_count": "the converter does not know transformers 5's mlp_layer_types",
    },
    "ernie4_5_moe": {
        "*.expert_shared_feed_forward_length": "the converter divides the dense layers' width by the heads of keys",
    },
    "gemma4": {
        **_GEMMA,
        **dict.fromkeys(
            ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"),
            "ours has a token for each row of the embedding",
        ),
    },
    "mamba2": dict.fromkeys(
        ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"), "the converter fills up to a multiple of 16 tokens"
    ),
    "qwen3_next": _INTERVAL,
    "qwen3_5": _INTERVAL,
    "qwen3_5_moe": _INTERVAL,
    "nemotron_h_moe": {"*.rope.dimension_count": "the model has no rotation"},
    "hunyuan_v1_dense": {"tokenizer.ggml.eos_token_id": "the converter takes config.json's, ours the tokenizer's"},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gpt_neox": {"general.file_type": "the converter forgets it for this family"},
    "glm4": {
        "tokenizer.ggml.eot_token_id": "the converter writes <|user|>; ours is where the model's own files end a text",
    },
    "nemotron": {
        "*.attention.layer_norm_rms_epsilon": "llama.cpp's nemotron has no RMSNorm and never reads it",
        "tokenizer.ggml.padding_token_id": "the converter writes 0, whatever the tokenizer says",
        "tokenizer.ggml.unknown_token_id": "the converter writes 1, whatever the tokenizer says",
    },
    "olmo3_without_windows": dict.fromkeys(
        ("*.attention.sliding_window", "*.attention.sliding_window_pattern", "*.rope.freq_base_swa"),
        "llama.cpp aborts at the file of the converter: it has windows, and no layer with one",
    ),
    "qwen2_yarn_attention": {
        "*.rope.scaling.attn_factor": "llama.cpp reads this one for all graphs, as a factor on top of its own",
        "*.rope.scaling.yarn_attn_factor": "llama.cpp does not read it for this graph",
    },
}
# Some matrices stay in F32 in an F16 file: norms of each head, positions, routers. Other rows are in the full tests.
F16 = ("gpt2",)
# Families that are always compared: each way of storing, and the newest; the others are in the full tests.
COMPARED = ("llama", "mixtral", "gpt2", "falcon", "gemma4", "granitemoehybrid", "gpt_oss", "deepseek_v3", "qwen3_next")
RARE = ("llama_tied_with_biases", "llama3_rope", "qwen2_yarn", "qwen2_yarn_attention", "olmo3_without_windows")
CASES: dict[str, tuple[PretrainedConfig, Row]] = {name: (row.config, row) for name, row in FAMILIES.items()}
CASES |= {
    name: (VARIANTS[name], next(row for row in FAMILIES.values() if row.config.model_type == VARIANTS[name].model_type))
    for name in RARE
}


@pytest.fixture(autouse=True, scope="module")
def _converter_is_there() -> None:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    with Converter() as running:
        yield running


def params() -> list[Any]:
    """Every case in either type; quick ones are `COMPARED` in F32, and `F16`."""
    rare = {(name, dtype) for name in CASES for dtype in ("f32", "f16") if name not in COMPARED or dtype == "f16"}
    rare -= {(name, "f16") for name in F16}
    cases = [(name, dtype) for name in CASES for dtype in ("f32", "f16")]
    return [pytest.param(*case, marks=pytest.mark.full if case in rare else ()) for case in cases]


@pytest.mark.parametrize(("name", "dtype"), params())
def test_a_built_in_file_is_the_converters(
    name: str, dtype: OutType, run_of: RunOf, request: pytest.FixtureRequest, tmp_path: Path, converter: Converter
) -> None:
    config, row = CASES[name]
    if name in UNFIT:
        pytest.skip(UNFIT[name])
    folder = tokenizer_folder(row.tokenizer, request, tmp_path / "tokenizer")
    if config.model_type == "glm4":
        add_glms_token(folder)
    run = run_of(config, "gguf:q8_0", tokenizer=folder)
    model = write_dequantized(run, tmp_path / "hf", CONFIG_EDITS.get(name, {}))
    ours = GgufFile.open(export(run, tmp_path / "ours.gguf", dtype=dtype))
    options = ("--no-mtp",) if config.model_type.removesuffix("_text") in WITHOUT_MORE_TOKENS else ()
    template = converter.convert(model, tmp_path / "theirs.gguf", dtype, options, row.pre)
    theirs = GgufFile.open(template)
    found, allowed = differing_keys(ours, theirs), DIFFERENT.get(name, {})
    assert found <= {*allowed, *ALWAYS}
    assert set(allowed) <= found, "differences that are no more"
    assert shapes_and_types(ours) == shapes_and_types(theirs)
    assert [t for t in ours.tensors if not same_values(ours, theirs, t)] == OTHER_VALUES.get(name, [])
    # As a template, it gives the integers the places that the built-in route gives them.
    direct = GgufFile.open(export(run, tmp_path / "direct.gguf"))
    through = GgufFile.open(export(run, tmp_path / "through.gguf", template=template))
    assert shapes_and_types(direct) == shapes_and_types(through)
    assert [t for t in direct.tensors if not same_values(direct, through, t)] == []


def add_glms_token(folder: Path) -> None:
    """The converter asks for a token that GLM-4 has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(folder)


def write_dequantized(run: RunDirectory, out: Path, edits: dict[str, object]) -> Path:
    """The run's weights as a model in Hugging Face layout, as published ones are."""
    dequantized_model(run).save_pretrained(out)
    for file in run.config_dir.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, out)
    edit(out / "config.json", edits)
    added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    # transformers 5 no longer writes these, and the converter reads no other file for SentencePiece's tokens.
    edit(out / "tokenizer_config.json", {"added_tokens_decoder": {str(t["id"]): t for t in added}})
    return out


def edit(file: Path, entries: dict[str, object]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def differing_keys(ours: GgufFile, theirs: GgufFile) -> set[str]:
    """Keys that only one file has, or that differ in value or type; those with llama.cpp's own assumption are equal."""
    assumed, found = assumptions(ours), set()
    for key in {*ours.metadata, *theirs.metadata}:
        pattern = key.replace(f"{ours.architecture}.", "*.", 1)
        mine, other = ours.metadata.get(key), theirs.metadata.get(key)
        if mine is not None and other is None and pattern in assumed and mine.value == assumed[pattern]:
            continue
        if mine != other and not (key == "tokenizer.ggml.token_type" and same_types(mine, other)):
            found.add(pattern)
    return found


def assumptions(file: GgufFile) -> dict[str, Any]:
    """What llama.cpp assumes where the converter leaves a key out, and ours says it aloud."""
    heads = file.get(f"{file.architecture}.attention.head_count")
    width = file.get(f"{file.architecture}.attention.key_length")
    return {
        "*.vocab_size": len(file.get("tokenizer.ggml.tokens")),
        "*.rope.dimension_count": width or (heads and file.get(f"{file.architecture}.embedding_length") // heads),
        "*.rope.freq_base": 10000.0,
        "*.attention.head_count_kv": heads,
        "*.attention.sliding_window_pattern": {"gemma2": 2, "gemma3": 6}.get(file.architecture),
        "tokenizer.ggml.add_space_prefix": True,
    }


def same_types(mine: MetadataValue | None, other: MetadataValue | None) -> bool:
    """Types of tokens; the unknown token is SentencePiece's in ours, a control token to the converter (its tokenizer
    says special): to llama.cpp both are tokens that a text cannot hold."""
    assert mine is not None
    assert other is not None
    pairs = {(a, b) for a, b in zip_longest(mine.value, other.value) if a != b}
    return pairs <= {(int(TokenType.UNKNOWN), int(TokenType.CONTROL))}


def shapes_and_types(file: GgufFile) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (info.shape, info.ggml_type.name) for name, info in file.tensors.items()}


def same_values(ours: GgufFile, theirs: GgufFile, name: str) -> bool:
    mine, other = ours.raw(name), theirs.raw(name)
    if name == "rope_freqs.weight":  # ours is computed in 64 bits
        return np.allclose(mine.view(np.float32), other.view(np.float32), rtol=5e-7, atol=0)
    return np.array_equal(mine, other)


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
        shutil.copy(file, tmp_path / "whole")
    weights = ModelWeights.open(tmp_path / "whole")
    weights.load(weights.decoder.model, "", torch.device("cpu"))
    weights.decoder.model.save_pretrained(tmp_path / "text")
    for file in byte_level_folder.iterdir():
        shutil.copy(file, tmp_path / "text")
    run = make_run(tmp_path / "text", tmp_path / "run", "gguf:q4_0")
    theirs = GgufFile.open(converter.convert(tmp_path / "whole", tmp_path / "theirs.gguf", pre="gpt-2"))
    ours = GgufFile.open(export(run, tmp_path / "ours.gguf", dtype="f32"))
    assert ours.architecture == theirs.architecture == arch
    assert {key for key in differing_keys(ours, theirs) if key.startswith("*.")} == set()
    assert shapes_and_types(ours) == shapes_and_types(theirs)


def test_a_tokenizer_that_the_converter_does_not_know_needs_a_name(
    run_of: RunOf, byte_level_folder: Path, tmp_path: Path, converter: Converter
) -> None:
    run = run_of(FAMILIES["qwen2"].config, tokenizer=byte_level_folder)
    with pytest.raises(ConversionFailed, match="pre-tokenizer was not recognized"):
        converter.convert(write_dequantized(run, tmp_path / "hf", {}), tmp_path / "a.gguf")
