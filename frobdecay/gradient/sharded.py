"""Frobenius decay of sharded factors: exact, for one small all-reduce a step.

Every process of a ``DeviceMesh`` holds some rows of U and V. A Gram is a sum over rows, so

    UᵀU = Σ_p U_pᵀU_p,    ∇_{U_p} ½‖W‖² = U_p (VᵀV),

and all that processes have to tell each other are r×r numbers: the Grams of all products on a mesh
go into one buffer and through one all-reduce, whose sum all processes then read bit for bit alike.
So it is for the factors of every ``Network``, whose rows are the letters that no other factor has.
What cannot be summed by rows travels whole in that buffer, every process adding its part to zeros:
what is no larger than its Gram (inner factors M, r×r; cores), and factors that are cut where a Gram
has its columns (a LoRA A of r×n numbers that ``fully_shard`` cuts by r; ``shard_rows`` has it cut
by n). Of copies of a part, as in hybrid sharding and tensor parallelism, one contributes. Products
that are kept apart by a batch axis (attention heads) and are cut between them need nothing of each
other.

What is sent depends on the products alone, never on gradients, and the order on their names and
meshes: a process that has no gradient for a layer does not fall out of step with the others.
Which part of a factor a process holds is in ``placement.py``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from textwrap import shorten
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from frobdecay.algebra.lowering import matrix_gram
from frobdecay.algebra.network import Network
from frobdecay.algebra.precision import beside, common_dtype, in_front
from frobdecay.gradient.bucketed import Coefs, Grams, Targets
from frobdecay.gradient.placement import Placed, part_of, place, refuse_unfit
from frobdecay.product.factor import Factor, is_sharded, whole
from frobdecay.product.product import Product, as_products


@dataclass(frozen=True)
class _Part(Factor):
    """What this process holds of a sharded factor, as a factor of its own."""

    placed: Placed | None = None

    @property
    def param(self) -> Tensor:
        """This process' part of the parameter."""
        return part_of(super().param)

    def view(self, tensor: Tensor) -> Tensor:
        """See a tensor of the part's shape as the factor."""
        assert self.placed is not None
        return self.placed.view(tensor)


def localized(product: Product) -> Product | None:
    """The product of the parts that this process holds, where its decay needs no other parts.

    Returns:
        The product itself if it is not sharded; None if Grams have to be exchanged.

    Raises:
        ValueError: factors on different meshes, or placements without a meaning for factors.
    """
    if not any(is_sharded(param) for param in product.params):
        return product
    refuse_unfit(product)
    placed = [place(factor) for factor in product.factors]
    apart = range(product.batch)  # axes between which products are kept apart
    if not all(cuts is not None and set(cuts) <= set(apart) for p in placed for cuts in p.cuts):
        return None
    if any(p.cuts != placed[0].cuts for p in placed):
        return None
    parts = tuple(_Part(p.factor.owner, p.factor.attribute, placed=p) for p in placed)
    return Product(product.name, parts, product.scale, product.batch, product.structure)


