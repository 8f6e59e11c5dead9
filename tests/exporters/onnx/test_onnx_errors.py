from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions, options_for
from exporters.onnx import OnnxExporter
from exporters.onnx import export as export_module
from exporters.onnx.bindings import Binding
from exporters.onnx.builder_classes import BuilderClass
from exporters.onnx.options import OnnxOptions
from exporters.onnx.routes import built
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import BASE, Exported, export

MakeRun = Callable[[PretrainedConfig, str], RunDirectory]


def refused(run: RunDirectory, out: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        export(run, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.with_name(out.name + ".partial").exists()
    return str(caught.value)


def test_a_grid_with_a_minimum_names_schemes_that_export(make_random_run: MakeRun, tmp_path: Path) -> None:
    run = make_random_run(LlamaConfig(**{**BASE, "num_hidden_layers": 1}), "gguf:q4_1")
    message = refused(run, tmp_path / "out")
    assert "Q4_1" in message
    assert "gguf:q4_0, gguf:q5_0, gguf:q8_0" in message
    assert "--dtype f32" in message


def test_options_without_a_meaning_are_refused(llama_run: RunDirectory, tmp_path: Path) -> None:
    assert "0, 1 and 4" in refused(llama_run, tmp_path / "out", accuracy_level=2)
    assert "f32 or f16" in refused(llama_run, tmp_path / "out", dtype="bf16")
    assert "f32 or f16" in refused(llama_run, tmp_path / "out", scale_dtype="bf16")


@pytest.mark.parametrize("option", [{"scale_dtype": "f16"}, {"accuracy_level": 4}])
def test_what_floats_do_not_have_is_refused_with_them(option: dict[str, object]) -> None:
    with pytest.raises(UserError, match="is for integers, and --dtype f16 writes floats; give one of them"):
        OnnxOptions(dtype="f16", **option)  # type: ignore[arg-type]


def test_no_cache_is_refused_with_a_graph_of_ones_own() -> None:
    with pytest.raises(UserError, match=r"--no-cache .* --template brings its own; give one of them"):
        OnnxOptions(template=Path("float.onnx"), no_cache=True)


class OtherExporter(OnnxExporter):
    """A third party's format, which shares one option with ONNX and lacks the others."""

    @dataclass(frozen=True)
    class Options(ExportOptions):
        ort_format: bool = False

    name = "other"
    options: type[ExportOptions] = Options


def test_an_option_of_other_formats_is_refused_and_they_are_named() -> None:
    known = {"gguf": GgufExporter(), "onnx": OnnxExporter(), "other": OtherExporter()}
    assert options_for("onnx", known, {"accuracy_level": 4, "dtype": None}) == OnnxOptions(accuracy_level=4)
    assert options_for("other", known, {"ort_format": True}) == OtherExporter.Options(ort_format=True)
    for target, name, sentence in (
        ("gguf", "scale_dtype", "--scale-dtype is for --format onnx; leave it out for GGUF"),
        ("gguf", "ort_format", "--ort-format is for --format onnx or other; leave it out for GGUF"),
        ("other", "accuracy_level", "--accuracy-level is for --format onnx; leave it out for OTHER"),
    ):
        with pytest.raises(UserError) as caught:
            options_for(target, known, {name: "f16"})
        assert str(caught.value) == sentence


def test_options_of_every_format_are_enough(llama_run: RunDirectory, llama_export: Exported, tmp_path: Path) -> None:
    out = OnnxExporter().export(llama_run, tmp_path / "out", ExportOptions(log=str))
    assert (out / "signround_edge.json").read_bytes() == (llama_export.folder / "signround_edge.json").read_bytes()


def test_other_peoples_files_and_folders_are_left_alone(llama_run: RunDirectory, tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert "is a file" in refused(llama_run, file)
    assert "other files" in refused(llama_run, folder)
    assert file.read_text() == (folder / "thesis.txt").read_text() == "mine"


def test_a_run_without_tokenizer_is_one_sentence(llama_run: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(llama_run.path, tmp_path / "run")
    for file in (tmp_path / "run" / "config").glob("tokenizer*"):
        file.unlink()
    message = refused(RunDirectory.open(tmp_path / "run"), tmp_path / "out")
    assert "tokenizer" in message
    (tmp_path / "run" / "config" / "config.json").write_text("{")
    assert "config.json" in refused(RunDirectory.open(tmp_path / "run"), tmp_path / "out")


def test_a_full_disk_leaves_the_earlier_export_and_no_partial_one(
    llama_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(llama_export.folder, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(model: ir.Model, path: Path, most: int | None, ending: str) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "write_model", full)
    assert "disk is full" in refused(llama_export.run, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_killed_exports_leftovers_are_cleaned(
    llama_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / "out.partial" / "staging"
    leftover.mkdir(parents=True)
    (leftover / "half.safetensors").write_bytes(b"half")

    def killed(model: ir.Model, path: Path, most: int | None, ending: str) -> None:
        assert not (leftover / "half.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "write_model", killed)
    with pytest.raises(KeyboardInterrupt):
        export(llama_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def traced_because(run: RunDirectory, out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line that says why the builder's graph is not taken."""

    def trace(*arguments: object) -> None:
        raise UserError("traced")

    monkeypatch.setattr(export_module, "trace", trace)
    lines: list[str] = []
    with pytest.raises(UserError, match="traced"):
        export(run, out, log=lines.append)
    assert list(out.parent.iterdir()) == []
    (line,) = [line for line in lines if "tracing it" in line]
    return line


def test_a_builder_that_changes_a_value_is_caught_and_the_tensor_named(
    llama_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = built.build_graph

    def build_wrongly(model: nn.Module, row: BuilderClass, config: Path, out: Path, pack_qkv: bool = True) -> ir.Model:
        graph = build(model, row, config, out, pack_qkv)
        value = graph.graph.initializers["model.layers.1.mlp.down_proj.MatMul.weight"]
        array = value.const_value.numpy().copy()
        array[3, 5] *= 2
        value.const_value = ir.Tensor(array)
        return graph

    monkeypatch.setattr(built, "build_graph", build_wrongly)
    line = traced_because(llama_run, tmp_path / "out", monkeypatch)
    assert "tensor model.layers.1.mlp.down_proj.weight of the run directory is not in the ONNX graph" in line


def test_a_parameter_that_the_graph_does_not_hold_is_caught(
    llama_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = built.recognise

    def without_the_last_norm(*arguments: Any) -> list[Binding]:
        return [b for b in find(*arguments) if b.parameters != ("model.norm.weight",)]

    monkeypatch.setattr(built, "recognise", without_the_last_norm)
    assert "tensor model.norm.weight " in traced_because(llama_run, tmp_path / "out", monkeypatch)


def test_a_row_that_the_graph_does_not_hold_is_caught(
    llama_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = built.recognise

    def without_a_row(*arguments: Any) -> list[Binding]:
        name = "model.layers.0.mlp.up_proj.weight"
        return [replace(b, rows=((0, 511),)) if b.parameters == (name,) else b for b in find(*arguments)]

    monkeypatch.setattr(built, "recognise", without_a_row)
    line = traced_because(llama_run, tmp_path / "out", monkeypatch)
    assert "tensor model.layers.0.mlp.up_proj.weight " in line


def test_a_bias_of_zeros_may_be_left_out(make_random_run: MakeRun, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from tests.support import make_run

    run = make_random_run(Qwen2Config(**{**BASE, "num_hidden_layers": 1}), "onnx:w4g32")
    model = Path(run.manifest.source["model"])
    tensors = load_file(model / "model.safetensors")
    tensors |= {name: torch.zeros_like(t) for name, t in tensors.items() if name.endswith(".bias")}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = export(make_run(model, tmp_path / "run", "onnx:w4g32"), tmp_path / "out")
    sidecar = json.loads((out / "signround_edge.json").read_text())
    assert sidecar["zero_biases"] == [f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"]
