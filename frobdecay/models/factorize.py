"""Factorize models.

``factorize`` registers a parametrization on every chosen weight, or on none: an error on the way
leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from frobdecay.gradient.carry import Carried, Optimizers
from frobdecay.models.budget.allocation import Goal
from frobdecay.models.budget.entry import Entry, Initialization
from frobdecay.models.candidates import OnTied
from frobdecay.models.checkpoints.restoring import factorizing
from frobdecay.models.fitness import check_values, relative_error, unwrapped
from frobdecay.models.plan import RankPlan
from frobdecay.models.progress import Progress
from frobdecay.models.ranks import RankRule, plan_entries, planned
from frobdecay.models.select import Walk, bias_of
from frobdecay.models.stacking import with_factors
from frobdecay.models.surgery import ordinary, place
from frobdecay.product.names import Selector, naming
from frobdecay.weights.lowrank import LowRank


@ordinary("factorize")
def factorize(
    model: nn.Module,
    *,
    rank: RankRule | None = None,
    ratio: float | None = None,
    tolerance: float | None = None,
    allocate: str | RankPlan | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    parametrization: Callable[..., nn.Module] = LowRank,
    init: Initialization = "spectral",
    on_tied: OnTied = "skip",
    optimizer: Optimizers = None,
    progress: bool | None = None,
) -> RankPlan:
    """Replace dense weights by products of factors, in place.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> factorize(model, rank=4).ranks
        {'0.weight': 4}
        >>> list(model.state_dict())
        ['0.bias', '0.parametrizations.weight.original0', '0.parametrizations.weight.original1']

    Without ``include`` this takes every weight of linear, convolution, embedding, recurrent and
    attention modules, and of transformers' Conv1D and expert stacks, that can be factorized; what
    cannot is listed in the plan, as are PEFT's adapters and other modules' parameters of two
    dimensions or more, and is an error only where it was named. Weights keep dtype, device and
    ``requires_grad``. Make the optimizer afterwards, or hand it over; an error changes nothing.

    Args:
        model: any module; it is changed: to keep it, factorize ``copy.deepcopy(model)``.
        rank: r for all, an int or a float fraction of min(m, n), which may exceed 1; or a dict from
            selectors to ranks, where a weight's exact name wins, then its module's, then the first
            match; or a plan of ``plan_ranks``; of tensors also a list. Obeyed if it does not pay.
        ratio: parameters to keep, of the model's or, with ``include``, of the selected weights'.
        tolerance: of the loss, instead of a ratio.
        allocate: how the budget is divided; see ``plan_ranks`` for it and what stays dense.
        evaluate: model -> loss, for those that measure.
        include: selectors: exact names of modules or parameters, globs, compiled regular
            expressions, module types, predicates(name, module), or a list of those. Other
            modules' parameters have to be spelled; see ``select.py``.
        exclude: selectors of what stays dense.
        parametrization: called as ``parametrization(rank, pattern=…, axes=…, init=…)``. Settings
            of your own go in a ``functools.partial``, and win: ``partial(LowRank, depth=1)``, or
            ``partial(LowRank, pattern="o i kh kw -> o (i kh kw)")``; a pattern is for weights with
            that many dimensions. "channel" and "spatial" are for all convolutions.
        init: "spectral", another initialization of ``LowRank``'s, or what ``calibrate`` returned.
        on_tied: what to do with weights that several modules share: "skip" leaves them dense and
            lists them, an error only where they were named; "error" refuses all; "untie" gives
            each that gets factors those of its own, which count as the model's and stay untied.
        optimizer: which trains the model already, or several: factors take the weights' places in
            the param groups, and what it remembers of the weights is carried over, momentum
            exactly; see ``gradient/carry.py``. Schedulers and hooks stay. Wrap it afterwards.
        progress: True for a bar (needs rich), False for none; else after a second, on a terminal.

    Returns:
        The plan that was executed; prints as a table, with the error of the initialization.

    Raises:
        TypeError, ValueError: as ``plan_ranks``; also for data-parallel wrappers, weights on the
            meta device, NaN, and optimizers that keep what cannot be carried over.
        ImportError: ``progress=True`` without rich.
        RuntimeError: an initialization that fails.
    """
    walk = unwrapped(model, "factorize")
    goal = Goal(rank, ratio, None, tolerance, allocate, evaluate, progress)
    found, before = plan_entries(walk, goal, include, exclude, parametrization, init, on_tied)
    _execute(walk, found, optimizer, progress)
    return planned(found, before)


def _execute(
    walk: Walk, found: Sequence[Entry], optimizer: Optimizers, progress: bool | None
) -> None:
    """Put factors in the places of all weights that have a rank, or change nothing."""
    chosen = [entry for entry in found if entry.made is not None]
    for entry in chosen:
        if entry.weight.tensor is not None and entry.weight.tensor.is_meta:
            check_values(entry.weight)
    weights = [entry.weight for entry in chosen]
    carried = Carried(optimizer, [(w.name, w.module, w.attribute) for w in weights])
    bar = Progress(sum(entry.work for entry in chosen), progress, "factorizing")
    with bar, factorizing(walk, weights):
        for entry, factors in with_factors(chosen):
            _put(entry, factors)
            bar.advance(entry.work)
        carried.map()
    carried.commit(walk.model)
    _move_biases(chosen)  # at last: what is written in place cannot be undone


def _put(entry: Entry, factors: Sequence[Tensor]) -> None:
    """Put the factors in the weight's place; note the relative error, unless it is known."""
    dense, module, attribute = entry.weight.parameter, entry.weight.module, entry.weight.attribute
    with naming(entry.weight.name), torch.no_grad():
        place(module, attribute, entry.made, factors)
        if entry.error is None:
            entry.error = relative_error(dense, getattr(module, attribute))


@torch.no_grad()
def _move_biases(chosen: Sequence[Entry]) -> None:
    """Restore the means of the outputs that are truncated about them."""
    for entry in chosen:
        if entry.shift is not None:
            bias = bias_of(entry.weight)
            assert bias is not None
            bias.add_(entry.shift.reshape(bias.shape))
