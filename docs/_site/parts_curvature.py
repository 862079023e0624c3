"""Figures of docs/curvature.md (what a fit costs) and docs/curvature-evidence.md: ladder, steps, Kronecker factors."""

# ruff: noqa: E501  # sentences of the page
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from kept import Parts, folded, load, machines, source, table
from parts_evaluation import FISHER, LENGTH, MISSING, difference, kept, less
from stepinfluence.evaluation import Evaluation, Figure, over_seeds

from bench import steps_removed as removed
from bench.kronecker import __main__ as kron
from bench.kronecker.factors import FORMS

REMOVED = ("majority", "language")


def ladder() -> str:
    """LDS of each rung on the queries that metagradients are asked, how far one is above another, and by step."""
    results = kept("ladder")
    found = {problem: Evaluation.from_dict(result) for problem, result in results.items()}
    merits = {problem: {m.method: m for m in one.merits} for problem, one in found.items()}
    names = list(dict.fromkeys(name for known in merits.values() for name in known))
    further = [name for name in names if name.startswith(("SOURCE", "metagradients"))]
    rows = [
        [name, *(str(known[name].lds) if name in known else MISSING for known in merits.values())] for name in names
    ]
    more = [
        [f"{name} minus {other}", *(difference(one, name, other) for one in found.values())]
        for name in further
        for other in (FISHER, LENGTH)
    ]
    more += [
        [f"{name}: processor seconds", *(f"{k[name].seconds:.1f}" if name in k else MISSING for k in merits.values())]
        for name in (FISHER, LENGTH, *further)
    ]
    smooth = [one.smoothness for one in found.values()]
    more = [row for row in more if set(row[1:]) != {MISSING}]
    more += [
        ["*metasmoothness, across step sizes*", *(MISSING if s is None else str(s.across_steps) for s in smooth)],
        ["*metasmoothness, at nearby weights*", *(MISSING if s is None else str(s.nearby) for s in smooth)],
    ]
    texts = ["LDS over the same eight queries; means and 95 % intervals over seeds:", table(["method", *found], rows)]
    texts.append(folded("Differences, processor seconds, and how smooth training is", table(["", *found], more)))
    texts.append(
        "By step: rank correlation over train examples of a method's score at a loop step with the exact metagradient "
        "at the same step, and at the others; mean over steps and queries:"
    )
    about = []
    for problem, result in results.items():
        settings = result["settings"]
        texts.append(
            table(
                [f"{problem}: method", "same step", "others", "difference"],
                [[name, *_agreement(result, name)] for name in result["agreement"][0]],
            )
        )
        about.append(
            f"**{problem}**: {settings['seeds']} seeds, each with {settings['subsets']} retrainings on random halves from the "
            f"scored model's initialisation; by step {settings['by_step']} queries a seed. "
            f"{source(f'ladder-{problem}.json', False, result)}"
        )
    return "\n\n".join([*texts, folded("Where these figures come from", *about)])


def _agreement(result: Mapping[str, Any], name: str) -> list[str]:
    """Cells: the diagonal of the correlations by step, the rest, and the difference."""
    matrices = np.array([seed[name] for seed in result["agreement"]])
    own = np.einsum("stt->st", matrices).mean(1)
    count = matrices.shape[1]
    others = (matrices.sum((1, 2)) - count * own) / (count * (count - 1))
    return [str(over_seeds(values)) for values in (own, others, own - others)]


def steps_removed() -> str:
    """How much more a step changes by its own set than by others'."""
    rows, texts = [], []
    for name in REMOVED:
        result = load(f"steps-removed-{name}.json")
        records = result["records"]
        cells = []
        for measure in removed.MEASURES:
            effects = removed.by_seed(records, measure)
            cells.append(f"{over_seeds(removed.specificity(effects))}, p = {removed.permutation_p(effects):.4f}")
        shape = effects.shape
        rows.append([name.split("-")[0], result["by"], *cells, f"{removed.overlap(records):.2f}"])
        texts.append(
            f"**{name.split('-')[0]}**, {result['by']}: {shape[0]} seeds, {shape[1]} queries each, {len(records)} retrainings. "
            f"{source(f'steps-removed-{name}.json', False, result)}"
        )
    head = ["problem", "chosen by", "loss by one use", "logit lens", "two steps' sets in common"]
    return "\n\n".join([table(head, rows), folded("Where these figures come from", *texts)])


def cost() -> str:
    """What fitting to a large store takes, and asking with it."""
    texts = []
    for name, result in machines("curvature-cost"):
        rows = [
            [
                one["kind"],
                f"{one['eigenvectors']:,}",
                f"{one['fit s'] / 60:.1f} min",
                f"{one['fit cpu s'] / 60:.1f} min",
                f"{one['peak GiB']:.1f} GiB",
                f"{one['apply s']:.1f} s",
                " / ".join(f"{one['scan s'][key]:.1f} s" for key in ("plain", "corrected")),
            ]
            for one in result["kinds"]
        ]
        head = ["curvature", "eigenvectors", "fit", "processor time", "peak memory", "queries transformed"]
        texts.append(
            f"{result['rows']:,} rows of {result['parameters']} parameters, m = {result['m']}, int8 ({result['gigabytes']:.1f} GB); "
            f"{result['queries']} queries of {result['steps']} steps. Memory with the pages of the store that are in it. {source(name, False, result)}\n\n"
            + table([*head, "scan for the best ten: SDI / corrected"], rows)
        )
    return "\n\n".join(texts)


