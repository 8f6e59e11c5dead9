"""The picture of cost against quality."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

from benchmarks.curve import chart, frontier, recipe_of


def row(cpu_s: float, kld: float, sizes: str = "256x256", steps: int = 20, **more: Any) -> dict[str, Any]:
    key = f"signround-edge gguf:q4_0 {steps} steps, {sizes}, batch 8, a → b"
    return {"tool": "signround-edge", "steps": steps, "cpu_s": cpu_s, "kld_mean": kld, "key": key, **more}


def test_frontier_leaves_out_what_is_slower_and_worse() -> None:
    rows = [row(10, 0.010), row(20, 0.005), row(30, 0.006), row(40, 0.002)]
    assert [r["cpu_s"] for r in frontier(rows)] == [10, 20, 40]


def test_rows_of_a_recipe_bear_its_name() -> None:
    assert recipe_of(row(80, 0.005)) == "fast"
    assert recipe_of(row(80, 0.005, positions="follow")) is None
    assert recipe_of(row(300, 0.004, "128x512", 200)) == "default"
    assert recipe_of(row(900, 0.003, "512x512", 1000)) is None
    assert recipe_of(row(900, 0.003, "512x512", 1000, whole_model_steps=200)) == "best"


def test_chart_is_a_picture_with_every_row() -> None:
    rows = [row(80, 0.005), row(300, 0.004, "128x512", 200), {**row(1, 0.006, steps=0), "tool": "llama-quantize"}]
    picture = ElementTree.fromstring(chart(rows, "tiny-llama"))
    assert len(picture.findall("circle")) == 3
    texts = {element.text for element in picture.findall("text")}
    assert {"fast: 256 × 256, 20", "default: 128 × 512, 200", "llama-quantize"} <= texts


def test_chart_names_peers_recipes_and_the_frontier_once_each() -> None:
    ours = [row(9, 0.006, steps=0), row(80, 0.005), row(90, 0.007, "96x256", 80), row(95, 0.005, start="nearest")]
    peers = [{**row(cost, 0.006, steps=0), "tool": "llama-quantize"} for cost in (1, 2)]
    picture = ElementTree.fromstring(chart([*ours, *peers], "tiny-llama"))
    assert len(picture.findall("circle")) == 6
    texts = [element.text or "" for element in picture.findall("text")]
    assert [texts.count(name) for name in ("llama-quantize", "fast: 256 × 256, 20", "256 × 256, 0")] == [1, 1, 1]
    assert not any("96 × 256" in text or "from nearest" in text for text in texts)
