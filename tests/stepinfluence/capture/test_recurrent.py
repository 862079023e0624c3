"""Recurrent layers with every option of theirs, and cells."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import UnsupportedUseError, attach
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import D

BATCHES = [zoo.make_batch(size, tokens, seed=size, dtype=torch.float64) for size, tokens in ((3, 4), (2, 3), (1, 4))]


def fitted(y: Tensor) -> Tensor:
    """The first D features, or as many with zeros behind them."""
    return y[..., :D] if y.shape[-1] >= D else F.pad(y, (0, D - y.shape[-1]))


def over_tokens(core: Any, x: Tensor) -> Tensor:
    out, _ = core.layer(x if core.layer.batch_first else x.transpose(0, 1))
    return fitted(out if core.layer.batch_first else out.transpose(0, 1))


def last_state(core: Any, x: Tensor) -> Tensor:
    """The state after the last token, of a layer that was given one to begin with."""
    start = x[:, 0].tanh().expand(core.layer.num_layers * (1 + core.layer.bidirectional), -1, -1)
    kept = getattr(core.layer, "proj_size", 0) or D
    given = (start[..., :kept].contiguous(), start.contiguous()) if isinstance(core.layer, nn.LSTM) else start
    _, state = core.layer(x if core.layer.batch_first else x.transpose(0, 1), given)
    states = state if isinstance(core.layer, nn.LSTM) else (state,)
    return x + sum(fitted(s).mean(0) for s in states).unsqueeze(1)


OPTIONS = [
    {"bias": bias, "num_layers": layers, "bidirectional": two_ways, "batch_first": first}
    for bias, layers, two_ways, first in itertools.product((True, False), (1, 2), (False, True), (True, False))
]


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items() if v not in (False, 1))


@pytest.mark.parametrize("fn", [over_tokens, last_state])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_layers(kind: Any, options: dict[str, Any], fn: Any) -> None:
    torch.manual_seed(1)
    result = compare(
        zoo.Looped(zoo.Core(fn, layer=kind(D, D, **options)), steps=2).double(), BATCHES, exact=options["bias"]
    )
    assert result.capture.owners == "followed"


def sequence_by_sequence(core: Any, x: Tensor) -> Tensor:
    """A sequence alone has no dimension of examples, whatever ``batch_first`` says."""
    found = []
    for row in x:
        start = row[0].tanh().expand(core.layer.num_layers * (1 + core.layer.bidirectional), D).contiguous()
        out, state = core.layer(row, (start, start.sin()) if isinstance(core.layer, nn.LSTM) else start)
        end = state[0] if isinstance(state, tuple) else state
        found.append(fitted(out) + fitted(end).mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=name)
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_sequences_without_a_dimension_of_examples(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    core = zoo.Core(sequence_by_sequence, layer=kind(D, D, **options))
    result = compare(zoo.Looped(core, steps=2).double(), BATCHES)
    assert result.capture.owners == "followed"


@pytest.mark.parametrize("fn", [over_tokens, last_state])
@pytest.mark.parametrize("options", OPTIONS[::3], ids=name)
@pytest.mark.parametrize("size", [1, 4])
def test_projections(size: int, options: dict[str, Any], fn: Any) -> None:
    torch.manual_seed(2)
    layer = nn.LSTM(D, D, proj_size=size, **options)
    compare(zoo.Looped(zoo.Core(fn, layer=layer), steps=2).double(), BATCHES, exact=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell, lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)]
)
def test_cells(kind: Any, bias: bool) -> None:
    def forward(core: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        new = core.cell(flat, (flat.tanh(), flat.sin()) if isinstance(core.cell, nn.LSTMCell) else flat.tanh())
        return (new[0] + new[1] if isinstance(new, tuple) else new).view_as(x)

    torch.manual_seed(3)
    result = compare(zoo.Looped(zoo.Core(forward, cell=kind(D, D, bias=bias))).double(), BATCHES)
    assert result.capture.owners == "followed"


def packed(core: Any, x: Tensor) -> Tensor:
    given = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
    out, _ = nn.utils.rnn.pad_packed_sequence(core.layer(given)[0], batch_first=True)
    return out


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_what_is_refused_names_the_option(kind: Any) -> None:
    for fn, options, why in (
        (packed, {"batch_first": True}, "packed sequences; pass padded ones"),
        (over_tokens, {"num_layers": 2, "dropout": 0.5}, "dropout= between its layers in training mode"),
    ):
        model = zoo.Looped(zoo.Core(fn, layer=kind(D, D, **options))).double()
        with pytest.raises(UnsupportedUseError, match=rf"core\.layer\.weight_ih_l0, .*{why}") as caught:
            attach(model, body="core", training=True, sketch_size=8).featurize(BATCHES, zoo.squared_error)
        assert "\n" not in str(caught.value)


def test_dropout_between_layers_is_nothing_in_eval_mode() -> None:
    torch.manual_seed(4)
    layer = nn.GRU(D, D, 2, dropout=0.5, batch_first=True)
    compare(zoo.Looped(zoo.Core(over_tokens, layer=layer), steps=2).double(), BATCHES)
