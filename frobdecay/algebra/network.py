"""A product is an einsum of its factors; its norm and its gradients follow from the equation.

    pair    "mr,nr->mn"           Tucker  "xyz,ax,by,cz->abc"     Kronecker  "ab,cd->acbd"
    chain   "mr,rs,ns->mn"        CP      "ar,br,cr->abc"         train      "ar,brs,cs->abc"

Letters of the output are free, the others are bonds. Beside a copy of every factor whose bonds
have other letters, r', ‖W‖² is the einsum of all, contracted two by two along a tree; it begins
with the factors' Grams, mr,mr'->rr', where they are smaller than W. ∇_C ½‖W‖² is the einsum of all
but one C, what is around it. One way back through the tree gives that of all factors: where a and
b became c, around a is what is around c, and b.

    a,b->c,      around(a) = around(c) b,      around(b) = around(c) a

So the gradient of a pair costs 4r²(m+n) flops instead of 6mnr. Where r is so near to full rank
that W is cheaper, the tree is that of W and its copy. Euler's identity ⟨C, ∇_C ½‖W‖²⟩ = ‖W‖² holds
for every C. (Khodak et al., ICLR 2021, arXiv:2105.01029, Frobenius decay; the released research
code has the formulas for chains of two and three. Of Tucker and CP, Kolda & Bader 2009,
doi:10.1137/07070111X, has the notation.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from string import ascii_letters, ascii_lowercase

from torch import Tensor

from frobdecay.algebra.contraction import Plan, plan
from frobdecay.algebra.lowering import LONG, Pair, lowered
from frobdecay.algebra.precision import Coefficient, Views, accumulable

Shapes = tuple[tuple[int, ...], ...]

_BATCH = "0123456789"  # letters of the axes in front of those of the equation
MOST_BATCH = len(_BATCH) - 1  # a stack of products has one more
_BONDS, _FREE = "rstuvwxyzABCDEFGHIJKLM", "mnabcdefghijklopqNOPQRSTUVWXYZ"  # of chains
LONGEST = len(_BONDS) + 1  # factors in a chain
_PRIMED = {ord(c): chr(ord(c) + (1 << 9)) for c in ascii_letters}


@dataclass(frozen=True)
class Network:
    """How factors combine: an einsum in which each of them appears once.

    Equal to another that means the same, whatever the letters. All functions see the factors as
    views that may have ``batch`` more axes in front, which keep products apart.

    Attributes:
        equation: as it was written.
        terms, output: the same in the letters a, b, c, … as they come.

    Examples:
        >>> import torch
        >>> kronecker = Network.of("ab,cd->acbd")
        >>> kronecker.squared_norm([torch.ones(2, 3), torch.ones(4, 5)], 0)
        tensor(120.)
    """

    equation: str = field(compare=False)
    terms: tuple[str, ...]
    output: str

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(equation: str) -> Network:
        """Read an equation such as ``"mr,rs,ns->mn"``; blanks do not count.

        Raises:
            ValueError: not an equation of letters with an output, a letter twice in a factor or
                in the output, or one in the output that is in no factor.
        """
        inputs, arrow, output = "".join(equation.split()).partition("->")
        terms = (*inputs.split(","), output)
        if not arrow or not all(set(term) <= set(ascii_letters) for term in terms):
            raise ValueError(
                "expected an equation with the letters of every factor and of the product, as "
                f"'mr,nr->mn', got {equation!r}"
            )
        for term in terms:
            if len(set(term)) < len(term):
                raise ValueError(f"expected no letter twice in {term!r}, got {equation!r}")
        if unknown := sorted(set(output) - set(inputs)):
            raise ValueError(
                f"expected every letter of the output in a factor, got {', '.join(unknown)} in "
                f"none of {equation!r}"
            )
        letters = {ord(c): ascii_letters[n] for n, c in enumerate(dict.fromkeys("".join(terms)))}
        *plain, last = (term.translate(letters) for term in terms)
        return Network(f"{inputs}->{output}", tuple(plain), last)

    @property
    def name(self) -> str:
        """What tables and messages call it."""
        return "chain" if self.is_chain else self.equation

    @cached_property
    def is_chain(self) -> bool:
        """Whether it is U M.. Vᵀ of factors (*summed, rows, columns), both ends tall."""
        counts = tuple(map(len, self.terms))
        if len(counts) < 2 or min(counts) < 2 or sum(counts) > 52 or len(counts) > LONGEST:
            return False
        return self == chain(counts)

    @cached_property
    def bonds(self) -> str:
        """The letters that are summed over."""
        return "".join(sorted(set("".join(self.terms)) - set(self.output)))

    @cached_property
    def _shown(self) -> Mapping[int, str]:
        """Its own letters, of those of the terms, and with primes those of copies."""
        written = [c for c in self.equation if c in ascii_letters]
        found = dict(zip("".join((*self.terms, self.output)), written, strict=True))
        return {
            **{ord(c): shown for c, shown in found.items()},
            **{ord(c.translate(_PRIMED)): f"{shown}'" for c, shown in found.items()},
        }

    def with_batch(self, batch: int) -> tuple[str, ...]:
        """The terms, with digits for the axes in front of them."""
        return tuple(_BATCH[:batch] + term for term in self.terms)

    def copied(self, term: str) -> str:
        """The letters of a copy, whose bonds are others."""
        return "".join(c.translate(_PRIMED) if c in self.bonds else c for c in term)

    def sizes(self, views: Views, batch: int) -> dict[str, int]:
        """The length of every letter, the digits being those of the batch."""
        pairs = zip(self.with_batch(batch), views, strict=True)
        return {c: n for term, v in pairs for c, n in zip(term, v.shape, strict=True)}

    def check(self, name: str, views: Views, batch: int) -> None:
        """Refuse factors whose shapes do not fit, with a ValueError that names the product."""
        shapes = [tuple(view.shape) for view in views]
        of = f"of {self.equation!r}" + (f" behind {batch} batch axes" if batch else "")
        if len(views) != len(self.terms):
            raise ValueError(f"{name}: expected {len(self.terms)} factors {of}, got {shapes}")
        known: dict[str, tuple[int, int]] = {}
        for k, (term, shape) in enumerate(zip(self.with_batch(batch), shapes, strict=True)):
            if len(shape) != len(term):
                raise ValueError(
                    f"{name}: expected factors {of}, but for {term.translate(self._shown)!r} "
                    f"factor {k} has {len(shape)} axes: {shapes}"
                )
            for c, size in zip(term, shape, strict=True):
                other, where = known.setdefault(c, (size, k))
                if other != size:
                    shown = f"batch axis {c}" if c in _BATCH else c.translate(self._shown)
                    raise ValueError(
                        f"{name}: expected factors {of}, but {shown} is {other} in factor {where} "
                        f"and {size} in factor {k}: {shapes}"
                    )

    def shape(self, views: Views, batch: int) -> tuple[int, ...]:
        """Shape of the dense product."""
        sizes = self.sizes(views, batch)
        return tuple(sizes[c] for c in _BATCH[:batch] + self.output)

    def rank(self, views: Views, batch: int) -> int:
        """The smallest bond; 1 where nothing is summed."""
        sizes = self.sizes(views, batch)
        return min((sizes[c] for c in self.bonds), default=1)

    def plan(self, shapes: Sequence[Sequence[int]], batch: int = 0) -> Plan:
        """The cheapest contraction for the gradients of ½‖W‖², kept from call to call.

        Args:
            shapes: of the factors' views.
            batch: number of leading batch axes.
        """
        wanted = (True,) * len(self.terms)
        return _planned(self, tuple(map(tuple, shapes)), batch, wanted, (), True)

    def describe(self, views: Views, batch: int) -> str:
        """The plan in words: the letters' sizes, each step, its flops, and what is kept.

        Examples:
            >>> import torch
            >>> print(Network.of("mr,nr->mn").describe([torch.ones(64, 4), torch.ones(32, 4)], 0))
            mr,nr->mn with m=64 r=4 n=32, gram: 6,144 flops
              nr,nr'->r'r                     1,024 flops  16 numbers
              mr,mr'->r'r                     2,048 flops  16 numbers
              r'r,mr'->mr                     2,048 flops  for factor 0
              r'r,nr'->nr                     1,024 flops  for factor 1
        """
        found = self.plan([view.shape for view in views], batch)
        sizes = " ".join(
            f"{c.translate(self._shown)}={n}" for c, n in self.sizes(views, batch).items()
        )
        lines = [f"{self.equation} with {sizes}, {found.route}: {found.flops:,} flops"]
        lines += [
            f"  {equation:<24} {flops:>12,} flops  {use}"
            for equation, flops, use in found.table(lambda term: term.translate(self._shown))
        ]
        return "\n".join(lines)

    def route(self, views: Views, batch: int) -> str:
        """What the gradients go through: "gram", or "dense" where W is formed."""
        return self.plan([view.shape for view in views], batch).route

    def squared_norm(self, views: Views, batch: int, grams: Sequence[bool] = ()) -> Tensor:
        """‖W‖_F² over all of the batch, at least float32; differentiable. See ``gradients``."""
        views = accumulable(views)
        shapes, host = tuple([v.shape for v in views]), views[0].device.type == "cpu"
        return _planned(self, shapes, batch, (), tuple(grams), host).result(views)

    def materialize(self, views: Views, batch: int) -> Tensor:
        """Form W, shape ``shape``, at least float32; differentiable."""
        views = accumulable(views)
        shapes, output = tuple([v.shape for v in views]), _BATCH[:batch] + self.output
        return plan(self.with_batch(batch), output, shapes).result(views)

    def gradients(
        self,
        views: Views,
        batch: int,
        coefs: Sequence[Coefficient | None],
        grams: Sequence[bool] = (),
    ) -> list[Tensor | None]:
        """Gradients of ½‖W‖² for the factors, each times its coefficient; None for None.

        Args:
            views: the factors.
            batch: number of leading batch axes.
            coefs: numbers, or tensors of one number or of one for each entry of the first axis.
            grams: whether the ``gram`` of a factor is in its place; then what is around that is
                returned in place of the gradient, for ``times``.

        Returns:
            Tensors of the views' shapes, in their ``common_dtype``.
        """
        views = accumulable(views)
        wanted = tuple([coef is not None for coef in coefs])
        if True not in wanted:
            return [None] * len(wanted)
        shapes = tuple([v.shape for v in views])
        found = _planned(self, shapes, batch, wanted, tuple(grams), True)
        held = found.run(views)
        pairs = zip(found.ends, coefs, strict=True)
        return [None if e is None or coef is None else e(held, coef) for e, coef in pairs]

    # --- the Gram of one factor -------------------------------------------------------------------

    def own(self, k: int) -> str:
        """The letters that a Gram of factor k sums over: free ones that no other factor has.

        Empty where a bond is in this factor alone: its Gram would be larger than it has to be.
        """
        others = set("".join(self.terms[:k] + self.terms[k + 1 :]))
        alone = [c for c in self.terms[k] if c not in others]
        return "".join(alone) if others and set(alone) <= set(self.output) else ""

    def gram_of(self, k: int, batch: int) -> str:
        """The letters of the Gram of factor k: those that are not summed, then the copies'."""
        term, own = _BATCH[:batch] + self.terms[k], self.own(k)
        kept = "".join(c for c in term if c not in own)
        return kept + "".join(c for c in self.copied(kept) if c not in kept)

    def rows(self, k: int, batch: int) -> list[int]:
        """The axes of factor k that its Gram sums over."""
        return [batch + axis for axis, c in enumerate(self.terms[k]) if c in self.own(k)]

    def gram_shape(self, k: int, shape: Sequence[int], batch: int) -> tuple[int, ...]:
        """The shape of the Gram of factor k, if that has this shape."""
        term = _BATCH[:batch] + self.terms[k]
        sizes = dict(zip(term + self.copied(term), [*shape, *shape], strict=True))
        return tuple(sizes[c] for c in self.gram_of(k, batch))

    def gram(self, k: int, view: Tensor, batch: int) -> Tensor:
        """The Gram of factor k or of some of its rows; those of all rows add up to it."""
        return _pair(self, k, batch, tuple(view.shape), True)(view, view)

    def times(self, k: int, view: Tensor, around: Tensor, batch: int) -> Tensor:
        """The gradient of factor k, or of some of its rows, from what is around its Gram."""
        return _pair(self, k, batch, tuple(view.shape), False)(view, around)


