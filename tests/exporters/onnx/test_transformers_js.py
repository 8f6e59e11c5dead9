"""`--layout transformers.js`: the folder in @huggingface/transformers itself, in Node and in headless Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue

import onnx_ir as ir
import pytest
import torch
from transformers import AutoTokenizer

from exporters.onnx import OnnxExporter
from exporters.onnx.artifact.layouts import layout_of
from exporters.onnx.artifact.reader import open_artifact
from exporters.onnx.artifact.transformers_js import check_cache, write_companions
from exporters.onnx.options import TRANSFORMERS_JS as LAYOUT
from exporters.onnx.options import OnnxOptions
from runtime_tests.setup.devices import CHROMIUM
from runtime_tests.setup.npm import NODE, TRANSFORMERS_JS
from runtime_tests.transports.pages.browser import Chromium
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.evaluation.scoring import score
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.run_directory import RunDirectory
from tests.support import make_run

SCRIPT = Path(__file__).with_name("transformers_js.mjs")
PROMPT, COUNT = "The state of the union", 12
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The trained tiny model, with a chat template in a file of its own."""
    run = make_run(tiny_llama, tmp_path_factory.mktemp("run") / "run", "onnx:w4g32")
    (run.config_dir / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def folder(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export, the data in several files."""
    return export(run, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def package() -> Path:
    """@huggingface/transformers, installed in the user's cache."""
    if NODE.missing() is not None:
        pytest.skip(str(NODE.missing()))
    if TRANSFORMERS_JS.missing() is not None:
        try:
            TRANSFORMERS_JS.install(str)
        except UserError as error:
            pytest.skip(f"{TRANSFORMERS_JS.missing()}, and it could not be installed: {error}")
    return TRANSFORMERS_JS.path


@pytest.fixture(scope="module")
def expected(run: RunDirectory) -> str:
    """What transformers writes with the run's weights."""
    tokenizer = AutoTokenizer.from_pretrained(run.config_dir)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    made = load_run_model(run).generate(ids, max_new_tokens=COUNT, do_sample=False)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def export(run: RunDirectory, out: Path, **options: object) -> Path:
    return OnnxExporter().export(run, out, OnnxOptions(layout=LAYOUT, split_max_bytes=1_000_000, **options))


def test_files_lie_where_transformers_js_looks(folder: Path) -> None:
    data = sorted(file.name for file in (folder / "onnx").iterdir())
    assert data == ["model_q4.onnx", *("model_q4.onnx_data" + end for end in ("", "_1", "_2", "_3"))]
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 4}}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == TEMPLATE
    assert tokenizer["add_bos_token"] is True
    assert AutoTokenizer.from_pretrained(folder).encode(PROMPT)[0] == tokenizer_of(folder).bos_token_id


