"""The tables of docs/results.md: our files beside those of other tools, at equal bytes.

Pages hold them between `<!-- table: NAME -->` and `<!-- end -->`; `python -m benchmarks.table` fills them in. Names
are in `TABLES`. A cell is "mean KL divergence / perplexity". A peer that was measured in several ways, or with several
numbers of steps, is shown with its lowest KL divergence; ours with the default way and the most steps.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.rows import (
    AUTO_ROUND,
    IMATRIX,
    OLIVE,
    OURS,
    Row,
    beside_planned,
    is_of_today,
    is_tuned,
    kl,
    measured,
    onnx_bytes,
    read,
    samples_of,
    steps_of,
    text_of,
)

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
GGUF = ("q2_k_s", "q3_k_s", "iq4_xs", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k")
VECTORS = ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_s")
ONNX = ("w2g32-asym", "w4g128-asym")
_PEERS = {IMATRIX: "llama.cpp, importance matrix", AUTO_ROUND: "auto-round", OLIVE: "Olive's GPTQ"}
_OURS_AND_RATIO = ("**signround-edge**", "KL over the best other's")
_COSTS = ("wall_s", "cpu_s", "peak_mb")
_PLACE = re.compile(r"(<!-- table: ([\w -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """A page with the tables that it has places for; KeyError where it names one that there is not."""
    return _PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def beside_gguf(rows: Sequence[Row], presets: Iterable[str]) -> str:
    """A row for each preset: llama.cpp's quantizer with an importance matrix, auto-round where it has any, ours."""
    found = measured(list(rows))
    tools = [tool for tool in (IMATRIX, AUTO_ROUND) if _best(found, tool)]
    shown, lines = [], _head(["file", "MB", *(_PEERS[tool] for tool in tools), *_OURS_AND_RATIO])
    for preset in presets:
        of = [r for r in found if f"gguf:{preset}" in r["scheme"].split(",")]
        ours = _ours(of)
        peers = [_best(of, tool) for tool in tools]
        cells = [_cell(r, ours, r["bytes"] / ours["bytes"]) if r else "–" for r in peers]
        cells.append(f"**{_cell(ours, ours)}**")
        lines.append(_line([preset.upper(), _mb(ours["bytes"]), *cells, _over(ours, peers)]))
        shown.append(ours)
    return "\n".join([*lines, "", _settings(shown)])


def beside_onnx(rows: Sequence[Row], schemes: Iterable[str]) -> str:
    """A row for each scheme: the best of ONNX Runtime's quantizers, Olive's GPTQ, ours.

    Of ONNX Runtime's those count that take at most 1 % more bytes than ours, or all where there is none.
    """
    shown, lines = [], _head(["graph", "MB", "ONNX Runtime's best", _PEERS[OLIVE], *_OURS_AND_RATIO])
    for scheme in schemes:
        of = [r for r in rows if f"onnx:{scheme}" in r["scheme"].split(",")]
        failed = [r for r in of if "failed" in r and r["tool"] == OLIVE]
        of = measured(of)
        ours = _ours(of)
        size = onnx_bytes(ours)
        quantizers = [r for r in of if r["tool"].startswith("ort-")]
        fair = [r for r in quantizers if onnx_bytes(r) <= 1.01 * size] or quantizers
        best = min(fair, key=lambda r: float(r["kld_mean"]))
        olive = _best(of, OLIVE)
        cells = [
            _cell(best, ours, onnx_bytes(best) / size, [best["tool"].removeprefix("ort-")]),
            _cell(olive, ours, onnx_bytes(olive) / size) if olive else "cannot" if failed else "–",
        ]
        lines.append(_line([scheme, _mb(size), *cells, f"**{_cell(ours, ours)}**", _over(ours, [best, olive])]))
        shown.append(ours)
    return "\n".join([*lines, "", _settings(shown)])


