"""Training of the looped parity transformer: a length curriculum over a fixed set of named examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepinfluence.arguments import non_negative_int, positive_float, positive_int
from stepinfluence.models._parity_data import ParityExample, collate, make_train_set
from stepinfluence.models._parity_resume import SAVE_EVERY, HistoryRow, TrainState
from stepinfluence.models.parity import ParityConfig, ParityTransformer
from stepinfluence.progress import tqdm

CheckpointCallback = Callable[[int, ParityTransformer, torch.optim.Optimizer], None]
"""Called as ``on_checkpoint(step, model, optimizer)``; the learning rate is in ``optimizer.param_groups``."""


@dataclass(frozen=True)
class ParityTrainConfig:
    """Everything that determines a training run. :meth:`demo` and :meth:`paper` are the presets.

    Args:
        model: shape of the model.
        max_digits: longest training string, in bits.
        train_per_length: training strings of each length (all of them where there are fewer).
        batch_size: strings in a batch; lengths are drawn uniformly from 1 to the curriculum's current
            maximum.
        frontier_share: share of each batch that is drawn at exactly the current maximum instead.
        start_digits: maximum length at the start.
        threshold: smoothed accuracy at the current maximum at which the curriculum moves on; None moves on
            after ``min_steps`` whatever the accuracy (Fan et al.).
        min_steps: least optimizer steps at each maximum length.
        final_steps: steps after the curriculum has been completed, during which the learning rate falls to
            ``final_learning_rate`` along a half cosine.
        max_steps: stop here even if the curriculum has not been completed.
        learning_rate: AdamW's, after a linear warm-up of ``warmup_steps``.
        final_learning_rate: at the last step; never 0, since checkpoints are weighted by their learning rate.
        betas: AdamW's.
        weight_decay: AdamW's.
        clip_norm: largest gradient norm.
        warmup_steps: steps of linear warm-up.
        checkpoint_digits: make a checkpoint when the curriculum has mastered these lengths; there is always
            one at the very end.
        final_checkpoints: further checkpoints, evenly spaced between the end of the curriculum and the very end.
        seed: of the initial weights, the training set and the order of the examples.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    model: ParityConfig = field(default_factory=ParityConfig)
    max_digits: int = 20
    train_per_length: int = 256
    batch_size: int = 64
    frontier_share: float = 0.3
    start_digits: int = 2
    threshold: float | None = 0.98
    min_steps: int = 20
    final_steps: int = 200
    max_steps: int = 4000
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    warmup_steps: int = 50
    checkpoint_digits: tuple[int, ...] = (4, 8, 12, 16, 20)
    final_checkpoints: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "max_digits",
            "train_per_length",
            "batch_size",
            "start_digits",
            "min_steps",
            "max_steps",
        ):
            positive_int(name, getattr(self, name))
        for name in ("final_steps", "final_checkpoints", "warmup_steps", "seed"):
            non_negative_int(name, getattr(self, name))
        for name in ("learning_rate", "final_learning_rate", "clip_norm"):
            positive_float(name, getattr(self, name))
        if self.start_digits > self.max_digits:
            raise ValueError(f"start_digits: got {self.start_digits}; pass at most max_digits={self.max_digits}")
        if not 0 <= self.frontier_share <= 1:
            raise ValueError(f"frontier_share: got {self.frontier_share}; pass a share in 0 .. 1")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}; pass an accuracy in 0 .. 1, or None")
        wrong = [digits for digits in self.checkpoint_digits if not 1 <= digits <= self.max_digits]
        if wrong:
            raise ValueError(f"checkpoint_digits: got {wrong}; pass lengths in 1 .. max_digits={self.max_digits}")

    @classmethod
    def demo(cls, *, seed: int = 0) -> ParityTrainConfig:
        """A 13,000-parameter model on strings of up to 16 bits, trained on one CPU core in about two minutes.

        What makes it reliable: heads of width 4, as in the paper (with fewer, wider ones the curriculum can stall);
        gradients clipped near their usual norm, which is about 0.1 once strings are long (clipped at 1, a single
        explosion through the loop steps could undo a run); a high learning rate, with which models that also solve
        strings longer than any in training are found more often than with half of it; 2048 strings of each length
        rather than a few hundred, and checkpoints along the final phase to choose from: accuracy on longer strings
        comes and goes from one checkpoint to the next.
        """
        return cls(
            model=ParityConfig(d_model=32, n_heads=8),
            max_digits=16,
            train_per_length=2048,
            min_steps=12,
            final_steps=600,
            max_steps=8000,
            learning_rate=2e-3,
            final_learning_rate=5e-5,
            betas=(0.9, 0.99),
            clip_norm=0.1,
            checkpoint_digits=(4, 8, 12, 16),
            final_checkpoints=7,
            seed=seed,
        )


