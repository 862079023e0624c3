"""Every rule for owners names all whose elements reach a result, whatever form its function is called in: held against
the derivatives of each element of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import zoo
from stepinfluence import LayoutError, attach
from stepinfluence.capture.owners import RULES, Follower, Memory, Owners
from stepinfluence.capture.owners.calls import LOOKED_INTO, changes_in_place, undispatched
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from zoo import Core, D, linear

EXAMPLES = 4
S = (4, 3, 2)
Q = torch.tensor([0.1, 0.2, 0.5, 0.7], dtype=torch.float64)
AT, ORDER, PAIRS = torch.tensor(1), torch.tensor([2, 0, 3, 1]), torch.tensor([[0, 1], [1, 0]])
KEPT, ALL = torch.tensor([True, False, True, True]), slice(None)
INDICES: dict[str, Any] = {
    "one": (ALL, AT), "one, the new dimension first": (None, ALL, AT), "one, the new dimension last": (AT, ALL, None),
    "one, the new dimension between": (ALL, None, AT), "one behind dots": (None, ..., AT),
    "a whole number of numpy": (None, ALL, np.int64(1)), "an order": ORDER,
    "an order behind a new dimension": (None, ORDER), "an order of the second": (ALL, ORDER),
    "an order and a new dimension": (None, ALL, ORDER), "pairs": (ALL, PAIRS),
    "an order and one": (ORDER, ALL, AT), "two orders": (ORDER, ORDER), "a list": [2, 0, 3, 1],
    "a list of a slice and an order": [ALL, ORDER], "a list of two slices": [ALL, slice(1, 3)],
    "a list of two orders": [ORDER, ORDER], "a list of lists": [[0, 1], [1, 0]], "a list of a slice and one": [ALL, AT],
    "a list of a slice and a number": [ALL, 1], "a list with dots": [..., 1],
    "a list with a new dimension": [None, ALL], "a mask": KEPT, "a mask of the second": (ALL, KEPT),
    "a mask behind a new dimension": (None, KEPT),
    "lists of truth values": [True, False, True, True], "an array": np.array([1, 0, 3, 2]),
}  # fmt: skip
"""Of a tensor (4, 4, 3)."""
Case: TypeAlias = tuple[Callable[..., Any], Sequence[tuple[int, ...]]]

CASES: dict[str, Case] = {
    "maximum by name": (lambda x, y: torch.max(x, other=y), (S, S)),
    "maximum of all": (torch.max, (S,)),
    "sum": (lambda x: x.sum(0), (S,)),
    "sum by names": (lambda x: torch.sum(input=x, dim=1, keepdim=True), (S,)),
    "sorted": (lambda x: torch.sort(x, 0), (S,)),
    "sorted along the first": (torch.msort, (S,)),
    "differences": (lambda x, y: torch.diff(x, dim=1, prepend=y), (S, S)),
    "differences by place": (lambda x, y, z: torch.diff(x, 1, 0, y, z), (S, S, S)),
    "quantile": (lambda x: torch.quantile(x, 0.3, 1), (S,)),
    "quantiles along the first": (lambda x: x.quantile(Q, 0), (S,)),
    "quantiles along the second": (lambda x: torch.quantile(x, Q, 1), (S,)),
    "quantiles, kept": (lambda x: torch.nanquantile(x, q=Q, dim=-1, keepdim=True), (S,)),
    "quantiles of all": (lambda x: x.quantile(Q), (S,)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (2,), w, b), (S, (2,), (2,))),
    "layer norm by names": (lambda x, w: F.layer_norm(x, normalized_shape=(3, 2), weight=w), (S, (3, 2))),
    "RMS norm": (lambda x, w: F.rms_norm(x, (2,), w), (S, (2,))),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((4, 2, 3), (2,), (2,))),
    "batch norm, fixed": (
        lambda x, w, b: F.batch_norm(x, torch.zeros(2).double(), torch.ones(2).double(), w, b), ((4, 2, 3), (2,), (2,))
    ),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), ((4, 2, 3), (2,), (2,))),
    "PReLU": (F.prelu, ((4, 2, 3), (2,))),
    "patches": (lambda x: F.unfold(x, (1, 3)), ((4, 2, 1, 5),)),
    "patches of one": (lambda x: F.unfold(x, (1, 3)), ((2, 1, 5),)),
    "patches put together": (lambda x: F.fold(x, (1, 5), (1, 3)), ((4, 6, 3),)),
    "windows": (lambda x: x.unfold(1, 2, 1), (S,)),
    "product by name": (lambda x, y: torch.bmm(mat2=y, input=x), ((4, 2, 3), (4, 3, 2))),
    "product from the right": (lambda x, y: x.__rmatmul__(y), ((3, 2), (4, 3))),
    "added product by names": (
        lambda b, x, y: b.baddbmm(batch2=y, batch1=x, beta=0.5), ((4, 1, 2), (4, 5, 3), (4, 3, 2))
    ),
    "added product": (torch.addmm, ((2,), (4, 3), (3, 2))),
    "added sum of products": (torch.addbmm, ((2, 2), (4, 2, 3), (4, 3, 2))),
}  # fmt: skip


def read(index: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x[index]


def written(index: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def write(x: Tensor, y: Tensor) -> Tensor:
        z = x * 1
        z[index] = y.flip(0)[index]
        return z

    return write


W = (4, 4, 3)
CASES |= {f"picked: {name}": (read(index), (W,)) for name, index in INDICES.items()}
CASES |= {f"written: {name}": (written(index), (W, W)) for name, index in INDICES.items()}


class Following(TorchFunctionMode):
    """Follows every call, as a capture does."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self.follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        body = undispatched(func) if getattr(func, "__module__", None) in LOOKED_INTO else None
        if body is not None and not self.follower.has_rule(func):
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.follower.follow(func, args, kwargs, result, given, in_place=changes_in_place(func, kwargs))
        return result


