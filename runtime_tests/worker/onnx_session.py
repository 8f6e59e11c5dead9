"""How every ONNX Runtime session of verify is made: CPU, one thread, silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


# At which accuracy level ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits; its own default is 4.
FUSED_LEVEL = "session.qdq_matmulnbits_accuracy_level"


def cpu_session(model: Path | bytes, data_folder: Path | None = None, fused_level: int = 0) -> Any:
    """An InferenceSession on a file, or on a model in memory whose external data lies in `data_folder`.

    Args:
        fused_level: accuracy level of graphs of standard operators (DequantizeLinear and MatMul).
    Raises:
        Exception: whatever ONNX Runtime raises; its error classes share no other base.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry(FUSED_LEVEL, str(fused_level))
    if data_folder is not None:
        options.add_session_config_entry(_EXTERNAL_DATA_FOLDER, str(data_folder))
    content = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
