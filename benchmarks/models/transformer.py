"""Small Transformers (Vaswani et al., arXiv:1706.03762): for translation, and of running text.

Learned positions, normalization after each part, no biases in the attention's projections;
embeddings and output are of their own. For translation two layers on each side, width 256, hidden
layers of 1024, four heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

import frobdecay
from frobdecay.product import attention

__all__ = ["Attention", "LanguageModel", "TranslationTransformer"]


class Attention(nn.Module):
    """Scaled dot-product attention of several heads.

    Args:
        width: of the stream.
        heads: how many.
        size: of a head; width / heads unless given.
        dropout: of the attention weights.
    """

    def __init__(
        self, width: int, heads: int, size: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = heads * (size or width // heads)
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.output = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, context: Tensor, padding: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attend from x (N, T, width) to context (N, S, width).

        Args:
            x: where queries come from.
            context: where keys and values come from.
            padding: True at the positions (N, S) of the context to leave out.
            causal: whether each position sees the earlier ones only.
        """
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.query, x), (self.key, context), (self.value, context))
        )
        mask = None if padding is None else ~padding[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.output(out.transpose(1, 2).flatten(2))


@frobdecay.register_products(Attention)
@attention.provider
def _products(module: Attention) -> attention.Attention:
    projections = [attention.linear(name) for name in ("query", "key", "value", "output")]
    size = module.query.out_features // module.heads
    return attention.Attention(projections, heads=module.heads, size=size)


class _Layer(nn.Module):
    """Attention to itself, to the other side where there is one, a hidden layer; normed after."""

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        size: int | None,
        dropout: float,
        cross: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.attention = Attention(width, heads, size, dropout)
        self.cross = Attention(width, heads, size, dropout) if cross else None
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor | None, memory: Tensor | None = None) -> Tensor:
        own = None if memory is not None else padding  # with a memory, the padding is the memory's
        attended = self.attention(x, x, own, self.causal)
        x = self.norms[0](x + self.dropout(attended))
        if self.cross is not None:
            assert memory is not None
            x = self.norms[1](x + self.dropout(self.cross(x, memory, padding)))
        hidden = self.dropout(relu(self.fc1(x)))
        return self.norms[-1](x + self.dropout(self.fc2(hidden)))


class _Side(nn.Module):
    """Embeddings of tokens and positions, and the layers."""

    def __init__(self, tokens: int, length: int, width: int, layers: list[_Layer]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(layers)
        self.scale = width**0.5
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def forward(
        self, ids: Tensor, padding: Tensor | None = None, memory: Tensor | None = None
    ) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) * self.scale + self.positions(positions)
        for layer in self.layers:
            x = layer(x, padding, memory)
        return x


class TranslationTransformer(nn.Module):
    """Map a sentence and the beginning of its translation to the scores of the next tokens.

    Args:
        source, target: sizes of the vocabularies.
        width, hidden, heads, layers: of both sides.
        size: of a head; width / heads unless given: the paper's rank of query–key products.
        length: of the longest sentence.
        dropout: everywhere.

    Example:
        >>> model = TranslationTransformer(100, 90, width=16, hidden=32, heads=2)
        >>> ids = torch.ones(3, 5, dtype=torch.long)
        >>> model(ids, ids[:, :4]).shape
        torch.Size([3, 4, 90])
    """

    def __init__(
        self,
        source: int,
        target: int,
        *,
        width: int = 256,
        hidden: int = 1024,
        heads: int = 4,
        layers: int = 2,
        size: int | None = None,
        length: int = 1024,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()

        def make(decoder: bool) -> list[_Layer]:
            options = (width, hidden, heads, size, dropout, decoder, decoder)
            return [_Layer(*options) for _ in range(layers)]

        self.encoder = _Side(source, length, width, make(False))
        self.decoder = _Side(target, length, width, make(True))
        self.output = nn.Linear(width, target, bias=False)

    def encode(self, source: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map tokens (N, S) to the memory (N, S, width); padding is True where there is none."""
        return self.encoder(source, padding)

    def decode(self, memory: Tensor, target: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map memory and tokens (N, T) to scores (N, T, vocabulary); padding is the source's."""
        return self.output(self.decoder(target, padding, memory))

    def forward(self, source: Tensor, target: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map tokens (N, S) and (N, T) to scores (N, T, vocabulary)."""
        return self.decode(self.encode(source, padding), target, padding)


class LanguageModel(nn.Module):
    """Map tokens to the scores of tokens: the next ones, or those that are masked.

    Args:
        tokens: size of the vocabulary.
        width, hidden, heads, layers: of the model.
        causal: whether each position sees the earlier ones only.
        size: of a head; width / heads unless given.
        length: of the longest text.
        dropout: everywhere.

    Example:
        >>> model = LanguageModel(100, width=16, hidden=32, heads=2, layers=1, causal=True)
        >>> model(torch.ones(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 100])
    """

    def __init__(
        self,
        tokens: int,
        *,
        width: int,
        hidden: int,
        heads: int,
        layers: int,
        causal: bool,
        size: int | None = None,
        length: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        made = [_Layer(width, hidden, heads, size, dropout, causal=causal) for _ in range(layers)]
        self.body = _Side(tokens, length, width, made)
        self.output = nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        """Map tokens (N, T) to scores (N, T, vocabulary)."""
        return self.output(self.body(ids))
