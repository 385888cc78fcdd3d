"""A decoder as language models are built today: RMSNorm before each part, rotary positions.

RMSNorm: Zhang & Sennrich, arXiv:1910.07467; rotary embeddings: Su et al., arXiv:2104.09864. The
output has the embedding's weight; no layer has a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

__all__ = ["Decoder"]


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn pairs of features (..., T, size), by angles that grow with the position."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class _Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up, self.down = (
            nn.Linear(width, hidden, bias=False),
            nn.Linear(hidden, width, bias=False),
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norms[0](x)
        q, k, v = (
            layer(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
    """Map tokens to the scores of the next ones.

    Args:
        tokens: size of the vocabulary.
        width, heads, layers: of the model; hidden layers are four times as wide.

    Examples:
        >>> model = Decoder(100, width=16, heads=2, layers=1)
        >>> model(torch.ones(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 100])
    """

    def __init__(self, tokens: int, *, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(_Layer(width, 4 * width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        for layer in self.layers:
            for each in layer.children():
                if isinstance(each, nn.Linear):
                    nn.init.normal_(each.weight, std=each.in_features**-0.5)
            for last in (layer.output, layer.down):  # what is added up over the layers
                last.weight.data /= (2 * layers) ** 0.5

    def forward(self, ids: Tensor) -> Tensor:
        """Map tokens (N, T) to scores (N, T, vocabulary)."""
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return linear(self.norm(x), self.tokens.weight)
