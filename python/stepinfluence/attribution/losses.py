"""Per-example losses beyond cross entropy: preference pairs, reward-weighted answers, single tokens.

Each returns one loss per example, so it can be passed to ``featurize`` (wrapped so that it takes ``(model, batch)``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_losses(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross entropy of each next token.

    Args:
        logits: ``(B, T, vocabulary)``.
        tokens: ``(B, T)`` int; ``logits[:, t]`` predicts ``tokens[:, t + 1]``.
        mask: ``(B, T)`` bool; tokens to predict. All if not given.

    Returns:
        ``(B, T - 1)`` in nats; zero where the predicted token is masked out.

    Raises:
        ValueError: shapes do not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits: got {tuple(logits.shape)} for tokens {tuple(tokens.shape)}; give (B, T, vocabulary) for (B, T)"
        )
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"mask: got {tuple(mask.shape)}; give {tuple(tokens.shape)}, as tokens")
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses if mask is None else losses * mask[:, 1:]


def sequence_log_probs(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(B,)``: log probability of the (unmasked) tokens of each sequence; arguments as for :func:`token_losses`."""
    return -token_losses(logits, tokens, mask).sum(1)


def interleave(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``(B, ...)`` twice to ``(2 B, ...)``: both answers of a pair next to each other.

    One forward pass then serves both, loop steps of the two coincide, and the capture can tell the pairs apart: a first
    dimension that is a multiple of the number of examples is read as examples by parts.

    Raises:
        ValueError: shapes differ.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected: got {tuple(rejected.shape)} for chosen {tuple(chosen.shape)}; pad them alike")
    return torch.stack([chosen, rejected], 1).flatten(0, 1)


def dpo_loss(log_probs: Tensor, reference_log_probs: Tensor, beta: float = 0.1) -> Tensor:
    """Loss of preference pairs (Rafailov et al., DPO, 2023, eq. 7), one per pair.

    Args:
        log_probs: ``(2 B,)`` of the model, interleaved: chosen, rejected, chosen, ...
        reference_log_probs: ``(2 B,)`` of the reference model, without gradient.
        beta: strength of the pull towards the reference, > 0.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: an odd number, other shapes, or ``beta`` is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta: got {beta}; give a positive number")
    if log_probs.dim() != 1 or len(log_probs) % 2 or reference_log_probs.shape != log_probs.shape:
        raise ValueError(
            f"log_probs: got {tuple(log_probs.shape)} and {tuple(reference_log_probs.shape)} of the reference; "
            "give (2 B,) of both, chosen and rejected in turn"
        )
    gains = (log_probs - reference_log_probs).view(-1, 2)
    return -F.logsigmoid(beta * (gains[:, 0] - gains[:, 1]))


def reward_weighted_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """``(B,)``: minus reward times log probability: the gradient of REINFORCE, with advantages as rewards.

    Args:
        log_probs: ``(B,)`` of sampled answers.
        rewards: ``(B,)``; a constant of the example, no gradient flows into it.

    Raises:
        ValueError: shapes differ.
    """
    if log_probs.shape != rewards.shape or log_probs.dim() != 1:
        raise ValueError(
            f"rewards: got {tuple(rewards.shape)} for log_probs {tuple(log_probs.shape)}; give (B,) of both"
        )
    return -rewards.detach() * log_probs


def one_example_per_token(tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A sequence as one example for each token that is predicted, to ask which *tokens* mattered.

    The gradient of a sequence's loss is the sum of its tokens' gradients: influence of these examples adds up to the
    influence of the sequence (of its summed loss).

    Args:
        tokens: ``(T,)`` one sequence.
        mask: ``(T,)`` bool; tokens to ask about. All that are predicted if not given.

    Returns:
        tokens: ``(N, T)`` the sequence again and again.
        places: ``(N,)`` int64: the place of the token that each example is about, in ``1 .. T - 1``.

    Raises:
        ValueError: not one sequence, or nothing to ask about.
    """
    if tokens.dim() != 1:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}; give one sequence (T,)")
    asked = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device) if mask is None else mask.clone()
    asked[:1] = False  # nothing predicts the first
    places = asked.nonzero().flatten()
    if not len(places):
        raise ValueError("mask: chooses no token that is predicted; the first one never is")
    return tokens.expand(len(places), -1), places


def loss_at(losses: Tensor, places: Tensor) -> Tensor:
    """``(N,)``: of :func:`token_losses` ``(N, T - 1)``, each example's loss at its own token (``places`` as above)."""
    return losses.gather(1, places[:, None] - 1).squeeze(1)
