"""Every backend gives the reference's gradient, adds it where told, and says what it does."""

import copy
import gc
import itertools
import pickle
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import PRODUCTS, Sizes, bare, seeded
from closeness import TOLERANCE, close, exact, gradients
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import Net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frobdecay.algebra.lowering import matrix_gram
from frobdecay.algebra.network import Network
from frobdecay.algebra.shifted import Shifted
from frobdecay.gradient import likeness
from frobdecay.gradient.accumulate import Accumulator
from frobdecay.gradient.backends import BACKENDS
from frobdecay.gradient.bucketed import together
from frobdecay.gradient.penalty import add_penalty_grad_, explain
from frobdecay.models.factorize import factorize
from frobdecay.product import find
from frobdecay.product.departure import Departure
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product, penalty

# The backends that refuse none in the table; kernels that do have tests of their own.
GENERAL = [
    name
    for name, backend in BACKENDS.items()
    if not backend.why_not([PRODUCTS[kind](torch.float64) for kind in PRODUCTS])
]
RUN = [
    pytest.param(PRODUCTS[kind], name, id=f"{kind}-{name}")
    for kind in PRODUCTS
    for name in [*GENERAL, None]
]
NAMES = pytest.mark.parametrize("backend", [*GENERAL, None])
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def test_the_table_has_general_backends():
    """Reference and fast paths that run everything, whatever else there is."""
    assert {"reference", "per_product", "bucketed"} <= set(GENERAL)


def test_sums_of_products_run_where_einsums_do():
    """Kernels of pairs say why not."""
    tensors = [torch.ones(shape) for shape in ((4, 3), (4, 2), (3, 2))]
    product = Product.of(*tensors, structure=Shifted((0.5,)))
    able = {name for name, backend in BACKENDS.items() if not backend.why_not([product])}
    assert able == set(GENERAL)
    with pytest.raises(ValueError, match="shifted, not a chain"):
        Accumulator(product, "triton")


def with_gradients(make, dtype, count=3):
    """Some products of one kind, each factor with a gradient of ones."""
    products = [make(dtype) for _ in range(count)]
    for product in products:
        for param in product.params:
            param.grad = torch.ones_like(param)
    return products


@pytest.mark.covers("C11")
@pytest.mark.parametrize(("make", "backend"), RUN)
@DTYPES
def test_every_backend_adds_the_exact_gradient(make, backend, dtype):
    """coef·∇ arrives in every ``.grad``: every backend, kind of product and dtype."""
    products = with_gradients(make, dtype)
    add_penalty_grad_(products, 0.5, backend=backend)
    for product in products:
        _, expected = exact(product)
        for param, gradient in zip(product.params, expected, strict=True):
            assert close(param.grad - 1, 0.5 * gradient, 4 * TOLERANCE[dtype])


# Factors' shapes with free sizes m, n and r, and what else makes a product of them.
STRUCTURES = {
    "pair": ("mr nr", {}),
    "stored wide": ("mr rn", {"patterns": [None, "r n -> n r"]}),
    "deep": ("mr rr nr", {}),
    "batched": ("2mr 2nr", {}),
    "train": ("mr 3rr nr", {"batch": 0}),
    "tucker": ("rr mr nr", {"equation": "xy,ax,by->ab"}),
    "cp": ("mr nr mr", {"equation": "ar,br,cr->abc"}),
    "shifted": ("mn mr nr", {"structure": Shifted((0.5,))}),
    "two shifts": ("mn mr nr mr nr", {"structure": Shifted((0.5, 2.0))}),
    "departure": ("mr nr mr nr", {"structure": Departure(Network.of("mr,nr->mn"))}),
}


