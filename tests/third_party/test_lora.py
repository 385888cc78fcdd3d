"""LoRA of PEFT: what decays is what PEFT adds to the weight, or the weight with it."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from closeness import gradients
from torch import Tensor, nn

import frobdecay
from frobdecay.product.product import Product, product_norm

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from zoo import MODELS, families  # noqa: E402

pytestmark = pytest.mark.integration(row="PEFT LoRA", column="Frobenius decay")

UNMERGEABLE = ("a convolution in groups", "nn.MultiheadAttention")  # what "full" refuses


class Experts(nn.Module):
    """Stacked weights as in mixtures of experts, outputs first or inputs first."""

    def __init__(self, inputs_first: bool, experts: int = 3) -> None:
        super().__init__()
        shape = (experts, 6, 8) if inputs_first else (experts, 8, 6)
        self.stack = nn.Parameter(torch.randn(shape))
        self.is_transposed = inputs_first

    def forward(self, x: Tensor) -> Tensor:
        """Sum over the experts."""
        weights = self.stack.mT if self.is_transposed else self.stack
        return torch.einsum("bi,eoi->bo", x, weights)


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        return self.attention(x, x, x)[0]


def adapted(*layers: nn.Module, **options) -> peft.PeftModel:
    """Layers with adapters whose B is not zero, in float64."""
    model = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
        return peft.get_peft_model(model, peft.LoraConfig(**settings)).double()


def two(*layers: nn.Module, **options) -> peft.PeftModel:
    """The layer behind an identity: PEFT adapts what is inside a model."""
    return adapted(nn.Identity(), *layers, target_modules=["1"], **options)


def conv1d() -> nn.Module:
    """GPT-2's linear layer, stored inputs×outputs."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(9, 5)


