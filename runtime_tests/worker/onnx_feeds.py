"""What each input of an ONNX decoder is given: tokens, mask, positions, and the states of an empty past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import TokenArray

NAMED_INPUTS = ("input_ids", "attention_mask", "position_ids")
_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
_DTYPES |= {"tensor(float16)": np.float16}


def feed_of(
    artifact: Path,
    name: str,
    type_: str,
    shape: list[Any],
    tokens: TokenArray,
    decoder: dict[str, Any],
    past: int = 0,
) -> NDArray[Any]:
    """What an input of a decoder is given for int32 [n] tokens; a state is that of an empty past.

    Args:
        artifact: for messages.
        name, type_, shape: of the input; the type as ONNX Runtime says it ("tensor(int64)"), open dimensions as text.
        decoder: `model.decoder` of genai_config.json, which knows sizes that the graph leaves open.
        past: how many tokens came before.
    Raises:
        UserError: the input is none that verify knows.
    """
    dtype = _DTYPES.get(type_)
    if dtype is None:
        raise UserError(f"{artifact}: input {name} has type {type_}, which verify cannot feed")
    if name == "input_ids":
        return tokens.astype(dtype).reshape(1, -1)
    if name == "attention_mask":
        return np.ones((1, past + len(tokens)), dtype=dtype)
    if name == "position_ids":
        positions = np.arange(past, past + len(tokens), dtype=dtype)
        # Three numbers a token in models that also read images.
        return np.broadcast_to(positions, (3,) * (len(shape) - 2) + (1, len(tokens))).copy()
    return np.zeros(_empty_state(artifact, name, shape, decoder), dtype=dtype)


def _empty_state(artifact: Path, name: str, shape: list[Any], decoder: dict[str, Any]) -> tuple[int, ...]:
    """[1, heads, past length 0, values a head] of keys and values; another state leaves only the batch open."""
    if len(shape) > 1 and all(isinstance(size, int) for size in shape[1:]):
        return 1, *shape[1:]
    if len(shape) == 4:
        heads = shape[1] if isinstance(shape[1], int) else decoder.get("num_key_value_heads")
        size = shape[3] if isinstance(shape[3], int) else decoder.get("head_size")
        if isinstance(heads, int) and isinstance(size, int):
            return 1, heads, 0, size
    raise UserError(f"{artifact}: input {name} has the shape {shape}, which is no key-value cache")
