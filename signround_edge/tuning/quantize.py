"""`quantize`: from a Hugging Face model to a run directory, one decoder block in memory at a time, resumable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.formats import Grid, QuantizedTensor, get_grid
from signround_edge.manifest import OUTSIDE, Manifest, TensorEntry
from signround_edge.model.decoder import (
    Decoder,
    build_decoder,
    checkpoint_name,
    load_parameters,
    out_in,
    set_parameter,
    set_weight,
    unload_parameters,
    weight_of,
)
from signround_edge.model.source import SourceModel
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.progress import SILENT, Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import Plan, listing, make_plan, part_of_block
from signround_edge.schemes.roles import writes_to_stream
from signround_edge.schemes.scheme import Scheme
from signround_edge.transforms.block_transform import BlockTransform
from signround_edge.tuning.block.channel_scaling import ChannelScaling, stored_transform, transformed_matrix
from signround_edge.tuning.block.loss import held_out_loss
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.block.tune import TunedUnit, compute_context, compute_dtype, tune_unit
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.calibration.activations import (
    Shell,
    block_returns_tuple,
    equal_weights,
    relative_weights,
    run_block,
)
from signround_edge.tuning.calibration.importance import Importance, ImportanceSink, ImportanceSource, given_importance
from signround_edge.tuning.calibration.input_moments import InputMoments, SecondMoments
from signround_edge.tuning.calibration.text import calibration_tokens, tokens_hash
from signround_edge.tuning.cpu.attention import use_blocked_attention
from signround_edge.tuning.cpu.rms_norm import use_cached_rms_norm
from signround_edge.tuning.resume import open_or_create, versions
from signround_edge.tuning.settings import TuningSettings
from signround_edge.tuning.whole_model.divergence import TopProbabilities
from signround_edge.tuning.whole_model.stage import TOKENS_AT_ONCE, WholeModel, tune_whole_model
from signround_edge.tuning.whole_model.tunables import FloatShift, Tunable, TunedMatrix


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
    Raises:
        UserError: bad input, in one sentence; whatever is complete in `out` stays.
    """
    torch_device = _device(device)
    source = SourceModel.open(model)
    decoder = build_decoder(model)
    use_blocked_attention(decoder.model, torch_device)
    if settings.granularity == "layer" and decoder.has_experts():
        raise UserError(
            "--granularity layer cannot tune a mixture of experts, each of which sees some of the tokens only; use "
            "--granularity block"
        )
    use_cached_rms_norm(decoder.model, torch_device)
    plan = make_plan(decoder, source, scheme, float_fallback)
    for line in listing(plan):
        progress.line(line)
    tokens = calibration_tokens(calibration, load_tokenizer(model), settings.samples, settings.seqlen)
    if len(tokens) < settings.samples:
        progress.line(f"note: the calibration text gives {len(tokens)} of the {settings.samples} samples asked for")
    given = {} if imatrix is None else given_importance(imatrix, plan, settings.scale_init, progress)
    if save_imatrix is not None:
        save_imatrix.check(_matrix_names(decoder, plan))
    manifest = Manifest(
        scheme=scheme.text,
        targets=list(scheme.targets),
        source={"model": model.resolve().name, "files": source.hashes()},
        settings={
            **settings.to_json(),
            "tensor_types": scheme.override_texts,
            "device": torch_device.type,
            "calibration_sha256": tokens_hash(tokens),
            "imatrix_sha256": None if imatrix is None else imatrix.sha256,
        },
        versions=versions(torch_device),
        parts=plan.parts,
        tied=plan.tied,
        tensors=plan.tensors,
    )
    run = open_or_create(out, manifest, source, resume)
    importance = Importance(given, save_imatrix)
    _Job(source, decoder, plan, tokens, settings, torch_device, run, progress, importance).execute()
    return RunDirectory.open(out)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu, or install torch with CUDA")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _matrix_names(decoder: Decoder, plan: Plan) -> list[str]:
    """The matrices whose inputs are activations: those of the blocks, and a head that is not the embedding."""
    names = [name for index in range(len(decoder.blocks)) for name in decoder.matrices(index)]
    return names if plan.head == plan.embedding else [*names, plan.head]


