"""`verify --llama-bin`: the file of log-probabilities, the program's figures, and the ways to a device."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.llama_perplexity import PROGRAM, cached_folder
from devices import get_device
from runtime_tests.llama_binaries.hosts import FarHost, LocalHost, host_of
from runtime_tests.llama_binaries.kl_base import KlBaseWriter, encode
from runtime_tests.llama_binaries.perplexity import LlamaBinaries, measure
from runtime_tests.llama_binaries.statistics import read_statistics
from runtime_tests.transports.ssh_client import OPTIONS_VARIABLE, SshClient
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import Scores, Windows, log_softmax
from signround_edge.evaluation.perplexity import TorchSession, text_windows
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests import sabotage
from tests.runtime_tests.adb_server import AdbServer, Phone
from tests.runtime_tests.processes import descendants, killed_client, wait_until
from tests.runtime_tests.sshd import free_port, listens, running_sshd

SIZE = {"n_ctx": 64, "max_windows": 4}
HOW = "llama-perplexity is not in the cache (python -m benchmarks.llama_perplexity builds it)"
OUTPUT = Path(__file__).parent / "b11434.txt"  # of a real run
ADB_PORT = "ANDROID_ADB_SERVER_PORT"
needs_adb = pytest.mark.skipif(shutil.which("adb") is None, reason="adb is not installed (apt-get install adb)")
needs_program = pytest.mark.skipif(not (cached_folder() / PROGRAM).is_file(), reason=HOW)


# The file


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 1000))
def test_log_probabilities_are_known_to_half_a_step(vocab: int, rows: int, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((rows, vocab)).astype(np.float32) * 5
    coded = encode(logits)
    assert coded.shape == (rows, 4 + vocab + vocab % 2)
    scale, smallest = coded[:, :4].copy().view("<f4").T
    decoded = scale[:, None] * coded[:, 4 : 4 + vocab] + smallest[:, None]
    expected = log_softmax(logits)
    kept = logits > logits.max(axis=-1, keepdims=True) - 16
    assert np.abs(decoded - expected)[kept].max() <= scale.max() / 2 + 1e-5


def test_equal_logits_have_no_scale() -> None:
    coded = encode(np.zeros((1, 4), dtype=np.float32))
    scale, smallest = coded[:, :4].copy().view("<f4")[0]
    assert scale == 0
    assert smallest == pytest.approx(-np.log(4))
    assert not coded[:, 4:].any()


def test_the_file_begins_with_the_windows(tmp_path: Path) -> None:
    windows = Windows(np.arange(16, dtype=np.int32).reshape(2, 8))
    with KlBaseWriter(tmp_path / "base", windows) as writer:
        for _ in range(2):
            writer.add(np.zeros((3, 5), dtype=np.float32))
    content = (tmp_path / "base").read_bytes()
    assert content[:20] == b"_logits_" + struct.pack("<Iii", 8, 5, 2)
    np.testing.assert_array_equal(np.frombuffer(content[20 : 20 + 64], "<i4"), np.arange(16))
    assert len(content) == 20 + 64 + 2 * 3 * 2 * (4 + 6)


# The figures


def test_the_statistics_of_a_real_run_are_read() -> None:
    """What build 11434 printed for tiny-llama in Q4_0, four windows of 256."""
    scores = read_statistics(OUTPUT.read_text(), 508)
    assert (scores.ppl, scores.ppl_reference) == (31.921469, 31.916038)
    assert (scores.kld_mean, scores.kld_stderr) == (0.000142, 0.000004)
    assert (scores.kld_max, scores.kld_p99, scores.kld_median) == (0.000754, 0.000538, 0.000121)
    assert scores.top1_agreement == pytest.approx(0.99606)
    assert scores.ln_ratio_stderr == 0.000783


@pytest.mark.parametrize("output", ["", "error: failed to load model\n", "Mean PPL(Q) : 3 ± 1\nkilled"])
def test_output_without_statistics_is_a_sentence_with_its_last_lines(output: str) -> None:
    with pytest.raises(UserError, match=f"no statistics.*{output.strip().splitlines()[-1] if output else ''}"):
        read_statistics(output, 1)


# Asking again


class Program:
    """A stand-in for llama-perplexity that ends without statistics at first, as the real one sometimes does.

    Args:
        folder: where to write it.
        silent: after how many calls it prints what a real run printed.
        code: of every call.
    """

    def __init__(self, folder: Path, silent: int, code: int = 0) -> None:
        self._calls = folder / "calls"
        self._folder = folder
        (folder / PROGRAM).write_text(
            f"#!/bin/sh\necho >>{self._calls}\necho 'kl_divergence: computing'\n"
            f'if [ "$(wc -l <{self._calls})" -gt {silent} ]; then cat {OUTPUT}; fi\nexit {code}\n'
        )
        (folder / PROGRAM).chmod(0o755)

    @property
    def calls(self) -> int:
        return len(self._calls.read_text().splitlines())

    def measure(self) -> Scores:
        windows = Windows(np.zeros((4, 64), dtype=np.int32))
        model, base = self._folder / "model.gguf", self._folder / "base"
        binaries = LlamaBinaries.find(self._folder, windows)
        return measure(get_device("cpu-x86"), binaries, model, None, windows, None, base)[0]


@pytest.mark.parametrize("silent", [0, 1, 4])
def test_a_program_that_printed_no_statistics_is_asked_again(silent: int, tmp_path: Path) -> None:
    program = Program(tmp_path, silent)
    assert program.measure().ppl == 31.921469
    assert program.calls == silent + 1


def test_a_program_that_never_prints_statistics_is_a_sentence(tmp_path: Path) -> None:
    program = Program(tmp_path, silent=100)
    with pytest.raises(UserError, match="printed no statistics; its last lines: kl_divergence: computing"):
        program.measure()
    assert program.calls == 5


def test_a_program_that_fails_is_not_asked_again(tmp_path: Path) -> None:
    program = Program(tmp_path, silent=100, code=3)
    with pytest.raises(UserError, match="ended with code 3"):
        program.measure()
    assert program.calls == 1


# The hosts


def test_a_local_command_says_its_code_and_its_output() -> None:
    with LocalHost() as host:
        done = host.run(["sh", "-c", "echo out; echo $X >&2; exit 3"], {"X": "a b"}, 30)
    assert (done.code, done.output) == (3, "out\na b\n")


def test_a_command_that_hangs_is_ended() -> None:
    with LocalHost() as host, pytest.raises(UserError, match=r"no answer within 0\.5 s"):
        host.run(["sleep", "54321"], {}, 0.5)
    assert not running("sleep 54321")


def running(command: str) -> bool:
    return subprocess.run(["pgrep", "-fx", command], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_a_command_dies_with_its_client() -> None:
    with killed_client(
        "from runtime_tests.llama_binaries.hosts import LocalHost; LocalHost().run(['sleep', '54322'], {}, 600)"
    ):
        wait_until(lambda: running("sleep 54322"))
    wait_until(lambda: not running("sleep 54322"))


def test_files_are_pushed_over_ssh_and_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "program"
    script.write_text('#!/bin/sh\ncat "$1"; exit 5\n')
    script.chmod(0o755)
    content = tmp_path / "content.txt"
    content.write_text("x" * 3_000_000 + "end")
    with running_sshd(tmp_path) as sshd:
        monkeypatch.setenv(OPTIONS_VARIABLE, sshd.options)
        profile = replace(get_device("cpu-x86"), transport="ssh")
        with pytest.raises(UserError, match="with an address"):
            host_of(profile)
        with FarHost(SshClient(sshd.address)) as host:
            program, pushed = host.push(script), host.push(content)
            done = host.run([program, pushed], {}, 30)
            assert done.code == 5
            assert done.output.endswith("xend")
            assert Path(pushed).is_file()
            with pytest.raises(UserError, match="no answer"):
                host.run(["sleep", "54323"], {}, 1)
        wait_until(lambda: not running("sleep 54323"))
        assert not Path(pushed).parent.exists()
        wait_until(lambda: descendants(sshd.pid) == [])


@needs_adb
def test_a_command_runs_on_a_phone_and_its_folder_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real `adb` client, and a phone that is this machine."""
    held, _open_end = os.pipe()  # as the connection, which stays open

    def shell(line: str) -> str:
        line = line.replace("/data/local/tmp", str(tmp_path))
        return subprocess.run(["sh", "-c", line], stdin=held, capture_output=True, text=True, check=False).stdout

    with AdbServer(Phone(shell=shell)) as server:
        monkeypatch.setenv(ADB_PORT, str(server.port))
        with host_of(get_device("pixel-8")) as host:
            (folder,) = tmp_path.iterdir()
            assert host.run(["sh", "-c", "echo $X; echo err >&2"], {"X": "a b"}, 30).output == "a b\nerr\n"
        assert not folder.exists()
        assert not server.killed  # it ran before us


