"""``sdi influence``: all scores of a run in a file, or the leading ones of every query."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from stepinfluence.app.cli._common import (
    DampingOption,
    console,
    damping_of,
    fail,
    need_extra,
    print_json,
    require_output,
    require_run,
    shown,
)

if TYPE_CHECKING:
    from stepinfluence.search import TopK
    from stepinfluence.store import Store

HELP = """Influence of every training example of a run on every query.

Without --top-k: RUN/influence.npy, float32 (n_train, n_query, steps), written block by block in bounded memory, and \
RUN/influence.json with the ids and its checksum. With --top-k: the K leading examples of each query with their texts, \
as JSON or CSV on stdout, or as Parquet into a file; the full matrix is never made. Positive: training on the example \
lowers the query's loss.

[bold]Examples[/bold]
  [cyan]sdi influence run[/cyan]                                 the whole matrix
  [cyan]sdi influence run --top-k 20 --format csv > top.csv[/cyan]
  [cyan]sdi influence run --top-k 20 --format parquet -o top.parquet[/cyan]
  [cyan]sdi influence run --top-k 5 --per-step --harmful[/cyan]  worst of each loop step
  [cyan]sdi influence run --curvature fisher[/cyan]              corrected for curvature
"""
EPILOG = "Exit status: 0 done, 2 wrong use or input (damaged or incomplete store), 130 interrupted."
COLUMNS = (
    "query_row", "query_id", "query_text", "step", "rank", "train_row", "train_id", "train_text", "score", "peak_step",
)  # fmt: skip


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that sdi featurize wrote.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="\\[default: RUN/influence.npy, stdout with --top-k]"),
    ] = None,
    k: Annotated[int | None, typer.Option("--top-k", "-k", metavar="K", min=1, help="Leading examples only.")] = None,
    fmt: Annotated[
        str | None,
        typer.Option("--format", help="Of --top-k: json (with trajectories), csv or parquet. \\[default: json]"),
    ] = None,
    per_step: Annotated[bool, typer.Option("--per-step", help="With --top-k: rank at each loop step.")] = False,
    harmful: Annotated[bool, typer.Option("--harmful", help="With --top-k: those that raise the loss most.")] = False,
    parameters: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Influence through these body parameters only: '*.mlp.*'.")
    ] = None,
    curvature: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Corrected for curvature by fisher or block, or through training by source; none: the paper's SDI.",
        ),
    ] = "none",
    damping: DampingOption = None,
    train: Annotated[str, typer.Option(metavar="SPLIT", help="Split of the training examples.")] = "train",
    query: Annotated[str, typer.Option(metavar="SPLIT", help="Split of the queries. \\[default: the other one]")] = "",
    device: Annotated[str | None, typer.Option(help="Where to multiply. \\[default: a GPU if there is one]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON on stdout.")] = False,
) -> None:
    """See :data:`HELP`."""
    _check(fmt, k, out, as_json=as_json, ranked=per_step or harmful, damped=curvature == "none" and damping is not None)
    fmt = fmt or "json"
    number = damping_of(damping)
    require_run(folder)
    if out is not None:
        require_output(out, ".npy" if k is None else f".{fmt}")
    screen = console(json_output=True)
    with screen.status("reading"):
        from stepinfluence.app.runs.curvatures import kept_curvatures, score_named
        from stepinfluence.app.runs.scores import SCORES, description_path, write_scores
        from stepinfluence.app.runs.stored import StoredRun
        from stepinfluence.search import top_k

        opened = StoredRun.open(folder)
        rows = opened.store(train)
        queries = opened.store(query or opened.other(train))
        fitted = kept_curvatures(folder, rows, curvature, number)
    quiet = not sys.stderr.isatty()
    if k is not None:
        found = top_k(
            rows,
            queries,
            k,
            per_step=per_step,
            harmful=harmful,
            parameters=parameters,
            curvature="none" if fitted is None else fitted,
            device=device,
            progress=not quiet,
        )
        _write_leading(out, fmt, found, rows, queries, score_named(fitted))
        screen.print(f"[dim]{shown(score_named(fitted))}[/]", soft_wrap=True)
        return
    path = out if out is not None else folder / SCORES
    shape = write_scores(
        rows, queries, path, parameters=parameters, device=device, progress=not quiet, curvature=fitted
    )
    beside = description_path(path)
    screen.print(
        f"wrote {shown(path)} {tuple(shape)} (n_train, n_query, steps), ids in {shown(beside)}", soft_wrap=True
    )
    screen.print(f"[dim]{shown(score_named(fitted))}[/]", soft_wrap=True)
    if as_json:
        told = {"scores": str(path), "ids": str(beside), "shape": shape, "score": score_named(fitted)}
        print_json(told)


def _check(fmt: str | None, k: int | None, out: Path | None, *, as_json: bool, ranked: bool, damped: bool) -> None:
    """Leave if options say nothing together, or an extra is missing."""
    if fmt not in (None, "json", "csv", "parquet"):
        fail(f"format: got {fmt!r}; use json, csv or parquet")
    if fmt == "parquet":
        if k is None or out is None:
            fail("format: parquet goes with --top-k, and into a file: --out top.parquet")
        from stepinfluence.app.doctor import missing_modules

        need_extra("notebook", missing_modules(("pyarrow",)))
    if k is None and ranked:
        fail("per-step, harmful: go with --top-k; the full matrix has every step and both signs")
    if k is None and fmt is not None:
        fail("format: goes with --top-k; the full matrix is a .npy file")
    if k is not None and as_json:
        fail("json: tells what the full matrix was written to; with --top-k, give --format json")
    if damped:
        fail("damping: goes with --curvature fisher or block")


def _output(path: Path | None, write: Callable[[TextIO], object]) -> None:
    """Have text written to stdout, or into a file that is there whole or not at all."""
    from stepinfluence.files import hand_out

    def fill(made: Path) -> None:
        # What UTF-8 cannot hold, halves of characters, is spelled out.
        with made.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            write(file)

    if path is None:
        write(sys.stdout)
    else:
        hand_out(path, fill)


def _hits(found: TopK, train: Store) -> Iterator[tuple[int, int | None, list[dict[str, Any]]]]:
    """(query row, 0-based step if each was ranked, its hits) in order."""
    for q in range(len(found)):
        for place, step in enumerate(found.ranked if found.per_step else (None,)):
            at = (q, place) if found.per_step else (q,)
            hits = []
            for rank in range(found.k):
                row = int(found.rows[(*at, rank)])
                if row < 0:
                    continue
                trajectory = found.trajectory(*at, rank)
                hits.append(
                    {
                        "rank": rank + 1,
                        "row": row,
                        "id": found.train_ids[(*at, rank)],
                        "text": train.row(row).text,
                        "score": float(found.scores[(*at, rank)]),
                        "peak_step": 1 + int(trajectory.abs().argmax()),
                        "trajectory": trajectory.tolist(),
                    }
                )
            yield q, step, hits


def _write_leading(out: Path | None, fmt: str, found: TopK, train: Store, query: Store, score: str) -> None:
    if fmt == "parquet":
        assert out is not None
        _write_parquet(out, found, train, query)
    elif fmt == "csv":
        _output(out, lambda file: _write_csv(file, found, train, query))
    else:
        _output(out, lambda file: _write_json(file, found, train, query, score))


def _write_json(file: TextIO, found: TopK, train: Store, query: Store, score: str) -> None:
    entries = [
        {
            "query": {"row": q, "id": found.query_ids[q], "text": query.row(q).text},
            "score": score,
            **({} if step is None else {"step": step + 1}),
            "hits": hits,
        }
        for q, step, hits in _hits(found, train)
    ]
    json.dump(entries, file, ensure_ascii=(file.encoding or "utf-8").lower() not in ("utf-8", "utf8"), indent=2)
    file.write("\n")


def _lines(found: TopK, train: Store, query: Store) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The cells of :data:`COLUMNS` of each hit, and the hit."""
    for q, step, hits in _hits(found, train):
        text = query.row(q).text
        for hit in hits:
            shown = None if step is None else step + 1
            cells = [q, found.query_ids[q], text, shown, hit["rank"], hit["row"], hit["id"], hit["text"], hit["score"]]
            yield [*cells, hit["peak_step"]], hit


def _write_csv(file: TextIO, found: TopK, train: Store, query: Store) -> None:
    from stepinfluence.display.words import harmless

    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for cells, _ in _lines(found, train, query):
        writer.writerow(["" if c is None else repr(c) if isinstance(c, float) else harmless(c) for c in cells])


def _write_parquet(path: Path, found: TopK, train: Store, query: Store) -> None:
    import pyarrow
    from pyarrow import parquet

    from stepinfluence.display.words import one_type
    from stepinfluence.files import hand_out

    lines = list(_lines(found, train, query))
    columns: dict[str, Any] = {name: [cells[k] for cells, _ in lines] for k, name in enumerate(COLUMNS)}
    for name in ("query_id", "train_id"):
        columns[name] = one_type(columns[name])
    columns = {
        name: [c.encode("utf-8", "backslashreplace").decode() if isinstance(c, str) else c for c in column]
        for name, column in columns.items()
    }
    columns["trajectory"] = [hit["trajectory"] for _, hit in lines]
    hand_out(path, lambda made: parquet.write_table(pyarrow.table(columns), made))
