"""Norm, gradient and dense form of products: against float64 autograd on the dense product."""

import copy
import dataclasses
import itertools
import pickle
import string
from functools import partial

import pytest
import torch
from cases import PRODUCTS, Sizes, bare, seeded
from closeness import TOLERANCE, close, exact, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frobdecay import FrobeniusDecay, balance_
from frobdecay.algebra.network import cp
from frobdecay.algebra.shifted import Shifted
from frobdecay.diagnostics import measure
from frobdecay.gradient.penalty import add_penalty_grad_
from frobdecay.product import find
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product, penalty, product_norm, squared_norm

sizes = st.integers(1, 8)
ALL = pytest.mark.parametrize("make", PRODUCTS.values(), ids=PRODUCTS)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


@st.composite
def chains(draw):
    """A float64 product of 2 to 5 factors with any shapes, batch and scale."""
    inner, batch = draw(st.integers(0, 3)), draw(st.lists(st.integers(1, 3), max_size=2))
    bonds = draw(st.lists(sizes, min_size=inner + 1, max_size=inner + 1))
    m, n, seed = draw(sizes), draw(sizes), draw(st.integers(0, 1000))
    generator = seeded(seed)
    pairs = list(itertools.pairwise(bonds))
    shapes = [(m, bonds[0]), *pairs, (n, bonds[-1])]
    tensors = [
        nn.Parameter(torch.randn(*batch, *shape, dtype=torch.float64, generator=generator))
        for shape in shapes
    ]
    return Product.of(*tensors, scale=draw(st.sampled_from([1.0, 0.25, 2.0])))


@pytest.mark.covers("C11")
@ALL
@DTYPES
def test_value_equals_the_dense_norm(make, dtype):
    """½‖W‖² from Grams is that of the dense product, whatever the dtype."""
    product = make(dtype)
    value, _ = exact(product)
    assert close(0.5 * squared_norm(product), value, TOLERANCE[dtype])
    assert close(product_norm(product).square(), 2 * value, TOLERANCE[dtype])


@ALL
@DTYPES
def test_penalty_gradient_agrees_with_autograd(make, dtype):
    """``gradients`` sums to autograd's gradient of the dense penalty, parameter by parameter."""
    product = make(dtype)
    _, expected = exact(product)
    summed: dict[int, torch.Tensor] = {}
    for param, gradient in zip(product.params, gradients(product), strict=True):
        summed[id(param)] = summed.get(id(param), 0) + gradient
    for param, gradient in zip(product.params, expected, strict=True):
        assert close(summed[id(param)], gradient, TOLERANCE[dtype])


@pytest.mark.covers("C11")
@given(chains())
def test_gradients_agree_with_autograd(product):
    """The property in general: any chain, batch and scale, in float64 to 1e-10."""
    value, expected = exact(product)
    assert close(0.5 * squared_norm(product), value, 1e-10)
    for gradient, autograd in zip(gradients(product), expected, strict=True):
        assert close(gradient, autograd, 1e-10)


@pytest.mark.covers("C11")
@given(chains())
def test_euler_identity(product):
    """⟨C, ∇_C ½‖W‖²⟩ = ‖W‖² for every factor: W is linear in each."""
    for param, gradient in zip(product.params, gradients(product), strict=True):
        assert close((param * gradient).sum(), squared_norm(product), 1e-10)


@pytest.mark.covers("C26")
@given(chains(), st.integers(0, 1000))
def test_value_does_not_depend_on_the_gauge(product, seed):
    """U → UA, V → VA⁻ᵀ changes the factors and not ‖W‖ (T5); factor decay does change."""
    first, *inner, last = product.params
    if inner:
        return
    r = first.shape[-1]
    generator = seeded(seed)
    A = torch.randn(r, r, dtype=torch.float64, generator=generator) + 4 * torch.eye(r)
    moved = Product.of(first @ A, last @ torch.linalg.inv(A).mT, scale=product.scale)
    assert close(product_norm(moved), product_norm(product), 1e-8)


@pytest.mark.covers("C11")
@given(chains())
def test_a_batch_is_the_sum_of_its_products(product):
    """Leading axes keep products apart: ‖W‖² is the sum over them."""
    flat = [p.reshape(-1, *p.shape[-2:]) for p in product.params]
    heads = [Product.of(*one, scale=product.scale) for one in zip(*flat, strict=True)]
    total = sum(squared_norm(head) for head in heads)
    assert close(total, squared_norm(product), 1e-10)


