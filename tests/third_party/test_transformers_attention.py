"""The attention of transformers: products of every family, their decay, and balancing."""

import copy
import dataclasses
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")

import attention_probe as probe  # noqa: E402
import zoo  # noqa: E402
from torch import nn  # noqa: E402

from frobdecay import FrobeniusDecay, balance_, diagnostics, products  # noqa: E402
from frobdecay.product import find  # noqa: E402
from frobdecay.product.families import LEFT, REASONS, TRANSFORMERS  # noqa: E402
from frobdecay.product.product import product_norm  # noqa: E402


def qwen(version):
    """Grouped queries, biased or (version 3) normalized, larger than the width divided by heads."""
    options = {**zoo.GROUPED, **zoo.ENDS, "head_dim": 16}
    config = getattr(transformers, f"Qwen{version}Config")(**options)
    return zoo._made(f"Qwen{version}ForCausalLM", config, **zoo._labelled())


def bert_decoder():
    """Causal self-attention and cross-attention to an encoder of the same width."""
    config = transformers.BertConfig(
        **zoo.SMALL, **zoo.NO_DROPOUT, is_decoder=True, add_cross_attention=True
    )
    inputs = {"input_ids": zoo._ids(), "encoder_hidden_states": torch.randn(2, 5, zoo.WIDTH)}
    return zoo._made("BertLMHeadModel", config, **inputs)


def gpt2_decoder():
    """Cross-attention with the queries apart, keys and values packed."""
    config = transformers.GPT2Config(
        vocab_size=zoo.VOCABULARY, n_positions=40, n_embd=zoo.WIDTH, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, add_cross_attention=True, **zoo.ENDS,
    )  # fmt: skip
    inputs = {"input_ids": zoo._ids(), "encoder_hidden_states": torch.randn(2, 5, zoo.WIDTH)}
    return zoo._made("GPT2LMHeadModel", config, **inputs)


MODELS = {
    **zoo.MODELS,
    "Qwen2": lambda: qwen(2),
    "Qwen3": lambda: qwen(3),
    "BERT, cross-attention": bert_decoder,
    "GPT-2, cross-attention": gpt2_decoder,
}
FAMILIES = zoo.families(*MODELS)
ROTARY = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3-MoE")
SINGLE = ("Mixtral", "Qwen3-MoE")  # their experts' kernel has no float64


def made(family):
    """A model with random biases, so that errors have something to show in; float64 if it can."""
    model, inputs = MODELS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if family in SINGLE:
        return model, inputs
    return model.double(), {
        k: v.double() if v.is_floating_point() else v for k, v in inputs.items()
    }


def weights(module):
    """W_q, W_k, W_v, W_o, all outputs × inputs, as the module's forward reads them."""
    kind = type(module).__name__
    if kind in ("BertAttention", "RobertaAttention"):
        own = module.self
        return own.query.weight, own.key.weight, own.value.weight, module.output.dense.weight
    if kind == "GPT2Attention":
        packed = list(module.c_attn.weight.T.split(module.split_size))
        if module.is_cross_attention:
            packed.insert(0, module.q_attn.weight.T)
        return *packed, module.c_proj.weight.T
    if kind == "T5Attention":
        return module.q.weight, module.k.weight, module.v.weight, module.o.weight
    return tuple(getattr(module, f"{name}_proj").weight for name in "qkvo")


def size_of_heads(module):
    """The last axis that the module's forward views queries with."""
    own = getattr(module, "self", module)
    for name in ("attention_head_size", "key_value_proj_dim", "head_dim"):
        if hasattr(own, name):
            return getattr(own, name)
    raise AssertionError(type(module))


