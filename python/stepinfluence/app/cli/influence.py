"""``sdi influence``: all scores of a run in a file, or the leading ones of every query."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from stepinfluence.app.cli._common import console, fail

if TYPE_CHECKING:
    from stepinfluence.search import TopK

HELP = """Influence of every training example of a run on every query.

Without --top-k: RUN/influence.npy, float32 (n_train, n_query, steps), written block by block in bounded memory, and \
RUN/influence.json with the ids and its checksum. With --top-k: the K leading examples of each query, as JSON or CSV \
on stdout; the full matrix is never made. Positive: training on the example lowers the query's loss.

[bold]Examples[/bold]
  [cyan]sdi influence run[/cyan]                                  the whole matrix, for numpy.load
  [cyan]sdi influence run --top-k 20 --format csv > top.csv[/cyan]
  [cyan]sdi influence run --top-k 5 --per-step --harmful[/cyan]   the worst examples of each loop step
"""
EPILOG = "Exit status: 0 done, 2 wrong use or input (damaged or incomplete store), 130 interrupted."
COLUMNS = ("query_row", "query_id", "step", "rank", "train_row", "train_id", "score", "peak_step")


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that sdi featurize wrote.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="\\[default: RUN/influence.npy, stdout with --top-k]"),
    ] = None,
    k: Annotated[int | None, typer.Option("--top-k", "-k", metavar="K", min=1, help="Leading examples only.")] = None,
    fmt: Annotated[str, typer.Option("--format", help="Of --top-k: json (with trajectories) or csv.")] = "json",
    per_step: Annotated[bool, typer.Option("--per-step", help="With --top-k: rank at each loop step.")] = False,
    harmful: Annotated[bool, typer.Option("--harmful", help="With --top-k: those that raise the loss most.")] = False,
    parameters: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Influence through these body parameters only: '*.mlp.*'.")
    ] = None,
    train: Annotated[str, typer.Option(metavar="SPLIT", help="Split of the training examples.")] = "train",
    query: Annotated[str, typer.Option(metavar="SPLIT", help="Split of the queries. \\[default: the other one]")] = "",
    device: Annotated[str | None, typer.Option(help="Where to multiply. \\[default: a GPU if there is one]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON on stdout.")] = False,
) -> None:
    """See :data:`HELP`."""
    if fmt not in ("json", "csv"):
        fail(f"format: got {fmt!r}; use json or csv")
    if k is None and (per_step or harmful):
        fail("per-step, harmful: go with --top-k; the full matrix has every step and both signs")
    screen = console(json_output=True)
    with screen.status("reading"):
        from stepinfluence.app.runs.scores import SCORES, description_path, write_scores
        from stepinfluence.app.runs.stored import StoredRun
        from stepinfluence.search import top_k

        opened = StoredRun.open(folder)
        rows = opened.store(train)
        queries = opened.store(query or opened.other(train))
    quiet = not sys.stderr.isatty()
    if k is not None:
        found = top_k(
            rows,
            queries,
            k,
            per_step=per_step,
            harmful=harmful,
            parameters=parameters,
            device=device,
            progress=not quiet,
        )
        with _output(out) as file:
            (_write_csv if fmt == "csv" else _write_json)(file, found)
        return
    path = out if out is not None else folder / SCORES
    shape = write_scores(rows, queries, path, parameters=parameters, device=device, progress=not quiet)
    beside = description_path(path)
    screen.print(f"wrote {path} {tuple(shape)} (n_train, n_query, steps), ids in {beside}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"scores": str(path), "ids": str(beside), "shape": shape}, indent=2))


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file


def _hits(found: TopK) -> Iterator[tuple[int, int | None, list[dict[str, Any]]]]:
    """(query row, 0-based step if each was ranked, its hits) in order."""
    for q in range(len(found)):
        for place, step in enumerate(found.ranked if found.per_step else (None,)):
            at = (q, place) if found.per_step else (q,)
            hits = []
            for rank in range(found.k):
                row = int(found.rows[(*at, rank)])
                if row < 0:
                    continue
                trajectory = found.sdi[(*at, rank)]
                hits.append(
                    {
                        "rank": rank + 1,
                        "row": row,
                        "id": found.train_ids[(*at, rank)],
                        "score": float(found.scores[(*at, rank)]),
                        "peak_step": 1 + int(trajectory.abs().argmax()),
                        "trajectory": trajectory.tolist(),
                    }
                )
            yield q, step, hits


def _write_json(file: TextIO, found: TopK) -> None:
    entries = [
        {"query": {"row": q, "id": found.query_ids[q]}, **({} if step is None else {"step": step + 1}), "hits": hits}
        for q, step, hits in _hits(found)
    ]
    json.dump(entries, file, ensure_ascii=False, indent=2)
    file.write("\n")


def _write_csv(file: TextIO, found: TopK) -> None:
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for q, step, hits in _hits(found):
        shown = "" if step is None else step + 1
        for hit in hits:
            writer.writerow(
                [q, found.query_ids[q], shown, hit["rank"], hit["row"], hit["id"], repr(hit["score"]), hit["peak_step"]]
            )
