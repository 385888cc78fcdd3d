"""Optimizers that nobody here wrote as the base, and FrobeniusDecay inside their wrappers."""

import copy
import io
from collections import deque
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

import base_decay  # noqa: E402
import bases  # noqa: E402
from optim_cases import assert_identical, values  # noqa: E402

import frobdecay  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
    pytest.mark.filterwarnings("ignore:.*a step of decay is"),  # of any size
]


@pytest.fixture(autouse=True)
def _process_group(request):
    """A process group of one, for those that ask for one."""
    if any(name in request.node.name for name in bases.NETWORK):
        request.getfixturevalue("alone")


def sweep(cases: list, column: str) -> list:
    """Parameters for pytest, each a row of the matrix."""
    return [
        pytest.param(
            case,
            id=str(case),
            marks=pytest.mark.integration(
                row=f"pytorch_optimizer.{case.name}",
                column=column,
                refused=case.name in bases.REFUSED,
            ),
        )
        for case in cases
    ]


def plain(value: object) -> object:
    """Containers and objects as dictionaries and lists, down to tensors and numbers."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | deque):
        return [plain(entry) for entry in value]
    if hasattr(value, "__dict__") and not isinstance(value, Tensor | type):
        return plain(vars(value))
    return value


def test_the_registry_is_not_empty():
    """The sweeps run over pytorch_optimizer's own registry."""
    assert len(bases.NAMES) > 100
    assert {*bases.REFUSED, *bases.PREPARING} < set(bases.NAMES)


@pytest.mark.covers("P31")
@pytest.mark.parametrize(
    "case", sweep([bases.Case(name) for name in bases.NAMES], "λ = 0 is the base, bitwise")
)
def test_without_decay_the_trajectory_is_the_base_bitwise(case):
    """λ = 0 gives the same parameters and the same state, for the whole registry."""
    plainly, ours = case.net(frozen=False), case.net(frozen=False)
    base = case.build(ours, 0.0)
    if case.name in bases.REFUSED:
        with pytest.raises(ValueError, match=bases.REFUSED[case.name]):
            frobdecay.FrobeniusDecay(base, ours.product(), decay=0.0, mode="coupled")
        return
    wrapped = frobdecay.FrobeniusDecay(base, ours.product(), decay=0.0, mode="coupled")
    reference = case.build(plainly, 0.0)
    case.train(plainly, reference)
    case.train(ours, wrapped)
    assert_identical(values(ours), values(plainly))
    assert_identical(plain(list(wrapped.state.values())), plain(list(reference.state.values())))


@pytest.mark.covers("D30")
@pytest.mark.parametrize(
    "case", sweep([c for c in bases.cases() if c.name not in bases.REFUSED], "λ > 0 decays")
)
def test_decay_is_the_bases_own(case):
    """For W = U·I, what auto finds takes the base's steps; it asks where neither kind does."""
    found = base_decay.measure(case)
    assert found.effects.get("decoupled", 1.0) > 0.1
    assert found.effects["coupled"] > 0 or case.name == "LoRARite"  # which trains pairs only
    if found.auto is None:
        assert not found.kinds
    else:
        assert found.auto in found.kinds or found.idle


@pytest.mark.parametrize("name", sorted({*bases.COUPLED_ONLY} & {*bases.NAMES}))
def test_decoupled_decay_that_would_be_lost_is_refused(name):
    """Bases without lr in their groups, or that overwrite what was subtracted, say so."""
    case = bases.Case(name)
    net = case.net(frozen=False)
    base = case.build(net, 0.0)
    with pytest.raises(ValueError, match=bases.COUPLED_ONLY[name]):
        frobdecay.FrobeniusDecay(base, net.product(), decay=1.0, mode="decoupled")


# --- of other packages ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Other(bases.Case):
    """An optimizer that is not of pytorch_optimizer; ``auto`` is the kind of decay it has."""

    package: str = ""
    auto: str | None = None

    def __str__(self) -> str:
        return f"{self.package}.{self.name}"

    def build(self, net: base_decay.Net, decay: float):
        """Over the factors alone: Muon takes nothing but matrices."""
        factors = [p for p in (net.U, net.V) if p.requires_grad]
        cls = getattr(pytest.importorskip(self.package), self.name)
        return cls([{"params": factors, "weight_decay": decay}], lr=base_decay.RATE, **self.options)


