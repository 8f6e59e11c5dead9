"""The frontier as SVG: bytes against predicted KL divergence, presets as points."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from signround_edge.planning.found_plan import FoundPlan
from signround_edge.svg import LEFT, WIDTH, frame, label_below, legend, points, scale_x, scale_y, standing_alone

_TICKS = 5


def picture(found: FoundPlan) -> str:
    """A file of its own: mixtures as a line, the plan and schemes as dots; KL on a scale of powers of ten."""
    planned = found.planned
    every = [*found.frontier, *found.presets.values(), (planned.file_bytes, planned.predicted_kl)]
    values = [math.log10(max(kl, 1e-9)) for _, kl in every]
    low, high = math.floor(min(values)), math.ceil(max(values))
    y = scale_y(low, high)
    smallest, largest = min(size for size, _ in every), max(size for size, _ in every)
    x = scale_x(smallest, largest)

    def at(size: int, kl: float) -> tuple[float, float]:
        return x(size), float(y(np.array([math.log10(max(kl, 1e-9))]))[0])

    line = points(at(*point) for point in found.frontier)
    body = f'<polyline class="line" points="{line}"/>'
    for name, point in found.presets.items():
        cx, cy = at(*point)
        short = escape(name.partition(":")[2])
        body += f'<circle class="dot other" cx="{cx:.1f}" cy="{cy:.1f}" r="2.5"/>'
        anchor, shift = ("end", -4) if cx > (LEFT + WIDTH) / 2 else ("start", 4)
        body += f'<text x="{cx + shift:.1f}" y="{cy - 4:.1f}" text-anchor="{anchor}">{short}</text>'
    cx, cy = at(planned.file_bytes, planned.predicted_kl)
    body += f'<circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="4"/>'
    step = (largest - smallest) / (_TICKS - 1) or 1
    for tick in range(_TICKS):
        size = smallest + tick * step
        body += label_below(x(size), f"{size / 1e6:.4g} MB")
    body += legend([("bar", "this plan, and all mixtures"), ("bar other", "schemes")])
    ticks = [(float(y(np.array([power]))[0]), f"1e{power}") for power in range(low, high + 1)]
    return standing_alone(frame(f"file size against predicted KL divergence, {planned.model}", body, ticks))
