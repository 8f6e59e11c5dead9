"""What answers first on another machine: takes files by their hash, then becomes the worker. Standard library only.

The client sends this file's text to `python3 -c` there. A request is a uint32 (little-endian) length, a JSON object of
that length and then its "size" bytes of data; a reply is a length and a JSON object. Requests, by their "op":

    hello    {}                       → {python, machine}
    have     {sha256, bytes}          → {there}: how many bytes of that file are there
    put      {sha256, bytes, offset, size} + data → {there}; nothing is written unless offset is what is there
    arrange  {files: {name: sha256}}  → {path}: a folder that holds those files under those names
    unpack   {sha256}                 → {path}: the folder of an unpacked .tar.gz
    start    {path: [...], env: {}}   → {}, and the process becomes `python3 -m runtime_tests.worker`
A reply with "error" holds one sentence.

A running worker uses the same functions for artifacts that are pushed later.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import struct
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any


def store() -> Path:
    """Where pushed files are kept: under the cache folder that `runtime_tests.setup.cache` names."""
    chosen = os.environ.get("SIGNROUND_EDGE_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = (Path(chosen) if chosen else Path(caches) / "signround-edge") / "pushed"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def have(sha256: str, size: int) -> int:
    """Bytes of a file that are there already; `size` when it is whole."""
    whole, part = _places(sha256)
    if whole.is_file():
        return size
    return part.stat().st_size if part.is_file() else 0


def put(sha256: str, size: int, offset: int, data: bytes) -> int:
    """Append `data` if exactly `offset` bytes are there; bytes there now. ValueError: the whole has another hash."""
    whole, part = _places(sha256)
    if whole.is_file():
        return size
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another client may push the same file
        there = file.seek(0, os.SEEK_END)
        if there == offset:
            file.write(data)
            file.flush()
            there += len(data)
        if there < size:
            return there
        found = hashlib.sha256(part.read_bytes()).hexdigest() if size < 1 << 20 else _hash(part)
        if there > size or found != sha256:
            part.unlink()
            raise ValueError(f"the pushed file has the hash {found}, not {sha256}; it was removed, push it again")
        os.replace(part, whole)
    return size


def arrange(files: dict[str, str]) -> str:
    """A folder in which pushed files have the given names (links, no copies)."""
    key = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    folder = store() / f"{key}.files"
    if folder.is_dir():
        return str(folder)
    temporary = Path(tempfile.mkdtemp(dir=store()))
    for name, sha256 in files.items():
        if Path(name).name != name:
            raise ValueError(f"{name} is not a file name")
        whole, _ = _places(sha256)
        os.link(whole, temporary / name)
    return str(_settle(temporary, folder))


def unpack(sha256: str) -> str:
    """The folder of an unpacked .tar.gz that has been pushed."""
    whole, _ = _places(sha256)
    folder = store() / f"{sha256}.unpacked"
    if not folder.is_dir():
        temporary = Path(tempfile.mkdtemp(dir=store()))
        with tarfile.open(whole) as archive:
            archive.extractall(temporary, filter="data")
        _settle(temporary, folder)
    return str(folder)


def _settle(temporary: Path, folder: Path) -> Path:
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _places(sha256: str) -> tuple[Path, Path]:
    if len(sha256) != 64 or any(c not in "0123456789abcdef" for c in sha256):
        raise ValueError(f"{sha256} is no sha256")
    return store() / sha256, store() / f"{sha256}.part"


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read(count: int) -> bytes:
    """Exactly that many bytes of stdin, unbuffered: what follows belongs to the worker."""
    parts = []
    while count:
        part = os.read(0, min(count, 1 << 20))
        if not part:
            sys.exit(0)  # the client is gone
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _reply(answer: dict[str, Any]) -> None:
    content = json.dumps(answer).encode()
    data = struct.pack("<I", len(content)) + content
    while data:
        data = data[os.write(1, data) :]


def _answer(request: dict[str, Any], data: bytes) -> dict[str, Any]:
    op = request["op"]
    if op == "hello":
        return {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "machine": platform.machine()}
    if op == "have":
        return {"there": have(request["sha256"], request["bytes"])}
    if op == "put":
        return {"there": put(request["sha256"], request["bytes"], request["offset"], data)}
    if op == "arrange":
        return {"path": arrange(request["files"])}
    if op == "unpack":
        return {"path": unpack(request["sha256"])}
    raise ValueError(f"no operation {op}")


def main() -> None:
    """Answer until the worker is to start, or the client is gone."""
    while True:
        (length,) = struct.unpack("<I", _read(4))
        request = json.loads(_read(length))
        data = _read(request.get("size", 0))
        if request["op"] == "start":
            _reply({})
            environment = {**os.environ, **request["env"], "PYTHONPATH": os.pathsep.join(request["path"])}
            os.execve(sys.executable, [sys.executable, "-S", "-P", "-m", "runtime_tests.worker"], environment)
        try:
            _reply(_answer(request, data))
        except (OSError, ValueError) as error:
            _reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
