"""Sampling: the cache changes nothing but speed, filters keep what they promise, text comes in whole characters."""

import itertools

import pytest
import torch

import pico_helpers as pico
from pico_helpers import ModelConfig, PicoError, PicoLLM, generate, get_tokenizer, stream_text

FREE = {"temperature": 1.0, "top_k": None, "top_p": None}


def make_model(context_length: int = 32, **options) -> PicoLLM:
    config = ModelConfig(
        d_model=32, n_layer=2, n_head=2, d_ff=32, context_length=context_length, max_positions=64, **options
    )
    model = PicoLLM(config, seed=3)
    with torch.no_grad():  # an untrained model of this size has nearly flat logits; make it opinionated
        model.token_embedding.weight.mul_(30)
    return model


def scripted(monkeypatch, model: PicoLLM, tokens: list[int]) -> None:
    """Makes the model's most likely next token follow a script, whatever the input."""
    script = iter(tokens)

    def forward(idx, targets=None, *, cache=None, on_attention=None):
        logits = torch.zeros(*idx.shape, model.config.vocab_size)
        logits[..., next(script)] = 50.0
        return logits

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_cache_gives_the_same_text_also_past_the_window(temperature, seed):
    model = make_model()
    prompt = "The history of the city began when"
    options = {"max_new_tokens": 90, "temperature": temperature, "top_k": None, "top_p": None, "seed": seed}
    assert generate(model, prompt, **options) == generate(model, prompt, use_cache=False, **options)


def test_cache_is_used_and_the_window_slides(monkeypatch):
    model = make_model(context_length=16)
    lengths, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kw: lengths.append(idx.shape[1]) or forward(idx, **kw))
    prompt = "one two three four"  # 4 tokens
    list(pico.stream_tokens(model, get_tokenizer().encode(prompt), 30, **FREE))
    # 4, then one at a time until 16 are held, then the last 12 anew, and again every five tokens
    assert lengths == [4, *[1] * 12, 12, *[1] * 4, 12, *[1] * 4, 12, *[1] * 4, 12, 1]
    lengths.clear()
    list(pico.stream_tokens(model, range(100), 3, **FREE))
    assert lengths == [12, 1, 1]  # a prompt longer than the window


def test_seed_decides_the_text_and_global_state_does_not():
    model = make_model()
    options = {"max_new_tokens": 20, "temperature": 1.5, "top_k": None}
    texts = [generate(model, "A", seed=seed, **options) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    before = torch.random.get_rng_state()
    generate(model, "A", seed=5, **options)
    assert torch.equal(before, torch.random.get_rng_state())


def test_sampling_follows_the_filtered_distribution():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[torch.tensor([2, 0, 3, 1])]  # likely order: 1, 3, 0, 2
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature=1.0, top_k=None, top_p=None, n=4000):
        draws = [pico.sample_token(logits, temperature, top_k, top_p, generator) for _ in range(n)]
        return [draws.count(token) / n for token in (1, 3, 0, 2)]

    assert frequencies() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    assert frequencies(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert frequencies(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert frequencies(top_p=0.76) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.03)
    assert frequencies(temperature=0.5) == pytest.approx(
        [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345], abs=0.03
    )
    assert frequencies(top_p=1e-9, n=50) == frequencies(top_k=1, n=50) == frequencies(temperature=0.0, n=50)
    assert frequencies(temperature=1e-40, n=50) == [1, 0, 0, 0]  # no overflow on the way to greedy


def test_streaming_emits_whole_characters_only(monkeypatch):
    text = " 東京 🙂 é"
    ids = get_tokenizer().encode(text)
    assert any("\ufffd" in get_tokenizer().decode([i]) for i in ids)  # some tokens hold parts of characters
    model = make_model()
    scripted(monkeypatch, model, [*ids, pico.Tokenizer.end_of_text])
    pieces = list(stream_text(model, "x", 100, temperature=0))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)
    for n in range(1, len(ids)):  # cut off anywhere: a prefix of the text
        scripted(monkeypatch, model, ids)
        assert text.startswith("".join(stream_text(model, "x", n, temperature=0)))


def test_stops_at_end_of_text_and_at_max_new_tokens(monkeypatch):
    ids = get_tokenizer().encode(" alpha beta gamma")
    model = make_model()
    scripted(monkeypatch, model, [ids[0], pico.Tokenizer.end_of_text, ids[1]])
    assert generate(model, "x", 10, temperature=0) == "x alpha"
    scripted(monkeypatch, model, ids)
    assert generate(model, "x", 2, temperature=0) == "x alpha beta"


def test_empty_prompt_starts_from_end_of_text(monkeypatch):
    model = make_model()
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kw: seen.append(idx.tolist()) or forward(idx, **kw))
    generate(model, max_new_tokens=1)
    assert seen == [[[pico.Tokenizer.end_of_text]]]


def test_the_callers_modes_hold_between_tokens():
    model = make_model(dropout=0.5).train()
    stream = stream_text(model, "The", 5, temperature=0)
    next(stream)
    assert model.training and torch.is_grad_enabled()
    same = [generate(model, "The", 5, temperature=0) for _ in range(2)]
    assert same[0] == same[1]  # no dropout while sampling


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(PicoError):
        generate(make_model(), "The", **options)


def test_streams_lazily(monkeypatch):
    model = make_model()
    calls = itertools.count()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kw: next(calls) is None or forward(idx, **kw))
    next(iter(pico.stream_tokens(model, [1, 2], 50, **FREE)))
    assert next(calls) == 1  # one token asked for, one pass made
