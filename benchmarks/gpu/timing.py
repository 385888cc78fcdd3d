"""How fast on a device, beside its limits and beside what one would do otherwise."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention, silu

from benchmarks import penalty, step
from benchmarks.cases import CASES, FRACTION
from benchmarks.gpu.parts import part
from benchmarks.measure import Report, Target, captured, interleave, precision, synchronize
from benchmarks.models import resnet
from frobdecay import FrobeniusDecay, factorize

__all__ = ["Block"]

Run = Callable[[], object]


def _interleaved(runs: dict[str, Run], device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds of each; on a CPU once or twice, to see that all of it runs."""
    on_cpu = device.type == "cpu"
    timings = interleave(
        runs, device, seconds=0.01 if on_cpu else seconds, rounds=1 if on_cpu else 5
    )
    return {name: timing.ms for name, timing in timings.items()}


def _options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"seconds": 0.5, "compile": False, "kind": "float32", **given})


def _penalty(report: Report, kind: str, names: tuple[str, ...], seconds: float = 0.5) -> None:
    on_cpu = report.device.type == "cpu"
    for name in ("tiny",) if on_cpu else names:
        options = _options(kind=kind, seconds=0.01 if on_cpu else seconds)
        penalty.compare(report, name, CASES[name], options)


@part("smoke", 60, alone=True)
def first_timing(report: Report) -> None:
    """The penalty of three models, before the fuller measurement."""
    _penalty(report, "float32", ("resnet110", "bert", "lora7b"), 0.1)


@part("measure", 60, alone=True)
def penalty_float32(report: Report) -> None:
    """The gradient of the penalty, float32 by IEEE."""
    _penalty(report, "float32", ("resnet110", "bert", "lora7b"))


@part("measure", 60, alone=True)
def penalty_tf32(report: Report) -> None:
    """The gradient of the penalty, float32 by TF32."""
    _penalty(report, "tf32", ("bert", "lora7b"))


@part("measure", 60, alone=True)
def penalty_bfloat16(report: Report) -> None:
    """The gradient of the penalty, bfloat16 factors and gradients."""
    _penalty(report, "bfloat16", ("bert", "lora7b"))


class Block(nn.Module):
    """A block of a Llama: attention and a gated feed-forward, without positions and caches.

    Args:
        width: of the stream.
        hidden: of the feed-forward.
        heads: of the attention.
        linear: makes a layer of n inputs and m outputs.
    """

    def __init__(
        self, width: int, hidden: int, heads: int, linear: Callable[[int, int], nn.Module]
    ) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (sequences, tokens, width) to the same."""
        y = rms_norm(x, x.shape[-1:])
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        y = rms_norm(x, x.shape[-1:])
        return x + self.down(silu(self.gate(y)) * self.up(y))


def _dense(n: int, m: int) -> nn.Module:
    return nn.Linear(n, m, bias=False)


def _pair(r: int) -> Callable[[int, int], nn.Module]:
    return lambda n, m: nn.Sequential(_dense(n, r), _dense(r, m))


def _blocks(device: torch.device) -> tuple[dict[str, nn.Module], int]:
    """The block in three ways, of Llama-7B's sizes on a GPU, in bfloat16; and its width."""
    sizes = (4096, 11008, 32) if device.type == "cuda" else (32, 48, 2)
    width, rank = sizes[0], sizes[0] // 4
    with device:
        models = {"dense": Block(*sizes, _dense), "pair": Block(*sizes, _pair(rank))}
        factored = Block(*sizes, _dense)
        factorize(factored, rank=rank, init="matched")
    models["factored"] = factored
    return {name: model.to(torch.bfloat16) for name, model in models.items()}, width


@part("measure", 100, alone=True)
def block(report: Report) -> None:
    """A factorized Llama block is as fast as one of hand-written pairs; compiled or not."""
    device, rows = report.device, []
    torch._dynamo.config.recompile_limit = 64  # one forward() in three ways, with and without grad
    models, width = _blocks(device)
    tokens = (
        {"2048 tokens": (1, 2048), "1 token": (1, 1)} if device.type == "cuda" else {"": (1, 4)}
    )
    for compiled in (False, True):
        if compiled:
            backend = "inductor" if device.type == "cuda" else "eager"
            models = {
                k: torch.compile(model, backend=backend, dynamic=False)
                for k, model in models.items()
            }  # type: ignore[misc]
        for title, shape in tokens.items():
            x = torch.randn(*shape, width, device=device, dtype=torch.bfloat16)
            runs: dict[str, Run] = {}
            for name, model in models.items():
                runs[f"{name}, forward"] = _forward(model, x)
                if shape[1] > 1:
                    runs[f"{name}, forward and backward"] = _both(model, x)
            ms = _interleaved(runs, device, 0.8)
            for what in dict.fromkeys(key.partition(", ")[2] for key in runs):
                row: dict[str, Any] = {"": f"{title}, {what}", "compiled": str(compiled)}
                row |= {f"{name}, ms": ms[f"{name}, {what}"] for name in models}
                row["÷ pair"] = ms[f"factored, {what}"] / ms[f"pair, {what}"]
                row["÷ dense"] = ms[f"factored, {what}"] / ms[f"dense, {what}"]
                # seven layers: what each adds to a hand-written pair, for the host
                row["added, µs a layer"] = 1e3 * (ms[f"factored, {what}"] - ms[f"pair, {what}"]) / 7
                rows.append(row)
                if compiled and shape[1] > 1:
                    about = f"block, compiled, {what} ÷ pair"
                    report.targets.append(Target(about, row["÷ pair"], 1.05))
    report.table("a Llama-7B block in bfloat16, r = width/4", rows)


