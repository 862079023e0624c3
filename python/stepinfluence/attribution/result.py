"""Step-decomposed influence as a result: scores, with tables and figures to look at them."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepinfluence.arguments import boolean, non_negative_int, one_of, positive_int
from stepinfluence.attribution.depth import AXES, Align, align_steps, axis_places
from stepinfluence.display.table import Hit, Hits, padded, step_columns
from stepinfluence.display.words import one_type, short, top_rows
from stepinfluence.extras import needed

if TYPE_CHECKING:
    import pandas
    import pyarrow

Decompose: TypeAlias = Literal["query", "train", "both"]
Backend: TypeAlias = Literal["matplotlib", "plotly"]
Texts: TypeAlias = Mapping[Any, str] | Sequence[str | None]
"""Texts of examples: by id, or one for each row."""

SHOWN_QUERIES, SHOWN_ROWS = 3, 5
"""How much of the scores a notebook shows where nothing else was asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class Influence:
    """Influence of N training examples on Q queries, summed over checkpoints.

    Attributes:
        sdi: ``(N, Q, steps)``: by query step (eq. 7) or by training step (eq. 8), as ``decompose`` says;
            ``(N, Q, train steps, query steps)`` for ``decompose="both"`` (eq. 9). Zero at steps that an example did not
            take; tables and figures leave these out.
        decompose: which side's loop steps the trailing axes are.
        train_ids, query_ids: ids of the rows and columns.
        etas: learning-rate weight of each checkpoint.
        energies: ``(K, Q)``: absolute influence by checkpoint, summed over examples and steps; None where several
            checkpoints were added up by one call of :func:`influence`.
        train_texts, query_texts: one for each row and column; empty unless given by :meth:`with_texts`.
        train_lengths, query_lengths: ``(N,)``, ``(Q,)`` int64: the last loop step (1-based) that an example's loss
            depends on, at any checkpoint; None where a side is not decomposed by step, or it is not known.
    """

    sdi: Tensor
    decompose: Decompose
    train_ids: tuple[Hashable, ...]
    query_ids: tuple[Hashable, ...]
    etas: tuple[float, ...]
    energies: Tensor | None = None
    train_texts: tuple[str | None, ...] = ()
    query_texts: tuple[str | None, ...] = ()
    train_lengths: Tensor | None = None
    query_lengths: Tensor | None = None

    @property
    def shares(self) -> Tensor | None:
        """Each checkpoint's share ``(K, Q)`` of a query's absolute influence: one near 1 owns the sum."""
        if self.energies is None:
            return None
        total = self.energies.sum(0)
        return self.energies / total.where(total > 0, total.new_ones(()))

    @property
    def tracin(self) -> Tensor:
        """TracIn ``(N, Q)``: the sum over steps (eq. 6)."""
        return self.sdi.flatten(2).sum(2)

    def energy(self) -> Tensor:
        """SDI energy ``(Q, steps)``: sum over training examples of the absolute step influence (paper, D.3); zero at
        steps that were not taken."""
        self._one_step_axis("energy")
        return self.sdi.abs().sum(0)

    def aligned(self, align: Align = "start", *, bins: int | None = None) -> Tensor:
        """Influence by step on an axis that examples of different depth share, NaN where one has no such step.

        Args:
            align, bins: as for :func:`~stepinfluence.align_steps`: steps counted from the start, from the end, or by
                share of an example's steps.

        Returns:
            ``(N, Q, steps)``, for ``"share"`` ``(N, Q, bins)``.

        Raises:
            ValueError: a result with two step axes, or as for :func:`~stepinfluence.align_steps`.
        """
        self._one_step_axis("aligned")
        return self._aligned(slice(None), align, bins)

    def _aligned(self, columns: slice, align: Align, bins: int | None) -> Tensor:
        sdi = self.sdi[:, columns]
        if self.decompose == "query":
            known = None if self.query_lengths is None else self.query_lengths[columns]
        else:
            known = None if self.train_lengths is None else self.train_lengths.unsqueeze(1)
        return align_steps(sdi, torch.full((1,), sdi.shape[2]) if known is None else known, align, bins=bins)

    def _length(self, row: int, column: int) -> int:
        """Steps that a pair has to show: at least one, of zero where its loss depends on none."""
        known, place = (self.query_lengths, column) if self.decompose == "query" else (self.train_lengths, row)
        return self.sdi.shape[2] if known is None else max(1, int(known[place]))

    def with_texts(self, train: Texts | None = None, query: Texts | None = None) -> Influence:
        """The same scores, with texts of examples for tables and figures.

        Args:
            train, query: a mapping from ids, or one text for each row (column); None leaves what there is.

        Raises:
            ValueError: another number of texts than of examples.
        """
        return replace(
            self,
            train_texts=self.train_texts if train is None else _texts("train", train, self.train_ids),
            query_texts=self.query_texts if query is None else _texts("query", query, self.query_ids),
        )

    def top(self, query: int = 0, k: int = 10, *, step: int | None = None, largest: bool = True) -> Hits:
        """The training examples with the largest (helpful) or smallest (harmful) influence on a query.

        Args:
            query: column, 0-based.
            k: how many.
            step: rank by the influence at this 0-based step instead of the sum over steps.
            largest: False for the most harmful.

        Returns:
            :class:`~stepinfluence.display.table.Hits`: a sequence that prints as a table, with ``rows``, ``ids`` and
            ``to_pandas()``; each has row, id, text, score, trajectory and peak_step (counted from 1).

        Raises:
            TypeError, ValueError: no such column or step, or ``k`` is no positive int.
        """
        self._one_step_axis("top")
        column, k = self._column(query), positive_int("k", k)
        boolean("largest", largest)
        by_step = _numpy(self.sdi[:, column])
        scores = by_step.sum(1) if step is None else by_step[:, self._step(step)]
        order = np.argsort(-scores if largest else scores, kind="stable")[:k]
        what = "Most helpful for" if largest else "Most harmful for"
        where = "" if step is None else f", by loop step {step + 1}"
        return Hits(
            [self._hit(int(row), by_step[row, : self._length(int(row), column)], float(scores[row])) for row in order],
            f"{what} {self._query_name(column)}{where}",
        )

    def plot(self, query: int = 0, k: int = 4, *, backend: Backend = "matplotlib") -> Any:
        """Trajectories over loop steps of the k most helpful and the k most harmful examples of a query.

        Args:
            query: column, 0-based.
            k: how many of each.
            backend: of the figure that is returned: a matplotlib or a plotly ``Figure``. Notebooks show both.

        Raises:
            TypeError, ValueError: as for :meth:`top`.
            ModuleNotFoundError: the library is not installed; the extra ``notebook`` has both.
        """
        self._one_step_axis("plot")
        column, k = self._column(query), positive_int("k", k)
        by_step = _numpy(self.sdi[:, column])
        totals = by_step.sum(1)
        hits = [
            [self._hit(row, by_step[row, : self._length(row, column)], float(totals[row])) for row in rows]
            for rows in top_rows(totals, k)
        ]
        return _figures(backend).trajectories(*hits, f"Influence on {self._query_name(column)}")

    def plot_steps(
        self,
        query: int | None = None,
        *,
        align: Align = "start",
        bins: int | None = None,
        backend: Backend = "matplotlib",
    ) -> Any:
        """The profile over loop steps: influence summed over all training examples, and regardless of sign (paper, D.2
        and D.3); of one query, or the mean over all that have the step.

        Args:
            align, bins: how steps of examples of different depth are put side by side, see :meth:`aligned`.

        Other Args, Raises: as for :meth:`plot` and :meth:`aligned`.
        """
        self._one_step_axis("plot_steps")
        column = None if query is None else self._column(query)
        name = f"the mean of {len(self.query_ids):,} queries" if column is None else self._query_name(column)
        chosen = self._aligned(slice(None) if column is None else slice(column, column + 1), align, bins)
        there = (~chosen.isnan().flatten(0, 1).all(0)).nonzero().flatten().tolist() or [0]
        chosen = chosen[..., there[0] : there[-1] + 1]
        total, energy = _mean_of_sums(chosen), _mean_of_sums(chosen.abs())
        places = axis_places(align, len(total))
        title = f"Influence of all training examples on {name}"
        return _figures(backend).profile(total, energy, title, places=places, axis=AXES[align])

    def heatmap(self, query: int = 0, k: int = 20, *, row: int | None = None, backend: Backend = "matplotlib") -> Any:
        """Influence on a query as colours: the k examples with the largest absolute sums, by loop steps. With
        ``decompose="both"``: training steps down, query steps across, summed over all examples, or of one ``row``.

        Args, Raises: as for :meth:`plot`.
        """
        column, figures = self._column(query), _figures(backend)
        name = self._query_name(column)
        if self.decompose == "both":
            if row is not None and not 0 <= non_negative_int("row", row) < len(self.sdi):
                raise ValueError(f"row: got {row}; there are training rows 0 to {len(self.sdi) - 1}")
            matrix = self.sdi[:, column].sum(0) if row is None else self.sdi[row, column]
            of = "all training examples" if row is None else self._train_name(row)
            if self.query_lengths is not None:
                matrix = matrix[:, : max(1, int(self.query_lengths[column]))]
            if self.train_lengths is not None:
                matrix = matrix[: max(1, int(self.train_lengths.max() if row is None else self.train_lengths[row]))]
            labels = [str(step + 1) for step in range(len(matrix))]
            return figures.heatmap(
                _numpy(matrix), labels, f"Influence of {of} on {name}", "loop step of the query", "of the training side"
            )
        if row is not None:
            raise ValueError("row: goes with decompose='both'; plot() draws single rows")
        by_step = _numpy(self.sdi[:, column])
        rows = [int(r) for r in np.argsort(-np.abs(by_step.sum(1)), kind="stable")[: positive_int("k", k)]]
        labels = [self._train_name(r) for r in rows]
        shown = padded([by_step[r, : self._length(r, column)] for r in rows])
        return figures.heatmap(shown, labels, f"Influence on {name}", "loop step", "training example")

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each pair of training example and query: ids, texts if there are any, ``score`` (the sum over
        steps) and ``step_1`` ... : N * Q lines. Steps that an example did not take are missing (NaN).

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: a result with two step axes.
        """
        with needed("notebook"):
            import pandas

        frame: pandas.DataFrame = pandas.DataFrame(self._columns("to_pandas"))
        return frame

    def to_arrow(self) -> pyarrow.Table:
        """The same table as :meth:`to_pandas` has, by pyarrow; ids that are neither all text nor all integers as text.

        Raises:
            ModuleNotFoundError: pyarrow is not installed.
            ValueError: a result with two step axes.
        """
        with needed("notebook"):
            import pyarrow

        columns = self._columns("to_arrow")
        for name in ("train_id", "query_id"):
            columns[name] = one_type(columns[name])
        return pyarrow.table(columns)

    def _columns(self, what: str) -> dict[str, Any]:
        self._one_step_axis(what)
        n, q = self.sdi.shape[:2]
        columns: dict[str, Any] = {
            "train_id": [i for i in self.train_ids for _ in range(q)],
            "query_id": list(self.query_ids) * n,
        }
        if self.train_texts:
            columns["train_text"] = [text for text in self.train_texts for _ in range(q)]
        if self.query_texts:
            columns["query_text"] = list(self.query_texts) * n
        by_step = _numpy(self.sdi.reshape(n * q, -1))
        return columns | {"score": by_step.sum(1)} | step_columns(_numpy(self.aligned().reshape(n * q, -1)))

    def _hit(self, row: int, trajectory: NDArray[Any], score: float) -> Hit:
        return Hit(row, self.train_ids[row], self.train_texts[row] if self.train_texts else None, score, trajectory)

    def _train_name(self, row: int) -> str:
        return self._hit(row, np.zeros(1), 0.0).label

    def _query_name(self, column: int) -> str:
        text = self.query_texts[column] if self.query_texts else None
        return f"query {short(str(self.query_ids[column]), 24)}" if text is None else f"“{short(text, 40)}”"

    def _column(self, query: int) -> int:
        if not 0 <= non_negative_int("query", query) < len(self.query_ids):
            raise ValueError(f"query: got column {query}; there are columns 0 to {len(self.query_ids) - 1}")
        return query

    def _step(self, step: int) -> int:
        if not 0 <= non_negative_int("step", step) < self.sdi.shape[2]:
            raise ValueError(f"step: got {step}; there are steps 0 to {self.sdi.shape[2] - 1}")
        return step

    def _one_step_axis(self, what: str) -> None:
        if self.decompose == "both":
            raise ValueError(f"{what}: defined for one step axis; compute influence with decompose='query' or 'train'")

    @property
    def _summary(self) -> str:
        n, q, *steps = self.sdi.shape
        by = {"query": "query steps", "train": "training steps", "both": "training × query steps"}[self.decompose]
        of = f"{len(self.etas)} checkpoint{'s' if len(self.etas) != 1 else ''}"
        return f"{n:,} training examples × {q:,} queries × {' × '.join(map(str, steps))} {by}, {of}"

    def __repr__(self) -> str:
        return f"Influence({self._summary})"

    def _repr_html_(self) -> str:
        if self.decompose == "both":
            return f"<p><b>Influence</b>: {self._summary}</p>"
        shown = [self.top(q, SHOWN_ROWS)._repr_html_() for q in range(min(SHOWN_QUERIES, len(self.query_ids)))]
        left = len(self.query_ids) - len(shown)
        more = f"<p>… and {left:,} more queries: <code>top(query)</code>, <code>plot(query)</code></p>" if left else ""
        return f"<p><b>Influence</b>: {self._summary}</p>{''.join(shown)}{more}"


def _texts(side: str, given: Texts, ids: tuple[Hashable, ...]) -> tuple[str | None, ...]:
    if isinstance(given, Mapping):
        return tuple(given.get(i) for i in ids)
    if isinstance(given, str) or len(given) != len(ids):
        got = "a string" if isinstance(given, str) else f"{len(given)} texts"
        raise ValueError(f"{side}: got {got} for {len(ids)} examples; pass one for each, or a mapping from ids")
    return tuple(given)


def _mean_of_sums(values: Tensor) -> NDArray[Any]:
    """``(steps,)`` from ``(N, Q, steps)``: the sum over N, its mean over those of Q that have the step."""
    there = ~values.isnan().all(0)
    return _numpy(values.nansum(0).where(there, torch.nan).nanmean(0).nan_to_num(0.0))


def _numpy(values: Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy()


def _figures(backend: Backend) -> Any:
    """The module that draws; matplotlib and plotly are imported where they are needed."""
    one_of("backend", backend, ("matplotlib", "plotly"))
    with needed("notebook"):
        return importlib.import_module(f"stepinfluence.display.with_{backend}")
