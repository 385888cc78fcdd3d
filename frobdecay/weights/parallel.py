"""Tensor parallelism for factorized linear layers, on torch's own ``parallelize_module``.

The weight W = U M Vᵀ is never formed. With U (m×r) and V (n×r) tall, P processes and T rows of x,

    column-wise   U sharded on m, V replicated      y_p = (x V) Mᵀ U_pᵀ + b_p
    row-wise      V sharded on n, U replicated      y = (Σ_p x_p V_p) Mᵀ Uᵀ + b

so that what the processes exchange are the T×r numbers between V and U, forward and backward,
where a dense layer exchanges T×n or T×m. With sequence-parallel neighbours (inputs or outputs
``Shard(1)``) the replicated factor works on T/P rows, too; else on all T.

    mesh = init_device_mesh("cuda", (8,))
    parallelize_module(model, mesh, {"up": ColwiseFactored(), "down": RowwiseFactored()})

This module is not imported with the package: it brings in ``torch.distributed.tensor``.
"""

from __future__ import annotations

from abc import abstractmethod
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from frobdecay.product.holding import lists_of
from frobdecay.weights.lowrank import LowRank


class _Factored(ParallelStyle):
    """What the two styles share: layouts, checks, the sharding of the parameters."""

    _dense: str  # torch's style for a dense layer
    _placements: tuple[Placement, Placement, Placement]  # of U, V, bias
    _layouts: tuple[Placement, Placement]  # of input and output unless given

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts or self._layouts[0],)
        self.output_layouts = (output_layouts or self._layouts[1],)
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        options = ("input_layouts", "output_layouts", "use_local_output")
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in options)
        return f"{type(self).__name__}({shown})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Shard the factors and have the layer compute with them; what torch calls."""
        self._check(module, device_mesh)
        held = lists_of(module)["weight"]
        U, V, bias = self._placements
        last = len(list(held.parameters())) - 1
        for i in range(last + 1):
            placement = U if i == 0 else V if i == last else Replicate()
            self._distribute(held, f"original{i}", placement, device_mesh)
        if module.bias is not None:
            self._distribute(module, "bias", bias, device_mesh)

        def forward(module: nn.Module, input: Tensor) -> Tensor:  # noqa: A002  as nn.Linear's
            x = input
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, self.input_layouts, run_check=False)
            y = self._compute(module, x, device_mesh)
            y = y.redistribute(placements=self.output_layouts)
            return y.to_local() if self.use_local_output else y

        # A method, and not a closure over the module: a deep copy's forward is the copy's.
        module.forward = MethodType(forward, module)
        return module

    def _distribute(self, owner: nn.Module, name: str, placement: Placement, mesh: Any) -> None:
        """Replace a parameter by its distributed one, as the source rank has it."""
        whole: Any = getattr(owner, name)
        sharded = distribute_tensor(
            whole.detach(), mesh, [placement], src_data_rank=self.src_data_rank
        )
        owner._parameters[name] = nn.Parameter(sharded, whole.requires_grad)

    def _check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Refuse, before anything is changed, what this style cannot shard."""
        kind, shown = type(self).__name__, _shown(module)
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"{kind}: expected a factorized nn.Linear, got {shown}; leave it out of the plan, "
                "or merge it and use a style of torch.distributed.tensor.parallel"
            )
        if mesh.ndim != 1:
            raise ValueError(
                f"{kind}: expected a mesh with one dimension, got {mesh}; pass the dimension that "
                "is for tensor parallelism, as mesh['tp']"
            )
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise ValueError(
                f"{kind}: expected plain parameters, got {shown}, which is sharded already; "
                "first parallelize_module, once, and fully_shard after it"
            )
        if "weight" not in lists_of(module):
            raise ValueError(
                f"{kind}: expected a factorized nn.Linear, got the dense {shown}; factorize it "
                f"first, or use torch.distributed.tensor.parallel.{self._dense} for it"
            )
        _check_factors(kind, module)

    @abstractmethod
    def _compute(self, module: nn.Module, x: DTensor, mesh: DeviceMesh) -> DTensor:
        """The layer's output, in whatever layout it comes out."""


def _check_factors(kind: str, module: nn.Linear) -> None:
    held = lists_of(module)
    chain = held["weight"][0]
    view = getattr(chain, "matricization", None)
    if (
        len(held) > 1
        or len(held["weight"]) > 1
        or getattr(type(chain), "forward", None) is not LowRank.forward
        or view is None
        or view.batch
        or view.tensor_axes != (view.row_axes, view.column_axes)
    ):
        raise ValueError(
            f"{kind}: expected a weight W = U M Vᵀ with U of {module.out_features} rows and V of "
            f"{module.in_features}, and no other parametrization, got {_shown(module)} with "
            f"{dict(held)}; factorize it with LowRank and its default pattern"
        )


