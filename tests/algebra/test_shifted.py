"""W = W₀ + Σ s U Vᵀ: against autograd on the dense sum, in float64; what is never formed."""

import pytest
import torch
from closeness import TOLERANCE, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import frobdecay
from frobdecay.algebra import shifted
from frobdecay.algebra.shifted import Shifted
from frobdecay.product.product import Product, penalty, squared_norm

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def random(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """A random parameter."""
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64).to(dtype))


def shifted_product(
    m: int = 9,
    n: int = 7,
    ranks: tuple[int, ...] = (2, 3),
    scales: tuple[float, ...] = (0.5, 2.0),
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    base: torch.dtype | None = None,
) -> Product:
    """A product with a pair of random factors for each rank."""
    pairs = [random(*batch, size, r, dtype=dtype) for r in ranks for size in (m, n)]
    first = random(*batch, m, n, dtype=base or dtype)
    return Product.of(first, *pairs, structure=Shifted(scales), batch=len(batch))


def exact(product: Product) -> tuple[Tensor, list[Tensor]]:
    """‖W‖² and the gradients of ½‖W‖² in float64, by autograd through the dense sum."""
    base, *pairs = (p.detach().double().requires_grad_() for p in product.params)
    dense = product.scale * base
    for scale, u, v in zip(product.structure.scales, pairs[::2], pairs[1::2], strict=True):
        dense = dense + product.scale * scale * u @ v.mT
    value = dense.square().sum()
    return value.detach(), list(torch.autograd.grad(0.5 * value, [base, *pairs]))


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal up to a relative error in norm."""
    return bool((found.double() - expected).norm() <= tolerance * (expected.norm() + 1e-30))


@st.composite
def products(draw):
    """Any shapes, ranks, scales and batch."""
    size = st.integers(1, 8)
    ranks = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    scales = tuple(draw(st.sampled_from([0.0, 0.25, 1.0, -3.0])) for _ in ranks)
    torch.manual_seed(draw(st.integers(0, 1000)))
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    return shifted_product(draw(size), draw(size), ranks, scales, batch)


@given(products())
def test_value_and_gradients_are_those_of_the_dense_sum(product):
    """Norm and gradients of all factors, W₀ included, equal autograd's."""
    value, expected = exact(product)
    assert close(squared_norm(product), value, 1e-10)
    for found, gradient in zip(gradients(product), expected, strict=True):
        assert found.shape == gradient.shape
        assert (found - gradient).norm() <= 1e-10 * (1 + gradient.norm())


@given(products())
def test_euler_identity(product):
    """⟨W₀, ∇⟩ + ⟨U, ∇_U⟩ = ‖W‖², and U and V of a pair share ⟨W, s U Vᵀ⟩: one pair at a time."""
    value = squared_norm(product)
    inner = [
        (p * g).sum().detach() for p, g in zip(product.params, gradients(product), strict=True)
    ]
    assert torch.allclose(inner[0] + sum(inner[1::2]), value, rtol=1e-9)
    for left, right in zip(inner[1::2], inner[2::2], strict=True):
        assert abs(left - right) <= 1e-9 * (1 + value)


@given(products())
def test_the_penalty_is_differentiable(product):
    """Autograd of ``penalty`` gives what ``gradients`` computes."""
    found = torch.autograd.grad(penalty(product, 1.0), product.params)
    for mine, other in zip(gradients(product), found, strict=True):
        assert (mine - other).norm() <= 1e-9 * (1 + other.norm())


@pytest.mark.parametrize("base", [torch.float64, torch.bfloat16], ids=["same", "cast in blocks"])
def test_the_penalty_is_twice_differentiable(base, monkeypatch):
    """Second derivatives of the factors are those of the dense sum."""
    monkeypatch.setattr(shifted, "BLOCK", 10)
    product = shifted_product(ranks=(2,), scales=(0.5,), base=base)
    frozen = product.params[0].requires_grad_(False)

    def ours(u: Tensor, v: Tensor) -> Tensor:
        return penalty(Product.of(frozen, u, v, structure=Shifted((0.5,))), 1.0)

    assert torch.autograd.gradgradcheck(ours, product.params[1:])


@DTYPES
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_every_mixture_of_dtypes(dtype, base, monkeypatch):
    """W₀ and adapters may differ in dtype; sums are float32 or better, block by block."""
    monkeypatch.setattr(shifted, "BLOCK", 16)
    product = shifted_product(dtype=dtype, base=base)
    value, expected = exact(product)
    found = squared_norm(product)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert close(found, value, 1e-5)
    for gradient, other in zip(gradients(product), expected, strict=True):
        assert close(gradient, other, 1e-5)


def test_a_large_half_precision_base_is_summed_in_float32(monkeypatch):
    """The norms of its rows are, too: bfloat16 would leave three digits of each."""
    monkeypatch.setattr("frobdecay.algebra.scaling.LONG", 16)
    monkeypatch.setattr("frobdecay.algebra.scaling.ROW", 5)
    product = shifted_product(dtype=torch.float32, base=torch.bfloat16)
    with torch.no_grad():
        product.params[0].fill_(1)
    assert close(squared_norm(product), exact(product)[0], 1e-6)


