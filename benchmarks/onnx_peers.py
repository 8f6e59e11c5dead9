"""The yardsticks of ONNX: ONNX Runtime's own weight quantizers and onnxruntime-genai's int4 builder.

    python -m benchmarks.onnx_peers float.onnx out.onnx k_quant --bits 4 --block-size 32   # one quantizer, one graph

ONNX Runtime's `matmul_nbits_quantizer` gets the graph that our export starts from (the builder's fp32 graph) and rounds
its decoder matrices; embedding and output head are left out of its work, and are compared as our run stores them, so
that the rows of one scheme differ in the decoder matrices alone. The builder's own int4 folders are scored as they
come: it rounds the head too, and an embedding that is not tied to it stays in f32, so their bytes differ. Every weight
is what ONNX Runtime's kernel computes from the file. Of 2 bits there are DEFAULT and HQQ only.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.builder_names import EMBEDDING, HEAD, parameters_of
from benchmarks.measure import Cost, run_measured
from exporters.onnx.artifact.reader import Artifact, open_artifact
from exporters.onnx.bindings import quantized_initializers
from exporters.onnx.routes import builder
from runtime_tests.runtimes.onnx_weights import dequantize_operands

HEAD_NODE = "/lm_head/MatMul"
# Quantizer → bits that it packs. RTN and k_quant write float weights for anything but 4 and 8 bits.
QUANTIZERS = {
    "default": (2, 4, 8),
    "default-asym": (2, 4, 8),
    "rtn": (4, 8),
    "rtn-asym": (4, 8),
    "k_quant": (4, 8),
    "hqq": (2, 4),
}
# The builder's `algo_config`: its default, and its best for small models.
BUILDER_METHODS = {"genai-int4": "default", "genai-int4-k_quant_mixed": "k_quant_mixed"}


@dataclass(frozen=True)
class PeerWeights:
    """What a peer's file holds.

    Attributes:
        weights: Hugging Face parameter → f32 weights; the parameters that the graph holds as codes (or, of a whole
            folder, embedding and head too).
        bytes: stored bytes of them: codes, scales and zero points, or floats.
    """

    weights: dict[str, Tensor]
    bytes: int


def block_scheme(scheme: str) -> tuple[int, int] | None:
    """(bits, block size) of the ONNX part of a scheme; None where it has none, or peers have nothing like it.

    >>> block_scheme("gguf:q4_0,onnx:w4g32")
    (4, 32)
    """
    match = re.search(r"onnx:w(\d)g(\d+)", scheme)
    return None if match is None or match[1] == "3" else (int(match[1]), int(match[2]))


def write_float_graph(model: Path, folder: Path) -> Path:
    """The builder's fp32 graph of a Hugging Face model in `folder`; kept when it is there already."""
    if not (folder / "model.onnx").is_file():
        builder.write_float_graph(model, folder)
    return folder / "model.onnx"


def quantize(source: Path, out: Path, quantizer: str, bits: int, block_size: int) -> Cost:
    """Run one of ONNX Runtime's quantizers on a float graph in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.onnx_peers", str(source), str(out), quantizer]
    return run_measured([*command, "--bits", str(bits), "--block-size", str(block_size)], out.parent / "log.txt")


def build_int4(model: Path, out: Path, method: str, block_size: int) -> Cost:
    """Run onnxruntime-genai's builder as its users do: int4 for the CPU."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out, "-p", "int4"]
    command += ["-e", "cpu", "-c", out.parent / "cache", "--extra_options", "hf_token=false"]
    command += [f"algo_config={method}", f"block_size={block_size}"]
    return run_measured(list(map(str, command)), out.parent / f"{out.name}.log", {"HF_HUB_OFFLINE": "1"})


