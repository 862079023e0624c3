"""Tensors given to torch in named tuples and other classes of tuples and lists, and indices written as lists."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import LayoutError, attach
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import Core, D, linear, normal

pytestmark = pytest.mark.numeric


class State(NamedTuple):
    """As of a recurrent cell."""

    h: Tensor
    c: Tensor


Cache = namedtuple("Cache", ["keys", "values"])


class Bundle(tuple[Tensor, ...]):
    """A tuple that torch's pytrees know nothing of."""

    __slots__ = ()


class Rows(list[Tensor]):
    """Such a list."""


def stacked(core: Any, x: Tensor) -> Tensor:
    """Along a dimension of its own, which is first: no row for each example."""
    both = core.mix(torch.stack(State(x, x.sin()))).tanh()
    found: Tensor = (both[0] + x * both[1]) / 2
    return found


def side_by_side(core: Any, x: Tensor) -> Tensor:
    found: Tensor = core.wide(torch.cat(Cache(x, x.cos()), -1))
    return found.tanh()


def cached(core: Any, x: Tensor) -> Tensor:
    """Keys and values of a cache in one product, with the tokens first."""
    cache = Cache(core.mix(x).transpose(0, 1), x.transpose(0, 1))
    return torch.einsum("ktbd,ktbd->btd", torch.stack(cache), torch.stack(list(cache)[::-1])).tanh()


def unknown_tuple(core: Any, x: Tensor) -> Tensor:
    return core.mix(torch.stack(Bundle((x, 2 * x))).mean(0)).tanh()


def unknown_list(core: Any, x: Tensor) -> Tensor:
    rows = Rows(core.mix(x).unbind(0))
    return torch.stack(rows).tanh() + torch.cat(Rows((x, x))).unflatten(0, (2, -1)).sum(0) * core.gain


def sorted_parts(core: Any, x: Tensor) -> Tensor:
    """torch's own named tuples."""
    found = core.mix(x).max(-1)
    return (x * torch.stack([found.values, found.indices.to(x.dtype)]).sum(0).unsqueeze(-1)).tanh()


def of_parameters(core: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat(State(core.upper, core.lower))).tanh()


def parameter_and_data(core: Any, x: Tensor) -> Tensor:
    return torch.stack(Bundle((core.mix(x), core.gain.expand_as(x)))).prod(0).tanh()


def checkpointed(core: Any, x: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda y: stacked(core, y), x, use_reentrant=False)
    return found


def indexed_by_lists(core: Any, x: Tensor) -> Tensor:
    """To torch a list that holds slices or tensors is a tuple."""
    first = x.transpose(0, 1)
    back = torch.arange(len(x)).flip(0)
    y = core.mix(first[[slice(None), back]]).tanh()
    y = y[[slice(None), back]].transpose(0, 1)
    y[[..., 0]] += core.gain[0]
    return y


def picked_beside_a_new_dimension(core: Any, x: Tensor) -> Tensor:
    """As many dimensions as before, and the examples in another one."""
    last = torch.tensor(x.shape[1] - 1)
    y = core.mix(x[None, :, last])[0].unsqueeze(1)
    z = core.mix(x.transpose(0, 1)[last, :, None])
    return (x + y * z).tanh()


def core_of(fn: Callable[[Any, Tensor], Tensor]) -> Core:
    parts: dict[str, Any] = {"mix": linear(), "wide": torch.nn.Linear(2 * D, D), "gain": normal(D)}
    parts |= {"upper": normal(2, D), "lower": normal(D - 2, D)}
    named = fn.__code__.co_names + (stacked.__code__.co_names if fn is checkpointed else ())
    return Core(fn, **{name: part for name, part in parts.items() if name in named})


FORMS = [
    stacked, side_by_side, cached, unknown_tuple, unknown_list, sorted_parts, of_parameters, parameter_and_data,
    checkpointed, indexed_by_lists, picked_beside_a_new_dimension,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("form", FORMS)
def test_against_autograd(form: Callable[[Any, Tensor], Tensor]) -> None:
    """Batches of other sizes than tokens, and of the same."""
    torch.manual_seed(0)
    result = compare(
        zoo.Looped(core_of(form)).double(), [zoo.make_batch(size, 4, dtype=torch.float64) for size in (3, 4)]
    )
    assert result.capture.owners == "followed"


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_examples_exchanged_by_a_list_are_noticed_in_their_own_batch() -> None:
    """Nothing is exchanged in the first batch, which is verified."""

    def forward(core: Any, x: Tensor) -> Tensor:
        order = torch.arange(len(x))
        order = order.flip(0) if x.shape[1] == 5 else order
        y: Tensor = core.mix(x).transpose(0, 1)
        return y[[slice(None), order]].transpose(0, 1).tanh()

    capture = attach(zoo.Looped(Core(forward, mix=linear())), body="core", sketch_size=16)
    with pytest.raises(LayoutError):
        capture.featurize([zoo.make_batch(3, 4), zoo.make_batch(3, 5)], zoo.squared_error)
