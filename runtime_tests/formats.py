"""What `verify` must know of each artifact format, behind one face: `artifact_format` and `expect`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from runtime_tests.interface import Runtime, Session
from runtime_tests.runtimes.llama_cpp import LlamaCppSession
from signround_edge.errors import UserError
from signround_edge.metrics import FloatArray, Windows
from signround_edge.run_directory import RunDirectory

_CHARACTERS_A_TOKEN = 8
_LAST_TOKENS_IGNORED = 8  # where a text is cut short, its last word may be cut too


@dataclass(frozen=True)
class Expectation:
    """What an artifact should be.

    Attributes:
        expected: tensor name → what makes its weights, f32 [rows, values a row].
        computes_in_floats: the runtime rounds no activation on this artifact, so the tight gate is for itself.
        open_control: opens the same graph so that the runtime computes in floats; None where the artifact is that.
        problem: something besides weights that is not what it should be, in one sentence.
        notes: what could not be checked.
    """

    expected: dict[str, Callable[[], FloatArray]]
    computes_in_floats: bool
    open_control: Callable[[Runtime], Session] | None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)

    def tokenizer_note(self, session: Session, windows: Windows, text: Path) -> str | None:
        """What differs when the artifact's own tokenizer cuts the text; None when nothing does, or it has none."""
        if not isinstance(session, LlamaCppSession):
            return None
        content = text.read_text(encoding="utf-8")[: _CHARACTERS_A_TOKEN * windows.tokens.size]
        found = session.tokenize(content)[:-_LAST_TOKENS_IGNORED]
        n_ctx = windows.tokens.shape[1]
        for i, (ours, theirs) in enumerate(zip(windows.tokens.reshape(-1).tolist(), found, strict=False)):
            if ours != theirs and i % n_ctx:  # the first token of a window may have become BOS
                return (
                    f"its tokenizer cuts the text differently: token {i} is {theirs} "
                    f"({session.detokenize([theirs])!r}), {ours} with the original tokenizer"
                )
        return None


def artifact_format(path: Path) -> str:
    """Either "gguf" or "onnx". UserError when it is neither, by its name and its first bytes."""
    if path.is_dir():
        if (path / "genai_config.json").is_file() or any(path.glob("*.onnx")):
            return "onnx"
        raise UserError(f"{path} is a folder without an ONNX model; give the folder or the file that `export` wrote")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path that `export` wrote") from error
    if magic == b"GGUF" or path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".onnx":
        return "onnx"
    raise UserError(f"{path} is neither a GGUF file nor an ONNX model; give the path that `export` wrote")


def expect(run: RunDirectory, artifact: Path, format_: str, folder: Path) -> Expectation:
    """What an artifact of the run should be; its control is written into `folder`.

    Raises:
        UserError: the artifact is damaged, or its control cannot be made.
        CheckFailed: it was not exported from this run.
    """
    if format_ == "onnx":
        from runtime_tests.onnx_artifact import expect_onnx

        return expect_onnx(run, artifact)
    from runtime_tests.gguf_artifact import expect_gguf

    return expect_gguf(run, artifact, folder)
