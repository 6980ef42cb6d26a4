"""Minimal pairs and the linguistic study, against models whose truth is known."""

import copy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from study_data import make_language

import pico_helpers as pico

TINY = pico.ModelConfig(d_model=32, n_layer=2, n_head=2, d_ff=32, context_length=32, max_positions=64, dropout=0.1)
TOKENIZER = pico.get_tokenizer()
WINDOWS = torch.randint(50257, (4, 24), generator=torch.Generator().manual_seed(0))
UNTRAINED = [pico.PicoLLM(TINY, 100 + seed) for seed in range(3)]


def token(word):
    (only,) = TOKENIZER.encode(word)
    return only


def test_the_study_has_ten_categories_of_distinct_sentences():
    sentences = [sentence for group in pico.ALL_TEST_CATEGORIES.values() for sentence in group]
    names = "Simple, Complex Syntax, Long-Range Dependencies, Coreference, Negation, Questions, Technical, Ambiguous"
    assert ", ".join(pico.ALL_TEST_CATEGORIES) == f"{names}, Comparative, Temporal"
    assert len(set(sentences)) == len(sentences)
    assert all(5 <= len(group) <= 6 for group in pico.ALL_TEST_CATEGORIES.values())
    assert all(len(TOKENIZER.encode(sentence)) <= 40 for sentence in sentences)  # fits a heatmap whole


@pytest.mark.parametrize("max_tokens", [2**13, 1])
def test_margins_are_differences_of_sentence_log_probabilities_one_by_one(max_tokens, monkeypatch):
    monkeypatch.setattr(pico, "MAX_TOKENS", max_tokens)
    model = pico.PicoLLM(TINY)
    pairs = [("The cat sat.", "The cat sat on."), ("A", "B"), ("One two three four five", "Two"), ("Same", "Same")]
    pairs += [(" a" * 64, " a")]  # the longest that fits
    result, log_probs = pico.minimal_pair_accuracy(model, pairs), []
    for ids in map(TOKENIZER.encode, sum(pairs, ())):
        with pico.evaluating(model):
            logits = model(torch.tensor([[50256, *ids[:-1]]]))[0]
        log_probs.append(sum(logits[i].log_softmax(-1)[token].item() for i, token in enumerate(ids)))
    expected = np.subtract(log_probs[::2], log_probs[1::2]).tolist()
    assert result.margins.tolist() == pytest.approx(expected, abs=1e-3) and result.margins[3] == 0
    assert model.training  # the mode is restored


def unigram_model(liked):
    """A model that ignores its input: every logit is the same at every position, one word's is higher."""
    model = pico.PicoLLM(TINY)
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(torch.eye(32)[0])
        model.token_embedding.weight[:, 0] = 0.0
        model.token_embedding.weight[token(liked), 0] = 3.0
    return model


def test_accuracy_of_a_rigged_scorer_counts_ties_one_half():
    model = unigram_model(" cat")
    right, wrong = ("The cat sat", "The dog sat"), ("A bird sat near", "A cat sat near")
    tie = ("Nothing differs here", "Nothing differs here")
    assert [pico.minimal_pair_accuracy(model, [pair]).accuracy for pair in (right, wrong, tie)] == [1.0, 0.0, 0.5]
    result = pico.minimal_pair_accuracy(model, [right, right, tie, wrong, tie, right])
    assert 0 <= result.low <= result.accuracy <= result.high <= 1
    assert result.accuracy == pytest.approx(4 / 6) and result.margins.shape == (6,)
    assert result.margins[0].item() == pytest.approx(3.0, abs=1e-3)  # the logit's head start


def test_unusable_pairs_are_named():
    for pairs, message in (
        ([], "no pairs"),
        ([("A cat", "A dog"), ("", "A dog")], "good sentence of pair 1 is empty"),
        ([("A cat", "  ")], "bad sentence of pair 0 is empty"),
        ([("A cat", "A dog"), "ab"], "Pair 1 is 'ab'; it must be two sentences"),
        ([("A cat", "A dog", "A bird")], "must be two sentences"),
        ([("A cat", None)], "bad sentence of pair 0 is empty or no text"),
        ([("A cat", "A dog"), ("A cat", "word " * 70)], "bad sentence of pair 1 has 71 tokens; the model reads 64"),
    ):
        with pytest.raises(pico.PicoError, match=message):
            pico.minimal_pair_accuracy(pico.PicoLLM(TINY), pairs)


@pytest.fixture(scope="module", params=list(pico.PHENOMENA))
def pairs(request):
    return pico.make_pairs(request.param, 60)


