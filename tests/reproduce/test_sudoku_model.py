"""The looped Sudoku transformer: the paper's size, free loop counts, loss over blanks, capture of its loop body."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stepinfluence import ExactCapture, attach

from reproduce.sudoku.model import SudokuConfig, SudokuTransformer, blank_loss, sudoku_loss

pytestmark = pytest.mark.usefixtures("in_float64")

TINY = SudokuConfig(2, 2, d_model=16, n_heads=2, steps=3)


@pytest.fixture
def model() -> SudokuTransformer:
    torch.manual_seed(0)
    return SudokuTransformer(TINY)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    solution = torch.tensor([[1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]]).repeat(3, 1)
    tokens = solution.clone()
    for row, blanks in enumerate(([0, 5], [1, 2, 3, 9, 15], [7])):
        tokens[row, blanks] = 0
    return {"tokens": tokens, "solution": solution}


def test_the_paper_s_model_has_one_block_of_width_128() -> None:
    model = SudokuTransformer()
    assert (model.config.side, model.config.cells, model.config.steps) == (9, 81, 32)
    assert sum(p.numel() for p in model.block.parameters()) == 12 * 128**2 + 13 * 128
    assert model.embedding.position.weight.shape == (81, 128)


def test_attention_sees_the_whole_board(model: SudokuTransformer, batch: dict[str, torch.Tensor]) -> None:
    changed = batch["tokens"].clone()
    changed[:, -1] = 2
    before, after = (model(tokens, 1)[:, 0] for tokens in (batch["tokens"], changed))
    assert not torch.allclose(before[0], after[0])  # the first cell depends on the last


def test_states_are_those_of_smaller_budgets(model: SudokuTransformer, batch: dict[str, torch.Tensor]) -> None:
    states = list(model.states(batch["tokens"], 5))
    assert len(states) == 5
    for steps in (1, 3, 5):
        torch.testing.assert_close(model.read_out(states[steps - 1]), model(batch["tokens"], steps))
    torch.testing.assert_close(model(batch["tokens"]), model(batch["tokens"], 3))


def test_cells_of_one_unit_share_an_embedding() -> None:
    model = SudokuTransformer(SudokuConfig(2, 3, d_model=8, n_heads=2, positions="row_column_box"))
    table, where = model.embedding.position.weight, model.embedding.where
    assert table.shape == (18, 8)
    assert where.shape == (36, 3)
    # Cells 0 and 8 (row 1, column 2): other row, other column, same box.
    assert where[0].tolist() == [0, 6, 12]
    assert where[8].tolist() == [1, 8, 12]
    tokens = torch.zeros(1, 36, dtype=torch.int64)
    expected = model.embedding.value.weight[0] + table[1] + table[8] + table[12]
    torch.testing.assert_close(model.embedding(tokens)[0, 8], expected)


def test_the_loss_is_the_mean_over_blanks(model: SudokuTransformer, batch: dict[str, torch.Tensor]) -> None:
    losses = sudoku_loss(model, batch)
    logits = model(batch["tokens"])
    for row in range(3):
        blanks = (batch["tokens"][row] == 0).nonzero().flatten()
        by_hand = F.cross_entropy(logits[row, blanks], batch["solution"][row, blanks] - 1)
        torch.testing.assert_close(losses[row], by_hand)


def test_sketches_of_the_loop_body_agree_with_exact_gradients(
    model: SudokuTransformer, batch: dict[str, torch.Tensor]
) -> None:
    sketched = attach(model, body=model.block, sketch_size=4096).featurize([batch], sudoku_loss)
    exact = ExactCapture(model, body=model.block).featurize([batch], sudoku_loss)
    assert sketched.values.shape[:2] == exact.values.shape[:2] == (3, 3)
    ours, theirs = (f.values.flatten(0, 1) @ f.values.flatten(0, 1).T for f in (sketched, exact))
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_wrong_input_is_refused(model: SudokuTransformer, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"tokens: got torch.int64 of shape \(3, 15\)"):
        model(batch["tokens"][:, 1:])
    with pytest.raises(ValueError, match=r"tokens: got values 0 \.\. 5"):
        model(torch.where(batch["tokens"] == 4, 5, batch["tokens"]))
    with pytest.raises(ValueError, match="steps: got 0"):
        model(batch["tokens"], 0)
    with pytest.raises(ValueError, match=r"boards \[1\] have no blank"):
        blank_loss(torch.zeros(2, 16, 4), torch.tensor([[0] * 16, [1] * 16]), torch.ones(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="positions: got 'rows'"):
        SudokuConfig(positions="rows")  # type: ignore[arg-type]
