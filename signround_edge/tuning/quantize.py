"""`quantize`: from a Hugging Face model to a run directory, one decoder block in memory at a time, resumable."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.formats import QuantizedTensor
from signround_edge.manifest import OUTSIDE, Manifest
from signround_edge.model.config import longest_window
from signround_edge.model.decoder import Decoder, unload_parameters
from signround_edge.model.experts import split_expert
from signround_edge.model.source import model_name
from signround_edge.model.tokenizer import added_bos, chat_templates, check_tokens, end_tokens, load_tokenizer
from signround_edge.model.weights import ModelWeights
from signround_edge.progress import SILENT, Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import Plan, listing, make_plan, part_of_block
from signround_edge.schemes.scheme import Scheme
from signround_edge.transforms.block_transform import BlockTransform
from signround_edge.tuning.agreement import check_ranks, check_same, written_by_first
from signround_edge.tuning.block.channel_scaling import choose_channel_scales
from signround_edge.tuning.block.compute import compute_context
from signround_edge.tuning.block.loss import held_out_loss
from signround_edge.tuning.block.transforming import Transforming, stored_transform, transformed_matrix
from signround_edge.tuning.block.tune import TunedUnit, tune_unit
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.block.units import FEWEST_TOKENS, block_matrices, block_unit, layer_unit, run_all
from signround_edge.tuning.calibration.activations import Stream
from signround_edge.tuning.calibration.importance import Importance, ImportanceSink, ImportanceSource, given_importance
from signround_edge.tuning.calibration.input_moments import SecondMoments
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.calibration.text import calibration_tokens, tokens_hash
from signround_edge.tuning.cost.estimate import UNLIMITED, Limits, estimate
from signround_edge.tuning.cost.peak import Meter
from signround_edge.tuning.cost.record import add_costs
from signround_edge.tuning.cpu.allocator import return_large_tensors
from signround_edge.tuning.cpu.attention import use_blocked_attention
from signround_edge.tuning.cpu.rms_norm import use_cached_rms_norm
from signround_edge.tuning.job import Job
from signround_edge.tuning.lock import locked
from signround_edge.tuning.outside import copied, embed, open_shell, quantize_lookups, release_lookups, write_outside
from signround_edge.tuning.ranks import ALONE, Ranks
from signround_edge.tuning.resume import create, to_continue, versions
from signround_edge.tuning.schedule import shares_whole_model
from signround_edge.tuning.settings import DEVICES, TuningSettings
from signround_edge.tuning.source_check import check_source
from signround_edge.tuning.stored import say_what_is_stored
from signround_edge.tuning.whole_model.loading import revise_whole_model


def quantize(
    model: Path,
    scheme: Scheme,
    out: Path,
    calibration: str,
    settings: TuningSettings,
    device: str = "auto",
    resume: bool = False,
    float_fallback: bool = False,
    progress: Progress = SILENT,
    imatrix: ImportanceSource | None = None,
    save_imatrix: ImportanceSink | None = None,
    source_check: str = "auto",
    ranks: Ranks | None = None,
    limits: Limits = UNLIMITED,
) -> RunDirectory:
    """Tune `model` on the grids of `scheme` and write the run directory `out`.

    Args:
        model: local model folder.
        calibration: text file, JSON-lines file or dataset name.
        device: "auto", "cpu" or "cuda".
        resume: continue `out` after its last complete part; UserError when it is another run.
        float_fallback: keep matrices whose rows no block divides in floats.
        imatrix: where the E[x²] of the scale search comes from instead of the calibration pass.
        save_imatrix: takes the calibration's own E[x²] of every matrix at the end, also of a run complete already.
        source_check: how the blocks are compared with transformers' model first; one of `SOURCE_CHECKS`.
        ranks: the processes that do this together, each with the same arguments; the first one writes, the others
            read what it has written. None: this one alone.
        limits: of memory; what does not fit is laid out otherwise where that is possible.
    Raises:
        UserError: bad input, or another process writes `out`, in one sentence; whatever is complete in `out` stays.
    """
    return_large_tensors()
    ranks = ranks or ALONE
    torch_device = chosen_device(device, ranks)
    progress = progress if ranks.first else SILENT
    weights = ModelWeights.open(model)
    decoder = weights.decoder
    use_blocked_attention(decoder.model, torch_device)
    if settings.granularity == "layer" and decoder.has_experts():
        raise UserError(
            "--granularity layer cannot tune a mixture of experts, each of which sees some of the tokens only; use "
            "--granularity block"
        )
    use_cached_rms_norm(decoder.model, torch_device)
    files = weights.source.hashes()
    if scheme.planned is not None:
        scheme.planned.check_model(files)
    plan = make_plan(weights, scheme, float_fallback)
    for line in [*weights.notes(), *listing(plan)]:
        progress.line(line)
    if settings.compile_blocks and any(split_expert(entry.name)[1] is not None for entry in plan.tensors):
        progress.line("note: blocks with experts are not compiled: other numbers of tokens come to them at each step")
    positions = longest_window(model)
    if positions is not None and settings.seqlen > positions:
        raise UserError(
            f"--seqlen {settings.seqlen} is more than the {positions} positions of the model; give --seqlen {positions}"
        )
    tokenizer = load_tokenizer(model)
    # Read for what is broken in them, which would else be found by `export`.
    end_tokens(model)
    chat_templates(tokenizer, model)
    tokens = calibration_tokens(calibration, tokenizer, settings.samples, settings.seqlen)
    check_tokens(int(tokens.max()), decoder.model)
    if len(tokens) < settings.samples:
        progress.line(f"note: the calibration text gives {len(tokens)} of the {settings.samples} samples asked for")
    given = {} if imatrix is None else given_importance(imatrix, plan, settings.scale_init, progress)
    if save_imatrix is not None:
        save_imatrix.check(_matrix_names(decoder, plan))
    check_ranks(ranks, tokens, settings, scheme, progress)
    importance = Importance(given, save_imatrix)
    meter = Meter(torch_device)
    laid_out = estimate(plan, decoder, settings, len(tokens), torch_device, limits, ranks.world)
    settings, store = laid_out.settings, laid_out.store(out)
    job = functools.partial(Job, weights, plan, tokens, settings, torch_device, codes_on=laid_out.codes_on)
    if not ranks.first:
        _execute(job(written_by_first(out, ranks), progress, importance, ranks, store))
        ranks.finish()
        return RunDirectory.open(out)
    manifest = Manifest(
        scheme=scheme.text,
        targets=list(scheme.targets),
        source={
            "model": model_name(model),
            "files": files,
            **({} if weights.outer_type is None else {"inside": weights.outer_type}),
        },
        settings={
            **settings.to_json(),
            "tensor_types": scheme.override_texts,
            "device": torch_device.type,
            "calibration_bos": added_bos(tokenizer),
            "calibration_sha256": tokens_hash(tokens),
            "imatrix_sha256": None if imatrix is None else imatrix.sha256,
            **({} if scheme.planned is None else {"plan": scheme.planned.summary()}),
        },
        versions=versions(torch_device),
        parts=plan.parts,
        tied=plan.tied,
        tensors=plan.tensors,
    )
    with locked(out):
        run = to_continue(out, manifest, resume)
        if run is None:
            check = check_source(weights, tokens, torch_device, source_check, limits.memory)
            manifest.source_check = check.to_json()
            progress.line(manifest.source_line)
            run = create(out, manifest, weights)
        ranks.of_first(run.manifest.to_json())
        blocks = sum(not run.is_complete(part) for part in plan.parts if part != OUTSIDE)
        is_work = blocks > 0 or _wants_whole_model(settings, run)
        if is_work:
            progress.line(laid_out.line(blocks))
        _execute(job(run, progress, importance, ranks, store))
        if is_work:
            spent = meter.read()
            add_costs(out, laid_out, blocks, spent)
            progress.line(f"took {spent}")
    ranks.finish()
    return RunDirectory.open(out)


def chosen_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device that a name means for one of the processes; UserError where there is none."""
    if name not in DEVICES:
        raise UserError(f"--device {name} is unknown; known are {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu, or install torch with CUDA")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or ranks.alone:
        return torch.device(name)
    if ranks.local >= torch.cuda.device_count():
        raise UserError(
            f"process {ranks.local} of this machine has no GPU of its own (torch finds {torch.cuda.device_count()}); "
            f"start {torch.cuda.device_count()} processes here"
        )
    return torch.device(name, ranks.local)


