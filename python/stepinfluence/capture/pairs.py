"""Exact influence of pairs of examples, from what the backward pass has at hand: no gradient of a model is kept.

For a linear layer the gradient of an example is ``sum_l delta_l (x) a_l`` over its tokens (and loop steps). The
*factors* ``a`` and ``delta`` of both sides are kept, and the inner product is taken parameter by parameter, by
whichever way costs fewer multiplications:

* pairs of tokens, ``sum_{l,l'} (delta_l . delta'_l') (a_l . a'_l')``: no gradient exists at any time
  (:func:`sdi_kernels.pairwise_linear_influence`);
* the gradients of one parameter of a few examples, which are dropped at once.

Uses that are not linear (vectors, gains of normalisations, lookups) are kept as per-example gradients of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sdi_kernels import pairwise_linear_influence
from stepinfluence.attribution.features import FeatureBuilder
from stepinfluence.attribution.preconditioners import Elementwise, Factored
from stepinfluence.capture import session
from stepinfluence.capture.body.batches import usable
from stepinfluence.capture.body.sources import Piece, Source
from stepinfluence.capture.body.targets import Target
from stepinfluence.capture.owners.rows import Use
from stepinfluence.capture.recording.dense import DenseSink
from stepinfluence.capture.sketched import Capture
from stepinfluence.capture.sketched_run import SketchedRun

PairRoute: TypeAlias = Literal["auto", "tokens", "gradients"]
ROUTES: tuple[str, ...] = get_args(PairRoute)

GRADIENT_BYTES = 64 << 20
"""Gradients of one parameter that are held at a time, on each side, where that is the cheaper way; at least one."""


@dataclass
class ParameterGradient:
    """Gradients of one parameter, seen as a matrix ``(R, C)``, of the B examples of a batch: the sum of all parts.

    Attributes:
        rows: factors on the output side, ``(B, L, R)`` each.
        columns: factors on the input side, ``(B, L, C)`` each.
        dense: ``(B, R, C)``, what has no factors; or None.
    """

    rows: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    dense: Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(r.shape[1] for r in self.rows)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.rows
        yield from self.columns
        if self.dense is not None:
            yield self.dense

    def active(self) -> Tensor:
        """``(B,)`` bool: which examples have a gradient that is not zero."""
        found = [(r != 0).any(2) & (c != 0).any(2) for r, c in zip(self.rows, self.columns, strict=True)]
        found += [] if self.dense is None else [(self.dense != 0).flatten(1)]
        return torch.cat(found, 1).any(1)

    def matrices(self, some: slice, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The gradients of some examples, ``(n, R, C)``."""
        count = next(len(t[some]) for t in self.tensors())
        device = next(t.device for t in self.tensors())
        total = torch.zeros(count, *shape, dtype=dtype, device=device)
        if self.dense is not None:
            total += self.dense[some]
        for rows, columns in zip(self.rows, self.columns, strict=True):
            total.baddbmm_(rows[some].to(dtype).transpose(1, 2), columns[some].to(dtype))
        return total


@dataclass
class BatchGradients:
    """Everything kept of one batch.

    Attributes:
        size, steps: examples of the batch, and loop steps they ran.
        per_step: whether gradients are kept by step, or for all steps together (under step 0).
        parts: by (parameter, step).
        ids: of the examples.
        lengths: ``(size,)`` int64: the last step (1-based) that each example's loss depends on; None unless by step.
    """

    size: int
    steps: int
    per_step: bool
    ids: tuple[Hashable, ...]
    parts: dict[tuple[Target, int], ParameterGradient] = field(default_factory=dict)
    lengths: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for part in self.parts.values() for t in part.tensors())

    def of(self, target: Target) -> dict[int, ParameterGradient]:
        """A parameter's gradients by step."""
        return {step: part for (owner, step), part in self.parts.items() if owner is target}


