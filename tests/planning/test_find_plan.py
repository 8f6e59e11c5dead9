"""`plan`: a budget is kept to the byte, `quantize --plan` does what was planned, and bad input is told what will do."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

from signround_edge import api
from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.planning.found_plan import FoundPlan
from signround_edge.planning.picture import picture
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.planned_types import PlannedTypes
from signround_edge.tuning.settings import TuningSettings
from tests.support import SIZES as SMALL
from tests.support import TOKENS, save_random_model

SETTINGS = TuningSettings(steps=0, samples=2, seqlen=32)
TYPES = {"gguf": "Q2_K,Q3_K,Q4_K,Q6_K", "onnx": "w2g32-asym,w4g32-asym,w8g32-asym"}
SIZES = {"gguf": 2_700_000, "onnx": 4_000_000}
V_PROJ = "model.layers.1.self_attn.v_proj.weight"


@dataclass(frozen=True)
class Made:
    """A plan of tiny-llama, as file and as run."""

    found: FoundPlan
    path: Path
    run: RunDirectory


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def plan(model: Path, cache: Path, **options: Any) -> FoundPlan:
    kind = options.get("format", "gguf")
    given = {"samples": 2, "seqlen": 32, "types": TYPES.get(kind), "cache": cache, "context": 512, **options}
    return api.plan(model, **given)


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def made(
    request: pytest.FixtureRequest, tiny_llama: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp("planned")
    found = plan(tiny_llama, cache, format=request.param, target_size=SIZES[request.param])
    found.planned.save(folder / "plan.json")
    run = api.quantize(
        tiny_llama, None, folder / "run", plan=folder / "plan.json", settings=SETTINGS,
        source_check="auto" if request.param == "onnx" else "off",
    )  # fmt: skip
    return Made(found, folder / "plan.json", run)


def test_the_file_has_the_planned_bytes(made: Made, tmp_path: Path) -> None:
    planned = made.found.planned
    path = api.export(made.run, planned.target, tmp_path / "out").path
    notes = ("README.md", "signround_edge.json")  # what no runtime reads
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if file.name not in notes) == planned.file_bytes
    assert planned.file_bytes <= planned.budget_bytes < planned.file_bytes + 5_000


def test_the_run_has_the_planned_types_and_says_so(made: Made) -> None:
    quantized = {t.name: t.format for t in made.run.manifest.tensors if t.format is not None}
    assert quantized == made.found.planned.types
    assert len(set(quantized.values())) > 1
    kept = made.run.manifest.settings["plan"]
    assert kept["sha256"] == PlannedTypes.read(made.path).sha256
    assert kept["predicted_kl"] == made.found.planned.predicted_kl
    assert made.run.manifest.scheme == f"{made.found.planned.target}:plan"


def test_the_prediction_is_the_sum_of_what_the_types_cost(made: Made) -> None:
    found = made.found
    assert found.planned.predicted_kl == pytest.approx(sum(option.cost for option in found.chosen))
    for group in found.groups:  # fewer bits cost more
        costs = [o.cost for o in sorted(group.options, key=lambda o: o.nbytes)]
        assert costs == sorted(costs, reverse=True)
    less, more = (found.neighbours[step] for step in sorted(found.neighbours))
    assert less > found.planned.predicted_kl > more


def test_a_plan_beats_every_scheme_that_is_no_larger(made: Made) -> None:
    smaller = [kl for size, kl in made.found.presets.values() if size <= made.found.planned.file_bytes]
    assert smaller
    assert made.found.planned.predicted_kl < min(smaller)
    assert made.found.planned.model in picture(made.found)


def test_the_second_plan_measures_nothing(made: Made, tiny_llama: Path, cache: Path) -> None:
    lines: list[str] = []
    target = made.found.planned.target
    again = plan(tiny_llama, cache, format=target, target_size=SIZES[target] + 100_000, progress=lines.append)
    assert not lines
    assert again.planned.predicted_kl < made.found.planned.predicted_kl


def test_one_byte_less_is_another_plan(made: Made, tiny_llama: Path, cache: Path) -> None:
    target, size = made.found.planned.target, made.found.planned.file_bytes
    less = plan(tiny_llama, cache, format=target, target_size=size - 1)
    # Which plan is next depends on costs that differ in their last bits between processors.
    assert 0.99 * size < less.planned.file_bytes < size
    assert less.planned.predicted_kl > (1 - 1e-5) * made.found.planned.predicted_kl  # the solver stops within 1e-6


def test_the_first_plan_says_what_it_measures(tiny_llama: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    plan(tiny_llama, tmp_path, target_size="4M", types="Q4_0,Q8_0", samples=1, seqlen=8, progress=lines.append)
    assert "measuring what each tensor matters, on 8 tokens" in lines[0]


def test_a_finished_run_corrects_the_factor(
    tiny_llama: Path, cache: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    run = api.quantize(tiny_llama, "gguf:q2_k", tmp_path / "run", settings=SETTINGS, source_check="off")
    measured = api.evaluate(run.path, evaluation_text, reference=tiny_llama, windows=16).kld_mean
    found = plan(tiny_llama, cache, target_size="2.7M", from_run=run, types="Q2_K,Q3_K,Q4_K,Q6_K")
    presets = {name: kl for name, (_, kl) in found.presets.items()}
    assert found.planned.factor != 1
    assert presets["gguf:q2_k"] == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_size": "1M"},
            r"1,000,000 bytes for the file are too few; .* has 1,6.*; give --target-size 16\d+, or",
        ),
        ({"target_bpw": 1.5}, r"--target-bpw 1.5: .* are too few.*; give --target-bpw 2\.\d+, or other types"),
        ({"memory": "10M"}, r"--memory 10M: the context alone takes 1\d\.\d MB .* give a smaller --context"),
        ({}, "give one of --target-size, --target-bpw, --device and --memory"),
        ({"target_size": "big"}, "--target-size big is not a size; give for example 500M or 4G"),
        ({"target_size": "3M", "pin": "attn_v"}, "--pin 'attn_v' is not of the form PATTERN=TYPE"),
        ({"target_size": "3M", "pin": "atn_v=Q8_0"}, "--pin atn_v=Q8_0: no matrix .*; near it are attn_v"),
        ({"target_size": "3M", "pin": "attn_v=w4g32-asym"}, "GGUF has no type w4g32-asym; it has Q4_0"),
        ({"target_size": "3M", "pin": "attn_v=Q2_K", "at_least": "attn_v=Q4_K"}, "no type is both"),
        ({"target_size": "3M", "format": "pdf"}, "--format pdf cannot be planned; known are gguf and onnx"),
    ],
)
def test_bad_input_gets_one_sentence(options: dict[str, Any], message: str, tiny_llama: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan(tiny_llama, cache, **options)


def test_too_small_a_budget_is_refused_before_anything_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(UserError, match="too few"):
        plan(tiny_llama, tmp_path, target_size="1M", progress=lines.append)
    assert not lines
    assert not list(tmp_path.rglob("sensitivity.safetensors"))


def test_the_least_budget_that_is_named_is_enough(tiny_llama: Path, cache: Path) -> None:
    for budget in ({"target_size": "1M"}, {"target_bpw": 1.5}, {"memory": "11.5M", "context": 512}):
        with pytest.raises(UserError, match="too few") as refused:
            plan(tiny_llama, cache, **budget)
        option, enough = re.findall(r"give --([\w-]+) ([\d.]+M?), or", str(refused.value))[0]
        given: dict[str, Any] = {option.replace("-", "_"): float(enough) if option == "target-bpw" else enough}
        assert plan(tiny_llama, cache, **(budget | given)).planned.file_bytes > 1_000_000


def test_a_mixture_of_experts_keeps_its_bytes_too(tiny_llama: Path, tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        **{**SMALL, "vocab_size": 3072}, **TOKENS, head_dim=16, moe_intermediate_size=64, num_experts=4,
        num_experts_per_tok=2, decoder_sparse_step=1, norm_topk_prob=True,
    )  # fmt: skip
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    found = plan(model, tmp_path / "cache", target_size=300_000, types="Q2_0,Q4_0,Q5_0,Q8_0", samples=1, seqlen=16)
    found.planned.save(tmp_path / "plan.json")
    run = api.quantize(
        model, None, tmp_path / "run", plan=tmp_path / "plan.json", settings=SETTINGS, source_check="off"
    )
    written = api.export(run, "gguf", tmp_path / "model.gguf").path.stat().st_size
    assert written == found.planned.file_bytes <= 300_000
    experts = {kind for name, kind in found.planned.types.items() if "layers.0.mlp.experts" in name and "up" in name}
    assert len(experts) == 1
    assert len(set(found.planned.types.values())) > 1


def test_wishes_are_kept(tiny_llama: Path, cache: Path) -> None:
    found = plan(tiny_llama, cache, target_size="2.7M", pin="attn_v=Q5_K", at_least=["ffn_down=Q4_K"])
    types = found.planned.types
    assert types[V_PROJ] == "Q5_K"
    downs = [get_grid(kind).bits_per_weight for name, kind in types.items() if "down_proj" in name]
    assert min(downs) >= 4.5


def test_memory_is_what_is_left_of_a_device_for_file(tiny_llama: Path, cache: Path) -> None:
    found = plan(tiny_llama, cache, memory="18M", context=1024)
    # Keys and values of five layers, two heads of 64, in f16.
    assert found.needs.cache == 2 * 5 * 2 * 64 * 2 * 1024
    assert found.planned.file_bytes <= 18_000_000 - found.needs.total


def test_the_plan_of_another_model_is_refused(made: Made, tiny_llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match=r"--plan is of another model \(tiny-llama: config.json differs\)"):
        api.quantize(other, None, tmp_path / "run", plan=made.path, settings=SETTINGS)


def test_a_plan_and_a_scheme_are_not_both_given(made: Made, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give either --scheme"):
        api.quantize(tiny_llama, "gguf:q4_0", tmp_path / "run", plan=made.path)
    with pytest.raises(UserError, match="--plan has a type for every matrix, so --tensor-type has no say"):
        api.quantize(tiny_llama, None, tmp_path / "run", plan=made.path, tensor_type="ffn=Q8_0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "no plan of schema_version 1"),
        ('{"schema_version": 1}', "does not hold what a plan"),
    ],
)
def test_a_damaged_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=message):
        PlannedTypes.read(tmp_path / "plan.json")


def test_a_budget_for_more_than_all_bits_gives_the_best_types_and_says_so(tiny_llama: Path, cache: Path) -> None:
    lines: list[str] = []
    found = plan(tiny_llama, cache, target_size="90M", progress=lines.append)
    assert found.planned.predicted_kl == pytest.approx(min(kl for _, kl in found.frontier))
    assert any("90,000,000 bytes" in line and "none has more than" in line for line in lines)


def edited(made: Made, path: Path, **change: Any) -> Path:
    document = json.loads(made.path.read_text())
    types = {**document["types"], **change}
    document["types"] = {name: kind for name, kind in types.items() if kind is not None}
    path.write_text(json.dumps(document))
    return path


def test_a_plan_without_a_matrix_is_refused(made: Made, tiny_llama: Path, tmp_path: Path) -> None:
    path = edited(made, tmp_path / "plan.json", **{V_PROJ: None})
    with pytest.raises(UserError, match=f"--plan has no type for {V_PROJ}"):
        api.quantize(tiny_llama, None, tmp_path / "run", plan=path, settings=SETTINGS)


def test_an_edited_plan_promises_nothing(made: Made, tmp_path: Path) -> None:
    kind = "Q6_K" if made.found.planned.target == "gguf" else "w8g128-asym"
    plan = PlannedTypes.read(edited(made, tmp_path / "plan.json", **{V_PROJ: kind}))
    assert plan.types[V_PROJ] == kind
    assert set(plan.summary()) == {"sha256"}
    assert "predicted_kl" in PlannedTypes.read(made.path).summary()


def test_a_type_of_the_other_format_is_refused(made: Made, tmp_path: Path) -> None:
    kind = "w4g64" if made.found.planned.target == "gguf" else "Q4_K"
    with pytest.raises(UserError, match=f"{V_PROJ} has the type {kind}, which .* cannot store"):
        PlannedTypes.read(edited(made, tmp_path / "plan.json", **{V_PROJ: kind}))
    with pytest.raises(UserError, match=f"{V_PROJ}: unknown block format"):
        PlannedTypes.read(edited(made, tmp_path / "other.json", **{V_PROJ: "Q9_Z"}))


@pytest.mark.parametrize("name", ["model.gguf", "notes.json", "new.json"])
def test_only_an_earlier_plan_is_replaced(name: str, made: Made, tmp_path: Path) -> None:
    for kept in ("model.gguf", "notes.json", "new.svg"):
        (tmp_path / kept).write_text("mine")
    with pytest.raises(UserError, match=r"give a name that ends in \.json|is there"):
        PlannedTypes.check_out(tmp_path / name)
    PlannedTypes.check_out(made.path)