def _matrix_names(decoder: Decoder, plan: Plan) -> list[str]:
    """The matrices whose inputs are activations: those of the blocks, and a head that is not the embedding."""
    names = [name for index in range(len(decoder.blocks)) for name in decoder.matrices(index)]
    return names if plan.head == plan.embedding else [*names, plan.head]


def _execute(job: Job) -> None:
    """The stages of a run, one after another; complete parts are read instead of tuned."""
    run, parts, blocks = job.run, job.plan.parts, len(job.decoder.blocks)
    job.progress.parts(sum(run.is_complete(part) for part in parts), len(parts))
    if run.manifest.state == "complete" and job.importance.sink is None:
        return
    shell = open_shell(job.weights, job.tokens)
    exact = embed(job, shell)
    transforming = None
    if job.settings.transforms:
        compares = run.manifest.whole_model is None
        transforming = Transforming.start(shell, job.tokens, job.device, job.progress, compares)
    lookups = quantize_lookups(job, shell)
    quantized = embed(job, shell) if lookups else copied(job, exact)
    if transforming is None:  # which embeds samples of its own as it goes on
        release_lookups(job, shell)
    for index in range(blocks):
        exact, quantized = _block(job, shell, transforming, index, exact, quantized)
        job.progress.parts(index + 1, len(parts))
    write_outside(job, shell, lookups, quantized.hidden, transforming)
    job.progress.parts(len(parts), len(parts))
    if _wants_whole_model(job.settings, run):
        _whole_model(job, shell, exact.hidden)
    if not job.ranks.first:
        return
    say_what_is_stored(job)
    if job.importance.sink is not None:
        job.progress.line(f"wrote {job.importance.save(*job.tokens.shape)}")


