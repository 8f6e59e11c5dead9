"""What `verify` expects of an artifact: its weights, its control, and whatever besides weights must be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from runtime_tests.interface import Runtime, Session
from signround_edge.evaluation.metrics import FloatArray, Windows
from signround_edge.run_directory import RunDirectory

_CHARACTERS_A_TOKEN = 8
_LAST_TOKENS_IGNORED = 8  # where a text is cut short, its last word may be cut too


@runtime_checkable
class Tokenizes(Protocol):
    """A session whose artifact holds a tokenizer of its own, which the runtime runs."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with BOS and EOS where the file asks for them."""
        ...

    def detokenize(self, tokens: list[int]) -> str:
        """Text of tokens, control tokens left out."""
        ...


@dataclass(frozen=True)
class Expectation:
    """What an artifact should be.

    Attributes:
        expected: tensor name → what makes its weights, f32 [rows, values a row].
        computes_in_floats: the runtime rounds no activation on this artifact, so the tight gate is for itself.
        open_control: opens the same graph so that the runtime computes in floats; None where the artifact is that.
        open_float_graph: opens the artifact's own graph with its own metadata, right or wrong, so that the runtime
            computes in floats: where it leaves torch can then be located. UserError when that cannot be made.
        control_file: the control as a file of its own, where it is one.
        layer_error: relative error of hidden states that the runtime's own approximations explain, on any sound file.
        computes: entries of config.json with which transformers' model computes what the runtime is known to compute,
            where that is a little else than the run's model.
        problem: something besides weights that is not what it should be, in one sentence.
        notes: what could not be checked.
    """

    expected: dict[str, Callable[[], FloatArray]]
    computes_in_floats: bool
    open_control: Callable[[Runtime], Session] | None
    open_float_graph: Callable[[Runtime], Session]
    control_file: Path | None = None
    layer_error: float = 0.0
    computes: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    notes: list[str] = field(default_factory=list)

    def tokenizer_note(self, session: Session, windows: Windows, text: Path) -> str | None:
        """What differs when the artifact's own tokenizer cuts the text; None when nothing does, or it has none."""
        if not isinstance(session, Tokenizes):
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


# What an artifact of the run should be; the folder is for files that are only needed meanwhile. UserError when the
# artifact is damaged, CheckFailed when it was not exported from this run.
Expect = Callable[[RunDirectory, Path, Path], Expectation]
