"""The table of `evaluate --tasks`."""

from __future__ import annotations

from rich.table import Table

from signround_edge.evaluation.zero_shot import TaskScores


def render(found: TaskScores, original: TaskScores | None) -> Table:
    """A table: a line for each task and metric, with the original model's value where there is one."""
    table = Table("task", "metric", "value", *([] if original is None else ["original"]))
    for task, metrics in found.items():
        for metric, value in metrics.items():
            if metric.endswith("_stderr"):
                continue
            row = [_with_error(metrics, metric, value)]
            if original is not None:
                row.append(_with_error(original[task], metric, original[task][metric]))
            table.add_row(task, metric, *row)
    return table


def _with_error(metrics: dict[str, float], metric: str, value: float) -> str:
    error = metrics.get(f"{metric}_stderr")
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
