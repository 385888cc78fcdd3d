"""Parameters that left a model: who still holds them in an optimizer trains nothing.

An optimizer that was built before ``factorize`` goes on with the dense weights, and nothing fails:
they have no gradients any longer, and the factors' gradients are nobody's. So what is replaced is
remembered, for as long as anybody has it, and steps of optimizers are looked at while there is any.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary, WeakTensorKeyDictionary

_replaced = WeakTensorKeyDictionary()  # -> what took its place
_clear = WeakIdKeyDictionary()  # optimizers without any of these -> how many they held then
_hook: Any = None


def remember(
    before: Mapping[Hashable, Sequence[Tensor]], after: Mapping[Hashable, Sequence[Tensor]]
) -> None:
    """Remember which parameters gave way to others, weight by weight.

    Args:
        before: weight -> its parameters, of all that may have changed.
        after: the same, as it is now.
    """
    global _hook
    had, have = ({id(p) for params in side.values() for p in params} for side in (before, after))
    found: dict[int, tuple[Tensor, list[TensorWeakRef]]] = {}
    for weight, params in before.items():
        successors = [TensorWeakRef(p) for p in after.get(weight, ()) if id(p) not in had]
        for param in params if successors else ():
            if id(param) not in have:
                found.setdefault(id(param), (param, []))[1].extend(successors)  # tied ones: of all
    for param, successors in found.values():
        _replaced[param] = successors
    if found:
        _clear.clear()
        _hook = _hook or register_optimizer_step_pre_hook(_look)


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, where an optimizer steps that holds what was replaced, and not what replaced it.

    Not where the new parameters have no gradient: nothing is lost, or another loss is trained.
    """
    if torch.compiler.is_compiling() or not len(_replaced):
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _clear.get(optimizer) == count:  # type: ignore[no-untyped-call]
        return
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    stale, waits = [], False
    for param, successors in [*_replaced.items()]:  # type: ignore[no-untyped-call]
        news = [new for ref in successors if (new := ref()) is not None]
        if any(id(new) in held for new in news):
            del _replaced[param]  # this optimizer knows
        elif id(param) in held:
            if param.grad is None and any(map(_trained, news)):
                stale.append(param)
            else:
                waits = True
    for param in stale:
        del _replaced[param]
    if not waits:
        _clear[optimizer] = count
    if stale:
        warnings.warn(
            f"{type(optimizer).__name__} holds {len(stale)} parameters that are in the model no "
            f"longer, the first of shape {tuple(stale[0].shape)}: they were replaced when it was "
            "factorized, merged or unrolled, and what replaced them is not trained by this "
            "optimizer; build the optimizer after that, or hand it to factorize(optimizer=...)",
            stacklevel=3,
        )


def _trained(param: Tensor) -> bool:
    return param.requires_grad and param.grad is not None
