"""A reading of the model that is not transformers' own stops `quantize`, and names its place; a right one is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from signround_edge.errors import UserError
from signround_edge.model import weights as weights_module
from signround_edge.model.decoder import Decoder
from signround_edge.model.source import SourceModel
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning import source_check
from signround_edge.tuning.calibration.block_call import BlockCall
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from signround_edge.tuning.source_check import LIMIT, check_source, relative_error
from tests.support import save_random_model

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 3072,
    "initializer_range": 0.1,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    # Keys and values of the last block are those of the one before; per-layer embeddings depend on the tokens.
    "gemma4": transformers.Gemma4TextConfig(
        **SIZES,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE},
        sliding_window=8,
        vocab_size_per_layer_input=3072,
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=1,
        tie_word_embeddings=True,
    ),
}
SMALL = TuningSettings(steps=0, samples=8, seqlen=32, batch_size=2)


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Path) -> Path:
    return saved(request.param, tmp_path, tiny_llama)


def saved(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A random model whose norms, gates and stored buffers are all in use."""
    path = save_random_model(CONFIGS[kind], folder / kind, tokenizer_from=tokenizer)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def rounded(model: Path, out: Path, calibration_text: Path, **options: Any) -> RunDirectory:
    return quantize(model, parse_scheme("gguf:q4_0"), out, str(calibration_text), SMALL, **options)


