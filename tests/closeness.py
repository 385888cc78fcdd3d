"""What the tests compare with: the dense product in float64, and how close is equal."""

import torch
from cases import seeded

from frobdecay.algebra.precision import common_dtype, full_precision
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product

# Relative error allowed for sums of a few thousand products; by dtype of the factors.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def exact(product: Product) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The penalty's value and gradients in float64, by autograd through the dense product."""
    wide = {id(p): p.detach().double().requires_grad_() for p in product.params}
    factors = tuple(
        Factor(_Owner(wide[id(f.param)]), "tensor", f.pattern, f.axes, f.index)
        for f in product.factors
    )
    twin = Product(product.name, factors, product.scale, product.batch, product.structure)
    value = 0.5 * twin.materialize().square().sum()
    found = torch.autograd.grad(value, list(wide.values()))
    by_id = dict(zip(wide, found, strict=True))
    return value.detach(), [by_id[id(p)] for p in product.params]


def gradients(product: Product) -> tuple[torch.Tensor, ...]:
    """The gradient of ½‖W‖_F² for every parameter of a product, by its structure's formula.

    Returns:
        Tensors of the parameters' shapes and dtypes (float32 for half-precision parameters).
    """
    coefs = [product.scale**2] * len(product.factors)
    with torch.no_grad(), full_precision(product.params[0].device.type):
        grads = product.structure.gradients(product.views(), product.batch, coefs)
    out = []
    for factor, grad in zip(product.factors, grads, strict=True):
        assert grad is not None
        param = factor.param  # with its strides, of which the pattern may make a view
        dtype = common_dtype([param])
        full = grad.new_empty_strided(param.shape, param.stride(), dtype=dtype).zero_()
        factor.view(full).copy_(grad)  # through the view: no inverse of the pattern is needed
        out.append(full)
    return tuple(out)


class _Owner:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Equal up to a relative error in norm."""
    return bool((found.double() - expected).norm() <= tolerance * (expected.norm() + 1e-30))


def normal(shape, seed=0):
    """Float64 numbers."""
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))
