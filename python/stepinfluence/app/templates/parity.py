"""The parity model of the paper (arXiv 2602.10097, appendix D.2): is the number of ones in a bit string odd?

    python my_project.py                                                      # train it: writes checkpoints/
    sdi featurize --project my_project.py --split train --split query --checkpoints 'checkpoints/*.pt' --out run
    sdi query run --row 0                                                     # which strings shaped that answer?

sdi needs the functions under "For sdi"; all else is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stepinfluence.models import ParityConfig, ParityTransformer, parity_loss, parity_task

WORDS = {0: "even", 1: "odd"}
TRAINING = parity_task.ParityTrainConfig(
    model=ParityConfig(d_model=32, n_heads=8),
    max_digits=6,
    train_per_length=32,
    max_steps=400,
    final_steps=60,
    checkpoint_digits=(3, 5),
    clip_norm=0.1,
)


def train(folder: str = "checkpoints") -> None:
    """Train the model and save checkpoints, with the optimizer's state (sdi reads the learning rate there)."""
    Path(folder).mkdir(parents=True, exist_ok=True)

    def save(step: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(content, Path(folder) / f"step-{step}.pt")

    parity_task.train_parity(TRAINING, on_checkpoint=save)


# ----------------------------------------------------------------------------------------------------------------
# For sdi


def model() -> nn.Module:
    """The model; checkpoints named with --checkpoints are loaded into it."""
    torch.manual_seed(0)
    return ParityTransformer(TRAINING.model)


def body(model: nn.Module) -> str:
    """What the loop applies at every step: the module, or its name."""
    return "block"


def dataset(split: str) -> Sequence[parity_task.ParityExample]:
    """Anything with len(data) and data[i]."""
    strings = parity_task.make_train_set(TRAINING.max_digits, TRAINING.train_per_length)
    if split == "train":
        return strings
    if split == "query":
        lengths = range(TRAINING.max_digits, TRAINING.max_digits + 3)
        return parity_task.make_heldout_set(lengths, 8, exclude=strings)
    raise ValueError(f"no split {split!r}; there are train and query")


def collate(examples: Sequence[parity_task.ParityExample]) -> dict[str, Tensor]:
    """A batch of examples: what loss() takes. Shorter strings run more loop steps than they are read after."""
    return parity_task.collate(examples)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One loss per example: the cross-entropy of the answer. Not reduced over the batch."""
    return parity_loss(model, batch)


# The functions below are optional.


def example_id(example: parity_task.ParityExample, index: int) -> str:
    """A name that stays when the data is reordered; the position in the dataset if you leave this function out."""
    return example.bits


def text(example: parity_task.ParityExample) -> str:
    """What people see."""
    return f"{example.bits} is {WORDS[example.parity]}"


def metadata(example: parity_task.ParityExample) -> dict[str, int]:
    """Fields to filter and group by."""
    return {"digits": example.n_digits, "parity": example.parity}


def tokens(example: parity_task.ParityExample) -> list[str]:
    """The text of each token."""
    return [*example.bits, "="]


def answer(model: ParityTransformer, batch: dict[str, Tensor]) -> list[str]:
    """What the model answers to each string of a batch."""
    said = model.answer_logits(batch["tokens"], batch["read_step"]).argmax(-1).tolist()
    return [WORDS.get(token, f"token {token}") for token in said]


def truth(example: parity_task.ParityExample) -> str:
    """The right answer."""
    return WORDS[example.parity]


def from_json(fields: dict[str, str]) -> parity_task.ParityExample:
    """A new example for sdi query --input: {"bits": "0110"}."""
    return parity_task.ParityExample(0, fields["bits"])


if __name__ == "__main__":
    train()
