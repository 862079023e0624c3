"""Runs: a project's splits featurized into stores, by one process or many (docs/scale.md).

RUN/config.yaml   what was asked for; ``sdi featurize --config RUN/config.yaml`` repeats it
RUN/<split>/      one store per split
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepinfluence.lazy import lazily

if TYPE_CHECKING:
    from stepinfluence.app.runs.config import RunConfig, SplitConfig
    from stepinfluence.app.runs.featurize import SplitReport, featurize_split, run_splits
    from stepinfluence.app.runs.prepared import Prepared
    from stepinfluence.app.runs.workers import Worker

__all__ = ["Prepared", "RunConfig", "SplitConfig", "SplitReport", "Worker", "featurize_split", "run_splits"]

# At first use: a score table is checked without torch.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "stepinfluence.app.runs.config": ("RunConfig", "SplitConfig"),
        "stepinfluence.app.runs.featurize": ("SplitReport", "featurize_split", "run_splits"),
        "stepinfluence.app.runs.prepared": ("Prepared",),
        "stepinfluence.app.runs.workers": ("Worker",),
    },
)
