"""Flambe: LAMB by its equation, with the product's direction in the decay term of factors."""

import copy
import pickle
import warnings

import pytest
import torch
from closeness import gradients
from optim_cases import Net, assert_identical, values
from torch import Tensor, nn

import frobdecay
from frobdecay import Flambe, FrobeniusDecay
from frobdecay.product.product import Product
from frobdecay.product.toward import toward

OPTIONS = {
    "defaults": {},
    "large decay": {"weight_decay": 0.5},
    "no decay": {"weight_decay": 0.0},
    "other betas": {"betas": (0.8, 0.95), "eps": 1e-3},
    "no bias correction": {"bias_correction": False},
    "maximize": {"maximize": True},
    "lr as a tensor": {"lr": torch.tensor(0.02)},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Reference:
    """The equation of the module's docstring, tensor by tensor, as it is written there."""

    def __init__(
        self,
        net: Net,
        products: list[Product],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        maximize: bool = False,
    ) -> None:
        self.net, self.products, self.t = net, products, 0
        self.m = {p: torch.zeros_like(p) for p in net.parameters()}
        self.v = {p: torch.zeros_like(p) for p in net.parameters()}
        self.lr, self.eps, self.decay = float(lr), eps, weight_decay
        self.betas, self.correct, self.sign = betas, bias_correction, -1 if maximize else 1

    @torch.no_grad()
    def step(self) -> None:
        """Once."""
        self.t += 1
        directions: dict[Tensor, Tensor] = {}
        for product in self.products:
            for param, gradient in zip(product.params, gradients(product), strict=True):
                directions[param] = directions.get(param, 0) + gradient
        beta1, beta2 = self.betas
        for w in self.net.parameters():
            g = self.sign * w.grad
            self.m[w] = beta1 * self.m[w] + (1 - beta1) * g
            self.v[w] = beta2 * self.v[w] + (1 - beta2) * g**2
            m, v = self.m[w], self.v[w]
            if self.correct:
                m, v = m / (1 - beta1**self.t), v / (1 - beta2**self.t)
            u = m / (v.sqrt() + self.eps) + self.decay * directions.get(w, w)
            ratio = w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else 1.0
            w -= self.lr * ratio * u


def run(net: Net, optimizer, steps: int = 6) -> dict[str, Tensor]:
    """Train, and return the parameters."""
    for _ in range(steps):
        net.zero_grad()
        net.loss().backward()
        optimizer.step()
    return values(net)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    """Equal up to rounding."""
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.covers("C23")
@options
@pytest.mark.parametrize("factored", [True, False], ids=["products", "plain LAMB"])
def test_it_is_the_equation(options, factored):
    """Several steps equal those of the equation, with products and without."""
    ours, theirs = Net(), Net()
    products = theirs.products() if factored else []
    found = run(ours, Flambe(ours.parameters(), ours.products() if factored else None, **options))
    close(found, run(theirs, Reference(theirs, products, **options)))


@pytest.mark.covers("C23")
def test_the_decay_is_inside_of_the_trust_ratio():
    """With zero gradients a factor's step has the size lr·‖w‖, along ∇½‖W‖², whatever λ is."""
    moved = []
    for decay in (0.01, 1.0):
        net = Net()
        before = values(net)
        (first, _) = net.products()
        direction = gradients(first)[0]
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
        Flambe(net.parameters(), net.products(), lr=0.1, weight_decay=decay).step()
        step = before["U"] - net.U.detach()
        assert torch.allclose(step, 0.1 * before["U"].norm() * direction / direction.norm())
        moved.append(step)
    assert torch.allclose(*moved)


@pytest.mark.parametrize("zero", ["w", "u"])
def test_the_ratio_is_one_where_a_norm_is_zero(zero):
    """A tensor that starts at zero leaves it, one without an update stays; nothing is NaN."""
    w = nn.Parameter(torch.zeros(3) if zero == "w" else torch.ones(3))
    w.grad = torch.ones(3) if zero == "w" else torch.zeros(3)
    Flambe([w], lr=0.1, weight_decay=0.0, eps=0.0 if zero == "w" else 1e-6).step()
    assert torch.allclose(w.detach(), torch.full((3,), -0.1 if zero == "w" else 1.0))


# --- param groups -------------------------------------------------------------------------------


def test_each_group_has_its_own_options():
    """λ and lr are those of the group; ``frobenius_decay`` is λ of a group's factors alone."""
    ours = Net()
    groups = [
        {"params": [ours.before, ours.U, ours.V], "weight_decay": 0.3},
        {"params": [ours.between, ours.P, ours.Q], "frobenius_decay": 0.2, "weight_decay": 0.0},
        {"params": [ours.behind], "lr": 0.0},
    ]
    optimizer = Flambe(groups, ours.products(), lr=0.01)
    start = values(ours)
    expected = []
    for decay in (0.3, 0.2, 0.0):
        net = Net()
        expected.append(run(net, Reference(net, net.products(), lr=0.01, weight_decay=decay), 1))
    found = run(ours, optimizer, 1)
    for name in ("before", "U", "V"):
        assert torch.allclose(found[name], expected[0][name])
    for name in ("P", "Q"):
        assert torch.allclose(found[name], expected[1][name])
    assert torch.allclose(found["between"], expected[2]["between"])
    assert torch.equal(found["behind"], start["behind"])


def test_a_scheduled_decay_counts_at_once():
    """λ is read from the group in every step."""
    ours, theirs = Net(), Net()
    optimizer = Flambe(ours.parameters(), ours.products(), weight_decay=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.4
    found = run(ours, optimizer)
    close(found, run(theirs, Reference(theirs, theirs.products(), weight_decay=0.4)))


def test_a_learning_rate_scheduler_drives_it():
    """It is a torch optimizer, so that a scheduler takes it."""
    net = Net()
    optimizer = Flambe(net.parameters(), net.products(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    run(net, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_a_group_can_be_added():
    """An added group trains, and its factors decay as products."""
    ours, theirs = Net(), Net()
    for param in (ours.P, ours.Q):
        param.requires_grad_(False)
    optimizer = Flambe([p for p in ours.parameters() if p.requires_grad], ours.products())
    for param in (ours.P, ours.Q):
        param.requires_grad_(True)
    optimizer.add_param_group({"params": [ours.P, ours.Q]})
    close(run(ours, optimizer), run(theirs, Reference(theirs, theirs.products())))


def test_a_closure_is_evaluated_once():
    """Its loss is returned, and its gradients are those that are used."""
    ours, theirs = Net(), Net()
    calls = []
    optimizer = Flambe(ours.parameters(), ours.products())

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = ours.loss()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert loss.item() == Net().loss().item()
    close(values(ours), run(theirs, Flambe(theirs.parameters(), theirs.products()), 1), 0)


def test_factors_without_a_gradient_stay():
    """They still count in the product; frozen ones likewise."""
    net = Net()
    before = values(net)
    net.V.requires_grad_(False)
    net.loss().backward()
    net.P.grad = None
    Flambe(net.parameters(), net.products(), lr=0.1).step()
    after = values(net)
    assert torch.equal(after["V"], before["V"])
    assert torch.equal(after["P"], before["P"])
    assert not torch.equal(after["U"], before["U"])
    assert not torch.equal(after["Q"], before["Q"])


def test_parameters_are_looked_up_anew():
    """A factor that a framework replaced, in the module and in the group, decays on."""
    ours, theirs = Net(), Net()
    optimizer = Flambe(ours.parameters(), ours.products())
    old = ours.U
    ours.U = nn.Parameter(old.detach().clone())
    params = optimizer.param_groups[0]["params"]
    params[next(k for k, p in enumerate(params) if p is old)] = ours.U
    close(run(ours, optimizer), run(theirs, Reference(theirs, theirs.products())))


def test_a_parameter_in_two_products_gets_the_sum():
    """A shared factor moves along the sum of both gradients."""
    tensors = [nn.Parameter(torch.randn(5, 2, dtype=torch.float64)) for _ in range(3)]
    products = [Product.of(tensors[0], tensors[1]), Product.of(tensors[0], tensors[2])]
    direction = gradients(products[0])[0] + gradients(products[1])[0]
    before = tensors[0].detach().clone()
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    Flambe(tensors, products, lr=0.1).step()
    step = before - tensors[0].detach()
    assert torch.allclose(step, 0.1 * before.norm() * direction / direction.norm())


def test_a_parameter_that_trains_later_starts_its_own_moments():
    """Its first step is that of a new optimizer, whatever the others have behind them."""
    net = Net()
    optimizer = Flambe(net.parameters(), net.products(), lr=0.1)
    for _ in range(3):
        net.zero_grad()
        net.loss().backward()
        net.P.grad = None
        optimizer.step()
    assert net.P not in optimizer.state
    twin = copy.deepcopy(net)
    found = run(net, optimizer, 1)
    wanted = run(twin, Flambe(twin.parameters(), twin.products(), lr=0.1), 1)
    assert torch.allclose(found["P"], wanted["P"], rtol=1e-12)
    assert not torch.allclose(found["Q"], wanted["Q"], rtol=1e-3)
    assert float(optimizer.state[net.P]["step"]) == 1


def test_half_precision_loads_where_not_all_have_trained():
    """A parameter without a gradient has no moments, and gets none from a checkpoint."""
    net, twin = Net(torch.bfloat16), Net(torch.bfloat16)
    optimizer, other = (Flambe(one.parameters(), one.products()) for one in (net, twin))
    net.loss().backward()
    net.P.grad = None
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert twin.P not in other.state
    assert torch.equal(other.state[twin.Q]["exp_avg"], optimizer.state[net.Q]["exp_avg"])
    assert other.state[twin.Q]["exp_avg"].dtype == torch.float32


# --- refusals -----------------------------------------------------------------------------------

BAD = {
    "negative lr": {"lr": -1.0},
    "infinite lr": {"lr": float("inf")},
    "two rates": {"lr": torch.ones(2)},
    "negative eps": {"eps": -1e-8},
    "beta of one": {"betas": (0.9, 1.0)},
    "negative decay": {"weight_decay": -0.1},
    "NaN decay": {"weight_decay": float("nan")},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_options_out_of_range_are_refused(bad):
    """At construction, in an added group, and in the step after somebody wrote them."""
    net = Net()
    with pytest.raises(ValueError, match="param group 0"):
        Flambe(net.parameters(), net.products(), **bad)
    optimizer = Flambe(net.parameters(), net.products())
    with pytest.raises(ValueError, match="param group 1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **bad})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(bad)
    net.loss().backward()
    before = values(net)
    with pytest.raises(ValueError, match="param group 0"):
        optimizer.step()
    assert_identical(values(net), before)


def test_a_model_without_products_is_refused():
    """Plain LAMB is asked for by None, not by a model that was not factorized."""
    with pytest.raises(ValueError, match="factorize"):
        Flambe(nn.Linear(3, 3).parameters(), nn.Linear(3, 3))


def test_factors_that_it_does_not_hold_are_refused():
    """At construction, and when they come later."""
    net = Net()
    with pytest.raises(ValueError, match="add_param_group"):
        Flambe([net.U], net.products())
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    frobdecay.factorize(model, rank=2, include="0")
    optimizer = Flambe(model.parameters(), model)
    model(torch.randn(2, 8)).sum().backward()
    frobdecay.factorize(model, rank=2, include="1")
    with pytest.raises(ValueError, match=r"1\.weight"):
        optimizer.step()


def test_weights_that_are_factorized_later_decay_as_products():
    """Once their factors are added, the next step is that of a new optimizer."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    frobdecay.factorize(model, rank=2, include="0")
    optimizer = Flambe(model.parameters(), model, lr=0.1, weight_decay=0.5)
    frobdecay.factorize(model, rank=2, include="1")
    optimizer.add_param_group({"params": list(model[1].parametrizations.parameters())})
    twin = copy.deepcopy(model)
    x = torch.randn(4, 8, dtype=torch.float64)
    for net, steps in (
        (model, optimizer),
        (twin, Flambe(twin.parameters(), twin, lr=0.1, weight_decay=0.5)),
    ):
        net(x).square().sum().backward()
        steps.step()
    assert [product.name for product in optimizer.products] == ["0.weight", "1.weight"]
    for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-10)


def test_products_that_are_gone_are_refused():
    """A merged layer has no factors that could decay."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    frobdecay.factorize(model, rank=2)
    optimizer = Flambe(model.parameters(), model)
    frobdecay.merge(model[0])
    with pytest.raises(ValueError, match="merged"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    """Before anything moves."""
    net = nn.Embedding(5, 3, sparse=True)
    net(torch.tensor([1])).sum().backward()
    before = net.weight.detach().clone()
    with pytest.raises(TypeError, match="sparse=False"):
        Flambe(net.parameters()).step()
    assert torch.equal(net.weight, before)


def test_complex_parameters_are_refused():
    """The equation is for real numbers."""
    param = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex"):
        Flambe([param]).step()


def test_a_part_of_a_parameter_is_refused():
    """A packed parameter of which only a part is a factor has no one direction."""
    packed = nn.Parameter(torch.randn(3, 4, 2))
    other = nn.Parameter(torch.randn(5, 2))
    product = Product.of(packed, other, patterns=["p m r -> p m r", None], batch=0)
    part = frobdecay.Factor(product.factors[0].owner, "tensor", "p m r -> p m r", (), 0)
    product = Product("part", (part, product.factors[1]))
    with pytest.raises(ValueError, match="8 of 24 entries"):
        Flambe([packed, other], product)


@pytest.mark.parametrize("mode", ["auto", "coupled", "decoupled"])
def test_it_cannot_be_wrapped(mode):
    """Its factors would decay twice."""
    net = Net()
    with pytest.raises(ValueError, match="decays products itself"):
        FrobeniusDecay(Flambe(net.parameters(), net.products()), net.products(), mode=mode)


# --- precision and checkpoints ------------------------------------------------------------------


def transformer(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    """A factorized Transformer that classifies sequences, and a batch."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor")
        encoder = nn.TransformerEncoder(layer, 2)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(16 * 5, 4))
    frobdecay.factorize(model, rank=4, include="*.linear?")
    inputs, labels = torch.randn(12, 5, 16), torch.randint(4, (12,))
    return model.to(dtype), inputs.to(dtype), labels


class Lamb(torch.optim.Optimizer):
    """Somebody else's LAMB, which does not know of products."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        """Adam's direction at the tensor's own norm."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                m = state.setdefault("m", torch.zeros_like(param)).lerp_(param.grad, 1 - beta1)
                v = state.setdefault("v", torch.zeros_like(param))
                v.lerp_(param.grad.square(), 1 - beta2)
                update = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * param
                ratio = param.norm() / update.norm() if param.norm() > 0 else 1.0
                param.sub_(update, alpha=float(group["lr"] * ratio))


MAKERS = {
    "Flambe": lambda model: Flambe(model.parameters(), model, lr=0.01, weight_decay=0.05),
    "FrobeniusDecay around a LAMB": lambda model: FrobeniusDecay(
        Lamb(model.parameters(), lr=0.01, weight_decay=0.05), model, mode="decoupled"
    ),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def fit(model: nn.Module, optimizer, inputs: Tensor, labels: Tensor, steps: int) -> list[float]:
    """Train, and return the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs).float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.covers("C23", "P5")
@makers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_learns(make, dtype):
    """The loss falls to a fraction of what it was at the start."""
    model, inputs, labels = transformer(dtype)
    losses = fit(model, make(model), inputs, labels, 40)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.covers("C23")
@makers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(make, dtype, tmp_path):
    """Four steps equal two, a checkpoint on disk, and two more; in bf16, too."""
    model, inputs, labels = transformer(dtype)
    optimizer = make(model)
    fit(model, optimizer, inputs, labels, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x")
    fit(model, optimizer, inputs, labels, 2)
    saved = torch.load(tmp_path / "x", weights_only=True)
    other, _, _ = transformer(dtype)
    other.load_state_dict(saved["model"])
    resumed = make(other)
    resumed.load_state_dict(saved["optimizer"])
    fit(other, resumed, inputs, labels, 2)
    assert_identical(dict(other.state_dict()), dict(model.state_dict()))
    assert_identical(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.covers("P4")
def test_half_precision_moves_in_expectation():
    """Steps below bf16's resolution act: the mean over many entries is the exact one."""
    weight = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    Flambe([weight], lr=1e-4, weight_decay=0.0).step()
    assert weight.dtype == torch.bfloat16
    assert abs(weight.detach().float().mean().item() - (1 - 1e-4)) < 3e-5


def test_training_is_resumed_toward_the_first_weight():
    """Products that decay toward what they were do so after loading, or there is a word."""
    net = Net()

    def made(model):
        found = toward(model.products(), "initial")
        return Flambe(model.parameters(), found, lr=0.1, weight_decay=1.0)

    optimizer = made(net)
    run(net, optimizer, 2)
    other = Net()
    other.load_state_dict(net.state_dict())
    resumed = made(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_identical(run(other, resumed, 2), run(net, optimizer, 2))
    plain = Flambe(net.parameters(), net.products()).state_dict()
    with pytest.warns(UserWarning, match="no initial factors, so first"):
        resumed.load_state_dict(plain)
    before = copy.deepcopy(plain)
    with pytest.raises(ValueError, match="expected initial factors of the 0 products"):
        Flambe(net.parameters(), net.products()).load_state_dict(optimizer.state_dict())
    assert_identical(plain, before)


def test_copies_go_on_alike():
    """Copying and pickling take products, state and rounding along."""
    net = Net()
    optimizer = Flambe(net.parameters(), net.products(), lr=0.01)
    run(net, optimizer, 2)
    pairs = [
        copy.deepcopy((net, optimizer)),
        pickle.loads(pickle.dumps((net, optimizer))),
    ]
    expected = run(net, optimizer, 2)
    for twin, twins_optimizer in pairs:
        assert len(twins_optimizer.products) == 2
        assert_identical(run(twin, twins_optimizer, 2), expected)


def test_a_foreign_checkpoint_is_refused():
    """Nothing is changed by one of another version of frobdecay."""
    net = Net()
    optimizer = Flambe(net.parameters(), net.products())
    run(net, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="version"):
        optimizer.load_state_dict({**before, "frobdecay": {"version": 99}})
    assert_identical(optimizer.state_dict(), before)


def test_a_gradient_scaler_skips_and_unscales():
    """An overflow leaves everything alone; otherwise the steps are those without a scaler."""
    ours, theirs = Net(torch.float32), Net(torch.float32)
    optimizer = Flambe(ours.parameters(), ours.products(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    start = values(ours)
    scaler.scale(ours.loss() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_identical(values(ours), start)
    assert not optimizer.state
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(ours.loss()).backward()
        scaler.step(optimizer)
        scaler.update()
    expected = run(theirs, Flambe(theirs.parameters(), theirs.products(), lr=0.01), 3)
    close(values(ours), expected, 1e-5)
