"""`export --format onnx --template`: the user's own float graph of the model keeps its shape and gets our integers."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from exporters.onnx.artifact.reader import open_artifact, read_sidecar, read_tensors
from exporters.onnx.artifact.sidecar import SIDECAR, hash_files
from exporters.onnx.routes.builder import write_float_graph
from runtime_tests.verify import verify
from signround_edge.cli import main
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import Exported, export
from tests.exporters.onnx.test_onnx_export import TOKENS as GENAI_TOKENS
from tests.exporters.onnx.test_onnx_export import assert_weights_equal, mean_kl, onnx_logits, torch_logits
from tests.exporters.onnx.test_onnx_tracing import FAMILIES, GPT2, TOKENS, logits_of, reference_logits
from tests.support import make_run

MakeRun = Callable[[PretrainedConfig, str], RunDirectory]

full = pytest.mark.full


def source_of(run: RunDirectory) -> Path:
    return Path(run.manifest.source["model"])


def export_float_model(model_dir: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """What a user writes to get a graph: torch.onnx.export of the original model, optimized and with its own names."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = transformers.AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=dtype, attn_implementation="eager"
            ).eval()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.net(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    tokens = torch.ones((2, 9), dtype=torch.int64)
    shape = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=128)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Logits(),
            (tokens, torch.ones_like(tokens)),
            dynamo=True,
            dynamic_shapes=(shape, shape),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            opset_version=18,
            verbose=False,
        )
    program.save(out)
    return out


TRACED = {
    "gpt_neox-untied": FAMILIES["gpt_neox-untied"],
    "gpt2-conv1d-tied-2-bits": (transformers.GPT2Config(**GPT2), "onnx:w2g32-asym"),
    "opt-tied": FAMILIES["opt-tied"],
    "bloom-tied": FAMILIES["bloom-tied"],
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=() if "neox" in name else full) for name in TRACED])
def torch_template(
    request: pytest.FixtureRequest, make_random_run: MakeRun, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDirectory, Path]:
    run = make_random_run(*TRACED[request.param])
    return run, export_float_model(source_of(run), tmp_path_factory.mktemp("template") / "float.onnx")


