"""The demonstration: train the parity model, ask which training strings shaped its answers, and at which loop step.

:func:`run_demo` computes and returns plain arrays; it prints nothing but progress bars. ``sdi demo`` is the command
around it, :mod:`stepinfluence.app.view.report` the page.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepinfluence.app.demo.data import Array, DemoConfig, DemoResult, Query, Stage
from stepinfluence.attribution.aggregation import balanced, energy_of, equal_weights
from stepinfluence.attribution.checkpoints import load_checkpoint
from stepinfluence.attribution.curvature.choice import fitted
from stepinfluence.attribution.scoring import influence, influence_over_checkpoints
from stepinfluence.attribution.visiting import visit_checkpoints
from stepinfluence.capture import Capture, ExactCapture, attach
from stepinfluence.files import save_torch, write_atomically
from stepinfluence.machine import PeakMemory, machine_facts, versions
from stepinfluence.models.parity import ParityTransformer, parity_loss
from stepinfluence.models.parity_task import (
    ParityExample,
    TrainResult,
    accuracy_by_length,
    alternating_probes,
    collate,
    influence_subset,
    make_heldout_set,
    train_parity,
)
from stepinfluence.progress import tqdm

Batch = dict[str, Tensor]


def run_demo(
    config: DemoConfig,
    checkpoint_dir: Path,
    *,
    progress: bool = True,
    announce: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Train, save checkpoints, featurize, score and check.

    Args:
        config: what to run.
        checkpoint_dir: where the checkpoints go (``.pt``: model, optimizer, step); made if missing.
        progress: show progress bars on stderr for what takes over two seconds.
        announce: called with the name of each stage as it begins.

    Returns:
        Everything that the report and the summary show.

    Raises:
        StepInfluenceError, ValueError: see the functions of the library that are called; none on a valid config.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _run(config, checkpoint_dir, progress, announce)
    finally:
        torch.set_num_threads(before)


def _run(config: DemoConfig, checkpoint_dir: Path, progress: bool, announce: Callable[[str], None]) -> DemoResult:
    stages: list[Stage] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        announce(name)
        memory, began, cpu = PeakMemory(), time.perf_counter(), time.process_time()
        yield
        stages.append(Stage(name, time.perf_counter() - began, time.process_time() - cpu, memory.peak_bytes()))

    with stage("train the model"):
        trained, saved = _train(config, checkpoint_dir, progress=progress)
    with stage("choose among its checkpoints"):
        best = _best(trained, saved, config, progress=progress)
        checkpoints = _keep(trained, saved, best, config)
    model = trained.model
    shown = sorted(checkpoints.index(saved[k]) for k in best)
    with stage("measure its accuracy"):
        accuracy, beyond = _accuracy(model, trained.train_set, config, progress=progress)

    train = influence_subset(
        trained.train_set, per_tercile=config.per_tercile, longest=config.longest, seed=config.seed
    )
    examples = _query_examples(config, trained.train_set, accuracy | beyond)
    # All batches run the same number of loop steps: two more than the longest query has bits, as in the paper.
    length = max(e.n_digits for e in examples) + 2
    train_batches = _batches(train, config.batch_size)
    query_batches = _batches(examples, config.batch_size, length=length)
    capture = attach(model, body=model.block, sketch_size=config.sketch_size, seed=config.seed)

    with stage("influence at each checkpoint"):
        scores = _scores(capture, checkpoints, train_batches, query_batches, config, progress=progress)
    sdi, plain = balanced(scores.corrected[shown]), balanced(scores.plain[shown])
    with stage("check conservation"):
        conservation = _conservation(capture, query_batches, progress=progress)
    rows, columns = _exact_subset(config, len(train), len(examples))
    with stage("compare with exact gradients"):
        some = _batches([train[r] for r in rows], config.batch_size)
        asked = _batches([examples[c] for c in columns], config.batch_size, length=length)
        # Scaled by the energies of the sketched scores: those of all examples, not of the subset.
        weights = equal_weights(energy_of(scores.plain[shown]))[:, columns]
        exact = _exact(model, [checkpoints[k] for k in shown], weights, some, asked, progress=progress)
    sketched = plain[np.ix_(rows, columns)]

    return DemoResult(
        config=config,
        train=tuple(train),
        queries=_answers(model, examples, length),
        by_checkpoint=scores.plain,
        corrected_by_checkpoint=scores.corrected,
        damping=scores.damping,
        trained=tuple(shown),
        chosen=checkpoints.index(saved[best[0]]),
        sdi=sdi,
        plain=plain,
        exact=(rows, columns, exact),
        etas=scores.etas,
        checkpoints=tuple(checkpoints),
        accuracy=accuracy,
        accuracy_beyond=beyond,
        train_losses=_losses(model, train_batches),
        conservation=conservation,
        sdi_error=_relative(sketched, exact),
        tracin_error=_relative(sketched.sum(2), exact.sum(2)),
        parameters=sum(p.numel() for p in model.parameters()),
        body_parameters=sum(p.numel() for p in model.block.parameters()),
        n_trained=len(trained.train_set),
        optimizer_steps=len(trained.history),
        feature_width=capture.width,
        stages=tuple(stages),
        machine=machine_facts(),
        versions=versions(),
    )


def _train(config: DemoConfig, folder: Path, *, progress: bool) -> tuple[TrainResult, list[Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []

    def save(step: int, model: ParityTransformer, optimizer: torch.optim.Optimizer) -> None:
        paths.append(folder / f"step-{step:05d}.pt")
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        write_atomically(paths[-1], lambda made: save_torch(content, made))

    return train_parity(config.training, on_checkpoint=save, progress=progress), paths


def _best(result: TrainResult, saved: Sequence[Path], config: DemoConfig, *, progress: bool) -> list[int]:
    """The best checkpoints from the end of the curriculum on, best first; the model has the first one's weights then.

    Accuracy on strings longer than any in training comes and goes from one checkpoint to the next. They are ranked by
    accuracy on validation strings, from the shortest probe length up to the first that is not solved. Of a run that did
    not end its curriculum there is the last one.
    """
    top = config.training.max_digits
    ended = [k for k, (_, _, mastered) in enumerate(result.checkpoints) if mastered == top] or [len(saved) - 1]
    lengths = sorted(config.probe_lengths)
    strings = make_heldout_set(lengths, config.validation_strings, exclude=result.train_set, seed=config.seed + 3)
    scores: dict[int, float] = {}
    for k in tqdm(ended, desc="checkpoints", delay=2, disable=not progress):
        load_checkpoint(saved[k]).load_into(result.model)
        scores[k] = 0.0
        for n in lengths:
            found = accuracy_by_length(result.model, [e for e in strings if e.n_digits == n]).get(n, 1.0)
            scores[k] += found
            if found < config.required_accuracy:
                break
    best = sorted(ended, key=lambda k: (-scores[k], -k))[: config.kept_checkpoints]
    load_checkpoint(saved[best[0]]).load_into(result.model)
    return best


def _keep(result: TrainResult, saved: Sequence[Path], best: Sequence[int], config: DemoConfig) -> list[Path]:
    """The checkpoints that are scored, in the order of training; the others' files are removed."""
    top = config.training.max_digits
    kept = [k for k, (_, _, mastered) in enumerate(result.checkpoints) if mastered < top or k in best]
    for k in set(range(len(saved))) - set(kept):
        saved[k].unlink()
    return [saved[k] for k in kept]


