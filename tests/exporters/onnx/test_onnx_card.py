"""The folder's card, what level 4 costs, and the example of docs/onnx.md."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exporters.interface import LevelCost
from exporters.onnx.artifact.reader import changed_files, read_tensors
from runtime_tests import accuracy_levels
from runtime_tests.accuracy_levels import level_4_measurement
from runtime_tests.worker.onnxruntime_engine import OnnxEngine
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import Exported, export
from tests.exporters.onnx.test_onnx_export import expected_tokens, mean_kl

DOCS = Path(__file__).parents[3] / "docs" / "onnx.md"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the people of the world have told the world of the people " * 300)
    return path


@pytest.fixture(scope="module")
def measured(llama_run: RunDirectory, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    measure = level_4_measurement(llama_run.config_dir, text)
    out = tmp_path_factory.mktemp("card") / "out"
    return Exported(llama_run, export(llama_run, out, accuracy_level=1, measure_level_4=measure))


def test_the_card_says_which_level_and_what_level_4_costs(measured: Exported) -> None:
    sidecar = json.loads((measured.folder / "signround_edge.json").read_text())
    cost = LevelCost(**sidecar["level_4_cost"])
    card = (measured.folder / "README.md").read_text()
    assert "1: MatMulNBits computes in f32" in card
    assert f"| perplexity | {cost.ppl_floats:.4f} | {cost.ppl_level_4:.4f} |" in card
    assert f"{cost.kld_mean:.2e}" in card
    assert "words.txt" in card
    assert f"{sum(size for *_, size in read_tensors(measured.folder)):,}" in card
    assert changed_files(measured.folder) == []


def test_the_cost_is_that_of_the_graph_at_both_levels(measured: Exported, text: Path) -> None:
    cost = level_4_measurement(measured.run.config_dir, text)(measured.folder)
    assert isinstance(cost, LevelCost)
    from signround_edge.evaluation.perplexity import text_windows

    windows = text_windows(measured.run.config_dir, text, 256, 8)
    assert cost.tokens == len(windows.tokens) * 127
    at = {level: OnnxEngine(measured.folder, accuracy_level=level) for level in (1, 4)}
    kl = [
        mean_kl(*(torch.from_numpy(at[level].logits(window)[windows.scored]) for level in (1, 4)))
        for window in windows.tokens
    ]
    assert cost.kld_mean == pytest.approx(sum(kl) / len(kl), rel=1e-2)
    assert cost.kld_mean > 1e-6


def test_without_figures_the_card_says_why(
    llama_export: Exported, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "was not measured: nobody asked for it" in (llama_export.folder / "README.md").read_text()
    monkeypatch.setattr(accuracy_levels, "UNASKED_BYTES", 1000)
    reason = level_4_measurement(llama_export.run.config_dir, None)(llama_export.folder)
    assert "export with --card-text" in str(reason)
    assert isinstance(level_4_measurement(llama_export.run.config_dir, text)(llama_export.folder), LevelCost)
    with pytest.raises(UserError, match=r"--card-text .*nowhere does not exist"):
        level_4_measurement(llama_export.run.config_dir, tmp_path / "nowhere")


def test_a_graph_of_floats_has_no_level(llama_run: RunDirectory, tmp_path: Path) -> None:
    out = export(llama_run, tmp_path / "out", dtype="f32")
    assert "Accuracy level" not in (out / "README.md").read_text()


def test_the_example_of_the_docs_generates_what_torch_generates(llama_export: Exported, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 20
    shutil.copytree(llama_export.folder, tmp_path / "model-onnx")
    (tmp_path / "example.py").write_text(code + "print(json.dumps(text))\n")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    tokens = json.loads(done.stdout.splitlines()[-1])
    prompt = tokens[:-20]
    assert len(prompt) > 3
    assert tokens == expected_tokens(llama_export.run, prompt, len(prompt) + 20)
