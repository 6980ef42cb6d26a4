"""Measures training speed and shows where the time goes.

    python profile_training.py                        one loader, a window of steps after the warm-up
    python profile_training.py --compare --peer       all loaders and a plain loop, interleaved, medians of 5 windows
    python profile_training.py --torch-profiler       also a Chrome trace (chrome://tracing, ui.perfetto.dev)
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
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import pico_helpers as pico
from pico_helpers import PicoError, Preset, TrainConfig, flops_per_token, peak_flops, profiler_range

# -- Idle time from a trace


def covered(intervals: Iterable[tuple[float, float]], start: float, stop: float) -> float:
    """Length of the union of the intervals (begin, end), as far as it lies in start .. stop."""
    total, reached = 0.0, start
    for begin, end in sorted(intervals):
        begin, end = max(begin, reached), min(end, stop)
        if end > begin:
            total += end - begin
            reached = end
    return total


def idle_share(trace: dict) -> float | None:
    """Share of the range `window` of a Chrome trace in which no kernel ran; None without any kernel (no GPU)."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    kernels = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "kernel"]
    window = next(e for e in events if e["name"] == "window" and e.get("cat") == "user_annotation")
    if not kernels:
        return None
    return 1 - covered(kernels, window["ts"], window["ts"] + window["dur"]) / window["dur"]


# -- Contestants


