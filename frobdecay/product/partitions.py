"""Parameters and optimizers that other frameworks have cut up, and what works in their place.

``fully_shard`` and ``parallelize_module`` leave every parameter its shape (a ``DTensor``): such
factors decay like any others. FSDP1 and DeepSpeed flatten parameters into buffers that know no
matrices, and free the whole ones between uses. They are recognized by what they leave on tensors
and by class names, without an import, and refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_FULLY_SHARD = "shard with torch.distributed.fsdp.fully_shard, which keeps factors as they are"
_FSDP1 = f"flattened by FullyShardedDataParallel (FSDP1); {_FULLY_SHARD}"
_ZERO3 = f"partitioned by DeepSpeed ZeRO-3 (it has a ds_id); {_FULLY_SHARD}"


def why_partitioned(owner: Any, attribute: str, tensor: Tensor) -> str | None:
    """Say why a parameter does not hold its numbers now, and what to do; None if it does.

    Args:
        owner: the module that has it.
        attribute: its name there.
        tensor: what is found there.
    """
    if hasattr(tensor, "ds_id") and tuple(tensor.shape) != tuple(tensor.ds_shape):  # type: ignore[attr-defined]
        return _ZERO3
    if hasattr(tensor, "_fsdp_flattened") and tensor.ndim < 2:
        return _FSDP1
    # Without use_orig_params, FSDP1 leaves plain views of a buffer that it frees after use.
    view = isinstance(owner, nn.Module) and attribute in vars(owner)
    if view and tensor.numel() and not tensor.untyped_storage().nbytes() and not tensor.is_meta:
        return _FSDP1
    return None


def refusal_of_optimizer(optimizer: Any) -> str | None:
    """Say why an optimizer that steps on partitions cannot be wrapped; None if it can."""
    if type(optimizer).__module__.partition(".")[0] == "deepspeed":
        return (
            "it steps on flat partitions, which are no factors; with ZeRO-1 or 2 set the factors' "
            "weight_decay to 0 and add frobdecay.penalty(products, λ) to the loss, in place of "
            f"ZeRO-3 {_FULLY_SHARD}"
        )
    if _is_zero1(optimizer) and getattr(optimizer, "_overlap_with_ddp", False):
        return (
            "with overlap_with_ddp=True it updates in the backward pass, where no step could decay "
            "anything; build it without"
        )
    return None


def refusal_of_division(optimizer: Optimizer) -> str | None:
    """Say why the param groups of an optimizer cannot be divided any more; None if they can."""
    if not _is_zero1(optimizer):
        return getattr(optimizer, "why_undivided", None)
    return (
        "it has partitioned its param groups already; give the factors a group of their own when "
        "building it, as in ZeroRedundancyOptimizer([{'params': others}, {'params': factors}], …)"
    )


def _is_zero1(optimizer: Any) -> bool:
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
