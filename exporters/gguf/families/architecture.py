"""Architecture metadata of the built-in families: what llama.cpp must know besides tensors and tokenizer.

What only one family has is that family's own. Source of the keys: `set_gguf_parameters` of each model in llama.cpp's
conversion/ folder, and `load_arch_hparams` in its src/models/.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf

from exporters.gguf.families.family import TEMPLATE_HINT, Family, sliding_window
from exporters.gguf.families.rope import add_rope, rotary_dims, truncated
from exporters.gguf.families.row_orders import Config
from signround_edge.errors import UserError

_WAY_OUT = "to take what llama.cpp makes of it, give an f16 GGUF made by its convert_hf_to_gguf.py as --template"


def add_architecture(
    writer: gguf.GGUFWriter, family: Family, config: Config, vocab_size: int, log: Callable[[str], None]
) -> None:
    """All `<arch>.*` keys, of a model that `refuse_what_differs` lets pass.

    Args:
        config: as `canonical_config` gives it. Where layers differ, `key_heads_by_layer` and `feed_forward_by_layer`
            have a number for each. `intermediate_size` may be absent where experts are all there is.
    """
    for note in family.notes(config):
        log(note)
    if config.get("hidden_act") == "gelu":
        log("llama.cpp computes GELU by its tanh approximation and this model exactly: logits differ in late digits")
    heads, dim = int(config["num_attention_heads"]), int(config["head_dim"])
    writer.add_vocab_size(vocab_size)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    feed_forward = config.get("feed_forward_by_layer") or config.get("intermediate_size")
    if feed_forward is not None:
        writer.add_feed_forward_length(_counts(feed_forward))
    writer.add_head_count(heads)
    if heads:
        writer.add_head_count_kv(_counts(config.get("key_heads_by_layer") or config["num_key_value_heads"]))
    stated = config["states_head_dim"] or "key_length" in config
    if heads and (stated or dim * heads != int(config["hidden_size"])):
        writer.add_key_length(int(config.get("key_length", dim)))
        writer.add_value_length(int(config.get("value_length", dim)))
    if family.layer_norm:
        writer.add_layer_norm_eps(float(config["norm_eps"]))
    else:
        writer.add_layer_norm_rms_eps(float(config["norm_eps"]))
    if family.rotary:
        add_rope(writer, family, config, log)
    if not family.windows:
        _add_ignored_window(writer, config, log)
    family.keys(writer, config)


def _counts(value: int | list[int]) -> int | list[int]:
    """A count that layers share, or one for each layer where they differ."""
    if not isinstance(value, list):
        return int(value)
    return value[0] if len(set(value)) == 1 else value


def refuse_what_differs(family: Family, config: Config) -> None:
    """UserError when llama.cpp would compute something else than the model of this config.

    Args:
        config: as `canonical_config` gives it.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in family.activations:
        raise UserError(
            f"llama.cpp's {family.name} computes {family.activations[0]}, this model uses {activation!r}; "
            f"{TEMPLATE_HINT}"
        )
    if family.rotary and not family.partial_rotary and rotary_dims(config) != config["head_dim"]:
        raise UserError(f"partial rotary embeddings are not built in for {family.model_type}; {TEMPLATE_HINT}")
    for problem in family.problems(config):
        raise UserError(f"llama.cpp's {family.name} {problem}; {_WAY_OUT}")


def computed_config(family: Family, config: Config) -> Config:
    """Entries of config.json that make transformers' model compute what llama.cpp does, where that differs a little."""
    return {**(truncated(config) if family.rotary else {}), **family.computes(config)}


def _add_ignored_window(writer: gguf.GGUFWriter, config: Config, log: Callable[[str], None]) -> None:
    window = sliding_window(config)
    if window is not None:
        writer.add_sliding_window(window)
        log(
            f"the model attends within a sliding window of {window} tokens; llama.cpp ignores it for this "
            "architecture, so longer contexts differ from the original"
        )
