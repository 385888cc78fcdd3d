"""Param groups for those who build them: what decays, what does not, and the factors apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from frobdecay.algebra.precision import Coefficient, check_coefficient
from frobdecay.optim.rates import DECAY
from frobdecay.product.find import products
from frobdecay.product.names import Choice, Named, Selector, around, each, strip_wrappers

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_ORIGINAL = re.compile(r"parametrizations\.([^.]+)\.original\d*$")
_ORDER = _DENSE, _SPARED, _FACTOR = "dense", "spared", "factor"


def split_param_groups(
    model: nn.Module,
    weight_decay: Coefficient,
    *,
    no_decay: Selector = (),
    planned: Iterable[str] = (),
    decay: Coefficient | None = None,
) -> list[dict[str, Any]]:
    """Make the param groups of a model: the usual two, and one for the factors.

    Examples:
        >>> import torch, frobdecay
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 10))
        >>> plan = frobdecay.factorize(model, rank=4, include="0")
        >>> groups = split_param_groups(model, 0.1)
        >>> for group in groups:
        ...     print(group["weight_decay"], *group["param_names"])
        0.1 2.weight
        0.0 0.bias 1.weight 1.bias 2.bias
        0.1 0.parametrizations.weight.original0 0.parametrizations.weight.original1
        >>> optimizer = frobdecay.FrobeniusDecay(torch.optim.AdamW(groups), model)

        {dense weights, weight_decay}  {norms, biases, one-dimensional, 0}  {factors, weight_decay}

    Every trainable parameter is in one group, a shared one once. ``FrobeniusDecay`` turns the last
    group's weight decay into that of the products; plain optimizers decay the factors themselves.
    Parameters on different device meshes get different groups, as fused updates need them.

    Args:
        model: factorized or not; is not changed.
        weight_decay: λ, a number or a tensor without dimensions.
        no_decay: more that shall not decay, factors too: selectors as for ``factorize``, of
            parameters or modules, predicates(name, parameter). A factorized weight goes by its own
            name, too. What a module's ``no_weight_decay()`` names, as of timm's, is left out, too.
        planned: weights that will be factorized, as ``plan.ranks``: into the factors' group.
        decay: λ of the products, if it is another: their group's ``frobenius_decay``.

    Returns:
        Groups that are not empty, with ``"params"``, ``"param_names"``, ``"weight_decay"``.

    Raises:
        TypeError, ValueError: no model; a negative λ; patterns of another kind or without a match.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got a {type(model).__name__}")
    check_coefficient(weight_decay, "weight_decay")
    check_coefficient(0.0 if decay is None else decay, "decay")
    spared = _spared(model, no_decay)
    factors = _factors(model, planned)
    norms = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters()}

    def kind(name: str, param: nn.Parameter) -> str:
        if id(param) in spared or id(param) in factors:
            return _SPARED if id(param) in spared else _FACTOR
        small = param.ndim <= 1 or name.endswith("bias")
        return _SPARED if small or id(param) in norms else _DENSE

    groups: dict[Any, dict[str, Any]] = {}
    kinds = {name: kind(name, param) for name, param in model.named_parameters()}
    named = sorted(model.named_parameters(), key=lambda item: _ORDER.index(kinds[item[0]]))
    for name, param in (item for item in named if item[1].requires_grad):
        empty = {"params": [], "param_names": [], **_decays(kinds[name], weight_decay, decay)}
        group = groups.setdefault((kinds[name], getattr(param, "device_mesh", None)), empty)
        group["params"].append(param)
        group["param_names"].append(name)
    return list(groups.values())


def _decays(kind: str, weight_decay: Coefficient, decay: Coefficient | None) -> dict[str, Any]:
    """The options of a group that are decays."""
    if kind == _FACTOR and decay is not None:
        return {"weight_decay": 0.0, DECAY: decay}
    return {"weight_decay": 0.0 if kind == _SPARED else weight_decay}


def _factors(model: nn.Module, names: Iterable[str]) -> set[int]:
    """Ids of the factors, and of the weights that will be some."""
    known = dict(model.named_parameters(remove_duplicate=False))
    if lost := [name for name in names if name not in known]:
        raise ValueError(f"expected planned to name parameters of the model, got {lost[:3]}")
    factors = {id(param) for product in products(model) for param in product.params}
    return factors | {id(known[name]) for name in names}


def _spared(model: nn.Module, no_decay: Selector) -> set[int]:
    """Ids of the parameters that the user or a module excepts by name."""
    tree = {
        strip_wrappers(path): module for path, module in model.named_modules(remove_duplicate=False)
    }
    params = [
        (strip_wrappers(name), param)
        for name, param in model.named_parameters(remove_duplicate=False)
    ]
    things = [
        Named((_ORIGINAL.sub(r"\1", name), name), around(name), param) for name, param in params
    ]
    choice = Choice(things, tree, "no parameter")
    spared = {i for one in each(no_decay, "no_decay") for i in choice.met(one, "no_decay")}
    for path, module in tree.items():
        for name in _excepted(module):
            spared.update(choice.taking(f"{path}.{name}".lstrip(".")))
    return {id(params[i][1]) for i in spared}


def _excepted(module: nn.Module) -> Iterable[str]:
    """What timm's models name themselves; there need not be parameters of all these names."""
    method = getattr(module, "no_weight_decay", None)
    return method() if callable(method) else ()
