"""Parts of the charts that certificates and `analyze` draw: inline SVG, no script, nothing from elsewhere.

Colours come from CSS classes: the page's own, or `STYLE` for a picture that stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 640, 210
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 12, 44

# Classes: grid, line, band, bar, off and limit as in certificates; other, second colour of two.
STYLE = """<style>
:root { --soft: #5b6570; --line: #d8dde3; --panel: #ffffff; --data: #2a6fb0; --other: #d9822b; --band: #bcd6ee;
  --bad: #b02a37; --open: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --soft: #a2acb7; --line: #3a424c; --panel: #15191e; --data: #6fb1ec;
  --other: #f0a35e; --band: #2d4a66; --bad: #f0818b; --open: #e5b45a; } }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
svg .panel { fill: var(--panel); } svg .line { fill: none; stroke: var(--data); stroke-width: 1.4; }
svg .line.other { stroke: var(--other); } svg .dot { fill: var(--data); } svg .dot.other { fill: var(--other); }
svg .band { fill: var(--band); } svg .bar { fill: var(--data); } svg .bar.other { fill: var(--other); }
svg .limit { stroke: var(--open); stroke-dasharray: 5 4; }
</style>"""


def scale_y(low: float, high: float) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Value → y of the picture."""
    return lambda v: TOP + (HEIGHT - TOP - BOTTOM) * (1 - (np.nan_to_num(v, nan=low) - low) / ((high - low) or 1))


def scale_x(low: float, high: float) -> Callable[[float], float]:
    """Value → x of the picture."""
    return lambda v: LEFT + (WIDTH - LEFT - RIGHT) * (float(v) - low) / ((high - low) or 1)


def points(pairs: Iterable[tuple[float, float]]) -> str:
    """Coordinates of a polyline or polygon."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def label_below(x: float, label: str, anchor: str = "middle") -> str:
    """A label of the x axis; `label` is escaped already."""
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{anchor}">{label}</text>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Squares with their meaning at the top right: (CSS class of a bar, text)."""
    x, drawn = float(WIDTH - RIGHT), ""
    for kind, text in reversed(entries):
        x -= 6.2 * len(text) + 22
        drawn += f'<rect class="{kind}" x="{x:.1f}" y="{TOP - 9}" width="9" height="9"/>'
        drawn += f'<text x="{x + 13:.1f}" y="{TOP}">{escape(text)}</text>'
    return drawn


def frame(caption: str, body: str, ticks: Sequence[tuple[float, str]]) -> str:
    """A picture: grid lines with tick labels (y, text) at the left, the body, and the caption below."""
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for y, label in ticks
    )
    middle = (LEFT + WIDTH) / 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">{grid}{body}'
        f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(caption)}</text></svg>'
    )


def standing_alone(svg: str) -> str:
    """A picture as a file of its own, with its colours and a background."""
    start, _, rest = svg.partition(">")
    size = f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
    background = f'<rect class="panel" width="{WIDTH}" height="{HEIGHT}"/>'
    return f"{start.replace('<svg', f'<svg {size}', 1)}>{STYLE}{background}{rest}\n"
