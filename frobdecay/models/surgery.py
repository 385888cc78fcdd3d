"""Changes to modules that hold together: all or nothing, and nothing left stale.

torch gives a parametrized module a class of its own, which a deep copy of the module shares; to
parametrize or merge one would then break the other. ``own_class`` parts them first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.product.holding import VERSION, copied_class, lists_of
from frobdecay.product.replaced import remember
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.registration import put_factors
from frobdecay.weights.tracing import transforms_active


@contextmanager
def ordinary(act: str) -> Iterator[None]:
    """Tensors made inside are such as train, under ``inference_mode`` too; also a decorator.

    Args:
        act: what is to be done, for the error.

    Raises:
        RuntimeError: a mode is active under which there are no such tensors.
    """
    # Without need this mode would switch gradients on.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        made = type(torch.ones((), dtype=torch.float32, device="cpu")).__name__
        if made != "Tensor" or transforms_active():
            where = (
                "functions that torch.func transforms"
                if made == "Tensor"
                else f"the mode of {made}s"
            )
            raise RuntimeError(f"cannot {act} a model inside of {where}; {act} it outside")
        yield


@contextmanager
def transaction(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo every change to the attributes and classes of these modules if an error escapes.

    If none does, parameters that gave way to others are remembered; see ``remember``.
    """
    touched = list({id(module): module for module in modules}.values())
    inside = [module._modules.get("parametrizations") for module in touched]
    touched += [held for held in inside if held is not None]
    saved = [(module, module.__class__, _snapshot(module)) for module in touched]
    before = _parameters(touched)
    for module in touched:
        own_class(module)
    try:
        yield
    except BaseException:
        for module, kind, (attributes, tables) in saved:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for table, content in tables:
                table.clear()
                table.update(content)
        raise
    else:
        remember(before, _parameters(touched))
    finally:
        VERSION.value += 1


def _parameters(modules: Iterable[nn.Module]) -> dict[Hashable, list[Tensor]]:
    """Module and attribute -> its parameter, or those of its parametrization."""
    found: dict[Hashable, list[Tensor]] = {}
    for module in modules:
        own = {name: [p] for name, p in module._parameters.items() if p is not None}
        held = {name: [*one.parameters()] for name, one in lists_of(module).items()}
        found |= {(id(module), name): params for name, params in {**own, **held}.items()}
    return found


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Any]]]:
    tables: list[dict[str, Any]] = [module._parameters, module._buffers, module._modules]
    return dict(module.__dict__), [(table, dict(table)) for table in tables]


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a copy of its injected class, so that no other one shares it."""
    if lists_of(module):
        module.__class__ = copied_class(type(module))


def release(module: nn.Module, attribute: str) -> None:
    """Take a parametrization off, and put nothing in its place; call ``own_class`` before."""
    held: Any = module._modules["parametrizations"]
    delattr(type(module), attribute)
    del held[attribute]
    if not len(held):
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]


def place(module: nn.Module, attribute: str, made: Any, factors: Sequence[Tensor]) -> None:
    """Put factors in a weight's place; they remember where it was among the parameters."""
    before = (getattr(held[0], "order", ()) for held in lists_of(module).values())
    made.order = tuple(next(filter(None, before), module._parameters))
    put_factors(module, attribute, made, factors)


def reorder(module: nn.Module, order: Sequence[str]) -> None:
    """Put the parameters of a module in this order; those not listed stay behind, as they are."""
    table = module._parameters
    names = [name for name in order if name in table]
    names += [name for name in table if name not in names]
    content = {name: table[name] for name in names}
    table.clear()
    table.update(content)


# Note [flat weights]
# A recurrent layer hands cuDNN and the CPU kernels a list of its parameters, `_flat_weights`, that
# it keeps as an attribute. After a parametrization the list would go on with the dense weights
# (or with the tensors of an old graph, which also breaks deepcopy). The parametrized class
# therefore computes the list at every access, from the factors as they are then. Refreshing and
# cuDNN's flattening, which write to the list, have nothing to do.


def _flat_weights(module: Any) -> list[Tensor | None]:
    held = (getattr(module, name, None) for name in module._flat_weights_names)
    return [w.materialize() if isinstance(w, FactoredTensor) else w for w in held]


def _ignore(module: nn.Module, *_: object) -> None:
    """Nothing to keep up to date, see Note [flat weights]."""


def settle_recurrent(modules: Iterable[nn.Module]) -> None:
    """Make recurrent layers read their weights anew, or as ever once they are dense again."""
    for module in modules:
        if not isinstance(module, nn.RNNBase):
            continue
        if lists_of(module):
            kind: Any = type(module)
            # Formed outside of compiled code: torch.compile leaves recurrent layers alone, but
            # compiles what they call, and there a product from outside has no factors.
            formed: Any = torch.compiler.disable(_flat_weights)  # type: ignore[no-untyped-call]
            kind._flat_weights = property(formed, _ignore)
            kind.flatten_parameters = kind._update_flat_weights = _ignore
            module.__dict__.pop("_flat_weights", None)
        else:
            module._init_flat_weights()


_PACKED = "_packs_padding"


def settle_encoders(tree: Mapping[str, nn.Module]) -> None:
    """Keep the encoders that hold factors from nested tensors, and no others any longer.

    ``nn.TransformerEncoder`` asks its first layer alone whether all of them are of torch's fast
    path, and then hands them its padded input as a nested tensor, which none but that path takes.
    """
    for path, encoder in tree.items():
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        layers = f"{path}.layers.".lstrip(".")
        held = any(lists_of(module) for name, module in tree.items() if name.startswith(layers))
        if held and encoder.use_nested_tensor:
            encoder.use_nested_tensor, encoder.__dict__[_PACKED] = False, True
        elif not held and encoder.__dict__.pop(_PACKED, False):
            encoder.use_nested_tensor = True
