"""Device profiles, what they need here, and the listing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from devices import get_device, load_devices, read_profile
from runtime_tests.device_status import list_devices, status_of
from runtime_tests.setup.arm_cpuinfo import cpuinfo
from runtime_tests.setup.cache import VARIABLE, cache_folder, fill
from runtime_tests.setup.devices import requirements, set_up, way_out
from runtime_tests.setup.npm import NpmPackage
from runtime_tests.setup.requirement import SystemProgram, run_tool
from signround_edge.cli import main
from signround_edge.errors import UserError

SHIPPED = {
    "cpu-x86",
    "cpu-genai",
    "cpu-openvino",
    "arm64-armv8.0",
    "arm64-armv8.6",
    "raspberry-pi-5",
    "pixel-8",
    "galaxy-s23",
    "browser-wasm",
    "browser-webgpu",
    "node-wasm",
    "node-native",
    "phone-browser",
}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_shipped_profiles() -> None:
    profiles = load_devices()
    assert set(profiles) == SHIPPED
    for profile in profiles.values():
        assert profile.description
        assert profile.runtimes
        assert profile.versions or profile.name == "cpu-x86"


def test_an_address_and_a_file_of_ones_own(tmp_path: Path) -> None:
    assert get_device("raspberry-pi-5=me@10.0.0.7:2222").address == "me@10.0.0.7:2222"
    shipped = Path(load_devices.__globals__["__file__"]).with_name("raspberry-pi-5.toml").read_text()
    (tmp_path / "attic.toml").write_text(shipped.replace('"raspberry-pi-5"', '"attic"'))
    assert get_device(str(tmp_path / "attic.toml")).name == "attic"
    assert get_device(f"{tmp_path / 'attic.toml'}=me@attic").address == "me@attic"
    with pytest.raises(UserError, match="does not exist"):
        get_device(str(tmp_path / "cellar.toml"))


@pytest.mark.parametrize(("line", "what"), [('transport = "pigeon"', "pigeon"), ('logits = "some"', "some")])
def test_a_profile_with_an_unknown_word_is_refused(line: str, what: str, tmp_path: Path) -> None:
    shipped = Path(load_devices.__globals__["__file__"]).with_name("phone-browser.toml").read_text()
    lines = [kept for kept in shipped.splitlines() if not kept.startswith(line.split(" ")[0])]
    (tmp_path / "odd.toml").write_text("\n".join([line, *lines]))
    with pytest.raises(UserError, match=f"odd.toml is not a device profile.*{what}"):
        read_profile(tmp_path / "odd.toml")


def test_every_device_that_is_not_ready_names_a_reason(empty_cache: Path) -> None:
    """Nothing is in the cache: what needs it says so, and how to get it."""
    by_name = {status.profile.name: status for status in list_devices()}
    for name in ("node-wasm", "arm64-armv8.0", "phone-browser", "browser-wasm", "browser-webgpu"):
        status = by_name[name]
        assert not status.ready
        assert status.why_not
        assert status.command is not None
        assert status.command.endswith(f"signround-edge devices --setup {name}")
    assert not empty_cache.exists()


def test_the_command_lists_devices_for_people_and_for_scripts(empty_cache: Path) -> None:
    listed = CliRunner().invoke(main, ["devices"], catch_exceptions=False)
    assert listed.exit_code == 0
    assert "make it ready: " in listed.stdout
    rows = json.loads(CliRunner().invoke(main, ["devices", "--json"]).stdout)
    assert {row["name"] for row in rows} == SHIPPED
    assert all({"description", "transport", "ready", "reason", "command", "runtimes"} <= set(row) for row in rows)
    unknown = CliRunner().invoke(main, ["devices", "--setup", "toaster"])
    assert unknown.exit_code == 2


def test_what_a_person_must_install_first_stands_before_the_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime_tests.setup import devices as module

    absent = SystemProgram(("no-such-browser",), "chromium")
    monkeypatch.setattr("runtime_tests.setup.requirement._may_apt", lambda: False)
    monkeypatch.setitem(module._TRANSPORTS, "chromium", (absent,))
    profile = replace(get_device("browser-wasm"), runtimes=())
    assert way_out(profile) == ("sudo apt-get install -y chromium && signround-edge devices --setup browser-wasm")
    with pytest.raises(UserError, match=r"no-such-browser is not installed; run `sudo apt-get install -y chromium`"):
        set_up(profile, str)


def test_a_device_that_is_ready_needs_nothing() -> None:
    profile = get_device("cpu-x86")
    assert requirements(profile) == []
    assert way_out(profile) is None
    assert status_of(profile).command is None


def test_an_interrupted_download_leaves_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "entry", broken)
    assert list(tmp_path.iterdir()) == []
    assert fill(tmp_path / "entry", lambda folder: None) == tmp_path / "entry"
    assert list(tmp_path.iterdir()) == [tmp_path / "entry"]


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "signround-edge"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other"


def test_a_failing_installer_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"sh failed \(no such thing\); check the network"):
        run_tool(["sh", "-c", "echo no such thing >&2; exit 3"], "sh")
    with pytest.raises(UserError, match="cannot be run"):
        run_tool(["/no/such/program"], "it")


def test_an_emulated_core_has_the_proc_file_of_an_arm_core() -> None:
    text = cpuinfo("cortex-a53", cores=2)
    assert text.count("processor\t: ") == 2
    assert "CPU part\t: 0xd03" in text
    assert "i8mm" not in text
    assert "i8mm" in cpuinfo("max", cores=1)


@pytest.mark.full
def test_an_npm_package_is_installed_from_the_registry(empty_cache: Path) -> None:
    package = NpmPackage("guid-typescript", "1.0.9")  # a small dependency of onnxruntime-web
    if SystemProgram(("npm",), "npm").missing():
        pytest.skip("npm is not installed (apt-get install npm)")
    assert package.missing()
    package.install(str)
    assert package.missing() is None
    assert json.loads((package.path / "package.json").read_text())["version"] == "1.0.9"
