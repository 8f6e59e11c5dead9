"""The export: run directory → staged checkpoint → the builder's graph → checks and passes → one whole folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporters.interface import ExportOptions
from exporters.onnx.bindings import Binding, find_bindings
from exporters.onnx.check import check_bindings, check_complete
from exporters.onnx.families import EMBEDDING, check_architecture
from exporters.onnx.graph_builder import build_graph
from exporters.onnx.graph_edit import drop_unused_initializers
from exporters.onnx.model_file import write_model
from exporters.onnx.output_folder import whole_folder
from exporters.onnx.packing import container_of
from exporters.onnx.passes.accuracy_level import set_accuracy_level
from exporters.onnx.passes.embeddings import set_embedding
from exporters.onnx.passes.float_matrices import set_float_matrices
from exporters.onnx.passes.half_weights import halve_weights
from exporters.onnx.passes.operands import set_operands
from exporters.onnx.passes.provenance import provenance, set_provenance
from exporters.onnx.run_weights import RunWeights
from exporters.onnx.sidecar import Sidecar, hash_files
from exporters.onnx.staging import can_pack_qkv, write_float_checkpoint, write_olive_checkpoint
from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.formats.gguf_presets import GGUF_PRESETS
from signround_edge.run_directory import RunDirectory

MODEL_FILE = "model.onnx"
ACCURACY_LEVELS = (0, 1, 4)


def export_folder(run: RunDirectory, out: Path, options: ExportOptions) -> Path:
    """Write the folder; see `OnnxExporter.export`."""
    if options.split_max_bytes is not None:
        raise UserError("--split-max-size is for --format gguf; leave it out for ONNX")
    config = _checked_config(run, options)
    weights = RunWeights(run)
    with whole_folder(out) as partial:
        staging, built = partial / "staging", partial / "built"
        options.log("onnx: building the graph with onnxruntime-genai's model builder")
        if options.dtype is None:
            write_olive_checkpoint(weights, config, staging)
            build_graph(staging, built, "int4", pack_qkv=can_pack_qkv(run))
        else:
            write_float_checkpoint(run, config, staging)
            build_graph(staging, built, "fp32")
        shutil.rmtree(staging)
        model = ir.load(built / MODEL_FILE)
        options.log("onnx: checking every tensor of the graph against the run directory")
        _check_built(model.graph, weights, control=options.dtype is not None)
        bindings = _finish(model, weights, options)
        options.log("onnx: writing model.onnx and model.onnx.data")
        write_model(model, partial / MODEL_FILE)
        # Once more on what is really in the files: this is what a device will load.
        check_bindings(ir.load(partial / MODEL_FILE).graph, bindings, weights)
        zero_biases = check_complete(bindings, weights)
        for file in sorted(built.iterdir()):
            if not file.name.startswith(MODEL_FILE):
                shutil.move(file, partial / file.name)
        shutil.rmtree(built)
        level = options.accuracy_level
        files = hash_files(partial)
        Sidecar(provenance(weights), options.dtype, level, bindings, zero_biases, files).write(partial)
    options.log(f"onnx: {len(bindings)} tensors equal the run directory; wrote {out}")
    return out


def _check_built(graph: ir.Graph, weights: RunWeights, control: bool) -> None:
    """The builder's own integers and floats must be the run's, which also proves the mapping of names.

    In a quantized graph the placeholders of `staging` are left out.
    """
    bindings = find_bindings(graph)
    if not control:
        bindings = [
            b for b in bindings if b.parameters != (EMBEDDING,) and b.quantized == weights.is_quantized(b.parameters)
        ]
    check_bindings(graph, bindings, weights)


def _finish(model: ir.Model, weights: RunWeights, options: ExportOptions) -> list[Binding]:
    """The passes, in order; returns what the finished graph holds."""
    if options.dtype is None:
        set_operands(model.graph, weights)
        set_float_matrices(model.graph, weights)
        set_embedding(model.graph, weights)
        set_accuracy_level(model.graph, options.accuracy_level)
        drop_unused_initializers(model.graph)
    bindings = find_bindings(model.graph)
    if options.dtype == "f16":
        halve_weights(model.graph, bindings, weights)
    set_provenance(model, weights)
    return bindings


def _checked_config(run: RunDirectory, options: ExportOptions) -> dict[str, Any]:
    """config.json of the run, after every check that needs no long work."""
    if options.dtype not in (None, "f32", "f16"):
        raise UserError(f"--dtype {options.dtype} is unknown; --format onnx writes f32 or f16")
    if options.accuracy_level not in ACCURACY_LEVELS:
        raise UserError(f"--accuracy-level {options.accuracy_level} is unknown; MatMulNBits on a CPU has 0, 1 and 4")
    if options.template is not None:
        raise UserError("--template works with --format gguf only; leave it out for --format onnx")
    file = run.config_dir / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or no readable JSON; run `quantize` again") from error
    check_architecture(config, str(file))
    if options.dtype is None:
        _check_grids(run)
    return config


def _check_grids(run: RunDirectory) -> None:
    for entry in run.manifest.tensors:
        if entry.format is not None and container_of(get_grid(entry.format)) is None:
            raise UserError(
                f"--format onnx cannot pack tensor {entry.name}: {entry.format} (scheme {run.manifest.scheme}) has a "
                "real-valued minimum, and MatMulNBits has none; quantize with "
                f"{', '.join(_exportable_presets())} or an onnx:… scheme, or export with --dtype f32"
            )


def _exportable_presets() -> list[str]:
    """GGUF schemes whose every format has a MatMulNBits form."""
    return [
        f"gguf:{name}"
        for name, preset in GGUF_PRESETS.items()
        if not preset.rules and all(container_of(get_grid(f)) is not None for f in (preset.base, preset.output))
    ]
