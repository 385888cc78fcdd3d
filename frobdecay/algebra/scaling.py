"""Weights of any magnitude: which can be factorized, scaling by powers of two, norms.

Squares of a float32 weight leave float32 from 1e19 on and below 1e-23, those of a float64 weight
float64 likewise. Whatever squares a weight (a Gram, a norm, an error) therefore works on W·2⁻ᵉ,
whose largest entry is about 1, and multiplies what comes out by its share of 2ᵉ: nothing is
rounded by a power of two. Copies in a wider dtype are made block by block, never of a whole weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, prod

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What torch multiplies matrices of on every device: factors of other dtypes could not train."""

BLOCK = 1 << 20
"""Entries that are widened at once: 8 MB in float64."""

ROW, LONG = 1 << 10, 1 << 16
"""Norms are taken of rows of so many entries, of tensors with more than so many."""


def work_dtype(tensor: Tensor) -> torch.dtype:
    """float64, except on devices that do not have it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


# --- what can be factorized -----------------------------------------------------------------------


def check_weight(weight: Tensor, what: str = "the weight") -> None:
    """Refuse what cannot be factorized.

    Raises:
        TypeError: not a dense tensor with storage, of a dtype in ``DTYPES``.
        ValueError: fewer than two dimensions, an empty one, or entries that are not finite.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected {what} to be a tensor, got a {type(weight).__name__}")
    if weight.layout != torch.strided or weight.is_quantized or weight.dtype not in DTYPES:
        raise TypeError(
            f"expected {what} to be a dense real floating-point tensor of a dtype that torch "
            f"multiplies, got {weight.dtype}, {weight.layout}; convert it first"
        )
    if weight.is_meta:
        raise TypeError(
            f"expected {what} to hold numbers, got a tensor on the meta device; "
            "materialize and initialize the module before factorizing it"
        )
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(
            f"expected {what} to be a matrix without empty dimensions, got {tuple(weight.shape)}"
        )
    if not is_finite(weight):
        raise ValueError(f"expected {what} to be finite, got NaN or infinity; initialize it first")


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity: one pass, no copies."""
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def why_dead(tensor: Tensor, batch: int = 0) -> str | None:
    """Say that factors would never train: all of them zero, and so all their gradients.

    Args:
        tensor: (*batch, …).
        batch: number of leading axes that tell apart what is factorized one by one.

    Returns:
        None unless the tensor, or one of the batch, is zero throughout.
    """
    tensor = tensor.detach()
    if bool(tensor.flatten(batch).any(-1).all() if batch else tensor.any()):
        return None
    part = "zero in one of its matrices" if batch else "zero"
    return f"{part}, and its factors would be zero and never train; initialize it first"


def check_not_zero(tensor: Tensor, batch: int = 0) -> None:
    """Refuse what has factors that never train; see ``why_dead``.

    Raises:
        ValueError: it is zero.
    """
    if reason := why_dead(tensor, batch):
        raise ValueError(f"the weight is {reason}, or merge it to have it dense")


# --- powers of two --------------------------------------------------------------------------------


def exponents(tensor: Tensor, dims: Sequence[int], multiple: int = 1) -> Tensor:
    """The powers e with which W·2⁻ᵉ has its largest entry in [2⁻ᵐ, 1), for m the multiple.

    Args:
        tensor: W.
        dims: what shares one power; all of them for the tensor as a whole.
        multiple: of which e has to be one, so that a root of 2ᵉ is a power of two, too.

    Returns:
        int32, with ``dims`` kept at length 1; 0 where there are only zeros.
    """
    high, low = (f(tuple(dims), keepdim=True) for f in (tensor.amax, tensor.amin))
    largest = torch.maximum(high, -low).to(torch.promote_types(tensor.dtype, torch.float32))
    found: Tensor = torch.frexp(largest).exponent
    return -(-found).div(multiple, rounding_mode="floor").mul(multiple)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2ᵉ, exactly, within the normal numbers of float64, or of float32 for any other dtype.

    Written as bits: ``torch.pow`` promises no exact powers, and depends on the default dtype.
    """
    if dtype == torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    return ((exponent.int() + 127) << 23).view(torch.float32).to(dtype)


def times_power(tensor: Tensor, exponent: Tensor) -> Tensor:
    """W·2ᵉ: exact where the result is a normal number. In two steps, since 2ᵉ may be none."""
    half = exponent >> 1
    first, second = (power_of_two(e, tensor.dtype) for e in (half, exponent - half))
    return (tensor * first).mul_(second)


