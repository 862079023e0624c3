"""The looped language model experiment end to end at the minute scale, and its statistics against hand-made cases."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stepinfluence.attribution.checkpoints import load_checkpoint
from stepinfluence.attribution.scoring import influence_over_checkpoints
from stepinfluence.capture import attach
from stepinfluence.models import LoopedGPT
from typer.testing import CliRunner

from reproduce.__main__ import app
from reproduce.base import Run
from reproduce.nanochat import training
from reproduce.nanochat.analyse import body_parameters, parameters
from reproduce.nanochat.config import CONFIGS, Config, StageConfig, Variant
from reproduce.nanochat.corpus import batches, load
from reproduce.nanochat.distance import distances
from reproduce.nanochat.measure import dynamics, influence_by_step
from reproduce.nanochat.run import run
from reproduce.nanochat.text import ASSISTANT, DOCUMENT, END
from reproduce.report import write_report
from reproduce.style import styled

MINUTE: Config = CONFIGS["minute"]


@pytest.fixture
def conversations(tmp_path: Path) -> str:
    """Sums of small numbers, and another source that is not tested on."""
    path = tmp_path / "sums.jsonl"
    sums = [{"question": f"{a}+{b}?", "answer": f"{a + b}", "source": "sums"} for a in range(4) for b in range(3)]
    spelling = [{"messages": [{"role": "user", "content": "spell cat"}, {"role": "assistant", "content": "c a t"}],
                 "source": "spelling", "split": "train"}]  # fmt: skip
    records = [{**r, "split": "test" if k % 2 else "train"} for k, r in enumerate(sums)] + spelling
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


def finish(config: Config, folder: Path) -> tuple[Path, dict[str, object]]:
    task = Run(folder, "nanochat", "minute", config)
    with styled():
        outcome = run(task)
    write_report(task, outcome, "python -m reproduce nanochat")
    for name in ("horizons", "beside", "checkpoints", "variants"):
        assert f"![{name}](figures/{name}.png)" in outcome.body
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000
    return folder, json.loads((folder / "results.json").read_text())


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results = finish(MINUTE, tmp_path / "run")
    numbers = results["numbers"]
    for steps in (2, 4):
        sdi = np.load(folder / "stages" / f"sdi-protocol-{steps}.npz")["sdi"].astype(np.float64)
        assert sdi.shape == (MINUTE.train_examples, MINUTE.query_examples, steps)
        found = numbers["profiles"]["protocol"][str(steps)]
        last = found["last"]
        assert last["value"] == pytest.approx(sdi[..., -1].sum() / sdi.sum())
        assert last["low"] <= last["value"] <= last["high"]
        assert np.all(np.abs(sdi).sum((0, 1)) > 0)  # full backpropagation: no step is cut off
    assert numbers["loss_by_depth"]["protocol"][3] < math.log(MINUTE.model.vocab_size)  # it has learned something
    assert {row[2] for row in numbers["history"]["protocol"]} <= set(range(1, MINUTE.max_loops + 1))
    paths = sorted((folder / "checkpoints").glob("protocol-pretraining-*.pt"))
    rates = [load_checkpoint(path).learning_rate for path in paths]
    assert rates == [pytest.approx(0.02), pytest.approx(0.02 / 1.2)]

    monkeypatch.setattr(training, "train", pytest.fail)  # a second run trains nothing
    assert finish(MINUTE, tmp_path / "run")[1]["comparisons"] == results["comparisons"]


def test_fine_tuning_on_the_user_s_conversations(tmp_path: Path, conversations: str) -> None:
    config = replace(
        MINUTE,
        data=conversations,
        variants=(Variant("protocol"),),
        horizons=(2, 3),
        curvature=True,
        dense=(2,),
        stride=2,
    )
    corpus = load(config)
    assert corpus.fine_tuned
    train, query = corpus.examples()
    assert (len(train["tokens"]), len(query["tokens"])) == (6, 5)  # 6 sums; the other source is not tested on
    for rows in (train, query):
        for tokens, targets, mask in zip(rows["tokens"], rows["targets"], rows["mask"], strict=True):
            assert tokens[0] == DOCUMENT
            answer = targets[mask.bool()].tolist()
            assert tokens[mask.bool()][0] == ASSISTANT
            assert answer[-1] == END
            assert bytes(t - 4 for t in answer[:-1]).decode().isdigit()
    folder, results = finish(config, tmp_path / "run")
    assert len(results["numbers"]["history"]["protocol"]) == 10
    saved = {path.stem.rpartition("-")[0] for path in (folder / "checkpoints").glob("*-0*.pt")}
    assert saved == {"protocol-pretraining", "protocol-fine-tuning"}
    made = np.load(folder / "stages" / "sdi-protocol-3.npz")
    assert made["sdi"].shape == made["corrected"].shape == (6, 5, 3)
    assert not np.allclose(made["sdi"], made["corrected"], rtol=0.5)
    numbers = results["numbers"]
    taken = {t: len(found["checkpoints"]) for t, found in numbers["by_checkpoint"]["protocol"].items()}
    assert taken == {"2": 2, "3": 1}
    assert len(numbers["by_checkpoint"]["protocol"]["2"]["dampings"]) == 2
    assert set(numbers["profiles"]) == {"protocol", "corrected"}
    # One checkpoint: what is summed is what it has.
    np.testing.assert_allclose(made["by_checkpoint"][0], np.abs(made["sdi"]).sum((0, 1)), rtol=1e-5)
    text = (folder / "report.md").read_text()
    assert "| train | 7 | 7 | 0 |" in text
    assert "| test | 6 | 6 | 0 |" in text
    assert numbers["data"]["conversations"]["train"] == {"given": 7, "used": 7, "dropped": 0}
    assert results["config"]["data"] == "sums.jsonl"
    assert str(tmp_path) not in text + json.dumps(results)


def test_results_do_not_say_where_data_lies(tmp_path: Path, conversations: str) -> None:
    arguments = ["nanochat", "--scale", "minute", "--data", conversations, "--out", str(tmp_path / "run"), "--json"]
    made = CliRunner().invoke(app, arguments)
    assert made.exit_code == 0, made.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["command"] == "python -m reproduce nanochat --scale minute --seed 0 --data sums.jsonl"
    for name in ("results.json", "report.md", "report.html"):
        assert str(tmp_path) not in (tmp_path / "run" / name).read_text()


def test_distance_from_the_paper_by_hand() -> None:
    timings = {
        name: {"cpu_seconds": s} for name, s in (("sdi-protocol-2", 3.8), ("sdi-protocol-4", 5.0), ("sdi-x-2", 9))
    }
    run = SimpleNamespace(config=MINUTE, timings=timings)
    scores = {2: {"checkpoints": ["a", "b"]}, 4: {"checkpoints": ["b"]}}
    rows = {d.what: d for d in distances(run, load(MINUTE), scores, 1000)}  # type: ignore[arg-type]
    # 8.8 s for (2 x 2 + 4 x 1) x 11 steps of examples; the paper has 135 x 71 x 2048.
    assert rows["loop counts"].needed.endswith("would take 545 hours")
    assert rows["checkpoints of the last stage"].here == "2 (and 1 at most loop counts)"
    assert rows["training"].here == "576 tokens in 6 updates (6 pretraining)"  # batches of 4 passages of 24 tokens
    assert rows["parameters"].needed.startswith("328335 times")
    assert "conversations that do not fit" not in rows


def test_byte_pair_encoding(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the loop runs {k} times; the loop ends"}) for k in range(30)))
    config = replace(
        MINUTE, tokenizer="bpe", data=str(path), model=replace(MINUTE.model, vocab_size=300, sequence_len=8)
    )
    corpus = load(config)
    assert len(corpus.tokenizer.encode("the loop")) <= 2 < len("the loop")
    assert max(corpus.tokenizer.encode("é \x00 <end>")) < 300
    assert END not in corpus.tokenizer.encode("<end>")
    assert len(corpus.examples()[0]["tokens"]) == MINUTE.train_examples


def test_scores_are_those_of_the_library(tmp_path: Path) -> None:
    config = replace(MINUTE, horizons=(3,), curvature=True)
    corpus = load(config)
    made = training.train(config, config.variants[0], corpus, tmp_path, lambda _: None)
    paths = [tmp_path / name for name in made["checkpoints"]]
    found = influence_by_step(config, config.variants[0], corpus, paths, 3)
    capture = attach(
        training.make_model(config, config.variants[0]), body="core", sketch_size=config.sketch_size, seed=config.seed
    )
    train, query = (batches(rows, 4, "cpu") for rows in corpus.examples())
    for name, curvature in (("sdi", "none"), ("corrected", "fisher")):
        expected = influence_over_checkpoints(
            capture, paths, train, query, training.at_depth(3), curvature=curvature, progress=False
        )
        np.testing.assert_allclose(
            found[name], expected.sdi.numpy(), rtol=1e-4, atol=1e-6 * float(expected.sdi.abs().max())
        )


def test_before_training_the_last_step_has_all_influence() -> None:
    """What the report says of the protocol's adapter."""
    model = training.make_model(MINUTE, Variant("v"))
    with torch.no_grad():  # nanochat's zeros would hide it
        for parameter in (
            *model.head.parameters(),
            *(p.weight for b in model.core.blocks for p in b.residual_projections()),
        ):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    capture = attach(model, body="core", sketch_size=64)
    features = capture.featurize([load(MINUTE).examples()[1]], training.at_depth(3), progress=False).values
    assert float(features[:, :2].abs().max()) == 0.0
    assert bool(features[:, 2].any())


