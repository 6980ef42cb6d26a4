"""Why the shipped model's training loss lay above its held-out one while its rates were high (results/benchmarks).

    python tests/gpu_losses.py --corpus my_parquet

Trains the first steps of the full model without dropout, several times: as it is, with cuDNN's attention, which
training does not use any more, and with other changes, one at a time. Beside each step's loss stands that of the same
weights on the same fresh batch, eagerly in float32. Where `train_loss` is above `float32_loss`, the step computes
something else than the model; where both jump up and down between odd and even steps, the weights do. All steps are in
OUT/losses.csv; the table printed at the end is over each variant's last hundred steps.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import pico_helpers as pico

unchanged, with_cudnn = contextlib.nullcontext(), patch.object(pico, "without_cudnn_attention", contextlib.nullcontext)
two_kernels = unchanged
if hasattr(torch._inductor.config.triton, "mix_order_reduction"):  # new in PyTorch 2.10
    two_kernels = torch._inductor.config.patch("triton.mix_order_reduction", False)
VARIANTS = {  # changes of settings, and what else is another inside
    "as it is": ({}, unchanged),
    "cuDNN's attention, as the shipped model had it": ({}, with_cudnn),
    "the same, eager": ({"compile": False}, with_cudnn),
    "LayerNorm's gradients in two kernels": ({}, two_kernels),
    "half the rates": ({"learning_rate": 1.5e-3, "matrix_learning_rate": 0.01}, unchanged),
    "dropout": ({"dropout": 0.1}, unchanged),
}


def train(preset: pico.Preset, stream: pico.SequenceStream, steps: int, total_steps: int) -> list[dict]:
    """A row for each step: its loss, and that of the same weights and batch in float32."""
    device, config, rows = pico.default_device(), preset.train, []
    dtype = pico.choose_precision(config.precision, device)
    run = pico.TrainingRun(preset.model, config, "", device, dtype, config.compile is not False)
    for step in range(steps):
        batch = stream.batch(step * config.batch_size, config.batch_size).to(device)
        pico.set_rates(run.optimizer, step, total_steps, config)
        with pico.evaluating(run.model):
            exact = sum(run.model(part[:, :-1], part[:, 1:]) * len(part) for part in batch.split(16)) / len(batch)
        rows.append({"step": step + 1, "train_loss": run.take_step(batch), "float32_loss": exact})
    return [row | {name: float(row[name]) for name in ("train_loss", "float32_loss")} for row in rows]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over each variant's last hundred steps: the loss, its excess over float32's, odd steps over even ones."""
    rows = {}
    for name, run in table.groupby("variant", sort=False):
        last, loss = run.tail(100), run.float32_loss
        beyond = (loss - (loss.shift(1) + loss.shift(-1)) / 2).tail(100)  # its neighbours, so the trend is no matter
        odd, even = (beyond[last.step % 2 == parity].mean() / 2 for parity in (1, 0))
        excess = (last.train_loss - last.float32_loss).mean()
        rows[name] = {"train_loss": last.train_loss.mean(), "above_float32": excess, "odd_above_even": odd - even}
    return pd.DataFrame(rows).T


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="wikitext103", help="(%(default)s)")
    parser.add_argument("--corpus", default="auto", help="as for training (%(default)s)")
    parser.add_argument("--data", default="data", help="folder for token files (%(default)s)")
    parser.add_argument("--out", default="results", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=350, help="of each variant (%(default)s)")
    parser.add_argument("--total-steps", type=int, default=9177, help="of the run that begins so (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="for a trial on a CPU")
    options = parser.parse_args(arguments)
    preset = pico.get_preset(options.preset).with_changes({"corpus": options.corpus, "dropout": 0.0})
    corpus = pico.choose_corpus(preset.train.corpus, None, options.data)
    context = preset.model.context_length
    stream = pico.SequenceStream(pico.prepare_tokens(corpus, "train", options.data), context, None, 0)
    table = []
    for name, (changes, inside) in VARIANTS.items():
        torch._dynamo.reset()
        changed = preset.with_changes(changes | {"compile": False} if options.no_compile else changes)
        with inside:
            table += [{"variant": name} | row for row in train(changed, stream, options.steps, options.total_steps)]
        pico.write_csv(Path(options.out) / "losses.csv", table)
        print(summary(pd.DataFrame(table)).tail(1).to_string(header=name == "as it is"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
