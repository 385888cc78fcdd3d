"""Factorize models, and find their products.

``factorize`` registers a parametrization on every chosen weight, or on none: an error on the way
leaves the model as it was. ``products`` lists what there is to decay: the factorized weights, and
what providers registered with ``register_products`` find in other people's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from frobdecay.algebra.scaling import relative_distance
from frobdecay.algebra.spectral import Init
from frobdecay.forms.product_tensor import ProductTensor
from frobdecay.holding import check_module, lists_of, register_parametrization
from frobdecay.modules.candidates import Entry, OnTied
from frobdecay.modules.progress import Progress
from frobdecay.modules.restoring import restorable
from frobdecay.modules.selection import ProductSelector, Selector, modules, pick
from frobdecay.modules.stacking import Stacks
from frobdecay.modules.support import check_unwrapped, check_values
from frobdecay.modules.surgery import (
    factorized,
    ordinary,
    settle_encoders,
    settle_recurrent,
    transaction,
)
from frobdecay.modules.untying import forget_ties, other_ties, untie
from frobdecay.parametrizations import LowRank
from frobdecay.plan import RankPlan
from frobdecay.product import Product, as_products
from frobdecay.providers.attention import ATTENTION
from frobdecay.providers.lora import LORA
from frobdecay.ranks import RankRule, plan_entries, planned, size

Provider = Callable[[nn.Module, str], Iterable[Product]]

_OWN: dict[type | str, Provider] = {**ATTENTION}
_USERS: dict[type | str, Provider] = {}


@ordinary("factorize")
def factorize(
    model: nn.Module,
    rank: RankRule | None = None,
    *,
    ratio: float | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    parametrization: Callable[..., nn.Module] = LowRank,
    init: str | Init = "spectral",
    on_tied: OnTied = "skip",
    progress: bool | None = None,
) -> RankPlan:
    """Replace dense weights by products of factors, in place.

    Give ``rank`` or ``ratio``. Without ``include`` this takes every weight of linear, convolution,
    embedding, recurrent and attention modules, and of transformers' Conv1D and expert stacks, that
    can be factorized; what cannot is listed in the plan, as are PEFT's adapters and parameters of
    other modules with two dimensions or more, and is an error only where it was named. Weights
    keep dtype, device and ``requires_grad``; make the optimizer afterwards. An error leaves the
    model as it was.

    Args:
        model: any module.
        rank: r for all, an int or a float fraction of min(m, n), which may exceed 1; or a dict
            from selectors to ranks, where the exact name of a weight wins, then that of its module,
            then the first match; or a plan of ``plan_ranks``. Obeyed also where it does not pay.
            Parametrizations of tensors also take a list, one for each mode or bond.
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
        on_tied: what to do with weights that several modules share: "skip" leaves them dense and
            lists them, an error only where they were named; "error" refuses all; "untie" gives
            each that was chosen a copy of its own, which counts as the model's, and which a
            transformers model does not tie again.
        progress: True for a progress bar (needs rich), False for none. By default there is one
            after a second, on a terminal, where rich is installed.

    Returns:
        The plan that was executed; prints as a table, with the error of the initialization.

    Raises:
        TypeError, ValueError: as ``plan_ranks``; also for data-parallel wrappers, weights on the
            meta device, and NaN.
        ImportError: ``progress=True`` without rich.
        RuntimeError: an initialization that fails.

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
    found = plan_entries(
        model, ratio, rank, None, include, exclude, parametrization, options, on_tied
    )
    before = size(model, found)
    chosen = [entry for entry in found if entry.rank is not None]
    untied = [entry for entry in found if entry.untied]
    for entry in chosen:
        _check_material(entry)
    errors: dict[int, float] = {}
    others = other_ties(model, untied)
    work = sum(map(_work, chosen))
    touched = [entry.weight.module for entry in [*chosen, *untied]]
    with Progress(work, progress, "factorizing") as bar, transaction(touched):
        stacks = Stacks(chosen)
        for entry in chosen:
            errors[id(entry)] = _register(entry, stacks)
            bar.advance(_work(entry))
        for entry in untied:
            if entry.rank is None:  # factors are a copy already
                untie(entry)
        settle_recurrent([entry.weight.module for entry in chosen])
        restorable([entry.weight.module for entry in chosen])
    forget_ties(others)
    settle_encoders(model)
    return planned(found, before, errors)