class Sent:
    """What is sent of one product, and what is made of the sum.

    Args:
        product: the product.
        number: its position among all.
        row: which of all factors are its own.

    Attributes:
        segments: of the exchange's buffer, one a factor.
    """

    segments: list[Tensor]

    def __init__(self, product: Product, number: int, row: slice) -> None:
        self.product, self.number, self.row = product, number, row
        self.placed = [place(factor) for factor in product.factors]
        self.dtype = common_dtype(product.params)
        self.network = product.structure if isinstance(product.structure, Network) else None
        grams = [self._gram_shape(k, placed) for k, placed in enumerate(self.placed)]
        self.by_rows = [shape is not None for shape in grams]
        self._given: dict[str, Any] = {} if self.network is None else {"grams": self.by_rows}
        self.shapes = [
            tuple(placed.factor.param.shape) if shape is None else shape
            for placed, shape in zip(self.placed, grams, strict=True)
        ]

    def _gram_shape(self, k: int, placed: Placed) -> tuple[int, ...] | None:
        """The shape of a factor's Gram where that is the sum of all parts', and smaller than it."""
        if self.network is None or not (rows := self.network.rows(k, self.product.batch)):
            return None
        apart = {*rows, *range(self.product.batch)}
        if not all(cuts is not None and set(cuts) <= apart for cuts in placed.cuts):
            return None
        shape = self.network.gram_shape(k, placed.sizes, self.product.batch)
        return shape if prod(shape) < prod(placed.sizes) else None

    def put(self, parts: Targets) -> None:
        """Add this process' parts to zeros: of the factors, or of what has their shapes."""
        batch = self.product.batch
        pairs = zip(self.placed, self.segments, parts[self.row], strict=True)
        for k, (placed, segment, part) in enumerate(pairs):
            if part is None or not placed.contributes:
                continue
            if self.network is not None and self.by_rows[k]:
                gram = self.network.gram(k, placed.view(part_of(part)).to(self.dtype), batch)
                segment[placed.slices(batch)].copy_(gram)
            else:
                segment[placed.box].copy_(part_of(part))

    def add(self, targets: Targets, coefs: Coefs) -> None:
        """Add coef·∇ to this process' parts of the targets; the scale is in the coefficients."""
        into, batch = targets[self.row], self.product.batch
        wanted = [
            None if t is None else coef for t, coef in zip(into, coefs[self.row], strict=True)
        ]
        if all(coef is None for coef in wanted):
            return
        found = self.product.structure.gradients(self._summed(), batch, wanted, **self._given)
        for k, (target, gradient) in enumerate(zip(into, found, strict=True)):
            if target is None or gradient is None:
                continue
            placed, part = self.placed[k], part_of(target)
            if self.network is not None and self.by_rows[k]:
                view = placed.view(part_of(placed.factor.param)).to(self.dtype)
                around = gradient[placed.slices(batch)]
                placed.view(part).add_(self.network.times(k, view, around, batch))
            else:
                part.add_(placed.part(gradient))

    def _summed(self) -> list[Tensor]:
        """Grams of the factors summed by rows, views of the others."""
        device = self.product.params[0].device  # of an offloaded factor not that of the mesh
        found = [segment.to(device, self.dtype) for segment in self.segments]
        return [
            sum_ if rows else placed.factor.view(sum_)
            for placed, rows, sum_ in zip(self.placed, self.by_rows, found, strict=True)
        ]

    def grams(self) -> list[Tensor]:
        """The Grams of the factors of a chain, whose rows have no letters but the batch's."""
        pairs = zip(self.by_rows, self._summed(), strict=True)
        return [found if rows else matrix_gram(found, self.product.batch) for rows, found in pairs]

    def spread(self, k: int, numbers: Tensor) -> Tensor:
        """A number for each entry of the batch, over this process' part of factor k of all.

        Where the parameter is more than the factor, 1: what is multiplied there is not its own.
        """
        placed: Placed = self.placed[k - self.row.start]
        if not numbers.ndim and prod(placed.sizes) == placed.factor.param.numel():
            return numbers
        return placed.part(in_front(numbers, placed.factor.outline()), 1.0)

    def times(self, k: int, tensor: Tensor, matrix: Tensor) -> Tensor:
        """This process' part of a tensor like factor k of all, times (*batch, r, r)."""
        j: int = k - self.row.start
        placed, batch = self.placed[j], self.product.batch
        if self.by_rows[j]:
            part = part_of(tensor)
            found = torch.empty_like(part)
            rows = placed.view(part) @ beside(matrix[placed.slices(batch)], placed.view(part))
            placed.view(found).copy_(rows)
            return found
        view = placed.factor.view(whole(tensor))
        return placed.part(view @ beside(matrix, view))

    def squared_norm(self) -> Tensor:
        """‖W‖_F², the same on every process."""
        product = self.product
        norm: Tensor = product.structure.squared_norm(self._summed(), product.batch, **self._given)
        return norm * product.scale**2


class Exchange:
    """The products of one mesh and what is sent for them: one all-reduce.

    Args:
        sent: of products sharded over one mesh, in an order that is the same on all processes.
    """

    name = "exchange"

    def __init__(self, sent: Sequence[Sent]) -> None:
        self.sent = sent
        self.mesh: Any = sent[0].product.params[0].device_mesh  # type: ignore[attr-defined]
        sizes = [prod(shape) for one in sent for shape in one.shapes]
        dtype = common_dtype(param for one in sent for param in one.product.params)
        self.buffer = torch.zeros(sum(sizes), dtype=dtype, device=self.mesh.device_type)
        pieces = iter(torch.split(self.buffer, sizes))
        for one in sent:
            one.segments = [next(pieces).view(shape) for shape in one.shapes]
        self.group = _group_of(self.mesh)
        _agree(self.mesh, self.group, str([(one.product.name, one.shapes) for one in sent]))
        self._work: Any = None

    @property
    def reason(self) -> str:
        """What is sent, for tables."""
        size = "×".join(map(str, self.mesh.shape))
        return (
            f"{len(self.sent)} on a mesh of {size}: {self.buffer.numel():,} numbers "
            "in one all-reduce"
        )

    def start(self, parts: Targets) -> None:
        """Form the Grams of this process' parts and begin to add up those of all.

        Args:
            parts: of all factors, or of what has their shapes; see ``Sent.put``.
        """
        self.buffer.zero_()
        for one in self.sent:
            one.put(parts)
        self._work = torch.distributed.all_reduce(self.buffer, group=self.group, async_op=True)

    def wait(self) -> None:
        """Wait for the sums."""
        self._work.wait()

    def add(self, targets: Targets, coefs: Coefs) -> None:
        """Add coef·∇½‖W‖² of every product to this process' parts of its targets."""
        for one in self.sent:
            one.add(targets, coefs)

    def grams(self) -> Grams:
        """The Grams of the factors of every product, from the sums; of chains."""
        return {k: gram for one in self.sent for k, gram in enumerate(one.grams(), one.row.start)}

    def squared_norms(self) -> dict[int, Tensor]:
        """‖W‖_F² of every product, by its number, from the sums."""
        return {one.number: one.squared_norm() for one in self.sent}


