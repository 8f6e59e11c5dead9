"""The peers bench names its rows honestly, and gives peers our samples."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.rows import measured
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.tuning.calibration.text import calibration_tokens


def test_a_text_of_fewer_samples_than_the_row_would_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--samples", "100000"])
    with pytest.raises(SystemExit, match=r"speeches-train.txt gives \d+ of 100000 samples"):
        run.main()


def test_json_lines_of_a_text_hold_the_samples_and_a_little_more(
    tiny_llama: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "CACHE", tmp_path)
    args = argparse.Namespace(model=tiny_llama, calibration=calibration_text, samples=4, seqlen=32)
    file = run._as_json_lines(args)
    assert len(file.read_text().splitlines()) == 4
    tokenizer = load_tokenizer(tiny_llama)
    given = calibration_tokens(str(file), tokenizer, 4, 32)
    ours = calibration_tokens(str(calibration_text), tokenizer, 4, 32)
    assert given.shape == ours.shape
    assert tokenizer.decode(ours[0], skip_special_tokens=True).startswith(
        tokenizer.decode(given[0], skip_special_tokens=True)
    )
    assert "<|bos|>" not in json.loads(file.read_text().splitlines()[0])["text"]


def test_a_peer_that_cannot_run_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "CACHE", tmp_path / "cache")
    script = tmp_path / "auto-round"
    script.write_text("#!/bin/sh\necho 'ValueError: no such tokenizer'\necho 'a progress bar'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(run.auto_round, "environment", lambda folder: script)
    monkeypatch.setattr(sys, "argv", ["run", "--tool", "auto-round", "--scheme", "gguf:q4_0", "--name", "model"])
    run.main()
    assert "| auto-round | gguf:q4_0 | ValueError: no such tokenizer |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "model.json").read_text())
    assert (row["tool"], row["failed"]) == ("auto-round", "ValueError: no such tokenizer")
    assert measured([row]) == []
    run.main()  # known by now
    printed = capsys.readouterr()
    assert "auto-round gguf:q4_0" not in printed.err
    assert "ValueError" in printed.out


def test_where_our_own_run_fails_the_bench_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["run", "--scheme", "gguf:q9_9"])
    with pytest.raises(SystemExit, match=r"quantize .* --scheme gguf:q9_9 .*q9_9"):
        run.main()
    assert not list(tmp_path.glob("*.json"))
