"""The model without its decoder blocks: it embeds tokens, knows how each block is called, and has the final norm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.errors import UserError
from signround_edge.model.decoder import Decoder, weight_of
from signround_edge.tuning.calibration.block_call import BlockCall, moved_calls, streams_first, tokens_first


class _StopForward(Exception):
    """Ends a forward pass as soon as what we wanted from it is known."""


@dataclass
class Shell:
    """The model with its blocks taken out: embeds tokens, knows how each block is called, applies the final norm.

    Everything outside the blocks that runs must be loaded; the blocks need not be. Where the arguments of blocks depend
    on the shape of a batch alone (masks, position embeddings), they are captured once for each shape; where they depend
    on its tokens (per-layer embeddings), for each batch.

    Attributes:
        exact_lookups: where the arguments depend on tokens, tables by token that have been rounded, with their original
            weights.
        calls: how blocks are called, by the shape of a batch.
        latest: the batch whose tokens `calls` is for, where it depends on them.
    """

    decoder: Decoder
    returns_tuple: bool
    exact_lookups: dict[nn.Module, nn.Parameter | None] = field(default_factory=dict)
    calls: dict[tuple[int, ...], list[BlockCall]] = field(default_factory=dict)
    latest: Tensor | None = None
    _depends_on_tokens: bool | None = None
    # Calls whose tensors are on a device, and those that they were made of.
    _moved: dict[tuple[tuple[int, ...], torch.device], tuple[list[BlockCall], list[BlockCall]]] = field(
        default_factory=dict
    )

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states f32 [n, seqlen, hidden] that enter block 0; of several streams [n, seqlen, streams, hidden]."""
        return self._pass(tokens, None)[0]

    def block_call(self, index: int, tokens: Tensor, device: torch.device) -> BlockCall:
        """How block `index` is called, with tensors on `device`, for a batch of tokens [n, seqlen]."""
        shape, depends = tuple(tokens.shape), self.depends_on_tokens(tokens)
        known = shape in self.calls
        if known and depends:
            known = self.latest is not None and torch.equal(self.latest, tokens)
        if not known:
            self.calls.pop(shape, None)
            self._pass(tokens, None)
            self.latest = tokens
        recorded = self.calls[shape]
        of, moved = self._moved.get((shape, device), (None, recorded))
        if of is not recorded:
            moved = moved_calls(recorded, device)
            self._moved[shape, device] = recorded, moved
        return moved[index]

    def depends_on_tokens(self, tokens: Tensor) -> bool:
        """Whether blocks are given something that depends on the tokens; found with these [n, seqlen] and others."""
        if self._depends_on_tokens is None:
            vocabulary = len(weight_of(self.decoder.embedding))
            shape, found = tuple(tokens.shape), []
            for batch in (tokens, (tokens + 1) % vocabulary):
                self.calls.pop(shape, None)
                self._pass(batch, None)
                found.append([tensor for call in self.calls.pop(shape) for tensor in call.tensors()])
            one, other = found
            self._depends_on_tokens = len(one) != len(other) or any(
                a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other, strict=True)
            )
        return self._depends_on_tokens

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Within, arguments of blocks are those of the original model, also when embeddings have been rounded."""
        if not self.exact_lookups:
            yield
            return
        rounded = {module: module._parameters["weight"] for module in self.exact_lookups}
        self._install(self.exact_lookups)
        try:
            yield
        finally:
            self._install(rounded)

    def _install(self, lookups: dict[nn.Module, nn.Parameter | None]) -> None:
        for module, weight in lookups.items():
            module._parameters["weight"] = weight
        self.latest = None

    def head_input(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the output head receives for the last block's output `hidden` [n, seqlen, hidden]."""
        return self._pass(tokens, hidden)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits f32 [tokens, vocabulary] for the last block's output [tokens, hidden]; differentiable.

        What follows the blocks sees each token by itself, so tokens of any samples may be given together.
        """
        model = self.decoder.model
        # Whatever the model does before its blocks, it does to tokens that do not matter.
        placeholders = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with self._recording([], hidden.unsqueeze(0), []):
            output: Tensor = model(input_ids=placeholders, use_cache=False).logits[0]
        return output.float()

    def traced(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """What enters block 0 for tokens [n, seqlen], and how each block is called, with the graph of their slopes."""
        recorded: list[BlockCall] = []
        seen: list[Tensor] = []
        with contextlib.suppress(_StopForward), self._recording(recorded, None, seen):
            self.decoder.model(input_ids=tokens, use_cache=False)
        return seen[0], recorded

    def _pass(self, tokens: Tensor, inject: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the model with recorders for blocks: (input of block 0, input of the head).

        `inject` replaces the hidden states from block 0 on; without it the pass ends at the last block.
        """
        model = self.decoder.model
        tokens = tokens.to(next(self.decoder.embedding.parameters()).device)
        recorded: list[BlockCall] = []
        seen: list[Tensor] = []
        head_inputs: list[Tensor] = []

        def stop_at_head(module: nn.Module, args: tuple[Any, ...]) -> None:
            head_inputs.append(args[0])
            raise _StopForward

        hook = self.decoder.head.register_forward_pre_hook(stop_at_head)
        try:
            with torch.no_grad(), self._recording(recorded, inject, seen):
                model(input_ids=tokens, use_cache=False)
        except _StopForward:
            pass
        finally:
            hook.remove()
        self.calls.setdefault(tuple(tokens.shape), recorded)
        return seen[0], head_inputs[0] if head_inputs else seen[0]

    @contextlib.contextmanager
    def _recording(self, recorded: list[BlockCall], inject: Tensor | None, seen: list[Tensor]) -> Iterator[None]:
        """Within, blocks pass hidden states through, and note how they are called and what enters block 0.

        `inject` replaces the hidden states from block 0 on; without it the pass ends at the last block.
        """
        blocks, model = self.decoder.blocks, self.decoder.model
        last = len(blocks) - 1
        passed: list[Tensor] = []

        def replace(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = kwargs.pop("hidden_states", None) if not args else args[0]
                assert isinstance(hidden, Tensor)
                if index == 0:
                    seen.append(tokens_first(hidden))
                    hidden = hidden if inject is None else streams_first(inject)
                elif hidden.data_ptr() != passed[-1].data_ptr() or hidden.shape != passed[-1].shape:
                    raise UserError(
                        f"{type(model).__name__} does not pass one block's output straight to the next, "
                        "which tuning needs; use another model"
                    )
                passed.append(hidden)
                recorded.append(BlockCall(args[1:], kwargs))
                if index == last and inject is None:
                    raise _StopForward
                return (hidden, None) if self.returns_tuple else hidden

            return forward

        for index, block in enumerate(blocks):
            block.forward = replace(index)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def block_returns_tuple(decoder: Decoder, tokens: Tensor) -> bool:
    """Whether blocks return a tuple; found by running the loaded block 0 on a few tokens [1, n]."""
    found: list[bool] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        found.append(not isinstance(output, Tensor))
        raise _StopForward

    hook = decoder.blocks[0].register_forward_hook(look)
    try:
        with torch.no_grad():
            decoder.model(input_ids=tokens, use_cache=False)
    except _StopForward:
        pass
    finally:
        hook.remove()
    return found[0]
