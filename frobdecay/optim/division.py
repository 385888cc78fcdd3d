"""Param groups: weight decay of factors becomes Frobenius decay, and checkpoints follow.

A group with a weight decay that holds factors beside other parameters is divided in two, the
second right behind the first:

    {others + factors, weight_decay: λ}  →  {others, weight_decay: λ, frobenius_decay: 0}
                                            {factors, weight_decay: 0, frobenius_decay: λ}

so that ``weight_decay`` goes on meaning what it says and λ is an option of a group like any other,
open to schedules. All other groups stay whole. What was done is recorded as a ``Layout``, by which
a checkpoint of the plain base optimizer is rearranged alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from frobdecay.algebra.precision import Coefficient, check_coefficient
from frobdecay.optim.rates import BOUND, DECAY, Group, has_weight_decay, is_zero, known_value

_PER_PARAMETER = ("params", "param_names")


@dataclass(frozen=True)
class Division:
    """What becomes of one param group.

    Attributes:
        flags: for every parameter of the group as it was, whether it is a factor.
        split: whether the factors get a group of their own.
        coef: λ of the group that holds the factors; 0 without factors.
        taken: whether λ was the group's weight decay.
    """

    flags: tuple[bool, ...]
    split: bool
    coef: Coefficient
    taken: bool

    def commit(self, group: Group, bound: Coefficient | None = None) -> list[Group]:
        """Change the group, and return it with what was split off; factors get the bound.

        It takes the place of another, but not of None, which is none.
        """
        parts = [group]
        if self.split:
            # Schedules write into tensor options in place: two groups must not share one.
            own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}
            parts.append(self._pick(own, wanted=True))
            group.update(self._pick(group, wanted=False), **{DECAY: 0.0})
        last = parts[-1]
        last[DECAY] = self.coef
        if any(self.flags) and "weight_decay" in last:
            last["weight_decay"] = 0.0
        if any(self.flags) and bound is not None and last.get(BOUND, bound) is not None:
            last[BOUND] = bound
        return parts

    def _pick(self, group: Group, *, wanted: bool) -> Group:
        picked = {
            key: [
                entry for entry, flag in zip(group[key], self.flags, strict=True) if flag == wanted
            ]
            for key in _PER_PARAMETER
            if key in group
        }
        return {**group, **picked}


class Halves:
    """Warns where an option was written to the wrong half of a divided group.

    An option that is a tensor, such as a learning rate, is cloned when a group is divided: a caller
    who kept the tensor and writes to it in place reaches one half only. And a λ that is written to
    a group without factors does nothing, unless the factors' groups have the same.

    Args:
        pairs: both groups of every division.
    """

    def __init__(self, pairs: Iterable[tuple[Group, Group]] = ()) -> None:
        self._twins: list[tuple[str, Tensor, Tensor]] = [
            (name, own, factors[name])
            for others, factors in pairs
            for name, own in others.items()
            if isinstance(own, Tensor) and isinstance(factors.get(name), Tensor)
            if not own.is_inference()
        ]
        self._seen = [(own._version, copy._version) for _, own, copy in self._twins]
        self._idle = False

    def check(self, groups: Sequence[Group], holding: set[int]) -> None:
        """Warn, once each.

        Args:
            groups: all.
            holding: the indices of those that hold factors.
        """
        self._check_halves()
        if self._idle:
            return
        values = [known_value(group.get(DECAY, 0.0)) for group in groups]
        used = [0.0, *(values[g] for g in holding)]
        if any(isinstance(value, Tensor) for value in used):
            return  # on an accelerator, which is not waited for
        for g, value in enumerate(values):
            if g not in holding and not isinstance(value, Tensor) and value not in used:
                self._idle = True
                warnings.warn(
                    f"{DECAY}={value} of param group {g} does nothing: there is no factor of the "
                    f"products in it; they are in {sorted(holding)}, with "
                    f"{[values[h] for h in sorted(holding)]}",
                    stacklevel=2,
                )
                return

    def _check_halves(self) -> None:
        """Look whether since the last time one was written to in place and not the other."""
        before, self._seen = self._seen, [(a._version, b._version) for _, a, b in self._twins]
        for (name, _, _), old, new in zip(self._twins, before, self._seen, strict=True):
            if new[0] != old[0] and new[1] == old[1]:
                self._twins, self._seen = [], []
                warnings.warn(
                    f"the {name!r} of a param group was written to in place, but not that of the "
                    "group that its factors were given: it keeps its value; write to both, "
                    "for group in optimizer.param_groups",
                    stacklevel=2,
                )
                return


def plan_division(
    group: Group,
    is_factor: Callable[[Tensor], bool],
    decay: Coefficient | None,
    where: str,
    again: bool,
) -> Division:
    """Say what has to become of a param group, changing nothing.

    Args:
        group: a complete param group.
        is_factor: tells factors from other parameters.
        decay: λ for the factors; None takes over the group's own ``frobenius_decay`` or, failing
            that, its ``weight_decay``.
        where: what messages call the group.
        again: whether a wrapper has divided the groups before: one with a weight decay held no
            factors then, and a ``frobenius_decay`` of 0 says nothing of those that it holds now.

    Raises:
        ValueError, TypeError: the λ to take over is negative or no number; names the group.
    """
    flags = tuple(is_factor(param) for param in group["params"])
    if not any(flags):
        return Division(flags, False, group.get(DECAY, 0.0), False)
    left = again and has_weight_decay(group) and is_zero(group.get(DECAY, 0.0))
    taken = decay is None and (left or DECAY not in group)
    what = "weight_decay" if taken else DECAY
    coef = group.get(what, 0.0) if decay is None else decay
    check_coefficient(known_value(coef), f"{what} of {where}")
    split = bool(group.get("weight_decay", 0) != 0) and not all(flags)
    return Division(flags, split, coef, taken)


def is_plain(saved: Sequence[Mapping[str, Any]]) -> bool:
    """Whether saved param groups come from an optimizer that was not wrapped."""
    return not any(DECAY in group for group in saved)


def adapt_plain(
    saved: Sequence[Mapping[str, Any]], layout: Sequence[Division], groups: Sequence[Group]
) -> list[Group]:
    """Rearrange the saved param groups of a plain base optimizer as the wrapper's are.

    Args:
        saved: ``state_dict["param_groups"]`` of the base optimizer before it was wrapped.
        layout: how the base's groups were divided.
        groups: the param groups now.

    Returns:
        New groups; the ids of parameters are the saved ones.

    Raises:
        ValueError: the groups are not those that were divided.
    """
    sizes, expected = [len(g["params"]) for g in saved], [len(d.flags) for d in layout]
    if sizes != expected:
        raise ValueError(
            f"expected a checkpoint with param groups of {expected} parameters, got {sizes}; it is "
            "of another model or of this model before it was factorized"
        )
    now, out = iter(groups), []
    for k, (group, division) in enumerate(zip(saved, layout, strict=True)):
        held = [next(now) for _ in range(1 + division.split)]
        coef = group.get("weight_decay", 0.0) if division.taken else held[-1].get(DECAY, 0.0)
        mixed = not division.split and any(division.flags) and not all(division.flags)
        if mixed and has_weight_decay(group):
            raise ValueError(
                f"expected weight_decay=0 in param group {k} of the checkpoint, as when this "
                f"optimizer was wrapped, got {group['weight_decay']}: its factors share the group "
                "with others; build the base optimizer with that weight decay and wrap it again"
            )
        out += replace(division, coef=coef).commit(dict(group))
    return out


def keep_bounds(saved: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """Saved param groups, with the bounds that the groups have now where they say nothing of it."""
    if len(saved) != len(groups):
        return list(saved)  # refused by the base
    pairs = zip(saved, groups, strict=True)
    return [{BOUND: now[BOUND], **group} if BOUND in now else group for group, now in pairs]


def tensors_of(param_group: Group) -> list[Any]:
    """The tensors of a group as the user wrote it, its iterator made a list as torch does."""
    params = param_group["params"]
    if isinstance(params, set):
        return []  # the base refuses it
    params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
    return [entry[1] if isinstance(entry, tuple) else entry for entry in params]
