"""Programs that somebody may write with the library, to be killed: each goes on where it was when it is run again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

UPDATES, EVERY = 8, 3
ROWS, SHARD, BATCH = 14, 4, 2


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for _ in range(3):
            state = self.dropout(torch.tanh(self.core(state + x)))
        out: Tensor = self.head(state).squeeze(-1)
        return out


def made(seed: int = 0) -> Looped:
    torch.manual_seed(seed)
    return Looped().eval()


def examples(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(batch).square()
    return found


def featurizing(at: Path, workers: int, died: Callable[[], None] | None = None) -> Callable[[], None]:
    """A program that fills a store by ``Capture.featurize``, at two checkpoints, in training mode (dropout).

    Args:
        at: the store is made below it.
        workers: of the loaders.
        died: called in every loss.
    """

    def run() -> None:
        from stepinfluence import attach
        from stepinfluence.store import Manifest, RowInfo, StoreWriter, checkpoint_of
        from torch.utils.data import DataLoader, Subset

        data: Any = examples(ROWS, 1)
        model = made()
        capture = attach(model, body="core", sketch_size=8, training=True)
        states, described = [made(seed).state_dict() for seed in (1, 2)], []
        for k, state in enumerate(states):
            model.load_state_dict(state)
            described.append(checkpoint_of(capture, f"{k}.pt", 0.1))
        manifest = Manifest.of(capture, ROWS, described, shard_rows=SHARD, per_step=True, dtype="int8")
        writer = StoreWriter.create(at / "store", manifest)

        def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
            if died is not None:
                died()
            return loss(model, batch)

        for k, state in enumerate(states):
            model.load_state_dict(state)
            for shard in writer.to_write(k):
                rows = manifest.rows_of(shard)
                # Workers are forked however this process was started: they need not import torch again.
                how = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
                loader = DataLoader(Subset(data, rows), batch_size=BATCH, **how)
                found = capture.featurize(loader, loss_fn, first_batch=rows.start // BATCH, progress=False)
                writer.write_shard(k, shard, found, [RowInfo(row) for row in rows])
        writer.finish()

    return run


def training(at: Path) -> Callable[[], None]:
    """A program that scores a training by ``TrainingInfluence``, with a checkpoint after each update."""

    def run() -> None:
        from stepinfluence import TrainingInfluence, attach
        from stepinfluence.files import save_torch, write_atomically

        model, data, file = made(), examples(ROWS, 1), at / "training.pt"
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        query = [examples(3, 2)]
        capture = attach(model, body="core", sketch_size=8)
        with TrainingInfluence(capture, optimizer, query, loss, refresh_every=EVERY) as influence:
            done = 0
            if file.is_file():
                state = torch.load(file, weights_only=True)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                influence.load_state_dict(state["influence"])
                done = state["done"]
            for number in range(done, UPDATES):
                places = torch.arange(4 * number, 4 * number + 4) % ROWS
                with influence.batch(data[places], ids=places) as inline:
                    inline.losses(loss(model, data[places])).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": number + 1}
                state["influence"] = influence.state_dict()
                write_atomically(file, partial(save_torch, state))
            scores, updates = influence.result().sdi, influence.updates()
        content = np.concatenate([scores.flatten(), updates.drops.flatten(), updates.losses.flatten()])
        write_atomically(at / "scores", lambda aside: aside.write_bytes(content.tobytes()))
        file.unlink(missing_ok=True)

    return run