FIXED = {"scale_parameter": False, "relative_step": False}
OTHERS = [
    Other("Muon", package="torch.optim", auto="decoupled"),
    Other("SGDScheduleFree", package="schedulefree", auto="coupled"),
    Other("AdamWScheduleFree", package="schedulefree"),
    Other("RAdamScheduleFree", package="schedulefree"),
    Other("Adafactor", FIXED, package="transformers.optimization", auto="decoupled"),
    *(
        Other(f"Adam{w}{bits}", package="torchao.optim", auto=auto)
        for w, auto in (("", "coupled"), ("W", "decoupled"))
        for bits in ("4bit", "8bit", "Fp8")
    ),
]


def others(column: str) -> list:
    """Parameters for pytest, each a row of the matrix."""
    return [
        pytest.param(c, id=str(c), marks=pytest.mark.integration(row=str(c), column=column))
        for c in OTHERS
    ]


@pytest.fixture
def _uncompiled():
    """Steps that compile themselves are run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("case", others("λ = 0 is the base, bitwise"))
def test_without_decay_others_are_the_base_bitwise(case):
    """λ = 0 gives the same parameters and the same state."""
    plainly, ours = case.net(frozen=False), case.net(frozen=False)
    base, reference = case.build(ours, 0.0), case.build(plainly, 0.0)
    wrapped = frobdecay.FrobeniusDecay(base, ours.product(), decay=0.0, mode="coupled")
    case.train(plainly, reference)
    case.train(ours, wrapped)
    assert_identical(values(ours), values(plainly))
    assert_identical(plain(list(wrapped.state.values())), plain(list(reference.state.values())))


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("case", others("λ > 0 decays"))
def test_decay_of_others_is_their_own(case):
    """For W = U·I, what auto finds takes the base's steps; it asks where neither kind does."""
    found = base_decay.measure(case)
    assert found.auto == case.auto
    assert found.kinds == ({case.auto} if case.auto else set())


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.integration(row="torchao.optim.AdamW8bit", column="resume")
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "AdamW4bit"])
def test_quantized_states_resume(name):
    """Moments of large factors are quantized; saved, loaded and continued to the bit."""
    optim = pytest.importorskip("torchao.optim")

    def make() -> tuple[nn.Module, frobdecay.FrobeniusDecay]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 4))
        frobdecay.factorize(model, rank=16, include="0")
        base = getattr(optim, name)(frobdecay.split_param_groups(model, 0.1), lr=1e-3)
        return model, frobdecay.FrobeniusDecay(base, model)

    def train(model, optimizer, steps: int) -> list[float]:
        x, y = torch.linspace(-1, 1, 8 * 256).view(8, 256).sin(), torch.eye(4).repeat(2, 1)
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    whole, resumed = make(), make()
    losses = train(*whole, 4)
    factor = frobdecay.products(whole[0])[0].params[0]
    assert type(whole[1].state[factor]["exp_avg"]) is not Tensor
    resumed[0].load_state_dict(whole[0].state_dict())
    torch.save(whole[1].state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed[1].load_state_dict(torch.load(file, weights_only=True))
    losses += train(*whole, 4)
    train(*resumed, 4)
    assert losses[-1] < losses[0]
    assert_identical(values(whole[0]), values(resumed[0]))


@pytest.mark.integration(
    row="torchao.optim.CPUOffloadOptimizer", column="λ > 0 decays", refused=True
)
def test_offloaded_steps_are_refused():
    """It steps on copies elsewhere, so decay would go nowhere."""
    offload = pytest.importorskip("torchao.optim").CPUOffloadOptimizer
    optimizer = object.__new__(offload)  # its constructor wants an accelerator
    optimizer.d_param_groups, optimizer.optim_dict = [], {}
    with pytest.raises(ValueError, match="steps on copies of parameters"):
        frobdecay.FrobeniusDecay(optimizer, frobdecay.Product.of(torch.eye(2), torch.eye(2)))


# --- inside the wrappers of others ---------------------------------------------------------------


def of_class(wrapper: str, *, model: bool = False):
    """SAM and its kind make the base themselves: they are given a function that wraps it."""

    def make(net, base_of):
        cls = getattr(pytorch_optimizer, wrapper)
        params = [{"params": [net.U], "weight_decay": DECAY}, {"params": [net.bias]}]
        args = (net, params, base_of) if model else (params, base_of)
        return cls(*args, lr=0.1, momentum=0.9)

    return make


def of_instance(package: str, wrapper: str, **options):
    """Lookahead and its kind take the base."""

    def make(net, base_of):
        groups = [{"params": [net.U], "weight_decay": DECAY}, {"params": [net.bias]}]
        base = base_of(groups, lr=0.1, momentum=0.9)
        return getattr(pytest.importorskip(package), wrapper)(base, **options)

    return make


DECAY = 0.5
WRAPPERS = {
    "FriendlySAM": of_class("FriendlySAM"),
    "LookSAM": of_class("LookSAM"),
    "SAM": of_class("SAM"),
    "WSAM": of_class("WSAM", model=True),
    "Lookahead": of_instance("pytorch_optimizer", "Lookahead", k=2),
    "OrthoGrad": of_instance("pytorch_optimizer", "OrthoGrad"),
    "ScheduleFreeWrapper": of_instance("pytorch_optimizer", "ScheduleFreeWrapper"),
    "TRAC": of_instance("pytorch_optimizer", "TRAC"),
    "schedulefree.ScheduleFreeWrapper": of_instance("schedulefree", "ScheduleFreeWrapper"),
}


def train_in(name: str, base_of, *, save: bool = False) -> base_decay.Net:
    """Some steps of SGD inside a wrapper, with the two evaluations that SAM wants."""
    net = base_decay.Net(torch.float64, frozen=True)
    optimizer = WRAPPERS[name](net, lambda groups, **more: base_of(net, groups, **more))
    if hasattr(optimizer, "train"):
        optimizer.train()

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = 0.01 * net.loss()
        loss.backward()
        return loss

    for _ in range(6):
        evaluate()
        if name.endswith("SAM"):
            optimizer.step(evaluate)
        else:
            optimizer.step()
    return net


def sgd(net, groups, **more):
    """The base with its own weight decay."""
    return torch.optim.SGD(groups, **more)


def wrapped_sgd(net, groups, **more):
    """The base in our wrapper."""
    return frobdecay.FrobeniusDecay(torch.optim.SGD(groups, **more), net.product())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.integration(row=f"inside {n}", column="λ > 0 decays"))
        for n in WRAPPERS
    ],
)
def test_inside_the_wrappers_of_others(name):
    """For W = U·I, the wrapper around ours takes the steps that it takes around the base."""
    ours, plainly = train_in(name, wrapped_sgd), train_in(name, sgd)
    without = train_in(name, lambda net, groups, **more: sgd(net, _bare(groups), **more))
    assert_identical(values(ours), values(plainly))
    assert not torch.equal(ours.U, without.U)


