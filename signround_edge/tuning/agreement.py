"""What the ranks of a run must agree on: what they are asked to do, the run directory, and the bytes of every block."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.formats import QuantizedTensor
from signround_edge.manifest import Manifest
from signround_edge.progress import Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import Scheme
from signround_edge.tuning.calibration.text import tokens_hash
from signround_edge.tuning.job import Job
from signround_edge.tuning.ranks import Ranks
from signround_edge.tuning.settings import TuningSettings


def check_ranks(ranks: Ranks, tokens: Tensor, settings: TuningSettings, scheme: Scheme, progress: Progress) -> None:
    """UserError where there are more processes than samples a step, or where not all of them do the same."""
    if ranks.alone:
        return
    work = repr((tokens_hash(tokens), settings.to_json(), scheme.text, scheme.override_texts))
    if not _is_same(ranks, work.encode()):
        raise UserError(
            "the processes of this run have not all read the same model, settings and calibration text; give all of "
            "them the same arguments and files"
        )
    samples = min(settings.batch_size, len(tokens) - 1)  # at least one is held out
    if ranks.world > samples:
        raise UserError(
            f"{ranks.world} processes are more than the {samples} samples of a step; start at most {samples}, or give "
            "a larger --batch-size"
        )
    progress.line(f"{ranks.world} processes share the samples")


def written_by_first(out: Path, ranks: Ranks) -> RunDirectory:
    """The run directory that the first rank has opened, for reading its complete parts."""
    run = RunDirectory(out, Manifest.from_json(ranks.of_first(None)))
    if not (out / "manifest.json").is_file():
        raise UserError(
            f"process {ranks.rank} does not find {out / 'manifest.json'}, which the first one has written; put -o on a "
            "file system that all machines share"
        )
    return run


def check_same(job: Job, index: int, tensors: dict[str, QuantizedTensor]) -> None:
    """UserError where the ranks do not hold the same codes and scales of a block."""
    if job.ranks.alone:
        return
    pieces = [part.cpu().contiguous() for t in tensors.values() for part in (t.codes, *t.fields.values())]
    if not _is_same(job.ranks, *(piece.view(torch.uint8).numpy().tobytes() for piece in pieces)):
        raise UserError(
            f"the processes of this run have not computed the same codes of block {index + 1}; use machines and GPUs "
            "of one kind, or one process, and --resume"
        )


def _is_same(ranks: Ranks, *pieces: bytes) -> bool:
    """Whether all ranks hold the same bytes."""
    if ranks.alone:
        return True
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return len(set(ranks.gathered(digest.hexdigest()))) == 1
