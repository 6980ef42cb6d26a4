"""Everything that wants to be measured on a GPU, the most wanted first, so that the GPU never waits.

    python tests/gpu_programme.py --corpus my_parquet
    python tests/gpu_programme.py --dry-run          # the same on a CPU with tiny settings
    python tests/gpu_programme.py --full --only full headline  # in parts, into the same folder

Each step is a process with a limit of its own (--limit, seconds). A step that fails or takes too long is named and the
next one begins. A step's output is in OUT/N_name.log, its files are in OUT/N_name/; OUT/summary.csv tells status and
seconds. --full adds the run of the whole budget. Nothing is installed but TensorRT, and that not with --no-install.
Where the model that comes with the project was left behind, inference and study take the one of the step `train`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
TINY = ["--n-layer=1", "--n-head=2", "--d-model=32", "--d-ff=32", "--context-length=32", "--batch-size=2"]

# ten steps of each recipe and precision: nothing waits for the device, and the losses are those of a CPU
STEPS = """
import sys, torch, pico_helpers as pico
device, tiny = pico.default_device(), "tiny" in sys.argv
on_gpu, failed = device.type == "cuda", 0
model_config = pico.ModelConfig(dropout=0.0, **(dict(d_model=64, n_layer=1, n_head=1, d_ff=32) if tiny else {}))
tokens = torch.randint(50257, (4, 65), generator=torch.Generator().manual_seed(0))

