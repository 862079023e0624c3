"""K-FAC and EK-FAC of a looped body: the Fisher of each weight as a Kronecker product, from what a pass records.

A weight is a matrix ``(R, C)``; the gradient of example n is ``G_n = sum delta a^T`` over the steps and tokens that use
it, ``delta (R,)`` and ``a (C,)``. Its block of the empirical Fisher, ``(1/N) sum vec(G_n) vec(G_n)^T``, is approximated
by ``S (x) A``, with S of the ``delta`` and A of the ``a``. What differs is how the uses that share a weight are treated
(:data:`SHARINGS`; the first and the last of the first three are Eschenhagen et al., arXiv 2311.00636), and what is
taken for the eigenvalues (:data:`FORMS`). Vectors are matrices of one row, for which every treatment gives the Fisher
itself. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from stepinfluence.capture import Capture
from stepinfluence.capture.pairs import PairCapture, ParameterGradient
from stepinfluence.capture.session import isolated
from stepinfluence.evaluation.problem import Problem
from torch import Tensor

Sharing: TypeAlias = Literal["expand", "reduce steps", "reduce", "gradients"]
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
"""``expand``: each step and token a sample of its own. ``reduce steps``: ``delta`` summed and ``a`` averaged over steps
first, each token a sample. ``reduce``: over steps and tokens. ``gradients``: ``E[G G^T] (x) E[G^T G]`` over the trace,
as in Shampoo, which asks nothing of how a gradient came about."""

Form: TypeAlias = Literal["EK-FAC", "K-FAC", "K-FAC, factored"]
FORMS: tuple[Form, ...] = get_args(Form)
"""``EK-FAC``: eigenvalues are the second moments of the gradients in the eigenvectors of ``S (x) A`` (George et al.,
arXiv 1806.03884). ``K-FAC``: products of the eigenvalues of S and A. ``K-FAC, factored``: these, damped as ``(S +
sqrt(l) / p) (x) (A + sqrt(l) p)`` (Martens & Grosse, arXiv 1503.05671), which is a product again: the one form that can
multiply both sides of a gradient before they are sketched."""

Gradients: TypeAlias = Mapping[str, Tensor]
"""``(N, R, C)`` by the parameter's name."""


@dataclass(frozen=True, eq=False)
class Weight:
    """What is recorded of one parameter.

    Attributes:
        gradients: ``(N, R, C)``, summed over steps.
        deltas: ``(N, steps, tokens, R)``; None where a gradient is no sum of products, as of vectors.
        inputs: ``(N, steps, tokens, C)``, or None.
    """

    gradients: Tensor
    deltas: Tensor | None = None
    inputs: Tensor | None = None


def record(capture: Capture, problem: Problem, side: str) -> dict[str, Weight]:
    """Gradients and their factors of all ``"train"`` or ``"query"`` examples, by the parameter's name; exact, the
    capture's sketches play no part.

    Raises:
        ValueError: a weight's uses differ in number between steps or batches (names it).
    """
    pairs, kept, first = PairCapture(capture), [], 0
    with isolated(capture.model, training=False):
        for index, batch in enumerate(problem.batches(side)):
            kept.append(pairs.record(batch, problem.loss, None, index, per_step=True, first=first))
            first += kept[-1].size
    parts = {target: [list(one.of(target).values()) for one in kept] for target in capture.targets}
    with torch.no_grad():
        return {t.name: _joined(t.name, batches, t.matrix_shape) for t, batches in parts.items() if all(batches)}


def _joined(name: str, batches: Sequence[Sequence[ParameterGradient]], shape: tuple[int, int]) -> Weight:
    """One weight's parts by batch and step."""
    whole = slice(None)
    gradients = torch.cat(
        [torch.stack([part.matrices(whole, shape, torch.float64) for part in steps]).sum(0) for steps in batches]
    )
    if any(part.dense is not None for steps in batches for part in steps):
        return Weight(gradients)
    if len({(len(steps), part.tokens) for steps in batches for part in steps}) > 1:
        raise ValueError(f"{name}: is not used equally often in all steps and batches; give examples of one length")
    rows, columns = (
        torch.cat([torch.stack([torch.cat(getattr(part, which), 1) for part in steps], 1) for steps in batches])
        for which in ("rows", "columns")
    )
    return Weight(gradients, rows.double(), columns.double())


