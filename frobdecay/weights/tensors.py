"""``Tucker``, ``TensorTrain`` and ``CP``: ranks, shapes of the factors, and how they combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from frobdecay.algebra.decompositions import cp_als, hooi, hosvd, tt_svd, tucker_dense
from frobdecay.algebra.network import Network, cp, tucker
from frobdecay.algebra.tensorize import cp_rank, train_ranks, tucker_ranks
from frobdecay.weights.parametrization import Shapes, recorded
from frobdecay.weights.tensorized import Init, Stages, Tensorized


def _khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker products of the columns of (m, r) and (n, r): (m·n, r)."""
    return (a[:, None] * b[None]).flatten(0, 1)


@recorded
class Tucker(Tensorized):
    """Parametrize a weight as a core times one factor a mode, W = G ×₁ U₁ … ×_d U_d.

    Examples:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> layer = torch.nn.Conv2d(16, 32, 3)
        >>> _ = parametrize.register_parametrization(layer, "weight", Tucker((8, 4, None)))
        >>> [tuple(p.shape) for p in layer.parametrizations.weight.parameters()]
        [(8, 4, 9), (32, 8), (16, 4)]

    A mode whose rank is its size has no factor: a square one would be redundant. A convolution at
    ranks (r, s, None) therefore is Tucker-2, 1×1 · k×k · 1×1 (Kim et al. 2016, arXiv:1511.06530).

    Args:
        rank: an int, cut down to what fits each mode; a fraction of each mode; or one for each
            mode, of which None keeps the mode whole.
        pattern: an einops pattern with the modes on its right side, or "flat". By default
            a weight with three axes or more keeps them, the kernel's as one mode, and every
            other one is read "flat".
        axes: lengths that the pattern needs.
        modes: how many modes "flat" makes.
        init: "spectral", the truncated higher-order singular value decomposition; "hooi", the same
            improved; "matched", Gaussian; or a callable.
    """

    inits: ClassVar[Mapping[str, Init]] = {"spectral": hosvd, "hooi": hooi}

    def ranks(self, modes: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the core."""
        return tucker_ranks(self.rank, modes)

    def shapes(self, modes: Sequence[int], ranks: tuple[int, ...]) -> Shapes:
        """The core's, then those of the factors."""
        return (ranks, *((n, r) for n, r in zip(modes, ranks, strict=True) if r < n))

    def structure(self, modes: Sequence[int], ranks: tuple[int, ...]) -> Network:
        """A core and factors, where a mode is not whole."""
        pairs = enumerate(zip(modes, ranks, strict=True))
        return tucker(len(modes), [k for k, (n, r) in pairs if r == n])

    def bond(self, ranks: tuple[int, ...], cut: int) -> int:
        """The smaller side of the core."""
        return min(prod(ranks[:cut]), prod(ranks[cut:]))

    def sides(self, factors: Sequence[Tensor], cut: int) -> tuple[Tensor, Tensor]:
        """The factors of one side, and the core multiplied by those of the other.

        The side on which the core is smaller stands alone, in a Kronecker product.
        """
        core, held = factors[0], self._by_mode(factors)
        left = prod(core.shape[:cut]) <= prod(core.shape[cut:])
        side = range(cut) if left else range(cut, core.ndim)
        alone = [held[k] if k in held else core.new_ones(core.shape[k]).diag() for k in side]
        through = tucker_dense(core, {k: U for k, U in held.items() if k not in side})
        matrix, kron = through.flatten(cut).flatten(0, cut - 1), reduce(torch.kron, alone)
        return (kron, matrix.mT) if left else (matrix, kron)

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """Multiply the core by one factor after the other."""
        return tucker_dense(factors[0], self._by_mode(factors))

    def stages(self, factors: Sequence[Tensor]) -> Stages | None:
        """Where output and input channels each are a mode with a factor, and the kernel follows."""
        view, held = self._known(), self._by_mode(factors)
        if view.reading is None:
            return None
        axes, modes = view.reading.tensor_axes, view.reading.read_axes
        kernel, rest = (tuple(a for item in part[2:] for a in item) for part in (axes, modes))
        if not kernel or kernel != rest or modes[:2] != axes[:2]:
            return None
        if 0 not in held or 1 not in held:
            return None
        out, into = held.pop(0), held.pop(1)
        core = tucker_dense(factors[0], held)
        return out, core.reshape(*core.shape[:2], *view.shape[2:]), into

    def _by_mode(self, factors: Sequence[Tensor]) -> dict[int, Tensor]:
        """Mode -> factor, those first that make the core grow least, by the sizes that we know."""
        modes = self._known().modes
        ranks = self.ranks(modes)
        smaller = [k for k, (n, r) in enumerate(zip(modes, ranks, strict=True)) if r < n]
        held = zip(smaller, factors[1:], strict=True)
        return dict(sorted(held, key=lambda item: modes[item[0]] / ranks[item[0]]))


@recorded
class TensorTrain(Tensorized):
    """Parametrize a weight as a tensor train, W[i₁ … i_d] = C₁[i₁] C₂[i₂] … C_d[i_d].

    Examples:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> layer = torch.nn.Linear(160, 160)
        >>> _ = parametrize.register_parametrization(layer, "weight", TensorTrain(0.234))
        >>> [tuple(p.shape) for p in layer.parametrizations.weight.parameters()]
        [(32, 7), (32, 7, 6), (25, 6)]

    Its product is a chain U · C₂ … · V, whose inner factors are summed over their modes.

    Args:
        rank: of the bonds; an int, cut down to what fits; a fraction of min(n_k, n_{k+1}); or one
            for each of the d − 1 bonds.
        pattern: an einops pattern with the modes on its right side, or "flat". By default
            a weight with three axes or more keeps them, the kernel's as one mode, and every
            other one is read "flat".
        axes: lengths that the pattern needs.
        modes: how many modes "flat" makes.
        init: "spectral", the TT-SVD with balanced bonds; "matched", Gaussian; or a callable.
    """

    inits: ClassVar[Mapping[str, Init]] = {"spectral": tt_svd}

    def ranks(self, modes: Sequence[int]) -> tuple[int, ...]:
        """The bonds."""
        return train_ranks(self.rank, modes)

    def shapes(self, modes: Sequence[int], ranks: tuple[int, ...]) -> Shapes:
        """U (n_1, r_1), cores (n_k, r_{k−1}, r_k), V (n_d, r_{d−1})."""
        inner = zip(modes[1:-1], ranks, ranks[1:], strict=False)
        return ((modes[0], ranks[0]), *inner, (modes[-1], ranks[-1]))

    def bond(self, ranks: tuple[int, ...], cut: int) -> int:
        """The bond that is cut."""
        return ranks[cut - 1]

    def sides(self, factors: Sequence[Tensor], cut: int) -> tuple[Tensor, Tensor]:
        """The train up to the bond, and from it."""
        L, *inner, R = factors
        for core in inner[: cut - 1]:
            L = (L @ core).transpose(0, 1).flatten(0, 1)
        for core in reversed(inner[cut - 1 :]):
            R = (R @ core.mT).flatten(0, 1)
        return L, R


@recorded
class CP(Tensorized):
    """Parametrize a weight as a sum of r terms, W = Σ_a U₁[:, a] ∘ … ∘ U_d[:, a].

    Examples:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> layer = torch.nn.Conv2d(16, 32, 3)
        >>> _ = parametrize.register_parametrization(layer, "weight", CP(4))
        >>> [tuple(p.shape) for p in layer.parametrizations.weight.parameters()]
        [(32, 4), (16, 4), (9, 4)]

    Args:
        rank: r, an int or a fraction of the smallest mode, which it may exceed.
        pattern: an einops pattern with the modes on its right side, or "flat". By default
            a weight with three axes or more keeps them, the kernel's as one mode, and every
            other one is read "flat".
        axes: lengths that the pattern needs.
        modes: how many modes "flat" makes.
        init: "spectral", alternating least squares, which warns where it does not converge;
            "matched", Gaussian; or a callable.
    """

    inits: ClassVar[Mapping[str, Init]] = {"spectral": cp_als}

    def ranks(self, modes: Sequence[int]) -> int:
        """The number of terms."""
        return cp_rank(self.rank, modes)

    def shapes(self, modes: Sequence[int], ranks: int) -> Shapes:
        """(n_k, r) each."""
        return tuple((n, ranks) for n in modes)

    def structure(self, modes: Sequence[int], ranks: int) -> Network:
        """One sum."""
        return cp(len(modes))

    def bond(self, ranks: int, cut: int) -> int:
        """The number of terms."""
        return ranks

    def sides(self, factors: Sequence[Tensor], cut: int) -> tuple[Tensor, Tensor]:
        """The Khatri–Rao products of either side."""
        return reduce(_khatri_rao, factors[:cut]), reduce(_khatri_rao, factors[cut:])
