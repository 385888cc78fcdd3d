"""A product as an einsum: random equations against autograd of ``torch.einsum`` in float64."""

import pickle

import pytest
import torch
from closeness import close, normal
from hypothesis import assume, given
from hypothesis import strategies as st

from frobdecay.algebra.network import Network, as_chain, chain, cp, tucker
from frobdecay.algebra.sharpness import sharpness


@st.composite
def networks(draw):
    """An equation of 1 to 4 factors over 6 letters, in any order, and float64 factors for it.

    Letters may be in any number of factors, of the output too; factors may have one axis or none.
    """
    count, seed = draw(st.integers(1, 4)), draw(st.integers(0, 1000))
    term = st.lists(st.sampled_from("abcxyZ"), max_size=4, unique=True)
    terms = ["".join(draw(term)) for _ in range(count)]
    seen = sorted(set("".join(terms)))
    output = "".join(c for c in draw(st.permutations(seen)) if draw(st.booleans()))
    sizes = {c: draw(st.integers(1, 4)) for c in seen}
    views = [
        normal([sizes[c] for c in term], seed + k).requires_grad_() for k, term in enumerate(terms)
    ]
    return f"{','.join(terms)}->{output}", views


@pytest.mark.covers("C11")
@given(networks(), st.integers(0, 2))
def test_all_of_a_network_is_that_of_the_einsum(drawn, batch):
    """Product, norm and gradients; also with axes in front that all factors share."""
    equation, views = drawn
    views = [
        (view.detach() * normal((3, 2)[:batch] + (1,) * view.ndim, k)).requires_grad_()
        for k, view in enumerate(views)
    ]
    inputs, _, output = equation.partition("->")
    heads = "hi"[:batch]
    terms = ",".join(heads + term for term in inputs.split(","))
    dense = torch.einsum(f"{terms}->{heads}{output}", *views)
    square = dense.square().sum()
    network = Network.of(equation)
    network.check("product", views, batch)
    assert network.shape(views, batch) == dense.shape
    assert close(network.materialize(views, batch), dense, 1e-12)
    assert close(network.squared_norm(views, batch), square, 1e-10)
    expected = torch.autograd.grad(square / 2, views, retain_graph=True)
    for found in (
        network.gradients(views, batch, [1.0] * len(views)),
        torch.autograd.grad(network.squared_norm(views, batch) / 2, views),
    ):
        for gradient, autograd in zip(found, expected, strict=True):
            assert close(gradient, autograd, 1e-10)


@given(networks(), st.data())
def test_coefficients_are_the_factors_own(drawn, data):
    """Numbers, tensors, one for each entry of a stack; and nothing for those without one."""
    equation, views = drawn
    network, k = Network.of(equation), data.draw(st.integers(0, len(views) - 1))
    plain = network.gradients(views, 0, [1.0] * len(views))
    coefs = [None] * len(views)
    coefs[k] = torch.tensor(0.3, dtype=torch.float64)
    found = network.gradients(views, 0, coefs)
    assert [g is None for g in found] == [j != k for j in range(len(views))]
    assert close(found[k], 0.3 * plain[k], 1e-13)
    stacked = [torch.stack([view, 2 * view]) for view in views]
    coefs[k] = torch.tensor([0.3, 0.1], dtype=torch.float64)
    found = network.gradients(stacked, 1, coefs)[k]
    assert close(found[0], 0.3 * plain[k], 1e-13)
    assert close(found[1], 0.1 * 2 ** (2 * len(views) - 1) * plain[k], 1e-13)


@given(networks())
def test_grams_of_parts_of_the_rows_add_up_to_the_gradient(drawn):
    """From the Grams of some factors in their place, as they are exchanged where it is cut."""
    equation, views = drawn
    network = Network.of(equation)
    grams = [bool(network.own(k)) for k in range(len(views))]
    assume(any(grams))
    expected = network.gradients(views, 0, [0.5] * len(views))
    given_ = [
        network.gram(k, view, 0) if gram else view
        for k, (view, gram) in enumerate(zip(views, grams, strict=True))
    ]
    found = network.gradients(given_, 0, [0.5] * len(views), grams)
    norm = network.squared_norm(given_, 0, grams)
    assert close(norm, network.squared_norm(views, 0), 1e-10)
    for k, (view, gram) in enumerate(zip(views, grams, strict=True)):
        if not gram:
            assert close(found[k], expected[k], 1e-10)
            continue
        axis = network.terms[k].index(network.own(k)[0])
        half = view.shape[axis] // 2
        parts = view.narrow(axis, 0, half), view.narrow(axis, half, view.shape[axis] - half)
        assert close(sum(network.gram(k, part, 0) for part in parts), given_[k], 1e-10)
        whole = torch.cat([network.times(k, part, found[k], 0) for part in parts], axis)
        assert close(whole, expected[k], 1e-10)


