"""Activations between decoder blocks: what flows through them, run over all samples."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from signround_edge.model.decoder import Decoder
from signround_edge.tuning.calibration.block_call import Shared
from signround_edge.tuning.calibration.input_moments import InputMoments
from signround_edge.tuning.calibration.shell import Shell

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Store:
    """Where the hidden states of all samples are kept.

    Attributes:
        device: a GPU that has the room, or the CPU.
        folder: of a file that is mapped into memory, so that the system writes to disk what does not fit; None: memory.
        dtype: of the values.
        pinned: whether it is memory that a GPU copies from and to while the host does something else.
    """

    device: torch.device = CPU
    folder: Path | None = None
    dtype: torch.dtype = torch.float32
    pinned: bool = False

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of that shape. The file has no name, so that it is gone with the process."""
        if self.folder is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device, pin_memory=self.pinned)
        count = math.prod(shape)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".hidden") as file:
            file.truncate(self.dtype.itemsize * count)
            return torch.from_file(file.name, shared=True, size=count, dtype=self.dtype).view(shape)


IN_MEMORY = Store()


def fetch(tensor: Tensor, samples: Tensor | slice, device: torch.device) -> Tensor:
    """Some samples of a tensor on a device, so that the host waits for nothing where that is a GPU.

    There an index would be copied to the device, and waited for: samples are views, which one kernel puts together.
    """
    if device.type != "cuda":
        return tensor[samples].to(device)
    if isinstance(samples, slice):
        return tensor[samples] if tensor.is_cuda else _in_pinned_memory(tensor[samples]).to(device, non_blocking=True)
    every = [tensor[number] for number in samples.tolist()]
    if not every:
        return tensor[:0].to(device)
    if tensor.is_cuda:
        return torch.stack(every)
    if tensor.is_pinned():
        return torch.stack([sample.to(device, non_blocking=True) for sample in every])
    pinned = torch.empty((len(every), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    return torch.stack(every, out=pinned).to(device, non_blocking=True)


def _in_pinned_memory(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()


@dataclass(frozen=True)
class Stream:
    """What enters a block for all samples, where a `Store` has it.

    Attributes:
        hidden: [samples, seqlen, hidden], f32 or bf16: what computes with them takes them as f32.
        shared: what earlier blocks left for later ones, each [samples, …], in the dtype in which they computed it.
    """

    hidden: Tensor
    shared: Shared = field(default_factory=dict)

    def at(self, samples: Tensor | slice, device: torch.device) -> tuple[Tensor, Shared]:
        """Hidden states f32 and what is shared, of some samples, on a device."""
        shared = {
            name: {key: tuple(fetch(part, samples, device) for part in parts) for key, parts in mapping.items()}
            for name, mapping in self.shared.items()
        }
        return fetch(self.hidden, samples, device).float(), shared


def run_block(
    decoder: Decoder,
    shell: Shell,
    index: int,
    tokens: Tensor,
    stream: Stream,
    batch_size: int,
    device: torch.device,
    autocast: torch.autocast,
    moments: InputMoments | None = None,
    in_place: bool = False,
) -> Stream:
    """What a loaded block makes of all samples.

    Batches always have the same boundaries, so that a resumed run computes the very same bits.

    Args:
        autocast: context of the products, the same as while tuning.
        moments: settled after each batch, with the weights that the loss gives to its tokens.
        in_place: whether what comes out takes the memory of the hidden states that went in.
    """
    out = stream.hidden if in_place else torch.empty_like(stream.hidden)
    left: list[Shared] = []
    with torch.no_grad():
        # The last copy to the host is waited for, and with it all before it: whoever reads the host's memory may.
        apart = out.is_pinned()
        for start in range(0, len(out), batch_size):
            part = slice(start, start + batch_size)
            call = shell.block_call(index, tokens[part], device)
            hidden, shared = stream.at(part, device)
            with autocast:
                result = call.run(decoder.blocks[index], hidden, shared).float()
            left.append(shared)
            if moments is not None:  # before they are overwritten: hidden states may be what waits
                moments.settle(moments.token_weights(result))
            out[part].copy_(result.to(out.dtype), non_blocking=apart and start + batch_size < len(out))
    return Stream(out, _joined(left))


def _joined(batches: list[Shared]) -> Shared:
    """What batches of samples left, as one."""

    def of(name: str, key: object) -> Iterable[Tensor]:
        every = zip(*(batch[name][key] for batch in batches), strict=True)
        return (torch.cat([part.cpu() for part in parts]) for parts in every)

    return {name: {key: tuple(of(name, key)) for key in mapping} for name, mapping in batches[0].items()}


def relative_weights(target: Tensor) -> Tensor:
    """Weight of each token's squared error, [n, seqlen, 1]: one over the mean square of its exact hidden states.

    The next block normalises each token, so only the relative error matters; and a few tokens (mostly the first of a
    text) have hidden states hundreds of times larger than all others, and would own a plain mean.
    """
    return target.square().mean(dim=-1, keepdim=True).add_(1e-12).reciprocal_()


def equal_weights(target: Tensor) -> Tensor:
    """Weights of a plain mean squared error, [n, seqlen, 1]."""
    return torch.ones_like(target[..., :1])