class Fresh(TorchDispatchMode):
    """Notes the sizes of all tensors with memory of their own."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.sizes = known.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the function and note its results."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.sizes.append(tensor.numel())
        return out


@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrix", "experts"])
def test_half_precision_is_never_cast_as_a_whole(batch, monkeypatch):
    """No more than a block, or one of several matrices, is copied; nor is W formed."""
    monkeypatch.setattr(shifted, "BLOCK", 64)
    product = shifted_product(32, 16, (2,), (1.0,), batch, dtype=torch.float32, base=torch.bfloat16)
    base = product.params[0].requires_grad_(False)
    with Fresh(base) as fresh:
        product.structure.gradients(product.views(), product.batch, [None, 1.0, 1.0])
        penalty(product, 1.0).backward()
    assert fresh.sizes
    assert max(fresh.sizes) <= (512 if batch else 64)  # 64 = U, and a block


def test_only_what_is_wanted_is_computed():
    """Gradients are None where they are not wanted."""
    product = shifted_product()
    coefs = [None, None, 2.0, 1.0, None]
    found = product.structure.gradients(product.views(), 0, coefs)
    _, expected = exact(product)
    assert [gradient is None for gradient in found] == [coef is None for coef in coefs]
    assert close(found[2], 2 * expected[2], 1e-10)
    assert close(found[3], expected[3], 1e-10)


def test_the_dense_sum_is_materialized():
    """``materialize`` forms W₀ + Σ s U Vᵀ; shape is W₀'s, the rank is what is added to it."""
    product = shifted_product()
    base, u, v, p, q = product.params
    assert torch.allclose(product.materialize(), base + 0.5 * u @ v.T + 2 * p @ q.T)
    assert product.shape == (9, 7)
    assert product.rank == 5


WRONG = {
    "no pair": ([(4, 3)], ()),
    "half a pair": ([(4, 3), (4, 2)], (1.0,)),
    "more pairs than scales": ([(4, 3), (4, 2), (3, 2), (4, 2), (3, 2)], (1.0,)),
    "V not tall": ([(4, 3), (4, 2), (2, 3)], (1.0,)),
    "another base weight": ([(5, 3), (4, 2), (3, 2)], (1.0,)),
    "two ranks": ([(4, 3), (4, 2), (3, 1)], (1.0,)),
    "a vector": ([(4, 3), (4,), (3, 1)], (1.0,)),
}


@pytest.mark.parametrize(("shapes", "scales"), WRONG.values(), ids=WRONG)
def test_factors_that_do_not_fit_are_refused(shapes, scales):
    """The error names the product."""
    with pytest.raises(ValueError, match="lora"):
        Product.of(*(random(*s) for s in shapes), name="lora", structure=Shifted(scales))


def make_optimizer(product: Product, base: str, **options) -> frobdecay.FrobeniusDecay:
    """A wrapped optimizer over the parameters that are trained."""
    trained = [param for param in product.params if param.requires_grad]
    kind = getattr(torch.optim, base)
    return frobdecay.FrobeniusDecay(kind(trained, weight_decay=0.1, **options), product)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_wrapper_decays_the_sum(frozen):
    """One step of SGD with zero gradients is −lr·λ·∇; a frozen W₀ is in no group and stays."""
    product = shifted_product()
    product.params[0].requires_grad_(not frozen)
    before = [param.detach().clone() for param in product.params]
    _, expected = exact(product)
    optimizer = make_optimizer(product, "SGD", lr=0.5)
    for param in product.params:
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    for k, param in enumerate(product.params):
        moved = 0 if frozen and k == 0 else 0.5 * 0.1 * expected[k]
        assert torch.allclose(param, before[k] - moved, rtol=1e-12, atol=1e-12)


@pytest.mark.covers("P1")
def test_it_decays_to_zero():
    """A pair of full rank takes the sum to zero, away from W₀: the prior is W = 0."""
    product = shifted_product(6, 4, (4,), (1.0,))
    product.params[0].requires_grad_(False)
    for param in product.params[1:]:  # well conditioned: how long it takes depends on that
        param.data = torch.linalg.qr(param.data).Q
    optimizer = make_optimizer(product, "SGD", lr=0.5)
    start = squared_norm(product)
    for _ in range(400):
        for param in product.params[1:]:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert squared_norm(product) < 1e-6 * start


@pytest.mark.parametrize("swap", [True, False], ids=["other memory", "in place"])
def test_nothing_of_the_base_is_kept(swap):
    """A W₀ that changes between two steps is the new one in the second."""
    product = shifted_product()
    product.params[0].requires_grad_(False)
    optimizer = make_optimizer(product, "SGD", lr=0.5)
    for param in product.params[1:]:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    base = product.params[0].data
    if swap:
        product.params[0].data = 3 * base
    else:
        base.mul_(3)
    before = [param.detach().clone() for param in product.params]
    _, expected = exact(product)
    for param in product.params[1:]:
        param.grad.zero_()
    optimizer.step()
    for param, old, gradient in zip(product.params[1:], before[1:], expected[1:], strict=True):
        assert torch.allclose(param, old - 0.5 * 0.1 * gradient, rtol=1e-12, atol=1e-12)


def test_it_is_measured():
    """Norm and effective step are those of the sum, the rank is that of the adapters."""
    product = shifted_product()
    (measured,) = frobdecay.diagnostics.measure(product, lr=0.1)
    value, _ = exact(product)
    assert measured.norm == pytest.approx(value.sqrt().item())
    assert measured.effective_step == pytest.approx(0.1 / value.item())
    assert measured.rank == 5


def test_backends_say_how_they_run_it():
    """Several of one shape together, one alone by itself."""
    assert frobdecay.explain(shifted_product()).startswith("per_product")
    text = frobdecay.explain([shifted_product() for _ in range(3)])
    assert text.startswith("bucketed")
    assert "3 of shifted" in text


def test_it_cannot_be_balanced():
    """Balance is for chains."""
    with pytest.raises((ValueError, TypeError), match="shifted"):
        frobdecay.balance_([shifted_product()])
