"""The lazily materialized weight: W = U M Vᵀ as a tensor that is multiplied out when it has to be.

``F.linear(x, W)`` and its like (the table ``FORMS``) run on the factors where that is cheaper;
metadata is answered; whatever would write to the tensor raises; every other function gets the
dense tensor, formed at most once for each access of the weight.

What asks no ``__torch_function__``, such as a ``torch.autograd.Function``, a reentrant checkpoint
or torch's C++ code, meets a tensor that autograd knows as the result of its factors: the operators
get the dense numbers, and a dense gradient G goes on to the factors as G V and Gᵀ U. This
is one more node of the graph for each access with gradients; ``benchmarks.forward`` times it.
The tensor has no memory: torch's C++ code refuses its pointer, and to put it in the place of
another tensor's data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frobdecay.weights.dense import (
    FLAGS,
    METADATA,
    below_autograd,
    inert_hook,
    on_dense,
    refuse_writes,
)
from frobdecay.weights.forms import FORMS
from frobdecay.weights.product_tensor import ProductTensor
from frobdecay.weights.tracing import frames, untraced


class FactoredTensor(ProductTensor):
    """Stand for the tensor that a chain of factors multiplies to.

    Examples:
        >>> import torch
        >>> from frobdecay.algebra.reading import Matricization
        >>> U, V = torch.randn(8, 2), torch.randn(6, 2)
        >>> W = FactoredTensor([U, V], Matricization.of("o i -> o i", (8, 6)))
        >>> W.shape
        torch.Size([8, 6])
        >>> x = torch.randn(3, 6)
        >>> torch.allclose(torch.nn.functional.linear(x, W), x @ V @ U.T, atol=1e-6)
        True

    It has the dense tensor's shape, dtype, device and gradients, and no storage of its own.
    ``detach()`` cuts it from its factors: after ``requires_grad_()`` it gathers a dense gradient
    itself. ``.data``, ``torch.save`` and ``nn.Parameter`` give dense tensors.
    A parametrization returns it from ``forward``, so that code which was written for the dense
    weight runs on the factors unchanged. Like any parametrized weight it lives for one access,
    so it cannot be written to: in-place functions raise; assign ``module.weight = W`` instead.

    Under ``torch.nn.utils.parametrize.cached()`` one instance lives as long as the context. A
    factor changed in place meanwhile is seen, except through ``.data``, which leaves no trace:
    torch's rule, which is not to change parameters inside ``cached()``, holds.

    Attributes:
        factors: U (*batch, m, r), then any number of inner M (*batch, r, r), then V (*batch, n, r),
            of one dtype and device.
        matricization: how the product, a (*batch, m, n) matrix, is read as a tensor.

    Raises:
        ValueError: a factor's shape does not chain, or dtypes or devices differ.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it on the factors, on the metadata or on the dense tensor, or refuse."""
        # Without types it comes from there, and frames may be looked at still: under the stance
        # "eager_on_recompile" torch runs what it has compiled, as this function, for them.
        if types is not None and (torch.compiler.is_dynamo_compiling() or frames() is not None):
            return _untraced(func, None, args, kwargs)
        kwargs = kwargs or {}
        form = None if "out" in kwargs else FORMS.get(func)
        for value in (*args, *kwargs.values()) if form is not None else ():
            if isinstance(value, ProductTensor):
                if value.detached and value.apart and func not in FLAGS:
                    form = None  # it is to get the gradient itself
            elif isinstance(value, Tensor) and value.is_nested:
                form = None  # a strided one, whose rows cannot be counted
        if form is not None:
            try:
                result = form(*args, **kwargs)
            except NotImplementedError:  # of a kind torch has few functions for, as oneDNN's
                result = NotImplemented
            if result is not NotImplemented:
                return result
        elif func in METADATA or (func is Tensor.untyped_storage and args[0].compiling):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        elif func is Tensor.register_hook:
            return inert_hook(*args, **kwargs)
        refuse_writes(func, args, kwargs, ProductTensor)
        return on_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return below_autograd(func, args, {} if kwargs is None else kwargs)


_untraced = untraced(FactoredTensor.__torch_function__)