def tokenizer_of(folder: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(folder)


def test_it_generates_in_node(folder: Path, package: Path, expected: str) -> None:
    command = ["node", str(SCRIPT), str(package), f"{folder.parent}/", folder.name, PROMPT, str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_it_generates_in_chromium(folder: Path, package: Path, expected: str) -> None:
    if CHROMIUM.missing() is not None:
        pytest.skip(str(CHROMIUM.missing()))
    with page(folder, package) as (url, answers), chromium_at(url):
        try:
            answer = answers.get(timeout=300)
        except Empty:
            pytest.fail("the page did not answer within 300 s")
    assert answer == expected


@contextmanager
def chromium_at(url: str) -> Iterator[None]:
    browser = Chromium(url)
    try:
        yield
    finally:
        browser.close()


PAGE = """<!doctype html><meta charset="utf-8"><script type="module">
const say = (text) => fetch('/answer', { method: 'POST', body: text });
try {
  const { pipeline, env } = await import('/dist/transformers.min.js');
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = '/models/';
  env.backends.onnx.wasm.wasmPaths = '/ort/';
  const generate = await pipeline('text-generation', 'NAME');
  const [{ generated_text: text }] = await generate(PROMPT, { max_new_tokens: COUNT, do_sample: false });
  await say(text);
} catch (error) {
  await say(`failed: ${error.stack ?? error}`);
}
</script>"""


@contextmanager
def page(folder: Path, package: Path) -> Iterator[tuple[str, Queue[str]]]:
    """Serves a page that generates, and collects what it posts."""
    answers: Queue[str] = Queue()
    roots = {
        "dist": package / "dist",
        "ort": package.parent.parent / "onnxruntime-web" / "dist",
        "models": folder.parent,
    }
    html = PAGE.replace("NAME", folder.name).replace("PROMPT", json.dumps(PROMPT)).replace("COUNT", str(COUNT))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, roots, html.encode(), answers))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", answers
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """The page, files of some folders, and POST /answer."""

    def __init__(self, roots: dict[str, Path], html: bytes, answers: Queue[str], *rest: object) -> None:
        self.roots, self.html, self.answers = roots, html, answers
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        _, root, *rest = self.path.partition("?")[0].split("/")
        if not root:
            return self.reply(self.html, "text/html")
        file = self.roots.get(root, Path("/nowhere")).joinpath(*rest)
        if not file.is_file():
            return self.send_error(404)
        kinds = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
        return self.reply(file.read_bytes(), kinds.get(file.suffix, "application/octet-stream"))

    def do_POST(self) -> None:
        self.answers.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.reply(b"", "text/plain")

    def reply(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_verify_takes_the_folder(run: RunDirectory, folder: Path, evaluation_text: Path) -> None:
    assert verify(run, [folder], evaluation_text, n_ctx=64, max_windows=1).passed


def test_onnxruntime_genai_loads_it_too(folder: Path, expected: str) -> None:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
    ids = tokenizer_of(folder).encode(PROMPT)
    params.set_search_options(max_length=len(ids) + COUNT, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    assert tokenizer.decode(generator.get_sequence(0)).strip() == expected


def test_a_graph_without_a_cache_is_refused() -> None:
    ids, logits = (ir.Value(name=name) for name in ("input_ids", "logits"))
    graph = ir.Graph([ids], [logits], nodes=[ir.node("Identity", [ids], outputs=[logits])], name="whole texts")
    with pytest.raises(UserError, match=r"no key-value cache .* generates with one only"):
        check_cache(graph)


def test_a_type_that_the_library_does_not_know_is_called_llama(run: RunDirectory, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run.path, tmp_path / "run")
    config = json.loads((other / "config" / "config.json").read_text())
    (other / "config" / "config.json").write_text(json.dumps({**config, "model_type": "arcane"}))
    graph = open_artifact(folder).graph
    lines: list[str] = []
    out = shutil.copytree(folder, tmp_path / "out")
    write_companions(RunDirectory.open(other), out, graph, layout_of(LAYOUT, graph), lines.append)
    written = json.loads((out / "config.json").read_text())
    assert (written["model_type"], written["num_hidden_layers"]) == ("llama", 5)
    assert lines == [line for line in lines if "transformers.js does not know arcane" in line]


def test_no_cache_is_refused_before_anything_is_traced() -> None:
    with pytest.raises(UserError, match="leave --no-cache out"):
        OnnxOptions(layout=LAYOUT, no_cache=True)


def test_evaluate_takes_the_folder(run: RunDirectory, folder: Path, evaluation_text: Path) -> None:
    """It has the model's config.json, and is no model with weights."""
    expected = score(str(run.path), evaluation_text, None, n_ctx=64, max_windows=1)
    found = score(str(folder), evaluation_text, None, n_ctx=64, max_windows=1)
    assert found.ppl == pytest.approx(expected.ppl, rel=1e-4)


def test_verify_takes_the_inner_folder_too(run: RunDirectory, folder: Path, evaluation_text: Path) -> None:
    report = verify(run, [folder / "onnx"], evaluation_text, devices=["cpu-x86", "cpu-genai"], n_ctx=64, max_windows=1)
    assert [r.name for r in report.runtimes if r.status == "pass"] == ["onnxruntime", "onnxruntime-genai"]


def test_the_name_is_that_of_the_decoder_blocks_where_the_head_holds_most_weights() -> None:
    inner, logits = (ir.Value(name=name) for name in ("inner", "logits"))
    sizes = {"bits": 4, "N": 64, "K": 64}, {"bits": 8, "N": 3000, "K": 64}
    block = ir.node("MatMulNBits", [ir.Value(name="x")], sizes[0], domain="com.microsoft", outputs=[inner])
    head = ir.node("MatMulNBits", [inner], sizes[1], domain="com.microsoft", num_outputs=1)
    capped = ir.node("Tanh", [head.outputs[0]], outputs=[logits])
    assert layout_of(LAYOUT, ir.Graph([], [logits], nodes=[block, head, capped])).dtype == "q4"
