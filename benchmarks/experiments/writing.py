"""The experiments on text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.experiments.experiment import Claim, Experiment, carried_over
from benchmarks.experiments.language import LanguageArm, LanguageProtocol, LanguageTrial
from benchmarks.experiments.lora import LoraArm, LoraProtocol, lora_trial
from benchmarks.experiments.translation import TranslationArm, TranslationProtocol, TranslationTrial

__all__ = ["TEXT"]

_TINY = LanguageProtocol(vocabulary=300, length=64, layers=2, dropout=0.0)
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
_LORA_SMALL = replace(_LORA, vocabulary=300, epochs=5, batch=8, first_epochs=2, dropout=0.0)
_MASKED = {"masked": True, "optimizer": "lamb", "weight_decay": 0.01}

_EVERYTHING = ("linear", "output_value", "query_key")

TEXT: Mapping[str, Experiment] = {
    "translation": Experiment(
        "Translation",
        "SI is the critical part when a Transformer is compressed; FD does not work without it, "
        "and helps with it.",
        {
            "dense": TranslationArm(
                label="dense, no decay", dense=True, blind=("rank", "weight_decay")
            ),
            "densefd": TranslationArm(
                label="dense, SI & FD on QK, OV",
                dense=True,
                attention_si=True,
                decayed=("output_value", "query_key"),
                blind=("rank",),
            ),
            "lowrank": TranslationArm(label="low-rank", blind=("weight_decay",)),
            "matched": TranslationArm(
                label="low-rank, of the dense norm", linear="matched", blind=("weight_decay",)
            ),
            "si": TranslationArm(label="low-rank + SI", linear="spectral", blind=("weight_decay",)),
            "fd": TranslationArm(label="low-rank + FD", decayed=_EVERYTHING),
            "sifd": TranslationArm(
                label="SI & FD on linear", linear="spectral", decayed=("linear",)
            ),
            "siallfd": TranslationArm(
                label="SI & FD on linear, QK, OV",
                linear="spectral",
                attention_si=True,
                decayed=_EVERYTHING,
            ),
        },
        {
            "paper": {
                f"rank {rank:g}, λ {decay:g}": TranslationProtocol(rank=rank, weight_decay=decay)
                for rank in (0.5, 0.25)
                for decay in (1e-6, 5e-6, 1e-5, 5e-5, 1e-4)
            },
            "cpu": {
                f"rank {rank:g}": TranslationProtocol(
                    rank=rank,
                    vocabulary=2000,
                    epochs=2,
                    tokens=1000,
                    width=64,
                    hidden=256,
                    dropout=0.0,
                    weight_decay=1e-4,
                    beam=1,
                    limit=24_000,
                )
                for rank in (0.5, 0.25)
            },
            "gpu": {
                "rank 0.5": TranslationProtocol(epochs=30, device="cuda", precision="bfloat16")
            },
        },
        {
            "paper": "Multi30k for IWSLT'14, 8,000 tokens of each language for 25,000 merges, 60 "
            "epochs for 100,000 updates",
            "cpu": "24,000 sentences of Multi30k for IWSLT'14, width 64 for 256, 2,000 tokens of "
            "each language for 25,000 merges, 2 epochs for 100,000 updates, 1,000 tokens a batch "
            "for 4,000, the largest of the paper's λ, no dropout, greedy translation",
            "gpu": "Multi30k for IWSLT'14, 8,000 tokens of each language for 25,000 merges, 30 "
            "epochs, bfloat16",
        },
        score="test BLEU",
        trial=TranslationTrial,
        some={
            ("cpu", "rank 0.5"): ("dense", "lowrank", "matched", "si", "fd", "sifd", "siallfd"),
            ("cpu", "rank 0.25"): ("dense", "lowrank", "matched", "si", "siallfd"),
        },
        claims=[
            Claim("SI is better than plain low-rank", "si", "lowrank"),
            Claim("SI is better than random factors of the dense norm", "si", "matched"),
            Claim("FD does not work without SI: it is not above plain low-rank", "lowrank", "fd"),
            Claim("SI & FD on everything is better than SI alone", "siallfd", "si"),
            Claim("SI & FD on everything is within 1 BLEU of dense", "siallfd", "dense", 1.0),
        ],
    ),
    "carryover": Experiment(
        "λ carried over, translation with AdamW",
        "The paper has Adam with a coupled decay, which Adam's own scaling takes back. Asked here, "
        "of decoupled decay: is the λ that is best for the dense network best for SI & FD, and is "
        "that of plain decay another?",
        {
            "dense": TranslationArm(label="dense", dense=True, blind=("rank",)),
            "lowrank": TranslationArm(label="low-rank"),
            "si": TranslationArm(label="low-rank + SI", linear="spectral"),
            "fd": TranslationArm(label="low-rank + FD", decayed=_EVERYTHING),
            "sifd": TranslationArm(
                label="low-rank + SI & FD",
                linear="spectral",
                attention_si=True,
                decayed=_EVERYTHING,
            ),
        },
        {
            "cpu": {
                f"λ {decay:g}": TranslationProtocol(
                    rank=0.25,
                    vocabulary=2000,
                    epochs=6,
                    tokens=1000,
                    width=64,
                    hidden=256,
                    optimizer="adamw",
                    lr=2e-3,
                    clip=1.0,
                    dropout=0.1,
                    weight_decay=decay,
                    beam=1,
                    limit=24_000,
                )
                for decay in (0.03, 0.1, 0.3, 1.0)
            }
        },
        {
            "cpu": "24,000 sentences of Multi30k, width 64, 2,000 tokens of each language, 6 "
            "epochs of AdamW at 2e-3, greedy translation"
        },
        score="test BLEU",
        trial=TranslationTrial,
        along="weight_decay",
        claims=carried_over(0.5, "half a point"),
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
                "masked": replace(_TINY, epochs=2, batch=16, lr=1e-2, **_MASKED),
                "causal": replace(_TINY, epochs=1, batch=8),
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
            "cpu": "Shakespeare, 300 tokens, 2 layers of width 128, no dropout, 2 epochs masked by "
            "LAMB, 1 epoch causal by AdamW; loss for F1",
            "gpu": "Shakespeare, 4 layers of width 256, masked by LAMB, causal by AdamW, bfloat16; "
            "loss for F1",
        },
        score="test loss, nats a token (less is better)",
        larger_is_better=False,
        digits=4,
        trial=LanguageTrial,
        some=dict.fromkeys(
            (("cpu", "masked"), ("cpu", "causal")), ("dense", "lowrank", "si", "fd", "sifd")
        ),
        claims=[
            Claim("half-size heads with SI & FD are within 1 % of dense", "sifd", "dense", 0.03),
            Claim("they are better with SI & FD than without", "sifd", "lowrank"),
            Claim("SI & FD is better than SI alone", "sifd", "si"),
        ],
    ),
    "lora": Experiment(
        "LoRA (not in the paper)",
        "nothing about it; asked is whether decay of the update BA or of the whole weight W + BA "
        "is better than decay of A and B, or than none.",
        {
            "first": LoraArm(label="not adapted", decay=None, blind=("weight_decay",)),
            "none": LoraArm(
                label="LoRA, no decay", decay="none", after="first", blind=("weight_decay",)
            ),
            "plain": LoraArm(label="LoRA, decay of A and B", after="first"),
            "delta": LoraArm(label="LoRA, FD of BA", decay="delta", after="first"),
            "full": LoraArm(label="LoRA, FD of W + BA", decay="full", after="first"),
        },
        {
            "paper": {
                f"λ {decay:g}": replace(_LORA, layers=6, width=256, hidden=1024, weight_decay=decay)
                for decay in (0.01, 0.1, 1.0)
            },
            "cpu": {
                f"λ {decay:g}": replace(_LORA_SMALL, weight_decay=decay) for decay in (0.1, 1.0)
            },
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
        larger_is_better=False,
        digits=4,
        trial=lora_trial,
    ),
}
