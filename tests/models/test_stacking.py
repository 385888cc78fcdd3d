"""Many weights at once: stacks of equal shapes, and the progress bar."""

import copy
import functools
import io
import sys

import pytest
import torch
from closeness import TOLERANCE
from torch import nn

from frobdecay.algebra import spectral
from frobdecay.models import progress, stacking
from frobdecay.models.factorize import factorize
from frobdecay.weights.lowrank import LowRank


def _model(dtype=torch.float32):
    """Matrices of 12×8 of all kinds, one of them of rank 2, and others between."""
    model = nn.Sequential(
        nn.Linear(8, 12), nn.Linear(12, 8), nn.Embedding(12, 8), nn.Conv2d(2, 4, (3, 4)),
        nn.Conv2d(6, 12, (4, 2), groups=3), nn.Linear(8, 12), nn.MultiheadAttention(8, 2),
        nn.Linear(8, 12),
    )  # fmt: skip
    with torch.no_grad():
        model[5].weight.copy_(torch.randn(12, 2) @ torch.randn(2, 8))
    return model.to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """The shapes that are decomposed."""
    shapes, original = [], spectral.truncated_svd

    def counted(weight, r):
        shapes.append(tuple(weight.shape))
        return original(weight, r)

    monkeypatch.setattr(spectral, "truncated_svd", counted)
    return shapes


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("rank", [2, 3, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stacks_give_the_factors_of_one_by_one(dtype, rank, depth):
    """Also at ranks where one of a stack has fewer singular values than columns."""
    model = _model(dtype)
    twin, make = copy.deepcopy(model), functools.partial(LowRank, depth=depth)
    plan = factorize(model, rank=rank, parametrization=make)
    alone = [
        factorize(twin, rank=rank, include=name, parametrization=make).rows[0]
        for name in plan.ranks
    ]
    ours, theirs = model.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=100 * TOLERANCE[dtype], atol=100 * TOLERANCE[dtype]
        )
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    rows = [row for row in plan.rows if row.rank is not None]
    for row, single in zip(rows, alone, strict=True):
        assert row.error == pytest.approx(single.error, rel=1e-3, abs=1e-6)


def test_equal_shapes_are_decomposed_at_once(calls):
    """One call for all weights that are read as matrices of equal shape; batches join in."""
    factorize(nn.Sequential(*(nn.Linear(8, 12) for _ in range(5)), nn.Linear(12, 8)), rank=3)
    assert calls == [(5, 12, 8), (8, 12)]


@pytest.mark.covers("P8")
def test_stacks_are_bounded(calls, monkeypatch):
    """By a number of entries, or by the largest weight where that has more."""
    layers = [nn.Linear(8, 12) for _ in range(5)]
    monkeypatch.setattr(stacking, "STACKED", 2 * 96)
    factorize(nn.Sequential(*layers), rank=3)
    assert [shape[0] for shape in calls if len(shape) == 3] == [2, 2]
    calls.clear()
    monkeypatch.setattr(stacking, "STACKED", 0)
    layers = [nn.Linear(8, 12) for _ in range(5)]
    factorize(nn.Sequential(*layers, nn.Linear(8, 36)), rank=3)
    assert [shape[0] for shape in calls if len(shape) == 3] == [3, 2]


@pytest.mark.parametrize("name", ["randomized", "kaiming", "matched"])
def test_other_initializations_are_not_stacked(name):
    """They draw: one by one, in module order, as ever."""
    model = _model()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    plan = factorize(model, rank=3, init=name)
    torch.manual_seed(1)
    for weight in plan.ranks:
        factorize(twin, rank=3, init=name, include=weight)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_the_initialization_of_a_stacked_weight_is_still_its_own():
    """An assignment decomposes the new weight, not the old one."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(8, 12))
    factorize(model, rank=8)
    W = torch.randn(12, 8)
    model[1].weight = W
    assert model[1].parametrizations.weight[0].init is spectral.spectral_init
    torch.testing.assert_close(model[1].weight.materialize(), W, rtol=1e-4, atol=1e-5)


def test_an_error_in_a_later_stack_leaves_everything_as_it_was(monkeypatch):
    """The first stack is registered already; the error names a weight of the second."""
    sizes = [(8, 12)] * 3 + [(9, 6)] * 2
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    before, original = model.state_dict(), spectral.truncated_svd

    def failing(weight, r):
        if weight.shape == (2, 6, 9):
            raise ValueError("does not converge")
        return original(weight, r)

    monkeypatch.setattr(spectral, "truncated_svd", failing)
    with pytest.raises(ValueError, match=r"3\.weight: does not converge"):
        factorize(model, rank=2)
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# --- the progress bar ---------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stderr that says it is one."""

    def isatty(self):
        """Yes."""
        return True


@pytest.mark.parametrize(
    ("wanted", "terminal", "patience", "shown"),
    [
        (True, False, 1.0, True),
        (False, True, 0.0, False),
        (None, True, 0.0, True),
        (None, True, 1000.0, False),
        (None, False, 0.0, False),
    ],
)
def test_when_a_bar_is_shown(wanted, terminal, patience, shown, monkeypatch):
    """Asked for, or unasked on a terminal where the work is long."""
    pytest.importorskip("rich")
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    factorize(_model(), rank=2, progress=wanted)
    text = stderr.getvalue()
    assert ("factorizing" in text) == ("100%" in text) == shown


def test_a_bar_without_rich_is_refused(monkeypatch):
    """Before anything is changed, and only where it was asked for."""
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    model = _model()
    keys = list(model.state_dict())
    with pytest.raises(ImportError, match="pip install rich"):
        factorize(model, rank=2, progress=True)
    assert list(model.state_dict()) == keys
    assert factorize(model, rank=2).ranks


def test_an_error_stops_the_bar(monkeypatch):
    """The terminal is given back."""
    rich = pytest.importorskip("rich.progress")
    stopped, original = [], rich.Progress.stop
    monkeypatch.setattr(rich.Progress, "stop", lambda bar: (stopped.append(1), original(bar))[1])
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def failing(weight, rank, *, depth):
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"0\.weight: no"):
        factorize(_model(), rank=2, progress=True, init=failing)
    assert stopped
