"""Checkpoints as frameworks leave them: folders, shards, prefixes, tied weights, adapters, several optimizers."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import multilinear
from safetensors.torch import save_file
from stepinfluence import CheckpointError, attach, influence_over_checkpoints, load_checkpoint
from stepinfluence.attribution.checkpoints import is_checkpoint
from torch import Tensor, nn


@contextmanager
def refuses(match: str) -> Iterator[None]:
    with pytest.raises(CheckpointError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


class Tied(nn.Module):
    """Input and output embeddings are one tensor; a mask, positions and a frequency table are buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.core, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(5))
        self.register_buffer("inv_freq", torch.rand(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for _ in range(3):
            h = torch.tanh(self.core(h))
        return self.head(h)


def state_of(seed: int) -> dict[str, Tensor]:
    return dict(Tied(seed).state_dict())


def same(one: nn.Module, seed: int) -> bool:
    expected = state_of(seed)
    return all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


def adam(seed: int, *rates: float) -> dict[str, Any]:
    model = Tied(seed)
    groups = [{"params": list(p.parameters()), "lr": r} for p, r in zip((model.core, model.embed), rates, strict=False)]
    optimizer = torch.optim.AdamW(groups)
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k not in names}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{k}": v for k, v in state.items()}


FITS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "tied weight under one name": lambda s: without(s, "head.weight"),
    "tied weight under the other name": lambda s: without(s, "embed.weight"),
    "positions missing": lambda s: without(s, "positions"),
    "masks and counts too many": lambda s: {**s, "core.mask": torch.ones(4, 4) > 0, "calls": torch.tensor(3)},
    "a buffer that is not persistent here": lambda s: {**s, "inv_freq": torch.rand(2)},
    "frequencies of another version": lambda s: {**s, "core.rotary.inv_freq": torch.rand(2)},
    "lightning": lambda s: {**prefixed(s, "model."), "metric.weight": torch.rand(3)},
    "two prefixes, tied": lambda s: prefixed(without(s, "head.weight"), "task.network."),
    "compiled within": lambda s: prefixed(s, "model._orig_mod."),
    "distributed within": lambda s: prefixed(s, "module.model."),
}


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
def test_names_that_are_not_quite_the_models(name: str, suffix: str, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in FITS[name](state_of(1)).items()}
    path = tmp_path / f"c{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 1} if suffix == ".ckpt" else state, path)
    model = Tied(2)
    weight, table = model.head.weight, model.inv_freq.clone()
    load_checkpoint(path).load_into(model)
    assert same(model, 1)
    assert model.head.weight is weight is model.embed.weight
    assert torch.equal(model.inv_freq, table)