def with_more_steps(rows: Sequence[Row]) -> str:
    """Q4_0, which is w4g32, rounded and tuned beside auto-round: perplexity, KL with its standard error, cost."""
    of = [r for r in measured(list(rows)) if "gguf:q4_0" in r["scheme"].split(",")]
    of = [r for r in of if r["tool"] == AUTO_ROUND or (r["tool"] == OURS and is_of_today(r))]
    of.sort(key=lambda r: (is_tuned(r), r["tool"] == OURS, -float(r["kld_mean"])))
    peer = next(r for r in of if r["tool"] == AUTO_ROUND)
    machines = list(dict.fromkeys(r["machine"] for r in of))
    lines = _head(["Q4_0 = w4g32", "samples, steps", "perplexity", "mean KL", "wall s", "CPU s", "peak MB"])
    for r in of:
        tool = "auto-round" if r is peer else "**signround-edge**" if is_tuned(r) else "signround-edge, rounded"
        mark = f" [{1 + machines.index(r['machine'])}]" if len(machines) > 1 else ""
        what = f"{' × '.join(map(str, samples_of(r)))}, {steps_of(r)}"
        value = f"{r['kld_mean']:.4f} ± {r['kld_stderr']:.4f}"
        value += "" if r is peer else f" ({r['kld_mean'] / peer['kld_mean']:.2f} ×)"
        beside = r is not peer and is_tuned(r) and r["machine"] == peer["machine"]
        costs = [f"{r[k]:,.0f}" + (f" ({r[k] / peer[k]:.2f} ×)" if beside else "") for k in _COSTS]
        lines.append(_line([tool + mark, what, f"{r['ppl']:.2f}", value, *costs]))
    named = "; ".join(f"[{i}] {m}" for i, m in enumerate(machines, 1)) if len(machines) > 1 else machines[0]
    size = f"{peer['bytes']:,} bytes each. The original's perplexity is {peer['ppl_reference']:.2f}."
    text = f"Steps of 8 samples a block, {peer['tokens']:,} tokens scored; in brackets, over auto-round's. {named}."
    return "\n".join([*lines, "", textwrap.fill(f"{size} {text}", 120)])


def with_whole_model_stage(rows: Sequence[Row], presets: Iterable[str]) -> str:
    """A row for each preset: the importance matrix, and the best of ours with a whole-model stage."""
    lines = _head(["file", "MB", _PEERS[IMATRIX], "**with the whole-model stage**", "steps", "KL over the other's"])
    found = measured(list(rows))
    for preset in presets:
        of = [r for r in found if f"gguf:{preset}" in r["scheme"].split(",")]
        imatrix = _best(of, IMATRIX)
        ours = _best([r for r in of if "whole_model_steps" in r], OURS)
        assert imatrix, preset
        assert ours, preset
        cells = [_cell(imatrix, imatrix), f"**{_cell(ours, ours)}**", steps_of(ours), _over(ours, [imatrix])]
        lines.append(_line([preset.upper(), _mb(ours["bytes"]), *cells]))
    return "\n".join(lines)


def with_planned_types(rows: Sequence[Row]) -> str:
    """A row for each plan: the scheme whose bytes it keeps, tuned; and its own prediction."""
    lines = _head(["at the bytes of", "MB", "tuned", "**types by `plan`, tuned**", "predicted", "KL over the scheme's"])
    for ours, planned in beside_planned(measured(list(rows))):
        cells = [_cell(ours, ours), f"**{_cell(planned, ours)}**", kl(planned["predicted_kl"]), _over(planned, [ours])]
        lines.append(_line([f"`{ours['scheme']}`", _mb(planned["bytes"]), *cells]))
    return "\n".join(lines)


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 1e7 else f"{size / 1e6:.2f}"


def _ours(rows: Iterable[Row]) -> Row:
    """Of our rows tuned the default way, without a whole-model stage, that of most steps."""
    ours = [r for r in rows if r["tool"] == OURS and is_of_today(r) and "whole_model_steps" not in r and is_tuned(r)]
    return max(ours, key=lambda r: int(r["steps"]))


