"""LoRA: a causal model that is trained here learns another text, with one of four decays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import frobdecay
from benchmarks.experiments.language import LanguageProtocol, LanguageTrial
from benchmarks.experiments.text import Running, load_running
from benchmarks.experiments.trials import Arm, count_parameters

__all__ = ["LoraArm", "LoraProtocol", "lora_trial"]


@dataclass(frozen=True, kw_only=True)
class LoraArm(Arm):
    """What is special about an arm.

    Attributes:
        decay: of the adapters: "none"; "plain", of A and B each; "delta", of the update s·BA;
            "full", of the weight W + s·BA. None trains the model that the others adapt.
        size, balanced: of the model, as in ``LanguageArm``.
    """

    decay: str | None = "plain"
    size: float = 1.0
    balanced: bool = False


@dataclass(frozen=True, kw_only=True)
class LoraProtocol(LanguageProtocol):
    """What all arms have in common.

    Attributes:
        data: the text to adapt to.
        rank, alpha: of the adapters; s = alpha / rank.
        first_data, first_epochs, first_lr: the text that the model is trained on before, and how.
    """

    rank: int = 8
    alpha: int = 16
    first_data: str = "tinyshakespeare.txt"
    first_epochs: int = 20
    first_lr: float = 1e-3


def lora_trial(
    out: Path, arm: LoraArm, seed: int, protocol: LoraProtocol, key: str, after: str | None = None
) -> LanguageTrial:
    """Make the trial of an arm; arguments are those of ``Training``.

    Raises:
        ImportError: PEFT is not installed.
    """
    adapt = _peft()
    if arm.decay is not None:
        return _Adapted(adapt, out, arm, seed, protocol, key, after)
    first = replace(
        protocol,
        data=protocol.first_data,
        epochs=protocol.first_epochs,
        lr=protocol.first_lr,
        weight_decay=LanguageProtocol.weight_decay,
        limit=None,
    )
    return _First(protocol, out, replace(arm, decay="plain"), seed, first, key, after)


def _peft() -> Callable[..., Any]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'frobdecay[experiments]'") from error

    def adapt(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        adapted: torch.nn.Module = get_peft_model(model, LoraConfig(**options))
        return adapted

    return adapt


def _first_text(protocol: LoraProtocol) -> Running:
    return load_running(protocol.first_data, protocol.vocabulary, device=protocol.device)


def _new_text(protocol: LoraProtocol, tokenizer: Any) -> Running:
    return load_running(
        protocol.data, 0, protocol.limit, tokenizer=tokenizer, device=protocol.device
    )


class _First(LanguageTrial):
    """Train the model that is to be adapted; tested on the other text, that it has not seen."""

    def __init__(self, later: LoraProtocol, *arguments: Any) -> None:
        self.later = later
        super().__init__(*arguments)

    def test(self) -> dict[str, Any]:
        """Also hands the model on."""
        torch.save(self.model.state_dict(), self.out / f"{self.key}.weights")
        new = _new_text(self.later, self.text.tokenizer)
        here = self.evaluate(self.text, "test")
        return {"score": self.evaluate(new, "test"), "score on the first text": here}


class _Adapted(LanguageTrial):
    """Train adapters."""

    def __init__(self, adapt: Callable[..., Any], *arguments: Any) -> None:
        self.adapt = adapt
        super().__init__(*arguments)

    def load(self) -> Running:
        """The other text, in the first one's tokens."""
        return _new_text(self.protocol, _first_text(self.protocol).tokenizer)

    def begin(self) -> None:
        """Load the model, add adapters, choose their decay."""
        protocol, decay = self.protocol, self.arm.decay
        model = self.make(self.arm.size)
        weights = torch.load(self.out / f"{self.after}.weights", weights_only=True)
        model.load_state_dict(weights)
        self.dense_parameters = count_parameters(model)
        adapted = self.adapt(
            model,
            r=protocol.rank,
            lora_alpha=protocol.alpha,
            target_modules=r".*\.(query|key|value|output|fc1|fc2)",
        ).to(protocol.device)
        rate = 0.0 if decay == "none" else protocol.weight_decay
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            trained, lr=protocol.lr, weight_decay=rate
        )
        if decay in ("delta", "full"):
            products = frobdecay.products(adapted, lora=decay)
            optimizer = frobdecay.FrobeniusDecay(optimizer, products)
        self.ready(adapted, optimizer, frobdecay.products(adapted))
