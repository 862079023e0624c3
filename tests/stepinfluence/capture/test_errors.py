"""Bad input gets an error of one line that names the argument and the fix."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import loops
import pytest
import torch
import zoo
from stepinfluence import BodyError, ExactCapture, LossError, UnsupportedUseError, attach, influence
from stepinfluence.errors import FeatureMismatchError
from torch import Tensor, nn


@contextmanager
def refuses(error: type[Exception] | tuple[type[Exception], ...], match: str) -> Iterator[None]:
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def model() -> zoo.Looped:
    torch.manual_seed(0)
    return zoo.Looped(zoo.LAYERS["mlp"]())


BATCH = zoo.make_batch(3)
CAPTURES = pytest.mark.parametrize("make", [attach, ExactCapture])

LOSSES: dict[str, tuple[Any, str]] = {
    "reduced": (lambda m, b: zoo.squared_error(m, b).mean(), r"loss_fn: returned shape \(\), expected \(3,\)"),
    "per token": (lambda m, b: m(b["x"]).squeeze(-1), r"loss_fn: returned shape \(3, 4\).*one loss per example"),
    "a column": (lambda m, b: zoo.squared_error(m, b)[:, None], r"loss_fn: returned shape \(3, 1\)"),
    "too few": (lambda m, b: zoo.squared_error(m, b)[:2], r"loss_fn: returned shape \(2,\), expected \(3,\)"),
    "a number": (lambda m, b: zoo.squared_error(m, b).mean().item(), "loss_fn: returned float"),
    "a pair": (lambda m, b: (zoo.squared_error(m, b), None), "loss_fn: returned tuple"),
    "detached": (lambda m, b: zoo.squared_error(m, b).detach(), "loss_fn: .*require grad"),
}


@CAPTURES
@pytest.mark.parametrize("name", LOSSES)
def test_loss(make: Any, name: str) -> None:
    loss_fn, match = LOSSES[name]
    with refuses(LossError, match):
        make(model(), body="core").featurize([BATCH], loss_fn)


@CAPTURES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_the_examples(make: Any, bad: float) -> None:
    broken = {**BATCH, "y": BATCH["y"].clone()}
    broken["y"][1, 0] = bad
    with refuses(LossError, r"NaN or infinite for example\(s\) row 1"):
        make(model(), body="core").featurize([broken], zoo.squared_error)
    with refuses(LossError, r"example\(s\) 'second'"):
        names = ["first", "second", "third"]
        make(model(), body="core").featurize([broken], zoo.squared_error, ids=lambda _: names)


@CAPTURES
@pytest.mark.parametrize("per_step", [True, False])
def test_gradients_that_are_not_finite_under_a_finite_loss_name_the_examples(make: Any, per_step: bool) -> None:
    switch = torch.tensor([1.0, 0.0, 1.0])

    def root_at_zero(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch["x"]).flatten(1).sum(1) * switch).abs().sqrt()

    # Differentiating one loss at a time, zero times infinity reaches the other examples, too.
    with refuses(LossError, r"gradients are NaN or infinite for example\(s\) (row 0, )?row 1(, row 2)?, though"):
        make(model(), body="core").featurize([BATCH], root_at_zero, per_step=per_step)


@CAPTURES
def test_ids_of_another_length(make: Any) -> None:
    with refuses(LossError, "ids: got 2 for a batch of 3"):
        make(model(), body="core").featurize([BATCH], zoo.squared_error, ids=lambda _: [1, 2])


@CAPTURES
def test_body(make: Any) -> None:
    with refuses(BodyError, "body: the model has no submodule 'cor'; its children are: read_in, core, read_out"):
        make(model(), body="cor")
    with refuses(BodyError, "body: Linear is not a submodule of the model"):
        make(model(), body=zoo.linear())
    with refuses(BodyError, "body: got an empty list"):
        make(model(), body=[])
    with refuses(BodyError, "body: got int"):
        make(model(), body=[3])
    with refuses(BodyError, "body: it has no trainable parameter.*requires_grad=True"):
        make(zoo.Looped(nn.Tanh()), body="core")
    frozen = model()
    frozen.core.requires_grad_(False)
    with refuses(BodyError, "body: it has no trainable parameter"):
        make(frozen, body="core")
    with refuses(BodyError, "core.f: is complex"):
        make(zoo.Looped(zoo.Core(lambda s, x: x, f=nn.Parameter(torch.randn(3, dtype=torch.complex64)))), body="core")


UNUSABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "without a shape": (lambda: nn.LazyLinear(zoo.D), r"core\.weight: has no shape yet.*run one batch"),
    "without values": (lambda: nn.Linear(zoo.D, zoo.D, device="meta"), r"core\.weight: is on the meta device.*load"),
    "eight bits": (lambda: zoo.linear().to(torch.float8_e4m3fn), r"core\.weight: is of torch\.float8_e4m3fn; use"),
    "sparse": (
        lambda: zoo.Core(lambda s, x: x, f=nn.Parameter(torch.eye(3).to_sparse())), r"core\.f: is a sparse tensor"
    ),
    "empty": (lambda: zoo.Core(lambda s, x: x, f=nn.Parameter(torch.ones(0, 3))), r"core\.f: has no entries.*\(0, 3\)"),
}  # fmt: skip


@CAPTURES
@pytest.mark.parametrize("name", UNUSABLE)
def test_parameters_that_cannot_be_captured(make: Any, name: str) -> None:
    core, message = UNUSABLE[name]
    with refuses(BodyError, message):
        make(zoo.Looped(core()), body="core")


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": "gpt2"}, "model: got str; pass a torch.nn.Module"),
    "a number for a body": ({"body": 3}, "body: got int; pass a module"),
    "a word for a switch": ({"training": "yes"}, "training: got str 'yes'; pass True or False"),
    "nothing for a switch": ({"training": None}, "training: got NoneType None"),
    "a dimension from behind": ({"batch_dim": -1}, "batch_dim: got -1; pass a non-negative int"),
    "a fraction of dimensions": ({"batch_dim": 1.0}, "batch_dim: got float 1.0"),
    "another way outside": ({"outside": "leave"}, "outside: got 'leave'; use 'error' or 'ignore'"),
}
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "no loader": ({"loader": None}, "loader: got NoneType; pass a DataLoader or a list of batches"),
    "a batch for a loader": ({"loader": BATCH}, r"loader: got dict; .*\[batch\] for one"),
    "arguments in another order": ({"loader": zoo.squared_error, "loss_fn": [BATCH]}, "loader: got function"),
    "no loss": ({"loss_fn": None}, r"loss_fn: got NoneType None; pass a function loss_fn\(model, batch\)"),
    "a word for a switch": ({"per_step": "no"}, "per_step: got str 'no'; pass True or False"),
    "ids of all examples": ({"ids": [1, 2, 3]}, r"ids: got list \[1, 2, 3\]; pass a function ids\(batch\)"),
    "ids that cannot be hashed": ({"ids": lambda _: [[1], [2], [3]]}, r"ids: got list \[1\] for an example"),
    "half a batch": ({"first_batch": 1.5}, "first_batch: got float 1.5; pass a non-negative int"),
    "a batch before the first": ({"first_batch": -1}, "first_batch: got -1; pass a non-negative int"),
}


@CAPTURES
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_capture(make: Any, name: str) -> None:
    given, message = OPTIONS[name]
    given = {"model": model(), "body": "core"} | given
    with refuses((TypeError, ValueError), message):
        make(given.pop("model"), **given)


@CAPTURES
@pytest.mark.parametrize("name", RUNS)
def test_arguments_of_a_run(make: Any, name: str) -> None:
    given, message = RUNS[name]
    with refuses((TypeError, ValueError), message):
        make(model(), body="core").featurize(**({"loader": [BATCH], "loss_fn": zoo.squared_error} | given))


def test_options_of_sketches() -> None:
    for given, message in (
        ({"verify": "no"}, "verify: got str 'no'; pass True or False"),
        ({"route": "gpu"}, "route: got 'gpu'; pass one of 'auto'"),
        ({"sketch_size": True}, "sketch_size: got bool True; pass a positive integer"),
    ):
        with refuses((TypeError, ValueError), message):
            attach(model(), body="core", **given)
    with refuses(TypeError, "on_error: got int 3; pass a function"):
        attach(model(), body="core").featurize([BATCH], zoo.squared_error, on_error=3)
    with refuses(TypeError, "loss_fn: got NoneType"):
        attach(model()).featurize([BATCH], None)


def test_what_is_no_features() -> None:
    made = attach(model(), body="core", sketch_size=8).featurize([BATCH], zoo.squared_error)
    for train, query, message in (
        (None, made, "train: got NoneType; pass Features"),
        (made, made.values, "query: got Tensor; pass Features"),
        ([made.values], [made], "train: got Tensor"),
    ):
        with refuses(TypeError, message):
            influence(train, query)


def test_lazy_modules_beside_the_body() -> None:
    lazy = model()
    lazy.read_out = nn.LazyLinear(1)
    with refuses(BodyError, r"read_out\.weight: has no shape yet"):
        attach(lazy, body="core")
    with refuses(BodyError, r"read_out\.weight: has no shape yet"):
        attach(lazy).featurize([BATCH], zoo.squared_error)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("make", [attach, ExactCapture, lambda model, body: attach(model)])
def test_captures_do_not_go_with_a_copy_of_their_model(make: Any, how: Any) -> None:
    with refuses(TypeError, "Capture: belongs to the tensors of one model.*attach again"):
        how(make(model(), body="core"))


@CAPTURES
def test_loop_that_is_never_entered(make: Any) -> None:
    class Bypassed(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            return self.read_out(self.read_in(x))

    with refuses(BodyError, "body: the loop was never entered"):
        make(Bypassed(zoo.linear()), body="core").featurize([BATCH], zoo.squared_error)


@CAPTURES
def test_body_called_by_its_forward_method(make: Any) -> None:
    """Hooks do not run then: there is no telling the steps apart."""

    class Direct(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            return self.read_out(self.core.forward(self.read_in(x)))

    with refuses(BodyError, "outside the loop body|never entered"):
        make(Direct(nn.Sequential(zoo.linear())), body="core").featurize([BATCH], zoo.squared_error)


def test_parameter_that_is_never_used() -> None:
    core = zoo.Core(lambda s, x: s.mix(x).tanh(), mix=zoo.linear(), spare=zoo.linear())
    with refuses(BodyError, r"core\.spare\.weight, core\.spare\.bias: never used.*requires_grad=False"):
        attach(zoo.Looped(core), body="core").featurize([BATCH], zoo.squared_error)


@pytest.mark.parametrize("how", ["no_grad", "detach", "data", "item"])
def test_parameter_without_gradient_counts_as_never_used(how: str) -> None:
    def forward(core: Any, x: Tensor) -> Tensor:
        if how == "no_grad":
            with torch.no_grad():
                shift = core.bias * 2
        elif how == "detach":
            shift = core.bias.detach()
        elif how == "data":
            shift = core.bias.data
        else:
            shift = core.bias[0].item()
        return (core.mix(x) + shift).tanh()

    core = zoo.Core(forward, mix=zoo.linear(), bias=zoo.normal(zoo.D))
    with refuses(BodyError, r"core\.bias: never used in the loop with gradients on"):
        attach(zoo.Looped(core), body="core").featurize([BATCH], zoo.squared_error)
    core.bias.requires_grad_(False)
    attach(zoo.Looped(core), body="core", sketch_size=8).featurize([BATCH], zoo.squared_error)


def test_use_that_cannot_be_sketched_names_parameter_and_operation() -> None:
    core = zoo.Core(lambda s, x: s.r(x)[0], r=nn.LSTM(zoo.D, zoo.D, 2, batch_first=True, dropout=0.5))
    with refuses(UnsupportedUseError, r"core\.r\.weight_ih_l0, .*torch\.lstm.*dropout=.*requires_grad=False"):
        attach(zoo.Looped(core), body="core", training=True).featurize([BATCH], zoo.squared_error)


@pytest.mark.parametrize("size", [0, -3])
def test_sketch_size_not_positive(size: int) -> None:
    with refuses(ValueError, "sketch_size"):
        attach(model(), body="core", sketch_size=size)


def test_options() -> None:
    with refuses(TypeError, "sketch_size"):
        attach(model(), body="core", sketch_size=2.5)  # type: ignore[arg-type]
    with refuses(ValueError, "sketch_size: the mapping has no entry for body parameter 'core.0.bias'"):
        attach(model(), body="core", sketch_size={"core.0.weight": 8})
    with refuses(ValueError, "hashing: got 'sha'"):
        attach(model(), body="core", hashing="sha")  # type: ignore[arg-type]
    with refuses(ValueError, "loop: got 'steps'; use one of 'entries'"):
        attach(model(), body="core", loop="steps")  # type: ignore[arg-type]
    with refuses(ValueError, "outside: got 'warn'"):
        attach(model(), body="core", outside="warn")  # type: ignore[arg-type]
    with refuses(ValueError, "loop: got 'manual'; ExactCapture"):
        ExactCapture(model(), body="core", loop="manual")


def test_manual_steps() -> None:
    capture = attach(model(), body="core")
    with refuses(BodyError, "capture.step: loop='entries'"), capture.step(0):
        pass
    manual = loops.Manual()
    capture = attach(manual, body="mix", loop="manual", sketch_size=8)
    with refuses(ValueError, "step: got -1"), capture.step(-1):
        pass
    with refuses(BodyError, r"never entered.*capture\.step|outside the loop body"):
        capture.featurize([BATCH], zoo.squared_error)


def test_features_that_do_not_fit_each_other() -> None:
    one = model()
    features = attach(one, body="core", sketch_size=16).featurize([BATCH], zoo.squared_error)

    def other(given: nn.Module = one, body: str = "core", **options: Any) -> Any:
        return attach(given, body=body, **{"sketch_size": 16, **options}).featurize([BATCH], zoo.squared_error)

    for options in ({"sketch_size": 17}, {"seed": 1}, {"hashing": "iid"}):
        with refuses(
            FeatureMismatchError, "query: features made with other sketches.*same sketch_size, hashing, seed and layout"
        ):
            influence(features, other(**options))
    wider = zoo.Looped(nn.Sequential(nn.Linear(zoo.D, 8), nn.GELU(), nn.Linear(8, zoo.D)))
    with refuses(FeatureMismatchError, r"query: features of other parameters.*core\.0\.bias, core\.0\.weight"):
        influence(features, other(wider))
    with refuses(FeatureMismatchError, "query: exact features cannot be compared with sketch"):
        influence(features, ExactCapture(one, body="core").featurize([BATCH], zoo.squared_error))
    with torch.no_grad():
        one.core[0].bias[0] += 1e-6
    with refuses(FeatureMismatchError, "query: features computed at other weights"):
        influence(features, other())
