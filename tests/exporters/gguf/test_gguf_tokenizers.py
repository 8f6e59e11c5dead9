"""llama.cpp cuts a text into the same tokens as transformers does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from exporters.gguf.reader import read_metadata
from exporters.gguf.tokenizer import pretokenizer
from exporters.gguf.tokenizer.sentencepiece_vocab import extra_splits, from_merges
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, TEXT, export, gpt2_split, train_byte_level

RunOf = Callable[..., RunDirectory]

TEXTS = [
    TEXT,
    " leading space",
    "  two leading spaces",
    "trailing spaces   ",
    "\n\n\n",
    "",
    "a",
    "<tool>call</tool> <tool>",
    "mixed १२३ 123 ４５６ 1st 2nd",
    "é decomposed é, ﬁ ligature, zero​width, nbsp\u00a0here, \u3000ideographic",
    pretokenizer.CHECK_TEXT,
]
ASCII_CODE = "fooBarBAZ HTTPServer I'LL We'Ve a'lL 1234567 def f(x):\n    return x[0]/2  # a/b\n"
CONFIG = LlamaConfig(**{**BASE, "num_hidden_layers": 1})


def assert_same_tokens(artifact: Path, tokenizer_folder: Path, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with LlamaCppRuntime().open(artifact) as session:
        for text in texts:
            assert session.tokenize(text) == tokenizer.encode(text), text
            plain = tokenizer.encode(text, add_special_tokens=False)
            assert session.tokenize(text, add_special=False) == plain, text


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_byte_level_tokens_are_transformers_tokens(run_of: RunOf, byte_level_folder: Path, tmp_path: Path) -> None:
    artifact = export(run_of(CONFIG, tokenizer=byte_level_folder), tmp_path / "a.gguf")
    metadata = read_metadata(artifact)
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert_same_tokens(artifact, byte_level_folder, TEXTS)


@pytest.mark.parametrize(
    ("structure", "name"), pretokenizer._STRUCTURES.items(), ids=list(pretokenizer._STRUCTURES.values())
)
def test_a_pre_tokenizer_recognised_by_structure_splits_alike(
    structure: tuple[tuple[str, ...], bool], name: str, run_of: RunOf, tmp_path: Path
) -> None:
    patterns, ignore_merges = structure
    folder = train_byte_level(tmp_path / "tokenizer", split(*patterns))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["ignore_merges"] = ignore_merges
    file.write_text(json.dumps(content))
    artifact = export(run_of(CONFIG, tokenizer=folder), tmp_path / "a.gguf")
    assert read_metadata(artifact)["tokenizer.ggml.pre"] == name
    exact = name not in pretokenizer.APPROXIMATE
    assert_same_tokens(artifact, folder, TEXTS if exact else [text for text in TEXTS if text.isascii()] + [ASCII_CODE])


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (gpt2_split(), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_split()]), "smollm"),
    ],
)
def test_names_of_common_pre_tokenizers(pre_tokenizer: pre_tokenizers.PreTokenizer, name: str, tmp_path: Path) -> None:
    content = json.loads((train_byte_level(tmp_path, pre_tokenizer) / "tokenizer.json").read_text())
    assert pretokenizer.detect(content, [1, 2, 3]) == name


def test_skipping_merges_does_not_matter_where_merges_reach_every_token(tmp_path: Path) -> None:
    content = json.loads((train_byte_level(tmp_path, split(pretokenizer._QWEN2)) / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    assert pretokenizer.detect(content, []) == "qwen2"
    content["model"]["vocab"]["ABC"] = 595  # no merge makes it
    with pytest.raises(UserError, match="--template"):
        pretokenizer.detect(content, [])


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), gpt2_split()]),
        split(r"\p{L}+|\p{N}"),
        pre_tokenizers.Sequence([gpt2_split(), pre_tokenizers.Digits(individual_digits=True)]),
    ],
)
def test_an_unknown_pre_tokenizer_is_refused_with_the_way_out(
    pre_tokenizer: pre_tokenizers.PreTokenizer, tmp_path: Path
) -> None:
    content = json.loads((train_byte_level(tmp_path, pre_tokenizer) / "tokenizer.json").read_text())
    with pytest.raises(UserError, match=r"pre-tokenizer.*--template"):
        pretokenizer.detect(content, [])


def test_a_known_hash_comes_before_the_structure() -> None:
    assert all(len(key) == 64 for key in pretokenizer.KNOWN_HASHES)
    ids = [1, 2, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pretokenizer.KNOWN_HASHES, pretokenizer.check_hash(ids), "viking")
        assert pretokenizer.detect({"model": {}, "pre_tokenizer": None}, ids) == "viking"


def test_the_check_text_is_llama_cpps_to_the_letter() -> None:
    """With this text SmolLM2's tokenizer gives the published hash of "smollm", which proves every character of it."""
    digest = hashlib.sha256(pretokenizer.CHECK_TEXT.encode()).hexdigest()
    assert digest == "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"


