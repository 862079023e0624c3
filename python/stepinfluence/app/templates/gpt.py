"""A looped language model that learns facts of two hops: who lives where, which city is in which country.

    python my_project.py                                                      # train it: writes checkpoints/
    sdi featurize --project my_project.py --split train --split query --checkpoints 'checkpoints/*.pt' --out run
    sdi query run --id "anna is from"                                         # which facts shaped that answer?

Everything here is meant to be replaced by your own model and data. sdi needs the functions under "For sdi".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.models import LoopedGPT, LoopedGPTConfig

COUNTRIES = {
    "france": ("paris", "lyon", "lille"),
    "japan": ("tokyo", "osaka", "kyoto"),
    "kenya": ("nairobi", "mombasa", "kisumu"),
    "peru": ("lima", "cusco", "arequipa"),
}
NAMES = (
    *("anna", "ben", "carla", "dana", "emil", "farid", "gina", "hugo", "ines"),
    *("jonas", "kofi", "lena", "mara", "nils", "olga", "pablo", "quinn", "rosa"),
    *("sven", "tara", "umar", "vera", "wim", "xenia", "yusuf", "zoe"),
)
HELD_OUT = NAMES[::4]
"""People whose country is asked for, and never stated in training."""

CITIES = [city for cities in COUNTRIES.values() for city in cities]
HOME = {name: CITIES[(7 * number) % len(CITIES)] for number, name in enumerate(NAMES)}
COUNTRY = {city: country for country, cities in COUNTRIES.items() for city in cities}
WORDS = sorted({*NAMES, *CITIES, *COUNTRIES, "lives", "in", "is", "from"})
TOKEN = {word: number for number, word in enumerate(WORDS)}


def sentences(split: str) -> list[str]:
    """Three kinds of facts, and the questions that take two of them."""
    if split == "train":
        facts = [f"{name} lives in {city}" for name, city in HOME.items()]
        facts += [f"{city} is in {country}" for city, country in COUNTRY.items()]
        return facts + [f"{name} is from {COUNTRY[HOME[name]]}" for name in NAMES if name not in HELD_OUT]
    if split == "query":
        return [f"{name} is from {COUNTRY[HOME[name]]}" for name in HELD_OUT]
    raise ValueError(f"no split {split!r}; there are train and query")


def train(steps: int = 200, folder: str = "checkpoints") -> None:
    """Train the model and save three checkpoints, with the optimizer's state (sdi reads the learning rate there)."""
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
    data = dataset("train")
    batch = collate([data[i] for i in range(len(data))])
    Path(folder).mkdir(parents=True, exist_ok=True)
    for step in range(1, steps + 1):
        mean = loss(network, batch).mean()
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step in (steps // 4, steps // 2, steps):
            content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(content, Path(folder) / f"step-{step}.pt")
            print(f"step {step}: loss {mean.item():.3f}")


# ----------------------------------------------------------------------------------------------------------------
# For sdi


def model() -> nn.Module:
    """The model; checkpoints named with --checkpoints are loaded into it."""
    torch.manual_seed(0)
    shape = LoopedGPTConfig(
        vocab_size=len(WORDS), d_model=32, n_heads=2, sequence_len=4, n_prelude=1, n_core=1, n_coda=0, steps=6
    )
    return LoopedGPT(shape)


def body(model: nn.Module) -> str:
    """What the loop applies at every step: the module, or its name."""
    return "core"


def dataset(split: str) -> list[dict[str, Any]]:
    """Anything with len(data) and data[i]: a list, a torch Dataset, a Hugging Face dataset."""
    return [{"text": text, "tokens": [TOKEN[word] for word in text.split()]} for text in sentences(split)]


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of examples: what loss() takes."""
    return {"tokens": torch.tensor([example["tokens"] for example in examples])}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One loss per example: how surprising the last word is. Not reduced over the batch."""
    tokens = batch["tokens"]
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits[:, -1], tokens[:, -1], reduction="none")


# The functions below are optional.


def example_id(example: dict[str, Any], index: int) -> str:
    """A name that stays when the data is reordered; the position in the dataset if you leave this function out."""
    return str(example["text"].rpartition(" ")[0])


def text(example: dict[str, Any]) -> str:
    """What people see."""
    return str(example["text"])


def metadata(example: dict[str, Any]) -> dict[str, str]:
    """Fields to filter and group by."""
    return {"kind": example["text"].split()[1]}


def tokens(example: dict[str, Any]) -> list[str]:
    """The text of each token."""
    return list(example["text"].split())


def answer(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """The word that the model says last, for each example of a batch."""
    return [WORDS[word] for word in model(batch["tokens"][:, :-1])[:, -1].argmax(1).tolist()]


def truth(example: dict[str, Any]) -> str:
    """The right one."""
    return str(example["text"].split()[-1])


def from_json(fields: dict[str, Any]) -> dict[str, Any]:
    """A new example for sdi query --input: {"text": "anna is from peru"}."""
    return {"text": fields["text"], "tokens": [TOKEN[word] for word in fields["text"].split()]}


if __name__ == "__main__":
    train()
