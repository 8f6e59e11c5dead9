"""Packages of the npm registry, pinned, each in its own folder of the cache; no script of theirs is run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from runtime_tests.setup.cache import cache_folder, fill
from runtime_tests.setup.requirement import Log, SystemProgram, run_tool
from signround_edge.errors import UserError

NODE = SystemProgram(("node",), "nodejs")
NPM = SystemProgram(("npm",), "npm")


@dataclass(frozen=True)
class NpmPackage:
    """One package with its dependencies."""

    name: str
    version: str

    @property
    def folder(self) -> Path:
        """Where its node_modules lie."""
        return cache_folder() / "npm" / f"{self.name.replace('/', '+')}-{self.version}"

    @property
    def path(self) -> Path:
        """The package itself; it is there when `missing` is None."""
        return self.folder / "node_modules" / self.name

    def missing(self) -> str | None:
        """See `Requirement`."""
        return None if self.path.is_dir() else f"the npm package {self.name} {self.version} is not in the cache"

    def missing_with_way_out(self) -> str | None:
        """The same for somebody who knows no device's name."""
        missing = self.missing()
        return f"{missing} (`signround-edge devices` says how to get it)" if missing else None

    def command(self) -> str | None:
        """See `Requirement`."""
        return None if not self.missing() else NPM.command()

    def install(self, log: Log) -> None:
        """`npm install` without running install scripts (they would download more)."""
        if NPM.missing():
            NPM.install(log)
        log(f"npm install {self.name}@{self.version}")
        fill(self.folder, self._install)

    def _install(self, folder: Path) -> None:
        (folder / "package.json").write_text(json.dumps({"private": True}))
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
        run_tool(["npm", "install", "--prefix", str(folder), *quiet, f"{self.name}@{self.version}"], "npm")
        if not (folder / "node_modules" / self.name).is_dir():
            raise UserError(f"npm installed no {self.name}; check that `npm view {self.name}` works")


ONNXRUNTIME_WEB = NpmPackage("onnxruntime-web", "1.30.0")
ONNXRUNTIME_NODE = NpmPackage("onnxruntime-node", "1.30.0")
WLLAMA = NpmPackage("@wllama/wllama", "2.4.0")
TRANSFORMERS_JS = NpmPackage("@huggingface/transformers", "4.3.2")
