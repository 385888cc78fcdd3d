"""The grouped kernels: in Triton's interpreter without a GPU, compiled with one.

The interpreter takes milliseconds for each tile, so shapes are tiny here, and tiles small.
"""

import importlib
import itertools
import json
import operator
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import PRODUCTS, bare
from closeness import TOLERANCE, close, exact, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.kernels import LOCAL
from benchmarks.kernels import variants as variants_of_kernels
from benchmarks.measure import no_waiting, precision
from frobdecay.algebra.lowering import matrix_gram
from frobdecay.gradient import accumulate
from frobdecay.gradient.accumulate import Accumulator
from frobdecay.gradient.bucketed import Job
from frobdecay.gradient.overlaps import overlapping
from frobdecay.gradient.penalty import add_penalty_grad_, explain
from frobdecay.gradient.triton import executor
from frobdecay.gradient.triton.executor import Grouped
from frobdecay.gradient.triton.refusals import refusals
from frobdecay.gradient.triton.tables import Slot, gram_table, pieces, sheets
from frobdecay.gradient.triton.tiles import Tile, tile_for
from frobdecay.product.product import Product

kernels = pytest.importorskip("frobdecay.gradient.triton.launches", exc_type=ImportError)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
SMALL = Tile(16, 16, 1, 2, 16, 16, 16, 4, 2, (1, 4), 4)  # many tiles from few numbers
PAIRS = [
    name
    for name, product in ((name, make(torch.float32)) for name, make in PRODUCTS.items())
    if len(product.factors) == 2 and product.structure.is_chain
]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
ON_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]

# With a GPU all tests of this file run compiled, and belong to those that need it.
pytestmark = [
    *([pytest.mark.cuda] if CUDA else []),
    pytest.mark.skipif(not CUDA and not kernels.INTERPRETED, reason="neither GPU nor interpreter"),
]


def on_cuda(test):
    """Mark a test of what the interpreter does not have."""
    for mark in ON_CUDA:
        test = mark(test)
    return test


def make(kind, dtype=torch.float32, count=1):
    """Products of one kind on the device; a kind is a name in PRODUCTS, or two shapes."""
    maker = PRODUCTS[kind] if isinstance(kind, str) else bare(*kind)
    with DEVICE:
        return [maker(dtype) for _ in range(count)]


def plan(products, **options):
    """A plan for products, as the accumulator makes it."""
    jobs = [
        Job(p.views(), p.batch, p.structure, slice(2 * k, 2 * k + 2))
        for k, p in enumerate(products)
    ]
    return Grouped(jobs, **options)


def zeros(products, dtype=None):
    """A target for each factor."""
    return [[torch.zeros_like(p, dtype=dtype).detach() for p in q.params] for q in products]


def run(grouped, products, targets, coef=1.0):
    """Run a plan, for plain factors without a scale."""
    with torch.no_grad():
        grouped([t for two in targets for t in two], [coef] * 2 * len(products))


def expect(products, targets, tolerance, coef=1.0):
    """Each target is coef·∇."""
    for product, target in zip(products, targets, strict=True):
        for found, wanted in zip(target, exact(product)[1], strict=True):
            assert close(found.detach(), coef * wanted, tolerance)


