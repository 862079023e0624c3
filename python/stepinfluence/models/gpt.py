"""The looped GPT of the paper's Appendix D.1: prelude, recurrent core, coda, in nanochat's style.

    tokens -> embedding -> prelude blocks -> e
    state <- core(state, e)                     ``steps`` times; core: injection adapter and blocks
    state -> coda blocks -> head -> logits

After Geiping et al. (arXiv 2502.05171) and McLeish et al. (2025), built from nanochat's block (Karpathy,
2025): rotary positions, parameter-free RMSNorm, query/key norm, squared ReLU, no biases, untied head.

``model.core`` is the loop body: its forward is entered once for each loop step, and it holds "the recurrent
core plus the injection adapter", which is what the paper attributes to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepinfluence.arguments import (
    heads_divide,
    non_negative_int,
    one_of,
    positive_float,
    positive_int,
)
from stepinfluence.models.blocks import Block, BlockConfig, Norm, RotaryTable, make_norm, rotary_table

Injection: TypeAlias = Literal["adapter", "add", "none"]
InitialState: TypeAlias = Literal["zeros", "noise", "prelude"]


@dataclass(frozen=True)
class LoopedGPTConfig:
    """Shape of the looped GPT. The defaults are the paper's 135.1M-parameter model (D.1).

    The paper gives the total, the 2-4-2 layout and nanochat as the source, not the width. nanochat's own
    defaults (``d_model`` 768, ``vocab_size`` 50304, untied, no biases) with a ``2 d -> d`` adapter give
    135,069,696 parameters, which is 135.1M.

    Args:
        vocab_size: number of tokens.
        d_model: width of the residual stream.
        n_heads: attention heads; must divide ``d_model`` into heads of even width.
        sequence_len: longest input, in tokens.
        n_prelude: blocks before the loop.
        n_core: blocks in the loop body.
        n_coda: blocks after the loop.
        steps: loop steps (tau) unless ``forward`` is told otherwise.
        bptt_k: backpropagate through the last ``bptt_k`` loop steps only (D.5); None for all of them (D.1).
        injection: how the prelude output enters each step: ``"adapter"`` (linear on the concatenation of
            state and prelude output), ``"add"`` or ``"none"``. With ``"none"`` the state must start at
            ``"prelude"``.
        initial_state: ``"zeros"``, ``"noise"`` (normal) or ``"prelude"`` (the prelude output).
        initial_state_std: standard deviation of the noise; 1 is the scale of a normalised state.
        norm: ``"rmsnorm_plain"`` (as in nanochat), ``"rmsnorm"`` or ``"layernorm"``.
        norm_state: normalise the state that leaves the core, which bounds it however many steps are run.
        qk_norm: RMS-normalise queries and keys.
        fused_qkv: one matrix for query, key and value instead of nanochat's three.
        mlp_ratio: hidden width of the MLP, in units of ``d_model``.
        logit_softcap: logits are ``cap * tanh(logits / cap)``, as in nanochat; None turns it off.
        zero_init: start the residual projections and the head at zero, as nanochat does. Off by default: the
            gradient of every other weight is then exactly zero at the start, which tests nothing.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size out of range, an unknown option, or a combination that cannot work.
    """

    vocab_size: int = 50_304
    d_model: int = 768
    n_heads: int = 6
    sequence_len: int = 128
    n_prelude: int = 2
    n_core: int = 4
    n_coda: int = 2
    steps: int = 32
    bptt_k: int | None = None
    injection: Injection = "adapter"
    initial_state: InitialState = "zeros"
    initial_state_std: float = 1.0
    norm: Norm = "rmsnorm_plain"
    norm_state: bool = True
    qk_norm: bool = True
    fused_qkv: bool = False
    mlp_ratio: int = 4
    logit_softcap: float | None = 15.0
    zero_init: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_heads", "sequence_len", "n_core", "steps", "mlp_ratio"):
            positive_int(name, getattr(self, name))
        for name in ("n_prelude", "n_coda"):
            non_negative_int(name, getattr(self, name))
        if self.bptt_k is not None:
            positive_int("bptt_k", self.bptt_k)
        heads_divide(self.d_model, self.n_heads)
        if (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"n_heads: {self.n_heads} heads of odd width {self.d_model // self.n_heads}; rotary "
                "embeddings rotate pairs, pass an even d_model / n_heads"
            )
        one_of("injection", self.injection, get_args(Injection))
        one_of("initial_state", self.initial_state, get_args(InitialState))
        if self.injection == "none" and self.initial_state != "prelude":
            raise ValueError(
                f"initial_state: got {self.initial_state!r} with injection='none', so the input would "
                "never reach the loop; pass initial_state='prelude'"
            )
        positive_float("initial_state_std", self.initial_state_std)
        if self.logit_softcap is not None:
            positive_float("logit_softcap", self.logit_softcap)
        _ = self.block  # building the blocks' config checks the rest

    @property
    def block(self) -> BlockConfig:
        """The config of every block of the model."""
        return BlockConfig(
            self.d_model,
            self.n_heads,
            norm=self.norm,
            activation="relu2",
            bias=False,
            fused_qkv=self.fused_qkv,
            qk_norm=self.qk_norm,
            mlp_ratio=self.mlp_ratio,
        )

    @property
    def effective_depth(self) -> int:
        """Blocks that a token passes: ``n_prelude + n_core * steps + n_coda`` (132 for the paper's model)."""
        return self.n_prelude + self.n_core * self.steps + self.n_coda

    @classmethod
    def paper(cls) -> LoopedGPTConfig:
        """The paper's scalability model (D.1): 135,069,696 parameters, 32 loop steps, full BPTT."""
        return cls()

    @classmethod
    def nanochat(cls) -> LoopedGPTConfig:
        """The paper's recursive nanochat (D.5): 328,335,360 parameters, mean of 4 loop steps.

        The paper gives the total and the 2-4-2 layout; nanochat's 20-layer widths (``d_model`` 1280, ``vocab_size``
        65536, heads of width 128) give it. The state starts at the prelude output and is not normalised, as in the
        public recursive nanochat (TrelisResearch/nanochat). Training truncates the backward pass to 4 steps
        (``forward(bptt_k=4)``), SDI does not.
        """
        return cls(
            vocab_size=65_536, d_model=1280, n_heads=10, sequence_len=2048, steps=4, initial_state="prelude",
            norm_state=False, zero_init=True,
        )  # fmt: skip

    @classmethod
    def large(cls) -> LoopedGPTConfig:
        """A model of 1,321,730,048 parameters with 12 loop steps, 914 million of them in the loop: the 2-layer prelude
        and coda of D.1 around a core of 18 blocks of nanochat's widths at depth 22 (``d_model`` 2048, heads of width
        128).

        Make it with ``with torch.device("meta")`` where only its shape is asked for: its weights take 5.3 GB.
        """
        return cls(d_model=2048, n_heads=16, sequence_len=2048, n_core=18, steps=12)

    @classmethod
    def tiny(cls) -> LoopedGPTConfig:
        """The same layout in about 30,000 parameters, for tests: width 32, 16 tokens, 4 loop steps."""
        return cls(vocab_size=61, d_model=32, n_heads=2, sequence_len=16, n_prelude=1, n_core=1, n_coda=0, steps=4)


class LoopedCore(nn.Module):
    """The loop body: injection of the prelude output, then the core blocks, then (optionally) a norm."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        self.injection = config.injection
        if config.injection == "adapter":
            self.adapter = nn.Linear(2 * config.d_model, config.d_model, bias=False)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.n_core))
        self.norm = make_norm(config.norm, config.d_model) if config.norm_state else nn.Identity()

    def forward(self, state: Tensor, injected: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        """The state after one more loop step; ``state`` and ``injected`` are ``(B, T, d_model)``."""
        if self.injection == "adapter":
            state = self.adapter(torch.cat((state, injected), dim=-1))
        elif self.injection == "add":
            state = state + injected
        for block in self.blocks:
            state = block(state, rotary)
        return self.norm(state)  # type: ignore[no-any-return]  # nn.Module


class LoopedGPT(nn.Module):
    """Depth-recurrent GPT (paper D.1 and D.5): prelude, looped core with injection adapter, coda.

    Args:
        config: shape of the model; the paper's 135.1M-parameter one by default.

    ``core`` is the loop body (for attribution: ``attach(model, body=model.core)``).
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: LoopedGPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config if config is not None else LoopedGPTConfig()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = make_norm(config.norm, config.d_model)
        self.prelude = nn.ModuleList(Block(config.block) for _ in range(config.n_prelude))
        self.core = LoopedCore(config)
        self.coda = nn.ModuleList(Block(config.block) for _ in range(config.n_coda))
        self.final_norm = make_norm(config.norm, config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        cos, sin = rotary_table(config.sequence_len, config.d_model // config.n_heads)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self._init_weights()

    def forward(
        self,
        tokens: Tensor,
        steps: int | None = None,
        *,
        bptt_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: token ids, int64 ``(B, T)``, ``T <= sequence_len``.
            steps: loop steps (tau); the config's by default.
            bptt_k: truncation of the backward pass, in loop steps; the config's by default. Earlier steps run
                without a graph: their gradient is exactly zero.
            generator: source of the initial noise (``initial_state="noise"``); torch's global one by default.

        Returns:
            Logits ``(B, T, vocab_size)``, float32 or the model's dtype if that is wider.

        Raises:
            ValueError: ``tokens`` of another shape or dtype or too long, or a count that is not positive.
        """
        steps = self.config.steps if steps is None else positive_int("steps", steps)
        bptt_k = self.config.bptt_k if bptt_k is None else positive_int("bptt_k", bptt_k)
        self._check(tokens)
        rotary = (self.rotary_cos, self.rotary_sin)
        x = self.embedding_norm(self.embedding(tokens))
        for block in self.prelude:
            x = block(x, rotary)
        state = self._initial_state(x, generator)
        untracked = 0 if bptt_k is None else max(0, steps - bptt_k)
        # Truncated BPTT (D.5): with the state detached before the last k steps, no gradient reaches the
        # earlier ones, so they need no graph at all.
        with torch.set_grad_enabled(torch.is_grad_enabled() and untracked == 0):
            for _ in range(untracked):
                state = self.core(state, x, rotary)
        for _ in range(steps - untracked):
            state = self.core(state, x, rotary)
        for block in self.coda:
            state = block(state, rotary)
        logits: Tensor = self.head(self.final_norm(state))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _initial_state(self, injected: Tensor, generator: torch.Generator | None) -> Tensor:
        kind = self.config.initial_state
        if kind == "zeros":
            return torch.zeros_like(injected)
        if kind == "prelude":
            return injected
        device = injected.device if generator is None else generator.device
        noise = torch.randn(injected.shape, generator=generator, device=device, dtype=torch.float32)
        return (noise * self.config.initial_state_std).to(injected)

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.numel() == 0 or tokens.is_floating_point():
            raise ValueError(
                f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}; pass non-empty integer "
                "token ids of shape (batch, tokens)"
            )
        if tokens.shape[1] > self.config.sequence_len:
            raise ValueError(
                f"tokens: got {tokens.shape[1]} tokens, the model takes {self.config.sequence_len}; "
                "pass shorter inputs or a larger sequence_len"
            )

    @torch.no_grad()
    def _init_weights(self) -> None:
        """nanochat's scales, with non-zero residual projections unless ``zero_init``."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                nn.init.normal_(module.weight, std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=0.02)
        blocks = [*self.prelude, *self.core.blocks, *self.coda]
        for block in blocks:
            assert isinstance(block, Block)
            for projection in block.residual_projections():
                # As in GPT-2: every block adds to the stream, so each adds less the more of them there are.
                projection.weight.mul_(0.0 if self.config.zero_init else 1 / math.sqrt(2 * len(blocks)))
        if self.config.zero_init:
            nn.init.zeros_(self.head.weight)


def gpt_loss(model: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Per-example language-model loss (paper D.1): mean over tokens of the cross-entropy.

    Args:
        model: a :class:`LoopedGPT`, or a module or function from token ids to logits.
        batch: ``tokens`` and ``targets``, int64 ``(B, T)``; optionally ``mask``, ``(B, T)``, non-zero where a
            target counts (D.5).

    Returns:
        Losses in nats, ``(B,)``.

    Raises:
        ValueError: an example whose mask is empty.
    """
    logits = model(batch["tokens"])
    per_token = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
    if "mask" not in batch:
        return per_token.mean(dim=1)
    mask = batch["mask"].to(per_token.dtype)
    valid = mask.sum(1)
    if not bool((valid > 0).all()):
        empty = (valid <= 0).nonzero().flatten().tolist()
        raise ValueError(f"mask: examples {empty} of the batch have no valid token; leave them out")
    return (per_token * mask).sum(1) / valid


def sample_loop_counts(
    mean: float,
    size: int,
    *,
    sigma: float = 0.5,
    maximum: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Loop counts from the Poisson-log-normal distribution of Geiping et al. (arXiv 2502.05171, section 3.3).

    ``rate ~ LogNormal(log(mean) - sigma^2 / 2, sigma)``, then ``count = Poisson(rate) + 1``: mean ``mean +
    1`` and variance ``mean + mean^2 (exp(sigma^2) - 1)`` before clipping. McLeish et al. (2025) and the paper
    (D.3: mean 32, clipped at 64; D.5: mean 4) sample the same way.

    Args:
        mean: target mean of the rate.
        size: number of counts to draw.
        sigma: standard deviation of the logarithm of the rate.
        maximum: clip the counts to ``1 .. maximum``; unbounded by default.
        generator: source of randomness; torch's global one by default.

    Returns:
        int64 tensor of shape ``(size,)``, on the generator's device; every count at least 1.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument that is not positive.
    """
    mean, sigma = positive_float("mean", mean), positive_float("sigma", sigma)
    size = positive_int("size", size)
    device = torch.device("cpu") if generator is None else generator.device
    normal = torch.randn(size, generator=generator, device=device, dtype=torch.float64)
    rates = torch.exp(math.log(mean) - sigma**2 / 2 + sigma * normal)
    counts = torch.poisson(rates, generator=generator).to(torch.int64) + 1
    return counts if maximum is None else counts.clamp(max=positive_int("maximum", maximum))
