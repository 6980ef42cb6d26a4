"""Measures training speed and shows where the time goes.

    python profile_training.py                        one loader, a window of steps after the warm-up
    python profile_training.py --compare --peer       all loaders and two plain loops, interleaved, medians of 5 windows
    python profile_training.py --batch-sizes 32 64 128 256  the same at several batch sizes
    python profile_training.py --torch-profiler       also Chrome traces, for chrome://tracing and ui.perfetto.dev
    python profile_training.py --recipes --steps 100  AdamW against Muon at equal tokens instead
    nsys profile -t cuda,nvtx,osrt -o optimized_profile --force-overwrite true python profile_training.py

Timelines show the ranges data, host-to-device, forward, backward and optimizer; in our loops, `forward` holds the
gradients of the output layer, too. cudaProfilerStart and cudaProfilerStop enclose what is measured, so `nsys profile
--capture-range=cudaProfilerApi --capture-range-end=stop ...` leaves compilation and warm-up out. Table and chart are
written to results/profile.csv, .png and .svg.

    tokens/s     median over the windows; the chart shows the slowest and the fastest one too
    GPU idle     1 - (time per step in which a kernel or a copy runs, in a window of its own under the PyTorch profiler)
                 / (time of a step in the windows without the profiler, as that slows the host, not the GPU)
    data wait    milliseconds per step in which the host waits for the next batch, without the copy to the GPU
    MFU          FLOPs the model needs / (seconds x peak): (6 N + 12 L T D) per token with N parameters (the output
                 projection counted, the embedding look-up not), L layers, context T, width D (PaLM, Chowdhery et al.
                 2022); the peak is the data sheet's for dense 16-bit matrices, also for a loop that computes in TF32
    of measured  the same with the rate that products of large matrices reach here, in the loop's own data type
    memory       the most that PyTorch's tensors took on the GPU in a step, without those of the other contestants
Below the table stand the shares of a step's time (of the GPU where there is one) by kind of work, see `SHARES`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import pico_helpers as pico
from pico_helpers import PicoError, Preset, flops_per_token, peak_flops, profiler_range

# -- What a trace tells


def covered(intervals: Iterable[tuple[float, float]], start: float, stop: float) -> float:
    """How much of start .. stop the intervals (begin, end) cover together."""
    total, reached = 0.0, start
    for begin, end in sorted(intervals):
        begin, end = max(begin, reached), min(end, stop)
        if end > begin:
            total, reached = total + end - begin, end
    return total


def gpu_busy(trace: dict) -> float | None:
    """Seconds of the range `window` of a Chrome trace in which a kernel or a copy ran on a GPU; None without one."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    window = next(e for e in events if e["name"] == "window" and e.get("cat") == "user_annotation")
    work = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return 1e-6 * covered(work, window["ts"], window["ts"] + window["dur"]) if work else None


SHARES = {  # kind of work: what the names of operators and kernels say; the first that fits
    "compiled kernels": r"triton_|cpp_fused",  # their names tell all operators in them
    "attention": r"attention|flash|fmha|sdpa",
    "matrix products": r"\b(mm|bmm|addmm|baddbmm|matmul|linear|mkldnn\w*)\b|gemm|cutlass|nvjet|xmma",
    "random numbers": r"bernoulli|dropout|rand|philox|distribution",
    "copies and casts": r"copy|\bto\b|clone|\bcat\b|memcpy|memset",
}


def step_shares(events: Iterable) -> dict[str, float]:
    """Shares of the time by kind of work, from a profiler's events: of the GPU's time if it did anything."""

    def kind(event, name: str) -> str:
        while event is not None:
            if event.name == "optimizer":
                return "optimizer"
            event = event.cpu_parent
        return next((kind for kind, pattern in SHARES.items() if re.search(pattern, name, re.IGNORECASE)), "rest")

    events = list(events)
    on_gpu = [(kernel.duration, kind(event, kernel.name)) for event in events for kernel in event.kernels]
    on_cpu = [(event.self_cpu_time_total, kind(event, event.name)) for event in events]
    times = dict.fromkeys([*SHARES, "optimizer", "rest"], 0.0)
    for duration, name in on_gpu or on_cpu:
        times[name] += duration
    total = sum(times.values())
    return {name: duration / total for name, duration in times.items()}