@given(networks())
def test_sharpness_is_the_largest_eigenvalue_of_a_hessian(drawn):
    """Of ½‖W‖² for one factor, the others fixed."""
    equation, views = drawn
    views = [view.detach() for view in views]
    found = []
    for k, view in enumerate(views):

        def half(factor, k=k):
            return torch.einsum(equation, *views[:k], factor, *views[k + 1 :]).square().sum() / 2

        hessian = torch.autograd.functional.hessian(half, view)
        found.append(torch.linalg.eigvalsh(hessian.reshape(view.numel(), -1))[-1])
    assert close(sharpness(Network.of(equation), views, 0), torch.stack(found).max(), 1e-10)


@given(networks(), st.data())
def test_strides_do_not_matter(drawn, data):
    """Views of any layout give what their copies give."""
    equation, views = drawn
    network = Network.of(equation)
    expected = network.gradients(views, 0, [1.0] * len(views))
    for k, view in enumerate(views):
        order = data.draw(st.permutations(range(view.ndim)))
        back = sorted(range(view.ndim), key=order.__getitem__)
        views[k] = view.detach().permute(order).contiguous().permute(back)
    for found, gradient in zip(
        network.gradients(views, 0, [1.0] * len(views)), expected, strict=True
    ):
        assert close(found, gradient, 1e-12)


def test_equations_are_values():
    """Equal where they mean the same, whatever the letters; hashable, and they pickle."""
    pair = Network.of("mr,nr->mn")
    assert pair == Network.of(" ax, bx -> ab ") == chain((2, 2)) != Network.of("mr,nr->nm")
    assert len({pair, Network.of("ax,bx->ab"), tucker(2), tucker(2, [1]), cp(2)}) == 3
    assert pickle.loads(pickle.dumps(pair)) == pair == cp(2)


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("mr,nr", "the letters of every factor and of the product"),
        ("mr,n1->mn", "the letters of every factor"),
        ("...r,nr->n", "the letters of every factor"),
        ("mm,nm->n", "no letter twice in 'mm'"),
        ("mr,nr->mm", "no letter twice in 'mm'"),
        ("mr,nr->mz", "got z in none"),
    ],
)
def test_what_is_no_equation_is_refused(equation, message):
    """The message says what was expected and shows what was given."""
    with pytest.raises(ValueError, match=message) as error:
        Network.of(equation)
    assert repr(equation) in str(error.value)


@pytest.mark.parametrize(
    ("equation", "shapes", "message"),
    [
        ("ab,cd->acbd", [(2, 3)], r"expected 2 factors of 'ab,cd->acbd', got \[\(2, 3\)\]"),
        ("ab,cd->acbd", [(2, 3), (4, 5, 6)], "for 'cd' factor 1 has 3 axes"),
        ("xyz,ax->ayz", [(2, 3, 4), (5, 3)], "x is 2 in factor 0 and 3 in factor 1"),
    ],
)
def test_factors_that_do_not_fit_are_refused(equation, shapes, message):
    """The message names the product, the equation and its letter, and the shapes."""
    with pytest.raises(ValueError, match=rf"layer\.weight: {message}|layer.weight.*{message}"):
        Network.of(equation).check("layer.weight", [torch.ones(s) for s in shapes], 0)


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("mr,nr->mn", ("mr,nr->mn", 0)),
        ("mr,rn->mn", ("mr,nr->mn", 0)),
        ("hmr,hrs,hns->hmn", ("mr,rs,ns->mn", 1)),
        ("ar,rbs,sc->abc", ("ar,brs,cs->abc", 0)),
        ("mr,nr->nm", None),
        ("hmr,hnr->mhn", None),
        ("ab,cd->acbd", None),
        ("ar,br,cr->abc", None),
        ("aij,bjk,cki->abc", None),
    ],
)
def test_a_chain_is_known_by_its_equation(equation, expected):
    """Whatever the order of a factor's axes, if that of the output is the chain's."""
    found = as_chain(equation)
    assert (found and (found[0].equation, found[1])) == expected


@pytest.mark.parametrize("r", [1, 47, 49, 64])
def test_the_cheaper_route_is_taken(r):
    """Grams up to r = 1.5·mn/(m+n), and the dense product beyond."""
    assert chain((2, 2)).plan([(64, r), (64, r)]).route == ("gram" if r < 48 else "dense")


def test_a_plan_is_made_once():
    """For each equation and shapes, whatever the letters."""
    shapes = [(6, 2), (5, 2)]
    assert Network.of("mr,nr->mn").plan(shapes) is Network.of("ax,bx->ab").plan(shapes)
