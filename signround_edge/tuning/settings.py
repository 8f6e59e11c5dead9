"""Tuning settings and the recipes: named sets of them."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from signround_edge.arguments import at_least, check_seed, whole_number
from signround_edge.errors import UserError
from signround_edge.transforms import TRANSFORMS

# Where blocks are tuned; "auto" is a GPU where torch finds one.
DEVICES = ("auto", "cpu", "cuda")
# How blocks are compared with transformers' own model first: with all of it in memory, or with its weights read from
# disk block by block; "auto" is "full" where there is room for it.
SOURCE_CHECKS = ("auto", "full", "blocks", "off")


@dataclass(frozen=True)
class TuningSettings:
    """Everything that decides the result besides model, scheme and calibration text.

    Attributes:
        steps: gradient steps per decoder block; 0 rounds to nearest with the same scale search.
        samples, seqlen: calibration samples and their length in tokens.
        batch_size: samples a step.
        step_parts: in how many parts these go through a block, one after another, to spare memory; the gradients are
            added up.
        start: codes from which tuning starts: "gptq" (GPTQ's, where the held-out samples find them better than the
            nearest ones; see `tuning.start`) or "nearest". With 0 steps codes are the nearest ones.
        correct_drift: whether, with the start "gptq", output and down projections first take back what they can of the
            errors that their block inherits; see `tuning.drift`.
        lr: learning rate of V; None is V_TRAVEL/steps, from GPTQ's codes less (`travel_from_gptq`). It falls
            linearly to 0.
        scale_lr: learning rate of α and β; None is V's over the number of codes from the anchor to the farthest one, so
            that no weight is moved further by its scale than by V.
        tune_scales: whether α and β move at all.
        positions: where codes are taken: "fixed" (on the initial scales, so that α and β change no code) or "follow"
            (on the current ones, the clip tuning of the paper).
        scale_range: bounds of α and β around 1.
        scale_init: "search" (weighted search) or "absmax" (the block's extremes).
        loss: "relative" (each token's squared error over its mean square; see `relative_weights`) or "mse" (as in
            the paper).
        granularity: "block" (the decoder block's output) or "layer" (each matrix's own output).
        optimizer: "signsgd" or "adam".
        held_out: share of the samples kept for choosing the best step, never trained on.
        checks: how often per block the held-out loss is measured, evenly over the second half of the steps.
        compute_dtype: dtype of matrix products while tuning: "auto", "float32" or "bfloat16".
            "auto" is bfloat16 for codes of up to 5 bits where the hardware multiplies it natively.
        hidden_dtype: dtype in which hidden states of all samples are kept between blocks: "auto", "float32" or
            "bfloat16", which halves them. "auto" is float32.
        compile_blocks: whether torch.compile makes kernels of a block's steps, forward and backward, once for all
            blocks of one shape.
        whole_model_steps: gradient steps of the whole-model stage after the blocks; 0 leaves it out.
        whole_model_batch_size: samples a step there.
        whole_model_lr: relative learning rate of scales, norms and biases there, falling linearly to 0.
        whole_model_code_lr: learning rate of the codes there, in codes, falling linearly to 0; 0 freezes the codes.
        transforms: what is done to the full-precision weights first; names of `signround_edge.transforms`.
        seed: seeds sample order; 0 to 2³² − 1.
    """

    steps: int = 200
    samples: int = 128
    seqlen: int = 512
    batch_size: int = 8
    step_parts: int = 1
    start: Literal["gptq", "nearest"] = "gptq"
    correct_drift: bool = True
    lr: float | None = None
    scale_lr: float | None = None
    tune_scales: bool = True
    positions: Literal["fixed", "follow"] = "fixed"
    scale_range: tuple[float, float] = (0.5, 1.5)
    scale_init: Literal["search", "absmax"] = "search"
    loss: Literal["relative", "mse"] = "relative"
    granularity: Literal["block", "layer"] = "block"
    optimizer: Literal["signsgd", "adam"] = "signsgd"
    held_out: float = 0.125
    checks: int = 3
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    hidden_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile_blocks: bool = False
    whole_model_steps: int = 0
    whole_model_batch_size: int = 4
    whole_model_lr: float = 2e-4
    whole_model_code_lr: float = 5e-4
    transforms: tuple[str, ...] = ()
    seed: int = 42

    def __post_init__(self) -> None:
        for name in vars(self):
            _check_kind(name, getattr(self, name))
        lowest = {"steps": 0, "samples": 1, "seqlen": 2, "batch_size": 1, "step_parts": 1, "checks": 1}
        lowest |= {"whole_model_steps": 0, "whole_model_batch_size": 1}
        for name, low in lowest.items():
            at_least(flag(name), getattr(self, name), low)
        check_seed(self.seed)
        if not 0 <= self.whole_model_code_lr <= 1:
            raise UserError(
                f"{flag('whole_model_code_lr')} {self.whole_model_code_lr} must be at least 0 and at most 1"
            )
        for name in ("lr", "scale_lr", "whole_model_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{flag(name)} {value} must be above 0 and at most 1")
        if self.compile_blocks and self.granularity == "layer":
            raise UserError("--compile-blocks is for blocks, and --granularity layer tunes none; leave one of them out")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out {self.held_out} must be above 0 and below 1")
        low_end, high_end = self.scale_range
        if not 0 <= low_end <= 1 <= high_end:
            raise UserError(f"scale_range {self.scale_range} must begin at 0 to 1 and end at 1 or above")

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary, as stored in the manifest."""
        return {**asdict(self), "scale_range": list(self.scale_range), "transforms": list(self.transforms)}


@functools.cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(TuningSettings)


def choices(setting: str) -> tuple[str, ...]:
    """What a setting that names a choice may be; () for every other one. The annotation is the only list of them."""
    if setting == "transforms":
        return TRANSFORMS
    kind = _kinds()[setting]
    return get_args(kind) if get_origin(kind) is Literal else ()


def flag(setting: str) -> str:
    """The command line's name of a setting: "--batch-size"."""
    return f"--{setting.removesuffix('s') if setting == 'transforms' else setting.replace('_', '-')}"


def _check_kind(setting: str, value: Any) -> None:
    """UserError for a value that is no choice, or no whole number where there must be one."""
    known = choices(setting)
    for one in value if setting == "transforms" else [value]:
        if known and one not in known:
            raise UserError(f"{flag(setting)} {one} is unknown; known are {', '.join(known)}")
    if _kinds()[setting] is int:
        whole_number(flag(setting), value)


# Published: arXiv 2309.05516, version 1 (no clip tuning, absmax scales) and version 2 (clip tuning, 200 steps).
RECIPES: dict[str, TuningSettings] = {
    "default": TuningSettings(),
    "fast": TuningSettings(steps=20, samples=256, seqlen=256),
    "best": TuningSettings(steps=1000, samples=512, seqlen=512, whole_model_steps=200),
    "paper-v1": TuningSettings(
        steps=400,
        samples=512,
        seqlen=2048,
        start="nearest",
        tune_scales=False,
        scale_init="absmax",
        lr=1 / 400,
        loss="mse",
        held_out=0.02,
    ),
    "paper-v2": TuningSettings(
        steps=200,
        samples=512,
        seqlen=2048,
        start="nearest",
        scale_init="absmax",
        lr=1 / 200,
        scale_lr=1 / 200,
        positions="follow",
        scale_range=(0.0, 1.0),
        loss="mse",
        held_out=0.02,
    ),
}


def settings_from(recipe: str, overrides: dict[str, Any]) -> TuningSettings:
    """A recipe with some settings replaced; overrides that are None are ignored."""
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known are {', '.join(RECIPES)}")
    known = {f.name for f in fields(TuningSettings)}
    assert set(overrides) <= known, set(overrides) - known
    return replace(RECIPES[recipe], **{k: v for k, v in overrides.items() if v is not None})
