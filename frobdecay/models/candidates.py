"""Candidates: the chosen weights, each with its parametrization, or with the reason against it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from frobdecay.algebra.reading import Matricization, dimensions
from frobdecay.algebra.scaling import why_dead
from frobdecay.algebra.tensorize import FLAT, Rank
from frobdecay.models.budget.entry import Entry, Initialization, Metrics
from frobdecay.models.fitness import (
    adapter_against,
    check_values,
    reason_against,
    tie_against,
    ties,
)
from frobdecay.models.select import Walk, Weight, bias_of, select
from frobdecay.product.names import Selector
from frobdecay.weights.layouts import NAMED_PATTERNS, default_layout
from frobdecay.weights.lowrank import LowRank

OnTied = Literal["skip", "untie", "error"]

_PROTOCOL = (
    "forward",
    "right_inverse",
    "matricize",
    "resolve",
    "factor_shapes",
    "product",
    "materialized",
)


def candidates(
    walk: Walk,
    include: Selector | None,
    exclude: Selector | None,
    parametrization: Callable[..., nn.Module],
    init: Initialization,
    on_tied: OnTied,
    left: Mapping[str, str],
) -> list[Entry]:
    """All chosen weights, with how they are read or the reason against them.

    Args:
        walk: over the model.
        include: and the others, as for ``plan_ranks``.
        exclude: what not.
        parametrization: of the weights.
        init: of the parametrization, unless it is a partial that has its own.
        on_tied: what to do with shared weights.
        left: name of a shared weight that is to stay tied all the same -> why.
    """
    if on_tied not in ("skip", "untie", "error"):
        raise ValueError(f"expected on_tied to be 'skip', 'untie' or 'error', got {on_tied!r}")
    tied = ties(walk)
    found = [Entry(weight) for weight in select(walk, include, exclude)]
    stats = getattr(parametrization, "keywords", {}).get("init", init)
    options = {"init": "spectral" if isinstance(stats, Metrics) else stats}
    tensors = _reads_tensors(parametrization, options)
    for entry in found:
        if entry.weight.excluded:
            entry.reason = "excluded"
            continue
        entry.reason = reason_against(entry.weight) or adapter_against(entry.weight, walk.modules)
        if entry.weight.met:
            entry.reason = entry.reason or _unknown(entry.weight)
        shared = tie_against(entry.weight, tied) if entry.reason is None else None
        staying = left.get(entry.weight.name)
        if shared and on_tied == "untie" and staying is None:
            names = tied[id(entry.weight.tensor)]
            entry.untied = tuple(name for name in names if name not in entry.weight.names)
        else:
            entry.reason = entry.reason or staying or shared
        if entry.reason is None:
            _fit(entry, parametrization, options, tensors)
        strict = (entry.weight.named and staying is None) or (shared and on_tied == "error")
        if entry.reason is not None and strict:
            raise ValueError(f"{entry.weight.name} cannot be factorized: {entry.reason}")
    _count_copies(walk, found)
    check_any(walk.model, found, [entry.open for entry in found])
    _check_pattern_used([entry for entry in found if entry.open], parametrization)
    if isinstance(stats, Metrics):
        _calibrate([entry for entry in found if entry.open], stats, tied)
    return found


def _calibrate(found: list[Entry], stats: Metrics, tied: Mapping[int, list[str]]) -> None:
    """Give each weight the metric in which it is truncated, or say that it has none."""
    for entry in found:
        view, weight = entry.view, entry.weight
        kind = type(entry.made_at(1))
        if not isinstance(view, Matricization) or not issubclass(kind, LowRank):
            raise ValueError(
                f"{weight.name}: calibrated initialization is of matrices, U Vᵀ, but the "
                f"parametrization is {kind.__name__}; take LowRank for it, or init='spectral'"
            )
        if reason := stats.why_not(weight, view):
            entry.note = f"init='spectral': {reason}"
            continue
        bias = bias_of(weight)
        stays = bias is None or id(bias) in tied or bias.is_inference() or 0 in bias.stride()
        # Made when it is used: it has the size of the moment, in float64.
        entry.metric = functools.partial(stats.metric, weight, view, not stays)
    if found and all(entry.metric is None for entry in found):
        raise ValueError(
            f"no chosen weight was calibrated: {found[0].weight.name}: {found[0].note}; calibrate "
            "this model"
        )


def _unknown(weight: Weight) -> str:
    """Why a parameter of a module type without a default is left dense."""
    how = "" if weight.parameter.ndim == 2 else ", with a pattern,"
    kind = type(weight.module).__name__
    return f"a parameter of {kind}, a module type without a default; name it{how} to factorize"


def _count_copies(walk: Walk, found: list[Entry]) -> None:
    """Note what the copies add: the last of those that share a parameter adds nothing."""
    left = Counter(id(weight.tensor) for weight in walk.weights)
    for entry in found:
        entry.untied = entry.untied if entry.open else ()
        if entry.untied:
            left[id(entry.weight.tensor)] -= 1
            entry.copied = entry.dense if left[id(entry.weight.tensor)] else 0


def check_any(model: nn.Module, found: list[Entry], taken: list[bool]) -> None:
    """Refuse to do nothing."""
    if not any(taken):
        listed = "".join(f"\n  {entry.weight.name}: {entry.reason}" for entry in found[:10])
        raise ValueError(f"found no weight to factorize in {type(model).__name__}{listed}")


def _fit(
    entry: Entry,
    parametrization: Callable[..., nn.Module],
    options: Mapping[str, Any],
    tensors: bool,
) -> None:
    """Fill in how the weight is read and parametrized, or the reason why it cannot be."""
    tensor = entry.weight.parameter
    given = getattr(parametrization, "keywords", {})
    pattern, axes = given.get("pattern"), given.get("axes")
    # Those that read tensors have a default of their own.
    fits = pattern in ((None, FLAT) if tensors else ()) or (
        pattern not in (None, FLAT, *NAMED_PATTERNS) and dimensions(pattern) == tensor.ndim
    )
    try:
        if not fits:
            pattern, axes = (None, None) if tensors else _default(entry.weight, pattern)
        settings = {"pattern": pattern, "axes": axes, **options}
        entry.make = functools.partial(_make, parametrization, settings)
        made = entry.make(1)
        entry.view = made.matricize(tuple(tensor.shape))
    except ValueError as error:
        entry.reason = str(error)
        return
    _check_numbers(entry, getattr(made, "derives", False))


def _default(weight: Weight, pattern: str | None) -> tuple[str, Mapping[str, int]]:
    """The pattern of a name, or the default one, and its axes, by the module's type."""
    shape = tuple(weight.parameter.shape)
    layout = weight.layout or (default_layout(2) if len(shape) == 2 else None)
    if layout is None:
        raise ValueError(
            f"of {len(shape)} dimensions in a module type without a default; give "
            "parametrization=functools.partial(LowRank, pattern=...) with as many"
        )
    return layout.reading(pattern if pattern in NAMED_PATTERNS else None, shape), layout.axes


