"""What `quantize` says of its costs beforehand, and that limits change where things are and not what comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support import SIZES, assert_same_files, save_random_model
from torch.utils.flop_counter import FlopCounterMode

from signround_edge.errors import UserError
from signround_edge.model.decoder import weight_of
from signround_edge.model.weights import ModelWeights
from signround_edge.progress import Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import make_plan
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.calibration.activations import Store
from signround_edge.tuning.cost.estimate import Estimate, Limits, _fitting, estimate
from signround_edge.tuning.cost.memory import block_bytes
from signround_edge.tuning.cost.whole_model import WholeModelShape, whole_model_memory, whole_model_work
from signround_edge.tuning.cost.work import BlockShape, MatrixShape, block_shapes, block_work
from signround_edge.tuning.outside import open_shell, release_lookups
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from signround_edge.tuning.whole_model.stage import WholeModel

SMALL = TuningSettings(steps=4, samples=16, seqlen=32, batch_size=4, lr=0.02, compute_dtype="float32")
SCHEME = parse_scheme("gguf:q4_0")
CONFIGS = {
    "llama": transformers.LlamaConfig(**{**SIZES, "vocab_size": 3072}),
    "mixtral": transformers.MixtralConfig(**{**SIZES, "vocab_size": 3072}, num_local_experts=4, num_experts_per_tok=2),
}
BLOCK = BlockShape((MatrixShape(64, 64, "Q4_0", source="a"), MatrixShape(64, 256, "Q4_0", source="b")), 64, 4, 64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return save_random_model(CONFIGS["llama"], tmp_path_factory.mktemp("cost") / "model", tokenizer_from=tiny_llama)


def estimated(folder: Path, settings: TuningSettings = SMALL, limits: Limits | None = None) -> Estimate:
    weights = ModelWeights.open(folder)
    plan = make_plan(weights, SCHEME, float_fallback=True)
    return estimate(plan, weights.decoder, settings, settings.samples, CPU, limits or Limits())


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_operations_are_those_that_torch_counts(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    folder, seqlen = save_random_model(CONFIGS[name], tmp_path / "model", tokenizer_from=tiny_llama), 64
    weights = ModelWeights.open(folder)
    shapes = block_shapes(make_plan(weights, SCHEME, float_fallback=True), weights.decoder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs.model(input_ids=torch.randint(0, 3072, (1, seqlen)))
    # Eager attention also computes what the causal mask hides: two products of [seqlen, seqlen] a head.
    hidden = sum(2 * shape.attention * seqlen for shape in shapes)
    router = 2 * 64 * 4 * len(shapes) if name == "mixtral" else 0
    rotation = counter.get_total_flops() / seqlen - sum(s.flops_of_a_token(seqlen) for s in shapes) - hidden - router
    assert 0 <= rotation < 0.01 * counter.get_total_flops() / seqlen


def test_work_grows_with_what_it_is_done_on() -> None:
    before, steps = block_work(BLOCK, SMALL, 16)
    _, twice = block_work(BLOCK, replace(SMALL, steps=8), 16)
    assert twice.stepped["Q4_0"] == 2 * steps.stepped["Q4_0"] == 8 * BLOCK.weights
    more, _ = block_work(BLOCK, SMALL, 32)
    assert more.flops == 2 * before.flops
    assert block_work(BLOCK, replace(SMALL, steps=0), 16)[1].flops == 0


def test_hidden_states_on_disk_give_the_same_bytes_and_leave_no_file(
    model: Path, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signround_edge.tuning.cost.estimate.current_resident", lambda: 0)
    needed, said = estimated(model), list[str]()
    assert needed.hidden_on == "memory"
    limits = {"memory": Limits(), "disk": Limits(memory=int(needed.host_bytes) - 1)}
    for name, limit in limits.items():
        given = (str(calibration_text), SMALL)
        shown = Progress(said.append)
        quantize(model, SCHEME, tmp_path / name, *given, limits=limit, progress=shown, source_check="off")
    assert any("hidden states on disk" in line for line in said)
    assert_same_files(tmp_path / "memory", tmp_path / "disk")
    assert not list((tmp_path / "disk").rglob("*.hidden"))


def test_a_limit_that_cannot_be_kept_is_refused_with_the_way_out(
    model: Path, tmp_path: Path, calibration_text: Path
) -> None:
    with pytest.raises(UserError, match=r"--max-memory: this run is estimated to take .*--batch-size, --seqlen"):
        quantize(model, SCHEME, tmp_path / "run", str(calibration_text), SMALL, limits=Limits(memory=10_000_000))
    assert not (tmp_path / "run").exists()


def test_steps_in_parts_are_the_same_steps(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    runs = []
    for parts in (1, 3):
        settings = replace(SMALL, step_parts=parts, start="nearest")
        runs.append(quantize(model, SCHEME, tmp_path / str(parts), str(calibration_text), settings))
    same = [
        torch.equal(*(run.quantized(name).codes for run in runs))
        for name in runs[0].names()
        if runs[0].is_quantized(name)
    ]
    assert sum(same) >= len(same) - 1  # sums in another order may turn a sign
    losses = [[r.report["block"]["tuned"] for r in run.manifest.complete.values() if r.report] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_step_is_cut_into_the_fewest_parts_that_fit() -> None:
    block = BlockShape((MatrixShape(512, 512, "Q4_0", source="a"),), 512, 8, 512)
    settings = replace(SMALL, batch_size=8, seqlen=2048)
    needed = [block_bytes(block, replace(settings, step_parts=parts), 16, 2, True) for parts in range(1, 9)]
    assert needed == sorted(needed, reverse=True)
    assert _fitting([block], settings, 16, 2, needed[0])[0].step_parts == 1
    assert _fitting([block], settings, 16, 2, needed[2])[0].step_parts == 3
    with pytest.raises(UserError, match=r"--max-gpu-memory.*--seqlen"):
        _fitting([block], settings, 16, 2, needed[-1] - 1)


def test_hidden_states_in_bf16_take_half_the_memory_and_make_another_run(
    model: Path, tmp_path: Path, calibration_text: Path
) -> None:
    halved = replace(SMALL, hidden_dtype="bfloat16")
    needed, fewer = (estimated(model, settings) for settings in (SMALL, halved))
    assert fewer.host.hidden == needed.host.hidden / 2
    assert fewer.store(tmp_path).dtype == torch.bfloat16
    text, out = str(calibration_text), tmp_path / "run"
    run = quantize(model, SCHEME, out, text, halved)
    plain = quantize(model, SCHEME, tmp_path / "plain", text, SMALL)
    kinds = [found.manifest.settings["hidden_dtype"] for found in (run, plain)]
    assert kinds == ["bfloat16", "float32"]  # what "auto" meant
    with pytest.raises(UserError, match="its hidden_dtype is bfloat16, not float32"):
        quantize(model, SCHEME, out, text, SMALL, resume=True)
    names = [entry.name for entry in run.manifest.tensors if entry.format is not None]
    apart = [(run.quantized(n).codes != plain.quantized(n).codes).float().mean() for n in names]
    assert 0 < float(torch.stack(apart).mean()) < 0.2


def test_operations_of_the_whole_model_stage_are_those_that_torch_counts(
    model: Path, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, steps=0, seqlen=64, whole_model_steps=1)
    counter, step = FlopCounterMode(display=False), WholeModel.train_step

    def counted(*arguments: Any) -> float:
        with counter:
            return step(*arguments)

    monkeypatch.setattr(WholeModel, "train_step", counted)
    quantize(model, SCHEME, tmp_path / "run", str(calibration_text), settings, source_check="off")
    weights = ModelWeights.open(model)
    plan = make_plan(weights, SCHEME, float_fallback=True)
    shape = WholeModelShape.of(plan, block_shapes(plan, weights.decoder))
    none_held_out = replace(settings, held_out=1e-9)
    work, twice = (whole_model_work(shape, replace(none_held_out, whole_model_steps=n), 16) for n in (1, 2))
    of_a_step = twice.flops + twice.flops_f32 - work.flops - work.flops_f32
    assert counter.get_total_flops() == pytest.approx(of_a_step, rel=0.1)
    shared = whole_model_work(shape, replace(none_held_out, whole_model_steps=1), 8, sharers=2)
    assert shared.flops == work.flops / 2
    assert shared.stepped["Q4_0"] == pytest.approx(work.stepped["Q4_0"] / 2, abs=1)


def test_the_whole_model_stage_is_in_the_estimate(model: Path) -> None:
    settings = replace(SMALL, whole_model_steps=10)
    plain, whole = estimated(model), estimated(model, settings)
    assert whole.seconds(2) > plain.seconds(2)
    assert whole.seconds(0) > plain.seconds(0) == 0
    assert whole.host.whole_model > 0 == plain.host.whole_model
    assert "the whole-model stage" in whole.line(2)
    assert "the whole-model stage" not in plain.line(2)
    one, two = (
        whole_model_memory(WholeModelShape((BLOCK,), 3072 * 64, 3072, 64), settings, 16, 4, sharers)
        for sharers in (1, 2)
    )
    assert two.codes == one.codes / 2 == 2 * BLOCK.weights


def test_costs_are_kept_beside_the_manifest(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    said: list[str] = []
    run = quantize(model, SCHEME, tmp_path / "run", str(calibration_text), SMALL, progress=Progress(said.append))
    (session,) = json.loads((run.path / "costs.json").read_text())["sessions"]
    assert session["blocks"] == 2
    spent, expected = session["spent"], session["estimate"]
    assert spent["peak_gpu_bytes"] is None
    assert spent["cpu_seconds"] > 0
    assert expected["seconds"] > 0
    assert 0.5 < spent["peak_bytes"] / expected["peak_bytes"] < 2
    assert [line.split()[0] for line in said if line.startswith(("estimate", "took"))] == ["estimate:", "took"]
    quantize(model, SCHEME, run.path, str(calibration_text), SMALL, resume=True)  # is complete: costs nothing
    assert len(json.loads((run.path / "costs.json").read_text())["sessions"]) == 1
    assert RunDirectory.open(run.path).manifest.state == "complete"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_on_disk_holds_what_is_put_into_it(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(3, 5, 7).to(dtype)
    stored = Store(folder=tmp_path, dtype=dtype).empty((3, 5, 7)).copy_(values)
    assert stored.dtype == dtype
    assert torch.equal(stored, values)
    assert list(tmp_path.iterdir()) == []


def test_embeddings_are_given_back_once_everything_is_embedded(model: Path, tmp_path: Path) -> None:
    weights = ModelWeights.open(model)
    tokens = torch.randint(3, 3000, (4, 16))
    shell = open_shell(weights, tokens)
    hidden = shell.embed(tokens)
    job = SimpleNamespace(tokens=tokens, decoder=weights.decoder)
    release_lookups(job, shell)
    assert weight_of(weights.decoder.embedding).untyped_storage().nbytes() <= 8
    assert not torch.equal(shell.embed(tokens), hidden)
    for before, after in zip(
        shell.calls[(4, 16)][0].tensors(), shell.block_call(0, tokens, CPU).tensors(), strict=True
    ):
        assert torch.equal(before, after)
