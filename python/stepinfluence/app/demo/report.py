"""The demonstration's result as a :class:`~stepinfluence.app.view.report.data.Report`."""

from __future__ import annotations

from stepinfluence.app.demo.data import CONSERVED, DemoResult
from stepinfluence.app.view.report.data import Accuracy, Check, QueryItem, Report, Stage, TrainItem, View
from stepinfluence.attribution.aggregation import FIRST_ORDER, SHARE, balanced
from stepinfluence.attribution.periods import SIGNIFICANT
from stepinfluence.models.parity_task import ParityExample

WORDS = ("even", "odd")
TRAINED = "trained checkpoints, each counting alike"
CURVATURE = {"fisher": "empirical Fisher", "block": "empirical Fisher of each parameter tensor"}


def percent(share: float) -> str:
    """``0.9997`` as ``99.9 %``, never rounded up to 100; the space does not break."""
    return "100\u00a0%" if share == 1 else f"{min(100 * share, 99.9):.1f}\u00a0%"


def answer(token: int) -> str:
    """A token that the model gave as an answer, in words."""
    return WORDS[token] if token < len(WORDS) else f"token {token}"


def bits(count: int) -> str:
    """``1 bit``, ``2 bits``."""
    return f"{count} bit{'s' if count != 1 else ''}"


def demo_report(result: DemoResult, *, command: str = "sdi demo") -> Report:
    """What ``sdi demo`` shows."""
    training = result.config.training
    top = training.max_digits
    steps = result.sdi.shape[2]
    etas = [f"{eta:.3g}" for eta in result.etas]
    first, *others = demo_views(result)
    return Report(
        title="Which training strings shaped the answer, and at which loop step?",
        lede=(
            "The task: is the number of ones in a bit string even or odd? A transformer block with "
            f"{result.body_parameters:,} parameters, applied once per bit, learned it from {result.n_trained:,} "
            f"strings of 1 to {top} bits. For each query below, {len(result.train)} of those strings were scored: how "
            f"much did training on each change the query’s loss, and through which of the {steps} loop steps?"
        ),
        train=[_train_item(e) for e in result.train],
        queries=[
            QueryItem(
                id=str(q.example.id),
                text=q.example.text,
                tokens=tuple(q.example.text),
                loss=q.loss,
                truth=WORDS[q.example.parity],
                prediction=answer(q.prediction),
                group="Alternating probes" if q.probe else f"Held-out strings of {bits(q.example.n_digits)}",
                note="" if not q.probe else f"probe of {bits(q.example.n_digits)}",
                read_step=q.example.n_digits,
                margin=q.margin,
            )
            for q in result.queries
        ],
        sdi=first.sdi,
        unit=first.unit,
        note=first.note,
        view=first.name,
        others=others,
        grouped_by="length",
        checkpoints=result.checkpoint_names,
        energy_by_checkpoint=result.energy_by_checkpoint,
        checks=demo_checks(result),
        stages=[Stage(s.name, s.seconds, s.cpu_seconds, s.peak_bytes) for s in result.stages],
        accuracy=[Accuracy(str(n), a) for n, a in result.accuracy.items()]
        + [Accuracy(str(n), a, trained=False) for n, a in result.accuracy_beyond.items()],
        accuracy_of="bits in the string",
        accuracy_note=f"Measured on {result.config.accuracy_strings} strings of each length that were held out from "
        "training; where no string of a length was left to hold out, on those of training.",
        method={
            "Architecture": f"looped transformer of the paper’s D.2, width {training.model.d_model}, "
            f"{training.model.n_heads} heads, {result.parameters:,} parameters; influence is measured on "
            f"the loop body’s {result.body_parameters:,}",
            "Training": f"AdamW, {result.optimizer_steps:,} steps of {training.batch_size} strings, length curriculum "
            f"{training.start_digits} to {top} bits, seed {training.seed}",
            "Checkpoints": ", ".join(f"{n} (η = {e})" for n, e in zip(result.checkpoint_names, etas, strict=True)),
            "Model": f"{result.checkpoint_names[result.chosen]}: the best, on {result.config.validation_strings} "
            f"validation strings of each of {', '.join(map(str, sorted(result.config.probe_lengths)))} bits, of the "
            "checkpoints from the end of the curriculum on",
            "Sum over checkpoints": aggregation_note(result),
            **_curvature(result),
            "Scored": f"{len(result.train)} training strings × {len(result.queries)} queries × {steps} loop steps",
            "Sketch": f"TensorSketch and CountSketch, m = {result.config.sketch_size} for each tensor, balanced "
            f"hashing, {result.feature_width:,} numbers per example and step, seed {result.config.seed}",
            "SDI": "test-step SDI at a checkpoint: ⟨gradient of the training example, step gradient of the query⟩",
            "Periods": f"stated where a permutation test (999 orders) gives p ≤ {SIGNIFICANT}",
            **{name: value for name, value in result.machine.items() if name != "load"},
            "Load": result.machine.get("load", "unknown"),
            "Versions": ", ".join(f"{n} {v}" for n, v in result.versions.items() if v != "not installed"),
        },
        command=command,
    )