class Unit:
    """A matrix or a batch of them at unit size: W·2⁻ᵉ, in blocks of rows.

    Args:
        weight: (*batch, m, n).
        exponent: e, (*batch, 1, 1), even; found unless given.
    """

    def __init__(self, weight: Tensor, exponent: Tensor | None = None) -> None:
        self.weight = weight.detach()
        self.exponent = exponents(self.weight, (-2, -1), 2) if exponent is None else exponent

    @property
    def shape(self) -> torch.Size:
        """(*batch, m, n)."""
        return self.weight.shape

    @property
    def mT(self) -> Unit:
        """The transposed matrices."""
        return Unit(self.weight.mT, self.exponent)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """W·2⁻ᵉ in one, contiguous: a memory layout of the weight's would change the rounding."""
        return times_power(self.weight.to(dtype), -self.exponent).contiguous()

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of W·2⁻ᵉ, made anew at each use.

        Yields:
            which rows, and those rows (*batch, k, n), contiguous.
        """
        for rows in self.rows():
            yield rows, Unit(self.weight[..., rows, :], self.exponent).whole(dtype)

    def rows(self) -> Iterator[slice]:
        """Which rows are a block."""
        *batch, m, n = self.shape
        # Products with a block have to read or write n×n numbers: not for a few rows.
        step = max(1, BLOCK // (prod(batch) * n), min(m, n) // 16)
        yield from (slice(start, min(start + step, m)) for start in range(0, m, step))

    def shared_(self, factor: Tensor) -> Tensor:
        """Multiply one of two factors by its share of 2ᵉ, √2ᵉ, in place."""
        return factor.mul_(power_of_two(self.exponent >> 1, factor.dtype))


# --- norms ----------------------------------------------------------------------------------------


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in vectors of at most ``BLOCK`` entries, or rows of its first axis if longer."""
    if tensor.is_contiguous():
        yield from torch.split(tensor.reshape(-1), BLOCK)
    else:
        rows = max(1, BLOCK // max(1, prod(tensor.shape[1:])))
        yield from (piece.reshape(-1) for piece in torch.split(tensor, rows))


def _square(vector: Tensor) -> Tensor:
    return torch.dot(vector, vector)


def root_mean_square(tensor: Tensor) -> float:
    """√(Σw²/N), to float64's digits, of a tensor of any length and magnitude: ‖W‖_F is √N times it.

    torch's own norm of a float32 tensor on the CPU adds in float32 and can lose every digit but
    two or three; a copy in float64 would have twice the tensor's size.
    """
    tensor = tensor.detach()
    if not tensor.numel():
        return 0.0
    exponent, work = exponents(tensor, range(tensor.ndim)).reshape(()), work_dtype(tensor)
    squares = [_square(times_power(piece.to(work), -exponent)) for piece in _pieces(tensor)]
    mean = torch.stack(squares).sum() / tensor.numel()
    size = mean.sqrt().clamp_max(1 - 2**-53)  # as are all entries: rounding could make it 1
    return float(times_power(size, exponent))


def relative_distance(dense: Tensor, factors: Sequence[Tensor]) -> float:
    """‖W − U M Vᵀ‖_F / ‖W‖_F in float32 at least, without forming either in it.

    Args:
        dense: W, (*batch, m, n).
        factors: U (*batch, m, r), M … (*batch, r, r) and V (*batch, n, r), or nothing but a
            matrix like W.
    """
    work = torch.promote_types(dense.dtype, torch.float32)
    exponent = exponents(dense, range(dense.ndim), 2)
    U, *inner = (factor.detach() for factor in factors)
    power = -exponent >> bool(inner)  # half of it for U, half for V
    if inner:
        inner[-1] = times_power(inner[-1].to(work), power).mT
    lost = total = 0.0
    for rows, block in Unit(dense, exponent).blocks(work):
        near = times_power(U[..., rows, :].to(work), power)
        for factor in inner:
            near = near @ factor.to(work)
        pair = (x.reshape(-1).to(work_dtype(x)) for x in (block, block - near))
        sizes = torch.stack([_square(x) for x in pair])
        total, lost = total + float(sizes[0]), lost + float(sizes[1])
    return (lost / total) ** 0.5 if total else (inf if lost else 0.0)


def shortened(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor with the same ‖·‖_F and few entries: the norms of rows of ``ROW`` of them.

    Among so few numbers float32 loses no digits. Differentiable; copies only what has no view as a
    vector.
    """
    while tensor.numel() > LONG:
        flat = tensor.reshape(-1)
        even = flat.numel() // ROW * ROW
        norms = torch.linalg.vector_norm(flat[:even].view(-1, ROW), dim=-1, dtype=dtype)
        rest = [torch.linalg.vector_norm(flat[even:], dtype=dtype).reshape(1)]
        tensor = torch.cat([norms, *rest]) if even < flat.numel() else norms
    return tensor
