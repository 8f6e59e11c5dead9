"""The template route: any architecture, tensors recognised by name and by value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from exporters.gguf.families.family import Stored
from exporters.gguf.families.row_orders import interleaved_rows
from exporters.gguf.functions import FUNCTIONS, ONE_PLUS, Function
from exporters.gguf.placement import place
from exporters.gguf.reader import iter_expected, name_map, read_metadata, read_tensors
from exporters.gguf.routes.matching import FoundVector, find_row_order, find_vector
from exporters.gguf.tensors import dequantized
from exporters.gguf.tokenizer.tokenizer import add_tokenizer
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge.errors import CheckFailed, UserError
from signround_edge.manifest import OUTSIDE, Manifest, TensorEntry
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, export
from tests.exporters.gguf.test_gguf_families import kld, torch_logits
from tests.support import save_random_model

RunOf = Callable[..., RunDirectory]
VOCAB, WIDTH, HEADS = 600, 128, 2


def write_template(path: Path, arch: str, model_dir: Path, tokenizer: Path, convert: Callable[..., np.ndarray]) -> Path:
    """What llama.cpp's converter writes for a small model of that architecture: f16 matrices, f32 vectors."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("template")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_string("test.note", "kept")
    add_tokenizer(writer, tokenizer, VOCAB, print)
    (known,) = [a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    names = gguf.get_tensor_name_map(known, 2)
    for name, parameter in model.named_parameters():
        spellings = (name, name.removeprefix("transformer."))
        gguf_name = next(filter(None, (names.get_name(n, try_suffixes=(".weight", ".bias")) for n in spellings)))
        data = convert(name, parameter.detach().float().numpy())
        half = data.ndim > 1 and not gguf_name.startswith("position_embd")
        writer.add_tensor(gguf_name, np.ascontiguousarray(data, dtype=np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gpt2_convention(name: str, data: np.ndarray) -> np.ndarray:
    conv1d = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return data.T if name.endswith(conv1d) else data


def bloom_convention(name: str, data: np.ndarray) -> np.ndarray:
    """q, k and v of each head lie together in the source and apart in the file."""
    if ".query_key_value." not in name:
        return data
    parts = data.reshape(HEADS, 3, WIDTH // HEADS, -1)
    return np.concatenate([parts[:, i].reshape(WIDTH, -1) for i in range(3)]).reshape(data.shape)


GPT2 = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=HEADS, vocab_size=VOCAB, n_positions=256, initializer_range=0.1)
BLOOM = BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=HEADS, vocab_size=VOCAB, initializer_range=0.1)
CASES = {"gpt2": (GPT2, gpt2_convention), "bloom": (BLOOM, bloom_convention)}


@pytest.mark.parametrize("arch", CASES)
def test_other_architectures_run_with_a_template(
    arch: str, run_of: RunOf, byte_level_folder: Path, tmp_path: Path
) -> None:
    config, convention = CASES[arch]
    run = run_of(config)
    template = write_template(tmp_path / "t.gguf", arch, tmp_path / "model", byte_level_folder, convention)
    packed = export(run, tmp_path / "packed.gguf", template=template)
    control = export(run, tmp_path / "f32.gguf", template=template, dtype="f32")
    assert {row.type for row in read_tensors(packed)} == {"Q4_0", "Q8_0", "F32"}
    tokens = np.random.default_rng(0).integers(0, VOCAB, 100).astype(np.int32)
    with LlamaCppRuntime().open(control) as session:
        assert kld(torch_logits(run, tokens), session.logits(tokens)) <= 1e-5
    for artifact in (packed, control):
        expected = {tensor.gguf_name: tensor.weights() for tensor in iter_expected(run, artifact)}
        assert len(expected) == len(run.names())
        for stored in LlamaCppRuntime().stored_tensors(artifact):
            assert np.array_equal(stored.weights, expected.pop(stored.name)), stored.name
        assert not expected


@pytest.mark.parametrize("count", [1 << 31, (1 << 32) - 1])
def test_a_block_count_beyond_all_tensors_is_refused(
    count: int, run_of: RunOf, byte_level_folder: Path, tmp_path: Path
) -> None:
    """A table of names for so many blocks would fill the memory."""
    run = run_of(GPT2)
    template = write_template(tmp_path / "t.gguf", "gpt2", tmp_path / "model", byte_level_folder, gpt2_convention)
    content = template.read_bytes()
    place = content.index(b"gpt2.block_count") + len(b"gpt2.block_count") + 4
    template.write_bytes(content[:place] + count.to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(UserError, match=rf"t\.gguf has \d+ tensors and says that it has {count} blocks"):
        export(run, tmp_path / "out.gguf", template=template)


def test_row_order_of_a_fused_projection_and_its_bias_is_found(
    run_of: RunOf, byte_level_folder: Path, tmp_path: Path
) -> None:
    run = run_of(BLOOM)
    template = write_template(tmp_path / "t.gguf", "bloom", tmp_path / "model", byte_level_folder, bloom_convention)
    orders = {m.gguf_name: m.rows for m in name_map(run, export(run, tmp_path / "a.gguf", template=template))}
    half = WIDTH // HEADS
    blocks = np.arange(3 * WIDTH).reshape(HEADS, 3, half).swapaxes(0, 1).reshape(-1)
    assert orders["blk.0.attn_qkv.weight"].tolist() == blocks.tolist()
    assert orders["blk.0.attn_qkv.bias"].tolist() == blocks.tolist()
    assert orders["blk.0.ffn_up.weight"] is None


def test_our_own_f16_export_as_template_gives_what_the_built_in_route_gives(
    run_of: RunOf, byte_level_folder: Path, tmp_path: Path
) -> None:
    run = run_of(LlamaConfig(**BASE, attention_bias=True), tokenizer=byte_level_folder)
    template = export(run, tmp_path / "f16.gguf", dtype="f16")
    direct = export(run, tmp_path / "direct.gguf")
    through = export(run, tmp_path / "through.gguf", template=template)
    assert read_tensors(through) == read_tensors(direct)
    metadata = read_metadata(through)
    assert metadata.pop("signround_edge.template") == "f16.gguf"
    assert metadata == read_metadata(direct)
    data = {path: {t.name: t.weights for t in LlamaCppRuntime().stored_tensors(path)} for path in (direct, through)}
    assert all(np.array_equal(data[direct][name], data[through][name]) for name in data[direct])


def test_template_metadata_is_kept_and_provenance_replaced(
    run_of: RunOf, byte_level_folder: Path, tmp_path: Path
) -> None:
    run = run_of(GPT2)
    template = write_template(tmp_path / "t.gguf", "gpt2", tmp_path / "model", byte_level_folder, gpt2_convention)
    metadata = read_metadata(export(run, tmp_path / "a.gguf", template=template))
    assert metadata["test.note"] == "kept"
    assert metadata["tokenizer.ggml.merges"] == read_metadata(template)["tokenizer.ggml.merges"]
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert metadata["signround_edge.scheme"] == "gguf:q4_0"


def test_unmatched_tensors_of_the_template_are_kept_and_named(run_of: RunOf, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    run = run_of(LlamaConfig(**BASE, rope_parameters=rope))
    template = export(run, tmp_path / "f32.gguf", dtype="f32")
    lines: list[str] = []
    artifact = export(run, tmp_path / "a.gguf", log=lines.append, template=template)
    assert any("kept 1 tensors" in line and "rope_freqs.weight" in line for line in lines)
    assert "rope_freqs.weight" in [row.name for row in read_tensors(artifact)]


def test_a_template_of_another_model_is_refused(run_of: RunOf, byte_level_folder: Path, tmp_path: Path) -> None:
    run = run_of(GPT2)
    other = save_random_model(GPT2, tmp_path / "other", seed=1)
    template = write_template(tmp_path / "t.gguf", "gpt2", other, byte_level_folder, gpt2_convention)
    with pytest.raises(UserError, match=r"t\.gguf has no place for .* of the run's parameters .*same model"):
        export(run, tmp_path / "a.gguf", template=template)
    assert not (tmp_path / "a.gguf").exists()


def test_a_template_is_never_overwritten(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(LlamaConfig(**BASE))
    template = export(run, tmp_path / "f16.gguf", dtype="f16")
    with pytest.raises(UserError, match="same file"):
        export(run, template, template=template)


def test_an_artifact_of_another_model_has_no_map(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(LlamaConfig(**BASE))
    artifact = export(run, tmp_path / "a.gguf")
    short = tmp_path / "short.gguf"
    writer = gguf.GGUFWriter(short, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(name_map(run, artifact)) == len(run.names())
    with pytest.raises(CheckFailed, match=r"short\.gguf has no tensor for"):
        name_map(run, short)


def noisy(matrix: np.ndarray, share: float) -> np.ndarray:
    noise = np.random.default_rng(9).standard_normal(matrix.shape).astype(np.float32)
    return matrix + share * noise


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_row_orders_are_found_through_rounding_noise(noise: float) -> None:
    matrix = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    assert find_row_order(noisy(matrix, noise), matrix, [4]) == (True, None)
    found, order = find_row_order(noisy(matrix, noise), matrix[interleaved_rows(64, 4)], [4, 2])
    assert found
    assert order is not None
    assert order.tolist() == interleaved_rows(64, 4).tolist()
    any_order = np.random.default_rng(1).permutation(64)
    found, order = find_row_order(noisy(matrix, noise), matrix[any_order], [4])
    assert found
    assert order is not None
    assert order.tolist() == any_order.tolist()


def test_other_matrices_and_repeated_rows_are_not_matched() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 128)).astype(np.float32)
    assert find_row_order(matrix, rng.standard_normal((64, 128)).astype(np.float32), [4])[0] is False
    assert find_row_order(matrix, matrix[:32], [4])[0] is False
    assert find_row_order(np.zeros((4, 8), np.float32), np.zeros((4, 8), np.float32), []) == (True, None)
    assert find_row_order(matrix, np.repeat(matrix[:1], 64, axis=0), [4])[0] is False


def test_vectors_take_the_order_of_their_weight_or_gemmas_offset() -> None:
    vector = np.random.default_rng(0).standard_normal(16).astype(np.float32) * 0.1
    order = np.roll(np.arange(16), 3)
    assert find_vector(vector, vector, [order]) == FoundVector()
    assert find_vector(vector, vector + 1, [order]) == FoundVector(None, ONE_PLUS)
    found = find_vector(vector, vector[order], [order])
    assert found is not None
    assert found.order is order
    assert found.function is None
    assert find_vector(vector, np.zeros(16, np.float32), [order]) == FoundVector()
    assert find_vector(vector, np.random.default_rng(1).standard_normal(16).astype(np.float32), [order]) is None


@pytest.mark.parametrize("function", [None, *FUNCTIONS])
def test_a_function_of_a_vector_is_found_with_its_values_in_any_order(function: Function | None) -> None:
    vector = np.random.default_rng(0).uniform(0, 2, 16).astype(np.float32)
    order = np.random.default_rng(1).permutation(16)
    stored = FoundVector(order, function).applied(vector)
    found = find_vector(vector, stored, [])
    assert found is not None
    assert np.allclose(found.applied(vector), stored, rtol=1e-6)
    assert found.order is not None
    assert found.order.tolist() == order.tolist()


def test_gemma_norms_are_written_with_their_offset(tmp_path: Path) -> None:
    entry = TensorEntry("norm.weight", OUTSIDE, [2], "float32")
    manifest = Manifest("gguf:q4_0", ["gguf"], {}, {}, {}, [OUTSIDE], {}, [entry])
    run = RunDirectory.create(tmp_path, manifest)
    run.write_part(OUTSIDE, {"norm.weight": torch.tensor([0.25, -0.5])}, {})
    placement = place(run, ["norm.weight"], Stored("blk.0.attn_norm.weight", function=ONE_PLUS))
    assert dequantized(run, placement).tolist() == [[1.25, 0.5]]


def test_a_vector_without_a_name_in_common_counts_only_when_it_is_equal() -> None:
    """Norms of trained models are near 1 and near one another."""
    norm, other = 1 + 0.05 * np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    assert find_vector(norm, other, []) == FoundVector()
    assert find_vector(norm, other, [], named=False) is None
    assert find_vector(norm, norm.astype(np.float16).astype(np.float32), [], named=False) == FoundVector()
