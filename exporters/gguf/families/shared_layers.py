"""Layers that take the keys and values of an earlier layer: Gemma 3n and 4."""

from __future__ import annotations

from collections.abc import Iterator

from exporters.gguf.families.row_orders import Config


def sharing_problems(config: Config) -> Iterator[str]:
    """What of a model's sharing llama.cpp does not compute.

    The last layers take the keys and values of the last layer with full attention that has its own, or of the last one
    with a window. llama.cpp counts these as the last and the last but one that share nothing (`llama_model::
    create_memory`), transformers looks for them.
    """
    shared = int(config["num_kv_shared_layers"])
    if not shared:
        return
    kinds = config["layer_types"]
    first = len(kinds) - shared
    places = {"full_attention": first - 1, "sliding_attention": first - 2}
    own = {kind: index for index, kind in enumerate(kinds[:first])}
    if any(own.get(kind) != places[kind] for kind in kinds[first:]):
        yield (
            "shares the keys and values of the last two layers that have their own, one with a window and then one "
            "with full attention, this model has other layer_types there"
        )