@pytest.mark.covers("C11")
@pytest.mark.parametrize("kind", PAIRS)
@DTYPES
def test_the_exact_gradient_is_added(kind, dtype):
    """coef·∇ arrives in every ``.grad``: every kind of pair, heads and shared factors included."""
    products = make(kind, dtype, 2)
    for product in products:
        for param in product.params:
            param.grad = torch.ones_like(param)
    add_penalty_grad_(products, 0.5, backend="triton")
    for product in products:
        for param, wanted in zip(product.params, exact(product)[1], strict=True):
            assert close(param.grad - 1, 0.5 * wanted, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("kind", sorted(set(PAIRS) - {"packed heads", "symmetric"}))
def test_updates_are_simultaneous(kind):
    """Added to the factors themselves, every gradient is that of the factors before."""
    products = make(kind, count=2)
    wanted = [
        [p.detach() - 0.1 * g for p, g in zip(q.params, gradients(q), strict=True)]
        for q in products
    ]
    targets = [list(product.params) for product in products]
    Accumulator(products, "triton").accumulate(targets, [[-0.1] * 2] * 2)
    for product, expected in zip(products, wanted, strict=True):
        for param, value in zip(product.params, expected, strict=True):
            assert close(param.detach(), value, 1e-6)


@pytest.mark.parametrize("rank", [17, 40])
def test_updates_are_simultaneous_in_several_tiles(rank):
    """All columns of a row are read before one is written, also of ranks above one tile."""
    products = make(((33, rank), (20, rank)))
    wanted = [
        p.detach() + g for p, g in zip(products[0].params, gradients(products[0]), strict=True)
    ]
    run(plan(products, tile=SMALL), products, [product.params for product in products])
    for param, value in zip(products[0].params, wanted, strict=True):
        assert close(param.detach(), value, 1e-6)


@st.composite
def factors(draw, heads, rows, rank, dtype):
    """A factor with any strides: contiguous, transposed, part of a larger tensor."""
    shape = (*heads, rows, rank)
    layout = draw(st.sampled_from(["contiguous", "transposed", "part", "odd address", "row axes"]))
    if layout == "transposed":
        tensor = torch.randn(*heads, rank, rows).mT
    elif layout == "part":
        tensor = torch.randn(*heads, rows + 1, rank + 3)[..., 1:, 2 : 2 + rank]
    elif layout == "odd address":
        tensor = torch.randn(rank * rows * max(1, heads[0] if heads else 1) + 1)[1:].view(shape)
    elif layout == "row axes":
        tensor = torch.randn(*heads, 2, rows + 1, rank)[..., :rows, :]
    else:
        tensor = torch.randn(shape)
    base = tensor._base if tensor._base is not None else tensor
    moved = torch.empty_like(base, dtype=dtype, device=DEVICE).copy_(base)
    return moved.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@st.composite
def models(draw):
    """Pairs of different shapes, ranks, heads and dtypes for one plan."""
    products = []
    for _ in range(draw(st.integers(1, 3))):
        rank = draw(st.one_of(st.integers(1, 24), st.sampled_from([31, 33, 48, 70])))
        heads = tuple(draw(st.lists(st.integers(1, 2), max_size=1)))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        rows = st.sampled_from([1, 2, 15, 16, 17, 40])
        U, V = (draw(factors(heads, draw(rows), rank, dtype)) for _ in range(2))
        products.append(Product.of(U, V, batch=len(heads)))
    return products


@settings(max_examples=settings().max_examples // 4)
@given(models(), st.integers(1, 9), st.booleans(), st.sampled_from([SMALL, None]))
def test_any_shapes_and_strides_share_two_launches(products, programs, in_place, tile):
    """Gradients of any mixture of pairs are exact; split anyhow, into any target."""
    grouped = plan(products, tile=tile, programs=programs)
    before = [exact(product) for product in products]
    targets = zeros(products, torch.float32)
    if in_place:
        targets = [
            [p if p.dtype == torch.float32 else t for p, t in zip(q.params, new, strict=True)]
            for q, new in zip(products, targets, strict=True)
        ]
    start = [[t.double() for t in two] for two in targets]
    run(grouped, products, targets, 0.01)
    for (_, found), two, old in zip(before, targets, start, strict=True):
        for target, wanted, was in zip(two, found, old, strict=True):
            assert close(target, was + 0.01 * wanted, 1e-5)


@pytest.mark.covers("C11")
@pytest.mark.parametrize("shape", [(96, 5), (150, 16), (64, 48)], ids=str)
@DTYPES
def test_no_less_accurate_than_the_reference(shape, dtype):
    """Against float64, the kernels' error is at most 1.5 times the reference's.

    On a GPU, where the reference's sums are in cuBLAS's own order, or within rounding.
    """
    room = 16 * torch.finfo(torch.float32).eps if torch.cuda.is_available() else 1e-12
    errors = {}
    for name in ("triton", "reference"):
        torch.manual_seed(0)
        products = make((shape, shape), dtype)
        targets = zeros(products, torch.float32)
        Accumulator(products, name).accumulate(targets, [[1.0, 1.0]])
        wanted = [gradient.cpu() for gradient in exact(products[0])[1]]
        pairs = zip(targets[0], wanted, strict=True)
        errors[name] = max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs)
    assert errors["triton"] <= 1.5 * errors["reference"] + room


def test_coefficients_change_without_a_new_plan(monkeypatch):
    """Numbers and tensors, one for each factor: later values are used, no table is made anew."""
    products = make("pair", count=2)
    accumulator = Accumulator(products, "triton")
    rate = torch.tensor(0.3, device=DEVICE)
    accumulator.accumulate(zeros(products), [[0.1, 0.2], [rate, rate.double()]])
    monkeypatch.setattr(executor, "update_table", None)
    monkeypatch.setattr(executor, "gram_table", None)
    rate.fill_(0.5)
    targets = zeros(products)
    accumulator.accumulate(targets, [[0.7, torch.tensor(0.4)], [rate, 0]])
    coefs = [0.7, 0.4, 0.5, 0.0]
    found = [target for two in targets for target in two]
    wanted = [gradient for product in products for gradient in gradients(product)]
    for target, gradient, coef in zip(found, wanted, coefs, strict=True):
        assert close(target, coef * gradient, 1e-6)


def test_none_is_left_alone():
    """A factor without target is a constant: its partner gets its gradient all the same."""
    products = make("pair", count=2)
    targets = zeros(products)
    targets[0][0] = None
    accumulator = Accumulator(products, "triton")
    accumulator.accumulate(targets, [[1.0] * 2] * 2)
    assert close(targets[0][1], gradients(products[0])[1], 1e-6)
    expect(products[1:], targets[1:], 1e-6)
    accumulator.accumulate([[None, None]] * 2, [[1.0] * 2] * 2)
    expect(products[1:], targets[1:], 1e-6)


def fresh(product, layout):
    """New targets, with another memory layout than the factors."""
    new = []
    for param in product.params:
        zero = torch.zeros_like(param)
        if layout == "transposed":
            zero = torch.zeros_like(param.mT.contiguous()).mT
        elif layout == "bucket":
            zero = torch.zeros(param.numel() + 1, device=DEVICE)[1:].view(param.shape)
        new.append(zero.detach())
    return new


@pytest.mark.parametrize("layouts", list(itertools.permutations(["same", "transposed", "bucket"])))
def test_targets_may_be_new_tensors_at_every_call(layouts):
    """New gradients are found, with whatever strides and alignment they have."""
    products = make(((24, 8), (16, 8)), count=2)
    accumulator = Accumulator(products, "triton")
    kept = []
    for layout in (*layouts, "same"):
        targets = [fresh(product, layout) for product in products]
        kept.append(targets)  # so that the next ones get memory of their own
        accumulator.accumulate(targets, [[1.0] * 2] * 2)
        expect(products, targets, 1e-6)


def test_a_target_moved_to_other_memory_is_followed():
    """The same tensor object, whose data were replaced between calls."""
    products = make("pair")
    grouped, targets, coefs = plan(products), zeros(products), [1.0] * 2
    with torch.no_grad():
        grouped(targets[0], coefs)
        old = targets[0][0].data
        targets[0][0].data = torch.zeros_like(old)
        grouped(targets[0], coefs)
    wanted = exact(products[0])[1]
    assert close(targets[0][0], wanted[0], 1e-6)
    assert close(old, wanted[0], 1e-6)
    assert close(targets[0][1], 2 * wanted[1], 1e-6)


def test_a_target_that_is_turned_in_place_is_followed():
    """The same tensor object in the same memory, with other strides."""
    products = make(((4, 4), (4, 4)))
    accumulator, targets = Accumulator(products, "triton"), zeros(products)
    for _ in range(2):
        accumulator.accumulate(targets, [[1.0] * 2])
    for target in targets[0]:
        target.data = target.data.zero_().T
    accumulator.accumulate(targets, [[1.0] * 2])
    expect(products, targets, 1e-6)


def test_new_addresses_need_no_new_tables(monkeypatch):
    """Nor do the same coefficients in another list: one row of addresses is uploaded."""
    products = make("pair", count=3)
    accumulator = Accumulator(products, "triton")
    accumulator.accumulate(zeros(products), [[1.0] * 2] * 3)
    monkeypatch.setattr(executor, "update_table", None)
    monkeypatch.setattr(Grouped, "_rows_of_coefs", lambda self, _: self._coef_rows[1])
    kept = []
    for _ in range(3):
        kept.append(zeros(products))
        accumulator.accumulate(kept[-1], [[1.0] * 2] * 3)
        expect(products, kept[-1], 1e-6)


def test_after_an_error_nothing_is_taken_as_sent():
    """Targets that were looked at in a call that failed are not those on the device."""
    products = make("pair")
    grouped, first, second, coefs = plan(products), zeros(products), zeros(products), [1.0] * 2
    with torch.no_grad():
        grouped(first[0], coefs, "form")
        with pytest.raises(ValueError, match="could not convert"):
            grouped(second[0], [1.0, "one"], "form")
        grouped(second[0], coefs, "form")
    expect(products, first, 1e-6)
    expect(products, second, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_and_float32_targets_mix(dtype):
    """Gradients in half precision, and float32 and float64 increments, in one call."""
    products = make("pair", dtype, 3)
    given = [dtype, torch.float32, torch.float64]
    targets = [zeros([p], to)[0] for p, to in zip(products, given, strict=True)]
    run(plan(products), products, targets)
    expect(products[:1], targets[:1], TOLERANCE[dtype])
    expect(products[1:], targets[1:], 1e-6)


def test_factors_of_different_dtypes_make_a_pair():
    """A bf16 U with a float32 V: each Gram from its own kernel."""
    U, V = torch.randn(9, 3, device=DEVICE).bfloat16(), torch.randn(7, 3, device=DEVICE)
    products = [Product.of(U, V)]
    targets = zeros(products, torch.float32)
    run(plan(products), products, targets)
    expect(products, targets, 1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_shared_factor_gets_the_sum(order):
    """A parameter in several products gets each one's gradient, in any order of products."""
    shared = nn.Parameter(torch.randn(6, 2, device=DEVICE))
    products = [Product.of(shared, torch.randn(n, 2, device=DEVICE)) for n in (5, 5, 7)]
    total = sum(gradients(product)[0] for product in products)
    shared.grad = torch.zeros_like(shared)
    add_penalty_grad_(products[::order], 1.0, backend="triton")
    assert close(shared.grad, total, 1e-6)


def test_a_target_that_occurs_twice_gets_the_sum():
    """Also where the factors are different parameters."""
    products = make(((6, 2), (6, 2)), count=2)
    target = torch.zeros(6, 2, device=DEVICE)
    run(plan(products), products, [[target, target], [target, None]])
    wanted = sum([*gradients(products[0]), gradients(products[1])[0]])
    assert close(target, wanted, 1e-6)


@pytest.mark.covers("D21")
def test_two_launches_for_all_shapes(monkeypatch):
    """However many shapes, ranks and heads: one launch of Grams, one of updates."""
    products = [
        p for kind in ("pair", "batched", "rank one", "wide", "one row") for p in make(kind)
    ]
    launched, launch = [], kernels.Launch.__call__

    def count(self):
        launched.append(self._kernel)
        launch(self)

    monkeypatch.setattr(kernels.Launch, "__call__", count)
    targets = zeros(products)
    run(plan(products), products, targets)
    assert launched == [kernels.gram_kernel, kernels.update_kernel]
    expect(products, targets, 1e-6)


def test_runs_are_bitwise_equal():
    """Sums have one order, however many programs share a Gram; and tickets start anew."""
    products = make(((70, 5), (33, 5)), count=2)
    grouped = plan(products, tile=SMALL, programs=8)
    results = []
    for _ in range(3):
        targets = zeros(products)
        run(grouped, products, targets)
        results.append(targets)
    assert not grouped._counters.any()
    assert len(grouped._counters) > 1
    for again in results[1:]:
        for two, first in zip(again, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(two, first, strict=True))


@pytest.mark.parametrize("kind", PAIRS)
def test_grams_are_handed_on(kind):
    """Whole and without what pads them, each head's own: the bound of a step reads them."""
    products, formed = make(kind, count=2), {}
    targets = [t for two in zeros(products) for t in two]
    views = [view for product in products for view in product.views()]
    Accumulator(products, "triton").run(targets, [1.0] * len(targets), formed)
    assert sorted(formed) == list(range(len(views)))
    for k, view in enumerate(views):
        wanted = matrix_gram(view.detach().double(), products[0].batch)
        assert close(formed[k], wanted, TOLERANCE[torch.float32])


@pytest.mark.covers("D22")
def test_autograd_learns_of_the_change():
    """The version of a target moves, so that a backward through its old value is refused."""
    products = make("pair")
    targets = zeros(products)
    version = targets[0][0]._version
    run(plan(products), products, targets)
    assert targets[0][0]._version > version


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5),
    st.integers(0, 2),
    st.randoms(use_true_random=False),
)
def test_pieces_cover_a_view(shape, batch, random):
    """Every row of every head is in one piece, under its own head, whatever the strides."""
    batch = min(batch, len(shape) - 2)
    axes = list(range(len(shape)))
    random.shuffle(axes)
    memory = torch.arange(torch.Size(shape).numel()).view([shape[k] for k in axes])
    view = memory.permute([axes.index(k) for k in range(len(shape))])
    heads = view.reshape(-1, *shape[batch:])
    found = [[] for _ in heads]
    for head, (place,), rows, (stride,) in pieces(shape, batch, [view.stride()]):
        found[head] += [place + k * stride for k in range(rows)]
    for rows, head in zip(found, heads, strict=True):
        assert sorted(rows) == sorted(head[..., 0].flatten().tolist())


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 40))
def test_every_row_is_in_one_range(rows, rank, programs):
    """The Gram table's ranges of rows follow each other, for each tile on or below the diagonal."""
    leading = -(-rank // 16) * 16
    slots = [Slot(0, torch.empty(rows, rank), 0, 0, leading)]
    table = gram_table(slots, 16, 16, programs, 0, 0).rows
    assert max(row[10] for row in table) <= 64
    by_tile = {}
    for row in table:
        by_tile.setdefault((row[5], row[6]), []).append((row[9], row[0], row[1]))
    assert len(by_tile) == leading // 16 * (leading // 16 + 1) // 2
    for ranges in by_tile.values():
        numbers, addresses, counts = zip(*sorted(ranges), strict=True)
        assert list(numbers) == list(range(len(ranges)))
        assert sum(counts) == rows
        assert all(
            following - address == 4 * rank * count
            for address, following, count in zip(addresses, addresses[1:], counts, strict=False)
        )


def far(strides):
    """Two rows and two columns, far apart, in memory that nobody has to have."""
    return torch.empty_strided((2, 2), strides, device="meta")


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**32 + 8), (2**22, 1)], ids=str)
def test_strides_that_32_bits_cannot_hold_are_refused(strides):
    """Places in a tile would wrap around, and some other memory be written: an error first."""
    assert "strides" in refusals(Product.of(far(strides), far((2, 1))))[-1]
    products = make(((2, 2), (2, 2)))
    grouped, targets = plan(products), zeros(products)
    targets[0][1] = far(strides)
    with pytest.raises(ValueError, match=r"strides below 4194304, got .* factor 1 of pair 0"):
        run(grouped, products, targets)
    assert not targets[0][0].any()
    targets[0][1] = torch.zeros(2, 2, device=DEVICE)
    run(grouped, products, targets)
    expect(products, targets, 1e-6)


