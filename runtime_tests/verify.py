"""`verify`: does an artifact hold the run's weights exactly, and do runtimes compute with them what torch computes?

Three parts for every artifact. Exactness: each stored weight, through the runtime's own dequantizer, equals the run's.
Parity: the runtime's logits against torch's with the same dequantized weights; tight where the runtime computes in
floats (the control), statistical where it rounds activations. Fidelity: the runtime against the original model, for
information.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from devices import DEFAULT_DEVICE, DeviceProfile, Tolerances, get_device
from runtime_tests.artifacts import artifact_format, expect
from runtime_tests.certificate.evidence import Evidence
from runtime_tests.certificate.fingerprints import fingerprint, fingerprint_run
from runtime_tests.divergence.locate import TOKENS, ShowsHiddenStates, locate
from runtime_tests.divergence.torch_points import torch_points
from runtime_tests.exactness import check_exactness
from runtime_tests.expectation import Expectation
from runtime_tests.interface import Runtime, Session
from runtime_tests.parity import Contender, GivesLogits, gate, gates, miss_exact_gate, miss_quantized_gate, score
from runtime_tests.report import ArtifactReport, PerToken, RuntimeReport, VerifyReport
from signround_edge.decoder import build_decoder
from signround_edge.errors import CheckFailed, UserError
from signround_edge.evaluation import TorchSession, load_run_model, load_source_model, text_windows
from signround_edge.metrics import Windows
from signround_edge.plugins import runtimes as runtimes_by_name
from signround_edge.run_directory import RunDirectory

DEFAULT_CONTEXT = 512
DEFAULT_WINDOWS = 16


@dataclass(frozen=True)
class _Job:
    """What all artifacts have in common; `report` collects, `stack` closes sessions and removes controls at the end."""

    run: RunDirectory
    text: Path
    windows: Windows
    profiles: Sequence[DeviceProfile]
    report: VerifyReport
    stack: ExitStack


@dataclass
class _Trial:
    """One artifact on one runtime of one device, and where its figures collect."""

    report: RuntimeReport
    tolerances: Tolerances
    artifact: Contender | None = None
    control: Contender | None = None
    open_float_graph: Callable[[], GivesLogits] | None = None
    layer_error: float = 0.0


def verify(
    run: RunDirectory,
    artifacts: Sequence[Path],
    text: Path,
    devices: Sequence[str] = (DEFAULT_DEVICE,),
    reference: Path | None = None,
    n_ctx: int = DEFAULT_CONTEXT,
    max_windows: int = DEFAULT_WINDOWS,
    log: Callable[[str], None] = print,
) -> VerifyReport:
    """Check artifacts of a run.

    Args:
        run: the complete run directory.
        artifacts: .gguf files, and folders that hold an ONNX model.
        text: UTF-8 text to score; `max_windows` windows of `n_ctx` tokens of it.
        devices: names of device profiles.
        reference: Hugging Face folder of the original model, for fidelity.
        log: called with one line of progress.
    Raises:
        UserError: an unknown device, a text that is too short, something that is no artifact at all. A damaged
            artifact is no error but a failed check.
    """
    profiles = [get_device(name) for name in dict.fromkeys(devices)]
    paths = list(dict.fromkeys(artifacts))
    formats = [artifact_format(path) for path in paths]
    windows = text_windows(run.config_dir, text, n_ctx, max_windows)
    report = VerifyReport(str(run.path), str(text), None if reference is None else str(reference))
    trials: list[_Trial] = []
    with ExitStack() as stack:
        job = _Job(run, text, windows, profiles, report, stack)
        log("hashing the run, the artifacts and the text")
        report.evidence = _evidence(job, paths, reference)
        for path, format_ in zip(paths, formats, strict=True):
            log(f"{path}: comparing stored weights with {run.path}")
            report.artifacts.append(ArtifactReport(str(path), format_))
            trials += _prepare(job, path, report.artifacts[-1])
        report.runtimes = [trial.report for trial in trials]
        contenders = [c for t in trials for c in (t.artifact, t.control) if c is not None]
        if contenders:
            original: GivesLogits | None = None if reference is None else TorchSession(load_source_model(reference))
            ours = TorchSession(load_run_model(run))
            score(contenders, windows, ours, original, log)
            _compare_layers(job, trials, ours, log)
    for trial in trials:
        _judge(trial)
    return report


def _prepare(job: _Job, path: Path, artifact: ArtifactReport) -> list[_Trial]:
    """Check the weights of one artifact, and open it on every runtime that can run it."""
    trials, ready = _find_runtimes(job, artifact)
    if not ready:
        artifact.reason = "no runtime could read it: " + "; ".join(
            f"{t.report.name} on {t.report.device}: {t.report.reason}" for t in trials
        )
        return trials
    folder = Path(job.stack.enter_context(tempfile.TemporaryDirectory(prefix="signround-verify-")))
    try:
        expectation = expect(job.run, path, artifact.format, folder)
        artifact.exactness = check_exactness(expectation.expected, ready[0][0].stored_tensors(path))
    except Exception as error:
        # Readers raise UserError and CheckFailed, but libraries below them raise anything on a damaged file.
        known = isinstance(error, UserError | CheckFailed)
        reason = str(error) if known else f"{path} is damaged ({type(error).__name__}: {error}); export it again"
        artifact.status, artifact.reason = "fail", reason
        for _, trial in ready:
            trial.report.status, trial.report.reason = "fail", reason
        return trials
    _judge_weights(artifact)
    for runtime, trial in ready:
        _open(job, runtime, trial, path, expectation)
    return trials


def _find_runtimes(job: _Job, artifact: ArtifactReport) -> tuple[list[_Trial], list[tuple[Runtime, _Trial]]]:
    """A trial for every runtime of the artifact's format that a profile names, and those that can run here."""
    known = runtimes_by_name()
    trials: list[_Trial] = []
    ready: list[tuple[Runtime, _Trial]] = []
    for profile in job.profiles:
        for name in profile.runtimes:
            runtime = known.get(name)
            if runtime is not None and runtime.artifact_format != artifact.format:
                continue
            trial = _Trial(RuntimeReport(name, profile.name, artifact.path), profile.tolerances)
            trials.append(trial)
            missing = "no such runtime is installed" if runtime is None else runtime.unavailable()
            trial.report.reason = profile.unavailable() or missing
            if runtime is not None and trial.report.reason is None:
                ready.append((runtime, trial))
    return trials, ready


