"""ONNX export: a run's integers in a graph of onnxruntime-genai's builder, of torch.onnx.export or of the user.

Inside this package the name `onnx` always means the installed package; its own modules are imported absolutely, as
`exporters.onnx.…`. Importing this module is cheap; torch and the builder are loaded by the first export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.interface import ExportOptions
from exporters.onnx.options import OnnxOptions
from signround_edge.inspection import TensorInfo

if TYPE_CHECKING:
    from exporters.interface import ExpectedTensor, FileSizes
    from signround_edge.run_directory import RunDirectory

__all__ = ["OnnxExporter"]


class OnnxExporter:
    """Writes a folder: model.onnx, tokenizer and config files, and genai_config.json where the graph has a KV cache."""

    name = "onnx"
    options: type[ExportOptions] = OnnxOptions

    def recognises(self, path: Path) -> bool:
        """Whether it is an .onnx or .ort file, or a folder that holds an .onnx file."""
        from exporters.onnx.artifact.layouts import find_model

        return bool(find_model(path)) if path.is_dir() else path.suffix in (".onnx", ".ort")

    def inspect(self, path: Path) -> list[TensorInfo]:
        """Tensors of a folder or .onnx file; UserError when it is truncated or broken."""
        from exporters.onnx.artifact.reader import read_tensors

        return [TensorInfo(*row) for row in read_tensors(path)]

    def export(self, run: RunDirectory, out: Path, options: ExportOptions) -> Path:
        """Write the folder `out`, whole or not at all, and return it.

        Raises:
            UserError: the architecture, a block format or an option has no ONNX form, `out` holds something else, or
                the disk is full.
            CheckFailed: the graph's integers or scales differ from the run directory; the message names the tensor.
        """
        from exporters.onnx.export import export_folder

        return export_folder(run, out, OnnxOptions.of(options))

    def sizes(self, options: ExportOptions, kept: Path) -> FileSizes:
        """Of folders; a graph that is traced is kept."""
        from exporters.onnx.footprint import OnnxSizes

        return OnnxSizes(OnnxOptions.of(options), kept)

    def way(self, config: Mapping[str, Any], parameters: Sequence[str]) -> str:
        """By the builder or by tracing; a mixture of experts is traced, with all of them (`routes.traced_experts`)."""
        from exporters.onnx.builder_classes import builder_class

        if builder_class(dict(config), parameters) is not None:
            return "by onnxruntime-genai's builder, with a key-value cache"
        every = any(".experts." in name for name in parameters)
        return "traced by torch, with a key-value cache" + ("; each expert computes for every token" * every)

    def iter_expected(self, run: RunDirectory, artifact: Path) -> Iterator[ExpectedTensor]:
        """What each tensor of the folder that stems from the run should hold; see `exporters.onnx.artifact.reader`."""
        from exporters.interface import ExpectedTensor
        from exporters.onnx.artifact.reader import iter_expected

        return (ExpectedTensor(name, weights) for name, _, weights in iter_expected(run, artifact))
