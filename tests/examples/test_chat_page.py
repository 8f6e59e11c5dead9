"""examples/chat: the page in headless Chromium at phone size answers as Python does with the same files."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, Lfm2MoeConfig, PretrainedConfig, Qwen3_5TextConfig

from examples.chat.serve import JINJA, TOKENIZERS, Server, Site
from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from exporters.onnx import OnnxExporter
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.setup.cache import VARIABLE
from runtime_tests.setup.npm import ONNXRUNTIME_WEB, WLLAMA
from runtime_tests.worker.onnxruntime_engine import OnnxEngine
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.examples.phone import HEIGHT, WIDTH, Phone, phone
from tests.support import make_run, save_random_model

ROOT = Path(__file__).parent.parent.parent
SERVE = ROOT / "examples" / "chat" / "serve.py"
TOKENS = 24
PROMPT = "The state of the union"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}They ask: {{ message.content }} "
    "{% else %}We answer:{{ message.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}We answer:{% endif %}"
)
SMALL = {
    "vocab_size": 3072,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CONVOLUTIONS = Lfm2MoeConfig(
    **SMALL, layer_types=["conv", "full_attention"], conv_L_cache=3, num_experts=4, num_dense_layers=1,
    num_experts_per_tok=2, moe_intermediate_size=64,
)  # fmt: skip
LINEAR_ATTENTION = Qwen3_5TextConfig(
    **SMALL, head_dim=32, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
READY = "!document.getElementById('text').disabled || !document.getElementById('error').hidden"
ANSWERED = "!document.body.classList.contains('answering')"
Logits = Callable[[np.ndarray], np.ndarray]


# ---- models, servers, browsers


@pytest.fixture(scope="session")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The trained tiny model, one run for both formats."""
    return make_run(tiny_llama, tmp_path_factory.mktemp("chat-run") / "run", "gguf:q4_0,onnx:w4g32")


