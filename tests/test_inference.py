"""Export, engines, the accuracy gate and the benchmark, on a CPU; what needs TensorRT or a GPU skips and says why."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pico_helpers as pico
from pico_helpers import Accuracy, ModelConfig, PicoError, PicoLLM, TokenFile, check_accuracy, load_engine, save_engine

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LOOSE = Accuracy(1e9, 1e9, 0.0, 1e9, 1e9)


@pytest.fixture(scope="module")
def model() -> PicoLLM:
    config = ModelConfig(
        vocab_size=500, d_model=32, n_layer=2, n_head=2, d_ff=32, context_length=32, max_positions=64, dropout=0.5
    )
    model = PicoLLM(config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # attention and logits as sharp as a trained model's
            if parameter.ndim == 2:
                parameter.mul_(30 if "embedding" in name else 12)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> TokenFile:
    tokens = np.random.default_rng(0).integers(1, 500, 20_000).astype(np.uint16)
    starts = np.arange(0, 20_001, 100)
    return TokenFile(tmp_path_factory.mktemp("tokens"), "test", "random tokens", 1, tokens, starts)


@pytest.fixture(scope="module")
def tokens(file) -> torch.Tensor:
    return pico.held_out_sequences(file, 3, 32)


def shifted(model, change):
    """The model with its logits changed by a function of them."""
    return lambda idx: change(model(idx).clone())


# ---- accuracy ----


def test_accuracy_of_the_model_itself_is_perfect(model, tokens):
    model.train()
    assert check_accuracy(model, model, tokens) == Accuracy(0.0, 0.0, 1.0, 0.0, 0.0)
    assert model.training  # and no dropout came between


def test_accuracy_measures_what_it_says(model, tokens):
    constant = check_accuracy(model, shifted(model, lambda logits: logits + 0.25), tokens, LOOSE)
    assert constant == Accuracy(*(pytest.approx(v, abs=1e-5) for v in (0.25, 0.25, 1.0, 0.0, 0.0)))

    def sharper(logits):
        return logits * 1.5

    found = check_accuracy(model, shifted(model, sharper), tokens, LOOSE)
    with torch.no_grad(), pico.evaluating(model):
        logits = model(tokens[:, :-1])
    p, q, targets = logits.flatten(0, 1), sharper(logits).flatten(0, 1), tokens[:, 1:].flatten()
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    change = F.cross_entropy(q, targets) - F.cross_entropy(p, targets)
    assert found.kl_divergence == pytest.approx(kl.item(), rel=1e-4)
    assert found.loss_change == pytest.approx(change.item(), rel=1e-4)
    assert found.max_difference == pytest.approx((p - q).abs().max().item())
    assert found.mean_difference == pytest.approx((p - q).abs().mean().item(), rel=1e-5)
    halves = torch.arange(32) % 4 == 0  # another token wins at every fourth position
    swapped = check_accuracy(
        model, shifted(model, lambda logits: torch.where(halves[:, None], -logits, logits)), tokens, LOOSE
    )
    assert swapped.top1_agreement == 0.75


def test_half_precision_passes_the_gate_and_faults_do_not(model, tokens):
    half = copy.deepcopy(model).half().eval()
    assert 0 < check_accuracy(model, half, tokens).max_difference < 0.2
    wrong_order = copy.deepcopy(half)  # attention that cannot tell positions apart
    wrong_order.rope_sin.zero_()
    silent_head = copy.deepcopy(half)
    silent_head.blocks[0].attention.out_proj.weight.data[:, :16] = 0
    for broken in (wrong_order, silent_head):
        with torch.no_grad(), pytest.raises(PicoError, match=r"Refused by the accuracy gate: .*\(bound"):
            check_accuracy(model, broken, tokens)


def test_one_nan_is_refused_even_by_the_loosest_bounds(model, tokens):
    def poison(logits):
        logits[0, 5, 7] = math.nan
        return logits

    with pytest.raises(PicoError, match="max_difference nan"):
        check_accuracy(model, shifted(model, poison), tokens, LOOSE)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Accuracy)])
def test_each_bound_refuses_by_itself(model, tokens, name):
    tight = dataclasses.replace(LOOSE, **{name: 1.0 if name == "top1_agreement" else 1e-6})
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PicoError, match=f"gate: {name} [^,]*$"):
        check_accuracy(model, shifted(model, lambda logits: logits + 2 * noise), tokens, tight)


def test_the_reference_runs_without_tf32_and_the_setting_is_restored(model, tokens):
    before = torch.get_float32_matmul_precision()
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    try:
        torch.set_float32_matmul_precision("high")
        check_accuracy(model, lambda idx: torch.zeros(1, 32, 500), tokens, LOOSE)
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        handle.remove()


# ---- export, saving and loading ----


@pytest.mark.parametrize("explicit_attention", [False, True])
def test_exported_program_has_dynamic_shapes_and_the_same_logits(model, explicit_attention):
    program = pico.export_program(model.train(), 8, 64, explicit_attention=explicit_attention)
    assert model.training
    module = program.module()
    for batch, length in ((1, 1), (1, 64), (8, 1), (3, 17), (8, 64)):
        idx = torch.randint(500, (batch, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad(), pico.evaluating(model):
            assert (module(idx) - model(idx)).abs().max() < 2e-5
    operators = {str(node.target) for node in program.graph.nodes}
    assert any("scaled_dot_product" in name for name in operators) != explicit_attention
    with pytest.raises((RuntimeError, AssertionError)):
        module(torch.zeros(1, 65, dtype=torch.int64))


def test_export_with_a_single_size_and_beyond_the_model(model):
    module = pico.export_program(model, 1).module()
    assert module(torch.zeros(1, 32, dtype=torch.int64)).shape == (1, 32, 500)
    with pytest.raises(PicoError, match="exceeds the model's 64 positions"):
        pico.export_program(model, 1, 65)


def test_saved_program_runs_in_a_fresh_process_without_this_project(model, tokens, tmp_path):
    path = save_engine(pico.export_program(model, 8), tmp_path / "model.ts")
    assert path == tmp_path / "model.pt2"  # the suffix follows the format
    idx = tokens[:2, :20].contiguous()
    torch.save(idx, tmp_path / "idx.pt")
    script = textwrap.dedent("""
        import sys, torch
        module = torch.export.load("model.pt2").module()
        torch.save(module(torch.load("idx.pt")), "logits.pt")
        assert "pico_helpers" not in sys.modules
    """)
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad(), pico.evaluating(model):
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(idx), atol=1e-5, rtol=0)
        assert check_accuracy(model, load_engine(path), tokens).max_difference < 1e-5


def test_unusable_files_are_explained(model, tmp_path):
    with pytest.raises(PicoError, match="missing"):
        load_engine(tmp_path / "absent.pt2")
    path = save_engine(pico.export_program(model, 1, 4), tmp_path / "model")
    content, meta = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert meta["torch"] == torch.__version__ and meta["bytes"] == len(content)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PicoError, match=f"truncated: {len(content) // 2} of {len(content)} bytes"):
        load_engine(path)
    path.write_bytes(b"x" * len(content))
    with pytest.raises(PicoError, match="cannot be loaded"):
        load_engine(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(PicoError, match="damaged"):
        load_engine(path)


@pytest.mark.parametrize("key", ["gpu_architecture", "tensorrt", "torch_tensorrt"])
def test_an_engine_of_another_machine_is_refused_before_it_is_read(tmp_path, monkeypatch, key):
    here = {
        "gpu_architecture": "sm_75",
        "tensorrt": "10.12",
        "torch_tensorrt": "2.9.0",
        "device": "T4",
        "torch": "2.9.0",
    }
    monkeypatch.setattr(pico, "_environment", lambda: here)
    (tmp_path / "engine.ts").write_bytes(b"1234")
    (tmp_path / "engine.json").write_text(json.dumps({**here, "kind": "tensorrt", "bytes": 4, key: "other"}))
    with pytest.raises(PicoError, match=f"built for {key} other, here is {here[key]}; build it again"):
        load_engine(tmp_path / "engine.ts")


# ---- TensorRT ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the message of a machine without a GPU")
def test_without_a_gpu_one_line_says_so(model):
    for call in (pico.install_tensorrt, lambda: pico.compile_tensorrt(model)):
        with pytest.raises(PicoError, match=r"^TensorRT needs an NVIDIA GPU.*") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_missing_or_broken_package_is_explained(monkeypatch, model):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(PicoError, match=r"not available .*run install_tensorrt"):
        pico.compile_tensorrt(model)


def test_install_asks_for_the_matching_release_and_reports_failure(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return types.SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(pico.subprocess, "run", run)
    with pytest.raises(PicoError, match=r"PyTorch 2.11.0\+cu128: ERROR: No matching distribution$"):
        pico.install_tensorrt()
    assert [command[-1] for command in commands] == ["torch-tensorrt==2.11.*", "torch-tensorrt-rtx==2.11.*"]
    for command in commands:
        assert f"torch=={pico._version('torch')}" in command  # PyTorch stays
        assert "--extra-index-url=https://download.pytorch.org/whl/cu128" in command


def fake_tensorrt(compile_function):
    return types.SimpleNamespace(
        dynamo=types.SimpleNamespace(compile=compile_function), Input=lambda **shapes: types.SimpleNamespace(**shapes)
    )


def engine_of(program, *names):
    module = nn.Module()
    for name in names:
        module.add_module(name, program.module())
    module.forward = getattr(module, names[0]).forward if names else None
    return module


def test_compile_passes_only_what_the_release_knows(monkeypatch, model, tokens):
    seen = {}

    def old_release(program, *, arg_inputs, use_explicit_typing=False, use_fp32_acc=False, **kwargs):
        seen.update(program=program, input=arg_inputs[0], explicit=use_explicit_typing, acc=use_fp32_acc, rest=kwargs)
        return engine_of(program, "_run_on_acc_0")

    monkeypatch.setattr(pico, "_tensorrt", lambda: fake_tensorrt(old_release))
    engine = pico.compile_tensorrt(model, max_batch=8, max_length=48)
    assert seen["rest"] == {} and seen["explicit"] and seen["acc"]
    assert (seen["input"].min_shape, seen["input"].max_shape) == ((1, 1), (8, 48))
    assert seen["input"].opt_shape == (2, 48) and seen["input"].dtype == torch.int64
    assert {t.dtype for t in seen["program"].state_dict.values()} == {torch.float16}
    assert not any("scaled_dot_product" in str(node.target) for node in seen["program"].graph.nodes)
    assert next(model.parameters()).dtype == torch.float32  # the model itself is left as it was
    assert check_accuracy(model, engine, tokens).max_difference < 0.2
    assert (engine.precision, engine.max_batch, engine.max_length) == ("fp16", 8, 48) and engine.build_seconds > 0

    def new_release(program, *, arg_inputs, decompose_attention=False, **kwargs):
        seen.update(program=program, decompose=decompose_attention, rest=kwargs)
        return engine_of(program, "_run_on_acc_0")

    monkeypatch.setattr(pico, "_tensorrt", lambda: fake_tensorrt(new_release))
    pico.compile_tensorrt(model)
    assert seen["decompose"] and seen["rest"] == {}
    assert any("scaled_dot_product" in str(node.target) for node in seen["program"].graph.nodes)


def test_build_errors_and_partial_engines_are_refused(monkeypatch, model):
    def fails(program, *, arg_inputs):
        raise AssertionError("no kernel\nlong trace")

    monkeypatch.setattr(pico, "_tensorrt", lambda: fake_tensorrt(fails))
    with pytest.raises(PicoError, match=r"cannot be built \(AssertionError: no kernel\)"):
        pico.compile_tensorrt(model)
    for names in ((), ("_run_on_acc_0", "_run_on_gpu_1")):
        partial = fake_tensorrt(lambda program, *, arg_inputs, names=names: engine_of(program, *names))
        monkeypatch.setattr(pico, "_tensorrt", lambda partial=partial: partial)
        with pytest.raises(PicoError, match="did not take the whole model"):
            pico.compile_tensorrt(model)
    with pytest.raises(PicoError, match="Unknown precision 'int4'"):
        pico.compile_tensorrt(model, "int4")
    with pytest.raises(PicoError, match="calibration tokens"):
        pico.compile_tensorrt(model, "int8")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_are_the_linear_layers_and_nothing_else(tokens, precision):
    pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")
    config = ModelConfig(vocab_size=500, d_model=32, n_layer=2, n_head=2, d_ff=32, context_length=32, max_positions=64)
    model = PicoLLM(config, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    with pico._quantised(copy.deepcopy(model), precision, tokens[:, :-1]) as quantised:
        parts = {name: part for name, part in quantised.named_modules() if "quantizer" in name.rsplit(".", 1)[-1]}
        linear = {name for name, part in quantised.named_modules() if isinstance(part, nn.Linear)}
        used = {name for name, part in parts.items() if getattr(part, "is_enabled", False)}
        assert used == {f"{name}.{kind}_quantizer" for name in linear for kind in ("input", "weight")}
        assert len(linear) == 8
        found = check_accuracy(model, quantised, tokens, pico.EIGHT_BIT_BOUNDS)
        assert found.max_difference > 1e-3, "something is quantised"
        if precision == "int8" and not torch.cuda.is_available():
            return  # modelopt's INT8 reads values on a CPU, which no export can follow
        program = pico.export_program(quantised, 8, explicit_attention=True)
        operators = [str(node.target) for node in program.graph.nodes]
        assert operators.count("tensorrt.quantize_op.default") == 16, "what Torch-TensorRT converts"
        for batch, length in ((1, 1), (3, 17), (8, 32)):
            idx = tokens.flatten()[: batch * length].repeat(3)[: batch * length].view(batch, length)
            with torch.no_grad():
                torch.testing.assert_close(program.module()(idx), quantised(idx), atol=1e-4, rtol=0)


FAKE_GPU = """
import types, torch
torch.cuda.get_device_capability = lambda *a, **k: (8, 9)
torch.cuda.get_device_properties = lambda *a, **k: types.SimpleNamespace(
    name="fake", major=8, minor=9, total_memory=1 << 34, multi_processor_count=58
)
torch.cuda.get_device_name = lambda *a, **k: "fake"
torch.cuda.current_device = lambda: 0
torch.cuda.device_count = lambda: 1
torch.cuda.mem_get_info = lambda *a, **k: (1 << 34, 1 << 34)
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *a, **k: None
import torch_tensorrt
"""


def run_script(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)


def test_tensorrt_supports_every_operator_of_the_model():
    """The real lowering and partitioning of Torch-TensorRT, up to the point where an engine would be built."""
    prefix = "import torch_tensorrt" if torch.cuda.is_available() else FAKE_GPU
    probe = run_script(prefix)
    if probe.returncode:
        pytest.skip(f"torch_tensorrt cannot be imported: {probe.stderr.strip().splitlines()[-1]}")
    script = """
