"""A model's life on a device: initialization, calibration, optimizers' states, numbers, files.

Each part does the same on the CPU and compares. On a CPU everything runs in small.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import frobdecay
from benchmarks.gpu.features import chains, new_gradients
from benchmarks.gpu.kernels import check, error
from benchmarks.gpu.parts import part
from benchmarks.measure import Report
from frobdecay import (
    CP,
    Calibration,
    FrobeniusDecay,
    LowRank,
    Product,
    TensorTrain,
    Tucker,
    factorize,
    products,
)

# --- initialization, calibrated and not -----------------------------------------------------------


def _images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def _tokens() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(64, 32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16), nn.Linear(16, 32)
    )


def _batches(device: str) -> dict[str, list[Any]]:
    """Of both models; those of tokens have padding."""
    torch.manual_seed(1)
    images = [torch.randn(16, 4, 8, 8) * torch.arange(1, 9) for _ in range(4)]
    ids = [torch.randint(64, (16, 12)).clamp_max(50) for _ in range(4)]
    mask = (torch.arange(12) < torch.randint(4, 12, (16, 1))).long()
    moved = [{"input": one.to(device), "attention_mask": mask.to(device)} for one in ids]
    return {"images": [image.to(device) for image in images], "tokens": moved}


def _run(model: nn.Module, batch: Any) -> Any:
    """A forward pass on a batch from anywhere."""
    device = next(model.parameters()).device
    return model((batch["input"] if isinstance(batch, dict) else batch).to(device))


@part("smoke", 60)
def calibration(report: Report) -> None:
    """Calibrated factors of a model on the device are those on the CPU, wherever the data is."""
    torch.backends.cudnn.allow_tf32 = False
    here, rows = report.device.type, []
    ways: dict[str, tuple[str, Any, int, str]] = {
        "batches of the CPU": ("cpu", None, 1, here),
        "batches of the device": (here, None, 1, here),
        "sums on the CPU": (here, "cpu", 1, "cpu"),
        "two passes": ("cpu", None, 2, "cpu"),
    }
    for name, make in (("images", _images), ("tokens", _tokens)):

        def calibrated(
            device: str, data: str, at: Any, groups: int, make: Any = make, name: str = name
        ) -> tuple[Tensor, set[str]]:
            model, batches = make().to(device), _batches(data)[name]
            stats = frobdecay.calibrate(
                model, batches, _run, groups=groups, stats=Calibration(device=at)
            )
            places = {moment.second.device.type for moment in stats.sums.moments.values()}
            channel = partial(LowRank, pattern="channel")
            factorize(model, rank=6, init=stats, parametrization=channel)
            with torch.no_grad():
                return _run(model, batches[0]).double().cpu(), places

        wanted, _ = calibrated("cpu", "cpu", None, 1)
        for way, (data, at, groups, place) in ways.items():
            found, places = calibrated(here, data, at, groups)
            row = {"": name, "way": way, "error": error(found, wanted), "allowed": 1e-4}
            rows.append(row)
            if places != {place}:
                raise AssertionError(f"{name}, {way}: expected moments on {place}, got {places}")
    check(report, "outputs, relative to those of the CPU", rows)


@torch.no_grad()
def _fall_off(model: nn.Module) -> nn.Module:
    """Give all weights singular values that fall off, so that a sketch finds them."""
    for param in model.parameters():
        for axis, n in enumerate(param.shape if param.ndim > 1 else ()):
            shape = [-1 if k == axis else 1 for k in range(param.ndim)]
            param *= (0.8 ** torch.arange(n, dtype=torch.float32)).clamp_min(1e-4).view(shape)
    return model


@part("smoke", 60)
def initialization(report: Report) -> None:
    """Factors that are found on the device multiply to what those of the CPU do; so do merged."""
    rows = []
    kinds: dict[str, tuple[dict[str, Any], float]] = {
        "spectral": ({"rank": 4}, 1e-4),
        "randomized": ({"rank": 4, "init": "randomized"}, 1e-2),
        "a budget": ({"ratio": 0.3, "include": ["2", "5"]}, 1e-4),
        "depth": ({"rank": 4, "parametrization": partial(LowRank, depth=1)}, 1e-4),
        "Tucker": ({"rank": 4, "parametrization": Tucker}, 1e-4),
        "Tucker, HOOI": ({"rank": 4, "parametrization": Tucker, "init": "hooi"}, 1e-4),
        "tensor train": ({"rank": 4, "parametrization": TensorTrain}, 1e-4),
        "CP": ({"rank": 2, "parametrization": CP, "include": ["2", "5"]}, 1e-2),
    }
    for title, (options, allowed) in kinds.items():
        for dtype in (torch.float32, torch.bfloat16):
            here, there = (
                _fall_off(_images()).to(device, dtype) for device in (report.device, "cpu")
            )
            ranks = [factorize(model, **options).ranks for model in (here, there)]
            if ranks[0] != ranks[1]:
                raise AssertionError(f"{title}: expected equal ranks, got {ranks}")
            frobdecay.merge(here), frobdecay.merge(there)
            pairs = zip(here.parameters(), there.parameters(), strict=True)
            errors = [error(a.cpu(), b.double()) for a, b in pairs]
            row = {"": title, "dtype": str(dtype)[6:], "error": max(errors)}
            rows.append(row | {"allowed": allowed if dtype == torch.float32 else 1e-2})
    check(report, "dense weights, relative to those of the CPU", rows)


# --- optimizers' states, numbers, files -----------------------------------------------------------

STATES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "AdamW, capturable": lambda params: torch.optim.AdamW(
        params, lr=1e-3, capturable=params[0].is_cuda
    ),
}


def _train(model: nn.Module, optimizer: Any, batches: Sequence[Any]) -> None:
    for x in batches:
        device = next(model.parameters()).device
        labels = torch.arange(len(x), device=device) % 10
        optimizer.zero_grad()
        cross_entropy(model(x.to(device)), labels).backward()
        optimizer.step()


@part("smoke", 60)
def carrying(report: Report) -> None:
    """What optimizers remember of dense weights is carried over on the device, as on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    batches, rows = _batches("cpu")["images"], []
    for name, make in STATES.items():
        ends = []
        for device in (report.device, torch.device("cpu")):
            model = _images().to(device)
            base = make(list(model.parameters()))
            _train(model, base, batches[:2])
            places = {k: t.device.type for k, t in base.state[model[5].weight].items()}
            factorize(model, rank=4, include=["2", "5"], optimizer=base)
            for param in model.parameters():
                state = base.state[param]
                found = {key: t.device.type for key, t in state.items()}
                finite = all(bool(t.isfinite().all()) for t in state.values())
                if found != places or not finite:
                    raise AssertionError(
                        f"{name}: expected finite states on {places}, got {found}, finite: {finite}"
                    )
            optimizer = FrobeniusDecay(base, model, decay=1e-3)
            _train(model, optimizer, batches[2:])
            with torch.no_grad():
                ends.append(model(batches[0].to(device)).double().cpu())
        # where a gradient is next to nothing, its sign alone decides how Adam moves
        allowed = 1e-3 if name == "SGD" else 2e-2
        rows.append({"": name, "error": error(*ends), "allowed": allowed})
    check(report, "outputs after two more steps, relative to those of the CPU", rows)


