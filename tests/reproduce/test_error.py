"""The experiment ``error``: gradients and sketches against the library, statistics by hand, verdicts, and a run."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stepinfluence
import torch
from compare import FLOAT64
from stepinfluence.capture import ExactCapture
from stepinfluence.evaluation import Estimate
from stepinfluence.models.gpt import gpt_loss
from torch import Tensor

from reproduce.base import Run
from reproduce.error import measure
from reproduce.error import run as experiment
from reproduce.error.config import CONFIGS, FAMILIES, LemmaConfig, SearchConfig
from reproduce.error.gradients import Gradients, Pairs, exact, rounding, sketch
from reproduce.error.readings import bias_test, lemma_numbers, same_recall
from reproduce.error.statistics import effective_number, familywise, p_of_mean, recall
from reproduce.error.training import SparseMLP, accuracy, examples, make_model, neighbour_sums, train
from reproduce.error.verdicts import lemma_verdicts
from reproduce.report import write_report
from reproduce.style import styled

MINUTE = CONFIGS["minute"]


@pytest.fixture(scope="module")
def gradients() -> Gradients:
    return exact(make_model(MINUTE, 0).double(), examples(MINUTE, 4))


# ----------------------------------------------------------------------------------------------------------------
# Models


def test_targets_are_sums_of_neighbours() -> None:
    batch = neighbour_sums(MINUTE, 3, torch.Generator().manual_seed(0))
    for digits, sums in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        assert sums[0] == digits[0]
        assert sums[1:] == [(a + b) % MINUTE.modulus for a, b in pairwise(digits)]


def test_a_slow_loop_goes_all_the_way_in_one_step_and_half_in_two() -> None:
    fast, slow = (make_model(MINUTE, 0, kind=kind).double() for kind in ("adapter", "slow"))
    tokens = examples(MINUTE, 2)["tokens"]
    with torch.no_grad():
        assert torch.equal(fast(tokens, 1), slow(tokens, 1))
        injected = fast.embedding_norm(fast.embedding(tokens))
        state = torch.zeros_like(injected)
        for _ in range(2):
            moved = fast.core(state, injected, (fast.rotary_cos, fast.rotary_sin))
            state = (state + moved) / 2
        expected = fast.head(fast.final_norm(state))
        cap = MINUTE.model.logit_softcap
        assert cap is not None
        torch.testing.assert_close(slow(tokens, 2), cap * torch.tanh(expected / cap))


def test_few_hidden_units_are_used() -> None:
    model = make_model(MINUTE, 0, active=4)
    mlp = model.core.blocks[0].mlp
    assert isinstance(mlp, SparseMLP)
    seen: list[Tensor] = []
    mlp.proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(examples(MINUTE, 2)["tokens"])
    assert all(int((hidden != 0).sum(-1).max()) <= 4 for hidden in seen)
    assert any(int((hidden != 0).sum(-1).max()) == 4 for hidden in seen)


def test_training_repeats_and_learns() -> None:
    config = replace(MINUTE, updates=60, batch=32, learning_rate=1e-2)
    found = [train(config, make_model(config, 0), 0, checkpoints=2) for _ in range(2)]
    for one, other in zip(*found, strict=True):
        assert one.eta == other.eta
        assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    batch = examples(config, 64)
    assert accuracy(found[0][-1].model, batch) > accuracy(make_model(config, 0), batch)


# ----------------------------------------------------------------------------------------------------------------
# Gradients and sketches


@pytest.mark.parametrize("hashing", FAMILIES)
def test_sketches_are_those_of_attach(hashing: Any) -> None:
    model, batch = make_model(MINUTE, 1).double(), examples(MINUTE, 3)
    assert rounding(model, batch, exact(model, batch), 16, hashing) < FLOAT64
    other = exact(model, batch)
    other.values[0] *= 1.01
    assert rounding(model, batch, other, 16, hashing) > 1e-3


def test_scores_are_the_library_s(gradients: Gradients) -> None:
    model = make_model(MINUTE, 0).double()
    features = ExactCapture(model, body="core").featurize([examples(MINUTE, 4)], gpt_loss, progress=False)
    wanted = stepinfluence.influence(features, features).sdi
    pairs = Pairs(gradients.summed(), gradients)
    assert float((pairs.truth - wanted).norm() / wanted.norm()) < FLOAT64
    norms = gradients.summed().values.norm(dim=1) * gradients.values[1, 2].norm()
    torch.testing.assert_close(pairs.sizes[:, 1, 2], norms)


def test_errors_have_mean_zero_and_keep_within_the_bound(gradients: Gradients) -> None:
    pairs = Pairs(gradients.summed(), gradients)
    for hashing in FAMILIES:
        found = pairs.errors(32, hashing, range(200))
        mean, spread = found.mean(0), found.std(0)
        assert float((mean / (spread / 200**0.5 + 1e-12)).abs().max()) < 5
        limit = pairs.bound(32, hashing)
        assert bool((found.square().mean(0) <= 1.5 * limit).all())  # 1.5: the mean of 200 squares has an error itself


def test_exact_gradients_summed_over_steps(gradients: Gradients) -> None:
    whole = exact(make_model(MINUTE, 0).double(), examples(MINUTE, 4), per_step=False)
    assert float((whole.values - gradients.summed().values).norm() / whole.values.norm()) < FLOAT64


@pytest.mark.parametrize("structure", measure.STRUCTURES)
def test_the_largest_parts_are_kept(gradients: Gradients, structure: str) -> None:
    matrices = gradients.matrices()
    assert all(len(block.shape) == 2 for block in matrices.blocks)
    kept = measure.keep_largest(matrices, structure, 0.25)
    for block in matrices.blocks:
        before, after = matrices.of(block), kept.of(block)
        assert bool(((after == before) | (after == 0)).all())
        rows, columns = block.shape
        unit = {"entries": 1, "rows": columns, "columns": rows}[structure]
        most = unit * round(0.25 * rows * columns / unit)
        assert int((after != 0).flatten(-2).sum(-1).max()) <= most
        dropped = (before - after).abs().flatten(-2).amax(-1)
        if structure == "entries":
            least = after.abs().masked_fill(after == 0, torch.inf).flatten(-2).amin(-1)
            assert bool((dropped <= least).all())
    with pytest.raises(ValueError, match="structure: got 'blocks'"):
        measure.keep_largest(matrices, "blocks", 0.5)


def test_one_entry_is_kept_at_least(gradients: Gradients) -> None:
    kept = measure.keep_largest(gradients.matrices(), "entries", 1e-9)
    for block in kept.blocks:
        assert int((kept.of(block) != 0).flatten(-2).sum(-1).max()) == 1


def test_a_sketch_of_disjoint_blocks_side_by_side(gradients: Gradients) -> None:
    width = sketch(gradients, 16, "balanced", 0).shape[-1]
    vectors = sum(len(block.shape) == 1 for block in gradients.blocks)
    assert width == 16 * (len(gradients.blocks) - vectors) + 8 * vectors  # a vector of 8 needs no more


# ----------------------------------------------------------------------------------------------------------------
# Statistics and verdicts


def test_statistics_by_hand() -> None:
    assert effective_number(np.array([[1.0, 1, 1, 1], [4, 0, 0, 0]])) == pytest.approx(2.5)
    assert familywise([0.001, 0.02, 0.2]) == 2  # 0.05 / 3, 0.05 / 2
    assert familywise([0.02, 0.03, 0.2]) == 0
    assert p_of_mean([0.0, 0.0]) == 1
    assert p_of_mean([1.0, 1.1, 0.9]) < 0.01


def test_recall_by_hand() -> None:
    exact_scores = np.array([[4.0, 1], [3, 2], [2, 3], [1, 4]])
    found = np.array([[1.0, 1], [4, 2], [3, 3], [2, 4]])
    shares, unions = recall(found, exact_scores, 1, [1, 4])
    assert shares == [0.5, 1.0]  # row 0 leads the first query and comes last by the sketches
    assert unions == [0.5, 1.0]


def test_a_bias_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 0.02, 8).tolist() for _ in range(50)]
    assert bias_test(noise)["significant"] == 0
    assert bias_test([*noise, rng.normal(0.1, 0.02, 8).tolist()])["significant"] == 1


def test_same_recall_is_the_smallest_size() -> None:
    table = [[Estimate(a, a, a), Estimate(b, b, b)] for a, b in ((0.2, 0.6), (0.5, 0.9), (0.7, 1.0))]
    assert same_recall(table, (16, 32, 64), 16, 1) == 64
    assert same_recall(table, (16, 32, 64), 32, 1) is None


def lemma_stage(config: Any, *, scale: float) -> dict[str, Any]:
    """A stage in which mean squared errors are so many times eq. 12."""
    shape = (len(config.lemma.checkpoints), 5)
    limit = np.ones(shape)
    found: dict[str, Any] = {"lemma": limit}
    for hashing in FAMILIES:
        found |= {f"mse_{hashing}": scale * limit, f"se_{hashing}": 0.01 * limit, f"own_{hashing}": limit}
        found[f"independent_{hashing}"] = scale * limit / 2
    return found


@pytest.mark.parametrize(("scale", "holds"), [(0.5, "yes"), (1.02, "yes"), (1.2, "no")])
def test_the_verdict_on_the_lemma_follows_the_numbers(scale: float, holds: str) -> None:
    stages = [lemma_stage(MINUTE, scale=scale)] * 2
    tight = {h: {"ratio": 0.98, "own": 0.98, "se": 0.01} for h in FAMILIES}
    first, second, _, shared = lemma_verdicts(stages, tight, MINUTE)
    assert first.holds == holds
    assert second.holds == "yes"
    assert shared.holds == "yes"
    assert lemma_numbers(stages, MINUTE)["iid"][0]["pairs"] == 10


def test_one_checkpoint_shares_nothing() -> None:
    stage = measure.lemma(measure.Models(replace(MINUTE, lemma=replace(MINUTE.lemma, draws=5)), 0))
    np.testing.assert_allclose(stage["mse_iid"][0], stage["independent_iid"][0], rtol=1e-12)
    assert (stage["mse_iid"][1] < 2 * 2 * stage["independent_iid"][1] + 1e-30).all()


def test_settings_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoints: got \(1, 3, 8\)"):
        LemmaConfig(checkpoints=(1, 3, 8))
    with pytest.raises(ValueError, match="candidates: got"):
        SearchConfig(top=5)
    with pytest.raises(ValueError, match="seeds: an interval needs"):
        replace(MINUTE, seeds=1)
    with pytest.raises(ValueError, match="the MLP has fewer hidden units"):
        replace(MINUTE, sparsity=replace(MINUTE.sparsity, active=(64,)))


# ----------------------------------------------------------------------------------------------------------------
# The whole


@pytest.mark.slow
def test_a_run_is_reported_and_taken_up_again(tmp_path: Path) -> None:
    announced: list[str] = []
    task: Run[Any] = Run(tmp_path / "run", "error", "minute", MINUTE, announce=announced.append)
    with styled():
        outcome = experiment.run(task)
    write_report(task, outcome, "python -m reproduce error --scale minute --seed 0")
    assert len(announced) == 5 * MINUTE.seeds + 5 * MINUTE.seeds + 1
    results = json.loads((task.folder / "results.json").read_text())
    assert {v["holds"] for v in results["numbers"]["verdicts"]}
    assert len(list((task.folder / "figures").glob("*.png"))) == 4
    text = (task.folder / "report.md").read_text()
    for verdict in results["numbers"]["verdicts"]:
        assert f"| {verdict['claim']} |" in text
    announced.clear()
    again: Run[Any] = Run(tmp_path / "run", "error", "minute", MINUTE, announce=announced.append)
    with styled():
        assert experiment.run(again).body == outcome.body
    assert announced == []
