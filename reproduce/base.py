"""What every experiment shares: a run folder whose stages survive an interruption, and the outcome to report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from stepinfluence.files import write_atomically, write_bytes
from stepinfluence.machine import machine_facts, versions
from stepinfluence.provenance import Provenance, checkout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ConfigT = TypeVar("ConfigT")
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A number of ours beside the paper's.

    Attributes:
        name: what was measured.
        ours: as measured here; a number, or text such as ``"0.91 ± 0.02"``.
        paper: as the paper (or the summary) has it; None if it gives none.
        where: in the paper: ``"Fig. 4"``, ``"Table 1"``, ``"summary"``.
        note: why they differ, in a few words.
    """

    name: str
    ours: float | str
    paper: float | str | None = None
    where: str = ""
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        title: of the report.
        summary: Markdown: two to five sentences: what was asked, what came out, what differs from the paper.
        comparisons: our numbers beside the paper's.
        body: Markdown of all sections, figures shown as ``![name](figures/name.png)``.
        numbers: everything else worth keeping in ``results.json`` (plain values only).
        tells_differences: the body has a table of its own of what differs from the paper.
    """

    title: str
    summary: str
    comparisons: tuple[Comparison, ...]
    body: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    tells_differences: bool = False


class Run(Generic[ConfigT]):
    """One run of an experiment in a folder; a second run there takes up where the first one stopped.

    Attributes:
        config: the experiment's dataclass.
        scale: name of its profile.
        folder: holds ``config.json``, ``stages/``, ``checkpoints/``, ``figures/`` and the report.
        provenance: of this process; a stage that an earlier one computed has its own in :attr:`sources`.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        scale: str,
        config: ConfigT,
        *,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open or make the folder.

        Raises:
            ValueError: the folder holds a run of other settings, or other things.
        """
        self.folder, self.experiment, self.scale, self.config = folder, experiment, scale, config
        self._announce = announce
        self._timings: dict[str, dict[str, float]] = {}
        self._sources: dict[str, Any] = {}
        self.provenance = Provenance()
        record = {"experiment": experiment, "scale": scale, "config": plain_values(asdict(config))}  # type: ignore[call-overload]
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "config.json"
        if known.exists():
            try:
                earlier = json.loads(known.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"out: {known} is damaged ({error}); choose another folder") from error
            if {k: earlier.get(k) for k in record} != record:
                raise ValueError(
                    f"out: {folder} holds a run with other settings ({_difference(earlier, record)}); choose another "
                    "folder, or pass --fresh to start over"
                )
        elif any(folder.iterdir()):
            raise ValueError(f"out: {folder} is not empty and holds no earlier run; choose another folder")
        facts = {**record, "versions": versions(), "machine": machine_facts()}
        write_bytes(known, (json.dumps(facts, indent=2) + "\n").encode())

    @property
    def checkpoints(self) -> Path:
        """Folder for checkpoints; made when first asked for."""
        path = self.folder / "checkpoints"
        path.mkdir(exist_ok=True)
        return path

    def announce(self, text: str) -> None:
        """Tell the user what is going on."""
        self._announce(text)

    def stage(self, name: str, compute: Callable[[], Result]) -> Result:
        """``compute()``, or what it returned in an earlier run in this folder.

        Args:
            name: a file name; unique within the experiment.
            compute: returns arrays and plain values (numbers, strings, lists, dicts of them) by name.

        Returns:
            The values: arrays as numpy arrays, everything else as JSON has it (tuples become lists).
        """
        folder = self.folder / "stages"
        folder.mkdir(exist_ok=True)
        arrays, plain = folder / f"{name}.npz", folder / f"{name}.json"
        if plain.exists():  # written last
            content = json.loads(plain.read_text(encoding="utf-8"))
            self._timings[name] = content["timing"]
            self._sources[name] = content.get("sources", {"commit": "n/a", "dirty": "n/a"})
            with np.load(arrays, allow_pickle=False) as file:
                return {**content["values"], **{key: file[key] for key in file.files}}
        self.announce(name)
        wall, cpu = time.perf_counter(), time.process_time()
        values = compute()
        timing = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        self._timings[name], self._sources[name] = timing, checkout()
        kept = {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
        rest = plain_values({k: v for k, v in values.items() if not isinstance(v, np.ndarray)})
        write_atomically(
            arrays,
            lambda aside: np.savez_compressed(aside, **kept),  # type: ignore[arg-type]  # numpy's stub has the flag in mind
        )
        content = {"values": rest, "timing": timing, "sources": self._sources[name]}
        write_bytes(plain, (json.dumps(content, indent=1) + "\n").encode())
        return {**rest, **kept}

    @property
    def timings(self) -> Mapping[str, Mapping[str, float]]:
        """Wall and processor seconds of each stage, of the run that computed it."""
        return self._timings

    @property
    def sources(self) -> Mapping[str, Any]:
        """Commit that each stage was computed at, and whether files differed from it."""
        return self._sources

    def figure(self, name: str, figure: Figure) -> str:
        """Save a matplotlib figure as ``figures/<name>.png``; returns ``name``."""
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150)
        return name


def plain_values(value: Any) -> Any:
    """What JSON can hold, exactly as it will come back."""
    return json.loads(json.dumps(value, default=_scalar))


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is neither an array nor a plain value")


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for key in ("experiment", "scale"):
        if earlier.get(key) != now[key]:
            return f"{key}: {earlier.get(key)}, now {now[key]}"
    old, new = earlier.get("config") or {}, now["config"]
    names = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    return ", ".join(f"{k}: {old.get(k)}, now {new.get(k)}" for k in names[:3])
