"""What things in a model are called, and which names a selector means.

A selector is an exact name, a glob, a compiled regular expression, a type or a predicate; it is
matched here, whether weights are chosen by it, products (``pick``) or parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

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


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Qualified names and modules, shared ones under every name, wrappers before what they wrap.

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


def around(name: str) -> tuple[str, ...]:
    """What the modules around a name are called, the root, "", first."""
    parts = name.split(".")
    return tuple(".".join(parts[:k]) for k in range(len(parts)))


class Named(NamedTuple):
    """Something in a model that selectors may mean.

    Attributes:
        names: all that it is called.
        above: what the modules around it are called.
        value: what a predicate is asked about, beside a name.
    """

    names: tuple[str, ...]
    above: tuple[str, ...]
    value: Any


class Choice:
    """Which of some named things a selector takes: the one matcher of names.

    Args:
        things: what there is.
        tree: name -> module, for selectors by type and for names of what holds none of the things.
        nothing: what messages say is matched where nothing is.
    """

    def __init__(
        self, things: Sequence[Named], tree: Mapping[str, nn.Module], nothing: str = "nothing"
    ) -> None:
        self.things, self.tree, self.nothing = things, tree, nothing
        self._named: dict[str, list[int]] = {}
        for i, thing in enumerate(things):
            for name in {*thing.names, *thing.above} - {""}:
                self._named.setdefault(name, []).append(i)

    def taking(self, one: One, among: Iterable[int] | None = None) -> list[int]:
        """Positions of what a selector takes, in order.

        Args:
            one: a plain name is looked up, so that many of them take no longer.
            among: positions that a predicate is asked about; all unless given.
        """
        if isinstance(one, type):
            up = {name for name, module in self.tree.items() if isinstance(module, one)}
            return [i for i, thing in enumerate(self.things) if not up.isdisjoint(thing.above)]
        if isinstance(one, str) and not _GLOB.search(one):
            return self._named.get(one, [])
        if isinstance(one, str | re.Pattern):
            return sorted({i for name, at in self._named.items() if fits(one, name) for i in at})
        every = range(len(self.things)) if among is None else among
        return [i for i in every if any(one(n, self.things[i].value) for n in self.things[i].names)]

    def met(self, one: One, what: str, among: Iterable[int] | None = None) -> list[int]:
        """As ``taking``, but a selector has to match something.

        Raises:
            ValueError: a selector that takes none, and that no module is called or typed like.
        """
        if (found := self.taking(one, among)) or self._is_module(one):
            return found
        if isinstance(one, type):
            kinds = sorted({type(module).__name__ for module in self.tree.values()})
            hint = f"no module; the model has {kinds}"
        elif isinstance(one, str | re.Pattern):
            names = [*filter(None, self.tree), *(name for t in self.things for name in t.names)]
            hint = f"{self.nothing}; {near_names(one, names)}"
        else:
            every = self.things if among is None else [self.things[i] for i in among]
            asked = [thing.names[0] for thing in every][:5]
            kind = type(every[0].value).__name__ if every else "thing"
            hint = f"{self.nothing}; it is called with names such as {asked} and a {kind}"
        raise ValueError(f"{what}={shown(one)} matches {hint}")

    def _is_module(self, one: One) -> bool:
        if isinstance(one, type):
            return any(isinstance(module, one) for module in self.tree.values())
        names = filter(None, self.tree) if isinstance(one, str | re.Pattern) else ()
        return any(fits(one, name) for name in names)  # type: ignore[arg-type]


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
    choice = Choice([Named((product.name,), (), product) for product in found], {}, "no product")
    several = each(selector, what)  # type: ignore[arg-type]
    for one in several:
        if isinstance(one, type):
            raise TypeError(f"expected {what} to choose products by name, got the type {one!r}")
    return {k for one in several for k in choice.met(one, what)}


def each(selector: Selector, what: str) -> list[One]:
    """The selectors as a list, each of a known kind, names without wrappers' segments."""
    several = isinstance(selector, list | tuple | set | frozenset)
    listed: list[Any] = list(selector) if several else [selector]  # type: ignore[arg-type]
    for one in listed:
        if isinstance(one, nn.Module) or not (isinstance(one, str | re.Pattern) or callable(one)):
            raise TypeError(
                f"expected {what} to be a name, a glob, a compiled regular expression, a module "
                f"type, a predicate(name, module), or a list of those, got {one!r}"
            )
    return [strip_wrappers(one) if isinstance(one, str) else one for one in listed]


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


def factor_name(product: Product, j: int) -> str:
    """What messages call factor ``j`` of a product."""
    return f"factor {j} ({product.factors[j].attribute}) of {product.name!r}"
