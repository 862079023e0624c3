"""What a split of a run was computed from, kept beside its store, and what of it has changed since.

``RUN/<split>.pinned.json`` has digests of the project's code and of the first batch. With what the store itself holds
(every row's id and loss) it tells a later call whether going on would mix two different computations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepinfluence.app.project import MapStyle
from stepinfluence.app.runs.examples import featurize_part, info_of
from stepinfluence.app.runs.prepared import Prepared
from stepinfluence.app.runs.sources import sources_of
from stepinfluence.app.runs.workers import Worker
from stepinfluence.attribution.features import weights_digest
from stepinfluence.attribution.sameness import losses_differ, precision
from stepinfluence.capture.body.batches import leaves
from stepinfluence.errors import StoreError
from stepinfluence.files import read_sealed, sealed, write_bytes
from stepinfluence.machine import arithmetic
from stepinfluence.store import Store, is_unwritten
from stepinfluence.store.shards import rows_to_bytes

FORMAT = "sdi-pins-1"
LIMIT = 64 << 20
PROBES = 32
"""Shards whose rows and losses are looked at again, at most, evenly spread over those that are there."""


@dataclass(frozen=True)
class Pins:
    """Digests of what a split is computed from.

    Attributes:
        machine: where they were made, see :func:`stepinfluence.machine.arithmetic`.
        sources: as :func:`sources_of` gives them.
        batch: of the collated first batch, see :func:`batch_content`.
        rows: SHA-256 of the first batch's ids, texts, metadata and tokens.
        accepted: changes that were accepted knowingly: when, which, and the ranges of shards that were there then.
    """

    machine: str
    sources: Mapping[str, str]
    batch: Mapping[str, Any]
    rows: str
    accepted: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, prepared: Prepared, data: MapStyle, batch_size: int) -> Pins:
        """Of the project and the data as they are now."""
        first = range(min(batch_size, len(data)))
        rows = ""
        try:
            examples = [data[row] for row in first]
            infos = [info_of(prepared.project, example, row) for row, example in zip(first, examples, strict=True)]
            rows = hashlib.sha256(rows_to_bytes(infos)).hexdigest()
            batch = batch_content(prepared.project.collate(examples)) if examples else {}
        except Exception as error:  # featurizing says more about it, and may go on without the example
            batch = {"failed": type(error).__name__}
        return cls(arithmetic(), sources_of(prepared.project.path), batch, rows)

    def excused(self, shard: int) -> bool:
        """Whether a shard was there when a change was accepted."""
        return any(start <= shard < stop for entry in self.accepted for start, stop in entry["shards"])

    @classmethod
    def read(cls, path: Path) -> Pins | None:
        """What was pinned; None if nothing was.

        Raises:
            StoreError: the file is damaged, or of another version.
        """
        if not path.is_file():
            return None
        content = read_sealed(path, LIMIT)
        if content.pop("format", None) != FORMAT or not _is_valid(content):
            raise StoreError(f"{path}: not of the format {FORMAT!r}; use another --out")
        return cls(**{**content, "accepted": tuple(content["accepted"])})

    def put_at(self, store: Path) -> None:
        """Write ``RUN/<split>.pinned.json``, whole or not at all.

        Raises:
            StoreError: another worker has begun the store meanwhile, and computes something else.
        """
        path = pins_path(store)
        found = None if is_unwritten(store) else Pins.read(path)
        if found == self:
            return
        if found is not None and len(found.accepted) >= len(self.accepted) and (changes := list(found.changes(self))):
            raise StoreError(f"{store}: another worker has begun it otherwise; different are: {'; '.join(changes)}")
        content = {"format": FORMAT, **dataclasses.asdict(self), "accepted": [dict(a) for a in self.accepted]}
        write_bytes(path, sealed(content))

    def changes(self, now: Pins) -> Iterator[str]:
        """What is no longer as it was pinned, in words."""
        names = sorted(self.sources.keys() | now.sources.keys())
        changed = [name for name in names if self.sources.get(name) != now.sources.get(name)]
        if changed:
            yield f"the project's code ({', '.join(changed[:5])}{', ...' * (len(changed) > 5)})"
        if not _same_batch(self.batch, now.batch, same_machine=self.machine == now.machine):
            yield "the first batch of data"
        if self.rows != now.rows:
            yield "ids, texts, metadata or tokens of the first batch"

    def accepting(self, now: Pins, changes: Sequence[str], shards: Sequence[int]) -> Pins:
        """What is pinned from now on, with these changes on record; the shards that are there need no longer fit it."""
        ranges: list[list[int]] = []
        for shard in shards:
            if ranges and ranges[-1][1] == shard:
                ranges[-1][1] += 1
            else:
                ranges.append([shard, shard + 1])
        entry = {"on": time.strftime("%Y-%m-%d %H:%M:%S"), "changed": list(changes), "shards": ranges}
        return dataclasses.replace(now, accepted=(*self.accepted, entry))


def _is_valid(content: Mapping[str, Any]) -> bool:
    """Whether fields are those of :class:`Pins`, of the types that are written: a checksum can be made by anyone."""
    if content.keys() != {f.name for f in dataclasses.fields(Pins)}:
        return False
    sources, batch, accepted = content["sources"], content["batch"], content["accepted"]
    if not (isinstance(sources, dict) and isinstance(batch, dict) and isinstance(accepted, list)):
        return False
    texts = [content["machine"], content["rows"], *sources.values()]
    pairs = batch.get("sums", [])
    if not all(isinstance(text, str) for text in texts) or not isinstance(pairs, list):
        return False
    ranges = [entry.get("shards") if isinstance(entry, dict) else None for entry in accepted]
    return all(_are_pairs(found, int) for found in ranges) and _are_pairs(pairs, float)


def _are_pairs(values: object, kind: type) -> bool:
    """Whether something is a list of lists of two numbers."""
    return isinstance(values, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(number) is kind for number in pair) for pair in values
    )


def pins_path(store: Path) -> Path:
    """The file of pins that belongs to a split's store."""
    return store.with_name(f"{store.name}.pinned.json")