class Curriculum:
    """Grows the longest training string by one bit as accuracy and steps permit (paper section 4, D.2).

    Args:
        start: longest string at first, in bits.
        end: longest string at last.
        threshold: smoothed accuracy that permits the next length; None permits it always.
        min_steps: least updates at each length.

    Attributes:
        max_digits: current longest string.
        accuracy: smoothed accuracy at that length (half-life about 3 updates); starts at chance, 0.5.
        complete: whether the last length has been mastered too.
    """

    smoothing = 0.2

    def __init__(self, start: int, end: int, *, threshold: float | None, min_steps: int) -> None:
        self.max_digits = positive_int("start", start)
        self.end = positive_int("end", end)
        if start > end:
            raise ValueError(f"start: got {start}; pass at most end={end}")
        self.threshold = threshold
        self.min_steps = positive_int("min_steps", min_steps)
        self.accuracy = 0.5
        self.complete = False
        self._updates = 0

    def update(self, accuracy: float) -> int | None:
        """Take in the accuracy of one batch at the current length.

        Args:
            accuracy: share of right answers among the batch's strings of ``max_digits`` bits; NaN if it had
                none.

        Returns:
            The length that has just been mastered, or None.
        """
        self._updates += 1
        if not math.isnan(accuracy):
            self.accuracy += self.smoothing * (accuracy - self.accuracy)
        ready = self._updates >= self.min_steps and (self.threshold is None or self.accuracy >= self.threshold)
        if self.complete or not ready:
            return None
        mastered = self.max_digits
        self.complete = mastered == self.end
        if not self.complete:
            self.max_digits, self.accuracy, self._updates = mastered + 1, 0.5, 0
        return mastered


@dataclass(frozen=True)
class TrainResult:
    """Outcome of :func:`train_parity`.

    Attributes:
        model: the trained model, in eval mode.
        train_set: the examples it was trained on, by id.
        history: one row for each optimizer step.
        checkpoints: (step, learning rate, longest string mastered) of each checkpoint made.
        complete: whether the curriculum was completed before ``max_steps``.
        seconds: wall-clock time of the training.
    """

    model: ParityTransformer
    train_set: list[ParityExample]
    history: list[HistoryRow]
    checkpoints: list[tuple[int, float, int]]
    complete: bool
    seconds: float


def train_parity(
    config: ParityTrainConfig,
    *,
    on_checkpoint: CheckpointCallback | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    resume: Path | None = None,
) -> TrainResult:
    """Train a looped parity transformer on a fixed set of strings, with AdamW and a length curriculum (D.2).

    The same config gives the same run on the same machine and thread count. The global random state is left
    as it was found. Prefer ``torch.set_num_threads(1)`` for small models: a second thread takes a third off the demo's
    time for a step on an idle machine, but makes it several times longer where other programs want the core.

    Args:
        config: the run; see :meth:`ParityTrainConfig.demo`.
        on_checkpoint: called at each checkpoint, with the optimizer still at that step's learning rate.
        device: where to train.
        progress: show a progress bar on stderr.
        resume: a file that keeps where the run stands, written every 50 steps; if it is there, the run goes on from it,
            to the same numbers (on one machine and thread count).

    Returns:
        The model, its training set and the history.

    Raises:
        ValueError: ``resume`` is of a run with other settings.
    """
    began = time.perf_counter()
    train_set = make_train_set(config.max_digits, config.train_per_length, seed=config.seed)
    sampler = _BatchSampler(train_set, config)
    state = _beginning(config, sampler.generator, device)
    if resume is not None and resume.exists():
        state.take_up(resume)
    model, optimizer, curriculum = state.model, state.optimizer, state.curriculum
    history = state.history
    parts = config.final_checkpoints + 1
    spread = {round(config.final_steps * part / parts) for part in range(1, parts)} - {0}  # steps of the final phase

    def checkpoint(mastered: int) -> None:
        state.checkpoints.append((history[-1].step, history[-1].learning_rate, mastered))
        if on_checkpoint is not None:
            on_checkpoint(history[-1].step, model, optimizer)

    with _ProgressBar(config, shown=progress) as bar:
        for step in range(len(history) + 1, config.max_steps + 1):
            if step >= state.final_from + config.final_steps:
                break
            rate = _learning_rate(config, step, step - state.final_from)
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens, read_step, parity = (t.to(device) for t in sampler.draw(curriculum.max_digits))
            logits = model.answer_logits(tokens, read_step)
            loss = F.cross_entropy(logits, parity)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()

            at_frontier = read_step == curriculum.max_digits
            right = (logits.detach().argmax(-1) == parity)[at_frontier].float().mean()
            digits = curriculum.max_digits
            mastered = curriculum.update(float(right))
            history.append(HistoryRow(step, float(loss.detach()), digits, curriculum.accuracy, rate))
            bar.advance(history[-1], curriculum.complete)
            if curriculum.complete and state.final_from > config.max_steps:
                state.final_from = step + 1
            last = step == config.max_steps or step == state.final_from + config.final_steps - 1
            wanted = mastered in config.checkpoint_digits or step - state.final_from + 1 in spread
            if wanted and not last:
                checkpoint(digits)
            if resume is not None and step % SAVE_EVERY == 0:
                state.save(resume)
    if history:
        checkpoint(config.max_digits if curriculum.complete else curriculum.max_digits - 1)
    model.eval()
    return TrainResult(model, train_set, history, state.checkpoints, curriculum.complete, time.perf_counter() - began)


