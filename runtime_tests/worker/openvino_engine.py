"""OpenVINO inside this process: a decoder with or without KV cache, on the CPU, one thread. Only the worker uses it.

It computes in f32: without the hint it takes bf16 where the CPU has it, and it rounds the inputs of compressed weights
to int8 in groups unless told not to (OpenVINO, Inference Devices: CPU device, dynamic quantization).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_tests.worker.onnx_dequantize import IDENTITY_ROWS, MULTIPLIERS, NodeModel
from runtime_tests.worker.onnx_feeds import feed_of
from runtime_tests.worker.onnxruntime_engine import decoder_config, exported_folder, model_file
from signround_edge.errors import UserError, first_line
from signround_edge.evaluation.metrics import FloatArray, TokenArray

_FLOATS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "KV_CACHE_PRECISION": "f32",
}
_TYPES = {"i64": "int64", "i32": "int32", "f32": "float", "f16": "float16"}


class OpenVinoEngine:
    """A decoder run by OpenVINO's CPU plugin: input_ids, and what else the graph asks for, → logits.

    Args:
        artifact: the .onnx file, or the folder that holds it.
    Raises:
        UserError: OpenVINO refuses the file, or the graph is not such a decoder.
    """

    def __init__(self, artifact: Path) -> None:
        self._artifact = artifact
        model = model_file(artifact)
        self._decoder = decoder_config(exported_folder(model))
        self._compiled = compile_in_floats(str(model), f"OpenVINO refuses {model}")
        self._inputs = {i.get_any_name(): i for i in self._compiled.inputs}
        self._logits = next((o for o in self._compiled.outputs if "logits" in o.get_names()), None)
        if "input_ids" not in self._inputs or self._logits is None:
            raise UserError(f"{model} is not a decoder that verify can feed: inputs {list(self._inputs)[:4]}…")

    def facts(self) -> dict[str, Any]:
        """What a client may want to know about the file."""
        assert self._logits is not None
        width = self._logits.get_partial_shape()[-1]
        return {"vocab_size": width.get_length() if width.is_static else None}

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of int32 [n], from an empty cache."""
        feeds = {name: self._feed(name, tokens) for name in self._inputs}
        try:
            logits = self._compiled(feeds)[self._logits]
        except Exception as error:  # its errors are RuntimeErrors of many texts
            raise UserError(f"OpenVINO could not run {self._artifact}: {first_line(error)}") from error
        if logits.ndim != 3 or logits.shape[:2] != (1, len(tokens)):
            raise UserError(f"{self._artifact} gives logits of shape {list(logits.shape)} for {len(tokens)} tokens")
        result: FloatArray = logits[0].astype(np.float32)
        return result

    def _feed(self, name: str, tokens: TokenArray) -> NDArray[Any]:
        return feed_of(self._artifact, name, *input_form(self._inputs[name]), tokens, self._decoder)


def run_node_model(node: NodeModel) -> FloatArray:
    """f32 [rows, cols] of one quantized node's weights through OpenVINO: its reading of the operator, its kernels."""
    compiled = compile_in_floats(node.model, f"OpenVINO refuses {node.op}")
    if node.op not in MULTIPLIERS:
        rows: FloatArray = compiled([np.arange(node.rows, dtype=np.int64)])[0]
        return rows.reshape(node.rows, node.cols)
    weights = np.empty((node.rows, node.cols), dtype=np.float32)
    for start in range(0, node.cols, IDENTITY_ROWS):
        stop = min(start + IDENTITY_ROWS, node.cols)
        weights[:, start:stop] = compiled([np.eye(stop - start, node.cols, k=start, dtype=node.dtype)])[0].T
    return weights


def input_form(source: Any) -> tuple[str, list[Any]]:
    """Type and shape of a compiled model's input as ONNX Runtime says them ("tensor(float)"), open sizes as text."""
    found = source.get_element_type().get_type_name()
    shape = [d.get_length() if d.is_static else str(d) for d in source.get_partial_shape()]
    return f"tensor({_TYPES.get(found, found)})", shape


def compile_in_floats(model: str | bytes, refusal: str) -> Any:
    """A compiled model that computes in f32 on one thread; UserError, beginning with `refusal`, where it cannot be."""
    import openvino

    core = openvino.Core()
    try:
        return core.compile_model(core.read_model(model), "CPU", _FLOATS)
    except Exception as error:
        raise UserError(f"{refusal}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The last line that says something: the first ones are places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


ENGINE = OpenVinoEngine
