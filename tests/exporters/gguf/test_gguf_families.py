"""Files of the built-in families load in llama.cpp and compute what transformers computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, MistralConfig, Phi3Config, PretrainedConfig, Qwen3Config

from exporters.gguf import GgufExporter, families
from exporters.gguf.families import table
from exporters.gguf.families.family import sliding_window
from exporters.gguf.families.row_orders import grouped_rows, interleaved_rows
from exporters.gguf.families.table import canonical_config
from exporters.gguf.reader import iter_expected, name_map, read_metadata, read_tensors
from exporters.gguf.tokenizer import pretokenizer
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge import __version__
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import ScoreKeeper
from signround_edge.files import sha256_of
from signround_edge.model.experts import stacks
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, export, gpt2_split, train_byte_level
from tests.exporters.gguf.family_settings import VOCAB
from tests.exporters.gguf.family_table import FAMILIES, LONG_PHI3, REFUSED, VARIANTS
from tests.exporters.gguf.test_gguf_tokenizers import TEXTS, assert_same_tokens, split
from tests.support import dequantized_model

RunOf = Callable[..., RunDirectory]

CONFIGS = {name: row.config for name, row in FAMILIES.items()} | VARIANTS
# Variants that are always run; the others differ less from one of these, and are among the full tests.
ALWAYS = (
    "llama_tied_with_biases",
    "llama3_rope",
    "qwen2_yarn",
    "qwen3_of_qwen3_vl",
    "gpt_neox_half_rotated",
    "falcon_multi_head",
    "phi3_partial_rotary",
    "gemma3_rope",
    "gemma4_e2b",
    "gemma4_moe",
    "granitemoehybrid_dense",
    "deepseek_v2_lite",
    "qwen3_5_more_value_heads",
)
# Families that llama.cpp computes as another of the table, but for a factor, a norm or a bias that others have too.
ALIKE = (
    "mistral",
    "qwen2",
    "smollm3",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5",
    "ministral3",
    "seed_oss",
    "arcee",
    "glm4_moe_lite",
    "ernie4_5_moe",
    "qwen2_moe",
    "qwen3_5_moe",
    "hunyuan_v1_dense",
    "nemotron_h",
)
# Families whose rows have an order of their own, or that are stored in some other form: always unpacked again.
STORED_OTHERWISE = (
    "llama",
    "mixtral",
    "gpt_neox",
    "bloom",
    "falcon",
    "gemma3n",
    "gemma4",
    "granitemoehybrid",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "nemotron_h_moe",
    "lfm2_moe",
)
# One family of each kind of tokenizer.
TOKENIZED = tuple({row.tokenizer: name for name, row in reversed(FAMILIES.items())}.values())
MIXTURES = tuple(name for name, row in FAMILIES.items() if hasattr(row.config, "num_experts_per_tok"))
# Families that store several parameters as one tensor, or one as several.
JOINED = (
    "gemma3n",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "qwen3_next",
    "granitemoeshared",
    "granitemoehybrid",
)
NFC = ("qwen2", "qwen3_5", "gpt_neox")  # tokenizers that compose characters first, which llama.cpp does not


def quick(names: Iterable[str], always: Collection[str]) -> list[Any]:
    """Parameters of a test: those not among `always` run with the full tests only."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.full) for name in names]


def tokenizer_folder(kind: str, request: pytest.FixtureRequest, folder: Path) -> Path:
    """A small tokenizer of that kind: pre-tokenizer or SentencePiece settings, and transformers class."""
    if kind in ("sentencepiece", "gemma"):
        found: Path = request.getfixturevalue(f"{kind}_folder")
        return found
    if kind == "gemma4":
        source: Path = request.getfixturevalue("gemma_folder")
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
        return folder
    pre_tokenizer, skips_merges, tokenizer_class = {
        "gpt2": (gpt2_split(), False, "GPT2Tokenizer"),
        "gpt_neox": (gpt2_split(), False, "GPTNeoXTokenizer"),
        "qwen2": (split(pretokenizer._QWEN2), False, "Qwen2Tokenizer"),
        "qwen3_5": (split(pretokenizer._QWEN35), False, "Qwen3_5Tokenizer"),
        "llama3": (split(pretokenizer._LLAMA3), True, "PreTrainedTokenizerFast"),
        "olmo2": (split(pretokenizer._LLAMA3), False, "PreTrainedTokenizerFast"),
        "gpt4o": (split(pretokenizer._GPT4O), False, "PreTrainedTokenizerFast"),
        "single_digits": (single_digits_split(), False, "PreTrainedTokenizerFast"),
        "bloom": (split(pretokenizer._BLOOM), False, "PreTrainedTokenizerFast"),
        "falcon": (falcon_split(), False, "PreTrainedTokenizerFast"),
    }[kind]
    train_byte_level(folder, pre_tokenizer)
    edits = {"tokenizer_config.json": {"tokenizer_class": tokenizer_class}}
    content = json.loads((folder / "tokenizer.json").read_text())
    edits["tokenizer.json"] = {"model": {**content["model"], "ignore_merges": skips_merges}}
    for name, edit in edits.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **edit}))
    return folder


