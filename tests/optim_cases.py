"""A model small enough to train hundreds of times, and the optimizers that are wrapped."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec

import torch
from cases import seeded
from torch import Tensor, nn
from torch.optim import Optimizer

from frobdecay.product.factor import Factor
from frobdecay.product.product import Product, penalty

Make = Callable[[Iterable], Optimizer]


def torch_table() -> tuple[list, Callable]:
    """Torch's table of optimizers and the function that lists an entry's samples.

    Empty where expecttest is missing, which torch's module imports.
    """
    if find_spec("expecttest") is None:
        return [], list
    flag = "__allow_nonbracketed_mutation_flag"
    before = getattr(torch.backends, flag)
    table = importlib.import_module("torch.testing._internal.common_optimizers")
    setattr(torch.backends, flag, before)  # the import forbids to set flags such as allow_tf32
    return table.optim_db, table._get_optim_inputs_including_global_cliquey_kwargs


class Net(nn.Module):
    """Two products, with a bias before, between and behind their factors."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = seeded(seed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter((0.5 * torch.randn(shape, generator=generator)).to(dtype))

        self.before = parameter(1, 5)
        self.U = parameter(6, 2)
        self.between = parameter(1, 6)
        self.V = parameter(5, 2)
        self.P, self.Q = parameter(4, 3), parameter(6, 3)
        self.behind = parameter(1, 4)
        self.x = torch.randn(7, 5, generator=generator).to(dtype)

    def products(self) -> list[Product]:
        """Both products, in module order."""
        return [
            Product("first", (Factor(self, "U"), Factor(self, "V"))),
            Product("second", (Factor(self, "P"), Factor(self, "Q"))),
        ]

    def factors(self) -> list[nn.Parameter]:
        """The parameters that decay as products."""
        return [self.U, self.V, self.P, self.Q]

    def others(self) -> list[nn.Parameter]:
        """The parameters that do not."""
        return [self.before, self.between, self.behind]

    def loss(self) -> Tensor:
        """A smooth loss that every parameter contributes to."""
        hidden = torch.tanh((self.x + self.before) @ self.V @ self.U.T + self.between)
        return (hidden @ self.Q @ self.P.T + self.behind).square().mean()

    def forward(self) -> Tensor:
        """The loss, for ``functional_call``."""
        return self.loss()

    def penalty(self, coef: float) -> Tensor:
        """½λΣ‖W‖², by autograd."""
        return penalty(self.products(), coef)


def train(
    net: Net,
    optimizer: Optimizer,
    steps: int = 4,
    *,
    closure: bool = False,
    coef: float = 0.0,
    sparse: bool = False,
    assigned: bool = False,
) -> Net:
    """Take some steps on loss + penalty; the penalty of λ = coef through autograd.

    ``sparse`` makes gradients sparse. ``assigned`` computes them beside the parameters, which
    then do not require any: differentiable optimizers take leaves of no other kind.
    """

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        if assigned:
            return assign_gradients(net)
        loss = net.loss() + (net.penalty(coef) if coef else 0.0)
        loss.backward()
        if sparse:
            for param in net.parameters():
                param.grad = param.grad.to_sparse()
        return loss

    for _ in range(steps):
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return net


def assign_gradients(net: Net) -> Tensor:
    """Set every ``.grad`` without making the parameters require one."""
    leaves = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    loss = torch.func.functional_call(net, leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    for param, grad in zip(net.parameters(), grads, strict=True):
        param.requires_grad_(False).grad = grad
    return loss.detach()


def everything(value: object) -> Iterator[object]:
    """All leaves of nested containers, with the keys of dictionaries."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield key
            yield from everything(value[key])
    elif isinstance(value, list | tuple):
        yield len(value)
        for entry in value:
            yield from everything(entry)
    else:
        yield value


def assert_identical(left: object, right: object) -> None:
    """Equal leaf for leaf and bit for bit."""
    ours, theirs = list(everything(left)), list(everything(right))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, Tensor):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other), (mine - other).abs().max()
        else:
            assert mine == other


def values(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: param.detach().clone() for name, param in module.named_parameters()}
