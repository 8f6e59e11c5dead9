"""genai_config.json for a traced graph: what onnxruntime-genai 0.18.0 asks of a decoder.

The builder's file (onnxruntime_genai/models/builders/base.py, `make_genai_config`) is the model; the type is the
runtime's word for a decoder that needs nothing special.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters.onnx.builder_classes import GENAI_CONFIG
from exporters.onnx.routes.graph import MODEL_FILE
from exporters.onnx.routes.traced_cache import State
from signround_edge.errors import UserError
from signround_edge.model.config import longest_window, read_config
from signround_edge.model.tokenizer import GENERATION_CONFIG_FILE, end_tokens, load_tokenizer

_TYPE = "decoder"
_CONTEXT = 2048  # where config.json names no longest text
# Of generation_config.json, with the builder's values where that says nothing.
_SEARCH = {"do_sample": False, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
_STATE_NAMES = {"key": "key_names", "value": "value_names", "conv": "conv_names", "recurrent": "recurrent_names"}


def write_genai_config(folder: Path, states: Sequence[State], vocab_size: int) -> None:
    """Write the file beside the run's config and tokenizer files.

    Args:
        folder: holds them.
        states: the graph's.
        vocab_size: values of the logits.
    """
    context = longest_window(folder) or _CONTEXT
    generation = _generation_config(folder)
    search = {name: generation.get(name, value) for name, value in _SEARCH.items()}
    content = {
        "model": {
            **_special_tokens(folder, generation),
            "context_length": context,
            "decoder": _decoder(folder, states),
            "type": _TYPE,
            "vocab_size": vocab_size,
        },
        # The graph's keys and values grow, so their buffers cannot be those of the step before.
        "search": {
            **search,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
    (folder / GENAI_CONFIG).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _decoder(folder: Path, states: Sequence[State]) -> dict[str, Any]:
    config = read_config(folder)
    config = config.get("text_config") or config
    heads, _, size = next((s.shape for s in states if s.grows), (1, 0, 1))
    layers = 1 + max(s.layer for s in states)
    kinds = dict.fromkeys(s.kind for s in states)
    past = {f"past_{_STATE_NAMES[kind]}": _template([s.past for s in states if s.kind == kind]) for kind in kinds}
    present = {
        f"present_{_STATE_NAMES[kind]}": _template([s.present for s in states if s.kind == kind]) for kind in kinds
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": size,
        "hidden_size": config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **past},
        "outputs": {"logits": "logits", **present},
        "num_attention_heads": config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 0,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
    }
    if "conv" in kinds and "recurrent" not in kinds:  # it then asks where convolutions are, and how long their states
        convolutions = {s.layer: s.shape[-1] for s in states if s.kind == "conv"}
        decoder["layer_types"] = ["conv" if n in convolutions else "full_attention" for n in range(layers)]
        decoder["conv_cache_size"] = max(convolutions.values())
    return decoder


def _template(names: list[str]) -> str:
    """ "present.3.key" → "present.%d.key"."""
    start, _, end = names[0].split(".")
    return f"{start}.%d.{end}"


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / GENERATION_CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); repair or remove it") from error
    return {name: value for name, value in content.items() if value is not None}


def _special_tokens(folder: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """Ids of BOS, EOS and padding; the runtime asks for all three, also of a model that has fewer."""
    config = read_config(folder)
    places: list[dict[str, Any]] = [generation, config, config.get("text_config") or {}]
    try:
        tokenizer = load_tokenizer(folder)
        places.append({"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})
    except UserError:  # onnxruntime-genai then has no tokenizer either, and takes tokens
        pass
    ends = list(end_tokens(folder).ids)
    last = places[-1].get("eos_token_id")
    if isinstance(last, int) and last not in ends:  # chat models end a turn with it
        ends.insert(0, last)
    ends = ends or [0]
    bos = next((p["bos_token_id"] for p in places if isinstance(p.get("bos_token_id"), int)), ends[0])
    pad = next((p["pad_token_id"] for p in places if isinstance(p.get("pad_token_id"), int)), ends[0])
    return {"bos_token_id": bos, "eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": pad}
