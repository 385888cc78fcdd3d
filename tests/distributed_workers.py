"""What the processes of ``test_sharded.py`` do; each function runs in all of them."""

import contextlib
import hashlib
import os
import pathlib
import signal
import time

import torch
import torch.distributed.checkpoint as dcp
from closeness import gradients
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

import frobdecay
from frobdecay.gradient.accumulate import Accumulator
from frobdecay.gradient.sharded import check_replicas
from frobdecay.product.factor import Factor
from frobdecay.product.product import Product, squared_norm

PLACEMENTS = {
    "R": Replicate(),
    "0": Shard(0),
    "1": Shard(1),
    "S": _StridedShard(0, split_factor=2),
}

HEADS = "(h d) e -> h e d", "e (h d) -> h e d"

# name -> (mesh, shapes, placements of every factor by mesh dimension, patterns, axes, numbers sent)
LAYOUTS = {
    "rows": ((4,), [(8, 3), (12, 3)], "0 0", None, {}, 18),
    "uneven rows": ((4,), [(7, 3), (9, 3)], "0 0", None, {}, 18),
    "fewer rows than processes": ((4,), [(3, 2), (1, 2)], "0 0", None, {}, 2 * 2 + 1 * 2),
    "U alone": ((4,), [(7, 3), (9, 3)], "0 R", None, {}, 18),
    "copies": ((4,), [(7, 3), (9, 3)], "R R", None, {}, 0),
    "inner": ((4,), [(7, 3), (3, 2), (9, 2)], "0 0 0", None, {}, 9 + 6 + 4),
    "inner copies": ((4,), [(7, 3), (3, 3), (3, 2), (9, 2)], "0 R R 0", None, {}, 9 + 9 + 6 + 4),
    "hybrid": ((2, 2), [(7, 3), (9, 3)], "R0 R0", None, {}, 18),
    "hybrid inner": ((2, 2), [(7, 3), (3, 3), (9, 3)], "R0 R0 R0", None, {}, 27),
    "tensor parallel columns": ((2, 2), [(8, 3), (9, 3)], "S0 0R", None, {}, 18),
    "tensor parallel rows": ((2, 2), [(7, 3), (8, 3)], "0R S0", None, {}, 18),
    "two dimensions in order": ((2, 2), [(11, 3), (9, 3)], "00 00", None, {}, 18),
    "both dimensions of U": ((2, 2), [(8, 4), (9, 4)], "01 0R", None, {}, 8 * 4 + 16),
    "LoRA by r": ((4,), [(8, 3), (3, 10)], "0 0", (None, "r n -> n r"), {}, 9 + 30),
    "LoRA by n": ((4,), [(8, 3), (3, 12)], "0 1", (None, "r n -> n r"), {}, 18),
    "LoRA hybrid": ((2, 2), [(8, 3), (3, 12)], "R0 R1", (None, "r n -> n r"), {}, 18),
    "heads apart": ((4,), [(8, 5), (8, 5)], "0 0", (HEADS[0],) * 2, {"h": 4}, 0),
    "heads apart, some idle": ((4,), [(6, 5), (6, 5)], "0 0", (HEADS[0],) * 2, {"h": 3}, 0),
    "heads twice apart": ((2, 2), [(8, 5), (8, 5)], "S0 S0", (HEADS[0],) * 2, {"h": 4}, 0),
    "heads of copies": ((2, 2), [(8, 5), (8, 5)], "R0 R0", (HEADS[0],) * 2, {"h": 4}, 0),
    "heads cut": ((4,), [(8, 5), (8, 5)], "0 0", (HEADS[0],) * 2, {"h": 2}, 80),
    "heads of V only": ((4,), [(5, 8), (8, 5)], "0 0", HEADS[::-1], {"h": 4}, 32),
    "output heads, 2-D": ((2, 2), [(5, 8), (8, 5)], "01 S0", HEADS[::-1], {"h": 4}, 32),
    "grouped queries": (
        (2,), [(12, 5), (4, 5)], "0 0", ("(g q d) e -> g q e d", "(g d) e -> g e d"),
        {"g": 2, "d": 2}, 0),
    "grouped queries, cut": (
        (4,), [(12, 5), (4, 5)], "0 0", ("(g q d) e -> g q e d", "(g d) e -> g e d"),
        {"g": 2, "d": 2}, 60 + 20),
    "a batch of rows": ((2,), [(3, 7, 2), (3, 9, 2)], "1 1", None, {}, 24),
}  # fmt: skip


