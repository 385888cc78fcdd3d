"""What torch's ways to give a module other weights mean where the weights are factorized.

torch gives a parametrized module a class of its own. ``restorable`` defines these there, so that
they are gone with the last parametrization and a deep copy has them:

    load_state_dict     takes the dense weight, too, and keeps its spectral factors
    reset_parameters    draws the dense weights as the dense module does, and factorizes them
    register_parameter  factorizes the new weight; so does ``layer.weight = nn.Parameter(W)``
    deepcopy            of a module around this one, too, which may forward attributes
    pickle, jit.script  are refused: neither can hold the class
    del layer.weight    takes the factors away, with a warning: what comes after them is dense
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import islice
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from frobdecay.models.select import Walk, Weight
from frobdecay.models.surgery import (
    ordinary,
    own_class,
    release,
    reorder,
    settle_encoders,
    settle_recurrent,
    transaction,
)
from frobdecay.models.ties import forget_ties, other_ties
from frobdecay.product.factor import is_sharded
from frobdecay.product.holding import VERSION, dense_type, factorized, lists_of
from frobdecay.product.names import naming


@contextmanager
def factorizing(walk: Walk, weights: Sequence[Weight]) -> Iterator[None]:
    """Have factors be put in the place of weights, inside; all of them, or none if that fails."""
    touched = [weight.module for weight in weights]
    others = other_ties(walk, weights)
    with transaction(touched):
        yield
        settle_recurrent(touched)
        restorable(touched)
    forget_ties(others)
    settle_encoders(walk.modules)


_RESETS = ("reset_parameters", "_reset_parameters")  # attention has the second


def restorable(modules: Iterable[nn.Module]) -> None:
    """Teach the classes of factorized modules to take dense weights, and to reset."""
    for module in modules:
        if lists := factorized(module):
            kind: Any = type(module)
            _extend(kind)
            for attribute in lists:
                assign = functools.partial(_assign, attribute=attribute)
                delete = functools.partial(_delete, attribute=attribute)
                setattr(kind, attribute, property(vars(kind)[attribute].fget, assign, delete))


def _extend(kind: Any) -> None:
    # The original class is named, not found through super(): classes are copied and derived from.
    base = kind.__bases__[0]

    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        local_metadata, *_, error_msgs = args
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        error_msgs.extend(_accept(self, state_dict, prefix, assign))
        base._load_from_state_dict(self, state_dict, prefix, *args)

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if name in factorized(self):
            _assign(self, param, name)
        elif not isinstance(param, nn.Parameter | None) or _of_a_style(self, name, param):
            raise TypeError(  # to pruning, and to tensor parallelism
                f"expected a parameter {name!r} of a {base.__name__} in its own right, but its "
                "weight is a product of factors; merge or unroll the model first, and for tensor "
                "parallelism take frobdecay.weights.parallel.ColwiseFactored and RowwiseFactored"
            )
        else:
            base.register_parameter(self, name, param)

    kind._load_from_state_dict = _load_from_state_dict
    kind.register_parameter, kind.__prepare_scriptable__ = register_parameter, _unscriptable
    if "__deepcopy__" in vars(kind) and not any(vars(b).get("__slots__") for b in base.__mro__):
        # torch's, which a forwarding wrapper would take for its own, and be copied as this module.
        del kind.__deepcopy__, kind.__getstate__
        kind.__reduce_ex__, kind.__setstate__ = _reduce, _restore
    for name in _RESETS:
        if hasattr(base, name):
            setattr(kind, name, _resetting(base, getattr(base, name)))


def _of_a_style(module: nn.Module, name: str, param: Any) -> bool:
    """Whether it is from a parallel style of torch's, which goes through all of a layer's own."""
    return "." in name or (is_sharded(param) and not is_sharded(module._parameters.get(name)))  # type: ignore[arg-type]


# --- assignment and deletion ---------------------------------------------------------------------


def _assign(module: nn.Module, value: Any, attribute: str) -> None:
    """Factorize a new weight; if it is a parameter, its factors require a gradient as it does."""
    held, called = factorized(module)[attribute], f"{dense_type(module).__name__}.{attribute}"
    parameter = isinstance(value, nn.Parameter)
    if not isinstance(value, Tensor) or (parameter and type(value) is not nn.Parameter):
        raise TypeError(
            f"expected a tensor or a plain nn.Parameter for the factorized {called}, got a "
            f"{type(value).__name__}; merge or unroll first: frobdecay.merge(model, include=...)"
        )
    with naming(called):
        _check_writable(held, "there is nothing to assign to")
        dtype = _factors(held)[0].dtype
        if value.is_floating_point() and value.dtype != dtype:
            raise ValueError(
                f"expected a weight of {dtype}, got {value.dtype}; convert one of them"
            )
        tangent = unpack_dual(value).tangent  # type: ignore[no-untyped-call]
        if _swapped() or (not parameter and (value.requires_grad or tangent is not None)):
            raise ValueError(
                "expected a tensor without a graph, to keep, got one that is to be differentiated "
                "or taken back: its factors are computed without that, and stay; assign "
                "value.detach(), and give torch.func.functional_call the factors by their own names"
            )
        held.right_inverse(value.detach())
    for factor in _factors(held) if parameter else ():
        factor.requires_grad_(value.requires_grad)


def _swapped() -> bool:
    """Whether ``torch.func.functional_call`` assigns, which could not put the factors back."""
    frames = (frame.f_globals.get("__name__") for frame, _ in islice(walk_stack(None), 9))
    return "torch.nn.utils._named_member_accessor" in frames


def _delete(module: nn.Module, attribute: str) -> None:
    warnings.warn(
        f"{dense_type(module).__name__}.{attribute} is deleted, and its factors with it: what "
        "takes its place (PEFT's adapters of nn.MultiheadAttention do this) is dense; exclude it "
        "from factorize, or merge it first",
        stacklevel=3,
    )
    own_class(module)
    release(module, attribute)
    VERSION.value += 1


# --- copies --------------------------------------------------------------------------------------


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """What ``copy`` and ``deepcopy`` make a module again from; a pickle fails at the first item."""
    return _NEW, (type(module),), dict(vars(module))


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    vars(module).update(state)


class _New:
    """Makes an empty object of a class, but not out of a pickle, which knows no such class."""

    def __call__(self, kind: Any) -> Any:
        return kind.__new__(kind)

    def __reduce__(self) -> Any:
        raise RuntimeError(
            "a model with factorized weights cannot be pickled, as torch.save(model) does; save "
            "model.state_dict(), or structure and numbers by frobdecay.save_factorized(model, "
            "path), or pickle what frobdecay.unroll or merge makes of it: plain torch"
        )


_NEW = _New()


def _unscriptable(module: nn.Module) -> nn.Module:
    raise RuntimeError(
        f"expected plain layers for torch.jit.script, got a factorized "
        f"{dense_type(module).__name__}; frobdecay.unroll(model) or merge(model) makes plain ones, "
        "and torch.export and torch.jit.trace take the model as it is"
    )


# --- load_state_dict ----------------------------------------------------------------------------


def _accept(
    module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, assign: bool
) -> Iterator[str]:
    """Put factors in the place of dense weights; yield what is wrong with what there is."""
    if assign:
        VERSION.value += 1  # there will be other parameters
    for attribute, held in factorized(module).items():
        key, inside = f"{prefix}{attribute}", f"{prefix}parametrizations.{attribute}.original"
        ours = {f"{inside}{i}": tuple(p.shape) for i, p in enumerate(_factors(held))}
        theirs = {
            name: tuple(getattr(value, "shape", ()))
            for name, value in state_dict.items()
            if name.startswith(inside)
        }
        if key in state_dict and not theirs:
            try:
                factors = dense_to_factors(held, state_dict.pop(key), like_model=not assign)
            except (TypeError, ValueError, RuntimeError) as error:
                yield f"{key}: {error}"
            else:
                state_dict.update(zip(ours, factors, strict=True))
        elif any(ours.get(name) != shape for name, shape in theirs.items()):
            yield (
                f"{key}: the checkpoint has factors of shapes {list(theirs.values())}, the model "
                f"{list(ours.values())}; factorize the model with the checkpoint's ranks (as "
                "frobdecay.load_factorized does), or load the merged, dense checkpoint"
            )


def _factors(held: Any) -> list[Tensor]:
    return [getattr(held, f"original{i}") for i in range(held.ntensors)]


@ordinary("load")
@torch.no_grad()
def dense_to_factors(held: Any, dense: Tensor, like_model: bool = True) -> tuple[Tensor, ...]:
    """The factors of a dense weight, at the structure that a ``ParametrizationList`` has.

    Args:
        held: ``module.parametrizations[attribute]``; is not changed.
        dense: the weight, of the parametrized weight's shape.
        like_model: work on the device of the factors that are to be replaced.

    Raises:
        TypeError, ValueError: a weight that has no factors, or only such as never train; a model
            that cannot take them.
    """
    if not isinstance(dense, Tensor) or dense.is_meta:
        what = "one on the meta device" if isinstance(dense, Tensor) else type(dense).__name__
        raise TypeError(f"expected a tensor with numbers, got {what}")
    if tuple(dense.shape) != (shape := tuple(held().shape)):
        raise ValueError(
            f"expected the dense weight to have shape {shape}, got {tuple(dense.shape)}"
        )
    if like_model:
        _check_writable(held, "load with assign=True")
        dense = dense.to(_factors(held)[0].device)
    value: Any = dense
    for parametrization in reversed(list(held)):
        invert = getattr(parametrization, "approximate", None) or parametrization.right_inverse
        value = invert(value)
    return tuple(value)


def _check_writable(held: Any, advice: str) -> None:
    """Refuse factors that have no numbers, or only a part of them."""
    for factor in _factors(held):
        if is_sharded(factor):
            raise ValueError(
                "the factors are sharded (DTensor); do this before fully_shard or "
                "parallelize_module"
            )
        if factor.is_meta:
            raise ValueError(
                f"the factors are on the meta device and hold no numbers; {advice}, or "
                "materialize the module first: to_empty(device=...)"
            )


# --- reset_parameters ---------------------------------------------------------------------------


def _resetting(base: type, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, on dense weights that are factorized afterwards."""

    @functools.wraps(original)
    def reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        lists = factorized(self)
        if len(lists) < len(lists_of(self)):
            raise ValueError(
                f"cannot reset a {base.__name__} that has other parametrizations beside the "
                f"factorized {list(lists)}; remove those first"
            )
        where = f"cannot reset {base.__name__}"
        for attribute, held in lists.items():
            with naming(f"{where}.{attribute}"):
                _check_writable(held, "there is nothing to reset")
        with _dense_for_now(self, base, lists) as dense:
            result = original(self, *args, **kwargs)
        for attribute, weight in dense.items():
            with naming(f"{where}.{attribute}"):
                lists[attribute].right_inverse(weight.detach())
        return result

    return reset


@contextmanager
def _dense_for_now(module: nn.Module, base: type, lists: Any) -> Iterator[dict[str, Tensor]]:
    """The module with empty dense weights and its original class; both are taken back."""
    kind, order = type(module), dict(module._parameters)
    dense: dict[str, Tensor] = {}
    for attribute, held in lists.items():
        like = _factors(held)[0]
        empty = torch.empty(held().shape, dtype=like.dtype, device=like.device)
        dense[attribute] = nn.Parameter(empty)
    inner = module._modules.pop("parametrizations")
    module.__class__ = base
    try:
        module._parameters.update(dense)  # type: ignore[arg-type]
        reorder(module, getattr(next(iter(lists.values()))[0], "order", ()))
        yield dense
    finally:
        module.__class__ = kind
        module._modules["parametrizations"] = inner
        for attribute in dense:
            del module._parameters[attribute]
        reorder(module, tuple(order))
