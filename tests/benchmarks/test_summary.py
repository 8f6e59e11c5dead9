"""The pages of results: what they say is what the stored rows say, and the order in which they say it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks import summary, table
from benchmarks.rows import is_cut_off, names
from benchmarks.summary import beside_gguf, beside_onnx, filled, with_more_steps


def row(tool: str, scheme: str, kl: float, steps: int = 0, size: int = 20_000_000, **more: Any) -> dict[str, Any]:
    figures = {"kld_mean": kl, "kld_stderr": kl / 10, "ppl": 10 + kl, "ppl_reference": 10.0, "tokens": 2040}
    costs = {"wall_s": 5.0, "cpu_s": 4.0, "peak_mb": 3.0, "machine": "this"}
    key = f"{tool} {scheme} {steps} steps, 32x256, batch 4, a.txt → b.txt"
    return {"key": key, "tool": tool, "scheme": scheme, "steps": steps, "bytes": size, **figures, **costs, **more}


def test_pages_hold_what_the_rows_say() -> None:
    for page in summary.PAGES:
        text = page.read_text(encoding="utf-8")
        assert filled(text) == text, f"{page}: run python -m benchmarks.table"
    assert table.TARGET.read_text(encoding="utf-8") == table.document(), "run python -m benchmarks.table"


def test_the_page_of_results_has_a_place_for_every_table() -> None:
    page = summary.PAGES[0].read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (.+?) -->", page)) == set(summary.TABLES)


def test_models_that_were_cut_off_stand_last() -> None:
    assert not is_cut_off(names()[0])
    assert names()[0].startswith("smollm2-135m-offgrid")
    cut_off = [is_cut_off(name) for name in names()]
    assert cut_off == sorted(cut_off)
    headings = re.findall(r"^##? .*$", table.document(), flags=re.MULTILINE)
    first_of_them = headings.index("# Models cut off after their first blocks")
    assert [("-blocks" in h) for h in headings] == [i > first_of_them for i in range(len(headings))]


def test_a_perplexity_without_meaning_is_left_out() -> None:
    page = table.document()
    assert "497128739" not in page
    assert page.count("| – | 0.1523 ± 0.0049 |") == 1


def test_only_what_is_between_the_marks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "TABLES", {"one": lambda: "new"})
    page = "before\n<!-- table: one -->\nold\nold\n<!-- end -->\nafter"
    assert filled(page) == "before\n<!-- table: one -->\nnew\n<!-- end -->\nafter"
    with pytest.raises(KeyError, match="two"):
        filled("<!-- table: two -->\n<!-- end -->")


def test_a_peer_is_shown_at_its_best_and_the_difference_is_named() -> None:
    rows = [
        row("llama-quantize-imatrix", "gguf:q4_0", 0.4, size=20_100_000),
        row("auto-round", "gguf:q4_0", 0.3, 20),
        row("auto-round", "gguf:q4_0", 0.2, 30),
        row("signround-edge", "gguf:q4_0", 0.1, 20),
        row("signround-edge", "gguf:q4_0", 0.01, 30, start="nearest"),  # of the former way
        row("signround-edge", "gguf:q4_0", 0.35),
    ]
    lines = beside_gguf(rows, ["q4_0"]).split("\n")
    cells = "0.4000 / 10.40 (+0.5 % bytes) | 0.2000 / 10.20 (30 steps) | **0.1000 / 10.10** | 0.50 × |"
    assert lines[2] == f"| Q4_0 | 20.0 | {cells}"
    assert "the original's is 10.00" in lines[-2]
    assert "32 × 256 tokens, tuned with 20 steps of 4" in " ".join(lines[-2:])


def test_a_peer_that_has_no_row_has_no_column() -> None:
    rows = [row("llama-quantize-imatrix", "gguf:q4_0", 0.4), row("signround-edge", "gguf:q4_0", 0.1, 20)]
    assert "auto-round" not in beside_gguf(rows, ["q4_0"])


def test_quantizers_of_onnx_runtime_count_that_take_no_more_bytes() -> None:
    rows = [
        row("ort-hqq", "onnx:w4g32", 0.1, size=22_000_000),
        row("ort-rtn", "onnx:w4g32", 0.4, size=20_100_000),
        row("ort-k_quant", "onnx:w4g32", 0.3, size=20_000_000),
        {"key": "", "tool": "olive-gptq", "scheme": "onnx:w4g32", "steps": 0, "failed": "why"},
        row("signround-edge", "gguf:q4_0,onnx:w4g32", 0.06, 20, size=17_000_000, onnx_bytes=20_000_000),
    ]
    line = beside_onnx(rows, ["w4g32"]).split("\n")[2]
    assert line == "| w4g32 | 20.0 | 0.3000 / 10.30 (k_quant) | cannot | **0.0600 / 10.06** | 0.20 × |"
    line = beside_onnx([r for r in rows if r["tool"] not in ("ort-rtn", "ort-k_quant")], ["w4g32"]).split("\n")[2]
    assert "0.1000 / 10.10 (hqq, +10.0 % bytes)" in line


def test_times_of_another_processor_are_not_compared() -> None:
    rows = [
        row("auto-round", "gguf:q4_0", 0.2, 100),
        row("signround-edge", "gguf:q4_0,onnx:w4g32", 0.1, 100, cpu_s=2.0),
        row("signround-edge", "gguf:q4_0,onnx:w4g32", 0.05, 20, machine="that"),
    ]
    lines = with_more_steps(rows).split("\n")[2:5]
    assert "| 2 (0.50 ×) |" in lines[1]
    assert "[1]" in lines[1]
    assert "| 0.0500 ± 0.0050 (0.25 ×) | 5 | 4 | 3 |" in lines[2]
    assert "[2]" in lines[2]
