"""The decoder: the properties that define it hold. That another implementation agrees is tested in test_export.py."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import pico_helpers as pico


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50257, shape, generator=seeded(seed))


def test_parameter_counts_of_the_full_model_as_shipped():
    body, everything = pico.load_model(pico.SHIPPED_CHECKPOINT, "cpu").count_parameters()
    assert body == 8 * (4 * 448**2 + 3 * 448 * 512 + 4 * 448) + 2 * 448 == 11_942_784
    assert everything == body + 50257 * 448 == 34_457_920


def test_a_token_changes_only_its_own_and_later_logits(tiny_model):
    idx = random_ids(1, 20)
    changed = idx.clone()
    changed[0, 11] = (idx[0, 11] + 1) % 50257
    with torch.no_grad():
        a, b = tiny_model(idx), tiny_model(changed)
    assert torch.equal(a[:, :11], b[:, :11]) and not torch.allclose(a[:, 11:], b[:, 11:])


def test_rope_scores_depend_on_relative_position_only(tiny_model):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=seeded())

    def score(i: int, j: int) -> float:
        a, b = (pico.apply_rope(x, tiny_model.rope_cos[[n]], tiny_model.rope_sin[[n]]) for x, n in ((q, i), (k, j)))
        return float((a * b).sum())

    for shift in (1, 7, 30):
        assert score(9, 4) == pytest.approx(score(9 + shift, 4 + shift), abs=1e-5)
        assert score(9, 4) != pytest.approx(score(9 + shift, 4), abs=1e-3)


def test_a_capturing_pass_gives_the_logits_of_the_normal_one_and_rows_that_sum_to_one():
    model = pico.PicoLLM(pico.ModelConfig(), seed=2).train()  # capture must switch dropout off and on again
    capture = pico.capture_attention(model, "The captain said that she would sail at dawn.")
    assert model.training
    idx, layers = torch.tensor([capture.token_ids]), {}
    with torch.no_grad():
        expected, logits = model.eval()(idx), model(idx, on_attention=layers.__setitem__)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    n, weights = len(capture.token_ids), torch.cat([layers[layer] for layer in range(8)])
    assert weights.shape == (8, 7, n, n) and weights.dtype == torch.float32 and torch.equal(capture.weights, weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 7, n))
    assert torch.count_nonzero(weights.triu(1)) == 0


@pytest.mark.parametrize("by", ["rows", "words"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("ignored", [None, -100, -1])
def test_loss_equals_cross_entropy_of_the_logits_with_its_gradients(tiny_model, precision, ignored, by, monkeypatch):
    if by == "rows":  # as on a GPU
        monkeypatch.setattr(pico, "loss_by_words", lambda *arguments: pico.loss_by_rows(*arguments[:-1]))
    tiny_model.loss_chunk = {"rows": 7, "words": 4000}[by]  # divides neither the rows nor the vocabulary
    idx, targets = random_ids(3, 10), random_ids(3, 10, seed=1)
    if ignored is not None:
        targets[0, :4] = targets[2, 9] = ignored
    gradients = []
    for ours in (False, True):
        tiny_model.zero_grad()
        with torch.autocast("cpu", {"fp16": torch.float16}.get(precision, torch.bfloat16), precision != "fp32"):
            result = tiny_model(idx, targets) if ours else tiny_model(idx).flatten(0, 1)
        loss = result if ours else F.cross_entropy(result.float(), targets.flatten(), ignore_index=ignored or -100)
        loss.backward()
        gradients.append((loss, *(p.grad.clone() for p in tiny_model.parameters())))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(gradients[0][0].item(), abs=1e-5 if precision == "fp32" else 2e-3)
    for expected, found in zip(*(found[1:] for found in gradients), strict=True):
        assert (found - expected).norm() < (1e-5 if precision == "fp32" else 2e-2) * expected.norm()
    assert torch.equal(tiny_model.token_embedding.weight.grad[50257:], torch.zeros(47, 32)), "of the padding"


@pytest.mark.parametrize("dtype, needs_grad", [(torch.float32, True), (torch.float32, False), (torch.float16, True)])
def test_loss_by_rows_may_only_overflow_with_gradients_and_not_in_fp16(dtype, needs_grad):
    hidden, weight = torch.ones(2, 1, dtype=dtype), torch.zeros(8, 1, dtype=dtype)
    weight[3] = 100
    losses, *gradients = pico.loss_by_rows(hidden, weight, torch.tensor([1, 3]), 6, 1, needs_grad)
    overflows = needs_grad and dtype == torch.float32
    assert losses.tolist() == pytest.approx([math.inf if overflows else 100, 0])
    if needs_grad:  # of two words 100 apart
        assert gradients[0].isfinite().tolist() == [[not overflows], [True]]
        assert overflows or gradients[1][:, 0].tolist() == [0, -1, 0, 1, 0, 0, 0, 0]
        _, *nothing = pico.loss_by_rows(hidden, weight, torch.tensor([-1, -1]), 6, 1, True)
        assert not any(gradient.any() for gradient in nothing), "an ignored target counts nowhere"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_the_loss_of_sure_words_is_that_of_the_same_rounded_logits(dtype):
    hidden, weight = (torch.randn(n, 32, generator=seeded(n)) for n in (64, 200))
    targets = 3 * torch.arange(64)
    hidden, weight = (weight[targets] + 0.1 * hidden).to(dtype), weight.to(dtype)  # logits of some 30, others of 6
    logits = (hidden @ weight.T).float().requires_grad_()
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected.sum().backward()
    losses, *gradients = torch.compile(pico.loss_by_rows, dynamic=False)(hidden, weight, targets, 200, 64, True)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-3)
    for found, exact in zip(gradients, (logits.grad @ weight.float(), logits.grad.T @ hidden.float()), strict=True):
        assert (found.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1, 10, 300])
def test_loss_by_words_takes_many_rows_and_large_logits(scale, compiled):
    """4,500 rows are two parts. At 300 logits exceed the first block's by 1,000s, at 10 by so much that sums do."""
    generator = seeded()
    hidden = torch.randn(4500, 8, generator=generator, requires_grad=True)
    weight = scale * torch.randn(120, 8, generator=generator) * torch.linspace(0.1, 1, 120)[:, None]
    weight[100:] = 0
    targets = torch.randint(100, (4500,), generator=generator)
    negative = targets.where(targets != 3, -1)
    expected = F.cross_entropy((hidden @ weight.requires_grad_().T)[:, :100], targets, reduction="none")
    expected[targets != 3].sum().backward()
    with torch.no_grad():
        losses, *gradients = pico.loss_by_words(hidden, weight, negative, 100, 30, True, compiled)
        alone, *empty = pico.loss_by_words(hidden, weight, negative, 100, 30, False, compiled)
    assert torch.equal(losses, alone) and all(gradient.numel() == 0 for gradient in empty)
    torch.testing.assert_close(losses[targets != 3], expected.detach()[targets != 3], atol=1e-3, rtol=1e-5)
    for gradient, leaf in zip(gradients, (hidden, weight), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, atol=1e-3 * scale, rtol=1e-4)


