"""The export: run directory → a finished graph by the route that fits → files → checks → one whole folder.

Graphs come from onnxruntime-genai's model builder where it knows the architecture, else from torch.onnx.export, or from
the user (`--template`).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporters.onnx.artifact.card import CARD, NOT_MEASURED, render_card
from exporters.onnx.artifact.check import check_bindings, check_complete
from exporters.onnx.artifact.comparison import (
    HALF_ACTIVATIONS_LIMIT,
    HALF_LIMIT,
    LIMIT,
    MOST_BYTES,
    Divergence,
    divergence,
)
from exporters.onnx.artifact.layouts import Layout, layout_of
from exporters.onnx.artifact.model_file import write_model
from exporters.onnx.artifact.ort_format import write_ort_format
from exporters.onnx.artifact.sidecar import SIDECAR, Sidecar, hash_files
from exporters.onnx.artifact.transformers_js import check_cache, write_companions
from exporters.onnx.builder_classes import GENAI_CONFIG, builder_class
from exporters.onnx.fused_level import set_fused_level
from exporters.onnx.options import TRANSFORMERS_JS, OnnxOptions
from exporters.onnx.passes.cache_shapes import pin_head_size
from exporters.onnx.passes.half_activations import halve_activations
from exporters.onnx.passes.portable_gather import use_portable_gathers
from exporters.onnx.passes.provenance import provenance, set_provenance
from exporters.onnx.passes.standard_operators import use_standard_operators
from exporters.onnx.routes.builder import CannotBuild
from exporters.onnx.routes.built import build
from exporters.onnx.routes.chat_templates import lay_out_chat_templates
from exporters.onnx.routes.graph import FinishedGraph
from exporters.onnx.routes.template import from_template
from exporters.onnx.routes.traced_mixtures import OPERATOR as QMOE
from exporters.onnx.routes.tracing import trace
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError, first_line
from signround_edge.files import whole_folder
from signround_edge.formats import get_grid
from signround_edge.formats.matmul_nbits import has_matmul_nbits_form
from signround_edge.outputs import check_output, lies_in
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.gguf_presets import GGUF_PRESETS


def export_folder(run: RunDirectory, out: Path, options: OnnxOptions) -> Path:
    """Write the folder; see `OnnxExporter.export`."""
    _check_out(run, out, options.template)
    if options.dtype is None:
        _check_grids(run)
    weights = RunWeights(run, half_scales="f16" in (options.scale_dtype, options.io_dtype))
    with whole_folder(out, "the ONNX export", marker=SIDECAR) as partial:
        companions = partial / "companions"
        graph, layout = _write_graph(weights, partial, companions, options)
        facts = provenance(weights, graph.made_by)
        zero_biases = check_complete(graph.bindings, weights)
        if options.ort_format:
            options.log("onnx: writing model.ort")
            floats = [b.initializers["weight"] for b in graph.bindings if not b.quantized]
            write_ort_format(partial / layout.model, floats)
        for file in sorted(companions.iterdir()):
            shutil.move(file, partial / file.name)
        companions.rmdir()
        if options.layout == TRANSFORMERS_JS:
            write_companions(run, partial, graph.model.graph, layout, options.log)
        sidecar = Sidecar(
            facts,
            options.dtype,
            options.accuracy_level,
            graph.bindings,
            zero_biases,
            kv_cache=graph.kv_cache,
            scale_dtype=options.scale_dtype,
            operators=options.operators,
            io_dtype=options.io_dtype,
        )
        (partial / CARD).write_bytes(render_card(partial, sidecar, NOT_MEASURED).encode())
        (partial / SIDECAR).write_bytes(replace(sidecar, files=hash_files(partial)).to_bytes())
    options.log(f"onnx: {len(graph.bindings)} tensors equal the run directory; wrote {out}")
    return out


def _write_graph(
    weights: RunWeights, partial: Path, companions: Path, options: OnnxOptions
) -> tuple[FinishedGraph, Layout]:
    """Write the model by the route that fits; other files of the folder (tokenizer, config) go to `companions`."""
    row = builder_class(weights.run.config, weights.run.names())
    if options.template is None and row is not None and not options.no_cache:
        try:
            companions.mkdir()
            graph = build(weights, row, partial / "scratch", companions, options)
            written, layout = _write(graph, weights, partial, companions, options)
            _compare(weights.run, partial / layout.model, options)
            return written, layout
        except CannotBuild as error:
            reason = f"onnxruntime-genai's model builder does not make the graph of this model ({error})"
        finally:
            shutil.rmtree(partial / "scratch", ignore_errors=True)
        _clear(partial)
    elif options.no_cache:
        reason = "--no-cache wants a graph that keeps nothing"
    else:
        reason = "onnxruntime-genai's model builder does not know this architecture"
    if options.template is not None:
        companions.mkdir()
        graph = from_template(weights, options.template, companions, options)
        return _write(graph, weights, partial, companions, options)
    options.log(f"onnx: {reason}; tracing it with torch.onnx.export")
    no_qmoe = _why_no_qmoe(options)
    try:
        return _trace(weights, partial, companions, options, no_qmoe)
    except CannotBuild as error:
        options.log(f"onnx: experts as QMoE are not kept ({error}); tracing it without")
    _clear(partial)
    return _trace(weights, partial, companions, options, "QMoE did not compute what they compute")


def _why_no_qmoe(options: OnnxOptions) -> str:
    """Why experts are no QMoE in such an export; empty where they may be."""
    if options.dtype is not None:
        return f"--dtype {options.dtype} writes floats"
    if options.io_dtype == "f16":
        return "the graph computes in f16, which is for WebGPU"
    if options.operators == "qdq":
        return "--operators qdq writes the standard operators"
    if options.layout == TRANSFORMERS_JS:  # ONNX Runtime Web 1.31; WebAssembly's QMoE is that of CPUs
        return "QMoE on WebGPU has no zero points"
    return ""


def _trace(
    weights: RunWeights, partial: Path, companions: Path, options: OnnxOptions, no_qmoe: str
) -> tuple[FinishedGraph, Layout]:
    """Trace and write; CannotBuild where the graph has experts as nodes and does not compute what transformers does."""
    companions.mkdir()
    graph = trace(weights, companions, options, no_qmoe)
    written, layout = _write(graph, weights, partial, companions, options)
    if options.io_dtype == "f16" or any(node.op_type == QMOE for node in written.model.graph):
        _compare(weights.run, partial / layout.model, options)
    return written, layout


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write(
    graph: FinishedGraph, weights: RunWeights, partial: Path, companions: Path, options: OnnxOptions
) -> tuple[FinishedGraph, Layout]:
    """Write the model and its data in the operators and layout that are asked for, and check what is in the files."""
    if options.io_dtype == "f16":
        halve_activations(graph.model.graph, graph.bindings, weights)
    if options.operators == "qdq":
        graph = replace(graph, bindings=use_standard_operators(graph.model, graph.bindings, weights))
        set_fused_level(companions / GENAI_CONFIG, options.accuracy_level)
    lay_out_chat_templates(companions, weights.run.config_dir, options.log)
    set_provenance(graph.model, provenance(weights, graph.made_by))
    layout = layout_of(options.layout, graph.model.graph)
    if options.layout == TRANSFORMERS_JS:
        check_cache(graph.model.graph)
        pin_head_size(graph.model.graph, companions / GENAI_CONFIG)  # of a template
        use_portable_gathers(graph.model)
    model = partial / layout.model
    model.parent.mkdir(exist_ok=True)
    options.log(f"onnx: writing {layout.model} and its data")
    write_model(graph.model, model, options.split_max_bytes, layout.data)
    # On what is really in the files: this is what a device will load.
    check_bindings(ir.load(model).graph, graph.bindings, weights)
    return graph, layout


def _compare(run: RunDirectory, model: Path, options: OnnxOptions) -> None:
    """Raises CannotBuild unless the graph computes what transformers computes."""
    size = sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))
    if size > MOST_BYTES:
        options.log(
            f"onnx: the graph was not compared with transformers: the model has {size / 1e9:.1f} GB, and that holds it "
            "twice in memory; `verify` does it"
        )
        return
    try:
        found = divergence(run, model, steps=0) if options.no_cache else divergence(run, model)
    except Exception as error:  # onnxruntime's error classes share no base but Exception
        raise CannotBuild(f"ONNX Runtime cannot run it: {first_line(error)[:300]}") from error
    if options.io_dtype == "f16":
        _check_half(found, options)
    elif not found.worst <= (HALF_LIMIT if options.dtype == "f16" else LIMIT):
        raise CannotBuild(
            f"its logits differ from those of transformers: KL divergence {found.texts:.0e} on texts, "
            f"{found.steps:.0e} on single tokens after them"
        )
    options.log(f"onnx: the graph's logits are those of transformers (KL divergence {found.worst:.0e})")


def _check_half(found: Divergence, options: OnnxOptions) -> None:
    """UserError where f16 is too small for the model's activations."""
    if not np.isfinite(found.worst):
        raise UserError(
            "--io-dtype f16: the model's activations overflow in f16 (its logits are no numbers); export it in f32"
        )
    if found.worst > HALF_ACTIVATIONS_LIMIT:
        raise UserError(
            f"--io-dtype f16: in f16 the model's logits are a KL divergence of {found.worst:.0e} from those in f32, "
            f"more than {HALF_ACTIVATIONS_LIMIT:.0e}; export it in f32"
        )


def _check_out(run: RunDirectory, out: Path, template: Path | None) -> None:
    """UserError where the export would write into what it reads, or replace a folder that holds more than an export."""
    check_output("-o", out, {"the run": run.path, "--template": template})
    if lies_in(template, out):
        raise UserError(f"--template {template} lies in {out}, which the export would replace; give another -o")
    if (out / SIDECAR).is_file():
        try:
            ours = {SIDECAR, *(Path(name).parts[0] for name in Sidecar.read(out).files)}
        except UserError as error:
            raise UserError(
                f"{out} holds a damaged export whose {SIDECAR} cannot be read; remove the folder, or give another -o"
            ) from error
        other = next((file.name for file in sorted(out.iterdir()) if file.name not in ours), None)
        if other is not None:
            raise UserError(
                f"{out} is an earlier export with other files in it ({other}), which a new one would remove; give "
                "another -o, or move them away"
            )


def _check_grids(run: RunDirectory) -> None:
    """UserError for a grid that MatMulNBits cannot hold."""
    for entry in run.manifest.tensors:
        if entry.format is not None and not has_matmul_nbits_form(get_grid(entry.format)):
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
        if not preset.rules and all(has_matmul_nbits_form(get_grid(f)) for f in (preset.base, preset.output))
    ]
