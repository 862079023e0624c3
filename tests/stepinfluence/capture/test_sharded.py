"""Models that FSDP2 has sharded over processes: the same features as of the whole model, from every process's own
batches, and one line for what cannot be done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from stepinfluence import BodyError, Capture, ExactCapture, Features, UnsupportedUseError, attach
from stepinfluence.capture.pairs import PairCapture
from stepinfluence.capture.sharded.gathered import _groups_of
from stepinfluence.models import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor, nn

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

TOLERANCE = 1e-6
CONFIG = LoopedGPTConfig(
    vocab_size=31, d_model=16, n_heads=2, sequence_len=8, n_prelude=1, n_core=2, n_coda=1, steps=2, norm="layernorm"
)


def make() -> LoopedGPT:
    torch.manual_seed(0)
    return LoopedGPT(CONFIG).eval()


def checkpoint_blocks(model: LoopedGPT) -> LoopedGPT:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for k, block in enumerate(model.core.blocks):
        model.core.blocks[k] = checkpoint_wrapper(block)
    return model


def batches(rank: int, count: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    tokens = [torch.randint(CONFIG.vocab_size, (3, 9), generator=generator) for _ in range(count)]
    return [{"tokens": t[:, :-1], "targets": t[:, 1:]} for t in tokens]


def featurize(model: nn.Module, data: list[Any], loss: Any = gpt_loss, **options: Any) -> tuple[Capture, Features]:
    capture = attach(model, body="core", sketch_size=32, **options)
    return capture, capture.featurize(data, loss)


def sharded(mesh: Any, *, units: str = "blocks", checkpointed: bool = False, **options: Any) -> LoopedGPT:
    from torch.distributed.fsdp import fully_shard

    model = checkpoint_blocks(make()) if checkpointed else make()
    for block in (*model.prelude, *model.core.blocks, *model.coda) if units == "blocks" else [model.core]:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def check(found: Features, expected: Features) -> None:
    """Equal but for torch's rounding; columns, names and digests of weights are those of the whole model."""
    assert found.space == expected.space
    assert torch.allclose(found.losses, expected.losses, rtol=TOLERANCE, atol=0)
    error = (found.values - expected.values).flatten(1).norm(dim=1)
    assert bool((error <= TOLERANCE * expected.values.flatten(1).norm(dim=1)).all()), float(error.max())
    assert found.ids == expected.ids
    assert torch.equal(found.steps, expected.steps)
    assert float(expected.values.norm()) > 0


def checks(rank: int, mesh: Any, grid: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    halves = grid["half"]
    _, expected = featurize(make(), batches(rank))
    for options in (
        {"reshard_after_forward": True},
        {"mesh": halves, "reshard_after_forward": False},
        {"units": "core", "checkpointed": True},
        {"mesh": grid, "checkpointed": True},
    ):
        model = sharded(**{"mesh": mesh, **options})
        hooks = {m: list(m._forward_pre_hooks.values()) for m in model.modules()}
        capture, found = featurize(model, batches(rank))
        check(found, expected)
        assert (capture.owners, capture._ledger.verified) == ("followed", 1)
        assert all(hasattr(p, "device_mesh") and p.grad is None for p in model.parameters())
        assert hooks == {m: list(m._forward_pre_hooks.values()) for m in model.modules()}

    # It can be asked again, and the model trains on as if nothing had been.
    check(capture.featurize(batches(rank), gpt_loss), expected)
    gpt_loss(model, batches(rank)[0]).mean().backward()
    assert all(p.grad is not None for p in model.parameters())

    model = sharded(mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    _, found = featurize(model, batches(rank))
    _, half = featurize(make().bfloat16(), batches(rank))
    assert found.space.weights == expected.space.weights != half.space.weights
    assert torch.equal(found.values, half.values)


def uneven(rank: int, mesh: Any) -> None:
    """Processes with few batches wait for those with more; the last batch of one may be a single example."""
    data = batches(rank, 1 + rank)
    if rank == 1:
        data[-1] = {name: value[:1] for name, value in data[-1].items()}
    _, expected = featurize(make(), data)
    _, found = featurize(sharded(mesh), data)
    check(found, expected)


class Forms(nn.Module):
    """Uses parts of parameters, a product of two, and a function of one."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.gain = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fused.chunk(2)
        x = (x @ first.t() + nn.functional.linear(x, second)).tanh()
        return (x + x @ (self.a @ self.b)) * self.gain.exp()


def forms(rank: int, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square()  # type: ignore[no-any-return]

    def built() -> Around:
        torch.manual_seed(0)
        return Around(Forms())

    x = [torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))]
    _, expected = featurize(built(), x, loss)
    model = built()
    fully_shard(model.core, mesh=mesh)
    capture, found = featurize(fully_shard(model, mesh=mesh), x, loss)
    check(found, expected)
    assert all(t.parameter._base is None for t in capture.targets)  # so that a view of it is known as its part


class TwoWays(nn.Module):
    """Enters its two parts in an order that the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, swapped: bool) -> Tensor:
        parts = (self.other, self.one) if swapped else (self.one, self.other)
        return parts[1](parts[0](x).tanh())


class Writes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]


