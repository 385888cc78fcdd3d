"""Stochastic rounding: half-precision parameters take steps far below their resolution.

A bf16 parameter of size 1 has a resolution of 2⁻⁷, a decoupled decay step moves it by lr·λ ≈ 1e-5:
rounding to nearest never moves it at all. Rounding up with the probability that equals the
remainder, round(x) = ⌊x/ulp + u⌋·ulp with u uniform in [0, 1), has the expectation x.

The random numbers come from generators that belong to the rounder alone, one a device. All start
from one constant: replicas of a model, each with its own global seed, have to round alike. So
have copies of one part of a sharded parameter, while different parts should not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.precision import HALF, common_dtype
from frobdecay.algebra.scaling import power_of_two
from frobdecay.gradient.flat import Batched, Layout
from frobdecay.gradient.placement import part_number, part_of
from frobdecay.product.factor import is_sharded

_SEED = 2105_01029  # any constant does: the arXiv number of the paper
_VERSION = 1  # of the state dict


def round_stochastically(
    exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """Round to a half-precision dtype, up or down at random, so that the expectation is exact.

    Args:
        exact: float32, any shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``; its numbers are returned unchanged.
        generator: source of the randomness, on the device of ``exact``.

    Returns:
        A tensor of the shape of ``exact`` and of ``dtype``; NaN and infinities stay.

    Examples:
        >>> import torch
        >>> x = torch.full((1000,), 1 + 2**-10)  # an eighth of bf16's step above 1
        >>> x.bfloat16().mean().item(), torch.tensor([1.0, 1.0078]).bfloat16().float().tolist()
        (1.0, [1.0, 1.0078125])
        >>> rounded = round_stochastically(x, torch.bfloat16, torch.Generator().manual_seed(0))
        >>> abs(rounded.float().mean().item() - x[0].item()) < 3e-4
        True
    """
    if (exact.dtype, dtype) == (torch.float32, torch.bfloat16):
        return _round_bits(exact, generator)
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact)  # |exact| = mantissa · 2^exponent, mantissa in [½, 1)
    lowest = math.frexp(info.smallest_normal)[1]
    ulp = power_of_two(exponent.clamp_(lowest, 128) - 1, exact.dtype).mul_(info.eps)
    # As many random bits as float32 has below one ulp: the sum is exact, and what dtype can
    # represent is never moved.
    below = round(info.eps / torch.finfo(torch.float32).eps)
    noise = torch.randint(0, below, exact.shape, generator=generator, device=exact.device)
    return (exact / ulp).add_(noise.to(exact.dtype), alpha=1 / below).floor_().mul_(ulp).to(dtype)


def _round_bits(exact: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same for float32 to bfloat16, which is its upper half: what noise below carries over."""
    noise = torch.randint(
        1 << 16, exact.shape, dtype=torch.int32, generator=generator, device=exact.device
    )
    rounded = noise.add_(exact.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
    # An infinity is all zeros below, and stays; a NaN may have all ones, and noise carries over.
    return torch.where(exact.isnan(), exact, rounded).to(torch.bfloat16)


class StochasticRounder:
    """Adds float32 increments to half-precision tensors, exactly in expectation.

    Examples:
        >>> import torch
        >>> weight = torch.ones(3, dtype=torch.bfloat16)
        >>> StochasticRounder().add_([weight], [torch.full((3,), 2.0**-7)])
        >>> weight.tolist()
        [1.0078125, 1.0078125, 1.0078125]
    """

    def __init__(self, seed: int = _SEED) -> None:
        self._seed = seed
        self._generators: dict[torch.device, tuple[str, torch.Generator]] = {}
        self._saved: dict[str, Tensor] = {}
        self._batched = Batched()

    def add_(self, tensors: Sequence[Tensor], increments: Sequence[Tensor]) -> None:
        """Add to every tensor its increment, in place.

        Args:
            tensors: of a half-precision dtype; of sharded ones, this process' part is rounded.
            increments: float32, of the same shapes.
        """
        plain = [k for k, tensor in enumerate(tensors) if not is_sharded(tensor)]
        self._add([tensors[k] for k in plain], [increments[k] for k in plain])
        parts = [k for k, tensor in enumerate(tensors) if is_sharded(tensor)]
        if parts:
            self._add_parts([tensors[k] for k in parts], [increments[k] for k in parts])

    def _add_parts(self, tensors: Sequence[Tensor], increments: Sequence[Tensor]) -> None:
        """Round parts of sharded tensors: copies of a part alike, different parts differently.

        Every process draws one seed, so that the generator, which is saved, stays the same on all,
        however unequal the parts are.
        """
        own = self._generator(torch.device("cpu"))
        seed = int(torch.randint(1 << 48, (), generator=own, device=own.device))
        streams = {part_number(tensor) for tensor in tensors}
        for stream in sorted(streams):
            members = [k for k, tensor in enumerate(tensors) if part_number(tensor) == stream]
            rounder = StochasticRounder(seed + stream)
            rounder._add(
                [part_of(tensors[k]) for k in members], [part_of(increments[k]) for k in members]
            )

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators in use, one a device."""
        return [generator for _, generator in self._generators.values()]

    def _add(self, tensors: Sequence[Tensor], increments: Sequence[Tensor]) -> None:
        for batch, layout in self._batched.of(tensors):
            self._add_alike([tensors[k] for k in batch], [increments[k] for k in batch], layout)

    def _add_alike(self, tensors: list[Tensor], increments: list[Tensor], layout: Layout) -> None:
        """The same for tensors of one device and dtype, in operators of all at once."""
        first = tensors[0]
        # First copied, then cast: foreach operators of two dtypes may be a kernel for each tensor.
        old = torch.empty(layout.entries, dtype=first.dtype, device=first.device)
        torch._foreach_copy_(layout.views(old), tensors)
        exact = old.float()
        torch._foreach_add_(layout.views(exact), increments)
        rounded = round_stochastically(exact, first.dtype, self._generator(first.device))
        torch._foreach_copy_(tensors, layout.views(rounded))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            # Numbered by first use, not by index: a checkpoint of cuda:0 resumes on cuda:1.
            number = sum(known.type == device.type for known in self._generators)
            name = f"{device.type}:{number}"
            generator = torch.Generator(device=device).manual_seed(self._seed)
            if name in self._saved:
                generator.set_state(self._saved[name])
            self._generators[device] = (name, generator)
        return self._generators[device][1]

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states by device type and order of use: ``{"cpu:0": …}``."""
        now = {name: generator.get_state() for name, generator in self._generators.values()}
        return {"version": _VERSION, "generators": {**self._saved, **now}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the random streams from saved states.

        Raises:
            ValueError: another version, or something that is not a generator's state.
        """
        if state_dict.get("version") != _VERSION:
            raise ValueError(
                f"expected version {_VERSION} of frobdecay's part of a checkpoint, got "
                f"{state_dict.get('version')!r}; load it with the frobdecay that wrote it"
            )
        states = state_dict["generators"]
        for name, state in states.items():
            if not isinstance(state, Tensor) or state.dtype != torch.uint8:
                raise ValueError(
                    f"expected the state of a random generator for {name!r}, got {state!r}; "
                    "the checkpoint is damaged"
                )
        self._saved = {name: state.cpu().clone() for name, state in states.items()}
        self._generators = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state_dict: dict[str, Any]) -> None:
        self._seed, self._batched = _SEED, Batched()
        self.load_state_dict(state_dict)


class Increments:
    """Buffers for what is added to parameters later, one a parameter, float32 or better.

    Args:
        batched: kept from step to step; the buffers are not, which are as large as the factors.
    """

    def __init__(self, batched: Batched) -> None:
        self._batched = batched
        self._of: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def of(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters' buffers, zero at first."""
        new = [param for param in dict.fromkeys(params) if param not in self._of]
        for param in filter(is_sharded, new):
            zeros = torch.zeros_like(param, dtype=common_dtype([param]), requires_grad=False)
            self._of[param] = zeros
        plain = [param for param in new if not is_sharded(param)]
        for batch, layout in self._batched.of(plain):
            alike = [plain[k] for k in batch]
            zeros = torch.zeros(
                layout.entries, dtype=common_dtype(alike[:1]), device=alike[0].device
            )
            self._of.update(zip(alike, layout.views(zeros), strict=True))
        return [self._of[param] for param in params]

    @torch.no_grad()
    def apply(self, rounder: StochasticRounder) -> None:
        """Add the buffers to those parameters that have a gradient, torch's rule for decay."""
        due = [(param, buffer) for param, buffer in self._of.items() if param.grad is not None]
        half = [(param, buffer) for param, buffer in due if param.dtype in HALF]
        others = [(part_of(p), part_of(buffer)) for p, buffer in due if p.dtype not in HALF]
        if others:
            torch._foreach_add_([param for param, _ in others], [buffer for _, buffer in others])
        rounder.add_([param for param, _ in half], [buffer for _, buffer in half])