def _bare(groups: list) -> list:
    return [{**group, "weight_decay": 0.0} for group in groups]


@dataclass(frozen=True)
class Outer(base_decay.Subject):
    """An optimizer of pytorch_optimizer around one of torch's; ``auto`` is what is to be found."""

    inside: type[torch.optim.Optimizer] = torch.optim.Adam
    auto: str | None = None

    def build(self, net: base_decay.Net, decay: float):
        """Over the factors alone."""
        factors = [{"params": [net.U], "weight_decay": decay}]
        return getattr(pytorch_optimizer, self.name)(self.inside(factors, lr=base_decay.RATE))


OUTERS = [
    Outer("Lookahead", inside=torch.optim.Adam, auto="coupled"),
    Outer("Lookahead", inside=torch.optim.AdamW, auto="decoupled"),
    Outer("OrthoGrad", inside=torch.optim.AdamW, auto="decoupled"),
    Outer("OrthoGrad", inside=torch.optim.Adam),
    Outer("TRAC", inside=torch.optim.Adam, auto="coupled"),
    Outer("TRAC", inside=torch.optim.AdamW),
]


@pytest.mark.parametrize("case", OUTERS, ids=lambda case: f"{case.name} {case.inside.__name__}")
def test_what_stands_around_another_decays_as_that(case):
    """What auto finds takes its steps; it asks where the outer one changes that kind of decay."""
    found = base_decay.measure(case)
    assert found.auto == case.auto
    assert found.kinds == ({case.auto} if case.auto else set())


