"""Losses by hand, and that a pair's two answers are one example."""

from __future__ import annotations

import math

import pytest
import torch
from stepinfluence import ExactCapture, attach
from stepinfluence.attribution.losses import (
    dpo_loss,
    interleave,
    loss_at,
    one_example_per_token,
    reward_weighted_loss,
    sequence_log_probs,
    token_losses,
)
from stepinfluence.models import LoopedGPT, LoopedGPTConfig

pytestmark = pytest.mark.usefixtures("in_float64")


def test_token_losses_are_shifted_and_masked() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = 100.0  # sure of token 2 next
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(token_losses(logits, tokens), torch.tensor([[0.0, math.log(4)]]))
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(token_losses(logits, tokens, mask), torch.zeros(1, 2))
    torch.testing.assert_close(sequence_log_probs(logits, tokens), torch.tensor([-math.log(4)]))


def test_dpo_loss_by_hand() -> None:
    found = dpo_loss(torch.tensor([-1.0, -3.0, -2.0, -2.0]), torch.tensor([-2.0, -2.0, -2.0, -2.0]), beta=0.5)
    torch.testing.assert_close(found, torch.tensor([math.log(1 + math.exp(-1.0)), math.log(2)]))


def test_rewards_are_constants() -> None:
    log_probs, rewards = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([1.0, -3.0], requires_grad=True)
    reward_weighted_loss(log_probs, rewards).sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([-1.0, 3.0]))
    assert rewards.grad is None


def test_one_example_per_token() -> None:
    tokens, places = one_example_per_token(torch.tensor([5, 6, 7]), torch.tensor([True, False, True]))
    assert tokens.tolist() == [[5, 6, 7]]
    assert places.tolist() == [2]
    assert loss_at(torch.tensor([[10.0, 20.0]]), places).tolist() == [20.0]


def test_interleaved_pairs_are_captured_as_pairs() -> None:
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=7, d_model=16, n_heads=2, sequence_len=6, n_prelude=1, n_core=1, n_coda=1, steps=3
    )
    model = LoopedGPT(config)

    def loss_fn(model: LoopedGPT, batch: list[torch.Tensor]) -> torch.Tensor:
        tokens = interleave(batch[0], batch[1])
        found = sequence_log_probs(model(tokens), tokens)
        return dpo_loss(found, torch.zeros_like(found))

    batch = [torch.randint(7, (4, 6)), torch.randint(7, (4, 6))]
    sketched = attach(model, body=model.core, sketch_size=4096).featurize([batch], loss_fn, progress=False).values
    exact = ExactCapture(model, body=model.core).featurize([batch], loss_fn, progress=False).values
    assert sketched.shape[:2] == exact.shape[:2] == (4, 3)
    gram = torch.einsum("nsd,mtd->nsmt", exact, exact)
    error = (torch.einsum("nsd,mtd->nsmt", sketched, sketched) - gram).norm() / gram.norm()
    assert error < 0.1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: token_losses(torch.zeros(2, 3), torch.zeros(2, 3)), "logits: got"),
        (lambda: token_losses(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), torch.ones(2, 2)), "mask: got"),
        (lambda: dpo_loss(torch.zeros(3), torch.zeros(3)), "log_probs: got"),
        (lambda: dpo_loss(torch.zeros(4), torch.zeros(4), beta=0), "beta: got 0"),
        (lambda: interleave(torch.zeros(2, 3), torch.zeros(2, 4)), "rejected: got"),
        (lambda: reward_weighted_loss(torch.zeros(2), torch.zeros(3)), "rewards: got"),
        (lambda: one_example_per_token(torch.zeros(1)), "chooses no token"),
        (lambda: one_example_per_token(torch.zeros(1, 2)), "tokens: got shape"),
    ],
)
def test_wrong_arguments_are_named(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()  # type: ignore[operator]