def batch_content(batch: Any) -> dict[str, Any]:
    """What a batch holds: a digest of numbers that are exact, text and shapes; one of floating numbers' bits; and their
    sums and sums of magnitudes, for where another CPU has made them with other last bits."""
    exact, floating, sums = hashlib.sha256(), hashlib.sha256(), []
    for leaf in leaves(batch):
        value = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc" else leaf
        if not isinstance(value, Tensor):
            known = isinstance(value, str | bytes | int | float | complex | type | None)
            exact.update(repr(value if known else type(value)).encode())
            continue
        for part in value.unbind() if value.is_nested else (value,):
            exact.update(repr((tuple(part.shape), str(part.dtype))).encode())
            if not (part.is_floating_point() or part.is_complex()):
                exact.update(weights_digest([part]).encode())
                continue
            floating.update(weights_digest([part]).encode())
            plain = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
            numbers = plain.detach().double().nan_to_num(0.0, 0.0, 0.0)
            sums.append([float(numbers.sum()), float(numbers.abs().sum())])
    return {"exact": exact.hexdigest(), "floating": floating.hexdigest(), "sums": sums}


def _same_batch(pinned: Mapping[str, Any], now: Mapping[str, Any], *, same_machine: bool) -> bool:
    if pinned == now or same_machine or pinned.get("exact") != now.get("exact"):
        return pinned == now
    pairs = zip(pinned.get("sums", ()), now.get("sums", ()), strict=False)
    half = torch.finfo(torch.float32).eps ** 0.5
    return all(abs(a - b) <= half * max(size_a, size_b) for (a, size_a), (b, size_b) in pairs)


def checked_pins(
    prepared: Prepared, path: Path, data: MapStyle, batch_size: int, worker: Worker, *, accept_changes: bool
) -> Pins:
    """What a split is computed from now, and is pinned to from now on.

    Args:
        path: the split's store; looked into if it is there.
        accept_changes: take what has changed, and record it.

    Raises:
        StoreError: it is not what the shards that are there were computed from (says what has changed).
    """
    now = Pins.of(prepared, data, batch_size)
    if is_unwritten(path):
        return now
    store, kept = Store.open(path), Pins.read(pins_path(path))
    missing = Counter(shard for _, shard in store.missing())
    there = [shard for shard in range(store.manifest.n_shards) if missing[shard] < len(store.checkpoints)]
    changes = [] if kept is None else list(kept.changes(now))
    # Processes that hold the model together look at the same shards, at the same time.
    alone = prepared.capture.sharding.company.alone
    mine = [
        s
        for s in there
        if (s % worker.world_size == worker.rank or not alone) and not (kept is not None and kept.excused(s))
    ]
    changes += changed_rows(prepared, store, data, batch_size, mine)
    if not changes:
        return kept or now
    if not accept_changes:
        raise StoreError(
            f"{path}: going on would mix two computations; since its shards were written, these have changed: "
            f"{'; '.join(changes)}. Use another --out, put it back, or go on knowingly with --accept-changes"
        )
    return (kept or now).accepting(now, changes, there)


