"""What `verify` knows of ONNX artifacts: what they should hold, and their control.

At accuracy level 0 or 1 ONNX Runtime computes in f32, so the artifact itself must agree with torch to KL 1e-5. A graph
of level 4, which rounds activations to int8, has as control the same file opened with every MatMulNBits at level 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporters.onnx import OnnxExporter
from exporters.onnx.artifact.reader import changed_files, open_artifact, read_sidecar
from runtime_tests.artifacts.expectation import Expectation
from runtime_tests.interface import Runtime, Session
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory

_FLOAT_LEVELS = (0, 1)  # 0: the runtime's choice, which is f32 on CPUs; 1: f32
_NAMED = 3


def expect_onnx(run: RunDirectory, artifact: Path, _folder: Path) -> Expectation:
    """What an exported folder should hold; its control needs no file.

    Raises:
        UserError: it is damaged, or not exported by signround-edge.
        CheckFailed: it lacks a parameter of the run.
    """
    expected = {tensor.name: tensor.weights for tensor in OnnxExporter().iter_expected(run, artifact)}
    changed = changed_files(artifact)
    problem = None
    if changed:
        problem = f"{artifact}: changed after export: {', '.join(changed[:_NAMED])}; export the run again"
    opened = open_artifact(artifact)
    nodes = [node for node in opened.quantized_nodes() if node.op_type in ("MatMulNBits", "QMoE")]
    sidecar = read_sidecar(artifact)
    levels = {node.attributes["accuracy_level"].as_int() for node in nodes if "accuracy_level" in node.attributes}
    if sidecar.operators == "qdq":  # the level of what ONNX Runtime fuses, a session's option
        levels = {sidecar.accuracy_level}
    rounds_activations = any(level not in _FLOAT_LEVELS for level in levels)
    # Weights in f16 come from --dtype f16 or a template of that dtype, whose graph may compute in it.
    half = any(opened.array(b.initializers["weight"]).dtype == np.float16 for b in sidecar.bindings)

    def open_control(runtime: Runtime) -> Session:
        if not isinstance(runtime, OnnxRuntime):
            raise UserError(f"{runtime.name} cannot open {artifact} at accuracy level 0, which its control needs")
        return runtime.open(artifact, accuracy_level=0)

    def open_float_graph(runtime: Runtime) -> Session:
        return open_control(runtime) if rounds_activations else runtime.open(artifact)

    return Expectation(
        expected,
        computes_in_floats=not rounds_activations and not half,
        open_control=open_control if rounds_activations else None,
        open_float_graph=open_float_graph,
        problem=problem,
    )
