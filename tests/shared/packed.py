"""Arrays as a report's page holds them."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray


def unpack(packed: dict[str, Any]) -> NDArray[np.float32]:
    """What :func:`stepinfluence.app.view.report.payload.pack` packed."""
    array = np.frombuffer(base64.b64decode(packed["f4"]), dtype="<f4").reshape(packed["shape"])
    return np.asarray(array, dtype=np.float32)
