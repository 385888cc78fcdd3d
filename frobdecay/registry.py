"""Factorize models, and find their products.

``factorize`` registers a parametrization on every chosen weight, or on none: an error on the way
leaves the model as it was. ``products`` lists what there is to decay: the factorized weights, and
what providers registered with ``register_products`` find in other people's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from frobdecay.init import Init
from frobdecay.modules.candidates import Entry
from frobdecay.modules.selection import Selector, modules
from frobdecay.modules.support import check_unwrapped, check_values
from frobdecay.modules.surgery import factorized, settle_recurrent, transaction
from frobdecay.parametrizations import LowRank
from frobdecay.plan import RankPlan
from frobdecay.product import Product
from frobdecay.ranks import RankRule, plan_entries

__all__ = ["Provider", "factorize", "products", "register_products"]

Provider = Callable[[nn.Module, str], Iterable[Product]]

_OWN: dict[type | str, Provider] = {}
_USERS: dict[type | str, Provider] = {}


def factorize(
    model: nn.Module,
    rank: RankRule | None = None,
    *,
    ratio: float | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    parametrization: Callable[..., nn.Module] = LowRank,
    init: str | Init = "spectral",
) -> RankPlan:
    """Replace dense weights by products of factors, in place.

    Give ``rank`` or ``ratio``. Without ``include`` this takes every weight of linear, convolution,
    embedding, recurrent and attention modules that can be factorized; what cannot is listed in
    the plan, and is an error only where it was named. Weights keep dtype, device and
    ``requires_grad``; make the optimizer afterwards. An error leaves the model as it was.

    Args:
        model: any module.
        rank: r for all, an int or a float fraction of min(m, n), which may exceed 1; or a dict
            from selectors to ranks, where the exact name of a weight wins, then the first match;
            or a plan of ``plan_ranks``. Obeyed also where it does not pay.
        ratio: parameters to keep ÷ all parameters of the model; see ``plan_ranks``.
        include: selectors: exact names of modules or parameters, globs, compiled regular
            expressions, module types, predicates(name, module), or a list of those. Other
            modules' parameters have to be spelled; see ``modules/selection.py``.
        exclude: selectors of what stays dense.
        parametrization: called as ``parametrization(rank, pattern=…, axes=…, init=…)``. Settings
            of your own go in a ``functools.partial``, and win: ``partial(LowRank, depth=1)``, or
            ``partial(LowRank, pattern="o i kh kw -> o (i kh kw)")``; a pattern is for weights with
            that many dimensions, others keep their default. "channel" and "spatial" are patterns
            for all convolutions.
        init: "spectral", or another initialization; see ``LowRank``.

    Returns:
        The plan that was executed; prints as a table, with the error of the initialization.

    Raises:
        TypeError, ValueError: as ``plan_ranks``; also for data-parallel wrappers, weights on the
            meta device, and NaN.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> factorize(model, rank=4).ranks
        {'0.weight': 4}
        >>> list(model.state_dict())
        ['0.bias', '0.parametrizations.weight.original0', '0.parametrizations.weight.original1']
    """
    check_unwrapped(model, "factorize")
    options = {"init": init}
    found = plan_entries(model, ratio, rank, None, include, exclude, parametrization, options)
    before = sum(parameter.numel() for parameter in model.parameters())
    chosen = [entry for entry in found if entry.rank is not None]
    for entry in chosen:
        _check_material(entry)
    errors: dict[int, float] = {}
    with transaction([entry.weight.module for entry in chosen]):
        for entry in chosen:
            errors[id(entry)] = _register(entry)
        settle_recurrent([entry.weight.module for entry in chosen])
    rows = tuple(entry.row(errors.get(id(entry))) for entry in found)
    return RankPlan(rows, before, before + sum(row.after - row.before for row in rows))


def _check_material(entry: Entry) -> None:
    tensor = entry.weight.tensor
    if tensor is not None and tensor.is_meta:
        check_values(entry.weight)


def _register(entry: Entry) -> float:
    """Put the factors in the weight's place; return the relative error."""
    weight, module = entry.weight, entry.weight.module
    dense = weight.tensor
    assert dense is not None
    assert entry.make is not None
    assert entry.rank is not None
    made = entry.make(entry.rank)
    made.order = _order(module)
    try:
        register_parametrization(module, weight.attribute, made)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{weight.name}: {error}") from error
    with torch.no_grad():
        return _relative_error(dense, getattr(module, weight.attribute))


