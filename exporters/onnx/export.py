"""The export: run directory → a finished graph by the route that fits → files → checks → one whole folder.

Graphs come from onnxruntime-genai's model builder where it knows the architecture, else from torch.onnx.export, or from
the user (`--template`).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from exporters.onnx.artifact.card import CARD, NOT_MEASURED, render_card
from exporters.onnx.artifact.check import check_bindings, check_complete
from exporters.onnx.artifact.layouts import layout_of
from exporters.onnx.artifact.model_file import write_model
from exporters.onnx.artifact.ort_format import write_ort_format
from exporters.onnx.artifact.sidecar import SIDECAR, Sidecar, hash_files
from exporters.onnx.artifact.transformers_js import prepare_graph, write_companions
from exporters.onnx.builder_names import GENAI_CONFIG, builder_knows, check_rope
from exporters.onnx.fused_level import set_fused_level
from exporters.onnx.options import TRANSFORMERS_JS, OnnxOptions
from exporters.onnx.passes.portable_gather import use_portable_gathers
from exporters.onnx.passes.provenance import provenance, set_provenance
from exporters.onnx.passes.standard_operators import use_standard_operators
from exporters.onnx.routes.built import build
from exporters.onnx.routes.chat_templates import lay_out_chat_templates
from exporters.onnx.routes.graph import FinishedGraph
from exporters.onnx.routes.template import from_template
from exporters.onnx.routes.tracing import trace
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError
from signround_edge.files import whole_folder
from signround_edge.formats import get_grid
from signround_edge.formats.matmul_nbits import has_matmul_nbits_form
from signround_edge.model.config import CONFIG_FILE
from signround_edge.outputs import check_output, lies_in
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.gguf_presets import GGUF_PRESETS


def export_folder(run: RunDirectory, out: Path, options: OnnxOptions) -> Path:
    """Write the folder; see `OnnxExporter.export`."""
    _check_out(run, out, options.template)
    _check(run, options)
    weights = RunWeights(run, half_scales=options.scale_dtype == "f16")
    with whole_folder(out, "the ONNX export", marker=SIDECAR) as partial:
        scratch, companions = partial / "scratch", partial / "companions"
        companions.mkdir()
        graph = _make_graph(weights, scratch, companions, options)
        if options.operators == "qdq":
            graph = replace(graph, bindings=use_standard_operators(graph.model, graph.bindings, weights))
            set_fused_level(companions / GENAI_CONFIG, options.accuracy_level)
        lay_out_chat_templates(companions, run.config_dir, options.log)
        facts = provenance(weights, graph.made_by)
        set_provenance(graph.model, facts)
        layout = layout_of(options.layout, graph.model.graph)
        if options.layout == TRANSFORMERS_JS:
            prepare_graph(graph.model.graph, companions)
            use_portable_gathers(graph.model)
        model = partial / layout.model
        model.parent.mkdir(exist_ok=True)
        options.log(f"onnx: writing {layout.model} and its data")
        write_model(graph.model, model, options.split_max_bytes, layout.data)
        # Once more on what is really in the files: this is what a device will load.
        check_bindings(ir.load(model).graph, graph.bindings, weights)
        zero_biases = check_complete(graph.bindings, weights)
        if options.ort_format:
            options.log("onnx: writing model.ort")
            write_ort_format(model)
        for file in sorted(companions.iterdir()):
            shutil.move(file, partial / file.name)
        companions.rmdir()
        shutil.rmtree(scratch, ignore_errors=True)
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
        )
        (partial / CARD).write_bytes(render_card(partial, sidecar, NOT_MEASURED).encode())
        (partial / SIDECAR).write_bytes(replace(sidecar, files=hash_files(partial)).to_bytes())
    options.log(f"onnx: {len(graph.bindings)} tensors equal the run directory; wrote {out}")
    return out


def _make_graph(weights: RunWeights, scratch: Path, companions: Path, options: OnnxOptions) -> FinishedGraph:
    """The graph by the route that fits; other files of the folder (tokenizer, config) go to `companions`."""
    if options.template is not None:
        return from_template(weights, options.template, companions, options)
    if builder_knows(weights.run.config):
        return build(weights, scratch, companions, options)
    return trace(weights, companions, options)


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


def _check(run: RunDirectory, options: OnnxOptions) -> None:
    """Every check that needs no long work."""
    config, source = run.config, str(run.config_dir / CONFIG_FILE)
    if options.template is None and builder_knows(config):
        check_rope(config, source)
    if options.dtype is None:
        _check_grids(run)


def _check_grids(run: RunDirectory) -> None:
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
