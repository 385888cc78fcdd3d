r"""Which weights of a model are meant, and which of those can be factorized.

``include`` and ``exclude`` take one selector or a list of them:

    "layer1.0.conv1"          the exact name of a module (with all below it) or of a parameter
    "layer?.*.conv1"          a glob on either; ``*`` also crosses dots
    re.compile(r"fc\d")        a compiled regular expression that matches either from end to end
    nn.Conv2d                 a module type (with all below it)
    lambda name, module: …    a predicate on a weight's name and the module that holds it

A weight of a module type that is not in the table of ``weights/layouts.py`` is taken only where it
is asked for: by its own exact name, by a pattern that spells it (``"*.experts.up"``, not ``"*"``),
or by the exact name or the type of the very module that holds it. Others that a selector comes
across are listed, so that nothing of two dimensions or more is passed over in silence.

Names are matched in ``product/names.py``, which chooses products likewise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from frobdecay.product.holding import check_module, factorized, lists_of
from frobdecay.product.names import One, Selector, each, fits, is_plain, near_names, shown, walk
from frobdecay.weights.layouts import Layout, layouts

_NONSENSE = "\0"  # an attribute that no pattern spells


@dataclass(frozen=True)
class Weight:
    """A weight of a model, factorized or not.

    Attributes:
        paths: qualified names of the module that holds it; several where the module is shared.
        module: that module.
        attribute: the weight's name there.
        known: whether it is factorized by default: the module's type is in the table.
        named: whether a selector gave exactly this weight's or this module's name.
        excluded: whether it was taken and then left out again.
        met: whether a selector that takes known types only came across it; it stays dense.
    """

    paths: tuple[str, ...]
    module: nn.Module
    attribute: str
    known: bool
    named: bool = False
    excluded: bool = False
    met: bool = False

    @property
    def name(self) -> str:
        """The qualified name, as in the dense model's ``state_dict``."""
        return self.names[0]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All qualified names."""
        return tuple(f"{path}.{self.attribute}" if path else self.attribute for path in self.paths)

    @cached_property
    def above(self) -> tuple[str, ...]:
        """Qualified names of the module that holds it and of all around it; the root's is ""."""
        parts = [path.split(".") for path in self.paths if path]
        ups = [".".join(names[:k]) for names in parts for k in range(1, len(names) + 1)]
        return ("", *dict.fromkeys(ups))

    @property
    def tensor(self) -> Tensor | None:
        """The parameter, unless it is none."""
        return self.module._parameters.get(self.attribute)

    @property
    def layout(self) -> Layout | None:
        """How its module type's weight is read as a matrix, if the type is known."""
        return layouts(self.module).get(self.attribute)


class Walk:
    """What one walk over a model finds; it is handed to whoever asks for a part.

    Attributes:
        model: the root; names are relative to it.
        all: names and modules, wrappers and what they wrap under one name.
        modules: name -> module, without wrappers.
        weights: the parameters once each, in module order, factorized ones too.

    Raises:
        TypeError: it is no model.
    """

    def __init__(self, model: nn.Module) -> None:
        check_module(model)
        self.model = model
        self.all = list(walk(model))
        self.modules = dict(self.all)
        paths: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            paths.setdefault(id(module), []).append(path)
        self.weights = [
            Weight(tuple(paths[key]), module, attribute, known)
            for key, module in {id(module): module for module in self.modules.values()}.items()
            for attribute, known in _attributes(module).items()
        ]

    @property
    def factorized(self) -> list[Weight]:
        """Those of the weights that are products."""
        return [one for one in self.weights if one.attribute in factorized(one.module)]


def _attributes(module: nn.Module) -> dict[str, bool]:
    """Weights by the table, factorized ones and packed ones -> True, other parameters -> False."""
    table = layouts(module)
    present = [name for name, parameter in module._parameters.items() if parameter is not None]
    # Hooks such as weight_norm's write plain attributes; quantized modules have methods.
    held = {*present, *lists_of(module), *module._buffers, *module.__dict__}
    packed = ["weight"] if callable(getattr(type(module), "weight", None)) else []
    known = [name for name in table if name in held] + [*lists_of(module)] + packed
    return {**dict.fromkeys(known, True), **{name: name in known for name in present}}


def select(
    walk: Walk, include: Selector | None = None, exclude: Selector | None = None
) -> list[Weight]:
    """Choose weights.

    Args:
        walk: over the model.
        include: what to take; by default all weights of the module types in the table.
        exclude: what to leave out of that.

    Returns:
        Everything included, in module order, with what was left out again marked, and matrices
        of other modules that were ``met``.

    Raises:
        TypeError: a selector of an unknown kind.
        ValueError: a selector that matches nothing.
    """
    tree, found = walk.modules, walk.weights
    where = Index(found)
    taken = {i: False for i, weight in enumerate(found) if weight.known}
    met: set[int] = set(range(len(found)))
    if include is not None:
        those = each(include, "include")
        taken = _union(_included(tree, where, one) for one in those)
        met = {i for one in those for i in _met(tree, where, one)}
    out = each(exclude, "exclude") if exclude is not None else []
    for one in out:
        check_met(tree, where, one, "exclude")
    left = {i for one in out for i in where.matching(tree, one, loose=True)}
    return [
        replace(weight, named=taken.get(i, False), met=i not in taken, excluded=i in left)
        for i, weight in enumerate(found)
        if i in taken or (i in met and _is_matrix(weight))
    ]


