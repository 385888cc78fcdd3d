"""Contractions planned once: which two tensors next, by which call, and what is used again.

A tree says what is contracted with what. Of it, steps are made for what is asked, each one once:
what are the same numbers under other letters, as W and its copy are, is one step. ``network.py``
says what the trees are of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import prod
from typing import Any

from torch import Tensor

from frobdecay.algebra.lowering import Pair, aligned, lowered
from frobdecay.algebra.precision import Coefficient, scaled

Tree = Any  # the number of a leaf, or two trees
Node = tuple[int, str]  # the number of a tensor that is held, and its letters


@dataclass(frozen=True)
class Step:
    """One contraction of two tensors that are held, or one tensor with its axes in another order.

    Attributes:
        left, right: their numbers: first those that are given, then the results of all steps; of
            one tensor both are its.
        run: the function of the two.
        terms: letters of the two, or of the one, and of the result.
        flops: multiplications and additions.
        numbers: entries of the result.
    """

    left: int
    right: int
    run: Pair
    terms: tuple[str, ...]
    flops: int
    numbers: int


@dataclass(frozen=True)
class End:
    """The last step to what is around a leaf, which is multiplied by a coefficient.

    Attributes:
        scaled: which of the two is smaller, and takes the coefficient.
        spread: axes of the leaf that were summed over before all else, and their lengths.
    """

    step: Step
    scaled: int
    spread: Mapping[int, int]

    def __call__(self, held: Sequence[Tensor], coef: Coefficient) -> Tensor:
        """What is around the leaf, times the coefficient."""
        left, right = held[self.step.left], held[self.step.right]
        if self.scaled:
            right = scaled(right, coef)
        else:
            left = scaled(left, coef)
        found = self.step.run(left, right)
        for axis, size in self.spread.items():
            found = found.unsqueeze(axis).expand(*found.shape[:axis], size, *found.shape[axis:])
        return found


@dataclass(frozen=True)
class Plan:
    """What is contracted with what, in order.

    Attributes:
        route: "gram", or "dense" where the product itself is formed.
        alone: of each tensor, the axes that are summed over before all else.
        steps: what is computed for several, or on the way.
        ends: of gradients, the last step of each that is wanted.
    """

    route: str
    alone: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    ends: tuple[End | None, ...] = ()

    @property
    def flops(self) -> int:
        """Of all steps."""
        last = [end.step for end in self.ends if end is not None]
        return sum(step.flops for step in (*self.steps, *last))

    def run(self, views: Sequence[Tensor]) -> list[Tensor]:
        """All that is held in the end: the tensors, then the result of each step."""
        held = [
            view.sum(axes) if axes else view for view, axes in zip(views, self.alone, strict=True)
        ]
        for step in self.steps:
            held.append(step.run(held[step.left], held[step.right]))
        return held

    def result(self, views: Sequence[Tensor]) -> Tensor:
        """What the plan is for, where that is one tensor."""
        return self.run(views)[-1]

    def table(self, shown: Callable[[str], str]) -> list[tuple[str, int, str]]:
        """Each step: its equation in the letters of ``shown``, its flops, and what it is for."""
        last = [(end.step, f"for factor {j}") for j, end in enumerate(self.ends) if end is not None]
        taken = [*self.steps, *(step for step, _ in last)]
        uses = Counter(n for step in taken for n in {step.left, step.right})
        rows = []
        for n, step in enumerate(self.steps, len(self.alone)):
            kept = f", kept for {uses[n]} steps" if uses[n] > 1 else ""
            rows.append((step, f"{step.numbers:,} numbers{kept}"))
        return [
            (f"{','.join(map(shown, step.terms[:-1]))}->{shown(step.terms[-1])}", step.flops, use)
            for step, use in (*rows, *last)
        ]


class _Steps:
    """Steps on their way to a plan, for leaves of one tree."""

    def __init__(
        self, leaves: Sequence[Node], output: str, sizes: Mapping[str, int], held: int
    ) -> None:
        self.leaves, self.output, self.sizes, self.held = leaves, output, sizes, held
        self.steps: list[Step] = []
        self.known: dict[object, tuple[int, tuple[int, ...]]] = {}

    def letters(self, tree: Tree) -> str:
        """What is left of the letters below a tree: those that are needed outside of it."""
        inside = set(_leaves(tree))
        needed = set(self.output).union(
            *(term for n, (_, term) in enumerate(self.leaves) if n not in inside)
        )
        below = dict.fromkeys("".join(self.leaves[n][1] for n in sorted(inside)))
        return "".join(c for c in below if c in needed)

    def value(self, tree: Tree) -> Node:
        """The contraction of all leaves of a tree."""
        if isinstance(tree, int):
            return self.leaves[tree]
        return self.contract(self.value(tree[0]), self.value(tree[1]), self.letters(tree))

    def around(self, root: Tree, leaf: int) -> tuple[Node | None, Node]:
        """Two that contract to what surrounds a leaf; beside the root, one that is it."""
        found: Node | None = None
        path = _path(root, leaf)
        for tree, sibling in path[:-1]:
            beside = self.value(sibling)
            found = beside if found is None else self.contract(found, beside, self.letters(tree))
        return found, self.value(path[-1][1])

    def contract(self, left: Node, right: Node, kept: str, exact: bool = False) -> Node:
        """Contract two, unless the same was done before under other letters."""
        (a, one), (b, other) = left, right
        names = {c: n for n, c in enumerate(dict.fromkeys(one + other))}
        number = [tuple(names[c] for c in term) for term in (one, other, kept)]
        key = (a, b, *number[:2], frozenset(number[2]), exact)
        if key not in self.known:
            step = self.step(left, right, kept, exact)
            self.known[key] = self.held + len(self.steps), tuple(names[c] for c in step.terms[2])
            self.steps.append(step)
        slot, result = self.known[key]
        letters = list(names)
        return slot, "".join(letters[n] for n in result)

    def step(self, left: Node, right: Node, kept: str, exact: bool) -> Step:
        """One contraction; ``exact`` for its result in the order of ``kept``."""
        found, run, flops = lowered(left[1], right[1], kept, self.sizes, exact)
        numbers = prod(self.sizes[c] for c in found)
        return Step(left[0], right[0], run, (left[1], right[1], found), flops, numbers)

    def turned(self, node: Node, letters: str) -> Step:
        """One tensor, its axes in the order of ``letters``."""
        slot, term = node
        turn, numbers = aligned(term, letters), prod(self.sizes[c] for c in term)
        return Step(slot, slot, lambda x, _: turn(x), (term, letters), 0, numbers)


def _leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [*_leaves(tree[0]), *_leaves(tree[1])]


def _path(tree: Tree, leaf: int) -> list[tuple[Tree, Tree]]:
    """From below the root to a leaf, each tree on the way and its sibling."""
    found = []
    while tree != leaf:
        tree, sibling = tree if leaf in _leaves(tree[0]) else tree[::-1]
        found.append((tree, sibling))
    return found


def _shifted(tree: Tree, by: int) -> Tree:
    return tree + by if isinstance(tree, int) else tuple(_shifted(part, by) for part in tree)


def _greedy(terms: Sequence[str], output: str, sizes: Mapping[str, int], frugal: bool) -> Tree:
    """Always the two whose result is smallest next to them, or those of fewest flops if frugal."""

    def volume(letters: set[str]) -> int:
        return prod(sizes[c] for c in letters)

    left: dict[Tree, set[str]] = {n: set(term) for n, term in enumerate(terms)}
    while len(left) > 1:
        count = Counter(c for letters in left.values() for c in letters)
        count.update(output)
        best: tuple[Any, ...] | None = None
        for a, b in combinations(left, 2):
            one, other = left[a], left[b]
            every, both = one | other, one & other
            kept = {c for c in every if count[c] > 1 + (c in both)}
            grown = volume(kept) - volume(one) - volume(other)
            flops = volume(every)
            cost = not both, *((flops, grown) if frugal else (grown, flops))
            if best is None or cost < best[0]:
                best = cost, a, b, kept
        assert best is not None
        _, a, b, kept = best
        del left[a], left[b]
        left[a, b] = kept
    return next(iter(left))


@lru_cache(maxsize=4096)
def plan(
    terms: tuple[str, ...],
    output: str,
    shapes: tuple[tuple[int, ...], ...],
    copies: tuple[str | None, ...] = (),
    wanted: tuple[bool, ...] = (),
    dense: bool = True,
) -> Plan:
    """Plan the einsum of tensors, that of all with their copies, or what is around each.

    Args:
        terms: letters of each tensor.
        output: letters of the result, in this order.
        shapes: of the tensors.
        copies: letters of a copy of each tensor, or None where there is none; then all is summed.
        wanted: whether what is around a tensor is; then that is planned, and not the result.
        dense: whether the einsum of the tensors may be formed on the way to that with the copies.
    """
    every = [*terms, *(copy for copy in copies if copy is not None)]
    slots = [*range(len(terms)), *(k for k, copy in enumerate(copies) if copy is not None)]
    sizes = {c: n for term, k in zip(every, slots, strict=True)
             for c, n in zip(term, shapes[k], strict=True)}  # fmt: skip
    count = Counter("".join(every) + ("" if copies else output))
    alone = tuple(tuple(a for a, c in enumerate(term) if count[c] == 1) for term in terms)
    leaves = [
        (k, "".join(c for a, c in enumerate(term) if a not in alone[k]))
        for term, k in zip(every, slots, strict=True)
    ]
    kept = "" if copies else output
    every = [term for _, term in leaves]
    trees = [_greedy(every, kept, sizes, frugal) for frugal in (False, True)]
    whole = len(leaves) == 2 * len(terms)  # no Gram is given
    if dense and whole:
        ones = [_greedy(every[: len(terms)], output, sizes, frugal) for frugal in (False, True)]
        trees += [(one, _shifted(one, len(terms))) for one in ones]
    found = []
    for tree in dict.fromkeys(trees):
        steps = _Steps(leaves, kept, sizes, len(terms))
        ends: tuple[End | None, ...] = ()
        if wanted:
            ends = tuple(
                _end(steps, tree, k, terms[k], alone[k]) if want else None
                for k, want in enumerate(wanted)
            )
        elif isinstance(tree, int):
            steps.steps.append(steps.turned(leaves[0], kept))
        else:
            steps.contract(steps.value(tree[0]), steps.value(tree[1]), kept, exact=True)
        formed = whole and sorted(_leaves(tree[0])) == [*range(len(terms))]
        found.append(Plan("dense" if formed else "gram", alone, tuple(steps.steps), ends))
    return min(found, key=lambda plan: (plan.flops, len(plan.steps)))


def _end(steps: _Steps, tree: Tree, k: int, term: str, alone: Sequence[int]) -> End:
    """The last step to what is around a tensor, or around its copy where that is less."""
    same = [n for n, (slot, _) in enumerate(steps.leaves) if slot == k]
    leaf = min(same, key=lambda n: len(_path(tree, n)))
    letters = steps.leaves[leaf][1]
    spread = {a: steps.sizes[term[a]] for a in alone}
    one, other = steps.around(tree, leaf)
    if one is None:
        return End(steps.turned(other, letters), 0, spread)
    step = steps.step(one, other, letters, exact=True)
    volumes = [prod(steps.sizes[c] for c in node[1]) for node in (one, other)]
    return End(step, int(volumes[1] < volumes[0]), spread)
