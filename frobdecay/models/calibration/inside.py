"""Seeing inside of a forward pass where a module multiplies with parameters of its own.

Stacks of experts call no modules: each expert is a slice of one parameter that goes to
``F.linear`` or to a product of matrices. While such a module runs, these functions are watched, and
a factor that lies in the stack's memory says by its place there which expert it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from frobdecay.models.calibration.probes import Probe

_PRODUCTS: tuple[Any, ...] = (
    *(torch.mm, torch.bmm, torch.matmul),
    *(Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__),
)

Meet = Callable[[Probe, Tensor, Tensor, int | None], None]
"""What is done with (…, n) inputs and (…, m) outputs of one matrix of a stack, or of all (None)."""


class Inside(TorchFunctionMode):
    """Watches the products of one module with its stacks, between ``open`` and ``close``.

    Args:
        module: which one.
        probes: of its stacks.
        meet: what is done with what one of them multiplies.
    """

    def __init__(self, module: nn.Module, probes: Sequence[Probe], meet: Meet) -> None:
        super().__init__()
        self._module, self._probes, self._meet = module, probes, meet
        self._mode: Any = super()  # its methods have no types

    def open(self, *_: object) -> None:
        """Before the forward pass."""
        self._mode.__enter__()

    def close(self, *_: object) -> None:
        """After it, also if it failed."""
        self._mode.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked for, and look at products."""
        made = func(*args, **(kwargs or {}))
        if func is F.linear or func in _PRODUCTS:
            found = self._stack(args[1]) if len(args) > 1 else None
            if found is not None:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                self._meet(found[0], args[0], made if bias is None else made - bias, found[1])
        return made

    def _stack(self, factor: Any) -> tuple[Probe, int | None] | None:
        """The stack that a factor lies in, and its place there, or None for all of it."""
        if not isinstance(factor, Tensor):
            return None
        memory = factor.untyped_storage().data_ptr()
        for probe in self._probes:
            stack = self._module._parameters.get(probe.attribute)
            if stack is not None and stack.untyped_storage().data_ptr() == memory:
                size = stack.numel() // probe.batch[0]
                place, rest = divmod(int(factor.storage_offset() - stack.storage_offset()), size)
                if factor.numel() == stack.numel() and factor.ndim == 3:
                    return probe, None
                if factor.numel() == size and rest == 0 and 0 <= place < probe.batch[0]:
                    return probe, place
        return None
