"""What the fidelity experiment found: numbers beside the paper's, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from stepinfluence.models.gpt import LoopedGPTConfig

from reproduce.arrays import Array
from reproduce.base import Comparison, Outcome, Result, Run
from reproduce.fidelity import figures, timing
from reproduce.fidelity.config import Config
from reproduce.fidelity.costs import cost_comparisons, cost_values
from reproduce.fidelity.statistics import (
    loglog_slope,
    mean_absolute_error,
    off_diagonal,
    relative_error,
    spread_evenly,
)
from reproduce.template import fill


def error_table(exact: Array, sketched: Array) -> dict[str, Array]:
    """Relative errors by sketch size and seed, ``(sizes, seeds)``.

    Args:
        exact: ``(B, B, steps)``.
        sketched: ``(sizes, seeds, B, B, steps)``.

    Returns:
        ``sdi`` and ``tracin`` over all pairs, as in the paper; ``sdi_cross`` and ``tracin_cross`` over pairs of
        different examples.
    """

    def every(measure: Any) -> Array:
        return np.array([[measure(one) for one in row] for row in sketched])

    total = exact.sum(-1)
    return {
        "sdi": every(lambda s: relative_error(s, exact)),
        "tracin": every(lambda s: relative_error(s.sum(-1), total)),
        "sdi_cross": every(lambda s: relative_error(off_diagonal(s), off_diagonal(exact))),
        "tracin_cross": every(lambda s: relative_error(off_diagonal(s.sum(-1)), off_diagonal(total))),
    }


def outcome(
    run: Run[Config],
    exact: Array,
    sketched: Mapping[str, Array],
    library: Result,
    saved: int,
    timings: Result,
    searches: Mapping[str, Result],
) -> Outcome:
    """Everything the report shows; arguments are the stages' results."""
    config = run.config
    tables = {hashing: error_table(exact, s) for hashing, s in sketched.items()}
    slopes = {h: loglog_slope(config.sketch_sizes, list(t["sdi"].mean(1))) for h, t in tables.items()}
    at = config.sketch_sizes.index(config.reference_size)
    mae = {h: np.array([mean_absolute_error(s, exact) for s in sketched[h][at]]) for h in sketched}
    even = mean_absolute_error(spread_evenly(exact), exact)
    share = library["feature_bytes"] / library["gradient_bytes"]
    cpu = config.device == "cpu"
    # Processor seconds leave out what other programs do to the clock; a GPU's work shows in the clock only.
    ratio = timing.ratios(timings["cpu" if cpu else "wall"], timings["names"], timing.STEP)

    m = config.reference_size
    iid, balanced = tables["iid"], tables["balanced"]
    here = "" if config.model == LoopedGPTConfig.paper() else "a smaller model than the paper's"
    comparisons = (
        Comparison(f"relative error of SDI, m = {m}, iid hashing", _spread(iid["sdi"][at]), "0.0388 ± 0.0030",
                   "§4, D.1", here or "the paper's hashing"),
        Comparison(f"relative error of SDI, m = {m}, balanced hashing", _spread(balanced["sdi"][at]), None, "",
                   "our default"),
        Comparison(f"relative error of TracIn, m = {m}, iid hashing", _spread(iid["tracin"][at]), "0.0220 ± 0.0052",
                   "§4, D.1", here),
        Comparison(f"relative error of TracIn, m = {m}, balanced hashing", _spread(balanced["tracin"][at])),
        Comparison("log-log slope of the SDI error on m, iid", _with_error(slopes["iid"]), "-0.489", "Fig. 4", here),
        Comparison("log-log slope of the SDI error on m, balanced", _with_error(slopes["balanced"])),
        Comparison("conservation: largest absolute difference", library["conservation_max_abs"], "about 1e-7",
                   "§4", f"relative: {library['conservation_relative']:.1e}; all {library['body_tensors']} weights"),
        Comparison("parameters of the model", f"{library['parameters'] / 1e6:.1f}M", "135.1M", "§4", here),
        *cost_comparisons(config, library, timings, searches, ratio),
        Comparison(f"mean absolute error of SDI by sketches, m = {m}", _spread(mae["balanced"]), 0.04, "summary",
                   f"over the mean absolute exact score; iid hashing: {_spread(mae['iid'])}"),
        Comparison("mean absolute error, classic TracIn", even, 0.31, "summary",
                   "the scalar shared equally by all steps, as it says nothing of them"),
        Comparison("feature memory of an example over its step gradients", f"{100 * share:.2g} %", "about 0.2 %",
                   "summary", "numbers stored"),
    )  # fmt: skip
    numbers = {
        "sketch_sizes": list(config.sketch_sizes),
        "errors": {h: {k: v.tolist() for k, v in t.items()} for h, t in tables.items()},
        "slopes": slopes,
        "mean_absolute_error": {h: v.tolist() for h, v in mae.items()},
        "mean_absolute_error_even": even,
        "exact_trajectories": {
            "self": np.einsum("iit->it", exact).mean(0).tolist(),
            "cross": np.abs(off_diagonal(exact)).mean(0).tolist(),
        },
        "library": dict(library),
        "saved_bytes_per_example": saved,
        "timing": {"names": timings["names"], "wall": timings["wall"].tolist(), "cpu": timings["cpu"].tolist()},
        "memory": {k: dict(v) for k, v in searches.items()},
    }
    run.figure("errors", figures.errors(config.sketch_sizes, tables, at))
    run.figure("trajectories", figures.trajectories(exact, sketched["balanced"][at], config.reference_size))
    scores = {"iid": iid, "balanced": balanced, "slopes": slopes, "at": at, "diagonal": _diagonal(exact)}
    costs = cost_values(config, library, saved, timings, searches)
    text = fill(
        "fidelity",
        {"config": config, "library": library, "saved": saved, "ratio": ratio, "cpu": cpu, **scores, **costs},
        {"spread": _spread},
    )
    return Outcome(
        title="Fidelity and scalability of sketched influence",
        summary=text.summary,
        comparisons=comparisons,
        numbers=numbers,
        body=text.body,
    )


def _diagonal(exact: Array) -> float:
    """Share of self-influence in the squared norm of the scores."""
    return float(np.square(np.einsum("iit->it", exact)).sum() / np.square(exact).sum())


def _spread(values: Array) -> str:
    """Mean ± standard deviation over seeds, as the paper writes them."""
    values = np.asarray(values)
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"


def _with_error(slope: tuple[float, float]) -> str:
    return f"{slope[0]:.3f} ± {slope[1]:.3f}"
