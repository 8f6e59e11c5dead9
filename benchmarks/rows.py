"""The measured rows, benchmarks/results/<model>.json, and the words that tables have for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
OURS = "signround-edge"
AUTO_ROUND = "auto-round"
IMATRIX = "llama-quantize-imatrix"
OLIVE = "olive-gptq"
PLANNED = "plan:"  # in front of the scheme whose bytes a plan keeps
# The model to judge by stands first; what is not named here comes after, a model cut off after some blocks last.
ORDER = (
    "smollm2-135m-offgrid-presets",
    "smollm2-135m-offgrid",
    "smollm2-135m-shipped-presets",
    "smollm2-135m-shipped",
    "tiny-llama",
)


def names() -> list[str]:
    """The result files there are, in the order of the tables."""

    def place(name: str) -> tuple[bool, int, str]:
        return is_cut_off(name), ORDER.index(name) if name in ORDER else len(ORDER), name

    return sorted((file.stem for file in RESULTS.glob("*.json")), key=place)


def is_cut_off(name: str) -> bool:
    """Whether a result file is of a model's first blocks alone, whose perplexity means nothing."""
    return name.endswith("-blocks")


def read(name: str) -> list[Row]:
    """All rows of a result file."""
    rows: list[Row] = json.loads((RESULTS / f"{name}.json").read_text())
    return rows


def measured(rows: list[Row]) -> list[Row]:
    """Rows with figures, which those of peers that could not run do not have."""
    return [r for r in rows if "failed" not in r]


def steps_of(row: Row) -> str:
    """Steps a block, and those of the whole-model stage where there is one, with its rates if given: "100 + 300"."""
    marks = {"nearest": "from nearest", "follow": "codes follow"}
    marked = [marks[row[name]] for name in ("start", "positions") if row.get(name) in marks]
    blocks = str(row["steps"]) + (f" ({', '.join(marked)})" if marked else "")
    whole = row.get("whole_model_steps")
    if whole is None:
        return blocks
    rates = [f"{row[rate]:g}" for rate in ("whole_model_lr", "whole_model_code_lr") if rate in row]
    return f"{blocks} + {whole}" + (f" at {', '.join(rates)}" if rates else "")


def is_tuned(row: Row) -> bool:
    """Whether any steps were taken."""
    return steps_of(row) != "0"


def is_of_today(row: Row) -> bool:
    """Whether a row of ours was tuned the default way, with no older one named."""
    return not row.keys() & {"start", "positions"}


def beside_planned(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Every row of planned types, behind the row of the scheme whose bytes it keeps, with the same steps and text."""

    def what(row: Row, scheme: str) -> tuple[Any, ...]:
        return (scheme, row["tool"], row["steps"], row.get("whole_model_steps"), text_of(row))

    of = {what(row, row["scheme"]): row for row in rows if is_of_today(row)}
    planned = [row for row in rows if row["scheme"].startswith(PLANNED)]
    found = [(of.get(what(row, row["scheme"].removeprefix(PLANNED))), row) for row in planned]
    return [(scheme, row) for scheme, row in found if scheme is not None]


def samples_of(row: Row) -> tuple[int, int]:
    """(calibration samples, their tokens), as a row's key has them."""
    match = re.search(r" steps, (\d+)x(\d+),", row["key"])
    assert match is not None, row["key"]
    return int(match[1]), int(match[2])


def text_of(row: Row) -> str:
    """Calibration and evaluation of a row, as its key ends."""
    return str(row["key"]).split(" steps, ", 1)[1]


def is_onnx_peer(row: Row) -> bool:
    """Whether a row is of ONNX Runtime's quantizers or of onnxruntime-genai's builder."""
    return str(row["tool"]).startswith(("ort-", "genai-"))


def onnx_bytes(row: Row) -> int:
    """Bytes of a row as ONNX; `bytes` is the first target's, which is GGUF where one run feeds both."""
    return int(row.get("onnx_bytes", row["bytes"]))


def kl(value: float) -> str:
    """A mean KL divergence in nats."""
    return f"{value:.4f}" if value >= 5e-4 else f"{value:.1e}"
