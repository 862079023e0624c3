"""Rows picked by the data keep their examples: experts, compaction, packing. No shape tells whose rows they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import LayoutError, attach
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import Core, D, linear, normal

pytestmark = pytest.mark.numeric


class Experts(nn.Module):
    """Each token goes to one of three experts and is weighted by the gate's confidence."""

    def __init__(self, how: str, *, expert: str = "linear", recompute: bool = False) -> None:
        super().__init__()
        make = {
            "linear": linear,
            "mlp": lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 9), nn.GELU(), nn.RMSNorm(9), nn.Linear(9, D)),
            "vectors": lambda: Core(lambda s, x: (x * s.a + s.b).tanh() * s.c, a=normal(D), b=normal(1, D), c=normal()),
            "matmul": lambda: Core(lambda s, x: torch.addmm(s.b, x @ s.p, s.q.T).tanh(), p=normal(D, D), q=normal(D, D),
                                   b=normal(D)),
        }[expert]  # fmt: skip
        self.gate, self.how, self.recompute = nn.Linear(D, 3), how, recompute
        self.experts = nn.ModuleList(make() for _ in range(3))

    def run(self, k: int, rows: Tensor) -> Tensor:
        if self.recompute:
            out: Tensor = checkpoint(self.experts[k], rows, use_reentrant=False)
            return out
        return self.experts[k](rows)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weight, choice = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        if self.how == "sort":
            ordered, permutation = choice.sort(stable=True)
            parts = flat[permutation].split([int((ordered == k).sum()) for k in range(3)])
            done = torch.cat([self.run(k, part) for k, part in enumerate(parts)])
            out = torch.empty_like(done).index_copy(0, permutation, done)
        for k in range(3 if self.how != "sort" else 0):
            chosen = choice == k
            index = chosen.nonzero().squeeze(1)
            if self.how == "mask":
                out[chosen] = self.run(k, flat[chosen])
            elif self.how == "index":
                out = out.index_add(0, index, self.run(k, flat[index]))
            elif self.how == "index_select":
                out.index_add_(0, index, self.run(k, flat.index_select(0, index)))
            else:
                mask = chosen.view(x.shape[:2])
                out.view(x.shape)[mask] = self.run(k, x[mask])
        return (out * weight.unsqueeze(-1)).view_as(x)


def compacted(core: Any, x: Tensor) -> Tensor:
    """Only the examples still active go on; the others keep their state."""
    active = x[:, 0, 0] > 0
    return x.index_add(0, active.nonzero().squeeze(1), core.mix(core.norm(x[active])).tanh())


def packed(core: Any, x: Tensor) -> Tensor:
    """The tokens with a positive first feature in one long row, as unpadding does."""
    mask = x[..., 0] > 0
    return x.masked_scatter(mask.unsqueeze(-1), core.mix(x[mask]).tanh())


def looked_up(core: Any, x: Tensor) -> Tensor:
    ids = (x.detach()[..., 0] > 0).long() + (x.detach()[..., 1] > 0).long()
    mask = x.detach()[..., 2] > 0
    return x.index_put((mask,), core.table(ids[mask])) + x.tanh()


def batches(dtype: torch.dtype, *sizes: tuple[int, int]) -> list[dict[str, Tensor]]:
    return [zoo.make_batch(b, t, seed=k, dtype=dtype) for k, (b, t) in enumerate(sizes)]