def _work(entry: Entry) -> float:
    """The time of a decomposition, in a unit of its own: m·n·min(m, n)."""
    assert entry.view is not None
    return entry.dense * min(entry.view.matrix_shape[len(entry.view.batch) :])


def _check_material(entry: Entry) -> None:
    tensor = entry.weight.tensor
    if tensor is not None and tensor.is_meta:
        check_values(entry.weight)


def _register(entry: Entry, stacks: Stacks) -> float:
    """Put the factors in the weight's place; return the relative error."""
    weight, module = entry.weight, entry.weight.module
    dense = weight.tensor
    assert dense is not None

    def register(made: Any) -> None:
        made.order = parameter_order(module)
        register_parametrization(module, weight.attribute, made)

    try:
        stacks.with_factors(entry, register)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{weight.name}: {error}") from error
    with torch.no_grad():
        return relative_error(dense, getattr(module, weight.attribute))


def parameter_order(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's parameters while all were dense."""
    for held in lists_of(module).values():
        if getattr(held[0], "order", ()):
            return tuple(held[0].order)
    return tuple(module._parameters)


def relative_error(dense: Tensor, product: Tensor) -> float:
    """‖W − UVᵀ‖_F / ‖W‖_F, in float32 at least, of a factored weight or of a dense one."""
    if isinstance(product, ProductTensor):
        return relative_distance(product.matricization.matrix(dense), product.factors)
    rows = dense.reshape(len(dense), -1)
    return relative_distance(rows, [product.reshape(rows.shape)])


def products(
    model: nn.Module,
    *,
    include: ProductSelector | None = None,
    exclude: ProductSelector | None = None,
    lora: Literal["delta", "full"] = "delta",
) -> list[Product]:
    """List the products of a model, in module order, each once.

    These are the factorized weights, named like the dense weight; of dense attention the
    query–key and output–value products, "….query_key" and "….output_value" (see
    ``providers/attention.py``); of LoRA layers of PEFT what their active adapters add to the
    weight, "….<adapter>" (see ``providers/lora.py``); and what the providers of
    ``register_products`` find.

    Args:
        model: any module.
        include: which products, by name: exact names, globs, compiled regular expressions,
            predicates(name, product), or a list of those; all unless given.
        exclude: which of them not.
        lora: "delta" for the product s·BA of each active adapter, "full" for the sum W₀ + s·BA,
            "….weight", which decays to zero instead of to the pretrained weight W₀.

    Raises:
        ValueError: a selector that matches no product; another parametrization on top of a
            factorized weight, so that the weight is not the product; attention whose weights do
            not have the numbers and sizes of heads that its attributes say; adapters that are
            merged or whose update is not s·BA, and for "full" a W₀ that is not dense.
        TypeError: a selector of an unknown kind; a provider returned something else than products.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> _ = factorize(model, rank=2)
        >>> [(product.name, product.shape) for product in products(model)]
        [('0.weight', (4, 6))]
    """
    check_module(model)
    if lora not in LORA:
        raise ValueError(f"expected lora to be one of {list(LORA)}, got {lora!r}")
    tables = (_USERS, {**_OWN, **LORA[lora]})
    seen: set[int] = set()
    found: list[Product] = []
    for path, module in modules(model).items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        found += [*_provided(module, path, tables), *_parametrized(module, path)]
    return pick(as_products(found), include, exclude)


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
        >>> from frobdecay.factor import Factor
        >>> from frobdecay.product import Product
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