def _measurable(device: torch.device) -> tuple[nn.Module, list[Product]]:
    """Products of all kinds, one of which decays toward what it was."""
    torch.manual_seed(0)
    model = nn.Sequential(*_images(), nn.MultiheadAttention(32, 4))
    factorize(model, rank=4, include=["0", "5"])
    factorize(model, rank=4, include="2", parametrization=Tucker)
    factorize(model, rank=4, include="7", parametrization=partial(LowRank, depth=1))
    model.to(device)
    kept = products(model, include="7.weight", toward="initial")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.05 * torch.randn(param.shape, generator=noise).to(device)
    return model, [*products(model, exclude="7.weight"), *kept]


@part("smoke", 60)
def measuring(report: Report) -> None:
    """Norms, penalties, measurements and a recorder's history on the device are the CPU's."""
    found: list[dict[str, float]] = []
    for device in (report.device, torch.device("cpu")):
        model, held = _measurable(device)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = FrobeniusDecay(base, held, decay=1e-2)
        numbers = frobdecay.diagnostics.measure(held, optimizer).as_dict()
        recorder = frobdecay.diagnostics.Recorder(held)
        norms = frobdecay.diagnostics.Recorder(held, quantities=["norm"])
        for one in (recorder, norms):
            one.step(optimizer)
            numbers |= {
                f"{len(one.quantities)} recorded/{name}/{quantity}": values[-1]
                for name, table in one.history.items()
                for quantity, values in table.items()
            }
        for product in held:
            numbers[f"norm/{product.name}"] = float(frobdecay.product_norm(product).detach())
        numbers["penalty"] = float(frobdecay.penalty(held, 0.5).detach())
        found.append(numbers)
    here, there = found
    if here.keys() != there.keys():
        raise AssertionError(f"expected equal names, got {here.keys() ^ there.keys()}")
    rows = []
    for name, number in there.items():
        both_nan = number != number and here[name] != here[name]
        gap = 0.0 if both_nan else abs(here[name] - number) / max(abs(number), 1e-2)
        rows.append({"": name, "here": here[name], "CPU": number, "error": gap, "allowed": 1e-5})
    rows.sort(key=lambda row: -row["error"])
    check(report, f"the worst of {len(rows)} numbers", rows[:12])


