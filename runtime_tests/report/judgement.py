"""From figures to verdicts: what a trial is, and when it passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from devices import Tolerances
from runtime_tests.checks.gates import gate, gates, miss_exact_gate, miss_quantized_gate
from runtime_tests.checks.parity import Contender, GivesLogits
from runtime_tests.report.report import ArtifactReport, PerToken, RuntimeReport
from signround_edge.evaluation.metrics import Scores


@runtime_checkable
class SaysItsCost(Protocol):
    """A session that knows the time that the device computed for it, and the most memory of the process there."""

    seconds: float
    peak_memory_bytes: int | None


@dataclass
class Trial:
    """One artifact on one runtime of one device, and where its figures collect.

    Attributes:
        report: what will be said about it.
        tolerances: of the device.
        artifact, control: sessions that give logits; None where the runtime only gives figures.
        open_float_graph: opens the artifact's graph computing in floats, to compare its layers.
        layer_error: error of hidden states that the runtime's own approximations explain.
        computes: as `Expectation.computes`.
        known_difference: what that alone costs beside the run's model.
        measure: runs a program that gives figures only, of the artifact and of its control; its argument is the file
            with torch's log-probabilities.
        problem: what is wrong besides weights, for such a program.
    """

    report: RuntimeReport
    tolerances: Tolerances
    artifact: Contender | None = None
    control: Contender | None = None
    open_float_graph: Callable[[], GivesLogits] | None = None
    layer_error: float = 0.0
    computes: dict[str, Any] = field(default_factory=dict)
    known_difference: Scores | None = None
    measure: Callable[[Path], tuple[Scores, Scores | None]] | None = None
    problem: str | None = None


def judge_weights(artifact: ArtifactReport) -> None:
    """Turn a comparison of weights into a status; the reason names the first tensor that is off."""
    exactness = artifact.exactness
    assert exactness is not None
    if exactness.exact:
        artifact.status = "pass"
        return
    artifact.status = "fail"
    if not exactness.differences:
        artifact.reason = "it holds no weight of the run"
        return
    first, others = exactness.differences[0], len(exactness.differences) - 1
    artifact.reason = f"tensor {first.tensor} {first.what}" + (f"; {others} more tensors differ" if others else "")


def judge(trial: Trial) -> None:
    """Turn the figures into a status; a reason that is there already means failure."""
    report = trial.report
    if trial.artifact is None and report.parity is None:
        return
    reasons = [] if report.reason is None else [report.reason]
    known = len(reasons)
    if trial.artifact is not None:
        reasons += _take_figures(trial.artifact, report)
    if report.parity is not None:
        report.gates += gates(report.parity, trial.tolerances, report.gate == "exact")
        miss = (miss_exact_gate if report.gate == "exact" else miss_quantized_gate)(report.parity, trial.tolerances)
        reasons += [miss] if miss else []
    reasons += _judge_control(trial) + _judge_known_difference(trial)
    if report.divergence is not None:
        report.gates.append(gate("layer_error", report.divergence.largest_error, report.divergence.tolerance))
    if report.divergence is not None and (report.divergence.first is not None or len(reasons) > known):
        reasons.append(report.divergence.sentence())
    report.reason = "; ".join(reasons) or None
    report.status = "fail" if reasons else "pass"


def _take_figures(contender: Contender, report: RuntimeReport) -> list[str]:
    """Copy a session's figures into the report; why there are none, if so."""
    if isinstance(contender.session, SaysItsCost):
        report.seconds, report.peak_memory_bytes = contender.session.seconds, contender.session.peak_memory_bytes
    if contender.failure is not None:
        return [contender.failure]
    parity = contender.parity
    report.parity = parity.scores()
    report.per_token = PerToken(*(np.concatenate(part) for part in (parity.nll, parity.nll_reference, parity.kld)))
    if contender.fidelity.nll:
        report.fidelity = contender.fidelity.scores()
    return []


def _judge_known_difference(trial: Trial) -> list[str]:
    """It may cost as much as rounding activations may."""
    if trial.known_difference is None:
        return []
    found, limit = trial.known_difference.kld_mean, trial.tolerances.quantized_kld_mean
    trial.report.gates.append(gate("known_difference_kld_mean", found, limit))
    if trial.report.gates[-1].passed:
        return []
    return ["what the runtime is known to compute is too far from the run's model"]


def _judge_control(trial: Trial) -> list[str]:
    report = trial.report
    if trial.control is not None:
        if trial.control.failure is not None:
            return [f"the control: {trial.control.failure}"]
        report.control = trial.control.parity.scores()
    if report.control is None:
        return []
    report.gates.append(gate("control_kld_mean", report.control.kld_mean, trial.tolerances.exact_kld_mean))
    miss = miss_exact_gate(report.control, trial.tolerances)
    return [] if miss is None else [f"the control, which computes in floats, shows that the graph differs: {miss}"]
