"""Run directories and tiny models for tests, made without the tuner: every weight rounded to nearest on its grid."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from signround_edge.files import sha256_of
from signround_edge.formats import Grid, QuantizedTensor
from signround_edge.manifest import OUTSIDE, Manifest, TensorEntry
from signround_edge.model.decoder import set_tensor
from signround_edge.model.experts import fused_experts, replace_experts
from signround_edge.run_directory import RunDirectory, dtype_name
from signround_edge.schemes.gguf_presets import ModelTraits, Place, Role
from signround_edge.schemes.scheme import Scheme, after_fallback, parse_scheme
from signround_edge.tuning.cost.record import COSTS_FILE

CONFIG_SUFFIXES = (".json", ".jinja", ".model", ".txt")


# Of small random models, for the configs of transformers; ids of special tokens where theirs are beyond the vocabulary.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def save_random_model(config: PretrainedConfig, out: Path, tokenizer_from: Path | None = None, seed: int = 0) -> Path:
    """Save a randomly initialised model (f32) in Hugging Face layout, with another model's tokenizer files beside it.

    Norm weights and biases are drawn too (their initial values, all 1 and all 0, would hide errors in a mapping).
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    if tokenizer_from is not None:
        for file in tokenizer_from.iterdir():
            if file.name.startswith(
                ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")
            ):
                shutil.copy(file, out / file.name)
    return out


def make_run(model_dir: Path, out: Path, scheme: str | Scheme) -> RunDirectory:
    """Round a Hugging Face model to nearest (with the grids' scale search) into a complete run directory at `out`."""
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    split_experts(model)
    blocks_name, blocks = _decoder_blocks(model)
    modules = dict(model.named_modules())
    tied = _tied_parameters(model)
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        scheme = scheme.for_tied_embedding()
    entries: list[TensorEntry] = []
    parts: dict[str, dict[str, Tensor | QuantizedTensor]] = {f"{i:04d}": {} for i in range(len(blocks))}
    parts[OUTSIDE] = {}
    for name, parameter in [*model.named_parameters(), *stored_buffers(model).items()]:
        owner = modules[name.rpartition(".")[0]]
        part = OUTSIDE
        if name.startswith(blocks_name + "."):
            part = f"{int(name.removeprefix(blocks_name + '.').partition('.')[0]):04d}"
        entry = TensorEntry(name, part, list(parameter.shape), dtype_name(parameter.dtype))
        tensor: Tensor | QuantizedTensor = parameter.detach()
        role = _role(model, owner, name, part, tied)
        if role is not None:
            entry.transposed = isinstance(owner, Conv1D)
            weight = parameter.detach().float()
            quantized, grid = _round(weight.T.contiguous() if entry.transposed else weight, scheme, role, name)
            if quantized is not None and grid is not None:
                entry.format, tensor = grid.name, quantized
        entries.append(entry)
        parts[part][name] = tensor
    manifest = Manifest(
        scheme=scheme.text,
        targets=list(scheme.targets),
        source={
            "model": str(model_dir),
            "files": {f.name: sha256_of(f) for f in sorted(model_dir.glob("*.safetensors"))},
        },
        settings={"steps": 0, "seed": 0},
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        parts=list(parts),
        tied=tied,
        tensors=entries,
    )
    (out / "config").mkdir(parents=True)
    for file in model_dir.iterdir():
        if file.suffix in CONFIG_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copy(file, out / "config" / file.name)
    run = RunDirectory.create(out, manifest)
    for part, tensors in parts.items():
        run.write_part(part, tensors, {})
    return RunDirectory.open(out)


def dequantized_model(run: RunDirectory) -> PreTrainedModel:
    """The torch model (f32, eval) with the run's dequantized weights: what artifacts are compared with."""
    config = transformers.AutoConfig.from_pretrained(run.config_dir)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.device("meta"):
        parts = replace_experts(AutoModelForCausalLM.from_config(config))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = fused_experts(dict(run.state_dict()), parts, shapes)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= set(run.manifest.tied), missing
    model.tie_weights()
    return model.eval()


def files_of(folder: Path) -> list[Path]:
    """Files below a folder, by their relative paths; without what a run directory says of its costs."""
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != COSTS_FILE)


def assert_same_files(one: Path, other: Path) -> None:
    """Two folders hold the same files, byte for byte."""
    assert files_of(one) == files_of(other)
    different = [str(p) for p in files_of(one) if not filecmp.cmp(one / p, other / p, shallow=False)]
    assert not different


def split_experts(model: nn.Module) -> None:
    """Take the fused experts of a loaded model apart."""
    fused = dict(model.named_parameters())
    for name, part in replace_experts(model).items():
        set_tensor(model, name, part.of(fused[part.fused].detach()).clone())


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that transformers saves."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    return tied


def _role(model: PreTrainedModel, owner: nn.Module, name: str, part: str, tied: dict[str, str]) -> Role | None:
    if not name.endswith(".weight"):
        return None
    if owner is model.get_input_embeddings():
        return Role.OUTPUT if name in tied.values() else Role.EMBEDDING
    if owner is model.get_output_embeddings():
        return Role.OUTPUT
    return Role.OTHER if part != OUTSIDE and isinstance(owner, nn.Linear | Conv1D) else None


def _round(weight: Tensor, scheme: Scheme, role: Role, name: str) -> tuple[QuantizedTensor | None, Grid | None]:
    cols = weight.shape[1]
    grid = after_fallback(scheme.asked_for((name,), Place(role), ModelTraits(), cols), cols, scheme.targets)
    if grid is None:
        return None, None
    return grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1))), grid
