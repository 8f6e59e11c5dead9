"""The route of architectures that onnxruntime-genai's model builder knows: its graph, with the run's weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from onnx_ir.passes import common

from exporters.onnx.artifact.check import check_complete
from exporters.onnx.bindings import Binding
from exporters.onnx.builder_classes import GENAI_CONFIG, BuilderClass
from exporters.onnx.options import OnnxOptions
from exporters.onnx.passes.cache_shapes import pin_head_size
from exporters.onnx.routes.builder import CannotBuild, build_graph
from exporters.onnx.routes.graph import FinishedGraph, copy_config_files, replace_weights
from exporters.onnx.routes.recognition import recognise
from exporters.onnx.routes.stand_ins import StandIns, stand_in_model
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import CheckFailed, UserError
from signround_edge.model.config import write_config
from signround_edge.model.tokenizer import load_tokenizer


def build(
    weights: RunWeights, row: BuilderClass, scratch: Path, companions: Path, options: OnnxOptions
) -> FinishedGraph:
    """Run directory → a model of stand-ins → the builder's graph → the run's integers in it.

    Args:
        weights: the run.
        row: what the builder calls its architecture.
        scratch: folder to make, for what is not kept.
        companions: where the builder's other files go: tokenizer, genai_config.json.
        options: of the export.
    Raises:
        CannotBuild: the builder cannot make the graph, a parameter of the run is not to be found in it, or a quantized
            matrix has no quantized form there.
        UserError: the run's tokenizer cannot be read.
    """
    from onnxruntime_genai import __version__ as builder_version

    options.log("onnx: building the graph with onnxruntime-genai's model builder")
    load_tokenizer(weights.run.config_dir)  # the builder would say less about what is wrong with it
    config_dir, built = scratch / "config", scratch / "built"
    copy_config_files(weights.run, config_dir)
    config = {key: value for key, value in weights.run.config.items() if key != "quantization_config"}
    write_config(config_dir, config)  # the run's weights are not in the source's integers any more
    stand_ins = StandIns(weights.run)
    for pack_qkv in (True, False):
        shutil.rmtree(built, ignore_errors=True)
        model = build_graph(stand_in_model(weights.run, stand_ins), row, config_dir, built, pack_qkv)
        common.LiftConstantsToInitializersPass(lift_all_constants=False)(model)
        matched = recognise(model.graph, weights, stand_ins)
        if options.dtype is not None or not any(_is_mixed(binding, weights) for binding in matched):
            break
    _check_complete(matched, weights)
    for file in sorted(built.iterdir()):
        shutil.move(file, companions / file.name)
    pin_head_size(model.graph, companions / GENAI_CONFIG)
    try:
        bindings = replace_weights(model, matched, weights, options, keep_names=True)
    except UserError as error:
        raise CannotBuild(str(error).partition(";")[0]) from error
    bindings = [_of_head(binding, weights) for binding in bindings]
    return FinishedGraph(model, bindings, f"onnxruntime-genai {builder_version}", True)


def _is_mixed(binding: Binding, weights: RunWeights) -> bool:
    """Whether a stacked matrix has parts of several formats."""
    return len({weights.run.entry(p).format for p in binding.parameters}) > 1


def _check_complete(matched: list[Binding], weights: RunWeights) -> None:
    try:
        check_complete(matched, weights)
    except CheckFailed as error:
        raise CannotBuild(str(error)) from error


def _of_head(binding: Binding, weights: RunWeights) -> Binding:
    """The binding of a tied head by its own name."""
    head = next((alias for alias, owner in weights.run.manifest.tied.items() if (owner,) == binding.parameters), None)
    return replace(binding, parameters=(head,)) if head and binding.op in ("MatMul", "MatMulNBits") else binding
