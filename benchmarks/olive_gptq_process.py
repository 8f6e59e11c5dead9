"""Runs in Olive's environment (see `benchmarks.olive_gptq`): its GPTQ pass on given samples.

python olive_gptq_process.py MODEL TOKENS.safetensors BITS BLOCK_SIZE OUT_FOLDER WEIGHTS.safetensors
"""

import sys
from pathlib import Path

import olive.passes.pytorch.quant_utils as olive_quant_utils
import torch
from olive.common.quant.utils import WeightQuantizer, unpack_from_uint8
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.gptq import Gptq
from safetensors.torch import load_file, save_file


def main() -> None:
    """Command line."""
    model, tokens, bits, block_size, out, weights = sys.argv[1:]
    samples = load_file(tokens)["tokens"]
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in samples]
    # Its data pipeline loads and cuts texts in its own way; the samples are to be ours.
    olive_quant_utils.get_calibration_dataset = lambda *_, **__: batches
    data = {"name": "ours", "type": "HuggingfaceContainer"}
    config = {"bits": int(bits), "group_size": int(block_size), "sym": False, "data_config": data}
    create_pass_from_dict(Gptq, config, disable_search=True).run(HfModelHandler(model), out)
    save_file(dequantized(Path(out), int(bits), int(block_size)), weights)


def dequantized(folder: Path, bits: int, block_size: int) -> dict[str, torch.Tensor]:
    """Parameter → weight f32 [out, in] of all that Olive has quantized: (code − zero point)·scale."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    quantizer = WeightQuantizer(bits, symmetric=False, group_size=block_size)
    found = {}
    for name in [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]:
        scales = stored[name + ".scales"].float()
        shape = (scales.shape[0], scales.shape[1] * block_size)
        codes = unpack_from_uint8(stored[name + ".qweight"], bits, shape)
        zeros = unpack_from_uint8(stored[name + ".qzeros"], bits, tuple(scales.shape))
        found[name + ".weight"] = quantizer.dequantize(codes, scales, zeros).contiguous()
    return found


if __name__ == "__main__":
    main()
