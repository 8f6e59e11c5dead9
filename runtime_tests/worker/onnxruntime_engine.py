"""ONNX Runtime inside this process: a decoder with or without KV cache, one thread. Only the worker uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_tests.worker.onnx_session import cpu_session
from runtime_tests.worker.ort_level import with_accuracy_level
from signround_edge.errors import UserError, first_line
from signround_edge.evaluation.metrics import FloatArray, TokenArray

_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
_DTYPES |= {"tensor(float16)": np.float16}
_MODEL = "model.onnx"
_SKIP_NORMALIZATIONS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
_SUM_OUTPUT = 3  # input + skip: the residual stream
_OUTPUTS_AT_ONCE = 200  # bounds memory; each group is a run of the whole graph
_NAMED_INPUTS = ("input_ids", "attention_mask", "position_ids")


class OnnxEngine:
    """A decoder run by ONNX Runtime on the CPU with one thread: input_ids, and what else the graph asks for, → logits.

    Args:
        artifact: the .onnx file, or the folder that holds it.
        accuracy_level: run every MatMulNBits at this level instead of the file's own.
    Raises:
        UserError: ONNX Runtime refuses the file, or the graph is not such a decoder.
    """

    def __init__(self, artifact: Path, accuracy_level: int | None = None) -> None:
        self._artifact = artifact
        self._level = accuracy_level
        model = model_file(artifact)
        self._decoder = decoder_config(model.parent)
        if accuracy_level is not None and model.suffix == ".ort":
            self._session = _ort_session_at(model, accuracy_level)
        else:
            edited = None if accuracy_level is None else partial(_set_accuracy_level, level=accuracy_level)
            self._session = _session(model, edited)
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        outputs = [o.name for o in self._session.get_outputs()]
        unknown = [n for n in self._inputs if n not in _NAMED_INPUTS and not n.startswith("past")]
        if "input_ids" not in self._inputs or "logits" not in outputs or unknown:
            raise UserError(
                f"{model} is not a decoder that verify can feed: inputs {list(self._inputs)[:4]}…, "
                f"outputs {outputs[:2]}…; export it again"
            )

    def facts(self) -> dict[str, Any]:
        """What a client may want to know about the file."""
        shape = next(o.shape for o in self._session.get_outputs() if o.name == "logits")
        return {
            "vocab_size": shape[-1] if isinstance(shape[-1], int) else None,
            "shows_hidden_states": model_file(self._artifact).suffix != ".ort",  # whose graph cannot be edited
        }

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of int32 [n], from an empty cache."""
        feeds = {name: self._feed(name, tokens) for name in self._inputs}
        try:
            (logits,) = self._session.run(["logits"], feeds)
        except Exception as error:
            raise UserError(f"ONNX Runtime could not run {self._artifact}: {first_line(error)}") from error
        if logits.ndim != 3 or logits.shape[:2] != (1, len(tokens)):
            raise UserError(
                f"{self._artifact} gives logits of shape {list(logits.shape)} for {len(tokens)} tokens; verify needs "
                "them at every position (build without prune_lm_head)"
            )
        result: FloatArray = logits[0].astype(np.float32)
        return result

    def hidden_states(self, tokens: TokenArray, width: int) -> dict[str, FloatArray]:
        """Every float tensor [n, width] that the graph computes for int32 [n], by the graph's own name.

        In a second session, whose graph gives every tensor out. That keeps ONNX Runtime from fusing nodes, and thus
        shows the graph as it is written.
        """
        names: list[str] = []

        def edited(graph: Any) -> None:
            if self._level is not None:
                _set_accuracy_level(graph, self._level)
            names.extend(_give_out_everything(graph))

        session = _session(model_file(self._artifact), edited)
        feeds = {name: self._feed(name, tokens) for name in self._inputs}
        found: dict[str, FloatArray] = {}
        for start in range(0, len(names), _OUTPUTS_AT_ONCE):
            group = names[start : start + _OUTPUTS_AT_ONCE]
            try:
                arrays = session.run(group, feeds)
            except Exception as error:
                raise UserError(f"ONNX Runtime could not run {self._artifact}: {first_line(error)}") from error
            for name, array in zip(group, arrays, strict=True):
                if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.shape == (1, len(tokens), width):
                    found[name] = array[0].astype(np.float32)
        return found

    def _feed(self, name: str, tokens: TokenArray) -> NDArray[Any]:
        dtype = _DTYPES.get(self._inputs[name].type)
        if dtype is None:
            raise UserError(
                f"{self._artifact}: input {name} has type {self._inputs[name].type}, which verify cannot feed"
            )
        if name == "input_ids":
            return tokens.astype(dtype).reshape(1, -1)
        if name == "attention_mask":
            return np.ones((1, len(tokens)), dtype=dtype)
        if name == "position_ids":
            axes = len(self._inputs[name].shape)  # three numbers a token in models that also read images
            return np.broadcast_to(np.arange(len(tokens), dtype=dtype), (3,) * (axes - 2) + (1, len(tokens))).copy()
        return np.zeros(self._empty_state(name), dtype=dtype)

    def _empty_state(self, name: str) -> tuple[int, ...]:
        """[batch, heads, past length, values a head]; what the graph leaves open stands in genai_config.json.

        The state of a convolution or of linear attention leaves only the batch open.
        """
        shape = self._inputs[name].shape
        if len(shape) > 1 and all(isinstance(size, int) for size in shape[1:]):
            return 1, *shape[1:]
        if len(shape) == 4:
            heads = shape[1] if isinstance(shape[1], int) else self._decoder.get("num_key_value_heads")
            size = shape[3] if isinstance(shape[3], int) else self._decoder.get("head_size")
            if isinstance(heads, int) and isinstance(size, int):
                return 1, heads, 0, size
        raise UserError(f"{self._artifact}: input {name} has the shape {shape}, which is no key-value cache")


