"""From a project to stores: the same rows as by hand, resumed, in parts, and with examples that fail."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stepinfluence
import torch
from folders import content
from stepinfluence import CheckpointError, ConfigError, LossError, Project, ProjectError, StoreError
from stepinfluence.app.runs import Prepared, RunConfig, SplitConfig, SplitReport, Worker, run_splits
from stepinfluence.app.runs.prepared import expand
from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.store import Store, verify

SMALL = SplitConfig(batch_size=4, shard_rows=8, threads=1)  # as all tests have, see conftest


def featurize(
    project: Path,
    out: Path,
    *splits: str,
    worker: Worker | None = None,
    settings: SplitConfig = SMALL,
    accept_changes: bool = False,
    **options: Any,
) -> list[SplitReport]:
    config = RunConfig(project, dict.fromkeys(splits or ("train",), settings), sketch_size=16, **options)
    prepared = Prepared(Project.load(project), config, torch.device("cpu"))
    return list(run_splits(prepared, out, worker=worker, accept_changes=accept_changes, progress=False))


@pytest.fixture
def checkpoints(project_file: Path, tmp_path: Path) -> tuple[str, ...]:
    model = Project.load(project_file).model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in (9, 10):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * step)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = step / 100
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / f"step-{step}.pt")
    return (str(tmp_path / "step-*.pt"),)


def test_rows_are_those_of_capture_featurize(project_file: Path, tmp_path: Path) -> None:
    done = featurize(project_file, tmp_path / "run", "train", "query")
    assert [(r.rows, r.complete, r.written, r.failed) for r in done] == [(22, True, 3, {}), (5, True, 1, {})]
    project = Project.load(project_file)
    model = project.model()
    capture = stepinfluence.attach(model, body="core", sketch_size=16)
    for split, per_step in (("train", False), ("query", True)):
        data = list(project.dataset(split))
        batches = [project.collate(data[k : k + 4]) for k in range(0, len(data), 4)]
        expected = capture.featurize(batches, project.loss, per_step=per_step)
        store = Store.open(tmp_path / "run" / split)
        assert store.per_step == per_step
        assert torch.equal(store.features().values, expected.values)
        assert store.losses().tolist() == expected.losses.tolist()
        assert store.row(3).id == f"{split}-3"
        assert store.row(3).text == f"example {split}-3"
        assert verify(store.path) == []


def test_again_does_nothing_and_missing_shards_only(project_file: Path, tmp_path: Path) -> None:
    featurize(project_file, tmp_path / "run")
    before = content(tmp_path / "run")
    assert featurize(project_file, tmp_path / "run")[0].written == 0
    (tmp_path / "run" / "train" / "c000" / "shard-00000001.json").unlink()
    assert featurize(project_file, tmp_path / "run")[0].written == 1
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_do_not_depend_on_the_number_of_workers(
    project_file: Path, tmp_path: Path, checkpoints: tuple[str, ...], size: int
) -> None:
    featurize(project_file, tmp_path / "one", "train", "query", checkpoints=checkpoints)
    for rank in reversed(range(size)):
        done = featurize(
            project_file, tmp_path / "many", "train", "query", worker=Worker(rank, size), checkpoints=checkpoints
        )
        assert done[0].complete == (rank == 0)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_the_workspace_is_recorded_as_a_number(project_file: Path, tmp_path: Path) -> None:
    featurize(project_file, tmp_path / "run")
    known = RunConfig.load(tmp_path / "run" / "config.yaml").workspace
    assert known == stepinfluence.attach(Project.load(project_file).model(), body="core").sketching.workspace
    featurize(project_file, tmp_path / "run", "query", workspace=known)
    with pytest.raises(ConfigError, match=f"workspace: the run in .* was begun with {known}, not 0"):
        featurize(project_file, tmp_path / "run", "query", workspace=0)
    featurize(project_file, tmp_path / "other", workspace=0)
    assert RunConfig.load(tmp_path / "other" / "config.yaml").workspace == 0


def test_checkpoints_with_their_learning_rates(
    project_file: Path, tmp_path: Path, checkpoints: tuple[str, ...]
) -> None:
    featurize(project_file, tmp_path / "run", checkpoints=checkpoints, metric="adam")
    store = Store.open(tmp_path / "run" / "train")
    assert [(c.name, c.eta) for c in store.checkpoints] == [("step-9.pt", 0.09), ("step-10.pt", 0.1)]
    assert all(c.space.metric for c in store.checkpoints)
    assert not torch.equal(store.features(0).values, store.features(1).values)
    assert RunConfig.load(tmp_path / "run" / "config.yaml").checkpoints[1].endswith("step-10.pt")
    with pytest.raises(ConfigError, match="matches no file; quote"):
        featurize(project_file, tmp_path / "other", checkpoints=("nothing-*.pt",))


def test_a_run_that_failed_at_once_is_repeated_with_the_settings_it_asked_for(
    project_file: Path, write_project: Callable[..., Path], tmp_path: Path, checkpoints: tuple[str, ...]
) -> None:
    """Nothing was written: neither the run's config nor an empty store bind the next call."""
    out = tmp_path / "run"
    plain = tmp_path / "plain.pt"
    torch.save(Project.load(project_file).model().state_dict(), plain)
    with pytest.raises(CheckpointError, match="--eta 1"):
        featurize(project_file, out, checkpoints=(str(plain),))
    assert not out.exists()
    assert featurize(project_file, out, checkpoints=(str(plain),), eta=1.0)[0].complete
    with pytest.raises(ConfigError, match=r"eta: the run in .* was begun with 1\.0"):
        featurize(project_file, out, checkpoints=(str(plain),), eta=2.0)

    broken = write_project(('losses * torch.where(batch["bad"] == 1, float("nan"), 1.0)', "1 / 0"))
    out = tmp_path / "failing"
    with pytest.raises(ProjectError, match="ZeroDivisionError"):
        featurize(broken, out, "train", "query")
    with pytest.raises(ProjectError, match="ZeroDivisionError"):
        featurize(broken, out, "train", "query", worker=Worker(0, 2))
    assert not out.exists()
    smaller = dataclasses.replace(SMALL, batch_size=2, shard_rows=4)
    assert featurize(project_file, out, "train", settings=smaller)[0].complete
    featurize(project_file, out, "query", settings=smaller)
    with pytest.raises(ConfigError, match=r"batch_size: split 'train' .* was begun with 2"):
        featurize(project_file, out, "train")


