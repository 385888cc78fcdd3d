"""Param groups: what FrobeniusDecay takes over, what it refuses, and what can be scheduled."""

import copy

import pytest
import torch
from closeness import gradients
from optim_cases import Net, assert_identical, train, values
from torch import nn, optim
from torch.optim import lr_scheduler

from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge, unroll
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product

LAMBDA = 0.05


def sgd(net, **options):
    """SGD with weight decay over all parameters."""
    return optim.SGD(net.parameters(), **{"lr": 0.1, "weight_decay": LAMBDA, **options})


def options(optimizer, *names):
    """Some options of every group, with the number of its parameters."""
    return [(len(g["params"]), *(g[name] for name in names)) for g in optimizer.param_groups]


# --- taking over --------------------------------------------------------------------------------


@pytest.mark.covers("C15", "D5", "P46")
def test_weight_decay_of_factors_becomes_frobenius_decay():
    """The factors get a group of their own behind the others', with the same coefficient (D5)."""
    net = Net()
    wrapped = FrobeniusDecay(sgd(net, momentum=0.9), net.products())
    assert options(wrapped, "weight_decay", "frobenius_decay", "momentum", "lr") == [
        (3, LAMBDA, 0.0, 0.9, 0.1),
        (4, 0.0, LAMBDA, 0.9, 0.1),
    ]
    assert wrapped.param_groups[1]["params"] == net.factors()


def test_a_base_without_weight_decay_takes_the_coefficient_of_the_factors_group():
    """One that only other parameters' group says is none to take over."""
    net = Net()
    held, others = {"params": net.factors()}, {"params": [net.before, net.between, net.behind]}
    own = {"frobenius_decay": LAMBDA}
    wrapped = FrobeniusDecay(optim.Rprop([others, held | own]), net.products())
    assert options(wrapped, "frobenius_decay") == [(3, 0.0), (4, LAMBDA)]
    with pytest.raises(ValueError, match="expected decay=λ for Rprop, got None"):
        FrobeniusDecay(optim.Rprop([others | own, held]), net.products())


def test_every_group_keeps_its_own_coefficient():
    """Groups are divided one by one, in order; those without weight decay stay whole (D6, D8)."""
    net = Net()
    base = optim.SGD(
        [
            {"params": [net.before, net.U, net.V], "weight_decay": 0.1},
            {"params": [net.between, net.behind]},
            {"params": [net.Q, net.P], "weight_decay": 0.3},
        ],
        lr=0.1,
    )
    wrapped = FrobeniusDecay(base, net.products())
    assert options(wrapped, "weight_decay", "frobenius_decay") == [
        (1, 0.1, 0.0),
        (2, 0.0, 0.1),
        (2, 0, 0.0),
        (2, 0.0, 0.3),
    ]