@pytest.mark.parametrize(
    ("start", "shape", "strides", "layout"),
    [
        (0, (8, 4), (4, 1), 1),
        (0, (8, 4), (1, 8), 2),
        (4, (8, 4), (8, 1), 1),
        (1, (8, 4), (4, 1), 0),
        (0, (8, 3), (4, 1), 0),
        (0, (8, 4), (5, 1), 0),
        (0, (7, 4), (1, 8), 0),
        (0, (8, 4), (8, 2), 0),
    ],
)
def test_wide_loads_only_where_all_is_aligned(start, shape, strides, layout):
    """Addresses, strides and sizes at 16 bytes, or the layout is 0: else a GPU would fault."""
    slots = [Slot(0, torch.zeros(100).as_strided(shape, strides, start), 0, 0, 16)]
    assert [row[-1] for row in gram_table(slots, 16, 16, 1, 0, 0).rows] == [layout]


def test_overlapping_memory_is_found():
    """Slots that share memory are written one after the other, the others together."""
    memory = torch.zeros(40)
    views = [memory[:12].view(6, 2), memory[10:20].view(5, 2), memory[20:].view(10, 2)]
    groups = overlapping(views)
    assert groups[0] == groups[1] != groups[2]
    found = sheets([100, 200, 300], [torch.float32] * 3, groups)
    assert [[bool(a) for a in addresses] for _, addresses in found] == [
        [True, False, True],
        [False, True, False],
    ]


