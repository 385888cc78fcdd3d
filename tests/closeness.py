"""What the tests compare with: the dense product in float64, and how close is equal."""

import torch
from cases import seeded

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


class _Owner:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Equal up to a relative error in norm."""
    return bool((found.double() - expected).norm() <= tolerance * (expected.norm() + 1e-30))


def normal(shape, seed=0):
    """Float64 numbers."""
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))
