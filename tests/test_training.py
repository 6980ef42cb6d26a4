"""Training and checkpoints: exact resume, clean stops, and files that must not be trusted."""

import csv
import dataclasses
import itertools
import math
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import pico_helpers as pico
from pico_helpers import PicoError

ROOT = Path(__file__).parent.parent


def weights(model: pico.PicoLLM) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def weights_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config, tiny_train, data_folder):
    """An uninterrupted run: (model config, train config, result)."""
    changes = {"micro_batch_size": 2, "learning_rate": 1e-2, "precision": "fp32", "compile": False}
    config, train = tiny_config, dataclasses.replace(tiny_train, **changes)
    assert config.dropout > 0
    return config, train, pico.train(config, train, tmp_path_factory.mktemp("results"), data_folder, device="cpu")


def test_a_run_learns_and_leaves_a_checkpoint_and_metrics(finished):
    config, train, result = finished
    folder, rows = result.checkpoint.parent, result.metrics
    assert rows[0]["train_loss"] == pytest.approx(10.8, abs=0.4), "the logarithm of the vocabulary"
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 2 and rows[-1]["val_loss"] < 9
    assert sorted(p.name for p in folder.iterdir()) == ["pico_llm_tiny.pt", "tiny_metrics.csv"]
    checkpoint = pico.load_checkpoint(result.checkpoint)
    assert (checkpoint.model_config, checkpoint.train_config, checkpoint.step) == (config, train, 12)
    assert "parquet folder" in checkpoint.corpus and checkpoint.environment["torch"] == torch.__version__
    assert checkpoint.environment["device"].startswith("CPU, ")
    assert weights_equal(checkpoint.weights, result.model.state_dict())
    with open(folder / "tiny_metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]
    assert [float(row["learning_rate"]) for row in rows] == [pytest.approx(1e-2 * n / 10) for n in (10, 7, 4, 1)]
    assert int(rows[-1]["tokens"]) == 12 * 4 * 32
    assert {row["mfu"] for row in rows} == {row["peak_memory_mb"] for row in rows} == {""}, "no GPU"


def test_numpy_numbers_in_settings_do_not_make_a_file_unreadable(finished, tmp_path):
    saved = pico.load_checkpoint(finished[2].checkpoint)
    config = dataclasses.replace(finished[0], dropout=np.float64(0.25), n_head=np.int64(2))
    train = dataclasses.replace(finished[1], learning_rate=np.float32(0.5), seed=np.int64(3), betas=np.array([0.5, 0]))
    path = pico.save_checkpoint(tmp_path / "a.pt", dataclasses.replace(saved, model_config=config, train_config=train))
    again = pico.load_checkpoint(path)
    assert (again.model_config.dropout, again.model_config.n_head) == (0.25, 2)
    assert (again.train_config.learning_rate, again.train_config.seed, again.train_config.betas) == (0.5, 3, (0.5, 0))


def test_a_vocabulary_without_all_tokens_is_refused(finished, tmp_path, data_folder):
    with pytest.raises(PicoError, match="vocab_size 1000 is less than the tokenizer's"):
        pico.train(dataclasses.replace(finished[0], vocab_size=1000), finished[1], tmp_path, data_folder)


@pytest.mark.parametrize("stop_at", [1, 7, 12])
def test_ctrl_c_saves_and_the_resumed_run_ends_bit_for_bit_equal(finished, data_folder, tmp_path, interrupt, stop_at):
    config, train, expected = finished
    steps = interrupt(stop_at)
    if stop_at == 12:  # in the last step: all is saved
        with pytest.raises(KeyboardInterrupt):
            pico.train(config, train, tmp_path, data_folder)
    else:
        stopped = pico.train(config, train, tmp_path, data_folder)
        assert not stopped.finished and len(steps) == stop_at == pico.load_checkpoint(stopped.checkpoint).step
        resumed = pico.train(config, train, tmp_path, data_folder)
        assert resumed.finished and [row["val_loss"] for row in resumed.metrics] == [
            row["val_loss"] for row in expected.metrics
        ]
    saved = pico.load_checkpoint(pico.run_files(tmp_path, "tiny").model)
    assert weights_equal(saved.weights, expected.model.state_dict())
    assert not pico.run_files(tmp_path, "tiny.partial").model.exists()


def test_kill_9_at_any_point_loses_nothing(finished, data_folder, tmp_path):
    """A process is killed while it trains, again and again, until the run is through."""
    config, train, expected = finished
    script = textwrap.dedent(f"""
        import time, torch, pico_helpers as pico
        torch.set_num_threads(torch.get_num_threads())
        step = pico.train_step
        def slow(*args):
            time.sleep(0.15)
            return step(*args)
        pico.train_step = slow
        config = pico.ModelConfig(**{dataclasses.asdict(config)!r})
        train = pico.TrainConfig(**{dataclasses.asdict(train)!r})
        log = lambda rows: print("row", flush=True)
        pico.train(config, train, {str(tmp_path)!r}, {str(data_folder)!r}, device="cpu", on_log=log)
        print("finished", flush=True)
    """)
    seen = []
    for delay in (0.0, 0.1, None):  # after the first line of metrics, in the middle of a step; None: to the end
        with subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            for line in process.stdout:
                seen.append(line.strip())
                if delay is not None and line.startswith("row"):
                    time.sleep(delay)
                    process.kill()
    assert seen.count("finished") == 1 and sum(line.startswith("Resuming") for line in seen) == 2
    weights = pico.load_checkpoint(pico.run_files(tmp_path, "tiny").model).weights
    assert weights_equal(weights, expected.model.state_dict())


def test_unfinished_runs_with_other_settings_are_moved_aside(finished, data_folder, tmp_path, interrupt, capsys):
    config, train, expected = finished
    interrupt(1, 2, 3)
    for seed in (0, 1, 2):
        pico.train(config, dataclasses.replace(train, seed=seed), tmp_path, data_folder)
    assert "is not resumed, it has other settings" in capsys.readouterr().out
    names = ("tiny.unfinished-1", "tiny.unfinished-2", "tiny")
    kept = [pico.run_files(tmp_path, f"{name}.partial").model for name in names]
    assert [pico.load_checkpoint(path).train_config.seed for path in kept] == [0, 1, 2]
    assert pico.newest_checkpoint(tmp_path) == kept[2]
    back = pico.train(config, dataclasses.replace(train, name=names[0]), tmp_path, data_folder)
    assert weights_equal(back.model.state_dict(), expected.model.state_dict()), "its name there goes on with it"


def test_a_run_is_resumed_wherever_its_texts_lie(finished, data_folder, tmp_path, interrupt, corpus_folder):
    config, train, _ = finished
    interrupt(1)
    pico.train(config, train, tmp_path, data_folder)
    shutil.copytree(corpus_folder, tmp_path / corpus_folder.name)
    moved = dataclasses.replace(train, corpus=f"{tmp_path / corpus_folder.name}/")
    result = pico.train(config, moved, tmp_path, data_folder)
    assert weights_equal(result.model.state_dict(), finished[2].model.state_dict())
    assert not list(tmp_path.glob("*.unfinished-*"))


def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny_config, finished):
    config = dataclasses.replace(tiny_config, dropout=0.0)
    batch = torch.randint(50257, (4, 33), generator=torch.Generator().manual_seed(0))
    states = []
    for micro in (4, 2, 1):
        model, train = pico.PicoLLM(config), dataclasses.replace(finished[1], micro_batch_size=micro)
        optimizer, scaler = pico.make_optimizer(model, train), torch.amp.GradScaler("cpu", enabled=False)
        guard = pico.LossGuard(50257, torch.device("cpu"))
        pico.train_step(model, optimizer, scaler, batch, train, 0, torch.float32, guard)
        states.append(model.state_dict())
    for state in states[1:]:
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name], atol=1e-4, rtol=1e-3)


