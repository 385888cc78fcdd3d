"""Find the products of a model: what there is to decay.

These are the factorized weights, and what providers find in other people's modules: ours, and
those that users register with ``register_products``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from torch import nn

from frobdecay.product.attention import ATTENTION, LeftAlone
from frobdecay.product.holding import check_module, factorized
from frobdecay.product.lora import LORA
from frobdecay.product.names import ProductSelector, pick, walk
from frobdecay.product.product import Product, as_products
from frobdecay.product.toward import Toward
from frobdecay.product.toward import toward as decaying_toward

Provider = Callable[[nn.Module, str], Iterable[Product | LeftAlone]]

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
    "….<adapter>" (see ``lora.py``); and what the providers of ``register_products`` find. Which
    attention was left alone, and why, says ``left_alone``, and ``explain(model)`` with it.

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
    found = [
        product
        for module, path in _modules(model)
        for product in (*_provided(module, path, tables), *_parametrized(module, path))
        if isinstance(product, Product)
    ]
    chosen = pick(as_products(found), include, exclude)
    return chosen if toward is None else decaying_toward(chosen, toward)


def left_alone(model: nn.Module) -> list[LeftAlone]:
    """List the attention of a model in which ``products`` finds no products, and why.

    Examples:
        >>> import torch
        >>> class LatentAttention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.down, self.up = torch.nn.Linear(8, 2), torch.nn.Linear(2, 8)
        >>> for name, reason in left_alone(torch.nn.Sequential(LatentAttention())):
        ...     print(name, reason.split(" (")[0])
        0 no layout is known for LatentAttention

    Attention of a type that is not known is told by the type's name, and nothing is guessed; of
    one that is known, products are listed of which a weight is not what the layer multiplies with.

    Args:
        model: any module.

    Returns:
        (name, reason) of modules, and of products that are not there.
    """
    check_module(model)
    found: list[LeftAlone] = []
    unknown: dict[str, nn.Module] = {}
    above: list[str] = []  # attention that is known: what lies in it is part of it
    for module, path in _modules(model):
        if _provider(module, (_USERS, _OWN)) is not None:
            above.append(path)
            made = _provided(module, path, (_USERS, _OWN))
            found += [one for one in made if isinstance(one, LeftAlone)]
        elif _is_attention(module) and not any(_within(path, one) for one in above):
            unknown[path] = module
    inner = [*unknown, *above]
    found += [
        LeftAlone(path, _UNKNOWN.format(type(module)))
        for path, module in unknown.items()
        if not any(path != other and _within(other, path) for other in inner)
    ]
    return found


_UNKNOWN = (
    "no layout is known for {0.__name__} ({0.__module__}); if it is products of weights, say "
    "where they are with frobdecay.register_products"
)


NAMED = re.compile(r"att(entio)?n(?!.*(Output|Loss|Cell)$)", re.IGNORECASE)
"""What types of attention are called."""


def _is_attention(module: nn.Module) -> bool:
    """By its type's name, if it holds a matrix in itself or in a layer of its own."""
    owners = (module, *module.children())
    return bool(NAMED.search(type(module).__name__)) and any(
        p.ndim > 1 for owner in owners for p in owner._parameters.values() if p is not None
    )


def _within(path: str, other: str) -> bool:
    """Whether a module is another one or lies in it."""
    return path == other or other == "" or path.startswith(f"{other}.")


def _modules(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """All modules, each once, under its first name."""
    first: dict[int, tuple[nn.Module, str]] = {}
    for path, module in dict(walk(model)).items():
        first.setdefault(id(module), (module, path))
    yield from first.values()


def _parametrized(module: nn.Module, path: str) -> Iterable[Product]:
    for attribute, held in factorized(module).items():
        name = f"{path}.{attribute}".lstrip(".")
        if len(held) > 1:
            raise ValueError(
                f"{name} has {type(held[1]).__name__} on top of {type(held[0]).__name__}: the "
                "weight is not the product of the factors; remove one of the two"
            )
        yield held[0].product(name, held)


def _provider(
    module: nn.Module, tables: Sequence[Mapping[type | str, Provider]]
) -> Provider | None:
    """The nearest one along the class hierarchy, of the first table with one."""
    for table in tables:
        for kind in type(module).__mro__:
            provider = table.get(kind) or table.get(f"{kind.__module__}.{kind.__qualname__}")
            if provider is not None:
                return provider
    return None


def _provided(
    module: nn.Module, path: str, tables: Sequence[Mapping[type | str, Provider]]
) -> list[Product | LeftAlone]:
    """What the provider of a module yields."""
    provider = _provider(module, tables)
    found = [] if provider is None else list(provider(module, path))
    for product in found:
        if not isinstance(product, Product | LeftAlone):
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
