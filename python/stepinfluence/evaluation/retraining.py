"""The truth that scores are held against: models trained again, each once, kept on disk for every method after it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from stepinfluence.evaluation.problem import Problem
from stepinfluence.files import parse_json, save_torch, write_atomically, write_bytes
from stepinfluence.machine import cpu_model

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """What a trained model does with the queries: losses ``(n_query,)``, and which answers are right, or None."""

    losses: Array
    correct: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Draws:
    """What one seed draws at random. More of a kind begin with the fewer, so that more can be asked for later.

    Attributes:
        halves: ``(subsets, n_train)`` bool: examples that the models of the LDS are trained on.
        left_out: rows that are left out one at a time: by turns a planted error and another example, where errors are
            planted (what misleads training is what its absence is most likely to show), or any. No score has a say in
            it, so none is favoured.
        queries: all of them, in random order, for what is asked of a few.
    """

    halves: npt.NDArray[np.bool_]
    left_out: Rows
    queries: Rows


def draws(problem: Problem, seed: int, *, subsets: int, left_out: int) -> Draws:
    """Draw for one seed; every kind has a stream of its own.

    Raises:
        ValueError: more examples left out than there are.
    """
    n = len(problem.train)
    if left_out > n:
        raise ValueError(f"left_out: got {left_out}; {problem.name} has {n} training examples")
    streams = [np.random.default_rng([seed, kind]) for kind in range(3)]
    halves = np.zeros((subsets, n), dtype=bool)
    for half in halves:
        half[streams[0].permutation(n)[: n // 2]] = True
    planted = np.zeros(n, bool) if problem.mislabelled is None else problem.mislabelled
    order = streams[1].permutation(n)
    # A stable sort by the place within one's kind takes turns until the smaller kind is used up.
    place = np.where(planted[order], np.cumsum(planted[order]), np.cumsum(~planted[order]))
    turns = order[np.lexsort((~planted[order], place))]
    return Draws(halves, turns[:left_out], streams[2].permutation(len(problem.queries)))


def training_seed(seed: int, repeat: int) -> int:
    """The seed of one training run: repeats of neighbouring seeds must not collide, as sums would."""
    return int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])


class Retrainings:
    """Trains on demand and keeps what came out.

    Every model is a line in ``seed-<n>.jsonl`` as soon as it is trained, and the weights of models trained on all
    examples are in ``seed-<n>-repeat-<r>.pt``: work that was stopped goes on where it was, and a new method is scored
    without training anything that is there.

    Args:
        problem: what to train.
        folder: made if missing.

    Raises:
        ValueError: the folder is of another problem, other data, or another machine or version, where the same
            training may end elsewhere; one of its models comes out differently now; or a line cannot be read.
    """

    def __init__(self, problem: Problem, folder: Path) -> None:
        self.problem = problem
        self.folder = folder
        self.everyone = np.arange(len(problem.train))
        self._known: dict[tuple[int, int, str], dict[str, Any]] = {}
        self._asked: set[tuple[int, int, str]] = set()
        self._all = _digest(self.everyone)
        self._open()

    @property
    def used(self) -> int:
        """Models whose outcome was asked for."""
        return len(self._asked)

    @property
    def seconds(self) -> float:
        """Processor seconds that training these took when it was done."""
        return float(sum(self._known[key]["seconds"] for key in self._asked))

    def model(self, seed: int, repeat: int = 0) -> nn.Module:
        """The model trained on all examples, in eval mode."""
        self.outcome(seed, self.everyone, repeat=repeat, what="all")
        model = self.problem.untrained(training_seed(seed, repeat))
        model.load_state_dict(torch.load(self._weights(seed, repeat), weights_only=True))
        return model.eval()

    def outcome(self, seed: int, rows: Rows, *, repeat: int = 0, what: str, weights: Array | None = None) -> Outcome:
        """Outcome of training on ``rows``, trained now or kept from before.

        Args:
            seed, repeat: of the training.
            rows: examples to train on.
            what: for readers of the file.
            weights: ``(n_train,)`` of the examples in the loss; ones if not given.
        """
        key = (seed, repeat, _digest(np.asarray(rows, np.int64), weights))
        if key not in self._known:
            self._train(key, rows, what, weights)
        self._asked.add(key)
        found = self._known[key]
        right = found["correct"]
        return Outcome(np.array(found["losses"]), None if right is None else np.array(right, bool))

    def _train(self, key: tuple[int, int, str], rows: Rows, what: str, weights: Array | None) -> None:
        seed, repeat, digest = key
        began = time.process_time()
        model = self.problem.retrain(rows, training_seed(seed, repeat), weights)
        record = {
            "repeat": repeat,
            "rows": digest,
            "what": what,
            "seconds": time.process_time() - began,
            "losses": self.problem.query_losses(model).tolist(),
            "correct": self.problem.query_correct(model).tolist() if self.problem.correct else None,
        }
        if digest == self._all:  # before the line that says so
            write_atomically(self._weights(seed, repeat), lambda aside: save_torch(model.state_dict(), aside))
        with (self.folder / f"seed-{seed}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._known[key] = record

    def _weights(self, seed: int, repeat: int) -> Path:
        return self.folder / f"seed-{seed}-repeat-{repeat}.pt"

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about, facts = self.folder / "about.json", _facts(self.problem)
        kept = parse_json(str(about), about.read_bytes()) if about.is_file() else facts
        if not isinstance(kept, dict):
            raise ValueError(f"folder: {about} is not what sdi evaluate writes there; give another folder")
        for name, value in facts.items():
            if kept.get(name) != value:
                raise ValueError(
                    f"folder: {self.folder} holds models with {name} {kept.get(name)!r}, now it is {value!r}; "
                    "give another folder"
                )
        if not about.is_file():
            write_bytes(about, (json.dumps(facts, indent=1) + "\n").encode())
        for path in sorted(self.folder.glob("seed-*.jsonl")):
            self._read(path)
        self._check()

    def _read(self, path: Path) -> None:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # stopped while a line was written: that model is trained again
            os.truncate(path, len(whole))
        seed = int(path.stem.removeprefix("seed-"))
        for number, line in enumerate(whole.decode().splitlines(), start=1):
            try:
                record = json.loads(line)
                key = (seed, int(record["repeat"]), str(record["rows"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"folder: line {number} of {path} is no model's ({error}); delete the line") from error
            if key[2] != self._all or self._weights(*key[:2]).is_file():
                self._known[key] = record

    def _check(self) -> None:
        """Train one kept model again: that the code of the training has changed cannot be seen otherwise."""
        key = next((k for k in self._known if k[2] == self._all), None)
        if key is None:
            return
        again = self.problem.query_losses(self.problem.retrain(self.everyone, training_seed(*key[:2])))
        if not np.allclose(again, self._known[key]["losses"], rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"folder: the models of {self.folder} are of another training (seed {key[0]} comes out differently "
                "now); give another folder"
            )


def _facts(problem: Problem) -> dict[str, str]:
    """What must be the same for kept models to be of use."""
    data = hashlib.sha256()
    for side in ("train", "query"):
        for batch in problem.batches(side):
            for part in batch if isinstance(batch, (tuple, list)) else [batch]:
                data.update(part.cpu().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return {
        "problem": problem.name,
        "data": data.hexdigest()[:16],
        "about": problem.about,
        "training": "its own" if problem.training is None else repr(problem.training),
        "CPU": f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()})",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} thread(s)",
        "system": platform.machine(),
    }


def _digest(rows: Rows, weights: Array | None = None) -> str:
    given = b"" if weights is None or bool((weights == 1).all()) else weights.tobytes()
    return hashlib.sha256(rows.tobytes() + given).hexdigest()[:16]
