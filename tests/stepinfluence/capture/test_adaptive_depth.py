"""Depth that varies: by token, by example, by batch. Held against autograd on batches of one, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import compare
from stand_ins import Block, Huginn, MixtureOfRecursions, Ouro, UniversalTransformer
from stepinfluence import BodyError, attach
from stepinfluence.capture.session import seed_batch
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("in_float64")

VOCABULARY, D, TOKENS = 11, 8, 5


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (size, TOKENS), generator=generator) for size in sizes or (4, 3, 5, 1)]


def by_token(logits: Tensor, ids: Tensor) -> Tensor:
    """``(B, T)``: cross-entropy of the token before, so that a causal model has something to look up."""
    return F.cross_entropy(logits.transpose(1, 2), ids.roll(1, 1), reduction="none")


def widened(model: nn.Module) -> nn.Module:
    """With weights large enough that gates differ from token to token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.7)
    return model


def act_loss(model: Any, ids: Tensor) -> Tensor:
    logits, ponder = model(ids)
    return (by_token(logits, ids) + 0.1 * ponder).mean(1)


@pytest.mark.parametrize("body", [["transition"], ["transition", "halt"]], ids=" and ".join)
def test_act_by_token(body: list[str]) -> None:
    """Tokens halt at steps of their own; a batch runs until its last token has."""
    model = widened(UniversalTransformer(VOCABULARY, D, 2, max_steps=6))
    with torch.no_grad():
        model.halt.bias.fill_(-1)
    result = compare(model, batches(), act_loss, body=body)
    assert 1 < min(result.lengths) < max(result.lengths)
    for row, length in enumerate(result.lengths):
        assert not result.sketches.values[row, length:].any()


class HaltingByExample(nn.Module):
    """Graves's adaptive computation time with one halting unit per sequence: the mean state of all steps, weighted.

    ``leaves``: an example that has halted leaves the batch; else it goes on, with weight zero.
    """

    def __init__(self, *, leaves: bool) -> None:
        super().__init__()
        self.embed, self.core, self.halt = nn.Embedding(VOCABULARY, D), Block(D, 2), nn.Linear(D, 1)
        self.head, self.leaves = nn.Linear(D, VOCABULARY), leaves

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        state = self.embed(ids)
        there = torch.arange(len(ids))
        left, ponder, out = torch.ones(len(ids)), torch.zeros(len(ids)), torch.zeros_like(state)
        for step in range(6):
            state = self.core(state)
            p = self.halt(state.mean(1)).sigmoid().squeeze(-1)
            rest = left[there]
            last = (rest - p < 0.1) | (step == 5)
            weight = torch.where(rest > 0, torch.where(last, rest, p), 0.0)
            out = out.index_add(0, there, weight[:, None, None] * state)
            ponder = ponder.index_add(0, there, (rest > 0) + torch.where(last, rest, 0.0))
            left = left.index_add(0, there, -weight).index_fill(0, there[last], 0.0)
            if self.leaves:
                there, state = there[~last], state[~last]
            if not bool((left > 0).any()):
                break
        return self.head(out), ponder.unsqueeze(1)


@pytest.mark.parametrize("leaves", [False, True], ids=["stays with weight zero", "leaves the batch"])
def test_act_by_example(leaves: bool) -> None:
    result = compare(widened(HaltingByExample(leaves=leaves)), batches(), act_loss, body=["core"])
    assert 0 < min(result.lengths) < max(result.lengths)


def expected_loss(model: Any, ids: Tensor) -> Tensor:
    logits, exits = model(ids)
    losses = torch.stack([by_token(step, ids) for step in logits])
    entropy = -(exits * exits.clamp(min=1e-9).log()).sum(0)
    return ((exits * losses).sum(0) - 0.1 * entropy).mean(1)


@pytest.mark.parametrize("body", [["model.layers"], ["model.layers", "model.norm", "model.early_exit_gate"]], ids=len)
def test_expected_loss_over_exits(body: list[str]) -> None:
    result = compare(widened(Ouro(VOCABULARY, D, 2, layers=2, total_ut_steps=3)), batches(), expected_loss, body=body)
    assert set(result.lengths) == {3}


def test_the_gate_alone() -> None:
    """Ouro's second stage: only the gate is trained, against the improvement of the loss from step to step."""

    def loss_fn(model: Any, ids: Tensor) -> Tensor:
        logits, exits = model(ids)
        losses = torch.stack([by_token(step, ids) for step in logits]).detach()
        return (exits * losses).sum(0).mean(1)

    model = widened(Ouro(VOCABULARY, D, 2, layers=1, total_ut_steps=3))
    result = compare(model, batches(), loss_fn, body=["model.early_exit_gate"])
    assert set(result.lengths) == {2}  # the last step takes what is left, whatever its gate says


def exit_loss(model: Any, ids: Tensor) -> Tensor:
    """Every token is read out where the sum of exit probabilities passes a half, as at inference."""
    logits, exits = model(ids)
    at = (exits.cumsum(0) > 0.5).to(torch.uint8).argmax(0)
    chosen = logits.gather(0, at[None, :, :, None].expand(1, -1, -1, VOCABULARY))[0]
    return by_token(chosen, ids).mean(1)


def test_read_out_where_each_token_exits() -> None:
    result = compare(widened(Ouro(VOCABULARY, D, 2, layers=1, total_ut_steps=4)), batches(), exit_loss,
                     body=["model.layers"])  # fmt: skip
    assert len(set(result.lengths)) > 1


