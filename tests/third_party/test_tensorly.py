"""tensorly: the same decompositions have the same errors, and its factors are products here."""

import pytest
import torch

tensorly = pytest.importorskip("tensorly")

from tensorly.cp_tensor import cp_to_tensor  # noqa: E402
from tensorly.decomposition import parafac, partial_tucker, tensor_train, tucker  # noqa: E402
from tensorly.tt_tensor import tt_to_tensor  # noqa: E402
from tensorly.tucker_tensor import tucker_to_tensor  # noqa: E402
from torch import nn  # noqa: E402

from frobdecay import FrobeniusDecay, products  # noqa: E402
from frobdecay.algebra import network  # noqa: E402
from frobdecay.algebra.decompositions import cp_als, hooi, hosvd, tt_svd  # noqa: E402
from frobdecay.algebra.tensorize import tucker_ranks  # noqa: E402
from frobdecay.product import find  # noqa: E402
from frobdecay.product.factor import Factor  # noqa: E402
from frobdecay.product.product import Product, product_norm  # noqa: E402

pytestmark = pytest.mark.integration(row="tensorly", column="decompositions")


@pytest.fixture(autouse=True)
def _torch_backend():
    """Have tensorly use torch tensors, for one test."""
    before = tensorly.get_backend()
    tensorly.set_backend("pytorch")
    yield
    tensorly.set_backend(before)


def flat():
    """Gaussian: the flattest spectrum."""
    return torch.randn(32, 16, 9, dtype=torch.float64)


def decaying():
    """Singular values that fall off along every mode, as of trained weights."""
    weight = torch.randn(24, 20, 12, dtype=torch.float64)
    for mode, n in enumerate(weight.shape):
        shape = [1, 1, 1]
        shape[mode] = n
        weight = weight * torch.arange(1.0, n + 1).pow(-1.0).reshape(shape)
    return weight


def order_four():
    """A convolution's kernel as it is."""
    return torch.randn(12, 10, 3, 3, dtype=torch.float64)


TENSORS = {"flat": flat, "decaying": decaying, "order four": order_four}
ALL = pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)


def error(tensor, formed):
    """‖W − Ŵ‖_F / ‖W‖_F."""
    return float((tensor - formed).norm() / tensor.norm())


def ranks(tensor):
    """A third of each mode."""
    return tucker_ranks(1 / 3, tensor.shape)


@ALL
def test_hosvd(make):
    """Truncated HOSVD: the error of tensorly's starting point, to 1e-6."""
    tensor = make()
    theirs = tucker(tensor, ranks(tensor), n_iter_max=0, init="svd")
    ours = Product.of(
        *hosvd(tensor, ranks(tensor)), structure=network.tucker(tensor.ndim)
    ).materialize()
    assert error(tensor, ours) == pytest.approx(error(tensor, tucker_to_tensor(theirs)), rel=1e-6)


@ALL
def test_hooi(make):
    """Higher-order orthogonal iteration: tensorly's error at convergence, within 1 %."""
    tensor = make()
    theirs = tucker(tensor, ranks(tensor), n_iter_max=100, init="svd", tol=1e-6)
    ours = Product.of(
        *hooi(tensor, ranks(tensor)), structure=network.tucker(tensor.ndim)
    ).materialize()
    assert error(tensor, ours) <= 1.01 * error(tensor, tucker_to_tensor(theirs))


def test_tucker_2():
    """Two modes factored, the others whole: tensorly's partial_tucker."""
    tensor = order_four()
    (core, factors), _ = partial_tucker(tensor, (4, 3), modes=[0, 1], init="svd", tol=1e-6)
    theirs = torch.einsum("abxy,oa,ib->oixy", core, *factors)
    ours = Product.of(
        *hooi(tensor, (4, 3, 3, 3)), structure=network.tucker(4, (2, 3))
    ).materialize()
    assert error(tensor, ours) == pytest.approx(error(tensor, theirs), rel=0.01)


@ALL
def test_tensor_train(make):
    """TT-SVD: the same tensor, however the bonds are split."""
    tensor = make()
    bonds = tuple(min(4, n) for n in tensor.shape[1:])
    theirs = tt_to_tensor(tensor_train(tensor, [1, *bonds, 1]))
    ours = Product.of(*tt_svd(tensor, bonds), batch=0).materialize()
    assert error(theirs, ours) < 1e-8


