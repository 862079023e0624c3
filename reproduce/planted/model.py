"""A small looped transformer that rewrites a sequence in place: tokens in, one value for every position out.

    tokens -> embedding + position -> e
    state <- norm(block(state + e))          ``steps`` times, bidirectional, weight-tied
    state -> read-out -> logits              after any step

``model.body`` is the loop body: its forward is entered once for each loop step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stepinfluence.arguments import heads_divide, positive_int
from stepinfluence.models.blocks import Block, BlockConfig, init_gpt2
from torch import Tensor, nn


@dataclass(frozen=True)
class RewriterConfig:
    """Shape of :class:`LoopedRewriter`.

    Args:
        vocab_in, vocab_out: numbers of input tokens and output values.
        tokens: length of every input.
        steps: loop steps.
        d_model: width of the state.
        n_heads: attention heads; must divide ``d_model``.
        mlp_ratio: hidden width of the MLP, in units of ``d_model``.

    Raises:
        TypeError, ValueError: a size is not a positive int, or ``n_heads`` does not divide ``d_model``.
    """

    vocab_in: int
    vocab_out: int
    tokens: int
    steps: int
    d_model: int = 32
    n_heads: int = 4
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        for name in ("vocab_in", "vocab_out", "tokens", "steps", "d_model", "n_heads", "mlp_ratio"):
            positive_int(name, getattr(self, name))
        heads_divide(self.d_model, self.n_heads)


class RewriterBody(nn.Module):
    """One loop step: add the embedded input to the state, apply the block, normalise."""

    def __init__(self, config: RewriterConfig) -> None:
        super().__init__()
        self.block = Block(BlockConfig(config.d_model, config.n_heads, mlp_ratio=config.mlp_ratio, causal=False))
        self.norm = nn.LayerNorm(config.d_model)
        init_gpt2(self.block, depth=1)

    def forward(self, state: Tensor, injected: Tensor) -> Tensor:
        """The state after one more step; all tensors ``(B, tokens, d_model)``."""
        return self.norm(self.block(state + injected))  # type: ignore[no-any-return]  # nn.Module


class LoopedRewriter(nn.Module):
    """See the module's docstring. The state starts at zero."""

    def __init__(self, config: RewriterConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_in, config.d_model)
        self.position = nn.Parameter(torch.zeros(config.tokens, config.d_model))
        self.body = RewriterBody(config)
        self.read_out = nn.Linear(config.d_model, config.vocab_out)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.position, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits after the last step, ``(B, tokens, vocab_out)``, of token ids ``(B, tokens)``, int64."""
        return self.read_out(self.hidden(tokens)[-1])  # type: ignore[no-any-return]  # nn.Module

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters every loop step, ``(B, tokens, d_model)``.

        Raises:
            ValueError: ``tokens`` has another shape than ``(B, config.tokens)``.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.config.tokens:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}; pass (batch, {self.config.tokens})")
        return self.embedding(tokens) + self.position  # type: ignore[no-any-return]  # nn.Module

    def hidden(self, tokens: Tensor) -> list[Tensor]:
        """The state ``(B, tokens, d_model)`` after each loop step.

        Raises:
            ValueError: as for :meth:`embed`.
        """
        injected = self.embed(tokens)
        state = torch.zeros_like(injected)
        states = []
        for _ in range(self.config.steps):
            state = self.body(state, injected)
            states.append(state)
        return states
