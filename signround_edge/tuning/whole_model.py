"""Tuning the whole model on the KL divergence of its next-token probabilities from the full-precision model's.

Block-wise tuning has fixed the codes; what every format stores in floats anyway is tuned here: the fp16 scales (and
minimums, super-scales) of the matrices, norm weights and biases. Nothing new is stored, so files stay valid.

    L = mean over tokens of Σ_v p(v)·(log p(v) − log p̂(v)),  p full precision, p̂ quantized

Each fp16 field f is f₀·(1 + a), rounded to fp16 in the forward pass with the gradient passed straight through; ŵ is
linear in it, so ∂L/∂a = f₀·∂ŵ/∂f·G with G = ∂L/∂ŵ. a and the float tensors descend by Adam (Kingma and Ba 2015).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from signround_edge.decoder import Decoder, set_parameter
from signround_edge.formats import QuantizedTensor
from signround_edge.formats.grid import Fields, to_fp16
from signround_edge.progress import Progress
from signround_edge.tuning.activations import Shell
from signround_edge.tuning.settings import TuningSettings, check_steps

# Tokens whose logits are in memory at once: f32 [256, vocabulary] of either model.
_TOKENS_AT_ONCE = 256


class ScaleFactors:
    """The fp16 fields of one quantized matrix, each times 1 + a, with codes and integer fields frozen.

    Attributes:
        tensor: the matrix before this stage.
        shifts: a of each fp16 field, f32, shaped as the field.
    """

    def __init__(self, tensor: QuantizedTensor, transposed: bool) -> None:
        self.tensor = tensor
        self.transposed = transposed
        self.shifts = {
            name: nn.Parameter(torch.zeros(field.shape, device=field.device))
            for name, field in tensor.fields.items()
            if field.dtype == torch.float16
        }

    def stored(self) -> QuantizedTensor:
        """The matrix with its fields as stored now."""
        moved = {name: to_fp16(self.tensor.fields[name].float() * (1 + a.detach())) for name, a in self.shifts.items()}
        return QuantizedTensor(self.tensor.grid, self.tensor.codes, {**self.tensor.fields, **moved})

    def value(self) -> Tensor:
        """The weight now, f32, in the module's own orientation."""
        weight = self.stored().dequantize()
        return weight.T.contiguous() if self.transposed else weight

    def receive(self, gradient: Tensor) -> None:
        """Set the gradients of the shifts from G, in the module's own orientation."""
        if self.transposed:
            gradient = gradient.T.contiguous()
        grid, now = self.tensor.grid, self.stored()
        leaves: Fields = {name: now.fields[name].float().requires_grad_() for name in self.shifts}
        with torch.enable_grad():
            weight = grid.dequantize_blocks(grid.blocked(now.codes), {**now.fields, **leaves})
        slopes = torch.autograd.grad(weight, list(leaves.values()), grid.blocked(gradient))
        for (name, shift), slope in zip(self.shifts.items(), slopes, strict=True):
            shift.grad = slope * self.tensor.fields[name].float()


class FloatShift:
    """A float tensor moved by unit·a, where the unit is its root mean square.

    Attributes:
        initial: the tensor before this stage, as stored.
        shifts: {"value": a}, f32, shaped as the tensor.
    """

    def __init__(self, initial: Tensor) -> None:
        self.initial = initial
        self._unit = initial.float().square().mean().sqrt()
        self.shifts = {"value": nn.Parameter(torch.zeros(initial.shape, device=initial.device))}

    def stored(self) -> Tensor:
        """The tensor as stored now: f32, because 16 bits would round away what is tuned."""
        return self.initial.float() + self._unit * self.shifts["value"].detach()

    def value(self) -> Tensor:
        """The tensor now, f32."""
        return self.stored()

    def receive(self, gradient: Tensor) -> None:
        """Set the gradient of a from that of the tensor."""
        self.shifts["value"].grad = gradient * self._unit


Tunable = ScaleFactors | FloatShift


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


def kl_divergence(exact: Tensor, found: Tensor) -> Tensor:
    """Σ_v p(v)·(log p(v) − log p̂(v)) of each token, f32 [tokens], from logits f32 [tokens, vocabulary]."""
    log_p = exact.log_softmax(-1)
    return (log_p.exp() * (log_p - found.log_softmax(-1))).sum(-1)


