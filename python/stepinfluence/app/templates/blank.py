"""A project file for sdi: replace the model and the data by your own.

python my_project.py                                                      # train it: writes checkpoints/
sdi featurize --project my_project.py --split train --split query --checkpoints 'checkpoints/*.pt' --out run
sdi query run --row 0
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

STEPS = 4


class Looped(nn.Module):
    """The same layer, several times: replace it by your model."""

    def __init__(self) -> None:
        super().__init__()
        self.read_in = nn.Linear(8, 16)
        self.core = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.read_out = nn.Linear(16, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        state = x = self.read_in(inputs)
        for _ in range(STEPS):
            state = self.core(state + x)
        out: Tensor = self.read_out(state)
        return out


def model() -> nn.Module:
    """The model; checkpoints named with --checkpoints are loaded into it."""
    torch.manual_seed(0)
    return Looped()


def body(model: nn.Module) -> str:
    """What the loop applies at every step: the module, its name, or a list of them."""
    return "core"


def dataset(split: str) -> list[tuple[Tensor, int]]:
    """Anything with len(data) and data[i]: a list, a torch Dataset, a Hugging Face dataset."""
    sizes = {"train": 64, "query": 8}
    if split not in sizes:
        raise ValueError(f"no split {split!r}; there are {', '.join(sizes)}")
    generator = torch.Generator().manual_seed(len(split))
    inputs = torch.randn(sizes[split], 8, generator=generator)
    return [(x, int(x.sum() > 0)) for x in inputs]


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """One loss per example, shape (B,): not reduced over the batch."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels, reduction="none")


# Optional, with what is done where they are missing:
#   collate(examples) -> batch           torch.utils.data.default_collate
#   example_id(example, index) -> str    example["id"] or example.id, else the position in the dataset
#   text(example) -> str                 example["text"] or example.text, else nothing is shown
#   metadata(example) -> dict            none; fields to filter and group by
#   tokens(example) -> list of str       none; what is shown token by token
#   token_losses(model, batch) -> (B, T) none; losses of tokens that add up to loss(), for influence by token
#   answer(model, batch) -> list of str  none; the model's answers, shown beside truth(example)
#   from_json(fields) -> example         the JSON value itself (sdi query --input)
#   attach_options() -> dict             further options of stepinfluence.attach


def text(example: tuple[Tensor, int]) -> str:
    """What people see."""
    return f"{'positive' if example[1] else 'negative'}, sum {float(example[0].sum()):+.2f}"


def train(steps: int = 100, folder: str = "checkpoints") -> None:
    """Train the model and save checkpoints, with the optimizer's state (sdi reads the learning rate there)."""
    network = model()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    examples = dataset("train")
    batch = [torch.stack([x for x, _ in examples]), torch.tensor([label for _, label in examples])]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for step in range(1, steps + 1):
        mean = loss(network, batch).mean()
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        if step in (steps // 2, steps):
            content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(content, Path(folder) / f"step-{step}.pt")
            print(f"step {step}: loss {mean.item():.3f}")


if __name__ == "__main__":
    train()
