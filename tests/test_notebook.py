"""The real notebook, executed from top to bottom the way the README's command does it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def cells(notebook: Path = ROOT / "pico_llm.ipynb") -> list[dict]:
    return [cell for cell in json.loads(notebook.read_bytes())["cells"] if cell["cell_type"] == "code"]


def test_notebook_runs_end_to_end(tmp_path):
    """In a folder of its own, so that its results are known to come from this run."""
    for name in ("pico_llm.ipynb", "pico_helpers.py", "profile_training.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"PICO_PRESET": "tiny", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyter", "execute", "pico_llm.ipynb", "--output", "executed.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train tiny" in done.stderr, "progress must reach the terminal"
    results = tmp_path / "results"
    names = "pico_llm_tiny.pt tiny_metrics.csv loss_curve.png loss_curve.svg head_scores.csv findings.json profile.csv"
    names += " attention_report.html attention_explorer.html inference_benchmark.csv huggingface/model.safetensors"
    assert all((results / name).stat().st_size > 0 for name in names.split())
    outputs = [output for cell in cells(tmp_path / "executed.ipynb") for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "not WikiText-103, because the settings ask for it" in text
    assert "11,942,784" in json.dumps(outputs), "the size of the full model"
    assert "TensorRT needs an NVIDIA GPU" in text or "Torch-TensorRT" in text


@pytest.fixture
def live(monkeypatch):
    """Runs code in a kernel where a person types: live(code, answers) -> [(kind, content), ...]."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PICO_MENU", raising=False)
    run_kernel = pytest.importorskip("jupyter_client.manager").run_kernel

    def run(code: str, *answers: str) -> list[tuple[str, dict]]:
        remaining, outputs = list(answers), []
        hooks = {"stdin_hook": lambda message: client.input(remaining.pop(0))}
        hooks["output_hook"] = lambda message: outputs.append((message["msg_type"], message["content"]))
        client.execute_interactive(code, allow_stdin=True, **hooks)
        assert not remaining, "not every answer was asked for"
        return outputs

    with run_kernel(cwd=str(ROOT)) as client:
        yield run


def test_a_person_at_the_notebook_is_asked_and_sees_the_loss_fall(live, tmp_path, data_folder):
    live("import pico_helpers as pico, torch; pico.setup_notebook()")
    folders = f"results={str(tmp_path)!r}, data_folder={str(data_folder)!r}"
    outputs = live(f"checkpoint, files = pico.main_menu('tiny', {folders})", "9", "1")
    printed = "".join(content["text"] for kind, content in outputs if kind == "stream")
    assert "Unknown choice '9'" in printed and "100%" in printed and "pico_llm_tiny.pt" in printed
    pictures = [kind for kind, content in outputs if "image/png" in content.get("data", {})]
    assert pictures == ["update_display_data"] * 2, "one place, drawn anew at steps 10 and 20"
    model = "pico.PicoLLM(pico.PRESETS['tiny'].model)"
    outputs = live(f"pico.plot_all_heads(pico.capture_attention({model}, 'A cat sat.'))")
    assert any("image/png" in content.get("data", {}) for _, content in outputs), "a figure must show as a picture"
    (error,) = [content for kind, content in live("pico.get_preset('huge')") if kind == "error"]
    assert len(error["traceback"]) == 1 and "Unknown preset 'huge'" in error["traceback"][0]


def test_the_first_cell_fetches_the_project_or_says_how_to_get_it(tmp_path, monkeypatch):
    """In an empty folder, as in Colab, and without installing anything."""
    (project := tmp_path / "project").mkdir()
    for name in ("pico_helpers.py", "requirements.txt"):
        shutil.copy(ROOT / name, project)
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in ([*git, "init", "-q"], [*git, "add", "."], [*git, "commit", "-qm", "A"]):
        subprocess.run(command, cwd=project, check=True)
    first = "".join(cells()[0]["source"])
    assert first.count('REPOSITORY = ""') == 1, "the address is set in one place"
    commands, run = [], subprocess.run

    def without_pip(command: list[str], **options) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0) if "pip" in command else run(command, **options)

    monkeypatch.setattr(subprocess, "run", without_pip)
    (tmp_path / "colab").mkdir()
    monkeypatch.chdir(tmp_path / "colab")
    with pytest.raises(SystemExit, match=r"upload .*results/pretrained/pico_llm\.pt"):
        exec(first, {})
    assert not commands
    for _ in range(2):  # the second time it is there already
        exec(first.replace('REPOSITORY = ""', f"REPOSITORY = {str(project)!r}"), {})
        assert Path("pico_helpers.py").exists() and Path.cwd().name == "pico-llm"
        monkeypatch.chdir(tmp_path / "colab")
    assert [command[0] for command in commands] == ["git", sys.executable, sys.executable]
    assert commands[1][1:6] == ["-m", "pip", "install", "--quiet", "torch>=2.9"], "a newer one that is there is kept"
    lines = (project / "requirements.txt").read_text().splitlines()[1:]
    listed = [Requirement(line.split("#")[0]) for line in lines]
    assert [Requirement(wanted).name for wanted in commands[1][5:]] == [wanted.name for wanted in listed]
    (allowed,) = [wanted.specifier for wanted in listed if wanted.name == "torch"]
    assert "2.9.1+cu128" in allowed and "2.13.0" in allowed and "2.8.0" not in allowed


def test_notebook_is_stored_with_short_cells_and_the_outputs_of_one_clean_run():
    text = (ROOT / "pico_llm.ipynb").read_text(encoding="utf-8")
    assert all(len(cell["source"]) <= 16 for cell in cells())
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1)), "run from top to bottom"
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8, "pictures for who reads it on GitHub"
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert ">NaN<" not in text and not re.search(r"/(home|root|tmp|work|Users)/", text) and len(text) < 1.5e6


def test_ruff_is_content():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
