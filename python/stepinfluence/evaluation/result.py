"""What :func:`~stepinfluence.evaluation.evaluate` found: a figure for each method, with its spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from stepinfluence.evaluation.metrics import Estimate, over_seeds, share_over_seeds

COLUMNS = {
    "lds": "LDS",
    "loo": "LOO corr.",
    "mislabel": "mislabel AUC",
    "brittleness": "brittleness",
    "rise": "loss rise",
    "overlap": "top-10% overlap",
    "randomization": "randomisation",
}
CHANCE = {"lds": 0.0, "loo": 0.0, "mislabel": 0.5}
"""What scores without any information get; other figures have no such value."""


@dataclass(frozen=True)
class Figure:
    """A figure of merit over seeds.

    Attributes:
        value: mean over seeds.
        low, high: its 95 % interval over seeds: Student's t, ``len(by_seed) - 1`` degrees of freedom; of a share
            (brittleness) the exact binomial one.
        by_seed: the figure of each seed.
        within: each seed's own estimate, where it has one: 95 % by bootstrap over that run's queries (AUC: training
            examples). Narrower than the truth, as it knows a single run.
    """

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    within: tuple[Estimate, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[Estimate | float]) -> Figure:
        """From one estimate, or one number, a seed."""
        within = tuple(r for r in runs if isinstance(r, Estimate))
        values = tuple(r.value if isinstance(r, Estimate) else float(r) for r in runs)
        found = over_seeds(values)
        return cls(found.value, found.low, found.high, values, within)

    @classmethod
    def of_shares(cls, runs: Sequence[float]) -> Figure:
        """From one share, 0 to 1, a seed."""
        found = share_over_seeds(runs)
        return cls(found.value, found.low, found.high, tuple(runs))

    def says_other_than(self, value: float) -> bool:
        """Whether the interval leaves ``value`` out; False where there is no interval."""
        return self.low > value or self.high < value

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        known = {v for v in self.by_seed if not math.isnan(v)}
        if len(known) == 1 and self.low == self.high:  # an interval of no width would claim certainty
            return f"{self.value:.2f} (every seed)"
        if math.isnan(self.low):
            return f"{self.value:.2f}"
        return str(Estimate(self.value, self.low, self.high))


@dataclass(frozen=True)
class Merits:
    """Figures of one method.

    Attributes:
        method: its name.
        lds: linear datamodeling score.
        loo: leave-one-out correlation.
        mislabel: AUC of planted errors by self-influence; None where the method has none, or none was planted.
        brittleness: share of right answers, of those nearest to the border, that turn wrong when the most helpful fifth
            is left out of training.
        rise: how much the loss of these queries rises by that; None in results that were kept before it was asked.
        overlap: with exact TracIn: share of the most helpful tenth in common.
        randomization: rank correlation with the method's scores of untrained weights; 0 is best.
        seconds: processor seconds of scoring, mean over seeds.
        bytes_per_example: kept of each training example.
    """

    method: str
    lds: Figure
    loo: Figure
    mislabel: Figure | None
    brittleness: Figure | None
    rise: Figure | None
    overlap: Figure | None
    randomization: Figure
    seconds: float
    bytes_per_example: int

    def figure(self, name: str) -> Figure | None:
        """By its name in :data:`COLUMNS`."""
        found: Figure | None = getattr(self, name)
        return found


@dataclass(frozen=True)
class Truth:
    """How far what the scores are held against can be trusted; each a mean over seeds.

    Attributes:
        half_agreement: rank correlation, over the random halves, of a query's losses between two repeats; None with a
            single repeat, which cannot be held against another.
        loo_agreement: correlation, over the examples left out, of what leaving out does, between two repeats, or None.
        loo_change: mean absolute change of a query's loss when one example is left out, the initialisation the same.
        noise: mean absolute difference of a query's loss between two initialisations, the examples the same: between
            repeats, or, with a single one, between each seed and another (pairs share models then, and the interval
            takes them for independent).
    """

    half_agreement: Figure | None
    loo_agreement: Figure | None
    loo_change: Figure
    noise: Figure

    def markdown(self) -> str:
        """What leaving out moves, what another initialisation moves, and how far two of them agree."""
        moves = (
            f"Leaving out one example moves a query's loss by {self.loo_change} on average; "
            f"training on the same examples from another initialisation moves it by {self.noise}."
        )
        if self.loo_agreement is None or self.half_agreement is None:
            return f"{moves} With a single repeat it is not known how far two initialisations agree."
        agree = (
            f"Between two initialisations, the losses after training on halves agree with a rank correlation of "
            f"{self.half_agreement}, the effects of leaving out with a correlation of {self.loo_agreement}"
        )
        noise = "" if self.loo_agreement.low > 0 else ": not distinguishable from 0, so one run's effects are noise"
        return f"{moves} {agree}{noise}."


@dataclass(frozen=True)
class StepMerits:
    """Figures of the step-resolved scores.

    Attributes:
        conservation: relative difference between the summed step sketches and the sketch of the whole gradient; the
            largest of the seeds.
        counterfactual: correlation, for each query over training examples and steps, of SDI with the loss change that a
            small training step at one use of the weights alone really makes.
        slope: least-squares slope of the same; 1 where SDI predicts the size, too.
        natural: the correlation of SDI corrected for curvature with what a natural-gradient step at one use of the
            weights alone makes; None in results that were kept before it was tried.
        natural_slope: of the same.
    """

    conservation: float
    counterfactual: Figure
    slope: Figure
    natural: Figure | None = None
    natural_slope: Figure | None = None


@dataclass(frozen=True)
class Smoothness:
    """Metasmoothness (:mod:`~stepinfluence.evaluation.smoothness`): agreement of finite differences of the queries'
    losses by the examples' weights, -1 to 1.

    Attributes:
        across_steps: of central differences with a step and with twice the step.
        nearby: of differences on either side of the weights.
    """

    across_steps: Figure
    nearby: Figure

    def markdown(self) -> str:
        """Both figures, and what they mean."""
        return (
            f"Metasmoothness (do finite differences by the examples' weights agree in sign? 1: smooth, 0: chaotic): "
            f"{self.across_steps} across step sizes, {self.nearby} at nearby weights."
        )


@dataclass(frozen=True)
class Evaluation:
    """Everything :func:`~stepinfluence.evaluation.evaluate` found.

    Attributes:
        problem: its name.
        seeds: one independent run each.
        merits: of each method.
        steps: of the step-resolved scores.
        truth: of the retrainings; None with a single seed and repeat, which cannot be held against another.
        retrainings: models, the kept ones counted.
        training_seconds: processor seconds of training them all, when it was done.
        accuracy: share of right answers of the models trained on everything; None where nothing is right or wrong.
        asked: queries asked for the brittleness in each seed.
        repeats: initialisations that every retraining is averaged over.
        smoothness: of the training; None where it has no recipe.
        about: what a reader should know of the data.
        unable: methods that could not be run on this problem, and why.
    """

    problem: str
    seeds: tuple[int, ...]
    merits: tuple[Merits, ...]
    steps: StepMerits
    truth: Truth | None
    retrainings: int
    training_seconds: float
    accuracy: Figure | None
    asked: tuple[int, ...]
    repeats: int
    smoothness: Smoothness | None = None
    about: str = ""
    unable: Mapping[str, str] = field(default_factory=dict)

    def difference(self, figure: str, method: str, other: str) -> Figure:
        """How much better one method does than another in a figure: seed by seed, so that what both share cancels.

        Args:
            figure: a name of :data:`COLUMNS`.
            method, other: names of methods.

        Raises:
            ValueError: a name is not known, or a method lacks the figure.
        """
        if figure not in COLUMNS:
            raise ValueError(f"figure: got {figure!r}; use one of {', '.join(COLUMNS)}")
        by_name = {m.method: m.figure(figure) for m in self.merits}
        for name in (method, other):
            if by_name.get(name) is None:
                raise ValueError(f"method: {name!r} has no {figure} here; use one of {', '.join(by_name)}")
        a, b = by_name[method], by_name[other]
        return Figure.of([x - y for x, y in zip(a.by_seed, b.by_seed, strict=True)])  # type: ignore[union-attr]

    def markdown(self) -> str:
        """A table of the methods; what of it cannot be told from chance; the truth and its noise; the steps."""
        head = ("method", *COLUMNS.values(), "s", "B/example")
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for m in self.merits:
            cells = [m.method, *(self._cell(m, name) for name in COLUMNS)]
            lines.append("| " + " | ".join([*cells, f"{m.seconds:.2f}", str(m.bytes_per_example)]) + " |")
        s = self.steps
        by_step = (
            f"By step: conservation error {s.conservation:.1e} at most; correlation of SDI with what a training step "
            f"at one loop step alone does to the loss: {s.counterfactual}, slope {s.slope}."
        )
        if s.natural is not None:
            by_step += (
                " Of SDI corrected for curvature with what a natural-gradient step at one loop step alone does: "
                f"{s.natural}, slope {s.natural_slope}."
            )
        truth = [self.truth.markdown(), ""] if self.truth else []
        unable = [f"Could not be run: {name} ({why})." for name, why in self.unable.items()]
        smooth = [self.smoothness.markdown(), ""] if self.smoothness else []
        return "\n".join([*lines, "", *unable, *[""][: len(unable)], self.chance(), "", *truth, *smooth, by_step])

    def chance(self) -> str:
        """A sentence that names every figure whose interval over seeds has the value of chance in it."""
        if len(self.seeds) < 2:
            return "A single seed: no interval, and nothing to say of chance."
        parts = []
        for name, value in CHANCE.items():
            found = {m.method: m.figure(name) for m in self.merits}
            alike = [method for method, f in found.items() if f is not None and not f.says_other_than(value)]
            if alike:
                parts.append(f"{COLUMNS[name]} ({value:g}) of {', '.join(f'`{method}`' for method in alike)}")
        if not parts:
            return "Every LDS, LOO correlation and AUC is distinguishable from chance."
        return "Not distinguishable from chance: " + "; ".join(parts) + "."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what is not known is None."""
        return _plain(asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """From what :meth:`to_dict` gave: the figures of each seed; means and intervals are made from them again.

        Raises:
            KeyError: something is missing.
        """
        merits = []
        for m in data["merits"]:
            known = {"rise": None, **m}
            values: dict[str, Any] = {f.name: known[f.name] for f in fields(Merits)}
            values |= {name: _figure(known[name], share=name == "brittleness") for name in COLUMNS}
            merits.append(Merits(**values))
        steps, truth, smooth = data["steps"], data["truth"], data["smoothness"]
        return cls(
            problem=data["problem"],
            retrainings=data["retrainings"],
            training_seconds=data["training_seconds"],
            repeats=data["repeats"],
            seeds=tuple(data["seeds"]),
            merits=tuple(merits),
            steps=StepMerits(
                steps["conservation"],
                *(_known(steps[name]) for name in ("counterfactual", "slope")),
                *(_figure(steps.get(name)) for name in ("natural", "natural_slope")),
            ),
            truth=None
            if truth is None
            else Truth(
                half_agreement=_figure(truth["half_agreement"]),
                loo_agreement=_figure(truth["loo_agreement"]),
                loo_change=_known(truth["loo_change"]),
                noise=_known(truth["noise"]),
            ),
            accuracy=_figure(data["accuracy"]),
            asked=tuple(data["asked"]),
            smoothness=None if smooth is None else Smoothness(_known(smooth["across_steps"]), _known(smooth["nearby"])),
            about=data["about"],
            unable=data["unable"],
        )

    def _cell(self, merits: Merits, name: str) -> str:
        figure = merits.figure(name)
        if figure is None or math.isnan(figure.value):
            return "–"
        if name == "brittleness":
            known = [(v, n) for v, n in zip(figure.by_seed, self.asked, strict=True) if not math.isnan(v)]
            turned = sum(round(v * n) for v, n in known)
            return f"{figure} ({turned} of {sum(n for _, n in known)})"
        return str(figure)


def _known(data: Mapping[str, Any], *, share: bool = False) -> Figure:
    by_seed = [_number(v) for v in data["by_seed"]]
    if share:
        return Figure.of_shares(by_seed)
    within = [Estimate(*(_number(e[k]) for k in ("value", "low", "high"))) for e in data["within"]]
    return Figure.of(within or by_seed)


def _figure(data: Mapping[str, Any] | None, *, share: bool = False) -> Figure | None:
    return None if data is None else _known(data, share=share)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
