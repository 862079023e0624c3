"""``manifest.json``: everything about a store that is known before its first row is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepinfluence.attribution.curvature import length
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.errors import StoreError
from stepinfluence.files import canonical, read_sealed, sealed
from stepinfluence.store.checkpoints import StoredCheckpoint
from stepinfluence.store.dtypes import STORE_DTYPES, StoreDtype
from stepinfluence.store.hashes import HASH_FAMILIES, HASH_FORMAT, HashFamily

if TYPE_CHECKING:
    from stepinfluence.capture import Capture, ExactCapture

FORMAT = "sdi-store-2"
MIGRATION = {
    "sdi-store-1": "written by an earlier version, which did not record the weights outside of the body; featurize "
    'again (docs/store.md, "Stores of earlier versions")'
}
"""What to do about stores of formats that are no longer read."""

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 << 20
"""Bytes. A manifest grows with the number of body parameters: a hundred bytes each."""

MAX_ROWS = 1 << 40
MAX_SHARDS = 1 << 22
MAX_CHECKPOINTS = 1 << 12
MAX_STEPS = 1 << 16
MAX_WIDTH = 1 << 34
POSITIVE_SIGN = "positive score = training on the row lowers the query's loss"


@dataclass(frozen=True)
class SketchSpec:
    """How to make the sketches of a store again: sizes by parameter name, hash family, seed, table format."""

    sizes: Mapping[str, int]
    hashing: HashFamily
    seed: int
    hash_format: str = HASH_FORMAT

    @classmethod
    def of(cls, capture: Capture) -> SketchSpec:
        """Of the features that a capture makes."""
        return cls({t.name: t.sketch.m for t in capture.targets}, capture.hashing, capture.seed)


def versions() -> dict[str, str]:
    """Versions of the code that features depend on."""
    import torch

    from sdi_kernels import __version__

    return {
        "stepinfluence": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Manifest:
    """What a store holds. Two stores with equal manifests hold parts of the same thing.

    Attributes:
        checkpoints: in the order of the store's folders; their spaces differ in weights and metric only.
        n_rows: length of the dataset. Row ``r`` of the store is position ``r`` of the dataset.
        shard_rows: rows per shard; the last one may have fewer.
        per_step: rows of ``(steps, D)``, or ``(D,)`` summed over steps.
        steps: loop steps of every example, where they are known to be the same; None if the data decides. Shards of
            per-step stores have the steps of their longest example, and are read padded with zeros to the store's.
        dtype: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``, see :mod:`stepinfluence.store.codecs`.
        sketch: how to make the sketches again; None for exact features.
        loss: what the loss is, in words: it is not the same for answers and for whole sequences.
        model: :func:`model_fingerprint`, or empty.
        project: anything about where the store comes from that JSON can hold: names, paths, options.
        fold: of a folded store: names, etas and weights of the checkpoints that were folded, and the seed.
        versions: of the code; not compared.
    """

    checkpoints: tuple[StoredCheckpoint, ...]
    n_rows: int
    shard_rows: int = 1024
    per_step: bool = False
    steps: int | None = None
    dtype: StoreDtype = "fp32"
    sketch: SketchSpec | None = None
    loss: str = ""
    model: str = ""
    project: Mapping[str, Any] = field(default_factory=dict)
    fold: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=versions, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoints", tuple(self.checkpoints))
        if not 1 <= len(self.checkpoints) <= MAX_CHECKPOINTS:
            raise StoreError(f"checkpoints: got {len(self.checkpoints)}; a store has 1 to {MAX_CHECKPOINTS}")
        first = self.checkpoints[0].space
        for checkpoint in self.checkpoints:
            if not isinstance(checkpoint.name, str) or isinstance(checkpoint.eta, bool | str):
                raise StoreError(
                    f"checkpoints: {_short(checkpoint.name)} has eta {_short(checkpoint.eta)}; give a text and a number"
                )
            if not math.isfinite(checkpoint.eta):
                raise StoreError(f"checkpoints: {checkpoint.name!r} has eta {checkpoint.eta}; give a finite number")
            space = checkpoint.space
            if (space.kind, space.blocks, space.tables) != (first.kind, first.blocks, first.tables):
                raise StoreError(
                    f"checkpoints: {checkpoint.name!r} has other feature columns than {self.checkpoints[0].name!r}; "
                    "featurize all with one capture"
                )
        _check_blocks(first)
        _whole("n_rows", self.n_rows, 0, MAX_ROWS)
        _whole("shard_rows", self.shard_rows, 1, MAX_ROWS)
        if self.n_shards > MAX_SHARDS:
            raise StoreError(f"shard_rows: got {self.shard_rows} for {self.n_rows} rows; at most {MAX_SHARDS} shards")
        if self.steps is not None:
            _whole("steps", self.steps, 0, MAX_STEPS)
        if self.sketch is not None:
            _whole("sketch: seed", self.sketch.seed, -(2**63), 2**64)
        # As JSON gives them back, so that a manifest that was read equals the one that was written.
        object.__setattr__(self, "project", _plain("project", self.project))
        object.__setattr__(self, "fold", None if self.fold is None else _plain("fold", self.fold))
        for name, kind in (("per_step", bool), ("loss", str), ("model", str)):
            if type(getattr(self, name)) is not kind:
                what = "True or False" if kind is bool else "a text"
                raise StoreError(f"{name}: got {_short(getattr(self, name))}; give {what}")
        if self.dtype not in STORE_DTYPES:
            raise StoreError(f"dtype: got {self.dtype!r}; use one of {', '.join(map(repr, STORE_DTYPES))}")

    @classmethod
    def of(
        cls,
        capture: Capture | ExactCapture,
        n_rows: int,
        checkpoints: Sequence[StoredCheckpoint] | None = None,
        **fields: Any,
    ) -> Manifest:
        """The manifest of a store of a capture's features.

        Args:
            capture: what the features are made with; tells the sketch, the model and the columns.
            n_rows: length of the dataset.
            checkpoints: as :attr:`checkpoints`, each from :func:`.checkpoint_of` at its weights; the model's present
                weights with an eta of 1 if not given.
            fields: the other attributes.

        Raises:
            StoreError: a field is not one of those above, or out of range.
        """
        from stepinfluence.capture import Capture
        from stepinfluence.store.models import checkpoint_of, model_fingerprint  # a manifest is read without torch

        given = checkpoints if checkpoints is not None else [checkpoint_of(capture, "present", 1.0)]
        spec = SketchSpec.of(capture) if isinstance(capture, Capture) else None
        described = {"sketch": spec, "model": model_fingerprint(capture.model), **fields}
        return cls(checkpoints=tuple(given), n_rows=n_rows, **described)

    @property
    def space(self) -> FeatureSpace:
        """The space of the first checkpoint; the others' differ in weights and metric."""
        return self.checkpoints[0].space

    @property
    def kind(self) -> str:
        return self.space.kind

    @property
    def layout(self) -> str:
        """``"concat"`` or ``"sum"``."""
        return self.space.layout

    @property
    def width(self) -> int:
        """D', columns of a stored row."""
        return self.space.width

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows that a shard holds."""
        return range(shard * self.shard_rows, min(self.n_rows, (shard + 1) * self.shard_rows))

    @property
    def digest(self) -> str:
        """SHA-256 of all but the code versions and progress, in hex: what ties a shard to its store."""
        return hashlib.sha256(canonical(_described(self))).hexdigest()

    def difference(self, other: Manifest) -> str | None:
        """In words, the first field in which two manifests differ; None if none does."""
        mine, theirs = _described(self), _described(other)
        for name in mine:
            if mine[name] == theirs[name]:
                continue
            for one, two in zip(self.checkpoints, other.checkpoints, strict=False) if name == "checkpoints" else ():
                if one.name == two.name and one.space.weights != two.space.weights:
                    return f"{name}: {one.name} has other weights in the loop body"
                if one.name == two.name and one.space.model_weights != two.space.model_weights:
                    return f"{name}: {one.name} has other weights outside of the loop body"
            return f"{name}: {_short(mine[name])} here, {_short(theirs[name])} there"
        return None

    # ------------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``: the same for equal manifests of one version."""
        content = _described(self)
        for described, checkpoint in zip(content["checkpoints"], self.checkpoints, strict=True):
            if checkpoint.progress:
                described["progress"] = length.plain(checkpoint.progress)
        return sealed({**content, "versions": dict(self.versions)})

    @classmethod
    def read(cls, store: Path) -> Manifest:
        """The manifest of the store in a folder.

        Raises:
            StoreError: there is none, it is damaged, of another format version, or not a store's.
        """
        path = store / MANIFEST
        if not path.is_file():
            raise StoreError(f"{store}: no store here (it has no {MANIFEST}); give the folder that featurizing wrote")
        content = read_sealed(path, MANIFEST_LIMIT)
        found = content.get("format")
        if found != FORMAT:
            known = MIGRATION.get(found, "featurize again") if isinstance(found, str) else "featurize again"
            raise StoreError(f"{path}: its format is {_short(found)}, this version reads {FORMAT!r}: {known}")
        try:
            manifest = _parsed(content)
            same = manifest.to_bytes() == sealed(content)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            detail = f"no field {error}" if type(error) is KeyError else str(error)
            raise StoreError(f"{path}: not a valid manifest ({detail})") from error
        if not same:
            raise StoreError(f"{path}: not a valid manifest (its fields are not those that this version writes)")
        return manifest


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _whole(name: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise StoreError(f"{name}: got {_short(value)}; it must be a whole number from {low} to {high}")
    return value


def _plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"{name}: cannot be written as JSON ({error}); use text, finite numbers, lists and mappings"
        ) from (error)
    return plain


