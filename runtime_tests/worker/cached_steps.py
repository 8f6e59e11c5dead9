"""How a window of text is given to a decoder that keeps states: most of it at once, its end token by token."""

from __future__ import annotations

_STEPS = 8


def cached_parts(count: int) -> list[slice]:
    """The parts of `count` tokens, in order: what is kept between calls counts too, as when a text is generated."""
    steps = min(_STEPS, count - 1)
    return [slice(0, count - steps), *(slice(i, i + 1) for i in range(count - steps, count))]
