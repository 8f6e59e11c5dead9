"""Checkpoints that are quantized as they are stored: fp8 and MXFP4 are dequantized by transformers, others refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from signround_edge.errors import UserError
from signround_edge.model.config import CONFIG_FILE, read_config

# quant_method of config.json → transformers' class of settings, which has the option `dequantize`.
_DEQUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def quantization_method(folder: Path) -> str | None:
    """How the tensors of a model folder are stored, "fp8" or "mxfp4"; None where they are plain floats.

    Raises:
        UserError: config.json names another method, whose integers nobody here turns into weights.
    """
    settings = _settings(read_config(folder))
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise UserError(
            f"{folder / CONFIG_FILE}: its quantization_config is {settings!r} and no JSON object; remove the entry "
            "where the weights are 16- or 32-bit floats, else quantize the original model"
        )
    method = str(settings.get("quant_method", "an unnamed method"))
    if method not in _DEQUANTIZED:
        raise UserError(
            f"{folder / CONFIG_FILE}: its quantization_config says that this checkpoint is quantized "
            f"already ({method}); quantize the original model, in 16- or 32-bit floats"
        )
    return method


def dequantizing_settings(folder: Path) -> Any | None:
    """transformers' quantization settings with which a folder's tensors are loaded as floats; None where they are."""
    method = quantization_method(folder)
    if method is None:
        return None
    import transformers

    settings = dict(_settings(read_config(folder)) or {})
    settings.pop("quant_method")
    return getattr(transformers, _DEQUANTIZED[method])(**{**settings, "dequantize": True})


def dequantizer(folder: Path) -> Any | None:
    """transformers' `HfQuantizer` for such a folder; None where its tensors are floats."""
    settings = dequantizing_settings(folder)
    if settings is None:
        return None
    from transformers.quantizers import AutoHfQuantizer

    return AutoHfQuantizer.from_config(settings, pre_quantized=True)


def scale_of(method: str | None, name: str) -> str | None:
    """What the scale of a tensor is called, by the names that transformers gives them first; None: it has none.

    Args:
        method: as `quantization_method` says it.
    """
    stem, _, leaf = name.rpartition(".")
    if method == "mxfp4" and leaf.endswith("_blocks"):
        return f"{stem}.{leaf.removesuffix('_blocks')}_scales"
    return f"{name}_scale_inv" if method == "fp8" and "scale" not in leaf else None


def _settings(config: dict[str, Any]) -> Any | None:
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        found = level.get("quantization_config")
        if found is not None:
            return found
    return None
