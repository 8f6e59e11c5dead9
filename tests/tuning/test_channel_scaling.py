"""`quantize --transform channel-scales`: the function stays, rounding costs less, and runs and files hold together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from support import assert_same_files, save_random_model
from test_quantize import CONFIGS, SMALL
from torch import Tensor, nn

from benchmarks.float_gguf import write_float_gguf
from exporters.interface import ExportOptions
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.verify import verify
from signround_edge.cli import main
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import FloatArray
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.formats import QuantizedTensor
from signround_edge.plugins import exporters
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.transforms import TRANSFORMS
from signround_edge.transforms.block_transform import BlockTransform
from signround_edge.transforms.check import LOGITS_LIMIT, logits_divergence
from signround_edge.transforms.folds import Fold
from signround_edge.tuning import quantize as tuning_quantize
from signround_edge.tuning.block import channel_scaling
from signround_edge.tuning.block.transforming import Transforming
from signround_edge.tuning.block.unit import Matrix
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from signround_edge.tuning.whole_model import loading

full = pytest.mark.full
SCALED = replace(SMALL, steps=0, samples=8, transforms=("channel-scales",))
TEXT_TOKENS = torch.randint(0, 3000, (1, 48), generator=torch.Generator().manual_seed(0))


def uneven_model(config: transformers.PretrainedConfig, out: Path, tokenizer_from: Path) -> Path:
    """A random model with norm weights as uneven as those of large trained ones: there is something to gain."""
    save_random_model(config, out, tokenizer_from)
    model: Any = load_source_model(out)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("norm.weight"):
            parameter.mul_((torch.randn(parameter.shape, generator=generator) * 0.8).exp())
    model.save_pretrained(out)
    return out


def original_and_transformed(model: Path, run: RunDirectory) -> tuple[Any, Any]:
    """The source in full precision, and with the run's channel scales and vectors in the place of its own."""
    original, transformed = load_source_model(model), load_source_model(model)
    with torch.no_grad():
        for name, parameter in transformed.named_parameters():
            entry = run.entry(name)
            if entry.format is not None:
                scales = run.channel_scales(name)
                weight = scales.apply(parameter.T if entry.transposed else parameter)
                parameter.copy_(weight.T if entry.transposed else weight)
            elif parameter.ndim == 1:
                parameter.copy_(run.float_tensor(name))
    return original, transformed


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TEXT_TOKENS, use_cache=False).logits[0]
    return found


def divergence(expected: Tensor, found: FloatArray) -> float:
    return logits_divergence(expected, torch.from_numpy(found))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return uneven_model(CONFIGS["llama"], tmp_path_factory.mktemp("uneven") / "model", tiny_llama)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, uneven: Path, calibration_text: Path) -> RunDirectory:
    out = tmp_path_factory.mktemp("run") / "run"
    return quantize(uneven, parse_scheme("gguf:q4_0,onnx:w4g32"), out, str(calibration_text), SCALED)


def test_rounding_costs_less_on_every_block(run: RunDirectory) -> None:
    blocks = [r.transforms["channel-scales"] for p, r in run.manifest.complete.items() if p != "outside"]
    assert all(b["rounded"] <= b["rounded_before"] and b["weighted_errors"] for b in blocks)
    assert run.manifest.settings["transforms"] == ["channel-scales"]
    assert sum(b["rounded"] for b in blocks) < 0.95 * sum(b["rounded_before"] for b in blocks)


@pytest.mark.parametrize(
    "name", [n if n in ("llama", "gemma3") else pytest.param(n, marks=full) for n in sorted(CONFIGS)]
)
def test_the_transformed_model_has_the_logits_of_the_original(
    name: str, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    model = uneven_model(CONFIGS[name], tmp_path / "model", tiny_llama)
    run = quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SCALED)
    original, transformed = original_and_transformed(model, run)
    changed = [n for n, p in transformed.named_parameters() if not torch.equal(p, original.get_parameter(n))]
    assert changed
    assert abs(logits_divergence(logits(original), logits(transformed))) < LOGITS_LIMIT
    assert abs(run.manifest.complete["outside"].transforms["logits_divergence"]) < LOGITS_LIMIT


def test_llama_cpp_computes_the_originals_logits_from_the_transformed_floats(
    run: RunDirectory, uneven: Path, tmp_path: Path
) -> None:
    original, transformed = original_and_transformed(uneven, run)
    folder = tmp_path / "transformed"
    transformed.save_pretrained(folder)
    for file in uneven.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    session = LlamaCppRuntime().open(write_float_gguf(folder, tmp_path / "floats.gguf"))
    try:
        found = session.logits(TEXT_TOKENS[0].numpy().astype("int32"))
    finally:
        session.close()
    assert divergence(logits(original), found) < LOGITS_LIMIT


def test_real_runtimes_agree_with_a_transformed_run(
    run: RunDirectory, uneven: Path, tmp_path: Path, evaluation_text: Path
) -> None:
    options = ExportOptions(log=lambda line: None)
    artifacts = (
        exporters()["gguf"].export(run, tmp_path / "model.gguf", options),
        exporters()["onnx"].export(run, tmp_path / "onnx", options),
    )
    report = verify(run, artifacts, evaluation_text, reference=uneven, n_ctx=64, max_windows=2)
    assert report.passed, report
    assert {r.name for r in report.runtimes if r.status == "pass"} >= {"llama.cpp", "onnxruntime"}


