"""A run directory of a large Llama-shaped model with random codes, written part by part without a model behind it.

What it is exported to must load, and compute something.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime_tests.interface import Runtime
from signround_edge.demo import tiny_llama_path
from signround_edge.evaluation.metrics import FloatArray
from signround_edge.formats import QuantizedTensor, get_grid
from signround_edge.manifest import OUTSIDE, Manifest, TensorEntry
from signround_edge.run_directory import RunDirectory

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_SCALE_BITS = (0x0800, 0x1000)  # fp16 from 1.2e-4 to 4.9e-4


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the defaults are those of Llama 3 8B.

    Attributes:
        vocab: rows of embedding and head; those beyond tiny-llama's tokenizer become padding tokens.
        block_format, head_format: grids of the matrices (and the embedding), and of the output head.
    """

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256
    block_format: str = "Q4_0"
    head_format: str = "Q6_K"

    def entries(self) -> list[TensorEntry]:
        """Every parameter, in model order."""
        found = [self._matrix("model.embed_tokens.weight", OUTSIDE, self.vocab, self.hidden)]
        for index in range(self.layers):
            found += self._block(index)
        found.append(TensorEntry("model.norm.weight", OUTSIDE, [self.hidden], "float16"))
        head = TensorEntry("lm_head.weight", OUTSIDE, [self.vocab, self.hidden], "float16", self.head_format)
        return [*found, head]

    def parameters(self) -> int:
        """Weights in all."""
        return sum(math.prod(entry.shape) for entry in self.entries())

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "float16",
        }

    def _block(self, index: int) -> list[TensorEntry]:
        part, prefix = f"{index:04d}", f"model.layers.{index}"
        of_keys = self.hidden // self.heads * self.kv_heads
        sizes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (of_keys, self.hidden),
            "self_attn.v_proj": (of_keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        matrices = [self._matrix(f"{prefix}.{name}.weight", part, *size) for name, size in sizes.items()]
        norms = [f"{prefix}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        return matrices + [TensorEntry(name, part, [self.hidden], "float16") for name in norms]

    def _matrix(self, name: str, part: str, rows: int, cols: int) -> TensorEntry:
        return TensorEntry(name, part, [rows, cols], "float16", self.block_format)


def write_synthetic_run(out: Path, shape: Shape, seed: int = 0) -> RunDirectory:
    """Write a complete run directory at `out`, one part in memory at a time."""
    entries = shape.entries()
    parts = [f"{index:04d}" for index in range(shape.layers)] + [OUTSIDE]
    (out / "config").mkdir(parents=True)
    (out / "config" / "config.json").write_text(json.dumps(shape.config()))
    for name in _TOKENIZER_FILES:
        shutil.copy(tiny_llama_path() / name, out / "config" / name)
    manifest = Manifest(
        scheme=f"gguf:{shape.block_format.lower()}",
        targets=["gguf"],
        source={"model": f"synthetic-{shape.parameters() / 1e9:.1f}B", "files": {}},
        settings={"steps": 0, "seed": seed},
        versions={},
        parts=parts,
        tied={},
        tensors=entries,
    )
    run = RunDirectory.create(out, manifest)
    rng = np.random.default_rng(seed)
    for part in parts:
        run.write_part(part, {e.name: _random(e, rng) for e in entries if e.part == part}, {})
    return run


def finite_logits(runtime: Runtime, artifact: Path, vocab: int) -> FloatArray:
    """f32 [3, vocab] of three tokens, from an exported file of such a run; AssertionError where one is not finite."""
    with contextlib.closing(runtime.open(artifact)) as session:
        logits = session.logits(np.array([0, 5, 6], dtype=np.int32))
    assert logits.shape == (3, vocab)
    assert np.isfinite(logits).all()
    return logits


def _random(entry: TensorEntry, rng: np.random.Generator) -> Tensor | QuantizedTensor:
    """Codes and integer fields from all their values, scales of a size that weights have, norms around 1."""
    if entry.format is None:
        return torch.from_numpy(rng.normal(1, 0.1, entry.shape).astype(np.float16))
    grid = get_grid(entry.format)
    rows, cols = entry.shape
    codes = _integers(rng, (rows, cols), grid.code_dtype, grid.code_min, grid.code_max)
    fields = {}
    for name, (shape, dtype) in grid.field_shapes(rows, cols).items():
        if dtype == torch.float16:
            fields[name] = torch.from_numpy(rng.integers(*_SCALE_BITS, shape, dtype=np.int16)).view(torch.float16)
        else:
            limits = torch.iinfo(dtype)
            fields[name] = _integers(rng, shape, dtype, *grid.field_ranges.get(name, (limits.min, limits.max)))
    return QuantizedTensor(grid, codes, fields)


def _integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, low: int, high: int) -> Tensor:
    kind = np.int8 if dtype == torch.int8 else np.uint8
    return torch.from_numpy(rng.integers(low, high, shape, dtype=kind, endpoint=True))
