"""By how much the gradient of ½‖W‖², linear in each factor, scales one at most."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from frobdecay.algebra.contraction import plan
from frobdecay.algebra.lowering import aligned
from frobdecay.algebra.network import Network
from frobdecay.algebra.precision import Views, accumulable


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