class Index:
    """Where a selector can match: a plain name is looked up, so that many of them take no longer.

    Args:
        found: all weights.
    """

    def __init__(self, found: Sequence[Weight]) -> None:
        self.found = found
        self._every = range(len(found))
        self._named: dict[str, list[int]] = {}
        for i, weight in enumerate(found):
            for name in {*weight.names, *weight.above}:
                self._named.setdefault(name, []).append(i)

    def holds(self, one: One) -> bool:
        """Whether a selector is a plain name, of a weight or of a module around one."""
        return is_plain(one) and one in self._named

    def matching(self, tree: dict[str, nn.Module], one: One, loose: bool = False) -> Iterator[int]:
        """Positions of the weights that a selector takes (see ``matches``), in order."""
        near = self._named.get(str(one), ()) if is_plain(one) else self._every
        return (i for i in near if matches(tree, self.found[i], one, loose))


def _union(parts: Iterable[dict[int, bool]]) -> dict[int, bool]:
    named: dict[int, bool] = {}
    for part in parts:
        for i, exactly in part.items():
            named[i] = named.get(i, False) or exactly
    return named


def _met(tree: dict[str, nn.Module], where: Index, one: One) -> Iterator[int]:
    """Indices of what a name, a pattern or a type comes across, of unknown types too."""
    if isinstance(one, str | re.Pattern | type):
        yield from where.matching(tree, one, loose=True)


def _included(tree: dict[str, nn.Module], where: Index, one: One) -> dict[int, bool]:
    """Index of every weight that one selector takes -> whether it was named exactly."""
    met = {i: names_exactly(where.found[i], one) for i in where.matching(tree, one)}
    if not met:
        check_met(tree, where, one, "include")
        raise ValueError(
            f"include={shown(one)} matches no weight that can be factorized: what it matches has "
            "only vectors, or is of a module type without a known layout; name a parameter with "
            "two or more dimensions"
        )
    return met


def names_exactly(weight: Weight, one: One) -> bool:
    """Whether a selector is the name of this very weight or of the module that holds it."""
    return isinstance(one, str) and one in (*weight.names, *weight.paths)


def matches(tree: dict[str, nn.Module], weight: Weight, one: One, loose: bool = False) -> bool:
    """Whether a selector takes a weight; loosely (to exclude), unknown types as known ones."""
    known = loose or weight.known
    if isinstance(one, type):
        if known:
            return any(isinstance(tree[up], one) for up in weight.above)
        return isinstance(weight.module, one) and _is_matrix(weight)
    if isinstance(one, str | re.Pattern):
        if known:
            return any(fits(one, name) for name in (*weight.names, *weight.above[1:]))
        if names_exactly(weight, one):
            return one in weight.names or _is_matrix(weight)
        return any(_spells(one, weight, i) for i in range(len(weight.paths)))
    return known and any(bool(one(name, weight.module)) for name in weight.names)


def _is_matrix(weight: Weight) -> bool:
    return weight.tensor is not None and weight.tensor.ndim >= 2


def _spells(one: str | re.Pattern[str], weight: Weight, i: int) -> bool:
    """Whether a pattern matches this parameter, but not just anything in its module."""
    path = weight.paths[i]
    nonsense = f"{path}.{_NONSENSE}" if path else _NONSENSE
    return _is_matrix(weight) and fits(one, weight.names[i]) and not fits(one, nonsense)


def check_met(tree: dict[str, nn.Module], where: Index, one: One, what: str) -> None:
    """Refuse a selector that matches neither a module nor a parameter."""
    if where.holds(one):
        return
    found = where.found
    names = [*filter(None, tree), *(name for weight in found for name in weight.names)]
    if isinstance(one, type):
        if not any(isinstance(module, one) for module in tree.values()):
            kinds = sorted({type(module).__name__ for module in tree.values()})
            raise ValueError(f"{what}={shown(one)} matches no module; the model has {kinds}")
    elif isinstance(one, str | re.Pattern):
        if not any(fits(one, name) for name in names):
            raise ValueError(f"{what}={shown(one)} matches nothing; {near_names(one, names)}")
    elif not any(matches(tree, weight, one, loose=True) for weight in found):
        raise ValueError(
            f"{what}={shown(one)} is true for no weight; it is called with names such as "
            f"{[weight.name for weight in found if weight.known][:5]} and the module"
        )
