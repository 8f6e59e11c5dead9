"""Which files of a folder are read, under which names, and what is said of the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_source_model
from signround_edge.model.decoder import build_decoder
from signround_edge.model.source import SourceModel, model_name
from signround_edge.model.weights import ModelWeights
from tests import support
from tests.support import save_random_model

SIZES = {**support.SIZES, "vocab_size": 256}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,  # as many as the language model has
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_random_model(transformers.LlamaConfig(**SIZES), tmp_path / "llama")


def change(model: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = model / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def test_a_backup_beside_the_model_is_not_read_and_that_is_said(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, llama / "model_backup.safetensors", metadata={"format": "pt"})
    weights = ModelWeights.open(llama)
    assert torch.equal(weights.tensor(UP), tensors[UP])
    assert weights.notes() == ["note: model_backup.safetensors: not read, as transformers loads model.safetensors"]


def test_the_whole_file_counts_before_the_index(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    save_file({UP: tensors[UP] * 2}, llama / "part.safetensors", metadata={"format": "pt"})
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "part.safetensors"}}))
    assert torch.equal(ModelWeights.open(llama).tensor(UP), load_source_model(llama).get_parameter(UP))
    assert torch.equal(ModelWeights.open(llama).tensor(UP), tensors[UP])


def test_one_tensor_in_two_files_is_refused(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    save_file(tensors, llama / "a.safetensors", metadata={"format": "pt"})
    save_file({UP: tensors[UP]}, llama / "b.safetensors", metadata={"format": "pt"})
    index = dict.fromkeys(tensors, "a.safetensors") | {UP: "b.safetensors"}
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=rf"{UP} is in a\.safetensors and in b\.safetensors; keep the files of one"):
        SourceModel.open(llama)


def shard(model: Path, *places: str) -> dict[str, Tensor]:
    """Write the model's tensors to files at `places`, and the index; returns the tensors."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parts = {place: dict(list(tensors.items())[i :: len(places)]) for i, place in enumerate(places)}
    for place, part in parts.items():
        (model / place).parent.mkdir(exist_ok=True)
        save_file(part, model / place, metadata={"format": "pt"})
    index = {name: place for place, part in parts.items() for name in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tensors


def test_files_of_an_index_may_lie_in_a_folder_below(llama: Path) -> None:
    """Others of the same names lie in the model's folder, and are not read."""
    places = ("v2/a.safetensors", "v2/b.safetensors")
    tensors = shard(llama, *places)
    for place in places:
        other = {name: tensor * 2 for name, tensor in load_file(llama / place).items()}
        save_file(other, llama / Path(place).name, metadata={"format": "pt"})
    weights, theirs = ModelWeights.open(llama), load_source_model(llama)
    for name, tensor in tensors.items():
        assert torch.equal(weights.tensor(name), tensor), name
        assert torch.equal(theirs.get_parameter(name), tensor), name
    assert sorted(weights.source.hashes()) == ["config.json", *places]
    assert weights.source.ignored_files == ["a.safetensors", "b.safetensors"]


def test_files_outside_the_models_folder_are_refused(llama: Path) -> None:
    shard(llama, "../outside.safetensors", "a.safetensors")
    with pytest.raises(
        UserError, match=r"names \.\./outside\.safetensors, which is outside the model's folder; put all"
    ):
        SourceModel.open(llama)


@pytest.mark.parametrize("index", ["[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": null}}'])
def test_an_index_that_is_none_is_refused(index: str, llama: Path) -> None:
    shard(llama, "a.safetensors")
    (llama / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json is not a readable index \(.*; download it again"):
        SourceModel.open(llama)


def test_the_file_that_the_config_names_counts_first(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    save_file({name: t * 2 for name, t in tensors.items()}, llama / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    weights, theirs = ModelWeights.open(llama), load_source_model(llama)
    assert torch.equal(weights.tensor(UP), tensors[UP] * 2)
    assert torch.equal(theirs.get_parameter(UP), tensors[UP] * 2)
    assert weights.notes() == ["note: model.safetensors: not read, as transformers loads other.safetensors"]


def test_a_folder_in_place_of_the_weights_is_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors is a folder, not a file"):
        SourceModel.open(llama)


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_alone_is_to_be_merged(with_config: bool, llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "adapter_model.safetensors")
    (llama / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    if not with_config:
        (llama / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"holds a PEFT adapter and no model; merge it into org/base \(peft: `merge_and"
    ):
        SourceModel.open(llama)


def test_an_adapter_beside_the_model_is_said_to_be_left_out(llama: Path) -> None:
    save_file({"q.lora_A.weight": torch.ones(4, 4)}, llama / "adapter_model.safetensors")
    (warning,) = ModelWeights.open(llama).notes()
    assert warning.startswith(
        "warning: adapter_model.safetensors: PEFT's adapter beside the model is not applied; merge"
    )


def test_lora_weights_beside_the_matrices_are_said_to_be_left_out(llama: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    change(llama, lambda tensors: {**tensors, name: torch.ones(4, 64)})
    (warning,) = ModelWeights.open(llama).notes()
    assert warning.startswith(f"warning: 1 LoRA weights beside the matrices ({name}) are not applied; merge them first")


@pytest.mark.parametrize(("guessing", "word"), [(0, "warning"), (1, "note")])
def test_a_whole_block_that_is_left_out_is_said(guessing: int, word: str, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "num_nextn_predict_layers": guessing}
    (llama / "config.json").write_text(json.dumps(config))
    assert ModelWeights.open(llama).notes() == [
        f"{word}: block 1 of the checkpoint (9 tensors) left out, as config.json says that the model has 1 blocks "
        "(num_hidden_layers)"
    ]


def test_values_beyond_32_bits_are_refused(llama: Path) -> None:
    change(llama, lambda tensors: {**tensors, UP: tensors[UP].double() * 1e300})
    with pytest.raises(UserError, match=rf"{UP} holds 64-bit values that 32-bit floats cannot hold"):
        ModelWeights.open(llama).tensor(UP)


@pytest.mark.parametrize(("names", "message"), [(1, "rename it to model.safetensors"), (2, "download the index")])
def test_files_that_transformers_does_not_look_for_are_refused(names: int, message: str, llama: Path) -> None:
    for number in range(names):
        shutil.copy(llama / "model.safetensors", llama / f"weights-{number}.safetensors")
    (llama / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        SourceModel.open(llama)


def test_tensors_without_use_are_listed_with_their_number(llama: Path) -> None:
    extra = {f"model.layers.{i}.self_attn.{p}_proj.bias": torch.ones(8) for i in range(2) for p in "qkv"}
    change(llama, lambda tensors: {**tensors, **extra})
    (note,) = ModelWeights.open(llama).notes()
    assert note.startswith("note: llama has no use for 6 of the checkpoint's tensors, which are left out: ")
    assert "model.layers.*.self_attn.q_proj.bias" in note


@pytest.mark.parametrize(
    ("prefix", "tool"),
    [
        ("base_model.model.", "PEFT"),
        ("_orig_mod.", r"torch\.compile"),
        ("module.", "DistributedDataParallel"),
        ("model._orig_mod.", r"torch\.compile"),
        ("language.", "some tool"),
    ],
)
def test_a_prefix_that_a_tool_has_put_before_the_names_is_named(prefix: str, tool: str, llama: Path) -> None:
    change(llama, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=rf"begin with '{prefix}', which .*{tool}.*save the model that is inside"):
        ModelWeights.open(llama)


@pytest.mark.parametrize(
    ("part", "tool"),
    [
        ("_orig_mod.", r"torch\.compile"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("_checkpoint_wrapped_module.", "torch's checkpoint wrapper"),
    ],
)
def test_what_a_tool_has_put_into_the_names_is_named(part: str, tool: str, llama: Path) -> None:
    change(llama, lambda tensors: {name.replace("layers.1.", f"layers.1.{part}"): t for name, t in tensors.items()})
    for load in (ModelWeights.open, load_source_model):
        with pytest.raises(UserError, match=rf"hold '{part}', which {tool} has put there.*save the model that is"):
            load(llama)


def test_lora_weights_that_are_not_merged_are_named(llama: Path) -> None:
    def wrap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        wrapped = {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in tensors.items()}
        return {**wrapped, "model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)}

    change(llama, wrap)
    with pytest.raises(UserError, match=r"PEFT's LoRA weights .* not merged .*merge_and_unload"):
        ModelWeights.open(llama)


def test_a_classifier_has_no_head_to_quantize(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, num_labels=1)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    for load in (ModelWeights.open, load_source_model):
        with pytest.raises(UserError, match=r"a LlamaForSequenceClassification, which has no language model head"):
            load(tmp_path)


MASKS = {
    "gpt_neox": (
        transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
        "gpt_neox.layers.{}.attention.bias",
        torch.bool,
    ),
    "gpt2": (
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64),
        "transformer.h.{}.attn.bias",
        torch.uint8,
    ),
}


@pytest.mark.parametrize("kind", sorted(MASKS))
def test_masks_stored_in_integers_are_no_weights(kind: str, tmp_path: Path) -> None:
    """Pythia's and GPT-2's checkpoints hold them, and transformers leaves them out."""
    config, name, dtype = MASKS[kind]
    save_random_model(config, tmp_path)
    masks = {name.format(i): torch.ones(1, 1, 64, 64, dtype=dtype) for i in range(2)}
    change(tmp_path, lambda tensors: {**tensors, **masks})
    weights, theirs = ModelWeights.open(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    parameters = dict(theirs.named_parameters())
    assert all(torch.equal(weights.tensor(found), parameter) for found, parameter in parameters.items())
    assert sorted(weights.unused) == sorted(masks)
    (note,) = weights.notes()
    assert f"no use for 2 of the checkpoint's tensors, which are left out: {name.format('*')}" in note
    assert torch.equal(
        load_source_model(tmp_path).lm_head.weight, parameters.get("lm_head.weight", theirs.lm_head.weight)
    )


def test_integers_that_the_model_has_in_floats_are_refused_in_vectors_too(llama: Path) -> None:
    change(llama, lambda tensors: {**tensors, "model.norm.weight": torch.ones(64, dtype=torch.int16)})
    for load in (ModelWeights.open, load_source_model):
        with pytest.raises(UserError, match=r"model\.norm\.weight is stored as I16, so this checkpoint is quantized"):
            load(llama)


@pytest.mark.parametrize("factor", [1, 2])
def test_two_stored_names_for_one_tensor_are_refused_where_they_differ(factor: int, llama: Path) -> None:
    bare = UP.removeprefix("model.")
    change(llama, lambda tensors: {**tensors, bare: tensors[UP] * factor})
    if factor == 1:
        assert torch.equal(ModelWeights.open(llama).tensor(UP), load_source_model(llama).get_parameter(UP))
        return
    for load in (ModelWeights.open, load_source_model):
        with pytest.raises(UserError, match=rf"{bare} and {UP} are two names for one tensor, and differ; remove"):
            load(llama)


@pytest.mark.parametrize("without", ["model.", ""])
def test_a_bare_base_model_is_read_as_transformers_reads_it(without: str, llama: Path) -> None:
    exact = load_file(llama / "model.safetensors")
    change(llama, lambda tensors: {name.removeprefix(without): tensor for name, tensor in tensors.items()})
    weights, theirs = ModelWeights.open(llama), load_source_model(llama)
    assert torch.equal(weights.tensor(UP), exact[UP])
    assert torch.equal(theirs.get_parameter(UP), exact[UP])


def test_a_model_of_the_hubs_cache_is_named_after_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny-llama" / "snapshots" / ("0123abcd" * 5)
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "org/tiny-llama"
    assert model_name(tmp_path / "tiny") == "tiny"


MORE_THAN_TEXT: dict[str, transformers.PretrainedConfig] = {
    "gemma3": transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=5,
    ),
    "llava": transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**SIZES)
    ),
    "qwen2_vl": transformers.Qwen2VLConfig(
        text_config={
            **SIZES,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    ),
}


@pytest.mark.parametrize("kind", sorted(MORE_THAN_TEXT))
def test_the_language_model_inside_computes_what_the_whole_one_does_on_text(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(MORE_THAN_TEXT[kind], dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    weights = ModelWeights.open(tmp_path)
    weights.load(weights.decoder.model, "", torch.device("cpu"))
    tokens = torch.randint(10, 200, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = (model(input_ids=tokens).logits for model in (weights.decoder.model, whole.eval()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (note,) = weights.notes()
    assert f"of {type(whole).__name__} the language model is quantized" in note


ROUTED: dict[str, tuple[transformers.PretrainedConfig, str]] = {
    "qwen2_moe": (
        transformers.Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
        ),
        "mlp.shared_expert_gate.weight",
    ),
    "phimoe": (
        transformers.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        "mlp.router.weight",
    ),
    "gemma4": (
        transformers.Gemma4TextConfig(
            **SIZES,
            head_dim=16,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=32,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            layer_types=["full_attention"] * 2,
            rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        ),
        "router.proj.weight",
    ),
}


@pytest.mark.parametrize("kind", sorted(ROUTED))
def test_routers_and_gates_of_one_row_are_no_matrices_to_quantize(kind: str, tmp_path: Path) -> None:
    config, router = ROUTED[kind]
    config.save_pretrained(tmp_path)
    decoder = build_decoder(tmp_path)
    linear = {name for name, module in decoder.blocks.named_modules() if isinstance(module, torch.nn.Linear)}
    left = {f"{decoder.prefix}.{name}.weight" for name in linear} - decoder.matrix_names
    assert left == {f"{decoder.prefix}.{layer}.{router}" for layer in range(2)}
    assert all(parameter.device.type == "meta" for parameter in decoder.model.parameters())
