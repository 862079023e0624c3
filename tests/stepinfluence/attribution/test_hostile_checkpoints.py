"""Whatever a checkpoint's file holds: one line that names it, and no memory that it does not fill."""

from __future__ import annotations

import pickle
import random
import resource
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stepinfluence import CheckpointError, load_checkpoint
from stepinfluence.attribution.preconditioners import from_optimizer
from torch import Tensor, nn

HUGE = 1_400_000_000


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def saved(**options: Any) -> bytes:
    made = model()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    made(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    file = BytesIO()
    torch.save({"model": made.state_dict(), "optimizer": optimizer.state_dict()}, file, **options)
    return file.getvalue()


WHOLE = {"zip": saved(), "legacy": saved(_use_new_zipfile_serialization=False)}


def use(path: Path) -> None:
    """All that a run does with a checkpoint."""
    checkpoint = load_checkpoint(path)
    _ = checkpoint.learning_rate
    target = model()
    checkpoint.load_into(target)
    from_optimizer(checkpoint.optimizer, target, "adam")


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in files
        return torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        use(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", WHOLE)
def test_whole_files_are_read(layout: str, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(WHOLE[layout])
    use(tmp_path / "c.pt")


@pytest.mark.parametrize("layout", WHOLE)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_damage_is_one_line_or_goes_unseen(layout: str, seed: int, tmp_path: Path) -> None:
    """Bytes changed, cut out, doubled or swapped; where values alone change, no format can tell."""
    rng, data = random.Random(seed), bytearray(WHOLE[layout])
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, length = rng.randrange(len(data)), rng.choice((1, 1, 4, 64))
        kind = rng.randrange(4)
        if kind == 0:
            data[place] ^= rng.randrange(1, 256)
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = data[place : place + length]
        else:
            data[place : place + length] = rng.randbytes(length)
    (tmp_path / "c.pt").write_bytes(data)
    try:
        use(tmp_path / "c.pt")
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017


# ----------------------------------------------------------------------------------------------------------------
# Files that claim more than they hold


def deflated(path: Path) -> None:
    with zipfile.ZipFile(BytesIO(WHOLE["zip"])) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w") as file:
                file.write(old.read(name))
                if name.endswith("/0"):
                    for _ in range(HUGE // (1 << 20)):
                        file.write(bytes(1 << 20))


def with_pickle(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(BytesIO(WHOLE["zip"])) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                new.writestr(entry, change(data) if entry.filename.endswith("data.pkl") else data)

    return write


def number(before: int, after: int) -> Callable[[bytes], bytes]:
    """Every number of a pickle that is ``before``."""

    def change(data: bytes) -> bytes:
        old = b"K" + bytes([before])
        assert old in data
        return data.replace(old, b"J" + struct.pack("<i", after))

    return change


def bytearray_of(size: int) -> Callable[[bytes], bytes]:
    return lambda _: b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", size) + b"\x85R."


def legacy(path: Path) -> None:
    data = WHOLE["legacy"]
    assert data.count(b"K\x0c") > 1  # a storage of 12 numbers, and views of it
    path.write_bytes(data.replace(b"K\x0c", b"J" + struct.pack("<i", HUGE)))


BOMBS: dict[str, Callable[[Path], None]] = {
    "an archive that unpacks to more": deflated,
    "a storage larger than its bytes": with_pickle(number(12, HUGE)),
    "a storage larger than its bytes, in the old format": legacy,
    "a view beyond its storage": with_pickle(number(4, 40_000)),
    "bytes by number": with_pickle(bytearray_of(HUGE)),
    "a memo of any length": with_pickle(lambda _: b"\x80\x02Nr\xff\xff\xff\x7f."),
    "text of any length": with_pickle(lambda _: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"a."),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_memory_is_taken_for_what_a_file_does_not_hold(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    BOMBS[name](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    assert str(path) in refused(path)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert traced < 32 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


# ----------------------------------------------------------------------------------------------------------------
# Whole files with odd things in them


def _state(change: Callable[[dict[str, Any]], object]) -> Any:
    state = dict(model().state_dict())
    change(state)
    return {"model": state}


ODD: dict[str, Callable[[], Any]] = {
    "numbers as names": lambda: {1: torch.ones(2)},
    "numbers as names below": lambda: {"model": {1: torch.ones(2)}},
    "sparse": lambda: _state(lambda s: s.update({"0.weight": torch.ones(4, 3).to_sparse()})),
    "quantised": lambda: _state(lambda s: s.update({"0.weight": quantised()})),
    "meta": lambda: _state(lambda s: s.update({"0.weight": torch.ones(4, 3, device="meta")})),
    "complex": lambda: _state(lambda s: s.update({"0.weight": torch.ones(4, 3, dtype=torch.complex64)})),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_weights_leave_the_model_alone(name: str, tmp_path: Path) -> None:
    torch.save(ODD[name](), tmp_path / "c.pt")
    target = model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"c\.pt: ") as caught:
        load_checkpoint(tmp_path / "c.pt").load_into(target)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def _optimizer(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(BytesIO(WHOLE["zip"]), weights_only=True)
    change(content["optimizer"])
    return content


def _moment(value: Any) -> Callable[[], Any]:
    return lambda: _optimizer(lambda o: o["state"][0].update(exp_avg_sq=value))


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "no rate": lambda: _optimizer(lambda o: o["param_groups"][0].update(lr=None)),
    "a rate in words": lambda: _optimizer(lambda o: o["param_groups"][0].update(lr="fast")),
    "a rate that is no number": lambda: _optimizer(lambda o: o["param_groups"][0].update(lr=float("nan"))),
    "two rates in a tensor": lambda: _optimizer(lambda o: o["param_groups"][0].update(lr=torch.ones(2))),
    "groups that are none": lambda: _optimizer(lambda o: o.update(param_groups=[3])),
    "a number of groups": lambda: _optimizer(lambda o: o.update(param_groups=3)),
    "a group without parameters": lambda: _optimizer(lambda o: o["param_groups"][0].pop("params")),
    "a state that is none": lambda: _optimizer(lambda o: o["state"].update({0: 5})),
    "a step in words": lambda: _optimizer(lambda o: o["state"][0].update(step="many")),
    "betas that are none": lambda: _optimizer(lambda o: o["param_groups"][0].update(betas=3)),
    "sparse": _moment(torch.ones(4, 3).to_sparse()),
    "meta": _moment(torch.ones(4, 3, device="meta")),
    "complex": _moment(torch.ones(4, 3, dtype=torch.complex64)),
    "whole numbers": _moment(torch.ones(4, 3, dtype=torch.int64)),
    "negative": _moment(-torch.ones(4, 3)),
    "quantised": lambda: _moment(quantised())(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_odd_optimizer_states_are_one_line(name: str, tmp_path: Path) -> None:
    torch.save(OPTIMIZERS[name](), tmp_path / "c.pt")
    refused(tmp_path / "c.pt")


def test_a_pickle_alone_is_no_checkpoint(tmp_path: Path) -> None:
    for content in (b"", b"\x80", pickle.dumps({"a": 1}), b"PK\x03\x04", b"PK\x05\x06" + bytes(18)):
        (tmp_path / "c.pt").write_bytes(content)
        refused(tmp_path / "c.pt")