def _forward(model: nn.Module, x: Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def _both(model: nn.Module, x: Tensor) -> Run:
    params = list(model.parameters())
    given = torch.randn_like(x)
    return lambda: torch.autograd.grad(model(x), params, given)


@part("measure", 60, alone=True)
def step_16k(report: Report) -> None:
    """What the decay adds to a step on 16 384 tokens: BERT-base's linear layers, r = 192."""
    device = report.device
    small = device.type == "cpu"
    tokens, layers, width = (64, 1, 32) if small else (16384, 12, 768)
    rows = []
    for title, dtype, setting in (
        ("float32 factors, TF32, autocast to bfloat16", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        model = nn.Sequential(*(step.Layer(width) for _ in range(layers)))
        factorize(model, rank=width // 4, init="matched")
        model.to(device, dtype)
        x = torch.randn(tokens, width, device=device, dtype=dtype)
        twin = copy.deepcopy(model)

        def base(one: nn.Module) -> torch.optim.Optimizer:
            options = {"lr": 1e-5, "weight_decay": 1e-2}
            cuda = {"fused": True, "capturable": True} if device.type == "cuda" else {}
            return torch.optim.AdamW(one.parameters(), **options, **cuda)

        plain, ours = base(model), FrobeniusDecay(base(twin), twin)

        def loss(one: nn.Module, x: Tensor = x, dtype: torch.dtype = dtype) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
                found: Tensor = one(x).square().mean()
            return found

        with precision(setting):
            runs: dict[str, Run] = {}
            for name, one, optimizer in (
                ("weight decay", model, plain),
                ("Frobenius decay", twin, ours),
            ):
                runs[name] = step.whole_step(one, loss, optimizer)
                runs[f"{name}, step() alone"] = optimizer.step
                runs[f"{name}, replayed"] = captured(runs[name], device, optimizer)
            # a graph's gradients are its own: eager steps between replays make others, and no harm
            ms = _interleaved(runs, device, 1.5)
        # of the host's time, in Python, and of the device's, in a CUDA graph
        called = ms["Frobenius decay, step() alone"] - ms["weight decay, step() alone"]
        replayed = ms["Frobenius decay, replayed"] - ms["weight decay, replayed"]
        shares = {
            "added, called, %": 100 * called / ms["weight decay"],
            "added, replayed, %": 100 * replayed / ms["weight decay, replayed"],
        }
        rows.append({"": title, **{f"{k}, ms": v for k, v in ms.items()}, **shares})
        for name, share in shares.items():
            what = f"16k tokens, {title}, {name.removesuffix(', %')}"
            report.targets.append(Target(what, share, 1.0, unit="%"))
    report.table(f"{layers} layers, {tokens} tokens", rows)


@part("measure", 60, alone=True)
def training_step(report: Report) -> None:
    """A whole training step of a factorized ResNet-110, called and replayed from a CUDA graph."""
    device = report.device
    small = device.type == "cpu"
    model = resnet(8 if small else 110)
    factorize(model, rank=FRACTION, exclude=["conv1", "fc"])
    images = torch.randn(2 if small else 128, 3, 32, 32, device=device)
    labels = torch.randint(10, (len(images),), device=device)
    runs: dict[str, Run] = {}
    for name in ("weight decay", "Frobenius decay"):
        own = copy.deepcopy(model).to(device)
        sgd = torch.optim.SGD(own.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        optimizer: Any = FrobeniusDecay(sgd, own) if name != "weight decay" else sgd

        runs[name] = step.whole_step(own, lambda one: cross_entropy(one(images), labels), optimizer)
        runs[f"{name}, replayed"] = captured(runs[name], device)
        runs[f"{name}, step() alone"] = optimizer.step
    # a graph's gradients are its own: an eager step between replays makes others, and no harm
    ms = _interleaved(runs, device, 2.0)
    report.table("ms", [{"": key, "ms": value} for key, value in ms.items()])
    for how in ("", ", replayed"):
        ratio = ms[f"Frobenius decay{how}"] / ms[f"weight decay{how}"]
        report.targets.append(Target(f"ResNet-110 step{how}, wrapped ÷ plain", ratio, 1.05))


@part("measure", 120, alone=True)
def factorization(report: Report) -> None:
    """A 7B-shaped model is factorized on the device, layer by layer, exactly and randomized."""
    device, rows = report.device, []
    small = device.type == "cpu"
    sizes = (32, 48, 2) if small else (4096, 11008, 32)
    layers = 1 if small else 32
    for init in ("randomized", "spectral"):
        done, begin = 0, time.perf_counter()
        peak = 0
        while done < layers and time.perf_counter() - begin < (0.1 if small else 25):
            with device:
                model = Block(*sizes, _dense).to(torch.bfloat16)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            factorize(model, rank=sizes[0] // 4, init=init)
            synchronize(device)
            seconds = time.perf_counter() - start
            if device.type == "cuda":
                peak = max(peak, torch.cuda.max_memory_allocated() - before)
            done += 1
            rows.append(
                {
                    "": init,
                    "block": done,
                    "seconds": seconds,
                    "peak above the block, MiB": peak / 2**20,
                }
            )
            del model
        mean = sum(row["seconds"] for row in rows if row[""] == init) / done
        whole = f"{layers * mean:.0f} s for {layers} blocks" + (
            ", extrapolated" if done < layers else ""
        )
        report.note(init, [f"{init}: {mean:.2f} s a block, {done} of {layers} measured: {whole}"])
    report.table("blocks of Llama-7B in bfloat16, random weights, r = 1024", rows)
