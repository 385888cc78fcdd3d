"""A tensor without storage that stands for the product of its factors.

``ProductTensor`` knows its shape, dtype and device, can be copied, pickled, traced and
multiplied out, and nothing else: which functions run on the factors is the table in
``forms/table.py``, and what happens to all others is in ``factored.py``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from frobdecay.chain import full_precision
from frobdecay.matricize import Matricization

__all__ = ["ProductTensor", "folded", "transforms_active", "untraced"]

transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from tracing a function that answers for torch's own functions.

    It runs as it is while a graph is made of weights that the graph itself makes. Where it is
    called between graphs, a trace of it would be taken again for other functions than the first.
    """
    outside: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal outside
        compiler = torch.compiler
        if "torch._dynamo" not in sys.modules or (
            compiler.is_compiling() and not compiler.is_dynamo_compiling()
        ):
            return function(*args)
        if outside is None:
            # Not before the compiler is there: to import it takes more than a second.
            outside = compiler.disable(function, reason="a factored weight is used")  # type: ignore[no-untyped-call]
        return outside(*args)

    return call


class _Flatten:
    """The method ``__tensor_flatten__``, missing where the factors would get no gradient.

    A compiler takes the weights made inside a graph apart with it. A weight that was made outside
    would become an input of the graph in its own right, with nothing to carry its gradient on to
    the factors; without the method it is an object whose attributes, the factors, are the inputs.
    """

    def __get__(
        self, instance: ProductTensor | None, owner: type[ProductTensor]
    ) -> Callable[..., tuple[list[str], Matricization]]:
        if instance is None:
            return _flatten
        if torch.is_grad_enabled() and any(
            f.requires_grad and type(f) in (Tensor, torch.nn.Parameter) for f in instance.factors
        ):
            raise AttributeError("__tensor_flatten__")
        return partial(_flatten, instance)


def _flatten(tensor: ProductTensor) -> tuple[list[str], Matricization]:
    names = [f"_factor{i}" for i in range(len(tensor.factors))]
    for name, factor in zip(names, tensor.factors, strict=True):
        setattr(tensor, name, factor)
    return names, tensor.matricization


