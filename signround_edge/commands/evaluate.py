"""`signround-edge evaluate`: perplexity, divergence or zero-shot tasks."""

from __future__ import annotations

from pathlib import Path

import click

from signround_edge.commands.options import (
    PATH,
    cache_type_k_option,
    cache_type_v_option,
    json_option,
    n_ctx_option,
    reference_option,
    windows_option,
)
from signround_edge.commands.output import print_json, say, show
from signround_edge.errors import UserError


@click.command()
@click.argument("path")
@click.option("--text", type=PATH, help="UTF-8 text to score.")
@click.option("--tasks", help="Zero-shot tasks of lm-evaluation-harness instead: hellaswag,piqa,…")
@click.option("--task-dir", type=PATH, help="Folder with task files of your own.")
@click.option("--limit", type=int, help="Documents of each task at most.")
@reference_option
@windows_option
@n_ctx_option
@cache_type_k_option
@cache_type_v_option
@json_option
def evaluate(
    path: str, text: Path | None, tasks: str | None, task_dir: Path | None, limit: int | None, reference: str | None,
    windows: int | None, n_ctx: int, cache_type_k: str | None, cache_type_v: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Perplexity (with --reference also KL divergence) or zero-shot tasks of a model folder, run or artifact."""
    if (text is None) == (tasks is None):
        raise UserError("give either --text FILE for perplexity, or --tasks NAMES for zero-shot tasks")
    if tasks is not None:
        if cache_type_k or cache_type_v:
            raise UserError("--cache-type-k and --cache-type-v go with --text; leave them out")
        _evaluate_tasks(path, tasks, reference, task_dir, limit, as_json)
        return
    assert text is not None
    from signround_edge import api
    from signround_edge.evaluation.cache_types import CacheTypes

    types = CacheTypes.of(cache_type_k, cache_type_v)
    if types is not None:
        say(types.text)
    found = api.evaluate(
        path, text, reference=reference, windows=windows, n_ctx=n_ctx, cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
    )  # fmt: skip
    scores = found.to_json()
    if as_json:
        print_json(scores)
        return
    for key, value in scores.items():
        click.echo(f"{key:>16}  {value:.6g}")


def _evaluate_tasks(
    path: str, tasks: str, reference: str | None, task_dir: Path | None, limit: int | None, as_json: bool
) -> None:
    from signround_edge.evaluation.zero_shot import score_tasks
    from signround_edge.terminal.task_scores import render

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task; give some of lm-evaluation-harness, such as hellaswag,piqa")
    found, original = score_tasks(path, names, reference, task_dir, limit)
    if as_json:
        print_json({"tasks": found} if original is None else {"tasks": found, "reference_tasks": original})
    else:
        show(render(found, original))
