"""Tuning the whole model on the KL divergence of its next-token probabilities from the full-precision model's.

Block-wise tuning cannot judge what an error of a block does to the model's answer; here that is the loss:

    L = mean over tokens of Σ_v p(v)·(log p(v) − log p̂(v)),  p full precision, p̂ quantized

Tuned are the codes, by SignRound's sign step, and what every format stores in floats anyway: the fp16 scales (and
minimums, super-scales) of the matrices, norm weights and biases. Nothing new is stored, so files stay valid. Each fp16
field f is f₀·(1 + a), rounded to fp16 in the forward pass with the gradient passed straight through; ŵ is linear in it,
so ∂L/∂a = f₀·∂ŵ/∂f·G with G = ∂L/∂ŵ. a and the float tensors descend by Adam (Kingma and Ba 2015).

Several ranks share samples and tunables (as ZeRO does, arXiv 1910.02054): each runs its own samples through all blocks,
but keeps codes, positions and moments of its own tunables alone. When a block runs, owners send its weights; after it
they step on the sum of all gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from signround_edge.formats import QuantizedTensor
from signround_edge.model.decoder import Decoder, set_tensor
from signround_edge.progress import Progress
from signround_edge.tuning.calibration.block_call import Shared
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.ranks import ALONE, Ranks
from signround_edge.tuning.schedule import check_steps
from signround_edge.tuning.settings import TuningSettings
from signround_edge.tuning.whole_model.divergence import TopProbabilities, kl_divergence
from signround_edge.tuning.whole_model.shared_slopes import SharedSlopes
from signround_edge.tuning.whole_model.tunables import Tunable

# Tokens whose logits are in memory at once: f32 [256, vocabulary].
TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class WholeModelReport:
    """Mean KL divergence over the held-out samples, in nats.

    Attributes:
        before: of the block-wise result.
        after: of what is kept; never above `before`.
        best_step: steps after which it was found (0: the block-wise result).
    """

    before: float
    after: float
    best_step: int

    def __str__(self) -> str:
        less = 1 - self.after / self.before if self.before else 0.0
        return f"held-out KL divergence {self.before:.3e} → {self.after:.3e} ({less:.0%} less) at step {self.best_step}"


@dataclass
class WholeModel:
    """The quantized model, loaded as a whole, beside what the exact one has after its blocks.

    Attributes:
        decoder: the tuned parameters of its blocks are there while a block runs, and on the meta device otherwise.
        shell: of the same decoder.
        tokens: int64 [samples, seqlen], this rank's own.
        inputs: what enters the quantized model's block 0, f32 [samples, seqlen, hidden].
        exact: the exact model's next-token probabilities at each position of `tokens`, one sample after another.
        dtypes: parameter name → dtype of its value in the model, of all that is tuned.
        tunables: parameter name → what is tuned, of those that this rank owns.
        autocast: context of the matrix products in the blocks.
        ranks: the processes that share samples and tunables.
    """

    decoder: Decoder
    shell: Shell
    tokens: Tensor
    inputs: Tensor
    exact: TopProbabilities
    dtypes: dict[str, torch.dtype]
    tunables: dict[str, Tunable]
    autocast: torch.autocast
    device: torch.device
    ranks: Ranks = ALONE

    def stored(self) -> dict[str, Tensor | QuantizedTensor]:
        """What this rank tunes, by parameter name, as the run directory stores it."""
        return {name: tunable.stored() for name, tunable in self.tunables.items()}

    def train_step(self, samples: Tensor, code_rate: float) -> float:
        """Set the gradients of all tunables on samples [n], as many on each rank, and move the codes.

        Returns:
            the mean KL divergence, or of several ranks what this one adds to it.
        """
        count = self.ranks.world * samples.numel() * self.tokens.shape[1]
        block_inputs: list[tuple[Tensor, Shared]] = []
        hidden = self.inputs[samples].to(self.device)
        shared: Shared = {}
        for index in range(len(self.decoder.blocks)):
            block_inputs.append((hidden, {name: dict(mapping) for name, mapping in shared.items()}))
            with torch.no_grad(), self._in_model(self._tunables_of_block[index]):
                hidden = self._block(index, samples, hidden, shared)
        last = hidden.requires_grad_()
        total = 0.0
        with self._in_model(self._tunables_outside):
            for divergences in self._divergences(samples, last):
                (divergences.sum() / count).backward()
                total += float(divergences.detach().double().sum())
            self._receive(self._tunables_outside, code_rate)
        slope, slopes = last.grad, SharedSlopes()
        # Each block runs again: its activations are in memory alone, for a fifth more time in all.
        for index in reversed(range(len(self.decoder.blocks))):
            block_input, shared = block_inputs.pop()
            block_input, given = block_input.detach().requires_grad_(), slopes.leaves(shared)
            left = {name: dict(mapping) for name, mapping in given.items()}
            with self._in_model(self._tunables_of_block[index]):
                output = self._block(index, samples, block_input, left)
                written, their_slopes = slopes.of_written(given, left)
                torch.autograd.backward([output, *written], [slope, *their_slopes])
                slopes.collect(given)
                slope = block_input.grad
                self._receive(self._tunables_of_block[index], code_rate)
        return total / count

    def divergence(self, samples: Tensor, batch_size: int) -> float:
        """Mean KL divergence over the samples [n] of all ranks; each block is made once for all of them."""
        parts = samples.split(batch_size) if len(samples) else ()  # of several ranks some may hold out none
        batches: list[tuple[Tensor, Tensor, Shared]] = [(part, self.inputs[part].to(self.device), {}) for part in parts]
        with torch.no_grad():
            for index in range(len(self.decoder.blocks)):
                with self._in_model(self._tunables_of_block[index]):
                    batches = [(part, self._block(index, part, hidden, left), left) for part, hidden, left in batches]
            with self._in_model(self._tunables_outside):
                total = torch.zeros((), dtype=torch.float64)
                for part, hidden, _ in batches:
                    for found in self._divergences(part, hidden):
                        total += found.double().sum().cpu()
        return float(self.ranks.sum(total)) / (self.ranks.total(samples.numel()) * self.tokens.shape[1])

    @contextlib.contextmanager
    def _in_model(self, names: Sequence[str]) -> Iterator[None]:
        """Tuned parameters as they are now; within, the model has them, and memory for no others."""
        for name in names:
            set_tensor(self.decoder.model, name, nn.Parameter(self._value(name)))
        try:
            yield
        finally:
            for name in names:
                parameter = self.decoder.model.get_parameter(name)
                set_tensor(self.decoder.model, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _value(self, name: str) -> Tensor:
        tunable = self.tunables.get(name)
        if tunable is None:
            shape = self.decoder.model.get_parameter(name).shape
            value = torch.empty(shape, dtype=self.dtypes[name], device=self.device)
        else:
            value = tunable.value()
        self.ranks.take(self.numbers[name], value)
        return value

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Parameter name → the number by which a rank `owns` it."""
        return {name: number for number, name in enumerate(self.dtypes)}

    @functools.cached_property
    def _tunables_of_block(self) -> list[list[str]]:
        prefixes = [self.decoder.block_prefix(index) for index in range(len(self.decoder.blocks))]
        return [[name for name in self.dtypes if name.startswith(prefix)] for prefix in prefixes]

    @functools.cached_property
    def _tunables_outside(self) -> list[str]:
        inside = {name for names in self._tunables_of_block for name in names}
        return [name for name in self.dtypes if name not in inside]

    def _block(self, index: int, samples: Tensor, hidden: Tensor, shared: Shared) -> Tensor:
        call = self.shell.block_call(index, self.tokens[samples], self.device)
        with self.autocast:
            return call.run(self.decoder.blocks[index], hidden, shared).float()

    def _divergences(self, samples: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """KL divergence f32 [tokens] of some tokens after the others, for the last block's output of `samples`."""
        seqlen = self.tokens.shape[1]
        positions = (samples.unsqueeze(-1) * seqlen + torch.arange(seqlen)).flatten().split(TOKENS_AT_ONCE)
        for part, rows in zip(positions, hidden.flatten(0, 1).split(TOKENS_AT_ONCE), strict=True):
            yield kl_divergence(self.exact.at(part, self.device), self.shell.logits(rows))

    def _receive(self, names: Iterable[str], code_rate: float) -> None:
        """Pass the gradients of parameters on to their tunables, and let go of them."""
        parameters = {name: self.decoder.model.get_parameter(name) for name in names}
        self.ranks.sum_gradients(parameters)
        for name, parameter in parameters.items():
            if parameter.grad is not None and name in self.tunables:
                self.tunables[name].receive(parameter.grad, code_rate)
            parameter.grad = None


def tune_whole_model(
    model: WholeModel, settings: TuningSettings, batches: Iterator[Tensor], held_out: Tensor, progress: Progress
) -> tuple[dict[str, Tensor | QuantizedTensor], WholeModelReport]:
    """Tune the model's tunables; returns what is kept of this rank's own, as the run directory stores it.

    Args:
        batches: endless iterator of sample indices to train on.
        held_out: sample indices to choose the best step on.
    """
    shifts = [shift for tunable in model.tunables.values() for shift in tunable.shifts.values()]
    optimizer = torch.optim.Adam(shifts, lr=settings.whole_model_lr, betas=(0.9, 0.99))
    steps = settings.whole_model_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    before = best = model.divergence(held_out, settings.batch_size)
    best_step, kept = 0, model.stored()
    check_at = check_steps(steps, settings.checks)
    for step in range(steps):
        optimizer.zero_grad()  # experts that no token of a batch reaches get no gradient, and must not keep their last
        model.train_step(next(batches), settings.whole_model_code_lr * (1 - step / steps))
        optimizer.step()
        schedule.step()
        if step + 1 in check_at:
            found = model.divergence(held_out, settings.batch_size)
            progress.line(f"whole model: step {step + 1} of {steps}, held-out KL divergence {found:.3e}")
            if found < best:
                best, best_step, kept = found, step + 1, model.stored()
    return kept, WholeModelReport(before, best, best_step)
