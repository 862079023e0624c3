"""The parity experiment end to end at its smallest scale, against direct computations on the checkpoints it leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import Expected
from rounding import in_double, influence_of_sketches, measure_body
from stepinfluence import attach, load_checkpoint
from stepinfluence.models.parity import ParityTransformer, parity_loss
from stepinfluence.models.parity_task import (
    ParityExample,
    alternating_probes,
    collate,
    influence_subset,
    make_train_set,
)

from reproduce.base import Outcome, Run
from reproduce.parity.config import CONFIGS, Config
from reproduce.parity.measure import alternating_rows, heldout_strings, running_parity
from reproduce.parity.run import run
from reproduce.report import write_report
from reproduce.style import styled

CONFIG = CONFIGS["minute"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run[Config], Outcome]:
    task = Run(tmp_path_factory.mktemp("parity") / "run", "parity", "minute", CONFIG)
    with styled():
        return task, run(task)


def test_report(done: tuple[Run[Config], Outcome]) -> None:
    task, outcome = done
    text = write_report(task, outcome, "python -m reproduce parity").with_suffix(".md").read_text(encoding="utf-8")
    assert "| accuracy at 10 bits |" in text
    for name in ("accuracy", "profile", "recurrence", "self-influence", "portrait", "clock"):
        assert f"![{name}](figures/{name}.png)" in outcome.body
        assert (task.folder / "figures" / f"{name}.png").stat().st_size > 5000
    assert {c.paper for c in outcome.comparisons} >= {"100 %", 4, "about 0.95", "about 93 %"}
    assert "NOT completed" not in text


def test_profile_is_the_influence_summed_over_checkpoints(done: tuple[Run[Config], Outcome]) -> None:
    task, outcome = done
    train_set = make_train_set(6, 32, seed=0)
    subset = influence_subset(train_set, per_tercile=12, longest=12, seed=0)
    assert len(subset) == 48
    probe, train = collate(alternating_probes(10)[:1]), collate(subset)
    model = ParityTransformer(CONFIG.training.model)
    names = outcome.numbers["training"]["files"]
    assert len(names) == 2
    parts = []
    for name in names:
        checkpoint = load_checkpoint(task.checkpoints / name)
        checkpoint.load_into(model)
        capture = attach(model, body=model.block, sketch_size=256, seed=0)
        sketches = {target.name: target.sketch for target in capture.targets}
        sides = [measure_body(model, [batch], parity_loss, model.block, list(sketches)) for batch in (train, probe)]
        parts.append((checkpoint.learning_rate, influence_of_sketches(*sides, sketches)))
    exact, plain, magnitude = (
        sum(eta * getattr(part, kind)[:, 0].sum(0) for eta, part in parts) for kind in ("exact", "plain", "magnitude")
    )
    Expected(exact, plain, magnitude, rows=False).check(torch.tensor(outcome.numbers["sdi_profile"]))
    assert outcome.numbers["sdi_profile"][10:] == [0, 0]


def test_forward_measurements_are_the_models(done: tuple[Run[Config], Outcome]) -> None:
    task, outcome = done
    model = ParityTransformer(CONFIG.training.model)
    load_checkpoint(task.checkpoints / outcome.numbers["training"]["files"][-1]).load_into(model)
    strings = heldout_strings(CONFIG, make_train_set(6, 32, seed=0), 0)
    batch = collate(strings)
    with torch.no_grad():
        answers = model.answer_logits(batch["tokens"], batch["read_step"]).argmax(-1)
    truth = torch.tensor([e.parity for e in strings])
    seeds = outcome.numbers["seeds"]
    assert seeds[0]["accuracy"] == pytest.approx(float((answers == truth).float().mean()))
    assert set(seeds) == {0, 1}
    assert seeds[0]["margin_period"] != seeds[1]["margin_period"] or seeds[0]["cosine"] != seeds[1]["cosine"]
    # 0101010101 has five ones: odd, so the margin is logit 1 minus logit 0.
    probe = collate(alternating_probes(10)[:1])
    path = model.answer_trajectory(probe["tokens"], probe["read_step"])
    with in_double(model):
        exact = model.answer_trajectory(probe["tokens"], probe["read_step"])
    odd = torch.tensor([1])
    size = exact.logits[..., :2].abs().sum(-1)  # the margin is a difference of these
    expected = Expected(exact.margin(odd), path.margin(odd), size, rows=False)
    expected.check(torch.tensor(outcome.numbers["margin"])[None])


def test_a_second_run_computes_nothing_again(
    done: tuple[Run[Config], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, outcome = done
    monkeypatch.setattr("stepinfluence.models.parity_task.train_parity", None)
    monkeypatch.setattr("reproduce.parity.influence.Attribution", None)
    monkeypatch.setattr("reproduce.parity.measure.forward", None)
    monkeypatch.setattr(Run, "figure", lambda self, name, figure: name)  # drawing takes seconds
    with styled():
        again = run(Run(task.folder, "parity", "minute", CONFIG))
    assert again.comparisons == outcome.comparisons


def test_every_profile_is_the_papers_protocol() -> None:
    for scale in ("cpu", "paper"):
        config = CONFIGS[scale]
        assert (config.test_length, config.test_length + 2) == (40, 42)
        assert 3 * config.per_tercile + config.longest == 512
        assert (config.test_examples, config.sketch_size, config.lag, config.states) == (384, 2048, 4, 4)
        assert (config.calibration, config.evaluation, config.quantile) == (256, 1024, 0.95)
        assert (config.training.max_digits, config.training.model.vocab_size) == (20, 6)
    paper = CONFIGS["paper"].training
    assert (paper.model.d_model, paper.model.n_heads, paper.max_steps) == (256, 64, 100_000)
    # The fixed curriculum (lengths 1 to 20) and the decay fill the paper's run exactly.
    assert paper.max_digits * paper.min_steps + paper.final_steps == paper.max_steps


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="test_length"):
        replace(CONFIG, test_length=6)
    with pytest.raises(ValueError, match="beyond"):
        replace(CONFIG, beyond=10)
    with pytest.raises(ValueError, match="test_examples"):
        replace(CONFIG, test_examples=65)
    assert replace(CONFIG, seed=1).other_seeds == ()  # the same run twice says nothing


def test_running_parity() -> None:
    examples = [ParityExample(0, "1101"), ParityExample(1, "0001")]
    assert running_parity(examples, 4, from_end=False).tolist() == [[1, 0, 0, 1], [0, 0, 0, 1]]
    assert running_parity(examples, 3, from_end=True).tolist() == [[1, 1, 0], [1, 1, 1]]


def test_alternating_rows_cover_all_lengths_and_no_more() -> None:
    rows = alternating_rows(2000, 10, seed=3)
    assert sorted(set(rows.tolist())) == list(range(18))  # two strings of each of the lengths 2 .. 10
