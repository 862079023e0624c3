"""Errors a user can act on. Each message is one line: what is wrong, what came, how to mend it."""

from __future__ import annotations


class StepInfluenceError(ValueError):
    """Base class of the errors below; a ``ValueError``, so existing handlers keep working."""

    def __str__(self) -> str:
        """The message: one line whatever is named in it, since names come from files of others."""
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    """A character that is no printable one: a space for white space that ends or moves lines, others as they are
    written in Python."""
    if character.isspace():
        return " " if character in _BREAKS else character
    return ascii(character)[1:-1]


_BREAKS = frozenset("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029")


class BodyError(StepInfluenceError):
    """The loop body, its parameters or its steps are not as they must be."""


class UnsupportedUseError(StepInfluenceError):
    """A body parameter is used in a way whose per-example gradient cannot be captured."""


class LossError(StepInfluenceError):
    """The per-example loss has a wrong shape, no gradient, or values that are not finite."""


class LossFunctionError(LossError):
    """The loss function returns something of a wrong kind or shape, for whichever examples."""


class ExampleLossError(LossError):
    """The losses or gradients of some examples, which are named, are not finite."""


class LayoutError(StepInfluenceError):
    """The examples of a batch cannot be told apart, or influence one another."""


class FeatureMismatchError(StepInfluenceError):
    """Features that cannot be compared: different sketches, parameters or weights."""


class CheckpointError(StepInfluenceError):
    """A checkpoint that cannot be read safely or does not fit the model."""


class StoreError(StepInfluenceError):
    """A feature store that is damaged, incomplete, or not the one that is meant."""


class ProjectError(StepInfluenceError):
    """A project file that cannot be run, or a function of it that does not do what is expected of it."""


class ConfigError(StepInfluenceError):
    """A configuration with unknown keys, values of a wrong type, or settings that contradict one another."""
