"""The menu and the command line: what is asked, what a typo does, what is written and what is said of it."""

import dataclasses
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from study_data import make_language

import pico_helpers as pico

ROOT = Path(__file__).parent.parent
TINY = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_ff": 32, "context_length": 32, "max_positions": 64}
RUN = {"max_steps": 20, "batch_size": 4, "eval_interval": 20, "learning_rate": 2e-3, "checkpoint_seconds": 0.0}
NOTE = "Made-up lines, in nobody's ownership."


def train_tiny(results: Path, data_folder: Path, corpus: Path, **changes) -> Path:
    return pico.run_training("tiny", results, data_folder, **TINY | RUN | {"corpus": str(corpus)} | changes)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_folder, data_folder) -> Path:
    return train_tiny(tmp_path_factory.mktemp("trained"), data_folder, corpus_folder)


@pytest.fixture(scope="module")
def short_study():
    """The study of one sentence, its linguistic tests made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pico, "ALL_TEST_CATEGORIES", {"Simple": ["The cat sat."]})
        patch.setattr(pico, "study_language", lambda *args, **options: make_language(trained=False))
        yield


@pytest.fixture(scope="module")
def published(short_study, trained, data_folder, tmp_path_factory) -> Path:
    """What `publish` writes where another model was published before, beside files that are none of its business."""
    folder = tmp_path_factory.mktemp("project") / "results" / "pretrained"
    (folder / "attention").mkdir(parents=True)
    mine = {folder / "my_metrics.csv", folder / "attention/my_thesis.tex"}
    for path in (*mine, folder / "other_heads.csv"):
        path.write_text("mine\n")
    saved = pico.load_checkpoint(trained)
    other = dataclasses.replace(saved, train_config=dataclasses.replace(saved.train_config, name="other"))
    pico.save_checkpoint(folder / "pico_llm.pt", other)
    files = pico.publish(trained, folder, NOTE, data_folder=data_folder)
    pictures = set(folder.rglob("*.svg"))  # listed by their PNG
    assert {path for path in folder.rglob("*") if path.is_file()} == {*files, *mine, *pictures}
    return folder


@pytest.fixture
def menu(monkeypatch, tmp_path) -> tuple:
    """A function that types texts, and what the menu has done: ("train", whether with a study) or the studied path."""
    done = []

    def typing(*texts: str) -> None:
        monkeypatch.setattr("builtins.input", Mock(side_effect=texts))

    made, study = [tmp_path / "pico_llm_new.pt"], 3  # which of the arguments it is
    monkeypatch.setattr(pico, "is_unattended", lambda: False)
    monkeypatch.setattr(pico, "run_training", lambda *args: done.append(("train", args[study] is not None)) or made)
    monkeypatch.setattr(pico, "run_analysis", lambda path, *args, **options: done.append(path) or [])
    return typing, done


@pytest.mark.parametrize(("typed", "study"), [("1", False), (" 3 ", True), ("", True)])
def test_a_choice_is_taken_at_the_keyboard_and_from_the_variable(menu, tmp_path, monkeypatch, typed, study):
    typing, done = menu
    typing(typed)  # and then nothing
    assert pico.main_menu(results=tmp_path)[0] == tmp_path / "pico_llm_new.pt"
    monkeypatch.setattr(pico, "is_unattended", lambda: True)
    monkeypatch.setenv("PICO_MENU", typed)
    pico.main_menu(results=tmp_path)
    assert done == [("train", study)] * 2


def test_a_typo_and_a_wrong_path_are_asked_again(menu, trained, tmp_path, monkeypatch, capsys):
    typing, done = menu
    monkeypatch.chdir(tmp_path)  # whose `results` hold no models
    newest = pico.save_checkpoint(tmp_path / "pico_llm_a.pt", pico.load_checkpoint(trained))
    (tmp_path / "text.pt").write_text("no model")
    typing("4", "trian", "2", "no-such.pt", str(tmp_path / "text.pt"), str(trained))
    assert pico.main_menu(results=tmp_path)[0] == trained
    lines = capsys.readouterr().out.splitlines()
    for line, problem in zip(lines, ("'4'; choose", "'trian'; choose", "no checkpoint", "not a Pico-LLM"), strict=True):
        assert problem in line
    typing("2", "")
    assert pico.main_menu(results=tmp_path)[0] == newest and done == [trained, newest]
    monkeypatch.setattr(pico, "SHIPPED_CHECKPOINT", tmp_path / "elsewhere.pt")
    typing("2", "")
    with pytest.raises(pico.PicoError, match=r"train one first \(menu choice 1 or 3"):
        pico.main_menu(results=tmp_path / "empty")
    monkeypatch.setattr(pico, "is_unattended", lambda: True)
    monkeypatch.setenv("PICO_MENU", "7")
    with pytest.raises(pico.PicoError, match="Unknown choice '7'; choose one of: 1, 2, 3"):
        pico.main_menu()


def test_newcomers_study_what_is_shipped_elsewhere(published, data_folder, monkeypatch, capsys, corpus_folder):
    """`published` lies where a copy of the project has it; its training corpus is not on this machine."""
    monkeypatch.chdir(published.parent.parent)
    monkeypatch.setattr(pico, "SHIPPED_CHECKPOINT", published / "pico_llm.pt")
    monkeypatch.setenv("PICO_MENU", "2")
    before = {path: path.stat().st_mtime_ns for path in published.rglob("*")}
    checkpoint, files = pico.main_menu("tiny", results=published.parent, data_folder=data_folder)  # as the notebook
    output = capsys.readouterr().out
    assert checkpoint == published / "pico_llm.pt" and re.search(r"^\.png +\d+ files in ", output, re.MULTILINE)
    assert f"Analyzing {checkpoint}, trained on {20 * 4 * 32:,} tokens" in output
    assert f"is out of reach, so other text stands in. No corpus or folder './{corpus_folder.name}'" in output
    assert files and all(path.is_file() and published not in path.parents for path in files)
    assert {path.name for path in files} >= {"head_emergence.png", "loss_curve.png"}, "what the notebook shows"
    assert {path: path.stat().st_mtime_ns for path in published.rglob("*")} == before


def test_bad_sentences_are_left_out_and_named(tiny_model, capsys):
    sentences = {"Mine": ["A good one.", "", "word " * 100], "One": "Not a list.", "Bad": ["Two words"]}
    captures = pico.capture_sentences(tiny_model, sentences)
    found = {name: [capture.text for capture in members] for name, members in captures.items()}
    assert found == {"Mine": ["A good one."], "One": ["Not a list."]}
    output = capsys.readouterr().out
    assert output.count("Left out of 'Mine'") == 2 and "'Two words' has fewer than three tokens" in output
    with pytest.raises(pico.PicoError, match="None of the sentences"):
        pico.capture_sentences(tiny_model, {"Mine": ["", None]})


def test_a_model_whose_corpus_is_gone_is_studied_on_another(monkeypatch, tmp_path, corpus_folder, trained, capsys):
    config = pico.TrainConfig(corpus="/gone/corpus")
    checkpoint = dataclasses.replace(pico.load_checkpoint(trained), train_config=config)
    about, training, validation = pico.open_corpus(checkpoint, data_folder=tmp_path)
    few = dataclasses.replace(validation, tokens=validation.tokens[:40])  # a small corpus holds little text out
    assert pico.study_windows(few, checkpoint.model_config).shape == (1, 32)
    assert pico.study_windows(few, pico.ModelConfig()).shape == (1, 39)
    assert about.endswith("not WikiText-103; the model was trained on another corpus, which may share articles with it")
    assert len(training.tokens) > 1e6
    assert "No corpus or folder '/gone/corpus'" in capsys.readouterr().out
    assert f"folder {corpus_folder.name} (" in pico.open_corpus(checkpoint, str(corpus_folder), tmp_path)[0]
    with pytest.raises(pico.PicoError, match="No corpus or folder 'nowhere'"):
        pico.open_corpus(checkpoint, "nowhere", tmp_path)
    monkeypatch.setattr(pico, "study_model", lambda *args, **options: pytest.fail("studied first"))
    with pytest.raises(pico.PicoError, match="cannot be called 'Model'"):
        pico.run_analysis(trained, {"Model": ["A good one."]}, tmp_path, data_folder=tmp_path)
    with pytest.raises(pico.PicoError, match="Choose another folder"):  # that is found out before the study
        pico.run_analysis(trained, results=trained / "results")


def test_the_rows_of_heads_are_their_scores_on_the_way(trained, corpus_folder, data_folder):
    rows = pico.read_head_rows(trained.with_name("tiny_heads.csv"), 20 * 4 * 32)
    assert len(rows) == 4 * len(pico.snapshot_steps(20))
    corpus, model = pico.choose_corpus(str(corpus_folder)), pico.load_model(trained)
    training, validation = (pico.prepare_tokens(corpus, split, data_folder) for split in ("train", "validation"))
    counts, windows = pico.token_counts(training), pico.study_windows(validation, model.config)
    for step, scored in ((0, pico.PicoLLM(model.config)), (20, model)):
        expected = pico.score_heads(scored, idx=windows, token_counts=counts).to_dict("records")
        for row, head in zip([row for row in rows if row["step"] == step], expected, strict=True):
            assert row["class"] == head["class"] and row["tokens"] == step * 4 * 32
            for name in ("layer", "head", *pico.HEAD_SCORES):
                assert row[name] == pytest.approx(head[name], abs=1e-3), name


def test_a_resumed_run_continues_its_rows(trained, corpus_folder, data_folder, tmp_path, interrupt):
    interrupt(6)
    stopped = train_tiny(tmp_path, data_folder, corpus_folder)
    partial = pico.run_files(tmp_path, "tiny.partial")
    rows = pico.read_head_rows(partial.heads, 20 * 4 * 32)
    assert stopped == partial.model and rows[-1]["step"] == 5
    pico.write_csv(partial.heads, [*rows, rows[-1] | {"step": 7, "tokens": 7 * 4 * 32}])  # lost with the process
    model = train_tiny(tmp_path, data_folder, corpus_folder)
    heads, saved = tmp_path / "tiny_heads.csv", pico.load_checkpoint(model)
    assert heads.read_text() == trained.with_name("tiny_heads.csv").read_text()
    assert pico.head_history(model, saved) == pico.read_head_rows(heads, 20 * 4 * 32)
    pico.write_csv(heads, rows)  # of another run
    assert pico.head_history(model, saved) == []
    heads.unlink()
    assert pico.head_history(model, saved) == []


def test_a_run_from_a_model_continues_its_rows(trained, corpus_folder, data_folder, tmp_path, interrupt, monkeypatch):
    """Of an unfinished run of its name, with another context, it takes nothing. Published, it tells no folder."""
    changes = RUN | {"init_from": str(trained), "corpus": str(corpus_folder), "name": "second", "max_steps": 3}
    interrupt(1)
    other = pico.run_training("tiny", tmp_path, data_folder, **changes | {"context_length": 16})[0]
    assert other.name == "pico_llm_second.partial.pt"
    second = pico.run_training("tiny", tmp_path, data_folder, **changes)[0]
    saved, first = pico.load_checkpoint(second), pico.load_checkpoint(trained)
    assert saved.model_config == first.model_config, "its context is that of the model"
    rows, before = pico.head_history(second, saved), pico.head_history(trained, first)
    assert [row for row in rows if row["tokens"] < 20 * 4 * 32] == [row for row in before if row["step"] < 20]
    assert sorted({row["tokens"] for row in rows[len(before) - 4 :]}) == [(20 + n) * 4 * 32 for n in range(4)]
    monkeypatch.setattr(pico, "run_analysis", lambda *_, **__: [])
    monkeypatch.setattr(pico, "model_card", lambda *_: "# Pico-LLM, ")
    config = pico.load_checkpoint(pico.publish(second, tmp_path / "published")[1]).train_config
    assert (config.init_from, config.corpus) == (trained.name, f"./{corpus_folder.name}"), "names alone"


def test_publish_writes_the_model_its_study_and_a_card_that_says_what_these_say(published, trained, corpus_folder):
    saved, shipped = pico.load_checkpoint(trained), pico.load_checkpoint(published / "pico_llm.pt")
    assert shipped.training_state is None and (shipped.metrics, shipped.step) == (saved.metrics, saved.step)
    assert all(torch.equal(shipped.weights[name], value.half()) for name, value in saved.weights.items())
    assert (published / "pico_llm.pt").stat().st_size < 0.55 * trained.stat().st_size
    for name in ("tiny_metrics.csv", "tiny_heads.csv"):
        assert (published / name).read_text() == trained.with_name(name).read_text()
    names = "findings.json attention_report.html head_scores.csv attention/model/head_emergence.png"
    assert all((published / name).exists() for name in names.split())
    assert pico.REPEATED_TEXTS[0] in (published / "attention_explorer.html").read_text()
    assert shipped.train_config.corpus == f"./{corpus_folder.name}", "never the name of a corpus of ours"
    assert str(corpus_folder.parent).encode() not in (published / "pico_llm.pt").read_bytes()
    findings = json.loads((published / "findings.json").read_text())
    assert findings["about"]["Held-out text"] == saved.corpus, "it is studied on its own text"
    card, saved = (published / "README.md").read_text(), shipped
    rows = ["step | 20 |\n| tokens | 2,560", "batch size | 4", "learning rate | 0.002", f"torch | {torch.__version__}"]
    rows += [f"val loss | {saved.metrics[-1]['val_loss']:.6g}"]
    facts = [*(f"| {row} |" for row in rows), *findings["headline"], NOTE, "1,622,880 with them:\n2 layers of 2 heads"]
    facts += [f"Trained on the parquet folder {corpus_folder.name} (100% of its training rows"]
    facts += ['pico.load_model("pretrained/pico_llm.pt")']
    facts += ["python pico_helpers.py publish --checkpoint results/pico_llm_tiny.pt --out pretrained"]
    assert not [fact for fact in facts if fact not in card]
    absent = ("WikiText", "Wikipedia", "mfu", "None", "nan", str(corpus_folder.parent), "{")
    assert not [word for word in absent if word in card]
    card = pico.model_card(dataclasses.replace(saved, metrics=[]), published, "", published)
    assert "does not say where that text is from" in card and "val loss" not in card
    config = dataclasses.replace(saved.train_config, corpus="own/offline")  # a folder of that name is no Wikipedia
    for about, is_wikipedia in ((saved.corpus, False), (pico.choose_corpus("offline").about, True)):
        card = pico.model_card(dataclasses.replace(saved, train_config=config, corpus=about), published, "", published)
        assert ("by the contributors of English Wikipedia, CC BY-SA" in card) == is_wikipedia


def test_the_command_on_the_card_gives_the_same_settings(published, monkeypatch):
    (line,) = [line for line in (published / "README.md").read_text().splitlines() if "pico_helpers.py train" in line]
    saved, train = pico.load_checkpoint(published / "pico_llm.pt"), Mock(side_effect=pico.PicoError("That is enough."))
    monkeypatch.setattr(pico, "train", train)
    monkeypatch.setattr(pico, "choose_corpus", lambda *args: None)
    monkeypatch.chdir(published.parent)  # the card's folder is relative
    assert pico.main(shlex.split(line)[2:]) == 2
    assert train.call_args.args[:2] == (saved.model_config, saved.train_config)
    assert pico.main([*shlex.split(line)[2:], "--seed", "7", "--dropout", "0.5"]) == 2
    model, run = train.call_args.args[:2]
    assert (run.seed, model.dropout, model.d_model) == (7, 0.5, 32)
    names = ["max_sequences", "max_steps", "micro_batch_size", "loss_chunk", "corpus_fraction", "init_from"]
    options = itertools.chain(*((f"--{name.replace('_', '-')}", "None") for name in names))
    assert pico.main([*shlex.split(line)[2:], *options]) == 2
    assert {getattr(train.call_args.args[1], name) for name in names} == {None}


def test_what_cannot_be_published_changes_nothing(trained, published, short_study, tmp_path, data_folder, monkeypatch):
    saved, out = pico.load_checkpoint(trained), tmp_path / "out"
    path = pico.save_checkpoint(tmp_path / "a.pt", dataclasses.replace(saved, training_state={"optimizer": {}}))
    with pytest.raises(pico.PicoError, match="is an unfinished run"):
        pico.publish(path, out)
    assert not out.exists()
    with pytest.raises(pico.PicoError, match="holds other files"):
        pico.publish(trained, trained.parent)
    out.mkdir()
    for name, problem in (("README.md", "holds other files"), ("pico_llm.pt", "is not a Pico-LLM checkpoint")):
        (out / name).write_text("# My thesis\n")
        with pytest.raises(pico.PicoError, match=problem):
            pico.publish(trained, out)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "# My thesis\n"
        (out / name).unlink()
    shutil.copytree(published, out, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(pico, "draw_study", Mock(side_effect=KeyboardInterrupt))  # after minutes
    with pytest.raises(KeyboardInterrupt):
        pico.publish(trained, out, data_folder=data_folder)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_command_line_trains_explores_and_generates(tmp_path, corpus_folder, capsys):
    results = tmp_path / "results"

    def run(*arguments: str) -> str:
        assert pico.main([*arguments, "--results", str(results)]) == 0
        return capsys.readouterr().out

    options = ["--corpus", str(corpus_folder), "--max-steps", "3", "--learning-rate", "0.002"]
    output = run("train", "--preset", "tiny", *options, "--data-folder", str(tmp_path / "data"))
    assert "Corpus: the parquet folder" in output and "A sample: 'The history of" in output
    assert f".pt   pico_llm_tiny.pt in {results}\n.csv  tiny_metrics.csv, tiny_heads.csv in {results}" in output
    assert pico.load_checkpoint(results / "pico_llm_tiny.pt").train_config.learning_rate == 0.002
    command = [sys.executable, "pico_helpers.py", "generate", "One " * 99, "--max-new-tokens", "5"]
    done = subprocess.run([*command, "--results", str(results)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("One One")
    model, prompt = done.stderr.splitlines()
    assert model == f"Model: {results / 'pico_llm_tiny.pt'} (layers x heads: 2 x 2)"
    assert prompt == "The prompt has 100 tokens; only the last 48 are read.", "three quarters of 64"
    page = results / "my_explorer.html"
    assert run("explore", "A very long journey.", "Another <b>one</b>.") == f".html my_explorer.html in {results}\n"
    assert "A very long journey." in page.read_text() and "Another <b>one" not in page.read_text()
    assert "<p>Model: pico_llm_tiny.pt</p>" in page.read_text()
    pico.explore("A single sentence.", results=results)
    assert page.read_text().count("<option>") == 1
    assert pico.main(["explore", "My", "own", "sentence.", "--results", str(results)]) == 0  # without quotes
    assert "<option>My own sentence.</option>" in page.read_text() and page.read_text().count("<option>") == 1
    assert 'taken as one sentence; put each sentence in quotes: "My own sentence."' in capsys.readouterr().err
    run("explore", "Stop.", "Go.")
    assert page.read_text().count("<option>") == 2


def test_another_folder_for_the_files_does_not_change_the_model(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = pico.load_checkpoint(trained)
    own, newer = Path("results/pico_llm_own.pt"), Path("out/pico_llm_newer.pt")
    for model in (own, newer):
        pico.save_checkpoint(model, saved)
        assert pico.main(["explore", "A good sentence.", "--out", "out"]) == 0
        assert f"Model: {model} (layers" in capsys.readouterr().err
    assert pico.main(["generate", "A", "--max-new-tokens", "1", "--results", "results"]) == 0
    assert f"Model: {own} (layers" in capsys.readouterr().err, "here the folder is that of the models"


def test_a_stop_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(pico._COMMANDS, "analyze", (Mock(side_effect=KeyboardInterrupt), "Study.", ""))
    assert pico.main(["analyze", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().startswith("Stopped early; files that were finished by then stay")


def test_wrong_options_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for arguments, message in (
        ([], "the following arguments are required: COMMAND"),
        (["train", "--preset", "huge"], "Unknown preset 'huge'; choose one of: wikitext103, quick"),
        (["train", "--preset", "README.md.pt"], "There is no checkpoint README.md.pt"),
        (["train", "--corpus", "nowhere"], "No corpus or folder 'nowhere'"),
        (["train", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["train", "--max-steps", "x"], "argument --max-steps: invalid int value: 'x'"),
        (["train", "--betas", "0.9"], "argument --betas: expected 2 arguments"),
        (["train", "--vocab-size", "1000"], "unrecognized arguments: --vocab-size"),
        (["train", "--n-layer", "0"], "n_layer must be"),
        (["analyze", "--checkpoint", "README.md"], "README.md "),
        (["analyze", "--checkpoint", "~nobody.pt"], "There is no checkpoint ~nobody.pt"),
        (["train", "--corpus", "~nobody"], "No corpus or folder '~nobody'"),
        (["explore", ""], "The sentence is empty"),
        (["explore", "A good one.", "word " * 600], "The sentence has 601 tokens; the model reads 512"),
        (["generate", "A", "--temperature", "-1"], "Generation needs"),
        (["generate", "A", "--seed", "99999999999999999999"], "Generation needs whole numbers"),
        (["publish", "--checkpoint", "results"], "There is no checkpoint results; it is a folder, name a .pt file"),
        (["analyze", "--corpus", "README.md"], "No corpus or folder 'README.md', only a file; choose"),
        (["export", "--results", "README.md"], "README.md is a file, not a folder"),
    ):
        try:
            status = pico.main([*arguments[:1], *(["--results", str(tmp_path)] if arguments else []), *arguments[1:]])
        except SystemExit as error:  # argparse's way
            status = error.code
        shown, output = capsys.readouterr()
        output = re.sub(r"\AModel: .*\n", "", output)
        assert status == 2 and output.count("\n") == 1 and (arguments[:1] != ["generate"] or not shown), arguments
        assert output.startswith(f"Error: {message}") or f"error: {message}" in output
        assert not list(tmp_path.iterdir())


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        pico.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--n-layer INT" in text and "--betas FLOAT FLOAT" in text and "In brackets are values of preset" in text
    assert "sequences per step [8]" in text
    assert " INT [" not in text and " FLOAT [" not in text and " STR [" not in text, "a setting without a word of help"
