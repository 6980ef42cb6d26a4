"""The exported folder is loaded by transformers, which knows nothing of this project."""

import dataclasses
import json

import pytest
import torch

import pico_helpers as pico
from pico_helpers import ModelConfig, PicoError, PicoLLM, export_to_hf, get_tokenizer, to_stablelm_state_dict

transformers = pytest.importorskip("transformers")

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    " = Robert Boulter = \n\n  In 2006 , Boulter starred @-@ alongside Whishaw's  play\t.",
    "naïve café 東京 🙂 don't they'll 3.14159\r\n",
    "",
]


@pytest.fixture(scope="module")
def model() -> PicoLLM:
    config = ModelConfig(d_model=48, n_layer=3, n_head=2, d_ff=40, context_length=32, max_positions=64)
    model = PicoLLM(config, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # larger weights, and norms that are not the identity
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return export_to_hf(model, tmp_path_factory.mktemp("hf") / "model")


def test_transformers_gives_identical_logits(model, folder):
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded).__name__ == "StableLmForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    idx = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(1))  # all of max_positions
    with torch.no_grad():
        ours, theirs = model(idx), loaded.eval()(idx).logits
    assert theirs.shape == (2, 64, 50257)  # the padding rows of the vocabulary are gone
    assert ours.std() > 0.3
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_qk_norm_travels_too(model, tmp_path):
    twin = PicoLLM(dataclasses.replace(model.config, qk_norm=True)).eval()
    twin.load_state_dict(model.state_dict())
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        export_to_hf(twin, tmp_path / "hf"), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    idx = torch.randint(50257, (1, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (twin(idx) - model(idx)).abs().max() > 0.01
        torch.testing.assert_close(loaded.eval()(idx).logits, twin(idx), atol=1e-5, rtol=0)


def test_tied_weights_are_stored_once_and_stay_tied(model, folder):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in loaded.parameters()) == model.count_parameters()[1]
    assert sum(t.numel() for t in to_stablelm_state_dict(model).values()) == model.count_parameters()[1]


def test_generation_continues_alike(model, folder):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    idx = torch.tensor([get_tokenizer().encode("The history of the city")])
    theirs = loaded.generate(idx, max_new_tokens=15, do_sample=False, pad_token_id=50256)
    ours = idx
    with torch.no_grad():
        while ours.shape[1] < theirs.shape[1]:
            ours = torch.cat([ours, model(ours)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(theirs, ours)


def test_tokenizer_gives_identical_ids(folder):
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = get_tokenizer().encode(text)
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
    assert loaded.eos_token_id == 50256 and len(loaded) == 50257
    assert loaded.model_max_length == 64


def test_half_precision_keeps_its_type(model, tmp_path):
    import copy

    half = copy.deepcopy(model).half()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(export_to_hf(half, tmp_path), dtype="auto")
    assert loaded.dtype == torch.float16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pico, "package_folder", lambda name: None if name == "safetensors" else tmp_path)
    with pytest.raises(PicoError, match="pip install safetensors"):
        export_to_hf(model, tmp_path)
