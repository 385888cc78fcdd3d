"""What happens to a factored weight in functions that have no factored form.

Metadata is answered without the dense tensor, writes are refused, the rest gets the dense
tensor. A view of the dense tensor is read-only: a write to it would be lost as one to the weight.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from frobdecay.weights.product_tensor import ProductTensor, keep_dense
from frobdecay.weights.tracing import scripting, transforms_active, untraced

_PROPERTIES = """
    shape dtype device layout ndim itemsize nbytes names requires_grad retains_grad output_nr grad
    grad_dtype grad_fn is_cpu is_cuda is_hpu is_ipu is_leaf is_maia is_meta is_mkldnn is_mps is_mtia
    is_nested is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu _base _version
"""
_METHODS = """
    size dim ndimension stride numel nelement element_size storage_offset get_device
    is_floating_point is_complex is_contiguous is_signed is_inference is_conj is_neg dim_order
    _is_view __len__ __hash__
"""
_FUNCTIONS = "numel is_floating_point is_complex is_conj is_neg is_inference is_signed"

METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _METHODS.split() if hasattr(Tensor, name)]
    + [getattr(torch, name) for name in _FUNCTIONS.split() if hasattr(torch, name)]
)

_OPERATORS = """
    add and div floordiv lshift matmul mod mul or pow rshift sub truediv xor
"""
_IN_PLACE = frozenset([*(f"__i{name}__" for name in _OPERATORS.split()), "__setitem__", "__set__"])
FLAGS = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_HOOKS = frozenset(["retain_grad", "register_post_accumulate_grad_hook"])


def refuse_writes(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], kind: type[Tensor]
) -> None:
    """Raise if ``func`` writes to a tensor of this kind, or hooks onto its gradient."""
    name = getattr(func, "__name__", "")
    target = args[0] if args else next(iter(kwargs.values()), None)
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    in_place = in_place or kwargs.get("inplace") is True
    if (in_place and _holds(target, kind)) or _holds(kwargs.get("out"), kind):
        if name == "__set__":
            name = f"{getattr(func, '__self__', func).__name__} = ..."
        raise _written(name)
    given = name == "backward" and _holds(kwargs.get("inputs"), kind)
    if given or (name in _HOOKS and _holds(target, kind)):
        raise RuntimeError(
            "expected a tensor that gets a gradient, got a factored weight "
            f"({'backward(inputs=...)' if given else name}): the gradient goes to its factors "
            "without being formed. Use the factors, which module.parametrizations holds, and "
            "their gradients, or the dense tensor weight.materialize() in the weight's place"
        )


def _written(name: str) -> RuntimeError:
    return RuntimeError(
        f"expected a tensor that can be written to, got a factored weight ({name}): it is "
        "made anew from its factors at each access, so the change would be lost. Assign the "
        "module's attribute, as in `module.weight = W`, which factorizes W; train, freeze or "
        "convert the factors themselves, as in `module.parametrizations`; write to "
        "weight.clone(), a dense copy; or call frobdecay.merge(model) before tools that write "
        "to dense weights, such as one that merges adapters into them"
    )


def below_autograd(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call an operator that passed by ``__torch_function__`` with the dense numbers.

    Autograd has recorded the operator for the weight, which is a function of its factors.
    """
    if func is torch.ops.aten.detach.default:  # autograd's own bookkeeping
        return args[0].cut()
    if func is torch.ops.aten._has_compatible_shallow_copy_type.default:
        return False  # there is no memory to put in another tensor's place
    schema = getattr(func, "_schema", None)  # higher-order operators have none
    if schema is not None and schema.is_mutable:
        names = [argument.name for argument in schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for argument in schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and _holds(given.get(argument.name), ProductTensor):
                raise _written(str(func))
    # A view of the numbers that are kept could be written to.
    views = schema is not None and any(item.alias_info is not None for item in schema.returns)

    def numbers(weight: Tensor) -> Tensor:
        assert isinstance(weight, ProductTensor)
        if not weight.tracked and any(f.requires_grad for f in weight.factors):
            raise RuntimeError(
                f"{func} reached a factored weight below autograd, where its factors would get no "
                "gradient; pass weight.materialize() instead of the weight"
            )
        dense = weight.numbers()
        return dense.clone() if views else dense.detach()

    args, kwargs = _mapped((tuple(args), dict(kwargs)), ProductTensor, numbers)
    return func(*args, **kwargs)


_BETWEEN = ("frobdecay.", "torch._", "torch.overrides", "torch.autograd.")
_TRACKERS = ("torch.utils.", "torch.distributed._tools.")


def inert_hook(weight: ProductTensor, hook: Callable[..., Any]) -> RemovableHandle:
    """Accept a hook that never runs, with a warning.

    Not an error, because tools that follow modules through a backward pass hook onto whatever
    tensor a module returns. torch's own, as that of ``torch.utils.flop_counter``, miss nothing by
    it: what computes the gradients of the factors is followed by the module around.
    """
    frame, level = sys._getframe(), 1
    while (asking := str(frame.f_globals.get("__name__"))).startswith(_BETWEEN) and frame.f_back:
        frame, level = frame.f_back, level + 1
    if not asking.startswith(_TRACKERS):
        warnings.warn(
            "a hook on the gradient of a factored weight never runs: the gradient goes to its "
            "factors without being formed. Hook onto the factors, or use weight.materialize() in "
            "its place",
            stacklevel=level,
        )
    return RemovableHandle(OrderedDict())


def _holds(value: Any, kind: type[Tensor]) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds(item, kind) for item in value)
    return isinstance(value, kind)


