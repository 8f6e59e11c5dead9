"""A process that prints what llama.cpp says that its contexts take: python -m tests.planning.llama_cpp_memory FILE.

Its log is the only place that tells, and belongs to the whole process.
"""

from __future__ import annotations

import json
import re
import sys

from runtime_tests.worker import llama_cpp_bindings as c

CONTEXTS = (512, 4096, 8192)
_TYPES = {"f16": 1, "q8_0": 8}
_MIB = 2**20


def main() -> None:
    """One JSON object: "f16 512" → [bytes of caches and states, bytes of buffers]."""
    library, lines = c.load_library(), []

    @c.LogCallback
    def keep(_level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode(errors="replace"))

    library.llama_log_set(keep, None)
    library.ggml_log_set(keep, None)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(sys.argv[1].encode(), library.llama_model_default_params())
    assert model, "".join(lines)
    found = {}
    for name, number in _TYPES.items():
        for context in CONTEXTS:
            params = library.llama_context_default_params()
            params.n_ctx, params.type_k, params.type_v = context, number, number
            params.swa_full = False  # as llama.cpp's own programs have it
            lines.clear()
            made = library.llama_init_from_model(model, params)
            assert made, "".join(lines)
            said = "".join(lines)
            found[f"{name} {context}"] = [
                sum(float(size) for size in re.findall(rf"(?:{kinds}) buffer size\s*=\s*([\d.]+) MiB", said)) * _MIB
                for kinds in ("KV|RS", "compute|output")
            ]
            library.llama_free(made)
    library.llama_model_free(model)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