@lru_cache(maxsize=4096)
def _planned(
    network: Network,
    shapes: Shapes,
    batch: int,
    wanted: tuple[bool, ...],
    grams: tuple[bool, ...],
    host: bool,
) -> Plan:
    """For the gradients that are wanted; for the norm if none is."""
    # Of long factors, autograd would sum over the rows of W in its own way.
    dense = bool(wanted) or not host or max([0, *(n for s in shapes for n in s)]) <= LONG
    terms = list(network.with_batch(batch))
    copies: list[str | None] = [network.copied(term) for term in terms]
    for k, given in enumerate(grams):
        if given:
            terms[k], copies[k] = network.gram_of(k, batch), None
    output = _BATCH[:batch] + network.output
    return plan(tuple(terms), output, shapes, tuple(copies), wanted, dense)


@lru_cache(maxsize=4096)
def _pair(network: Network, k: int, batch: int, shape: tuple[int, ...], own: bool) -> Pair:
    """Factor k with its copy, which gives its Gram, or with what is around that."""
    term, gram = _BATCH[:batch] + network.terms[k], network.gram_of(k, batch)
    copy = network.copied(term)
    sizes = dict(zip(term + copy, shape * 2, strict=True))
    other, out = (copy, gram) if own else (gram, copy)
    return lowered(term, other, out, sizes, exact=True)[1]


