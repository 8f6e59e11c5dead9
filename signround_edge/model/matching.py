"""Which stored tensors become which tensors of a model, found as transformers finds it, and which cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.errors import UserError
from signround_edge.model.source import SourceModel, is_float, type_name
from signround_edge.model.stored_quantized import dequantizer, scale_of


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that become the tensors of the model together.

    Attributes:
        transform: transformers' `WeightTransform`, without data.
        first: the name that transformers knows it by: that of the first tensor of the model.
        keys: stored name and the pattern of the transform that it matched, in transformers' order.
    """

    transform: Any
    first: str
    keys: list[tuple[str, str]] = field(default_factory=list)

    def run(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name → tensor of the model, of the stored ones by name."""
        transform = deepcopy(self.transform)
        for key, pattern in self.keys:
            transform.add_tensor(self.first, key, pattern, tensors[key])
        config: Any = model.config
        converted = transform.convert(self.first, model=model, config=config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


@dataclass(frozen=True)
class Match:
    """What each stored tensor of a folder becomes.

    Attributes:
        direct: name in transformers' model → stored name, where a tensor is stored as the model has it.
        converted: first name in the model → the stored tensors that are made into it, and into others with it.
        unused: stored names that the model has no use for.
    """

    direct: dict[str, str] = field(default_factory=dict)
    converted: dict[str, Conversion] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def match_names(source: SourceModel, model: Any, wanted: Callable[[str], bool] = lambda name: True) -> Match:
    """What each stored tensor becomes, as `transformers.core_model_loading` does while it loads.

    Args:
        model: transformers' model of the folder, on any device.
        wanted: whether a tensor of the model, by its name, is asked for at all.
    Raises:
        UserError: two tensors that differ are stored for one of the model, or one that the model has in floats is
            stored in integers or fp8 without the scale that makes it floats.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state, base = model.state_dict(), model.base_model_prefix
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    mapping = get_model_conversion_mapping(model, hf_quantizer=dequantizer(source.path))
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = Match()
    renamed: dict[str, str] = {}  # what a stored tensor is before it is converted → its stored name
    of_floats: dict[str, str] = {}
    for key in sorted(source.files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, base, shapes)
        if name not in shapes and key in shapes:
            name, pattern = rename_source_key(key, [], [], base, shapes)
        if name not in shapes or (pattern is None and not wanted(name)):
            found.unused.append(key)
            continue
        alone = name if pattern is None else rename_source_key(key, renamings, [], base, shapes)[0]
        alone = alone.removeprefix(f"{base}.")
        if alone in renamed:
            _refuse_different(source, renamed[alone], key)
            found.unused.append(key)
            continue
        renamed[alone] = key
        if state[name].is_floating_point():
            of_floats[alone] = key
        if pattern is None:
            found.direct[name] = key
        else:
            found.converted.setdefault(name, Conversion(by_pattern[pattern], name)).keys.append((key, pattern))
    for alone, key in of_floats.items():
        _refuse_integers(source, alone, key, renamed)
    return found


def _refuse_different(source: SourceModel, one: str, other: str) -> None:
    # Equal ones are a habit of some converters, and do no harm.
    alike = source.shapes[one] == source.shapes[other] and torch.equal(source.tensor(one), source.tensor(other))
    if not alike:
        raise UserError(
            f"{source.path}: {one} and {other} are two names for one tensor, and differ; remove the one that does not "
            "belong to this checkpoint"
        )


def _refuse_integers(source: SourceModel, alone: str, key: str, renamed: dict[str, str]) -> None:
    """Of a tensor that is floats in the model, known as `alone` among the keys of `renamed`."""
    dtype, scale = source.dtypes[key], scale_of(source.quantized, alone)
    if is_float(dtype) or (source.quantized is not None and (scale in renamed or "scale" in key.rpartition(".")[2])):
        return
    place, kind = source.path / source.files[key], type_name(dtype)
    if scale is None:
        raise UserError(
            f"{place}: tensor {key} is stored as {kind}, so this checkpoint is quantized already; "
            "quantize the original model, in 16- or 32-bit floats"
        )
    leaf = scale.rpartition(".")[2]
    beside = sorted(n for n in source.files if n.startswith(key) and n != key and "scale" in n.removeprefix(key))
    seen = f" ({beside[0]} is there, which transformers does not read)" if beside else ""
    raise UserError(
        f"{place}: tensor {key} is stored as {kind}, but its scale {key.rpartition('.')[0]}.{leaf} is missing{seen}; "
        "download the model again, or quantize the original model, in 16- or 32-bit floats"
    )
