"""The route of architectures that onnxruntime-genai's model builder knows: its graph, with the run's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from exporters.onnx.artifact.check import check_bindings
from exporters.onnx.bindings import Binding, find_bindings
from exporters.onnx.builder_names import EMBEDDING
from exporters.onnx.options import OnnxOptions
from exporters.onnx.passes.accuracy_level import set_accuracy_level
from exporters.onnx.passes.embeddings import set_embedding
from exporters.onnx.passes.float_matrices import set_float_matrices
from exporters.onnx.passes.half_weights import halve_weights
from exporters.onnx.passes.operands import set_operands
from exporters.onnx.routes.builder import build_graph
from exporters.onnx.routes.graph import MODEL_FILE, FinishedGraph
from exporters.onnx.routes.staging import (
    can_pack_qkv,
    check_stand_ins,
    write_float_checkpoint,
    write_stand_in_checkpoint,
)
from exporters.onnx.run_weights import RunWeights


def build(weights: RunWeights, scratch: Path, companions: Path, options: OnnxOptions) -> FinishedGraph:
    """Run directory → staged checkpoint → the builder's graph → the run's integers in it.

    Args:
        weights: the run.
        scratch: folder to make, for what is not kept.
        companions: where the builder's other files go: tokenizer, genai_config.json.
        options: of the export.
    Raises:
        UserError: the builder cannot make the graph.
        CheckFailed: a value of its graph is not what it was given.
    """
    from onnxruntime_genai import __version__ as builder_version

    staging, built = scratch / "staging", scratch / "built"
    options.log("onnx: building the graph with onnxruntime-genai's model builder")
    if options.dtype is None:
        write_stand_in_checkpoint(weights, staging)
        build_graph(staging, built, "int4", pack_qkv=can_pack_qkv(weights.run))
    else:
        write_float_checkpoint(weights.run, staging)
        build_graph(staging, built, "fp32")
    shutil.rmtree(staging)
    for file in sorted(built.iterdir()):
        if not file.name.startswith(MODEL_FILE):
            shutil.move(file, companions / file.name)
    model = ir.load(built / MODEL_FILE)
    options.log("onnx: checking every tensor of the graph against the run directory")
    _check_built(model.graph, weights, control=options.dtype is not None)
    return FinishedGraph(model, _finish(model, weights, options), f"onnxruntime-genai {builder_version}", True)


def _check_built(graph: ir.Graph, weights: RunWeights, control: bool) -> None:
    """What the builder stores must be what it was given, each under its name: that proves the mapping of names.

    A control holds the run's floats, a quantized graph the stand-ins of `staging` and small floats.
    """
    bindings = find_bindings(graph)
    if control:
        check_bindings(graph, bindings, weights)
        return
    bindings = [b for b in bindings if b.parameters != (EMBEDDING,)]
    check_bindings(graph, [b for b in bindings if not b.quantized], weights)
    check_stand_ins(graph, [b for b in bindings if b.quantized], weights)


def _finish(model: ir.Model, weights: RunWeights, options: OnnxOptions) -> list[Binding]:
    """The passes, in order; returns what the finished graph holds."""
    if options.dtype is None:
        set_operands(model.graph, weights)
        set_float_matrices(model.graph, weights)
        set_embedding(model.graph, weights)
        set_accuracy_level(model.graph, options.accuracy_level)
        _drop_unused_initializers(model.graph)
    bindings = find_bindings(model.graph)
    if options.dtype == "f16":
        halve_weights(model.graph, bindings, weights)
    return bindings


def _drop_unused_initializers(graph: ir.Graph) -> None:
    """onnx_ir's RemoveUnusedNodesPass does that too, but also cuts empty inputs off the builder's nodes."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
