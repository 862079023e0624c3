"""The looped parity transformer: shapes, read-out semantics, gradients past the read-out, batch mates."""

from __future__ import annotations

import pytest
import torch
from stepinfluence.models import ParityConfig, ParityTransformer, parity_loss
from stepinfluence.models.parity_task import ParityExample, collate
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_float64")

SMALL = ParityConfig(d_model=16, n_heads=4)
EXAMPLES = [
    ParityExample(0, "1"),
    ParityExample(1, "0110"),
    ParityExample(2, "10"),
    ParityExample(3, "1110101"),
]


def small_model(config: ParityConfig = SMALL, gain: float = 3.0) -> ParityTransformer:
    """A model with weights large enough that states differ visibly from step to step."""
    torch.manual_seed(0)
    model = ParityTransformer(config)
    with torch.no_grad():
        for parameter in model.block.parameters():
            parameter.mul_(gain)
    return model


@pytest.fixture(params=[True, False], ids=["norm-in-loop", "norm-at-read-out"])
def model(request: pytest.FixtureRequest) -> ParityTransformer:
    return small_model(ParityConfig(d_model=16, n_heads=4, norm_in_loop=request.param))


def step_inputs(model: ParityTransformer, batch: dict[str, Tensor]) -> list[Tensor]:
    """The state that enters each loop step, with the gradient that reaches it through that step alone."""
    entered: list[Tensor] = []

    def keep(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state = args[0].clone()  # a node of its own: the state before it may be what is read out
        state.requires_grad_().retain_grad()
        entered.append(state)
        return (state, *args[1:])

    handle = model.block.register_forward_pre_hook(keep)
    parity_loss(model, batch).sum().backward()
    handle.remove()
    return entered


def test_shapes_and_steps(model: ParityTransformer) -> None:
    batch = collate(EXAMPLES)
    entries = 0

    def count(*_: object) -> None:
        nonlocal entries
        entries += 1

    model.block.register_forward_hook(count)
    logits = model(batch["tokens"], batch["read_step"])
    assert logits.shape == (4, 9, 6)
    assert entries == 7 + 2  # n + 2 for the longest string
    entries = 0
    model(batch["tokens"], batch["read_step"], steps=12)
    assert entries == 12
    assert parity_loss(model, batch).shape == (4,)


def test_the_state_after_step_n_is_read(model: ParityTransformer) -> None:
    batch = collate(EXAMPLES)
    logits = model(batch["tokens"], batch["read_step"])[batch["mask"]]
    trajectory = model.answer_trajectory(batch["tokens"], batch["read_step"])
    assert trajectory.hidden.shape == (4, 9, 16)
    assert trajectory.logits.shape == (4, 9, 6)
    at_read_step = trajectory.logits[torch.arange(4), batch["read_step"] - 1]
    torch.testing.assert_close(logits, at_read_step)
    for step in (-2, 0):  # the step before and the step after the read-out hold something else
        neighbour = trajectory.logits[torch.arange(4), batch["read_step"] + step]
        usable = batch["read_step"] + step >= 0
        assert ((logits - neighbour).abs().amax(1)[usable] > 1e-3).all()


def test_one_step_is_block_of_state_plus_input() -> None:
    """NoPE and additive injection: the model is exactly the recurrence that the paper describes."""
    model = small_model()
    batch = collate([ParityExample(0, "101")])
    injected = model.read_in(torch.nn.functional.one_hot(batch["tokens"], 6).double())
    state = torch.zeros_like(injected)
    for _ in range(3):
        state = model.block.norm(model.block.decoder(state + injected))
    expected = model.read_out(state)
    torch.testing.assert_close(model(batch["tokens"], batch["read_step"]), expected)


def test_margin_is_true_minus_false(model: ParityTransformer) -> None:
    batch = collate(EXAMPLES)
    trajectory = model.answer_trajectory(batch["tokens"], batch["read_step"])
    margin = trajectory.margin(batch["labels"][batch["mask"]])
    assert margin.shape == (4, 9)
    odd, even = trajectory.logits[0], trajectory.logits[1]  # "1" and "0110"
    torch.testing.assert_close(margin[0], odd[:, 1] - odd[:, 0])
    torch.testing.assert_close(margin[1], even[:, 0] - even[:, 1])
    with pytest.raises(ValueError, match=r"^parity: got shape \(2,\)"):
        trajectory.margin(torch.tensor([0, 1]))


def test_no_gradient_past_the_read_out(model: ParityTransformer) -> None:
    batch = collate(EXAMPLES)
    entered = step_inputs(model, batch)
    assert len(entered) == 9
    for row, read_step in enumerate(batch["read_step"].tolist()):
        for step, state in enumerate(entered, start=1):
            gradient = torch.zeros(1) if state.grad is None else state.grad[row]
            if step <= read_step:
                assert gradient.abs().max() > 0, (row, step)
            else:
                assert torch.equal(gradient, torch.zeros_like(gradient)), (row, step)


def test_loss_does_not_depend_on_batch_mates(model: ParityTransformer) -> None:
    together = parity_loss(model, collate(EXAMPLES))
    alone = torch.cat([parity_loss(model, collate([example])) for example in EXAMPLES])
    torch.testing.assert_close(together, alone)
    other_mates = parity_loss(model, collate([EXAMPLES[1], ParityExample(9, "0" * 12)]))
    torch.testing.assert_close(together[1], other_mates[0])
    padded = parity_loss(model, collate(EXAMPLES, length=20))
    torch.testing.assert_close(together, padded)


def test_padding_does_not_matter(model: ParityTransformer) -> None:
    batch = collate(EXAMPLES)
    other = dict(batch)
    after = torch.arange(9) > batch["read_step"][:, None]
    other["tokens"] = torch.where(after, torch.randint(0, 4, (4, 9)), batch["tokens"])
    assert not torch.equal(other["tokens"], batch["tokens"])
    torch.testing.assert_close(parity_loss(model, batch), parity_loss(model, other))


def test_answer_logits_are_those_of_forward(model: ParityTransformer) -> None:
    """Dropping finished examples from the loop changes the work, not the numbers or the gradient."""
    batch = collate([*EXAMPLES, ParityExample(4, "01")])
    whole = model(batch["tokens"], batch["read_step"])[batch["mask"]]
    short = model.answer_logits(batch["tokens"], batch["read_step"])
    torch.testing.assert_close(short, whole)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum(), list(model.parameters()))
    got = torch.autograd.grad((short * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(got, expected)


def test_the_loss_is_cross_entropy_at_the_equals_sign() -> None:
    model = small_model()
    batch = collate(EXAMPLES)
    log_p = model.answer_logits(batch["tokens"], batch["read_step"]).log_softmax(-1)
    expected = torch.stack([-log_p[row, example.parity] for row, example in enumerate(EXAMPLES)])
    torch.testing.assert_close(parity_loss(model, batch), expected)


def test_paper_config() -> None:
    with torch.device("meta"):
        model = ParityTransformer()
    d = 256
    assert model.config == ParityConfig(d_model=d, n_heads=64, vocab_size=6)
    block = 12 * d * d + 13 * d + 2 * d  # GPT-2 block with biases and two norms, and the norm of the loop
    assert sum(p.numel() for p in model.block.parameters()) == block
    assert sum(p.numel() for p in model.parameters()) == block + (6 * d + d) + (6 * d + 6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_model": 10, "n_heads": 4}, r"^n_heads: 4 heads do not divide d_model=10"),
        ({"d_model": 0}, r"^d_model: got 0; pass a positive int"),
        ({"vocab_size": 3}, r"^vocab_size: got 3"),
    ],
)
def test_config_is_checked(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParityConfig(**kwargs)
    with pytest.raises(TypeError, match=r"^n_heads: got float 4.0; pass a positive int"):
        ParityConfig(n_heads=4.0)  # type: ignore[arg-type]


def test_bad_input_is_refused() -> None:
    model = small_model()
    batch = collate(EXAMPLES)
    tokens, read_step = batch["tokens"], batch["read_step"]
    with pytest.raises(ValueError, match=r"^read_step: got values 1 .. 7; pass 1 .. 5 for 9 tokens and 5 loop"):
        model(tokens, read_step, steps=5)
    with pytest.raises(ValueError, match=r"^read_step: got values 0 .. 6"):
        model(tokens, read_step - 1)
    with pytest.raises(ValueError, match=r"^read_step: got torch.int64 of shape \(3,\)"):
        model(tokens, read_step[:3])
    with pytest.raises(ValueError, match=r"^tokens: got ids 0 .. 9; the vocabulary is 0 .. 5"):
        model(torch.where(tokens == 3, 9, tokens), read_step)
    with pytest.raises(ValueError, match=r"^tokens: got shape \(9,\)"):
        model(tokens[0], read_step)
    with pytest.raises(ValueError, match=r"^tokens: got dtype torch.float32"):
        model(tokens.float(), read_step)
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        model(tokens, read_step, steps=0)