def _wants_whole_model(settings: TuningSettings, run: RunDirectory) -> bool:
    """Whether the whole-model stage is asked for and not done."""
    return settings.whole_model_steps > 0 and run.manifest.whole_model is None


def _whole_model(job: Job, shell: Shell, exact: Tensor) -> None:
    """The whole-model stage; `exact` is what leaves the exact last block of this rank's own samples."""
    if shares_whole_model(job.settings, len(job.tokens), job.ranks.world):
        revise_whole_model(job, shell, exact)
        return
    job.progress.line(
        f"whole model: by the first process alone, the others wait; {job.ranks.world} share it where that number "
        "divides --batch-size and --whole-model-batch-size"
    )
    hidden = job.ranks.on_first(exact.cpu().float(), job.shards)
    if hidden is not None:
        revise_whole_model(replace(job, ranks=ALONE), shell, hidden)


def _block(
    job: Job, shell: Shell, transforming: Transforming | None, index: int, exact: Stream, quantized: Stream
) -> tuple[Stream, Stream]:
    """Tune (or, when it is complete, read) one block; returns the inputs of the next one, in the memory of its own."""
    block, part, prefix = job.decoder.blocks[index], part_of_block(index), job.decoder.block_prefix(index)
    job.weights.load(block, prefix, job.device)
    every = job.decoder.matrices(index)
    moments = SecondMoments(job.token_weights)
    chosen = {name: module for name, module in every.items() if job.run.is_quantized(name)}
    with shell.exact(), moments.watching(block, job.importance.to_collect(every, chosen)):
        target = run_all(job, shell, index, exact, moments, in_place=True)
    moments.sum_over(job.ranks, job.device)
    matrices = block_matrices(job, index, job.importance.settle(moments.result(), job.device), moments)
    transform, found = BlockTransform(), None
    if transforming is not None:
        untuned = block_unit(job, shell, index, matrices, quantized, target.hidden)
        transform, found = _transform(job, transforming, index, untuned)
        transforming.install(index, transform)
        matrices = [transformed_matrix(m, transform.of(m.name.removeprefix(prefix))) for m in matrices]
    if job.run.is_complete(part):
        for matrix in matrices:
            matrix.install(job.run.quantized(matrix.name).dequantize().to(job.device))
    else:
        _say_seldom(job, index, matrices)
        tuned = _tune(job, shell, index, matrices, quantized, target.hidden)
        tensors = {name: tensor for unit in tuned.values() for name, tensor in unit.tensors.items()}
        check_same(job, index, tensors)
        if job.ranks.first:
            _write_block(job, index, tensors, tuned, transform, found)
    following = run_all(job, shell, index, quantized, in_place=True)
    unload_parameters(block)
    return target, following


