"""A step bounded in the product: the inequality, what is left alone, and what is refused."""

import copy
from math import prod

import numpy as np
import pytest
import torch
from cases import PRODUCTS, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import Net, assert_identical, train, values
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

import frobdecay
from frobdecay import Factor, FrobeniusDecay, Product, Spectron
from frobdecay.algebra.sharpness import norms_above
from frobdecay.algebra.shifted import Shifted
from frobdecay.gradient import accumulate
from frobdecay.gradient.backends import BACKENDS
from frobdecay.optim.rates import BOUND
from frobdecay.optim.spectral.spectron import orthogonalizers

CHAINS = [
    name
    for name, make in PRODUCTS.items()
    if make(torch.float64).structure.is_chain and "train" not in name and name != "symmetric"
]
OTHERS = [name for name in PRODUCTS if name not in CHAINS]

BASES = {
    "sgd": lambda params: optim.SGD(params, lr=0.5, momentum=0.9),
    "adamw": lambda params: optim.AdamW(params, lr=0.5, weight_decay=0),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.5),
    "adafactor": lambda params: optim.Adafactor(params, lr=0.5),
    "maximize": lambda params: optim.Adam(params, lr=0.5, maximize=True),
}


def parameters(product):
    """Each once."""
    return list({id(p): p for p in product.params}.values())


def pull(product, seed=0):
    """Random gradients."""
    generator = seeded(seed)
    for param in parameters(product):
        if param.requires_grad:
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = noise.to(param.dtype)


def spectral_norm(dense, product):
    """‖·‖₂ of each matrix of the batch, the largest."""
    rows = product.views()[0].ndim - 1
    batch = dense.shape[: product.batch]
    matrix = dense.reshape(*batch, prod(dense.shape[product.batch : rows]), -1)
    return torch.linalg.matrix_norm(matrix.detach().double(), 2).max().item()


def moved(product, optimizer, seed=0):
    """‖ΔW‖₂ of a step with random gradients."""
    before = product.materialize().detach().clone()
    pull(product, seed)
    optimizer.step()
    return spectral_norm(product.materialize() - before, product)


