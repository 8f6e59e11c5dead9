"""llama.cpp inside this process: one model, one context, one thread. Only the worker process uses it.

A corrupt file may abort the process that loads it, so nobody else should.
"""

from __future__ import annotations

import ctypes
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_tests.worker import llama_cpp_bindings as c
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import FloatArray, TokenArray

# Activations are quantized per micro-batch, so its size is part of the result: fixed, llama.cpp's own default.
MICRO_BATCH = 512
_CONTEXT_STEP = 256  # llama.cpp rounds contexts up to this
_GGML_F32 = 0
_LOAD_MODE_MMAP = 1
_FLASH_ATTENTION_OFF, _FLASH_ATTENTION_ON = 0, 1
_CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type
_FILE_TYPE_F32 = b"0"  # LLAMA_FTYPE_ALL_F32
_TYPE_COUNT = 43  # GGML_TYPE_COUNT of this build
_MAX_VALUES = 1 << 31
_LONGEST_MESSAGE = 300


class LlamaCppEngine:
    """A GGUF file loaded by llama.cpp.

    One thread; micro-batch of 512; attention (flash attention: automatic), the f16 cache and the repacking of weights
    as llama.cpp ships them, so that the figures are those of a deployment. For a file in F32 they are those of the
    graph: flash attention and the f16 cache err by 1e-4, enough to send a token to another expert (KL 0.09 for that
    token), so there both are off.

    Args:
        cache_type_k, cache_type_v: of `_CACHE_TYPES`, both or neither: types of the cache instead of these. A quantized
            V turns flash attention on, without which llama.cpp has none.

    Raises:
        UserError: llama.cpp refuses the file; the sentence holds its own words.
    """

    def __init__(self, artifact: Path, cache_type_k: str | None = None, cache_type_v: str | None = None) -> None:
        self._cache_types = None if cache_type_k is None or cache_type_v is None else (cache_type_k, cache_type_v)
        self._lib: Any = c.load_library()
        self._context: int | None = None
        self._context_size = 0
        self._errors: deque[str] = deque(maxlen=4)
        self._log = c.LogCallback(self._on_log)  # kept: C holds the pointer
        self._lib.llama_log_set(self._log, None)
        self._lib.ggml_log_set(self._log, None)
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = _LOAD_MODE_MMAP
        self._model: int | None = self._lib.llama_model_load_from_file(str(artifact).encode(), params)
        if not self._model:
            raise UserError(f"llama.cpp refuses {artifact}{self._said()}")
        file_type = ctypes.create_string_buffer(16)
        self._lib.llama_model_meta_val_str(self._model, b"general.file_type", file_type, len(file_type))
        self._is_f32 = file_type.value == _FILE_TYPE_F32
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.bos = int(self._lib.llama_vocab_bos(self._vocab))
        self.adds_bos = bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    def facts(self) -> dict[str, Any]:
        """What a client may want to know about the file."""
        return {
            "vocab_size": self.vocab_size,
            "bos": self.bos,
            "adds_bos": self.adds_bos,
            "shows_hidden_states": True,
        }

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of int32 [n], from an empty cache."""
        self._require_context(len(tokens))
        self._decode(tokens, first=0, all_outputs=True)
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), self.vocab_size)).copy()

    def hidden_states(self, tokens: TokenArray, width: int) -> dict[str, FloatArray]:
        """Every f32 tensor [n, width] that the graph computes for int32 [n], by llama.cpp's name ("l_out-3").

        Through the scheduler's callback, which is asked before and called after every node.
        """
        found: dict[str, FloatArray] = {}
        values, nbytes = len(tokens) * width, 4 * len(tokens) * width

        def visit(tensor: int, ask: bool, _data: object) -> bool:
            wanted = self._lib.ggml_nelements(tensor) == values and self._lib.ggml_nbytes(tensor) == nbytes
            wanted = wanted and self._lib.ggml_is_contiguous(tensor)
            if wanted and not ask:
                states = np.empty((len(tokens), width), dtype=np.float32)
                self._lib.ggml_backend_tensor_get(tensor, states.ctypes.data, 0, nbytes)
                name = self._lib.ggml_get_name(tensor).decode(errors="replace")
                found[f"{name}#{len(found)}" if name in found else name] = states
            return wanted or not ask  # False after a node would stop the computation

        callback = c.EvalCallback(visit)
        self._require_context(len(tokens), callback)
        try:
            self._decode(tokens, first=0, all_outputs=True)
        finally:
            self._free_context()  # it holds the callback
        return found

    def generate(self, tokens: TokenArray, max_new: int) -> list[int]:
        """Greedy continuation of int32 [n]: up to `max_new` tokens, the end-of-generation token not included."""
        self._require_context(len(tokens) + max_new)
        generated: list[int] = []
        step, first = tokens, 0
        for _ in range(max_new):
            self._decode(step, first, all_outputs=False)
            pointer = self._lib.llama_get_logits_ith(self._context, -1)
            token = int(np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).argmax())
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            generated.append(token)
            first += len(step)
            step = np.array([token], dtype=np.int32)
        return generated

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text; `add_special` puts BOS/EOS as the file says, `parse_special` reads control tokens."""
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        arguments = (raw, len(raw), buffer, len(buffer), add_special, parse_special)
        count = self._lib.llama_tokenize(self._vocab, *arguments)
        if count < 0:
            raise UserError(f"llama.cpp could not tokenize a text of {len(raw)} bytes (code {count})")
        return list(buffer[:count])

    def detokenize(self, tokens: TokenArray) -> str:
        """Text of int32 [n], control tokens left out."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens.tolist())
        size = 64 + 16 * len(tokens)
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._lib.llama_detokenize(self._vocab, ids, len(tokens), buffer, size, False, False)
            if count >= 0:
                return buffer.raw[:count].decode(errors="replace")
            size = -count

    def close(self) -> None:
        """Free context and model."""
        self._free_context()
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = None

    def _free_context(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._context = None

    def _on_log(self, level: int, text: bytes, _data: object) -> None:
        if level == c.LOG_LEVEL_ERROR and text.strip():
            # Cut: it may quote a text of any length from a damaged file.
            self._errors.append(" ".join(text.decode(errors="replace").split())[:_LONGEST_MESSAGE])

    def _said(self) -> str:
        return f": {'; '.join(self._errors)}" if self._errors else ""

    def _require_context(self, positions: int, callback: Any = None) -> None:
        """An empty context of at least that many positions; kept between windows of one size, unless it calls back."""
        size = -(-positions // _CONTEXT_STEP) * _CONTEXT_STEP
        if self._context and self._context_size == size and callback is None:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            return
        self._free_context()
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_outputs_max = params.n_outputs_max_per_seq = size
        params.n_ubatch = MICRO_BATCH
        params.n_threads = params.n_threads_batch = 1
        if callback is not None:
            params.cb_eval = ctypes.cast(callback, ctypes.c_void_p)
        if self._cache_types is not None:
            params.type_k, params.type_v = (_CACHE_TYPES[name] for name in self._cache_types)
            if params.type_v != _CACHE_TYPES["f16"]:
                params.flash_attn_type = _FLASH_ATTENTION_ON
        elif self._is_f32:
            params.flash_attn_type = _FLASH_ATTENTION_OFF
            params.type_k = params.type_v = _GGML_F32
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(f"llama.cpp cannot make a context of {size} tokens{self._said()}")
        self._context_size = size
        self._check_context(size)

    def _check_context(self, size: int) -> None:
        """The context really has what was asked for: the last guard against a struct that does not match."""
        asked = {"n_ctx": size, "n_batch": size, "n_ubatch": min(MICRO_BATCH, size), "n_threads": 1}
        asked["n_threads_batch"] = 1
        read = {
            "n_ctx": self._lib.llama_n_ctx,
            "n_batch": self._lib.llama_n_batch,
            "n_ubatch": self._lib.llama_n_ubatch,
            "n_threads": self._lib.llama_n_threads,
            "n_threads_batch": self._lib.llama_n_threads_batch,
        }
        found = {name: int(function(self._context)) for name, function in read.items()}
        if found != asked:
            raise UserError(f"llama.cpp did not take our parameters (asked {asked}, got {found}); {c.INSTALL}")

    def _decode(self, tokens: TokenArray, first: int, all_outputs: bool) -> None:
        """Run tokens at positions first, first+1, …; outputs at all of them, or at the last one."""
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(outside):
            raise UserError(f"token {int(outside[0])} is outside the artifact's vocabulary of {self.vocab_size}")
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            for i, token in enumerate(tokens.tolist()):
                batch.token[i] = token
                batch.pos[i] = first + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = all_outputs or i == len(tokens) - 1
            batch.n_tokens = len(tokens)
            code = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if code != 0:
            raise UserError(f"llama.cpp could not run the model (llama_decode gave {code}){self._said()}")


def ggml_to_float(type_number: int, data: NDArray[np.uint8], count: int) -> FloatArray:
    """f32 [count] values of packed blocks, by libggml's own dequantizer.

    Args:
        type_number: ggml_type.
        data: u8, contiguous: whole blocks, as many as `count` values take.
    Raises:
        UserError: a type that libggml cannot dequantize, or data of another length.
    """
    library = c.load_library()
    if type_number == _GGML_F32 and data.size == 4 * count:
        return data.view("<f4").copy()
    if not 0 <= type_number < _TYPE_COUNT:
        raise UserError(f"libggml knows no tensor type {type_number}")
    traits = library.ggml_get_type_traits(type_number).contents
    block, size = traits.blck_size, traits.type_size
    if not block or count % block or data.size != count // block * size or count >= _MAX_VALUES:
        raise UserError(f"{data.size} bytes are not {count} values of tensor type {type_number}")
    if not traits.to_float:
        raise UserError(f"libggml has no dequantizer for tensor type {type_number}")
    out = np.empty(count, dtype=np.float32)
    c.ToFloat(traits.to_float)(data.ctypes.data, out.ctypes.data, count)
    return out


ENGINE = LlamaCppEngine
