"""The facade against the published package itself: same calls, same shapes, the same influence up to sketch noise."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import check_influence, measure_body
from stepinfluence import compat
from stepinfluence.errors import BodyError, CheckpointError, LossError
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.numeric

sdi = pytest.importorskip("sdi", reason="the published package (extra: test)")


class Looped(nn.Module):
    """Embedding, a two-layer body applied ``steps`` times, read-out."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(9, 12)
        self.body = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))
        self.head = nn.Linear(12, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(self.steps):
            x = x + self.body(x)
        logits: Tensor = self.head(x)
        return logits


def per_example(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch).transpose(1, 2), batch, reduction="none").mean(1)


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return per_example(model, batch).mean()


@pytest.fixture
def model() -> Looped:
    torch.manual_seed(0)
    return Looped()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 9, (n, 5), generator=generator) for n in (4, 3)]


@pytest.fixture
def checkpoints(model: Looped, tmp_path: Path) -> list[Path]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    paths = []
    for k in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        paths.append(tmp_path / f"{k}.pt")
        content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
        torch.save(content, paths[-1])
    return paths


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", ["ProjectedTracInSDI", "FullGradientTracInSDI"])
@pytest.mark.parametrize("method", ["__init__", "featurize_loader", "influence_across_checkpoints"])
def test_signatures_take_the_published_arguments(name: str, method: str) -> None:
    published = inspect.signature(getattr(getattr(sdi, name), method)).parameters
    ours = inspect.signature(getattr(getattr(compat, name), method)).parameters
    assert set(published) <= set(ours)
    for key, parameter in published.items():
        if not callable(parameter.default):
            assert ours[key].default == parameter.default, key


def run(package: Any, model: Looped, batches: list[Tensor], checkpoints: list[Path], **kwargs: Any) -> Any:
    estimator = package.FullGradientTracInSDI(model=model, target_modules=model.body)
    specs = [package.CheckpointSpec(checkpoints[0]), package.CheckpointSpec(checkpoints[1], weight=0.5)]
    found = estimator.influence_across_checkpoints(
        checkpoints=specs, train_loader=batches, query_loader=batches[:1], loss_fn=per_example, **kwargs
    )
    # Its backward hooks hide whose rows are whose where a batch has one loss: ours refuses beside them.
    estimator.close()
    return found


def test_full_gradients_agree_with_the_published_package(
    model: Looped, batches: list[Tensor], checkpoints: list[Path]
) -> None:
    want = run(sdi, model, batches, checkpoints, with_step_matrix=True)
    got = run(compat, model, batches, checkpoints, with_step_matrix=True, train_chunk_size=2, query_chunk_size=3)
    assert got.sdi.shape == want.sdi.shape == (7, 4, 3)
    scalar = run(compat, model, batches, checkpoints, mode="tracin")
    assert scalar.sdi is None
    parts = []
    for path, weight in zip(checkpoints, (0.25, 0.5), strict=True):  # the optimizer's rate, and the one given
        model.load_state_dict(torch.load(path)["model_state_dict"])
        names = [f"body.{name}" for name, _ in model.body.named_parameters()]
        sides = [measure_body(model, side, per_example, model.body, names) for side in (batches, batches[:1])]
        parts.append((weight, *sides))
    for what, found in (("theirs", want), ("ours", got)):
        check_influence(found.sdi, parts, f"{what}, by step:")
        check_influence(found.sdi_matrix, parts, f"{what}, step by step:", steps="both")
        check_influence(found.tracin, parts, f"{what}, summed:", steps="none")
    check_influence(scalar.tracin, parts, "ours, summed alone:", steps="none")


@pytest.mark.parametrize("loss_fn", [per_example, mean_loss])
def test_sketches_estimate_what_the_published_package_computes(
    model: Looped, batches: list[Tensor], checkpoints: list[Path], loss_fn: Any
) -> None:
    want = run(sdi, model, batches, checkpoints)
    estimator = compat.ProjectedTracInSDI(
        model=model, target_modules=model.body, projection_size=1 << 14, loss_reduction="mean"
    )
    got = estimator.influence_across_checkpoints(
        checkpoints=[compat.CheckpointSpec(checkpoints[0]), compat.CheckpointSpec(checkpoints[1], 0.5)],
        train_loader=batches,
        query_loader=batches[:1],
        loss_fn=loss_fn,
    )
    # Few, concentrated gradient entries: single collisions show. The published sketches err by as much here.
    assert relative(got.sdi, want.sdi) < 0.08
    estimator.close()


@pytest.mark.usefixtures("in_float64")
def test_parameters_used_once_get_slots_before_and_after_the_loop(model: Looped, batches: list[Tensor]) -> None:
    modules = [model.embed, model.body, model.head]
    kwargs: Any = {"model": model, "target_modules": modules, "allow_mixed_steps": True, "expected_steps": 3}
    want = sdi.FullGradientTracInSDI(**kwargs).featurize_loader(loader=batches, loss_fn=per_example)
    got = compat.FullGradientTracInSDI(**kwargs).featurize_loader(loader=batches, loss_fn=per_example)
    assert got.steps == want.steps == 5
    assert got.phi.keys() == want.phi.keys()
    for name, value in want.phi.items():
        torch.testing.assert_close(got.phi[name], value)


def test_errors_name_the_argument(model: Looped, batches: list[Tensor], tmp_path: Path) -> None:
    modules = [model.embed, model.body]
    mixed = compat.FullGradientTracInSDI(model=model, target_modules=modules)
    with pytest.raises(BodyError, match="allow_mixed_steps=True"):
        mixed.featurize_loader(loader=batches, loss_fn=per_example)
    wrong = compat.ProjectedTracInSDI(model=model, target_modules=model.body, expected_steps=7)
    with pytest.raises(BodyError, match="expected_steps: got 7"):
        wrong.featurize_loader(loader=batches, loss_fn=per_example)
    with pytest.raises(ValueError, match="loss_reduction"):
        compat.ProjectedTracInSDI(model=model, target_modules=model.body, loss_reduction="none")
    exact = compat.FullGradientTracInSDI(model=model, target_modules=model.body)
    with pytest.raises(LossError, match="one loss per example"):
        exact.featurize_loader(loader=batches, loss_fn=mean_loss)
    good = compat.ProjectedTracInSDI(model=model, target_modules=model.body, projection_size=64)
    with pytest.raises(ValueError, match="checkpoints: got none"):
        good.influence_across_checkpoints(
            checkpoints=[], train_loader=batches, query_loader=batches, loss_fn=per_example
        )
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match="can run code"):
        good.influence_across_checkpoints(
            checkpoints=[compat.CheckpointSpec(tmp_path / "whole.pt")],
            train_loader=batches,
            query_loader=batches,
            loss_fn=per_example,
        )
