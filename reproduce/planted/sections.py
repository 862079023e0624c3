"""Sections of the report: what was done, and the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reproduce.base import Section
from reproduce.planted import measure
from reproduce.planted.analyse import DETECTORS
from reproduce.planted.config import Config, make_task
from reproduce.planted.figures import REGIMES
from reproduce.planted.planting import KINDS
from reproduce.planted.statistics import balanced_spearman_ceiling

Numbers = Mapping[str, Any]


def make_sections(numbers: Numbers, measures: Numbers, config: Config) -> Iterable[Section]:
    """The sections of the report.

    Args:
        numbers: findings by task.
        measures: of each definition over all planted queries: ``rank_biserial`` and ``spearman`` with intervals.
        config: of the run.
    """
    yield Section("Tasks and protocol", _protocol(numbers, config))
    yield Section("When does influence act?", _timing(numbers, config), ("timing",))
    yield Section("Planted examples", _critical(numbers, measures, config), ("critical", "trajectories"))
    yield Section("Wrong answers in the training set", _mislabelled(numbers, config), ("mislabelled",))
    yield Section("Retraining without the most influential examples", _retraining(numbers, config), ("retraining",))


def _protocol(numbers: Numbers, config: Config) -> str:
    rows = []
    for name, found in numbers.items():
        task = make_task(name, large=config.large)
        rows.append(
            (name, f"`{found['example']}`", task.tokens, task.steps, task.step_meaning, task.rule,
             f"{found['accuracy']['plain'][1]:.0%}")
        )  # fmt: skip
    total = config.examples + config.mislabelled + 2 * config.families * config.copies + config.rule_examples
    columns = ("task", "an input", "tokens", "steps", "a step …", "the rule is …", "plain queries solved")
    return f"""{_table(columns, rows)}

The model is one weight-tied bidirectional block (width {config.d_model}) with input injection, looped as often as
the algorithm has steps, and read out at every position. It is trained with AdamW for {config.train_steps} steps of
{config.batch_size} on the answer after the last loop step.

The training set has {total} examples: {config.examples} ordinary ones, {config.mislabelled} with the answer of
another input, {config.copies} copies each of {config.families} queries, {config.copies} copies each of
{config.families} other queries with a wrong answer, and {config.rule_examples} which are the only ones of a rule (a
rare token). What is critical for a query is what was planted for it: its copies (helpful), its copies with a wrong
answer (harmful), or all examples of the rule (helpful, for {config.rule_queries} queries that need it). Influence
is summed over {len(config.checkpoints)} checkpoints, weighted by their learning rates, on the parameters of the
loop body. There is one training run for each task: intervals do not show what another run would give.

The tasks, the model and the sizes are ours: the summary names copy, addition, sorting and parity, and nothing more.
The `paper` scale of this experiment is therefore no configuration of the paper's, only a larger one of ours."""


def _timing(numbers: Numbers, config: Config) -> str:
    rows = [
        (
            task,
            regime,
            truth,
            f"{one['answer_accuracy']:.0%}",
            *(_tested(one[f"{truth}_{name}"]) for name in ("correlation", "specific", "peak", "residual")),
        )
        for task, found in numbers.items()
        for regime, one in found["timing"].items()
        for truth in ("decoded", "known")
    ]
    columns = ("task", "trained on", "changes", "solved", "correlation", "same, other query", "peak", "residual")
    probes = [
        (task, regime, " ".join(f"{v:.2f}" for v in found["timing"][regime]["probe_answer"]),
         " ".join(f"{v:.2f}" for v in found["timing"][regime]["probe_state"]))
        for task, found in numbers.items() for regime in REGIMES
    ]  # fmt: skip
    return f"""For each task two models are trained on right answers only: one on the *answer* after the last step,
and one that is *taught* to show the algorithm's state after every step, so that it is known at which step a swap, a
carry or a copy is made. The energy of a held-out query at a step is the sum of |SDI| (D.3) over
{config.energy_examples} training examples, with exact gradients at the final weights; the query's loss is that of the
answer in both.

The state is decoded after every step by linear probes (one for each step, fitted on training examples): the answer
for models trained on the answer, the algorithm's state for taught ones. “Decoded” changes are positions whose
decoded value differs from the step before (step 1: from a probe on the embedded input); “known” changes are the
algorithm's.

{_table(columns, rows)}

Each cell: value / mean of the null (one-sided p). *Correlation*: Spearman over steps, mean over queries; null:
steps shuffled. *Same, other query*: the same, null: another query's changes, which keeps what all queries share,
such as energy that falls with the step. *Peak*: share of queries whose largest energy is at a step with the most
changes; null: steps shuffled. *Residual*: correlation of energy shares with changes after each step's mean over
queries is taken away; null: another query's changes. “–”: the changes do not vary.

Accuracy of the probes before the first and after each step:

{_table(("task", "trained on", "for the answer", "for the algorithm's state of the step"), probes)}"""


