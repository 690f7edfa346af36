"""A byte-level transformer whose attention can be exchanged: RMSNorm, rotary positions, SwiGLU (as Llama and Qwen)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm, silu

VOCABULARY = 256  # bytes
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # causal; [B, H, N, D] each


@dataclass(frozen=True)
class ModelConfig:
    """Sizes. head_dim is width / heads; qk_norm is an RMSNorm with weights over every head's query and key."""

    width: int = 384
    layers: int = 8
    heads: int = 6
    hidden: int = 1024
    context: int = 1024
    qk_norm: bool = True

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads


SMALL = ModelConfig(width=128, layers=2, heads=2, hidden=256, context=128)  # for trying out on a CPU


class LanguageModel(nn.Module):
    """Logits of the next byte.

    Attributes:
        attend: computes the attention of every layer; may be replaced at any time.
    """

    def __init__(self, config: ModelConfig, attend: Attention) -> None:
        super().__init__()
        self.config, self.attend = config, attend
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        angles = rotary_angles(config.context, config.head_dim)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if deep else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N] int64 to [B, N, 256]."""
        x = self.embedding(tokens)
        rotary = self.cosine[: tokens.shape[1]], self.sine[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, rotary, self.attend)
        return self.head(rms_norm(x, x.shape[-1:], self.norm))

    def loss(self, text: Tensor) -> Tensor:
        """Mean nats a byte of [B, N + 1] bytes, the first of each row given."""
        logits = self(text[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())


class Block(nn.Module):
    """Attention and feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.qk_norm = config.heads, config.qk_norm
        self.attention_norm, self.feed_forward_norm = (nn.Parameter(torch.ones(config.width)) for _ in range(2))
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)
        if config.qk_norm:
            self.query_norm, self.key_norm = (nn.Parameter(torch.ones(config.head_dim)) for _ in range(2))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """[B, N, width] to the same."""
        batch, length, width = x.shape
        qkv = self.qkv(rms_norm(x, (width,), self.attention_norm)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.unbind(2)
        if self.qk_norm:
            q = rms_norm(q.float(), q.shape[-1:], self.query_norm)
            k = rms_norm(k.float(), k.shape[-1:], self.key_norm)
        q, k = (rotate(part, *rotary).to(v.dtype).transpose(1, 2) for part in (q, k))
        attended = attend(q, k, v.transpose(1, 2)).transpose(1, 2).reshape(batch, length, width)
        x = x + self.output(attended)
        gate, up = self.gate_up(rms_norm(x, (width,), self.feed_forward_norm)).chunk(2, -1)
        return x + self.down(silu(gate) * up)


def rotary_angles(length: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """float32 [N, 1, D / 2]."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return torch.outer(torch.arange(length, dtype=torch.float32), frequencies)[:, None]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[B, N, H, D] with its halves turned by the angles of each position."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
