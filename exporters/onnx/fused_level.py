"""The accuracy level of a graph of standard operators, which its nodes cannot say.

ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits when it loads the graph, at the level of a session's
option, whose default is 4: activations rounded to int8 (kOrtSessionOptionsQDQMatMulNBitsAccuracyLevel in
onnxruntime_session_options_config_keys.h). onnxruntime-genai passes such options on from genai_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from signround_edge.errors import UserError

FUSED_LEVEL = "session.qdq_matmulnbits_accuracy_level"


def set_fused_level(genai_config: Path, level: int) -> None:
    """Write the option into genai_config.json, where there is one.

    Raises:
        UserError: another level than 0 is asked for, and no file can say it.
    """
    if not genai_config.is_file():
        if level:
            raise UserError(
                f"--accuracy-level {level} with --operators qdq needs a genai_config.json, and this graph has none; "
                f"leave it out and set {FUSED_LEVEL} in your app's session options"
            )
        return
    config = json.loads(genai_config.read_text(encoding="utf-8"))
    config["model"]["decoder"].setdefault("session_options", {})[FUSED_LEVEL] = str(level)
    genai_config.write_text(json.dumps(config, indent=4), encoding="utf-8")