KINDS: dict[str, Callable[[], peft.PeftModel]] = {
    "nn.Linear": lambda: two(nn.Linear(7, 5)),
    "rank-stabilized": lambda: two(nn.Linear(7, 5), use_rslora=True),
    "patterns of rank and alpha": lambda: adapted(
        nn.Linear(7, 5),
        nn.Linear(5, 4),
        target_modules=["0", "1"],
        rank_pattern={"0": 2},
        alpha_pattern={"1": 5},
    ),
    "PiSSA": lambda: two(nn.Linear(7, 5), init_lora_weights="pissa"),
    "with a bias": lambda: two(nn.Linear(7, 5), lora_bias=True),
    "transformers' Conv1D": lambda: two(conv1d()),
    "nn.Embedding": lambda: two(nn.Embedding(11, 6)),
    "nn.Conv1d": lambda: two(nn.Conv1d(4, 6, 3)),
    "nn.Conv2d": lambda: two(nn.Conv2d(4, 6, (3, 2), stride=2)),
    "nn.Conv2d, 1×1": lambda: two(nn.Conv2d(4, 6, 1)),
    "nn.Conv2d, channels last": lambda: two(nn.Conv2d(4, 6, 3)).to(
        memory_format=torch.channels_last
    ),
    "nn.Conv3d": lambda: two(nn.Conv3d(2, 5, (3, 2, 1))),
    "a convolution in groups": lambda: two(nn.Conv2d(4, 6, 3, groups=2), r=4),
    "nn.MultiheadAttention": lambda: adapted(Attention(), target_modules=["attention"]),
    "experts, outputs first": lambda: adapted(
        nn.Identity(), Experts(False), target_modules=[], target_parameters=["1.stack"]
    ),
    "experts, inputs first": lambda: adapted(
        nn.Identity(), Experts(True), target_modules=[], target_parameters=["1.stack"]
    ),
    "experts of Mixtral": lambda: adapted(
        MODELS["Mixtral"]()[0],
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "one expert": lambda: adapted(
        nn.Identity(), Experts(False, 1), target_modules=[], target_parameters=["1.stack"]
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def delta_of(layer: nn.Module, adapter: str = "default") -> Tensor:
    """What PEFT adds to the weight; of convolutions in groups, which it does not merge, ours."""
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if groups == 1:
        return layer.get_delta_weight(adapter)
    up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    parts = zip(up.chunk(groups), down.chunk(groups), strict=True)
    kernels = [torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a) for b, a in parts]
    return layer.scaling[adapter] * torch.cat(kernels)


def adapters(model: nn.Module, lora: str = "delta") -> list[Product]:
    """The products without those of dense attention, which a Mixtral has, too."""
    dense = (".query_key", ".output_value")
    return [p for p in frobdecay.products(model, lora=lora) if not p.name.endswith(dense)]


def layer_of(model: nn.Module, product: Product) -> nn.Module:
    """The layer that a product is called after."""
    return model.get_submodule(product.name.rpartition(".")[0])


def base_of(layer: nn.Module) -> nn.Parameter:
    """W₀."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def agree(product: Product, dense: Tensor) -> None:
    """Norm and gradients are autograd's of ½‖W‖² through PEFT's own dense tensor."""
    assert torch.allclose(product_norm(product), dense.norm(), rtol=1e-10)
    trained = [param for param in product.params if param.requires_grad]
    expected = torch.autograd.grad(0.5 * dense.square().sum(), trained)
    by_id = {id(p): g for p, g in zip(product.params, gradients(product), strict=True)}
    for param, gradient in zip(trained, expected, strict=True):
        assert (by_id[id(param)] - gradient).norm() <= 1e-10 * gradient.norm()


@pytest.mark.covers("P1")
@kinds
def test_delta_is_what_peft_adds(kind):
    """‖s·BA‖ and its gradients, for every kind of layer that PEFT adapts."""
    model = KINDS[kind]()
    found = adapters(model)
    assert found
    held = {id(p) for p in model.parameters() if p.requires_grad and p.ndim > 1}
    assert {id(p) for product in found for p in product.params} == held
    for product in found:
        agree(product, delta_of(layer_of(model, product)))


@pytest.mark.covers("P1")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNMERGEABLE])
@pytest.mark.integration(column="decay of W₀ + s·BA")
def test_full_is_what_peft_merges(kind):
    """‖W₀ + s·BA‖ and its gradients; the norm is that of the merged weight."""
    model = KINDS[kind]()
    found = adapters(model, "full")
    assert found
    for product in found:
        layer = layer_of(model, product)
        agree(product, base_of(layer) + delta_of(layer))
    names = [product.name.replace(".base_layer.", ".") for product in found]  # of nested layers
    norms = [product_norm(product) for product in found]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module")
        merged = dict(model.merge_and_unload().named_parameters(prefix="base_model.model"))
    for name, norm in zip(names, norms, strict=True):
        assert torch.allclose(merged[name].norm(), norm, rtol=1e-10)


@pytest.mark.parametrize("kind", UNMERGEABLE)
@pytest.mark.integration(column="decay of W₀ + s·BA", refused=True)
def test_full_is_refused_where_there_is_no_one_weight(kind):
    """PEFT cannot merge there, or swaps the weight while it runs; "delta" is the remedy."""
    with pytest.raises(ValueError, match="use lora='delta'"):
        frobdecay.products(KINDS[kind](), lora="full")


def test_a_misspelled_target_is_refused():
    """The error lists the two there are."""
    with pytest.raises(ValueError, match="'delta', 'full'"):
        frobdecay.products(KINDS["nn.Linear"](), lora="sum")


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(base):
    """W₀ stays as it is, adapters in float32: the sum is that of the float64 twins."""
    model = two(nn.Linear(70, 50)).float()
    layer = model.base_model.model[1]
    layer.base_layer.to(base)
    (product,) = frobdecay.products(model, lora="full")
    dense = base_of(layer).double() + 2 * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    assert torch.allclose(product_norm(product).double(), dense.norm(), rtol=1e-6)
    expected = torch.autograd.grad(0.5 * dense.square().sum(), product.params[1:])
    found = gradients(product)[1:]
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)
    assert base_of(layer).dtype == base
    assert base_of(layer).grad is None


# --- which adapters -----------------------------------------------------------------------------


def with_two_adapters() -> peft.PeftModel:
    """Two layers, of which the second has two adapters of different rank and scaling."""
    model = adapted(nn.Linear(7, 5), nn.Linear(5, 4), target_modules=["0", "1"])
    other = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["1"], init_lora_weights=False)
    model.add_adapter("other", other)
    return model.double()


def test_only_active_adapters_decay():
    """``set_adapter`` chooses; a layer without the active adapter has no product."""
    model = with_two_adapters()
    names = [product.name for product in frobdecay.products(model)]
    assert names == ["base_model.model.0.default", "base_model.model.1.default"]
    model.set_adapter("other")
    assert [p.name for p in frobdecay.products(model)] == ["base_model.model.1.other"]
    assert [p.name for p in frobdecay.products(model, lora="full")] == ["base_model.model.1.weight"]


def test_adapters_that_are_active_together():
    """In "delta" each product decays for itself, in "full" the weight with all of them."""
    model = with_two_adapters()
    model.base_model.set_adapter(["default", "other"])
    delta = {product.name: product for product in frobdecay.products(model)}
    layer = model.base_model.model[1]
    for adapter in ("default", "other"):
        agree(delta[f"base_model.model.1.{adapter}"], layer.get_delta_weight(adapter))
    _, full = frobdecay.products(model, lora="full")
    dense = base_of(layer) + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    agree(full, dense)


def test_disabled_adapters_are_left_out():
    """Inside ``disable_adapter`` there is nothing to decay."""
    model = KINDS["nn.Linear"]()
    with model.disable_adapter():
        assert frobdecay.products(model) == []
    assert len(frobdecay.products(model)) == 1


@pytest.mark.integration(row="PEFT LoRA, merged", refused=True)
def test_merged_adapters_are_refused():
    """They do not train; the error says how to unmerge them."""
    model = KINDS["nn.Linear"]()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        frobdecay.products(model)
    model.unmerge_adapter()
    assert len(frobdecay.products(model)) == 1


@pytest.mark.covers("P2")
def test_a_changed_scaling_is_read_anew():
    """``set_scale`` counts from the next listing on."""
    model = KINDS["nn.Linear"]()
    (before,) = frobdecay.products(model)
    model.base_model.model[1].set_scale("default", 3.0)
    (after,) = frobdecay.products(model)
    assert (before.scale, after.scale) == (2.0, 6.0)


# --- other tuners, by name ----------------------------------------------------------------------

REFUSED = {
    "DoRA": (lambda: peft.LoraConfig(r=2, use_dora=True), "magnitudes"),
    "KaSA": (lambda: peft.LoraConfig(r=2, kasa_config=peft.KasaConfig()), "singular values"),
    "BD-LoRA": (
        lambda: peft.LoraConfig(
            r=2, use_bdlora=peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["1"], nblocks=2)
        ),
        "block-diagonal",
    ),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(init_r=2, total_step=10), "P Λ Q"),
    "LoHa": (lambda: peft.LoHaConfig(r=2), "entrywise"),
    "LoKr": (lambda: peft.LoKrConfig(r=2), "Kronecker"),
    "VeRA": (lambda: peft.VeraConfig(r=2), "vectors between"),
    "FourierFT": (lambda: peft.FourierFTConfig(n_frequency=10), "nothing known|nothing is known"),
}
LEFT_OUT = {
    "IA3": lambda: peft.IA3Config(feedforward_modules=[]),
    "OFT": lambda: peft.OFTConfig(r=2, oft_block_size=0),
    "LN tuning": lambda: peft.LNTuningConfig(),
}


def tuned(config) -> nn.Module:
    """A small model whose linear layer, or normalization, has what the configuration says."""
    config.target_modules = {"2" if isinstance(config, peft.LNTuningConfig) else "1"}
    layers = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        return peft.get_peft_model(nn.Sequential(*layers), config)


def rows(names) -> list:
    """A row of the matrix for each tuner."""
    return [pytest.param(n, marks=pytest.mark.integration(row=f"PEFT {n}")) for n in names]


@pytest.mark.integration(refused=True)
@pytest.mark.parametrize("name", rows(REFUSED))
@pytest.mark.parametrize("lora", ["delta", "full"])
def test_updates_that_are_not_ba_are_refused(name, lora):
    """The error says what the update is, and how to leave the layer to weight decay."""
    config, reason = REFUSED[name]
    model = tuned(config())
    with pytest.raises(ValueError, match=reason) as raised:
        frobdecay.products(model, lora=lora)
    assert "base_model.model.1" in str(raised.value)
    assert "register_products" in str(raised.value)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_tuners_that_add_no_product_are_left_out(name):
    """Their parameters keep their weight decay; wrapping a model of them alone is refused."""
    model = tuned(LEFT_OUT[name]())
    assert frobdecay.products(model) == []
    with pytest.raises(ValueError, match="without any"):
        frobdecay.FrobeniusDecay(torch.optim.AdamW(model.parameters()), model)


def test_the_remedy_for_refused_tuners_works(monkeypatch):
    """A provider that yields nothing leaves the layers out."""
    from frobdecay.product import find

    monkeypatch.setattr(find, "_USERS", {})
    model = tuned(REFUSED["LoHa"][0]())
    frobdecay.register_products("peft.tuners.loha.layer.Linear")(lambda module, name: ())
    assert frobdecay.products(model) == []


PLAIN = {
    "MiCA": lambda: peft.LoraConfig(r=2, init_lora_weights="mica"),
    "VeLoRA": lambda: peft.LoraConfig(r=2, velora_config=peft.tuners.lora.VeloraConfig()),
    "aLoRA": lambda: peft.LoraConfig(r=2, alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", rows(PLAIN))
def test_variants_that_add_ba(name):
    """Their update is s·BA; MiCA's frozen B is a constant in the product."""
    config = PLAIN[name]()
    config.target_modules = {"q_proj"} if name == "aLoRA" else {"1"}
    model = fine_tunable(config=config)[0] if name == "aLoRA" else tuned(config)
    product = frobdecay.products(model, include="*.default")[0]
    assert [param.requires_grad for param in product.params] == [name != "MiCA", True]
    layer = layer_of(model, product)
    nn.init.normal_(layer.lora_B["default"].weight)
    assert torch.allclose(product_norm(product), layer.get_delta_weight("default").norm())


@pytest.mark.integration(row="PEFT X-LoRA", refused=True)
def test_a_mixture_of_adapters_is_refused():
    """X-LoRA's scaling depends on the input."""
    kind = pytest.importorskip("peft.tuners.xlora.model").XLoraModel
    mixture = kind.__new__(kind)  # as a container: to build one takes adapters on disk
    nn.Module.__init__(mixture)
    mixture.inner = KINDS["nn.Linear"]()
    with pytest.raises(ValueError, match="depends on the input"):
        frobdecay.products(mixture)


@pytest.mark.covers("P27")
@pytest.mark.integration(row="PEFT LoRA, tensor parallel", refused=True)
def test_tensor_parallel_layers_are_refused():
    """What PEFT adapts shard by shard is marked in the base layer."""
    model = KINDS["nn.Linear"]()
    model.base_model.model[1].base_layer._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match="colwise"):
        frobdecay.products(model)


@pytest.mark.integration(row="PEFT LoRA on int8 (torchao)")
def test_a_quantized_base():
    """The update decays as ever; "full" refuses a W₀ that it cannot read."""
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        config = peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    (product,) = frobdecay.products(model)
    layer = layer_of(model, product)
    expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(product_norm(product), (layer.scaling["default"] * expected).norm())
    with pytest.raises(ValueError, match="quantized"):
        frobdecay.products(model, lora="full")


# --- training -----------------------------------------------------------------------------------

TARGETS = {"Llama": ["q_proj", "v_proj", "down_proj"], "GPT-2": ["c_attn", "c_fc"]}


def fine_tunable(family: str = "Llama", config=None, **options) -> tuple[nn.Module, dict]:
    """A small language model with adapters as PEFT draws them (B = 0), and a batch."""
    torch.manual_seed(1)
    model, inputs = MODELS[family]()
    config = config or peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS[family],
        fan_in_fan_out=family == "GPT-2",
        **options,
    )
    return peft.get_peft_model(model, config).train(), inputs


