"""How large an exported folder will be, to the byte: its graph is made, and its data is left out when it is written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from exporters.onnx.artifact.card import CARD
from exporters.onnx.artifact.model_file import write_model
from exporters.onnx.artifact.sidecar import SIDECAR
from exporters.onnx.builder_classes import builder_class
from exporters.onnx.options import OnnxOptions
from exporters.onnx.passes.provenance import provenance, set_provenance
from exporters.onnx.routes.builder import CannotBuild
from exporters.onnx.routes.built import build
from exporters.onnx.routes.chat_templates import lay_out_chat_templates
from exporters.onnx.routes.graph import MODEL_FILE
from exporters.onnx.run_weights import RunWeights
from signround_edge.run_directory import RunDirectory

# What no runtime reads: their figures and hashes come later.
NOTES = (CARD, SIDECAR)


def file_bytes(run: RunDirectory, options: OnnxOptions) -> int | None:
    """Bytes of all files of the folder but `NOTES`; None for a model that onnxruntime-genai's builder does not know:
    its graph would be traced, which needs the weights."""
    row = builder_class(run.config, run.names())
    if row is None or options.no_cache or options.template is not None:
        return None
    weights = RunWeights(run, half_scales="f16" in (options.scale_dtype, options.io_dtype))
    with tempfile.TemporaryDirectory() as folder:
        companions = Path(folder) / "companions"
        companions.mkdir()
        try:
            graph = build(weights, row, Path(folder) / "scratch", companions, options)
        except CannotBuild:
            return None
        lay_out_chat_templates(companions, run.config_dir, options.log)
        set_provenance(graph.model, provenance(weights, graph.made_by))
        write_model(graph.model, companions / MODEL_FILE, options.split_max_bytes, empty=True)
        return sum(file.stat().st_size for file in companions.rglob("*") if file.is_file())
