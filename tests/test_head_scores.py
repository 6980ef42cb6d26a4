"""Head scores, ablation and similarity against heads whose truth is known."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import pico_helpers as ph

CONFIG = ph.ModelConfig(
    vocab_size=256, d_model=32, n_layer=2, n_head=2, d_ff=32, context_length=64, max_positions=128, dropout=0.1
)
TEXT_CONFIG = dataclasses.replace(CONFIG, vocab_size=50257)  # reads real sentences
SENTENCES = [
    "The cat sat on the mat.",
    "The old dog, which was tired, slept near the fire.",
    "John said that he would come, but he did not come.",
    "Why is the sky blue?",
    "It is not the case that the bird sang.",
]
COMMA, PERIOD = 11, 13  # GPT-2 ids


def strong_model(config=CONFIG, seed=0, scale=8.0):
    """An untrained model with weights so large that its heads do something."""
    model = ph.PicoLLM(config, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def random_windows(n, length, seed=0, vocab_size=256):
    return torch.randint(0, vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


# ---- synthetic heads -----------------------------------------------------------------------------


def some_tokens(length, seed):
    """Tokens with copies, punctuation and one rare token (255) early on."""
    random = np.random.default_rng(seed)
    ids = random.integers(32, 44, length)
    ids[random.choice(np.arange(1, length), max(1, length // 8), replace=False)] = COMMA
    ids[1 + seed % 3] = 255
    return torch.tensor(ids)


COUNTS = np.full(256, 100)
COUNTS[255] = 1


def wanted_keys(name, ids):
    """What the ideal head of that name looks at, row by row, written out plainly (positions from 0)."""
    n = ids.tolist()
    frequency = [COUNTS[t] for t in n]

    def keys(i):
        if name == "sink":
            return [0]
        if name == "self":
            return [i]
        if name == "previous":
            return [i - 1]
        if name == "local":
            return [i - 2, i - 1, i]
        if name == "duplicate":
            return [j for j in range(1, i) if n[j] == n[i]]
        if name == "induction":
            return [j + 1 for j in range(i - 1) if n[j] == n[i]]
        if name == "punctuation":
            return [j for j in range(1, i) if n[j] in (COMMA, PERIOD)]
        if name == "rare":
            return [j for j in range(1, i) if frequency[j] == min(frequency[1 : i + 1])]
        return list(range(i + 1))  # uniform

    return [[j for j in keys(i) if j >= 0] for i in range(len(n))]


def ideal_map(name, ids):
    """(T, T): all weight on the wanted keys, alike; rows without any rest on the first token."""
    weights = torch.zeros(len(ids), len(ids))
    for i, keys in enumerate(wanted_keys(name, ids)):
        weights[i, keys or [0]] = 1 / len(keys or [0])
    return weights


def synthetic_table(heads, sequences, repeats=None, thresholds=None):
    """Scores of heads given as functions ids -> (T, T) map, through the code that scores a model."""

    def attend(idx, reduce):
        reduce(0, torch.stack([torch.stack([head(ids) for head in heads]) for ids in idx]))

    counts = torch.tensor(COUNTS)
    repeats = list(ph.repeated_random_tokens(4, 64, 256)) if repeats is None else repeats
    sums = ph.HeadSums(*(ph._collect_sums(attend, ids, counts, "cpu") for ids in (sequences, repeats)))
    return sums.table(thresholds)


def ideal(name):
    return lambda ids: ideal_map(name, ids)


def mixture(share, one, other):
    return lambda ids: share * ideal_map(one, ids) + (1 - share) * ideal_map(other, ids)


@pytest.mark.parametrize("length", [8, 12, 33, 64, 128])
def test_uniform_head_scores_zero_and_ideal_head_one_at_every_length(length):
    sequences = [some_tokens(length, seed) for seed in range(6)]
    table = synthetic_table([ideal("uniform"), *map(ideal, ph.KAPPAS)], sequences)
    uniform = table.iloc[0]
    for name in ph.KAPPAS:
        assert abs(uniform[name]) < 1e-5, name
    assert abs(uniform["broad"] - 1) < 1e-5
    for row, name in enumerate(ph.KAPPAS, start=1):
        assert table.iloc[row][name] == pytest.approx(1, abs=1e-5), name
    assert uniform["class"] == "Global/Broad" and not uniform["sink_flag"]


@pytest.mark.parametrize("length", [20, 64])
def test_each_head_gets_its_class_with_and_without_a_sink(length):
    expected = {
        "self": "Diagonal/Self",
        "previous": "Diagonal/Self",
        "local": "Local Context",
        "duplicate": "Token-Specific",
        "induction": "Token-Specific",
        "punctuation": "Token-Specific",
        "rare": "Token-Specific",
        "uniform": "Global/Broad",
    }
    sequences = [some_tokens(length, seed) for seed in range(6)]
    heads = [mixture(share, "sink", name) for share in (0, 0.5) for name in expected]
    table = synthetic_table(heads, sequences)
    assert table["class"].tolist() == 2 * list(expected.values())
    with_sink = table.iloc[len(expected) :]
    assert with_sink["sink_flag"].all() and not with_sink["resting"].any()
    for (_, row), name in zip(with_sink.iterrows(), expected, strict=True):  # the sink does not hide what the rest does
        if name != "uniform":
            assert row[name] == pytest.approx(1, abs=1e-5)


def test_resting_head_is_resting_whatever_the_little_rest_does():
    sequences = [some_tokens(64, seed) for seed in range(3)]
    table = synthetic_table(
        [mixture(0.95, "sink", "previous"), ideal("sink"), mixture(0.85, "sink", "previous")], sequences
    )
    assert table["class"].tolist() == ["Resting", "Resting", "Diagonal/Self"]
    assert table["resting"].tolist() == [True, True, False]
    assert np.isfinite(table.drop(columns="class").to_numpy(float)).all()
    assert table["previous"][1] == 0  # no weight left to score


def test_half_a_head_scores_a_half():
    sequences = [some_tokens(length, 0) for length in (10, 30, 100)]
    table = synthetic_table([mixture(0.5, name, "uniform") for name in ("previous", "punctuation", "rare")], sequences)
    # in rows where the ideal head has nothing to look at it rests on the sink; only `previous` has none of these
    assert table["previous"][0] == pytest.approx(0.5, abs=0.02)
    assert 0.4 < table["punctuation"][1] < 0.6 and 0.4 < table["rare"][2] < 0.6


def test_self_attention_is_never_attention_to_content():
    """A diagonal head sits on punctuation, copies and rare tokens whenever it is there; that must not count."""
    table = synthetic_table([ideal("self")], [some_tokens(64, seed) for seed in range(6)])
    for name in ("duplicate", "induction", "punctuation", "rare"):
        assert table[name][0] < 0, name


def test_mean_distance_and_entropy():
    table = synthetic_table([ideal("self"), ideal("previous"), ideal("uniform")], [some_tokens(10, 0)])
    assert table["mean_distance"].tolist() == pytest.approx([0, 0.9, np.mean([i / 2 for i in range(10)])], abs=1e-5)
    assert table["entropy"].tolist() == pytest.approx([0, 0, np.mean(np.log(np.arange(1, 11)))], abs=1e-5)


def test_rarest_token_so_far_not_of_the_whole_text():
    ids = torch.tensor([40, 41, 42, 43, 255, 44, 45])
    keys = ph._key_sets(ids[None], torch.tensor(COUNTS), ph._punctuation_tokens())[0, -1]
    assert keys[5:].nonzero().tolist() == [[0, 4], [1, 4]]
    assert not keys[4].any()  # the rarest token is not asked to look at itself


def test_kappa_with_and_without_the_sink():
    maps = torch.stack([mixture(0.7, "sink", "previous")(some_tokens(40, 0)), ideal_map("uniform", some_tokens(40, 0))])
    previous = torch.ones(40, 40).tril(-1).triu(-1).bool()
    assert ph.kappa(maps[None], previous[None], without_sink=True)[0].tolist() == pytest.approx([1, 0], abs=1e-5)
    raw = ph.kappa(maps[None], previous[None])[0]
    assert raw[0] == pytest.approx(0.3, abs=0.05) and raw[1] == pytest.approx(0, abs=1e-5)
    everything = torch.ones(40, 40, dtype=torch.bool)  # no row has a choice
    assert ph.kappa(maps[None], everything[None])[0].tolist() == [0, 0]


def test_kappa_by_hand():
    """Three rows, key 1: chance 1/1 (skipped), 1/2, 1/3; (0.8 - 0.5 + 0.4 - 1/3) / (0.5 + 2/3)."""
    weights = torch.tensor([[1, 0, 0], [0.8, 0.2, 0], [0.4, 0.3, 0.3]])
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[:, 0] = True
    expected = (0.8 - 0.5 + 0.4 - 1 / 3) / (0.5 + 2 / 3)
    assert ph.kappa(weights[None, None], mask[None]).item() == pytest.approx(expected)


def test_classes_follow_the_thresholds():
    scores = {name: np.zeros(3) for name in (*ph.KAPPAS, "broad")} | {"rest": np.ones(3)}
    scores["previous"] = np.array([0.35, 0.35, 0.2])
    scores["local"] = np.array([0.5, 0.9, 0.2])  # previous is most of the window, a third of it, nothing
    base = ph.ScoreThresholds()
    assert ph.classify_heads(scores, base).tolist() == ["Diagonal/Self", "Local Context", "Mixed"]
    higher = dataclasses.replace(base, tau=base.tau | {"previous": 0.4, "local": 0.6})
    assert ph.classify_heads(scores, higher).tolist() == ["Mixed", "Local Context", "Mixed"]
    scores["induction"] = np.full(3, 0.6)
    assert ph.classify_heads(scores, base).tolist() == ["Token-Specific", "Local Context", "Token-Specific"]


# ---- inputs --------------------------------------------------------------------------------------


def test_repeated_tokens_cannot_be_followed_by_position():
    idx = ph.repeated_random_tokens(9, 128, 50257, seed=1)
    assert torch.equal(idx, ph.repeated_random_tokens(9, 128, 50257, seed=1))
    assert not torch.equal(idx, ph.repeated_random_tokens(9, 128, 50257, seed=2))
    keys = ph._key_sets(idx, torch.ones(50257, dtype=torch.int64), ph._punctuation_tokens())[
        :, ph.KAPPAS.index("induction") - 1
    ]
    assert keys.any(-1).float().mean() > 0.3  # there is something to find
    for offset in range(0, 64):
        back = (torch.arange(128) - offset).clamp(min=0)
        weights = torch.eye(128)[back].expand(9, 1, 128, 128)
        assert ph.kappa(weights, keys, without_sink=True).mean() < 0.15, offset


def test_repeated_tokens_are_known_to_the_model():
    counts = np.zeros(50257, np.int64)
    counts[2000:4000] = 60
    idx = ph.repeated_random_tokens(4, 64, 50257, counts=counts)
    assert idx.min() >= 2000 and idx.max() < 4000


def test_punctuation_tokens():
    marks = ph._punctuation_tokens()
    encode = ph.get_tokenizer().encode
    for text, expected in {
        ",": True,
        " (": True,
        "...": True,
        " the": False,
        "\n": False,
        "5": False,
        " --": True,
    }.items():
        (token,) = encode(text)
        assert bool(marks[token]) is expected, text


def test_token_counts(tmp_path):
    tokens = np.array([5, 5, 7, 50256], np.uint16)
    file = ph.TokenFile(tmp_path, "test", "test", 4, tokens, np.array([0, 4]))
    counts = ph.token_counts(file)
    assert counts.shape == (50257,) and counts.sum() == 4
    assert counts[5] == 2 and counts[7] == 1 and counts[50256] == 1


# ---- scores of models ----------------------------------------------------------------------------


def test_score_heads_table():
    table = ph.score_heads(ph.PicoLLM(TEXT_CONFIG), SENTENCES)
    assert table.columns.tolist() == ["layer", "head", *ph.HEAD_SCORES, "resting", "sink_flag", "class"]
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert table["resting"].dtype == bool and table["sink_flag"].dtype == bool
    assert set(table["class"]) <= set(ph.HEAD_CLASSES)


def test_batching_does_not_change_scores(monkeypatch):
    """Texts of mixed lengths, in batches or one by one, in any order; a table is a ratio of sums over them."""
    model = strong_model()
    sequences = [some_tokens(length, seed) for seed, length in enumerate([9, 30, 9, 17, 9, 30])]
    counts = torch.tensor(COUNTS)

    def sums(sequences):
        return ph._collect_sums(lambda idx, reduce: ph.stream_attention(model, idx, reduce), sequences, counts, "cpu")

    batched = sums(sequences)
    assert np.allclose(batched[:, ::-1], sums(sequences[::-1]), atol=1e-4)
    monkeypatch.setattr(ph, "_MAX_MAP", 1)
    assert np.allclose(batched, sums(sequences), atol=1e-4)
    assert np.allclose(batched, np.concatenate([sums([ids]) for ids in sequences], axis=1), atol=1e-4)


def test_scoring_leaves_the_model_as_it_was():
    model = ph.PicoLLM(CONFIG).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (ph.score_heads(model, idx=random_windows(3, 64)) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)  # no dropout while scoring
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments", [{}, {"texts": SENTENCES, "idx": random_windows(1, 8)}, {"texts": []}, {"texts": ["a", ""]}]
)
def test_bad_input_is_refused(arguments):
    with pytest.raises(ph.PicoError):
        ph.score_heads(ph.PicoLLM(TEXT_CONFIG), **arguments)


def test_other_counts_make_another_token_rare():
    windows = random_windows(2, 64)
    model = strong_model()
    with pytest.raises(ph.PicoError):
        ph.score_heads(model, idx=windows, token_counts=np.ones(10))
    counts = np.arange(256)
    one, other = (ph.score_heads(model, idx=windows, token_counts=c)["rare"] for c in (counts, counts[::-1].copy()))
    assert not np.allclose(one, other, atol=1e-3)


def test_very_short_texts_score_nothing():
    table = ph.score_heads(ph.PicoLLM(TEXT_CONFIG), ["Hi", "Hello there"])
    assert (table[[*ph.KAPPAS[1:5], "punctuation", "rare"]] == 0).all().all()


def test_many_windows_need_no_more_memory_than_a_few():
    """Peak memory of a fresh process; all layers of 40 windows would take 660 MB, one layer of them 165 MB."""
    code = """
