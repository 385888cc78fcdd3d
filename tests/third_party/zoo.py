"""Tiny models of third parties, randomly initialized: families by name, nothing downloaded.

    MODELS["GPT-2"]() -> (model, inputs)        model(**inputs) runs, in evaluation mode

No dropout, so that training mode computes the same. Weights are drawn larger than the libraries
draw them, so that outputs differ visibly from token to token and errors have something to show in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH = 61, 32, 7
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False}
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _made(name: str, config: Any, **inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval(), inputs


def _ids(batch: int = 2) -> Tensor:
    return torch.arange(3, 3 + batch * LENGTH).reshape(batch, LENGTH) % VOCABULARY


def _labelled() -> dict[str, Any]:
    return {"input_ids": _ids(), "labels": _ids()}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    """A classifier, without ties."""
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, num_labels=3)
    labels = torch.tensor([0, 2])
    return _made("BertForSequenceClassification", config, input_ids=_ids(), labels=labels)


def bert_mlm() -> tuple[nn.Module, dict[str, Any]]:
    """A masked language model: the decoder is tied to the word embeddings."""
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT)
    return _made("BertForMaskedLM", config, **_labelled())


def roberta() -> tuple[nn.Module, dict[str, Any]]:
    """A classifier of tokens."""
    config = transformers.RobertaConfig(**SMALL, **NO_DROPOUT, num_labels=3)
    labels = _ids() % 3
    return _made("RobertaForTokenClassification", config, input_ids=_ids(), labels=labels)


def gpt2(tied: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """A language model with Conv1D layers; its head is tied to the embedding."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=40,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tied,
        **ENDS,
    )
    return _made("GPT2LMHeadModel", config, **_labelled())


def llama() -> tuple[nn.Module, dict[str, Any]]:
    """Grouped-query attention: keys and values have fewer heads than queries."""
    config = transformers.LlamaConfig(**GROUPED, **ENDS)
    return _made("LlamaForCausalLM", config, **_labelled())


def mistral() -> tuple[nn.Module, dict[str, Any]]:
    """Grouped-query attention with a sliding window."""
    config = transformers.MistralConfig(**GROUPED, **ENDS, sliding_window=4)
    return _made("MistralForCausalLM", config, **_labelled())


def t5() -> tuple[nn.Module, dict[str, Any]]:
    """Encoder and decoder; three modules share the embedding."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _made("T5ForConditionalGeneration", config, **_labelled())


def vit() -> tuple[nn.Module, dict[str, Any]]:
    """An image classifier; the patches are cut by a convolution."""
    shapes = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.ViTConfig(
        **shapes, **NO_DROPOUT, image_size=16, patch_size=4, num_labels=3
    )
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)
    labels = torch.tensor([0, 2])
    return _made("ViTForImageClassification", config, pixel_values=pixels, labels=labels)


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    """A mixture of experts, whose weights are stacked in three dimensions."""
    config = transformers.MixtralConfig(
        **GROUPED, **ENDS, num_local_experts=4, num_experts_per_tok=2
    )
    return _made("MixtralForCausalLM", config, **_labelled())


def qwen_moe() -> tuple[nn.Module, dict[str, Any]]:
    """A mixture of experts beside normalized queries and keys."""
    config = transformers.Qwen3MoeConfig(
        **GROUPED,
        **ENDS,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return _made("Qwen3MoeForCausalLM", config, **_labelled())


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "BERT": bert,
    "BERT (masked LM)": bert_mlm,
    "RoBERTa": roberta,
    "GPT-2": gpt2,
    "Llama": llama,
    "Mistral": mistral,
    "T5": t5,
    "ViT": vit,
    "Mixtral": mixtral,
    "Qwen3-MoE": qwen_moe,
}
TIED = ("BERT (masked LM)", "GPT-2", "T5")
GENERATES = ("GPT-2", "Llama", "Mistral", "T5", "Mixtral", "Qwen3-MoE")
EXPERTS = ("Mixtral", "Qwen3-MoE")


def families(*names: str) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: families, each a row of the matrix."""
    return [pytest.param(n, marks=pytest.mark.integration(row=n)) for n in names or MODELS]


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the model answers."""
    return model(**inputs).logits  # type: ignore[no-any-return]
