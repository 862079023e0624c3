"""The methods that are compared: ours, and what people use otherwise."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stepinfluence.attribution.curvature import Choice, Damping, Normalize, corrected
from stepinfluence.attribution.curvature.choice import unit_norm
from stepinfluence.attribution.scoring import self_influence
from stepinfluence.capture import Capture, ExactCapture, attach
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.trained import Trained

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Scores of a method.

    Attributes:
        scores: ``(n_train, n_query)``.
        suspicion: ``(n_train,)``: how much an example stands out (self-influence), or None.
        seconds: processor seconds to compute them.
        bytes_per_example: of what is kept of a training example.
    """

    scores: Array
    suspicion: Array | None
    seconds: float
    bytes_per_example: int


Method: TypeAlias = Callable[[Trained], Scored]


def _influence(problem: Problem, capture: Capture | ExactCapture, *, cosine: bool = False) -> Scored:
    began = time.process_time()
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    query = capture.featurize(problem.batches("query"), problem.loss, per_step=False, progress=False)
    if cosine:
        train, query = unit_norm(train), unit_norm(query)
    # Summed features: one product gives the sum over steps that is compared here.
    scores = (train.values @ query.values.T).double().numpy()
    suspicion = None if cosine else self_influence(train).double().numpy()
    width = train.values.shape[1] * train.values.element_size()
    return Scored(scores, suspicion, time.process_time() - began, width)


def corrected_sdi(
    trained: Trained,
    *,
    sketch_size: int = 2048,
    curvature: Choice = "none",
    damping: Damping | None = None,
    normalize: Normalize = None,
) -> Scored:
    """SDI with the query's features times ``(F + lambda)^-1`` of the train features; arguments as for
    :func:`stepinfluence.influence`. Suspicion is the plain self-influence, and None for unit-norm rows."""
    problem, model = trained.problem, trained.model
    began = time.process_time()
    capture = attach(model, body=problem.body(model), sketch_size=sketch_size)
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    query = capture.featurize(problem.batches("query"), problem.loss, per_step=False, progress=False)
    (rows,), (asked,) = corrected([train], [query], curvature=curvature, damping=damping, normalize=normalize)
    scores = (rows.values @ asked.values.T).double().numpy()
    suspicion = self_influence(train).double().numpy() if normalize is None else None
    width = train.values.shape[1] * train.values.element_size()
    return Scored(scores, suspicion, time.process_time() - began, width)


def sdi(trained: Trained) -> Scored:
    """Step-decomposed influence from sketches (m = 2048), summed over steps for comparison with the others."""
    return _influence(
        trained.problem, attach(trained.model, body=trained.problem.body(trained.model), sketch_size=2048)
    )


def sdi_small(trained: Trained) -> Scored:
    """The same at m = 256."""
    return _influence(trained.problem, attach(trained.model, body=trained.problem.body(trained.model), sketch_size=256))


def tracin(trained: Trained) -> Scored:
    """TracIn from exact per-example gradients of the body."""
    return _influence(trained.problem, ExactCapture(trained.model, body=trained.problem.body(trained.model)))


def grad_cosine(trained: Trained) -> Scored:
    """Cosine of exact gradients: TracIn without the gradients' sizes."""
    return _influence(
        trained.problem, ExactCapture(trained.model, body=trained.problem.body(trained.model)), cosine=True
    )


def random_scores(trained: Trained) -> Scored:
    """Chance: other draws for other weights, as a method that is fixed would be a method."""
    weights = hashlib.sha256(next(trained.model.parameters()).detach().cpu().numpy().tobytes()).digest()
    rng = np.random.default_rng(list(weights))
    draws = rng.standard_normal((len(trained.problem.train), len(trained.problem.queries) + 1))
    return Scored(draws[:, 1:], draws[:, 0], 0.0, 0)


def trak(trained: Trained) -> Scored:
    """TRAK (Park et al., 2023) by its own package: projected gradients of all weights, one model, m = 512.

    The model's output is the loss itself, as no margin is known of a loss function, so the weights of its gradients are
    one.

    Raises:
        ModuleNotFoundError: ``traker`` is not installed.
    """
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    problem, model = trained.problem, trained.model

    class Loss(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None:  # abstract in the base class
            super().__init__()

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, *example: Tensor) -> Tensor:
            batch = problem.collate([tuple(part for part in example)])

            class Bound(nn.Module):
                def forward(self, *args: Any, **kwargs: Any) -> Any:
                    return torch.func.functional_call(model, (weights, buffers), args, kwargs)

            return problem.loss(Bound(), batch).sum()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Iterable[Tensor]) -> Tensor:
            return torch.ones(len(next(iter(batch))), 1)

    began = time.process_time()
    # Its progress bars and torch's word on slow batching are no business of the caller, whose bar is on the screen.
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        tracer = TRAKer(
            model=model,
            task=Loss(),
            train_set_size=len(problem.train),
            save_dir=folder,
            device="cpu",
            use_half_precision=False,
            proj_dim=512,
            lambda_reg=1e-2,
            logging_level=logging.ERROR,
        )
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        tracer.load_checkpoint(weights, model_id=0)
        for batch in problem.batches("train"):
            tracer.featurize(batch=list(batch), num_samples=len(batch[0]))
        tracer.finalize_features()
        tracer.start_scoring_checkpoint("query", weights, model_id=0, num_targets=len(problem.queries))
        for batch in problem.batches("query"):
            tracer.score(batch=list(batch), num_samples=len(batch[0]))
        scores = np.array(tracer.finalize_scores("query"), dtype=np.float64)
    return Scored(scores, None, time.process_time() - began, 512 * 4)


METHODS: dict[str, Method] = {
    "SDI, m=2048": sdi,
    "SDI, m=256": sdi_small,
    "SDI-Fisher, auto": partial(corrected_sdi, curvature="fisher"),
    "SDI-Fisher, auto, m=256": partial(corrected_sdi, curvature="fisher", sketch_size=256),
    "SDI-Fisher, 1e-2": partial(corrected_sdi, curvature="fisher", damping=1e-2),
    "SDI-Fisher, 1e-3": partial(corrected_sdi, curvature="fisher", damping=1e-3),
    "SDI-Fisher blocks, auto": partial(corrected_sdi, curvature="block"),
    "SDI-Fisher blocks, 1e-3": partial(corrected_sdi, curvature="block", damping=1e-3),
    "SDI-Fisher of unit rows, 1e-2": partial(corrected_sdi, curvature="fisher", damping=1e-2, normalize="train"),
    "SDI, cosine": partial(corrected_sdi, normalize="both"),
    "TracIn, exact": tracin,
    "grad-cosine": grad_cosine,
    "TRAK": trak,
    "random": random_scores,
}


def available() -> dict[str, Method]:
    """Those that this machine can run: TRAK needs the package ``traker``."""
    return {name: m for name, m in METHODS.items() if name != "TRAK" or importlib.util.find_spec("trak") is not None}
