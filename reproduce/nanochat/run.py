"""The experiment on a looped language model: its stages in order."""

from __future__ import annotations

from functools import partial

from reproduce.base import Outcome, Run
from reproduce.nanochat.config import Config


def run(run: Run[Config]) -> Outcome:
    """Run the experiment; finished stages of an earlier run in the folder are not repeated.

    Raises:
        ValueError: the user's file cannot be used, or training diverged.
    """
    from reproduce.nanochat import measure, training
    from reproduce.nanochat.analyse import Found, outcome
    from reproduce.nanochat.corpus import load

    config = run.config
    corpus = load(config)
    known = run.stage("data", lambda: {"digest": corpus.digest, "tokens": corpus.tokens_digest})
    if (known["digest"], known.get("tokens")) != (corpus.digest, corpus.tokens_digest):
        raise ValueError("data: the text has changed since this run began; choose another folder, or pass --fresh")
    found: dict[str, Found] = {}
    for variant in config.variants:
        key = variant.key
        train = partial(training.train, config, variant, corpus, run.checkpoints, run.announce)
        trained = run.stage(f"training-{key}", train)
        paths = [run.checkpoints / name for name in trained["checkpoints"]]
        scores = {}
        for steps in variant.horizons or config.horizons:
            scores[steps] = run.stage(
                f"sdi-{key}-{steps}", partial(measure.influence_by_step, config, variant, corpus, paths, steps)
            )
        depth = run.stage(f"loss-by-depth-{key}", partial(measure.loss_by_depth, config, variant, corpus, paths[-1]))
        loop = run.stage(f"dynamics-{key}", partial(measure.dynamics_of, config, variant, corpus, paths[-1]))
        found[variant.name] = Found(variant, trained["history"], scores, depth["loss"], loop)
    return outcome(run, corpus, found)
