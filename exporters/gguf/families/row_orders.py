"""The orders in which llama.cpp stores the rows of attention projections. Rows move whole, so codes move with them.

Source: `LlamaModel.permute` in llama.cpp's conversion/llama.py, and `modify_tensors` in its gpt_neox.py, bloom.py and
falcon.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RowOrder = NDArray[np.intp]
Config = dict[str, Any]


def interleaved_rows(rows: int, heads: int, rotated: int | None = None) -> RowOrder:
    """Row order of q or k for rotation of neighbouring pairs: stored row i is Hugging Face's row order[i].

    The first and second half of what is rotated of each head are interleaved.

    Args:
        rotated: rows of a head that are rotated, its first; None for all.
    """
    order = np.arange(rows, dtype=np.intp).reshape(heads, -1)
    pairs = order[:, :rotated].reshape(heads, 2, -1)
    return np.concatenate([pairs.swapaxes(1, 2).reshape(heads, -1), order[:, pairs[0].size :]], axis=1).reshape(-1)


def grouped_rows(rows: int, groups: int, dim: int) -> RowOrder:
    """Row order of a fused projection that holds, group by group, its query heads, one key head and one value head.

    Stored are all queries, then all keys, then all values.

    Args:
        rows: rows of the projection.
        groups: number of groups (key heads).
        dim: values a head.
    """
    order = np.arange(rows, dtype=np.intp).reshape(groups, -1, dim)
    return np.concatenate([order[:, :-2].reshape(-1), order[:, -2].reshape(-1), order[:, -1].reshape(-1)])


def same_order(config: Config, projection: str, rows: int) -> RowOrder | None:
    """llama.cpp keeps Hugging Face's order."""
    return None


def grouped_order(config: Config, projection: str, rows: int) -> RowOrder | None:
    """The fused projections of GPT-NeoX, BLOOM (a group is one head) and Falcon."""
    if projection != "query_key_value":
        return None
    return grouped_rows(rows, int(config["num_key_value_heads"]), int(config["head_dim"]))