import resource, torch, pico_helpers as ph
torch.set_num_threads(1)
model = ph.PicoLLM(ph.ModelConfig(vocab_size=256, d_model=56, n_layer=4, n_head=7, d_ff=32))
windows = torch.randint(0, 256, (40, 384))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
ph.score_heads(model, idx=windows[:4])
before = peak()
ph.score_heads(model, idx=windows)
print(peak() - before)
"""
    memory = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors go back to the system
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | memory
    )
    assert float(result.stdout) < 60  # MB


def test_shares_interval_comes_from_resampling_texts():
    """Half the texts say previous-token, half uniform: the share is certain of neither; equal texts are certain."""
    sequences = [some_tokens(40, seed) for seed in range(8)]
    repeats = list(ph.repeated_random_tokens(4, 64, 256))

    def sums(previous_texts):
        def attend(idx, reduce):
            maps = [
                ideal_map(
                    "previous" if any(torch.equal(ids, s) for s in sequences[:previous_texts]) else "uniform", ids
                )
                for ids in idx
            ]
            reduce(0, torch.stack(maps)[:, None])

        return ph.HeadSums(
            *(ph._collect_sums(attend, ids, torch.tensor(COUNTS), "cpu") for ids in (sequences, repeats))
        )

    def diagonal(some_sums):
        shares = ph.class_shares(some_sums, ph.ScoreThresholds(), n_bootstrap=400).set_index("class")
        assert shares["share"].drop("Specialised").sum() == pytest.approx(1)
        assert shares.loc["Specialised"].tolist() == shares.loc["Diagonal/Self"].tolist()
        return shares.loc["Diagonal/Self"].tolist()

    assert diagonal(sums(8)) == [1, 1, 1]
    assert diagonal(sums(0)) == [0, 0, 0]
    assert diagonal(sums(3)) == [1, 0, 1]
    assert diagonal([sums(8), sums(0)]) == [0.5, 0, 1]  # two models: mean and range


def test_thresholds_are_the_largest_percentile_but_at_least_the_floor():
    low = pd.DataFrame(dict.fromkeys(ph.KAPPAS, np.linspace(-0.1, 0.1, 101)))
    high = low.assign(previous=np.linspace(0, 1, 101))
    thresholds = ph.score_thresholds(low, high, broad=0.8)
    assert thresholds.tau["previous"] == pytest.approx(0.99)
    assert thresholds.tau["local"] == thresholds.floor == 0.3
    assert dataclasses.asdict(thresholds)["broad"] == 0.8


def induction_model():
    """A model with the circuit of Olsson et al. 2022 written into its weights; its other two heads are uniform.

    The residual stream holds the token in dimensions 0-15 and, after layer 0, the previous token in 16-31. Head (0, 0)
    copies the previous token there, by position alone; head (1, 0) looks for keys whose previous token is the query.
    """
    config = ph.ModelConfig(256, 64, n_layer=2, n_head=2, d_ff=8, context_length=64, rope_theta=1e8, dropout=0.0)
    model = ph.PicoLLM(config)
    token, before, constant = range(16), range(16, 32), 63
    slow = [*range(8, 16), *range(24, 32)]  # dimensions of a head that the rotation leaves almost as they are
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.token_embedding.weight.zero_()
        signs = torch.randint(0, 2, (256, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        model.token_embedding.weight[:, :16] = signs
        for block in model.blocks:
            block.attention_norm.weight.fill_(1)
        first, second = (block.attention for block in model.blocks)
        model.blocks[0].attention_norm.weight[constant] = 0
        model.blocks[0].attention_norm.bias[constant] = 1
        q, k, v = (first.qkv_proj.weight[part * 64 : part * 64 + 32] for part in range(3))  # head 0
        q[:4, constant] = 20  # one constant query, whose product with the key is largest one position back
        k[:, constant] = ph.apply_rope(q[:, constant], model.rope_cos[1], model.rope_sin[1])
        v[range(16), token] = 1
        first.out_proj.weight[before, range(16)] = 0.5
        q, k, v = (second.qkv_proj.weight[part * 64 : part * 64 + 32] for part in range(3))
        q[slow, token] = 3
        k[slow, before] = 3
        v[range(16), token] = 1
        second.out_proj.weight[token, range(16)] = 2
    return model


def test_a_built_in_induction_circuit_is_found_and_matters():
    model = induction_model()
    windows = random_windows(6, 64)
    table = ph.score_heads(model, idx=windows).set_index(["layer", "head"])
    assert table.loc[(0, 0), "previous"] > 0.95 and table.loc[(0, 0), "class"] == "Diagonal/Self"
    assert table.loc[(1, 0), "induction"] > 0.9 and table.loc[(1, 0), "class"] == "Token-Specific"
    for uniform in [(0, 1), (1, 1)]:
        assert table.loc[uniform, list(ph.KAPPAS)].abs().max() < 1e-5
        assert table.loc[uniform, "class"] == "Global/Broad"
    assert table["induction"].drop((1, 0)).max() < 0.1
    with ph.ablate_heads(model, [(0, 0)]):  # the induction head reads what the previous-token head wrote
        assert ph.score_heads(model, idx=windows)["induction"].max() < 0.1
    ablation = ph.head_ablation_map(model, ph.repeated_random_tokens(8, 64, 256, seed=5)).set_index(["layer", "head"])
    increase, error = ablation["loss_increase"], ablation["standard_error"]
    assert increase[0, 0] > 5 * error[0, 0] and increase[1, 0] > 5 * error[1, 0]
    assert increase[[(0, 1), (1, 1)]].abs().max() < 1e-4


# ---- ablation ------------------------------------------------------------------------------------


def windowed_loss(model, idx):
    model.eval()
    with torch.no_grad():
        return float(model(idx[:, :-1], idx[:, 1:]))


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablation_map_equals_the_plain_pass_under_ablate_heads(mode):
    model, idx = strong_model(), random_windows(5, 24)
    table = ph.head_ablation_map(model, idx, mode=mode)
    means = ph.mean_head_outputs(model, idx)
    base = windowed_loss(model, idx)
    assert table["loss_increase"].abs().max() > 1e-2  # the heads of this model do something
    for row in table.itertuples():
        with ph.ablate_heads(model, [(row.layer, row.head)], mode, means):
            loss = windowed_loss(model, idx)
        assert row.loss == pytest.approx(loss, abs=1e-4)
        assert row.loss_increase == pytest.approx(loss - base, abs=1e-4)
    assert table["standard_error"].between(1e-6, 1).all()


def test_ablation_map_does_not_depend_on_batches(monkeypatch):
    model, idx = strong_model(), random_windows(5, 24)
    whole = ph.head_ablation_map(model, idx)
    monkeypatch.setattr(ph, "_MAX_TOKENS", 100)
    pd.testing.assert_frame_equal(whole, ph.head_ablation_map(model, idx), atol=1e-5)
    some = ph.head_ablation_map(model, idx, heads=[(1, 1), (0, 0)])
    expected = whole[whole["layer"] == whole["head"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, expected, atol=1e-5)


def test_ablation_of_the_last_predictions():
    model, idx = strong_model(), random_windows(5, 24)
    means = ph.mean_head_outputs(model, idx)
    row = ph.head_ablation_map(model, idx, [(0, 1)], means=means, n_last=7).iloc[0]
    with torch.no_grad(), ph.ablate_heads(model.eval(), [(0, 1)], "mean", means):
        logits = model(idx[:, :-1])[:, -7:]
    assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits.mT, idx[:, -7:]).item(), abs=1e-4)


def test_class_ablation_equals_plain_passes():
    """The row of a class is what the plain passes without its heads, and without the others, say."""
    model, idx = strong_model(), random_windows(12, 24)
    means = ph.mean_head_outputs(model, idx)
    rows = [(layer, head, "Local Context" if layer == 0 else "Mixed") for layer in range(2) for head in range(2)]
    scores = pd.DataFrame(rows, columns=["layer", "head", "class"])
    row = ph.class_ablation(model, idx, scores, means).iloc[0]
    losses = []
    for heads in ([], [(0, 0), (0, 1)], [(1, 0), (1, 1)]):
        with torch.no_grad(), ph.ablate_heads(model.eval(), heads, "mean", means):
            losses.append([model(window[None, :-1], window[None, 1:]).item() for window in idx])
    base, own, others = np.array(losses)
    assert (row["class"], row["n_heads"], row["n_random_sets"]) == ("Local Context", 2, 1)  # one set of others exists
    assert row["loss_increase"] == pytest.approx((own - base).mean(), abs=1e-4)
    assert row["random_loss_increase"] == pytest.approx((others - base).mean(), abs=1e-4)
    p = scipy.stats.ttest_rel(own, others).pvalue
    assert row["excess"] == pytest.approx((own - others).mean(), abs=1e-4)
    assert (row["excess_low"] > 0 or row["excess_high"] < 0) == (p < 0.05)
    assert row["low"] < row["loss_increase"] < row["high"]


def test_a_class_that_leaves_too_few_others_has_no_random_set():
    model, idx = strong_model(), random_windows(4, 24)
    scores = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "class": ["Token-Specific"] * 3 + ["Mixed"]})
    table = ph.class_ablation(model, idx, scores)
    assert table["n_random_sets"].tolist() == [0] and table[["excess", "random_loss_increase"]].isna().all(axis=None)
    assert table["loss_increase"].notna().all()


def test_a_head_that_writes_nothing_does_not_matter():
    model, idx = strong_model(), random_windows(4, 24)
    with torch.no_grad():
        model.blocks[1].attention.out_proj.weight[:, :16] = 0  # head 0 of layer 1
    table = ph.head_ablation_map(model, idx, mode="zero").set_index(["layer", "head"])["loss_increase"]
    assert abs(table[1, 0]) < 1e-5 < abs(table[1, 1])


def test_ablating_all_heads_by_zero_removes_attention():
    model, idx = strong_model().eval(), random_windows(2, 16)
    everything = [(layer, head) for layer in range(2) for head in range(2)]
    with torch.no_grad(), ph.ablate_heads(model, everything):
        first = model(idx)
        shuffled = idx.clone()
        shuffled[:, :-1] = idx[:, :-1].flip(1)
        assert torch.allclose(first[:, -1], model(shuffled)[:, -1], atol=1e-5)  # the past is out of sight
    with torch.no_grad():
        assert not torch.allclose(model(idx)[:, -1], model(shuffled)[:, -1], atol=1e-3)


def test_mean_head_outputs():
    model, idx = strong_model().train(), random_windows(7, 16)
    outputs = []
    hook = model.blocks[1].attention.out_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with ph.evaluating(model):
        model(idx)
    hook.remove()
    means = ph.mean_head_outputs(model, idx)
    assert means.shape == (2, 2, 16)
    assert torch.allclose(means[1].flatten(), outputs[0].mean((0, 1)), atol=1e-5)
    assert model.training


def test_bad_ablation_maps_are_refused():
    model = ph.PicoLLM(CONFIG)
    for idx, heads in [(random_windows(1, 16), None), (random_windows(2, 16), []), (random_windows(2, 16), [(5, 0)])]:
        with pytest.raises(ph.PicoError):
            ph.head_ablation_map(model, idx, heads)
    with pytest.raises(ph.PicoError):
        ph.head_ablation_map(model, random_windows(2, 200))  # more than max_positions


@pytest.mark.parametrize("fails", [False, True])
def test_ablation_leaves_the_model_untouched(fails):
    model, idx = strong_model().eval(), random_windows(2, 16)
    with torch.no_grad():
        before = model(idx)
        try:
            with ph.ablate_heads(model, [(0, 1), (1, 0), (1, 1)]):
                assert not torch.allclose(before, model(idx), atol=1e-3)
                if fails:
                    raise KeyError("inside")
        except KeyError:
            assert fails
        assert torch.equal(before, model(idx))
    assert not any(block.attention.out_proj._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize(
    "arguments",
    [
        ([(2, 0)],),
        ([(0, 2)],),
        ([(-1, 0)],),
        ([(0, 0)], "median"),
        ([(0, 0)], "mean"),
        ([(0, 0)], "mean", torch.zeros(2, 2, 8)),
    ],
)
def test_bad_ablations_are_refused(arguments):
    model = ph.PicoLLM(CONFIG)
    with pytest.raises(ph.PicoError), ph.ablate_heads(model, *arguments):
        pass
    assert not any(block.attention.out_proj._forward_pre_hooks for block in model.blocks)


# ---- similarity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_sink", [False, True])
def test_similarity_is_the_mean_jensen_shannon_distance(drop_sink):
    from scipy.spatial.distance import jensenshannon

    model = strong_model()
    idx = random_windows(3, 10)
    distances, floor = ph.head_similarity(model, idx=idx, drop_sink=drop_sink)
    maps = []
    for ids in idx:
        layers = []
        ph.stream_attention(model, ids[None], lambda _, weights, layers=layers: layers.append(weights[0]))
        maps.append(torch.cat(layers)[:, 2:, int(drop_sink) :].double().numpy())  # scipy normalises the rows

    def distance(p, q):
        return np.mean([jensenshannon(a, b, base=2) for a, b in zip(p, q, strict=True)])

    expected = [[np.mean([distance(m[a], m[b]) for m in maps]) for b in range(4)] for a in range(4)]
    assert np.allclose(distances, expected, atol=1e-4)
    assert np.allclose(distances, distances.T) and (np.diag(distances) == 0).all() and distances.max() > 0.05
    assert floor == pytest.approx(np.mean([distance(maps[0][a], maps[1][a]) for a in range(4)]), abs=1e-4)


def test_equal_heads_have_distance_zero_and_a_fixed_head_no_noise():
    model = strong_model()
    with torch.no_grad():
        weight = model.blocks[0].attention.qkv_proj.weight.view(3, 2, 16, 32)
        weight[:, 1] = weight[:, 0]
    texts = [some_tokens(length, 0) for length in (20, 9, 20, 15)]
    windows = torch.stack([ids[:9] for ids in texts])
    distances, floor = ph.head_similarity(model, idx=windows)
    assert distances[0, 1] < 1e-3 < distances[0, 2]
    assert floor > 1e-3
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv_proj.weight.zero_()  # uniform heads
    distances, floor = ph.head_similarity(model, idx=windows)
    assert distances.max() < 1e-3 and floor < 1e-3


def test_similarity_takes_texts_of_any_length_and_refuses_a_single_one():
    model = strong_model(TEXT_CONFIG)
    distances, floor = ph.head_similarity(model, SENTENCES)
    assert np.isfinite(distances).all() and 0 < floor < 1
    with pytest.raises(ph.PicoError):
        ph.head_similarity(model, SENTENCES[:1])


# ---- the study -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study():
    """Of an untrained model whose seed is none of the baseline's."""
    windows = random_windows(6, 64, vocab_size=50257)
    return ph.study_heads(ph.PicoLLM(TEXT_CONFIG, 3), SENTENCES, windows, n_bootstrap=200)


