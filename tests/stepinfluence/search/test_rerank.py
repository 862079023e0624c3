"""Exact influence from factors, against inner products of exact gradients, over the zoo of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import loops
import pytest
import torch
import zoo
from rounding import check_influence, measure_body
from stepinfluence import ExactCapture, LayoutError, LossError, attach, influence
from stepinfluence.attribution.preconditioners import Elementwise, Factored
from stepinfluence.capture import pairs
from stepinfluence.capture.pairs import PairRoute
from stepinfluence.search import rerank
from torch import Tensor, nn

# Two sides of different batch sizes and lengths.
TRAIN, QUERY = [(3, 4), (2, 5)], [(2, 3), (1, 4)]
FLOAT64 = 1e-12


def sides(dtype: torch.dtype = torch.float32) -> tuple[list[Any], list[Any]]:
    made = [
        [zoo.make_batch(b, t, seed=10 * side + k, dtype=dtype) for k, (b, t) in enumerate(sizes)]
        for side, sizes in enumerate((TRAIN, QUERY))
    ]
    return made[0], made[1]


def check(
    model: nn.Module,
    train: Sequence[Any],
    query: Sequence[Any],
    loss_fn: Any = zoo.squared_error,
    *,
    body: Any = "core",
    route: PairRoute = "auto",
    query_bytes: int = 1 << 30,
    **options: Any,
) -> Tensor:
    """Compare with ExactCapture; in float64, the error is relative to the product of the gradients' norms."""
    model.eval()
    exact = ExactCapture(model, body=body, **options)
    left, right = exact.featurize(train, loss_fn), exact.featurize(query, loss_fn)
    expected = influence(left, right).sdi
    found = rerank(
        attach(model, body=body, sketch_size=16, **options), loss_fn, train, query, route=route, query_bytes=query_bytes
    )
    assert found.sdi.shape == expected.shape
    assert found.sdi.dtype == expected.dtype
    assert (found.train_ids, found.query_ids) == (left.ids, right.ids)
    if expected.dtype == torch.float32:
        names = [block.name for block in left.space.blocks]
        rounding = [measure_body(model, side, loss_fn, model.get_submodule(body), names) for side in (train, query)]
        check_influence(found.sdi, [(1.0, rounding[0], rounding[1])], f"{route}:")
        return found.sdi
    scale = left.values.sum(1).norm(dim=1)[:, None, None] * right.values.norm(dim=2)
    error = (found.sdi - expected).abs() / scale.clamp(min=float(scale.max()) * 1e-6 + 1e-30)
    assert error.max() <= FLOAT64
    assert expected.abs().max() > 0
    return found.sdi


@pytest.mark.parametrize("name", zoo.LAYERS)
def test_every_kind_of_use(name: str) -> None:
    torch.manual_seed(len(name))
    check(zoo.Looped(zoo.LAYERS[name]()).double(), *sides(torch.float64))


