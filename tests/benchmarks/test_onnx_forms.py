"""The bench of forms: what it decodes is what transformers decodes, in each runtime, and its table says where not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.onnx_forms import greedy_text
from benchmarks.onnx_forms_process import measure
from benchmarks.table import forms_section
from exporters.onnx import OnnxExporter
from exporters.onnx.options import OnnxOptions
from signround_edge.run_directory import RunDirectory
from tests.support import make_run

PROMPT = [1, 200, 300, 400]


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_run(tiny_llama, tmp_path_factory.mktemp("run") / "run", "onnx:w4g32")


@pytest.fixture(scope="module")
def folder(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = OnnxOptions(operators="qdq", log=str)
    return OnnxExporter().export(run, tmp_path_factory.mktemp("qdq") / "out", options)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai", "openvino"])
def test_every_runtime_is_timed_on_the_tokens_of_transformers(runtime: str, run: RunDirectory, folder: Path) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    found = measure(folder, runtime, PROMPT, 20, 4)
    assert found["tokens"] == greedy_text(run, PROMPT)
    assert found["tokens_per_cpu_s"] > 0


def test_the_table_says_what_does_not_load_and_where_a_text_differs() -> None:
    rows = [
        {"form": "--a", "bytes": 1000, "runtime": "r", "loads": "yes", "same_tokens": 7, "text_tokens": 20},
        {"form": "--b", "bytes": 2000, "runtime": "r", "loads": "no: it has no INT2"},
    ]
    lines = forms_section("model", {"scheme": "onnx:w4g32", "what": "one round", "rows": rows}).splitlines()
    assert "| `--a` | 1,000 | r | yes | – | – | – | the first 7 tokens |" in lines
    assert "| `--b` | 2,000 | r | no: it has no INT2 | – | – | – | – |" in lines
