"""The menu and the command line: what is asked, what a typo does, what is written and what is said of it."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from study_data import make_language

import pico_helpers as pico
from pico_helpers import PicoError

ROOT = Path(__file__).parent.parent
TINY = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_ff": 32, "context_length": 32, "max_positions": 64}
RUN = {"max_steps": 20, "batch_size": 4, "eval_interval": 20, "learning_rate": 2e-3, "checkpoint_seconds": 0.0}
NOTE = "Made-up lines, in nobody's ownership."


def train_tiny(results: Path, data_folder: Path, corpus: Path) -> pico.TrainResult:
    return pico.run_training("tiny", results, data_folder, corpus=str(corpus), **TINY, **RUN)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_folder, data_folder) -> pico.TrainResult:
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
    saved = pico.load_checkpoint(trained.checkpoint)
    other = dataclasses.replace(saved, train_config=dataclasses.replace(saved.train_config, name="other"))
    pico.save_checkpoint(folder / "pico_llm.pt", other)
    files = pico.publish(trained.checkpoint, folder, data_folder, data_note=NOTE)
    pictures = set(folder.rglob("*.svg"))  # listed by their PNG
    assert {path for path in folder.rglob("*") if path.is_file()} == {*files, *mine, *pictures}
    return folder


@pytest.fixture
def typing(monkeypatch):
    """Somebody is there, who types `typing(...)`: texts, or what input() raises."""

    def type_in(*texts: str | Exception) -> None:
        remaining = list(texts)

        def ask(prompt: str) -> str:
            answer = remaining.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr("builtins.input", ask)

    monkeypatch.setattr(pico, "is_unattended", lambda: False)
    return type_in


# --- the menu ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "expected"), [("1", "train"), (" 2 ", "analyze"), ("Both", "both"), ("", "both"), ("train", "train")]
)
def test_a_choice_is_taken_at_the_keyboard_and_from_the_variable(typing, monkeypatch, typed, expected):
    typing(typed)  # and then nothing
    assert pico.ask_choice() == expected
    monkeypatch.setattr(pico, "is_unattended", lambda: True)
    monkeypatch.setenv("PICO_MENU", typed)
    assert pico.ask_choice() == expected


def test_a_typo_is_asked_again_and_nobody_there_means_both(typing, monkeypatch, capsys):
    typing("4", "trian", "1 2", "2")
    assert pico.ask_choice() == "analyze"
    output = capsys.readouterr().out
    assert all(f"{typo!r} is not on the menu; choose 1 (train)" in output for typo in ("4", "trian", "1 2"))
    typing(EOFError(), NotImplementedError())
    assert pico.ask_choice() == pico.ask_choice() == "both"
    monkeypatch.setattr(pico, "is_unattended", lambda: True)
    monkeypatch.setenv("PICO_MENU", "7")
    with pytest.raises(PicoError, match=r"'7' is not on the menu; choose 1 \(train\)"):
        pico.ask_choice()


def test_the_path_of_the_model_is_asked_until_it_is_good(typing, trained, tmp_path, monkeypatch, capsys):
    default = pico.save_checkpoint(tmp_path / "pico_llm_a.pt", pico.load_checkpoint(trained.checkpoint))
    typing("")
    assert pico.ask_checkpoint(tmp_path) == default
    (tmp_path / "text.pt").write_text("no model")
    wrong = ("no-such.pt", str(tmp_path), str(tmp_path / "text.pt"))
    typing(*wrong, str(trained.checkpoint))
    assert pico.ask_checkpoint(tmp_path) == trained.checkpoint
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "There is no checkpoint" in lines[0] and "is not a Pico-LLM checkpoint" in lines[2]
    monkeypatch.setattr(pico, "__file__", str(tmp_path / "elsewhere" / "pico_helpers.py"))
    typing("2", "")
    with pytest.raises(PicoError, match=r"train one first \(menu choice 1 or 3"):
        pico.main_menu(results=tmp_path / "empty")


def test_a_newcomer_studies_the_shipped_model_into_a_folder_of_their_own(
    published, short_study, data_folder, monkeypatch, capsys, corpus_folder
):
    """`published` lies where a copy of the project has it; its training corpus is not on this machine."""
    monkeypatch.setattr(pico, "__file__", str(published.parent.parent / "pico_helpers.py"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PICO_MENU", "2")
    before = {path: path.stat().st_mtime_ns for path in published.rglob("*")}
    checkpoint, files = pico.main_menu("tiny", results=published.parent, data_folder=data_folder)  # as the notebook
    output = capsys.readouterr().out
    assert checkpoint == published / "pico_llm.pt"
    assert f"Analyzing {checkpoint}, the model that comes with the project, trained on {20 * 4 * 32:,} tokens" in output
    assert f"is out of reach, so other text stands in. No corpus or folder '{corpus_folder.name}'" in output
    assert files and all(path.is_file() and published not in path.parents for path in files)
    assert {path.name for path in files} >= {"head_emergence.png", "loss_curve.png"}, "what the notebook shows"
    assert {path: path.stat().st_mtime_ns for path in published.rglob("*")} == before


def test_what_was_written_is_five_lines(tmp_path, capsys):
    names = ["attention_report.html", "attention_explorer.html", "findings.json", "head_scores.csv"]
    names += ["pico_llm_quick.pt", "quick_metrics.csv", "quick_heads.csv", "loss_curve.png", "loss_curve.svg"]
    pictures = [tmp_path / "attention" / f"{n}.png" for n in range(70)]
    pico.print_files([*(tmp_path / name for name in names), *pictures])
    assert capsys.readouterr().out.splitlines() == [
        f"report    {tmp_path / 'attention_report.html'}",
        f"explorer  {tmp_path / 'attention_explorer.html'}",
        f"findings  {tmp_path / 'findings.json'}, head_scores.csv",
        f"model     {tmp_path / 'pico_llm_quick.pt'}, quick_metrics.csv, quick_heads.csv",
        f"pictures  71 in {tmp_path}",
    ]


# --- what a study reads -----------------------------------------------------------------------------------------------


def test_bad_sentences_are_left_out_and_named(tiny_model, capsys):
    captures = pico.capture_sentences(
        tiny_model, {"Mine": ["A good one.", "", "word " * 100], "One": "Not a list.", "Bad": ["Two words"]}
    )
    assert {name: [capture.text for capture in members] for name, members in captures.items()} == {
        "Mine": ["A good one."], "One": ["Not a list."]
    }  # fmt: skip
    output = capsys.readouterr().out
    assert output.count("Left out of 'Mine'") == 2 and "'Two words' has fewer than three tokens" in output
    with pytest.raises(PicoError, match="None of the sentences"):
        pico.capture_sentences(tiny_model, {"Mine": ["", None]})


def test_a_model_whose_corpus_is_gone_is_studied_on_another(monkeypatch, tmp_path, corpus_folder, trained, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = pico.TrainConfig(corpus="/gone/corpus")
    checkpoint = dataclasses.replace(pico.load_checkpoint(trained.checkpoint), train_config=config)
    about, training, validation = pico.open_corpus(checkpoint, data_folder=tmp_path)
    few = dataclasses.replace(validation, tokens=validation.tokens[:40])  # a small corpus holds little text out
    assert pico.study_windows(few, checkpoint.model_config).shape == (1, 32)
    assert pico.study_windows(few, pico.ModelConfig()).shape == (1, 39)
    assert about.endswith("not WikiText-103; the model was trained on another corpus, which may share articles with it")
    assert len(training.tokens) > 1e6
    assert "No corpus or folder '/gone/corpus'" in capsys.readouterr().out
    assert f"folder {corpus_folder.name} (" in pico.open_corpus(checkpoint, str(corpus_folder), tmp_path)[0]
    with pytest.raises(PicoError, match="No corpus or folder 'nowhere'"):
        pico.open_corpus(checkpoint, "nowhere", tmp_path)


def test_an_unwritable_folder_is_found_before_the_study(trained, monkeypatch):
    monkeypatch.setattr(pico, "study_model", lambda *args, **options: pytest.fail("studied first"))
    with pytest.raises(PicoError, match="Choose another folder"):
        pico.run_analysis(trained.checkpoint, results=trained.checkpoint / "results")


def test_the_rows_of_heads_are_their_scores_on_the_way(trained, corpus_folder, data_folder):
    rows = pico.read_head_rows(trained.checkpoint.with_name("tiny_heads.csv"), 20)
    assert len(rows) == 4 * len(pico.snapshot_steps(20))
    corpus = pico.choose_corpus(str(corpus_folder))
    training, validation = (pico.prepare_tokens(corpus, split, data_folder) for split in ("train", "validation"))
    counts, windows = pico.token_counts(training), pico.study_windows(validation, trained.model.config)
    for step, model in ((0, pico.PicoLLM(trained.model.config)), (20, trained.model)):
        expected = pico.score_heads(model, idx=windows, token_counts=counts).to_dict("records")
        for row, head in zip([row for row in rows if row["step"] == step], expected, strict=True):
            assert row["class"] == head["class"]
            for name in ("layer", "head", *pico.HEAD_SCORES):
                assert row[name] == pytest.approx(head[name], abs=1e-3), name


def test_a_resumed_run_continues_its_rows(trained, corpus_folder, data_folder, tmp_path, monkeypatch):
    path, original, steps = tmp_path / "tiny_heads.csv", pico.train_step, []

    def interrupted(*args, **options):
        steps.append(args)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(pico, "train_step", interrupted)
    assert not train_tiny(tmp_path, data_folder, corpus_folder).finished
    partial = pico.run_files(tmp_path, "tiny.partial").heads
    rows = pico.read_head_rows(partial, 20)
    assert rows[-1]["step"] == 5
    pico.write_csv(partial, [*rows, rows[-1] | {"step": 7}])  # of steps that were lost with the process
    model = train_tiny(tmp_path, data_folder, corpus_folder).checkpoint
    assert path.read_text() == trained.checkpoint.with_name("tiny_heads.csv").read_text()
    saved = pico.load_checkpoint(model)
    assert pico.head_history(model, saved) == pico.read_head_rows(path, 20)
    for content in (b"", b"a,b\n1,2\n", b"step\nx\n", b"\xff\x00", b"step,layer\n1,2\n"):
        path.write_bytes(content)  # no scores of heads
        assert pico.head_history(model, saved) == []


def test_a_run_from_another_model_goes_on_with_its_rows(trained, corpus_folder, data_folder, tmp_path):
    start = {"init_from": str(trained.checkpoint), "corpus": str(corpus_folder), "name": "second"}
    second = pico.run_training("tiny", tmp_path, data_folder, **RUN | start | {"max_steps": 3})[0]
    per_step = trained.metrics[-1]["tokens"] // trained.metrics[-1]["step"]
    rows = pico.head_history(second.checkpoint, pico.load_checkpoint(second.checkpoint))
    places = sorted({(row["step"], row["tokens"]) for row in rows})
    assert places[0] == (-20, 0) and places[-1] == (3, 23 * per_step)
    assert all(tokens == (20 + step) * per_step for step, tokens in places)
    before = pico.head_history(trained.checkpoint, pico.load_checkpoint(trained.checkpoint))
    assert [row | {"step": row["step"] - 20} for row in before if row["step"] < 20] == [
        r for r in rows if r["step"] < 0
    ]


def test_a_run_from_another_model_takes_nothing_from_an_unfinished_run_of_its_name(
    trained, corpus_folder, data_folder, tmp_path, interrupt
):
    changes = RUN | {"init_from": str(trained.checkpoint), "corpus": str(corpus_folder), "name": "second"}
    interrupt(1)
    other = pico.run_training("tiny", tmp_path, data_folder, **changes | {"max_steps": 2, "context_length": 16})[0]
    assert not other.finished
    second = pico.run_training("tiny", tmp_path, data_folder, **changes | {"max_steps": 2})[0]
    assert second.model.config == trained.model.config, "its context is that of the model"
    rows = pico.head_history(second.checkpoint, pico.load_checkpoint(second.checkpoint))
    assert rows[0]["step"] == -20 and rows[-1]["tokens"] == 22 * 4 * 32


def test_a_run_from_another_model_goes_on_when_that_is_gone(trained, corpus_folder, data_folder, tmp_path, interrupt):
    source = shutil.copy(trained.checkpoint, tmp_path / "base.pt")
    changes = RUN | {"init_from": str(source), "corpus": str(corpus_folder), "name": "second", "max_steps": 2}
    interrupt(1)
    assert not pico.run_training("tiny", tmp_path, data_folder, **changes)[0].finished
    source.unlink()
    second = pico.run_training("tiny", tmp_path, data_folder, **changes)[0]
    assert second.finished and second.metrics[-1]["tokens_total"] == 22 * 4 * 32
    assert pico.read_head_rows(second.checkpoint.with_name("second_heads.csv"), 2)[-1]["tokens"] == 22 * 4 * 32


# --- publishing -------------------------------------------------------------------------------------------------------


def test_publish_writes_the_model_and_its_study(published, trained):
    saved, shipped = pico.load_checkpoint(trained.checkpoint), pico.load_checkpoint(published / "pico_llm.pt")
    assert shipped.training_state is None and (shipped.metrics, shipped.step) == (saved.metrics, saved.step)
    assert all(torch.equal(shipped.weights[name], value.half()) for name, value in saved.weights.items())
    assert (published / "pico_llm.pt").stat().st_size < 0.55 * trained.checkpoint.stat().st_size
    for name in ("tiny_metrics.csv", "tiny_heads.csv"):
        text = trained.checkpoint.with_name(name).read_text()
        assert len((published / name).read_text().splitlines()) == len(text.splitlines())
    names = {str(path.relative_to(published)) for path in published.rglob("*")}
    assert names >= {"findings.json", "attention_report.html", "attention_explorer.html", "head_scores.csv"}
    assert names >= {f"attention/model/{name}.png" for name in ("head_emergence", "loss_curve", "ablation")}
    assert pico.REPEATED_TEXTS[0] in (published / "attention_explorer.html").read_text()


def test_the_model_card_says_what_checkpoint_and_study_say(published, trained, corpus_folder, data_folder):
    card, last = (published / "README.md").read_text(), trained.metrics[-1]
    saved = pico.load_checkpoint(published / "pico_llm.pt")
    validation = pico.open_corpus(pico.load_checkpoint(trained.checkpoint), None, data_folder)[2]
    evaluation = pico.evaluate(pico.load_model(published / "pico_llm.pt"), validation)
    for fact in (
        "0.01M parameters without embeddings, 1.62M with them: 2 layers of 2 heads, width 32, feed-forward 32, context",
        f"Trained on the parquet folder {corpus_folder.name} (100% of its training rows",
        NOTE,
        "| steps | 20 of 4 sequences |",
        "| dropout | 0.0 |",
        "| text style | natural |",
        "| started from | random weights |",
        "| tokens | 2,560 |",
        f"| train loss | {last['train_loss']:.4f} |",
        f"| val loss | {last['val_loss']:.4f} |",
        f"| FP16 weights | loss {evaluation.loss:.4f}, word perplexity {evaluation.word_perplexity:,.2f}",
        f"| torch | {torch.__version__} |",
        *json.loads((published / "findings.json").read_text())["headline"],
        'pico.load_model("pretrained/pico_llm.pt")',
        "python pico_helpers.py publish --checkpoint results/pico_llm_tiny.pt --out pretrained",
    ):
        assert fact in card, fact
    for absent in ("WikiText", "Wikipedia", "mfu", "None", "nan", str(corpus_folder.parent), "{"):
        assert absent not in card, absent
    assert str(corpus_folder.parent).encode() not in (published / "pico_llm.pt").read_bytes()
    card = pico.model_card(dataclasses.replace(saved, metrics=[]), published, evaluation, "some text")
    assert "does not say where that text is from" in card and "val loss" not in card
    config = dataclasses.replace(saved.train_config, corpus="offline")
    card = pico.model_card(dataclasses.replace(saved, train_config=config), published, evaluation, "some text")
    assert "by the contributors of English Wikipedia, CC BY-SA" in card


def test_the_command_on_the_card_gives_the_same_settings(published, monkeypatch):
    (line,) = [line for line in (published / "README.md").read_text().splitlines() if "pico_helpers.py train" in line]
    saved, seen = pico.load_checkpoint(published / "pico_llm.pt"), {}

    def run_training(*args, **changes):
        seen.update(changes)
        raise PicoError("That is enough.")

    monkeypatch.setattr(pico, "run_training", run_training)
    assert pico.main(shlex.split(line)[2:]) == 2
    rebuilt = pico.get_preset("tiny").with_changes(seen)
    assert (rebuilt.model, rebuilt.train) == (saved.model_config, saved.train_config)
    odd = dataclasses.replace(pico.PRESETS["tiny"].train, betas=(0.8, 0.9), compile=False, corpus="my texts")
    command = pico.train_command(pico.PRESETS["tiny"].model, odd)
    assert command.endswith("--preset tiny --corpus 'my texts' --betas 0.8 0.9 --no-compile")
    tuned = dataclasses.replace(pico.PRESETS["tiny"].train, init_from="a.pt")  # whose dropout would hold otherwise
    assert "--dropout 0.0" in pico.train_command(pico.PRESETS["tiny"].model, tuned)
    renamed = dataclasses.replace(pico.PRESETS["quick"].train, name="mine")  # reads all sequences: no option says that
    assert pico.train_command(pico.PRESETS["quick"].model, renamed).endswith("--preset quick --name mine")


def test_what_cannot_be_published_leaves_the_folder_as_it_was(trained, tmp_path, data_folder):
    saved, out = pico.load_checkpoint(trained.checkpoint), tmp_path / "out"
    weights = saved.weights | {"final_norm.weight": torch.full((32,), 1e6)}
    for changes, problem in (
        ({"training_state": {"optimizer": {}}}, "is an unfinished run"),
        ({"weights": weights}, "beyond the range of FP16"),
    ):
        path = pico.save_checkpoint(tmp_path / "a.pt", dataclasses.replace(saved, **changes))
        with pytest.raises(PicoError, match=problem):
            pico.publish(path, out, data_folder)
        assert not out.exists()
    with pytest.raises(PicoError, match="holds training runs"):
        pico.publish(trained.checkpoint, trained.checkpoint.parent, data_folder)
    out.mkdir()
    for name, problem in (("README.md", "is not a model card"), ("pico_llm.pt", "is not a Pico-LLM checkpoint")):
        (out / name).write_text("# My thesis\n")
        with pytest.raises(PicoError, match=problem):
            pico.publish(trained.checkpoint, out, data_folder)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "# My thesis\n"
        (out / name).unlink()


# --- the command line -------------------------------------------------------------------------------------------------


def test_command_line_trains_explores_and_generates(tmp_path, corpus_folder, capsys):
    results = tmp_path / "results"

    def run(*arguments: str) -> str:
        assert pico.main([*arguments, "--results", str(results)]) == 0
        return capsys.readouterr().out

    options = ["--corpus", str(corpus_folder), "--max-steps", "3", "--learning-rate", "0.002"]
    output = run("train", "--preset", "tiny", *options, "--data-folder", str(tmp_path / "data"))
    assert "Corpus: the parquet folder" in output and "A sample: 'The history of" in output
    assert f"model     {results / 'pico_llm_tiny.pt'}, tiny_metrics.csv, tiny_heads.csv" in output
    assert f"pictures  2 in {results}" in output
    assert pico.load_checkpoint(results / "pico_llm_tiny.pt").train_config.learning_rate == 0.002
    command = [sys.executable, "pico_helpers.py", "generate", "One day", "--max-new-tokens", "5"]
    command += ["--checkpoint", str(results / "pico_llm_tiny.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("One day")
    page = results / "my_explorer.html"
    output = run("explore", "A very long journey.", "Another <b>one</b>.")
    assert output.startswith(f"{page} shows where the heads of") and output.count("\n") == 1
    assert "A very long journey." in page.read_text() and "Another <b>one" not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "The following arguments are required: COMMAND"),
        (["train", "--preset", "huge"], "Unknown preset 'huge'; choose one of: wikitext103, quick"),
        (["train", "--precision", "fp8"], "Unknown precision"),
        (["train", "--corpus", "nowhere"], "No corpus or folder 'nowhere'"),
        (["train", "--seed", "one"], "Argument --seed: invalid int value: 'one'; see"),
        (["train", "--max", "5"], "Ambiguous option: --max could match --max-"),
        (["train", "--betas", "0.9"], "Argument --betas: expected 2 arguments"),
        (["train", "--vocab-size", "1000"], "Unrecognized arguments: --vocab-size 1000"),
        (["train", "--seed", "-1"], "seed must be"),
        (["train", "--betas", "1.5", "0.9"], "betas must be"),
        (["train", "--n-layer", "0"], "n_layer must be"),
        (["analyze", "--checkpoint", "README.md"], "README.md "),
        (["explore", ""], "The sentence is empty"),
        (["explore", "A good one.", "word " * 600], "The sentence has 601 tokens; the model reads 512"),
        (["generate", "A", "--temperature", "-1"], "Generation needs"),
        (["publish", "--checkpoint", "results"], "There is no checkpoint results"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert pico.main([*arguments, *(["--results", str(tmp_path)] if arguments else [])]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"Error: {message}") and output.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        pico.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--n-layer INT" in text and "--betas FLOAT FLOAT" in text and "model [values of preset" in text
    assert "sequences per step [8]" in text
    assert " INT [" not in text and " FLOAT [" not in text and " STR [" not in text, "a setting without a word of help"
