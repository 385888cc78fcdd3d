"""Functions of the weight alone whose result is a product of factors again.

A transpose permutes the tensor side of the pattern, a conversion converts the factors, a split
along rows or columns splits U or V.
"""

# ruff: noqa: A002  arguments have the names of torch's, which may be given by name

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.reading import Matricization, written
from frobdecay.algebra.scaling import DTYPES
from frobdecay.weights.forms.matrix import matrix
from frobdecay.weights.forms.table import form
from frobdecay.weights.product_tensor import ProductTensor

_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_CONVERSIONS = ("to", "type", "type_as", "cpu", "cuda", "float", "double", "half", "bfloat16")


@form(Tensor.permute, torch.permute)
def _permute(input: ProductTensor, *args: Any, dims: Sequence[int] = ()) -> Any:
    order = tuple(args[0]) if args and not isinstance(args[0], int) else args or tuple(dims)
    view = input.matricization
    size = len(view.tensor_axes)
    if sorted(d % size if -size <= d < size else d for d in order) != list(range(size)):
        return NotImplemented
    # The pattern's tensor side changes, not the factors.
    return input.like(input.factors, view.of_axes(tuple(view.tensor_axes[d] for d in order)))


@form(torch.transpose, Tensor.transpose, torch.swapdims, Tensor.swapdims)
def _transpose(input: ProductTensor, dim0: int, dim1: int) -> Any:
    order = list(range(len(input.matricization.tensor_axes)))
    try:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    except IndexError:
        return NotImplemented
    return _permute(input, order)


@form(torch.swapaxes, Tensor.swapaxes)
def _swap_axes(input: ProductTensor, axis0: int, axis1: int) -> Any:
    return _transpose(input, axis0, axis1)