def test_study_holds_every_source_and_baseline(study):
    assert len(study.scores) == 2 * 4 and set(study.scores["source"]) == {"sentences", "windows"}
    groups = study.shares.groupby(["source", "model"])
    assert set(groups.groups) == {
        (source, model)
        for source in ("sentences", "windows")
        for model in ("trained", "shuffled", "untrained", "uniform")
    }
    assert np.allclose(groups["share"].sum() - groups["share"].last(), 1)  # the last row sums up three of the classes
    assert (study.shares["low"] <= study.shares["high"]).all()
    assert study.shares.columns.tolist() == ["source", "model", "class", "share", "low", "high"]
    assert study.baselines.columns.tolist() == ["source", "model", "score", "statistic", "mean", "low", "high"]
    assert len(study.baselines) == 2 * 4 * len(ph.HEAD_SCORES) * 2
    headline = study.baselines.set_index(["source", "model", "score", "statistic"])
    table = study.scores[study.scores["source"] == "windows"]
    assert headline.loc[("windows", "trained", "previous", "max"), "mean"] == pytest.approx(table["previous"].max())
    assert headline.loc[("windows", "trained", "entropy", "mean"), "mean"] == pytest.approx(table["entropy"].mean())
    assert len(study.ablation) == 4 and study.distances.shape == study.distances_without_sink.shape == (4, 4)
    assert study.settings["window_length"] == 64 and study.settings["n_texts"] == len(SENTENCES)
    assert len(study.settings["untrained_seeds"]) == 5


