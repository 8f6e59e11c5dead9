"""Where llama.cpp cuts texts into other tokens than the tokenizer does, `export` says so, and only there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, export
from tests.exporters.gguf.family_settings import YARN
from tests.exporters.gguf.test_gguf_families import kld, torch_logits

RunOf = Callable[..., RunDirectory]
CONFIG = LlamaConfig(**{**BASE, "num_hidden_layers": 1})

SPACES_BEFORE, SPACES_BEHIND, WITHIN = "the  <tool>people", "the<tool>  people", "the<tool>people"
DECOMPOSED, CAPITALS = "cafe\u0301 of the world", "The World"
LEADING, BEHIND_SPECIAL = "  the people", "<s>the people</s>of"
TEXTS = (SPACES_BEFORE, SPACES_BEHIND, WITHIN, DECOMPOSED, CAPITALS, "the people told 1234 words")


def differing(artifact: Path, folder: Path, texts: tuple[str, ...]) -> set[str]:
    """The texts that llama.cpp cuts into other tokens than transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with LlamaCppRuntime().open(artifact) as session:
        return {text for text in texts if session.tokenize(text, True, True) != tokenizer.encode(text)}


def notes(lines: list[str]) -> list[str]:
    return [line for line in lines if "llama.cpp" in line]


def edited(folder: Path, out: Path, change: Callable[[dict[str, Any]], None], **config: object) -> Path:
    """A copy of a tokenizer with tokenizer.json and tokenizer_config.json changed."""
    shutil.copytree(folder, out)
    (out / "tokenizer.model").unlink(missing_ok=True)
    content = json.loads((out / "tokenizer.json").read_text())
    change(content)
    (out / "tokenizer.json").write_text(json.dumps(content))
    file = out / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return out


def tool(**flags: bool) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        next(token for token in content["added_tokens"] if token["content"] == "<tool>").update(flags)

    return change


