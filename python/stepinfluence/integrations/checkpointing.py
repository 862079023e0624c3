"""Checkpoints for influence, whatever the training loop: weights, learning rate, second moments, loop counts.

A file holds what :func:`stepinfluence.load_checkpoint` reads: ``model``, ``optimizer`` (``param_groups`` with names and
learning rates; of the state only second moments, as first moments play no part in influence), and ``step`` and
``loop_counts`` beside them.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepinfluence.errors import CheckpointError
from stepinfluence.files import save_torch, write_atomically
from stepinfluence.wrappers import canonical_name, unwrap

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col")
"""Keys of an optimizer's state that influence under its metric is made of; ``step`` is kept with them."""

NAME = re.compile(r"step-(\d+)\.pt")


class Schedule:
    """At which optimizer steps (1-based) to save; the last step of a training is always one of them.

    Args:
        every: every so many steps.
        at: these steps.
        count: so many, evenly over the training.

    Raises:
        ValueError: not exactly one of them, or not positive.
    """

    def __init__(self, *, every: int | None = None, at: Iterable[int] | None = None, count: int | None = None) -> None:
        self.every, self.at, self.count = every, None if at is None else frozenset(at), count
        if sum(given is not None for given in (every, self.at, count)) != 1:
            raise ValueError("every, at, count: pass exactly one of them: every=500, at=[100, 1000], or count=10")
        values = [*(self.at or ()), *(v for v in (every, count) if v is not None)]
        if not values or any(type(v) is not int or v < 1 for v in values):
            raise ValueError(f"every, at, count: got {values}; pass positive numbers of optimizer steps")

    def due(self, step: int, total: int | None) -> bool:
        """Whether to save after optimizer step ``step`` of ``total`` (None if that is not known beforehand).

        Raises:
            ValueError: ``count`` was given, but the total is not known.
        """
        if step == total:
            return True
        if self.at is not None:
            return step in self.at
        if self.every is not None:
            return step % self.every == 0
        assert self.count is not None
        if total is None:
            raise ValueError(f"count: got {self.count}, but the training does not tell its length; pass every= or at=")
        return step * self.count // total > (step - 1) * self.count // total


class LoopCounter:
    """Counts how many loop steps the forward passes of a training run, for models that draw the number at random.

    Evaluation does not count, nor does what is run again in the backward pass (activation checkpointing).

    Args:
        model: the model.
        body: the loop body: module, name, or several.

    Raises:
        ValueError: the model has no such module.
    """

    def __init__(self, model: nn.Module, body: nn.Module | str | Sequence[nn.Module | str]) -> None:
        parts = [body] if isinstance(body, nn.Module | str) else list(body)
        modules = dict(unwrap(model).named_modules())
        unknown = next((p for p in parts if isinstance(p, str) and p not in modules), None)
        if unknown is not None or not parts:
            raise ValueError(f"body: the model has no module {unknown!r}; pass names as model.named_modules() has them")
        self._counts: Counter[int] = Counter()
        self._entered: int | None = None  # None outside of a forward pass that counts
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end),
        ]
        for part in parts:
            module = modules[part] if isinstance(part, str) else part
            self._handles.append(module.register_forward_pre_hook(self._enter))

    def _begin(self, model: nn.Module, _: Any) -> None:
        self._entered = 0 if model.training else None

    def _enter(self, *_: Any) -> None:
        if self._entered is not None:
            self._entered += 1

    def _end(self, *_: Any) -> None:
        if self._entered is not None:
            self._counts[self._entered] += 1
            self._entered = None

    def take(self) -> dict[int, int]:
        """Forward passes by number of loop steps since the last call."""
        counts, self._counts = dict(sorted(self._counts.items())), Counter()
        return counts

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


