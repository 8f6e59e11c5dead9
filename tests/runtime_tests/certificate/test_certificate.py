"""Certificates: complete, true, self-contained, and worthless once an input has changed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.certificate import charts
from runtime_tests.certificate.document import certificate, digest_of
from runtime_tests.certificate.page import page
from runtime_tests.certificate.recheck import recheck
from runtime_tests.certificate.write import write_certificate
from runtime_tests.report.report import PerToken, VerifyReport
from runtime_tests.verify import verify
from signround_edge.errors import CheckFailed, UserError
from signround_edge.files import sha256_of
from signround_edge.run_directory import RunDirectory
from tests.support import make_run

WINDOWS, N_CTX = 3, 64


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path, gguf_file: Path, onnx_folder: Path, text: Path
) -> Path:
    """A folder with everything that a certificate speaks of, and the certificate itself."""
    folder = tmp_path_factory.mktemp("place")
    make_run(small_model, folder / "run", "gguf:q4_0,onnx:w4g32")
    shutil.copy(gguf_file, folder / "model.gguf")
    shutil.copytree(onnx_folder, folder / "onnx")
    shutil.copy(text, folder / "text.txt")
    shutil.copytree(small_model, folder / "original")
    write_certificate(verified(folder), folder / "report")
    return folder


def verified(folder: Path) -> VerifyReport:
    artifacts = [folder / "model.gguf", folder / "onnx"]
    run = RunDirectory.open(folder / "run")
    return verify(
        run, artifacts, folder / "text.txt", reference=folder / "original", n_ctx=N_CTX, max_windows=WINDOWS, log=str
    )


@pytest.fixture(scope="module")
def document(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "report" / "certificate.json").read_text())
    return found


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """All of it somewhere else; the first place is out of reach."""
    shutil.copytree(place, tmp_path / "copy")
    path = tmp_path / "copy" / "report" / "certificate.json"
    data = json.loads(path.read_text())
    for entry in data["inputs"]:
        entry["base"] = "/nowhere"
    path.write_text(json.dumps({**data, "digest": digest_of(data)}))
    return tmp_path / "copy"


def test_it_holds_every_figure_and_every_hash(place: Path, document: dict[str, Any]) -> None:
    assert document["verdict"] == document["status"] == "pass"
    assert [entry["role"] for entry in document["inputs"]] == ["run", "artifact", "artifact", "text", "reference"]
    for entry in document["inputs"]:
        assert entry["files"]
        for name, recorded in entry["files"].items():
            file = place / "report" / entry["relative_base"] / name
            assert (sha256_of(file), file.stat().st_size) == (recorded["sha256"], recorded["bytes"])
    assert document["scoring"]["n_ctx"] == N_CTX
    assert {"torch", "onnxruntime", "xllamacpp", "signround_edge"} <= set(document["versions"])
    gguf, onnx = document["runtimes"]
    assert {g["name"] for g in gguf["gates"]} == {"kld_mean", "ln_ppl_difference", "control_kld_mean", "layer_error"}
    assert {g["name"] for g in onnx["gates"]} == {"kld_mean", "layer_error"}
    assert all(gate["passed"] for runtime in document["runtimes"] for gate in runtime["gates"])


def test_its_figures_follow_from_its_tokens(document: dict[str, Any]) -> None:
    for runtime in document["runtimes"]:
        tokens = runtime["per_token"]
        assert len(tokens["nll"]) == len(tokens["kld"]) == runtime["tokens"] == WINDOWS * (N_CTX // 2 - 1)
        assert math.exp(np.mean(tokens["nll"])) == pytest.approx(runtime["ppl"], rel=1e-5)
        assert math.exp(np.mean(tokens["nll_reference"])) == pytest.approx(runtime["ppl_reference"], rel=1e-5)
        assert np.mean(tokens["kld"]) == pytest.approx(runtime["kld_mean"], rel=1e-4)


def test_the_page_is_self_contained_and_shows_what_the_document_says(place: Path, document: dict[str, Any]) -> None:
    html = (place / "report" / "certificate.html").read_text()
    assert html == page(document)
    assert not re.search(r"(?:src|href)=|url\(|@import|<script|https?:", html)
    assert "<strong>PASS</strong>" in html
    assert html.count("<svg") == 6  # three pictures for each of two runtimes
    for runtime in document["runtimes"]:
        assert f"{runtime['ppl']:.4f}" in html
    assert document["digest"] in html


def test_names_are_escaped(document: dict[str, Any]) -> None:
    evil = {**document, "artifacts": [{**document["artifacts"][0], "path": "<b>&.gguf"}]}
    assert "<b>&.gguf" not in page(evil)
    assert "&lt;b&gt;&amp;.gguf" in page(evil)


def test_unchanged_inputs_still_pass_wherever_they_lie(place: Path, copy: Path) -> None:
    assert "verdict pass" in recheck(place / "report" / "certificate.json")
    assert "input files are unchanged" in recheck(copy / "report" / "certificate.json")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def add(path: Path) -> None:
    path.write_text("added")


def raise_a_figure(path: Path) -> None:
    path.write_text(path.read_text().replace('"tensors_checked": ', '"tensors_checked": 1', 1))


CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a bit of the GGUF file": ("model.gguf", flip, "the artifact has changed"),
    "a bit of the ONNX weights": ("onnx/model.onnx.data", flip, "the artifact has changed"),
    "a missing ONNX file": ("onnx/genai_config.json", Path.unlink, "genai_config.json is missing"),
    "a file added to the ONNX folder": ("onnx/adapter.bin", add, "adapter.bin was added"),
    "a line of the text": ("text.txt", append, "the text has changed"),
    "a block of the run": ("run/blocks/0001.safetensors", flip, "the run has changed"),
    "the run's tokenizer": ("run/config/tokenizer.json", append, "the run has changed"),
    "the original model": ("original/model.safetensors", flip, "the reference has changed"),
    "a figure of the certificate": ("report/certificate.json", raise_a_figure, "was changed after"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_named(what: str, copy: Path) -> None:
    name, change, sentence = CHANGES[what]
    change(copy / name)
    with pytest.raises(CheckFailed, match=re.escape(Path(name).name)) as caught:
        recheck(copy / "report" / "certificate.json")
    assert sentence in str(caught.value)


def test_a_failed_verification_cannot_be_rechecked_into_a_pass(copy: Path) -> None:
    flip(copy / "model.gguf")
    report = verified(copy)
    assert report.status == "fail"
    write_certificate(report, copy / "report")
    assert "<strong>FAIL</strong>" in (copy / "report" / "certificate.html").read_text()
    with pytest.raises(CheckFailed, match="its verdict is fail"):
        recheck(copy / "report" / "certificate.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "other"}'])
def test_what_is_no_certificate_is_bad_input(content: str, tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(UserError, match=r"certificate\.json"):
        recheck(tmp_path / "certificate.json")
    with pytest.raises(UserError, match="does not exist"):
        recheck(tmp_path / "absent.json")


def test_figures_that_are_no_numbers_can_be_certified(copy: Path, tmp_path: Path) -> None:
    """A file whose logits are NaN still gets a certificate, of a failure."""
    report = verified(copy)
    for runtime in report.runtimes:
        assert runtime.per_token is not None
        nothing = np.full_like(runtime.per_token.nll, np.nan)
        runtime.per_token = PerToken(nothing, runtime.per_token.nll_reference, nothing)
        assert runtime.parity is not None
        runtime.parity = replace(runtime.parity, ppl=math.nan, kld_mean=math.inf)
    assert report.evidence is not None
    html = page(certificate(report, report.evidence, tmp_path))
    assert "is a number." in html


@pytest.mark.parametrize("count", [1, 2, 7, 5000])
def test_pictures_of_any_number_of_tokens(count: int) -> None:
    values = np.random.default_rng(0).standard_normal(count).tolist()
    for svg in (
        charts.loss_differences(values, [0.0] * count, 3),
        charts.divergence_histogram([abs(v) for v in values], 0.02),
        charts.divergence_histogram([0.0] * count, None),
        charts.layer_errors(
            [f"layer {i}" for i in range(min(count, 80))], [None] + [1e-7] * (min(count, 80) - 1), 5e-5
        ),
    ):
        assert svg.startswith("<svg")
        assert "nan" not in svg
        assert len(svg) < 60_000


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_fits_a_phone_and_a_desktop(width: int, place: Path, tmp_path: Path) -> None:
    html = place / "report" / "certificate.html"
    frame = f'<iframe id="f" src="file://{html}" style="border:0;width:{width}px;height:900px"></iframe>'
    script = (
        'onload=()=>{const d=document.getElementById("f").contentDocument;'
        'document.title=d.documentElement.scrollWidth+" "+d.querySelectorAll("svg").length}'
    )
    (tmp_path / "frame.html").write_text(f"<body>{frame}<script>{script}</script></body>")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
    ]
    command = [
        str(CHROMIUM),
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        str(tmp_path / "frame.html"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    title = re.search("<title>(\\d+) (\\d+)</title>", done.stdout)
    assert title is not None, done.stdout[-500:]
    assert int(title[1]) <= width
    assert int(title[2]) == 6
