"""The tuning file and the calibration that writes it: with a made-up GPU and a timer that is a formula."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sdi_kernels as sk
from bench.gpu import calibrate
from bench.gpu.calibrate import Workload
from sdi_kernels import TensorSketch
from sdi_kernels.triton import configs, cost, tuning

ABOUT = {"gpu": "Test GPU / 80 GB", "torch": "2.11.0+cu130", "triton": "3.6.0", "sdi_kernels": "9.9"}
KEY = "direct large half"
OTHER = configs.CANDIDATES[KEY][1]
MEASURED = tuning.Tuning({KEY: OTHER}, replace(cost.SHIPPED, launch=7e-6, flops=(5e14, 7e13)), "x")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_loaded", {})
    return tmp_path / "cache"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device as far as tuning looks."""
    monkeypatch.setattr(tuning, "_index", lambda device: 0 if device.type == "cuda" else None)
    monkeypatch.setattr(tuning, "machine", lambda _: ABOUT)
    return torch.device("cuda")


# ---------------------------------------------------------------------------------------------------------------
# The file


def test_what_is_saved_is_loaded(cache: Path) -> None:
    file = tuning.save(MEASURED, ABOUT)
    assert file.parent == cache
    assert file.name == "tuning-Test_GPU_80_GB-2.11.0+cu130-3.6.0-9.9.json"
    assert [p.name for p in cache.iterdir()] == [file.name], "nothing is left beside it"
    got = tuning.load(ABOUT)
    assert (got.tiles, got.rates) == (MEASURED.tiles, MEASURED.rates)
    assert got.source.startswith("measured on Test GPU / 80 GB, ")
    assert str(file) in got.source
    assert got.tile(KEY) == OTHER
    assert got.tile("shear half") == configs.SHIPPED["shear half"]


def test_without_a_file_shipped_values_serve(cache: Path) -> None:
    assert tuning.load(ABOUT) is tuning.SHIPPED
    assert not cache.exists(), "asking makes no folder"


@pytest.mark.parametrize("part", list(ABOUT))
def test_another_gpu_or_version_has_another_file(part: str) -> None:
    tuning.save(MEASURED, ABOUT)
    assert tuning.load({**ABOUT, part: "other"}) is tuning.SHIPPED


def change(**parts: Any) -> Any:
    return lambda content: json.dumps({**content, **parts})


