"""Factorized models of transformers, to files and back."""

import copy
import json
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import accelerate
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from zoo import MODELS, families, logits

import frobdecay
from frobdecay import factorize, load_dense_, load_factorized, merge, save_factorized
from frobdecay.cli.main import main
from frobdecay.models.checkpoints.transformers import config_entries, when_imported
from frobdecay.models.select import Walk


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


# --- folders that save_pretrained writes ---------------------------------------------------------


NAME = "bert.encoder.layer.0.attention.self.query.weight"
KEY = NAME.replace("weight", "parametrizations.weight.original1")


def _saved(folder, family="BERT", **options):
    model, inputs = _factorized(family)
    model.save_pretrained(folder, **options)
    return model, inputs


def _edited(folder, change):
    """The folder with another config.json."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _same(found, model):
    theirs = dict(found.named_parameters())
    return all(torch.equal(theirs[name].cpu(), p) for name, p in model.named_parameters())


@pytest.mark.integration(row="BERT", column="from_pretrained, options")
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": "cpu", "low_cpu_mem_usage": True},
        {"device_map": {"": "cpu"}, "dtype": torch.float32},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_options_of_loading_are_obeyed(tmp_path, options):
    """Devices, memory; the factors are those that were saved."""
    model, inputs = _saved(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    assert _same(loaded, model)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.integration(row="Llama", column="from_pretrained, options")
def test_a_model_is_loaded_in_another_dtype(tmp_path):
    """The factors are cast, as weights are; a file in bfloat16 comes back so."""
    model, _ = _saved(tmp_path, "Llama")
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert _same(half, model.to(torch.bfloat16))
    half.save_pretrained(tmp_path / "half")
    assert _same(type(model).from_pretrained(tmp_path / "half"), half)


@pytest.mark.integration(row="Llama", column="from_pretrained, options")
def test_a_model_is_loaded_from_the_hubs_cache(tmp_path, monkeypatch):
    """By its name, from the folders that a download would make."""
    commit = "0" * 40
    folder = tmp_path / "models--us--factorized"
    model, _ = _saved(folder / "snapshots" / commit, "Llama")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained("us/factorized", **options)
    assert _same(loaded, model)


@pytest.mark.integration(row="BERT", column="from_pretrained, another head")
def test_another_head_takes_the_same_body(tmp_path):
    """The body alone, a new head on it, and the body into a model with a head."""
    model, inputs = _saved(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert _same(body, model.bert)
    other = transformers.BertForTokenClassification.from_pretrained(tmp_path)
    assert {p.name for p in frobdecay.products(other)} >= {NAME}
    assert torch.equal(other.get_parameter(KEY), model.get_parameter(KEY))
    body.save_pretrained(tmp_path / "body")
    again = type(model).from_pretrained(tmp_path / "body")
    assert _same(again.bert, model.bert)
    model.bert.save_pretrained(tmp_path / "inner")  # its configuration is the whole model's
    assert _same(transformers.AutoModel.from_pretrained(tmp_path / "inner"), model.bert)
    assert body(inputs["input_ids"]).last_hidden_state.isfinite().all()


@pytest.mark.integration(row="Llama", column="from_pretrained, PEFT")
def test_adapters_lie_on_a_loaded_model(tmp_path):
    """They are saved alone, name the folder, and come back on its factors."""
    peft = pytest.importorskip("peft")
    model, inputs = _saved(tmp_path / "base", "Llama")
    base = type(model).from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert "original0" in " ".join(name for name, _ in loaded.named_parameters())
    torch.testing.assert_close(logits(loaded, inputs), logits(adapted, inputs))
    assert (logits(loaded, inputs) - logits(model, inputs)).abs().max() > 1e-3


@pytest.mark.integration(row="BERT", column="from_pretrained, without frobdecay", refused=True)
def test_without_frobdecay_the_error_names_it(tmp_path, monkeypatch):
    """The library knows no such method then, and would draw the weights anew."""
    model, _ = _saved(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "frobdecay")
    for kind in (type(model), transformers.AutoModel):
        with pytest.raises(ValueError, match="import frobdecay"):
            kind.from_pretrained(tmp_path)


def test_acting_on_an_import_waits_for_it(tmp_path, monkeypatch):
    """Once, after the module was executed; now, where it is imported already."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "awaited_module.py").write_text("said = 1")
    seen = []
    before = list(sys.meta_path)
    when_imported("awaited_module", lambda: seen.append(sys.modules["awaited_module"].said))
    assert not seen
    import awaited_module

    assert awaited_module.said == 1
    assert (seen, sys.meta_path) == ([1], before)
    when_imported("awaited_module", lambda: seen.append(2))
    assert seen == [1, 2]
    with pytest.warns(UserWarning, match="this version of awaited_module do not fit: ZeroDivision"):
        when_imported("awaited_module", lambda: 1 / 0)
    assert transformers.PreTrainedModel.save_pretrained.__wrapped__