@pytest.mark.parametrize("decay", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_a_number_overrides_weight_decay(decay):
    """decay= replaces the factors' weight decay and leaves that of the others."""
    net, twin = Net(), Net()
    wrapped = FrobeniusDecay(sgd(net), net.products(), decay=decay)
    assert [g["weight_decay"] for g in wrapped.param_groups] == [LAMBDA, 0.0]
    train(net, wrapped, 1)
    base = optim.SGD(
        [{"params": twin.others(), "weight_decay": LAMBDA}, {"params": twin.factors()}], 0.1
    )
    train(twin, base, 1, coef=0.3)
    torch.testing.assert_close(net.U, twin.U)
    torch.testing.assert_close(net.before, twin.before)


@pytest.mark.covers("D6", "D8")
def test_groups_without_weight_decay_stay_whole():
    """Nothing is divided without need: LBFGS allows one group only."""
    net = Net()
    base = optim.SGD(net.parameters(), lr=0.1)
    (group,) = base.param_groups
    wrapped = FrobeniusDecay(base, net.products(), decay=LAMBDA)
    assert wrapped.param_groups == [group]
    assert wrapped.param_groups[0] is group
    assert group["frobenius_decay"] == LAMBDA


def test_names_of_parameters_stay_with_them():
    """named_parameters() puts names into groups; they are divided like the parameters."""
    net = Net()
    base = optim.SGD(net.named_parameters(), lr=0.1, weight_decay=LAMBDA)
    wrapped = FrobeniusDecay(base, net.products())
    names = {id(param): name for name, param in net.named_parameters()}
    for group in wrapped.param_groups:
        assert group["param_names"] == [names[id(param)] for param in group["params"]]


def test_divided_groups_share_no_tensor():
    """A tensor lr that is written in place in one group must not change the other."""
    net = Net()
    wrapped = FrobeniusDecay(sgd(net, lr=torch.tensor(0.1)), net.products())
    wrapped.param_groups[0]["lr"].fill_(0.7)
    assert wrapped.param_groups[1]["lr"].item() == pytest.approx(0.1)


@pytest.mark.parametrize("write", ["one", "both", "scheduler"])
def test_a_tensor_that_reaches_one_half_only_warns(write):
    """A caller who keeps the lr and fills it does not reach the factors, and is told so, once."""
    net, lr = Net(), torch.tensor(0.1)
    wrapped = FrobeniusDecay(sgd(net, lr=lr), net.products())
    scheduler = lr_scheduler.StepLR(wrapped, 1)
    train(net, wrapped, 1)
    if write == "scheduler":
        scheduler.step()
    for group in wrapped.param_groups if write == "both" else []:
        group["lr"].fill_(0.05)
    if write == "one":
        lr.fill_(0.05)
        with pytest.warns(UserWarning, match="'lr' of a param group was written to in place"):
            train(net, wrapped, 1)
    train(net, wrapped, 1)


def test_the_optimizer_behind_is_no_other_optimizer():
    """For who compares: a list of optimizers that were seen holds it."""
    net = Net()
    wrapped, other = (FrobeniusDecay(sgd(net), net.products(), decay=0.1) for _ in range(2))
    assert wrapped.optimizer in [wrapped]
    assert len({wrapped, wrapped.optimizer}) == 1
    assert wrapped != other
    assert wrapped != other.optimizer
    assert wrapped not in [None, "SGD"]


def test_wrapping_again_keeps_the_coefficient():
    """An optimizer that was wrapped before keeps the λ in its groups."""
    net = Net()
    base = FrobeniusDecay(sgd(net), net.products()).optimizer
    again = FrobeniusDecay(base, net.products())
    assert options(again, "weight_decay", "frobenius_decay") == [(3, LAMBDA, 0.0), (4, 0.0, LAMBDA)]


@pytest.mark.parametrize("before", [slice(0, 1), slice(1, 2)])
def test_wrapping_again_takes_the_weight_decay_of_further_products(before):
    """What held none of the first wrapper's factors has its weight decay still, and no λ."""
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.02)
    FrobeniusDecay(base, net.products()[before])
    optimizer = FrobeniusDecay(base, net.products())
    factors = {id(param) for param in net.factors()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            decays = (0.0, 0.02) if id(param) in factors else (0.02, 0.0)
            assert (group["weight_decay"], group["frobenius_decay"]) == decays


def test_wrapping_again_for_fewer_products_is_said():
    """The others would not decay; in groups that were divided, of one each, and shared."""
    for each, options in (
        (False, {"weight_decay": LAMBDA}),
        (True, {"weight_decay": LAMBDA}),
        (False, {}),
    ):
        net = Net()
        params = [{"params": [p]} for p in net.parameters()] if each else net.parameters()
        base, decay = torch.optim.SGD(params, lr=0.1, **options), None if options else LAMBDA
        wrapped = copy.deepcopy(FrobeniusDecay(base, net.products(), decay=decay))
        for one, products in ((base, net.products()), (wrapped.optimizer, wrapped.products)):
            with pytest.warns(UserWarning, match="factors of other products.*products together"):
                FrobeniusDecay(one, products[:1], decay=decay)
            FrobeniusDecay(one, products, decay=decay)


def test_wrapping_again_takes_the_new_bound():
    """An argument goes before the number that an earlier one has become; None stays none."""
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=LAMBDA)
    FrobeniusDecay(base, net.products(), bound=1.0)
    optimizer = FrobeniusDecay(base, net.products(), bound=0.5)
    assert [group.get("step_bound") for group in optimizer.param_groups] == [None, 0.5]
    base.param_groups[1]["step_bound"] = None
    FrobeniusDecay(base, net.products(), bound=2.0)
    assert [group.get("step_bound") for group in base.param_groups] == [None, None]


