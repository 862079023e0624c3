"""Step-Decomposed Influence: which training examples shaped a looped transformer's answer, and at which loop step.

    capture = stepinfluence.attach(model, body=model.core, sketch_size=2048, seed=0)
    train = capture.featurize(train_loader, loss_fn, per_step=False)   # loss_fn(model, batch) -> (B,)
    query = capture.featurize(query_loader, loss_fn)                   # (N, steps, D)
    scores = stepinfluence.influence(train, query)                     # .sdi (n_train, n_query, steps), .tracin

Source: Kaissis et al., "Step-resolved data attribution for looped transformers", arXiv 2602.10097.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepinfluence.lazy import lazily

if TYPE_CHECKING:
    from sdi_kernels import __version__
    from stepinfluence.app.project import Project
    from stepinfluence.attribution import curvature
    from stepinfluence.attribution.allocation import allocate_sizes, gradient_energies
    from stepinfluence.attribution.checkpoints import Checkpoint, load_checkpoint
    from stepinfluence.attribution.curvature import BlockFisher, Fisher
    from stepinfluence.attribution.depth import align_steps
    from stepinfluence.attribution.features import Features
    from stepinfluence.attribution.result import Influence
    from stepinfluence.attribution.scoring import influence, influence_over_checkpoints, self_influence
    from stepinfluence.attribution.space import FeatureSpace
    from stepinfluence.capture import Capture, ExactCapture, TrainingInfluence, attach
    from stepinfluence.errors import (
        BodyError,
        CheckpointError,
        ConfigError,
        FeatureMismatchError,
        LayoutError,
        LossError,
        ProjectError,
        StepInfluenceError,
        StoreError,
        UnsupportedUseError,
    )

__all__ = [
    "BlockFisher",
    "BodyError",
    "Capture",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ExactCapture",
    "FeatureMismatchError",
    "FeatureSpace",
    "Features",
    "Fisher",
    "Influence",
    "LayoutError",
    "LossError",
    "Project",
    "ProjectError",
    "StepInfluenceError",
    "StoreError",
    "TrainingInfluence",
    "UnsupportedUseError",
    "__version__",
    "align_steps",
    "allocate_sizes",
    "attach",
    "curvature",
    "gradient_energies",
    "influence",
    "influence_over_checkpoints",
    "load_checkpoint",
    "self_influence",
]

# Imported at first use, so that `sdi --help` does not wait for torch.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "sdi_kernels": ("__version__",),
        "stepinfluence.attribution.allocation": ("allocate_sizes", "gradient_energies"),
        "stepinfluence.capture": ("Capture", "ExactCapture", "TrainingInfluence", "attach"),
        "stepinfluence.attribution.curvature": ("BlockFisher", "Fisher"),
        "stepinfluence.attribution.checkpoints": ("Checkpoint", "load_checkpoint"),
        "stepinfluence.attribution.depth": ("align_steps",),
        "stepinfluence.errors": (
            "BodyError",
            "CheckpointError",
            "ConfigError",
            "FeatureMismatchError",
            "LayoutError",
            "LossError",
            "ProjectError",
            "StepInfluenceError",
            "StoreError",
            "UnsupportedUseError",
        ),
        "stepinfluence.attribution.features": ("Features",),
        "stepinfluence.app.project": ("Project",),
        "stepinfluence.attribution.result": ("Influence",),
        "stepinfluence.attribution.scoring": ("influence", "influence_over_checkpoints", "self_influence"),
        "stepinfluence.attribution.space": ("FeatureSpace",),
    },
    {"curvature": "stepinfluence.attribution.curvature"},
)
