"""``scores``: the influence of every row on every query and step, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepinfluence.attribution.curvature import Choice, Damping
from stepinfluence.attribution.result import Influence
from stepinfluence.attribution.space import Parameters
from stepinfluence.files import write_atomically
from stepinfluence.progress import tqdm
from stepinfluence.search.question import Question, Steps, ask
from stepinfluence.search.scan import score_blocks
from stepinfluence.search.sources import Rows


def scores(
    train: Rows,
    query: Rows,
    *,
    out: str | Path | None = None,
    etas: float | Sequence[float] | None = None,
    parameters: Parameters = None,
    steps: Steps = None,
    curvature: Choice = "none",
    damping: Damping | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Influence:
    """Influence of every training row on every query, by query step, summed over checkpoints (eqs. 5 and 7).

    Args:
        out: a ``.npy`` file ``(n_train, n_query, steps)`` float32 to write the scores to, block by block, in bounded
            memory; the result's ``sdi`` is then that file, memory-mapped. In memory if not given. It appears when it
            is whole, and replaces one that is there.
        steps: only these steps of the queries (0-based).
        train, query, etas, parameters, curvature, damping, device, progress: as for :func:`top_k`.

    Returns:
        :class:`~stepinfluence.Influence`. Rows and columns of examples that failed are NaN.

    Raises:
        FeatureMismatchError, StoreError, ValueError, TypeError: as for :func:`top_k`; the file could not be written.
    """
    question = ask(
        train,
        query,
        etas=etas,
        parameters=parameters,
        steps=steps,
        curvature=curvature,
        damping=damping,
        device=device,
    )
    shape = (len(question.train), len(question.query_ids), len(question.ranked))
    if out is None:
        sdi = torch.empty(shape, dtype=question.vectors[0].dtype)
        first = 0
        for block in _blocks(question, progress=progress):
            sdi[first : first + len(block)] = block
            first += len(block)
    else:
        path = Path(out)
        if path.suffix != ".npy":
            raise ValueError(f"out: got {str(out)!r}; give a file name that ends in .npy")

        def fill(aside: Path) -> None:
            # Written rather than mapped: pages of a mapped file would count as this process's memory.
            with aside.open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for block in _blocks(question, progress=progress):
                    file.write(block.float().contiguous().numpy().data)

        write_atomically(path, fill)
        sdi = torch.from_numpy(np.load(path, mmap_mode="c"))
    return Influence(
        sdi,
        "query",
        question.train.ids(),
        question.query_ids,
        question.etas,
        query_lengths=question.lengths() if question.ranked == tuple(range(question.steps)) else None,
    )


def _blocks(question: Question, *, progress: bool) -> Iterator[Tensor]:
    """Scores ``(r, Q, steps)`` of all rows in order."""
    vectors = tuple(v[:, list(question.ranked)].flatten(0, 1) for v in question.vectors)
    silent = torch.from_numpy(~question.valid)
    shape = (len(question.query_ids), len(question.ranked))
    rows = len(question.train)
    with torch.no_grad(), tqdm(total=rows, desc="scores", unit="row", delay=2, disable=not progress) as bar:
        for block in score_blocks(question, vectors):
            block = block.view(len(block), *shape).cpu()
            block[:, silent] = torch.nan
            yield block
            bar.update(len(block))
