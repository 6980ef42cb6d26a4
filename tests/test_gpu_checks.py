"""What can be checked of the GPU half without a GPU: what compiles, what pip would install, what a step waits for."""

import dataclasses
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_losses
import gpu_programme
import pandas as pd
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import pico_helpers as pico

TOOLS = importlib.util.find_spec("triton") and shutil.which("g++") and torch.version.cuda is None


@pytest.mark.slow
@pytest.mark.skipif(not TOOLS, reason="needs PyTorch's CPU build, Triton and g++")
@pytest.mark.parametrize("capability, attention", [("7 5", "efficient"), ("9 0", "flash")])
def test_the_training_step_compiles_for_cuda(capability, attention):
    """Forward, loss and backward become machine code in one graph, and the logits never exist in float32."""
    command = [sys.executable, str(Path(__file__).with_name("cuda_stand_in.py")), *capability.split(), "auto"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr[-3000:]
    made = json.loads(answer.stdout)
    assert made["graphs"] == 1, "a graph break"
    assert all(n == 1 for n in made["compiled"]) and len(made["compiled"]) > 20
    forward, backward = made["kernels"]  # launches for two layers and three parts of the loss
    assert forward <= 55 and backward <= 60
    kind = f"_scaled_dot_product_{attention}_attention"
    assert sorted(made["attention"]) == [kind] * 2 + [f"{kind}_backward"] * 2, "one kernel a layer and direction"
    vocabulary = pico.ModelConfig().padded_vocab_size
    logits = [(shape, kind) for shape, kind in made["buffers"] if shape[-1:] == [vocabulary]]
    assert logits and all(kind != "float32" and shape[0] <= 8192 for shape, kind in logits)
    muon = made["muon"]
    assert muon["graphs"] == len(muon["kernels"]) == 1 and sum(muon["kernels"]) <= 60, "30 matrix products"
    assert all(n == 1 for n in muon["compiled"])
    chunk = 2 * 8192 * vocabulary  # bytes of its logits
    assert max(made["peaks"]) < 2.5 * chunk, "the logits of one chunk and their exponentials"
    stream = {kind for shape, kind in made["buffers"] if shape == [64, 384, 64]} - {"bool"}
    assert stream == ({"bfloat16"} if capability == "9 0" else {"float16", "float32"})
    sizes = [math.prod(shape) for shape, kind in made["buffers"] if kind == "float32"]
    assert max(sizes) <= 64 * vocabulary, "the gradient of the embedding"


def test_what_users_vary_is_compiled_once_each(tiny_config):
    """Batch size, length, evaluation and dropout cost one graph each, whole, and the second time none."""
    torch._dynamo.reset()
    counter, model = CompileCounter(), pico.PicoLLM(dataclasses.replace(tiny_config, n_layer=1))
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def sweep() -> int:
        for batch, length in ((2, 32), (2, 32), (3, 16)):
            idx = torch.zeros(batch, length + 1, dtype=torch.int64)
            compiled(idx[:, :-1], idx[:, 1:])
        return counter.frame_count

    model.train()
    assert sweep() <= 2
    with pico.evaluating(model):
        assert sweep() <= 4
    assert sweep() <= 4, "coming back to training compiles nothing"
    for part in model.modules():  # another recipe
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    assert sweep() <= 6


def test_the_programme_goes_on_after_a_failure_and_in_parts(tmp_path, monkeypatch):
    hangs = "import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(60)"
    scripts = {"fails": "raise SystemExit(3)", "hangs": hangs, "works": "print('done')"}
    steps = [(name, [sys.executable, "-c", script]) for name, script in scripts.items()]
    monkeypatch.setattr(gpu_programme, "steps", lambda options: steps)
    results = {"fails": "exit status 3", "hangs": "stopped after 5 s", "works": "ok"}
    for words, failed in ((["--only", "works"], 0), ([], 2), (["--only", "fails"], 1)):
        assert gpu_programme.main(["--out", str(tmp_path), "--limit", "5", *words]) == failed
        table = pd.read_csv(tmp_path / "summary.csv").set_index("step").status
        assert table.to_dict() == ({"works": "ok"} if "works" in words else results)
    assert (tmp_path / "3_works.log").read_text() == "done\n"
    commands = [Path(f"/proc/{pid}/cmdline") for pid in (tmp_path / "2_hangs.log").read_text().split()]
    assert len(commands) == 2 and not any(file.exists() and file.read_bytes() for file in commands), "both have ended"
    with pytest.raises(SystemExit):
        gpu_programme.main(["--out", str(tmp_path), "--only", "tow"])


def test_the_check_of_losses_tells_a_wrong_step_from_jumping_weights(tiny_config):
    steps = pd.Series(range(1, 201))
    jumps = 5 - 0.01 * steps + 0.15 * (steps % 2 * 2 - 1)  # falling, and 0.3 higher after odd steps
    tables = [pd.DataFrame({"variant": "jumps", "step": steps, "train_loss": jumps, "float32_loss": jumps})]
    falls = 5 - 0.01 * steps
    tables += [pd.DataFrame({"variant": "wrong", "step": steps, "train_loss": falls + 0.2, "float32_loss": falls})]
    found = gpu_losses.summary(pd.concat(tables, ignore_index=True))
    assert found.above_float32.tolist() == pytest.approx([0.0, 0.2])
    assert found.odd_above_even.tolist() == pytest.approx([0.3, 0.0], abs=0.01)

    class Stream:
        def batch(self, start: int, size: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(start)
            return torch.randint(0, 16, (size, tiny_config.context_length + 1), generator=generator)

    config = pico.TrainConfig(batch_size=20, compile=False, learning_rate=1e-2, warmup_steps=1, precision="fp32")
    preset = pico.Preset(dataclasses.replace(tiny_config, vocab_size=64, dropout=0.0), config)
    rows = gpu_losses.train(preset, Stream(), 5, 5)
    assert rows[-1]["float32_loss"] < rows[0]["float32_loss"], "it learns that the other words never come"
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["float32_loss"], abs=1e-5), "the same weights and batch"


PAIRS = [("2.11.0+cu128", "12.8"), ("2.11.0+cu130", "13.0"), ("2.13.0+cu130", "13.0")]  # Colab's first
PIP = ["pip", "install", "--dry-run", "--quiet", "--no-deps", "--retries=0", "--timeout=5", "--target=unused"]
PIP += ["--python-version=3.12", "--platform=manylinux_2_28_x86_64", "--only-binary=:all:", "--report=-"]


def would_install(*arguments: str) -> dict[str, dict]:
    """What pip would install on Linux with Python 3.12: name -> metadata. Skips where no index can be reached."""
    answer = subprocess.run([sys.executable, "-m", *PIP, *arguments], capture_output=True, text=True)
    if answer.returncode:
        pytest.skip(f"pip cannot tell here: {answer.stderr.strip().splitlines()[-1]}")
    return {item["metadata"]["name"]: item["metadata"] for item in json.loads(answer.stdout)["install"]}


@pytest.mark.slow
@pytest.mark.parametrize("torch_version, cuda", PAIRS)
def test_pip_would_install_one_tensorrt_and_no_torch(torch_version, cuda):
    _, release = next(pico.tensorrt_packages(torch_version, cuda, list))
    found = would_install(release)  # from PyPI, which has the builds for CUDA 13
    assert list(found) == ["torch_tensorrt"]
    requirements, minor = found["torch_tensorrt"]["requires_dist"], re.escape(torch_version.rsplit(".", 1)[0])
    assert any(re.match(rf"torch<[\d.]+,>={minor}", requirement) for requirement in requirements)
    if cuda.startswith("12."):
        with pytest.raises(pico.PicoError, match="not for CUDA"):
            list(pico.tensorrt_packages(torch_version, cuda, lambda _: requirements))
        # the builds for CUDA 12, on PyTorch's own index, ask for the same with another suffix
        requirements = [requirement.replace("cu13", "cu12") for requirement in requirements]
    _, (_, *libraries) = pico.tensorrt_packages(torch_version, cuda, lambda _: requirements)
    on_pypi = [name for name in libraries if not re.match(r"tensorrt-cu\d+(<|-libs)", name)]  # the rest is NVIDIA's
    assert set(re.findall(r"cu\d+", " ".join([*libraries, *would_install(*on_pypi)]))) == {f"cu{cuda[:2]}"}
    assert not any(re.match(r"(torch|tensorrt)\b(?!-cu)", name) for name in libraries)
    assert len(libraries) >= 5