def model_file(artifact: Path) -> Path:
    """The decoder's file of an artifact: the .onnx or .ort file itself, or in a folder what genai_config.json names.

    Without genai_config.json (a graph that onnxruntime-genai cannot run) it is model.onnx.

    Raises:
        UserError: there is none.
    """
    if artifact.is_file() and artifact.suffix in (".onnx", ".ort"):
        return artifact
    decoder = decoder_config(artifact)
    file = artifact / Path(str(decoder.get("filename", _MODEL))).name  # a name, never a path out of the folder
    if not file.is_file():
        raise UserError(f"{artifact} is neither an .onnx file nor a folder with {file.name}; export it again")
    return file


def decoder_config(folder: Path) -> dict[str, Any]:
    """`model.decoder` of genai_config.json; empty when there is no such file. UserError when it is not readable."""
    config = folder / "genai_config.json"
    if not config.is_file():
        return {}
    try:
        return dict(json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} is not a readable genai_config.json ({error!r}); export it again") from error


def _session(model: Path, edit: Callable[[Any], None] | None = None) -> Any:
    """A session with one thread; `edit` changes the graph first, while its external data stays where it is."""
    if edit is None:
        return _inference_session(model)
    import onnx

    try:
        proto = onnx.load(model, load_external_data=False)
    except Exception as error:  # protobuf's error classes share no base but Exception
        raise UserError(f"ONNX Runtime refuses {model}: {first_line(error)}") from error
    edit(proto.graph)
    return _inference_session(model, proto.SerializeToString())


def _ort_session_at(model: Path, level: int) -> Any:
    """A session on an .ort file with another accuracy_level on every MatMulNBits."""
    return _inference_session(model, with_accuracy_level(model, level))


def _inference_session(model: Path, edited: bytes | None = None) -> Any:
    try:
        return cpu_session(model) if edited is None else cpu_session(edited, model.parent)
    except Exception as error:  # its error classes share no base but Exception
        raise UserError(f"ONNX Runtime refuses {model}: {first_line(error)}") from error


def _set_accuracy_level(graph: Any, level: int) -> None:
    """Another accuracy_level on every MatMulNBits."""
    import onnx

    for node in graph.node:
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])


def _give_out_everything(graph: Any) -> list[str]:
    """Make every node's outputs outputs of the graph, also the sums that normalizations could give out; their names."""
    import onnx

    known = {output.name for output in graph.output}
    names = []
    for node in graph.node:
        if node.op_type in _SKIP_NORMALIZATIONS:
            outputs = [*node.output, "", "", ""][:4]
            outputs[_SUM_OUTPUT] = outputs[_SUM_OUTPUT] or f"{node.name}/sum"
            del node.output[:]
            node.output.extend(outputs)
        names += [name for name in node.output if name and name not in known]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return names


ENGINE = OnnxEngine