def _reads_tensors(parametrization: Callable[..., nn.Module], options: Mapping[str, Any]) -> bool:
    """Whether its patterns have modes on their right side, not rows and columns."""
    return hasattr(_make(parametrization, {**options, "pattern": None, "axes": None}, 1), "modes")


def _make(parametrization: Callable[..., nn.Module], options: Mapping[str, Any], rank: Rank) -> Any:
    """One parametrization; refuses factories that make something else."""
    if isinstance(parametrization, nn.Module) or not callable(parametrization):
        raise TypeError(
            "expected parametrization to be a class or a factory, such as LowRank or "
            f"functools.partial(LowRank, depth=1), got {parametrization!r}"
        )
    try:
        made = parametrization(rank, **options)
    except TypeError as error:
        raise TypeError(
            "expected parametrization to be called as parametrization(rank, "
            f"{'=, '.join(options)}=), but: {error}"
        ) from error
    missing = [name for name in _PROTOCOL if not hasattr(made, name)]
    if missing:
        raise TypeError(f"expected a parametrization like LowRank, got {made!r} without {missing}")
    return made


def _check_numbers(entry: Entry, derives: bool) -> None:
    """Refuse NaN; leave zeros dense, whose factors would be zero and never train."""
    tensor = entry.weight.parameter
    if tensor.is_meta:
        return
    check_values(entry.weight)
    view, batch = entry.view, 0
    if isinstance(view, Matricization) and view.batch:
        tensor, batch = view.matrix(tensor), len(view.batch)
    if derives:
        entry.reason = why_dead(tensor, batch)


def _check_pattern_used(found: list[Entry], parametrization: Callable[..., nn.Module]) -> None:
    pattern = getattr(parametrization, "keywords", {}).get("pattern")
    if pattern in (None, FLAT, *NAMED_PATTERNS):
        return
    if not any(entry.view is not None and entry.view.pattern == pattern for entry in found):
        raise ValueError(
            f"the pattern {pattern!r} reads tensors of {dimensions(pattern)} dimensions, but no "
            f"chosen weight has as many: {[entry.weight.name for entry in found][:5]}"
        )
