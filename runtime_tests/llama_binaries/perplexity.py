"""Run `llama-perplexity --kl-divergence` on a device and read its figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from devices import DeviceProfile
from exporters.gguf.container.splits import model_files
from runtime_tests.llama_binaries.hosts import Host, host_of
from runtime_tests.llama_binaries.statistics import has_statistics, read_statistics
from signround_edge.errors import UserError, last_lines
from signround_edge.evaluation.cache_types import CacheTypes
from signround_edge.evaluation.metrics import Scores, Windows

RUNTIME = "llama-perplexity"
SECONDS_A_WINDOW = 900.0
# It writes its log in a thread of its own, and sometimes ends (with code 0) before that has written the statistics: in
# one run of twelve into a file, in seven of twelve into a pipe on a busy core (b11434).
_TRIES = 5
_SMALLEST_SAMPLE = 100  # scored tokens from which on llama-perplexity prints statistics
_MICRO_BATCH = 512  # part of the result, see LlamaCppEngine
_LIBRARIES = ("*.so", "*.so.*", "*.dylib")
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127
_CANNOT_START = ("Exec format error", "cannot execute", "not executable", "error while loading shared libraries")


class CannotStart(UserError):
    """The binary is not for this device; the runtime is skipped there."""


@dataclass(frozen=True)
class LlamaBinaries:
    """A folder with llama-perplexity, and the shared libraries that it needs, for the device's ABI."""

    folder: Path

    @classmethod
    def find(cls, folder: Path, windows: Windows) -> LlamaBinaries:
        """UserError when the program is not there, or would print no statistics for so few tokens."""
        if not (folder / RUNTIME).is_file():
            raise UserError(
                f"--llama-bin {folder} holds no {RUNTIME}; give the folder of llama.cpp's release for the device"
            )
        if _scored(windows) < _SMALLEST_SAMPLE:
            raise UserError(
                f"{RUNTIME} gives statistics from {_SMALLEST_SAMPLE} scored tokens on, here are {_scored(windows)}; "
                "give more --windows"
            )
        return cls(folder)

    @property
    def program(self) -> Path:
        """llama-perplexity."""
        return self.folder / RUNTIME

    def files(self) -> list[Path]:
        """The program and its libraries."""
        libraries = [file for pattern in _LIBRARIES for file in self.folder.glob(pattern)]
        return [self.program, *sorted(set(libraries))]


def measure(
    profile: DeviceProfile,
    binaries: LlamaBinaries,
    model: Path,
    control: Path | None,
    windows: Windows,
    cache_types: CacheTypes | None,
    base: Path,
) -> tuple[Scores, Scores | None]:
    """Push everything to a device, run, and read the figures of the file and of its control.

    Args:
        model: the GGUF file, the first one of a split model.
        control: the same in F32; None where the file itself is that.
        cache_types: of keys and values; the control has its own.
        base: what `KlBaseWriter` wrote for these windows.
    Raises:
        CannotStart: no such device is connected, another ABI, or a missing library.
        UserError: the program refuses the file, dies or hangs; the sentence quotes its last lines.
    """
    try:
        host = host_of(profile)
    except UserError as error:
        raise CannotStart(str(error)) from error
    with host:
        program, *_ = [host.push(file) for file in binaries.files()]
        logits = host.push(base)
        parity = _run(host, program, model, logits, windows, control is None, cache_types)
        return parity, None if control is None else _run(host, program, control, logits, windows, True, None)


def _run(
    host: Host,
    program: str,
    model: Path,
    base: str,
    windows: Windows,
    in_floats: bool,
    cache_types: CacheTypes | None,
) -> Scores:
    count, n_ctx = windows.tokens.shape
    first, *_ = [host.push(part) for part in model_files(model)]
    command = [program, "-m", first, "--kl-divergence", "--kl-divergence-base", base]
    command += ["-c", str(n_ctx), "-b", str(n_ctx), "-ub", str(min(_MICRO_BATCH, n_ctx)), "-t", "1"]
    if in_floats:
        command += ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]  # as in LlamaCppEngine
    elif cache_types is not None:
        command += ["-ctk", cache_types.k, "-ctv", cache_types.v, "-fa", "auto" if cache_types.v == "f16" else "on"]
    folder = program.rpartition("/")[0]
    for _ in range(_TRIES):
        done = host.run(command, {"LD_LIBRARY_PATH": folder, "DYLD_LIBRARY_PATH": folder}, SECONDS_A_WINDOW * count)
        if done.code or has_statistics(done.output):
            break
    said = last_lines(done.output, 1) or "none"
    if done.code in (_NOT_EXECUTABLE, _NOT_FOUND) or any(words in done.output for words in _CANNOT_START):
        raise CannotStart(f"{RUNTIME} does not start there ({said}); give binaries for this device")
    if done.code:
        raise UserError(f"{RUNTIME} ended with code {done.code}; its last line: {said}")
    return read_statistics(done.output, _scored(windows))


def _scored(windows: Windows) -> int:
    count, n_ctx = windows.tokens.shape
    return int(count * (n_ctx - 1 - n_ctx // 2))