def word_at(pair, position):
    return pair.good.split()[position]


def test_pairs_are_reproducible_and_distinct_in_words_of_one_token_and_swap_roles_with_their_partners(pairs):
    name = pairs[0].phenomenon
    assert pico.make_pairs(name, 60) == pairs and pico.make_pairs(name, 60, seed=1) != pairs
    assert pico.make_pairs(name, 40) == [pair for pair in pairs if pair.item < 40]
    assert len({(pair.good, pair.bad) for pair in pairs}) == len(pairs)
    assert name != "importance of" or any("importance" in pair.good and pair.good.endswith(" of") for pair in pairs)
    for pair in pairs:
        good, bad = TOKENIZER.encode(pair.good), TOKENIZER.encode(pair.bad)
        assert len(good) == len(bad) == len(pair.good.split()) and good[:-1] == bad[:-1] and good[-1] != bad[-1]
    n = len(pairs) // 60  # partners swap the roles and the words
    assert [pair.item for pair in pairs] == np.repeat(range(60), n).tolist()
    for group in (pairs[start : start + n] for start in range(0, len(pairs), n)):
        first, second, *controls = group
        assert (first.target, first.distractor) == (second.distractor, second.target)
        assert first.target != first.distractor and max(first.target, first.distractor) < len(first.good.split()) - 2
        assert all(pair.target is None and pair.distractor is None for pair in controls)
        assert Counter(word_at(pair, -1) for pair in group) == Counter(pair.bad.split()[-1] for pair in group)
        assert len({word_at(pair, -2) for pair in group}) == 1  # the last word read tells nothing


def test_the_target_is_the_word_that_decides(pairs):
    people = dict.fromkeys(pico.WORDS["John"], "he") | dict.fromkeys(pico.WORDS["Mary"], "she")
    for pair in pairs:
        if pair.target is None:
            assert not {"did", "not"} & set(pair.good.split())
            continue
        target, distractor, right = word_at(pair, pair.target), word_at(pair, pair.distractor), word_at(pair, -1)
        match pair.phenomenon:
            case "determiner-noun":
                assert (target in ("a", "an")) == (not right.endswith("s"))
                assert target not in ("a", "an") or (target == "an") == (word_at(pair, pair.target + 1)[0] in "aeio")
            case "subject-verb":
                assert target.endswith("s") != right.endswith("s") and target.endswith("s") != distractor.endswith("s")
            case "coreference":
                assert people[target] == right and distractor[0].isupper() and distractor not in people
            case "reflexive":
                assert {"he": "himself", "she": "herself"}[people[target]] == right
                assert people[target] != people[distractor]
            case "negation":
                assert target == "not" and right.startswith("any")
            case "question":
                assert target == "did" and right in [both.split(":")[0] for both in pico.WORDS["work:worked"]]
            case "importance of":
                assert (target in ["importance", *pico.WORDS["knowledge"]]) == (right == "of")


def test_unknown_phenomena_exhausted_templates_and_too_few_items_are_errors(monkeypatch):
    with pytest.raises(pico.PicoError, match="Unknown phenomenon 'tense'"):
        pico.make_pairs("tense")
    with pytest.raises(pico.PicoError, match="19 items are too few"):
        pico.study_language(pico.PicoLLM(TINY), WINDOWS, UNTRAINED, n_items=19)
    monkeypatch.setitem(pico.PHENOMENA, "one", pico.Phenomenon("claim", "about", "", "The [cat] (dog) <a / b|b / a>"))
    pairs = [("one", 0, "The cat dog a", "The cat dog b", 1, 2), ("one", 1, "The cat dog b", "The cat dog a", 1, 2)]
    assert pico.make_pairs("one", 2) == pairs
    with pytest.raises(pico.PicoError, match="fewer than 3"):
        pico.make_pairs("one", 3)


def test_a_model_that_ignores_the_context_scores_one_half_in_every_item(pairs):
    bigram = pico.PicoLLM(TINY)
    with torch.no_grad():
        for block in bigram.blocks:  # layers add nothing, so that the prediction follows from the last token alone
            block.attention.out_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    for model in (unigram_model(" did"), bigram):
        assert (pico.correct(pico.measure_pairs(model, pairs)[0]).reshape(60, -1).mean(axis=1) == 0.5).all()


