"""Damaged checkpoints: refused in one line, or weights and learning rate whose digest is another one."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from bench.attack.campaign import Attack, Campaign
from bench.attack.mutate import damaged, odd_value
from bench.attack.verdicts import OTHER, SAME, SILENT, Verdict, judged


def network() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def content() -> dict[str, Any]:
    """A model's and an Adam's state, without a backward pass: threads of one would not survive a fork."""
    import torch

    made = network()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": made.state_dict(), "optimizer": optimizer.state_dict()}


def use(path: Path) -> tuple[Any, ...]:
    """All that a run does with a checkpoint: the weights' bytes, and what a store would pin of them."""
    from stepinfluence import load_checkpoint
    from stepinfluence.attribution.features import weights_digest
    from stepinfluence.attribution.preconditioners import from_optimizer
    from stepinfluence.store import model_digest

    checkpoint = load_checkpoint(path)
    target = network()
    checkpoint.load_into(target)
    rate, moments, digest = None, (), ""
    if checkpoint.optimizer is not None:
        rate = checkpoint.learning_rate
        roots = from_optimizer(checkpoint.optimizer, target, "adam")
        tensors = [t for name in sorted(roots or {}) for t in (roots or {})[name].tensors]
        moments = tuple(t.numpy().tobytes() for t in tensors)
        digest = weights_digest(tensors)
    weights = tuple(t.numpy().tobytes() for t in target.state_dict().values())
    return (weights, rate, moments), (model_digest(target), rate, digest)


def with_header(rng: Random, data: bytes) -> bytes:
    """A safetensors file with odd values in its header, of the right length."""
    (length,) = struct.unpack("<Q", data[:8])
    try:
        header = json.dumps(odd_value(rng, json.loads(data[8 : 8 + length]))).encode()
    except (ValueError, RecursionError):
        return damaged(rng, data)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def with_entry(rng: Random, data: bytes) -> bytes:
    """An archive of torch's with one entry damaged, and checksums that fit."""
    made = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        entries = old.infolist()
        weights = [8 if e.filename.endswith("data.pkl") else 1 for e in entries]
        [chosen] = rng.choices(entries, weights)
        for entry in entries:
            inside = old.read(entry)
            if entry is chosen:
                inside = damaged(rng, inside)
            if entry is not chosen or rng.random() < 0.95:
                new.writestr(entry, inside)
    return made.getvalue()


def prepare(folder: Path) -> Attack:
    import torch
    from safetensors.torch import save_file
    from stepinfluence.errors import StepInfluenceError

    warnings.simplefilter("ignore")
    torch.save(content(), folder / "zip.pt")
    torch.save(content(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(content()["model"], folder / "plain.safetensors")
    sharded = folder / "sharded"
    sharded.mkdir()
    state = content()["model"]
    parts = {
        "model-00001-of-00002.safetensors": ("0.weight", "0.bias"),
        "model-00002-of-00002.safetensors": ("1.weight", "1.bias"),
    }
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, sharded / name)
    where = {key: name for name, keys in parts.items() for key in keys}
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 104}, "weight_map": where}, indent=2))
    files = [
        folder / "zip.pt",
        folder / "legacy.pt",
        folder / "plain.safetensors",
        index,
        *(sharded / n for n in parts),
    ]
    whole = {path: path.read_bytes() for path in files}
    asked = {path: sharded if path.parent == sharded else path for path in files}
    before = {path: use(asked[path]) for path in files}

    def made(rng: Random, path: Path) -> bytes:
        data = whole[path]
        if rng.random() < 0.5:
            return damaged(rng, data, whole[rng.choice(files)])
        if path.suffix == ".safetensors":
            return with_header(rng, data)
        if path.suffix == ".json":
            try:
                return json.dumps(odd_value(rng, json.loads(data))).encode()
            except (ValueError, RecursionError):
                return damaged(rng, data)
        return with_entry(rng, data) if path.name == "zip.pt" else damaged(rng, data)

    def attack(rng: Random) -> Verdict:
        path = rng.choice(files)
        path.write_bytes(made(rng, path))
        try:
            found, verdict = judged(lambda: use(asked[path]), (StepInfluenceError,), path.name)
        finally:
            path.write_bytes(whole[path])
            for left in sharded.iterdir():
                if left not in whole:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        if verdict is not None or found is None:
            return verdict or Verdict(SILENT, f"{path.name}: nothing came of it")
        if found[0] == before[path][0]:
            return Verdict(SAME, path.name)
        # Values alone have changed, which no format can tell; a store that was begun with the others does.
        return Verdict(OTHER if found[1] != before[path][1] else SILENT, f"{path.name}: other weights")

    return attack


CAMPAIGN = Campaign("checkpoints", "damaged checkpoints (.pt, safetensors, sharded)", 0.11, prepare)
