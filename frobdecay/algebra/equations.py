"""Families of equations, and whether one of somebody's own is a chain."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase

from frobdecay.algebra.network import Network


def tucker(order: int, whole: Sequence[int] = ()) -> Network:
    """A core, then a factor for each mode that is not whole; modes are counted from 0.

    Example:
        >>> tucker(3).equation, tucker(3, whole=[2]).equation
        ('ABC,aA,bB,cC->abc', 'ABc,aA,bB->abc')
    """
    modes = ascii_lowercase[:order]
    core = "".join(c if k in whole else c.upper() for k, c in enumerate(modes))
    factors = [c + c.upper() for k, c in enumerate(modes) if k not in whole]
    return Network.of(f"{','.join([core, *factors])}->{modes}")


def cp(order: int) -> Network:
    """The sum over r of the outer products of columns r.

    Example:
        >>> cp(3).equation
        'ar,br,cr->abc'
    """
    modes = ascii_lowercase.replace("r", "")[:order]
    return Network.of(f"{','.join(c + 'r' for c in modes)}->{modes}")


def as_chain(equation: str) -> tuple[Network, int, list[str]] | None:
    """Read an equation as a chain, if the factors' axes can be put into that order.

    Returns:
        The chain, the number of its batch axes, and an einops pattern for each factor.

    Example:
        >>> network, batch, patterns = as_chain("hmr,hrn->hmn")
        >>> network.equation, batch, patterns
        ('mr,nr->mn', 1, ['h m r -> h m r', 'h r n -> h n r'])
    """
    inputs, _, output = Network.of(equation).equation.partition("->")
    terms = inputs.split(",")
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
