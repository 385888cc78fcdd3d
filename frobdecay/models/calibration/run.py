"""``calibrate``: run a model on batches and take the moments of what its weights see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import length_hint
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from frobdecay.models.calibration.calibration import Calibration
from frobdecay.models.calibration.forward import check_batches, default_forward, evaluating
from frobdecay.models.calibration.masks import DEFAULT, MaskOf, mask_of
from frobdecay.models.calibration.probes import Probe, probes
from frobdecay.models.calibration.sums import Sums
from frobdecay.models.progress import Progress
from frobdecay.models.select import Walk, Weight, select
from frobdecay.product.factor import is_sharded
from frobdecay.product.names import Selector
from frobdecay.weights.layouts import is_kind


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    *,
    mask: MaskOf = DEFAULT,
    include: Selector | None = None,
    exclude: Selector | None = None,
    groups: int = 1,
    stats: Calibration | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Sum the second moments of what a model's weights see, for ``factorize(…, init=stats)``.

    Examples:
        >>> import torch, frobdecay
        >>> model, batches = torch.nn.Sequential(torch.nn.Linear(64, 32)), [torch.randn(100, 64)]
        >>> stats = frobdecay.calibrate(model, batches)
        >>> with frobdecay.calibrate(model) as stats:  # or in a loop of your own
        ...     _ = [model(batch) for batch in batches]
        >>> frobdecay.factorize(model, rank=4, init=stats).ranks
        {'0.weight': 4}

    Runs the model in evaluation mode, without gradients; nothing of it changes: buffers, and tables
    with ``max_norm``, which a forward pass may write to, are copied before, and restored.

    Args:
        model: any module, wrapped or not; one that is compiled runs without that here.
        batches: what a loader yields; a few hundred examples often are enough.
        forward: ``forward(model, batch)``. By default a mapping is passed by its names, of a list
            or a tuple the first, and anything else as it is, on the model's device.
        mask: the batch's key for a mask of padding, or a function of the batch that returns what
            ``Calibration.mask`` takes; None to count padding. A decoder behind an encoder takes
            "decoder_" and the key, or else rows whose label is not -100.
        include: what to watch, as for ``factorize``; by default all that it would take.
        exclude: what not to.
        groups: passes over the batches, each for a part of the weights, then kept on the CPU.
        stats: a ``Calibration`` to add to.
        progress: as for ``factorize``.

    Raises:
        TypeError, ValueError: no batches, NaN, bad masks, meta, nothing to watch, changed weights.
        RuntimeError: it failed in a process of ``DistributedDataParallel``; on all of them.
    """
    walk, found = Walk(model), Calibration() if stats is None else stats
    watched = _watchable(walk, weights := select(walk, include, exclude))
    _check_passes(batches, groups)
    found.modules, (found.joined, found.parallel) = [*model.modules()], _processes(walk)
    found.probes, found.unwatched, found.weights = *watched, weights
    if batches is not None:
        count = length_hint(batches) * groups
        with Progress(count, progress, "calibrating") as bar, evaluating(model):

            def act(batch: Any) -> None:
                found.mask = mask_of(model, batch, mask)
                (forward or default_forward)(model, batch)
                bar.advance(1)

            _run(batches, act, groups, found)
    return found


def _run(
    batches: Iterable[Any], act: Callable[[Any], None], groups: int, found: Calibration
) -> None:
    """Pass over the batches, for one part of the probes after the other."""
    whole, counts, known = found.probes, list[int](), found.sums
    found.sums = Sums(known.dtype, known.device)  # added to what is known when all is done
    found.sums.prints |= known.prints
    step = -(-len(whole) // groups)
    try:
        for start in range(0, len(whole), step):
            found.probes, count = whole[start : start + step], 0
            with found:
                for count, batch in enumerate(batches, 1):
                    act(batch)
                    found.check(f"batch {count}")
                counts.append(count)
                if count != counts[0]:
                    raise ValueError(
                        f"expected {counts[0]} batches in each of {groups} passes, got {count}"
                    )
            if groups > 1:
                found.sums.to("cpu")
        known.join(found.sums)
    finally:
        found.probes, found.sums = whole, known


def _watchable(walk: Walk, chosen: Sequence[Weight]) -> tuple[list[Probe], dict[str, str]]:
    """How to watch the chosen weights, and why some are not."""
    found: list[Probe] = []
    unwatched: dict[str, str] = {}
    for weight in chosen:
        if weight.tensor is None or weight.excluded or weight.met:
            continue
        if is_lazy(weight.tensor):
            raise ValueError(
                f"{weight.name} has no shape yet (a lazy module); run the model once on an example "
                "input before calibrating it"
            )
        if weight.tensor.is_meta:
            raise ValueError(
                f"{weight.name} is on the meta device, where nothing is computed; load the model "
                "before calibrating it"
            )
        made = probes(weight, walk.modules)
        if isinstance(made, str):
            unwatched[weight.name] = made
        else:
            found.extend(made)
    if not found:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in unwatched.items())
        raise ValueError(f"found no weight to watch in {type(walk.model).__name__}{listed}")
    return found, unwatched


def _processes(walk: Walk) -> tuple[bool, bool]:
    """Whether each holds a part of the model, and whether each has its own share of the batches."""

    def holds(kind: str) -> bool:
        return any(is_kind(module, kind) for _, module in walk.all)

    tensors = (weight.tensor for weight in walk.weights if weight.tensor is not None)
    shards = holds("torch.distributed.fsdp.*") or any(map(is_sharded, tensors))
    return shards, shards or holds("torch.nn.parallel.*DistributedDataParallel")


def _check_passes(batches: Iterable[Any] | None, groups: int) -> None:
    if batches is None:
        return
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"expected groups to be a number of passes, got {groups!r}")
    check_batches(batches)
    if groups > 1 and iter(batches) is batches:
        raise ValueError(
            f"groups={groups} passes over the batches, but an iterator has one; give a list or a "
            "loader"
        )
