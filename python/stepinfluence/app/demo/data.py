"""The demonstration's settings and result, and how they are written to files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepinfluence.attribution.aggregation import Dominance, dominating, energy_of
from stepinfluence.attribution.periods import Period, period_of
from stepinfluence.files import write_atomically, write_bytes
from stepinfluence.machine import machine_facts, versions
from stepinfluence.models.parity import ParityConfig
from stepinfluence.models.parity_task import ParityExample, ParityTrainConfig

Array = NDArray[np.float32]

CONSERVED = 8 * float(np.finfo(np.float32).eps)
"""Largest difference between the sum of the step sketches and the sketch of the whole gradient, relative to the sum of
the step sketches' norms: a few roundings of the float32 numbers that are added up."""


@dataclass(frozen=True)
class DemoConfig:
    """Everything that determines the demonstration's numbers (on one kind of machine).

    Args:
        training: the training run.
        probe_lengths: the alternating probes have the longest of these lengths that the model has solved, or the
            shortest if it has solved none. Lengths greater than any in training are welcome (the paper uses 40).
        query_lengths: lengths of the held-out strings that influence is computed for, besides the probes' length.
        queries_per_length: held-out strings of each of these lengths.
        per_tercile, longest: how many training examples are scored (see
            :func:`~stepinfluence.models.parity_task.influence_subset`).
        accuracy_strings: held-out strings of each length that accuracy is measured on.
        beyond: lengths, greater than any in training, at which accuracy is reported, but required only of queries.
        validation_strings: strings of each of ``probe_lengths`` by which checkpoints are chosen; others than those that
            accuracy is reported on.
        kept_checkpoints: of the checkpoints from the end of the curriculum on, how many of the best are used. The best
            one is the model that is asked.
        sketch_size: buckets for each parameter tensor.
        curvature: what the scores that are shown first are corrected with, see :func:`stepinfluence.influence`;
            ``"none"`` shows the paper's alone.
        exact_train, exact_queries: size of the subset on which sketches are compared with exact gradients.
        batch_size: examples for each forward and backward pass of the attribution.
        required_accuracy: share of right answers on held-out strings, over all lengths of training and at each length
            of a query, from which the model counts as having solved the task.
        threads: torch threads during the run. One, because the tensors are small: a second thread brings little on an
            idle machine and costs a great deal on a busy one; and so the numbers do not depend on the number of cores.
        seed: of the sketches and of the draws of examples.
    """

    training: ParityTrainConfig = field(default_factory=ParityTrainConfig.demo)
    probe_lengths: tuple[int, ...] = (32, 28, 24, 20, 16)
    query_lengths: tuple[int, ...] = (10, 13, 16)
    queries_per_length: int = 8
    per_tercile: int = 96
    longest: int = 96
    accuracy_strings: int = 256
    beyond: tuple[int, ...] = (20, 24, 28, 32)
    validation_strings: int = 128
    kept_checkpoints: int = 3
    sketch_size: int = 2048
    curvature: Literal["none", "fisher", "block"] = "fisher"
    exact_train: int = 24
    exact_queries: int = 4
    batch_size: int = 32
    required_accuracy: float = 0.99
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        measured = {*range(1, self.training.max_digits + 1), *self.beyond}
        for name in ("probe_lengths", "query_lengths"):
            lengths = getattr(self, name)
            if not lengths or not measured.issuperset(lengths):
                raise ValueError(
                    f"{name}: got {lengths}; pass lengths of 1 .. max_digits={self.training.max_digits} or in "
                    f"beyond={self.beyond}, where accuracy is measured"
                )

    @classmethod
    def full(cls, *, seed: int = 0) -> DemoConfig:
        """What ``sdi demo`` runs: about three minutes on a CPU core."""
        return cls(training=ParityTrainConfig.demo(seed=seed), seed=seed)

    @classmethod
    def quick(cls, *, seed: int = 0) -> DemoConfig:
        """A tiny model on short strings, in seconds: shows every part, need not solve the task."""
        training = replace(
            ParityTrainConfig.demo(seed=seed),
            model=ParityConfig(d_model=32, n_heads=4),
            max_digits=8,
            train_per_length=64,
            threshold=None,  # one more bit every min_steps, whatever the accuracy
            min_steps=15,
            final_steps=25,
            checkpoint_digits=(4, 6, 8),
            final_checkpoints=2,
        )
        return cls(
            training=training,
            probe_lengths=(8,),
            query_lengths=(7, 8),
            queries_per_length=4,
            per_tercile=16,
            longest=16,
            accuracy_strings=64,
            beyond=(10,),
            validation_strings=32,
            sketch_size=512,
            exact_train=6,
            exact_queries=2,
            required_accuracy=0.0,
            seed=seed,
        )

    @classmethod
    def from_json(cls, path: Path) -> DemoConfig:
        """The configuration that a ``config.json`` of an earlier run holds.

        Raises:
            ValueError: the file is missing, is not such a file, or comes from another version with other settings.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))["config"]
            training: dict[str, Any] = dict(content["training"])
            training["model"] = ParityConfig(**training["model"])
            training = {k: tuple(v) if isinstance(v, list) else v for k, v in training.items()}
            rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
            rest["training"] = ParityTrainConfig(**training)
            return cls(**rest)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"config: {path} is not the config.json of a demo of this version ({type(error).__name__}: {error})"
            ) from error


@dataclass(frozen=True)
class Stage:
    """One stage of the run.

    Attributes:
        seconds: by the clock on the wall.
        cpu_seconds: of processor time; on a busy machine less than the wall shows.
        peak_bytes: largest resident memory during the stage; None where that cannot be told.
    """

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Query:
    """A query: a held-out string or a probe, with what the model makes of it.

    Attributes:
        example: the string; ``example.id`` numbers the queries from 0.
        probe: whether it is one of the alternating probes.
        loss: its loss in nats.
        prediction: the arg max over the whole vocabulary.
        margin: ``(steps,)`` logit of the true parity minus logit of the other one after each loop step.
    """

    example: ParityExample
    probe: bool
    loss: float
    prediction: int
    margin: Array


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        config: what was run.
        train: the training examples that were scored, in the order of the rows of ``sdi``.
        queries: in the order of its columns.
        by_checkpoint: ``(n_checkpoints, n_train, n_query, steps)`` step-decomposed influence at each checkpoint times
            its learning rate, float32; positive = training on the example lowers the loss of the query. Its sum over
            checkpoints is the paper's (eq. 5), which one checkpoint can own.
        corrected_by_checkpoint: the same with each checkpoint's own curvature; ``by_checkpoint`` where the
            configuration has none.
        damping: of these, relative to the largest eigenvalue, chosen without retraining; empty where there is none.
        trained: which checkpoints are from the end of the curriculum on; the best of them, see ``kept_checkpoints``.
        chosen: which of them is the best: the model that was asked.
        sdi: ``(n_train, n_query, steps)``: the corrected scores of these checkpoints, balanced, in per cent of the
            query's influence (see :func:`~stepinfluence.attribution.aggregation.balanced`). What is shown first.
        plain: the same of the plain scores.
        exact: ``(rows, columns, exact values)``: ``plain`` from exact gradients on a subset, scaled as ``plain`` is.
        etas, checkpoints: learning rate and path of each checkpoint.
        accuracy: held-out accuracy by length; lengths of which every string was trained on are measured on those.
        accuracy_beyond: the same for some lengths longer than any in training.
        train_losses: ``(n_train,)`` losses of the scored training examples at the chosen checkpoint, in nats.
        conservation: difference between summed step sketches and the sketch of the whole gradient, relative to the sum
            of the step sketches' norms.
        sdi_error, tracin_error: relative Frobenius error of the plain sketched scores against the exact ones.
        parameters, body_parameters: number of the model's, and of the loop body's.
        n_trained: number of training examples there were.
        optimizer_steps: how many the training took.
        feature_width: columns of a feature row.
        stages: time and memory.
        machine, versions: facts for the record.
    """

    config: DemoConfig
    train: tuple[ParityExample, ...]
    queries: tuple[Query, ...]
    by_checkpoint: Array
    corrected_by_checkpoint: Array
    damping: tuple[float, ...]
    trained: tuple[int, ...]
    chosen: int
    sdi: Array
    plain: Array
    exact: tuple[NDArray[np.int64], NDArray[np.int64], Array]
    etas: tuple[float, ...]
    checkpoints: tuple[Path, ...]
    accuracy: Mapping[int, float]
    accuracy_beyond: Mapping[int, float]
    train_losses: Array
    conservation: float
    sdi_error: float
    tracin_error: float
    parameters: int
    body_parameters: int
    n_trained: int
    optimizer_steps: int
    feature_width: int
    stages: tuple[Stage, ...]
    machine: Mapping[str, str]
    versions: Mapping[str, str]

    @property
    def overall_accuracy(self) -> float:
        """Mean over the lengths that training covered."""
        return float(np.mean(list(self.accuracy.values())))

    @property
    def solved(self) -> bool:
        """Whether the model really does the task it is asked about."""
        asked = [{**self.accuracy, **self.accuracy_beyond}[n] for n in self.asked_lengths]
        return min(self.overall_accuracy, *asked) >= self.config.required_accuracy

    @property
    def conserved(self) -> bool:
        """Whether the step sketches add up to the sketch of the whole gradient."""
        return self.conservation <= CONSERVED

    @property
    def asked_lengths(self) -> tuple[int, ...]:
        """Lengths of the queries, in increasing order."""
        return tuple(sorted({q.example.n_digits for q in self.queries}))

    @property
    def tracin(self) -> Array:
        """``(n_train, n_query)``: ``sdi`` summed over loop steps."""
        return np.asarray(self.sdi.sum(2), dtype=np.float32)

    @property
    def energy_by_checkpoint(self) -> Array:
        """``(n_checkpoints, n_query)``: absolute influence, summed over examples and steps."""
        return np.asarray(energy_of(self.by_checkpoint), dtype=np.float32)

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """``update 500``: the optimizer step of each checkpoint (a step, here, is one of the loop)."""
        return tuple(f"update {int(path.stem.rpartition('-')[2])}" for path in self.checkpoints)

    def largest_example(self, column: int) -> float:
        """Share of a query's influence, regardless of sign, that the training example with the most of it has."""
        energy = np.abs(self.sdi[:, column]).sum(1, dtype=np.float64)
        return float(energy.max() / energy.sum())

    def periods(self, column: int) -> dict[str, Period]:
        """Periods of a query's curves up to its read-out, with their p-values: ``profile``, influence summed over
        examples (the paper's, appendix D.2); ``energy``, the same regardless of sign; both again of the plain scores;
        and the logit ``margin``."""
        query = self.queries[column]
        shown, plain = self.sdi[:, column], self.plain[:, column]
        curves = {
            "profile": shown.sum(0),
            "energy": np.abs(shown).sum(0),
            "plain_profile": plain.sum(0),
            "plain_energy": np.abs(plain).sum(0),
            "margin": query.margin,
        }
        return {name: period_of(curve[: query.example.n_digits]) for name, curve in curves.items()}

    def dominance(self, column: int) -> Dominance | None:
        """The checkpoint that would own the plain sum over all of them, if one would."""
        return dominating(self.energy_by_checkpoint[:, column], self.checkpoint_names)


