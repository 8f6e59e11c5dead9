"""README.md is short, and what the documents point to exists."""

from __future__ import annotations

import re

import pytest

from signround_edge import __version__
from tests.docs.documents import ROOT, code_spans, documents, prose, section, table_rows, text_of

_LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_it_fits_on_two_screens() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_every_folder_of_the_map_exists_and_every_package_is_on_it() -> None:
    rows = table_rows(section(text_of("README.md"), "## Where things are"))
    folders = {folder for row in rows for folder in code_spans(row[0])}
    assert all((ROOT / folder).is_dir() for folder in folders)
    rooms = {path.parent.relative_to(ROOT).parts[:2] for path in (ROOT / "signround_edge").glob("*/__init__.py")}
    without_words = {"terminal", "demo"}  # the tables that commands print; the shipped model
    assert {room for _, room in rooms} - without_words == {
        folder.split("/")[1] for folder in folders if folder.startswith("signround_edge/")
    }


def test_the_wheel_has_the_version_that_is_built() -> None:
    assert f"signround_edge-{__version__}-py3-none-any.whl" in text_of("README.md")


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    for target in _LINK.findall(prose(text_of(document))):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = folder / path if path else ROOT / document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_changelog_names_the_version() -> None:
    headings = re.findall(r"^## \[?([\w.]+)\]?", text_of("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert __version__ in headings