def wrapped(model: nn.Module, decay: float = 0.1, lora: str = "delta", lr: float = 1e-2):
    """AdamW around all parameters, frozen ones too, as many scripts pass them."""
    base = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    found = model if lora == "delta" else frobdecay.products(model, lora="full")
    return frobdecay.FrobeniusDecay(base, found, decay=None if decay else 0.0)


def steps(model: nn.Module, optimizer, inputs: dict, number: int) -> list[float]:
    """Train, and return the losses."""
    losses = []
    for _ in range(number):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("family", families("Llama", "GPT-2"))
@pytest.mark.parametrize("lora", ["delta", "full"])
@pytest.mark.integration(column="LoRA fine-tune")
def test_a_fine_tune_learns(family, lora):
    """The loss falls, W₀ stays, and what decays is smaller than without decay."""
    norms = []
    for decay in (0.0, 3.0):
        model, inputs = fine_tunable(family)
        before = values(model)
        losses = steps(model, wrapped(model, decay, lora), inputs, 25)
        assert losses[-1] < 0.8 * losses[0]
        for name, param in model.named_parameters():
            assert param.isfinite().all()
            assert param.requires_grad or torch.equal(param, before[name])
        found = frobdecay.products(model, lora=lora)
        norms.append(sum(product_norm(product).square().item() for product in found))
    assert norms[1] < norms[0]