class Contestant:
    """One way to train with its own model, optimizer and loader, warmed up when first measured."""

    def __init__(
        self, name: str, loader: str, preset: Preset, stream: pico.SequenceStream, device: torch.device, workers: int
    ) -> None:
        self.name, self.loader, self.config, self.device = name, loader, preset.train, device
        self.dtype = pico.choose_precision(self.config.precision, device)
        self.model = pico.PicoLLM(preset.model, self.config.seed).to(device).train()
        self.forward = pico.make_forward(self.model, self.config, device)
        self.optimizer = pico.make_optimizer(self.model, self.config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.guard = pico.LossGuard(preset.model.vocab_size, device)
        self.n_steps = 0
        self.batches = pico.make_loader(
            loader, stream, self.config.batch_size, range(1_000_000), device, workers=workers
        )
        self.windows: list[tuple[float, float]] = []  # (tokens per second, ms per step waiting for data)
        self.idle: float | None = None

    def step(self) -> float:
        """One training step; returns the seconds spent waiting for data."""
        started = time.perf_counter()
        with profiler_range("data"):
            batch = next(self.batches)
        waited = time.perf_counter() - started
        with profiler_range("host-to-device"):
            batch = batch.to(self.device, non_blocking=self.loader != "naive")
        self.update(batch)
        self.n_steps += 1
        return waited

    def update(self, batch: Tensor) -> None:
        args = self.forward, self.optimizer, self.scaler, batch, self.config, self.n_steps, self.dtype, self.guard
        pico.train_step(*args)

    def measure(self, warmup: int, steps: int) -> None:
        """Times a window of steps. The warm-up before it also uses up the batches that workers made meanwhile."""
        for _ in range(warmup):
            self.step()
        self.wait()
        started = time.perf_counter()
        waited = sum(self.step() for _ in range(steps))
        self.wait()
        seconds = time.perf_counter() - started
        tokens = steps * self.config.batch_size * self.model.config.context_length
        self.windows.append((tokens / seconds, 1e3 * waited / steps))

    def trace(self, steps: int, path: Path) -> None:
        """Writes a Chrome trace of a window of steps and takes the idle share from it."""
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
        self.idle = idle_share(json.loads(path.read_text(encoding="utf-8")))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(speed for speed, _ in self.windows)


class PlainLoop(Contestant):
    """The loop that people start from: eager, float32 (TF32 on a GPU), all logits at once, AdamW as it comes."""

    def __init__(
        self, name: str, loader: str, preset: Preset, stream: pico.SequenceStream, device: torch.device, workers: int
    ) -> None:
        plain = dataclasses.replace(preset.train, precision="fp32", compile=False)
        super().__init__(name, loader, dataclasses.replace(preset, train=plain), stream, device, workers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=plain.learning_rate)

    def update(self, batch: Tensor) -> None:
        micro_batches = batch.split(self.config.micro_batch_size or len(batch))
        with pico.float32_matmul("high"):
            for micro_batch in micro_batches:
                with profiler_range("forward"):
                    logits = self.model(micro_batch[:, :-1])
                    loss = F.cross_entropy(logits.flatten(0, 1), micro_batch[:, 1:].flatten()) / len(micro_batches)
                with profiler_range("backward"):
                    loss.backward()
        with profiler_range("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


# -- Measuring and reporting


@contextlib.contextmanager
def captured(device: torch.device) -> Iterator[None]:
    """What `nsys --capture-range=cudaProfilerApi` records."""
    if device.type == "cuda":
        torch.cuda.profiler.start()
    yield
    if device.type == "cuda":
        torch.cuda.profiler.stop()


def measure_all(contestants: list[Contestant], warmup: int, steps: int, repeats: int) -> None:
    """Windows of all contestants in turn, each turn led by another one, so that a drift of the machine hits all."""
    device = contestants[0].device
    for contestant in contestants:  # compiles
        for _ in range(warmup):
            contestant.step()
        contestant.wait()
    with captured(device):
        for repeat in range(repeats):
            first = repeat % len(contestants)
            for contestant in contestants[first:] + contestants[:first]:
                contestant.measure(warmup if repeats > 1 else 0, steps)


def describe(contestants: list[Contestant], steps: int) -> list[dict]:
    """One row for each contestant, as in the CSV."""
    device = contestants[0].device
    name = pico.describe_device(device)
    peak = peak_flops(name)
    speeds = {contestant.name: contestant.tokens_per_second for contestant in contestants}
    rows = []
    for contestant in contestants:
        flops = flops_per_token(contestant.model.config, contestant.model.count_parameters()[1])
        speed = contestant.tokens_per_second
        rows.append(
            {
                "name": contestant.name,
                "tokens_per_second": round(speed, 1),
                "slowest": round(min(speed for speed, _ in contestant.windows), 1),
                "fastest": round(max(speed for speed, _ in contestant.windows), 1),
                "ratio_to_naive": round(speed / speeds["naive"], 3) if "naive" in speeds else None,
                "ratio_to_plain_loop": round(speed / speeds["plain loop"], 3) if "plain loop" in speeds else None,
                "gpu_idle_share": contestant.idle,
                "data_wait_ms": round(statistics.median(wait for _, wait in contestant.windows), 3),
                "mfu": round(speed * flops / peak, 4) if peak else None,
                "flops_per_token": flops,
                "device": name,
                "precision": str(contestant.dtype)[6:],
                "compiled": contestant.forward is not contestant.model,
                "batch_size": contestant.config.batch_size,
                "context_length": contestant.model.config.context_length,
                "steps": steps,
                "windows": len(contestant.windows),
                "torch": torch.__version__,
            }
        )
    return rows


def format_table(rows: list[dict]) -> str:
    """The rows as text. A missing number says why it is missing."""
    has_gpu = not rows[0]["device"].startswith("CPU")

    def shown(row: dict) -> dict[str, str]:
        ratio, plain, idle = row["ratio_to_naive"], row["ratio_to_plain_loop"], row["gpu_idle_share"]
        cells = {
            "": row["name"],
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "to naive": "-" if ratio is None else f"{ratio:.2f}x",
            "to plain loop": "-" if plain is None else f"{plain:.2f}x",
            "GPU idle": f"{idle:.1%}" if idle is not None else "not traced" if has_gpu else "no GPU",
            "data wait": f"{row['data_wait_ms']:.2f} ms",
            "MFU": f"{row['mfu']:.1%}" if row["mfu"] is not None else "peak unknown",
        }
        return {name: cell for name, cell in cells.items() if name != "to plain loop" or plain is not None}

    table = [shown(row) for row in rows]
    widths = {name: max(len(name), *(len(line[name]) for line in table)) for name in table[0]}
    lines = ["  ".join(name.rjust(width) for name, width in widths.items())]
    lines += ["  ".join(line[name].rjust(width) for name, width in widths.items()) for line in table]
    windows, steps = rows[0]["windows"], rows[0]["steps"]
    about = f"median of {windows} windows of {steps} steps" if windows > 1 else f"one window of {steps} steps"
    return "\n".join([f"{rows[0]['device']}; {about}", *lines])


def draw_chart(rows: list[dict]):
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
    axes.margins(x=0.2)
    key = "ratio_to_plain_loop" if rows[0]["ratio_to_plain_loop"] is not None else "ratio_to_naive"
    base = next((row["tokens_per_second"] for row in rows if row[key] == 1), None)
    for index, row in enumerate(rows):
        label = f"{row['tokens_per_second']:,.0f}" + ("" if row[key] is None else f" ({row[key]:.2f}x)")
        axes.annotate(label, (row["fastest"], index), (6, 0), textcoords="offset points", va="center", fontsize=8)
    if base:
        axes.axvline(base, color="#D55E00", linestyle="--", linewidth=1)
    axes.set_xlabel("training tokens per second")
    axes.set_title(f"{rows[0]['device']}, {rows[0]['batch_size']} x {rows[0]['context_length']} tokens a step", size=9)
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
        """Validation loss of the preset with these changes to its TrainConfig."""
        key = {"scale": self.scale, "seed": str(seed), "settings": json.dumps(changes, sort_keys=True)}
        for row in self.rows:
            if key.items() <= row.items():
                return float(row["val_loss"])
        config = dataclasses.replace(self.preset.train, seed=seed, **changes)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                last = pico.train(self.preset.model, config, folder, self.data_folder, device=self.device).metrics[-1]
            except PicoError as error:  # a rate that is far too high is a result as well
                print(error)
                last = {"tokens": 0, "train_loss": float("inf"), "val_loss": float("inf")}
        row = {"stage": stage, "recipe": recipe, **key, "tokens": last["tokens"]}
        row |= {name: f"{last[name]:.4f}" for name in ("val_loss", "train_loss")}
        self.rows.append(row | {"seconds": f"{time.perf_counter() - started:.1f}", "device": self.device.type})
        pico.write_csv(self.path, self.rows)
        print(f"{stage} {recipe} seed {seed} {key['settings']}: validation loss {last['val_loss']:.4f}")
        return last["val_loss"]

    def tune(self, recipe: str, changes: dict, axes: dict[str, list], seed: int = 0) -> dict:
        """The best settings found when one after the other takes each of its values, beginning with the first ones."""
        changes = changes | {name: values[0] for name, values in axes.items()}
        best_loss = self.run("tuning", recipe, seed, changes)
        for name, values in axes.items():
            here = changes
            for value in values[1:]:
                loss = self.run("tuning", recipe, seed, here | {name: value})
                if loss < best_loss:
                    best_loss, changes = loss, here | {name: value}
        return changes


def compare_recipes(table: RecipeTable, seeds: Iterable[int] = (1, 2, 3)) -> str:
    """AdamW against Muon at equal tokens; returns the summary.

    Each is tuned in 7 runs with seed 0, then the best settings of both run with other seeds; with weight averages, with
    a schedule for the weight decay, and Muon with half the tokens, too.
    """
    train, defaults = table.preset.train, TrainConfig()
    steps = train.max_steps
    # Muon's presets hold the larger rate that suits the embedding beside it
    rate = train.learning_rate / (4 if train.optimizer == "muon" else 1)
    rates = [rate, rate / 3, rate * 2, rate * 4]
    adamw = table.tune(
        "adamw",
        {"optimizer": "adamw"},
        {
            "learning_rate": rates,
            "weight_decay": [defaults.weight_decay, 0.4, 1.6],
            "betas": [defaults.betas, (0.9, 0.99)],
        },
    )
    muon = table.tune(
        "muon",
        {"optimizer": "muon"},
        {
            "matrix_learning_rate": [defaults.matrix_learning_rate, 0.01, 0.04],
            "learning_rate": [rate, rate * 2, rate * 4],
            "matrix_weight_decay": [defaults.matrix_weight_decay, 0.02, 0.4],
        },
    )
    half = {"epochs": train.epochs / 2, "max_steps": steps and steps // 2}
    finals = {
        "adamw": adamw,
        "muon": muon,
        "muon, exponential average": muon | {"average": "ema"},
        "muon, average of the tail": muon | {"average": "tail"},
        "muon, weight decay in a valley": muon | {"weight_decay_schedule": "valley"},
        "muon, half the tokens": muon | half,
    }
    lines = []
    for name, changes in finals.items():
        losses = [table.run("final", name, seed, changes) for seed in seeds]
        mean = statistics.mean(losses)
        lines.append(f"{name:32} {mean:.4f}  ({min(losses):.4f} to {max(losses):.4f}, {len(losses)} seeds)")
    return "\n".join([f"Validation loss, {table.scale}:", *lines])


# -- Command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=list(pico.PRESETS), default=pico.default_preset())
    parser.add_argument("--loader", choices=pico.LOADERS, help="default: what `train` would choose")
    parser.add_argument("--compare", action="store_true", help="all loaders, interleaved")
    parser.add_argument("--peer", action="store_true", help="also a plain eager loop in float32")
    parser.add_argument("--torch-profiler", action="store_true", help="write a Chrome trace of each contestant")
    parser.add_argument("--recipes", action="store_true", help="compare optimizers instead; --steps is a run's length")
    parser.add_argument("--steps", type=int, help=f"of a window, default {50 if has_gpu else 4}")
    parser.add_argument("--warmup", type=int, default=10 if has_gpu else 1, help="steps before a window (%(default)s)")
    parser.add_argument("--repeats", type=int, help="windows of each contestant, default 5 with --compare, else 1")
    parser.add_argument("--batch-size", type=int, help="sequences per step, default: the preset's")
    parser.add_argument("--micro-batch-size", type=int, help="sequences per forward pass, default: all of them")
    parser.add_argument("--workers", type=int, default=2, help="processes of the loader `workers` (%(default)s)")
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
    changes |= {"batch_size": options.batch_size or preset.train.batch_size}
    changes |= {"micro_batch_size": options.micro_batch_size or preset.train.micro_batch_size}
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, **changes))


def run_recipes(options: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    train: TrainConfig = dataclasses.replace(
        preset.train, max_steps=options.steps, eval_interval=10**9, log_interval=50, checkpoint_seconds=1e9
    )
    if options.steps:
        train = dataclasses.replace(train, warmup_steps=min(train.warmup_steps, options.steps // 10))
        train = dataclasses.replace(train, average_steps=min(train.average_steps, 1 + options.steps // 5))
    length = f"{options.steps} steps" if options.steps else f"{train.epochs:g} epochs"
    scale = f"{options.preset}, {length} of {train.batch_size} x {preset.model.context_length} tokens, {train.corpus}"
    path = Path(options.out) / "benchmarks" / "recipes.csv"
    table = RecipeTable(dataclasses.replace(preset, train=train), scale, path, options.data, device)
    print(compare_recipes(table))
    print(f"Every run: {path}")


def run_profile(options: argparse.Namespace, preset: Preset, device: torch.device) -> list[dict]:
    corpus = pico.choose_corpus(preset.train.corpus, preset.train.corpus_fraction, options.data)
    file = pico.prepare_tokens(corpus, "train", options.data)
    stream = pico.SequenceStream(file, preset.model.context_length, preset.train.max_sequences, preset.train.seed)
    shared = preset, stream, device, options.workers
    loaders = pico.LOADERS if options.compare else [options.loader or pico.choose_loader(stream, device)]
    contestants = [Contestant(loader, loader, *shared) for loader in loaders]
    if options.peer:
        contestants.insert(0, PlainLoop("plain loop", "naive", *shared))
    steps = options.steps or (50 if device.type == "cuda" else 4)
    measure_all(contestants, options.warmup, steps, options.repeats or (5 if options.compare else 1))

    out = Path(options.out)
    under_nsys = "NSYS_PROFILING_SESSION_ID" in os.environ  # only one profiler can listen to the GPU
    for contestant in contestants:
        path = out / f"profile_{contestant.name.replace(' ', '_')}.trace.json"
        if options.torch_profiler:
            contestant.trace(min(steps, 10), path)
            print(f"Chrome trace: {path}")
        elif device.type == "cuda" and not under_nsys:
            with tempfile.TemporaryDirectory() as folder:
                contestant.trace(min(steps, 10), Path(folder) / path.name)
    rows = describe(contestants, steps)
    print(format_table(rows))
    written = [pico.write_csv(out / "profile.csv", rows), *pico.save_figure(draw_chart(rows), out / "profile")]
    print("Written:", ", ".join(str(path) for path in written))
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = pico.default_device()
    try:
        preset = make_preset(options)
        # training draws dropout from the global generator, which is put back for whoever calls this from Python
        with pico.readable_errors(preset.train), torch.random.fork_rng([device] if device.type == "cuda" else []):
            run_recipes(options, preset, device) if options.recipes else run_profile(options, preset, device)
    except PicoError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