def _placed(text):
    return [[PLACEMENTS[letter] for letter in word] for word in text.split()]


def _cases(world):
    """Products of every layout whose mesh has that many processes: whole, and sharded."""
    for name, (size, shapes, text, patterns, axes, sent) in LAYOUTS.items():
        if torch.Size(size).numel() != world:
            continue
        mesh = init_device_mesh("cpu", size)
        for dtype in (torch.float64, torch.bfloat16):
            whole = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
            parts = [
                distribute_tensor(tensor.clone(), mesh, placements)
                for tensor, placements in zip(whole, _placed(text), strict=True)
            ]
            made = [
                Product.of(*tensors, name=name, scale=1.5, patterns=patterns, axes=axes)
                for tensors in (whole, parts)
            ]
            yield name, dtype, sent, *made


def _largest_error(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def layouts(rank, world):
    """For every layout: largest relative errors, collectives, and numbers sent."""
    report = []
    for name, dtype, sent, whole, sharded in _cases(world):
        accumulator = Accumulator([sharded])
        targets = [torch.zeros_like(param) for param in sharded.params]
        coefs = [0.5 + k for k in range(len(targets))]
        with CommDebugMode() as comm:
            accumulator.accumulate([targets], [coefs])
        counts = {str(op): n for op, n in comm.get_comm_counts().items()}
        expected = [coef * gradient for coef, gradient in zip(coefs, gradients(whole), strict=True)]
        errors = [
            _largest_error(target.full_tensor(), gradient)
            for target, gradient in zip(targets, expected, strict=True)
        ]
        norm = squared_norm(whole)
        errors += [
            _largest_error(accumulator.squared_norms()[0], norm),
            _largest_error(squared_norm(sharded), norm),
            _largest_error(frobdecay.product_norm(sharded), norm.sqrt()),
        ]
        assert (sharded.shape, sharded.rank) == (whole.shape, whole.rank)
        buffers = [exchange.buffer.numel() for exchange in accumulator._exchanges]
        report.append((name, str(dtype), max(errors), counts, sum(buffers), sent))
    return report


def bounded_layouts(rank, world):
    """For every layout: errors of a bounded step, its collectives, and how much of it is left."""
    report = []
    for name, dtype, sent, *made in _cases(world):
        if dtype != torch.float64:
            continue
        steps = []
        for product in made:
            generator = torch.Generator().manual_seed(3)
            params = [param.requires_grad_() for param in product.params]
            optimizer = frobdecay.FrobeniusDecay(
                torch.optim.SGD(params, lr=0.5), product, decay=1e-4, bound=0.2
            )
            for param in params:
                grad = torch.randn(param.shape, generator=generator, dtype=dtype)
                if hasattr(param, "device_mesh"):
                    grad = distribute_tensor(grad, param.device_mesh, param.placements)
                param.grad = grad
            before = product.materialize().detach()
            with CommDebugMode() as comm:
                optimizer.step()
            far = (product.materialize().detach() - before).norm().item()
            steps.append(
                ([p.full_tensor() if hasattr(p, "full_tensor") else p for p in params], far)
            )
        (whole, far), (sharded, _) = steps
        error = max(map(_largest_error, sharded, whole))
        counts = {str(op): n for op, n in comm.get_comm_counts().items()}
        report.append((name, error, far, counts, bool(sent)))
    return report


def bounded_parts(rank, world):
    """Errors of steps on factors that are some rows of one sharded parameter, by optimizer."""
    generator = torch.Generator().manual_seed(3)
    weight, grad = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    makes = {
        "bound": lambda params, product: frobdecay.FrobeniusDecay(
            torch.optim.SGD(params, lr=0.5), product, decay=1e-4, bound=0.2
        ),
        "spectron": lambda _, product: frobdecay.Spectron(product, lr=0.5, weight_decay=0.2),
    }
    report = {}
    for name, make in makes.items():
        steps = []
        for put in (torch.clone, lambda rows: distribute_tensor(rows, _mesh(world), [Shard(0)])):
            packed = nn.ParameterDict({"rows": nn.Parameter(put(weight))})
            packed["rows"].grad = put(grad)
            factors = tuple(Factor(packed, "rows", index=part) for part in ((0, 3), (3, 7)))
            make(packed.parameters(), Product("packed", factors)).step()
            steps.append(packed["rows"])
        alone, sharded = steps
        report[name] = _largest_error(sharded.full_tensor(), alone)
    return report


# --- training -----------------------------------------------------------------------------------


def net(dtype=torch.float64, depth=0, seed=0):
    """A factorized model with odd sizes: parts are uneven, and the last layer's U is one row."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(13, 11), nn.Tanh(), nn.Unflatten(1, (1, 11)), nn.Conv1d(1, 5, 3), nn.Flatten(),
        nn.Linear(45, 7), nn.Tanh(), nn.Linear(7, 1),
    ).to(dtype)  # fmt: skip
    make = lambda rank, **options: frobdecay.LowRank(rank, depth=depth, **options)  # noqa: E731
    frobdecay.factorize(model, rank=0.5, parametrization=make)
    return model


def sgd(model, **options):
    """Coupled decay."""
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    return frobdecay.FrobeniusDecay(base, model, **options)


def adamw(model, **options):
    """Decoupled decay."""
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    return frobdecay.FrobeniusDecay(base, model, **options)


def bounded(model):
    """Decoupled decay, and steps that are too long for the bound."""
    return adamw(model, bound=0.2)


def bounded_alone(model):
    """Without decay: the Grams are the bound's own."""
    return frobdecay.FrobeniusDecay(
        torch.optim.SGD(model.parameters(), lr=0.5), model, decay=0.0, bound=0.02
    )


def returning(model, **options):
    """Coupled decay toward what the factors are now."""
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    return frobdecay.FrobeniusDecay(base, frobdecay.products(model, toward="initial"), **options)


def spectron(model):
    """Orthogonalized momentum of the factors, which alone are trained."""
    return frobdecay.Spectron(model, lr=0.05)


def shard(model, mesh, **options):
    """Every layer a unit of its own, as is usual, and the rest."""
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def distance(sharded, whole):
    """The largest difference of two models' parameters, relative to the parameter's size."""
    return max(
        _largest_error(ours.full_tensor() if hasattr(ours, "full_tensor") else ours, theirs)
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True)
    )