def _normalized() -> nn.Module:
    return nn.Sequential(*_images()[:2], nn.BatchNorm2d(16), *_images()[2:])


@part("smoke", 60)
def files(report: Report) -> None:
    """A model on the device is saved, loaded, merged and resumed with the numbers that it had."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    device = report.device
    model = _normalized().to(device)
    dense = copy.deepcopy(model)
    factorize(model, rank=4, include=["0", "6"])
    factorize(model, rank=4, include="3", parametrization=Tucker)
    x = _batches(str(device))["images"][0]
    model(x)  # moves the statistics
    with torch.no_grad():
        wanted, rows = model.eval()(x).double(), []
        if find_spec("safetensors") is None:
            report.note("skipped", ["saving and loading: safetensors is not installed"])
        else:
            for title, loaded in _loaded(model, dense):
                found = loaded.to(device).eval()(x)
                rows.append({"": title, "error": error(found, wanted), "allowed": 1e-6})
        merged = frobdecay.merge(copy.deepcopy(model))
        _check_places("merged", merged, device.type)
        rows.append({"": "merged", "error": error(merged(x), wanted), "allowed": 1e-4})
        frobdecay.load_dense_(model, merged.state_dict())
        rows.append({"": "dense again", "error": error(model(x), wanted), "allowed": 1e-4})
    check(report, "outputs", rows)
    _resumed(device)


def _loaded(model: nn.Module, dense: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model that was saved, loaded into dense ones here and there."""
    with torch.device("meta"):
        nowhere = _normalized()
    fresh = {"on the device": dense, "on the CPU": copy.deepcopy(dense).cpu(), "meta": nowhere}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        frobdecay.save_factorized(model, path)
        for title, one in fresh.items():
            place = next(one.parameters()).device.type
            frobdecay.load_factorized(one, path)
            _check_places(title, one, "cpu" if place == "meta" else place)
            yield title, one


def _check_places(title: str, model: nn.Module, place: str) -> None:
    found = {tensor.device.type for tensor in model.state_dict().values()}
    if found != {place}:
        raise AssertionError(f"{title}: expected all tensors on {place}, got {found}")


def _resumed(device: torch.device) -> None:
    """Stochastic rounding goes on bit for bit from a checkpoint, wherever that was mapped to."""
    ends = []
    for mapped in (None, "cpu", device):
        model, optimizer = _rounded(device)
        for step in range(4):
            if step == 2 and mapped is not None:
                with tempfile.TemporaryFile() as file:
                    torch.save((model.state_dict(), optimizer.state_dict()), file)
                    file.seek(0)
                    weights, state = torch.load(file, map_location=mapped, weights_only=True)
                model, optimizer = _rounded(device)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
            torch.manual_seed(step)
            new_gradients(model)
            optimizer.step()
        ends.append([param.detach().clone() for param in model.parameters()])
    for one in ends[1:]:
        if not all(torch.equal(a, b) for a, b in zip(ends[0], one, strict=True)):
            raise AssertionError("expected equal bits after resuming, got others")


def _rounded(device: torch.device) -> tuple[nn.Module, FrobeniusDecay]:
    model = chains(device, torch.bfloat16)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return model, FrobeniusDecay(base, model, bound=0.5)