def _best(rows: Iterable[Row], tool: str) -> Row | None:
    return min((r for r in rows if r["tool"] == tool), key=lambda r: float(r["kld_mean"]), default=None)


def _cell(row: Row, ours: Row, size: float = 1.0, notes: Sequence[str] = ()) -> str:
    """KL and perplexity, in brackets how the row differs: bytes over ours (`size`), steps."""
    ppl = f"{row['ppl']:.2f}" if row["ppl"] < 1000 else f"{row['ppl']:,.0f}"
    notes = [*notes, *([f"{100 * (size - 1):+.1f} % bytes"] if abs(size - 1) >= 5e-4 else [])]
    notes += [f"{row['steps']} steps"] if is_tuned(row) and row["steps"] != ours["steps"] else []
    return f"{kl(row['kld_mean'])} / {ppl}" + (f" ({', '.join(notes)})" if notes else "")


def _over(ours: Row, peers: Iterable[Row | None]) -> str:
    best = min(float(r["kld_mean"]) for r in peers if r is not None)
    return f"{ours['kld_mean'] / best:.2f} ×"


def _settings(rows: Sequence[Row]) -> str:
    """What all rows of a table share."""
    (text,) = {text_of(r) for r in rows}
    (steps,) = {r["steps"] for r in rows}
    (tokens,) = {r["tokens"] for r in rows}
    batch = re.search(r"batch (\d+)", text)
    assert batch is not None, text
    samples = " × ".join(map(str, samples_of(rows[0])))
    return textwrap.fill(
        f"Mean KL divergence / perplexity; the original's is {rows[0]['ppl_reference']:.2f}. Calibrated on {samples}"
        f" tokens, tuned with {steps} steps of {batch[1]} samples a block, {tokens:,} tokens scored.",
        120,
    )


def _of(name: str, text: str = "") -> list[Row]:
    """Rows of a result file, of the calibration that `text` begins ("64x256, batch 8")."""
    return [r for r in read(name) if text_of(r).startswith(text)]


_OFF_GRID, _SHIPPED = "smollm2-135m-offgrid", "smollm2-135m-shipped"
TABLES: dict[str, Callable[[], str]] = {
    "off-grid GGUF": lambda: beside_gguf(_of(f"{_OFF_GRID}-presets"), GGUF),
    "off-grid vectors": lambda: beside_gguf(_of(f"{_OFF_GRID}-presets"), VECTORS),
    "off-grid planned": lambda: with_planned_types(_of(f"{_OFF_GRID}-presets")),
    "off-grid ONNX": lambda: beside_onnx(_of(f"{_OFF_GRID}-presets"), ONNX),
    "off-grid more steps": lambda: with_more_steps(_of(_OFF_GRID)),
    "as shipped GGUF": lambda: beside_gguf(_of(f"{_SHIPPED}-presets"), GGUF),
    "as shipped planned": lambda: with_planned_types(_of(f"{_SHIPPED}-presets")),
    "as shipped ONNX": lambda: beside_onnx(_of(f"{_SHIPPED}-presets"), ONNX),
    "as shipped more steps": lambda: with_more_steps(_of(_SHIPPED)),
    "tiny-llama GGUF": lambda: beside_gguf(_of("tiny-llama", "64x256, batch 8"), GGUF),
    "tiny-llama ONNX": lambda: beside_onnx(
        _of("tiny-llama", "64x256, batch 8"), ("w2g32-asym", "w4g128-asym", "w4g32-asym")
    ),
    "tiny-llama whole-model stage": lambda: with_whole_model_stage(
        _of("tiny-llama", "2048x256, batch 8"), ("q2_k_s", "q3_k_s", "iq4_xs", "q4_0", "q4_k_s")
    ),
}
