"""One split of a run, from a dataset to a store: this worker's shards, at every checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeAlias

import torch

from stepinfluence.app.project import MapStyle
from stepinfluence.app.runs.answers import write_answers
from stepinfluence.app.runs.config import CONFIG, SUMMED_SPLIT, RunConfig, SplitConfig
from stepinfluence.app.runs.examples import Part, featurize_part
from stepinfluence.app.runs.pinned import checked_pins
from stepinfluence.app.runs.prepared import Prepared
from stepinfluence.app.runs.trust import mark
from stepinfluence.app.runs.workers import Worker
from stepinfluence.errors import ConfigError, ProjectError
from stepinfluence.files import write_bytes
from stepinfluence.progress import tqdm
from stepinfluence.store import FailedRow, Manifest, Store, StoreWriter, fold, fold_manifest, is_unwritten
from stepinfluence.store.manifest import MANIFEST
from stepinfluence.writers import locked, remove_leftovers

SHARD_BYTES = 128 << 20
"""What a shard's values are to take, about, where the shard's rows are not given."""

LOG_SECONDS = 60
Log: TypeAlias = Callable[[str], object]

ASSUMED_STEPS = 32
"""Loop steps that are assumed where rows hold one vector per step, before any has been run."""


@dataclass(frozen=True)
class SplitReport:
    """What was done for a split.

    Attributes:
        split, path: which, and its store's folder.
        rows: examples of the dataset.
        written: shards that this worker wrote now.
        missing: shards that are not there yet (other workers', or still to be done).
        failed: rows without features, and why (of the shards that are there).
        seconds: this call took.
    """

    split: str
    path: Path
    rows: int
    written: int
    missing: int
    failed: dict[int, str]
    seconds: float

    @property
    def complete(self) -> bool:
        return self.missing == 0


def settle(settings: SplitConfig, split: str, *, width: int, rows: int) -> SplitConfig:
    """A split's settings with those that were left open filled in."""
    per_step = settings.per_step if settings.per_step is not None else split != SUMMED_SPLIT
    shard_rows = settings.shard_rows
    if shard_rows is None:
        batch = settings.batch_size
        per_row = 4 * width * (ASSUMED_STEPS if per_step else 1)
        batches = max(1, min(4096, SHARD_BYTES // per_row) // batch)
        shard_rows = min(batches, max(1, -(-rows // batch))) * batch
    return replace(
        settings,
        per_step=per_step,
        shard_rows=shard_rows,
        threads=settings.threads if settings.threads is not None else torch.get_num_threads(),
    )


def run_splits(
    prepared: Prepared,
    out: Path,
    *,
    worker: Worker | None = None,
    accept_changes: bool = False,
    progress: bool = True,
    on_start: Callable[[str, int], object] = lambda split, rows: None,
    log: Log | None = None,
) -> Iterator[SplitReport]:
    """Featurize this worker's share of every split of ``prepared.config`` into ``out/<split>``, and write
    ``out/config.yaml``. A process that works alone locks ``out`` meanwhile. Nothing is written before the first shard
    has its features: a call that fails before binds nobody.

    Args:
        accept_changes: go on although the project's code, data or losses are others than those that the run was begun
            with, and record it.
        progress: show a progress bar with the time left.
        on_start: called with the name and the number of examples of each split as it begins.
        log: called with a line on the state once a minute, for where no bar can be shown.

    Yields:
        One :class:`SplitReport` per split, as it is done.

    Raises:
        ConfigError: the run in ``out`` was begun with other settings.
        StoreError: another command is writing to ``out``.
        StepInfluenceError: as for :func:`featurize_split`.
    """
    worker = worker or Worker()
    # Workers share the folder, and need no lock: each writes shards of its own.
    with locked(out) if worker.world_size == 1 else nullcontext():
        remove_leftovers(out)
        yield from _run_splits(
            prepared, out, worker, accept_changes=accept_changes, progress=progress, on_start=on_start, log=log
        )


def _run_splits(
    prepared: Prepared,
    out: Path,
    worker: Worker,
    *,
    accept_changes: bool,
    progress: bool,
    on_start: Callable[[str, int], object],
    log: Log | None,
) -> Iterator[SplitReport]:
    prepared.stored()  # whatever is wrong with a checkpoint shows before anything is written
    config = prepared.config
    data = {split: prepared.project.dataset(split) for split in config.splits}
    splits = {
        split: settle(settings, split, width=prepared.capture.width, rows=len(data[split]))
        for split, settings in config.splits.items()
    }
    config = replace(
        config,
        splits=splits,
        checkpoints=tuple(str(path) for path in prepared.paths),
        workspace=prepared.capture.sketching.workspace,
    )
    earlier = RunConfig.load(out / CONFIG) if (out / CONFIG).is_file() else None
    begun = {} if earlier is None else earlier.splits
    if worker.world_size == 1:
        # A call that failed before its first shard binds nobody: the next one may have the settings it asked for.
        # (Among several workers, another may be about to write one.)
        begun = {split: settings for split, settings in begun.items() if not is_unwritten(out / split)}
    if earlier is not None and begun:
        config = config.merged(replace(earlier, splits=begun), out)
    prepared.config = config

    def begin() -> None:
        config.save(out / CONFIG)
        mark(out, config.project)

    for split in splits:
        on_start(split, len(data[split]))
        yield featurize_split(
            prepared,
            split,
            data[split],
            out / split,
            worker=worker,
            accept_changes=accept_changes,
            on_begin=begin,
            progress=progress,
            log=log,
        )
    # Another call may have added splits of its own meanwhile.
    if (out / CONFIG).is_file() and (now := RunConfig.load(out / CONFIG)) and now.splits.keys() != config.splits.keys():
        config.merged(now, out).save(out / CONFIG)


def manifest_of(prepared: Prepared, split: str, settings: SplitConfig, n_rows: int) -> Manifest:
    """The manifest of a split's store: the same for every worker."""
    manifest = Manifest.of(
        prepared.capture,
        n_rows,
        prepared.stored(),
        shard_rows=settings.shard_rows,
        per_step=settings.per_step,
        dtype=settings.dtype,
        project={
            "file": prepared.project.path.name,
            "split": split,
            # Features depend on these in their last bits.
            "batch_size": settings.batch_size,
            "device": prepared.device.type,
            **({"threads": settings.threads} if prepared.device.type == "cpu" else {}),
        },
    )
    return fold_manifest(manifest, seed=prepared.config.seed) if prepared.config.fold else manifest


def featurize_split(
    prepared: Prepared,
    split: str,
    data: MapStyle,
    path: Path,
    *,
    worker: Worker | None = None,
    accept_changes: bool = False,
    on_begin: Callable[[], object] = lambda: None,
    progress: bool = True,
    log: Log | None = None,
) -> SplitReport:
    """Featurize this worker's share of a split into the store at ``path``; goes on where an earlier call stopped.

    Shard ``s`` is worker ``s % world_size``'s. Nothing depends on who writes a shard: batches are cut within shards,
    and random states go by the position of a batch in the dataset.

    Args:
        prepared: the run's model.
        split: one of ``prepared.config.splits``, whose settings must not be open (:func:`settle`).
        data: its dataset.
        path: the store's folder.
        worker: this process; the only one if not given.
        on_begin: called before anything is written: when the first shard has its features, or nothing is left to do.
        accept_changes, progress, log: as for :func:`run_splits`.

    Raises:
        StoreError: the folder holds another store, or the disk is full; or the project's code, data or losses are not
            those that the store was begun with (says which).
        ProjectError, LossError: an example failed (see :func:`featurize_part`), or all of a shard's did.
        StepInfluenceError: the project, the model or a checkpoint is not as it must be.
    """
    began = time.monotonic()
    worker = worker or Worker()
    settings = prepared.config.splits[split]
    company = prepared.capture.sharding.company
    if not company.alone and company.size != worker.world_size:
        raise ConfigError(
            f"project: model() is sharded over {company.size} processes, and {worker.world_size} were started; shard "
            "it over all of them, and start them with torchrun or srun"
        )
    if not company.alone and prepared.config.on_error == "skip":
        raise ConfigError(
            "on_error: got skip, but model() is sharded over processes, which cannot go on without one of them; use "
            "stop"
        )
    if prepared.capture.sharding.parallel.any and not company.alone:
        raise ConfigError(
            "project: model() is tensor-parallel, and sdi featurize gives every process examples of its own; use "
            "fully_shard, or attach() with the same batches in every process (docs/cluster.md)"
        )
    with _threads(settings.threads, prepared.device):
        company.any(False)  # nobody has written anything since: all find the same
        manifest = manifest_of(prepared, split, settings, len(data))
        unwritten = is_unwritten(path)
        if (path / MANIFEST).is_file() and not (unwritten and worker.world_size == 1):
            StoreWriter.resume(path, manifest)
        StoreWriter.require_free(path)
        pins = checked_pins(prepared, path, data, settings.batch_size, worker, accept_changes=accept_changes)

        def begin() -> None:
            on_begin()
            pins.put_at(path)
            if unwritten and worker.world_size == 1 and (path / MANIFEST).is_file():
                write_bytes(path / MANIFEST, manifest.to_bytes())  # left by a call that was killed just here
            StoreWriter.create(path, manifest)

        writer = StoreWriter(path, manifest)
        written = _write(prepared, writer, data, settings, worker, split, begin, progress=progress, log=log)
    company.any(False)
    store = Store.open(path)
    if store.complete:
        writer.finish()
        if split != SUMMED_SPLIT:
            write_answers(prepared, store, data, settings.batch_size)
    return SplitReport(
        split, path, len(store), written, store.missing_count, store.failed, time.monotonic() - began
    )  # fmt: skip


def _write(
    prepared: Prepared,
    writer: StoreWriter,
    data: MapStyle,
    settings: SplitConfig,
    worker: Worker,
    split: str,
    begin: Callable[[], object],
    *,
    progress: bool,
    log: Log | None,
) -> int:
    manifest, folded = writer.manifest, prepared.config.fold
    # Folded rows need all checkpoints at a time; others are written checkpoint by checkpoint, to load each once.
    visits: Sequence[tuple[int, ...]] = (
        [tuple(range(prepared.count))] if folded else [(k,) for k in range(prepared.count)]
    )
    work: list[tuple[int, tuple[int, ...], int, bool]] = []
    for column, checkpoints in enumerate(visits):
        own = writer.pending(column, rank=worker.rank, world_size=worker.world_size)
        work += [(column, checkpoints, shard, True) for shard in own]
        # Whose weights others need makes a shard for nothing.
        idle = prepared.capture.sharding.company.most(len(own))[0] - len(own)
        work += [(column, checkpoints, manifest.n_shards - 1, False)] * idle
    total = sum(len(manifest.rows_of(shard)) * len(checkpoints) for _, checkpoints, shard, _ in work)
    per_shard = -(-manifest.shard_rows // settings.batch_size)
    with (
        tqdm(total=total, desc=split, unit=" examples", dynamic_ncols=True, disable=not progress or not work) as bar,
    ):
        state = _State(bar, split, total, log)
        if not work:
            begin()
        for number, (column, checkpoints, shard, kept) in enumerate(work):
            started = time.monotonic()
            parts = []
            for checkpoint in checkpoints:
                where = prepared.visit(checkpoint)
                if prepared.count > 1:
                    bar.set_postfix(checkpoint=f"{checkpoint + 1}/{prepared.count}", refresh=False)
                part = featurize_part(
                    prepared,
                    data,
                    manifest.rows_of(shard),
                    per_step=manifest.per_step,
                    batch_size=settings.batch_size,
                    on_error=prepared.config.on_error,
                    first_batch=shard * per_shard,
                    done=state.update,
                )
                if part.features is None or not len(part.features):
                    raise ProjectError(
                        f"all examples of shard {shard} failed at checkpoint {where.name}; the first, id "
                        f"{part.rows[0].id!r}: {part.failed[0].reason}"
                    )
                parts.append(part)
            if not number:
                begin()
            if not kept:
                continue
            whole = _folded(parts, prepared) if folded else parts[0]
            writer.write_shard(
                column, shard, whole.features, whole.rows, whole.failed, seconds=time.monotonic() - started
            )
    return sum(kept for *_, kept in work)


class _State:
    """How far the work is: on a bar, and in a line a minute."""

    def __init__(self, bar: tqdm[NoReturn], split: str, total: int, log: Log | None) -> None:
        self._bar, self._split, self._total, self._log = bar, split, total, log
        self._done = 0
        self._began = self._said = time.monotonic()

    def update(self, examples: int) -> None:
        self._bar.update(examples)
        self._done += examples
        now = time.monotonic()
        if self._log is not None and self._done and now - self._said >= LOG_SECONDS:
            left = (now - self._began) * (self._total - self._done) / self._done
            self._log(f"{self._split}: {self._done:,} of {self._total:,} examples, {left / 60:,.0f} min left")
            self._said = now


def _folded(parts: Sequence[Part], prepared: Prepared) -> Part:
    """One part of several checkpoints'; an example that failed at one of them has failed."""
    reasons: dict[int, FailedRow] = {}
    for part in parts:
        for failure in part.failed:
            reasons.setdefault(failure.row, failure)
    kept = []
    for part in parts:
        assert part.features is not None
        there = sorted(set(part.numbers) - {failure.row for failure in part.failed})
        kept.append(part.features.select([k for k, row in enumerate(there) if row not in reasons]))
    features = fold(kept, [c.eta for c in prepared.stored()], seed=prepared.config.seed) if len(kept[0]) else None
    return replace(parts[0], features=features, failed=tuple(reasons[row] for row in sorted(reasons)))


@contextmanager
def _threads(count: int | None, device: torch.device) -> Iterator[None]:
    before = torch.get_num_threads()
    if device.type == "cpu" and count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
