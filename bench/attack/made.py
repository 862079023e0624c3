"""What is attacked: a small project, its checkpoints, and stores of made-up features."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

PROJECT = """
import os, signal
import torch
from torch import nn
from parts import squared, DATA_SEED, Core

class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = Core()
        self.head = nn.Linear(6, 1)

    def forward(self, x, steps):
        state = x
        for _ in range(steps):
            state = self.core(state + x)
        return self.head(state).squeeze(-1)

def model():
    torch.manual_seed(5)
    return Looped()

def body(model):
    return "core"

class Data(list):
    def __init__(self, examples, split):
        super().__init__(examples)
        self.split = split

    def __getitem__(self, index):
        if os.environ.get("DIE_AT") == str(index) and self.split == "train":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

def dataset(split):
    sizes = {"train": 22, "query": 5, "more": 4}
    generator = torch.Generator().manual_seed(len(split) + DATA_SEED)
    return Data([{"x": torch.randn(6, generator=generator)} for n in range(sizes[split])], split)

def collate(examples):
    return {"x": torch.stack([e["x"] for e in examples])}

def loss(model, batch):
    return squared(model(batch["x"], 3))

def text(example):
    return f"example {float(example['x'][0]):.3f}"
"""

PARTS = """
from torch import nn

DATA_SEED = 0

def squared(value):
    return value ** 2

class Core(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 6), nn.Tanh())
"""

OPTIONS = ("--sketch-size", "16", "--batch-size", "2", "--shard-rows", "4", "--threads", "1")


def write_project(folder: Path, *changes: tuple[str, str]) -> Path:
    """The project's two files, with pieces of their text replaced; the path of the project file."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"my_project.py": PROJECT, "parts.py": PARTS}
    for old, new in changes:
        if not any(old in text for text in texts.values()):
            raise ValueError(f"{old!r} is in none of the files")
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder / "my_project.py"


def featurize(project: Path, out: Path, *more: object, splits: tuple[str, ...] = ("train", "query")) -> tuple[Any, ...]:
    """The arguments of the command that makes a run."""
    chosen = [part for split in splits for part in ("--split", split)]
    return ("featurize", "--project", project, *chosen, *OPTIONS, "--out", out, *more)


def write_store(path: Path, *, seed: int = 0, n_rows: int = 8, **fields: Any) -> None:
    """A store of made-up features at two checkpoints, each shard a function of its numbers alone."""
    import torch
    from stepinfluence.attribution.features import Features
    from stepinfluence.attribution.space import Block, FeatureSpace
    from stepinfluence.store import FailedRow, Manifest, RowInfo, StoredCheckpoint, StoreWriter

    blocks = (Block("w", (3, 4), 0, 8), Block("b", (3,), 8, 11))
    spaces = [FeatureSpace("sketch", blocks, "tables", f"weights {k}") for k in range(2)]
    given = tuple(StoredCheckpoint(f"step-{k}.pt", 0.1 * (k + 1), space) for k, space in enumerate(spaces))
    manifest = Manifest(given, n_rows, 4, loss=f"loss {seed}" if seed else "", **fields)
    writer = StoreWriter.create(path, manifest)
    for k in range(2):
        for shard in writer.pending(k):
            rows = manifest.rows_of(shard)
            failed = [FailedRow(row, "loss is NaN") for row in rows if row == 6]
            n, steps = len(rows) - len(failed), 2 + shard % 2
            generator = torch.Generator().manual_seed(1000 * seed + 100 * k + shard)
            features = Features(
                values=torch.randn((n, steps, 11) if manifest.per_step else (n, 11), generator=generator) * 3,
                losses=torch.rand(n, generator=generator),
                steps=torch.full((n,), steps),
                lengths=torch.full((n,), steps - 1) if manifest.per_step else None,
                ids=tuple(range(n)),
                space=spaces[k],
                step_labels=("core",) * steps,
            )
            infos = [RowInfo(f"example {row}", f"line\n{row} \u2028 é", {"label": row}) for row in rows]
            writer.write_shard(k, shard, features, infos, failed)
    writer.finish()


def halves(store: Path, folder: Path) -> list[Path]:
    """Two copies of a store below a folder, each with every other shard."""
    parts = []
    for k in range(2):
        part = folder / f"part-{k}"
        shutil.copytree(store, part)
        for record in sorted(part.glob("c*/*.json"))[k::2]:
            record.unlink()
        parts.append(part)
    return parts
