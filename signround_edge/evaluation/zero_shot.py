"""`evaluate --tasks`: zero-shot tasks of lm-evaluation-harness on anything that gives logits.

The harness (EleutherAI, `lm_eval`) owns tasks, prompts and metrics; here is only its model interface over a session.
Each answer is scored by Σ log p of its tokens after the prompt, as the harness's own Hugging Face model does.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from signround_edge.arguments import at_least
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import FloatArray, log_softmax
from signround_edge.evaluation.perplexity import TorchSession
from signround_edge.evaluation.scoring import opened
from signround_edge.evaluation.torch_models import load_source_model
from signround_edge.model.config import longest_window
from signround_edge.model.source import resolve_model
from signround_edge.model.tokenizer import load_tokenizer

_POSITIONS_UNKNOWN = 2048  # what the harness assumes where a model does not say how much it can see

TaskScores = dict[str, dict[str, float]]  # task → metric ("acc", "acc_stderr", "acc_norm", "perplexity", …) → value


def score_tasks(
    path: str, tasks: Sequence[str], reference: str | None, task_dir: Path | None, limit: int | None
) -> tuple[TaskScores, TaskScores | None]:
    """Scores of a model folder, run directory or artifact, and of the reference model where one is given.

    Args:
        path: as `evaluate` takes it.
        tasks: names of tasks or groups of lm-evaluation-harness.
        reference: the original model; an artifact also takes the tokenizer from there.
        task_dir: folder with more task files (YAML), searched before the harness's own.
        limit: documents of each task; None is all.
    Raises:
        UserError: the harness is not installed, a task is unknown, its data cannot be loaded, or it is not scored by
            log-likelihoods.
    """
    if limit is not None:
        at_least("--limit", limit, 1)
    reference_dir = None if reference is None else resolve_model(reference)
    with _harness_prints_to_stderr():
        manager = _task_manager(tasks, task_dir)
        with opened(path, reference_dir) as (session, tokenizer_dir):
            found = _run(session, tokenizer_dir, tasks, manager, limit)
        if reference_dir is None:
            return found, None
        original = TorchSession(load_source_model(reference_dir))
        return found, _run(original, reference_dir, tasks, manager, limit)


@contextlib.contextmanager
def _harness_prints_to_stderr() -> Iterator[None]:
    """Its lines and progress bars are for a terminal's stderr; elsewhere they are dropped."""
    stderr = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(stderr), contextlib.redirect_stderr(stderr):
        yield


def _task_manager(tasks: Sequence[str], task_dir: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness ({error}); install it with: pip install 'signround-edge[tasks]'"
        ) from error
    if task_dir is not None and not task_dir.is_dir():
        raise UserError(f"--task-dir {task_dir} is not a folder; give one with task files of lm-evaluation-harness")
    manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks {unknown[0]} is no task of lm-evaluation-harness; `lm-eval ls tasks` lists them, and --task-dir "
            "adds your own"
        )
    try:
        manager.load(list(tasks))
    except Exception as error:  # whatever `datasets` and its network layers raise
        detail = (str(error).splitlines() or ["no detail"])[0]
        raise UserError(
            f"--tasks {','.join(tasks)}: its data cannot be loaded ({type(error).__name__}: {detail}); connect "
            "to the internet once, or give local tasks with --task-dir"
        ) from error
    return manager


def _run(session: Any, tokenizer_dir: Path, tasks: Sequence[str], manager: Any, limit: int | None) -> TaskScores:
    import lm_eval

    model = _session_lm()(session, tokenizer_dir)
    result = lm_eval.simple_evaluate(
        model, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=1000, log_samples=False
    )
    assert result is not None
    return {task: _metrics(values) for task, values in result["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's "acc,none" and "exact_match,strict-match" as acc and exact_match_strict_match."""
    numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {
        key.removesuffix(",none").replace(",", "_").replace("-", "_"): float(value) for key, value in numbers.items()
    }


def _session_lm() -> type[Any]:
    """The harness's model over a session; made on demand, because its base class is of an optional package."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class SessionLM(TemplateLM):  # type: ignore[misc]  # the harness is untyped
        """Log-likelihoods of continuations, from a session's logits."""

        def __init__(self, session: Any, tokenizer_dir: Path) -> None:
            super().__init__()
            self._session = session
            self.tokenizer: Any = load_tokenizer(tokenizer_dir)
            self._positions = longest_window(tokenizer_dir) or _POSITIONS_UNKNOWN

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else int(bos)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = True if add_special_tokens is None else add_special_tokens
            ids: list[int] = self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]
            return ids

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            # Answers of one token share their input with the other answers: it runs once.
            inputs = [tuple((c + a)[-(self._positions + 1) : -1]) for _, c, a in requests]
            results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            last: tuple[tuple[int, ...], FloatArray] | None = None
            for index in sorted(range(len(requests)), key=lambda i: inputs[i]):
                answer = requests[index][2][-len(inputs[index]) :]
                if last is None or last[0] != inputs[index]:
                    last = inputs[index], self._session.logits(np.array(inputs[index], dtype=np.int32))
                results[index] = _log_likelihood(last[1], answer)
            return results

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._positions, 1)
                parts = [(None, *make_disjoint_window(window)) for window in windows]
                totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise UserError(
                f"task {requests[0].task_name} is scored on generated text; --tasks takes tasks scored by "
                "log-likelihoods, such as hellaswag, piqa, winogrande or lambada_openai"
            )

    return SessionLM


def _log_likelihood(logits: FloatArray, answer: list[int]) -> tuple[float, bool]:
    """(Σ log p of the answer, whether greedy decoding gives it) from logits f32 [n, vocab] before each token."""
    found = log_softmax(logits[-len(answer) :])
    chosen = found[np.arange(len(answer)), answer]
    return float(chosen.sum()), bool((found.argmax(-1) == np.array(answer)).all())
