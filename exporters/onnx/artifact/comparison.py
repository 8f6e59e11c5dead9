"""Whether an exported graph computes what transformers computes: its logits, of texts and of single tokens after them.

The builder writes each architecture's graph by hand: a RoPE type, a window or a multiplier that it does not know shows
here and nowhere before. The graph runs in ONNX Runtime in f32 (accuracy level 1), the model in transformers with the
run's dequantized tensors.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from exporters.onnx.fused_level import FUSED_LEVEL
from exporters.onnx.passes.accuracy_level import set_accuracy_level
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.run_directory import RunDirectory

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

# Larger models are not held twice in memory without being asked to (as for the card's figures).
MOST_BYTES = 1_000_000_000
# Mean KL divergence. Seen where the graph is right, over all classes of the builder: up to 2e-10; where it is wrong:
# from 2e-7 (the yarn of Ministral 3).
LIMIT = 1e-7
# The same with weights that were rounded to f16.
HALF_LIMIT = 1e-4
# The same with activations in f16, on random models: see docs/LOG.md.
HALF_ACTIVATIONS_LIMIT = 1e-2

_TEXTS, _LENGTH, _STEPS = 2, 24, 4
_LONGEST_WINDOW = 64  # windows of attention up to this length are left behind by the texts


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence of a graph's logits from transformers': of whole texts, and of single tokens after them."""

    texts: float
    steps: float

    @property
    def worst(self) -> float:
        """NaN where one of them is."""
        return float(np.maximum(self.texts, self.steps))


def divergence(run: RunDirectory, model: Path, steps: int = _STEPS, seed: int = 0) -> Divergence:
    """Compare the graph `model` with transformers' model of a run.

    Args:
        steps: how many single tokens follow the texts; 0 for a graph without a cache.
        seed: of the texts.
    Raises:
        Exception: whatever ONNX Runtime raises on a graph that it cannot run.
    """
    reference: Any = load_run_model(run)
    config = reference.config.get_text_config()
    windows = [w for w in (getattr(config, "sliding_window", None),) if w and w <= _LONGEST_WINDOW]
    length = max([_LENGTH, *(w + 8 for w in windows)])
    vocabulary = int(config.vocab_size)
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (_TEXTS, length + steps)).astype(np.int64)
    with torch.no_grad():
        expected = reference(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float()
    del reference
    with _at_level_1(model) as comparable:
        found = CachedGraph(comparable)
    texts = _kl(expected[:, :length], found.append(tokens[:, :length]))
    if not steps:
        return Divergence(texts, texts)
    stepwise = [found.append(tokens[:, i : i + 1]) for i in range(length, length + steps)]
    return Divergence(texts, _kl(expected[:, length:], np.concatenate(stepwise, axis=1)))


@contextlib.contextmanager
def _at_level_1(model: Path) -> Iterator[Path]:
    """The graph with every MatMulNBits in f32, as a file beside it that shares its data."""
    copy = model.with_name("comparison.onnx")
    graph = ir.load(model)
    set_accuracy_level(graph.graph, 1)
    try:
        ir.save(graph, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


class CachedGraph:
    """A graph in ONNX Runtime with the state that it gave last."""

    def __init__(self, model: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(FUSED_LEVEL, "1")
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.state: dict[str, FloatArray] = {}
        self.length = 0

    def append(self, tokens: IntArray) -> FloatArray:
        """f32 [batch, n, vocab] of int64 [batch, n] more tokens."""
        batch, count = tokens.shape
        positions = np.broadcast_to(np.arange(self.length, self.length + count), (batch, count))
        self.length += count
        feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones((batch, self.length), np.int64)}
        if "position_ids" in self.inputs:
            axes = len(self.inputs["position_ids"].shape)  # three numbers a token in models that also read images
            feeds["position_ids"] = np.ascontiguousarray(np.broadcast_to(positions, (3,) * (axes - 2) + (batch, count)))
        feeds |= {
            name: self.state.get(name, self._empty(name, batch)) for name in self.inputs if name.startswith("past")
        }
        results = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        for name in self.inputs:
            if name.startswith("past"):
                self.state[name] = results[re.sub(r"^past(_key_values)?", "present", name)]
        logits: FloatArray = results["logits"].astype(np.float32)
        return logits

    def _empty(self, name: str, batch: int) -> FloatArray:
        """The state before any token: no keys and values, or zeros."""
        _, *sizes = self.inputs[name].shape
        shape = (batch, *(size if isinstance(size, int) else 0 for size in sizes))  # what is open is the length
        dtype = np.float16 if self.inputs[name].type == "tensor(float16)" else np.float32
        return np.zeros(shape, dtype=dtype)


def _kl(expected: torch.Tensor, found: FloatArray) -> float:
    p, q = (torch.log_softmax(x.double(), -1) for x in (expected, torch.from_numpy(found)))
    return float((p.exp() * (p - q)).sum(-1).mean())