def test_margins_and_attention_are_those_at_the_decision(pairs):
    model = pico.PicoLLM(TINY, 4)
    margins, differences = pico.measure_pairs(model, pairs)
    result = pico.minimal_pair_accuracy(model, [(pair.good, pair.bad) for pair in pairs])
    assert torch.allclose(margins, result.margins, atol=1e-4) and margins.abs().max() > 0.01
    for index in [0, 1, len(pairs) - 1]:
        pair = pairs[index]
        if pair.target is None:
            assert differences[index].isnan().all()
            continue
        row = pico.attention_maps(model, [50256, *TOKENIZER.encode(pair.good)])[:, :, -2]  # (layers, heads, keys)
        assert torch.allclose(differences[index], row[..., pair.target + 1] - row[..., pair.distractor + 1], atol=1e-6)


def test_ablated_margins_are_those_of_the_ablated_model(pairs):
    """A head that writes nothing but its mean, and the mean of each item over its pairs."""
    model = pico.PicoLLM(TINY, 5)
    with torch.no_grad():
        model.blocks[0].attention.out_proj.weight.mul_(30)
    intact, ablated = pico.ablated_margins(model, pairs[: len(pairs) // 10], [(), ((0, 0),)], torch.zeros(2, 2, 16))
    expected = pico.measure_pairs(model, pairs)[0].view(60, -1).mean(1)[:6]
    assert intact == pytest.approx(expected.tolist(), abs=1e-4)
    with torch.no_grad():
        model.blocks[0].attention.out_proj.weight[:, :16] = 0
    expected = pico.measure_pairs(model, pairs)[0].view(60, -1).mean(1)[:6]
    assert ablated == pytest.approx(expected.tolist(), abs=1e-4) and abs(intact - ablated).max() > 1e-3


def test_heads_are_tested_on_items_that_did_not_choose_them_and_planted_ones_are_found():
    """In pure noise the best of 64 heads stands out on the items that chose it and nowhere else."""
    generator, chosen, tested = torch.Generator().manual_seed(0), [], []
    for _ in range(100):
        differences = torch.randn(40, 8, 8, generator=generator)
        heads, values = pico.choose_and_test(differences, 3)
        chosen += [differences[~pico.is_test_item(torch.arange(40)), layer, head].mean() for layer, head in heads]
        tested += [values.mean()]
        assert len(heads) == len(set(heads)) == 3 and values.shape == (20,)
    assert np.mean(chosen) > 0.3 and abs(np.mean(tested)) < 0.06
    differences = torch.randn(41, 4, 5, generator=torch.Generator().manual_seed(1)) * 0.1
    for (layer, head), effect in {(2, 4): 1.0, (0, 3): 2.0, (1, 1): -3.0}.items():
        differences[:, layer, head] += effect  # the last one prefers the distractor: it is no support
    heads, values = pico.choose_and_test(differences, 2)
    assert heads == ((0, 3), (2, 4)) and values.mean() == pytest.approx(1.5, abs=0.1)
    assert len(pico.choose_and_test(differences[:, :1, :2], 3)[0]) == 1  # one other must be left
    assert list(Counter((pico.is_test_item(item), item % 2) for item in range(40)).values()) == [10] * 4


def test_sign_flip_is_uniform_without_an_effect_bootstrap_covers_the_truth_and_holm_is_the_textbooks():
    random = np.random.default_rng(0)
    p = np.array([pico.sign_flip_p(random.normal(size=20), seed, n=500) for seed in range(400)])
    assert np.abs(np.quantile(p, [0.1, 0.25, 0.5, 0.75, 0.9]) - [0.1, 0.25, 0.5, 0.75, 0.9]).max() < 0.08
    assert (p < 0.05).mean() < 0.09
    values = np.random.default_rng(1).normal(1.0, 1.0, size=20)
    assert pico.sign_flip_p(values, 0) == pico.sign_flip_p(-values, 0) < 0.01
    assert pico.sign_flip_p(np.zeros(20), 0) == 1.0
    assert pico.sign_flip_p(np.ones(20), 0, n=99) == 0.01  # never zero (Phipson & Smyth 2010)
    assert pico.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert pico.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    random = np.random.default_rng(2)
    intervals = [pico.bootstrap_interval(random.normal(0.3, 1.0, size=40), seed, n=300) for seed in range(200)]
    assert 175 <= sum(low < 0.3 < high for _, low, high in intervals) <= 199
    for n, truth in ((10, 0.9), (40, 0.97), (40, 0.5)):  # shares, of single pairs and of items of four that are alike
        single = [pico.share_interval(random.binomial(1, truth, n)) for _ in range(400)]
        alike = random.beta(3 * truth, 3 - 3 * truth, size=(400, n))
        items = [pico.share_interval(random.binomial(4, each) / 4) for each in alike]
        assert all(350 <= sum(low <= truth <= high for _, low, high in each) < 400 for each in (single, items))
    assert (
        pico.share_interval(np.full(40, 0.5))[2] < 0.5 + pico.NULL_ACCURACY
    )  # which of two words, not where they stand
    assert pico.share_interval(np.ones(10)) == pytest.approx((1, 0.7225, 1), abs=1e-4)  # Wilson: 1 / (1 + 1.96^2 / 10)


GOOD = dict(
    chance_accuracy=0.5, accuracy=0.85, accuracy_low=0.78, accuracy_high=0.91, untrained_accuracy_highest=0.55,
    heads="L1H0", attention_difference=0.2, attention_low=0.15, attention_high=0.25, untrained_attention_highest=0.01,
    p_value=0.001, margin_drop=1.0, margin_low=0.5, margin_high=1.2, single_drops="L1H0 1.00", n_random_sets=99,
    random_margin_drop=0.1, apart_margin_drop=0.2, needs_p_value=0.01,
)  # fmt: skip
FEW = {"n_random_sets": 0, "needs_p_value": np.nan}  # other sets to rank it among


def test_verdict_needs_every_link_and_names_the_one_that_fails():
    for changes, expected, word in (
        ({}, "supported", "All three links"),
        ({"accuracy_low": 0.49}, "undecided", "prefers"),
        ({"untrained_accuracy_highest": 0.8}, "undecided", "prefers"),
        ({"chance_accuracy": 0.8}, "undecided", "the nearest words suffice for 80%"),
        ({"chance_accuracy": 0.82}, "not supported", "the nearest words suffice for 82%"),
        ({"p_value": 0.05}, "undecided", "attention"),
        ({"attention_low": 0.019}, "undecided", "attention"),
        ({"untrained_attention_highest": 0.16}, "undecided", "attention"),
        ({"needs_p_value": 0.05}, "undecided", "without them"),
        ({"needs_p_value": 0.001, "margin_low": -1.0}, "supported", "three"),  # the interval alone decides nothing
        ({"random_margin_drop": 0.995}, "undecided", "at most 0.20 (p"),  # first in rank, but by nothing
        (FEW, "undecided", "too few other sets"),
        (FEW | {"margin_low": -0.5, "margin_high": -0.1}, "not supported", "0.50 to"),
        ({"accuracy_low": 0.45, "accuracy_high": 0.59}, "not supported", "prefers"),
        ({"accuracy_low": 0.53, "accuracy_high": 0.59, "untrained_accuracy_highest": 0.51}, "not supported", "prefers"),
        ({"attention_low": -0.01, "attention_high": 0.019}, "not supported", "attention"),
        ({"needs_p_value": 0.8, "margin_low": -0.5, "margin_high": -0.1}, "not supported", "without them"),
        ({"p_value": 0.5, "margin_high": -0.1}, "undecided", "attention"),  # it is not asked what no head looks at
    ):
        decision, reason = pico.verdict(SimpleNamespace(**GOOD | changes))
        assert decision == expected and word in reason, changes
        if decision != "supported":
            assert sum(text in reason for text in ("prefers", "more attention", "without them")) == 1, changes


def did_model():
    """A model built by hand: head L0H0 looks at ` did` and makes bare verbs likely; without ` did`, past forms."""
    # dimension 0 is 1 after the norm, dimension 1 marks ` did`; query and key meet in the slowest rotary pair
    model = pico.PicoLLM(pico.ModelConfig(d_model=64, n_layer=2, n_head=16, d_ff=32, context_length=32, dropout=0.0))
    attention, norm, embedding = model.blocks[0].attention, model.blocks[0].attention_norm, model.token_embedding.weight
    verbs = [[token(" " + form) for form in both.split(":")] for both in pico.WORDS["work:worked"]]
    base, past = torch.tensor(verbs).unbind(1)
    with torch.no_grad():
        embedding[:, 1] = 0.0
        embedding[token(" did"), 1] = 1.0
        norm.weight[0], norm.bias[0] = 0.0, 1.0
        qkv = attention.qkv_proj.weight.view(3, 16, 4, 64)  # (query | key | value, head, dimension, input)
        qkv[:, 0] = 0.0
        qkv[0, 0, 1, 0] = qkv[1, 0, 1, 1] = 10.0
        qkv[2, 0, 0, 1] = qkv[2, 0, 1, 0] = 1.0  # the value: whether it is ` did`, and the constant
        contrasts = torch.cat([embedding[base] - embedding[past], torch.ones(1, 64)])  # the norm takes the mean away
        wanted = torch.tensor([1.0] * len(verbs) + [0.0])[:, None]
        attention.out_proj.weight[:, :2] = torch.linalg.lstsq(contrasts, wanted).solution * torch.tensor([1.0, -3.0])
    return model


def study_did(model, windows=WINDOWS):
    table = pico.study_language(model, windows, [pico.PicoLLM(model.config, seed) for seed in (7, 8)], n_heads=1)
    question = table.set_index("phenomenon").loc["question"]
    assert question.attention_difference > 0.9 and question.p_value < 0.05
    return table, question


def test_study_finds_the_head_of_a_model_built_by_hand():
    windows = WINDOWS.clone()
    windows[2:, 10] = token(" did")
    model = did_model()
    table, question = study_did(model, windows)
    assert list(table.phenomenon) == list(pico.PHENOMENA) and list(table) == list(make_language())
    assert question.heads == "L0H0" and question.accuracy == 1.0 and question.untrained_accuracy < 0.7
    assert question.n_random_sets == 31 and question.needs_p_value == 1 / 32
    assert question.single_drops == f"L0H0 {question.margin_drop:.2f}"
    assert question.random_margin_high <= question.apart_margin_drop < question.margin_drop / 2, "of the other heads"
    assert (table.untrained_accuracy > 0.2).all() and (table.untrained_accuracy_highest < 0.8).all()
    assert (table.untrained_accuracy < table.untrained_accuracy_highest).any()
    assert table.chance_accuracy.tolist() == [0.5, 0.5, 0.5, 0.5, 0.75, 0.75, 0.5]
    assert question.margin_drop > 5 * abs(question.random_margin_drop) and abs(question.loss_increase) > 1e-3
    (increase,) = np.diff(
        pico.ablated_losses(model, windows, [(), ((0, 0),)], pico.mean_head_outputs(model, windows)), axis=0
    )
    of_windows = increase.mean(), increase.std(ddof=1) / 2  # of four
    assert (question.loss_increase, question.loss_error) == pytest.approx(of_windows, rel=1e-3)
    assert question.verdict == "supported", question.reason
    others = table[table.phenomenon != "question"]
    assert not set(others.verdict) - {"not supported", "undecided"} and (others.n_random_sets == 0).all()


def test_a_head_that_looks_but_is_not_needed_is_not_enough():
    """Nothing reads what it writes, or its neighbour does the same: ablating that one costs as much."""
    unread, shared = did_model(), did_model()
    with torch.no_grad():
        unread.blocks[0].attention.out_proj.weight[:, :2] = 0.0
        qkv = shared.blocks[0].attention.qkv_proj.weight.view(3, 16, 4, 64)
        out = shared.blocks[0].attention.out_proj.weight
        out[:, 1] *= 5 / 3  # so that one head alone does not reach the bare verb
        qkv[:, 1], out[:, 4:8] = qkv[:, 0], out[:, :4]
    table, question = study_did(unread)
    assert question.verdict != "supported" and (table.n_random_sets == 0).all(), "asked only of what it prefers"
    question = study_did(shared)[1]
    assert question.accuracy == 1.0 and question.margin_drop > 0.1
    assert question.needs_p_value == 2 / 32 and question.verdict == "undecided" and "without them" in question.reason


def test_several_heads_cost_what_they_cost_together_and_each_alone(monkeypatch):
    def margins_without(_, pairs, sets, means):
        return np.array([[10 - sum({(0, 0): 3, (1, 1): 2}.get(head, 0.1) for head in heads)] * 20 for heads in sets])

    monkeypatch.setattr(pico, "ablated_margins", margins_without)
    model = SimpleNamespace(config=SimpleNamespace(n_layer=2, n_head=8))
    columns = "drop low high singles n_sets average random_low random_high apart p_value"
    costs = dict(zip(columns.split(), pico._costs(model, [], ((0, 0), (1, 1)), 1, None, 0), strict=True))
    assert costs["singles"] == "L0H0 3.00, L1H1 2.00" and costs["n_sets"] == 63
    numbers = [costs[name] for name in ("drop", "low", "high", "apart", "average", "p_value")]
    average = (7 * 3.1 + 7 * 2.1 + 49 * 0.2) / 63
    assert numbers == pytest.approx([5, 5, 5, 0.2, average, 1 / 64])


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_supported_on_an_untrained_model_which_stays_as_it_was(seed):
    model = pico.PicoLLM(TINY, seed)
    before = copy.deepcopy(model.state_dict())
    table, again = (pico.study_language(model, WINDOWS, UNTRAINED, 24, n_heads=1, seed=seed) for _ in range(2))
    assert set(table.verdict) <= {"not supported", "undecided"} and table.reason.str.len().min() > 20
    assert table.equals(again)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
