"""Largest eigenvalues: of the map C ↦ ∇_C ½‖W‖², which is linear in each factor C, and of Grams."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from frobdecay.algebra.contraction import plan
from frobdecay.algebra.lowering import aligned
from frobdecay.algebra.network import Network
from frobdecay.algebra.precision import Views, accumulable, full_precision


def sharpness(network: Network, views: Views, batch: int) -> Tensor:
    """The largest eigenvalue of C ↦ ∇_C ½‖W‖² over all factors C.

    For a factor of a chain it is that of L ⊗ R, between the Grams of what is left of it and right
    of it. So it is always: parts of the network that only this factor holds together multiply, and
    so do their largest eigenvalues.
    """
    views = accumulable(views)
    return torch.stack([_around(network, k, views, batch) for k in range(len(views))]).max()


def _around(network: Network, k: int, views: Views, batch: int) -> Tensor:
    terms, sizes = network.with_batch(batch), network.sizes(views, batch)
    apart = "".join(c for c in terms[k] if c not in network.bonds)  # a map for each entry of those
    found = views[0].new_ones([sizes[c] for c in apart])
    left = [j for j in range(len(views)) if j != k]
    while left:
        part = [left.pop()]
        for j in part:
            near = [i for i in left if set(terms[i]) & set(terms[j]) - set(apart)]
            part += near
            left = [i for i in left if i not in near]
        below = "".join(terms[j] for j in part)
        own = "".join(c for c in apart if c in below)
        ends = "".join(c for c in terms[k] if c in network.bonds and c in below)
        every = *(terms[j] for j in part), *(network.copied(terms[j]) for j in part)
        tensors = [views[j] for j in part] * 2
        shapes = tuple([tensor.shape for tensor in tensors])
        made = plan(every, own + ends + network.copied(ends), shapes).result(tensors)
        n = prod(sizes[c] for c in ends)
        largest = torch.linalg.eigvalsh(made.reshape(*made.shape[: len(own)], n, n))[..., -1]
        found = found * aligned(own, apart)(largest)
    alone = [c for c in terms[k] if c in network.bonds and "".join(terms).count(c) == 1]
    return found.max() * prod(sizes[c] for c in alone)


def norms_above(grams: Tensor) -> Tensor:
    """σ₁ of matrices that have these Grams, from above: matrix products alone, nothing iterates.

    Of the eigenvalues μ of the eighth power of G, the mean t and the mean square q are the squared
    norms of G⁴ and of G⁸, divided by r, and

        μ₁ ≤ t + √((r − 1) (q − t²))        (Wolkowicz & Styan 1980, Linear Algebra Appl. 29),

    with equality where all are equal, as those of an orthogonal matrix, and where one alone is not
    zero. So σ₁ = μ₁^(1/16) is never below the truth, but for rounding, and above it by less than
    (½ + ½√r)^(1/16), to which it comes where half of the singular values are σ₁ and the others
    zero: 13 % at r = 192, 19 % at 1,024. For random matrices of 768 rows it is 4 % at r = 192.
    A power iteration comes from below, needs a vector kept from step to step, and where σ₁ and σ₂
    are near each other, many steps; eigenvalue solvers make the host wait for the GPU.

    Args:
        grams: (..., r, r), float32 or better.

    Returns:
        (...); 0 of zeros, infinity where the diagonal overflowed, and NaN where it has a NaN.

    Examples:
        >>> import torch
        >>> norms_above(torch.diag_embed(torch.tensor([[1.0] * 5, [4, 1, 1, 1, 0]]).double()))
        tensor([1.0000, 2.0000], dtype=torch.float64)
    """
    info, r = torch.finfo(grams.dtype), grams.shape[-1]
    top = grams.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]  # no entry is larger
    top = top.clamp_min(info.tiny)
    unit = grams / top  # first, because the squares of large entries overflow
    size = torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True)
    unit = unit / size.clamp_min(info.tiny)
    with full_precision(grams.device.type):  # in float16 the eighth power of many is 0
        fourth = torch.linalg.matrix_power(unit, 4)
        eighth = fourth @ fourth
    mean, square = (power.square().sum((-2, -1)) / r for power in (fourth, eighth))
    spread = (square - mean.square()).clamp_min(0) + 4 * info.eps * square
    largest = mean + ((r - 1) * spread).sqrt()
    found: Tensor = (top.sqrt() * size.sqrt())[..., 0, 0] * largest.pow(1 / 16)
    # Of finite factors too large for a Gram, whose other entries may be infinity less infinity.
    return torch.where(top[..., 0, 0].isinf(), torch.inf, found)
