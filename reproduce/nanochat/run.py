"""The experiment on a looped language model: its stages in order."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.base import Outcome, Run
from reproduce.nanochat.config import Config, Variant

if TYPE_CHECKING:
    from stepinfluence.models.gpt import LoopedGPT

    from reproduce.nanochat.corpus import Corpus


def run(run: Run[Config]) -> Outcome:
    """Run the experiment; finished stages of an earlier run in the folder are not repeated.

    Raises:
        ValueError: the user's file cannot be used, or training diverged.
    """
    from reproduce.nanochat import training
    from reproduce.nanochat.analyse import Found, outcome
    from reproduce.nanochat.corpus import load

    config = run.config
    corpus = load(config)
    known = run.stage("data", lambda: {"digest": corpus.digest})
    if known["digest"] != corpus.digest:
        raise ValueError("data: the text has changed since this run began; choose another folder, or pass --fresh")
    found: dict[str, Found] = {}
    for variant in config.variants:
        key = variant.name.replace(" ", "-")
        train = partial(training.train, config, variant, corpus, run.checkpoints, run.announce)
        trained = run.stage(f"training-{key}", train)
        paths = [run.checkpoints / name for name in trained["checkpoints"]]
        sdi = {}
        for steps in variant.horizons or config.horizons:
            sdi[steps] = run.stage(f"sdi-{key}-{steps}", partial(_sdi, config, variant, corpus, paths, steps))["sdi"]
        depth = run.stage(f"loss-by-depth-{key}", partial(_loss_by_depth, config, variant, corpus, paths[-1]))
        loop = run.stage(f"dynamics-{key}", partial(_dynamics, config, variant, corpus, paths[-1]))
        found[variant.name] = Found(variant, trained["history"], sdi, depth["loss"], loop)
    return outcome(run, corpus, found)


def _sdi(config: Config, variant: Variant, corpus: Corpus, paths: list[Path], steps: int) -> dict[str, Any]:
    """``sdi``: influence summed over the checkpoints, ``(N, Q, steps)``."""
    from stepinfluence.attribution.scoring import influence_over_checkpoints
    from stepinfluence.capture import attach

    from reproduce.nanochat.corpus import batches
    from reproduce.nanochat.training import at_depth, make_model

    model = make_model(config, variant)
    capture = attach(model, body="core", sketch_size=config.sketch_size, seed=config.seed)
    train, query = (batches(rows, config.batch, config.device) for rows in corpus.examples())
    scores = influence_over_checkpoints(capture, paths, train, query, at_depth(steps), progress=False)
    return {"sdi": scores.sdi.cpu().numpy()}


def _loss_by_depth(config: Config, variant: Variant, corpus: Corpus, path: Path) -> dict[str, Any]:
    """``loss``: of the queries at each loop count up to the largest horizon, at one checkpoint."""
    from reproduce.nanochat.training import loss_by_depth

    depths = list(range(1, max(config.horizons) + 1))
    return {"loss": loss_by_depth(_load(config, variant, path), corpus.examples()[1], depths, config)}


def _dynamics(config: Config, variant: Variant, corpus: Corpus, path: Path) -> dict[str, float]:
    from reproduce.nanochat.dynamics import dynamics

    rows = {key: value[: config.batch] for key, value in corpus.examples()[1].items()}
    return dynamics(_load(config, variant, path), rows, seed=config.seed)


def _load(config: Config, variant: Variant, path: Path) -> LoopedGPT:
    """The model at a checkpoint."""
    from stepinfluence.attribution.checkpoints import load_checkpoint

    from reproduce.nanochat.training import make_model

    model = make_model(config, variant).eval()
    load_checkpoint(path).load_into(model)
    return model
