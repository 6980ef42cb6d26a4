"""Training and checkpoints: exact resume, clean stops, and files that must not be trusted."""

import csv
import dataclasses
import functools
import itertools
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch

import pico_helpers as pico


def weights_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def settings(tiny_train) -> pico.TrainConfig:
    return dataclasses.replace(tiny_train, micro_batch_size=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config, settings, data_folder) -> pico.TrainResult:
    """An uninterrupted run."""
    assert tiny_config.dropout > 0
    return pico.train(tiny_config, settings, tmp_path_factory.mktemp("results"), data_folder, device="cpu")


@pytest.fixture
def rerun(train_tiny, settings):
    """`rerun(seed=1)`: that run once more, in a folder of the test, with another setting."""
    return functools.partial(
        train_tiny, **{name: vars(settings)[name] for name in ("micro_batch_size", "learning_rate")}
    )


def test_a_run_learns_and_leaves_a_checkpoint_and_metrics(finished, tiny_config, settings):
    folder, rows = finished.checkpoint.parent, finished.metrics
    assert rows[0]["train_loss"] == pytest.approx(10.8, abs=0.4), "the logarithm of the vocabulary"
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 2 and rows[-1]["val_loss"] < 9
    assert sorted(p.name for p in folder.iterdir()) == ["pico_llm_tiny.pt", "tiny_metrics.csv"]
    checkpoint = pico.load_checkpoint(finished.checkpoint)
    assert (checkpoint.model_config, checkpoint.train_config, checkpoint.step) == (tiny_config, settings, 12)
    assert "parquet folder" in checkpoint.corpus and checkpoint.environment["torch"] == torch.__version__
    assert checkpoint.environment["device"].startswith("CPU, ")
    assert weights_equal(checkpoint.weights, finished.model.state_dict())
    rows = list(csv.DictReader((folder / "tiny_metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]
    assert [float(row["learning_rate"]) for row in rows] == [pytest.approx(1e-2 * n / 10) for n in (10, 7, 4, 1)]
    assert int(rows[-1]["tokens"]) == 12 * 4 * 32
    assert {row["mfu"] for row in rows} == {row["peak_memory_mb"] for row in rows} == {""}, "no GPU"


def test_epochs_make_the_length_of_a_run_and_its_metrics_count_them(rerun):
    changes = {"optimizer": "muon", "eval_interval": 100, "checkpoint_seconds": 1e9}
    rows = rerun(max_steps=None, epochs=1.5, max_sequences=20, **changes).metrics  # 4 of them a step
    found = [(row["step"], row["epoch"], row["learning_rate"]) for row in rows]
    assert found == [(3, 0.6, 1e-2), (6, 1.2, pytest.approx(4e-3)), (7, 1.4, pytest.approx(2e-3))]  # AdamW's rates


def test_a_file_with_numpy_numbers_and_half_precision_weights_is_read(finished, tiny_config, settings, tmp_path):
    saved = pico.load_checkpoint(finished.checkpoint)
    config = dataclasses.replace(tiny_config, dropout=np.float64(0.25), n_head=np.int64(2))
    train = dataclasses.replace(settings, learning_rate=np.float32(0.5), seed=np.int64(3), betas=np.array([0.5, 0]))
    train = dataclasses.replace(train, corpus=tmp_path, init_from=tmp_path)  # paths
    half = {name: value.half() for name, value in saved.weights.items()}
    written = dataclasses.replace(saved, model_config=config, train_config=train, weights=half)
    again = pico.load_checkpoint(pico.save_checkpoint(tmp_path / "a.pt", written))
    assert (again.model_config.dropout, again.model_config.n_head) == (0.25, 2)
    assert (again.train_config.learning_rate, again.train_config.seed, again.train_config.betas) == (0.5, 3, (0.5, 0))
    assert again.train_config.corpus == again.train_config.init_from == str(tmp_path)
    state = pico.load_model(tmp_path / "a.pt", "cpu").state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, half[name].float()) for name, value in state.items())


@pytest.mark.parametrize("stop_at", [1, 7, 12])
def test_ctrl_c_saves_and_a_resumed_run_ends_bit_for_bit_equal(finished, rerun, tmp_path, interrupt, stop_at):
    steps = interrupt(stop_at)
    if stop_at == 12:  # in the last step: all is saved
        with pytest.raises(KeyboardInterrupt):
            rerun()
    else:
        stopped = rerun()
        assert not stopped.finished and len(steps) == stop_at == pico.load_checkpoint(stopped.checkpoint).step
        corpus = pico.load_checkpoint(finished.checkpoint).train_config.corpus
        resumed = rerun(corpus=f"{shutil.copytree(corpus, tmp_path / Path(corpus).name)}/")  # the texts have moved
        assert resumed.finished
        assert [row["val_loss"] for row in resumed.metrics] == [row["val_loss"] for row in finished.metrics]
    saved = pico.load_checkpoint(pico.run_files(tmp_path, "tiny").model)
    assert weights_equal(saved.weights, finished.model.state_dict())
    assert not pico.run_files(tmp_path, "tiny.partial").model.exists() and not list(tmp_path.glob("*.unfinished-*"))


def test_a_second_ctrl_c_breaks_in(rerun, tmp_path, interrupt, request):
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored around the tests
    interrupt(2, 2)
    with pytest.raises(KeyboardInterrupt):
        rerun()
    assert pico.load_checkpoint(pico.run_files(tmp_path, "tiny.partial").model).step == 1, "it did not wait"


def test_kill_9_at_any_point_loses_nothing(finished, data_folder, tmp_path):
    """A process is killed while it trains, again and again, until the run is through."""
    script = f"""
import time, torch, pico_helpers as pico
torch.set_num_threads(torch.get_num_threads())
step = pico.train_step
pico.train_step = lambda *args: time.sleep(0.15) or step(*args)
saved, log = pico.load_checkpoint({str(finished.checkpoint)!r}), lambda rows: print("row", flush=True)
pico.train(saved.model_config, saved.train_config, {str(tmp_path)!r}, {str(data_folder)!r}, device="cpu", on_log=log)
print("finished", flush=True)
"""
    (tmp_path / ".pico_llm_tiny.partial.12345.pt").touch()  # of a process that was killed while it saved
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    seen, project = [], Path(__file__).parent.parent
    for delay in (0.0, 0.1, None):  # after the first line of metrics, in the middle of a step; None: to the end
        with subprocess.Popen([sys.executable, "-c", script], cwd=project, **options) as process:
            for line in process.stdout:
                seen.append(line.strip())
                if delay is not None and line.startswith("row"):
                    time.sleep(delay)
                    process.kill()
    assert seen.count("finished") == 1 and sum(line.startswith("Resuming") for line in seen) == 2
    weights = pico.load_checkpoint(pico.run_files(tmp_path, "tiny").model).weights
    assert weights_equal(weights, finished.model.state_dict()) and not list(tmp_path.glob(".*"))


def test_unfinished_runs_with_other_settings_are_moved_aside(finished, rerun, tmp_path, interrupt, capsys):
    interrupt(1, 2, 3)
    for seed in (0, 1, 2):
        rerun(seed=seed)
    assert "is not resumed, it has other settings (seed); it was moved to" in capsys.readouterr().out
    names = ("tiny.unfinished-1", "tiny.unfinished-2", "tiny")
    kept = [pico.run_files(tmp_path, f"{name}.partial").model for name in names]
    assert [pico.load_checkpoint(path).train_config.seed for path in kept] == [0, 1, 2]
    assert pico.newest_checkpoint(tmp_path) == kept[2]
    back = rerun(name=names[0])
    assert weights_equal(back.model.state_dict(), finished.model.state_dict()), "its name there goes on with it"


def test_the_number_of_steps_is_exact(tiny_config, settings, corpus_folder, data_folder, tmp_path):
    config, files = dataclasses.replace(settings, max_steps=None, max_sequences=100), pico.run_files(tmp_path, "none")
    for epochs, steps in ((1.16, 29), (1.19, 29), (1.2, 30)):  # batches of 4; 1.16 x 100 / 4 is 28.999999999999996
        changed = dataclasses.replace(config, epochs=epochs)
        _, plan = pico._plan(tiny_config, changed, files, None, data_folder, torch.device("cpu"))
        assert plan["total_steps"] == steps


def plain_step(shape: pico.ModelConfig, config: pico.TrainConfig, step: int = 0) -> tuple[float, torch.Tensor]:
    """The loss of a `train_step` of a model of seed 0 and the gradient that reached the optimizer, flat."""
    model, guard = pico.PicoLLM(shape).train(), pico.LossGuard(50257, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    batch = torch.randint(50257, (4, 33), generator=torch.Generator().manual_seed(0))
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = pico.train_step(model, optimizer, scaler, batch, config, step, torch.float32, guard)
    return float(loss), before - torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_micro_batches_give_the_gradient_of_the_whole_batch_which_is_clipped(tiny_config, settings):
    shape, gradients = dataclasses.replace(tiny_config, dropout=0.0), []
    for micro, limit in ((4, 1e6), (2, 1e6), (1, 1e6), (2, 0.25)):
        changes = {"micro_batch_size": micro, "grad_clip": limit}
        gradients.append(plain_step(shape, dataclasses.replace(settings, **changes))[1])
    whole, *others, clipped = gradients
    assert whole.norm() > 0.5 and clipped.norm() == pytest.approx(0.25, rel=1e-4)
    for found in (*others, clipped * (whole.norm() / 0.25)):
        assert (found - whole).norm() < 1e-4 * whole.norm()


def test_dropout_depends_on_seed_and_step_alone(tiny_config, settings):
    plans = [(seed, step) for seed in (0, 3) for step in (0, 1)]
    found = [plain_step(tiny_config, dataclasses.replace(settings, seed=seed), step)[0] for seed, step in 2 * plans]
    assert len(set(found)) == 4 and found[:4] == found[4:]


def test_validation_covers_the_whole_split(tiny_model, corpus_folder, data_folder):
    file = pico.prepare_tokens(pico.choose_corpus(str(corpus_folder)), "validation", data_folder)
    assert (len(file.tokens) - 1) % 32, "the last window must be a short one"
    loss, word_perplexity = pico.evaluate(tiny_model, file, batch_size=3)
    tokens, total = torch.from_numpy(file.tokens.astype("int64")), 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            x, y = tokens[start : start + 32], tokens[start + 1 : start + 33]
            total += float(tiny_model(x[None, : len(y)], y[None])) * len(y)
    assert loss == pytest.approx(total / (len(tokens) - 1), abs=1e-5)
    assert word_perplexity == pytest.approx(math.exp(total / file.n_words), rel=1e-3)


@pytest.mark.parametrize("total", [1, 2, 7, 20, 200, 7087, 10**6])
def test_snapshots_are_spaced_geometrically_from_the_untrained_to_the_trained_model(total):
    steps = pico.snapshot_steps(total)
    assert steps[0] == 0 and steps[-1] == total and steps == sorted(set(steps)) == pico.snapshot_steps(total)
    assert len(steps) >= 8 or total < 20
    ratios = [b / a for a, b in itertools.pairwise(steps) if a >= 10]
    assert not ratios or max(ratios) < 1.25 * min(ratios)


def test_snapshots_leave_the_run_as_it_is(finished, rerun, tiny_config, settings):
    seen = []

    def snapshot(model, step):
        assert not model.training and not torch.is_grad_enabled()
        seen.append((step, model.token_embedding.weight.clone()))
        torch.rand(5)  # draws from the global generator

    before = torch.random.get_rng_state()
    result = rerun(on_snapshot=snapshot)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert weights_equal(result.model.state_dict(), finished.model.state_dict())
    assert [row["train_loss"] for row in result.metrics] == [row["train_loss"] for row in finished.metrics]
    assert [step for step, _ in seen] == pico.snapshot_steps(12)
    assert torch.equal(seen[0][1], pico.PicoLLM(tiny_config, settings.seed).token_embedding.weight)
    assert torch.equal(seen[-1][1], result.model.token_embedding.weight)


def test_a_resumed_run_goes_on_with_its_clock_and_its_snapshots(rerun, tiny_config, monkeypatch, interrupt):
    """A clock that stands still but for the sleepers shows that steps alone are timed."""
    now, seen = [0.0], []
    monkeypatch.setattr(pico.time, "perf_counter", lambda: now[-1])
    monkeypatch.setattr(pico, "peak_flops", lambda device: 1e9)

    def slow(function, seconds):
        return lambda *args, **options: now.append(now[-1] + seconds) or function(*args, **options)

    monkeypatch.setattr(pico, "train_step", slow(pico.train_step, 2.0))
    monkeypatch.setattr(pico, "evaluate", slow(pico.evaluate, 100.0))
    interrupt(7)
    hooks = {"on_snapshot": slow(lambda _, step: seen.append(step), 1000.0), "on_log": slow(lambda rows: None, 50.0)}
    state = pico.load_checkpoint(rerun(**hooks).checkpoint).training_state
    assert state["seconds"] == 14.0, "7 steps, though the last line of metrics was after 6"
    now.append(1e6)
    resumed = rerun(**hooks)
    assert [row["seconds"] for row in resumed.metrics] == [6, 12, 18, 24]
    assert {row["tokens_per_second"] for row in resumed.metrics} == {4 * 32 / 2}
    assert seen == pico.snapshot_steps(12)
    mfu = 4 * 32 / 2 * (6 * pico.PicoLLM(tiny_config).count_parameters()[1] + 12 * 2 * 32 * 32) / 1e9
    assert {row["mfu"] for row in resumed.metrics} == {round(mfu, 4)}


def test_missing_truncated_and_foreign_files(finished, tmp_path):
    good, path = finished.checkpoint.read_bytes(), tmp_path / "model.pt"
    for missing in (path, tmp_path):
        with pytest.raises(pico.PicoError, match="There is no checkpoint"):
            pico.load_model(missing)
    torch.save({"weights": torch.zeros(3)}, path)
    foreign = path.read_bytes()
    for content in (foreign, b"", b"not a model", b"step,loss\n1,2\n", good[: len(good) // 2], good[:-100]):
        path.write_bytes(content)
        with pytest.raises(pico.PicoError, match="is not a Pico-LLM checkpoint"):
            pico.load_model(path)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_does_not_run(tmp_path, save):
    path, target = tmp_path / "hostile.pt", tmp_path / "created"
    hostile = type("Hostile", (), {"__reduce__": lambda self: (os.mkdir, (str(target),))})
    save({"format": "pico-llm", "version": 1, "weights": hostile()}, path)
    with pytest.raises(pico.PicoError, match="holds more than weights"):
        pico.load_model(path)
    assert not target.exists()


def test_checkpoints_that_do_not_fit(finished, tmp_path):
    content, path = torch.load(finished.checkpoint, weights_only=True), tmp_path / "model.pt"
    shape, run, weights = (content[name] for name in ("model_config", "train_config", "weights"))
    for changes, message in (
        ({"model_config": shape | {"d_model": 64}}, "does not fit its configuration: size mismatch"),
        ({"model_config": shape | {"n_layer": 1}}, "does not fit its configuration: Unexpected key"),
        ({"model_config": shape | {"n_expert": 8}}, "unexpected keyword argument 'n_expert'"),
        ({"model_config": shape | {"n_head": 0}}, "impossible settings: n_head must be a whole number"),
        ({"train_config": run | {"betas": ["a", "b"]}}, "has impossible settings: betas must be two numbers"),
        ({"train_config": run | {"optimizer": "sgd"}}, "impossible settings: Unknown optimizer 'sgd'"),
        ({"weights": None}, "lacks a field or has impossible settings: 'NoneType'"),
        ({"weights": {"final_norm.weight": torch.tensor([math.nan])}}, "not numbers"),
        ({"weights": weights | {"extra": 1.5}}, "impossible settings: 'float'"),
        ({"weights": weights | {"final_norm.bias": torch.zeros(5)}}, "final_norm.bias"),
        ({"weights": {}}, "does not fit its configuration: Missing key"),
        ({"corpus": ...}, "lacks a field .*'corpus'"),  # it is left out
        ({"tokenizer": "bytes"}, "it has .*'tokenizer': 'bytes'}, not .*'gpt2'"),
        ({"version": 99}, "it has .*'version': 99"),
    ):
        torch.save({name: value for name, value in (content | changes).items() if value is not ...}, path)
        before = path.read_bytes()
        with pytest.raises(pico.PicoError, match=message) as error:
            pico.load_model(path)
        assert "\n" not in str(error.value) and path.read_bytes() == before


def test_impossible_settings_are_one_line():
    bad = {"batch_size": (0, -1, 4.0), "max_steps": (0, 1e3), "eval_interval": (None,), "epochs": (0, math.inf)}
    bad |= {"learning_rate": (math.nan, -1.0), "warmup_steps": (-5,), "seed": (-1, 2**40, 0.5), "loss_chunk": (0,)}
    bad |= {"weight_decay": (-1, math.nan), "matrix_weight_decay": (-1,), "checkpoint_seconds": (-1,)}
    bad |= {"betas": ((1.5, 0.9), (0.9,), (-0.1, 0.9), (math.nan, 0.9), None, 0.9, "ab"), "optimizer": ("x",)}
    bad |= {"name": ("../x", "", "a b", "quick.partial", None), "text_style": ([],), "corpus": (None, 1)}
    bad |= {"corpus_fraction": ("x", 2, 0), "compile": ("no", 1), "init_from": (1,), "qk_norm": ("no", 1)}
    bad |= {"n_head": (None, "x"), "max_positions": (None,), "grad_clip": (np.ones(2),), "precision": ("x",)}
    for name, value in [(name, value) for name, values in bad.items() for value in values]:
        with pytest.raises(pico.PicoError, match=rf"{name} must|Unknown {name} ('x'|\[\]); choose one of") as caught:
            pico.PRESETS["quick"].with_changes({name: value})
        assert "\n" not in str(caught.value)


def test_newest_checkpoint_prefers_finished_models(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped.pt"
    monkeypatch.setattr(pico, "SHIPPED_CHECKPOINT", shipped)
    with pytest.raises(pico.PicoError, match="train one"):
        pico.newest_checkpoint(tmp_path)
    shipped.touch()
    assert pico.newest_checkpoint(tmp_path) == pico.newest_checkpoint(tmp_path / "results") == shipped
    for age, name in enumerate(["pico_llm_c.partial.pt", "pico_llm_a.pt", "pico_llm_b.pt", "engine.pt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 1000 - age))
    assert pico.newest_checkpoint(tmp_path).name == "pico_llm_a.pt"
    (tmp_path / "pico_llm.pt").touch()
    assert pico.newest_checkpoint(tmp_path).name == "pico_llm.pt", "published into this folder"


def test_a_full_disk_keeps_the_old_file(finished, tmp_path, request):
    """A limit on the size of files stands in for the full disk: the write fails half-way."""
    checkpoint = pico.load_checkpoint(finished.checkpoint)
    path = pico.save_checkpoint(tmp_path / "model.pt", checkpoint)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    with pytest.raises(pico.PicoError, match=r"Cannot write .*model\.pt"):
        pico.save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_disk_that_fills_up_costs_checkpoints_and_no_training(finished, rerun, monkeypatch, capsys):
    there, full = rerun(seed=1, max_steps=1), pico.PicoError("Cannot write it: No space left on device.")
    ends = itertools.chain([DEFAULT], itertools.repeat(full))  # all but the first checkpoint, the finished model too
    failing = Mock(wraps=pico.save_checkpoint, side_effect=ends)
    with monkeypatch.context() as patch, pytest.raises(pico.PicoError, match="No space left"):
        patch.setattr(pico, "save_checkpoint", failing)
        rerun()
    assert failing.call_count > 2 and "Training goes on without this checkpoint" in capsys.readouterr().err
    assert weights_equal(pico.load_checkpoint(there.checkpoint).weights, there.model.state_dict()), "as it was"
    assert weights_equal(rerun().model.state_dict(), finished.model.state_dict())
    with monkeypatch.context() as patch, pytest.raises(pico.PicoError, match="No space left"):
        patch.setattr(pico, "save_checkpoint", failing)
        rerun(seed=2, on_log=lambda rows: pytest.fail("a disk that is full is found before any work"))


def test_a_run_begins_with_a_model_and_resumes_without_it(finished, rerun, tiny_config, tmp_path, interrupt, capsys):
    source, is_first = shutil.copy(finished.checkpoint, tmp_path / "base.pt"), []
    changes = {"name": "tuned", "init_from": str(source), "max_steps": 4, "seed": 3}
    changes["shape"] = dataclasses.replace(tiny_config, dropout=0.0, context_length=16)  # no weights depend on these
    first = finished.model.state_dict()
    hooks = {"on_snapshot": lambda model, _: is_first.append(weights_equal(model.state_dict(), first))}
    whole = rerun(tmp_path / "whole", **hooks, **changes)
    assert is_first[0] and not is_first[-1], "step 0 has the weights of the file"
    capsys.readouterr()
    interrupt(1)
    assert not rerun(tmp_path / "parts", **changes).finished
    source.unlink()
    resumed = rerun(tmp_path / "parts", **changes | {"init_from": os.path.relpath(source)})
    assert resumed.finished and weights_equal(resumed.model.state_dict(), whole.model.state_dict())
    seen = 12 * 4 * 32
    assert [row["tokens_total"] - row["tokens"] for row in resumed.metrics] == [seen] * len(resumed.metrics)
    began, same = (pico.load_checkpoint(run.checkpoint).environment["started_from"] for run in (resumed, whole))
    assert began == same and began.startswith(f"base.pt ({seen:,} tokens")
    assert re.search("at step 1 of 4: .*1.62M with embeddings, from base.pt", capsys.readouterr().out)


def test_what_a_run_cannot_begin_with_costs_nothing(finished, rerun, tiny_config, tmp_path, interrupt):
    interrupt(1)
    unfinished = rerun(tmp_path / "parts").checkpoint
    (tmp_path / "notes.pt").write_text("not a model")
    for path, shape, message in (
        (tmp_path / "none.pt", {}, "There is no checkpoint"),
        (tmp_path, {}, "There is no checkpoint"),
        (tmp_path / "notes.pt", {}, "is not a Pico-LLM checkpoint"),
        (unfinished, {}, "is an unfinished run; finish it"),  # of this name: it is not moved aside for an error
        (finished.checkpoint, {"d_ff": 64}, r"has another shape \(d_ff 32, not 64\); train a model of the same shape"),
        ("", {"vocab_size": 1000}, "vocab_size 1000 is less than the tokenizer's"),
    ):
        for name, folder in (("new", tmp_path / "new"), ("tiny", tmp_path / "parts")):
            with pytest.raises(pico.PicoError, match=message) as caught:
                rerun(folder, shape=dataclasses.replace(tiny_config, **shape), name=name, init_from=str(path))
            assert "\n" not in str(caught.value) and not (folder / f"pico_llm_{name}.pt").exists()
        assert shape or unfinished.exists()
    with pytest.raises(pico.PicoError, match=r"Cannot write .* Choose another folder"):
        rerun(tmp_path / "notes.pt" / "results")


def test_models_of_one_name_are_kept_with_their_metrics_and_heads(rerun, tmp_path, capsys):
    results = []

    def snapshot(model, step):
        pico.run_files(tmp_path, "tiny.partial").heads.write_text(f"heads of {len(results)}")
        if results:  # the finished run lies there untouched while the next one goes on
            assert pico.run_files(tmp_path, "tiny").heads.read_text() == f"heads of {len(results) - 1}"
            assert pico.load_checkpoint(tmp_path / "pico_llm_tiny.pt").train_config.seed == len(results) - 1

    for seed in range(3):
        results.append(rerun(max_steps=2, seed=seed, eval_interval=1, on_snapshot=snapshot))
    assert "The model that was pico_llm_tiny.pt is now pico_llm_tiny.previous-2.pt" in capsys.readouterr().out
    for seed, name in enumerate(["tiny.previous-1", "tiny.previous-2", "tiny"]):
        files = pico.run_files(tmp_path, name)
        assert weights_equal(pico.load_checkpoint(files.model).weights, results[seed].model.state_dict())
        assert files.heads.read_text() == f"heads of {seed}"
        with open(files.metrics) as file:
            assert float(list(csv.DictReader(file))[-1]["val_loss"]) == results[seed].metrics[-1]["val_loss"]
    assert len(list(tmp_path.iterdir())) == 9, "and nothing else"


@pytest.mark.parametrize("n_moved", [0, 1])
def test_a_crash_between_saving_and_renaming_loses_no_model(rerun, tmp_path, monkeypatch, interrupt, n_moved):
    """As kill -9 would, an exception ends the run at either of the renames; the next start puts things right."""
    rerun(max_steps=1)
    steps, ends = interrupt(), [DEFAULT] * n_moved + [RuntimeError("killed")]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(pico, "move_run", Mock(wraps=pico.move_run, side_effect=ends))
        rerun(max_steps=1, seed=1)
    assert sorted([pico.load_checkpoint(path).train_config.seed for path in tmp_path.glob("pico_llm_*.pt")]) == [0, 1]
    rerun(max_steps=1, seed=1)
    assert pico.load_checkpoint(tmp_path / "pico_llm_tiny.pt").train_config.seed == 1
    assert len(steps) == 1, "what was trained is not trained again"


def test_compiled_gradients_add_in_a_fixed_order(tiny_config, tiny_train, monkeypatch):
    """Rows of the embedding are added up by several threads; atomic additions would end in other bits each time."""
    from torch._inductor.utils import run_and_get_code

    if not pico.choose_compile(True, torch.device("cpu"), 0.0):
        pytest.skip("no compiler")
    weight, idx = torch.nn.Parameter(torch.randn(50, 16)), torch.zeros(4096, dtype=torch.long)

    def step(*_):
        torch._dynamo.reset()
        forward = torch.compile(lambda w: torch.nn.functional.embedding(idx, w).cos().sum())
        return "".join(run_and_get_code(lambda: forward(weight).backward())[1])

    monkeypatch.setattr(pico, "train_step", step)
    run = pico.TrainingRun(tiny_config, tiny_train, "", torch.device("cpu"), torch.float32)
    assert "atomic_add" not in run.take_step(idx) and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory, "put back"


def test_training_is_without_cudnn_attention(tiny_config, tiny_train, monkeypatch):
    """The setting in a step, while the held-out loss is measured and weights are checked; then it is what it was."""
    settings, now = [], torch.backends.cuda.cudnn_sdp_enabled
    run = pico.TrainingRun(tiny_config, tiny_train, "", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(pico, "train_step", lambda *arguments: settings.append(now()))
    monkeypatch.setattr(run.model, "forward", lambda *arguments: settings.append(now()) or torch.tensor(1.0))
    file = pico.TokenFile(Path(), "", 9, np.zeros(9, np.uint16), np.array([0, 9]))
    run.stream = pico.SequenceStream(file, 8, None, 0)
    try:
        for enabled in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            run.take_step(None)
            settings.append(now())
            assert pico.evaluate(run.model, file)[0] == 1.0
            settings.append(now())
            assert not run.is_spoilt(run.stream.batch(0, 4))
            settings.append(now())
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert settings == [False, True, False, True, False, True, *[False] * 6]