def test_uniform_baseline_is_exactly_chance(study):
    uniform = study.baselines[study.baselines["model"] == "uniform"].set_index(["score", "statistic"])["mean"]
    for name in ph.KAPPAS:
        assert uniform[name].abs().max() < 1e-5
    assert np.allclose(uniform["broad"], 1, atol=1e-5)
    assert uniform["entropy"].min() > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_untrained_model_has_no_findings(study, seed):
    windows = random_windows(6, 64, seed=seed, vocab_size=50257)
    model = ph.PicoLLM(TEXT_CONFIG, seed)
    for table in (
        ph.score_heads(model, SENTENCES, thresholds=study.thresholds),
        ph.score_heads(model, idx=windows, thresholds=study.thresholds),
    ):
        assert set(table["class"]) <= {"Global/Broad", "Mixed"}
        assert not table["sink_flag"].any() and not table["resting"].any()
        for name in ph.KAPPAS:
            assert table[name].max() < study.thresholds.tau[name]


def test_study_of_untrained_model_reports_no_specialised_share(study):
    found = study.shares[~study.shares["class"].isin(["Global/Broad", "Mixed"])]
    assert (found["high"] == 0).all()


def test_study_bounds_the_predictions_of_its_ablations(monkeypatch):
    monkeypatch.setattr(ph, "_MAX_PREDICTIONS", 4 * 3 * 10)  # heads, windows, predictions of each
    model, windows = ph.PicoLLM(TEXT_CONFIG, 3), random_windows(3, 64, vocab_size=50257)
    short = ph.study_heads(model, SENTENCES, windows, n_seeds=1, n_bootstrap=10)
    assert short.settings["ablation_predictions"] == 30
    expected = ph.head_ablation_map(model, windows, n_last=10)
    pd.testing.assert_frame_equal(short.ablation[list(expected)], expected)
    assert short.class_ablation.empty  # an untrained model has no head of a specialised class


def test_study_moves_the_bar_it_is_given(tmp_path):
    with open(tmp_path / "bar", "w") as stream, ph.tqdm(total=5, initial=5, file=stream) as bar:
        ph.study_heads(ph.PicoLLM(TEXT_CONFIG), SENTENCES, random_windows(2, 64), n_seeds=1, n_bootstrap=10, bar=bar)
        assert bar.n == bar.total > 5
