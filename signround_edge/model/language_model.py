"""The language model inside a model that reads more than text: built as a text-only model of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from signround_edge.model.config import write_config

# Text models that transformers has no class of their own for → the architecture that they are as long as there is only
# text: the three position numbers of a token are the same then. The source check shows that they are.
_TEXT_ALONE = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}


def reads_more_than_text(config: Any) -> bool:
    """Whether a transformers config is of a model with a language model inside."""
    return bool(config.get_text_config() is not config)


def text_config(config: Any, tied: bool) -> Any:
    """The config of the language model inside, as a causal language model.

    Args:
        tied: whether the whole model ties its output head to the embedding.
    """
    from transformers import AutoConfig

    text = copy.deepcopy(config.get_text_config())
    alone = _TEXT_ALONE.get(text.model_type)
    if alone is not None:
        settings = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
        rope = dict(settings.get("rope_parameters") or {})
        # Of no use for text; a file that is to be run with the images' part needs them.
        settings["mrope_section"] = rope.pop("mrope_section", None)
        settings["num_deepstack_layers"] = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
        rope.pop("mrope_interleaved", None)
        settings["rope_parameters"] = {**rope, "rope_type": _plain(rope.get("rope_type"))}
        text = AutoConfig.for_model(alone, **settings)
    text.tie_word_embeddings = tied
    return text


def _plain(rope_type: str | None) -> str:
    return "default" if rope_type is None or rope_type == "mrope" else rope_type


def whole_model_class(config: Any) -> Any:
    """transformers' auto class that builds the whole model of a config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if reads_more_than_text(config) and whole else AutoModelForCausalLM


def decoder_of(model: Any) -> nn.Module:
    """The part of a model that holds the decoder blocks: all of it, or the language model inside."""
    if not reads_more_than_text(model.config):
        whole: nn.Module = model
        return whole
    inside: nn.Module = model.get_decoder()
    return inside


def names_inside(whole: Any, text: Any) -> Callable[[str], str | None]:
    """From names of the whole model's tensors to those of its language model built alone; None: not part of it."""
    places = {
        f"{name_of(whole, whole.get_decoder())}.": f"{name_of(text, text.get_decoder())}.",
        f"{name_of(whole, whole.get_output_embeddings())}.": f"{name_of(text, text.get_output_embeddings())}.",
    }

    def translate(name: str) -> str | None:
        for there, here in places.items():
            if name.startswith(there):
                return here + name.removeprefix(there)
        return None

    return translate


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The name of a module in a model."""
    names: dict[nn.Module, str] = {found: name for name, found in model.named_modules()}
    return names[module]


def save_text_config(model: Any, folder: Path) -> None:
    """Write the config of a language model that was built alone, so that it can be built again from `folder`."""
    write_config(folder, {**model.config.to_dict(), "architectures": [type(model).__name__]})
