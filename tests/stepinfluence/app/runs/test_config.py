"""``config.yaml``: typed, replayable, and strict about what it does not know."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from stepinfluence import ConfigError, StepInfluenceError
from stepinfluence.app.runs import RunConfig, SplitConfig, Worker


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        project=tmp_path / "p.py",
        splits={"train": SplitConfig(per_step=False, dtype="int8", shard_rows=64, threads=1)},
        checkpoints=(str(tmp_path / "c" / "a.pt"),),
        eta=0.5,
    )


def test_what_is_written_is_what_is_read(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "run" / "config.yaml"
    config.save(file)
    read = RunConfig.load(file)
    assert read.to_dict(tmp_path) == config.to_dict(tmp_path)
    assert read.project.resolve() == config.project
    content = yaml.safe_load(file.read_text())
    assert (content["project"], content["checkpoints"]) == ("../p.py", ["../c/a.pt"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sketch_sze": 3}, "sketch_sze: unknown key; did you mean sketch_size?"),
        ({"qqq": 3}, "qqq: unknown key; known are project, splits"),
        ({"sketch_size": "many"}, "sketch_size: got 'many', a text; give a whole number"),
        ({"sketch_size": True}, "sketch_size: got true; give a whole number"),
        ({"sketch_size": 0}, "sketch_size: got 0; give a positive number"),
        ({"workspace": -1}, "workspace: got -1; give a number of bytes"),
        ({"workspace": "8M"}, "workspace: got '8M', a text; give a whole number or nothing"),
        ({"hashing": "md5"}, "hashing: got 'md5'; use one of balanced, iid"),
        ({"checkpoints": [3]}, "checkpoints: got 3, a whole number; give a text"),
        ({"splits": {"train": {"dtpe": "fp16"}}}, "splits.train.dtpe: unknown key; did you mean dtype?"),
        ({"splits": {"../out": {}}}, "'../out' cannot be the name of a folder"),
        ({"splits": {}}, "splits: got none"),
        ({"splits": [1]}, "splits: got [1], a list"),
        ({"metric": "sgdd"}, "metric: got 'sgdd'"),
        ({"fold": True, "checkpoints": []}, "fold: there are no checkpoints"),
    ],
)
def test_refused(config: RunConfig, tmp_path: Path, change: dict[str, object], words: str) -> None:
    content = {**config.to_dict(tmp_path), **change}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(file)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(file))


LAUGHS = "\n".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9) if k else 'lol'}]" for k in range(9))


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2",
        "- a\n- b",
        "",
        "a: !!python/object/apply:os.system ['true']",
        "\x00",
        LAUGHS + "\nproject: *a8\nsplits: {train: {}}",
        "project: &p [*p]\nsplits: {train: {}}",
        "project: 2001-99-99 99:99:99\nsplits: {train: {}}",
        "project: 0001-01-01 00:00:00 +23:59\nsplits: {train: {}}",
        'project: "a\\0b"\nsplits: {train: {}}',
        'project: p.py\nsplits: {"a\\0b": {}}',
        'project: p.py\ncheckpoints: ["a\\0b"]\nsplits: {train: {}}',
        f"project: p.py\nseed: 0x{'f' * 20000}\nsplits: {{train: {{}}}}",
        f"project: p.py\n{'k' * 100_000}: 1\nsplits: {{train: {{}}}}",
        f"project: {'[' * 50_000}\nsplits: {{train: {{}}}}",
        "? [1]\n: 2\nproject: p.py\nsplits: {train: {}}",
        "project: 12:30:45\nsplits: {train: {}}",
    ],
)
def test_not_a_config(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml") as caught:
        RunConfig.load(file)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(RunConfig)]) | st.text(), JSON), JSON)
def test_anything_else_is_an_error_of_ours(content: dict[str, object], split: object) -> None:
    for candidate in (content, {"project": "p.py", "splits": {"train": split}}):
        with contextlib.suppress(StepInfluenceError):
            RunConfig.from_dict(candidate, Path())


def test_splits_of_one_run_agree(config: RunConfig, tmp_path: Path) -> None:
    query = dataclasses.replace(config, splits={"query": SplitConfig()}, device="cpu")
    assert set(query.merged(config, tmp_path).splits) == {"train", "query"}
    with pytest.raises(ConfigError, match=r"sketch_size: the run in .* was begun with 2048, not 64"):
        dataclasses.replace(query, sketch_size=64).merged(config, tmp_path)
    other = dataclasses.replace(config, splits={"train": dataclasses.replace(config.splits["train"], dtype="fp32")})
    with pytest.raises(ConfigError, match=r"dtype: split 'train' in .* was begun with 'int8', not 'fp32'"):
        other.merged(config, tmp_path)


def test_workers_from_the_environment() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    srun = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
    assert Worker.here({}) == Worker()
    assert Worker.here(torchrun) == Worker(5, 8, 1, "torchrun")
    assert Worker.here(srun) == Worker(3, 4, 0, "srun")
    assert Worker.here({**srun, **torchrun}).launcher == "torchrun"
    # A batch script runs once, whatever the number of tasks that were allocated.
    assert Worker.here({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Worker()
    for wrong in ({**torchrun, "RANK": "8"}, {**torchrun, "WORLD_SIZE": "two"}):
        with pytest.raises(ConfigError, match="environment: RANK"):
            Worker.here(wrong)
    with pytest.raises(ConfigError, match="device: got 'tpu9'"):
        Worker().device("tpu9")
    with pytest.raises(ConfigError, match="GPUs that torch can use"):
        Worker().device("cuda:99")
