"""How large a GGUF file will be, to the byte: its head is made, and of its tensors the bytes are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import gguf

from exporters.gguf.container.reader import GgufFile
from exporters.gguf.container.writer import PlannedTensor, head_bytes, padded_bytes
from exporters.gguf.export import builtin_layout
from exporters.gguf.options import GgufOptions
from exporters.gguf.placement import Placement
from exporters.gguf.routes.template import template_layout, template_placements
from signround_edge.run_directory import RunDirectory


class GgufSizes:
    """What files of a model take; see `FileSizes`. Of a run, `dequantized_rows` may give the original model's floats.

    With a template, where the first run's parameters lie in it is where those of all others do.
    """

    def __init__(self, options: GgufOptions) -> None:
        self._options = replace(options, log=_ignore)
        self._template = None if options.template is None else GgufFile.open(options.template)
        self._in_template: dict[str, Placement] | None = None

    def tensor_bytes(self, run: RunDirectory) -> dict[tuple[str, ...], int]:
        """Parameters that are in one tensor of the file → its bytes, padding included."""
        writer, tensors, placements = self._layout(run)
        found: dict[tuple[str, ...], int] = {}
        for tensor in tensors:
            if tensor.name in placements:
                names = placements[tensor.name].hf_names
                found[names] = found.get(names, 0) + padded_bytes(tensor, writer.data_alignment)
        return found

    def file_bytes(self, run: RunDirectory) -> int:
        """Bytes of the file."""
        writer, tensors, _ = self._layout(run)
        return head_bytes(writer, tensors) + sum(padded_bytes(tensor, writer.data_alignment) for tensor in tensors)

    def one_node(self, run: RunDirectory) -> dict[tuple[str, ...], tuple[str, ...]]:
        """{}: llama.cpp computes every type of experts with the same code."""
        return {}

    def _layout(self, run: RunDirectory) -> tuple[gguf.GGUFWriter, list[PlannedTensor], Mapping[str, Placement]]:
        if self._template is None:
            writer, tensors, placements = builtin_layout(run, self._options)
            return writer, tensors, {one.gguf_name: one for one in placements}
        if self._in_template is None:
            self._in_template = template_placements(run, self._template)
        return *template_layout(run, self._template, self._in_template, self._options), self._in_template


def _ignore(_line: str) -> None:
    pass
