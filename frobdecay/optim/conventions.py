"""What is known of optimizers: how they apply ``weight_decay``, and which cannot be wrapped.

    coupled      into the gradient: SGD, Adam, …        decoupled    beside it: AdamW, Lion, …

Optimizers of other packages are recognized by package and class name; nothing is imported. A name
is in a table only if a test has measured it: for W = U·I, whose decay is U's own weight decay, the
wrapped optimizer takes the steps of the optimizer itself, after first steps in which that only
prepares (SOAP, RAdam). Of others nothing is assumed. docs/training-stacks.md shows the tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch.optim import Optimizer

Convention = Literal["coupled", "decoupled"]

# An option of the param group says which of the two lists is meant; without it the only one is.
_OPTIONS = {
    "pytorch_optimizer": ("weight_decouple", "decoupled_weight_decay"),
    "timm": ("decoupled_decay", "decoupled"),
}
_COUPLED = {
    "torch": """
        Adadelta Adagrad Adam Adamax ASGD LBFGS NAdam RAdam RMSprop Rprop SGD SparseAdam""",
    "pytorch_optimizer": """
        ADOPT APOLLO ASGD AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaFactor AdaGC AdaGO
        AdaHessian AdaMax AdaMod AdaMuon AdaNorm AdaPNM AdaSmooth AdaTAM Adai Adalite AdamC AdamG
        AdamS AggMo Aida Alice Ano ApolloDQN AvaGrad CAME DAdaptAdaGrad DAdaptAdam DAdaptLion
        DiffGrad DistributedMuon DualAdam EXAdam EmoFact EmoLynx EmoNavi Kate Kron Lion Lookahead
        MADGRAD Muon NorMuon PAdam PID PNM QHAdam QHM RACS ROSE SCION SCIONLight SGDW SPlus SWATS
        ScalableShampoo ScheduleFreeSGD SignSGD SimplifiedAdEMAMix SophiaH SpectralSphere
        StableAdamW TRAC Tiger VSGD Yogi""",
    "schedulefree": "SGDScheduleFree",
    "timm": "Adopt MADGRAD NAdamLegacy RMSpropTF",
    "torchao": "Adam4bit Adam8bit AdamFp8",
}
_DECOUPLED = {
    "torch": "Adafactor Adam AdamW Muon NAdam RAdam",
    "pytorch_optimizer": """
        ADOPT AdEMAMix AdaBelief AdaBound AdaDelta AdaGC AdaGO AdaHessian AdaMax AdaMod AdaMuon
        AdaNorm AdaPNM AdaTAM Adai Adalite AdamC AdamG AdamMini AdamP AdamWSN Adan AggMo Aida
        Alice Ano AvaGrad BCOS CAME Conda DASH DeMo DiffGrad DistributedMuon DualAdam EXAdam
        EmoFact EmoLynx EmoNavi Fira FlashAdamW GaLore Grams GrokFastAdamW Kate Kron LaProp Lamb
        Lion Lookahead MADGRAD MARS Muon MuonClip NorMuon NovoGrad OrthoGrad PAdam PID PNM
        QHAdam QHM RACS RAdam ROSE SCION SCIONLight SGDSaI SGDW SOAP SPAM SWATS SaRA
        ScalableShampoo Shampoo SignSGD SimplifiedAdEMAMix SophiaH SpectralSphere StableAdamW
        StableSPAM TAM Tiger VSGD Yogi""",
    "timm": """
        AdaBelief AdafactorBigVision Adahessian AdamP AdamWLegacy LaProp Lion Mars Muon NAdamW
        NvNovoGrad RAdamLegacy RMSpropTF SGDW""",
    "torchao": "AdamW4bit AdamW8bit AdamWFp8",
    "transformers": "Adafactor",
}
# Decay by one kind, whatever the option says. (Adan's other way divides by 1 + lr·λ.)
_REGARDLESS = {"pytorch_optimizer": "ASGD Adan"}
# Stand around another optimizer, and decay as that does, if they do not change that kind.
_AROUND = {"pytorch_optimizer": "Lookahead OrthoGrad TRAC"}
# Measured to be of neither kind with any options, and of some, why.
_NEITHER = {
    "pytorch_optimizer": """
        A2Grad AdaShift AliG Amos DAdaptAdan DAdaptSGD FAdam FOCUS FTRL Fromage Gravity LARS
        LoRARite MSVAG Magma Nero Prodigy Ranger Ranger21 SGDP SM3 SRMM ScheduleFreeAdamW
        ScheduleFreeRAdam""",
    "schedulefree": "AdamWScheduleFree RAdamScheduleFree",
}
_REASONS = {
    "DAdapt": "its steps are lr times an estimated d, mostly far below lr",
    "Prodigy": "its steps are lr times an estimated d, mostly far below lr",
    "ScheduleFree": "its own weight decay acts on a second copy of the weights",
}
# Options by which decoupled decay is something else than lr·λ.
_MODIFIERS = (
    "decouple_lr",
    "fixed_decay",
    "stable_weight_decay",
    "wd_schedule",
    "corrected_weight_decay",
    "scale_parameter",
    "relative_step",
)

_OUTSIDE = "wrap the optimizer before it is prepared: what stands around it has to go around both"
_BACKWARD = "it updates in the backward pass, where no step could decay anything"
_REFUSED = {
    "accelerate.optimizer.AcceleratedOptimizer": _OUTSIDE,
    "lightning.pytorch.core.optimizer.LightningOptimizer": _OUTSIDE,
    "pytorch_lightning.core.optimizer.LightningOptimizer": _OUTSIDE,
    "pytorch_optimizer.optimizer.lomo.LOMO": _BACKWARD,
    "pytorch_optimizer.optimizer.lomo.AdaLOMO": _BACKWARD,
    "pytorch_optimizer.optimizer.sam.BSAM": (
        "it multiplies every gradient by its weight_decay, without which the factors would not "
        "train; add frobdecay.penalty(products, λ) to the loss"
    ),
    "torchao.optim.cpu_offload.CPUOffloadOptimizer": (
        "it steps on copies of parameters and gradients that decay would not reach; add "
        "frobdecay.penalty(products, λ) to the loss"
    ),
}
_RESTORING = {
    "pytorch_optimizer.optimizer.nero.Nero": "it restores the norms of all rows in every step",
}
_REMEMBERING = {
    "torch.optim.lbfgs.LBFGS": "its curvature is that of the steps that it took itself",
    "torch.optim.asgd.ASGD": "it averages the weights that it stepped to itself",
}


def _names(table: Mapping[str, str]) -> set[tuple[str, str]]:
    return {(package, name) for package, names in table.items() for name in names.split()}


_IN = {"coupled": _names(_COUPLED), "decoupled": _names(_DECOUPLED)}
_ONE_KIND, _OUTER = _names(_REGARDLESS), _names(_AROUND)
_MEASURED = _names(_NEITHER).union(*_IN.values())


def _known(cls: type[Optimizer]) -> tuple[str, str] | None:
    """Package and name of the class in the tables whose step this class runs."""
    step = inspect.unwrap(cls.step)  # torch wraps hooks around the steps of classes
    for base in cls.__mro__:
        key = base.__module__.partition(".")[0], base.__name__
        listed = key in _MEASURED
        if listed and issubclass(base, Optimizer) and inspect.unwrap(base.step) is step:
            return key
    return None


def ignores_the_loss(optimizer: Optimizer) -> bool:
    """Whether it is known that a closure's return value is only handed through."""
    known = _known(type(optimizer))
    return known is not None and known[0] == "torch" and known[1] != "LBFGS"


