"""Export to GGUF, the file format of llama.cpp: packed integers, or floats as the control of a parity test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.gguf.options import GgufOptions
from exporters.interface import ExpectedTensor, ExportOptions, FileSizes
from signround_edge.inspection import TensorInfo

if TYPE_CHECKING:  # torch takes seconds, and `inspect` needs none of it
    from signround_edge.run_directory import RunDirectory

__all__ = ["GgufExporter"]


class GgufExporter:
    """Writes one .gguf file, or several that belong together; see `exporters.gguf.export`."""

    name = "gguf"
    options: type[ExportOptions] = GgufOptions

    def recognises(self, path: Path) -> bool:
        """Whether it is a file that begins like GGUF, or is called so (a damaged one should be reported as damaged)."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF" or path.suffix == ".gguf"

    def inspect(self, path: Path) -> list[TensorInfo]:
        """Tensors of a GGUF file, rows first. UserError when it is missing, not GGUF, damaged or truncated."""
        from exporters.gguf.container.reader import GgufFile

        stored = GgufFile.open(path).tensors.values()
        return [TensorInfo(t.name, t.ggml_type.name, t.shape, t.nbytes) for t in stored]

    def export(self, run: RunDirectory, out: Path, options: ExportOptions) -> Path:
        """Write `out` (a file, or `model.gguf` in it when it is a folder) whole or not at all; perhaps an mmproj file.

        Returns:
            Its path, or the first file's when the model is split.

        Raises:
            UserError: no built-in metadata and no template, a grid without GGUF type, an unknown tokenizer, a
                template that does not fit, a full disk; a model without the towers that an mmproj file is to hold.
        """
        from exporters.gguf.export import export

        return export(run, out, GgufOptions.of(options))

    def sizes(self, options: ExportOptions, kept: Path) -> FileSizes:
        """Of files, with a template too; it is read once."""
        from exporters.gguf.sizes import GgufSizes

        return GgufSizes(GgufOptions.of(options))

    def way(self, config: Mapping[str, Any], parameters: Sequence[str]) -> str:
        """Built in; UserError for models that need a template."""
        from exporters.gguf.families.architecture import refuse_what_differs
        from exporters.gguf.families.table import canonical_config, family_of

        known = canonical_config(dict(config))
        family = family_of(known)
        refuse_what_differs(family, known)
        return f"built in, as llama.cpp's {family.name}"

    def computed_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of config.json with which transformers' model computes what llama.cpp does, where that is a little
        else than what this config says; {} where it is not, or is not known."""
        from exporters.gguf.families.architecture import computed_config
        from exporters.gguf.families.table import FAMILIES, canonical_config, family_of

        if config.get("model_type") not in FAMILIES:
            return {}
        known = canonical_config(dict(config))
        return computed_config(family_of(known), known)

    def iter_expected(self, run: RunDirectory, artifact: Path) -> Iterator[ExpectedTensor]:
        """What each tensor of the file that stems from the run should hold; see `exporters.gguf.reader`."""
        from exporters.gguf.reader import iter_expected

        return (ExpectedTensor(tensor.gguf_name, tensor.weights) for tensor in iter_expected(run, artifact))
