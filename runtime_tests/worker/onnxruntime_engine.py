"""ONNX Runtime inside this process: a decoder with or without KV cache, one thread. Only the worker uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_tests.worker.cached_steps import cached_parts
from runtime_tests.worker.onnx_feeds import NAMED_INPUTS, feed_of
from runtime_tests.worker.onnx_session import FUSED_LEVEL, cpu_session
from runtime_tests.worker.ort_level import with_accuracy_level
from signround_edge.errors import UserError, first_line
from signround_edge.evaluation.metrics import FloatArray, TokenArray

_MODEL, _GENAI_CONFIG = "model.onnx", "genai_config.json"
_TRANSFORMERS_JS = "onnx"  # the folder of the model in its layout
_SKIP_NORMALIZATIONS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
_ROUNDS_INPUTS = 4  # the accuracy level with activations in int8
_SUM_OUTPUT = 3  # input + skip: the residual stream
_OUTPUTS_AT_ONCE = 200  # bounds memory; each group is a run of the whole graph


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
        self._decoder = decoder_config(exported_folder(model))
        self._fused_level = fused_level(self._decoder) if accuracy_level is None else accuracy_level
        if accuracy_level is not None and model.suffix == ".ort":
            self._session = _ort_session_at(model, accuracy_level)
        else:
            edited = None if accuracy_level is None else partial(_set_accuracy_level, level=accuracy_level)
            self._session = _session(model, edited, self._fused_level)
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        outputs = [o.name for o in self._session.get_outputs()]
        unknown = [n for n in self._inputs if n not in NAMED_INPUTS and not n.startswith("past")]
        if "input_ids" not in self._inputs or "logits" not in outputs or unknown:
            raise UserError(
                f"{model} is not a decoder that verify can feed: inputs {list(self._inputs)[:4]}…, "
                f"outputs {outputs[:2]}…; export it again"
            )
        self._states = _states([n for n in self._inputs if n.startswith("past")], outputs)

    def facts(self) -> dict[str, Any]:
        """What a client may want to know about the file."""
        shape = next(o.shape for o in self._session.get_outputs() if o.name == "logits")
        return {
            "vocab_size": shape[-1] if isinstance(shape[-1], int) else None,
            "shows_hidden_states": model_file(self._artifact).suffix != ".ort",  # whose graph cannot be edited
        }

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of int32 [n], from an empty cache.

        Where the graph keeps states, the last tokens are fed one by one.
        """
        states = {name: self._feed(name, tokens) for name in self._inputs if name.startswith("past")}
        parts = []
        for part in cached_parts(len(tokens)) if self._states else [slice(0, len(tokens))]:
            logits, states = self._step(tokens[part], part.start, states)
            parts.append(logits)
        return np.concatenate(parts)

    def _step(
        self, tokens: TokenArray, past: int, states: dict[str, NDArray[Any]]
    ) -> tuple[FloatArray, dict[str, NDArray[Any]]]:
        """f32 [n, vocab] of int32 [n] after `past` other tokens, and the states after them (none if none is kept)."""
        feeds = {name: self._feed(name, tokens, past) for name in self._inputs if name not in states}
        try:
            logits, *present = self._session.run(["logits", *self._states.values()], feeds | states)
        except Exception as error:
            raise UserError(f"ONNX Runtime could not run {self._artifact}: {first_line(error)}") from error
        if logits.ndim != 3 or logits.shape[:2] != (1, len(tokens)):
            raise UserError(
                f"{self._artifact} gives logits of shape {list(logits.shape)} for {len(tokens)} tokens; verify needs "
                "them at every position (build without prune_lm_head)"
            )
        return logits[0].astype(np.float32), dict(zip(self._states, present, strict=True))

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

        session = _session(model_file(self._artifact), edited, self._fused_level)
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

    def _feed(self, name: str, tokens: TokenArray, past: int = 0) -> NDArray[Any]:
        source = self._inputs[name]
        return feed_of(self._artifact, name, source.type, source.shape, tokens, self._decoder, past)


