"""Activations between decoder blocks: what the model outside the blocks computes, and blocks run over all samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from signround_edge.errors import UserError
from signround_edge.model.decoder import Decoder, first_hidden
from signround_edge.tuning.calibration.input_moments import InputMoments


class _StopForward(Exception):
    """Ends a forward pass as soon as what we wanted from it is known."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments besides the hidden states with which the model calls one block.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments (masks, position embeddings, …).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> BlockCall:
        """The same call with its tensors on a device."""
        moved = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (self.args, self.kwargs))
        return BlockCall(*moved)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states [n, seqlen, hidden] after the block.

        Under autocast RoPE's cosines and sines have its dtype, or queries and keys would be rotated in f32.
        """
        kwargs = self.kwargs
        if "position_embeddings" in kwargs and torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            rounded = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, kwargs["position_embeddings"])
            kwargs = {**kwargs, "position_embeddings": rounded}
        return first_hidden(block(hidden, *self.args, **kwargs))


@dataclass
class Shell:
    """The model with its blocks taken out: embeds tokens, knows how each block is called, applies the final norm.

    Everything outside the blocks that runs must be loaded; the blocks need not be. Masks and position embeddings
    depend only on the number of samples in a batch, so they are captured once per batch size.
    """

    decoder: Decoder
    returns_tuple: bool
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states f32 [n, seqlen, hidden] that enter block 0."""
        return self._pass(tokens, None)[0]

    def block_call(self, index: int, tokens: Tensor, device: torch.device) -> BlockCall:
        """How block `index` is called, with tensors on `device`, for as many samples as `tokens` [n, seqlen] has."""
        count = tokens.shape[0]
        if count not in self.calls:
            self._pass(tokens, None)
        return self.calls[count][index].to(device)

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
        self.calls.setdefault(tokens.shape[0], recorded)
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
                    seen.append(hidden)
                    hidden = hidden if inject is None else inject
                elif hidden is not passed[-1]:
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


def run_block(
    decoder: Decoder,
    shell: Shell,
    index: int,
    tokens: Tensor,
    hidden: Tensor,
    batch_size: int,
    device: torch.device,
    autocast: torch.autocast,
    moments: InputMoments | None = None,
) -> Tensor:
    """Output of a loaded block for all samples, f32 [samples, seqlen, hidden] on the CPU.

    Batches always have the same boundaries, so that a resumed run computes the very same bits.

    Args:
        autocast: context of the products, the same as while tuning.
        moments: settled after each batch, with the weights that the loss gives to its tokens.
    """
    out = torch.empty_like(hidden)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], batch_size):
            part = slice(start, start + batch_size)
            call = shell.block_call(index, tokens[part], device)
            with autocast:
                result = call.run(decoder.blocks[index], hidden[part].to(device)).float()
            out[part] = result.cpu()
            if moments is not None:
                moments.settle(moments.token_weights(result))
    return out


def relative_weights(target: Tensor) -> Tensor:
    """Weight of each token's squared error, [n, seqlen, 1]: one over the mean square of its exact hidden states.

    The next block normalises each token, so only the relative error matters; and a few tokens (mostly the first of a
    text) have hidden states hundreds of times larger than all others, and would own a plain mean.
    """
    return target.square().mean(dim=-1, keepdim=True).add_(1e-12).reciprocal_()


def equal_weights(target: Tensor) -> Tensor:
    """Weights of a plain mean squared error, [n, seqlen, 1]."""
    return torch.ones_like(target[..., :1])
