"""Training's length: T from plain numbers, from checkpoints of SGD and Adam, as a damping; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from stepinfluence import (
    BlockFisher,
    Features,
    Fisher,
    attach,
    influence,
    influence_over_checkpoints,
    load_checkpoint,
    self_influence,
)
from stepinfluence.attribution.curvature import Progress, TrainingTime, load, save, training_time
from stepinfluence.attribution.curvature.length import parsed, plain
from stepinfluence.attribution.curvature.progress import progress_at
from stepinfluence.attribution.preconditioners import from_optimizer
from stepinfluence.integrations.checkpointing import Saver
from stepinfluence.store import Store
from torch import Tensor, nn

pytestmark = pytest.mark.numeric

RATE = 0.02


class Looped(nn.Module):
    """Three steps of a layer; one of its rows has no gradient, as biases of attention's keys have none."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        with torch.no_grad():
            self.head.weight[:, 3] = 0

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for _ in range(3):
            state = torch.cat([torch.tanh(self.core(state))[:, :3], x[:, 3:]], 1)
        return self.head(state).squeeze(1)


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square()


def batches(count: int, size: int = 8, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(size, 4, generator=generator), "y": torch.randn(size, generator=generator)}
        for _ in range(count)
    ]


def trained(
    folder: Path,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    at: tuple[int, ...],
    *,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    each: Callable[[nn.Module, torch.optim.Optimizer, float], None] = lambda *_: None,
) -> tuple[nn.Module, list[Path]]:
    """A training with checkpoints after some updates, saved by the library's own callback's writer."""
    torch.manual_seed(0)
    model = Looped()
    optimizer, saver = make(model), Saver(folder)
    folder.mkdir()
    scheduler = None if schedule is None else schedule(optimizer)
    for number, batch in enumerate(batches(at[-1]), 1):
        optimizer.zero_grad()
        loss_fn(model, batch).mean().backward()
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        each(model, optimizer, rate)
        if number in at:
            saver.save(number, model, optimizer, rates=[float(g["lr"]) for g in optimizer.param_groups])
        if scheduler is not None:
            scheduler.step()
    return model, saver.paths


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, **options)


def test_of_sgd_it_is_the_sum_of_learning_rates(tmp_path: Path) -> None:
    model, paths = trained(tmp_path / "plain", sgd, (3, 10))
    capture = attach(model, body="core", sketch_size=16)
    assert training_time(paths, capture).times == pytest.approx((3 * RATE, 10 * RATE), rel=1e-12)
    # With momentum a steady gradient is followed 1 / (1 - mu) times as fast.
    model, paths = trained(tmp_path / "momentum", lambda m: sgd(m, momentum=0.75), (3, 10))
    assert training_time(paths, capture).times == pytest.approx((12 * RATE, 40 * RATE), rel=1e-12)
    model, paths = trained(tmp_path / "dampened", lambda m: sgd(m, momentum=0.75, dampening=0.75), (3, 10))
    assert training_time(paths, capture).times == pytest.approx((3 * RATE, 10 * RATE), rel=1e-12)


def test_a_linear_schedule_is_followed_between_checkpoints(tmp_path: Path) -> None:
    rates: list[float] = []
    model, paths = trained(
        tmp_path / "runs",
        sgd,
        (5, 10, 20),
        schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.25, total_iters=20),
        each=lambda _model, _optimizer, rate: rates.append(rate),
    )
    found = training_time(paths, attach(model, body="core", sketch_size=16)).times
    # The area under a line whose value at the end of each update is counted for the whole of it: more by half of what
    # the rate falls by. Before the first checkpoint the line begins one update too low: less by the same.
    fall = rates[0] - rates[1]
    assert found == pytest.approx([sum(rates[:n]) + fall * (n - 5) / 2 for n in (5, 10, 20)])
    assert found[-1] == pytest.approx(sum(rates), rel=0.03)