@pytest.fixture(scope="session")
def onnx_folder(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data in several files, and no chat template."""
    return export_onnx(run, tmp_path_factory.mktemp("onnx") / "model-onnx")


@pytest.fixture(scope="session")
def gguf_file(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_gguf(run, tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(scope="session")
def chat_run(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same weights with a chat template."""
    folder = shutil.copytree(run.path, tmp_path_factory.mktemp("chat-run") / "run")
    (folder / "config" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return RunDirectory.open(folder)


def export_onnx(run: RunDirectory, out: Path) -> Path:
    return OnnxExporter().export(run, out, ExportOptions(log=str, split_max_bytes=1_000_000))


def export_gguf(run: RunDirectory, out: Path) -> Path:
    return GgufExporter().export(run, out, ExportOptions(log=str))


@contextmanager
def served(artifact: Path) -> Iterator[str]:
    """The address at which serve.py serves an artifact; a visible skip where npm cannot install."""
    try:
        for package in (ONNXRUNTIME_WEB, WLLAMA, TOKENIZERS, JINJA):
            if package.missing():
                package.install(lambda _line: None)
    except UserError as error:
        pytest.skip(f"npm packages of the chat page are missing and could not be installed: {error}")
    command = [sys.executable, str(SERVE), str(artifact), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://localhost:\d+", line)
        assert address, line
        yield address[0]
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Phone]:
    with phone() as opened:
        yield opened


def ask(browser: Phone, text: str, seconds: float = 180) -> str:
    """Type a message, send it, and wait for the whole answer."""
    browser.wait(READY, seconds)
    browser.type("Message", text)
    browser.tap("Send")
    browser.wait(ANSWERED, seconds)
    return last_answer(browser)


def last_answer(browser: Phone) -> str:
    answer: str = browser.evaluate("[...document.querySelectorAll('.answer span')].at(-1).textContent")
    return answer


def figures(browser: Phone) -> str:
    text: str = browser.evaluate("[...document.querySelectorAll('.answer small')].at(-1).textContent")
    return text


def error_of(browser: Phone) -> str:
    browser.wait(READY)
    text: str = browser.evaluate("document.getElementById('error').textContent")
    return text


def greedy(logits: Logits, prompt: list[int], count: int, lead: float) -> list[int]:
    """The most likely continuation, up to where the best token does not lead by more than `lead`.

    A browser computes in another order: where two tokens are as good, it may take the other one.
    """
    ids = list(prompt)
    for _ in range(count):
        last = logits(np.array(ids, np.int32))[-1]
        second, best = np.sort(last)[-2:]
        if best - second <= lead:
            break
        ids.append(int(last.argmax()))
    return ids[len(prompt) :]


# ---- answers


@pytest.mark.full
def test_the_page_answers_as_onnxruntime_does(onnx_folder: Path, browser: Phone) -> None:
    assert len(list(onnx_folder.glob("model.onnx.data*"))) > 2
    tokenizer = AutoTokenizer.from_pretrained(onnx_folder)
    prompt = tokenizer.encode(PROMPT)
    assert prompt[0] == tokenizer.bos_token_id
    expected = greedy(OnnxEngine(onnx_folder).logits, prompt, TOKENS, lead=1e-3)
    assert len(expected) == TOKENS
    with served(onnx_folder) as address:
        browser.open(f"{address}/?tokens={TOKENS}")
        for _ in range(2):  # the second time the cache holds too much
            assert ask(browser, PROMPT) == tokenizer.decode(expected)
        assert re.fullmatch(rf"{TOKENS} tokens · [\d.]+ tokens/s · limit of {TOKENS} tokens", figures(browser))
        assert "no chat template: it continues the text" in browser.evaluate("document.body.textContent")
        assert browser.evaluate("crossOriginIsolated"), "without it there are no threads"
        elsewhere = [url for url in browser.requests() if not url.removeprefix("blob:").startswith(f"{address}/")]
        assert browser.requests()
        assert not elsewhere


@pytest.mark.full
@pytest.mark.parametrize("config", [CONVOLUTIONS, LINEAR_ATTENTION], ids=["lfm2_moe", "qwen3_5"])
def test_states_of_hybrids_are_fed_too(
    config: PretrainedConfig, tiny_llama: Path, browser: Phone, tmp_path: Path
) -> None:
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    folder = export_onnx(make_run(model, tmp_path / "run", "onnx:w4g32"), tmp_path / "model-onnx")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = greedy(OnnxEngine(folder).logits, tokenizer.encode(PROMPT), 8, lead=1e-3)
    assert len(expected) >= 4
    with served(folder) as address:
        browser.open(f"{address}/?tokens={len(expected)}")
        for _ in range(2):  # the second time states begin at zero again
            assert ask(browser, PROMPT) == tokenizer.decode(expected)


@pytest.mark.full
def test_the_same_through_webgpu(onnx_folder: Path) -> None:
    """On a GPU that Chromium computes on the CPU: some seconds a token."""
    tokenizer = AutoTokenizer.from_pretrained(onnx_folder)
    expected = greedy(OnnxEngine(onnx_folder).logits, tokenizer.encode(PROMPT), 4, lead=1e-2)
    assert len(expected) == 4
    software_gpu = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with served(onnx_folder) as address, phone(*software_gpu) as browser:
        browser.open(address)
        if not browser.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
            pytest.skip("this Chromium has no software GPU (SwiftShader)")
        browser.open(f"{address}/?tokens=4&device=webgpu")
        assert ask(browser, PROMPT, seconds=900) == tokenizer.decode(expected)
        assert "ONNX Runtime, WebGPU" in browser.evaluate("document.getElementById('facts').textContent")


@pytest.mark.full
def test_the_page_answers_as_llama_cpp_does(gguf_file: Path, onnx_folder: Path, browser: Phone) -> None:
    tokenizer = AutoTokenizer.from_pretrained(onnx_folder)
    with LlamaCppRuntime().open(gguf_file) as session:
        expected = greedy(session.logits, tokenizer.encode(PROMPT), TOKENS, lead=0.05)
    assert len(expected) >= 8
    with served(gguf_file) as address:
        browser.open(f"{address}/?tokens={len(expected)}")
        for _ in range(2):
            assert ask(browser, PROMPT) == tokenizer.decode(expected)
        elsewhere = [url for url in browser.requests() if not url.removeprefix("blob:").startswith(f"{address}/")]
        assert not elsewhere


@pytest.mark.full
@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_a_chat_goes_through_the_template_turn_by_turn(
    kind: str, chat_run: RunDirectory, onnx_folder: Path, browser: Phone, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_run.config_dir)
    export = export_onnx if kind == "onnx" else export_gguf
    artifact = export(chat_run, tmp_path / ("model-onnx" if kind == "onnx" else "model.gguf"))
    messages: list[dict[str, str]] = []
    with served(artifact) as address, logits_of(artifact) as logits:
        browser.open(f"{address}/?tokens=6")
        for question in ("What shall we do?", "Why do we need a government?"):
            messages.append({"role": "user", "content": question})
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer.encode(text, add_special_tokens=False)
            assert prompt.count(tokenizer.bos_token_id) == 1
            answer = ask(browser, question)
            sure = tokenizer.decode(greedy(logits, prompt, 6, lead=0.05))
            assert sure
            assert answer.startswith(sure)
            messages.append({"role": "assistant", "content": answer})
        assert "no chat template" not in browser.evaluate("document.body.textContent")


@contextmanager
def logits_of(artifact: Path) -> Iterator[Logits]:
    if artifact.is_dir():
        yield OnnxEngine(artifact).logits
    else:
        with LlamaCppRuntime().open(artifact) as session:
            yield session.logits


@pytest.mark.full
def test_every_end_token_of_the_generation_config_ends_an_answer(
    chat_run: RunDirectory, onnx_folder: Path, browser: Phone, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_run.config_dir)
    messages = [{"role": "user", "content": "What shall we do?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = greedy(OnnxEngine(onnx_folder).logits, tokenizer.encode(text, add_special_tokens=False), 8, lead=1e-3)
    end = next(token for token in ids[3:] if ids.index(token) >= 3)
    ending = RunDirectory.open(shutil.copytree(chat_run.path, tmp_path / "run"))
    config = ending.config_dir / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [1, end]}), encoding="utf-8")
    with served(export_onnx(ending, tmp_path / "model-onnx")) as address:
        browser.open(f"{address}/?tokens=40")
        assert ask(browser, messages[0]["content"]) == tokenizer.decode(ids[: ids.index(end)])
        assert "limit" not in figures(browser)


@pytest.mark.full
def test_stop_stops_and_a_new_chat_is_empty(onnx_folder: Path, browser: Phone) -> None:
    with served(onnx_folder) as address:
        browser.open(address)
        browser.wait(READY)
        browser.type("Message", PROMPT)
        browser.tap("Send")
        browser.wait("/^[3-9] tokens/.test(document.querySelector('.answer small').textContent)")
        browser.tap("Stop")
        browser.wait(ANSWERED)
        count, rest = figures(browser).split(maxsplit=1)
        assert rest.endswith("· stopped")
        assert int(count) < 500
        answer = last_answer(browser)
        assert not browser.evaluate("new Promise((then) => setTimeout(then, 1500))")
        assert last_answer(browser) == answer
        browser.tap("New chat")
        assert browser.evaluate("document.getElementById('log').textContent") == ""
        browser.open(f"{address}/?tokens={count}")
        assert ask(browser, PROMPT).startswith(answer)


# ---- the page at phone size


@pytest.mark.full
def test_the_page_fits_a_phone_and_a_desktop_by_day_and_by_night(
    onnx_folder: Path, browser: Phone, tmp_path: Path
) -> None:
    grounds = set()
    with served(onnx_folder) as address:
        for width, height, dark in (
            (WIDTH, HEIGHT, False),
            (WIDTH, HEIGHT, True),
            (320, 568, False),
            (1280, 800, True),
        ):
            browser.open(f"{address}/?tokens=4", width, height, dark)
            ask(browser, "word" * 60 + " with more words than fit into a line of a phone")
            assert browser.evaluate("[innerWidth, innerHeight]") == [width, height]
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("document.documentElement.scrollHeight") == height
            outside = (
                "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth)"
            )
            assert browser.evaluate(f"{outside}.map((e) => e.outerHTML)") == []
            browser.screenshot(tmp_path / f"{width}x{height}.png")  # for a person to look at
            grounds.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


# ---- errors are sentences


@pytest.mark.full
def test_what_goes_wrong_is_a_sentence(onnx_folder: Path, browser: Phone, tmp_path: Path) -> None:
    def large_arrays_fail(error: str) -> str:
        handler = f"{{ construct(t, a, n) {{ if (a[0] > 100000) throw {error}; return Reflect.construct(t, a, n); }} }}"
        return f"globalThis.Uint8Array = new Proxy(Uint8Array, {handler});"

    with served(onnx_folder) as address:
        browser.open(address, before="WebAssembly.validate = () => false;")
        assert error_of(browser).startswith("This browser has no WebAssembly SIMD")
        browser.open(address, before=large_arrays_fail("new RangeError('Array buffer allocation failed')"))
        assert error_of(browser).startswith("The memory that this browser gives a page does not suffice")
        browser.open(address, before="fetch = async () => new Response('', { status: 404 });")
        assert error_of(browser).startswith("The server has no model.json (404).")
        browser.open(f"{address}/?tokens=4")
        ask(browser, "many " * 1100)
        assert re.fullmatch(r"This chat has \d+ tokens, and the model holds 1024. Begin a new chat.", error_of(browser))
    incomplete = shutil.copytree(onnx_folder, tmp_path / "model-onnx")
    (incomplete / "genai_config.json").unlink()
    with served(incomplete) as address:
        browser.open(address)
        assert error_of(browser).startswith("The folder has no genai_config.json.")
        assert not [url for url in browser.requests() if "model.onnx" in url], "said before anything large is loaded"


# ---- the server, without a browser


@pytest.fixture
def site_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of one file and one npm package, beside others that it has no business to serve."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for package in (JINJA, WLLAMA):
        package.path.mkdir(parents=True)
        (package.path / "index.js").write_text("export {};")
    for name in ("model.gguf", "secret.txt"):
        (tmp_path / name).write_text("abc")
    server = Server(("127.0.0.1", 0), Site("model.gguf", [tmp_path / "model.gguf"], [JINJA]))
    thread = threading.Thread(target=server.serve_forever, args=(0.1,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def get(address: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_the_server_gives_out_the_page_the_model_and_its_packages(site_address: str) -> None:
    for path, kind in {
        "/": "text/html",
        "/?tokens=4": "text/html",
        "/page.mjs": "text/javascript",
        "/model.json": "application/json",
        "/model/model.gguf": "application/octet-stream",
        "/packages/@huggingface/jinja/index.js": "text/javascript",
    }.items():
        response, _ = get(site_address, path)
        assert (path, response.status) == (path, 200)
        assert response.getheader("Content-Type") == kind
        assert response.getheader("Cross-Origin-Opener-Policy") == "same-origin"
        assert response.getheader("Cross-Origin-Embedder-Policy") == "require-corp"
    _, description = get(site_address, "/model.json")
    assert json.loads(description) == {"name": "model.gguf", "files": [{"name": "model.gguf", "bytes": 3}]}


def test_a_file_that_the_browser_has_is_not_sent_again(site_address: str) -> None:
    response, content = get(site_address, "/model/model.gguf")
    changed = response.getheader("Last-Modified")
    assert content == b"abc"
    assert changed is not None
    response, content = get(site_address, "/model/model.gguf", If_Modified_Since=changed)
    assert (response.status, content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/serve.py",
        "/model/",
        "/model/secret.txt",
        "/model/../serve.py",
        "/model/%2e%2e/secret.txt",
        "/packages/@huggingface/jinja",
        "/packages/@huggingface/jinja/../../../../secret.txt",
        "/packages/@wllama/wllama/index.js",
        "//etc/passwd",
        "/../../README.md",
    ],
)
def test_the_server_gives_out_nothing_else(path: str, site_address: str) -> None:
    response, _ = get(site_address, path)
    assert response.status == 404


def test_what_is_no_export_is_refused_with_a_sentence(tiny_llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SERVE), str(tiny_llama)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: .*tiny-llama is neither a folder with model\.onnx nor a \.gguf file; write one with .*\n", done.stderr
    )
