"""What tests of the lazily materialized weight share: makers, equality with the dense twin."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from frobdecay.algebra.reading import Matricization
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.forms.cost import force
from frobdecay.weights.product_tensor import ProductTensor


class Factored(nn.Module):
    """The least parametrization that returns a FactoredTensor."""

    def __init__(self, rank=4, pattern=None, depth=0, **axes):
        super().__init__()
        self.rank, self.pattern, self.depth, self.axes = rank, pattern, depth, axes

    def right_inverse(self, W):
        """Factors by the singular value decomposition."""
        default = {2: "o i -> o i", 4: "o i kh kw -> (o kh) (i kw)"}
        view = Matricization.of(self.pattern or default[W.ndim], tuple(W.shape), self.axes)
        self.view = view
        P, s, Q = torch.linalg.svd(view.matrix(W.detach()), full_matrices=False)
        root = s[..., None, : self.rank].sqrt()
        U = (P[..., : self.rank] * root).contiguous()
        V = (Q[..., : self.rank, :].mT * root).contiguous()
        eye = torch.eye(U.shape[-1], dtype=W.dtype).expand(*view.batch, -1, -1)
        return U, *(eye.clone() for _ in range(self.depth)), V

    def forward(self, *factors):
        """The weight, lazily."""
        return FactoredTensor(factors, self.view)


def factored(module, name="weight", **options):
    """The module with one of its parameters factored."""
    parametrize.register_parametrization(module, name, Factored(**options), unsafe=True)
    return module


def weight(pattern, shape, rank=2, depth=0, dtype=torch.float64, **axes):
    """A factored weight of random leaf factors."""
    view = Matricization.of(pattern, tuple(shape), axes)
    *batch, m, n = view.matrix_shape
    sides = [(m, rank), *[(rank, rank)] * depth, (n, rank)]
    return FactoredTensor(
        [torch.randn(*batch, *s, dtype=dtype, requires_grad=True) for s in sides], view
    )


def dense_of(W):
    """The dense twin, computed here from the factors."""
    U, *inner, V = W.factors
    for M in inner:
        U = U @ M
    return W.matricization.tensor(U @ V.mT).contiguous()


def leaf(*shape, dtype=torch.float64):
    """A random tensor that gets a gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def tensors(value):
    """Tensors in a value, factored ones multiplied out."""
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return [dense_of(value) if isinstance(value, ProductTensor) else value]


def forbidden(self):
    """In place of materialize."""
    raise AssertionError("the dense weight was formed")


def assert_equal_dense(call, W, *inputs, allowed=False, rtol=1e-8, atol=1e-9):
    """``call`` gives the same value and gradients with the factors as with the dense weight."""
    wanted = [t for t in (*W.factors, *inputs) if t.requires_grad]
    results = []
    for twin in (W, dense_of(W)):
        with pytest.MonkeyPatch.context() as patch, force(True):
            if twin is W and not allowed:
                patch.setattr(ProductTensor, "materialize", forbidden)
            outs = tensors(call(twin, *inputs))
        torch.manual_seed(1)
        seeds = [torch.randn(o.shape, dtype=o.dtype) for o in outs]
        grads = torch.autograd.grad(outs, wanted, seeds, allow_unused=True)
        grads = [
            torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)
        ]
        results.append((outs, grads))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert a.is_contiguous() >= b.is_contiguous(), "a view of the output would fail"
    for mine, theirs in zip(*results, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def network(dtype=torch.float32):
    """A linear and a convolutional layer, factored."""
    return nn.Sequential(
        factored(nn.Conv2d(3, 8, 3, padding=1, dtype=dtype), rank=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        factored(nn.Linear(32, 5, dtype=dtype), rank=2, depth=1),
    )


def gradients_of(model, output):
    """The output's sum and its gradient for every parameter."""
    grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    return [output, *grads]


def assert_same(ours, theirs, **tolerance):
    """Two lists of tensors are close."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
