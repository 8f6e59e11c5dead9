"""The table of `plan`: types by kind of matrix, bytes, the prediction and what a little more or less would change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from rich.table import Table

from signround_edge.planning.found_plan import FoundPlan

_BLOCK = re.compile(r"\.\d+\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def render(found: FoundPlan) -> Table:
    """One line per kind of matrix: its types with their number, bytes, bits a weight and share of the predicted KL."""
    planned = found.planned
    table = Table(title=f"{planned.model} as {planned.target.upper()}", caption="\n".join(_lines(found)))
    for column in ("matrices", "types", "bytes", "bits/weight", "predicted KL"):
        table.add_column(column, justify="left" if column in ("matrices", "types") else "right")
    kinds: dict[str, list[int]] = {}
    for number, group in enumerate(found.groups):
        kinds.setdefault(_kind(group.names[0]), []).append(number)
    for kind, numbers in kinds.items():
        counted = Counter(found.chosen[i].kind for i in numbers)
        size = sum(found.chosen[i].nbytes for i in numbers)
        weights = sum(found.groups[i].weights for i in numbers)
        cost = planned.factor * sum(found.chosen[i].cost for i in numbers)
        types = ", ".join(f"{count} {name}" if len(numbers) > 1 else name for name, count in counted.most_common())
        table.add_row(kind, types, f"{size:,}", f"{8 * size / weights:.3f}", f"{cost:.2g}")
    table.add_row("all else", "", f"{planned.file_bytes - sum(o.nbytes for o in found.chosen):,}", "", "")
    table.add_section()
    table.add_row(
        "file", "", f"{planned.file_bytes:,}", f"{planned.bits_per_weight:.3f}", f"{planned.predicted_kl:.3g}"
    )
    return table


def _kind(name: str) -> str:
    """ "self_attn.q_proj" of "model.layers.3.self_attn.q_proj.weight"."""
    bare = _EXPERT.sub(".experts.", name).removesuffix(".weight")
    return _BLOCK.split(bare)[-1]


def _lines(found: FoundPlan) -> Iterator[str]:
    planned = found.planned
    yield f"{planned.budget_bytes - planned.file_bytes:,} of {planned.budget_bytes:,} bytes left" + (
        "" if found.exact else "; what is no weight is estimated"
    )
    for more, kl in found.neighbours.items():
        word = "more" if more > 0 else "less"
        yield f"{abs(more) / 1e6:.3g} MB {word}: predicted KL {kl:.3g}"
    near = {name: point for name, point in found.presets.items() if point[0] <= planned.file_bytes}
    if near:
        name = min(near, key=lambda one: near[one][1])
        yield f"the best scheme that fits: {name}, {near[name][0]:,} bytes, predicted KL {near[name][1]:.3g}"
    yield (
        f"besides the file, for {planned.settings['context']} tokens: cache {found.needs.cache / 1e6:.1f} MB, "
        f"buffers about {found.needs.buffers / 1e6:.1f} MB"
    )