@pytest.mark.parametrize(
    ("make", "rank"), [(flat, 3), (flat, 8), (decaying, 3), (decaying, 8), (order_four, 3)]
)
def test_cp(make, rank):
    """Alternating least squares from the same start, as many sweeps: within 1 %."""
    tensor = make()
    theirs = cp_to_tensor(parafac(tensor, rank, n_iter_max=50, init="svd", tol=0))
    with pytest.warns(RuntimeWarning, match="did not converge in 50 sweeps"):
        factors = cp_als(tensor, rank, sweeps=50, tolerance=-1.0)
    ours = Product.of(*factors, structure=network.cp(len(factors))).materialize()
    assert error(tensor, ours) == pytest.approx(error(tensor, theirs), rel=0.01)


@pytest.mark.parametrize("kind", ["tucker", "cp"])
def test_the_norm_of_their_tensors(kind):
    """Factors that tensorly made are a product: its norm is that of the tensor they form."""
    tensor = flat()
    if kind == "cp":
        found = parafac(tensor, 3, n_iter_max=5, init="svd", normalize_factors=False)
        factors, formed = found.factors, cp_to_tensor(found)
    else:
        core, others = found = tucker(tensor, ranks(tensor), n_iter_max=2, init="svd")
        factors, formed = (core, *others), tucker_to_tensor(found)
    structure = getattr(network, kind)(tensor.ndim)
    norm = product_norm(Product.of(*factors, structure=structure))
    assert float(norm) == pytest.approx(float(formed.norm()), rel=1e-10)


# --- tensorly-torch: its layers are products ------------------------------------------------------


def in_cp(weight, name):
    """Terms with weights: those are a mode of length 1."""
    count = len(weight.factors)
    factors = [Factor(weight.factors, f"factor_{k}") for k in range(count)]
    terms = Factor(weight, "weights", "r -> 1 r")
    return Product(name, (terms, *factors), structure=network.cp(count + 1))


def in_tucker(weight, name):
    """The core, then the factors."""
    factors = [Factor(weight.factors, f"factor_{k}") for k in range(len(weight.factors))]
    return Product(name, (Factor(weight, "core"), *factors), structure=network.tucker(len(factors)))


def in_train(weight, name):
    """Cores (r, n, r'), as a chain sees them."""
    inner = ["r n s -> n r s"] * (len(weight.factors) - 2)
    patterns = ["() n r -> n r", *inner, "r n () -> n r"]
    cores = [Factor(weight.factors, f"factor_{k}", p) for k, p in enumerate(patterns)]
    return Product(name, tuple(cores), batch=0)


@pytest.mark.integration(row="tensorly-torch", column="Frobenius decay")
@pytest.mark.parametrize(
    ("factorization", "kind", "make"),
    [
        ("cp", "CPTensor", in_cp),
        ("tucker", "TuckerTensor", in_tucker),
        ("tt", "TTTensor", in_train),
    ],
)
def test_layers_of_tensorly_torch(factorization, kind, make, monkeypatch):
    """A provider of one line: products, norm and decay are those of the weight the layer forms."""
    tltorch = pytest.importorskip("tltorch")
    monkeypatch.setattr(find, "_USERS", dict(find._USERS))
    find.register_products(getattr(tltorch, kind))(lambda module, name: [make(module, name)])
    layer = tltorch.FactorizedConv.from_conv(
        nn.Conv2d(8, 12, 3), rank=0.5, factorization=factorization, implementation="reconstructed"
    )
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3)).double()
    model(torch.randn(2, 8, 3, 3, dtype=torch.float64)).square().sum().backward()
    (product,) = products(model)
    dense = layer.weight.to_tensor()
    assert float(product_norm(product).detach()) == pytest.approx(float(dense.norm().detach()))
    wanted = torch.autograd.grad(0.5 * dense.square().sum(), product.params)
    before = [param.detach().clone() for param in product.params]
    for param in product.params:
        param.grad.zero_()
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    FrobeniusDecay(base, model).step()
    for param, old, gradient in zip(product.params, before, wanted, strict=True):
        assert torch.allclose(old - param, 1e-3 * gradient, rtol=1e-6, atol=1e-12)
