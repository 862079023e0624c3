"""Damaged stores: refused, read as before, or named by ``sdi store verify``."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from bench.attack.campaign import Attack, Campaign
from bench.attack.made import write_store
from bench.attack.mutate import damaged, files_of, odd_json
from bench.attack.verdicts import FOUND, OTHER, SAME, SILENT, UNCAUGHT, Verdict, judged

KINDS: tuple[dict[str, Any], ...] = ({}, {"per_step": True, "dtype": "int8"}, {"per_step": True, "dtype": "bf16"})


def answers(path: Path) -> tuple[Any, ...]:
    """All that a store says; what is asked of an incomplete one is what the commands ask."""
    from stepinfluence.store import Store

    store = Store.open(path)
    m = store.manifest
    said: tuple[Any, ...] = (len(store), store.complete, store.missing_count, store.failed, store.steps, repr(m.space))
    said += (store.step_labels, [(c.name, c.eta) for c in store.checkpoints], m.dtype, m.loss, m.fold, dict(m.project))
    if not store.complete:
        return said
    for k in range(len(store.checkpoints)):
        found = store.features(k)
        said += (found.values.numpy().tobytes(), found.losses.numpy().tobytes(), found.steps.numpy().tobytes())
        said += (None if found.lengths is None else found.lengths.numpy().tobytes(), found.ids)
    return (*said, [repr(store.row(row)) for row in range(len(store))])


def disturb(rng: Random, at: Path, twin: Path) -> tuple[str, bool, list[Path]]:
    """Change one file of a store, or swap two; what was done, whether it was sealed anew, and which files changed."""
    from stepinfluence.files import sealed

    paths = files_of(at)
    path = rng.choice(paths)
    name = path.relative_to(at).as_posix()
    kind = rng.randrange(20)
    if kind == 0:
        path.unlink()
        return f"{name} removed", False, [path]
    alike = [p for p in paths if p.suffix == path.suffix and p != path]
    if kind == 1 and alike:
        second = rng.choice(alike)
        first, other = path.read_bytes(), second.read_bytes()
        path.write_bytes(other)
        second.write_bytes(first)
        return f"{name} and {second.name} swapped", False, [path, second]
    if kind == 2:
        path.write_bytes((twin / name).read_bytes())
        return f"{name} of another store", False, [path]
    data = path.read_bytes()
    if path.suffix == ".jsonl" and rng.random() < 0.5:
        lines = data.splitlines(keepends=True)
        line = rng.randrange(len(lines))
        lines[line] = odd_json(rng, lines[line]) + b"\n"
        path.write_bytes(b"".join(lines))
        return f"{name} with odd values", False, [path]
    if path.suffix == ".json" and rng.random() < 0.5:
        path.write_bytes(odd_json(rng, data, sealed))
        return f"{name} with odd values", True, [path]
    path.write_bytes(damaged(rng, data, (twin / name).read_bytes()))
    return f"{name} damaged", False, [path]


def prepare(folder: Path) -> Attack:
    from stepinfluence.errors import StepInfluenceError
    from stepinfluence.store import verify

    stores = []
    for k, fields in enumerate(KINDS):
        whole, twin = folder / f"store-{k}", folder / f"twin-{k}"
        write_store(whole, **fields)
        write_store(twin, seed=7, **fields)
        stores.append((whole, twin, answers(whole), {path: path.read_bytes() for path in files_of(whole)}))

    def judge(what: str, at: Path, before: tuple[Any, ...], *, resealed: bool, intact: bool) -> Verdict:
        problems, wrong = judged(lambda: verify(at), (StepInfluenceError,), f"{what}: verify")
        if wrong is not None and wrong.kind == UNCAUGHT:
            return wrong
        if any("\n" in line for line in problems or ()):
            return Verdict(UNCAUGHT, f"{what}: verify gives a problem of several lines")
        said, verdict = judged(lambda: answers(at), (StepInfluenceError,), what)
        if verdict is not None:
            return verdict
        if intact and said == before:
            return Verdict(SAME, what)
        if wrong is not None or problems:
            return Verdict(FOUND, what)
        return Verdict(
            OTHER if resealed else SILENT,
            f"{what}: nothing is named, answers are {'as' if said == before else 'not as'} before",
        )

    def attack(rng: Random) -> Verdict:
        at, twin, before, files = rng.choice(stores)
        what, resealed, changed = disturb(rng, at, twin)
        try:
            intact = all(path.is_file() and path.read_bytes() == files[path] for path in changed)
            return judge(what, at, before, resealed=resealed, intact=intact)
        finally:
            for path in changed:
                path.write_bytes(files[path])

    return attack


CAMPAIGN = Campaign("stores", "damaged stores", 0.11, prepare)
