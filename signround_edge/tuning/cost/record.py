"""costs.json of a run directory: what each session of a run was estimated to cost, and what it did.

It stands beside the manifest and is no part of the run: a resumed run has the bytes of an uninterrupted one, and no two
runs take the same time.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from signround_edge.files import write_atomically
from signround_edge.tuning.cost.estimate import Estimate
from signround_edge.tuning.cost.peak import Spent

COSTS_FILE = "costs.json"


def add_costs(folder: Path, laid_out: Estimate, blocks: int, spent: Spent) -> None:
    """Add a session to the file.

    Args:
        blocks: how many it tuned.
    """
    file = folder / COSTS_FILE
    try:
        sessions = json.loads(file.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []
    sessions.append({"blocks": blocks, "estimate": laid_out.to_json(blocks), "spent": asdict(spent)})
    write_atomically(file, (json.dumps({"sessions": sessions}, indent=1) + "\n").encode())
