"""llama.cpp ends a text where transformers does, or the export says where it does not; chat templates are all there."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig

from exporters.gguf.reader import read_metadata
from exporters.gguf.tokenizer.special_tokens import _NEVER_BESIDE, ENDS_BY_TEXT
from runtime_tests.worker.llama_cpp_engine import LlamaCppEngine
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, export, gpt2_split, train_byte_level

RunOf = Callable[..., RunDirectory]
CONFIG = LlamaConfig(**{**BASE, "num_hidden_layers": 1, "vocab_size": 640})


@pytest.fixture
def run(run_of: RunOf, byte_level_folder: Path) -> RunDirectory:
    """Its tokenizer: <|endoftext|> 0, <|im_start|> 1 (bos), <|im_end|> 2 (eos), and enough to rename."""
    return run_of(CONFIG, tokenizer=byte_level_folder)


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rename(folder: Path, names: dict[int, str]) -> None:
    """Tokens of tokenizer.json called otherwise, as special tokens."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = {text: index for text, index in content["model"]["vocab"].items() if index not in names}
    gone = set(content["model"]["vocab"]) - set(vocab)
    merges = [m for m in content["model"]["merges"] if not {*m, "".join(m)} & gone]
    content["model"] |= {"vocab": vocab | {text: index for index, text in names.items()}, "merges": merges}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": index, "content": text, **flags, "special": True} for index, text in names.items()]
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] not in names] + added
    (folder / "tokenizer.json").write_text(json.dumps(content))


@contextmanager
def loaded(artifact: Path) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(artifact)
    try:
        yield engine
    finally:
        engine.close()


def ends_of(artifact: Path) -> set[int]:
    """The ids at which llama.cpp ends a text."""
    with loaded(artifact) as engine:
        return {i for i in range(engine.vocab_size) if engine._lib.llama_vocab_is_eog(engine._vocab, i)}


def test_the_tokenizers_own_special_tokens_come_before_those_of_the_config(run: RunDirectory, tmp_path: Path) -> None:
    rename(run.config_dir, {300: "<|turn|>", 301: "<|fill|>", 302: "<|first|>"})
    named = {"eos_token": "<|turn|>", "pad_token": "<|fill|>", "bos_token": "<|first|>"}
    edit(run.config_dir / "tokenizer_config.json", **dict.fromkeys(named))
    (run.config_dir / "special_tokens_map.json").write_text(json.dumps(named))
    edit(run.config_dir / "config.json", eos_token_id=2, pad_token_id=-1, bos_token_id=5)
    artifact = export(run, tmp_path / "a.gguf")
    hf, metadata = AutoTokenizer.from_pretrained(run.config_dir), read_metadata(artifact)
    for kind, key in (("eos", "eos"), ("pad", "padding"), ("bos", "bos"), ("unk", "unknown")):
        assert metadata[f"tokenizer.ggml.{key}_token_id"] == getattr(hf, f"{kind}_token_id"), kind
    assert metadata["tokenizer.ggml.eos_token_id"] == 300
    assert {2, 300} <= ends_of(artifact)


def test_config_names_special_tokens_that_the_tokenizer_has_not(run: RunDirectory, tmp_path: Path) -> None:
    edit(run.config_dir / "tokenizer_config.json", eos_token=None, bos_token=None)
    edit(run.config_dir / "config.json", eos_token_id=None, text_config={"eos_token_id": 7}, bos_token_id=9)
    (run.config_dir / "generation_config.json").unlink(missing_ok=True)
    metadata = read_metadata(export(run, tmp_path / "a.gguf"))
    assert metadata["tokenizer.ggml.eos_token_id"] == 7
    assert metadata["tokenizer.ggml.bos_token_id"] == 9