@pytest.mark.parametrize("lora", ["delta", "full"])
def test_without_decay_it_is_the_optimizer_itself(lora):
    """λ = 0 trains, saves and merges bit for bit what the base optimizer does."""
    merged = []
    for wrap in (False, True):
        model, inputs = fine_tunable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        if wrap:
            products = frobdecay.products(model, lora=lora)
            optimizer = frobdecay.FrobeniusDecay(optimizer, products, decay=0.0)
        steps(model, optimizer, inputs, 5)
        merged.append(model.merge_and_unload().state_dict())
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


@pytest.mark.covers("P2")
@pytest.mark.parametrize("lora", ["delta", "full"])
def test_decoupled_decay_is_the_formula(lora):
    """Beside AdamW's own step, every factor moves by −lr·λ·∇½‖W‖², W by PEFT's definition."""
    plain, inputs = fine_tunable(init_lora_weights=False)
    model = copy.deepcopy(plain)
    products = frobdecay.products(plain, lora=lora)
    expected = {}
    for product in products:
        layer = layer_of(plain, product)
        dense = layer.get_delta_weight("default") + (base_of(layer) if lora == "full" else 0)
        trained = [param for param in product.params if param.requires_grad]
        grads = torch.autograd.grad(0.5 * dense.square().sum(), trained)
        expected |= {id(p): g for p, g in zip(trained, grads, strict=True)}
    penalties = {n: expected[id(p)] for n, p in plain.named_parameters() if p.requires_grad}
    base = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    steps(plain, base, inputs, 1)
    steps(model, wrapped(model, 0.1, lora), inputs, 1)
    theirs = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        if param.requires_grad:
            moved = theirs[name] - 1e-2 * 0.1 * penalties[name]
            assert torch.allclose(param, moved, rtol=1e-5, atol=1e-6), name


