"""Influence by every definition that is compared, summed over checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import stepinfluence
import torch
import torch.nn.functional as F
from stepinfluence.attribution.features import Features
from stepinfluence.capture import ExactCapture
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from reproduce.planted.config import Config
from reproduce.planted.model import LoopedRewriter
from reproduce.planted.planting import Batch, Examples, Planted
from reproduce.planted.tasks.step_task import StepTask
from reproduce.planted.training import Loss, answer_loss, make_model, to_model

CLASSIC = "TracIn, eq. 1"
EXACT = "SDI exact, summed"
MATCHED = "SDI exact, same steps only"
LAST_STEP = "TracIn, last loop step only"
LAST_CHECKPOINT = "TracIn, last checkpoint only"
READ_OUT = "TracIn, read-out layer only"
COSINE = "gradient cosine"
DEFINITIONS = {
    EXACT: "sum over query steps t of sum_k eta_k <grad(z), phi_t(z')>, exact gradients of the loop body (eqs. 5, 6)",
    CLASSIC: "sum_k eta_k <grad(z), grad(z')> on the loop body, from plain per-example gradients (torch.func)",
    MATCHED: "sum_t sum_k eta_k <phi_t(z), phi_t(z')>: the diagonal of eq. 9",
    LAST_STEP: "sum_k eta_k <phi_tau(z), phi_tau(z')>: gradients through the last loop step only (truncated backward)",
    LAST_CHECKPOINT: "TracIn of eq. 1 at the last checkpoint alone",
    READ_OUT: "eq. 1 on the read-out layer's weights instead of the loop body's (the usual short cut for large models)",
    COSINE: "mean over checkpoints of the cosine of grad(z) and grad(z')",
}


def sketched(size: int) -> str:
    """Name of the scores by sketches of ``size`` buckets per parameter."""
    return f"SDI sketched (m = {size}), summed"


def all_scores(task: StepTask, planted: Planted, paths: Sequence[Path], config: Config) -> dict[str, Any]:
    """Scores of all training examples on all queries by all definitions.

    Args:
        task: for its loss, that of the answer.
        planted: training set and queries.
        paths: checkpoints, each weighted by its learning rate.
        config: sketch sizes, seed.

    Returns:
        ``names`` of the definitions, ``scores`` float32 ``(definitions, n_train, n_query)``, ``trajectories``
        ``(n_train, n_query, steps)`` of the largest sketch, ``self_exact`` and ``self_sketched`` ``(n_train, steps)``,
        ``self_last`` ``(n_train,)`` at the last checkpoint, ``train_losses`` ``(checkpoints, n_train)``,
        ``query_losses`` ``(checkpoints, n_query)``, ``feature_share`` of each sketch: columns over body parameters.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(task, config, config.seed).to(device)
    loss = answer_loss(task)
    total: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    train_losses, query_losses, shares = [], [], {}
    largest = config.sketch_sizes[-1]

    def add(into: dict[str, Tensor], name: str, value: Tensor) -> None:
        into[name] = into[name] + value if name in into else value

    for path in paths:
        checkpoint = stepinfluence.load_checkpoint(path)
        checkpoint.load_into(model)
        eta = checkpoint.learning_rate
        exact = ExactCapture(model, body=model.body)
        train, query = (_features(exact, examples, loss, model) for examples in (planted.train, planted.queries))
        both = stepinfluence.influence(train, query, etas=eta, decompose="both").sdi
        summed = stepinfluence.influence(train.summed(), query, etas=eta)
        add(total, EXACT, summed.tracin)
        add(total, MATCHED, both.diagonal(dim1=2, dim2=3).sum(-1))
        add(total, LAST_STEP, both[:, :, -1, -1])
        cosines = F.normalize(train.summed().values) @ F.normalize(query.summed().values).T
        add(total, COSINE, cosines / len(paths))
        add(other, "self_exact", stepinfluence.self_influence(train, etas=eta))
        train_losses.append(train.losses)
        query_losses.append(query.losses)
        plain = _plain_tracin(model, loss, planted, eta)
        add(total, CLASSIC, plain)
        total[LAST_CHECKPOINT] = plain
        other["self_last"] = stepinfluence.self_influence(train.summed(), etas=eta)
        read_out = ExactCapture(model, body=model.read_out)
        sides = [_features(read_out, part, loss, model, per_step=False) for part in (planted.train, planted.queries)]
        add(total, READ_OUT, eta * sides[0].values @ sides[1].values.T)
        for size in config.sketch_sizes:
            capture = stepinfluence.attach(model, body=model.body, sketch_size=size, seed=config.seed)
            shares[str(size)] = capture.width / exact.width
            left, right = (_features(capture, part, loss, model) for part in (planted.train, planted.queries))
            found = stepinfluence.influence(left.summed(), right, etas=eta)
            add(total, sketched(size), found.tracin)
            if size == largest:
                add(other, "trajectories", found.sdi)
                add(other, "self_sketched", stepinfluence.self_influence(left, etas=eta))
    return {
        "names": list(total),
        "scores": torch.stack(list(total.values())).cpu().numpy(),
        **{name: value.cpu().numpy() for name, value in other.items()},
        "train_losses": torch.stack(train_losses).numpy(),
        "query_losses": torch.stack(query_losses).numpy(),
        "feature_share": shares,
    }


