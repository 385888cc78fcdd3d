"""FrobeniusDecay decays what it says: against the base on loss + penalty, and the formula."""

import copy
import inspect
import warnings
from functools import partial

import pytest
import torch
from cases import seeded
from closeness import gradients
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import Net, assert_identical, torch_table, train, values
from torch import nn, optim

from frobdecay.diagnostics import measure
from frobdecay.models.factorize import factorize
from frobdecay.optim import stability
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product, penalty

LAMBDA = 0.05


# --- factors of several dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("bound", [None, 100.0])
@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW], ids=["SGD", "AdamW"])
def test_each_product_is_decayed_in_its_own_dtype(make, bound):
    """float32 and float64 side by side, of one shape, and in one product: a step of each alone."""
    kinds = [(torch.float32,) * 2, (torch.float64,) * 2, (torch.float64, torch.float32)]
    shapes, generator = ((7, 3), (5, 3)), seeded(0)
    shapes *= 2  # of the factors, and of their gradients
    drawn = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in kinds
    ]

    def stepped(chosen, dtypes):
        found = []
        for k, kind in zip(chosen, dtypes, strict=True):
            pair = [
                nn.Parameter(t.to(d, copy=True)) for t, d in zip(drawn[k][:2], kind, strict=True)
            ]
            for p, grad in zip(pair, drawn[k][2:], strict=True):
                p.grad = 0.1 * grad.to(p.dtype)
            found.append(Product.of(*pair, name=f"product {k}"))
        params = [p for product in found for p in product.params]
        base = make(params, lr=0.05, weight_decay=0.0)
        FrobeniusDecay(base, found, decay=0.3, bound=bound).step()
        return [p.detach() for p in params]

    together = stepped([0, 1, 2], kinds)
    assert [p.dtype for p in together] == [dtype for kind in kinds for dtype in kind]
    exact = stepped([0, 1, 2], [(torch.float64,) * 2] * 3)
    for ours, theirs in zip(together, exact, strict=True):
        tolerance = 1e-12 if ours.dtype == torch.float64 and ours is not together[4] else 1e-5
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    alone = stepped([1], kinds[1:2])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together[2:4], alone, strict=True))


# --- λ = 0 is the base optimizer, bit for bit ---------------------------------------------------

OPTIMIZERS, samples_of = torch_table()
ENTRIES = [
    (info, sample)
    for info in OPTIMIZERS
    for sample in samples_of("cpu", torch.float32, info)  # without those that need CUDA
]
NAMES = [f"{info.optim_cls.__name__}-{sample.desc}" for info, sample in ENTRIES]


def test_the_table_of_optimizers_is_not_empty():
    """Torch's own table is what the next tests run over."""
    pytest.importorskip("expecttest")
    assert len({info.optim_cls for info, _ in ENTRIES}) >= 13
    assert len(ENTRIES) > 100


def grouped(net, info, kwargs, wrapped):
    """The parameters as the plain base and the wrapped one get them, in corresponding groups."""
    if not info.supports_param_groups:
        return list(net.parameters())
    default = inspect.signature(info.optim_cls).parameters.get("weight_decay")
    decayed = kwargs.get("weight_decay", default.default if default else 0.0) != 0
    if wrapped or not decayed:
        return [
            {"params": [net.before, net.U, net.between, net.V]},
            {"params": [net.P, net.behind, net.Q], **different(kwargs)},
        ]
    return [
        {"params": [net.before, net.between]},
        {"params": [net.U, net.V], "weight_decay": 0.0},
        {"params": [net.behind], **different(kwargs)},
        {"params": [net.P, net.Q], "weight_decay": 0.0, **different(kwargs)},
    ]


def different(kwargs):
    """Another learning rate for the second group, where it is a number."""
    lr = kwargs.get("lr", 1e-3)
    return {} if isinstance(lr, torch.Tensor) else {"lr": lr / 2}


