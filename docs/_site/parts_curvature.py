"""Figures of docs/curvature.md: the ladder, and what steps mean."""

# ruff: noqa: E501  # sentences of the page
from __future__ import annotations

from kept import Parts, load, source, table
from stepinfluence.evaluation import Evaluation, over_seeds

from bench import steps_removed as removed

LADDER = ("majority", "adder")
REMOVED = ("majority", "majority-metagradient", "adder", "adder-metagradient")


def ladder() -> str:
    """LDS of each rung on the queries that metagradients are asked, and how far one rung is above another."""
    results = {problem: load(f"ladder-{problem}.json") for problem in LADDER}
    found = {problem: Evaluation.from_dict(result) for problem, result in results.items()}
    merits = {problem: {m.method: m for m in one.merits} for problem, one in found.items()}
    rows = [[name, *(str(merits[p][name].lds) for p in LADDER)] for name in merits[LADDER[0]]]
    rows += [
        [
            f"{name}, minus SDI-Fisher, auto",
            *(str(found[p].difference("lds", name, "SDI-Fisher, auto")) for p in LADDER),
        ]
        for name in ("SOURCE", "metagradients, 8 queries")
    ]
    seconds = [[name, *(f"{merits[p][name].seconds:.1f}" for p in LADDER)] for name in merits[LADDER[0]]]
    texts = ["LDS over the same eight queries; means and 95 % intervals over seeds:", table(["method", *LADDER], rows)]
    texts += ["Processor seconds of scoring all 32 queries (metagradients: 8):", table(["method", *LADDER], seconds)]
    for problem, result in results.items():
        settings = result["settings"]
        smooth = found[problem].smoothness
        texts.append(
            f"**{problem}**: {settings['seeds']} seeds, each with {settings['subsets']} retrainings on random halves from the "
            f"scored model's initialisation. {smooth.markdown() if smooth else ''} {source(f'ladder-{problem}.json', False, result)}"
        )
    return "\n\n".join(texts)


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
    return "\n\n".join([table(head, rows), *texts])


PARTS: Parts = {"ladder": ladder, "steps-removed": steps_removed}
