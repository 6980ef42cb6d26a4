"""Made-up results of a study with known truth, in the columns that the module's own measurements have."""

import itertools

import numpy as np
import pandas as pd
import torch

import pico_helpers as pico

KAPPAS = ("sink", "self", "previous", "local", "duplicate", "induction", "punctuation", "rare", "broad")
CLASSES = ("Diagonal/Self", "Local Context", "Token-Specific", "Global/Broad", "Mixed")


def make_capture(text: str, n_layer: int = 2, n_head: int = 2, seed: int = 0) -> pico.AttentionCapture:
    """Heads of clear kinds: head k of layer l looks mostly at itself, one back, the first token, or anywhere."""
    ids, rng = pico.get_tokenizer().encode(text), np.random.default_rng(seed)
    n = len(ids)
    distance, scores = np.subtract.outer(np.arange(n), np.arange(n)), rng.normal(0, 1, (n_layer, n_head, n, n))
    wanted = {0: distance == 0, 1: distance == 1, 2: np.arange(n) == 0}
    for layer, head in np.ndindex(n_layer, n_head):
        scores[layer, head] += 4.0 * wanted.get((layer * n_head + head) % 5, 0)
    weights = np.exp(scores) * np.tri(n)
    weights = torch.tensor(weights / weights.sum(-1, keepdims=True), dtype=torch.float32)
    return pico.AttentionCapture(text, ids, pico.get_tokenizer().labels(ids), weights)


def make_study(n_layer: int = 2, n_head: int = 2, trained: bool = True, seed: int = 0) -> pico.Study:
    """A Study. With `trained`, half of the heads have a kind; without, nothing stands out."""
    rng, rows, shares, baselines = np.random.default_rng(seed), [], [], []
    for layer, head in np.ndindex(n_layer, n_head):
        values = {name: rng.normal(0, 0.02) for name in KAPPAS} | {"broad": rng.uniform(0.95, 1.0)}
        name = "Global/Broad"
        if trained and head % 2 == 0:
            kind, name = ("previous", "local", "induction")[layer % 3], CLASSES[layer % 3]
            values |= {kind: rng.uniform(0.5, 0.9), "broad": rng.uniform(0.2, 0.6)}
        elif trained and head == 1:
            values, name = values | {"sink": 0.8, "broad": 0.7}, "Mixed"
        values |= {"mean_distance": rng.uniform(1, 20), "entropy": rng.uniform(1, 4), "resting": False}
        rows.append({"layer": layer, "head": head, **values, "sink_flag": values["sink"] > 0.3, "class": name})
    scores = pd.DataFrame(rows)
    for model, name in itertools.product(pico.MODEL_NAMES, (*CLASSES, "Specialised")):
        share, reach = scores["class"].isin(CLASSES[:3] if name == "Specialised" else [name]).mean(), 0.03
        if model in ("untrained", "uniform"):
            share, reach = float(name == "Global/Broad"), 0.03 * (model == "untrained")
        shares.append((model, name, share, max(0.0, share - reach), min(1.0, share + reach)))
    for model, score in itertools.product(pico.MODEL_NAMES, (*KAPPAS, "mean_distance", "entropy")):
        by_chance = {"broad": 0.98, "mean_distance": 30.0, "entropy": 4.1}.get(score, 0.01)
        value = by_chance if model in ("untrained", "uniform") else float(scores[score].max())
        baselines.append((model, score, value, value - 0.02, value + 0.02))
    mean, spread, error = (0.02, 0.01, 0.001) if trained else (0.0, 1e-5, 1e-4)
    increase = rng.normal(mean, spread, len(scores))
    ablation = scores[["layer", "head"]].assign(loss_increase=increase, loss=4.0 + increase, standard_error=error)
    kinds = scores["class"].value_counts().reindex(CLASSES[:3]).dropna().astype(int).rename_axis("class")
    by_class = kinds.reset_index(name="n_heads").assign(loss_increase=0.3, low=0.2, high=0.4, n_random_sets=9)
    by_class = by_class.assign(compared_loss_increase=0.25, random_loss_increase=0.01, excess_low=0.2, p_value=0.01)
    points = rng.normal(0, 1, (len(scores), 3)) + 3 * (np.arange(len(scores)) % 3)[:, None]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    tables = {"shares": pd.DataFrame(shares, columns=["model", "class", "share", "low", "high"])}
    tables["baselines"] = pd.DataFrame(baselines, columns=["model", "score", "highest", "low", "high"])
    tables |= {"ablation": ablation.assign(matters=increase > 5 * error), "class_ablation": by_class, "scores": scores}
    tables |= {"categories": make_categories(trained), "language": make_language(trained)}
    tables |= {"history": make_history(scores), "metrics": pd.DataFrame(METRICS)}
    others = {"distances": distances / (1.2 * distances.max()), "other_text": 0.05}
    others["settings"] = {"n_windows": 200, "ablation_windows": 8}
    return pico.Study(**tables, **others, thresholds=pico.ScoreThresholds())


