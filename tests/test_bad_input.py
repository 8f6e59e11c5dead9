"""Bad input ends in exit code 2 and one sentence that names the file or flag and the way out; nothing is lost."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from support import save_random_model

from signround_edge.cli import main
from signround_edge.model.config import longest_window

TINY = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=3072,
)
SIZES = ["--steps", "2", "--samples", "4", "--seqlen", "16", "--batch-size", "2"]


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return save_random_model(TINY, tmp_path / "model", tokenizer_from=tiny_llama)


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def quantize(model: Path, calibration: Path, *more: object, scheme: str = "gguf:q4_0", out: str = "run") -> Result:
    target = model.parent / out
    return run_cli("quantize", model, "--scheme", scheme, "-o", target, "--calibration", calibration, *SIZES, *more)


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in message


def test_missing_shard(model: Path, calibration_text: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()  # it would count before the index
    assert_refused(quantize(model, calibration_text), "model-00001-of-00002.safetensors is missing", "download")


def test_missing_tensor(model: Path, calibration_text: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    assert_refused(quantize(model, calibration_text), "model.layers.1.mlp.up_proj.weight is missing")


def test_truncated_safetensors(model: Path, calibration_text: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert_refused(quantize(model, calibration_text), "model.safetensors is truncated", "download it again")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad: float, model: Path, calibration_text: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, model / "model.safetensors")
    assert_refused(quantize(model, calibration_text), "model.layers.1.mlp.up_proj.weight holds NaN or infinity")


def test_no_weights(model: Path, calibration_text: Path) -> None:
    (model / "model.safetensors").unlink()
    assert_refused(quantize(model, calibration_text), "has no *.safetensors file")


def test_pickle_checkpoint(model: Path, calibration_text: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    assert_refused(quantize(model, calibration_text), "pickle checkpoint", "convert it to safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "no-such-architecture"}, "transformers cannot build this architecture"),
        ({"hidden_size": 128}, "weights and config are not of the same model"),
    ],
)
def test_config_that_does_not_fit(change: dict[str, object], words: str, model: Path, calibration_text: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    assert_refused(quantize(model, calibration_text), "config.json" if "build" in words else "model", words)


def test_encoder_decoder_model(tmp_path: Path, calibration_text: Path) -> None:
    folder = tmp_path / "model"
    transformers.T5Config(d_model=64, num_layers=2).save_pretrained(folder)
    save_file({"shared.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    assert_refused(quantize(folder, calibration_text), "config.json", "causal language model")


@pytest.mark.parametrize("text", ["", "too short"])
def test_calibration_without_enough_text(text: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.txt"
    file.write_text(text)
    assert_refused(quantize(model, file), "calibration.txt has fewer than 16 tokens", "smaller --seqlen")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", b"{not json\n", "line 1 is not JSON"),
        ("bad.jsonl", b'{"body": "x"}\n', "has none of the keys messages, text, content, prompt"),
        ("bad.txt", b"\xff\xfe\xfa", "is not UTF-8"),
    ],
)
def test_calibration_that_cannot_be_read(name: str, content: bytes, words: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(quantize(model, tmp_path / name), name, words)


def test_calibration_that_does_not_exist(model: Path, tmp_path: Path) -> None:
    assert_refused(quantize(model, tmp_path / "none.txt"), "none.txt does not exist")


def test_calibration_that_is_no_text_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(quantize(model, tmp_path / "empty"), "it is a folder, and no dataset", "give a text file")
    assert_refused(quantize(model, Path("/dev/null")), "--calibration /dev/null is no regular file; give a text file")


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("{", "it is not JSON"),
        ("[]", "it says no schema_version, so `quantize` did not write it"),
        ("{}", "it says no schema_version"),
        ('{"schema_version": 2}', "its schema_version is 2, and this version of signround-edge reads 1"),
        ('{"schema_version": 1, "state": "complete"}', "it has no 'tensors'"),
        ('{"schema_version": 1, "state": "", "tensors": [], "complete": {}, "color": 1}', "it does not hold what"),
        ('{"schema_version": 1, "state": "", "tensors": 3, "complete": {}}', "it does not hold what"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why_and_what_to_do(manifest: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    refused = run_cli("inspect", tmp_path)
    assert_refused(
        refused, "manifest.json is not a readable manifest", words, "restore it, or remove", "`quantize` again"
    )


def test_scheme_that_does_not_exist(model: Path, calibration_text: Path) -> None:
    result = quantize(model, calibration_text, scheme="gguf:q9_9")
    assert_refused(result, "unknown scheme 'gguf:q9_9'", "gguf:q4_0", "onnx:w4g128-asym")


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("gguf:q4km", "near it are gguf:q4_k_m, gguf:q4_k, gguf:q3_k_m, and docs/formats.md lists all"),
        ("Q4_K_M", "near it are gguf:q4_k_m"),
    ],
)
def test_an_unknown_scheme_names_what_is_near(scheme: str, words: str, model: Path, calibration_text: Path) -> None:
    assert_refused(quantize(model, calibration_text, scheme=scheme), f"unknown scheme '{scheme.lower()}'", words)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("gguf:q4_0,", "--scheme 'gguf:q4_0,' has an empty part; give gguf:q4_0"),
        (",gguf:q4_0,,onnx:w4g32", "has an empty part; give gguf:q4_0,onnx:w4g32"),
        (" , ", "--scheme is empty; docs/formats.md lists all"),
        ("", "--scheme is empty; docs/formats.md lists all"),
    ],
)
def test_a_scheme_with_empty_parts_is_refused(scheme: str, words: str, model: Path, calibration_text: Path) -> None:
    assert_refused(quantize(model, calibration_text, scheme=scheme), words)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("onnx:w5g32", "no codes of 5 bits; give 2, 3, 4, 8 bits"),
        ("onnx:w4g48", "no blocks of 48 values; give 16, 32, 64, 128, 256"),
        ("onnx:int4", "write onnx:w<bits>g<block size>[-asym]"),
    ],
)
def test_onnx_schemes_that_the_runtime_lacks(scheme: str, words: str, model: Path, calibration_text: Path) -> None:
    assert_refused(quantize(model, calibration_text, scheme=scheme), f"unknown scheme '{scheme}'", words)


@pytest.mark.parametrize(
    "flags", [("--steps", "-1"), ("--samples", "0"), ("--lr", "7"), ("--recipe", "none"), ("--seed", str(10**23))]
)
def test_settings_out_of_range(flags: tuple[str, str], model: Path, calibration_text: Path) -> None:
    assert_refused(quantize(model, calibration_text, *flags), flags[0].strip("-"))
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_seed_out_of_range_rotates_nothing(model: Path) -> None:
    refused = run_cli("rotate", model, "-o", model.parent / "rotated", "--seed", 10**23)
    assert_refused(refused, "--seed 100000000000000000000000 must be at least 0 and at most 4294967295")
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "signround_edge", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: signround-edge [OPTIONS] COMMAND")


def test_model_that_does_not_exist(tmp_path: Path, calibration_text: Path) -> None:
    assert_refused(quantize(tmp_path / "none", calibration_text), "none does not exist")


def test_folder_that_is_empty(tmp_path: Path, evaluation_text: Path) -> None:
    (tmp_path / "out").mkdir()
    for command in (["inspect"], ["evaluate", "--text", evaluation_text]):
        found = run_cli(*command, tmp_path / "out")
        assert_refused(found, "out is an empty folder; give a run directory that `quantize` has written, or ")


def test_cache_of_plans_that_is_a_file(model: Path, calibration_text: Path) -> None:
    more = ["--target-bpw", "4", "--calibration", calibration_text, "--cache", calibration_text]
    refused = run_cli("plan", model, *more)
    assert_refused(refused, "the cache of plans cannot be kept in", "give another folder with --cache or $SIGN")


def test_folder_that_is_no_run(model: Path) -> None:
    result = run_cli("export", model, "--format", "gguf", "-o", model.parent / "out.gguf")
    assert_refused(result, "is not a run directory", "quantize")


def test_run_that_does_not_exist(tmp_path: Path) -> None:
    result = run_cli("export", tmp_path / "none", "--format", "gguf", "-o", tmp_path / "out.gguf")
    assert_refused(result, "none does not exist; give the folder that `quantize -o` has written")


def test_out_folder_with_other_files_is_left_alone(model: Path, calibration_text: Path) -> None:
    other = model.parent / "run"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert_refused(quantize(model, calibration_text), "run exists and is not a run directory", "another -o")
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_artifact_that_is_no_artifact(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert_refused(run_cli("inspect", file), "model.gguf")


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    assert_refused(run_cli("inspect", tmp_path / "none.gguf"), "none.gguf does not exist")


def test_full_disk_keeps_what_is_complete(model: Path, calibration_text: Path, tmp_path: Path) -> None:
    """A file-size limit makes the first part's write fail half-way; with the limit gone, --resume finishes the run."""
    out = tmp_path / "run"
    arguments = ["quantize", str(model), "--scheme", "gguf:q4_0", "-o", str(out), "--resume"]
    command = [sys.executable, "-m", "signround_edge.cli", *arguments, "--calibration", str(calibration_text), *SIZES]
    limit = 30_000 + max(f.stat().st_size for f in model.iterdir() if f.suffix == ".json")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    failed = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    if failed.returncode == 0:
        pytest.skip("this system does not enforce file-size limits")
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "could not be written" in failed.stderr.strip().splitlines()[-1]
    assert not list(out.rglob("*.partial"))
    assert run_cli(*arguments, "--calibration", calibration_text, *SIZES).exit_code == 0


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys, signround_edge.cli; print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_incomplete_run_says_how_to_finish_it(model: Path, calibration_text: Path) -> None:
    assert quantize(model, calibration_text).exit_code == 0
    run = model.parent / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["complete"]["outside"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(run_cli("inspect", run), "is incomplete (2 of 3 parts)", "--resume")
    shutil.rmtree(run)


def test_windows_longer_than_the_model_can_see(tiny_llama: Path, evaluation_text: Path) -> None:
    result = run_cli("evaluate", tiny_llama, "--text", evaluation_text, "--n-ctx", 2048)
    assert_refused(result, "--n-ctx 2048", "give --n-ctx 1024")


@pytest.mark.parametrize(("pattern", "near"), [("ffn_dwon", "ffn_down"), ("FFN_DOWN", "ffn_down"), ("q_prj", "q_proj")])
def test_a_tensor_type_that_fits_nothing_names_what_is_near(
    model: Path, calibration_text: Path, pattern: str, near: str
) -> None:
    refused = quantize(model, calibration_text, "--tensor-type", f"{pattern}=Q6_K", scheme="gguf:q4_k_m")
    assert_refused(refused, f"no matrix of this model has a name that fits '{pattern}'", f"near it are {near}")


def test_samples_longer_than_the_model_can_see_are_refused(
    tiny_llama: Path, calibration_text: Path, tmp_path: Path
) -> None:
    refused = quantize(tiny_llama, calibration_text, "--seqlen", "1025", out=str(tmp_path / "run"))
    assert_refused(refused, "--seqlen 1025 is more than the 1024 positions of the model; give --seqlen 1024")


def test_tensor_types_that_cannot_be(model: Path, calibration_text: Path) -> None:
    refused = quantize(model, calibration_text, "--tensor-type", "ffn_down")
    assert_refused(refused, "--tensor-type 'ffn_down'", "PATTERN=TYPE")
    refused = quantize(model, calibration_text, "--tensor-type", "ffn_down=Q9_K")
    assert_refused(refused, "unknown block format 'Q9_K'; near it are Q6_K, Q5_K, Q4_K, and docs/formats.md lists all")
    refused = quantize(model, calibration_text, "--tensor-type", "ffn_down=F16")
    assert_refused(refused, "F16 holds floats", "take Q8_0", "`export --dtype f16`")
    assert_refused(quantize(model, calibration_text, "--tensor-type", "(=Q6_K"), "no regular expression")
    assert_refused(quantize(model, calibration_text, "--tensor-type", "ffn_down=w4g64"), "GGUF has no type w4g64")
    refused = quantize(model, calibration_text, "--tensor-type", "down=Q4_K", scheme="onnx:w4g32")
    assert_refused(refused, "MatMulNBits has no form of Q4_K")
    for flag in ("--token-embedding-type", "--output-tensor-type"):
        assert_refused(quantize(model, calibration_text, flag, "Q9_K"), f"{flag} Q9_K: unknown block format")
        assert_refused(quantize(model, calibration_text, flag, "w4g64"), f"{flag} w4g64: GGUF has no type")
    mixed = quantize(model, calibration_text, scheme="gguf:q4_k_m,onnx:w4g32")
    assert_refused(mixed, "gguf:q4_k_m mixes several grids")


def test_options_of_the_other_format(model: Path, calibration_text: Path, tmp_path: Path) -> None:
    assert quantize(model, calibration_text).exit_code == 0
    out = ("export", model.parent / "run", "--format", "gguf", "-o", tmp_path / "m.gguf")
    for flags in (("--scale-dtype", "f16"), ("--ort-format",), ("--accuracy-level", "4")):
        assert_refused(run_cli(*out, *flags), f"{flags[0]} is for --format onnx")


def test_sizes_that_cannot_be(model: Path, calibration_text: Path, tmp_path: Path) -> None:
    assert quantize(model, calibration_text).exit_code == 0
    run = model.parent / "run"
    for size in ("0", "lots", "-5M"):
        result = run_cli("export", run, "--format", "gguf", "-o", tmp_path / "m.gguf", f"--split-max-size={size}")
        assert_refused(result, "--split-max-size", "give for example 500M")
    result = run_cli("export", run, "--format", "onnx", "-o", tmp_path / "m", "--max-shard-size=lots")
    assert_refused(result, "--max-shard-size lots is not a size")


def test_a_config_that_is_no_json_is_named_where_the_tokenizer_needs_it(model: Path, evaluation_text: Path) -> None:
    (model / "config.json").write_text("[1")
    assert_refused(run_cli("evaluate", model, "--text", evaluation_text), "config.json is not JSON")


def rewrite_config(model: Path, change: dict[str, object], file: str = "config.json") -> None:
    config = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**config, **change}))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (
            "config.json",
            {"model_type": "unknown", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
        ),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_code_of_a_checkpoint_is_never_run_nor_asked_for(
    command: str, file: str, change: dict[str, object], model: Path, calibration_text: Path, evaluation_text: Path
) -> None:
    """transformers asks "Do you wish to run the custom code?" where nobody says otherwise."""
    run = model.parent / "it-ran"
    (model / "own.py").write_text(
        f"open({str(run)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        "from transformers import PreTrainedTokenizerFast as T\n"
    )
    rewrite_config(model, change, file)
    arguments = {
        "quantize": [str(model), "--scheme", "gguf:q4_0", "-o", str(model.parent / "run"), *SIZES],
        "evaluate": [str(model), "--text", str(evaluation_text), "--n-ctx", "64", "--windows", "1"],
    }
    result = CliRunner().invoke(main, [command, *arguments[command]], input="y\n" * 9)
    assert_refused(result, f"{file}: the checkpoint brings code of its own (own.py), which is never run", "conversion")
    assert "Do you wish" not in result.output
    assert not run.exists()


def test_code_beside_an_architecture_that_transformers_knows_is_not_run_and_that_is_said(
    model: Path, calibration_text: Path
) -> None:
    rewrite_config(model, {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})
    result = quantize(model, calibration_text)
    assert result.exit_code == 0, result.output
    assert (
        "brings code of its own (own.py), which is not run: the model is transformers' LlamaForCausalLM"
        in result.output
    )


POSITIONS: dict[str, transformers.PretrainedConfig] = {
    "nested": transformers.Gemma3Config(
        text_config={"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 96}
    ),
    "mpt": transformers.MptConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=64, max_seq_len=96),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=96),
}


