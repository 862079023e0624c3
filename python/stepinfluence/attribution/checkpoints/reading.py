"""Files and folders of checkpoints, as training frameworks leave them.

``.safetensors`` and its ``.index.json`` of shards; ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` files that
``torch.load(weights_only=True)`` accepts, and their index; folders with one of these by its usual name and
``optimizer.pt`` beside. Nothing in a file is run, and no file outside the folder of an index is opened.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepinfluence.attribution.border import border, reason, why
from stepinfluence.attribution.checkpoints.checkpoint import Checkpoint
from stepinfluence.attribution.checkpoints.claims import check_claims
from stepinfluence.attribution.checkpoints.optimizers import find_optimizer
from stepinfluence.errors import CheckpointError, StepInfluenceError
from stepinfluence.wrappers import canonical_name

PathLike: TypeAlias = str | Path
Reader: TypeAlias = Callable[[Path], Any]
"""A function of the user's: path to a state dict, or to a dict with ``model`` (and ``optimizer``)."""

MODEL_KEYS = ("model_state_dict", "model", "state_dict")
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin", "diffusion_pytorch_model.safetensors",
)  # fmt: skip
"""What folders call their weights, in the order in which they are looked for."""
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
STATE_FILE = "trainer_state.json"
"""What the Trainer of ``transformers`` keeps beside the weights."""
STATE_LIMIT = 1 << 30
COUNT_KEYS = ("step", "global_step")
"""Where files count the optimizer's updates."""
CONVERT = "torch.save({'model': obj.state_dict(), 'optimizer': opt.state_dict()}, 'converted.pt')"


def is_checkpoint(path: Path) -> bool:
    """Whether a path may be read as a checkpoint: a file, or a folder that holds one."""
    return path.is_file() or (path.is_dir() and (_weights_in(path) is not None or _foreign_folder(path) is not None))