def run(config, device, dtype):
    torch.manual_seed(0)
    model = pico.PicoLLM(model_config, 1).to(device).train()
    optimizer, guard = pico.make_optimizer(model, config), pico.LossGuard(model_config.vocab_size, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batch, losses = tokens.to(device), []
    try:
        for step in range(10):
            if device.type == "cuda" and step == 2:  # allocations of the first steps may wait
                torch.cuda.set_sync_debug_mode("error")
            losses.append(pico.train_step(model, optimizer, scaler, batch, config, step, dtype, guard).detach())
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    return torch.stack(losses).float().cpu()

kinds = {"fp32": torch.float32} | ({"fp16": torch.float16} if on_gpu else {})
kinds |= {"bf16": torch.bfloat16} if not on_gpu or torch.cuda.get_device_capability() >= (8, 0) else {}
for name in ("adamw",) if tiny else ("adamw", "muon"):
    config = pico.TrainConfig(optimizer=name)
    expected = run(config, torch.device("cpu"), torch.float32)
    for kind, dtype in kinds.items():
        try:
            found = run(config, device, dtype)
            difference = (found - expected).abs().max().item()
            failed += not difference < (0.01 if kind == "fp32" else 0.1)
            print(f"{name} {kind}: loss {found[-1]:.4f}, on a CPU {expected[-1]:.4f}, at most {difference:.4f} apart")
        except Exception as error:
            failed += 1
            print(f"{name} {kind}: {pico.first_line(error)}")
sys.exit(failed)
"""


def steps(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name, command), in order; {out} stands for the step's folder."""
    tiny, python = options.dry_run, sys.executable
    pico, profile = [python, "pico_helpers.py"], [python, "profile_training.py"]
    where = ["--corpus", options.corpus, "--data-folder", options.data]
    preset = ["--preset", "tiny" if tiny else "wikitext103"]
    train = [*pico, "train", *preset, *where, "--results", "{out}", *TINY * tiny]
    profile += [*preset, "--corpus", options.corpus, "--data", options.data, "--out", "{out}"]
    profile += ["--steps", "1", "--warmup", "0", "--repeats", "1"] if tiny else ["--steps", "20", "--warmup", "5"]
    profile += ["--no-compile", "--no-measure-peak"] if tiny else ["--repeats", "3"]
    shipped = ROOT / "results" / "pretrained" / "pico_llm.pt"
    made = Path(options.out).resolve() / "4_train" / f"pico_llm_{preset[1]}.pt"
    study = options.checkpoint or str(shipped if shipped.exists() else made)
    optimize = [*pico, "optimize", "--checkpoint", study, *where, "--results", "{out}"]
    optimize += ["--no-install"] if options.no_install or tiny else []
    few = ["--seconds", "0.01", "--variants", "PyTorch FP32"] if tiny else []
    pytorch = few or ["--variants", "PyTorch", "torch.compile"]
    engines = few or ["--variants", "TensorRT", "FP16, CUDA graph"]  # and the rows that they must beat
    others = few or ["--variants", "PyTorch", "CUDA graph"]  # what does not compile long
    one = ["--batch-sizes", "1", "--lengths", "16" if tiny else "384"]
    every = one if tiny else []  # batches of 1, 8 and 32 of 64 and 384 tokens
    found = [
        ("versions", [python, "-m", "torch.utils.collect_env"]),
        ("tests", [python, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "tests", *["--collect-only"] * tiny]),
        ("steps", [python, "-c", STEPS, *["tiny"] * tiny]),
        ("train", [*train, "--max-steps", "2" if tiny else "100"]),
        ("profile", [*profile, "--compare", "--peer", *([] if tiny else ["--torch-profiler"])]),
        ("batch_sizes", [*profile, "--batch-sizes", *(["2", "4"] if tiny else ["32", "64", "128", "256"])]),
        ("headline", [*optimize, *one, *pytorch]),
        # in a process of its own: an error of CUDA in an engine would spoil the rows that follow it
        ("tensorrt", [*optimize, *one, *engines]),
        ("shapes", [*optimize, *every, *others]),
        ("engine_shapes", [*optimize, *every, *engines]),
        ("study", [*pico, "analyze", "--checkpoint", study, *where, "--results", "{out}"]),
    ]
    full = ("full", [*train, *(["--max-steps", "3"] if tiny else [])])  # as long as it takes
    return [*found, full] if options.full else found


def run_step(command: list[str], folder: Path, limit: float) -> str:
    """Runs a step's command with its output in a file; "ok" or what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(folder) if part == "{out}" else part for part in command]
    environment = {"TORCH_LOGS": "graph_breaks,recompiles", "PYTHONUNBUFFERED": "1"} | os.environ
    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    return f"exit status {done.returncode}" if done.returncode else "ok"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="auto", help="as for training (%(default)s)")
    parser.add_argument("--checkpoint", help="for inference and study, default: the model that comes with the project")
    parser.add_argument("--data", default="data", help="folder for token files (%(default)s)")
    parser.add_argument("--out", default="results/gpu", help="(%(default)s)")
    parser.add_argument("--limit", type=float, default=570, help="seconds for a step (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="steps whose names hold one of the words")
    parser.add_argument("--full", action="store_true", help="also the run of the whole budget")
    parser.add_argument("--no-install", action="store_true", help="do not ask pip for TensorRT")
    parser.add_argument("--dry-run", action="store_true", help="tiny settings, also without a GPU")
    options = parser.parse_args(arguments)
    out, rows, failed = Path(options.out).resolve(), {}, 0
    summary, found = out / "summary.csv", steps(options)
    if options.only and summary.exists():  # of the parts before
        rows = {row["step"]: row for row in pd.read_csv(summary).to_dict("records")}
    chosen = [step for step in enumerate(found, 1) if any(word in step[1][0] for word in options.only or [""])]
    if not chosen:
        parser.error(f"no step is called so; choose from: {', '.join(name for name, _ in found)}")
    for number, (name, command) in chosen:
        started = time.perf_counter()
        status = run_step(command, out / f"{number}_{name}", options.limit)
        rows.pop(name, None)  # its files are replaced, too
        rows[name] = {"step": name, "status": status, "seconds": round(time.perf_counter() - started, 1)}
        print(f"{number} {name}: {status}, {rows[name]['seconds']} s", flush=True)
        pd.DataFrame(rows.values()).to_csv(summary, index=False)
        failed += status != "ok"
    return failed


if __name__ == "__main__":
    sys.exit(main())
