"""The parity experiment: its stages in order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.base import Outcome, Run
from reproduce.parity.config import Config

if TYPE_CHECKING:
    from stepinfluence.models.parity_task import ParityExample


def run(run: Run[Config]) -> Outcome:
    """Run the experiment; finished stages of an earlier run in the folder are not repeated.

    Raises:
        StepInfluenceError: a checkpoint is damaged, or attribution failed.
    """
    from stepinfluence.models.parity_task import alternating_probes, influence_subset, make_train_set

    from reproduce.parity.analyse import outcome
    from reproduce.parity.influence import Attribution
    from reproduce.parity.measure import heldout_strings

    config = run.config
    training = config.training_with(config.seed)
    train_set = make_train_set(training.max_digits, training.train_per_length, seed=training.seed)
    trained = run.stage("train", lambda: _train(config, config.seed, run.checkpoints))
    paths = [run.checkpoints / name for name in trained["files"]]
    found = run.stage("forward", lambda: _forward(config, paths[-1], train_set, config.seed))

    subset = influence_subset(train_set, per_tercile=config.per_tercile, longest=config.longest, seed=config.seed)
    test = heldout_strings(config, train_set, config.seed)[: config.test_examples]
    attribution: list[Attribution] = []  # made when first needed

    def influence(path: Path) -> dict[str, Any]:
        if not attribution:
            attribution.append(Attribution(config, subset, alternating_probes(config.test_length), test))
        return attribution[0].at(path)

    scores = [run.stage(f"influence-{path.stem}", partial(influence, path)) for path in paths]
    others = {seed: run.stage(f"seed-{seed}", partial(_other, config, seed, run)) for seed in config.other_seeds}
    return outcome(run, trained, found, scores, subset, test, others)


def _train(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """Train, and save checkpoints in ``folder``; an interrupted training there goes on where it stopped."""
    import numpy as np
    import torch
    from stepinfluence.models.parity import ParityTransformer
    from stepinfluence.models.parity_task import train_parity

    folder.mkdir(parents=True, exist_ok=True)

    def save(step: int, model: ParityTransformer, optimizer: torch.optim.Optimizer) -> None:
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(content, folder / _file(step))

    result = train_parity(
        config.training_with(seed),
        on_checkpoint=save,
        device=config.device,
        progress=sys.stderr.isatty(),
        resume=folder / "training.pt",
    )
    return {
        "files": [_file(step) for step, _, _ in result.checkpoints],
        "digits": [mastered for _, _, mastered in result.checkpoints],
        "complete": result.complete,
        "steps": len(result.history),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "body_parameters": sum(p.numel() for p in result.model.block.parameters()),
        "loss": np.array([row.loss for row in result.history], dtype=np.float32),
        "max_digits": np.array([row.max_digits for row in result.history], dtype=np.int16),
    }


def _file(step: int) -> str:
    return f"step-{step:06d}.pt"


def _forward(config: Config, checkpoint: Path, train_set: Sequence[ParityExample], seed: int) -> dict[str, Any]:
    from stepinfluence import load_checkpoint
    from stepinfluence.models.parity import ParityTransformer

    from reproduce.parity.measure import forward

    model = ParityTransformer(config.training.model)
    load_checkpoint(checkpoint).load_into(model)
    return forward(model.to(config.device).eval(), config, train_set, seed)


def _other(config: Config, seed: int, run: Run[Config]) -> dict[str, Any]:
    from stepinfluence.models.parity_task import make_train_set

    folder = run.checkpoints / f"seed-{seed}"
    trained = _train(config, seed, folder)
    training = config.training_with(seed)
    train_set = make_train_set(training.max_digits, training.train_per_length, seed=training.seed)
    return {**_forward(config, folder / trained["files"][-1], train_set, seed), "complete": trained["complete"]}
