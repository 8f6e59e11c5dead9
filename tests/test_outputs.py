"""No command writes into what it reads, and an export replaces nothing but an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import make_run, save_random_model
from transformers import LlamaConfig

from exporters.gguf.container.reader import GgufFile
from signround_edge.cli import main
from signround_edge.files import sha256_of

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=3072,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_run(save_random_model(CONFIG, folder / "model", tokenizer_from=tiny_llama), folder / "run", "gguf:q4_0")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `model`, its `run` and `text.txt`, in which commands run."""
    folder = shutil.copytree(made, tmp_path / "place")
    (folder / "text.txt").write_text("mine, and my fellow citizens'\n")
    monkeypatch.chdir(folder)
    return folder


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused_untouched(place: Path, command: list[object], *words: str) -> None:
    before = contents(place)
    result = run_cli(*command)
    assert (result.exit_code, "Traceback" in result.stderr) == (2, False), result.output
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert contents(place) == before


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
@pytest.mark.parametrize(
    "out",
    ["run", "run/manifest.json", "run/config/tokenizer.json", "run/blocks/0000.safetensors", "run/new", "link/new"],
)
def test_an_export_writes_nothing_into_its_run(format_: str, out: str, place: Path) -> None:
    (place / "link").symlink_to("run")
    assert_refused_untouched(
        place, ["export", "run", "--format", format_, "-o", out], "lies in", "which this command reads"
    )


@pytest.mark.parametrize("suffix", [".partial", ".previous"])
def test_an_export_beside_a_run_of_a_like_name_leaves_it(suffix: str, place: Path) -> None:
    (place / "run").rename(place / f"out{suffix}")
    assert_refused_untouched(
        place, ["export", f"out{suffix}", "--format", "onnx", "-o", "out"], "give a -o outside of it"
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["analyze", "run", "--out", "run"], "--out run/analysis.json lies in run"),
        (["verify", "run", "a.gguf", "--text", "text.txt", "--report", "run/proof"], "lies in run"),
        (
            ["verify", "run", "a.gguf", "--text", "text.txt", "--report", "model", "--reference", "model"],
            "--report model/certificate.json lies in model",
        ),
        (["rotate", "model", "-o", "model/rotated"], "-o model/rotated lies in model"),
        (["quantize", "model", "--scheme", "gguf:q4_0", "-o", "model/run"], "-o model/run lies in model"),
        (
            ["quantize", "model", "--scheme", "gguf:q4_0", "-o", "new", "--save-imatrix", "model/x.gguf"],
            "--save-imatrix model/x.gguf lies in model",
        ),
        (
            ["quantize", "model", "--scheme", "gguf:q4_0", "-o", "run", "--resume", "--save-imatrix", "run/x.gguf"],
            "--save-imatrix run/x.gguf lies in run",
        ),
    ],
)
def test_no_command_writes_into_the_folders_that_it_reads(command: list[object], words: str, place: Path) -> None:
    assert_refused_untouched(place, command, words)


def test_no_command_writes_over_the_files_that_it_reads(place: Path) -> None:
    page = place / "proof" / "certificate.html"
    page.parent.mkdir()
    page.write_text("a text")
    command = ["verify", "run", "a.gguf", "--report", "proof", "--text", "proof/certificate.html"]
    assert_refused_untouched(place, command, "--text and --report are the same file")
    command = ["quantize", "model", "--scheme", "gguf:q4_0", "-o", "new", "--calibration", "text.txt"]
    assert_refused_untouched(
        place, [*command, "--save-imatrix", "text.txt"], "--calibration and --save-imatrix are the same file"
    )


@pytest.mark.parametrize("out", ["text.txt", "model/model.safetensors"])
def test_a_gguf_export_does_not_replace_what_is_no_gguf_file(out: str, place: Path) -> None:
    command = ["export", "run", "--format", "gguf", "-o", out]
    assert_refused_untouched(place, command, f"-o {out} exists and is no GGUF file", "another -o, or remove it first")


def test_a_gguf_export_replaces_no_device(place: Path) -> None:
    assert_refused_untouched(
        place, ["export", "run", "--format", "gguf", "-o", "/dev/null"], "/dev/null is no regular file"
    )
    assert Path("/dev/null").is_char_device()


def test_a_gguf_export_replaces_empty_files_and_gguf_files(place: Path) -> None:
    file = place / "model.gguf"
    for before in (b"", b"GGUF and whatever follows"):
        file.write_bytes(before)
        assert run_cli("export", "run", "--format", "gguf", "-o", file).exit_code == 0
        assert GgufFile.open(file).tensors