METRICS = [
    {"step": step, "train_loss": 10 - step / 100, "val_loss": 10.1 - step / 100 if step % 200 == 0 else None}
    | {
        "tokens": 1000 * step,
        "tokens_total": 1000 * step,
        "seconds": step / 10,
        "tokens_per_second": 10_000.0,
        "learning_rate": 1e-3,
    }
    for step in range(0, 601, 100)
]


def make_history(scores: pd.DataFrame) -> pd.DataFrame:
    """The heads on held-out text at five snapshots of a run, growing to what they are in the end."""
    grown = [scores.assign(step=step, tokens=1000 * step) for step in (0, 150, 300, 450, 600)]
    for table in grown[:3]:
        table[list(pico.KAPPAS)] *= table["step"].iloc[0] / 600
    return pd.concat(grown, ignore_index=True)


def make_categories(trained: bool = True) -> pd.DataFrame:
    rows = []
    for index, category in enumerate(pico.ALL_TEST_CATEGORIES):
        shares = dict.fromkeys(pico.HEAD_CLASSES, 0.0) | {"Global/Broad": 1.0}
        if trained:
            shares = dict.fromkeys(pico.HEAD_CLASSES, 0.1) | {"Diagonal/Self": 0.1 + index / 50}
            shares["Mixed"] = 1 - sum(share for name, share in shares.items() if name != "Mixed")
        rows += [(category, *share) for share in shares.items()]
    return pd.DataFrame(rows, columns=["category", "class", "share"])


def make_language(trained: bool = True) -> pd.DataFrame:
    names = ["Subject and verb", "Coreference", "Negation", "Questions", "Articles & nouns"]
    claims = [f"The model handles {name.lower()}" for name in names]
    table = pd.DataFrame({"phenomenon": names, "claim": claims, "n_items": 40, "chance_accuracy": 0.5})
    accuracy = 0.8 - 0.1 * table.index if trained else 0.5
    effect = (0.2 - 0.05 * table.index if trained else 0.0 * table.index).to_numpy().round(10)
    drop, is_found, asked = 2 * effect, effect > 0.1, table.index < 4
    table = table.assign(accuracy=accuracy, accuracy_low=accuracy - 0.08, accuracy_high=accuracy + 0.08)
    table = table.assign(untrained_accuracy=0.49, untrained_accuracy_highest=0.52, heads="L1H0, L1H1")
    table = table.assign(attention_difference=effect, attention_low=effect - 0.05, attention_high=effect + 0.05)
    table = table.assign(untrained_attention_highest=0.03, p_value=np.where(is_found, 0.001, 0.4))
    table = table.assign(loss_increase=effect / 10, loss_error=0.001, margin_drop=drop, margin_low=drop - 0.1)
    table = table.assign(margin_high=drop + 0.1, single_drops="L1H0 0.10, L1H1 0.20", n_random_sets=99 * asked)
    for name, value in {"drop": 0.02, "low": -0.01, "high": 0.06}.items():
        table[f"random_margin_{name}"] = np.where(asked, value, np.nan)
    table["apart_margin_drop"] = np.where(asked, 0.05, np.nan)
    table["needs_p_value"] = np.where(asked, np.where(is_found, 0.01, 0.5), np.nan)
    table["verdict"] = np.where(is_found, "supported", "undecided" if trained else "not supported")
    return table.assign(reason="made up for a test")