def _shown(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


class ColwiseFactored(_Factored):
    """Shard a factorized linear layer by output features: U on dimension 0, V replicated.

    Inputs that are sharded in another dimension than the features, as behind a sequence-parallel
    layer, are multiplied by V before they are gathered, so that r numbers a row are. The backward
    pass adds up r numbers a row.

    Args:
        input_layouts: layout of the input where it is no ``DTensor``; by default ``Replicate()``.
            ``Shard(1)`` behind a sequence-parallel layer.
        output_layouts: layout of the output; by default ``Shard(-1)``.
        use_local_output: return this process's part as a plain tensor, not a ``DTensor``.

    Raises:
        TypeError: from ``parallelize_module``, for other modules than ``nn.Linear``.
        ValueError: likewise for a dense layer, a weight that is not U M Vᵀ as a whole, parameters
            that are sharded already, a mesh of more than one dimension. Nothing was changed then.
    """

    _dense = "ColwiseParallel"
    _placements = (Shard(0), Replicate(), Shard(0))
    _layouts = (Replicate(), Shard(-1))

    def _compute(self, module: nn.Module, x: DTensor, mesh: DeviceMesh) -> DTensor:
        if not _shards_rows(x.placements[0], x.ndim):
            x = x.redistribute(placements=[Replicate()])
        U, *inner, V = _factors(module)
        rows = x.placements[0]
        h = x.to_local(grad_placements=[rows]) @ _local(V, rows)
        for M in reversed(inner):
            h = h @ _local(M, rows).mT
        h = _distributed(h, mesh, rows, (*x.shape[:-1], U.shape[1]))
        # The one exchange: forward to all processes, backward the sum over all.
        h = h.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        bias = None if module.bias is None else _local(module.bias, Replicate())
        y = F.linear(h, _local(U, Replicate()), bias)
        return _distributed(y, mesh, Shard(x.ndim - 1), (*x.shape[:-1], U.shape[0]))


class RowwiseFactored(_Factored):
    """Shard a factorized linear layer by input features: V on dimension 0, U replicated.

    The partial sums that are added up are the r numbers a row between V and U. With outputs
    sharded in another dimension than the features, they are scattered there at once, and U is
    applied to this process's rows only; its gradient is then added up over the processes.

    Args:
        input_layouts: layout of the input where it is no ``DTensor``; by default ``Shard(-1)``.
        output_layouts: layout of the output; by default ``Replicate()``. ``Shard(1)`` in front of
            a sequence-parallel layer.
        use_local_output: return this process's part as a plain tensor, not a ``DTensor``.

    Raises:
        TypeError, ValueError: as ``ColwiseFactored``.
    """

    _dense = "RowwiseParallel"
    _placements = (Replicate(), Shard(0), Replicate())
    _layouts = (Shard(-1), Replicate())

    def _compute(self, module: nn.Module, x: DTensor, mesh: DeviceMesh) -> DTensor:
        x = x.redistribute(placements=[Shard(-1)])
        U, *inner, V = _factors(module)
        h = x.to_local() @ _local(V, Replicate())
        h = _distributed(h, mesh, Partial(), (*x.shape[:-1], U.shape[1]))
        rows = self.output_layouts[0]
        if not _shards_rows(rows, x.ndim):
            rows = Replicate()
        # The one exchange, while a row has r numbers.
        y = h.redistribute(placements=[rows]).to_local(grad_placements=[rows])
        for M in reversed(inner):
            y = y @ _local(M, rows).mT
        bias = None if module.bias is None else _local(module.bias, rows)
        y = F.linear(y, _local(U, rows), bias)
        return _distributed(y, mesh, rows, (*x.shape[:-1], U.shape[0]))


def _factors(module: nn.Module) -> list[DTensor]:
    """U, M.., V."""
    return list(lists_of(module)["weight"].parameters())


def _shards_rows(placement: Placement, ndim: int) -> bool:
    """Whether whole rows are divided among the processes."""
    return isinstance(placement, Shard) and placement.dim not in (-1, ndim - 1)


def _local(parameter: Any, rows: Placement) -> Tensor:
    """This process's part of a parameter that is applied to such rows.

    Where every process has other rows, its gradient of a replicated parameter is one summand;
    redistribution, which does nothing on the way forward, adds them up.
    """
    placement = parameter.placements[0]
    if placement.is_replicate() and not rows.is_replicate():
        parameter = parameter.redistribute(placements=[Replicate()])
        placement = Partial()
    part: Tensor = parameter.to_local(grad_placements=[placement])
    return part


def _distributed(
    local: Tensor, mesh: DeviceMesh, placement: Placement, shape: tuple[int, ...]
) -> DTensor:
    """Join the processes' parts to a tensor of this shape, which parts of unequal size need."""
    size = torch.Size(shape)
    stride = torch.empty(size, dtype=torch.float32, device="meta").stride()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=size, stride=stride)
