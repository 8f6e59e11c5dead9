"""The folder's card, what level 4 costs, and that every program of card and docs runs as it stands there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import LlamaConfig, OPTConfig, PretrainedConfig

from exporters.onnx.artifact.level_cost import add_level_cost
from exporters.onnx.artifact.reader import changed_files, read_sidecar, read_tensors
from exporters.onnx.options import LevelCost
from runtime_tests import accuracy_levels
from runtime_tests.accuracy_levels import check_card_text, level_4_cost
from runtime_tests.worker.onnxruntime_engine import OnnxEngine
from signround_edge.cli import main
from signround_edge.errors import UserError
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import BASE, VOCABULARY, Exported, export
from tests.exporters.onnx.test_onnx_export import expected_tokens, mean_kl
from tests.exporters.onnx.test_onnx_tracing import OPT
from tests.support import make_run

DOCS = Path(__file__).parents[3] / "docs" / "onnx.md"
MakeRun = Callable[[PretrainedConfig, str], RunDirectory]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the people of the world have told the world of the people " * 300)
    return path


@pytest.fixture(scope="module")
def measured(llama_run: RunDirectory, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """As the command line has it."""
    out = tmp_path_factory.mktemp("card") / "out"
    flags = ["--accuracy-level", "1", "--card-text", str(text)]
    result = CliRunner().invoke(main, ["export", str(llama_run.path), "--format", "onnx", "-o", str(out), *flags])
    assert result.exit_code == 0, result.output
    assert re.search(r"accuracy level 4 costs a mean KL divergence of \S+ here; .*: --accuracy-level 4", result.output)
    return Exported(llama_run, out)


def test_the_card_says_which_level_and_what_level_4_costs(measured: Exported) -> None:
    sidecar = json.loads((measured.folder / "signround_edge.json").read_text())
    cost = LevelCost(**sidecar["level_4_cost"])
    card = (measured.folder / "README.md").read_text()
    assert "1: MatMulNBits computes in f32" in card
    assert f"| perplexity | {cost.ppl_floats:.4f} | {cost.ppl_level_4:.4f} |" in card
    assert f"{cost.kld_mean:.2e}" in card
    assert "words.txt" in card
    assert f"{sum(size for *_, size in read_tensors(measured.folder)):,}" in card
    assert changed_files(measured.folder) == []


def test_the_cost_is_that_of_the_graph_at_both_levels(measured: Exported, text: Path) -> None:
    cost = level_4_cost(measured.folder, measured.run.config_dir, text)
    assert isinstance(cost, LevelCost)
    from signround_edge.evaluation.perplexity import text_windows

    windows = text_windows(measured.run.config_dir, text, 256, 8)
    assert cost.tokens == len(windows.tokens) * 127
    at = {level: OnnxEngine(measured.folder, accuracy_level=level) for level in (1, 4)}
    kl = [
        mean_kl(*(torch.from_numpy(at[level].logits(window)[windows.scored]) for level in (1, 4)))
        for window in windows.tokens
    ]
    assert cost.kld_mean == pytest.approx(sum(kl) / len(kl), rel=1e-2)
    assert cost.kld_mean > 1e-6


def test_without_figures_the_card_says_why(
    llama_export: Exported, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "was not measured: nobody asked for it" in (llama_export.folder / "README.md").read_text()
    monkeypatch.setattr(accuracy_levels, "UNASKED_BYTES", 1000)
    reason = level_4_cost(llama_export.folder, llama_export.run.config_dir, None)
    assert "export with --card-text" in str(reason)
    assert isinstance(level_4_cost(llama_export.folder, llama_export.run.config_dir, text), LevelCost)
    with pytest.raises(UserError, match=r"--card-text .*nowhere does not exist"):
        check_card_text(tmp_path / "nowhere")


def test_adding_a_cost_changes_card_and_sidecar_and_nothing_else(llama_export: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_export.folder, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    add_level_cost(folder, "the text is too short")
    assert "was not measured: the text is too short." in (folder / "README.md").read_text()
    assert read_sidecar(folder).level_4_cost is None
    add_level_cost(folder, LevelCost(10.0, 10.5, 0.01, 0.99, 100, "words.txt"))
    assert changed_files(folder) == []
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name for name in before | after if before.get(name) != after.get(name)} == {
        "README.md",
        "signround_edge.json",
    }
    add_level_cost(folder, "nobody asked for it")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_cost_that_cannot_be_written_changes_nothing(llama_export: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_export.folder, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "signround_edge.json.partial").mkdir()  # where the second of the two files is to be written
    with pytest.raises(OSError, match=r"signround_edge\.json"):
        add_level_cost(folder, "the text is too short")
    (folder / "signround_edge.json.partial").rmdir()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UserError("the text is too short")])
def test_a_failure_while_level_4_is_measured_leaves_a_complete_folder(
    failure: BaseException, llama_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> LevelCost:
        raise failure

    monkeypatch.setattr(accuracy_levels, "measure_level_4", fail)
    out = tmp_path / "out"
    arguments = ["export", str(llama_export.run.path), "--format", "onnx", "-o", str(out), "--card-text", str(DOCS)]
    assert CliRunner().invoke(main, arguments).exit_code != 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    for file in llama_export.folder.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_missing_card_text_is_refused_before_the_export(llama_run: RunDirectory, tmp_path: Path) -> None:
    arguments = ["export", str(llama_run.path), "-o", str(tmp_path / "out"), "--card-text", str(tmp_path / "nowhere")]
    result = CliRunner().invoke(main, [*arguments, "--format", "onnx"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "nowhere does not exist" in result.stderr
    assert "--card-text is for --format onnx" in CliRunner().invoke(main, [*arguments, "--format", "gguf"]).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_floats_has_no_level(llama_run: RunDirectory, tmp_path: Path) -> None:
    out = export(llama_run, tmp_path / "out", dtype="f32")
    card = (out / "README.md").read_text()
    assert "Accuracy level" not in card
    assert card.startswith("# f32 floats with the values of gguf:q4_0,onnx:w4g32, by signround-edge")


def test_a_graph_in_f16_says_so_and_has_no_level(make_random_run: MakeRun, tmp_path: Path) -> None:
    run = make_random_run(LlamaConfig(**{**BASE, "num_hidden_layers": 1}), "onnx:w4g32")
    command = ["export", str(run.path), "--format", "onnx", "--io-dtype", "f16"]
    refused = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "no"), "--card-text", str(DOCS)])
    assert "--io-dtype f16 has none; leave it out" in refused.stderr
    assert CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out")]).exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# onnx:w4g32, computing in f16,")
    assert "The graph computes in f16" in card
    assert "level 4" not in card
    assert changed_files(tmp_path / "out") == []


# The programs. Each ends with the tokens of prompt and answer in a variable; the lines below print them.

GENAI_TOKENS = "import json\nprint(json.dumps([int(t) for t in generator.get_sequence(0)]))\n"
PLAIN_TOKENS = "import json\nprint(json.dumps(ids[0].tolist()))\n"
DOCS_TOKENS = "print(json.dumps(text))\n"


def program_of(page: Path, heading: str = "") -> str:
    """The one program of a page, or of the section that a heading begins."""
    section = page.read_text().partition(heading)[2].partition("\n## ")[0] if heading else page.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


def tokens_of(code: str, folder: Path) -> list[int]:
    """Run the program in that folder; the tokens on the last line that it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(token) for token in json.loads(done.stdout.splitlines()[-1])]


