"""An ONNX folder has all chat templates of the model, where transformers and onnxruntime-genai look for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnxruntime_genai
import pytest
from transformers import AutoTokenizer

from exporters.onnx.artifact.reader import changed_files
from exporters.onnx.artifact.sidecar import Sidecar
from exporters.onnx.routes.builder import write_float_graph
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import export

TEMPLATES = {"default": "D {{ messages[0].content }}", "tool_use": "TOOL {{ messages[0].content }}"}


def with_templates(run: RunDirectory, out: Path, templates: dict[str, str], layout: str) -> RunDirectory:
    """A copy of the run with these chat templates, as a folder of transformers 5 or an older one has them."""
    shutil.copytree(run.path, out)
    config = out / "config"
    if layout == "list":
        file = config / "tokenizer_config.json"
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))
    else:
        (config / "additional_chat_templates").mkdir()
        for name, text in templates.items():
            place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (config / place).write_text(text)
    assert AutoTokenizer.from_pretrained(config).chat_template == templates
    return RunDirectory.open(out)


def applied(folder: Path, template: str | None = None) -> str:
    """What onnxruntime-genai makes of a message."""
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    messages = json.dumps([{"role": "user", "content": "hi"}])
    more = {} if template is None else {"template_str": template}
    return str(tokenizer.apply_chat_template(messages=messages, add_generation_prompt=False, **more))


@pytest.mark.parametrize("layout", ["folder", "list"])
@pytest.mark.parametrize("route", ["builder", "template"])
def test_both_libraries_find_the_templates(layout: str, route: str, llama_run: RunDirectory, tmp_path: Path) -> None:
    run = with_templates(llama_run, tmp_path / "run", TEMPLATES, layout)
    template = None
    if route == "template":
        write_float_graph(llama_run.path.parent / "model", tmp_path / "fp32")
        template = tmp_path / "fp32"
    lines: list[str] = []
    out = export(run, tmp_path / "out", log=lines.append, template=template)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATES
    assert applied(out) == "D hi"
    assert applied(out, TEMPLATES["tool_use"]) == "TOOL hi"
    assert any("tool_use" in line and "template_str" in line for line in lines)
    assert "additional_chat_templates/tool_use.jinja" in Sidecar.read(out).files


def test_a_changed_template_is_noticed(llama_run: RunDirectory, tmp_path: Path) -> None:
    out = export(with_templates(llama_run, tmp_path / "run", TEMPLATES, "folder"), tmp_path / "out")
    assert changed_files(out) == []
    (out / "additional_chat_templates/tool_use.jinja").write_text("OTHER")
    assert changed_files(out) == ["additional_chat_templates/tool_use.jinja"]


def test_an_export_with_templates_can_be_repeated(llama_run: RunDirectory, tmp_path: Path) -> None:
    run = with_templates(llama_run, tmp_path / "run", TEMPLATES, "list")
    first = Sidecar.read(export(run, tmp_path / "out"))
    assert Sidecar.read(export(run, tmp_path / "out")) == first


def test_templates_without_a_default_one_get_a_line(llama_run: RunDirectory, tmp_path: Path) -> None:
    run = with_templates(llama_run, tmp_path / "run", {"rag": "RAG {{ messages[0].content }}"}, "list")
    lines: list[str] = []
    out = export(run, tmp_path / "out", log=lines.append)
    assert AutoTokenizer.from_pretrained(out).chat_template == {"rag": "RAG {{ messages[0].content }}"}
    assert any("rag" in line and "no default one" in line for line in lines)
    assert applied(out, "RAG {{ messages[0].content }}") == "RAG hi"


def test_a_processors_template_is_the_default_one(llama_run: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(llama_run.path, tmp_path / "run")
    (tmp_path / "run/config/chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES["default"]}))
    assert applied(export(RunDirectory.open(tmp_path / "run"), tmp_path / "out")) == "D hi"
