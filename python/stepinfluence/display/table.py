"""The training examples that lead a query's list, as a table that prints and draws itself."""

from __future__ import annotations

import html
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from stepinfluence.display.style import HARMFUL, HELPFUL
from stepinfluence.display.words import peak_step, short, signed
from stepinfluence.extras import needed

if TYPE_CHECKING:
    import pandas

TEXT_CHARACTERS, BARS = 60, 32
"""Most characters of an example's text, and most bars of a trajectory, in a table."""


@dataclass(frozen=True)
class Hit:
    """A training example's influence on a query.

    Attributes:
        row, id, text: of the training example; no text where none is known.
        score: what it is ranked by: the sum over the ranked steps.
        trajectory: ``(steps,)`` influence by loop steps: those that were taken, so not as many in every hit.
        estimate: the score from the sketches, where ``score`` is exact.
    """

    row: int
    id: Hashable
    text: str | None
    score: float
    trajectory: NDArray[np.float32]
    estimate: float | None = None

    @property
    def total(self) -> float:
        """Influence summed over all steps."""
        return float(self.trajectory.sum())

    @property
    def peak_step(self) -> int:
        """1-based step at which the influence is farthest from zero."""
        return peak_step(self.trajectory)

    @property
    def label(self) -> str:
        """What a chart calls it: its text, or else its id."""
        return short(str(self.id) if self.text is None else self.text, 24)


class Hits(Sequence[Hit]):
    """Training examples by influence on one query, first the one that was asked for most: a sequence of :class:`Hit`.

    Printed, a table; in a notebook, one with trajectories drawn in it.

    Attributes:
        title: what they are, in a line.
    """

    def __init__(self, hits: Sequence[Hit], title: str) -> None:
        self._hits = tuple(hits)
        self.title = title

    @overload
    def __getitem__(self, place: int) -> Hit: ...

    @overload
    def __getitem__(self, place: slice) -> Hits: ...

    def __getitem__(self, place: int | slice) -> Hit | Hits:
        return Hits(self._hits[place], self.title) if isinstance(place, slice) else self._hits[place]

    def __len__(self) -> int:
        return len(self._hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self._hits)

    @property
    def rows(self) -> list[int]:
        """Their row numbers."""
        return [hit.row for hit in self]

    @property
    def ids(self) -> list[Hashable]:
        return [hit.id for hit in self]

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each: row, id, text, score, peak_step, and ``step_1`` ... by loop steps (NaN: not taken).

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        with needed("notebook"):
            import pandas

        frame: pandas.DataFrame = pandas.DataFrame(
            {
                "row": self.rows,
                "id": self.ids,
                "text": [hit.text for hit in self],
                "score": [hit.score for hit in self],
                "peak_step": [hit.peak_step for hit in self],
            }
            | step_columns(padded([hit.trajectory for hit in self]))
        )
        return frame

    @property
    def _most(self) -> float:
        return max((float(np.abs(hit.trajectory).max(initial=0.0)) for hit in self), default=0.0)

    @property
    def _steps(self) -> int:
        return max((len(hit.trajectory) for hit in self), default=1)

    def __repr__(self) -> str:
        from stepinfluence.display.bars import bars  # needs rich, which not every GPU machine has

        head = ("", "row", "id", "score", "peak", "steps", "text")
        lines: list[tuple[str, ...]] = [head]
        each = -(-self._steps // BARS)
        for place, hit in enumerate(self, 1):
            drawn = bars(hit.trajectory, self._most, each=each).plain
            text = "" if hit.text is None else short(hit.text, TEXT_CHARACTERS)
            cells = (str(place), str(hit.row), short(str(hit.id), 24), signed(hit.score), f"step {hit.peak_step}")
            lines.append((*cells, drawn, text))
        if all(hit.text is None for hit in self):
            lines = [line[:-1] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, *rows])

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.title)}</b></p>{self.html_rows()}"

    def html_rows(self) -> str:
        """The table without its title."""
        with_text = any(hit.text is not None for hit in self)
        head = ["", "row", "id", "score", "peak", "by loop step", *(["text"] if with_text else [])]
        body = []
        for place, hit in enumerate(self, 1):
            cells = [
                str(place),
                str(hit.row),
                html.escape(short(str(hit.id), 24)),
                signed(hit.score),
                f"step {hit.peak_step}",
                sparkline(hit.trajectory, self._most, steps=self._steps),
            ]
            if with_text:
                text = "" if hit.text is None else short(hit.text, TEXT_CHARACTERS)
                cells.append(f'<code style="white-space:pre">{html.escape(text)}</code>')
            body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        titles = "".join(f"<th>{name}</th>" for name in head)
        return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def sparkline(
    trajectory: NDArray[Any], most: float, *, steps: int | None = None, width: int = 160, height: int = 28
) -> str:
    """A trajectory as bars in an inline SVG: up and blue where it helps, down and orange where it harms.

    Args:
        trajectory: ``(steps,)``.
        most: the magnitude of a full bar.
        steps: that there is room for, so that trajectories of several lengths have one scale; its own if not given.
    """
    count, middle = max(1, len(trajectory) if steps is None else steps), height / 2
    step = width / count
    parts = [f'<line x1="0" x2="{width}" y1="{middle:g}" y2="{middle:g}" stroke="#9a9a9a" stroke-width="0.5"/>']
    for k, value in enumerate(np.asarray(trajectory, dtype=np.float64)):
        # A square root, as in a terminal: steps a tenth as strong as the strongest can still be seen.
        size = min(1.0, abs(float(value)) / most) ** 0.5 * (middle - 1) if most > 0 else 0.0
        top = middle - size if value >= 0 else middle
        parts.append(
            f'<rect x="{k * step + 0.1 * step:.2f}" y="{top:.2f}" width="{0.8 * step:.2f}" height="{size:.2f}" '
            f'fill="{HELPFUL if value >= 0 else HARMFUL}"><title>step {k + 1}: {signed(float(value))}</title></rect>'
        )
    return f'<svg width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'


def padded(trajectories: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Trajectories of several lengths as one array ``(rows, steps)``, NaN beyond the end of each."""
    steps = max((len(one) for one in trajectories), default=0)
    out = np.full((len(trajectories), steps), np.nan, dtype=np.result_type(np.float32, *trajectories))
    for row, one in zip(out, trajectories, strict=True):
        row[: len(one)] = one
    return out


def step_columns(trajectories: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """``(rows, steps)`` as columns ``step_1`` ... of a data frame."""
    return {f"step_{k + 1}": trajectories[:, k] for k in range(trajectories.shape[1])}