def test_every_built_in_family_is_tested_here() -> None:
    assert {row.config.model_type for row in FAMILIES.values()} == set(table.FAMILIES)


def test_a_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newcomer.py").write_text(
        "import gguf\n"
        "from exporters.gguf.families.family import Family\n"
        'ROWS = (Family("newcomer", gguf.MODEL_ARCH.LLAMA),)\n'
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert set(table.gather()) == {*table.FAMILIES, "newcomer"}


def single_digits_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_split()])


def falcon_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            gpt2_split(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


def kld(reference: np.ndarray, logits: np.ndarray) -> float:
    keeper = ScoreKeeper()
    keeper.add(logits, np.zeros(len(logits), dtype=np.int32), reference)
    mean = keeper.scores().kld_mean
    assert mean is not None
    return mean


def torch_logits(run: RunDirectory, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return dequantized_model(run)(torch.from_numpy(tokens)[None].long()).logits[0].numpy()


@pytest.mark.parametrize("name", quick(CONFIGS, (*(name for name in FAMILIES if name not in ALIKE), *ALWAYS)))
def test_f32_export_computes_what_transformers_computes(name: str, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS[name])
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], 150).astype(np.int32)
    with LlamaCppRuntime().open(export(run, tmp_path / "f32.gguf", dtype="f32")) as session:
        logits = session.logits(tokens)
    assert kld(torch_logits(run, tokens), logits) <= 1e-5


@pytest.mark.parametrize("name", quick(FAMILIES, TOKENIZED))
def test_tokens_of_each_family_are_transformers_tokens(
    name: str, run_of: RunOf, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    row = FAMILIES[name]
    folder = tokenizer_folder(row.tokenizer, request, tmp_path / "tokenizer")
    artifact = export(run_of(row.config, tokenizer=folder), tmp_path / "a.gguf")
    assert read_metadata(artifact).get("tokenizer.ggml.pre") == row.pre
    texts = [text for text in TEXTS if text and not (row.tokenizer in NFC and "decomposed" in text)]
    if row.pre in pretokenizer.APPROXIMATE:
        texts = [text for text in texts if text.isascii()]
    assert_same_tokens(artifact, folder, texts)


@pytest.mark.parametrize("length", [100, 300])
def test_longrope_takes_short_factors_for_short_texts_and_long_ones_for_long(
    length: int, run_of: RunOf, tmp_path: Path
) -> None:
    run = run_of(LONG_PHI3)
    lines: list[str] = []
    artifact = export(run, tmp_path / "f32.gguf", log=lines.append, dtype="f32")
    assert any("longer than 256 tokens" in line for line in lines)
    tokens = np.random.default_rng(0).integers(0, VOCAB, length).astype(np.int32)
    with LlamaCppRuntime().open(artifact) as session:
        assert kld(torch_logits(run, tokens), session.logits(tokens)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "scheme"),
    [pytest.param(name, "gguf:q4_0", marks=() if name in STORED_OTHERWISE else pytest.mark.full) for name in FAMILIES]
    + [("llama", scheme) for scheme in ("gguf:q4_1", "gguf:q5_0", "gguf:q5_1", "gguf:q8_0", "onnx:w4g32")],
)
def test_llama_cpp_dequantizes_the_runs_own_weights(name: str, scheme: str, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS[name], scheme)
    artifact = export(run, tmp_path / "packed.gguf")
    expected = {tensor.gguf_name: tensor.weights() for tensor in iter_expected(run, artifact)}
    assert {row.hf_name for row in name_map(run, artifact)} == set(run.names())
    if name not in JOINED:
        assert len(expected) == len(stacks(run.names()))  # the experts of a layer are one tensor
    for stored in LlamaCppRuntime().stored_tensors(artifact):
        if stored.name == "rope_freqs.weight":  # of no parameter
            continue
        assert np.array_equal(stored.weights.view(np.uint32), expected.pop(stored.name).view(np.uint32)), stored.name
    assert not expected


