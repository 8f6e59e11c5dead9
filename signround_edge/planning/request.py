"""What `plan` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from signround_edge.evaluation.cache_types import CacheTypes
from signround_edge.planning.budget import Budget
from signround_edge.planning.candidates import Wish
from signround_edge.planning.problem import Types


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        target: "gguf" or "onnx".
        context: tokens that the runtime's cache is to hold.
        wishes: pins and least types.
        types: the types to choose from, joined by commas; None: all of the target.
        calibration: what the sensitivity is measured on, for people.
        seed: of the labels.
        cache_types: of llama.cpp's cache; None: its own.
    """

    target: str
    budget: Budget
    context: int
    wishes: tuple[Wish, ...] = ()
    types: str | None = None
    calibration: str = ""
    seed: int = 0
    cache_types: CacheTypes | None = None


@dataclass(frozen=True)
class Finished:
    """A finished run of the model: its types, and the KL divergence that was measured."""

    types: Types
    kl: float