def normalizer(value: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(normalizer=value)


@pytest.mark.parametrize(
    ("change", "said", "texts"),
    [
        (tool(), [], set()),
        (tool(lstrip=True), ["in front of <tool>"], {SPACES_BEFORE}),
        (tool(rstrip=True), ["behind <tool>"], {SPACES_BEHIND}),
        (tool(lstrip=True, rstrip=True), ["in front of", "behind"], {SPACES_BEFORE, SPACES_BEHIND}),
        (tool(single_word=True), ["within words"], {SPACES_BEFORE, SPACES_BEHIND, WITHIN}),
        (normalizer({"type": "NFC"}), ["normalizer (NFC)"], {DECOMPOSED}),
        (normalizer({"type": "Sequence", "normalizers": []}), [], set()),
        (
            normalizer({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
            ["normalizer (NFC, Lowercase)"],
            {DECOMPOSED, CAPITALS},
        ),
    ],
    ids=["plain", "lstrip", "rstrip", "both", "single_word", "NFC", "no step", "two steps"],
)
def test_byte_level_tokenizers(
    change: Callable[[dict[str, Any]], None],
    said: list[str],
    texts: set[str],
    run_of: RunOf,
    byte_level_folder: Path,
    tmp_path: Path,
) -> None:
    folder = edited(byte_level_folder, tmp_path / "tokenizer", change)
    lines: list[str] = []
    artifact = export(run_of(CONFIG, tokenizer=folder), tmp_path / "a.gguf", log=lines.append, dtype="f32")
    assert differing(artifact, folder, TEXTS) == texts
    assert len(notes(lines)) == len(said)
    assert all(words in line for words, line in zip(said, notes(lines), strict=True)), lines
    again: list[str] = []
    export(RunDirectory.open(tmp_path / "run"), tmp_path / "b.gguf", log=again.append, template=artifact, dtype="f32")
    assert notes(again) == notes(lines)


def metaspace(scheme: str) -> Callable[[dict[str, Any]], None]:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return lambda content: content.update(normalizer=None, pre_tokenizer=step)


def then(more: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["normalizer"]["normalizers"].insert(0, more)

    return change


@pytest.mark.parametrize(
    ("change", "said", "texts"),
    [
        (lambda content: None, [], set()),
        (metaspace("never"), [], set()),
        (metaspace("always"), ["begin with a space"], {LEADING}),
        (metaspace("first"), ["begin with a space", "prepend_scheme first"], {LEADING, BEHIND_SPECIAL}),
        (then({"type": "NFC"}), ["normalizer (NFC)"], {DECOMPOSED}),
        (then({"type": "Lowercase"}), ["normalizer (Lowercase)"], {CAPITALS}),
    ],
    ids=["plain", "never", "always", "first", "NFC", "Lowercase"],
)
def test_sentencepiece_tokenizers(
    change: Callable[[dict[str, Any]], None],
    said: list[str],
    texts: set[str],
    run_of: RunOf,
    sentencepiece_folder: Path,
    tmp_path: Path,
) -> None:
    folder = edited(sentencepiece_folder, tmp_path / "tokenizer", change, tokenizer_class="PreTrainedTokenizerFast")
    lines: list[str] = []
    artifact = export(run_of(CONFIG, tokenizer=folder), tmp_path / "a.gguf", log=lines.append)
    found = differing(artifact, folder, (DECOMPOSED, CAPITALS, LEADING, BEHIND_SPECIAL, "the people told words"))
    assert found == texts
    assert len(notes(lines)) == len(said)
    assert all(words in line for words, line in zip(said, notes(lines), strict=True)), lines


@pytest.mark.parametrize("rstrip", [True, False])
@pytest.mark.parametrize("name", ["Phi-3-mini", "some-model"])
def test_a_phi_3_is_known_by_its_name(
    name: str, rstrip: bool, run_of: RunOf, sentencepiece_folder: Path, tmp_path: Path
) -> None:
    def change(content: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
        taken = {index: text for text, index in content["model"]["vocab"].items() if index >= 400}
        for index, text in ((400, "<|endoftext|>"), (401, "<|user|>")):
            del content["model"]["vocab"][taken[index]]
            content["model"]["vocab"][text] = index
            content["added_tokens"].append({"id": index, "content": text, **flags, "special": True})
        for token in content["added_tokens"]:
            token["rstrip"] = rstrip and token["content"] in ("</s>", "<|user|>")
        gone = {taken[400], taken[401]}
        content["model"]["merges"] = [m for m in content["model"]["merges"] if not {*m, "".join(m)} & gone]

    folder = edited(sentencepiece_folder, tmp_path / "tokenizer", change, tokenizer_class="PreTrainedTokenizerFast")
    run = run_of(CONFIG, tokenizer=folder)
    run.manifest.source["model"] = name
    lines: list[str] = []
    artifact = export(run, tmp_path / "a.gguf", log=lines.append)
    texts = ("<|user|>  the people", "<|endoftext|>  the people", "the people")
    honoured = rstrip == (name == "Phi-3-mini")
    assert differing(artifact, folder, texts) == (set() if honoured else {texts[0]})
    assert [line for line in notes(lines) if "spaces behind" in line] == notes(lines)
    assert len(notes(lines)) == (0 if honoured else 1)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_that_rounds_no_range_is_said_to_differ_and_does(truncate: bool, run_of: RunOf, tmp_path: Path) -> None:
    # ends of the range far from whole numbers, and frequencies between them
    config = Qwen2Config(**BASE, rope_parameters={**YARN, "original_max_position_embeddings": 64, "truncate": truncate})
    run = run_of(config)
    lines: list[str] = []
    artifact = export(run, tmp_path / "f32.gguf", log=lines.append, dtype="f32")
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], 150).astype(np.int32)
    with LlamaCppRuntime().open(artifact) as session:
        divergence = kld(torch_logits(run, tokens), session.logits(tokens))
    assert (divergence <= 1e-5) is truncate
    again: list[str] = []
    export(run, tmp_path / "again.gguf", log=again.append, template=artifact)
    for said in (lines, again):
        assert any("truncate false" in line for line in said) is not truncate
