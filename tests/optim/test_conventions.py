"""What the wrapper knows of optimizers that it has never seen, and what it refuses to guess."""

import copy
import pathlib

import pytest
import torch
from optim_cases import Net, assert_identical, train, values
from torch import nn

import frobdecay
from frobdecay import FrobeniusDecay
from frobdecay.optim import conventions


class Unknown(torch.optim.Optimizer):
    """Some optimizer with options of its own, and a first step to call by hand."""

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.5, **options})

    def first_step(self):
        """As SAM has it."""

    @torch.no_grad()
    def step(self, closure=None):
        """Plain gradient descent without weight decay."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)
        return loss


class Around(torch.optim.Optimizer):
    """Stands around another optimizer, as Lookahead does; its checkpoints have its own layout."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self._patch_step_function()
        self.defaults = optimizer.defaults

    @property
    def state(self):
        """The other's."""
        return self.optimizer.state

    @property
    def param_groups(self):
        """The other's."""
        return self.optimizer.param_groups

    def step(self, closure=None):
        """The other's."""
        return self.optimizer.step(closure)

    def state_dict(self):
        """The other's, further down."""
        return {"inside": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict):
        """The other's, from further down."""
        self.optimizer.load_state_dict(state_dict["inside"])


class Anew(Around):
    """Makes its groups at every look, as offloading optimizers do."""

    param_groups = property(lambda self: list(self.optimizer.param_groups))


def kind(optimizer, net) -> str:
    """What auto finds."""
    text = repr(FrobeniusDecay(optimizer, net.products(), decay=0.5))
    return text.partition("auto (")[2].partition(")")[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decoupled_weight_decay": True}, "decoupled"),
        ({"decoupled_weight_decay": False}, None),
        ({"weight_decouple": True}, None),
        ({"weight_decouple": False}, None),
        ({}, None),
    ],
)
def test_only_torchs_own_option_is_believed_of_strangers(options, expected):
    """Other options may mean anything in an optimizer that nobody has measured."""
    net = Net()
    optimizer = Unknown(net.parameters(), **options)
    if expected is None:
        with pytest.raises(ValueError, match="expected mode='coupled' or mode='decoupled'"):
            kind(optimizer, net)
    else:
        assert kind(optimizer, net) == expected


@pytest.mark.parametrize(
    ("option", "expected"), [({}, "coupled"), ({"decoupled_weight_decay": True}, "decoupled")]
)
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
def test_torchs_option_decides_in_torchs_optimizers(cls, option, expected):
    """Also in a subclass that keeps the step."""
    net = Net()
    assert kind(type("Mine", (cls,), {})(net.parameters(), **option), net) == expected


def test_a_subclass_with_a_step_of_its_own_is_a_stranger():
    """Whatever its name and its parent."""
    net = Net()
    adam = type("Adam", (torch.optim.Adam,), {"step": Unknown.step})
    with pytest.raises(ValueError, match="expected mode="):
        kind(adam(net.parameters()), net)


def test_a_name_is_not_enough():
    """A class called Lion that is not pytorch_optimizer's."""
    net = Net()
    with pytest.raises(ValueError, match="expected mode="):
        kind(type("Lion", (Unknown,), {})(net.parameters(), weight_decouple=True), net)


def _named(name: str, **members):
    """A class that is taken for one of pytorch_optimizer."""
    return type(name, (Unknown,), {"__module__": f"pytorch_optimizer.{name.lower()}", **members})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Unknown", {}, r"for Unknown, got 'auto': .* has not been measured\. 'coupled' adds"),
        ("Ranger21", {"weight_decouple": True},
         r"for Ranger21 with weight_decouple=True, got 'auto': .*measured, and is of neither kind"),
        ("Lamb", {"weight_decouple": False}, "Lamb with weight_decouple=False.*of neither kind"),
        ("Lamb", {"weight_decouple": True, "fixed_decay": True}, "weight_decouple=True, fixed_de"),
        ("Prodigy", {"weight_decouple": True}, r"neither kind so \(its steps are lr times an est"),
        ("ScheduleFreeAdamW", {}, r"neither kind so \(.* on a second copy"),
    ],
)  # fmt: skip
def test_what_is_asked_for_a_mode_is_told_why(name, options, message):
    """Whether it was measured, with which options, and what the modes do."""
    net = Net()
    with pytest.raises(ValueError, match=message):
        kind(_named(name)(net.parameters(), **options), net)


@pytest.mark.parametrize(
    ("name", "option", "expected"), [("Adan", False, "decoupled"), ("ASGD", True, "coupled")]
)
def test_of_some_the_option_says_nothing(name, option, expected):
    """They were measured with both."""
    net = Net()
    assert kind(_named(name)(net.parameters(), weight_decouple=option), net) == expected


@pytest.mark.parametrize(
    ("name", "inside", "expected"),
    [
        ("Lookahead", torch.optim.SGD, "coupled"),
        ("Lookahead", torch.optim.AdamW, "decoupled"),
        ("OrthoGrad", torch.optim.AdamW, "decoupled"),
        ("OrthoGrad", torch.optim.SGD, None),
        ("TRAC", torch.optim.SGD, "coupled"),
        ("TRAC", torch.optim.AdamW, None),
        ("Lookahead", Unknown, None),
    ],
)
def test_what_stands_around_another_decays_as_that(name, inside, expected):
    """Where it leaves that kind of decay as it is."""
    net, outer = Net(), type(name, (Around,), {"__module__": "pytorch_optimizer.x"})
    optimizer = outer(inside(net.parameters(), lr=0.1, weight_decay=0.5))
    if expected is None:
        with pytest.raises(ValueError, match=f"around {inside.__name__}|for {inside.__name__}"):
            kind(optimizer, net)
    else:
        assert kind(optimizer, net) == expected


