"""A user's own model and data: a Python file with a few functions (``sdi init`` writes one that runs).

    model() -> nn.Module                 the model, with the weights to featurize at if no checkpoints are named
    dataset(split) -> map-style dataset  len(data) and data[i]; data[i] is one example, of any type
    loss(model, batch) -> (B,)           one loss per example
    body(model) -> module, name or list  what the loop applies at every step

and, if wanted, ``collate(examples)``, ``example_id(example, index)``, ``text(example)``, ``metadata(example)``,
``tokens(example)``, ``token_losses(model, batch)``, ``answer(model, batch)``, ``truth(example)``,
``from_json(fields)``, ``load_checkpoint(path)`` and ``attach_options()``; :class:`Project` has the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from stepinfluence.app.project_file import checked, describe, kind_of, run_file
from stepinfluence.capture.body.targets import Body
from stepinfluence.errors import ProjectError, StepInfluenceError

REQUIRED = {
    "model": "model() -> nn.Module",
    "dataset": "dataset(split) -> object with len(data) and data[i]",
    "loss": "loss(model, batch) -> Tensor of shape (B,), one loss per example",
    "body": "body(model) -> module, name of a module, or list of them",
}
OPTIONAL = {
    "collate": "collate(examples) -> batch",
    "example_id": "example_id(example, index) -> str or int",
    "text": "text(example) -> str",
    "metadata": "metadata(example) -> dict of str to str or number",
    "tokens": "tokens(example) -> list of str",
    "token_losses": "token_losses(model, batch) -> Tensor of shape (B, T), losses of tokens that add up to loss()",
    "answer": "answer(model, batch) -> list of str, the model's answer to each example",
    "truth": "truth(example) -> str, the right answer",
    "from_json": "from_json(fields) -> example",
    "load_checkpoint": "load_checkpoint(path) -> state dict, or dict with 'model' (and 'optimizer')",
    "attach_options": "attach_options() -> dict of keyword arguments of stepinfluence.attach",
}
FORBIDDEN_OPTIONS = {
    "body": "the function body(model)",
    "sketch_size": "sdi featurize --sketch-size",
    "hashing": "sdi featurize --hashing",
    "seed": "sdi featurize --seed",
    "layout": "sdi featurize --layout",
    "workspace": "sdi featurize --workspace",
    "preconditioner": "sdi featurize --metric",
}

MOST_TOKENS, TOKEN_CHARACTERS = 1 << 16, 1 << 24
"""Tokens of one example that a run keeps, and characters of them together."""

ANSWER_CHARACTERS = 10_000
"""Characters of an answer that are kept."""

Scalar: TypeAlias = str | int | float | bool | None
RowId: TypeAlias = str | int


class MapStyle(Protocol):
    """What ``dataset(split)`` returns: lists, tuples and every ``torch.utils.data.Dataset`` with a length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Project:
    """The functions of a project file, checked as they are called; made by :meth:`load` or :meth:`of`.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, functions: Mapping[str, Callable[..., Any]]) -> None:
        self.path = path
        self._functions = functions

    @classmethod
    def load(cls, path: str | Path) -> Project:
        """Run a project file and take its functions. The file's folder is on ``sys.path`` from then on.

        Raises:
            ProjectError: no such file, it raises an error, or a function is missing, not a function, or takes other
                arguments (says which, and what is expected).
        """
        path = Path(path)
        module = run_file(path)
        functions: dict[str, Callable[..., Any]] = {}
        missing = [name for name in REQUIRED if not hasattr(module, name)]
        if missing:
            expected = "; ".join(REQUIRED[name] for name in missing)
            raise ProjectError(f"{path}: defines no {', '.join(missing)}; add: {expected}")
        for name, signature in (REQUIRED | OPTIONAL).items():
            if hasattr(module, name):
                functions[name] = checked(path, name, getattr(module, name), signature)
        return cls(path, functions)

    @classmethod
    def of(cls, source: object, path: str | Path) -> Project:
        """The project whose functions are an object's methods, without a file.

        Args:
            source: has the functions as attributes, such as :class:`~stepinfluence.integrations.pretrained.Pretrained`.
            path: stands for the file in messages.

        Raises:
            ProjectError: a required function is missing.
        """
        path = Path(path)
        missing = [name for name in REQUIRED if not hasattr(source, name)]
        if missing:
            raise ProjectError(f"{path}: {type(source).__name__} has no {', '.join(missing)}; add them")
        return cls(path, {name: getattr(source, name) for name in REQUIRED | OPTIONAL if hasattr(source, name)})

    def has(self, name: str) -> bool:
        """Whether the file defines an optional function."""
        return name in self._functions

    def __repr__(self) -> str:
        return f"Project({str(self.path)!r})"

    @contextmanager
    def _named(self, name: str, arguments: str = "") -> Iterator[None]:
        """Turn whatever a function of the file raises into an error that names the function and the line."""
        try:
            yield
        except StepInfluenceError:
            raise
        except (Exception, SystemExit) as error:  # sys.exit() in it would end sdi as if all were well
            raise ProjectError(f"{self.path}: {name}({arguments}) failed: {describe(error, self.path)}") from error

    def _wrong(self, name: str, got: object) -> ProjectError:
        expected = (REQUIRED | OPTIONAL)[name]
        return ProjectError(f"{self.path}: {name}() returned {kind_of(got)}; expected {expected}")

    # ------------------------------------------------------------------------------------------------------------
    # Required functions

    def model(self, *, seed: int = 0) -> nn.Module:
        """The model. torch's random state is seeded with ``seed`` during the call and put back afterwards, so that
        several processes begin with the same random weights.

        Raises:
            ProjectError: the function failed, or returned no module.
        """
        with self._named("model"), torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._functions["model"]()
        if not isinstance(model, nn.Module):
            raise self._wrong("model", model)
        return model

    def dataset(self, split: str) -> MapStyle:
        """The examples of a split.

        Raises:
            ProjectError: the function failed (no such split), or returned something without length or indices.
        """
        with self._named("dataset", repr(split)):
            data = self._functions["dataset"](split)
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, Mapping | str):
            raise self._wrong("dataset", data)
        try:
            len(data)
        except TypeError as error:  # IterableDataset has __len__ in some forms, and raises
            raise self._wrong("dataset", data) from error
        return data  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Losses ``(B,)`` of a batch; checked by the capture, so whatever the function raises passes through."""
        return self._functions["loss"](model, batch)  # type: ignore[no-any-return]

    def body(self, model: nn.Module) -> Body:
        """The loop body.

        Raises:
            ProjectError: the function failed or returned something else.
        """
        with self._named("body"):
            body = self._functions["body"](model)
        parts = [body] if isinstance(body, nn.Module | str) else list(body) if isinstance(body, list | tuple) else []
        if not parts or not all(isinstance(part, nn.Module | str) for part in parts):
            raise self._wrong("body", body)
        return body  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------------------------
    # Optional functions

    def collate(self, examples: Sequence[Any]) -> Any:
        """A batch of examples; ``torch.utils.data.default_collate`` if the file does not say."""
        with self._named("collate"):
            collate: Callable[[Any], Any] = self._functions.get("collate", default_collate)
            return collate(list(examples))

    def example_id(self, example: Any, index: int) -> RowId:
        """Id of an example: its ``id`` (key or attribute) or its position, if the file does not say.

        Raises:
            ProjectError: neither text nor a whole number.
        """
        if "example_id" in self._functions:
            with self._named("example_id"):
                value = self._functions["example_id"](example, index)
        else:
            value = _field(example, "id")
            value = index if value is None else value
        value = _plain(value)
        if type(value) not in (str, int):
            raise self._wrong("example_id", value)
        return value  # type: ignore[no-any-return]

    def text(self, example: Any) -> str | None:
        """An example for people: its ``text`` (key or attribute) if the file does not say; None if there is none."""
        if "text" not in self._functions:
            value = _field(example, "text")
            return value if isinstance(value, str) else None
        with self._named("text"):
            value = self._functions["text"](example)
        if not isinstance(value, str | None):
            raise self._wrong("text", value)
        return value

    def metadata(self, example: Any) -> dict[str, Scalar]:
        """Further fields of an example, to filter and group by; none if the file does not say."""
        if "metadata" not in self._functions:
            return {}
        with self._named("metadata"):
            value = self._functions["metadata"](example)
        if not isinstance(value, Mapping):
            raise self._wrong("metadata", value)
        plain = {str(key): _plain(field) for key, field in value.items()}
        if not all(isinstance(field, str | int | float | bool | None) for field in plain.values()):
            raise self._wrong("metadata", next(f for f in plain.values() if not isinstance(f, Scalar)))
        return plain

    def tokens(self, example: Any) -> list[str] | None:
        """Text of each token of an example; None if the file does not say.

        Raises:
            ProjectError: the function failed, returned something else, or more than is kept of one example.
        """
        if "tokens" not in self._functions:
            return None
        with self._named("tokens"):
            value = self._functions["tokens"](example)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(t, str) for t in value):
            raise self._wrong("tokens", value)
        if len(value) > MOST_TOKENS or sum(map(len, value)) > TOKEN_CHARACTERS:
            raise ProjectError(
                f"{self.path}: tokens() returned {len(value):,} tokens of {sum(map(len, value)):,} characters; at most "
                f"{MOST_TOKENS:,} of {TOKEN_CHARACTERS:,} are kept of an example: return None for longer ones"
            )
        return list(value)

    def token_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Losses ``(B, T)`` of a batch by token, zero for tokens that are not predicted; they add up to :meth:`loss`.

        Raises:
            ProjectError: the file has no such function, it failed, or returned something else.
        """
        if "token_losses" not in self._functions:
            raise ProjectError(f"{self.path}: has no token_losses; add def {OPTIONAL['token_losses']}")
        with self._named("token_losses"):
            value = self._functions["token_losses"](model, batch)
        if not isinstance(value, Tensor) or value.dim() != 2:
            raise self._wrong("token_losses", value)
        return value

    def answers(self, model: nn.Module, batch: Any, count: int) -> list[str] | None:
        """The model's answer to each of a batch's ``count`` examples, at most :data:`ANSWER_CHARACTERS` of it; None if
        the file does not say.

        Raises:
            ProjectError: the function failed, or returned something else.
        """
        if "answer" not in self._functions:
            return None
        with self._named("answer"), torch.no_grad():
            value = self._functions["answer"](model, batch)
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise self._wrong("answer", value)
        if len(value) != count:
            raise ProjectError(f"{self.path}: answer() returned {len(value)} for {count} examples; return one for each")
        return [text[:ANSWER_CHARACTERS] for text in value]

    def truth(self, example: Any) -> str | None:
        """The right answer to an example, at most :data:`ANSWER_CHARACTERS` of it; None if the file does not say."""
        if "truth" not in self._functions:
            return None
        with self._named("truth"):
            value = self._functions["truth"](example)
        if not isinstance(value, str | None):
            raise self._wrong("truth", value)
        return None if value is None else value[:ANSWER_CHARACTERS]

    def from_json(self, fields: Any) -> Any:
        """An example from what a JSON file has for it (``sdi query --input``); itself if the file does not say."""
        if "from_json" not in self._functions:
            return fields
        with self._named("from_json"):
            return self._functions["from_json"](fields)

    @property
    def reader(self) -> Callable[[Path], Any] | None:
        """The file's own way to read a checkpoint; None if it has none."""
        return self._functions.get("load_checkpoint")

    def attach_options(self) -> dict[str, Any]:
        """Keyword arguments for :func:`stepinfluence.attach` that no command-line option is for (``loop``,
        ``outside``, ``batch_dim``, ``training``, ``verify``, ``route``).

        Raises:
            ProjectError: no dict, or with options that are set elsewhere.
        """
        if "attach_options" not in self._functions:
            return {}
        with self._named("attach_options"):
            value = self._functions["attach_options"]()
        if not isinstance(value, dict):
            raise self._wrong("attach_options", value)
        for name, place in FORBIDDEN_OPTIONS.items():
            if name in value:
                raise ProjectError(f"{self.path}: attach_options() sets {name}, which is set by {place}; leave it out")
        return value


def _field(example: Any, name: str) -> Any:
    return example.get(name) if isinstance(example, Mapping) else getattr(example, name, None)


def _plain(value: Any) -> Any:
    """A Python number of a number of numpy or torch."""
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        return value.item() if getattr(value, "ndim", 1) == 0 else value
    return value
