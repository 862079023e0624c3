"""Reduced precision: autocast, half-precision models. The oracle runs in the same precision, one example at a time."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
import zoo
from compare import compare
from stepinfluence import attach
from torch import Tensor

pytestmark = pytest.mark.numeric


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # said of the plain model, too
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "layer norm", "rms norm", "hand-written rms norm", "fused qkv, output chunks",
                                  "x @ P", "scalar gate", "positions by arange", "weight norm", "Hugging Face Conv1D",
                                  "transformer layer, batch first", "LoRA merged"])  # fmt: skip
def test_autocast(name: str, dtype: torch.dtype) -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            out = model(batch["x"])
        return (out.float().squeeze(-1) - batch["y"]).square().mean(1)

    torch.manual_seed(1)
    model = zoo.Looped(zoo.LAYERS[name]())
    compare(model, [zoo.make_batch(3), zoo.make_batch(2)], loss_fn, precision=dtype)


@pytest.mark.parametrize("name", ["mlp", "layer norm", "rms norm", "functional rms norm", "hand-written layer norm",
                                  "fused qkv, output chunks", "per-channel scale", "P @ x"])  # fmt: skip
def test_bfloat16_model(name: str) -> None:
    torch.manual_seed(1)
    model = zoo.Looped(zoo.LAYERS[name]()).bfloat16()
    batches = [zoo.make_batch(b, dtype=torch.bfloat16) for b in (3, 2)]
    result = compare(model, batches, lambda m, b: zoo.squared_error(m, b).float())
    assert result.sketches.values.dtype == torch.float32


def test_float64_model_gives_float64_features() -> None:
    model = zoo.Looped(zoo.LAYERS["mlp"]()).double()
    result = compare(model, [zoo.make_batch(3, dtype=torch.float64)])
    assert result.sketches.values.dtype == torch.float64
    assert result.exact is not None
    assert result.exact.values.dtype == torch.float64


def test_some_parameters_in_double_precision() -> None:
    torch.manual_seed(1)
    core = zoo.Core(lambda s, x: s.mix((x * s.scale).float()).tanh(), scale=zoo.normal(zoo.D), mix=zoo.linear())
    core.scale.data = core.scale.data.double()
    result = compare(zoo.Looped(core), [zoo.make_batch(3)], precision=torch.float32)
    assert result.sketches.values.dtype == torch.float64


def test_autocast_around_featurize_with_checkpointing() -> None:
    """Autocast is switched on outside, and again by the recomputation."""
    models = []
    for where in (None, "step"):
        torch.manual_seed(2)
        models.append(loops.Injected(checkpointed=where))
    values = []
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = attach(model, body="core", sketch_size=64).featurize([zoo.make_batch(3)], zoo.squared_error)
        values.append(features.values)
    assert torch.equal(*values)