def _beginning(config: ParityTrainConfig, generator: torch.Generator, device: torch.device | str) -> TrainState:
    """The state before the first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ParityTransformer(config.model)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    curriculum = Curriculum(
        config.start_digits, config.max_digits, threshold=config.threshold, min_steps=config.min_steps
    )
    return TrainState(config, model, optimizer, curriculum, generator, final_from=config.max_steps + 1)


def _learning_rate(config: ParityTrainConfig, step: int, final_step: int) -> float:
    """Rate of ``step`` (from 1); ``final_step`` counts from 0 at the first step of the final phase."""
    if final_step < 0:
        return config.learning_rate * min(1.0, step / max(1, config.warmup_steps))
    share = (1 + math.cos(math.pi * (final_step + 1) / config.final_steps)) / 2
    return config.final_learning_rate + share * (config.learning_rate - config.final_learning_rate)


class _BatchSampler:
    """Draws batches from the fixed set: lengths first, then a string of that length, with replacement."""

    def __init__(self, train_set: Sequence[ParityExample], config: ParityTrainConfig) -> None:
        batch = collate(train_set)
        self.tokens = batch["tokens"]
        self.read_step = batch["read_step"]
        self.parity = batch["labels"][batch["mask"]]
        counts = torch.bincount(self.read_step)
        self.count = counts
        self.first = counts.cumsum(0) - counts  # the set is in order of length
        self.batch_size = config.batch_size
        self.n_frontier = round(config.frontier_share * config.batch_size)
        # A stream of its own: with the bare seed it would repeat the draws that made the training set.
        self.generator = torch.Generator().manual_seed(config.seed + 2**32)

    def draw(self, max_digits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``(B, max_digits + 1)``, read-out steps ``(B,)`` and parities ``(B,)``."""
        lengths = torch.randint(1, max_digits + 1, (self.batch_size,), generator=self.generator)
        lengths[: self.n_frontier] = max_digits
        place = torch.rand(self.batch_size, generator=self.generator, dtype=torch.float64)
        rows = self.first[lengths] + (place * self.count[lengths]).long()
        return self.tokens[rows, : max_digits + 1], self.read_step[rows], self.parity[rows]


class _ProgressBar:
    """A bar as long as the expected work: a step at ``n`` bits costs about ``n`` loops over ``n`` tokens."""

    def __init__(self, config: ParityTrainConfig, *, shown: bool) -> None:
        self.min_steps = config.min_steps
        self.start = config.start_digits
        self.final_work = config.final_steps * config.max_digits**2
        self.total = self._work_before(config.max_digits + 1) + self.final_work
        self.bar = tqdm(
            total=self.total, disable=not shown, desc="training", leave=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _work_before(self, digits: int) -> int:
        return self.min_steps * sum(n * n for n in range(self.start, digits))

    def advance(self, row: HistoryRow, complete: bool) -> None:
        """Show one more optimizer step; a length that takes longer than expected holds the bar back."""
        low = self._work_before(row.max_digits)
        at_most = self.total if complete else self._work_before(row.max_digits + 1)
        self.bar.n = min(max(low, self.bar.n) + row.max_digits**2, at_most)
        self.bar.set_postfix_str(
            f"{row.max_digits} bits, loss {row.loss:.3f}, accuracy {row.frontier_accuracy:.2f}", refresh=False
        )
        self.bar.update(0)