def test_saving_merging_and_unloading(tmp_path):
    """A trained adapter saves, loads into a new model, merges and unloads like any other."""
    model, inputs = fine_tunable()
    steps(model, wrapped(model), inputs, 5)
    model.eval()
    answer = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(MODELS["Llama"]()[0], tmp_path)
    bases = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    loaded.load_state_dict(bases, strict=False)  # the same random W₀
    assert torch.equal(loaded(**inputs).logits, answer)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(**inputs).logits, answer, rtol=1e-4, atol=1e-4)
    assert not any("lora_" in name for name in merged.state_dict())
    bare = model.unload()
    assert not torch.allclose(bare(**inputs).logits, answer, rtol=1e-3, atol=1e-3)


def test_resume_is_exact():
    """Four steps equal two, a checkpoint of adapters and optimizer, and two more."""
    model, inputs = fine_tunable()
    start = copy.deepcopy(model)
    optimizer = wrapped(model)
    steps(model, optimizer, inputs, 2)
    halfway = copy.deepcopy((peft.get_peft_model_state_dict(model), optimizer.state_dict()))
    steps(model, optimizer, inputs, 2)
    resumed = wrapped(start)
    peft.set_peft_model_state_dict(start, halfway[0])
    resumed.load_state_dict(halfway[1])
    steps(start, resumed, inputs, 2)
    other = dict(start.named_parameters())
    assert all(torch.equal(param, other[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("lora", ["delta", "full"])
def test_the_start_with_a_zero_b(lora):
    """At B = 0, "delta" has no gradient anywhere and stays; nothing is NaN, and it trains on."""
    model, inputs = fine_tunable()
    products = frobdecay.products(model, lora=lora)
    for product in products:
        *_, u, v = gradients(product)
        assert u.isfinite().all()
        assert v.isfinite().all()
        assert not v.any()  # s·Bᵀ(…) of a zero B
        assert bool(u.any()) == (lora == "full")
    optimizer = wrapped(model, lora=lora)
    steps(model, optimizer, inputs, 2)
    assert all(param.isfinite().all() for param in model.parameters())
    assert str(frobdecay.diagnostics.measure(products))


def test_a_zero_b_cannot_be_balanced():
    """Balancing a zero product would leave nothing to train."""
    model, _ = fine_tunable()
    with pytest.raises(ValueError, match="zero"):
        frobdecay.balance_(frobdecay.products(model))


@pytest.mark.integration(row="PEFT LoRA-FA")
def test_a_frozen_a_is_a_constant_in_the_product():
    """LoRA-FA's optimizer freezes A: only B decays, by s²·B(AAᵀ)."""
    from peft.optimizers import create_lorafa_optimizer

    model, inputs = fine_tunable()
    base = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    products = frobdecay.products(model)
    assert [[p.requires_grad for p in product.params] for product in products] == [
        [True, False]
    ] * len(products)
    optimizer = frobdecay.FrobeniusDecay(base, products, decay=0.1, mode="decoupled")
    before = values(model)
    losses = steps(model, optimizer, inputs, 10)
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], before[n]) for n in before if "lora_A" in n)
    assert not any(torch.equal(after[n], before[n]) for n in before if "lora_B" in n)


