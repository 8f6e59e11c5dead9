"""Memory of large tensors goes back to the system as soon as they are freed."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 4 << 20


def return_large_tensors() -> None:
    """Let glibc give every tensor from 4 MB on pages of its own.

    By itself it raises that limit to 32 MB as such tensors are freed, and keeps those below on its heap, which never
    shrinks past the last one that lives: codes and positions of a block's matrices are of that size, and a block of 32
    experts left 10 GB behind it that nothing used. Elsewhere nothing is changed.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