def test_wrapping_again_keeps_a_coefficient_that_was_given_meanwhile():
    """To the group that the first wrapper left its weight decay, for products to come."""
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.02)
    FrobeniusDecay(base, net.products()[:1])
    base.param_groups[0]["frobenius_decay"] = 0.5
    further = {id(param) for product in net.products()[1:] for param in product.params}
    for group in FrobeniusDecay(base, net.products()).param_groups:
        if further & {id(param) for param in group["params"]}:
            assert group["frobenius_decay"] == 0.5


def test_a_product_listed_twice_decays_once():
    """The products of a model and of a part of it overlap."""
    net, twin = Net(), Net()
    wrapped = FrobeniusDecay(sgd(net), [*net.products(), *net.products()[::-1]])
    assert [product.name for product in wrapped.products] == ["first", "second"]
    assert_identical(
        values(train(net, wrapped)), values(train(twin, FrobeniusDecay(sgd(twin), twin.products())))
    )


def test_a_model_is_enough():
    """The model's products are found, and all its factors taken over."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    factorize(model, rank=2)
    wrapped = FrobeniusDecay(sgd(model), model)
    assert [product.name for product in wrapped.products] == ["0.weight", "2.weight"]
    assert options(wrapped, "frobenius_decay") == [(2, 0.0), (4, LAMBDA)]


# --- λ can be scheduled -------------------------------------------------------------------------


@pytest.mark.covers("C12", "P3")
def test_every_group_decays_by_its_own_coefficient():
    """Two products, two λ."""
    net = Net()
    groups = [
        {"params": [net.U, net.V], "weight_decay": 0.1},
        {"params": [net.P, net.Q], "weight_decay": 0.3},
    ]
    wrapped = FrobeniusDecay(optim.AdamW(groups, lr=0.1), net.products())
    found = [gradients(product) for product in net.products()]
    expected = [net.U - 0.01 * found[0][0], net.P - 0.03 * found[1][0]]
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    wrapped.step()
    torch.testing.assert_close(net.U, expected[0])
    torch.testing.assert_close(net.P, expected[1])


@pytest.mark.covers("P3")
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_the_coefficient_can_be_changed_between_steps(kind):
    """What is in the group at the time of the step counts."""
    net, twin = Net(), Net()
    wrapped = FrobeniusDecay(sgd(net, weight_decay=0.0), net.products(), decay=1.0)
    base = sgd(twin, weight_decay=0.0)
    for coef in (0.1, 0.0, 0.4):
        for group in wrapped.param_groups:
            group["frobenius_decay"] = kind(coef)
        train(net, wrapped, 1)
        train(twin, base, 1, coef=coef)
    torch.testing.assert_close(net.U, twin.U)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, 0.05),
}


def test_all_of_torchs_schedulers_are_in_the_table():
    """A scheduler that torch adds has to be added to the table."""
    ours = {name for name in SCHEDULERS if name != "SWALR"}
    assert ours == {name for name in lr_scheduler.__all__ if name != "LRScheduler"}


@pytest.mark.covers("P29")
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_see_an_optimizer(schedule, lr):
    """Every scheduler runs on the wrapper, and sets both groups as it sets the base's one."""
    net, twin = Net(), Net()
    wrapped = FrobeniusDecay(sgd(net, momentum=0.9, lr=copy.deepcopy(lr)), net.products())
    base = sgd(twin, momentum=0.9, lr=copy.deepcopy(lr))
    ours, theirs = schedule(wrapped), schedule(base)
    for _ in range(6):
        for net_, optimizer, scheduler in ((net, wrapped, ours), (twin, base, theirs)):
            train(net_, optimizer, 1)
            scheduler.step(
                *([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
            )
        rates = [float(group["lr"]) for group in wrapped.param_groups]
        assert rates == [float(base.param_groups[0]["lr"])] * 2
        assert wrapped.param_groups[1]["momentum"] == base.param_groups[0]["momentum"]


@pytest.mark.covers("P3")
def test_decoupled_decay_follows_the_learning_rate():
    """A scheduled lr scales the decay, as it does AdamW's own."""
    net = Net()
    wrapped = FrobeniusDecay(
        optim.AdamW(net.parameters(), lr=0.1, weight_decay=1.0), net.products()
    )
    scheduler = lr_scheduler.LambdaLR(wrapped, lambda epoch: 0.5**epoch)
    for rate in (0.1, 0.05):
        expected = net.U - rate * gradients(net.products()[0])[0]
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
        wrapped.step()
        scheduler.step()
        torch.testing.assert_close(net.U, expected)


# --- adding groups ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "coef"),
    [({}, LAMBDA), ({"weight_decay": 0.3}, 0.3), ({"frobenius_decay": 0.7}, 0.7)],
    ids=["default", "weight_decay", "frobenius_decay"],
)
def test_an_added_group_is_divided_likewise(group, coef):
    """λ of added factors is the group's own, or the weight decay that it would have had."""
    net = Net()
    for factor in (net.P, net.Q):
        factor.requires_grad_(False)
    wrapped = FrobeniusDecay(optim.SGD([net.U, net.V], lr=0.1, weight_decay=LAMBDA), net.products())
    train(net, wrapped, 1)
    for factor in (net.P, net.Q):
        factor.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"factor 0 \(P\) of 'second' in a param group"):
        wrapped.step()
    wrapped.add_param_group({"params": iter([net.behind, net.P, net.Q]), **group})
    assert options(wrapped, "frobenius_decay") == [(2, LAMBDA), (1, 0.0), (2, coef)]
    assert wrapped.param_groups[2]["weight_decay"] == 0.0
    train(net, wrapped)