def test_the_manifest_says_how_the_source_was_checked(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    found = rounded(model, tmp_path / "run", calibration_text).manifest.source_check
    assert found is not None
    assert (found["mode"], found["tokens"], found["transformers"]) == ("full", 128, transformers.__version__)
    assert 0 < found["error"] < LIMIT / 5


def test_without_the_check_that_is_said(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    manifest = rounded(model, tmp_path / "run", calibration_text, source_check="off").manifest
    assert manifest.source_line == "source: not checked against transformers"


def test_weights_read_from_disk_block_by_block_tell_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_check, "free_memory", lambda: 200_000)  # a third of the model
    tokens = torch.randint(0, 3072, (4, 16), generator=torch.Generator().manual_seed(0))
    weights = ModelWeights.open(model)
    found = check_source(weights, tokens, CPU, "auto")
    assert found.mode == "blocks"
    assert found.error == pytest.approx(check_source(weights, tokens, CPU, "full").error)


def test_relative_error_is_by_token() -> None:
    expected = torch.tensor([[1000.0, 0.0], [1.0, 0.0]])
    assert relative_error(expected + torch.tensor([[0.0], [0.1]]), expected) == pytest.approx(0.1)


Patch = pytest.MonkeyPatch


def change_tensor(patch: Patch, change: Callable[[ModelWeights, str, Tensor], Tensor]) -> None:
    """Have every tensor of the model pass through `change` when it is read."""
    original = ModelWeights.tensor
    patch.setattr(ModelWeights, "tensor", lambda self, name: change(self, name, original(self, name)))


def change_call(patch: Patch, change: Callable[[Shell, int, Tensor, BlockCall], BlockCall]) -> None:
    """Have the arguments of every block pass through `change`."""
    original = Shell.block_call
    patch.setattr(
        Shell,
        "block_call",
        lambda self, index, tokens, device: change(self, index, tokens, original(self, index, tokens, device)),
    )


def change_decoder(patch: Patch, change: Callable[[Decoder], None]) -> None:
    """Have the model pass through `change` when it is built."""
    original = weights_module.build_decoder

    def build(path: Path) -> Decoder:
        decoder = original(path)
        change(decoder)
        return decoder

    patch.setattr(weights_module, "build_decoder", build)


def skip_a_norm(patch: Patch) -> None:
    change_decoder(patch, lambda decoder: setattr(decoder.blocks[1], "input_layernorm", nn.Identity()))


def exchange_q_and_k(patch: Patch) -> None:
    original = ModelWeights.tensor

    def tensor(self: ModelWeights, name: str) -> Tensor:
        swapped = {"q_proj": "k_proj", "k_proj": "q_proj"}
        for one, other in swapped.items():
            if f"layers.1.self_attn.{one}" in name:
                return original(self, name.replace(one, other))
        return original(self, name)

    patch.setattr(ModelWeights, "tensor", tensor)


def zero_a_buffer(patch: Patch) -> None:
    change_tensor(patch, lambda _, name, tensor: tensor * 0 if name.endswith("layers.1.layer_scalar") else tensor)


def arguments_of_another_batch(patch: Patch) -> None:
    first: list[BlockCall] = []

    def change(shell: Shell, index: int, tokens: Tensor, call: BlockCall) -> BlockCall:
        if index == 1:
            first.append(call)
            return replace(call, args=first[0].args)
        return call

    change_call(patch, change)


def wrong_theta(patch: Patch) -> None:
    def change(decoder: Decoder) -> None:
        for module in decoder.model.modules():
            if "inv_freq" in module._buffers:
                module.inv_freq = module.inv_freq * 0.5

    change_decoder(patch, change)


def forget_the_scale_of_the_embedding(patch: Patch) -> None:
    change_decoder(patch, lambda decoder: decoder.embedding.embed_scale.fill_(1.0))  # type: ignore[operator, union-attr]


def tie_what_is_not_tied(patch: Patch) -> None:
    patch.setattr(torch, "equal", lambda one, other: True)


def read_a_stale_shard(patch: Patch) -> None:
    original = SourceModel.tensor

    def tensor(self: SourceModel, name: str, index: tuple[int | slice, ...] = ()) -> Tensor:
        found = original(self, name, index)
        return found * 1.001 if "layers.2.mlp" in name else found

    patch.setattr(SourceModel, "tensor", tensor)


def transpose_a_matrix(patch: Patch) -> None:
    change_tensor(patch, lambda _, name, tensor: tensor.T if "layers.0.self_attn.o_proj" in name else tensor)


def mask_off(patch: Patch) -> None:
    def change(shell: Shell, index: int, tokens: Tensor, call: BlockCall) -> BlockCall:
        length = tokens.shape[1]
        seen = torch.ones(len(tokens), 1, length, length, dtype=torch.bool)
        return replace(call, kwargs={**call.kwargs, "attention_mask": seen}) if index == 1 else call

    change_call(patch, change)


def untie(model: Path) -> None:
    """Give a model whose config ties the head to the embedding a head of its own."""
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(1)
    tensors["lm_head.weight"] = 0.7 * embedding + 0.02 * torch.randn(embedding.shape, generator=generator)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


SABOTAGES: dict[str, tuple[Callable[[Patch], None], str, str]] = {
    "a norm skipped": (skip_a_norm, "llama", r"block 1 \(model\.layers\.1\)"),
    "q and k exchanged": (exchange_q_and_k, "llama", "block 1 "),
    "a buffer zeroed": (zero_a_buffer, "gemma4", "block 1 "),
    "arguments of another batch": (arguments_of_another_batch, "gemma4", "block 1 "),
    "another theta": (wrong_theta, "llama", "block 0 "),
    "no scale of the embedding": (forget_the_scale_of_the_embedding, "gemma4", "the embedding "),
    "tied where it is not": (tie_what_is_not_tied, "llama", "the output head "),
    "a stale shard": (read_a_stale_shard, "llama", "block 2 "),
    "a transposed matrix": (transpose_a_matrix, "llama", "block 0 "),
    "no mask": (mask_off, "gemma4", "block 1 "),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_wrong_reading_stops_before_anything_is_written(
    name: str, tmp_path: Path, tiny_llama: Path, calibration_text: Path, monkeypatch: Patch
) -> None:
    sabotage, kind, place = SABOTAGES[name]
    path = saved(kind, tmp_path, tiny_llama)
    if sabotage is tie_what_is_not_tied:
        untie(path)
    sabotage(monkeypatch)
    with pytest.raises(UserError, match=rf"{place}.*does not compute what transformers .* --source-check off"):
        rounded(path, tmp_path / "run", calibration_text)
    assert not (tmp_path / "run").exists()


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    path = saved("llama", tmp_path, tiny_llama)
    untie(path)
    run = rounded(path, tmp_path / "run", calibration_text)
    assert run.manifest.tied == {}
    assert run.config["tie_word_embeddings"] is False
    head = load_file(path / "model.safetensors")["lm_head.weight"]
    assert relative_error(run.dequantized("lm_head.weight"), head) < 0.05