def gain_by_hand(model: nn.Module, optimizer: torch.optim.Adam) -> float:
    """One over the mean of what Adam divides the body's gradients by."""
    group = optimizer.param_groups[0]
    (core,) = [m for name, m in model.named_children() if name == "core"]
    roots = []
    for parameter in core.parameters():
        state = optimizer.state[parameter]
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        roots += [root + group["eps"] for root in corrected.double().sqrt().flatten().tolist()]
    return len(roots) / sum(roots)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_of_adam_against_a_plain_loop(tmp_path: Path, kind: type[torch.optim.Adam]) -> None:
    gains: list[float] = []
    model, paths = trained(
        tmp_path / "runs",
        lambda m: kind(m.parameters(), lr=RATE),
        (4, 8, 12),
        each=lambda m, o, _rate: gains.append(gain_by_hand(m, o)),  # type: ignore[arg-type]
    )
    capture = attach(model, body="core", sketch_size=16)
    want, before, done = [0.0], gains[3], 0
    for at in (4, 8, 12):
        want.append(want[-1] + RATE * (at - done) * (before + gains[at - 1]) / 2)
        before, done = gains[at - 1], at
    # Gains are kept to six digits, so that machines that add in another order agree.
    assert training_time(paths, capture).times == pytest.approx(want[1:], rel=1e-5)
    # The whole sum, update by update, is what the checkpoints stand for.
    assert training_time(paths, capture).times[-1] == pytest.approx(RATE * sum(gains), rel=0.3)
    # Weights without gradient, multiplied with 1 / eps, would own a mean of the multipliers.
    roots = from_optimizer(load_checkpoint(paths[-1]).optimizer, model, "adam")
    assert roots is not None
    multipliers = torch.cat([roots[f"core.{n}"].tensors[0].flatten() ** 2 for n in ("weight", "bias")])
    assert float(multipliers.mean()) > 1e6 > 1e3 * gains[-1]
    # Features under Adam's metric have the multiplier in them.
    assert training_time(paths, capture, metric="adam").times == pytest.approx([RATE * n for n in (4, 8, 12)])


def test_a_lone_checkpoint_needs_a_scheduler_that_says_where_it_began(tmp_path: Path) -> None:
    model, paths = trained(tmp_path / "runs", sgd, (8,))
    capture = attach(model, body="core", sketch_size=16)
    with pytest.raises(ValueError, match="nothing says which learning rates the first 8 of 8 updates had") as caught:
        training_time(paths, capture)
    assert "\n" not in str(caught.value)
    model, paths = trained(
        tmp_path / "scheduled", sgd, (8,), schedule=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)
    )
    assert training_time(paths[0], capture).times == pytest.approx((8 * RATE,))


def progress(*updates: int, rates: tuple[float, ...] = (), **more: Any) -> list[Progress]:
    return [Progress(u, rate, **more) for u, rate in zip(updates, rates or (0.1,) * len(updates), strict=True)]


def test_plain_numbers() -> None:
    assert TrainingTime(3).times == (3.0,)
    assert TrainingTime.of(progress(10, 30, gain=2.0)).times == pytest.approx((2.0, 6.0))
    falling = TrainingTime.of(progress(10, 20, rates=(0.1, 0.0)))
    assert falling.times == pytest.approx((1.0, 1.5))
    assert TrainingTime.of([Progress(10, 0.0, first_rate=0.2)]).times == pytest.approx((1.0,))
    assert TrainingTime((1.0, 2.0)).at(1, 2).times == (2.0,)
    for one in (Progress(3, 0.1, 2.0, 0.3), Progress(3, 0.1), "why not"):
        assert parsed(plain(one)) == one


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TrainingTime([]), "times: got none"),
        (lambda: TrainingTime(0.0), "times: got 0.0; pass a positive"),
        (lambda: TrainingTime([1.0, float("nan")]), "times: got nan"),
        (lambda: TrainingTime.of([]), "progress: got no checkpoint"),
        (lambda: TrainingTime.of(progress(10, 10)), "after 10, 10 updates, which do not grow"),
        (lambda: TrainingTime.of(progress(90, 100, rates=(0.1, 0.05))), "the first 90 of 100 updates"),
        (lambda: TrainingTime.of(progress(5, 100, rates=(0.0, 0.0))), "learning rates are 0"),
        (lambda: TrainingTime((1.0, 2.0)).at(0, 3), "by 2 checkpoints, for features of 3"),
        (lambda: Progress(0, 0.1), "updates: got 0"),
        (lambda: Progress(1, 0.1, gain=0.0), "gain: got 0.0"),
    ],
)
def test_numbers_that_say_nothing_are_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def written(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, **more: Any) -> Any:
    content: dict[str, Any] = {"model": model.state_dict(), **more}
    if optimizer is not None:
        for batch in batches(2):
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
        content["optimizer"] = optimizer.state_dict()
    torch.save(content, path)
    return load_checkpoint(path)


