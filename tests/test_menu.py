"""The menu and the command line: what is asked, what a typo does, what happens when nobody answers."""

import subprocess
import sys
from pathlib import Path

import pytest

import pico_helpers as pico
from pico_helpers import PicoError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def attended(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PICO_MENU", raising=False)
    monkeypatch.setattr(pico, "is_unattended", lambda: False)


def answers(*texts: str):
    remaining = list(texts)
    return lambda prompt: remaining.pop(0)


@pytest.mark.parametrize(("typed", "expected"), [("1", "1"), (" 2 ", "2"), ("both", "3"), ("", "3"), ("Train", "1")])
def test_a_choice_is_taken(attended, typed, expected):
    assert pico.ask_choice(answers(typed)) == expected


def test_a_typo_is_asked_again(attended, capsys):
    assert pico.ask_choice(answers("4", "trian", "2")) == "2"
    output = capsys.readouterr().out
    assert "'4' is not on the menu" in output and "'trian' is not on the menu" in output


@pytest.mark.parametrize("error", [EOFError, NotImplementedError])
def test_without_standard_input_the_choice_is_both(attended, error):
    def ask(prompt):
        raise error

    assert pico.ask_choice(ask) == "3"


@pytest.mark.parametrize(("value", "expected"), [("1", "1"), ("analyze", "2"), ("", "3"), (None, "3")])
def test_the_variable_decides_unattended(monkeypatch, value, expected):
    monkeypatch.setenv("CI", "1")
    if value is None:
        monkeypatch.delenv("PICO_MENU", raising=False)
    else:
        monkeypatch.setenv("PICO_MENU", value)
    assert pico.ask_choice(lambda prompt: pytest.fail("nobody is there to ask")) == expected


def test_an_unknown_variable_says_so(monkeypatch):
    monkeypatch.setenv("PICO_MENU", "7")
    with pytest.raises(PicoError, match=r"Unknown choice PICO_MENU='7'; use 1 \(train\)"):
        pico.ask_choice()


def test_the_path_of_the_model_is_asked_until_it_is_good(attended, tmp_path, tiny_model, tiny_train, capsys):
    checkpoint = pico.Checkpoint(tiny_model.config, tiny_train, "made up", 0, [], tiny_model.state_dict())
    default = pico.save_checkpoint(tmp_path / "pico_llm_a.pt", checkpoint)
    other = pico.save_checkpoint(tmp_path / "elsewhere.pt", checkpoint)
    assert pico.ask_checkpoint(tmp_path, answers("")) == default
    assert pico.ask_checkpoint(tmp_path, answers("no-such.pt", str(other))) == other
    assert "There is no checkpoint no-such.pt" in capsys.readouterr().out


def test_an_unknown_preset_says_which_there_are():
    with pytest.raises(PicoError, match=r"Unknown preset 'huge'; choose one of: wikitext103, quick"):
        pico.get_preset("huge")


def test_bad_sentences_are_left_out_and_named(tiny_model, capsys):
    captures = pico.capture_sentences(tiny_model, {"Mine": ["A good sentence.", "", "word " * 100], "Empty": [" "]})
    assert [c.text for c in captures["Mine"]] == ["A good sentence."]
    output = capsys.readouterr().out
    assert output.count("Left out of 'Mine'") == 2 and "Left out of 'Empty'" in output
    with pytest.raises(PicoError, match="None of the sentences"):
        pico.capture_sentences(tiny_model, {"Mine": ["", None]})
    assert len(pico.capture_sentences(tiny_model, {"Mine": "One text, not a list."})["Mine"]) == 1


def test_a_model_whose_corpus_is_gone_is_studied_on_another(monkeypatch, tmp_path, corpus_folder, tiny_model, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    train = pico.TrainConfig(corpus="/gone/corpus")
    checkpoint = pico.Checkpoint(tiny_model.config, train, "a corpus of old", 0, [], tiny_model.state_dict())
    about, training, _ = pico.open_corpus(checkpoint, data_folder=tmp_path)
    assert about.endswith("not WikiText-103, which is not what the model was trained on") and len(training.tokens) > 1e6
    assert "Unknown corpus '/gone/corpus'" in capsys.readouterr().out
    assert str(corpus_folder) in pico.open_corpus(checkpoint, str(corpus_folder), tmp_path)[0]
    with pytest.raises(PicoError, match="Unknown corpus 'nowhere'"):
        pico.open_corpus(checkpoint, "nowhere", tmp_path)


def test_an_unwritable_folder_is_found_before_the_study(tmp_path, tiny_model, tiny_train, monkeypatch):
    checkpoint = pico.Checkpoint(tiny_model.config, tiny_train, "made up", 0, [], tiny_model.state_dict())
    path = pico.save_checkpoint(tmp_path / "model.pt", checkpoint)
    monkeypatch.setattr(pico, "study_heads", lambda *args, **options: pytest.fail("studied first"))
    with pytest.raises(PicoError, match="Choose another folder"):
        pico.run_analysis(path, results=path / "results")


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "pico_helpers.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, **options)


def test_command_line_trains_and_generates(tmp_path, corpus_folder):
    folders = ["--results", str(tmp_path / "results"), "--data-folder", str(tmp_path / "data")]
    corpus = ["--preset", "tiny", "--corpus", str(corpus_folder), "--max-steps", "3", "--learning-rate", "0.002"]
    done = run("train", *corpus, *folders)
    assert done.returncode == 0, done.stderr
    assert "Corpus: the parquet folder" in done.stdout and "A sample: 'The history of" in done.stdout
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"pico_llm_tiny.pt", "tiny_metrics.csv", "loss_curve.png", "loss_curve.svg"}
    for name in names:
        assert Path(name).stem in done.stdout  # every file is listed
    assert pico.load_checkpoint(tmp_path / "results" / "pico_llm_tiny.pt").train_config.learning_rate == 0.002
    done = run("generate", "One day", "--max-new-tokens", "5", *folders)
    assert done.returncode == 0 and done.stdout.startswith("One day")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "huge"], "Error: Unknown preset 'huge'"),
        (["analyze", "--checkpoint", "README.md"], "Error: README.md "),
        (["train", "--precision", "fp8"], "Error: Unknown precision"),
        (["train", "--corpus", "nowhere"], "Error: Unknown corpus 'nowhere'"),
    ],
)
def test_command_line_errors_are_one_line(arguments, message, tmp_path):
    done = run(*arguments, "--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
