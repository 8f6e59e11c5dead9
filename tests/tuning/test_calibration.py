"""Where calibration samples come from, and how they are cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from signround_edge.errors import UserError
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.tuning.calibration.text import calibration_tokens


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> object:
    return load_tokenizer(tiny_llama)


def test_windows_of_a_text_are_spread_over_all_of_it(tokenizer: object, calibration_text: Path) -> None:
    samples = calibration_tokens(str(calibration_text), tokenizer, 8, 64)
    whole = torch.tensor(tokenizer(calibration_text.read_text(encoding="utf-8"))["input_ids"])  # type: ignore[operator]
    assert samples.shape == (8, 64)
    assert torch.equal(samples[0], whole[:64])
    assert torch.equal(samples[-1], whole[-64:])


def test_short_text_gives_fewer_samples(tokenizer: object, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The state of the union is strong. " * 30, encoding="utf-8")
    samples = calibration_tokens(str(tmp_path / "short.txt"), tokenizer, 1000, 32)
    assert 1 < len(samples) < 1000


def test_json_lines_give_their_beginnings_and_short_ones_are_joined(tokenizer: object, tmp_path: Path) -> None:
    long, short = "We the people of the United States. " * 20, "A more perfect union. "
    rows = [{"text": long}, *({"text": short} for _ in range(30)), {"content": long}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    samples = calibration_tokens(str(tmp_path / "texts.jsonl"), tokenizer, 100, 32)
    beginning = torch.tensor(tokenizer(long)["input_ids"][:32])  # type: ignore[operator]
    assert torch.equal(samples[0], beginning)
    assert torch.equal(samples[-1], beginning)
    assert len(samples) > 3


def test_dataset_by_name(tokenizer: object, tmp_path: Path) -> None:
    """A folder is a dataset name too, so the real `datasets` library reads it without a network."""
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    folder = tmp_path / "speeches"
    folder.mkdir()
    rows = [{"text": f"Speech {i}. " + "My fellow citizens, " * 20} for i in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert calibration_tokens(str(folder), tokenizer, 4, 32).shape == (4, 32)


def test_dataset_that_cannot_be_had(tokenizer: object, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    with pytest.raises(UserError, match="is neither a file nor a dataset that could be read"):
        calibration_tokens(str(tmp_path), tokenizer, 4, 32)
