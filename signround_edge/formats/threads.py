"""Chunks of rows on several threads, each operation on one.

torch's own threads meet after every operation. Where temporaries stay in the cache an operation takes some ten
microseconds, less than such a meeting does on a machine that has other work: see docs/LOG.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Found = TypeVar("Found")


def over_chunks(work: Callable[[Part], Found], parts: Sequence[Part], on_gpu: bool = False) -> list[Found]:
    """What `work` makes of each part, in their order, without gradients.

    Parts are worked on beside one another, by as many threads as torch has; on a GPU one after another.
    """
    threads = torch.get_num_threads()
    if on_gpu or threads == 1 or len(parts) < 2:
        return [work(part) for part in parts]
    return list(_pool(threads).map(torch.no_grad()(work), parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, "chunks", torch.set_num_threads, (1,))
    for waiting in [pool.submit(torch.get_num_threads) for _ in range(threads)]:
        waiting.result()
    torch.set_num_threads(threads)  # what a thread sets is what threads that come later start with
    return pool