@pytest.mark.covers("C20", "P31")
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize(("info", "sample"), ENTRIES, ids=NAMES)
def test_without_decay_the_trajectory_is_the_base_bitwise(info, sample, closure):
    """λ = 0 gives the same parameters and the same state, for all of torch's test table."""
    if info.step_requires_closure and not closure:
        pytest.skip("the optimizer's step takes a closure only")
    kwargs = sample.kwargs
    run = partial(
        train,
        closure=closure,
        sparse=info.only_supports_sparse_grads,
        assigned=kwargs.get("differentiable", False),
    )
    plain, ours = Net(torch.float32), Net(torch.float32)
    base = info.optim_cls(grouped(plain, info, kwargs, False), **copy.deepcopy(kwargs))
    inner = info.optim_cls(grouped(ours, info, kwargs, True), **copy.deepcopy(kwargs))
    wrapped = FrobeniusDecay(inner, ours.products(), decay=0.0)
    run(plain, base)
    run(ours, wrapped)
    assert_identical(values(ours), values(plain))
    assert_identical(wrapped.state_dict()["state"], base.state_dict()["state"])


# --- coupled: the base optimizer on loss + penalty ----------------------------------------------

COUPLED = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD-foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD-fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "SGD-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD-tensor-lr": lambda p: optim.SGD(p, lr=torch.tensor(0.1), momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam-amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=5),
    "LBFGS-wolfe": lambda p: optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
}
EACH = pytest.mark.parametrize("make", COUPLED.values(), ids=COUPLED)


@pytest.mark.covers("C12", "D1", "P37")
@EACH
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_coupled_decay_is_the_base_on_loss_plus_penalty(make, closure):
    """Coupled decay takes the same steps as autograd of the penalty (D1, D30)."""
    plain, ours = Net(), Net()
    base = make(plain.parameters())
    closure = closure or isinstance(base, optim.LBFGS)
    train(plain, base, 6, closure=closure, coef=LAMBDA)
    wrapped = FrobeniusDecay(make(ours.parameters()), ours.products(), decay=LAMBDA)
    train(ours, wrapped, 6, closure=closure)
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)  # LBFGS amplifies rounding


@pytest.mark.covers("D1")
@pytest.mark.parametrize("make", [COUPLED["SGD-nesterov"], COUPLED["Adam"]], ids=["SGD", "Adam"])
def test_coupled_decay_acts(make):
    """The decay changes the trajectory at all (D1)."""
    plain, ours = Net(), Net()
    train(plain, make(plain.parameters()))
    train(ours, FrobeniusDecay(make(ours.parameters()), ours.products(), decay=LAMBDA))
    assert not torch.allclose(ours.U, plain.U)


@pytest.mark.parametrize("fused", [False, True])
def test_maximizing_groups_still_shrink(fused):
    """With maximize=True the loss goes up and the product goes down, as with weight decay."""
    net, twin = Net(), Net()
    make = partial(optim.SGD, lr=0.1, momentum=0.9, maximize=True, fused=fused)
    wrapped = FrobeniusDecay(make(net.parameters()), net.products(), decay=LAMBDA)
    base = make(twin.parameters())
    for _ in range(3):
        train(net, wrapped, 1)
        base.zero_grad()
        (twin.loss() - twin.penalty(LAMBDA)).backward()
        base.step()
    torch.testing.assert_close(net.U, twin.U)


# --- decoupled: the formula ---------------------------------------------------------------------

DECOUPLED = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.02, weight_decay=0.0),
    "AdamW-fused": lambda p: optim.AdamW(p, lr=0.02, weight_decay=0.0, fused=True),
    "AdamW-maximize": lambda p: optim.AdamW(p, lr=0.02, weight_decay=0.0, maximize=True),
    "Adam": lambda p: optim.Adam(p, lr=0.02, decoupled_weight_decay=True),
    "NAdam": lambda p: optim.NAdam(p, lr=0.02, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, lr=0.02, decoupled_weight_decay=True),
    "Muon": lambda p: optim.Muon(p, lr=0.02, weight_decay=0.0),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.02),
}