def sides(weight: Weight, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """``S (R, R)`` and ``A (C, C)``: their Kronecker product approximates the weight's block of the Fisher. Weights
    that have no factors are treated by their gradients."""
    n = len(weight.gradients)
    d, a = weight.deltas, weight.inputs
    if sharing == "gradients" or d is None or a is None:
        g = weight.gradients
        left, right = torch.einsum("nrc,nsc->rs", g, g) / n, torch.einsum("nrc,nrd->cd", g, g) / n
        trace = float(right.trace())  # of both
        return left, right / trace if trace else right
    if sharing != "expand":
        over = (1, 2) if sharing == "reduce" else (1,)
        d, a = d.sum(over, keepdim=True), a.mean(over, keepdim=True)
    uses = a.shape[1] * a.shape[2]
    d, a = d.flatten(0, 2), a.flatten(0, 2)
    return d.T @ d / n, a.T @ a / (n * uses)


@dataclass(frozen=True, eq=False)
class Basis:
    """Eigenvectors (columns) and eigenvalues, ascending, of S and A."""

    rows: Tensor
    row_values: Tensor
    columns: Tensor
    column_values: Tensor

    @classmethod
    def of(cls, weight: Weight, sharing: Sharing) -> Basis:
        """From what was recorded."""
        left, right = sides(weight, sharing)
        (s, u), (a, v) = torch.linalg.eigh(left), torch.linalg.eigh(right)
        return cls(u, s.clamp(min=0), v, a.clamp(min=0))

    def into(self, gradients: Tensor) -> Tensor:
        """``(n, R, C)`` in the eigenvectors."""
        return self.rows.T @ gradients @ self.columns

    def back(self, coordinates: Tensor) -> Tensor:
        """The inverse of :meth:`into`."""
        return self.rows @ coordinates @ self.columns.T


@dataclass(frozen=True, eq=False)
class Kronecker:
    """An approximation of the Fisher, block by block.

    Attributes:
        form: of the eigenvalues and the damping.
        bases: by the parameter's name.
        values: eigenvalues ``(R, C)`` in them.
    """

    form: Form
    bases: dict[str, Basis]
    values: dict[str, Tensor]

    @classmethod
    def fit(cls, train: Mapping[str, Weight], form: Form, bases: dict[str, Basis]) -> Kronecker:
        """Of the train examples, in given eigenvectors."""
        if form == "EK-FAC":
            values = {name: bases[name].into(one.gradients).square().mean(0) for name, one in train.items()}
        else:
            values = {name: one.row_values[:, None] * one.column_values for name, one in bases.items()}
        return cls(form, bases, values)

    @property
    def numbers(self) -> int:
        """That are kept: eigenvectors and eigenvalues."""
        kept = sum(basis.rows.numel() + basis.columns.numel() for basis in self.bases.values())
        if self.form == "EK-FAC":
            return kept + sum(values.numel() for values in self.values.values())
        return kept + sum(len(basis.row_values) + len(basis.column_values) for basis in self.bases.values())

    def relative(self, damping: float, *, to: Literal["all", "block", "mean"]) -> dict[str, float]:
        """Dampings of the blocks: a number times the largest eigenvalue of all blocks, of each block, or times the mean
        of each block's."""
        if to == "mean":
            return {name: damping * float(values.mean()) for name, values in self.values.items()}
        each = {name: float(values.max()) for name, values in self.values.items()}
        return {name: damping * (max(each.values()) if to == "all" else own) for name, own in each.items()}

    def transform(self, query: Gradients, damping: Mapping[str, float]) -> dict[str, Tensor]:
        """``(F + damping)^-1`` times the query's gradients; zero in blocks that no train example has a part in.

        Args:
            query: ``(n, R, C)`` by name.
            damping: of each block, absolute.
        """
        found = {}
        for name, basis in self.bases.items():
            if not float(self.values[name].max()) > 0:
                found[name] = torch.zeros_like(query[name])
                continue
            found[name] = basis.back(basis.into(query[name]) / self._damped(name, damping[name]))
        return found

    def _damped(self, name: str, damping: float) -> Tensor:
        if self.form != "K-FAC, factored":
            return self.values[name] + damping
        s, a = self.bases[name].row_values, self.bases[name].column_values
        root, p = math.sqrt(damping), math.sqrt(float(a.mean() / s.mean()))
        return (s + root / p)[:, None] * (a + root * p)


def gradients_of(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Without the factors."""
    return {name: weight.gradients for name, weight in weights.items()}


def products(train: Gradients, query: Gradients) -> Tensor:
    """``(n_train, n_query)``: inner products of all blocks, added up."""
    return torch.stack([train[name].flatten(1) @ query[name].flatten(1).T for name in query]).sum(0)