@dataclass
class WholeModel:
    """The quantized model, loaded as a whole, beside what the exact one has after its blocks.

    Attributes:
        decoder: its blocks' parameters are replaced by `install`.
        shell: of the same decoder.
        tokens: int64 [samples, seqlen].
        inputs: what enters the quantized model's block 0, f32 [samples, seqlen, hidden].
        exact: output of the exact model's last block, same shape.
        exact_outside: parameter name → f32 of all that the exact model has outside its blocks.
        outside: the same of the quantized model.
        tunables: parameter name → what is tuned.
        tied: alias → owner of shared parameters.
        autocast: context of the matrix products in the blocks.
        recompute: run each block again in the backward pass instead of keeping its graph: one block's activations in
            memory instead of all, for a third more time.
    """

    decoder: Decoder
    shell: Shell
    tokens: Tensor
    inputs: Tensor
    exact: Tensor
    exact_outside: dict[str, nn.Parameter]
    outside: dict[str, nn.Parameter]
    tunables: dict[str, Tunable]
    tied: dict[str, str]
    autocast: torch.autocast
    device: torch.device
    recompute: bool

    def install(self) -> None:
        """Put the tuned parameters, as they are now, into the model."""
        for name, tunable in self.tunables.items():
            parameter = nn.Parameter(tunable.value())
            set_parameter(self.decoder.model, name, parameter)
            if name in self.outside:
                self.outside[name] = parameter

    def train_step(self, samples: Tensor) -> float:
        """Set the gradients of all tunables on samples [n]; returns their mean KL divergence."""
        count = samples.numel() * self.tokens.shape[1]
        block_inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        hidden = self.inputs[samples].to(self.device)
        for index in range(len(self.decoder.blocks)):
            block_inputs.append(hidden.detach().requires_grad_())
            with torch.set_grad_enabled(not self.recompute):
                hidden = self._block(index, samples, block_inputs[-1])
            outputs.append(hidden)
        last = hidden.detach().requires_grad_()
        total = 0.0
        for divergences in self._divergences(samples, last):
            (divergences.sum() / count).backward()
            total += float(divergences.detach().double().sum())
        self._receive(self.outside)
        slope = last.grad
        for index in reversed(range(len(self.decoder.blocks))):
            output, block_input = outputs.pop(), block_inputs.pop()
            if self.recompute:
                output = self._block(index, samples, block_input)
            output.backward(slope)
            slope = block_input.grad
            self._receive(self.tunables_of_block[index])
        return total / count

    def divergence(self, samples: Tensor, batch_size: int) -> float:
        """Mean KL divergence over samples [n]."""
        total = 0.0
        with torch.no_grad():
            for part in samples.split(batch_size):
                hidden = self.inputs[part].to(self.device)
                for index in range(len(self.decoder.blocks)):
                    hidden = self._block(index, part, hidden)
                total += sum(float(found.double().sum()) for found in self._divergences(part, hidden))
        return total / (samples.numel() * self.tokens.shape[1])

    @functools.cached_property
    def tunables_of_block(self) -> list[list[str]]:
        """Names of the tunables of each block."""
        prefixes = [self.decoder.block_prefix(index) for index in range(len(self.decoder.blocks))]
        return [[name for name in self.tunables if name.startswith(prefix)] for prefix in prefixes]

    def _block(self, index: int, samples: Tensor, hidden: Tensor) -> Tensor:
        call = self.shell.block_call(index, self.tokens[samples], self.device)
        with self.autocast:
            return call.run(self.decoder.blocks[index], hidden).float()

    def _divergences(self, samples: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """KL divergence f32 [tokens] of some tokens after the others, for the last block's output of `samples`."""
        exact = self.exact[samples].flatten(0, 1)
        for start in range(0, len(exact), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            with torch.no_grad():
                self._use(self.exact_outside)
                target = self.shell.logits(exact[part].to(self.device))
            self._use(self.outside)
            yield kl_divergence(target, self.shell.logits(hidden.flatten(0, 1)[part]))

    def _use(self, outside: dict[str, nn.Parameter]) -> None:
        for name, parameter in outside.items():
            set_parameter(self.decoder.model, name, parameter)
        for alias, owner in self.tied.items():
            if owner in outside:
                set_parameter(self.decoder.model, alias, outside[owner])

    def _receive(self, names: Iterable[str]) -> None:
        """Pass the gradients of parameters on to their tunables, and let go of them."""
        for name in names:
            parameter = self.decoder.model.get_parameter(name)
            if name in self.tunables and parameter.grad is not None:
                self.tunables[name].receive(parameter.grad)
            parameter.grad = None


def tune_whole_model(
    model: WholeModel, settings: TuningSettings, batches: Iterator[Tensor], held_out: Tensor, progress: Progress
) -> WholeModelReport:
    """Tune the model's tunables; on return they and the model hold what is kept.

    Args:
        batches: endless iterator of sample indices to train on.
        held_out: sample indices to choose the best step on.
    """
    shifts = [shift for tunable in model.tunables.values() for shift in tunable.shifts.values()]
    optimizer = torch.optim.Adam(shifts, lr=settings.whole_model_lr, betas=(0.9, 0.99))
    steps = settings.whole_model_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.install()
    before = best = model.divergence(held_out, settings.batch_size)
    best_step, kept = 0, [shift.detach().clone() for shift in shifts]
    check_at = check_steps(steps, settings.checks)
    for step in range(steps):
        optimizer.zero_grad()  # experts that no token of a batch reaches get no gradient, and must not keep their last
        model.train_step(next(batches))
        optimizer.step()
        schedule.step()
        model.install()
        if step + 1 in check_at:
            found = model.divergence(held_out, settings.batch_size)
            progress.line(f"whole model: step {step + 1} of {steps}, held-out KL divergence {found:.3e}")
            if found < best:
                best, best_step, kept = found, step + 1, [shift.detach().clone() for shift in shifts]
    with torch.no_grad():
        for shift, value in zip(shifts, kept, strict=True):
            shift.copy_(value)
    model.install()
    return WholeModelReport(before, best, best_step)