@pytest.mark.parametrize("named_in", ["generation_config.json", "config.json"])
def test_llama_cpp_ends_a_text_at_every_id_of_the_list(named_in: str, run: RunDirectory, tmp_path: Path) -> None:
    (run.config_dir / "generation_config.json").unlink(missing_ok=True)
    edit(run.config_dir / named_in, eos_token_id=[2, 300, 301, 2, 100_000])
    lines: list[str] = []
    artifact = export(run, tmp_path / "a.gguf", log=lines.append)
    metadata = read_metadata(artifact)
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    # <|im_end|> is what llama.cpp would take for eot itself, so that key is the last to be given away
    assert (metadata["tokenizer.ggml.eom_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (300, 301)
    assert {2, 300, 301} <= ends_of(artifact)
    assert not [line for line in lines if "will not end" in line]


def test_generation_config_decides_as_in_transformers(run: RunDirectory, tmp_path: Path) -> None:
    edit(run.config_dir / "config.json", eos_token_id=[2, 300])
    edit(run.config_dir / "generation_config.json", eos_token_id=[2, 301])
    found = ends_of(export(run, tmp_path / "a.gguf"))
    assert 301 in found
    assert 300 not in found


def test_ids_for_which_a_file_has_no_room_are_named(run: RunDirectory, tmp_path: Path) -> None:
    edit(run.config_dir / "generation_config.json", eos_token_id=[300, 301, 302, 0, 303])
    lines: list[str] = []
    artifact = export(run, tmp_path / "a.gguf", log=lines.append)
    (line,) = [line for line in lines if "will not end a text" in line]
    named = {int(number) for number in re.findall(r"(\d+) \(", line)}
    assert named == {300, 301, 302, 303, 0, 2} - ends_of(artifact) == {302, 303}
    assert "generation_config.json" in line
    # the same file as a template: nothing is added to its metadata, and the line is there
    again: list[str] = []
    floats = export(run, tmp_path / "floats.gguf", dtype="f32")
    export(run, tmp_path / "b.gguf", log=again.append, template=floats)
    assert line in again


def test_generation_stops_there(run: RunDirectory, tmp_path: Path) -> None:
    prompt = np.array([40, 50, 60], dtype=np.int32)
    with loaded(export(run, tmp_path / "a.gguf")) as engine:
        free = engine.generate(prompt, 12)
    stop = next(token for token in free[2:] if token not in free[:2])
    edit(run.config_dir / "generation_config.json", eos_token_id=[2, stop])
    with loaded(export(run, tmp_path / "b.gguf")) as engine:
        assert engine.generate(prompt, 12) == free[: free.index(stop)]


def test_these_texts_end_a_text_for_llama_cpp(run: RunDirectory, tmp_path: Path) -> None:
    apart = [text for text in ENDS_BY_TEXT if not any(text in o for each in _NEVER_BESIDE.values() for o in each)]
    names = {300 + i: text for i, text in enumerate(sorted(set(apart) - {"<|endoftext|>", "<|im_end|>"}))}
    rename(run.config_dir, names | {400: "<|stop|>", 401: "<|end_of_speech|>"})
    assert ends_of(export(run, tmp_path / "a.gguf")) == {*names, 0, 2}


@pytest.mark.parametrize(
    ("text", "others"),
    [(t, o) for t, each in _NEVER_BESIDE.items() for o in each],
    ids=lambda of: of if isinstance(of, str) else "+".join(sorted(of)),
)
def test_these_never_do_beside_others(text: str, others: set[str], run: RunDirectory, tmp_path: Path) -> None:
    rename(run.config_dir, {300: text, **{301 + i: other for i, other in enumerate(sorted(others))}})
    edit(run.config_dir / "generation_config.json", eos_token_id=[2, 300])
    lines: list[str] = []
    artifact = export(run, tmp_path / "a.gguf", log=lines.append)
    assert ends_of(artifact) == {0, 2, *range(301, 301 + len(others))}
    assert any(f"will not end a text at token 300 ({text})" in line for line in lines)


def test_a_token_put_behind_texts_and_the_tokenizers_eos_both_end_one(run_of: RunOf, tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path / "tokenizer", gpt2_split())
    rename(folder, {300: "<|stop|>", 301: "<|sep|>"})
    content = json.loads((folder / "tokenizer.json").read_text())
    piece: dict[str, Any] = {"SpecialToken": {"id": "<|sep|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, piece],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|sep|>": {"id": "<|sep|>", "ids": [301], "tokens": ["<|sep|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit(folder / "tokenizer_config.json", eos_token="<|stop|>")
    artifact = export(run_of(CONFIG, tokenizer=folder), tmp_path / "a.gguf")
    assert read_metadata(artifact)["tokenizer.ggml.eos_token_id"] == 301  # llama.cpp puts its eos behind a text
    assert {300, 301} <= ends_of(artifact)


def test_a_broken_generation_config_is_one_sentence(run: RunDirectory, tmp_path: Path) -> None:
    (run.config_dir / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config.json is not JSON"):
        export(run, tmp_path / "a.gguf")


@pytest.mark.parametrize("layout", ["folder", "list"])
def test_all_chat_templates_are_in_the_file(layout: str, run: RunDirectory, tmp_path: Path) -> None:
    templates = {"default": "{{ messages[0].content }}", "tool_use": "TOOL", "rag-1": "RAG", "rag_1": "OTHER"}
    config = run.config_dir
    (config / "chat_template.jinja").unlink(missing_ok=True)
    if layout == "list":
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        edit(config / "tokenizer_config.json", chat_template=listed)
    else:
        edit(config / "tokenizer_config.json", chat_template=None)
        (config / "additional_chat_templates").mkdir()
        (config / "chat_template.jinja").write_text(templates["default"])
        for name in ("tool_use", "rag-1", "rag_1"):
            (config / f"additional_chat_templates/{name}.jinja").write_text(templates[name])
    assert AutoTokenizer.from_pretrained(config).chat_template == templates
    lines: list[str] = []
    metadata = read_metadata(export(run, tmp_path / "a.gguf", log=lines.append))
    assert metadata["tokenizer.chat_template"] == templates["default"]
    assert metadata["tokenizer.chat_template.tool_use"] == "TOOL"
    assert metadata["tokenizer.chat_template.rag_1"] == "OTHER"  # the one that is really called so
    assert sorted(metadata["tokenizer.chat_templates"]) == ["rag_1", "tool_use"]
    assert any("'rag-1' was left out" in line for line in lines)
    with loaded(tmp_path / "a.gguf") as engine:
        read = engine._lib.llama_model_chat_template
        read.restype, read.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_char_p]
        found = {name: read(engine._model, name) for name in (None, b"tool_use", b"rag_1")}
    assert found == {None: b"{{ messages[0].content }}", b"tool_use": b"TOOL", b"rag_1": b"OTHER"}


def test_templates_without_a_default_one_get_a_line(run: RunDirectory, tmp_path: Path) -> None:
    (run.config_dir / "chat_template.jinja").unlink(missing_ok=True)
    edit(run.config_dir / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "RAG"}])
    lines: list[str] = []
    metadata = read_metadata(export(run, tmp_path / "a.gguf", log=lines.append))
    assert metadata["tokenizer.chat_template.rag"] == "RAG"
    assert "tokenizer.chat_template" not in metadata
    assert any("rag" in line and "ChatML" in line for line in lines)