@pytest.mark.integration(row="BERT", column="save_pretrained of unrolled", refused=True)
def test_unrolled_models_are_refused_by_save_pretrained(tmp_path):
    """A copy, too; before a folder is made."""
    model, _ = _factorized("BERT")
    unrolled = copy.deepcopy(frobdecay.unroll(model))
    for part in (unrolled, unrolled.bert):
        with pytest.raises(ValueError, match=r"encoder.layer.0.*unrolled.*save the factorized"):
            part.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_saved_is_what_the_weights_are(tmp_path):
    """No record is a configuration that was read, nor one of what a given state_dict lacks."""
    model, inputs = _saved(tmp_path / "first")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "first")
    assert config.quantization_config["quant_method"] == "frobdecay"
    dense = type(model)(config)
    dense.save_pretrained(tmp_path / "second")
    assert _same(type(model).from_pretrained(tmp_path / "second"), dense)
    merged = merge(copy.deepcopy(model))
    model.save_pretrained(tmp_path / "third", state_dict=merged.state_dict())
    loaded = type(model).from_pretrained(tmp_path / "third")
    assert _same(loaded, merged)
    factors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "fourth", state_dict=factors)
    assert _same(type(model).from_pretrained(tmp_path / "fourth", config=config), model)
    assert logits(loaded, inputs).isfinite().all()


def test_a_quantized_model_with_factors_is_refused(tmp_path):
    """One configuration cannot say both; the model's own is as it was."""
    model, _ = _factorized("BERT")
    model.config.quantization_config = theirs = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match=r"is factorized, but the model is quantized.*merge"):
        model.save_pretrained(tmp_path / "new")
    assert model.config.quantization_config is theirs
    assert not (tmp_path / "new").exists()
    merge(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == theirs


def test_a_folder_can_be_written_without_the_model(tmp_path):
    """The entries of config.json and the factors are all that it takes."""
    model, inputs = MODELS["BERT"]()
    model.save_pretrained(tmp_path)
    factorize(model, rank=3)
    records = {
        name: held.record()
        for name, held in (
            (f"{path}.weight", module.parametrizations.weight[0])
            for path, module in model.named_modules()
            if hasattr(module, "parametrizations")
        )
    }
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    _edited(tmp_path, lambda content: content.update(config_entries(records)))
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))
    assert config_entries({}) == {}


def _record(**changes):
    return lambda content: content["quantization_config"]["weights"][NAME].update(changes)


def _structure(**changes):
    return lambda content: content["quantization_config"].update(changes)


def _more_weights(content):
    weights = content["quantization_config"]["weights"]
    weights["bert.nowhere.weight"] = weights[NAME]


