"""Render docs/benchmarks.md from benchmarks/results/*.json: `python -m benchmarks.table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """# Measured results

Made by `python -m benchmarks.table` from benchmarks/results/; `python -m benchmarks.run --help` says how each row is
measured. KL divergence, top-1 agreement and perplexity compare weights alone: the dequantized weights of every tool's
file run in torch (f32) against the original model, windows scored as `llama-perplexity --kl-divergence` does. Wall time
and peak memory are of the whole quantizing process.
"""


def main() -> None:
    """Command line."""
    parts = [HEAD]
    for file in sorted(RESULTS.glob("*.json")):
        parts.append(_section(file.stem, json.loads(file.read_text())))
    TARGET.write_text("\n".join(parts), encoding="utf-8")


def _section(name: str, rows: list[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda r: (r["scheme"], r["steps"], r["tool"]))
    reference = rows[0]["ppl_reference"]
    lines = [f"## {name} (perplexity of the original: {reference:.3f})", ""]
    lines += ["| tool | scheme | steps | bytes | bits/weight | PPL | mean KL | same top-1 | wall s | CPU s | peak MB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        figures = f"{r['ppl']:.3f} | {r['kld_mean']:.4f} ± {r['kld_stderr']:.4f} | {100 * r['top1_agreement']:.1f} %"
        cost = f"{r['wall_s']:.0f} | {r['cpu_s']:.0f} | {_peak(r['peak_mb'])}"
        size = f"{r['bytes']:,} | {r['bits_per_weight']:.3f}"
        lines.append(f"| {r['tool']} | {r['scheme']} | {r['steps']} | {size} | {figures} | {cost} |")
    settings = sorted({r["key"].split(" steps, ", 1)[1] for r in rows})
    return "\n".join([*lines, "", f"Calibration → evaluation: {'; '.join(settings)}. {rows[0]['machine']}.", ""])


def _peak(megabytes: float | None) -> str:
    """A dash for rows of before the peak was measured apart from the parent's memory."""
    return "–" if megabytes is None else f"{megabytes:.0f}"


if __name__ == "__main__":
    main()
