"""A checkpoint's tensors under the names and in the shapes that transformers' model has, found as transformers does.

Published checkpoints store other names than the modules have ("block_sparse_moe", "w1", fused or split projections).
transformers' own conversion mapping says what becomes what; here it is run on names and shapes first, and on data one
tensor at a time, when it is asked for.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.errors import UserError, first_line
from signround_edge.model.config import own_code
from signround_edge.model.decoder import Decoder, build_decoder, set_tensor, whole_model
from signround_edge.model.language_model import name_of, names_inside, reads_more_than_text
from signround_edge.model.matching import Conversion, match_names
from signround_edge.model.missing import missing_tensors
from signround_edge.model.source import SourceModel

_KEPT = 2  # converted tensors kept in memory: experts are asked for one by one, of a layer's two fused parameters


@dataclass
class ModelWeights:
    """The tensors of a model folder, for its decoder.

    Attributes:
        source: the folder as stored.
        decoder: the model; its head is tied to the embedding where the files say so, as transformers does it.
        unused: stored names that the model has no use for.
        untied: whether config.json ties head and embedding, and the files hold a different head.
    """

    source: SourceModel
    decoder: Decoder
    unused: list[str] = field(default_factory=list)
    untied: bool = False
    _direct: dict[str, str] = field(default_factory=dict)
    _converted: dict[str, Conversion] = field(default_factory=dict)
    _dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    _stored_as: dict[str, str] = field(default_factory=dict)
    _kept: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)

    @classmethod
    def open(cls, path: Path) -> ModelWeights:
        """Read the headers and find every tensor of the model; UserError where one is missing or of another shape."""
        return cls.of(SourceModel.open(path), build_decoder(path))

    @classmethod
    def of(cls, source: SourceModel, decoder: Decoder) -> ModelWeights:
        """The same of a source that is open and a decoder that is built."""
        weights = cls(source, decoder)
        weights._match()
        weights._tie()
        missing = [n for n, _ in weights.decoder.model.named_parameters() if weights._whole(n) not in weights._dtypes]
        if missing:
            head = f"{name_of(decoder.model, decoder.head)}.weight"
            raise missing_tensors(source, [weights._whole(name) for name in missing], weights.unused, head)
        return weights

    def tensor(self, name: str) -> Tensor:
        """A parameter or stored buffer of the model in the dtype of the file; a buffer that is not there as built."""
        part, whole = self.decoder.experts.get(name), self._whole(name)
        if whole in self._direct:
            stored = self._direct[whole]
            return self.source.tensor(stored) if part is None else part.oriented(self.source.tensor(stored, part.index))
        if whole not in self._converted:
            return self.decoder.model.get_buffer(name)
        if whole not in self._kept:
            self._convert(self._converted[whole])
        self._kept.move_to_end(whole)
        return self._kept[whole] if part is None else part.of(self._kept[whole])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter or buffer in the file."""
        return self._dtypes.get(self._whole(name), torch.float32)

    def load(self, module: nn.Module, prefix: str, device: torch.device, deep: bool = True) -> None:
        """Load parameters and stored buffers of a module as f32 on `device`, and move its other buffers there.

        Args:
            prefix: name of the module in the model, with a final dot, or "".
            deep: those of its children, too.
        """
        for owner_name, owner in module.named_modules() if deep else [("", module)]:
            for leaf in [*owner._parameters, *owner._buffers]:
                name = prefix + (f"{owner_name}.{leaf}" if owner_name else leaf)
                held = owner._parameters.get(leaf, owner._buffers.get(leaf))
                if held is not None and (leaf in owner._parameters or self._whole(name) in self._dtypes):
                    set_tensor(owner, leaf, self.tensor(name).to(device, torch.float32))
            owner._buffers.update({leaf: b if b is None else b.to(device) for leaf, b in owner._buffers.items()})

    def notes(self) -> list[str]:
        """What is left out or read otherwise than one might think, a line each."""
        lines: list[str] = []
        config: Any = self.decoder.model.config
        adapters = [name for name in self.source.ignored_files if name.startswith("adapter_model")]
        if adapters:
            lines.append(
                f"warning: {', '.join(adapters)}: PEFT's adapter beside the model is not applied; merge it first "
                "(`merge_and_unload()`) where it is meant"
            )
        if others := [name for name in self.source.ignored_files if name not in adapters]:
            files = ", ".join(others)
            lines.append(f"note: {files}: not read, as transformers loads {sorted(set(self.source.files.values()))[0]}")
        if code := own_code(self.source.path):
            lines.append(
                f"note: the checkpoint brings code of its own ({', '.join(code)}), which is not run: the model is "
                f"transformers' {type(self._whole_model).__name__}"
            )
        if self.source.quantized is not None:
            lines.append(f"note: the checkpoint is stored in {self.source.quantized}; transformers dequantizes it")
        if self.is_inside:
            lines.append(
                f"note: of {type(self._whole_model).__name__} the language model is quantized, as {config.model_type} "
                "and for text; its towers for images and sound stay as they are in the checkpoint"
            )
        lora = [name for name in self.unused if ".lora_" in name]
        if lora:
            lines.append(
                f"warning: {len(lora)} LoRA weights beside the matrices ({lora[0]}) are not applied; merge them first "
                "(`merge_and_unload()`) where they are meant"
            )
        lines += self._about_blocks()
        said = {*lora, *(name for name in self.unused if self._block_beyond(name) is not None)}
        if not self.is_inside and (rest := [name for name in self.unused if name not in said]):
            kinds = Counter(re.sub(r"\d+", "*", name) for name in rest)
            shown = ", ".join(list(kinds)[:4]) + (", …" if len(kinds) > 4 else "")
            lines.append(
                f"note: {config.model_type} has no use for {len(rest)} of the checkpoint's tensors, which are "
                f"left out: {shown}"
            )
        if self.untied:
            lines.append(
                "note: config.json ties the output head to the embedding, but the checkpoint holds another head, which "
                "is kept, as transformers does"
            )
        return lines

    def _about_blocks(self) -> list[str]:
        beyond = [index for name in self.unused if (index := self._block_beyond(name)) is not None]
        if not beyond:
            return []
        config: Any = self.decoder.model.config
        depth, blocks = len(self.decoder.blocks), sorted(set(beyond))
        # Blocks that guess further tokens (DeepSeek-V3, GLM-4.5) are none that transformers has.
        guessing = len(blocks) <= (config.to_dict().get("num_nextn_predict_layers") or 0)
        which = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"
        return [
            f"{'note' if guessing else 'warning'}: {which} of the checkpoint ({len(beyond)} tensors) left out, as "
            f"config.json says that the model has {depth} blocks (num_hidden_layers)"
        ]

    def _block_beyond(self, name: str) -> int | None:
        """The block that a stored tensor is of, where the model has fewer; of towers for images there is no telling."""
        if self.is_inside:
            return None
        found = re.search(rf"(?:^|\.){re.escape(self.decoder.prefix.rpartition('.')[2])}\.(\d+)\.", name)
        index = -1 if found is None else int(found[1])
        return index if index >= len(self.decoder.blocks) else None

    @functools.cached_property
    def _whole_model(self) -> Any:
        """transformers' model of the folder, not taken apart."""
        return whole_model(self.source.path)

    @functools.cached_property
    def _own_name(self) -> Callable[[str], str | None]:
        """From names of the whole model to those of the decoder's, None for what is no part of it."""
        whole = self._whole_model
        if not reads_more_than_text(whole.config):
            return lambda name: name
        return names_inside(whole, self.decoder.model)

    @property
    def is_inside(self) -> bool:
        """Whether the model is the language model of one that reads more than text."""
        return reads_more_than_text(self._whole_model.config)

    @property
    def outer_type(self) -> str | None:
        """model_type of the model that reads more than text, whose language model this is; None for all others."""
        return str(self._whole_model.config.model_type) if self.is_inside else None

    def _whole(self, name: str) -> str:
        """The name of the tensor of transformers' model that holds it, of two that are tied the one that is stored."""
        part = self.decoder.experts.get(name)
        whole = name if part is None else part.fused
        return self._stored_as.get(whole, whole)

    def _match(self) -> None:
        """Find what each stored tensor becomes, and whether it has the shape that the model asks for."""
        found = match_names(self.source, self._whole_model, lambda name: self._own_name(name) is not None)
        self.unused += found.unused
        for whole_name, key in found.direct.items():
            name = self._own_name(whole_name) or whole_name
            self._direct[name] = key
            self._dtypes[name] = self.source.dtypes[key]
            self._check_shape(name, self.source.shapes[key])
        for conversion in found.converted.values():
            self._try(conversion)

    def _try(self, conversion: Conversion) -> None:
        """Run a conversion without data: what comes out, and in which shapes."""
        keys = [key for key, _ in conversion.keys]
        empty = {k: torch.empty(self.source.shapes[k], dtype=self.source.dtypes[k], device="meta") for k in keys}
        try:
            made = conversion.run(self._whole_model, empty)
        except Exception as error:  # whatever transformers' operations raise on shapes that do not fit together
            raise UserError(
                f"{self.source.path}: {keys[0]} and {len(keys) - 1} others cannot be made into {conversion.first} "
                f"({first_line(error)}); weights and config are not of the same model"
            ) from error
        for whole_name, tensor in made.items():
            name = self._own_name(whole_name)
            if name not in self.decoder.stored:
                self.unused.append(whole_name)
                continue
            self._check_shape(name, tuple(tensor.shape))
            self._converted[name] = conversion
            self._dtypes[name] = tensor.dtype

    def _convert(self, conversion: Conversion) -> None:
        tensors = {key: self.source.tensor(key) for key, _ in conversion.keys}
        found = conversion.run(self._whole_model, tensors)
        made = {self._own_name(name) or name: tensor for name, tensor in found.items()}
        while self._kept and len(self._kept) + len(made) > max(_KEPT, len(made)):
            self._kept.popitem(last=False)
        self._kept.update(made)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = self.decoder.stored[name]
        if shape != expected:
            raise UserError(
                f"{self.source.path}: tensor {name} is {list(shape)} but config.json asks for {list(expected)}; "
                "weights and config are not of the same model"
            )

    def _tie(self) -> None:
        """Settle which parameters share data, as transformers does: two that are stored and differ do not."""
        model = self.decoder.model
        for alias, owner in self.decoder.tied_parameters().items():
            if alias in self._dtypes and owner in self._dtypes:
                if not torch.equal(self.tensor(alias), self.tensor(owner)):
                    own = nn.Parameter(torch.empty_like(model.get_parameter(alias)), requires_grad=False)
                    set_tensor(model, alias, own)
                    self.untied = True
            elif alias in self._dtypes:
                self._stored_as[owner] = alias
            else:
                self._stored_as[alias] = owner
