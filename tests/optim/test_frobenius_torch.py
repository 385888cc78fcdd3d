"""FrobeniusDecay among torch's own machinery: hooks, GradScaler, compile, half precision."""

import copy

import pytest
import torch
from closeness import gradients
from optim_cases import Net, assert_identical, train, values
from torch import nn, optim
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from benchmarks.measure import no_waiting
from frobdecay import add_penalty_grad_, factorize, products
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product

LAMBDA = 0.05


def wrapped_sgd(net, **options):
    """SGD with weight decay, taken over."""
    base = optim.SGD(net.parameters(), **{"lr": 0.1, "weight_decay": LAMBDA, **options})
    return FrobeniusDecay(base, net.products())


# --- hooks --------------------------------------------------------------------------------------


@pytest.mark.covers("P33")
def test_every_step_hook_fires_once():
    """Global hooks and the base's run once in the base's step, the wrapper's once around it."""
    net = Net()
    optimizer = wrapped_sgd(net)
    calls = []

    def note(name):
        return lambda who, args, kwargs: calls.append((name, type(who).__name__))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    optimizer.optimizer.register_step_pre_hook(note("base pre"))
    optimizer.optimizer.register_step_post_hook(note("base post"))
    train(net, optimizer, 1)
    for handle in handles:
        handle.remove()
    assert calls == [
        ("pre", "FrobeniusDecay"),
        ("global pre", "SGD"),
        ("base pre", "SGD"),
        ("base post", "SGD"),
        ("global post", "SGD"),
        ("post", "FrobeniusDecay"),
    ]


@pytest.mark.covers("P34")
def test_a_pre_hook_can_replace_the_closure():
    """Torch's protocol: a pre-hook returns new (args, kwargs), post-hooks see them."""
    net = Net()
    optimizer = wrapped_sgd(net)
    seen = []
    optimizer.register_step_pre_hook(lambda who, args, kwargs: ((who, lambda: 3.0), kwargs))
    optimizer.register_step_post_hook(lambda who, args, kwargs: seen.append(args[1]()))
    assert optimizer.step(lambda: 1.0) == 3.0
    assert seen == [3.0]


def test_a_pre_hook_that_returns_something_else_is_refused():
    """As by torch."""
    optimizer = wrapped_sgd(Net())
    optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="expected a step pre-hook"):
        optimizer.step()


