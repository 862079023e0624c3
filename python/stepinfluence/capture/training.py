"""Influence over all of a training, without checkpoints: every update is scored as it is made.

An update moves the weights by ``-eta P c sum_b w_b grad(b)``: ``w_b`` is the weight of example ``b`` in the training
loss, ``c`` what the gradient is multiplied by afterwards (clipping, a scaler), ``eta`` the learning rate and ``P`` the
optimizer's metric. To first order it lowers the loss of a query ``z'`` by the sum over ``b`` of
``eta c w_b <P grad(b), grad(z')>``: TracIn (paper, eq. 1) with every update as a checkpoint, each term split over the
query's loop steps (eq. 5).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stepinfluence.arguments import positive_int
from stepinfluence.attribution.alignment import places_of, require_repeatable
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.preconditioners import Preconditioner, from_optimizer
from stepinfluence.attribution.result import Influence
from stepinfluence.attribution.tally import Tally, Updates
from stepinfluence.capture.body.hooks import read_factors
from stepinfluence.capture.inline import Inline, sizes
from stepinfluence.capture.saved import FORMAT, Saved
from stepinfluence.capture.sketched import Capture
from stepinfluence.capture.sketched_run import VERIFIED_SHARE
from stepinfluence.capture.updates import (
    Metric,
    Part,
    gradients,
    last_finite,
    learning_rate,
    metric_of,
    moment_of,
    read_factor,
    require_moment,
    waiting,
)
from stepinfluence.errors import (
    CheckpointError,
    ExampleLossError,
    FeatureMismatchError,
    UnsupportedUseError,
)
from stepinfluence.loaders import IdsOf, LossFn


class TrainingInfluence:
    """Scores every update of a training as it is made, and adds up by example::

        with TrainingInfluence(capture, optimizer, query_loader, loss_fn, refresh_every=16) as influence:
            for batch in loader:
                with influence.batch(batch, ids=batch["id"]) as inline:
                    inline.losses(loss_fn(model, batch)).mean().backward()
                optimizer.step()  # and clipping, a scaler, a schedule, accumulation over several batches
                optimizer.zero_grad()
        influence.result().top(query=0)

    Learning rate and scaling are read at each ``optimizer.step()``: the gradients that the optimizer used must be those
    of the batches times one number. What they are not is refused, so nothing is scored that was not trained on.

    Args:
        capture: from :func:`~stepinfluence.attach`, of the model that is trained.
        optimizer: that trains it; all parameters of the body at one learning rate.
        query: loader of the queries, gone through at every refresh.
        loss_fn: ``loss_fn(model, batch) -> (B,)``, of the queries.
        metric: ``"sgd"``: plain inner products. ``"adam"``: Adam's, of the second moments as they are when the queries
            are featurized; updates before there are any (the first) are not scored, see ``unscored``. None: that of the
            optimizer, if it is torch's SGD, Adam or AdamW.
        refresh_every: k: the queries (and the metric) are taken anew every k updates; 1 is exact.
        query_ids: ``ids(batch)``, as for ``Capture.featurize``.
        per_step: split over the queries' loop steps; False: one number for each pair.
        by_epoch: keep epochs apart; :meth:`begin_epoch` begins another.
        progress: show progress bars for queries.

    Attributes:
        updates_made: optimizer steps since the beginning.
        unscored: of these, how many were made before there was a metric.
        unseen: how many with batches that were not given to :meth:`batch`.
        skipped: how many with gradients that were not finite.
        refreshes: how often the queries were featurized.

    Raises:
        TypeError, ValueError: an argument is not as above; a body parameter is not the optimizer's, or the optimizer
            maximizes; the metric of its kind is not known.
        FeatureMismatchError: the loader of the queries cannot be gone through again.
    """

    def __init__(
        self,
        capture: Capture,
        optimizer: torch.optim.Optimizer,
        query: Iterable[Any],
        loss_fn: LossFn,
        *,
        metric: Metric | None = None,
        refresh_every: int = 1,
        query_ids: IdsOf | None = None,
        per_step: bool = True,
        by_epoch: bool = False,
        progress: bool = False,
    ) -> None:
        if not hasattr(capture, "inline"):
            raise TypeError(f"capture: got {type(capture).__name__}; pass one made by stepinfluence.attach with a body")
        require_repeatable(query, "query", has_ids=query_ids is not None)
        self.capture, self.optimizer, self.metric = capture, optimizer, metric_of(optimizer, metric)
        self.refresh_every = positive_int("refresh_every", refresh_every)
        self.per_step, self.by_epoch = per_step, by_epoch
        self._query, self._loss_fn, self._query_ids, self._progress = query, loss_fn, query_ids, progress
        learning_rate(optimizer, capture.targets)
        self.updates_made = self.unscored = self.unseen = self.skipped = self.refreshes = 0
        self._epoch = self._age = 0
        self._queries: Tensor | None = None  # (Q * steps, D)
        self._losses: Tensor | None = None  # (Q,), of the queries
        self._rows: tuple[tuple[Hashable, ...], tuple[int, ...]] | None = None  # ids and content of the queries
        self._tally: Tally | None = None
        self._parts: list[Part | None] = []  # of the update that is being made; None: gradients not finite
        self._saved_with: dict[str, str] = {}  # of a state that was loaded: where it goes on from; empty: checked
        self._before = capture.preconditioner
        self._roots: Preconditioner | None = None  # of the queries
        self._handle = optimizer.register_step_post_hook(lambda *_: self._updated())

    def __enter__(self) -> TrainingInfluence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Watch the optimizer no longer, and give the capture its own metric again. Results stay."""
        self._handle.remove()
        self.capture.precondition(self._before)

    @contextmanager
    def batch(self, batch: Any, *, ids: Iterable[Hashable]) -> Iterator[Inline]:
        """Around the forward and backward pass of a batch, as :meth:`Capture.inline`, which has the rules.

        Args:
            batch: what the model is run on.
            ids: one hashable per example: examples that come again in later epochs are known by it.

        Errors of ``Capture.inline``, ``featurize`` and ``from_optimizer`` pass through. A batch whose gradients are not
        finite, as with a scaler that skips the update, is no error.
        """
        # A tensor's elements would be tensors, which are hashed by identity.
        given: list[Hashable] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if self._parts and not waiting(self.capture.targets):
            self._parts = []  # dropped without an update
        if self._saved_with:
            require_moment(self.capture.model, self.optimizer, self._saved_with, self.updates_made)
            self._saved_with = {}
        if not self._parts and (self._queries is None or self._age >= self.refresh_every):
            self._refresh()
        inline = self.capture.inline(batch, ids=given, weighted=True)
        with inline:
            yield inline
        try:
            values = inline.features.values
        except ExampleLossError:
            self._parts.append(None)
            return
        scores = None
        if self._queries is not None:
            assert self._tally is not None
            scores = (values @ self._queries.T).view(len(values), -1, self._tally.steps).cpu()
        size = sizes(self.capture.sketching, values)
        self._parts.append(Part(given, scores, values.sum(0), size, inline.tolerance))

    def begin_epoch(self) -> None:
        """Another epoch begins, with the next update.

        Raises:
            ValueError: epochs are not kept apart.
        """
        if not self.by_epoch:
            raise ValueError("begin_epoch: epochs are added up; pass by_epoch=True to keep them apart")
        self._epoch += 1

    def result(self, epoch: int | None = None) -> Influence:
        """Influence over the training so far: a row for each example that was seen, in the order in which they came.

        Args:
            epoch: of this one only, counted from 0.

        Raises:
            ValueError: nothing was scored yet; no such epoch.
        """
        return self._scored().influence(epoch)

    def updates(self) -> Updates:
        """What each update contributed.

        Raises:
            ValueError: nothing was scored yet.
        """
        return self._scored().updates()

    def _scored(self) -> Tally:
        if self._tally is None:
            raise ValueError("result: no update was scored yet; give batches to batch(...) and step the optimizer")
        return self._tally

    def __repr__(self) -> str:
        tally = self._tally
        of = (
            "nothing scored yet" if tally is None else f"{tally.examples:,} examples × {len(tally.query_ids):,} queries"
        )
        others = {"not scored": self.unscored, "not seen": self.unseen, "not finite": self.skipped}
        without = "".join(f", {count:,} {what}" for what, count in others.items() if count)
        return (
            f"TrainingInfluence({self.updates_made:,} updates{without}; {of}; metric {self.metric}; queries every "
            f"{self.refresh_every} updates, {self.refreshes:,} times)"
        )

    # ----------------------------------------------------------------------------------------------------------------
    # An update

    def _refresh(self) -> None:
        """Take the metric and the queries anew, at the weights that the next update begins with."""
        self._queries = None
        if self.metric != "sgd":
            if not any(self.optimizer.state.get(t.parameter) for t in self.capture.targets):
                return  # before the first update
            self._roots = from_optimizer(self.optimizer, self.capture.model, self.metric)
            self.capture.precondition(self._roots)
        # Anew at some refreshes, by count: each verification costs a pass, and a loss does not change its ways.
        verify = None if self.refreshes % round(1 / VERIFIED_SHARE) == 0 else False
        found = self.capture.featurize(
            self._query,
            self._loss_fn,
            per_step=self.per_step,
            ids=self._query_ids,
            progress=self._progress,
            verify=verify,
        )
        factors = read_factors({t.name: t.parameter for t in self.capture.targets})
        for name, factor in factors.items():
            if not bool(((factor == 0) | (factor == 1)).all()):
                raise UnsupportedUseError(
                    f"{name}: a gradient hook scales it, and queries with it, though no update is made of queries; use "
                    "the learning rate, or a mask of 0 and 1"
                )
        found = self._aligned(found)
        self._queries, self._losses = found.values.flatten(0, -2), found.losses
        self._age = 0
        self.refreshes += 1

    def _aligned(self, found: Features) -> Features:
        """The queries in the order of the first refresh, with a step axis.

        Raises:
            FeatureMismatchError: other queries, or another number of loop steps.
        """
        if not self.per_step:
            found = replace(found, values=found.values.unsqueeze(1))
        if self._rows is None:
            self._rows = found.ids, found.content
        places = places_of("query", found.ids, found.content, *self._rows)
        steps = found.values.shape[1]
        if self._tally is None:
            self._tally = Tally(self._rows[0], steps, found.values.dtype, by_epoch=self.by_epoch)
        if steps != self._tally.steps:
            raise FeatureMismatchError(
                f"query: the loop ran {steps} steps before update {self.updates_made}, and {self._tally.steps} at "
                "first; run queries with a fixed depth, or pass per_step=False"
            )
        return found if places is None else found.select(places)

    def _updated(self) -> None:
        """The optimizer has made a step; gradients are as it used them, learning rates, too."""
        parts, self._parts = self._parts, []
        number, age = self.updates_made, self._age
        self.updates_made += 1
        self._age += 1
        if not parts:
            self.unseen += 1
            return
        found, after = gradients(self.capture.targets), last_finite(parts)
        if len(after) < len(parts) and not (after and all(bool(g.isfinite().all()) for _, g in found)):
            self.skipped += 1
            return
        factor = read_factor(self.capture.sketching, after, found, number)
        scores = [part.scores for part in after if part.scores is not None]
        if len(scores) < len(after):
            self.unscored += 1
            return
        assert self._tally is not None
        assert self._losses is not None
        self._tally.add(
            [i for part in after for i in part.ids],
            torch.cat(scores),
            number=number,
            epoch=self._epoch,
            age=age,
            learning_rate=learning_rate(self.optimizer, self.capture.targets),
            factor=factor,
            losses=self._losses,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # States

    def state_dict(self) -> dict[str, Any]:
        """All that a training which is resumed needs, for a checkpoint of its own. Batches of an update that is not
        made yet are not in it, as their gradients are in no checkpoint.

        Raises:
            TypeError: ids that are no text or numbers.
        """
        capture, due = self.capture, self._queries is None or self._age >= self.refresh_every
        roots = self._roots if not due else None
        return {
            "format": FORMAT, "kind": self._kind(), "epoch": self._epoch, "age": self._age, "rows": self._rows,
            "counts": [self.updates_made, self.unscored, self.unseen, self.skipped, self.refreshes],
            "queries": None if due else self._queries, "losses": self._losses,
            "roots": {t.name: roots[t.name].tensors[0] for t in capture.targets} if roots else None,
            "tally": None if self._tally is None else self._tally.state(),
            # Of a state that was loaded, until it goes on.
            "saved_with": self._saved_with or moment_of(capture.model, self.optimizer),
        }  # fmt: skip

    def _kind(self) -> dict[str, Any]:
        """What must be the same where a training goes on."""
        space = self.capture.space()
        return {
            "tables": space.tables, "layout": space.layout, "width": space.width, "metric": self.metric,
            "refresh_every": self.refresh_every, "per_step": self.per_step, "by_epoch": self.by_epoch,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with model and optimizer as they were then. The next batch raises
        ``FeatureMismatchError`` if the model has other weights, or the optimizer other moments: updates in between
        would count twice, or never.

        Raises:
            CheckpointError: it is no such state; nothing has changed then.
            FeatureMismatchError: of other sketches or settings (names them).
        """
        found = Saved.of(state, self._kind(), self.capture)
        if found.roots is not None:
            self.capture.precondition(found.roots)
            self._roots = found.roots
        self.updates_made, self.unscored, self.unseen, self.skipped, self.refreshes = found.counts
        self._epoch, self._age, self._tally, self._rows = found.epoch, found.age, found.tally, found.rows
        self._queries = None if found.queries is None else found.queries.to(self.capture.device)
        self._losses, self._parts, self._saved_with = found.losses, [], found.moment

    def save(self, path: str | Path) -> None:
        """Write :meth:`state_dict` into a file, whole or not at all.

        Raises:
            StoreError: it could not be written.
        """
        content = self.state_dict()
        # It needs safetensors, which a GPU machine may lack.
        from stepinfluence.files import save_torch, write_atomically

        write_atomically(Path(path), lambda aside: save_torch(content, aside))

    def restore(self, path: str | Path) -> None:
        """:meth:`load_state_dict` of a file of :meth:`save`; nothing in it is run.

        Raises:
            CheckpointError, FeatureMismatchError: as for :meth:`load_state_dict`, or the file cannot be read.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what damaged pickles raise is no fixed list
            raise CheckpointError(f"{path}: could not be read ({type(error).__name__})") from error
        self.load_state_dict(state)


Begin: TypeAlias = Callable[[nn.Module, torch.optim.Optimizer], TrainingInfluence]
"""Begins to score a training, once its model and optimizer are made."""
