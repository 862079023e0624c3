"""Figures of docs/curvature.md: how well scores with and without curvature predict retraining."""

# ruff: noqa: E501  # sentences of the page
from __future__ import annotations

from kept import Parts, load, source, table
from stepinfluence.evaluation import Evaluation

PROBLEMS = ("majority", "adder")
NAMED = {
    "SDI, m=2048": "SDI, m=2048",
    "SDI, m=256": "SDI, m=256",
    "SDI, cosine": "cosine, m=2048",
    "SDI-Fisher, auto": "Fisher, auto, m=2048",
    "SDI-Fisher, auto, m=256": "Fisher, auto, m=256",
    "SDI-Fisher, 1e-2": "Fisher, 1e-2",
    "SDI-Fisher, 1e-3": "Fisher, 1e-3",
    "SDI-Fisher blocks, auto": "blocks, auto",
    "SDI-Fisher blocks, 1e-3": "blocks, 1e-3",
    "SDI-Fisher of unit rows, 1e-2": "unit-norm train rows, Fisher 1e-2",
    "TRAK": "TRAK, one model",
    "random": "random",
}


def curvature() -> str:
    """LDS by method and problem, and the differences that are asked about."""
    results = {problem: load(f"curvature-{problem}.json") for problem in PROBLEMS}
    found = {problem: Evaluation.from_dict(result) for problem, result in results.items()}
    merits = {problem: {m.method: m for m in one.merits} for problem, one in found.items()}
    rows = [[label, *(str(merits[problem][name].lds) for problem in PROBLEMS)] for name, label in NAMED.items()]
    texts = ["LDS, means and 95 % intervals over seeds:", table(["method", *PROBLEMS], rows)]
    for problem, one in found.items():
        settings, of = results[problem]["settings"], merits[problem]
        plain, fisher = of["SDI, m=2048"], of["SDI-Fisher, auto"]
        texts.append(
            f"**{problem}**: {settings['seeds']} seeds, each with {settings['subsets']} retrainings on random halves, one "
            f"initialisation each. Seed by seed, Fisher with auto damping minus SDI: {one.difference('lds', 'SDI-Fisher, auto', 'SDI, m=2048')}; "
            f"minus TRAK: {one.difference('lds', 'SDI-Fisher, auto', 'TRAK')}. Rank correlation with the scores of untrained "
            f"weights: {fisher.randomization} (SDI: {plain.randomization}). Processor time of scoring: {fisher.seconds:.2f} s "
            f"(SDI: {plain.seconds:.2f} s). {source(f'curvature-{problem}.json', False, results[problem])}"
        )
    return "\n\n".join(texts)


PARTS: Parts = {"curvature": curvature}
