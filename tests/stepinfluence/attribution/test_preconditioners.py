"""Influence under an optimizer's metric, against the optimizer's own formula applied to exact gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import Rounding, check_influence, measure_body
from stepinfluence import (
    CheckpointError,
    ExactCapture,
    FeatureMismatchError,
    attach,
    influence,
    influence_over_checkpoints,
    load_checkpoint,
)
from stepinfluence.attribution.preconditioners import Elementwise, Factored, from_optimizer
from torch import Tensor, nn

pytestmark = pytest.mark.numeric

D, VOCABULARY, STEPS = 6, 9, 3
Batch = dict[str, Tensor]


class Core(nn.Module):
    """A layer of each kind: normalisation, linear, slices of a stack, lookup, broadcast scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D, bias=False)
        self.table = nn.Embedding(VOCABULARY, D)
        self.mix = nn.Parameter(torch.randn(2, D, D) / D)
        self.gate = nn.Parameter(torch.tensor(0.7))

    def forward(self, state: Tensor, ids: Tensor) -> Tensor:
        hidden = self.down(torch.tanh(self.up(self.norm(state)))) + self.table(ids)
        return state + self.gate * torch.tanh(hidden @ self.mix[0] + hidden @ self.mix[1].T)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read_in, self.core, self.read_out = nn.Embedding(VOCABULARY, D), Core(), nn.Linear(D, 1)

    def forward(self, ids: Tensor) -> Tensor:
        state = self.read_in(ids)
        for _ in range(STEPS):
            state = self.core(state, ids)
        out: Tensor = self.read_out(state).squeeze(-1)
        return out


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["ids"]) - batch["y"]).square().mean(1)


