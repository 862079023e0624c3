"""The experiment ``planted``: planted data, definitions of scores, and a run from end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import Expected
from compare import FLOAT64
from stepinfluence import ExactCapture, load_checkpoint
from torch import Tensor

from reproduce.base import Run
from reproduce.planted import analyse, measure, retraining, timing
from reproduce.planted import run as experiment
from reproduce.planted.config import CONFIGS, Config, make_task
from reproduce.planted.planting import Distinct, Planted, clean, mislabel, plant
from reproduce.planted.training import accuracy_of, answer_loss, every_step_loss, make_model, train
from reproduce.report import write_report
from reproduce.style import styled

MINUTE = CONFIGS["minute"]
SORTING = make_task("sorting", large=False)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(SORTING, MINUTE)


def rows_equal(planted: Planted, row: int, query: int) -> bool:
    return bool((planted.train.inputs[row] == planted.queries.inputs[query]).all())


def test_what_is_planted_is_what_is_said(planted: Planted) -> None:
    truth = SORTING.states(planted.train.inputs)
    answers_wrong = (truth[:, -1] != planted.train.states[:, -1]).any(1).numpy()
    np.testing.assert_array_equal(answers_wrong, planted.wrong)
    assert planted.mislabelled.sum() == MINUTE.mislabelled
    assert (planted.mislabelled & planted.wrong).sum() == MINUTE.mislabelled
    assert (SORTING.states(planted.queries.inputs) == planted.queries.states).all()
    rare = SORTING.has_rare(planted.train.inputs).numpy()
    for column, kind in enumerate(planted.kind):
        critical = np.flatnonzero(planted.critical[:, column])
        copies = [row for row in range(len(planted.train)) if rows_equal(planted, row, column)]
        if kind == "rule":
            np.testing.assert_array_equal(critical, np.flatnonzero(rare))
            assert copies == []
        elif kind == "plain":
            assert not len(critical)
            assert copies == []
        else:
            assert list(critical) == copies
            assert len(copies) == MINUTE.copies
            assert planted.wrong[critical].all() == (kind == "poisoned")


def test_copies_with_a_wrong_answer_agree(planted: Planted) -> None:
    for column in planted.of_kind("poisoned"):
        states = planted.train.states[torch.from_numpy(planted.critical[:, column])]
        assert (states == states[0]).all()


def test_planting_repeats_and_depends_on_the_seed(planted: Planted) -> None:
    again, other = plant(SORTING, MINUTE), plant(SORTING, dataclasses.replace(MINUTE, seed=1))
    assert torch.equal(planted.train.inputs, again.train.inputs)
    assert torch.equal(planted.train.states, again.train.states)
    assert not torch.equal(planted.train.inputs, other.train.inputs)


def test_too_few_inputs_are_an_error() -> None:
    draw = Distinct(make_task("parity", large=False), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="task 'parity' has too few inputs"):
        draw(1025)


def test_mislabelled_answers_differ_from_the_right_ones() -> None:
    task = make_task("parity", large=False)
    inputs = task.sample(200, torch.Generator().manual_seed(0))
    wrong = mislabel(task, inputs, torch.Generator().manual_seed(1))
    assert (wrong.states[:, -1] != task.states(inputs)[:, -1]).any(1).all()


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ValueError, match="name: got 'chess'; use one of copy, addition, sorting, parity"):
        make_task("chess", large=False)


@pytest.mark.parametrize("name", CONFIGS["paper"].tasks)
def test_every_scale_has_enough_inputs(name: str) -> None:
    for config in (CONFIGS["cpu"], dataclasses.replace(CONFIGS["paper"], examples=1000)):
        data = plant(make_task(name, large=config.large), config)
        assert len(data.train) == data.critical.shape[0]


def test_losses_are_means_over_answer_positions() -> None:
    torch.set_default_dtype(torch.float64)
    task = make_task("copy", large=False)
    model = make_model(task, MINUTE, seed=0)
    batch = clean(task, task.sample(3, torch.Generator().manual_seed(0))).batches()[0]
    log = [torch.log_softmax(model.read_out(h), -1).detach() for h in model.hidden(batch["tokens"])]
    place = list(task.answer_positions)
    expected = torch.stack(
        [-sum(log[-1][b, p, batch["states"][b, -1, p]] for p in place) / len(place) for b in range(3)]
    )
    torch.testing.assert_close(answer_loss(task)(model, batch).detach(), expected)
    every = torch.stack(
        [
            -sum(log[t][b, p, batch["states"][b, t + 1, p]] for p in place for t in range(task.steps))
            / (len(place) * task.steps)
            for b in range(3)
        ]
    )
    torch.testing.assert_close(every_step_loss(task)(model, batch).detach(), every)


def test_training_repeats_learns_and_saves_what_it_says(tmp_path: Path) -> None:
    config = dataclasses.replace(MINUTE, train_steps=150, d_model=32, examples=128)
    task = make_task("copy", large=False)
    data = clean(task, task.sample(128, torch.Generator().manual_seed(0)))
    model, paths = train(task, data, config, loss=answer_loss(task), seed=0, folder=tmp_path)
    assert [p.name for p in paths] == ["step-000075.pt", "step-000150.pt"]
    assert accuracy_of(model, task, data)[0] > 0.8
    short = dataclasses.replace(config, train_steps=5)
    first, second, other = (train(task, data, short, loss=answer_loss(task), seed=s)[0] for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.body.block.mlp.fc.weight, other.body.block.mlp.fc.weight)


def test_definitions_agree_where_they_must(tmp_path: Path, planted: Planted) -> None:
    torch.set_default_dtype(torch.float64)
    _, paths = train(SORTING, planted.train, MINUTE, loss=answer_loss(SORTING), seed=0, folder=tmp_path)
    config = dataclasses.replace(MINUTE, sketch_sizes=(16, 4096))
    found = measure.all_scores(SORTING, planted, paths, config)
    named = measure.by_name(found)
    largest = np.abs(named[measure.CLASSIC]).max()
    assert analyse.conservation(found) < FLOAT64
    # A sketch as long as the largest parameter keeps nearly everything.
    assert np.abs(named[measure.sketched(4096)] - named[measure.EXACT]).max() < 0.1 * largest
    np.testing.assert_allclose(found["trajectories"].sum(2), named[measure.sketched(4096)], atol=FLOAT64 * largest)
    assert np.abs(named[measure.COSINE]).max() <= 1 + FLOAT64
    last = measure.all_scores(SORTING, planted, paths[-1:], config)
    np.testing.assert_allclose(
        named[measure.LAST_CHECKPOINT], measure.by_name(last)[measure.CLASSIC], atol=FLOAT64 * largest
    )
    # One checkpoint, a copy of the query: its influence is the query's self-influence.
    column = planted.of_kind("duplicates")[0]
    row = int(np.flatnonzero(planted.critical[:, column])[0])
    assert measure.by_name(last)[measure.EXACT][row, column] == pytest.approx(
        last["self_exact"][row].sum(), rel=FLOAT64
    )
    assert last["self_last"][row] == pytest.approx(last["self_exact"][row].sum(), rel=FLOAT64)


def test_probes_read_what_is_there() -> None:
    task = make_task("sorting", large=False)
    config = dataclasses.replace(MINUTE, d_model=32)
    model = make_model(task, config, seed=0)
    with torch.no_grad():  # a body that keeps the embedded input as its state: the input can be read at any step
        for parameter in model.body.block.parameters():
            parameter.zero_()
    data = clean(task, task.sample(300, torch.Generator().manual_seed(0)))
    values, right = timing.decode(model, task, data[:200], data[200:], state=True)
    assert values.shape == (100, task.steps + 1, task.tokens)
    assert right[0] > 0.99
    assert right[-1] < 0.7  # what is not there is not read: the list is never sorted


def test_the_most_harmful_of_every_query_go_first() -> None:
    given = np.array([[-3.0, 5.0], [-2.0, -1.0], [0.0, -4.0], [9.0, 9.0]], dtype=np.float32)
    # Worst of each: 0 and 2; second worst: 1 and 1.
    assert set(retraining.most_harmful_each(given, 2)) == {0, 2}
    assert set(retraining.most_harmful_each(given, 3)) == {0, 1, 2}
    assert list(retraining.most_helpful(given[:, 0], 2)) == [3, 2]


def check_conservation(found: float, paths: list[Path], planted: Planted) -> None:
    """Of all pairs the largest difference between TracIn by plain gradients and the sum of its steps."""
    model, loss = make_model(SORTING, MINUTE, seed=0), answer_loss(SORTING)
    rates, values, plain = [], [], []
    for path in paths:
        checkpoint = load_checkpoint(path)
        checkpoint.load_into(model.float())
        rates.append(checkpoint.learning_rate)
        plain.append(measure._plain_tracin(model, loss, planted, rates[-1]))
        capture = ExactCapture(model.double(), body=model.body)
        sides = (planted.train, planted.queries)
        values += [capture.featurize(side.batches(), loss, progress=False).values for side in sides]

    def tracin(*sides: Tensor, first: int = 0) -> Tensor:
        pairs = zip(rates, sides[::2], sides[1::2], strict=True)
        return sum(r * torch.einsum("nsd,qtd->nq", left, right[:, first:]) for r, left, right in pairs)  # type: ignore[return-value]

    magnitude = tracin(*(side.abs() for side in values))
    expected = Expected(tracin(*values), sum(plain), magnitude, rows=False)  # type: ignore[arg-type]
    without_first = tracin(*values, first=1)
    expected.check_difference(found, lambda difference, size: difference.max() / size.max(), without_first)


def test_minute_run_end_to_end(tmp_path: Path, planted: Planted) -> None:
    folder = tmp_path / "run"
    config: Config = MINUTE
    with styled():
        run: Run[Config] = Run(folder, "planted", "minute", config)
        outcome = experiment.run(run)
        again: Run[Config] = Run(folder, "planted", "minute", config)
        assert experiment.run(again) == outcome
    write_report(run, outcome, "python -m reproduce planted --scale minute")
    results = json.loads((folder / "results.json").read_text())
    assert {c["paper"] for c in results["comparisons"][:6]} == {0.87, 0.89, 0.62}
    found = results["numbers"]["tasks"]["sorting"]
    check_conservation(found["conservation"], sorted((folder / "checkpoints").rglob("*.pt")), planted)
    assert len(found["timing"]["taught"]["energy_share"]) == SORTING.steps
    assert sum(found["timing"]["answer"]["energy_share"]) == pytest.approx(1)
    assert 0 <= found["mislabelled"]["self_exact"][0] <= 1
    report = (folder / "report.md").read_text()
    for name in ("timing", "critical", "trajectories", "mislabelled", "retraining"):
        assert f"figures/{name}.png" in report
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000