def _write_block(
    job: Job,
    index: int,
    tensors: dict[str, QuantizedTensor],
    tuned: dict[str, TunedUnit],
    transform: BlockTransform,
    found: dict[str, Any] | None,
) -> None:
    """Write a block's part; `found` is what transforms report of it."""
    part, prefix = part_of_block(index), job.decoder.block_prefix(index)
    floats = {**job.floats(part), **{prefix + name: vector for name, vector in transform.vectors.items()}}
    job.run.write_part(
        part,
        {**floats, **tensors},
        report={name: asdict(unit.report) for name, unit in tuned.items()},
        scales={prefix + name: scales for name, scales in transform.scales.items()},
        transforms=found,
        statistics={name: s.tensors() for unit in tuned.values() for name, s in unit.statistics.items()},
    )
    for name, unit in tuned.items():
        job.progress.line(f"{index + 1}/{len(job.decoder.blocks)} {name}: {unit.report}")


def _say_seldom(job: Job, index: int, matrices: list[Matrix]) -> None:
    names = [m.name for m in matrices if m.seldom]
    if names and job.settings.steps:
        job.progress.line(
            f"note: {len(names)} matrices of block {index + 1} belong to experts that fewer than {FEWEST_TOKENS:.1%} "
            f"of the tokens came to ({names[0]}{', …' if len(names) > 1 else ''}); they are rounded on searched "
            "scales and not tuned; more calibration text (--samples) reaches more of them"
        )


def _transform(
    job: Job, transforming: Transforming, index: int, unit: Unit
) -> tuple[BlockTransform, dict[str, Any] | None]:
    """What the run's transforms make of a block's weights before they are tuned, one after another, and each one's
    report; read where the block is complete."""
    part = part_of_block(index)
    if job.run.is_complete(part):
        return stored_transform(job.run, part, job.decoder.block_prefix(index)).to(job.device), None
    if not unit.matrices:
        return BlockTransform(), None
    transform, reports = BlockTransform(), {}
    if "channel-scales" in job.settings.transforms:
        autocast = compute_context(job.settings, (m.grid for m in unit.matrices), job.device)
        loss = functools.partial(held_out_loss, unit, job.settings, autocast)
        transform, reports["channel-scales"] = choose_channel_scales(
            transforming, index, unit.matrices, loss, job.settings.scale_init
        )
    return transform, reports


def _tune(
    job: Job, shell: Shell, index: int, matrices: list[Matrix], inputs: Stream, target: Tensor
) -> dict[str, TunedUnit]:
    """The block's tuned units by name: "block", or each matrix's own, one after another."""
    if not matrices:
        return {}
    if job.settings.granularity == "block":
        return {"block": _tune_one(job, index, block_unit(job, shell, index, matrices, inputs, target))}
    return {m.name: _tune_one(job, index, layer_unit(job, shell, index, m, inputs)) for m in matrices}


def _tune_one(job: Job, index: int, unit: Unit) -> TunedUnit:
    return tune_unit(unit, job.settings, job.own_batches(index), job.device)
