"""Products of every kind that the tests share: name -> a function that makes one in a dtype."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frobdecay.product.factor import Factor
from frobdecay.product.product import Product

Maker = Callable[[torch.dtype], Product]


def seeded(seed: int) -> torch.Generator:
    """A generator on the device that the tests run on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def bare(
    *shapes: tuple[int, ...],
    scale: float = 1.0,
    batch: int | None = None,
    equation: str | None = None,
) -> Maker:
    """A product of random parameters of the given shapes."""

    def make(dtype: torch.dtype) -> Product:
        tensors = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        return Product.of(*tensors, scale=scale, batch=batch, equation=equation)

    return make


class Sizes(TorchDispatchMode):
    """Notes the number of entries of every tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the function and note its results."""
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple) else (out,)
        self.seen += [t.numel() for t in results if isinstance(t, torch.Tensor)]
        return out


def grouped_queries(dtype: torch.dtype) -> Product:
    """Query-key products with two query heads for each key head: row axes that are no one axis."""
    query, key = nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.randn(6, 5))
    return Product.of(
        nn.Parameter(query.detach().to(dtype)),
        nn.Parameter(key.detach().to(dtype)),
        patterns=["(g q d) e -> g q e d", "(g d) e -> g e d"],
        axes={"g": 2, "q": 2, "d": 3},
        batch=1,
    )


def packed(dtype: torch.dtype) -> Product:
    """Query-key products whose factors are parts of one packed parameter."""
    owner = nn.Module()
    owner.in_proj_weight = nn.Parameter(torch.randn(18, 5).to(dtype))
    axes = (("t", 3), ("h", 2), ("d", 3))
    query, key = (
        Factor(owner, "in_proj_weight", "(t h d) e -> t h e d", axes, index) for index in (0, 1)
    )
    return Product("attention.query_key", (query, key), batch=1)


def symmetric(dtype: torch.dtype) -> Product:
    """W = U Uᵀ: one parameter is both factors."""
    tensor = nn.Parameter(torch.randn(6, 2).to(dtype))
    return Product.of(tensor, tensor)


PRODUCTS: dict[str, Maker] = {
    "pair": bare((7, 3), (5, 3)),
    "scaled": bare((7, 3), (5, 3), scale=0.5),
    "rank one": bare((7, 1), (5, 1)),
    "full rank": bare((4, 4), (4, 4)),
    "wide": bare((3, 9), (4, 9)),
    "one row": bare((1, 2), (6, 2)),
    "deep": bare((7, 3), (3, 3), (5, 3)),
    "deep near full rank": bare((6, 5), (5, 5), (6, 5)),
    "deep, two inner": bare((7, 3), (3, 4), (4, 2), (5, 2)),
    "batched": bare((4, 7, 3), (4, 5, 3)),
    "batched deep": bare((2, 7, 3), (2, 3, 3), (2, 5, 3)),
    "batched full rank": bare((2, 4, 4), (2, 4, 4)),
    "two batch axes": bare((2, 3, 5, 2), (2, 3, 4, 2)),
    "train of cores": bare((4, 2), (3, 2, 3), (5, 3), batch=0),
    "train with row axes": bare((2, 4, 2), (3, 2, 3), (2, 5, 3), batch=0),
    "grouped queries": grouped_queries,
    "packed heads": packed,
    "symmetric": symmetric,
    "tucker": bare((3, 2, 4), (5, 3), (4, 2), (6, 4), equation="xyz,ax,by,cz->abc"),
    "tucker, order 2": bare((3, 2), (5, 3), (4, 2), equation="xy,ax,by->ab", scale=0.5),
    "tucker, a whole mode": bare((3, 5, 2), (7, 3), (4, 2), equation="xbz,ax,cz->abc"),
    "cp": bare((5, 3), (4, 3), (6, 3), equation="ar,br,cr->abc"),
    "cp, order 5": bare(
        (2, 3), (3, 3), (4, 3), (2, 3), (3, 3), equation="ar,br,cr,dr,er->abcde", scale=0.5
    ),
    "cp above its modes": bare((3, 7), (2, 7), (4, 7), equation="ar,br,cr->abc"),
    "kronecker": bare((2, 3), (4, 2), equation="ab,cd->acbd"),
    "tensor ring": bare((3, 2, 4), (4, 4, 2), (5, 2, 2), equation="aij,bjk,cki->abc"),
    "entry by entry": bare((2, 3, 2), (2, 4, 2), (4, 3), equation="har,hbr,ba->hba", scale=2.0),
}
