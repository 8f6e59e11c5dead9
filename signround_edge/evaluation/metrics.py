"""Perplexity, KL divergence and top-1 agreement as `llama-perplexity` defines them.

Source of the definitions: tools/perplexity/perplexity.cpp in llama.cpp. A text is cut into windows of n_ctx tokens;
where the tokenizer adds a BOS token, the first token of each window is replaced by it; only positions n_ctx/2 … n_ctx−2
are scored, each on the token that follows it. Standard errors treat scored tokens as independent, as there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from signround_edge.errors import UserError

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int32]

# A broken file's logits may be NaN, infinite or huge. Its figures say so; numpy's warnings would only be noise.
_QUIET = np.errstate(over="ignore", invalid="ignore")


@dataclass(frozen=True)
class Windows:
    """Windows of tokens to score.

    Attributes:
        tokens: int32 [n_windows, n_ctx].
    """

    tokens: TokenArray

    @property
    def first_scored(self) -> int:
        """First position of a window whose prediction is scored."""
        return int(self.tokens.shape[1]) // 2

    @property
    def scored(self) -> slice:
        """Positions of a window whose predictions are scored."""
        return slice(self.first_scored, int(self.tokens.shape[1]) - 1)

    def targets(self, window: int) -> TokenArray:
        """The tokens that the scored positions must predict, int32 [n_scored]."""
        return self.tokens[window, self.first_scored + 1 :]


def cut_windows(
    tokens: list[int], n_ctx: int, bos: int | None, max_windows: int | None = None, flag: str = "--text"
) -> Windows:
    """Cut tokens (with BOS in front, where the tokenizer adds one) into windows; the tail is dropped.

    Args:
        bos: the BOS token when the tokenizer adds one, else None.
        flag: that the text was given by.
    Raises:
        UserError: fewer tokens than one window.
    """
    count = len(tokens) // n_ctx
    if count == 0:
        raise UserError(
            f"the text has {len(tokens)} tokens, which is less than one window of {n_ctx}; "
            f"give a longer {flag}{' or a smaller --n-ctx' if flag == '--text' else ''}"
        )
    count = min(count, max_windows) if max_windows else count
    array = np.asarray(tokens[: count * n_ctx], dtype=np.int32).reshape(count, n_ctx)
    if bos is not None:
        array[:, 0] = bos
    return Windows(array)


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log-probabilities f32 [n, vocab] in a numerically safe order."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(
        np.float32
    )
    return result


@dataclass(frozen=True)
class Scores:
    """Figures over all scored tokens; the field names are the `--json` contract.

    Attributes:
        tokens: number of scored tokens.
        kld_*: divergence KL(reference ‖ model) in nats; None without a reference.
        top1_agreement: share of tokens whose most likely successor is the reference's.
    """

    ppl: float
    ppl_stderr: float
    tokens: int
    ppl_reference: float | None = None
    kld_mean: float | None = None
    kld_stderr: float | None = None
    kld_median: float | None = None
    kld_p99: float | None = None
    kld_max: float | None = None
    top1_agreement: float | None = None
    ln_ratio_stderr: float | None = None

    def to_json(self) -> dict[str, float]:
        """The document of `evaluate --json`: the figures that there are."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class ScoreKeeper:
    """Collects per-token figures window by window; keeps no logits."""

    nll: list[FloatArray] = field(default_factory=list)
    nll_reference: list[FloatArray] = field(default_factory=list)
    kld: list[FloatArray] = field(default_factory=list)
    same_top: list[NDArray[np.bool_]] = field(default_factory=list)

    @_QUIET
    def add(self, logits: FloatArray, targets: TokenArray, reference: FloatArray | None = None) -> None:
        """Add one window.

        Args:
            logits: f32 [n_scored, vocab], the predictions at the scored positions.
            targets: int32 [n_scored].
            reference: logits of the reference model, same shape.
        """
        log_p = log_softmax(logits)
        rows = np.arange(len(targets))
        self.nll.append(-log_p[rows, targets])
        if reference is None:
            return
        log_r = log_softmax(reference)
        self.nll_reference.append(-log_r[rows, targets])
        self.kld.append((np.exp(log_r) * (log_r - log_p)).sum(axis=-1, dtype=np.float64).astype(np.float32))
        self.same_top.append(log_p.argmax(axis=-1) == log_r.argmax(axis=-1))

    def add_figures(
        self, nll: FloatArray, nll_reference: FloatArray, kld: FloatArray, same_top: NDArray[np.bool_]
    ) -> None:
        """Add figures of one window that were computed elsewhere; all [n_scored]."""
        self.nll.append(nll)
        self.nll_reference.append(nll_reference)
        self.kld.append(kld)
        self.same_top.append(same_top)

    @_QUIET
    def scores(self) -> Scores:
        """The figures so far; at least one window must have been added."""
        nll = np.concatenate(self.nll).astype(np.float64)
        ppl = float(np.exp(nll.mean()))
        basic = Scores(ppl=ppl, ppl_stderr=ppl * _stderr(nll), tokens=len(nll))
        if not self.kld:
            return basic
        kld = np.concatenate(self.kld).astype(np.float64)
        reference = np.concatenate(self.nll_reference).astype(np.float64)
        return Scores(
            ppl=ppl,
            ppl_stderr=basic.ppl_stderr,
            tokens=basic.tokens,
            ppl_reference=float(np.exp(reference.mean())),
            kld_mean=float(kld.mean()),
            kld_stderr=_stderr(kld),
            kld_median=float(np.median(kld)),
            kld_p99=float(np.quantile(kld, 0.99)),
            kld_max=float(kld.max()),
            top1_agreement=float(np.concatenate(self.same_top).mean()),
            ln_ratio_stderr=_stderr(nll - reference),
        )


def _stderr(values: NDArray[np.float64]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
