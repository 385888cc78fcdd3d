"""factorize, merge and unroll on models of transformers."""

import copy

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from torch import nn
from zoo import (
    EXPERTS,
    GENERATES,
    MODELS,
    NO_DROPOUT,
    SMALL,
    TIED,
    families,
    gpt2,
    logits,
)

import frobdecay
from frobdecay import factorize, merge, unroll
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.product_tensor import ProductTensor


def column(name, **options):
    """The column of the integration matrix that a test fills."""
    return pytest.mark.integration(column=name, **options)


def double(family):
    """A model in float64, whose equality is to the last digits; experts' kernels want float32."""
    model, inputs = MODELS[family]()
    if family in EXPERTS:
        return model, inputs, {"rtol": 1e-4, "atol": 1e-4}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model.double(), inputs, {"rtol": 1e-8, "atol": 1e-8}


def randomize(model):
    """Move every parameter, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


@pytest.mark.covers("P7")
@column("factorize")
@pytest.mark.parametrize("family", families())
def test_full_rank_is_the_dense_model(family):
    """The same outputs and loss, and every factor gets a gradient."""
    model, inputs, close = double(family)
    with torch.no_grad():
        expected = model(**inputs)
    plan = factorize(model, rank=1.0)
    assert len(plan.ranks) > 10 or family == "GPT-2"
    out = model(**inputs)
    torch.testing.assert_close(out.logits, expected.logits, **close)
    torch.testing.assert_close(out.loss, expected.loss, **close)
    out.loss.backward()
    products = frobdecay.products(model)
    assert {product.name for product in products} >= set(plan.ranks)
    untouched = [
        name for name, p in model.named_parameters() if "original" in name and p.grad is None
    ]
    assert untouched == []


@pytest.mark.covers("P7")
@column("factorize")
@pytest.mark.parametrize("family", families())
def test_every_matrix_of_the_blocks_is_taken(family):
    """The plan lists all of two dimensions or more; ties and lone parameters stay dense."""
    model, _ = MODELS[family]()
    plan = factorize(model, rank=2)
    listed = {row.name: row.reason for row in plan.rows if row.rank is None}
    dense = {name for name, p in model.named_parameters() if p.ndim > 1 and "original" not in name}
    assert dense <= set(listed)
    lone = ("mlp.gate.weight", "cls_token", "position_embeddings")
    for name, reason in listed.items():
        assert ("name it" if name.endswith(lone) else "tied to") in reason


@pytest.mark.covers("C7")
@column("from_pretrained, factorize")
@pytest.mark.parametrize("family", families())
def test_a_loaded_model_is_factorized(family, tmp_path):
    """Saved, loaded, factorized at full rank: the model that was saved."""
    model, inputs = MODELS[family]()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    factorize(loaded, rank=1.0)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-3, atol=1e-3)


@column("merge, save_pretrained")
@pytest.mark.parametrize("on_tied", ["skip", "untie"])
@pytest.mark.parametrize("family", families())
def test_a_merged_model_is_saved_and_loaded(family, on_tied, tmp_path):
    """Merged after training it has the dense keys, and loads with the same outputs."""
    model, inputs = MODELS[family]()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    factorize(model, rank=0.5, on_tied=on_tied)
    randomize(model)
    expected = logits(model, inputs)
    merge(model)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, kinds)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


READ_BY_OTHERS = {
    "T5": (r"T5DenseActDense reads wo\.weight itself", ["*.wo", "*.relative_attention_bias"]),
    "ViT": (r"ViTModel reads .*projection\.weight itself", "*.projection"),
    "Mixtral": ("MixtralExperts reads its weight itself", "*.experts"),
    "Qwen3-MoE": ("Qwen3MoeExperts reads its weight itself", "*.experts"),
}
UNROLLED = [family for family in MODELS if family not in READ_BY_OTHERS]


@column("unroll")
@pytest.mark.parametrize("family", families(*UNROLLED))
def test_unrolled_models_are_plain_torch(family):
    """The same outputs at a low rank, and no module of frobdecay is left."""
    model, inputs, close = double(family)
    factorize(model, rank=3)
    expected = logits(model, inputs)
    unrolled = unroll(model)
    torch.testing.assert_close(logits(unrolled, inputs), expected, **close)
    theirs = [m for m in unrolled.modules() if "frobdecay" in str(type(m).__mro__)]
    assert theirs == []
    assert not any("parametrizations" in name for name, _ in unrolled.named_modules())


@column("unroll", refused=True)
@pytest.mark.parametrize("family", families(*READ_BY_OTHERS))
def test_layers_that_others_read_are_not_unrolled(family):
    """The error names them and what to merge; after that it works."""
    message, others = READ_BY_OTHERS[family]
    model, inputs = MODELS[family]()
    factorize(model, rank=3)
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match=message):
        unroll(model)
    merge(model, include=others)
    torch.testing.assert_close(logits(unroll(model), inputs), expected, rtol=1e-4, atol=1e-4)


@column("generate")
@pytest.mark.parametrize("act", ["factorized", "unrolled"])
@pytest.mark.parametrize("family", families(*GENERATES))
def test_generate_gives_the_same_tokens(family, act):
    """Greedy decoding with the cache, at full rank."""
    model, inputs = MODELS[family]()
    prompt = {"input_ids": inputs["input_ids"]}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**prompt, **options)
    factorize(model, rank=1.0)
    if act == "unrolled" and family in UNROLLED:
        model = unroll(model)
    assert torch.equal(model.generate(**prompt, **options), expected)


@column("gradient checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", families())
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    """The factors' gradients, recomputed."""
    model, inputs = MODELS[family]()
    factorize(model, rank=3)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant and "input_ids" in inputs:
                model.enable_input_require_grads()
        model.train().zero_grad()
        model(**inputs).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Deberta", "DebertaV2"])
