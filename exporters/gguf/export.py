"""The two routes to a GGUF file: built-in metadata, or a template's. Both place and pack tensors the same way."""

from __future__ import annotations

from pathlib import Path

import gguf

from exporters.gguf.container.writer import PlannedTensor, check_target, write_file
from exporters.gguf.families.architecture import add_architecture, refuse_what_differs
from exporters.gguf.families.rope import factor_tensors
from exporters.gguf.families.table import canonical_config, family_of
from exporters.gguf.mmproj.export import Mmproj
from exporters.gguf.mmproj.table import way
from exporters.gguf.options import GgufOptions
from exporters.gguf.placement import Placement, builtin_placements
from exporters.gguf.provenance import add_provenance, file_type, model_name, source_name
from exporters.gguf.routes.template import export_with_template
from exporters.gguf.tensors import f32_tensor, plan_tensor, say_floats, zeros
from exporters.gguf.tokenizer.tokenizer import add_tokenizer
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory

# As `prepare_tensors` of llama.cpp's conversion/base.py has it, which also keeps all that is no ".weight".
_ALWAYS_F32 = (
    "position_embd.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "_norm.weight",
    "ssm_conv1d.weight",
    "shortconv.conv.weight",
    "altup_correct_coef.weight",
    "altup_predict_coef.weight",
)


def export(run: RunDirectory, out: Path, options: GgufOptions) -> Path:
    """Write a run as GGUF, and its model's towers; see `GgufExporter.export`."""
    path = out / "model.gguf" if out.is_dir() else out
    inputs = {"the run": run.path, "--template": options.template}
    check_target(path, inputs)  # before any long work; the names of several files are checked when they are known
    mmproj = None
    if options.mmproj is not None:
        if options.mmproj.resolve() == path.resolve():
            raise UserError(f"--mmproj and -o are the same file ({path}); give --mmproj another name")
        mmproj = Mmproj(run, options.mmproj, options.mmproj_from)
        inputs["--mmproj-from"] = mmproj.folder
        check_target(path, inputs)
    written = _export_text(run, path, options, inputs)
    if mmproj is not None:
        options.log(mmproj.about)
        mmproj.write()
    elif run.manifest.inside is not None:
        options.log(f"note: {written.name} is for text only; for images, {way(run.manifest.inside)}")
    return written


def _export_text(run: RunDirectory, path: Path, options: GgufOptions, inputs: dict[str, Path | None]) -> Path:
    if options.template is not None:
        return export_with_template(run, path, options, options.template)
    writer, tensors, placements = builtin_layout(run, options)
    say_floats(run, placements, options)
    options.log(f"writing {path}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 1e6:.1f} MB")
    return write_file(path, writer, tensors, options.split_max_bytes, inputs)


def builtin_layout(
    run: RunDirectory, options: GgufOptions
) -> tuple[gguf.GGUFWriter, list[PlannedTensor], list[Placement]]:
    """The built-in route's metadata and tensors, and where the run's parameters are in these."""
    config = canonical_config(run.config)
    family = family_of(config)
    refuse_what_differs(family, config)  # before a parameter without a place, which says less
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    placements = builtin_placements(run, config)
    tensors = [plan_tensor(run, p, options.dtype, _is_always_f32(p.gguf_name)) for p in placements]
    tensors += [f32_tensor(name, factors) for name, factors in factor_tensors(family, config).items()]
    tensors += [zeros(name, shape) for name, shape in family.unread(config).items()]
    embedding = next((p for p in placements if p.gguf_name == "token_embd.weight"), None)
    if embedding is None:
        raise UserError(f"{run.path} has no token embedding; run `quantize` again")
    n_vocab = embedding.shape[0]
    add_architecture(writer, family, config, n_vocab, options.log)
    source = source_name(run, config)
    tokens = add_tokenizer(writer, run.config_dir, n_vocab, options.log, source, family.tokenizer)
    writer.add_name(model_name(run, config, tokens))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type(run, options.dtype))
    add_provenance(writer, run)
    return writer, tensors, placements


def _is_always_f32(gguf_name: str) -> bool:
    return gguf_name.endswith(_ALWAYS_F32) or not gguf_name.endswith(".weight")