def _check_blocks(space: FeatureSpace) -> None:
    if space.kind not in ("sketch", "exact"):
        raise StoreError(f"kind: got {_short(space.kind)}; use 'sketch' or 'exact'")
    if not space.blocks:
        raise StoreError("blocks: got none; a feature row has at least one")
    names = {block.name for block in space.blocks}
    stop = space.blocks[-1].stop if space.layout == "sum" else 0
    for block in space.blocks:
        start, stop = (0, stop) if space.layout == "sum" else (stop, block.stop)
        _whole(f"blocks: {block.name}: stop", block.stop, start, MAX_WIDTH)
        if (block.start, block.stop) != (start, stop) or len(names) < len(space.blocks):
            raise StoreError(
                f"blocks: {block.name}: columns {block.start} to {block.stop} do not follow the last block's"
            )


def _described(manifest: Manifest) -> dict[str, Any]:
    """A manifest as JSON values, without versions and progress."""
    space, spec = manifest.space, manifest.sketch
    return {
        "format": FORMAT,
        "kind": space.kind,
        "layout": space.layout,
        "dtype": manifest.dtype,
        "per_step": manifest.per_step,
        "steps": manifest.steps,
        "n_rows": manifest.n_rows,
        "shard_rows": manifest.shard_rows,
        "width": space.width,
        "model": manifest.model,
        "sketch": None if spec is None else {**dataclasses.asdict(spec), "sizes": dict(spec.sizes)},
        "tables": space.tables,
        "blocks": [{**dataclasses.asdict(block), "shape": list(block.shape)} for block in space.blocks],
        "checkpoints": [
            {
                "name": c.name,
                "eta": float(c.eta),
                "weights": c.space.weights,
                "model_weights": c.space.model_weights,
                "metric": c.space.metric,
            }
            for c in manifest.checkpoints
        ],
        "fold": None if manifest.fold is None else dict(manifest.fold),
        "loss": manifest.loss,
        "sign": POSITIVE_SIGN,
        "project": dict(manifest.project),
    }


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_short(value)} where text is expected")
    return value


