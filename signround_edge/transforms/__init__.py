"""Transforms that fold away: other weights, the same function, so that rounding costs less.

Each is a pass over full-precision weights before they are tuned. Architecture, file types and work at inference stay
the same; what changes is stored in the run directory.

    folds.py            a fold: channels between two layers that may be scaled
    find_folds.py       where a decoder block has folds, found by trying
    channel_scales.py   which scales make rounding cheaper
    block_transform.py  what the folds make of a block's weights
    check.py            that logits stay what they were
    rotation.py         `rotate`: another basis of the residual stream, as a model folder of its own
"""

from __future__ import annotations

from collections.abc import Sequence

from signround_edge.errors import UserError

TRANSFORMS = ("channel-scales",)


def parse_transforms(values: Sequence[str]) -> tuple[str, ...]:
    """Names from `--transform`, each a comma list, in their fixed order; "none" is no transform.

    >>> parse_transforms(["channel-scales"])
    ('channel-scales',)
    """
    names = {name.strip() for value in values for name in value.split(",")}
    unknown = sorted(names - {"none", *TRANSFORMS})
    if unknown:
        raise UserError(f"--transform {unknown[0]!r} is unknown; known are {', '.join(TRANSFORMS)} and none")
    if "none" in names and len(names) > 1:
        raise UserError("--transform none excludes all others; leave it out, or the others")
    return tuple(name for name in TRANSFORMS if name in names)
