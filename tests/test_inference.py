"""Export, engines, the accuracy gate and the benchmark on a CPU; tests marked `gpu` need one and skip without."""

import copy
import json
import math
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import pico_helpers as pico
from pico_helpers import PicoError, PicoLLM, TokenFile, check_accuracy, load_engine, save_engine

LOOSE = dict.fromkeys(pico.TOLERANCE, 1e9) | {"top1_agreement": 0.0}


@pytest.fixture(scope="module")
def model() -> PicoLLM:
    sizes = {"vocab_size": 500, "d_model": 32, "n_layer": 2, "n_head": 2, "d_ff": 32}
    model = PicoLLM(pico.ModelConfig(**sizes, context_length=32, max_positions=64, dropout=0.5), seed=1)
    for name, parameter in model.named_parameters():  # attention and logits as sharp as a trained model's
        if parameter.ndim == 2:
            parameter.data.mul_(30 if "embedding" in name else 12)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> TokenFile:
    tokens = np.random.default_rng(0).integers(1, 500, 20_000).astype(np.uint16)
    return TokenFile(tmp_path_factory.mktemp("tokens"), "random tokens", 1, tokens, np.arange(0, 20_001, 100))


@pytest.fixture(scope="module")
def tokens(file) -> torch.Tensor:
    return pico.held_out_sequences(file, 3, 32)


def shifted(model, change):
    """The model with its logits changed by a function of them."""
    return lambda idx: change(model(idx).clone())


def test_accuracy_measures_what_it_says(model, tokens, monkeypatch):
    monkeypatch.setattr(pico, "TOLERANCE", LOOSE)
    assert list(check_accuracy(model.train(), model, tokens).values()) == [0, 0, 1, 0, 0]
    assert model.training  # and no dropout came between
    with pico.evaluating(model):
        p, targets = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    q, difference = 1.5 * p, 0.5 * p.abs()
    expected = {"max_difference": difference.max(), "mean_difference": difference.mean(), "top1_agreement": 1.0}
    expected["kl_divergence"] = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    expected["loss_change"] = F.cross_entropy(q, targets) - F.cross_entropy(p, targets)
    found = check_accuracy(model, shifted(model, lambda logits: logits * 1.5), tokens)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)
    fourth = torch.arange(32)[:, None] % 4 == 0  # another token wins at every fourth position
    swapped = check_accuracy(model, shifted(model, lambda logits: torch.where(fourth, -logits, logits)), tokens)
    assert swapped["top1_agreement"] == 0.75
    poison = torch.zeros(32, 500).index_fill(0, torch.tensor(5), math.nan)
    with pytest.raises(PicoError, match="max_difference nan"):  # even by the loosest bounds
        check_accuracy(model, shifted(model, lambda logits: logits + poison), tokens)


def test_half_precision_passes_the_gate_and_faults_do_not(model, tokens):
    half = copy.deepcopy(model).half().eval()
    assert 0 < check_accuracy(model, half, tokens)["max_difference"] < 0.2
    wrong_order, silent_head = copy.deepcopy(half), copy.deepcopy(half)
    wrong_order.rope_sin.zero_()  # attention that cannot tell positions apart
    silent_head.blocks[0].attention.out_proj.weight.data[:, :16] = 0
    for broken in (wrong_order, silent_head):
        with torch.no_grad(), pytest.raises(PicoError, match=r"Refused by the accuracy gate: .*\(bound"):
            check_accuracy(model, broken, tokens)


def test_a_flip_counts_only_beyond_the_rounding_of_the_precision(model, tokens, monkeypatch):
    """What rounding cannot tell apart may change places; a token that FP32 puts further below may not win."""
    monkeypatch.setattr(pico, "TOLERANCE", LOOSE)
    rounded = shifted(model, lambda logits: logits.bfloat16().float())
    assert check_accuracy(model, rounded, tokens, "bf16")["top1_agreement"] == 1.0
    second_wins = shifted(model, lambda logits: logits.scatter(-1, logits.argmax(-1, keepdim=True), -1e9))
    with pico.evaluating(model):
        best, second = model(tokens[:, :-1]).topk(2).values.unbind(-1)
    for precision, share in pico.ROUNDING.items():
        near = (best - second <= share * best.abs()).float().mean().item()
        found = check_accuracy(model, second_wins, tokens, precision)["top1_agreement"]
        assert found == pytest.approx(near, abs=1e-6)