@pytest.mark.covers("C12", "D30")
@pytest.mark.parametrize("make", DECOUPLED.values(), ids=DECOUPLED)
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_decoupled_decay_is_the_formula(make, closure):
    """P ← p + update(p) − lr·λ·∇, with ∇ of the factors before the step."""
    plain, ours = Net(), Net()
    base = make(plain.parameters())
    wrapped = FrobeniusDecay(make(ours.parameters()), ours.products(), decay=LAMBDA)
    for _ in range(4):
        found = [gradients(product) for product in plain.products()]
        train(plain, base, 1)
        with torch.no_grad():
            for product, grads in zip(plain.products(), found, strict=True):
                for param, grad in zip(product.params, grads, strict=True):
                    param -= 0.02 * LAMBDA * grad
        train(ours, wrapped, 1, closure=closure)
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.covers("C12", "D30")
def test_mode_overrides_what_the_base_does():
    """mode="decoupled" keeps the decay of Adam out of its moments (D30)."""
    net, twin = Net(), Net()
    train(net, FrobeniusDecay(optim.Adam(net.parameters()), net.products(), decay=1.0,
                              mode="decoupled"), 1)  # fmt: skip
    train(twin, optim.Adam(twin.parameters()), 1)
    expected = twin.U - 1e-3 * gradients(Net().products()[0])[0]
    torch.testing.assert_close(net.U, expected)


# --- closures -----------------------------------------------------------------------------------


@pytest.mark.covers("P37")
@pytest.mark.parametrize("make", [COUPLED["SGD"], COUPLED["LBFGS-wolfe"], DECOUPLED["AdamW"]])
@pytest.mark.parametrize(
    "kind", [lambda loss: loss, lambda loss: loss.item()], ids=["tensor", "float"]
)
def test_the_caller_gets_his_own_loss(make, kind):
    """A closure's first loss comes back unchanged, also from a line search."""
    net = Net()
    wrapped = FrobeniusDecay(make(net.parameters()), net.products(), decay=LAMBDA)
    returned = []

    def closure():
        wrapped.zero_grad()
        loss = net.loss()
        loss.backward()
        returned.append(kind(loss))
        return returned[-1]

    result = wrapped.step(closure)
    assert result is returned[0]


def test_a_base_that_reads_the_loss_reads_the_penalty():
    """Loss + ½λΣ‖W‖², the value whose gradient it gets."""

    class Reading(optim.SGD):
        """Keeps what its closure returned."""

        def step(self, closure):
            self.read = closure()

    net = Net()
    base = Reading(net.parameters(), 0.1)
    wrapped = FrobeniusDecay(base, net.products(), decay=LAMBDA, mode="coupled")
    expected = net.loss() + penalty(net.products(), LAMBDA)

    def evaluate():
        loss = net.loss()
        loss.backward()
        return loss

    wrapped.step(evaluate)
    torch.testing.assert_close(base.read, expected.detach(), check_dtype=False)


@pytest.mark.covers("P37")
def test_a_closure_may_return_nothing():
    """Lightning's closures may return None."""
    net, twin = Net(), Net()
    train(twin, FrobeniusDecay(optim.SGD(twin.parameters(), 0.1), twin.products(), decay=LAMBDA), 1)
    wrapped = FrobeniusDecay(optim.SGD(net.parameters(), 0.1), net.products(), decay=LAMBDA)
    assert wrapped.step(lambda: net.loss().backward()) is None
    assert_identical(values(net), values(twin))


