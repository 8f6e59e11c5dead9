"""The form of docs/LOG.md: what its head asks of every entry."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

LOG = Path(__file__).parent.parent.parent / "docs" / "LOG.md"


def entries() -> list[tuple[str, str]]:
    """(heading, body) of each."""
    parts = re.split(r"^## (.+)$", LOG.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_an_entry_has_a_date_and_a_title_and_no_time_of_day() -> None:
    for heading, _ in entries():
        day, _, title = heading.partition(" · ")
        assert date.fromisoformat(day).isoformat() == day
        assert title, heading
        assert not re.search(r"\b(morning|noon|afternoon|evening|night|later|session)\b", title), heading


def test_the_newest_entry_stands_first_and_no_title_twice() -> None:
    days = [heading.partition(" · ")[0] for heading, _ in entries()]
    assert days == sorted(days, reverse=True)
    assert len({heading for heading, _ in entries()}) == len(days)


def test_an_entry_says_why_what_was_measured_and_the_verdict() -> None:
    for heading, body in entries():
        parts = re.findall(r"^\*\*(Why|Measured|Verdict)", body, flags=re.MULTILINE)
        assert parts == ["Why", "Measured", "Verdict"], heading
        assert re.search(r"^\*\*Verdict: (kept|not kept|mistake|measured)\b", body, flags=re.MULTILINE), heading
