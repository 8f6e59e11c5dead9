"""In which type a runtime keeps keys and values: a budget may have been counted with a quantized cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from signround_edge.errors import UserError

# Of llama.cpp's, those that phones use: 16, 8.5 and 4.5 bits.
CACHE_TYPES = ("f16", "q8_0", "q4_0")
DEFAULT_CACHE_TYPE = "f16"


@dataclass(frozen=True)
class CacheTypes:
    """Types of llama.cpp's KV cache (`--cache-type-k`, `--cache-type-v`)."""

    k: str = DEFAULT_CACHE_TYPE
    v: str = DEFAULT_CACHE_TYPE

    @staticmethod
    def of(k: str | None, v: str | None) -> CacheTypes | None:
        """None where neither is given: the runtime's own. UserError for a type that is not offered."""
        for flag, given in (("--cache-type-k", k), ("--cache-type-v", v)):
            if given is not None and given not in CACHE_TYPES:
                raise UserError(
                    f"{flag} {given} is not offered; give {', '.join(CACHE_TYPES[:-1])} or {CACHE_TYPES[-1]}"
                )
        if k is None and v is None:
            return None
        return CacheTypes(k or DEFAULT_CACHE_TYPE, v or DEFAULT_CACHE_TYPE)

    @property
    def text(self) -> str:
        """For a person. A quantized V asks for flash attention."""
        flash = "" if self.v == DEFAULT_CACHE_TYPE else ", with flash attention"
        return f"KV cache: K in {self.k}, V in {self.v}{flash}"


@runtime_checkable
class TakesCacheTypes(Protocol):
    """A runtime whose cache of keys and values may have other types than its own."""

    def with_cache(self, types: CacheTypes) -> Any:
        """The same runtime with these."""
        ...