def attention_modules(model):
    """Name -> module with the four weights, found without the library."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return {
        name: model.get_submodule(name)
        for name, kind in kinds.items()
        if kind.endswith("Attention") and not kind.endswith(("SelfAttention", "CrossAttention"))
    }


def per_head(module):
    """Σ over the heads of ‖W_qᵀ W_k‖² and of ‖W_o W_v‖² by a plain loop; a differentiable pair."""
    q, k, v, o = (weight.double() for weight in weights(module))
    size = size_of_heads(module)
    heads, shared = len(q) // size, len(q) // len(k)
    scores, outputs = 0.0, 0.0
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        kept = slice(head // shared * size, (head // shared + 1) * size)
        scores = scores + (q[own].T @ k[kept]).square().sum()
        outputs = outputs + (o[:, own] @ v[kept]).square().sum()
    return scores, outputs


@pytest.mark.covers("C6")
@pytest.mark.integration(column="attention products")
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_the_loops_over_heads(family):
    """Every attention module is found, and both norms are those of the loop."""
    model, _ = made(family)
    found = {product.name: product for product in products(model)}
    modules = attention_modules(model)
    names = [f"{path}.{name}" for path in modules for name in ("query_key", "output_value")]
    assert sorted(found) == sorted(names)
    for path, module in modules.items():
        for name, square in zip(("query_key", "output_value"), per_head(module), strict=True):
            product = found[f"{path}.{name}"]
            norm = float(square.detach()) ** 0.5
            assert float(product_norm(product).detach()) == pytest.approx(norm, rel=1e-5)
            dense = torch.linalg.vector_norm(product.materialize().detach().double())
            assert float(dense) == pytest.approx(norm, rel=1e-5)


STEPS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
}


@pytest.mark.integration(column="attention decay")
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_decays_the_loops_over_heads(family, name):
    """A step of the wrapper is one of the base with the loops' gradient, coupled or decoupled."""
    ours, inputs = made(family)
    theirs = copy.deepcopy(ours)
    kind, options = STEPS[name]
    decay, lr = 0.05, options["lr"]

    base = kind(ours.parameters(), weight_decay=0.0, **options)
    optimizer = FrobeniusDecay(base, ours, decay=decay)
    zoo.logits(ours, inputs).square().mean().backward()
    optimizer.step()

    squares = [square for m in attention_modules(theirs).values() for square in per_head(m)]
    (sum(squares) / 2).backward()
    slopes = {p: p.grad.clone() for p in theirs.parameters() if p.grad is not None}
    theirs.zero_grad()
    zoo.logits(theirs, inputs).square().mean().backward()
    with torch.no_grad():
        for parameter, slope in slopes.items() if name == "SGD" else ():
            parameter.grad += decay * slope
        kind(theirs.parameters(), weight_decay=0.0, **options).step()
        for parameter, slope in slopes.items() if name == "AdamW" else ():
            parameter -= lr * decay * slope
    for (path, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6), path


@pytest.mark.integration(column="attention decay")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_decay_of_attention_is_taken_over(family):
    """Of a dense model: that of the four weights, of no bias, of nothing twice."""
    model, _ = made(family)
    optimizer = FrobeniusDecay(torch.optim.AdamW(model.parameters(), weight_decay=0.1), model)
    placed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())
    (taken,) = (group for group in optimizer.param_groups if group["frobenius_decay"])
    assert (taken["weight_decay"], taken["frobenius_decay"]) == (0.0, 0.1)
    held = {
        p.untyped_storage().data_ptr()
        for m in attention_modules(model).values()
        for p in weights(m)
    }
    assert {p.untyped_storage().data_ptr() for p in taken["params"]} == held


def imbalance(product):
    """The largest ‖UᵀU − VᵀV‖ of a product's heads, relative to ‖UᵀU‖."""
    left, right = (view.detach().flatten(product.batch, -2) for view in product.views())
    left, right = left.mT @ left, right.mT @ right
    return ((left - right).norm(dim=(-2, -1)) / left.norm(dim=(-2, -1))).max().item()


@pytest.mark.integration(column="attention balance")
@pytest.mark.parametrize("family", FAMILIES)
def test_balancing_changes_no_output(family):
    """Weights and biases move together; everything that is not fixed is balanced."""
    model, inputs = made(family)
    found = products(model, exclude="*.query_key" if family in ROTARY else None)
    assert found
    before = zoo.logits(model, inputs)
    assert min(imbalance(product) for product in found) > 0.05
    balance_(found)
    after = zoo.logits(model, inputs)
    tolerance = 1e-5 if family in ROTARY else 1e-10  # RMSNorm computes in float32
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    assert max(imbalance(product) for product in found) < 1e-5