def groups(model: Looped, *rates: float) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": rate} for p, rate in zip(model.parameters(), rates, strict=True)]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda m: None, "no optimizer state"),
        (lambda m: torch.optim.RMSprop(m.parameters()), "neither SGD nor Adam"),
        (lambda m: torch.optim.NAdam(m.parameters()), "neither SGD nor Adam"),
        (lambda m: torch.optim.Adafactor(m.parameters()), "neither SGD nor Adam"),
        (lambda m: torch.optim.SGD(m.parameters(), maximize=True), "neither SGD nor Adam"),
        (lambda m: torch.optim.SGD(m.parameters(), momentum=1.0), "momentum is 1.0"),
        (lambda m: torch.optim.Adam(m.head.parameters()), "2 parameters in 1 group"),
        (lambda m: torch.optim.Adam(groups(m, 0.1, 0.1, 0.1, 0.1)), "no names"),
        (lambda m: torch.optim.Adam(list(m.head.named_parameters("head"))), "'core.weight' is not one"),
    ],
)
def test_checkpoints_that_do_not_say_it(tmp_path: Path, make: Callable[[Any], Any], match: str) -> None:
    model = Looped()
    capture = attach(model, body="core", sketch_size=16)
    found = progress_at(written(tmp_path / "c.pt", model, make(model), step=2), capture)
    assert isinstance(found, str)
    assert match in found
    assert "\n" not in found
    with pytest.raises(ValueError, match="'training' needs training's length, which is not known at checkpoint"):
        training_time(tmp_path / "c.pt", capture)


def test_muon_is_not_taken_for_sgd(tmp_path: Path) -> None:
    model = Looped()
    capture = attach(model, body="core", sketch_size=16)
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    found = progress_at(written(tmp_path / "c.pt", model, muon([model.core.weight, model.head.weight])), capture)
    assert "neither SGD nor Adam" in str(found)


def test_what_files_count(tmp_path: Path) -> None:
    model = Looped()
    capture = attach(model, body="core", sketch_size=16)
    assert "how many updates" in str(progress_at(written(tmp_path / "a.pt", model, sgd(model), epoch=3), capture))
    for name in ("step", "global_step"):
        checkpoint = written(tmp_path / "b.pt", model, sgd(model), **{name: 7})
        assert progress_at(checkpoint, capture) == Progress(7, RATE)
    assert progress_at(checkpoint, capture, metric="adam").startswith("features are under the metric")  # type: ignore[union-attr]
    # Adam counts for itself, whatever the file says.
    adam = torch.optim.Adam(model.parameters())
    assert progress_at(written(tmp_path / "c.pt", model, adam, step=99), capture).updates == 2  # type: ignore[union-attr]
    # One pace for all parameters: nobody need know which they are. Several in the body: refused.
    split = torch.optim.SGD(groups(model, 0.1, 0.1, 0.1, 0.1))
    assert progress_at(written(tmp_path / "d.pt", model, split, step=2), capture) == Progress(2, 0.1)
    named = [
        g | {"params": [(n, g["params"][0])]}
        for g, (n, _) in zip(groups(model, 0.1, 0.2, 0.3, 0.3), model.named_parameters(), strict=True)
    ]
    checkpoint = written(tmp_path / "e.pt", model, torch.optim.SGD(named), step=2)
    assert "several learning rates (0.1, 0.2)" in str(progress_at(checkpoint, capture))


def test_transformers_count_beside_the_weights(tmp_path: Path) -> None:
    model = Looped()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(sgd(model).state_dict(), tmp_path / "optimizer.pt")
    assert load_checkpoint(tmp_path).updates is None
    (tmp_path / "trainer_state.json").write_text('{"global_step": 12, "max_steps": 20}')
    assert load_checkpoint(tmp_path).updates == 12
    (tmp_path / "trainer_state.json").write_text("[1, 2")
    assert load_checkpoint(tmp_path).updates is None


# ----------------------------------------------------------------------------------------------------------------
# As a damping


def features(rows: int, seed: int) -> Features:
    return made.features(made.normal(rows, 3, made.WIDTH, seed=seed).double())


