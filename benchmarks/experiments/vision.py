"""The experiments on images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from benchmarks.experiments.experiment import Claim, Experiment
from benchmarks.experiments.images import ImageArm, ImageProtocol, ImageTrial

__all__ = ["VISION"]

_Experiment = partial(Experiment, trial=ImageTrial, score="test accuracy, %")


_GRID = {
    "lowrank": ImageArm(label="low-rank"),
    "si": ImageArm(label="low-rank + SI", init="spectral"),
    "fd": ImageArm(label="low-rank + FD", decay="frobenius"),
    "sifd": ImageArm(label="low-rank + SI & FD", init="spectral", decay="frobenius"),
}
_DENSE = ImageArm(label="dense", kind="dense", blind=("ratio", "scales"))

CIFAR, CIFAR_100, JPEG = "cifar-10-python.tar.gz", "cifar-100-python.tar.gz", "cifar10_jpeg.npz"
TINY = "tiny-imagenet-200.npz"
"""Tiny-ImageNet, for the lack of a common format as the four arrays of benchmarks/data.py."""

_SETS = {"CIFAR-10": CIFAR, "CIFAR-100": CIFAR_100, "Tiny-ImageNet": TINY}
_DECAY = {"resnet32x2": 1e-4, "vgg19": 2e-4}
_COMPRESSION = {  # model, data -> ratio -> the scale of ranks that comes to it
    ("resnet32x2", "CIFAR-10"): {0.02: 0.00879, 0.05: 0.02393, 0.1: 0.04785},
    ("resnet32x2", "CIFAR-100"): {0.02: 0.00732, 0.05: 0.02197, 0.1: 0.04688},
    ("resnet32x2", "Tiny-ImageNet"): {0.05: 0.02051, 0.1: 0.04541, 0.15: 0.06934},
    ("vgg19", "CIFAR-10"): {0.02: 0.00928, 0.05: 0.02368, 0.1: 0.04761},
    ("vgg19", "CIFAR-100"): {0.02: 0.0083, 0.05: 0.02271, 0.1: 0.04688},
    ("vgg19", "Tiny-ImageNet"): {0.02: 0.00708, 0.05: 0.02148, 0.1: 0.0459},
}
_TENSORS = {
    1 / 60: {"lowrank": 0.00757, "train": 0.234, "tucker": 0.211},
    1 / 15: {"lowrank": 0.03198, "train": 0.705, "tucker": 0.68},
}

_SMALL = ImageProtocol(
    data=JPEG,
    model="resnet20",
    epochs=6,
    batch=64,
    lr=0.03,
    weight_decay=5e-4,
    limit=5000,
    channels_last=True,
)
_ON_CPU = (
    "5,000 images, batch 64 for 128 and lr 0.03 for 0.1 (of the two the better one for the dense "
    "network's validation), JPEG images"
)
_TRAINED = ImageProtocol(
    data=JPEG,
    model="resnet8x2",
    side=16,
    ratio=0.1,
    epochs=20,
    lr=0.1,
    cosine=True,
    weight_decay=2e-3,
    limit=10_000,
    channels_last=True,
)
"""Long enough, with a λ large enough, for decay to act: D is 1.6."""
_AS_TRAINED = (
    "ResNet-8 of width 32, 10,000 JPEG images averaged down to 16×16, 20 epochs with lr 0.1 along "
    "a cosine"
)
_FASHION = ImageProtocol(
    data="fashion_mnist.npz",
    model="resnet8",
    ratio=0.1,
    epochs=6,
    lr=0.1,
    cosine=True,
    weight_decay=1e-3,
    channels_last=True,
)
"""All of its 54,000 training images, at full size: D is 1.3."""
_RATIOS = (0.1, 0.3, 0.05)
_LAMBDAS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
_FEW = "cifar10_small_jpeg.npz"
_FEW_TESTED = "tested on 2,000"
_GPU = ImageProtocol(
    data=JPEG,
    model="resnet20",
    epochs=30,
    batch=512,
    lr=0.4,
    warmup=0.1,
    weight_decay=5e-4,
    device="cuda",
    precision="bfloat16",
    graph=True,
    channels_last=True,
)
_ON_GPU = (
    "JPEG images, 30 epochs for 200, batch 512 and lr 0.4 for 128 and 0.1, the first epoch "
    "at 0.1, λ 5e-4, bfloat16, replayed from CUDA graphs"
)


def _tensor_arms() -> dict[str, ImageArm]:
    kinds = {"lowrank": "low-rank", "tucker": "Tucker", "train": "tensor train"}
    decays = {"plain": "", "scaled": "scaled decay", "frobenius": "FD"}
    arms = {"dense": _DENSE}
    for kind, name in kinds.items():
        plain = "kaiming" if kind == "lowrank" else "matched"
        for init, shown in ((plain, ""), ("spectral", "SI")):
            for decay, said in decays.items():
                label = " + ".join([name, " & ".join(filter(None, (shown, said)))]).rstrip(" +")
                key = "-".join(filter(None, (kind, shown.lower(), decay)))
                arms[key] = ImageArm(label=label, kind=kind, init=init, decay=decay)
    return arms


_WIDE = {"milestones": (0.3, 0.6, 0.8), "gamma": 0.2, "weight_decay": 5e-4, "cutout": 16}
_DRAWN = "tensors without SI are drawn as Gaussian factors"

VISION: Mapping[str, Experiment] = {
    "compression": _Experiment(
        "Compression (Table 1)",
        "SI and FD together bring a low-rank network of a tenth of the parameters close to the "
        "dense one (93.59 plain, 94.34 with both, 94.49 dense on CIFAR-10, second-hand), above "
        "unstructured sparsity at equal size; one of them alone may be below plain.",
        {
            "dense": _DENSE,
            **_GRID,
            "matched": ImageArm(label="low-rank, of the dense norm", init="matched"),
            "matchedfd": ImageArm(
                label="low-rank, of the dense norm + FD", init="matched", decay="frobenius"
            ),
            "pruned": ImageArm(label="magnitude pruning", kind="pruned"),
        },
        {
            "paper": {
                f"{model} {name} {ratio:g}": ImageProtocol(
                    data=_SETS[name],
                    model=model,
                    ratio=ratio,
                    scales={"lowrank": scale},
                    weight_decay=_DECAY[model],
                )
                for (model, name), scales in _COMPRESSION.items()
                for ratio, scale in scales.items()
            },
            "cpu": {
                f"{model} 0.1": replace(_SMALL, model=model, ratio=0.1, epochs=5)
                for model in ("resnet20", "vgg19-16")
            },
            "gpu": {"resnet32x2 0.1": replace(_GPU, model="resnet32x2", ratio=0.1)},
            "small": {f"resnet8x2 {ratio:g}": replace(_TRAINED, ratio=ratio) for ratio in _RATIOS},
            "fashion": {"resnet8 0.1": _FASHION},
        },
        {
            "cpu": "ResNet-20 for ResNet-32x2, VGG-19 with a quarter of its channels, both at 0.1 "
            f"alone, 5 epochs for 200, λ 5e-4 for 1e-4 and 2e-4, {_ON_CPU}",
            "gpu": f"ResNet-32x2 at 0.1 alone, {_ON_GPU}",
            "small": f"{_AS_TRAINED}, λ that of the dense network's best validation",
            "fashion": "ResNet-8 and Fashion-MNIST, 6 epochs with lr 0.1 along a cosine, λ 1e-3",
        },
        claims=[
            Claim("low-rank with SI & FD is better than plain low-rank", "sifd", "lowrank"),
            Claim("with SI & FD it is within a point of the dense network", "sifd", "dense", 1.0),
            Claim("SI & FD is better than SI alone", "sifd", "si"),
            Claim("SI & FD is better than FD alone", "sifd", "fd"),
            Claim("SI alone is below plain low-rank (one cell of Table 1)", "lowrank", "si"),
            Claim("FD alone is below plain low-rank (one cell of Table 1)", "lowrank", "fd"),
            Claim("SI & FD is better than unstructured sparsity of that size", "sifd", "pruned"),
            Claim("SI is better than random factors of the dense norm", "si", "matched"),
            Claim("FD helps random factors of the dense norm", "matchedfd", "matched"),
            Claim("SI & FD is better than FD on those", "sifd", "matchedfd"),
        ],
    ),
    "rates": _Experiment(
        "Learning rate and λ of the dense network",
        "Nothing: here lr and λ are chosen that all arms of the other experiments are given.",
        {"dense": _DENSE},
        {
            "small": {
                f"lr {lr:g}, λ {decay:g}": replace(_TRAINED, lr=lr, weight_decay=decay)
                for lr in (0.05, 0.1, 0.2)
                for decay in (1e-3, 2e-3, 4e-3)
            }
        },
        {"small": _AS_TRAINED},
        baseline="dense",
    ),
    "transfer": _Experiment(
        "λ carried over from the dense network",
        "With FD the coefficient of the dense recipe is left unchanged. Asked here: is the λ that "
        "is best for the dense network best for SI & FD, and is that of plain decay another?",
        {"dense": _DENSE, **_GRID},
        {"small": {f"λ {decay:g}": replace(_TRAINED, weight_decay=decay) for decay in _LAMBDAS}},
        {"small": _AS_TRAINED},
        along="weight_decay",
        claims=[
            Claim(
                "the dense network's λ costs SI & FD at most half a point against its own best",
                "sifd",
                None,
                0.5,
                tuned="regret",
            ),
            Claim(
                "and costs low-rank + SI with plain decay more than that",
                "sifd",
                "si",
                tuned="regret",
            ),
            Claim(
                "at the dense network's λ SI & FD is better than SI",
                "sifd",
                "si",
                tuned="reference",
            ),
            Claim("so it is where each has its own best λ", "sifd", "si", tuned="own"),
            Claim("SI & FD is then better than plain low-rank", "sifd", "lowrank", tuned="own"),
            Claim("FD without SI is not above plain low-rank", "lowrank", "fd", tuned="own"),
        ],
    ),
    "warmup": _Experiment(
        "Train dense first, then factorize",
        "(Pufferfish, Cuttlefish; not in this paper.) A network that was trained dense for a while "
        "before it is factorized is better than one that was factorized from the start.",
        {
            "dense": _DENSE,
            "si": _GRID["si"],
            "sifd": _GRID["sifd"],
            **{
                f"warm{key}{percent}": replace(
                    _GRID[key], label=f"{percent} % dense, then {_GRID[key].label}", warm=share
                )
                for percent, share in ((25, 0.25), (50, 0.5))
                for key in ("si", "sifd")
            },
        },
        {"small": {"resnet8x2 0.1": _TRAINED}},
        {"small": _AS_TRAINED},
        baseline="si",
        claims=[
            Claim(
                "a quarter of dense training first is better, with SI & FD", "warmsifd25", "sifd"
            ),
            Claim("so is a half", "warmsifd50", "sifd"),
            Claim("FD helps what was trained dense first", "warmsifd25", "warmsi25"),
        ],
    ),
    "tensors": _Experiment(
        "Tensor decompositions (Table 2)",
        "SI and FD, carried over to Tucker and tensor train decompositions, help those, too; at "
        "small sizes low-rank weights with both are above the tensors.",
        _tensor_arms(),
        {
            "paper": {
                f"wrn28-10 {ratio:g}": ImageProtocol(
                    data=CIFAR, model="wrn28-10", ratio=ratio, scales=scales, **_WIDE
                )
                for ratio, scales in _TENSORS.items()
            },
            "cpu": {
                "wrn10-2 0.0667": replace(
                    _SMALL,
                    data=_FEW,
                    channels_last=False,  # torch 2.13 aborts in it at rank 1: docs/semantics.md
                    model="wrn10-2",
                    ratio=1 / 15,
                    epochs=4,
                    batch=32,
                    limit=1000,
                    **_WIDE,
                )
            },
            "gpu": {"wrn16-4 0.0667": replace(_GPU, model="wrn16-4", ratio=1 / 15, **_WIDE)},
        },
        {
            "paper": f"{_DRAWN}; a Tucker core is itself, not a redundant tensor train",
            "cpu": "WRN-10-2 at 0.0667 for WRN-28-10 at 0.0167 and 0.0667, 4 epochs for 200, 1,000 "
            f"images, batch 32 for 128, lr 0.03 for 0.1, JPEG images, {_FEW_TESTED}; {_DRAWN}",
            "gpu": f"WRN-16-4 at 0.0667 for WRN-28-10 at 0.0167 and 0.0667, {_ON_GPU}; {_DRAWN}",
        },
        baseline="lowrank-plain",
        claims=[
            Claim("SI & FD help Tucker", "tucker-si-frobenius", "tucker-plain"),
            Claim("SI & FD help the tensor train", "train-si-frobenius", "train-plain"),
            Claim("SI & FD help low-rank", "lowrank-si-frobenius", "lowrank-plain"),
            Claim(
                "low-rank with both is better than Tucker with both",
                "lowrank-si-frobenius",
                "tucker-si-frobenius",
            ),
            Claim(
                "low-rank with both is better than the tensor train with both",
                "lowrank-si-frobenius",
                "train-si-frobenius",
            ),
            Claim(
                "FD is better than decay scaled by the ratio (low-rank, SI)",
                "lowrank-si-frobenius",
                "lowrank-si-scaled",
            ),
        ],
    ),
    "distillation": _Experiment(
        "Over-complete training, collapsed (Table 3)",
        "Deep and wide networks, trained with FD and collapsed to the size of the plain one, "
        "reach a higher accuracy than the plain network.",
        {
            "dense": replace(_DENSE, label="plain"),
            "deep": ImageArm(label="deep", kind="deep", init="spectral", rank=1.0),
            "deepfd": ImageArm(
                label="deep + FD", kind="deep", init="spectral", decay="frobenius", rank=1.0
            ),
            "wide": ImageArm(label="wide, 3×", rank=3.0),
            "widefd": ImageArm(label="wide, 3× + FD", decay="frobenius", rank=3.0),
            "wider": ImageArm(label="wide, 9×", rank=9.0),
            "widerfd": ImageArm(label="wide, 9× + FD", decay="frobenius", rank=9.0),
        },
        {
            "paper": {
                f"resnet{depth} {name}": ImageProtocol(
                    data=data, model=f"resnet{depth}", warmup=warmup
                )
                for data, name in ((CIFAR, "CIFAR-10"), (CIFAR_100, "CIFAR-100"))
                for depth, warmup in ((32, None), (56, 0.01), (110, 0.01))
            },
            "cpu": {"resnet8": replace(_SMALL, data=_FEW, model="resnet8")},
            "gpu": {"resnet32": replace(_GPU, model="resnet32")},
        },
        {
            "cpu": "ResNet-8 for ResNet-32, 56 and 110, CIFAR-10 alone, 6 epochs for 200, λ 5e-4 "
            f"for 1e-4, {_ON_CPU}, {_FEW_TESTED}",
            "gpu": f"ResNet-32 alone, {_ON_GPU}",
        },
        baseline="dense",
        some=dict.fromkeys(
            (("cpu", "resnet8"), ("gpu", "resnet32")), ("dense", "deep", "deepfd", "wide", "widefd")
        ),
        claims=[
            Claim("deep with FD, collapsed, is better than plain", "deepfd", "dense"),
            Claim("wide with FD, collapsed, is better than plain", "widefd", "dense"),
            Claim("FD helps deep networks", "deepfd", "deep"),
            Claim("FD helps wide networks", "widefd", "wide"),
        ],
    ),
    "why": _Experiment(
        "Why it works (Figure 1, Claim 3.1)",
        "Weight decay on the factors meets its bound, the nuclear norm; FD acts through the "
        "effective step size lr/‖W‖²: a run without decay whose norms are set to those of the FD "
        "run does as well as the FD run.",
        {
            **_GRID,
            "sifd": replace(_GRID["sifd"], recorded=True),
            "none": ImageArm(label="low-rank + SI, no decay", init="spectral", decay="none"),
            "normalized": ImageArm(
                label="low-rank + SI, no decay, norms of SI & FD",
                init="spectral",
                decay="normalized",
                after="sifd",
            ),
        },
        {
            "paper": {
                f"λ {decay:g}": ImageProtocol(
                    data=CIFAR, model="resnet20", scales={"lowrank": 0.111}, weight_decay=decay
                )
                for decay in (5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3)
            },
            "cpu": {
                f"λ {decay:g}": replace(_SMALL, model="resnet14", ratio=0.2367, weight_decay=decay)
                for decay in (5e-5, 5e-4, 5e-3)
            },
            "gpu": {
                f"λ {decay:g}": replace(_GPU, ratio=0.2367, weight_decay=decay)
                for decay in (5e-5, 5e-4, 5e-3)
            },
            "small": {"λ 0.002": _TRAINED},
        },
        {
            "cpu": "ResNet-14 for ResNet-20, 6 epochs for 200, three λ for seven, two of them with "
            f"some of the arms, {_ON_CPU}",
            "gpu": f"three λ for seven, {_ON_GPU.replace(', λ 5e-4', '')}",
            "small": _AS_TRAINED,
        },
        baseline="si",
        some={("cpu", f"λ {decay:g}"): ("si", "sifd") for decay in (5e-5, 5e-3)},
        claims=[
            Claim("decay of balanced factors meets its bound, to 1 %", "si", None, 0.01),
            Claim("and of factors drawn at random, to 5 %", "lowrank", None, 0.05),
            Claim(
                "the norms of SI & FD without decay are better than no decay", "normalized", "none"
            ),
            Claim("and within a point of SI & FD", "normalized", "sifd", 1.0),
            Claim("SI & FD is better than SI with decay of factors", "sifd", "si"),
        ],
    ),
}
