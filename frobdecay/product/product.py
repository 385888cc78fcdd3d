"""A product: which parameters are its factors, and what they multiply to.

``Product`` is the noun that joins everything: ``find`` lists them, backends add the
gradient of their penalty, the optimizer and the diagnostics read them. It is a record of *where*
the factors live, *how* they are seen, and how they combine: as a ``Network`` says, an einsum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property, reduce
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.network import MOST_BATCH, Network, as_chain, chain
from frobdecay.algebra.precision import (
    Coefficient,
    check_coefficient,
    full_precision,
)
from frobdecay.algebra.shifted import Shifted
from frobdecay.product.departure import Departure
from frobdecay.product.factor import Bare, Factor, whole
from frobdecay.product.partitions import why_partitioned

Structure = Network | Shifted | Departure
"""How factors combine."""

BUCKET_BYTES = 1 << 17
"""Products whose factors take more bytes than this are not multiplied together on a CPU: copying
them into a stack then costs more than the calls it saves."""


@dataclass(frozen=True)
class Product:
    """Factors that stand for one dense weight.

    Examples:
        >>> import torch
        >>> U, V = torch.randn(6, 2), torch.randn(5, 2)
        >>> product = Product.of(U, V)
        >>> product.shape, product.rank
        ((6, 5), 2)
        >>> torch.allclose(product_norm(product), torch.linalg.norm(U @ V.T))
        True

    Factors may differ in dtype: they are multiplied in the widest of them, float32 at least.

    Attributes:
        name: the dense weight's qualified name, for messages and tables.
        factors: in a chain first U, then the inner M, last V.
        scale: W = scale · U M Vᵀ (LoRA's α/r); enters the squared norm squared.
        batch: how many leading axes of every factor keep products apart.
        structure: how the factors combine behind the batch axes; unless given, W = U M.. Vᵀ, a
            chain of factors (*batch, *summed, rows, columns).
        biases: none at all, or for each factor of a pair None or what is added to it at the bond
            (the bias of a query projection), seen as one more row, (*batch, *summed, 1, r). It is
            no part of the product and never decays, but moves with the factor in ``balance_``.
        fixed: what forbids other factors of the same product, such as a nonlinearity between
            them; ``balance_`` then refuses, and says so.
        equation: in place of a structure, any einsum in which each factor is once.
    """

    name: str
    factors: tuple[Factor, ...]
    scale: float = 1.0
    batch: int = 0
    structure: Structure = None  # type: ignore[assignment]  # found out where not given
    biases: tuple[Factor | None, ...] = ()
    fixed: str | None = None
    equation: InitVar[str | None] = None

    def __post_init__(self, equation: str | None) -> None:
        if self.batch not in range(MOST_BATCH + 1):
            raise ValueError(
                f"{self.name}: expected batch to be a number of leading axes, at most "
                f"{MOST_BATCH}, got {self.batch!r}"
            )
        if not (isinstance(self.scale, Real | Tensor) and isfinite(self.scale)):
            raise ValueError(
                f"{self.name}: expected scale to be a finite number, got {self.scale!r}"
            )
        if equation is not None:
            if self.structure is not None:
                raise ValueError(f"{self.name}: expected an equation or a structure, got both")
            object.__setattr__(self, "structure", _network_of(self.name, equation))
        if self.structure is None:
            views = self.outlines() if self.params else ()  # which refuses what has been flattened
            object.__setattr__(self, "structure", _chain_of(self.name, views, self.batch))
        if not isinstance(self.structure, Structure):
            raise TypeError(f"{self.name}: expected a structure, got {self.structure!r}")
        check_product(self)

    @cached_property
    def plans(self) -> list[Any]:
        """What ``gradient/penalty.py`` keeps for lists that begin with this record."""
        return []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "plans"}

    @classmethod
    def of(
        cls,
        *tensors: Tensor,
        name: str = "product",
        scale: float = 1.0,
        patterns: Sequence[str | None] | None = None,
        axes: Mapping[str, int] | None = None,
        batch: int | None = None,
        equation: str | None = None,
        structure: Structure | None = None,
    ) -> Product:
        """Make a product of bare parameters.

        Args:
            tensors: U (*batch, m, r), any number of M (*batch, r, r'), V (*batch, n, r').
            name: what messages call it.
            scale: multiplies the product.
            patterns: one einops pattern (or None) a tensor.
            axes: lengths that the patterns need.
            batch: number of leading batch axes; unless given, all but the last two in a chain
                and none otherwise.
            equation: how the tensors combine, if not as U M.. Vᵀ: any einsum in which each of
                them is once, such as ``"ab,cd->acbd"``. One that is a chain is taken as a chain.
            structure: the same as a record.

        Raises:
            TypeError: a factor that is not a real floating-point, strided tensor.
            ValueError: fewer factors than are needed, shapes that do not fit, or no equation.

        Examples:
            >>> import torch
            >>> A, B = torch.ones(2, 3), torch.ones(4, 5)
            >>> product_norm(Product.of(A, B, equation="ab,cd->acbd")) ** 2  # Kronecker
            tensor(120.0000)
        """
        for k, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected factor {k} to be a tensor, got {type(tensor)}")
        if equation is not None and structure is None:
            structure, batch, patterns = _read(name, equation, len(tensors), batch, patterns)
            equation = None
        if patterns is None:
            patterns = [None] * len(tensors)
        elif len(patterns) != len(tensors):
            raise ValueError(f"{name}: expected {len(tensors)} patterns, got {len(patterns)}")
        factors = tuple(
            Factor(Bare(tensor), "tensor", pattern, tuple((axes or {}).items()))
            for tensor, pattern in zip(tensors, patterns, strict=True)
        )
        if batch is None:
            axes_of = [factor.outline().ndim for factor in factors]
            batch = max(min(axes_of, default=2) - 2, 0) if structure is None else 0
        return cls(name, factors, scale, batch, structure, equation=equation)  # type: ignore[arg-type]

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The parameters of the factors, resolved anew.

        Raises:
            ValueError: a parameter that FSDP1 or DeepSpeed has flattened and taken apart.
        """
        found = tuple(factor.param for factor in self.factors)
        for factor, param in zip(self.factors, found, strict=True):
            if reason := why_partitioned(factor.owner, factor.attribute, param):
                raise ValueError(f"{self.name}: {factor.attribute} is {reason}")
        return found

    def views(self) -> tuple[Tensor, ...]:
        """The factors, seen as (*batch, *summed, rows, columns); sharded ones are gathered."""
        pairs = zip(self.factors, self.params, strict=True)
        return tuple(factor.view(whole(param)) for factor, param in pairs)

    def outlines(self) -> tuple[Tensor, ...]:
        """As ``views``, but of sharded factors the shapes only: nothing is communicated."""
        return tuple(factor.outline() for factor in self.factors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense product: (*batch, m, n); more axes where factors have them."""
        return self.structure.shape(self.outlines(), self.batch)

    @property
    def rank(self) -> int:
        """The smallest inner size."""
        return self.structure.rank(self.outlines(), self.batch)

    def materialize(self) -> Tensor:
        """Form the dense product, shape ``shape``, in the factors' widest dtype; differentiable."""
        views = self.views()
        dtype = reduce(torch.promote_types, (view.dtype for view in views))
        with full_precision(views[0].device.type):
            return (self.scale * self.structure.materialize(views, self.batch)).to(dtype)


def _chain_of(name: str, views: Sequence[Tensor], batch: int) -> Network:
    """The chain of factors with so many axes."""
    shapes = [tuple(view.shape) for view in views]
    if len(views) < 2:
        raise ValueError(f"{name}: expected two factors or more, got {len(views)}")
    if any(len(shape) < batch + 2 for shape in shapes):
        raise ValueError(
            f"{name}: expected factors with {batch} batch axes and a matrix, got {shapes}; for "
            "any other einsum, say which: Product.of(..., equation=...)"
        )
    return chain(tuple(len(shape) - batch for shape in shapes))


def _network_of(name: str, equation: str) -> Network:
    """Read an equation; what is wrong with it is said with the name of the product."""
    if not isinstance(equation, str):
        raise TypeError(f"{name}: expected an equation such as 'mr,nr->mn', got {equation!r}")
    try:
        return Network.of(equation)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read(
    name: str, equation: str, count: int, batch: int | None, patterns: Sequence[str | None] | None
) -> tuple[Network, int, Sequence[str | None] | None]:
    """An equation as a structure: as a chain, where the axes of its factors can be put so."""
    network = _network_of(name, equation)
    found = as_chain(equation)
    if found is None or batch or patterns is not None or len(network.terms) != count:
        return network, 0 if batch is None else batch, patterns
    return found[0], found[1], found[2]


def check_product(product: Product) -> None:
    """Refuse what is not real, dense, or does not fit together, naming the product.

    Raises:
        TypeError, ValueError: as ``Product.of``.
    """
    name, params = product.name, product.params
    for k, (factor, param) in enumerate(zip(product.factors, params, strict=True)):
        if not param.is_floating_point() or param.layout != torch.strided or param.itemsize < 2:
            raise TypeError(
                f"{name}: expected factor {k} ({factor.attribute}) to be a dense real "
                f"floating-point tensor, got {param.dtype}, {param.layout}; convert it first"
            )
    views = product.outlines()
    product.structure.check(name, views, product.batch)
    devices = [str(param.device) for param in params]
    if len(set(devices)) > 1:
        raise ValueError(f"{name}: expected all factors on one device, got {devices}")
    if product.biases:
        _check_biases(product, views)


def _check_biases(product: Product, views: Sequence[Tensor]) -> None:
    """Refuse biases that are not further rows of the ends of a chain."""
    if not product.structure.is_chain or len(product.biases) != 2 or len(views) != 2:
        raise ValueError(
            f"{product.name}: expected biases of a chain of two factors, one or None for each, got "
            f"{len(product.biases)} for {len(views)} factors, a {product.structure.name}"
        )
    for bias, view in zip(product.biases, views, strict=True):
        if bias is None:
            continue
        seen = bias.outline()
        if seen.shape != (*view.shape[:-2], 1, view.shape[-1]):
            raise ValueError(
                f"{product.name}: expected the bias {bias.attribute} to be a row beside a factor "
                f"of shape {tuple(view.shape)}, got {tuple(seen.shape)}"
            )


def squared_norm(product: Product) -> Tensor:
    """Compute ‖W‖_F² from the factors, summed over the batch; differentiable.

    Sharded factors are gathered, each by one collective: right on every process.

    Returns:
        A tensor without dimensions, at least float32.
    """
    views = product.views()
    with full_precision(views[0].device.type):
        norm = product.structure.squared_norm(views, product.batch)
        return norm * product.scale**2


def product_norm(product: Product) -> Tensor:
    """Compute the product norm ‖W‖_F from the factors.

    Examples:
        >>> import torch
        >>> product_norm(Product.of(torch.ones(2, 1), torch.ones(8, 1))).item()
        4.0

    Returns:
        A tensor without dimensions, at least float32. Differentiable where W is not zero.
    """
    if not isinstance(product, Product):
        raise TypeError(f"expected one Product, got a {type(product).__name__}")
    return squared_norm(product).clamp_min(0).sqrt()


def as_products(products: Product | Iterable[Product]) -> list[Product]:
    """A list of the products, each once, from one or several, refusing anything else.

    Two records of the same factors in the same place of the same structure are one product,
    whatever they are called: it would decay twice.
    """
    seen: dict[object, Product] = {}
    for product in listed(products):
        factors = tuple(factor.identity() for factor in product.factors)
        key = factors, product.scale, product.batch, product.structure
        seen.setdefault(key, product)
    return list(seen.values())


def listed(products: Product | Iterable[Product]) -> list[Product]:
    """A list from one product or several, as they are, refusing anything else."""
    one = isinstance(products, str | torch.nn.Module) or not isinstance(products, Iterable)
    given: Any = (products,) if one else products
    found = list(given)
    for product in found if {*map(type, found)} != {Product} else ():
        if not isinstance(product, Product):
            raise TypeError(
                f"expected Product records, got {type(product).__name__}; "
                "frobdecay.products(model) lists those of a model, Product.of(U, V) makes one"
            )
    return found


def penalty(products: Product | Iterable[Product], coef: Coefficient) -> Tensor:
    """Compute the penalty ½·λ·Σ‖W‖_F² of products, to be added to a loss.

    Examples:
        >>> import torch
        >>> U, V = torch.ones(2, 1, requires_grad=True), torch.ones(8, 1)
        >>> penalty(Product.of(U, V), 0.5).item()
        4.0

    Differentiable, also twice; factors in half precision are accumulated in float32, also under
    autocast. ``FrobeniusDecay`` and ``add_penalty_grad_`` give the same gradient for less.

    Args:
        products: one product or several, on one device; one listed twice counts once.
        coef: λ, the weight decay of the dense recipe; a number or a tensor without dimensions.

    Returns:
        A tensor without dimensions.

    Raises:
        ValueError: no products, or a negative or NaN λ.
    """
    found = as_products(products)
    if not found:
        raise ValueError("expected at least one product, got none: factorize the model first")
    check_coefficient(coef, "coef")
    if isinstance(coef, Tensor):
        coef = coef.reshape(())
    return 0.5 * coef * reduce(torch.add, _squared_norms(found))


def _squared_norms(products: Sequence[Product]) -> list[Tensor]:
    """Squared norms that add up to that of all products, small ones of one shape together."""
    norms, alike = [], defaultdict(list)
    for product in products:
        large = sum(param.nbytes for param in product.params) > BUCKET_BYTES
        outlines = product.outlines()
        about = tuple((view.shape, view.dtype, view.device) for view in outlines)
        alone = id(product) if large else None
        alike[about, product.structure, product.batch, product.scale, alone].append(product)
    for (_, structure, batch, scale, _), members in alike.items():
        if len(members) == 1:
            norms.append(squared_norm(members[0]))
            continue
        every = [product.views() for product in members]
        stacks = [torch.stack(views) for views in zip(*every, strict=True)]
        with full_precision(stacks[0].device.type):
            norms.append(structure.squared_norm(stacks, batch + 1) * scale**2)
    return norms
