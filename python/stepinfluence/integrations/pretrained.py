"""Looped models of the Hugging Face format (ALBERT's shared layer, HRM-text's cycles) as projects for ``sdi``.

    pretrained = Pretrained("albert/albert-base-v2", data="data/{split}.jsonl")
    project = Project.of(pretrained, "albert")  # what sdi featurize --project takes, without a file
    project.body(project.model())              # the module that the loop enters at every step

``sdi init --hf albert/albert-base-v2 --data 'data/{split}.jsonl'`` writes a project file of a few lines around it.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.nn.functional as F
from huggingface_hub.constants import ENDPOINT
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models import auto

from stepinfluence.capture.discovery import find_loop
from stepinfluence.errors import BodyError, ProjectError

TASKS = {
    "masked-lm": ("MaskedLM", auto.AutoModelForMaskedLM),
    "causal-lm": ("CausalLM", auto.AutoModelForCausalLM),
    "classification": ("SequenceClassification", auto.AutoModelForSequenceClassification),
}
"""By task: how the architecture's name ends, and the class that loads it."""

IGNORED = -100
"""Label of a position that plays no part in the loss."""

Record = dict[str, Any]
Batch = dict[str, Tensor]


def hub_is_known() -> bool:
    """Whether the hub's name can be looked up from this machine, or a proxy would do so."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


class Pretrained:
    """A model folder or hub name with data in JSON lines, as the functions of a project.

    A line has ``text``; for classification ``label``, a class number; for causal language models optionally ``prompt``,
    whose tokens are read but not scored. ``id`` names it, and every other plain field is kept as metadata.

    The loss of an example is its mean cross-entropy in nats: over its masked tokens (the same ones each time, drawn by
    the seed and the text), over the tokens of its text but the first, or of its class.

    Args:
        name: folder with ``config.json``, or name on the hub. Code that a repository brings along is never run.
        data: path of the data with ``{split}`` in it, such as ``"data/{split}.jsonl"``.
        task: ``"masked-lm"``, ``"causal-lm"`` or ``"classification"``; by the architecture in the config if None.
        body: the loop body's name or names; found by running the model if None.
        max_length: longest input in tokens; the end of longer ones is cut off.
        mask_share: of an example's tokens that are masked, at least one.
        seed: of the masks.
        revision: on the hub.

    Raises:
        ProjectError: the model cannot be found, or its task cannot be told.
    """

    def __init__(
        self,
        name: str | Path,
        data: str,
        *,
        task: str | None = None,
        body: str | Sequence[str] | None = None,
        max_length: int = 128,
        mask_share: float = 0.15,
        seed: int = 0,
        revision: str | None = None,
    ) -> None:
        if "{split}" not in data:
            raise ProjectError(f"data: got {data!r}; pass a path with {{split}} in it, such as 'data/{{split}}.jsonl'")
        if not 0 < mask_share <= 1:
            raise ProjectError(f"mask_share: got {mask_share}; pass a share above 0, at most 1")
        self.name, self.data, self.revision = str(name), data, revision
        self.max_length, self.mask_share, self.seed = max_length, mask_share, seed
        self.config = self._load(AutoConfig)
        self.task = task or self._task()
        if self.task not in TASKS:
            raise ProjectError(f"task: got {task!r}; use one of {', '.join(TASKS)}")
        self.tokenizer = self._load(AutoTokenizer)
        self._body = body

    def _load(self, kind: Any, **options: Any) -> Any:
        offline = not Path(self.name).is_dir() and not hub_is_known()
        if offline:
            options["local_files_only"] = True  # or the hub's client tries for half a minute
        try:
            return kind.from_pretrained(self.name, revision=self.revision, trust_remote_code=False, **options)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if offline and isinstance(error, OSError):
                reason = "no such folder, nothing of it in the cache, and the hub cannot be reached from here"
            raise ProjectError(f"{self.name}: {kind.__name__} cannot load it: {reason}") from error

    def _task(self) -> str:
        named = [str(a) for a in getattr(self.config, "architectures", None) or []]
        for task, (ending, _) in TASKS.items():
            if any(a.endswith(f"For{ending}") for a in named):
                return task
        raise ProjectError(
            f"{self.name}: its config names {', '.join(named) or 'no architecture'}; say the task: {', '.join(TASKS)}"
        )

    # ------------------------------------------------------------------------------------------------------------
    # The functions of a project

    def model(self) -> nn.Module:
        """The model with its published weights, and gradients through all of its loop."""
        model: nn.Module = self._load(TASKS[self.task][1])
        for module in model.modules():
            cycles = getattr(module, "L_bp_cycles_padded", None)
            if isinstance(cycles, list):
                # HRM-text runs all but the last low cycles without gradients, to save memory in training. They would
                # count as steps without influence.
                cycles[:] = [self.config.L_cycles] * len(cycles)
        return model

    def body(self, model: nn.Module) -> str | list[str]:
        """Names of what is entered more than once in a forward pass.

        Raises:
            BodyError: nothing is: the model is not looped.
        """
        if self._body is not None:
            return self._body if isinstance(self._body, str) else list(self._body)
        tokens = torch.zeros(1, 4, dtype=torch.int64, device=next(model.parameters()).device)
        try:
            found = list(find_loop(model, lambda: model(**self._inputs({"input_ids": tokens}))))
        except BodyError as error:
            raise BodyError(f"{self.name}: {error}") from None
        return found[0] if len(found) == 1 else found

    def dataset(self, split: str) -> list[Record]:
        """The lines of a split's file.

        Raises:
            ProjectError: no such file, or a line is no record of the task (says which and why).
        """
        path = Path(self.data.format(split=split))
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ProjectError(f"{path}: cannot be read ({type(error).__name__}); data: {self.data}") from error
        return [self._record(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]

    def collate(self, examples: Sequence[Record]) -> Batch:
        """Padded token ids ``(B, T)``, attention mask, and labels ``(B, T)``, or ``(B,)`` for classes."""
        rows = [self._encode(example) for example in examples]
        longest = max(len(row[0]) for row in rows)
        pad = self.tokenizer.pad_token_id or 0

        def padded(at: int, filler: int) -> Tensor:
            return torch.tensor([[*row[at], *[filler] * (longest - len(row[at]))] for row in rows])

        batch = {"input_ids": padded(0, pad), "labels": padded(1, IGNORED), "attention_mask": padded(2, 0)}
        if self.task == "classification":
            batch["labels"] = torch.tensor([int(example["label"]) for example in examples])
        if getattr(self.config, "prefix_lm", False):
            batch["token_type_ids"] = padded(3, 0)
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses in nats, ``(B,)``."""
        if self.task == "classification":
            return F.cross_entropy(self._logits(model, batch), batch["labels"], reduction="none")
        return self.token_losses(model, batch).sum(1)

    def token_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """``(B, T)``: what each token adds to the loss; zero where it is not scored.

        Raises:
            ProjectError: the model classifies: its loss is not one of tokens.
        """
        if self.task == "classification":
            raise ProjectError(f"{self.name}: the loss of a classification is not one of tokens; ask without --tokens")
        logits, labels = self._logits(model, batch), batch["labels"]
        first = int(self.task == "causal-lm")  # nothing predicts the first token
        if first:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        return F.pad(losses / (labels != IGNORED).sum(1, keepdim=True), (first, 0))

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**self._inputs({k: v for k, v in batch.items() if k != "labels"})).logits
        return logits.float()

    def example_id(self, example: Record, index: int) -> str | int:
        """The record's ``id``, or its position."""
        value: str | int = example.get("id", index)
        return value

    def text(self, example: Record) -> str:
        """The record's text, after its prompt."""
        return f"{example.get('prompt', '')}{example['text']}"

    def metadata(self, example: Record) -> dict[str, str | int | float | bool | None]:
        """Plain fields other than text and id."""
        known = ("id", "text", "prompt")
        return {k: v for k, v in example.items() if k not in known and isinstance(v, str | int | float | bool | None)}

    def tokens(self, example: Record) -> list[str]:
        """Each token as the tokenizer writes it."""
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(self._encode(example)[0])]

    def from_json(self, fields: Any) -> Record:
        """A record from the fields of ``sdi query --input``.

        Raises:
            ProjectError: it is no record of the task.
        """
        return self._checked(fields, "input")

    def attach_options(self) -> dict[str, Any]:
        """Every entry of a body module is the next loop step, also where there are several modules."""
        return {"loop": "timeline"}

    # ------------------------------------------------------------------------------------------------------------

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        # A cache would carry state from one batch into the next steps of generation, which there is none of here.
        return {**batch, "use_cache": False} if self.task == "causal-lm" else dict(batch)

    def _record(self, line: str, place: str) -> Record:
        try:
            return self._checked(json.loads(line), place)
        except ValueError as error:
            raise ProjectError(f"{place}: no JSON ({error})") from error

    def _checked(self, fields: Any, place: str) -> Record:
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise ProjectError(f'{place}: no text in it; a record is an object such as {{"text": "..."}}')
        if self.task == "classification":
            label, count = fields.get("label"), self.config.num_labels
            if type(label) is not int or not 0 <= label < count:
                raise ProjectError(f"{place}: label is {label!r}; the model has the classes 0 to {count - 1}")
        ids, labels, _, _ = self._encode(fields)
        scored = labels[1:] if self.task == "causal-lm" else labels
        if not ids or (self.task != "classification" and all(label == IGNORED for label in scored)):
            raise ProjectError(f"{place}: has no token to predict within the first {self.max_length}")
        return fields

    def _encode(self, example: Record) -> tuple[list[int], list[int], list[int], list[int]]:
        """Token ids, labels, attention mask, and 1 for tokens of the prompt."""
        if self.task == "causal-lm":
            prompt = self._ids(example.get("prompt", ""))
            ids = [*prompt, *self._ids(example["text"])][: self.max_length]
            labels = [IGNORED if at < len(prompt) else token for at, token in enumerate(ids)]
            return ids, labels, [1] * len(ids), [int(at < len(prompt)) for at in range(len(ids))]
        ids = self.tokenizer(example["text"], truncation=True, max_length=self.max_length)["input_ids"]
        labels = [IGNORED] * len(ids)
        if self.task == "masked-lm":
            ids, labels = self._masked(list(ids), example["text"])
        return ids, labels, [1] * len(ids), [0] * len(ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _masked(self, ids: list[int], text: str) -> tuple[list[int], list[int]]:
        if self.tokenizer.mask_token_id is None:
            raise ProjectError(f"{self.name}: its tokenizer has no mask token; use another task")
        special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        places = [at for at, is_special in enumerate(special) if not is_special]
        # By the text, not by the position in the data: an example keeps its mask wherever it turns up.
        draw = random.Random(f"{self.seed} {text}")
        chosen = set(draw.sample(places, min(len(places), max(1, round(self.mask_share * len(places))))))
        labels = [token if at in chosen else IGNORED for at, token in enumerate(ids)]
        return [self.tokenizer.mask_token_id if at in chosen else token for at, token in enumerate(ids)], labels