def listed() -> str:
    """What ``mode="auto"`` knows, as the table of docs/training-stacks.md."""
    rows = ["| package | decay | optimizers |", "| --- | --- | --- |"]
    lists = (
        conventions._COUPLED,
        conventions._DECOUPLED,
        conventions._REGARDLESS,
        conventions._AROUND,
        conventions._NEITHER,
    )
    for package in sorted({name for table in lists for name in table}):
        one, other, regardless, around, neither = (
            set(table.get(package, "").split()) for table in lists
        )
        option = conventions._OPTIONS.get(package, ("decoupled_weight_decay",))[0]
        either = (one & other) - regardless - around
        for kind, names in {
            "coupled": (one - other - around) | (one & regardless),
            "decoupled": (other - one - around) | (other & regardless),
            f"as `{option}` says": either,
            "as the optimizer inside": around & one & other,
            "as the optimizer inside, if coupled": around - other,
            "as the optimizer inside, if decoupled": around - one,
            "asks: neither, as measured": neither,
        }.items():
            if names:
                rows.append(f"| {package} | {kind} | {', '.join(sorted(names, key=str.lower))} |")
    return "\n".join(rows)


def test_the_table_in_the_docs_is_the_code():
    """``python tests/optim/test_conventions.py`` prints it."""
    path = pathlib.Path(__file__).parents[2] / "docs" / "training-stacks.md"
    assert listed() in path.read_text(encoding="utf-8")


def test_a_wrapped_optimizer_is_found_inside_another():
    """Around(FrobeniusDecay(base)) decays already."""
    net = Net()
    inside = FrobeniusDecay(Unknown(net.parameters()), net.products(), mode="coupled")
    several = Around(Unknown(net.parameters()))
    several.others = {"factors": [inside]}
    for optimizer in (inside, Around(inside), Around(Around(inside)), several):
        with pytest.raises(ValueError, match="would decay twice"):
            FrobeniusDecay(optimizer, net.products(), mode="coupled")


def test_groups_that_do_not_last_are_refused():
    """What was taken from them would come back."""
    net = Net()
    with pytest.raises(ValueError, match="made anew at every look"):
        FrobeniusDecay(Anew(Unknown(net.parameters())), net.products(), mode="coupled")


def test_steps_past_the_wrapper_are_named():
    """first_step exists behind, where nothing would decay."""
    net = Net()
    optimizer = FrobeniusDecay(Unknown(net.parameters()), net.products(), mode="coupled")
    with pytest.raises(AttributeError, match=r"Unknown behind has it, as \.optimizer\.first_step"):
        optimizer.first_step()
    with pytest.raises(AttributeError, match=r"no attribute 'second_step'$"):
        optimizer.second_step()


def test_a_checkpoint_of_another_layout_goes_on():
    """The base's own layout is its own affair."""
    nets = Net(), Net()
    optimizers = [
        FrobeniusDecay(
            Around(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)),
            net.products(),
            mode="coupled",
        )
        for net in nets
    ]
    train(nets[0], optimizers[0])
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer)
    assert_identical(values(nets[0]), values(nets[1]))


def test_a_plain_checkpoint_of_another_layout_is_refused():
    """Where the groups of the unwrapped base are, nobody can know."""
    net = Net()
    base = Around(torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5))
    saved = base.state_dict()
    optimizer = FrobeniusDecay(base, net.products(), mode="coupled")
    with pytest.raises(ValueError, match=r"got \['inside'\].*of a Around that was not wrapped"):
        optimizer.load_state_dict(saved)


@pytest.mark.covers("P25")
def test_flat_parameters_are_recognized():
    """ZeRO and FSDP1 hand the optimizer one flat tensor, in which there are no factors."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    frobdecay.factorize(model, rank=2)
    flat = nn.Parameter(nn.utils.parameters_to_vector(model.parameters()).detach())
    with pytest.raises(ValueError, match=r"factor 0 .*holds a parameter \(.*flat, as ZeRO"):
        FrobeniusDecay(torch.optim.AdamW([flat]), model)


@pytest.mark.covers("P45")
@pytest.mark.parametrize("missing", [0, 1])
def test_an_optimizer_for_each_parameter_is_refused(missing):
    """Stepping in the backward pass, one factor at a time, knows only half of a product."""
    net = Net()
    product = net.products()[0]
    with pytest.raises(ValueError, match=f"factor {missing} .*in a param group"):
        FrobeniusDecay(torch.optim.SGD([product.params[1 - missing]], weight_decay=0.1), product)


@pytest.mark.covers("P32")
def test_a_schedule_goes_on_after_loading():
    """The groups that a load replaces are the ones that a scheduler then changes (no alias)."""
    net = Net()
    optimizer = FrobeniusDecay(
        torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5), net.products()
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    train(net, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.05, 0.05]


if __name__ == "__main__":
    print(listed())
