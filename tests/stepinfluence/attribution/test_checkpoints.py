"""Checkpoints: what is read, what is refused, and that nothing in a file is ever run."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stepinfluence import CheckpointError, load_checkpoint
from torch import Tensor, nn


@contextmanager
def refuses(match: str) -> Iterator[None]:
    with pytest.raises(CheckpointError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def optimizer_of(given: nn.Module, *rates: float) -> dict[str, Any]:
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in zip(given, rates, strict=False)]
    return torch.optim.SGD(groups, lr=1.0).state_dict()


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


LAYOUTS: dict[str, Any] = {
    "state dict": lambda m: m.state_dict(),
    "model": lambda m: {"model": m.state_dict(), "step": 3, "config": {"d": [1, 2]}},
    "model_state_dict": lambda m: {"model_state_dict": m.state_dict(), "epoch": 1},
    "state_dict": lambda m: {"state_dict": m.state_dict()},
    "distributed": lambda m: {"model": {f"module.{k}": v for k, v in m.state_dict().items()}},
    "compiled": lambda m: {"model": {f"_orig_mod.{k}": v for k, v in m.state_dict().items()}},
    "compiled and distributed": lambda m: {f"_orig_mod.module.{k}": v for k, v in m.state_dict().items()},
    "compiled part": lambda m: {k.replace("2.", "2._orig_mod."): v for k, v in m.state_dict().items()},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(LAYOUTS[name](model(1)), path)
    target = model(2)
    load_checkpoint(path).load_into(target)
    assert same(target, model(1))


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(dict(model(1).state_dict()), path)
    target = model(2)
    checkpoint = load_checkpoint(str(path))
    checkpoint.load_into(target)
    assert same(target, model(1))
    assert checkpoint.optimizer is None


def test_into_compiled_and_wrapped_models(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(model(1).state_dict(), path)
    for wrap in (lambda m: torch.compile(m, backend="eager"), lambda m: m):
        inner = model(2)
        load_checkpoint(path).load_into(wrap(inner))
        assert same(inner, model(1))


def test_model_whose_own_parameters_lie_below_module(tmp_path: Path) -> None:
    """``module.`` is stripped as a wrapper's prefix; a model that has it itself must still get its weights."""

    class Holder(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.module = model(seed)

    path = tmp_path / "c.pt"
    torch.save(Holder(1).state_dict(), path)
    target = Holder(2)
    load_checkpoint(path).load_into(target)
    assert same(target, Holder(1))


def test_other_dtype_and_values_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(model(1).bfloat16().state_dict(), path)
    target = model(2)
    weight = target[0].weight
    load_checkpoint(path).load_into(target)
    assert target[0].weight is weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight.detach(), model(1)[0].weight.bfloat16().float())


def test_learning_rate(tmp_path: Path) -> None:
    path, given = tmp_path / "c.pt", model()
    torch.save({"model": given.state_dict(), "optimizer": optimizer_of(given, 0.25, 0.25, 0.25)}, path)
    assert load_checkpoint(path).learning_rate == 0.25
    torch.save({"model": given.state_dict(), "optimizer_state_dict": optimizer_of(given, 0.25, 0.5)}, path)
    with refuses(r"c\.pt: its parameter groups have learning rates \[0\.25, 0\.5\]; give the body's as etas"):
        _ = load_checkpoint(path).learning_rate
    torch.save({"model": given.state_dict()}, path)
    with refuses(r"c\.pt: no learning rate in it \(no optimizer state\); give etas"):
        _ = load_checkpoint(path).learning_rate


def test_checkpoint_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    state = dict(model(1).state_dict())
    changes: dict[str, Any] = {
        r"lacks 0\.bias": {k: v for k, v in state.items() if k != "0.bias"},
        r"has unknown extra": {**state, "extra": torch.zeros(1)},
        r"lacks 0\.weight and has unknown 0\.kernel": {k.replace("0.weight", "0.kernel"): v for k, v in state.items()},
        r"0\.weight has shape \(3, 4\), the model's is \(4, 3\)": {**state, "0.weight": state["0.weight"].T},
        r"and \d+ more": {"0.weight": state["0.weight"]},
    }
    for match, content in changes.items():
        path = tmp_path / "c.pt"
        torch.save(content, path)
        target = model(2)
        with refuses(rf"c\.pt: does not fit the model: .*{match}"):
            load_checkpoint(path).load_into(target)
        assert same(target, model(2))


class Exploit:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "c.pt", tmp_path / "ran"
    contents: list[Any] = [
        model(),
        {"model": model()},
        Exploit(mark),
        {"model": model().state_dict(), "x": Exploit(mark)},
    ]
    for content in contents:
        torch.save(content, path)
        with refuses(r"c\.pt: holds pickled Python objects.*convert it once: torch\.save\("):
            load_checkpoint(path)
    path.write_bytes(pickle.dumps(Exploit(mark), protocol=2))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"not a checkpoint", b"PK\x03\x04" + b"\x00" * 40, b"\x80\x02}q\x00."]
)
def test_damaged_files(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    with refuses(rf"c{suffix}"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_truncated_files(suffix: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix}"
    if suffix == ".pt":
        torch.save(model().state_dict(), path)
    else:
        save_file(dict(model().state_dict()), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with refuses(rf"c{suffix}: not a readable"):
        load_checkpoint(path)


def test_files_without_a_model(tmp_path: Path) -> None:
    with refuses(r"none\.pt: no such file; give the path of a checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with refuses("no such file"):
        load_checkpoint(tmp_path)
    contents: dict[str, Any] = {
        "holds Tensor; save a state dict": torch.zeros(3),
        "holds list": [1, 2],
        "no model state in it; save a state dict, or a dict with one of model_state_dict, model, state_dict": {"a": 1},
        "no model state": {"model": {"step": 3}},
        r"no model state in it": {},
    }
    for match, content in contents.items():
        path = tmp_path / "c.pt"
        torch.save(content, path)
        with refuses(match):
            load_checkpoint(path)


def test_extra_state_that_is_no_tensor(tmp_path: Path) -> None:
    """Modules may put plain values into their state (``get_extra_state``)."""

    class Scaled(nn.Linear):
        factor: float = 1.0

        def get_extra_state(self) -> dict[str, float]:
            return {"factor": self.factor}

        def set_extra_state(self, state: Any) -> None:
            self.factor = state["factor"]

    source, target, path = Scaled(2, 2), Scaled(2, 2), tmp_path / "c.pt"
    source.factor = 3.0
    torch.save({"model": source.state_dict()}, path)
    load_checkpoint(path).load_into(target)
    assert target.factor == 3.0
    assert isinstance(target.weight, Tensor)
    assert torch.equal(target.weight, source.weight)
