"""Export to GGUF, the file format of llama.cpp: packed integers, or floats as the control of a parity test."""

from __future__ import annotations

from pathlib import Path

from exporters.interface import ExportOptions
from signround_edge.run_directory import RunDirectory

__all__ = ["GgufExporter"]


class GgufExporter:
    """Writes one .gguf file; see `exporters.gguf.export`."""

    name = "gguf"

    def export(self, run: RunDirectory, out: Path, options: ExportOptions) -> Path:
        """Write `out` (a file, or `model.gguf` in it when it is a folder) whole or not at all, and return its path.

        Raises:
            UserError: no built-in metadata and no template, a grid without GGUF type, an unknown tokenizer, a
                template that does not fit, a full disk.
        """
        from exporters.gguf.export import export

        return export(run, out, options)
