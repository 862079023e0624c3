"""The tiny recursive model (Jolicoeur-Martineau, arXiv 2510.04871) by its package, on Sudokus of four by four."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems.common import collate, planted, shortened
from stepinfluence.evaluation.training import Recipe

Example = tuple[Tensor, Tensor]

TRM = Recipe(80, 3e-3, warmup=10, decay=True, root_epsilon=1e-6, batch_size=64)
SUPERVISED = 2
"""Times that the model is run and its answer supervised, each from where the last one left off (deep supervision)."""


def trm(
    *,
    n_train: int = 192,
    n_query: int = 32,
    updates: int | None = None,
    given: int = 9,
    width: int = 32,
    seed: int = 0,
) -> Problem:
    """Fill in Sudokus of four by four cells. The loss is the mean over cells of the last supervised run.

    One training puzzle in sixteen has two symbols of its solution exchanged. Queries are other grids than those trained
    on. As in the package a run has several rounds, of which the last one alone has a gradient; no halting is learnt, as
    its target jumps with the answer.

    Args:
        n_train, n_query: puzzles.
        updates: in place of the recipe's.
        given: cells that are given.
        width: of the model.
        seed: of the data.

    Raises:
        ModuleNotFoundError: ``tiny-recursive-model`` is not installed.
        ValueError: more puzzles than there are grids.
    """
    grids = _grids()
    if n_train + n_query > len(grids):
        raise ValueError(f"n_train, n_query: got {n_train} and {n_query}; there are {len(grids)} grids")
    rng = np.random.default_rng(seed)
    solutions = grids[torch.from_numpy(rng.permutation(len(grids))[: n_train + n_query])]
    puzzles = solutions.clone()
    for puzzle in puzzles:
        puzzle[torch.from_numpy(rng.permutation(16)[given:])] = 0
    wrong = planted(rng, n_train)
    for row in np.flatnonzero(wrong):
        a, b = rng.permutation(4)[:2] + 1
        exchanged = torch.arange(5)
        exchanged[[a, b]] = torch.tensor([b, a])
        solutions[row] = exchanged[solutions[row]]
    examples = list(zip(puzzles, solutions, strict=True))
    return Problem(
        name="trm",
        train=examples[:n_train],
        queries=examples[n_train:],
        untrained=lambda seed: _model(seed, width),
        loss=loss,
        body=lambda model: model.network,  # type: ignore[return-value, arg-type]
        collate=collate,
        training=TRM if updates is None else shortened(TRM, updates),
        correct=correct,
        mislabelled=wrong,
        about="a query is right where all sixteen cells are",
    )


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy ``(B,)``: mean over cells and supervised runs."""
    puzzles, solutions = batch
    runs = _predictions(model, puzzles)
    each = [F.cross_entropy(run.transpose(1, 2), solutions, reduction="none").mean(1) for run in runs]
    return torch.stack(each).mean(0)


def correct(model: nn.Module, batch: Any) -> Tensor:
    """``(B,)`` bool: every cell right after the last run."""
    puzzles, solutions = batch
    found: Tensor = (_predictions(model, puzzles)[-1].argmax(2) == solutions).all(1)
    return found


def _predictions(model: Any, puzzles: Tensor) -> list[Tensor]:
    """Logits ``(B, 16, 5)`` of each supervised run."""
    outputs, latents = model.get_initial()
    found = []
    for _ in range(SUPERVISED):
        outputs, latents, logits, _ = model(puzzles, outputs, latents)
        found.append(logits)
    return found


def _grids() -> Tensor:
    """All 288 solved grids ``(288, 16)`` of the symbols 1 to 4."""
    lines = list(itertools.permutations(range(1, 5)))
    solved = []
    for rows in itertools.product(lines, repeat=4):
        columns = all(len({row[k] for row in rows}) == 4 for k in range(4))
        boxes = (rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2))
        if columns and all(len(set(box)) == 4 for box in boxes):
            solved.append([symbol for row in rows for symbol in row])
    return torch.tensor(solved)


def _model(seed: int, width: int) -> nn.Module:
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLPMixer1D(dim=width, depth=1, seq_len=16)
        made: nn.Module = TinyRecursiveModel(
            dim=width, num_tokens=5, network=network, num_refinement_blocks=2, num_latent_refinements=2
        )
    return made