def test_validation_covers_the_whole_split(tiny_model, corpus_folder, data_folder):
    file = pico.prepare_tokens(pico.choose_corpus(str(corpus_folder)), "validation", data_folder)
    assert (len(file.tokens) - 1) % 32, "the last window must be a short one"
    result = pico.evaluate(tiny_model, file, batch_size=3)
    tokens = torch.from_numpy(file.tokens.astype("int64"))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            x, y = tokens[start : start + 32], tokens[start + 1 : start + 33]
            total += float(tiny_model(x[None, : len(y)], y[None])) * len(y)
    assert result.n_tokens == len(tokens) - 1
    assert result.loss == pytest.approx(total / (len(tokens) - 1), abs=1e-5)
    expected = 2.718281828 ** (total / file.n_words)
    assert result.word_perplexity == pytest.approx(expected, rel=1e-3)


# --- snapshots and numbers of a run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 7, 20, 200, 7087, 10**6])
def test_snapshots_are_spaced_geometrically_from_the_untrained_to_the_trained_model(total):
    steps = pico.snapshot_steps(total)
    assert steps[0] == 0 and steps[-1] == total and steps == sorted(set(steps)) == pico.snapshot_steps(total)
    assert len(steps) >= 8 or total < 20
    ratios = [b / a for a, b in itertools.pairwise(steps) if a >= 10]
    assert not ratios or max(ratios) < 1.25 * min(ratios)


