"""How large an exported folder will be, to the byte: its graph is made, and its data is left out when it is written."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from importlib.metadata import version
from pathlib import Path

import psutil

from exporters.onnx.artifact.card import CARD
from exporters.onnx.artifact.model_file import write_model
from exporters.onnx.artifact.sidecar import SIDECAR
from exporters.onnx.builder_classes import builder_class
from exporters.onnx.options import OnnxOptions
from exporters.onnx.passes.provenance import provenance, set_provenance
from exporters.onnx.routes.builder import CannotBuild
from exporters.onnx.routes.built import build
from exporters.onnx.routes.chat_templates import lay_out_chat_templates
from exporters.onnx.routes.graph import MODEL_FILE, FinishedGraph
from exporters.onnx.routes.kept_trace import keep_trace, kept_trace
from exporters.onnx.routes.traced_experts import mixtures_of
from exporters.onnx.routes.traced_mixtures import EXACT_BITS
from exporters.onnx.routes.tracing import finish, matched_trace
from exporters.onnx.run_weights import RunWeights
from signround_edge import __version__
from signround_edge.formats import GRIDS
from signround_edge.formats.matmul_nbits import matmul_nbits_container
from signround_edge.run_directory import RunDirectory

# What no runtime reads: their figures and hashes come later.
NOTES = (CARD, SIDECAR)
# Of the model's f32 weights, what tracing takes: the model, and what torch copies of it.
_TRACING = 2


class OnnxSizes:
    """What folders of a model take; see `FileSizes`. Of a run, `dequantized` may give the original model's floats.

    Attributes:
        options: of the export.
        kept: folder for what is the same for all types of a model: its traced graph.
    """

    def __init__(self, options: OnnxOptions, kept: Path) -> None:
        self.options, self.kept = options, kept

    def tensor_bytes(self, run: RunDirectory) -> dict[tuple[str, ...], int]:
        """{}: matrices may be stacked in the graph, and only the bytes of all files are known."""
        return {}

    def one_node(self, run: RunDirectory) -> dict[tuple[str, ...], tuple[str, ...]]:
        """The matrices of a layer's experts: with one type of 4 bits they are a QMoE, else all of them compute."""
        kinds = tuple(name for name, grid in GRIDS.items() if (matmul_nbits_container(grid) or (0,))[0] == EXACT_BITS)
        found = mixtures_of(RunWeights(run), of_any_type=True)
        return {(*one.all_parameters("fc1"), *one.all_parameters("fc2")): kinds for one in found}

    def file_bytes(self, run: RunDirectory) -> int | None:
        """Bytes of all files of the folder but `NOTES`; None where there is too little memory to trace the graph."""
        options = self.options
        weights = RunWeights(run, half_scales="f16" in (options.scale_dtype, options.io_dtype))
        with tempfile.TemporaryDirectory() as folder:
            companions = Path(folder) / "companions"
            companions.mkdir()
            graph = self._built(weights, Path(folder), companions) or self._traced(weights, companions)
            if graph is None:
                return None
            lay_out_chat_templates(companions, run.config_dir, options.log)
            set_provenance(graph.model, provenance(weights, graph.made_by))
            write_model(graph.model, companions / MODEL_FILE, options.split_max_bytes, empty=True)
            return sum(file.stat().st_size for file in companions.rglob("*") if file.is_file())

    def _built(self, weights: RunWeights, folder: Path, companions: Path) -> FinishedGraph | None:
        row = builder_class(weights.run.config, weights.run.names())
        if row is None:
            return None
        try:
            return build(weights, row, folder / "scratch", companions, self.options)
        except CannotBuild:
            for file in companions.iterdir():
                file.unlink()
            return None

    def _traced(self, weights: RunWeights, companions: Path) -> FinishedGraph | None:
        folder = self.kept / _key(weights)
        found = kept_trace(folder)
        if found is None:
            needed = _TRACING * sum(4 * math.prod(entry.shape) for entry in weights.run.manifest.tensors)
            if needed > psutil.virtual_memory().available:
                return None
            keep_trace(matched_trace(weights, True, self.options.log, ""), folder)
            found = kept_trace(folder)
            assert found is not None
        return finish(found, weights, companions, self.options)


def _key(weights: RunWeights) -> str:
    """A name for all that decides how a traced graph looks before the run's integers are in it."""
    manifest = weights.run.manifest
    nodes = [mixture.module for mixture in mixtures_of(weights)]
    versions = [__version__, *map(version, ("torch", "transformers", "onnxscript", "onnx-ir"))]
    what = [versions, manifest.source["files"], manifest.tied, weights.run.names(), nodes]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
