"""Calibrated initialization of transformers' models: every layer's outputs are nearer."""

import copy
import functools

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from zoo import MODELS, VOCABULARY, families

from frobdecay import LowRank, calibrate, factorize
from frobdecay.weights.layouts import is_kind

CHANNEL = functools.partial(LowRank, pattern="channel")
FAMILIES = ("BERT", "GPT-2", "Llama", "T5", "ViT", "Mixtral", "Qwen3-MoE")


def whisper():
    """Encoder of sound and decoder of text; two convolutions over time."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=10,
        max_target_positions=20,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    features = torch.randn(2, 8, 20)
    return model, {"input_features": features, "decoder_input_ids": torch.arange(3, 13).view(2, 5)}


def dense(family):
    """A model, and two batches for it."""
    torch.manual_seed(0)
    model, inputs = whisper() if family == "Whisper" else MODELS[family]()
    inputs.pop("labels", None)
    if family == "T5":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    other = {
        name: value.roll(1, -1) if value.is_floating_point() else (value * 7 + 5) % VOCABULARY
        for name, value in inputs.items()
    }
    return model, [inputs, other]


def met(model, batches):
    """Module -> the inputs and outputs of each of its calls."""
    found = {}

    def hook(module, args, named, out, name):
        found.setdefault(name, []).append((args, named, out))

    hooks = [
        module.register_forward_hook(functools.partial(hook, name=name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for one in hooks:
        one.remove()
    return found


def distance(module, calls):
    """‖y − y′‖ of a module on calls of another."""
    with torch.no_grad():
        return sum(float((module(*a, **k) - out).norm() ** 2) for a, k, out in calls) ** 0.5


@pytest.mark.integration(column="calibrate")
@pytest.mark.parametrize("family", [*families(*FAMILIES), "Whisper"])
def test_every_layers_outputs_are_nearer_than_the_plain_ones(family):
    """On the calibration data, each layer on the dense model's inputs."""
    model, batches = dense(family)
    stats = calibrate(model, batches)
    calls = met(model, batches)
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    factorize(plain, rank=6, parametrization=CHANNEL)
    plan = factorize(ours, rank=6, parametrization=CHANNEL, init=stats)
    taken = [row.name.rpartition(".") for row in plan.rows if row.rank is not None]
    for row in plan.rows:
        saw = row.rank is None or row.reason is None or "forward of its own" in row.reason
        assert saw or "of 4" in row.reason, row  # an expert that no token went to
    compared = 0
    for path, _, attribute in taken:
        if attribute == "weight" and path in calls:
            here, there = (distance(m.get_submodule(path), calls[path]) for m in (ours, plain))
            assert here <= there * (1 + 1e-4) + 1e-5, path
            compared += here < there * 0.999
    assert compared >= min(4, len(taken) - 1)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_truncated_each_for_its_tokens(family, implementation):
    """Whatever runs them; the blocks' outputs are nearer, which experts' are parts of."""
    model, batches = dense(family)
    model.set_experts_implementation(implementation)
    stats = calibrate(model, batches, include="*.experts")
    assert model.config._experts_implementation == implementation
    stacks = [name for name, module in model.named_modules() if name.endswith(".experts")]
    assert {name for name, _ in stats.sums.moments} == {
        f"{stack}.{part}_proj" for stack in stacks for part in ("gate_up", "down")
    }
    calls = met(model, batches)
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    for attribute in ("gate_up_proj", "down_proj"):
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        factorize(other, rank=4, include=f"*.experts.{attribute}")
        factorize(one, rank=4, include=f"*.experts.{attribute}", init=stats)
        for stack in stacks:
            here, there = (distance(m.get_submodule(stack), calls[stack]) for m in (one, other))
            assert here < there
    del plain, ours


def test_the_conv1d_of_gpt2_is_stored_the_other_way_round():
    """And read as all others: rows are outputs."""
    model, batches = dense("GPT-2")
    stats = calibrate(model, batches)
    block = model.transformer.h[0]
    assert is_kind(block.mlp.c_fc, "transformers.pytorch_utils.Conv1D")
    name = "transformer.h.0.mlp.c_"
    assert stats.sums.moments[f"{name}fc.weight", "inputs"].first.shape == (32,)
    assert stats.sums.moments[f"{name}proj.weight", "outputs"].first.shape == (32,)


def test_queries_keys_and_values_are_counted_once():
    """Also where keys have fewer heads; and the encoder's states once for all of the decoder."""
    model, batches = dense("Llama")
    summed = {name for name, _ in calibrate(model, batches).sums.moments}
    layer = "model.layers.0"
    assert f"{layer}.self_attn.q_proj.weight" in summed
    assert not summed & {f"{layer}.self_attn.{part}_proj.weight" for part in "kv"}
    assert f"{layer}.mlp.up_proj.weight" not in summed
    model, batches = dense("T5")
    summed = [name for name, _ in calibrate(model, batches).sums.moments]
    assert len([name for name in summed if "EncDecAttention.k" in name]) == 1
    assert not [name for name in summed if "EncDecAttention.v" in name]


def test_a_decoder_counts_the_rows_whose_labels_do():
    """A batch to train on has no mask for its decoder, but labels, padded by -100."""
    model, batches = dense("T5")
    mask = torch.ones_like(batches[0]["input_ids"]).tril(2)
    labels = batches[0]["input_ids"].masked_fill(torch.ones_like(mask).tril(1) == 0, -100)
    batch = {"input_ids": batches[0]["input_ids"], "attention_mask": mask, "labels": labels}
    stats = calibrate(model, [batch], include="*SelfAttention.q")
    counts = {name.partition(".")[0]: each.count for (name, _), each in stats.sums.moments.items()}
    assert counts == {"encoder": mask.sum(), "decoder": (labels != -100).sum()}


@pytest.mark.parametrize("length", [None, 3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("family", ["T5", "BART"])
def test_padding_is_left_out_of_encoder_and_decoder(family, length, masked):
    """Each has a mask of its own; keys and values of the encoder's states have the encoder's."""
    if family == "BART":
        config = transformers.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        )
        model, cross = transformers.BartModel(config), ".encoder_attn."
        ids = torch.arange(3, 19).view(2, 8)
    else:
        model, batches = dense("T5")
        ids, cross = batches[0]["input_ids"], ".EncDecAttention."
    mask, own = torch.ones_like(ids).tril(2), torch.ones_like(ids).tril(1)[:, :length]
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :length], "attention_mask": mask}
    if masked:
        batch["decoder_attention_mask"] = own
    exclude = None if family == "BART" else "*relative_attention_bias*"
    blocks = "*coder.layers.*" if family == "BART" else "*coder.block.*"
    stats = calibrate(model, [batch], include=blocks, exclude=exclude)
    seen = set()
    for (name, _), moment in stats.sums.moments.items():
        part = name.partition(cross)[2]
        seen.add(part)
        encoder = "encoder." in name.partition("layer")[0] or part[:1] in ("k", "v")
        expected = mask.sum() if encoder else own.sum() if masked else own.numel()
        assert moment.count == expected, name
    assert any(part.startswith("k") for part in seen)
    assert any(part.startswith("q") for part in seen)
    factorize(model, rank=2, init=stats, include=blocks, exclude=exclude)
