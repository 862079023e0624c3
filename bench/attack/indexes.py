"""Damaged faiss indexes: refused, or the same rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random

from bench.attack.campaign import Attack, Campaign
from bench.attack.made import write_store
from bench.attack.mutate import damaged, odd_json
from bench.attack.verdicts import SAME, SILENT, Verdict, judged


def prepare(folder: Path) -> Attack:
    warnings.simplefilter("ignore")
    import faiss
    from stepinfluence.errors import StepInfluenceError
    from stepinfluence.files import sealed
    from stepinfluence.search import Index, ask
    from stepinfluence.store import Store

    faiss.omp_set_num_threads(1)
    write_store(folder / "train", n_rows=60)
    write_store(folder / "twin", n_rows=60, seed=3)
    write_store(folder / "query", n_rows=5, per_step=True)
    train, query = Store.open(folder / "train"), Store.open(folder / "query")
    question = ask(train, query)
    places = {}
    for factory in ("IVF4,SQ8", "Flat", "IVF4,Flat", "HNSW8"):
        at, twin = folder / f"index-{len(places)}", folder / f"other-{len(places)}"
        Index.build(train, at, factory=factory, progress=False)
        Index.build(Store.open(folder / "twin"), twin, factory=factory, progress=False)
        before = Index.open(at, train).candidates(question, 5).tolist()
        files = {path: (path.read_bytes(), (twin / path.name).read_bytes()) for path in sorted(at.iterdir())}
        places[at] = (before, files)

    def attack(rng: Random) -> Verdict:
        at = rng.choice(list(places))
        before, files = places[at]
        path = rng.choice(list(files))
        data, other = files[path]
        kind = rng.randrange(12)
        made = None if kind == 0 else other if kind == 1 else damaged(rng, data, other)
        if path.suffix == ".json" and kind > 6:
            made = odd_json(rng, data, sealed)
        if made is None:
            path.unlink()
        else:
            path.write_bytes(made)
        what = f"{at.name}/{path.name}"
        try:
            rows, verdict = judged(
                lambda: Index.open(at, train).candidates(question, 5).tolist(), (StepInfluenceError,), what
            )
        finally:
            path.write_bytes(data)
        return verdict or Verdict(
            SAME if rows == before else SILENT, f"{what}: {'as' if rows == before else 'other rows than'} before"
        )

    return attack


CAMPAIGN = Campaign("indexes", "damaged faiss indexes", 0.04, prepare)