def test_no_part_of_a_split_export_replaces_a_foreign_file(place: Path) -> None:
    command = ["export", "run", "--format", "gguf", "-o", "m.gguf", "--split-max-size", "100000"]
    assert run_cli(*command).exit_code == 0
    assert run_cli(*command).exit_code == 0  # an earlier export is replaced
    second = sorted(place.glob("m-00002-of-*.gguf"))[0]
    second.write_text("mine")
    assert_refused_untouched(place, command, f"{second.name} exists and is no GGUF file")
    second.unlink()
    template = sorted(place.glob("m-00001-of-*.gguf"))[0].name
    assert_refused_untouched(place, [*command[:-2], "-o", template, "--template", template], "are the same file")


def test_an_importance_matrix_does_not_replace_a_foreign_file(place: Path) -> None:
    (place / "old.dat").write_bytes(b"\x01\x00\x00\x00")
    command = ["quantize", "model", "--scheme", "gguf:q4_0", "-o", "new", "--samples", "1", "--seqlen", "4"]
    assert_refused_untouched(
        place, [*command, "--save-imatrix", "old.dat"], "--save-imatrix old.dat exists and is no GGUF"
    )
    assert not (place / "new").exists()


def test_an_onnx_export_replaces_an_export_and_nothing_more(place: Path) -> None:
    command: list[object] = ["export", "run", "--format", "onnx", "-o", "out", "--dtype", "f32"]
    assert run_cli(*command).exit_code == 0
    assert run_cli(*command).exit_code == 0
    assert_refused_untouched(place, [*command, "--template", "out/model.onnx"], "--template out/model.onnx lies in out")
    (place / "out" / "thesis.txt").write_text("mine")
    assert_refused_untouched(place, command, "an earlier export with other files in it (thesis.txt)", "another -o")
    (place / "out" / "signround_edge.json").write_text("{")
    assert_refused_untouched(place, command, "out holds a damaged export", "remove the folder, or give another -o")


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
def test_a_file_in_the_way_of_a_folder_is_named(format_: str, place: Path) -> None:
    command = ["export", "run", "--format", format_, "-o", "text.txt/new"]
    assert_refused_untouched(place, command, "text.txt/new was not written: text.txt is a file and no folder")
    command = ["quantize", "model", "--scheme", "gguf:q4_0", "-o", "text.txt/new"]
    assert_refused_untouched(place, command, "text.txt/new was not written: text.txt is a file and no folder")


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "-o", "text.txt"],
        ["analyze", "run", "--out", "text.txt"],
        ["verify", "run", "a.gguf", "--text", "text.txt", "--report", "text.txt"],
    ],
)
def test_a_file_that_is_given_for_a_folder_is_named(command: list[object], place: Path) -> None:
    assert_refused_untouched(place, command, "text.txt is a file and no folder")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
def test_a_place_for_no_files_is_not_said_to_be_full(place: Path) -> None:
    command = ["export", "run", "--format", "gguf", "-o", "/proc/new.gguf"]
    assert_refused_untouched(
        place, command, "/proc/new.gguf was not written (No such file or directory); choose another -o"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model/model.safetensors", "--card-text model/model.safetensors is not UTF-8 text"),
        ("text.txt", "give a longer --card-text"),
        ("run", "--card-text run is a folder; give a UTF-8 text file"),
    ],
)
def test_a_card_text_that_cannot_be_scored_is_refused_before_the_export(text: str, words: str, place: Path) -> None:
    assert_refused_untouched(place, ["export", "run", "--format", "onnx", "-o", "out", "--card-text", text], words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["quantize", "", "--scheme", "gguf:q4_0", "-o", "new"], "model is empty"),
        (["quantize", "model", "--scheme", "gguf:q4_0", "-o", ""], "-o is empty; give a path"),
        (["export", "run", "--format", "gguf", "-o", ""], "-o is empty; give a path"),
        (["export", "", "--format", "gguf", "-o", "new.gguf"], "run is empty; give a path"),
        (["rotate", "", "-o", "new"], "the name of the model is empty"),
        (["evaluate", "", "--text", "text.txt"], "path is empty; give a path"),
        (["evaluate", "model", "--text", "text.txt", "--reference", ""], "--reference is empty; give a path"),
        (["evaluate", "model", "--text", "model"], "--text model is a folder; give a UTF-8 text file"),
        (["evaluate", "model", "--text", "/dev/null"], "--text /dev/null is no regular file"),
        (["evaluate", "model", "--tasks", " , "], "--tasks names no task"),
        (["evaluate", "model", "--tasks", "piqa", "--limit", "0"], "--limit 0 must be at least 1"),
        (["evaluate", "model", "--text", "text.txt", "--windows", "0"], "--windows 0 must be at least 1"),
        (["evaluate", "model", "--text", "text.txt", "--n-ctx", "3"], "--n-ctx 3 must be at least 4"),
        (["export", "run", "--format", "onnx", "-o", "."], "is a folder with other files in it"),
    ],
)
def test_what_cannot_be_is_named_for_what_it_is(command: list[object], words: str, place: Path) -> None:
    assert_refused_untouched(place, command, words)
