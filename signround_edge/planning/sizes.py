"""What an exporter, found through its entry point, says of sizes with its options at their defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from signround_edge.errors import UserError
from signround_edge.planning.untuned_run import UntunedRun
from signround_edge.plugins import exporters

if TYPE_CHECKING:
    from exporters.interface import ExportOptions, KnowsItsSize


class ExporterSizes:
    """The sizes of one format's files."""

    def __init__(self, target: str) -> None:
        known: dict[str, Any] = dict(exporters())
        if target not in ("gguf", "onnx"):
            raise UserError(f"--format {target} cannot be planned; known are gguf and onnx")
        self._exporter: KnowsItsSize = known[target]
        self._options: ExportOptions = known[target].options(log=_ignore)

    def tensor_bytes(self, run: UntunedRun) -> dict[tuple[str, ...], int]:
        """See `KnowsItsSize`."""
        return self._exporter.tensor_bytes(run, self._options)

    def file_bytes(self, run: UntunedRun) -> int | None:
        """See `KnowsItsSize`."""
        return self._exporter.file_bytes(run, self._options)


def _ignore(_line: str) -> None:
    pass