def test_model_that_wraps_what_was_saved(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.network = Tied(seed)

    torch.save(state_of(1), tmp_path / "c.pt")
    model = Wrapper(2)
    load_checkpoint(tmp_path / "c.pt").load_into(model)
    assert same(model.network, 1)


UNFIT: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "teacher and student": (
        lambda s: {**prefixed(s, "student."), **prefixed(s, "teacher.")},
        r"several models of these names, under the prefixes 'student\.', 'teacher\.'",
    ),
    "tied here, untied there": (
        lambda s: {**s, "head.weight": s["head.weight"] + 1},
        r"embed\.weight and head\.weight are one tensor in the model and two different ones in the file",
    ),
    "a weight missing": (lambda s: without(s, "core.bias"), r"lacks core\.bias$"),
    "both names of a tied weight missing": (
        lambda s: without(s, "embed.weight", "head.weight"),
        r"lacks embed\.weight, head\.weight",
    ),
    "a weight too many": (lambda s: {**s, "adapter.weight": torch.rand(3)}, r"has unknown adapter\.weight"),
    "prefix, one missing": (lambda s: prefixed(without(s, "core.bias"), "model."), r"names have a prefix of their own"),
    "adapters": (
        lambda s: {"core.lora_A.weight": torch.rand(2, 4), "core.lora_B.weight": torch.rand(4, 2)},
        r"holds adapters only: load the base model first and pass strict=False",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_leaves_the_model_alone(name: str, tmp_path: Path) -> None:
    change, match = UNFIT[name]
    torch.save(change(state_of(1)), tmp_path / "c.pt")
    model = Tied(2)
    with refuses(rf"c\.pt: .*{match}"):
        load_checkpoint(tmp_path / "c.pt").load_into(model)
    assert same(model, 2)


# --------------------------------------------------------------------------------------------------------------------
# A part of the weights


class LoRA(nn.Module):
    """As PEFT has it: names hold the adapter's, its files leave it out."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(2):
            h = torch.tanh(self.base(h) + self.lora_B["default"](self.lora_A["default"](h)))
        return h


class Adapted(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = nn.Module()
        self.base_model.model.core = LoRA(seed)

    def forward(self, h: Tensor) -> Tensor:
        return self.base_model.model.core(h)


@pytest.mark.parametrize("short", [True, False])
def test_adapters_only(short: bool, tmp_path: Path) -> None:
    saved = Adapted(1)
    state = {k: v.clone() for k, v in saved.state_dict().items() if "lora" in k}
    if short:
        state = {k.replace(".default", ""): v for k, v in state.items()}
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    model = Adapted(2)
    checkpoint = load_checkpoint(folder)
    with refuses("lacks .*adapters only"):
        checkpoint.load_into(model)
    needed = [n for n, p in model.named_parameters() if p.requires_grad]
    checkpoint.load_into(model, strict=False, needed=needed)
    core, theirs, before = model.base_model.model.core, saved.base_model.model.core, Adapted(2).base_model.model.core
    assert torch.equal(core.lora_A["default"].weight, theirs.lora_A["default"].weight)
    assert torch.equal(core.lora_B["default"].weight, theirs.lora_B["default"].weight)
    assert torch.equal(core.base.weight, before.base.weight)
    save_file({k: v for k, v in state.items() if "lora_A" in k}, folder / "adapter_model.safetensors")
    with refuses(r"lacks base_model\.model\.core\.lora_B\.default\.weight of the loop body"):
        load_checkpoint(folder).load_into(model, strict=False, needed=needed)
    with refuses("has none of its weights"):
        load_checkpoint(folder).load_into(Tied(0), strict=False)


def test_partial_checkpoints_do_not_see_one_another(tmp_path: Path) -> None:
    """What the second file lacks is the model's own, not the first file's."""
    torch.save(state_of(1), tmp_path / "a.pt")
    torch.save({k: v for k, v in state_of(3).items() if k.startswith("core")}, tmp_path / "b.pt")
    model = Tied(2)
    capture = attach(model, body="core", sketch_size=16)
    batch = [torch.arange(6).view(2, 3)]

    def loss(m: Any, tokens: Tensor) -> Tensor:
        return m(tokens).square().flatten(1).mean(1)

    def scores(*names: str, **options: Any) -> Tensor:
        paths = [tmp_path / name for name in names]
        return influence_over_checkpoints(capture, paths, batch, batch, loss, etas=1.0, progress=False, **options).sdi

    with refuses(r"b\.pt: .*lacks embed\.weight"):
        scores("a.pt", "b.pt")
    apart = scores("a.pt"), scores("b.pt", strict=False)
    multilinear(torch.add, *apart, rows=False).check(scores("a.pt", "b.pt", strict=False))
    assert same(model, 2)
    torch.save({k: v for k, v in state_of(3).items() if not k.startswith("core")}, tmp_path / "b.pt")
    with refuses(r"b\.pt: lacks core\.bias, core\.weight of the loop body"):
        scores("b.pt", strict=False)


# --------------------------------------------------------------------------------------------------------------------
# Folders


def write_shards(folder: Path, state: dict[str, Tensor], suffix: str) -> Path:
    names = sorted(state)
    places = {name: f"part-{k % 2}{suffix}" for k, name in enumerate(names)}
    for file in set(places.values()):
        part = {n: state[n].clone() for n in names if places[n] == file}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("optimizer", ["optimizer.pt", "optimizer.bin", None])
def test_folder_with_shards_and_optimizer(suffix: str, optimizer: str | None, tmp_path: Path) -> None:
    index = write_shards(tmp_path, without(state_of(1), "head.weight"), suffix)
    (tmp_path / "config.json").write_text("{}")
    if optimizer:
        torch.save(adam(1, 0.25), tmp_path / optimizer)
    for path in (tmp_path, index):
        assert is_checkpoint(path)
        checkpoint = load_checkpoint(path)
        model = Tied(2)
        checkpoint.load_into(model)
        assert same(model, 1)
        if optimizer:
            assert checkpoint.learning_rate == 0.25
        else:
            with refuses("no learning rate in it"):
                _ = checkpoint.learning_rate


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_folder_with_one_file(name: str, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in state_of(1).items()}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    torch.save(adam(1, 0.5), tmp_path / "optimizer.pt")
    for path in (tmp_path, tmp_path / name):
        checkpoint = load_checkpoint(path)
        checkpoint.load_into(model := Tied(2))
        assert same(model, 1)
        assert checkpoint.learning_rate == 0.5


def test_an_index_opens_nothing_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(state_of(1), tmp_path / "secret.bin")
    index = folder / "pytorch_model.bin.index.json"
    for name in ("../secret.bin", str(tmp_path / "secret.bin"), "..", "", "a\\b.bin"):
        index.write_text(json.dumps({"weight_map": {"core.weight": name}}))
        with refuses("no file of its folder"):
            load_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {"core.weight": "part.bin"}}))
    with refuses(r"shard part\.bin is missing"):
        load_checkpoint(folder)
    torch.save({"other": torch.zeros(1)}, folder / "part.bin")
    with refuses(r"core\.weight is not in part\.bin"):
        load_checkpoint(folder)
    for content in ("", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "{" * 5000):
        index.write_text(content)
        with refuses("index|no model state"):
            load_checkpoint(index)


def test_folders_of_other_formats_say_how_to_convert_them(tmp_path: Path) -> None:
    for name, match in {
        ".metadata": r"torch\.distributed\.checkpoint folder.*format_utils dcp_to_torch",
        "zero_to_fp32.py": r"DeepSpeed folder.*deepspeed\.utils\.zero_to_fp32",
        "weights.pt": r"in which no file has a usual name.*such as weights\.pt",
        "notes.txt": r"is a folder with no such file in it",
    }.items():
        folder = tmp_path / f"folder{name}"
        folder.mkdir()
        (folder / name).write_bytes(b"anything")
        with refuses(match):
            load_checkpoint(folder)
    (tmp_path / "config.json").write_text("{}")
    with refuses("is JSON, which holds no weights"):
        load_checkpoint(tmp_path / "config.json")


def test_a_distributed_checkpoint_is_never_unpickled(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "dcp"
    folder.mkdir()
    for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Exploit(), protocol=2))
    with refuses("distributed"):
        load_checkpoint(folder)
    torch.save(state_of(1), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled|not a readable"):  # the optimizer beside
        load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------------------------
# Optimizers, and what else is in a file


def test_several_optimizers(tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    parts = [adam(1, 0.1), adam(1, 0.1, 0.1)]
    forms: list[dict[str, Any]] = [
        {"optimizer_states": parts},
        {"optimizers": parts},
        {"optimizer": {"body": parts[0], "head": parts[1]}},
        {"optimizer_states": parts[:1]},
        {"optimizer_state_dict": parts[1]},
    ]
    for form in forms:
        torch.save({"state_dict": state_of(1), **form}, path)
        checkpoint = load_checkpoint(path)
        assert checkpoint.learning_rate == 0.1
        assert checkpoint.optimizer is not None
        keys = [key for group in checkpoint.optimizer["param_groups"] for key in group["params"]]
        assert len(keys) == len(set(keys))
        assert set(checkpoint.optimizer["state"]) <= set(keys)
    torch.save({"state_dict": state_of(1), "optimizer_states": [adam(1, 0.1), adam(1, 0.3)]}, path)
    with refuses(r"learning rates \[0\.1, 0\.3\]"):
        _ = load_checkpoint(path).learning_rate


def test_a_learning_rate_of_zero_is_said(tmp_path: Path) -> None:
    torch.save({"model": state_of(1), "optimizer": adam(1, 0.0)}, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match=r"c\.pt: its learning rate is 0 .*counts for nothing; give etas"):
        assert load_checkpoint(tmp_path / "c.pt").learning_rate == 0


def test_optimizer_without_rates_is_not_called_missing(tmp_path: Path) -> None:
    torch.save({"model": state_of(1), "optimizer": {"param_groups": [{"params": []}], "state": {}}}, tmp_path / "c.pt")
    with refuses("its optimizer state has no 'lr'"):
        _ = load_checkpoint(tmp_path / "c.pt").learning_rate


class Own:
    """An object of the user's."""


FOREIGN: dict[str, tuple[Any, str]] = {
    "numpy scalar": (np.float64(0.5), r"numpy\._core\.multiarray\.scalar"),
    "numpy array": (np.zeros(3), r"numpy\._core\.multiarray\._reconstruct"),
    "namespace": (argparse.Namespace(lr=0.1), r"argparse\.Namespace"),
    "path": (Path("x"), r"pathlib"),
    "own class": (Own(), r"Own"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_objects_are_named(name: str, tmp_path: Path) -> None:
    value, match = FOREIGN[name]
    torch.save({"model": state_of(1), "extra": value}, tmp_path / "c.pt")
    with refuses(rf"c\.pt: holds pickled Python objects \(.*{match}.*\), which are not loaded.*reader of your own"):
        load_checkpoint(tmp_path / "c.pt")


def test_states_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"net": state_of(1), "epoch": 3, "config": {"d": 1}}, path)
    load_checkpoint(path).load_into(model := Tied(2))
    assert same(model, 1)
    torch.save({"generator": state_of(1), "critic": state_of(2)}, path)
    with refuses(r"holds several models \('generator', 'critic'\); save the one that is meant under"):
        load_checkpoint(path)


def test_a_reader_of_the_users(tmp_path: Path) -> None:
    """Any other format, by a function that the user gives: nothing else is run."""
    path = tmp_path / "c.npz"
    np.savez(path, **{k: v.numpy() for k, v in state_of(1).items()})

    def read(given: Path) -> Any:
        with np.load(given) as content:
            return {"model": {k: torch.from_numpy(content[k]) for k in content.files}, "optimizer": adam(1, 0.2)}

    checkpoint = load_checkpoint(path, reader=read)
    checkpoint.load_into(model := Tied(2))
    assert same(model, 1)
    assert checkpoint.learning_rate == 0.2
    with refuses("the reader failed \\(KeyError"):
        load_checkpoint(path, reader=lambda _: {}["x"])
    with refuses("holds list; save a state dict"):
        load_checkpoint(path, reader=lambda _: [1])
    capture = attach(model, body="core", sketch_size=8)
    batch = [torch.arange(6).view(2, 3)]
    found = influence_over_checkpoints(
        capture, [path], batch, batch, lambda m, b: m(b).square().flatten(1).mean(1), reader=read, progress=False
    )
    assert found.etas == (0.2,)
