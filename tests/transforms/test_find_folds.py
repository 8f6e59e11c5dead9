"""Folds are found in every family of architectures, and what is none is not taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support import SIZES, TOKENS, save_random_model
from torch import Tensor, nn

from signround_edge.evaluation.torch_models import load_source_model
from signround_edge.model.decoder import build_decoder
from signround_edge.schemes.roles import head_size
from signround_edge.transforms.block_transform import BlockTransform
from signround_edge.transforms.check import LOGITS_LIMIT, logits_divergence
from signround_edge.transforms.find_folds import find_folds
from signround_edge.transforms.folds import Fold

QKV = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
LLAMA_LIKE = [
    f"input_layernorm → {QKV}",
    "post_attention_layernorm → mlp.gate_proj, mlp.up_proj",
    "self_attn.v_proj → self_attn.o_proj",
    "mlp.up_proj → mlp.down_proj",
]
GEMMA = [LLAMA_LIKE[0], LLAMA_LIKE[1].replace("post_attention", "pre_feedforward"), *LLAMA_LIKE[2:]]
# GELU stands between the layers of an MLP, and BLOOM's and GPT-NeoX' values lie between queries and keys head by head.
FAMILIES: dict[str, tuple[transformers.PretrainedConfig, list[str]]] = {
    "llama": (transformers.LlamaConfig(**SIZES), LLAMA_LIKE),
    "qwen2": (transformers.Qwen2Config(**SIZES), LLAMA_LIKE),
    "qwen3": (transformers.Qwen3Config(**SIZES, head_dim=32), LLAMA_LIKE),
    "gemma2": (transformers.Gemma2Config(**SIZES, head_dim=16), GEMMA),
    "gemma3": (transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=16), GEMMA),
    "phi3": (
        transformers.Phi3Config(**SIZES, **TOKENS),
        [
            "input_layernorm → self_attn.qkv_proj",
            "post_attention_layernorm → mlp.gate_up_proj",
            "self_attn.qkv_proj → self_attn.o_proj",
            "mlp.gate_up_proj → mlp.down_proj",
        ],
    ),
    "mixtral": (transformers.MixtralConfig(**SIZES, num_local_experts=4), [LLAMA_LIKE[0], LLAMA_LIKE[2]]),
    "opt": (
        transformers.OPTConfig(
            hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
            word_embed_proj_dim=64, **TOKENS,
        ),
        [
            "self_attn_layer_norm → self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
            "final_layer_norm → fc1",
            "self_attn.v_proj → self_attn.out_proj",
            "fc1 → fc2",  # ReLU: max(x/s, 0) = max(x, 0)/s
        ],
    ),
    "gpt2": (
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, **TOKENS),
        ["ln_1 → attn.c_attn", "ln_2 → mlp.c_fc", "attn.c_attn → attn.c_proj"],
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
        ),
        ["input_layernorm → attention.query_key_value", "post_attention_layernorm → mlp.dense_h_to_4h"],
    ),
    "bloom": (
        transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128),
        ["input_layernorm → self_attention.query_key_value", "post_attention_layernorm → mlp.dense_h_to_4h"],
    ),
    "falcon": (
        transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128),
        [
            "input_layernorm → self_attention.query_key_value, mlp.dense_h_to_4h",
            "self_attention.query_key_value → self_attention.dense",
        ],
    ),
}  # fmt: skip


class LastBlock:
    """The last block of a loaded model and how the model calls it."""

    def __init__(self, config: transformers.PretrainedConfig, folder: Path) -> None:
        model_dir = save_random_model(config, folder / "model")
        self.model = load_source_model(model_dir)
        blocks = self.model.get_submodule(build_decoder(model_dir).prefix)
        self.block: nn.Module = list(blocks.children())[-1]
        self.head_size = head_size(config)
        seen: list[tuple[tuple[object, ...], dict[str, object]]] = []
        hook = self.block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        tokens = torch.arange(24).unsqueeze(0) % 100
        with torch.no_grad():
            self.model(input_ids=tokens, use_cache=False)
        hook.remove()
        (self.inputs, *self.args), self.kwargs = seen[0]

    def run(self) -> Tensor:
        assert isinstance(self.inputs, Tensor)
        with torch.no_grad():
            output = self.block(self.inputs.clone(), *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def folds(self) -> list[Fold]:
        return find_folds(self.block, self.run, self.inputs, self.head_size)

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=torch.arange(24).unsqueeze(0) % 100, use_cache=False).logits[0]


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_each_family_has_the_folds_that_its_architecture_allows(family: str, tmp_path: Path) -> None:
    config, expected = FAMILIES[family]
    assert [str(fold) for fold in LastBlock(config, tmp_path).folds()] == expected


def test_folding_leaves_the_logits_and_changes_every_parameter_that_it_names(family: str, tmp_path: Path) -> None:
    block = LastBlock(FAMILIES[family][0], tmp_path)
    before, expected = dict(block.block.named_parameters()), block.logits()
    transform = BlockTransform()
    for fold in block.folds():
        scales = torch.rand(fold.channels, generator=torch.Generator().manual_seed(1)) + 0.5
        transform = transform.with_fold(block.block, fold, scales)
    transform.install(block.block)
    assert abs(logits_divergence(expected, block.logits())) < LOGITS_LIMIT
    changed = {n for n, p in block.block.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {*transform.scales, *transform.vectors}
    assert {f"{name}.weight" for fold in block.folds() for name in fold.consumers} <= changed


def test_folds_of_the_same_channels_follow_one_another(family: str, tmp_path: Path) -> None:
    """As those of two transforms do: row scales, norm weights and biases are multiplied, not replaced."""
    block = LastBlock(FAMILIES[family][0], tmp_path)
    with torch.no_grad():
        for name, parameter in block.block.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    expected = block.logits()
    transform = BlockTransform()
    for fold in block.folds() * 2:
        transform = transform.with_fold(block.block, fold, torch.linspace(0.5, 2, fold.channels))
    transform.install(block.block)
    assert abs(logits_divergence(expected, block.logits())) < LOGITS_LIMIT


def test_what_is_no_fold_would_change_the_logits(tmp_path: Path) -> None:
    """The figure by which candidates are judged does tell: a reader of the norm that is left out shows."""
    block = LastBlock(FAMILIES["llama"][0], tmp_path)
    whole = block.folds()[0]
    part = Fold(whole.producer, whole.consumers[:-1], whole.rows)
    expected = block.logits()
    BlockTransform().with_fold(block.block, part, torch.linspace(0.5, 2, part.channels)).install(block.block)
    assert logits_divergence(expected, block.logits()) > LOGITS_LIMIT