def test_an_added_group_takes_the_given_decay():
    """decay= of the constructor holds for later groups, too."""
    net = Net()
    base = optim.SGD([net.U, net.V], lr=0.1, weight_decay=LAMBDA)
    wrapped = FrobeniusDecay(base, net.products()[:1], decay=0.2)
    wrapped.add_param_group({"params": net.before})
    assert options(wrapped, "frobenius_decay", "weight_decay") == [(2, 0.2, 0.0), (1, 0.0, LAMBDA)]


def test_an_added_groups_own_coefficient_goes_first():
    """Before the decay that the constructor was given."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    factorize(model, rank=2, include="0")
    wrapped = FrobeniusDecay(optim.SGD(model.parameters(), 0.1), model, decay=0.2)
    factorize(model, rank=2, include="1")
    late = list(model[1].parametrizations.parameters())
    wrapped.add_param_group({"params": late, "frobenius_decay": 0.4})
    assert [group["frobenius_decay"] for group in wrapped.param_groups] == [0.2, 0.4]


@pytest.mark.covers("P20")
def test_factors_of_a_later_factorization_can_be_added():
    """Factorize more of the model, add the new factors, go on."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    factorize(model, rank=2, include="0")
    wrapped = FrobeniusDecay(sgd(model), model)
    factorize(model, rank=2, include="2")
    wrapped.add_param_group({"params": list(model[2].parametrizations.weight.parameters())})
    assert options(wrapped, "frobenius_decay")[-1] == (2, LAMBDA)
    model(torch.randn(3, 8)).sum().backward()
    wrapped.step()
    assert len(wrapped.products) == 2


# --- refusals: the error, and nothing changed ---------------------------------------------------


def shared_twice(net):
    """An optimizer with one factor in two groups, which torch itself prevents."""
    base = optim.SGD([{"params": [net.U, net.V]}, {"params": [net.P, net.Q]}], lr=0.1)
    base.param_groups[1]["params"].append(net.U)
    return base


def scheduled(net):
    """An optimizer with a scheduler attached."""
    base = sgd(net)
    lr_scheduler.StepLR(base, 1)
    return base


class Custom(optim.SGD):
    """An SGD with a step of its own."""

    def step(self, closure=None):  # noqa: D102
        return super().step(closure)


class NoRate(optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, params):
        super().__init__(params, {})