# --- the inequality -------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", CHAINS)
def test_no_step_moves_the_product_further_than_the_bound(name, base):
    """In float64 to 1e-6, with decay and momentum, for every kind of chain."""
    torch.manual_seed(0)
    product = PRODUCTS[name](torch.float64)
    optimizer = FrobeniusDecay(BASES[base](parameters(product)), product, decay=1e-3, bound=0.3)
    sizes = [moved(product, optimizer, seed) for seed in range(4)]
    assert 0.01 * 0.15 < max(sizes) <= 0.15 * (1 + 1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(0, 2),
    st.sampled_from([torch.float64, torch.float32]),
    st.floats(1e-4, 1e4),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
def test_the_bound_holds_for_any_shape_and_size(m, n, r, depth, dtype, size, bound, seed):
    """Factors and steps of any size, chains of two to four."""
    generator = seeded(seed)
    shapes = [(m, r), *[(r, r)] * depth, (n, r)]
    tensors = [
        nn.Parameter((size ** (k / 4) * torch.randn(s, generator=generator)).to(dtype))
        for k, s in enumerate(shapes)
    ]
    product = Product.of(*tensors)
    optimizer = FrobeniusDecay(optim.SGD(tensors, lr=0.1), product, decay=0.0, bound=bound)
    far = moved(product, optimizer, seed)
    total = prod(spectral_norm(t, Product.of(t, t)) for t in tensors)
    rounding = 20 * torch.finfo(dtype).eps * total
    assert far <= 0.1 * bound * (1 + 1e-6) + rounding


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_step_is_as_long_as_the_bound_allows(scale):
    """Rank one: the norms are exact, and of steps along the factors the inequality is one, too."""
    U, V = (nn.Parameter(torch.ones(n, 1, dtype=torch.float64)) for n in (4, 9))
    product = Product.of(U, V, scale=scale)
    optimizer = FrobeniusDecay(optim.SGD([U, V], lr=0.5), product, decay=0.0, bound=0.2)
    before = product.materialize().detach().clone()
    for factor in (U, V):
        factor.grad = -100 * factor.detach()
    optimizer.step()
    step = torch.linalg.matrix_norm(product.materialize() - before, 2).item()
    assert step == pytest.approx(0.5 * 0.2, rel=1e-9)


def test_heads_are_bounded_one_by_one():
    """A head with a small step keeps it, beside one whose step is cut."""
    U, V = (nn.Parameter(torch.randn(2, n, 3, dtype=torch.float64)) for n in (7, 5))
    other = [copy.deepcopy(t) for t in (U, V)]
    for tensors, bound in (((U, V), 1.0), (other, None)):
        product = Product.of(*tensors)
        optimizer = FrobeniusDecay(optim.SGD(tensors, lr=0.1), product, decay=0.0, bound=bound)
        for t in tensors:
            t.grad = torch.ones_like(t) * torch.tensor([1e-3, 1e3]).double()[:, None, None]
        optimizer.step()
    assert torch.equal(U[0], other[0][0])
    assert not torch.allclose(U[1], other[0][1])


def test_a_frozen_factor_bounds_what_moves():
    """‖ΔU‖‖V‖ is all there is: V with equal singular values is a bound that is reached."""
    U = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    V = nn.Parameter(2 * torch.eye(5, 3, dtype=torch.float64), requires_grad=False)
    product = Product.of(U, V)
    optimizer = FrobeniusDecay(optim.SGD([U], lr=1.0), product, decay=0.0, bound=0.1)
    U.grad = torch.ones_like(U)
    before = U.detach().clone()
    optimizer.step()
    assert torch.linalg.matrix_norm(2 * (U.detach() - before), 2).item() == pytest.approx(0.1)
    assert torch.equal(V, 2 * torch.eye(5, 3, dtype=torch.float64))


def test_of_an_adapter_the_weight_beside_it_counts_for_nothing():
    """LoRA's s·BA: B is zero at first, and so is ‖B‖."""
    B = nn.Parameter(torch.zeros(8, 2, dtype=torch.float64))
    A = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
    product = Product.of(B, A, scale=4.0, patterns=[None, "r n -> n r"])
    optimizer = FrobeniusDecay(optim.AdamW([B, A], lr=0.1), product, bound=0.5)
    sizes = [moved(product, optimizer, seed) for seed in range(3)]
    assert 0.01 < max(sizes) <= 0.05 * (1 + 1e-6)


BALANCED = {
    "bound": lambda product: FrobeniusDecay(
        optim.SGD(product.params, lr=0.3, momentum=0.9), product, decay=0.1, bound=0.5
    ),
    "Spectron": lambda product: Spectron(product, lr=0.3),
}


@pytest.mark.parametrize("name", BALANCED)
def test_a_turn_of_balanced_factors_changes_nothing(name):
    """U Q, V Q are the same product: so it stays under an optimizer that turns with them."""
    generator = seeded(0)
    U, V = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (9, 7))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    goal, found = torch.randn(9, 7, generator=generator, dtype=torch.float64), []
    for pair in ((U, V), (U @ turn, V @ turn)):
        product = Product.of(*map(nn.Parameter, pair))
        optimizer = BALANCED[name](product)
        for _ in range(10):
            optimizer.zero_grad()
            (product.materialize() - goal).square().sum().backward()
            optimizer.step()
        found.append(product.materialize())
    torch.testing.assert_close(*found)


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 11, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_are_never_below(r, dtype):
    """And 5 % above at most: random, orthogonal, decaying, few large ones, zero."""
    generator = seeded(r)
    X = torch.randn(5, 80, r, generator=generator, dtype=torch.float64)
    X[1] = torch.linalg.qr(X[1])[0]
    X[2] *= torch.linspace(0, 1, r) ** 3
    X[3, :, r // 4 + 1 :] *= 1e-3
    X[4] = 0
    X = X.to(dtype)
    exact = torch.linalg.matrix_norm(X.double(), 2)
    found = norms_above(X.mT @ X).double()
    assert (found >= exact * (1 - 4 * r * torch.finfo(dtype).eps)).all()
    assert (found <= exact * 1.05).all()


@pytest.mark.parametrize(
    ("rows", "orthogonalized", "least", "most"),
    [
        (768, False, 1.03, 1.05),
        (3072, False, 1.05, 1.07),
        (768, True, 1.09, 1.12),
        (3072, True, 1.1, 1.12),
    ],
)
def test_norms_are_as_near_as_the_page_says(rows, orthogonalized, least, most):
    """Of random factors of rank 192, and of what Spectron makes of them."""
    X = torch.randn(3, rows, 192, generator=seeded(0), dtype=torch.float64)
    X = X @ orthogonalizers(X.mT @ X, steps=5) if orthogonalized else X
    excess = norms_above(X.mT @ X) / torch.linalg.matrix_norm(X, 2)
    assert (excess > least).all()
    assert (excess < most).all()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e19, 1e30, 1e38])