@form(Tensor.T.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
def _matrix_transpose(input: ProductTensor) -> Any:
    return _permute(input, 1, 0) if input.ndim == 2 else NotImplemented


@form(Tensor.mT.__get__)  # type: ignore[attr-defined]
def _batch_transpose(input: ProductTensor) -> Any:
    return _transpose(input, -2, -1) if input.ndim >= 2 else NotImplemented


@form(Tensor.H.__get__)  # type: ignore[attr-defined]
def _conjugate_transpose(input: ProductTensor) -> Any:
    """Conjugate nothing: the weight is real."""
    return NotImplemented if input.is_complex() else _matrix_transpose(input)


@form(Tensor.mH.__get__, Tensor.adjoint)  # type: ignore[attr-defined]
def _batch_conjugate_transpose(input: ProductTensor) -> Any:
    return NotImplemented if input.is_complex() else _batch_transpose(input)


@form(*(getattr(Tensor, name) for name in _CONVERSIONS), told=True)
def _convert(function: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Convert each factor; another tensor converted to the weight's dtype takes a factor's."""
    if kwargs.get("memory_format", torch.preserve_format) is not torch.preserve_format:
        return NotImplemented
    given = [a.factors[0] if isinstance(a, ProductTensor) else a for a in args]
    named = {k: a.factors[0] if isinstance(a, ProductTensor) else a for k, a in kwargs.items()}
    if not isinstance(input, ProductTensor):
        return function(input, *given, **named)
    factors = [function(f, *given, **named) for f in input.factors]
    if not isinstance(factors[0], Tensor):
        return factors[0]
    # To cast a weight to a dtype that no product is formed in is not to cast its factors.
    if factors[0].dtype not in DTYPES and factors[0].dtype != input.factors[0].dtype:
        return NotImplemented
    same = all(new is old for new, old in zip(factors, input.factors, strict=True))
    return input if same else input.like(factors)


form(Tensor.detach, torch.detach)(ProductTensor.cut)


@form(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
def _requires_grad(self: ProductTensor) -> bool:
    return self.needs_grad or self.apart


@form(Tensor.is_leaf.__get__)  # type: ignore[attr-defined]
def _is_leaf(self: ProductTensor) -> bool:
    """No: an optimizer must not take it. But a compiler expects it of the inputs of a graph."""
    if self.apart:
        with torch._C.DisableTorchFunctionSubclass():
            return self.is_leaf
    return not self.needs_grad or self.compiling


@form(Tensor.requires_grad.__set__, Tensor.requires_grad_)  # type: ignore[attr-defined]
def _set_requires_grad(self: ProductTensor, requires_grad: bool = True) -> Any:
    """Nothing to do where it is so already; else NotImplemented, and refused as a write.

    What was detached may become a leaf, whose gradient is its own.
    """
    if self.detached and not self.compiling:
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.requires_grad_(self, requires_grad)
    same = bool(requires_grad) == self.needs_grad and not self.constant
    return self if same else NotImplemented


@form(Tensor.contiguous)
def _contiguous(
    input: ProductTensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Any:
    return input if memory_format is torch.contiguous_format else NotImplemented


@form(*(getattr(Tensor, name) for name in _NEW), told=True)
def _of_factor(function: Callable[..., Any], self: ProductTensor, *args: Any, **kwargs: Any) -> Any:
    """A new tensor of the weight's dtype and device."""
    return function(self.factors[0], *args, **kwargs)


@form(*(getattr(torch, name) for name in _LIKE), told=True)
def _of_shape(function: Callable[..., Any], input: ProductTensor, *args: Any, **kwargs: Any) -> Any:
    """A new tensor of the weight's shape, dtype and device."""
    stand_in = input.factors[0].detach().new_empty(()).expand(input.matricization.shape)
    return function(stand_in, *args, **kwargs)


@form(Tensor.split, torch.split)
def _split(tensor: ProductTensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> Any:
    if tensor.ndim != 2 or not -2 <= dim < 2:
        return NotImplemented
    size, lengths = tensor.matricization.shape[dim], split_size_or_sections
    if isinstance(lengths, int):
        if lengths <= 0:
            return NotImplemented
        lengths = [min(lengths, size - start) for start in range(0, size, lengths)]
    if sum(lengths) != size or min(lengths, default=0) <= 0:
        return NotImplemented
    return _parts(tensor, lengths, dim % 2 - 2)


def _parts(weight: ProductTensor, lengths: Sequence[int], dim: int) -> Any:
    """Slices along dimension -2 or -1, as factored weights."""
    if (W := matrix(weight)) is None:
        return NotImplemented
    side = 0 if dim == -2 else -1
    factors = (W.U, *W.inner, W.V)
    if W.blocks == dim:
        size = factors[side].shape[-2]
        if any(length % size for length in lengths):
            return NotImplemented
        counts = [length // size for length in lengths]
        chains = [f.split(counts) for f in factors]  # type: ignore[no-untyped-call]
    else:
        chains = [[f] * len(lengths) for f in factors]
        chains[side] = factors[side].split(lengths, -2)  # type: ignore[no-untyped-call]
    return tuple(_part(weight, chain, W.blocks) for chain in zip(*chains, strict=True))


def _part(weight: ProductTensor, factors: Sequence[Tensor], blocks: int | None) -> ProductTensor:
    if blocks is not None and len(factors[0]) == 1:
        factors, blocks = [f.squeeze(0) for f in factors], None
    U, V = factors[0], factors[-1]
    count = 1 if blocks is None else len(U)
    shape = [U.shape[-2], V.shape[-2]]
    if blocks is not None:
        shape[blocks] *= count
    pattern = {None: "o i -> o i", -2: "(b o) i -> b o i", -1: "o (b i) -> b o i"}[blocks]
    axes = {} if blocks is None else {"b": count}
    return weight.like(factors, Matricization.of(pattern, (shape[0], shape[1]), axes))


@form(Tensor.__getitem__)
def _pick(self: ProductTensor, index: Any) -> Any:
    """Matrices of a batch by their numbers, as one expert's out of the stack of all."""
    view = self.matricization
    whole = isinstance(index, int) and not isinstance(index, bool)
    if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) and index.ndim < 2:
        whole = index.ndim == 0
    elif not whole:
        return NotImplemented
    if len(view.batch_axes) != 1 or view.tensor_axes[0] != view.batch_axes:
        return NotImplemented
    factors, (batch,) = [f[index] for f in self.factors], view.batch_axes
    if not whole:
        return self.like(factors, replace(view, sizes={**view.sizes, batch: len(factors[0])}))
    sizes = {name: size for name, size in view.sizes.items() if name != batch}
    pattern = f"{written(view.tensor_axes[1:])} -> {written(view.read_axes[1:])}"
    return self.like(factors, Matricization.of(pattern, view.shape[1:], sizes))


@form(Tensor.view, Tensor.reshape)
def _view(self: ProductTensor, *shape: Any, **named: Any) -> Any:
    """The same shape, or the stack of matrices that lie one below the other."""
    view = self.matricization
    if named:
        return NotImplemented
    wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
    first, *others = view.tensor_axes
    stack, *rest = (first[:1], first[1:], *others)
    if first[:1] == view.batch_axes:
        made = view.of_axes((stack, *rest))
        if _fits(wanted, made.shape):
            return self.like(self.factors, made)
    return self if _fits(wanted, view.shape) else NotImplemented


def _fits(wanted: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether these lengths, of which one may be -1, are a shape."""
    pairs = zip(wanted, shape, strict=False)
    return (
        len(wanted) == len(shape)
        and list(wanted).count(-1) < 2
        and all(isinstance(w, int) and w in (s, -1) for w, s in pairs)
    )


@form(Tensor.chunk, torch.chunk)
def _chunk(input: ProductTensor, chunks: int, dim: int = 0) -> Any:
    if input.ndim != 2 or not -2 <= dim < 2 or chunks <= 0:
        return NotImplemented
    size = input.matricization.shape[dim]  # in a trace of torch.jit the tensor's is a tensor
    return _split(input, -(-size // chunks), dim) if size else NotImplemented