@needs_adb
def test_which_phone_is_asked_as_for_its_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    with AdbServer(Phone("A1"), Phone("B2")) as server:
        monkeypatch.setenv(ADB_PORT, str(server.port))
        with pytest.raises(UserError, match="several phones, A1, B2"):
            host_of(get_device("pixel-8"))
    port = free_port()
    monkeypatch.setenv(ADB_PORT, str(port))
    with pytest.raises(UserError, match="adb sees no phone"):
        host_of(get_device("pixel-8"))
    assert not listens(port)  # adb's server, which we have started


def test_an_unreachable_machine_is_a_sentence() -> None:
    with pytest.raises(UserError, match="check that the device is connected"):
        FarHost(SshClient("nobody@127.0.0.1:9"))


# `verify`


@pytest.fixture
def wrong_abi(tmp_path: Path) -> Path:
    """A folder whose program is an ELF file for another machine."""
    folder = tmp_path / "arm64"
    folder.mkdir()
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 183, 1)  # EM_AARCH64
    (folder / PROGRAM).write_bytes(header.ljust(4096, b"\0"))
    (folder / PROGRAM).chmod(0o755)
    return folder


def test_binaries_for_another_machine_are_skipped_visibly(
    wrong_abi: Path, run: RunDirectory, gguf_file: Path, text: Path
) -> None:
    report = verify(run, [gguf_file], text, llama_bin=wrong_abi, log=str, **SIZE)
    ours, binary = report.runtimes
    assert ours.status == "pass"
    assert (binary.name, binary.status) == ("llama-perplexity", "skipped")
    assert "give binaries for this device" in str(binary.reason)


