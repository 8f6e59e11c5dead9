"""Every command and program in the documents runs as it stands there.

A document's blocks run in their order in a folder of its own. In most lies what README.md's commands wrote, since a
reader comes from there. What cannot run says so above its fence: `<!-- not run: reason -->`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer, GPT2Config

from signround_edge.cli import main
from tests.docs.documents import NO_CODE, ROOT, RUN_HERE, Block, blocks_of, documents, parse, prose, text_of
from tests.exporters.gguf.conftest import gpt2_split, train_byte_level
from tests.support import TOKENS, save_random_model

# What the tests do to a command, all of it: stand-ins for the names in the documents, and settings that make it fast.
MODEL, GPT2 = "path/or/org/model", "path/or/org/gpt2"
TEXTS = {"texts.txt": 40_000, "held-out.txt": 4_000}  # name → characters of the shipped speeches
FASTER = {
    "quantize": {"--steps": "2", "--samples": "4", "--seqlen": "32", "--start": "nearest"},
    "plan": {"--samples": "2", "--seqlen": "32", "--types": "Q2_K,Q4_K,Q8_0", "--cache": "cache"},
    "verify": {"--windows": "1", "--n-ctx": "64"},
    "evaluate": {"--windows": "1", "--n-ctx": "64"},
}
# Documents that begin with nothing, and those that take longer (docs/api.md also runs in tests/test_api.py).
FROM_NOTHING = ("docs/api.md",)
LONG = ("docs/api.md", "docs/onnx.md", "docs/options.md", "docs/plan.md")

ALL = [block for document in documents() for block in blocks_of(document)]
OTHERS = sorted({block.document for block in ALL if block.runs} - {"README.md"})


@pytest.fixture(scope="session")
def stand_ins(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_text: Path, evaluation_text: Path
) -> Callable[[Path], dict[str, str]]:
    """Puts the texts of the documents into a folder; returns name in the documents → what the tests take for it."""
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=3072, n_positions=128, **TOKENS)
    gpt2 = save_random_model(config, tmp_path_factory.mktemp("gpt2"), tokenizer_from=tiny_llama)
    sources = {"texts.txt": calibration_text, "held-out.txt": evaluation_text}

    def prepare(folder: Path) -> dict[str, str]:
        for name, size in TEXTS.items():
            (folder / name).write_text(sources[name].read_text(encoding="utf-8")[:size], encoding="utf-8")
        return {MODEL: str(tiny_llama), GPT2: str(gpt2)}

    return prepare


@pytest.fixture(scope="module")
def after_readme(
    tmp_path_factory: pytest.TempPathFactory, stand_ins: Callable[[Path], dict[str, str]]
) -> tuple[Path, dict[str, str]]:
    """A folder in which README.md's blocks have run, and the stand-ins."""
    folder = tmp_path_factory.mktemp("readme")
    names = stand_ins(folder)
    run_blocks([block for block in ALL if block.document == "README.md"], folder, names)
    return folder, names


def run_blocks(blocks: list[Block], folder: Path, stand_ins: dict[str, str]) -> None:
    """Run those that run here, in order, in the folder. AssertionError for the first one that fails."""
    with contextlib.chdir(folder):
        for block in blocks:
            if not block.runs:
                continue
            for stand_in, meant in stand_ins.items():
                block = Block(block.document, block.line, block.language, block.text.replace(stand_in, meant), None)
            if block.language == "python":
                exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
            else:
                for command in commands_of(block):
                    run_command(command, block.place)


def commands_of(block: Block) -> list[str]:
    """The commands of a block: in "console" the lines behind `$ `, in "bash" all lines; a final \\ joins lines.

    >>> commands_of(Block("text", 1, "console", "$ one \\\\\\n    two\\nprinted\\n", None))
    ['one     two']
    """
    lines = block.text.replace("\\\n", "").splitlines()
    if block.language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run_command(command: str, place: str) -> None:
    """Run a command, signround-edge in this process and others in a shell. AssertionError unless it exits with 0."""
    words = shlex.split(command, comments=True)
    if words[0] == "signround-edge" and not re.search(r"[|<>;&$]", command):
        result = CliRunner().invoke(main, faster(words[1:]))
        assert result.exit_code == 0, f"{place}: {command}\n{result.output}"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{place}: {command}\n{done.stdout}{done.stderr}"


