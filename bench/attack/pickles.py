"""Checkpoints that would run code when they are unpickled: refused, and nothing is run."""

from __future__ import annotations

import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from bench.attack.campaign import Attack, Campaign
from bench.attack.checkpoints import content
from bench.attack.mutate import damaged
from bench.attack.verdicts import OTHER, SILENT, Verdict, judged

CALLS: tuple[tuple[str, Callable[[str], tuple[Any, ...]]], ...] = (
    ("posix system", lambda mark: (f"touch {mark}",)),
    ("os system", lambda mark: (f"touch {mark}",)),
    ("subprocess getoutput", lambda mark: (f"touch {mark}",)),
    ("subprocess check_call", lambda mark: (["touch", mark],)),
    ("builtins exec", lambda mark: (f"open({mark!r}, 'w')",)),
    ("builtins eval", lambda mark: (f"open({mark!r}, 'w')",)),
    ("builtins open", lambda mark: (mark, "w")),
    ("io open", lambda mark: (mark, "w")),
    ("_io FileIO", lambda mark: (mark, "w")),
    ("pathlib Path.touch", lambda mark: (mark,)),
    ("os mkdir", lambda mark: (mark,)),
    ("os symlink", lambda mark: ("/", mark)),
    ("shutil copyfile", lambda mark: ("/etc/hostname", mark)),
    ("timeit timeit", lambda mark: (f"open({mark!r}, 'w')",)),
    ("runpy run_path", lambda mark: (mark,)),
    ("torch.serialization load", lambda mark: (mark,)),
    ("torch.hub load", lambda mark: (mark, "x")),
    ("torch._utils _rebuild_tensor_v2", lambda mark: (mark, 0, (1,), (1,), False, None)),
    ("numpy.core.multiarray _reconstruct", lambda mark: (mark,)),
    ("importlib import_module", lambda mark: ("antigravity",)),
)
"""What a pickle names, and with which arguments it would be called; ``mark`` is a file that must not come to be."""


class Call:
    """Pickles as a call of a function by its name."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments


def pickled(value: Any, protocol: int) -> bytes:
    """A pickle of plain values, in which every :class:`Call` is one."""
    calls: list[Call] = []

    class Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]  # the one that can be written in Python
        def save(self, thing: Any, save_persistent_id: bool = True) -> None:
            if not isinstance(thing, Call):
                super().save(thing, save_persistent_id)
                return
            calls.append(thing)
            module, name = thing.name.split(" ")
            self.write(b"c" + module.encode() + b"\n" + name.encode() + b"\n")
            self.save(thing.arguments)
            self.write(b"R")

    file = BytesIO()
    Pickler(file, protocol=protocol).dump(value)
    return file.getvalue()


def hidden(rng: Random, call: Call) -> Any:
    """A call somewhere in what looks like a checkpoint."""
    place = rng.randrange(7)
    state: dict[Any, Any] = {"0.weight": [1.0, 2.0], "0.bias": 0.5}
    if place == 0:
        return call
    if place == 1:
        return {"model": state, "optimizer": call}
    if place == 2:
        return {"model": {**state, "1.weight": call}}
    if place == 3:
        return {"model": state, "optimizer": {"state": {0: {"exp_avg": call}}, "param_groups": []}}
    if place == 4:
        return {"model": state, "epoch": [1, (2, {"deep": call})]}
    if place == 5:
        return [call, {"model": state}]
    return {"model": state, "args": {"lr": 0.1, "call": call}}


def archived(inside: bytes, like: bytes) -> bytes:
    """An archive as torch writes one, with another pickle in it."""
    made = BytesIO()
    with zipfile.ZipFile(BytesIO(like)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, inside if entry.filename.endswith("data.pkl") else old.read(entry))
    return made.getvalue()


def prepare(folder: Path) -> Attack:
    import torch
    from stepinfluence import load_checkpoint
    from stepinfluence.errors import StepInfluenceError

    torch.save(content(), folder / "like.pt")
    torch.save(content(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    like, legacy = (folder / "like.pt").read_bytes(), (folder / "legacy.pt").read_bytes()
    head = _headers(legacy)
    mark = folder / "ran"

    def attack(rng: Random) -> Verdict:
        name, arguments = rng.choice(CALLS)
        data = pickled(hidden(rng, Call(name, arguments(str(mark)))), rng.randrange(5))
        layout = rng.choice(("zip", "legacy", "bare"))
        made = archived(data, like) if layout == "zip" else legacy[:head] + data if layout == "legacy" else data
        if rng.random() < 0.3:
            made = damaged(rng, made)
        path = folder / rng.choice(("c.pt", "c.bin", "c.pth", "c.ckpt", "c.safetensors", "c"))
        path.write_bytes(made)
        try:
            _, verdict = judged(
                lambda: load_checkpoint(path), (StepInfluenceError,), f"{name}, {layout}, {path.suffix}"
            )
        finally:
            path.unlink()
        if mark.exists() or mark.is_symlink():
            shutil.rmtree(mark) if mark.is_dir() and not mark.is_symlink() else mark.unlink()
            return Verdict(SILENT, f"{name}, {layout}: it was run")
        # Damage may have taken the call out; what is left is read without it.
        return verdict or Verdict(OTHER, f"{name}, {layout}: read, and nothing was run")

    return attack


def _headers(legacy: bytes) -> int:
    """Bytes before the fourth pickle of torch's old format: magic number, version, machine."""
    file = BytesIO(legacy)
    for _ in range(3):
        for _opcode in pickletools.genops(file):
            pass
    return file.tell()


CAMPAIGN = Campaign("pickles", "hostile pickles", 0.04, prepare)
