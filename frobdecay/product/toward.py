"""Products that decay toward a weight, and not to zero.

    "initial"    ½·λ·‖UVᵀ − U₀V₀ᵀ‖²    what the factors were when the products were listed
    weights      ½·λ·‖UVᵀ − W₀‖²       dense weights by name, such as the pretrained model's

so that a pretrained weight is not pulled away from what it knows. Either is a product like others,
of more factors, the constant ones of which are kept by its record.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Literal

from torch import Tensor, nn

from frobdecay.algebra.network import Network, chain
from frobdecay.algebra.scaling import is_finite
from frobdecay.algebra.shifted import Shifted
from frobdecay.product.departure import Departure
from frobdecay.product.factor import Bare, Factor, is_sharded
from frobdecay.product.product import Product

Toward = Literal["initial"] | nn.Module | Mapping[str, Tensor]


class Beside:
    """The owner of a constant, which goes where a factor is moved to: to its device."""

    def __init__(self, tensor: Tensor, factor: Factor) -> None:
        self._held, self._factor = tensor, factor

    @property
    def tensor(self) -> Tensor:
        """The constant; while the factor has no numbers (meta), it stays where it is."""
        device = self._factor.param.device
        if device != self._held.device and device.type != "meta":
            self._held = self._held.to(device)
        return self._held


FROM_DENSE = Shifted((-1.0,), "departure")
"""W₀ − U Vᵀ: norm and gradients of U and V are those of U Vᵀ − W₀."""


def itself(product: Product) -> Product:
    """The product that decays toward something, without that; the same where it is zero."""
    structure, factors = product.structure, product.factors
    if isinstance(structure, Departure):
        now, _ = structure.halves(factors)
        return replace(product, factors=tuple(now), structure=structure.network)
    if structure == FROM_DENSE:
        return replace(product, factors=factors[1:], structure=chain((2, 2)))
    return product


def toward(found: Sequence[Product], what: Toward) -> list[Product]:
    """The same products, which decay toward something.

    Args:
        found: products that decay to zero.
        what: see ``products``.

    Raises:
        TypeError, ValueError: no such thing, weights that do not fit, or products that it does not
            exist for.
    """
    if isinstance(what, str):
        if what != "initial":
            raise ValueError(
                f'expected toward to be "initial", dense weights or a dense model, got {what!r}'
            )
        return [_toward_initial(product) for product in found]
    weights: Any = what.state_dict() if isinstance(what, nn.Module) else what
    if not isinstance(weights, Mapping):
        raise TypeError(
            'expected toward to be "initial", a table from names to dense weights, or a dense '
            f"model, got a {type(what).__name__}"
        )
    return [_toward_weight(product, weights.get(product.name)) for product in found]


def _toward_initial(product: Product) -> Product:
    if not isinstance(product.structure, Network):
        raise ValueError(
            f"{product.name}: expected a product of factors alone, got a {product.structure.name} "
            'one, which decays with its constant part; list it with lora="delta"'
        )
    factors = (*product.factors, *map(_kept, product.factors))
    structure = Departure(product.structure)
    return replace(product, factors=factors, structure=structure, biases=(), fixed=None)


def _kept(factor: Factor) -> Factor:
    """A constant copy of a factor; of a part of a packed parameter, of that part alone."""
    param = factor.param.detach()
    if is_sharded(param):
        return replace(factor, owner=Bare(param.clone()), attribute="tensor")
    return Factor(Beside(factor.view(param).contiguous().clone(), factor), "tensor")


def _toward_weight(product: Product, weight: Any) -> Product:
    name = product.name
    parametrization = _parametrization(product)
    chain = isinstance(product.structure, Network) and product.structure.is_chain
    if parametrization is None or not chain or len(product.factors) != 2:
        raise ValueError(
            f"{name}: expected the product U Vᵀ of a factorized weight, got a "
            f"{product.structure.name} of {len(product.factors)} factors, no such weight's; "
            'toward="initial" takes any, exclude= leaves it out'
        )
    if any(is_sharded(param) for param in product.params):
        raise ValueError(
            f"{name}: expected whole factors, got sharded ones (DTensor), of which no process has "
            'the rows that a dense weight needs; toward="initial" takes them'
        )
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{name}: expected its dense weight among those to decay toward, got "
            f"{'none' if weight is None else type(weight).__name__}; pass the model as it was "
            "before it was factorized, or its state_dict(); exclude= leaves the product out"
        )
    view = parametrization.matricization
    if weight.is_meta:
        raise ValueError(
            f"{name}: expected a dense weight with numbers, got one on the meta device; load it "
            'first; toward="initial" needs none'
        )
    if tuple(weight.shape) != tuple(parametrization.shape):
        raise ValueError(
            f"{name}: expected a dense weight of shape {tuple(parametrization.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    matrix = Factor(Beside(view.matrix(weight.detach()), product.factors[0]), "tensor")
    found = replace(product, factors=(matrix, *product.factors), structure=FROM_DENSE)
    if not is_finite(weight):
        raise ValueError(
            f"{name}: expected a dense weight to decay toward, got NaN or infinity in it; repair "
            "it, or exclude= leaves the product out"
        )
    return found


def _parametrization(product: Product) -> Any:
    """The one that the factors are of, if they are a factorized weight's."""
    owner: Any = product.factors[0].owner
    first = owner[0] if isinstance(owner, nn.ModuleList) and len(owner) else None
    return first if hasattr(first, "matricization") else None


# --- in the state_dict of an optimizer ------------------------------------------------------------
# What a weight was belongs to the training, not to the model: who loads a model starts from there.

_INITIAL = "initial"


def saved_initial(products: Sequence[Product]) -> dict[str, Any]:
    """An entry with the names and the initial factors of products that have any, in order."""
    found = [(product.name, _initial(product)) for product in products]
    return {_INITIAL: saved} if (saved := [one for one in found if one[1]]) else {}


def fitting_initial(
    products: Sequence[Product], saved: Mapping[str, Any] | None
) -> list[tuple[Tensor, Tensor]]:
    """Initial factors and what they are to be, of a checkpoint; warns where it has none.

    Raises:
        ValueError: it has those of other products.
    """
    ours = saved_initial(products).get(_INITIAL, [])
    theirs = (saved or {}).get(_INITIAL, [])
    if ours and not theirs:
        warnings.warn(
            f"the checkpoint has no initial factors, so {ours[0][0]} and others decay toward what "
            "they were when their products were listed; list them before anything is trained",
            stacklevel=6,
        )
        return []
    about, others = ([(name, [tuple(t.shape) for t in held]) for name, held in each]
                     for each in (ours, theirs))  # fmt: skip
    if about != others:
        odd = next(b or a for a, b in zip_longest(about, others) if a != b)
        raise ValueError(
            f"expected initial factors of the {len(ours)} products that decay toward them, got "
            f"those of {len(theirs)}, of which {odd} differs; list the products as they were, by "
            'products(model, toward="initial")'
        )
    return [
        pair
        for (_, mine), (_, saved_) in zip(ours, theirs, strict=True)
        for pair in zip(mine, saved_, strict=True)
    ]


def _initial(product: Product) -> list[Tensor]:
    """What the factors of a product were, that decays toward it; empty for others."""
    if not isinstance(product.structure, Departure):
        return []
    return [factor.param for factor in product.structure.halves(product.factors)[1]]