def make_batch(size: int, seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.arange(size * 4).view(size, 4) * (seed + 1) % VOCABULARY
    return {"ids": ids, "y": torch.randn(size, 4, generator=draw)}


def train(
    make: Callable[[Any], torch.optim.Optimizer], steps: int = 4, model: Model | None = None
) -> tuple[Model, torch.optim.Optimizer]:
    model = Model() if model is None else model
    optimizer = make(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(model, make_batch(5, step)).mean().backward()
        optimizer.step()
    return model, optimizer


def adam_metric(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """P by torch.optim.Adam's documented update, in float64."""
    found = {}
    for name, p in model.named_parameters():
        state, group = optimizer.state[p], optimizer.param_groups[0]
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
        corrected = second / (1 - group["betas"][1] ** float(state["step"]))
        found[name] = 1 / (corrected.sqrt() + group["eps"])
    return found


def adafactor_metric(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """P by torch.optim.Adafactor's source, in float64."""
    found = {}
    for name, p in model.named_parameters():
        state, eps = optimizer.state[p], torch.finfo(p.dtype).eps
        if p.dim() > 1:
            row, column = state["row_var"].double(), state["col_var"].double()
            estimate = (row @ column) / row.mean(dim=-2, keepdim=True).clamp(min=eps)
        else:
            estimate = state["variance"].double()
        found[name] = estimate.clamp(min=eps**2).rsqrt()
    return found


CASES: dict[str, tuple[str, Any, Any]] = {
    "adam": ("adam", lambda p: torch.optim.Adam(p, lr=1e-2), adam_metric),
    "adamw": ("adam", lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-3), adam_metric),
    "amsgrad": ("adam", lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True), adam_metric),
    "adafactor": ("adafactor", lambda p: torch.optim.Adafactor(p, lr=1e-2), adafactor_metric),
}


def rounding_of(model: Model, batches: list[Batch]) -> Rounding:
    names = [f"core.{name}" for name, _ in model.core.named_parameters()]
    return measure_body(model, batches, loss_fn, model.core, names)


def assert_near(found: Tensor, exact: Tensor, tolerance: float = 0.05) -> None:
    """To the error of wide sketches, which is no matter of rounding."""
    assert float((found - exact).norm() / exact.norm()) <= tolerance


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_features_are_sketches_of_the_rooted_gradient(case: str, hashing: Any) -> None:
    kind, make, metric_of = CASES[case]
    model, optimizer = train(make)
    metric = metric_of(model, optimizer)
    roots = from_optimizer(optimizer.state_dict(), model, kind)  # type: ignore[arg-type]
    assert roots is not None
    batches = [make_batch(4, 9), make_batch(2, 10)]
    capture = attach(model, body="core", sketch_size=64, hashing=hashing, preconditioner=roots)
    features = capture.featurize(batches, loss_fn)
    tables = {t.name: t.sketch for t in capture.targets}
    rooted = rounding_of(model, batches).weighted(metric, 0.5)
    rooted.check_sketches(features.values, "sketches:", tables, per_step=True)
    baseline = ExactCapture(model, body="core", preconditioner=roots).featurize(batches, loss_fn)
    rooted.check_gradients(baseline.values, "exact:")


@pytest.mark.parametrize("case", CASES)
def test_influence_is_the_metric_inner_product(case: str) -> None:
    """Wide sketches give nearly ``<P * grad(z), phi_t(z')>``, the exact capture gives it."""
    kind, make, metric_of = CASES[case]
    model, optimizer = train(make)
    metric = metric_of(model, optimizer)
    roots = from_optimizer(optimizer, model, kind)  # type: ignore[arg-type]
    sides = [make_batch(4, 9)], [make_batch(3, 10)]
    train_side, query_side = (rounding_of(model, side) for side in sides)
    parts = [(1.0, train_side.weighted(metric, 1), query_side)]
    exact = ExactCapture(model, body="core", preconditioner=roots)
    found = influence(*(exact.featurize(side, loss_fn) for side in sides)).sdi
    check_influence(found, parts, "exact:")
    wide = attach(model, body="core", sketch_size=1 << 16, preconditioner=roots)
    assert_near(influence(*(wide.featurize(side, loss_fn) for side in sides)).sdi, found)


def test_adafactor_is_factored_where_its_limit_does_not_matter() -> None:
    model, optimizer = train(lambda p: torch.optim.Adafactor(p, lr=1e-2))
    roots = from_optimizer(optimizer, model, "adafactor")
    assert roots is not None
    assert isinstance(roots["core.up.weight"], Factored)
    assert isinstance(roots["core.norm.weight"], Elementwise)
    assert isinstance(roots["core.mix"], Elementwise)  # factored over its last two dimensions only
    optimizer.state[model.core.up.weight]["row_var"][2] = 0  # a unit without gradients
    roots = from_optimizer(optimizer, model, "adafactor")
    assert roots is not None
    assert isinstance(roots["core.up.weight"], Elementwise)
    expected = adafactor_metric(model, optimizer)["core.up.weight"].sqrt()
    torch.testing.assert_close(roots["core.up.weight"].sqrt.double(), expected, rtol=1e-6, atol=0)  # positive terms


def test_other_moments_make_other_spaces() -> None:
    model, optimizer = train(CASES["adam"][1])
    batch = [make_batch(3, 9)]
    capture = attach(model, body="core", sketch_size=32)
    plain = capture.featurize(batch, loss_fn)
    assert plain.space.metric == ""
    capture.precondition(from_optimizer(optimizer, model))
    first = capture.featurize(batch, loss_fn)
    influence(first, capture.featurize(batch, loss_fn))
    optimizer.state[model.core.up.bias]["exp_avg_sq"][0] *= 2
    capture.precondition(from_optimizer(optimizer, model))
    second = capture.featurize(batch, loss_fn)
    for other in (plain, second):
        with pytest.raises(FeatureMismatchError, match="another metric than"):
            influence(first, other)
    capture.precondition(None)
    assert torch.equal(capture.featurize(batch, loss_fn).values, plain.values)


def test_low_precision_model() -> None:
    """Moments in bfloat16 beside bfloat16 weights; the features stay single precision."""
    model, optimizer = train(CASES["adam"][1])
    model.bfloat16()
    content = copy.deepcopy(optimizer.state_dict())
    for state in content["state"].values():
        state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
    roots = from_optimizer(content, model)
    capture = attach(model, body="core", sketch_size=64, preconditioner=roots, verify=False)
    features = capture.featurize([make_batch(3, 9)], lambda m, b: (m(b["ids"]).float() - b["y"]).square().mean(1))
    assert features.values.dtype == torch.float32
    assert features.values.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------
# Over checkpoints


@pytest.mark.parametrize("case", ["adam", "adafactor", "sgd"])
@pytest.mark.parametrize("kind_of_capture", ["exact", "sketch"])
def test_each_checkpoint_has_its_own_metric(case: str, kind_of_capture: str, tmp_path: Path) -> None:
    kind, make, metric_of = CASES.get(case, ("sgd", lambda p: torch.optim.SGD(p, lr=1e-2), None))
    model, paths = Model(), []
    sides = [make_batch(4, 9)], [make_batch(3, 10)]
    exact = ExactCapture(model, body="core")
    parts = []
    for steps in (2, 3):
        _, optimizer = train(make, steps, model)
        paths.append(tmp_path / f"{steps}.pt")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, paths[-1])
        train_side, query_side = (rounding_of(model, side) for side in sides)
        ones = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
        metric = ones if metric_of is None else metric_of(model, optimizer)
        parts.append((1e-2, train_side.weighted(metric, 1), query_side))
    capture = exact if kind_of_capture == "exact" else attach(model, body="core", sketch_size=1 << 16)
    found = influence_over_checkpoints(capture, paths, *sides, loss_fn, metric=kind)  # type: ignore[arg-type]
    if kind_of_capture == "exact":
        check_influence(found.sdi, parts, "over checkpoints:")
    else:
        assert_near(found.sdi, influence_over_checkpoints(exact, paths, *sides, loss_fn, metric=kind).sdi)  # type: ignore[arg-type]
    assert capture.preconditioner is None
    same = influence_over_checkpoints(
        capture,
        paths,
        *sides,
        loss_fn,
        metric=lambda c: from_optimizer(c.optimizer, model, kind),  # type: ignore[arg-type]
    )
    assert torch.equal(same.sdi, found.sdi)


def test_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    model, optimizer = train(CASES["adam"][1])
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pt")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "adam.pt")
    capture, batch = attach(model, body="core", sketch_size=32), [make_batch(3, 9)]
    run: Callable[..., object] = lambda name, metric: influence_over_checkpoints(  # noqa: E731
        capture, [tmp_path / name], batch, batch, loss_fn, etas=1.0, metric=metric
    )
    with pytest.raises(CheckpointError, match="optimizer: got None; the checkpoint has no optimizer state"):
        run("bare.pt", "adam")
    with pytest.raises(CheckpointError, match=r"read_in.weight has no Adafactor state \('row_var' and 'step'\)"):
        run("adam.pt", "adafactor")
    with pytest.raises(ValueError, match="metric: got 'lion'"):
        run("adam.pt", "lion")
    assert capture.preconditioner is None
    assert load_checkpoint(tmp_path / "adam.pt").optimizer is not None


# ---------------------------------------------------------------------------------------------------------------
# Whose moments are whose


def assert_same_roots(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, root in found.items():
        assert torch.equal(root.sqrt, expected[name].sqrt)


def test_parameter_order_of_state_dicts() -> None:
    model, optimizer = train(CASES["adam"][1])
    expected = from_optimizer(optimizer, model)
    assert_same_roots(from_optimizer(optimizer.state_dict(), model), expected)

    def split(named: bool) -> Callable[[Any], torch.optim.Optimizer]:
        def make(_: object) -> torch.optim.Optimizer:
            parameters = list(model.named_parameters())
            groups = [[x for x in parameters if (x[1].dim() > 1) == matrices] for matrices in (True, False)]
            return torch.optim.Adam(
                [
                    {"params": group if named else [p for _, p in group], "weight_decay": k}
                    for k, group in enumerate(groups)
                ]
            )

        return make

    for named in (True, False):
        _, optimizer = train(split(named), 2, model)
        content = optimizer.state_dict()
        expected = from_optimizer(optimizer, model)
        names = sorted(dict(model.named_parameters()), key=lambda n: model.get_parameter(n).dim() < 2)
        assert_same_roots(from_optimizer(content, model, names=names), expected)
        if named:
            assert_same_roots(from_optimizer(content, model), expected)
        else:
            with pytest.raises(CheckpointError, match=r"in 2 group\(s\) and no names.*pass names="):
                from_optimizer(content, model)
    by_name = {
        "state": {n: optimizer.state[p] for n, p in model.named_parameters()},
        "param_groups": [{**optimizer.param_groups[0], "params": [n for n, _ in model.named_parameters()]}],
    }
    assert_same_roots(from_optimizer(by_name, model), expected)


def test_frozen_parameters_and_wrappers() -> None:
    model = Model()
    model.read_in.requires_grad_(False)
    _, optimizer = train(lambda _: torch.optim.Adam(p for p in model.parameters() if p.requires_grad), 2, model)
    expected = from_optimizer(optimizer, model)
    assert expected is not None
    assert "read_in.weight" not in expected
    assert_same_roots(from_optimizer(optimizer.state_dict(), model), expected)
    wrapped = torch.compile(model, backend="eager")
    assert_same_roots(from_optimizer(optimizer.state_dict(), wrapped), expected)  # type: ignore[arg-type]
    attach(model, body="core", preconditioner={f"_orig_mod.{n}": r for n, r in expected.items()})


def test_sgd_is_plain() -> None:
    model = Model()
    assert from_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, "sgd") is None
    assert from_optimizer(None, model, "sgd") is None


def test_errors_of_from_optimizer() -> None:
    model, adam = train(CASES["adam"][1])
    content = adam.state_dict()

    def changed(**changes: Any) -> Any:
        return {**content, **changes}

    with pytest.raises(ValueError, match="kind: got 'lion'; use one of 'adam', 'adafactor', 'sgd'"):
        from_optimizer(adam, model, "lion")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer: got list"):
        from_optimizer([adam], model)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="not an optimizer's state dict"):
        from_optimizer({"state": {}}, model)
    with pytest.raises(CheckpointError, match="holds no adam state"):
        from_optimizer(torch.optim.Adam(model.parameters()), model)
    with pytest.raises(CheckpointError, match="holds no adam state"):
        from_optimizer(train(CASES["adam"][1])[1], model)  # of another model
    _, adafactor = train(CASES["adafactor"][1], 1, model)
    with pytest.raises(CheckpointError, match=r"no Adam state.*it holds col_var, row_var, step"):
        from_optimizer(adafactor, model)
    with pytest.raises(CheckpointError, match=r"shape \(.*pass the model it trained, and names="):
        from_optimizer(content, model, names=list(dict(model.named_parameters()))[::-1])
    with pytest.raises(CheckpointError, match="names: got 1 for the optimizer's"):
        from_optimizer(content, model, names=["core.gate"])
    with pytest.raises(CheckpointError, match="its parameter 'other' is not in the model"):
        from_optimizer(content, model, names=["other"] * len(list(model.parameters())))
    with pytest.raises(CheckpointError, match="has no betas and eps"):
        from_optimizer(changed(param_groups=[{"params": content["param_groups"][0]["params"]}]), model)
    factored = adafactor.state_dict()
    with pytest.raises(CheckpointError, match="has no pair eps"):
        from_optimizer({**factored, "param_groups": content["param_groups"]}, model, "adafactor")
    fresh = {k: {**s, "step": torch.tensor(0.0)} for k, s in content["state"].items()}
    with pytest.raises(CheckpointError, match="has taken no step"):
        from_optimizer(changed(state=fresh), model)