@pytest.mark.parametrize(
    ("kind", "dtype", "reason"),
    [
        ("deep", torch.float32, "a chain of 3 factors"),
        (((4, 300), (4, 300)), torch.float32, r"rank 300 is not in 1 … 256"),
        ("pair", torch.float64, "kernels are for float32, bfloat16 and float16"),
    ],
    ids=["deep", "rank", "dtype"],
)
def test_what_the_kernels_cannot_take_says_why(kind, dtype, reason):
    """Named explicitly, the backend refuses with the reason."""
    products = make(kind, dtype)
    with pytest.raises(ValueError, match=reason):
        Accumulator(products, "triton")


def test_row_axes_in_many_pieces_are_refused():
    """Slices that no stride joins are small matrices of their own."""
    U, V = torch.ones(70, 101, 2, device=DEVICE)[:, :100], torch.ones(5, 2, device=DEVICE)
    assert "70 pieces" in refusals(Product.of(U, V, batch=0))[0]


@pytest.mark.cpu("it chooses the interpreter never")
def test_the_interpreter_is_never_chosen():
    """On a CPU the kernels run only where they are named."""
    products = [bare((6, 2), (5, 2))(torch.float32)]
    assert explain(products).startswith("bucketed")


@on_cuda
def test_pairs_on_a_gpu_run_in_the_kernels():
    """Chosen by itself on CUDA for what it can take; longer chains run bucketed, and say so."""
    accumulator = Accumulator([*make("pair"), *make("batched"), *make("deep")])
    assert [choice.backend for choice in accumulator.choices] == ["triton", "triton", "bucketed"]
    assert "a chain of 3 factors" in accumulator.explain()