@pytest.mark.numeric
@pytest.mark.parametrize("route", ["tokens", "gradients", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["mlp", "fused qkv, weight chunks", "LoRA merged", "tied embedding and head", "x @ P", "weight in three forms"],
)
def test_routes_agree(name: str, dtype: torch.dtype, route: PairRoute) -> None:
    torch.manual_seed(1)
    check(zoo.Looped(zoo.LAYERS[name]()).to(dtype), *sides(dtype), route=route)


@pytest.mark.numeric
@pytest.mark.parametrize("query_bytes", [1, 1 << 12])
def test_queries_in_several_groups(query_bytes: int) -> None:
    torch.manual_seed(2)
    check(zoo.Looped(zoo.LAYERS["mlp"]()), *sides(), query_bytes=query_bytes)


@pytest.mark.numeric
def test_gradients_a_few_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepinfluence.capture.pairs.GRADIENT_BYTES", 1)
    torch.manual_seed(3)
    check(zoo.Looped(zoo.LAYERS["mlp"]()), *sides(), route="gradients")


@pytest.mark.numeric
def test_the_cheaper_route_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens and wide layers by pairs of tokens; many tokens and narrow layers by gradients."""
    taken: list[str] = []
    for name in ("_add_by_tokens", "_add_by_gradients"):
        original = getattr(pairs.PairCapture, name)

        def watched(self: Any, *args: Any, name: str = name, original: Any = original) -> None:
            taken.append(name)
            original(self, *args)

        monkeypatch.setattr(pairs.PairCapture, name, watched)
    for width, tokens, expected in ((64, 1, "_add_by_tokens"), (4, 40, "_add_by_gradients")):
        model = nn.Sequential(nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()))
        batch = {"x": torch.randn(2, tokens, width), "y": torch.randn(2, tokens, width)}
        taken.clear()
        check(model, [batch], [batch], lambda m, b: (m(b["x"]) - b["y"]).square().flatten(1).mean(1), body="0")
        assert taken == [expected]


def test_loops() -> None:
    train, query = sides(torch.float64)
    torch.manual_seed(4)
    check(loops.Adapter().double(), train, query, body=["adapter", "block"])
    check(loops.Nested(shared=True).double(), train, query, body=["fast", "slow"], loop="timeline")
    check(loops.Injected(checkpointed="body").double(), train, query)
    counted = [{**b, "steps": n} for b, n in zip(query, (2, 4), strict=True)]
    counted_train = [{**b, "steps": n} for b, n in zip(train, (3, 1), strict=True)]
    found = check(loops.Injected().double(), counted_train, counted, loops.counted_error)
    assert found.shape[2] == 4
    assert not found[:, :2, 2:].any()


def test_rows_picked_by_the_data() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(zoo.D, zoo.D)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, zoo.D)
            index = (flat.detach()[:, 0] > 0).nonzero().squeeze(1)
            return torch.zeros_like(flat).index_add(0, index, self.a(flat[index]).tanh()).view_as(x) + x

    torch.manual_seed(5)
    check(zoo.Looped(Routed()).double(), *sides(torch.float64))


def test_batch_second() -> None:
    train, query = ([{k: v.transpose(0, 1) for k, v in b.items()} for b in side] for side in sides(torch.float64))
    torch.manual_seed(6)
    check(loops.SequenceFirstModel().double(), train, query, loops.sequence_first_error, batch_dim=1)


@pytest.mark.parametrize("route", ["tokens", "gradients"])
@pytest.mark.parametrize("kind", [Elementwise, Factored])
def test_under_a_metric(kind: Any, route: PairRoute) -> None:
    torch.manual_seed(7)
    model = zoo.Looped(zoo.LAYERS["mlp"]()).double()
    metric: dict[str, Any] = {}
    for name, p in model.core.named_parameters():
        if kind is Factored and p.dim() > 1:
            root = Factored(torch.rand(p.shape[0]) + 0.5, torch.rand(p.shape[1]) + 0.5)
        else:
            root = Elementwise(torch.rand(p.shape) + 0.5)
        metric[f"core.{name}"] = root
    check(model, *sides(torch.float64), route=route, preconditioner=metric)


def test_restricted_to_parameters() -> None:
    torch.manual_seed(8)
    model = zoo.Looped(zoo.LAYERS["mlp"]()).double().eval()
    train, query = sides(torch.float64)
    capture = attach(model, body="core", sketch_size=16)
    parts = [rerank(capture, zoo.squared_error, train, query, parameters=p).sdi for p in ("*.weight", "*.bias")]
    torch.testing.assert_close(sum(parts), rerank(capture, zoo.squared_error, train, query).sdi)
    with pytest.raises(ValueError, match="fits none"):
        rerank(capture, zoo.squared_error, train, query, parameters="head.*")


def test_the_model_and_its_capture_are_left_as_they_were() -> None:
    torch.manual_seed(9)
    model = zoo.Looped(zoo.LAYERS["mlp"]())
    model.train()
    train, query = sides()
    capture = attach(model, body="core", sketch_size=16)
    before = capture.featurize(train, zoo.squared_error)
    rerank(capture, zoo.squared_error, train, query)
    assert torch.equal(capture.featurize(train, zoo.squared_error).values, before.values)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_what_is_refused() -> None:
    model = zoo.Looped(zoo.LAYERS["mlp"]())
    train, query = sides()
    capture = attach(model, body="core", sketch_size=16)
    with pytest.raises(TypeError, match="capture: got ExactCapture"):
        rerank(ExactCapture(model, body="core"), zoo.squared_error, train, query)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="route: got 'fft'"):
        rerank(capture, zoo.squared_error, train, query, route="fft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query_bytes"):
        rerank(capture, zoo.squared_error, train, query, query_bytes=0)
    query[1]["y"][0, 0] = torch.nan
    with pytest.raises(LossError, match="q7"):
        rerank(capture, zoo.squared_error, train, query, ids=lambda b: [f"q{k}" for k in range(7, 7 + len(b["x"]))])


def test_examples_that_mix_are_refused() -> None:
    core = zoo.Core(lambda s, x: s.mix(x + x.mean(0)).tanh(), mix=nn.Linear(zoo.D, zoo.D))
    capture = attach(zoo.Looped(core), body="core", sketch_size=16)
    with pytest.raises(LayoutError):
        rerank(capture, zoo.squared_error, *sides())