def on_dense(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    kind: type[Tensor] = ProductTensor,
    dense: Callable[[Any], Tensor] = lambda weight: weight.materialize(),
) -> Any:
    """Call a function with dense tensors in place of those of a kind, which are not written to.

    Nor does the result look as if they could be.
    """
    formed: list[Tensor] = []

    def form(tensor: Tensor) -> Tensor:
        formed.append(dense(tensor))
        return formed[-1]

    args, kwargs = _mapped((tuple(args), dict(kwargs)), kind, form)
    versions = [None if t.is_inference() else t._version for t in formed]
    result = func(*args, **kwargs)
    if versions != [None if t.is_inference() else t._version for t in formed]:
        raise _written(getattr(func, "__name__", str(func)))
    return _read_only(result, formed)


def _mapped(value: Any, kind: type[Tensor], function: Callable[[Tensor], Any]) -> Any:
    """A value with the tensors of one kind replaced, also in lists, tuples and dicts."""
    if isinstance(value, kind):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)([_mapped(item, kind, function) for item in value])
    if type(value) is dict:
        return {key: _mapped(item, kind, function) for key, item in value.items()}
    return value


def _read_only(result: Any, formed: Sequence[Tensor]) -> Any:
    """Protect what shares memory with the formed tensors."""
    if torch.compiler.is_compiling() or scripting() or transforms_active():
        return result
    held = {storage for dense in formed if (storage := _storage(dense)) is not None}

    def protect(tensor: Tensor) -> Tensor:
        return tensor.as_subclass(ReadOnlyView) if _storage(tensor) in held else tensor

    if hasattr(result, "setflags"):  # an array of numpy's, mostly over the same memory
        result.setflags(write=False)
    return _mapped(result, Tensor, protect)


def _storage(tensor: Tensor) -> int | None:
    """Which memory a plain tensor shares; None for others."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_nested:
        return None
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


class ReadOnlyView(Tensor):
    """A view of a formed weight: a dense tensor that refuses to be written to."""

    _is_param = property(lambda self: False, lambda self, _: keep_dense(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    @untraced
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call what does not write with ordinary tensors in place of read-only ones."""
        kwargs = kwargs or {}
        if func in METADATA or func in FLAGS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        refuse_writes(func, args, kwargs, ReadOnlyView)
        return on_dense(func, args, kwargs, ReadOnlyView, _plain)


def _plain(view: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return view.as_subclass(Tensor)
