"""The documents of the project and the code blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

RUN_HERE = ("console", "bash", "python")
NO_CODE = ("text", "json", "toml", "yaml", "html", "diff")  # nothing to run; all other languages need a marker

_FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")
_MARKER = re.compile(r"<!-- not run: (\S.*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: path below ROOT.
        line: number of the opening fence's line.
        language: what is written behind the fence.
        text: the lines between the fences, each with its newline.
        not_run: the reason in the marker `<!-- not run: … -->` above the fence; None without a marker.
    """

    document: str
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        """Where it is: "README.md:12"."""
        return f"{self.document}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it must run in the test."""
        return self.not_run is None and self.language in RUN_HERE


def documents() -> list[str]:
    """Every document, as a path below ROOT; README.md first."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in found)
    return sorted(names, key=lambda name: name != "README.md")


def text_of(document: str) -> str:
    """A document's text."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks_of(document: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    return list(parse(text_of(document), document))


def parse(text: str, document: str = "text") -> Iterator[Block]:
    """The fenced blocks of a text, in order. ValueError for a fence that is never closed."""
    above = ""  # the last line that is not empty
    numbered = enumerate(text.splitlines(), 1)
    for number, line in numbered:
        opening = _FENCE.fullmatch(line)
        if opening is None:
            above = line.strip() or above
            continue
        indent, fence, language = opening[1], opening[2], opening[3].strip()
        inside = []
        for _, inner in numbered:
            if inner.strip() == fence:
                break
            inside.append(inner.removeprefix(indent) + "\n")
        else:
            raise ValueError(f"{document}:{number}: this fence is never closed")
        marker = _MARKER.fullmatch(above)
        yield Block(document, number, language, "".join(inside), marker[1] if marker else None)
        above = ""


def prose(text: str) -> str:
    """The text without its fenced blocks (their lines are empty)."""
    lines = text.splitlines()
    for block in parse(text):
        for number in range(block.line - 1, block.line + block.text.count("\n") + 1):
            lines[number] = ""
    return "\n".join(lines) + "\n"


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above. KeyError when there is none."""
    lines, outside = text.splitlines(), prose(text).splitlines()  # a comment in a program is no heading
    if heading not in outside:
        raise KeyError(heading)
    start = outside.index(heading) + 1
    ends = re.compile(rf"#{{1,{len(heading.partition(' ')[0])}}} ")
    end = next((number for number in range(start, len(outside)) if ends.match(outside[number])), len(lines))
    return "\n".join(lines[start:end]) + "\n"


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table row in a text, heads and rules left out; `\\|` is a bar within a cell."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line):
            rows.pop()  # the head
        elif line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            rows.append([cell.strip().replace("\\|", "|") for cell in cells])
    return rows


def code_spans(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
