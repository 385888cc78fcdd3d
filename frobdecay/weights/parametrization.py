"""What a parametrization by factors is, and how a ``state_dict`` or a file says which it is.

Any parametrization that ``factorize`` takes has, besides ``forward`` and ``right_inverse``,
``matricize`` (how the weight is read: a ``Matricization``, or a ``Tensorization`` of
``algebra/tensorize.py``), ``resolve`` and ``factor_shapes`` (what the planner counts), ``product``
(the record that decay and diagnostics read) and the flag ``materialized`` (what ``merge`` sets to
get the dense weight). ``Recorded`` has all of these but ``forward`` and ``matricize``, from the
ranks and shapes that a subclass says for the sizes of what the weight is read as: (*batch, m, n),
or those of the modes. To be saved and loaded a subclass is listed in ``KINDS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from frobdecay.algebra.network import Network, chain
from frobdecay.algebra.reading import Matricization, plain_axes
from frobdecay.algebra.scaling import check_not_zero, check_weight
from frobdecay.algebra.tensorize import Tensorization
from frobdecay.product.factor import Factor
from frobdecay.product.holding import VERSION
from frobdecay.product.product import Product

Shapes = tuple[tuple[int, ...], ...]


class Recorded(nn.Module, ABC):
    """A parametrization that says in every ``state_dict`` how its factors are to be read.

    The shapes of factors do not say it: U Vᵀ and V Uᵀ of a square weight have the same. The record
    lies in the metadata of the ``state_dict``, where it adds no keys; formats that drop metadata
    drop the check with it.

    Attributes:
        inits: the decompositions among the initializations, by name, "spectral" among them.
        matricization: how the weight is read, once its shape is known.
        materialized: whether ``forward`` returns the dense weight.
        order: the module's parameters while it was dense, for ``merge``.
    """

    inits: ClassVar[Mapping[str, Any]]

    def __init__(
        self, rank: Any, pattern: str | None, axes: Mapping[str, int] | None, init: Any
    ) -> None:
        super().__init__()
        self.rank, self.init = rank, init
        self.pattern, self.axes = pattern, dict(axes or {})
        self.matricization: Any = None
        self.materialized = False
        self.order: tuple[str, ...] = ()

    # --- what a subclass says ---------------------------------------------------------------------

    @abstractmethod
    def matricize(self, shape: tuple[int, ...]) -> Matricization | Tensorization:
        """Fit the pattern to a weight's shape.

        Raises:
            ValueError: the pattern does not fit, or the shape needs another one.
        """

    @abstractmethod
    def ranks(self, sizes: Sequence[int]) -> Any:
        """The rank in numbers of columns, for a weight that is read as a tensor of these sizes."""

    @abstractmethod
    def shapes(self, sizes: Sequence[int], ranks: Any) -> Shapes:
        """Shapes of the factors."""

    def structure(self, sizes: Sequence[int], ranks: Any) -> Network:
        """How the factors combine: a chain, U M.. Vᵀ, unless a subclass says otherwise."""
        return chain(tuple(map(len, self.shapes(sizes, ranks))))

    @property
    @abstractmethod
    def init_name(self) -> str | None:
        """The initialization's name; None of one of somebody's own."""

    @abstractmethod
    def _initial(self, init: Any, read: Tensor, ranks: Any) -> tuple[Tensor, ...]:
        """Factors of what the weight is read as; by a callable, or by a name in ``inits``."""

    # --- what ``factorize``, ``merge`` and files ask for ------------------------------------------

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the dense weight, once it is known."""
        return None if self.matricization is None else self.matricization.shape

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make this parametrization again: numbers, strings, dicts.

        Ranks as plain numbers and the pattern itself, once the shape is known. An initialization
        of one's own has no name and is left out.
        """
        view, name = self.matricization, self.init_name
        rank = self.rank if view is None else self.ranks(view.matrix_shape)
        config: dict[str, Any] = {
            "rank": list(rank) if isinstance(rank, tuple) else rank,
            "pattern": self.pattern if view is None else view.pattern,
            "axes": plain_axes(self.axes),
        }
        return config if name is None else {**config, "init": name}

    def resolve(self, shape: tuple[int, ...]) -> Any:
        """The rank in numbers of columns for a weight of this shape."""
        return self.ranks(self.matricize(shape).matrix_shape)

    def factor_shapes(self, shape: tuple[int, ...]) -> Shapes:
        """Shapes of the factors for a weight of this shape, from the shape alone."""
        sizes = self.matricize(shape).matrix_shape
        return self.shapes(sizes, self.ranks(sizes))

    def adopt(self, shape: tuple[int, ...]) -> None:
        """Take the shape of the dense weight, without a weight.

        Raises:
            ValueError: it cannot be factorized, or another shape was adopted before.
        """
        if self.shape is None:
            self.matricization = self.matricize(shape)
            VERSION.value += 1
        elif self.shape != shape:
            raise ValueError(
                f"expected a weight of shape {self.shape}, got {shape}; "
                "merge first to change the shape of a factorized weight"
            )

    @property
    def derives(self) -> bool:
        """Whether ``init`` takes the factors from the weight; one of somebody's own may not."""
        return self.init_name is not None

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Factorize a dense weight: contiguous factors with its dtype and device.

        Raises:
            TypeError, ValueError: a weight that cannot be factorized, such as zero.
        """
        return self._factorize(weight, self.init, self.derives)

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Factorize a weight that is to be kept: by a decomposition, whatever ``init`` is.

        Raises:
            TypeError, ValueError: a weight that cannot be factorized.
        """
        init = self.init_name if self.init_name in self.inits else "spectral"
        return self._factorize(weight, init, derives=True)

    def _factorize(self, weight: Tensor, init: Any, derives: bool) -> tuple[Tensor, ...]:
        """Factors by an initialization; ``derives`` says whether it looks at the weight.

        Raises:
            RuntimeError: it failed with an error that parametrize would misunderstand.
            ValueError: it returned other shapes than expected.
        """
        check_weight(weight)
        shape = tuple(weight.shape)
        if self.matricization is not None:
            self.adopt(shape)  # refuses another one
        view = self.matricization or self.matricize(shape)
        ranks, read = self.ranks(view.matrix_shape), view.read(weight.detach())
        if derives:
            check_not_zero(read, len(view.batch))
        try:
            factors = self._initial(init, read, ranks)
        except NotImplementedError as error:
            # parametrize would take it for "has no right_inverse" and fail obscurely later.
            raise RuntimeError(f"the initialization of a {weight.dtype} weight failed") from error
        expected = self.shapes(view.matrix_shape, ranks)
        got = tuple(tuple(factor.shape) for factor in factors)
        if got != expected:
            raise ValueError(f"expected the initialization to return {expected}, got {got}")
        self.adopt(shape)
        return factors

    def product(self, name: str, parameters: nn.Module) -> Product:
        """Record the product of the factors that a ``ParametrizationList`` holds.

        Args:
            name: the dense weight's qualified name.
            parameters: the list, ``module.parametrizations[tensor_name]``.
        """
        view = self._known()
        batch, sizes = len(view.batch), view.matrix_shape
        structure = self.structure(sizes[batch:], self.ranks(sizes))
        factors = tuple(Factor(parameters, f"original{i}") for i in range(len(structure.terms)))
        return Product(name, factors, batch=batch, structure=structure)

    def _known(self) -> Any:
        if self.matricization is None:
            kind = type(self).__name__
            raise RuntimeError(f"{kind} knows no shape yet; register it on a weight first")
        return self.matricization

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        view = self.matricization
        if view is None:
            return f"rank={self.rank}"
        shapes = self.factor_shapes(view.shape)
        factors = " · ".join("×".join(map(str, shape)) for shape in shapes)
        said = [
            repr(view.pattern),
            factors,
            f"kept {sum(map(prod, shapes)) / prod(view.shape):.3g}",
        ]
        if isinstance(view, Tensorization):
            said.insert(1, "×".join(map(str, view.modes)))
        return ", ".join(said)

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


KINDS: dict[str, type[Recorded]] = {}
"""Name in a file -> the class that ``config`` makes again; see ``recorded``."""

Kind = TypeVar("Kind", bound=type[Recorded])


def recorded(kind: Kind) -> Kind:
    """Enter a parametrization in ``KINDS``, so that files can name it; a decorator of its class."""
    KINDS[kind.__name__] = kind
    return kind
