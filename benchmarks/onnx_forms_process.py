"""One exported folder in one runtime, for `onnx_forms`: its greedy text, and how fast it decodes, on one thread.

python -m benchmarks.onnx_forms_process FOLDER RUNTIME PROMPT COUNT DECODED

PROMPT are token numbers with commas between, COUNT the tokens of the text (fewer where it ends; 0 for none), DECODED
those that are timed, which do not end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime_tests.worker.onnx_feeds import feed_of
from runtime_tests.worker.onnxruntime_engine import decoder_config, exported_folder, fused_level, model_file

Arrays = dict[str, NDArray[Any]]
_STATE = "past"


class Decoder(Protocol):
    """A graph that is fed greedily."""

    def greedy(self, prompt: list[int], count: int, ends: list[int], after_first: Callable[[], None]) -> list[int]:
        """At most `count` tokens, the last one of `ends` where one comes; calls `after_first` behind the prompt."""
        ...


class GraphDecoder:
    """A graph in ONNX Runtime or OpenVINO. Without states in it, the whole text goes in for each token.

    Args:
        inputs: name → type as ONNX Runtime says it, and shape.
        run: feeds → outputs by name.
    """

    def __init__(self, folder: Path, inputs: dict[str, tuple[str, list[Any]]], run: Callable[[Arrays], Arrays]) -> None:
        self._folder, self._inputs, self._run = folder, inputs, run
        self._config = decoder_config(folder)

    def greedy(self, prompt: list[int], count: int, ends: list[int], after_first: Callable[[], None]) -> list[int]:
        text, new, found = list(prompt), list(prompt), [0] * 0
        states = {name: self._feed(name, new, 0) for name in self._inputs if name.startswith(_STATE)}
        while len(found) < count and not (found and found[-1] in ends):
            named = [name for name in self._inputs if not name.startswith(_STATE)]
            outputs = self._run({name: self._feed(name, new, len(text) - len(new)) for name in named} | states)
            states = {name: outputs[f"present.{name.partition('.')[2]}"] for name in states}
            found.append(int(outputs["logits"][0, -1].argmax()))
            text.append(found[-1])
            new = found[-1:] if states else text
            if len(found) == 1:
                after_first()
        return found

    def _feed(self, name: str, tokens: list[int], past: int) -> NDArray[Any]:
        type_, shape = self._inputs[name]
        return feed_of(self._folder, name, type_, shape, np.array(tokens), self._config, past)


class GenaiDecoder:
    """A folder in onnxruntime-genai."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
        self._model, self._og = og.Model(config), og

    def greedy(self, prompt: list[int], count: int, ends: list[int], after_first: Callable[[], None]) -> list[int]:
        params = self._og.GeneratorParams(self._model)
        length = len(prompt) + count
        params.set_search_options(max_length=length, do_sample=False, **({} if ends else {"min_length": length}))
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(prompt)
        found: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
            if len(found) == 1:
                after_first()
        return found


def open_decoder(folder: Path, runtime: str) -> Decoder:
    """The folder in onnxruntime-genai, onnxruntime or openvino, on one thread of the CPU."""
    if runtime == "onnxruntime-genai":
        return GenaiDecoder(folder)
    model = model_file(folder)
    if runtime == "openvino":
        return _in_openvino(folder, model)
    from runtime_tests.worker.onnx_session import cpu_session

    session = cpu_session(model, None, fused_level(decoder_config(exported_folder(model))))
    inputs = {i.name: (i.type, list(i.shape)) for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return GraphDecoder(folder, inputs, lambda feeds: dict(zip(names, session.run(None, feeds), strict=True)))


def _in_openvino(folder: Path, model: Path) -> Decoder:
    from runtime_tests.worker.openvino_engine import compile_in_floats, input_form

    compiled = compile_in_floats(str(model), f"OpenVINO refuses {model}")

    def run(feeds: Arrays) -> Arrays:
        results = compiled(feeds, share_inputs=True)
        return {output.get_any_name(): np.array(results[output]) for output in compiled.outputs}

    return GraphDecoder(folder, {i.get_any_name(): input_form(i) for i in compiled.inputs}, run)


def measure(folder: Path, runtime: str, prompt: list[int], count: int, decoded: int) -> dict[str, Any]:
    """`tokens` of the text; tokens a second, of CPU time and by the clock, after the first one."""
    config = folder / "genai_config.json"
    named = json.loads(config.read_text())["model"]["eos_token_id"] if config.is_file() else -1
    decoder = open_decoder(folder, runtime)
    tokens = decoder.greedy(prompt, count, np.atleast_1d(named).tolist(), lambda: None) if count else []
    began = [0.0, 0.0]

    def start() -> None:
        began[:] = time.process_time(), time.perf_counter()

    decoder.greedy(prompt, decoded, [], start)
    cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
    return {"tokens": tokens, "tokens_per_cpu_s": (decoded - 1) / cpu, "tokens_per_s": (decoded - 1) / wall}


if __name__ == "__main__":
    where, which, start_of_text, *numbers = sys.argv[1:]
    print(json.dumps(measure(Path(where), which, [int(t) for t in start_of_text.split(",")], *map(int, numbers))))
