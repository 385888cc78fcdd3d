"""What stays dense under a budget, by a rule that needs the model's structure only.

Of all weights that a budget could shrink, these are not worth it:

    the ends     the first and the last weight in module order, the smaller one first, while
                 together they take no more than a third of the budget
    the small    the smallest others, those of one size together, while they take no more than a
                 twentieth
    the narrow   no weight with a smaller side of ``NARROW`` or less gets a rank below half of it;
                 where that is not smaller than the weight, it stays dense

Where the budget could not be met otherwise, the last gives way, and then all of it. At rank 1 of 10
a classifier does not train, and dense it costs a few hundred numbers. Wide weights have no floor:
rank 2 at least was worse than rank 1 for some, at a tenth of a small ResNet.

Shares are of the budget, not of the model, so that the rule is the same for a network of six layers
and of a hundred. Module order is the order of registration, which a forward pass need not follow: a
head that is registered first, or the second of two heads, is an end only as far as it is small.
What ``include=`` names is not subject to the rule, nor is a rank that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

ENDS, SMALL = 1 / 3, 1 / 20
"""Shares of the budget that the ends, and that small weights, may take dense."""

NARROW = 16
"""A weight whose smaller side is no longer than this gets half of it as its rank at least."""


def floor(side: int) -> int:
    """The lowest rank under a budget of a weight with this smaller side."""
    return -(-side // 2) if side <= NARROW else 1


def kept(known: Sequence[int], sizes: Mapping[int, int], budget: float) -> dict[int, str]:
    """Which weights stay dense under a budget of so many parameters.

    Args:
        known: all weights in module order, by any number.
        sizes: parameters of those that could have fewer.
        budget: parameters of the model to keep.

    Returns:
        Weight -> the reason.
    """
    ends = dict.fromkeys(known[-1:], "the last layer") | dict.fromkeys(known[:1], "the first layer")
    some = _affordable([[k] for k in ends if k in sizes], sizes, ENDS * budget)
    rest = sorted(sizes.keys() - set(some), key=lambda k: (sizes[k], k))
    alike = [list(same) for _, same in groupby(rest, key=sizes.__getitem__)]
    few = _affordable(alike, sizes, SMALL * budget)
    return {k: ends[k] for k in some} | dict.fromkeys(few, "among the smallest")


def _affordable(
    groups: Iterable[Sequence[int]], sizes: Mapping[int, int], most: float
) -> list[int]:
    """The smallest groups that together have so many parameters at most."""
    taken: list[int] = []
    for group in sorted(groups, key=lambda group: sizes[group[0]]):
        most -= sum(sizes[k] for k in group)
        if most < 0:
            break
        taken += group
    return taken
