"""Back to plain torch: ``merge`` to dense weights, ``unroll`` to chains of plain layers."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from frobdecay.models.fitness import unwrapped
from frobdecay.models.select import Walk, Weight, select
from frobdecay.models.surgery import (
    ordinary,
    release,
    reorder,
    settle_encoders,
    settle_recurrent,
    transaction,
)
from frobdecay.models.unroll.chains import unrolled, why_not_unrolled
from frobdecay.models.unroll.readers import Readers
from frobdecay.product.holding import factorized
from frobdecay.product.names import Selector
from frobdecay.product.partitions import why_partitioned
from frobdecay.product.replaced import remember
from frobdecay.weights.layouts import layouts

M = TypeVar("M", bound=nn.Module)


@ordinary("merge")
def merge(model: M, *, include: Selector | None = None, exclude: Selector | None = None) -> M:
    """Multiply the factors out again, in place: dense modules of their original class.

    Examples:
        >>> import torch, frobdecay
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = frobdecay.factorize(model, rank=2)
        >>> list(merge(model).state_dict())
        ['0.weight', '0.bias']

    The ``state_dict`` has the keys and the order that it had before ``factorize``, and the weights
    keep dtype, device and training mode; a weight requires a gradient if one of its factors does.

    Args:
        model: any module; it is changed: to keep it, merge ``copy.deepcopy(model)``. Nothing
            happens if it has no factorized weights.
        include: selectors of what to merge, as for ``factorize``; everything by default.
        exclude: selectors of what stays factorized.

    Returns:
        The model.

    Raises:
        ValueError: selectors that match no factorized weight; sharded factors; data-parallel
            wrappers. Nothing was changed then.
    """
    walk = unwrapped(model, "merge")
    chosen = _chosen(walk, include, exclude)
    with torch.no_grad():
        dense = [_dense(weight) for weight in chosen]  # all before any is put in place
    touched = [weight.module for weight in chosen]
    with transaction(touched):
        for weight, parameter in zip(chosen, dense, strict=True):
            _put_back(weight, parameter)
        settle_recurrent(touched)
    settle_encoders(walk.modules)
    return model


def _chosen(walk: Walk, include: Selector | None, exclude: Selector | None) -> list[Weight]:
    """The factorized weights that are meant, none of them sharded."""
    found = walk.factorized
    if include is not None or exclude is not None:
        picked = [w for w in select(walk, include, exclude) if not w.excluded]
        found = [w for w in picked if w.attribute in factorized(w.module)]
        if include is not None and not found:
            raise ValueError(
                f"include={include!r} matches no factorized weight; factorized are "
                f"{[w.name for w in walk.factorized][:8]}"
            )
    for weight in found:
        held = factorized(weight.module)[weight.attribute]
        for name in map("original{}".format, range(held.ntensors)):
            if reason := why_partitioned(held, name, getattr(held, name)):
                raise ValueError(f"{weight.name}: {name} is {reason}, and merge before")
        for factor in held.parameters():
            if type(factor) is not nn.Parameter or factor.is_meta:
                raise ValueError(
                    f"{weight.name} has factors of type {type(factor).__name__} on "
                    f"{factor.device}; gather (or materialize) them before merging"
                )
    return found


def _dense(weight: Weight) -> nn.Parameter:
    """The dense weight, which is to be trained if one of its factors is."""
    held = factorized(weight.module)[weight.attribute]
    formed = held()
    tensor = formed.materialize() if hasattr(formed, "materialize") else formed
    return nn.Parameter(tensor.detach(), any(p.requires_grad for p in held.parameters()))


def _put_back(weight: Weight, dense: nn.Parameter) -> None:
    """Undo a registration.

    ``remove_parametrizations`` would multiply once more, and makes a buffer of a frozen weight.
    """
    module, attribute = weight.module, weight.attribute
    held = factorized(module)[attribute]
    order = getattr(held[0], "order", ()) or _usual_order(module)
    release(module, attribute)  # its class is its own, since the transaction began
    module._parameters[attribute] = dense
    reorder(module, order)


def _usual_order(module: nn.Module) -> tuple[str, ...]:
    """Weights first, for what ``factorize`` did not register."""
    return tuple(getattr(module, "_flat_weights_names", layouts(module)))


@ordinary("unroll")
def unroll(model: nn.Module) -> nn.Module:
    """Replace layers with factorized weights by chains of plain torch layers, in place.

    Examples:
        >>> import torch, frobdecay
        >>> layer = torch.nn.Linear(8, 8)
        >>> _ = frobdecay.factorize(layer, rank=2)
        >>> unroll(layer)
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=8, bias=True)
        )

    The chains are ``nn.Sequential`` of Linear, Conv and Embedding layers that need no frobdecay and
    hold the factors' numbers, no more. Device, dtype, training mode, ``requires_grad``, forward and
    backward hooks are kept, and what the layer said of itself (``in_features``, ``stride``, …); a
    hook then gets the ``Sequential``. Outputs agree to rounding.

    Args:
        model: any module; it is changed: to keep it, unroll ``copy.deepcopy(model)``. Nothing
            happens if it has no factorized weights.

    Returns:
        The model, or the chain where the model itself is one factorized layer.

    Raises:
        ValueError: layers that cannot be a chain (attention, recurrent and bilinear layers,
            expert stacks, subclasses with a forward of their own, layers whose weight or
            bias a forward or a hook may read, by its bytecode, layers that are held outside of
            the modules, patterns that split neither way), all named; nothing was changed then.
    """
    walk = unwrapped(model, "unroll")
    chosen = _chosen(walk, None, None)
    if not chosen:
        return model
    readers = Readers(model, [weight.module for weight in chosen])
    against = {w.name: why_not_unrolled(w.module) or readers.reason(w.module) for w in chosen}
    listed = [f"\n  {name}: {reason}" for name, reason in against.items() if reason]
    if listed:
        raise ValueError(
            f"cannot unroll{''.join(listed)}\nmerge these first: merge(model, include=[...])"
        )
    chains = {id(weight.module): unrolled(weight.module) for weight in chosen}
    parents = [
        parent for _, parent in walk.all if any(id(child) in chains for child in parent.children())
    ]
    with transaction(parents):
        for parent in parents:
            for name, child in parent._modules.items():
                parent._modules[name] = chains.get(id(child), child)
            if "_orig_mod" in parent._modules:  # torch.compile's: its forward holds the layer, too
                compiled: Any = parent
                compiled.__setstate__(compiled.__getstate__())
    for weight in chosen:
        module, chain = weight.module, chains[id(weight.module)]
        remember({module: [*module.parameters()]}, {module: [*chain.parameters()]})
    return chains.get(id(model), model)