def test_attentions_backward_by_products_is_pytorchs(tiny_config):
    torch.compiler.reset()
    gradients = []
    for by_products in (False, True):
        model = pico.PicoLLM(dataclasses.replace(tiny_config, dropout=0.0)).train()
        attention = model.blocks[0].attention
        torch.nn.init.normal_(attention.qkv_proj.weight, std=0.3, generator=seeded(1))
        attention.backward_by_products, x = by_products, torch.randn(2, 24, 32, generator=seeded())
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(attention, backend="aot_eager")(x, model.rope_cos[:24], model.rope_sin[:24])
        (y.float() ** 2).sum().backward()
        gradients.append(attention.qkv_proj.weight.grad)
    usual, ours = gradients
    assert usual.norm() > 0 and not torch.equal(usual, ours), "one of them went the other way"
    assert (usual - ours).norm() < 0.02 * usual.norm()


def test_token_losses_are_those_of_the_logits_and_a_loss_without_any_target_moves_nothing(tiny_model):
    loss = tiny_model(random_ids(1, 4), torch.full((1, 4), -100))
    loss.backward()
    assert loss.isnan() and all(torch.count_nonzero(p.grad) == 0 for p in tiny_model.parameters())  # as F.cross_entropy
    tiny_model.to(torch.bfloat16).loss_chunk = 3000
    hidden, targets = torch.randn(11, 32, generator=seeded()).bfloat16(), random_ids(11)
    logits = F.linear(hidden, tiny_model.token_embedding.weight)[:, :50257].float()
    losses = tiny_model.token_losses(hidden, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), atol=1e-3, rtol=1e-4)


