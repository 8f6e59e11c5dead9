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
        found = torch.empty_like(positions)
        at_once = max(1, _SCORES_AT_ONCE // len(self.entries(positions.device)))
        if positions.is_cuda:
            at_once *= 256
        for start in range(0, len(positions), at_once):
            part = slice(start, start + at_once)
            found[part] = self._nearest(positions[part], weights)
        return found

    def _nearest(self, positions: Tensor, weights: Tensor | None) -> Tensor:
        signed = positions.clamp(-_FARTHEST, _FARTHEST)
        magnitude = signed.abs()
        if self.even_signs:
            weakest = (magnitude if weights is None else magnitude * weights).argmin(dim=1, keepdim=True)
            odd = signed.signbit().sum(dim=1, keepdim=True).bitwise_and_(1)
            flip = odd.mul_(-2).add_(1).float()
            for values in (signed, magnitude):
                values.scatter_(1, weakest, values.gather(1, weakest) * flip)
        vectors, doubled, squares = _scoring(self.name, positions.device)
        if self.signed:
            magnitude = signed
        if weights is None:
            scores = torch.addmm(squares, magnitude.view(-1, self.size), doubled)
        else:
            scores = self._weighted_scores(magnitude, weights)
        chosen = vectors.index_select(0, _places_of_largest(scores)).view(signed.shape)
        return chosen if self.signed else chosen.copysign_(signed)

    def _weighted_scores(self, magnitude: Tensor, weights: Tensor) -> Tensor:
        vectors, doubled, _ = _scoring(self.name, magnitude.device)
        parts, halves = weights.view(-1, self.size), magnitude.view(len(magnitude), -1, self.size)
        scores = [
            torch.addmm(vectors.square() @ -h, halves[:, i] * h, doubled) for i, h in enumerate(parts)
        ]  # of each entry of a group
        return torch.stack(scores, dim=1).view(-1, len(vectors))


def _places_of_largest(scores: Tensor) -> Tensor:
    """argmax of each row; numpy's, which is ten times as fast on a CPU."""
    return scores.argmax(dim=1) if scores.is_cuda else torch.from_numpy(scores.numpy().argmax(axis=1))


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