def load_checkpoint(path: PathLike, *, reader: Reader | None = None) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        path: a file, an index of shards, or a folder that holds one of these (``optimizer.pt`` beside is read, too).
        reader: a function of yours that reads it instead, for any other format: it gets the path and returns a state
            dict, or a dict with ``model`` (and ``optimizer``, and ``step``, the updates made). Only then is anything
            run that is not this library's.

    Raises:
        CheckpointError: the file is missing, damaged, holds arbitrary pickled objects (named), or no model state.
    """
    path = Path(path)
    with border(f"{path}: not a readable checkpoint"):
        return _loaded(path, reader)


def _loaded(path: Path, reader: Reader | None) -> Checkpoint:
    if reader is not None:
        try:
            return _from_content(path, reader(path))
        except StepInfluenceError:
            raise
        except Exception as error:
            raise CheckpointError(f"{path}: the reader failed ({type(error).__name__}: {reason(error)})") from error
    weights, optimizer, updates = path, None, None
    if path.is_dir():
        found = _weights_in(path)
        if found is None:
            raise CheckpointError(f"{path}: {_foreign_folder(path) or _no_weights(path)}")
        weights = found
    if not weights.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint")
    if weights.name in WEIGHT_FILES:
        optimizer, updates = _optimizer_beside(weights.parent), _updates_beside(weights.parent)
    if weights.name.endswith(".index.json"):
        checkpoint = Checkpoint(path, _clean(_shards(weights)), optimizer, updates)
    elif weights.suffix == ".safetensors":
        checkpoint = Checkpoint(path, _clean(_safetensors(weights)), optimizer, updates)
    elif weights.suffix == ".json":
        raise CheckpointError(f"{path}: is JSON, which holds no weights; give the weights, or their .index.json")
    else:
        checkpoint = _from_content(path, _torch_file(weights))
        if checkpoint.optimizer is None and optimizer is not None:
            checkpoint = Checkpoint(path, checkpoint.model, optimizer, checkpoint.updates or updates)
    if not checkpoint.model:
        raise CheckpointError(f"{path}: no model state in it; it holds no tensor")
    return checkpoint


# ----------------------------------------------------------------------------------------------------------------
# Folders


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _foreign_folder(folder: Path) -> str | None:
    """What a folder of another format is, and how to make a file of it; None if it is none that is known."""
    if (folder / ".metadata").is_file():
        return (
            "is a torch.distributed.checkpoint folder, whose metadata are pickled; make one file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} converted.pt"
        )
    if (folder / "zero_to_fp32.py").is_file() or (folder / "latest").is_file():
        return (
            "is a DeepSpeed folder; make one file of it: python -m deepspeed.utils.zero_to_fp32 "
            f"{folder} converted (and pass etas)"
        )
    return None


def _no_weights(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    files = [name for name in names if Path(name).suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")]
    if files:
        return (
            f"is a folder, in which no file has a usual name ({', '.join(WEIGHT_FILES[:4])}); give the file that is "
            f"meant, such as {files[0]}"
        )
    return f"is a folder with no such file in it as {', '.join(WEIGHT_FILES)}; give the path of a checkpoint"


def _optimizer_beside(folder: Path) -> Mapping[str, Any] | None:
    path = next((folder / name for name in OPTIMIZER_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    content = _torch_file(path)
    found = find_optimizer({"optimizer": content})
    if found is None:
        raise CheckpointError(f"{path}: holds no optimizer's state dict; remove it, or give the weights' file and etas")
    return found


def _updates_beside(folder: Path) -> int | None:
    """The updates that ``trainer_state.json`` counts; None where there is none to be read."""
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < STATE_LIMIT else None
    except (OSError, ValueError, RecursionError):
        return None
    return _updates(content) if isinstance(content, Mapping) else None


def _updates(content: Mapping[Any, Any]) -> int | None:
    """The updates that a checkpoint counts, if it does."""
    for key in COUNT_KEYS:
        value = content.get(key)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index names, out of the files beside it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        places = content["weight_map"]
        wanted = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards ({type(error).__name__})") from error
    state: dict[str, Tensor] = {}
    for file in sorted(set(wanted.values())):
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise CheckpointError(f"{index}: names {file!r}, which is no file of its folder; shards lie beside it")
        path = index.parent / file
        if not path.is_file():
            raise CheckpointError(f"{index}: its shard {file} is missing; put all shards beside the index")
        held = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
        absent = [name for name, place in wanted.items() if place == file and name not in held]
        if absent:
            raise CheckpointError(f"{index}: {absent[0]} is not in {file}; the index is of other shards")
        state.update({name: held[name] for name, place in wanted.items() if place == file})
    return state


# ----------------------------------------------------------------------------------------------------------------
# Files


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({why(error)})") from error


def _torch_file(path: Path) -> Any:
    try:
        with border(f"{path}: not a readable PyTorch file"):
            check_claims(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds pickled Python objects{_foreign(path)}, which are not loaded because they can run code; if "
            f"you trust it, convert it once: {CONVERT}, or pass a reader of your own"
        ) from error
    except StepInfluenceError:
        raise
    except Exception as error:  # struct.error, AssertionError, MemoryError and more: torch trusts what it reads
        raise CheckpointError(f"{path}: not a readable PyTorch file ({why(error)})") from error


def _foreign(path: Path) -> str:
    """The kinds of objects in a file that are not loaded, found without loading them."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # whatever is wrong with the file has been said
        return ""
    return f" ({', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''})" if names else ""


def _from_content(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type(content).__name__}; save a state dict, or a dict with 'model'")
    optimizer, updates = find_optimizer(content), _updates(content)
    for key in MODEL_KEYS:
        if _is_state(content.get(key)):
            return Checkpoint(path, _clean(content[key]), optimizer, updates)
    if _is_state(content):
        return Checkpoint(path, _clean(content), None)
    others = [key for key, value in content.items() if _is_state(value)]
    if len(others) == 1:
        return Checkpoint(path, _clean(content[others[0]]), optimizer, updates)
    if others:
        raise CheckpointError(
            f"{path}: holds several models ({', '.join(map(repr, others[:4]))}); save the one that is meant under "
            f"one of {', '.join(MODEL_KEYS)}"
        )
    raise CheckpointError(
        f"{path}: no model state in it; save a state dict, or a dict with one of {', '.join(MODEL_KEYS)}"
    )


def _clean(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without wrapper components (``_orig_mod``) and without a leading ``module.`` common to all."""
    cleaned = {canonical_name(name): value for name, value in state.items()}
    if cleaned and all(name.startswith("module.") for name in cleaned):
        cleaned = {name.removeprefix("module."): value for name, value in cleaned.items()}
    return cleaned


def _is_state(value: object) -> bool:
    """Whether ``value`` is a state dict: tensors by name, and what modules add by ``get_extra_state``."""
    if not isinstance(value, Mapping) or not any(isinstance(v, Tensor) for v in value.values()):
        return False
    names: Sequence[Any] = [k for k, v in value.items() if not isinstance(v, Tensor)]
    return all(isinstance(k, str) for k in value) and all(k.endswith("_extra_state") for k in names)
