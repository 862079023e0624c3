"""The parity task of the paper's Appendix D.2: data, probes, accuracy, and training with a length curriculum.

config = ParityTrainConfig.demo()
result = train_parity(config, on_checkpoint=save)
heldout = make_heldout_set(range(1, 41), 256, exclude=result.train_set, seed=1)
accuracy_by_length(result.model, heldout)                  # {8: 1.0, 9: 1.0, ...}
batch = collate(alternating_probes(40))                    # 0101... and 1010...
losses = parity_loss(result.model, batch)                  # (2,)
"""

from __future__ import annotations

from stepinfluence.models._parity_data import (
    EQUALS,
    IGNORED,
    PADDING,
    ParityExample,
    accuracy_by_length,
    alternating_probes,
    collate,
    influence_subset,
    make_heldout_set,
    make_train_set,
)
from stepinfluence.models._parity_resume import HistoryRow
from stepinfluence.models._parity_training import (
    CheckpointCallback,
    Curriculum,
    ParityTrainConfig,
    TrainResult,
    train_parity,
)

__all__ = [
    "EQUALS",
    "IGNORED",
    "PADDING",
    "CheckpointCallback",
    "Curriculum",
    "HistoryRow",
    "ParityExample",
    "ParityTrainConfig",
    "TrainResult",
    "accuracy_by_length",
    "alternating_probes",
    "collate",
    "influence_subset",
    "make_heldout_set",
    "make_train_set",
    "train_parity",
]
