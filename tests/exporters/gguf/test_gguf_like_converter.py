"""A file of the built-in route is what llama.cpp's own converter writes: metadata, tensors, and every value.

Both get the same weights: the run's, dequantized, are the model that the converter is given. And the converter's file,
as a template, leads to the same tensors as the built-in route.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from transformers import AutoTokenizer, PretrainedConfig

from benchmarks.llama_converter import ConversionFailed, Converter, OutType, why_unavailable
from exporters.gguf.container.reader import GgufFile, MetadataValue
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import export
from tests.exporters.gguf.family_table import FAMILIES, VARIANTS, Row
from tests.exporters.gguf.test_gguf_families import tokenizer_folder
from tests.support import dequantized_model

RunOf = Callable[..., RunDirectory]

# Entries of published configs that transformers no longer writes and the converter wants, by name of the row.
CONFIG_EDITS: dict[str, dict[str, object]] = {
    "gpt2": {"n_ctx": 256},
    # transformers 5 takes rotary_pct out of the config that it gives the converter, unless it does not know the model.
    "gpt_neox": {"rotary_pct": 0.25, "model_type": "pythia"},
    "bloom": {"seq_length": 2048},
    "falcon": {"num_kv_heads": 1},  # it does not know multi_query
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
_FALCON = {"*.context_length": "the converter writes 2048 whatever the config says"}
DIFFERENT: dict[str, dict[str, str]] = {
    "falcon": _FALCON,
    "falcon_new_decoder": _FALCON,
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
F16 = ("llama", "qwen3", "gpt2", "mixtral")
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
    """Every case in either type; quick ones are the families themselves in F32, and `F16`."""
    rare = {(name, dtype) for name in CASES for dtype in ("f32", "f16") if name in RARE or dtype == "f16"}
    rare -= {(name, "f16") for name in F16}
    cases = [(name, dtype) for name in CASES for dtype in ("f32", "f16")]
    return [pytest.param(*case, marks=pytest.mark.full if case in rare else ()) for case in cases]


@pytest.mark.parametrize(("name", "dtype"), params())
def test_a_built_in_file_is_the_converters(
    name: str, dtype: OutType, run_of: RunOf, request: pytest.FixtureRequest, tmp_path: Path, converter: Converter
) -> None:
    config, row = CASES[name]
    folder = tokenizer_folder(row.tokenizer, request, tmp_path / "tokenizer")
    if config.model_type == "glm4":
        add_glms_token(folder)
    run = run_of(config, "gguf:q8_0", tokenizer=folder)
    model = write_dequantized(run, tmp_path / "hf", CONFIG_EDITS.get(name, {}))
    ours = GgufFile.open(export(run, tmp_path / "ours.gguf", dtype=dtype))
    template = converter.convert(model, tmp_path / "theirs.gguf", dtype, pre=row.pre)
    theirs = GgufFile.open(template)
    found, allowed = differing_keys(ours, theirs), DIFFERENT.get(name, {})
    assert found <= {*allowed, *ALWAYS}
    assert set(allowed) <= found, "differences that are no more"
    assert shapes_and_types(ours) == shapes_and_types(theirs)
    assert [t for t in ours.tensors if not same_values(ours, theirs, t)] == []
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
        "*.rope.dimension_count": width or file.get(f"{file.architecture}.embedding_length") // heads,
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
    pairs = {(a, b) for a, b in zip(mine.value, other.value, strict=True) if a != b}
    return pairs <= {(int(TokenType.UNKNOWN), int(TokenType.CONTROL))}


def shapes_and_types(file: GgufFile) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (info.shape, info.ggml_type.name) for name, info in file.tensors.items()}


def same_values(ours: GgufFile, theirs: GgufFile, name: str) -> bool:
    mine, other = ours.raw(name), theirs.raw(name)
    if name == "rope_freqs.weight":  # ours is computed in 64 bits
        return np.allclose(mine.view(np.float32), other.view(np.float32), rtol=5e-7, atol=0)
    return np.array_equal(mine, other)


def test_a_tokenizer_that_the_converter_does_not_know_needs_a_name(
    run_of: RunOf, byte_level_folder: Path, tmp_path: Path, converter: Converter
) -> None:
    run = run_of(FAMILIES["qwen2"].config, tokenizer=byte_level_folder)
    with pytest.raises(ConversionFailed, match="pre-tokenizer was not recognized"):
        converter.convert(write_dequantized(run, tmp_path / "hf", {}), tmp_path / "a.gguf")