DAMAGE: dict[str, tuple[Any, str]] = {
    "empty": (lambda _: "", "is damaged"),
    "cut off": (lambda content: json.dumps(content)[:-40], "is damaged"),
    "a list": (lambda _: "[]", "is no sdi-tuning-1 file"),
    "another format": (change(format="sdi-tuning-0"), "is no sdi-tuning-1 file"),
    "another machine": (change(machine={**ABOUT, "gpu": "Other"}), "was made on another machine"),
    "a tile that does not ship": (change(tiles={KEY: [1, 2, 3, 4, 5]}), r"is no tile of 'direct large half'"),
    "an unknown kernel": (change(tiles={"sort": [1]}), "is damaged"),
    "a rate of zero": (change(rates={"launch": 0}), "is damaged"),
    "no rates": (change(rates=None), "is damaged"),
    "a list of tiles": (change(tiles=[]), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_trusted_is_ignored_with_a_warning(damage: str) -> None:
    rewrite, message = DAMAGE[damage]
    file = tuning.save(MEASURED, ABOUT)
    file.write_text(rewrite(json.loads(file.read_text())))
    with pytest.warns(UserWarning, match=message) as caught:
        assert tuning.load(ABOUT) is tuning.SHIPPED
    assert str(file) in str(caught[0].message)


@pytest.mark.parametrize("value", [0, -1.0, "nan", float("inf"), None, "fast"])
def test_rates_are_positive_numbers(value: Any) -> None:
    file = tuning.save(MEASURED, ABOUT)
    content = json.loads(file.read_text())
    content["rates"]["atomic_adds"] = value
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="is damaged"):
        assert tuning.load(ABOUT) is tuning.SHIPPED


def test_an_unreadable_file_is_ignored_with_a_warning() -> None:
    tuning.path(ABOUT).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tuning.load(ABOUT) is tuning.SHIPPED


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    file = tuning.save(MEASURED, ABOUT)
    before = file.read_text()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuning.save(tuning.SHIPPED, ABOUT)
    assert file.read_text() == before
    assert list(cache.iterdir()) == [file]


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuning.folder() == tmp_path / "cache"
    monkeypatch.delenv(tuning.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.folder() == tmp_path / "xdg" / "sdi-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert tuning.folder() == tmp_path / ".cache" / "sdi-kernels"


def test_importing_reads_and_writes_nothing(tmp_path: Path) -> None:
    """Not even a damaged file is looked at before a kernel needs it."""
    tuning.save(MEASURED, ABOUT).write_text("{")
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import sdi_kernels, sdi_kernels.triton.launch, sdi_kernels.triton.tuning as t\n"
        "assert not t._loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------------
# In force


def test_a_file_is_read_once_and_again_after_saving(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mapping[str, str]] = []
    real = tuning.load
    monkeypatch.setattr(tuning, "load", lambda about: asked.append(about) or real(about))
    assert tuning.tuned(gpu) is tuning.SHIPPED
    assert tuning.tuned(torch.device("cuda", 0)) is tuning.SHIPPED
    assert len(asked) == 1
    tuning.save(MEASURED, ABOUT)
    assert tuning.tuned(gpu).tile(KEY) == OTHER
    assert len(asked) == 2


def test_no_gpu_means_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "load", lambda _: pytest.fail("looked for a file"))
    assert tuning.tuned(torch.device("cpu")) is tuning.SHIPPED
    if not torch.cuda.is_available():
        assert tuning.tuned(torch.device("cuda")) is tuning.SHIPPED


def test_using_puts_back_what_was(gpu: torch.device) -> None:
    with tuning.using(MEASURED, gpu):
        assert tuning.tuned(gpu) is MEASURED
        with pytest.raises(RuntimeError, match="stop"), tuning.using(tuning.SHIPPED, gpu):
            raise RuntimeError("stop")
        assert tuning.tuned(gpu) is MEASURED
    assert tuning.tuned(gpu) is tuning.SHIPPED


def test_planner_uses_the_measured_rates_and_says_so(gpu: torch.device) -> None:
    sketch = TensorSketch(768, 768, 2048)
    plan = sk.plan_linear(256, 128, sketch, gpu)
    assert plan.route == "fft"
    assert "speeds: estimates shipped with the package, not measured" in plan.explain()
    slow_transform = dict.fromkeys(cost.FFT_CYCLES, (1e-6, 1e-6))
    tuning.save(tuning.Tuning({"direct large tf32x3": configs.CANDIDATES["direct large tf32x3"][2]},
                              replace(cost.SHIPPED, fft_seconds=slow_transform)), ABOUT)  # fmt: skip
    plan = sk.plan_linear(256, 128, sketch, gpu)
    assert plan.route == "direct"
    assert "speeds: measured on Test GPU / 80 GB, " in plan.explain()
    assert "tile: 64 x 64 x 32 (tuned)" in plan.explain()
    assert (
        "tile: 128 x 128 x 64 (shipped)" in sk.plan_linear(256, 128, sketch, gpu, "direct", dtype=torch.half).explain()
    )
    assert "tile" not in sk.plan_linear(256, 128, sketch, gpu, "fft").explain()
    assert "speeds: shipped with the package" in sk.plan_linear(2, 3, sketch, torch.device("cpu")).explain()


def test_planner_can_be_traced(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the shipped rates: tracing cannot read a file."""
    monkeypatch.setattr(tuning, "load", lambda _: pytest.fail("read a file while tracing"))
    sketch = TensorSketch(64, 64, 256)

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if sk.plan_linear(8, 128, sketch, gpu).route == "direct" else 3)

    compiled = torch.compile(step, fullgraph=True, backend="eager")(torch.ones(3))
    monkeypatch.setattr(tuning, "load", lambda _: tuning.SHIPPED)
    assert torch.equal(compiled, step(torch.ones(3)))


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def test_fastest_takes_what_is_faster_beyond_noise() -> None:
    times = {"a": 1.0, "b": 0.99, "c": 0.5}
    assert calibrate.fastest(["a", "b"], times.__getitem__)[0] == "a"
    assert calibrate.fastest(["a", "b", "c"], times.__getitem__) == ("c", times)


def test_fastest_passes_over_what_does_not_run() -> None:
    def seconds(tile: str) -> float:
        if tile == "huge":
            raise RuntimeError("out of resources: shared memory")
        return {"shipped": 1.0, "good": 0.9}[tile]

    best, took = calibrate.fastest(["shipped", "huge", "good"], seconds)
    assert best == "good"
    assert took["huge"] == "RuntimeError: out of resources: shared memory"
    with pytest.raises(RuntimeError, match="the shipped tile huge did not run"):
        calibrate.fastest(["huge", "good"], seconds)


def true_seconds(work: Workload, rates: cost.Rates) -> float:
    """What the cost model says: the calibration must find the rates behind it."""
    return cost.estimate(work.rows, work.tokens, work.sketch(), work.dtype, rates)[work.route]


def test_fit_finds_the_rates_behind_the_times() -> None:
    true = cost.Rates({m: (m * 3e-12, m * 7e-12) for m in cost.FFT_CYCLES}, (2.1e-9, 3.3e-9), (3e14, 5e13), 4e11,
                      4e12, 3e-6)  # fmt: skip
    got = calibrate.fit(lambda work: true_seconds(work, true), true.bytes)
    for m, pair in true.fft_seconds.items():
        assert got.fft_seconds[m] == pytest.approx(pair, rel=0.02)
    assert got.flops == pytest.approx(true.flops, rel=0.02)
    assert got.atomic_adds == pytest.approx(true.atomic_adds, rel=0.05)
    assert got.shear_seconds == pytest.approx(true.shear_seconds, rel=0.02)
    assert got.launch == pytest.approx(true.launch, rel=0.05)
    assert got.bytes == true.bytes


def test_fit_refuses_times_that_contradict_each_other() -> None:
    with pytest.raises(RuntimeError, match="quiet GPU"):
        calibrate.fit(lambda _: 1e-3, 1e12)


def test_calibration_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what beats the shipped tile is written; rates are measured with it in force; the file can be read back."""
    favourites = {KEY: configs.CANDIDATES[KEY][3], "pairwise tf32": configs.CANDIDATES["pairwise tf32"][1]}
    seen: list[Mapping[str, configs.Config]] = []

    def time_tile(work: Workload, key: str, config: configs.Config) -> float:
        assert work == calibrate.workload_of(key)
        return 1.0 if favourites.get(key) == config else 2.0

    def time_call(work: Workload, tiles: Mapping[str, configs.Config]) -> float:
        seen.append(tiles)
        return true_seconds(work, cost.SHIPPED)

    found = calibrate.calibrate(time_tile, time_call, 3e12, print)
    assert found.tiles == favourites
    assert all(tiles == favourites for tiles in seen)
    assert capsys.readouterr().out.count("<- taken") == len(configs.CANDIDATES)
    tuning.save(found, ABOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.load(ABOUT).tiles == favourites


def test_every_kernel_has_a_workload_of_its_kind() -> None:
    for key in configs.CANDIDATES:
        work = calibrate.workload_of(key)
        torch.set_float32_matmul_precision(work.precision)
        kind = configs.kind(work.dtype, work.dtype)
        if work.route == "direct":
            assert configs.direct_key(work.d_out, work.d_in, kind) == key
        else:
            assert f"{work.route} {kind}" == key
        assert work.route != "shear" or work.sketch().shearable


def test_candidates_are_distinct_and_of_one_kind() -> None:
    for key, candidates in configs.CANDIDATES.items():
        assert len(set(candidates)) == len(candidates), key
        assert len({type(c) for c in candidates}) == 1, key
