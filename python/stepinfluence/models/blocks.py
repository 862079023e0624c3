"""The pre-norm decoder block that both looped models repeat.

One block covers the two styles the paper uses: GPT-2's (LayerNorm, fused qkv with biases, GELU), after Fan et
al. (arXiv 2409.15647), and nanochat's (parameter-free RMSNorm, no biases, rotary positions, query/key norm,
squared ReLU). They differ in switches, not in structure, so there is one :class:`Block`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepinfluence.arguments import heads_divide, one_of, positive_int

Norm: TypeAlias = Literal["layernorm", "rmsnorm", "rmsnorm_plain"]
Activation: TypeAlias = Literal["gelu", "relu2"]
RotaryTable: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines, each of shape ``(tokens, d_head / 2)``, float32."""


@dataclass(frozen=True)
class BlockConfig:
    """Shape and style of one pre-norm transformer block.

    Args:
        d_model: width of the residual stream.
        n_heads: attention heads; must divide ``d_model``.
        norm: ``"layernorm"`` (scale and bias), ``"rmsnorm"`` (scale) or ``"rmsnorm_plain"`` (no parameters).
        activation: ``"gelu"`` (tanh form, as in GPT-2) or ``"relu2"`` (squared ReLU, as in nanochat).
        bias: biases in every linear layer.
        fused_qkv: one ``(3 d_model, d_model)`` matrix for query, key and value, or one matrix for each.
        qk_norm: RMS-normalise queries and keys, after rotation.
        causal: mask the future.
        mlp_ratio: hidden width of the MLP, in units of ``d_model``.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is not positive, ``n_heads`` does not divide ``d_model``, or an unknown style.
    """

    d_model: int
    n_heads: int
    norm: Norm = "layernorm"
    activation: Activation = "gelu"
    bias: bool = True
    fused_qkv: bool = True
    qk_norm: bool = False
    causal: bool = True
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "mlp_ratio"):
            positive_int(name, getattr(self, name))
        heads_divide(self.d_model, self.n_heads)
        one_of("norm", self.norm, get_args(Norm))
        one_of("activation", self.activation, get_args(Activation))

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


class PlainRMSNorm(nn.Module):
    """RMSNorm without parameters, as in nanochat: ``x / rms(x)`` over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(..., d)``; same shape and dtype out."""
        return F.rms_norm(x, (x.shape[-1],))


def make_norm(norm: Norm, d_model: int) -> nn.Module:
    """The norm layer of a style, for inputs of shape ``(..., d_model)``."""
    if norm == "layernorm":
        return nn.LayerNorm(d_model)
    if norm == "rmsnorm":
        return nn.RMSNorm(d_model)
    return PlainRMSNorm()


def rotary_table(tokens: int, d_head: int, base: float = 10_000.0) -> RotaryTable:
    """Cosines and sines of the rotary embedding for positions ``0 .. tokens - 1`` (Su et al., arXiv
    2104.09864).

    Returns:
        Two float32 tensors of shape ``(tokens, d_head / 2)``, on the default device.

    Raises:
        ValueError: ``d_head`` is odd.
    """
    if d_head % 2:
        raise ValueError(f"d_head: got {d_head}; rotary embeddings rotate pairs, pass an even d_model / n_heads")
    frequencies = base ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate ``x``, ``(B, heads, T, d_head)``, by its position; the two halves of a head form the pairs."""
    cos, sin = (part[: x.shape[-2]].to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention on ``(B, T, d_model)``; uses torch's scaled-dot-product attention."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        d, bias = config.d_model, config.bias
        if config.fused_qkv:
            self.qkv = nn.Linear(d, 3 * d, bias=bias)
        else:
            self.query = nn.Linear(d, d, bias=bias)
            self.key = nn.Linear(d, d, bias=bias)
            self.value = nn.Linear(d, d, bias=bias)
        self.proj = nn.Linear(d, d, bias=bias)

    def forward(self, x: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        """Mix tokens: ``(B, T, d_model)`` in and out; ``rotary`` turns queries and keys by their position."""
        batch, tokens, _ = x.shape
        parts = self.qkv(x).chunk(3, dim=-1) if self.config.fused_qkv else (self.query(x), self.key(x), self.value(x))
        q, k, v = (p.view(batch, tokens, self.config.n_heads, -1).transpose(1, 2) for p in parts)
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        if self.config.qk_norm:
            q, k = (F.rms_norm(p, (p.shape[-1],)) for p in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]  # nn.Module


class MLP(nn.Module):
    """Two-layer perceptron on ``(..., d_model)`` with hidden width ``mlp_ratio * d_model``."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.activation = config.activation
        hidden = config.mlp_ratio * config.d_model
        self.fc = nn.Linear(config.d_model, hidden, bias=config.bias)
        self.proj = nn.Linear(hidden, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself; ``(..., d_model)`` in and out."""
        hidden = self.fc(x)
        hidden = F.gelu(hidden, approximate="tanh") if self.activation == "gelu" else F.relu(hidden).square()
        return self.proj(hidden)  # type: ignore[no-any-return]  # nn.Module


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.d_model)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config.norm, config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        """One block on ``x`` of shape ``(B, T, d_model)``; same shape and dtype out."""
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]  # nn.Module

    def residual_projections(self) -> tuple[nn.Linear, nn.Linear]:
        """The two layers that write into the residual stream (their initial scale is set by depth)."""
        return self.attention.proj, self.mlp.proj


def init_gpt2(block: Block, *, depth: int, std: float = 0.02) -> None:
    """GPT-2's initialisation: normal weights of ``std``, residual projections over ``sqrt(2 * depth)``."""
    residual = block.residual_projections()
    for module in block.modules():
        if isinstance(module, nn.Linear):
            scale = 1 / math.sqrt(2 * depth) if module in residual else 1.0
            nn.init.normal_(module.weight, std=std * scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