def changed_rows(
    prepared: Prepared, store: Store, data: MapStyle, batch_size: int, shards: Sequence[int], *, to_the_bit: bool = True
) -> Iterator[str]:
    """What rows that a store holds would be now, where that differs from what it holds: at most one line for rows and
    one for losses.

    Looks at the first batch without failed rows of some shards: ids, texts, metadata and tokens as they are, losses to
    the last bit where the shard was written on a machine like this one, else to half the digits.

    Args:
        shards: those that are there, at any checkpoint; of these at most :data:`PROBES` are looked at.
        to_the_bit: False where the number of threads may be another one than the shards were made with.
    """
    last = len(shards) - 1
    chosen = [shards[k * last // (PROBES - 1)] for k in range(PROBES)] if last >= PROBES else list(shards)
    missing, failed = set(store.missing()), store.failed
    probes: dict[int, list[tuple[int, range]]] = {}
    for shard in chosen:
        rows = store.manifest.rows_of(shard)
        cuts = [range(k, min(k + batch_size, rows.stop)) for k in range(rows.start, rows.stop, batch_size)]
        cut = next((cut for cut in cuts if not failed.keys() & set(cut)), None)
        column = next((k for k in range(len(store.checkpoints)) if (k, shard) not in missing), None)
        if cut is not None and column is not None:
            probes.setdefault(column, []).append((shard, cut))
    for cut in (cut for found in probes.values() for _, cut in found):
        if (line := _changed_info(prepared, store, data, cut)) is not None:
            yield line
            break
    for column, found in probes.items():
        if (line := _changed_loss(prepared, store, data, column, found, batch_size, to_the_bit)) is not None:
            yield line
            break


def _changed_info(prepared: Prepared, store: Store, data: MapStyle, rows: range) -> str | None:
    for row in rows:
        before = store.row(row)
        try:
            now = info_of(prepared.project, data[row], row)
        except Exception as error:
            return f"row {row} (id {before.id!r}), which cannot be read now ({type(error).__name__})"
        if now.id != before.id:
            return f"row {row}, whose id was {before.id!r} and is {now.id!r}"
        told = now.text, dict(now.metadata or {}), None if now.tokens is None else tuple(now.tokens)
        if told != (before.text, before.metadata, before.tokens):
            return f"text, metadata or tokens of row {row} (id {before.id!r})"
    return None


def _changed_loss(
    prepared: Prepared,
    store: Store,
    data: MapStyle,
    column: int,
    probes: Sequence[tuple[int, range]],
    batch_size: int,
    to_the_bit: bool,
) -> str | None:
    folded = prepared.config.fold
    losses: dict[int, list[Tensor]] = {shard: [] for shard, _ in probes}
    per_shard = -(-store.manifest.shard_rows // batch_size)
    for checkpoint in range(prepared.count) if folded else (column,):
        prepared.visit(checkpoint)
        for shard, cut in probes:
            part = featurize_part(
                prepared,
                data,
                cut,
                per_step=store.per_step,
                batch_size=batch_size,
                on_error="skip",
                first_batch=shard * per_shard + (cut.start - store.manifest.rows_of(shard).start) // batch_size,
            )
            if part.failed or part.features is None:
                first = part.failed[0]
                return f"the loss of row {first.row}, which had features and fails now: {first.reason}"
            losses[shard].append(part.features.losses.float().cpu())
    for shard, cut in probes:
        before = store.features(column, rows=cut).losses
        now = torch.stack(losses[shard]).mean(0) if folded else losses[shard][0]
        same_machine = to_the_bit and prepared.device.type == "cpu" and store.machine_of(column, shard) == arithmetic()
        eps = precision(prepared.capture.model, prepared.device)
        differ = before != now if same_machine else losses_differ(before, now, eps)
        wrong = differ.nonzero().flatten().tolist()
        if wrong:
            k = wrong[0]
            name = store.checkpoints[column].name
            return (
                f"the loss of row {cut[k]} at checkpoint {name}: {float(before[k]):.9g} then, {float(now[k]):.9g} now"
            )
    return None