@pytest.mark.parametrize("name", LOOSE)
def test_each_bound_refuses_by_itself(model, tokens, name, monkeypatch):
    monkeypatch.setattr(pico, "TOLERANCE", LOOSE | {name: 1.0 if name == "top1_agreement" else 1e-6})
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PicoError, match=f"gate: {name} [^,]*$"):
        check_accuracy(model, shifted(model, lambda logits: logits + 2 * noise), tokens)


def test_the_reference_runs_without_tf32_and_the_setting_is_restored(model, tokens, monkeypatch):
    monkeypatch.setattr(pico, "TOLERANCE", LOOSE)
    seen = set()
    hook = model.register_forward_pre_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    with hook, pico.float32_matmul("high"):
        check_accuracy(model, lambda idx: torch.zeros(1, 32, 500), tokens)
        assert seen == {"highest"} and torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_exported_program_has_dynamic_shapes_and_the_same_logits_also_without_this_project(model, tokens, tmp_path):
    program = pico.export_program(model.train(), 8, 64)
    module = program.module()
    assert model.training
    for batch, length in ((1, 1), (1, 64), (8, 1), (3, 17), (8, 64)):
        idx = torch.randint(500, (batch, length), generator=torch.Generator().manual_seed(length))
        with pico.evaluating(model):
            expected = model(idx)
            assert (module(idx) - expected).abs().max() < 2e-5
    fixed = pico.export_program(model, 1, 32, fixed=True).module()
    for run, shape in ((module, (1, 65)), (fixed, (1, 31))):
        with pytest.raises((RuntimeError, AssertionError)):
            run(torch.zeros(shape, dtype=torch.int64))
    path = save_engine(program, tmp_path / "model.ts")
    assert path == tmp_path / "model.pt2"  # the suffix follows the format
    torch.save(idx, tmp_path / "idx.pt")
    script = 'import torch as t; t.save(t.export.load("model.pt2").module()(t.load("idx.pt")), "out.pt")'
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, atol=2e-5, rtol=0)
    assert check_accuracy(model, load_engine(str(path)), tokens)["max_difference"] < 1e-5
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"x" * len(content)):
        path.write_bytes(damaged)
        with pytest.raises(PicoError, match=r"model.pt2 cannot be loaded; build it again and save it\. "):
            load_engine(path)


def test_an_engine_that_cannot_work_here_is_refused_before_it_is_read(tmp_path, monkeypatch):
    packages = [SimpleNamespace(name=name, version="10.13") for name in ("tensorrt_cu12_libs", "numpy")]
    monkeypatch.setattr(pico.importlib.metadata, "distributions", lambda: packages)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    here = "sm_75, tensorrt_cu12_libs 10.13"
    monkeypatch.setattr(torch.jit, "load", lambda path: pytest.fail("read"))
    for target in (here.replace("75", "80"), here.replace("13", "15")):
        (tmp_path / "engine.json").write_text(json.dumps({"built_for": target}))
        with pytest.raises(PicoError, match=rf"build it again and save it\. It was built for {target}, here is {here}"):
            load_engine(tmp_path / "engine.ts")
    with pytest.raises(PicoError, match="cannot be loaded"):
        load_engine(tmp_path / "absent.ts")


@pytest.mark.parametrize("cuda, option", [("12.8", "--index-url"), ("13.0", "--extra-index-url")])
def test_install_takes_the_release_first_and_then_what_it_requires(monkeypatch, cuda, option):
    """Never the libraries of two CUDA versions; PyPI has no builds for CUDA 12."""
    commands, package, other = [], ModuleType("torch_tensorrt"), {"12.8": "13.0", "13.0": "12.8"}[cuda]
    wanted = ["dllist", "psutil", *(f"tensorrt-cu{cuda[:2]}{x}<10.16.0,>=10.15.1" for x in ("", "-bindings", "-libs"))]
    required = ["torch<2.12.0,>=2.11.0", "tensorrt<10.16.0,>=10.15.1", "numpy", *wanted]

    def run(command, **_):
        commands.append(command)
        if len(commands) == 2:
            monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
        return SimpleNamespace(returncode=len(commands) > 2, stderr="noise\nERROR: No matching distribution")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(pico.subprocess, "run", run)
    monkeypatch.setattr(pico.importlib.metadata, "requires", lambda package: required)
    with pytest.raises(PicoError, match="run install_tensorrt"):
        pico.install_tensorrt(install=False)
    assert not commands, "pip is not asked"
    for _ in range(2):
        assert pico.install_tensorrt() is package and len(commands) == 2, "what works is left alone"
    index = f"{option}=https://download.pytorch.org/whl/cu{cuda.replace('.', '')}"
    assert commands[0][-2:] == [index, "torch-tensorrt==2.11.*"] and commands[1][-5:] == wanted
    assert all({"--no-deps", "--retries=0", "--timeout=5"} <= set(command) for command in commands)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(PicoError, match=r"PyTorch 2.11.0\+cu128: ERROR: No matching distribution$"):
        pico.install_tensorrt()
    with pytest.raises(PicoError, match=f"not for CUDA {other}"):  # as what PyPI alone would give for CUDA 12
        list(pico.tensorrt_packages("2.11.0", other, lambda package: required))