def sentencepiece() -> Tokenizer:
    """A tokenizer as Llama 2 has it: spaces are ▁, and what has no token is bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replaced = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [replaced, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 10, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the people of the world have told the world of the people"] * 3, trainer)
    return tokenizer


def with_tokenizer(run: RunDirectory, out: Path, adds_bos: bool, tokenizer_class: str | None = None) -> RunDirectory:
    """The same model with a tokenizer that puts BOS before a text, or nothing; of that class, or of none."""
    model = shutil.copytree(Path(run.manifest.source["model"]), out / "model")
    file, config = model / "tokenizer.json", model / "tokenizer_config.json"
    tokenizer = sentencepiece() if tokenizer_class == "LlamaTokenizer" else Tokenizer.from_file(str(file))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(file))
    if tokenizer_class is not None:
        config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": tokenizer_class}))
    return make_run(model, out / "run", run.manifest.scheme)


TOKENIZERS = {
    "bos": (True, None),
    "no-bos": (False, None),
    "qwen-bos": (True, "Qwen2Tokenizer"),
    "llama-bos": (True, "LlamaTokenizer"),
    "llama-no-bos": (False, "LlamaTokenizer"),  # to which onnxruntime-genai would add BOS, were it told to
}


BY_DEFAULT = ("bos", "no-bos", "llama-no-bos")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.full) for name in TOKENIZERS],
)
def built(
    request: pytest.FixtureRequest, make_random_run: MakeRun, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    folder = tmp_path_factory.mktemp("built")
    source = make_random_run(LlamaConfig(**{**BASE, "num_hidden_layers": 1}), "onnx:w4g32")
    adds_bos, tokenizer_class = TOKENIZERS[request.param]
    run = with_tokenizer(source, folder, adds_bos, tokenizer_class)
    assert (load_tokenizer(run.config_dir)("Once")["input_ids"][0] == 1) is adds_bos
    return Exported(run, export(run, folder / "out"))


def test_the_cards_program_continues_the_very_tokens_of_transformers(built: Exported) -> None:
    program = program_of(built.folder / "README.md").replace('folder = "."', f"folder = {str(built.folder)!r}")
    tokens = tokens_of(program + GENAI_TOKENS, built.folder.parent)
    prompt = load_tokenizer(built.run.config_dir)("Once")["input_ids"]
    assert tokens[: len(prompt)] == prompt
    assert len(tokens) > len(prompt)


def test_the_example_of_the_docs_generates_what_torch_generates(built: Exported, tmp_path: Path) -> None:
    code = program_of(DOCS, "## Without onnxruntime-genai")
    assert len(code.splitlines()) <= 20
    shutil.copytree(built.folder, tmp_path / "model-onnx")
    tokens = tokens_of(code + DOCS_TOKENS, tmp_path)
    prompt = load_tokenizer(built.run.config_dir)("The state of the union")["input_ids"]
    assert tokens == expected_tokens(built.run, prompt, len(prompt) + 20)


@pytest.mark.parametrize("adds_bos", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_cards_program_of_a_graph_without_cache_generates_what_torch_generates(
    adds_bos: bool, make_random_run: MakeRun, tmp_path: Path
) -> None:
    source = make_random_run(OPTConfig(**{**OPT, "num_hidden_layers": 1}), "onnx:w4g32")
    run = with_tokenizer(source, tmp_path, adds_bos)
    out = export(run, tmp_path / "out", no_cache=True)
    tokens = tokens_of(program_of(out / "README.md") + PLAIN_TOKENS, out)
    prompt = load_tokenizer(run.config_dir)("Once")["input_ids"]
    assert tokens == expected_tokens(run, prompt, len(prompt) + 20)


def test_the_card_gives_a_graph_what_it_asks_for(
    llama_run: RunDirectory, llama_export: Exported, tmp_path: Path
) -> None:
    """A template may want other inputs than the graphs that are made here."""
    control = export(llama_run, tmp_path / "control", dtype="f32")
    (control / "genai_config.json").unlink()
    out = export(llama_run, tmp_path / "out", template=control)
    card = (out / "README.md").read_text()
    assert "```" not in card
    assert "Its inputs are those of the template: input_ids, attention_mask, past_key_values.0.key" in card
