"""Everything that wants to be measured on a GPU, the most wanted first, so that the GPU never waits.

    python tests/gpu_programme.py --corpus my_parquet
    python tests/gpu_programme.py --dry-run          # the same on a CPU with tiny settings
    python tests/gpu_programme.py --full --only full headline  # in parts, into the same folder

Each step is a process with a limit of its own (--limit, seconds). A step that fails or takes too long is named and the
next one begins. Every step's output is in OUT/N_name.log, its files are in OUT/N_name/, and OUT/summary.csv (written
after each step) tells status and seconds. --only runs the steps whose names hold one of the words; --full adds the run
of the whole budget. Nothing is installed but TensorRT, and that not with --no-install. Where the model that comes with
the project was left behind, inference and study take the one that the step `train` made.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ["--n-layer=1", "--n-head=2", "--d-model=32", "--d-ff=32", "--context-length=32", "--batch-size=2"]

VERSIONS = """
import torch, pico_helpers as pico
print(torch.__version__, "CUDA", torch.version.cuda, pico.measured_on(pico.default_device()))
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU")
"""

# ten steps of each recipe and precision: nothing waits for the device, and the losses are those of a CPU
STEPS = """
import contextlib, sys, dataclasses, torch, pico_helpers as pico
device, tiny = pico.default_device(), "tiny" in sys.argv
model_config = pico.ModelConfig(dropout=0.0, **(dict(d_model=64, n_layer=1, n_head=1, d_ff=32) if tiny else {}))
tokens = torch.randint(50257, (4, 65), generator=torch.Generator().manual_seed(0))

@contextlib.contextmanager
def no_waiting(on):
    if on:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on:
            torch.cuda.set_sync_debug_mode("default")

def run(config, device, dtype):
    torch.manual_seed(0)
    model = pico.PicoLLM(model_config, 1).to(device).train()
    optimizer, guard = pico.make_optimizer(model, config), pico.LossGuard(model_config.vocab_size, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batch, losses = tokens.to(device), []
    for step in range(10):
        with no_waiting(device.type == "cuda" and step > 1):  # allocations of the first steps may wait
            losses.append(pico.train_step(model, optimizer, scaler, batch, config, step, dtype, guard).detach())
    return torch.stack(losses).float().cpu()

failed = 0
for name in ("adamw",) if tiny else ("adamw", "muon"):
    config = pico.TrainConfig(optimizer=name)
    expected = run(config, torch.device("cpu"), torch.float32)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for kind, dtype in kinds.items():
        if device.type == "cuda" and kind == "bf16" and torch.cuda.get_device_capability() < (8, 0):
            continue
        if device.type == "cpu" and kind == "fp16":
            continue
        try:
            found = run(config, device, dtype)
            difference = (found - expected).abs().max().item()
            failed += not difference < {"fp32": 0.01}.get(kind, 0.1)
            print(f"{name} {kind}: loss {found[-1]:.4f}, on a CPU {expected[-1]:.4f}, at most {difference:.4f} apart")
        except Exception as error:
            failed += 1
            print(f"{name} {kind}: {type(error).__name__}: {str(error).splitlines()[0]}")
sys.exit(failed)
"""


def steps(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name, command), in order; {out} stands for the step's folder."""
    tiny, python = options.dry_run, sys.executable
    pico, profile = [python, "pico_helpers.py"], [python, "profile_training.py"]
    where = ["--corpus", options.corpus, "--data-folder", options.data]
    preset = ["--preset", "tiny" if tiny else "wikitext103"]
    train = [*pico, "train", *preset, *where, "--results", "{out}", *(TINY if tiny else [])]
    short = ["--steps", "1", "--warmup", "0", "--repeats", "1", "--no-compile", "--no-measure-peak"] if tiny else []
    profile += [*preset, "--corpus", options.corpus, "--data", options.data, "--out", "{out}", *short]
    shipped = ROOT / "results" / "pretrained" / "pico_llm.pt"
    made = Path(options.out).resolve() / "4_train" / f"pico_llm_{preset[1]}.pt"
    study = options.checkpoint or str(shipped if shipped.exists() else made)
    optimize = [*pico, "optimize", "--checkpoint", study, *where, "--results", "{out}"]
    optimize += ["--no-install"] if options.no_install or tiny else []
    few = ["--seconds", "0.01", "--variants", "PyTorch FP32"] if tiny else []
    pytorch = few or ["--variants", "PyTorch", "torch.compile"]
    engines = few or ["--variants", "TensorRT", "FP16, CUDA graph"]  # and the rows that they must beat
    others = few or ["--variants", "PyTorch", "CUDA graph"]  # what does not compile long
    only_list = ["--collect-only"] if tiny else []
    brief = [] if tiny else ["--steps", "20", "--warmup", "5", "--repeats", "3"]
    batches = ["2", "4"] if tiny else ["32", "64", "128", "256"]
    lengths, sizes = (["16"], ["1"]) if tiny else (["64", "384"], ["1", "8", "32"])
    found = [
        ("versions", [python, "-c", VERSIONS]),
        ("tests", [python, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "tests", *only_list]),
        ("steps", [python, "-c", STEPS, *(["tiny"] if tiny else [])]),
        ("train", [*train, "--max-steps", "2" if tiny else "100"]),
        ("profile", [*profile, *brief, "--compare", "--peer", *([] if tiny else ["--torch-profiler"])]),
        ("batch_sizes", [*profile, *brief, "--batch-sizes", *batches]),
        ("headline", [*optimize, "--batch-sizes", "1", "--lengths", lengths[-1], *pytorch]),
        # in a process of its own: an error of CUDA in an engine would spoil the rows that follow it
        ("tensorrt", [*optimize, "--batch-sizes", "1", "--lengths", lengths[-1], *engines]),
        ("shapes", [*optimize, "--batch-sizes", *sizes, "--lengths", *lengths, *others]),
        ("engine_shapes", [*optimize, "--batch-sizes", *sizes, "--lengths", *lengths, *engines]),
        ("study", [*pico, "analyze", "--checkpoint", study, *where, "--results", "{out}"]),
    ]
    if options.full:  # as long as it takes
        found.append(("full", [*train, *(["--max-steps", "3"] if tiny else [])]))
    return found


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
    out, rows = Path(options.out).resolve(), []
    out.mkdir(parents=True, exist_ok=True)
    if options.only and (out / "summary.csv").exists():  # of the parts before
        rows = list(csv.DictReader((out / "summary.csv").read_text(encoding="utf-8").splitlines()))
    found, failed = list(enumerate(steps(options), 1)), 0
    words = options.only or [""]
    chosen = [step for step in found if any(word in step[1][0] for word in words)]
    if not chosen:
        parser.error(f"no step is called so; choose from: {', '.join(name for _, (name, _) in found)}")
    for number, (name, command) in chosen:
        started = time.perf_counter()
        status = run_step(command, out / f"{number}_{name}", options.limit)
        rows = [row for row in rows if row["step"] != name]  # its files are replaced, too
        rows.append({"step": name, "status": status, "seconds": round(time.perf_counter() - started, 1)})
        print(f"{number} {name}: {status}, {rows[-1]['seconds']} s", flush=True)
        with open(out / "summary.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        failed += status != "ok"
    return failed


if __name__ == "__main__":
    sys.exit(main())
