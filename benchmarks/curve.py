"""Cost against quality of everything that was measured of a model and a scheme: docs/recipes.svg.

    python -m benchmarks.curve --model tiny-llama --scheme gguf:q4_0 --scheme gguf:q4_k_s

Points are the rows of benchmarks/results/<model>.json: CPU time of quantizing, mean KL divergence from the original.
A line joins what no other row of ours beats at once in time and in divergence; these rows, the peers and those whose
samples, length and steps are a recipe's bear a name.
"""

from __future__ import annotations

import argparse
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import OURS, is_of_today, measured, read, samples_of, steps_of
from signround_edge.files import write_atomically
from signround_edge.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    frame,
    label_below,
    legend,
    points,
    scale_x,
    scale_y,
    standing_alone,
)
from signround_edge.tuning.settings import RECIPES

TARGET = Path(__file__).parent.parent / "docs" / "recipes.svg"


def chart(rows: list[dict[str, Any]], title: str) -> str:
    """One picture; both axes are logarithmic."""
    costs, divergences = ([math.log10(max(float(r[k]), 1e-9)) for r in rows] for k in ("cpu_s", "kld_mean"))
    x = scale_x(min(costs) - 0.1, max(costs) + 0.1)
    y = scale_y(min(divergences) - 0.05, max(divergences) + 0.07)
    at = {id(r): (x(c), float(y(np.array(d)))) for r, c, d in zip(rows, costs, divergences, strict=True)}
    front = frontier([r for r in rows if r["tool"] == OURS])
    body = f'<polyline class="line" points="{points(sorted(at[id(r)] for r in front))}"/>'
    for row in rows:
        across, down = at[id(row)]
        kind = "dot" if row["tool"] == OURS else "dot other"
        body += f'<circle class="{kind}" cx="{across:.1f}" cy="{down:.1f}" r="3.5"/>'
    named = [row for row in rows if row["tool"] != OURS or recipe_of(row) or row in front]
    first = {_name(row): row for row in reversed(named)}  # a peer stands there once for each calibration
    longest_first = sorted(first.items(), key=lambda pair: -len(pair[0]))  # they fit into the fewest places
    body += _labels([(*at[id(row)], name) for name, row in longest_first])
    for seconds in (1, 10, 60, 300, 1800):
        if min(costs) - 0.1 <= math.log10(seconds) <= max(costs) + 0.1:
            body += label_below(x(math.log10(seconds)), f"{seconds} s")
    values = [10 ** (min(divergences) + (max(divergences) - min(divergences)) * i / 3) for i in range(4)]
    ticks = [(float(y(np.array(math.log10(v)))), f"{v:.2g}") for v in values]
    body += legend((("bar", "ours (samples × tokens, steps)"), ("bar other", "peers")))
    return frame(f"{title}: CPU time of quantizing against mean KL divergence", body, ticks)


def _labels(named: list[tuple[float, float, str]]) -> str:
    """A text beside each point (x, y, text), where no other text is if there is such a place."""
    taken: list[tuple[float, float, float]] = []
    drawn = ""
    for across, down, name in named:
        width = 6.1 * len(name)
        places = [(x, down + dy) for dy in (-4, 13, -16, 25) for x in (across + 6, across - 6 - width)]
        free = (
            (x, y)
            for x, y in places
            if LEFT < x < WIDTH - RIGHT - width
            and TOP + 6 < y < HEIGHT - BOTTOM
            and all(abs(y - v) > 10 or x > u + w or u > x + width for u, v, w in taken)
        )
        x, y = next(free, places[0])
        taken.append((x, y, width))
        drawn += f'<text x="{x:.1f}" y="{y:.1f}">{escape(name)}</text>'
    return drawn


def frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no other one beats or equals in both cost and divergence."""

    def beaten(row: dict[str, Any]) -> bool:
        return any(o["cpu_s"] <= row["cpu_s"] and o["kld_mean"] <= row["kld_mean"] for o in rows if o is not row)

    return [row for row in rows if not beaten(row)]


def recipe_of(row: dict[str, Any]) -> str | None:
    """The recipe whose samples, length and steps a row of ours was measured with, in the way of today."""
    sizes = samples_of(row) if is_of_today(row) else None
    for name, settings in RECIPES.items():
        asked = (settings.samples, settings.seqlen, settings.steps, settings.whole_model_steps)
        if not name.startswith("paper") and sizes is not None and asked == (
            *sizes, row["steps"], row.get("whole_model_steps", 0)
        ):  # fmt: skip
            return name
    return None


def _name(row: dict[str, Any]) -> str:
    if row["tool"] != OURS:
        return str(row["tool"])
    sizes = " × ".join(map(str, samples_of(row)))
    recipe = recipe_of(row)
    return f"{recipe + ': ' if recipe else ''}{sizes}, {steps_of(row)}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--scheme", action="append", help="prefix of rows' schemes; repeatable, one picture each")
    parser.add_argument("-o", "--out", type=Path, default=TARGET)
    args = parser.parse_args()
    rows = measured(read(args.model))
    schemes = args.scheme or ["gguf:q4_k_s"]
    pictures = [
        chart([r for r in rows if r["scheme"].split(",")[0] == scheme], f"{args.model}, {scheme}") for scheme in schemes
    ]
    write_atomically(args.out, _below_one_another(pictures).encode())
    print(f"wrote {args.out}")


def _below_one_another(pictures: list[str]) -> str:
    """Several pictures in one file."""
    placed = "".join(
        f'<g transform="translate(0 {i * HEIGHT})">{picture.partition(">")[2].removesuffix("</svg>")}</g>'
        for i, picture in enumerate(pictures)
    )
    whole = frame("", placed, [])
    height = HEIGHT * len(pictures)
    return (
        standing_alone(whole)
        .replace(f'height="{HEIGHT}"', f'height="{height}"')
        .replace(f"0 0 {WIDTH} {HEIGHT}", f"0 0 {WIDTH} {height}")
    )


if __name__ == "__main__":
    main()