class Around(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.core(self.core(x, *more), *more).sum(1)  # type: ignore[no-any-return]


def no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise ValueError("no loss today")


def refusals(rank: int, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    x = torch.randn(3, 4)
    model = Around(TwoWays())
    for part in (model.core.one, model.core.other):
        fully_shard(part, mesh=mesh)  # type: ignore[arg-type]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch, rank % 2 == 0)  # type: ignore[no-any-return]

    with pytest.raises(BodyError, match="its processes entered different modules"):
        featurize(model, [x], loss)
    _, found = featurize(model, [x], lambda model, batch: model(batch, False))  # and can be used again
    assert float(found.values.norm()) > 0

    capture = attach(sharded(mesh), body="core", sketch_size=32)
    for what, call in (
        ("ExactCapture", lambda: ExactCapture(capture.model, body="core")),
        ("capture.inline", lambda: capture.inline(batches(0)[0])),
        ("exact influence of pairs", lambda: PairCapture(capture)),
    ):
        with pytest.raises(BodyError, match=f"sharded over processes, which {what} cannot handle"):
            call()  # type: ignore[no-untyped-call]

    for kind, error, message in (
        (Writes, BodyError, "its forward pass changes weights that are sharded"),
        (Custom, UnsupportedUseError, "cannot be followed through"),
    ):
        torch.manual_seed(0)
        changed = Around(kind(4, 4))
        fully_shard(changed.core, mesh=mesh)
        with pytest.raises(error, match=message):
            featurize(changed, [x], lambda model, batch: model(batch))

    # A parameter that is reached for from outside of its module is another tensor there.
    outside = Around(nn.Linear(4, 4))
    fully_shard(outside.core, mesh=mesh)

    def reaching(model: Any, batch: Tensor) -> Tensor:
        factor = model.core.bias.full_tensor().sum()
        return model(batch) * factor  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedUseError, match=r"core\.bias: reaches the loss through"):
        featurize(outside, [x], reaching)
    capture = attach(outside, body="core", sketch_size=32)
    (group,) = _groups_of(outside.core._get_fsdp_state())
    group.fsdp_params[0]._unsharded_param = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(BodyError, match="its sharded parameters were made anew"):
        capture.featurize([x], lambda model, batch: model(batch))

    seen: list[Exception] = []
    failing = attach(sharded(mesh), body="core", sketch_size=32)
    with pytest.raises(ValueError, match="no loss today"):
        failing.featurize(batches(0), no_loss, on_error=seen.append)
    assert len(seen) == 1

    placed = Around(nn.Linear(4, 4))
    placed.core.weight = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)]))
    with pytest.raises(BodyError, match=r"core\.weight: is sharded over processes as a DTensor \(S\(0\)\)"):
        attach(placed, body="core")


def parallel(mesh: Any) -> LoopedGPT:
    """The model with attention and perceptrons of its blocks spread over processes, heads and all; sums are taken in
    another order, which float32 would show."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = make()
    for block in (*model.prelude, *model.core.blocks, *model.coda):
        attention = block.attention
        attention.config = replace(attention.config, n_heads=attention.config.n_heads // mesh.size())
        plan = {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan |= {"attention.proj": RowwiseParallel(), "mlp.fc": ColwiseParallel(), "mlp.proj": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return model


class Biased(nn.Module):
    """Two linear layers with biases, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.proj = nn.Linear(4, 8), nn.LayerNorm(4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.fc(self.norm(x)).tanh())  # type: ignore[no-any-return]


