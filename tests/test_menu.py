"""The menu and the command line: what is asked, what a typo does, what happens when nobody answers."""

import dataclasses
import json
import os
import shlex
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
    assert f"folder {corpus_folder.name} (" in pico.open_corpus(checkpoint, str(corpus_folder), tmp_path)[0]
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
    assert names == {"pico_llm_tiny.pt", "tiny_metrics.csv", "tiny_heads.csv"} | {
        f"{name}.{kind}" for name in ("loss_curve", "head_emergence") for kind in ("png", "svg")
    }
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


# --- heads over training, shipping a model ----------------------------------------------------------------------------

TINY = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_ff": 32, "context_length": 32, "max_positions": 64}
RUN = {"max_steps": 20, "batch_size": 4, "eval_interval": 20, "learning_rate": 2e-3, "checkpoint_seconds": 0.0}


def train_tiny(results: Path, data_folder: Path, corpus: Path, **changes) -> pico.TrainResult:
    return pico.run_training("tiny", results, data_folder, corpus=str(corpus), **TINY, **(RUN | changes))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_folder, data_folder) -> pico.TrainResult:
    return train_tiny(tmp_path_factory.mktemp("trained"), data_folder, corpus_folder)


def test_the_rows_of_heads_are_their_scores_on_the_way(trained, corpus_folder, data_folder):
    rows = pico.read_head_rows(trained.checkpoint.with_name("tiny_heads.csv"))
    assert sorted({row["step"] for row in rows}) == pico.snapshot_steps(20) and len(rows) == 4 * len(
        pico.snapshot_steps(20)
    )
    corpus = pico.choose_corpus(str(corpus_folder))
    training, validation = (pico.prepare_tokens(corpus, split, data_folder) for split in ("train", "validation"))
    counts, windows = pico.token_counts(training), pico.held_out_sequences(validation, 16, 32)[:, :-1]
    for step, model in ((0, pico.PicoLLM(trained.model.config)), (20, trained.model)):
        expected = pico.score_heads(model, idx=windows, token_counts=counts).to_dict("records")
        for row, head in zip([row for row in rows if row["step"] == step], expected, strict=True):
            assert row["class"] == head["class"]
            for name in ("layer", "head", *pico.HEAD_SCORES):
                assert row[name] == pytest.approx(head[name], abs=1e-3), name


def test_a_resumed_run_continues_its_rows_and_a_new_one_starts_anew(
    trained, corpus_folder, data_folder, tmp_path, monkeypatch
):
    path, original, steps = tmp_path / "tiny_heads.csv", pico.train_step, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(pico, "train_step", interrupted)
    assert not train_tiny(tmp_path, data_folder, corpus_folder).finished
    rows = pico.read_head_rows(path)
    assert rows[-1]["step"] == 5
    pico.write_csv(path, [*rows, rows[-1] | {"step": 7}])  # of steps that were lost with the process
    train_tiny(tmp_path, data_folder, corpus_folder)
    assert path.read_text() == trained.checkpoint.with_name("tiny_heads.csv").read_text()
    old = pico.load_checkpoint(tmp_path / "pico_llm_tiny.pt")
    assert len(pico._head_history(tmp_path / "pico_llm_tiny.pt", old)) == len(pico.read_head_rows(path))
    train_tiny(tmp_path, data_folder, corpus_folder, max_steps=10)
    assert pico.read_head_rows(path)[-1]["step"] == 10
    assert not pico._head_history(tmp_path / "pico_llm_tiny.previous.pt", old), "the rows are the newer run's"


def test_files_that_are_no_scores_of_heads_are_left_alone(tmp_path):
    for content in (b"", b"a,b\n1,2\n", b"step\nx\n", b"\xff\x00", b"step,layer\n1,2\n"):
        (tmp_path / "heads.csv").write_bytes(content)
        assert pico.read_head_rows(tmp_path / "heads.csv") == []
    assert pico.read_head_rows(tmp_path / "none.csv") == []