def _judge_weights(artifact: ArtifactReport) -> None:
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


def _open(job: _Job, runtime: Runtime, trial: _Trial, path: Path, expectation: Expectation) -> None:
    """Open the artifact and its control on one runtime."""
    report = trial.report
    report.gate = "exact" if expectation.computes_in_floats else "quantized"
    report.notes += expectation.notes
    report.reason = expectation.problem
    try:
        session = _opened(runtime.open(path), job.stack)
        trial.artifact = Contender(session)
        note = expectation.tokenizer_note(session, job.windows, job.text)
        report.notes += [note] if note else []
        if expectation.open_control is not None:
            trial.control = Contender(_opened(expectation.open_control(runtime), job.stack))
        trial.layer_error = expectation.layer_error
        if expectation.computes_in_floats or trial.control is not None:
            # A control has the metadata that the artifact should have. Where that differs, the artifact's own decides.
            float_session = session if trial.control is None else trial.control.session
            wrong = expectation.problem is not None
            trial.open_float_graph = lambda: (
                _opened(expectation.open_float_graph(runtime), job.stack) if wrong else float_session
            )
    except UserError as error:
        report.reason = "; ".join(filter(None, [expectation.problem, str(error)]))
        trial.artifact = trial.control = None
    report.status = "fail"  # until `_judge` says otherwise


def _opened(session: Session, stack: ExitStack) -> Session:
    stack.callback(session.close)
    return session


