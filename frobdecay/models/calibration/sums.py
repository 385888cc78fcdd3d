"""Moments by weight, summed over calls, runs and processes."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from frobdecay.algebra.calibrated.moment import Frequencies, Moment
from frobdecay.models.calibration.prints import Print
from frobdecay.models.calibration.probes import Probe
from frobdecay.product.factor import is_sharded

Key = tuple[str, str]
"""Whose moment, and of what."""

_Shape = tuple[str, tuple[int, ...], int]
"""Of what, the batch, and k."""


class Sums:
    """The moments of one or many runs, by the probe that took them.

    Args:
        dtype: of the sums.
        device: of the sums; None for that of the inputs.

    Attributes:
        moments: whose, of what -> the moment.
        shared: name of a probe -> whose moment, its own too -> how many of its calls that sums.
        prints: name of a weight whose outputs were summed -> its fingerprint then.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.moments: dict[Key, Moment | Frequencies] = {}
        self.shared: defaultdict[str, Counter[Key]] = defaultdict(Counter)
        self.prints: dict[str, Print] = {}
        self.dtype, self.device = dtype, device

    @property
    def nbytes(self) -> int:
        """Memory of the sums."""
        return sum(p.nbytes for moment in self.moments.values() for p in moment.parts())

    def calls(self, key: Key) -> int:
        """How many calls a moment sums: all that the probe met which took it."""
        return max((met[key] for met in self.shared.values()), default=0)

    def add(self, probe: Probe, rows: Tensor, at: int | None = None) -> Key:
        """Sum the rows of one call, of all matrices of a stack or of one."""
        key = (probe.name, probe.of)
        if is_sharded(rows):
            raise ValueError(
                "its inputs are in parts on several processes (DTensor); calibrate before "
                "parallelize_module"
            )
        moment = self.moments.get(key)
        if moment is None:
            device = rows.device if self.device is None else self.device
            shape = probe.of, probe.batch, probe.size
            moment = self.moments[key] = self.empty(shape, device)
        moment.add(rows, at)
        self.shared[probe.name][key] += 1
        return key

    def to(self, device: torch.device | str) -> None:
        """Move the sums; what comes is added there, too."""
        for moment in self.moments.values():
            moment.become(moment.count, *(part.to(device) for part in moment.parts()[1:]))

    def join(self, other: Sums) -> None:
        """Add what another run summed.

        A moment that the same probes met is added to; where others did, as in a run with other
        groups of weights, it stays apart: each of them shares all of a moment, or none.

        Raises:
            ValueError: of a model with other shapes; nothing is added.
        """
        places = {key: self._place(key, other.sharers(key)) for key in other.moments}
        for key, moment in other.moments.items():
            known = self.moments.get(places[key], moment)
            if known.second.shape != moment.second.shape:
                raise ValueError(f"{' of '.join(key[::-1])}: stats= is of another model's shapes")
        for key, moment in other.moments.items():
            held, parts = self.moments.setdefault(places[key], moment), moment.parts()
            if held is not moment:
                for mine, theirs in zip(held.parts(), parts, strict=True):
                    mine += theirs.to(mine.device)
        self.prints = {**other.prints, **self.prints}
        for name, met in other.shared.items():
            self.shared[name].update({places[key]: n for key, n in met.items()})

    def sharers(self, key: Key) -> set[str]:
        """Names of the probes that met a moment."""
        return {name for name, met in self.shared.items() if key in met}

    def _place(self, key: Key, sharers: set[str]) -> Key:
        """Where what exactly these probes met is summed."""
        apart: Iterator[Key] = ((f"{key[0]}#run{n}", key[1]) for n in itertools.count(2))
        return next(
            place
            for place in itertools.chain([key], apart)
            if place not in self.moments or self.sharers(place) == sharers
        )

    def empty(self, shape: _Shape, device: torch.device | str) -> Moment | Frequencies:
        """A moment of nothing."""
        of, batch, size = shape
        with torch.inference_mode(False):  # to be added to outside of it, too
            if of == "rows":
                return Frequencies(size, device)
            return Moment(batch, size, self.dtype, device)

    def all_reduce(self, failed: BaseException | None = None) -> None:
        """Sum over processes, each of which has seen its own share of the batches.

        Args:
            failed: what the run ended with in this process, where the others would wait for it.

        Raises:
            RuntimeError: the run failed in some process; on all of them.
            ValueError: the processes ran different models; on all of them.
        """
        shapes: dict[Key, _Shape] = {
            key: (key[1], tuple(moment.count.shape), moment.second.shape[-1])
            for key, moment in self.moments.items()
        }
        theirs: list[Any] = [None] * dist.get_world_size()
        said = None if failed is None else f"{type(failed).__name__}: {failed}"
        dist.all_gather_object(theirs, (said, shapes, self.shared))
        if lost := [f"process {k}: {said}" for k, (said, *_) in enumerate(theirs) if said]:
            raise RuntimeError(f"calibration failed in {'; '.join(lost)}") from failed
        joined: dict[Key, _Shape] = {}
        self.shared.clear()
        for _, other, shared in theirs:
            for key, shape in other.items():
                if joined.setdefault(key, shape) != shape:
                    raise ValueError(f"{key[0]} has other shapes in other processes")
            for name, met in shared.items():
                self.shared[name].update(met)
        for key in sorted(joined):
            moment = self.moments.get(key) or self.empty(joined[key], self.device or "cpu")
            self.moments[key] = moment
            for part in moment.parts():
                sent = part.to(_reduced_on(part.device))
                dist.all_reduce(sent)
                part.copy_(sent)


def _reduced_on(device: torch.device) -> torch.device:
    """Where the processes exchange what lies on a device."""
    backend = dist.get_backend()
    if backend == "nccl" and device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else device
