"""The tables of `verify`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from runtime_tests.report.report import Status, VerifyReport

_STYLES = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


def render(report: VerifyReport) -> RenderableType:
    """The report for a terminal: the verdict, one table of artifacts, one of runtimes, and every reason."""
    lines: list[Text] = []
    labels = _labels([artifact.path for artifact in report.artifacts])
    for artifact in report.artifacts:
        if artifact.reason:
            lines.append(_line(artifact.status, labels[artifact.path], artifact.reason))
    for runtime in report.runtimes:
        what = f"{labels[runtime.artifact]} on {runtime.name}, {runtime.device}"
        if runtime.reason:
            lines.append(_line(runtime.status, what, runtime.reason))
        lines += [_line("skipped", what, note, "note") for note in runtime.notes]
    if report.changed is not None:
        lines.append(_line("fail", "input", report.changed))
    return Group(_artifact_table(report, labels), _runtime_table(report, labels), *lines, _verdict(report))


def _labels(paths: list[str]) -> dict[str, str]:
    """The last part of each path, or the whole of it where two would look the same."""
    names = [Path(path).name for path in paths]
    return {path: name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)}


def _artifact_table(report: VerifyReport, labels: dict[str, str]) -> Table:
    table = Table(title="Stored weights against the run directory", title_justify="left")
    for heading in ("artifact", "format", "tensors", "values", "differing", "exact"):
        table.add_column(heading, justify="right" if heading in ("tensors", "values", "differing") else "left")
    for artifact in report.artifacts:
        data = artifact.to_json()
        table.add_row(
            labels[artifact.path],
            artifact.format,
            f"{data['tensors_checked']:,}",
            f"{data['values_checked']:,}",
            f"{data['values_differing']:,}",
            Text("yes" if artifact.status == "pass" else artifact.status, style=_STYLES[artifact.status]),
        )
    return table


def _runtime_table(report: VerifyReport, labels: dict[str, str]) -> Table:
    table = Table(title="Runtimes against torch with the same weights", title_justify="left")
    fidelity = any(r.fidelity for r in report.runtimes)
    headings = ["artifact", "runtime", "device", "PPL", "PPL torch", "KL mean", "KL control", "same top-1"]
    headings += ["PPL original", "KL original"] if fidelity else []
    for heading in (*headings, "status"):
        table.add_column(heading, justify="right" if heading[:2] in ("PP", "KL", "sa") else "left")
    for r in report.runtimes:
        data = r.to_json()
        cells = [labels[r.artifact], r.name, r.device, _fixed(data["ppl"]), _fixed(data["ppl_reference"])]
        cells += [_small(data["kld_mean"]), _small(data["control_kld_mean"]), _percent(data["top1_agreement"])]
        if fidelity:
            original = data["fidelity"] or dict.fromkeys(("ppl_reference", "kld_mean"))
            cells += [_fixed(original["ppl_reference"]), _small(original["kld_mean"])]
        table.add_row(*cells, Text(r.status, style=_STYLES[r.status]))
    return table


def _verdict(report: VerifyReport) -> Text:
    words = {
        "pass": "PASS: every stored weight is the run's, and every runtime computes what torch computes with them.",
        "fail": "FAIL: see the reasons above.",
        "skipped": "NOT VERIFIED: something could not be run; see the reasons above.",
    }
    return Text(words[report.status], style=_STYLES[report.status])


def _line(status: Status, what: str, reason: str, label: str | None = None) -> Text:
    return Text.assemble((f"{label or status}: ", _STYLES[status]), f"{what}: {reason}")


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
