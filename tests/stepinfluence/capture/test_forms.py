"""The same uses in other forms of the call: by names, in place, of one example, with the dtype or shape of the data,
with sparse gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import UnsupportedUseError, attach
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import MAX_TOKENS, Core, D, linear, normal


def copied(core: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y.copy_(core.p)
    y[:, 0].copy_(core.q)
    return (x + y).tanh()


def filled(core: Any, x: Tensor) -> Tensor:
    y = core.mix(x)
    y[:, 0].fill_(core.p)
    y.masked_fill_(x.detach() > 0.5, core.p)
    return y.tanh()


def put(core: Any, x: Tensor) -> Tensor:
    at = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)
    return core.mix(x).index_put_(at, core.p).index_put((at[0], at[1] + 1), core.q).tanh()


def bounded(core: Any, x: Tensor) -> Tensor:
    y = core.mix(x)
    y[:, :2].clamp_(max=core.p)
    return y.clamp_(-core.q.exp(), core.q.exp())


def accumulated(core: Any, x: Tensor) -> Tensor:
    y = x.mean(1) * 1
    y.addmm_(x[:, 0], core.p, alpha=2)
    return x + y.tanh().unsqueeze(1)


def gated(core: Any, x: Tensor) -> Tensor:
    """A matrix for each head, as RecurrentGemma has its gates."""
    heads = x.reshape(-1, 2, D // 2).transpose(0, 1)
    gates = torch.baddbmm(core.b[:, None], heads, core.w)
    more = torch.baddbmm(core.b[:, None], batch2=core.w, batch1=heads, beta=0.5, alpha=2)
    last = torch.baddbmm(core.b[:, None], heads, core.w, beta=0)
    return (gates * more + last).transpose(0, 1).reshape(x.shape).tanh()


def patched(core: Any, x: Tensor) -> Tensor:
    """Windows of tokens by ``F.unfold``, as ConvBERT has them."""
    return core.mix(F.unfold(x.mT[:, :, None], (1, 3), padding=(0, 1)).mT).tanh()


FORMS: dict[str, Callable[[], nn.Module]] = {
    "product by names": lambda: Core(lambda s, x: torch.mul(other=s.p, input=x).tanh(), p=normal(D)),
    "choice by names": lambda: Core(
        lambda s, x: torch.where(condition=x > 0, input=x * s.p, other=s.q).tanh(), p=normal(D), q=normal(D)
    ),
    "mixture by names": lambda: Core(lambda s, x: torch.lerp(input=x, end=x.flip(1), weight=s.p), p=normal(D)),
    "expanded by name": lambda: Core(
        lambda s, x: (x * torch.broadcast_to(input=s.p, size=x.shape)).tanh(), p=normal(D)
    ),
    "data by names": lambda: Core(
        lambda s, x: s.mix(torch.bmm(input=x, mat2=torch.bmm(mat2=x, input=x.mT)).tanh()).tanh(), mix=linear()
    ),
    "dtype of the data": lambda: Core(
        lambda s, x: (x @ s.p.to(x) * s.q.type_as(x)).tanh(), p=normal(D, D), q=normal(D)
    ),
    "shape of the data": lambda: Core(
        lambda s, x: (x * s.p.view_as(x[0, 0]) + s.q.reshape_as(x[:1, :1])).tanh(), p=normal(1, D), q=normal(D)
    ),
    "a constant in the dtype of the data": lambda: Core(
        lambda s, x: (x + s.mix(s.codes[: x.shape[1]].to(x)) + (torch.eye(D).type_as(x) @ s.p)[0]).tanh(),
        mix=linear(), p=normal(D, D), codes=torch.arange(MAX_TOKENS * D).view(-1, D) / 9
    ),
    "broadcast together": lambda: Core(
        lambda s, x: torch.mul(*torch.broadcast_tensors(x, s.p)).tanh(), p=normal(D)
    ),
    "copied in place": lambda: Core(copied, p=normal(D), q=normal(D)),
    "copied in place, checkpointed": lambda: Core(
        lambda s, x: checkpoint(copied, s, x, use_reentrant=False), p=normal(D), q=normal(D)
    ),
    "filled in place": lambda: Core(filled, p=normal(), mix=linear()),
    "put in place": lambda: Core(put, p=normal(D), q=normal(D), mix=linear()),
    "bounded in place": lambda: Core(bounded, p=normal(D), q=normal(D), mix=linear()),
    "product added in place": lambda: Core(accumulated, p=normal(D, D)),
    "products of heads, added": lambda: Core(gated, w=normal(2, D // 2, D // 2), b=normal(2, D // 2)),
    "convolution of one example": lambda: Core(
        lambda s, x: torch.stack([s.conv(row.mT).mT for row in x]).tanh(), conv=nn.Conv1d(D, D, 3, padding=1, groups=2)
    ),
    "transposed convolution of one example": lambda: Core(
        lambda s, x: torch.stack([s.conv(row.mT).mT for row in x]).tanh(), conv=nn.ConvTranspose1d(D, D, 3, padding=1)
    ),
    "patches": lambda: Core(patched, mix=nn.Linear(3 * D, D)),
    "sorted tokens": lambda: Core(lambda s, x: s.mix(torch.msort(x.transpose(0, 1)).transpose(0, 1)), mix=linear()),
    "sparse positions": lambda: Core(
        lambda s, x: (x + s.t(torch.arange(x.shape[1]))).tanh(), t=nn.Embedding(MAX_TOKENS, D, sparse=True)
    ),
    "sparse lookup": lambda: Core(lambda s, x: (x + s.t(x.argmax(-1))).tanh(), t=nn.Embedding(D, D, sparse=True)),
    "sparse bag": lambda: Core(
        lambda s, x: (x + s.t(torch.arange(4).view(2, 2)).sum(0)).tanh(), t=nn.EmbeddingBag(5, D, sparse=True)
    ),
    "sparse gather": lambda: Core(
        lambda s, x: x + torch.gather(s.t, 0, x.argsort(-1).flatten(0, 1), sparse_grad=True).view_as(x), t=normal(D, D)
    ),
    "product with a sparse constant": lambda: Core(
        lambda s, x: (x + torch.sparse.mm(torch.eye(D).to(x).to_sparse(), s.t)[0]).tanh(), t=normal(D, D)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str) -> None:
    torch.manual_seed(len(name))
    model = zoo.Looped(FORMS[name]()).double()
    compare(model, [zoo.make_batch(b, t, dtype=torch.float64) for b, t in ((3, 4), (1, 4), (5, 5))])


def test_a_parameter_that_is_written_to_is_refused() -> None:
    capture = attach(zoo.Looped(Core(lambda s, x: (s.p * 1).copy_(x[0, 0]) * x, p=normal(D))), body="core")
    with pytest.raises(UnsupportedUseError, match=r"core\.p:.*writes to a tensor in place"):
        capture.featurize([zoo.make_batch(3)], zoo.squared_error)


def test_a_sparse_tensor_of_parameters_is_refused_where_it_meets_the_data() -> None:
    def forward(core: Any, x: Tensor) -> Tensor:
        return torch.sparse.mm(core.p.to_sparse(), x.flatten(0, 1).T).T.reshape(x.shape)

    capture = attach(zoo.Looped(Core(forward, p=normal(D, D))), body="core")
    with pytest.raises(UnsupportedUseError, match=r"core\.p:.*to_dense\(\)"):
        capture.featurize([zoo.make_batch(3)], zoo.squared_error)


@pytest.mark.parametrize("by", ["data", "position"])
def test_a_training_step_with_sparse_gradients(by: str) -> None:
    """The step keeps the layout that its optimizer asks for where rows are looked up by the data."""

    def forward(core: Any, x: Tensor) -> Tensor:
        return (x + core.t(x.argmax(-1) if by == "data" else torch.arange(x.shape[1]))).tanh()

    model = zoo.Looped(Core(forward, t=nn.Embedding(MAX_TOKENS, D, sparse=True))).double()
    batch = zoo.make_batch(3, dtype=torch.float64)
    capture = attach(model, body="core", sketch_size=16)
    with capture.inline(batch) as step:
        step.losses(zoo.squared_error(model, batch)).mean().backward()
    expected = capture.featurize([batch], zoo.squared_error, per_step=False).values
    assert torch.allclose(step.features.values, expected, rtol=1e-10, atol=1e-12)
    grad = model.core.t.weight.grad
    assert grad is not None
    assert grad.is_sparse