@pytest.mark.parametrize(
    "name",
    ["llama_tied_with_biases", "qwen3", "bloom", *(pytest.param(n, marks=pytest.mark.full) for n in FAMILIES)],
)
def test_packed_file_runs(name: str, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS[name])
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], 100).astype(np.int32)
    with LlamaCppRuntime().open(export(run, tmp_path / "packed.gguf")) as session:
        logits = session.logits(tokens)
    # llama.cpp rounds activations to 8 bits here, which may send a token to another expert; a wrong graph or order of
    # rows gives more than 0.1, of experts more than 1.
    assert kld(torch_logits(run, tokens), logits) <= (0.2 if name in MIXTURES else 2e-2)


def test_f16_export_holds_the_weights_rounded_to_f16(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["llama"])
    artifact = export(run, tmp_path / "f16.gguf", dtype="f16")
    types = {row.name: row.type for row in read_tensors(artifact)}
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    expected = {tensor.gguf_name: tensor.weights() for tensor in iter_expected(run, artifact)}
    for stored in LlamaCppRuntime().stored_tensors(artifact):
        assert np.array_equal(stored.weights, expected[stored.name]), stored.name


def test_norms_of_each_head_stay_in_f32(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["cohere_query_norms"])
    artifact = export(run, tmp_path / "f16.gguf", dtype="f16")
    types = {row.name: row.type for row in read_tensors(artifact)}
    assert types["blk.0.attn_q_norm.weight"] == types["blk.63.attn_k_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == "F16"
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], 50).astype(np.int32)
    with LlamaCppRuntime().open(artifact) as session:  # llama.cpp aborts at norms in f16
        assert kld(torch_logits(run, tokens), session.logits(tokens)) <= 1e-3


def test_tied_embeddings_are_written_once(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["llama_tied_with_biases"])
    names = [row.name for row in read_tensors(export(run, tmp_path / "a.gguf"))]
    assert "output.weight" not in names
    assert [row.type for row in read_tensors(tmp_path / "a.gguf") if row.name == "token_embd.weight"] == ["Q6_K"]


def test_rows_of_q_and_k_are_interleaved_for_llama_only(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["llama"])
    orders = {m.gguf_name: m.rows for m in name_map(run, export(run, tmp_path / "a.gguf"))}
    assert orders["blk.1.attn_q.weight"].tolist() == interleaved_rows(256, 4).tolist()
    assert orders["blk.1.attn_k.weight"].tolist() == interleaved_rows(128, 2).tolist()
    assert orders["blk.1.attn_v.weight"] is None
    assert interleaved_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_fused_projections_are_stored_as_queries_keys_values() -> None:
    # Two groups of two query heads, a key head and a value head, each of one row.
    assert grouped_rows(8, 2, 1).tolist() == [0, 1, 4, 5, 2, 6, 3, 7]
    # A group is one head: BLOOM, GPT-NeoX.
    assert grouped_rows(12, 2, 2).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    # One group: Falcon 7B's rows lie in that order already.
    assert grouped_rows(10, 1, 2).tolist() == list(range(10))


@pytest.mark.parametrize("name", ["gpt_neox", "falcon", "falcon_new_decoder", "bloom"])
def test_a_fused_projection_and_its_bias_move_together(name: str, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS[name])
    orders = {m.gguf_name: m.rows for m in name_map(run, export(run, tmp_path / "a.gguf"))}
    config = canonical_config(run.config)
    weight = orders["blk.1.attn_qkv.weight"]
    assert weight is not None
    expected = grouped_rows(len(weight), config["num_key_value_heads"], config["head_dim"])
    assert weight.tolist() == expected.tolist()
    bias = orders.get("blk.1.attn_qkv.bias")
    assert bias is None or bias.tolist() == expected.tolist()


def test_gemmas_norms_are_stored_with_1_added_and_nothing_else_is(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["gemma3"])
    artifact = export(run, tmp_path / "a.gguf", dtype="f32")
    stored = {tensor.name: tensor.weights for tensor in LlamaCppRuntime().stored_tensors(artifact)}
    for row in name_map(run, artifact):
        added = np.float32(1) if "norm" in row.gguf_name else np.float32(0)
        assert np.array_equal(stored[row.gguf_name].squeeze(), run.dequantized(row.hf_name).numpy() + added), row