@st.composite
def mixtures(draw):
    """Some products that share sizes, and so buckets, but neither structure nor dtype.

    Now and then factors of one product differ in dtype, a factor is that of an earlier product,
    is frozen, has no gradient, or has one that is wider than itself.
    """
    sizes = {"m": 7, "n": 5, "2": 2, "3": 3}
    dtypes, one_in = st.sampled_from(list(TOLERANCE)), lambda k: draw(st.integers(1, k)) == 1
    generator = seeded(draw(st.integers(0, 1000)))
    known: list[nn.Parameter] = []
    products = []
    for _ in range(draw(st.integers(1, 5))):
        shapes, options = STRUCTURES[draw(st.sampled_from(list(STRUCTURES)))]
        sizes["r"], dtype, mixed = draw(st.sampled_from([1, 2, 4])), draw(dtypes), one_in(4)
        tensors = []
        for shape in shapes.split():
            numbers = torch.randn([sizes[axis] for axis in shape], generator=generator)
            param = nn.Parameter(numbers.to(draw(dtypes) if mixed else dtype))
            fitting = [other for other in known if other.shape == param.shape]
            param = draw(st.sampled_from(fitting)) if fitting and one_in(4) else param
            param.requires_grad_(param.requires_grad and not one_in(8))
            tensors.append(param)
        new = any(param not in set(known) for param in tensors)  # none is listed twice
        known += tensors
        if new:
            scale = draw(st.sampled_from([1.0, 0.5]))
            products.append(Product.of(*tensors, scale=scale, **options))
    for param in dict.fromkeys(known):
        param.grad_dtype = torch.float32 if param.itemsize < 4 and one_in(3) else param.dtype
        param.grad = None if one_in(8) else torch.zeros_like(param, dtype=param.grad_dtype)
    return products


@NAMES
@given(products=mixtures())
def test_any_mixture_is_exact_to_the_precision_of_each(backend, products):
    """Every factor of every product, to the digits of its own gradient, whatever is beside it."""
    add_penalty_grad_(products, 0.5, backend=backend)
    wanted, sizes = {}, Counter()
    for product in products:
        of_product = dict(zip(product.params, exact(product)[1], strict=True))
        for param, gradient in of_product.items():
            wanted[param] = wanted.get(param, 0) + 0.5 * gradient
            sizes[param] += float(gradient.norm())
    for param, gradient in wanted.items():
        if param.grad is None:
            continue
        assert param.grad.dtype == param.grad_dtype
        error = float((param.grad.double() - gradient * param.requires_grad).norm())
        assert error <= TOLERANCE[param.grad.dtype] * sizes[param] + 1e-30


