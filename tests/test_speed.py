"""Optimizers, loaders, several processes, bad steps and the profile."""

import csv
import dataclasses
import functools
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import pico_helpers as pico
import profile_training as profile
from pico_helpers import PicoError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def random_batch(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50257, (rows, 33), generator=torch.Generator().manual_seed(seed))


# --- optimizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 32), (2, 32, 8)])
def test_orthogonalize_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.logspace(-2, 0, min(shape[1:])).diag_embed()  # apart by a factor of 100
    found = u.mT @ pico.orthogonalize(7 * u @ values @ vh) @ vh.mT  # diagonal when the singular vectors are the same
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert (found - diagonal.diag_embed()).abs().max() < 1e-3
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25


def pieces_of(name: str, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrices that lie stacked in a parameter of the blocks."""
    return parameter.chunk(3 if "qkv" in name else 2 if "gate_up" in name else 1)


@pytest.mark.parametrize("d_ff", [16, 48])
def test_muon_steps_each_matrix_as_pytorch_does_and_leaves_the_rest_to_adamw(tiny_config, d_ff):
    """PyTorch computes in bf16, hence the tolerance. d_ff makes the matrices wide or tall."""
    config = pico.TrainConfig(optimizer="muon", matrix_learning_rate=0.1, matrix_weight_decay=0.2)
    model, twin = (pico.PicoLLM(dataclasses.replace(tiny_config, d_ff=d_ff)) for _ in range(2))
    optimizer = pico.make_optimizer(model, config)
    adamw = pico.make_optimizer(twin, dataclasses.replace(config, optimizer="adamw"))
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    start = {name: p.detach().clone() for name, p in matrices.items()}
    theirs = {name: [piece.clone().requires_grad_() for piece in pieces_of(name, p)] for name, p in start.items()}
    reference = torch.optim.Muon([m for ms in theirs.values() for m in ms], lr=0.1, weight_decay=0.2, momentum=0.95)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for (name, p), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            other.grad = p.grad.clone()
            for matrix, gradient in zip(theirs.get(name, []), pieces_of(name, p.grad), strict=name in theirs):
                matrix.grad = gradient.clone()
        for each in (optimizer, adamw, reference):
            each.step()
    for name, p in matrices.items():
        torch.testing.assert_close(p.detach(), torch.cat([m.detach() for m in theirs[name]]), atol=8e-3, rtol=0)
        assert (p - start[name]).abs().mean() > 0.02
    rest = [(p, q) for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True) if n not in matrices]
    assert len(rest) > 4 and all(torch.equal(p, q) for p, q in rest)
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters()), "every parameter has one group"


def test_schedules_reach_every_group(tiny_model):
    config = pico.TrainConfig(optimizer="muon", warmup_steps=10)
    optimizer = pico.make_optimizer(tiny_model, config)
    for step in range(100):
        pico.set_rates(optimizer, step, 100, config)
        share = optimizer.param_groups[-1]["lr"] / config.learning_rate
        assert share == pytest.approx((step + 1) / 10 if step < 10 else (100 - step) / 90)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(config.matrix_learning_rate * share)
        assert optimizer.param_groups[-1]["weight_decay"] == 0


# --- bad steps and memory ---------------------------------------------------------------------------------------------


class Spoilt(torch.nn.Module):
    """A model whose loss is what `spoil` makes of it."""

    def __init__(self, model: pico.PicoLLM, spoil) -> None:
        super().__init__()
        self.model, self.spoil = model, spoil

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.spoil(self.model(idx, targets))


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
@pytest.mark.parametrize("spoil", [lambda x: x * float("nan"), lambda x: x * float("inf"), lambda x: x + 50])
def test_a_bad_step_changes_nothing(tiny_config, optimizer_name, spoil):
    config = pico.TrainConfig(optimizer=optimizer_name, batch_size=4)
    model = pico.PicoLLM(tiny_config)
    optimizer = pico.make_optimizer(model, config)
    guard = pico.LossGuard(50257, CPU)

    def step(number: int, spoil=lambda x: x) -> None:
        args = (optimizer, no_scaler(), random_batch(4, number), config, number, torch.float32, guard)
        pico.train_step(Spoilt(model, spoil), *args)

    def snapshot() -> list[torch.Tensor]:
        state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        return [v.clone() for v in (*model.parameters(), *state)]

    step(0)
    before = snapshot()
    step(1, spoil)
    after = snapshot()
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    step(2)
    assert not torch.equal(before[0], snapshot()[0]), "a good step after a bad one is taken"
    loss, skipped = guard.read()
    assert skipped == 1 and 10 < loss < 12, "the bad loss is not part of the mean"


def test_a_run_begun_in_bf16_goes_on_in_fp16(tiny_config):
    """As when Colab gives an A100 one day and a T4 the next."""
    config = pico.TrainConfig(batch_size=4)
    begun = pico.TrainingRun(tiny_config, config, "", CPU, torch.bfloat16)
    resumed = pico.TrainingRun(tiny_config, config, "", CPU, torch.float16)
    resumed.restore(begun.checkpoint())
    before = resumed.model.token_embedding.weight.detach().clone()
    args = resumed.optimizer, resumed.scaler, random_batch(4), config, 0, torch.float16, resumed.guard
    loss = pico.train_step(resumed.model, *args)
    assert 10 < loss < 12 and resumed.scaler.get_scale() > 1
    assert not torch.equal(before, resumed.model.token_embedding.weight), "the step was taken"
    again = pico.TrainingRun(tiny_config, config, "", CPU, torch.float16)
    resumed.scaler.update(128.0)
    again.restore(resumed.checkpoint())
    assert again.scaler.state_dict()["scale"] == 128.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_is_one_graph_for_all_models_of_a_shape(tiny_config, dtype, monkeypatch):
    """What `torch.compile` gets: no break, the loss in chunks of which the last is shorter, and eager's gradients."""
    monkeypatch.setattr(pico.CausalSelfAttention, "backward_by_products", False)  # eager does without
    by_words = pico.loss_by_words  # below: with the exponentials of eager
    monkeypatch.setattr(pico, "loss_by_words", lambda *arguments: by_words(*arguments[:-1], False))
    torch.compiler.reset()  # what other tests compiled would decide which sizes are dynamic
    counter = CompileCounterWithBackend("aot_eager")
    config = dataclasses.replace(tiny_config, dropout=0.0)
    batch = random_batch(5)
    for seed in (0, 1):
        model = pico.PicoLLM(config, seed).train()
        model.loss_chunk = 20_000
        gradients = []
        for forward in (model, torch.compile(model, backend=counter, fullgraph=True)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = forward(batch[:, :-1], batch[:, 1:])
            loss.backward()
            gradients.append([p.grad for p in model.parameters()])
            model.zero_grad(set_to_none=True)
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counter.frame_count == 1, "the profiler's contestants share what is compiled"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc's allocator")
def test_memory_freed_in_a_step_is_kept_for_the_next():
    def faults() -> int:
        """Pages that the system had to give for 64 MB."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(3)) > 30  # of 2 MB at most
    with pico.kept_memory(CPU):
        assert min([faults() for _ in range(12)][9:]) < 10  # after the first ones have found their places
    assert faults() > 30, "it was given back"


def test_a_few_nan_steps_are_counted_and_the_run_goes_on(tiny_config, tiny_train, data_folder, tmp_path, monkeypatch):
    original, calls = pico.PicoLLM.forward, []

    def forward(self, *args, **options):
        out = original(self, *args, **options)
        if self.training:
            calls.append(1)
            out = out * float("nan") if len(calls) in (4, 5) else out
        return out

    monkeypatch.setattr(pico.PicoLLM, "forward", forward)
    result = pico.train(tiny_config, tiny_train, tmp_path, data_folder)
    assert result.finished and [row["skipped_steps"] for row in result.metrics] == [0, 2, 2, 2]
    assert all(row["train_loss"] < 12 for row in result.metrics) and result.metrics[-1]["val_loss"] < 11


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_an_exploding_run_stops_and_keeps_the_last_good_checkpoint(
    tiny_config, tiny_train, data_folder, tmp_path, optimizer_name, monkeypatch
):
    def set_rates(optimizer, step, *_):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 if step < 3 else 1e4

    monkeypatch.setattr(pico, "set_rates", set_rates)
    config = dataclasses.replace(tiny_train, optimizer=optimizer_name, max_steps=60, log_interval=1)
    with pytest.raises(PicoError, match=r"has exploded: 10 steps in a row were skipped.*lower the learning rate"):
        pico.train(tiny_config, config, tmp_path, data_folder)
    kept = pico.load_checkpoint(pico.run_files(tmp_path, "tiny.partial").model)
    file = pico.prepare_tokens(pico.choose_corpus(config.corpus), "validation", data_folder)
    assert kept.step == 3 and pico.evaluate(pico.model_from_checkpoint(kept), file).loss < 11
    assert not pico.run_files(tmp_path, "tiny").model.exists()


def test_a_lost_run_stands_still_until_it_is_noticed():
    guard = pico.LossGuard(50257, CPU)
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    verdicts = [float(guard.count(loss, one)) for loss in [one] + [nan] * guard.patience + [one, one]]
    assert verdicts == [0.0] + [1.0] * (guard.patience + 2)
    with pytest.raises(PicoError, match="has exploded"):
        guard.read()


def test_overflowing_fp16_gradients_lower_the_scale_and_skip_the_step(tiny_config):
    """The scaler works on the CPU as on a GPU: a gradient beyond 65,504 is infinite in fp16."""
    config, model, guard = pico.TrainConfig(batch_size=4), pico.PicoLLM(tiny_config), pico.LossGuard(50257, CPU)
    optimizer, before = pico.make_optimizer(model, config), [p.clone() for p in model.parameters()]
    for scale, after in ((1e38, 5e37), (1024.0, 1024.0)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        pico.train_step(model, optimizer, scaler, random_batch(4), config, 0, torch.float16, guard)
        assert scaler.get_scale() == pytest.approx(after)
        is_same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert is_same == (scale == 1e38)


@pytest.mark.parametrize(
    ("error", "micro", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), None, "with 12 sequences at a time; set micro_batch_size to 6"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "with 4 .*; set micro_batch_size to 2"),
        (MemoryError(), 1, "with 1 .*; choose a smaller model"),
        (RuntimeError("a defect"), None, None),
    ],
)
def test_out_of_memory_names_the_batch_size_to_try_and_other_errors_pass_through(
    tiny_config, tiny_train, data_folder, tmp_path, monkeypatch, error, micro, advice
):
    def fail(*_):
        raise error

    monkeypatch.setattr(pico, "train_step", fail)
    config = dataclasses.replace(tiny_train, batch_size=12, micro_batch_size=micro)
    expected = (PicoError, f"Out of memory {advice}") if advice else (RuntimeError, "a defect")
    with pytest.raises(expected[0], match=expected[1]):
        pico.train(tiny_config, config, tmp_path, data_folder)


def test_a_run_goes_on_with_smaller_micro_batches(tiny_config, tiny_train, data_folder, tmp_path, monkeypatch, capsys):
    original = pico.train_step

    def limited(*args):
        if args[5] == 3 and args[4].micro_batch_size is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args)

    monkeypatch.setattr(pico, "train_step", limited)
    with pytest.raises(PicoError, match="set micro_batch_size to 2"):
        pico.train(tiny_config, tiny_train, tmp_path, data_folder)
    config = dataclasses.replace(tiny_train, micro_batch_size=2)
    assert pico.train(tiny_config, config, tmp_path, data_folder).finished
    assert "at step 3 of 12" in capsys.readouterr().out


# --- loaders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(corpus_folder, data_folder) -> pico.SequenceStream:
    file = pico.prepare_tokens(pico.choose_corpus(str(corpus_folder)), "train", data_folder)
    return pico.SequenceStream(file, 32, 50, seed=3)  # of 50 sequences, so that batches of 8 straddle epochs


@pytest.mark.parametrize("kind", pico.LOADERS)
def test_all_loaders_yield_the_same_batches(stream, kind, monkeypatch):
    steps, before = range(4, 21), torch.get_rng_state()  # as after a resume; over three epochs
    batches = list(pico.make_loader(kind, stream, 8, steps, CPU))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    assert len(batches) == len(steps)
    for step, batch in zip(steps, batches, strict=True):
        assert batch.dtype == torch.int64 and torch.equal(batch, stream.batch(step * 8, 8))
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(pico, "ranks", lambda rank=rank: (rank, 2))
        halves.append(list(pico.make_loader(kind, stream, 8, range(4, 7), CPU)))
    for whole, *parts in zip(batches, *halves, strict=False):
        assert torch.equal(whole, torch.cat(parts)), "the processes' parts make up the batch"


def test_resident_batches_hold_the_highest_tokens(tmp_path):
    """They do not fit into a signed 16-bit integer."""
    import numpy as np

    tokens = np.arange(50257 - 200, 50257, dtype=np.uint16)
    starts = np.array([0, 70, 71, 200])
    file = pico.TokenFile(tmp_path, "made up", 1, tokens, starts)
    stream = pico.SequenceStream(file, 16, None, seed=0)
    batches = list(pico.make_loader("resident", stream, 4, range(9), CPU))
    assert torch.cat(batches).min() > 32767
    for step, batch in enumerate(batches):
        assert torch.equal(batch, stream.batch(step * 4, 4))


def test_a_large_corpus_is_not_made_resident(stream, monkeypatch):
    assert pico.choose_loader(stream, CPU) == "naive"
    limit = 2 * stream.n_sequences * 32 * 10
    for memory, kind in ((limit, "resident"), (limit - 1, "workers")):
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert pico.choose_loader(stream, torch.device("cuda")) == kind


# --- precision and compilation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bf16_seconds", "expected"), [(0.2, torch.bfloat16), (0.9, torch.float32), (19, torch.float32)]
)
def test_a_cpu_chooses_bf16_where_its_products_are_faster(monkeypatch, bf16_seconds, expected):
    now = [0.0]

    class Matrix:
        def __init__(self, *_, dtype):
            self.seconds = bf16_seconds if dtype == torch.bfloat16 else 1.0

        def __matmul__(self, other):
            now[0] += self.seconds

    monkeypatch.setattr(pico.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "ones", Matrix)
    pico.bf16_is_faster.cache_clear()
    assert pico.choose_precision("auto", CPU) == expected
    now[0], pico.time.perf_counter = 0.0, None
    assert pico.choose_precision("auto", CPU) == expected, "asked once a process"
    pico.bf16_is_faster.cache_clear()


def test_a_run_keeps_to_its_precision_when_it_is_resumed(
    tiny_config, tiny_train, data_folder, tmp_path, monkeypatch, interrupt
):
    """Another process may time the products anew and find something else."""
    config = dataclasses.replace(tiny_train, precision="auto", optimizer="muon", max_steps=6)
    monkeypatch.setattr(pico, "bf16_is_faster", lambda: True)
    whole = pico.train(tiny_config, config, tmp_path / "whole", data_folder)
    steps = interrupt(2)
    assert not pico.train(tiny_config, config, tmp_path / "parts", data_folder).finished
    monkeypatch.setattr(pico, "bf16_is_faster", lambda: False)
    resumed = pico.train(tiny_config, config, tmp_path / "parts", data_folder)
    assert resumed.finished and {arguments[6] for arguments in steps} == {torch.bfloat16}
    assert all(torch.equal(v, whole.model.state_dict()[name]) for name, v in resumed.model.state_dict().items())
    assert {p.dtype for p in resumed.model.parameters()} == {torch.float32}


def test_validation_computes_in_the_precision_of_the_run(tiny_config, tiny_train, data_folder, tmp_path, monkeypatch):
    original, seen = pico.PicoLLM.forward, []

    def forward(self, *args, **options):
        if not self.training:
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return original(self, *args, **options)

    monkeypatch.setattr(pico.PicoLLM, "forward", forward)
    for precision in ("fp32", "bf16"):
        config = dataclasses.replace(tiny_train, precision=precision, max_steps=1, checkpoint_seconds=1e9)
        seen.clear()
        pico.train(tiny_config, config, tmp_path / precision, data_folder)
        assert {enabled for enabled, _ in seen} == {precision == "bf16"}
    assert {dtype for _, dtype in seen} == {torch.bfloat16}


def test_a_run_is_compiled_where_it_pays_and_a_compiler_works(monkeypatch, capsys):
    monkeypatch.setattr(pico, "compile_function", lambda function: function)
    assert pico.choose_compile(None, CPU, 1e15) and pico.choose_compile(True, CPU, 1.0)
    assert not pico.choose_compile(False, CPU, 1e15) and capsys.readouterr().out == ""
    assert not pico.choose_compile(None, CPU, 1e9) and "not compiled: a run this short" in capsys.readouterr().out
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    assert pico.choose_compile(None, torch.device("cuda"), 1.0)


def test_a_missing_compiler_is_found_before_training():
    """In a process of its own: PyTorch remembers that no compiler was found."""
    script = """
import torch
import torch._inductor.config as config
import pico_helpers as pico
config.cpp.cxx, config.force_disable_caches = (None, "no-such-compiler"), True
assert not pico.choose_compile(True, torch.device("cpu"), 1e15)
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    (problem,) = answer.stdout.splitlines()
    assert problem.startswith("The model is not compiled: ") and "ompiler" in problem


def test_a_compiler_that_fails_half_way_costs_a_line(
    tiny_config, tiny_train, data_folder, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(tiny_train, max_steps=4, optimizer="muon")
    expected = pico.train(tiny_config, config, tmp_path / "eager", data_folder)
    calls = []

    def compile_function(function):
        def failing(*args):
            calls.append(1)
            if len(calls) == 3:  # the third step needs another graph
                raise torch._inductor.exc.InductorError(RuntimeError("cc1plus: out of memory\nmore lines"), None)
            return function(*args)

        failing.parameters = function.parameters
        return failing

    monkeypatch.setattr(pico, "choose_compile", lambda asked, *_: asked)
    monkeypatch.setattr(pico, "compile_function", compile_function)
    result = pico.train(tiny_config, dataclasses.replace(config, compile=True), tmp_path / "parts", data_folder)
    assert capsys.readouterr().out.count("The compiler failed, training goes on without it: ") == 1
    assert result.finished and pico.load_checkpoint(result.checkpoint).environment["compiled"] == "no"
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, expected.model.state_dict()[name]), "the failed step was repeated whole"


def test_a_compiled_run_resumes_bit_for_bit(tiny_config, tiny_train, data_folder, tmp_path, monkeypatch, interrupt):
    config = dataclasses.replace(tiny_train, compile=True, max_steps=4)
    monkeypatch.setattr(pico, "compile_function", functools.partial(torch.compile, backend="aot_eager", dynamic=False))
    torch.compiler.reset()
    whole = pico.train(tiny_config, config, tmp_path / "whole", data_folder)
    assert pico.load_checkpoint(whole.checkpoint).environment["compiled"] == "yes"
    interrupt(2)
    assert not pico.train(tiny_config, config, tmp_path / "parts", data_folder).finished
    torch.compiler.reset()
    resumed = pico.train(tiny_config, dataclasses.replace(config, compile=None), tmp_path / "parts", data_folder)
    assert pico.load_checkpoint(resumed.checkpoint).environment["compiled"] == "yes", "as it was begun"
    assert all(torch.equal(v, whole.model.state_dict()[name]) for name, v in resumed.model.state_dict().items())


def test_compiled_muon_is_one_graph_for_all_rates_and_agrees(tiny_config):
    """What a GPU runs: the rate is a tensor, so that a schedule does not compile every step anew."""
    torch.compiler.reset()
    counter, weights = CompileCounterWithBackend("aot_eager"), []
    for update in (pico.muon_update, torch.compile(pico.muon_update, backend=counter, fullgraph=True)):
        config = pico.TrainConfig(optimizer="muon", warmup_steps=2)
        model = pico.PicoLLM(tiny_config)
        optimizer = pico.make_optimizer(model, config)
        optimizer.update = update
        for step in range(4):
            pico.set_rates(optimizer, step, 4, config)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
        weights.append(model.blocks[0].mlp.down_proj.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 3, "one for each shape"


def test_too_many_compilations_fail_loudly():
    torch.compiler.reset()
    pico.compile_function(lambda x: x)
    assert torch._dynamo.config.recompile_limit == 64
    function = torch.compile(lambda x, n: x * n, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for n in (1, 2.5, True, 1j):
            function(torch.ones(1), n)


class NoReadback(TorchDispatchMode):
    """Fails on whatever would make the host wait for values on the device: `.item()`, `if tensor:`, `nonzero`."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} reads a value back"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_in_a_step_reads_a_value_back(tiny_config, stream, optimizer_name, dtype):
    config = pico.TrainConfig(optimizer=optimizer_name, batch_size=4, micro_batch_size=2)
    run = pico.TrainingRun(tiny_config, config, "", CPU, dtype)
    batches = pico.make_loader("resident", stream, 4, range(3), CPU)
    with NoReadback():
        for step, batch in enumerate(batches):
            pico.set_rates(run.optimizer, step, 3, config)
            loss = run.take_step(batch)
        with pytest.raises(AssertionError, match="reads a value back"):
            float(loss)  # it sees such things


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", pico.LOADERS)
def test_a_step_on_a_gpu_waits_for_nothing(tiny_config, stream, kind):
    device = torch.device("cuda")
    config = pico.TrainConfig(optimizer="muon", batch_size=4)
    run = pico.TrainingRun(tiny_config, config, "", device, pico.choose_precision("auto", device))
    batches = pico.make_loader(kind, stream, 4, range(4), device)
    run.take_step(next(batches).to(device))  # allocates
    torch.cuda.set_sync_debug_mode("default" if kind == "naive" else "error")  # whose copy is from pageable memory
    try:
        for step in range(1, 4):
            pico.set_rates(run.optimizer, step, 4, config)
            loss = run.take_step(next(batches).to(device, non_blocking=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 5 < loss.item() < 12


# --- several processes ------------------------------------------------------------------------------------------------


def driver(folder: Path, data_folder: Path, model: pico.ModelConfig, config: pico.TrainConfig, slow: float) -> Path:
    """A script that trains; each process leaves its number in the file pid-RANK."""
    path = folder / "driver.py"
    path.write_text(
        textwrap.dedent(f"""
        import os, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        import pico_helpers as pico
        folder = Path({str(folder)!r})
        (folder / f"pid-{{os.environ['RANK']}}").write_text(str(os.getpid()))
        step = pico.train_step
        def train_step(*args):
            time.sleep({slow})
            return step(*args)
        pico.train_step = train_step
        model = pico.ModelConfig(**{dataclasses.asdict(model)!r})
        config = pico.TrainConfig(**{dataclasses.asdict(config)!r})
        try:
            snapshot = lambda model, step: print("snapshot", step, flush=True)
            pico.train(model, config, folder / "results", {str(data_folder)!r}, device="cpu", on_snapshot=snapshot)
        except pico.PicoError as error:
            sys.exit(f"Error: {{error}}")
    """)
    )
    return path


def torchrun(script: Path, n: int, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PICO_MENU": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **options
    )


def read_metrics(folder: Path, name: str = "tiny") -> list[dict]:
    with open(pico.run_files(folder / "results", name).metrics) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_two_processes_have_the_losses_of_one(tiny_config, tiny_train, tmp_path, optimizer_name):
    config = dataclasses.replace(
        tiny_train, optimizer=optimizer_name, batch_size=8, micro_batch_size=2, log_interval=1, max_steps=8
    )
    assert tiny_config.dropout > 0
    data = tmp_path / "data"  # tokenised by the first of the two
    with torchrun(driver(tmp_path, data, tiny_config, config, slow=0.0), 2) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.count("Corpus:") == 1 and "2 processes" in output, "the first process alone prints"
    assert re.findall(r"snapshot (\d+)", output) == [str(step) for step in pico.snapshot_steps(8)], "and only it calls"
    expected = pico.train(tiny_config, config, tmp_path / "alone", data)
    rows = read_metrics(tmp_path)
    assert [int(row["tokens"]) for row in rows] == [row["tokens"] for row in expected.metrics]
    for row, other in zip(rows, expected.metrics, strict=True):
        assert float(row["train_loss"]) == pytest.approx(other["train_loss"], abs=1e-5)
        if other["val_loss"]:
            assert float(row["val_loss"]) == pytest.approx(other["val_loss"], abs=1e-5)
    saved = pico.load_checkpoint(pico.run_files(tmp_path / "results", "tiny").model)
    assert saved.train_config == config and saved.training_state is None


def wait_for_rows(folder: Path, n: int, process: subprocess.Popen) -> None:
    metrics = pico.run_files(folder / "results", "tiny.partial").metrics
    for _ in range(1200):
        if metrics.exists() and len(read_metrics(folder, "tiny.partial")) >= n:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("no metrics in 60 s")


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_ends_the_run_and_one_process_resumes_it(
    tiny_config, tiny_train, data_folder, tmp_path, victim, capsys
):
    config = dataclasses.replace(tiny_train, log_interval=1, eval_interval=100)
    with torchrun(driver(tmp_path, data_folder, tiny_config, config, slow=0.3), 2) as process:
        wait_for_rows(tmp_path, 3, process)
        os.kill(int((tmp_path / f"pid-{victim}").read_text()), signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Error: Another process of this run has ended" in output and "run the same command again" in output
    resumed = pico.train(tiny_config, config, tmp_path / "results", data_folder)
    assert resumed.finished and len(resumed.metrics) == 12
    step = int(capsys.readouterr().out.split("at step ")[1].split()[0])
    assert 3 <= step < 12


def test_an_interrupt_stops_both_processes_at_the_same_step(tiny_config, tiny_train, data_folder, tmp_path):
    config = dataclasses.replace(tiny_train, checkpoint_seconds=1e9)
    with torchrun(driver(tmp_path, data_folder, tiny_config, config, slow=0.3), 2, start_new_session=True) as process:
        while "snapshot 1" not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output = process.communicate(timeout=60)[0]
    assert "the same command goes on from its last checkpoint" in output, output
    kept = pico.load_checkpoint(pico.run_files(tmp_path / "results", "tiny.partial").model)
    assert kept.step % config.log_interval == 0 and 0 < kept.step < 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_stops_a_run_with_worker_processes(
    tiny_config, tiny_train, data_folder, tmp_path, number
):
    config = dataclasses.replace(tiny_train, log_interval=1, eval_interval=100)
    script = driver(tmp_path, data_folder, tiny_config, config, slow=0.3)
    text = script.read_text().replace("model = pico", "pico.choose_loader = lambda *_: 'workers'\nmodel = pico", 1)
    script.write_text(text)
    environment = os.environ | {"RANK": "0", "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, str(script)], env=environment, cwd=ROOT, **options) as process:
        wait_for_rows(tmp_path, 2, process)
        os.killpg(process.pid, number)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    assert "the same command goes on from its last checkpoint" in output
    assert 2 <= pico.load_checkpoint(pico.run_files(tmp_path / "results", "tiny.partial").model).step < 12


def test_a_batch_must_split_evenly(tiny_config, tiny_train, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pico, "ranks", lambda: (0, 3))
    with pytest.raises(PicoError, match="batch_size 4 is not a multiple of 3 processes"):
        pico.train(tiny_config, tiny_train, tmp_path, data_folder)


# --- profile ----------------------------------------------------------------------------------------------------------


def test_covered_time_counts_every_unit_once():
    assert profile.covered([(-5, 1), (9, 20), (30, 40)], 0, 10) == 2, "what lies outside does not count"
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        begins = torch.randint(-20, 120, (12,), generator=generator).tolist()
        lengths = torch.randint(0, 30, (12,), generator=generator).tolist()
        intervals = [(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]
        units = {unit for begin, end in intervals for unit in range(begin, end) if 0 <= unit < 100}
        assert profile.covered(intervals, 0, 100) == len(units)


def test_a_trace_tells_how_long_no_kernel_and_no_copy_ran():
    def event(name: str, category: str, start: float, stop: float) -> dict:
        return {"ph": "X", "name": name, "cat": category, "ts": 1000 + 1e3 * start, "dur": 1e3 * (stop - start)}

    host = [event("window", "user_annotation", 0, 40), {"ph": "M", "name": "x"}, event("aten::mm", "cpu_op", 0, 9)]
    host += [event("window", "gpu_user_annotation", 2, 90), event("data", "user_annotation", 0, 1)]
    assert profile.gpu_idle({"traceEvents": host}) is None
    places = [(-5, 1), (0.5, 2.5), (2, 6), (12, 13), (12, 13), (35, 125)]  # overlapping streams, cut by the window
    work = [event("work", ("kernel", "gpu_memcpy")[n % 2], *place) for n, place in enumerate(places)]
    assert profile.gpu_idle({"traceEvents": [*work, *host]}) == pytest.approx(1 - 12 / 40)


def test_shares_sum_up_and_what_the_optimizer_does_is_its_own():
    def event(name: str, time: float, parent=None, kernels=()):
        return SimpleNamespace(name=name, self_cpu_time_total=time, cpu_parent=parent, kernels=kernels)

    optimizer = event("optimizer", 1)
    events = [event("forward", 1), event("aten::mm", 4), event("aten::_to_copy", 2), event("aten::bernoulli_", 1)]
    events += [event("aten::_scaled_dot_product_flash_attention", 3), optimizer, event("aten::mm", 3, optimizer)]
    shares = profile.step_shares([*events, event("graph_0_cpp_fused_add_mm_1", 5)])
    of_20 = {"attention": 3, "matrix products": 4, "compiled kernels": 5, "random numbers": 1, "copies and casts": 2}
    assert shares == {name: value / 20 for name, value in (of_20 | {"optimizer": 4, "rest": 1}).items()}
    nvjet = "nvjet_hsh_192x192_64x3_2x1_v_bz_coopB_TNN"  # cuBLAS on Hopper
    times = {"ampere_sgemm_128x64": 20, nvjet: 10, "Memcpy HtoD": 10}
    kernels = [SimpleNamespace(name=name, duration=time) for name, time in times.items()]
    shares = profile.step_shares([*events, event("launch", 0, None, kernels)])
    assert shares["matrix products"] == 0.75 and shares["copies and casts"] == 0.25


def test_flops_rates_and_peaks(monkeypatch):
    monkeypatch.setattr(pico, "time_calls", lambda run, batches, seconds: [run(batches[0]).shape[0] / 64] * 3)  # 1 ms
    assert profile.matrix_rate(CPU, torch.float32, 64) == pytest.approx(2 * 64**3 / 1e-3)
    model = pico.PicoLLM(pico.ModelConfig())
    n = model.count_parameters()[1]
    assert pico.flops_per_token(model) == 6 * n + 12 * 8 * 384 * 448 == pytest.approx(223e6, rel=0.01)
    teraflops = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "GH200 480GB": 989, "A100-SXM4-80GB": 312}
    teraflops |= {"H200 NVL": 835, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121}
    assert {name: pico.peak_flops(f"NVIDIA {name}") / 1e12 for name in teraflops} == teraflops
    assert pico.peak_flops("Tesla T4") == 65e12
    assert pico.peak_flops("2 x CPU, 2 threads of L4 B200") is None and pico.peak_flops("Tesla K80") is None


@pytest.fixture
def tiny_preset(tiny_config, tiny_train, monkeypatch, tmp_path, data_folder):
    """Options that make `main` run the tiny model."""
    monkeypatch.setitem(pico.PRESETS, "quick", pico.Preset(tiny_config, tiny_train))
    monkeypatch.setattr(profile, "matrix_rate", lambda *_: 1e12)
    common = ["--preset", "quick", "--corpus", tiny_train.corpus, "--out", str(tmp_path), "--data", str(data_folder)]
    return [*common, "--steps", "2", "--warmup", "1", "--precision", "fp32", "--no-compile"]


def read_rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_comparison_writes_table_and_chart(tiny_preset, tmp_path, capsys):
    assert profile.main([*tiny_preset, "--compare", "--peer", "--torch-profiler"]) == 0
    rows = {row["name"]: row for row in read_rows(tmp_path / "profile.csv")}
    assert list(rows) == ["plain loop", "best plain loop", "naive", "workers", "resident"]
    speeds = {name: float(row["tokens_per_second"]) for name, row in rows.items()}
    for name, row in rows.items():
        for base in ("naive", "plain loop", "best plain loop"):
            ratio = float(row[f"ratio_to_{base.replace(' ', '_')}"])
            assert ratio == pytest.approx(speeds[name] / speeds[base], abs=1e-3)
        assert float(row["slowest"]) <= speeds[name] <= float(row["fastest"])
        assert (row["windows"], row["mfu"], row["gpu_idle_share"]) == ("5", "", ""), "no number that was not measured"
        shares = [float(value) for column, value in row.items() if column.startswith("share: ")]
        assert sum(shares) == pytest.approx(1, abs=0.01) and float(row["share: matrix products"]) > 0.05
        rate = speeds[name] * float(row["flops_per_token"]) / 1e12
        assert float(row["mfu_of_measured_rate"]) == pytest.approx(rate, abs=1e-4)
    output = capsys.readouterr().out
    assert output.count("no GPU") == 5 and output.count("peak unknown") == 5 and "matrix products" in output
    row = rows["naive"]
    assert pico.cpu_name() in row["device"] and row["torch"] == torch.__version__ and row["driver"] == ""
    assert (tmp_path / "profile.png").stat().st_size > 1000 and (tmp_path / "profile.svg").exists()
    trace = json.loads((tmp_path / "profile_resident.trace.json").read_text())
    found = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    ranges = ("data", "host-to-device", "forward", "backward", "optimizer")
    assert [found.count(name) for name in ranges] == [2] * 5


def test_batch_sizes_share_a_table_and_lack_of_memory_costs_a_row(tiny_preset, tmp_path, capsys, monkeypatch):
    original = pico.train_step

    def limited(forward, optimizer, scaler, batch, *rest):
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(forward, optimizer, scaler, batch, *rest)

    monkeypatch.setattr(pico, "train_step", limited)
    options = [*tiny_preset, "--loader", "naive", "--repeats", "1", "--loss-chunk", "9000"]
    assert profile.main([*options, "--batch-sizes", "2", "4", "8"]) == 0
    rows = read_rows(tmp_path / "profile.csv")
    assert [(row["name"], row["loss_chunk"]) for row in rows] == [(f"naive, batch {n}", "9000") for n in (2, 4)]
    assert "naive, batch 8: left out. Out of memory with 8 sequences" in capsys.readouterr().out
    assert profile.main([*tiny_preset, "--loader", "naive", "--batch-sizes", "8"]) == 1
    assert "Nothing could be measured" in capsys.readouterr().err


def test_a_plain_loop_takes_micro_batches_on_a_small_gpu(tiny_train, monkeypatch):
    """The full model's batch of 64, whose logits alone are 5 GB."""

    def start(self, kind, loader, preset, *rest):
        self.run = SimpleNamespace(model=SimpleNamespace(blocks=[], parameters=list), compiled=False)
        self.config, self.device = preset.train, torch.device("cuda")

    monkeypatch.setattr(profile.Contestant, "__init__", start)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: None)
    train = dataclasses.replace(tiny_train, batch_size=64)
    for memory, given, size in ((80e9, None, 64), (15e9, None, 16), (1e9, None, 1), (15e9, 2, 2)):
        gpu = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        preset = pico.Preset(pico.ModelConfig(), dataclasses.replace(train, micro_batch_size=given))
        assert profile.PlainLoop("x", "naive", preset).config.micro_batch_size == size


def test_what_identifies_a_measurement_on_a_gpu(monkeypatch):
    run = Mock(side_effect=[subprocess.CompletedProcess([], 0, b"580.1\n580.1\n"), FileNotFoundError()])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(pico.subprocess, "run", run)
    found = [pico.measured_on(torch.device("cuda")) for _ in range(2)]
    assert [(here["device"], here["driver"]) for here in found] == [("NVIDIA X", "580.1"), ("NVIDIA X", None)]
    assert run.call_args.args[0][0] == "nvidia-smi"


def test_all_contestants_learn_the_same(tiny_config, tiny_train, stream):
    """The plain loops differ in speed only: with equal data and no dropout their weights move alike."""
    preset = pico.Preset(dataclasses.replace(tiny_config, dropout=0.0), tiny_train)
    start, moved = pico.PicoLLM(preset.model, tiny_train.seed).token_embedding.weight.detach()[:50257], []
    for kind, size in ((profile.Contestant, None), (profile.PlainLoop, None), (profile.PlainLoop, 1)):
        contestant = kind("x", "naive", preset.with_changes({"micro_batch_size": size}), stream, CPU, 0)
        contestant.measure(1, 3)
        assert contestant.run.step == 4 and len(contestant.windows) == 1
        moved.append((contestant.run.model.token_embedding.weight.detach()[:50257] - start).flatten())
    assert torch.cosine_similarity(moved[0], moved[1], dim=0) > 0.99
    assert torch.cosine_similarity(moved[1], moved[2], dim=0) > 0.999


@pytest.mark.parametrize("option", [("--steps", "0"), ("--batch-sizes", "x"), ("--loss-chunk", "0")])
def test_numbers_that_measure_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        profile.parse_arguments([*option])
    assert f"argument {option[0]}" in capsys.readouterr().err


def test_recipes_compare_rates_of_both_optimizers(tiny_preset, tmp_path, monkeypatch, capsys):
    """The loss is a bowl around a quarter of AdamW's rate and half of Muon's, which is better by 0.5."""
    runs = []

    def train(model, config, *args, **options) -> pico.TrainResult:
        runs.append((config.seed, config.optimizer))
        is_muon, rate = config.optimizer == "muon", config.matrix_learning_rate / 0.02
        if is_muon and rate == 2:
            raise PicoError("The loss exploded.")
        loss = 2.5 + abs(rate - 0.5) if is_muon else 3 + abs(config.learning_rate / 1e-3 - 0.25)
        row = {"val_loss": loss + 0.1 * config.seed, "train_loss": loss, "tokens": 9, "seconds": 1.0}
        return pico.TrainResult(None, tmp_path, [row], True)

    monkeypatch.setattr(pico, "train", train)
    assert profile.main([*tiny_preset, "--recipes", "--seeds", "2"]) == 0
    assert runs == [(seed, name) for seed in (0, 1) for name in ("adamw", "muon") for _ in range(4)]
    best, *_, worst = (line.split() for line in capsys.readouterr().out.splitlines()[3:])
    assert best[0] == "muon" and [float(value) for value in best[1:]] == [0.01, 2.55, 2.5, 2.6]
    assert worst[0] == "muon" and [float(value) for value in worst[1:3]] == [0.04, float("inf")]
    assert len(read_rows(tmp_path / "recipes.csv")) == 16


def test_interrupted_recipes_keep_what_had_ended(tiny_preset, tmp_path, interrupt, capsys):
    steps = interrupt(3, kind=signal.SIGTERM)  # in the second run
    for _ in range(2):
        del steps[:]
        assert profile.main([*tiny_preset, "--recipes", "--seeds", "1"]) == 130 and len(steps) == 3
    rows = read_rows(tmp_path / "recipes.csv")
    assert [row["optimizer"] for row in rows] == ["adamw"] * 2 and 0 < float(rows[0]["val_loss"]) < 12
    assert profile.main([*tiny_preset, "--recipes", "--corpus", "nowhere"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("Error: No corpus or folder 'nowhere'")
    assert read_rows(tmp_path / "recipes.csv") == rows, "an error is no result"