class Saver:
    """Writes ``step-<number>.pt`` files into a folder, each at once or not at all.

    Args:
        folder: made if missing.
        second_moments: whether to save them; without, files are as large as the model, and serve the plain metric only.

    Attributes:
        paths: what was written.
        seconds: wall-clock time spent writing.
        bytes: written.
    """

    def __init__(self, folder: str | Path, *, second_moments: bool = True) -> None:
        self.folder, self.second_moments = Path(folder), second_moments
        self.paths: list[Path] = []
        self.seconds = 0.0
        self.bytes = 0

    def begin(self, step: int) -> None:
        """Check the folder before a training that begins (or goes on) after optimizer step ``step``.

        Raises:
            CheckpointError: it holds checkpoints of later steps, of another run: a pattern would mix them with ours.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        later = [p.name for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name)) and int(m[1]) > step]
        if later:
            raise CheckpointError(
                f"folder: {self.folder} holds {len(later)} checkpoint(s) of another run, such as {min(later)}, beyond "
                f"step {step} where this one begins; remove them, or choose another folder"
            )

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rates: Sequence[float] | None = None,
        loop_counts: Mapping[int, int] | None = None,
    ) -> Path:
        """Write one checkpoint.

        Args:
            step: optimizer steps done, from 1.
            model: whose weights; parameters of the optimizer that are not this model's are left out.
            optimizer: its parameter groups tell the learning rates.
            rates: learning rate of each parameter group, where a scheduler has already moved on.
            loop_counts: as :meth:`LoopCounter.take` gives them.

        Raises:
            CheckpointError: the weights are spread over several devices.
            StoreError: the file could not be written; none is there then.
        """
        began = time.perf_counter()
        model = unwrap(model)
        names = {id(p): canonical_name(name) for name, p in model.named_parameters()}
        _require_whole(model)
        content = {
            "model": {canonical_name(name): value for name, value in model.state_dict().items()},
            "optimizer": self._optimizer(optimizer, names, rates),
            "step": step,
            "loop_counts": dict(loop_counts or {}),
        }
        path = self.folder / f"step-{step:07d}.pt"
        write_atomically(path, lambda aside: save_torch(content, aside))
        self.paths.append(path)
        self.bytes += path.stat().st_size
        self.seconds += time.perf_counter() - began
        return path

    def _optimizer(
        self, optimizer: torch.optim.Optimizer, names: Mapping[int, str], rates: Sequence[float] | None
    ) -> dict[str, Any]:
        groups, states = [], {}
        place = 0
        for number, group in enumerate(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in names]
            if not own:
                continue
            options = {k: _plain(v) for k, v in group.items() if k not in ("params", "param_names")}
            options = {k: v for k, v in options.items() if v is not _UNKNOWN}
            if rates is not None:
                options["lr"] = float(rates[number])
            keys = list(range(place, place + len(own)))
            groups.append({**options, "params": keys, "param_names": [names[id(p)] for p in own]})
            place += len(own)
            if self.second_moments:
                states.update(
                    {key: self._moments(optimizer.state.get(p, {})) for key, p in zip(keys, own, strict=True)}
                )
        return {"state": {key: state for key, state in states.items() if state}, "param_groups": groups}

    def _moments(self, state: Mapping[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in state.items() if k in SECOND_MOMENTS and isinstance(v, Tensor)}
        if not kept and any(isinstance(v, Tensor) and v.dim() for k, v in state.items() if k not in _FIRST_MOMENTS):
            warnings.warn(
                f"optimizer: its state ({', '.join(map(str, state))}) has no second moments that are known; "
                "checkpoints serve the plain metric only (pass second_moments=False to say so)",
                stacklevel=2,
            )
        # A copy: a view would be saved with all of the storage that it is a part of.
        return {**{k: v.detach().clone() for k, v in kept.items()}, "step": _number(state.get("step"))} if kept else {}


_FIRST_MOMENTS = ("step", "exp_avg", "momentum_buffer")
_UNKNOWN = object()


def _plain(value: Any) -> Any:
    """What ``torch.load(weights_only=True)`` reads, or _UNKNOWN."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else _UNKNOWN
    if isinstance(value, list | tuple):
        parts = [_plain(v) for v in value]
        return _UNKNOWN if any(p is _UNKNOWN for p in parts) else type(value)(parts)
    return value if isinstance(value, int | float | str | bool | None) else _UNKNOWN


def _number(step: Any) -> float:
    return float(step.item() if isinstance(step, Tensor) else step or 0)


def _require_whole(model: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or type(parameter).__name__ == "FlatParameter":
            raise CheckpointError(
                f"model: parameter {name} is spread over devices (FSDP, DeepSpeed ZeRO-3, tensor parallel); save with "
                "the framework's own checkpoints and gather them into one file afterwards"
            )


def read_loop_counts(path: str | Path) -> dict[int, int]:
    """Forward passes by number of loop steps between a checkpoint and the one before it.

    Raises:
        CheckpointError: not a checkpoint of :class:`Saver`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return dict(content["loop_counts"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no loop counts ({type(error).__name__})") from error
