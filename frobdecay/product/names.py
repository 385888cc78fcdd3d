"""What things in a model are called, and which names a selector means.

A selector is an exact name, a glob, a compiled regular expression, a type or a predicate; it is
matched here, whether weights are chosen by it or products (``pick``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from frobdecay.product.holding import lists_of
from frobdecay.product.product import Product

One = str | re.Pattern[str] | type | Callable[[str, nn.Module], bool]


Selector = One | Sequence[One]


OneProduct = str | re.Pattern[str] | Callable[[str, Product], bool]


ProductSelector = OneProduct | Sequence[OneProduct]


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


_GLOB = re.compile(r"[*?\[]")


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """List all modules by qualified name, shared ones under every name; see ``walk``."""
    return dict(walk(model))


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Qualified names and modules, wrappers before what they wrap.

    The segments that wrappers add (``torch.compile``, checkpointing, data parallel) are left out,
    and so are the modules inside parametrizations.
    """
    yield path, module
    parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    for name, child in module._modules.items():
        fixed = isinstance(child, torch.jit.ScriptModule)  # its weights are part of its code
        if child is None or fixed or (name == "parametrizations" and lists_of(module)):
            continue
        transparent = name in _WRAPPERS or (parallel and name == "module")
        yield from walk(child, path if transparent else f"{path}.{name}".lstrip("."))


def strip_wrappers(name: str) -> str:
    """Leave out the segments of a qualified name that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put a name before what an error says, whatever its type wants to be made of."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        error.args = (f"{what}: {error}",)
        raise


def pick(
    found: Sequence[Product],
    include: ProductSelector | None = None,
    exclude: ProductSelector | None = None,
) -> list[Product]:
    """Choose products by name.

    Args:
        found: all products.
        include: exact names, globs, compiled regular expressions, predicates(name, product), or
            a list of those; by default everything.
        exclude: what to leave out of that.

    Raises:
        TypeError: a selector of an unknown kind.
        ValueError: a selector that matches nothing.
    """
    taken = set(range(len(found))) if include is None else _picked(found, include, "include")
    left = set() if exclude is None else _picked(found, exclude, "exclude")
    return [product for k, product in enumerate(found) if k in taken - left]


def _picked(found: Sequence[Product], selector: ProductSelector, what: str) -> set[int]:
    """Positions of the products that any of the selectors takes."""
    taken: set[int] = set()
    names = [product.name for product in found]
    for one in each(selector, what):  # type: ignore[arg-type]
        if isinstance(one, type):
            raise TypeError(f"expected {what} to choose products by name, got the type {one!r}")
        if isinstance(one, str | re.Pattern):
            met = {k for k, name in enumerate(names) if fits(one, name)}
            near = f"; {near_names(one, names)}"
        else:
            met = {k for k, product in enumerate(found) if one(product.name, product)}  # type: ignore[arg-type]
            near = f"; it is called with names such as {names[:5]} and the product"
        if not met:
            raise ValueError(f"{what}={shown(one)} takes no product{near}")
        taken |= met
    return taken


def each(selector: Selector, what: str) -> list[One]:
    """The selectors as a list, each of a known kind, names without wrappers' segments."""
    several = isinstance(selector, list | tuple | set | frozenset)
    listed: list[Any] = list(selector) if several else [selector]  # type: ignore[arg-type]
    for one in listed:
        if not (isinstance(one, str | re.Pattern | type) or callable(one)):
            raise TypeError(
                f"expected {what} to be a name, a glob, a compiled regular expression, a module "
                f"type, a predicate(name, module), or a list of those, got {one!r}"
            )
    return [strip_wrappers(one) if isinstance(one, str) else one for one in listed]


def is_plain(one: One) -> bool:
    """Whether a selector is a name, and no pattern of names."""
    return isinstance(one, str) and not _GLOB.search(one)


def fits(one: str | re.Pattern[str], name: str) -> bool:
    """Whether a name, a glob or a regular expression takes a name, from end to end."""
    if isinstance(one, re.Pattern):
        return one.fullmatch(name) is not None
    return one == name or (bool(_GLOB.search(one)) and fnmatchcase(name, one))


def shown(one: One) -> str:
    """A selector as messages show it."""
    return one.__name__ if isinstance(one, type) else repr(one)


def near_names(one: str | re.Pattern[str], names: list[str]) -> str:
    """What a selector that takes nothing may have meant, for messages."""
    text = one if isinstance(one, str) else one.pattern
    near = get_close_matches(text, names, n=3, cutoff=0.5)
    if near:
        return f"near matches: {', '.join(near)}"
    return f"the model's names are {names[:8]}{' …' if len(names) > 8 else ''}"