@on_cuda
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("shape", [(300, 40), (300, 200)], ids=str)
def test_float32_follows_torchs_setting(tf32, shape):
    """IEEE where TF32 is not allowed: errors of float32; TF32 where it is: its errors."""
    products = make((shape, shape))
    targets = zeros(products)
    with precision("high" if tf32 else "highest"):
        run(plan(products), products, targets)
    expect(products, targets, 2e-3 if tf32 else 1e-6)
    assert close(targets[0][0], exact(products[0])[1][0], 1e-6) is not tf32


@pytest.mark.parametrize("tile", [SMALL, None], ids=["small tiles", "tiles in use"])
@pytest.mark.parametrize("rank", [5, 17, 40, 70])
def test_by_tf32_a_gram_is_read_turned(rank, tile):
    """Of one tile or of several, whole or in steps: the same gradient, but for TF32's digits."""
    products = make(((33, rank), (20, rank)), count=2)
    targets = zeros(products)
    with precision("high"):
        grouped = plan(products, tile=tile)
        assert kernels.update_options(torch.float32, torch.float32, 2, rank, False, grouped.tile)[
            "TURNED"
        ]
        run(grouped, products, targets)
    # The interpreter multiplies TF32 as float32, and cuts off the terms of large Grams.
    expect(products, targets, 2e-3 if CUDA else 1e-4)


