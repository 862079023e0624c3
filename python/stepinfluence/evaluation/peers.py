"""Methods of other packages, where these are installed."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stepinfluence.evaluation.trained import Scored, Trained
from stepinfluence.evaluation.training import CannotScore, Losses


def trak(trained: Trained, *, models: int = 1) -> Scored:
    """TRAK (Park et al., 2023) by its own package: projected gradients of all weights, m = 512.

    The model's output is the loss itself, as no margin is known of a loss function, so the weights of its gradients are
    one.

    Args:
        trained: what is asked about.
        models: that are averaged over, the others from other initialisations. Seconds do not count their training.

    Raises:
        ModuleNotFoundError: ``traker`` is not installed.
    """
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    problem, model = trained.problem, trained.model
    losses = Losses(model, problem.loss)

    class Loss(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None:  # abstract in the base class
            super().__init__()

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, *example: Tensor) -> Tensor:
            batch = tuple(part.unsqueeze(0) for part in example)
            named = [{f"model.{name}": value for name, value in values.items()} for values in (weights, buffers)]
            found: Tensor = torch.func.functional_call(losses, tuple(named), (batch,))
            return found.sum()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Iterable[Tensor]) -> Tensor:
            return torch.ones(len(next(iter(batch))), 1)

    ensemble = [model, *trained.others(models - 1)]
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
        weights = [{name: value.clone() for name, value in one.state_dict().items()} for one in ensemble]
        for k, state in enumerate(weights):
            tracer.load_checkpoint(state, model_id=k)
            for batch in problem.batches("train"):
                tracer.featurize(batch=list(batch), num_samples=len(batch[0]))
        tracer.finalize_features()
        for k, state in enumerate(weights):
            tracer.start_scoring_checkpoint("query", state, model_id=k, num_targets=len(problem.queries))
            for batch in problem.batches("query"):
                tracer.score(batch=list(batch), num_samples=len(batch[0]))
        scores = np.array(tracer.finalize_scores("query"), dtype=np.float64)
    return Scored(scores, None, time.process_time() - began, models * 512 * 4)


def ek_fac(trained: Trained) -> Scored:
    """EK-FAC influence (Grosse et al., 2023) by kronfluence, of the linear modules that are called.

    With its option for shared parameters and its post-processing hook: without the latter its pairwise scores of looped
    models are wrong (docs/peers.md). Labels cannot be sampled from a loss function, so factors are of the empirical
    Fisher. Damping is its own rule, a tenth of the mean eigenvalue. Weights that are used without their module being
    called, as attention does in ``torch.nn``, are not seen, nor are embeddings and norms.

    Raises:
        ModuleNotFoundError: ``kronfluence`` is not installed.
        CannotScore: it fails on this model, as it does where some uses of a module run without gradient.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    problem = trained.problem
    names = _called_linears(trained)

    class Ask(Task):  # type: ignore[misc]
        enable_post_process_per_sample_gradient = True

        def compute_train_loss(self, batch: list[Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            return problem.loss(model, tuple(batch)).sum()

        def compute_measurement(self, batch: list[Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    sides = [TensorDataset(*problem.collate(examples)) for examples in (problem.train, problem.queries)]
    n, n_query = len(problem.train), len(problem.queries)
    began = time.process_time()
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare_model(copy.deepcopy(trained.model), Ask())
        analyzer = Analyzer("evaluation", model, Ask(), cpu=True, disable_tqdm=True, output_dir=folder)
        how = FactorArguments(strategy="ekfac", use_empirical_fisher=True, has_shared_parameters=True)
        try:
            analyzer.fit_all_factors("factors", sides[0], min(n, 64), factor_args=how)
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                query_dataset=sides[1],
                train_dataset=sides[0],
                per_device_query_batch_size=n_query,
                per_device_train_batch_size=min(n, 64),
                score_args=ScoreArguments(damping_factor=None),
            )
        except RuntimeError as error:
            raise CannotScore(f"kronfluence: {error}") from error
        scores = analyzer.load_pairwise_scores("scores")["all_modules"].T.double().numpy()
    seen = sum(p.numel() for name, p in trained.model.named_parameters() if name.rpartition(".")[0] in names)
    return Scored(scores, None, time.process_time() - began, 4 * seen)


def _called_linears(trained: Trained) -> list[str]:
    """Names of the linear modules whose forward runs."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in trained.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            trained.problem.loss(trained.model, trained.problem.collate(trained.problem.queries[:1]))
    finally:
        for handle in handles:
            handle.remove()
    return sorted(called)
