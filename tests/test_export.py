"""The exported folder is loaded by transformers, which knows nothing of this project."""

import dataclasses

import pytest
import torch

import pico_helpers as pico
from pico_helpers import ModelConfig, PicoError, PicoLLM, export_to_hf, get_tokenizer, to_stablelm_state_dict

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> PicoLLM:
    sizes = {"d_model": 48, "n_layer": 3, "n_head": 2, "d_ff": 40, "context_length": 32, "max_positions": 64}
    config = ModelConfig(**sizes, rope_theta=500.0)
    model, generator = PicoLLM(config, seed=1).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # larger weights, and norms that are not the identity
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return export_to_hf(model, tmp_path_factory.mktemp("hf") / "model")


def load(folder):
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return loaded.eval()


@pytest.mark.parametrize("qk_norm, dtype", [(False, torch.float32), (True, torch.float32), (False, torch.float16)])
def test_transformers_gives_identical_logits(model, tmp_path, qk_norm, dtype):
    twin = PicoLLM(dataclasses.replace(model.config, qk_norm=qk_norm)).eval()
    twin.load_state_dict(model.state_dict())
    loaded = load(export_to_hf(twin.to(dtype), tmp_path / "hf"))
    assert type(loaded).__name__ == "StableLmForCausalLM" and loaded.dtype == dtype
    idx = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(1))  # all of max_positions
    with torch.no_grad():
        ours, theirs = twin(idx), loaded(idx).logits
        assert ((ours - model(idx)).abs().max() > 0.1) == qk_norm
    assert theirs.shape == (2, 64, 50257) and ours.std() > 0.3  # the padding rows of the vocabulary are gone
    torch.testing.assert_close(theirs, ours, atol=1e-5 if dtype == torch.float32 else 0.01, rtol=0)


def test_weights_stay_tied_are_stored_once_and_generation_continues_alike(model, folder):
    loaded = load(folder)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in loaded.parameters()) == model.count_parameters()[1]
    assert sum(t.numel() for t in to_stablelm_state_dict(model).values()) == model.count_parameters()[1]
    ours = torch.tensor([get_tokenizer().encode("The history of the city")])
    theirs = loaded.generate(ours, max_new_tokens=15, do_sample=False, pad_token_id=50256)
    with torch.no_grad():
        while ours.shape[1] < theirs.shape[1]:
            ours = torch.cat([ours, model(ours)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(theirs, ours)


def test_tokenizer_gives_identical_ids(folder):
    texts = ["The quick brown fox jumps over the lazy dog.", "naïve café 東京 🙂 don't they'll 3.14159\r\n", ""]
    texts += [" = Robert Boulter = \n\n  In 2006 , Boulter starred @-@ alongside Whishaw's  play\t."]
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = get_tokenizer().encode(text)
        assert loaded(text)["input_ids"] == ids and loaded.decode(ids) == text
    assert loaded.eos_token_id == 50256 and len(loaded) == 50257 and loaded.model_max_length == 64


def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pico, "package_folder", lambda name: None if name == "safetensors" else tmp_path)
    with pytest.raises(PicoError, match="pip install safetensors"):
        export_to_hf(model, tmp_path)
