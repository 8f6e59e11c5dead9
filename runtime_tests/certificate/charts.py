"""The certificate's pictures as inline SVG: no script, nothing from elsewhere. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from signround_edge.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, frame, label_below, points, scale_x, scale_y

FloatSeries = Sequence[float | None]

_BINS = 240  # of the loss picture: more tokens than that share a bin
_WINDOWS_PARTED = 40  # more lines than that would hide the picture
_SMALLEST = 1e-12  # a divergence of zero, and rounding below zero, are drawn here


def loss_differences(nll: FloatSeries, nll_reference: FloatSeries, windows: int) -> str:
    """Loss of the runtime minus torch's, token after token: the mean of a bin as a line in the band of its extremes."""
    differences = _finite(nll) - _finite(nll_reference)
    parts = np.array_split(differences, min(_BINS, len(differences)))
    known = [part[np.isfinite(part)] for part in parts]
    if not any(len(part) for part in known):
        return frame("No token's loss is a number.", "", [])
    low, mean, high = (np.array([f(part) if len(part) else 0.0 for part in known]) for f in (np.min, np.mean, np.max))
    extreme = max(float(np.abs([low, high]).max()), 1e-9)
    ticks = [(value, f"{value:+.2g}" if value else "0") for value in (-extreme, 0.0, extreme)]
    x = np.linspace(LEFT, WIDTH - RIGHT, len(parts))
    y = scale_y(-extreme, extreme)
    band = [*zip(x, y(high), strict=True), *reversed(list(zip(x, y(low), strict=True)))]
    width = WIDTH - LEFT - RIGHT
    edges = [LEFT + width * i / windows for i in range(1, windows)] if windows <= _WINDOWS_PARTED else []
    body = "".join(f'<line class="grid" x1="{e:.1f}" x2="{e:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for e in edges)
    line = zip(x, y(mean), strict=True)
    body += f'<polygon class="band" points="{points(band)}"/><polyline class="line" points="{points(line)}"/>'
    caption = f"{len(differences):,} scored tokens of {windows} windows, in the text's order"
    return frame(caption, body, [(float(y(np.array(value))), label) for value, label in ticks])


def divergence_histogram(kld: FloatSeries, limit: float | None) -> str:
    """How many tokens have which KL divergence, in steps of a third of a power of ten.

    `limit` is the gate of the mean, or None.
    """
    values = _finite(kld)
    values = np.maximum(values[np.isfinite(values)], _SMALLEST)
    if not len(values):
        return frame("No token's divergence is a number.", "", [])
    exponents = np.log10(values)
    first = math.floor(exponents.min())
    last = max(math.ceil(exponents.max()), first + 1, math.ceil(math.log10(limit)) if limit else first + 1)
    counts, edges = np.histogram(exponents, bins=3 * (last - first), range=(first, last))
    x = scale_x(first, last)
    y = scale_y(0, float(counts.max()))
    tops = y(counts.astype(np.float64))
    bars = [
        f'<rect class="bar" x="{x(a) + 0.5:.1f}" y="{top:.1f}" width="{max(x(b) - x(a) - 1, 0.5):.1f}" '
        f'height="{HEIGHT - BOTTOM - top:.1f}"/>'
        for top, a, b in zip(tops, edges, edges[1:], strict=False)
    ]
    step = max(1, (last - first) // 8)
    labels = "".join(label_below(x(e), f"1e{e}", "start" if e == first else "middle") for e in range(first, last, step))
    line = _limit_line(x(math.log10(limit)), "gate of the mean") if limit else ""
    ticks = [(float(y(np.array(v))), f"{v:,.0f}") for v in (0, counts.max())]
    return frame("KL divergence from torch in nats (bars: number of tokens)", "".join(bars) + line + labels, ticks)


def layer_errors(names: Sequence[str], errors: FloatSeries, limit: float) -> str:
    """Relative error of each layer's hidden states in floats, on a logarithmic scale, with the limit."""
    drawn = [max(error, 1e-9) if error is not None else 10.0 for error in errors]
    low = math.floor(math.log10(min([*drawn, limit])))
    high = max(math.ceil(math.log10(max([*drawn, limit]))), low + 1)
    y = scale_y(low, high)
    slot = (WIDTH - LEFT - RIGHT) / len(drawn)
    body = ""
    for i, (name, error) in enumerate(zip(names, drawn, strict=True)):
        top = float(y(np.array(math.log10(error))))
        kind = "bar" if error <= limit else "bar off"
        body += (
            f'<rect class="{kind}" x="{LEFT + i * slot + slot * 0.1:.1f}" y="{top:.1f}" width="{slot * 0.8:.1f}" '
            f'height="{max(HEIGHT - BOTTOM - top, 1):.1f}"><title>{escape(name)}: {error:.2g}</title></rect>'
        )
    at = float(y(np.array(math.log10(limit))))
    body += f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
    body += label_below(LEFT + slot / 2, "embedding", "start") + label_below(WIDTH - RIGHT, escape(names[-1]), "end")
    ticks = [(float(y(np.array(e))), f"1e{e}") for e in range(low, high + 1, max(1, (high - low) // 4))]
    return frame("relative error of hidden states, layer after layer (dashed: the limit)", body, ticks)


def _finite(values: FloatSeries) -> NDArray[np.float64]:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


def _limit_line(x: float, label: str) -> str:
    return (
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{x - 4:.1f}" y="{TOP + 10}" text-anchor="end">{label}</text>'
    )
