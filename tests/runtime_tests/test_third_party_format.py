"""A format that nothing here knows: its package's entry points are all that `verify`, `inspect` and `evaluate` need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

from exporters.gguf.container.reader import GgufFile
from runtime_tests.verify import verify
from signround_edge.cli import main
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests import toy_format
from tests.support import make_run

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def toy_run(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_run(small_model, tmp_path_factory.mktemp("run") / "run", "gguf:q8_0")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(toy_format.installed(tmp_path / "site")))


@pytest.fixture
def device(tmp_path: Path) -> str:
    (tmp_path / "toy-device.toml").write_text(toy_format.DEVICE)
    return str(tmp_path / "toy-device.toml")


@pytest.fixture
def toy(package: None, toy_run: RunDirectory, tmp_path: Path) -> Path:
    command("export", toy_run.path, "--format", "toy", "-o", tmp_path / "model.toy")
    return tmp_path / "model.toy"


def command(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout


def verified(run: RunDirectory, toy: Path, text: Path, device: str, code: int = 0) -> dict[str, Any]:
    size = ("--n-ctx", 64, "--windows", 2, "--json")
    document: dict[str, Any] = json.loads(
        command("verify", run.path, toy, "--text", text, "--device", device, *size, code=code)
    )
    return document


def rewrite(toy: Path, tensor: str | None = None, **config: Any) -> None:
    """Write a .toy file again with one step more in one code of a tensor, or with other values in its config."""
    with safe_open(toy, framework="numpy") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        header = {**json.loads(stored.metadata()["config"]), **config}
    if tensor is not None:
        codes = arrays[f"{tensor}#codes"]
        codes[7, 5] += 1 if codes[7, 5] < 127 else -1
    save_file(arrays, toy, {"config": json.dumps(header)})


def test_a_sound_file_passes(toy: Path, toy_run: RunDirectory, text: Path, device: str) -> None:
    found = verified(toy_run, toy, text, device)
    assert found["status"] == "pass"
    (artifact,), (runtime,) = found["artifacts"], found["runtimes"]
    assert (artifact["format"], artifact["tensors_checked"]) == ("toy", len(toy_run.names()))
    assert (runtime["name"], runtime["device"], runtime["gate"]) == ("toy-runtime", "toy-device", "quantized")
    assert runtime["kld_mean"] < 1e-6
    assert "no control" in runtime["notes"][0]


def test_one_wrong_code_fails_and_names_the_tensor(toy: Path, toy_run: RunDirectory, text: Path, device: str) -> None:
    rewrite(toy, DOWN)
    found = verified(toy_run, toy, text, device, code=1)
    assert found["status"] == "fail"
    (artifact,) = found["artifacts"]
    assert artifact["reason"].startswith(
        f"tensor {DOWN} (toy-8x32) differs in 1 of 65536 values, first at row 7, column 5"
    )


def test_a_file_that_lacks_a_parameter_fails(toy: Path, toy_run: RunDirectory, text: Path, device: str) -> None:
    with safe_open(toy, framework="numpy") as stored:
        kept = {name: stored.get_tensor(name) for name in stored.keys() if DOWN not in name}  # noqa: SIM118
        header = stored.metadata()
    save_file(kept, toy, header)
    found = verified(toy_run, toy, text, device, code=1)
    assert DOWN in found["artifacts"][0]["reason"]


def test_another_graph_fails(toy: Path, toy_run: RunDirectory, text: Path, device: str) -> None:
    rewrite(toy, rope_parameters={"rope_type": "default", "rope_theta": 10.0})
    found = verified(toy_run, toy, text, device, code=1)
    assert found["weights_exact"]
    assert "the mean KL divergence from torch is" in found["runtimes"][0]["reason"]


def test_its_package_may_expect_more_than_weights(
    toy_run: RunDirectory, text: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = toy_format.installed(tmp_path / "site", expectations={"toy": "expect_floats"})
    monkeypatch.syspath_prepend(str(site))
    toy = tmp_path / "model.toy"
    command("export", toy_run.path, "--format", "toy", "-o", toy)
    (runtime,) = verified(toy_run, toy, text, device)["runtimes"]
    assert (runtime["gate"], runtime["notes"]) == ("exact", [])
    rewrite(toy, initializer_range=0.5)  # changes no logit
    (runtime,) = verified(toy_run, toy, text, device, code=1)["runtimes"]
    assert runtime["reason"] == "its config is not the run's"


def test_no_package_says_what_gguf_files_should_hold(
    run: RunDirectory, gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = toy_format.installed(tmp_path / "site", expectations={"gguf": "expect_nothing"})
    monkeypatch.syspath_prepend(str(site))
    with gguf.open("r+b") as file:
        file.seek(GgufFile.open(gguf).tensors["blk.1.ffn_down.weight"].offset)
        scale = file.read(2)
        file.seek(-2, 1)
        file.write(bytes([scale[0] ^ 1, scale[1]]))
    report = verify(run, [gguf], text, n_ctx=64, max_windows=1, log=str)
    assert "blk.1.ffn_down.weight" in str(report.artifacts[0].reason)


def test_inspect_and_evaluate_know_it(
    toy: Path, toy_run: RunDirectory, text: Path, small_model: Path, tmp_path: Path
) -> None:
    listed = json.loads(command("inspect", toy, "--json"))
    assert listed["format"] == "toy"
    (down,) = [tensor for tensor in listed["tensors"] if tensor["name"] == DOWN]
    assert (down["type"], down["shape"], down["bytes"]) == ("toy-8x32", [256, 256], 256 * 256 + 256 * 8 * 2)
    size = ("--text", text, "--n-ctx", 64, "--windows", 2, "--reference", small_model, "--json")
    scores, of_run = (json.loads(command("evaluate", path, *size)) for path in (toy, toy_run.path))
    assert scores["ppl"] == pytest.approx(of_run["ppl"], rel=1e-6)
    assert scores["kld_mean"] == pytest.approx(of_run["kld_mean"], rel=1e-3)


def test_a_device_without_its_runtime_is_no_pass_and_says_so(toy: Path, toy_run: RunDirectory, text: Path) -> None:
    found = verified(toy_run, toy, text, "cpu-x86", code=1)
    assert found["status"] == "skipped"
    assert found["artifacts"][0]["reason"] == "no runtime could read it: no --device names one for toy"


def test_what_no_exporter_knows_is_bad_input(package: None, toy_run: RunDirectory, text: Path, tmp_path: Path) -> None:
    other = shutil.copy(text, tmp_path / "notes.txt")
    done = CliRunner().invoke(main, ["verify", str(toy_run.path), str(other), "--text", str(text)])
    assert done.exit_code == 2
    assert "TOY" in done.stderr
