"""Export, engines, the accuracy gate and the benchmark on a CPU; tests marked `gpu` need one and skip without."""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import textwrap
import types

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pico_helpers as pico
from pico_helpers import Accuracy, ModelConfig, PicoError, PicoLLM, TokenFile, check_accuracy, load_engine, save_engine

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
    return TokenFile(tmp_path_factory.mktemp("tokens"), "random tokens", 1, tokens, starts)


@pytest.fixture(scope="module")
def tokens(file) -> torch.Tensor:
    return pico.held_out_sequences(file, 3, 32)


def shifted(model, change):
    """The model with its logits changed by a function of them."""
    return lambda idx: change(model(idx).clone())


# ---- accuracy ----


def test_accuracy_measures_what_it_says(model, tokens):
    assert check_accuracy(model.train(), model, tokens) == Accuracy(0.0, 0.0, 1.0, 0.0, 0.0)
    assert model.training  # and no dropout came between
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
    four_bits = copy.deepcopy(half)
    for parameter in four_bits.parameters():
        step = parameter.data.abs().amax(-1, keepdim=True) / 7
        parameter.data = (parameter.data / step).round() * step
    for broken in (wrong_order, silent_head, four_bits):
        with torch.no_grad(), pytest.raises(PicoError, match=r"Refused by the accuracy gate: .*\(bound"):
            check_accuracy(model, broken, tokens)


def test_a_flip_counts_only_beyond_the_rounding_of_the_precision(model, tokens):
    """What rounding cannot tell apart may change places; a token that FP32 puts further below may not win."""

    def runner_up(logits):  # the second most likely token wins everywhere
        return logits.scatter(-1, logits.argmax(-1, keepdim=True), -1e9)

    rounded = shifted(model, lambda logits: logits.bfloat16().float())
    assert check_accuracy(model, rounded, tokens, LOOSE, "bf16").top1_agreement == 1.0
    with torch.no_grad(), pico.evaluating(model):
        best, second = model(tokens[:, :-1]).topk(2).values.unbind(-1)
    for precision, share in pico.ROUNDING.items():
        near = (best - second <= share * best.abs()).float().mean().item()
        found = check_accuracy(model, shifted(model, runner_up), tokens, LOOSE, precision).top1_agreement
        assert found == pytest.approx(near, abs=1e-6)


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


