"""What a built-in model family is: how a Hugging Face `model_type` appears in GGUF. Also what several families share.

Source of all facts: llama.cpp's Hugging Face converter (conversion/<family>.py) and its graphs (src/models/<arch>.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf

from exporters.gguf.families.row_orders import Config, RowOrder, same_order
from exporters.gguf.functions import Function

SILU = ("silu", "swish")
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
RELU_SQUARED = ("relu2",)
NO_OUTPUT_BIAS = (".o_proj.bias", ".gate_proj.bias", ".up_proj.bias", ".down_proj.bias")

TEMPLATE_HINT = "make an f16 GGUF with llama.cpp's convert_hf_to_gguf.py and give it as --template"


def no_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    """The family has no metadata of its own."""


def no_problems(config: Config) -> Iterator[str]:
    """llama.cpp computes every model of the family, and as the model does."""
    return iter(())


@dataclass(frozen=True)
class Stored:
    """How a parameter is stored where it is not as it stands under the name that gguf's table has for it.

    A parameter may be stored in several tensors; parameters that name the same tensor follow one another in it.

    Attributes:
        name: the tensor's name in the file; None: the name that gguf's table has for the parameter.
        rows, columns, shape, transposed, function: as in `placement.Piece` and `placement.Placement`; a shape of None
            is the parameter's own, with the number of experts in front where it has one for each.
        stacked: the parameters that name this tensor are its matrices, and not rows of one.
    """

    name: str | None = None
    rows: RowOrder | None = None
    columns: RowOrder | None = None
    shape: tuple[int, ...] | None = None
    transposed: bool = False
    function: Function | None = None
    stacked: bool = False


def as_named(config: Config, hf_name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    """Every parameter of the family is stored under the name that gguf's table has for it."""
    return None


def as_the_model(config: Config) -> Config:
    """llama.cpp computes what config.json says."""
    return {}


def none_unread(config: Config) -> dict[str, tuple[int, ...]]:
    """llama.cpp reads every tensor that it demands."""
    return {}


@dataclass(frozen=True)
class Family:
    """One `model_type`. A config is given to its functions as `table.canonical_config` makes it.

    Attributes:
        model_type: `model_type` of config.json.
        arch: llama.cpp's architecture.
        order: in which order the rows of a projection are stored.
        derived: entries of the config under the names that Llama uses, for configs that spell them otherwise.
        keys: writes the metadata that only this family has.
        problems: what of a model llama.cpp's graph does not compute, each as a clause to follow the graph's name.
        notes: what llama.cpp computes a little otherwise, each as a sentence.
        computes: entries of config.json with which transformers' model computes that, where there are such.
        layer_norm: LayerNorm rather than RMSNorm.
        rotary: positions enter by rotation.
        partial_rotary: llama.cpp's graph can rotate the first part of a head only.
        rope_scalings: kinds of scaled rotation that llama.cpp's graph computes, besides those that all graphs do;
            "mscale" is YaRN whose mscale scales attention, and no other YaRN; "mscale_all_dim" is YaRN with that
            entry, "betas" YaRN with other betas than 32 and 1.
        windows: llama.cpp's graph has sliding windows.
        activations: names of the feed-forward activation that llama.cpp's graph computes.
        norm_added: the file's norm weights hold 1 + the model's (Gemma's norms multiply by that).
        without: endings of parameters that have a GGUF name but no place in llama.cpp's graph.
        stored: how a parameter ([out, in] shape; of experts the name without a number) is stored, or None where it is
            as it stands under the name that gguf's table has for it.
        elsewhere: the row for models of this type that llama.cpp has another architecture for, None for all others.
        respelled: (part of a parameter's name, how gguf's table spells it), for names that the table lacks.
        unread: name and shape of tensors that llama.cpp demands and does not read, where the model has none; zeros.
        tokenizer: llama.cpp's kind of tokenizer, where the architecture has one of its own.
    """

    model_type: str
    arch: gguf.MODEL_ARCH
    order: Callable[[Config, str, int], RowOrder | None] = same_order
    derived: Callable[[Config], Config] = lambda config: {}
    keys: Callable[[gguf.GGUFWriter, Config], None] = no_keys
    problems: Callable[[Config], Iterator[str]] = no_problems
    notes: Callable[[Config], Iterator[str]] = no_problems
    computes: Callable[[Config], Config] = as_the_model
    layer_norm: bool = False
    rotary: bool = True
    partial_rotary: bool = False
    rope_scalings: tuple[str, ...] = ()
    windows: bool = False
    activations: tuple[str, ...] = SILU
    norm_added: bool = False
    without: tuple[str, ...] = ()
    stored: Callable[[Config, str, tuple[int, ...]], tuple[Stored, ...] | None] = as_named
    respelled: tuple[tuple[str, str], ...] = ()
    elsewhere: Callable[[Config], Family | None] = lambda config: None
    unread: Callable[[Config], dict[str, tuple[int, ...]]] = none_unread
    tokenizer: str | None = None

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


def sliding_window(config: Config) -> int | None:
    """The attention window, where the model really uses one shorter than its context."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None
    return int(window) if int(window) < int(config["max_position_embeddings"]) else None


def add_shared_expert(writer: gguf.GGUFWriter, config: Config) -> None:
    """Sizes of experts as Qwen's configs spell them: those chosen from, and the one that every token is given to."""
    add_expert_counts(writer, config)
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    writer.add_expert_shared_feed_forward_length(int(config["shared_expert_intermediate_size"]))


def add_expert_counts(writer: gguf.GGUFWriter, config: Config) -> None:
    """How many experts a layer has, and how many of them a token is given to."""
    count = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    writer.add_expert_count(int(count))
    writer.add_expert_used_count(int(config["num_experts_per_tok"]))
