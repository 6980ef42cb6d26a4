"""Head scores, ablation and similarity against heads whose truth is known."""

import contextlib
import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon

import pico_helpers as ph

SHAPE = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_ff": 32, "context_length": 64, "max_positions": 128}
CONFIG = ph.ModelConfig(vocab_size=256, dropout=0.1, **SHAPE)
TEXT_CONFIG = dataclasses.replace(CONFIG, vocab_size=50257)  # reads real sentences
REPEATS = ph.repeated_random_tokens(CONFIG)
SENTENCES = ph.ALL_TEST_CATEGORIES["Coreference"]
COMMA, PERIOD = 11, 13  # GPT-2 ids


def strong_model(config=CONFIG):
    """An untrained model with weights so large that its heads do something."""
    model = ph.PicoLLM(config)
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.ndim == 2):
            parameter.mul_(8)
    return model


def random_windows(n, length, seed=0, vocab_size=256):
    return torch.randint(0, vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


def some_tokens(length, seed):
    """Tokens with copies, punctuation and one rare token (255) early on."""
    random = np.random.default_rng(seed)
    ids = random.integers(32, 44, length)
    ids[random.choice(np.arange(1, length), max(1, length // 8), replace=False)] = COMMA
    ids[1 + seed % 3] = 255
    return torch.tensor(ids)


COUNTS = np.full(256, 100)
COUNTS[255] = 1
WANTED = {  # what the ideal head of that name looks at in row i of the tokens n, written out plainly (from 0)
    "sink": lambda n, i: [0],
    "self": lambda n, i: [i],
    "previous": lambda n, i: [i - 1],
    "local": lambda n, i: [i - 2, i - 1, i],
    "duplicate": lambda n, i: [j for j in range(1, i) if n[j] == n[i]],
    "induction": lambda n, i: [j + 1 for j in range(i - 1) if n[j] == n[i]],
    "punctuation": lambda n, i: [j for j in range(1, i) if n[j] in (COMMA, PERIOD)],
    "rare": lambda n, i: [j for j in range(1, i) if COUNTS[n[j]] == min(COUNTS[n[1 : i + 1]])],
    "uniform": lambda n, i: range(i + 1),
}


def ideal(name):
    """A function ids -> (T, T): all weight on the wanted keys, alike; rows without any rest on the first token."""

    def head(ids):
        weights = torch.zeros(len(ids), len(ids))
        for i in range(len(ids)):
            keys = [j for j in WANTED[name](ids.tolist(), i) if j >= 0] or [0]
            weights[i, keys] = 1 / len(keys)
        return weights

    return head


def mixture(share, one, other):
    return lambda ids: share * ideal(one)(ids) + (1 - share) * ideal(other)(ids)


def synthetic_sums(heads, texts):
    """Sums of heads given as functions ids -> (T, T) map, through the code that scores a model."""
    return ph.head_sums(lambda ids: torch.stack([head(ids) for head in heads])[None], texts, REPEATS, COUNTS)


def synthetic_table(heads, length=64, n_texts=6):
    return synthetic_sums(heads, [some_tokens(length, seed) for seed in range(n_texts)]).table()


@pytest.mark.parametrize("length", [8, 12, 33, 64, 128])
def test_uniform_head_scores_zero_and_ideal_head_one_at_every_length(length):
    table = synthetic_table([ideal("uniform"), *map(ideal, ph.KAPPAS)], length)
    uniform = table.iloc[0]
    assert uniform[list(ph.KAPPAS)].abs().max() < 1e-5 and abs(uniform["broad"] - 1) < 1e-5
    assert [table[name][row] for row, name in enumerate(ph.KAPPAS, start=1)] == pytest.approx([1] * 8, abs=1e-5)
    assert uniform["class"] == "Global/Broad" and not uniform["sink_flag"]


@pytest.mark.parametrize("length", [20, 64])
def test_each_head_gets_its_class_with_and_without_a_sink(length):
    expected = dict.fromkeys(["self", "previous"], "Diagonal/Self") | {"local": "Local Context"}
    expected |= dict.fromkeys(ph.KAPPAS[4:], "Token-Specific") | {"uniform": "Global/Broad"}
    table = synthetic_table([mixture(share, "sink", name) for share in (0, 0.5) for name in expected], length)
    assert table["class"].tolist() == 2 * list(expected.values())
    with_sink = table.iloc[len(expected) :]
    assert with_sink["sink_flag"].all() and not with_sink["resting"].any()
    found = [table[name][len(expected) + row] for row, name in enumerate(expected) if name != "uniform"]
    assert found == pytest.approx([1] * 7, abs=1e-5)  # the sink does not hide what the rest does


def test_resting_and_self_heads_and_what_is_not_corrected_for_chance():
    """A resting head rests whatever its little rest does; attention to oneself is never attention to content."""
    heads = [mixture(0.95, "sink", "previous"), ideal("sink"), mixture(0.85, "sink", "previous"), ideal("self")]
    table = synthetic_table(heads)
    assert table["class"].tolist() == ["Resting", "Resting", "Diagonal/Self", "Diagonal/Self"]
    assert table["resting"].tolist() == [True, True, False, False]
    assert np.isfinite(table.drop(columns="class").to_numpy(float)).all()
    assert table["previous"][1] == 0  # no weight left to score
    assert (table.loc[3, list(ph.KAPPAS[4:])] < 0).all()
    keys = ph.key_sets(torch.tensor([40, 41, 42, 43, 255, 44, 45]), torch.tensor(COUNTS))[-1]
    assert keys[4:].nonzero().tolist() == [[1, 4], [2, 4]]  # rarest so far, not of the whole; it is not asked itself
    table = synthetic_table([ideal("self"), ideal("previous"), ideal("uniform")], 10, 1)
    assert table["mean_distance"].tolist() == pytest.approx([0, 0.9, 2.25], abs=1e-5)  # i / 2 on average
    assert table["entropy"].tolist() == pytest.approx([0, 0, np.mean(np.log(np.arange(1, 11)))], abs=1e-5)


def kappa(weights, keys, without_sink):
    numerator, denominator = ph.kappa_sums(weights, keys[None], without_sink)[..., 0]
    return numerator / denominator


def test_kappa_with_and_without_the_sink_and_by_hand():
    maps = torch.stack([head(some_tokens(40, 0)) for head in (mixture(0.7, "sink", "previous"), ideal("uniform"))])
    previous = torch.ones(40, 40).tril(-1).triu(-1).bool()
    assert kappa(maps, previous, True).tolist() == pytest.approx([1, 0], abs=1e-5)
    raw = kappa(maps, previous, False)
    assert raw[0] == pytest.approx(0.3, abs=0.05) and raw[1] == pytest.approx(0, abs=1e-5)
    weights = torch.tensor([[[1, 0, 0], [0.8, 0.2, 0], [0.4, 0.3, 0.3]]])  # key 1: chance 1 (skipped), 1/2, 1/3
    expected = (0.8 - 0.5 + 0.4 - 1 / 3) / (0.5 + 2 / 3)
    assert kappa(weights, torch.tensor([[True, False, False]] * 3), False).item() == pytest.approx(expected)


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
    low = pd.DataFrame(dict.fromkeys(ph.KAPPAS, np.linspace(-0.1, 0.1, 101)))
    thresholds = ph.score_thresholds(low, low.assign(previous=np.linspace(0, 1, 101)))  # the largest percentile
    assert thresholds.tau["previous"] == pytest.approx(0.99) and thresholds.tau["local"] == thresholds.floor == 0.3


def test_repeated_tokens_are_known_and_cannot_be_followed_by_position():
    def draw(**options):
        return torch.stack(ph.repeated_random_tokens(dataclasses.replace(TEXT_CONFIG, context_length=128), **options))

    idx, counts = draw(seed=1), np.zeros(50257, np.int64)
    assert torch.equal(idx, draw(seed=1)) and not torch.equal(idx, draw(seed=2))
    keys = [ph.key_sets(ids, torch.ones(50257, dtype=torch.int64))[ph.KAPPAS.index("induction") - 1] for ids in idx]
    assert torch.stack(keys).any(-1).float().mean() > 0.3  # there is something to find
    for offset in range(0, 64):
        weights = torch.eye(128)[(torch.arange(128) - offset).clamp(min=0)]
        assert np.mean([kappa(weights[None], each, True) for each in keys]) < 0.15, offset
    counts[2000:4000] = 60
    idx = draw(counts=counts)
    assert idx.shape == (9, 128) and idx.min() >= 2000 and idx.max() < 4000


def test_punctuation_and_counts_of_tokens(tmp_path):
    for text, is_mark in {",": 1, " (": 1, "...": 1, " the": 0, "\n": 0, "5": 0, " --": 1}.items():
        assert ph.punctuation_tokens()[ph.get_tokenizer().encode(text)].tolist() == [is_mark], text
    file = ph.TokenFile(tmp_path, "test", 4, np.array([5, 5, 7, 50256], np.uint16), np.array([0, 4]))
    counts = ph.token_counts(file)
    assert counts.shape == (50257,) and counts.sum() == 4 and counts[[5, 7, 50256]].tolist() == [2, 1, 1]


def test_sums_are_kept_in_the_order_of_the_texts():
    """Texts of mixed lengths; what one adds does not depend on the others."""
    attend = functools.partial(ph.attention_maps, strong_model())
    texts = [some_tokens(length, seed) for seed, length in enumerate([9, 30, 9, 17, 30])]
    together = ph.head_sums(attend, texts, REPEATS[:1], COUNTS).texts
    assert together.shape == (2, 5, 2, 2, len(ph.HEAD_SCORES) + 1)
    for place, ids in enumerate(texts):
        alone = ph.head_sums(attend, [ids], REPEATS[:1], COUNTS)
        np.testing.assert_allclose(together[:, [place]], alone.texts, atol=1e-5)
        assert all(alone.scores()[name].shape == (1, 4) for name in ph.HEAD_SCORES)


def test_scores_are_a_table_of_what_is_rare_by_the_counts_and_leave_the_model_as_it_was():
    model = ph.PicoLLM(CONFIG).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table, again = (ph.score_heads(model, random_windows(3, 64)) for _ in range(2))
    pd.testing.assert_frame_equal(table, again)  # no dropout while scoring
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert table.columns.tolist() == ["layer", "head", *ph.HEAD_SCORES, "resting", "sink_flag", "class"]
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert table["resting"].dtype == table["sink_flag"].dtype == bool and set(table["class"]) <= set(ph.HEAD_CLASSES)
    counts = np.arange(256)
    one, other = (ph.score_heads(strong_model(), random_windows(2, 64), each) for each in (counts, counts[::-1].copy()))
    assert not np.allclose(one["rare"], other["rare"], atol=1e-3)


def test_bad_windows_and_too_few_counts_are_refused():
    windows = random_windows(2, 8)
    bad = [(idx, None, "50,257") for idx in (windows[0], torch.rand(2, 8), windows[:0], windows + 50300)]
    for idx, counts, limit in [*bad, (windows, np.ones(10), "10")]:
        with pytest.raises(ph.PicoError, match=rf"\(n_windows, T\), not be empty and hold token ids below {limit}\."):
            ph.score_heads(ph.PicoLLM(TEXT_CONFIG), idx, counts)


def test_shares_interval_comes_from_resampling_texts():
    """Half the texts say previous-token, half uniform: the share is certain of neither; equal texts are certain."""
    texts = [some_tokens(40, seed) for seed in range(8)]

    def sums(n_previous):
        def head(ids):
            return ideal("previous" if any(torch.equal(ids, each) for each in texts[:n_previous]) else "uniform")(ids)

        return synthetic_sums([head], texts)

    def diagonal(some_sums):
        shares = ph.class_shares(some_sums, ph.ScoreThresholds(), n_bootstrap=400).set_index("class")
        assert shares["share"].drop("Specialised").sum() == pytest.approx(1)
        assert shares.loc["Specialised"].tolist() == shares.loc["Diagonal/Self"].tolist()
        return shares.loc["Diagonal/Self"].tolist()

    assert diagonal(sums(8)) == [1, 1, 1] and diagonal(sums(0)) == [0, 0, 0]
    assert diagonal(sums(3)) == [1, 0, 1]
    assert diagonal([sums(8), sums(0)]) == [0.5, 0, 1]  # two models: mean and range
    found = iter([{"x": np.array([500.0])}, {"x": np.arange(1001.0)}])  # of all texts, of resamples
    (row,) = ph._estimates(sums(3), ["name", "value"], lambda *_: next(found), 2, 0).to_numpy().tolist()
    assert row == ["x", 500, 25, 975]


def induction_model():
    """A model with the circuit of Olsson et al. 2022 written into its weights; its other two heads are uniform.

    The residual stream holds the token in dimensions 0-15 and, after layer 0, the previous token in 16-31. Head (0, 0)
    copies the previous token there, by position alone; head (1, 0) looks for keys whose previous token is the query.
    """
    config = ph.ModelConfig(256, 64, n_layer=2, n_head=2, d_ff=8, context_length=64, rope_theta=1e8, dropout=0.0)
    model, token, before, constant = ph.PicoLLM(config), range(16), range(16, 32), 63
    slow = [*range(8, 16), *range(24, 32)]  # dimensions of a head that the rotation leaves almost as they are
    with torch.no_grad():
        for parameter in (*model.blocks.parameters(), model.token_embedding.weight):
            parameter.zero_()
        signs = torch.randint(0, 2, (256, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        model.token_embedding.weight[:, :16] = signs
        for block in model.blocks:
            block.attention_norm.weight.fill_(1)
        model.blocks[0].attention_norm.weight[constant] = 0
        model.blocks[0].attention_norm.bias[constant] = 1
        first, second = (block.attention for block in model.blocks)
        q, k, v = first.qkv_proj.weight.view(3, 64, 64)[:, :32]  # head 0
        q[:4, constant] = 20  # one constant query, whose product with the key is largest one position back
        k[:, constant] = ph.apply_rope(q[:, constant], model.rope_cos[1], model.rope_sin[1])
        v[token, token] = 1
        first.out_proj.weight[before, token] = 0.5
        q, k, v = second.qkv_proj.weight.view(3, 64, 64)[:, :32]
        q[slow, token] = k[slow, before] = 3
        v[token, token] = 1
        second.out_proj.weight[token, token] = 2
    return model


def test_a_built_in_induction_circuit_is_found_and_matters():
    model, windows = induction_model(), random_windows(6, 64)
    table = ph.score_heads(model, windows).set_index(["layer", "head"])
    assert table.loc[(0, 0), "previous"] > 0.95 and table.loc[(0, 0), "class"] == "Diagonal/Self"
    assert table.loc[(1, 0), "induction"] > 0.9 and table.loc[(1, 0), "class"] == "Token-Specific"
    uniform = table.loc[[(0, 1), (1, 1)]]
    assert (uniform[list(ph.KAPPAS)].abs() < 1e-5).all(axis=None) and (uniform["class"] == "Global/Broad").all()
    assert table["induction"].drop((1, 0)).max() < 0.1
    with ablated(model, [(0, 0)], torch.zeros(2, 2, 1)):  # the induction head reads what the previous-token head wrote
        assert ph.score_heads(model, windows)["induction"].max() < 0.1
    repeats = torch.stack(ph.repeated_random_tokens(CONFIG, seed=5)[:8])
    table = ph.head_ablation_map(model, repeats, ph.mean_head_outputs(model, repeats), 63).set_index(["layer", "head"])
    increase, error = table["loss_increase"], table["standard_error"]
    assert increase[0, 0] > 5 * error[0, 0] and increase[1, 0] > 5 * error[1, 0]
    assert increase[[(0, 1), (1, 1)]].abs().max() < 1e-4 and table["matters"].tolist() == [True, False, True, False]


@contextlib.contextmanager
def ablated(model, heads, means):
    """The plain way: the heads' part of what the output projection reads is overwritten."""

    def overwrite(layer, _, args):
        outputs = args[0].unflatten(-1, (model.config.n_head, -1)).clone()
        for head in (head for other, head in heads if other == layer):
            outputs[..., head, :] = means[layer, head]
        return outputs.flatten(-2)

    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            hooks.enter_context(block.attention.out_proj.register_forward_pre_hook(functools.partial(overwrite, layer)))
        yield


def window_losses(model, idx, n_last):
    with ph.evaluating(model):
        logits = model(idx[:, :-1])[:, -n_last:]
    return torch.nn.functional.cross_entropy(logits.mT, idx[:, -n_last:], reduction="none").mean(1).numpy()


@pytest.mark.parametrize("max_tokens", [2**13, 100])
def test_sets_side_by_side_equal_plain_passes(monkeypatch, max_tokens):
    """Sets that share heads, nested and empty ones, in batches or all at once."""
    monkeypatch.setattr(ph, "MAX_TOKENS", max_tokens)
    model, idx = strong_model(), random_windows(5, 24)
    outputs, projection = [], model.blocks[1].attention.out_proj
    hook = projection.register_forward_pre_hook(lambda _, args: outputs.append(args[0].mean((0, 1))))
    with ph.evaluating(model), hook:
        model(idx)
    means = ph.mean_head_outputs(model.train(), idx)
    assert model.training and torch.allclose(means[1].flatten(), outputs[0], atol=1e-5)
    sets = [(), ((0, 1),), ((0, 1), (1, 0)), ((1, 0),), ((0, 0), (0, 1), (1, 1)), ((0, 1), (1, 0))]
    whole, last = (torch.cat(list(ph.ablated_hidden_states(model, idx, sets, means, n)), dim=1) for n in (24, 2))
    assert whole.shape == (6, 5, 24, 32) and not whole.requires_grad
    for heads, *states in zip(sets, whole, last, strict=True):
        with ph.evaluating(model), ablated(model, heads, means):
            expected = model.hidden_states(idx)
        torch.testing.assert_close(states, [expected, expected[:, -2:]], atol=1e-4, rtol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.1
    assert not any(block.attention.out_proj._forward_pre_hooks for block in model.blocks)
    with pytest.raises(ph.PicoError, match="head L5H0"):
        list(ph.ablated_hidden_states(model, idx, [((5, 0),)], means))


@pytest.mark.parametrize("n_last", [23, 7])
def test_ablation_map_is_the_loss_of_plain_passes(n_last):
    model, idx = strong_model(), random_windows(5, 24)
    means, base = ph.mean_head_outputs(model, idx), window_losses(model, idx, n_last)
    table = ph.head_ablation_map(model, idx, means, n_last)
    assert table["loss_increase"].abs().max() > 1e-2  # the heads of this model do something
    for row in table.itertuples():
        with ablated(model, [(row.layer, row.head)], means):
            losses = window_losses(model, idx, n_last)
        increase, error = (losses - base).mean(), (losses - base).std(ddof=1) / np.sqrt(5)
        measured = row.loss, row.loss_increase, row.standard_error
        assert measured == pytest.approx((losses.mean(), increase, error), abs=1e-4)


def test_a_class_that_matters_is_ranked_first_among_random_sets_and_one_of_all_heads_has_none():
    """Only head 0 of either layer writes anything; the text is what the model expects, so that it needs its heads."""
    model, idx = strong_model(dataclasses.replace(CONFIG, n_head=8)), random_windows(60, 2)
    generator = torch.Generator().manual_seed(0)
    with ph.evaluating(model):
        for block in model.blocks:
            block.attention.out_proj.weight[:, 4:] = 0
        for _ in range(22):
            idx = torch.cat([idx, torch.multinomial(model(idx)[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    means, scores = ph.mean_head_outputs(model, idx), pd.DataFrame(np.ndindex(2, 8), columns=["layer", "head"])
    scores["class"] = scores["head"].map({0: "Local Context", 7: "Token-Specific"}).fillna("Mixed")
    table = ph.class_ablation(model, idx, scores, means, 23).set_index("class")
    local, token = table.loc["Local Context"], table.loc["Token-Specific"]
    with ablated(model, [(0, 0), (1, 0)], means):
        increase = window_losses(model, idx, 23)
    increase -= window_losses(model, idx, 23)
    assert (local["n_heads"], local["n_random_sets"]) == (2, 63)  # 8 x 8 - 1
    assert local["loss_increase"] == pytest.approx(increase.mean(), abs=1e-4)
    assert local["low"] < local["loss_increase"] < local["high"]
    assert local["random_loss_increase"] < min(local["loss_increase"], local["compared_loss_increase"]) / 2
    assert local["excess_low"] > 0
    for row in (local, token):
        assert row["excess_low"] < row["compared_loss_increase"] - row["random_loss_increase"]
    assert local["p_value"] == pytest.approx(2 / 64) and token["p_value"] > 0.9  # Holm doubles the smaller one
    (row,) = ph.class_ablation(model, idx, scores.assign(**{"class": "Token-Specific"}), means, 23).to_dict("records")
    assert (row["n_random_sets"], row["p_value"]) == (0, 1) and np.isnan(row["random_loss_increase"])
    assert np.isfinite([row["loss_increase"], row["compared_loss_increase"]]).all()


def test_random_sets_are_distinct_and_of_the_same_layers_and_ranks_among_them_uniform_but_for_a_planted_head():
    chosen = ((0, 1), (2, 0), (2, 3))
    sets, same, other = (ph.random_head_sets(chosen, 4, 7, 99, 99, seed) for seed in (3, 3, 4))
    assert len(sets) == len(set(sets)) == 99 and chosen not in sets and sets == same != other
    assert {tuple(layer for layer, _ in heads) for heads in sets} == {(0, 2, 2)}
    few = ph.random_head_sets(((0, 0), (1, 1)), 2, 2, 99, 99, seed=0)  # of six pairs of heads, four lie in two layers
    assert len(few) == 5 and all({layer for layer, _ in heads} == {0, 1} for heads in few[:3])
    assert ph.random_head_sets(((0, 0),), 1, 1, 99, 99, seed=0) == []
    all_others = ph.random_head_sets(((0, 0), (1, 1), (2, 4)), 4, 5, 60, 399, seed=0)
    assert len(set(all_others)) == 5**3 - 1 and {head[0] for heads in all_others for head in heads} == {0, 1, 2}
    # costs differ much between heads, as they do; yet a set that is itself drawn at random seldom stands out
    random, p_values = np.random.default_rng(0), []
    for seed in range(400):
        costs = random.gamma(0.3, 1, (3, 8))
        heads = tuple((layer, int(random.integers(8))) for layer in range(3))
        sets = [heads, *ph.random_head_sets(heads, 3, 8, 99, 99, seed)]
        own, *others = (sum(costs[head] for head in each) for each in sets)
        p_values.append(ph.rank_p(own, others))
    assert 0.025 < np.mean(np.array(p_values) < 0.05) < 0.075
    assert np.abs(np.quantile(p_values, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.08
    costs = random.normal(0, 0.1, (7, 8))
    costs[3, 2] = 1  # the planted one
    own, *others = (costs[head] for ((head),) in [((3, 2),), *ph.random_head_sets(((3, 2),), 7, 8, 99, 99, 0)])
    assert len(others) == 55 and ph.rank_p(own, others) == 1 / 56


def noise_sums(strength, seed, n_texts=16):
    """Sums of 56 heads whose scores are 0 but for noise; the first has `strength`."""
    sums = np.ones((2, n_texts, 8, 7, len(ph.HEAD_SCORES) + 1))
    sums[0] = np.random.default_rng(seed).normal(0, 0.1, sums.shape[1:])
    sums[0, :, 0, 0] += strength
    return ph.HeadSums(sums, sums[:, :9])


@pytest.mark.parametrize("strength", [0, 0.5])
def test_the_interval_of_the_strongest_head_covers_what_it_truly_scores(strength):
    """With 56 heads of pure noise the largest score is never 0; the lower bound must be at most 0 all the same."""
    covered, values = [], []
    for seed in range(60):
        row = ph.highest_scores(noise_sums(strength, seed), n_bootstrap=200).set_index("score").loc["previous"]
        covered.append(row["low"] <= strength <= row["high"] if strength else row["low"] <= 0)
        values.append(row["highest"])
    assert np.mean(covered) >= 0.95
    assert np.mean(values) > strength - 0.01 and (strength or min(values) > 0)
    assert not strength or row["low"] > 0.35  # it is no empty claim
    one_text = ph.highest_scores(noise_sums(strength, 0, 1), n_bootstrap=50).set_index("score").loc["previous"]
    assert one_text["low"] == pytest.approx(one_text["highest"])


def test_similarity_is_the_mean_jensen_shannon_distance_and_zero_for_equal_heads():
    model, idx = strong_model(), random_windows(3, 10)
    distances, floor = ph.head_similarity(model, idx)
    maps = [ph.attention_maps(model, ids).flatten(0, 1)[:, 2:].double().numpy() for ids in idx]  # scipy normalises

    def distance(p, q):
        return np.mean([jensenshannon(a, b, base=2) for a, b in zip(p, q, strict=True)])

    expected = [[np.mean([distance(m[a], m[b]) for m in maps]) for b in range(4)] for a in range(4)]
    assert np.allclose(distances, expected, atol=1e-4)
    assert np.allclose(distances, distances.T) and (np.diag(distances) == 0).all() and distances.max() > 0.05
    assert floor == pytest.approx(np.mean([distance(maps[0][a], maps[1][a]) for a in range(4)]), abs=1e-4)
    windows = torch.stack([some_tokens(length, 0)[:9] for length in (20, 9, 20, 15)])
    weight = model.blocks[0].attention.qkv_proj.weight.data.view(3, 2, 16, 32)
    weight[:, 1] = weight[:, 0]
    distances, floor = ph.head_similarity(model, windows)
    assert distances[0, 1] < 1e-3 < min(distances[0, 2], floor)
    for block in model.blocks:
        block.attention.qkv_proj.weight.data.zero_()  # uniform heads
    assert max(ph.head_similarity(model, windows)[0].max(), ph.head_similarity(model, windows)[1]) < 1e-3


@pytest.fixture(scope="module")
def study():
    """Of an untrained model whose seed is none of the baseline's."""
    windows, categories = random_windows(6, 64, vocab_size=50257), {"One": SENTENCES[:3], "Two": SENTENCES[3:]}
    return ph.study_model(ph.PicoLLM(TEXT_CONFIG, 3), categories, windows, n_bootstrap=200, n_items=20)


def test_study_holds_every_baseline_and_the_classes_of_each_category_by_its_sentences_alone(study):
    assert len(study.scores) == 4
    groups = study.shares.groupby("model")
    assert set(groups.groups) == {"trained", "shuffled", "untrained", "uniform"}
    assert np.allclose(groups["share"].sum() - groups["share"].last(), 1)  # the last row sums up three of the classes
    assert (study.shares["low"] <= study.shares["high"]).all()
    assert len(study.baselines) == 4 * len(ph.HEAD_SCORES)
    highest = study.baselines.set_index(["model", "score"])["highest"]
    for score in ("previous", "entropy"):
        assert highest["trained", score] == pytest.approx(study.scores[score].max())
    uniform = highest["uniform"]
    assert uniform[list(ph.KAPPAS)].abs().max() < 1e-5 and abs(uniform["broad"] - 1) < 1e-5 and uniform["entropy"] > 0.5
    assert len(study.ablation) == 4 and study.distances.shape == (4, 4)
    assert study.settings["window_length"] == 64 and study.settings["n_texts"] == len(SENTENCES)
    assert len(study.language) == len(ph.PHENOMENA) and study.class_ablation.empty and study.history.empty
    assert study.categories.groupby("category")["share"].sum().tolist() == pytest.approx([1, 1])
    texts = [torch.tensor(ph.get_tokenizer().encode(text)) for text in SENTENCES[3:]]
    attend = functools.partial(ph.attention_maps, ph.PicoLLM(TEXT_CONFIG, 3))
    own = ph.head_sums(attend, texts, ph.repeated_random_tokens(TEXT_CONFIG), None).table(study.thresholds)["class"]
    shares = study.categories.query("category == 'Two'").set_index("class")["share"]
    assert shares[shares > 0].to_dict() == own.value_counts(normalize=True).to_dict()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_untrained_model_has_no_findings(study, seed):
    table = ph.score_heads(ph.PicoLLM(TEXT_CONFIG, seed), random_windows(6, 64, seed, 50257))
    assert set(table["class"]) <= {"Global/Broad", "Mixed"}
    assert not table["sink_flag"].any() and not table["resting"].any()
    assert all(table[name].max() < study.thresholds.tau[name] for name in ph.KAPPAS)
    assert (study.shares.query("`class` not in ['Global/Broad', 'Mixed']")["high"] == 0).all()


def test_the_smallest_model_passes_through_the_whole_study():
    model, options = ph.PicoLLM(dataclasses.replace(TEXT_CONFIG, n_layer=1, n_head=1)), {"n_seeds": 1, "n_items": 20}
    study = ph.study_model(model, {"One": SENTENCES[:1]}, random_windows(2, 24), n_bootstrap=10, **options)
    assert len(study.scores) == 1 and study.distances.tolist() == [[0]]
    assert set(study.language["verdict"]) <= {"undecided", "not supported"}


@pytest.mark.parametrize("windows", [random_windows(1, 9), random_windows(5, 2)])
def test_comparisons_and_the_study_need_two_windows_of_three_tokens_and_readable_sentences(windows):
    given = {ph.head_similarity: (windows,), ph.head_ablation_map: (windows, torch.zeros(2, 2, 16), 1)}
    for compare, args in (given | {ph.study_model: ({"One": SENTENCES}, windows)}).items():
        with pytest.raises(ph.PicoError, match="two windows of three"):
            compare(strong_model(), *args)
    for text, message in {"": "is empty", "word " * 200: "the model reads 128"}.items():
        with pytest.raises(ph.PicoError, match=message):
            ph.study_model(ph.PicoLLM(TEXT_CONFIG), {"One": [text]}, random_windows(2, 24))
    for sentences in ({}, {"One": []}, {"One": "a text"}):
        with pytest.raises(ph.PicoError, match="needs a list of sentences for each category"):
            ph.study_model(ph.PicoLLM(TEXT_CONFIG), sentences, random_windows(2, 24))


def test_study_bounds_the_predictions_of_its_ablations(monkeypatch):
    monkeypatch.setattr(ph, "MAX_PREDICTIONS", 4 * 3 * 10)  # heads, windows, predictions of each
    monkeypatch.setattr(ph, "study_language", lambda *args, **options: pd.DataFrame())
    model, windows = ph.PicoLLM(TEXT_CONFIG, 3), random_windows(3, 64, vocab_size=50257)
    short = ph.study_model(model, {"One": SENTENCES}, windows, n_seeds=1, n_bootstrap=10)
    assert short.settings["ablation_predictions"] == 30
    expected = ph.head_ablation_map(model, windows, ph.mean_head_outputs(model, windows), n_last=10)
    pd.testing.assert_frame_equal(short.ablation, expected)
