"""Small stand-ins for published looped models whose code is on no package index: their loops and names of parts.

Written for the tests from the papers; nothing here is the authors' code, and no published weights fit. Module names are
those of the published models, so that ``body=`` is what one would write for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Self-attention and a gated perceptron, each behind an RMSNorm; ``conv``: with URM's short convolution in it."""

    def __init__(self, d: int, heads: int, *, causal: bool = True, conv: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(2 * d, d, bias=False)
        self.conv = nn.Conv1d(2 * d, 2 * d, 3, padding=1, groups=2 * d, bias=False) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        inner = F.silu(gate) * value
        if self.conv is not None:
            inner = F.silu(self.conv(inner.transpose(1, 2)).transpose(1, 2))
        out: Tensor = x + self.down(inner)
        return out


class UniversalTransformer(nn.Module):
    """Dehghani et al. 2018, with adaptive computation time (Graves 2016) for each token.

    ``forward`` returns logits ``(B, T, V)`` and the ponder cost ``(B, T)``: steps taken, plus what was left of the
    halting probability at the last. A batch runs until its last token has halted.
    """

    def __init__(self, vocab: int, d: int, heads: int, max_steps: int, threshold: float = 0.9) -> None:
        super().__init__()
        self.embed, self.time = nn.Embedding(vocab, d), nn.Embedding(max_steps, d)
        self.transition, self.halt, self.head = Block(d, heads), nn.Linear(d, 1), nn.Linear(d, vocab)
        self.max_steps, self.threshold = max_steps, threshold

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        state = self.embed(ids)
        halted = torch.zeros(ids.shape, dtype=state.dtype)  # probability so far
        remainder, taken = torch.zeros_like(halted), torch.zeros_like(halted)
        for step in range(self.max_steps):
            running = (halted < self.threshold) & (remainder == 0)
            if not bool(running.any()):
                break
            told = state + self.time.weight[step]
            p = self.halt(told).sigmoid().squeeze(-1)
            last = running & ((halted + p > self.threshold) | (step == self.max_steps - 1))
            weight = torch.where(last, 1 - halted, p) * running
            remainder = torch.where(last, 1 - halted, remainder)
            halted = halted + torch.where(running & ~last, p, 0.0)
            taken = taken + running
            state = state + (self.transition(told) - state) * weight.unsqueeze(-1)  # a token that halted stays
        return self.head(state), taken + remainder


class Ouro(nn.Module):
    """LoopLM (Ouro): a stack of layers applied ``total_ut_steps`` times, a language head and an exit gate after each.

    ``forward`` returns logits ``(steps, B, T, V)`` and the probability of leaving after each step ``(steps, B, T)``.
    """

    def __init__(self, vocab: int, d: int, heads: int, layers: int, total_ut_steps: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens, self.model.norm = nn.Embedding(vocab, d), nn.RMSNorm(d)
        self.model.layers = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.model.early_exit_gate = nn.Linear(d, 1)
        self.lm_head, self.total_ut_steps = nn.Linear(d, vocab, bias=False), total_ut_steps

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        state, logits, exits = self.model.embed_tokens(ids), [], []
        stays = torch.ones(ids.shape, dtype=state.dtype)
        for step in range(self.total_ut_steps):
            for layer in self.model.layers:
                state = layer(state)
            state = self.model.norm(state)
            leaves = self.model.early_exit_gate(state).sigmoid().squeeze(-1)
            exits.append(stays if step == self.total_ut_steps - 1 else stays * leaves)
            stays = stays * (1 - leaves)
            logits.append(self.lm_head(state))
        return torch.stack(logits), torch.stack(exits)


class Huginn(nn.Module):
    """Huginn (recurrent depth, Geiping et al. 2025): prelude, a core fed with the embedding at every step, coda.

    In training mode the depth of a batch is drawn from a Poisson log-normal, and gradients go back through the last
    ``backprop_depth`` steps. In eval mode the published model runs ``mean_recurrence`` steps, all without gradient;
    ``num_steps=(without, with gradient)`` says otherwise. The core starts from noise.
    """

    def __init__(self, vocab: int, d: int, heads: int, mean_recurrence: int, backprop_depth: int) -> None:
        super().__init__()
        parts = {name: nn.ModuleList([Block(d, heads)]) for name in ("prelude", "core_block", "coda")}
        parts |= {"wte": nn.Embedding(vocab, d), "adapter": nn.Linear(2 * d, d, bias=False), "ln_f": nn.RMSNorm(d)}
        self.transformer, self.lm_head = nn.ModuleDict(parts), nn.Linear(d, vocab, bias=False)
        self.mean_recurrence, self.backprop_depth = mean_recurrence, backprop_depth

    def draw(self) -> tuple[int, int]:
        """Steps without and with gradient: a Poisson of a log-normal rate, plus one (section 3.3 of the paper)."""
        if not self.training:
            return self.mean_recurrence, 0
        rate = torch.zeros(1).log_normal_(mean=math.log(self.mean_recurrence) - 0.125, std=0.5)
        depth = int(torch.poisson(rate)) + 1
        return max(depth - self.backprop_depth, 0), min(depth, self.backprop_depth)

    def forward(self, ids: Tensor, num_steps: Sequence[int] | None = None) -> Tensor:
        parts = self.transformer
        embedded = parts["prelude"][0](parts["wte"](ids))
        state = torch.randn_like(embedded)
        without, with_gradient = self.draw() if num_steps is None else num_steps
        for step in range(without + with_gradient):
            with torch.set_grad_enabled(step >= without):
                state = parts["core_block"][0](parts["adapter"](torch.cat([state, embedded], -1)))
        logits: Tensor = self.lm_head(parts["ln_f"](parts["coda"][0](parts["ln_f"](state))))
        return logits


class URM(nn.Module):
    """Universal Reasoning Model (Gao et al. 2025): layers with a short convolution, the input added at every loop, and
    truncated backpropagation: the first ``forward_only`` loops have no gradient.

    ``forward`` is one segment: it takes the state of the last one and returns the next, detached, with logits
    ``(B, T, V)`` and the halting logit ``(B,)``.
    """

    def __init__(self, vocab: int, d: int, heads: int, layers: int, loops: int, forward_only: int) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.embed_tokens = nn.Embedding(vocab, d)
        self.inner.layers = nn.ModuleList(Block(d, heads, causal=False, conv=True) for _ in range(layers))
        self.inner.lm_head, self.inner.q_head = nn.Linear(d, vocab, bias=False), nn.Linear(d, 1)
        self.loops, self.forward_only = loops, forward_only

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        embedded = self.inner.embed_tokens(ids)
        state = torch.zeros_like(embedded) if state is None else state
        for loop in range(self.loops):
            with torch.set_grad_enabled(loop >= self.forward_only):
                state = state + embedded
                for layer in self.inner.layers:
                    state = layer(state)
        return state.detach(), self.inner.lm_head(state), self.inner.q_head(state[:, 0]).squeeze(-1)


class Recursion(nn.Module):
    """One recursion over the tokens that its router keeps of those that the last one kept; the others stay as they are.

    ``forward`` takes the state ``(B, T, d)`` and the places of tokens that are left ``(B, n)``, and returns both.
    """

    def __init__(self, d: int, heads: int, share: float) -> None:
        super().__init__()
        self.block, self.mor_router, self.share = Block(d, heads), nn.Linear(d, 1, bias=False), share

    def forward(self, state: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        held = state.gather(1, chosen.unsqueeze(-1).expand(-1, -1, state.shape[-1]))
        weight = self.mor_router(held).sigmoid().squeeze(-1)
        best = weight.topk(max(1, int(self.share * state.shape[1])), dim=1).indices.sort(1).values
        chosen, weight = chosen.gather(1, best), weight.gather(1, best)
        index = chosen.unsqueeze(-1).expand(-1, -1, state.shape[-1])
        return state.scatter_add(1, index, self.block(state.gather(1, index)) * weight.unsqueeze(-1)), chosen


class MixtureOfRecursions(nn.Module):
    """Mixture-of-recursions (Bae et al. 2025), expert choice: a first and a last layer of their own, and between them a
    layer for each recursion, with a router of its own and the weights that all recursions share. ``kept`` holds the
    share of tokens that go on at each."""

    def __init__(self, vocab: int, d: int, heads: int, kept: Sequence[float]) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(vocab, d), nn.Linear(d, vocab, bias=False)
        recursions = [Recursion(d, heads, share) for share in kept]
        for other in recursions[1:]:
            shared = recursions[0].block.named_modules()
            for (_, part), (_, source) in zip(other.block.named_modules(), shared, strict=True):
                part._parameters.update(source._parameters)
        self.layers = nn.ModuleList([Block(d, heads), *recursions, Block(d, heads)])

    def forward(self, ids: Tensor) -> Tensor:
        first, *recursions, last = self.layers
        state = first(self.embed_tokens(ids))
        chosen = torch.arange(ids.shape[1]).expand(ids.shape)  # (B, tokens that are left), in order
        for recursion in recursions:
            state, chosen = recursion(state, chosen)
        logits: Tensor = self.lm_head(last(state))
        return logits
