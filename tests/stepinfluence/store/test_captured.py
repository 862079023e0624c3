"""A store of real features: the same as featurizing at once, and only of its own model, weights and sketches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stepinfluence import ExactCapture, FeatureMismatchError, StoreError, attach, influence
from stepinfluence.models.gpt import LoopedGPT, LoopedGPTConfig, gpt_loss
from stepinfluence.store import Manifest, RowInfo, SketchSpec, Store, StoredCheckpoint, StoreWriter, merge
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

CONFIG = LoopedGPTConfig(vocab_size=17, d_model=8, n_heads=2, sequence_len=6, n_prelude=0, n_core=1, n_coda=0, steps=3)
ROWS, SHARD, BATCH = 10, 4, 2


def loss(model: Any, batch: list[Tensor]) -> Tensor:
    return gpt_loss(model, {"tokens": batch[0][:, :-1], "targets": batch[0][:, 1:]})


def dataset() -> TensorDataset:
    return TensorDataset(torch.randint(17, (ROWS, 7), generator=torch.Generator().manual_seed(0)))


def model(seed: int = 0, **changes: Any) -> LoopedGPT:
    torch.manual_seed(seed)
    return LoopedGPT(replace(CONFIG, **changes)).eval()


def write(path: Path, capture: Any, manifest: Manifest, states: list[dict[str, Tensor]], **share: int) -> None:
    writer = StoreWriter.create(path, manifest)
    for k, state in enumerate(states):
        capture.model.load_state_dict(state)
        for shard in writer.pending(k, **share):
            rows = manifest.rows_of(shard)
            loader = DataLoader(Subset(dataset(), rows), batch_size=BATCH)
            features = capture.featurize(
                loader, loss, per_step=manifest.per_step, progress=False, first_batch=rows.start // BATCH
            )
            writer.write_shard(k, shard, features, [RowInfo(row) for row in rows])


def checkpoints(capture: Any) -> tuple[list[dict[str, Tensor]], list[StoredCheckpoint]]:
    states = [model(seed).state_dict() for seed in (1, 2)]
    described = []
    for k, state in enumerate(states):
        capture.model.load_state_dict(state)
        described.append(StoredCheckpoint(f"{k}.pt", 0.1 + k, capture.space()))
    return states, described


@pytest.mark.parametrize("kind", ["sketch", "exact"])
def test_shard_by_shard_by_two_workers_is_as_at_once(tmp_path: Path, kind: str) -> None:
    """Dropout-free here; random state per batch is covered with the capture's tests."""
    net = model()
    capture = attach(net, body="core", sketch_size=16) if kind == "sketch" else ExactCapture(net, body="core")
    states, described = checkpoints(capture)
    stores = {}
    for side, per_step in (("train", False), ("query", True)):
        manifest = Manifest.of(capture, ROWS, described, shard_rows=SHARD, per_step=per_step)
        assert manifest.kind == kind
        assert (manifest.sketch is None) == (kind == "exact")
        for rank in range(2):
            write(tmp_path / f"{side}-{rank}", capture, manifest, states, rank=rank, world_size=2)
        stores[side] = merge([tmp_path / f"{side}-{rank}" for rank in range(2)], tmp_path / side)
        assert stores[side].complete
    wanted = []
    for k, state in enumerate(states):
        net.load_state_dict(state)
        loader = DataLoader(dataset(), batch_size=BATCH)
        pair = [capture.featurize(loader, loss, per_step=p, progress=False) for p in (False, True)]
        for side, features in zip(("train", "query"), pair, strict=True):
            stored = stores[side].features(k)
            assert torch.equal(stored.values, features.values)
            assert torch.equal(stored.losses, features.losses)
            assert torch.equal(stored.steps, features.steps)
            assert stored.space == features.space
        wanted.append(pair)
    stores["train"].require_comparable(stores["query"])
    found = influence(
        [stores["train"].features(k) for k in range(2)],
        [stores["query"].features(k) for k in range(2)],
        etas=[0.1, 1.1],
    )
    exact = influence([a for a, _ in wanted], [b for _, b in wanted], etas=[0.1, 1.1])
    assert torch.equal(found.sdi, exact.sdi)


def test_a_store_knows_its_capture(tmp_path: Path) -> None:
    capture = attach(model(), body="core", sketch_size=16, seed=5)
    states, described = checkpoints(capture)
    manifest = Manifest.of(capture, ROWS, described, shard_rows=SHARD)
    write(tmp_path / "s", capture, manifest, states)
    capture.model.load_state_dict(states[1])
    assert Store.open(tmp_path / "s", capture=capture).require_capture(capture) == 1
    spec = Store.open(tmp_path / "s").manifest.sketch
    assert spec == SketchSpec.of(capture)
    assert (spec.hashing, spec.seed) == ("balanced", 5)
    again = attach(capture.model, body="core", sketch_size=spec.sizes, hashing=spec.hashing, seed=spec.seed)
    assert Store.open(tmp_path / "s", capture=again).complete, "the manifest tells how to make the sketches again"
    for other, message in [
        (attach(model(3), body="core", sketch_size=16, seed=5), "other weights"),
        (attach(capture.model, body="core", sketch_size=16, seed=6), "other sketches"),
        (attach(capture.model, body="core", sketch_size=16, seed=5, layout="sum"), "other sketches"),
        (attach(capture.model, body="core", sketch_size=32, seed=5), "other sketches"),
        (attach(model(vocab_size=19), body="core", sketch_size=16, seed=5), "made with another model"),
        (ExactCapture(capture.model, body="core"), "exact features cannot be compared with sketch"),
    ]:
        with pytest.raises(FeatureMismatchError, match=message):
            Store.open(tmp_path / "s", capture=other)


def test_weights_outside_of_the_body_count_too(tmp_path: Path) -> None:
    """Embeddings, heads and buffers: features depend on them as on the body's weights."""
    net = model()
    net.register_buffer("scale", torch.ones(2))
    capture = attach(net, body="core", sketch_size=16)
    manifest = Manifest.of(capture, ROWS, shard_rows=SHARD)
    write(tmp_path / "s", capture, manifest, [net.state_dict()])
    store = Store.open(tmp_path / "s", capture=capture)
    outside = [name for name in net.state_dict() if not name.startswith("core")]
    assert "scale" in outside
    assert len(outside) > 2
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for name in outside:
        net.load_state_dict({**before, name: before[name] + 1})
        assert capture.space() == replace(store.manifest.space, model_weights=""), "the body is as it was"
        other = Manifest.of(capture, ROWS, shard_rows=SHARD)
        with pytest.raises(FeatureMismatchError, match="outside of the body"):
            store.require_capture(capture)
        with pytest.raises(
            StoreError, match=r"checkpoints: [\w().]+ has other weights outside of the loop body \(here"
        ):
            StoreWriter.create(tmp_path / "s", other)
        write(tmp_path / name, capture, other, [net.state_dict()])
        with pytest.raises(FeatureMismatchError, match="outside of the body"):
            store.require_comparable(Store.open(tmp_path / name))
    net.load_state_dict(before)
    assert store.require_capture(capture) == 0