@pytest.mark.integration(column="attention balance")
@pytest.mark.parametrize("family", zoo.families(*(name for name in MODELS if name not in ROTARY)))
def test_balancing_in_single_precision_changes_no_output(family):
    """To rounding of float32."""
    model, inputs = MODELS[family]()
    before = zoo.logits(model, inputs)
    balance_(products(model))
    assert (zoo.logits(model, inputs) - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.covers("C9")
@pytest.mark.parametrize("family", zoo.families(*ROTARY))
def test_rotary_embeddings_forbid_to_balance_scores(family):
    """The refusal names product, reason and remedy; without it the model would be another one."""
    model, inputs = made(family)
    before = zoo.logits(model, inputs)
    message = r"layers.0.self_attn.query_key: rotary .*exclude="
    with pytest.raises(ValueError, match=message):
        balance_(products(model))
    assert torch.equal(zoo.logits(model, inputs), before)
    balance_([dataclasses.replace(product, fixed=None) for product in products(model)])
    assert (zoo.logits(model, inputs) - before).abs().max() > 1e-3 * before.abs().max()


# --- every type that is known -------------------------------------------------------------------


def pairs(angles):
    """Each angle for two neighbours."""
    return angles.repeat_interleave(2, -1)


def between(angles):
    """Relative positions, (queries, keys, size of heads), that queries meet."""
    return 0.3 * torch.randn(probe.TOKENS, probe.TOKENS, probe.SIZE, dtype=torch.float64)


EACH = [({"num_key_value_heads": probe.HEADS}, None)]  # no grouped queries
MEMORY = [({"memory_attention_num_attention_heads": probe.HEADS,
            "memory_attention_hidden_size": probe.WIDTH}, None)]  # fmt: skip
FEW = [({"num_attention_heads": probe.HEADS}, None)]
WIDE = [({"hidden_size": probe.WIDTH, "num_attention_heads": probe.HEADS}, None)]
VARIANTS = {  # options of a configuration -> arguments of the forward's own, from angles
    "clvp.ClvpSelfAttention": [({}, lambda angles: {
        "rotary_pos_emb": torch.cat([angles, angles], -1)[None],
        "position_ids": torch.arange(probe.TOKENS)[None]})],
    "cohere.CohereAttention": [({}, None), ({"use_qk_norm": True}, None)],
    "deberta_v2.DebertaV2Attention": [
        ({"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": share},
         lambda angles: {"rel_embeddings": torch.ones(2 * probe.TOKENS, probe.WIDTH).double()})
        for share in (True, False)] + [({}, None)],
    "dots3_note.Dots3NoteAudioAttention": EACH,
    "edgetam_video.EdgeTamVideoRoPESelfAttention": MEMORY,
    "esmc.EsmcAttention": EACH,
    "esm.EsmAttention": [({"position_embedding_type": "rotary"}, None)],
    "falcon.FalconAttention": [
        (options, lambda angles: {"alibi": None}) for options in (
            {"multi_query": True}, {"multi_query": False, "num_kv_heads": probe.HEADS},
            {"new_decoder_architecture": True, "num_kv_heads": probe.GROUPS})],
    "gpt2.GPT2Attention": [({}, None), ({"is_cross_attention": True}, lambda angles: {
        "encoder_hidden_states": probe.tokens_of(probe.WIDTH)[None]})],
    "gpt_bigcode.GPTBigCodeAttention": [({"multi_query": many}, None) for many in (True, False)],
    "grounding_dino.GroundingDinoMultiheadAttention": FEW,
    "mm_grounding_dino.MMGroundingDinoMultiheadAttention": FEW,
    "moonshine.MoonshineAttention": EACH,
    "moonshine_streaming.MoonshineStreamingAttention": EACH,
    "nemotron3_5_transcribe.Nemotron3_5TranscribeAttention": EACH,
    "nemotron3_diarization.Nemotron3DiarizationAttention": EACH,
    "pix2struct.Pix2StructTextAttention": WIDE,
    "sam2_video.Sam2VideoRoPEAttention": MEMORY,
    "sam3_tracker_video.Sam3TrackerVideoRoPEAttention": MEMORY,
    "stablelm.StableLmAttention": [
        ({"num_key_value_heads": probe.HEADS, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}, None)],
    "t5gemma.T5GemmaCrossAttention": [({"cross_attention_hidden_size": probe.WIDTH}, None)],
    "unlimited_ocr.UnlimitedOcrTextAttention": EACH,
    "mimo_v2_flash.MiMoV2FlashAttention": [({"v_head_dim": 4}, None)],
    "phi.PhiAttention": [({}, None), ({"qk_layernorm": True}, None)],
    "roformer.RoFormerAttention": [({"rotary_value": turn}, lambda angles: {
        "sinusoidal_pos": torch.cat([angles.sin(), angles.cos()], -1)[None, None]})
        for turn in (False, True)],
    "speecht5.SpeechT5Attention": [({}, lambda angles: {"position_bias": between(angles)})],
    "vitdet.VitDetAttention": [({}, None), (
        {"use_relative_position_embeddings": True, "input_size": (probe.SIDE, probe.SIDE)}, None)],
    "zamba.ZambaAttention": [({"attention_hidden_size": 96, "attention_head_dim": 16}, None)],
}  # fmt: skip
CAUTIOUS = {"blt.BltCrossAttention"}  # fixed by name, though q_norm is before the projection


def short(name):
    """As the table calls a type."""
    path, _, kind = name.removeprefix("transformers.models.").rpartition(".")
    return f"{path.partition('.')[0]}.{kind}"


def dense(product):
    """(heads, m, n), in the order of query heads."""
    found = product.materialize().detach()
    return found.reshape(-1, *found.shape[-2:])


@pytest.mark.covers("C6", "C9")
@pytest.mark.integration(column="attention products")
@pytest.mark.parametrize("name", TRANSFORMERS, ids=short)
def test_a_known_type_is_what_its_own_forward_computes(name):
    """Every head of both products; balancing changes nothing, or is refused and would."""
    for options, given in VARIANTS.get(short(name), [({}, None)]):
        module = probe.build(name, **options)
        scores, outputs = products(module)
        assert (scores.name, outputs.name) == ("query_key", "output_value")
        heads, width, size = len(dense(scores)), scores.shape[-1], scores.views()[0].shape[-1]
        assert heads > 1
        assert_layout(copy.deepcopy(module), heads, width, size, given)
        arguments = probe.understood(module, probe.some_angles(size), width, given)
        for product in (scores, outputs):
            assert_balance(module, product, arguments, short(name) in CAUTIOUS)


def assert_layout(module, heads, width, size, given):
    """What goes from token to token are the products; their norms are those of the loop."""
    probe.bare(module)
    found, moved = probe.measured(module, heads, width, size, given)
    tokens = probe.tokens_of(width)
    scores, outputs = products(module)
    assert probe.multiple(found, tokens @ dense(scores) @ tokens.T) > 0
    assert 0.4 < probe.multiple(probe.centred(moved), tokens @ dense(outputs).mT) < 1.01
    for product in (scores, outputs):
        norm = float(torch.linalg.vector_norm(dense(product)))
        assert float(product_norm(product).detach()) == pytest.approx(norm, rel=1e-5)


def assert_balance(module, product, arguments, cautious):
    """The same answers from other factors; where that is refused, others, if one insists."""
    before, weights = probe.answer(module, arguments), copy.deepcopy(module.state_dict())
    if product.fixed is not None:
        with pytest.raises(ValueError, match=r"between the factors"):
            balance_(product)
    balance_(dataclasses.replace(product, fixed=None))
    after = probe.answer(module, arguments)
    changed = (after - before).norm() > 1e-4 * before.norm()
    assert imbalance(product) < 1e-5
    assert changed == (product.fixed is not None and not cautious)
    module.load_state_dict(weights)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("olmo.OlmoAttention", {"clip_qkv": 0.5}, "clip_qkv between the factors"),
        ("bitnet.BitNetAttention", {}, "attn_sub_norm between the factors"),
        ("afmoe.AfmoeAttention", {}, "gate_proj between the factors"),
    ],
)
def test_what_is_between_values_and_outputs_is_said(name, options, said):
    """By its name in the module or its configuration."""
    (full,) = (known for known in TRANSFORMERS if short(known) == name)
    _, outputs = products(probe.build(full, **options))
    assert outputs.fixed == said