@pytest.fixture(scope="module")
def from_torch(torch_template: tuple[RunDirectory, Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    run, template = torch_template
    return Exported(run, export(run, tmp_path_factory.mktemp("from-torch") / "out", template=template))


@pytest.fixture(scope="module")
def builder_template(llama_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The builder's fp32 graph: packed QKV, KV cache, its own names."""
    out = tmp_path_factory.mktemp("builder") / "fp32"
    write_float_graph(source_of(llama_run), out)
    return out


@pytest.fixture(scope="module")
def from_builder(llama_run: RunDirectory, builder_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("from-builder") / "out"
    return Exported(llama_run, export(llama_run, out, template=builder_template / "model.onnx"))


def test_a_torch_graph_gets_the_runs_weights_bit_for_bit(from_torch: Exported) -> None:
    assert_weights_equal(from_torch.run, from_torch.folder)
    bindings = read_sidecar(from_torch.folder).bindings
    for name in from_torch.run.names():
        kinds = {b.op for b in bindings if name in b.parameters}
        assert kinds
        assert not from_torch.run.is_quantized(name) or kinds <= {"MatMulNBits", "GatherBlockQuantized"}, name


def test_a_torch_graph_computes_what_torch_computes_with_the_run(
    from_torch: Exported, torch_template: tuple[RunDirectory, Path]
) -> None:
    reference = reference_logits(from_torch.run, TOKENS)
    assert reference.std() > 0.5
    assert mean_kl(reference, logits_of(from_torch.folder, TOKENS)) <= 1e-9
    with torch.no_grad():
        original = transformers.AutoModelForCausalLM.from_pretrained(source_of(from_torch.run)).eval()(TOKENS).logits
    assert mean_kl(original, reference) > 1e-4


def test_a_builder_graph_keeps_its_cache_and_packed_projection(from_builder: Exported) -> None:
    assert_weights_equal(from_builder.run, from_builder.folder)
    bindings = read_sidecar(from_builder.folder).bindings
    assert max(len(b.parameters) for b in bindings if b.op == "MatMulNBits") == 3
    sidecar = json.loads((from_builder.folder / SIDECAR).read_text())
    assert (sidecar["kv_cache"], sidecar["graph_builder"]) == (True, "template model.onnx")
    logits = onnx_logits(from_builder.folder, GENAI_TOKENS)
    assert mean_kl(torch_logits(from_builder.run, GENAI_TOKENS), logits) <= 1e-9


def test_a_builder_graph_still_loads_in_onnxruntime_genai(from_builder: Exported) -> None:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(from_builder.folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=9, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens([5, 6, 7, 8])
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 9


def test_a_graph_that_stores_a_tied_head_twice_gets_it_once(
    llama_run: RunDirectory, builder_template: Path, from_builder: Exported, tmp_path: Path
) -> None:
    model = ir.load(builder_template / "model.onnx")
    gather = next(node for node in model.graph if node.op_type == "Gather" and "embed" in node.name)
    head = model.graph.initializers["lm_head.MatMul.weight"].const_value.numpy()
    copy = ir.Value(name="copy", const_value=ir.Tensor(np.ascontiguousarray(head.T), name="copy"))
    copy.shape, copy.type = ir.Shape(head.T.shape), ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(copy)
    gather.replace_input_with(0, copy)
    ir.save(model, tmp_path / "untied.onnx", external_data="untied.data")
    out = export(llama_run, tmp_path / "out", template=tmp_path / "untied.onnx")
    assert_weights_equal(llama_run, out)
    once = (from_builder.folder / "model.onnx.data").stat().st_size
    assert (out / "model.onnx.data").stat().st_size == once
    shutil.copy(from_builder.folder / "genai_config.json", out)
    assert mean_kl(torch_logits(llama_run, GENAI_TOKENS), onnx_logits(out, GENAI_TOKENS)) <= 1e-9


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_template_can_carry_the_float_control(
    dtype: str, llama_run: RunDirectory, builder_template: Path, tmp_path: Path
) -> None:
    out = export(llama_run, tmp_path / "out", template=builder_template, dtype=dtype)
    assert not open_artifact(out).quantized_nodes()
    assert_weights_equal(llama_run, out)
    limit = 1e-9 if dtype == "f32" else 1e-5
    assert mean_kl(torch_logits(llama_run, GENAI_TOKENS), onnx_logits(out, GENAI_TOKENS)) <= limit


def halved(template: Path, out: Path) -> Path:
    """The same graph with every f32 matrix stored inline in f16 behind a Cast."""
    model = ir.load(template)
    for name, value in list(model.graph.initializers.items()):
        if value.const_value.dtype != ir.DataType.FLOAT or len(value.const_value.shape) != 2:
            continue
        half = ir.Value(name=f"{name}.half", const_value=ir.Tensor(value.const_value.numpy().astype(np.float16)))
        half.shape, half.type = value.shape, ir.TensorType(ir.DataType.FLOAT16)
        half.const_value.name = half.name
        model.graph.register_initializer(half)
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT.value}, num_outputs=1)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del model.graph.initializers[name]
        model.graph.insert_before(next(iter(model.graph)), cast)
    ir.save(model, out)
    return out


def test_weights_in_f16_behind_casts_are_replaced_too(
    torch_template: tuple[RunDirectory, Path], from_torch: Exported, tmp_path: Path
) -> None:
    run, template = torch_template
    out = export(run, tmp_path / "out", template=halved(template, tmp_path / "half.onnx"))
    assert_weights_equal(run, out)
    assert mean_kl(reference_logits(run, TOKENS), logits_of(out, TOKENS)) <= 1e-6
    with pytest.raises(UserError, match=r"--dtype f32: the weights of --template .* are f16"):
        export(run, tmp_path / "control", template=tmp_path / "half.onnx", dtype="f32")


def test_weights_in_f16_stay_so_in_an_f16_control(torch_template: tuple[RunDirectory, Path], tmp_path: Path) -> None:
    run, template = torch_template
    out = export(run, tmp_path / "out", template=halved(template, tmp_path / "half.onnx"), dtype="f16")
    assert {kind for _, kind, shape, _ in read_tensors(out) if len(shape) == 2} == {"F16"}
    assert_weights_equal(run, out)
    assert mean_kl(reference_logits(run, TOKENS), logits_of(out, TOKENS)) <= 1e-4


def test_weights_that_an_old_graph_lists_among_its_inputs_are_no_inputs(
    torch_template: tuple[RunDirectory, Path], tmp_path: Path
) -> None:
    run, template = torch_template
    model = ir.load(template)
    model.graph.inputs.extend(model.graph.initializers.values())
    ir.save(model, tmp_path / "old.onnx", external_data="old.data")
    out = export(run, tmp_path / "out", template=tmp_path / "old.onnx")
    assert [value.name for value in open_artifact(out).graph.inputs] == ["input_ids", "attention_mask"]
    assert_weights_equal(run, out)
    assert mean_kl(reference_logits(run, TOKENS), logits_of(out, TOKENS)) <= 1e-9


@full
def test_a_graph_that_computes_in_f16_gets_casts_around_our_nodes(make_random_run: MakeRun, tmp_path: Path) -> None:
    run = make_random_run(transformers.GPT2Config(**GPT2), "onnx:w4g32-asym")
    template = export_float_model(source_of(run), tmp_path / "half.onnx", torch.float16)
    out = export(run, tmp_path / "out", template=template)
    assert_weights_equal(run, out)
    assert mean_kl(reference_logits(run, TOKENS), logits_of(out, TOKENS).float()) <= 1e-3


def test_tuned_norms_and_biases_take_the_place_of_the_templates(
    torch_template: tuple[RunDirectory, Path], tmp_path: Path
) -> None:
    run, template = torch_template
    model = shutil.copytree(source_of(run), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors |= {name: t * 1.05 + 0.01 for name, t in tensors.items() if t.ndim == 1}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    tuned = make_run(model, tmp_path / "run", run.manifest.scheme)
    out = export(tuned, tmp_path / "out", template=template)
    assert_weights_equal(tuned, out)
    assert mean_kl(reference_logits(tuned, TOKENS), logits_of(out, TOKENS)) <= 1e-9


# Errors


def refused(run: RunDirectory, out: Path, template: Path) -> str:
    with pytest.raises(UserError) as caught:
        export(run, out, template=template)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    return str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GGUF\3\0\0\0", b"{}", bytes(100)])
def test_a_template_that_is_no_onnx_file(content: bytes, llama_run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(content)
    message = refused(llama_run, tmp_path / "out", tmp_path / "no.onnx")
    assert "no.onnx" in message
    assert "--template" in message
    assert "does not exist" in refused(llama_run, tmp_path / "out", tmp_path / "missing.onnx")


def test_a_truncated_template(llama_run: RunDirectory, builder_template: Path, tmp_path: Path) -> None:
    data = builder_template / "model.onnx.data"
    shutil.copy(builder_template / "model.onnx", tmp_path)
    assert "model.onnx.data is missing" in refused(llama_run, tmp_path / "out", tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes(data.read_bytes()[:-5000])
    assert "truncated" in refused(llama_run, tmp_path / "out", tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    for keep in (0.3, 0.9):
        (tmp_path / "model.onnx").write_bytes(content[: int(len(content) * keep)])
        assert "model.onnx" in refused(llama_run, tmp_path / "out", tmp_path / "model.onnx")


def test_a_template_with_inline_weights_that_end_early(
    torch_template: tuple[RunDirectory, Path], tmp_path: Path
) -> None:
    run, template = torch_template
    content = halved(template, tmp_path / "inline.onnx").read_bytes()
    for keep in (0.2, 0.5, 0.99):
        (tmp_path / "inline.onnx").write_bytes(content[: int(len(content) * keep)])
        assert "inline.onnx" in refused(run, tmp_path / "out", tmp_path / "inline.onnx")


def test_a_template_of_another_model_names_the_tensor(
    llama_run: RunDirectory, torch_template: tuple[RunDirectory, Path], make_random_run: MakeRun, tmp_path: Path
) -> None:
    run, template = torch_template
    message = refused(llama_run, tmp_path / "out", template)
    assert "has no weight that resembles tensor model." in message
    assert "of the run's" in message
    # The same architecture and shapes, other weights.
    model = shutil.copytree(source_of(run), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    victim = next(n for n, t in tensors.items() if t.ndim == 2 and ".1." in n and "weight" in n)
    tensors[victim] = torch.randn_like(tensors[victim]) * tensors[victim].std()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    other = make_run(model, tmp_path / "run", run.manifest.scheme)
    assert victim.removeprefix("transformer.") in refused(other, tmp_path / "out", template)


def test_a_quantized_template_is_refused(llama_export: Exported, tmp_path: Path) -> None:
    message = refused(llama_export.run, tmp_path / "out", llama_export.folder)
    assert "already quantized" in message
    assert "MatMulNBits" in message


def test_a_template_that_is_no_language_model(llama_run: RunDirectory, tmp_path: Path) -> None:
    x, y = (ir.Value(name=n, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)) for n in "xy")
    graph = ir.Graph([x], [y], nodes=[ir.node("Identity", [x], outputs=[y])], opset_imports={"": 18})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "identity.onnx")
    assert "input_ids" in refused(llama_run, tmp_path / "out", tmp_path / "identity.onnx")


# inspect, evaluate and verify


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "people", "of", "the", "world", "have", "told", "the", "people"]
    order = torch.randint(len(words), (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in order))
    return path


def cli(*arguments: object, code: int = 0) -> dict[str, object]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    document: dict[str, object] = json.loads(result.stdout)
    return document


def test_verify_inspect_and_evaluate_work_on_a_graph_without_cache(from_torch: Exported, text: Path) -> None:
    sizes = ["--n-ctx", 64, "--windows", 2]
    found = cli("verify", from_torch.run.path, from_torch.folder, "--text", text, *sizes, "--json")
    assert found["weights_exact"] is True
    (runtime,) = found["runtimes"]  # type: ignore[misc]
    assert (runtime["status"], runtime["gate"]) == ("pass", "exact")
    assert runtime["kld_mean"] <= 1e-6
    types = {t["type"] for t in cli("inspect", from_torch.folder, "--json")["tensors"]}  # type: ignore[attr-defined]
    assert types & {"MatMulNBits-4x32", "MatMulNBits-2x32"}
    scores = cli("evaluate", from_torch.folder, "--text", text, *sizes, "--json")
    assert abs(scores["ppl"] - runtime["ppl"]) < 1e-6 * runtime["ppl"]  # type: ignore[operator]


def test_verify_names_the_tensor_whose_scale_was_changed(from_torch: Exported, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(from_torch.folder, tmp_path / "onnx")
    binding = next(b for b in read_sidecar(folder).bindings if b.op == "MatMulNBits" and ".0." in b.parameters[0])
    tensor = open_artifact(folder).graph.initializers[binding.initializers["scales"]].const_value
    data = bytearray((folder / tensor.location).read_bytes())
    scale = np.frombuffer(data, dtype=np.float32, count=1, offset=tensor.offset) * np.float32(1.01)
    data[tensor.offset : tensor.offset + 4] = scale.tobytes()
    (folder / tensor.location).write_bytes(data)
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps({**sidecar, "files": hash_files(folder)}))
    report = verify(from_torch.run, [folder], text, n_ctx=64, max_windows=1, log=str)
    assert not report.passed
    assert f"tensor {binding.name} " in str(report.artifacts[0].reason)