def demo_views(result: DemoResult) -> tuple[View, ...]:
    """What the picker offers: the default, SDI added up likewise, each checkpoint alone, and the plain sum of all."""
    names = result.checkpoint_names
    corrected = result.config.curvature != "none"
    how = ", corrected for curvature" if corrected else ""
    plain = View(f"SDI (the paper’s), {TRAINED}", result.plain, SHARE, aggregation_note(result))
    first = View(f"corrected for curvature, {TRAINED}", result.sdi, SHARE, default_note(result))
    alone = tuple(
        View(
            f"{name} alone{how}",
            balanced(result.corrected_by_checkpoint[k : k + 1]),
            SHARE,
            f"One checkpoint, {'one of the best' if k in result.trained else 'made within the curriculum'}; "
            "all influence on the query there, regardless of sign, is 100 %.",
        )
        for k, name in reversed(list(enumerate(names)))
    )
    return (
        *((first, plain) if corrected else (plain,)),
        *alone,
        View(
            "SDI, plain sum over all, by learning rate",
            result.by_checkpoint.sum(0),
            FIRST_ORDER,
            "The paper’s sum over checkpoints (eq. 5), Σ η · ⟨gradient, step gradient⟩: slopes, not amounts of loss.",
        ),
    )


def default_note(result: DemoResult) -> str:
    """What the view that is shown first holds, and how it adds up checkpoints."""
    kind = CURVATURE.get(result.config.curvature)
    if kind is None:
        return aggregation_note(result)
    return f"SDI corrected for curvature by the {kind} of the scored strings. {aggregation_note(result)}"


def aggregation_note(result: DemoResult) -> str:
    """How a view of the trained checkpoints adds them up."""
    names = [result.checkpoint_names[k] for k in result.trained]
    which = f"Mean of the best {len(names)} checkpoints" if len(names) > 1 else "The best checkpoint"
    return (
        f"{which} from the end of the curriculum on ({', '.join(names)}), each scaled so that all influence on the "
        "query there, regardless of sign, is 100 %: no checkpoint can outweigh the others."
    )


def _curvature(result: DemoResult) -> dict[str, str]:
    """How the scores that are shown first were corrected; nothing if they were not."""
    kind = CURVATURE.get(result.config.curvature)
    if kind is None:
        return {}
    damping = ", ".join(f"{value:.0e}" for value in result.damping)
    return {
        "Curvature": f"⟨gradient of the training example, (F + λ)⁻¹ step gradient of the query⟩ with the {kind} "
        f"F of the {len(result.train)} scored examples at each checkpoint; λ relative to the largest eigenvalue "
        f"({damping}), chosen without retraining"
    }


def demo_checks(result: DemoResult) -> tuple[Check, ...]:
    """The figures that say whether the rest can be believed."""
    rows, columns, _ = result.exact
    asked = result.asked_lengths
    known = {**result.accuracy, **result.accuracy_beyond}
    return (
        Check(
            "Accuracy",
            percent(result.overall_accuracy),
            result.solved,
            f"right answers on strings of 1 to {result.config.training.max_digits} bits; lowest of the "
            f"queries’ lengths ({', '.join(map(str, asked))}): {percent(min(known[n] for n in asked))}",
            f"≥ {result.config.required_accuracy:.0%}" if result.config.required_accuracy else "none required here",
        ),
        Check(
            "Conservation error",
            f"{result.conservation:.1e}",
            result.conserved,
            "sum of the step sketches against the sketch of the whole gradient, relative to the norms added up",
            f"≤ {CONSERVED:.0e}",
        ),
        Check(
            "Sketch error",
            percent(result.sdi_error),
            True,
            f"SDI from sketches against exact gradients, relative, on {len(rows)} × {len(columns)} pairs",
        ),
        Check("Time", f"{sum(s.seconds for s in result.stages):.0f} s", True, "training, attribution and checks"),
    )


def _train_item(example: ParityExample) -> TrainItem:
    return TrainItem(str(example.id), example.text, WORDS[example.parity], bits(example.n_digits))