def test_initial_weights_are_gpt2s_and_the_untrained_loss_is_that_of_chance(tiny_config):
    model = pico.PicoLLM(dataclasses.replace(tiny_config, d_model=64, d_ff=96)).eval()
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.02 / math.sqrt(2 * 2) if name.endswith(("out_proj.weight", "down_proj.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    assert not model.token_embedding.weight[50257:].any(), "of the padding"
    with torch.no_grad():
        loss = model(random_ids(4, 32), random_ids(4, 32, seed=1))
    assert loss.item() == pytest.approx(math.log(50257), abs=0.2)


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
    assert (y == 0).double().mean().item() == pytest.approx(n_drop / 256, abs=5 * math.sqrt(p / x.numel()) + 1e-4)
    kept = y[y > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - n_drop / 256)))  # so the expected value is x
    assert y.mean().item() == pytest.approx(2, abs=0.02)
    torch.testing.assert_close(x.grad, y.detach() / 2)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("silent", ["attention.out_proj", "mlp.down_proj"])
def test_dropout_falls_on_the_embedding_and_on_what_each_half_of_a_block_adds(tiny_config, silent):
    torch.manual_seed(0)
    model, seen = pico.PicoLLM(dataclasses.replace(tiny_config, dropout=0.5)).train(), []
    model.blocks[0].get_submodule(silent).weight.detach().zero_()
    model.blocks[0].register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output - inputs[0]]))
    model(random_ids(4, 32))
    assert [(x == 0).double().mean().item() for x in seen] == pytest.approx([0.5, 0.5], abs=0.05)


def test_attention_dropout_keeps_the_mean_and_draws_for_every_position(tiny_config):
    config = dataclasses.replace(tiny_config, dropout=0.3)
    attention, cos_sin = pico.CausalSelfAttention(config, 0), (torch.ones(20, 16), torch.zeros(20, 16))
    x = torch.randn(1, 20, 32, generator=seeded())
    with torch.no_grad():
        expected = attention.eval()(x, *cos_sin)
        torch.manual_seed(0)
        draws = torch.cat([attention.train()(x.expand(500, -1, -1), *cos_sin) for _ in range(8)])  # (4000, 20, 32)
    assert draws.std(0).min() > 0
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < 5.5 and error.square().mean().sqrt() < 1.3


def test_cache_gives_the_same_logits_in_pieces_up_to_the_last_position(tiny_model):
    idx = random_ids(2, 64)  # twice the context
    cache = pico.KVCache(tiny_model.config, 2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [tiny_model(part, cache=cache) for part in idx.split([5, 1, 9, 49], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), tiny_model(idx), atol=1e-5, rtol=1e-5)
    with pytest.raises(pico.PicoError, match="65 positions exceed the model's 64"):
        tiny_model(idx[:, :1], cache=cache)
    for text in ("", "  \n ", "word " * 600):
        with pytest.raises(pico.PicoError, match=r"empty|shorten"):
            pico.capture_attention(tiny_model, text)


def test_a_seed_names_one_untrained_model_and_its_dropout(tiny_config):
    state = torch.random.get_rng_state()
    a, b, c = (pico.PicoLLM(tiny_config, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.token_embedding.weight, c.token_embedding.weight)
    assert torch.equal(state, torch.random.get_rng_state())
    idx, losses = random_ids(2, 30), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(a.train()(idx, idx).item())
    assert losses[0] == losses[1] != losses[2]


def test_impossible_configurations_say_so():
    for settings, message in (
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
    ):
        with pytest.raises(pico.PicoError, match=message) as error:
            pico.ModelConfig(**settings)
        assert "\n" not in str(error.value)
