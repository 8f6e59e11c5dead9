"""The peers bench names its rows honestly."""

import sys

import pytest

from benchmarks import run


def test_a_text_of_fewer_samples_than_the_row_would_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--samples", "100000"])
    with pytest.raises(SystemExit, match=r"speeches-train.txt gives \d+ of 100000 samples"):
        run.main()