@given(chains(), st.integers(1, 3))
def test_zero_columns_change_nothing(product, more):
    """Padding the rank with zeros leaves norm and gradient as they are."""
    first, *inner, last = product.params
    if inner:
        return
    pad = nn.functional.pad
    padded = Product.of(pad(first, (0, more)), pad(last, (0, more)), scale=product.scale)
    for gradient, wide in zip(gradients(product), gradients(padded), strict=True):
        assert close(wide[..., : gradient.shape[-1]], gradient, 1e-10)


@pytest.mark.covers("P9")
def test_penalty_is_twice_differentiable():
    """Second derivatives agree with finite differences (gradgradcheck)."""
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (4, 2))]

    def value(*factors):
        return penalty(Product.of(*factors), 0.3)

    assert torch.autograd.gradcheck(value, tensors)
    assert torch.autograd.gradgradcheck(value, tensors)


@pytest.mark.covers("C12", "P9")
def test_penalty_backward_is_the_gradient():
    """``penalty(...).backward()`` gives coef times ``gradients``, over several products."""
    products = [PRODUCTS["pair"](torch.float64), PRODUCTS["deep"](torch.float64)]
    penalty(products, 0.2).backward()
    for product in products:
        for param, gradient in zip(product.params, gradients(product), strict=True):
            assert close(param.grad, 0.2 * gradient, 1e-10)


def kronecker(first, other, dtype):
    """A product that is no chain."""
    tensors = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in (first, other)]
    return Product.of(*tensors, equation="ab,cd->acbd")


def test_small_products_of_one_shape_are_multiplied_together():
    """Their number adds no matrix product; the value and all gradients are those of a loop."""
    float32, float64 = torch.float32, torch.float64
    kinds = [
        (bare((6, 2), (5, 2)), float32),
        (bare((6, 2), (5, 2), scale=3.0), float32),
        (bare((6, 2), (5, 2)), float64),
        (bare((2, 6, 2), (2, 5, 2)), float32),
        (bare((6, 5), (7, 5)), float32),  # through W
        (partial(kronecker, (6, 2), (5, 3)), float32),
    ]
    counts = []
    for count in (2, 4):
        found = [make(dtype) for make, dtype in kinds * count]
        with Counting() as counting:
            value = penalty(found, 0.2)
        counts.append(counting.products)
        assert close(value, 0.1 * sum(squared_norm(product) for product in found), 1e-5)
        value.backward()
        for product in found:
            for param, gradient in zip(product.params, gradients(product), strict=True):
                assert close(param.grad, 0.2 * gradient, 1e-5)
    assert counts[0] == counts[1] > 0


class Counting(TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator."""
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
        return func(*args, **kwargs or {})


def test_half_precision_accumulates_in_float32():
    """A sum of squares beyond float16's largest number is finite, also under autocast."""
    product = bare((2048, 4), (2048, 4))(torch.float16)
    expected, _ = exact(product)
    assert float(expected) > 65504
    assert close(0.5 * squared_norm(product), expected, 1e-5)
    wide = bare((64, 4), (64, 4))(torch.float32)
    plain = squared_norm(wide)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert torch.equal(squared_norm(wide), plain)


ARRANGED = {
    "a pattern": (),
    "W₀": (torch.float64,),
    "W₀ in half precision": (torch.bfloat16,),
}


@pytest.mark.parametrize("dtypes", ARRANGED.values(), ids=ARRANGED)
def test_transforms_of_torch_func_go_through_the_penalty(dtypes):
    """Factors seen through a pattern, and beside a W₀, against the dense product."""
    U, V = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((6, 2), (2, 5)))
    base = [torch.randn(6, 5).to(dtype) for dtype in dtypes]
    structure = Shifted((0.5,)) if base else None

    def ours(u, v):
        patterns = [None] * len(base) + [None, "r n -> n r"]
        return penalty(Product.of(*base, u, v, patterns=patterns, structure=structure), 0.3)

    def exact(u, v):
        return 0.15 * ((base[0].double() + 0.5 * u @ v) if base else u @ v).square().sum()

    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(U[0], V[0]),
        lambda f: torch.func.vmap(torch.func.grad(f, (0, 1)))(U, V),
        lambda f: torch.func.jacrev(torch.func.grad(f, (0, 1)), (0, 1))(U[0], V[0]),
    ):
        torch.testing.assert_close(transform(ours), transform(exact))