def save_arrays(result: DemoResult, path: Path) -> None:
    """Write ``influence.npz``: scores, ids and texts, losses and margins, without pickled objects.

    ``sdi`` is what the report shows first, ``corrected_by_checkpoint`` what it was made from, ``by_checkpoint`` the
    paper's: see :class:`DemoResult`.
    """
    rows, columns, exact = result.exact
    arrays: dict[str, Any] = {
        "sdi": result.sdi,
        "plain": result.plain,
        "by_checkpoint": result.by_checkpoint,
        "corrected_by_checkpoint": result.corrected_by_checkpoint,
        "damping": np.array(result.damping),
        "trained": np.array(result.trained),
        "chosen": result.chosen,
        "train_ids": np.array([e.id for e in result.train]),
        "train_texts": np.array([e.text for e in result.train]),
        "train_losses": result.train_losses,
        "query_ids": np.array([q.example.id for q in result.queries]),
        "query_texts": np.array([q.example.text for q in result.queries]),
        "query_losses": np.array([q.loss for q in result.queries]),
        "query_predictions": np.array([q.prediction for q in result.queries]),
        "query_margins": np.stack([q.margin for q in result.queries]),
        "etas": np.array(result.etas),
        "exact_rows": rows,
        "exact_columns": columns,
        "exact_sdi": exact,
    }
    write_atomically(path, lambda made: np.savez_compressed(made, **arrays))


def save_config(config: DemoConfig, path: Path, **extra: Any) -> None:
    """Write ``config.json``: the settings (read back by :meth:`DemoConfig.from_json`), versions and machine."""
    content = {
        "replay": f"sdi demo --config {path.name}",
        "config": asdict(config),
        "versions": versions(),
        "machine": machine_facts(),
        **extra,
    }
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