def read_weights(file: Path, whole: bool) -> PeerWeights:
    """Every quantized matrix of a graph with the builder's structure, through ONNX Runtime's kernels.

    Args:
        file: a folder or .onnx file that any of the peers wrote.
        whole: also the embedding, and a head that is not quantized. Norms are never counted.
    """
    artifact = open_artifact(file)
    weights: dict[str, Tensor] = {}
    size = 0
    for node in artifact.quantized_nodes():
        stored = quantized_initializers(node)
        names = parameters_of(_float_name(stored["weight"]))
        if not names:
            raise ValueError(f"{file}: initializer {stored['weight']} holds no parameter that is known")
        matrix = torch.from_numpy(_dequantize(artifact, node))
        size += sum(artifact.array(name).nbytes for name in stored.values())
        weights |= dict(zip(names, _split(matrix, names, artifact), strict=True))
    for name in artifact.graph.initializers if whole else ():
        parameters = parameters_of(name)
        if parameters in ((EMBEDDING,), (HEAD,)):
            array = artifact.array(name)
            size += array.nbytes
            weights[parameters[0]] = torch.from_numpy(array.T if parameters == (HEAD,) else array).float().contiguous()
    if whole:
        weights.setdefault(EMBEDDING, weights[HEAD])  # a tied embedding reads the head's codes through a Reshape
    return PeerWeights(weights, size)


def _float_name(initializer: str) -> str:
    """The float initializer's name in what quantizers make of it: …MatMul.weight_Q4, …_Q4G32."""
    return re.sub(r"_Q\d(G\d+)?$", "", initializer)


def _dequantize(artifact: Artifact, node: ir.Node) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    operands = {role: artifact.array(name) for role, name in quantized_initializers(node).items()}
    rows = operands["weight"].shape[0]
    shaped = {role: a if role == "weight" else a.reshape(rows, -1) for role, a in operands.items()}
    attributes = {name: artifact.attribute(node, name) for name in ("bits", "block_size")}
    matrix = dequantize_operands(node.op_type, shaped, attributes)
    if node.op_type == "MatMulNBits":  # whose rows may end within their last block
        return matrix[:, : artifact.attribute(node, "K")]
    return matrix


def _split(matrix: Tensor, names: tuple[str, ...], artifact: Artifact) -> tuple[Tensor, ...]:
    """The rows of each parameter; of a packed QKV projection, keys and values have the same number."""
    if len(names) == 1:
        return (matrix,)
    attention = next(node for node in artifact.graph if node.op_type == "GroupQueryAttention")
    heads, of_keys = (attention.attributes[a].as_int() for a in ("num_heads", "kv_num_heads"))
    a_head = matrix.shape[0] // (heads + 2 * of_keys)
    return matrix.split([heads * a_head, of_keys * a_head, of_keys * a_head])


def main() -> None:
    """Command line: quantize one graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("quantizer", choices=QUANTIZERS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=32)
    args = parser.parse_args()
    _quantize_here(args.source, args.out, args.quantizer, args.bits, args.block_size)


def _quantize_here(source: Path, out: Path, quantizer: str, bits: int, block_size: int) -> None:
    from onnxruntime.quantization import matmul_nbits_quantizer as ort

    model = onnx.load(source)
    method, symmetric = quantizer.removesuffix("-asym"), not quantizer.endswith("-asym")
    nodes = {n.name: {"bits": bits} for n in model.graph.node if n.op_type == "MatMul"}
    configs = {
        "default": lambda: None,
        "rtn": lambda: ort.RTNWeightOnlyQuantConfig(customized_weight_config=nodes),
        "k_quant": lambda: ort.KQuantWeightOnlyQuantConfig(customized_weight_config=nodes),
        "hqq": lambda: ort.HQQWeightOnlyQuantConfig(block_size=block_size, bits=bits),
    }
    work = ort.MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=block_size,
        is_symmetric=symmetric,
        nodes_to_exclude=[HEAD_NODE],
        algo_config=configs[method](),
    )
    work.process()
    out.parent.mkdir(parents=True, exist_ok=True)
    data = out.with_name(out.name + ".data")
    data.unlink(missing_ok=True)
    onnx.save(work.model.model, out, save_as_external_data=True, location=data.name, size_threshold=1024)


if __name__ == "__main__":
    main()
