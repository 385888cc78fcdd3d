"""The experiments on text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.language import LanguageArm, LanguageProtocol, LanguageTrial
from benchmarks.experiments.lora import LoraArm, LoraProtocol, lora_trial
from benchmarks.experiments.translation import (
    TranslationArm,
    TranslationProtocol,
    TranslationTrial,
)

__all__ = ["TEXT"]

_TINY = LanguageProtocol(vocabulary=1000, length=64, batch=16, layers=2)
_LORA = LoraProtocol(
    data="multi30k/train.en",
    limit=100_000,
    epochs=20,
    lr=3e-3,
    batch=16,
    vocabulary=1000,
    length=64,
    layers=2,
    first_epochs=12,
)
_MASKED = {"masked": True, "optimizer": "lamb", "weight_decay": 0.01}

_EVERYTHING = ("linear", "output_value", "query_key")

TEXT: Mapping[str, Experiment] = {
    "translation": Experiment(
        "Translation",
        "SI is the critical part when a Transformer is compressed; FD does not work without it, "
        "and helps with it.",
        {
            "dense": TranslationArm(label="dense, no decay", rank=None),
            "lowrank": TranslationArm(label="low-rank"),
            "si": TranslationArm(label="low-rank + SI", linear_si=True),
            "fd": TranslationArm(label="low-rank + FD", decayed=_EVERYTHING),
            "sifd": TranslationArm(label="SI & FD on linear", linear_si=True, decayed=("linear",)),
            "siallfd": TranslationArm(
                label="SI & FD on linear, QK, OV",
                linear_si=True,
                attention_si=True,
                decayed=_EVERYTHING,
            ),
        },
        {
            "paper": {"rank 0.5": TranslationProtocol()},
            "cpu": {
                "rank 0.5": TranslationProtocol(
                    vocabulary=4000,
                    epochs=8,
                    tokens=2000,
                    width=128,
                    hidden=512,
                    beam=1,
                    limit=15000,
                )
            },
            "gpu": {
                "rank 0.5": TranslationProtocol(epochs=30, device="cuda", precision="bfloat16")
            },
        },
        {
            "paper": "Multi30k for IWSLT'14, 8,000 tokens of each language for 25,000 merges, 60 "
            "epochs for 100,000 updates",
            "cpu": "15,000 sentences of Multi30k for IWSLT'14, width 128 for 256, 4,000 tokens of "
            "each language for 25,000 merges, 8 epochs, batches of 2,000 tokens, greedy "
            "translation",
            "gpu": "Multi30k for IWSLT'14, 8,000 tokens of each language for 25,000 merges, 30 "
            "epochs, bfloat16",
        },
        score="test BLEU",
        trial=TranslationTrial,
    ),
    "language": Experiment(
        "Language modelling with small heads (after Table 4)",
        "With heads of half the size, LAMB with SI and FD on the attention's products (FLAMBe) "
        "comes close to the dense BERT (87.69 and 88.55 F1, second-hand).",
        {
            "dense": LanguageArm(label="dense", size=1.0),
            "densefd": LanguageArm(
                label="dense + SI & FD", size=1.0, balanced=True, decay="frobenius"
            ),
            "lowrank": LanguageArm(label="half"),
            "si": LanguageArm(label="half + SI", balanced=True),
            "fd": LanguageArm(label="half + FD", decay="frobenius"),
            "sifd": LanguageArm(label="half + SI & FD", balanced=True, decay="frobenius"),
        },
        {
            "paper": {
                "masked": LanguageProtocol(
                    vocabulary=8000,
                    epochs=100,
                    width=768,
                    hidden=3072,
                    heads=12,
                    layers=12,
                    lr=6.25e-4,
                    **_MASKED,
                )
            },
            "cpu": {
                "masked": replace(_TINY, epochs=6, lr=5e-3, **_MASKED),
                "causal": replace(_TINY, epochs=5),
            },
            "gpu": {
                "masked": LanguageProtocol(
                    epochs=60,
                    width=256,
                    hidden=1024,
                    lr=5e-3,
                    device="cuda",
                    precision="bfloat16",
                    **_MASKED,
                ),
                "causal": LanguageProtocol(
                    epochs=20, width=256, hidden=1024, device="cuda", precision="bfloat16"
                ),
            },
        },
        {
            "paper": "code and settings were not published: the shape of BERT-base, LAMB's λ 0.01, "
            "and Shakespeare for what BERT was trained on; loss for F1",
            "cpu": "Shakespeare, 2 layers of width 128, masked by LAMB, causal by AdamW; loss for "
            "F1",
            "gpu": "Shakespeare, 4 layers of width 256, masked by LAMB, causal by AdamW, bfloat16; "
            "loss for F1",
        },
        score="test loss, nats a token (less is better)",
        trial=LanguageTrial,
    ),
    "lora": Experiment(
        "LoRA (not in the paper)",
        "nothing about it; asked is whether decay of the update BA or of the whole weight W + BA "
        "is better than decay of A and B, or than none.",
        {
            "first": LoraArm(label="not adapted", decay=None),
            "none": LoraArm(label="LoRA, no decay", decay="none", after="first"),
            "plain": LoraArm(label="LoRA, decay of A and B", after="first"),
            "delta": LoraArm(label="LoRA, FD of BA", decay="delta", after="first"),
            "full": LoraArm(label="LoRA, FD of W + BA", decay="full", after="first"),
        },
        {
            "paper": {
                f"λ {decay:g}": replace(_LORA, layers=6, width=256, hidden=1024, weight_decay=decay)
                for decay in (0.01, 0.1, 1.0)
            },
            "cpu": {f"λ {decay:g}": replace(_LORA, weight_decay=decay) for decay in (0.1, 1.0)},
            "gpu": {
                f"λ {decay:g}": replace(
                    _LORA,
                    layers=6,
                    width=256,
                    hidden=1024,
                    weight_decay=decay,
                    device="cuda",
                    precision="bfloat16",
                )
                for decay in (0.01, 0.1, 1.0)
            },
        },
        dict.fromkeys(
            ("paper", "cpu", "gpu"),
            "a model of Shakespeare, trained here, learns 100,000 characters of the English "
            "captions of Multi30k, by AdamW",
        ),
        baseline="plain",
        score="test loss, nats a token (less is better)",
        trial=lora_trial,
    ),
}
