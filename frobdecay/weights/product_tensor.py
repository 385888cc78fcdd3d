"""A tensor without storage that stands for the product of its factors.

``ProductTensor`` knows its shape, dtype and device, can be copied, pickled, traced and
multiplied out, and nothing else: which functions run on the factors is in
``forms/``, and what happens to all others is in ``factored.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import accumulate
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.precision import full_precision
from frobdecay.algebra.reading import Matricization
from frobdecay.weights.tracing import forward_ad, functorch_active, scripting, transforms_active

# Classes of the tensors that a compiler traces with.
_TRACED = ("FakeTensor", "FunctionalTensor")
_PLAIN = (Tensor, torch.nn.Parameter)

# Without the keys of a backend that has memory, torch refuses to put the tensor in another's place.
_NOWHERE = torch.device("meta")

# Functions of C: calls of Python's are most of what an access of a weight takes.
_LOOKS, _VERSION = attrgetter("shape", "dtype", "device"), attrgetter("_version")
_WANTS_GRAD, _DETACHED = attrgetter("requires_grad"), methodcaller("detach")


class _Flatten:
    """The method ``__tensor_flatten__``, missing outside of a trace.

    A compiler takes the weights made inside a graph apart with it. A weight that was made outside
    would become an input of the graph in its own right, with nothing to carry its gradient on to
    the factors; without the method it is an object whose attributes, the factors, are the inputs.
    """

    def __get__(
        self, instance: ProductTensor | None, owner: type[ProductTensor]
    ) -> Callable[..., tuple[list[str], Matricization]]:
        if instance is None:
            return _flatten
        if type(instance.factors[0]) in _PLAIN:
            raise AttributeError("__tensor_flatten__")
        return partial(_flatten, instance)


def _flatten(tensor: ProductTensor) -> tuple[list[str], Matricization]:
    names = [f"_factor{i}" for i in range(len(tensor.factors))]
    for name, factor in zip(names, tensor.factors, strict=True):
        setattr(tensor, name, factor)
    return names, tensor.matricization


_known: dict[Any, tuple[Tensor, bool]] = {}


def _fit(
    looks: Any, factors: tuple[Tensor, ...], view: Matricization
) -> tuple[Tensor | None, bool]:
    """Check the factors; of their looks, keep a tensor without memory and whether it is direct.

    Torch refuses to give that tensor's pointer away.
    """
    _check(factors, view)
    if looks is None:
        return None, False
    r, (*batch, m, n) = factors[0].shape[-1], view.read_shape
    with torch.inference_mode(False), torch._C._DisableTorchDispatch():
        made = torch.empty(view.shape, dtype=factors[0].dtype, device=factors[0].device)
        made.untyped_storage().resize_(0)
        torch._C._set_throw_on_mutable_data_ptr(made)
    if len(_known) >= 4096:  # more where threads have met here
        _known.clear()
    direct = view.straight and not batch and len(factors) == 2 and r * (m + n) <= m * n
    return _known.setdefault(looks, (made, direct))


class _Multiplied(torch.autograd.Function):
    """The multiplication of the factors, as autograd sees it: the weight is its result.

    It keeps the factors and not what torch would save of them, so that nothing a checkpoint counts
    depends on where a weight was read, and the weight may be used in several recomputations.
    """

    @staticmethod
    def forward(ctx: Any, made: tuple[ProductTensor], *factors: Tensor) -> ProductTensor:
        ctx.factors, ctx.view = factors, made[0].matricization
        ctx.versions = list(map(_VERSION, factors))
        return made[0]

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        """G to G V for U, Gᵀ U for V, and to the inner factors likewise."""
        if [f._version for f in ctx.factors] != ctx.versions:
            raise RuntimeError(
                "a factor of a weight was modified by an inplace operation between the forward and "
                "the backward pass, which needs the factors of the forward pass"
            )
        U, *inner, V = (f.conj() for f in ctx.factors)
        *others, of_V = ctx.needs_input_grad[1:]
        grads: list[Tensor | None] = [None] * len(ctx.factors)
        with full_precision(U.device.type):
            G = ctx.view.matrix(G)
            lefts = list(accumulate(inner, torch.matmul, initial=U))
            if of_V:
                grads[-1] = G.mT @ lefts[-1]
            if any(others):
                H = G @ V
                for i in range(len(inner), 0, -1):
                    grads[i] = lefts[i - 1].mT @ H
                    H = H @ inner[i - 1].mT
                grads[0] = H
        return None, *grads


class _Formed(torch.autograd.Function):
    """The dense tensor as a function of the weight: its numbers, its gradient, nothing saved."""

    @staticmethod
    def forward(ctx: Any, weight: ProductTensor) -> Tensor:
        return weight.numbers().detach()

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:
        return G


# As Function.apply without what it does for function transforms, under which neither is called.
_multiplied: Callable[..., Any] = super(torch.autograd.Function, _Multiplied).apply
_formed: Callable[..., Any] = super(torch.autograd.Function, _Formed).apply


class ProductTensor(Tensor):
    """Hold factors and the pattern that reads their product as a tensor.

    Attributes:
        factors: U, M.., V, as part of the graph that they belong to.
        matricization: how their product is read.
        constant: whether it was made under ``no_grad``.
        direct: whether it is U Vᵀ and any vector is multiplied faster with V and then U.
        detached: whether it came from ``detach``. Autograd may know it nevertheless: as a leaf, or
            because torch detached it to keep it for a backward pass and put it back into the graph.
    """

    factors: tuple[Tensor, ...]
    matricization: Matricization
    constant: bool
    direct: bool
    detached = False
    _made_tracked: bool
    # A convolution's weight as three, which is no chain of matrices: a hint that copies lose.
    stages: tuple[Tensor, Tensor, Tensor] | None = None
    _memo: tuple[tuple[Any, ...], Tensor] | None = None
    _dense: tuple[Tensor, Tensor] | None = None

    # Set here and not in __init__: torch.compile calls an __init__ without its arguments.
    @staticmethod
    def __new__(
        cls: type[ProductTensor], factors: Sequence[Tensor], matricization: Matricization
    ) -> ProductTensor:
        """Check the factors and make the tensor, which has no storage."""
        factors, view = tuple(factors), matricization
        scripted = scripting() is not None
        traced = scripted or torch.compiler.is_compiling()
        transformed = functorch_active() or forward_ad._current_level >= 0  # without a call of ours
        odd = traced or transformed or (factors and type(factors[0]).__name__ in _TRACED)
        looks = None if odd else (view.straight, view.shape, view.read_shape, *map(_LOOKS, factors))
        template, direct = _known.get(looks) or _fit(looks, factors, view)
        constant = not torch.is_grad_enabled() and not traced
        if constant:
            factors = tuple(map(_DETACHED, factors))
        self: ProductTensor
        if template is None:
            U = factors[0]
            self = Tensor._make_wrapper_subclass(cls, view.shape, dtype=U.dtype, device=U.device)
        else:
            self = Tensor._make_subclass(cls, template, device_for_backend_keys=_NOWHERE)
        self.factors, self.matricization, self.direct = factors, view, direct
        # As of any result, no gradient goes through what was made under no_grad.
        self.constant = constant
        unknown = constant or transformed or scripted
        self._made_tracked = not unknown and any(map(_WANTS_GRAD, factors))
        return _multiplied((self,), *factors) if self._made_tracked else self

    def like(
        self, factors: Sequence[Tensor], matricization: Matricization | None = None
    ) -> ProductTensor:
        """Stand for the product of other factors."""
        return type(self)(factors, self.matricization if matricization is None else matricization)

    @property
    def compiling(self) -> bool:
        """Whether a compiler has the weight in its hands."""
        traced = type(self.factors[0]).__name__ in _TRACED
        return traced or torch.compiler.is_compiling() or scripting() is not None

    @property
    def needs_grad(self) -> bool:
        """Whether a factor requires a gradient.

        Not so while a compiler asks about what a graph returns: a graph that returns the weight, as
        under ``parametrize.cached()``, would wait for a gradient of it besides the factors'.
        """
        return any(f.requires_grad and type(f).__name__ != "FunctionalTensor" for f in self.factors)

    @property
    def tracked(self) -> bool:
        """Whether autograd knows the tensor itself, as the result of ``_Multiplied`` or a leaf."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad if self.detached else self._made_tracked

    @property
    def apart(self) -> bool:
        """Whether autograd knows it apart from its factors, which are cut off."""
        return self.detached and self.tracked

    def cut(self) -> ProductTensor:
        """The weight without its graph, which may become a leaf."""
        made = self.like([f.detach() for f in self.factors])
        made.detached = True
        return made

    def materialize(self) -> Tensor:
        """Form the dense tensor.

        The result is kept for this object's own lifetime, which is one access of the weight, and
        formed again when a factor, or the result itself, was written to in place.

        Returns:
            A plain contiguous tensor of this shape and dtype, differentiable in the factors.
        """
        transformed = transforms_active()
        if self.compiling or (
            not self.tracked and (transformed or type(self.factors[0]) not in _PLAIN)
        ):
            return _multiply(self.factors, self.matricization)
        if not self.tracked or not torch.is_grad_enabled():
            return self.numbers()
        if transformed:
            with torch._C.DisableTorchFunctionSubclass():
                return self.clone()
        numbers = self.numbers()
        if self._dense is not None and self._dense[0] is numbers:
            return self._dense[1]
        dense: Tensor = _formed(self)
        if not self.detached:  # a leaf is held by its graph, and would hold it
            self._dense = numbers, dense
        return dense

    def numbers(self) -> Tensor:
        """The dense tensor's numbers, of no graph."""
        key = _versions(self.factors)
        if self._memo is not None and self._memo[0] == (*key, *_versions(self._memo[1:])):
            return self._memo[1]
        with torch.no_grad():
            dense = _multiply(self.factors, self.matricization)
        # A tensor of a trace or of a function transform must not outlive it.
        if type(dense) is Tensor and not dense.is_inference() and not transforms_active():
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

    def __deepcopy__(self, memo: dict[int, Any]) -> ProductTensor:
        if id(self) not in memo:
            memo[id(self)] = made = self.like([copy.deepcopy(f, memo) for f in self.factors])
            made.detached = self.detached
            if self.apart:
                made.requires_grad_()
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Stored as what it stands for, which is read without this package.
        return self.numbers().__reduce_ex__(protocol)  # type: ignore[no-any-return,no-untyped-call]

    def __copy__(self) -> ProductTensor:
        return self.like(self.factors)

    _is_param = property(lambda self: False, lambda self, _: keep_dense(self))

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