def test_exported_program_has_dynamic_shapes_and_the_same_logits(model):
    program = pico.export_program(model.train(), 8, 64)
    assert model.training
    module = program.module()
    for batch, length in ((1, 1), (1, 64), (8, 1), (3, 17), (8, 64)):
        idx = torch.randint(500, (batch, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad(), pico.evaluating(model):
            assert (module(idx) - model(idx)).abs().max() < 2e-5
    fixed = pico.export_program(model, 1, 32, fixed=True).module()
    for program, shape in ((module, (1, 65)), (fixed, (1, 31))):
        with pytest.raises((RuntimeError, AssertionError)):
            program(torch.zeros(shape, dtype=torch.int64))
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
    with pytest.raises(PicoError, match="cannot be loaded"):
        load_engine(tmp_path / "absent.pt2")
    path = save_engine(pico.export_program(model, 1, 4), tmp_path / "model")
    content, meta = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert meta["environment"]["torch"] == torch.__version__
    for damaged in (content[: len(content) // 2], b"x" * len(content)):
        path.write_bytes(damaged)
        with pytest.raises(PicoError, match=r"cannot be loaded; build it again and save it\. "):
            load_engine(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(PicoError, match="cannot be loaded"):
        load_engine(path)


@pytest.mark.parametrize("key", ["gpu_architecture", "tensorrt"])
def test_an_engine_of_another_machine_is_refused_before_it_is_read(tmp_path, monkeypatch, key):
    here = {"gpu_architecture": "sm_75", "tensorrt": "torch_tensorrt 2.9.0, tensorrt_cu12_libs 10.13"}
    monkeypatch.setattr(pico, "engine_environment", lambda: here)
    (tmp_path / "engine.ts").write_bytes(b"1234")
    (tmp_path / "engine.json").write_text(json.dumps({"environment": {**here, key: "other"}, "engine": {}}))
    with pytest.raises(PicoError, match=f"was built for {key} other, here is .*; build it again"):
        load_engine(tmp_path / "engine.ts")


# ---- TensorRT ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the message of a machine without a GPU")
def test_without_a_gpu_one_line_says_so(model):
    for call in (pico.install_tensorrt, lambda: pico.compile_tensorrt(model)):
        with pytest.raises(PicoError, match=r"^TensorRT needs an NVIDIA GPU.*") as caught:
            call()
        assert "\n" not in str(caught.value)


COLAB = ["torch<2.12.0,>=2.11.0", "tensorrt<10.16.0,>=10.15.1", "numpy", "dllist", "psutil"]
COLAB += [f"tensorrt-cu12{part}<10.16.0,>=10.15.1" for part in ("", "-bindings", "-libs")]


def test_install_takes_the_release_first_and_then_what_it_requires(monkeypatch):
    commands, broken = [], []

    def run(command, **_):
        commands.append(command)
        if broken:
            return types.SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution")
        if len(commands) == 2:
            monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(pico.subprocess, "run", run)
    monkeypatch.setattr(pico.importlib.metadata, "requires", lambda package: COLAB)
    monkeypatch.setattr(pico, "engine_environment", lambda: {"tensorrt": "10.15", "device": "Tesla T4"})
    with pytest.raises(PicoError, match="run install_tensorrt"):
        pico.install_tensorrt(install=False)
    assert not commands, "pip is not asked"
    assert pico.install_tensorrt() == "TensorRT 10.15 on Tesla T4"
    assert commands[0][-2:] == ["--index-url=https://download.pytorch.org/whl/cu128", "torch-tensorrt==2.11.*"]
    assert sorted(commands[1][-5:]) == sorted([*COLAB[3:]])
    for command in commands:
        assert {"--no-deps", "--retries=0", "--timeout=5"} <= set(command)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    broken.append(True)
    with pytest.raises(PicoError, match=r"PyTorch 2.11.0\+cu128: ERROR: No matching distribution$"):
        pico.install_tensorrt()


def test_never_the_libraries_of_two_cuda_versions():
    thirteen = [requirement.replace("cu12", "cu13") for requirement in COLAB]
    for requirements, cuda in ((COLAB, "12.8"), (thirteen, "13.0")):
        names = [
            argument for argument in pico.tensorrt_libraries(requirements, cuda) if argument.startswith("tensorrt")
        ]
        assert len(names) == 3 and all(name.startswith(f"tensorrt-cu{cuda[:2]}") for name in names)
    with pytest.raises(PicoError, match=r"not for CUDA 12\.8"):
        pico.tensorrt_libraries(thirteen, "12.8")  # what PyPI alone would give
    assert pico.tensorrt_release("2.13.0+cu130", "13.0")[0].startswith("--extra-index-url=")


@pytest.fixture()
def stand_in(monkeypatch):
    """Torch-TensorRT without TensorRT: `use(function that makes the engine)` gives the list of what is asked for."""

    def use(make_engine):
        def compile_program(program, *, arg_inputs, **options):
            calls.append({"program": program, "shapes": arg_inputs[0], **options})
            return make_engine(program, options)

        calls, dynamo = [], types.SimpleNamespace(compile=compile_program)
        monkeypatch.setattr(pico, "import_tensorrt", lambda: types.SimpleNamespace(dynamo=dynamo, Input=dict))
        monkeypatch.setattr(
            PicoLLM, "to", lambda self, *where: self if where == ("cuda",) else nn.Module.to(self, *where)
        )
        return calls

    return use


def engine_of(program, *names):
    module = nn.Module()
    for name in names:
        module.add_module(name, program.module())
    module.forward = getattr(module, names[0]).forward if names else None
    return module


def test_compile_asks_for_a_whole_typed_engine_with_attention_as_a_layer(stand_in, model, tokens):
    calls = stand_in(lambda program, options: engine_of(program, "_run_on_acc_0"))
    engine = pico.compile_tensorrt(model, max_batch=8, max_length=48)
    (call,) = calls
    assert call["use_explicit_typing"] and call["require_full_compilation"] and not call["decompose_attention"]
    assert not call.get("use_fp32_acc"), "it would cast every product to FP32"
    profile = {"min_shape": (1, 1), "opt_shape": (2, 48), "max_shape": (8, 48)}
    assert call["shapes"] == {"dtype": torch.int64, **profile}
    (idx,) = (node for node in call["program"].graph.nodes if node.name == "idx")
    assert [size.node.hint for size in idx.meta["val"].shape] == [2, 48], "the releases tune for the example"
    assert {t.dtype for t in call["program"].state_dict.values()} == {torch.float16}
    assert any("scaled_dot_product" in str(node.target) for node in call["program"].graph.nodes)
    assert next(model.parameters()).dtype == torch.float32 and next(model.parameters()).requires_grad
    assert check_accuracy(model, engine, tokens).max_difference < 0.2
    idx = tokens[:1, :-1]
    assert engine.module(idx).shape[-1] == model.config.padded_vocab_size == 512, "nothing is cut inside"
    assert engine(idx).shape[-1] == 500 and engine(idx)._base is not None, "a view"
    fixed = pico.compile_tensorrt(model, "fp32", max_batch=1, max_length=32, fixed=True, use_fp32_acc=True)
    assert {t.dtype for t in calls[1]["program"].state_dict.values()} == {torch.float32}
    with pytest.raises(PicoError, match="Unknown precision 'int8'; choose one of: fp16, fp32"):
        pico.compile_tensorrt(model, "int8")
    assert calls[1]["shapes"] == {"dtype": torch.int64, "shape": (1, 32)} and calls[1]["use_fp32_acc"]
    assert check_accuracy(model, fixed, tokens).max_difference < 0.2


def test_compile_falls_back_to_decomposed_attention(stand_in, model):
    def no_layer(program, options):
        if not options["decompose_attention"]:
            raise AssertionError("no attention layer\nlong trace")
        return engine_of(program, "_run_on_acc_0")

    calls = stand_in(no_layer)
    assert pico.compile_tensorrt(model).max_batch == 32
    assert [call["decompose_attention"] for call in calls] == [False, True]


def test_build_errors_and_partial_engines_are_refused(stand_in, model):
    def fails(program, options):
        raise AssertionError("no kernel\nlong trace")

    stand_in(fails)
    with pytest.raises(PicoError, match=r"cannot be built \(AssertionError: no kernel; AssertionError: no kernel\)"):
        pico.compile_tensorrt(model)
    for names in ((), ("_run_on_acc_0", "_run_on_gpu_1")):
        stand_in(lambda program, options, names=names: engine_of(program, *names))
        with pytest.raises(PicoError, match="did not take the whole model"):
            pico.compile_tensorrt(model)


@pytest.mark.gpu
@needs_gpu
def test_tensorrt_engine_is_accurate_and_survives_saving(model, tokens, tmp_path):
    pytest.importorskip("torch_tensorrt", exc_type=Exception)
    model = copy.deepcopy(model).cuda().eval()
    check_accuracy(model, pico.compile_tensorrt(model, max_batch=1, max_length=32, fixed=True), tokens)
    engine = pico.compile_tensorrt(model, max_batch=4)
    check_accuracy(model, engine, tokens)
    with engine.cuda_graphs() as run:
        check_accuracy(model, run, tokens)
    check_accuracy(model, load_engine(save_engine(engine, tmp_path / "engine")), tokens)


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_replays_the_model_at_every_shape(model):
    half = copy.deepcopy(model).cuda().half().eval()
    graph = pico.CudaGraph(half)
    with torch.no_grad():
        for batch, length in ((1, 8), (1, 8), (3, 32), (1, 8)):
            idx = torch.randint(500, (batch, length), device="cuda")
            torch.testing.assert_close(graph(idx), half(idx))


def test_a_failed_recording_is_not_replayed(monkeypatch):
    """With stand-ins for CUDA: after a failure the shape is recorded again, and only what was recorded is replayed."""
    log, failures = [], ["out of memory"]

    @contextlib.contextmanager
    def record(graph):
        yield
        if failures:
            raise RuntimeError(failures.pop())
        graph.replay = lambda: log.append("replay")  # what was never recorded has no such thing
        log.append("record")

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": types.SimpleNamespace, "graph": record, "stream": contextlib.nullcontext}
    for name, fake in (fakes | dict.fromkeys(("Stream", "current_stream"), lambda: stream)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    run = pico.CudaGraph(lambda idx: idx * 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(torch.ones(2, 3))
    assert run(torch.ones(2, 3)).sum() == 12
    run(torch.ones(2, 3))
    run(torch.ones(1, 3))
    assert log == ["record", "replay", "replay", "record", "replay"]


# ---- benchmark ----


@pytest.fixture()
def clock(monkeypatch):
    """Time in seconds, which passes only when a stand-in says so."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(pico.time, "perf_counter", lambda: clock.now)
    return clock


def test_timing_fills_its_time_and_batches_take_turns(clock):
    seen = []

    def run(idx):
        seen.append(int(idx[0, 0]))
        clock.now += 0.25

    batches = [torch.full((1, 1), i) for i in (0, 1)]
    assert pico.time_calls(run, batches, 2.0) == [250.0] * 8
    assert seen == [0, 1] * 5  # the first two are not counted
    assert len(pico.time_calls(run, batches, 0.0)) == 3


@pytest.fixture()
def script(monkeypatch, model, clock):
    """Ways to run of known speed: a baseline, a faster one, TensorRT between them, three that fail."""

    def taking(milliseconds, fails_at=0):
        def run(idx):
            if idx.shape[1] == fails_at:
                raise RuntimeError("out of memory\ndetails")
            clock.now += milliseconds / 1e3
            return model(idx)

        return lambda: run

    def no_build():
        raise PicoError("No such compiler.")

    builds = {pico.BASELINE: taking(40), "fast": taking(5), "TensorRT FP16": taking(25), "unbuilt": no_build}
    builds |= {"inaccurate": lambda: lambda idx: model(idx) + 1, "explodes": taking(15, fails_at=16)}
    rows = [pico.Variant(name, "fp32", build) for name, build in builds.items()]
    monkeypatch.setattr(pico, "make_variants", lambda *_: copy.deepcopy(rows))


def test_benchmark_table_is_complete_and_its_ratios_right(script, model, file, capsys):
    table = pico.benchmark(model, file, (1, 2), (16, 8, 32), 1.0)
    assert len(table) == 36
    shapes = list(dict.fromkeys(zip(table.batch, table.length, strict=True)))
    assert shapes == [(1, 32), (1, 16), (1, 8), (2, 16), (2, 8), (2, 32)], "the headline shape first"
    good = table[table.status == "ok"]
    cell = good.set_index(["variant", "batch", "length"])
    for shape in ((1, 8), (2, 32)):
        base, fast, trt = (cell.loc[(name, *shape)] for name in (pico.BASELINE, "fast", "TensorRT FP16"))
        for row, milliseconds in ((base, 40), (fast, 5), (trt, 25)):
            assert row[["p50_ms", "p90_ms", "p99_ms"]].tolist() == pytest.approx([milliseconds] * 3)
            assert row.n_calls * milliseconds == pytest.approx(1000, rel=0.2), "a second a row"
        assert (base.speedup, fast.speedup, trt.speedup) == pytest.approx((1, 8, 1.6))
        assert (base.vs_best_pytorch, fast.vs_best_pytorch, trt.vs_best_pytorch) == pytest.approx((1 / 8, 1, 1 / 5))
        assert trt.tokens_per_s == pytest.approx(shape[0] * shape[1] / 0.025)
        assert trt.note == "slower than fast" and fast.note == base.note == ""
    assert (good.kl_divergence == 0).all()
    here = table[["device", "torch", "date"]].drop_duplicates()
    assert len(here) == 1 and here.iloc[0].device.startswith("CPU"), "also of rows that failed"
    failed = table[table.status != "ok"].groupby("variant").status.agg(["size", "first"])
    assert failed.loc["inaccurate", "size"] == failed.loc["unbuilt", "size"] == 6
    assert "accuracy gate: max_difference 1" in failed.loc["inaccurate", "first"]
    assert failed.loc["unbuilt", "first"] == "No such compiler."
    assert failed.loc["explodes"].tolist() == [5, "RuntimeError: out of memory"]  # the headline was timed before
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all(": left out. " in line for line in lines)  # one line each


def test_no_row_is_always_first(monkeypatch, model):
    order = []
    monkeypatch.setattr(pico, "time_calls", lambda run, *_: order.append(run()) or [1.0])
    exact = Accuracy(0, 0, 1, 0, 0)
    ways = [pico.Variant(str(i), "fp32", lambda i=i: lambda: i, accuracy=exact) for i in range(3)]
    pico.time_shape(ways, [torch.zeros(1, 1)], 1.0)
    turns = [order[i : i + 3] for i in range(3, len(order), 3)]  # the first three calls compile
    assert len(turns) == 5 and all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert {turn[0] for turn in turns} == {0, 1, 2}


def test_rows_are_chosen_by_words_in_their_names(script, model, file):
    table = pico.benchmark(model, file, (1,), (8,), 0.1, variants=("FAST", "tensorrt"))
    assert table.variant.tolist() == [pico.BASELINE, "fast", "TensorRT FP16"]
    with pytest.raises(PicoError, match="No row is called 'flash'; choose from: PyTorch FP32; fast;"):
        pico.benchmark(model, file, (1,), (8,), variants=("flash",))


def test_the_engine_for_one_shape_runs_at_that_shape_only(monkeypatch, model, file):
    ways = [pico.Variant(pico.BASELINE, "fp32", lambda: model)]
    ways.append(pico.Variant("TensorRT, one shape", "fp32", lambda: pico.Engine(model), shape=(1, 32)))
    monkeypatch.setattr(pico, "make_variants", lambda *_: ways)
    engines = {}
    table = pico.benchmark(model, file, (1, 2), (32,), 0.01, engines=engines)
    assert table[["variant", "batch"]].values.tolist() == [
        [pico.BASELINE, 1], ["TensorRT, one shape", 1], [pico.BASELINE, 2]
    ]  # fmt: skip
    assert list(engines) == ["TensorRT, one shape"]


def test_rows_on_a_gpu_make_the_ratio_honest(monkeypatch, model):
    """The list of rows with a stand-in GPU, one of few multiprocessors without bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(multi_processor_count=40))
    gpu = types.SimpleNamespace(rope_cos=types.SimpleNamespace(is_cuda=True))
    rows = {row.name: row for row in pico.make_variants(gpu, 8, 32)}
    assert next(iter(rows)) == pico.BASELINE and "PyTorch BF16" not in rows
    assert {"PyTorch FP32, CUDA graph", "torch.compile FP32, reduce-overhead", "TensorRT FP16, one shape"} <= set(rows)
    monkeypatch.setattr(copy, "deepcopy", lambda value: model)
    row = rows["torch.compile FP16, max-autotune, one shape"]
    assert row.attempt(lambda run: run) is None and "68 multiprocessors" in row.failure
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert "PyTorch BF16" in {row.name for row in pico.make_variants(gpu, 8, 32)}


def test_benchmark_refuses_impossible_settings(model, file):
    sizes = (((0,), (8,)), ((1,), (65,)), ((1,), (0,)))
    for options in (*sizes, *(((1,), (8,), seconds) for seconds in (-1.0, 0.0, math.nan, math.inf))):
        with pytest.raises(PicoError, match="must be positive numbers, lengths at most 64"):
            pico.benchmark(model, file, *options)


def test_plot_shows_every_row_of_every_shape(script, model, file):
    table = pico.benchmark(model, file, (1, 2), (8, 16), 0.1)
    for frame in (table, table.assign(p50_ms=math.nan, p99_ms=math.nan, speedup=math.nan)):  # also when all failed
        figure = pico.plot_benchmark(frame)
        assert [axes.get_title("left") for axes in figure.axes] == [
            f"batch {batch}, {length} tokens" for batch, length in ((1, 16), (1, 8), (2, 8), (2, 16))
        ]
        labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert labels[::-1] == table.variant.unique().tolist()
        figure.canvas.draw()
    assert "5 ms, 8×" in {text.get_text() for text in pico.plot_benchmark(table).axes[0].texts}


def test_demo_on_a_cpu_tells_checks_times_and_saves(monkeypatch, model, file, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = pico.advanced_tensorrt_optimization_demo(
        model, file, sequence_lengths=(16,), seconds=0.01, results=tmp_path / "out"
    )
    out = capsys.readouterr().out
    assert "No GPU" in out and "TensorRT needs an NVIDIA GPU" in out and "without TensorRT" in out
    assert "loaded back, it passes the accuracy gate" in out and "Traceback" not in out
    status = table.set_index("variant").status
    assert status[pico.BASELINE] == "ok" and status["TensorRT FP16"].startswith("TensorRT needs")
    assert status["torch.compile FP32"] == "ok" or not shutil.which("g++")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {f"inference_benchmark.{suffix}" for suffix in ("csv", "png", "svg")}
    assert written == tables | {"pico_llm_fp32.pt2", "pico_llm_fp32.json"}
    stored = pd.read_csv(tmp_path / "out" / "inference_benchmark.csv")
    assert stored.p50_ms.round(6).equals(table.p50_ms.round(6))


def test_an_interruption_leaves_the_shapes_timed_before(script, monkeypatch, model, file, tmp_path):
    def interrupt(variants, batches, *options, time_shape=pico.time_shape):
        if batches[0].shape[1] == 8:
            raise KeyboardInterrupt
        return time_shape(variants, batches, *options)

    monkeypatch.setattr(pico, "time_shape", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pico.advanced_tensorrt_optimization_demo(
            model, file, (1,), (8, 16), tmp_path, seconds=0.01, install=False, variants=("fast",)
        )
    assert set(pd.read_csv(tmp_path / "inference_benchmark.csv").length) == {16}
