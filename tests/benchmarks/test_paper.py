"""The paper's tables: every cell can be run, rows are kept, and the page shows what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.paper import bits, granularity, hyperparameters, optimizer
from benchmarks.paper.__main__ import TABLES, main
from benchmarks.paper.experiment import Cell, Setup, planned, summary
from benchmarks.paper.table import document, section

ALL = (bits, granularity, hyperparameters, optimizer)


@pytest.fixture
def setup(tiny_llama: Path, calibration_text: Path, evaluation_text: Path) -> Setup:
    return Setup(tiny_llama, calibration_text, (evaluation_text,))


def row(cell: Cell, setup: Setup, seed: int, kld: float) -> dict[str, object]:
    scores = {"ppl": 30 + kld, "ppl_reference": 30.0, "kld_mean": kld}
    return {"key": cell.key(setup, seed), "seed": seed, "cpu_s": 2.0, "scores": {setup.texts[0].stem: scores}}


@pytest.mark.parametrize("table", ALL, ids=[t.NAME for t in ALL])
def test_cells_of_a_table_differ(table: ModuleType, setup: Setup) -> None:
    cells = table.cells()
    assert len({cell.key(setup, 1) for cell in cells}) == len({(c.scheme, c.label) for c in cells}) == len(cells)


def test_cells_of_two_tables_that_are_the_same_are_measured_once(setup: Setup) -> None:
    both = [*bits.cells(), *granularity.cells()]
    left = planned(both, setup, {})
    assert len(left) < sum(len(cell.seeds(setup)) for cell in both)
    assert len({cell.key(setup, seed) for cell, seed in left}) == len(left)
    measured = {cell.key(setup, seed): {} for cell, seed in left[:10]}
    assert len(planned(both, setup, measured)) == len(left) - 10


def test_methods_without_chance_are_measured_once(setup: Setup) -> None:
    seeds = {cell.label: len(cell.seeds(setup)) for cell in bits.cells()}
    assert seeds["RTN"] == seeds["GPTQ"] == 1
    assert seeds["SignRound v2"] == seeds["ours"] == 3


def test_the_paper_s_recipes_keep_a_rate_of_one_over_steps(setup: Setup) -> None:
    settings = {c.label: c.settings(replace(setup, steps=50)) for c in bits.cells()}
    assert settings["SignRound v2"].lr == settings["SignRound v2"].scale_lr == 1 / 50
    assert settings["SignRound v1"].tune_scales is False
    assert settings["ours"].lr is None


def test_page_gives_mean_spread_and_ratio(setup: Setup) -> None:
    cells = [c for c in bits.cells() if c.scheme == "onnx:w4g128"]
    ours, gptq = cells[-1], next(c for c in cells if c.recipe is None)
    rows = [row(ours, setup, seed, kld) for seed, kld in zip(setup.seeds, (0.010, 0.011, 0.012), strict=True)]
    rows.append(row(gptq, setup, setup.seeds[0], 0.022))
    by_key = {str(r["key"]): r for r in rows}
    found = summary(ours, setup, by_key)
    assert found is not None
    assert found.kld[setup.texts[0].stem] == pytest.approx(0.011)
    assert found.kld_spread[setup.texts[0].stem] == pytest.approx(0.001)
    (line,) = [line for line in section(bits, setup, by_key).splitlines() if line.startswith("| W4G128 | ours |")]
    assert "0.01100 ± 0.00100" in line
    assert "0.50 ×" in line
    page = document(list(ALL), setup, by_key)
    assert "| W4G128 | ours, block-wise |" in page  # the same cell in another table
    assert f"{len(bits.cells()) - 2} rows are not measured yet." in page


def test_unknown_table_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bit"])
    assert "unknown table bit; known are bits, granularity" in capsys.readouterr().err


@pytest.mark.full
def test_every_cell_runs(tmp_path: Path) -> None:
    arguments = ["--quick", "--results", tmp_path / "rows.json", "--page", tmp_path / "paper.md"]
    main([str(a) for a in arguments])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(r["scores"]["speeches-test"]["kld_mean"] > 0 for r in rows)
    page = (tmp_path / "paper.md").read_text()
    assert "not measured yet" not in page
    assert all(f"## {table.TITLE}" in page for table in TABLES.values())


@pytest.mark.full
def test_a_cell_of_each_kind_runs(tmp_path: Path, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"RTN", "GPTQ", "ours"}
    cells = [c for c in bits.cells() if c.scheme == "onnx:w2g32-asym" and c.label in few]
    monkeypatch.setattr(bits, "cells", lambda: cells)
    arguments = ["bits", "--quick", "--results", tmp_path / "rows.json", "--page", tmp_path / "paper.md"]
    main([str(a) for a in arguments])
    rows = (tmp_path / "rows.json").read_text()
    main([str(a) for a in arguments])
    assert (tmp_path / "rows.json").read_text() == rows  # nothing was measured twice
    scores = {r["label"]: r["scores"]["speeches-test"] for r in json.loads(rows)}
    assert set(scores) == few
    assert len({s["kld_mean"] for s in scores.values()}) == len(few)
    assert len({s["ppl_reference"] for s in scores.values()}) == 1
    page = (tmp_path / "paper.md").read_text()
    assert all(f"| W2G32 | {label} |" in page for label in few)
