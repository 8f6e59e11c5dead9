"""Disturb `verify` at random moments: kill workers or the command itself, change or remove its files, fill its disk.

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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runtime_tests.sshd import descendants

KINDS = (
    "kill a worker",
    "crash a worker",
    "interrupt",
    "terminate",
    "kill",
    "change the file",
    "remove the file",
    "disk",
)
FIGURES = ("ppl", "kld_mean", "control_kld_mean", "status")
_SMALL_DISK = "12m"  # the control of the small model does not fit beside what the disturbance writes
_NOT_OURS = (".ses",)  # ONNX Runtime's telemetry keeps a random number there, whoever runs it
_MARK = "SIGNROUND_EDGE_DISTURBED"  # in the environment of everything that a disturbed command starts


@dataclass(frozen=True)
class Place:
    """What is verified: a folder with run, model.gguf, onnx and text.txt."""

    folder: Path

    def command(self) -> list[str]:
        arguments = [str(self.folder / name) for name in ("run", "model.gguf", "onnx")]
        options = ["--text", str(self.folder / "text.txt"), "--n-ctx", "64", "--windows", "3", "--json"]
        return [sys.executable, "-m", "signround_edge.cli", "verify", *arguments, *options]


@dataclass(frozen=True)
class Outcome:
    """What a disturbed command did."""

    kind: str
    moment: float
    code: int
    status: str
    said: str


def undisturbed(place: Place) -> tuple[dict[str, Any], float]:
    """The JSON document, and the seconds that it took."""
    started = time.monotonic()
    done = subprocess.run(place.command(), capture_output=True, text=True, check=False, env=_environment("0"))
    assert done.returncode == 0, done.stderr[-2000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document, time.monotonic() - started


def disturb(place: Place, sound: dict[str, Any], seconds: float, kind: str, generator: random.Random) -> Outcome:
    """Run on a copy, disturb at a random moment, and check everything that must still hold."""
    moment = generator.uniform(0.05, 1.0) * seconds
    with tempfile.TemporaryDirectory(prefix="disturbed-") as name:
        copy, temporary = Place(Path(name) / "place"), Path(name) / "tmp"
        shutil.copytree(place.folder, copy.folder)
        temporary.mkdir()
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        with _small_disk(temporary) if kind == "disk" else contextlib.nullcontext():
            environment = {**_environment(mark), "TMPDIR": str(temporary)}
            process = subprocess.Popen(
                copy.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            _do(kind, process, copy, temporary, generator)
            stdout, stderr = process.communicate(timeout=600)
            _check_nothing_runs(mark)
            _check_temporary(kind, temporary, environment)
    return _checked(Outcome(kind, moment, process.returncode, _status(stdout), stderr.strip()[-300:]), stdout, sound)


def _do(kind: str, process: subprocess.Popen[str], copy: Place, temporary: Path, generator: random.Random) -> None:
    workers = descendants(process.pid)
    artifact = copy.folder / generator.choice(("model.gguf", "onnx/model.onnx.data", "onnx/model.onnx"))
    with contextlib.suppress(ProcessLookupError):
        if kind in ("kill a worker", "crash a worker") and workers:
            os.kill(generator.choice(workers), signal.SIGKILL if kind == "kill a worker" else signal.SIGSEGV)
        elif kind in ("interrupt", "terminate", "kill"):
            number = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}[kind]
            process.send_signal(number)
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
    return outcome


def _status(stdout: str) -> str:
    return str(json.loads(stdout)["status"]) if stdout.strip() else "none"


def _environment(mark: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", _MARK: mark}


def _check_nothing_runs(mark: str) -> None:
    deadline = time.monotonic() + 20
    while found := _marked(mark):
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


def _check_temporary(kind: str, temporary: Path, environment: dict[str, str]) -> None:
    """Nothing is left; after SIGKILL, which leaves no time to tidy up, nothing is left by the next run."""
    (temporary / "filler").unlink(missing_ok=True)
    if kind == "kill":
        sweep = "from runtime_tests.temporary import remove_abandoned; remove_abandoned()"
        subprocess.run([sys.executable, "-c", sweep], check=True, env=environment)
    left = [entry.name for entry in temporary.iterdir() if entry.name not in _NOT_OURS]
    assert not left, f"{kind} left {left}"


@contextlib.contextmanager
def _small_disk(folder: Path):  # type: ignore[no-untyped-def]
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
    with tempfile.TemporaryDirectory(prefix="disturbance-") as name:
        place = tiny_llama_place(Path(name))
        sound, seconds = undisturbed(place)
        print(f"undisturbed: {sound['status']} in {seconds:.1f} s", flush=True)
        kinds, counts = kinds_here(), Counter[tuple[str, str]]()
        for number in range(runs):
            kind = kinds[number % len(kinds)]
            outcome = disturb(place, sound, seconds, kind, generator)
            counts[kind, outcome.status] += 1
            last = outcome.said.splitlines()[-1][:110] if outcome.said else ""
            print(
                f"{number + 1:3} {kind:16} at {outcome.moment:5.1f} s: {outcome.status:8} {outcome.code:4} {last}",
                flush=True,
            )
    for (kind, status), count in sorted(counts.items()):
        print(f"{kind:16} {status:8} {count}")


if __name__ == "__main__":
    main()
