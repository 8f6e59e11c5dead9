"""What is said of a finished run's matrices: those that lie on the grid already, and weights that no scale can hold."""

from __future__ import annotations

from signround_edge.formats import QuantizedTensor
from signround_edge.formats.fidelity import lies_on_grid, lost_weights
from signround_edge.tuning.job import Job

_ROWS_AT_ONCE = 4096


def say_what_is_stored(job: Job) -> None:
    """Compare each quantized matrix of the run with the source's: a line where weights were lost, and one for all."""
    names = [name for name in job.run.names() if job.run.is_quantized(name)]
    as_they_are = 0
    for name in names:
        stored = job.run.quantized(name)
        zeroed, cut, same, total = _compare(job, name, stored)
        as_they_are += same
        if zeroed or cut:
            said = [f"{_share(zeroed, total)} became zero"] if zeroed else []
            said += [f"{_share(cut, total)} were cut off"] if cut else []
            job.progress.line(
                f"warning: {name}: {' and '.join(said)}, as {stored.grid.scales_hold} only; check this matrix of "
                "the checkpoint, or rescale it there"
            )
    if as_they_are:
        job.progress.line(f"{as_they_are} of {len(names)} matrices lie on this grid already; stored as they are")


def _compare(job: Job, name: str, stored: QuantizedTensor) -> tuple[int, int, bool, int]:
    """(weights that became zero, weights that were cut off, whether nothing changed, weights in all)."""
    weight = job.weights.tensor(name)
    weight = weight.T if job.run.entry(name).transposed else weight
    scales = job.run.channel_scales(name)
    zeroed, cut, same = 0, 0, True
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        own, part = scales.take_rows(rows).apply(weight[rows].float()), stored.take_rows(rows)
        zeroes, cuts = lost_weights(own, part)
        zeroed, cut = zeroed + zeroes, cut + cuts
        same = same and lies_on_grid(own, part)
    # A matrix of zeros lies on every grid, which says nothing of this one.
    return zeroed, cut, same and bool(weight.any()), weight.numel()


def _share(count: int, total: int) -> str:
    percent = 100 * count / total
    return f"{count} of {total} weights ({percent:{'.0f' if percent >= 10 else '.2g'}} %)"
