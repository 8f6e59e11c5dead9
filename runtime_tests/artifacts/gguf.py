"""What `verify` knows of GGUF artifacts: what they should hold, and their control.

The control is an F32 export of the same run. llama.cpp then computes in floats, so its logits must be torch's to
KL 1e-5: that proves names, row order, RoPE, norms and every other piece of metadata. It proves them for the artifact
because the artifact's metadata must equal the control's, key by key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants

from exporters.gguf import GgufExporter
from exporters.gguf.container.reader import GgufFile, shown
from exporters.gguf.provenance import PROVENANCE
from exporters.interface import ExportOptions
from runtime_tests.artifacts.expectation import Expectation
from runtime_tests.interface import Runtime, Session
from signround_edge.evaluation.metrics import FloatArray
from signround_edge.manifest import OUTSIDE
from signround_edge.run_directory import RunDirectory

# What may differ between an artifact and its control: the type of its weights, and which version of ours wrote it.
_FREE_KEYS = ("general.file_type", f"{PROVENANCE}.version")
# Written by the template route, so that nobody expects built-in metadata there.
TEMPLATE_KEY = f"{PROVENANCE}.template"
# ggml computes GELU from a table of f16 values: layers are off by up to 4.4e-4 (six families measured), and by 2e-6
# with activations that it computes.
_COMPUTED_ACTIVATIONS = ("silu", "swish", "relu")
_TABLE_ERROR, _TABLE_LAYERS = 2e-3, 4  # in a model of so many layers
_DIFFERENCES_SHOWN = 3
_KEY_SHOWN = 80  # characters: a damaged file may hold a key of any length


def expect_gguf(run: RunDirectory, artifact: Path, folder: Path) -> Expectation:
    """Write the control into `folder` and say what the artifact should hold.

    Raises:
        UserError: the artifact is damaged, or the control cannot be written.
        CheckFailed: the artifact lacks a parameter of the run.
    """
    file = GgufFile.open(artifact)
    expected = {tensor.name: tensor.weights for tensor in GgufExporter().iter_expected(run, artifact)}
    path = folder / "control.gguf"
    # A template's metadata can only be had from the artifact itself. Wrong values in it then show as a divergence of
    # the control, where those of the built-in route already show as a difference from it.
    from_template = TEMPLATE_KEY in file.metadata
    options = ExportOptions(dtype="f32", template=artifact if from_template else None, log=_silent)
    control = GgufFile.open(GgufExporter().export(run, path, options))
    notes: list[str] = []
    if from_template:
        extra = [name for name in control.tensors if name not in expected]
        notes += [f"{len(extra)} tensors are the template's, not the run's: {', '.join(extra[:4])}"] if extra else []
    problem = None if from_template else _metadata_problem(file, control)
    expected |= {name: _raw(control, name) for name in control.tensors if name not in expected}
    floats = all(t.ggml_type.name == "F32" for t in file.tensors.values())

    def open_float_graph(runtime: Runtime) -> Session:
        if floats or from_template:
            return runtime.open(artifact if floats else path)
        twin = folder / "float-graph.gguf"
        if not twin.exists():
            GgufExporter().export(run, twin, ExportOptions(dtype="f32", template=artifact, log=_silent))
        return runtime.open(twin)

    open_control = None if floats else lambda runtime: runtime.open(path)
    return Expectation(
        expected,
        computes_in_floats=floats,
        open_control=open_control,
        open_float_graph=open_float_graph,
        control_file=None if floats else path,
        layer_error=0.0 if _activation(run) in _COMPUTED_ACTIVATIONS else _table_error(run),
        computes=GgufExporter().computed_config(run.config),
        problem=problem,
        notes=notes,
    )


def _activation(run: RunDirectory) -> str | None:
    """The activation function by config.json; None where it is a constant of the architecture (BLOOM: GELU)."""
    found = run.config.get("hidden_act")
    return found if isinstance(found, str) else None


def _table_error(run: RunDirectory) -> float:
    """What the table may make of hidden states: errors that have nothing to do with one another add up in squares."""
    layers = len({tensor.part for tensor in run.manifest.tensors} - {OUTSIDE})
    return _TABLE_ERROR * math.sqrt(max(1, layers / _TABLE_LAYERS))


def _raw(file: GgufFile, name: str) -> Callable[[], FloatArray]:
    """A tensor of a file that stems from no parameter of the run (rope_freqs, zeros that llama.cpp demands)."""

    def weights() -> FloatArray:
        info = file.tensors[name]
        kind = GGMLQuantizationType(info.ggml_type.number)
        data: FloatArray = quants.dequantize(np.array(file.raw(name)), kind).reshape(-1, info.shape[-1])
        return data

    return weights


def _metadata_problem(artifact: GgufFile, control: GgufFile) -> str | None:
    keys = [k for k in dict.fromkeys([*control.metadata, *artifact.metadata]) if k not in _FREE_KEYS]
    wrong = [f"{key[:_KEY_SHOWN]} {what}" for key in keys if (what := _difference(artifact, control, key)) is not None]
    if not wrong:
        return None
    more = f" and {len(wrong) - _DIFFERENCES_SHOWN} more" if len(wrong) > _DIFFERENCES_SHOWN else ""
    return f"metadata is not what this run exports: {'; '.join(wrong[:_DIFFERENCES_SHOWN])}{more}"


def _difference(artifact: GgufFile, control: GgufFile, key: str) -> str | None:
    found, should = artifact.metadata.get(key), control.metadata.get(key)
    if found == should:
        return None
    if found is None:
        return "is missing"
    if should is None:
        return "should not be there"
    if isinstance(found.value, list) and isinstance(should.value, list) and len(found.value) == len(should.value):
        pairs = zip(found.value, should.value, strict=True)
        index = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if index is not None:
            return f"[{index}] is {shown(found.value[index])}, not {shown(should.value[index])}"
    return f"is {shown(found.value)}, not {shown(should.value)}"


def _silent(_line: str) -> None:
    """The control's progress is not the user's concern."""