def _parsed(content: Mapping[str, Any]) -> Manifest:
    """The inverse of :func:`_described`. What it takes on trust is caught by writing the result again."""
    blocks = tuple(
        Block(
            _text(block["name"]),
            tuple(_whole("shape", n, 0, 2**62) for n in block["shape"]),
            _whole("start", block["start"], 0, MAX_WIDTH),
            _whole("stop", block["stop"], 0, MAX_WIDTH),
        )
        for block in content["blocks"]
    )
    checkpoints = tuple(
        StoredCheckpoint(
            _text(c["name"]),
            float(c["eta"]),
            FeatureSpace(
                _text(content["kind"]),
                blocks,
                _text(content["tables"]),
                _text(c["weights"]),
                _text(c["metric"]),
                model_weights=_text(c["model_weights"]),
            ),
            length.parsed(c.get("progress", "")),
        )
        for c in content["checkpoints"]
    )
    spec = content["sketch"]
    if spec is not None:
        if spec["hashing"] not in HASH_FAMILIES:
            raise ValueError(f"hashing: got {_short(spec['hashing'])}")
        sizes = {_text(name): _whole("sizes", m, 1, MAX_WIDTH) for name, m in spec["sizes"].items()}
        spec = SketchSpec(sizes, spec["hashing"], spec["seed"], _text(spec["hash_format"]))
    if type(content["per_step"]) is not bool:
        raise TypeError(f"per_step: got {_short(content['per_step'])}")
    return Manifest(
        checkpoints=checkpoints,
        n_rows=content["n_rows"],
        shard_rows=content["shard_rows"],
        per_step=content["per_step"],
        steps=content["steps"],
        dtype=content["dtype"],
        sketch=spec,
        loss=_text(content["loss"]),
        model=_text(content["model"]),
        project=dict(content["project"]),
        fold=None if content["fold"] is None else dict(content["fold"]),
        versions={_text(k): _text(v) for k, v in content["versions"].items()},
    )