class FactorRecorder(DenseSink):
    """Keeps the factors of the gradients of one backward pass, where a sketching recorder would sketch them."""

    def __init__(self, kept: BatchGradients, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._kept = kept

    def _part(self, target: Target, step: int) -> ParameterGradient:
        return self._kept.parts.setdefault((target, step if self._kept.per_step else 0), ParameterGradient())

    def linear(self, source: Source, use: Use, activations: Tensor, grad: Tensor) -> None:
        piece = source.piece
        if piece is None or piece.dim != 2 or piece.target.parameter.dim() < 2:
            super().linear(source, use, activations, grad)
            return
        a, first = use.rows(activations.to(grad.dtype))
        g, _ = use.rows(grad)
        rows, columns = (a, g) if piece.transposed else (g, a)
        part, shape = self._part(piece.target, use.step), piece.target.matrix_shape
        part.rows.append(_of_all(_spread(rows, piece.rows, shape[0]), first, self._kept.size))
        part.columns.append(_of_all(_spread(columns, piece.columns, shape[1]), first, self._kept.size))

    def add(self, piece: Piece, step: int, matrices: Tensor, first: int) -> None:
        part = self._part(piece.target, step)
        if part.dense is None:
            part.dense = matrices.new_zeros(self._kept.size, *piece.target.matrix_shape, dtype=self.dtype)
        place = part.dense[first : first + len(matrices)]
        rows, columns = piece.rows, piece.columns
        view = place[:, rows.start : rows.stop : rows.step, columns.start : columns.stop : columns.step]
        view += matrices.transpose(1, 2) if piece.transposed else matrices


def _of_all(values: Tensor, first: int, size: int) -> Tensor:
    """Factors of some examples ``(n, L, d)`` in their places among ``size``, zero for the others."""
    if len(values) == size:
        return values
    full = values.new_zeros(size, *values.shape[1:])
    full[first : first + len(values)] = values
    return full


def _spread(values: Tensor, index: range, size: int) -> Tensor:
    """Features of a piece ``(B, L, len(index))`` in their places among all ``size``, zero elsewhere."""
    if len(index) == size and index.step == 1:
        return values
    full = values.new_zeros(*values.shape[:-1], size)
    full[..., index.start : index.stop : index.step] = values
    return full


class PairCapture:
    """Keeps gradients of batches in factors, and takes inner products of two such batches.

    Args:
        capture: whose model, body, loop and metric count, as they are now; its sketches play no part.
        route: ``"auto"``, or always one of the two ways of the module's text.
        parameters: the names of those that count; None for all.

    Raises:
        ValueError: an unknown route.
        UnsupportedUseError: as for ``Capture.space``.
        BodyError: the model is sharded over processes.
    """

    def __init__(self, capture: Capture, *, route: PairRoute = "auto", parameters: Sequence[str] | None = None) -> None:
        if route not in ROUTES:
            raise ValueError(f"route: got {route!r}; use one of {', '.join(map(repr, ROUTES))}")
        capture.sharding.refuse("exact influence of pairs")
        self._capture = capture
        self._route = route
        self._targets = [t for t in capture.targets if parameters is None or t.name in parameters]
        self._space = capture.space()
        self._roots = capture.sketching.roots
        self._run: SketchedRun | None = None

    def record(
        self,
        batch: Any,
        loss_fn: session.LossFn,
        ids: Sequence[Hashable] | None,
        index: int,
        *,
        per_step: bool,
        first: int = 0,
    ) -> BatchGradients:
        """The gradients of a batch; run within :func:`~stepinfluence.capture.session.isolated`.

        Args:
            batch, loss_fn, ids: as for ``Capture.featurize``.
            index: position of the batch, for the random state.
            per_step: keep loop steps apart.
            first: number of the first example, where ``ids`` are not given.

        Raises:
            LossError, BodyError, UnsupportedUseError, LayoutError: as ``Capture.featurize`` does.
        """
        run = self._run
        if run is None or run.loss_fn is not loss_fn:
            run = self._run = self._capture.begin(loss_fn, self._space)
        with session.one_batch(self._capture.model):
            return self._record(run, usable(batch), ids, index, per_step, first)

    def _record(
        self,
        run: SketchedRun,
        batch: Any,
        ids: Sequence[Hashable] | None,
        index: int,
        per_step: bool,
        first: int,
    ) -> BatchGradients:
        capture = self._capture
        one = capture.tapped.forward(batch, run.loss_fn, ids, index, reduced=run.reduced)
        size = len(one.losses)
        given = tuple(ids) if ids is not None else tuple(range(first, first + size))
        kept = BatchGradients(size, one.steps, per_step, given)
        one.backward(FactorRecorder(kept, capture.dtype))
        told = one.told
        del one
        if run.verifying and size > 1 and not run.checked.covers(told):
            # Whether examples are told apart is seen on sketches, as when featurizing.
            builder = FeatureBuilder(capture.width, capture.dtype, capture.device, per_step=True, expected=size)
            run.featurize_batch(builder, batch, ids, index)
        if per_step:
            kept.lengths = torch.zeros(size, dtype=torch.int64)
            for (_, step), part in kept.parts.items():
                kept.lengths = torch.maximum(kept.lengths, part.active().cpu() * (step + 1))
        wanted = {id(t) for t in self._targets}
        kept.parts = {key: part for key, part in kept.parts.items() if id(key[0]) in wanted}
        for part in kept.parts.values():
            for tensor in part.tensors():
                session.check_features(tensor.flatten(1), given)
        return kept

    def influence(self, train: BatchGradients, query: BatchGradients, wanted: Tensor | None = None) -> Tensor:
        """``(train.size, query.size, query.steps)``: inner products of each train example's gradient, summed over
        its steps, with each query's gradient at each of its steps.

        Args:
            train: kept with ``per_step=False``.
            query: kept with ``per_step=True``; without, all its steps together stand under the first.
            wanted: ``(train.size, query.size)`` bool: pairs that are needed; others may be zero.
        """
        device = self._capture.device
        out = torch.zeros(train.size, query.size, query.steps, dtype=self._capture.dtype, device=device)
        if not out.numel() or (wanted is not None and not bool(wanted.any())):
            return out
        with torch.no_grad():
            for target in self._targets:
                left, right = train.of(target).get(0), query.of(target)
                if left is None or not right:
                    continue
                if self._by_tokens(target, left, right, wanted, out.shape):
                    self._add_by_tokens(target, left, right, wanted, out)
                else:
                    self._add_by_gradients(target, left, right, out)
        return out

    def _by_tokens(
        self,
        target: Target,
        left: ParameterGradient,
        right: dict[int, ParameterGradient],
        wanted: Tensor | None,
        shape: Sequence[int],
    ) -> bool:
        """Whether to go by pairs of tokens: possible with factors only, chosen where it takes fewer products."""
        possible = left.dense is None and all(p.dense is None for p in right.values())
        if not possible or isinstance(self._roots.get(target.name), Elementwise):
            return False
        if self._route != "auto":
            return self._route == "tokens"
        trains, queries, steps = shape
        pairs = trains * queries if wanted is None else int(wanted.sum())
        rows, columns = target.matrix_shape
        asked = sum(p.tokens for p in right.values())
        by_tokens = pairs * left.tokens * asked * (rows + columns)
        by_gradients = (trains * left.tokens + queries * asked + trains * queries * steps) * rows * columns
        return by_tokens < by_gradients

    def _add_by_tokens(
        self,
        target: Target,
        left: ParameterGradient,
        right: dict[int, ParameterGradient],
        wanted: Tensor | None,
        out: Tensor,
    ) -> None:
        root = self._roots.get(target.name)
        g, a = torch.cat(left.rows, 1), torch.cat(left.columns, 1)
        if isinstance(root, Factored):  # both sides are multiplied by it: one by its square is the same
            g, a = g.to(out.dtype) * root.rows.square(), a.to(out.dtype) * root.columns.square()
        for query in range(out.shape[1]):
            chosen = None if wanted is None else wanted[:, query].nonzero().flatten().to(g.device)
            if chosen is not None and not len(chosen):
                continue
            some_g, some_a = (g, a) if chosen is None else (g[chosen], a[chosen])
            for step, part in right.items():
                for rows, columns in zip(part.rows, part.columns, strict=True):
                    one_g, one_a = (t[query].expand(len(some_g), -1, -1) for t in (rows, columns))
                    found = pairwise_linear_influence(some_a, some_g, one_a, one_g)
                    out[slice(None) if chosen is None else chosen, query, step] += found.to(out.dtype)

    def _add_by_gradients(
        self, target: Target, left: ParameterGradient, right: dict[int, ParameterGradient], out: Tensor
    ) -> None:
        shape = target.matrix_shape
        some = max(1, GRADIENT_BYTES // (out.element_size() * max(1, math.prod(shape))))
        root = self._roots.get(target.name)
        for start in range(0, out.shape[0], some):
            ours = left.matrices(slice(start, start + some), shape, out.dtype)
            if root is not None:
                ours *= root.as_matrix().square()
            flat = ours.flatten(1)
            for step, part in right.items():
                for first in range(0, out.shape[1], some):
                    theirs = part.matrices(slice(first, first + some), shape, out.dtype).flatten(1)
                    out[start : start + some, first : first + some, step] += flat @ theirs.T
