"""The graph of any architecture, by torch.onnx.export of the model with the run's dequantized weights.

For what onnxruntime-genai's model builder does not know. The graph takes whole texts: it has no key-value cache, so
plain ONNX Runtime runs it and onnxruntime-genai does not. All weights are in memory in f32 while it is made.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.onnx.artifact.check import check_complete
from exporters.onnx.options import OnnxOptions
from exporters.onnx.routes.graph import FinishedGraph, copy_config_files, replace_weights
from exporters.onnx.routes.matching import match_weights
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.run_directory import RunDirectory

OPSET = 20
# Shape arithmetic is folded; parameters, even small ones, keep their values (Gemma's 1 + norm weight would vanish).
_FOLD_AT_MOST = 16
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


class _LogitsOnly(nn.Module):
    """The causal language model as a function of two tensors."""

    # torch writes it into the metadata of every node: a file does not depend on where this code lies.
    __module__ = "exporters.onnx.tracing"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """f32 [batch, tokens, vocab] of int64 [batch, tokens]."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def trace(weights: RunWeights, companions: Path, options: OnnxOptions) -> FinishedGraph:
    """Run directory → torch model → torch.onnx.export → our integers in the place of its floats.

    Args:
        weights: the run.
        companions: where the run's config and tokenizer files go.
        options: of the export.
    Raises:
        UserError: torch cannot trace this architecture, or a quantized matrix has no quantized form in the graph.
        CheckFailed: the graph lacks a parameter of the run.
    """
    options.log("onnx: the graph has no KV cache: it runs in plain ONNX Runtime, not in onnxruntime-genai")
    model = trace_graph(weights.run)
    options.log("onnx: matching the graph's weights with the run directory")
    matched = match_weights(model.graph, weights, limit=0.0).bindings
    check_complete(matched, weights)
    copy_config_files(weights.run, companions)
    bindings = replace_weights(model, matched, weights, options)
    return FinishedGraph(model, bindings, f"torch.onnx.export (torch {torch.__version__})", False)


def trace_graph(run: RunDirectory) -> ir.Model:
    """The f32 graph (opset 20): input_ids and attention_mask int64 [batch, tokens] → logits [batch, tokens, vocab].

    Raises:
        UserError: torch cannot trace this architecture.
    """
    model: Any = load_run_model(run)
    model.set_attn_implementation("eager")
    tokens = torch.zeros((2, 8), dtype=torch.int64)
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2)
    shape = {0: batch, 1: length}
    try:
        with _quiet():
            program = torch.onnx.export(
                _LogitsOnly(model).eval(),
                (tokens, torch.ones_like(tokens)),
                dynamo=True,
                dynamic_shapes=(shape, shape),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            _optimize(program.model, {f"model.{name}" for name, _ in model.named_parameters()})
    except Exception as error:  # torch and onnxscript raise whatever their parts raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"--format onnx: torch.onnx.export cannot trace {type(model).__name__} ({reason}); give a graph of your "
            "own with --template model.onnx, or export with --format gguf"
        ) from error
    return program.model


def _optimize(model: ir.Model, parameters: set[str]) -> None:
    from onnxscript import optimizer

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in parameters for v in node.inputs) else None

    optimizer.optimize_ir(model, input_size_limit=_FOLD_AT_MOST, should_fold=should_fold)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.pop(_STACK_TRACE, None)  # paths of this machine


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch and onnxscript print and log while tracing."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