DAMAGED = {
    "newer": (_structure(version=2), "version 2.*upgrade frobdecay"),
    "no version": (_structure(version=None), "structure with a version"),
    "no table": (_structure(weights=[1]), "table of weights"),
    "self": (_structure(self=1, weights={"a": 1}), "table of weights"),
    "unknown kind": (_record(kind="os.system"), rf"{NAME} is of kind 'os.system'"),
    "no config": (_record(config=3), f"{NAME}: expected a config"),
    "no end of sizes": (_record(shape=[2**30, 2**30]), f"{NAME}: expected a config and a shape"),
    "other shape": (_record(shape=[32, 31]), rf"{NAME} of shape \(32, 31\), the model of"),
    "rank": (_record(config={"rank": 2**60}), f"{NAME}: LowRank cannot be made"),
    "other rank": (_record(config={"rank": 3}), "mismatch|size"),
    "another weight": (_more_weights, "bert.nowhere.weight factorized, which the model does not"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_records_are_refused(tmp_path, what):
    """By from_pretrained, naming the folder or the weight."""
    change, message = DAMAGED[what]
    model, _ = _saved(tmp_path)
    _edited(tmp_path, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        type(model).from_pretrained(tmp_path)


def test_missing_factors_are_refused(tmp_path):
    """The library would leave them without numbers, and say so in its report only."""
    model, _ = _saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[KEY]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"cannot load .*lack \['{KEY}'\].*save the model again"):
        type(model).from_pretrained(tmp_path)


def _no_record(content):
    del content["quantization_config"]["weights"][NAME]


def _no_records(content):
    del content["quantization_config"], content["transformers_weights"]


@pytest.mark.parametrize("change", [_no_record, _no_records])
@pytest.mark.parametrize("body", [False, True])
def test_factors_without_a_record_are_refused(tmp_path, change, body):
    """The library would draw the weight anew: a config.json of another model, or a dense one."""
    model, _ = _saved(tmp_path)
    _edited(tmp_path, change)
    name = NAME.removeprefix("bert.") if body else NAME
    kind = transformers.AutoModel if body else type(model)
    with pytest.raises(ValueError, match=rf"cannot load .*factors of .*'{name}'.*save the model"):
        kind.from_pretrained(tmp_path)


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.integration(column="frobdecay factorize, merge")
@pytest.mark.parametrize("family", families())
def test_folders_are_factorized_by_the_command(tmp_path, family, capsys):
    """In several files: as ``factorize`` does, loaded by ``from_pretrained``; and merged again."""
    model, inputs = MODELS[family]()
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    arguments = [str(tmp_path / name) for name in ("in", "out", "dense")]
    assert main(["factorize", *arguments[:2], "--rank", "4"]) == 0
    assert "shapes of their weights" not in capsys.readouterr().err
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ranks = frobdecay.plan_ranks(model, rank=4).ranks
    found = {p.name for p in frobdecay.products(loaded)} & ranks.keys()
    # Experts are in the files one by one, which the stacks of the model are made of on loading.
    assert all(".experts." in name for name in ranks.keys() - found)
    factorize(model, rank=dict.fromkeys(found, 4))
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=1e-4, rtol=1e-4)
    assert main(["merge", *arguments[1:]]) == 0
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert not [*Walk(dense).factorized]
    torch.testing.assert_close(logits(dense, inputs), logits(loaded, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", families())
def test_what_is_factorized_in_a_folder_stays_as_it_is(tmp_path, family, capsys, monkeypatch):
    """The command plans for the rest of the model, as Python does, and says what it leaves."""
    monkeypatch.setenv("COLUMNS", "200")
    model, _ = MODELS[family]()
    name = next(iter(frobdecay.plan_ranks(model, rank=4).ranks))
    factorize(model, rank=5, include=name)
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    rest = frobdecay.plan_ranks(model, rank=4)
    assert main(["factorize", str(tmp_path / "in"), str(tmp_path / "out"), "--rank", "4"]) == 0
    printed = capsys.readouterr().out
    assert "already factorized, and left as it is" in printed
    assert f"all parameters: {rest.before:,} → " in printed
    if not any(".experts." in one for one in rest.ranks):  # which are in the files one by one
        assert f" → {rest.after:,}, " in printed
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert {p.name: p.rank for p in frobdecay.products(loaded)}[name] == 5