def owners_of(shape: tuple[int, ...], style: str, seed: int) -> Tensor:
    """An example for each element: by its place in one dimension, one for all, or at random."""
    if style == "random":
        return torch.randint(EXAMPLES, shape, generator=torch.Generator().manual_seed(seed))
    dim = {"first dimension": 0, "second dimension": 1}.get(style, len(shape))
    if dim >= len(shape):
        return torch.full(shape, seed % EXAMPLES)
    sizes = [shape[d] if d == dim else 1 for d in range(len(shape))]
    return (torch.arange(shape[dim]) % EXAMPLES).view(sizes).expand(shape).contiguous()


@pytest.mark.parametrize("style", ["first dimension", "second dimension", "one", "random"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_nobody_is_left_out(name: str, style: str, once: bool) -> None:
    """``once``: owners are kept once along dimensions on which they do not depend."""
    call, shapes = CASES[name]
    torch.manual_seed(len(name))
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    whose = [owners_of(shape, style, k) for k, shape in enumerate(shapes)]
    follower, given = Follower(RULES, EXAMPLES, Memory()), [v * 1 for v in values]
    for tensor, owners in zip(given, whose, strict=True):
        noted = Owners(tuple(owners.shape), owners, owners)
        follower.note(tensor, noted.compressed() if once else noted, tapped=True)
    with Following(follower):
        results = [r for r in pytree.tree_leaves(call(*given)) if isinstance(r, Tensor) and r.requires_grad]
    assert results
    for result in results:
        found = follower.owners(result)
        assert found is not None
        low, high = (e.expand(result.shape).flatten().tolist() for e in (found.lo, found.hi))
        if found.along is not None:
            numbers = torch.arange(result.shape[found.along]).view([-1] + [1] * (result.dim() - 1))
            assert low == high == numbers.movedim(0, found.along).expand(result.shape).flatten().tolist()
        for place, element in enumerate(result.flatten()):
            slopes = torch.autograd.grad(element, values, retain_graph=True, allow_unused=True)
            pairs = [(g, w) for g, w in zip(slopes, whose, strict=True) if g is not None]
            reached = torch.cat([w[g != 0] for g, w in pairs]).tolist()
            assert all(low[place] <= example <= high[place] for example in reached)


LATE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "layer norm": lambda s, x, other: F.layer_norm(x, (D,), other.mean((0, 1))),
    "RMS norm": lambda s, x, other: F.rms_norm(x, (D,), other.mean((0, 1))),
    "PReLU": lambda s, x, other: F.prelu(x.mT, other.mean((0, 1))).mT,
    "differences": lambda s, x, other: torch.diff(x, dim=1, prepend=other[:, :1]),
    "maximum": lambda s, x, other: torch.max(x, other=other),
}


@pytest.mark.parametrize("name", LATE)
def test_examples_that_meet_by_another_operand_in_a_later_batch(name: str) -> None:
    """Nothing is exchanged in the first batch, which is verified."""

    def forward(core: Any, x: Tensor) -> Tensor:
        y = core.mix(x)
        return LATE[name](core, y, y.flip(0) if x.shape[1] == 5 else y.detach().mean() + 0 * y.detach()).tanh()

    capture = attach(zoo.Looped(Core(forward, mix=linear())), body="core", sketch_size=16)
    capture.featurize([zoo.make_batch(3, 4)], zoo.squared_error)
    with pytest.raises(LayoutError):
        capture.featurize([zoo.make_batch(3, 4), zoo.make_batch(3, 5)], zoo.squared_error)