@pytest.fixture
def trt(monkeypatch) -> SimpleNamespace:
    """Torch-TensorRT without TensorRT: makes modules of the `parts`; `calls` is what it was asked for."""

    def compile_program(program, *, arg_inputs, **options):
        trt.calls.append({"program": program, "shapes": arg_inputs[0], **options})
        if not options["decompose_attention"] and not trt.attention:
            raise AssertionError("no attention layer\nlong trace")
        module = torch.nn.Module()
        for name in trt.parts:
            module.add_module(name, program.module())
            module.forward = module.get_submodule(name).forward
        return module

    trt = SimpleNamespace(calls=[], parts=["_run_on_acc_0"], attention=True)
    trt.dynamo, trt.Input = SimpleNamespace(compile=compile_program), dict
    monkeypatch.setattr(pico, "install_tensorrt", lambda _: trt)
    monkeypatch.setattr(PicoLLM, "to", lambda self, *to: self if to == ("cuda",) else torch.nn.Module.to(self, *to))
    return trt


def test_compile_asks_for_a_whole_typed_engine_with_attention_as_a_layer(trt, model, tokens):
    engine = pico.compile_tensorrt(model, 8, 48)
    (call,) = trt.calls
    assert call["use_explicit_typing"] and call["require_full_compilation"] and not call["decompose_attention"]
    assert not call.get("use_fp32_acc"), "it would cast every product to FP32"
    profile = {"min_shape": (1, 1), "opt_shape": (2, 48), "max_shape": (8, 48)}
    assert call["shapes"] == profile | {"dtype": torch.int64}
    (idx,) = (node for node in call["program"].graph.nodes if node.name == "idx")
    assert [size.node.hint for size in idx.meta["val"].shape] == [2, 48], "the releases tune for the example"
    assert {t.dtype for t in call["program"].state_dict.values()} == {torch.float16}
    assert any("scaled_dot_product" in str(node.target) for node in call["program"].graph.nodes)
    assert next(model.parameters()).dtype == torch.float32 and next(model.parameters()).requires_grad
    assert check_accuracy(model, engine, tokens)["max_difference"] < 0.2
    idx = tokens[:1, :-1]
    assert engine.module(idx).shape[-1] == model.config.padded_vocab_size == 512, "nothing is cut inside"
    assert engine(idx).shape[-1] == 500 and engine(idx)._base is not None, "a view"
    fixed = pico.compile_tensorrt(model, 1, 32, fixed=True, use_fp32_acc=True)
    assert trt.calls[1]["shapes"] == {"shape": (1, 32), "dtype": torch.int64} and trt.calls[1]["use_fp32_acc"]
    assert check_accuracy(model, fixed, tokens)["max_difference"] < 0.2


def test_compile_falls_back_to_decomposed_attention_and_refuses_partial_engines(trt, model):
    trt.attention = False
    assert pico.compile_tensorrt(model, 32, 32).shape == (32, 32)
    assert [call["decompose_attention"] for call in trt.calls] == [False, True]
    for parts in ([], ["_run_on_acc_0", "_run_on_gpu_1"]):
        trt.parts = parts
        with pytest.raises(PicoError, match=r"cannot be built\. TensorRT did not take the whole model, parts: "):
            pico.compile_tensorrt(model, 1, 8)
    with pytest.raises(PicoError, match=r"cannot be built\. AssertionError: no attention layer$"):
        pico.compile_tensorrt(model, 1, 8, decompose_attention=False)


