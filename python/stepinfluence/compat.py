"""The published package's interface (``step-decomposed-influence``, imported as ``sdi``) on this project's capture.

Its users change one import::

    from stepinfluence.compat import CheckpointSpec, FullGradientTracInSDI, InfluenceOutputs, ProjectedTracInSDI

Names, arguments and result shapes are the published ones. Three things differ, each to the safe side: checkpoints
are read with ``weights_only=True``; hashing is balanced by default (``hashing="iid"`` gives the paper's); and
parameters are found by their use, so module types that the published package refuses work here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sdi_kernels import HashFamily
from stepinfluence.attribution.alignment import places_of, require_repeatable
from stepinfluence.attribution.checkpoints import load_checkpoint
from stepinfluence.capture import Capture, ExactCapture, LossFn, attach
from stepinfluence.capture.body.batches import infer_batch_size
from stepinfluence.capture.body.targets import body_parameters, canonical_name, unwrap
from stepinfluence.errors import BodyError, FeatureMismatchError, LossError
from stepinfluence.progress import tqdm

Modules: TypeAlias = nn.Module | Sequence[nn.Module]
LoadCheckpoint: TypeAlias = Callable[[str | Path], dict[str, Any]]
Mode: TypeAlias = Literal["sdi", "tracin"]


@dataclass(frozen=True)
class CheckpointSpec:
    """A checkpoint's path and its weight eta_k (None: the learning rate in its optimizer state, 1.0 if it has none)."""

    path: str | Path
    weight: float | None = None


@dataclass(frozen=True)
class InfluenceOutputs:
    """Influence summed over checkpoints.

    Attributes:
        sdi: ``(N_train, N_query, query steps)``, or None in ``mode="tracin"``.
        tracin: ``(N_train, N_query)``.
        sdi_matrix: ``(N_train, N_query, train steps, query steps)``, if asked for.
    """

    sdi: Tensor | None
    tracin: Tensor
    sdi_matrix: Tensor | None = None


@dataclass(frozen=True)
class FeatureSet:
    """Features per parameter: name -> ``(N, steps, m)`` sketched, ``(N, steps, *shape)`` in full."""

    phi: dict[str, Tensor]
    steps: int
    content: tuple[int, ...] = ()
    """A number per example made from what its batch held, to tell another order."""

    @property
    def n(self) -> int:
        return len(next(iter(self.phi.values())))


def default_load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The model's state (and the optimizer's, where there is one); see :func:`stepinfluence.load_checkpoint`.

    Raises:
        CheckpointError: as there.
    """
    checkpoint = load_checkpoint(path)
    content: dict[str, Any] = {"model_state_dict": dict(checkpoint.model)}
    if checkpoint.optimizer is not None:
        content["optimizer_state_dict"] = checkpoint.optimizer
    return content


def default_load_model_state_dict(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load the model's state out of a checkpoint's content."""
    state = next((checkpoint[key] for key in ("model_state_dict", "state_dict") if key in checkpoint), checkpoint)
    model.load_state_dict(dict(state))


def default_eta_from_checkpoint(checkpoint: Mapping[str, Any], *, fallback: float = 1.0) -> float:
    """The first parameter group's learning rate, or ``fallback`` where the checkpoint has none."""
    groups = checkpoint.get("optimizer_state_dict", {}).get("param_groups") or [{}]
    return float(groups[0].get("lr", fallback))