def test_snapshots_leave_the_run_as_it_is(finished, data_folder, tmp_path):
    config, train, expected = finished
    seen = []

    def snapshot(model, step):
        assert not model.training and not torch.is_grad_enabled()
        seen.append((step, model.token_embedding.weight.clone()))
        torch.rand(5)  # draws from the global generator
        time.sleep(0.3)

    before = torch.random.get_rng_state()
    result = pico.train(config, train, tmp_path, data_folder, on_snapshot=snapshot)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert weights_equal(result.model.state_dict(), expected.model.state_dict())
    assert [row["train_loss"] for row in result.metrics] == [row["train_loss"] for row in expected.metrics]
    assert [step for step, _ in seen] == pico.snapshot_steps(12)
    assert torch.equal(seen[0][1], pico.PicoLLM(config, train.seed).token_embedding.weight)
    assert torch.equal(seen[-1][1], result.model.token_embedding.weight)


def test_a_resumed_run_goes_on_with_its_clock_and_its_snapshots(
    finished, data_folder, tmp_path, monkeypatch, interrupt
):
    """A clock that stands still but for the sleepers shows that steps alone are timed."""
    config, train, _ = finished
    now, seen = [0.0], []
    monkeypatch.setattr(pico.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(pico, "peak_flops", lambda device: 1e9)

    def slow(function, seconds):
        def call(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return call

    monkeypatch.setattr(pico, "train_step", slow(pico.train_step, 2.0))
    monkeypatch.setattr(pico, "evaluate", slow(pico.evaluate, 100.0))
    interrupt(7)
    hooks = {"on_snapshot": slow(lambda _, step: seen.append(step), 1000.0), "on_log": slow(lambda rows: None, 50.0)}
    stopped = pico.train(config, train, tmp_path, data_folder, **hooks)
    state = pico.load_checkpoint(stopped.checkpoint).training_state
    assert state["seconds"] == 14.0, "7 steps, though the last line of metrics was after 6"
    now[0] += 1e6
    resumed = pico.train(config, train, tmp_path, data_folder, **hooks)
    assert [row["seconds"] for row in resumed.metrics] == [6, 12, 18, 24]
    assert {row["tokens_per_second"] for row in resumed.metrics} == {4 * 32 / 2}
    assert seen == pico.snapshot_steps(12)
    n = pico.PicoLLM(config).count_parameters()[1]
    mfu = 4 * 32 / 2 * (6 * n + 12 * 2 * 32 * 32) / 1e9
    assert {row["mfu"] for row in resumed.metrics} == {round(mfu, 4)}


def test_half_precision_weights_give_a_float32_model(finished, tmp_path):
    saved = pico.load_checkpoint(finished[2].checkpoint)
    half = {name: value.half() for name, value in saved.weights.items()}
    path = pico.save_checkpoint(tmp_path / "half.pt", dataclasses.replace(saved, weights=half))
    state = pico.load_model(path, "cpu").state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, half[name].float()) for name, value in state.items())