def _net() -> base_decay.Net:
    return base_decay.Net(torch.float64, frozen=False)


@pytest.mark.covers("P37")
def test_sams_two_steps_go_around_ours():
    """Inside SAM, first_step and second_step decay; in front of it, they are refused by name."""
    net = _net()
    groups = [{"params": list(net.parameters()), "weight_decay": DECAY}]
    inside = pytorch_optimizer.SAM(groups, lambda g, **o: wrapped_sgd(net, g, **o), lr=1e-3)
    net.loss().backward()
    inside.first_step(zero_grad=True)
    net.loss().backward()
    before = net.V.detach().clone()
    gradient, W = net.V.grad.clone(), net.V @ (net.U.T @ net.U)
    inside.second_step(zero_grad=True)
    with torch.no_grad():
        restored = _net()
        W = restored.V @ (restored.U.T @ restored.U)
        torch.testing.assert_close(net.V, restored.V - 1e-3 * (gradient + DECAY * W))
    assert not torch.equal(net.V, before)

    outside = frobdecay.FrobeniusDecay(
        pytorch_optimizer.SAM(net.parameters(), torch.optim.SGD, lr=0.1, weight_decay=DECAY),
        net.product(),
        mode="coupled",
    )
    with pytest.raises(AttributeError, match=r"SAM behind has it, as \.optimizer\.first_step"):
        outside.first_step()


@pytest.mark.covers("P38")
@pytest.mark.parametrize("inside", [True, False])
def test_lookahead_resumes(inside):
    """Its checkpoints, laid out in a way of their own, carry λ and go on to the bit."""

    def make():
        net = _net()
        base = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=DECAY)
        if inside:
            ours = frobdecay.FrobeniusDecay(base, net.product())
            return net, pytorch_optimizer.Lookahead(ours, k=2)
        lookahead = pytorch_optimizer.Lookahead(base, k=2)
        return net, frobdecay.FrobeniusDecay(lookahead, net.product(), mode="coupled")

    def train(net, optimizer, steps=3):
        for _ in range(steps):
            optimizer.zero_grad()
            net.loss().backward()
            optimizer.step()

    whole, resumed = make(), make()
    train(*whole)
    resumed[0].load_state_dict(whole[0].state_dict())
    resumed[1].load_state_dict(copy.deepcopy(whole[1].state_dict()))
    train(*whole)
    train(*resumed)
    assert_identical(values(whole[0]), values(resumed[0]))


def test_a_checkpoint_of_another_layout_is_refused():
    """Lookahead's own has no param groups where a plain one would be divided."""
    net = _net()
    lookahead = pytorch_optimizer.Lookahead(torch.optim.SGD(net.parameters(), lr=0.1))
    saved = lookahead.state_dict()
    wrapped = frobdecay.FrobeniusDecay(lookahead, net.product(), decay=0.1, mode="coupled")
    with pytest.raises(ValueError, match="of a Lookahead that was not wrapped"):
        wrapped.load_state_dict(saved)


def test_wrapping_around_a_wrapped_base_is_refused():
    """Lookahead hides a FrobeniusDecay: a second one would decay twice."""
    net = _net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=DECAY)
    lookahead = pytorch_optimizer.Lookahead(frobdecay.FrobeniusDecay(base, net.product()))
    with pytest.raises(ValueError, match="would decay twice"):
        frobdecay.FrobeniusDecay(lookahead, net.product(), mode="coupled")


@pytest.mark.integration(
    row="around schedulefree.ScheduleFreeWrapper", column="λ > 0 decays", refused=True
)
def test_what_is_no_optimizer_is_refused():
    """Schedule-free's wrapper is not one; ours goes inside."""
    schedulefree = pytest.importorskip("schedulefree")
    net = _net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=DECAY)
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got ScheduleFree"):
        frobdecay.FrobeniusDecay(schedulefree.ScheduleFreeWrapper(base), net.product())
