"""How much temporary memory a call may use."""

from __future__ import annotations

import torch

WORKSPACE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""Upper limit of temporary memory of one sketch call, by device type; larger inputs are worked off in chunks. On the
CPU it is small so that a chunk stays in cache. One example's share of a single token can exceed it only where
``m`` alone does (32 bytes per bucket)."""


def workspace_bytes(device: torch.device) -> int:
    return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"])
