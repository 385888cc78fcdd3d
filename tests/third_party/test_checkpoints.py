"""Factorized models of transformers, to files and back."""

import copy

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import accelerate
import torch
import transformers
from zoo import MODELS, families, logits

from frobdecay import factorize, load_dense_, load_factorized, merge, save_factorized


def _factorized(name):
    model, inputs = MODELS[name]()
    factorize(model, rank=0.25, exclude="*embed*" if name != "GPT-2" else "*wte")
    return model, inputs


def _like(model):
    """A fresh model of the class, from nothing but the configuration."""
    return type(model)(copy.deepcopy(model.config)).eval()


@pytest.mark.covers("P14")
@pytest.mark.integration(column="save_factorized, load_factorized")
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("family", families("BERT", "BERT (masked LM)", "GPT-2", "T5"))
def test_a_saved_model_is_rebuilt_from_its_configuration(tmp_path, family, empty):
    """``save_factorized`` and ``config.save_pretrained``; also into a model without memory."""
    model, inputs = _factorized(family)
    save_factorized(model, tmp_path / "factorized.safetensors")
    model.config.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    if empty:
        with accelerate.init_empty_weights():
            fresh = type(model)(config)
        fresh.tie_weights()  # each of its parameters is one of its own there
    else:
        fresh = type(model)(config)
    load_factorized(fresh, tmp_path / "factorized.safetensors")
    assert torch.equal(logits(fresh.eval(), inputs), logits(model, inputs))


@pytest.mark.covers("P14")
@pytest.mark.integration(column="merge, save_pretrained")
@pytest.mark.parametrize("family", families("BERT", "GPT-2"))
def test_from_pretrained_takes_the_merged_model(tmp_path, family):
    """The dense checkpoint is an ordinary one."""
    model, inputs = _factorized(family)
    merge(copy.deepcopy(model)).save_pretrained(tmp_path)
    fresh, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(fresh.eval(), inputs), logits(model, inputs))


@pytest.mark.covers("P14")
@pytest.mark.integration(column="save_pretrained, from_pretrained (factorized)", refused=True)
@pytest.mark.parametrize("family", families("BERT", "GPT-2"))
def test_save_pretrained_of_a_factorized_model_is_no_checkpoint(tmp_path, family):
    """``from_pretrained`` only reports what it initializes anew; ``load_factorized`` refuses."""
    model, _ = _factorized(family)
    model.save_pretrained(tmp_path)
    fresh, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert any(key.endswith("weight") for key in info["missing_keys"])
    assert any("parametrizations" in key for key in info["unexpected_keys"])
    with pytest.raises(ValueError, match=r"no structure of frobdecay.*save_factorized"):
        load_factorized(fresh, tmp_path / "model.safetensors")


@pytest.mark.covers("P13")
@pytest.mark.integration(column="load_dense_")
@pytest.mark.parametrize("family", families("BERT", "GPT-2"))
def test_a_factorized_model_takes_the_dense_checkpoint(family):
    """At full rank it then computes what the dense model does."""
    dense, inputs = MODELS[family]()
    model = _like(dense)
    factorize(model, rank=1.0, exclude="*embed*" if family != "GPT-2" else "*wte")
    report = load_dense_(model, dense.state_dict())
    assert max(row.error for row in report.rows) < 1e-5
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.covers("P28")
def test_the_trainers_safetensors_have_no_shared_memory(tmp_path):
    """Of a factorized model with a tie, as ``save_pretrained`` checks."""
    model, _ = _factorized("GPT-2")
    model.save_pretrained(tmp_path)
    assert transformers.utils.SAFE_WEIGHTS_NAME in {path.name for path in tmp_path.iterdir()}
