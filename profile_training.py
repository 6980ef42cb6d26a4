"""Measures training speed and shows where the time goes.

    python profile_training.py                        one loader, a window of steps after the warm-up
    python profile_training.py --compare --peer       all loaders and a plain loop, interleaved, medians of 5 windows
    python profile_training.py --batch-sizes 32 64 128 256  the same at several batch sizes
    python profile_training.py --torch-profiler       also a Chrome trace (chrome://tracing, ui.perfetto.dev) and its
                                                      picture, results/profile_timeline.png and .svg
    python profile_training.py --recipes --steps 100  optimizers compared at equal tokens (see `compare_recipes`)
    nsys profile -t cuda,nvtx,osrt -o optimized_profile --force-overwrite true python profile_training.py

Timelines show the ranges data, host-to-device, forward, backward and optimizer. cudaProfilerStart and cudaProfilerStop
enclose what is measured, so `nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop ...` leaves
compilation and warm-up out. The table and a bar chart are written to results/profile.csv, .png and .svg.

What the columns mean:
    tokens/s     median over the windows; the chart shows the slowest and the fastest one too
    GPU idle     1 - (union of the intervals in which a kernel runs) / window, taken in a window of its own under the
                 PyTorch profiler, which slows the host: a loop near the host's limit idles less when not watched
    data wait    milliseconds per step in which the host waits for the next batch, without the copy to the GPU
    MFU          FLOPs the model needs / (seconds x peak): (6 N + 12 L T D) per token with N parameters (the output
                 projection counted, the embedding look-up not), L layers, context T, width D (PaLM, Chowdhery et al.
                 2022); the peak is the data sheet's for dense 16-bit matrices, also for a loop that computes in TF32
    of measured  the same with the rate that products of large matrices reach here (--measure-peak) as the peak
    memory       the most that PyTorch's tensors took on the GPU in a step, without those of the other contestants
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import gc
import json
import operator
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import pico_helpers as pico
from pico_helpers import PicoError, Preset, TrainConfig, flops_per_token, peak_flops, profiler_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# -- Idle time from a trace


def union(intervals: Iterable[tuple[float, float]], start: float, stop: float) -> list[tuple[float, float]]:
    """The union of the intervals (begin, end), as far as it lies in start .. stop, in order and without overlaps."""
    result: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        begin, end = max(begin, start), min(end, stop)
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        elif end > begin:
            result.append((begin, end))
    return result


@dataclass(frozen=True)
class Trace:
    """What a Chrome trace of the range `window` tells, in ms from the window's start."""

    length: float
    ranges: list[tuple[float, float, str]]  # (begin, end, name) of the ranges in RANGES, on the host
    kernels: list[tuple[float, float]]  # when any kernel ran, in whatever stream; empty without a GPU

    @property
    def idle(self) -> float | None:
        """Share of the window in which no kernel ran; None without a GPU."""
        return 1 - sum(end - begin for begin, end in self.kernels) / self.length if self.kernels else None

    def steps(self, n: int) -> Trace:
        """A piece as long as n steps take on average, from the start of a step in the middle."""
        starts = [begin for begin, _, name in self.ranges if name == "data"]
        length = self.length * min(1.0, n / len(starts))
        start = min(starts[max(0, len(starts) - n) // 2], self.length - length)
        inside = [(max(b, start) - start, min(e, start + length) - start, name) for b, e, name in self.ranges]
        kernels = [(begin - start, end - start) for begin, end in union(self.kernels, start, start + length)]
        return Trace(length, [piece for piece in inside if piece[1] > piece[0]], kernels)


RANGES = {  # of a step, with their colours in the picture
    "data": "#E69F00",
    "host-to-device": "#56B4E9",
    "forward": "#0072B2",
    "backward": "#009E73",
    "optimizer": "#CC79A7",
}


def read_trace(trace: dict) -> Trace:
    """Reads a Chrome trace as the PyTorch profiler writes it (microseconds)."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    window = next(e for e in events if e["name"] == "window" and e.get("cat") == "user_annotation")
    zero, length = window["ts"], window["dur"] / 1e3

    def place(event: dict) -> tuple[float, float]:
        return (event["ts"] - zero) / 1e3, (event["ts"] + event["dur"] - zero) / 1e3

    named = [e for e in events if e["name"] in RANGES and e.get("cat") == "user_annotation"]
    kernels = union((place(e) for e in events if e.get("cat") == "kernel"), 0, length)
    return Trace(length, sorted((*place(e), e["name"]) for e in named), kernels)


# -- Contestants


class Contestant:
    """One way to train with its own model, optimizer and loader, warmed up when first measured."""

    n_steps = 1_000_000  # more than any measurement takes

    def __init__(
        self,
        kind: str,
        loader: str,
        preset: Preset,
        stream: pico.SequenceStream,
        device: torch.device,
        workers: int,
        loss_chunk: int | None = None,
    ) -> None:
        self.kind, self.loader, self.config, self.device = kind, loader, preset.train, device
        self.held_before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0  # by the others
        self.dtype = pico.choose_precision(self.config.precision, device)
        compiled = pico.choose_compile(self.config.compile, device, float("inf"))
        self.run = pico.TrainingRun(preset.model, self.config, "", device, self.dtype, compiled)
        self.run.model.loss_chunk = loss_chunk or self.run.model.loss_chunk
        self.batches = pico.make_loader(
            loader, stream, self.config.batch_size, range(self.n_steps), device, workers=workers
        )
        self.windows: list[tuple[float, float]] = []  # (tokens per second, ms per step waiting for data)
        self.peak_memory: int | None = None  # bytes
        self.trace: Trace | None = None

    def step(self) -> float:
        """One training step; returns the seconds spent waiting for data."""
        started = time.perf_counter()
        with profiler_range("data"):
            batch = next(self.batches)
        waited = time.perf_counter() - started
        with profiler_range("host-to-device"):
            batch = batch.to(self.device, non_blocking=self.loader != "naive")
        self.update(batch)
        return waited

    def update(self, batch: Tensor) -> None:
        self.run.take_step(batch)

    def warm_up(self, steps: int) -> None:
        """The first step compiles and allocates, so the peak of memory is that of the later ones."""
        for number in range(steps):
            if self.device.type == "cuda" and number < 2:
                torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
        self.wait()
        if self.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(self.device) - self.held_before

    def measure(self, warmup: int, steps: int) -> None:
        """Times a window of steps. The warm-up before it also uses up the batches that workers made meanwhile."""
        for _ in range(warmup):
            self.step()
        self.wait()
        started = time.perf_counter()
        waited = sum(self.step() for _ in range(steps))
        self.wait()
        seconds = time.perf_counter() - started
        tokens = steps * self.config.batch_size * self.run.model.config.context_length
        self.windows.append((tokens / seconds, 1e3 * waited / steps))

    def record(self, steps: int, path: Path) -> None:
        """Writes a Chrome trace of a window of steps and reads it."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.step()
        self.wait()
        with torch.profiler.profile(activities=activities) as profiler, profiler_range("window"):
            for _ in range(steps):
                self.step()
            self.wait()
        with pico.atomic_write(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        self.trace = read_trace(json.loads(path.read_text(encoding="utf-8")))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(speed for speed, _ in self.windows)


class PlainLoop(Contestant):
    """The loop that people start from: eager, float32 (TF32 on a GPU), all logits at once, AdamW as it comes."""

    def __init__(self, kind: str, loader: str, preset: Preset, *more) -> None:
        plain = dataclasses.replace(preset.train, precision="fp32", compile=False)
        super().__init__(kind, loader, dataclasses.replace(preset, train=plain), *more)
        self.run.optimizer = torch.optim.AdamW(self.run.model.parameters(), lr=plain.learning_rate)

    def update(self, batch: Tensor) -> None:
        micro_batches = batch.split(self.config.micro_batch_size or len(batch))
        with pico.float32_matmul("high"):
            for micro_batch in micro_batches:
                with profiler_range("forward"):
                    logits = self.run.model(micro_batch[:, :-1])
                    loss = F.cross_entropy(logits.flatten(0, 1), micro_batch[:, 1:].flatten()) / len(micro_batches)
                with profiler_range("backward"):
                    loss.backward()
        with profiler_range("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.run.model.parameters(), self.config.grad_clip)
            self.run.optimizer.step()
            self.run.optimizer.zero_grad()
        self.run.step += 1


# -- Measuring and reporting


def matrix_rate(device: torch.device, dtype: torch.dtype, n: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of the product of two n x n matrices of random numbers (zeros are faster), median of the repeats."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    return 2 * n**3 / (1e-3 * statistics.median(pico.time_calls(lambda matrix: matrix @ b, [a], repeats)))


@contextlib.contextmanager
def captured(device: torch.device) -> Iterator[None]:
    """What `nsys --capture-range=cudaProfilerApi` records."""
    if device.type == "cuda":
        torch.cuda.profiler.start()
    yield
    if device.type == "cuda":
        torch.cuda.profiler.stop()


def start(kind: type[Contestant], arguments: tuple, warmup: int) -> Contestant | None:
    """A contestant after its warm-up, or None with a line printed when memory does not suffice."""
    name, _, preset, *_ = arguments
    try:
        with pico.readable_errors(preset.train):
            contestant = kind(*arguments)
            contestant.warm_up(warmup)
            return contestant
    except PicoError as error:
        print(f"{name}, batch {preset.train.batch_size}: left out. {error}")
    return None


def measure_all(contestants: list[Contestant], warmup: int, steps: int, repeats: int) -> None:
    """Windows of all contestants in turn, each turn led by another one, so that a drift of the machine hits all."""
    with captured(contestants[0].device):
        for repeat in range(repeats):
            first = repeat % len(contestants)
            for contestant in contestants[first:] + contestants[:first]:
                contestant.measure(warmup if repeats > 1 else 0, steps)


def names(contestants: list[Contestant]) -> list[str]:
    """The kind of each, with the batch size where that differs."""
    several = len({contestant.config.batch_size for contestant in contestants}) > 1
    return [c.kind + (f", batch {c.config.batch_size}" if several else "") for c in contestants]


def describe(contestants: list[Contestant], steps: int, measured_rate: float | None = None) -> list[dict]:
    """One row for each contestant, as in the CSV. Ratios are to the contestant of the same batch size."""
    here = pico.measured_on(contestants[0].device)
    peak = peak_flops(here["device"])
    speeds = {(c.kind, c.config.batch_size): c.tokens_per_second for c in contestants}
    rows = []
    for name, contestant in zip(names(contestants), contestants, strict=True):
        model, batch_size, memory = contestant.run.model, contestant.config.batch_size, contestant.peak_memory
        flops = flops_per_token(model.config, model.count_parameters()[1])
        speed = contestant.tokens_per_second
        naive, plain = (speeds.get((kind, batch_size)) for kind in ("naive", "plain loop"))
        rows.append(
            {
                "name": name,
                "tokens_per_second": round(speed, 1),
                "slowest": round(min(speed for speed, _ in contestant.windows), 1),
                "fastest": round(max(speed for speed, _ in contestant.windows), 1),
                "ratio_to_naive": naive and round(speed / naive, 3),
                "ratio_to_plain_loop": plain and round(speed / plain, 3),
                "gpu_idle_share": contestant.trace and contestant.trace.idle,
                "data_wait_ms": round(statistics.median(wait for _, wait in contestant.windows), 3),
                "mfu": peak and round(speed * flops / peak, 4),
                "mfu_of_measured_rate": measured_rate and round(speed * flops / measured_rate, 4),
                "measured_tflops": measured_rate and round(measured_rate / 1e12, 3),
                "peak_memory_mb": memory and round(memory / 1e6, 1),
                "flops_per_token": flops,
                "precision": str(contestant.dtype)[6:],
                "compiled": contestant.run.compiled,
                "batch_size": batch_size,
                "loss_chunk": model.loss_chunk if contestant.kind != "plain loop" else None,
                "context_length": model.config.context_length,
                "steps": steps,
                "windows": len(contestant.windows),
                **here,
            }
        )
    return rows


def format_table(rows: list[dict]) -> str:
    """The rows as text. A missing number says why it is missing."""
    has_gpu = not rows[0]["device"].startswith("CPU")

    def shown(row: dict) -> dict[str, str]:
        ratio, plain, idle = row["ratio_to_naive"], row["ratio_to_plain_loop"], row["gpu_idle_share"]
        measured, memory = row["mfu_of_measured_rate"], row["peak_memory_mb"]
        cells = {
            "": row["name"],
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "to naive": "-" if ratio is None else f"{ratio:.2f}x",
            "to plain loop": plain and f"{plain:.2f}x",
            "GPU idle": f"{idle:.1%}" if idle is not None else "not traced" if has_gpu else "no GPU",
            "data wait": f"{row['data_wait_ms']:.2f} ms",
            "MFU": f"{row['mfu']:.1%}" if row["mfu"] is not None else "peak unknown",
            "of measured": measured and f"{measured:.1%}",
            "memory": memory and f"{memory / 1e3:.1f} GB",
        }
        return {name: cell or "-" for name, cell in cells.items()}

    table = [shown(row) for row in rows]
    optional = ("to plain loop", "of measured", "memory")  # left out where no row has it
    kept = [name for name in table[0] if name not in optional or any(line[name] != "-" for line in table)]
    widths = {name: max(len(name), *(len(line[name]) for line in table)) for name in kept}
    lines = ["  ".join(name.rjust(width) for name, width in widths.items())]
    lines += ["  ".join(line[name].rjust(width) for name, width in widths.items()) for line in table]
    windows, steps = rows[0]["windows"], rows[0]["steps"]
    about = f"median of {windows} windows of {steps} steps" if windows > 1 else f"one window of {steps} steps"
    return "\n".join([f"{rows[0]['device']}; {about}", *lines])


def draw_chart(rows: list[dict]) -> Figure:
    """Bars of tokens per second with the range over the windows; a line at the loop that the ratios refer to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 0.9 + 0.55 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    speeds = [row["tokens_per_second"] for row in rows]
    spread = [
        [row["tokens_per_second"] - row["slowest"] for row in rows],
        [row["fastest"] - row["tokens_per_second"] for row in rows],
    ]
    axes.barh([row["name"] for row in rows], speeds, xerr=spread, color="#0072B2", ecolor="#333333", capsize=3)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    key = "ratio_to_plain_loop" if any(row["ratio_to_plain_loop"] for row in rows) else "ratio_to_naive"
    bases = [row["tokens_per_second"] for row in rows if row[key] == 1]
    for index, row in enumerate(rows):
        label = f"{row['tokens_per_second']:,.0f}" + ("" if row[key] is None else f" ({row[key]:.2f}x)")
        axes.annotate(label, (row["fastest"], index), (6, 0), textcoords="offset points", va="center", fontsize=8)
    if len(bases) == 1:
        axes.axvline(bases[0], color="#D55E00", linestyle="--", linewidth=1)
    axes.set_xlabel("training tokens per second")
    sizes = "/".join(str(size) for size in sorted({row["batch_size"] for row in rows}))
    axes.set_title(f"{rows[0]['device']}, {sizes} x {rows[0]['context_length']} tokens a step", size=9)
    return figure


def draw_timeline(traces: dict[str, Trace], about: str, n_steps: int = 2) -> Figure:
    """n steps of each trace on one time scale: a row for the host's ranges, one for the time in which kernels run."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    has_gpu = any(trace.kernels for trace in traces.values())
    rows: list[str] = []
    figure = Figure(figsize=(10, 1.4 + (0.8 if has_gpu else 0.45) * len(traces)), layout="constrained")
    axes = figure.add_subplot()
    for name, trace in traces.items():
        piece = trace.steps(n_steps)
        for begin, end, kind in piece.ranges:
            axes.barh(len(rows), end - begin, 0.8, begin, color=RANGES[kind], linewidth=0)
        rows.append(f"{name}, host")
        if piece.kernels:
            bars = [(begin, end - begin) for begin, end in piece.kernels]
            axes.broken_barh(bars, (len(rows) - 0.4, 0.8), color="#333333", linewidth=0, rasterized=len(bars) > 500)
            axes.text(piece.length, len(rows), f"  idle {trace.idle:.1%}", va="center", fontsize=8)
            rows.append("GPU")
        axes.axhline(len(rows) - 0.5, color="#cccccc", linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(trace.steps(n_steps).length for trace in traces.values()))
    axes.set_xlabel("milliseconds under the profiler")
    title = f"{n_steps} training steps, {about}{'' if has_gpu else '; no GPU'}"
    axes.set_title(f"{title}\nOur loops compute the gradients of the output layer with the loss, in `forward`", size=9)
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=color, label=name) for name, color in RANGES.items()]
    patches += [Patch(color="#333333", label="any kernel")] if has_gpu else []
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    return figure


# -- Recipes


@dataclass
class RecipeTable:
    """Runs recipes at equal tokens and keeps one row per run in a CSV; a run that is there already is not repeated."""

    preset: Preset
    scale: str  # what all runs have in common, for the reader and to tell old rows apart
    path: Path
    data_folder: str | Path
    device: torch.device
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def run(self, stage: str, recipe: str, seed: int, changes: dict) -> float:
        """Validation loss of the preset with these changes to its two configurations."""
        key = {"scale": self.scale, "seed": str(seed), "settings": json.dumps(changes, sort_keys=True)}
        for row in self.rows:
            if key.items() <= row.items():
                return float(row["val_loss"])
        changed = self.preset.changed(changes | {"seed": seed})
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = pico.train(changed.model, changed.train, folder, self.data_folder, device=self.device)
                if not result.finished:
                    raise KeyboardInterrupt
                last = result.metrics[-1]
            except PicoError as error:  # a rate that is far too high is a result as well
                print(error)
                last = {"tokens": 0, "train_loss": float("inf"), "val_loss": float("inf")}
        row = {"stage": stage, "recipe": recipe, **key, "tokens": last["tokens"]}
        row |= {name: f"{last[name]:.4f}" for name in ("val_loss", "train_loss")}
        row["seconds"] = f"{time.perf_counter() - started:.1f}"
        self.rows.append(row | pico.measured_on(self.device))
        pico.write_csv(self.path, self.rows)
        print(f"{stage} {recipe} seed {seed} {key['settings']}: validation loss {last['val_loss']:.4f}")
        return last["val_loss"]

    def tune(self, recipe: str, changes: dict, axes: list[list[dict]], limit: int | None = None, seed: int = 0) -> dict:
        """The best settings found when one after the other takes each of its values, beginning with the first ones.

        An axis is a list of alternative changes. `limit` bounds the number of runs.
        """
        changes = functools.reduce(operator.or_, (axis[0] for axis in axes), changes)
        best_loss, n_runs = self.run("tuning", recipe, seed, changes), 1
        for axis in axes:
            here = changes
            for value in axis[1:]:
                if n_runs == limit:
                    return changes
                loss, n_runs = self.run("tuning", recipe, seed, here | value), n_runs + 1
                if loss < best_loss:
                    best_loss, changes = loss, here | value
        return changes


def _values(name: str, *values: object) -> list[dict]:
    return [{name: value} for value in values]


def shared_axes(preset: Preset) -> list[list[dict]]:
    """What both optimizers are tuned in beside their rates: batch size at equal tokens, dropout."""
    train, model = preset.train, preset.model
    batches = [{}]
    for factor in (0.5, 2):
        change = {
            "batch_size": max(1, int(train.batch_size * factor)),
            "warmup_steps": int(train.warmup_steps / factor),
        }
        if train.max_steps:
            change["max_steps"] = max(1, int(train.max_steps / factor))
        batches.append(change)
    return [batches, [{}, {"dropout": 0.0 if model.dropout else 0.1}]]


def compare_recipes(table: RecipeTable, seeds: Iterable[int] = (1, 2, 3), tuning_runs: int | None = None) -> str:
    """AdamW against Muon at equal tokens; returns the summary.

    Each is tuned in 12 runs (or the first `tuning_runs` of them) with seed 0, then the best settings of both run with
    the other seeds, Muon also with QK-norm (an ablation: it is not our architecture) and with half the tokens.
    """
    train, defaults = table.preset.train, TrainConfig()
    steps = train.max_steps
    rate = 0.384 / table.preset.model.d_model  # wide models want smaller ones (Yang et al. 2022)
    shared = shared_axes(table.preset)
    adamw = table.tune(
        "adamw",
        {"optimizer": "adamw"},
        [
            _values("learning_rate", rate, rate / 3, rate * 2, rate * 4),
            _values("weight_decay", defaults.weight_decay, 0.4, 1.6),
            _values("betas", defaults.betas, (0.9, 0.99), (0.8, 0.95), (0.9, 0.98)),
            *shared,
        ],
        tuning_runs,
    )
    muon = table.tune(
        "muon",
        {"optimizer": "muon"},
        [
            _values("matrix_learning_rate", defaults.matrix_learning_rate, 0.01, 0.04),
            _values("learning_rate", rate, rate * 2, rate * 4, rate * 8),
            _values("matrix_weight_decay", defaults.matrix_weight_decay, 0.02, 0.4, 1.6),
            *shared,
        ],
        tuning_runs,
    )
    half = {"epochs": train.epochs / 2}
    if steps:
        half["max_steps"] = muon.get("max_steps", steps) // 2
    finals = {
        "adamw": adamw,
        "muon": muon,
        "muon, QK-norm": muon | {"qk_norm": True},
        "muon, half the tokens": muon | half,
    }
    lines = []
    for name, changes in finals.items():
        losses = [table.run("final", name, seed, changes) for seed in seeds]
        if losses:
            mean = statistics.mean(losses)
            lines.append(f"{name:32} {mean:.4f}  ({min(losses):.4f} to {max(losses):.4f}, {len(losses)} seeds)")
    lines = lines or [f"best of {name}: {json.dumps(best)}" for name, best in (("adamw", adamw), ("muon", muon))]
    return "\n".join([f"Validation loss, {table.scale}:", *lines])


# -- Command line


def at_least(low: int) -> Callable[[str], int]:
    """A type of whole numbers for argparse."""

    def whole_number(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
        return value

    return whole_number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=list(pico.PRESETS), default=pico.default_preset())
    parser.add_argument("--loader", choices=pico.LOADERS, help="default: what `train` would choose")
    parser.add_argument("--compare", action="store_true", help="all loaders, interleaved")
    parser.add_argument("--peer", action="store_true", help="also a plain eager loop in float32")
    parser.add_argument(
        "--torch-profiler", action="store_true", help="write a Chrome trace of each contestant, draw them"
    )
    parser.add_argument(
        "--measure-peak", action=argparse.BooleanOptionalAction, default=has_gpu, help="default: on a GPU"
    )
    parser.add_argument("--recipes", action="store_true", help="compare optimizers instead; --steps is a run's length")
    parser.add_argument("--tuning-runs", type=at_least(1), help="of each optimizer with --recipes (default: 12)")
    parser.add_argument(
        "--seeds", type=at_least(0), default=3, help="of each final recipe with --recipes (%(default)s)"
    )
    parser.add_argument("--context-length", type=at_least(1), help="tokens per sequence, default: the preset's")
    parser.add_argument("--steps", type=at_least(1), help=f"of a window, default {50 if has_gpu else 4}")
    parser.add_argument(
        "--warmup", type=at_least(0), default=10 if has_gpu else 1, help="steps before a window (%(default)s)"
    )
    parser.add_argument(
        "--repeats", type=at_least(1), help="windows of each contestant, default 5, with a single one 1"
    )
    parser.add_argument("--batch-sizes", type=at_least(1), nargs="+", help="sequences per step, default: the preset's")
    parser.add_argument("--micro-batch-size", type=at_least(1), help="sequences per forward pass, default: all of them")
    parser.add_argument("--loss-chunk", type=at_least(1), help="rows of logits held at a time, default: the model's")
    parser.add_argument(
        "--workers", type=at_least(1), default=2, help="processes of the loader `workers` (%(default)s)"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--corpus", default="offline", help="as in TrainConfig (%(default)s)")
    parser.add_argument("--out", default="results", help="folder for table and chart (%(default)s)")
    parser.add_argument("--data", default="data", help="folder for token files (%(default)s)")
    return parser.parse_args(arguments)


def make_preset(options: argparse.Namespace) -> Preset:
    """The preset with the options applied."""
    preset = pico.get_preset(options.preset)
    changes = {"corpus": options.corpus, "precision": options.precision, "compile": options.compile}
    changes |= {"batch_size": (options.batch_sizes or [preset.train.batch_size])[0]}
    changes |= {"micro_batch_size": options.micro_batch_size or preset.train.micro_batch_size}
    changes |= {"context_length": options.context_length or preset.model.context_length}
    return preset.changed(changes)


def run_recipes(options: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    train: TrainConfig = dataclasses.replace(
        preset.train, max_steps=options.steps, eval_interval=10**9, log_interval=50, checkpoint_seconds=1e9
    )
    if options.steps:
        train = dataclasses.replace(train, warmup_steps=min(train.warmup_steps, options.steps // 10))
    length = f"{options.steps} steps" if options.steps else f"{train.epochs:g} epochs"
    scale = f"{options.preset}, {length} of {train.batch_size} x {preset.model.context_length} tokens, {train.corpus}"
    path = Path(options.out) / "benchmarks" / "recipes.csv"
    table = RecipeTable(dataclasses.replace(preset, train=train), scale, path, options.data, device)
    print(compare_recipes(table, range(1, options.seeds + 1), options.tuning_runs))
    print(f"Every run: {path}")


def run_profile(options: argparse.Namespace, preset: Preset, device: torch.device) -> list[dict]:
    corpus = pico.choose_corpus(preset.train.corpus, preset.train.corpus_fraction, options.data)
    print(f"Corpus: {corpus.about}.")
    file = pico.prepare_tokens(corpus, "train", options.data)
    stream = pico.SequenceStream(file, preset.model.context_length, preset.train.max_sequences, preset.train.seed)
    loaders = pico.LOADERS if options.compare else [options.loader or pico.choose_loader(stream, device)]
    kinds = [(PlainLoop, "plain loop", "naive")] if options.peer else []
    kinds += [(Contestant, loader, loader) for loader in loaders]
    contestants, shared = [], (stream, device, options.workers, options.loss_chunk)
    for size in dict.fromkeys(options.batch_sizes or [preset.train.batch_size]):
        sized = dataclasses.replace(preset, train=dataclasses.replace(preset.train, batch_size=size))
        for kind, name, loader in kinds:
            contestants.append(start(kind, (name, loader, sized, *shared), options.warmup))
            gc.collect()  # one that ran out of memory is gone for good
            if device.type == "cuda":
                torch.cuda.empty_cache()
    contestants = [contestant for contestant in contestants if contestant]
    if not contestants:
        raise PicoError("Nothing could be measured; the lines above say why.")
    steps = options.steps or (50 if device.type == "cuda" else 4)
    measure_all(contestants, options.warmup, steps, options.repeats or (5 if len(contestants) > 1 else 1))

    out = Path(options.out)
    under_nsys = "NSYS_PROFILING_SESSION_ID" in os.environ  # only one profiler can listen to the GPU
    traces = {}
    for name, contestant in zip(names(contestants), contestants, strict=True):
        path = out / f"profile_{re.sub('[, ]+', '_', name)}.trace.json"
        if options.torch_profiler:
            contestant.record(min(steps, 10), path)
            print(f"Chrome trace: {path}")
            traces[name] = contestant.trace
        elif device.type == "cuda" and not under_nsys:
            with tempfile.TemporaryDirectory() as folder:
                contestant.record(min(steps, 10), Path(folder) / path.name)
    rate = None
    if options.measure_peak:
        on_gpu = device.type == "cuda"
        rate = matrix_rate(device, pico.choose_precision("auto", device), 8192 if on_gpu else 1024)
    about = {"preset": options.preset, "corpus": corpus.name}
    rows = [row | about for row in describe(contestants, steps, rate)]
    print(format_table(rows))
    written = [pico.write_csv(out / "profile.csv", rows), *pico.save_figure(draw_chart(rows), out / "profile")]
    if traces:
        written += pico.save_figure(draw_timeline(traces, rows[0]["device"]), out / "profile_timeline")
    print("Written:", ", ".join(str(path) for path in written))
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = pico.default_device()
    try:
        preset = make_preset(options)
        pico.check_writable(options.out)
        # training draws dropout from the global generator, which is put back for whoever calls this from Python
        with pico.readable_errors(preset.train), torch.random.fork_rng([device] if device.type == "cuda" else []):
            run_recipes(options, preset, device) if options.recipes else run_profile(options, preset, device)
    except PicoError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Recipes that had ended are kept; the same command goes on with the next one.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
