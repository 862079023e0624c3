"""Progress bars: a notebook's own where it can show them, plain ones elsewhere."""

from __future__ import annotations

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets: plain bars will do
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