def _order(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's parameters while all were dense."""
    if is_parametrized(module):
        for held in module.parametrizations.values():  # type: ignore[operator]
            if getattr(held[0], "order", ()):
                return tuple(held[0].order)
    return tuple(module._parameters)


def _relative_error(dense: Tensor, product: Tensor) -> float:
    """‖W − UVᵀ‖_F / ‖W‖_F, in float32 at least."""
    work = torch.promote_types(dense.dtype, torch.float32)
    formed = product.materialize() if hasattr(product, "materialize") else product
    norm = torch.linalg.vector_norm(dense, dtype=work)
    return float(torch.linalg.vector_norm(dense.to(work) - formed.to(work)) / norm)


def products(model: nn.Module) -> list[Product]:
    """List the products of a model, in module order, each once.

    These are the factorized weights, named like the dense weight, and what the providers of
    ``register_products`` find.

    Raises:
        ValueError: another parametrization on top of a factorized weight, so that the weight is
            not the product.
        TypeError: a provider returned something else than products.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> _ = factorize(model, rank=2)
        >>> [(product.name, product.shape) for product in products(model)]
        [('0.weight', (4, 6))]
    """
    seen: set[int] = set()
    found: dict[object, Product] = {}
    for path, module in modules(model).items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        for product in (*_provided(module, path), *_parametrized(module, path)):
            found.setdefault(_identity(product), product)
    return list(found.values())


def _identity(product: Product) -> object:
    """Two records of the same factors are the same product."""
    return tuple((id(f.param), f.pattern, f.axes, f.index) for f in product.factors)


def _parametrized(module: nn.Module, path: str) -> Iterable[Product]:
    for attribute, held in factorized(module).items():
        name = f"{path}.{attribute}".lstrip(".")
        if len(held) > 1:
            raise ValueError(
                f"{name} has {type(held[1]).__name__} on top of {type(held[0]).__name__}: the "
                "weight is not the product of the factors; remove one of the two"
            )
        yield held[0].product(name, held)


def _provided(module: nn.Module, path: str) -> list[Product]:
    """What the nearest provider along the class hierarchy yields, a user's before ours."""
    for table in (_USERS, _OWN):
        for kind in type(module).__mro__:
            provider = table.get(kind) or table.get(f"{kind.__module__}.{kind.__qualname__}")
            if provider is not None:
                return _checked(provider, list(provider(module, path)))
    return []


def _checked(provider: Provider, found: list[Product]) -> list[Product]:
    for product in found:
        if not isinstance(product, Product):
            raise TypeError(f"expected {provider!r} to yield Product records, got {product!r}")
    return found


def register_products(type_or_qualified_name: type | str) -> Callable[[Provider], Provider]:
    """Register a function that finds the products in modules of one type; a decorator.

    Use it for modules that already are factored. Subclasses inherit; a later registration for the
    same type takes the place of the earlier one, and one of yours that of frobdecay's own.

    Args:
        type_or_qualified_name: the class, or "package.module.Class", which is never imported.

    Returns:
        A decorator for ``provider(module, name) -> iterable of Product``; ``name`` is the
        module's qualified name, to be put before the product's own.

    Raises:
        TypeError: neither a class nor a dotted name.

    Example:
        >>> import torch
        >>> from frobdecay.product import Factor, Product
        >>> class Pair(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = torch.nn.Linear(2, 8, bias=False)
        ...         self.down = torch.nn.Linear(6, 2, bias=False)
        >>> @register_products(Pair)
        ... def pair(module, name):
        ...     up = Factor(module.up, "weight")
        ...     yield Product(f"{name}.pair", (up, Factor(module.down, "weight", "r n -> n r")))
        >>> [(product.name, product.shape) for product in products(torch.nn.Sequential(Pair()))]
        [('0.pair', (8, 6))]
    """
    key = type_or_qualified_name
    if not (isinstance(key, type) or (isinstance(key, str) and "." in key)):
        raise TypeError(f"expected a class or 'package.module.Class', got {key!r}")

    def decorate(provider: Provider) -> Provider:
        if not callable(provider):
            raise TypeError(f"expected a provider(module, name), got {provider!r}")
        _USERS[key] = provider
        return provider

    return decorate