import pico_helpers as pico
pico._tensorrt = lambda: torch_tensorrt
config = pico.ModelConfig(vocab_size=500, d_model=128, n_layer=2, n_head=2, d_ff=64)
engine = pico.compile_tensorrt(pico.PicoLLM(config), max_batch=8, dryrun=True)
print("PARTS", [name for name, _ in engine.module.named_children()])
"""
    answer = run_script(prefix + script)
    assert "PARTS ['_run_on_acc_0']" in answer.stdout, answer.stdout[-2000:] + answer.stderr[-2000:]


@on_gpu
def test_tensorrt_engine_is_accurate_and_survives_saving(model, tokens, tmp_path):
    pytest.importorskip("torch_tensorrt", exc_type=Exception)
    model = copy.deepcopy(model).cuda().eval()
    engine = pico.compile_tensorrt(model, max_batch=4)
    check_accuracy(model, engine, tokens)
    with engine.cuda_graphs() as run:
        check_accuracy(model, run, tokens)
    check_accuracy(model, load_engine(save_engine(engine, tmp_path / "engine")), tokens)


@on_gpu
def test_cuda_graph_replays_the_model_at_every_shape(model):
    half = copy.deepcopy(model).cuda().half().eval()
    graph = pico._CudaGraph(half)
    with torch.no_grad():
        for batch, length in ((1, 8), (1, 8), (3, 32), (1, 8)):
            idx = torch.randint(500, (batch, length), device="cuda")
            torch.testing.assert_close(graph(idx), half(idx))


# ---- benchmark ----


def test_floor_follows_weights_and_flops():
    model = PicoLLM(ModelConfig())
    assert pico.floor_ms(model, 1, 1, "fp16", "Tesla T4") == pytest.approx(34_457_920 * 2 / 320e9 * 1e3, rel=1e-3)
    flops = 2 * 32 * 384 * 34_457_920 + 8 * 32 * 7 * 64 * 384 * 384 * 2  # attention: half of two products per head
    assert pico.floor_ms(model, 32, 384, "fp16", "Tesla T4") == pytest.approx(flops / 65e12 * 1e3, rel=1e-3)
    assert pico.floor_ms(model, 32, 384, "fp32", "NVIDIA H100 80GB HBM3") == pytest.approx(
        flops / 67e12 * 1e3, rel=1e-3
    )
    assert math.isnan(pico.floor_ms(model, 1, 1, "fp16", "CPU"))


def test_timing_counts_calls_and_milliseconds():
    calls = []
    batches = [torch.zeros(1, 1), torch.ones(1, 1)]
    times = pico.time_calls(lambda idx: (calls.append(idx.item()), time.sleep(0.004)), batches, 6)
    assert len(times) == 6 and len(calls) == 7  # one untimed
    assert set(calls) == {0.0, 1.0}  # different inputs take turns
    assert 4 <= min(times) < 40


@pytest.fixture()
def scripted_variants(monkeypatch, model):
    """Ways to run of known speed: a baseline, a faster one, TensorRT between them, and three that fail."""

    def slow(milliseconds):
        def run(idx):
            time.sleep(milliseconds / 1e3)
            return model(idx)

        return run

    def explodes_at_16(idx):
        if idx.shape[1] == 16:
            raise RuntimeError("out of memory\ndetails")
        return slow(15)(idx)

    def no_build():
        raise PicoError("No such compiler.")

    variants = {
        pico.BASELINE: lambda: slow(40),
        "fast": lambda: slow(5),
        "TensorRT FP16": lambda: slow(25),
        "inaccurate": lambda: lambda idx: model(idx) + 1,
        "explodes": lambda: explodes_at_16,
        "unbuilt": no_build,
    }
    monkeypatch.setattr(
        pico, "_variants", lambda *_: [pico._Variant(name, "fp32", build) for name, build in variants.items()]
    )


def test_benchmark_table_is_complete_and_its_ratios_right(scripted_variants, model, file, capsys):
    table = pico.benchmark(model, file, (1, 2), (8, 16, 32), n_runs=6)
    assert len(table) == 6 * 6
    good = table[table.status == "ok"]
    cell = good.set_index(["variant", "batch", "length"])
    for shape in ((1, 8), (2, 32)):
        base, fast, trt = (cell.loc[(name, *shape)] for name in (pico.BASELINE, "fast", "TensorRT FP16"))
        assert 40 <= base.p50_ms <= base.p90_ms <= base.p99_ms
        assert base.speedup == 1 and fast.vs_best_pytorch == 1
        assert trt.speedup == pytest.approx(base.p50_ms / trt.p50_ms)
        assert trt.vs_best_pytorch == pytest.approx(fast.p50_ms / trt.p50_ms) and trt.vs_best_pytorch < 1
        assert trt.tokens_per_s == pytest.approx(1e3 * shape[0] * shape[1] / trt.p50_ms)
        assert trt.note == "slower than fast" and fast.note == base.note == ""
    assert (good.kl_divergence == 0).all() and (good.size_mb == model.count_parameters()[1] * 4e-6).all()
    here = table[["device", "torch", "date"]].drop_duplicates()
    assert len(here) == 1 and here.iloc[0].device.startswith("CPU"), "also of rows that failed"
    failed = table[table.status != "ok"].groupby("variant").status.agg(["size", "first"])
    assert failed.loc["inaccurate", "size"] == failed.loc["unbuilt", "size"] == 6
    assert "accuracy gate: max_difference 1" in failed.loc["inaccurate", "first"]
    assert failed.loc["unbuilt", "first"] == "No such compiler."
    assert failed.loc["explodes"].tolist() == [4, "RuntimeError: out of memory"]  # two shapes were timed before
    assert failed.index.tolist() == ["explodes", "inaccurate", "unbuilt"]
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all(": left out. " in line for line in lines)  # one line each


def test_benchmark_runs_on_text_of_the_file(scripted_variants, monkeypatch, model, file):
    seen = []
    monkeypatch.setattr(
        pico,
        "_variants",
        lambda *_: [pico._Variant(pico.BASELINE, "fp32", lambda: lambda idx: seen.append(idx.clone()) or model(idx))],
    )
    pico.benchmark(model, file, (2,), (16,), n_runs=10)
    text = file.tokens.tobytes()
    for idx in seen:
        for row in idx:
            assert row.numpy().astype(np.uint16)[:4].tobytes() in text
    assert len({tuple(idx.flatten().tolist()) for idx in seen if idx.shape == (2, 16)}) >= 2


def test_benchmark_refuses_impossible_sizes(model, file):
    for sizes in (((0,), (8,)), ((1,), (65,)), ((1,), (0,))):
        with pytest.raises(PicoError, match="Benchmark sizes"):
            pico.benchmark(model, file, *sizes)


def test_an_engine_that_failed_is_not_built_twice(monkeypatch, model, file):
    attempts = []

    def build(*_, **__):
        attempts.append(1)
        raise PicoError("no")

    def two_rows(_, __, make_engine):
        return [
            pico._Variant(name, "fp16", lambda: make_engine("fp16")) for name in ("TensorRT FP16", "TensorRT again")
        ]

    monkeypatch.setattr(pico, "compile_tensorrt", build)
    monkeypatch.setattr(pico, "_variants", two_rows)
    table = pico.benchmark(model, file, (1,), (8,), n_runs=1)
    assert attempts == [1] and table.status.tolist() == ["no", "no"]


def test_plot_shows_every_row_of_every_shape(scripted_variants, model, file):
    table = pico.benchmark(model, file, (1, 2), (8, 16), n_runs=2)
    for frame in (table, table.assign(p50_ms=math.nan, p99_ms=math.nan, speedup=math.nan)):  # also when all failed
        figure = pico.plot_benchmark(frame)
        assert [axes.get_title("left") for axes in figure.axes] == [
            f"batch {batch}, {length} tokens" for length in (8, 16) for batch in (1, 2)
        ]
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == table.variant.unique().tolist()
        figure.canvas.draw()


def test_demo_on_a_cpu_tells_checks_times_and_saves(monkeypatch, model, file, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not hasattr(pico, "save_figure"):

        def save_figure(figure, path):
            for suffix in (".png", ".svg"):
                figure.savefig(f"{path}{suffix}")

        monkeypatch.setattr(pico, "save_figure", save_figure, raising=False)
    table = pico.advanced_tensorrt_optimization_demo(
        model, sequence_lengths=(16,), n_runs=2, results=tmp_path / "out", file=file
    )
    out = capsys.readouterr().out
    assert "No GPU" in out and "TensorRT needs an NVIDIA GPU" in out and "without TensorRT" in out
    assert "loaded back, it passes the accuracy gate" in out and "Traceback" not in out
    status = table.set_index("variant").status
    assert status[pico.BASELINE] == "ok" and status["TensorRT FP16"].startswith("TensorRT needs")
    assert status["torch.compile FP32"] == "ok" or "torch.compile FP32: left out" in out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *(f"inference_benchmark.{suffix}" for suffix in ("csv", "png", "svg")),
        "pico_llm_fp32.pt2",
        "pico_llm_fp32.json",
    }
    stored = pd.read_csv(tmp_path / "out" / "inference_benchmark.csv")
    assert stored.p50_ms.round(6).equals(table.p50_ms.round(6))
