"""What a parametrization by factors is, and how a ``state_dict`` or a file says which it is.

Any parametrization that ``factorize`` takes has, besides these two methods, ``matricize`` (how the
weight is read: a ``Matricization``, or a ``Tensorization`` of ``algebra/tensorize.py``),
``resolve`` and ``factor_shapes`` (what the planner counts), ``product`` (the record that decay and
diagnostics read) and the flag ``materialized`` (what ``merge`` sets to get the dense weight). To be
saved and loaded it derives from ``Recorded``, whose ``shape``, ``config``, ``adopt`` and
``_factorize`` (or ``right_inverse``) it defines, and is listed in ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Shapes = tuple[tuple[int, ...], ...]


class Recorded(nn.Module):
    """A parametrization that says in every ``state_dict`` how its factors are to be read.

    The shapes of factors do not say it: U Vᵀ and V Uᵀ of a square weight have the same. The record
    lies in the metadata of the ``state_dict``, where it adds no keys; formats that drop metadata
    drop the check with it.
    """

    init: Any

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the dense weight, once it is known."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make this parametrization again: numbers, strings, dicts."""
        raise NotImplementedError

    def adopt(self, shape: tuple[int, ...]) -> None:
        """Take the shape of the dense weight, without a weight.

        Raises:
            ValueError: it cannot be factorized, or another shape was adopted before.
        """
        raise NotImplementedError

    @property
    def derives(self) -> bool:
        """Whether ``right_inverse`` takes the factors from the weight, or may not look at it."""
        return True

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Factorize a dense weight: contiguous factors with its dtype and device.

        Raises:
            TypeError, ValueError: a weight that cannot be factorized, such as zero.
        """
        return self._factorize(weight, self.init, self.derives)

    def approximate(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Factors of a weight that is to be kept, as ``right_inverse``, but never random ones."""
        return self.right_inverse(weight)

    def _factorize(self, weight: Tensor, init: Any, derives: bool) -> tuple[Tensor, ...]:
        """Factors by an initialization; ``derives`` says whether it looks at the weight."""
        raise NotImplementedError

    def _adopted(
        self, weight: Tensor, make: Callable[[], tuple[Tensor, ...]], expected: Shapes
    ) -> tuple[Tensor, ...]:
        """What an initialization makes of a weight, if it is factors of it, whose shape is adopted.

        Raises:
            RuntimeError: it failed with an error that parametrize would misunderstand.
            ValueError: it returned other shapes than expected.
        """
        try:
            factors = make()
        except NotImplementedError as error:
            # parametrize would take it for "has no right_inverse" and fail obscurely later.
            raise RuntimeError(f"the initialization of a {weight.dtype} weight failed") from error
        got = tuple(tuple(factor.shape) for factor in factors)
        if got != expected:
            raise ValueError(f"expected the initialization to return {expected}, got {got}")
        self.adopt(tuple(weight.shape))
        return factors

    def record(self) -> dict[str, Any]:
        """The entry of this weight in a file: the kind's name in ``KINDS``, shape and config."""
        shape = list(self.shape) if self.shape is not None else None
        return {"kind": type(self).__name__, "shape": shape, "config": self.config()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})["frobdecay"] = self.record()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        local_metadata, *_, error_msgs = args
        theirs, ours = local_metadata.get("frobdecay"), self.record()
        if theirs is not None and _reading(theirs) != _reading(ours):
            error_msgs.append(
                f"{prefix[:-1]}: the checkpoint's factors are to be read as {theirs}, but this "
                f"model reads them as {ours}; factorize the model the same way"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _reading(record: Any) -> Any:
    """A record without what the shapes of factors say, and without the initialization."""
    if not isinstance(record, Mapping) or not isinstance(record.get("config"), Mapping):
        return record  # a damaged one, which equals none of ours
    config = {k: v for k, v in record["config"].items() if k not in ("rank", "depth", "init")}
    return {**record, "config": config}


def check_same_shape(known: Sequence[int], shape: Sequence[int]) -> None:
    """Refuse a weight of another shape than the one that was adopted.

    Raises:
        ValueError: the shapes differ.
    """
    if known != shape:
        raise ValueError(
            f"expected a weight of shape {known}, got {shape}; "
            "merge first to change the shape of a factorized weight"
        )


KINDS: dict[str, type[Recorded]] = {}
"""Name in a file -> the class that ``config`` makes again; see ``recorded``."""

Kind = TypeVar("Kind", bound=type[Recorded])


def recorded(kind: Kind) -> Kind:
    """Enter a parametrization in ``KINDS``, so that files can name it; a decorator of its class."""
    KINDS[kind.__name__] = kind
    return kind
