"""The export: run directory → a float or pre-quantized graph → passes → checks → one whole folder.

Graphs come from onnxruntime-genai's model builder where it knows the architecture, else from torch.onnx.export, or from
the user (`--template`). Each route ends in a `FinishedGraph`; what follows is common to all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.interface import ExportOptions, LevelCost
from exporters.onnx.artifact.card import write_card
from exporters.onnx.artifact.check import check_bindings, check_complete, check_stand_ins
from exporters.onnx.artifact.model_file import write_model
from exporters.onnx.artifact.ort_format import write_ort_format
from exporters.onnx.artifact.sidecar import SIDECAR, Sidecar, hash_files
from exporters.onnx.bindings import Binding, find_bindings
from exporters.onnx.builder_names import EMBEDDING, builder_knows, check_rope, check_traceable
from exporters.onnx.packing import container_of
from exporters.onnx.passes.accuracy_level import set_accuracy_level
from exporters.onnx.passes.embeddings import set_embedding
from exporters.onnx.passes.float_matrices import set_float_matrices
from exporters.onnx.passes.graph_edit import drop_unused_initializers
from exporters.onnx.passes.half_weights import halve_weights
from exporters.onnx.passes.matched_weights import set_matched_weights
from exporters.onnx.passes.operands import set_operands
from exporters.onnx.passes.provenance import provenance, set_provenance
from exporters.onnx.routes.builder import build_graph
from exporters.onnx.routes.matching import match_weights
from exporters.onnx.routes.staging import can_pack_qkv, write_float_checkpoint, write_stand_in_checkpoint
from exporters.onnx.routes.template import copy_companions, match_template, open_template
from exporters.onnx.routes.tracing import trace_graph
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError
from signround_edge.files import whole_folder
from signround_edge.formats import get_grid
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.gguf_presets import GGUF_PRESETS

MODEL_FILE = "model.onnx"
ACCURACY_LEVELS = (0, 1, 4)


@dataclass(frozen=True)
class FinishedGraph:
    """A graph that holds the run's weights, ready to be written.

    Attributes:
        model: the graph.
        bindings: what it holds of the run.
        made_by: who made the graph, for the provenance.
        kv_cache: it has a key-value cache.
    """

    model: ir.Model
    bindings: list[Binding]
    made_by: str
    kv_cache: bool


def export_folder(run: RunDirectory, out: Path, options: ExportOptions) -> Path:
    """Write the folder; see `OnnxExporter.export`."""
    config = _checked_config(run, options)
    weights = RunWeights(run, half_scales=options.scale_dtype == "f16")
    with whole_folder(out, "the ONNX export", marker=SIDECAR) as partial:
        scratch = partial / "scratch"
        companions = partial / "companions"
        companions.mkdir()
        graph = _make_graph(weights, config, scratch, companions, options)
        facts = provenance(weights, graph.made_by)
        set_provenance(graph.model, facts)
        options.log("onnx: writing model.onnx and model.onnx.data")
        write_model(graph.model, partial / MODEL_FILE, options.split_max_bytes)
        # Once more on what is really in the files: this is what a device will load.
        check_bindings(ir.load(partial / MODEL_FILE).graph, graph.bindings, weights)
        zero_biases = check_complete(graph.bindings, weights)
        if options.ort_format:
            options.log("onnx: writing model.ort")
            write_ort_format(partial / MODEL_FILE)
        for file in sorted(companions.iterdir()):
            shutil.move(file, partial / file.name)
        companions.rmdir()
        shutil.rmtree(scratch, ignore_errors=True)
        cost = _level_4_cost(partial, options)
        write_card(partial, facts, options.accuracy_level, cost, graph.kv_cache)
        Sidecar(
            facts,
            options.dtype,
            options.accuracy_level,
            graph.bindings,
            zero_biases,
            hash_files(partial),
            graph.kv_cache,
            options.scale_dtype,
            None if cost is None or isinstance(cost, str) else asdict(cost),
        ).write(partial)
    options.log(f"onnx: {len(graph.bindings)} tensors equal the run directory; wrote {out}")
    return out


def _level_4_cost(folder: Path, options: ExportOptions) -> LevelCost | str | None:
    """The figures, or why there are none; None for a graph of floats, which has no such level."""
    if options.dtype is not None:
        return None
    if options.measure_level_4 is None:
        return "nobody asked for it"
    options.log("onnx: measuring what accuracy level 4 costs on this model")
    return options.measure_level_4(folder)


def _make_graph(
    weights: RunWeights, config: dict[str, Any], scratch: Path, companions: Path, options: ExportOptions
) -> FinishedGraph:
    """The graph by the route that fits; other files of the folder (tokenizer, config) go to `companions`."""
    if options.template is not None:
        return _from_template(weights, options.template, companions, options)
    if builder_knows(config):
        return _build(weights, config, scratch, companions, options)
    return _trace(weights, companions, options)


def _build(
    weights: RunWeights, config: dict[str, Any], scratch: Path, companions: Path, options: ExportOptions
) -> FinishedGraph:
    """Run directory → staged checkpoint → the builder's graph."""
    from onnxruntime_genai import __version__ as builder_version

    staging, built = scratch / "staging", scratch / "built"
    options.log("onnx: building the graph with onnxruntime-genai's model builder")
    if options.dtype is None:
        write_stand_in_checkpoint(weights, config, staging)
        build_graph(staging, built, "int4", pack_qkv=can_pack_qkv(weights.run))
    else:
        write_float_checkpoint(weights.run, config, staging)
        build_graph(staging, built, "fp32")
    shutil.rmtree(staging)
    for file in sorted(built.iterdir()):
        if not file.name.startswith(MODEL_FILE):
            shutil.move(file, companions / file.name)
    model = ir.load(built / MODEL_FILE)
    options.log("onnx: checking every tensor of the graph against the run directory")
    _check_built(model.graph, weights, control=options.dtype is not None)
    return FinishedGraph(model, _finish(model, weights, options), f"onnxruntime-genai {builder_version}", True)