# --- checkpoint files -------------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_missing_truncated_and_foreign_files(finished, tmp_path):
    good, path = finished[2].checkpoint.read_bytes(), tmp_path / "model.pt"
    for missing in (path, tmp_path):
        with pytest.raises(PicoError, match="There is no checkpoint"):
            pico.load_model(missing)
    torch.save({"weights": torch.zeros(3)}, path)
    foreign = path.read_bytes()
    for content in (foreign, b"", b"not a model", b"step,loss\n1,2\n", good[: len(good) // 2], good[:-100]):
        path.write_bytes(content)
        with pytest.raises(PicoError, match="is not a Pico-LLM checkpoint"):
            pico.load_model(path)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_file_does_not_run(tmp_path, how):
    path, target = tmp_path / "hostile.pt", tmp_path / "created"
    if how == "torch":
        torch.save({"format": "pico-llm", "version": 1, "weights": Hostile(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(target)))
    with pytest.raises(PicoError, match="holds more than weights"):
        pico.load_model(path)
    assert not target.exists()


def test_checkpoints_that_do_not_fit(finished, tmp_path):
    config, _, result = finished
    as_dict, as_run, path = dataclasses.asdict(config), dataclasses.asdict(finished[1]), tmp_path / "model.pt"
    for changes, message in (
        ({"model_config": as_dict | {"d_model": 64}}, "does not fit its configuration: size mismatch"),
        ({"model_config": as_dict | {"n_layer": 1}}, "does not fit its configuration: Unexpected key"),
        ({"model_config": as_dict | {"n_expert": 8}}, "unexpected keyword argument 'n_expert'"),
        ({"model_config": as_dict | {"n_head": 0}}, "impossible settings: n_head must be a whole number"),
        ({"model_config": as_dict | {"dropout": 5.0}}, "impossible settings: dropout must lie in"),
        ({"train_config": as_run | {"batch_size": 0}}, "batch_size must be a whole number"),
        ({"train_config": as_run | {"betas": ["a", "b"]}}, "has impossible settings: could not convert"),
        ({"weights": None}, "lacks a field or has impossible settings: 'NoneType'"),
        ({"weights": {"final_norm.weight": torch.tensor([math.nan])}}, "not numbers"),
        ({"version": 99}, "it has .*'version': 99"),
    ):
        torch.save(torch.load(result.checkpoint, weights_only=True) | changes, path)
        with pytest.raises(PicoError, match=message):
            pico.load_model(path)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "batch_size": (0, -1, 4.0),
        "max_steps": (0, 1e3),
        "eval_interval": (None,),
        "epochs": (0, math.inf),
        "learning_rate": (math.nan, -1.0),
        "seed": (-1, 2**40, 0.5),
        "betas": ((1.5, 0.9), (0.9,), (-0.1, 0.9), (math.nan, 0.9)),
        "warmup_steps": (-5,),
        "weight_decay": (-1, math.nan),
        "matrix_weight_decay": (-1,),
        "loss_chunk": (0,),
        "optimizer": ("x",),
        "precision": ("x",),
        "checkpoint_seconds": (-1,),
        "name": ("../x", "", "a b", "quick.partial"),
    }.items(),
)
def test_impossible_settings_are_one_line(name, values):
    for value in values:
        with pytest.raises(PicoError, match=f"{name} must|Unknown {name} 'x'; choose one of") as caught:
            pico.TrainConfig(**{name: value})
        assert "\n" not in str(caught.value)


def test_newest_checkpoint_prefers_finished_models(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped.pt"
    monkeypatch.setattr(pico, "SHIPPED_CHECKPOINT", shipped)
    with pytest.raises(PicoError, match="train one"):
        pico.newest_checkpoint(tmp_path)
    shipped.touch()
    assert pico.newest_checkpoint(tmp_path) == pico.newest_checkpoint(tmp_path / "results") == shipped
    for age, name in enumerate(["pico_llm_c.partial.pt", "pico_llm_a.pt", "pico_llm_b.pt", "engine.pt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 1000 - age))
    assert pico.newest_checkpoint(tmp_path).name == "pico_llm_a.pt"


# --- folders that cannot be written -----------------------------------------------------------------------------------


def test_results_that_cannot_be_written_are_found_before_training(finished, data_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PicoError, match=r"Cannot write .* Choose another folder"):
        pico.train(*finished[:2], tmp_path / "file" / "results", data_folder)


def test_a_full_disk_keeps_the_old_file(finished, tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails half-way."""
    checkpoint = pico.load_checkpoint(finished[2].checkpoint)
    path = pico.save_checkpoint(tmp_path / "model.pt", checkpoint)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(PicoError, match=r"Cannot write .*model\.pt"):
            pico.save_checkpoint(path, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_disk_that_fills_up_costs_checkpoints_and_no_training(finished, data_folder, tmp_path, monkeypatch, capsys):
    config, train, expected = finished
    there = pico.train(config, dataclasses.replace(train, seed=1, max_steps=1), tmp_path, data_folder)
    original, calls = pico.save_checkpoint, []

    def failing(path, checkpoint):
        calls.append(path)
        if len(calls) > 1:  # all but the first checkpoint, the finished model too
            raise PicoError(f"Cannot write {path}: No space left on device.")
        return original(path, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(PicoError, match="No space left"):
        patch.setattr(pico, "save_checkpoint", failing)
        pico.train(config, train, tmp_path, data_folder)
    assert len(calls) > 2 and "Training goes on without this checkpoint" in capsys.readouterr().err
    assert weights_equal(pico.load_checkpoint(there.checkpoint).weights, there.model.state_dict()), "as it was"
    resumed = pico.train(config, train, tmp_path, data_folder)
    assert weights_equal(resumed.model.state_dict(), expected.model.state_dict())


# --- going on from a model --------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_model_and_resumes_without_its_file(finished, data_folder, tmp_path, interrupt, capsys):
    config, train, first = finished
    source = tmp_path / "base.pt"
    shutil.copy(first.checkpoint, source)
    short = dataclasses.replace(train, name="tuned", init_from=str(source), max_steps=4, seed=3)
    changed = dataclasses.replace(config, dropout=0.0, context_length=16)  # no weights depend on these
    start = []
    whole = pico.train(
        changed, short, tmp_path / "whole", data_folder, on_snapshot=lambda m, _: start.append(weights(m))
    )
    assert weights_equal(start[0], first.model.state_dict()), "step 0 has the weights of the file"
    capsys.readouterr()
    interrupt(1)
    stopped = pico.train(changed, short, tmp_path / "parts", data_folder)
    source.unlink()
    resumed = pico.train(changed, short, tmp_path / "parts", data_folder)
    assert resumed.finished and not stopped.finished
    assert weights_equal(resumed.model.state_dict(), whole.model.state_dict())
    seen = 12 * 4 * 32
    assert [row["tokens_total"] - row["tokens"] for row in resumed.metrics] == [seen] * len(resumed.metrics)
    began = pico.load_checkpoint(resumed.checkpoint).environment["started_from"]
    assert began == pico.load_checkpoint(whole.checkpoint).environment["started_from"]
    assert began.startswith(f"base.pt ({seen:,} tokens")
    assert re.search("at step 1 of 4: .*1.62M with embeddings, from base.pt", capsys.readouterr().out)


def test_models_that_a_run_cannot_go_on_from(finished, data_folder, tmp_path, interrupt):
    config, train, first = finished
    interrupt(1)
    unfinished = pico.train(config, train, tmp_path / "parts", data_folder).checkpoint
    (tmp_path / "notes.pt").write_text("not a model")
    for path, shape, message in (
        (tmp_path / "none.pt", {}, "There is no checkpoint"),
        (tmp_path, {}, "There is no checkpoint"),
        (tmp_path / "notes.pt", {}, "is not a Pico-LLM checkpoint"),
        (unfinished, {}, "is an unfinished run; finish it"),  # of this name: it is not moved aside for an error
        (first.checkpoint, {"d_ff": 64}, r"has another shape \(d_ff 32, not 64\); train a model of the same shape"),
    ):
        for name, folder in (("new", tmp_path / "new"), ("tiny", tmp_path / "parts")):
            new = dataclasses.replace(train, name=name, init_from=str(path))
            with pytest.raises(PicoError, match=message) as caught:
                pico.train(dataclasses.replace(config, **shape), new, folder, data_folder)
            assert "\n" not in str(caught.value) and not (folder / f"pico_llm_{name}.pt").exists()
        assert shape or unfinished.exists()


# --- nothing is overwritten -------------------------------------------------------------------------------------------


def test_models_of_one_name_are_kept_with_their_metrics_and_heads(finished, data_folder, tmp_path, capsys):
    config, train, _ = finished
    results = []
    for seed in range(3):
        one = dataclasses.replace(train, max_steps=2, seed=seed, eval_interval=1)
        partial = pico.run_files(tmp_path, "tiny.partial")

        def snapshot(model, step, seed=seed, partial=partial):
            partial.heads.write_text(f"heads of {seed}")
            if results:  # the finished run lies there untouched while the next one goes on
                assert pico.run_files(tmp_path, "tiny").heads.read_text() == f"heads of {seed - 1}"
                assert pico.load_checkpoint(tmp_path / "pico_llm_tiny.pt").train_config.seed == seed - 1

        results.append(pico.train(config, one, tmp_path, data_folder, on_snapshot=snapshot))
    assert "The model that was pico_llm_tiny.pt is now pico_llm_tiny.previous-2.pt" in capsys.readouterr().out
    for seed, name in enumerate(["tiny.previous-1", "tiny.previous-2", "tiny"]):
        files = pico.run_files(tmp_path, name)
        assert weights_equal(pico.load_checkpoint(files.model).weights, results[seed].model.state_dict())
        assert files.heads.read_text() == f"heads of {seed}"
        with open(files.metrics) as file:
            assert float(list(csv.DictReader(file))[-1]["val_loss"]) == results[seed].metrics[-1]["val_loss"]
    assert len(list(tmp_path.iterdir())) == 9, "and nothing else"


def test_a_crash_between_saving_and_renaming_loses_no_model(finished, data_folder, tmp_path, monkeypatch, interrupt):
    """As kill -9 would, an exception ends the run at each of the renames; the next start puts things right."""
    config, train, _ = finished
    short = dataclasses.replace(train, max_steps=1)
    pico.train(config, short, tmp_path, data_folder)
    second, steps = dataclasses.replace(short, seed=1), interrupt()
    for n in range(2):
        calls, move = [], pico.move_run

        def crash(files, name, n=n, calls=calls, move=move):
            if len(calls) == n:
                raise RuntimeError("killed")
            calls.append(1)
            return move(files, name)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(pico, "move_run", crash)
            pico.train(config, second, tmp_path, data_folder)
        seeds = [pico.load_checkpoint(path).train_config.seed for path in tmp_path.glob("pico_llm_*.pt")]
        assert sorted(seeds) == [0, 1]
    pico.train(config, second, tmp_path, data_folder)
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
    assert "atomic_add" not in run.take_step(idx)
    assert not torch.are_deterministic_algorithms_enabled()


def test_cudnn_attention_gets_only_the_dropout_that_it_knows(tiny_config, tiny_train, monkeypatch):
    settings = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", settings.append)
    monkeypatch.setattr(pico, "train_step", lambda *arguments: settings.append("step"))
    for p in (0, 0.125, 0.1):
        config = dataclasses.replace(tiny_config, dropout=p)
        pico.TrainingRun(config, tiny_train, "", torch.device("cpu"), torch.float32).take_step(None)
    assert settings == [True, "step", True, True, "step", True, False, "step", True], "for 0.1 it is off, then on again"
