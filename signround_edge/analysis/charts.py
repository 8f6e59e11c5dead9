"""The pictures of `analyze`, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from signround_edge.analysis.roundings import Analysis, Roundings, UnitLoss
from signround_edge.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    frame,
    label_below,
    legend,
    points,
    scale_x,
    scale_y,
)

_FLOOR = HEIGHT - BOTTOM
_LABELS = 12  # at most, below a picture
_HEADROOM = 1.12  # above the highest bar, for the legend
TWO = (("bar", "raised"), ("bar other", "lowered"))


def pictures(analysis: Analysis) -> dict[str, tuple[str, str]]:
    """File stem → (title, SVG) of every picture that the run has the figures for."""
    drawn: dict[str, tuple[str, str]] = {}
    if analysis.total is not None:
        by_block = {str(index): r for index, r in analysis.blocks.items()}
        drawn = {
            "altered-by-block": ("Roundings altered, by decoder block", altered(by_block, "decoder block")),
            "altered-by-matrix": ("Roundings altered, by kind of matrix", altered(analysis.kinds, "matrix")),
            "salience": ("Altered roundings against the channel's activation", salience(analysis)),
            "v": ("Distribution of V", v_distribution(analysis.v_histogram())),
        }
    if analysis.losses:
        drawn["losses"] = ("Held-out loss of each block, rounded and tuned", losses(analysis.losses))
    return drawn


def altered(groups: dict[str, Roundings], axis: str) -> str:
    """Share of codes raised and lowered, a pair of bars a group (the paper's figure 2)."""
    highest = max(max(r.raised, r.lowered) for r in groups.values()) or 0.01
    y = scale_y(0, highest * _HEADROOM)
    bars = [
        (name, [("bar", r.raised, f"raised {r.raised:.2%}"), ("bar other", r.lowered, f"lowered {r.lowered:.2%}")])
        for name, r in groups.items()
    ]
    ticks = [(float(y(np.array(v))), f"{v:.2%}" if highest < 0.05 else f"{v:.1%}") for v in (0, highest / 2, highest)]
    body = "".join(
        _bars(slot, len(bars), name, [(kind, float(y(np.array(v))), text) for kind, v, text in pair])
        for slot, (name, pair) in enumerate(bars)
    )
    caption = f"share of codes above and below plain rounding, by {axis}"
    return frame(caption, body + _group_labels([name for name, _ in bars]) + legend(TWO), ticks)


def salience(analysis: Analysis) -> str:
    """Share altered of channels by the rank of their E[x²]: mean of all matrices in the band of their extremes."""
    bins = min(len(t.altered_by_salience) for t in analysis.tensors)
    table = np.array([t.altered_by_salience[:bins] for t in analysis.tensors])
    weights = np.array([t.roundings.weights for t in analysis.tensors], dtype=np.float64)
    mean, low, high = np.average(table, axis=0, weights=weights), table.min(axis=0), table.max(axis=0)
    top = float(high.max()) or 0.01
    x, y = scale_x(0, bins), scale_y(0, top)
    centres = [x(i + 0.5) for i in range(bins)]
    band = [*zip(centres, y(high), strict=True), *reversed(list(zip(centres, y(low), strict=True)))]
    body = f'<polygon class="band" points="{points(band)}"/>'
    body += f'<polyline class="line" points="{points(zip(centres, y(mean), strict=True))}"/>'
    for at, label, anchor in ((0, "smallest", "start"), (bins / 2, "median", "middle"), (bins, "largest", "end")):
        body += label_below(x(at), label, anchor)
    ticks = [(float(y(np.array(v))), f"{v:.1%}") for v in (0.0, top / 2, top)]
    caption = "share of codes altered, by rank of the input channel's E[x²] (line: mean, band: all matrices)"
    return frame(caption, body, ticks)


def v_distribution(counts: Sequence[int]) -> str:
    """Histogram of V over all matrices (the paper's figure 4)."""
    shares = np.array(counts, dtype=np.float64) / max(1, sum(counts))
    top = float(shares.max()) or 1.0
    x, y = scale_x(-0.5, 0.5), scale_y(0, top)
    edges = np.linspace(-0.5, 0.5, len(counts) + 1)
    body = "".join(
        f'<rect class="bar" x="{x(a) + 0.5:.1f}" y="{t:.1f}" width="{x(b) - x(a) - 1:.1f}" height="{_FLOOR - t:.1f}">'
        f"<title>{a:+.3f} to {b:+.3f}: {share:.2%}</title></rect>"
        for a, b, t, share in zip(edges, edges[1:], y(shares), shares, strict=False)
    )
    anchors = {-0.5: "start", 0.5: "end"}
    body += "".join(
        label_below(x(v), f"{v:+.2f}" if v else "0", anchors.get(v, "middle")) for v in (-0.5, -0.25, 0.0, 0.25, 0.5)
    )
    ticks = [(float(y(np.array(v))), f"{v:.1%}") for v in (0.0, top / 2, top)]
    return frame("V of all weights at the step that was kept (bars: share of weights)", body, ticks)


def losses(units: Sequence[UnitLoss]) -> str:
    """Held-out loss after plain rounding and after tuning, on a logarithmic scale."""
    values = [max(v, 1e-30) for u in units for v in (u.rounded, u.tuned)]
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.05 * (high - low), 0.05)
    y = scale_y(low - room, high + 2 * room)
    body = ""
    for slot, u in enumerate(units):
        pair = [
            (kind, float(y(np.array(math.log10(max(v, 1e-30))))), f"{what} {v:.3e}")
            for kind, v, what in (("bar other", u.rounded, "rounded"), ("bar", u.tuned, "tuned"))
        ]
        body += _bars(slot, len(units), f"block {u.block} {u.unit}", pair)
    names = [str(u.block) if u.unit == "block" else f"{u.block} {u.unit.split('.')[-2]}" for u in units]
    ticks = [(float(y(np.array(e))), f"{10**e:.1e}") for e in (low, (low + high) / 2, high)]
    body += _group_labels(names) + legend((("bar other", "rounded to nearest"), ("bar", "tuned")))
    return frame("held-out loss by decoder block, on a logarithmic scale", body, ticks)


def _bars(slot: int, slots: int, name: str, pair: Sequence[tuple[str, float, str]]) -> str:
    """Bars side by side in one slot of the x axis: (class, y of the top, text)."""
    width = (WIDTH - LEFT - RIGHT) / slots
    each = width * 0.8 / len(pair)
    return "".join(
        f'<rect class="{kind}" x="{LEFT + slot * width + width * 0.1 + i * each:.1f}" y="{top:.1f}" '
        f'width="{max(each - 0.5, 0.5):.1f}" height="{max(_FLOOR - top, 0):.1f}">'
        f"<title>{escape(name)}: {text}</title></rect>"
        for i, (kind, top, text) in enumerate(pair)
    )


def _group_labels(names: Sequence[str]) -> str:
    width, every = (WIDTH - LEFT - RIGHT) / len(names), math.ceil(len(names) / _LABELS)
    return "".join(
        label_below(LEFT + (i + 0.5) * width, escape(name)) for i, name in enumerate(names) if i % every == 0
    )
