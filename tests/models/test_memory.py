"""Who shares memory: strides, dtypes and spans of every kind, against sets of addresses."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frobdecay import plan_ranks
from frobdecay.models.memory import overlaps

FLAT = torch.zeros(240)


def addresses(tensor):
    """Every byte of every entry."""
    places = torch.tensor([tensor.data_ptr()])
    for stride, count in zip(tensor.stride(), tensor.shape, strict=True):
        places = (places[:, None] + torch.arange(count) * stride * tensor.element_size()).flatten()
    return set((places[:, None] + torch.arange(tensor.element_size())).flatten().tolist())


def pairs(*tensors):
    """Positions of those that share memory."""
    return {tuple(sorted(pair)) for pair in overlaps(dict(enumerate(tensors)))}


PLACED = {
    "a span around others": (
        [FLAT, FLAT[:64].view(8, 8), FLAT[64:128].view(8, 8), FLAT[128:192].view(8, 8)],
        {(0, 1), (0, 2), (0, 3)}),
    "nested": ([FLAT[:100], FLAT[10:90], FLAT[20:30], FLAT[40:50]],
               {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)}),
    "slices of columns": (FLAT.view(12, 20).split(5, 1), set()),
    "slices that share a column": (
        [FLAT.view(12, 20)[:, :9], FLAT.view(12, 20)[:, 8:], FLAT.view(12, 20)[:, 12:]],
        {(0, 1), (1, 2)}),
    "every second": ([FLAT[::2], FLAT[1::2], FLAT[::3]], {(0, 2), (1, 2)}),
    "transposed": ([FLAT.view(12, 20), FLAT.view(12, 20).T[:4]], {(0, 1)}),
    "expanded": ([FLAT[:8].expand(8, 8), FLAT[8:16], FLAT[4:5].expand(3, 3)], {(0, 2)}),
    "windows": ([FLAT.unfold(0, 4, 2), FLAT[:9].unfold(0, 3, 1), FLAT[8:12]],
                {(0, 1), (0, 2), (1, 2)}),
    "dtypes": ([FLAT[:4], FLAT[3:5].view(torch.int16), FLAT[5:7].view(torch.uint8)], {(0, 1)}),
    "halves of entries": (
        [FLAT.view(torch.float16)[::2], FLAT.view(torch.float16)[1::2]], set()),
    "the same": ([FLAT, FLAT.view(12, 20), FLAT.detach()], {(0, 1), (0, 2), (1, 2)}),
    "complex parts": (
        [torch.view_as_complex(FLAT.view(-1, 2)).real, FLAT[1::2]], set()),
    "neighbours": ([FLAT[:5], FLAT[5:]], set()),
    "empty": ([FLAT[:0], FLAT], set()),
    "no memory": ([FLAT.to("meta"), FLAT.to_sparse(), FLAT], set()),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACED)
def test_tensors_that_share_bytes_are_found(case):
    """Each pair once, and no other."""
    tensors, expected = PLACED[case]
    assert pairs(*tensors) == expected
    assert pairs(*tensors[::-1]) == {
        (len(tensors) - 1 - j, len(tensors) - 1 - i) for i, j in expected
    }


VIEW = st.tuples(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=3), st.integers(0, 60)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VIEW, min_size=2, max_size=4))
def test_any_strides(views):
    """Whatever the sizes and strides, as sets of addresses say."""
    tensors = [
        FLAT.as_strided([n for n, _ in axes], [s for _, s in axes], offset)
        for axes, offset in views
    ]
    sets = [addresses(tensor) for tensor in tensors]
    assert pairs(*tensors) == {
        (i, j) for j in range(len(sets)) for i in range(j) if sets[i] & sets[j]
    }


def _linear(weight):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(weight)
    return layer


class Flat(nn.Module):
    """Layers whose weights are parts of one parameter, or of a buffer."""

    def __init__(self, make):
        super().__init__()
        held = torch.randn(192)
        if make is nn.Buffer:
            self.flat = nn.Buffer(held)
        else:
            self.flat = nn.Parameter(held)
        self.layers = nn.ModuleList(_linear(held[i : i + 64].view(8, 8)) for i in (0, 64, 128))


@pytest.mark.parametrize("make", [nn.Parameter, nn.Buffer])
def test_views_of_one_parameter_or_buffer_are_tied_to_it(make):
    """None is cut off, and each says what it is tied to."""
    plan = plan_ranks(nn.Sequential(Flat(make), nn.Linear(8, 8)), rank=2)
    assert list(plan.ranks) == ["1.weight"]
    assert all("tied to 0.flat" in row.reason for row in plan.rows[:3])


def test_parts_of_a_buffer_that_share_nothing_are_not_tied():
    """Columns of one tensor are weights of their own."""
    buffer = torch.randn(8, 24)
    model = nn.Sequential(*(_linear(part) for part in buffer.split(8, 1)))
    assert list(plan_ranks(model, rank=2).ranks) == ["0.weight", "1.weight", "2.weight"]


def test_many_parts_of_one_parameter_take_no_longer_each():
    """A thousand slices of columns: no comparison of each with each."""
    columns = torch.zeros(8, 4000).split(4, 1)
    start = time.perf_counter()
    assert not pairs(*columns)
    assert time.perf_counter() - start < 5