def test_errors_of_preconditioners() -> None:
    model, adam = train(CASES["adam"][1])
    roots: Any = from_optimizer(adam, model)
    assert roots is not None
    use: Callable[[Any], object] = lambda given: attach(model, body="core", preconditioner=given)  # noqa: E731
    with pytest.raises(ValueError, match=r"no entry for body parameter 'core.gate' \(did the optimizer train it\?\)"):
        use({n: r for n, r in roots.items() if n != "core.gate"})
    with pytest.raises(TypeError, match="preconditioner: got Adam; pass a mapping"):
        use(adam)
    with pytest.raises(TypeError, match=r"'core\.gate' is Tensor; pass Elementwise or Factored"):
        use({**roots, "core.gate": torch.ones(())})
    with pytest.raises(ValueError, match=r"'core.up.weight' has shape \(6, 12\); pass \(12, 6\)"):
        use({**roots, "core.up.weight": Elementwise(torch.ones(6, 12))})
    with pytest.raises(ValueError, match=r"'core.up.weight' has shape \(6,\) and \(12,\); pass \(12,\) and \(6,\)"):
        use({**roots, "core.up.weight": Factored(torch.ones(6), torch.ones(12))})
    with pytest.raises(ValueError, match=r"'core\.gate' has values that are not finite"):
        use({**roots, "core.gate": Elementwise(torch.tensor(float("inf")))})
    with pytest.raises(
        ValueError, match=r"route: got 'fft', which cannot apply the elementwise preconditioner .* of core"
    ):
        attach(model, body="core", preconditioner=roots, route="fft")
