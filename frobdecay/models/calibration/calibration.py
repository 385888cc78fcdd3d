"""``Calibration``: moments of what the weights of a model see, summed over runs and processes."""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

import torch
from torch import nn

from frobdecay.algebra.calibrated.truncation import Metric
from frobdecay.algebra.reading import Matricization
from frobdecay.models.calibration.metrics import metric_of, why_not_read, why_unseen
from frobdecay.models.calibration.prints import check_same, print_of
from frobdecay.models.calibration.probes import Probe
from frobdecay.models.calibration.store import read, write
from frobdecay.models.calibration.sums import Sums
from frobdecay.models.calibration.watch import Mask, Watch
from frobdecay.models.checkpoints.files import FilePath
from frobdecay.models.select import Weight

_UNFIT = "no weight's inputs have the shape of the mask: padding counts; mask=None if that is meant"


class Calibration:
    """Second moments of what weights see: the metric of calibrated spectral initialization.

    Examples:
        >>> import torch, frobdecay
        >>> model = torch.nn.Linear(8, 8)
        >>> with frobdecay.calibrate(model) as stats:
        ...     for batch in torch.randn(5, 20, 8):
        ...         _ = model(batch)
        >>> stats.shrink = 0.1  # trust the data a little less
        >>> frobdecay.factorize(model, rank=2, init=stats).ranks
        {'weight': 2}

    Made by ``calibrate``. As a context manager it watches the model while it is open, and adds to
    what it knows when it is closed; ``factorize(model, …, init=stats)`` uses it.

    Args:
        dtype: of the sums, float64, or float32, where they are half as large.
        device: of the sums; by default where the inputs are.
        shrink: λ between 0 and 1, the share of the outputs' energy that is taken as coming from
            inputs that are all alike. By default 0, the optimum on the data; 1 ignores it. What the
            data leaves undecided, as where it has fewer rows than the rank, is decided so always.

    Attributes:
        shrink: λ; may be set at any time.
        sums: the moments.
        probes: how more are taken.
        weights: of which.
        modules: all of the model that is watched.
        unwatched: name of a weight -> why it has no moment.
        parallel: whether processes see each its own share of the batches, so that a run is summed
            over all of them when it is closed; set where the model is data parallel.
        joined: whether they wait for each other in every forward pass, as shards do: one that fails
            cannot tell the others then.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        shrink: float = 0.0,
    ) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"expected sums in float64 or float32, got {dtype}")
        self.sums, self.shrink = Sums(dtype, device), shrink
        self.probes: list[Probe] = []
        self.weights: list[Weight] = []
        self.modules: list[nn.Module] = []
        self.unwatched: dict[str, str] = {}
        self.parallel = self.joined = False
        self._watch: Watch | None = None

    # --- watching ---------------------------------------------------------------------------------

    @property
    def mask(self) -> Mask:
        """Which rows of the batch that is running count; set it in a loop of your own.

        Booleans (batch, length), as an ``attention_mask`` is, for the inputs and outputs whose
        shape begins so; or a dict from globs of weights' names to those; None for all.
        """
        return None if self._watch is None else self._watch.mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        if self._watch is None:
            raise RuntimeError("expected to set mask inside of `with stats:`, where a model runs")
        self._watch.count(mask)

    def __enter__(self) -> Calibration:
        if self._watch is not None:
            raise RuntimeError("this calibration is open already")
        if not self.probes:
            raise RuntimeError(
                "this calibration watches no model; continue it with calibrate(model, stats=stats)"
            )
        by_outputs = {p.name.partition("#")[0] for p in self.probes if p.of == "outputs"}
        run = Sums(self.sums.dtype, self.sums.device)
        for weight in self.weights:
            if weight.name in by_outputs:
                check_same(weight.name, self.sums.prints.get(weight.name), weight)
                found = print_of(weight)
                run.prints |= {} if found is None else {weight.name: found}
        self._watch = Watch(self.probes, run, self.modules)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        assert self._watch is not None
        self._watch.remove()
        run = self._watch.sums
        try:
            told = error is None or (isinstance(error, Exception) and not self.joined)
            if told and self.parallel and torch.distributed.is_initialized():
                run.all_reduce(error)
            if error is None:
                self.check("this run")
                self.sums.join(run)
        finally:
            self._watch = None

    def check(self, what: str) -> None:
        """Refuse a run that saw nothing until now, or numbers that are none.

        Raises:
            ValueError: says which weight saw what.
        """
        watch = self._watch
        if watch is None or not watch.sums.moments:
            raise ValueError(
                f"no watched weight saw an input in {what}: the loader is empty or exhausted, or "
                "the model did not run"
            )
        if watch.unfit:
            warnings.warn(_UNFIT, stacklevel=2)
        bad = next((key for key, each in watch.sums.moments.items() if not each.finite()), None)
        if bad is not None:
            raise ValueError(
                f"the {bad[1]} of {bad[0]} held NaN or infinity in {what}; look at the batches and "
                "at the model's dtype. Nothing of this run is kept"
            )

    # --- memory, and files ------------------------------------------------------------------------

    @property
    def most(self) -> int:
        """Bytes that the moments of all that is watched take at most, shared or not."""
        each = self.sums.dtype.itemsize
        squares = ((p.size if p.of == "rows" else p.size**2, p.batch) for p in self.probes)
        return sum(each * number * prod(batch) for number, batch in squares)

    def __repr__(self) -> str:
        held, sums = len(self.sums.moments), self.sums
        parts = [f"{held} moments, {_megabytes(sums.nbytes)}"] if held else []
        if self.probes:
            parts.append(f"watches {len(self.probes)} weights, at most {_megabytes(self.most)}")
        return f"Calibration({'; '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the model."""
        return self.__dict__ | {"probes": [], "weights": [], "modules": [], "_watch": None}

    def save(self, path: FilePath) -> None:
        """Write the moments to a file: safetensors if it ends so, else what ``torch.save`` writes.

        Raises:
            OSError: the file cannot be written.
        """
        write(path, self.sums, {"shrink": self.shrink, "unwatched": self.unwatched})

    @classmethod
    def load(cls, path: FilePath, device: torch.device | str | None = None) -> Calibration:
        """Read moments from a file; ``calibrate(model, batches, stats=…)`` adds to them.

        Args:
            path: of ``save``.
            device: of the sums; by default the CPU.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be read.
            ValueError: not a file of moments.
        """
        sums, said = read(path, device or "cpu")
        found = cls(sums.dtype, sums.device, said["shrink"])
        found.sums, found.unwatched = sums, said["unwatched"]
        return found

    # --- what is known ----------------------------------------------------------------------------

    def why_not(self, weight: Weight, view: Matricization) -> str | None:
        """Why a weight is not truncated in the metric of the data; None where it is.

        Raises:
            ValueError: the moments are of another model, or of some of the weight's inputs only.
        """
        named = (self.unwatched[name] for name in weight.names if name in self.unwatched)
        reason = why_not_read(weight, view) or next(named, None)
        return reason or why_unseen(self.sums, weight, view)

    def metric(self, weight: Weight, view: Matricization, moves: bool) -> Metric:
        """The metric in which a weight is truncated.

        Args:
            weight: of which ``why_not`` says nothing.
            view: how it is read as a matrix.
            moves: whether its bias may be moved, so that the mean is left out of the metric.
        """
        return metric_of(self.sums, weight, view, moves, self.shrink)


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.4g} MB"