def test_no_tensor_of_the_dense_shape_is_allocated_at_low_rank():
    """Value and gradient of a pair 3000×2000 at rank 2 form no m×n matrix."""
    product = bare((3000, 2), (2000, 2))(torch.float32)
    with Sizes() as sizes:
        gradients(product)
        penalty(product, 0.1).backward()
    assert max(sizes.seen) <= 6000


@pytest.mark.parametrize("inner", [(), ((39, 38),)], ids=["pair", "deep"])
def test_the_dense_route_is_taken_where_it_is_cheaper(inner):
    """Near full rank W is formed, and no Gram is, for the value and for the gradients."""
    last = inner[-1][1] if inner else 39
    product = bare((40, 39), *inner, (44, last))(torch.float32)
    for run in (squared_norm, gradients):
        with Sizes() as sizes:
            run(product)
        assert 40 * 44 in sizes.seen
        assert not {39 * 39, last * last} & {*sizes.seen}
    with Sizes() as sizes:
        squared_norm(bare((40, 9), (44, 9))(torch.float32))
    assert 9 * 9 in sizes.seen
    assert 40 * 44 not in sizes.seen


def test_factors_are_looked_up_anew():
    """A swapped Parameter object is seen by the same product."""
    owner = nn.Module()
    owner.U, owner.V = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(8, 1))
    product = Product("w", (Factor(owner, "U"), Factor(owner, "V")))
    assert product_norm(product).item() == pytest.approx(4)
    owner.U = nn.Parameter(torch.full((2, 1), 2.0))
    assert product_norm(product).item() == pytest.approx(8)
    assert product.params[0] is owner.U


def test_products_copy_and_pickle():
    """Deepcopy and pickle keep the value and let go of the original's parameters."""
    product = PRODUCTS["packed heads"](torch.float32)
    for twin in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert torch.equal(product_norm(twin), product_norm(product))
        assert twin.params[0] is not product.params[0]
        assert twin.params[0] is twin.params[1]


def test_shape_and_rank_are_those_of_the_dense_product():
    """``shape`` is that of ``materialize``; ``rank`` the smallest inner size."""
    for name, make in PRODUCTS.items():
        product = make(torch.float32)
        assert tuple(product.materialize().shape) == product.shape, name
    assert PRODUCTS["deep, two inner"](torch.float32).rank == 2


def test_a_pattern_that_copies_is_refused():
    """What is added to a copy of a gradient would be lost: so the pattern is refused."""
    U, V = torch.randn(12, 5), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match=r"to be a view.*keep axes apart"):
        Product.of(U, V, patterns=["(g q d) e -> g (q e) d", None], axes={"g": 2, "q": 2, "d": 3})


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ((torch.ones(3, 2),), ValueError, "two factors or more"),
        ((torch.ones(3, 2), torch.ones(3, 4)), ValueError, "r is 2 in factor 0 and 4 in"),
        ((torch.ones(3, 2), torch.ones(2, 3), torch.ones(5, 2)), ValueError, "s is 3 in factor 1"),
        (
            (torch.ones(2, 3, 2), torch.ones(3, 3, 2)),
            ValueError,
            "behind 1 batch axes, but batch axis 0 is 2",
        ),
        ((torch.ones(3), torch.ones(3, 2)), ValueError, "a matrix"),
        ((torch.ones(3, 2).int(), torch.ones(3, 2)), TypeError, "floating-point"),
        ((torch.ones(3, 2).to(torch.cfloat), torch.ones(3, 2)), TypeError, "floating-point"),
        ((torch.ones(3, 2).to_sparse(), torch.ones(3, 2)), TypeError, "dense real"),
        ((torch.ones(3, 2), torch.ones(3, 2, device="meta")), ValueError, "one device"),
        (([[1.0]], torch.ones(3, 2)), TypeError, "to be a tensor"),
    ],
)
def test_wrong_factors_are_refused(tensors, error, message):
    """Factors that make no product are refused, and the message names the product."""
    with pytest.raises(error, match=rf"layer\.weight.*{message}"):
        Product.of(*tensors, name="layer.weight")


@pytest.mark.parametrize(
    ("coef", "error"),
    [(-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError)],
)
def test_wrong_coefficients_are_refused(coef, error):
    """λ has to be a finite number of at least 0."""
    with pytest.raises(error, match="expected coef"):
        penalty(PRODUCTS["pair"](torch.float32), coef)