@pytest.mark.parametrize("with_bos", [False, True])
def test_bos_is_added_exactly_when_transformers_adds_it(with_bos: bool, run_of: RunOf, tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path / "tokenizer", gpt2_split(), bos=with_bos)
    artifact = export(run_of(CONFIG, tokenizer=folder), tmp_path / "a.gguf")
    assert read_metadata(artifact)["tokenizer.ggml.add_bos_token"] is with_bos
    assert_same_tokens(artifact, folder, ["hello", ""])


def test_special_tokens_types_and_chat_template(run_of: RunOf, byte_level_folder: Path, tmp_path: Path) -> None:
    metadata = read_metadata(export(run_of(CONFIG, tokenizer=byte_level_folder), tmp_path / "a.gguf"))
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == BASE["vocab_size"]
    assert [types[tokens.index(t)] for t in ("<|im_end|>", "<tool>", "a")] == [3, 4, 1]
    assert tokens[-1] == "[PAD599]"  # the embedding has more rows than the tokenizer has tokens
    assert types[-1] == 5
    ids = {key: metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown", "padding")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0, "padding": 0}
    assert "messages" in metadata["tokenizer.chat_template"]


@pytest.mark.parametrize("keep_model_file", [True, False], ids=["tokenizer.model", "tokenizer.json"])
def test_sentencepiece_tokens_are_transformers_tokens(
    keep_model_file: bool, run_of: RunOf, sentencepiece_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(sentencepiece_folder, folder)
    if not keep_model_file:
        (folder / "tokenizer.model").unlink()
    artifact = export(run_of(CONFIG, tokenizer=folder), tmp_path / "a.gguf")
    metadata = read_metadata(artifact)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3]
    assert types[metadata["tokenizer.ggml.tokens"].index("<0x0A>")] == 6
    assert_same_tokens(artifact, folder, [text for text in TEXTS if text])


def test_transformers_own_llama_class_is_followed(run_of: RunOf, sentencepiece_folder: Path, tmp_path: Path) -> None:
    """It rebuilds the tokenizer, and unlike SentencePiece and llama.cpp adds no space where a text begins with one."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(sentencepiece_folder / "tokenizer.model", folder)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    artifact = export(run_of(CONFIG, tokenizer=folder), tmp_path / "a.gguf")
    assert_same_tokens(artifact, folder, [text for text in TEXTS if text and not text.startswith(" ")])


def test_unigram_tokenizers_are_refused_with_the_way_out(run_of: RunOf, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("▁", -2.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(UserError, match=r"tokenizers of kind Unigram.*--template"):
        export(run_of(CONFIG, tokenizer=folder), tmp_path / "a.gguf")


def test_scores_order_pieces_as_merges_do() -> None:
    model = {"vocab": {"a": 0, "b": 1, "ab": 2, "abab": 3, "<0x00>": 4}, "merges": [["a", "b"], ["ab", "ab"]]}
    vocabulary = from_merges(model, 6)
    assert vocabulary.scores[2] > vocabulary.scores[3] > vocabulary.scores[0]
    assert vocabulary.types == [1, 1, 1, 1, 6, 5]
    assert extra_splits(model) == 0
    assert extra_splits({"vocab": {**model["vocab"], "aba": 5}, "merges": model["merges"]}) == 1  # aba + b


def test_a_model_without_tokenizer_runs_on_token_ids(run_of: RunOf, tmp_path: Path) -> None:
    lines: list[str] = []
    artifact = export(run_of(CONFIG), tmp_path / "a.gguf", log=lines.append)
    assert any("no tokenizer" in line for line in lines)
    with LlamaCppRuntime().open(artifact) as session:
        assert session.logits(np.arange(5, dtype=np.int32)).shape == (5, BASE["vocab_size"])


def test_a_broken_tokenizer_file_is_one_sentence(run_of: RunOf, byte_level_folder: Path, tmp_path: Path) -> None:
    run = run_of(CONFIG, tokenizer=byte_level_folder)
    (run.config_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer in .* cannot be loaded"):
        export(run, tmp_path / "a.gguf")


def test_qwen_style_tokenizer_class_round_trips(run_of: RunOf, tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path / "tokenizer", split(pretokenizer._QWEN2))
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "tokenizer_class": "Qwen2Tokenizer"}))
    run = run_of(Qwen2Config(**{**BASE, "num_hidden_layers": 1}), tokenizer=folder)
    artifact = export(run, tmp_path / "a.gguf")
    assert read_metadata(artifact)["tokenizer.ggml.pre"] == "qwen2"
    assert_same_tokens(artifact, folder, [text for text in TEXTS if "decomposed" not in text])
