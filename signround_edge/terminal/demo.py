"""The table of `demo`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from signround_edge.demo.chain import SCHEME, DemoResult
from signround_edge.evaluation.metrics import Scores


def render(result: DemoResult) -> RenderableType:
    """One table: a row for the original, the rounded and the tuned weights in torch, and each file on its runtime."""
    table = Table(title=f"tiny-llama, {SCHEME}, {result.tuned.tokens:,} scored tokens of speeches-test.txt")
    for heading in (
        "weights or file",
        "runs on",
        "bytes",
        "bits/weight",
        "PPL",
        "KL to original",
        "same top-1",
        "exact",
    ):
        table.add_column(heading, justify="left" if heading in ("weights or file", "runs on", "exact") else "right")
    table.add_row("original (FP)", "torch", "", "", f"{result.tuned.ppl_reference:.3f}", "0", "100 %", "")
    for name, scores in (("rounded to nearest", result.rounded), ("tuned", result.tuned)):
        table.add_row(name, "torch", "", "", *_figures(scores), "")
    table.add_section()
    for runtime in result.verified.runtimes:
        found = result.files[runtime.artifact]
        exact = {a.path: a.status for a in result.verified.artifacts}[runtime.artifact]
        table.add_row(
            Path(runtime.artifact).name,
            runtime.name,
            f"{found.total_bytes:,}",
            f"{found.bits_per_weight:.3f}",
            *(_figures(runtime.fidelity) if runtime.fidelity else ("", "", "")),
            "yes" if exact == "pass" else exact,
        )
    reasons = [f"{r.name}: {r.status}: {r.reason}" for r in result.verified.runtimes if r.reason]
    return Group(table, *reasons)


def _figures(scores: Scores) -> tuple[str, str, str]:
    return f"{scores.ppl:.3f}", f"{scores.kld_mean or 0:.5f}", f"{100 * (scores.top1_agreement or 0):.1f} %"
