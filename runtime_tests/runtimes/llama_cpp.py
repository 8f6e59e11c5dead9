"""llama.cpp through the prebuilt shared object of PyPI's `xllamacpp`, in a worker process here or on a device.

(`llama-cpp-python` builds llama.cpp at another commit with every release, so its structs would need declarations of
their own; it is not offered.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.container.reader import GgufFile
from runtime_tests.interface import StoredTensor
from runtime_tests.runtimes.worker_runtime import WorkerRuntime
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.transports.interface import Worker, WorkerFailure
from runtime_tests.transports.local import LocalTransport
from runtime_tests.transports.reconnecting import ReconnectingWorker
from runtime_tests.worker import llama_cpp_bindings
from signround_edge.errors import UserError
from signround_edge.evaluation.cache_types import CacheTypes
from signround_edge.evaluation.metrics import FloatArray

_CHUNK_BYTES = 4 << 20  # packed bytes that travel to the worker at once; larger replies find fresh memory each time


class LlamaCppSession(WorkerSession):
    """A GGUF file loaded by llama.cpp: one thread, micro-batch of 512 (see `LlamaCppEngine`)."""

    @property
    def notes(self) -> list[str]:
        """Which types its cache has, where they are not llama.cpp's own."""
        types = self.options
        return [CacheTypes(types["cache_type_k"], types["cache_type_v"]).text] if types else []

    @property
    def bos(self) -> int | None:
        """The token that this file puts in front of a text, or None."""
        return int(self.facts["bos"]) if self.facts["adds_bos"] else None

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text, by llama.cpp's own tokenizer.

        Args:
            add_special: put BOS and EOS where the file asks for them.
            parse_special: read the text of a control token as that token.
        """
        reply = self._call("tokenize", text=text, add_special=add_special, parse_special=parse_special)
        ids: list[int] = reply.arrays["tokens"].tolist()
        return ids

    def detokenize(self, tokens: list[int]) -> str:
        """Text of tokens, control tokens left out."""
        return str(self._call("detokenize", {"tokens": np.array(tokens, dtype=np.int32)}).header["text"])

    def generate(self, tokens: list[int], max_new: int) -> list[int]:
        """Greedy continuation: up to `max_new` tokens, without the end-of-generation token."""
        prompt = {"tokens": np.array(tokens, dtype=np.int32)}
        ids: list[int] = self._call("generate", prompt, max_new=max_new).arrays["tokens"].tolist()
        return ids


@dataclass(frozen=True)
class LlamaCppRuntime(WorkerRuntime):
    """llama.cpp on a CPU.

    Attributes:
        cache_types: of keys and values; None: f16, and f32 for a file in F32.
    """

    name = "llama.cpp"
    artifact_format = "gguf"
    cache_types: CacheTypes | None = None

    def with_cache(self, types: CacheTypes) -> LlamaCppRuntime:
        """The same with other types of keys and values."""
        return replace(self, cache_types=types)

    def unavailable(self) -> str | None:
        """Why it cannot run here, with the way out; None when it can."""
        here = isinstance(self.transport, LocalTransport)
        return llama_cpp_bindings.why_unavailable() if here else self.transport.unavailable()

    def open(self, artifact: Path) -> LlamaCppSession:
        """Load a GGUF file. Raises UserError when llama.cpp refuses it or dies of it."""
        if not artifact.is_file():
            raise UserError(f"{artifact} is not a file; give the .gguf file that `export` wrote")
        types = self.cache_types
        options = {} if types is None else {"cache_type_k": types.k, "cache_type_v": types.v}
        return LlamaCppSession(self.name, self.transport, artifact, self.timeout, options, self.digest)

    def stored_tensors(self, artifact: Path) -> Iterator[StoredTensor]:
        """Every tensor through libggml's `to_float`: f32 [rows, values a row] (a vector is one row)."""
        with self.worker(artifact) as worker:
            file = GgufFile.open(artifact)
            for name, info in file.tensors.items():
                data = file.raw(name)
                try:
                    weights = _dequantize(worker, info.ggml_type.number, len(data), info.shape[-1], data.reshape(-1))
                except WorkerFailure:
                    raise
                except UserError as error:
                    raise UserError(f"{artifact}: tensor {name} cannot be compared ({error})") from error
                yield StoredTensor(name, weights, info.ggml_type.name)


def dequantize(type_number: int, data: bytes, rows: int, cols: int) -> FloatArray:
    """f32 [rows, cols] of packed ggml blocks, through libggml in a worker of its own."""
    with LocalTransport().start(f"tensor type {type_number}") as worker:
        return _dequantize(worker, type_number, rows, cols, np.frombuffer(data, dtype=np.uint8))


def _dequantize(
    worker: Worker | ReconnectingWorker, type_number: int, rows: int, cols: int, data: NDArray[np.uint8]
) -> FloatArray:
    """In chunks of whole rows, so that neither side holds a large tensor twice."""
    row_bytes = data.size // max(1, rows)
    if row_bytes * rows != data.size:
        raise UserError(f"{data.size} bytes are not {rows} equal rows")
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    weights = np.empty((rows, cols), dtype=np.float32)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        packed = data[first * row_bytes : last * row_bytes]
        reply = worker.call("dequantize", {"data": packed}, type=type_number, count=(last - first) * cols)
        weights[first:last] = reply.arrays["weights"].reshape(last - first, cols)
    return weights
