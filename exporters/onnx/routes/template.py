"""A user's own ONNX graph of the model: opened, checked, and matched with the run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.onnx.artifact.reader import open_model
from exporters.onnx.bindings import Binding
from exporters.onnx.routes.matching import NEAR, match_weights
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory

GENAI_CONFIG = "genai_config.json"
_QUANTIZED_OPERATORS = {"MatMulNBits", "GatherBlockQuantized", "QMoE", "DequantizeLinear", "MatMulInteger"}
_QUANTIZED_OPERATORS |= {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulBnb4", "QGemm"}


def open_template(path: Path) -> ir.Model:
    """Parse a float graph; its weights stay in their files.

    Raises:
        UserError: it is no ONNX file, lacks data, is already quantized, or is no language model.
    """
    model = open_model(path, remedy="give --template a complete ONNX model")
    quantized = Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in _QUANTIZED_OPERATORS)
    if quantized:
        what = ", ".join(f"{count} {op}" for op, count in quantized.most_common(3))
        raise UserError(f"--template {path} is already quantized ({what} nodes); give the float graph it was made from")
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


def copy_companions(run: RunDirectory, template: Path | None, folder: Path) -> None:
    """Copy the run's config and tokenizer files, and genai_config.json where the template has one beside it."""
    for file in sorted(run.config_dir.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if template is None:
        return
    source = (template if template.is_dir() else template.parent) / GENAI_CONFIG
    if source.is_file():
        try:
            config = json.loads(source.read_text(encoding="utf-8"))
            config["model"]["decoder"]["filename"] = "model.onnx"
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source} is not a readable genai_config.json ({error!r}); repair or remove it") from error
        (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=4), encoding="utf-8")
