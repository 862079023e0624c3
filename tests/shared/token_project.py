"""A project with tokens, losses by token, answers and truths, as text of a project file."""

from __future__ import annotations

from pathlib import Path

import torch
from stepinfluence import Project

PROJECT = """
import torch
from torch import nn

WORDS = ["the", "cat", "dog", "sat", "ran", "<b>far</b>", "away", "."]

class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.core = nn.Embedding(8, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.read = nn.Linear(6, 8)

    def forward(self, tokens):
        told = self.embed(tokens).cumsum(1)
        state = told
        for _ in range(3):
            state = self.core(state + told)
        return self.read(state)

def model():
    return Looped()

def body(model):
    return "core"

def dataset(split):
    sizes = {"train": 12, "query": 5}
    generator = torch.Generator().manual_seed(len(split))
    rows = [torch.randint(8, (4 + n % 3,), generator=generator) for n in range(sizes[split])]
    return [{"id": f"{split}-{n}", "tokens": row.tolist()} for n, row in enumerate(rows)]

def collate(examples):
    longest = max(len(e["tokens"]) for e in examples)
    return torch.tensor([e["tokens"] + [-1] * (longest - len(e["tokens"])) for e in examples])

def token_losses(model, batch):
    logits = model(batch.clamp(min=0))[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none", ignore_index=-1)
    return nn.functional.pad(losses, (1, 0))

def loss(model, batch):
    return token_losses(model, batch).sum(1)

def tokens(example):
    return [WORDS[token] for token in example["tokens"]]

def text(example):
    return " ".join(tokens(example))

def answer(model, batch):
    last = (batch >= 0).sum(1) - 2
    guess = model(batch.clamp(min=0))[torch.arange(len(batch)), last].argmax(1)
    return [WORDS[token] for token in guess.tolist()]

def truth(example):
    return WORDS[example["tokens"][-1]]
"""


def write_project(path: Path, *changes: tuple[str, str]) -> Path:
    """The project file, with pieces of its text replaced."""
    text = PROJECT
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def write_checkpoints(project: Path, folder: Path, count: int = 2) -> str:
    """Checkpoints of the project's model, some updates apart; a pattern that fits them."""
    loaded = Project.load(project)
    model, data = loaded.model(), loaded.dataset("train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(count):
        loaded.loss(model, loaded.collate([data[k] for k in range(len(data))])).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"step-{step + 1}.pt")
    return str(folder / "step-*.pt")