def test_norms_of_any_size(size):
    """In float32; infinite where the Gram is, no number where a factor has none."""
    found = norms_above(torch.eye(4) * size)
    assert found.item() == pytest.approx(size**0.5, rel=1e-3)
    large = 1e25 * torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert norms_above(large.mT @ large) == torch.inf
    assert norms_above((large * torch.nan).mT @ large).isnan()
    assert norms_above(torch.zeros(3, 3)) == 0


def test_the_bound_is_near_along_a_training():
    """σ₁ of every factor to 2 %, at every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24))
    frobdecay.factorize(model, rank=8)
    optimizer = FrobeniusDecay(optim.AdamW(model.parameters(), lr=3e-3), model, bound=2.0)
    x = torch.randn(64, 24)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        for param in (p for product in optimizer.products for p in product.params):
            near = norms_above(param.detach().mT @ param.detach())
            assert 1 - 1e-6 <= near / torch.linalg.matrix_norm(param.detach(), 2) <= 1.02


# --- what it leaves alone -------------------------------------------------------------------------


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_step_within_the_bound_is_the_same_bit_for_bit(base, closure):
    """With a bound that nothing reaches, with decay, all is as without."""
    nets = Net(), Net()
    for net, bound in zip(nets, (None, 1e9), strict=True):
        optimizer = FrobeniusDecay(
            BASES[base](net.parameters()), net.products(), decay=0.1, bound=bound
        )
        train(net, optimizer, closure=closure)
    assert_identical(values(nets[0]), values(nets[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_checkpoint_resumes_bit_for_bit(dtype):
    """Nothing is kept from step to step but what a plain wrapper keeps; β travels in the groups."""

    def make(net, bound):
        return FrobeniusDecay(
            optim.AdamW(net.parameters(), lr=0.05), net.products(), decay=0.1, bound=bound
        )

    net = Net(dtype)
    optimizer = make(net, 0.7)
    train(net, optimizer, 3)
    again = Net(dtype)
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    resumed = make(again, 99.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group.get(BOUND) for group in resumed.param_groups] == [None, 0.7]
    assert_identical(values(train(net, optimizer, 3)), values(train(again, resumed, 3)))


def test_a_checkpoint_without_a_bound_leaves_the_bound():
    """Of the base before it was wrapped, or of a wrapper without a bound."""
    net = Net()
    base = optim.AdamW(net.parameters(), lr=0.05)
    plain = base.state_dict()
    optimizer = FrobeniusDecay(base, net.products(), bound=0.7)
    unbounded = FrobeniusDecay(optim.AdamW(net.parameters()), net.products()).state_dict()
    for state in (plain, unbounded):
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[-1][BOUND] == 0.7
    assert BOUND not in unbounded["param_groups"][-1]


def test_the_bound_is_an_option_of_the_group():
    """In units of lr, scheduled with it; written to a group of its own; none where it is None."""
    torch.manual_seed(0)
    product = PRODUCTS["pair"](torch.float64)
    other, late = PRODUCTS["tucker"](torch.float64), PRODUCTS["rank one"](torch.float64)
    for param in late.params:
        param.requires_grad_(False)
    groups = [{"params": product.params}, {"params": other.params, BOUND: None}]
    optimizer = FrobeniusDecay(
        optim.AdamW(groups, lr=0.5), [product, other, late], decay=0.0, bound=0.3
    )
    assert [group[BOUND] for group in optimizer.param_groups] == [0.3, None]
    optimizer.add_param_group({"params": late.params})
    assert optimizer.param_groups[2][BOUND] == 0.3
    optimizer.param_groups[0].update({"lr": 0.05, BOUND: 0.2})
    assert 1e-3 < moved(product, optimizer) <= 0.05 * 0.2 * (1 + 1e-6)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    assert moved(product, optimizer) == 0


def test_groups_of_one_product_give_the_smaller_bound():
    """U's group allows less than V's."""
    product = PRODUCTS["pair"](torch.float64)
    groups = [{"params": [product.params[0]], "lr": 1e-2}, {"params": [product.params[1]]}]
    optimizer = FrobeniusDecay(optim.SGD(groups, lr=torch.tensor(1.0)), product, decay=0, bound=0.1)
    assert moved(product, optimizer) <= 1e-3 * (1 + 1e-6)


def test_autocast_does_not_reach_the_norms():
    """In float16 the eighth power of many equal values is 0, and no step would be too long."""
    device = torch.get_default_device().type
    tensors = [
        nn.Parameter(torch.linalg.qr(torch.randn(n, 192, generator=seeded(n)))[0])
        for n in (200, 256)
    ]
    product = Product.of(*tensors)
    for make, within in (
        (lambda: FrobeniusDecay(optim.SGD(tensors, lr=1.0), product, decay=0, bound=0.01), 0.01),
        (lambda: Spectron(product, lr=0.01), 0.0125),
    ):
        optimizer = make()
        with torch.autocast(device, dtype=torch.float16):
            assert moved(product, optimizer) <= within * (1 + 1e-5)


def test_other_parameters_in_the_places_of_the_factors_are_bounded():
    """As Accelerate and FSDP2 put them into modules and groups."""
    net = Net()
    optimizer = FrobeniusDecay(
        optim.SGD(net.parameters(), lr=0.1), net.products(), decay=0.1, bound=0.1
    )
    train(net, optimizer, 1)
    swapped = {p: nn.Parameter(p.detach().clone()) for p in net.parameters()}
    for name, param in list(net.named_parameters()):
        setattr(net, name, swapped[param])
    for group in optimizer.param_groups:
        group["params"] = [swapped[param] for param in group["params"]]
    net.zero_grad()
    before = [product.materialize().detach().clone() for product in net.products()]
    (100 * net.loss()).backward()
    optimizer.step()
    for product, dense in zip(net.products(), before, strict=True):
        far = spectral_norm(product.materialize() - dense, product)
        assert 0 < far <= 0.01 * (1 + 1e-6)


def test_a_factor_that_was_frozen_with_a_gradient_is_bounded():
    """Its gradient of zeros lets momentum move it on."""
    product = PRODUCTS["pair"](torch.float64)
    base = optim.SGD(product.params, lr=1.0, momentum=0.9)
    optimizer = FrobeniusDecay(base, product, decay=0, bound=1e-3)
    assert moved(product, optimizer) <= 1e-3 * (1 + 1e-6)
    product.params[0].requires_grad_(False)
    optimizer.zero_grad(set_to_none=False)
    before = product.materialize().detach().clone()
    optimizer.step()
    far = spectral_norm(product.materialize() - before, product)
    assert 0 < far <= 1e-3 * (1 + 1e-6)


def test_half_precision_moves_in_expectation():
    """A step far below the resolution of bf16 is rounded stochastically, not lost."""
    torch.manual_seed(0)
    tensors = [nn.Parameter((1 + torch.rand(64, 8)).bfloat16()) for _ in range(2)]
    product = Product.of(*tensors)
    optimizer = FrobeniusDecay(optim.SGD(tensors, lr=1.0), product, decay=0.0, bound=0.5)
    before = [t.detach().double() for t in tensors]
    for _ in range(50):
        for t in tensors:
            t.grad = torch.ones_like(t)
        optimizer.step()
    after = [t.detach().double() for t in tensors]
    far = torch.linalg.matrix_norm(after[0] @ after[1].T - before[0] @ before[1].T, 2).item()
    assert 0.8 * 25 < far < 1.2 * 25  # of steps in one direction, with an inequality that is tight


@pytest.mark.parametrize("size", [10.0**k for k in [*range(13), 18, 19, 20, 25, 37]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["pair", "deep", "adapter"])
def test_a_step_that_explodes_is_bounded(kind, dtype, size):
    """However large a finite gradient is, W is where it was but for the bound and rounding."""
    generator = seeded(0)
    shapes = [(32, 4), *[(4, 4)] * (kind == "deep"), (32, 4)]
    tensors = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    if kind == "adapter":
        nn.init.zeros_(tensors[0])
    product = Product.of(*tensors)
    optimizer = FrobeniusDecay(optim.SGD(tensors, lr=1.0), product, decay=0, bound=0.01)
    before = [t.detach().double() for t in tensors]
    for t in tensors:
        t.grad = (size * torch.randn(t.shape, generator=generator)).to(dtype)
    optimizer.step()
    after = [t.detach().double() for t in tensors]
    total = prod(torch.linalg.matrix_norm(t, 2).item() for t in before)
    far = torch.linalg.matrix_norm(chained(after) - chained(before), 2).item()
    slack = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert far <= 0.01 * (1 + 1e-4) + slack * total
    if dtype == torch.float32 and size <= 1e12 and kind != "deep":  # whose products overflow
        assert far > 1e-4


def chained(factors):
    """U M … Vᵀ."""
    *left, last = factors
    return torch.linalg.multi_dot([*left, last.T])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_no_number_goes_where_the_base_would_have_put_it(bad):
    """It is not hidden by leaving the step out; others, and later steps, do not have it."""
    net = Net()
    optimizer = FrobeniusDecay(
        optim.SGD(net.parameters(), lr=0.1), net.products(), bound=0.5, decay=0
    )
    net.loss().backward()
    net.U.grad[0, 0] = bad
    optimizer.step()
    assert (~net.U.isfinite() if bad == torch.inf else net.U.isnan()).any()
    assert net.V.isfinite().all()
    assert not any(p.isnan().any() for p in (net.P, net.Q, *net.others()))


# --- one engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["bucketed", "per_product"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_grams_are_formed_once(backend, base, monkeypatch):
    """Beside the decay's, which the norms of the factors read, only those of the steps."""
    formed = []
    original = accumulate.grams_of
    monkeypatch.setattr(accumulate, "grams_of", lambda v: formed.append(len(v)) or original(v))
    net = Net()
    optimizer = FrobeniusDecay(
        BASES[base](net.parameters()), net.products(), decay=0.1, bound=0.5, backend=backend
    )
    train(net, optimizer, 2)
    assert formed == [0, 4, 0, 4]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_backends_agree(backend):
    """Whoever forms the Grams."""
    net, other = Net(), Net()
    for one, name in ((net, backend), (other, "reference")):
        base = optim.AdamW(one.parameters(), lr=0.1)
        train(one, FrobeniusDecay(base, one.products(), decay=0.1, bound=0.5, backend=name))
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