@pytest.mark.parametrize("vocab", [False, True], ids=["other_tokens", "microsofts_tokens"])
def test_llama_cpps_special_case_for_names_with_phi3_is_kept_for_microsofts_tokenizer(
    vocab: bool, run_of: RunOf, byte_level_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(byte_level_folder, folder)
    if vocab:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", "<unk>"]})
        tokenizer.save_pretrained(folder)
    run = run_of(CONFIGS["phi3"], tokenizer=folder)
    run.manifest.source["model"] = "somebody/Phi-3-small"
    artifact = export(run, tmp_path / "a.gguf")
    assert read_metadata(artifact)["general.name"] == ("Phi-3-small" if vocab else "Phi 3-small")
    assert_same_tokens(artifact, folder, ["hello world"])  # llama.cpp loads it


def test_a_config_that_transformers_refuses_is_one_sentence(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["gpt2"])
    (run.config_dir / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": "many"}))
    with pytest.raises(UserError, match=r"config\.json of the run cannot be read"):
        export(run, tmp_path / "a.gguf")


def test_metadata_says_what_the_model_is_and_where_it_comes_from(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["qwen3"])
    metadata = read_metadata(export(run, tmp_path / "a.gguf"))
    expected = {
        "general.architecture": "qwen3",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "qwen3.block_count": 2,
        "qwen3.context_length": 4096,
        "qwen3.embedding_length": 256,
        "qwen3.feed_forward_length": 512,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 128,
        "qwen3.attention.value_length": 128,
        "qwen3.vocab_size": 600,
        "signround_edge.version": __version__,
        "signround_edge.scheme": "gguf:q4_0",
        "signround_edge.manifest_sha256": sha256_of(run.path / "manifest.json"),
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 4096}, None),  # as long as the context: no window at all
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, 64),
    ],
)
def test_sliding_window_counts_only_where_the_model_uses_it(config: dict[str, object], window: int | None) -> None:
    assert sliding_window({**BASE, **config}) == window


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (MistralConfig(**BASE, sliding_window=64), "llama.attention.sliding_window"),
        (Phi3Config(**{**BASE, "pad_token_id": 0}, sliding_window=64), "phi3.attention.sliding_window"),
    ],
    ids=["mistral", "phi3"],
)
def test_a_sliding_window_is_written_and_said_aloud(
    config: PretrainedConfig, key: str, run_of: RunOf, tmp_path: Path
) -> None:
    lines: list[str] = []
    artifact = export(run_of(config), tmp_path / "a.gguf", log=lines.append)
    assert read_metadata(artifact)[key] == 64
    assert any("sliding window of 64" in line for line in lines)


def test_what_llama_cpp_computes_nearly_the_same_is_said(run_of: RunOf, tmp_path: Path) -> None:
    lines: list[str] = []
    export(run_of(CONFIGS["nemotron_h"]), tmp_path / "a.gguf", log=lines.append)
    assert [line for line in lines if "least time step" in line and "0.001; results may differ" in line]


@pytest.mark.parametrize(("sections", "left"), [([24, 20, 20], 2), ([22, 21, 21], 0)])
def test_pairs_that_llama_cpp_does_not_rotate_are_said(
    sections: list[int], left: int, run_of: RunOf, tmp_path: Path
) -> None:
    config = Qwen3Config(**BASE, head_dim=128, mrope_section=sections, num_deepstack_layers=3)
    lines: list[str] = []
    export(run_of(config), tmp_path / "a.gguf", log=lines.append)
    said = [line for line in lines if "unrotated" in line]
    assert len(said) == bool(left)
    assert all(f"leaves {left} of the 64 pairs" in line for line in said)


def tried(config: PretrainedConfig, run_of: RunOf, out: Path) -> Path:
    """An export that is refused, most before there is a model."""
    GgufExporter().way(config.to_dict(), [])
    return export(run_of(config), out)


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(name: str, run_of: RunOf, tmp_path: Path) -> None:
    config, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        tried(config, run_of, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("a.gguf*"))


def test_a_grid_without_gguf_type_is_refused_but_exports_as_floats(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["llama"], "onnx:w4g128-asym")
    with pytest.raises(UserError, match=r"w4g128-asym, which GGUF cannot store.*--dtype f16"):
        export(run, tmp_path / "a.gguf")
    assert read_tensors(export(run, tmp_path / "f16.gguf", dtype="f16"))


def test_a_folder_as_target_gets_model_gguf(run_of: RunOf, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export(run_of(CONFIGS["llama"]), tmp_path / "out") == tmp_path / "out" / "model.gguf"


def test_the_same_run_gives_the_same_bytes(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["qwen2"])
    assert sha256_of(export(run, tmp_path / "a.gguf")) == sha256_of(export(run, tmp_path / "b.gguf"))