def test_truncation_and_adapter() -> None:
    model = training.make_model(MINUTE, Variant("protocol"))
    d = MINUTE.model.d_model
    assert torch.equal(model.core.adapter.weight, torch.cat((torch.zeros(d, d), torch.eye(d)), 1))
    loose = training.make_model(MINUTE, Variant("v", adapter="random", trained=False))
    assert bool((loose.core.adapter.weight[:, :d] != 0).all())
    assert bool((loose.head.weight != 0).any())
    muon, adam = training.make_optimizers(model, MINUTE)
    groups = [p for o in (muon, adam) for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()}
    assert len(groups) == len(list(model.parameters()))


def test_dynamics_of_loops_made_by_hand() -> None:
    model = training.make_model(MINUTE, Variant("v", adapter="random", trained=False))
    rows = {"tokens": torch.arange(12).view(2, 6)}
    weight, d = model.core.adapter.weight, MINUTE.model.d_model
    with torch.no_grad():
        for block in model.core.blocks:  # blocks that add nothing: the core is the adapter and a norm
            for projection in block.residual_projections():
                projection.weight.zero_()
        model.core.norm = torch.nn.Identity()
        weight.copy_(torch.cat((torch.eye(d) / 50, torch.eye(d)), 1))
    found = dynamics(model, rows, seed=0)
    assert found["contraction"] == pytest.approx(1 / 50, rel=1e-6)
    # The state is (1 + 1/50 + 1/50^2 + ...) times the input.
    assert found["state_over_input"] == pytest.approx(sum(50.0**-k for k in range(1, 6)), rel=1e-6)
    with torch.no_grad():
        weight[:, :d] = 2 * torch.eye(d)
    assert dynamics(model, rows, seed=0)["contraction"] == pytest.approx(2, rel=1e-6)
    assert model.head.weight.dtype == torch.float32


def test_learning_rate_and_checkpoints_by_hand() -> None:
    factors = [training.learning_rate_factor(u, 10) for u in range(1, 11)]
    assert factors == [1.0] * 9 + [0.5]
    assert [training.learning_rate_factor(u, 20) for u in (16, 17, 18, 20)] == [1.0, 1.0, 0.75, 0.25]
    assert training.checkpoint_updates(StageConfig(10, 3)) == {3, 7, 10}
    assert training.checkpoint_updates(StageConfig(5, 1)) == {5}


def test_data_that_changed_is_refused(tmp_path: Path, conversations: str) -> None:
    config = replace(MINUTE, data=conversations)
    task = Run(tmp_path / "run", "nanochat", "minute", config)
    task.stage("data", lambda: {"digest": "another"})
    with pytest.raises(ValueError, match="data: the text has changed"):
        run(task)


def test_paper_scale_is_the_paper_s() -> None:
    config = CONFIGS["paper"]
    assert round(parameters(config.model) / 1e6, 1) == 328.3
    model = LoopedGPT(MINUTE.model)
    assert parameters(MINUTE.model) == sum(p.numel() for p in model.parameters())
    assert body_parameters(MINUTE.model) == sum(p.numel() for p in model.core.parameters())
    assert (config.train_examples, config.query_examples, config.sketch_size) == (1024, 1024, 2048)
    assert (min(config.horizons), max(config.horizons), config.fine_tuning.checkpoints) == (2, 16, 71)
    assert config.variants[0].bptt_k == 4
    assert parameters(CONFIGS["gsm8k"].model) >= 1_500_000
    with pytest.raises(ValueError, match="data: this scale trains a vocabulary of its own"):
        load(config)
    with pytest.raises(ValueError, match="bytes make 260 tokens"):
        replace(MINUTE, model=replace(MINUTE.model, vocab_size=100))