def batches(steps, dtype=torch.float64):
    """The same batches on every process."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(8, 13, generator=generator, dtype=torch.float64).to(dtype)


def train(model, optimizer, steps=6, *, clip=None, closure=False, dtype=torch.float64):
    """A few steps; returns the losses and the norms of the gradients."""
    losses, norms = [], []
    for x in batches(steps, dtype):

        def evaluate(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if closure:
            losses.append(optimizer.step(evaluate).item())
            continue
        losses.append(evaluate().item())
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
    return losses, norms


class ReadsLoss(torch.optim.SGD):
    """An optimizer that looks at the loss: its step is as long as the loss is high."""

    def step(self, closure=None):
        """Evaluate, and take a step of lr·loss."""
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                param.detach().sub_(param.grad, alpha=group["lr"] * loss.item())
        return loss


def reads_loss(model):
    """Coupled decay, and the value of the penalty besides."""
    base = ReadsLoss(model.parameters(), lr=0.05, weight_decay=0.1)
    return frobdecay.FrobeniusDecay(base, model, mode="coupled")


def _mesh(*size):
    return init_device_mesh("cpu", size, mesh_dim_names=("replicate", "shard")[-len(size) :])


# name -> (mesh, optimizer, options of the net, of fully_shard, of the training)
RUNS = {
    "coupled": ((2,), sgd, {}, {}, {}),
    "decoupled": ((2,), adamw, {}, {}, {}),
    "inner factors": ((2,), adamw, {"depth": 2}, {}, {}),
    "kept after forward": ((2,), sgd, {}, {"reshard_after_forward": False}, {}),
    "offloaded": ((2,), adamw, {}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {}),
    "clipped": ((2,), sgd, {}, {}, {"clip": 0.1}),
    "closure": ((2,), adamw, {}, {}, {"closure": True}),
    "closure that is read": ((2,), reads_loss, {"depth": 1}, {}, {"closure": True}),
    "bounded": ((2,), bounded, {}, {}, {}),
    "bounded, inner factors": ((2,), bounded, {"depth": 2}, {}, {}),
    "bounded, offloaded": (
        (2,),
        bounded_alone,
        {},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {},
    ),
    "bounded, closure": ((2,), bounded_alone, {}, {}, {"closure": True}),
    "spectron": ((2,), spectron, {}, {}, {}),
    "spectron, inner factors": ((2,), spectron, {"depth": 2}, {}, {}),
    "spectron, hybrid": ((2, 2), spectron, {"depth": 1}, {}, {}),
    "bounded, hybrid": ((2, 2), bounded, {"depth": 1}, {}, {}),
    "toward the start": ((2,), returning, {"depth": 1}, {}, {}),
    "four processes": ((4,), sgd, {"depth": 1}, {}, {}),
    "hybrid coupled": ((2, 2), sgd, {"depth": 1}, {}, {"clip": 0.1}),
    "hybrid decoupled": ((2, 2), adamw, {}, {}, {}),
}


def runs(rank, world):
    """Train sharded and on one process; distances of parameters and losses."""
    report = {}
    for name, (size, make, model_options, shard_options, options) in RUNS.items():
        if torch.Size(size).numel() != world:
            continue
        whole, sharded = net(**model_options), net(**model_options)
        shard(sharded, _mesh(*size), **shard_options)
        expected = train(whole, make(whole), **options)
        optimizer = make(sharded)
        found = train(sharded, optimizer, **options)
        check_replicas(optimizer.products)
        error = max(
            abs(ours - theirs) / abs(theirs)
            for some, others in zip(found, expected, strict=True)
            for ours, theirs in zip(some, others, strict=True)
        )
        report[name] = distance(sharded, whole), error
    return report


def collectives(rank, world):
    """The collectives of a step, of ``add_penalty_grad_`` and of a closure's evaluation."""
    model = shard(net(depth=1), _mesh(world))
    optimizer = adamw(model)
    report = []
    for x in batches(2):
        model(x).square().mean().backward()
        with CommDebugMode() as step:
            optimizer.step()
        with CommDebugMode() as added:
            frobdecay.add_penalty_grad_(optimizer.products, 0.1)
        report += [step.get_comm_counts(), added.get_comm_counts()]
    return [{str(op): n for op, n in counts.items()} for counts in report]