def test_weights_that_are_read_outside_of_a_checkpoint_are_read_inside(name, reentrant):
    """DeBERTa hands its table of relative positions to layers that are run a second time."""
    config = getattr(transformers, f"{name}Config")(
        **SMALL,
        **NO_DROPOUT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=8,
    )
    ids, gradients = torch.arange(3, 13)[None], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForMaskedLM")(config).train()
        factorize(model, rank=4)
        assert any("rel_embeddings" in product.name for product in frobdecay.products(model))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # of torch, as BitNet's module is imported
@pytest.mark.parametrize("online", [False, True])
def test_layers_that_round_their_weight_pass_the_gradient_on(online):
    """BitNet's linear layer quantizes below autograd: the dense gradient G goes on as GV, GᵀU."""
    from transformers.integrations.bitnet import AutoBitLinear

    torch.manual_seed(0)
    layer = AutoBitLinear(32, 24, bias=True, online_quant=online)
    factorize(layer, rank=8, include="weight")
    dense, x = merge(copy.deepcopy(layer)), torch.randn(5, 32)
    for each in (layer, dense):
        each(x).square().sum().backward()
    (product,) = frobdecay.products(layer)
    U, V = product.params
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(U.grad, dense.weight.grad @ V.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(V.grad, dense.weight.grad.T @ U.detach(), rtol=1e-4, atol=1e-4)
    assert float(U.grad.norm()) > 0


@column("dtype, deepcopy")
@pytest.mark.parametrize("first", ["factorize", "convert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", families())
def test_conversions_convert_the_factors(family, dtype, first):
    """``.to(dtype)`` before or after ``factorize``: factors of that dtype, and a step runs."""
    model, inputs = MODELS[family]()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    acts = [lambda: factorize(model, rank=4), lambda: model.to(dtype)]
    for act in acts if first == "factorize" else reversed(acts):
        act()
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = model(**inputs)
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(p.grad.dtype == dtype for p in model.parameters() if p.grad is not None)


@column("dtype, deepcopy")
@pytest.mark.parametrize("family", families())
def test_copies_are_independent(family):
    """A deep copy computes the same, and merging it leaves the original factorized."""
    model, inputs = MODELS[family]()
    factorize(model, rank=4)
    expected = logits(model, inputs)
    twin = merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(twin, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(frobdecay.products(model)) > len(frobdecay.products(twin))
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.covers("P23")
@column("torch.compile")
@pytest.mark.parametrize("family", families("BERT", "GPT-2", "Llama", "ViT"))
def test_compiled_models_are_one_graph_with_the_same_gradients(family):
    """Factors are inputs of the graph; nothing breaks it."""
    model, inputs = MODELS[family]()
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    factorize(model, rank=4)
    logits(model, inputs).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits(compiled, inputs).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


class Answer(nn.Module):
    """A model that takes tensors and returns the logits alone, for exporters."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        """The logits."""
        return self.model(**{self.name: x}).logits


EXPORTED = {"BERT": "input_ids", "ViT": "pixel_values"}


@column("torch.export")
@pytest.mark.parametrize("family", families(*EXPORTED))
def test_exported_models_multiply_the_factors(family):
    """The program has the factors, no dense weight, and the same outputs."""
    model, inputs = MODELS[family]()
    factorize(model, rank=3, include=nn.Linear)
    x = inputs[EXPORTED[family]]
    answer = Answer(model, EXPORTED[family])
    program = torch.export.export(answer, (x,))
    torch.testing.assert_close(program.module()(x), answer(x))
    shapes = {tuple(n.meta["val"].shape) for n in program.graph.nodes if n.op == "call_function"}
    assert not shapes & {(32, 32), (48, 32), (32, 48)}


@column("ONNX export")
@pytest.mark.parametrize("family", families(*EXPORTED))
def test_unrolled_models_are_exported_to_onnx(family, tmp_path):
    """The reference runtime computes the same from the file."""
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, inputs = MODELS[family]()
    factorize(model, rank=3, include=nn.Linear)
    x = inputs[EXPORTED[family]]
    answer = Answer(unroll(model), EXPORTED[family]).eval()
    file = tmp_path / "model.onnx"
    torch.onnx.export(answer, (x,), file, dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(str(file))
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), answer(x), rtol=1e-3, atol=1e-4)


@pytest.mark.covers("P14")
@column("save_pretrained of factors")
@pytest.mark.parametrize("family", families("BERT", "GPT-2", "Llama"))
def test_saved_factors_are_loaded_into_a_factorized_model(family, tmp_path):
    """The files of ``save_pretrained`` hold the factors; a model with such factors takes them."""
    from safetensors.torch import load_file

    model, inputs = MODELS[family]()
    twin = copy.deepcopy(model)
    plan = factorize(model, rank=4)
    randomize(model)
    model.save_pretrained(tmp_path)
    factorize(twin, rank=plan.ranks)
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=family != "GPT-2")
    assert torch.equal(logits(twin, inputs), logits(model, inputs))


@pytest.mark.covers("P14")
@column("from_pretrained of factors")
@pytest.mark.parametrize("on_tied", ["skip", "untie"])
@pytest.mark.parametrize("family", families())
def test_saved_factors_are_loaded_by_from_pretrained(family, on_tied, tmp_path):
    """From several files; nothing is missing, drawn anew or called quantized; and once more."""
    model, inputs = MODELS[family]()
    plan = factorize(model, rank=4, on_tied=on_tied)
    randomize(model)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    for made in (model, loaded, again):
        assert {p.name for p in frobdecay.products(made)} >= set(plan.ranks)
        assert "quantization_config" not in made.config.to_dict()
        assert not getattr(made, "is_quantized", False)
        found = dict(made.named_parameters())
        assert all(torch.equal(found[name], p) for name, p in model.named_parameters())
        torch.testing.assert_close(logits(made, inputs), logits(model, inputs))
    merge(loaded).save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense, inputs), logits(model, inputs), rtol=1e-3, atol=1e-3)


# --- layouts of third parties -------------------------------------------------------------------


@pytest.mark.integration(row="GPT-2", column="factorize")
def test_conv1d_has_the_right_orientation_and_stays_factored(monkeypatch):
    """Stored in × out: U has the outputs' rows, and no dense weight is formed."""
    model, inputs = gpt2()
    plan = factorize(model, rank=3)
    row = next(row for row in plan.rows if row.name == "transformer.h.0.attn.c_attn.weight")
    assert (row.shape, row.matrix) == ((32, 96), (96, 32))
    held = model.transformer.h[0].attn.c_attn.parametrizations.weight
    assert (held.original0.shape, held.original1.shape) == ((96, 3), (32, 3))

    def forbidden(self):
        raise AssertionError("the dense weight was formed")

    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    model(**inputs).loss.backward()


@column("experts")
@pytest.mark.parametrize("run", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", families(*EXPERTS))
def test_stacked_experts_run_on_their_factors(family, run, monkeypatch):
    """One factorization an expert, whichever way transformers runs them, and none is formed."""
    model, inputs = MODELS[family]()
    model.set_experts_implementation(run)
    plan = factorize(model, rank=4, include="*.experts")
    assert all(row.matrix[0] == 4 for row in plan.rows)
    merged = merge(copy.deepcopy(model))

    def forbidden(self):
        raise AssertionError("a dense weight was formed")

    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    found = model(**inputs)
    torch.testing.assert_close(found.logits, logits(merged, inputs), rtol=1e-4, atol=1e-4)
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.integration(row="GPT-OSS", column="experts")
def test_experts_stored_transposed_have_the_right_orientation():
    """In × out for each expert; the kernels' own mark says so."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, layer_types=["full_attention"],
    )  # fmt: skip
    model, ids = GptOssForCausalLM(config).eval(), torch.arange(3, 13).reshape(2, 5)
    expected = model(ids).logits
    plan = factorize(model, rank=1.0, include="*.experts")
    taken = {row.matrix for row in plan.rows if row.rank is not None}
    assert taken == {(4, 48, 32), (4, 32, 24)}
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def llama4():
    """Experts as one batched product, stored inputs×outputs, without the kernels' mark."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM(Llama4TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, intermediate_size_mlp=48,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=4,
    ))  # fmt: skip


def dbrx():
    """Experts one below the other in one matrix."""
    from transformers import DbrxConfig, DbrxForCausalLM

    return DbrxForCausalLM(DbrxConfig(
        vocab_size=61, d_model=32, n_layers=1, n_heads=4, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ))  # fmt: skip


def jetmoe():
    """Experts in the attention, too, each stack in a module of its own."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    return JetMoeForCausalLM(JetMoeConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
        intermediate_size=24, num_local_experts=4,
    ))  # fmt: skip


@column("experts")
@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        pytest.param(make, shapes, marks=pytest.mark.integration(row=row))
        for row, make, shapes in (
            ("Llama 4", llama4, {(4, 48, 32), (4, 32, 24)}),
            ("DBRX", dbrx, {(4, 24, 32), (4, 32, 24)}),
            ("JetMoe", jetmoe, {(4, 48, 32), (4, 32, 24), (4, 16, 32), (4, 32, 16)}),
        )
    ],
)
def test_stacks_of_other_designs_run_on_their_factors(make, shapes, monkeypatch):
    """They hold most of the parameters; at full rank the model is the dense one."""
    model, ids = make().eval(), torch.arange(3, 13).reshape(2, 5)
    randomize(model)
    expected = model(ids).logits
    small = copy.deepcopy(model)
    plan = factorize(model, rank=1.0)
    assert {row.matrix for row in plan.rows if row.rank and len(row.matrix) == 3} == shapes
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)

    factorize(small, rank=2)
    merged = merge(copy.deepcopy(small))

    def forbidden(self):
        raise AssertionError("a dense weight was formed")

    monkeypatch.setattr(ProductTensor, "materialize", forbidden)
    torch.testing.assert_close(small(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


# --- tied weights -------------------------------------------------------------------------------

NAMED = {
    "BERT (masked LM)": "cls.predictions.decoder",
    "GPT-2": "lm_head",
    "T5": "decoder.embed_tokens",
}


@pytest.mark.covers("P19")
@column("tied weights", refused=True)
@pytest.mark.parametrize("family", families(*TIED))
def test_a_tied_weight_that_was_named_is_refused(family):
    """The error has the other names and the way out; nothing was changed."""
    model, _ = MODELS[family]()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"tied to .*on_tied='untie'"):
        factorize(model, rank=2, include=[NAMED[family], "*"])
    with pytest.raises(ValueError, match="tied to"):
        factorize(model, rank=2, on_tied="error")
    assert list(model.state_dict()) == keys


@pytest.mark.covers("C5")
@column("tied weights")
@pytest.mark.parametrize("family", families(*TIED))
def test_tied_weights_that_are_swept_in_stay_tied(family):
    """Dense, listed, one parameter; tying and resizing go on as ever."""
    model, inputs = MODELS[family]()
    plan = factorize(model, ratio=0.6)
    assert f"{NAMED[family]}.weight" in {r.name for r in plan.rows if r.rank is None}
    expected, count = logits(model, inputs), sum(p.numel() for p in model.parameters())
    model.tie_weights()
    assert torch.equal(logits(model, inputs), expected)
    assert sum(p.numel() for p in model.parameters()) == count == plan.after
    model.resize_token_embeddings(70, mean_resizing=False)
    assert logits(model, inputs).shape[-1] == 70


@pytest.mark.covers("C5")
@column("tied weights")
@pytest.mark.parametrize("family", families(*TIED))
def test_untied_weights_are_their_own(family):
    """The named one gets factors of its own, and nothing ties it again."""
    model, inputs = MODELS[family]()
    expected, before = logits(model, inputs), sum(p.numel() for p in model.parameters())
    plan = factorize(model, rank=1.0, include=NAMED[family], on_tied="untie")
    assert "untied from" in plan.rows[0].reason
    assert plan.before == before + plan.rows[0].before
    assert plan.after == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    randomize(model)
    state, moved = copy.deepcopy(model.state_dict()), logits(model, inputs)
    model.tie_weights()
    model.init_weights()
    assert torch.equal(logits(model, inputs), moved)
    assert list(model.state_dict()) == list(state)
    merge(model).tie_weights()
    torch.testing.assert_close(logits(model, inputs), moved, rtol=1e-3, atol=1e-3)


@column("tied weights")
def test_the_rest_of_a_tie_of_many_is_saved_and_loaded(tmp_path):
    """Where the weight that the others are tied to gets factors, one of them takes its place."""
    model, inputs = MODELS["T5"]()
    rest = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    factorize(model, rank={"shared": 8}, include=rest, on_tied="untie")
    randomize(model)
    assert model.encoder.embed_tokens.weight is model.lm_head.weight
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.encoder.embed_tokens.weight is loaded.lm_head.weight
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@column("tied weights")
@pytest.mark.parametrize("family", families(*TIED))
def test_untying_counts_the_copies(family):
    """All of a tie: one copy less than there are names, in the plan and in its dry run."""
    model, _ = MODELS[family]()
    dry = frobdecay.plan_ranks(model, ratio=0.5, on_tied="untie")
    plan = factorize(model, ratio=0.5, on_tied="untie")
    assert (dry.ranks, dry.before, dry.after) == (plan.ranks, plan.before, plan.after)
    assert plan.after == sum(p.numel() for p in model.parameters())
    assert abs(plan.ratio - 0.5) < 0.05


def test_on_tied_is_one_of_three():
    """Anything else is refused before a look at the model."""
    with pytest.raises(ValueError, match="'skip', 'untie' or 'error'"):
        factorize(nn.Linear(8, 8), rank=2, on_tied="clone")


# --- what else models do to their weights -------------------------------------------------------


@column("resize_token_embeddings", refused=True)
@pytest.mark.parametrize("family", families("BERT", "Llama"))
def test_resizing_a_factorized_embedding_is_refused(family):
    """It would write the new rows to a weight that is computed; the model goes on as before."""
    model, inputs = MODELS[family]()
    factorize(model, rank=4)
    expected = logits(model, inputs)
    with pytest.raises(RuntimeError, match="got a factored weight"):
        model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(logits(model, inputs), expected)


@column("resize_token_embeddings")
@pytest.mark.parametrize("family", families("BERT", "Llama"))
def test_resizing_works_after_merging_the_embeddings(family):
    """What the refusal advises."""
    model, inputs = MODELS[family]()
    factorize(model, rank=4)
    merge(model, include=[nn.Embedding, *(["lm_head"] if family == "Llama" else [])])
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape == (70, 32)
    model(**inputs).loss.backward()


@pytest.mark.covers("P17")
@column("init_weights")
@pytest.mark.parametrize("family", families())
def test_initializing_an_initialized_model_changes_nothing(family):
    """As for a dense model: transformers skips what it has initialized."""
    model, inputs = MODELS[family]()
    factorize(model, rank=4)
    expected = logits(model, inputs)
    model.init_weights()
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.covers("P17")
@column("init_weights")
@pytest.mark.parametrize("family", families())
def test_factors_are_no_weights_to_be_initialized(family):
    """``init_weights`` leaves them as they are, in a module that it takes for new."""
    model, inputs = MODELS[family]()
    factorize(model, rank=4)
    expected = logits(model, inputs)
    held = next(m for m in model.modules() if hasattr(m, "parametrizations"))
    held._is_hf_initialized = False
    for module in (held, held.parametrizations):
        for parameter in module.parameters():
            parameter._is_hf_initialized = False
    model._init_weights(held)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.covers("P19")
@pytest.mark.integration(row="GPT-2", column="tied weights", refused=True)
def test_tying_to_a_factorized_weight_is_refused():
    """A configuration that ties what is factorized already: an error, and the factors stay."""
    model, inputs = gpt2(tied=False)
    factorize(model, rank=4)
    expected = logits(model, inputs)
    model.config.tie_word_embeddings = True
    with pytest.raises(AttributeError, match=r"wte\.weight"):
        model.tie_weights()
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.covers("P22")
@column("PEFT merge", refused=True)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("family", families("GPT-2", "Llama"))
def test_merging_an_adapter_into_factors_is_refused(family, safe, options):
    """It would be lost; the error says what to do, and the adapter still works."""
    model, inputs = _adapted(family, options)
    expected = logits(model, inputs)
    with pytest.raises(RuntimeError, match=r"frobdecay\.merge"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.covers("P22")
@column("PEFT merge")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("family", families("GPT-2", "Llama"))
def test_an_adapter_is_merged_into_the_merged_weights(family, options):
    """``merge``, then the adapter's own."""
    model, inputs = _adapted(family, options)
    expected = logits(model, inputs)
    assert any(isinstance(m.weight, FactoredTensor) for m in model.modules() if _parametrized(m))
    merged = merge(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.covers("P22")
@column("factorize under PEFT")
@pytest.mark.parametrize("family", families("GPT-2", "Llama"))
def test_adapters_stay_as_they_are(family):
    """A base model that has an adapter already: the base is factorized, the adapter is listed."""
    model, inputs = _adapted(family, {}, rank=None)
    expected = logits(model, inputs)
    plan = factorize(model, rank=1.0)
    adapters = {row.name for row in plan.rows if "adapter" in (row.reason or "")}
    assert adapters == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert any("base_layer" in name for name in plan.ranks)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def _parametrized(module):
    return hasattr(module, "parametrizations") and hasattr(module, "weight")


def _adapted(family, options, rank=8):
    """A factorized model with an adapter that does something."""
    peft = pytest.importorskip("peft")
    model, inputs = MODELS[family]()
    if rank:
        factorize(model, rank=rank)
    target = {"GPT-2": ["c_attn"], "Llama": ["q_proj", "up_proj"]}[family]
    config = peft.LoraConfig(
        r=4, target_modules=target, fan_in_fan_out=family == "GPT-2", **options
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted.eval(), inputs


@column("repeat a plan")
@pytest.mark.parametrize("family", families())
def test_a_plan_is_repeated_on_a_copy(family):
    """Ranks by name, as a program stores them, give the same factorization."""
    model, _ = MODELS[family]()
    twin = copy.deepcopy(model)
    plan = factorize(model, ratio=0.6)
    again = factorize(twin, rank=plan.ranks)
    assert list(again.rows) == [row for row in plan.rows if row.rank is not None]
    torch.testing.assert_close(twin.state_dict(), model.state_dict())
