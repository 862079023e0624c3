"""The state of an influence over a training, read from a checkpoint: looked at before anything is changed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepinfluence.attribution.preconditioners import Elementwise, Preconditioner
from stepinfluence.attribution.tally import Tally
from stepinfluence.capture.sketched import Capture
from stepinfluence.errors import CheckpointError, FeatureMismatchError, StepInfluenceError

FORMAT = 3
"""Of saved states."""


@dataclass(frozen=True)
class Saved:
    """What :meth:`.TrainingInfluence.state_dict` gives.

    Attributes:
        counts: updates made, of these not scored, not seen and skipped, and refreshes of the queries.
        epoch, age: the present epoch, and how many updates ago the queries were featurized.
        rows: ids and content of the queries; None before they were first featurized.
        tally: what was scored; None before that.
        queries: ``(Q * steps, D)``; None where they are due to be featurized.
        losses: ``(Q,)``, of the queries.
        roots: the optimizer's metric that the queries are under; None for the plain one, or where they are due.
        moment: where the training was (:func:`.updates.moment_of`).
    """

    counts: tuple[int, int, int, int, int]
    epoch: int
    age: int
    rows: tuple[tuple[Hashable, ...], tuple[int, ...]] | None
    tally: Tally | None
    queries: Tensor | None
    losses: Tensor | None
    roots: Preconditioner | None
    moment: dict[str, str]

    @classmethod
    def of(cls, state: Mapping[str, Any], kind: Mapping[str, Any], capture: Capture) -> Saved:
        """Read a state.

        Args:
            kind: what must be the same.
            capture: that features are made with.

        Raises:
            CheckpointError: it is no such state, or its parts do not fit together.
            FeatureMismatchError: of other sketches or settings (names them).
        """
        try:
            if state["format"] != FORMAT:
                raise CheckpointError(f"state: got format {state['format']!r}, this version reads {FORMAT}")
            was = state["kind"]
            other = [name for name in sorted(kind.keys() | was.keys()) if kind.get(name) != was.get(name)]
            if other:
                raise FeatureMismatchError(
                    f"state: it was saved with another {', '.join(other)}; begin with the same settings and sketches"
                )
            made, unscored, unseen, skipped, refreshes = (int(n) for n in state["counts"])
            rows, roots = state["rows"], state["roots"]
            found = cls(
                counts=(made, unscored, unseen, skipped, refreshes),
                epoch=int(state["epoch"]),
                age=int(state["age"]),
                rows=None if rows is None else (tuple(rows[0]), tuple(int(n) for n in rows[1])),
                tally=None if state["tally"] is None else Tally.from_state(state["tally"]),
                queries=state["queries"],
                losses=state["losses"],
                roots=None if roots is None else {name: Elementwise(root) for name, root in roots.items()},
                moment={name: str(state["saved_with"][name]) for name in ("weights", "moments")},
            )
            if not found._fits(capture, metric=str(kind["metric"])):
                raise ValueError("its parts do not fit together")
        except StepInfluenceError:
            raise
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"state: not a TrainingInfluence's ({type(error).__name__}: {error})") from error
        return found

    def _fits(self, capture: Capture, *, metric: str) -> bool:
        """Whether all is of one training."""
        tally, refreshes = self.tally, self.counts[-1]
        if min(*self.counts, self.epoch, self.age) < 0 or self.counts[0] < sum(self.counts[1:4]):
            return False
        if tally is None or self.rows is None or self.losses is None:
            began = (tally, self.rows, self.losses, self.queries, self.roots) != (None,) * 5
            return not began and not refreshes
        count = len(tally.query_ids)
        of_targets = {target.name: target.parameter.shape for target in capture.targets}
        return (
            refreshes > 0
            and self.rows[0] == tally.query_ids
            and self.losses.shape == (count,)
            and len(tally.updates()) <= self.counts[0]
            and (self.queries is None or self.queries.shape == (count * tally.steps, capture.width))
            and (self.roots is not None) == (self.queries is not None and metric != "sgd")
            and (self.roots is None or {n: r.tensors[0].shape for n, r in self.roots.items()} == of_targets)
        )
