"""``sdi demo --quick`` from end to end, once; the tests look at what it left."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import unpack
from rich.console import Console
from rounding import measure_body
from stepinfluence import Capture, load_checkpoint
from stepinfluence.app.cli import app
from stepinfluence.app.demo import run as demo
from stepinfluence.app.demo.data import DemoConfig, DemoResult
from stepinfluence.app.demo.report import demo_report, percent
from stepinfluence.app.demo.run import run_demo
from stepinfluence.app.demo.summary import show
from stepinfluence.app.view.report import render_report
from stepinfluence.attribution.aggregation import balanced
from stepinfluence.attribution.periods import Period
from stepinfluence.models.parity import ParityConfig, ParityTransformer, parity_loss
from stepinfluence.models.parity_task import ParityExample, TrainResult
from typer.testing import CliRunner

pytest.importorskip("plotly")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    images = out.parent / "images"
    done = CliRunner().invoke(app, ["demo", "--quick", "--json", "--out", str(out), "--images", str(images)])
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def test_writes_what_it_says(run: tuple[Path, dict[str, object]]) -> None:
    out, summary = run
    files = summary["files"]
    assert isinstance(files, dict)
    assert all(Path(path).exists() for path in files.values())
    assert {p.name for p in out.iterdir()} == {"report.html", "influence.npz", "config.json", "checkpoints"}
    images = out.parent / "images"
    assert {p.name for p in images.iterdir()} == {
        "demo-trajectories.png",
        "demo-profile.png",
        "demo-findings.json",
    }
    findings, queries = json.loads((images / "demo-findings.json").read_text()), summary["queries"]
    assert isinstance(queries, list)
    assert findings["query"] == queries[0]["text"]
    assert findings["periods"] == queries[0]["periods"]
    assert findings["loop_steps"] == 10


def test_figures(run: tuple[Path, dict[str, object]]) -> None:
    _, summary = run
    assert 0 < float(str(summary["sdi_error"])) < 0.2  # m = 512 on a model of 13,000 parameters
    stages = summary["stages"]
    assert isinstance(stages, list)
    assert [s["name"] for s in stages] == [
        "train the model",
        "choose among its checkpoints",
        "measure its accuracy",
        "influence at each checkpoint",
        "check conservation",
        "compare with exact gradients",
    ]
    assert all(s["seconds"] > 0 for s in stages)


def test_scores(run: tuple[Path, dict[str, object]]) -> None:
    out, summary = run
    arrays = np.load(out / "influence.npz", allow_pickle=False)
    sdi = arrays["sdi"]
    assert sdi.shape == (len(arrays["train_ids"]), len(arrays["query_ids"]), 10)  # two steps more than bits
    assert list(arrays["query_texts"][:2]) == ["01010101=", "10101010="]
    lengths = np.char.str_len(arrays["query_texts"]) - 1
    assert set(lengths) == {7, 8}
    for column, n in enumerate(lengths):
        assert not sdi[:, column, n:].any()  # steps after the read-out: exactly zero
        assert (sdi[:, column, :n] != 0).any(0).all()
    assert not set(arrays["train_texts"]) & set(arrays["query_texts"][2:])  # held out
    parts = arrays["by_checkpoint"]
    assert parts.shape == (5, *sdi.shape)  # at 4 and 6 bits, and the best three from the end of the curriculum on
    assert arrays["trained"].tolist() == [2, 3, 4]
    assert arrays["chosen"] in (2, 3, 4)
    assert np.array_equal(arrays["plain"], balanced(parts[2:]))
    assert np.array_equal(sdi, balanced(arrays["corrected_by_checkpoint"][2:]))
    for scores in (sdi, arrays["plain"]):
        assert (np.abs(scores).sum((0, 2)) <= 100.01).all()  # per cent, less what cancels between checkpoints
    assert summary["curvature"] == {"kind": "fisher", "damping": arrays["damping"].tolist()}
    exact = arrays["exact_sdi"]
    sketched = arrays["plain"][np.ix_(arrays["exact_rows"], arrays["exact_columns"])]
    error = np.linalg.norm(sketched - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(summary["sdi_error"], rel=1e-4)
    queries = summary["queries"]
    assert isinstance(queries, list)
    energy = np.abs(parts[:, :, 0]).sum((1, 2))
    np.testing.assert_allclose(queries[0]["checkpoint_shares"], energy / energy.sum(), rtol=1e-4)
    shares = np.abs(sdi[:, 0]).sum(1, dtype=np.float64)
    assert queries[0]["largest_example"] == pytest.approx(shares.max() / shares.sum(), rel=1e-9)
    best = int(sdi[:, 0].sum(1).argmax())
    assert queries[0]["helpful"][0]["id"] == arrays["train_ids"][best]
    assert queries[0]["helpful"][0]["peak_step"] == int(np.abs(sdi[best, 0]).argmax()) + 1


def test_report_holds_these_scores(run: tuple[Path, dict[str, object]]) -> None:
    out, summary = run
    assert isinstance(summary["checkpoints"], list)
    arrays = np.load(out / "influence.npz", allow_pickle=False)
    page = (out / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    parts = arrays["corrected_by_checkpoint"]
    alone = [balanced(parts[k : k + 1]) for k in (4, 3, 2, 1, 0)]
    views = [arrays["sdi"], arrays["plain"], *alone, arrays["by_checkpoint"].sum(0)]
    for column, query in enumerate(data["queries"]):
        assert np.array_equal(unpack(query["margin"]), arrays["query_margins"][column])
        for view, scores in zip(query["views"], views, strict=True):
            assert np.array_equal(unpack(view["values"]), scores[view["rows"], column])
    units = ["% of the query's influence"] * 7 + ["first order, weighted by learning rate"]
    assert [view["unit"] for view in data["views"]] == units
    assert [v["name"] for v in data["views"]] == [
        "corrected for curvature, trained checkpoints, each counting alike",
        "SDI (the paper’s), trained checkpoints, each counting alike",
        *(f"{name} alone, corrected for curvature" for name in reversed(summary["checkpoints"])),
        "SDI, plain sum over all, by learning rate",
    ]
    assert "nats" not in page.partition("<main")[2].partition("<script")[0]
    assert "sdi demo --quick --seed 0" in page


def test_checkpoints_carry_their_learning_rate(run: tuple[Path, dict[str, object]]) -> None:
    out, summary = run
    checkpoints = sorted((out / "checkpoints").iterdir())
    assert len(checkpoints) == 5
    assert [load_checkpoint(p).learning_rate for p in checkpoints] == summary["etas"]


@pytest.fixture(scope="module")
def again(run: tuple[Path, dict[str, object]], tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """The run repeated from its config.json, in this process."""
    config = DemoConfig.from_json(run[0] / "config.json")
    assert config == DemoConfig.quick(seed=0)
    torch.set_num_threads(2)
    conserved = demo._conservation

    def check(capture: Capture, batches: list[dict[str, torch.Tensor]], **options: bool) -> float:
        found = conserved(capture, batches, **options)
        sketches = {target.name: target.sketch for target in capture.targets}
        rounding = measure_body(capture.model, batches, parity_loss, capture.model.block, list(sketches))
        rounding.check_conservation(found, sketches, lambda difference, size: (difference / size).max())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_conservation", check)
        result = run_demo(config, tmp_path_factory.mktemp("again"), progress=False)
    assert torch.get_num_threads() == 2  # as it was
    return result


def test_replay_gives_the_same_scores(run: tuple[Path, dict[str, object]], again: DemoResult) -> None:
    assert np.array_equal(again.sdi, np.load(run[0] / "influence.npz")["sdi"])
    assert run[1]["conservation_error"] == again.conservation > 0
    assert again.solved  # nothing is required of a quick run
    assert not replace(again, config=replace(again.config, required_accuracy=1.0)).solved
    assert demo_report(again).checks[0].passed


def test_one_checkpoint_cannot_own_what_is_shown_first(again: DemoResult) -> None:
    """A checkpoint whose gradients explode is named, and changes nothing of what is shown first."""
    assert again.dominance(0) is None
    assert "SDI energy" not in summary_of(again)
    huge = again.by_checkpoint.copy()
    huge[3] *= 2.0**40  # exact in float32
    exploded = replace(again, by_checkpoint=huge, plain=balanced(huge[list(again.trained)]))
    owner = exploded.dominance(0)
    assert owner is not None
    assert owner.name == again.checkpoint_names[3]
    assert "holds 99.9 % of this query's SDI energy" in summary_of(exploded)
    assert "holds 99.9 % of this query's SDI energy" in render_report(demo_report(exploded))
    assert np.array_equal(exploded.plain, again.plain)


def summary_of(result: DemoResult) -> str:
    screen = Console(width=100, record=True, file=io.StringIO())
    show(screen, result, 0.0)
    return " ".join(screen.export_text().split())


def test_summary_says_only_what_its_tests_support(again: DemoResult) -> None:
    assert "shows no period in this run" in summary_of(again)  # 8 bits, hardly trained
    assert "repeats every" not in summary_of(again)
    assert "nats" not in summary_of(again)
    steps = np.arange(again.sdi.shape[2])
    regular = np.broadcast_to(np.where(steps % 4 == 3, 1.0, 0.0), again.sdi.shape).astype(np.float32)
    longer = [replace(q, example=ParityExample(0, "01" * 20), margin=np.arange(42.0)) for q in again.queries]
    found = replace(
        again, sdi=np.tile(regular[..., :8], (1, 1, 6))[..., :42], queries=tuple(longer), accuracy_beyond={40: 1.0}
    )
    assert "summed over all scored strings repeats every 4 loop steps" in summary_of(found)
    assert "permutation test p = 0.001" in summary_of(found)


def test_the_best_checkpoints_are_kept_and_the_best_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy is made up for each checkpoint: by its place in the list."""
    saved, model = [], ParityTransformer(ParityConfig(d_model=8, n_heads=2))
    for k in range(6):
        with torch.no_grad():
            model.read_out.bias.fill_(k)
        saved.append(tmp_path / f"step-{k:05d}.pt")
        torch.save({"model": model.state_dict(), "step": k}, saved[-1])
    right = {0: (1, 1), 1: (1, 1), 2: (1, 0.5), 3: (1, 1), 4: (0.4, 1), 5: (1, 0.7)}  # at 8 and at 10 bits
    asked: list[int] = []

    def made_up(model: ParityTransformer, examples: list[ParityExample]) -> dict[int, float]:
        n = examples[0].n_digits
        asked.append(n)
        return {n: right[int(model.read_out.bias[0].item())][n > 8]}

    monkeypatch.setattr("stepinfluence.app.demo.run.accuracy_by_length", made_up)
    config = replace(DemoConfig.quick(), probe_lengths=(10, 8), required_accuracy=0.99)
    made = [(k, 0.1, 7 if k < 2 else 8) for k in range(6)]  # the first two within the curriculum
    result = TrainResult(model, [], [], made, complete=True, seconds=1.0)
    best = demo._best(result, saved, config, progress=False)
    assert best == [3, 5, 2]
    assert asked == [8, 10, 8, 10, 8, 8, 10]  # the longer ones only where the shorter are solved
    assert model.read_out.bias[0].item() == 3
    assert demo._keep(result, saved, best, config) == [saved[k] for k in (0, 1, 2, 3, 5)]
    assert not saved[4].exists()
    unfinished = replace(result, checkpoints=[(k, 0.1, 5) for k in range(6)], complete=False)
    assert demo._best(unfinished, saved, config, progress=False) == [5]


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="probe_lengths: got"):
        replace(DemoConfig.quick(), probe_lengths=(9,))
    with pytest.raises(ValueError, match="query_lengths: got"):
        replace(DemoConfig.quick(), query_lengths=())


@pytest.mark.parametrize("content", ["", "{}", '{"config": {"training": {}}}', '{"config": 3}', "\x00"])
def test_config_of_something_else(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config: .* is not the config\.json of a demo"):
        DemoConfig.from_json(path)


def test_readme_says_what_the_tests_of_its_figure_found() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "docs" / "images" / "demo-findings.json").read_text(encoding="utf-8"))
    figure = readme[readme.index("![Influence of training") : readme.index("## Install")]
    assert f"over its {found['loop_steps']} loop steps" in figure
    assert f"0101… of {found['bits']} bits" in figure
    tested = Period(**found["periods"]["profile"])
    said = f"repeats every {tested.lag} loop steps (permutation test on this run, p = {tested.p_value:.3f})"
    assert (said in figure) == ("repeats every" in figure) == tested.found
    assert found["command"] == "sdi demo --seed 0"


def test_percent_never_flatters() -> None:
    assert percent(1.0) == "100\u00a0%"
    assert percent(0.99999) == "99.9\u00a0%"
    assert percent(0.5) == "50.0\u00a0%"