def without(net, *left_out):
    """SGD over all parameters but some."""
    kept = [param for param in net.parameters() if all(param is not other for other in left_out)]
    return optim.SGD(kept, lr=0.1, weight_decay=LAMBDA)


REFUSED = {
    "not an optimizer": (lambda n: nn.Linear(2, 2), {}, TypeError, "torch.optim.Optimizer"),
    "a wrapper": (
        lambda n: FrobeniusDecay(sgd(n), n.products()), {}, ValueError, "decay twice",
    ),
    "scheduler attached": (scheduled, {}, ValueError, "wrap the optimizer first"),
    "negative": (sgd, {"decay": -1e-4}, ValueError, "at least 0"),
    "nan": (sgd, {"decay": float("nan")}, ValueError, "finite"),
    "inf": (sgd, {"decay": float("inf")}, ValueError, "finite"),
    "negative tensor": (  # on a GPU it would not be waited for
        sgd, {"decay": torch.tensor(-1.0, device="cpu")}, ValueError, "at least 0",
    ),
    "many": (sgd, {"decay": torch.ones(2)}, ValueError, "one number"),
    "bool": (sgd, {"decay": True}, TypeError, "number"),
    "text": (sgd, {"decay": "1e-4"}, TypeError, "number"),
    "mode": (sgd, {"mode": "l2"}, ValueError, "'coupled', 'decoupled' or 'auto'"),
    "backend": (sgd, {"backend": "fast"}, ValueError, "backend"),
    "nothing to take over": (lambda n: optim.Rprop(n.parameters()), {}, ValueError, "decay=λ"),
    "unknown class": (
        lambda n: Custom(n.parameters(), lr=0.1, weight_decay=0.1), {}, ValueError, "mode=",
    ),
    "no rate": (
        lambda n: NoRate(n.parameters()), {"decay": 1.0, "mode": "decoupled"}, ValueError, "'lr'",
    ),
    "missing factor": (
        lambda n: without(n, n.Q), {}, ValueError, r"factor 1 \(Q\) of 'second'.*after factorize",
    ),
    "factor twice": (shared_twice, {}, ValueError, r"factor 0 \(U\) of 'first' once"),
    "differentiable": (
        lambda n: sgd(n, differentiable=True), {}, ValueError, "differentiable=False",
    ),
    "negative weight decay": (
        lambda n: optim.SGD([{"params": n.parameters(), "frobenius_decay": -1.0}], 0.1),
        {}, ValueError, "frobenius_decay of param group 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "kwargs", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_and_nothing_changed(make, kwargs, error, message):
    """The error says what was expected; model and optimizer are as they were, bit for bit."""
    net = Net()
    base = make(net)
    before = copy.deepcopy((values(net), getattr(base, "param_groups", None)))
    held = [[id(p) for p in g["params"]] for g in getattr(base, "param_groups", [])]
    with pytest.raises(error, match=message):
        FrobeniusDecay(base, net.products(), **kwargs)
    assert_identical((values(net), getattr(base, "param_groups", None)), before)
    assert [[id(p) for p in g["params"]] for g in getattr(base, "param_groups", [])] == held


@pytest.mark.parametrize(
    ("products", "error"),
    [([], ValueError), (nn.Linear(2, 2), ValueError), (["first"], TypeError), (3, TypeError)],
    ids=["empty", "model without", "names", "number"],
)
def test_there_have_to_be_products(products, error):
    """Nothing to decay is an error, not a wrapper that does nothing."""
    with pytest.raises(error):
        FrobeniusDecay(sgd(Net()), products)


@pytest.mark.covers("P20")
def test_an_optimizer_built_before_factorize_is_named():
    """The message names a missing factor, and a dense weight that is no longer in the model."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    base = optim.SGD(model.named_parameters(), lr=0.1)
    factorize(model, rank=2)
    with pytest.raises(ValueError, match=r"of '0.weight'.*too early.*0\.weight \(6, 8\)"):
        FrobeniusDecay(base, model)


@pytest.mark.covers("P20")
def test_factorizing_after_wrapping_is_noticed():
    """The next step names the factor that the optimizer does not hold (design: late)."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    factorize(model, rank=2, include="0")
    wrapped = FrobeniusDecay(sgd(model), model)
    wrapped.step()
    factorize(model, rank=2, include="2")
    with pytest.raises(ValueError, match=r"of '2.weight'.*after factorize"):
        wrapped.step()


@pytest.mark.covers("P20")
@pytest.mark.parametrize("change", [merge, unroll])
def test_merging_after_wrapping_is_noticed(change):
    """A product that is gone would silently not decay any more."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    factorize(model, rank=2)
    wrapped = FrobeniusDecay(sgd(model), model)
    change(model)
    with pytest.raises(ValueError, match=r"'0.weight' to be a product.*merged or unrolled"):
        wrapped.step()


def test_factorizing_another_model_does_not_matter():
    """Only the model that was wrapped is looked at again."""
    model, other = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
    factorize(model, rank=2)
    wrapped = FrobeniusDecay(sgd(model), model)
    factorize(other, rank=2)
    wrapped.step()


def test_parts_of_parameters_do_not_lose_their_weight_decay():
    """A packed parameter of which only a part is a factor is refused."""
    owner = nn.Module()
    owner.packed = nn.Parameter(torch.randn(3, 4, 2))
    factors = tuple(Factor(owner, "packed", "t m r -> t m r", (), index) for index in (0, 1))
    base = optim.SGD(owner.parameters(), lr=0.1, weight_decay=LAMBDA)
    with pytest.raises(ValueError, match="16 of 24 entries"):
        FrobeniusDecay(base, Product("part", factors))


@pytest.mark.covers("D5", "D8")
def test_weight_decay_set_later_is_refused():
    """A weight-decay schedule over all groups would decay the factors twice (D5, D8)."""
    net = Net()
    wrapped = FrobeniusDecay(sgd(net), net.products())
    train(net, wrapped, 1)
    before = values(net)
    for group in wrapped.param_groups:
        group["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match="decay twice; schedule 'frobenius_decay'"):
        wrapped.step()
    assert_identical(values(net), before)


@pytest.mark.parametrize("coef", [-1.0, float("nan")])
def test_a_bad_coefficient_is_refused_at_the_step(coef):
    """Whatever a schedule writes is checked before anything moves."""
    net = Net()
    wrapped = FrobeniusDecay(sgd(net), net.products())
    train(net, wrapped, 1)
    before = values(net)
    wrapped.param_groups[1]["frobenius_decay"] = coef
    with pytest.raises(ValueError, match="frobenius_decay of param group 1"):
        wrapped.step()
    assert_identical(values(net), before)


@pytest.mark.covers("D29")
def test_sparse_gradients_are_refused():
    """The decay of a lookup table would be dense: every row decays (D29)."""
    net = Net()
    wrapped = FrobeniusDecay(sgd(net), net.products())
    with pytest.raises(TypeError, match="first: expected a dense gradient"):
        train(net, wrapped, 1, sparse=True)


def test_a_bad_group_is_not_added():
    """An added group is checked before the base sees it."""
    net = Net()
    for factor in (net.P, net.Q):
        factor.requires_grad_(False)
    wrapped = FrobeniusDecay(optim.SGD([net.U, net.V], lr=0.1), net.products(), decay=LAMBDA)
    with pytest.raises(ValueError, match="frobenius_decay of param group 1"):
        wrapped.add_param_group({"params": [net.P, net.Q], "frobenius_decay": -1.0})
    with pytest.raises(TypeError, match="ordered"):
        wrapped.add_param_group({"params": {net.P, net.Q}})
    assert len(wrapped.param_groups) == 1


def test_a_module_of_another_name_is_the_same_product():
    """Renamed after wrapping, and looked at because something else was factorized."""
    model = nn.ModuleDict({"one": nn.Linear(8, 6)})
    factorize(model, rank=2)
    optimizer = FrobeniusDecay(optim.SGD(model.parameters(), lr=0.1), model, decay=0.1)
    model["other"] = model.pop("one")
    factorize(nn.Sequential(nn.Linear(8, 6)), rank=2)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before = model["other"].weight.detach().norm()
    optimizer.step()
    assert model["other"].weight.norm() < before
