"""What the columns of features mean, and so which features can be compared; read from a store without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from stepinfluence.errors import FeatureMismatchError

Parameters: TypeAlias = str | Sequence[str] | None
"""Names of body parameters, ``*`` and ``?`` allowed; None for all."""


@dataclass(frozen=True)
class Block:
    """Columns ``start:stop`` of a feature row: the features of one parameter of shape ``shape``."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class FeatureSpace:
    """What the columns of a feature row mean. Features can be compared exactly when their spaces are equal.

    Attributes:
        kind: ``"sketch"`` or ``"exact"``.
        blocks: one per body parameter, in the model's order.
        tables: digest of all hash tables (empty for exact features).
        weights: digest of the body's weights: which checkpoint the features were computed at.
        model_weights: digest of all that the model's state dict holds (:func:`stepinfluence.store.model_digest`);
            empty where it is not known, as for features in memory.
        metric: digest of the optimizer's metric that the gradients were multiplied by; empty for the plain gradient.
        curvature: digest of the inverse curvature that a query's features were multiplied by; else empty. Only queries
            have one (:mod:`stepinfluence.attribution.curvature`), and they are compared with plain train features.
    """

    kind: str
    blocks: tuple[Block, ...]
    tables: str
    weights: str
    metric: str = ""
    curvature: str = ""
    model_weights: str = ""

    @property
    def width(self) -> int:
        """D, the length of a feature row."""
        return self.blocks[-1].stop

    @property
    def layout(self) -> str:
        """``"concat"``: each block has columns of its own; ``"sum"``: all blocks were added into the same ones."""
        first, last = self.blocks[0], self.blocks[-1]
        shared = len(self.blocks) > 1 and (first.start, first.stop) == (last.start, last.stop)
        return "sum" if shared and first.stop else "concat"

    def select(self, parameters: Parameters, *, shared_columns: bool = False) -> tuple[Block, ...]:
        """The blocks of some parameters, in the model's order.

        Args:
            parameters: names or patterns, as in ``"blocks.*.weight"``; None for all.
            shared_columns: whether it does not matter that all parameters have the same columns (``sum`` layout).

        Raises:
            ValueError: a name or pattern fits none, there are none, or all parameters share their columns.
        """
        if parameters is None:
            return self.blocks
        if self.layout == "sum" and not shared_columns:
            raise ValueError(
                "parameters: the features are in the sum layout, in which all parameters share their columns; "
                "featurize with layout='concat' to look at some of them"
            )
        patterns = [parameters] if isinstance(parameters, str) else parameters
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"parameters: got {parameters!r}; give names or patterns of body parameters, or None")
        names = [block.name for block in self.blocks]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
                raise ValueError(f"parameters: {pattern!r} fits none of {some}")
        if not patterns:
            raise ValueError("parameters: got an empty list; give names or patterns of body parameters, or None")
        return tuple(block for block in self.blocks if any(fnmatchcase(block.name, pattern) for pattern in patterns))

    def require_equal(self, other: FeatureSpace) -> None:
        """Raise unless features of the two spaces can be compared.

        Raises:
            FeatureMismatchError: says what differs.
        """
        if self.kind != other.kind:
            raise FeatureMismatchError(
                f"query: {other.kind} features cannot be compared with {self.kind} train features; "
                "use one capture for both"
            )
        ours = {b.name: b.shape for b in self.blocks}
        theirs = {b.name: b.shape for b in other.blocks}
        if ours != theirs:
            names = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
            raise FeatureMismatchError(
                f"query: features of other parameters than train's (they differ in {', '.join(names[:3])}); "
                "featurize both with one model and body"
            )
        if self.blocks != other.blocks or self.tables != other.tables:
            raise FeatureMismatchError(
                "query: features made with other sketches than train's; use the same sketch_size, hashing, seed "
                "and layout"
            )
        if self.weights != other.weights:
            raise FeatureMismatchError(
                "query: features computed at other weights than train's; featurize both at the same checkpoint"
            )
        if self.model_weights and other.model_weights and self.model_weights != other.model_weights:
            raise FeatureMismatchError(
                "query: features computed with other weights outside of the body than train's (embeddings, heads or "
                "buffers); featurize both at the same checkpoint"
            )
        if self.metric != other.metric:
            raise FeatureMismatchError(
                "query: features under another metric than train's; featurize both with one preconditioner, and with "
                "the same gradient hooks on parameters"
            )
        if self.curvature:
            raise FeatureMismatchError(
                "train: features were multiplied by a curvature, which belongs to the query side; pass them as they "
                "were featurized"
            )
