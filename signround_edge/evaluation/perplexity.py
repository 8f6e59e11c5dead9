"""Perplexity and KL divergence of torch models: the original, or a run directory's dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from signround_edge.arguments import at_least, read_text
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import FloatArray, ScoreKeeper, Scores, TokenArray, Windows, cut_windows
from signround_edge.model.config import longest_window
from signround_edge.model.tokenizer import added_bos, check_tokens, load_tokenizer


class TorchSession:
    """A torch model that gives logits for one window of tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of one window, int32 [n]."""
        check_tokens(int(tokens.max()), self.model)
        with torch.no_grad():
            device = next(self.model.parameters()).device
            ids = torch.from_numpy(tokens.astype("int64")).unsqueeze(0).to(device)
            array: FloatArray = self.model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()
        return array


def check_windows(n_ctx: int, max_windows: int | None) -> None:
    """UserError for windows that there cannot be."""
    at_least("--n-ctx", n_ctx, 4)
    if max_windows is not None:
        at_least("--windows", max_windows, 1)


def text_windows(
    tokenizer_dir: Path, text: Path, n_ctx: int = 512, max_windows: int | None = None, flag: str = "--text"
) -> Windows:
    """Windows of a text as llama-perplexity cuts them, BOS rule included.

    Args:
        flag: that the text was given by.
    Raises:
        UserError: the text is missing, not UTF-8 or too short, or a window is longer than the model can see.
    """
    check_windows(n_ctx, max_windows)
    content = read_text(flag, text)
    positions = longest_window(tokenizer_dir)
    if positions is not None and n_ctx > positions:
        raise UserError(
            f"--n-ctx {n_ctx} is more than the {positions} positions of the model; give --n-ctx {positions}"
        )
    tokenizer = load_tokenizer(tokenizer_dir)
    tokens = list(tokenizer(content, verbose=False)["input_ids"])
    return cut_windows(tokens, n_ctx, added_bos(tokenizer), max_windows, flag)


def evaluate(session: Any, windows: Windows, reference: Any = None) -> Scores:
    """Score a session (anything with `logits`) on windows, against a reference session when given."""
    keeper = ScoreKeeper()
    for index, window in enumerate(windows.tokens):
        scored = windows.scored
        base = None if reference is None else reference.logits(window)[scored]
        keeper.add(session.logits(window)[scored], windows.targets(index), base)
    return keeper.scores()