class _NeverReads(TorchDispatchMode):
    """Refuses what makes the host wait for a number of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert "linalg_eigh" not in str(func)
        return func(*args, **(kwargs or {}))


def test_the_host_reads_no_number():
    """Of a step after the first, which looks at the size of the decay."""
    net = Net()
    optimizer = FrobeniusDecay(
        optim.SGD(net.parameters(), lr=0.1), net.products(), decay=0.1, bound=0.5
    )
    train(net, optimizer, 4)
    net.loss().backward()
    with _NeverReads():
        optimizer.step()


# --- what cannot be bounded -----------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), torch.tensor(0.0)])
def test_bounds_that_are_none(bound):
    """At construction and, of a schedule, at the step; nothing has changed then."""
    net = Net()
    base = optim.AdamW(net.parameters(), lr=0.1)
    groups = copy.deepcopy(base.state_dict()["param_groups"])
    with pytest.raises(ValueError, match="bound"):
        FrobeniusDecay(base, net.products(), bound=bound)
    assert_identical(base.state_dict()["param_groups"], groups)
    optimizer = FrobeniusDecay(base, net.products(), bound=1.0)
    train(net, optimizer, 1)
    before = values(net)
    optimizer.param_groups[1][BOUND] = bound
    with pytest.raises(ValueError, match="step_bound of param group 1"):
        train(net, optimizer, 1)
    assert_identical(values(net), before)
    with pytest.raises(TypeError, match="bound"):
        FrobeniusDecay(optim.SGD(Net().parameters()), Net().products(), decay=0, bound="1")


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf"), torch.tensor(-1.0)])
def test_a_learning_rate_that_bounds_nothing_is_refused_at_the_step(lr):
    """Before the base has taken it, which most take as it is."""
    net = Net()
    optimizer = FrobeniusDecay(
        optim.AdamW(net.parameters(), lr=0.1), net.products(), decay=0.1, bound=1
    )
    before = values(net)
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(ValueError, match="lr of param group 1 with step_bound"):
        train(net, optimizer, 1)
    assert_identical(values(net), before)


def test_learning_rates_of_numpy_bound():
    """As a schedule may bring them, of an array in float32."""
    net, other = Net(), Net()
    for each, lr in ((net, np.float32(0.5)), (other, 0.5)):
        optimizer = FrobeniusDecay(
            optim.SGD(each.parameters(), lr=0.1), each.products(), decay=0, bound=0.5
        )
        optimizer.param_groups[0]["lr"] = lr
        train(each, optimizer, 1)
    assert_identical(values(net), values(other))


@pytest.mark.parametrize("change", [{"lr": None}, {"differentiable": True}], ids=str)
def test_groups_that_cannot_be_bounded_are_refused_at_the_step(change):
    """Also without decay; nothing has moved then."""
    net = Net()
    optimizer = FrobeniusDecay(
        optim.SGD(net.parameters(), lr=0.1), net.products(), decay=0, bound=1
    )
    before = values(net)
    optimizer.param_groups[0].update(change)
    with pytest.raises(
        ValueError, match=r"differentiable=False in param group 0 with step_bound=1"
    ):
        train(net, optimizer, 1)
    assert_identical(values(net), before)


@pytest.mark.parametrize("name", OTHERS)
def test_products_that_are_no_matrix_are_refused(name):
    """By name, with the reason, before anything has changed."""
    product = PRODUCTS[name](torch.float64)
    base = optim.AdamW(parameters(product), lr=0.1)
    with pytest.raises(ValueError, match=r"expected a (chain of matrices|parameter that is a)"):
        FrobeniusDecay(base, product, bound=1.0)
    assert BOUND not in base.param_groups[0]
    assert frobdecay.optim.rates.DECAY not in base.param_groups[0]


def test_a_product_that_is_nothing_is_refused():
    """At construction: no step of its factors would be too long."""
    U, V = (nn.Parameter(torch.randn(n, 2)) for n in (3, 4))
    with pytest.raises(ValueError, match=r"nothing: .*its scale is 0"):
        FrobeniusDecay(
            optim.SGD([U, V], lr=0.1), Product.of(U, V, name="nothing", scale=0.0), decay=0, bound=1
        )


def test_a_factor_of_two_products_is_refused():
    """One step cannot have two sizes."""
    U, V, W = (nn.Parameter(torch.randn(n, 2)) for n in (3, 4, 5))
    pairs = [Product.of(U, V, name="one"), Product.of(W, V, name="other")]
    with pytest.raises(ValueError, match=r"other .*also a factor of 'one'"):
        FrobeniusDecay(optim.AdamW([U, V, W]), pairs, bound=1.0)


@pytest.mark.parametrize("kind", ["full", "toward"])
def test_a_weight_beside_the_factors_is_the_reason(kind):
    """What is added, or decayed toward, is refused by what it is, with what to do."""
    U, V, W = (nn.Parameter(torch.randn(size)) for size in ((3, 2), (4, 2), (3, 4)))
    if kind == "full":
        product = Product.of(W.detach(), U, V, structure=Shifted((2.0,)))
    else:
        net = nn.Sequential(nn.Linear(4, 3))
        frobdecay.factorize(net, rank=2)
        (product,) = frobdecay.products(net, toward="initial")
    with pytest.raises(ValueError, match=r"weight beside its factors; list it without .*bound="):
        FrobeniusDecay(optim.AdamW(parameters(product)), product, decay=0.1, bound=1.0)
    with pytest.raises(ValueError, match=r"weight beside .*leave it to another optimizer"):
        Spectron(product)


@pytest.mark.parametrize("turned", [False, True])
def test_a_part_of_another_products_factor_is_refused(turned):
    """Whichever of the two comes first."""
    held = nn.ParameterDict({n: torch.randn(m, 2) for n, m in {"W": 6, "U": 3, "V": 4}.items()})
    first = Factor(held, "W", "(n o) r -> n o r", (("n", 3),), index=0)
    pairs = [
        Product("part", (first, Factor(held, "U"))),
        Product("whole", (Factor(held, "W"), Factor(held, "V"))),
    ]
    with pytest.raises(ValueError, match=r"also a factor of '(part|whole)'"):
        Spectron(pairs[::-1] if turned else pairs)


@pytest.mark.parametrize("base", [optim.LBFGS, optim.ASGD])
def test_optimizers_that_remember_their_own_steps_are_refused(base):
    """They would go on from where they did not get."""
    net = Net()
    with pytest.raises(ValueError, match=r"expected bound=None for (LBFGS|ASGD)"):
        FrobeniusDecay(base(net.parameters()), net.products(), decay=0.1, bound=1.0)
