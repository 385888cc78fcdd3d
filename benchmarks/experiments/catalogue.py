"""Every experiment: what the paper says, its arms, and its presets.

``paper`` has the published hyperparameters. ``cpu`` is a protocol for two cores and about an hour,
``gpu`` one for a few minutes on a large GPU; what they change is said in ``changes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.experiments.engine import Job
from benchmarks.experiments.images import Arm, ImageTrial, Protocol

__all__ = ["EXPERIMENTS", "Experiment", "jobs"]


@dataclass(frozen=True)
class Experiment:
    """One table of the paper.

    Attributes:
        title: for the page of results.
        claim: what the paper says, to be held against the table.
        arms: key -> arm, in the table's order.
        presets: name -> variant -> protocol; a variant is a column group such as a ratio.
        changes: preset -> what differs from the paper.
        baseline: the arm that others are compared with, seed by seed.
        score: what the numbers are.
    """

    title: str
    claim: str
    arms: Mapping[str, Arm]
    presets: Mapping[str, Mapping[str, Protocol]]
    changes: Mapping[str, str]
    baseline: str = "lowrank"
    score: str = "test accuracy, %"


def jobs(name: str, preset: str, seeds: int, arms: list[str] | None, **changes: Any) -> list[Job]:
    """The trials of an experiment, seed by seed.

    Args:
        name: key in ``EXPERIMENTS``.
        preset: of its protocols.
        seeds: how many, from 0.
        arms: some of its arms; all unless given.
        changes: fields of the protocol to replace.

    Raises:
        ValueError: unknown arms.
    """
    experiment = EXPERIMENTS[name]
    chosen = arms or list(experiment.arms)
    if unknown := set(chosen) - set(experiment.arms):
        raise ValueError(f"expected arms among {list(experiment.arms)}, got {sorted(unknown)}")
    found: list[Job] = []
    for seed in range(seeds):
        for variant, protocol in experiment.presets[preset].items():
            protocol = replace(protocol, **changes)
            found += [_job(experiment.arms[key], key, variant, seed, protocol) for key in chosen]
    return found


def _job(arm: Arm, key: str, variant: str, seed: int, protocol: Protocol) -> Job:
    def name(arm_key: str) -> str:
        return f"{variant}-{arm_key}-{seed}"

    source = arm.norms_of and name(arm.norms_of)
    make = partial(ImageTrial, arm=arm, seed=seed, protocol=protocol, key=name(key), norms=source)
    about = {"arm": key, "label": arm.label, "variant": variant, "seed": seed}
    return Job(name(key), make, protocol.epochs, (source,) if source else (), about)


_GRID = {
    "dense": Arm("dense", "dense"),
    "lowrank": Arm("low-rank"),
    "si": Arm("low-rank + SI", init="spectral"),
    "fd": Arm("low-rank + FD", decay="frobenius"),
    "sifd": Arm("low-rank + SI & FD", init="spectral", decay="frobenius"),
}

CIFAR, JPEG = "cifar-10-python.tar.gz", "cifar10_jpeg.npz"
_SMALL = Protocol(JPEG, "resnet20", epochs=12, weight_decay=5e-4, batch=64, limit=5000)
_GPU = Protocol(JPEG, "resnet20", epochs=30, device="cuda")

EXPERIMENTS: Mapping[str, Experiment] = {
    "compression": Experiment(
        "Compression (Table 1)",
        "SI and FD together bring a low-rank network of a tenth of the parameters close to the "
        "dense one (93.59 plain, 94.34 with both, 94.49 dense on CIFAR-10, second-hand), above "
        "unstructured sparsity at equal size; one of them alone may be below plain.",
        {**_GRID, "pruned": Arm("magnitude pruning", "pruned")},
        {
            "paper": {
                f"{model} {ratio:g}": Protocol(CIFAR, model, ratio, weight_decay=decay)
                for model, decay in (("resnet32x2", 1e-4), ("vgg19", 2e-4))
                for ratio in (0.02, 0.05, 0.1)
            },
            "cpu": {"resnet20 0.1": replace(_SMALL, ratio=0.1)},
            "gpu": {"resnet32x2 0.1": replace(_GPU, model="resnet32x2", ratio=0.1)},
        },
        {
            "cpu": "ResNet-20 for ResNet-32x2 and VGG-19, 5,000 images, 12 epochs for 200, batch "
            "64, λ 5e-4 for 1e-4, JPEG images",
            "gpu": "30 epochs for 200, JPEG images",
        },
    ),
    "distillation": Experiment(
        "Over-complete training, collapsed (Table 3)",
        "Deep and wide networks, trained with FD and collapsed to the size of the plain one, "
        "reach a higher accuracy than the plain network.",
        {
            "dense": Arm("plain", "dense"),
            "deep": Arm("deep", "deep", "spectral", rank=1.0),
            "deepfd": Arm("deep + FD", "deep", "spectral", "frobenius", rank=1.0),
            "wide": Arm("wide, 3×", "lowrank", "kaiming", rank=3.0),
            "widefd": Arm("wide, 3× + FD", "lowrank", "kaiming", "frobenius", rank=3.0),
        },
        {
            "paper": {
                f"resnet{depth}": Protocol(CIFAR, f"resnet{depth}", warmup=warmup)
                for depth, warmup in ((32, None), (56, 0.01), (110, 0.01))
            },
            "cpu": {"resnet20": _SMALL},
            "gpu": {"resnet32": replace(_GPU, model="resnet32")},
        },
        {
            "cpu": "ResNet-20 for ResNet-32, 56 and 110, 5,000 images, 12 epochs for 200, batch "
            "64, λ 5e-4 for 1e-4, JPEG images",
            "gpu": "ResNet-32 alone, 30 epochs for 200, JPEG images",
        },
        baseline="dense",
    ),
    "why": Experiment(
        "Why it works (Figure 1, Claim 3.1)",
        "Weight decay on the factors meets its bound, the nuclear norm; FD acts through the "
        "effective step size lr/‖W‖²: a run without decay whose norms are set to those of the FD "
        "run does as well as the FD run.",
        {
            **{key: _GRID[key] for key in ("lowrank", "fd", "si", "sifd")},
            "none": Arm("low-rank + SI, no decay", init="spectral", decay="none"),
            "normalized": Arm(
                "low-rank + SI, no decay, norms of SI & FD",
                init="spectral",
                decay="normalized",
                norms_of="sifd",
            ),
        },
        {
            "paper": {
                f"λ {decay:g}": Protocol(CIFAR, "resnet20", 0.2367, weight_decay=decay)
                for decay in (5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3)
            },
            "cpu": {
                f"λ {decay:g}": replace(_SMALL, ratio=0.2367, weight_decay=decay)
                for decay in (5e-5, 5e-4, 5e-3)
            },
            "gpu": {
                f"λ {decay:g}": replace(_GPU, ratio=0.2367, weight_decay=decay)
                for decay in (5e-5, 5e-4, 5e-3)
            },
        },
        {
            "cpu": "5,000 images, 12 epochs for 200, batch 64, three λ for seven, JPEG images",
            "gpu": "30 epochs for 200, three λ for seven, JPEG images",
        },
    ),
}
