"""The graph of any architecture, by torch.onnx.export of the model with the run's dequantized weights.

For what onnxruntime-genai's model builder does not know. The graph takes tokens and the states that the call before it
left (`traced_cache`), or whole texts with `--no-cache`. All weights are in memory in f32 while it is made.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.onnx.artifact.check import check_complete
from exporters.onnx.bindings import Binding
from exporters.onnx.options import OnnxOptions
from exporters.onnx.routes.genai_config import write_genai_config
from exporters.onnx.routes.graph import FinishedGraph, copy_config_files, replace_weights
from exporters.onnx.routes.matching import match_weights
from exporters.onnx.routes.traced_cache import State, WithStates, check_states, find_states, states_of
from exporters.onnx.routes.traced_expert_weights import set_expert_weights
from exporters.onnx.routes.traced_experts import take_experts_apart
from exporters.onnx.routes.traced_functions import functions_with_onnx_forms
from exporters.onnx.routes.traced_mixtures import Mixture, mixtures_as_nodes
from exporters.onnx.routes.traced_recurrence import recurrences_as_nodes
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_run_model

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


def trace(weights: RunWeights, companions: Path, options: OnnxOptions, no_qmoe: str) -> FinishedGraph:
    """Run directory → torch model → torch.onnx.export → our integers in the place of its floats.

    Args:
        weights: the run.
        companions: where the run's config and tokenizer files go.
        options: of the export.
        no_qmoe: why no layer of experts is to become a QMoE; empty: those do that it computes exactly.
    Raises:
        UserError: torch cannot trace this architecture, or a quantized matrix has no quantized form in the graph.
        CheckFailed: the graph lacks a parameter of the run.
    """
    if options.no_cache:
        options.log("onnx: the graph has no KV cache: it runs in plain ONNX Runtime, not in onnxruntime-genai")
    return finish(matched_trace(weights, not options.no_cache, options.log, no_qmoe), weights, companions, options)


def matched_trace(weights: RunWeights, with_cache: bool, log: Callable[[str], None], no_qmoe: str) -> MatchedTrace:
    """A traced graph of floats, and where it has the run's parameters; see `trace_graph` and `trace`."""
    traced = trace_graph(weights, with_cache, log, no_qmoe)
    log("onnx: matching the graph's weights with the run directory")
    in_nodes = frozenset(name for mixture in traced.mixtures for name in mixture.held())
    matched = match_weights(traced.model.graph, weights, limit=0.0, elsewhere=in_nodes).bindings
    return MatchedTrace(traced.model, traced.mixtures, matched)


def finish(found: MatchedTrace, weights: RunWeights, companions: Path, options: OnnxOptions) -> FinishedGraph:
    """The run's weights in a traced graph, which is edited, and the files beside it; see `trace`."""
    model = found.model
    experts = set_expert_weights(model.graph, found.mixtures, weights)
    check_complete(found.bindings + experts, weights)
    copy_config_files(weights.run, companions)
    if not options.no_cache:
        logits = next(value for value in model.graph.outputs if value.name == "logits")
        write_genai_config(companions, states_of(model.graph), int(logits.shape[-1]))
    bindings = replace_weights(model, found.bindings, weights, options) + experts
    return FinishedGraph(model, bindings, f"torch.onnx.export (torch {torch.__version__})", not options.no_cache)


@dataclass(frozen=True)
class MatchedTrace:
    """A traced graph of floats, and what it holds.

    Attributes:
        model, mixtures: see `Traced`.
        bindings: of all parameters but those of the mixtures.
    """

    model: ir.Model
    mixtures: list[Mixture]
    bindings: list[Binding]


@dataclass(frozen=True)
class Traced:
    """A traced graph.

    Attributes:
        model: the f32 graph (opset 20), int64 [batch, tokens] → logits [batch, tokens, vocab].
        mixtures: layers of experts that are one node each in it, without weights.
    """

    model: ir.Model
    mixtures: list[Mixture]


def trace_graph(weights: RunWeights, with_cache: bool, log: Callable[[str], None], no_qmoe: str) -> Traced:
    """Trace transformers' model of a run.

    Args:
        weights: the run, whose dequantized weights the graph holds.
        with_cache: with the states of `traced_cache` as inputs and outputs; attention_mask is then int64
            [batch, past + tokens], else [batch, tokens].
        log: takes lines.
        no_qmoe: see `trace`.
    Raises:
        UserError: torch cannot trace this architecture, or its states have no names.
    """
    model: Any = load_run_model(weights.run)
    model.set_attn_implementation("eager")
    experts = take_experts_apart(model, weights, no_qmoe)
    for line in experts.lines():
        log(line)
    parameters = {f"model.{name}" for name, _ in model.named_parameters()}
    module: nn.Module = _LogitsOnly(model).eval()
    signature = _without_states()
    if with_cache:
        states = find_states(model)
        module, signature = WithStates(model, states).eval(), _with_states(states)
        check_states(module)
    with mixtures_as_nodes(model, experts.mixtures):
        return Traced(_export(model, parameters, module, signature), experts.mixtures)


@dataclass(frozen=True)
class _Signature:
    """What a module is traced with.

    Attributes:
        arguments: example tensors.
        shapes: which of their dimensions are open.
        inputs, outputs: names.
    """

    arguments: tuple[Any, ...]
    shapes: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]


# torch takes a dimension of 1 for a constant. What is traced with 2 and more is right for 1 as well, and for a past of
# no tokens: the tests run both.
_BATCH, _TOKENS, _PAST = 2, 8, 5


def _without_states() -> _Signature:
    tokens = torch.zeros((_BATCH, _TOKENS), dtype=torch.int64)
    shape = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=2)}
    return _Signature((tokens, torch.ones_like(tokens)), (shape, shape), ["input_ids", "attention_mask"], ["logits"])


def _with_states(states: list[State]) -> _Signature:
    tokens = torch.zeros((_BATCH, _TOKENS), dtype=torch.int64)
    past = _PAST if any(s.grows for s in states) else 0
    mask = torch.ones((_BATCH, past + _TOKENS), dtype=torch.int64)
    batch, length = torch.export.Dim("batch_size", min=1), torch.export.Dim("sequence_length", min=2)
    before, total = torch.export.Dim("past_sequence_length"), torch.export.Dim("total_sequence_length")
    shapes = [{0: batch, 2: before} if s.grows else {0: batch} for s in states]
    return _Signature(
        (tokens, mask, [s.zeros(_BATCH, past) for s in states]),
        ({0: batch, 1: length}, {0: batch, 1: total}, shapes),
        ["input_ids", "attention_mask", *(s.past for s in states)],
        ["logits", *(s.present for s in states)],
    )


def _export(model: nn.Module, parameters: set[str], module: nn.Module, signature: _Signature) -> ir.Model:
    try:
        with _quiet(), recurrences_as_nodes(model), functions_with_onnx_forms(model):
            program = torch.onnx.export(
                module,
                signature.arguments,
                dynamo=True,
                dynamic_shapes=signature.shapes,
                input_names=signature.inputs,
                output_names=signature.outputs,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            _optimize(program.model, parameters)
    except Exception as error:  # torch and onnxscript raise whatever their parts raise
        reason = " ".join(str(_first_cause(error)).split())[:300] or type(error).__name__
        raise UserError(
            f"--format onnx: torch.onnx.export cannot trace {type(model).__name__} ({reason}); give a graph of your "
            "own with --template model.onnx, or export with --format gguf"
        ) from error
    return program.model


def _first_cause(error: BaseException) -> BaseException:
    """torch wraps what was wrong in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


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
