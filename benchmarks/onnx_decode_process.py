"""One folder decoded once by onnxruntime-genai, for `onnx_decode`; it imports little, so that memory is the model's.

python -m benchmarks.onnx_decode_process FOLDER PROMPT_TOKENS DECODED_TOKENS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

_MEMORY = {"resident_mb": "VmRSS", "peak_mb": "VmHWM"}


def decode(folder: str, prompt: int, tokens: int) -> dict[str, float]:
    """Load a folder, decode greedily on one thread; speed after the first token, and memory at the end."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    began = time.process_time()
    model = og.Model(config)
    loaded = time.process_time() - began
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=prompt + tokens, min_length=prompt + tokens, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens([5 + i % 200 for i in range(prompt)])
    generator.generate_next_token()  # the first token takes the prompt's time
    began, began_cpu = time.perf_counter(), time.process_time()
    count = 0
    while not generator.is_done():
        generator.generate_next_token()
        count += 1
    speed = {"tokens_per_s": count / (time.perf_counter() - began)}
    speed |= {"tokens_per_cpu_s": count / (time.process_time() - began_cpu)}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {name: int(status[key].split()[0]) * 1024 / 1e6 for name, key in _MEMORY.items()}
    return {**speed, "load_cpu_s": loaded, **memory}


if __name__ == "__main__":
    print(json.dumps(decode(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
