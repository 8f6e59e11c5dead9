"""What an exporter, found through its entry point, says of sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from signround_edge.errors import UserError
from signround_edge.plugins import exporters

if TYPE_CHECKING:
    from exporters.interface import FileSizes, KnowsItsSize

_GRAPHS = "graphs"  # in the cache, beside `plans`


def exporter_sizes(target: str, cache: Path, template: Path | None = None) -> FileSizes:
    """The sizes of one format's files, with its exporter's options at their defaults.

    Args:
        cache: folder of what is measured once for a model.
        template: a GGUF file whose metadata and names an export would keep.
    """
    known: dict[str, Any] = dict(exporters())
    if target not in ("gguf", "onnx"):
        raise UserError(f"--format {target} cannot be planned; known are gguf and onnx")
    if template is not None and target == "onnx":
        raise UserError("--template is for --format gguf here: a graph of your own is not planned; leave it out")
    exporter: KnowsItsSize = known[target]
    return exporter.sizes(known[target].options(template=template, log=_ignore), cache / _GRAPHS)


def _ignore(_line: str) -> None:
    pass
