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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from frobdecay.product.holding import check_module, factorized, lists_of
from frobdecay.product.names import Choice, Named, One, Selector, around, each, fits, shown, walk
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
        return tuple(dict.fromkeys(up for name in self.names for up in around(name)))

    @property
    def tensor(self) -> Tensor | None:
        """The parameter, unless it is none."""
        return self.module._parameters.get(self.attribute)

    @property
    def parameter(self) -> Tensor:
        """The same, where it is known to be one."""
        found = self.tensor
        assert found is not None
        return found

    @property
    def layout(self) -> Layout | None:
        """How its module type's weight is read as a matrix, if the type is known."""
        return layouts(self.module).get(self.attribute)


def bias_of(weight: Weight) -> nn.Parameter | None:
    """The parameter that is added to what a weight puts out, if it is a plain one."""
    module = weight.module
    name = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(weight.attribute)
    found = module._parameters.get(name) if name else None
    return found if type(found) is nn.Parameter and found.is_floating_point() else None


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

    @cached_property
    def choice(self) -> Choice:
        """All weights, to be matched."""
        return choice_of(self.weights, self.modules)

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
    found, choice = walk.weights, walk.choice
    known = [i for i, weight in enumerate(found) if weight.known]
    taken, met, left = dict.fromkeys(known, False), set(range(len(found))), set[int]()
    if include is not None:
        taken, met = {}, set()
        for one in each(include, "include"):
            loosely = choice.met(one, "include", known)
            exactly = {i: names_exactly(found[i], one) for i in asked(found, one, loosely)}
            if not exactly:
                raise ValueError(
                    f"include={shown(one)} matches no weight that can be factorized: what it "
                    "matches has only vectors, or is of a module type without a known layout; "
                    "name a parameter with two or more dimensions"
                )
            taken |= {i: named or taken.get(i, False) for i, named in exactly.items()}
            met.update(loosely)
    for one in each(exclude, "exclude") if exclude is not None else ():
        left.update(choice.met(one, "exclude"))
    return [
        replace(weight, named=taken.get(i, False), met=i not in taken, excluded=i in left)
        for i, weight in enumerate(found)
        if i in taken or (i in met and _is_matrix(weight))
    ]


def choice_of(found: Sequence[Weight], tree: Mapping[str, nn.Module]) -> Choice:
    """Weights, to be matched; loosely, those of unknown types as those of known ones."""
    return Choice([Named(one.names, one.above, one.module) for one in found], tree)


def asked(found: Sequence[Weight], one: One, taken: Iterable[int]) -> list[int]:
    """Positions of those weights that a selector that takes them also asks for."""
    return [i for i in taken if found[i].known or _asks(one, found[i])]


def names_exactly(weight: Weight, one: One) -> bool:
    """Whether a selector is the name of this very weight or of the module that holds it."""
    return isinstance(one, str) and one in (*weight.names, *weight.paths)


def _asks(one: One, weight: Weight) -> bool:
    """Whether a selector means this weight, of a type without a default, and not just any."""
    if isinstance(one, type):
        return isinstance(weight.module, one) and _is_matrix(weight)
    if not isinstance(one, str | re.Pattern):
        return False
    if names_exactly(weight, one):
        return one in weight.names or _is_matrix(weight)
    nonsense = (f"{path}.{_NONSENSE}".lstrip(".") for path in weight.paths)
    pairs = zip(weight.names, nonsense, strict=True)
    return _is_matrix(weight) and any(
        fits(one, name) and not fits(one, other) for name, other in pairs
    )


def _is_matrix(weight: Weight) -> bool:
    return weight.tensor is not None and weight.tensor.ndim >= 2
