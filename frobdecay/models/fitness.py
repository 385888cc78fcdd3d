"""Which of the chosen weights can be factorized, and for the others, why not.

A weight with a reason against it is left dense and listed where a default or a pattern swept it
in, and is an error where it was named. (A depthwise convolution is factorized where it was named.)
What makes the whole model unfit (lazy parameters, weights without numbers) is an error always.
How well factors fit a weight is measured here, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from frobdecay.algebra.scaling import DTYPES, is_finite, relative_distance
from frobdecay.models.memory import overlaps
from frobdecay.models.select import Walk, Weight
from frobdecay.product.holding import lists_of
from frobdecay.product.partitions import why_partitioned
from frobdecay.weights.layouts import is_kind, refusal
from frobdecay.weights.product_tensor import ProductTensor


def unwrapped(model: nn.Module, act: str) -> Walk:
    """Walk a model, unless something holds on to its parameters from outside.

    Raises:
        TypeError: it is no model.
        ValueError: a data-parallel wrapper is in the model.
    """
    walk = Walk(model)
    for path, module in walk.all:
        kind = type(module).__name__
        if isinstance(module, nn.parallel.DistributedDataParallel) or kind in (
            "FullyShardedDataParallel",
            "DeepSpeedEngine",
        ):
            raise ValueError(
                f"{path or 'the model'} is wrapped in {kind}, which would go on with the present "
                f"parameters; {act} before wrapping"
            )
    return walk


def counted(model: nn.Module) -> int:
    """Count the parameters of a model.

    Raises:
        ValueError: a lazy parameter, naming the first.
    """
    count = 0
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name} has no shape yet (a lazy module); run the model once on an example "
                "input before factorizing it"
            )
        count += parameter.numel()
    return count


def check_values(weight: Weight) -> None:
    """Refuse a weight whose numbers cannot be read or are none.

    Raises:
        ValueError: on the meta device, or NaN or infinity in it.
    """
    tensor = weight.parameter
    if tensor.is_meta:
        raise ValueError(
            f"{weight.name} is on the meta device and holds no numbers; materialize it "
            "(to_empty) and initialize or load it, then factorize"
        )
    if not is_finite(tensor):
        raise ValueError(
            f"{weight.name} holds NaN or infinity; initialize or repair it before factorizing"
        )


def tie_against(weight: Weight, tied: Mapping[int, Sequence[str]]) -> str | None:
    """Say what a weight shares memory with, of the ``ties`` of a model; None for nothing."""
    others = [name for name in tied.get(id(weight.tensor), ()) if name not in weight.names]
    if not others:
        return None
    return (
        f"tied to {', '.join(others)}, which would go on with the dense weight; "
        "on_tied='untie' gives it a copy of its own"
    )


def adapter_against(weight: Weight, tree: Mapping[str, nn.Module]) -> str | None:
    """Say what an adapter of PEFT has against factors in this weight's place, if anything."""
    for name in weight.names:
        parts = name.split(".")
        for k in range(len(parts)):
            layer = tree[".".join(parts[:k])]
            tuner = is_kind(layer, "peft.tuners.*") and not is_kind(layer, "peft.tuners.*Model")
            if tuner and (reason := _adapted(layer, parts[k:], weight.named)):
                return reason
    return None


def _adapted(layer: nn.Module, path: Sequence[str], named: bool) -> str | None:
    """What an adapter's layer has against factors of the weight at this path in it."""
    inside = [part for part in path if part != "base_layer"]
    if path[0] not in ("base_layer", "model"):
        return None if named else "an adapter's own; name it to factorize"
    deleted = (["in_proj_weight"], ["out_proj", "weight"])
    if is_kind(layer, "peft.tuners.lora.layer.MultiheadAttention") and inside in deleted:
        return (
            "adapted by PEFT, whose adapters of nn.MultiheadAttention delete the weight in every "
            "forward and register a dense one; merge_and_unload() the adapter first"
        )
    return None


def reason_against(weight: Weight) -> str | None:
    """Say why a weight cannot be factorized, with the remedy; None where it can be.

    Ties, which concern more than one weight, are another question: ``ties``.
    """
    for question in (_not_a_parameter, _not_plain, _not_a_matrix, _hooked):
        if found := question(weight):
            return found
    if found := refusal(weight.module):
        return found
    if not weight.named and weight.layout is not None and weight.layout.depthwise:
        return "depthwise convolution: its matrices are single channels; name it to factorize"
    return None