@lru_cache(maxsize=4096)
def chain(counts: tuple[int, ...]) -> Network:
    """U M.. Vᵀ of factors of so many axes, (*summed, rows, columns), both ends tall.

    Examples:
        >>> chain((2, 2, 2)).equation, chain((2, 3, 2)).equation
        ('mr,rs,ns->mn', 'mr,ars,ns->man')
    """
    if len(counts) > LONGEST or sum(counts) > 52:
        raise ValueError(f"expected at most {LONGEST} factors, got {len(counts)}")
    bonds, free = _BONDS, iter(_FREE)
    last = len(counts) - 1
    own = {k: "".join(islice(free, counts[k] - 1 - (0 < k < last))) for k in (0, last)}
    own |= {k: "".join(islice(free, counts[k] - 2)) for k in range(1, last)}
    terms = [own[k] + bonds[max(k - 1, 0) : k + 1][: 2 if k < last else 1] for k in range(last + 1)]
    return Network.of(f"{','.join(terms)}->{''.join(own[k] for k in range(last + 1))}")


def tucker(order: int, whole: Sequence[int] = ()) -> Network:
    """A core, then a factor for each mode that is not whole; modes are counted from 0.

    Examples:
        >>> tucker(3).equation, tucker(3, whole=[2]).equation
        ('ABC,aA,bB,cC->abc', 'ABc,aA,bB->abc')
    """
    modes = ascii_lowercase[:order]
    core = "".join(c if k in whole else c.upper() for k, c in enumerate(modes))
    factors = [c + c.upper() for k, c in enumerate(modes) if k not in whole]
    return Network.of(f"{','.join([core, *factors])}->{modes}")