@pytest.mark.covers("P33")
def test_hooks_of_state_dicts_fire_once():
    """They are given the wrapper and what is saved; a returned dict replaces it."""
    net = Net()
    optimizer = wrapped_sgd(net)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda who: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda who, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda who, state: calls.append(state["note"]))
    optimizer.register_load_state_dict_post_hook(lambda who: calls.append(who is optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", 1, True]


# --- GradScaler ---------------------------------------------------------------------------------

FUSED = {
    "SGD": lambda p, fused: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=LAMBDA, fused=fused),
    "Adam": lambda p, fused: optim.Adam(p, lr=0.1, weight_decay=LAMBDA, fused=fused),
    "AdamW": lambda p, fused: optim.AdamW(p, lr=0.1, weight_decay=LAMBDA, fused=fused),
    "Adagrad": lambda p, fused: optim.Adagrad(p, lr=0.1, weight_decay=LAMBDA, fused=fused),
}


@pytest.fixture(params=["CPU", "accelerator"])
def device(request, monkeypatch):
    """Scale and overflow flag as numbers, or as tensors that must not be read on accelerators."""
    if request.param == "accelerator":

        def unknown(number):
            return number.reshape(()) if isinstance(number, torch.Tensor) else number

        monkeypatch.setattr("frobdecay.optim.rates.known_value", unknown)


@pytest.mark.covers("C13", "D13", "P35", "P36")
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale"])
def test_the_loss_scale_does_not_matter(make, fused, unscale):
    """Scaled gradients and unscaled ones decay alike, wherever they are unscaled (D13)."""
    net, twin = Net(torch.float32), Net(torch.float32)
    optimizer = FrobeniusDecay(make(net.parameters(), fused), net.products())
    plain = FrobeniusDecay(make(twin.parameters(), False), twin.products())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(net.loss()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    train(twin, plain, 4)
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert not hasattr(optimizer.optimizer, "grad_scale")


@pytest.mark.covers("C13", "D13", "P36")
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_skipped_step_decays_nothing(make, fused):
    """An overflow leaves parameters and moments alone."""
    net = Net(torch.float32)
    optimizer = FrobeniusDecay(make(net.parameters(), fused), net.products())
    train(net, optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy((values(net), optimizer.state_dict()))
    optimizer.zero_grad()
    (scaler.scale(net.loss()) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_identical((values(net), optimizer.state_dict()), before)


@pytest.mark.covers("D13")
def test_half_precision_gradients_under_a_scaler_are_refused():
    """The scaled decay would overflow in fp16 without being seen (D13)."""
    net = Net(torch.float16)
    optimizer = wrapped_sgd(net, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="keep the parameters in float32"):
        scaler.step(optimizer)


# --- half precision -----------------------------------------------------------------------------

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def decay_only(dtype, steps, closure=False):
    """A pair of ones of that dtype after some steps of decoupled decay and nothing else."""
    owner = nn.Module()
    owner.U, owner.V = (nn.Parameter(torch.ones(64, 1, dtype=dtype)) for _ in "UV")
    product = Product("pair", (Factor(owner, "U"), Factor(owner, "V")))
    base = optim.AdamW(owner.parameters(), lr=1e-3, weight_decay=1e-3, eps=1e-3)
    optimizer = FrobeniusDecay(base, product)
    for param in owner.parameters():
        param.grad = torch.zeros_like(param)
    for _ in range(steps):
        optimizer.step(*([lambda: None] if closure else []))
    return owner


@pytest.mark.covers("P4")
@HALF
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_decoupled_decay_acts_in_expectation(dtype, closure):
    """Steps of 6e-5 of the parameter move bf16, with a resolution of 4e-3, like float32."""
    steps = 1500
    exact = decay_only(torch.float32, steps).U.mean().item()
    assert exact < 0.95
    ours = decay_only(dtype, steps, closure).U.double()
    # Each of the 64 entries is a walk of ``steps`` roundings with a standard deviation of at most
    # sqrt(p(1 - p)) ulp, p = step/ulp; half an ulp for the last one.
    ulp = torch.finfo(dtype).eps / 2
    deviation = ulp * (steps * 64e-6 / ulp) ** 0.5 / 64**0.5
    assert abs(ours.mean().item() - exact) < 5 * deviation
    nearest = torch.ones((), dtype=dtype)
    assert nearest - torch.tensor(1e-6 * 64 / 10, dtype=dtype) == nearest


@HALF
def test_the_global_random_state_is_left_alone(dtype):
    """Rounding draws from the wrapper's own generator."""
    before = torch.get_rng_state()
    decay_only(dtype, 3)
    assert torch.equal(torch.get_rng_state(), before)


@HALF
def test_replicas_round_alike(dtype):
    """Two processes with different seeds stay equal: the generator's seed is a constant."""
    torch.manual_seed(1)
    one = decay_only(dtype, 50)
    torch.manual_seed(2)
    other = decay_only(dtype, 50)
    assert_identical(values(one), values(other))


@pytest.mark.covers("D13")
@HALF
def test_coupled_decay_of_half_precision_is_accumulated_in_float32(dtype):
    """The gradient gets the float32 penalty gradient, rounded once."""
    net = Net(dtype)
    optimizer = wrapped_sgd(net, lr=1.0)
    found = gradients(net.products()[0])[0]
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(net.U.grad, (LAMBDA * found).to(dtype))


# --- tensors, devices, compilation --------------------------------------------------------------


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW])
def test_tensor_options_act_like_numbers(make):
    """Both λ and lr may be tensors, as capturable optimizers have them."""
    net, twin = Net(), Net()
    ours = make(net.parameters(), lr=torch.tensor(0.1, dtype=torch.float64))
    train(net, FrobeniusDecay(ours, net.products(), decay=torch.tensor(LAMBDA).double()))
    train(twin, FrobeniusDecay(make(twin.parameters(), lr=0.1), twin.products(), decay=LAMBDA))
    torch.testing.assert_close(net.U, twin.U, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW])
def test_a_compiled_step_is_the_step(make):
    """torch.compile(optimizer.step) compiles the base's step and gives the same numbers."""
    net, twin = Net(), Net()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    optimizer = FrobeniusDecay(make(net.parameters(), lr=0.1, weight_decay=LAMBDA), net.products())
    eager = FrobeniusDecay(make(twin.parameters(), lr=0.1, weight_decay=LAMBDA), twin.products())
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(3):
        optimizer.zero_grad()
        net.loss().backward()
        step()
    train(twin, eager, 3)
    torch._dynamo.reset()
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        # A compiled AdamW corrects its bias in float32.
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    assert graphs


@pytest.mark.covers("P34")
@pytest.mark.parametrize("base", [False, True], ids=["wrapper", "base"])
def test_subclasses_may_patch_the_step(base):
    """Libraries that patch step on the class or the instance neither break nor double it."""
    net, twin = Net(), Net()
    optimizer = wrapped_sgd(net)
    optimizer._patch_step_function()
    optimizer.zero_grad()
    target = optimizer.optimizer if base else optimizer
    inner, calls = target.step, []

    def step(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    target.step = step
    train(net, optimizer, 2)
    train(twin, wrapped_sgd(twin), 2)
    assert_identical(values(net), values(twin))
    assert len(calls) == 2


class Copying:
    """Shares everything but the step with an optimizer, as LightningOptimizer does."""

    def __init__(self, optimizer):
        self.__dict__ = {key: value for key, value in vars(optimizer).items() if key != "step"}
        cls = type(f"Copying{type(optimizer).__name__}", (Copying, type(optimizer)), {})
        self.__class__ = cls
        self._optimizer = optimizer

    def step(self, closure=None):
        """Step the optimizer that was copied."""
        return self._optimizer.step(closure)


@pytest.mark.covers("P34")
def test_an_optimizer_that_shares_our_attributes_works():
    """Lightning hands out such objects: schedulers, groups and checkpoints go through them."""
    net, twin = Net(), Net()
    optimizer = wrapped_sgd(net, momentum=0.9)
    shared = Copying(optimizer)
    scheduler = optim.lr_scheduler.StepLR(shared, 1)
    train(net, shared, 2, closure=True)
    train(twin, wrapped_sgd(twin, momentum=0.9), 2)
    assert_identical(values(net), values(twin))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert_identical(shared.state_dict(), optimizer.state_dict())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW])
