"""Whole steps on a device: captured in graphs, waiting for nothing, in half precision, sharded.

Each part raises where something is not as it has to be. On a CPU everything runs in small.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.gpu.kernels import check, error, exact
from benchmarks.gpu.parts import part
from benchmarks.measure import WARM_UPS, Report, captured, no_waiting, synchronize
from benchmarks.models import resnet
from benchmarks.step import whole_step
from frobdecay import FrobeniusDecay, Product, factorize


@part("smoke", 90)
def rounding(report: Report) -> None:
    """Decoupled decay of bfloat16 factors acts in expectation, and alike in every run."""
    device = report.device
    rows_, r, steps = (4096, 64, 100) if device.type == "cuda" else (256, 8, 20)
    start = [torch.randn(rows_, r, device=device) * rows_**-0.5 for _ in range(2)]
    ends = []
    for _ in range(2):
        factors = [nn.Parameter(t.bfloat16()) for t in start]
        base = torch.optim.AdamW(factors, lr=1e-3, weight_decay=0.02)
        optimizer = FrobeniusDecay(base, Product.of(*factors))
        for _ in range(steps):
            for factor in factors:
                factor.grad = torch.zeros_like(factor)
            optimizer.step()
        ends.append([factor.detach() for factor in factors])
    if not all(torch.equal(a, b) for a, b in zip(*ends, strict=True)):
        raise AssertionError("expected equal bits from equal generators, got others")
    ideal = [t.bfloat16().double() for t in start]
    for _ in range(steps):
        changes = exact(*ideal)
        ideal = [t - 1e-3 * 0.02 * g for t, g in zip(ideal, changes, strict=True)]
    rows = []
    for name, begin, end, wanted in zip("UV", start, ends[0], ideal, strict=True):
        first = begin.bfloat16().double()
        # along the factor itself: single entries are as coarse as bfloat16 is
        moved, due = (((t.double() - first) * first).sum() for t in (end, wanted))
        rows.append(
            {
                "": name,
                "resolution ÷ step": float(2**-8 * steps / due * (first * first).sum()),
                "error": abs(float(moved / due) - 1),
                "allowed": 0.25,
            }
        )
    check(report, "movement along the factor, relative to float64", rows)


def _network(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small network of factorized layers: convolutions on a GPU, linear ones on a CPU."""
    torch.manual_seed(0)
    if device.type == "cuda":
        model: nn.Module = resnet(20)
        factorize(model, rank=0.25, exclude=["conv1", "fc"])
    else:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10))
        factorize(model, rank=4)
    return model.to(device, dtype)


def _images(device: torch.device, count: int = 16) -> tuple[Tensor, Tensor]:
    side = 32 if device.type == "cuda" else 4
    return (
        torch.randn(count, 3, side, side, device=device),
        torch.randint(10, (count,), device=device),
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params, **more: torch.optim.SGD(params, lr=0.05, momentum=0.9, **more),
    "AdamW": lambda params, **more: torch.optim.AdamW(params, lr=1e-3, **more),
    "AdamW, fused": lambda params, **more: torch.optim.AdamW(params, lr=1e-3, fused=True, **more),
}


@part("smoke", 90)
def waiting(report: Report) -> None:
    """No step waits for the device: new gradients, schedules, bfloat16, all kinds of decay."""
    rows = []
    for name, make in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = _network(report.device, dtype)
            params = list(model.parameters())
            optimizer = FrobeniusDecay(make(params, weight_decay=1e-3), model)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)

            def run(count: int, params: Any = params, both: Any = (optimizer, schedule)) -> None:
                for _ in range(count):
                    for param in params:
                        param.grad = torch.randn_like(param)
                    for one in both:
                        one.step()

            run(2)
            with no_waiting(report.device):
                run(68)  # beyond the 64 after which the wrapper looks at its steps
            finite = all(bool(param.isfinite().all()) for param in params)
            rows.append({"optimizer": name, "dtype": str(dtype)[6:], "finite": str(finite)})
            if not finite:
                raise AssertionError(f"{name}, {dtype}: expected finite parameters after 70 steps")
    report.table("70 steps without waiting", rows)


GRAPHED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": OPTIMIZERS["SGD"],
    "AdamW": lambda params, **more: torch.optim.AdamW(
        params, lr=1e-3, capturable=params[0].is_cuda, **more
    ),
}


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(images), labels)


@part("smoke", 90)
def graph(report: Report) -> None:
    """A whole training step in a CUDA graph, replayed on new data, trains as eager steps do."""
    _replayed(report, None)


@part("smoke", 90)
def graph_of_bounded_steps(report: Report) -> None:
    """So does one whose step is bounded."""
    _replayed(report, 0.5)


def _replayed(report: Report, bound: float | None) -> None:
    device, rows = report.device, []
    torch.backends.cudnn.deterministic = True
    for name, make in GRAPHED.items():
        model = _network(device)
        images, labels = _images(device)
        twins = [model, copy.deepcopy(model)]
        steps = []
        for one in twins:
            base = make(list(one.parameters()), weight_decay=1e-2)
            optimizer = FrobeniusDecay(base, one, bound=bound)
            steps.append(whole_step(one, partial(_loss, images=images, labels=labels), optimizer))
        replay = captured(steps[0], device)
        for _ in range(WARM_UPS if device.type == "cuda" else 0):
            steps[1]()
        for _ in range(5):
            new_images, new_labels = _images(device)
            images.copy_(new_images)
            labels.copy_(new_labels)
            replay()
            steps[1]()
        synchronize(device)
        errors = [
            error(a, b.double())
            for a, b in zip(*(one.parameters() for one in twins), strict=True)
            if b.norm() > 1e-3
        ]
        rows.append({"optimizer": name, "error": max(errors), "allowed": 2e-3})
    check(report, "parameters after five replays", rows)


