"""The looped Sudoku transformer of the paper's Appendix D.3, after Yang et al. (arXiv 2307.04895).

One weight-tied block with bidirectional attention. The state starts at the embedded board and nothing is injected
later: what the model keeps of the givens, it keeps in its state. The number of loop steps is free in every call.

``model.block`` is the loop body: its forward is entered once for each loop step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from stepinfluence.arguments import heads_divide, one_of, positive_int
from stepinfluence.models.blocks import Block, BlockConfig, init_gpt2
from torch import Tensor, nn

Positions: TypeAlias = Literal["cell", "row_column_box"]


@dataclass(frozen=True)
class SudokuConfig:
    """Shape of the looped Sudoku transformer. The defaults are the paper's (D.3).

    Args:
        box_rows: rows of a box.
        box_columns: columns of a box; the board has ``(box_rows * box_columns) ** 2`` cells.
        d_model: width of the state.
        n_heads: attention heads; must divide ``d_model``.
        mlp_ratio: hidden width of the MLP, in units of ``d_model``.
        positions: learned position embeddings: ``"cell"`` (one vector for each cell, as in the paper) or
            ``"row_column_box"`` (the sum of one for the row, one for the column and one for the box: the model is told
            which cells constrain one another, which is most of what it has to find out otherwise).
        steps: loop steps unless ``forward`` is told otherwise.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is not positive, ``n_heads`` does not divide ``d_model``, or unknown ``positions``.
    """

    box_rows: int = 3
    box_columns: int = 3
    d_model: int = 128
    n_heads: int = 4
    mlp_ratio: int = 4
    positions: Positions = "cell"
    steps: int = 32

    def __post_init__(self) -> None:
        for name in ("box_rows", "box_columns", "d_model", "n_heads", "mlp_ratio", "steps"):
            positive_int(name, getattr(self, name))
        heads_divide(self.d_model, self.n_heads)
        one_of("positions", self.positions, get_args(Positions))

    @property
    def side(self) -> int:
        """Cells in a row, and values that a cell can take: 9 on the usual board."""
        return self.box_rows * self.box_columns

    @property
    def cells(self) -> int:
        """Cells of the board: 81 on the usual one."""
        return self.side**2


def units(box_rows: int, box_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and box of every cell of a board, each int64 ``(cells,)``, cells numbered row by row."""
    side = box_rows * box_columns
    rows = torch.arange(side).repeat_interleave(side)
    columns = torch.arange(side).repeat(side)
    boxes = rows // box_rows * (side // box_columns) + columns // box_columns
    return rows, columns, boxes


class BoardEmbedding(nn.Module):
    """Values and positions of a board's cells as vectors: ``(B, cells)`` int64 in, ``(B, cells, d_model)`` out."""

    where: Tensor

    def __init__(self, config: SudokuConfig) -> None:
        super().__init__()
        self.value = nn.Embedding(config.side + 1, config.d_model)
        groups: tuple[Tensor, ...] = (torch.arange(config.cells),)
        if config.positions == "row_column_box":
            groups = units(config.box_rows, config.box_columns)
        offsets = torch.tensor([0, *(int(g.max()) + 1 for g in groups)]).cumsum(0)
        self.position = nn.Embedding(int(offsets[-1]), config.d_model)
        where = torch.stack([g + offset for g, offset in zip(groups, offsets, strict=False)], dim=1)
        self.register_buffer("where", where, persistent=False)
        for table in (self.value, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed ``tokens``, 0 for a blank cell and else the value."""
        return self.value(tokens) + self.position(self.where).sum(1)  # type: ignore[no-any-return]  # nn.Module


class SudokuTransformer(nn.Module):
    """Looped transformer for Sudoku (paper D.3): embedding, one weight-tied block, norm, one logit for each value.

    Args:
        config: shape of the model; the paper's by default.
    """

    def __init__(self, config: SudokuConfig | None = None) -> None:
        super().__init__()
        self.config = config = config if config is not None else SudokuConfig()
        self.embedding = BoardEmbedding(config)
        self.block = Block(BlockConfig(config.d_model, config.n_heads, mlp_ratio=config.mlp_ratio, causal=False))
        self.final_norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.side, bias=False)
        init_gpt2(self.block, depth=1)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor, steps: int | None = None) -> Tensor:
        """Logits after the last loop step.

        Args:
            tokens: boards, int64 ``(B, cells)`` row by row: 0 for a blank cell, else the value 1 .. ``side``.
            steps: loop steps to run; the config's by default.

        Returns:
            Logits ``(B, cells, side)``; entry ``v`` is that of value ``v + 1``.

        Raises:
            ValueError: ``tokens`` has another shape or dtype or a value out of range, or ``steps`` is not positive.
        """
        *_, state = self.states(tokens, self.config.steps if steps is None else steps)
        return self.read_out(state)

    def states(self, tokens: Tensor, steps: int) -> Iterator[Tensor]:
        """The state ``(B, cells, d_model)`` after each of the loop steps 1 .. ``steps``.

        What a smaller budget of steps would have ended with is among them: nothing depends on the steps to come.

        Raises:
            ValueError: as for :meth:`forward`.
        """
        steps = positive_int("steps", steps)
        self._check(tokens)
        state = self.embedding(tokens)
        for _ in range(steps):
            state = self.block(state)
            yield state

    def read_out(self, state: Tensor) -> Tensor:
        """Logits ``(..., side)`` of a state ``(..., d_model)``."""
        return self.head(self.final_norm(state))  # type: ignore[no-any-return]  # nn.Module

    def _check(self, tokens: Tensor) -> None:
        cells, side = self.config.cells, self.config.side
        if tokens.dim() != 2 or tokens.shape[1] != cells or tokens.dtype != torch.int64 or not len(tokens):
            raise ValueError(
                f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}; pass int64 of shape (batch, {cells})"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high > side:
            raise ValueError(f"tokens: got values {low} .. {high}; pass 0 for blanks and 1 .. {side}")


def sudoku_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Per-example cross-entropy, mean over the blank cells (paper D.4): the loss function to attribute with.

    Args:
        model: a :class:`SudokuTransformer`, or a module called the same way.
        batch: ``tokens`` and ``solution``, each int64 ``(B, cells)``: the board with 0 for its blanks, and the solved
            board with values from 1.

    Returns:
        Losses in nats, ``(B,)``.

    Raises:
        ValueError: a board without blanks.
    """
    return blank_loss(model(batch["tokens"]), batch["tokens"], batch["solution"])


def blank_loss(logits: Tensor, tokens: Tensor, solution: Tensor) -> Tensor:
    """Cross-entropy of ``logits`` ``(B, cells, side)``, mean over each board's blanks: ``(B,)``, in nats.

    Raises:
        ValueError: a board without blanks.
    """
    blank = tokens == 0
    count = blank.sum(1)
    if not bool((count > 0).all()):
        raise ValueError(f"tokens: boards {(count == 0).nonzero().flatten().tolist()} have no blank; leave them out")
    per_cell = F.cross_entropy(logits.transpose(1, 2), solution - 1, reduction="none")
    return (per_cell * blank).sum(1) / count
