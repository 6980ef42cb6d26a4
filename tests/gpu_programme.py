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
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
TINY = ["--n-layer=1", "--n-head=2", "--d-model=32", "--d-ff=32", "--context-length=32", "--batch-size=2"]
QUICK = ["--steps", "1", "--warmup", "0", "--repeats", "1", "--no-compile", "--no-measure-peak"]
ONE_ROW = ["--batch-sizes=1", "--lengths=16", "--seconds=0.01", "--variants=TensorRT", "--no-install"]


def steps(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name, command), in order; {out} stands for the step's folder."""
    tiny, python = options.dry_run, sys.executable
    pico, corpus, preset = [python, "pico_helpers.py"], ["--corpus", options.corpus], "tiny" if tiny else "wikitext103"
    where = [*corpus, "--data-folder", options.data, "--results", "{out}"]
    train = [*pico, "train", "--preset", preset, *where, *TINY * tiny]
    profile = [python, "profile_training.py", "--preset", preset, *corpus, "--data", options.data, "--out", "{out}"]
    profile += ["--steps", "20", "--warmup", "5", "--repeats", "3", *QUICK * tiny]
    shipped = ROOT / "results" / "pretrained" / "pico_llm.pt"
    made = Path(options.out).resolve() / "3_train" / f"pico_llm_{preset}.pt"
    study = options.checkpoint or str(shipped if shipped.exists() else made)
    optimize = [*pico, "optimize", "--checkpoint", study, *where, *["--no-install"] * options.no_install]
    one, row = ["--batch-sizes", "1", "--lengths", "384"], ONE_ROW * tiny  # else batches of 1, 8 and 32; 64 and 384
    engines = ["--variants", "TensorRT", "FP16, CUDA graph", *row]  # and the rows that they must beat
    trial = ["--preset", "tiny", "--steps", "2", "--no-compile"] * tiny
    losses = [python, "tests/gpu_losses.py", *corpus, "--data", options.data, "--out", "{out}", *trial]
    found = [
        ("versions", [python, "-m", "torch.utils.collect_env"]),
        ("tests", [python, "-m", "pytest", "-o", "addopts=-n4", "-m", "gpu", "tests", *["--collect-only"] * tiny]),
        ("train", [*train, "--max-steps", "2" if tiny else "100"]),
        ("profile", [*profile, "--compare", "--peer", *["--torch-profiler"] * (not tiny)]),
        ("batch_sizes", [*profile, "--batch-sizes", *(["2", "4"] if tiny else ["32", "64", "128", "256"])]),
        ("headline", [*optimize, *one, "--variants", "PyTorch", "torch.compile", *row]),
        # in a process of its own: an error of CUDA in an engine would spoil the rows that follow it
        ("tensorrt", [*optimize, *one, *engines]),
        ("shapes", [*optimize, "--variants", "PyTorch", "CUDA graph", *row]),  # what does not compile long
        ("engine_shapes", [*optimize, *engines]),
        ("losses", losses),
        ("study", [*pico, "analyze", "--checkpoint", study, *where]),
    ]
    full = ("full", [*train, *["--max-steps", "3"] * tiny])  # as long as it takes
    return [*found, full] if options.full else found


def run_step(command: list[str], folder: Path, limit: float) -> str:
    """Runs a step's command with its output in a file; "ok" or what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(folder) if part == "{out}" else part for part in command]
    environment = {"TORCH_LOGS": "graph_breaks,recompiles", "PYTHONUNBUFFERED": "1"} | os.environ
    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        where = {"cwd": ROOT, "env": environment, "start_new_session": True}
        with subprocess.Popen(command, stdout=log, stderr=log, **where) as process:
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its own processes, too, or the next step would share the GPU
                return f"stopped after {limit:.0f} s"
    return f"exit status {status}" if status else "ok"


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
    out, rows = Path(options.out).resolve(), {}
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
    return sum(rows[name]["status"] != "ok" for _, (name, _) in chosen)


if __name__ == "__main__":
    sys.exit(main())