SEEN = {  # reason -> what the code of a type says; "!" for what it does not
    "latent": "kv_b_proj", "shared": "shared_kv|kv_shared|kv_proj|v_norm", "gate": r"\bchunk\(",
    "linear": r"chunk_|recurrent|time_decay|slope|context_scores|query_weight|w_g",
    "deformable": "sampling_offsets", "convolution": r"[Cc]onv|MLPLayerWithBN",
    "reduction": "reduction", "sparse": "[Bb]lock|window|chunk|hash|kernel|sample|ngram|unit",
    "other": "fft|lambda_|hard_softmax|text_proj|points|dt_proj|groups",
    "several": "pos|rel|layout_key|w2e|structure|torch.cat", "experts": "experts",
    "open": r"!self\.(o_proj|out_proj)\b", "map": "!v_proj|context_layer",
    "pooling": "cls_token|pooling|attn_proj|self.query =", "none": "!(key|k_proj) =",
    "unproved": "",
}  # fmt: skip


@pytest.mark.covers("C6")
def test_every_attention_of_transformers_is_known_or_left_alone_with_a_reason():
    """Or is a part of such, or is around it: there is no third kind in this version."""
    types = probe.classes()
    told = {name for name, one in types.items() if one.bases & {*TRANSFORMERS, *LEFT}}
    inside = {part for name in told for part in probe.parts(types, name)}
    named = {n for n, one in types.items() if find.NAMED.search(n.rpartition(".")[2]) and one.owns}
    untold = {
        name
        for name in named - told - inside
        if not (
            probe.parts(types, name) & (named | told)
            or "nn.MultiheadAttention(" in types[name].code
        )
    }
    assert not untold
    assert not set(LEFT) & (inside | set(TRANSFORMERS))
    if transformers.__version__.startswith("5.23"):
        assert set(LEFT) <= set(types)


