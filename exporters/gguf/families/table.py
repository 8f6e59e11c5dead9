"""The table of built-in families, gathered from the modules of this folder: each with `ROWS` is a family's own."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from exporters.gguf import families
from exporters.gguf.families.family import TEMPLATE_HINT, Family
from exporters.gguf.families.row_orders import Config, RowOrder
from signround_edge.errors import UserError
from signround_edge.model.config import head_dim


def gather() -> dict[str, Family]:
    """model_type → row of every family, in the order of the modules' names."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        if module.name == __name__:
            continue
        rows: tuple[Family, ...] = vars(importlib.import_module(module.name)).get("ROWS", ())
        found |= {row.model_type: row for row in rows}
    return found


FAMILIES = gather()


def family_of(config: Config) -> Family:
    """The built-in family of a config, as `canonical_config` gives it."""
    row = _row_of(config)
    return row.elsewhere(config) or row


def _row_of(config: dict[str, Any]) -> Family:
    """The row of a config's model_type. UserError where there is none, with the way out."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(
            f"no built-in GGUF metadata for architecture {config.get('model_type')!r} (there is for "
            f"{', '.join(sorted(FAMILIES))}); {TEMPLATE_HINT}"
        )
    return family


def canonical_config(config: dict[str, Any]) -> Config:
    """A built-in family's config under one set of names: Llama's, and `norm_eps`, `head_dim`, `num_key_value_heads`.

    `states_head_dim` says whether the config itself has a `head_dim`.

    Missing entries and the older spellings of published configs are read as transformers reads them, since its model is
    what was tuned.

    Raises:
        UserError: a family that is not built in, or a config that transformers refuses.
    """
    from transformers import CONFIG_MAPPING  # late: it takes a second

    row = _row_of(config)
    try:
        # A copy: transformers writes into nested entries.
        known = CONFIG_MAPPING[row.model_type].from_dict(_copied(config))
    except Exception as error:  # its validation raises what it likes
        raise UserError(f"config.json of the run cannot be read ({error}); run `quantize` again") from error
    full: Config = {**config, **known.to_dict()}
    full |= {name: full[spelling] for name, spelling in known.attribute_map.items() if spelling in full}
    full |= family_of(full).derived(full)
    full["num_key_value_heads"] = full.get("num_key_value_heads") or full["num_attention_heads"]
    full["states_head_dim"] = full.get("head_dim") is not None
    full["head_dim"] = head_dim(full)
    if "norm_eps" not in full:
        full["norm_eps"] = full["rms_norm_eps"]
    return full


def _copied(value: Any) -> Any:
    """A deep copy, with infinity and the like as numbers, for which transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def row_order(family: Family, config: Config, hf_name: str, rows: int) -> RowOrder | None:
    """The order in which llama.cpp stores a parameter's rows, or None when it is Hugging Face's."""
    projection = hf_name.rpartition(".")[0].rpartition(".")[2]
    return family.order(config, projection, rows)