@pytest.mark.integration(row="PEFT LoRA+")
def test_learning_rates_of_lora_plus():
    """Every factor decays with the rate of its own group."""
    from peft.optimizers import create_loraplus_optimizer

    model, inputs = fine_tunable(init_lora_weights=False)
    base = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    optimizer = frobdecay.FrobeniusDecay(base, model)
    twin, _ = fine_tunable(init_lora_weights=False)
    plain = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    (product, *_) = frobdecay.products(twin)
    penalties = gradients(product)
    steps(twin, plain, inputs, 1)
    steps(model, optimizer, inputs, 1)
    (decayed, *_) = frobdecay.products(model)
    for rate, mine, theirs, penalty in zip(
        (8e-3, 1e-3), decayed.params, product.params, penalties, strict=True
    ):
        assert torch.allclose(mine, theirs - rate * 0.1 * penalty, rtol=1e-5, atol=1e-6)


def test_a_trained_base_decays_with_the_rest():
    """In "full", a W₀ that is trained is a factor: it moves by −lr·λ·W as well."""
    model = two(nn.Linear(7, 5))
    layer = model.base_model.model[1]
    layer.base_layer.weight.requires_grad_(True)
    dense = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
    before = layer.base_layer.weight.detach().clone()
    base = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    optimizer = frobdecay.FrobeniusDecay(base, frobdecay.products(model, lora="full"))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.allclose(layer.base_layer.weight, before - 0.5 * 0.1 * dense)


@pytest.mark.integration(column="Trainer")
def test_it_trains_in_transformers_trainer(tmp_path):
    """``Trainer(optimizers=(wrapper, None))`` takes the steps of the plain loop."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, inputs = fine_tunable()
    twin = copy.deepcopy(model)
    rows_of = [{key: value[k] for key, value in inputs.items()} for k in range(2)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows_of, optimizers=(wrapped(model), None)
    )
    result = trainer.train()
    assert result.global_step == 3
    steps(twin, wrapped(twin), inputs, 3)
    other = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        assert torch.allclose(param, other[name], rtol=1e-4, atol=1e-5), name