def keep_dense(tensor: Tensor) -> None:
    """Become a dense parameter of the same numbers: what ``nn.Parameter(tensor)`` asks for last."""
    dense = torch.nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    with torch._C.DisableTorchFunctionSubclass():
        torch.utils.swap_tensors(tensor, dense)  # type: ignore[no-untyped-call]


def folded(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Multiply the inner factors of U M Vᵀ into the shorter of U and V."""
    U, *inner, V = factors
    if scripting() or U.shape[-2] <= V.shape[-2]:
        return reduce(torch.matmul, inner, U), V
    return U, reduce(lambda right, M: right @ M.mT, reversed(inner), V)


def _multiply(factors: Sequence[Tensor], matricization: Matricization) -> Tensor:
    """U M Vᵀ as a tensor, in the factors' own dtype: it is what the weight reports."""
    with full_precision(factors[0].device.type):
        U, V = folded(factors)
        return matricization.tensor(U @ V.mT).contiguous()


def _versions(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What changes when a tensor is written to; writes to inference tensors leave no trace."""
    return tuple([object() if t.is_inference() else t._version for t in tensors])


def _check(factors: tuple[Tensor, ...], matricization: Matricization) -> None:
    """Raise unless the factors chain to the pattern's matrix, all of one dtype and device."""
    if len(factors) < 2:
        raise ValueError(f"expected at least two factors (U, V), got {len(factors)}")
    *batch, m, n = matricization.matrix_shape
    if scripting():
        return  # sizes are tensors in a trace, whose comparisons it would record
    U = factors[0]
    r = U.shape[-1] if U.ndim else 0
    sides = (m, *[r] * (len(factors) - 2), n)
    for i, (factor, rows) in enumerate(zip(factors, sides, strict=True)):
        if factor.shape != (*batch, rows, r):
            raise ValueError(
                f"expected factor {i} of shape {(*batch, rows, r if i else 'rank')} for pattern "
                f"{matricization.pattern!r}, got {tuple(factor.shape)}"
            )
        if i and (factor.dtype is not U.dtype or factor.device != U.device):
            raise ValueError(
                f"expected all factors as factor 0 ({U.dtype}, {U.device}), "
                f"got factor {i} of {factor.dtype} on {factor.device}"
            )
