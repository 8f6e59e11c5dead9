"""The whole-model stage: its gradients are the right ones, it helps, moves codes, and resumes to the same bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support import assert_same_files, files_of, save_random_model
from test_quantize import CONFIGS, SMALL
from test_source_check import CONFIGS as SHARING_CONFIGS

from signround_edge.errors import UserError
from signround_edge.evaluation.perplexity import TorchSession, evaluate, text_windows
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.formats import get_grid
from signround_edge.model.decoder import Decoder, build_decoder, set_tensor
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.block.sign_step import RoundingState
from signround_edge.tuning.calibration.block_call import Shared
from signround_edge.tuning.calibration.shell import Shell, block_returns_tuple
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.whole_model import divergence, loading
from signround_edge.tuning.whole_model.divergence import TopProbabilities
from signround_edge.tuning.whole_model.stage import WholeModel
from signround_edge.tuning.whole_model.tunables import FloatShift, TunedMatrix, starting_positions

# Few steps on a tiny model: twenty times the rates that suit hundreds of steps on a large one.
RATES = {"whole_model_lr": 4e-3, "whole_model_code_lr": 1e-2}
SETTINGS = replace(
    SMALL, start="nearest", steps=2, samples=16, seqlen=64, whole_model_steps=8, whole_model_batch_size=4, **RATES
)
# What is resumed need not help: both stages, as short as they can be.
SHORT = replace(SETTINGS, samples=4, seqlen=32, whole_model_steps=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def block_wise(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_text: Path) -> RunDirectory:
    out = tmp_path_factory.mktemp("block-wise") / "run"
    settings = replace(SETTINGS, whole_model_steps=0)
    return quantize(tiny_llama, parse_scheme("gguf:q2_k_s"), out, str(calibration_text), settings)


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_text: Path) -> RunDirectory:
    out = tmp_path_factory.mktemp("whole-model") / "run"
    return quantize(tiny_llama, parse_scheme("gguf:q2_k_s"), out, str(calibration_text), SETTINGS)


@pytest.fixture(scope="module")
def frozen_codes(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_text: Path) -> RunDirectory:
    out = tmp_path_factory.mktemp("frozen-codes") / "run"
    settings = replace(SETTINGS, whole_model_code_lr=0)
    return quantize(tiny_llama, parse_scheme("gguf:q2_k_s"), out, str(calibration_text), settings)


def test_it_lowers_the_divergence_on_other_text(
    block_wise: RunDirectory,
    frozen_codes: RunDirectory,
    whole_model: RunDirectory,
    tiny_llama: Path,
    evaluation_text: Path,
) -> None:
    report = whole_model.manifest.whole_model
    assert report is not None
    assert report["after"] < report["before"]
    windows = text_windows(tiny_llama, evaluation_text, 256, 4)
    exact = TorchSession(load_source_model(tiny_llama))
    found = [
        evaluate(TorchSession(load_run_model(run)), windows, exact).kld_mean
        for run in (block_wise, frozen_codes, whole_model)
    ]
    assert found[0] > found[1] > found[2]  # type: ignore[operator]  # with a reference it is a number


def changed(old: RunDirectory, new: RunDirectory) -> set[str]:
    """Which kinds of stored tensors differ: "float", "codes", names of fp16 fields."""
    kinds = set()
    for name in old.names():
        if not old.is_quantized(name):
            kinds |= set() if torch.equal(old.float_tensor(name), new.float_tensor(name)) else {"float"}
            continue
        before, after = old.quantized(name), new.quantized(name)
        kinds |= set() if torch.equal(before.codes, after.codes) else {"codes"}
        for field, value in before.fields.items():
            if not torch.equal(value, after.fields[field]):
                assert value.dtype == torch.float16, field
                kinds.add(field)
    return kinds


def test_it_changes_codes_and_what_is_stored_in_floats(
    block_wise: RunDirectory, frozen_codes: RunDirectory, whole_model: RunDirectory
) -> None:
    floats = {"float", "super_scale", "super_minimum"}
    assert changed(block_wise, frozen_codes) == floats
    assert changed(block_wise, whole_model) == floats | {"codes"}


GRIDS = ["Q4_0", "Q4_1", "w4g64-asym", "Q2_K", "Q3_K", "IQ4_XS", "Q8_0"]


@pytest.mark.parametrize("name", GRIDS)
def test_positions_start_within_the_codes_that_v_chose(name: str) -> None:
    grid, generator = get_grid(name), torch.Generator().manual_seed(0)
    weight = torch.randn(8, 2 * max(grid.row_multiple, 64), generator=generator)
    state = RoundingState.start(grid, weight, grid.search(grid.blocked(weight), torch.ones(1)))
    state.shift = torch.empty(state.v.shape).uniform_(-0.5, 0.5, generator=generator)
    tensor = state.quantized()
    positions = starting_positions(tensor, weight)
    codes = grid.blocked(tensor.codes).float() - grid.anchor
    assert torch.equal(positions.round(), codes)
    away = (grid.offsets(grid.blocked(weight), tensor.fields) - codes).abs()
    crossed = (away > 0.5) & (away < 1)
    assert crossed.any()
    torch.testing.assert_close((positions - codes).abs()[crossed], (1 - away[crossed]).clamp_max(0.4999))


@pytest.mark.parametrize("name", GRIDS)
def test_codes_move_against_the_gradient(name: str) -> None:
    grid, generator = get_grid(name), torch.Generator().manual_seed(0)
    weight = torch.randn(8, 2 * max(grid.row_multiple, 64), generator=generator)
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    matrix = TunedMatrix(tensor, False, weight)
    gradient = torch.randn(weight.shape, generator=generator)
    for _ in range(30):
        matrix.receive(gradient, 0.1)
    moved, low, high = matrix.stored(), grid.code_min, grid.code_max
    assert moved.problem() is None
    uphill = grid.blocked(gradient) * grid.affine_view(tensor.fields)[0].unsqueeze(-1)
    step = grid.blocked(moved.codes).float() - grid.blocked(tensor.codes).float()
    free = (grid.blocked(tensor.codes) > low + 3) & (grid.blocked(tensor.codes) < high - 3)
    expected = torch.where(uphill == 0, 0, -uphill.sign())
    if free.any():  # 30 steps of 0.1 are three codes
        assert torch.equal((step * expected)[free & (uphill != 0)], torch.full_like(step, 3)[free & (uphill != 0)])
    assert bool((step * expected >= 0).all())
    assert not torch.equal(moved.codes, tensor.codes)
    assert float((matrix.value() * gradient).sum()) < float((tensor.dequantize() * gradient).sum())


@pytest.mark.parametrize("name", ["IQ2_XS", "IQ3_S", "IQ1_M"])
def test_codes_of_vectors_start_where_they_are_and_move_against_the_gradient(name: str) -> None:
    grid, generator = get_grid(name), torch.Generator().manual_seed(0)
    weight = torch.randn(8, 512, generator=generator)
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    other = grid.quantize(weight + 0.3 * torch.randn(weight.shape, generator=generator), grid.scales_of(tensor.fields))
    positions = starting_positions(other, weight)
    assert torch.equal(grid.nearest_offsets(positions.clone()) + grid.anchor, grid.blocked(other.codes).float())
    matrix = TunedMatrix(tensor, False, weight)
    gradient = torch.randn(weight.shape, generator=generator)
    for _ in range(10):
        matrix.receive(gradient, 0.1)
    assert matrix.stored().problem() is None
    assert float((matrix.value() * gradient).sum()) < float((tensor.dequantize() * gradient).sum())


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_text: Path) -> RunDirectory:
    out = tmp_path_factory.mktemp("short") / "run"
    return quantize(tiny_llama, parse_scheme("gguf:q2_k_s"), out, str(calibration_text), SHORT)


def test_interrupted_and_resumed_gives_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, short: RunDirectory, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    arguments = (tiny_llama, parse_scheme("gguf:q2_k_s"), tmp_path / "run", str(calibration_text), SHORT)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, "tune_whole_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(*arguments)
    with pytest.raises(UserError, match=r"incomplete \(whole-model stage\).*--resume"):
        RunDirectory.open(tmp_path / "run")
    with monkeypatch.context() as patch:  # after the new parts, before the manifest
        patch.setattr(RunDirectory, "_write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(*arguments, resume=True)
    quantize(*arguments, resume=True)
    assert_same_files(tmp_path / "run", short.path)


@pytest.mark.full
def test_parts_left_by_a_kill_after_the_manifest_are_removed_on_resume(
    monkeypatch: pytest.MonkeyPatch, short: RunDirectory, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    arguments = (tiny_llama, parse_scheme("gguf:q2_k_s"), tmp_path / "run", str(calibration_text), SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "remove_superseded", lambda self: None)
        quantize(*arguments)
    assert len(files_of(tmp_path / "run")) > len(files_of(short.path))
    quantize(*arguments, resume=True)
    assert_same_files(tmp_path / "run", short.path)


def loaded_decoder(path: Path) -> Decoder:
    decoder = build_decoder(path)
    for name, parameter in load_source_model(path).named_parameters():
        set_tensor(decoder.model, name, torch.nn.Parameter(parameter.detach(), requires_grad=False))
    decoder.model.tie_weights()
    return decoder


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "w4g64-asym", "Q2_K", "Q3_K", "IQ4_XS"])
def test_gradients_of_scales_are_those_of_the_dequantized_weight(name: str) -> None:
    grid, generator = get_grid(name), torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2 * max(grid.row_multiple, 64), generator=generator)
    factors = TunedMatrix(grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1))), transposed=False)
    gradient = torch.randn(weight.shape, generator=generator)
    factors.receive(gradient, 0.0)
    for field, shift in factors.shifts.items():
        assert shift.grad is not None
        # ŵ is linear in each field, so a difference is exact; 1/8 of an fp16 value is an fp16 value.
        before = (factors.value() * gradient).sum()
        at = int(shift.grad.abs().argmax())
        with torch.no_grad():
            shift.view(-1)[at] = 0.125
        found = float(((factors.value() * gradient).sum() - before) / 0.125)
        with torch.no_grad():
            shift.zero_()
        assert math.isclose(found, float(shift.grad.view(-1)[at]), rel_tol=2e-2), field


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_of_the_shell_are_the_models(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    path = save_random_model(CONFIGS[name], tmp_path / "model", tokenizer_from=tiny_llama)
    model = load_source_model(path)
    tokens = torch.randint(0, 3072, (2, 12), generator=torch.Generator().manual_seed(0))
    decoder = loaded_decoder(path)
    shell = Shell(decoder, block_returns_tuple(decoder, tokens))
    with torch.no_grad():
        hidden = shell.embed(tokens)
        shared: Shared = {}
        for index, block in enumerate(decoder.blocks):
            hidden = shell.block_call(index, tokens, CPU).run(block, hidden, shared)
        found = torch.cat([shell.logits(part) for part in hidden.flatten(0, 1).split(10)])
        torch.testing.assert_close(found, model(input_ids=tokens).logits.flatten(0, 1))


@pytest.mark.parametrize("kind", ["llama", "gemma4"])
def test_gradients_are_those_of_the_model_as_a_whole(
    kind: str, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Gemma 4 the last block reads the keys and values of the one before."""
    monkeypatch.setattr(divergence, "KEPT_TOKENS", 3072)  # all, so that the divergence is the plain one
    tied = transformers.LlamaConfig(**CONFIGS["llama"].to_dict() | {"tie_word_embeddings": True})
    config = tied if kind == "llama" else SHARING_CONFIGS["gemma4"]
    path = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    exact_model, model = load_source_model(path), load_source_model(path)
    tokens = torch.randint(0, 3072, (3, 16), generator=torch.Generator().manual_seed(0))
    decoder = loaded_decoder(path)
    shell = Shell(decoder, block_returns_tuple(decoder, tokens))
    inputs = shell.embed(tokens)
    # What comes before the blocks is no part of the stage, which begins with what enters them.
    behind = (f"{decoder.prefix}.", "model.norm.")
    names = [n for n, p in model.named_parameters() if p.ndim == 1 and n.startswith(behind)]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(1.1).requires_grad_()
    exact = TopProbabilities.of([exact_model(input_ids=tokens).logits.detach().flatten(0, 1)], CPU)
    whole = WholeModel(
        decoder=decoder,
        shell=shell,
        tokens=tokens,
        inputs=inputs,
        exact=exact,
        dtypes=dict.fromkeys(names, torch.float32),
        tunables={n: FloatShift(model.get_parameter(n).detach()) for n in names},
        autocast=torch.autocast("cpu", enabled=False),
        device=CPU,
    )
    found = whole.train_step(torch.tensor([0, 2]), 0.0)
    part = tokens[[0, 2]]
    target = exact_model(input_ids=part).logits.detach().log_softmax(-1)
    log_p = model(input_ids=part).logits.log_softmax(-1)
    loss = (target.exp() * (target - log_p)).sum(-1).mean()
    loss.backward()
    loss = loss.detach()
    assert math.isclose(found, float(loss), rel_tol=1e-3)
    for name in names:
        gradient = model.get_parameter(name).grad
        shift = whole.tunables[name].shifts["value"].grad
        assert gradient is not None
        assert shift is not None
        unit = model.get_parameter(name).detach().square().mean().sqrt()
        torch.testing.assert_close(shift, gradient * unit, rtol=1e-3, atol=1e-7)
    assert math.isclose(whole.divergence(torch.tensor([0, 2]), 1), float(loss), rel_tol=1e-3)