def _critical(numbers: Numbers, measures: Numbers, config: Config) -> str:
    copies = balanced_spearman_ceiling(config.copies, equal=True)
    rule = balanced_spearman_ceiling(config.rule_examples, equal=False)
    overall = [
        (
            name,
            interval_text(m["rank_biserial"]),
            interval_text(m["spearman"]),
            measure.DEFINITIONS.get(name, "as exact, TensorSketch"),
        )
        for name, m in measures.items()
    ]
    detail = [
        (task, name, *(f"{mean_of(found['critical'][name]['rank_biserial'][kind]):.2f}" for kind in KINDS))
        for task, found in numbers.items()
        for name in measures
    ]
    shares = next(iter(numbers.values()))["feature_share"]
    return f"""Every planted query, all tasks and kinds alike, with 95 % bootstrap intervals over queries:

{_table(("definition", "rank-biserial", "Spearman, balanced", "that is"), overall)}

The rank-biserial correlation is 2 AUC - 1 of critical against all other training examples. Spearman's coefficient
is also given, among a query's critical examples and as many random others; as half of that truth is tied, a perfect
ranking gives {copies:.2f} for {config.copies} copies and {rule:.2f} for {config.rule_examples} examples of a rule,
not 1. For copies with a wrong answer the sign of the scores is turned.

Summed over steps, SDI is TracIn on the loop body (eq. 6). “{measure.CLASSIC}” is computed here without any notion of
a step; the largest difference from “{measure.EXACT}”, over the largest score, is
{", ".join(f"{found['conservation']:.1e} ({task})" for task, found in numbers.items())}. A gap between the two can
only come from another definition of “classic TracIn”, or of the scalar made from an SDI trajectory; the table has
several of both.

Features of a sketch take {", ".join(f"{v:.1%} (m = {m})" for m, v in shares.items())} of the loop body's
parameters; the bodies are so small that the summary's 0.2 % cannot be met here.

By task:

{_table(("task", "definition", *KINDS), detail)}

The second figure shows mean trajectories (sketched): SDI of the planted examples by loop step of the query."""


def _mislabelled(numbers: Numbers, config: Config) -> str:
    rows = [
        (task, *(interval_text(found["mislabelled"][name]) for name in DETECTORS)) for task, found in numbers.items()
    ]
    return f"""{config.mislabelled} single examples with the answer of another input, against all examples with a
right answer (the rare ones included, which look odd, too). AUC with 95 % bootstrap intervals over examples:

{_table(("task", *DETECTORS.values()), rows)}

Right in the figure: self-influence of each loop step by itself, sum_k eta_k <phi_t(z), grad(z)>, exact."""


def _retraining(numbers: Numbers, config: Config) -> str:
    rows = []
    for task, found in numbers.items():
        one = found["retraining"]
        rows.append(
            (task, *(f"{interval_text(one[k], signed=True)} from {one[f'{k}_random_loss']:.2f}" for k in
                     ("rule", "poisoned", "plain")), *(f"{one['found'][k]:.0%}" for k in ("rule", "poisoned")))
        )  # fmt: skip
    columns = ("task", "rule queries", "poisoned queries", "plain queries", "rule found", "poison found")
    return f"""{config.removed} examples are taken away by sketched influence and the model is trained again with
{config.retrain_seeds} new seeds: the most helpful ones for the rule's queries together; for every poisoned query its
most harmful ones; the most helpful ones for the plain queries together. Given is the mean change of the queries'
loss, in nats, against removing as many random examples with the same seed (95 % bootstrap interval over seeds and
queries), and the loss after random removal. “Found” is the share of planted examples among those removed.

{_table(columns, rows)}"""


def mean_of(values: Sequence[float]) -> float:
    """Mean of a list."""
    return sum(values) / len(values)


def interval_text(found: Sequence[float], *, signed: bool = False) -> str:
    """``"0.50 [0.40, 0.60]"`` from (mean, low, high); with signs for differences."""
    value, low, high = found
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" if signed else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _tested(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['value']:.2f} / {found['null']:.2f} (p {found['p']:.2g})"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
