"""The picture of KL divergence against bytes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from benchmarks.picture import FILLED, HOLLOW, TARGET, Axes, lowest_of_each, of_more_steps, picture
from benchmarks.rows import kl, measured, read

SVG = "{http://www.w3.org/2000/svg}"


def row(tool: str, scheme: str, size: int, divergence: float, steps: int = 20, **more: Any) -> dict[str, Any]:
    key = f"{tool} {scheme} {steps} steps, 64x256, batch 8, a → b"
    return {"key": key, "tool": tool, "scheme": scheme, "bytes": size, "kld_mean": divergence, "steps": steps, **more}


def marks(drawn: ElementTree.Element) -> list[ElementTree.Element]:
    found = [element for element in drawn.iter() if "mark" in element.get("class", "")]
    return [element for element in found if element.find(f"{SVG}title") is not None]


def middle(mark: ElementTree.Element) -> tuple[float, float]:
    if mark.tag == f"{SVG}circle":
        return float(mark.attrib["cx"]), float(mark.attrib["cy"])
    if mark.tag == f"{SVG}rect":
        return float(mark.attrib["x"]) + 3.5, float(mark.attrib["y"]) + 3.5
    left, _, top = (tuple(map(float, corner.split(","))) for corner in mark.attrib["points"].split(" "))
    return left[0] + 5, top[1] + 5


def test_the_picture_is_of_the_stored_rows() -> None:
    filled, hollow = lowest_of_each(read(FILLED)), of_more_steps(read(HOLLOW))
    assert TARGET.read_text(encoding="utf-8") == picture(filled, hollow), "run python -m benchmarks.picture"


def test_every_point_is_a_row_at_its_place() -> None:
    filled, hollow = lowest_of_each(read(FILLED)), of_more_steps(read(HOLLOW))
    rows = [*filled, *hollow]
    stored = [*measured(read(FILLED)), *measured(read(HOLLOW))]
    assert all(r in stored for r in rows)
    axes = Axes(min(r["kld_mean"] for r in rows), max(r["kld_mean"] for r in rows))
    drawn = marks(ElementTree.parse(TARGET).getroot())
    assert len(drawn) == len(rows)
    for mark, r in zip(drawn, rows, strict=True):
        x, y = middle(mark)
        assert abs(x - axes.x(r["bytes"] / 1e6)) < 0.1
        assert abs(y - axes.y(r["kld_mean"])) < 0.1
        said = mark.findtext(f"{SVG}title") or ""
        assert said.startswith(f"{r['tool']}, ")
        assert said.endswith(f"{r['bytes'] / 1e6:.1f} MB, KL divergence {kl(r['kld_mean'])}")


def test_peers_are_shown_at_their_best_and_ours_in_the_way_of_today() -> None:
    rows = [
        row("auto-round", "gguf:q4_0", 100, 0.3, 20),
        row("auto-round", "gguf:q4_0", 100, 0.2, 30),
        row("signround-edge", "gguf:q4_0", 100, 0.1),
        row("signround-edge", "gguf:q4_0", 100, 0.05, start="nearest"),
        row("signround-edge", "gguf:q4_0", 100, 0.4, 0),
        row("gptq", "onnx:w4g32", 100, 0.01),
    ]
    assert [r["kld_mean"] for r in lowest_of_each(rows)] == [0.2, 0.1]


def test_points_with_more_steps_are_of_one_text() -> None:
    rows = [row("auto-round", "gguf:q4_0", 100, 0.3, 100), row("signround-edge", "gguf:q4_0", 100, 0.1, 100)]
    other = row("signround-edge", "gguf:q4_0", 100, 0.09, 100) | {"key": "x 100 steps, 128x256, batch 8, a → b"}
    assert of_more_steps([*rows, other, row("auto-round", "gguf:q4_0", 100, 0.3, 50)]) == rows


def test_no_label_lies_on_another_or_outside() -> None:
    drawn = ElementTree.parse(TARGET).getroot()
    width, height = float(drawn.attrib["width"]), float(drawn.attrib["height"])
    labels = [e for e in drawn.iter(f"{SVG}text") if e.get("class") == "name"]
    presets = {r["scheme"].removeprefix("gguf:").upper() for r in lowest_of_each(read(FILLED))}
    assert {e.text for e in labels} == presets
    boxes = []
    for label in labels:
        x, y, wide = float(label.attrib["x"]), float(label.attrib["y"]), 6.2 * len(label.text or "")
        boxes.append((x - wide / 2, y - 9, x + wide / 2, y + 2))
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left > 0
        assert right < width
        assert top > 0
        assert bottom < height
        for other in boxes[:i]:
            assert left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom


def test_both_axes_have_units_and_the_title_says_what_it_shows() -> None:
    drawn = ElementTree.parse(TARGET).getroot()
    texts = " | ".join(e.text or "" for e in drawn.iter(f"{SVG}text"))
    assert "size of all tensors, MB" in texts
    assert "mean KL divergence, nats" in texts
    assert "At equal bytes" in texts
    assert "SmolLM2-135M-Instruct (off-grid)" in texts
    assert re.search(r"prefers-color-scheme: dark", TARGET.read_text())
