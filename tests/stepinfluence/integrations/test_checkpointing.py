"""Checkpoints for influence: schedules, loop counts, files that the rest of the package reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stepinfluence import load_checkpoint
from stepinfluence.attribution.preconditioners import Elementwise, from_optimizer
from stepinfluence.errors import CheckpointError, StoreError
from stepinfluence.integrations.checkpointing import LoopCounter, Saver, Schedule, read_loop_counts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Looped(nn.Module):
    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.core, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.recompute = recompute

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = checkpoint(self.core, x, use_reentrant=False) if self.recompute else self.core(x)
            x = x.tanh()
        return self.head(x)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4), 2).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "total", "expected"),
    [
        ({"every": 4}, 10, [4, 8, 10]),
        ({"at": [3, 7]}, 10, [3, 7, 10]),
        ({"count": 4}, 10, [3, 5, 8, 10]),
        ({"count": 20}, 5, [1, 2, 3, 4, 5]),
        ({"every": 4}, None, [4, 8]),
    ],
)
def test_schedule(options: dict[str, int], total: int | None, expected: list[int]) -> None:
    schedule = Schedule(**options)  # type: ignore[arg-type]
    assert [step for step in range(1, 11) if step <= (total or 10) and schedule.due(step, total)] == expected


def test_schedules_that_make_no_sense() -> None:
    for options in ({}, {"every": 2, "count": 3}, {"every": 0}, {"at": []}, {"at": [0]}):
        with pytest.raises(ValueError, match="every, at, count"):
            Schedule(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not tell its length"):
        Schedule(count=3).due(1, None)


@pytest.mark.parametrize("recompute", [False, True])
def test_loop_counts(recompute: bool) -> None:
    model = Looped(recompute=recompute)
    counter = LoopCounter(model, "core")
    for steps in (2, 5, 2):
        model(torch.randn(3, 4), steps).sum().backward()  # a recomputation enters the body once more
    model.eval()
    model(torch.randn(3, 4), 7)
    assert counter.take() == {2: 2, 5: 1}
    assert counter.take() == {}
    model.train()
    counter.remove()
    model(torch.randn(3, 4), 2)
    assert counter.take() == {}
    with pytest.raises(ValueError, match="'heart'"):
        LoopCounter(model, "heart")


def test_a_failed_forward_pass_is_not_counted() -> None:
    model = Looped()
    counter = LoopCounter(model, model.core)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5), 2)
    model(torch.randn(3, 4), 3)
    assert counter.take() == {3: 1}


@pytest.mark.parametrize("groups", [1, 2])
def test_saved_moments_are_the_optimizers(tmp_path: Path, groups: int) -> None:
    model = Looped()
    # Two groups out of the model's order: names are what keeps their moments apart.
    parameters = (
        list(model.parameters())
        if groups == 1
        else [{"params": model.head.parameters(), "weight_decay": 0.0}, {"params": model.core.parameters()}]
    )
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    trained(model, optimizer)
    saver = Saver(tmp_path)
    saver.begin(0)
    path = saver.save(3, model, optimizer, loop_counts={2: 3})
    assert path.name == "step-0000003.pt"
    assert read_loop_counts(path) == {2: 3}
    read = load_checkpoint(path)
    assert read.learning_rate == 0.01
    for name, value in model.state_dict().items():
        assert torch.equal(read.model[name], value)
    want = from_optimizer(optimizer, model)
    got = from_optimizer(read.optimizer, Looped())
    assert want is not None
    assert got is not None
    assert got.keys() == want.keys() == dict(model.named_parameters()).keys()
    for name, root in want.items():
        assert isinstance(root, Elementwise)
        assert torch.equal(got[name].tensors[0], root.sqrt)
    first = torch.load(path, weights_only=True)["optimizer"]["state"]
    assert all(set(state) == {"step", "exp_avg_sq"} for state in first.values())  # no first moments
    assert saver.paths == [path]
    assert saver.bytes == path.stat().st_size
    assert saver.seconds > 0


def test_adafactor(tmp_path: Path) -> None:
    model = Looped()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    trained(model, optimizer)
    read = load_checkpoint(Saver(tmp_path).save(3, model, optimizer))
    got, want = (from_optimizer(o, model, "adafactor") for o in (read.optimizer, optimizer))
    assert got is not None
    assert want is not None
    for name in want:
        for a, b in zip(got[name].tensors, want[name].tensors, strict=True):
            assert torch.equal(a, b)


def test_rates_before_the_scheduler_moved_on(tmp_path: Path) -> None:
    model = Looped()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    saver = Saver(tmp_path, second_moments=False)
    assert load_checkpoint(saver.save(1, model, optimizer, rates=[0.25])).learning_rate == 0.25
    assert load_checkpoint(saver.save(2, model, optimizer)).learning_rate == 0.5


def test_parameters_of_other_models_are_left_out(tmp_path: Path) -> None:
    model, other = Looped(), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*other.parameters(), *model.parameters()], lr=0.01)
    trained(model, optimizer)
    read = load_checkpoint(Saver(tmp_path).save(1, model, optimizer))
    assert from_optimizer(read.optimizer, model) is not None
    assert read.optimizer is not None
    assert [g["param_names"] for g in read.optimizer["param_groups"]] == [list(dict(model.named_parameters()))]


def test_unknown_moments_are_told(tmp_path: Path) -> None:
    model = Looped()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    trained(model, optimizer)
    with pytest.warns(UserWarning, match="no second moments that are known"):
        Saver(tmp_path).save(1, model, optimizer)
    Saver(tmp_path, second_moments=False).save(1, model, optimizer)


def test_momentum_alone_is_no_reason_to_warn(tmp_path: Path) -> None:
    model = Looped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trained(model, optimizer)
    assert load_checkpoint(Saver(tmp_path).save(1, model, optimizer)).optimizer["state"] == {}  # type: ignore[index]


def test_folder_of_another_run(tmp_path: Path) -> None:
    model = Looped()
    saver = Saver(tmp_path)
    saver.save(20, model, torch.optim.SGD(model.parameters(), lr=0.1))
    Saver(tmp_path).begin(20)  # the same training goes on
    with pytest.raises(CheckpointError, match=r"step-0000020\.pt, beyond step 10"):
        Saver(tmp_path).begin(10)


def test_a_write_that_fails_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Looped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = Saver(tmp_path).save(1, model, optimizer)
    before = path.read_bytes()

    def fail(content: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(StoreError, match="disk full"):
        Saver(tmp_path).save(1, model, optimizer)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    model = Looped()
    model.core.weight.ds_id = 0  # type: ignore[assignment]  # what DeepSpeed ZeRO-3 marks them with
    with pytest.raises(CheckpointError, match=r"core\.weight is spread over devices"):
        Saver(tmp_path).save(1, model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_no_loop_counts(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no loop counts"):
        read_loop_counts(tmp_path / "other.pt")
