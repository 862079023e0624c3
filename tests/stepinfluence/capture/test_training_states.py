"""Influence over all of a training: what is saved and goes on, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lossless import DATA, QUERY, Model, accumulate, batches, captured, examples, loss_fn
from stepinfluence import CheckpointError, ExactCapture, FeatureMismatchError, TrainingInfluence, attach


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("every", [1, 3])
def test_a_training_is_resumed(kind: Callable[..., Any], every: int, tmp_path: Path) -> None:
    def run(first: int, last: int, start: Any = None) -> tuple[TrainingInfluence, Any]:
        model = Model()
        optimizer = kind(model.parameters(), lr=0.05)
        influence = TrainingInfluence(
            captured(model), optimizer, [QUERY], loss_fn, refresh_every=every, query_ids=lambda _: ["a", ("b", 1)]
        )
        if start is not None:
            model.load_state_dict(start["model"])
            optimizer.load_state_dict(start["optimizer"])
            influence.restore(tmp_path / "influence.pt")
        with influence:
            for places, batch in list(batches(last))[first:]:
                with influence.batch(batch, ids=[f"example {i}" for i in places]) as inline:
                    inline.losses(loss_fn(model, batch)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return influence, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    whole, _ = run(0, 8)
    half, state = run(0, 5)
    half.save(tmp_path / "influence.pt")
    rest, _ = run(5, 8, state)
    one, two = whole.result(), rest.result()
    assert torch.equal(one.sdi, two.sdi)
    assert (one.train_ids, one.query_ids, one.etas) == (two.train_ids, two.query_ids, two.etas)
    assert two.query_ids == ("a", ("b", 1))
    assert repr(whole) == repr(rest)
    for a, b in zip(vars(whole.updates()).values(), vars(rest.updates()).values(), strict=True):
        assert torch.equal(a, b)


def test_states_of_others_are_refused(tmp_path: Path) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "influence.pt"
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
        accumulate(influence, model)
        optimizer.step()
        influence.save(path)
        state = influence.state_dict()
    for options in ({"refresh_every": 2}, {"per_step": False}, {"metric": "adam"}):
        with (
            TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn, **options) as other,
            pytest.raises(FeatureMismatchError, match=f"saved with another {next(iter(options))}"),
        ):
            other.restore(path)
    with TrainingInfluence(attach(model, body="core", sketch_size=8), optimizer, [QUERY], loss_fn) as other:
        with pytest.raises(FeatureMismatchError, match="another tables"):
            other.load_state_dict(state)
        with pytest.raises(CheckpointError, match="not a TrainingInfluence's"):
            other.load_state_dict({"format": 3})
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CheckpointError, match="could not be read"):
            other.restore(path)
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as other:
        with other.batch(DATA, ids=[object() for _ in range(12)]) as inline:
            inline.losses(loss_fn(model, DATA)).mean().backward()
        optimizer.zero_grad()
        assert other.state_dict()["counts"][0] == 0
        with other.batch(DATA, ids=[object() for _ in range(12)]) as inline:
            inline.losses(loss_fn(model, DATA)).mean().backward()
        optimizer.step()
        with pytest.raises(TypeError, match="which a file cannot keep"):
            other.save(path)


def test_an_optimizer_of_another_moment_is_refused() -> None:
    """Its moments are the metric, and make the training that goes on."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)

    def update(influence: TrainingInfluence) -> None:
        accumulate(influence, model)
        influence.optimizer.step()
        influence.optimizer.zero_grad()

    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn, refresh_every=3) as influence:
        for _ in range(3):
            update(influence)
        state = copy.deepcopy((influence.state_dict(), optimizer.state_dict()))
    fresh = torch.optim.AdamW(model.parameters(), lr=0.05)
    with TrainingInfluence(captured(model), fresh, [QUERY], loss_fn, refresh_every=3) as influence:
        influence.load_state_dict(state[0])
        with pytest.raises(FeatureMismatchError, match="after 3 updates of other moments than the optimizer has"):
            update(influence)
        fresh.load_state_dict(state[1])
        update(influence)
        assert influence.updates_made == 4


WRONG = (None, -1, "x", [], {}, float("nan"), torch.zeros(3), 10**30)


