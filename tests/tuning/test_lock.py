"""Two processes never write one run; a process that is gone holds nobody up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from signround_edge.errors import UserError
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning import lock
from signround_edge.tuning.lock import LOCK_FILE, locked
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from tests.support import SIZES, assert_same_files, save_random_model

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="this system has no flock")

ROOT = Path(__file__).parent.parent.parent
SETTINGS = TuningSettings(steps=2, samples=4, seqlen=16, batch_size=2)
HOLD = "import sys; from pathlib import Path; from signround_edge.tuning.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def holder(out: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until its input ends."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(out)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def run_quantize(out: Path, model: Path, calibration: Path, resume: bool = False) -> None:
    quantize(model, parse_scheme("gguf:q4_0"), out, str(calibration), SETTINGS, resume=resume)


def test_a_run_in_progress_is_not_written_by_another_process(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    config = LlamaConfig(**{**SIZES, "vocab_size": 3072})
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    process = holder(out)
    try:
        with pytest.raises(
            UserError, match=rf"run is being written by process {process.pid} on .*; wait until it ends"
        ):
            run_quantize(out, model, calibration_text, resume=True)
        assert [file.name for file in out.iterdir()] == [LOCK_FILE]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [file.name for file in out.iterdir()] == [LOCK_FILE]  # which is no foreign file and locks nobody out
        run_quantize(out, model, calibration_text)
    finally:
        process.kill()
        process.communicate()
    assert not (out / LOCK_FILE).exists()
    run_quantize(whole, model, calibration_text)
    assert_same_files(out, whole)


def test_the_lock_ends_with_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    new, old = tmp_path / "deep" / "new", tmp_path / "old"
    old.mkdir()
    for out in (new, old):
        with contextlib.suppress(ValueError), locked(out):
            assert (out / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
            with pytest.raises(UserError, match="is being written"), locked(out):
                pass
            assert (out / LOCK_FILE).exists()
            raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    with locked(old):
        (old / "manifest.json").write_text("{}")
    assert [path.name for path in old.iterdir()] == ["manifest.json"]


def test_a_lock_whose_name_is_gone_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its last holder may have ended and removed it."""
    out, opened = tmp_path / "run", os.open
    names: list[Path] = []

    def open_late(file: Path, *arguments: int) -> int:
        handle = opened(file, *arguments)
        if not names:
            file.unlink()  # as the last holder does
        names.append(file)
        return handle

    monkeypatch.setattr(os, "open", open_late)
    with locked(out):
        assert len(names) == 2
        with pytest.raises(UserError, match="is being written"), locked(out):
            pass


def test_what_fails_before_the_first_block_leaves_no_folder(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    scheme, out = parse_scheme("gguf:q4_0"), tmp_path / "run"
    with pytest.raises(UserError, match="unknown"):
        quantize(tiny_llama, scheme, out, str(calibration_text), SETTINGS, source_check="?")
    assert list(tmp_path.iterdir()) == []