def _not_a_parameter(weight: Weight) -> str | None:
    module, attribute = weight.module, weight.attribute
    if held := lists_of(module).get(attribute):
        kinds = [type(p).__name__ for p in held]
        if hasattr(held[0], "product"):
            return "already factorized, and left as it is; merge it first to change its rank"
        return f"already parametrized by {', '.join(kinds)}; remove that parametrization first"
    if weight.tensor is not None:
        return _normed(weight)
    if callable(getattr(module, attribute, None)):
        return "quantized: its weight is packed; factorize before quantizing"
    if attribute in module._buffers:
        return "a buffer, not a parameter; register it as a parameter first"
    return _normed(weight) or "not a parameter of its module (computed by a hook?)"


def _normed(weight: Weight) -> str | None:
    """Hooks of weight_norm, spectral_norm and pruning, which overwrite the weight."""
    for hook in weight.module._forward_pre_hooks.values():
        kind = type(hook)
        if kind.__module__.startswith("torch.nn.utils."):
            name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
            if name and weight.attribute.startswith(str(name)):
                return f"computed by a {kind.__name__} hook in every forward; remove that first"
    return None


def _not_plain(weight: Weight) -> str | None:
    """Tensors that only look like a matrix of numbers."""
    tensor = weight.parameter
    if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):
        return "sharded (DTensor); factorize before fully_shard or parallelize_module"
    if reason := why_partitioned(weight.module, weight.attribute, tensor):
        return f"{reason}, and factorize before"
    if type(tensor) is not nn.Parameter:
        return f"a {type(tensor).__name__}, not a plain Parameter; factorize before converting it"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = f"{tensor.dtype}, {'nested' if tensor.is_nested else tensor.layout}"
        return f"not dense ({kind}); convert it to a dense floating-point tensor first"
    if tensor.dtype not in DTYPES:
        return f"of dtype {tensor.dtype}; convert it to a real dtype that torch multiplies first"
    return None


def _not_a_matrix(weight: Weight) -> str | None:
    tensor = weight.parameter
    if tensor.numel() == 0:
        return f"empty, of shape {tuple(tensor.shape)}; there is nothing to factorize"
    if tensor.ndim < 2:
        return f"of shape {tuple(tensor.shape)}; expected at least two dimensions"
    return None


def _hooked(weight: Weight) -> str | None:
    """Hooks on the parameter would stay behind on the dense one."""
    tensor = weight.tensor
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    if any(getattr(tensor, name, None) for name in hooks):
        return "has gradient hooks, which would be lost; register them after factorizing"
    return None


def ties(walk: Walk) -> dict[int, list[str]]:
    """List the parameters and buffers that share memory.

    Returns:
        The id of each -> the names of all that use its memory, its own among them.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, Tensor] = {}
    weights = ((weight.name, weight.tensor) for weight in walk.weights)
    others = (held for path, module in walk.modules.items() for held in _others(path, module))
    for name, tensor in chain(weights, others):
        if tensor is not None:
            owners[id(tensor)].append(name)
            tensors[id(tensor)] = tensor
    found = {key: names for key, names in owners.items() if len(names) > 1}
    for one, other in overlaps(tensors):
        both = [*owners[one], *owners[other]]
        for key in (one, other):
            found[key] = list(dict.fromkeys([*found.get(key, []), *both]))
    return found


def _others(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and what parametrizations hold."""
    yield from module.named_buffers(path, recurse=False, remove_duplicate=False)
    for attribute, held in lists_of(module).items():
        yield from held.named_parameters(f"{path}.parametrizations.{attribute}".lstrip("."))


def relative_error(dense: Tensor, product: Tensor) -> float:
    """‖W − UVᵀ‖_F / ‖W‖_F, in float32 at least, of a factored weight or of a dense one."""
    if isinstance(product, ProductTensor):
        return relative_distance(product.matricization.matrix(dense), product.factors)
    rows = dense.reshape(len(dense), -1)
    return relative_distance(rows, [product.reshape(rows.shape)])
