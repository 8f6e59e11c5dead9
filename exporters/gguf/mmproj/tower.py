"""What a vision tower is: the rows and keys of its mmproj file. One module of this folder describes each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from exporters.gguf.mmproj.preprocessor import Preprocessor
from signround_edge.errors import UserError

Config = dict[str, Any]
Value = bool | int | float | str | list[float] | list[bool]

# Names of SigLIP's encoder layers and of those built after it → llama.cpp's.
SIGLIP_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@dataclass(frozen=True)
class Row:
    """One tensor of the file.

    Attributes:
        hf_name: parameter or buffer of transformers' whole model.
        gguf_name: the tensor's name in the file.
        change: what is stored of it; None takes it as it is.
        is_f32: whether it is stored in f32 whatever its shape is; vectors always are.
    """

    hf_name: str
    gguf_name: str
    change: Callable[[Tensor], Tensor] | None = None
    is_f32: bool = False


@dataclass(frozen=True)
class Source:
    """The checkpoint whose tower is to be described.

    Attributes:
        folder: the model's folder.
        config: config.json as transformers reads it.
        names: parameters and stored buffers of the towers.
        embedding: name of the token embedding.
        preprocessor: how images are prepared.
    """

    folder: Path
    config: Config
    names: frozenset[str]
    embedding: str
    preprocessor: Preprocessor

    @property
    def vision(self) -> Config:
        """The vision tower's config."""
        found: Config = self.config["vision_config"]
        return found

    @property
    def text(self) -> Config:
        """The language model's config."""
        found: Config = self.config["text_config"]
        return found

    def rows(self, hf_name: str, gguf_name: str, is_f32: bool = False) -> Iterator[Row]:
        """Weight and bias of a module, those that there are."""
        for suffix in (".weight", ".bias"):
            if hf_name + suffix in self.names:
                yield Row(hf_name + suffix, gguf_name + suffix, None, is_f32)

    def require(self, what: str, value: object, *known: object) -> None:
        """UserError where the config has a value that llama.cpp does not compute with."""
        if value not in known:
            raise UserError(
                f"{self.folder}: {what} is {value!r}, and llama.cpp computes this tower with "
                f"{' or '.join(map(repr, known))}; leave --mmproj out"
            )


@dataclass(frozen=True)
class Tower:
    """A kind of tower.

    Attributes:
        model_types: of the whole models that have it.
        rows: all tensors of the file.
        keys: metadata besides what every file has.
        sizes: of a config of the vision tower.
        unused: what the names of parameters begin with that llama.cpp has no use for.
    """

    model_types: tuple[str, ...]
    rows: Callable[[Source], Iterator[Row]]
    keys: Callable[[Source], dict[str, Value]]
    sizes: Callable[[Config], Sizes]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Sizes of a vision tower."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    image: int
    patch: int

    @classmethod
    def of(cls, vision: Config) -> Sizes:
        """Those of a config with the usual names."""
        return cls(
            vision["num_hidden_layers"],
            vision["hidden_size"],
            vision["intermediate_size"],
            vision["num_attention_heads"],
            vision["image_size"],
            vision["patch_size"],
        )