class SharpnessAware(optim.SGD):
    """Evaluates twice and restores the parameters in between, as SAM does."""

    def step(self, closure):  # noqa: D102
        params = [param for group in self.param_groups for param in group["params"]]
        with torch.no_grad():
            loss = torch.enable_grad()(closure)()
            old = [param.clone() for param in params]
            for param in params:
                param.add_(param.grad, alpha=0.1)
            torch.enable_grad()(closure)()
            for param, before in zip(params, old, strict=True):
                param.copy_(before)
        super().step()
        return loss


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_base_that_restores_weights_still_decays(mode):
    """Decay through a closure survives two evaluations with a restore in between."""
    net, twin = Net(), Net()
    base = SharpnessAware(net.parameters(), lr=0.1)
    wrapped = FrobeniusDecay(base, net.products(), decay=LAMBDA, mode=mode)
    train(net, wrapped, 1, closure=True)
    coef = LAMBDA if mode == "coupled" else 0.0
    first = gradients(twin.products()[0])[0]
    train(twin, SharpnessAware(twin.parameters(), lr=0.1), 1, closure=True, coef=coef)
    expected = twin.U if mode == "coupled" else twin.U - 0.1 * LAMBDA * first
    torch.testing.assert_close(net.U, expected)


def test_one_penalty_needs_one_coefficient():
    """A line search over factors of one product with different λ is refused."""
    net = Net()
    base = SharpnessAware([{"params": net.U, "frobenius_decay": 1.0}, {"params": net.V}], lr=0.1)
    wrapped = FrobeniusDecay(base, net.products()[:1], mode="coupled")
    with pytest.raises(ValueError, match="one frobenius_decay for all factors of first"):
        train(net, wrapped, 1, closure=True)


# --- which factors decay ------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_factor_without_gradient_does_not_decay(set_to_none):
    """As for torch's weight decay: None is left alone, zero decays."""
    net = Net()
    wrapped = FrobeniusDecay(optim.SGD(net.parameters(), 0.1), net.products(), decay=LAMBDA)
    net.loss().backward()
    wrapped.zero_grad(set_to_none)
    before = values(net)
    expected = net.U.detach() - 0.1 * LAMBDA * gradients(net.products()[0])[0]
    wrapped.step()
    if set_to_none:
        assert_identical(values(net), before)
    else:
        torch.testing.assert_close(net.U.detach(), expected)


@pytest.mark.parametrize("make", [COUPLED["SGD"], DECOUPLED["AdamW"]], ids=["coupled", "decoupled"])
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_a_factor_without_gradient_does_not_move_beside_one_that_has(make, closure):
    """By no kind of decay, added at once or after a closure."""
    net = Net()
    wrapped = FrobeniusDecay(make(net.parameters()), net.products(), decay=LAMBDA)
    V, U = net.V.detach().clone(), net.U.detach().clone()

    def evaluate():
        loss = net.loss()
        loss.backward()
        net.V.grad = None
        return loss

    if closure:
        wrapped.step(evaluate)
    else:
        evaluate()
        wrapped.step()
    assert torch.equal(net.V, V)
    assert not torch.equal(net.U, U)


@pytest.mark.covers("D12")
@pytest.mark.parametrize("make", [COUPLED["SGD"], DECOUPLED["AdamW"]], ids=["coupled", "decoupled"])
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_a_frozen_factor_is_a_constant(make, closure):
    """Frozen factors never move, and their partners decay by the whole product (D12)."""
    net = Net()
    net.V.requires_grad_(False)
    wrapped = FrobeniusDecay(make(net.parameters()), net.products(), decay=LAMBDA)
    before, U = net.V.clone(), net.U.clone()
    train(net, wrapped, 2, closure=closure)
    assert torch.equal(net.V, before)
    assert net.V.grad is None
    assert not torch.equal(net.U, U)


def test_a_frozen_factor_need_not_be_in_the_optimizer():
    """Only what is trained has to be there."""
    net = Net()
    net.V.requires_grad_(False)
    trained = [param for param in net.parameters() if param.requires_grad]
    train(net, FrobeniusDecay(optim.SGD(trained, 0.1), net.products(), decay=LAMBDA))


