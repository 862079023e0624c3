r"""Curvature-corrected influence, step by step, from the features that are there (docs/curvature.md).

SDI (paper, eq. 5) is linear in the query's per-step feature. So any linear map of that feature gives scores by step
that add up to the mapped influence of the whole query. With the damped empirical Fisher of the train features,

    F = (1/N) sum_z g(z) g(z)^T,         I_t(z, z') = <(F + lambda)^-1 phi_t(z'), g(z)>,

the sum over t is the influence function's ``<(F + lambda)^-1 g(z'), g(z)>``: conserved, as eq. 6 is, and so are the
training-step and step-matrix forms, as ``F + lambda`` is symmetric. Only the *query* side is transformed: whatever
takes features (scores, top-k scans over stores of any dtype, tables, checkpoints) takes transformed queries unchanged.

:class:`Fisher` is one matrix over all columns, :class:`BlockFisher` one for each parameter tensor. Both are held by
their eigenvectors, in float64, so that another damping needs no second fit. Damping is relative to the largest
eigenvalue (of each block, for blocks); ``"auto"`` chooses it without retraining (:mod:`.damping`), and training's
length says it where it is known (:mod:`.length`).

:class:`Unrolled` (SOURCE) goes through segments of training instead of looking at its end alone.

Under an optimizer's metric ``sqrt(P)``, which features then hold, the same formulas give
``g^T (F + lambda P^-1)^-1 phi_t`` in the plain gradients: the damping is measured in the metric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepinfluence.lazy import lazily

if TYPE_CHECKING:
    from stepinfluence.attribution.curvature.choice import Choice, Normalize, corrected
    from stepinfluence.attribution.curvature.damping import Damping
    from stepinfluence.attribution.curvature.fisher import BlockFisher, Curvature, Fisher
    from stepinfluence.attribution.curvature.kept import load, save
    from stepinfluence.attribution.curvature.length import Progress, TrainingTime
    from stepinfluence.attribution.curvature.progress import training_time
    from stepinfluence.attribution.curvature.unrolled import Segment, Unrolled, segments_of

__all__ = [
    "BlockFisher",
    "Choice",
    "Curvature",
    "Damping",
    "Fisher",
    "Normalize",
    "Progress",
    "Segment",
    "TrainingTime",
    "Unrolled",
    "corrected",
    "load",
    "save",
    "segments_of",
    "training_time",
]

# At first use: training's length is read from a store without torch.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "stepinfluence.attribution.curvature.choice": ("Choice", "Normalize", "corrected"),
        "stepinfluence.attribution.curvature.damping": ("Damping",),
        "stepinfluence.attribution.curvature.fisher": ("BlockFisher", "Curvature", "Fisher"),
        "stepinfluence.attribution.curvature.kept": ("load", "save"),
        "stepinfluence.attribution.curvature.length": ("Progress", "TrainingTime"),
        "stepinfluence.attribution.curvature.progress": ("training_time",),
        "stepinfluence.attribution.curvature.unrolled": ("Segment", "Unrolled", "segments_of"),
    },
)
