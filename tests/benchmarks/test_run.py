"""The peers bench names its rows honestly, and gives peers our samples."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import run
from signround_edge.tuning.calibration import calibration_tokens, load_tokenizer


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