def _judge(trial: _Trial) -> None:
    """Turn the figures into a status; a reason that is there already means failure."""
    report = trial.report
    if trial.artifact is None:
        return
    report.seconds = getattr(trial.artifact.session, "seconds", None)  # not every session can say it
    report.peak_memory_bytes = getattr(trial.artifact.session, "peak_memory_bytes", None)
    reasons = [] if report.reason is None else [report.reason]
    known = len(reasons)
    if trial.artifact.failure is not None:
        reasons.append(trial.artifact.failure)
    else:
        report.parity = trial.artifact.parity.scores()
        report.per_token = _per_token(trial.artifact)
        if trial.artifact.fidelity.nll:
            report.fidelity = trial.artifact.fidelity.scores()
        report.gates += gates(report.parity, trial.tolerances, report.gate == "exact")
        miss = (miss_exact_gate if report.gate == "exact" else miss_quantized_gate)(report.parity, trial.tolerances)
        reasons += [miss] if miss else []
    if trial.control is not None:
        reasons += _judge_control(trial.control, report, trial.tolerances)
    if report.divergence is not None:
        report.gates.append(gate("layer_error", report.divergence.largest_error, report.divergence.tolerance))
    if report.divergence is not None and (report.divergence.first is not None or len(reasons) > known):
        reasons.append(report.divergence.sentence())
    report.reason = "; ".join(reasons) or None
    report.status = "fail" if reasons else "pass"


def _compare_layers(job: _Job, trials: Sequence[_Trial], ours: TorchSession, log: Callable[[str], None]) -> None:
    """Compare hidden states layer by layer, where an artifact's graph can compute in floats and its runtime shows them.

    Where a stored weight differs, the first such tensor is named already.
    """
    inexact = {artifact.path for artifact in job.report.artifacts if artifact.status == "fail"}
    shown = [t for t in trials if t.artifact is not None and t.report.artifact not in inexact]
    shown = [t for t in shown if t.open_float_graph is not None]
    if not shown:
        return
    log("comparing hidden states, layer by layer")
    tokens = job.windows.tokens[0][:TOKENS]
    points = torch_points(ours, tokens, build_decoder(job.run.config_dir).prefix)
    for trial in shown:
        assert trial.open_float_graph is not None
        try:
            session = trial.open_float_graph()
            if isinstance(session, ShowsHiddenStates):
                tolerance = max(trial.tolerances.layer_error, trial.layer_error)
                trial.report.divergence = locate(session, tokens, points, tolerance)
        except (UserError, CheckFailed) as error:
            trial.report.notes.append(f"its layers could not be compared: {error}")


def _per_token(contender: Contender) -> PerToken:
    parity = contender.parity
    return PerToken(*(np.concatenate(part) for part in (parity.nll, parity.nll_reference, parity.kld)))


def _evidence(job: _Job, artifacts: Sequence[Path], reference: Path | None) -> Evidence:
    """Hash everything before it is opened."""
    given = [fingerprint("artifact", path) for path in artifacts] + [fingerprint("text", job.text)]
    given += [] if reference is None else [fingerprint("reference", reference)]
    windows, n_ctx = job.windows.tokens.shape
    tokens = hashlib.sha256(job.windows.tokens.astype("<i4").tobytes()).hexdigest()
    return Evidence(
        [fingerprint_run(job.run), *given], job.run.manifest, list(job.profiles), int(n_ctx), int(windows), tokens
    )


def _judge_control(control: Contender, report: RuntimeReport, tolerances: Tolerances) -> list[str]:
    if control.failure is not None:
        return [f"the control: {control.failure}"]
    report.control = control.parity.scores()
    report.gates.append(gate("control_kld_mean", report.control.kld_mean, tolerances.exact_kld_mean))
    miss = miss_exact_gate(report.control, tolerances)
    return [] if miss is None else [f"the control, which computes in floats, shows that the graph differs: {miss}"]