@pytest.mark.parametrize("make", [COUPLED["SGD"], DECOUPLED["AdamW"], COUPLED["LBFGS"]])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_shared_factor_gets_the_sum(make, reverse):
    """A parameter of several products decays by all, in any order of products."""
    net, twin = Net(), Net()

    def products(net):
        found = [
            Product("first", (Factor(net, "U"), Factor(net, "V"))),
            Product("twice", (Factor(net, "U"), Factor(net, "U"))),
        ]
        return found[::-1] if reverse else found

    wrapped = FrobeniusDecay(make(net.parameters()), products(net), decay=LAMBDA)
    base = make(twin.parameters())
    coupled = not isinstance(base, optim.AdamW)
    found = [gradients(product) for product in products(twin)]

    def evaluate():
        base.zero_grad()
        loss = twin.loss() + (penalty(products(twin), LAMBDA) if coupled else 0.0)
        loss.backward()
        return loss

    base.step(evaluate)
    with torch.no_grad():
        for product, grads in zip(products(twin), found, strict=True):
            for param, grad in zip(product.params, grads, strict=True):
                param -= 0.0 if coupled else 0.02 * LAMBDA * grad
    train(net, wrapped, 1, closure=True)
    torch.testing.assert_close(net.U, twin.U)


@pytest.mark.covers("D20")
def test_a_factor_in_a_view_of_a_parameter_decays():
    """Products that look at parameters through patterns and indices reach the parameter (D20)."""
    owner = nn.Module()
    owner.packed = nn.Parameter(torch.randn(2, 4, 3, dtype=torch.float64))
    parts = tuple(Factor(owner, "packed", "t m r -> t m r", (), index) for index in (0, 1))
    product = Product("packed", parts)
    base = optim.AdamW([owner.packed], lr=0.1, weight_decay=LAMBDA)
    wrapped = FrobeniusDecay(base, product)
    owner.packed.grad = torch.zeros_like(owner.packed)
    U, V = owner.packed.detach().clone()
    wrapped.step()
    expected = torch.stack([U - 0.1 * LAMBDA * U @ V.T @ V, V - 0.1 * LAMBDA * V @ U.T @ U])
    torch.testing.assert_close(owner.packed.detach(), expected)


# --- order --------------------------------------------------------------------------------------


@pytest.mark.covers("C13")
@pytest.mark.parametrize("pieces", [1, 3])
def test_decay_acts_once_for_accumulated_gradients(pieces):
    """However many backward passes a step has, the decay is added once."""
    net, twin = Net(), Net()
    wrapped = FrobeniusDecay(optim.SGD(net.parameters(), 0.1), net.products(), decay=LAMBDA)
    for _ in range(pieces):
        (net.loss() / pieces).backward()
    wrapped.step()
    train(twin, optim.SGD(twin.parameters(), 0.1), 1, coef=LAMBDA)
    torch.testing.assert_close(net.U, twin.U)


@pytest.mark.covers("C13")
@pytest.mark.parametrize("where", ["before", "hook"])
def test_clipping_comes_before_the_decay(where):
    """Gradients clipped to nothing leave the decay whole; in a pre-hook of the wrapper as well."""
    net = Net()
    wrapped = FrobeniusDecay(optim.SGD(net.parameters(), 1.0), net.products(), decay=LAMBDA)

    def clip(*_):
        nn.utils.clip_grad_norm_(net.parameters(), 1e-12)

    expected = net.U.detach() - LAMBDA * gradients(net.products()[0])[0]
    net.loss().backward()
    clip() if where == "before" else wrapped.register_step_pre_hook(clip)
    wrapped.step()
    torch.testing.assert_close(net.U.detach(), expected)