@pytest.mark.covers("C11")
@pytest.mark.parametrize("backend", sorted(set(GENERAL) - {"reference"}))
@pytest.mark.parametrize("shape", [(96, 5), (96, 11), (512, 16), (64, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_less_accurate_than_the_reference(backend, shape, dtype):
    """Against float64, a fast path's error is at most 1.5 times the reference's.

    On a GPU, where the reference's sums are in cuBLAS's own order, or within rounding.
    """
    room = 16 * torch.finfo(torch.float32).eps if torch.cuda.is_available() else 1e-12
    errors = {}
    for name in (backend, "reference"):
        torch.manual_seed(0)
        products = [bare(shape, shape)(dtype) for _ in range(4)]
        targets = [[torch.zeros_like(p, dtype=torch.float32) for p in q.params] for q in products]
        Accumulator(products, name).accumulate(targets, [[1.0, 1.0]] * 4)
        pairs = [
            (found.double(), wanted)
            for product, target in zip(products, targets, strict=True)
            for found, wanted in zip(target, exact(product)[1], strict=True)
        ]
        errors[name] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert errors[backend] <= 1.5 * errors["reference"] + room


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["pair", "deep", "full rank", "train of cores"])
def test_each_factor_has_its_own_coefficient(backend, kind, dtype):
    """Coefficients differ by product and factor, keep their digits, and may be tensors."""
    for count in (0, 1, 3):  # of the products whose coefficients are tensors
        products = [PRODUCTS[kind](dtype) for _ in range(3)]
        coefs = [
            [0.1 + 0.2 * k + 0.01 * j for j in range(len(p.factors))]
            for k, p in enumerate(products)
        ]
        given = [
            [torch.tensor(c, dtype=torch.float64) for c in row] if k < count else row
            for k, row in enumerate(coefs)
        ]
        targets = [[torch.zeros_like(p) for p in product.params] for product in products]
        Accumulator(products, backend).accumulate(targets, given)
        for product, target, row in zip(products, targets, coefs, strict=True):
            for found, gradient, c in zip(target, gradients(product), row, strict=True):
                assert close(found, c * gradient, TOLERANCE[dtype])


@NAMES
def test_plans_lie_where_their_products_are(backend):
    """Torch's default device, "meta" for one where nothing of the CPU can go, is not asked."""
    products = with_gradients(PRODUCTS["pair"], torch.float64)
    with torch.device("meta"):
        add_penalty_grad_(products, 0.5, backend=backend)
    for product in products:
        for param, gradient in zip(product.params, gradients(product), strict=True):
            assert close(param.grad - 1, 0.5 * gradient, 1e-10)


class _NothingOfTheHost(TorchDispatchMode):
    """Refuses to read tensors of the CPU: a CUDA graph would read them at every replay."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        assert not any(tensor.is_cpu for tensor in read), func
        return func(*args, **(kwargs or {}))


def test_coefficients_of_a_stack_are_written_where_it_is():
    """No copy from the host; numbers that are equal stay one, whichever object each is."""
    like = torch.empty(3, 4, 4, device="meta")  # stands for a GPU
    tensor = torch.empty((), device="meta")
    with _NothingOfTheHost():
        assert together([1.0, 2.0, 3.0], like).shape == (3, 1, 1)
        assert together([1.0, tensor, tensor], like, 1).shape == (3,)
        assert together([0.1 + 0.2, 0.1 + 0.2], like) == 0.1 + 0.2
    like = torch.empty(2, 1, dtype=torch.float64)
    assert together([0.1, 0.2], like).tolist() == [[0.1], [0.2]]


@NAMES
@pytest.mark.parametrize("kind", ["pair", "deep", "batched", "full rank", "deep near full rank"])
def test_updates_are_simultaneous(backend, kind):
    """Added to the factors themselves, every gradient is that of the factors before."""
    products = [PRODUCTS[kind](torch.float64) for _ in range(3)]
    before = [[p.detach().clone() for p in product.params] for product in products]
    expected = [gradients(product) for product in products]
    targets = [list(product.params) for product in products]
    coefs = [[-0.1] * len(target) for target in targets]
    Accumulator(products, backend).accumulate(targets, coefs)
    for product, old, gradient in zip(products, before, expected, strict=True):
        for p, o, g in zip(product.params, old, gradient, strict=True):
            assert close(p.detach(), o - 0.1 * g, 1e-12)


@NAMES
@pytest.mark.parametrize("places", [(0, 0), (0, 6), (0, 12)], ids=["twice", "overlapping", "two"])
@pytest.mark.parametrize("swapped", [False, True])
def test_updates_of_factors_that_share_memory_are_simultaneous(backend, places, swapped):
    """Also where both are one parameter, or parts of it, and where a target is the other factor."""
    buffer = torch.randn(24, dtype=torch.float64)
    U, V = (buffer[place : place + 12].view(6, 2) for place in places)
    product, order = Product.of(U, V), (1, -1)[swapped]
    expected = buffer.clone()
    for place, gradient in zip(places[::order], gradients(product), strict=True):
        expected[place : place + 12] -= 0.1 * gradient.flatten()
    Accumulator([product], backend).accumulate([[U, V][::order]], [[-0.1, -0.1]])
    assert close(buffer, expected, 1e-12)


@NAMES
def test_a_shared_factor_gets_the_sum(backend):
    """A parameter in several products gets each one's gradient, in any order of products."""
    shared = nn.Parameter(torch.randn(6, 2, dtype=torch.float64))
    others = [nn.Parameter(torch.randn(5, 2, dtype=torch.float64)) for _ in range(3)]
    products = [Product.of(shared, other) for other in others]
    total = sum(gradients(product)[0] for product in products)
    for order in (products, products[::-1]):
        for p in (shared, *others):
            p.grad = torch.zeros_like(p)
        add_penalty_grad_(order, 1.0, backend=backend)
        assert close(shared.grad, total, 1e-12)


def at_once(targets, updates, alpha):
    """``_foreach_add_`` as one kernel runs it: each sum starts from what was there before."""
    sums = [target + alpha * update for target, update in zip(targets, updates, strict=True)]
    for target, found in zip(targets, sums, strict=True):
        target.copy_(found)


SHARED = {  # the places of a pair's factors in one buffer, which has places in a buffer of targets
    "a parameter twice": [(0, 0)],
    "a parameter in every product": [(0, 12), (0, 24), (36, 0)],
    "views that overlap": [(0, 6), (12, 9)],
    "nothing": [(0, 12), (24, 36)],
}


@pytest.mark.parametrize("places", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("structure", ["pair", "chain"])
def test_targets_that_share_memory_take_turns(monkeypatch, structure, places):
    """As kernels add, no update is lost: of one factor that is several, or of overlapping ones."""
    monkeypatch.setattr(torch, "_foreach_add_", at_once)
    buffer = torch.randn(48, dtype=torch.float64)
    middle = [torch.eye(2, dtype=torch.float64)] * (structure == "chain")
    found, wanted = torch.zeros_like(buffer), torch.zeros_like(buffer)
    products, targets = [], []
    for pair in places:
        U, V = (buffer[place : place + 12].view(6, 2) for place in pair)
        products.append(Product.of(U, *middle, V))
        into = [found[place : place + 12].view(6, 2) for place in pair]
        targets.append([into[0], *[None for _ in middle], into[1]])
        for place, gradient in zip(pair, (U @ V.T @ V, V @ U.T @ U), strict=True):
            wanted[place : place + 12] += gradient.flatten()
    coefs = [[1.0] * len(row) for row in targets]
    Accumulator(products, "bucketed").accumulate(targets, coefs)
    assert close(found, wanted, 1e-12)


def test_a_target_of_several_factors_is_added_to_once_a_turn(monkeypatch):
    """Whose memory is not that of one parameter."""
    monkeypatch.setattr(torch, "_foreach_add_", at_once)
    products = [bare((6, 2), (6, 2))(torch.float64) for _ in range(2)]
    sums = [torch.zeros(6, 2, dtype=torch.float64) for _ in range(2)]
    Accumulator(products, "bucketed").accumulate([sums, sums], [[1.0, 1.0]] * 2)
    for found, *wanted in zip(sums, *map(gradients, products), strict=True):
        assert close(found, sum(wanted), 1e-12)


@pytest.mark.covers("D12")
@NAMES
@pytest.mark.parametrize("kind", ["pair", "deep", "full rank"])
def test_none_and_frozen_are_left_alone(backend, kind):
    """No gradient, no decay; a frozen factor stays a constant in the product (D12)."""
    products = with_gradients(PRODUCTS[kind], torch.float64)
    products[0].params[0].grad = None
    products[1].params[1].requires_grad_(False)
    expected = [gradients(product) for product in products]
    add_penalty_grad_(products, 1.0, backend=backend)
    assert products[0].params[0].grad is None
    for product, wanted in zip(products, expected, strict=True):
        for param, gradient in zip(product.params, wanted, strict=True):
            if param.grad is not None:
                assert close(param.grad - 1, gradient * param.requires_grad, 1e-10)


class Pair(nn.Module):
    """Factors of which one is stored wide, so that plans hold a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.U, self.V = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def products(self, count: int = 1) -> list[Product]:
        """The same product, in records of their own."""
        factors = Factor(self, "U", "m r -> m r"), Factor(self, "V", "r n -> n r")
        return [Product(f"product {k}", factors, scale=k + 1.0) for k in range(count)]


def reuse_memory(pair: Pair) -> None:
    """Move to some memory as float32; the second time, be float64 in the same place."""
    memory = vars(pair).setdefault("memory", torch.zeros(2, 16, dtype=torch.float64))
    for param, part in zip((pair.U, pair.V), memory, strict=True):
        dtype = torch.float64 if param.data_ptr() == part.data_ptr() else torch.float32
        param.data = part.view(dtype)[:16].view(4, 4)
        param.data.copy_(torch.randn(4, 4))


class Behind(Pair):
    """A pair with one factor that no table has under its name."""

    @property
    def U(self) -> nn.Parameter:
        """The one that is held."""
        return self.held


def behind_a_property(pair: Pair) -> None:
    """Move there; the second time, be another parameter there."""
    held = nn.Parameter(pair.U.detach() * 2)
    pair._parameters.pop("U", None)
    pair.__class__, pair.held = Behind, held


CHANGES = {
    "nothing": lambda pair: None,
    "numbers": lambda pair: pair.U.data.mul_(2),
    "a new parameter": lambda pair: setattr(pair, "U", nn.Parameter(torch.randn(4, 4))),
    "a new table": lambda pair: setattr(
        pair,
        "_parameters",
        {name: nn.Parameter(p.detach() * 2) for name, p in pair._parameters.items()},
    ),
    "a new one in the same memory": lambda pair: setattr(pair, "U", nn.Parameter(pair.U.data)),
    "no parameter": lambda pair: (
        pair._parameters.pop("U", None),
        setattr(pair, "U", torch.randn(4, 4, requires_grad=True)),
    ),
    "a property": behind_a_property,
    "new memory": lambda pair: setattr(pair.U, "data", torch.randn(4, 4)),
    "new memory of the wide one": lambda pair: setattr(pair.V, "data", torch.randn(4, 4)),
    "other strides": lambda pair: setattr(pair.V, "data", pair.V.data.T),
    "another rank": lambda pair: (
        setattr(pair.U, "data", pair.U.data[:, :2]),
        setattr(pair.V, "data", pair.V.data[:2]),
    ),
    "another dtype": lambda pair: pair.double(),
    "another dtype in the same memory": reuse_memory,
    "half precision": lambda pair: pair.bfloat16(),
    "a state dict": lambda pair: pair.load_state_dict(Pair().state_dict()),
    "an assigned state dict": lambda pair: pair.load_state_dict(Pair().state_dict(), assign=True),
    "a frozen factor": lambda pair: pair.V.requires_grad_(False),
}


def check_gradients(pair: Pair, products: list[Product], backend: str | None) -> None:
    """Those that are added are those of the factors as they are now."""
    wanted = [sum(found) for found in zip(*map(gradients, products), strict=True)]
    for param in (pair.U, pair.V):
        param.grad = torch.zeros_like(param)
    add_penalty_grad_(products, 1.0, backend=backend)
    for param, gradient in zip((pair.U, pair.V), wanted, strict=True):
        tolerance = max(TOLERANCE[param.dtype], 1e-6)
        assert close(param.grad, gradient.double() * param.requires_grad, tolerance)


@pytest.mark.covers("D20")
@NAMES
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_parameters_are_followed(backend, change):
    """What a plan was made for may change in every way; a plain pair beside it, too (D20)."""
    pair, plain = Pair(), Pair()
    products = pair.products(2)
    others = [Product("plain", (Factor(plain, "U"), Factor(plain, "V")))]
    for _ in range(2):
        check_gradients(pair, products, backend)
        check_gradients(plain, others, backend)
        change(pair)
        if change is not CHANGES["another rank"]:
            change(plain)
    check_gradients(pair, products, backend)
    check_gradients(plain, others, backend)


UNLIKE = {
    "dtype": lambda a: a.double(),
    "strides": lambda a: a.T,
    "shape": lambda a: a[:2],
    "layout": lambda a: a.to_sparse(),
    "device": lambda a: a.to("meta"),
    "inference": torch.inference_mode()(torch.clone),
    "none": lambda a: None,
}


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("unlike", UNLIKE.values(), ids=UNLIKE)
def test_what_tensors_are_is_told_apart(monkeypatch, guarded, unlike):
    """All at once or one by one; also those that are there twice, and under autocast."""
    if not guarded:
        monkeypatch.setattr(likeness, "_Guards", None)
    a, b = torch.randn(3, 3), nn.Parameter(torch.randn(3, 3))
    for pair in ([a, b], [a, a]):
        known = likeness.Likeness(pair)
        assert bool(known._guards) == (guarded and pair[0] is not pair[1])
        assert not known.of([unlike(a), pair[1]])
        assert not known.of([pair[0], unlike(pair[1].detach())])
        assert not known.of(pair[:1])
        with torch.autocast("cpu"):
            assert known.of([t.clone() for t in pair])
        assert known.trained == [False, pair[1].requires_grad]
        assert known.of([torch.zeros(3, 3), torch.zeros(3, 3)])
        assert known.trained == [False, False]


def test_what_inference_mode_may_write_is_refused_outside():
    """A gradient that could be written to at the last call."""
    product = PRODUCTS["pair"](torch.float32)
    with torch.inference_mode():
        targets = [torch.zeros_like(param) for param in product.params]
        accumulator = Accumulator(product)
        for _ in range(2):
            accumulator.accumulate([targets], [[1.0] * 2])
    with pytest.raises(ValueError, match="one made under inference_mode"):
        accumulator.accumulate([targets], [[1.0] * 2])


@pytest.fixture
def planned(monkeypatch):
    """Counts how often something is planned."""
    made = []
    plan = Accumulator._plan
    monkeypatch.setattr(Accumulator, "_plan", lambda self: (made.append(1), plan(self))[1])
    return made


def test_plans_are_kept(planned):
    """With the records, whatever holds them; other products and backends have their own."""
    pair = Pair()
    products = pair.products(3)
    for listed in (products, tuple(products), (p for p in products), products):
        add_penalty_grad_(listed, 1.0)
    assert len(planned) == 1
    add_penalty_grad_(products[:2], 1.0)
    add_penalty_grad_(products, 1.0, backend="reference")
    assert len(planned) == 3
    for listed in (products, products[:2]):
        add_penalty_grad_(listed, 1.0)
    assert len(planned) == 3
    pair.U = nn.Parameter(torch.randn(4, 4))
    for _ in range(2):
        add_penalty_grad_(products, 1.0)
    assert len(planned) == 4
    lists = [[products[0], *pair.products(k)] for k in range(12)]
    for listed in lists:
        add_penalty_grad_(listed, 1.0)
    assert len(products[0].plans) == 8  # few, however many lists there are
    backends = [None, "bucketed", "per_product", "reference"]
    for _ in range(2):  # but as many as there are backends to compare, in turns
        for name in backends:
            add_penalty_grad_(lists[0], 1.0, backend=name)
            add_penalty_grad_(lists[1], 1.0, backend=name)
    assert len(planned) == 4 + len(lists) + 2 * len(backends)


def test_plans_keep_nothing_alive():
    """Neither the module, without the garbage collector's help, nor plans of dead products."""
    first, second = Pair(), Pair()
    products, others = first.products(2), second.products(2)
    add_penalty_grad_([*products, *others], 1.0)
    gone = weakref.ref(second)
    gc.disable()
    try:
        del second, others
        assert gone() is None
        (dead,) = products[0].plans
        assert dead.plan is None
        assert not dead.is_for(dead._ids, None)  # though new products may get the old ones' ids
        gone = weakref.ref(first)
        add_penalty_grad_(products, 1.0)
        check_gradients(first, products, None)
        del first, products
        assert gone() is None
    finally:
        gc.enable()


def test_plans_are_not_copied():
    """A copy of a model and its products has plans of its own."""
    pair = Pair()
    products = pair.products(2)
    check_gradients(pair, products, None)
    twin, copies = copy.deepcopy((pair, products))
    assert not copies[0].plans
    assert products[0].plans
    check_gradients(twin, copies, None)
    assert not pickle.loads(pickle.dumps(products))[0].plans


def test_plans_made_in_inference_mode_serve_outside():
    """Tensors that are made there could not be written to later."""
    products = [bare((48, 5), (48, 5))(torch.float32) for _ in range(2)]
    for param in (param for product in products for param in product.params):
        param.grad = torch.zeros_like(param)
    with torch.inference_mode():
        add_penalty_grad_(products, 1.0)
    add_penalty_grad_(products, 1.0)
    for product in products:
        for param, gradient in zip(product.params, gradients(product), strict=True):
            assert close(param.grad, 2 * gradient, 1e-5)


def test_threads_share_plans():
    """Calls at once, for the same products, add up."""
    products = [bare((96, 11), (96, 11))(torch.float64) for _ in range(6)]
    for param in (param for product in products for param in product.params):
        param.grad = torch.zeros_like(param)
    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(add_penalty_grad_, products, 1.0) for _ in range(40)]:
            one.result()
    for product in products:
        for param, gradient in zip(product.params, gradients(product), strict=True):
            assert close(param.grad, 40 * gradient, 1e-12)


def test_autocast_does_not_reach_the_grams():
    """Inside an autocast region the gradient is the same as outside."""
    products = with_gradients(PRODUCTS["pair"], torch.float32)
    add_penalty_grad_(products, 1.0)
    plain = products[0].params[0].grad.clone()
    products[0].params[0].grad.fill_(1)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        add_penalty_grad_(products, 1.0)
    assert torch.equal(products[0].params[0].grad, plain)


@pytest.mark.cpu("the choice between its backends")
@pytest.mark.covers("D21")
def test_small_products_share_calls_and_large_ones_do_not():
    """No loop over small products (D21); the choice follows size, and ``explain`` states it."""
    small = [bare((48, 5), (48, 5))(torch.float32) for _ in range(4)]
    large = [bare((2048, 16), (2048, 16))(torch.float32) for _ in range(2)]
    accumulator = Accumulator([*small, *large])
    assert [choice.backend for choice in accumulator.choices] == ["bucketed", "per_product"]
    text = explain([*small, *large])
    assert "4 of one shape" in text
    assert "a copy costs more than a call" in text


@pytest.mark.cpu("the choice between its backends")
def test_small_products_of_any_structure_share_calls():
    """Several of one shape do; one alone, or factors that products share, do not."""

    def kronecker(count):
        pairs = [[torch.randn(3, 2), torch.randn(2, 4)] for _ in range(count)]
        return [Product.of(a, b, equation="ab,cd->acbd") for a, b in pairs]

    def chosen(products):
        return [choice.backend for choice in Accumulator(products).choices]

    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    dense = copy.deepcopy(model)
    factorize(model, rank=2)
    for aim in ("initial", dense):
        assert chosen(find.products(model, toward=aim)) == ["bucketed"]
    assert chosen(kronecker(3)) == ["bucketed"]
    assert chosen(kronecker(1)) == ["per_product"]
    A = torch.randn(3, 2)
    assert chosen([Product.of(A, torch.randn(2, 4), equation="ab,cd->acbd") for _ in "ab"]) == [
        "per_product"
    ]


@pytest.mark.parametrize("backend", GENERAL)
def test_a_factor_may_be_one_number(backend):
    """Without an axis: W = s·U Vᵀ."""
    shapes = (), (6, 2), (5, 2)
    found = [[torch.randn(shape).double().requires_grad_() for shape in shapes] for _ in "ab"]
    products = [Product.of(*params, equation=",mr,nr->mn") for params in found]
    for param in itertools.chain(*found):
        param.grad = torch.zeros_like(param)
    add_penalty_grad_(products, 1.0, backend=backend)
    for product in products:
        for param, gradient in zip(product.params, gradients(product), strict=True):
            assert close(param.grad, gradient, 1e-10)


@pytest.mark.cpu("its vectors")
@pytest.mark.covers("C12", "P9")
@pytest.mark.parametrize(("rank", "columns"), [(5, 5), (8, 8), (9, 16), (15, 16), (17, 17)])
def test_ranks_that_nearly_fill_a_vector_are_padded_to_it(rank, columns):
    """On a CPU, 9 to 15 columns are multiplied as 16, the others as they are."""
    products = [bare((48, rank), (40, rank))(torch.float32) for _ in range(2)]
    targets = [[torch.zeros_like(p) for p in product.params] for product in products]
    with Sizes() as sizes:
        accumulator = Accumulator(products, "bucketed")
        accumulator.accumulate(targets, [[1.0, 1.0]] * 2)
    assert 4 * columns**2 in sizes.seen  # the Grams of all factors
    for product, target in zip(products, targets, strict=True):
        for found, wanted in zip(target, exact(product)[1], strict=True):
            assert close(found, wanted, 1e-5)


@pytest.mark.parametrize("backend", ["bucketed", "per_product"])
@pytest.mark.parametrize("kind", [*PRODUCTS, "padded"])
def test_grams_are_handed_on(kind, backend):
    """Of pairs, whole and without what pads them: the bound of a step reads them."""
    make = bare((48, 11), (40, 11)) if kind == "padded" else PRODUCTS[kind]
    products, formed = [make(torch.float32) for _ in range(2)], {}
    accumulator = Accumulator(products, backend)
    targets = [torch.zeros_like(param) for param in accumulator.refresh()]
    accumulator.run(targets, [1.0] * len(targets), formed)
    views = [view for product in products for view in product.views()]
    if kind in ("pair", "batched", "padded"):
        assert sorted(formed) == list(range(len(views)))
    for k, gram in formed.items():
        wanted = matrix_gram(views[k].detach().double(), products[0].batch)
        assert close(gram, wanted, TOLERANCE[torch.float32])


def test_add_equals_backward_of_the_penalty():
    """``add_penalty_grad_`` is ``penalty(...).backward()`` without the graph."""
    product = PRODUCTS["scaled"](torch.float64)
    penalty(product, 0.7).backward()
    expected = [p.grad.clone() for p in product.params]
    for p in product.params:
        p.grad.zero_()
    add_penalty_grad_(product, 0.7)
    for p, e in zip(product.params, expected, strict=True):
        assert close(p.grad, e, 1e-12)


def listed_again(model: nn.Module) -> list[Product]:
    """The products of a model under other names, in other spellings."""
    U, V = model.factors()[:2]
    return [
        *model.products()[::-1],
        Product.of(U, V, name="bare"),
        Product.of(U, V, name="spelled", patterns=["m r -> m r", None]),
        Product("module", (Factor(model, "U"), Factor(model, "V"))),
    ]


@NAMES
def test_a_product_listed_twice_counts_once(backend):
    """Whatever it is called and however its factors are found; shared factors are summed."""
    for others in (False, True):
        found = []
        for again in (False, True):
            net = Net()
            products = net.products()
            if others:  # of the same factors, but not the same products
                products += [Product.of(net.U, net.V, scale=2.0), Product.of(net.U, net.U)]
            if again:
                products += listed_again(net)
            for param in net.parameters():
                param.grad = torch.zeros_like(param)
            add_penalty_grad_(products, 0.5, backend=backend)
            found.append((penalty(products, 0.5).detach(), *(p.grad for p in net.factors())))
        for once, twice in zip(*found, strict=True):
            assert close(twice, once, 1e-12)


def test_an_unknown_backend_is_refused():
    """The message lists the known ones."""
    with pytest.raises(ValueError, match=r"\['bucketed', 'per_product', 'reference'"):
        Accumulator(PRODUCTS["pair"](torch.float32), "fused")


def test_what_cannot_run_says_why():
    """Meta factors hold no numbers: refused by name before anything is computed."""
    product = Product.of(*(torch.ones(3, 2, device="meta") for _ in range(2)), name="a.weight")
    with pytest.raises(ValueError, match=r"a\.weight.*meta device"):
        Accumulator(product)


UNWRITABLE = {  # gradients that nothing can be added to in place
    "expanded": lambda U: torch.autograd.grad(U.sum(), U)[0],
    "of inference": torch.inference_mode()(torch.zeros_like),
    "of another shape": torch.ones_like,
}


@pytest.mark.covers("D29")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("bad", ["sparse", "meta", "float8", *UNWRITABLE, "of no chain"])
def test_a_refused_call_changes_nothing(bad, order):
    """Of a list with one product that cannot decay, the others' gradients stay as they are."""
    good = with_gradients(PRODUCTS["pair"], torch.float32, 2)

    def products():
        U, V = (nn.Parameter(torch.randn(size, 3)) for size in (7, 5))
        if bad == "sparse":
            U.grad = torch.ones(7, 3).to_sparse()
        if bad in UNWRITABLE:
            U.grad = UNWRITABLE[bad](U)
        if bad == "meta":
            U, V = U.to("meta"), V.to("meta")
        if bad == "float8":
            U = U.detach().to(torch.float8_e4m3fn)
        found = [*good, Product.of(U, V, name="the bad one")][::order]
        if bad == "of another shape":
            U.data = U.data[:4]
        if bad == "of no chain":
            U.data = torch.randn(7, 1)
        return found

    with pytest.raises((TypeError, ValueError), match="the bad one"):
        add_penalty_grad_(products(), 0.5)
    assert all(bool((p.grad == 1).all()) for product in good for p in product.params)


def test_sparse_gradients_are_refused():
    """The penalty's gradient is dense; a sparse ``.grad`` cannot hold it (D29)."""
    product = PRODUCTS["pair"](torch.float32)
    product.params[0].grad = torch.ones(7, 3).to_sparse()
    with pytest.raises(TypeError, match="expected a dense gradient for tensor"):
        add_penalty_grad_(product, 0.1)


@pytest.mark.cpu("its threads")
@pytest.mark.parametrize("stored", ["tall", "wide"])
@pytest.mark.parametrize(("threads", "split"), [(1, False), (2, True), (3, False)])
def test_tall_grams_are_split_between_threads_and_exact(threads, split, stored):
    """Where the rows divide into two stacks a thread; the gradient is that of float64."""
    rows, r = 3200, 16
    torch.set_num_threads(threads)  # the fixture of all tests takes it back
    U = nn.Parameter(torch.randn(rows, r))
    V = nn.Parameter(torch.randn(rows, r) if stored == "tall" else torch.randn(r, rows))
    patterns = [None, None if stored == "tall" else "r n -> n r"]
    product = Product.of(U, V, patterns=patterns)
    for param in (U, V):
        param.grad = torch.zeros_like(param)
    with Sizes() as sizes:
        add_penalty_grad_(product, 0.5, backend="per_product")
    assert (2 * threads * r * r in sizes.seen) == split
    left, right = (view.detach().double() for view in product.views())
    expected = 0.5 * left @ (right.T @ right), 0.5 * right @ (left.T @ left)
    for factor, gradient in zip(product.factors, expected, strict=True):
        assert close(factor.view(factor.param.grad), gradient, TOLERANCE[torch.float32])
