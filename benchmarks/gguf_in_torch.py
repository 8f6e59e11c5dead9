"""Score a peer's Llama-architecture GGUF file in torch: its weights dequantized by libggml, the graph transformers'.

So files of different tools are compared on their weights alone, without a runtime's own activation rounding.

    python benchmarks/gguf_in_torch.py FILE.gguf --model HF_FOLDER --text TEXT [--windows 24] [--n-ctx 512]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import gguf
import torch
from torch import Tensor, nn

from exporters.gguf.container.reader import GgufFile
from runtime_tests.worker.llama_cpp_engine import ggml_to_float
from signround_edge.evaluation.perplexity import TorchSession, evaluate, text_windows
from signround_edge.evaluation.torch_models import load_source_model
from signround_edge.model.decoder import build_decoder
from signround_edge.schemes.gguf_names import name_table


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo the row order of q and k that llama.cpp's converter makes for Llama (pairs → halves)."""
    rows, cols = weight.shape
    return weight.view(heads, rows // heads // 2, 2, cols).transpose(1, 2).reshape(rows, cols)


def load_llama_gguf(file: Path, config_dir: Path) -> nn.Module:
    """The HF model of config_dir with the dequantized weights of a GGUF file, f32."""
    decoder = build_decoder(config_dir)
    config = decoder.model.config
    names = name_table(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = GgufFile.open(file)
    for name, _ in list(decoder.model.named_parameters()):
        info = stored.tensors.get(names.get_name(name, try_suffixes=(".weight", ".bias")) or "")
        if info is None:
            continue  # a tied head
        values = ggml_to_float(info.ggml_type.number, stored.raw(info.name).reshape(-1), math.prod(info.shape))
        data = torch.from_numpy(values).view(info.shape)
        if ".q_proj." in name:
            data = unpermute(data, config.num_attention_heads)
        elif ".k_proj." in name:
            data = unpermute(data, config.num_key_value_heads)
        owner, _, leaf = name.rpartition(".")
        decoder.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(data.float(), requires_grad=False)
    decoder.model.tie_weights()
    return decoder.model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--n-ctx", type=int, default=512)
    args = parser.parse_args()
    windows = text_windows(args.model, args.text, args.n_ctx, args.windows)
    peer = TorchSession(load_llama_gguf(args.file, args.model))
    scores = evaluate(peer, windows, TorchSession(load_source_model(args.model)))
    types: dict[str, int] = {}
    for info in GgufFile.open(args.file).tensors.values():
        types[info.ggml_type.name] = types.get(info.ggml_type.name, 0) + info.nbytes
    print(json.dumps({"file": str(args.file), "bytes_by_type": types, **asdict(scores)}, indent=1))


if __name__ == "__main__":
    main()
