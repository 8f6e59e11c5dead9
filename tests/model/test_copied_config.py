"""What of a model folder goes into run/config."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from signround_edge.demo import tiny_llama_path
from signround_edge.model.source import SourceModel


def test_all_chat_templates_are_copied_and_no_weights(tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama_path(), tmp_path / "model")
    (model / "chat_template.jinja").write_text("DEFAULT")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("TOOL")
    (model / "additional_chat_templates/notes.md").write_text("no template")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    SourceModel.open(model).copy_config(tmp_path / "config")
    copied = {file.relative_to(tmp_path / "config").as_posix() for file in (tmp_path / "config").rglob("*.*")}
    assert {"config.json", "tokenizer.json", "additional_chat_templates/tool_use.jinja"} <= copied
    assert not any("safetensors" in name or name.endswith(".md") for name in copied)
    templates = AutoTokenizer.from_pretrained(tmp_path / "config").chat_template
    assert templates == {"default": "DEFAULT", "tool_use": "TOOL"}
