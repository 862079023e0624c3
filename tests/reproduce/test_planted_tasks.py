"""Tasks with known steps: the states are those of the algorithm, and end at the answer."""

from __future__ import annotations

import pytest
import torch

from reproduce.planted.model import LoopedRewriter, RewriterConfig
from reproduce.planted.tasks.addition import Addition
from reproduce.planted.tasks.copying import Copying
from reproduce.planted.tasks.running_parity import RunningParity
from reproduce.planted.tasks.sorting import Sorting
from reproduce.planted.tasks.step_task import StepTask

pytestmark = pytest.mark.usefixtures("in_float64")

TASKS = [Copying(5), Copying(2, symbols=3), Addition(4), Addition(1, base=10), Sorting(5), Sorting(6), RunningParity(7)]


def states(task: StepTask, tokens: list[int]) -> list[list[int]]:
    return task.states(torch.tensor([tokens]))[0].tolist()


def test_sorting_compares_alternate_pairs() -> None:
    assert states(Sorting(5, values=6), [5, 3, 4, 1, 2]) == [
        [5, 3, 4, 1, 2],
        [3, 5, 1, 4, 2],
        [3, 1, 5, 2, 4],
        [1, 3, 2, 5, 4],
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
    ]


def test_addition_moves_carries_by_one_digit_a_step() -> None:
    task = Addition(3, base=10)
    # 999 + 001, least significant digit first: the carry runs through all digits.
    tokens = [task.token(9, 1), task.token(9, 0), task.token(9, 0), 0]
    assert states(task, tokens) == [[9, 9, 9, 0], [0, 9, 9, 0], [0, 0, 9, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_addition_moves_all_carries_at_once() -> None:
    task = Addition(3, base=10)
    tokens = [task.token(5, 5), task.token(6, 7), task.token(1, 2), 0]
    assert states(task, tokens) == [[5, 6, 1, 0], [0, 3, 3, 0], [0, 4, 4, 0], [0, 4, 4, 0], [0, 4, 4, 0]]


def test_copying_fills_one_slot_a_step() -> None:
    task = Copying(3, symbols=4)
    empty = task.empty
    assert states(task, [2, 1, empty, empty, empty, empty]) == [
        [2, 1, empty, empty, empty, empty],
        [2, 1, empty, 2, empty, empty],
        [2, 1, empty, 2, 1, empty],
        [2, 1, empty, 2, 1, empty],
    ]


def test_parity_goes_one_position_further_and_resets() -> None:
    assert states(RunningParity(5), [1, 1, 1, 2, 1]) == [
        [1, 1, 1, 0, 1],
        [1, 0, 1, 0, 1],
        [1, 0, 1, 0, 1],
        [1, 0, 1, 0, 1],
        [1, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.tokens}")
def test_the_last_state_is_the_answer(task: StepTask) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.cat([task.sample(100, generator), task.sample(100, generator, rare=True)])
    for tokens, shown in zip(inputs.tolist(), task.states(inputs)[:, -1].tolist(), strict=True):
        if isinstance(task, Sorting):
            assert shown == sorted(tokens)
        elif isinstance(task, Copying):
            assert shown[task.length :] == tokens[: task.length]
        elif isinstance(task, Addition):
            first, second, total = (
                sum(digit * task.base**place for place, digit in enumerate(digits))
                for digits in ([t // task.base for t in tokens], [t % task.base for t in tokens], shown)
            )
            assert first + second == total
        else:
            assert isinstance(task, RunningParity)
            parity = 0
            for token, value in zip(tokens, shown, strict=True):
                parity = 0 if token == task.reset else parity ^ token
                assert value == parity


@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.tokens}")
def test_only_rare_samples_hold_the_rare_token(task: StepTask) -> None:
    generator = torch.Generator().manual_seed(1)
    common, rare = task.sample(300, generator), task.sample(300, generator, rare=True)
    assert not task.has_rare(common).any()
    assert task.has_rare(rare).all()
    for inputs in (common, rare):
        assert set(inputs.unique().tolist()) <= set(range(task.vocab_in))
        shown = task.states(inputs)
        assert shown.shape == (300, task.steps + 1, task.tokens)
        assert set(shown.unique().tolist()) <= set(range(task.vocab_out))


def test_long_carries_occur() -> None:
    task = Addition(5)
    changes = task.changes(task.states(task.sample(500, torch.Generator().manual_seed(2))))
    assert (changes[:, 3] > 0).float().mean() > 0.05


def test_changes_count_answer_positions_only() -> None:
    task = Copying(3, symbols=4)
    inputs = torch.tensor([[2, 1, 4, 4, 4, 4], [0, 1, 2, 4, 4, 4]])
    assert task.changes(task.states(inputs)).tolist() == [[1, 1, 0], [1, 1, 1]]


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"inputs: got torch.int64 of shape \(1, 3\); pass int64 of shape \(N, 5\)"):
        Sorting(5).states(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens 9 .. 9; task 'sorting' has 0 .. 7"):
        Sorting(5).states(torch.full((1, 5), 9))
    with pytest.raises(ValueError, match="count: got 0"):
        Sorting(5).sample(0, torch.Generator())
    with pytest.raises(ValueError, match="length: got 1"):
        RunningParity(1)
    with pytest.raises(ValueError, match="chain: got 2"):
        Addition(3, chain=2)


def test_the_model_is_read_out_after_its_last_step_and_sees_both_sides() -> None:
    model = LoopedRewriter(RewriterConfig(vocab_in=4, vocab_out=3, tokens=5, steps=3, d_model=8, n_heads=2))
    tokens = torch.randint(4, (2, 5))
    states = model.hidden(tokens)
    assert len(states) == 3
    torch.testing.assert_close(model(tokens), model.read_out(states[-1]))
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 4
    assert not torch.allclose(model(tokens)[:, 0], model(other)[:, 0])
    with pytest.raises(ValueError, match=r"tokens: got shape \(2, 4\); pass \(batch, 5\)"):
        model(tokens[:, :4])
