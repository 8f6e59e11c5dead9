"""The route of `--template`: a user's own float graph of the model, with the run's weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.onnx.artifact.reader import open_model
from exporters.onnx.bindings import Binding
from exporters.onnx.builder_classes import GENAI_CONFIG
from exporters.onnx.options import OnnxOptions
from exporters.onnx.routes.graph import MODEL_FILE, FinishedGraph, copy_config_files, replace_weights
from exporters.onnx.routes.matching import NEAR, match_weights
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError

_QUANTIZED_OPERATORS = {"MatMulNBits", "GatherBlockQuantized", "QMoE", "DequantizeLinear", "MatMulInteger"}
_QUANTIZED_OPERATORS |= {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulBnb4", "QGemm"}


def from_template(weights: RunWeights, template: Path, companions: Path, options: OnnxOptions) -> FinishedGraph:
    """A user's float graph → our integers in the place of its floats.

    Args:
        weights: the run.
        template: an .onnx file, or a folder that holds one.
        companions: where config and tokenizer files go, and the genai_config.json that lies beside the template.
        options: of the export.
    Raises:
        UserError: the template is not a float graph of this model.
    """
    model = open_template(template)
    options.log(f"onnx: matching the weights of {template} with the run directory")
    matched = match_template(model, template, weights)
    _check_dtype(model.graph, matched, template, options)
    copy_config_files(weights.run, companions)
    _copy_genai_config(template, companions)
    kv_cache = any((value.name or "").startswith("past") for value in model.graph.inputs)
    bindings = replace_weights(model, matched, weights, options)
    return FinishedGraph(model, bindings, f"template {template.name}", kv_cache)


def open_template(path: Path) -> ir.Model:
    """Parse a float graph; its weights stay in their files.

    Raises:
        UserError: it is no ONNX file, lacks data, is already quantized, or is no language model.
    """
    if not path.exists():
        raise UserError(
            f"--template {path} does not exist; give a float graph: an .onnx file, or a folder that holds one"
        )
    model = open_model(path, remedy="give --template a complete ONNX model")
    quantized = Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in _QUANTIZED_OPERATORS)
    if quantized:
        what = ", ".join(f"{count} {op}" for op, count in quantized.most_common(3))
        raise UserError(f"--template {path} is already quantized ({what} nodes); give the float graph it was made from")
    common.RemoveInitializersFromInputsPass()(model)  # old exporters list every weight among the inputs
    inputs, outputs = ({value.name for value in values} for values in (model.graph.inputs, model.graph.outputs))
    if "input_ids" not in inputs or "logits" not in outputs:
        raise UserError(
            f"--template {path} is not a language model with the input input_ids and the output logits; it has "
            f"{', '.join(sorted(map(str, inputs)))[:100]} and {', '.join(sorted(map(str, outputs)))[:100]}"
        )
    if model.functions:
        common.InlinePass()(model)
    # Older exporters keep weights in Constant nodes.
    common.LiftConstantsToInitializersPass(lift_all_constants=False)(model)
    return model


def match_template(model: ir.Model, path: Path, weights: RunWeights) -> list[Binding]:
    """The run's parameters in a template.

    Raises:
        UserError: one of them is not there, or several fit one place equally well.
    """
    matches = match_weights(model.graph, weights, NEAR)
    placed = {p for b in matches.bindings for p in (*b.parameters, *b.duplicates)}
    names = weights.run.names()
    for name in names:
        # Builders leave out biases of zeros.
        if name in placed or (name.endswith(".bias") and not bool(weights.run.dequantized(name).any())):
            continue
        counted = f"{len(placed)} of the run's {len(names)} tensors were found"
        if name in matches.ambiguous:
            raise UserError(
                f"--template {path}: tensor {name} and {matches.ambiguous[name]} others fit one weight equally well, "
                f"by value and by name ({counted}); name the template's weights as the model's parameters"
            )
        shape = list(weights.run.entry(name).shape)
        raise UserError(
            f"--template {path} has no weight that resembles tensor {name} {shape} ({counted}); export the template "
            "from the model that was quantized, with float weights"
            + (", or quantize without --transform, which changes weights" if weights.run.is_transformed else "")
        )
    return matches.bindings


def _check_dtype(graph: ir.Graph, matched: list[Binding], template: Path, options: OnnxOptions) -> None:
    stored = {graph.initializers[b.initializers["weight"]].const_value.dtype for b in matched}
    if options.dtype == "f32" and ir.DataType.FLOAT16 in stored:
        raise UserError(f"--dtype f32: the weights of --template {template} are f16; give one in f32, or --dtype f16")


def _copy_genai_config(template: Path, folder: Path) -> None:
    """Copy genai_config.json where the template has one beside it, for the name of our file."""
    source = (template if template.is_dir() else template.parent) / GENAI_CONFIG
    if source.is_file():
        try:
            config = json.loads(source.read_text(encoding="utf-8"))
            config["model"]["decoder"]["filename"] = MODEL_FILE
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source} is not a readable genai_config.json ({error!r}); repair or remove it") from error
        (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=4), encoding="utf-8")
