"""How near to the original our files stay, beside auto-round's and llama.cpp's of the same size: docs/results.svg.

    python -m benchmarks.picture

Every point is a row of benchmarks/results/ of the model to judge by. Filled points share calibration text, samples and
evaluation; of a tool's rows of one preset the one of lowest KL divergence is shown. Hollow points had twice the text,
more steps and three times the windows. Both axes are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.rows import AUTO_ROUND, IMATRIX, OURS, Row, is_of_today, is_tuned, kl, measured, read, text_of
from signround_edge.files import write_atomically
from signround_edge.svg import STYLE

TARGET = Path(__file__).parent.parent / "docs" / "results.svg"
FILLED, HOLLOW = "smollm2-135m-offgrid-presets", "smollm2-135m-offgrid"
HOLLOW_TEXT, HOLLOW_STEPS = "64x256, batch 8", 100
TITLE = "At equal bytes: how far is the quantized model from the original?"
BELOW_TITLE = "SmolLM2-135M-Instruct (off-grid) as GGUF presets. Lower is better; both axes are logarithmic."
CLASSES = {IMATRIX: "llama", AUTO_ROUND: "auto", OURS: "ours"}
NAMES = {IMATRIX: "llama.cpp's quantizer, importance matrix", AUTO_ROUND: "auto-round", OURS: "signround-edge"}

WIDTH, HEIGHT = 1000, 580
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 68, 56
LINE = 13.0  # from one line of labels to the next
MEGABYTES = (77, 83, 90, 100, 110, 120, 130, 140, 160, 180, 200, 220, 240)
COLOURS = """<style>
:root { --ink: #1c2126; } @media (prefers-color-scheme: dark) { :root { --ink: #e8ecf0; } }
svg .title { font-size: 17px; font-weight: 600; fill: var(--ink); } svg .wide { font-size: 13px; }
svg .name { fill: var(--ink); } svg .drop { stroke: var(--line); stroke-width: 1.5; }
svg .mark { stroke-width: 1.8; } svg .llama { fill: var(--soft); stroke: var(--soft); }
svg .auto { fill: var(--other); stroke: var(--other); } svg .ours { fill: var(--data); stroke: var(--data); }
svg .mark.hollow { fill: none; }
</style>"""


@dataclass(frozen=True)
class Axes:
    """Both scales, logarithmic: megabytes → x and KL divergence → y of the picture."""

    lowest: float
    highest: float

    def x(self, megabytes: float) -> float:
        start, end = math.log10(MEGABYTES[0]), math.log10(MEGABYTES[-1] + 8)
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(megabytes) - start) / (end - start)

    def y(self, divergence: float) -> float:
        start, end = math.log10(self.lowest) - 0.25, math.log10(self.highest) + 0.15
        return TOP + (HEIGHT - TOP - BOTTOM) * (end - math.log10(divergence)) / (end - start)


@dataclass(frozen=True)
class Point:
    """A row in the picture: `x` and `y` of its middle, `hollow` as in the module's text."""

    row: Row
    x: float
    y: float
    hollow: bool

    @property
    def preset(self) -> str:
        """The preset as llama.cpp writes it."""
        return _preset(self.row)


def _preset(row: Row) -> str:
    return str(row["scheme"]).split(",")[0].removeprefix("gguf:").upper()


def lowest_of_each(rows: Sequence[Row]) -> list[Row]:
    """Of llama.cpp's, auto-round's and our tuned rows the one of lowest KL divergence for each preset."""
    best: dict[tuple[str, str], Row] = {}
    for row in measured(list(rows)):
        key = row["tool"], row["scheme"]
        wanted = row["tool"] in CLASSES and row["scheme"].startswith("gguf:")
        if row["tool"] == OURS:
            wanted = wanted and is_tuned(row) and is_of_today(row)
        if wanted and (key not in best or row["kld_mean"] < best[key]["kld_mean"]):
            best[key] = row
    return list(best.values())


def of_more_steps(rows: Sequence[Row]) -> list[Row]:
    """auto-round's row and ours with more text and steps."""
    found = [r for r in measured(list(rows)) if r["tool"] in (AUTO_ROUND, OURS) and r["steps"] == HOLLOW_STEPS]
    return [r for r in found if is_of_today(r) and text_of(r).startswith(HOLLOW_TEXT)]


def picture(filled: Sequence[Row], hollow: Sequence[Row]) -> str:
    """The picture as SVG."""
    divergences = [float(r["kld_mean"]) for r in (*filled, *hollow)]
    axes = Axes(min(divergences), max(divergences))
    placed = [
        Point(row, axes.x(row["bytes"] / 1e6), axes.y(row["kld_mean"]), is_hollow)
        for rows, is_hollow in ((filled, False), (hollow, True))
        for row in rows
    ]
    body = [*_frame(axes), *_drops(placed), *(_mark(p) for p in placed), *_labels(placed), *_legend(filled, hollow)]
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    background = f'<rect class="panel" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    return f'{start} role="img" aria-label="{escape(TITLE)}">{STYLE}{COLOURS}{background}{"".join(body)}</svg>\n'


def _frame(axes: Axes) -> Iterator[str]:
    yield f'<text class="title" x="{LEFT}" y="28">{escape(TITLE)}</text>'
    yield f'<text class="wide" x="{LEFT}" y="49">{escape(BELOW_TITLE)}</text>'
    for value in (10.0**power for power in range(-6, 4)):
        y = axes.y(value)
        if TOP <= y <= HEIGHT - BOTTOM:
            yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    bottom = HEIGHT - BOTTOM
    yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    for megabytes in MEGABYTES:
        x = axes.x(megabytes)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{megabytes}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="wide" x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">size of all tensors, MB</text>'
    across = (TOP + bottom) / 2
    yield (
        f'<text class="wide" transform="translate(20 {across:.0f}) rotate(-90)" text-anchor="middle">'
        "mean KL divergence, nats</text>"
    )


def _drops(placed: Sequence[Point]) -> Iterator[str]:
    """A line from llama.cpp's file of a preset down to ours."""
    for peer, ours in _pairs(placed):
        yield f'<line class="drop" x1="{peer.x:.1f}" y1="{peer.y:.1f}" x2="{ours.x:.1f}" y2="{ours.y:.1f}"/>'


def _pairs(placed: Sequence[Point]) -> list[tuple[Point, Point]]:
    ours = {p.preset: p for p in placed if p.row["tool"] == OURS and not p.hollow}
    return [(p, ours[p.preset]) for p in placed if p.row["tool"] == IMATRIX and p.preset in ours]


def _mark(point: Point) -> str:
    row = point.row
    says = f"{row['tool']}, {point.preset}: {row['bytes'] / 1e6:.1f} MB, KL divergence {kl(row['kld_mean'])}"
    return _shape(CLASSES[row["tool"]], point.hollow, point.x, point.y, f"<title>{escape(says)}</title>")


def _shape(kind: str, hollow: bool, x: float, y: float, title: str = "") -> str:
    """A square, triangle or circle around (x, y), so that colours are not needed to tell them apart."""
    classes = f'class="mark {kind}{" hollow" if hollow else ""}"'
    if kind == "llama":
        return f'<rect {classes} x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7">{title}</rect>'
    if kind == "auto":
        corners = f"{x - 5:.1f},{y + 4:.1f} {x + 5:.1f},{y + 4:.1f} {x:.1f},{y - 5:.1f}"
        return f'<polygon {classes} points="{corners}">{title}</polygon>'
    return f'<circle {classes} cx="{x:.1f}" cy="{y:.1f}" r="{6.5 if hollow else 4.2}">{title}</circle>'


def _labels(placed: Sequence[Point]) -> Iterator[str]:
    """The presets beside our files, those of neighbours below one another, where no point, line or label is."""
    taken = [(p.x - 6, p.y - 6, p.x + 6, p.y + 6) for p in placed]
    taken += [(ours.x - 2, peer.y, ours.x + 2, ours.y) for peer, ours in _pairs(placed)]
    for group in _neighbours([p for p in placed if p.row["tool"] == OURS and not p.hollow]):
        wide, high = 7.2 * max(len(p.preset) for p in group), LINE * len(group)
        middle = sum(p.x for p in group) / len(group)
        top, bottom = group[0].y, group[-1].y
        below, beside = bottom + 8, (top + bottom - high) / 2
        left, right, centred = middle - wide - 9, middle + 9, middle - wide / 2
        places = [(centred, below), (right, beside), (left, beside), (right, below), (left, below)]
        places += [(centred + dx, below + dy) for dy in (LINE, 2 * LINE) for dx in (0, wide / 2, -wide / 2)]
        boxes = [(x, y, x + wide, y + high) for x, y in places]
        box = next((b for b in boxes if _inside(b) and not any(_overlap(b, t) for t in taken)), boxes[0])
        taken.append(box)
        for i, point in enumerate(group):
            at = f'x="{(box[0] + box[2]) / 2:.1f}" y="{box[1] + LINE * (i + 1) - 3:.1f}"'
            yield f'<text class="name" {at} text-anchor="middle">{escape(point.preset)}</text>'


def _neighbours(ours: Iterable[Point]) -> list[list[Point]]:
    """Points by the left to the right, those together that are too near for a label each; the highest first."""
    groups: list[list[Point]] = []
    for point in sorted(ours, key=lambda p: p.x):
        if groups and math.dist((groups[-1][-1].x, groups[-1][-1].y), (point.x, point.y)) < 12:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [sorted(group, key=lambda p: p.y) for group in groups]


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _inside(box: Box) -> bool:
    return box[0] > LEFT and box[2] < WIDTH - 4 and box[1] > TOP and box[3] < HEIGHT - BOTTOM


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(filled: Sequence[Row], hollow: Sequence[Row]) -> Iterator[str]:
    """At the top right, where no point is: large files are near the original."""
    x, y, high = WIDTH - RIGHT - 376, TOP + 12, 21 * (len(CLASSES) + len(hollow))
    yield f'<rect class="panel" x="{x - 14}" y="{y - 10}" width="394" height="{high}"/>'
    for tool, kind in CLASSES.items():
        steps = sorted({r["steps"] for r in filled if r["tool"] == tool} - {0})
        yield _shape(kind, False, x, y)
        yield _entry(x, y, NAMES[tool] + (f", {' or '.join(map(str, steps))} steps" if steps else ""))
        y += 21
    for row in hollow:
        yield _shape(CLASSES[row["tool"]], True, x, y)
        what = f"{NAMES[row['tool']]}, {_preset(row)}, {row['steps']} steps, twice the text: {kl(row['kld_mean'])}"
        yield _entry(x, y, what)
        y += 21


def _entry(x: float, y: float, text: str) -> str:
    return f'<text class="wide name" x="{x + 14}" y="{y + 4}">{escape(text)}</text>'


def main() -> None:
    """Command line."""
    write_atomically(TARGET, picture(lowest_of_each(read(FILLED)), of_more_steps(read(HOLLOW))).encode())
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
