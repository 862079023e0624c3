"""A small project file, and runs of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = """
import os, signal
import torch
from torch import nn

class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x, steps):
        state = x
        for _ in range(steps):
            state = self.core(state + x)
        return state.sum(-1)

def model():
    return Looped()

def body(model):
    return "core"

def dataset(split):
    sizes = {"train": 22, "query": 5}
    generator = torch.Generator().manual_seed(len(split))
    return Data([{"id": f"{split}-{n}", "x": torch.randn(6, generator=generator)} for n in range(sizes[split])], split)

class Data(list):
    def __init__(self, examples, split):
        super().__init__(examples)
        self.split = split

    def __getitem__(self, index):
        if os.environ.get("DIE_AT") == str(index) and self.split == "train":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

def collate(examples):
    return {"x": torch.stack([e["x"] for e in examples]), "bad": torch.tensor([e.get("bad", 0) for e in examples])}

def loss(model, batch):
    losses = model(batch["x"], 3) ** 2
    return losses * torch.where(batch["bad"] == 1, float("nan"), 1.0)

def text(example):
    return "example " + example["id"]
"""


@pytest.fixture
def project_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_project.py"
    path.write_text(PROJECT)
    return path


@pytest.fixture
def write_project(tmp_path: Path) -> Callable[..., Path]:
    """Writes the project with pieces of its text replaced."""

    def write(*changes: tuple[str, str], name: str = "changed.py") -> Path:
        text = PROJECT
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
