"""``RUN/config.yaml``: everything that determines a run's stores, typed; unknown keys are refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import yaml

from stepinfluence.attribution.curvature.damping import checked
from stepinfluence.attribution.preconditioners import Kind
from stepinfluence.capture.body.targets import Layout
from stepinfluence.errors import ConfigError
from stepinfluence.files import make_folder, read_within, write_bytes
from stepinfluence.store import StoreDtype
from stepinfluence.store.hashes import HashFamily

CONFIG = "config.yaml"
HEADER = "# Repeat with: sdi featurize --config {name}\n# Paths are relative to this file.\n"
SUMMED_SPLIT = "train"
"""The split whose rows are summed over steps unless told otherwise: the side that is searched."""

CONFIG_LIMIT = 16 << 20

MOST_THREADS = 4096
"""More threads than any machine has cores; with many more, starting them ends the process."""

OnFailure: TypeAlias = Literal["stop", "skip"]
CurvatureKind: TypeAlias = Literal["fisher", "block", "source", "none"]
T = TypeVar("T")


@dataclass(frozen=True)
class SplitConfig:
    """How one split is featurized.

    Attributes:
        per_step: one feature row per loop step, or one row summed over steps. None: summed for the split ``train``,
            per step for others.
        dtype: of the stored values.
        batch_size: examples per forward and backward pass. Features depend on it in their last bits.
        shard_rows: examples per shard, the unit of work that is redone after a kill. None: of about 128 MiB.
        threads: torch threads on a CPU. Features depend on it in their last bits. None: torch's.
    """

    per_step: bool | None = None
    dtype: StoreDtype = "fp32"
    batch_size: int = 32
    shard_rows: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _plain(self)
        for name in ("batch_size", "shard_rows", "threads"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ConfigError(f"threads: got {self.threads}; give at most {MOST_THREADS}")
        _one_of("dtype", self.dtype, get_args(StoreDtype))


@dataclass(frozen=True)
class RunConfig:
    """A run: one project, one set of sketches and checkpoints, one or more splits.

    Attributes:
        project: path of the project file.
        splits: by name; each becomes a store of that name in the run's folder.
        checkpoints: paths or glob patterns; none for the weights that the project's ``model()`` returns.
        eta: weight of every checkpoint; None for the learning rate in each one's optimizer state (1 without
            checkpoints).
        sketch_size: buckets per parameter (paper: 2048).
        hashing, seed: of the sketches.
        layout: ``"concat"``: each parameter's sketch in columns of its own; ``"sum"``: all in the same ones.
        workspace: bytes that uses of linear layers may keep alive while they wait to be sketched together. Features
            depend on it in their last bits. None: :func:`stepinfluence.attach`'s for the device, recorded as a number.
        fold: add all checkpoints into one set of columns, under random signs.
        metric: the inner product that influence is taken under: ``"sgd"``, or an optimizer's second moments.
        curvature: what the scores that people see first are corrected with: ``"fisher"``, ``"block"``, ``"source"``
            (of checkpoints along training) or ``"none"``.
        damping: of that curvature: ``"training"`` (by training's length), ``"auto"``, or a number relative to the
            largest eigenvalue. None: training's length where the stores know it, else ``"auto"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        on_error: what to do with an example that cannot be featurized: ``"stop"``, or ``"skip"`` it and record why.
    """

    project: Path
    splits: Mapping[str, SplitConfig]
    checkpoints: tuple[str, ...] = ()
    eta: float | None = None
    sketch_size: int = 2048
    hashing: HashFamily = "balanced"
    seed: int = 0
    layout: Layout = "concat"
    workspace: int | None = None
    fold: bool = False
    metric: Kind = "sgd"
    curvature: CurvatureKind = "fisher"
    damping: float | Literal["training", "auto"] | None = None
    device: str = "auto"
    on_error: OnFailure = "stop"

    EXECUTION = ("curvature", "damping", "device", "on_error")
    """Fields that may differ between calls of one run."""

    def __post_init__(self) -> None:
        if isinstance(self.checkpoints, str):
            raise ConfigError(f"checkpoints: got the text {self.checkpoints!r}; give a tuple of paths or patterns")
        _plain(self)
        if self.eta is not None and not math.isfinite(self.eta):
            raise ConfigError(f"eta: got {self.eta}; give a finite number")
        _positive("sketch_size", self.sketch_size)
        _one_of("hashing", self.hashing, get_args(HashFamily))
        _one_of("layout", self.layout, get_args(Layout))
        if self.workspace is not None and self.workspace < 0:
            raise ConfigError(f"workspace: got {self.workspace}; give a number of bytes, 0 to sketch every use at once")
        _one_of("metric", self.metric, get_args(Kind))
        _one_of("curvature", self.curvature, get_args(CurvatureKind))
        if self.damping not in (None, "training"):
            try:
                checked(self.damping)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        _one_of("on_error", self.on_error, get_args(OnFailure))
        if not self.splits:
            raise ConfigError("splits: got none; give at least one (--split train)")
        for name in self.splits:
            if PurePosixPath(name).name != name or name in ("", ".", "..", CONFIG) or "\\" in name:
                raise ConfigError(f"splits: {name!r} cannot be the name of a folder; use a plain name")
        if self.fold and len(self.checkpoints) == 0:
            raise ConfigError("fold: there are no checkpoints to fold; name them with --checkpoints")

    # ------------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a ``config.yaml``; paths in it are relative to its folder.

        Raises:
            ConfigError: no such file, no YAML mapping, unknown keys (named), or values of a wrong type.
        """
        path = Path(path)
        try:
            raw = read_within(path, CONFIG_LIMIT)
            if len(raw) > CONFIG_LIMIT:
                raise ConfigError(f"{path}: larger than {CONFIG_LIMIT} bytes; give the config.yaml of a run")
            content = yaml.load(raw.decode(), _Loader)  # noqa: S506  # a safe one
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(f"{path}: could not be read ({error.strerror}); give the config.yaml of a run") from error
        except Exception as error:  # of yaml, or of the dates and numbers that it makes
            raise ConfigError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from error
        try:
            return cls.from_dict(content, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, content: object, folder: Path) -> RunConfig:
        """From plain values as :meth:`to_dict` gives them.

        Raises:
            ConfigError: as for :meth:`load`.
        """
        fields = _fields(cls, content, "")
        if "project" not in fields or "splits" not in fields:
            raise ConfigError(f"{'project' if 'project' not in fields else 'splits'}: missing; add it")
        splits = fields["splits"]
        if not isinstance(splits, Mapping):
            raise ConfigError(f"splits: got {_kind(type(splits))}; give a mapping from split to its settings")
        fields["splits"] = {
            _typed("splits", name, str): SplitConfig(**_fields(SplitConfig, part or {}, f"splits.{name}."))
            for name, part in splits.items()
        }
        fields["project"] = folder / fields["project"]
        fields["checkpoints"] = tuple(str(folder / pattern) for pattern in fields.get("checkpoints", ()))
        return cls(**fields)

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Plain values, paths relative to ``folder``."""
        content: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "project":
                value = _relative(value, folder)
            elif entry.name == "checkpoints":
                value = [_relative(pattern, folder) for pattern in value]
            elif entry.name == "splits":
                value = {name: dataclasses.asdict(part) for name, part in value.items()}
            content[entry.name] = value
        return content

    def save(self, path: Path) -> None:
        """Write ``config.yaml``, whole or not at all.

        Raises:
            StoreError: it could not be written.
        """
        make_folder(path.parent)
        text = yaml.safe_dump(self.to_dict(path.parent), sort_keys=False, default_flow_style=False)
        write_bytes(path, (HEADER.format(name=path.name) + text).encode())

    def merged(self, earlier: RunConfig, folder: Path) -> RunConfig:
        """This call's settings with the splits of an earlier call in the same folder.

        Raises:
            ConfigError: a setting that all splits of a run share differs, or one of a split that both have.
        """
        mine, theirs = self.to_dict(folder), earlier.to_dict(folder)
        for name in mine.keys() - {"splits", *self.EXECUTION}:
            if mine[name] != theirs[name]:
                raise ConfigError(
                    f"{name}: the run in {folder} was begun with {_said(theirs[name])}, not {_said(mine[name])}; "
                    "splits of one run share it: use the same, or another --out"
                )
        for split in self.splits.keys() & earlier.splits.keys():
            for name, value in mine["splits"][split].items():
                if value != theirs["splits"][split][name]:
                    raise ConfigError(
                        f"{name}: split {split!r} in {folder} was begun with "
                        f"{_said(theirs['splits'][split][name])}, not {_said(value)}; use the same, or another --out"
                    )
        return dataclasses.replace(self, splits={**earlier.splits, **self.splits})


class _Loader(yaml.SafeLoader):
    """Plain values, each written out: what refers to itself or to others could be of any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next value.

        Raises:
            ConstructorError: it is an alias.
        """
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # so its stubs have it
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not read; write it out", mark)
        return super().compose_node(parent, index)


def _shown(value: object) -> str:
    """A value in a message: what it begins with."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return "a very large number"
    return reprlib.repr(value)


def _said(value: object) -> str:
    """A setting in a message, as the file has it."""
    named = {None: "nothing", True: "true", False: "false"}
    if isinstance(value, bool) or value is None:
        return named[value]
    return ", ".join(map(_said, value)) or "none" if isinstance(value, list | tuple) else _shown(value)


def _relative(path: str | Path, folder: Path) -> str:
    """``path`` as seen from ``folder``, with forward slashes; on another Windows drive it stays absolute."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return Path(path).absolute().as_posix()


# ----------------------------------------------------------------------------------------------------------------
# Types

TYPES: dict[str, tuple[Any, ...]] = {
    "project": (str,),
    "checkpoints": (list,),
    "eta": (float, int, type(None)),
    "damping": (str, float, int, type(None)),
    "splits": (Mapping,),
    **dict.fromkeys(("sketch_size", "seed", "batch_size"), (int,)),
    **dict.fromkeys(("shard_rows", "threads", "workspace"), (int, type(None))),
    "fold": (bool,),
    "per_step": (bool, type(None)),
    **dict.fromkeys(("hashing", "layout", "metric", "curvature", "device", "on_error", "dtype"), (str,)),
}


def _fields(cls: type, content: object, prefix: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: got {_kind(type(content))}; give a mapping of settings")
    known = [f.name for f in dataclasses.fields(cls)]
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            name = _shown(name) if not isinstance(name, str) or len(name) > 60 else name
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{prefix}{name}: unknown key; {hint}")
    fields = {name: _typed(f"{prefix}{name}", value, *TYPES[name]) for name, value in content.items()}
    for pattern in fields.get("checkpoints", ()):
        _typed(f"{prefix}checkpoints", pattern, str)
    if fields.get("eta") is not None:
        fields["eta"] = float(fields["eta"])
    return fields


KINDS: dict[type, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing",
    list: "a list", dict: "a mapping", Mapping: "a mapping",
}  # fmt: skip


def _kind(of: type) -> str:
    """A type in a message, in the words of the file that it is about."""
    return KINDS.get(of, of.__name__)


def _typed(name: str, value: Any, *types: Any) -> Any:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join(dict.fromkeys(_kind(t) for t in types))
        came = _said(value) if value is None or isinstance(value, bool) else f"{_shown(value)}, {_kind(type(value))}"
        raise ConfigError(f"{name}: got {came}; give {wanted}")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{name}: got {_shown(value)}, with a NUL character in it; leave it out")
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ConfigError(f"{name}: got a number of more than 64 bits; give a smaller one")
    return value


def _plain(settings: RunConfig | SplitConfig) -> None:
    """Numbers and texts that ``config.yaml`` can hold: a run whose settings could not be read again would be lost."""
    for entry in dataclasses.fields(settings):
        if entry.name not in ("project", "splits", "checkpoints"):
            _typed(entry.name, getattr(settings, entry.name), *TYPES[entry.name])


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: got {value}; give a positive number")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}; use one of {', '.join(allowed)}")
