"""llama.cpp's fixed tables of vectors: several neighbouring values take an entry's magnitudes together, and signs.

IQ1's entries hold −1, 0 and 1, and there are no signs besides.

The tables are gguf-py's (`grid_hex` in gguf/quants.py), which are those of ggml-common.h. A position counts levels from
the middle, so that magnitudes are 0.5, 1.5, 2.5 …, as levels of a table lie nearly that evenly; IQ1's are −1, 0 and 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from gguf import quants
from torch import Tensor

# Scores worked on at once: they stay in the L2 cache.
_SCORES_AT_ONCE = 1 << 18
_FARTHEST = 16.0  # positions beyond are as far outside of any table as that

_TABLES = {
    "IQ2_XXS": quants.IQ2_XXS,
    "IQ2_XS": quants.IQ2_XS,
    "IQ2_S": quants.IQ2_S,
    "IQ3_XXS": quants.IQ3_XXS,
    "IQ3_S": quants.IQ3_S,
    "IQ1_S": quants.IQ1_S,
    "IQ1_M": quants.IQ1_M,
}


@dataclass(frozen=True)
class VectorTable:
    """One table.

    Attributes:
        name: the ggml type that it belongs to.
        even_signs: whether an even number of eight neighbouring values is negative, as seven signs are stored.
    """

    name: str
    even_signs: bool

    @property
    def magnitudes(self) -> tuple[int, ...]:
        """All that occur in entries, ascending; with their signs, where entries have some."""
        return tuple(int(value) for value in _TABLES[self.name].grid_map)

    @property
    def signed(self) -> bool:
        """Whether entries hold signs themselves, which are not stored besides then."""
        return self.magnitudes[0] < 0

    @property
    def size(self) -> int:
        """Values an entry."""
        return int(_TABLES[self.name].grid_shape[1])

    @property
    def count(self) -> int:
        """Entries."""
        return int(_TABLES[self.name].grid_shape[0])

    @property
    def group(self) -> int:
        """Values that are chosen together."""
        return 8 if self.even_signs else self.size

    def entries(self, device: torch.device) -> Tensor:
        """Which of `magnitudes` each value of each entry has, int64 [entries, size]."""
        return _entries(self.name, device)

    def numbers(self, device: torch.device) -> Tensor:
        """Number of the entry whose values, read as a number in base n = len(magnitudes), the first the lowest digit,
        are the index; −1 where there is none: int16 [n^size]."""
        return _numbers(self.name, device)

    def nearest(self, positions: Tensor, weights: Tensor | None = None) -> Tensor:
        """The nearest vectors to real-valued positions f32 [N, group], in positions.

        Where signs have to be even and are odd, that of the value whose position is nearest to the middle is flipped.

        Args:
            weights: of the squared differences, f32 [group]; None: all alike.
        """
        signed = positions.clamp(-_FARTHEST, _FARTHEST)
        magnitude = signed.abs()
        if self.even_signs:
            weakest = (magnitude if weights is None else magnitude * weights).argmin(dim=1, keepdim=True)
            odd = signed.signbit().sum(dim=1, keepdim=True).bitwise_and_(1)
            flip = odd.mul_(-2).add_(1).float()
            for values in (signed, magnitude):
                values.scatter_(1, weakest, values.gather(1, weakest) * flip)
        numbers = self._largest_scores(signed if self.signed else magnitude, weights)
        vectors, _, _ = _scoring(self.name, positions.device)
        chosen = vectors.index_select(0, numbers).view(signed.shape)
        return chosen if self.signed else chosen.copysign_(signed)

    def _largest_scores(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """The numbers of the entries that are nearest to values f32 [N, group], int64 [N·group/size]."""
        parts = self.group // self.size
        vectors, doubled, squares = _scoring(self.name, values.device)
        at_once = max(1, _SCORES_AT_ONCE // (parts * len(vectors)))
        if values.is_cuda:
            at_once *= 256
        of_parts = None if weights is None else weights.view(parts, self.size)
        scores = values.new_empty(min(at_once, len(values)), parts, len(vectors))
        numbers = torch.empty(len(values), parts, dtype=torch.int64, device=values.device)
        for start in range(0, len(values), at_once):
            some = values[start : start + at_once]
            own = scores[: len(some)]
            if of_parts is None:
                torch.addmm(squares, some.view(-1, self.size), doubled, out=own.view(-1, len(vectors)))
            else:
                halves = some.view(len(some), parts, self.size)
                for i, h in enumerate(of_parts):
                    own[:, i] = torch.addmm(vectors.square() @ -h, halves[:, i] * h, doubled)
            _places_of_largest(own, numbers[start : start + at_once])
        return numbers.view(-1)


def _places_of_largest(scores: Tensor, out: Tensor) -> None:
    """argmax over the last dimension; numpy's, which is ten times as fast on a CPU."""
    if scores.is_cuda:
        torch.argmax(scores, dim=-1, out=out)
    else:
        scores.numpy().argmax(axis=-1, out=out.numpy())


@functools.cache
def _entries(name: str, device: torch.device) -> Tensor:
    table = _TABLES[name]
    table.init_grid()
    values = torch.from_numpy(table.grid).view(table.grid_shape).to(device)
    return torch.bucketize(values, torch.tensor(table.grid_map, dtype=values.dtype, device=device))


@functools.cache
def _numbers(name: str, device: torch.device) -> Tensor:
    entries, base = _entries(name, device), len(_TABLES[name].grid_map)
    places = base ** torch.arange(entries.shape[1], device=device)
    numbers = torch.full((base ** entries.shape[1],), -1, dtype=torch.int16, device=device)
    numbers[(entries * places).sum(1)] = torch.arange(len(entries), dtype=torch.int16, device=device)
    return numbers


@functools.cache
def _scoring(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(positions f32 [n, size] of all entries, their doubles transposed, less their squares [n]): −‖x − e‖² is
    2·x·e − ‖e‖² − ‖x‖²."""
    vectors = _entries(name, device).float() + (-1 if _TABLES[name].grid_map[0] < 0 else 0.5)
    return vectors, 2 * vectors.T.contiguous(), -vectors.square().sum(1)
