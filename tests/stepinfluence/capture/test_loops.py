"""Loop structure: steps, bodies, injection, read-out, truncation, wrappers, recomputation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import loops
import oracle
import pytest
import torch
import torch.distributed as dist
import zoo
from compare import compare
from stepinfluence import BodyError, ExactCapture, attach
from stepinfluence.capture.session import seed_batch
from torch import nn

pytestmark = pytest.mark.numeric

BATCHES = [(3, 4), (4, 4), (2, 4), (1, 3)]


def batches(dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    return [zoo.make_batch(b, t, dtype=dtype) for b, t in BATCHES]


def with_steps(*steps: int) -> list[dict[str, Any]]:
    return [{**batch, "steps": n} for batch, n in zip(batches(), steps, strict=True)]


# --------------------------------------------------------------------------------------------------------------------
# Which step a use belongs to


def test_two_body_modules_share_the_step_axis() -> None:
    result = compare(loops.Adapter(), batches(), body=["adapter", "block"])
    assert result.sketches.values.shape[1] == loops.STEPS


def test_module_list_of_blocks() -> None:
    compare(loops.Blocks(), batches(), body=["core"])


@pytest.mark.parametrize("shared", [False, True], ids=["own weights", "one weight in both"])
def test_nested_cycles(shared: bool) -> None:
    entries = compare(loops.Nested(shared=shared), batches(), body=["fast", "slow"])
    assert entries.sketches.values.shape[1] == 4
    timeline = compare(loops.Nested(shared=shared), batches(), body=["fast", "slow"], loop="timeline")
    assert timeline.sketches.step_labels == ("fast", "fast", "slow") * 2


def test_steps_marked_by_hand_with_a_layer_used_twice_in_each() -> None:
    model = loops.Manual()

    @contextmanager
    def marking(leaves: oracle.Leaves) -> Iterator[None]:
        before, model.mark = model.mark, leaves.at
        yield
        model.mark = before

    compare(model, batches(), body=["mix"], loop="manual", around=marking, exact=False)


def test_loop_count_by_batch_pads_with_zero_steps() -> None:
    result = compare(loops.Injected(), with_steps(2, 4, 1, 3), loops.counted_error)
    assert result.sketches.values.shape[1] == 4
    assert result.sketches.steps.tolist() == [2] * 3 + [4] * 4 + [1] * 2 + [3]
    assert len(result.sketches.step_labels) == 4
    assert result.exact is not None
    assert len(result.exact.step_labels) == 4


def test_read_out_at_a_step_of_its_own() -> None:
    given = [{**batch, "halt": torch.arange(len(batch["x"])) % 4} for batch in batches()[:3]]
    result = compare(loops.Injected(), given, loops.read_out_error)
    assert result.lengths == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    for row, length in enumerate(result.lengths):
        assert not result.sketches.values[row, length:].any()


def test_batch_that_does_not_depend_on_the_loop_is_zero() -> None:
    given = [{**batch, "halt": torch.zeros(len(batch["x"]), dtype=torch.long)} for batch in batches()]
    features = attach(loops.Injected(), body="core", sketch_size=32).featurize(given, loops.read_out_error)
    assert not features.values.any()
    assert features.lengths is not None
    assert not features.lengths.any()


@pytest.mark.parametrize("how", ["detach", "no_grad"])
def test_truncated_backpropagation_leaves_early_steps_zero(how: str) -> None:
    result = compare(loops.Injected(truncate=how), with_steps(4, 4, 3, 2), loops.counted_error)
    assert not result.sketches.values[:7, :2].any()
    assert result.sketches.values[:7, 2:].flatten(1).any(1).all()


@pytest.mark.parametrize("injection", ["add", "concatenate"])
def test_injection(injection: str) -> None:
    compare(loops.Injected(injection=injection), batches())


def test_uses_outside_the_loop() -> None:
    torch.manual_seed(0)
    model = loops.Injected()
    model.core[4] = nn.Linear(2 * loops.D, loops.D)

    def loss_fn(m: Any, batch: Any) -> torch.Tensor:
        out = m.core[4](m.core[1](m.loop(batch["x"])).tanh())
        return (m.read_out(out).squeeze(-1) - batch["y"]).square().mean(1)

    for make in (attach, ExactCapture):
        with pytest.raises(BodyError, match=r"core\.[14]\.weight: used outside the loop"):
            make(model, body="core").featurize(batches(), loss_fn)
    compare(model, batches(), loss_fn, outside="ignore")


# --------------------------------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize("sizes", [[(3, 4), (2, 4), (1, 4)], [(4, 4), (3, 3)]], ids=["B != T", "B == T"])
def test_batch_second(sizes: list[tuple[int, int]]) -> None:
    given = [{k: v.transpose(0, 1) for k, v in zoo.make_batch(b, t).items()} for b, t in sizes]
    compare(loops.SequenceFirstModel(), given, loops.sequence_first_error, batch_dim=1)


def test_nested_batches() -> None:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return zoo.squared_error(model, {"x": batch["inputs"][0]["x"], "y": batch["targets"][0]})

    given = [{"inputs": [{"x": b["x"]}], "targets": (b["y"],)} for b in batches()]
    compare(loops.Injected(), given, loss_fn)


def test_padding_and_batch_mates_do_not_matter() -> None:
    torch.manual_seed(0)
    model = loops.Padded().eval()
    lengths = [2, 5, 3, 4]
    full = zoo.make_batch(4, 5)
    full["mask"] = torch.arange(5) < torch.tensor(lengths)[:, None]
    result = compare(model, [full], loops.masked_error)
    capture = attach(model, body="core", sketch_size=64)
    tables = {t.name: t.sketch for t in capture.targets}
    alone = capture.featurize(
        [{k: v[i : i + 1, :n] for k, v in full.items()} for i, n in enumerate(lengths)], loops.masked_error
    )
    poisoned = {**full, "x": full["x"].masked_fill(~full["mask"].unsqueeze(-1), 1e3)}
    assert result.rounding is not None
    for what, found in (("alone", alone), ("poisoned", capture.featurize([poisoned], loops.masked_error))):
        result.rounding.check_sketches(found.values, f"{what}:", tables, per_step=True)


# --------------------------------------------------------------------------------------------------------------------
# Wrappers


def twins(make: Any) -> tuple[nn.Module, nn.Module]:
    """The same model twice."""
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(make().eval())
    return models[0], models[1]


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    plain, inner = twins(loops.Injected)
    wrapped = nn.parallel.DistributedDataParallel(inner)
    compare(inner, batches(), wrapped=wrapped, plain=plain)
    # A training step still works afterwards.
    wrapped(zoo.make_batch(3)["x"]).sum().backward()
    assert inner.core[1].weight.grad is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["model", "core", "in place"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_compiled(backend: str, where: str, warm: bool) -> None:
    torch.compiler.reset()
    plain, inner = twins(loops.Injected)
    wrapped = inner
    if where == "model":
        wrapped = torch.compile(inner, backend=backend)  # type: ignore[assignment]
    elif where == "core":
        inner.core = torch.compile(inner.core, backend=backend)  # type: ignore[assignment]
    else:
        inner.core.compile(backend=backend)
    if warm:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped(zoo.make_batch(3)["x"]).sum().backward()
        inner.zero_grad(set_to_none=True)
    result = compare(inner, batches(), wrapped=wrapped, plain=plain)
    assert result.capture.targets[0].name == "core.0.weight"


# --------------------------------------------------------------------------------------------------------------------
# Recomputation


@pytest.mark.parametrize("where", ["body", "step", "loop"])
@pytest.mark.parametrize("truncate", [None, "detach"])
def test_checkpointing_gives_the_same_sketches(where: str, truncate: str | None) -> None:
    plain, checkpointed = twins(lambda: loops.Injected(truncate=truncate, checkpointed=None))
    checkpointed.checkpointed = where  # type: ignore[assignment]
    result = compare(checkpointed, batches(), plain=plain)
    again = attach(plain, body="core", sketch_size=64).featurize(batches(), zoo.squared_error)
    assert torch.equal(result.sketches.values, again.values)


@pytest.mark.parametrize("name", ["weight norm", "positions by arange", "fused qkv, weight chunks", "bilinear",
                                  "cls token, expanded", "LoRA merged", "hand-written rms norm"])  # fmt: skip
def test_checkpointing_of_other_uses(name: str) -> None:
    class Checkpointed(zoo.Looped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = injected = self.read_in(x)
            for _ in range(self.steps):
                out: torch.Tensor = torch.utils.checkpoint.checkpoint(self.core, state, use_reentrant=False)
                state = out + injected
            return self.read_out(state)

    plain = None
    for make in (zoo.Looped, Checkpointed):
        torch.manual_seed(5)
        model = make(zoo.LAYERS[name]())
        plain = plain or model
    compare(model, batches(), plain=plain)


def test_checkpointing_around_uses_that_are_left_out() -> None:
    """A checkpointed part uses body parameters outside the loop: its recomputation must save the same tensors."""

    class Tied(loops.Injected):
        def head(self, state: torch.Tensor) -> torch.Tensor:
            return self.core[4](self.core[1](self.core[0](state)).sigmoid()).sin()

        def forward(self, x: torch.Tensor, steps: int = loops.STEPS) -> torch.Tensor:
            state = self.loop(x)
            if self.checkpointed == "head":
                state = torch.utils.checkpoint.checkpoint(self.head, state, use_reentrant=False)
            else:
                state = self.head(state)
            return self.read_out(state)

    plain, checkpointed = twins(Tied)
    checkpointed.checkpointed = "head"  # type: ignore[assignment]
    compare(checkpointed, batches(), plain=plain, outside="ignore")


# --------------------------------------------------------------------------------------------------------------------
# Randomness


@pytest.mark.parametrize("checkpointed", [None, "body", "step"])
def test_dropout_in_training_mode(checkpointed: str | None) -> None:
    """The random state of a batch is a function of (seed, position of the batch): everyone draws the same masks."""
    plain, model = twins(lambda: loops.Injected(dropout=0.4))
    model.checkpointed = checkpointed  # type: ignore[assignment]
    result = compare(
        model, batches(), plain=plain, training=True, seed=7, whole_batch=lambda index: seed_batch(7, index)
    )
    other = attach(model, body="core", training=True, seed=8, sketch_size=64).featurize(batches(), zoo.squared_error)
    assert not torch.allclose(result.sketches.losses, other.losses)


def test_dropout_in_eval_mode_is_off() -> None:
    with_dropout, without = twins(loops.Injected)
    with_dropout.core[3].p = 0.9
    with_dropout.train()
    one, two = (
        attach(m, body="core", sketch_size=32).featurize(batches(), zoo.squared_error) for m in (with_dropout, without)
    )
    assert torch.equal(one.values, two.values)