@pytest.mark.parametrize("name", LEFT, ids=short)
def test_the_reason_is_in_the_code(name):
    """Of the type or of those that it is made from."""
    (key,) = (key for key, reason in REASONS.items() if reason == LEFT[name])
    absent, pattern = SEEN[key].startswith("!"), SEEN[key].removeprefix("!")
    assert bool(re.search(pattern, probe.classes()[name].code)) != absent


def test_variants_are_of_types_that_are_known():
    """And none is tested that is not in the table."""
    assert set(VARIANTS) | CAUTIOUS <= set(map(short, TRANSFORMERS))


@pytest.mark.covers("C6")
def test_a_wrong_number_of_heads_is_refused_by_name():
    """As after pruning one head of one layer by hand."""
    model, _ = MODELS["BERT"]()
    own = model.bert.encoder.layer[1].attention.self
    own.query = nn.Linear(32, 24)
    message = r"bert.encoder.layer.1.attention \(BertAttention\): expected self.query.weight"
    with pytest.raises(ValueError, match=message):
        products(model)


@pytest.mark.integration(row="PEFT LoRA", column="attention products")
def test_projections_with_adapters_are_no_factors():
    """With LoRA on queries neither frozen weight stands for its product; outputs go on."""
    peft = pytest.importorskip("peft")
    model, _ = MODELS["Llama"]()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    names = [p.name for p in products(adapted) if p.name.endswith(("query_key", "output_value"))]
    assert len(names) == 2
    assert all(name.endswith("self_attn.output_value") for name in names)


@pytest.mark.integration(row="GPT-2", column="diagnostics")
def test_diagnostics_measure_heads():
    """One record a product, one spectrum a head."""
    model, _ = MODELS["GPT-2"]()
    found = products(model)
    for product, row in zip(found, diagnostics.measure(found), strict=True):
        singular = torch.linalg.svdvals(product.materialize().detach().double())
        assert torch.allclose(row.spectrum, singular[..., :8], rtol=1e-4, atol=1e-6)