def precision(rank, world):
    """bf16 on the way, float32 at rest: the decay is that of the float32 factors."""
    model = net(torch.float32)
    expected = [
        0.3 * gradient for product in frobdecay.products(model) for gradient in gradients(product)
    ]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, _mesh(world), mp_policy=policy)
    model(next(batches(1, torch.float32))).square().mean().backward()
    products = frobdecay.products(model)
    before = [param.grad.full_tensor() for p in products for param in p.params]
    frobdecay.add_penalty_grad_(products, 0.3)
    after = [param.grad.full_tensor() for p in products for param in p.params]
    return max(
        _largest_error(new - old, gradient)
        for new, old, gradient in zip(after, before, expected, strict=True)
    )


def rounding(rank, world):
    """bf16 parameters on a hybrid mesh: copies stay copies; the decay acts in expectation."""
    torch.manual_seed(rank)  # the global generator differs, as it may
    model = shard(net(torch.bfloat16), _mesh(2, world // 2))
    base = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    optimizer = frobdecay.FrobeniusDecay(base, model, decay=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    params = [param for product in optimizer.products for param in product.params]
    start = [param.full_tensor() for param in params]
    exact = net(torch.float64)
    slopes = [g.square().sum().item() for p in frobdecay.products(exact) for g in gradients(p)]
    decay = 2 * 20 * 1e-4 * sum(slopes)
    norm = sum(squared_norm(product).item() for product in optimizer.products)
    for _ in range(20):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        check_replicas(optimizer.products)
    moved = [
        float((new.full_tensor() != old).float().mean())
        for new, old in zip(params, start, strict=True)
    ]
    after = sum(squared_norm(product).item() for product in optimizer.products)
    generators = optimizer.state_dict()["frobdecay"]["generators"]
    states = {name: hashlib.sha256(bytes(s.tolist())).hexdigest() for name, s in generators.items()}
    return max(moved), (norm - after) / decay, states


class Branches(nn.Module):
    """A stem and two branches, of which one is used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = nn.Linear(13, 9), nn.Linear(9, 5), nn.Linear(9, 5)
        self.double()
        frobdecay.factorize(self, rank=3)

    def forward(self, x, branch):
        """The loss."""
        return (self.right if branch else self.left)(torch.tanh(self.stem(x))).square().mean()


def _compiled(model):
    torch._dynamo.config.optimize_ddp = "ddp_optimizer"
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    return torch.compile(wrapped, backend="aot_eager")


# name -> (wrap, whether to accumulate over two batches, whether every process has its branch)
DATA_PARALLEL = {
    "unused": (lambda m: DistributedDataParallel(m, find_unused_parameters=True), False, True),
    "accumulated": (lambda m: DistributedDataParallel(m, find_unused_parameters=True), True, False),
    "scaled": (lambda m: DistributedDataParallel(m, find_unused_parameters=True), False, False),
    "static": (lambda m: DistributedDataParallel(m, static_graph=True), False, False),
    "compiled": (_compiled, False, False),
}


def round_otherwise(model, rank):
    """Other factors of the same weights: what another processor finds, if much exaggerated."""
    angle = torch.tensor(0.5 * rank, dtype=torch.float64)
    turn = torch.eye(3, dtype=torch.float64)
    turn[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    with torch.no_grad():
        for product in frobdecay.products(model):
            for factor in product.params:
                factor.copy_(factor @ turn)


def ordinary(rank, world):
    """Data parallel in torch's older way; distances to one process with all the data.

    Every process starts from other factors; the wrapper sends those of the first to all.
    """
    report = {}
    for name, (wrap, accumulate, branches) in DATA_PARALLEL.items():
        scaler = torch.amp.GradScaler("cpu", enabled=name == "scaled", init_scale=2.0**10)
        whole, copy = Branches(), Branches()
        alone, optimizer = adamw(whole), adamw(copy)
        round_otherwise(copy, rank)
        model = wrap(copy)
        for x in batches(6):
            for process, part in enumerate(x.chunk(world)):  # one process does it all
                (whole(part, branches * process) / world).backward()
            alone.step()
            mine = x.chunk(world)[rank].chunk(1 + accumulate)
            for k, part in enumerate(mine, 1):
                with contextlib.nullcontext() if k == len(mine) else model.no_sync():
                    scaler.scale(model(part, branches * rank) / len(mine)).backward()
            scaler.step(optimizer)
            scaler.update()
            for one in (optimizer, alone):
                one.zero_grad()
        check_replicas(optimizer.products)
        report[name] = distance(copy, whole)
    return report


# --- what goes wrong ----------------------------------------------------------------------------


def missing_gradients(rank, world):
    """One process has no gradients for one product: what it does with the others, and they."""
    whole, sharded = net(), shard(net(), _mesh(world))
    optimizer = sgd(sharded)
    train(sharded, optimizer, 1)
    train(whole, sgd(whole), 1)
    first, *others = frobdecay.products(sharded)
    for model in (whole, sharded):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
    frozen = [param.to_local().clone() for param in first.params]
    if rank == 1:
        for param in first.params:
            param.grad = None
    frobdecay.add_penalty_grad_(optimizer.products, 0.1)
    frobdecay.add_penalty_grad_(frobdecay.products(whole), 0.1)
    names = {product.name for product in others}
    error = max(
        _largest_error(ours.grad.full_tensor(), theirs.grad)
        for p, q in zip(frobdecay.products(sharded), frobdecay.products(whole), strict=True)
        if p.name in names
        for ours, theirs in zip(p.params, q.params, strict=True)
    )
    optimizer.step()
    held = all(torch.equal(p.to_local(), f) for p, f in zip(first.params, frozen, strict=True))
    return error, held


def not_a_number(rank, world):
    """One process has a NaN in its part of one factor: who has one in which gradient."""
    model = shard(net(), _mesh(world))
    products = frobdecay.products(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    if rank == world - 1:
        with torch.no_grad():
            products[0].params[0].to_local()[0] = float("nan")
    frobdecay.add_penalty_grad_(products, 0.1)
    return [bool(p.params[1].grad.to_local().isnan().all()) for p in products]


def other_orders(rank, world):
    """Products in another order on every process, over some meshes: the error, the collectives."""
    torch.manual_seed(0)
    meshes = (
        *(init_device_mesh("cpu", shape) for shape in ((world,), (1, world))),
        _mesh(2, world // 2),
    )
    sizes = {"a": (9, 2), "b": (7, 3), "c": (9, 2), "d": (5, 3), "e": (6, 1)}
    whole, sharded = [], []
    for k, (name, (m, r)) in enumerate(sizes.items()):
        U, V = torch.randn(m, r, dtype=torch.float64), torch.randn(m + 1, r, dtype=torch.float64)
        whole.append(Product.of(U, V, name=name))
        mesh = meshes[k % 3]
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        parts = [nn.Parameter(distribute_tensor(t, mesh, placements)) for t in (U, V)]
        sharded.append(Product.of(*parts, name=name))
    for product in sharded:
        for param in product.params:
            param.grad = torch.zeros_like(param)
    shuffled = sharded[rank:] + sharded[:rank]
    frobdecay.add_penalty_grad_(shuffled, 0.0)  # the first time, processes compare their lists
    with CommDebugMode() as comm:
        frobdecay.add_penalty_grad_(shuffled, 1.0)
    error = max(
        _largest_error(param.grad.full_tensor(), gradient)
        for ours, theirs in zip(sharded, whole, strict=True)
        for param, gradient in zip(ours.params, gradients(theirs), strict=True)
    )
    return error, comm.get_total_counts(), len(Accumulator(shuffled)._exchanges)


def other_structures(rank, world):
    """What is no chain: the error, the collectives, numbers sent and numbers expected."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    return [_other(mesh, *other) for other in OTHERS]


# equation, factors, numbers sent: a Gram, or the whole factor where that is no larger
OTHERS = (
    ("xyz,ax,by,cz->abc", [(2, 3, 2), (5, 2), (4, 3), (7, 2)], 12 + 4 + 9 + 4),
    ("ar,br,cr->abc", [(5, 3), (7, 3), (2, 3)], 9 + 9 + 6),
    ("hmr,hnr->mhn", [(3, 5, 2), (3, 4, 2)], 30 + 24),  # cut between what both have,
    ("ab,cd->acbd", [(3, 2), (4, 5)], 1 + 1),
)


def _other(mesh, equation, factors, expected):
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in factors]
    parts = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors]
    whole, sharded = (Product.of(*found, equation=equation) for found in (tensors, parts))
    accumulator = Accumulator(sharded)
    targets = [torch.zeros_like(param) for param in sharded.params]
    with CommDebugMode() as comm:
        accumulator.accumulate([targets], [[1.0] * len(targets)])
    error = max(
        _largest_error(target.full_tensor(), gradient)
        for target, gradient in zip(targets, gradients(whole), strict=True)
    )
    error = max(error, _largest_error(accumulator.squared_norms()[0], squared_norm(whole)))
    counts = {str(op): n for op, n in comm.get_comm_counts().items()}
    (exchange,) = accumulator._exchanges
    return error, counts, exchange.buffer.numel(), expected


def measured(rank, world):
    """Largest errors of the penalty's gradients, and of the diagnostics, after sharding."""
    whole, sharded = net(depth=1), shard(net(depth=1), _mesh(world))
    for model in (whole, sharded):
        frobdecay.penalty(frobdecay.products(model), 0.3).backward()
    errors = [
        _largest_error(param.grad.full_tensor(), other.grad)
        for p, q in zip(frobdecay.products(sharded), frobdecay.products(whole), strict=True)
        for param, other in zip(p.params, q.params, strict=True)
    ]
    ours, theirs = (
        frobdecay.diagnostics.measure(frobdecay.products(model), 0.1).as_dict()
        for model in (sharded, whole)
    )
    return max(errors), max(abs(ours[key] - theirs[key]) / (abs(theirs[key]) + 1) for key in theirs)


def order_of_work(rank, world):
    """What a step does while the Grams are on their way."""
    model = net()
    fully_shard(model[0], mesh=_mesh(world))
    products = frobdecay.products(model)
    accumulator = Accumulator(products)
    log = []

    def note(what, function):
        def call(*args):
            log.append(what)
            return function(*args)

        return call

    for exchange in accumulator._exchanges:
        for what in ("start", "wait", "add"):
            setattr(exchange, what, note(what, getattr(exchange, what)))
    accumulator._runners = [note("local", go) for go in accumulator._runners]
    targets = [[torch.zeros_like(param) for param in product.params] for product in products]
    accumulator.accumulate(targets, [[1.0] * len(one) for one in targets])
    return log


def refusals(rank, world):
    """What is refused, and how."""
    mesh, other = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world))
    U, V = torch.randn(8, 2), torch.randn(6, 2)

    def put(tensor, mesh=mesh, placements=None):
        return nn.Parameter(distribute_tensor(tensor, mesh, placements or [Shard(0)]))

    def partial(tensor):
        return DTensor.from_local(tensor, mesh, [Partial()])

    def toward_a_dense_weight():
        layer = nn.Linear(6, 8)
        dense = {"weight": layer.weight.detach()}
        frobdecay.factorize(layer, rank=2)
        frobdecay.products(fully_shard(layer, mesh=mesh), toward=dense)

    def backward():
        product = Product.of(put(U), put(V, placements=[Replicate()]), name="name")
        product.params[1].grad = partial(V)
        frobdecay.add_penalty_grad_(product, 0.1)

    def other_rank():
        one = DTensor.from_local(torch.randn(4, 2 + rank), mesh, [Shard(0)])
        frobdecay.explain(Product.of(one, one, name="uneven"))

    def other_values():
        same, differs = (Product.of(t, t, name=n) for n, t in (("a", U), ("b", U + rank)))
        check_replicas([differs, same])

    def other_copies():
        copies = DTensor.from_local(U + rank, mesh, [Replicate()])
        check_replicas(Product.of(put(V), copies, name="name"))

    def replay():
        product = Product.of(put(U), put(V), name="name")
        recorder = frobdecay.diagnostics.Recorder(product, quantities=["norm"])
        recorder.step()
        recorder.replay_(0)

    torch.manual_seed(0)
    U, V = torch.randn(8, 2), torch.randn(6, 2)
    actions = {
        "partial factor": lambda: frobdecay.explain(Product.of(partial(U), put(V), name="name")),
        "half sharded": lambda: frobdecay.explain(Product.of(U, put(V), name="name")),
        "two meshes": lambda: frobdecay.explain(
            Product.of(put(U), put(V, other, [Replicate(), Shard(0)]), name="name")
        ),
        "toward a dense weight": toward_a_dense_weight,
        "partial gradient": backward,
        "balance": lambda: frobdecay.balance_(Product.of(put(U), put(V), name="name")),
        "replay": replay,
        "other rank": other_rank,
        "other values": other_values,
        "other copies": other_copies,
    }
    messages = {}
    for name, act in actions.items():
        try:
            act()
            messages[name] = "nothing was raised"
        except (ValueError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


# --- initialization -----------------------------------------------------------------------------


def from_meta(rank, world):
    """A model that no process ever has as a whole; the distance to one that was."""
    whole = net()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(13, 11), nn.Tanh(), nn.Unflatten(1, (1, 11)), nn.Conv1d(1, 5, 3),
            nn.Flatten(), nn.Linear(45, 7), nn.Tanh(), nn.Linear(7, 1),
        )  # fmt: skip
    mesh = _mesh(world)
    for layer in model:
        if list(layer.parameters()):
            layer.to_empty(device="cpu")
            layer.reset_parameters()
            frobdecay.factorize(layer.double(), rank=0.5)
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    difference = distance(model, whole)
    for one in (whole, model):
        train(one, sgd(one), 5)
    return difference, distance(model, whole)