def test_states_whose_parts_do_not_fit_are_refused() -> None:
    """One part at a time is replaced; what is refused leaves the one that was to load it as it was."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn, refresh_every=3) as influence:
        for _ in range(3):
            accumulate(influence, model)
            optimizer.step()
            optimizer.zero_grad()
        state, before = influence.state_dict(), repr(influence)
        parts = [(name,) for name in state]
        parts += [(whole, name) for whole in ("kind", "tally", "saved_with") for name in state[whole]]
        accepted, said = set(), set()
        for *above, name in parts:
            for wrong in WRONG:
                other = copy.deepcopy(state)
                place = other[above[0]] if above else other
                place[name] = wrong
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's, of texts as indices
                    try:
                        influence.load_state_dict(other)
                        accumulate(influence, model)
                    except (CheckpointError, FeatureMismatchError) as error:
                        said.add(str(error).partition(":")[0])
                    else:
                        accepted.add((*above, name))
                influence.load_state_dict(state)
                optimizer.zero_grad()
                assert repr(influence) == before
    assert accepted <= {("age",), ("epoch",)}, "a number may be any"
    assert said <= {"state", "query"}


def test_arguments_that_do_not_fit_are_refused() -> None:
    model = Model()
    capture, parameters = captured(model), list(model.parameters())
    sgd = torch.optim.SGD(parameters, lr=0.1)

    def refused(match: str, *given: Any, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            TrainingInfluence(*given, **options)

    refused("capture: got ExactCapture", ExactCapture(model, body="core"), sgd, [QUERY], loss_fn, error=TypeError)
    refused("not known yet", attach(model), sgd, [QUERY], loss_fn)
    refused("optimizer: got Model", capture, model, [QUERY], loss_fn, error=TypeError)
    refused("metric: that of Adagrad", capture, torch.optim.Adagrad(parameters), [QUERY], loss_fn)
    refused("metric: got 'lion'", capture, sgd, [QUERY], loss_fn, metric="lion")
    refused("refresh_every: got 0", capture, sgd, [QUERY], loss_fn, refresh_every=0)
    refused("query: got an iterator", capture, sgd, iter([QUERY]), loss_fn)
    refused("core.b is not one of its own", capture, torch.optim.SGD(parameters[:1], lr=0.1), [QUERY], loss_fn)
    refused("it maximizes", capture, torch.optim.SGD(parameters, lr=0.1, maximize=True), [QUERY], loss_fn)
    groups = [{"params": [p], "lr": 0.1 * (k + 1)} for k, p in enumerate(parameters)]
    refused("learning rates 0.1, 0.2", capture, torch.optim.SGD(groups), [QUERY], loss_fn)
    with TrainingInfluence(capture, sgd, [QUERY], loss_fn) as influence:
        with pytest.raises(ValueError, match="no update was scored yet"):
            influence.result()
        with pytest.raises(ValueError, match="pass by_epoch=True"):
            influence.begin_epoch()
        accumulate(influence, model)
        sgd.step()
        with pytest.raises(ValueError, match="pass by_epoch=True"):
            influence.result(0)


def test_queries_that_change_are_refused() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    query = [QUERY]
    with TrainingInfluence(captured(model), optimizer, query, loss_fn) as influence:
        accumulate(influence, model)
        optimizer.step()
        optimizer.zero_grad()
        query[0] = examples(2, 3)
        with pytest.raises(FeatureMismatchError, match="query: the loader gave other examples"):
            accumulate(influence, model)


@pytest.mark.parametrize("late", [0, 2])
def test_a_state_goes_on_from_the_weights_that_it_was_saved_with(late: int, tmp_path: Path) -> None:
    """A checkpoint of the model from another moment: updates between the two would count twice, or never."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path, weights = tmp_path / "influence.pt", []

    def update(influence: TrainingInfluence, places: list[int], batch: Any) -> None:
        with influence.batch(batch, ids=[f"example {i}" for i in places]) as inline:
            inline.losses(loss_fn(model, batch)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    made = list(batches(4))
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
        for number, (places, batch) in enumerate(made[:3]):
            update(influence, places, batch)
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
            if number == 1:
                influence.save(path)
    model.load_state_dict(weights[late])
    with TrainingInfluence(captured(model), optimizer, [QUERY], loss_fn) as influence:
        influence.restore(path)
        with pytest.raises(FeatureMismatchError, match="saved after 2 updates of other weights than the model has"):
            update(influence, *made[3])
        influence.save(path)  # is still of the weights that it was loaded with
        model.load_state_dict(weights[1])
        influence.restore(path)
        update(influence, *made[3])
        assert influence.updates_made == 3