def faster(arguments: list[str]) -> list[str]:
    """The arguments of a command with those of FASTER behind them, which count; rounding to nearest stays that."""
    settings = dict(FASTER.get(arguments[0], {}))
    if "--check" in arguments:
        return arguments
    if "--steps 0" in " ".join(arguments):
        del settings["--steps"]
    return arguments + [word for setting in settings.items() for word in setting]


def test_readme_runs_from_top_to_bottom(after_readme: tuple[Path, dict[str, str]]) -> None:
    folder, _ = after_readme
    assert {"run", "model-q4_0.gguf", "model-onnx"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("document", [pytest.param(d, marks=pytest.mark.full) if d in LONG else d for d in OTHERS])
def test_the_blocks_of_a_document_run(
    document: str, request: pytest.FixtureRequest, stand_ins: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "reader"
    if document in FROM_NOTHING:
        folder.mkdir()
    else:
        shutil.copytree(request.getfixturevalue("after_readme")[0], folder)
    names = stand_ins(folder)
    run_blocks([block for block in ALL if block.document == document], folder, names)


@pytest.mark.parametrize("block", [block for block in ALL if block.not_run], ids=lambda block: block.place)
def test_a_block_that_cannot_run_says_why(block: Block) -> None:
    pytest.skip(str(block.not_run))


@pytest.mark.parametrize("document", documents())
def test_every_block_runs_or_says_why_not(document: str) -> None:
    undecided = [b.place for b in blocks_of(document) if not b.not_run and b.language not in (*RUN_HERE, *NO_CODE)]
    assert not undecided, f"give the language ({', '.join(RUN_HERE + NO_CODE)}) or say <!-- not run: why -->"
    indented = re.findall(r"\n\n {4}(?:\$ )?(?:signround-edge|python3?|pip|make) .*", prose(text_of(document)))
    assert not indented, "put commands between fences, where this test sees them"


def test_a_block_that_fails_is_named(tmp_path: Path) -> None:
    for text, error in (
        ("```console\n$ signround-edge inspect absent.gguf\n```\n", r"text:1: .*\n.*absent\.gguf does not exist"),
        ("\n```bash\nls absent\n```\n", "text:2: ls absent"),
    ):
        with pytest.raises(AssertionError, match=error):
            run_blocks(list(parse(text)), tmp_path, {})
    with pytest.raises(ModuleNotFoundError):
        run_blocks(list(parse("```python\nimport absent\n```\n")), tmp_path, {})


def test_a_marker_needs_a_reason_and_counts_for_the_next_block_only() -> None:
    marked = "<!-- not run: needs a phone -->\n\n```bash\nadb devices\n```\n"
    assert [block.not_run for block in parse(marked + "```bash\nls\n```\n")] == ["needs a phone", None]
    assert [block.not_run for block in parse(marked.replace(": needs a phone", ":"))] == [None]
    assert [block.not_run for block in parse(marked.replace("-->\n", "-->\nand then\n"))] == [None]


@pytest.mark.parametrize("bos", [True, False])
def test_genai_gives_the_tokens_of_transformers_with_bos_and_without(
    bos: bool, after_readme: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    import onnxruntime_genai

    folder = shutil.copytree(after_readme[0] / "model-onnx", tmp_path / "model-onnx")
    train_byte_level(folder, gpt2_split(), bos)
    expected = AutoTokenizer.from_pretrained(folder)
    assert (expected.encode("")[:1] == [expected.bos_token_id]) == bos
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    tokenizer.update_options(add_special_tokens="true")
    for text in ("The state of the union", "", "ab <|im_end|> c"):
        assert list(tokenizer.encode(text)) == expected.encode(text), text


def test_the_program_in_readme_gives_the_tokens_of_transformers(after_readme: tuple[Path, dict[str, str]]) -> None:
    folder, names = after_readme
    (program,) = (b.text for b in ALL if b.document == "README.md" and "onnxruntime_genai" in b.text)
    with contextlib.chdir(folder):
        namespace: dict[str, object] = {}
        exec(compile(program, "README.md", "exec"), namespace)
    expected = AutoTokenizer.from_pretrained(names[MODEL]).encode("The state of the union")
    prompt = list(namespace["generator"].get_sequence(0))[: len(expected)]  # type: ignore[attr-defined]
    assert prompt == expected