def test_names_of_checkpoints(tmp_path: Path) -> None:
    """Brackets in a folder's name, and patterns that match folders only."""
    folder = tmp_path / "run[1]" / "a"
    folder.mkdir(parents=True)
    for step in (10, 9):
        (folder / f"step-{step}.pt").write_text("")
    for pattern in ("run[1]/a/*.pt", "run[1]/*/step-*.pt", "run?1?/a/*.pt", "run[[]1]/a/step-[0-9]*.pt"):
        found = expand([str(tmp_path / pattern)])
        assert [path.name for path in found] == ["step-9.pt", "step-10.pt"], pattern
    with pytest.raises(ConfigError, match=r"matches folders with no checkpoint in them .*such as .*/\*\.pt"):
        expand([str(tmp_path / "run[1]" / "*")])
    with pytest.raises(ConfigError, match="checkpoints: got the text"):
        RunConfig(tmp_path / "p.py", {"train": SMALL}, checkpoints="step.pt")


def test_checkpoint_folders_and_a_reader_of_the_projects(
    project_file: Path, write_project: Callable[..., Path], tmp_path: Path
) -> None:
    model = Project.load(project_file).model()
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        torch.save(torch.optim.SGD(model.parameters(), lr=step / 100).state_dict(), folder / "optimizer.pt")
        torch.save({"w": model.state_dict(), "rate": step / 10}, tmp_path / f"own-{step}.bin")
    (tmp_path / "checkpoint-11").mkdir()  # nothing in it: not taken for one
    featurize(project_file, tmp_path / "run", checkpoints=(str(tmp_path / "checkpoint-*"),))
    stored = Store.open(tmp_path / "run" / "train").checkpoints
    assert [(c.name, c.eta) for c in stored] == [("checkpoint-9", 0.09), ("checkpoint-10", 0.1)]
    reader = """
def load_checkpoint(path):
    content = torch.load(path, weights_only=True)
    return {"model": content["w"], "optimizer": {"param_groups": [{"lr": content["rate"]}]}}
"""
    own = write_project(("def text(example):", f"{reader}\ndef text(example):"))
    featurize(own, tmp_path / "own", checkpoints=(str(tmp_path / "own-*.bin"),))
    assert [c.eta for c in Store.open(tmp_path / "own" / "train").checkpoints] == [0.9, 1.0]