def everything(rank, world):
    """All of the above that makes sense for so many processes."""
    both = (layouts, bounded_layouts, bounded_parts, runs, other_orders)
    two = (collectives, precision, ordinary, missing_gradients, not_a_number, order_of_work)
    two += (measured, other_structures)
    chosen = [*both, *(two if world == 2 else ()), refusals, from_meta]
    chosen += [rounding] if world == 4 else []
    report = {}
    for act in chosen:
        start = time.perf_counter()
        report[act.__name__] = act(rank, world)
        report.setdefault("seconds", {})[act.__name__] = time.perf_counter() - start
    return report


# --- a process dies -----------------------------------------------------------------------------


def restarted(rank, world, directory, attempt):
    """Train with a checkpoint after every step; in the first attempt a process dies in the fourth.

    Returns where it began, and whether the end is bit for bit that of an undisturbed training.
    """
    directory = pathlib.Path(directory)
    model = shard(net(torch.float32), _mesh(world))
    optimizer = adamw(model)
    done = sorted(directory.glob("step*/.metadata"))
    start = int(done[-1].parent.name[4:]) if done else 0
    if start:
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=done[-1].parent)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    for step, x in enumerate(batches(6, torch.float32), 1):
        if step <= start:
            continue
        if step == 4 and attempt == 0 and rank == 1:  # while the other waits for its Grams
            for exchange in optimizer._engine.accumulator._exchanges:
                exchange.start = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        one_step(model, optimizer, x)
        dcp.save(_state(model, optimizer), checkpoint_id=directory / f"step{step}")
    undisturbed = shard(net(torch.float32), _mesh(world))
    optimizer = adamw(undisturbed)
    for x in batches(6, torch.float32):
        one_step(undisturbed, optimizer, x)
    pairs = zip(model.parameters(), undisturbed.parameters(), strict=True)
    return start, all(torch.equal(ours.to_local(), theirs.to_local()) for ours, theirs in pairs)