@pytest.mark.covers("D22")
def test_all_updates_use_the_factors_before_the_step():
    """V's decay does not see U's (D20, D22: nothing is written before everything is read)."""
    net = Net()
    U, V = net.U.detach().clone(), net.V.detach().clone()
    base = optim.AdamW(net.parameters(), lr=0.5, weight_decay=0.9)
    wrapped = FrobeniusDecay(base, net.products())
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    wrapped.step()
    torch.testing.assert_close(net.U.detach(), U - 0.45 * U @ (V.T @ V))
    torch.testing.assert_close(net.V.detach(), V - 0.45 * V @ (U.T @ U))


@pytest.mark.filterwarnings("ignore:.*a step of decay is")  # of any size
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2)),
    coef=st.floats(0, 2),
    lr=st.floats(1e-3, 0.5),
    scale=st.floats(0.1, 2),
)
def test_for_plain_gradient_descent_coupled_is_decoupled(shape, coef, lr, scale):
    """Without moments, p − lr·(g + λ∇) is the same either way, for chains of any depth."""
    m, n, r, depth = shape
    found = []
    for mode in ("coupled", "decoupled"):
        generator = seeded(m * n + depth)
        shapes = [(m, r), *[(r, r)] * depth, (n, r)]
        factors = [
            nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes
        ]
        product = Product.of(*factors, scale=scale)
        wrapped = FrobeniusDecay(optim.SGD(factors, lr), product, decay=coef, mode=mode)
        product.materialize().sin().sum().backward()
        wrapped.step()
        found.append([factor.detach() for factor in factors])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# --- it is an Optimizer -------------------------------------------------------------------------

METHODS = [
    name
    for name, member in vars(optim.Optimizer).items()
    if inspect.isfunction(member) and not name.startswith("_")
]


def test_there_are_methods_to_compare():
    """The next test runs over torch's public methods."""
    assert {"step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"} <= {*METHODS}


@pytest.mark.covers("P29")
@pytest.mark.parametrize("name", METHODS)
def test_methods_have_torchs_signatures(name):
    """Whoever calls an Optimizer's methods by keyword can call ours."""
    ours = inspect.signature(getattr(FrobeniusDecay, name)).parameters.values()
    theirs = inspect.signature(getattr(optim.Optimizer, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]


@pytest.mark.covers("P29", "P32")
@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_its_objects_are_the_bases(name):
    """Also after load_state_dict, which replaces them."""
    net = Net()
    base = optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=LAMBDA)
    wrapped = FrobeniusDecay(base, net.products())
    train(net, wrapped)
    wrapped.load_state_dict(wrapped.state_dict())
    assert isinstance(wrapped, optim.Optimizer)
    assert getattr(wrapped, name) is getattr(base, name)


def test_the_repr_says_what_it_does():
    """Mode, number of products, and the base with its groups."""
    net = Net()
    wrapped = FrobeniusDecay(optim.AdamW(net.parameters()), net.products())
    text = repr(wrapped)
    assert all(part in text for part in ("auto (decoupled)", "products: 2", "AdamW", "frobenius"))


@pytest.mark.covers("P42")
@pytest.mark.parametrize("name", ["train", "eval"])
def test_train_and_eval_are_there_if_the_base_has_them(name):
    """Schedule-free bases are switched through the wrapper; others have no such switch."""
    net = Net()
    wrapped = FrobeniusDecay(optim.SGD(net.parameters(), 0.1), net.products(), decay=0.1)
    assert not hasattr(wrapped, name)
    setattr(wrapped.optimizer, name, lambda: name)
    assert getattr(wrapped, name)() == name


# --- decay that overshoots ----------------------------------------------------------------------

BASES = {
    "SGD": (lambda params, lr: torch.optim.SGD(params, lr=lr, weight_decay=1.0), True),
    "AdamW": (lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=1.0), True),
    "Adam": (lambda params, lr: torch.optim.Adam(params, lr=lr, weight_decay=1.0), False),
}