def test_folded_in_one_go_as_afterwards(project_file: Path, tmp_path: Path, checkpoints: tuple[str, ...]) -> None:
    from stepinfluence.store import fold_store

    featurize(project_file, tmp_path / "plain", checkpoints=checkpoints)
    featurize(project_file, tmp_path / "folded", checkpoints=checkpoints, fold=True)
    after = fold_store(tmp_path / "plain" / "train", tmp_path / "after")
    assert content(tmp_path / "folded" / "train") == content(after.path)


def test_new_examples_have_the_stores_features(
    project_file: Path, tmp_path: Path, checkpoints: tuple[str, ...]
) -> None:
    for fold in (False, True):
        out = tmp_path / f"run-{fold}"
        featurize(project_file, out, "query", checkpoints=checkpoints, fold=fold)
        run = StoredRun.open(out)
        found = run.new_features(Project.load(project_file).dataset("query"), batch_size=4)
        store = run.store("query")
        assert len(found) == (1 if fold else 2)
        for k, features in enumerate(found):
            assert torch.equal(features.values, store.features(k).values)
            features.space.require_equal(store.checkpoints[k].space)


def test_layout_sum(project_file: Path, tmp_path: Path) -> None:
    featurize(project_file, tmp_path / "run", layout="sum")
    assert Store.open(tmp_path / "run" / "train").width == 16


# ----------------------------------------------------------------------------------------------------------------
# Examples that fail

BAD = ('"x": torch.randn(6, generator=generator)}', '"x": torch.randn(6, generator=generator), "bad": int(n == 5)}')
UNREADABLE = (
    "        return super().__getitem__(index)",
    "        return super().__getitem__(index if index != 5 else 99)",
)
UNEVEN = (
    "torch.randn(6, generator=generator)}",
    "nn.functional.pad(torch.randn(6, generator=generator), (0, int(n == 5)))}",
)


@pytest.mark.parametrize(
    ("change", "named", "reason"),
    [
        (BAD, "train-5", "loss is NaN or infinite"),
        (UNREADABLE, "row 5", "reading the example failed: IndexError"),
        (UNEVEN, "row 4 to 7", "shapes"),
    ],
)
def test_stop_or_skip(
    project_file: Path,
    write_project: Callable[..., Path],
    tmp_path: Path,
    change: tuple[str, str],
    named: str,
    reason: str,
) -> None:
    # Other batches may be summed in another order: in float64 that is not to be seen once it is stored in float32.
    double = (
        ("return Looped()", "return Looped().double()"),
        ("torch.randn(6, generator=generator)", "torch.randn(6, generator=generator).double()"),
    )
    path = write_project(change, *double, name="my_project.py")
    with pytest.raises((ProjectError, LossError), match=named):
        featurize(path, tmp_path / "stopped")
    done = featurize(path, tmp_path / "run", on_error="skip")[0]
    assert list(done.failed) == [5]
    assert reason in done.failed[5]
    write_project(*double, name="my_project.py")
    featurize(path, tmp_path / "all")
    store, whole = Store.open(tmp_path / "run" / "train"), Store.open(tmp_path / "all" / "train")
    assert store.valid.tolist() == [n != 5 for n in range(22)]
    assert math.isnan(store.losses()[5])
    kept = [n for n in range(22) if n != 5]
    torch.testing.assert_close(store.features(rows=kept).values, whole.features(rows=kept).values)
    assert [store.row(n).id for n in kept] == [whole.row(n).id for n in kept]
    # Other shards do not notice.
    assert torch.equal(store.features(rows=range(8, 22)).values, whole.features(rows=range(8, 22)).values)
    # A rerun takes a stopped run on, with what it has.
    assert featurize(path, tmp_path / "stopped", on_error="skip")[0].complete


