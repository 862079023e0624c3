"""The fidelity experiment: its stages in order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from reproduce.base import Outcome, Result, Run
from reproduce.fidelity.config import Config

if TYPE_CHECKING:
    from reproduce.arrays import Array
    from reproduce.fidelity.memory import Search
    from sdi_kernels import HashFamily

FAMILIES: tuple[HashFamily, ...] = ("balanced", "iid")


def run(run: Run[Config]) -> Outcome:
    """Run the experiment; finished stages of an earlier run in the folder are not repeated.

    Raises:
        StepInfluenceError: the library's features disagree with the recorded activations, or a measurement failed.
    """
    from reproduce.fidelity import memory, timing
    from reproduce.fidelity.analyse import outcome
    from reproduce.fidelity.measure import saved_bytes_per_example

    config = run.config
    exact, sketched, library = _scores(run)  # the tape, gigabytes, goes when this returns
    saved = run.stage("activations", lambda: {"bytes": saved_bytes_per_example(config.model, seed=config.seed)})
    timings = run.stage("timing", lambda: timing.measure(config.timing, seed=config.seed, device=config.device))
    searches: dict[str, Result] = {}
    if memory.measurable(config.device):
        for method in config.memory.methods:
            look = partial(memory.search, config.memory, method, seed=config.seed, device=config.device)
            name = f"memory-{method.replace(',', '').replace(' ', '-')}"
            searches[method] = run.stage(name, partial(_searched, look))
    return outcome(run, exact, sketched, library, int(saved["bytes"]), timings, searches)


def _scores(run: Run[Config]) -> tuple[Array, dict[str, Array], Result]:
    """Exact scores, sketched ones by hash family, and what the library's own features say."""
    from reproduce.fidelity.measure import Scores

    scores = Scores(run.config)
    exact: Array = run.stage("exact-scores", scores.exact)["sdi"]
    sketched: dict[str, Array] = {}
    for hashing in FAMILIES:
        compute = partial(scores.sketched, hashing, run.announce)
        sketched[hashing] = run.stage(f"sketched-scores-{hashing}", compute)["sdi"]
    return exact, sketched, run.stage("library-and-conservation", scores.library)


def _searched(look: partial[Search]) -> dict[str, Any]:
    found = look()
    return {"feasible": found.feasible, "attempts": [[a.batch, a.bytes] for a in found.attempts]}
