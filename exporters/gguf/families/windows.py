"""Sliding windows in most layers and full attention in every p-th: Gemma 2 and 3, OLMo 3."""

from __future__ import annotations

import gguf

from exporters.gguf.families.row_orders import Config


def window_period(config: Config) -> int | None:
    """p when layers p, 2p, … (counted from 1) have full attention and all others a sliding window, else None.

    1 means that no layer has a window.
    """
    return full_attention_period(config, "sliding_attention")


def full_attention_period(config: Config, others: str) -> int | None:
    """The same, with the kind of layer that all others must be."""
    kinds = config["layer_types"]
    for period in range(1, len(kinds) + 2):
        if kinds == [others if (i + 1) % period else "full_attention" for i in range(len(kinds))]:
            return period
    return None


def add_windows(writer: gguf.GGUFWriter, config: Config) -> None:
    """The keys of the window, where a layer has one: the pattern as a period, which Gemma's graphs read."""
    period = window_period(config)
    if period is not None and period > 1:
        writer.add_sliding_window(int(config["sliding_window"]))
        writer.add_sliding_window_pattern(period)
