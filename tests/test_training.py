"""Training and checkpoints: exact resume, clean stops, and files that must not be trusted."""

import contextlib
import csv
import dataclasses
import itertools
import math
import os
import pickle
import resource
import shutil
import signal
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


def test_the_loss_falls_from_the_logarithm_of_the_vocabulary(finished):
    rows = finished[2].metrics
    assert rows[0]["train_loss"] == pytest.approx(10.8, abs=0.4)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 2
    assert rows[-1]["val_loss"] < 9


def test_a_run_leaves_a_checkpoint_and_metrics(finished):
    config, train, result = finished
    folder = result.checkpoint.parent
    assert sorted(p.name for p in folder.iterdir()) == ["pico_llm_tiny.pt", "tiny_metrics.csv"]
    checkpoint = pico.load_checkpoint(result.checkpoint)
    assert (checkpoint.model_config, checkpoint.train_config, checkpoint.step) == (config, train, 12)
    assert "parquet folder" in checkpoint.corpus and checkpoint.tokenizer == "gpt2"
    assert weights_equal(checkpoint.weights, result.model.state_dict())
    with open(folder / "tiny_metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]
    assert [float(row["learning_rate"]) for row in rows] == [pytest.approx(1e-2 * n / 10) for n in (10, 7, 4, 1)]
    assert int(rows[-1]["tokens"]) == 12 * 4 * 32


def test_numpy_numbers_in_settings_do_not_make_a_file_unreadable(finished, tmp_path):
    saved = pico.load_checkpoint(finished[2].checkpoint)
    config = dataclasses.replace(finished[0], dropout=np.float64(0.25), n_head=np.int64(2))
    train = dataclasses.replace(finished[1], learning_rate=np.float32(0.5), seed=np.int64(3), betas=np.array([0.5, 0]))
    path = pico.save_checkpoint(tmp_path / "a.pt", dataclasses.replace(saved, model_config=config, train_config=train))
    again = pico.load_checkpoint(path)
    assert (again.model_config.dropout, again.model_config.n_head) == (0.25, 2)
    assert (again.train_config.learning_rate, again.train_config.seed, again.train_config.betas) == (0.5, 3, (0.5, 0))


@pytest.mark.parametrize("changes", [{"max_steps": 1e3}, {"eval_interval": None}, {"batch_size": 4.0}, {"seed": 0.5}])
def test_counts_are_whole_numbers(changes):
    with pytest.raises(PicoError, match=f"{next(iter(changes))} must be a whole number"):
        pico.TrainConfig(**changes)


def test_a_vocabulary_without_all_tokens_is_refused(finished, tmp_path, data_folder):
    with pytest.raises(PicoError, match="vocab_size 1000 is less than the tokenizer's"):
        pico.train(dataclasses.replace(finished[0], vocab_size=1000), finished[1], tmp_path, data_folder)


@pytest.mark.parametrize("stop_at", [1, 7])
def test_ctrl_c_saves_and_the_resumed_run_ends_bit_for_bit_equal(finished, data_folder, tmp_path, interrupt, stop_at):
    config, train, expected = finished
    steps = interrupt(stop_at)
    stopped = pico.train(config, train, tmp_path, data_folder)
    assert not stopped.finished and len(steps) == stop_at
    assert pico.load_checkpoint(stopped.checkpoint).step == stop_at
    resumed = pico.train(config, train, tmp_path, data_folder)
    assert resumed.finished
    assert weights_equal(resumed.model.state_dict(), expected.model.state_dict())
    assert not pico.run_files(tmp_path, "tiny.partial").model.exists()
    assert [row["val_loss"] for row in resumed.metrics if row["val_loss"]] == [
        row["val_loss"] for row in expected.metrics if row["val_loss"]
    ]


def test_ctrl_c_in_the_last_step_saves_the_finished_model_and_stops(finished, data_folder, tmp_path, interrupt):
    config, train, expected = finished
    interrupt(12)
    with pytest.raises(KeyboardInterrupt):
        pico.train(config, train, tmp_path, data_folder)
    saved = pico.load_checkpoint(pico.run_files(tmp_path, "tiny").model)
    assert weights_equal(saved.weights, expected.model.state_dict())


def test_kill_9_at_any_point_loses_nothing(finished, data_folder, tmp_path):
    """A process is killed while it trains, again and again, until the run is through."""
    config, train, expected = finished
    script = textwrap.dedent(f"""
        import time, torch
        torch.set_num_threads(torch.get_num_threads())
        import pico_helpers as pico
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


def test_an_unfinished_run_with_other_settings_is_moved_aside(finished, data_folder, tmp_path, interrupt, capsys):
    config, train, _ = finished
    interrupt(1)
    pico.train(config, train, tmp_path, data_folder)
    pico.train(config, dataclasses.replace(train, learning_rate=5e-3, max_steps=2), tmp_path, data_folder)
    assert "is not resumed, it has other settings" in capsys.readouterr().out
    (kept,) = tmp_path.glob("*.unfinished-1.partial.pt")
    assert pico.load_checkpoint(kept).step == 1
    back = pico.train(config, dataclasses.replace(train, name="tiny.unfinished-1"), tmp_path, data_folder)
    assert weights_equal(back.model.state_dict(), finished[2].model.state_dict()), "its name there goes on with it"


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
        model = pico.PicoLLM(config)
        train = dataclasses.replace(finished[1], micro_batch_size=micro)
        optimizer = pico.make_optimizer(model, train)
        pico.train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch, train, 0, torch.float32)
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


def test_snapshots_and_evaluation_count_in_no_time(finished, data_folder, tmp_path, monkeypatch):
    """A clock that stands still but for the sleepers shows which of them are timed."""
    config, train, _ = finished
    now, step = [0.0], pico.train_step
    monkeypatch.setattr(pico.time, "perf_counter", lambda: now[0])

    def slow(function, seconds):
        def call(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return call

    monkeypatch.setattr(pico, "train_step", slow(step, 2.0))
    monkeypatch.setattr(pico, "evaluate", slow(pico.evaluate, 100.0))
    options = {"on_snapshot": slow(lambda *_: None, 1000.0), "on_log": slow(lambda rows: None, 50.0)}
    rows = pico.train(config, train, tmp_path, data_folder, **options).metrics
    assert [row["seconds"] for row in rows] == [6, 12, 18, 24]
    assert {row["tokens_per_second"] for row in rows} == {4 * 32 / 2}
    assert {row["mfu"] for row in rows} == {row["peak_memory_mb"] for row in rows} == {None}, "no GPU"


def test_a_resumed_run_goes_on_with_its_clock_and_its_snapshots(finished, data_folder, tmp_path, monkeypatch):
    config, train, _ = finished
    now, original, seen = [0.0], pico.train_step, []
    monkeypatch.setattr(pico.time, "perf_counter", lambda: now[0])

    def step(*args):
        now[0] += 2.0
        if now[0] == 2.0 * 7:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    def snapshot(model, step):
        seen.append(step)

    monkeypatch.setattr(pico, "train_step", step)
    assert not pico.train(config, train, tmp_path, data_folder, on_snapshot=snapshot).finished
    state = pico.load_checkpoint(pico.run_files(tmp_path, "tiny.partial").model).training_state
    assert state["seconds"] == 14.0, "7 steps, though the last line of metrics was after 6"
    now[0] += 1e6
    resumed = pico.train(config, train, tmp_path, data_folder, on_snapshot=snapshot)
    assert [row["seconds"] for row in resumed.metrics] == [6, 12, 18, 24]
    assert seen == pico.snapshot_steps(12)


def test_mfu_is_the_share_of_the_peak_of_all_devices(finished, data_folder, tmp_path, monkeypatch):
    config, train, _ = finished
    now, step = [0.0], pico.train_step
    monkeypatch.setattr(pico.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(pico, "measured_on", lambda device: {"device": "NVIDIA H100 80GB HBM3"})

    def slow(*args):
        now[0] += 1e-6
        return step(*args)

    monkeypatch.setattr(pico, "train_step", slow)
    row = pico.train(config, train, tmp_path, data_folder).metrics[-1]
    n = pico.PicoLLM(config).count_parameters()[1]
    assert row["mfu"] == pytest.approx(4 * 32 / 1e-6 * (6 * n + 12 * 2 * 32 * 32) / 989e12, rel=1e-3)


def test_a_checkpoint_knows_its_device_and_older_ones_still_load(finished, data_folder, tmp_path):
    environment = pico.load_checkpoint(finished[2].checkpoint).environment
    assert environment["torch"] == torch.__version__ and environment["device"].startswith("CPU, ")
    content = torch.load(finished[2].checkpoint, weights_only=True)
    del content["environment"]
    for row in content["metrics"]:
        for name in ("mfu", "seconds", "peak_memory_mb"):
            del row[name]
    torch.save(content, tmp_path / "old.pt")
    old = pico.load_checkpoint(tmp_path / "old.pt")
    assert old.environment == {} and "seconds" not in old.metrics[0]


def test_an_older_unfinished_run_is_resumed(finished, data_folder, tmp_path, interrupt):
    config, train, expected = finished
    interrupt(1)
    path = pico.train(config, train, tmp_path, data_folder).checkpoint
    content = torch.load(path, weights_only=True)
    del content["environment"], content["training_state"]["seconds"]
    torch.save(content, path)
    resumed = pico.train(config, train, tmp_path, data_folder)
    assert weights_equal(resumed.model.state_dict(), expected.model.state_dict())


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
    good = finished[2].checkpoint.read_bytes()
    with pytest.raises(PicoError, match="There is no checkpoint"):
        pico.load_model(tmp_path / "none.pt")
    with pytest.raises(PicoError, match="There is no checkpoint"):
        pico.load_model(tmp_path)
    path = tmp_path / "model.pt"
    for content in (b"", b"not a model", b"step,loss\n1,2\n", good[: len(good) // 2], good[:-100]):
        path.write_bytes(content)
        with pytest.raises(PicoError, match="is not a Pico-LLM checkpoint"):
            pico.load_model(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(PicoError, match="not a Pico-LLM checkpoint"):
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


def edited(source: Path, target: Path, **changes) -> Path:
    content = torch.load(source, weights_only=True)
    torch.save(content | changes, target)
    return target


def test_checkpoints_that_do_not_fit(finished, tmp_path):
    config, _, result = finished
    as_dict = dataclasses.asdict(config)
    path = tmp_path / "model.pt"
    for changes, message in (
        ({"model_config": as_dict | {"d_model": 64}}, r"it holds .*\(50304, 32\).*, not .*\(50304, 64\)"),
        ({"model_config": as_dict | {"d_model": 2**16, "n_layer": 2**16}}, "does not fit its configuration"),
        ({"model_config": as_dict | {"n_layer": 1}}, "does not fit its configuration: Unexpected key"),
        ({"model_config": as_dict | {"n_expert": 8}}, "unexpected keyword argument 'n_expert'"),
        ({"model_config": as_dict | {"n_head": 0}}, "impossible settings: n_head must be a whole number"),
        ({"model_config": as_dict | {"dropout": 5.0}}, "impossible settings: dropout must lie in"),
        ({"train_config": dataclasses.asdict(finished[1]) | {"batch_size": 0}}, "batch_size must be a whole number"),
        ({"train_config": dataclasses.asdict(finished[1]) | {"betas": ["a", "b"]}}, "has a wrong one"),
        ({"weights": None}, "has a wrong one"),
        ({"weights": {"final_norm.weight": torch.tensor([math.nan])}}, "not numbers"),
        ({"version": 99}, "it has .*'version': 99"),
    ):
        edited(result.checkpoint, path, **changes)
        with pytest.raises(PicoError, match=message):
            pico.load_model(path)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "batch_size": (0, -1),
        "max_steps": (0,),
        "epochs": (0, math.inf),
        "learning_rate": (math.nan, -1.0),
        "seed": (-1, 2**40),
        "betas": ((1.5, 0.9), (0.9,), (-0.1, 0.9), (math.nan, 0.9)),
        "warmup_steps": (-5,),
        "weight_decay": (-1, math.nan),
        "matrix_weight_decay": (-1,),
        "loss_chunk": (0,),
        "checkpoint_seconds": (-1,),
        "name": ("../x", "", "a b", "quick.partial"),
    }.items(),
)
def test_impossible_settings_are_one_line(name, values):
    for value in values:
        with pytest.raises(PicoError, match=name) as caught:
            pico.TrainConfig(**{name: value})
        assert "\n" not in str(caught.value)


def test_newest_checkpoint_prefers_finished_models(tmp_path, monkeypatch):
    monkeypatch.setattr(pico, "__file__", str(tmp_path / "elsewhere.py"))
    with pytest.raises(PicoError, match="train one first"):
        pico.newest_checkpoint(tmp_path)
    (tmp_path / "results" / "pretrained").mkdir(parents=True)
    shipped = tmp_path / "results" / "pretrained" / "pico_llm.pt"
    shipped.touch()
    assert pico.newest_checkpoint(tmp_path) == pico.newest_checkpoint(tmp_path / "results") == shipped
    for age, name in enumerate(["pico_llm_c.partial.pt", "pico_llm_a.pt", "pico_llm_b.pt", "engine.pt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 1000 - age))
    assert pico.newest_checkpoint(tmp_path).name == "pico_llm_a.pt"


# --- folders that cannot be written -----------------------------------------------------------------------------------


def test_results_that_cannot_be_written_are_found_before_training(finished, data_folder, tmp_path):
    config, train, _ = finished
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PicoError, match=r"Cannot write .* Choose another folder, or free some space"):
        pico.train(config, train, tmp_path / "file" / "results", data_folder)


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


def test_a_disk_that_fills_up_during_training_costs_only_checkpoints(
    finished, data_folder, tmp_path, monkeypatch, capsys
):
    config, train, expected = finished
    there = pico.train(config, dataclasses.replace(train, seed=1, max_steps=1), tmp_path / "results", data_folder)
    original, calls = pico.save_checkpoint, []

    def failing(path, checkpoint):
        calls.append(path)
        if len(calls) > 1 and "results" in str(path):  # the first one is the check at the start
            raise PicoError(f"Cannot write {path}: No space left on device.")
        return original(path, checkpoint)

    monkeypatch.setattr(pico, "save_checkpoint", failing)
    monkeypatch.setattr(pico.tempfile, "gettempdir", lambda: str(tmp_path / "rescue"))
    with pytest.raises(PicoError, match=r"The trained model is safe in .*rescue"):
        pico.train(config, train, tmp_path / "results", data_folder)
    assert "Training goes on without this checkpoint" in capsys.readouterr().err
    saved = pico.load_checkpoint(tmp_path / "rescue" / "pico_llm_tiny.pt")
    assert weights_equal(saved.weights, expected.model.state_dict())
    assert weights_equal(pico.load_checkpoint(there.checkpoint).weights, there.model.state_dict()), "left as it was"


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
    assert "another seed" not in capsys.readouterr().out
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
    assert began.startswith(f"base.pt ({seen:,} tokens") and "Going on from base.pt" in capsys.readouterr().out


def test_a_run_that_would_read_the_same_again_says_so(finished, data_folder, tmp_path, capsys):
    config, train, first = finished
    again = dataclasses.replace(train, name="again", init_from=str(first.checkpoint), max_steps=1)
    pico.train(config, again, tmp_path, data_folder)
    assert "has read these texts in this order; give the run another seed" in capsys.readouterr().out


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


def test_unfinished_runs_moved_aside_do_not_replace_each_other(finished, data_folder, tmp_path, interrupt):
    config, train, _ = finished
    interrupt(1, 2, 3)
    for seed in (1, 2, 3):
        pico.train(config, dataclasses.replace(train, seed=seed), tmp_path, data_folder)
    kept = [pico.run_files(tmp_path, f"tiny{suffix}.partial") for suffix in (".unfinished-1", ".unfinished-2", "")]
    assert [pico.load_checkpoint(files.model).train_config.seed for files in kept] == [1, 2, 3]
    assert pico.newest_checkpoint(tmp_path) == kept[2].model


def test_a_crash_between_saving_and_renaming_loses_no_model(finished, data_folder, tmp_path, monkeypatch):
    """As kill -9 would, an exception ends the run at each of the renames; the next start puts things right."""
    config, train, _ = finished
    short = dataclasses.replace(train, max_steps=1)
    pico.train(config, short, tmp_path, data_folder)
    second = dataclasses.replace(short, seed=1)
    for n in range(4):
        calls, move = [], pico.RunFiles.move

        def crash(self, target, n=n, calls=calls, move=move):
            if len(calls) == n:
                raise KeyboardInterrupt
            calls.append(1)
            move(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(pico.RunFiles, "move", crash)
            with contextlib.suppress(KeyboardInterrupt):
                pico.train(config, second, tmp_path, data_folder)
        seeds = [pico.load_checkpoint(path).train_config.seed for path in tmp_path.glob("pico_llm_*.pt")]
        assert 0 in seeds
    pico.train(config, second, tmp_path, data_folder)
    assert pico.load_checkpoint(tmp_path / "pico_llm_tiny.pt").train_config.seed == 1


def test_compiled_gradients_add_in_a_fixed_order():
    """Rows of the embedding are added up by several threads; atomic additions would end in other bits each time."""
    from torch._inductor.utils import run_and_get_code

    if problem := pico.compiler_problem("cpu"):
        pytest.skip(problem)
    weight, idx = torch.nn.Parameter(torch.randn(50, 16)), torch.zeros(4096, dtype=torch.long)

    def code():
        torch._dynamo.reset()
        forward = torch.compile(lambda w: torch.nn.functional.embedding(idx, w).cos().sum())
        return "".join(run_and_get_code(lambda: forward(weight).backward())[1])

    device = torch.device("cpu")
    with pico.repeatable(device):
        assert "atomic_add" not in code()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("p", "is_allowed"), [(0, True), (0.0, True), (0.125, True), (0.1, False)])
def test_cudnn_attention_gets_only_the_dropout_that_it_knows(p, is_allowed):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pico.exact_dropout(p):
        assert torch.backends.cuda.cudnn_sdp_enabled() == (before and is_allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