@pytest.mark.parametrize(
    "rank", [72, *(pytest.param(r, marks=pytest.mark.slow) for r in (136, 200))]
)
@pytest.mark.parametrize(
    ("dtype", "into", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.bfloat16, torch.float32, 3e-6),
    ],
    ids=["tf32", "bf16", "bf16 into float32"],
)
def test_columns_of_a_gram_are_held(rank, dtype, into, tolerance):
    """By tensor cores, ranks of several blocks: programs for columns, beside ranks of fewer."""
    products = [*make(((150, rank), (40, rank)), dtype), *make(((70, 40), (80, 40)), dtype)]
    targets = zeros(products, into)
    with precision("high"):
        grouped = plan(products)
        options = kernels.update_options(dtype, into, 2, rank, False, grouped.tile)
        assert CUDA or (options["HELD"], options["ACROSS"]) == (-(-rank // 64), -(-rank // 64))
        run(grouped, products, targets)
    expect(products, targets, 2e-3 if CUDA and dtype == torch.float32 else tolerance)


def test_only_hopper_holds_columns():
    """Elsewhere a Gram is read for each block of rows: tensor cores take it from registers."""
    assert None not in (tile_for(192).bf16, tile_for(192).tf32)
    for capability in (80, 89, 100, 120):
        assert tile_for(192, capability) == replace(tile_for(192), bf16=None, tf32=None)


def variants():
    """How many kernels were compiled for the current device."""
    known = kernels.gram_kernel, kernels.update_kernel
    return [len(kernel.device_caches[DEVICE.index][0]) for kernel in known]


@on_cuda
def test_a_step_never_waits_for_the_gpu():
    """New gradients, numbers and tensors as coefficients: no call synchronizes or compiles."""
    products = make("pair", count=3)
    accumulator = Accumulator(products, "triton")
    rate = torch.tensor(0.5, device=DEVICE)
    accumulator.accumulate(zeros(products), [[0.1, rate]] * 3)
    before = variants()
    kept = [zeros(products) for _ in range(3)]
    with no_waiting(DEVICE):
        for step, targets in enumerate(kept):
            accumulator.accumulate(targets, [[0.1 * step, rate]] * 3)
            accumulator.accumulate([[None, t[1]] for t in targets], [[0.0, 0.5]] * 3)
    assert variants() == before
    for product, target in zip(products, kept[2], strict=True):
        assert close(target[0], 0.2 * gradients(product)[0], 1e-6)
        assert close(target[1], gradients(product)[1], 1e-6)


@on_cuda
def test_a_captured_step_replays():
    """In a CUDA graph with gradients of its own; eager calls between the replays do no harm.

    Not even where their gradients lie otherwise, or the parameters, for as long as that.
    """
    products = make(((40, 12), (33, 12)), count=3)
    params = [param for product in products for param in product.params]
    accumulator = Accumulator(products, "triton")
    rate = torch.tensor(1.0, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        accumulator.accumulate(zeros(products), [[rate, 0.5]] * 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = zeros(products)
        accumulator.accumulate(captured, [[rate, 0.5]] * 3)
    for value in (1.0, 3.0):
        rate.fill_(value)
        with torch.no_grad():
            torch._foreach_mul_(params, 1.25)
        own = [param.data for param in params]
        for place in ("own", "other"):
            for param, data in zip(params, own, strict=True):
                param.data = data if place == "own" else data.clone()
            for layout in ("transposed", "bucket", "same"):
                eager = [fresh(product, layout) for product in products]
                accumulator.accumulate(eager, [[0.25, 0.25]] * 3)
                expect(products, eager, 1e-6, 0.25)
        for param, data in zip(params, own, strict=True):
            param.data = data
        graph.replay()
        for product, target in zip(products, captured, strict=True):
            assert close(target[0], value * gradients(product)[0], 1e-6)
            assert close(target[1], 0.5 * gradients(product)[1], 1e-6)


def test_what_a_graph_reads_is_kept(monkeypatch):
    """What launches and uploads of captured calls had outlives those of other calls, and plans."""
    products, coefs = make(((8, 8), (8, 8)), count=2), [[1.0] * 2] * 2
    read, captured, launch, upload = (
        [],
        zeros(products),
        kernels.Launch.__call__,
        Grouped._buffers_of_graph,
    )

    def note(tensors):
        read.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        return tensors

    accumulator = Accumulator(products, "triton")
    for _ in range(2):  # turned, the second time, in the same memory
        for target in itertools.chain(*captured):
            target.data = target.data.zero_().T
        accumulator.accumulate(captured, coefs)
        with monkeypatch.context() as patch:
            patch.setattr(
                kernels.Launch, "__call__", lambda self: [note(self._tensors), launch(self)]
            )
            patch.setattr(Grouped, "_buffers_of_graph", lambda *about: note(upload(*about)))
            for module in (executor, accumulate):
                patch.setattr(module, "is_capturing", lambda _: True)
            accumulator.accumulate(captured, coefs)
        for layout in ("transposed", "bucket", "same"):
            eager = [fresh(product, layout) for product in products]
            accumulator.accumulate(eager, coefs)
            expect(products, eager, 1e-6)
    for param in itertools.chain(*(product.params for product in products)):
        param.data = param.data.clone()
    accumulator.accumulate(eager, coefs)
    expect(products, eager, 1e-6, 2.0)
    expect(products, captured, 1e-6, 2.0)
    assert len(read) == 2 * (4 + 4 + 2)
    assert not [k for k, storage in enumerate(read) if storage.expired()]


@pytest.mark.parametrize("unlike", ["transposed", "bucket"])
def test_a_capture_that_nothing_has_warmed_up_is_refused(monkeypatch, unlike):
    """Where targets lie otherwise than before, too; afterwards all is as it was."""
    products = make(((24, 8), (16, 8)))
    accumulator, coefs = Accumulator(products, "triton"), [[1.0] * 2]
    first, second = (fresh(products[0], layout) for layout in ("same", unlike))
    for targets in (None, first):
        if targets is not None:
            accumulator.accumulate([targets], coefs)
        with monkeypatch.context() as patch:
            patch.setattr(executor, "is_capturing", lambda _: True)
            with pytest.raises(RuntimeError, match="warm up with the step that is captured"):
                accumulator.accumulate([second], coefs)
    accumulator.accumulate([first], coefs)
    accumulator.accumulate([second], coefs)
    expect(products, [first], 1e-6, 2.0)
    expect(products, [second], 1e-6)


@on_cuda
def test_any_stream_will_do():
    """Work is ordered by the current stream, also where the plan was made on another."""
    products = make("pair", count=2)
    grouped = plan(products)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        targets = zeros(products)
        torch.cuda._sleep(10_000_000)
        with torch.no_grad():
            for product in products:
                for param in product.params:
                    param.add_(1)  # after the sleep: only this stream knows
        run(grouped, products, targets)
    torch.cuda.current_stream().wait_stream(stream)
    expect(products, targets, 1e-6)


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_products_of_several_devices():
    """Each device's products run there, whichever is current."""
    products = [PRODUCTS["pair"](torch.float32) for _ in range(2)]
    for k, product in enumerate(products):
        for factor in product.factors:
            factor.owner.tensor = nn.Parameter(factor.owner.tensor.detach().to(f"cuda:{k}"))
    targets = zeros(products)
    Accumulator(products, "triton").accumulate(targets, [[1.0] * 2] * 2)
    expect(products, targets, 1e-6)


def test_a_compiled_step_decays():
    """Within a function under ``torch.compile``, beside compiled arithmetic."""
    products = make("pair", count=2)
    accumulator = Accumulator(products, "triton")

    @torch.compile(backend="inductor" if CUDA else "eager")
    def step(targets):
        accumulator.accumulate(targets, [[1.0] * 2] * 2)
        return sum(target.sum() for two in targets for target in two)

    targets = zeros(products)
    total = step(targets)
    expect(products, targets, 1e-6)
    assert close(total, sum(t.sum() for two in targets for t in two), 1e-5)


@on_cuda
@DTYPES
@pytest.mark.parametrize("rank", [1, 7, 16, 24, 64, 100, 192, 256])
@pytest.mark.parametrize("in_place", [False, True], ids=["coupled", "decoupled"])
def test_sizes_that_fill_the_device(rank, dtype, in_place):
    """Thousands of rows, Grams split over many programs, tiles and layouts of all kinds."""
    scale = 5000**-0.5
    U, W = (torch.randn(rows, rank, device=DEVICE) * scale for rows in (5000, 4096))
    V = torch.randn(rank, 3072, device=DEVICE).mT * scale
    products = [
        Product.of(U.to(dtype), V.to(dtype)),
        Product.of(W.to(dtype), V.to(dtype) * 2),
    ]
    if in_place and dtype == torch.float32:
        targets = [list(product.params) for product in products]
    else:
        targets = zeros(products, torch.float32)
    wanted = [
        [t.double() + g for t, g in zip(two, exact(product)[1], strict=True)]
        for two, product in zip(targets, products, strict=True)
    ]
    run(plan(products), products, targets)
    for two, expected in zip(targets, wanted, strict=True):
        for target, value in zip(two, expected, strict=True):
            assert close(target, value, 3e-6)


# Those that take most registers, and some whose numbers are all adjacent. A variant takes seconds:
# python -m benchmarks.kernels compiles all: 700 for sm_80, and for sm_90 712, some of them to hold
# columns of Grams.
SPREAD = "|".join(
    [
        "gram r≤(16|256) (fp32|bf16) .* layouts 111",
        "update r≤(32|128|256) (fp32 →fp32|bf16 →bf16) .* layouts 111",
        "gram r≤(16|64) (fp32|bf16) ieee layouts 110",
        "update r≤(16|64) (fp32 →fp32|bf16 →bf16) ieee layouts 110",
        "update r≤256 (fp32 →fp32 tf32|bf16 →(bf16|fp32) ieee) layouts 010",
    ]
)


@pytest.mark.slow
def test_kernels_compile_ahead_of_time(tmp_path):
    """For sm_80 and sm_90: nothing spills, all fits shared memory, accesses take 16 bytes each."""
    where = tmp_path / "kernels.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--only", SPREAD, "--json", str(where)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(where.read_text())
    assert len(record["variants"]) == 2 * 32
    assert not [variant for variant in record["variants"] if variant["local"] > LOCAL]
    assert all(target["met"] for target in record["targets"]), record["verdict"]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_launch_is_among_the_variants(monkeypatch, capability):
    """What is compiled ahead of time is what launches ask for: of any dtypes, targets, layouts."""
    asked = set()
    monkeypatch.setattr(
        kernels.Launch, "__call__", lambda self: asked.add(frozenset(self._options.items()))
    )
    settings = itertools.product(("highest", "high"), DTYPES.args[1], (3, 20, 40, 72, 192))
    for setting, dtype, rank in settings:
        products, tile = make(((8, rank), (5, rank)), dtype), tile_for(rank, capability)
        with precision(setting):
            run(plan(products, tile=tile), products, zeros(products, torch.float32))
            run(plan(products, tile=tile), products, [list(product.params) for product in products])
    assert any(dict(options).get("ACROSS", 1) > 1 for options in asked) == (capability == 90)
    assert asked <= {frozenset(variant.options) for variant in variants_of_kernels(capability)}


class Driver:
    """Stands in for Triton's driver, and for what it compiles: notes down what is launched."""

    def __init__(self):
        self.launched, self.stream = [], 0

    def get_current_device(self):
        """Nobody else's place in Triton's caches."""
        return -1

    def get_current_stream(self, device):
        """The stream of a launch."""
        return self.stream

    def get_current_target(self):
        """What is compiled for."""
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def compile(self, *_, **__):
        """Take it for compiled."""
        found = object.__new__(kernels.CompiledKernel)
        found.src, found.name, found.module = None, "kernel", "module"
        found.function, found.packed_metadata = "function", "metadata"
        found._run = lambda *arguments: self.launched.append(arguments)
        return found


def test_later_launches_are_like_the_first(monkeypatch):
    """They go around Triton's look at the arguments, with the same ones; past no hook, though."""
    triton, driver, looked = importlib.import_module("triton"), Driver(), []
    products = make("pair", count=2)
    grouped, targets = plan(products), zeros(products)
    for name in ("gram", "update"):
        kernel = triton.JITFunction(getattr(kernels, f"{name}_kernel").fn)

        def look(*args, _run=kernel.run, **options):
            looked.append(options["grid"])
            return _run(*args, **options)

        monkeypatch.setattr(kernel, "run", look)
        monkeypatch.setattr(kernels, f"{name}_kernel", kernel)
        monkeypatch.setattr(kernels, f"{name}_launch", partial(kernels.Launch, kernel))
        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.driver, "_active", driver)
            assert kernel.device_caches[-1]  # ready to compile, which the driver does
        kernel.compile = driver.compile
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    for stream in range(3):
        driver.stream = stream
        run(grouped, products, targets)
    assert len(looked) == 2
    assert len(driver.launched) == 6
    for first, later in zip(driver.launched[:2] * 2, driver.launched[2:], strict=True):
        first, later = list(first), list(later)
        assert first.pop(3) == 0 != later.pop(3)  # the stream is that of the moment
        seen = [part.pop(5).data for part in (first, later)]  # what hooks are told
        assert {**seen[0], "stream": None} == {**seen[1], "stream": None}
        assert len(first) == len(later)
        assert all(map(operator.is_, first, later)), (first, later)
        assert later[5] is triton.knobs.runtime.launch_enter_hook
    kernels.gram_kernel.add_pre_run_hook(lambda *_, **__: None)
    run(grouped, products, targets)
    assert len(looked) == 3