SIZES = [(3, 4), (4, 4), (2, 5), (1, 4), (6, 2)]
HOW = ["mask", "index", "index_select", "mask of two dimensions", "sort"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", HOW)
def test_experts(how: str, dtype: torch.dtype, verify: bool) -> None:
    torch.manual_seed(1)
    compare(zoo.Looped(Experts(how)).to(dtype), batches(dtype, *SIZES), verify=verify)


@pytest.mark.parametrize("expert", ["mlp", "vectors", "matmul"])
def test_what_experts_are_made_of(expert: str) -> None:
    torch.manual_seed(3)  # every expert is picked
    compare(zoo.Looped(Experts("index", expert=expert)).double(), batches(torch.float64, *SIZES))


@pytest.mark.parametrize("how", ["index", "sort"])
def test_checkpointed_experts(how: str) -> None:
    models = []
    for recompute in (False, True):
        torch.manual_seed(3)
        models.append(zoo.Looped(Experts(how, expert="mlp", recompute=recompute)).double())
    compare(models[1], batches(torch.float64, *SIZES), plain=models[0])


@pytest.mark.parametrize("fn", [compacted, packed])
def test_examples_or_tokens_that_leave(fn: Any) -> None:
    torch.manual_seed(4)
    core = Core(fn, mix=linear(), norm=nn.LayerNorm(D))
    if fn is packed:
        core.norm.requires_grad_(False)
    compare(zoo.Looped(core).double(), batches(torch.float64, *SIZES))


def test_lookup_of_routed_tokens() -> None:
    torch.manual_seed(5)
    compare(zoo.Looped(Core(looked_up, table=nn.Embedding(3, D))).double(), batches(torch.float64, *SIZES))


def test_more_examples_than_one_digit_tells() -> None:
    torch.manual_seed(6)
    compare(zoo.Looped(Experts("index")), batches(torch.float32, (70, 3), (33, 2)))


def test_as_many_routed_rows_as_examples() -> None:
    """Nothing in the shapes gives it away."""

    def forward(core: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        order = flat[:, 0].argsort()[: len(x)]
        return flat.index_add(0, order, core.mix(flat[order])).view_as(x).tanh()

    # An example alone has one such row, so the oracle of single examples does not apply: exact gradients do.
    torch.manual_seed(7)
    model = zoo.Looped(Core(forward, mix=linear())).double()
    given = batches(torch.float64, (3, 4), (4, 3), (5, 5))
    compare(model, given, whole_batch=lambda _: None)
    compare(model, given, whole_batch=lambda _: None, verify=False)


def test_batch_second() -> None:
    torch.manual_seed(8)
    given = [{k: v.transpose(0, 1) for k, v in b.items()} for b in batches(torch.float64, (3, 4), (4, 4), (2, 5))]

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return (model(batch["x"]).squeeze(-1) - batch["y"]).square().mean(0)

    compare(zoo.Looped(Experts("index")).double(), given, loss_fn, batch_dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            out = model(batch["x"]).float()
        return (out.squeeze(-1) - batch["y"]).square().mean(1)

    torch.manual_seed(9)
    core = Core(lambda s, x: s.route(x) + x, route=Routed())
    compare(zoo.Looped(core), batches(torch.float32, (3, 4), (5, 4)), loss_fn, precision=dtype)


class Routed(nn.Module):
    """Routes by the sign of an input feature: the same in every precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        index = (flat.detach()[:, 0] > 0).nonzero().squeeze(1)
        return torch.zeros_like(flat).index_add(0, index, self.a(flat[index]).tanh().to(flat.dtype)).view_as(x)


def attended(core: Any, x: Tensor) -> Tensor:
    """Attention among routed rows, whoever they belong to."""
    flat = x.reshape(-1, D)
    rows = flat[flat[:, 0] > flat[:, 0].median()]
    return x + F.scaled_dot_product_attention(rows, rows, core.mix(rows)).mean(0)


def averaged(core: Any, x: Tensor) -> Tensor:
    """A little of all routed rows in each."""
    flat = x.reshape(-1, D)
    index = (flat[:, 0] > flat[:, 0].median()).nonzero().squeeze(1)
    rows = flat[index]
    return flat.index_add(0, index, core.mix(rows + 1e-2 * rows.mean(0))).view_as(x)


@pytest.mark.parametrize("fn", [attended, averaged])
def test_rows_that_several_examples_share_are_refused(fn: Any) -> None:
    torch.manual_seed(10)
    capture = attach(zoo.Looped(Core(fn, mix=linear())), body="core", sketch_size=32)
    with pytest.raises(LayoutError) as caught:
        capture.featurize([zoo.make_batch(4)], zoo.squared_error)
    assert "\n" not in str(caught.value)


def test_parameters_that_routed_rows_cannot_meet() -> None:
    def table(core: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        rows = flat[flat[:, 0].argsort()[:4]]
        return x + (rows * core.p).sum()

    def convolved(core: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        return x + core.conv(flat[flat[:, 0] > 0].unsqueeze(1)).mean()

    for core in (Core(table, p=normal(4, D)), Core(convolved, conv=nn.Conv1d(1, 1, 3))):
        with pytest.raises(
            LayoutError, match=r"core\.\S+: the gradient of a row changes with the losses of other"
        ) as caught:
            attach(zoo.Looped(core), body="core", sketch_size=32).featurize([zoo.make_batch(4)], zoo.squared_error)
        assert "\n" not in str(caught.value)


def test_scalar_on_a_routed_vector() -> None:
    def forward(core: Any, x: Tensor) -> Tensor:
        values = x[..., 0].reshape(-1)
        index = (values > 0).nonzero().squeeze(1)
        return x + torch.zeros_like(values).index_add(0, index, values[index] * core.s).view(*x.shape[:2], 1).tanh()

    torch.manual_seed(11)
    compare(zoo.Looped(Core(forward, s=normal())).double(), batches(torch.float64, *SIZES))
