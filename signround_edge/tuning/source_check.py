"""Before anything is tuned: do the blocks, as tuning runs them, compute what transformers' own model computes?

The run and all that is later compared with it come from one reading of the checkpoint. A tensor taken for another, an
argument of a block from another batch, a scale that is forgotten would be tuned, exported and proved exact. So a few
calibration windows go through transformers' `from_pretrained`, which shares no loader with us, and through the blocks
one by one; each block is given transformers' own hidden states, so that the first one that differs is the culprit.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from signround_edge.errors import UserError, first_line
from signround_edge.evaluation.torch_models import load_source_model
from signround_edge.model.decoder import find_blocks, first_hidden, unload_parameters
from signround_edge.model.language_model import name_of
from signround_edge.model.weights import ModelWeights
from signround_edge.tuning.calibration.block_call import Shared, tokens_first
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.cost.peak import current_resident, free_memory
from signround_edge.tuning.outside import open_shell
from signround_edge.tuning.settings import SOURCE_CHECKS

LIMIT = 1e-5  # 60 small models differ by 1.1e-6 at most: what f32 leaves of another order of additions
_BATCHES, _SAMPLES = 2, 2
_TOKENS, _MOST_TOKENS = 128, 1024  # of a sample; more of them only where a sliding window would else go unseen
_LOGITS = 32  # positions a sample
_FITS = 0.6  # of the memory that is free


@dataclass(frozen=True)
class SourceCheck:
    """What the check found, as the manifest keeps it.

    Attributes:
        mode: how transformers' model was run: "full" (in memory), "blocks" (weights read from disk block by block) or
            "off" (not at all).
        transformers: its version.
        tokens: how many went through both.
        error: largest relative error of hidden states after a block, or of logits; see `relative_error`.
        at: where that was.
    """

    mode: str
    transformers: str = field(default_factory=lambda: transformers.__version__)
    tokens: int = 0
    error: float | None = None
    at: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def check_source(
    weights: ModelWeights, tokens: Tensor, device: torch.device, mode: str, memory: int | None = None
) -> SourceCheck:
    """Run calibration samples [samples, seqlen] through both models, in f32.

    Args:
        mode: one of `SOURCE_CHECKS`.
        memory: bytes that the process may take; None: what is free.
    Raises:
        UserError: a block, or what is outside the blocks, computes something else than transformers' model.
    """
    if mode not in SOURCE_CHECKS:
        raise UserError(f"--source-check {mode} is unknown; known are {', '.join(SOURCE_CHECKS)}")
    if mode == "off":
        return SourceCheck("off")
    room = free_memory() if memory is None else min(free_memory(), max(0, memory - current_resident()))
    if mode == "auto":
        mode = "full" if _model_bytes(weights) <= _FITS * room else "blocks"
    batches = _batches(tokens, weights.decoder.model.config)
    theirs = [_Recorded() for _ in batches]
    with _their_model(weights.source.path, mode, room) as model:
        for batch, recorded in zip(batches, theirs, strict=True):
            recorded.run(model, batch)
    worst, at = 0.0, "embedding"
    for place, error in _errors(weights, batches, theirs, device):
        if not error <= LIMIT:
            raise UserError(
                f"{weights.source.path}: {place} does not compute what transformers {transformers.__version__} "
                f"computes (relative error {error:.1e}, at most {LIMIT:.0e}), so tuning would not fit this model; "
                "please report it with the model's config.json, or go on at your own risk with --source-check off"
            )
        if error >= worst:
            worst, at = error, place
    return SourceCheck(mode, tokens=sum(batch.numel() for batch in batches), error=worst, at=at)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root of the mean over tokens of ‖found − expected‖² / ‖expected‖², for [..., features].

    By token, since a few of them (mostly the first) can be a thousand times larger than all others and hide these.
    """
    difference = (found.double() - expected.double()).square().sum(dim=-1)
    return float((difference / expected.double().square().sum(dim=-1).clamp_min(1e-30)).mean().sqrt())


@dataclass
class _Recorded:
    """What transformers' model computes for one batch: before the blocks, after each of them, and logits."""

    hidden: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def run(self, model: Any, tokens: Tensor) -> None:
        blocks = find_blocks(model)[1]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden.append(tokens_first(args[0] if args else kwargs["hidden_states"]).clone())

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.hidden.append(tokens_first(first_hidden(output)).clone())

        def few_positions(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][:, -_LOGITS:], *args[1:])

        hooks = [
            blocks[0].register_forward_pre_hook(before, with_kwargs=True),
            *(block.register_forward_hook(after) for block in blocks),
            model.get_output_embeddings().register_forward_pre_hook(few_positions),
        ]
        try:
            with torch.no_grad():
                self.logits = model(input_ids=tokens, use_cache=False).logits.float()
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
            raise UserError(
                f"transformers {transformers.__version__} loads this {type(model).__name__} but cannot run it on text "
                f"({first_line(error)}); use another version of transformers, or another model"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()


def _errors(
    weights: ModelWeights, batches: list[Tensor], theirs: list[_Recorded], device: torch.device
) -> Iterator[tuple[str, float]]:
    """(place, largest relative error of the batches), in the order in which the model computes."""
    decoder = weights.decoder
    shell = open_shell(weights, batches[0])
    pairs = list(zip(batches, theirs, strict=True))
    with torch.no_grad():
        yield "the embedding", max(relative_error(shell.embed(batch), their.hidden[0]) for batch, their in pairs)
        shared: list[Shared] = [{} for _ in batches]
        for index, block in enumerate(decoder.blocks):
            weights.load(block, decoder.block_prefix(index), device)
            errors = []
            for (batch, their), left in zip(pairs, shared, strict=True):
                call = shell.block_call(index, batch, device)
                output = call.run(block, their.hidden[index].to(device), left)
                errors.append(relative_error(output.cpu(), their.hidden[index + 1]))
            unload_parameters(block)
            yield f"block {index} ({decoder.prefix}.{index})", max(errors)
        weights.load(decoder.head, f"{name_of(decoder.model, decoder.head)}.", torch.device("cpu"))
        yield "the output head", max(_logits_error(shell, their) for their in theirs)


def _logits_error(shell: Shell, theirs: _Recorded) -> float:
    logits = shell.logits(theirs.hidden[-1][:, -_LOGITS:].flatten(0, 1))
    return relative_error(logits, theirs.logits.flatten(0, 1))


def _batches(tokens: Tensor, config: Any) -> list[Tensor]:
    """Two batches of different tokens and one shape; of a single sample the second is the first backwards."""
    window = getattr(config, "sliding_window", None) or tokens.shape[1]
    length = _TOKENS if window >= tokens.shape[1] else _MOST_TOKENS
    count = min(_SAMPLES, max(1, len(tokens) // _BATCHES))
    found = [batch[:, :length] for batch in tokens[: _BATCHES * count].split(count)]
    return found if len(found) == _BATCHES else [found[0], found[0].flip(-1)]


@contextlib.contextmanager
def _their_model(path: Path, mode: str, room: int) -> Iterator[nn.Module]:
    """Within `room` bytes, where its weights are read from disk."""
    if mode == "full":
        yield load_source_model(path)
        return
    with tempfile.TemporaryDirectory(prefix="signround-edge-") as folder:
        yield load_source_model(path, offload=Path(folder), memory=int(_FITS * room / 2))


def _model_bytes(weights: ModelWeights) -> int:
    """Bytes of all parameters in f32."""
    return sum(4 * parameter.numel() for parameter in weights.decoder.model.parameters())