# -- Contestants


class Contestant:
    """One way to train with its own model, optimizer and loader."""

    memory = staticmethod(pico.kept_memory)  # as in `train`

    def __init__(
        self, kind: str, loader: str, preset: Preset, stream: pico.SequenceStream, device: torch.device, workers: int
    ) -> None:
        self.kind = self.name = kind
        self.loader, self.config, self.device = loader, preset.train, device
        self.made_before = 2 * workers if loader == "workers" else 0  # batches that they make ahead
        self.held_before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0  # by the others
        dtype = pico.choose_precision(self.config.precision, device)
        self.run = pico.TrainingRun(preset.model, self.config, "", device, dtype, bool(self.config.compile))
        self.batches = pico.make_loader(loader, stream, self.config.batch_size, itertools.count(), device, workers)
        self.windows: list[tuple[float, float]] = []  # (tokens per second, ms per step waiting for data)
        self.peak_memory: int | None = None  # bytes
        self.gpu_busy: float | None = None  # seconds of a step
        self.shares: dict[str, float] = {}

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
        for number in range(max(steps, 2)):
            if self.device.type == "cuda" and number < 2:
                torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
        pico.wait_for(self.device)
        if self.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(self.device) - self.held_before

    def measure(self, warmup: int, steps: int) -> None:
        """Times a window of steps. The warm-up before it also uses up the batches that workers made meanwhile."""
        with self.memory(self.device):
            for _ in range(max(warmup, self.made_before)):
                self.step()
            pico.wait_for(self.device)
            started = time.perf_counter()
            waited = sum(self.step() for _ in range(steps))
            pico.wait_for(self.device)
            seconds = time.perf_counter() - started
        tokens = steps * self.config.batch_size * self.run.model.config.context_length
        self.windows.append((tokens / seconds, 1e3 * waited / steps))

    def record(self, steps: int, path: Path) -> None:
        """Writes a Chrome trace of a window of steps; reads how long the GPU was busy and the shares of the time."""
        self.step()
        pico.wait_for(self.device)
        with torch.profiler.profile() as profiler, profiler_range("window"):
            for _ in range(steps):
                self.step()
            pico.wait_for(self.device)
        with pico.atomic_write(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        busy = gpu_busy(json.loads(path.read_text(encoding="utf-8")))
        self.gpu_busy = None if busy is None else busy / steps
        self.shares = step_shares(profiler.events())

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(speed for speed, _ in self.windows)


class PlainLoop(Contestant):
    """The loop that people start from: eager, float32 (TF32 from Ampere on), all logits at once, AdamW (with our eps).

    On a GPU of little memory it takes micro-batches.
    """

    is_best = False
    memory = staticmethod(contextlib.nullcontext)  # as it comes

    def __init__(self, kind: str, loader: str, preset: Preset, *more) -> None:
        plain = {"precision": "auto"} if self.is_best else {"precision": "fp32", "compile": False}
        super().__init__(kind, loader, preset.with_changes(plain | {"optimizer": "adamw", "loss_chunk": None}), *more)
        for block in self.run.model.blocks:
            block.attention.backward_by_products = False
        ours = self.run.optimizer.defaults
        self.run.optimizer = torch.optim.AdamW(self.run.model.parameters(), lr=ours["lr"], eps=ours["eps"])
        self.loss = pico.compile_function(self.plain_loss) if self.run.compiled else self.plain_loss
        if self.device.type == "cuda" and not self.config.micro_batch_size:
            n, memory = self.config.batch_size, torch.cuda.get_device_properties(self.device).total_memory
            logits = 4 * preset.model.context_length * preset.model.padded_vocab_size  # bytes of a sequence's, float32
            sizes = [size for size in range(1, n + 1) if n % size == 0 and 8 * size * logits <= memory]  # 8 copies
            self.config = dataclasses.replace(self.config, micro_batch_size=max(sizes, default=1))

    def plain_loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.run.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def update(self, batch: Tensor) -> None:
        micro_batches, dtype = batch.split(self.config.micro_batch_size or len(batch)), self.run.dtype
        with pico.float32_matmul("high"), pico.without_cudnn_attention():
            for micro_batch in micro_batches:
                with profiler_range("forward"), torch.autocast(batch.device.type, dtype, dtype != torch.float32):
                    loss = self.loss(micro_batch) / len(micro_batches)
                with profiler_range("backward"):
                    self.run.scaler.scale(loss).backward()
        with profiler_range("optimizer"):
            self.run.scaler.unscale_(self.run.optimizer)
            torch.nn.utils.clip_grad_norm_(self.run.model.parameters(), self.config.grad_clip)
            self.run.scaler.step(self.run.optimizer)
            self.run.scaler.update()
            self.run.optimizer.zero_grad()
        self.run.step += 1


class BestPlainLoop(PlainLoop):
    """The same with what PyTorch offers: autocast to 16 bits where that is faster, torch.compile as it comes. In bf16
    on a GPU the model's residual stream is bf16 here, too.
    """

    is_best = True


# -- Measuring and reporting


def matrix_rate(device: torch.device, dtype: torch.dtype, n: int, seconds: float = 1.0) -> float:
    """FLOP/s of the product of two n x n matrices of random numbers (zeros are faster), median over some seconds.

    Float32 is multiplied as the plain loop does it: on a GPU with TF32 if it has that; our own fp32 does without.
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    with pico.float32_matmul("high"):
        times = pico.time_calls(lambda matrix: matrix @ b, [a], seconds)
    return 2 * n**3 / (1e-3 * statistics.median(times))


def measure_all(contestants: list[Contestant], warmup: int, steps: int, repeats: int) -> None:
    """Windows of all contestants in turn, each turn led by another one, so that a drift of the machine hits all."""
    on_gpu = contestants[0].device.type == "cuda"
    with torch.cuda.profiler.profile() if on_gpu else contextlib.nullcontext():  # what nsys records
        for repeat in range(repeats):
            first = repeat % len(contestants)
            for contestant in contestants[first:] + contestants[:first]:
                contestant.measure(warmup, steps)


BASES = ("naive", "plain loop", "best plain loop")  # that the others are compared with


def describe(contestants: list[Contestant], steps: int, rates: dict[torch.dtype, float]) -> list[dict]:
    """One row for each contestant, as in the CSV. Ratios are to the contestant of the same batch size.

    `rates`: FLOP/s of large matrix products measured here, by data type.
    """
    here, rows = pico.measured_on(contestants[0].device), []
    peak = peak_flops(here["device"])
    all_speeds = {(c.kind, c.config.batch_size): c.tokens_per_second for c in contestants}
    for contestant in contestants:
        run, config, memory = contestant.run, contestant.config, contestant.peak_memory
        speeds, waits = zip(*contestant.windows, strict=True)
        speed, rate, flops = contestant.tokens_per_second, rates.get(run.dtype), flops_per_token(run.model)
        step_seconds, busy = config.batch_size * run.model_config.context_length / speed, contestant.gpu_busy
        bases = {f"ratio_to_{kind.replace(' ', '_')}": all_speeds.get((kind, config.batch_size)) for kind in BASES}
        rows.append(
            {
                "name": contestant.name,
                "tokens_per_second": round(speed, 1),
                "slowest": round(min(speeds), 1),
                "fastest": round(max(speeds), 1),
                **{name: base and round(speed / base, 3) for name, base in bases.items()},
                "gpu_idle_share": None if busy is None else round(max(0.0, 1 - busy / step_seconds), 4),
                "data_wait_ms": round(statistics.median(waits), 3),
                "mfu": peak and round(speed * flops / peak, 4),
                "mfu_of_measured_rate": rate and round(speed * flops / rate, 4),
                "measured_tflops": rate and round(rate / 1e12, 3),
                "peak_memory_mb": memory and round(memory / 1e6, 1),
                **{f"share: {kind}": round(share, 3) for kind, share in contestant.shares.items()},
                "flops_per_token": flops,
                "precision": str(run.dtype)[6:],
                "compiled": run.compiled,
                **{name: getattr(config, name) for name in ("batch_size", "micro_batch_size", "loss_chunk")},
                **{name: getattr(run.model_config, name) for name in ("context_length", "dropout")},
                "steps": steps,
                "windows": len(contestant.windows),
                **here,
            }
        )
    return rows


def format_table(rows: list[dict]) -> str:
    """The rows as text. A missing number says why it is missing."""
    first, table, lines = rows[0], pd.DataFrame(index=[row["name"] for row in rows]), []
    columns = {  # heading: column, form, what stands for a missing number
        "tokens/s": ("tokens_per_second", "{:,.0f}", "-"),
        "to naive": ("ratio_to_naive", "{:.2f}x", "-"),
        "to plain loop": ("ratio_to_plain_loop", "{:.2f}x", "-"),
        "to best plain loop": ("ratio_to_best_plain_loop", "{:.2f}x", "-"),
        "GPU idle": ("gpu_idle_share", "{:.1%}", "no GPU" if first["device"].startswith("CPU") else "not traced"),
        "data wait": ("data_wait_ms", "{:.2f} ms", "-"),
        "MFU": ("mfu", "{:.1%}", "peak unknown"),
        "of measured": ("mfu_of_measured_rate", "{:.1%}", "-"),
        "memory": ("peak_memory_mb", "{:,.0f} MB", "-"),
    }
    for heading, (column, form, missing) in columns.items():
        table[heading] = [missing if row[column] is None else form.format(row[column]) for row in rows]
    for row in rows:
        shares = {name.removeprefix("share: "): share for name, share in row.items() if name.startswith("share: ")}
        largest = sorted(shares.items(), key=lambda item: -item[1])
        lines.append(f"{row['name']}: " + ", ".join(f"{name} {share:.0%}" for name, share in largest if share))
    about = f"{first['device']}; median of windows of {first['steps']} steps: {first['windows']}"
    return "\n".join(
        [about, table.loc[:, (table != "-").any()].add_prefix(" ").to_string(), *(lines if shares else [])]
    )


def draw_chart(rows: list[dict]) -> Figure:
    """Bars of tokens per second with the range over the windows and the ratio to the plain loop, or to `naive`."""
    frame, first = pd.DataFrame(rows), rows[0]
    sizes = "/".join(str(size) for size in sorted(set(frame["batch_size"])))
    title = f"{first['device']}: {sizes} x {first['context_length']} tokens a step"
    figure, axes = pico.new_figure(7, 0.7 + 0.5 * len(rows), title)
    speeds = frame["tokens_per_second"]
    spread = [speeds - frame["slowest"], frame["fastest"] - speeds]
    bars = axes.barh(frame["name"], speeds, xerr=spread, color="#0072B2", ecolor="#333333", capsize=3)
    key = "ratio_to_plain_loop" if frame["ratio_to_plain_loop"].any() else "ratio_to_naive"
    ratios = frame[key].astype(float)  # if all are 1, each is its own base
    ratios = [f" ({ratio:.2f}x)" if ratio > 0 and ratios.nunique() > 1 else "" for ratio in ratios]
    labels = [f"{speed:,.0f}{ratio}" for speed, ratio in zip(speeds, ratios, strict=True)]
    axes.bar_label(bars, labels, padding=6, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    pico.tidy_axes(axes, xlabel="training tokens per second (line: slowest to fastest window)", xmargin=0.25)
    return figure


# -- Recipes


def run_recipes(options: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """AdamW against Muon at equal tokens, four rates each, Muon's around the preset's, with every seed.

    Prints the validation losses, the best first. Every run is a row of recipes.csv as soon as it has ended.
    """
    steps, path, rows = options.steps or preset.train.max_steps, Path(options.out) / "recipes.csv", []
    earlier = pd.read_csv(path).to_dict("records") if path.exists() else []
    changes = {"max_steps": steps, "eval_interval": 10**9, "log_interval": 50, "checkpoint_seconds": 1e9}
    changes |= {"warmup_steps": min(preset.train.warmup_steps, steps // 10)} if steps else {}
    # where Muon takes the matrices, AdamW's rate is the embedding's, which alone bears a higher one
    grid = [("adamw", "learning_rate", rate) for rate in (7.5e-4, 1.5e-3, 3e-3, 6e-3)]
    grid += [("muon", name := "matrix_learning_rate", x * getattr(preset.train, name)) for x in (0.25, 0.5, 1, 2)]
    for seed, (optimizer, name, rate) in itertools.product(range(options.seeds), grid):
        run = preset.with_changes(changes | {"optimizer": optimizer, name: rate, "seed": seed})
        row = {"optimizer": optimizer, "rate": rate, "seed": seed, "val_loss": float("inf")}
        try:
            with tempfile.TemporaryDirectory() as folder:
                result = pico.train(run.model, run.train, folder, options.data, device=device)
            if not result.finished:
                raise KeyboardInterrupt
            row |= {name: result.metrics[-1][name] for name in ("val_loss", "train_loss", "tokens", "seconds")}
        except PicoError as error:  # a rate that is far too high is a result as well
            if "exploded" not in str(error):
                raise
        rows.append(row | {"preset": options.preset, "dropout": run.model.dropout} | pico.measured_on(device))
        pico.write_csv(path, [*earlier, *rows])
    losses = pd.DataFrame(rows).groupby(["optimizer", "rate"])["val_loss"].agg(["mean", "min", "max"])
    print(f"Validation loss, {options.seeds} seeds (every run: {path}):", losses.sort_values("mean").round(4), sep="\n")


# -- Command line


def count(text: str) -> int:
    """A type of numbers from 1 on, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--preset", choices=list(pico.PRESETS), default=pico.default_preset())
    add("--loader", choices=pico.LOADERS, help="default: what `train` would choose")
    add("--compare", action="store_true", help="all loaders, interleaved")
    add("--peer", action="store_true", help="also a plain loop in float32 and the best plain one")
    add("--torch-profiler", action="store_true", help="write a Chrome trace of each contestant")
    add("--measure-peak", action=argparse.BooleanOptionalAction, default=True, help="rate of large matrix products")
    add("--recipes", action="store_true", help="compare optimizers instead; --steps is a run's length")
    add("--seeds", type=count, default=3, help="of each setting with --recipes (%(default)s)")
    add("--context-length", type=count, help="tokens per sequence, default: the preset's")
    add("--dropout", type=float, help="default: the preset's")
    add("--steps", type=count, help=f"of a window, default {50 if has_gpu else 4}")
    add("--warmup", type=int, default=10 if has_gpu else 1, help="steps before a window (%(default)s)")
    add("--repeats", type=count, help="windows of each contestant, default 5, with a single one 1")
    add("--batch-sizes", type=count, nargs="+", help="sequences per step, default: the preset's")
    add("--micro-batch-size", type=count, help="sequences per forward pass, default: all of them")
    add("--loss-chunk", type=count, help="rows (on a CPU: words) of logits at a time, default: by device")
    add("--workers", type=count, default=2, help="processes of the loader `workers` (%(default)s)")
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: where a compiler works")
    add("--corpus", default="offline", help="as in TrainConfig (%(default)s)")
    add("--out", default="results", help="folder for table and chart (%(default)s)")
    add("--data", default="data", help="folder for token files (%(default)s)")
    return parser.parse_args(arguments)


def start_all(
    options: argparse.Namespace, preset: Preset, corpus: pico.Corpus, device: torch.device
) -> list[Contestant]:
    """The contestants that the options ask for, warmed up. Raises PicoError when memory suffices for none."""
    file = pico.prepare_tokens(corpus, "train", options.data)
    stream = pico.SequenceStream(file, preset.model.context_length, preset.train.max_sequences, preset.train.seed)
    loaders = pico.LOADERS if options.compare else [options.loader or pico.choose_loader(stream, device)]
    kinds = [(PlainLoop, "plain loop", "naive"), (BestPlainLoop, "best plain loop", "naive")] if options.peer else []
    kinds += [(Contestant, loader, loader) for loader in loaders]
    flops = 0.0 if preset.train.max_steps else float("inf")  # as `train` would: a preset of few steps is not compiled
    preset = preset.with_changes({"compile": pico.choose_compile(preset.train.compile, device, flops)})
    contestants, sizes = [], dict.fromkeys(options.batch_sizes or [preset.train.batch_size])
    for size, (kind, name, loader) in itertools.product(sizes, kinds):
        try:
            sized = preset.with_changes({"batch_size": size})
            with pico.readable_errors(sized.train):
                contestant = kind(name, loader, sized, stream, device, options.workers)
                contestant.warm_up(options.warmup)
            contestant.name += f", batch {size}" if len(sizes) > 1 else ""
            contestants.append(contestant)
        except PicoError as error:
            print(f"{name}, batch {size}: left out. {error}")
        contestant = None  # one that ran out of memory is gone for good
        gc.collect()
        torch.cuda.empty_cache()
    if not contestants:
        raise PicoError("Nothing could be measured; the lines above say why.")
    return contestants


def run_profile(options: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    train, on_gpu, out = preset.train, device.type == "cuda", Path(options.out)
    corpus = pico.choose_corpus(train.corpus, train.corpus_fraction, options.data, train.text_style)
    print(f"Corpus: {corpus.about}.")
    if not on_gpu:  # names the compiled kernels in its traces
        torch._inductor.config.cpp.enable_kernel_profile = True
    contestants, steps, rates = start_all(options, preset, corpus, device), options.steps or (50 if on_gpu else 4), {}
    if options.measure_peak:  # between the warm-up and the windows, so under the same conditions
        size = 8192 if on_gpu else 2048
        rates = {dtype: matrix_rate(device, dtype, size) for dtype in {c.run.dtype for c in contestants}}
    measure_all(contestants, options.warmup, steps, options.repeats or (5 if len(contestants) > 1 else 1))
    columns = {"preset": options.preset, "corpus": corpus.name}
    # again with what the traces tell; should they fail or take too long, the speeds are kept
    pico.write_csv(out / "profile.csv", [row | columns for row in describe(contestants, steps, rates)])
    with tempfile.TemporaryDirectory() as folder:
        for contestant in contestants:
            file = f"profile_{re.sub('[, ]+', '_', contestant.name)}.trace.json"
            if options.torch_profiler:
                contestant.record(min(steps, 10), out / file)
                print(f"Chrome trace: {out / file}")
            elif "NSYS_PROFILING_SESSION_ID" not in os.environ:  # only one profiler can listen to the GPU
                contestant.record(min(steps, 10 if on_gpu else 1), Path(folder) / file)
    rows = [row | columns for row in describe(contestants, steps, rates)]
    print(format_table(rows))
    written = [pico.write_csv(out / "profile.csv", rows), *pico.save_figure(draw_chart(rows), out / "profile")]
    print("Written:", ", ".join(str(path) for path in written))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = pico.default_device()
    settings = ("corpus", "precision", "compile", "micro_batch_size", "loss_chunk", "context_length", "dropout")
    given = {name: getattr(options, name) for name in settings if getattr(options, name) is not None}
    given |= {"batch_size": options.batch_sizes[0]} if options.batch_sizes else {}
    try:
        preset = pico.get_preset(options.preset).with_changes(given)
        pico.check_writable(options.out)
        # training draws dropout from the global generator, which is put back for whoever calls this from Python
        with pico.readable_errors(preset.train), torch.random.fork_rng([device] if device.type == "cuda" else []):
            run_recipes(options, preset, device) if options.recipes else run_profile(options, preset, device)
    except PicoError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted." + " Recipes that had ended are in recipes.csv." * options.recipes)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