def _accuracy(
    model: ParityTransformer, train_set: Sequence[ParityExample], config: DemoConfig, *, progress: bool
) -> tuple[dict[int, float], dict[int, float]]:
    """Accuracy at the lengths of training and beyond; trained strings stand in where none can be held out."""
    top = config.training.max_digits
    heldout = make_heldout_set(range(1, top + 1), config.accuracy_strings, exclude=train_set, seed=config.seed + 1)
    missing = set(range(1, top + 1)) - {e.n_digits for e in heldout}
    heldout += [e for e in train_set if e.n_digits in missing]
    heldout += make_heldout_set(config.beyond, config.accuracy_strings, exclude=(), seed=config.seed + 1)
    found: dict[int, float] = {}
    lengths = sorted({e.n_digits for e in heldout})
    for n in tqdm(lengths, desc="accuracy", unit="length", delay=2, disable=not progress):
        found |= accuracy_by_length(model, [e for e in heldout if e.n_digits == n])
    return {n: a for n, a in found.items() if n <= top}, {n: a for n, a in found.items() if n > top}


def _query_examples(
    config: DemoConfig, train_set: Sequence[ParityExample], accuracy: Mapping[int, float]
) -> list[ParityExample]:
    """The two alternating probes first, then held-out strings, longest first; numbered from 0."""
    solved = [n for n in config.probe_lengths if accuracy[n] >= config.required_accuracy]
    longest = max(solved, default=min(config.probe_lengths))
    probes = alternating_probes(longest)
    # A stream of its own, so that queries are not the strings that accuracy was measured on.
    known = [*train_set, *probes]
    heldout = make_heldout_set(
        sorted({longest, *config.query_lengths}, reverse=True),
        config.queries_per_length,
        exclude=known,
        seed=config.seed + 2,
    )
    return [ParityExample(number, e.bits) for number, e in enumerate([*probes, *heldout])]


