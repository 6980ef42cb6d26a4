"""Shared by all tests: a tiny model, a tiny corpus, no network."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pico_helpers as pico

# processes of pytest-xdist share the cores, and so do the processes that tests start
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    n_threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def tiny_config() -> pico.ModelConfig:
    return pico.ModelConfig(d_model=32, n_layer=2, n_head=2, d_ff=32, context_length=32, max_positions=64, dropout=0.1)


@pytest.fixture
def tiny_model(tiny_config) -> pico.PicoLLM:
    return pico.PicoLLM(tiny_config, seed=1).eval()


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    """A parquet folder in WikiText's schema: 60 training articles and 5 validation articles of made-up lines."""
    folder = tmp_path_factory.mktemp("corpus")
    parts = {"train-00000-of-00002": range(40), "train-00001-of-00002": range(40, 60)}
    for name, articles in (parts | {"validation-00000-of-00001": range(100, 105)}).items():
        lines = []
        for n in articles:
            body = [f" The number {n} is followed by {n + k} , as line {k} of article {n} says . \n" for k in range(6)]
            lines += ["", f" = Article {n} = \n", "", *body]
            lines += ["", " = = A section = = \n", "", f" Its last line repeats {n} . \n"]
        pq.write_table(pa.table({"text": lines}), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Where token files of the session go."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def tiny_train(corpus_folder) -> pico.TrainConfig:
    steps = {"max_steps": 12, "warmup_steps": 2, "log_interval": 3, "eval_interval": 6}
    options = {"batch_size": 4, "checkpoint_seconds": 0.0, "precision": "fp32", "compile": False}
    return pico.TrainConfig(name="tiny", corpus=str(corpus_folder), **steps, **options)


@pytest.fixture
def train_tiny(tiny_config, tiny_train, data_folder, tmp_path) -> Callable[..., pico.TrainResult]:
    """`train_tiny("folder", max_steps=4)` trains the tiny model with changed settings; its files go into the folder."""

    def train(folder="", *, shape=tiny_config, on_log=None, on_snapshot=None, **changes) -> pico.TrainResult:
        where, hooks = (tmp_path / folder, data_folder), {"on_log": on_log, "on_snapshot": on_snapshot}
        return pico.train(shape, dataclasses.replace(tiny_train, **changes), *where, **hooks)

    return train


@pytest.fixture(autouse=True)
def offline_and_on_the_cpu(request, monkeypatch) -> None:
    """Only tests marked `gpu` use one, since bits differ there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "gpu" not in request.keywords:
        monkeypatch.setattr(pico, "default_device", lambda: torch.device("cpu"))


@pytest.fixture
def interrupt(monkeypatch) -> Callable[..., list[tuple]]:
    """`interrupt(2, 4, 4)`: Ctrl-C in the second step from now on, twice in the fourth; gives all steps' arguments."""

    def at(*numbers: int, kind: int = signal.SIGINT) -> list[tuple]:
        original, calls = pico.train_step, []

        def step(*args) -> torch.Tensor:
            calls.append(args)
            for _ in range(numbers.count(len(calls))):
                os.kill(os.getpid(), kind)
            return original(*args)

        monkeypatch.setattr(pico, "train_step", step)
        return calls

    return at