def by_name(stage: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """``{definition: (n_train, n_query)}`` from what :func:`all_scores` returned."""
    return dict(zip(stage["names"], stage["scores"], strict=True))


def energy(model: LoopedRewriter, train: Examples, queries: Examples, *, train_loss: Loss, query_loss: Loss) -> Tensor:
    """SDI energy of every query by loop step at the model's present weights, exact gradients: ``(n_query, steps)``.

    Args:
        model: trained.
        train, queries: examples.
        train_loss: what the model was trained with.
        query_loss: what is asked about.
    """
    capture = ExactCapture(model, body=model.body)
    left = _features(capture, train, train_loss, model, per_step=False)
    right = _features(capture, queries, query_loss, model)
    return stepinfluence.influence(left, right).energy().cpu()


def _features(
    capture: Any, examples: Examples, loss: Loss, model: LoopedRewriter, *, per_step: bool = True
) -> Features:
    batches = [to_model(batch, model) for batch in examples.batches()]
    return capture.featurize(batches, loss, per_step=per_step, progress=False)  # type: ignore[no-any-return]


def _plain_tracin(model: LoopedRewriter, loss: Loss, planted: Planted, eta: float) -> Tensor:
    """TracIn by eq. 1 from whole per-example gradients of the body, without any notion of a step: ``(N, Q)``."""
    names = [name for name, _ in model.named_parameters() if name.startswith("body.")]
    fixed = {n: v.detach() for n, v in model.state_dict().items()}

    def one_loss(body: dict[str, Tensor], example: Batch) -> Tensor:
        single = {name: value[None] for name, value in example.items()}
        return loss(_Functional(model, {**fixed, **body}), single)[0]  # type: ignore[arg-type]  # stands in for it

    gradients = vmap(grad(one_loss), in_dims=(None, 0))

    def flat(examples: Examples) -> Tensor:
        parts = []
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know no vmap
            for batch in examples.batches():
                found = gradients({n: fixed[n] for n in names}, to_model(batch, model))
                parts.append(torch.cat([found[n].flatten(1) for n in names], 1))
        return torch.cat(parts)

    return eta * flat(planted.train) @ flat(planted.queries).T


class _Functional:
    """The model with other weights, for a loss that calls it."""

    def __init__(self, model: LoopedRewriter, weights: dict[str, Tensor]) -> None:
        self._model, self._weights = model, weights

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional_call(self._model, self._weights, (tokens,))  # type: ignore[no-any-return]