def cp(order: int) -> Network:
    """The sum over r of the outer products of columns r.

    Examples:
        >>> cp(3).equation
        'ar,br,cr->abc'
    """
    modes = ascii_lowercase.replace("r", "")[:order]
    return Network.of(f"{','.join(c + 'r' for c in modes)}->{modes}")


def as_chain(equation: str) -> tuple[Network, int, list[str]] | None:
    """Read an equation as a chain, if the factors' axes can be put into that order.

    Returns:
        The chain, the number of its batch axes, and an einops pattern for each factor.

    Examples:
        >>> network, batch, patterns = as_chain("hmr,hrn->hmn")
        >>> network.equation, batch, patterns
        ('mr,nr->mn', 1, ['h m r -> h m r', 'h r n -> h n r'])
    """
    given = Network.of(equation)
    *terms, output = (term.translate(given._shown) for term in (*given.terms, given.output))
    heads = "".join(c for c in output if all(c in term for term in terms))
    seen = []
    for k, term in enumerate(terms):
        before = "".join(terms[max(k - 1, 0) : k])
        rest = [c for c in term if c not in heads]
        free = sorted((c for c in rest if c in output), key=output.index)
        bonds = sorted((c for c in rest if c not in output), key=lambda c: c not in before)
        seen.append("".join([*free, *bonds]))
    if not output.startswith(heads):
        return None
    network = Network.of(f"{','.join(seen)}->{output[len(heads) :]}")
    if not network.is_chain:
        return None
    pairs = zip(terms, seen, strict=True)
    patterns = [f"{' '.join(term)} -> {' '.join(heads + view)}" for term, view in pairs]
    return network, len(heads), patterns
