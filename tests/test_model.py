"""The decoder: an independent implementation agrees, and the properties that define it hold."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import pico_helpers as pico


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50257, shape, generator=torch.Generator().manual_seed(seed))


def test_parameter_counts_of_the_full_model():
    body, everything = pico.PicoLLM(pico.ModelConfig()).count_parameters()
    assert body == 8 * (4 * 448**2 + 3 * 448 * 512 + 4 * 448) + 2 * 448 == 11_942_784
    assert everything == body + 50257 * 448 == 34_457_920


@pytest.mark.parametrize("length", [1, 40, 384, 512])
def test_transformers_stablelm_gives_the_same_logits(length):
    """StableLM has LayerNorm, full rotary positions and SwiGLU without biases: an implementation that is not ours."""
    transformers = pytest.importorskip("transformers")
    config = pico.ModelConfig(n_layer=3)
    model = pico.PicoLLM(config, seed=3).eval()
    with torch.no_grad():  # norms away from their initial ones and zeros
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    reference = transformers.StableLmForCausalLM(
        transformers.StableLmConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_head,
            max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0},
            tie_word_embeddings=True,
        )
    ).eval()
    missing, unexpected = reference.load_state_dict(pico.to_stablelm_state_dict(model), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    reference.tie_weights()
    idx = random_ids(2, length)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), reference(idx).logits, atol=1e-5, rtol=1e-5)


def test_a_token_changes_only_its_own_and_later_logits(tiny_model):
    idx = random_ids(1, 20)
    changed = idx.clone()
    changed[0, 11] = (idx[0, 11] + 1) % 50257
    with torch.no_grad():
        a, b = tiny_model(idx), tiny_model(changed)
    assert torch.equal(a[:, :11], b[:, :11])
    assert not torch.allclose(a[:, 11:], b[:, 11:])


@pytest.mark.parametrize("shift", [1, 7, 30])
def test_rope_scores_depend_on_relative_position_only(tiny_model, shift):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        cos, sin = tiny_model.rope_cos, tiny_model.rope_sin
        rotated = [pico.apply_rope(x, cos[n : n + 1], sin[n : n + 1]) for x, n in ((q, i), (k, j))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(9, 4) == pytest.approx(score(9 + shift, 4 + shift), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9 + shift, 4), abs=1e-3)


def test_attention_rows_sum_to_one_and_never_look_ahead(tiny_model):
    layers = {}
    pico.stream_attention(tiny_model, random_ids(3, 24), layers.__setitem__)
    assert sorted(layers) == [0, 1]
    for weights in layers.values():
        assert weights.shape == (3, 2, 24, 24) and weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 24))
        assert torch.count_nonzero(weights.triu(1)) == 0


def test_capturing_pass_gives_the_logits_of_the_normal_pass():
    model = pico.PicoLLM(pico.ModelConfig(), seed=2).train()  # capture must switch dropout off and on again
    capture = pico.capture_attention(model, "The captain said that she would sail at dawn.")
    assert model.training
    idx, layers = torch.tensor([capture.token_ids]), []
    with torch.no_grad():
        expected = model.eval()(idx)
        logits = model(idx, on_attention=lambda _, weights: layers.append(weights[0]))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    n = len(capture.token_ids)
    assert capture.weights.shape == (8, 7, n, n) and torch.equal(capture.weights, torch.stack(layers))


@pytest.mark.parametrize("by", ["rows", "words"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ignored", [None, -100, -1, 5])
def test_loss_equals_cross_entropy_of_the_logits_with_its_gradients(tiny_model, precision, ignored, by, monkeypatch):
    if by == "rows":  # as on a GPU
        monkeypatch.setattr(pico, "loss_by_words", lambda *arguments: pico.loss_by_rows(*arguments[:-1]))
    tiny_model.loss_chunk = {"rows": 7, "words": 4000}[by]  # divides neither the rows nor the vocabulary
    idx, targets = random_ids(3, 10), random_ids(3, 10, seed=1)
    options = {} if ignored is None else {"ignore_index": ignored}
    if ignored is not None:
        targets[0, :4] = targets[2, 9] = ignored
    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with cast:
        logits = tiny_model(idx).flatten(0, 1).float()
    expected = F.cross_entropy(logits, targets.flatten(), **options)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    with cast:
        loss = tiny_model(idx, targets, **options)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5 if precision == "fp32" else 2e-3)
    for name, p in tiny_model.named_parameters():
        error = (p.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < (1e-5 if precision == "fp32" else 2e-2), name
    padding = tiny_model.token_embedding.weight.grad[50257:]
    assert len(padding) == 47 and torch.count_nonzero(padding) == 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1, 10, 300])
def test_loss_by_words_takes_many_rows_and_large_logits(scale, compiled):
    """4,500 rows are two parts. At 300 logits exceed the first block's by 1,000s, at 10 by so much that sums do."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4500, 8, generator=generator, requires_grad=True)
    weight = torch.randn(120, 8, generator=generator) * torch.linspace(0.1, 1, 120)[:, None]
    weight[100:] = 0
    weight = (scale * weight).requires_grad_()
    targets = torch.randint(100, (4500,), generator=generator)
    counts = targets != 3
    F.cross_entropy((hidden @ weight.T)[:, :100], targets, reduction="none")[counts].sum().backward()
    with torch.no_grad():
        losses, *gradients = pico.loss_by_words(hidden, weight, targets, counts, 100, 30, True, compiled)
        alone, *empty = pico.loss_by_words(hidden, weight, targets, counts, 100, 30, False, compiled)
        expected = F.cross_entropy((hidden @ weight.T)[:, :100], targets, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=1e-5)
    assert torch.equal(losses, alone) and all(gradient.numel() == 0 for gradient in empty)
    for gradient, leaf in zip(gradients, (hidden, weight), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, atol=1e-3 * scale, rtol=1e-4)