COMPARED = {
    "with the damping of training's length": (kron.LENGTH, kron.LENGTH),
    "with the best damping of the grid, chosen for each": (None, None),
    "with dampings that know nothing of training, a tenth of each block's mean against `auto`": (kron.MEAN, "auto"),
    "with a tenth of each block's mean against training's length": (kron.MEAN, kron.LENGTH),
}
"""What is given to Kronecker factors, and to the sketched Fisher; None for the best of the grid."""

COSTS = (
    f"{kron.SKETCHED}: auto",
    f"{kron.SKETCHED}: {kron.LENGTH}",
    f"{kron.SKETCHED_BLOCKS}: auto",
    kron.EXACT,
    kron.EXACT_BLOCKS,
    *(f"{form}, expand" for form in FORMS),
)


def with_damping(lds: Mapping[str, list[float]], method: str, damping: str | None) -> str:
    """The key of a method with a damping, or with that of the grid that has the highest mean."""
    if damping is not None:
        return f"{method}: {damping}"
    grid = [name for name in lds if name.startswith(f"{method}: ") and name.endswith((" of all", " of a block"))]
    return max(grid, key=lambda name: sum(lds[name]))


def differences(
    found: Mapping[str, dict[str, list[float]]], method: str, dampings: tuple[str | None, str | None]
) -> dict[str, Figure]:
    """LDS of a method less that of the sketched Fisher, by problem."""
    return {
        problem: less(lds, with_damping(lds, method, dampings[0]), with_damping(lds, kron.SKETCHED, dampings[1]))
        for problem, lds in found.items()
    }


def kronecker() -> str:
    """LDS of Kronecker factors less that of the sketched Fisher, and what both cost."""
    results = kept("kronecker")
    found = {problem: result["lds"] for problem, result in results.items()}
    tables = []
    for title, dampings in COMPARED.items():
        lds = {p: np.mean(one[with_damping(one, kron.SKETCHED, dampings[1])]) for p, one in found.items()}
        rows = [[f"*{kron.SKETCHED}*", *(f"*{value:.2f}*" for value in lds.values())]]
        # A tenth of the mean is no damping for a matrix of as many zeros as an exact Fisher has.
        exact = () if dampings[0] == kron.MEAN else (kron.EXACT, kron.EXACT_BLOCKS)
        for method in (*exact, *kron.KRONECKER):
            less_by = differences(found, method, dampings)
            rows.append([method, *(f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]" for d in less_by.values())])
        tables += [f"LDS {title}; of all others less that of the sketched Fisher:", table(["", *found], rows)]
    every = [d for w in COMPARED.values() for m in kron.KRONECKER for d in differences(found, m, w).values()]
    above, below = sum(d.low > 0 for d in every), sum(d.high < 0 for d in every)
    costs = [[name, *(_cost(result, name) for result in results.values())] for name in COSTS]
    return "\n\n".join(
        [
            "![LDS of twelve Kronecker factors less that of the sketched Fisher, on four problems, with four pairs of dampings](images/curvature-kronecker.png)",
            "*LDS of Kronecker factors less that of the sketched Fisher; means over seeds with 95 % intervals. To the left of zero the Fisher predicts retraining better.*",
            f"Of the {len(every)} differences {above} have an interval above zero and {below} one below. {_settings(results)}",
            folded("All of them in numbers, beside the exact Fisher and its blocks", *tables),
            folded(
                "Processor seconds, and numbers that are kept",
                "Processor seconds of the pass over all examples + the fit + one query side transformed and multiplied; and numbers that are kept of the curvature:",
                table(["", *found], costs),
            ),
            folded(
                "Where these figures come from",
                *(source(f"kronecker-{problem}.json", False, result) for problem, result in results.items()),
            ),
        ]
    )


def _settings(results: Mapping[str, Any]) -> str:
    """How much was trained."""
    halves = {problem: f"{result['settings']['subsets']} halves on {problem}" for problem, result in results.items()}
    (seeds,) = {result["settings"]["seeds"] for result in results.values()}
    (repeats,) = {result["settings"]["repeats"] for result in results.values()}
    return f"{seeds} seeds, each with {', '.join(halves.values())}, each trained from {repeats} initialisations."


def _cost(result: Mapping[str, Any], name: str) -> str:
    """Of a method on one problem."""
    seconds = (f"{result['seconds'][name][part]:.2f}" for part in ("pass", "fit", "apply"))
    return f"{' + '.join(seconds)}; {result['numbers'][name]['curvature']:,}"


PARTS: Parts = {"curvature-cost": cost, "kronecker": kronecker, "ladder": ladder, "steps-removed": steps_removed}
