"""The looped parity transformer of the paper's Appendix D.2, after Fan et al. (arXiv 2409.15647).

One weight-tied GPT-2 decoder block, no positional embedding, a linear read-in of one-hot tokens, and the
embedded input added to the state before every loop step. A string of ``n`` bits is read out after loop step
``n`` (``read_step``, 1-indexed; the paper's ``batch_nums``), at the "=" token, which sits at position ``n``
(0-indexed). Later loop steps run but reach no loss, so their influence is exactly zero.

``model.block`` is the loop body: its forward is entered once for each loop step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepinfluence.arguments import heads_divide, positive_int
from stepinfluence.models.blocks import Block, BlockConfig, init_gpt2


@dataclass(frozen=True)
class ParityConfig:
    """Shape of the looped parity transformer. The defaults are the paper's (D.2).

    Args:
        d_model: width of the state.
        n_heads: attention heads; must divide ``d_model``.
        vocab_size: tokens: bits 0 and 1, "=" (2), padding (3), 4 unused, 5 the label of ignored positions.
        mlp_ratio: hidden width of the MLP, in units of ``d_model``.
        norm_in_loop: apply the final LayerNorm at the end of *every* loop step, where Fan et al. have it
            (their body is a whole GPT-2 backbone, which ends in that norm); False applies it once, before the
            read-out.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is not positive, ``n_heads`` does not divide ``d_model``, or ``vocab_size`` < 4.
    """

    d_model: int = 256
    n_heads: int = 64
    vocab_size: int = 6
    mlp_ratio: int = 4
    norm_in_loop: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "vocab_size", "mlp_ratio"):
            positive_int(name, getattr(self, name))
        heads_divide(self.d_model, self.n_heads)
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size: got {self.vocab_size}; bits, '=' and padding need at least 4")


@dataclass(frozen=True)
class AnswerTrajectory:
    """What the answer position holds after each loop step (paper Figure 1).

    Attributes:
        hidden: state at the "=" token, ``(B, steps, d_model)``; entry ``t`` is the state after step ``t +
            1``.
        logits: read-out of those states, ``(B, steps, vocab_size)``.
    """

    hidden: Tensor
    logits: Tensor

    def margin(self, parity: Tensor) -> Tensor:
        """Logit of the true parity minus logit of the other one, after each step: ``(B, steps)``.

        Args:
            parity: the true parities, 0 or 1, an integer tensor of shape ``(B,)``.

        Raises:
            ValueError: ``parity`` has another shape.
        """
        if parity.shape != self.logits.shape[:1]:
            raise ValueError(
                f"parity: got shape {tuple(parity.shape)}; pass one per example, ({self.logits.shape[0]},)"
            )
        sign = (2 * parity - 1).to(self.logits.dtype).to(self.logits.device)
        return (self.logits[..., 1] - self.logits[..., 0]) * sign[:, None]


class ParityLoopBody(nn.Module):
    """One loop step: add the embedded input to the state, apply the decoder block (and the norm)."""

    def __init__(self, config: ParityConfig) -> None:
        super().__init__()
        self.decoder = Block(BlockConfig(config.d_model, config.n_heads, mlp_ratio=config.mlp_ratio))
        self.norm = nn.LayerNorm(config.d_model) if config.norm_in_loop else nn.Identity()
        init_gpt2(self.decoder, depth=1)

    def forward(self, state: Tensor, injected: Tensor) -> Tensor:
        """The state after one more step; all tensors ``(B, T, d_model)``."""
        return self.norm(self.decoder(state + injected))  # type: ignore[no-any-return]  # nn.Module


class ParityTransformer(nn.Module):
    """Looped transformer for parity (paper D.2): read-in, one weight-tied block, per-example read-out step.

    The state starts at zero. ``block`` is the loop body (for attribution: ``attach(model,
    body=model.block)``).

    Args:
        config: shape of the model; the paper's by default.
    """

    def __init__(self, config: ParityConfig | None = None) -> None:
        super().__init__()
        self.config = config = config if config is not None else ParityConfig()
        self.read_in = nn.Linear(config.vocab_size, config.d_model)
        self.block = ParityLoopBody(config)
        self.final_norm = nn.Identity() if config.norm_in_loop else nn.LayerNorm(config.d_model)
        self.read_out = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, tokens: Tensor, read_step: Tensor, steps: int | None = None) -> Tensor:
        """Logits from each example's own read-out step.

        Args:
            tokens: token ids, int64 ``(B, T)``.
            read_step: the loop step after which each example is read, 1-indexed, int64 ``(B,)``; its number
                of bits.
            steps: loop steps to run; ``T`` by default, which is n + 2 for the longest string of a batch that
                :func:`stepinfluence.models.parity_task.collate` padded.

        Returns:
            Logits ``(B, T, vocab_size)``: those of example ``b`` are computed from its state after step
            ``read_step[b]``. Later steps run, and receive a gradient of exactly zero.

        Raises:
            ValueError: shapes do not match, a token id is unknown, or a read-out step is not in ``1 ..
                steps``.
        """
        steps = tokens.shape[-1] if steps is None else positive_int("steps", steps)
        self._check(tokens, read_step, steps)
        captured: Tensor | None = None
        for step, state in self._loop(tokens, steps):
            # torch.where passes exact zeros back to the states that are not read.
            captured = state if captured is None else torch.where((read_step == step)[:, None, None], state, captured)
        return self._decode(captured)

    def answer_logits(self, tokens: Tensor, read_step: Tensor) -> Tensor:
        """Logits at the "=" token only, dropping each example from the loop once it has been read.

        The numbers of ``forward(...)[b, read_step[b]]`` at about half the work: meant for training and
        evaluation. For attribution use :meth:`forward`, which keeps the batch whole in every step.

        Args:
            tokens: token ids, int64 ``(B, T)``.
            read_step: int64 ``(B,)``, the number of bits of each example.

        Returns:
            Logits ``(B, vocab_size)``.

        Raises:
            ValueError: as for :meth:`forward`.
        """
        self._check(tokens, read_step, tokens.shape[-1])
        order = torch.argsort(read_step, descending=True, stable=True)
        remaining = read_step[order]
        still_running = [int(n) for n in torch.bincount(remaining).flip(0).cumsum(0).flip(0)]
        injected = self._embed(tokens[order, : len(still_running)])
        state = torch.zeros_like(injected)
        answers = []
        for step in range(1, len(still_running)):
            running = still_running[step]
            if running < state.shape[0]:
                state, injected = state[:running], injected[:running]
            state = self.block(state, injected)
            kept = still_running[step + 1] if step + 1 < len(still_running) else 0
            answers.append(state[kept:, step])
        in_order = torch.cat(answers[::-1])
        return self._decode(in_order[torch.argsort(order)])

    @torch.no_grad()
    def answer_trajectory(self, tokens: Tensor, answer_position: Tensor, steps: int | None = None) -> AnswerTrajectory:
        """State and logits at the answer position after *every* loop step (paper D.2, mechanistic readouts).

        Args:
            tokens: token ids, int64 ``(B, T)``.
            answer_position: position of "=", 0-indexed, int64 ``(B,)``; equal to the number of bits.
            steps: loop steps to run; ``T`` by default.

        Returns:
            The trajectory, without a gradient graph.

        Raises:
            ValueError: shapes do not match, or a token id or position is out of range.
        """
        steps = tokens.shape[-1] if steps is None else positive_int("steps", steps)
        self._check(tokens, answer_position, None)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        hidden = torch.stack([state[rows, answer_position] for _, state in self._loop(tokens, steps)], dim=1)
        return AnswerTrajectory(hidden=hidden, logits=self._decode(hidden))

    def _embed(self, tokens: Tensor) -> Tensor:
        onehot = F.one_hot(tokens, self.config.vocab_size)
        return self.read_in(onehot.to(self.read_in.weight.dtype))  # type: ignore[no-any-return]  # nn.Module

    def _loop(self, tokens: Tensor, steps: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (step, state after it), step = 1 .. steps."""
        injected = self._embed(tokens)
        state = torch.zeros_like(injected)
        for step in range(1, steps + 1):
            state = self.block(state, injected)
            yield step, state

    def _decode(self, state: Tensor | None) -> Tensor:
        return self.read_out(self.final_norm(state))  # type: ignore[no-any-return]  # nn.Module

    def _check(self, tokens: Tensor, read_step: Tensor, steps: int | None) -> None:
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}; pass a non-empty (batch, tokens)")
        if tokens.dtype != torch.int64:
            raise ValueError(f"tokens: got dtype {tokens.dtype}; pass int64 token ids")
        if read_step.shape != tokens.shape[:1] or read_step.is_floating_point():
            raise ValueError(
                f"read_step: got {read_step.dtype} of shape {tuple(read_step.shape)}; pass one integer "
                f"per example, shape ({tokens.shape[0]},)"
            )
        low, high = int(read_step.min()), int(read_step.max())
        last = tokens.shape[1] - 1 if steps is None else min(steps, tokens.shape[1] - 1)
        if low < 1 or high > last:
            raise ValueError(
                f"read_step: got values {low} .. {high}; pass 1 .. {last} for {tokens.shape[1]} tokens"
                + ("" if steps is None else f" and {steps} loop steps")
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"tokens: got ids {low} .. {high}; the vocabulary is 0 .. {self.config.vocab_size - 1}")


def parity_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Per-example masked cross-entropy (paper D.2): the loss function to attribute with.

    Args:
        model: a :class:`ParityTransformer`, or a module called the same way.
        batch: ``tokens``, ``labels`` and ``mask``, each ``(B, T)``, and ``read_step``, ``(B,)``, as made by
            :func:`stepinfluence.models.parity_task.collate`.

    Returns:
        Losses in nats, ``(B,)``: mean over the positions of the mask, which is the "=" token alone. An
        example's loss does not depend on the other examples of its batch.
    """
    logits = model(batch["tokens"], batch["read_step"])
    per_token = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    mask = batch["mask"].to(per_token.dtype)
    return (per_token * mask).sum(1) / mask.sum(1)
