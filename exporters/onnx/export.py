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
from exporters.onnx.artifact.comparison import HALF_LIMIT, LIMIT, MOST_BYTES, divergence
from exporters.onnx.artifact.model_file import write_model
from exporters.onnx.artifact.ort_format import write_ort_format
from exporters.onnx.artifact.sidecar import SIDECAR, Sidecar, hash_files
from exporters.onnx.builder_classes import builder_class, check_experts
from exporters.onnx.options import OnnxOptions
from exporters.onnx.passes.provenance import provenance, set_provenance
from exporters.onnx.routes.builder import CannotBuild
from exporters.onnx.routes.built import build
from exporters.onnx.routes.chat_templates import lay_out_chat_templates
from exporters.onnx.routes.graph import MODEL_FILE, FinishedGraph
from exporters.onnx.routes.template import from_template
from exporters.onnx.routes.tracing import trace
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError, first_line
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
        companions = partial / "companions"
        graph = _write_graph(weights, partial, companions, options)
        facts = provenance(weights, graph.made_by)
        zero_biases = check_complete(graph.bindings, weights)
        if options.ort_format:
            options.log("onnx: writing model.ort")
            write_ort_format(partial / MODEL_FILE)
        for file in sorted(companions.iterdir()):
            shutil.move(file, partial / file.name)
        companions.rmdir()
        sidecar = Sidecar(
            facts,
            options.dtype,
            options.accuracy_level,
            graph.bindings,
            zero_biases,
            kv_cache=graph.kv_cache,
            scale_dtype=options.scale_dtype,
        )
        (partial / CARD).write_bytes(render_card(partial, sidecar, NOT_MEASURED).encode())
        (partial / SIDECAR).write_bytes(replace(sidecar, files=hash_files(partial)).to_bytes())
    options.log(f"onnx: {len(graph.bindings)} tensors equal the run directory; wrote {out}")
    return out


def _write_graph(weights: RunWeights, partial: Path, companions: Path, options: OnnxOptions) -> FinishedGraph:
    """Write model.onnx by the route that fits; other files of the folder (tokenizer, config) go to `companions`."""
    row = builder_class(weights.run.config)
    if options.template is None and row is not None:
        try:
            companions.mkdir()
            graph = build(weights, row, partial / "scratch", companions, options)
            _write(graph, weights, partial, companions, options)
            _compare(weights.run, partial / MODEL_FILE, options)
            return graph
        except CannotBuild as error:
            reason = f"onnxruntime-genai's model builder does not make the graph of this model ({error})"
        finally:
            shutil.rmtree(partial / "scratch", ignore_errors=True)
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif options.template is None:
        reason = "onnxruntime-genai's model builder does not know this architecture"
    companions.mkdir()
    if options.template is not None:
        graph = from_template(weights, options.template, companions, options)
    else:
        options.log(f"onnx: {reason}; tracing it with torch.onnx.export")
        graph = trace(weights, companions, options)
    _write(graph, weights, partial, companions, options)
    return graph


def _write(graph: FinishedGraph, weights: RunWeights, partial: Path, companions: Path, options: OnnxOptions) -> None:
    """Write model.onnx and its data, and check what is in them."""
    lay_out_chat_templates(companions, weights.run.config_dir, options.log)
    set_provenance(graph.model, provenance(weights, graph.made_by))
    options.log("onnx: writing model.onnx and model.onnx.data")
    write_model(graph.model, partial / MODEL_FILE, options.split_max_bytes)
    # On what is really in the files: this is what a device will load.
    check_bindings(ir.load(partial / MODEL_FILE).graph, graph.bindings, weights)


def _compare(run: RunDirectory, model: Path, options: OnnxOptions) -> None:
    """Raises CannotBuild unless the builder's graph computes what transformers computes."""
    size = sum(file.stat().st_size for file in model.parent.glob(f"{MODEL_FILE}*"))
    if size > MOST_BYTES:
        options.log(
            f"onnx: the graph was not compared with transformers: the model has {size / 1e9:.1f} GB, and that holds it "
            "twice in memory; `verify` does it"
        )
        return
    try:
        found = divergence(run, model)
    except Exception as error:  # onnxruntime's error classes share no base but Exception
        raise CannotBuild(f"ONNX Runtime cannot run it: {first_line(error)[:300]}") from error
    if not found.worst <= (HALF_LIMIT if options.dtype == "f16" else LIMIT):
        raise CannotBuild(
            f"its logits differ from those of transformers: KL divergence {found.texts:.0e} on texts, "
            f"{found.steps:.0e} on single tokens after them"
        )
    options.log(f"onnx: the graph's logits are those of transformers (KL divergence {found.worst:.0e})")


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
    if options.template is None:
        check_experts(config, run.names(), source)
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
