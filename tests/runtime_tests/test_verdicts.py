"""Gates, statuses and device profiles: what decides between pass, fail and skipped."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import devices
from devices import Tolerances, get_device, load_devices, read_profile
from runtime_tests.checks.exactness import Difference, Exactness, check_exactness
from runtime_tests.checks.gates import miss_exact_gate, miss_quantized_gate
from runtime_tests.checks.layers import locate
from runtime_tests.checks.parity import Contender, score
from runtime_tests.checks.torch_points import Point
from runtime_tests.device_status import list_devices
from runtime_tests.interface import StoredTensor
from runtime_tests.report.report import ArtifactReport, RuntimeReport, VerifyReport
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import FloatArray, Scores, TokenArray, Windows
from signround_edge.run_directory import RunDirectory
from signround_edge.terminal.verification import render

LIMITS = Tolerances(exact_kld_mean=1e-5, quantized_kld_mean=0.02, standard_errors=3.0, ln_ppl_bias=0.01)


def scores(kld: float, ln_ratio: float = 0.0, stderr: float = 0.001) -> Scores:
    return Scores(
        ppl=10 * math.exp(ln_ratio),
        ppl_stderr=0.1,
        tokens=100,
        ppl_reference=10.0,
        kld_mean=kld,
        ln_ratio_stderr=stderr,
        top1_agreement=1.0,
    )


@pytest.mark.parametrize(("kld", "passes"), [(-1e-9, True), (1e-5, True), (1.1e-5, False), (math.nan, False)])
def test_the_exact_gate_bounds_the_divergence(kld: float, passes: bool) -> None:
    assert (miss_exact_gate(scores(kld), LIMITS) is None) is passes


@pytest.mark.parametrize(
    ("kld", "ln_ratio", "stderr", "passes"),
    [
        (1e-6, 0.0, 0.0, True),
        (0.007, 0.02, 0.01, True),  # within three standard errors
        (0.007, 0.009, 0.001, True),  # significant, and as small as rounding activations makes it
        (0.007, 0.02, 0.005, False),
        (0.007, -0.02, 0.005, False),
        (0.021, 0.0, 0.01, False),
        (math.nan, 0.0, 0.01, False),
        (0.007, math.nan, 0.01, False),
    ],
)
def test_the_quantized_gate_is_statistical(kld: float, ln_ratio: float, stderr: float, passes: bool) -> None:
    assert (miss_quantized_gate(scores(kld, ln_ratio, stderr), LIMITS) is None) is passes


class Shows:
    """A session that shows one tensor of hidden states."""

    def __init__(self, states: FloatArray) -> None:
        self.states = states

    def hidden_states(self, tokens: TokenArray, width: int) -> dict[str, FloatArray]:
        return {"node": self.states}


@pytest.mark.parametrize(("first", "agrees"), [(0.0, True), (1.0, False)])
def test_a_row_of_zeros_agrees_with_zeros_only(first: float, agrees: bool) -> None:
    """The embedding of a padding token is zeros, and a tokenizer may begin texts with that token."""
    expected = np.array([[0, 0], [1, 2]], dtype=np.float32)
    shown = np.array([[first, 0], [1, 2]], dtype=np.float32)
    found = locate(Shows(shown), np.zeros(2, np.int32), [Point("token embedding", True, expected)], 1e-4)
    assert (found.first is None) is agrees


def test_figures_that_are_no_numbers_are_null_in_json() -> None:
    """A file whose logits are NaN fails, and its certificate must still be JSON."""
    nothing = Scores(ppl=math.nan, ppl_stderr=math.nan, tokens=9, ppl_reference=10.0, kld_mean=math.inf)
    runtime = RuntimeReport("llama.cpp", "cpu-x86", "a.gguf", "fail", parity=nothing, control=nothing, fidelity=nothing)
    report = VerifyReport("run", "text", None, None, [ArtifactReport("a.gguf", "gguf", "pass")], [runtime])
    (found,) = json.loads(json.dumps(report.to_json(), allow_nan=False))["runtimes"]
    assert (found["ppl"], found["kld_mean"], found["control_kld_mean"]) == (None, None, None)
    assert (found["ppl_reference"], found["fidelity"]["kld_mean"]) == (10.0, None)


class Fixed:
    """A session that always gives the same logits, or fails."""

    def __init__(self, logits: FloatArray | None) -> None:
        self._logits = logits

    def logits(self, _tokens: TokenArray) -> FloatArray:
        if self._logits is None:
            raise UserError("it died")
        return self._logits


def test_a_contender_that_fails_does_not_stop_the_others() -> None:
    windows = Windows(np.zeros((3, 8), dtype=np.int32))
    logits = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    good, dead, narrow = Contender(Fixed(logits)), Contender(Fixed(None)), Contender(Fixed(logits[:, :4]))
    score([good, dead, narrow], windows, Fixed(logits), Fixed(logits), log=str)
    assert good.parity.scores().tokens == 9
    assert good.fidelity.scores().kld_mean == pytest.approx(0, abs=1e-7)
    assert dead.failure == "it died"
    assert narrow.failure is not None
    assert "[3, 4]" in narrow.failure


def stored(name: str, values: list[list[float]], kind: str = "F32") -> StoredTensor:
    return StoredTensor(name, np.array(values, dtype=np.float32), kind)


def test_exactness_counts_and_places_the_differences() -> None:
    expected = {
        "a": lambda: np.zeros((2, 2), dtype=np.float32),
        "b": lambda: np.ones((2, 2), dtype=np.float32),
        "c": lambda: np.ones(2, dtype=np.float32),
        "d": lambda: np.ones((1, 4), dtype=np.float32),
        "e": lambda: np.ones(2, dtype=np.float32),
    }
    result = check_exactness(
        expected,
        [
            stored("b", [[1, 1], [2, math.nan]], "Q4_0"),
            stored("a", [[0, -0.0], [0, 0]]),
            stored("c", [[1, 1]]),
            stored("d", [[1], [1], [1], [1]]),
            stored("x", [[1]]),
        ],
    )
    assert (result.tensors_checked, result.values_checked) == (4, 14)
    assert [(d.tensor, d.values) for d in result.differences] == [("b", 2), ("d", 0), ("x", 0), ("e", 0)]
    assert "first at row 1, column 0: 2, not 1" in result.differences[0].what
    assert not result.exact


def test_comparing_nothing_is_not_exact() -> None:
    assert not check_exactness({}, []).exact


def report(artifact: str = "pass", runtime: str = "pass") -> VerifyReport:
    exactness = Exactness(2, 20, [] if artifact == "pass" else [Difference("w", 1, "differs")])
    return VerifyReport(
        "run",
        "text",
        None,
        None,
        [ArtifactReport("a.gguf", "gguf", artifact, None, exactness)],  # type: ignore[arg-type]
        [RuntimeReport("llama.cpp", "cpu-x86", "a.gguf", runtime, "because")],  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("artifact", "runtime", "status"),
    [
        ("pass", "pass", "pass"),
        ("pass", "fail", "fail"),
        ("fail", "pass", "fail"),
        ("pass", "skipped", "skipped"),
        ("skipped", "skipped", "skipped"),
    ],
)
def test_only_a_run_that_passed_everything_passes(artifact: str, runtime: str, status: str) -> None:
    found = report(artifact, runtime)
    assert found.status == status
    assert found.passed is (status == "pass")
    assert found.to_json()["status"] == status
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(found))
    assert ("PASS" in console.export_text()) is (status == "pass")


def test_no_artifact_is_no_pass() -> None:
    assert not VerifyReport("run", "text", None).passed


def test_a_runtime_that_cannot_run_here_is_skipped_and_that_is_no_pass(
    run: RunDirectory, gguf_file: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", absent)
    found = verify(run, [gguf_file], text, n_ctx=64, max_windows=1, log=str)
    (runtime,) = found.to_json()["runtimes"]
    assert runtime["status"] == "skipped"
    assert "xllamacpp is not installed" in runtime["reason"]
    assert not found.passed


def test_a_device_that_is_another_machine_is_skipped(
    run: RunDirectory, gguf_file: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    found = verify(run, [gguf_file], text, n_ctx=64, max_windows=1, log=str)
    assert found.runtimes[0].status == "skipped"
    assert "this machine is riscv64" in str(found.runtimes[0].reason)
    assert not next(s for s in list_devices() if s.profile.name == "cpu-x86").ready


def test_an_unknown_device_lists_the_known_ones(run: RunDirectory, gguf_file: Path, text: Path) -> None:
    with pytest.raises(UserError, match=r"known devices are .*cpu-x86"):
        verify(run, [gguf_file], text, devices=["toaster"], log=str)


def test_the_shipped_profiles_are_listed_with_what_is_ready() -> None:
    assert set(load_devices()) == {status.profile.name for status in list_devices()}
    status = next(s for s in list_devices() if s.profile.name == "cpu-x86")
    data = status.to_json()
    assert data["ready"] is status.ready
    assert [r["name"] for r in data["runtimes"]] == list(get_device("cpu-x86").runtimes)


@pytest.mark.parametrize("content", ["", "name = 3", "not toml at all ["])
def test_a_broken_profile_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(UserError, match=r"mine\.toml is not a device profile"):
        read_profile(tmp_path / "mine.toml")


def test_every_profile_file_is_named_as_its_device() -> None:
    folder = Path(devices.__file__).parent
    assert {p.stem for p in folder.glob("*.toml")} == set(load_devices())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_broken_logits_are_scored_without_a_warning(value: float) -> None:
    logits = np.zeros((8, 5), dtype=np.float32)
    broken = np.where(np.arange(5) == 1, np.float32(value), logits)
    contender = Contender(Fixed(broken))
    score([contender], Windows(np.zeros((3, 8), dtype=np.int32)), Fixed(logits), log=str)
    assert miss_exact_gate(contender.parity.scores(), LIMITS) is not None
