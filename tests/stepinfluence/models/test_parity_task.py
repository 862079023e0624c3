"""The parity task: data, batches, probes, curriculum, and a training run that is what its config says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stepinfluence.models import ParityConfig, ParityTransformer, parity_loss
from stepinfluence.models._parity_resume import TrainState
from stepinfluence.models.parity_task import (
    EQUALS,
    IGNORED,
    PADDING,
    Curriculum,
    ParityExample,
    ParityTrainConfig,
    accuracy_by_length,
    alternating_probes,
    collate,
    influence_subset,
    make_heldout_set,
    make_train_set,
    train_parity,
)

SHORT = ParityTrainConfig(
    model=ParityConfig(d_model=16, n_heads=4),
    max_digits=4,
    train_per_length=8,
    batch_size=16,
    threshold=None,
    min_steps=4,
    final_steps=6,
    warmup_steps=3,
    learning_rate=3e-3,
    final_learning_rate=3e-4,
    checkpoint_digits=(2, 3),
)


def test_example() -> None:
    example = ParityExample(7, "0110101")
    assert (example.n_digits, example.parity, example.text) == (7, 0, "0110101=")
    assert ParityExample(0, "1").parity == 1
    for bits in ("", "012", "0 1"):
        with pytest.raises(ValueError, match=r"^bits: got '.*'; pass a non-empty string of 0 and 1"):
            ParityExample(0, bits)


def test_train_set_is_fixed_distinct_and_in_order() -> None:
    examples = make_train_set(12, 32, seed=3)
    assert examples == make_train_set(12, 32, seed=3)
    assert examples != make_train_set(12, 32, seed=4)
    assert [example.id for example in examples] == list(range(len(examples)))
    assert len({example.bits for example in examples}) == len(examples)
    lengths = [example.n_digits for example in examples]
    assert lengths == sorted(lengths)
    assert [lengths.count(n) for n in range(1, 13)] == [2, 4, 8, 16] + [32] * 8
    assert [example.bits for example in examples[:6]] == ["0", "1", "00", "01", "10", "11"]


def test_train_set_is_uniform() -> None:
    """Each bit is a fair coin: ones among the bits of 4000 strings of 20, within 5 standard deviations."""
    bits = "".join(example.bits for example in make_train_set(20, 4000) if example.n_digits == 20)
    assert abs(bits.count("1") - len(bits) / 2) < 5 * math.sqrt(len(bits)) / 2


def test_heldout_set_shares_nothing_with_the_train_set() -> None:
    train = make_train_set(10, 32, seed=0)
    heldout = make_heldout_set([3, 5, 6, 10, 40], 16, exclude=train, seed=0)
    assert not {example.bits for example in train} & {example.bits for example in heldout}
    lengths = [example.n_digits for example in heldout]
    # All strings of 3 and 5 bits are in the training set: nothing is left to hold out.
    assert lengths == [6] * 16 + [10] * 16 + [40] * 16
    rest = make_heldout_set([6], 1000, exclude=train)
    assert len(rest) == 64 - 32


def test_alternating_probes() -> None:
    zero_one, one_zero = alternating_probes(5)
    assert (zero_one.bits, one_zero.bits) == ("01010", "10101")
    assert (zero_one.parity, one_zero.parity) == (0, 1)
    forty = alternating_probes(40)
    assert [probe.bits for probe in forty] == ["01" * 20, "10" * 20]
    assert [probe.id for probe in forty] == [0, 1]
    assert collate(forty)["tokens"].shape == (2, 42)  # T = n + 2 = 42, as in the paper


def test_collate() -> None:
    batch = collate([ParityExample(5, "101"), ParityExample(9, "1")])
    assert batch["tokens"].tolist() == [
        [1, 0, 1, EQUALS, PADDING],
        [1, EQUALS, PADDING, PADDING, PADDING],
    ]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [0, IGNORED], [IGNORED, 1] + [IGNORED] * 3]
    assert batch["mask"].tolist() == [[False] * 3 + [True, False], [False, True] + [False] * 3]
    assert batch["read_step"].tolist() == [3, 1]
    assert batch["ids"].tolist() == [5, 9]
    assert {batch[key].dtype for key in ("tokens", "labels", "read_step", "ids")} == {torch.int64}
    assert batch["mask"].dtype == torch.bool
    assert collate([ParityExample(0, "101")], length=9)["tokens"].shape == (1, 9)
    with pytest.raises(ValueError, match=r"^length: got 3, but the longest string has 3 bits"):
        collate([ParityExample(0, "101")], length=3)
    with pytest.raises(ValueError, match=r"^examples: got none"):
        collate([])


def test_influence_subset_is_the_papers() -> None:
    examples = make_train_set(20, 256)
    subset = influence_subset(examples)
    assert len(subset) == len(set(subset)) == 512
    assert subset == influence_subset(examples)
    assert subset != influence_subset(examples, seed=1)
    assert [(e.n_digits, e.id) for e in subset] == sorted((e.n_digits, e.id) for e in subset)
    thirds = [0, 0, 0]
    for example in influence_subset(examples, longest=0):
        thirds[example.id * 3 // len(examples)] += 1
    assert thirds == [128, 128, 128]
    at_20 = [e for e in influence_subset(examples, per_tercile=0) if e.n_digits == 20]
    assert len(at_20) == 128
    with pytest.raises(ValueError, match=r"^examples: got none"):
        influence_subset([])


def test_curriculum_grows_as_accuracy_and_steps_permit() -> None:
    curriculum = Curriculum(2, 4, threshold=0.9, min_steps=3)
    assert [curriculum.update(0.5) for _ in range(10)] == [None] * 10  # steps, but not accuracy
    while curriculum.update(1.0) is None:
        pass
    assert (curriculum.max_digits, curriculum.accuracy, curriculum.complete) == (3, 0.5, False)
    curriculum.accuracy = 1.0
    assert [curriculum.update(1.0) for _ in range(3)] == [None, None, 3]  # accuracy, but not steps
    curriculum.accuracy = 1.0
    curriculum.update(float("nan"))  # a batch without strings of that length says nothing
    assert curriculum.accuracy == 1.0
    assert [curriculum.update(1.0) for _ in range(3)] == [None, 4, None]  # the last length only once
    assert curriculum.complete
    assert curriculum.max_digits == 4
    with pytest.raises(ValueError, match=r"^start: got 5; pass at most end=4"):
        Curriculum(5, 4, threshold=0.9, min_steps=3)


def test_curriculum_by_steps_alone() -> None:
    """Fan et al. grow the length on a fixed schedule, whatever the accuracy."""
    curriculum = Curriculum(1, 3, threshold=None, min_steps=5)
    mastered = [curriculum.update(0.0) for _ in range(15)]
    assert [step for step, digits in enumerate(mastered, start=1) if digits] == [5, 10, 15]


def test_training_follows_its_config() -> None:
    seen: list[tuple[int, float, torch.Tensor]] = []

    def save(step: int, model: ParityTransformer, optimizer: torch.optim.Optimizer) -> None:
        seen.append((step, optimizer.param_groups[0]["lr"], model.read_out.weight.detach().clone()))

    result = train_parity(SHORT, on_checkpoint=save, progress=False)
    # Lengths 2, 3 and 4 take 4 steps each, then 6 final ones.
    assert [row.max_digits for row in result.history] == [2] * 4 + [3] * 4 + [4] * 4 + [4] * 6
    assert [row.step for row in result.history] == list(range(1, 19))
    rates = [row.learning_rate for row in result.history]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[3:12] == pytest.approx([3e-3] * 9)
    assert rates[12:] == sorted(rates[12:], reverse=True)
    assert rates[-1] == pytest.approx(3e-4)
    assert result.complete
    assert result.checkpoints == [(4, rates[3], 2), (8, rates[7], 3), (18, rates[17], 4)]
    assert [(step, rate) for step, rate, _ in seen] == [(step, rate) for step, rate, _ in result.checkpoints]
    assert torch.equal(seen[-1][2], result.model.read_out.weight)
    assert not torch.equal(seen[0][2], seen[1][2])
    assert result.train_set == make_train_set(4, 8, seed=0)
    assert not result.model.training


@pytest.mark.parametrize(("count", "steps"), [(0, []), (1, [15]), (2, [14, 16]), (7, [13, 14, 15, 16, 17])])
def test_checkpoints_are_spread_over_the_final_phase(count: int, steps: list[int]) -> None:
    """Of six updates, 13 to 18; the last has its checkpoint anyway, and none comes twice."""
    seen: list[int] = []
    config = replace(SHORT, final_checkpoints=count)
    result = train_parity(config, on_checkpoint=lambda step, *_: seen.append(step), progress=False)
    assert seen == [4, 8, *steps, 18]
    assert [mastered for _, _, mastered in result.checkpoints] == [2, 3, *(4 for _ in steps), 4]


def test_training_is_deterministic_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first = train_parity(SHORT, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = train_parity(SHORT, progress=False)
    other = train_parity(replace(SHORT, seed=1), progress=False)
    for a, b, c in zip(*(r.model.parameters() for r in (first, second, other)), strict=True):
        assert torch.equal(a, b)
        assert a.shape == c.shape
    assert first.history == second.history
    assert first.history[0].loss != other.history[0].loss


@pytest.mark.parametrize("stop", [2, 8, 18])  # in the curriculum, at a checkpoint, at the end
def test_a_stopped_training_goes_on(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same weights, history and checkpoints, to the bit."""
    monkeypatch.setattr("stepinfluence.models._parity_training.SAVE_EVERY", 2)
    file, seen = tmp_path / "training.pt", list[int]()
    whole = train_parity(SHORT, progress=False)
    saved = TrainState.save

    def killed_after(state: TrainState, path: Path) -> None:
        saved(state, path)
        if len(state.history) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainState, "save", killed_after)
    with pytest.raises(KeyboardInterrupt):
        train_parity(SHORT, progress=False, resume=file)
    monkeypatch.setattr(TrainState, "save", saved)
    again = train_parity(SHORT, on_checkpoint=lambda step, *_: seen.append(step), progress=False, resume=file)
    assert again.history == whole.history
    assert again.checkpoints == whole.checkpoints
    assert seen == [step for step, _, _ in whole.checkpoints if step > stop or step == 18]
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"^resume: .* is of a run with other settings; remove it"):
        train_parity(replace(SHORT, seed=1), progress=False, resume=file)


