"""Disturb `verify` at random moments: kill workers or the command itself, change or remove its files, fill its disk,
cut its connection to another machine (an sshd of our own here).

    python -m tests.runtime_tests.disturbance [RUNS] [SEED]

makes a small run and its artifacts, measures an undisturbed `verify`, then disturbs RUNS of them (50) and prints a line
for each. It ends with an error when a verdict is wrong (a pass with other figures, or of files that were changed),
when a process is left, or when a temporary file is left after the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.temporary import remove_abandoned
from runtime_tests.transports.ssh_client import OPTIONS_VARIABLE
from runtime_tests.verify import verify  # noqa: F401  imported before the fork
from signround_edge.cli import main as main_command
from tests.runtime_tests.processes import command_of, descendants
from tests.runtime_tests.sshd import Sshd, running_sshd

KINDS = (
    "kill a worker",
    "crash a worker",
    "interrupt",
    "terminate",
    "kill",
    "change the file",
    "remove the file",
    "disk",
    "cut the connection",
    "kill a worker there",
)
OVER_SSH = ("cut the connection", "kill a worker there")
FIGURES = ("ppl", "kld_mean", "control_kld_mean", "status")
_SMALL_DISK = "12m"  # the control of the small model does not fit beside what the disturbance writes
_PATIENCE = 900.0  # seconds
_NOT_OURS = (".ses",)  # ONNX Runtime's telemetry keeps a random number there, whoever runs it
_MARK = "SIGNROUND_EDGE_DISTURBED"  # in the environment of everything that a disturbed command starts


@dataclass(frozen=True)
class Place:
    """What is verified: a folder with run, model.gguf, onnx and text.txt; on this machine, or over ssh."""

    folder: Path
    sshd: Sshd | None = None

    def arguments(self) -> list[str]:
        inputs = [str(self.folder / name) for name in ("run", "model.gguf", "onnx")]
        options = ["--text", str(self.folder / "text.txt"), "--n-ctx", "64", "--windows", "3", "--json"]
        device = ["--device", f"raspberry-pi-5={self.sshd.address}"] if self.sshd else []
        return ["verify", *inputs, *options, *device]

    def environment(self) -> dict[str, str]:
        return {OPTIONS_VARIABLE: self.sshd.options} if self.sshd else {}

    def sessions(self) -> list[int]:
        """Processes that serve connections on the other machine."""
        return [pid for pid in self._there() if command_of(pid).startswith("sshd")]

    def workers_there(self) -> list[int]:
        found = [pid for pid in self._there() if "runtime_tests.worker" in command_of(pid)]
        return [pid for pid in found if "sh -c" not in command_of(pid)]

    def _there(self) -> list[int]:
        return self.sshd.children() if self.sshd else []


@dataclass(frozen=True)
class Sound:
    """An undisturbed `verify`: its document, and after how many seconds it said each line of its progress."""

    document: dict[str, Any]
    moments: list[float]


@dataclass(frozen=True)
class Outcome:
    """What a disturbed command did; `moment` is the number of lines that it had said, and some part of the next one."""

    kind: str
    moment: float
    code: int
    status: str
    said: str


class Command:
    """The command line in a forked process, which spares each run the import of torch.

    Args:
        place: what to verify.
        folder: for its output.
        temporary: its folder for temporary files.
        mark: in the environment of everything that it starts.
    """

    def __init__(self, place: Place, folder: Path, temporary: Path, mark: str) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._out.touch()
        self._err.touch()
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(place, temporary, mark)

    def lines(self) -> list[str]:
        """What it has said so far."""
        return self._err.read_text(errors="replace").splitlines()

    def output(self) -> str:
        return self._out.read_text()

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Until it has ended, or a condition holds."""
        deadline = time.monotonic() + _PATIENCE
        while self.code is None and not until():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it hangs; its last lines: {self.lines()[-3:]}")
            else:
                time.sleep(0.01)

    def _become(self, place: Place, temporary: Path, mark: str) -> None:
        """The child: run the command line and leave."""
        code = 99
        try:
            for number, path in ((1, self._out), (2, self._err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115  pytest's are elsewhere
            os.environ |= {_MARK: mark, "TMPDIR": str(temporary), **place.environment()}
            tempfile.tempdir = None
            signal.signal(signal.SIGINT, signal.default_int_handler)
            main_command(place.arguments())
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 98
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def undisturbed(place: Place) -> Sound:
    """Run it once."""
    with tempfile.TemporaryDirectory(prefix="disturbed-") as name:
        folder, moments = Path(name), list[float]()
        (folder / "tmp").mkdir()
        started = time.monotonic()
        command = Command(place, folder, folder / "tmp", "none")

        def noted() -> bool:
            moments.extend([time.monotonic() - started] * (len(command.lines()) - len(moments)))
            return False

        command.wait(noted)
        assert command.code == 0, command.lines()[-5:]
        return Sound(json.loads(command.output()), [0.0, *moments, time.monotonic() - started])


def disturb(place: Place, sound: Sound, kind: str, generator: random.Random) -> Outcome:
    """Run on a copy, disturb at a random moment, and check everything that must still hold."""
    line = generator.randrange(len(sound.moments) - 1)
    share = generator.random()
    pause = share * (sound.moments[line + 1] - sound.moments[line])
    with tempfile.TemporaryDirectory(prefix="disturbed-") as name:
        folder = Path(name)
        copy, temporary = replace(place, folder=folder / "place"), folder / "tmp"
        shutil.copytree(place.folder, copy.folder)
        temporary.mkdir()
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        with _small_disk(temporary) if kind == "disk" else contextlib.nullcontext():
            command = Command(copy, folder, temporary, mark)
            command.wait(lambda: len(command.lines()) >= line)
            moment = time.monotonic() + pause
            command.wait(lambda: time.monotonic() >= moment and _has_victim(kind, command, copy))
            _do(kind, command, copy, temporary, generator)
            command.wait()
            _check_nothing_runs(mark, copy)
            _check_temporary(kind, temporary)
        assert command.code is not None
        said = " ".join(command.lines()[-3:])
        outcome = Outcome(kind, line + share, command.code, _status(command.output()), said)
        return _checked(outcome, command.output(), sound.document)


def _has_victim(kind: str, command: Command, copy: Place) -> bool:
    """Whether there is a process to kill, for the kinds that kill one below the command or on the other machine."""
    if kind in ("kill a worker", "crash a worker"):
        return bool(descendants(command.pid))
    return kind not in OVER_SSH or bool(copy.workers_there())


def _do(kind: str, command: Command, copy: Place, temporary: Path, generator: random.Random) -> None:
    if command.code is not None:
        return
    workers = descendants(command.pid)
    artifact = copy.folder / generator.choice(("model.gguf", "onnx/model.onnx.data", "onnx/model.onnx"))
    with contextlib.suppress(ProcessLookupError):
        if kind in ("kill a worker", "crash a worker") and workers:
            os.kill(generator.choice(workers), signal.SIGKILL if kind == "kill a worker" else signal.SIGSEGV)
        elif kind in ("interrupt", "terminate", "kill"):
            number = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}[kind]
            os.kill(command.pid, number)
        elif kind == "cut the connection":
            for pid in copy.sessions():
                os.kill(pid, signal.SIGKILL)
        elif kind == "kill a worker there":
            os.kill(generator.choice(copy.workers_there()), signal.SIGKILL)
        elif kind == "change the file":
            with artifact.open("r+b") as file:
                file.truncate(artifact.stat().st_size // 2)
        elif kind == "remove the file":
            artifact.unlink()
        elif kind == "disk":
            with contextlib.suppress(OSError), (temporary / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(1 << 20))


def _checked(outcome: Outcome, stdout: str, sound: dict[str, Any]) -> Outcome:
    """A verdict is right, or there is none; see the module."""
    codes = {
        "pass": (0,),
        "fail": (1,),
        "skipped": (1,),
        "none": (2, 130, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM),
    }
    assert outcome.code in codes[outcome.status], outcome
    assert "Traceback" not in outcome.said, outcome
    if outcome.status == "pass":
        found = json.loads(stdout)
        for ours, expected in zip(found["runtimes"], sound["runtimes"], strict=True):
            assert {name: ours[name] for name in FIGURES} == {name: expected[name] for name in FIGURES}, outcome
    if outcome.status in ("fail", "skipped"):
        found = json.loads(stdout)
        reasons = [entry["reason"] for entry in found["artifacts"] + found["runtimes"]] + [found["changed"]]
        assert any(reasons), outcome
    if outcome.kind == "disk":
        assert outcome.status != "fail", (outcome, stdout)
    if outcome.kind == "cut the connection":  # it is made anew, and the run goes on
        assert outcome.status == "pass", (outcome, stdout)
    return outcome


def _status(stdout: str) -> str:
    return str(json.loads(stdout)["status"]) if stdout.strip() else "none"


def _check_nothing_runs(mark: str, place: Place) -> None:
    deadline = time.monotonic() + 20
    while found := [*_marked(mark), *place.workers_there(), *place.sessions()]:
        assert time.monotonic() < deadline, f"left running: {found}"
        time.sleep(0.1)


def _marked(mark: str) -> list[int]:
    """Processes that the command has started, whoever their parent is now."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def _check_temporary(kind: str, temporary: Path) -> None:
    """Nothing is left; after SIGKILL, which leaves no time to tidy up, nothing is left by the next run."""
    (temporary / "filler").unlink(missing_ok=True)
    if kind == "kill":
        remove_abandoned(temporary)
    left = [entry.name for entry in temporary.iterdir() if entry.name not in _NOT_OURS]
    assert not left, f"{kind} left {left}"


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of a few megabytes; only root can make one."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def kinds_here() -> list[str]:
    """The disturbances that this machine allows."""
    with tempfile.TemporaryDirectory() as name:
        try:
            with _small_disk(Path(name)):
                return list(KINDS)
        except (OSError, subprocess.CalledProcessError):
            return [kind for kind in KINDS if kind != "disk"]


def tiny_llama_place(folder: Path) -> Place:
    """The shipped tiny model, rounded to nearest, in both formats."""
    from exporters.gguf import GgufExporter
    from exporters.interface import ExportOptions
    from exporters.onnx import OnnxExporter
    from signround_edge.demo import evaluation_text_path, tiny_llama_path
    from tests.support import make_run

    run = make_run(tiny_llama_path(), folder / "run", "gguf:q4_0,onnx:w4g32")
    GgufExporter().export(run, folder / "model.gguf", ExportOptions(log=str))
    OnnxExporter().export(run, folder / "onnx", ExportOptions(log=str))
    shutil.copy(evaluation_text_path(), folder / "text.txt")
    return Place(folder)


def main() -> None:
    """See the module."""
    runs, seed = (
        (int(argument) for argument in [*sys.argv[1:], "50", "0"][:2]) if len(sys.argv) != 2 else (int(sys.argv[1]), 0)
    )
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="disturbance-") as name, _sshd(Path(name)) as sshd:
        here = tiny_llama_place(Path(name))
        places = [here] if sshd is None else [here, replace(here, sshd=sshd)]
        sounds = [undisturbed(place) for place in places]
        for sound in sounds:
            print(f"undisturbed: {sound.document['status']} in {sound.moments[-1]:.1f} s", flush=True)
        kinds = [kind for kind in kinds_here() if sshd is not None or kind not in OVER_SSH]
        counts = Counter[tuple[str, str]]()
        for number in range(runs):
            kind = kinds[number % len(kinds)]
            where = -1 if kind in OVER_SSH else 0
            outcome = disturb(places[where], sounds[where], kind, generator)
            counts[kind, outcome.status] += 1
            last = outcome.said.splitlines()[-1][:110] if outcome.said else ""
            print(
                f"{number + 1:3} {kind:16} at line {outcome.moment:4.1f}: {outcome.status:8} {outcome.code:4} {last}",
                flush=True,
            )
    for (kind, status), count in sorted(counts.items()):
        print(f"{kind:16} {status:8} {count}")


@contextlib.contextmanager
def _sshd(folder: Path) -> Iterator[Sshd | None]:
    """The other machine, or None with a line that says why there is none."""
    keys = folder / "sshd"
    keys.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(running_sshd(keys))
        except pytest.skip.Exception as reason:
            print(f"nothing over ssh: {reason}", flush=True)
            server = None
        yield server


if __name__ == "__main__":
    main()
