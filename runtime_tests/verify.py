"""`verify`: does an artifact hold the run's weights exactly, and do runtimes compute with them what torch computes?

Three parts for every artifact. Exactness: each stored weight, through the runtime's own dequantizer, equals the run's.
Parity: the runtime's logits against torch's with the same dequantized weights; tight where the runtime computes in
floats (the control), statistical where it rounds activations. Fidelity: the runtime against the original model, for
information.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from devices import DEFAULT_DEVICE, DeviceProfile, get_device
from runtime_tests.artifacts.expectation import Expectation
from runtime_tests.artifacts.lookup import artifact_format, expect
from runtime_tests.checks.exactness import check_exactness
from runtime_tests.checks.known_differences import said, session_of
from runtime_tests.checks.layers import TOKENS, ShowsHiddenStates, locate
from runtime_tests.checks.parity import ComputesAhead, Contender, GivesLogits, score
from runtime_tests.checks.torch_points import torch_points
from runtime_tests.interface import Runtime, SaysNotes, Session
from runtime_tests.llama_binaries.kl_base import KlBaseWriter
from runtime_tests.llama_binaries.perplexity import RUNTIME, CannotStart, LlamaBinaries, measure
from runtime_tests.report.evidence import Evidence
from runtime_tests.report.fingerprints import fingerprint, fingerprint_run
from runtime_tests.report.judgement import Trial, judge, judge_weights
from runtime_tests.report.report import ArtifactReport, RuntimeReport, Status, VerifyReport
from runtime_tests.temporary import temporary_folder
from runtime_tests.transports.interface import Transport
from runtime_tests.transports.lookup import transport_to
from signround_edge.errors import CheckFailed, UserError
from signround_edge.evaluation.cache_types import CacheTypes, TakesCacheTypes
from signround_edge.evaluation.metrics import Windows
from signround_edge.evaluation.perplexity import TorchSession, text_windows
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.files import is_disk_trouble
from signround_edge.model.decoder import find_blocks
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
    transports: dict[str, Transport]
    report: VerifyReport
    binaries: LlamaBinaries | None
    cache_types: CacheTypes | None
    stack: ExitStack


def verify(
    run: RunDirectory,
    artifacts: Sequence[Path],
    text: Path,
    devices: Sequence[str] = (DEFAULT_DEVICE,),
    reference: Path | None = None,
    n_ctx: int = DEFAULT_CONTEXT,
    max_windows: int = DEFAULT_WINDOWS,
    llama_bin: Path | None = None,
    cache_types: CacheTypes | None = None,
    log: Callable[[str], None] = print,
) -> VerifyReport:
    """Check artifacts of a run.

    Args:
        run: the complete run directory.
        artifacts: .gguf files, folders that hold an ONNX model, and what other installed exporters write.
        text: UTF-8 text to score; `max_windows` windows of `n_ctx` tokens of it.
        devices: names of device profiles.
        reference: Hugging Face folder of the original model, for fidelity.
        llama_bin: folder with llama-perplexity for the devices; it scores GGUF files too.
        cache_types: of keys and values in llama.cpp, for files that are not in floats; controls have their own.
        log: called with one line of progress.
    Raises:
        UserError: an unknown device, a text that is too short, something that is no artifact at all. A damaged
            artifact is no error but a failed check.
    """
    if not artifacts or not devices:
        raise UserError(f"there is nothing to verify; give at least one {'--device' if artifacts else 'artifact'}")
    profiles = [get_device(name) for name in dict.fromkeys(devices)]
    paths = list(dict.fromkeys(artifacts))
    formats = [artifact_format(path) for path in paths]
    if cache_types is not None and "gguf" not in formats:
        raise UserError("--cache-type-k and --cache-type-v are llama.cpp's; give a GGUF file, or leave them out")
    windows = text_windows(run.config_dir, text, n_ctx, max_windows)
    binaries = None if llama_bin is None else LlamaBinaries.find(llama_bin, windows)
    report = VerifyReport(str(run.path), str(text), None if reference is None else str(reference))
    trials: list[Trial] = []
    with ExitStack() as stack:
        transports = {profile.name: transport_to(profile) for profile in profiles}
        for transport in transports.values():
            stack.callback(transport.close)
        job = _Job(run, text, windows, profiles, transports, report, binaries, cache_types, stack)
        log("hashing the run, the artifacts and the text")
        report.evidence = _evidence(job, paths, reference)
        for path, format_ in zip(paths, formats, strict=True):
            log(f"{path}: comparing stored weights with {run.path}")
            report.artifacts.append(ArtifactReport(str(path), format_))
            trials += _prepare(job, path, report.artifacts[-1])
        report.runtimes = [trial.report for trial in trials]
        alive = [t for t in trials if t.artifact is not None or t.control is not None or t.measure is not None]
        if alive:
            original: GivesLogits | None = None if reference is None else TorchSession(load_source_model(reference))
            ours = TorchSession(load_run_model(run))
            _compare(job, [t for t in alive if not t.computes], ours, original, log)
            for computes in _distinct(trial.computes for trial in alive if trial.computes):
                log("comparing with what the runtime is known to compute")
                theirs = session_of(run, computes, _folder(job))
                score([cost := Contender(theirs)], windows, ours, None, _silent)
                concerned = [trial for trial in alive if trial.computes == computes]
                for trial in concerned:
                    trial.known_difference = cost.parity.scores()
                    trial.report.notes.append(said(computes, run.config, trial.known_difference))
                _compare(job, concerned, theirs, original, log)
    for trial in trials:
        judge(trial)
    report.changed = next(filter(None, (f.what_changed() for f in report.evidence.fingerprints)), None)
    return report


def _compare(
    job: _Job, trials: Sequence[Trial], ours: TorchSession, original: GivesLogits | None, log: Callable[[str], None]
) -> None:
    """Fill the figures of trials beside one model in torch."""
    if not trials:
        return
    contenders = [c for t in trials for c in (t.artifact, t.control) if c is not None]
    measured = [trial for trial in trials if trial.measure is not None]
    if measured:
        base = job.stack.enter_context(KlBaseWriter(_folder(job) / "logits.kld", job.windows))
        score(contenders, job.windows, ours, original, log, base.add)
        base.close()
        _measure(measured, base.path, log)
    else:
        score(contenders, job.windows, ours, original, log)
    _compare_layers(job, trials, ours, log)


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for value in values:
        found += [] if value in found else [value]
    return found


def _silent(_line: str) -> None:
    """Windows are told of once."""


def _prepare(job: _Job, path: Path, artifact: ArtifactReport) -> list[Trial]:
    """Check the weights of one artifact, and open it on every runtime that can run it."""
    trials, ready = _find_runtimes(job, artifact)
    if not ready:
        tried = "; ".join(f"{t.report.name} on {t.report.device}: {t.report.reason}" for t in trials)
        artifact.reason = f"no runtime could read it: {tried or f'no --device names one for {artifact.format}'}"
        return trials
    try:
        expectation = expect(job.run, path, artifact.format, _folder(job))
        artifact.exactness = check_exactness(expectation.expected, ready[0][0].stored_tensors(path))
    except Exception as error:
        # Readers raise UserError and CheckFailed, but libraries below them raise anything on a damaged file.
        known = isinstance(error, UserError | CheckFailed)
        reason = str(error) if known else f"{path} is damaged ({type(error).__name__}: {error}); export it again"
        status: Status = "fail"
        if is_disk_trouble(error):
            status, reason = "skipped", f"its control could not be written ({error}); free space for temporary files"
        artifact.status, artifact.reason = status, reason
        for _, trial in ready:
            trial.report.status, trial.report.reason = status, reason
        return trials
    judge_weights(artifact)
    for runtime, trial in ready:
        _open(job, runtime, trial, path, expectation)
    return trials + _binary_trials(job, artifact, path, expectation)


def _folder(job: _Job) -> Path:
    """A temporary folder that is removed at the end."""
    return job.stack.enter_context(temporary_folder())


def _binary_trials(job: _Job, artifact: ArtifactReport, path: Path, expectation: Expectation) -> list[Trial]:
    """A trial of llama-perplexity on every device, for a GGUF file."""
    if job.binaries is None or artifact.format != "gguf":
        return []
    trials = []
    for profile in job.profiles:
        trial = Trial(RuntimeReport(RUNTIME, profile.name, artifact.path), profile.tolerances)
        trial.report.notes += expectation.notes
        trial.report.gate = "exact" if expectation.computes_in_floats else "quantized"
        trial.problem, trial.computes = expectation.problem, expectation.computes
        types = None if expectation.computes_in_floats else job.cache_types
        trial.report.notes += [] if types is None else [types.text]
        trial.measure = partial(measure, profile, job.binaries, path, expectation.control_file, job.windows, types)
        trials.append(trial)
    return trials


def _measure(trials: Sequence[Trial], base: Path, log: Callable[[str], None]) -> None:
    """Run llama-perplexity for every trial that waits for it."""
    for trial in trials:
        report = trial.report
        log(f"{report.artifact}: {report.name} on {report.device}")
        assert trial.measure is not None
        try:
            report.parity, report.control = trial.measure(base)
            report.status, report.reason = "fail", trial.problem  # until `judge` says otherwise
        except CannotStart as error:
            report.reason = str(error)  # skipped
        except UserError as error:
            report.status, report.reason = "fail", "; ".join(filter(None, [trial.problem, str(error)]))


def _find_runtimes(job: _Job, artifact: ArtifactReport) -> tuple[list[Trial], list[tuple[Runtime, Trial]]]:
    """A trial for every runtime of the artifact's format that a profile names, and those that can run here."""
    known = runtimes_by_name()
    trials: list[Trial] = []
    ready: list[tuple[Runtime, Trial]] = []
    for profile in job.profiles:
        for name in profile.runtimes:
            runtime = known.get(name)
            if runtime is not None and runtime.artifact_format != artifact.format:
                continue
            runtime = None if runtime is None else runtime.on(profile, job.transports[profile.name])
            trial = Trial(RuntimeReport(name, profile.name, artifact.path), profile.tolerances)
            trials.append(trial)
            missing = "no such runtime is installed" if runtime is None else runtime.unavailable()
            trial.report.reason = profile.unavailable() or missing
            if runtime is not None and trial.report.reason is None:
                ready.append((runtime, trial))
    return trials, ready


