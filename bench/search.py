"""What searching costs and finds: scan speed against a plain read, recall of int8 and of an index, two stages.

    python -m bench.search --scratch DIR [--rows 100000 1000000] [--real 20000] [--keep]

The features are those of a small looped transformer, trained on the spot on running sums modulo 5: ``--real`` examples
are featurized (sketches of 1024 columns in all), further rows are copies of them with noise of a tenth of their length
and scales between 1/2 and 2. Recall at 10 of int8 scan and index is against a float32 scan of all rows; recall of
sketches and of two stages is against the exact influence of all real examples.

Times are the best of ``--rounds``; a plain read (a sum of the same bytes as 64-bit integers, by torch) alternates with
the scans, so that both see the same machine. Rows lie in a store whose files are in the page cache. The first scan
after opening a store maps its files; it is shown apart. On a machine that others use, ``--cpu-seconds`` with one thread
(``OMP_NUM_THREADS=1``) counts processor seconds instead.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from stepinfluence import Features, attach
from stepinfluence.capture import Capture
from stepinfluence.models.blocks import Block, BlockConfig
from stepinfluence.search import Index, Recompute, ask, rerank, top_k, two_stage
from stepinfluence.search.ranking import Ranking
from stepinfluence.search.topk import best_rows
from stepinfluence.store import Manifest, RowInfo, Store, StoredCheckpoint, StoreWriter
from torch import Tensor, nn
from torch.nn import functional as F

from bench.provenance import Provenance, add_output, machine_line, machine_slug, write

COLUMNS, SHARD_ROWS, K, QUERIES = 1024, 32768, 10, 16
TOKENS, STEPS, WIDTH, SYMBOLS = 12, 6, 32, 5


class Looped(nn.Module):
    """Embedding, six entries into one block with input injection, read-out at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(SYMBOLS, WIDTH), nn.Linear(WIDTH, SYMBOLS)
        self.core = Block(BlockConfig(WIDTH, 4, causal=True))

    def forward(self, tokens: Tensor) -> Tensor:
        state = injected = self.embed(tokens)
        for _ in range(STEPS):
            state = self.core(state + injected)
        logits: Tensor = self.head(state)
        return logits


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the running sums modulo 5: ``(B,)``."""
    logits = model(tokens)
    return F.cross_entropy(logits.transpose(1, 2), tokens.cumsum(1) % SYMBOLS, reduction="none").mean(1)


def trained(updates: int = 300) -> Looped:
    torch.manual_seed(0)
    model = Looped()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(updates):
        loss = loss_fn(model, torch.randint(0, SYMBOLS, (128, TOKENS))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"model: loss {float(loss.detach()):.3f} after {updates} updates (chance: {torch.tensor(SYMBOLS).log():.3f})")
    return model.eval()


def captured(model: Looped) -> Capture:
    """A capture whose sketches have 1024 columns in all."""
    names = [name for name, _ in model.named_parameters() if name.startswith("core.")]
    each = COLUMNS // len(names)
    sizes = dict.fromkeys(names, each)
    sizes[names[-1]] += COLUMNS - each * len(names)
    return attach(model, body="core", sketch_size=sizes)


def rows_of(real: Tensor, first: int, count: int) -> Tensor:
    """Rows ``first : first + count``: the real ones, then noisy copies; the same whenever they are asked for."""
    place = torch.arange(first, first + count)
    values = real[place % len(real)].clone()
    generator = torch.Generator().manual_seed(first + 1)
    noise = torch.randn(values.shape, generator=generator) * values.norm(dim=1, keepdim=True) / COLUMNS**0.5
    copies = (0.1 * noise + values) * torch.exp2(torch.rand(count, 1, generator=generator) * 2 - 1)
    return torch.where((place < len(real)).unsqueeze(1), values, copies)


def shards(real: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, rows, SHARD_ROWS):
        yield first, rows_of(real, first, min(SHARD_ROWS, rows - first))


def stored(path: Path, real: Features, rows: int, dtype: str) -> Store:
    """A store of ``rows`` rows."""
    checkpoint = StoredCheckpoint("trained", 1.0, real.space)
    manifest = Manifest(checkpoints=(checkpoint,), n_rows=rows, shard_rows=SHARD_ROWS, dtype=dtype)  # type: ignore[arg-type]
    writer = StoreWriter.create(path, manifest)
    for first, values in shards(real.values, rows):
        n = len(values)
        part = replace(
            real,
            values=values,
            losses=torch.zeros(n),
            steps=torch.full((n,), STEPS),
            ids=tuple(range(first, first + n)),
        )
        writer.write_shard(0, first // SHARD_ROWS, part, [RowInfo(r) for r in range(first, first + n)])
    writer.finish()
    return Store.open(path)


CLOCK = {"now": time.perf_counter}
"""What seconds are: of the wall, or of the processor (``--cpu-seconds``)."""


def now() -> float:
    return CLOCK["now"]()


def best(work: Callable[[], object], rounds: int) -> float:
    """Seconds, the best of some rounds."""
    seconds = []
    for _ in range(rounds):
        began = now()
        work()
        seconds.append(now() - began)
    return min(seconds)


def recall(found: Tensor, truth: Tensor) -> float:
    """Share of the true winners ``(Q, k)`` among the found rows ``(Q, n)``."""
    return statistics.mean(len(set(f) & set(t)) / len(t) for f, t in zip(found.tolist(), truth.tolist(), strict=True))


def plain_read(store: Store) -> Callable[[], object]:
    """A sum over all bytes of a copy of the store's values in memory."""
    copy = torch.cat([torch.from_numpy(codes).flatten() for _, codes, _ in store.raw_blocks()]).view(torch.int64)
    return copy.sum


