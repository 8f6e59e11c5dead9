"""Attention by blocks of queries: the same values and gradients as torch's, and the cases it must hand over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, MistralConfig

from signround_edge.tuning.cpu import attention
from signround_edge.tuning.cpu.attention import NAME, attention_forward, causal_attention, use_blocked_attention


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (9, 3), (6, 1)])
@pytest.mark.parametrize("length", [1, 63, 64, 129, 300])
def test_values_and_gradients_are_those_of_torch(heads: int, key_heads: int, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(2, h, length, 16, generator=generator) for h in (heads, key_heads, key_heads)]
    weights = torch.randn(2, heads, length, 16, generator=generator)

    def gradients(ours: bool) -> tuple[Tensor, list[Tensor | None]]:
        query, key, value = (x.clone().requires_grad_() for x in made)
        if ours:
            output = causal_attention(query, key, value, 0.3)
        else:
            output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
        (output * weights).sum().backward()
        return output.detach(), [query.grad, key.grad, value.grad]

    (found, slopes), (expected, expected_slopes) = gradients(True), gradients(False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for slope, other in zip(slopes, expected_slopes, strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-4, atol=1e-5)


def test_sliding_windows_are_handed_to_torch() -> None:
    """Mistral with a window shorter than the text comes with a mask, which plain causality would ignore."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tokens = torch.arange(40).view(1, -1)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        use_blocked_attention(model, torch.device("cpu"))
        assert model.config._attn_implementation == NAME
        found = model(tokens, use_cache=False).logits
        short = model(tokens[:, :8], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(short, expected[:, :8], rtol=1e-4, atol=1e-5)


def test_too_many_probabilities_are_handed_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MAX_PROBABILITIES", 0)
    monkeypatch.setattr(attention, "causal_attention", lambda *_: pytest.fail("must not be called"))
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    x = torch.randn(1, 2, 8, 4)
    found, _ = attention_forward(module, x, x, x, None)
    expected = scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_models_without_torchs_attention_keep_their_own() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    use_blocked_attention(model, torch.device("cpu"))
    assert model.config._attn_implementation == "eager"
