"""A traced graph's states: keys and values, convolution and recurrent states, as inputs and outputs of the graph.

Which states a model has is not read from its config: it is called once, and what its own cache holds afterwards says
it (layers that share keys hold none, DeepSeek's keys are wider than its values, Gemma 4's layers differ).

Names are those of onnxruntime-genai (its models/builders/base.py, version 0.18.0): `past_key_values.N.key`, `.value`
and `past.N.conv`, `past.N.recurrent` go in, `present.N.…` come out.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from signround_edge.errors import UserError

GROWING = ("key", "value")  # by one row a token; the others have a fixed shape
_TOLERANCE = 1e-3  # of the largest logit; f32 in another order gives 1e-6
_PROBE = 5  # tokens of the call that shows what the cache holds


@dataclass(frozen=True)
class State:
    """One tensor that a call leaves for the next one.

    Attributes:
        layer: index of the decoder layer.
        kind: "key", "value", "conv" or "recurrent".
        shape: without the batch; the length of keys and values is 0 here. [heads, 0, values a head] of a key or value,
            [channels, kernel − 1] of a convolution's last inputs, any of a recurrent state.
        used: numbers of a head that count, of a key or value; zeros follow. onnxruntime-genai has one size for both,
            and DeepSeek's keys are wider than its values.
    """

    layer: int
    kind: str
    shape: tuple[int, ...]
    used: int = 0

    @property
    def past(self) -> str:
        """The graph's input."""
        return f"past_key_values.{self.layer}.{self.kind}" if self.grows else f"past.{self.layer}.{self.kind}"

    @property
    def present(self) -> str:
        """The graph's output."""
        return f"present.{self.layer}.{self.kind}"

    @property
    def grows(self) -> bool:
        """Whether it has a row for each token."""
        return self.kind in GROWING

    @property
    def padding(self) -> int:
        """Zeros at the end of each head."""
        return self.shape[-1] - self.used if self.grows else 0

    def zeros(self, batch: int, length: int) -> Tensor:
        """f32 [batch, …]; keys and values of `length` tokens."""
        shape = [self.shape[0], length, self.shape[2]] if self.grows else self.shape
        return torch.zeros(batch, *shape)


class WithStates(nn.Module):
    """The causal language model as a function of tensors: tokens, mask and states → logits and new states."""

    # torch writes it into the metadata of every node: a file does not depend on where this code lies.
    __module__ = "exporters.onnx.tracing"

    def __init__(self, model: nn.Module, states: list[State]) -> None:
        super().__init__()
        self.model = model
        self.states = states
        self.cache_argument = cache_argument(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.count = layer_count(model, states)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        """f32 [batch, tokens, vocab] and the states after these tokens.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: int64 [batch, past + tokens].
            states: in the order of `self.states`, each f32 [batch, …].
        """
        held = {(s.layer, s.kind): tensor for s, tensor in zip(self.states, states, strict=True)}
        held |= {(s.layer, s.kind): held[s.layer, s.kind][..., : s.used] for s in self.states if s.padding}
        cache = _cache(held, self.count)
        arguments: dict[str, Any] = {self.cache_argument: cache}
        if self.takes_positions:
            # As transformers' `generate` gives them: some models count from 0 in each call, and padding counts not.
            positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -input_ids.shape[1] :]
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **arguments
        ).logits
        return logits, *(_read(cache, s) for s in self.states)


def find_states(model: Any) -> list[State]:
    """What the model's cache holds after a call, by layer.

    Raises:
        UserError: a state is of a kind that has no name in onnxruntime-genai.
    """
    tokens = torch.ones((1, _PROBE), dtype=torch.int64)
    with torch.no_grad():
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    cache = output.get(cache_argument(model))
    if not isinstance(cache, Cache):
        raise _unknown(model, type(cache).__name__)
    states = [s for index, layer in enumerate(cache.layers) for s in _states_of(model, index, layer)]
    if not states:
        raise _unknown(model, "a cache without layers")
    return states


def check_states(module: WithStates) -> None:
    """A text in two parts must give the model's own logits of the whole.

    Raises:
        UserError: it does not: some layer does not read what it has kept, or cannot (Mamba).
    """
    model: Any = module.model
    count = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(count, (2, 2 * _PROBE), generator=torch.Generator().manual_seed(0))
    mask, zeros = torch.ones_like(tokens), [s.zeros(2, 0) for s in module.states]
    refusal = UserError(
        f"--format onnx: {type(model).__name__} in transformers does not continue a text from its states as if "
        "it had read all of it; export with --no-cache"
    )
    with torch.no_grad():
        whole = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        try:
            first, *states = module(tokens[:, :_PROBE], mask[:, :_PROBE], zeros)
            second, *_ = module(tokens[:, _PROBE:], mask, states)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:  # transformers' own
            raise refusal from error
    difference = (torch.cat([first, second], dim=1) - whole).abs().max()
    if not difference <= _TOLERANCE * whole.abs().max():
        raise refusal