@pytest.mark.parametrize("kind", sorted(POSITIONS))
def test_positions_are_those_of_transformers_config(kind: str, tmp_path: Path) -> None:
    POSITIONS[kind].save_pretrained(tmp_path)
    assert longest_window(tmp_path) == 96


def test_samples_beyond_positions_that_go_by_another_name_are_refused(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    """MPT's graph has a bias for each of them, and fails beyond."""
    config = transformers.MptConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=3072, max_seq_len=96)
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    refused = quantize(model, calibration_text, "--seqlen", "97")
    assert_refused(refused, "--seqlen 97 is more than the 96 positions of the model; give --seqlen 96")
    refused = run_cli("evaluate", model, "--text", calibration_text, "--n-ctx", 97)
    assert_refused(refused, "--n-ctx 97 is more than the 96 positions")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is not JSON"),
        ("tokenizer.json", b"{}", "tokenizer.json: transformers cannot load this tokenizer"),
        ("chat_template.jinja", b"\xe4", "chat_template.jinja is not UTF-8 text"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "has an entry without name or template"),
    ],
)
def test_a_broken_file_of_the_tokenizer_is_named(
    file: str, content: bytes, words: str, model: Path, calibration_text: Path
) -> None:
    (model / file).write_bytes(content)
    assert_refused(quantize(model, calibration_text), str(model / file), words)


def test_a_broken_generation_config_is_refused_before_anything_is_tuned(model: Path, calibration_text: Path) -> None:
    (model / "generation_config.json").write_text("{,")
    assert_refused(quantize(model, calibration_text), "generation_config.json is not JSON", "repair or remove it")
    assert not (model.parent / "run").exists()


def test_a_model_without_blocks_is_refused(model: Path, calibration_text: Path) -> None:
    rewrite_config(model, {"num_hidden_layers": 0})
    assert_refused(quantize(model, calibration_text), "LlamaForCausalLM says num_hidden_layers 0; give a model with")


def test_a_token_that_the_model_does_not_know_is_refused(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    small = transformers.LlamaConfig(**{**TINY.to_dict(), "vocab_size": 512})
    model = save_random_model(small, tmp_path / "model", tokenizer_from=tiny_llama)
    refused = quantize(model, calibration_text)
    assert_refused(
        refused, "the tokenizer gives token", "but the model knows 512; tokenizer files and weights are not of"
    )