def test_a_template_of_the_original_model_gets_the_runs_weights_or_is_refused(
    run: RunDirectory, uneven: Path, tmp_path: Path, evaluation_text: Path
) -> None:
    """Tensors are recognised by value, which scales change: none may be taken for another, or left as it was."""
    template = write_float_gguf(uneven, tmp_path / "template.gguf")
    options = ExportOptions(template=template, log=lambda line: None)
    try:
        file = exporters()["gguf"].export(run, tmp_path / "model.gguf", options)
    except UserError as error:
        assert "quantize without --transform" in str(error)  # noqa: PT017
        return
    assert verify(run, (file,), evaluation_text, reference=uneven, n_ctx=64, max_windows=1).passed


def test_killed_between_blocks_and_resumed_gives_the_same_bytes(
    uneven: Path, run: RunDirectory, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (uneven, parse_scheme("gguf:q4_0,onnx:w4g32"), tmp_path / "run", str(calibration_text), SCALED)
    written: list[str] = []
    write_part = RunDirectory.write_part

    def killed(self: RunDirectory, part: str, *args: Any, **kwargs: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(part)
        write_part(self, part, *args, **kwargs)

    monkeypatch.setattr(RunDirectory, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(*arguments)
    monkeypatch.undo()
    with pytest.raises(UserError, match="its transforms is"):
        quantize(*arguments[:4], replace(SCALED, transforms=()), resume=True)
    quantize(*arguments, resume=True)
    assert_same_files(run.path, tmp_path / "run")


def test_the_whole_model_stage_starts_from_the_transformed_weights(
    tiny_llama: Path, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"whole_model_lr": 4e-3, "whole_model_code_lr": 1e-2, "whole_model_batch_size": 4}
    settings = replace(SCALED, samples=12, seqlen=32, whole_model_steps=5, **rates)
    seen: dict[str, float] = {}
    tunable = loading.TunedMatrix

    def watched(
        tensor: QuantizedTensor, transposed: bool, original: torch.Tensor, *rest: object
    ) -> loading.TunedMatrix:
        error = float((tensor.dequantize() - original).norm() / original.norm())
        seen[f"{len(seen)}"] = error
        return tunable(tensor, transposed, original, *rest)

    monkeypatch.setattr(loading, "TunedMatrix", watched)
    run = quantize(tiny_llama, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), settings)
    assert len(seen) == 35
    assert max(seen.values()) < 0.15  # of 4 bits; against the weights as they were it would be above
    assert run.manifest.whole_model is not None
    assert run.manifest.whole_model["after"] < run.manifest.whole_model["before"]
    scaled = [n for n in run.names() if run.is_quantized(n) and run.channel_scales(n).columns is not None]
    assert scaled
    assert all(r.transforms for r in run.manifest.complete.values())


def test_a_layer_by_layer_run_of_a_transposed_model_is_transformed_too(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    model = uneven_model(CONFIGS["gpt2"], tmp_path / "model", tiny_llama)
    settings = replace(SCALED, steps=10, granularity="layer")
    run = quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), settings)
    original, transformed = original_and_transformed(model, run)
    assert abs(logits_divergence(logits(original), logits(transformed))) < LOGITS_LIMIT
    assert logits_divergence(logits(original), logits(load_run_model(run))) < 0.1


def test_a_fold_that_changes_the_function_stops_the_run(
    uneven: Path, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: the consumers of a norm but one are scaled."""
    find = channel_scaling.find_folds

    def sabotaged(*args: Any) -> list[Fold]:
        return [replace(fold, consumers=fold.consumers[:1]) for fold in find(*args)]

    monkeypatch.setattr(channel_scaling, "find_folds", sabotaged)
    monkeypatch.setattr(tuning_quantize, "choose_channel_scales", _keeps_all)
    with pytest.raises(UserError, match="changes what decoder block 0 computes"):
        quantize(uneven, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SCALED)


def _keeps_all(
    model: Transforming, index: int, matrices: list[Matrix], loss: Callable[[], float], scale_init: str
) -> tuple[BlockTransform, dict[str, Any]]:
    block = model.shell.decoder.blocks[index]
    own = {m.name.removeprefix(model.shell.decoder.block_prefix(index)): m for m in matrices}
    transform = BlockTransform()
    for fold in channel_scaling._folds(model, index, own):
        transform = transform.with_fold(block, fold, torch.linspace(0.5, 2, fold.channels))
    return transform, {}


def test_the_command_line_takes_transforms_and_refuses_unknown_ones(
    uneven: Path, tmp_path: Path, calibration_text: Path
) -> None:
    def command(transform: str) -> list[str]:
        sizes = ["--steps", "0", "--samples", "4", "--seqlen", "32", "--calibration", str(calibration_text)]
        out = ["-o", str(tmp_path / "run")]
        return ["quantize", str(uneven), "--scheme", "gguf:q4_0", "--transform", transform, *sizes, *out]

    refused = CliRunner().invoke(main, command("rotate"))
    assert refused.exit_code == 2
    assert f"known are {', '.join(TRANSFORMS)} and none" in refused.output
    done = CliRunner().invoke(main, command("channel-scales"))
    assert done.exit_code == 0, done.output
    assert "mlp.up_proj → mlp.down_proj" in done.output
    assert TuningSettings().transforms == ()
