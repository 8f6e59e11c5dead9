"""Blocks compiled by torch.compile: one compilation for all of them, and steps that tune as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import SIZES, save_random_model
from test_quantize import CONFIGS
from test_source_check import CONFIGS as SHARING_CONFIGS
from torch._dynamo import lookup_backend
from transformers import MixtralConfig

from signround_edge import api
from signround_edge.errors import UserError
from signround_edge.tuning.block import units
from signround_edge.tuning.calibration import block_call
from signround_edge.tuning.settings import TuningSettings

SETTINGS = TuningSettings(steps=6, samples=8, seqlen=16, batch_size=4, compute_dtype="float32", lr=0.05)


def tuned(model: Path, out: Path, **changes: Any) -> list[float]:
    """The kept held-out loss of every block."""
    settings = TuningSettings(**{**vars(SETTINGS), **changes})
    run = api.quantize(model, "gguf:q4_0", out, settings=settings, source_check="off", device="cpu")
    return [part.report["block"]["tuned"] for part in run.manifest.complete.values() if "block" in part.report]


def counted(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[Any]:
    """Have blocks compiled by a backend; the graphs that it is given."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def keeping(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(block_call.run_plainly, dynamic=False, backend=keeping)
    monkeypatch.setattr(units, "compiled_runner", lambda: compiled)
    return graphs


def check(model: Path, out: Path, given: list[Any], graphs: int) -> None:
    plain, compiled = (tuned(model, out / str(on), compile_blocks=on) for on in (False, True))
    assert len(plain) > 1
    assert compiled == pytest.approx(plain, rel=0.1)
    assert len(given) == graphs


def test_one_graph_is_for_all_blocks(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tiny_llama, tmp_path, counted(monkeypatch, "aot_eager"), 1)


def test_without_a_compiler_there_is_one_sentence(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    # Not by monkeypatch, which could not put a setting back.
    none = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")})
    with (
        none,
        pytest.raises(UserError, match=r"cannot make kernels here \(.*C\+\+.*\); install a C\+\+ compiler, or leave"),
    ):
        tuned(tiny_llama, tmp_path / "run", compile_blocks=True)


def test_without_blocks_there_is_nothing_to_compile() -> None:
    with pytest.raises(UserError, match="--compile-blocks is for blocks, and --granularity layer tunes none"):
        TuningSettings(compile_blocks=True, granularity="layer")


@pytest.mark.full
def test_so_are_kernels(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tiny_llama, tmp_path, counted(monkeypatch, "inductor"), 1)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "graphs"), [("gemma3", 1), ("gemma4", 3), ("mixtral", 0), ("gpt2", 1), ("falcon", 1)])
def test_blocks_of_other_kinds_are_compiled_too(
    kind: str, graphs: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtral = MixtralConfig(**{**SIZES, "vocab_size": 3072}, num_local_experts=4, num_experts_per_tok=2)
    # Gemma 4's blocks are of three kinds here; experts are left out, for their numbers of tokens change.
    config = {"mixtral": mixtral, **CONFIGS, **SHARING_CONFIGS}[kind]
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    check(model, tmp_path, counted(monkeypatch, "aot_eager"), graphs)
