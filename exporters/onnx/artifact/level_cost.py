"""Saying in an exported folder what accuracy level 4 costs on its model, once that has been measured."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

from exporters.onnx.artifact.card import CARD, render_card
from exporters.onnx.artifact.sidecar import SIDECAR, Sidecar
from exporters.onnx.options import LevelCost
from signround_edge.files import whole_files


def add_level_cost(folder: Path, cost: LevelCost | str) -> None:
    """Write card and `signround_edge.json` of a folder anew, both or none, with what level 4 costs.

    Args:
        folder: an exported one that holds codes; a graph of floats has no such level.
        cost: the figures, or why there are none.
    Raises:
        UserError: the folder is not an export of ours, or damaged.
    """
    sidecar = Sidecar.read(folder)
    assert sidecar.dtype is None, folder
    card = render_card(folder, sidecar, cost).encode()
    revised = replace(
        sidecar,
        files={**sidecar.files, CARD: hashlib.sha256(card).hexdigest()},
        level_4_cost=asdict(cost) if isinstance(cost, LevelCost) else None,
    )
    with whole_files(folder / CARD, folder / SIDECAR) as (card_file, sidecar_file):
        card_file.write_bytes(card)
        sidecar_file.write_bytes(revised.to_bytes())


def said_of_level_4(cost: LevelCost | str, chosen: int) -> str:
    """A line for whoever exports, who should know that this choice decides about speed on CPUs.

    Args:
        cost: as for `add_level_cost`.
        chosen: the level of the folder.
    """
    if isinstance(cost, str):
        found = f"what accuracy level 4 costs was not measured ({cost})"
    else:
        found = f"accuracy level 4 costs a mean KL divergence of {cost.kld_mean:.2g} here"
    if chosen == 4:
        return found
    return f"{found}; on CPUs it decodes many times as fast, above all with a head of 8 bits: --accuracy-level 4"
