"""Several processes that tune one run together, on torch.distributed; one alone pays nothing for it.

Each process (rank) holds the activations of its own samples. What is summed over samples is summed over all ranks, and
all else is computed by each of them alike, so that every rank holds the same bytes; whoever finds that it does not ends
the run. torchrun starts the processes, and says by its environment variables which of them this one is
(https://docs.pytorch.org/docs/stable/elastic/run.html).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from signround_edge.errors import LostProcess, ToldElsewhere, UserError
from signround_edge.model.experts import split_expert
from signround_edge.tuning.launch import BLOCKS_ARE_KEPT, Place

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# The first rank works alone for minutes at most (comparing a large model with transformers', writing a block).
_TIMEOUT = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this one is. Operations are called by all ranks in the same order.

    Attributes:
        rank: this one's number, from 0; the first one writes.
        world: how many there are.
        local: this one's number on its machine: its GPU.
        store: what they all see of each other without exchanging tensors; None of one alone.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    store: Store | None = None

    @property
    def alone(self) -> bool:
        """Whether there is one process: nothing is exchanged then."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and progress."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a contiguous tensor, in place, over all ranks; every rank gets the same bytes."""
        if not self.alone:
            with _in_touch():
                dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, weights: Mapping[str, Tensor]) -> None:
        """Give every rank the sum of all ranks' gradients of some weights, by parameter name.

        A rank may have none, of an expert that its samples were not routed to.
        """
        if self.alone:
            return
        reached = torch.ones(len(weights), dtype=torch.int32)
        if any(split_expert(name)[1] is not None for name in weights):
            reached = self.sum(torch.tensor([weight.grad is not None for weight in weights.values()]).int())
        for weight, ranks in zip(weights.values(), reached.tolist(), strict=True):
            if ranks:
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad.contiguous()
                weight.grad = self.sum(gradient)

    def total(self, number: int) -> int:
        """The sum of a number over all ranks."""
        return number if self.alone else int(self.sum(torch.tensor(number)))

    def sum_by_name(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Add up tensors by name over all ranks; what a rank lacks (of an expert that it never saw) is zero there."""
        if self.alone:
            return tensors
        kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for found in self.gathered({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}):
            kinds = found | kinds
        return {
            name: self.sum(tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype, device=device))
            for name, (shape, dtype) in kinds.items()
        }

    def gathered(self, value: Any) -> list[Any]:
        """A small object of each rank, in the order of ranks."""
        found: list[Any] = [None] * self.world
        if self.alone:
            return [value]
        with _in_touch():
            dist.all_gather_object(found, value)
        return found

    def of_first(self, value: Any) -> Any:
        """The first rank's small object; it waits for no other than the first."""
        if self.alone:
            return value
        box = [value]
        with _in_touch():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def owns(self, number: int) -> bool:
        """Whether this rank computes the piece of work `number`, whose result all need."""
        return number % self.world == self.rank

    def take(self, number: int, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor [n, …] with that of the rank which `owns` the piece of work `number`."""
        if not self.alone:
            with _in_touch():
                dist.broadcast(tensor.view(torch.uint8), src=number % self.world)  # not every backend knows every dtype

    def of_owner(
        self, number: int, tensors: dict[str, Tensor | None] | None, device: torch.device
    ) -> dict[str, Tensor | None]:
        """Tensors [n, …] by name from the rank which `owns` the piece of work `number`; the others give None."""
        if self.alone:
            assert tensors is not None
            return tensors
        box: list[Any] = [tensors and {name: t if t is None else (t.shape, t.dtype) for name, t in tensors.items()}]
        with _in_touch():
            dist.broadcast_object_list(box, src=number % self.world)
        found: dict[str, Tensor | None] = {}
        for name, kind in box[0].items():
            own = None if tensors is None else tensors[name]
            if kind is not None:
                own = torch.empty(kind[0], dtype=kind[1], device=device) if own is None else own.contiguous()
                self.take(number, own)
            found[name] = own
        return found

    def on_first(self, rows: Tensor, numbers: list[Tensor]) -> Tensor | None:
        """Rows [n, …] of all ranks as one tensor on the CPU, on the first rank; None on the others.

        Args:
            numbers: of each rank, which rows of the whole its own are, int64 [n].
        """
        if self.alone:
            return rows
        with _in_touch():
            if not self.first:
                dist.send(rows.cpu().contiguous(), dst=0)
                return None
            whole = torch.empty(sum(map(len, numbers)), *rows.shape[1:], dtype=rows.dtype)
            whole[numbers[0]] = rows.cpu()
            for rank in range(1, self.world):
                received = torch.empty(len(numbers[rank]), *rows.shape[1:], dtype=rows.dtype)
                dist.recv(received, src=rank)
                whole[numbers[rank]] = received
        return whole

    def finish(self) -> None:
        """Wait until the first rank has finished, however long it works alone."""
        if self.store is not None:
            with _in_touch():
                if self.first:
                    self.store.set("finished", "yes")
                else:
                    self.store.wait(["finished"], datetime.timedelta(days=30))


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Within, this process is one of those that torchrun started, where it did.

    Of processes that fail together the first one says why.

    Raises:
        LostProcess: another process has ended, or cannot be reached.
        ToldElsewhere: this one failed after another had.
    """
    place = Place.of_environment()
    if place.world == 1:
        yield ALONE
        return
    # Not above: some builds of torch have none of this.
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available() and place.local < torch.cuda.device_count():
        torch.cuda.set_device(place.local)
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {place.world} processes of this run do not find each other at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}; start them with torchrun, and see that "
            "machines reach each other there"
        ) from error
    own = PrefixStore("signround-edge", store)
    try:
        yield Ranks(rank, world, place.local, own)
    except Exception as error:
        is_first = _is_first_to_say(own)
        if rank == 0:
            _let_others_ask(own, world)
        if not is_first:
            raise ToldElsewhere("another process of this run has failed, and says why") from error
        raise
    # Not after a failure: it may wait for processes that are gone.
    dist.destroy_process_group()


def _is_first_to_say(store: Store) -> bool:
    try:
        return bool(store.add("failed", 1) == 1)
    except RuntimeError:  # the store is gone with the process that kept it
        return True


def _let_others_ask(store: Store, world: int) -> None:
    """Keep the store for those that fail at the same time: it may be this process that has it, and goes with it."""
    with contextlib.suppress(RuntimeError):
        for _ in range(20):
            if store.add("failed", 0) >= world:
                return
            time.sleep(0.1)


@contextlib.contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(f"a process of this run has ended or cannot be reached; {BLOCKS_ARE_KEPT}") from error
