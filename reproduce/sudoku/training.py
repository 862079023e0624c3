"""Training of the looped Sudoku transformer (paper D.3): a random number of loop steps for every batch, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from stepinfluence.arguments import non_negative_int, one_of, positive_float, positive_int
from stepinfluence.files import save_torch, write_atomically
from stepinfluence.models.gpt import sample_loop_counts
from torch import Tensor, nn
from tqdm import tqdm

from reproduce.sudoku.data import SudokuSet
from reproduce.sudoku.model import SudokuConfig, SudokuTransformer, blank_loss

LossAt: TypeAlias = Literal["last", "every"]
Optimizer: TypeAlias = Literal["adamw", "muon"]


@dataclass(frozen=True)
class SudokuTrainConfig:
    """Everything but the puzzles that determines a training run.

    Args:
        model: shape of the model.
        updates: optimizer updates.
        batch_size: boards in a batch; every epoch goes through the training set in a new order.
        mean_steps, sigma, max_steps: loop steps of a batch, Poisson-log-normal as in
            :func:`~stepinfluence.models.gpt.sample_loop_counts`, clipped to ``1 .. max_steps``.
        first_mean_steps, rise_from, rise: the mean is the first until update ``rise_from`` and grows linearly to
            ``mean_steps`` until update ``rise``: a run of few updates learns more with short ones first. ``rise`` 0: it
            is ``mean_steps`` throughout.
        loss_at: ``"last"``: the loss after the last loop step; ``"every"``: its mean over all loop steps run.
        optimizer: ``"adamw"``, or ``"muon"``: Muon for the block's matrices, scaled to AdamW's size of update, and
            AdamW for all else.
        learning_rate: the optimizer's, after a linear warm-up of ``warmup`` updates.
        final_learning_rate: what it falls to along a half cosine; never 0, since checkpoints are weighted by it.
        warmup: updates of linear warm-up.
        betas: AdamW's.
        weight_decay: of matrices of linear layers only.
        clip_norm: largest gradient norm.
        checkpoints: number of checkpoints, at equal distances; the last one is the end.
        seed: of the initial weights, the order of the boards and the loop counts.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    model: SudokuConfig = field(default_factory=SudokuConfig)
    updates: int = 100_000
    batch_size: int = 16
    mean_steps: float = 32.0
    sigma: float = 0.5
    max_steps: int = 64
    first_mean_steps: float = 8.0
    rise_from: int = 0
    rise: int = 0
    loss_at: LossAt = "last"
    optimizer: Optimizer = "adamw"
    learning_rate: float = 6e-4
    final_learning_rate: float = 6e-4
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    checkpoints: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "max_steps", "checkpoints"):
            positive_int(name, getattr(self, name))
        for name in ("warmup", "seed", "rise_from", "rise"):
            non_negative_int(name, getattr(self, name))
        for name in ("mean_steps", "first_mean_steps", "sigma", "learning_rate", "final_learning_rate", "clip_norm"):
            positive_float(name, getattr(self, name))
        one_of("loss_at", self.loss_at, get_args(LossAt))
        one_of("optimizer", self.optimizer, get_args(Optimizer))
        if self.checkpoints > self.updates:
            raise ValueError(f"checkpoints: got {self.checkpoints}; pass at most updates={self.updates}")
        if self.rise >= self.updates:
            raise ValueError(f"rise: got {self.rise}; pass less than updates={self.updates}")
        if self.rise_from and self.rise_from >= self.rise:
            raise ValueError(f"rise_from: got {self.rise_from}; pass less than rise={self.rise}")

    @property
    def checkpoint_updates(self) -> tuple[int, ...]:
        """Updates (from 1) after which a checkpoint is made."""
        return tuple(round(self.updates * k / self.checkpoints) for k in range(1, self.checkpoints + 1))

    def loop_counts(self) -> Tensor:
        """Loop steps of each update's batch, int64 ``(updates,)``."""
        generator = torch.Generator().manual_seed(self.seed)
        counts = sample_loop_counts(
            self.mean_steps, self.updates, sigma=self.sigma, maximum=self.max_steps, generator=generator
        )
        for update in range(self.rise):
            share = max(0, update - self.rise_from) / (self.rise - self.rise_from)
            mean = self.first_mean_steps + share * (self.mean_steps - self.first_mean_steps)
            draw = sample_loop_counts(mean, 1, sigma=self.sigma, maximum=self.max_steps, generator=generator)
            counts[update] = draw[0]
        return counts


@dataclass(frozen=True)
class SudokuTraining:
    """Outcome of :func:`train_sudoku`.

    Attributes:
        model: the trained model, in eval mode.
        losses: of each update's batch, in nats, float32 ``(updates,)``.
        loop_counts: loop steps of each update, int64 ``(updates,)``.
        checkpoints: paths, in order.
        learning_rates: of each checkpoint.
        seconds: spent here; less than the whole where an earlier run was taken up.
    """

    model: SudokuTransformer
    losses: Tensor
    loop_counts: Tensor
    checkpoints: tuple[Path, ...]
    learning_rates: tuple[float, ...]
    seconds: float