def _order(mesh: Any) -> Any:
    """Different for different meshes: who waited in another order would wait for ever."""
    return mesh.mesh.flatten().tolist(), tuple(mesh.shape), mesh.mesh_dim_names or ()


def exchanges(products: Mapping[int, Product], rows: Sequence[slice]) -> list[Exchange]:
    """Put products whose Grams have to be exchanged together by mesh.

    Args:
        products: sharded products by number, in any order, also in another one on other processes.
        rows: which of all factors are those of each product.

    Returns:
        For each mesh an exchange, in an order that is the same on all processes.

    Raises:
        RuntimeError: processes of one mesh have other products than this one.
    """
    meshes: dict[Any, list[Sent]] = defaultdict(list)
    for k, product in products.items():
        mesh = product.params[0].device_mesh  # type: ignore[attr-defined]
        meshes[mesh].append(Sent(product, k, rows[k]))
    return [
        Exchange(sorted(meshes[mesh], key=lambda one: (one.product.name, one.product.shape)))
        for mesh in sorted(meshes, key=_order)
    ]


_GROUPS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_AGREED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _group_of(mesh: Any) -> Any:
    """The process group of all of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh not in _GROUPS:
        ranks = mesh.mesh.flatten().tolist()
        _GROUPS[mesh] = torch.distributed.new_group(ranks, use_local_synchronization=True)
    return _GROUPS[mesh]


def _agree(mesh: Any, group: Any, layout: str) -> None:
    """Make sure, once, that all processes send the same: sums of other things would be silent."""
    agreed = _AGREED.setdefault(mesh, set())
    if layout in agreed:
        return
    digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=mesh.device_type)
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=group)
    if int(extremes[0]) != digest or int(extremes[1]) != -digest:
        raise RuntimeError(
            f"expected the same products, with factors of the same shapes, on all processes of "
            f"{mesh}, but others have not what this one has: {shorten(layout, 200)}; products are "
            "matched by name: build the same model, with the same ranks, on every process"
        )
    agreed.add(layout)


def shard_rows(size: int) -> Callable[[nn.Parameter], Any]:
    """Make a ``shard_placement_fn`` that has ``fully_shard`` cut matrices along their longer side.

    ``fully_shard`` cuts dimension 0. Of a factor that is stored wide, as LoRA's A (r×n), those
    are the r columns of V, and n·r numbers travel for its decay; cut along n, r·r do. Torch asks
    for even cuts of dimension 1: matrices that have none are cut along dimension 0.

    Args:
        size: number of processes that one copy of the model is sharded over.

    Examples:
        >>> from torch import nn
        >>> placement = shard_rows(4)
        >>> placement(nn.Parameter(torch.ones(8, 64))), placement(nn.Parameter(torch.ones(64, 8)))
        (Shard(dim=1), None)
    """

    def placement(parameter: nn.Parameter) -> Any:
        from torch.distributed.tensor import Shard

        wide = parameter.ndim == 2 and parameter.shape[0] < parameter.shape[1]
        return Shard(1) if wide and parameter.shape[1] % size == 0 else None

    return placement


@torch.no_grad()
def check_replicas(products: Product | Iterable[Product], group: Any = None) -> None:
    """Make sure that all processes have the same factors, bit for bit; for debugging.

    Data-parallel copies stay alike because every process adds the same decay to the same averaged
    gradient. What breaks that (another seed, a step that one process skips, other products) shows
    here. Every factor is broadcast once; of sharded factors, the copies of a part are compared.

    Args:
        products: one product or several, in any order.
        group: the processes to compare; by default all. For sharded factors leave it out: their
            mesh says which processes have copies.

    Raises:
        RuntimeError: on all processes, naming the first factor, by name, that differs.

    Examples:
        check_replicas(optimizer.products)        # after every epoch
    """
    found = sorted(as_products(products), key=lambda product: (product.name, product.shape))
    for product in found:
        for factor in product.factors:
            if not _are_alike(factor.param, group):
                raise RuntimeError(
                    f"expected the same numbers in {factor.attribute} of {product.name!r} on all "
                    "processes, got others: from here on the copies of the model drift apart; "
                    "load one checkpoint on all, and look for a step or a seed that they do not "
                    "share"
                )


def _are_alike(param: Any, group: Any) -> bool:
    """Whether the copies of a parameter, or of a part of it, are the same; known to all."""
    comm, part, device = torch.distributed, param, param.device
    groups, everyone = [group], group
    if is_sharded(param):
        mesh, part = param.device_mesh, part_of(param)
        device, everyone = torch.device(mesh.device_type), _group_of(mesh)
        groups = [mesh.get_group(d) for d, p in enumerate(param.placements) if p.is_replicate()]
    differ = torch.zeros((), dtype=torch.int64, device=device)
    raw = part.detach().to(device).contiguous().flatten().view(torch.uint8)  # NaN equals itself
    for one in groups:
        first = raw.clone()
        comm.broadcast(first, group=one, group_src=0)
        differ += not torch.equal(first, raw)
    comm.all_reduce(differ, comm.ReduceOp.MAX, group=everyone)
    return not bool(differ)
