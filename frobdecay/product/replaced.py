"""Parameters that left a model: who still holds them in an optimizer trains nothing.

An optimizer that was built before ``factorize`` goes on with the dense weights, and nothing fails:
they have no gradients any longer, and the factors' gradients are nobody's. So what is replaced is
remembered, for as long as anybody has it, and steps of optimizers are looked at while there is any.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

_Successors = list[TensorWeakRef]

_replaced = WeakTensorKeyDictionary()  # -> what took its place
_hook: Any = None


def remember(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Remember which parameters of some modules gave way to others.

    Args:
        before: all that the modules had.
        after: all that they have now.
    """
    global _hook
    had, have = set(map(id, before)), set(map(id, after))
    successors = [TensorWeakRef(param) for param in after if id(param) not in had]
    for param in before if successors else ():
        if id(param) not in have:
            _replaced[param] = successors
            _hook = _hook or register_optimizer_step_pre_hook(_look)


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, where an optimizer steps that holds what was replaced, and not what replaced it.

    Not where the new parameters have no gradient: nothing is lost, or another loss is trained.
    """
    if torch.compiler.is_compiling() or not len(_replaced):
        return
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    known: dict[int, list[Tensor]] = {}
    stale = []
    for param, successors in [*_replaced.items()]:  # type: ignore[no-untyped-call]
        if id(successors) not in known:
            known[id(successors)] = [new for ref in successors if (new := ref()) is not None]
        news = known[id(successors)]
        if any(id(new) in held for new in news):
            del _replaced[param]  # this optimizer knows
        elif id(param) in held and param.grad is None and any(map(_trained, news)):
            stale.append(param)
    for param in stale:
        del _replaced[param]
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
