"""Steps of all kinds on a device: any product, bounded steps, decay toward a weight.

Each part does the same in float64 and compares. On a CPU everything runs in small.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.kernels import COEF, check, error
from benchmarks.gpu.parts import part
from benchmarks.measure import Report, no_waiting
from frobdecay import (
    FrobeniusDecay,
    LowRank,
    Product,
    Spectron,
    Tucker,
    add_penalty_grad_,
    factorize,
    products,
)
from frobdecay.gradient.backends import BACKENDS

__all__ = ["chains", "new_gradients"]

Case = tuple[list[Product], list[tuple[nn.Parameter, Tensor]]]
"""Products, and each of their parameters with the gradient in float64."""

SCALE = 0.5

EQUATIONS = {
    "Kronecker": "ab,cd->acbd",
    "Tucker": "xyz,ax,by,cz->abc",
    "tensor train": "ar,brs,cs->abc",
    "CP": "ar,br,cr->abc",
    "depth": "mr,rs,ns->mn",
    "heads": "hmr,hrn->hmn",
}
_SIZES = {"a": 128, "b": 96, "c": 24, "d": 32, "m": 192, "n": 160, "h": 24, "r": 16, "s": 16,
          "x": 16, "y": 24, "z": 16}  # fmt: skip


def _einsum(equation: str, device: torch.device, dtype: torch.dtype) -> Case:
    """Three products of one equation; gradients by autograd of the dense einsum."""
    small = 1 if device.type == "cuda" else 8
    found, wanted = [], []
    for _ in range(3):
        shapes = [[_SIZES[c] // small for c in t] for t in equation.partition("->")[0].split(",")]
        factors = [
            nn.Parameter((torch.randn(shape, device=device) * shape[0] ** -0.5).to(dtype))
            for shape in shapes
        ]
        exact = [factor.detach().double().requires_grad_() for factor in factors]
        dense = SCALE * torch.einsum(equation, *exact)
        grads = torch.autograd.grad(0.5 * dense.square().sum(), exact)
        found.append(Product.of(*factors, equation=equation, scale=SCALE))
        wanted += zip(factors, grads, strict=True)
    return found, wanted


def _attention(device: torch.device, dtype: torch.dtype) -> Case:
    """Both products of attention, whose factors are parts of one packed parameter."""
    width, heads = (256, 8) if device.type == "cuda" else (16, 2)
    module = nn.MultiheadAttention(width, heads, device=device, dtype=dtype)
    twin = copy.deepcopy(module).double()
    total: Any = sum(0.5 * one.materialize().square().sum() for one in products(twin))
    total.backward()
    exact = dict(twin.named_parameters())
    wanted = [
        (param, grad) for name, param in module.named_parameters()
        if (grad := exact[name].grad) is not None
    ]  # fmt: skip
    return products(module), wanted


@part("smoke", 60)
def any_products(report: Report) -> None:
    """Gradients of einsums, tensors, deep chains and heads equal float64's, by every backend."""
    makes = {name: partial(_einsum, equation) for name, equation in EQUATIONS.items()}
    rows = []
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
        for name, make in {**makes, "attention": _attention}.items():
            found, wanted = make(report.device, dtype)
            for backend in (*BACKENDS, None):
                if backend is not None and BACKENDS[backend].why_not(found):
                    continue
                errors = []
                for param, exact in wanted:
                    param.grad = torch.randn_like(param) * float(exact.square().mean().sqrt())
                due = [param.grad.double() + COEF * exact for param, exact in wanted]  # type: ignore[union-attr]
                add_penalty_grad_(found, COEF, backend=backend)
                for (param, _), one in zip(wanted, due, strict=True):
                    assert param.grad is not None
                    errors.append(error(param.grad, one))
                row = {"": name, "dtype": str(dtype)[6:], "backend": backend or "chosen"}
                # Triton's interpreter cuts numbers off where a device rounds them
                cut = 2 if report.device.type == "cpu" and dtype == torch.bfloat16 else 1
                rows.append(row | {"error": max(errors), "allowed": allowed * cut})
    check(report, "relative errors", rows)


# --- bounded steps --------------------------------------------------------------------------------


