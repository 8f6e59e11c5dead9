"""What transformers warns of while a model is built stays out of our lines."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from transformers import AutoConfig

from signround_edge.demo import tiny_llama_path
from signround_edge.model.decoder import transformers_model


def test_a_factor_of_yarn_beside_other_lengths_is_no_line_of_ours(tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama_path(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 256}
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        for factor in (17.0, 18.0):  # it warns of each once
            changed = {**config, "rope_parameters": {**rope, "factor": factor}}
            (model / "config.json").write_text(json.dumps(changed))
            if factor == 17.0:
                AutoConfig.from_pretrained(model)
                assert "17.0" in heard.pop().getMessage()
            else:
                transformers_model(model)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert heard == []