@pytest.fixture(scope="module")
def short_study():
    """The study of one sentence, its linguistic tests made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pico, "ALL_TEST_CATEGORIES", {"Simple": ["The cat sat."]})
        patch.setattr(pico, "study_language", lambda *args, **options: make_language(trained=False))
        yield


NOTE = "Made-up lines, in nobody's ownership."


@pytest.fixture(scope="module")
def published(short_study, trained, corpus_folder, data_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "results" / "pretrained"
    folder.mkdir(parents=True)
    for name in ("other_metrics.csv", "other_heads.csv"):
        (folder / name).write_text("of another model\n")
    files = pico.publish(trained.checkpoint, folder, data_folder, data_note=NOTE)
    assert sorted(set(files)) == sorted(path for path in folder.rglob("*") if path.is_file())
    return folder


def test_publish_writes_the_model_and_its_study(published, trained):
    saved, shipped = pico.load_checkpoint(trained.checkpoint), pico.load_checkpoint(published / "pico_llm.pt")
    assert shipped.training_state is None and (shipped.metrics, shipped.step) == (saved.metrics, saved.step)
    for name, value in saved.weights.items():
        assert torch.equal(shipped.weights[name], value.half())
    assert (published / "pico_llm.pt").stat().st_size < 0.55 * trained.checkpoint.stat().st_size
    for name in ("tiny_metrics.csv", "tiny_heads.csv"):
        text = trained.checkpoint.with_name(name).read_text()
        assert len((published / name).read_text().splitlines()) == len(text.splitlines())
    names = {str(path.relative_to(published)) for path in published.rglob("*")}
    assert names >= {"findings.json", "attention_report.html", "attention_explorer.html", "head_scores.csv"}
    assert names >= {f"attention/model/{name}.png" for name in ("head_emergence", "loss_curve", "ablation")}


def test_the_model_card_says_what_checkpoint_and_study_say(published, trained, corpus_folder, data_folder):
    card = (published / "README.md").read_text()
    validation = pico.open_corpus(pico.load_checkpoint(trained.checkpoint), None, data_folder)[2]
    evaluation = pico.evaluate(pico.load_model(published / "pico_llm.pt"), validation, 32)
    last, findings = trained.metrics[-1], json.loads((published / "findings.json").read_text())
    for fact in (
        "0.01M parameters without embeddings, 1.62M with them: 2 layers of 2 heads, width 32, feed-forward 32, context",
        f"Trained on the parquet folder {corpus_folder.name} (100% of its training rows",
        NOTE,
        "Settings: dropout 0.0, d_model 32, n_layer 2, n_head 2,",
        "max_sequences None, max_steps 20, batch_size 4, learning_rate 0.002,",
        "| length | 20 steps of 4 sequences |",
        "| tokens | 2,560 (",
        f"| training loss | {last['train_loss']:.4f} nats per token |",
        f"| held-out loss | {last['val_loss']:.4f} nats per token, word perplexity {last['word_perplexity']:,.2f} |",
        f"| FP16 weights | loss {evaluation.loss:.4f}, word perplexity {evaluation.word_perplexity:,.2f}",
        f"| training time | {last['seconds']:,.0f} s",
        f"| torch | {torch.__version__} |",
        *findings["headline"],
        "no induction head appears",
        'pico.load_model("pretrained/pico_llm.pt")',
        "python pico_helpers.py publish --checkpoint results/pico_llm_tiny.pt --out pretrained",
    ):
        assert fact in card, fact
    for absent in ("WikiText", "Wikipedia", "MFU", "GPU memory", str(corpus_folder.parent), "{"):
        assert absent not in card, absent
    assert str(corpus_folder.parent).encode() not in (published / "pico_llm.pt").read_bytes()


def test_the_command_on_the_card_gives_the_same_settings(published):
    card = (published / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "pico_helpers.py train" in line]
    options = pico._parser().parse_args(shlex.split(line)[2:])
    preset, saved = pico.get_preset(options.preset), pico.load_checkpoint(published / "pico_llm.pt")
    for mine, base in ((saved.model_config, preset.model), (saved.train_config, preset.train)):
        given = {name: value for name in vars(base) if (value := getattr(options, name)) is not None}
        assert dataclasses.replace(base, **given) == mine
    odd = dataclasses.replace(preset.train, betas=(0.8, 0.9), compile=False, corpus="my texts", max_steps=None)
    command = pico._train_command(preset.model, odd)
    assert command.endswith("--corpus 'my texts' --betas 0.8 0.9 --no-compile  # in Python, with max_steps=None")


def test_the_licence_is_told_only_of_corpora_that_are_known(
    published, trained, tmp_path, data_folder, short_study, monkeypatch
):
    monkeypatch.setattr(pico, "_study_checkpoint", lambda *_: ({"headline": [], "thresholds": {"tau": {}}}, []))
    monkeypatch.setattr(pico, "describe_emergence", lambda *_: "")
    saved = pico.load_checkpoint(trained.checkpoint)
    pico.publish(trained.checkpoint, tmp_path / "folder", data_folder)
    assert "does not say where that text is from" in (tmp_path / "folder" / "README.md").read_text()
    corpus = pico.choose_corpus("offline")
    config = dataclasses.replace(saved.train_config, corpus="offline")
    path = tmp_path / "pico_llm_tiny.pt"
    pico.save_checkpoint(path, dataclasses.replace(saved, corpus=corpus.about, train_config=config, metrics=[]))
    monkeypatch.setattr(pico, "evaluate", lambda *_: pico.Evaluation(5.0, 100, 80))
    pico.publish(path, tmp_path / "offline", tmp_path)
    card = (tmp_path / "offline" / "README.md").read_text()
    assert "English Wikipedia articles (CC BY-SA), not WikiText-103. The text is by the contributors" in card
    assert "word perplexity 518.01, measured at publishing on 100 tokens" in card and "held-out loss" not in card


def test_a_newcomer_studies_the_shipped_model_into_a_folder_of_their_own(
    published, short_study, data_folder, monkeypatch, capsys, corpus_folder
):
    """`published` lies where a copy of the project has it; its training corpus is not on this machine."""
    monkeypatch.setattr(pico, "__file__", str(published.parent.parent / "pico_helpers.py"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PICO_MENU", "2")
    before = {path: path.stat().st_mtime_ns for path in published.rglob("*")}
    results = published.parent  # as the notebook calls it
    files = pico.main_menu("tiny", results=results, data_folder=data_folder)
    output = capsys.readouterr().out
    assert f"Analyzing {published / 'pico_llm.pt'}, the model that comes with the project, trained for 20" in output
    assert f"The model's own corpus is out of reach. Unknown corpus '{corpus_folder.name}'" in output
    assert files and all(published not in path.parents for path in files)
    assert any(path.name == "head_emergence.png" for path in files)
    assert {path: path.stat().st_mtime_ns for path in published.rglob("*")} == before


def test_without_any_model_the_menu_says_what_to_do(monkeypatch, tmp_path, attended, capsys):
    monkeypatch.setattr(pico, "__file__", str(tmp_path / "pico_helpers.py"))
    assert pico.main_menu(results=tmp_path, ask=answers("2", "")) == []
    assert "train one first (menu choice 1 or 3" in capsys.readouterr().out


def test_an_unfinished_run_is_not_published(trained, tmp_path, data_folder):
    saved = pico.load_checkpoint(trained.checkpoint)
    path = pico.save_checkpoint(tmp_path / "a.pt", dataclasses.replace(saved, training_state={"optimizer": {}}))
    with pytest.raises(PicoError, match="is an unfinished run"):
        pico.publish(path, tmp_path / "out", data_folder)
    assert not (tmp_path / "out").exists()


def test_weights_beyond_half_precision_are_refused(trained, tmp_path, data_folder):
    saved = pico.load_checkpoint(trained.checkpoint)
    weights = saved.weights | {"final_norm.weight": torch.full((32,), 1e6)}
    path = pico.save_checkpoint(tmp_path / "pico_llm_tiny.pt", dataclasses.replace(saved, weights=weights))
    with pytest.raises(PicoError, match="beyond the range of FP16"):
        pico.publish(path, tmp_path / "out", data_folder)
    assert not (tmp_path / "out" / "pico_llm.pt").exists()
