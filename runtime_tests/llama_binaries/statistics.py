"""Read the statistics that `llama-perplexity --kl-divergence` prints at its end."""

from __future__ import annotations

import re

from signround_edge.errors import UserError, last_lines
from signround_edge.evaluation.metrics import Scores

_NUMBER = r"\s*(-?(?:\d[\d.]*(?:e[-+]?\d+)?|nan|inf))"
_WITH_ERROR = _NUMBER + r"\s*±" + _NUMBER
# field → (label, how the figure is printed)
_LINES = {
    "ppl": (r"Mean PPL\(Q\)", _WITH_ERROR),
    "ppl_reference": (r"Mean PPL\(base\)", _WITH_ERROR),
    "ln_ratio": (r"Mean ln\(PPL\(Q\)/PPL\(base\)\)", _WITH_ERROR),
    "kld_mean": (r"Mean\s+KLD", _WITH_ERROR),
    "kld_max": (r"Maximum\s+KLD", _NUMBER),
    "kld_p99": (r"99\.0%\s+KLD", _NUMBER),
    "kld_median": (r"Median\s+KLD", _NUMBER),
    "same_top": (r"Same top p", _WITH_ERROR),
}


def has_statistics(output: str) -> bool:
    """Whether the program got to its end: the line of the last figure is there."""
    return re.search(rf"^{_LINES['same_top'][0]}\s*:", output, re.MULTILINE) is not None


def read_statistics(output: str, tokens: int) -> Scores:
    """The figures, as our own `ScoreKeeper` would give them (their standard errors divide by n − 1 twice: as there).

    Args:
        output: everything that the program said.
        tokens: how many were scored.
    Raises:
        UserError: a figure is missing; the sentence quotes the program's last lines.
    """
    found = {}
    for field, (label, form) in _LINES.items():
        match = re.search(rf"^{label}\s*:{form}", output, re.MULTILINE)
        if match is None:
            raise UserError(f"llama-perplexity printed no statistics; its last lines: {last_lines(output)}")
        found[field] = [float(group) for group in match.groups()]
    return Scores(
        ppl=found["ppl"][0],
        ppl_stderr=found["ppl"][1],
        tokens=tokens,
        ppl_reference=found["ppl_reference"][0],
        kld_mean=found["kld_mean"][0],
        kld_stderr=found["kld_mean"][1],
        kld_median=found["kld_median"][0],
        kld_p99=found["kld_p99"][0],
        kld_max=found["kld_max"][0],
        top1_agreement=found["same_top"][0] / 100,
        ln_ratio_stderr=found["ln_ratio"][1],
    )