def first_queries(query: Features, count: int) -> Features:
    """The first queries, summed over steps."""
    total = query.summed()
    return replace(
        total,
        values=total.values[:count],
        losses=total.losses[:count],
        steps=total.steps[:count],
        ids=total.ids[:count],
    )


def speed(store: Store, query: Features, rounds: int) -> dict[str, Any]:
    """GB/s of scans of a store by 1, 4 and 16 queries, each beside a plain read of the same bytes."""
    size = sum(codes.nbytes for _, codes, _ in store.raw_blocks()) / 1e9
    read = plain_read(store)
    one = ask(Store.open(store.path), first_queries(query, 1))
    found: dict[str, Any] = {
        "gigabytes": size,
        "first scan after opening GB/s": size / best(lambda: best_rows(one, K), 1),
    }
    print(f"    first scan after opening, which maps the files: {found['first scan after opening GB/s']:.1f} GB/s")
    for queries in (1, 4, 16, 64):
        part = first_queries(query, queries)
        question = ask(store, part)
        pairs = [(best(read, 1), best(lambda q=question: best_rows(q, K), 1)) for _ in range(rounds)]
        whole = best(lambda part=part: top_k(store, part, K, progress=False), rounds)
        reads, scans = (size / min(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(r / s for r, s in pairs)
        found[f"{queries} queries"] = {
            "read GB/s": reads,
            "scan GB/s": scans,
            "scan/read, median of rounds": ratio,
            "top_k s": whole,
        }
        print(
            f"    scan, {queries:2} queries: {scans:5.1f} GB/s, plain read {reads:5.1f} GB/s: {scans / reads:.0%} "
            f"(median of rounds {ratio:.0%}); top_k with trajectories and ids {whole * 1e3:.0f} ms"
        )
    return found


def at_size(rows: int, capture: Capture, real: Features, query: Features, tokens: Tensor, asked: Tensor, scratch: Path,
            rounds: int) -> dict[str, Any]:  # fmt: skip
    """All figures for a number of rows."""
    began = now()
    store = stored(scratch / f"rows-{rows}", real, rows, "int8")
    out: dict[str, Any] = {"rows": rows, "store s": now() - began}
    print(f"{rows} rows, int8 (written in {out['store s']:.0f} s)")
    out["scan"] = speed(store, query, rounds)
    truth = Ranking(QUERIES, K, smallest=False, dtype=torch.float32, device=torch.device("cpu"))
    for _, values in shards(real.values, rows):
        truth.add(values @ query.summed().values.T)
    exact, _ = truth.result()
    out["recall int8"] = recall(top_k(store, query, K).rows, exact)
    began = now()
    index = Index.build(store, scratch / f"index-{rows}")
    out["index build s"] = now() - began
    print(f"    int8 scan: recall@10 {out['recall int8']:.3f}; index built in {out['index build s']:.0f} s")
    question = ask(store, query)
    for probes in (8, 32, 128):
        index.probes = probes
        hits = recall(index.candidates(question, K), exact)
        more = recall(index.candidates(question, 10 * K), exact)
        seconds = best(lambda: index.candidates(question, 10 * K), rounds) / QUERIES
        out[f"index, {probes} lists"] = {"recall@10": hits, "of 100": more, "s/query": seconds}
        print(f"    index, {probes:3} lists: recall@10 {hits:.3f} ({more:.3f} in 100), {seconds * 1e3:.1f} ms a query")
    data = [tokens[r % len(tokens)] for r in range(rows)]
    for name, given in (("scan", None), ("index, 32 lists", index)):
        index.probes = 32
        began = now()
        exact = Recompute(capture, loss_fn, data, list(asked), batch_size=128)
        found = two_stage(question, K, exact=exact, candidates=100, index=given, progress=False)
        out[f"two stages, {name}"] = {"s": now() - began, "wall s by stage": dict(found.seconds)}
        print(
            f"    two stages, {name}: {now() - began:.2f} s with the exact influence of "
            f"{found.candidates.unique().numel()} rows on {QUERIES} queries; of the wall's time "
            f"{found.seconds['candidates'] / sum(found.seconds.values()):.0%} for candidates"
        )
    shutil.rmtree(store.path)
    shutil.rmtree(scratch / f"index-{rows}")
    return out


def of_real(capture: Capture, real: Features, query: Features, tokens: Tensor, asked: Tensor) -> dict[str, Any]:
    """Recall against exact influence, among the real examples."""
    began = now()
    full = rerank(capture, loss_fn, tokens.split(256), [asked], progress=False).tracin
    seconds = now() - began
    truth = full.T.topk(K).indices
    out: dict[str, Any] = {"exact influence, rows/s": len(tokens) / seconds, "sketches": recall(
        top_k(real, query, K).rows, truth)}  # fmt: skip
    for candidates in (20, 50, 100, 200):
        out[f"{candidates} candidates"] = recall(top_k(real, query, candidates).rows, truth)
    print(f"{len(tokens)} real examples, against their exact influence on {QUERIES} queries ({seconds:.0f} s)")
    print(f"    sketches of {COLUMNS} columns: recall@10 {out['sketches']:.3f}; two stages: " + ", ".join(
        f"{out[f'{c} candidates']:.3f} with {c} candidates" for c in (20, 50, 100, 200)))  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--real", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder with 2.5 bytes * 1024 for every row")
    add_output(parser, f"search-{machine_slug()}")
    parser.add_argument("--cpu-seconds", action="store_true", help="processor seconds, for machines that others use")
    given = parser.parse_args()
    if given.cpu_seconds:
        CLOCK["now"] = time.process_time
    provenance = Provenance()
    capture = captured(trained())
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SYMBOLS, (given.real, TOKENS), generator=generator)
    asked = torch.randint(0, SYMBOLS, (QUERIES, TOKENS), generator=generator)
    began = now()
    real = capture.featurize(tokens.split(256), loss_fn, per_step=False)
    print(f"featurized {given.real} examples in {now() - began:.0f} s, {torch.get_num_threads()} threads")
    query = capture.featurize([asked], loss_fn)
    results: dict[str, Any] = {
        "clock": "cpu" if given.cpu_seconds else "wall",
        "real": of_real(capture, real, query, tokens, asked),
    }
    for rows in given.rows:
        results[str(rows)] = at_size(rows, capture, real, query, tokens, asked, given.scratch, given.rounds)
    print(machine_line(provenance.finish()))
    write(given.json, provenance, results)


if __name__ == "__main__":
    main()