def balanced(top, scale=1.0, dtype=torch.float64):
    """A balanced pair whose largest singular value is ``top``."""
    U, V = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64))[0] for n in (7, 5))
    roots = torch.tensor([top / scale, 0.1, 0.1], dtype=torch.float64).sqrt()
    pair = [torch.nn.Parameter((factor * roots).to(dtype)) for factor in (U, V)]
    for param in pair:
        param.grad = torch.zeros_like(param)
    return Product.of(*pair, name="fc.weight", scale=scale)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_step_that_overshoots_warns_once(base, scale, lr):
    """From lr·λ·scale·σ₁ = 2, where decay makes a factor grow; only where steps have that scale."""
    make, warns = BASES[base]
    for top, stable in ((19.0 / scale, True), (21.0 / scale, False)):
        product = balanced(top, scale)
        optimizer = FrobeniusDecay(make(list(product.params), copy.deepcopy(lr)), product)
        (measured,) = measure(product, optimizer)
        assert measured.decay_step == pytest.approx(0.1 * scale * top, rel=1e-6)
        before = float(product.params[0].detach().norm())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                for param in product.params:
                    param.grad.zero_()
                optimizer.step()
        found = [str(one.message) for one in caught if "fc.weight" in str(one.message)]
        assert len(found) == (warns and not stable)
        if warns:
            assert (float(product.params[0].detach().norm()) < before) == stable


def test_a_capture_asks_nothing_of_what_is_on_its_way(monkeypatch):
    """A CUDA graph would be lost by it: a step that overshoots is told of after the capture."""
    state = {"capturing": False, "arrived": False}

    class Event:
        def query(self):
            assert not state["capturing"]
            return state["arrived"]

    send = stability.Watch._send
    monkeypatch.setattr(stability.Watch, "_send", lambda *about: (*send(*about)[:2], [Event()]))
    monkeypatch.setattr(stability, "is_capturing", lambda _: state["capturing"])
    product = balanced(21.0)
    optimizer = FrobeniusDecay(torch.optim.AdamW(product.params, lr=0.1, weight_decay=1.0), product)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        state.update(capturing=True, arrived=True)
        optimizer.step()
    state["capturing"] = False
    with pytest.warns(UserWarning, match="fc.weight: a step of decay"):
        optimizer.step()


def test_a_norm_that_is_large_for_many_small_values_is_no_warning():
    """Where the bound says 2 or more, the largest eigenvalue decides."""
    product = Product.of(*(torch.nn.Parameter(torch.eye(30, 25)) for _ in range(2)))
    for param in product.params:
        param.grad = torch.zeros_like(param)
    optimizer = FrobeniusDecay(torch.optim.SGD(product.params, lr=0.1, weight_decay=1.0), product)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert measure(product, optimizer)["product"].decay_step < 0.2
    assert "decay_step" in str(measure(product, optimizer))
    assert "decay_step" not in str(measure(product))


@pytest.mark.parametrize("product", [True, False])
def test_what_decoupled_decay_takes_of_a_singular_value(product):
    """Of the product in proportion to σ², of both factors with λ/2 in proportion to σ."""
    layer = nn.Linear(7, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(5)
    factorize(layer, rank=3)
    before, lr, coef = torch.linalg.svdvals(layer.weight.detach())[:3], 0.01, 0.1
    for param in layer.parameters():
        param.grad = torch.zeros_like(param)
    if product:
        optimizer = FrobeniusDecay(optim.AdamW(layer.parameters(), lr=lr), layer, decay=coef)
        kept = (1 - lr * coef * before) ** 2
    else:
        optimizer = optim.AdamW(layer.parameters(), lr=lr, weight_decay=coef / 2)
        kept = (1 - lr * coef / 2) ** 2
        assert abs(kept - (1 - lr * coef)) < (lr * coef) ** 2
    optimizer.step()
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight.detach())[:3], kept * before)
