"""A traced graph without its weights, kept in files: what is the same for all types that a model's matrices may have.

Tracing wants the whole model in f32 and takes minutes; to know how large a file will be the shapes of its tensors do.

    <folder>/graph.onnx    the graph of floats; data of 1 kB and more is left out
    <folder>/graph.json    what of it holds which parameter, and the mixtures that are one node
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir

from exporters.onnx.artifact.model_file import INLINE_BELOW
from exporters.onnx.bindings import Binding
from exporters.onnx.routes.traced_mixtures import Mixture, SwiGlu
from exporters.onnx.routes.tracing import MatchedTrace
from signround_edge.files import whole_file, write_atomically

_GRAPH, _HELD = "graph.onnx", "graph.json"
_NOWHERE = "left-out"


def keep_trace(found: MatchedTrace, folder: Path) -> None:
    """Write it; the graph loses its data."""
    for value in found.model.graph.initializers.values():
        tensor = value.const_value
        value.const_value = (
            ir.Tensor(tensor.numpy().copy(), name=value.name)
            if tensor.nbytes < INLINE_BELOW
            else ir.ExternalTensor(_NOWHERE, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name)
        )
    with whole_file(folder / _GRAPH) as partial:
        ir.save(found.model, partial)
    held = {"bindings": [one.to_json() for one in found.bindings], "mixtures": [asdict(one) for one in found.mixtures]}
    write_atomically(folder / _HELD, json.dumps(held).encode())


def kept_trace(folder: Path) -> MatchedTrace | None:
    """Read it; None where there is none, or a damaged one."""
    try:
        held = json.loads((folder / _HELD).read_text(encoding="utf-8"))
        mixtures = [Mixture(**{**one, "activation": SwiGlu(**one["activation"])}) for one in held["mixtures"]]
        bindings = [Binding.from_json(one) for one in held["bindings"]]
        return MatchedTrace(ir.load(folder / _GRAPH), mixtures, bindings)
    except (OSError, ValueError, KeyError, TypeError):
        return None