@pytest.mark.gpu
def test_tensorrt_engine_is_accurate_and_survives_saving(model, tokens, tmp_path):
    pytest.importorskip("torch_tensorrt", exc_type=Exception)
    model = copy.deepcopy(model).cuda().eval()
    check_accuracy(model, pico.compile_tensorrt(model, 1, 32, fixed=True), tokens)
    engine = pico.compile_tensorrt(model, 4, 32)
    check_accuracy(model, engine, tokens)
    with engine.cuda_graphs():
        check_accuracy(model, engine, tokens)
    check_accuracy(model, load_engine(save_engine(engine, tmp_path / "engine")), tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_the_model_at_every_shape(model):
    half = copy.deepcopy(model).cuda().half().eval()
    graph = pico.CudaGraph(half)
    with torch.no_grad():
        for batch, length in ((1, 8), (1, 8), (3, 32), (1, 8)):
            idx = torch.randint(500, (batch, length), device="cuda")
            torch.testing.assert_close(graph(idx), half(idx))


@pytest.fixture
def clock(monkeypatch):
    """Time in seconds, which passes only when a stand-in says so."""
    clock = SimpleNamespace(now=0.0)
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


@pytest.fixture
def ways(model, clock) -> list[pico.Variant]:
    """Ways to run of known speed: a baseline, a faster one, TensorRT between them, four that fail."""

    def run(milliseconds, fails_at, idx):
        assert idx.shape[1] != fails_at, "out of memory\ndetails"
        clock.now += milliseconds / 1e3
        return model(idx)

    runs = {pico.BASELINE: (40, 0), "fast": (5, 0), "TensorRT FP16": (25, 0), "explodes": (15, 16)}
    builds = {name: lambda times=times: lambda idx: run(*times, idx) for name, times in runs.items()}
    builds |= {"unbuilt": lambda: {}["no"], "inaccurate": lambda: lambda idx: model(idx) + 2}
    builds["wrong in batches"] = lambda: lambda idx: run(30, 0, idx.roll(1, 0))
    return [pico.Variant(name, "fp32", build) for name, build in builds.items()]


def test_each_shape_has_its_own_accuracy(model, file, tmp_path):
    def rounded(idx):
        return model(idx).half().float()

    ways = [pico.Variant(pico.BASELINE, "fp32", lambda: model), pico.Variant("rounded", "fp16", lambda: rounded)]
    shapes = [(1, 32), (1, 8), (2, 16)]
    table = pico.benchmark(model, file, ways, shapes, 0.01, tmp_path / "table.csv").query("variant == 'rounded'")
    for (batch, length), row in zip(shapes, table.itertuples(), strict=True):
        gate = pico.held_out_sequences(file, 8 * batch, length)[:8]
        expected = pico.check_accuracy(model, rounded, gate, "fp16", batch)
        assert (row.max_difference, row.kl_divergence) == (expected["max_difference"], expected["kl_divergence"])
    assert table.kl_divergence.nunique() == 3 and table.build_s.nunique() == 1


def test_benchmark_table_is_complete_and_its_ratios_right(ways, model, file, tmp_path, capsys):
    for *shape, seconds in ((0, 8, 1), (1, 65, 1), (1, 0, 1), *((1, 8, s) for s in (-1, 0, math.nan, math.inf))):
        with pytest.raises(PicoError, match="must be positive numbers, lengths at most 64"):
            pico.benchmark(model, file, ways, [shape], seconds, tmp_path / "table.csv")
    shapes = [(1, 32), (1, 16), (1, 8), (2, 16)]
    table = pico.benchmark(model, file, ways, shapes, 1.0, tmp_path / "table.csv")
    assert list(zip(table.batch, table.length, strict=True)) == [shape for shape in shapes for _ in ways]
    times = {pico.BASELINE: 40, "fast": 5, "TensorRT FP16": 25}
    for row in table[table.variant.isin(times)].itertuples():
        ms = times[row.variant]
        assert (row.p50_ms, row.p99_ms, row.speedup) == pytest.approx((ms, ms, 40 / ms))
        assert (row.vs_best_pytorch, row.tokens_per_s) == pytest.approx((5 / ms, row.batch * row.length / ms * 1e3))
        assert row.status == "ok" and row.kl_divergence == 0 and row.build_s == pytest.approx(ms / 1e3)
    assert table[["device", "torch", "date"]].notna().all(axis=None), "also of rows that failed"
    failed = table[table.status != "ok"].groupby("variant").status.agg(["size", "first"])
    assert failed.loc["unbuilt"].tolist() == [4, "KeyError: 'no'"]
    assert failed.loc["explodes"].tolist() == [3, "AssertionError: out of memory"]  # the headline was timed before
    assert failed.loc["wrong in batches"].iloc[0] == 1 and "Refused" in failed.loc["wrong in batches"].iloc[1]
    assert table.loc[table.status.str.startswith("Refused"), "kl_divergence"].isna().all(), "of another shape"
    assert failed.loc["inaccurate"].iloc[0] == 4 and "gate: max_difference 2" in failed.loc["inaccurate"].iloc[1]
    assert table[table.status != "ok"][["p50_ms", "p99_ms", "speedup"]].isna().all(axis=None)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and all(": left out. " in line for line in lines)  # one line each
    for frame in (table.assign(p50_ms=math.nan, p99_ms=math.nan, speedup=math.nan), table):  # also when all failed
        axes = pico.plot_benchmark(frame).axes
        assert [panel.get_title("left") for panel in axes] == [f"batch {b}, {n} tokens" for b, n in shapes]
        assert [text.get_text() for text in axes[0].get_yticklabels()] == [way.name for way in ways[::-1]]
        axes[0].figure.canvas.draw()
    p99 = table[(table.batch == shapes[0][0]) & (table.length == shapes[0][1])].p99_ms.dropna()
    assert sorted(segment[1, 0] for segment in axes[0].collections[0].get_segments() if len(segment)) == pytest.approx(
        sorted(p99)
    )
    assert {"5 ms, 8×", "left out"} <= {text.get_text() for text in axes[1].texts}


def test_no_row_is_always_first_and_each_gets_its_time(monkeypatch):
    order, seconds = [], set()
    monkeypatch.setattr(pico, "time_calls", lambda run, _, s: order.append(run()) or seconds.add(s) or [1.0])
    pico.time_shape([pico.Variant(str(i), "fp32", lambda i=i: lambda: i) for i in range(3)], [torch.zeros(1, 1)], 1.0)
    turns = [order[i : i + 3] for i in range(3, len(order), 3)]  # the first three calls compile
    assert len(turns) == 5 and all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert {turn[0] for turn in turns} == {0, 1, 2} and seconds == {0.0, 0.2}


def test_rows_on_a_gpu_make_the_ratio_honest(monkeypatch):
    gpu, found = SimpleNamespace(rope_cos=SimpleNamespace(is_cuda=True)), []
    for capability in ((7, 5), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, answer=capability: answer)
        found.append({way.name: way.shape for way in pico.make_variants(gpu, 8, 32)})
    assert next(iter(found[0])) == pico.BASELINE
    assert found[1].keys() - found[0].keys() == {"PyTorch BF16", "PyTorch TF32"}
    wanted = {"PyTorch FP32, CUDA graph", "torch.compile FP32, reduce-overhead", "TensorRT FP16"}
    assert wanted | {"torch.compile FP16, CUDA graph"} <= found[0].keys()
    assert {name for name, shape in found[0].items() if shape == (1, 32)} == {n for n in found[0] if "one shape" in n}


def test_demo_on_a_cpu_tells_checks_times_and_saves(monkeypatch, model, file, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = pico.advanced_tensorrt_optimization_demo(model, file, None, (16,), tmp_path / "out", seconds=0.01)
    out, status = capsys.readouterr().out, table.set_index("variant").status
    assert "TensorRT FP16: left out. TensorRT needs an NVIDIA GPU" in out and "Fastest at batch 1, 16 tokens" in out
    assert "loaded back, it passes the accuracy gate" in out and "Traceback" not in out
    assert status[pico.BASELINE] == "ok" and status["TensorRT FP16"].startswith("TensorRT needs")
    assert status["torch.compile FP32"] == "ok" or not shutil.which("g++")
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert written.keys() == {f"inference_benchmark.{kind}" for kind in ("csv", "png", "svg")} | {"pico_llm_fp32.pt2"}
    assert pd.read_csv(written["inference_benchmark.csv"]).p50_ms.round(6).equals(table.p50_ms.round(6))


def test_demo_chooses_and_an_interruption_leaves_what_was_timed(ways, monkeypatch, model, file, tmp_path):
    def interrupt(chosen, batches, *options, time_shape=pico.time_shape):
        if batches[0].shape[1] == 8:
            raise KeyboardInterrupt
        return time_shape(chosen, batches, *options)

    ways.append(pico.Variant("fast, one shape", "fp32", lambda: model, shape=(1, 16)))
    monkeypatch.setattr(pico, "make_variants", lambda *_: ways)
    monkeypatch.setattr(pico, "time_shape", interrupt)
    demo = pico.advanced_tensorrt_optimization_demo
    with pytest.raises(KeyboardInterrupt):
        demo(model, file, (2, 1), (16, 8, 16), tmp_path, seconds=1, variants=["FAST"])
    with pytest.raises(pico.PicoError, match="No row is called slow; choose of"):
        demo(model, file, results=tmp_path, variants=["FAST", "slow"])
    table = pd.read_csv(tmp_path / "inference_benchmark.csv")[["batch", "length", "variant"]].values.tolist()
    rows = [pico.BASELINE, "fast"]  # the headline comes first
    assert table == [[1, 16, name] for name in (*rows, "fast, one shape")] + [[2, 16, name] for name in rows]
