"""A rotated residual stream: another basis for what decoder blocks read and write, the same function.

With Q orthogonal and norms that rescale a token and then its channels by g (RMS norms),

    embedding: E ← E·Q      layers behind a norm: W ← W·diag(g)·Q, g ← 1      layers that write: W ← Qᵀ·W, b ← b·Q

as a norm of h·Q without g is the norm of h, times Q (Ashkboos et al. 2024, arXiv 2401.15024, section 3). The head reads
the final norm, so that a tied one becomes a matrix of its own. No channel stands out afterwards; whether rounding gains
is to be measured (docs/LOG.md: not with blocks of 16 to 128 weights).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from signround_edge.arguments import check_seed
from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_source_model
from signround_edge.files import whole_folder
from signround_edge.model.config import read_config, write_config
from signround_edge.model.decoder import out_in, set_out_in, set_tensor, set_weight, weight_of
from signround_edge.model.source import SourceModel
from signround_edge.schemes.roles import writes_to_stream
from signround_edge.transforms.check import LOGITS_LIMIT, logits_divergence
from signround_edge.transforms.find_folds import trace_norms
from signround_edge.transforms.folds import linear_layers

_TOKENS_TO_CHECK = (2, 64)


def rotate(model: Path, out: Path, seed: int = 0) -> float:
    """Write the model, rotated, as the Hugging Face folder `out`, weights in f32; the whole model is in memory.

    Args:
        seed: of the random rotation; 0 to 2³² − 1.
    Returns:
        Mean KL divergence of the next-token probabilities of `out` from those of `model`, on random tokens.
    Raises:
        UserError: `out` exists, or the model's function would be another one, as with layer norms and with norms
            behind the layers that write; nothing is written then.
    """
    check_seed(seed)
    if out.exists():
        raise UserError(f"{out} exists already; give another -o")
    source = SourceModel.open(model)
    loaded: Any = load_source_model(model)
    config = read_config(model)
    vocabulary = len(loaded.get_input_embeddings().weight)
    tokens = torch.randint(vocabulary, _TOKENS_TO_CHECK, generator=torch.Generator().manual_seed(seed))
    exact = _logits(loaded, tokens)
    _rotate_in_memory(loaded, str(config.get("model_type", "")), tokens, seed)
    with whole_folder(out, "the rotated model") as partial:
        source.copy_config(partial)
        config |= {"tie_word_embeddings": False, "dtype": "float32"}
        config.pop("torch_dtype", None)
        write_config(partial, config)
        save_torch_state_dict(dict(loaded.named_parameters()), partial)
        del loaded
        divergence = logits_divergence(exact, _logits(load_source_model(partial), tokens))
        if not divergence <= LOGITS_LIMIT:
            raise UserError(
                f"{model}: its residual stream cannot be rotated (mean KL divergence {divergence:.1e}, at most "
                f"{LOGITS_LIMIT:.0e} is allowed); that takes plain RMS norms before the layers that read, as Llama, "
                "Mistral and Qwen have them, so quantize it as it is"
            )
    return divergence


def _rotate_in_memory(model: Any, model_type: str, tokens: Tensor, seed: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rotation = random_rotation(embedding.weight.shape[1], seed)
    set_weight(head, weight_of(head).clone())  # no longer the embedding's
    set_weight(embedding, weight_of(embedding) @ rotation)
    _, readers = trace_norms(model, lambda: _logits(model, tokens[:1, :2]))
    for norm, layers in readers.items():
        gain = weight_of(model.get_submodule(norm))
        if len(gain) != len(rotation):  # of a single head
            continue
        for layer in map(model.get_submodule, layers):
            set_out_in(layer, (out_in(layer) * gain) @ rotation)
        set_weight(model.get_submodule(norm), torch.ones_like(gain))
    for name, module in linear_layers(model).items():
        if writes_to_stream(f"{name}.weight", model_type):
            set_out_in(module, rotation.T @ out_in(module))
            bias = module._parameters.get("bias")
            if bias is not None:
                set_tensor(model, f"{name}.bias", nn.Parameter(bias.detach() @ rotation, requires_grad=False))


def random_rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix f32 [size, size]: Q of the QR decomposition of a normal one, made in f64."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation: Tensor = torch.linalg.qr(normal).Q
    return rotation.float()


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits f32 [tokens, vocabulary]."""
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found.flatten(0, 1)