def test_attentions_backward_by_products_is_pytorchs(tiny_config):
    torch.compiler.reset()
    gradients = []
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    for by_products in (False, True):
        model = pico.PicoLLM(dataclasses.replace(tiny_config, dropout=0.0)).train()
        attention = model.blocks[0].attention
        torch.nn.init.normal_(attention.qkv_proj.weight, std=0.3, generator=torch.Generator().manual_seed(1))
        attention.backward_by_products = by_products
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(attention, backend="aot_eager")(x, model.rope_cos[:24], model.rope_sin[:24])
        (y.float() ** 2).sum().backward()
        gradients.append(attention.qkv_proj.weight.grad)
    (usual, ours), norm = gradients, gradients[0].norm()
    assert norm > 0 and not torch.equal(usual, ours), "one of them went the other way"
    assert (usual - ours).norm() < 0.02 * norm


def test_a_loss_without_any_target_is_nan_and_moves_nothing(tiny_model):
    idx = random_ids(1, 4)
    loss = tiny_model(idx, torch.full_like(idx, -100))
    loss.backward()
    assert loss.isnan()  # as F.cross_entropy
    assert all(torch.count_nonzero(p.grad) == 0 for p in tiny_model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_are_those_of_the_logits(tiny_model, dtype):
    tiny_model.to(dtype).loss_chunk = 3000
    hidden = torch.randn(11, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = random_ids(11)
    logits = F.linear(hidden, tiny_model.token_embedding.weight)[:, :50257].float()
    losses = tiny_model.token_losses(hidden, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), atol=1e-3, rtol=1e-4)


def test_initial_weights_are_gpt2s(tiny_config):
    model = pico.PicoLLM(dataclasses.replace(tiny_config, d_model=64, d_ff=96))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.02 / math.sqrt(2 * 2) if name.endswith(("out_proj.weight", "down_proj.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys(tiny_config):
    idx = random_ids(1, 12)
    for qk_norm in (False, True):
        model = pico.PicoLLM(dataclasses.replace(tiny_config, qk_norm=qk_norm), seed=1).eval()
        with torch.no_grad():
            for block in model.blocks:
                block.attention.qkv_proj.weight.mul_(20)  # far above the epsilon of the norm
            before = model(idx)
            for block in model.blocks:
                block.attention.qkv_proj.weight[: 2 * tiny_config.d_model] *= 3
            assert torch.allclose(model(idx), before, atol=1e-3) == qk_norm


@pytest.mark.parametrize("p", [0.1, 0.5, 0.001])
def test_dropout_keeps_the_mean_and_about_the_share(p):
    torch.manual_seed(0)
    dropout, x = pico.Dropout(p), torch.full((401, 1003), 2.0, requires_grad=True)  # not a multiple of 8
    y = dropout(x)
    y.sum().backward()
    n_drop = max(1, round(256 * p))
    share = (y == 0).double().mean().item()
    assert share == pytest.approx(n_drop / 256, abs=5 * math.sqrt(p / x.numel()) + 1e-4)
    kept = y[y > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - n_drop / 256)))  # so the expected value is x
    assert y.mean().item() == pytest.approx(2, abs=0.02)
    torch.testing.assert_close(x.grad, y.detach() / 2)
    assert torch.equal(dropout.eval()(x), x)


def test_attention_dropout_keeps_the_mean_and_draws_for_every_position(tiny_config):
    config = dataclasses.replace(tiny_config, dropout=0.3)
    attention, cos_sin = pico.CausalSelfAttention(config, 0), (torch.ones(20, 16), torch.zeros(20, 16))
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attention.eval()(x, *cos_sin)
        torch.manual_seed(0)
        draws = torch.cat([attention.train()(x.expand(500, -1, -1), *cos_sin) for _ in range(8)])  # (4000, 20, 32)
    assert draws.std(0).min() > 0
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < 5.5 and error.square().mean().sqrt() < 1.3


def test_dropout_follows_the_seed(tiny_model):
    idx, losses = random_ids(2, 30), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(tiny_model.train()(idx, idx).item())
    assert losses[0] == losses[1] != losses[2]


def test_untrained_loss_is_near_the_logarithm_of_the_vocabulary(tiny_model):
    with torch.no_grad():
        assert tiny_model(random_ids(4, 32), random_ids(4, 32, seed=1)).item() == pytest.approx(
            math.log(50257), abs=0.2
        )


def test_cache_gives_the_same_logits_in_pieces(tiny_model):
    idx = random_ids(2, 30)
    cache = pico.KVCache(tiny_model.config, 2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [tiny_model(part, cache=cache) for part in idx.split([5, 1, 9, 15], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), tiny_model(idx), atol=1e-5, rtol=1e-5)


def test_positions_beyond_the_context_work_up_to_the_rope_cache(tiny_model):
    with torch.no_grad():
        assert tiny_model(random_ids(1, 64)).shape == (1, 64, 50257)  # context 32, cache 64
    with pytest.raises(pico.PicoError, match="65 positions exceed the model's 64"):
        tiny_model(random_ids(1, 65))


def test_a_seed_names_one_untrained_model(tiny_config):
    state = torch.random.get_rng_state()
    a, b, c = (pico.PicoLLM(tiny_config, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["token_embedding.weight"], c["token_embedding.weight"])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("text", ["", "  \n ", "word " * 600])
def test_sentences_that_cannot_be_captured_say_so(tiny_model, text):
    with pytest.raises(pico.PicoError, match=r"empty|shorten"):
        pico.capture_attention(tiny_model, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 100}, r"d_model must be a multiple of 14 \(n_head heads of even size\), not 100"),
        ({"d_model": 7}, "d_model must be a multiple of 14"),
        ({"context_length": 600}, r"context_length must be at most max_positions \(512\), not 600"),
        ({"n_layer": 0}, "n_layer must be a whole number from 1 to 65,536, not 0"),
        ({"n_layer": True}, "n_layer must be a whole number"),
        ({"d_ff": 12.5}, "d_ff must be a whole number"),
        ({"vocab_size": 70_000}, "vocab_size must be a whole number from 1 to 65,536"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
        ({"dropout": math.nan}, "dropout must lie in"),
        ({"rope_theta": math.inf}, "rope_theta must be a positive number, not inf"),
    ],
)
def test_impossible_configurations_say_so(options, message):
    with pytest.raises(pico.PicoError, match=message) as error:
        pico.ModelConfig(**options)
    assert "\n" not in str(error.value)


# --- checkpoints that are wrong in their content ----------------------------------------------------------------------

BAD_CHECKPOINTS = {
    "impossible settings: .*'window'": lambda content: content["model_config"].update(window=3),
    "impossible settings: n_head must be": lambda content: content["model_config"].update(n_head=0),
    "impossible settings: Unknown optimizer 'sgd'": lambda content: content["train_config"].update(optimizer="sgd"),
    "lacks a field .*'corpus'": lambda content: content.pop("corpus"),
    "impossible settings: 'list'": lambda content: content.update(weights=[torch.zeros(3)]),
    "impossible settings: 'float'": lambda content: content["weights"].update(extra=1.5),
    "it has .*'tokenizer': 'bytes'}, not .*'gpt2'": lambda content: content.update(tokenizer="bytes"),
    "it has .*'version': 2, .* not .*'version': 1": lambda content: content.update(version=2),
    "does not fit its configuration: Missing key.*token_embedding": lambda content: content["weights"].pop(
        "token_embedding.weight"
    ),
    "does not fit its configuration": lambda content: content["weights"].pop("final_norm.weight"),
    "final_norm.bias": lambda content: content["weights"].update({"final_norm.bias": torch.zeros(5)}),
}


@pytest.fixture
def saved(tiny_model, tmp_path):
    checkpoint = pico.Checkpoint(
        tiny_model.config, pico.TrainConfig(), "a corpus", 3, [{"step": 3}], tiny_model.state_dict()
    )
    return pico.save_checkpoint(tmp_path / "model.pt", checkpoint)


@pytest.mark.parametrize("message", BAD_CHECKPOINTS)
def test_bad_checkpoints_say_what_is_wrong(saved, message):
    content = torch.load(saved, weights_only=True)
    BAD_CHECKPOINTS[message](content)
    torch.save(content, saved)
    before = saved.read_bytes()
    with pytest.raises(pico.PicoError, match=message) as error:
        pico.load_model(saved, "cpu")
    assert "\n" not in str(error.value) and saved.read_bytes() == before


def test_the_shipped_checkpoint_loads():
    assert pico.load_model(pico.shipped_checkpoint(), "cpu").count_parameters()[0] > 0
