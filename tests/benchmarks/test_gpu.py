"""`python -m benchmarks.gpu`: all its parts on a CPU, at tiny sizes; and what becomes of parts that go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.checks import KINDS
from benchmarks.gpu.parts import Options, Part, Row, planned
from benchmarks.gpu.report import Report, markdown
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.supervise import run_parts
from benchmarks.gpu.tables import TABLES

ROOT = Path(__file__).parent.parent.parent
TINY = Options("cpu", tiny=True)

# A machine that is lent has torch, transformers, safetensors, numpy, click, rich and gguf; nothing else may be needed.
ABSENT = (
    "accelerate",
    "datasets",
    "lm_eval",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime_genai",
    "onnxscript",
    "segno",
    "sentencepiece",
    "xllamacpp",
)

# Parts have limits of time, and two threads that share a core with other tests wait for one another.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes where modules are absent; Python runs sitecustomize in every process that it starts."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OUT": str(folder / "out"), **ONE_THREAD}
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (folder / "out" / "table.md").read_text().strip()
    return folder / "out"


@pytest.fixture(scope="module")
def rows(out: Path) -> list[Row]:
    return read(out)


def read(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def of(rows: list[Row], table: str) -> list[Row]:
    return [row for row in rows if row["table"] == table]


def test_every_part_runs_without_the_modules_of_exporters_and_runtimes(rows: list[Row]) -> None:
    assert [row["what"] for row in of(rows, "parts")] == [part.name for part in planned(TINY)]
    assert {row["state"] for row in of(rows, "parts")} == {"done"}
    assert {row["table"] for row in rows} == set(TABLES)


def test_every_row_is_in_the_table(out: Path, rows: list[Row]) -> None:
    text = (out / "table.md").read_text()
    for name, table in TABLES.items():
        section = text.split(f"## {table.title}\n")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(of(rows, name)), name
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, name


def test_a_device_that_is_the_cpu_agrees_with_the_cpu(rows: list[Row]) -> None:
    assert {row["format"] for row in of(rows, "search")} == set(KINDS)
    assert {row["why"] for row in of(rows, "search")} == {"equal"}
    assert {row["why"] for row in of(rows, "gptq")[1:]} == {"equal"}
    assert {row["why"] for row in of(rows, "sign_step")} == {"equal", "all values counted"}
    assert {row["off_grid_percent"] for row in of(rows, "compiled")} == {0}
    assert {row["why"] for row in of(rows, "tuned")} == {"equal"}
    assert {row["as_expected"] for row in of(rows, "runs")} == {"yes"}


def test_a_step_and_its_block_add_up(rows: list[Row]) -> None:
    blocks = [(row["block"], row["format"]) for row in of(rows, "where")]
    assert len(blocks) == len(set(blocks)) == 4
    assert [(row["block"], row["format"]) for row in of(rows, "steps")] == blocks
    for row in of(rows, "steps"):
        sections = ("arguments_ms", "inputs_ms", "targets_ms", "loss_ms", "forward_ms", "backward_ms", "update_ms")
        assert row["sum_ms"] == pytest.approx(sum(row[name] for name in sections))
        assert row["counted_over_formula"] == pytest.approx(1, abs=0.05)
        assert row["of_ceiling_percent"] > 0
    for row in of(rows, "where"):
        shares = ("start_percent", "steps_percent", "checks_percent", "rest_percent")
        assert sum(row[name] for name in shares) == pytest.approx(100)
        assert 0 < row["start_s"] < row["total_s"]
        assert row["loss_tuned"] <= row["loss_start"] <= row["loss_rounded"]
    whole = [row for row in of(rows, "start") if row["what"] == "the block"]
    assert [(row["block"], row["format"]) for row in whole] == blocks
    assert all(row["steps_100"] > 0 for row in whole)


def test_flops_of_a_block_are_known() -> None:
    shape = SHAPES["Llama-3-8B"]
    assert shape.weights() == 218_103_808
    without_attention = shape.step_flops(1, 1) - 3 * 4 * 4096
    assert without_attention == 6 * 218_103_808 - 2 * (4096 + 1024 + 1024) * 4096


def fine(bench: Bench, what: str) -> Iterator[Row]:
    yield {"table": "machine", "what": what, "value": bench.device.type}


def raises(bench: Bench) -> Iterator[Row]:
    yield {"table": "machine", "what": "before it fails", "value": "is kept"}
    torch.ones(2) @ torch.ones(3)


def dies(_: Bench) -> Iterator[Row]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield {}


def breaks_the_device(bench: Bench) -> Iterator[Row]:
    bench.device = torch.device("meta")
    yield {"table": "machine", "what": "before it breaks", "value": "is kept"}


def hangs(_: Bench) -> Iterator[Row]:
    time.sleep(1000)
    yield {}


def part(function: str, expected_s: float = 1, **arguments: str) -> Part:
    return Part(f"{function} {arguments}", "machine", f"{__name__}:{function}", expected_s, arguments)


def run(parts: list[Part], budget_s: float, folder: Path) -> list[Row]:
    run_parts(parts, TINY, budget_s, Report(folder, "Parts that go wrong"))
    return read(folder)


def test_parts_that_go_wrong_are_rows_and_the_others_go_on(tmp_path: Path) -> None:
    parts = [part("raises"), part("dies"), part("breaks_the_device"), part("fine", what="after all"), part("absent")]
    rows = run(parts, 600, tmp_path)
    said = [(row["what"], row.get("value") or row["failed"]) for row in of(rows, "machine")]
    kept = ("before it fails", "is kept"), ("before it breaks", "is kept"), ("after all", "cpu")
    assert set(kept) < set(said)
    (failed,) = [row for row in rows if row["what"] == "raises {}" and "failed" in row]
    assert failed["failed"].startswith("RuntimeError: inconsistent tensor size, expected tensor [2] and src [3]")
    assert "(test_gpu.py:" in failed["failed"]
    assert "torch.ones(2) @ torch.ones(3)" in failed["traceback"]
    assert ("dies {}", "its process ended with -9") in said
    assert any(what == "breaks_the_device {}" and "does not work any more" in why for what, why in said)
    assert any(what == "absent {}" and why.startswith("AttributeError") for what, why in said)
    states = [str(row["state"]).split(":")[0] for row in of(rows, "parts")]
    assert states == ["failed", "failed", "failed", "done", "failed"]
    table = (tmp_path / "table.md").read_text()
    assert all(str(failure["failed"]).split("'")[0] in table for failure in rows if "failed" in failure)


def test_the_budget_ends_a_part_that_hangs_and_skips_what_it_does_not_hold(tmp_path: Path) -> None:
    began = time.monotonic()
    rows = run([part("fine", 1000, what="too long"), part("hangs"), part("fine", what="too late")], 8, tmp_path)
    assert time.monotonic() - began < 30
    states = [row["state"] for row in of(rows, "parts")]
    assert [state.split(":")[0] for state in states] == ["skipped", "failed", "skipped"]
    assert states[0] == "skipped: expected 1000 s, 8 s left"
    assert states[1] == "failed: not done within 8 s"
    assert not any("value" in row for row in of(rows, "machine"))
    assert len(of(rows, "machine")) == 3


@pytest.mark.parametrize("quick", [True, False])
def test_parts_of_a_gpu_are_named_once_and_exist(quick: bool) -> None:
    parts = planned(Options("cuda", quick))
    assert len({part.name for part in parts}) == len(parts)
    assert {part.table for part in parts} < set(TABLES)
    for planned_part in parts:
        module, _, name = planned_part.function.partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_figures_keep_to_their_cells() -> None:
    row: dict[str, Any] = {"table": "machine", "what": "a | b\nc", "value": None}
    assert "| a \\| b c | – |" in markdown("title", [row])
