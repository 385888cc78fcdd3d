"""What the optimizers of pytorch_optimizer do with weight decay, measured.

    python tests/third_party/bases.py        the measurements as a table in Markdown

How is said in ``tests/base_decay.py``.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
from torch.optim import Optimizer

sys.path.append(str(Path(__file__).parent.parent))

from base_decay import RATE, Net, Subject, measure

# What constructors need or what makes the measurement sharp: momentum tells the kinds apart.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AdaShift": {"keep_num": 1},
    "AliG": {"max_lr": 1.0},
    "BSAM": {"num_data": 16, "foreach": False},
    "Ranger21": {"num_iterations": 20},
    "LoRARite": {"lora_l_dim": 1, "lora_r_dim": 1},
    "SaRA": {"threshold": 1e9},
}
MODEL = ("AdaLOMO", "AdamMini", "LOMO")  # take the model instead of parameters
MATRICES = ("SpectralSphere", "LoRARite")  # take nothing but matrices
FLOATS = ("FAdam", "Magma", *(f"Adam{w}{n}" for w in ("", "W") for n in ("4bit", "8bit", "Fp8")))
SECOND_ORDER = ("AdaHessian", "SophiaH")
CLOSURES = ("AliG", "BSAM", "LBFGS")
NETWORK = ("DeMo", "DistributedMuon")  # ask for a process group

# Refused by frobdecay, with the reason's first words.
REFUSED = {
    "AdaLOMO": "it updates in the backward pass",
    "BSAM": "it multiplies every gradient by its weight_decay",
    "LOMO": "it updates in the backward pass",
}
# Have no decoupled decay, with the reason's first words.
COUPLED_ONLY = {
    "A2Grad": "expected an 'lr'",
    "AliG": "expected an 'lr'",
    "Nero": "it restores the norms of all rows",
    "ScheduleFreeAdamW": "it keeps a second copy of the weights",
    "ScheduleFreeRAdam": "it keeps a second copy of the weights",
    "ScheduleFreeSGD": "it keeps a second copy of the weights",
    "AdamWScheduleFree": "it keeps a second copy of the weights",
    "SGDScheduleFree": "it keeps a second copy of the weights",
}
# First steps in which it does not step, and decays nothing.
PREPARING = {"RAdam": 5, "SOAP": 1}
NAMES = [
    pytorch_optimizer.load_optimizer(name).__name__
    for name in pytorch_optimizer.get_supported_optimizers()
]


@dataclass(frozen=True)
class Case(Subject):
    """An optimizer with the options that decide on its kind of decay."""

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """What it knows."""
        return torch.float32 if self.name in FLOATS else torch.float64

    @property
    def second_order(self) -> bool:  # type: ignore[override]
        """Whether it differentiates the gradients."""
        return self.name in SECOND_ORDER

    @property
    def closure(self) -> bool:  # type: ignore[override]
        """Whether it evaluates the loss itself."""
        return self.name in CLOSURES

    @property
    def preparing(self) -> int:  # type: ignore[override]
        """How many of the first steps are none."""
        return PREPARING.get(self.name, 0)

    @property
    def cls(self) -> Callable[..., Optimizer]:
        """The class."""
        return pytorch_optimizer.load_optimizer(self.name.lower())

    @property
    def known_options(self) -> set[str]:
        """Names of the constructor's arguments."""
        return set(inspect.signature(self.cls).parameters)

    def build(self, net: Net, decay: float) -> Optimizer:
        """The optimizer; only factors have the weight decay."""
        known = self.known_options
        options = {**ARGUMENTS.get(self.name, {}), **self.options}
        if "lr" in known:
            options["lr"] = RATE
        if "momentum" in known and inspect.signature(self.cls).parameters["momentum"].default == 0:
            options["momentum"] = 0.9
        if self.name == "LBFGS":
            return self.cls([p for p in net.parameters() if p.requires_grad])
        if self.name in MODEL:
            more = {"weight_decay": decay} if "weight_decay" in known else {}
            return self.cls(net, **options, **more)
        factors: dict[str, Any] = {"params": [p for p in (net.U, net.V) if p.requires_grad]}
        others: dict[str, Any] = {"params": [net.bias]}
        if "weight_decay" in known or self.name == "Magma":  # which hands it on to an AdamW
            factors["weight_decay"], others["weight_decay"] = decay, 0.0
        if "Muon" in self.name or self.name == "AdaGO":
            factors["use_muon"], others["use_muon"] = True, False
        return self.cls([factors] if self.name in MATRICES else [factors, others], **options)


def cases() -> Iterator[Case]:
    """Every optimizer with every value of the option that decides."""
    for name in NAMES:
        option = {"weight_decouple", "decoupled_weight_decay"} & Case(name).known_options
        yield from (Case(name, {o: on}) for o in sorted(option) for on in (True, False))
        if not option:
            yield Case(name)


def row(case: Case) -> str:
    """A row of the table."""
    if case.name in REFUSED:
        return f"| {case} | refused | | {REFUSED[case.name]} |"
    found = measure(case)
    notes = []
    if case.name in COUPLED_ONLY:
        notes.append("coupled only")
    if found.idle:
        notes.append("its own weight decay, if any, does nothing here")
    elif found.auto is None:
        notes.append("its own weight decay is neither kind")
    elif found.exact is not None and found.exact > 1e-9:
        notes.append(f"equals its own weight decay to {found.exact:.0e}")
    else:
        notes.append("equals its own weight decay")
    if case.preparing and found.auto is not None:
        notes.append(f"after {case.preparing} first steps, in which it does nothing")
    return f"| {case} | yes | {found.auto or 'asks'} | {'; '.join(notes)} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| optimizer | runs | mode found | note |\n| --- | --- | --- | --- |")
    only = set(sys.argv[1:])
    for chosen in cases():
        if chosen.name not in NETWORK and (not only or chosen.name in only):
            print(row(chosen), flush=True)