def _open(job: _Job, runtime: Runtime, trial: Trial, path: Path, expectation: Expectation) -> None:
    """Open the artifact and its control on one runtime."""
    report = trial.report
    report.gate = "exact" if expectation.computes_in_floats else "quantized"
    report.notes += expectation.notes
    report.reason = expectation.problem
    try:
        session = _opened(_with_cache(job, runtime, report).open(path), job.stack)
        trial.artifact = Contender(session)
        note = expectation.tokenizer_note(session, job.windows, job.text)
        report.notes += [note] if note else []
        report.notes += session.notes if isinstance(session, SaysNotes) else []
        _compute_ahead(session, job.windows)
        if expectation.open_control is not None:
            trial.control = Contender(_opened(expectation.open_control(runtime), job.stack))
            _compute_ahead(trial.control.session, job.windows)
        trial.layer_error, trial.computes = expectation.layer_error, expectation.computes
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
    report.status = "fail"  # until `judge` says otherwise


def _with_cache(job: _Job, runtime: Runtime, report: RuntimeReport) -> Runtime:
    """The runtime with the types of keys and values that were asked for, where it takes them and the gate allows it."""
    if job.cache_types is None:
        return runtime
    if isinstance(runtime, TakesCacheTypes) and report.gate != "exact":
        cached: Runtime = runtime.with_cache(job.cache_types)
        return cached
    kept = "a file in floats is compared exactly" if report.gate == "exact" else f"{runtime.name} has no choice of it"
    report.notes.append(f"KV cache as it is without --cache-type-k and --cache-type-v: {kept}")
    return runtime


