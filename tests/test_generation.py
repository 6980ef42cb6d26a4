"""Sampling: the cache changes nothing but speed, filters keep what they promise, text comes in whole characters."""

import pytest
import torch

import pico_helpers as pico
from pico_helpers import ModelConfig, PicoError, PicoLLM, generate, get_tokenizer, stream_text

FREE = {"temperature": 1.0, "top_k": None, "top_p": None}


def make_model(context_length: int = 32, **options) -> PicoLLM:
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_ff": 32, "context_length": context_length}
    model = PicoLLM(ModelConfig(**sizes, max_positions=64, **options), seed=3)
    model.token_embedding.weight.data.mul_(30)  # else logits are nearly flat
    return model


@pytest.mark.parametrize("seed, temperature", [(0, 0.0), (0, 1.0), (1, 1.0)])
def test_cache_gives_the_same_text_also_past_the_window(seed, temperature):
    model, options = make_model(), FREE | {"temperature": temperature, "seed": seed}
    texts = [generate(model, "The history of the city", 90, use_cache=on, **options) for on in (True, False)]
    assert texts[0] == texts[1]


def test_cache_is_used_the_window_slides_and_text_streams_lazily(monkeypatch):
    model = make_model(context_length=16)
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kw: seen.append(idx[0]) or forward(idx, **kw))
    next(stream_text(model, "one two three four", 30, temperature=0))
    assert len(seen) == 1, "one token asked for, one pass made"
    seen.clear()
    generate(model, "one two three four", 30, **FREE)  # 4 tokens
    # 4, then one at a time until 16 are held, then the last 12 anew, and again every five tokens
    assert [*map(len, seen)] == [4, *[1] * 12, 12, *[1] * 4, 12, *[1] * 4, 12, *[1] * 4, 12, 1]
    seen.clear()
    generate(model, " one" * 100, 3, **FREE)
    assert [*map(len, seen)] == [12, 1, 1]  # a prompt longer than the window
    seen.clear()
    generate(model, max_new_tokens=1)
    assert seen[0].tolist() == [pico.Tokenizer.end_of_text]  # an empty one starts a document


def test_seed_decides_the_text_and_the_callers_state_and_modes_hold_between_tokens():
    model, before = make_model(), torch.random.get_rng_state()
    texts = [generate(model, "A", 20, seed=seed, temperature=1.5, top_k=None) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and torch.equal(before, torch.random.get_rng_state())
    model = make_model(dropout=0.5).train()
    next(stream_text(model, "The", 5, temperature=0))
    assert model.training and torch.is_grad_enabled()
    assert len({generate(model, "The", 5, temperature=0) for _ in range(2)}) == 1  # no dropout while sampling
    for dtype in (torch.bfloat16, torch.float16):
        assert generate(model.to(dtype), "The", 5) > "The", "the cache has the model's precision"


def test_sampling_follows_the_filtered_distribution():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[torch.tensor([2, 0, 3, 1])]  # likely order: 1, 3, 0, 2
    rng = torch.Generator().manual_seed(0)

    def frequencies(temperature=1.0, top_k=None, top_p=None, n=4000):
        draws = [pico.sample_token(logits, rng, temperature, top_k, top_p) for _ in range(n)]
        return [draws.count(token) / n for token in (1, 3, 0, 2)]

    assert frequencies() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    assert frequencies(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert frequencies(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert frequencies(top_p=0.76) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.03)
    assert frequencies(temperature=0.5) == pytest.approx([p**2 / 0.345 for p in (0.5, 0.25, 0.15, 0.1)], abs=0.03)
    for greedy in ({"top_p": 1e-9}, {"top_k": 1}, {"temperature": 0.0}, *({"temperature": t} for t in (1e-40, 1e-46))):
        assert frequencies(**greedy, n=50) == [1, 0, 0, 0]  # no overflow


def test_streaming_emits_whole_characters_only(monkeypatch):
    text, model, script = " 東京 🙂 é", make_model(), []  # the model's most likely tokens are those of the script
    one_hot = torch.nn.functional.one_hot
    monkeypatch.setattr(model, "forward", lambda idx, **_: 50.0 * one_hot(torch.full_like(idx, script.pop(0)), 50257))
    ids = get_tokenizer().encode(text)
    assert any("\ufffd" in get_tokenizer().decode([i]) for i in ids)  # some tokens hold parts of characters
    script += [*ids, pico.Tokenizer.end_of_text, *ids]  # ends there
    pieces = list(stream_text(model, "x", 100, temperature=0))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)
    for n in range(1, len(ids)):  # cut off anywhere: a prefix of the text
        script[:] = ids
        assert text.startswith("".join(stream_text(model, "x", n, temperature=0)))
        assert len(script) == len(ids) - n


@pytest.mark.parametrize("top_p", [None, 1.0])
def test_without_a_nucleus_every_token_may_come(monkeypatch, top_p):
    """Rounded sums of probabilities reach 1 long before the last of them."""
    seen, rng, logits = [], torch.Generator().manual_seed(0), torch.randn(50257, generator=torch.Generator()) * 2
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **options: seen.append(p) or torch.zeros(1).long())
    pico.sample_token(logits, rng, 1.0, None, top_p)
    assert (seen[0] > 0).all()


def test_bad_arguments_are_refused():
    bad = {"max_new_tokens": [0, 2.5], "temperature": [-0.1, float("nan"), float("inf")], "top_k": [0, 2.5]}
    bad |= {"top_p": [0, 1.1], "seed": [10**20, 0.5]}
    for option, value in [(option, value) for option, values in bad.items() for value in values]:
        with pytest.raises(PicoError, match=rf"Generation needs .*{option}"):
            generate(make_model(), "The", **{option: value})
