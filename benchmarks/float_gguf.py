"""A Hugging Face model as an F32 GGUF file, by our exporter and without any quantization: input of llama-quantize."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from signround_edge.manifest import Manifest
from signround_edge.model.source import model_name
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import make_plan
from signround_edge.schemes.scheme import parse_scheme


def write_float_gguf(model: Path, out: Path) -> Path:
    """Write `out` from the model folder, by way of a run directory in which every tensor is a float."""
    weights = ModelWeights.open(model)
    plan = make_plan(weights, parse_scheme("gguf:q8_0"), float_fallback=True)
    entries = [replace(t, format=None, fallback_from=None, transposed=False) for t in plan.tensors]
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary) / "run"
        weights.source.copy_config(folder / "config")
        manifest = Manifest(
            scheme="floats",
            targets=["gguf"],
            source={"model": model_name(model), "files": weights.source.hashes()},
            settings={},
            versions={},
            parts=plan.parts,
            tied=plan.tied,
            tensors=entries,
        )
        run = RunDirectory.create(folder, manifest)
        for part in plan.parts:
            names = [t.name for t in entries if t.part == part]
            run.write_part(part, {name: weights.tensor(name) for name in names}, {})
        run = RunDirectory.open(folder)
        return GgufExporter().export(run, out, ExportOptions(dtype="f32", log=lambda line: None))