class _Estimator:
    """What the two estimators share: per-use step counting, scalar losses, the run over checkpoints."""

    _capture: Capture | ExactCapture

    def __init__(
        self,
        model: nn.Module,
        target_modules: Modules,
        loss_reduction: str,
        expected_steps: int | None,
        allow_mixed_steps: bool,
    ) -> None:
        if loss_reduction not in ("sum", "mean"):
            raise ValueError(f"loss_reduction: got {loss_reduction!r}; use 'sum' or 'mean'")
        self.model = model
        self._mean = loss_reduction == "mean"
        self._expected = expected_steps
        self._mixed = allow_mixed_steps
        chosen = [target_modules] if isinstance(target_modules, nn.Module) else list(target_modules)
        # The published package counts a step per call of the module that owns a parameter.
        self._owners = list(
            dict.fromkeys(
                owner
                for module in chosen
                for owner in module.modules()
                if any(p.requires_grad for p in owner.parameters(recurse=False))
            )
        )
        if not self._owners:
            raise BodyError("target_modules: no trainable parameter in them; pass the looped body")

    def close(self) -> None:
        """Nothing to undo: the model is untouched between calls."""

    def featurize_loader(self, *, loader: Iterable[Any], loss_fn: LossFn) -> FeatureSet:
        """Features of every example of a loader.

        ``loss_fn(model, batch)`` gives per-example losses ``(B,)``, or a scalar reduced as ``loss_reduction`` says.

        Raises:
            BodyError, LossError, LayoutError, UnsupportedUseError: as for ``Capture.featurize``; also steps other than
                ``expected_steps``, or different numbers of steps without ``allow_mixed_steps``.
        """
        capture = self._capture
        features = capture.featurize(loader, self._per_example(loss_fn), progress=False)
        counts = {
            canonical_name(name): len(capture.step_log.entries(owner))
            for owner in self._owners
            for name, parameter in capture.model.named_parameters()
            if any(parameter is held for held in owner.parameters(recurse=False))
        }
        slots, steps = self._slots(counts)
        phi = {}
        for block in features.space.blocks:
            columns = features.values[:, :, block.start : block.stop]
            placed = columns.new_zeros(len(columns), steps, columns.shape[2])
            first = slots[block.name]
            placed[:, first : first + counts[block.name]] = columns[:, : counts[block.name]]
            exact = features.space.kind == "exact"
            phi[block.name] = placed.unflatten(2, block.shape) if exact and block.shape else placed
        return FeatureSet(phi, steps, features.content)

    def _per_example(self, loss_fn: LossFn) -> LossFn:
        def losses(model: Any, batch: Any) -> Tensor:
            loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                return loss
            size = infer_batch_size(batch)
            if size is None:
                raise LossError("loss_fn: returned a scalar for a batch of unknown size; return (B,) losses")
            # Rows of activations tell the examples apart; only the sum of this vector matters.
            return (loss if self._mean else loss / size).expand(size)

        return losses

    def _slots(self, counts: Mapping[str, int]) -> tuple[dict[str, int], int]:
        """First step slot of each parameter, and the number of slots (prelude and read-out slots where needed)."""
        looped = max(counts.values())
        if self._expected is not None and looped != self._expected:
            raise BodyError(f"expected_steps: got {self._expected}, but the target modules were used {looped} times")
        if len(set(counts.values())) == 1:
            return dict.fromkeys(counts, 0), looped
        if not self._mixed:
            raise BodyError(
                f"target_modules: used {sorted(set(counts.values()))} times; pass only what the loop repeats, or "
                "allow_mixed_steps=True"
            )
        if not set(counts.values()) <= {1, looped}:
            raise BodyError(
                f"allow_mixed_steps: parameters may be used 1 or {looped} times, got {sorted(set(counts.values()))}"
            )
        log = self._capture.step_log
        order = {
            canonical_name(name): log.entries(owner)[0]
            for owner in self._owners
            for name, parameter in self._capture.model.named_parameters()
            if any(parameter is held for held in owner.parameters(recurse=False))
        }
        loop_start = min(order[name] for name, count in counts.items() if count == looped)
        before = {name for name, count in counts.items() if count == 1 and order[name] < loop_start}
        after = {name for name, count in counts.items() if count == 1} - before
        offset = int(bool(before))
        first = {n: offset + looped if n in after else (0 if n in before else offset) for n in counts}
        return first, offset + looped + int(bool(after))

    def influence_across_checkpoints(
        self,
        *,
        checkpoints: Sequence[CheckpointSpec],
        train_loader: Iterable[Any],
        query_loader: Iterable[Any],
        loss_fn: LossFn,
        mode: Mode = "sdi",
        with_step_matrix: bool = False,
        train_chunk_size: int | None = None,
        query_chunk_size: int | None = None,
        load_checkpoint_fn: LoadCheckpoint = default_load_checkpoint,
        load_model_state_dict_fn: Callable[[nn.Module, dict[str, Any]], None] = default_load_model_state_dict,
        eta_from_checkpoint_fn: Callable[[dict[str, Any]], float] = default_eta_from_checkpoint,
        progress: bool = False,
        progress_desc: str = "checkpoints",
    ) -> InfluenceOutputs:
        """Influence summed over checkpoints; the model keeps the last checkpoint's weights, as published.

        The chunk sizes bound the products' temporaries over training examples and queries.

        Raises:
            ValueError: no checkpoint, an unknown mode, or ``with_step_matrix`` without ``mode="sdi"``.
            FeatureMismatchError: a loader cannot be gone through again, or gives other examples or another order then.
            CheckpointError and the errors of :meth:`featurize_loader`.
        """
        if mode not in ("sdi", "tracin"):
            raise ValueError(f"mode: got {mode!r}; use 'sdi' or 'tracin'")
        if with_step_matrix and mode != "sdi":
            raise ValueError("with_step_matrix: needs mode='sdi'")
        if not checkpoints:
            raise ValueError("checkpoints: got none; pass at least one CheckpointSpec")
        if len(checkpoints) > 1:
            for side, loader in (("train_loader", train_loader), ("query_loader", query_loader)):
                require_repeatable(loader, side, has_ids=False)
        chunks = (train_chunk_size, query_chunk_size)
        totals: dict[str, Tensor] = {}
        orders: dict[str, tuple[int, ...]] = {}
        for spec in tqdm(checkpoints, desc=progress_desc, disable=not progress):
            content = load_checkpoint_fn(spec.path)
            load_model_state_dict_fn(self.model, content)
            self.model.eval()
            weight = spec.weight if spec.weight is not None else eta_from_checkpoint_fn(content)
            train = self.featurize_loader(loader=train_loader, loss_fn=loss_fn)
            query = self.featurize_loader(loader=query_loader, loss_fn=loss_fn)
            for side, found in (("train_loader", train), ("query_loader", query)):
                first = orders.setdefault(side, found.content)
                places_of(side, range(found.n), found.content, range(len(first) or found.n), first)
            wanted = {"sdi": "nd,qtd->nqt"} if mode == "sdi" else {"tracin": "nd,qd->nq"}
            if with_step_matrix:
                wanted["matrix"] = "nsd,qtd->nqst"
            for key, equation in wanted.items():
                product = weight * _contract(equation, train, query, chunks)
                totals[key] = totals[key] + product if key in totals else product
        sdi = totals.get("sdi")
        tracin = sdi.sum(2) if sdi is not None else totals["tracin"]
        return InfluenceOutputs(sdi, tracin, totals.get("matrix"))