class LeavingTheBatch(nn.Module):
    """Early exit at inference: an example leaves when its state has settled. ``how``: rows are taken by mask or index,
    and what left is put back or joined in the order of leaving."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.core, self.head = nn.Embedding(VOCABULARY, D), Block(D, 2), nn.Linear(D, VOCABULARY)
        self.how = how

    def forward(self, ids: Tensor) -> Tensor:
        state = self.embed(ids)
        there, out, done = torch.arange(len(ids)), torch.zeros_like(state), []
        for step in range(5):
            state = self.core(state)
            with torch.no_grad():
                leaves = (state.square().mean((1, 2)) > 25) | (step == 4)
            if self.how == "put back":
                out[there[leaves]] = state[leaves]
            else:
                done.append((there[leaves], state.index_select(0, leaves.nonzero().squeeze(1))))
            there, state = there[~leaves], state[~leaves]
            if not len(there):
                break
        if done:
            out = torch.cat([rows for _, rows in done])[torch.cat([rows for rows, _ in done]).argsort()]
        return self.head(out)


def plain_loss(model: Any, ids: Tensor) -> Tensor:
    return by_token(model(ids), ids).mean(1)


@pytest.mark.parametrize("how", ["put back", "joined"])
def test_examples_leave_the_batch(how: str) -> None:
    result = compare(widened(LeavingTheBatch(how)), batches(), plain_loss, body=["core"])
    assert len(set(result.lengths)) > 2
    assert result.sketches.steps.tolist() != result.lengths


class DepthByToken(nn.Module):
    """Mixture-of-recursions by the token's choice: a router gives every token its number of recursions at the start;
    only tokens that go on are computed, packed in one row of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(VOCABULARY, D), nn.Linear(D, 3)
        self.core, self.head = nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D), nn.Tanh()), nn.Linear(D, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        state = self.embed(ids).cumsum(1)
        weight, depth = self.router(state).softmax(-1).max(-1)
        for recursion in range(3):
            on = depth >= recursion
            if not bool(on.any()):
                break
            state = state.index_put((on,), state[on] + weight[on].unsqueeze(-1) * self.core(state[on]))
        return self.head(state)


def test_tokens_leave_by_their_own_choice() -> None:
    result = compare(widened(DepthByToken()), [b[:, :2] for b in batches()], plain_loss, body=["core"])
    assert len(set(result.lengths)) > 1


def test_tokens_leave_by_the_choice_of_routers() -> None:
    model = widened(MixtureOfRecursions(VOCABULARY, D, 2, kept=(1.0, 0.6, 0.2)))
    recursions = ["layers.1", "layers.2", "layers.3"]
    assert set(compare(model, batches(), plain_loss, body=recursions, loop="timeline").lengths) == {3}
    blocks = [f"{name}.block" for name in recursions]
    compare(model, batches(), plain_loss, body=blocks, loop="timeline")
    with pytest.raises(
        BodyError, match=r"layers\.1\.block\.\S+: used outside the loop body"
    ):  # by the other recursions
        attach(model, body=blocks[0]).featurize(batches(), plain_loss)


HUGINN = ["transformer.adapter", "transformer.core_block"]


def test_random_depth_by_batch() -> None:
    """Depth, truncation and the start state follow from the seed and the place of the batch."""
    model = widened(Huginn(VOCABULARY, D, 2, mean_recurrence=4, backprop_depth=2))
    result = compare(
        model, batches(), plain_loss, body=HUGINN, training=True, seed=3, whole_batch=lambda k: seed_batch(3, k)
    )
    depths = result.sketches.steps.tolist()
    assert depths == result.lengths
    assert len(set(depths)) > 1
    for row, depth in enumerate(depths):
        assert not result.sketches.values[row, : max(0, depth - 2)].any()
        assert result.sketches.values[row, max(0, depth - 2) : depth].any(-1).all()
    other = attach(model, body=HUGINN, training=True, seed=4, sketch_size=16).featurize(batches(), plain_loss)
    assert other.steps.tolist() != depths


def test_steps_that_all_lack_gradients_are_refused() -> None:
    """The published model's eval mode: every step under ``no_grad``."""
    model = widened(Huginn(VOCABULARY, D, 2, mean_recurrence=4, backprop_depth=2))
    with pytest.raises(BodyError, match=r"never used in the loop with gradients on.*training=True") as caught:
        attach(model, body=HUGINN).featurize(batches(), plain_loss)
    assert "\n" not in str(caught.value)


INLINE = {
    "halting by token": (lambda: UniversalTransformer(VOCABULARY, D, 2, max_steps=4), act_loss, "transition"),
    "exit gates": (lambda: Ouro(VOCABULARY, D, 2, layers=1, total_ut_steps=3), expected_loss, "model.layers"),
    "examples leave": (lambda: LeavingTheBatch("put back"), plain_loss, "core"),
    "tokens leave": (
        lambda: MixtureOfRecursions(VOCABULARY, D, 2, kept=(1.0, 0.4)),
        plain_loss,
        ["layers.1", "layers.2"],
    ),
}


@pytest.mark.parametrize("name", INLINE)
def test_inline_features_are_those_of_a_featurize_call(name: str) -> None:
    make, loss_fn, body = INLINE[name]
    model, (batch,) = widened(make()).eval(), batches(4)
    loop: Any = "timeline" if isinstance(body, list) else "entries"
    capture = attach(model, body=body, sketch_size=16, loop=loop)
    expected = capture.featurize([batch], loss_fn)
    with capture.inline(batch, per_step=True) as inline:
        inline.losses(loss_fn(model, batch)).mean().backward()
    torch.testing.assert_close(inline.features.values, expected.values)
    assert torch.equal(inline.features.lengths, expected.lengths)
