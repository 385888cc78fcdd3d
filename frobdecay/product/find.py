"""Find the products of a model: what there is to decay.

These are the factorized weights, and what providers find in other people's modules: ours, and
those that users register with ``register_products``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from frobdecay.product.attention import ATTENTION
from frobdecay.product.holding import check_module, factorized
from frobdecay.product.lora import LORA
from frobdecay.product.names import ProductSelector, pick, walk
from frobdecay.product.product import Product, as_products
from frobdecay.product.toward import Toward
from frobdecay.product.toward import toward as decaying_toward


class Version:
    """A counter that moves whenever a weight is factorized, merged or unrolled.

    It lets an optimizer that was built earlier notice cheaply that it may hold stale parameters.
    """

    def __init__(self) -> None:
        self.value = 0

    def bump(self) -> None:
        """Count one change."""
        self.value += 1


VERSION = Version()


Provider = Callable[[nn.Module, str], Iterable[Product]]

_OWN: dict[type | str, Provider] = {**ATTENTION}
_USERS: dict[type | str, Provider] = {}


def products(
    model: nn.Module,
    *,
    include: ProductSelector | None = None,
    exclude: ProductSelector | None = None,
    lora: Literal["delta", "full"] = "delta",
    toward: Toward | None = None,
) -> list[Product]:
    """List the products of a model, in module order, each once.

    Examples:
        >>> import frobdecay
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> _ = frobdecay.factorize(model, rank=2)
        >>> [(product.name, product.shape) for product in products(model)]
        [('0.weight', (4, 6))]

    These are the factorized weights, named like the dense weight; of dense attention the
    query–key and output–value products, "….query_key" and "….output_value" (see
    ``attention.py``); of LoRA layers of PEFT what their active adapters add to the weight,
    "….<adapter>" (see ``lora.py``); and what the providers of ``register_products`` find.

    Args:
        model: any module.
        include: which products, by name: exact names, globs, compiled regular expressions,
            predicates(name, product), or a list of those; all unless given.
        exclude: which of them not.
        lora: "delta" for the product s·BA of each active adapter, "full" for the sum W₀ + s·BA,
            "….weight", which decays to zero instead of to the pretrained weight W₀.
        toward: what W decays to, instead of zero: "initial" for what the factors are now, which
            the products keep a copy of; or dense weights by the products' names (a ``state_dict``,
            or the dense model itself), which are kept as they are, without a copy.

    Raises:
        ValueError: a selector that matches no product; another parametrization on top of a
            factorized weight, so that the weight is not the product; attention whose weights do
            not have the numbers and sizes of heads that its attributes say; adapters that are
            merged or whose update is not s·BA, and for "full" a W₀ that is not dense; no dense
            weight of a product's name and shape to decay toward.
        TypeError: a selector of an unknown kind; a provider returned something else than products.
    """
    check_module(model)
    if lora not in LORA:
        raise ValueError(f"expected lora to be one of {list(LORA)}, got {lora!r}")
    tables = (_USERS, {**_OWN, **LORA[lora]})
    first: dict[int, tuple[nn.Module, str]] = {}
    for path, module in dict(walk(model)).items():
        first.setdefault(id(module), (module, path))
    found = [
        product
        for one in first.values()
        for product in (*_provided(*one, tables), *_parametrized(*one))
    ]
    chosen = pick(as_products(found), include, exclude)
    return chosen if toward is None else decaying_toward(chosen, toward)


def _parametrized(module: nn.Module, path: str) -> Iterable[Product]:
    for attribute, held in factorized(module).items():
        name = f"{path}.{attribute}".lstrip(".")
        if len(held) > 1:
            raise ValueError(
                f"{name} has {type(held[1]).__name__} on top of {type(held[0]).__name__}: the "
                "weight is not the product of the factors; remove one of the two"
            )
        yield held[0].product(name, held)


def _provided(
    module: nn.Module, path: str, tables: Sequence[Mapping[type | str, Provider]]
) -> list[Product]:
    """What the nearest provider along the class hierarchy yields, of the first table with one."""
    for table in tables:
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

    Examples:
        >>> import torch
        >>> from frobdecay.product.factor import Factor
        >>> from frobdecay.product.product import Product
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

    Use it for modules that already are factored. Subclasses inherit; a later registration for the
    same type takes the place of the earlier one, and one of yours that of frobdecay's own.

    Args:
        type_or_qualified_name: the class, or "package.module.Class", which is never imported.

    Returns:
        A decorator for ``provider(module, name) -> iterable of Product``; ``name`` is the
        module's qualified name, to be put before the product's own.

    Raises:
        TypeError: neither a class nor a dotted name.
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
