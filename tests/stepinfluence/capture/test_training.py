"""Influence over all of a training, against plain autograd and loops written by hand.

All in float64, on bodies whose sketches lose nothing, so that what is left is rounding.
"""

from __future__ import annotations

import pytest
import torch
from lossless import DATA, QUERY, STEPS, D, Model, accumulate, batches, captured, loss_fn, some
from stepinfluence import ExactCapture, LayoutError, TrainingInfluence, UnsupportedUseError
from stepinfluence.attribution.preconditioners import from_optimizer
from torch import Tensor, nn

BOUND = 1e-10
"""Relative, in float64: a hundred thousand times its rounding."""


def gradient(model: Model, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def close(found: Tensor, want: Tensor) -> None:
    assert found.shape == want.shape
    assert float((found - want).norm()) <= BOUND * float(want.norm())


def test_the_sketches_of_these_bodies_lose_nothing() -> None:
    assert captured(Model()).explain().count("lossless") == 2


@pytest.mark.parametrize("per_step", [True, False])
def test_every_update_is_the_product_of_batch_and_query_gradients(per_step: bool) -> None:
    """And steps conserve; weights of examples may differ, and be 0."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    weights = torch.tensor([0.0, 0.1, 0.4, -0.2], dtype=torch.float64)
    drops, losses, by_example = [], [], torch.zeros(12, 2, dtype=torch.float64)
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn, per_step=per_step) as influence:
        for k, (places, batch) in enumerate(batches(5)):
            rate = 0.1 * 0.9**k
            of_query = [gradient(model, loss) for loss in loss_fn(model, QUERY)]
            whole = gradient(model, (loss_fn(model, batch) * weights).sum())
            drops.append(torch.stack([rate * whole @ q for q in of_query]))
            losses.append(loss_fn(model, QUERY).detach())
            for row, loss, weight in zip(places, loss_fn(model, batch), weights, strict=True):
                one = gradient(model, loss)
                by_example[row] += torch.stack([rate * weight * one @ q for q in of_query])
            with influence.batch(batch, ids=places) as inline:
                (inline.losses(loss_fn(model, batch)) * weights).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    updates, result = influence.updates(), influence.result()
    close(updates.drops, torch.stack(drops))
    torch.testing.assert_close(updates.losses, torch.stack(losses), rtol=1e-6, atol=0)  # features keep float32
    torch.testing.assert_close(updates.factors, torch.ones(5, dtype=torch.float64))
    assert updates.learning_rates.tolist() == pytest.approx([0.1 * 0.9**k for k in range(5)])
    assert updates.ages.tolist() == [0] * 5
    assert result.sdi.shape == (12, 2, STEPS if per_step else 1)
    close(result.tracin, by_example[list(result.train_ids)])
    close(result.tracin.sum(0), updates.drops.sum(0))
    assert result.etas == tuple(updates.learning_rates.tolist())
    assert result.shares is not None
    assert (influence.updates_made, influence.unscored, influence.unseen, influence.skipped) == (5, 0, 0, 0)


def trained(rate: float, seed: int) -> tuple[Tensor, Tensor]:
    """What was predicted and what came about, after 6 updates."""
    model = Model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    before = loss_fn(model, QUERY).detach()
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
        for places, batch in batches(6):
            with influence.batch(batch, ids=places) as inline:
                inline.losses(loss_fn(model, batch)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return influence.result().tracin.sum(0), before - loss_fn(model, QUERY).detach()


def test_the_sum_over_updates_is_the_fall_of_the_loss_to_first_order() -> None:
    """What is left is of second order in the learning rate: half the rate, a quarter of the error."""
    for seed in range(4):
        errors = []
        for rate in (2e-3, 1e-3):
            predicted, actual = trained(rate, seed)
            errors.append(float((predicted - actual).norm()))
            assert errors[-1] < 0.1 * float(actual.norm())
        assert 3.0 < errors[0] / errors[1] < 5.0, seed


@pytest.mark.parametrize("metric", ["sgd", "adam"])
def test_stale_queries_as_in_a_loop_by_hand(metric: str) -> None:
    def optimizer_of(model: Model) -> torch.optim.Optimizer:
        return (torch.optim.SGD if metric == "sgd" else torch.optim.Adam)(model.parameters(), lr=0.05)

    model, twin = Model(), Model()
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    exact = ExactCapture(twin, body="core")
    want, queries = torch.zeros(12, 2, STEPS, dtype=torch.float64), None
    first = 0 if metric == "sgd" else 1  # Adam has no second moments before
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn, refresh_every=3) as influence:
        assert influence.metric == metric
        for k, (places, batch) in enumerate(batches(8)):
            if k >= first and (k - first) % 3 == 0:
                exact.precondition(from_optimizer(other, twin, metric))  # type: ignore[arg-type]
                queries = exact.featurize([QUERY], loss_fn)
            if queries is not None:
                rows = exact.featurize([batch], loss_fn, per_step=False).values
                want.index_add_(0, torch.tensor(places), 0.05 / 4 * torch.einsum("bd,qsd->bqs", rows, queries.values))
            loss_fn(twin, batch).mean().backward()
            other.step()
            other.zero_grad()
            with influence.batch(batch, ids=places) as inline:
                inline.losses(loss_fn(model, batch)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    result = influence.result()
    close(result.sdi, want[list(result.train_ids)])
    assert influence.updates().ages.tolist() == [k % 3 for k in range(8 - first)]
    assert influence.updates().numbers.tolist() == list(range(first, 8))
    assert influence.unscored == first
    assert influence.refreshes == 3
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)  # training is what it would have been
    assert influence.capture.preconditioner is None


def test_epochs_are_kept_apart_and_add_up() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn, by_epoch=True) as influence:
        for epoch in range(3):
            if epoch:
                influence.begin_epoch()
            order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch))
            for places in order[: 8 if epoch == 0 else 12].split(4):
                with influence.batch(some(DATA, places), ids=places) as inline:
                    inline.losses(loss_fn(model, some(DATA, places))).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    parts, updates = [influence.result(epoch) for epoch in range(3)], influence.updates()
    close(torch.stack([p.sdi for p in parts]).sum(0), influence.result().sdi)
    assert updates.epochs.tolist() == [0] * 2 + [1] * 3 + [2] * 3
    for epoch, part in enumerate(parts):
        close(part.tracin.sum(0), updates.drops[updates.epochs == epoch].sum(0))
        assert len(part.etas) == int((updates.epochs == epoch).sum())
    assert not parts[0].sdi[8:].any()  # those that the first epoch did not have
    assert sorted(influence.result().train_ids) == list(range(12))
    with pytest.raises(ValueError, match="epoch: got 3; there are 3"):
        influence.result(3)


def test_accumulation_clipping_and_a_scaler_are_read() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    of_query = torch.stack([gradient(model, loss) for loss in loss_fn(model, QUERY)])
    whole = gradient(model, loss_fn(model, DATA).mean())
    clip = 0.3 * float(whole.norm())
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
        accumulate(influence, model, factor=1024.0)
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= 1024
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    assert influence.updates().factors.item() == pytest.approx(0.3 / 1024, rel=1e-5)  # torch adds 1e-6 to the norm
    close(influence.updates().drops[0] / influence.updates().factors * 0.3 / 1024, 0.1 * 0.3 * of_query @ whole)


def test_gradients_that_are_dropped_or_not_finite_do_not_count() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
        accumulate(influence, model, 1)
        optimizer.zero_grad()  # a spike of the loss, say
        accumulate(influence, model, 2)
        optimizer.step()
        optimizer.zero_grad()
        assert influence.result().tracin.shape[0] == 8
        for factor in (torch.inf, 1.0):  # a scaler skips the first and makes the second
            places, batch = next(batches(1))
            with influence.batch(batch, ids=places) as inline:
                scaler.scale(inline.losses(loss_fn(model, batch)).mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            if factor == 1.0:
                continue
            # Some loops drop gradients only before the next backward pass: those of before are found to be not finite.
            places, batch = list(batches(2))[1]
            with influence.batch(batch, ids=places) as inline:
                losses = inline.losses(loss_fn(model, batch))
                optimizer.zero_grad()
                losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        loss_fn(model, DATA).mean().backward()
        optimizer.step()  # nobody has seen it
        optimizer.zero_grad()
    assert influence.updates().factors.tolist() == pytest.approx([1.0, 1.0, 1 / 8.0])
    assert (influence.updates_made, influence.unseen, influence.skipped) == (4, 1, 0)
    assert "1 not seen" in repr(influence)


def test_an_update_that_is_not_finite_is_counted_as_such() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
        accumulate(influence, model, factor=torch.inf)
        optimizer.step()  # as fused optimizers are called by a scaler, to make no step
    assert influence.skipped == 1
    assert len(influence.updates()) == len(influence.result().sdi) == 0
    assert "1 not finite" in repr(influence)


@pytest.mark.parametrize("what", ["left out", "by value", "penalty"])
def test_updates_of_other_gradients_are_refused(what: str) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
        accumulate(influence, model)
        if what == "left out":
            loss_fn(model, QUERY).mean().backward()
        elif what == "by value":
            nn.utils.clip_grad_value_(model.parameters(), 1e-2)
        else:
            model.core.b.square().sum().backward()
        with pytest.raises(
            LayoutError, match=r"core\.[wb]: the gradient that update 0 used is not that of the batches"
        ):
            optimizer.step()


def test_hooks_that_mask_count_and_hooks_that_scale_are_refused() -> None:
    for factor in (2.0, torch.arange(D).double() % 2):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.core.b.register_hook(lambda g, factor=factor: g * factor)
        with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
            if isinstance(factor, float):
                with pytest.raises(UnsupportedUseError, match=r"core\.b: a gradient hook scales it"):
                    accumulate(influence, model)
                continue
            accumulate(influence, model)
            used = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            want = torch.stack([0.1 * used @ gradient(model, loss) for loss in loss_fn(model, QUERY)])
            optimizer.step()
            close(influence.updates().drops[0], want)