@dataclass
class _Job:
    """One run in progress; `execute` is the block loop."""

    source: SourceModel
    decoder: Decoder
    plan: Plan
    tokens: Tensor  # int64 [samples, seqlen]
    settings: TuningSettings
    device: torch.device
    run: RunDirectory
    progress: Progress
    importance: Importance

    def execute(self) -> None:
        total = len(self.plan.parts)
        self.progress.parts(sum(self.run.is_complete(p) for p in self.plan.parts), total)
        if self.run.manifest.state == "complete" and self.importance.sink is None:
            return
        shell, embedding, exact, quantized, scaling = self._embed()
        for index in range(len(self.decoder.blocks)):
            exact, quantized = self._block(shell, index, exact, quantized, scaling)
            self.progress.parts(index + 1, total)
        self._outside(shell, embedding, quantized, scaling)
        self.progress.parts(total, total)
        if self.run.manifest.state != "complete":
            self._whole_model(shell, exact)
        if self.importance.sink is not None:
            self.progress.line(f"wrote {self.importance.save(*self.tokens.shape)}")

    def _embed(self) -> tuple[Shell, QuantizedTensor | None, Tensor, Tensor, ChannelScaling | None]:
        """(shell, quantized embedding, block 0's input in the exact and the quantized model, transform of blocks)."""
        model = self.decoder.model
        inside = set(self.decoder.blocks.modules())
        for name, module in model.named_modules():
            if module not in inside and module is not self.decoder.head:
                _load_own(module, name, self.source, self.decoder.base_prefix)
        load_parameters(
            self.decoder.blocks[0], self.decoder.block_prefix(0), self.source, _CPU, self.decoder.base_prefix
        )
        shell = Shell(self.decoder, block_returns_tuple(self.decoder, self.tokens[:1, :2]))
        unload_parameters(self.decoder.blocks[0])
        exact = self._embed_all(shell)
        scaling = None
        if "channel-scales" in self.settings.transforms:
            compares = self.run.manifest.whole_model is None
            scaling = ChannelScaling.start(shell, self.tokens, self.device, self.progress, compares)
        if not self.run.is_quantized(self.plan.embedding):
            return shell, None, exact, exact, scaling
        grid = self._grid(self.plan.embedding)
        weight = weight_of(self.decoder.embedding)
        importance = self.importance.given.get(self.plan.embedding, torch.ones(weight.shape[1]))
        tensor = grid.quantize(weight, initial_scales(grid, weight, importance, "search"))
        set_weight(self.decoder.embedding, tensor.dequantize())
        quantized = self._embed_all(shell)
        return shell, tensor, exact, quantized, scaling

    def _embed_all(self, shell: Shell) -> Tensor:
        return torch.cat([shell.embed(part) for part in self.tokens.split(self.settings.batch_size)])

    def _block(
        self, shell: Shell, index: int, exact: Tensor, quantized: Tensor, scaling: ChannelScaling | None
    ) -> tuple[Tensor, Tensor]:
        """Tune (or, when it is complete, read) one block; returns the inputs of the next one."""
        block, part, prefix = self.decoder.blocks[index], part_of_block(index), self.decoder.block_prefix(index)
        load_parameters(block, prefix, self.source, self.device, self.decoder.base_prefix)
        every = self.decoder.matrices(index)
        modules = {name: module for name, module in every.items() if self.run.is_quantized(name)}
        moments = SecondMoments(self._token_weights)
        with moments.watching(block, self.importance.to_collect(every, modules)):
            target = self._run(shell, index, exact, moments)
        importance = self.importance.settle(moments.result(), self.device)
        model_type = str(getattr(self.decoder.model.config, "model_type", ""))
        matrices = [
            Matrix(
                name,
                module,
                self._grid(name),
                out_in(module).contiguous(),
                importance[name],
                writes_to_stream(name, model_type),
            )
            for name, module in modules.items()
        ]
        transform, found = BlockTransform(), None
        if scaling is not None:
            transform, found = self._transform(
                scaling, index, self._block_unit(shell, index, matrices, quantized, target)
            )
            scaling.install(index, transform)
            matrices = [transformed_matrix(m, transform.of(m.name.removeprefix(prefix))) for m in matrices]
        if self.run.is_complete(part):
            for matrix in matrices:
                matrix.install(self.run.quantized(matrix.name).dequantize().to(self.device))
        else:
            tuned = self._tune(shell, index, matrices, quantized, target)
            tensors = {name: tensor for unit in tuned.values() for name, tensor in unit.tensors.items()}
            floats = {**self._floats(part), **{prefix + name: vector for name, vector in transform.vectors.items()}}
            self.run.write_part(
                part,
                {**floats, **tensors},
                report={name: asdict(unit.report) for name, unit in tuned.items()},
                scales={prefix + name: scales for name, scales in transform.scales.items()},
                transforms=found,
                statistics={name: s.tensors() for unit in tuned.values() for name, s in unit.statistics.items()},
            )
            for name, unit in tuned.items():
                self.progress.line(f"{index + 1}/{len(self.decoder.blocks)} {name}: {unit.report}")
        following = self._run(shell, index, quantized)
        unload_parameters(block)
        return target, following

    def _transform(
        self, scaling: ChannelScaling, index: int, unit: Unit
    ) -> tuple[BlockTransform, dict[str, Any] | None]:
        """What to make of a block's weights before they are tuned, and what to report; read where it is complete."""
        part = part_of_block(index)
        if self.run.is_complete(part):
            return stored_transform(self.run, part, self.decoder.block_prefix(index)).to(self.device), None
        if not unit.matrices:
            return BlockTransform(), None
        autocast = compute_context(self.settings, (m.grid for m in unit.matrices), self.device)
        loss = functools.partial(held_out_loss, unit, self.settings, autocast)
        return scaling.choose(index, unit.matrices, loss, self.settings.scale_init)

    def _tune(
        self, shell: Shell, index: int, matrices: list[Matrix], inputs: Tensor, target: Tensor
    ) -> dict[str, TunedUnit]:
        """The block's units by name: "block", or each matrix's own."""
        if not matrices:
            return {}
        if self.settings.granularity == "block":
            return {"block": self._tune_block(shell, index, matrices, inputs, target)}
        tuned = {}
        for matrix in matrices:
            unit = self._layer_unit(shell, index, matrix, inputs)
            tuned[matrix.name] = tune_unit(unit, self.settings, self._batches(index, unit.train), self.device)
        return tuned

    def _tune_block(
        self, shell: Shell, index: int, matrices: list[Matrix], inputs: Tensor, target: Tensor
    ) -> TunedUnit:
        unit = self._block_unit(shell, index, matrices, inputs, target)
        return tune_unit(unit, self.settings, self._batches(index, unit.train), self.device)

    def _block_unit(self, shell: Shell, index: int, matrices: list[Matrix], inputs: Tensor, target: Tensor) -> Unit:
        block = self.decoder.blocks[index]

        def forward(samples: Tensor) -> Tensor:
            call = shell.block_call(index, self.tokens[samples], self.device)
            return call.run(block, inputs[samples].to(self.device))

        train, held_out = self._split()

        targets = (lambda samples: target[samples].to(self.device), self._token_weights)
        return Unit(matrices, forward, *targets, train, held_out, block)

    def _layer_unit(self, shell: Shell, index: int, matrix: Matrix, inputs: Tensor) -> Unit:
        """One matrix against its own exact output for the input that the quantized model gives it."""
        seen: list[Tensor] = []
        hook = matrix.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().cpu()))
        self._run(shell, index, inputs)
        hook.remove()
        layer_inputs = torch.cat(seen)
        with torch.no_grad(), compute_context(self.settings, [matrix.grid], self.device):
            targets = torch.cat([matrix.module(x.to(self.device)).float().cpu() for x in seen])
        train, held_out = self._split()

        return Unit(
            [replace(matrix, writes_to_stream=False)],  # its own exact output is the target: nothing is inherited
            lambda samples: matrix.module(layer_inputs[samples].to(self.device)),
            lambda samples: targets[samples].to(self.device),
            self._token_weights,
            train,
            held_out,
            matrix.module,
        )

    def _outside(
        self, shell: Shell, embedding: QuantizedTensor | None, quantized: Tensor, scaling: ChannelScaling | None
    ) -> None:
        """Quantize the output head by weighted search, and write all that is outside the blocks."""
        name, head = self.plan.head, self.decoder.head
        tensors: dict[str, Tensor | QuantizedTensor] = dict(self._floats(OUTSIDE))
        if embedding is not None:
            tensors[self.plan.embedding] = embedding
        to_quantize = {} if name in tensors else {name: head}
        untied = {} if name == self.plan.embedding else {name: head}
        moments = SecondMoments(equal_weights)
        if self.importance.to_collect(untied, to_quantize):
            for start in range(0, len(self.tokens), self.settings.batch_size):
                part = slice(start, start + self.settings.batch_size)
                inputs = shell.head_input(self.tokens[part], quantized[part])
                moments.add(name, inputs, equal_weights(inputs))
        importance = self.importance.settle(moments.result(), _CPU)
        if self.run.is_complete(OUTSIDE):
            return
        if to_quantize:
            load_parameters(head, name.removesuffix("weight"), self.source, _CPU, self.decoder.base_prefix)
            weight, grid = weight_of(head), self._grid(name)
            tensors[name] = grid.quantize(weight, initial_scales(grid, weight, importance[name], "search"))
        found = {}
        if scaling is not None:
            self._load_outside(lambda name: self._source_tensor(name).float(), _CPU)
            found["logits_divergence"] = scaling.check()
        self.run.write_part(OUTSIDE, tensors, {}, transforms=found)

    def _whole_model(self, shell: Shell, exact: Tensor) -> None:
        """Tune all parts together, and write each anew; `exact` is what leaves the exact last block."""
        model = self._load_whole_model(shell, exact)
        train, held_out = self._split()
        batches = self._batches(len(self.decoder.blocks), train, self.settings.whole_model_batch_size)
        tuned, report = tune_whole_model(model, self.settings, batches, held_out, self.progress)
        parts = ((part, self._revised(part, tuned)) for part in self.plan.parts)
        self.run.write_whole_model(parts, asdict(report))
        self.progress.line(f"whole model: {report}")

    def _load_whole_model(self, shell: Shell, exact: Tensor) -> WholeModel:
        decoder, device = self.decoder, self.device
        tunables: dict[str, Tunable] = {}
        grids = [self._grid(t.name) for t in self.plan.tensors if t.format is not None and t.part != OUTSIDE]
        dtype = compute_dtype(self.settings, grids, device)
        for entry in self.plan.tensors:
            if entry.format is not None and entry.part != OUTSIDE:
                tensor = self.run.quantized(entry.name).to(device)
                tunables[entry.name] = TunedMatrix(tensor, entry.transposed, self._original(entry), dtype)
            elif len(entry.shape) == 1:
                tunables[entry.name] = FloatShift(self.run.float_tensor(entry.name).to(device))
        for module in decoder.model.modules():
            module._buffers.update({k: None if b is None else b.to(device) for k, b in module._buffers.items()})
        self._load_outside(lambda name: self._source_tensor(name).float(), device)
        with torch.no_grad():
            positions = exact.flatten(0, 1).split(TOKENS_AT_ONCE)
            exact_probabilities = TopProbabilities.of((shell.logits(part.to(device)) for part in positions), _CPU)
        self._load_outside(self.run.dequantized, device)
        inputs = self._embed_all(shell).cpu()
        for entry in self.plan.tensors:  # what stays as it is within the blocks; `install` puts the rest there
            if entry.part != OUTSIDE and entry.name not in tunables:
                set_parameter(decoder.model, entry.name, _frozen(self.run.dequantized(entry.name).to(device)))
        return WholeModel(
            decoder,
            shell,
            self.tokens,
            inputs,
            exact_probabilities,
            tunables,
            compute_context(self.settings, grids, device),
            device,
        )

    def _load_outside(self, value: Callable[[str], Tensor], device: torch.device) -> None:
        """Put all that is outside the blocks into the model; `value` gives it in f32."""
        loaded = {t.name: _frozen(value(t.name).to(device)) for t in self.plan.of_part(OUTSIDE)}
        loaded |= {alias: loaded[owner] for alias, owner in self.plan.tied.items() if owner in loaded}
        for name, parameter in loaded.items():
            set_parameter(self.decoder.model, name, parameter)

    def _original(self, entry: TensorEntry) -> Tensor | None:
        """The full-precision weight f32 [out, in], transformed, of a matrix whose codes the whole-model stage moves."""
        if self.settings.whole_model_code_lr == 0:
            return None
        weight = self._source_tensor(entry.name).float()
        weight = self.run.channel_scales(entry.name).apply(weight.T.contiguous() if entry.transposed else weight)
        return weight.to(self.device)

    def _revised(self, part: str, tuned: dict[str, Tensor | QuantizedTensor]) -> dict[str, Tensor | QuantizedTensor]:
        """A part with what the whole-model stage has tuned."""
        tensors: dict[str, Tensor | QuantizedTensor] = {}
        for entry in self.plan.of_part(part):
            if entry.name in tuned:
                tensors[entry.name] = tuned[entry.name]
            elif entry.format is not None:
                tensors[entry.name] = self.run.quantized(entry.name)
            else:
                tensors[entry.name] = self.run.float_tensor(entry.name)
        return tensors

    def _floats(self, part: str) -> dict[str, Tensor]:
        """The source's float parameters of a part, bit for bit; a transform may put others in their place."""
        return {t.name: self._source_tensor(t.name) for t in self.plan.of_part(part) if t.format is None}

    def _source_tensor(self, name: str) -> Tensor:
        """A parameter as the source stores it."""
        return self.source.tensor(checkpoint_name(name, self.source, self.decoder.base_prefix))

    def _grid(self, name: str) -> Grid:
        return get_grid(str(self.run.entry(name).format))

    @property
    def _token_weights(self) -> Callable[[Tensor], Tensor]:
        return relative_weights if self.settings.loss == "relative" else equal_weights

    def _run(
        self,
        shell: Shell,
        index: int,
        hidden: Tensor,
        moments: InputMoments | None = None,
    ) -> Tensor:
        """`hidden` of all samples through block `index`, products in the dtype of its tuning."""
        names = self.decoder.matrices(index)
        grids = [self._grid(name) for name in names if self.run.is_quantized(name)]
        autocast = compute_context(self.settings, grids, self.device)
        size = self.settings.batch_size
        return run_block(self.decoder, shell, index, self.tokens, hidden, size, self.device, autocast, moments)

    def _split(self) -> tuple[Tensor, Tensor]:
        """Sample indices to (train on, hold out): every n-th sample is held out, so the slice covers the whole text."""
        count = len(self.tokens)
        if count == 1:
            return torch.tensor([0]), torch.tensor([0])
        every = max(2, round(1 / self.settings.held_out))
        held_out = torch.arange(count) % every == min(every, count) - 1
        return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()

    def _batches(self, index: int, train: Tensor, batch_size: int | None = None) -> Iterator[Tensor]:
        """Endless shuffled batches; each block seeds its own order, so that resuming needs no generator state."""
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + index)
        size = min(batch_size or self.settings.batch_size, len(train))
        while True:
            order = train[torch.randperm(len(train), generator=generator)]
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size]


_CPU = torch.device("cpu")


def _load_own(module: torch.nn.Module, name: str, source: SourceModel, base_prefix: str) -> None:
    """Load the parameters that a module holds itself, not those of its children."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            full = f"{name}.{leaf}" if name else leaf
            value = source.tensor(checkpoint_name(full, source, base_prefix)).float()
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def _frozen(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