def _state(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def one_step(model, optimizer, x):
    """Forward, backward, step."""
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def calibrated(rank, world, wrapper):
    """Moments of a wrapped model, each process with its batches, and of all batches on one."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4), nn.Linear(4, 4))

    def moments(stats):
        return {" ".join(key): m.full() for key, m in sorted(stats.sums.moments.items())}

    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(5, 6, generator=generator) for _ in range(2 * world)]
    whole = moments(frobdecay.calibrate(make(), batches))
    model = make()
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=_mesh(world))
    mine = batches[rank::world]
    stats = frobdecay.calibrate(model, mine)
    again = frobdecay.calibrate(model, mine[:1])
    frobdecay.calibrate(model, mine[1:], stats=again)
    return {"whole": whole, "once": moments(stats), "twice": moments(again)}


def calibration_fails(rank, world, what):
    """What each process is told of a run that fails in the last of them, and what comes next."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model = nn.parallel.DistributedDataParallel(model)

    def batches():
        if what == "loader" and rank == world - 1:
            raise OSError("no such file")
        yield from torch.ones(3, 5, 6) / (0 if what == "NaN" and rank == world - 1 else 1)

    try:
        frobdecay.calibrate(model, batches())
    except RuntimeError as error:
        found = frobdecay.calibrate(model, torch.ones(3, 5, 6).unbind())
        return [str(error), sum(map(found.sums.calls, found.sums.moments))]
    return []