@part("smoke", 90)
def graph_of_rounding(report: Report) -> None:
    """Stochastic rounding in a CUDA graph draws new numbers at every replay."""
    device = report.device
    factors = [
        nn.Parameter((torch.randn(512, 16, device=device) * 512**-0.5).bfloat16()) for _ in range(2)
    ]
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    base = torch.optim.AdamW(factors, lr=1e-3, weight_decay=0.05, capturable=device.type == "cuda")
    optimizer = FrobeniusDecay(base, Product.of(*factors))
    replay = captured(optimizer.step, device, optimizer)
    seen = [factors[0].detach().clone()]
    for _ in range(3):
        replay()
        seen.append(factors[0].detach().clone())
    moved = [(b.float() - a.float()) != 0 for a, b in pairwise(seen)]
    shares = [float(one.float().mean()) for one in moved]
    report.table(
        "share of entries that moved",
        [{"replay": k, "share": share} for k, share in enumerate(shares)],
    )
    if not all(share > 0 for share in shares) or torch.equal(moved[0], moved[1]):
        raise AssertionError(f"expected other entries to move at every replay, got {shares}")


@part("smoke", 90)
def scaler(report: Report) -> None:
    """float16 under autocast and a GradScaler, fused: overflowing steps are skipped, decay too."""
    device = report.device
    if device.type == "cpu":
        return
    model = _network(device)
    twin = copy.deepcopy(model)
    optimizer = FrobeniusDecay(
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True), model
    )
    scaler_ = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # overflows first
    losses = []
    for _ in range(60):
        images, labels = _images(device)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = cross_entropy(model(images), labels)
        scaler_.scale(loss).backward()
        scaler_.step(optimizer)
        if len(losses) == 0 and any(
            not torch.equal(a, b)
            for a, b in zip(model.parameters(), twin.parameters(), strict=True)
        ):
            raise AssertionError("expected a step that overflowed to change nothing, got changes")
        scaler_.update()
        losses.append(float(loss.detach()))
    report.table(
        "60 steps", [{"first loss": losses[0], "last": losses[-1], "scale": scaler_.get_scale()}]
    )
    if not all(map(math.isfinite, losses)) or not all(
        bool(p.isfinite().all()) for p in model.parameters()
    ):
        raise AssertionError(f"expected finite losses and parameters, got {losses[-5:]}")
    if all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)):
        raise AssertionError("expected parameters to move once the scale has come down")


@part("smoke", 90)
def processes(report: Report) -> None:
    """Sharded by fully_shard and replicated by DDP over one process of NCCL: as unsharded."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    device = report.device
    if device.type == "cpu" and "RANK" not in os.environ:
        backend = "gloo"
    else:
        backend = "nccl"
        torch.cuda.set_device(0)
    with tempfile.NamedTemporaryFile() as file:
        distributed.init_process_group(backend, f"file://{file.name}", rank=0, world_size=1)
        try:
            model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
            factorize(model, rank=8)
            model.to(device)
            sharded, replicated = copy.deepcopy(model), copy.deepcopy(model)
            for layer in (sharded[0], sharded[2]):
                fully_shard(layer)
            fully_shard(sharded)
            runs = {
                "alone": model,
                "sharded": sharded,
                "replicated": nn.parallel.DistributedDataParallel(replicated),
            }
            x, labels = torch.randn(32, 96, device=device), torch.randint(10, (32,), device=device)
            ends = {}
            for name, one in runs.items():
                base = torch.optim.AdamW(one.parameters(), lr=1e-2, weight_decay=0.1)
                optimizer = FrobeniusDecay(base, one)
                for _ in range(5):
                    optimizer.zero_grad()
                    cross_entropy(one(x), labels).backward()
                    optimizer.step()
                ends[name] = [
                    p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
                    for p in one.parameters()
                ]
            rows = [
                {
                    "": name,
                    "error": max(
                        error(a, b.double()) for a, b in zip(ends[name], ends["alone"], strict=True)
                    ),
                    "allowed": 1e-5,
                }
                for name in ("sharded", "replicated")
            ]
            check(report, f"after five steps, by {backend}", rows)
        finally:
            distributed.destroy_process_group()


@part("smoke", 90)
def trainer(report: Report) -> None:
    """The Trainer of transformers in float16 with a fused AdamW, by the factory: one line."""
    try:
        import transformers
    except ImportError:
        report.note("skipped", ["transformers is not installed"])
        return
    import frobdecay

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    frobdecay.factorize(model, rank=8, include=["*.mlp.*_proj", "*.self_attn.*_proj"])
    ids = torch.randint(256, (1, 32)).expand(64, 32)
    examples = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = transformers.TrainingArguments(
            folder, max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3,
            weight_decay=0.1, fp16=report.device.type == "cuda", optim="adamw_torch_fused",
            use_cpu=report.device.type == "cpu", report_to=[], save_strategy="no",
            disable_tqdm=True, logging_steps=5,
        )  # fmt: skip
        run = transformers.Trainer(
            model,
            settings,
            train_dataset=examples,
            optimizer_cls_and_kwargs=(frobdecay.FrobeniusDecayFactory, {"args": settings}),
        )
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    report.table("loss", [{"": k, "loss": loss} for k, loss in enumerate(losses)])
    if not (math.isfinite(losses[-1]) and losses[-1] < losses[0]):
        raise AssertionError(f"expected the loss to fall, got {losses}")