def _opened(session: Session, stack: ExitStack) -> Session:
    stack.callback(session.close)
    return session


def _compute_ahead(session: GivesLogits, windows: Windows) -> None:
    """Let a session that cannot stay open beside others compute everything now."""
    if isinstance(session, ComputesAhead):
        session.compute_ahead(windows)


def _compare_layers(job: _Job, trials: Sequence[Trial], ours: TorchSession, log: Callable[[str], None]) -> None:
    """Compare hidden states layer by layer, where an artifact's graph can compute in floats and its runtime shows them.

    Where a stored weight differs, the first such tensor is named already.
    """
    inexact = {artifact.path for artifact in job.report.artifacts if artifact.status == "fail"}
    alive = [t for t in trials if not any(c is not None and c.failure for c in (t.artifact, t.control))]
    shown = [t for t in alive if t.open_float_graph is not None and t.report.artifact not in inexact]
    if not shown:
        return
    log("comparing hidden states, layer by layer")
    tokens = job.windows.tokens[0][:TOKENS]
    points = torch_points(ours, tokens, find_blocks(ours.model)[0])
    for trial in shown:
        assert trial.open_float_graph is not None
        try:
            session = trial.open_float_graph()
            if isinstance(session, ShowsHiddenStates) and session.shows_hidden_states:
                tolerance = max(trial.tolerances.layer_error, trial.layer_error)
                trial.report.divergence = locate(session, tokens, points, tolerance)
        except (UserError, CheckFailed) as error:
            trial.report.notes.append(f"its layers could not be compared: {error}")


def _evidence(job: _Job, artifacts: Sequence[Path], reference: Path | None) -> Evidence:
    """Hash everything before it is opened."""
    given = [fingerprint("artifact", path) for path in artifacts] + [fingerprint("text", job.text)]
    given += [] if reference is None else [fingerprint("reference", reference)]
    given += [] if job.binaries is None else [fingerprint("binary", file) for file in job.binaries.files()]
    windows, n_ctx = job.windows.tokens.shape
    tokens = hashlib.sha256(job.windows.tokens.astype("<i4").tobytes()).hexdigest()
    return Evidence(
        [fingerprint_run(job.run), *given], job.run.manifest, list(job.profiles), int(n_ctx), int(windows), tokens
    )