def _trace(weights: RunWeights, companions: Path, options: ExportOptions) -> FinishedGraph:
    """Run directory → torch model → torch.onnx.export → our integers in the place of its floats."""
    from torch import __version__ as torch_version

    options.log(
        "onnx: onnxruntime-genai's model builder does not know this architecture; tracing it with torch.onnx.export. "
        "The graph has no KV cache: it runs in plain ONNX Runtime, not in onnxruntime-genai"
    )
    model = trace_graph(weights.run)
    options.log("onnx: matching the graph's weights with the run directory")
    matched = match_weights(model.graph, weights, limit=0.0).bindings
    check_complete(matched, weights)
    copy_companions(weights.run, None, companions)
    return FinishedGraph(
        model, _replace_weights(model, matched, weights, options), f"torch.onnx.export (torch {torch_version})", False
    )


def _from_template(weights: RunWeights, template: Path, companions: Path, options: ExportOptions) -> FinishedGraph:
    """A user's float graph → our integers in the place of its floats."""
    model = open_template(template)
    options.log(f"onnx: matching the weights of {template} with the run directory")
    matched = match_template(model, template, weights)
    _check_template_dtype(model.graph, matched, template, options)
    copy_companions(weights.run, template, companions)
    kv_cache = any((value.name or "").startswith("past") for value in model.graph.inputs)
    return FinishedGraph(
        model, _replace_weights(model, matched, weights, options), f"template {template.name}", kv_cache
    )


def _check_template_dtype(graph: ir.Graph, matched: list[Binding], template: Path, options: ExportOptions) -> None:
    stored = {graph.initializers[b.initializers["weight"]].const_value.dtype for b in matched}
    if options.dtype == "f32" and ir.DataType.FLOAT16 in stored:
        raise UserError(f"--dtype f32: the weights of --template {template} are f16; give one in f32, or --dtype f16")


def _replace_weights(
    model: ir.Model, matched: list[Binding], weights: RunWeights, options: ExportOptions
) -> list[Binding]:
    """The passes of both routes that match by value; returns what the finished graph holds."""
    bindings = set_matched_weights(model, matched, weights, keep_floats=options.dtype is not None)
    set_accuracy_level(model.graph, options.accuracy_level)
    common.RemoveUnusedNodesPass()(model)
    drop_unused_initializers(model.graph)
    if options.dtype == "f16":
        halve_weights(model.graph, bindings, weights)
    return bindings


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
    return bindings


def _checked_config(run: RunDirectory, options: ExportOptions) -> dict[str, Any]:
    """config.json of the run, after every check that needs no long work."""
    if options.dtype not in (None, "f32", "f16"):
        raise UserError(f"--dtype {options.dtype} is unknown; --format onnx writes f32 or f16")
    if options.accuracy_level not in ACCURACY_LEVELS:
        raise UserError(f"--accuracy-level {options.accuracy_level} is unknown; MatMulNBits on a CPU has 0, 1 and 4")
    if options.scale_dtype not in ("f32", "f16"):
        raise UserError(f"--scale-dtype {options.scale_dtype} is unknown; scales are stored in f32 or f16")
    file = run.config_dir / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or no readable JSON; run `quantize` again") from error
    if options.template is None and builder_knows(config):
        check_rope(config, str(file))
    elif options.template is None:
        check_traceable(config, run.names(), str(file))
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