def _contract(equation: str, train: FeatureSet, query: FeatureSet, chunks: tuple[int | None, int | None]) -> Tensor:
    """Sum over parameters of an einsum of their features, in chunks; sides without a step index are summed first."""
    if train.phi.keys() != query.phi.keys():
        raise FeatureMismatchError("query: features of other parameters than train's; use one estimator for both")
    left_has_steps, right_has_steps = "s" in equation, "t" in equation
    total: Tensor | None = None
    for name, left in train.phi.items():
        a, b = left.flatten(2), query.phi[name].flatten(2)
        a = a if left_has_steps else a.sum(1)
        b = b if right_has_steps else b.sum(1)
        rows = [
            torch.cat([torch.einsum(equation, part, other) for other in b.split(chunks[1] or max(1, len(b)))], 1)
            for part in a.split(chunks[0] or max(1, len(a)))
        ]
        total = torch.cat(rows) if total is None else total + torch.cat(rows)
    assert total is not None
    return total


class ProjectedTracInSDI(_Estimator):
    """Sketched SDI and TracIn: the published estimator of this name.

    Args:
        model, target_modules: the model and the module(s) whose trainable parameters are meant.
        projection_size: m, buckets per parameter.
        seed: of the hash tables.
        loss_reduction: how a scalar loss was reduced, ``"sum"`` or ``"mean"``.
        batch_first: False where dimension 1 holds the examples.
        expected_steps, allow_mixed_steps: as published: check the number of uses; put parameters used once into a
            prelude or read-out slot.
        strict: kept for compatibility; what cannot be captured is always refused.
        hashing: ``"balanced"`` or ``"iid"``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        target_modules: Modules,
        projection_size: int = 2048,
        seed: int = 0,
        loss_reduction: str = "sum",
        batch_first: bool = True,
        expected_steps: int | None = None,
        allow_mixed_steps: bool = False,
        strict: bool = True,
        hashing: HashFamily = "balanced",
    ) -> None:
        super().__init__(model, target_modules, loss_reduction, expected_steps, allow_mixed_steps)
        self._capture = attach(
            model,
            body=self._owners,
            # Given by name, m columns are m columns, for short vectors, too.
            sketch_size=dict.fromkeys(body_parameters(unwrap(model), self._owners), projection_size),
            hashing=hashing,
            seed=seed,
            batch_dim=0 if batch_first else 1,
            verify=False,  # a scalar loss cannot be weighted per example
        )
        self._capture.reduced_loss = True


class FullGradientTracInSDI(_Estimator):
    """Exact SDI and TracIn from full per-example gradients: the published estimator of this name.

    Arguments as for :class:`ProjectedTracInSDI`; the loss must be per example ``(B,)``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        target_modules: Modules,
        loss_reduction: str = "sum",
        batch_first: bool = True,
        expected_steps: int | None = None,
        allow_mixed_steps: bool = False,
        strict: bool = True,
    ) -> None:
        super().__init__(model, target_modules, loss_reduction, expected_steps, allow_mixed_steps)
        self._capture = ExactCapture(model, body=self._owners, batch_dim=0 if batch_first else 1)

    def _per_example(self, loss_fn: LossFn) -> LossFn:
        def losses(model: Any, batch: Any) -> Tensor:
            loss = loss_fn(model, batch)
            if isinstance(loss, Tensor) and loss.dim() == 0:
                raise LossError("loss_fn: returned a scalar; exact gradients need one loss per example, (B,)")
            return loss

        return losses