def test_skipped_at_one_of_the_folded_checkpoints(
    write_project: Callable[..., Path], tmp_path: Path, project_file: Path, checkpoints: tuple[str, ...]
) -> None:
    path = write_project(BAD, name="my_project.py")
    done = featurize(path, tmp_path / "run", checkpoints=checkpoints, fold=True, on_error="skip")[0]
    assert list(done.failed) == [5]


def test_a_shard_in_which_all_fail_stops(write_project: Callable[..., Path], tmp_path: Path) -> None:
    path = write_project(("** 2", "* float('nan')"))
    with pytest.raises(
        ProjectError, match=r"all examples of shard 0 failed .* id 'train-0': .*: loss\(\): loss is NaN"
    ):
        featurize(path, tmp_path / "run", on_error="skip")


def test_what_is_wrong_with_the_model_is_not_skipped(write_project: Callable[..., Path], tmp_path: Path) -> None:
    path = write_project(("self.core(state + x)", "self.core(state + x).detach()"))
    with pytest.raises(LossError, match="require grad"):
        featurize(path, tmp_path / "run")
    path = write_project(("return state.sum(-1)", "return state.sum(-1) * state.mean()"))
    with pytest.raises(stepinfluence.LayoutError):
        featurize(path, tmp_path / "run2", on_error="skip")


def test_errors_of_the_users_code_name_rows_and_line(write_project: Callable[..., Path], tmp_path: Path) -> None:
    path = write_project(("    losses = model", "    raise RuntimeError('oh')\n    losses = model"))
    with pytest.raises(ProjectError, match=r"row 0 to 3 \(id 'train-0', .*\): RuntimeError: oh \(line \d+\)"):
        featurize(path, tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------------
# Runs that were begun otherwise


def test_other_settings_are_refused(project_file: Path, tmp_path: Path) -> None:
    featurize(project_file, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"hashing: the run in .* was begun with 'balanced', not 'iid'"):
        featurize(project_file, tmp_path / "run", hashing="iid")
    with pytest.raises(ConfigError, match=r"batch_size: split 'train' in .* was begun with 4, not 2"):
        featurize(project_file, tmp_path / "run", settings=dataclasses.replace(SMALL, batch_size=2))


def test_other_data_or_weights_are_refused(
    project_file: Path, write_project: Callable[..., Path], tmp_path: Path
) -> None:
    featurize(project_file, tmp_path / "run")
    (tmp_path / "run" / "train" / "c000" / "shard-00000001.json").unlink()
    write_project(('f"{split}-{n}"', 'f"{split}-{-n}"'), name="my_project.py")
    with pytest.raises(StoreError, match="row 1, whose id was 'train-1' and is 'train--1'"):
        featurize(project_file, tmp_path / "run")
    write_project(("return Looped()", "torch.manual_seed(3); return Looped()"), name="my_project.py")
    with pytest.raises(StoreError, match=r"begun with other settings: checkpoints: .* other weights in the loop body"):
        featurize(project_file, tmp_path / "run")


def test_a_line_a_minute_where_no_bar_is_shown(
    project_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepinfluence.app.runs.featurize.LOG_SECONDS", 0)
    config = RunConfig(project_file, {"train": SMALL}, sketch_size=16)
    prepared = Prepared(Project.load(project_file), config, torch.device("cpu"))
    lines: list[str] = []
    list(run_splits(prepared, tmp_path / "run", progress=False, log=lines.append))
    assert lines[-1] == "train: 22 of 22 examples, 0 min left"
