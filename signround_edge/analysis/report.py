"""What `analyze` shows: a table for the terminal; pictures, a page and the JSON document in a folder."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from signround_edge.analysis.charts import pictures
from signround_edge.analysis.roundings import SALIENT, Analysis, Roundings
from signround_edge.errors import UserError
from signround_edge.files import write_atomically
from signround_edge.svg import STYLE, standing_alone

if TYPE_CHECKING:
    pass

_CSS = """:root { color-scheme: light dark; } body { margin: 0 auto; max-width: 1080px; padding: 1.2rem;
font: 15px/1.5 system-ui, sans-serif; } h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; } .scroll { overflow-x: auto; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #8884; } th:first-child, td:first-child {
text-align: left; }"""
HEADINGS = ("weights", "raised", "lowered", "altered", "overruled")


def write_report(analysis: Analysis, out: Path) -> list[Path]:
    """Write analysis.json, analysis.html and one SVG a picture into the folder `out`; returns the files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder for the pictures")
    drawn = pictures(analysis)
    files = {"analysis.json": json.dumps(analysis.to_json(), indent=1) + "\n", "analysis.html": _page(analysis, drawn)}
    files |= {f"{stem}.svg": standing_alone(svg) for stem, (_, svg) in drawn.items()}
    for name, text in files.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in files]


def sentences(analysis: Analysis) -> list[str]:
    """What the figures say in words, for page and terminal."""
    said = [f"note: {note}" for note in analysis.notes]
    if analysis.losses:
        worse = analysis.worse_than_rounding
        said.append(
            f"worse than plain rounding: {', '.join(worse) or 'none'} of {len(analysis.losses)} tuned units, on the "
            "held-out samples; tuning keeps the plain rounding where nothing beats it"
        )
    if analysis.tensors:
        weights = sum(t.roundings.weights for t in analysis.tensors)
        salient, other, overlap = (
            sum(getattr(t, name) * t.roundings.weights for t in analysis.tensors) / weights
            for name in ("salient_altered", "other_altered", "salient_overlap")
        )
        said.append(
            f"salient channels ({SALIENT:.0%} of largest E[x²]): {salient:.1%} of their codes are altered, {other:.1%} "
            f"of all others; of the channels altered most, {overlap:.1%} are salient ({SALIENT:.0%} by chance)"
        )
    if analysis.whole_model is not None:
        before, after = analysis.whole_model["before"], analysis.whole_model["after"]
        said.append(f"whole-model stage: held-out KL divergence {before:.3e} → {after:.3e}")
    return said


def figures(found: Roundings) -> list[str]:
    """The cells below `HEADINGS`."""
    return [f"{found.weights:,}", *(f"{v:.2%}" for v in (found.raised, found.lowered, found.altered, found.overruled))]


def _page(analysis: Analysis, drawn: dict[str, tuple[str, str]]) -> str:
    shown = "".join(f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in drawn.values())
    paragraphs = "".join(f"<p>{escape(s[0].upper() + s[1:])}.</p>" for s in sentences(analysis))
    headings = "".join(f"<th>{h}</th>" for h in ("matrix", "type", *HEADINGS, "salient altered", "overlap"))
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(text)}</td>"
            for text in (
                t.name, t.type, *figures(t.roundings), f"{t.salient_altered:.2%}", f"{t.salient_overlap:.0%}"
            )
        )
        + "</tr>"
        for t in analysis.tensors
    )  # fmt: skip
    table = f'<h2>Matrices</h2><div class="scroll"><table><tr>{headings}</tr>{rows}</table></div>' if rows else ""
    title = f"{escape(analysis.model)}, {escape(analysis.scheme)}: what tuning altered"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{STYLE}<style>{_CSS}</style></head><body>'
        f'<h1>{title}</h1>{paragraphs}<div class="pictures">{shown}</div>{table}</body></html>\n'
    )
