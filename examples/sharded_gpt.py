"""A project file for a looped GPT that one process cannot hold: it is sharded over all that featurize it.

    torchrun --nproc-per-node 8 -m stepinfluence featurize --project examples/sharded_gpt.py --split train --out run

``LOOPED_GPT=large`` (the default) is a model of 1.3 billion parameters and 12 loop steps; ``LOOPED_GPT=tiny`` runs
anywhere. A single process gets the whole model, with the same names, so that it can ask what the others have stored.
Put your checkpoints in with ``--checkpoints``; the data are pieces of this repository's pages (docs/cluster.md).
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path

import torch
import torch.distributed as dist
from stepinfluence.models import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "large": LoopedGPTConfig.large(),
    "tiny": LoopedGPTConfig(
        vocab_size=256, d_model=32, n_heads=2, sequence_len=128, n_prelude=1, n_core=2, n_coda=1, steps=3
    ),
}
CONFIG = CONFIGS[os.environ.get("LOOPED_GPT", "large")]
TOKENS = 64


def join() -> torch.distributed.DeviceMesh:
    """The processes that torchrun has started, on their GPUs if there are any."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.init_device_mesh(kind, (dist.get_world_size(),))


def model() -> nn.Module:
    """The model: whole in a process of its own, sharded block by block over several."""
    built = LoopedGPT(CONFIG)
    for k, block in enumerate(built.core.blocks):
        built.core.blocks[k] = checkpoint_wrapper(block)  # a step keeps its states, not its activations
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        mesh = join()
        half = torch.bfloat16 if mesh.device_type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=half)
        for block in (*built.prelude, *built.core.blocks, *built.coda):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(built, mesh=mesh, mp_policy=policy)
    return built


def body(model: nn.Module) -> str:
    """The loop applies the core at every step."""
    return "core"


def dataset(split: str) -> list[Tensor]:
    """Pieces of text, byte by byte."""
    pages = {"train": sorted((ROOT / "docs").glob("*.md"))[:4], "query": [ROOT / "README.md"]}
    if split not in pages:
        raise ValueError(f"no split {split!r}; there are {', '.join(pages)}")
    text = b"".join(page.read_bytes() for page in pages[split])
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, TOKENS + 1, TOKENS)
    return list(rows[:64] if split == "train" else rows[:4])


def collate(examples: list[Tensor]) -> dict[str, Tensor]:
    """A batch of token ids, and of what comes next."""
    rows = torch.stack(examples)
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Nats for each token, a mean for each example."""
    return gpt_loss(model, batch)


def text(example: Tensor) -> str:
    """What an example says."""
    return bytes(example.tolist()).decode(errors="replace")
