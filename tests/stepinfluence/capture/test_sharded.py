"""A body that FSDP2 has sharded over processes is refused by name, not featurized wrongly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from stepinfluence import BodyError, attach
from torch import nn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def sharded(rank: int, rendezvous: str) -> None:
    from torch.distributed.fsdp import fully_shard

    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fully_shard(model[1], mesh=mesh)
        with pytest.raises(BodyError, match=r"1\.weight: is sharded over processes \(fully_shard"):
            attach(model, body=model[1])
        assert attach(model, body=model[0], sketch_size=16).width  # what is whole can be captured beside it
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_two_processes(tmp_path: Path) -> None:
    mp.start_processes(sharded, args=(str(tmp_path / "rendezvous"),), nprocs=2, start_method="spawn")
    assert torch.distributed.is_initialized() is False