def states_of(graph: ir.Graph) -> list[State]:
    """The states that a traced graph takes."""
    states = []
    for value in graph.inputs:
        start, *rest = str(value.name).split(".")
        if start in ("past_key_values", "past"):
            _, *shape = value.shape
            sizes = tuple(n if isinstance(n, int) else 0 for n in shape)
            states.append(State(int(rest[0]), rest[1], sizes, sizes[-1]))
    return states


def cache_argument(model: nn.Module) -> str:
    """The name under which a model takes and gives its cache: Mamba calls it otherwise."""
    parameters = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in parameters else "past_key_values"


def _states_of(model: nn.Module, index: int, layer: Any) -> list[State]:
    states: list[State] = []
    if isinstance(layer, DynamicIndexedLayer):
        raise _unknown(model, type(layer).__name__)
    if isinstance(layer, DynamicLayer) and layer.keys is not None:
        width = max(layer.keys.shape[3], layer.values.shape[3])
        states += [
            State(index, kind, (tensor.shape[1], 0, width), used=tensor.shape[3])
            for kind, tensor in zip(GROWING, (layer.keys, layer.values), strict=True)
        ]
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if layer.number_of_states != 1:
            raise _unknown(model, f"{layer.number_of_states} states in one layer")
        conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
        if conv is not None:
            states.append(State(index, "conv", (*conv.shape[1:-1], conv.shape[-1] - 1)))
        if recurrent is not None:
            states.append(State(index, "recurrent", tuple(recurrent.shape[1:])))
    if not isinstance(layer, (DynamicLayer, LinearAttentionCacheLayerMixin, DummyLayer)):
        raise _unknown(model, type(layer).__name__)
    return states


def _unknown(model: nn.Module, what: str) -> UserError:
    return UserError(
        f"--format onnx: {type(model).__name__} keeps between tokens what onnxruntime-genai has no names for ({what}); "
        "export with --no-cache"
    )


class _KeysAndValues(DynamicLayer):  # type: ignore[misc]
    """transformers' growing layer, filled; windows are the mask's business, so the cache is as long as the text."""

    def hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """transformers' also asks whether it is empty, and a trace would keep the answer."""
        assert self.keys is not None
        return self.keys.shape[-2]


class _Linear(LinearAttentionLayer):  # type: ignore[misc]
    """transformers' layer of convolution and recurrent states, filled, and not written in place.

    The convolution's state is the last kernel − 1 inputs; transformers keeps one more than it needs.
    """

    def hold(self, conv: Tensor | None, recurrent: Tensor | None) -> None:
        self.conv_states[0], self.recurrent_states[0] = conv, recurrent
        self.has_previous_state[0] = True

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """The past inputs before the new ones: a causal convolution of both is right for any number of tokens."""
        held = self.conv_states[state_idx]
        assert held is not None
        joined = torch.cat([held, conv_states], dim=-1)
        self.conv_states[state_idx] = joined[..., -held.shape[-1] :]
        return joined

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Another tensor, since writing in place would change the graph's input."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class _Both(_Linear, _KeysAndValues, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer that attends and has a recurrent state (Falcon-H1)."""


class _StateCache(Cache):  # type: ignore[misc]
    """A cache of such layers."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """None: models then take the form of the convolution that is right for any number of tokens."""
        return None


def _cache(held: dict[tuple[int, str], Tensor], count: int) -> _StateCache:
    return _StateCache(layers=[_layer(held, index) for index in range(count)])


def _layer(held: dict[tuple[int, str], Tensor], index: int) -> Any:
    keys, values, conv, recurrent = (held.get((index, kind)) for kind in (*GROWING, "conv", "recurrent"))
    linear = conv is not None or recurrent is not None
    layer: Any = DummyLayer()
    if keys is not None and linear:
        layer = _Both()
    elif keys is not None:
        layer = _KeysAndValues()
    elif linear:
        layer = _Linear()
    if keys is not None and values is not None:
        _KeysAndValues.hold(layer, keys, values)
    if linear:
        _Linear.hold(layer, conv, recurrent)
    return layer


def _read(cache: Cache, state: State) -> Tensor:
    layer: Any = cache.layers[state.layer]
    if state.grows:
        tensor: Tensor = layer.keys if state.kind == "key" else layer.values
        return F.pad(tensor, (0, state.padding)) if state.padding else tensor
    states = layer.conv_states if state.kind == "conv" else layer.recurrent_states
    held: Tensor = states[0]
    return held


def layer_count(model: Any, states: list[State]) -> int:
    """Layers of the cache: as many as the decoder has, also where the last ones keep nothing."""
    config = model.config.get_text_config(decoder=True)
    return max(int(config.num_hidden_layers), 1 + max(s.layer for s in states))
