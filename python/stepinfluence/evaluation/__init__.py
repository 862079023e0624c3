"""How good are attribution scores? Against retraining, planted errors, and step by step (docs/evaluation.md)."""

from stepinfluence.evaluation.evaluate import evaluate
from stepinfluence.evaluation.metrics import (
    Estimate,
    agreement,
    bootstrap,
    leave_one_out_correlation,
    linear_datamodeling_score,
    mislabel_auc,
    over_seeds,
    randomization_check,
    top_k_overlap,
)
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.result import Evaluation, Figure
from stepinfluence.evaluation.steps import logit_lens, step_counterfactual
from stepinfluence.evaluation.trained import Checkpoint, Trained
from stepinfluence.evaluation.training import Recipe, State, Training

__all__ = [
    "Checkpoint",
    "Estimate",
    "Evaluation",
    "Figure",
    "Problem",
    "Recipe",
    "State",
    "Trained",
    "Training",
    "agreement",
    "bootstrap",
    "evaluate",
    "leave_one_out_correlation",
    "linear_datamodeling_score",
    "logit_lens",
    "mislabel_auc",
    "over_seeds",
    "randomization_check",
    "step_counterfactual",
    "top_k_overlap",
]
