"""BERT with random weights, of the sizes that real ones have: what a text classifier costs to featurize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 30522, 768, 12, 12, 128


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual and a norm after it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.mix(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """[n, tokens] token numbers to [n, classes] logits; 109 M parameters as BERT-base."""

    def __init__(self, classes: int = 2, width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.layers(self.norm(self.words(tokens) + self.positions(places)))
        return self.head(torch.tanh(self.pool(x[:, 0])))