def biased() -> Around:
    torch.manual_seed(0)
    return Around(Biased()).double()


def tensor_parallel(rank: int, mesh: Any, fours: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    data = batches(7)
    _, expected = featurize(make().double(), data)
    for model in (parallel(mesh), checkpoint_blocks(parallel(mesh))):
        capture, found = featurize(model.double(), data)
        check(found, expected)
        assert (capture.owners, capture._ledger.verified) == ("followed", 1)
        assert all(p.grad is None and p.requires_grad for p in capture.model.parameters())

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square()  # type: ignore[no-any-return]

    x = [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)).double() for n in range(2)]
    styles: tuple[dict[str, Any], ...] = (
        {"core.fc": ColwiseParallel(), "core.proj": RowwiseParallel()},
        {
            "core.fc": ColwiseParallel(output_layouts=Replicate()),
            "core.proj": RowwiseParallel(input_layouts=Replicate()),
        },
    )
    _, expected = featurize(biased(), x, loss)
    for plan in styles:
        _, found = featurize(parallelize_module(biased(), fours, plan), x, loss)
        check(found, expected)

    plan = styles[0]
    with pytest.raises(BodyError, match="have different batches"):
        featurize(parallelize_module(biased(), fours, plan), [x[0] + rank], loss)
    with pytest.raises(ValueError, match="got 'sum', which a tensor-parallel model cannot have"):
        attach(parallelize_module(biased(), fours, plan), body="core", layout="sum")
    with pytest.raises(BodyError, match=r"core\.norm\.weight: is sharded over processes as a DTensor \(R\)"):
        attach(parallelize_module(biased(), fours, {"core.norm": SequenceParallel()}), body="core")
    for style in (ColwiseParallel(use_local_output=False), ColwiseParallel(input_layouts=Shard(0))):
        with pytest.raises(UnsupportedUseError, match=r"core\.fc: is spread over processes in a way"):
            featurize(parallelize_module(biased(), fours, {"core.fc": style}), x, loss)

    # A gain that every process applies to its own features: what it has of the gradient is a part.
    partly = biased()
    partly.core.fc = nn.Linear(4, 8).double()  # type: ignore[assignment]
    partly.core.proj = nn.Sequential(Scaled(), nn.Linear(8, 4)).double()  # type: ignore[assignment]
    plan = {"core.fc": ColwiseParallel(), "core.proj.1": RowwiseParallel()}
    with pytest.raises(BodyError, match=r"core\.proj\.0\.gain: its gradient differs between the processes"):
        featurize(parallelize_module(partly, fours, plan), x, loss)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def in_four_processes(rank: int) -> None:
    mesh = dist.init_device_mesh("cpu", (4,))
    grid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("which", "half"))
    halves = grid["half"]
    checks(rank, mesh, grid)
    uneven(rank, halves)
    forms(rank, halves)
    refusals(rank, halves)
    tensor_parallel(rank, halves, mesh)


@pytest.mark.slow
@needs_gloo
def test_in_several_processes(tmp_path: Path) -> None:
    together(in_four_processes, 4, tmp_path)


@pytest.mark.parametrize(
    ("name", "module", "what"),
    [
        ("FullyShardedDataParallel", "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
        ("DeepSpeedEngine", "deepspeed.runtime.engine", "DeepSpeed"),
        ("PipelineStage", "torch.distributed.pipelining.stage", "pipeline parallelism"),
    ],
)
def test_other_ways_are_refused(name: str, module: str, what: str) -> None:
    model = Around(nn.Linear(4, 4))
    kind = type(name, (Around,), {"__module__": module})
    with pytest.raises(BodyError, match=f"model: is spread over processes by {what}"):
        attach(kind(model), body=model.core)
    model.core.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(BodyError, match="DeepSpeed ZeRO-3"):
        attach(model, body=model.core)