def _batches(examples: Sequence[ParityExample], size: int, *, length: int | None = None) -> list[Batch]:
    return [collate(examples[start : start + size], length=length) for start in range(0, len(examples), size)]


def _ids(batch: Batch) -> list[int]:
    return [int(i) for i in batch["ids"]]


@dataclass(frozen=True)
class _Scores:
    """Scores ``(K, N, Q, steps)`` at each of K checkpoints, its learning rate and its damping (none: empty)."""

    plain: Array
    corrected: Array
    etas: tuple[float, ...]
    damping: tuple[float, ...]


def _scores(
    capture: Capture,
    checkpoints: Sequence[Path],
    train: Sequence[Batch],
    query: Sequence[Batch],
    config: DemoConfig,
    *,
    progress: bool,
) -> _Scores:
    """One by one, to tell which checkpoint a query's influence comes from; each with a curvature of its own."""
    plain, corrected, etas, damping = [], [], [], []
    with closing(visit_checkpoints(capture, checkpoints, "optimizer", progress=progress)) as visited:
        for eta in visited:
            asked = capture.featurize(query, parity_loss, ids=_ids, progress=progress)
            rows = capture.featurize(train, parity_loss, per_step=False, ids=_ids, progress=progress)
            plain.append(influence(rows, asked, etas=eta).sdi.numpy())
            found = fitted([rows], config.curvature)
            if isinstance(found, list):
                damping.append(found[0].damping)
                corrected.append(influence(rows, asked, etas=eta, curvature=found).sdi.numpy())
            etas.append(eta)
    both = np.stack(plain), np.stack(corrected or plain)
    return _Scores(*both, tuple(etas), tuple(damping))


def _conservation(capture: Capture, batches: Sequence[Batch], *, progress: bool) -> float:
    """Largest, over examples, difference between the two ways to the sketch of the whole gradient, in sums of norms."""
    by_step = capture.featurize(batches, parity_loss, per_step=True, progress=progress).values.double()
    at_once = capture.featurize(batches, parity_loss, per_step=False, progress=progress).values.double()
    return float(((by_step.sum(1) - at_once).norm(dim=1) / by_step.norm(dim=2).sum(1)).max())


def _exact_subset(config: DemoConfig, n_train: int, n_query: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the comparison with exact gradients: drawn at random, the first probe always among them."""
    draw = random.Random(config.seed)
    rows = sorted(draw.sample(range(n_train), min(config.exact_train, n_train)))
    columns = [0, *sorted(draw.sample(range(1, n_query), min(config.exact_queries, n_query) - 1))]
    return np.array(rows), np.array(columns)


def _exact(
    model: ParityTransformer,
    checkpoints: Sequence[Path],
    weights: NDArray[np.float64],
    train: Sequence[Batch],
    query: Sequence[Batch],
    *,
    progress: bool,
) -> Array:
    """Influence ``(N, Q, steps)`` from exact gradients, summed over checkpoints with weights ``(K, Q)``."""
    reference = ExactCapture(model, body=model.block)
    parts: list[Array] = []
    for path, weight in zip(checkpoints, weights, strict=True):
        part = influence_over_checkpoints(reference, [path], train, query, parity_loss, ids=_ids, progress=progress)
        parts.append(part.sdi.numpy() * weight[:, None].astype(np.float32))
    return np.asarray(np.sum(parts, axis=0), dtype=np.float32)


def _relative(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@torch.no_grad()
def _answers(model: ParityTransformer, examples: Sequence[ParityExample], length: int) -> tuple[Query, ...]:
    batch = collate(examples, length=length)
    losses = parity_loss(model, batch)
    predictions = model.answer_logits(batch["tokens"], batch["read_step"]).argmax(-1)
    parity = torch.tensor([e.parity for e in examples])
    margins = model.answer_trajectory(batch["tokens"], batch["read_step"]).margin(parity).numpy()
    return tuple(Query(e, n < 2, float(losses[n]), int(predictions[n]), margins[n]) for n, e in enumerate(examples))


@torch.no_grad()
def _losses(model: ParityTransformer, batches: Sequence[Batch]) -> Array:
    return torch.cat([parity_loss(model, batch) for batch in batches]).numpy()
