"""ctypes declarations of llama.cpp build b11549, the shared object inside PyPI's `xllamacpp` 2026.10.11549.

This file is declarations and checks, no logic. llama.h changes its structs between builds without notice, so another
version of the package is refused, and so is a library whose default parameters do not sit at the expected offsets.

Source: include/llama.h and ggml/include/ggml.h (MIT). The offsets were read off the defaults that the library returns;
the one member that the public header of that time does not name is kept as `reserved`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

from signround_edge.errors import UserError

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"
INSTALL = f"pip install {PACKAGE}=={VERSION}"

LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
# bool ggml_backend_sched_eval_callback(struct ggml_tensor * t, bool ask, void * user_data)
EvalCallback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(ctypes.Structure):
    """struct llama_context_params."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", ctypes.c_int),
        ("rope_scaling_type", ctypes.c_int),
        ("pooling_type", ctypes.c_int),
        ("attention_type", ctypes.c_int),
        ("flash_attn_type", ctypes.c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("reserved", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(ctypes.Structure):
    """struct llama_batch, filled by `llama_batch_init`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits, up to the member that is used."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
    )


# void to_float(const void * x, float * y, int64_t k)
ToFloat = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)

# What the library's default parameters hold, field by field: the check that our structs are its structs.
MODEL_DEFAULTS: dict[str, object] = {
    **{name: None for name, kind in ModelParams._fields_ if kind is c_void_p},
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
CONTEXT_DEFAULTS: dict[str, object] = {
    **{name: None for name, kind in ContextParams._fields_ if kind is c_void_p},
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "n_samplers": 0,
}

# name → (result, arguments)
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "llama_backend_init": (None, []),
    "llama_backend_free": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "ggml_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_n_threads_batch": (c_int32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, ctypes.c_size_t]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "ggml_get_name": (c_char_p, [c_void_p]),
    "ggml_nelements": (c_int64, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_is_contiguous": (c_bool, [c_void_p]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_get_type_traits": (POINTER(TypeTraits), [ctypes.c_int]),
}


def why_unavailable() -> str | None:
    """Why the library cannot be used here, with the way out; None when it is installed in the right version."""
    try:
        installed = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {PACKAGE} is not installed ({INSTALL})"
    if installed != VERSION:
        return f"{PACKAGE} {installed} is installed, but its C structs are only known for {VERSION} ({INSTALL})"
    if _shared_object() is None:
        return f"{PACKAGE} {installed} holds no shared object for this platform ({INSTALL})"
    return None


def load_library() -> ctypes.CDLL:
    """The library with every used function declared.

    Raises:
        UserError: not installed, another version, or its structs are not the declared ones.
    """
    problem = why_unavailable()
    path = _shared_object()
    if problem is not None or path is None:
        raise UserError(f"llama.cpp cannot run here: {problem}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"llama.cpp cannot run here: {path.name} does not load ({error}); {INSTALL}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)  # unlike library[name], this keeps the declaration
        except AttributeError as error:
            raise UserError(f"llama.cpp cannot run here: {path.name} has no function {name}; {INSTALL}") from error
        function.restype = result
        function.argtypes = arguments
    _check_defaults(library.llama_model_default_params(), MODEL_DEFAULTS)
    _check_defaults(library.llama_context_default_params(), CONTEXT_DEFAULTS)
    _check_type_traits(library)
    return library


def _shared_object() -> Path | None:
    """The package's extension module; it is not imported, only loaded as a library."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for pattern in (f"{PACKAGE}*.so", f"{PACKAGE}*.pyd", f"{PACKAGE}*.dylib"):
            found = sorted(Path(folder).glob(pattern))
            if found:
                return found[0]
    return None


def _check_defaults(params: ctypes.Structure, expected: dict[str, object]) -> None:
    found = {name: getattr(params, name) for name in expected}
    wrong = [f"{name} is {found[name]}, not {value}" for name, value in expected.items() if found[name] != value]
    if wrong:
        raise UserError(
            f"llama.cpp cannot run here: {type(params).__name__} of the installed {PACKAGE} has another layout "
            f"({'; '.join(wrong[:3])}); {INSTALL}"
        )


def _check_type_traits(library: ctypes.CDLL) -> None:
    """Q4_0 (type 2) and Q8_0 (type 8): name, block and bytes must be what the GGUF format fixes for ever."""
    for number, name, block, size in ((2, b"q4_0", 32, 18), (8, b"q8_0", 32, 34)):
        traits = library.ggml_get_type_traits(number).contents
        found = (traits.type_name, traits.blck_size, traits.type_size, traits.is_quantized)
        if found != (name, block, size, True) or not traits.to_float:
            raise UserError(f"llama.cpp cannot run here: ggml_type_traits has another layout ({found}); {INSTALL}")
