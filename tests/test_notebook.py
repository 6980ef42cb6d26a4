"""The real notebook, executed from top to bottom the way the README's command does it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_notebook_runs_end_to_end(tmp_path):
    """In a folder of its own, so that its results are known to come from this run."""
    for name in ("pico_llm.ipynb", "pico_helpers.py", "profile_training.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"PICO_MENU": "3", "PICO_PRESET": "tiny", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyter", "execute", "pico_llm.ipynb", "--output", "executed.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train tiny" in done.stderr, "progress must reach the terminal"

    results = tmp_path / "results"
    for name in (
        "pico_llm_tiny.pt",
        "tiny_metrics.csv",
        "loss_curve.png",
        "loss_curve.svg",
        "head_scores.csv",
        "findings.json",
        "attention_report.html",
        "attention_explorer.html",
        "inference_benchmark.csv",
        "profile.csv",
        "huggingface/model.safetensors",
    ):
        assert (results / name).stat().st_size > 0, name
    cells = json.loads((tmp_path / "executed.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "not WikiText-103, because HF_HUB_OFFLINE is set" in text
    assert "11,942,784 parameters without embeddings" in text
    assert "TensorRT needs an NVIDIA GPU" in text or "Torch-TensorRT" in text


def test_notebook_is_stored_without_outputs_and_with_short_cells():
    cells = [c for c in json.loads((ROOT / "pico_llm.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert len(cell["source"]) <= 15, cell["source"]


def test_ruff_is_content():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
