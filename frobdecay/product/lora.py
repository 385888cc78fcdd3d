r"""LoRA of PEFT: the product s·BA that an adapter adds to a weight, or the sum W₀ + s·BA.

    delta   ½·λ·‖s·BA‖²         the update decays: the prior is the pretrained weight
    full    ½·λ·‖W₀ + s·BA‖²    the weight decays: the prior is zero, as in the dense recipe

with U = B, V = Aᵀ and s PEFT's ``scaling``, as it is when the products are listed. Where adapters
are active together, "delta" has a product for each and "full" decays W₀ + Σ s·BA, what the layer
multiplies with. Inactive adapters and disabled layers are left out: list the products after
``set_adapter``. An adapter that is active and does not simply add s·BA (DoRA, LoHa, …) is refused.

For PiSSA, whose BA starts as the principal part of the pretrained weight, "full" is the one that
leaves the weight's meaning alone: "delta" would take that part away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from frobdecay.algebra.scaling import DTYPES
from frobdecay.algebra.shifted import Shifted
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product

_PEFT = "peft.tuners"
_LORA = f"{_PEFT}.lora.layer"
_WITHOUT = {  # nothing low-rank is added: left out, like any module without products
    f"{_PEFT}.boft.layer.BOFTLayer",
    f"{_PEFT}.ia3.layer.IA3Layer",
    f"{_PEFT}.ln_tuning.layer.LNTuningLayer",
    f"{_PEFT}.oft.layer.OFTLayer",
    f"{_PEFT}.trainable_tokens.layer.TrainableTokensLayer",
}
_REFUSED = {  # before LoraLayer, of which some are subclasses
    f"{_PEFT}.adalora.layer.AdaLoraLayer": "AdaLoRA's update is P Λ Q with singular values that "
    "come and go, and has a penalty of its own",
    f"{_PEFT}.loha.layer.LoHaLayer": "LoHa's update is an entrywise product of two products",
    f"{_PEFT}.lokr.layer.LoKrLayer": "LoKr's update is a Kronecker product",
    f"{_PEFT}.vera.layer.VeraLayer": "VeRA trains vectors between frozen factors of all layers",
    f"{_LORA.replace('layer', 'tp_layer')}.LoraParallelLinear": "its factors are Megatron's shards",
}
_PLAIN = ("MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant", "ALoraLinearVariant")
"""Variants of LoRA whose update is s·BA: they differ in initialization, backward, or where it is
switched on."""
_VARIANTS = {
    "Dora": "DoRA scales W₀ + s·BA to magnitudes of its own",
    "Kasa": "KaSA has singular values between A and B",
    "BdLora": "its factors are block-diagonal",
}


class _Layout(NamedTuple):
    """How B, A and W₀ are seen as U, V and (*batch, m, n), and the lengths that this needs."""

    u: str | None = None
    v: str | None = "r n -> n r"
    base: str | None = None
    axes: tuple[tuple[str, int], ...] = ()
    batch: int = 0


def _delta(module: Any, name: str) -> Iterator[Product]:
    """s·BA, one for each active adapter: "<name>.<adapter>"."""
    for adapter in _active(module, name):
        layout = _layout(module, adapter)
        scale = float(module.scaling[adapter])
        pair = _pair(module, adapter, layout)
        yield Product(f"{name}.{adapter}".lstrip("."), pair, scale, layout.batch)


def _full(module: Any, name: str) -> Iterator[Product]:
    """W₀ + Σ s·BA, called like the dense weight: "<name>.weight"."""
    adapters = _active(module, name)
    if not adapters:
        return
    layouts = [_layout(module, adapter) for adapter in adapters]
    base = _base(module, _called(module, name), layouts[0])
    pairs = [
        factor
        for adapter, layout in zip(adapters, layouts, strict=True)
        for factor in _pair(module, adapter, layout)
    ]
    scales = tuple(float(module.scaling[adapter]) for adapter in adapters)
    path = f"{name}.{base.attribute}".lstrip(".")
    yield Product(path, (base, *pairs), batch=layouts[0].batch, structure=Shifted(scales))


def _active(module: Any, name: str) -> list[str]:
    """The adapters that act in this layer.

    Raises:
        ValueError: one of them is merged, or does something else than adding s·BA.
    """
    kinds, called = _kinds(module), _called(module, name)
    if kinds & _WITHOUT or module.disable_adapters:
        return []
    refused = sorted(kinds & set(_REFUSED))
    if refused or f"{_LORA}.LoraLayer" not in kinds:
        why = _REFUSED[refused[0]] if refused else "of its update nothing is known here"
        raise ValueError(_refusal(module, called, f"LoRA, with an update s·BA, but {why}"))
    held = [a for a in module.active_adapters if a in module.lora_A or _embeds(module, a)]
    for adapter in held:
        _check(module, adapter, f"adapter {adapter!r} of {called}")
    if held and module.merged_adapters:
        raise ValueError(
            f"{called}: expected adapters beside the weight, got {module.merged_adapters} merged "
            "into it: they do not train; call model.unmerge_adapter() first"
        )
    return held


def _check(module: Any, adapter: str, called: str) -> None:
    variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
    if getattr(module, "use_dora", {}).get(adapter):
        variant = "DoraLinearVariant"  # known by a flag alone before PEFT 0.16
    if variant not in (*_PLAIN, "NoneType"):
        known = (why for start, why in _VARIANTS.items() if variant.startswith(start))
        why = next(known, f"of the update of a {variant} nothing is known here")
        raise ValueError(_refusal(module, called, f"LoRA, with an update s·BA, but {why}"))
    plan = getattr(module.get_base_layer(), "_hf_tp_plan", None)
    if plan is not None:
        why = f"whole layers, got tensor parallelism ({plan!r}), which shards the product"
        raise ValueError(_refusal(module, called, why))


def _refusal(module: nn.Module, called: str, why: str) -> str:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return (
        f"{called}: expected {why}; leave such layers to weight decay by "
        f"frobdecay.register_products({kind!r})(lambda module, name: ()), or pass a list of other "
        "products in place of the model"
    )


def _pair(module: Any, adapter: str, layout: _Layout) -> tuple[Factor, Factor]:
    """B and A as the factors U and V."""
    if _embeds(module, adapter):
        u, v = (module.lora_embedding_A, adapter), (module.lora_embedding_B, adapter)
    else:
        u, v = (module.lora_B[adapter], "weight"), (module.lora_A[adapter], "weight")
    return Factor(*u, layout.u, layout.axes), Factor(*v, layout.v, layout.axes)


def _layout(module: Any, adapter: str) -> _Layout:
    """How the layer stores its matrices."""
    kinds = _kinds(module)
    if _embeds(module, adapter):  # A: rank × rows of the table, B: columns × rank
        return _Layout("r m -> m r", None)
    if f"{_LORA}.ParamWrapper" in kinds:
        return _experts(module)
    weight = module.lora_A[adapter].weight
    if weight.ndim == 2:
        return _Layout(base="n m -> m n" if getattr(module, "fan_in_fan_out", False) else None)
    return _convolution(module, weight)


def _experts(module: Any) -> _Layout:
    """A parameter of a module, such as the stacked weights of experts: e stands for expert."""
    if module.num_experts == 1:
        return _Layout(base="1 m n -> m n" if module.get_param().ndim == 3 else None)
    base = None if module._did_swap_in_out_features else "e n m -> e m n"
    axes = (("e", module.num_experts),)
    return _Layout("m (r e) -> e m r", "(e r) n -> e n r", base, axes, 1)


def _convolution(module: Any, weight: torch.Tensor) -> _Layout:
    """B is 1×1 and may be in groups, A has the kernel; merged in the order of the memory."""
    kernel = "a b c"[: 2 * weight.ndim - 5]
    ones = "1 " * (weight.ndim - 2)
    inner = f"(i {kernel})" if weight.is_contiguous() else f"({kernel} i)"
    groups = module.get_base_layer().groups
    if groups > 1:
        axes = (("g", groups),)
        return _Layout(f"(g m) r {ones}-> g m r", f"(g r) i {kernel} -> g {inner} r", None, axes, 1)
    return _Layout(f"m r {ones}-> m r", f"r i {kernel} -> {inner} r", f"m i {kernel} -> m {inner}")


def _base(module: Any, called: str, layout: _Layout) -> Factor:
    """W₀ as the factor that shifts the product.

    Raises:
        ValueError: it is quantized, parametrized, sharded, or not what BA is added to.
    """
    kinds, layer = _kinds(module), module.get_base_layer()
    attribute = module.parameter_name if f"{_LORA}.ParamWrapper" in kinds else "weight"
    weight = layer._parameters.get(attribute)
    why = None
    if f"{_LORA}.MultiheadAttention" in kinds:
        why = "PEFT replaces the weights of nn.MultiheadAttention in every forward pass"
    elif weight is None or type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        got = "none" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        why = f"its {attribute} is {got}: quantized, parametrized or sharded weights are not read"
    elif getattr(layer, "groups", 1) > 1:
        why = "the update of a convolution in groups has more inputs than the weight"
    if why is not None:
        raise ValueError(
            f"{called}: expected a dense weight for lora='full', but {why}; use lora='delta', "
            "which does not need it"
        )
    return Factor(layer, attribute, layout.base, layout.axes)


def _embeds(module: Any, adapter: str) -> bool:
    return adapter in module.lora_embedding_A


def _kinds(module: nn.Module) -> set[str]:
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}


def _called(module: Any, name: str) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _mixture(module: nn.Module, name: str) -> Iterator[Product]:
    """X-LoRA decides for each token how much of each adapter there is."""
    raise ValueError(
        f"{_called(module, name)}: expected LoRA with a fixed scaling, got X-LoRA, whose update "
        "depends on the input; pass the optimizer a list of other products"
    )


LORA: dict[str, dict[type | str, Callable[[nn.Module, str], Iterator[Product]]]] = {
    target: {
        f"{_PEFT}.tuners_utils.BaseTunerLayer": provider,
        f"{_PEFT}.xlora.model.XLoraModel": _mixture,
    }
    for target, provider in (("delta", _delta), ("full", _full))
}
"""What decays -> qualified name -> its provider."""