def test_no_products_are_refused():
    """A penalty of nothing is a mistake, and so is one of tensors."""
    with pytest.raises(ValueError, match="factorize the model first"):
        penalty([], 0.1)
    with pytest.raises(TypeError, match=r"Product\.of"):
        penalty([torch.ones(2, 2)], 0.1)


def test_coefficient_may_be_a_tensor():
    """λ as a tensor gives the same value, and a gradient of its own."""
    product = PRODUCTS["pair"](torch.float64)
    coef = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = penalty(product, coef)
    assert close(value, penalty(product, 0.3).detach(), 1e-12)
    value.backward()
    assert close(coef.grad, 0.5 * squared_norm(product).detach(), 1e-12)


def test_the_rank_is_the_smallest_bond():
    """Of a batch, too, and of a chain whose bonds differ."""
    assert Product.of(torch.ones(2, 9, 3), torch.ones(2, 7, 3), batch=1).rank == 3
    assert Product.of(torch.ones(9, 4), torch.ones(4, 3), torch.ones(7, 3)).rank == 3


ROWS = 2**17


@pytest.mark.parametrize("backend", ["reference", "per_product", "bucketed"])
@pytest.mark.parametrize(
    "shapes", [[(ROWS, 3), (8, 3)], [(ROWS, 3), (2, 3)], [(2, ROWS, 1), (2, 8, 1)]]
)
def test_sums_over_many_rows_keep_their_digits(shapes, backend):
    """Of long factors, in float32: norm, penalty and gradients, by Grams and by the product."""
    torch.set_num_threads(1)  # the fixture of all tests takes it back
    U, V = (nn.Parameter(0.1 * torch.randn(shape)) for shape in shapes)
    product = Product.of(U, V)
    u, v = (factor.detach().double() for factor in (U, V))
    expected = u @ (v.mT @ v), v @ (u.mT @ u)
    square = (expected[0] * u).sum()
    assert close(product_norm(product), square.sqrt(), 1e-6)
    assert close(penalty(product, 1.0), square / 2, 1e-6)
    for grads in (torch.autograd.grad(penalty(product, 1.0), (U, V)), _added(product, backend)):
        for grad, gradient in zip(grads, expected, strict=True):
            assert close(grad, gradient, 2e-6)


def _added(product, backend):
    for param in product.params:
        param.grad = torch.zeros_like(param)
    add_penalty_grad_(product, 1.0, backend=backend)
    return [param.grad for param in product.params]


# --- any einsum is a product --------------------------------------------------------------------

EQUATIONS = {
    "kronecker": ("ab,cd->acbd", [(3, 2), (2, 4)]),
    "tensor ring": ("aij,bjk,cki->abc", [(3, 2, 3), (4, 3, 2), (2, 2, 2)]),
    "block terms": ("kxy,kax,kby->ab", [(2, 2, 3), (2, 5, 2), (2, 4, 3)]),
    "entry by entry": ("ar,br,as,bs->ab", [(5, 2), (4, 2), (5, 3), (4, 3)]),
}


@pytest.mark.parametrize("case", EQUATIONS)
def test_any_einsum_decays_and_is_measured(case):
    """Found by a provider, stepped by the optimizer along the dense penalty, and measured."""
    equation, shapes = EQUATIONS[case]

    class Layer(nn.Module):
        """Holds the factors."""

        def __init__(self):
            super().__init__()
            self.factors = nn.ParameterList([torch.randn(s).double() for s in shapes])

    def provider(module, name):
        yield Product.of(*module.factors, name=f"{name}.weight", equation=equation)

    layer = Layer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find, "_USERS", {})
        find.register_products(Layer)(provider)
        (product,) = find.products(nn.Sequential(layer))
    assert product.name == "0.weight"
    optimizer = FrobeniusDecay(torch.optim.SGD(layer.parameters(), lr=0.1), [product], decay=0.01)
    _, expected = exact(product)
    before = [param.detach().clone() for param in product.params]
    for param in product.params:
        param.grad = torch.zeros_like(param)
    measured = measure(product, optimizer)["0.weight"]
    optimizer.step()
    for param, was, gradient in zip(product.params, before, expected, strict=True):
        assert close(was - param.detach(), 0.1 * 0.01 * gradient, 1e-8)
    assert measured.decay_step > 0
    assert measured.shape == product.shape
    twin = pickle.loads(pickle.dumps(product))
    assert close(product_norm(twin), product_norm(product), 1e-12)
    with pytest.raises(ValueError, match=r"0\.weight: expected a chain .* whose balance is not"):
        balance_(product)


