"""The certificate's pictures as inline SVG: no script, nothing from elsewhere. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

FloatSeries = Sequence[float | None]

WIDTH, HEIGHT = 640, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 12, 44
_BINS = 240  # of the loss picture: more tokens than that share a bin
_WINDOWS_PARTED = 40  # more lines than that would hide the picture
_SMALLEST = 1e-12  # a divergence of zero, and rounding below zero, are drawn here


def loss_differences(nll: FloatSeries, nll_reference: FloatSeries, windows: int) -> str:
    """Loss of the runtime minus torch's, token after token: the mean of a bin as a line in the band of its extremes."""
    differences = _finite(nll) - _finite(nll_reference)
    parts = np.array_split(differences, min(_BINS, len(differences)))
    known = [part[np.isfinite(part)] for part in parts]
    if not any(len(part) for part in known):
        return _frame("No token's loss is a number.", "", [])
    low, mean, high = (np.array([f(part) if len(part) else 0.0 for part in known]) for f in (np.min, np.mean, np.max))
    extreme = max(float(np.abs([low, high]).max()), 1e-9)
    ticks = [(value, f"{value:+.2g}" if value else "0") for value in (-extreme, 0.0, extreme)]
    x = np.linspace(_LEFT, WIDTH - _RIGHT, len(parts))
    y = _scale(-extreme, extreme)
    band = [*zip(x, y(high), strict=True), *reversed(list(zip(x, y(low), strict=True)))]
    width = WIDTH - _LEFT - _RIGHT
    edges = [_LEFT + width * i / windows for i in range(1, windows)] if windows <= _WINDOWS_PARTED else []
    body = "".join(f'<line class="grid" x1="{e:.1f}" x2="{e:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>' for e in edges)
    line = zip(x, y(mean), strict=True)
    body += f'<polygon class="band" points="{_points(band)}"/><polyline class="line" points="{_points(line)}"/>'
    caption = f"{len(differences):,} scored tokens of {windows} windows, in the text's order"
    return _frame(caption, body, [(float(y(np.array(value))), label) for value, label in ticks])


def divergence_histogram(kld: FloatSeries, limit: float | None) -> str:
    """How many tokens have which KL divergence, in steps of a third of a power of ten.

    `limit` is the gate of the mean, or None.
    """
    values = _finite(kld)
    values = np.maximum(values[np.isfinite(values)], _SMALLEST)
    if not len(values):
        return _frame("No token's divergence is a number.", "", [])
    exponents = np.log10(values)
    first = math.floor(exponents.min())
    last = max(math.ceil(exponents.max()), first + 1, math.ceil(math.log10(limit)) if limit else first + 1)
    counts, edges = np.histogram(exponents, bins=3 * (last - first), range=(first, last))
    x = _across(first, last)
    y = _scale(0, float(counts.max()))
    tops = y(counts.astype(np.float64))
    bars = [
        f'<rect class="bar" x="{x(a) + 0.5:.1f}" y="{top:.1f}" width="{max(x(b) - x(a) - 1, 0.5):.1f}" '
        f'height="{HEIGHT - _BOTTOM - top:.1f}"/>'
        for top, a, b in zip(tops, edges, edges[1:], strict=False)
    ]
    step = max(1, (last - first) // 8)
    labels = "".join(_below(x(e), f"1e{e}", "start" if e == first else "middle") for e in range(first, last, step))
    line = _limit_line(x(math.log10(limit)), "gate of the mean") if limit else ""
    ticks = [(float(y(np.array(v))), f"{v:,.0f}") for v in (0, counts.max())]
    return _frame("KL divergence from torch in nats (bars: number of tokens)", "".join(bars) + line + labels, ticks)


def layer_errors(names: Sequence[str], errors: FloatSeries, limit: float) -> str:
    """Relative error of each layer's hidden states in floats, on a logarithmic scale, with the limit."""
    drawn = [max(error, 1e-9) if error is not None else 10.0 for error in errors]
    low = math.floor(math.log10(min([*drawn, limit])))
    high = max(math.ceil(math.log10(max([*drawn, limit]))), low + 1)
    y = _scale(low, high)
    slot = (WIDTH - _LEFT - _RIGHT) / len(drawn)
    body = ""
    for i, (name, error) in enumerate(zip(names, drawn, strict=True)):
        top = float(y(np.array(math.log10(error))))
        kind = "bar" if error <= limit else "bar off"
        body += (
            f'<rect class="{kind}" x="{_LEFT + i * slot + slot * 0.1:.1f}" y="{top:.1f}" width="{slot * 0.8:.1f}" '
            f'height="{max(HEIGHT - _BOTTOM - top, 1):.1f}"><title>{escape(name)}: {error:.2g}</title></rect>'
        )
    at = float(y(np.array(math.log10(limit))))
    body += f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
    body += _below(_LEFT + slot / 2, "embedding", "start") + _below(WIDTH - _RIGHT, escape(names[-1]), "end")
    ticks = [(float(y(np.array(e))), f"1e{e}") for e in range(low, high + 1, max(1, (high - low) // 4))]
    return _frame("relative error of hidden states, layer after layer (dashed: the limit)", body, ticks)


def _finite(values: FloatSeries) -> NDArray[np.float64]:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


def _scale(low: float, high: float) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Value → y of the picture."""
    return lambda v: _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - (np.nan_to_num(v, nan=low) - low) / ((high - low) or 1))


def _across(low: float, high: float) -> Callable[[float], float]:
    """Value → x of the picture."""
    return lambda v: _LEFT + (WIDTH - _LEFT - _RIGHT) * (float(v) - low) / (high - low)


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _below(x: float, label: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="{anchor}">{label}</text>'


def _limit_line(x: float, label: str) -> str:
    return (
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
        f'<text x="{x - 4:.1f}" y="{_TOP + 10}" text-anchor="end">{label}</text>'
    )


def _frame(caption: str, body: str, ticks: Sequence[tuple[float, str]]) -> str:
    """Axes, tick labels at the left and the caption below."""
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for y, label in ticks
    )
    middle = (_LEFT + WIDTH) / 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">{grid}{body}'
        f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(caption)}</text></svg>'
    )
