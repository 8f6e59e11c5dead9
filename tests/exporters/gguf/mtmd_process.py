"""llama.cpp's multimodal library in a process of its own: `python -m … TEXT.gguf MMPROJ.gguf IMAGE.npy OUT.npy`.

IMAGE is uint8 [height, width, 3]. OUT gets the embeddings that the language model would be given, f32 [tokens, width];
"M-RoPE" is printed where its tokens have a place in each dimension.
Source: tools/mtmd/mtmd.h of the build that `llama_cpp_bindings` names.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p

import numpy as np

from runtime_tests.worker.llama_cpp_bindings import load_library

_IMAGE = 1  # MTMD_INPUT_CHUNK_TYPE_IMAGE


class Params(ctypes.Structure):
    """struct mtmd_context_params."""

    _fields_ = (
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", c_int),
        ("warmup", c_bool),
        ("image_min_tokens", c_int),
        ("image_max_tokens", c_int),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
    )


class Text(ctypes.Structure):
    """struct mtmd_input_text."""

    _fields_ = (("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool))


_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "llama_model_n_embd_inp": (c_int32, [c_void_p]),
    "mtmd_default_marker": (c_char_p, []),
    "mtmd_context_params_default": (Params, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, c_void_p, Params]),
    "mtmd_decode_use_mrope": (c_bool, [c_void_p]),
    "mtmd_free": (None, [c_void_p]),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_char_p]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunk_get_type": (c_int, [c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(Text), POINTER(c_void_p), c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
}


def main(text_file: str, mmproj: str, image_file: str, out: str) -> None:
    """Load both files and encode the image."""
    library = load_library()
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    model = library.llama_model_load_from_file(os.fsencode(text_file), library.llama_model_default_params())
    assert model, "the text file does not load"
    params = library.mtmd_context_params_default()
    marker = library.mtmd_default_marker()
    assert (params.media_marker, params.batch_max_tokens, params.n_threads) == (marker, 1024, 4), "another struct"
    params.use_gpu, params.warmup, params.n_threads = False, False, 1
    context = library.mtmd_init_from_file(os.fsencode(mmproj), model, params)
    assert context, "the mmproj file does not load"
    image = np.load(image_file)
    bitmap = c_void_p(library.mtmd_bitmap_init(image.shape[1], image.shape[0], image.tobytes()))
    chunks = library.mtmd_input_chunks_init()
    text = Text(marker, len(marker), False, True)
    assert library.mtmd_tokenize(context, chunks, ctypes.byref(text), ctypes.byref(bitmap), 1) == 0
    width = library.llama_model_n_embd_inp(model)
    found = []
    for index in range(library.mtmd_input_chunks_size(chunks)):
        chunk = library.mtmd_input_chunks_get(chunks, index)
        if library.mtmd_input_chunk_get_type(chunk) == _IMAGE:
            assert library.mtmd_encode_chunk(context, chunk) == 0
            tokens = library.mtmd_input_chunk_get_n_tokens(chunk)
            values = np.ctypeslib.as_array(library.mtmd_get_output_embd(context), (tokens, width))
            found.append(values.copy())
    np.save(out, np.concatenate(found))
    if library.mtmd_decode_use_mrope(context):
        print("M-RoPE")
    library.mtmd_free(context)
    library.llama_model_free(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