def new_model(config: SudokuTrainConfig) -> SudokuTransformer:
    """The model with its initial weights; the global random state is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SudokuTransformer(config.model)


def train_sudoku(
    config: SudokuTrainConfig,
    data: SudokuSet,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> SudokuTraining:
    """Train, and leave checkpoints in a folder; a run that was interrupted goes on from its last one.

    Batches and loop counts are functions of the seed and the number of the update, so a run that was taken up again
    is the same as one that was not interrupted (to the last bit on one machine and thread count).

    Args:
        config: the run.
        data: puzzles to train on.
        folder: holds the checkpoints of this run and of no other; made if missing.
        device: where to train.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: fewer puzzles than a batch takes, or puzzles of another board.
    """
    began = time.perf_counter()
    if len(data) < config.batch_size:
        raise ValueError(f"data: {len(data)} puzzles are less than batch_size={config.batch_size}; pass more")
    if (data.box_rows, data.box_columns) != (config.model.box_rows, config.model.box_columns):
        raise ValueError(f"data: boxes of {data.box_rows} x {data.box_columns}; the model's board has others")
    folder.mkdir(parents=True, exist_ok=True)
    model = new_model(config).to(device)
    optimizers = _optimizers(config, model)
    counts = config.loop_counts()
    losses = torch.zeros(config.updates)
    paths = tuple(folder / f"update-{update:07d}.pt" for update in config.checkpoint_updates)
    done = _take_up(paths, config, model, optimizers, losses)
    boards = {k: v.to(device) for k, v in data.batches(len(data))[0].items() if k != "ids"}
    updates = range(done + 1, config.updates + 1)
    with tqdm(updates, initial=done, total=config.updates, desc="training", disable=not progress) as bar:
        for update in bar:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = _learning_rate(config, update)
            rows = _rows(config, len(data), update).to(device)
            tokens, solution = boards["tokens"][rows], boards["solution"][rows]
            loss = _loss(model, tokens, solution, int(counts[update - 1]), config.loss_at)
            model.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
            losses[update - 1] = loss.detach()
            if update % 50 == 0:
                bar.set_postfix(loss=f"{float(losses[update - 50 : update].mean()):.3f}", refresh=False)
            if update in config.checkpoint_updates:
                _save(paths[config.checkpoint_updates.index(update)], model, optimizers, losses[:update])
    model.eval()
    return SudokuTraining(
        model,
        losses,
        counts,
        paths,
        tuple(_learning_rate(config, update) for update in config.checkpoint_updates),
        time.perf_counter() - began,
    )


def _loss(model: SudokuTransformer, tokens: Tensor, solution: Tensor, steps: int, at: LossAt) -> Tensor:
    if at == "last":
        return blank_loss(model(tokens, steps), tokens, solution).mean()
    each = [blank_loss(model.read_out(state), tokens, solution).mean() for state in model.states(tokens, steps)]
    return torch.stack(each).mean()


def _optimizers(config: SudokuTrainConfig, model: SudokuTransformer) -> list[torch.optim.Optimizer]:
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    others = [p for p in model.parameters() if p not in matrices]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "muon":
        inner = [p for p in model.block.parameters() if p in matrices]
        muon = torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        read_out = [{"params": [model.head.weight], "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return [muon, torch.optim.AdamW(read_out, lr=rate, betas=config.betas)]
    groups = [
        {"params": [p for p in model.parameters() if p in matrices], "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=rate, betas=config.betas)]


def _learning_rate(config: SudokuTrainConfig, update: int) -> float:
    """Rate of ``update``, from 1."""
    if update <= config.warmup:
        return config.learning_rate * update / config.warmup
    share = (update - config.warmup) / max(1, config.updates - config.warmup)
    fall = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + fall * (1 + math.cos(math.pi * share)) / 2


def _rows(config: SudokuTrainConfig, size: int, update: int) -> Tensor:
    """Rows of the batch of ``update`` (from 1): a slice of its epoch's permutation; what does not fill a batch is
    left out until the next epoch."""
    epoch, place = divmod(update - 1, size // config.batch_size)
    order = np.random.default_rng((config.seed, 3, epoch)).permutation(size)
    return torch.from_numpy(order[place * config.batch_size : (place + 1) * config.batch_size])


def _save(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], losses: Tensor) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    content = {"model": model.state_dict(), "optimizers": states, "losses": losses.clone()}
    write_atomically(path, lambda aside: save_torch(content, aside))


def _take_up(
    paths: Sequence[Path],
    config: SudokuTrainConfig,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    losses: Tensor,
) -> int:
    """Load the last checkpoint there is; returns the number of updates that are done."""
    for path, update in reversed([*zip(paths, config.checkpoint_updates, strict=True)]):
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            losses[:update] = state["losses"]
            return update
    return 0