def test_a_folder_without_the_program_is_bad_input(
    tmp_path: Path, run: RunDirectory, gguf_file: Path, text: Path
) -> None:
    with pytest.raises(UserError, match="holds no llama-perplexity"):
        verify(run, [gguf_file], text, llama_bin=tmp_path, log=str, **SIZE)


def test_too_few_tokens_are_bad_input(wrong_abi: Path, run: RunDirectory, gguf_file: Path, text: Path) -> None:
    with pytest.raises(UserError, match="give more --windows"):
        verify(run, [gguf_file], text, llama_bin=wrong_abi, log=str, n_ctx=64, max_windows=2)


@needs_program
def test_the_real_program_agrees_with_our_own_figures(run: RunDirectory, gguf_file: Path, text: Path) -> None:
    report = verify(run, [gguf_file], text, llama_bin=cached_folder(), log=str, **SIZE)
    assert report.passed, [r.to_json() for r in report.runtimes]
    ours, theirs = (r.to_json() for r in report.runtimes)
    assert theirs["ppl_reference"] == pytest.approx(ours["ppl_reference"], rel=1e-4)
    assert theirs["ppl"] == pytest.approx(ours["ppl"], rel=2e-3)  # two builds of llama.cpp, other kernels
    assert theirs["kld_mean"] == pytest.approx(ours["kld_mean"], rel=0.25)
    assert theirs["control_kld_mean"] <= 2e-6
    assert theirs["tokens"] == ours["tokens"]
    assert report.evidence is not None
    assert [f.role for f in report.evidence.fingerprints][-1] == "binary"


@needs_program
@pytest.mark.full
def test_our_file_of_log_probabilities_is_the_programs_own(
    run: RunDirectory, text: Path, tmp_path: Path, gguf_file: Path
) -> None:
    from exporters.gguf import GgufExporter
    from exporters.interface import ExportOptions

    model = GgufExporter().export(run, tmp_path / "f32.gguf", ExportOptions(dtype="f32", log=str))
    windows = text_windows(run.config_dir, text, 64, 4)
    session = TorchSession(load_run_model(run))
    with KlBaseWriter(tmp_path / "ours", windows) as writer:
        for window in windows.tokens:
            writer.add(session.logits(window)[windows.scored])
    command = [cached_folder() / PROGRAM, "-m", model, "-f", text, "-c", "64", "-b", "64", "-t", "1", "--chunks", "4"]
    floats = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    subprocess.run([*command, *floats, "--kl-divergence-base", tmp_path / "theirs"], check=True, capture_output=True)
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    assert ours[:20] == theirs[:20]
    head, width = 20 + 4 * 4 * 64, 4 + 300
    tokens = [np.frombuffer(content[20:head], "<i4").reshape(4, 64) for content in (ours, theirs)]
    np.testing.assert_array_equal(tokens[0][:, 1:], tokens[1][:, 1:])  # the first becomes BOS while it is read
    ours_rows, their_rows = (np.frombuffer(content[head:], "<u2").reshape(-1, width) for content in (ours, theirs))
    steps = np.abs(ours_rows[:, 4:].astype(np.int32) - their_rows[:, 4:])
    assert steps.max() <= 2  # of 65535
    floats_of = [rows[:, :4].copy().view("<f4") for rows in (ours_rows, their_rows)]
    np.testing.assert_allclose(*floats_of, rtol=1e-5)


@needs_program
@pytest.mark.parametrize(
    "what", ["wrong RoPE base", "wrong head count", pytest.param("wrong epsilon", marks=pytest.mark.full)]
)
def test_the_real_program_sees_sabotage(
    what: str, run: RunDirectory, gguf_file: Path, text: Path, tmp_path: Path
) -> None:
    artifact = Path(shutil.copy(gguf_file, tmp_path / "model.gguf"))
    sabotage.damage_gguf(artifact, sabotage.GGUF_METADATA[what].change)
    report = verify(run, [artifact], text, llama_bin=cached_folder(), log=str, **SIZE)
    binary = report.runtimes[1]
    assert (binary.name, binary.status) == ("llama-perplexity", "fail")
    assert sabotage.GGUF_METADATA[what].names[0] in str(binary.reason)


@needs_program
@pytest.mark.full
def test_the_real_program_runs_over_ssh(
    run: RunDirectory, gguf_file: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime_tests.llama_binaries import perplexity

    with running_sshd(tmp_path) as sshd:
        monkeypatch.setenv(OPTIONS_VARIABLE, sshd.options)
        monkeypatch.setattr(perplexity, "host_of", lambda _profile: FarHost(SshClient(sshd.address)))
        report = verify(run, [gguf_file], text, llama_bin=cached_folder(), log=str, **SIZE)
    assert [(r.status, r.reason) for r in report.runtimes] == [("pass", None), ("pass", None)]