def test_an_equation_that_is_a_chain_is_a_chain():
    """Whatever way the factors are stored: it balances, and is the product it was."""
    U, V = torch.randn(2, 6, 3), torch.randn(2, 3, 5)
    product = Product.of(U, V, equation="hmr,hrn->hmn")
    assert (product.batch, product.structure.equation) == (1, "mr,nr->mn")
    before = U @ V
    assert close(product.materialize(), before, 1e-6)
    balance_(product)
    assert close(U @ V, before, 1e-5)
    assert close(U.mT @ U, V @ V.mT, 1e-5)


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("mr,nr", "expected an equation with the letters"),
        ("mr,nr->mz", "expected every letter of the output in a factor, got z"),
        ("mr,nr,r->mn", "expected 3 factors of 'mr,nr,r->mn'"),
        ("rm,nr->mn", "r is 6 in factor 0 and 2 in factor 1"),
    ],
)
def test_equations_that_do_not_fit_are_refused(equation, message):
    """The message names the product."""
    with pytest.raises(ValueError, match=rf"layer\.weight: .*{message}"):
        Product.of(torch.ones(6, 2), torch.ones(5, 2), name="layer.weight", equation=equation)


def test_factors_of_a_module_combine_by_an_equation():
    """The record takes what ``Product.of`` takes, with factors that are looked up in modules."""
    left, right = nn.Linear(2, 3, bias=False), nn.Linear(5, 4, bias=False)
    factors = Factor(left, "weight"), Factor(right, "weight")
    product = Product("layer.weight", factors, equation="ab,cd->acbd")
    twin = Product.of(left.weight, right.weight, equation="ab, cd ->\n\tacbd")
    assert product.structure == twin.structure
    assert dataclasses.replace(product, scale=2.0).structure == product.structure
    with pytest.raises(ValueError, match=r"layer\.weight: expected an equation with the letters"):
        Product("layer.weight", factors, equation="ab,cd")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"equation": 3}, TypeError, "expected an equation such as 'mr,nr->mn', got 3"),
        ({"equation": ["mr", "nr"]}, TypeError, r"expected an equation .* got \['mr', 'nr'\]"),
        (
            {"structure": "mr,nr->mn"},
            TypeError,
            "expected a structure, got 'mr,nr->mn'",
        ),
        ({"equation": "mr,nr->mn", "structure": cp(2)}, ValueError, "got both"),
        ({"equation": "mr->rm"}, ValueError, r"expected 1 factors of 'mr->rm', got \[\(6, 2\)"),
        ({"equation": "mr,rs,ns->mn"}, ValueError, "expected 3 factors of 'mr,rs,ns->mn'"),
        ({"equation": "mr,nr->mn", "batch": -1}, ValueError, "expected batch .* got -1"),
        ({"equation": "mr,nr->mn", "batch": "1"}, ValueError, "expected batch .* got '1'"),
        ({"batch": 11}, ValueError, "expected batch .* at most 9, got 11"),
        ({"scale": float("nan")}, ValueError, "expected scale to be a finite number, got nan"),
        ({"scale": "2"}, ValueError, "expected scale to be a finite number, got '2'"),
    ],
)
def test_how_factors_combine_is_said_once_and_well(given, error, message):
    """The message names the product and what was given."""
    with pytest.raises(error, match=rf"layer\.weight: .*{message}"):
        Product.of(torch.ones(6, 2), torch.ones(5, 2), name="layer.weight", **given)


def test_an_equation_may_be_longer_than_a_chain():
    """Of 26 factors, with every letter that there is."""
    letters = string.ascii_letters
    for terms, output in (
        ([letters[k : k + 2] for k in range(0, 52, 2)], letters),
        ([letters[k : k + 2] for k in range(25)], "az"),
    ):
        tensors = [torch.full((1, 1), 1.25) for _ in terms]
        product = Product.of(*tensors, equation=f"{','.join(terms)}->{output}")
        assert close(product_norm(product), torch.tensor(1.25 ** len(terms)), 1e-5)


def test_autocast_does_not_reach_the_dense_product():
    """It is in the factors' dtype, with its digits."""
    product = Product.of(torch.randn(64, 33), torch.randn(64, 33))
    expected = product.materialize()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert close(product.materialize(), expected, 1e-6)
