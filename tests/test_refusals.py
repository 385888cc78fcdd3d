"""What must work or be refused: on modules of every kind, and around factorized models."""

import io
import pickle
import weakref
from functools import partial

import pytest
import torch
from test_bad_input import FATAL, REFUSED
from torch import nn
from torch.nn.utils import parametrize

import frobdecay
from frobdecay import CP, LowRank, TensorTrain, Tucker, factorize, merge
from frobdecay.decompositions import cp_als, hooi, hosvd, tt_svd

KINDS = pytest.mark.parametrize("kind", [CP, TensorTrain, Tucker])


def unchanged(model):
    """Whether nothing of the model is parametrized."""
    return not any(map(parametrize.is_parametrized, model.modules()))


# --- tensors --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("case", REFUSED)
def test_tensors_take_no_weight_that_matrices_do_not(kind, case):
    """Modules whose forward, hooks or format cannot take factors: named, an error."""
    make, reason = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=rf"(?s)bad\.weight.*{reason}"):
        factorize(model, 2, include="bad", parametrization=kind)
    assert frobdecay.products(model) == []


@KINDS
@pytest.mark.parametrize("case", FATAL)
def test_tensors_need_numbers(kind, case):
    """NaN, lazy and meta weights, swept in or not."""
    make, message = FATAL[case]
    model = make()
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        factorize(model, 2, parametrization=kind)
    assert unchanged(model)


@KINDS
@pytest.mark.parametrize("pattern", ["o i kh kw -> o i (kh kw)", "o -> o 1"])
def test_patterns_of_another_order_are_refused(kind, pattern):
    """A pattern for tensors that the model has not: with the weights there are."""
    model = nn.Sequential(nn.Linear(12, 10))
    with pytest.raises(ValueError, match=r"0\.weight"):
        factorize(model, 2, include="0", parametrization=partial(kind, pattern=pattern))
    assert unchanged(model)


@pytest.mark.parametrize(("decompose", "ranks"), [(hosvd, (1,)), (tt_svd, ()), (cp_als, 1)])
def test_vectors_have_no_decomposition(decompose, ranks):
    """Nor have numbers."""
    for tensor in (torch.ones(4), torch.tensor(2.0)):
        with pytest.raises(ValueError, match=r"got \(4?,?\)"):
            decompose(tensor, ranks)


@pytest.mark.parametrize(
    ("decompose", "ranks", "message"),
    [
        (hosvd, (1, 1), "expected 3 ranks, one for each mode of 3×4×5"),
        (hooi, (1, 1, 1, 1), "expected 3 ranks, one for each mode of 3×4×5"),
        (hosvd, (4, 4, 4), "expected Tucker ranks that fit 3×4×5"),
        (tt_svd, (1,), "expected 2 ranks, one for each bond"),
        (tt_svd, (1, 1, 1), "expected 2 ranks, one for each bond"),
        (tt_svd, (9, 9), "expected tensor train ranks that fit 3×4×5"),
        (cp_als, 0, "rank above 0"),
    ],
)
def test_decompositions_refuse_ranks_that_do_not_fit(decompose, ranks, message):
    """Too few, too many and too large, with what fits."""
    with pytest.raises(ValueError, match=message):
        decompose(torch.randn(3, 4, 5), ranks)


def test_als_that_does_not_converge_says_so_before_anything_changed():
    """A warning, which as an error leaves the model dense."""
    model = nn.Sequential(nn.Linear(12, 10))
    impatient = partial(CP, init=partial(cp_als, sweeps=1, tolerance=0.0))
    with pytest.raises(RuntimeWarning, match="did not converge in 1 sweeps"):
        factorize(model, 2, parametrization=impatient)
    assert unchanged(model)


def test_als_that_overflows_names_the_weight():
    """An error with the module's name, and the model as it was."""
    model = nn.Sequential(nn.Linear(27, 27, dtype=torch.float64))
    nn.init.constant_(model[0].weight, 1e200)
    with pytest.raises(RuntimeError, match=r"^0\.weight: .*finite numbers.*smaller rank"):
        factorize(model, 2, parametrization=CP)
    assert unchanged(model)


# --- around factorized models ---------------------------------------------------------------------


@pytest.mark.covers("P15")
def test_a_module_that_cannot_be_pickled_says_what_can():
    """The error, of torch itself, names the state_dict; the merged module pickles."""
    layer = nn.Linear(6, 4)
    factorize(layer, 2)
    for save in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            save(layer)
    twin = pickle.loads(pickle.dumps(merge(layer)))
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.covers("P8")
def test_the_dense_weight_is_let_go():
    """Nothing keeps it alive beside its factors."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    dense = [weakref.ref(model[i].weight) for i in range(3)]
    factorize(model, 2)
    assert [ref() for ref in dense] == [None] * 3


@pytest.mark.covers("P21")
def test_freezing_goes_through_the_module_before_and_after():
    """``requires_grad_`` of the module reaches the factors; of the weight, it is refused."""
    before, after = nn.Linear(6, 4), nn.Linear(6, 4)
    before.requires_grad_(False)
    factorize(before, 2)
    factorize(after, 2)
    with pytest.raises(RuntimeError, match=r"freeze .* the\s+factors themselves"):
        after.weight.requires_grad_(False)
    after.requires_grad_(False)
    assert not [p for layer in (before, after) for p in layer.parameters() if p.requires_grad]


@pytest.mark.covers("P23")
def test_factorizing_while_compiling_changes_nothing():
    """A whole graph cannot hold it: torch's error, and a dense model."""
    model = nn.Sequential(nn.Linear(6, 4))

    def run(x):
        factorize(model, 2)
        return model(x)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(torch.randn(3, 6))
    assert unchanged(model)


@pytest.mark.covers("C18")
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_merged_layer_can_be_factorized_at_another_rank(rank):
    """Again with the smallest error there is, whatever the first rank was."""
    layer = nn.Linear(12, 10, dtype=torch.float64)
    factorize(layer, 4)
    dense = merge(layer).weight.detach().clone()
    factorize(layer, rank)
    error = (layer.weight.materialize() - dense).norm().detach()
    tail = torch.linalg.svdvals(dense)[rank:].norm()
    torch.testing.assert_close(error, tail, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", [CP, LowRank, TensorTrain, Tucker])
def test_a_forward_of_ones_own_computes(kind):
    """Whatever it does with its weight is right, if not cheap."""

    class Own(nn.Linear):
        def forward(self, x):
            return torch.einsum("bi,oi->bo", x, self.weight.abs().view(4, 6)) + self.weight.sum()

    layer = Own(6, 4, bias=False)
    factorize(layer, 2, parametrization=kind)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), merge(layer)(x), rtol=1e-5, atol=1e-6)
