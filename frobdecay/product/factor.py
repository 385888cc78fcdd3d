"""A factor: where its parameter lives, and how the parameter is seen as a factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

TABLE = "_parameters"  # in a module's attributes


class Bare:
    """The owner of a tensor that no module owns."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(frozen=True)
class Factor:
    """Where one factor lives and how it is seen.

    Examples:
        >>> layer = torch.nn.Linear(64, 8)  # its weight is 8×64, and stands tall as a factor
        >>> Factor(layer, "weight", "r n -> n r").view(layer.weight).shape
        torch.Size([64, 8])

    Attributes:
        owner: the module (or other object) that holds the parameter.
        attribute: the parameter's name there; looked up anew at every use, because training
            frameworks swap the ``Parameter`` objects of a prepared model.
        pattern: einops pattern from the parameter to (*batch, *summed, rows, columns), or None
            where the parameter already has that shape. It has to be a view: what is added to
            the view of a ``.grad`` has to arrive in the ``.grad``.
        axes: (name, length) pairs, of which the pattern is told those that it names.
        index: takes one entry of the first axis after the pattern, or those from start to stop
            (the queries, say, of queries, keys and values packed one below the other).
        then: a second pattern, for what the index takes.
    """

    owner: Any
    attribute: str
    pattern: str | None = None
    axes: tuple[tuple[str, int], ...] = ()
    index: int | tuple[int, int] | None = None
    then: str | None = None

    @property
    def param(self) -> Tensor:
        """The parameter as it is now."""
        tensor: Tensor = getattr(self.owner, self.attribute)
        return tensor

    def view(self, tensor: Tensor) -> Tensor:
        """See the parameter, or a tensor of its shape such as its gradient, as the factor.

        Raises:
            ValueError: with this memory layout the pattern would copy.
        """
        if self.pattern is None:
            seen = tensor
        else:
            seen = self._arranged(tensor, self.pattern)
            if _memory(seen) != _memory(tensor):
                raise ValueError(
                    f"expected the pattern {self.pattern!r} to be a view of {self.attribute!r}, "
                    f"but with shape {tuple(tensor.shape)} and strides {tensor.stride()} it "
                    "copies; keep axes apart instead of merging them, or make it contiguous"
                )
        if self.index is None:
            return seen
        taken = seen[slice(*self.index) if isinstance(self.index, tuple) else self.index]
        return taken if self.then is None else self._arranged(taken, self.then)

    def _arranged(self, tensor: Tensor, pattern: str) -> Tensor:
        names = set(pattern.replace("(", " ").replace(")", " ").split())
        return rearrange(tensor, pattern, **{name: n for name, n in self.axes if name in names})

    def identity(self) -> object:
        """Equal for two factors that are the same part of the same parameter, seen alike."""
        seen = self.outline()
        return id(self.param), seen.shape, seen.stride(), seen.storage_offset()

    def outline(self) -> Tensor:
        """The view of the parameter; of a sharded one, its shape without numbers (meta device)."""
        param = self.param
        if is_sharded(param):
            param = torch.empty(param.shape, dtype=param.dtype, device="meta")
        return self.view(param)


Seen = dict[int, list[tuple[str, Factor]]]
"""Id of a parameter -> products and their factors that it is, or a part of it."""


def other_use(seen: Seen, product: str, factor: Factor) -> str | None:
    """The name of a product that was seen with this factor, or with a part of it; now it is, too.

    Args:
        seen: by the ids of parameters; empty at first.
        product: the name of the one whose factor it is.
        factor: which.
    """
    held = seen.setdefault(id(factor.param), [])
    found = next((name for name, other in held if not _apart(factor, other)), None)
    held.append((product, factor))
    return found


def _apart(one: Factor, other: Factor) -> bool:
    """Whether two factors of one parameter are different parts of it (of packed q, k, v)."""
    alike = (one.pattern, one.axes) == (other.pattern, other.axes)
    if not alike or one.index is None or other.index is None:
        return False
    (start, stop), (other_start, other_stop) = (
        index if isinstance(index, tuple) else (index, index + 1)
        for index in (one.index, other.index)
    )
    return stop <= other_start or other_stop <= start


def _memory(tensor: Tensor) -> int | None:
    """The address of what a tensor is a view of; None where torch.func transforms it."""
    transformed = is_functorch_wrapped_tensor(tensor)
    return None if transformed else tensor.untyped_storage().data_ptr()


class _Attributes:
    """Any object's attributes, read like a dictionary."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __getitem__(self, name: str) -> Any:
        return getattr(self.owner, name)


def place_of(factor: Factor) -> tuple[Mapping[str, Mapping[str, Any] | _Attributes], str]:
    """Where the table is that a parameter is looked up in: that saves ``getattr`` at every step.

    Of a module, not the table itself, in the place of which code may put another one.

    Returns:
        What has the table under ``TABLE``, and the name in the table.
    """
    owner, name = factor.owner, factor.attribute
    if isinstance(owner, nn.Module) and name in owner._parameters:
        return vars(owner), name
    return {TABLE: vars(owner) if name in vars(owner) else _Attributes(owner)}, name


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``: every process of a mesh has a part of it, or a copy."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """The tensor; of a sharded one all of it, by an all-gather. Differentiable."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered
