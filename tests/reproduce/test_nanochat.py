"""The looped language model experiment end to end at the minute scale, and its statistics against hand-made cases."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stepinfluence.attribution.checkpoints import load_checkpoint
from stepinfluence.models import LoopedGPT

from reproduce.base import Run
from reproduce.nanochat import training
from reproduce.nanochat.analyse import body_parameters, parameters
from reproduce.nanochat.config import CONFIGS, Config, StageConfig, Variant
from reproduce.nanochat.corpus import load
from reproduce.nanochat.measure import dynamics
from reproduce.nanochat.run import run
from reproduce.nanochat.statistics import (
    cancellation,
    energy_profile,
    growth,
    last_share_interval,
    shares,
    signed_profile,
)
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
    for name in ("horizons", "variants"):
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
        assert found["last"] == pytest.approx(sdi[..., -1].sum() / sdi.sum())
        assert found["low"] <= found["last"] <= found["high"]
        assert np.all(np.abs(sdi).sum((0, 1)) > 0)  # full backpropagation: no step is cut off
    assert numbers["loss_by_depth"]["protocol"][3] < math.log(MINUTE.model.vocab_size)  # it has learned something
    assert {row[2] for row in numbers["history"]["protocol"]} <= set(range(1, MINUTE.max_loops + 1))
    rates = [load_checkpoint(p).learning_rate for p in sorted((folder / "checkpoints").glob("protocol-*.pt"))]
    assert rates == [pytest.approx(0.02), pytest.approx(0.02 / 1.2)]

    monkeypatch.setattr(training, "train", pytest.fail)  # a second run trains nothing
    assert finish(MINUTE, tmp_path / "run")[1]["comparisons"] == results["comparisons"]


def test_fine_tuning_on_the_user_s_conversations(tmp_path: Path, conversations: str) -> None:
    config = replace(MINUTE, data=conversations, variants=(Variant("protocol"),), horizons=(2, 3))
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
    assert all("fine-tuning" in path.name for path in (folder / "checkpoints").iterdir() if "pre" not in path.name)
    assert np.load(folder / "stages" / "sdi-protocol-3.npz")["sdi"].shape == (6, 5, 3)


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
    with pytest.raises(ValueError, match="data: this scale trains a vocabulary of its own"):
        load(config)
    with pytest.raises(ValueError, match="bytes make 260 tokens"):
        replace(MINUTE, model=replace(MINUTE.model, vocab_size=100))


def test_profiles_by_hand() -> None:
    sdi = np.array([[[1.0, 3.0], [-1.0, 2.0]]])  # one training example, two queries, two steps
    assert signed_profile(sdi).tolist() == [0.0, 5.0]
    assert energy_profile(sdi).tolist() == [2.0, 5.0]
    assert shares(energy_profile(sdi)).tolist() == [2 / 7, 5 / 7]
    assert cancellation(sdi) == 1.0
    assert cancellation(np.array([[[1.0, 2.0], [-2.0, 0.0]]])) == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="profile: sums to zero"):
        shares(np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="sdi: all influences are zero"):
        cancellation(np.zeros((1, 2, 2)))


def test_growth_by_hand() -> None:
    fit = growth(np.array([0.5, 1.0, 2.0, 4.0]))
    assert fit is not None
    assert fit.ratio == pytest.approx(2)
    assert fit.r_squared == pytest.approx(1)
    assert fit.low == pytest.approx(2)
    bent = growth(np.array([1.0, 2.0, 2.0, 4.0]))
    assert bent is not None
    assert bent.low < bent.ratio < bent.high
    assert bent.r_squared < 1
    assert growth(np.array([1.0, 2.0, 4.0])) is None
    assert growth(np.array([1.0, -1.0, 2.0, 3.0])) is None


def test_interval_covers_what_it_should() -> None:
    rng = np.random.default_rng(0)
    sdi = np.abs(rng.normal(size=(3, 40, 4)))
    sdi[..., -1] *= 5
    low, high = last_share_interval(sdi, seed=0)
    assert low < sdi[..., -1].sum() / sdi.sum() < high
    assert last_share_interval(sdi, seed=0) == (low, high)
    wide = last_share_interval(sdi[:, :5], seed=0)
    assert wide[1] - wide[0] > high - low
    same = np.ones((2, 6, 4))
    assert last_share_interval(same, seed=0) == (0.25, 0.25)
