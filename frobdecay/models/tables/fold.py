"""Repeated layers as one: ``encoder.layer.{0..5}.attention.self.{key,query,value}``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

_LONGEST = 64  # words are not joined into a name that is longer

_NUMBER = r"(?a:\d(?:[\d,]*\d)?)"
_TOKEN = re.compile(r"\d+|[^\W\d_]+|.", re.S)


@dataclass(frozen=True)
class Group:
    """Rows of a table that are shown as one.

    Attributes:
        key: what they have in common.
        tokens: the parts of their names, each with its alternatives.
        members: their positions.
    """

    key: Hashable
    tokens: tuple[tuple[str, ...], ...]
    members: tuple[int, ...]

    @property
    def name(self) -> str:
        """Braces around alternatives, as a shell would expand them."""
        return "".join(map(_braced, self.tokens))


def fold(names: Sequence[str], keys: Sequence[Hashable]) -> list[Group]:
    """Join names that have one key and differ in a number, then those that do in a word.

    A joined name stands for all its expansions and for no others.

    Args:
        names: of the rows.
        keys: what rows have to have in common to be joined.

    Returns:
        The groups, each where its first member was.

    Examples:
        >>> [g.name for g in fold(["in", "h.0.up", "h.0.gate", "h.1.up", "h.1.gate"], "abbbb")]
        ['in', 'h.{0,1}.{up,gate}']
    """
    groups = unfolded(names, keys)
    for joins in (str.isdecimal, str.isalpha):
        for at in range(max((len(group.tokens) for group in groups), default=0)):
            buckets: defaultdict[Hashable, list[Group]] = defaultdict(list)
            for group in groups:
                open_ = at < len(group.tokens) and all(map(joins, group.tokens[at]))
                rest = (group.tokens[:at], group.tokens[at + 1 :]) if open_ else group
                buckets[group.key, rest].append(group)
            groups = [one for same in buckets.values() for one in _joined(same, at)]
    return sorted(groups, key=lambda group: group.members)


def unfolded(names: Sequence[str], keys: Sequence[Hashable]) -> list[Group]:
    """Each name for itself."""
    parts = [tuple((token,) for token in _TOKEN.findall(name)) for name in names]
    return [Group(*each, (i,)) for i, each in enumerate(zip(keys, parts, strict=True))]


def pattern(name: str) -> str:
    """A name or a text without its numbers: what all layers of a kind have in common."""
    return re.sub(_NUMBER, "*", name)


def ranged(texts: Sequence[str]) -> str:
    """Texts with one ``pattern`` as one, with the range of each number in them.

    Examples:
        >>> ranged(["rank 3 of 8", "rank 5 of 8"])
        'rank 3–5 of 8'
    """
    between = re.split(_NUMBER, texts[0])
    columns = zip(*(re.findall(_NUMBER, text) for text in texts), strict=True)
    ends = [(min(column, key=_value), max(column, key=_value)) for column in columns]
    ranges = ["–".join(dict.fromkeys(pair)) for pair in ends]
    return between[0] + "".join(a + b for a, b in zip(ranges, between[1:], strict=True))


def _value(number: str) -> int:
    return int(number.replace(",", ""))


def numbers(name: str) -> list[int]:
    """The numbers in a name, by which layers are sorted as they are counted."""
    return [int(number) for number in re.findall(r"\d+", name, re.A)]


def _joined(same: list[Group], at: int) -> list[Group]:
    """Groups that differ in one token as one, unless its name would be too long."""
    if len(same) == 1:
        return same
    first, members = same[0], sorted(i for group in same for i in group.members)
    choices = tuple(dict.fromkeys(token for group in same for token in group.tokens[at]))
    one = Group(first.key, (*first.tokens[:at], choices, *first.tokens[at + 1 :]), tuple(members))
    return same if choices[0].isalpha() and len(one.name) > _LONGEST else [one]


def _braced(choices: Sequence[str]) -> str:
    if len(choices) == 1:
        return choices[0]
    if all(choice.isdecimal() and choice == str(int(choice)) for choice in choices):
        return f"{{{','.join(_runs(sorted(map(int, choices))))}}}"
    return f"{{{','.join(choices)}}}"


def _runs(numbers: Sequence[int]) -> Iterator[str]:
    """0, 1, 2, 5 -> "0..2", "5"."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b > a + 1), len(numbers)]
    for start, stop in pairwise(starts):
        run = numbers[start:stop]
        yield f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run))
