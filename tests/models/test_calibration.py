"""Calibration: moments of what the layers of a model see, and the factors that they give."""

import copy
import functools
import json
import pickle
import re

import pytest
import torch
from cases import seeded
from distributed_workers import calibrated, calibration_fails
from gloo import run
from torch import nn
from torch.utils.checkpoint import checkpoint

from frobdecay import (
    CP,
    Calibration,
    LowRank,
    TensorTrain,
    Tucker,
    calibrate,
    compare,
    factorize,
    merge,
)
from frobdecay.algebra.calibrated.truncation import Metric


def correlated(*shape, seed=0):
    """Inputs (…, n) with a decaying spectrum and a mean."""
    generator = seeded(seed)
    n = shape[-1]
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    sizes = 2.0 ** -torch.arange(n).div(2)
    return torch.randn(*shape, generator=generator) * sizes @ turn + 0.3


class Attention(nn.Module):
    """Queries, keys and values of one input, as most models have them."""

    def __init__(self, width=16, bias=True):
        super().__init__()
        self.q, self.k = nn.Linear(width, width, bias=bias), nn.Linear(width, 8, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        """Scores do not matter here."""
        return self.v(x) + self.q(x) * self.k(x).mean(-1, keepdim=True)


def mlp(bias=True):
    """Wide, narrow, square."""
    return nn.Sequential(
        nn.Linear(16, 24, bias),
        nn.Tanh(),
        nn.Linear(24, 12, bias),
        nn.Tanh(),
        nn.Linear(12, 12, bias),
    )


def images():
    """Strided, grouped, pointwise and transposed convolutions, all read by channels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, groups=2, padding="same", padding_mode="reflect", bias=False),
        nn.Conv2d(16, 24, 1, stride=2, bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(24, 8, 2, stride=2),
        nn.Conv2d(8, 4, 1),
    )


class Encoder(nn.TransformerEncoderLayer):
    """torch's own, whose fast path would pass the hooks by."""

    def __init__(self):
        super().__init__(16, 2, 32, dropout=0.0, batch_first=True)


class Words(nn.Module):
    """An embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 12)

    def forward(self, ids):
        """Words to scores."""
        return self.head(self.embedding(ids))


CHANNEL = functools.partial(LowRank, pattern="channel")
MODELS = {
    "linear": (mlp, lambda: correlated(64, 16), LowRank),
    "without biases": (lambda: mlp(False), lambda: correlated(64, 16), LowRank),
    "shared input": (Attention, lambda: correlated(8, 8, 16), LowRank),
    "convolutions": (images, lambda: correlated(4, 8, 8, 3).movedim(-1, 1), CHANNEL),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(6, 12, 3, padding=2), nn.Tanh(), nn.Conv1d(12, 8, 5)),
        lambda: correlated(4, 20, 6).mT,
        LowRank,
    ),
    "torch's encoder": (Encoder, lambda: correlated(4, 10, 16), LowRank),
    "embedding": (Words, lambda: torch.randint(0, 12, (8, 9), generator=seeded(3)), LowRank),
    "bilinear": (
        lambda: Twice(nn.Bilinear(6, 6, 10), nn.Linear(10, 10)),
        lambda: correlated(50, 6),
        LowRank,
    ),
}


class Twice(nn.Sequential):
    """A bilinear form of one input, and a layer."""

    def forward(self, x):
        """Both."""
        return self[1](self[0](x, x))


def made(name):
    """A model, its batches in two halves, and how it is factorized."""
    make, data, parametrization = MODELS[name]
    torch.manual_seed(0)
    whole = data()
    return make().eval(), [whole[: len(whole) // 2], whole[len(whole) // 2 :]], parametrization


def met(model, batches):
    """Module name -> the (inputs, outputs) of each of its calls."""
    found = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, out, name=name: found.setdefault(name, []).append((args, out))
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return found


def distance(module, calls, about=False):
    """√(Σ‖y − y′‖² ÷ Σ‖y‖²) of a module on calls of another; y about its mean on request."""

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        ours = torch.cat([first(module(*args)).double() for args, _ in calls])
    theirs = torch.cat([first(out).double() for _, out in calls])
    axes = (
        [0, *range(2, theirs.ndim)]
        if isinstance(module, nn.modules.conv._ConvNd)
        else [0, 1][: theirs.ndim - 1]
    )
    size = theirs - theirs.mean(axes, keepdim=True) if about else theirs
    return float((ours - theirs).norm() / size.norm())


def test_words_that_were_not_met_are_not_given_up():
    """Each counts for a little, so that they lose less, and those that were met hardly more."""
    sizes = 3.0 ** -torch.arange(8)
    W = torch.randn(400, 8, generator=seeded(0))
    W[:30] *= sizes
    W[30:] *= sizes.flip(0)
    model = nn.Sequential(nn.Embedding.from_pretrained(W.clone(), freeze=False))
    stats = calibrate(model, [torch.randint(30, (10, 100), generator=seeded(1))])
    often = stats.sums.moments["0.weight", "rows"].second / 1000
    factorize(model, rank=4, init=stats)
    U, V = Metric(often, "rows").factors(W, 4).factors
    ours, theirs = ((made - W).norm(dim=1) / W.norm(dim=1) for made in (model[0].weight, U @ V.T))
    assert ours[30:].mean() < 0.5 * theirs[30:].mean()
    assert ours[:30].mean() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_every_layers_outputs_are_nearer_than_the_plain_ones(name):
    """On the data; and the plan's error is that of the outputs."""
    model, batches, parametrization = made(name)
    stats = calibrate(model, batches)
    calls = met(model, batches)
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    factorize(plain, rank=3, parametrization=parametrization)
    plan = factorize(ours, rank=3, parametrization=parametrization, init=stats)
    checked = 0
    for row in plan.rows:
        if row.rank is None:
            continue
        assert row.reason is None
        path, _, attribute = row.name.rpartition(".")
        if attribute == "weight" and path in calls:
            here, there = (m.get_submodule(path) for m in (ours, plain))
            assert distance(here, calls[path]) <= distance(there, calls[path]) + 1e-6
            biased = getattr(here, "bias", None) is not None
            assert row.error == pytest.approx(distance(here, calls[path], biased), abs=2e-3)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_is_the_dense_model(name):
    """And biases stay where they are."""
    model, batches, parametrization = made(name)
    with torch.no_grad():
        expected = model(batches[0])
    factorize(model, rank=1.0, parametrization=parametrization, init=calibrate(model, batches))
    torch.testing.assert_close(model(batches[0]), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_input_is_summed_once():
    """By the first that meets it; the others' moment is the same."""
    model, batches, _ = made("shared input")
    assert list(calibrate(model, batches).sums.moments) == [("v.weight", "inputs")]


def test_a_tensor_that_was_written_to_is_another():
    """In the same memory, with the same shape."""

    class Rewritten(Attention):
        def forward(self, x):
            x = x.clone()
            before = self.q(x)
            return before + self.v(x.mul_(2))

    torch.manual_seed(0)
    model = Rewritten()
    x = correlated(30, 16)
    sums = calibrate(model, [x], exclude="k").sums
    q, v = (sums.moments[name, "inputs"].full() for name in ("q.weight", "v.weight"))
    torch.testing.assert_close(4 * q, v)


@pytest.mark.parametrize("how", ["numpy", "data", "same"])
@pytest.mark.parametrize("own_loop", [False, True])
def test_batches_in_one_tensor_are_counted_each(how, own_loop):
    """Refilled where nobody counts it, or the same again; q, k and v still share."""
    model, data = Attention(), correlated(5, 10, 16)
    x = torch.empty(10, 16)
    x = torch.from_numpy(x.numpy()) if how == "numpy" else x

    def batches():
        for one in data:
            if how == "numpy":
                x.numpy()[:] = one.numpy()
            elif how == "data":
                x.data.copy_(one)
            yield data[0] if how == "same" else x

    if own_loop:
        with torch.no_grad(), calibrate(model) as stats:
            for batch in batches():
                model(batch)
    else:
        stats = calibrate(model, batches())
    (moment,) = [m for (_, of), m in stats.sums.moments.items() if of == "inputs"]
    rows = (data[:1].expand(5, -1, -1) if how == "same" else data).reshape(-1, 16).double()
    assert moment.count == 50
    torch.testing.assert_close(moment.full(), rows.mT @ rows, rtol=1e-4, atol=1e-4)
    factorize(model, rank=2, init=stats)


def test_masks_of_one_tensor_count_each():
    """One after the other, and at once for two weights."""
    model, x = Attention(), correlated(2, 3, 16)
    one, two = torch.ones(2, 3).tril(), torch.ones(2, 3)
    with torch.no_grad(), calibrate(model) as stats:
        for stats.mask in (one, two):
            model(x)
    (moment,) = [m for (_, of), m in stats.sums.moments.items() if of == "inputs"]
    assert moment.count == one.sum() + two.sum()
    with torch.no_grad(), calibrate(model) as stats:
        stats.mask = {"q.*": one, "*": two}
        model(x)
    counts = {name: m.count.item() for (name, of), m in stats.sums.moments.items()}
    assert counts["q.weight"] == one.sum()
    assert counts["v.weight"] == two.sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_repeats_is_not_counted_again(reentrant):
    """It repeats a part of the shared calls only, where it stops early."""
    block, x = Attention(), correlated(20, 16)
    once = calibrate(block, [x]).sums
    with calibrate(block) as stats:
        leaf = x.clone().requires_grad_()
        checkpoint(block, leaf, use_reentrant=reentrant).square().sum().backward()
    assert stats.sums.shared == once.shared
    factorize(block, rank=2, init=stats)


def test_inference_mode_shares_nothing_and_sums_the_same():
    """There, nobody counts who writes to a tensor."""
    model, batches, _ = made("shared input")
    stats = calibrate(model, batches)
    with torch.inference_mode(), calibrate(model) as other:
        for batch in batches:
            model(batch.clone())
    assert len(other.sums.moments) == 3
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    first = factorize(one, rank=3, init=stats)
    second = factorize(two, rank=3, init=other)
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-4)


def test_batches_and_a_loop_sum_the_same_and_go_on():
    """In one run, two, or two passes for one half of the weights each."""
    model, batches, _ = made("linear")
    whole = calibrate(model, batches)
    with calibrate(model) as loop, torch.no_grad():
        for batch in batches:
            model(batch)
    on = calibrate(model, batches[1:], stats=calibrate(model, batches[:1]))
    halves = calibrate(model, batches, groups=2)
    for other in (loop, on, halves):
        assert other.sums.moments.keys() == whole.sums.moments.keys()
        for key, moment in whole.sums.moments.items():
            torch.testing.assert_close(
                other.sums.moments[key].full(), moment.full(), rtol=1e-4, atol=1e-4
            )


def test_runs_that_share_otherwise_add_up(tmp_path):
    """Weights that shared an input in one run, and were in groups or alone in the next."""
    model, batches, _ = made("shared input")
    stats = calibrate(model, batches[:1])
    stats.save(tmp_path / "moments.pt")
    stats = Calibration.load(tmp_path / "moments.pt")
    for _ in range(2):
        calibrate(model, batches[1:], stats=stats, groups=3)
        for name in "qkv":
            calibrate(model, batches[1:], stats=stats, include=name)
    whole = calibrate(model, [*batches[:1], *batches[1:] * 4])
    assert len(stats.sums.moments) == 4
    plans = [factorize(copy.deepcopy(model), rank=2, init=one) for one in (stats, whole)]
    for a, b in zip(*(plan.rows for plan in plans), strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-4)


def test_padding_is_left_out():
    """By the batch's mask, by a function, or by hand."""

    class Masked(nn.Sequential):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    torch.manual_seed(0)
    model = Masked(nn.Linear(16, 24))
    x, mask = correlated(4, 6, 16), torch.ones(4, 6).tril(3).long()
    expected = x[mask.bool()]
    batch = {"input_ids": x, "attention_mask": mask}

    def loop():
        with calibrate(model) as stats:
            stats.mask = mask
            model(x)
        return stats

    for stats in (
        calibrate(model, [batch]),
        calibrate(model, [batch], mask=lambda batch: batch["attention_mask"].bool()),
        loop(),
    ):
        moment = stats.sums.moments["0.weight", "inputs"]
        assert moment.count == len(expected)
        torch.testing.assert_close(moment.first, expected.sum(0).double(), rtol=1e-4, atol=1e-4)
    assert calibrate(model, [batch], mask=None).sums.moments["0.weight", "inputs"].count == 24


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_encoders_make_no_nested_tensors_while_they_are_watched():
    """Of padded batches in evaluation mode, as torch's fast path does."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), correlated(2, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[3], [5]])

    def forward(model, x):
        return model(x, src_key_padding_mask=padding)

    assert model.use_nested_tensor
    stats = calibrate(model, [x], forward, mask=lambda _: ~padding)
    assert model.use_nested_tensor
    assert {m.count.item() for m in stats.sums.moments.values()} == {8}
    with pytest.raises(TypeError), calibrate(model):
        model()
    assert model.use_nested_tensor


def test_a_mask_that_fits_nothing_is_warned_of():
    """Unless it hides nothing, or nothing has the dimensions that it could have fitted."""
    model, x = mlp(), correlated(4, 6, 16)
    hiding = torch.ones(4, 5).tril(3)
    with pytest.warns(UserWarning, match="no weight's inputs have the shape"):
        calibrate(model, [x], mask=lambda _: hiding)
    calibrate(model, [x], mask=lambda _: torch.ones(4, 5))
    calibrate(model, [x[:, 0]], mask=lambda _: hiding)


@pytest.mark.parametrize("ran", [False, True])
def test_a_compiled_model_is_watched_eagerly(ran):
    """What was compiled before holds no hooks; afterwards it is as it was."""
    model, batches, _ = made("linear")
    whole = calibrate(model, batches)
    calls = []
    compiled = torch.compile(model, backend=lambda graph, inputs: calls.append(1) or graph.forward)
    if ran:
        compiled(batches[0])
    before = len(calls)
    for seen in (calibrate(compiled, batches), calibrate(compiled)):
        if not seen.sums.moments:
            with seen:
                for batch in batches:
                    compiled(batch)
        assert len(calls) == before
        assert seen.sums.moments.keys() == whole.sums.moments.keys()
    compiled(batches[0])
    assert len(calls) == 1


def test_a_model_is_as_it_was():
    """No hooks, no gradients, no statistics, no mode changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[2].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    calibrate(model, [correlated(10, 8)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


class Writing(nn.Module):
    """Counts, observes and averages in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 8, max_norm=0.1), nn.Linear(8, 8)
        for name, shape in (("calls", ()), ("mean", (8,)), ("last", (0,)), ("old", (8,))):
            self.register_buffer(name, torch.zeros(shape))
        self.free = nn.Parameter(torch.zeros(8))
        self.register_buffer("edges", torch.eye(8).to_sparse())
        self.register_buffer("packed", torch.zeros(8, dtype=torch.uint8).view(torch.bits8))

    def forward(self, words):
        """In place, out of place, past the counter of writes, and of another shape."""
        found = self.layer(self.table(words))
        self.calls += 1
        self.mean = self.mean + found.mean(0)
        self.old.data += 1
        self.last.resize_(found.shape).copy_(found)
        return found


@pytest.mark.parametrize("run", [calibrate, lambda m, b: compare(m, copy.deepcopy(m), b)])
def test_what_a_forward_pass_writes_is_undone(run):
    """Tensors that others hold stay what they hold; parameters that were written to are told."""
    torch.manual_seed(0)
    model = Writing()
    before, held = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    run(model, [torch.arange(9), torch.arange(3)])
    for name in before.keys() - {"packed"}:
        torch.testing.assert_close(model.state_dict()[name], before[name], rtol=0, atol=0)
    assert all(buffer is held[name] for name, buffer in model.named_buffers())
    for name in ("free", "edges"):
        one = copy.deepcopy(model)
        one.register_forward_hook(lambda m, *_, name=name: (getattr(m, name).mul_(2), None)[1])
        with pytest.raises(ValueError, match=rf"wrote to \['{name}'\].*deepcopy"):
            run(one, [torch.arange(9)])


def test_a_later_assignment_factorizes_as_ever():
    """The moments are used once, and not kept."""
    model, batches, _ = made("linear")
    factorize(model, rank=3, init=calibrate(model, batches))
    assert model[0].parametrizations.weight[0].config()["init"] == "spectral"
    model[0].weight = torch.ones(24, 16)
    merge(model)
    torch.testing.assert_close(model[0].weight, torch.ones(24, 16))


def test_what_saw_nothing_is_plain_and_listed():
    """Or is not watched; of others the plan says nothing."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8), "rnn": nn.GRU(8, 8)})
    stats = calibrate(model, [correlated(10, 8)], lambda model, batch: model["used"](batch))
    remarks = {row.name: row.reason for row in factorize(model, rank=2, init=stats).rows}
    assert remarks["used.weight"] is None
    assert "saw no input" in remarks["idle.weight"]
    assert "GRU are not watched" in remarks["rnn.weight_ih_l0"]


def partly(model, batch):
    """Another module meets some of the shared inputs."""
    model.q(batch)
    if len(batch) > 2:
        model.v(batch)


def test_kernels_read_spatially_are_plain_and_told_what_to_read_them_by():
    """The reading that the note names is calibrated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 8))
    stats = calibrate(model, [correlated(8, 3, 16).reshape(8, 3, 4, 4)])
    plain = factorize(copy.deepcopy(model), rank=3)
    plan = factorize(copy.deepcopy(model), rank=3, init=stats)
    assert plan.rows[0].error == plain.rows[0].error
    advice = r"init='spectral': the rows of .*parametrization=(functools\.partial\(.*\)) makes them"
    told = re.search(advice, plan.rows[0].reason)[1]
    reading = eval(told, {"functools": functools, "LowRank": LowRank})
    with pytest.raises(ValueError, match=r"no chosen weight was calibrated: 0\.weight: init='spec"):
        factorize(copy.deepcopy(model), rank=3, init=stats, include="0")
    assert not factorize(model, rank=3, init=stats, parametrization=reading).rows[0].reason


def test_layers_with_a_forward_of_their_own_are_listed():
    """Nobody knows what they do with the weight."""

    class Standardized(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight - self.weight.mean())

    torch.manual_seed(0)
    model = nn.Sequential(Standardized(16, 16), nn.Linear(16, 16))
    stats = calibrate(model, [correlated(9, 16)])
    dense = factorize(copy.deepcopy(model), rank={"1": 2}, include="*", init=stats).rows[0]
    assert dense.reason == "no rank given for it"  # and nothing of an initialization
    remarks = [row.reason for row in factorize(model, rank=2, init=stats).rows]
    assert "Standardized has a forward of its own" in remarks[0]
    assert remarks[1] is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(12, 10), (10, 12)])
@pytest.mark.parametrize(
    ("scale", "mean"), [(1e20, 0), (1e35, 0), (1e-25, 0), (1e-37, 0), (1, 1e4), (1e20, 1e4)]
)
def test_inputs_of_any_size_and_mean_are_truncated_best(scale, mean, widths, bias):
    """Whose squares leave float32, or whose digits they do: the least error is known in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*widths, bias=bias))
    if bias:
        with torch.no_grad():
            model[0].bias.mul_(scale)
    x = (correlated(80, widths[0]) + mean) * scale
    y = x.double() / scale @ model[0].weight.detach().double().T
    plan = factorize(model, rank=3, init=calibrate(model, [x[:50], x[50:]]))
    about = y - y.mean(0) if bias else y
    values = torch.linalg.svdvals(about)
    least = float(values[3:].norm() / values.norm())
    assert plan.rows[0].error == pytest.approx(least, rel=0.02, abs=1e-6)
    ours = x.double() / scale @ model[0].weight.detach().double().T
    if bias:
        ours = ours - ours.mean(0) + y.mean(0)
    assert float((ours - y).norm() / about.norm()) == pytest.approx(least, rel=0.02, abs=1e-6)
    assert plan.rows[0].reason is None


def test_queries_keys_and_values_that_are_read_as_one_matrix_are_plain_and_listed():
    """Where each had an input of its own, there is no moment of all."""
    model, inputs = nn.MultiheadAttention(8, 2), torch.randn(3, 5, 2, 8)
    stats = calibrate(model, [inputs], lambda model, batch: model(*batch))
    read = functools.partial(LowRank, pattern="o i -> o i")
    (row, *_) = factorize(model, rank=2, init=stats, parametrization=read).rows
    assert "joins or cuts the matrices that were watched" in row.reason


def test_weights_of_other_dtypes_are_not_watched():
    """They stay dense, too."""
    complex_, x = nn.Linear(8, 8, dtype=torch.complex64), torch.randn(20, 8)
    model = nn.ModuleList([nn.Linear(8, 8), complex_])
    stats = calibrate(model, [x], lambda m, x: (m[0](x), m[1](x.to(torch.complex64))))
    assert "torch.complex64" in stats.unwatched["1.weight"]
    assert factorize(model, rank=2, init=stats).ranks == {"0.weight": 2}
    with pytest.raises(ValueError, match=r"no weight to watch in Linear\n.*complex64"):
        calibrate(complex_, [x.to(torch.complex64)])


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_sets_the_mode_leaves_it(training):
    """Either way."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout()).train(training)
    calibrate(model, [torch.randn(20, 8)], lambda model, x: model.train(not training)(x))
    assert {module.training for module in model.modules()} == {training}


def test_biases_that_cannot_be_written_to_stay():
    """All else is factorized."""
    with torch.inference_mode():
        frozen = nn.Linear(8, 8)
    expanded = nn.Linear(8, 8)
    expanded.bias = nn.Parameter(torch.ones(1).expand(8))
    for layer in (frozen, expanded):
        before = layer.bias.clone()
        assert factorize(layer, rank=2, init=calibrate(layer, [correlated(20, 8)])).ranks
        assert torch.equal(layer.bias, before)


def test_outputs_that_never_vary_are_plain_and_listed():
    """One example, or one again and again; whatever its size."""
    for x in (correlated(1, 8), correlated(1, 8).expand(33, 8), torch.zeros(4, 8)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4, bias=False))
        expected = model(x)
        plan = factorize(model, rank=2, init=calibrate(model, [x * 1e3]), include="0")
        assert plan.rows[0].reason == "init='spectral': its outputs did not vary"
        torch.testing.assert_close(model(x * 1e3), model(x * 1e3))
        assert expected.shape == model(x).shape


def test_hooks_that_change_what_a_layer_returns_change_no_moment():
    """They come after; a layer whose forward is replaced is listed."""
    torch.manual_seed(0)
    x, plain = correlated(30, 12), nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8))
    hooked = copy.deepcopy(plain)
    hooked[0].register_forward_hook(lambda module, args, out: 7 * out)
    moments = [calibrate(m, [x]).sums.moments["0.weight", "outputs"] for m in (plain, hooked)]
    torch.testing.assert_close(moments[1].full(), moments[0].full())
    forward = plain[0].forward
    plain[0].forward = lambda x: 7 * forward(x)
    assert "forward of its own" in calibrate(plain, [x]).unwatched["0.weight"]


@pytest.mark.parametrize("compiled", [torch.compile, lambda m, **how: m.compile(**how) or m])
def test_compiled_models_are_watched(compiled, capfd):
    """Also if they ran before."""
    torch._dynamo.reset()
    model, batches, _ = made("linear")
    expected = calibrate(model, batches).sums
    other = compiled(model, backend="eager")
    with torch.no_grad():
        other(batches[0])
    for key, moment in calibrate(other, batches).sums.moments.items():
        torch.testing.assert_close(moment.full(), expected.moments[key].full())
    assert "ignored" not in capfd.readouterr().err


REFUSED = {
    "too large for float32": (
        lambda m: calibrate(
            m,
            [torch.ones(4, 16).diff(dim=0, prepend=torch.zeros(1, 16)) * 1e25],
            stats=Calibration(dtype=torch.float32),
        ),
        "infinity",
    ),
    "empty": (lambda m: calibrate(m, []), "no watched weight saw an input"),
    "exhausted": (lambda m: calibrate(m, iter(())), "empty or exhausted"),
    "NaN": (lambda m: calibrate(m, [torch.full((4, 16), torch.nan)]), "NaN or infinity in batch 1"),
    "a tensor": (lambda m: calibrate(m, torch.ones(4, 16)), "a loader or a list"),
    "an iterator twice": (lambda m: calibrate(m, iter([torch.ones(4, 16)]), groups=2), "groups=2"),
    "no groups": (lambda m: calibrate(m, [], groups=0), "number of passes"),
    "meta": (lambda m: calibrate(m.to("meta"), [torch.ones(4, 16)]), "meta device"),
    "lazy": (
        lambda m: calibrate(nn.Sequential(nn.LazyLinear(4), m), [torch.ones(4, 16)]),
        "0.weight has no shape yet .*run the model once",
    ),
    "texts": (lambda m: calibrate(m, ["a text"]), "expected tensors, got the text 'a text'; tok"),
    "a mask's name": (
        lambda m: calibrate(m, [{"input": torch.ones(4, 16)}], mask="maks"),
        r"mask='maks' to be one of the batch's keys \['input'\]",
    ),
    "a mask of scores": (
        lambda m: calibrate(m, [torch.ones(4, 2, 16)], mask=lambda b: torch.tensor([[0.0, -1e9]])),
        "booleans, or of 0 and 1",
    ),
    "a number for a mask": (
        lambda m: calibrate(m, [torch.ones(4, 16)], mask=lambda b: torch.tensor(1)),
        r"got \(\) of torch.int64",
    ),
    "a mask of four dimensions": (
        lambda m: calibrate(m, [{"attention_mask": torch.ones(4, 1, 2, 2)}]),
        r"of shape \(batch, length\), got \(4, 1, 2, 2\)",
    ),
    "nothing ran": (lambda m: calibrate(m, [1], lambda model, batch: None), "did not run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_batches_are_refused(case):
    """By name, and the model is as it was."""
    model = mlp()
    act, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        act(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_refused_batches_leave_a_calibration_as_it_was():
    """Which goes on watching the model that it did."""
    model, other = mlp(), nn.Linear(3, 3)
    stats = calibrate(model, [torch.randn(4, next(model.parameters()).shape[1])])
    before = dict(vars(stats))
    with pytest.raises(TypeError, match="expected batches"):
        calibrate(other, torch.ones(2, 3), stats=stats)
    assert vars(stats) == before


def test_a_failed_run_adds_nothing():
    """What was known before is still known."""
    model, batches, _ = made("linear")
    stats = calibrate(model, batches)
    before = stats.sums.moments["0.weight", "inputs"].full()
    for groups in (1, 2):
        passes = iter([[batches[0]] * 2, [batches[0], batches[0] / 0]][-groups:])

        class Loader:
            def __iter__(self, passes=passes):
                return iter(next(passes))

        with pytest.raises(ValueError, match="infinity"):
            calibrate(model, Loader(), stats=stats, groups=groups)
        assert torch.equal(stats.sums.moments["0.weight", "inputs"].full(), before)
        assert stats.sums.calls(("0.weight", "inputs")) == len(batches)


@pytest.mark.parametrize("width", [1, 9])
def test_moments_of_another_model_are_not_added_to(width):
    """Not even where they could be, as those of one input."""
    model, batches, _ = made("linear")
    stats = calibrate(model, batches)
    before = copy.deepcopy(stats.sums.moments)
    other = nn.Sequential(nn.Linear(width, 24))
    with pytest.raises(ValueError, match="another model"):
        calibrate(other, [torch.ones(4, width)], stats=stats)
    for key, moment in stats.sums.moments.items():
        assert torch.equal(moment.full(), before[key].full())


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(9, 24)), {}, "another model"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 24)),
            {},
            "no chosen weight was calibrated",
        ),
        (mlp, {"parametrization": Tucker}, "take LowRank"),
        (mlp, {"parametrization": TensorTrain}, "take LowRank"),
        (mlp, {"parametrization": CP}, "take LowRank"),
    ],
)
def test_moments_of_another_model_are_refused(other, options, message):
    """And tensor decompositions, before anything changed."""
    model, batches, _ = made("linear")
    stats, other = calibrate(model, batches), other()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        factorize(other, rank=2, init=stats, **options)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_weight_that_met_some_of_the_shared_inputs_is_refused():
    """It would be truncated for inputs that it never saw."""
    torch.manual_seed(0)
    model = Attention()
    stats = calibrate(model, [correlated(2, 16), correlated(9, 16)], partly, exclude="k")
    with pytest.raises(ValueError, match="met 1 of the 2 inputs"):
        factorize(model, rank=2, init=stats, exclude="k")


def test_an_error_on_the_way_leaves_biases_alone():
    """They are moved when all else is done."""
    model, batches, _ = made("linear")
    stats, before = calibrate(model, batches), copy.deepcopy(model.state_dict())
    model[4].weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="gradient hooks"):
        factorize(model, rank=2, init=stats, include=["0", "4"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["linear", "embedding", "convolutions"])
@pytest.mark.parametrize("file", ["moments.safetensors", "moments.pt"])
def test_moments_are_saved_loaded_and_added_to(name, file, tmp_path):
    """And then are those of both runs."""
    model, batches, parametrization = made(name)
    stats = calibrate(model, batches[:1])
    stats.shrink = 0.25
    stats.save(tmp_path / file)
    loaded = Calibration.load(tmp_path / file)
    assert loaded.shrink == 0.25
    assert loaded.sums.shared == stats.sums.shared
    both = calibrate(model, batches[1:], stats=loaded)
    whole = calibrate(model, batches)
    whole.shrink = 0.25
    plans = [
        factorize(copy.deepcopy(model), rank=2, init=one, parametrization=parametrization)
        for one in (both, whole)
    ]
    for a, b in zip(*(plan.rows for plan in plans), strict=True):
        assert a.error == (None if b.error is None else pytest.approx(b.error, rel=1e-4))


@pytest.mark.parametrize("file", ["moments.safetensors", "moments.pt", None])
@pytest.mark.parametrize("changed", ["weight", "bias"])
def test_outputs_of_a_weight_that_changed_are_refused(changed, file, tmp_path):
    """Those of inputs are as good as ever, and so is a rounded weight."""
    torch.manual_seed(0)
    model, wide = nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(8, 16))
    x = correlated(30, 16)
    for one, data, refused in ((model, x, True), (wide, x[:, :8], False)):
        stats = calibrate(one, [data])
        if file is not None:
            stats.save(tmp_path / file)
            stats = Calibration.load(tmp_path / file)
        factorize(copy.deepcopy(one).bfloat16(), rank=2, init=stats)
        rounded = calibrate(copy.deepcopy(one).bfloat16(), [data.bfloat16()])
        factorize(copy.deepcopy(one), rank=2, init=rounded)
        with torch.no_grad():
            getattr(one[0], changed).mul_(1.001)
        before = copy.deepcopy(one.state_dict())
        if refused:
            with pytest.raises(ValueError, match=r"0\.weight: .*calibrate again"):
                factorize(one, rank=2, init=stats)
            with pytest.raises(ValueError, match="calibrate again"):
                calibrate(one, [data], stats=stats)
            assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())
        else:
            factorize(one, rank=2, init=stats)


@pytest.mark.parametrize("file", ["moments.safetensors", "moments.pt"])
def test_files_of_something_else_are_refused(file, tmp_path):
    """By name."""
    path = tmp_path / file
    if file.endswith("pt"):
        torch.save({"weight": torch.ones(2)}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a file of moments: it has none"):
        Calibration.load(path)
    path.write_text("some words, and no archive\n" * 9)
    with pytest.raises(ValueError, match="not a file of moments, but text"):
        Calibration.load(path)


def test_damaged_files_are_refused(tmp_path):
    """Whatever of them does not fit the rest."""
    model, batches, _ = made("linear")
    path, broken = tmp_path / "moments.pt", tmp_path / "broken.pt"
    calibrate(model, batches).save(path)
    whole = torch.load(path)
    header = "frobdecay.calibration"
    said = json.loads(whole[header])
    half = next(iter(said["shared"].items()))
    damages = [
        *({name: part[..., :-1]} for name, part in whole.items() if name[0] == "0" and part.ndim),
        {"0.0": whole["0.0"].float()},
        {"0.0": torch.ones(2)},
        {"0.2": whole["0.2"] * torch.nan},
        {"0.2": whole["0.2"].half()},
        {"0.2": "text"},
        {"0.2": None},
        *(
            {header: json.dumps(said | change)}
            for change in (
                {"dtype": "load"},
                {"dtype": ["float64"]},
                {"shrink": "much"},
                {"shrink": None},
                {"unwatched": 3},
                {"shared": {half[0]: [[99, 1]]}},
                {"shared": {half[0]: [["x", 1]]}},
                {"shared": 3},
                {"moments": [["0.weight", "weights", 1]]},
                {"moments": 3},
                {"prints": 3},
                {"version": 99},
            )
        ),
        {header: "[" * 100_000},
        {header: "3"},
        {header: None},
    ]
    for damage in damages:
        torch.save(whole | damage, broken)
        with pytest.raises(ValueError, match=r"broken\.pt: not a file of moments"):
            Calibration.load(broken)


def test_memory_is_told_before_it_starts():
    """As if nothing were shared; afterwards, what there is. Copies hold no model."""
    model, batches, _ = made("shared input")
    stats = calibrate(model)
    assert stats.most == 8 * (16**2 + 16**2 + 8**2)
    assert repr(stats) == "Calibration(watches 3 weights, at most 0.004608 MB)"
    calibrate(model, batches, stats=stats)
    assert repr(stats).startswith("Calibration(1 moments, 0.002184 MB; watches 3 weights")
    assert pickle.loads(pickle.dumps(stats)).probes == []
    with pytest.raises(RuntimeError, match="watches no model"), copy.deepcopy(stats):
        pass
    small = calibrate(model, batches, stats=Calibration(dtype=torch.float32))
    assert small.sums.nbytes < stats.sums.nbytes * 0.6


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_processes_sum_what_each_has_seen(wrapper):
    """Each its own batches, in one run and in two."""
    results = run(calibrated, 2, wrapper)
    whole = results[0]["whole"]
    for moments in (result[times] for result in results for times in ("once", "twice")):
        assert moments.keys() == whole.keys()
        for name, second in whole.items():
            torch.testing.assert_close(moments[name], second, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [("loader", "OSError: no such file"), ("NaN", "ValueError: the inputs of 0.weight held NaN")],
)
def test_a_process_that_fails_tells_the_others(what, message):
    """All raise the same, and can calibrate again."""
    (told, calls), *others = run(calibration_fails, 2, what, timeout=60.0)
    assert f"calibration failed in process 1: {message}" in told
    assert calls == 2 * 2 * 3
    assert others == [[told, calls]]


def test_settings_are_checked():
    """Of the share that the data does not decide."""
    model, batches, _ = made("linear")
    stats = calibrate(model, batches)
    stats.shrink = 2
    with pytest.raises(ValueError, match="between 0 and 1"):
        factorize(model, rank=2, init=stats)
    with pytest.raises(RuntimeError, match="inside of `with"):
        stats.mask = None
