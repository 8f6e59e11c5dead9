"""What is outside the blocks: the head, exact at the logits, and tables that are looked up by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.model.decoder import weight_of
from signround_edge.sensitivity.backward import Backward
from signround_edge.sensitivity.measured import HeadSensitivity
from signround_edge.tuning.calibration.shell import Shell

# Tokens and rows of the head that stand for all; of a head of 49,152 rows the costs differ by 1 % from those of all.
_TOKENS, _ROWS = 1024, 4096


class HeadPass:
    """Logits of all tokens: labels, the slopes of the last hidden states, and what the head itself needs."""

    def __init__(self, shell: Shell, seed: int) -> None:
        """The head must be loaded."""
        self.shell = shell
        self._generator = torch.Generator().manual_seed(seed)
        self._at_once = 1  # tokens: as many as are in a sample, for which the model surely has positions
        self._inputs: Tensor | None = None
        self._likely: Tensor | None = None
        self._tokens = 0
        self._kept: list[Tensor] = []

    def run(self, tokens: Tensor, hidden: Tensor, parts: list[slice]) -> tuple[Tensor, Tensor]:
        """(slopes f32 like `hidden`, labels int64 [samples, seqlen]).

        Args:
            tokens: int64 [samples, seqlen].
            hidden: what leaves the last block, f32 [samples, seqlen, hidden]; of several streams [.., streams, hidden].
        """
        slopes, labels = torch.empty_like(hidden), torch.empty_like(tokens)
        step, self._at_once = max(1, tokens.numel() // _TOKENS), tokens.shape[1]
        for part in parts:
            flat = hidden[part].flatten(0, 1)
            drawn = labels[part].flatten()
            found = slopes[part].flatten(0, 1)
            for start in range(0, len(flat), self._at_once):
                some = slice(start, start + self._at_once)
                found[some], drawn[some] = self._some(flat[some])
            self._kept.append(flat[::step].clone())
            slopes[part], labels[part] = found.view_as(slopes[part]), drawn.view_as(labels[part])
        return slopes, labels

    def _some(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        inputs, logits, _ = self._logits(leaf)
        probabilities = logits.detach().softmax(-1)
        labels = drawn_from(probabilities, self._generator)
        slope = probabilities.scatter_add(1, labels[:, None], torch.full((len(labels), 1), -1.0))
        (found,) = torch.autograd.grad(logits, leaf, slope)
        squares, total = inputs.square().sum(0), probabilities.sum(0)
        self._inputs = squares if self._inputs is None else self._inputs + squares
        self._likely = total if self._likely is None else self._likely + total
        self._tokens += len(hidden)
        return found, labels

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what the head reads [n, in], logits [n, vocabulary], the head's outputs, of which these are made)."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.extend([args[0], output])

        hook = self.shell.decoder.head.register_forward_hook(keep)
        try:
            logits = self.shell.logits(hidden)
        finally:
            hook.remove()
        inputs, output = seen
        return inputs.detach().reshape(len(hidden), -1), logits, output

    def found(self) -> HeadSensitivity:
        """Of all tokens so far."""
        assert self._inputs is not None
        assert self._likely is not None
        rows, stands_for = _standing_for_all(self._likely)
        read, likely, slopes = [], [], []
        for some in torch.cat(self._kept)[:_TOKENS].split(self._at_once):
            inputs, logits, output = self._logits(some.clone().requires_grad_())
            # What follows the head (a cap, a multiplier) sees each logit by itself.
            (slope,) = torch.autograd.grad(logits.sum(), output)
            of_rows = logits.detach().softmax(-1)[:, rows] * stands_for
            read.append(inputs)
            likely.append(of_rows / of_rows.sum(1, keepdim=True))
            slopes.append(slope.reshape(len(some), -1)[:, rows])
        slope = torch.cat(slopes)
        slope = slope[:1, :1].clone() if bool((slope == slope[0, 0]).all()) else slope
        return HeadSensitivity(self._inputs / self._tokens, torch.cat(read), rows, torch.cat(likely), slope)


def _standing_for_all(likely: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of rows, ascending, and how many each stands for: the most likely tokens' own, and some of the others.

    Args:
        likely: sums of each token's probabilities, f32 [vocabulary].
    """
    if len(likely) <= _ROWS:
        return torch.arange(len(likely)), torch.ones(len(likely))
    order = likely.argsort(descending=True)
    first, others = order[: _ROWS // 2], order[_ROWS // 2 :]
    some = others[:: -(-len(others) // (_ROWS // 2))]
    weight = likely[others].sum() / likely[some].sum().clamp_min(torch.finfo(torch.float32).tiny)
    rows = torch.cat([first, some])
    stands_for = torch.cat([torch.ones(len(first)), weight.expand(len(some))])
    ascending = rows.argsort()
    return rows[ascending], stands_for[ascending]


def drawn_from(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row's distribution: where the sum of probabilities [n, vocabulary] passes a random number."""
    sums = probabilities.double().cumsum(-1)
    drawn = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, drawn).squeeze(1).clamp_max(sums.shape[1] - 1)


def lookup_slopes(shell: Shell, tokens: Tensor, state: Backward, parts: list[slice]) -> dict[str, tuple[Tensor, int]]:
    """Parameter name → (E[g²] f32 [features] of a row that is looked up, rows), of every table by token.

    Args:
        state: slopes of what enters block 0, and of what blocks are given besides.
    """
    lookups = shell.decoder.lookups
    sums = {name: torch.zeros(weight_of(module).shape[1]) for name, module in lookups.items()}
    for part in parts:
        leaves: dict[str, Tensor] = {}
        hooks = [module.register_forward_hook(_replacing(name, leaves)) for name, module in lookups.items()]
        try:
            hidden, calls = shell.traced(tokens[part])
        finally:
            for hook in hooks:
                hook.remove()
        outputs, slopes = [hidden], [state.hidden[part]]
        for (index, number), slope in state.arguments.items():
            outputs.append(calls[index].tensors()[number])
            slopes.append(slope[part])
        needed = [(o, s) for o, s in zip(outputs, slopes, strict=True) if o.requires_grad]
        torch.autograd.backward([o for o, _ in needed], [s for _, s in needed])
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                factor = _factor(leaf.detach(), weight_of(lookups[name])[_rows(tokens[part], lookups[name])])
                sums[name] += leaf.grad.reshape(-1, leaf.shape[-1]).square().sum(0) * factor**2
    return {name: (total / tokens.numel(), len(weight_of(lookups[name]))) for name, total in sums.items()}


def _rows(tokens: Tensor, module: nn.Module) -> Tensor:
    return tokens.clamp_max(len(weight_of(module)) - 1)


def _replacing(name: str, leaves: dict[str, Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        leaves[name] = output.detach().clone().requires_grad_()
        return leaves[name]

    return replace


def _factor(output: Tensor, rows: Tensor) -> float:
    """By what a table multiplies its rows (Gemma's by √hidden)."""
    rows = rows.reshape(output.shape).float()
    return float((output * rows).sum() / rows.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
