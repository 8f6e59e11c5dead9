"""What `export --format gguf` can be told besides the options of every format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporters.interface import ExportOptions
from signround_edge.errors import UserError


@dataclass(frozen=True)
class GgufOptions(ExportOptions):
    """Options of the GGUF export.

    Attributes:
        mmproj: llama.cpp's file for images to write, too: the vision tower of the model that the run was made from.
        mmproj_from: that model, a folder or a name such as "org/model"; None takes it from the hub's cache.
    """

    mmproj: Path | None = None
    mmproj_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mmproj_from is not None and self.mmproj is None:
            raise UserError("--mmproj-from says where the towers are; add --mmproj FILE, the file to write them to")

    @classmethod
    def of(cls, options: ExportOptions) -> GgufOptions:
        """These options; with the defaults of GGUF where they are those of every format."""
        if isinstance(options, cls):
            return options
        return cls(options.dtype, options.template, options.split_max_bytes, options.log)