def test_skipped_steps_need_no_synchronization(make):
    """On CUDA, fused steps under a scaler read neither the scale nor the overflow flag."""
    net, twin = Net(torch.float32).cuda(), Net(torch.float32).cuda()
    net.x, twin.x = net.x.cuda(), twin.x.cuda()

    def wrap(net, fused):
        base = make(net.parameters(), lr=0.1, weight_decay=LAMBDA, fused=fused)
        return FrobeniusDecay(base, net.products())

    optimizer = wrap(net, True)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(net.loss()).backward()
        with no_waiting(net.x.device):
            scaler.step(optimizer)
        scaler.update()
    train(twin, wrap(twin, False), 3)
    torch.testing.assert_close(net.U, twin.U, rtol=1e-4, atol=1e-5)


# --- torch swaps parameters -----------------------------------------------------------------------


@pytest.fixture
def swapping():
    """Conversions and loading swap parameters, as they do where those are of another class."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("add", ["wrapper", "bounded", "gradient"])
@pytest.mark.parametrize("kind", ["factorized", "attention"])
def test_parameters_can_be_swapped(kind, add):
    """Nothing that is kept from step to step forbids it; the next decay is of the new ones."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    if kind == "factorized":
        factorize(layer, rank=4)

    def prepared(model):
        found = products(model)
        base = optim.SGD(model.parameters(), lr=0.1, weight_decay=LAMBDA)
        if add == "gradient":
            return base, lambda: add_penalty_grad_(found, LAMBDA)
        bound = 1.0 if add == "bounded" else None
        return FrobeniusDecay(base, found, bound=bound), lambda: None

    def step(model, optimizer, before):
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        before()
        optimizer.step()
        optimizer.zero_grad()

    mine = prepared(layer)
    step(layer, *mine)
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
    layer.double()
    fresh = copy.deepcopy(layer)
    step(layer, *mine)
    step(fresh, *prepared(fresh))
    for one, other in zip(layer.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