class ProductTensor(Tensor):
    """Hold factors and the pattern that reads their product as a tensor."""

    factors: tuple[Tensor, ...]
    matricization: Matricization
    constant: bool
    # A convolution's weight as three, which is no chain of matrices: a hint that copies lose.
    stages: tuple[Tensor, Tensor, Tensor] | None = None
    _memo: tuple[tuple[Any, ...], Tensor] | None

    # Set here and not in __init__: torch.compile calls an __init__ without its arguments.
    @staticmethod
    def __new__(
        cls: type[ProductTensor], factors: Sequence[Tensor], matricization: Matricization
    ) -> ProductTensor:
        """Check the factors and make the tensor, which has no storage."""
        factors = tuple(factors)
        _check(factors, matricization)
        constant = not torch.is_grad_enabled() and not _tracing()
        if constant:
            factors = tuple([f.detach() for f in factors])
        # It takes no part in autograd, its factors do.
        self: ProductTensor = Tensor._make_wrapper_subclass(
            cls,
            matricization.shape,
            dtype=factors[0].dtype,
            device=factors[0].device,
        )
        self.factors = factors
        self.matricization = matricization
        self._memo = None
        # As of any result, no gradient goes through what was made under no_grad.
        self.constant = constant
        return self

    def like(
        self, factors: Sequence[Tensor], matricization: Matricization | None = None
    ) -> ProductTensor:
        """Stand for the product of other factors."""
        return type(self)(factors, self.matricization if matricization is None else matricization)

    def permuted(self, order: Sequence[int]) -> ProductTensor:
        """Reorder the dimensions: the pattern's tensor side, not the factors."""
        view = self.matricization
        axes = tuple(view.tensor_axes[d] for d in order)
        left = " ".join(item[0] if len(item) == 1 else f"({' '.join(item)})" for item in axes)
        pattern = f"{left} ->{view.pattern.partition('->')[2]}"
        return self.like(self.factors, replace(view, pattern=pattern, tensor_axes=axes))

    def transposed(self, dim0: int, dim1: int) -> ProductTensor:
        """Exchange two dimensions."""
        order = list(range(len(self.matricization.tensor_axes)))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permuted(order)

    @property
    def compiling(self) -> bool:
        """Whether a compiler has the weight in its hands."""
        own = type(self.factors[0]).__name__ in ("FakeTensor", "FunctionalTensor")
        return own or torch.compiler.is_compiling()

    @property
    def needs_grad(self) -> bool:
        """Whether a factor requires a gradient.

        Not so while a compiler asks about what a graph returns: a graph that returns the weight, as
        under ``parametrize.cached()``, would wait for a gradient of it besides the factors'.
        """
        return any(f.requires_grad and type(f).__name__ != "FunctionalTensor" for f in self.factors)

    def materialize(self) -> Tensor:
        """Form the dense tensor.

        The result is kept for this object's own lifetime, which is one access of the weight, and
        formed again when a factor, or the result itself, was written to in place.

        Returns:
            A plain contiguous tensor of this shape and dtype, differentiable in the factors.
        """
        if self.compiling or transforms_active():
            # A tensor of a trace or of a function transform must not outlive it.
            return _multiply(self.factors, self.matricization)
        key = _versions(self.factors)
        if self._memo is not None and self._memo[0] == (*key, *_versions(self._memo[1:])):
            return self._memo[1]
        dense = _multiply(self.factors, self.matricization)
        if type(dense) is Tensor and not dense.is_inference():
            self._memo = ((*key, *_versions((dense,))), dense)
        return dense

    # torch.compile, torch.export and AOTAutograd take the tensor apart into its factors and
    # put it together again through this pair; without it every use is a graph break.

    __tensor_flatten__ = _Flatten()

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], matricization: Matricization, size: Any, stride: Any
    ) -> ProductTensor:
        with torch.enable_grad():  # compiled graphs run under no_grad
            return cls(tuple(inner[f"_factor{i}"] for i in range(len(inner))), matricization)

    def _stable_hash_for_caching(self) -> str:
        view = self.matricization
        parts = [(*f.shape, f.stride(), f.dtype, f.device, f.requires_grad) for f in self.factors]
        return f"{type(self).__qualname__} {view.pattern} {sorted(view.sizes.items())} {parts}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Autograd's own bookkeeping detaches.
        if func is torch.ops.aten.detach.default:
            return args[0].like([f.detach() for f in args[0].factors])
        # Guards of a compiled function read the properties .T and .mT.
        if func is torch.ops.aten.permute.default:
            return args[0].permuted(args[1])
        if func is torch.ops.aten.transpose.int:
            return args[0].transposed(*args[1:])
        # Whatever else arrives here has passed by __torch_function__.
        raise RuntimeError(
            f"{func} reached a factored weight below autograd, where its factors would get no "
            "gradient; pass weight.materialize() instead of the weight"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ProductTensor:
        if id(self) not in memo:
            memo[id(self)] = self.like([copy.deepcopy(f, memo) for f in self.factors])
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.factors, self.matricization)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        U = self.factors[0]
        text = [
            f"shape={tuple(self.matricization.shape)}",
            f"rank={U.shape[-1]}",
            f"pattern={self.matricization.pattern!r}",
            f"dtype={U.dtype}",
        ]
        text += [f"factors={len(self.factors)}"] * (len(self.factors) > 2)
        text += [f"device='{U.device}'"] * (U.device.type != "cpu")
        text += ["requires_grad=True"] * self.needs_grad
        return f"{type(self).__name__}({', '.join(text)})"


def folded(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Multiply the inner factors of U M Vᵀ into the shorter of U and V."""
    U, *inner, V = factors
    if not inner:
        return U, V
    if torch.jit.is_tracing() or U.shape[-2] <= V.shape[-2]:  # type: ignore[attr-defined,no-untyped-call]
        for M in inner:
            U = U @ M
    else:
        for M in reversed(inner):
            V = V @ M.mT
    return U, V


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


def _multiply(factors: Sequence[Tensor], matricization: Matricization) -> Tensor:
    """U M Vᵀ as a tensor, in the factors' own dtype: it is what the weight reports."""
    with full_precision(factors[0].device.type):
        U, V = folded(factors)
        return matricization.tensor(U @ V.mT).contiguous()


def _versions(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What changes when a tensor is written to; writes to inference tensors leave no trace."""
    return (
        torch.is_grad_enabled(),
        *(object() if t.is_inference() else t._version for t in tensors),
    )


def _check(factors: tuple[Tensor, ...], matricization: Matricization) -> None:
    """Raise unless the factors chain to the pattern's matrix, all of one dtype and device."""
    if len(factors) < 2:
        raise ValueError(f"expected at least two factors (U, V), got {len(factors)}")
    *batch, m, n = matricization.matrix_shape
    U = factors[0]
    r = U.shape[-1] if U.ndim else 0
    rows, last = m, len(factors) - 1
    for i, factor in enumerate(factors):
        if i:
            rows = r if i < last else n
        if factor.shape != (*batch, rows, r):
            expected = (*batch, rows, r if i else "rank")
            raise ValueError(
                f"expected factor {i} of shape {expected} for the pattern "
                f"{matricization.pattern!r}, got {tuple(factor.shape)}"
            )
        if i and (factor.dtype is not U.dtype or factor.device != U.device):
            raise ValueError(
                f"expected all factors as factor 0 ({U.dtype}, {U.device}), "
                f"got factor {i} of {factor.dtype} on {factor.device}"
            )
