"""onnxruntime-genai inside this process, one thread. Only the worker uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from runtime_tests.worker.cached_steps import cached_parts
from runtime_tests.worker.onnxruntime_engine import exported_folder, model_file
from signround_edge.errors import UserError, first_line
from signround_edge.evaluation.metrics import FloatArray, TokenArray

_CONFIG = "genai_config.json"
_ONE_THREAD = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}


class GenaiEngine:
    """A folder loaded as an app loads it: by its genai_config.json.

    Raises:
        UserError: there is no such file, or onnxruntime-genai refuses the folder.
    """

    def __init__(self, artifact: Path) -> None:
        import onnxruntime_genai as genai

        folder = exported_folder(model_file(artifact))
        if not (folder / _CONFIG).is_file():
            raise UserError(
                f"{artifact} has no {_CONFIG}: its graph has no KV cache and runs in plain ONNX Runtime only"
            )
        self._genai: Any = genai
        self._artifact = artifact
        try:
            config = genai.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": _ONE_THREAD}}}))
            self._model = genai.Model(config)
        except Exception as error:  # its errors are of RuntimeError's and of its own classes
            raise UserError(f"onnxruntime-genai refuses {folder}: {first_line(error)}") from error
        content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        self._vocab_size: int | None = content["model"].get("vocab_size")

    def facts(self) -> dict[str, Any]:
        """What a client may want to know about the file."""
        return {"vocab_size": self._vocab_size}

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of int32 [n], from an empty cache.

        The last tokens are fed one by one.
        """
        try:
            params = self._genai.GeneratorParams(self._model)
            params.set_search_options(max_length=len(tokens) + 1, do_sample=False)
            generator = self._genai.Generator(self._model, params)
            parts = []
            for part in cached_parts(len(tokens)):
                generator.append_tokens(tokens[part].reshape(1, -1))
                parts.append(np.array(generator.get_output("logits")))
        except Exception as error:
            raise UserError(f"onnxruntime-genai could not run {self._artifact}: {first_line(error)}") from error
        logits = np.concatenate(parts, axis=1)
        if logits.shape[:2] != (1, len(tokens)):
            raise UserError(f"{self._artifact} gives logits of shape {list(logits.shape)} for {len(tokens)} tokens")
        result: FloatArray = logits[0].astype(np.float32)
        return result


ENGINE = GenaiEngine