def test_training_stops_at_max_steps() -> None:
    config = replace(SHORT, threshold=1.0, max_steps=7, min_steps=100)
    seen: list[int] = []
    result = train_parity(config, on_checkpoint=lambda step, *_: seen.append(step), progress=False)
    assert not result.complete
    assert len(result.history) == 7
    assert seen == [7]
    assert result.checkpoints == [(7, 3e-3, 1)]


def test_training_learns() -> None:
    config = replace(ParityTrainConfig.demo(), max_digits=3, checkpoint_digits=(), final_steps=20, max_steps=1000)
    result = train_parity(config, progress=False)
    assert result.complete
    assert accuracy_by_length(result.model, result.train_set) == {1: 1.0, 2: 1.0, 3: 1.0}


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    train_parity(SHORT, progress=True)
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "100%" in shown
    train_parity(SHORT, progress=False)
    assert capsys.readouterr().err == ""


def test_accuracy_counts_right_answers() -> None:
    model = ParityTransformer(ParityConfig(d_model=16, n_heads=4))
    with torch.no_grad():  # a model that always answers "even"
        model.read_out.weight.zero_()
        model.read_out.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0]))
    examples = [ParityExample(i, bits) for i, bits in enumerate(["1", "00", "01", "11", "0000", "1000"])]
    assert accuracy_by_length(model, examples, batch_size=2) == {1: 0.0, 2: pytest.approx(2 / 3), 4: 0.5}
    assert parity_loss(model, collate(examples)).isfinite().all()
    with pytest.raises(ValueError, match=r"^batch_size: got 0"):
        accuracy_by_length(model, examples, batch_size=0)


def test_presets() -> None:
    demo = ParityTrainConfig.demo(seed=5)
    assert demo.seed == 5
    assert demo.max_digits >= 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_digits": 0}, r"^max_digits: got 0; pass a positive int"),
        ({"start_digits": 5}, r"^start_digits: got 5; pass at most max_digits=4"),
        ({"frontier_share": 1.5}, r"^frontier_share: got 1.5"),
        ({"threshold": 0.0}, r"^threshold: got 0.0"),
        ({"learning_rate": -1.0}, r"^learning_rate: got -1.0"),
        ({"final_learning_rate": 0.0}, r"^final_learning_rate: got 0.0"),
        ({"checkpoint_digits": (2, 9)}, r"^checkpoint_digits: got \[9\]; pass lengths in 1 .. max_digits=4"),
        ({"final_checkpoints": -1}, r"^final_checkpoints: got -1; pass a non-negative int"),
        ({"seed": -1}, r"^seed: got -1; pass a non-negative int"),
    ],
)
def test_config_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **changes)