def _states(inputs: list[str], outputs: list[str]) -> dict[str, str]:
    """Input → output of everything that the graph keeps between calls; empty where it does not give all of it out."""
    found = {name: f"present.{name.partition('.')[2]}" for name in inputs}
    return found if set(found.values()) <= set(outputs) else {}


def model_file(artifact: Path) -> Path:
    """The decoder's file of an artifact: the .onnx or .ort file itself, or in a folder what genai_config.json names.

    Without genai_config.json (a graph that onnxruntime-genai cannot run) it is model.onnx, or the only one in `onnx`.

    Raises:
        UserError: there is none.
    """
    if artifact.is_file() and artifact.suffix in (".onnx", ".ort"):
        return artifact
    named = Path(str(decoder_config(artifact).get("filename", _MODEL)))
    # A name here or in transformers.js's folder, never a path out of the folder; on devices all files lie together.
    file = artifact / named.name
    inside = sorted((artifact / _TRANSFORMERS_JS).glob(named.name if named.parent.name else "*.onnx"))
    # Or transformers.js's folder itself.
    found = inside or sorted(artifact.glob("*.onnx"))
    if not file.is_file() and len(found) == 1:
        file = found[0]
    if not file.is_file():
        raise UserError(f"{artifact} is neither an .onnx file nor a folder with {file.name}; export it again")
    return file


def exported_folder(model: Path) -> Path:
    """The folder in which genai_config.json lies, if there is one, of an .onnx or .ort file."""
    beside = model.parent
    return beside.parent if beside.name == _TRANSFORMERS_JS and not (beside / _GENAI_CONFIG).is_file() else beside


def decoder_config(folder: Path) -> dict[str, Any]:
    """`model.decoder` of genai_config.json; empty when there is no such file. UserError when it is not readable."""
    config = folder / _GENAI_CONFIG
    if not config.is_file():
        return {}
    try:
        return dict(json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} is not a readable genai_config.json ({error!r}); export it again") from error


def fused_level(decoder: dict[str, Any]) -> int:
    """At which level onnxruntime-genai runs what ONNX Runtime fuses; 0 where genai_config.json does not say."""
    return int(decoder.get("session_options", {}).get(FUSED_LEVEL, "0"))


def _session(model: Path, edit: Callable[[Any], None] | None = None, fused: int = 0) -> Any:
    """A session with one thread; `edit` changes the graph first, while its external data stays where it is."""
    if edit is None:
        return _inference_session(model, None, fused)
    import onnx

    try:
        proto = onnx.load(model, load_external_data=False)
    except Exception as error:  # protobuf's error classes share no base but Exception
        raise UserError(f"ONNX Runtime refuses {model}: {first_line(error)}") from error
    edit(proto.graph)
    return _inference_session(model, proto.SerializeToString(), fused)


def _ort_session_at(model: Path, level: int) -> Any:
    """A session on an .ort file with another accuracy_level on every MatMulNBits."""
    return _inference_session(model, with_accuracy_level(model, level))


def _inference_session(model: Path, edited: bytes | None = None, fused: int = 0) -> Any:
    try:
        return cpu_session(model, None, fused) if edited is None else cpu_session(edited, model.parent, fused)
    except Exception as error:  # its error classes share no base but Exception
        raise UserError(f"ONNX Runtime refuses {model}: {first_line(error)}") from error


def _set_accuracy_level(graph: Any, level: int) -> None:
    """Another accuracy_level on every MatMulNBits and QMoE.

    QMoE has the attribute for 4 only: ONNX Runtime before 1.31 does not know it there.
    """
    import onnx

    for node in graph.node:
        if node.op_type in ("MatMulNBits", "QMoE"):
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)
            if node.op_type == "MatMulNBits" or level == _ROUNDS_INPUTS:
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", level))


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