def chains(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """U Vᵀ twice, U M Vᵀ and attention's heads; all parameters are matrices."""
    width = 192 if device.type == "cuda" else 16
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, width, bias=False) for n in (width, width, width // 2))
    model.append(nn.MultiheadAttention(width, 4, bias=False))
    factorize(model, rank=0.25, include=["0", "1"])
    factorize(model, rank=0.25, include="2", parametrization=partial(LowRank, depth=1))
    return model.to(device, dtype)


LR, BOUND = 0.5, 0.5

Base = Callable[[Any], torch.optim.Optimizer]

BASES: dict[str, Base] = {
    "SGD": partial(torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=1e-7),
    "AdamW": partial(torch.optim.AdamW, lr=LR, weight_decay=1e-7),
    "AdamW, fused": partial(torch.optim.AdamW, lr=LR, weight_decay=1e-7, fused=True),
    "Muon": partial(torch.optim.Muon, lr=LR, weight_decay=1e-7),
}


def _bounded(device: torch.device) -> Iterator[tuple[str, torch.dtype, nn.Module, Any]]:
    """Models and their optimizers; Spectron takes no half precision."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in BASES.items():
            model = chains(device, dtype)
            yield name, dtype, model, FrobeniusDecay(make(model.parameters()), model, bound=BOUND)
    model = chains(device, torch.float32)
    spectron = FrobeniusDecay(Spectron(model, lr=LR), model, decay=1e-7, bound=BOUND)
    yield "Spectron", torch.float32, model, spectron


def _dense(product: Product) -> Tensor:
    """W in float64."""
    views = [view.detach().double() for view in product.views()]
    return product.scale * product.structure.materialize(views, product.batch)


def _norm(matrices: Tensor) -> float:
    """The largest singular value, found on the CPU: for so few numbers that is the quicker way."""
    return float(torch.linalg.svdvals(matrices.cpu()).max())


def new_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn_like(param)


@part("smoke", 60)
def bounded_steps(report: Report) -> None:
    """No step moves a product further than its bound in the spectral norm, and none waits."""
    rows = []
    for name, dtype, model, optimizer in _bounded(report.device):
        moved = []
        for _ in range(4):
            before = [_dense(product) for product in optimizer.products]
            new_gradients(model)
            optimizer.step()
            steps = [
                _dense(product) - old
                for product, old in zip(optimizer.products, before, strict=True)
            ]
            moved += [_norm(step) / (LR * BOUND) for step in steps]
        with no_waiting(report.device):
            for _ in range(66):  # beyond the 64 after which the wrapper looks at its steps
                new_gradients(model)
                optimizer.step()
        if not all(bool(param.isfinite().all()) for param in model.parameters()):
            raise AssertionError(f"{name}, {dtype}: expected finite parameters after 70 steps")
        row = {"": name, "dtype": str(dtype)[6:], "least": min(moved), "error": max(moved)}
        # of half precision the bound holds before factors are rounded
        rows.append(row | {"allowed": 1.05 if dtype == torch.bfloat16 else 1 + 1e-4})
    check(report, "‖ΔW‖₂ ÷ its bound, of four steps", rows)
    loose = [row for row in rows if not row["error"] > 0.1]
    if loose:
        raise AssertionError(f"expected steps that the bound cuts, got {loose}")


# --- decay toward a weight ------------------------------------------------------------------------


def _departing(device: torch.device) -> Iterator[tuple[str, nn.Module, Any, list[Tensor]]]:
    """Models, what they decay toward, and the same as dense weights in float64."""
    width = 128 if device.type == "cuda" else 16
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(width, width, bias=False), nn.Conv2d(16, 24, 3, bias=False)])
    dense = {"0.weight": model[0].weight.detach().clone()}  # stays on the CPU
    factorize(model, rank=8, include="0")
    factorize(model, rank=[12, 8, 3], include="1", parametrization=Tucker)
    for dtype in (torch.float32, torch.bfloat16):
        name, whole = str(dtype)[6:], copy.deepcopy(model).to(device, dtype)
        yield f"initial, {name}", whole, "initial", [_dense(one) for one in products(whole)]
        linear = copy.deepcopy(model[:1]).to(device, dtype)
        yield f"dense, {name}", linear, dense, [dense["0.weight"].to(device).double()]


@part("smoke", 60)
def toward(report: Report) -> None:
    """Decay toward a weight, coupled and decoupled, takes the steps of float64 and never waits."""
    lr, decay, steps, rows = 0.1, 0.5, 6, []
    for title, model, what, start in _departing(report.device):
        for mode in ("coupled", "decoupled"):
            one, exact = copy.deepcopy(model), copy.deepcopy(model).double()
            base = torch.optim.SGD(one.parameters(), lr=lr)
            optimizer = FrobeniusDecay(base, products(one, toward=what), decay=decay, mode=mode)
            grads = [
                [0.1 * torch.randn_like(param) for param in one.parameters()] for _ in range(steps)
            ]

            def run(some: Sequence[Sequence[Tensor]], one: Any = one, by: Any = optimizer) -> None:
                for row in some:
                    for param, grad in zip(one.parameters(), row, strict=True):
                        param.grad = grad.clone()
                    by.step()

            run(grads[:2])
            with no_waiting(report.device):
                run(grads[2:])
            params = list(exact.parameters())
            for row in grads:
                pairs = zip(products(exact), start, strict=True)
                total: Any = sum((p.materialize() - w).square().sum() for p, w in pairs)
                away = torch.autograd.grad(0.5 * decay * total, params)
                with torch.no_grad():
                    for param, grad, pull in zip(params, row, away, strict=True):
                        param -= lr * (grad.double() + pull)
            errors = [error(a, b) for a, b in zip(one.parameters(), params, strict=True)]
            allowed = 1e-5 if title.endswith("float32") else 2e-2
            rows.append({"": title, "mode": mode, "error": max(errors), "allowed": allowed})
    check(report, f"factors after {steps} steps, relative to float64", rows)