def is_plain_descent(optimizer: Optimizer) -> bool:
    """Whether it is known that a step is lr times the gradient, but for momentum."""
    return _known(type(optimizer)) == ("torch", "SGD")


def reads_the_parameter(optimizer: Optimizer) -> bool:
    """Whether the update depends on the parameter, so that decay has to come after it."""
    return _known(type(optimizer)) == ("torch", "Adafactor")


def convention(optimizer: Optimizer, group: Mapping[str, Any]) -> Convention:
    """Tell how an optimizer applies the weight decay of a group.

    Raises:
        ValueError: it is not known, or of neither kind.
    """
    known = _known(type(optimizer))
    if known in _OUTER:
        inside: Optimizer = vars(optimizer)["optimizer"]
        kind = convention(inside, group)
        if known in _IN[kind]:
            return kind
        raise _unknown(optimizer, f"around {type(inside).__name__} with {kind} decay", known)
    options = _OPTIONS.get(known[0] if known else "", ("decoupled_weight_decay",))
    flag = next((group[name] for name in options if name in group), None)
    flag = None if known in _ONE_KIND else flag
    if known in _IN["coupled"] and not flag:
        return "coupled"
    if known in _IN["decoupled"] and flag is not False and not any(map(group.get, _MODIFIERS)):
        return "decoupled"
    if flag and type(optimizer).__module__.partition(".")[0] not in _COUPLED:
        return "decoupled"  # torch's name for it, and nothing measured that says otherwise
    names = [name for name in (*options, *_MODIFIERS) if group.get(name) is not None]
    said = ", ".join(f"{name}={group[name]}" for name in names)
    raise _unknown(optimizer, f"with {said}" if said else "", known)


def _unknown(optimizer: Optimizer, how: str, known: tuple[str, str] | None) -> ValueError:
    name = type(optimizer).__name__
    why = "how it applies weight decay has not been measured"
    if known is not None:
        why = "its own weight decay was measured, and is of neither kind so"
        why += "".join(f" ({reason})" for part, reason in _REASONS.items() if part in name)
    return ValueError(
        f"expected mode='coupled' or mode='decoupled' for {name}{how and ' '}{how}, got 'auto': "
        f"{why}. 'coupled' adds λ·∇ to the gradient (as SGD does), 'decoupled' subtracts lr·λ·∇ "
        "from the parameter (as AdamW)"
    )


def refuse(kind: type[Optimizer], reason: str) -> None:
    """Have optimizers of a type never be wrapped, for a reason that messages give."""
    _REFUSED[f"{kind.__module__}.{kind.__qualname__}"] = reason


def refusal(optimizer: Optimizer) -> str | None:
    """Why an optimizer cannot be wrapped at all."""
    reason = _reason(optimizer, _REFUSED)
    if reason is None and optimizer.param_groups is not optimizer.param_groups:
        return "its param_groups are made anew at every look, so no change to them would last"
    return reason


def refusal_of_decoupled(optimizer: Optimizer) -> str | None:
    """Why an optimizer would lose what is subtracted from its parameters between steps."""
    if any("ScheduleFree" in cls.__name__ for cls in type(optimizer).__mro__):
        return "it keeps a second copy of the weights, which the decay would not reach"
    return _reason(optimizer, _RESTORING)


def refusal_of_bound(optimizer: Optimizer) -> str | None:
    """Why a part of an optimizer's step cannot be taken back after it."""
    return refusal_of_decoupled(optimizer) or _reason(optimizer, _REMEMBERING)


def _reason(optimizer: Optimizer, reasons: Mapping[str, str]) -> str | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(optimizer).__mro__)
    return next((reasons[name] for name in names if name in reasons), None)
