"""The fidelity experiment end to end at the minute scale, its tape against exact capture, its statistics by hand."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import FLOAT64
from rounding import measure_body
from stepinfluence import ExactCapture, attach, influence
from stepinfluence.errors import StepInfluenceError
from stepinfluence.models import LoopedGPT, LoopedGPTConfig, gpt_loss

from reproduce.base import Run
from reproduce.fidelity import measure, memory
from reproduce.fidelity.config import CONFIGS, MemoryConfig
from reproduce.fidelity.run import run
from reproduce.fidelity.statistics import (
    loglog_slope,
    mean_absolute_error,
    off_diagonal,
    relative_error,
    spread_evenly,
)
from reproduce.fidelity.tape import exact_sdi, record, sketched_sdi
from reproduce.fidelity.timing import classic_tracin, ratios
from reproduce.report import write_report
from reproduce.style import styled

TINY = replace(CONFIGS["minute"].model, steps=5)  # one more than steps taken at once by the exact scores


@pytest.mark.slow  # two processes of their own, which import torch
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["minute"]
    task = Run(tmp_path / "run", "fidelity", "minute", config)
    with styled():
        outcome = run(task)
    folder = write_report(task, outcome, "python -m reproduce fidelity").parent
    numbers = json.loads((folder / "results.json").read_text())["numbers"]

    # Recomputed from the stages, without the experiment's own functions.
    exact = np.load(folder / "stages" / "exact-scores.npz")["sdi"]
    found = np.load(folder / "stages" / "sketched-scores-iid.npz")["sdi"]
    assert found.shape == (3, 3, *exact.shape)
    assert exact.shape == (config.batch, config.batch, config.model.steps)
    want = np.linalg.norm((found - exact).reshape(3, 3, -1), axis=2) / np.linalg.norm(exact)
    assert np.allclose(numbers["errors"]["iid"]["sdi"], want)
    assert numbers["slopes"]["iid"][0] == pytest.approx(np.polyfit(np.log([64, 128, 256]), np.log(want.mean(1)), 1)[0])
    check_conservation(numbers["library"]["conservation_relative"])
    assert numbers["library"]["body_tensors"] == 7
    for search in numbers["memory"].values():
        assert search["feasible"] == 4
        assert search["attempts"][0][1] > 2**20
    for name in ("errors", "trajectories"):
        assert f"![{name}](figures/{name}.png)" in outcome.body
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000

    # A second run computes nothing.
    monkeypatch.setattr(measure, "record", pytest.fail)
    monkeypatch.setattr(memory, "search", pytest.fail)
    with styled():
        again = run(Run(tmp_path / "run", "fidelity", "minute", config))
    assert again.comparisons == outcome.comparisons


def check_conservation(found: float) -> None:
    """``found``: of each example and weight, the largest."""
    config = CONFIGS["minute"]
    made = measure.Scores(config)
    capture = attach(made.model, body="core", sketch_size=config.reference_size, seed=config.seed)
    sketches = {target.name: target.sketch for target in capture.targets}
    batch = {key: value[: config.checked_examples] for key, value in made.batch.items()}
    rounding = measure_body(made.model, [batch], gpt_loss, made.model.core, list(sketches))
    rounding.check_conservation(found, sketches, lambda difference, size: (difference / size).max(), len(sketches))


def test_tape_gives_the_scores_of_both_captures() -> None:
    model = measure.make_model(TINY, seed=3).double()
    batch = measure.random_batch(TINY, 3, seed=4)
    tape = record(model, batch)
    exact = ExactCapture(model, body="core").featurize([batch], gpt_loss, progress=False)
    assert relative_error(exact_sdi(tape).numpy(), influence(exact, exact).sdi.numpy()) < FLOAT64
    features = attach(model, body="core", sketch_size=64, hashing="iid", seed=5).featurize([batch], gpt_loss)
    assert relative_error(sketched_sdi(tape, 64, "iid", 5).numpy(), influence(features, features).sdi.numpy()) < FLOAT64
    assert relative_error(classic_tracin(model, batch).numpy(), influence(exact, exact).tracin.numpy()) < FLOAT64
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tape_refuses_what_it_cannot_hold() -> None:
    model = LoopedGPT(replace(TINY, norm="rmsnorm"))
    with pytest.raises(ValueError, match=r"core\.blocks\.0\.attention_norm\.weight is no weight of a linear layer"):
        record(model, measure.random_batch(TINY, 1, seed=0))


def test_features_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = measure.Scores(CONFIGS["minute"])
    sketch = measure.sketch
    monkeypatch.setattr(measure, "sketch", lambda *arguments: 1.001 * sketch(*arguments))
    with pytest.raises(StepInfluenceError, match="differ from sketches of recorded activations"):
        made.library()


def test_saved_bytes_counts_what_is_kept_once() -> None:
    one = measure.saved_bytes_per_example(TINY, seed=0)
    two = measure.saved_bytes_per_example(replace(TINY, steps=10), seed=0)
    four = measure.saved_bytes_per_example(replace(TINY, steps=20), seed=0)
    assert four - two == 2 * (two - one) > 0  # linear in the steps
    state = 4 * TINY.d_model * TINY.sequence_len
    assert one > TINY.steps * 10 * state  # a block keeps more than ten states


@pytest.mark.parametrize("limit", [0, 3, 4, 7, 8, 40, 41, 100, 10_000])
@pytest.mark.parametrize("ceiling", [4, 40, 43, 256])
def test_largest_feasible_is_what_going_up_finds(limit: int, ceiling: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    want = max((b for b in range(0, ceiling + 1, 4) if b <= limit), default=0)
    assert memory.largest_feasible(fits, step=4, ceiling=ceiling) == want
    assert len(tried) == len(set(tried)) <= 14
    assert max(tried) <= ceiling


def test_a_failing_memory_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert json.loads(command[-1])["batch"] == 4
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no such device")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(StepInfluenceError, match="sketches, batch 4 failed: RuntimeError: no such device"):
        memory.search(MemoryConfig(TINY, limit=2**30, ceiling=4), "sketches", seed=0, device="nowhere")


@pytest.mark.parametrize("method", memory.METHODS)
def test_every_method_runs(method: str) -> None:
    batch = measure.random_batch(TINY, 2, seed=0)
    memory.work(measure.make_model(TINY, seed=0), batch, method)


def test_checkpointed_body_gives_the_same_gradients() -> None:
    batch = measure.random_batch(TINY, 2, seed=0)
    grads = []
    for method in ("training step", "checkpointed"):
        model = measure.make_model(TINY, seed=0)
        body = model.core
        if method == "checkpointed":
            model.core = memory.CheckpointedCore(body)  # type: ignore[assignment]
        gpt_loss(model, batch).mean().backward()
        grads.append([p.grad.clone() for p in body.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_slope_by_hand() -> None:
    sizes = [256, 512, 1024, 2048]
    slope, error = loglog_slope(sizes, [3 * m**-0.5 for m in sizes])
    assert slope == pytest.approx(-0.5)
    assert error == pytest.approx(0, abs=1e-9)
    slope, error = loglog_slope([1, 4, 16], [1.0, 1.0, 0.25])  # -0.5, and a residual
    assert slope == pytest.approx(-0.5)
    assert error > 0.1
    with pytest.raises(ValueError, match="sizes: got 1"):
        loglog_slope([8, 8], [1.0, 2.0])
    with pytest.raises(ValueError, match="errors: some are not positive"):
        loglog_slope([8, 16], [1.0, 0.0])


def test_errors_by_hand() -> None:
    exact = np.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]])
    found = exact.copy()
    found[0, 1, 0] = 1.0
    assert relative_error(found, exact) == pytest.approx(1 / 5)
    assert mean_absolute_error(found, exact) == pytest.approx(1 / 7)
    assert mean_absolute_error(np.zeros_like(exact), exact) == 1
    assert spread_evenly(exact).tolist() == [[[1.5, 1.5], [0, 0]], [[0, 0], [2, 2]]]
    assert mean_absolute_error(spread_evenly(exact), exact) == 1
    assert off_diagonal(found).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="all scores are zero"):
        relative_error(found, np.zeros_like(exact))
    with pytest.raises(ValueError, match=r"found: got shape \(1,\)"):
        relative_error(np.ones(1), exact)


def test_ratios_are_medians_of_rounds() -> None:
    seconds = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 16.0]])
    assert ratios(seconds, ["step", "other"], "step") == {"step": 1.0, "other": 2.0}


def test_paper_scale_is_the_paper_s() -> None:
    paper = CONFIGS["paper"]
    assert paper.model == CONFIGS["cpu"].model == LoopedGPTConfig.paper()
    assert paper.sketch_sizes == (256, 512, 1024, 2048, 4096, 8192)
    assert (paper.sketch_seeds, paper.timing.batch, paper.timing.rounds, paper.memory.step) == (10, 40, 10, 4)
    assert paper.model.effective_depth == 132
    with pytest.raises(ValueError, match="reference_size: got 100"):
        replace(paper, reference_size=100)
