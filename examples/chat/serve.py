"""Serves the chat page with a model that `signround-edge export` wrote, and with the npm packages that run it.

    python examples/chat/serve.py model-onnx
    python examples/chat/serve.py model.gguf --port 8000 --host 0.0.0.0

    GET /                    the page
    GET /model.json          {"name": the model's, "files": [{"name": …, "bytes": …}]}
    GET /model/NAME          a file of the model
    GET /packages/P/FILE     a file of npm package P

Any other web server will do that sends these files with the headers of `HEADERS`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from runtime_tests.setup.npm import ONNXRUNTIME_WEB, WLLAMA, NpmPackage
from runtime_tests.transports.pages.phone import own_address, qr_code
from runtime_tests.transports.push import files_of
from signround_edge.errors import UserError

PAGE = Path(__file__).parent
TOKENIZERS = NpmPackage("@huggingface/tokenizers", "0.2.0")
JINJA = NpmPackage("@huggingface/jinja", "0.5.11")
# The first two isolate the page, without which browsers give it no threads.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",  # kept by the browser, but it asks whether the file has changed
    "X-Content-Type-Options": "nosniff",
}
_TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm", ".gguf": "application/octet-stream"}


@dataclass(frozen=True)
class Site:
    """What is served.

    Attributes:
        name: the model's, as the page shows it.
        model: its files.
        packages: npm packages, installed.
    """

    name: str
    model: list[Path]
    packages: list[NpmPackage]

    @classmethod
    def of(cls, artifact: Path) -> Site:
        """The site of an exported folder or file; npm packages that are missing are installed.

        Raises:
            UserError: it is no export, or npm cannot install.
        """
        if artifact.is_dir() and (artifact / "model.onnx").is_file():
            packages = [ONNXRUNTIME_WEB, TOKENIZERS, JINJA]
        elif artifact.is_file() and artifact.suffix == ".gguf":
            packages = [WLLAMA, JINJA]
        else:
            raise UserError(
                f"{artifact} is neither a folder with model.onnx nor a .gguf file; "
                "write one with `signround-edge export`"
            )
        for package in packages:
            if package.missing():
                package.install(print)
        return cls(artifact.resolve().name, files_of(artifact), packages)

    def description(self) -> dict[str, Any]:
        """model.json."""
        return {"name": self.name, "files": [{"name": f.name, "bytes": f.stat().st_size} for f in self.model]}

    def find(self, path: str) -> Path | None:
        """The file behind a path, or None."""
        kind, _, rest = path.partition("/")
        if kind == "model":
            return next((file for file in self.model if file.name == rest), None)
        if kind == "packages":
            for package in self.packages:
                root, file = package.path.resolve(), (package.folder / "node_modules" / rest).resolve()
                if file.is_relative_to(root) and file.is_file():
                    return file
            return None
        file = PAGE / (path or "index.html")
        return file if file.parent == PAGE and file.suffix in (".html", ".css", ".mjs") else None


class Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of a site's files; a file that the browser has already is not sent again."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | _TYPES
    server: Server

    def do_GET(self) -> None:
        """A file, or model.json."""
        if urlsplit(self.path).path != "/model.json":
            super().do_GET()
            return
        content = json.dumps(self.server.site.description()).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def translate_path(self, path: str) -> str:
        """See the base class: the file behind a request; one that is not there gives 404."""
        return str(self.server.site.find(unquote(urlsplit(path).path).removeprefix("/")) or "")

    def end_headers(self) -> None:
        """See the base class."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


class Server(ThreadingHTTPServer):
    """Serves a site, each connection in a thread of its own."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], site: Site) -> None:
        self.site = site
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no error of ours."""


def invitation(site: Site, host: str, port: int) -> list[str]:
    """Lines for the terminal: where to open the page, here and on a phone."""
    size = sum(file.stat().st_size for file in site.model) / 1e6
    lines = [f"{site.name} ({size:.1f} MB): http://localhost:{port}"]
    if host in ("127.0.0.1", "localhost"):
        lines += [
            f"On a phone by USB: adb reverse tcp:{port} tcp:{port}, then the same address there.",
            "On a phone in the same Wi-Fi: start with --host 0.0.0.0",
        ]
    else:
        url = f"http://{own_address() if host == '0.0.0.0' else host}:{port}"
        lines += [
            f"On a phone in the same Wi-Fi: {url}",
            "(slower there: browsers keep WebGPU and threads for https and localhost)",
            qr_code(url),
        ]
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Chat with an exported model in the browser.")
    parser.add_argument("model", type=Path, help="a folder of `export --format onnx`, or a .gguf file")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for phones in the same network too")
    arguments = parser.parse_args()
    try:
        site = Site.of(arguments.model)
        server = Server((arguments.host, arguments.port), site)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: port {arguments.port} of {arguments.host} cannot be had ({error.strerror}); try --port 0")
    for line in invitation(site, arguments.host, server.server_port):
        print(line, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