@pytest.mark.parametrize("kind", [Fisher, BlockFisher])
def test_lambda_is_one_over_t(kind: type[Fisher], tmp_path: Path) -> None:
    train, query = features(20, 0), features(4, 1)
    fitted = kind.fit(train, damping=TrainingTime(0.25))
    rows = train.summed().values
    dense = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for cut in kind.ranges(train.space):
        gram = rows[:, cut].T @ rows[:, cut] / len(rows)
        dense[cut, cut] = torch.linalg.inv(gram + 4.0 * torch.eye(len(gram), dtype=torch.float64))
    want = torch.einsum("nd,de,qte->nqt", rows, dense, query.values)
    # float64 on both sides, and a matrix whose condition number is below 100
    torch.testing.assert_close(influence(train, query, curvature=fitted).sdi, want, rtol=1e-9, atol=1e-9)
    asked = influence(train, query, curvature=kind.kind, damping=TrainingTime(0.25))  # type: ignore[arg-type]
    torch.testing.assert_close(asked.sdi, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(asked.sdi.sum(2), rows @ dense @ query.summed().values.T, rtol=1e-9, atol=1e-9)
    # Relative, it is that to the largest eigenvalue of all; kept and read it is the same.
    largest = max(factor.largest for factor in fitted.factors)
    assert fitted.damping == pytest.approx(4.0 / largest)
    save(fitted, tmp_path / "kept")
    assert load(tmp_path / "kept").digest == fitted.digest
    assert kind.fit(train, damping=1e-2).with_damping(TrainingTime(0.25)).digest == fitted.digest
    assert fitted.with_damping(1e-2).digest == kind.fit(train, damping=1e-2).digest
    assert kind.fit(train, damping=fitted.setting).digest == fitted.digest
    torch.testing.assert_close(
        self_influence(train, curvature=kind.kind, damping=TrainingTime(0.25)).sum(1),  # type: ignore[arg-type]
        torch.einsum("nd,de,ne->n", rows, dense, rows),
    )


def test_each_checkpoint_has_its_own_length() -> None:
    train, query = [features(20, 0), features(20, 2)], [features(4, 1), features(4, 3)]
    both = influence(train, query, curvature="fisher", damping=TrainingTime((0.5, 2.0)))
    alone = [
        influence(t, q, curvature="fisher", damping=TrainingTime(time)).sdi
        for t, q, time in zip(train, query, (0.5, 2.0), strict=True)
    ]
    torch.testing.assert_close(both.sdi, alone[0] + alone[1])
    with pytest.raises(ValueError, match="by 1 checkpoints, for features of 2"):
        influence(train, query, curvature="fisher", damping=TrainingTime(0.5))


def test_features_in_memory_do_not_know_it() -> None:
    train, query = features(9, 0), features(2, 1)
    with pytest.raises(ValueError, match=r"pass the store, or stepinfluence\.curvature\.TrainingTime"):
        influence(train, query, curvature="fisher", damping="training")
    with pytest.raises(ValueError, match="training's length is not theirs"):
        influence(train, query, curvature="fisher", damping=TrainingTime(1.0), normalize="train")
    with pytest.raises(ValueError, match="'auto' or 'training'"):
        Fisher.fit(train, damping="best")  # type: ignore[arg-type]


def test_over_checkpoints_it_is_read_from_each(tmp_path: Path) -> None:
    model, paths = trained(tmp_path / "runs", lambda m: torch.optim.Adam(m.parameters(), lr=RATE), (4, 8))
    capture = attach(model, body="core", sketch_size=16)
    train, query = batches(3, seed=2), batches(1, seed=3)

    def scores(**how: Any) -> Tensor:
        found = influence_over_checkpoints(
            capture, paths, train, query, loss_fn, curvature="fisher", progress=False, **how
        )
        return found.sdi

    for metric in (None, "sgd", "adam"):
        time = training_time(paths, capture, metric=metric or "sgd")  # type: ignore[arg-type]
        torch.testing.assert_close(
            scores(damping="training", metric=metric), scores(damping=time, metric=metric), rtol=0, atol=0
        )
    with pytest.raises(ValueError, match="this is one of your own"):
        scores(damping="training", metric=lambda c: from_optimizer(c.optimizer, model, "adam"))


def test_a_store_says_it(tmp_path: Path) -> None:
    sides = [made.features(made.normal(12, 3, made.WIDTH, seed=seed)) for seed in (0, 2)]
    known = tuple(progress(5, 20, gain=3.0))
    train = made.store(tmp_path / "known", sides, etas=(1.0, 1.0), progress=known)
    opened = Store.open(tmp_path / "known")
    assert [c.progress for c in opened.checkpoints] == list(known)
    times = TrainingTime.of(known)
    for k, time in enumerate(times.times):
        fitted = Fisher.fit(train, checkpoint=k, damping="training")
        assert fitted.time == time
        assert Fisher.fit(train, checkpoint=k, damping=times).digest == fitted.digest
    older = made.store(tmp_path / "older", sides, etas=(1.0, 1.0))
    with pytest.raises(ValueError, match="written by an earlier version, which did not record it; featurize again"):
        Fisher.fit(older, damping="training")
    why = "its optimizer is neither SGD nor Adam"
    told = made.store(tmp_path / "told", sides, etas=(1.0, 1.0), progress=(known[0], why))
    with pytest.raises(
        ValueError, match="not known at checkpoint 'c1': its optimizer is neither SGD nor Adam; or give"
    ):
        Fisher.fit(told, damping="training")


def test_progress_is_no_part_of_what_a_store_is_compared_by(tmp_path: Path) -> None:
    sides = [made.features(made.normal(12, 3, made.WIDTH, seed=seed)) for seed in (0, 2)]
    older = made.store(tmp_path / "older", sides, etas=(1.0, 1.0)).manifest
    newer = made.store(tmp_path / "newer", sides, etas=(1.0, 1.0), progress=progress(5, 20)).manifest
    assert older.digest == newer.digest
    assert older == newer
    assert older.difference(newer) is None
    assert older.to_bytes() != newer.to_bytes()
