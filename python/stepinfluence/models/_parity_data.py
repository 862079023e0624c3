"""Parity data (paper D.2): bit strings with ids and readable text, batches, probes, accuracy by length."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepinfluence.arguments import non_negative_int, positive_int
from stepinfluence.models.parity import ParityTransformer

EQUALS = 2
"""Token id of "=", which follows the bits; the answer is read there."""
PADDING = 3
"""Token id of the padding after "="."""
IGNORED = 5
"""Label at every position but the answer; those positions are masked out of the loss."""


@dataclass(frozen=True)
class ParityExample:
    """One bit string.

    Attributes:
        id: number of the example within its set, from 0.
        bits: the string, for instance ``"0110101"``.

    Raises:
        ValueError: ``bits`` is empty or holds anything but 0 and 1.
    """

    id: int
    bits: str

    def __post_init__(self) -> None:
        if not self.bits or set(self.bits) - {"0", "1"}:
            raise ValueError(f"bits: got {self.bits!r}; pass a non-empty string of 0 and 1")

    @property
    def n_digits(self) -> int:
        """Number of bits, which is also the loop step after which the model is read (1-indexed)."""
        return len(self.bits)

    @property
    def parity(self) -> int:
        """1 where the number of ones is odd, else 0."""
        return self.bits.count("1") % 2

    @property
    def text(self) -> str:
        """What the model reads, for people: ``"0110101="``."""
        return f"{self.bits}="


def make_train_set(max_digits: int, per_length: int, *, seed: int = 0) -> list[ParityExample]:
    """A fixed, finite training set: distinct random strings of every length, shortest first.

    Args:
        max_digits: longest string, in bits.
        per_length: strings of each length; all of them where there are no more than that.
        seed: the same seed gives the same set on every machine.

    Returns:
        Examples with ids 0, 1, ... in order of length.

    Raises:
        TypeError, ValueError: an argument that is not a positive int (``seed``: non-negative).
    """
    lengths = range(1, positive_int("max_digits", max_digits) + 1)
    return _number(_distinct_strings(lengths, per_length, seed, exclude=frozenset()))


def make_heldout_set(
    lengths: Iterable[int], per_length: int, *, exclude: Iterable[ParityExample], seed: int = 1
) -> list[ParityExample]:
    """Distinct random strings of the given lengths that are not among ``exclude``.

    Args:
        lengths: lengths in bits.
        per_length: strings of each length, or as many as are left. A length of which ``exclude`` holds every
            string has nothing to hold out, and is missing from the result.
        exclude: examples that must not come back, for instance the training set.
        seed: the same seed gives the same set on every machine.

    Returns:
        Examples with ids 0, 1, ... in the order of ``lengths``.

    Raises:
        TypeError, ValueError: an argument that is not a positive int (``seed``: non-negative).
    """
    known = frozenset(example.bits for example in exclude)
    return _number(_distinct_strings(lengths, per_length, seed, exclude=known))


def alternating_probes(n_digits: int) -> list[ParityExample]:
    """The paper's two probes of a length: ``0101...`` (id 0) and ``1010...`` (id 1)."""
    n_digits = positive_int("n_digits", n_digits)
    return _number(("01" * n_digits)[start : start + n_digits] for start in (0, 1))


def influence_subset(
    examples: Sequence[ParityExample], *, per_tercile: int = 128, longest: int = 128, seed: int = 0
) -> list[ParityExample]:
    """Subsample a training set as the paper does (D.2): some from each tercile of the length, and some
    longest.

    Args:
        examples: the training set.
        per_tercile: examples drawn from each third of the examples ordered by length (fewer if it has fewer).
        longest: further examples of exactly the greatest length (fewer if there are fewer).
        seed: of the draw.

    Returns:
        Distinct examples, with the ids they have in ``examples``, in increasing length and id.

    Raises:
        ValueError: ``examples`` is empty, or a count is negative.
    """
    if not examples:
        raise ValueError("examples: got none; pass a training set")
    per_tercile, longest = non_negative_int("per_tercile", per_tercile), non_negative_int("longest", longest)
    generator = torch.Generator().manual_seed(non_negative_int("seed", seed))

    def draw(pool: Sequence[ParityExample], count: int) -> list[ParityExample]:
        return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]

    ordered = sorted(examples, key=lambda example: (example.n_digits, example.id))
    cuts = [len(ordered) * third // 3 for third in range(4)]
    chosen = [e for low, high in itertools.pairwise(cuts) for e in draw(ordered[low:high], per_tercile)]
    taken = set(chosen)
    chosen += draw([e for e in ordered if e.n_digits == ordered[-1].n_digits and e not in taken], longest)
    return sorted(chosen, key=lambda example: (example.n_digits, example.id))


def collate(examples: Sequence[ParityExample], *, length: int | None = None) -> dict[str, Tensor]:
    """Pack examples into a batch, padded to a common length.

    Args:
        examples: strings of any lengths.
        length: tokens ``T`` to pad to, which is also the number of loop steps that the model then runs; by
            default n + 2 for the longest string, as in the paper.

    Returns:
        ``tokens`` int64 ``(B, T)``: bits, "=", padding. ``labels`` int64 ``(B, T)``: the parity at "=", else
        :data:`IGNORED`. ``mask`` bool ``(B, T)``: True at "=". ``read_step`` int64 ``(B,)``: the number of
        bits, which is both the loop step to read (1-indexed) and the position of "=" (0-indexed). ``ids``
        int64 ``(B,)``.

    Raises:
        ValueError: no examples, or ``length`` too short for the longest.
    """
    if not examples:
        raise ValueError("examples: got none; pass at least one")
    longest = max(example.n_digits for example in examples)
    length = longest + 2 if length is None else positive_int("length", length)
    if length < longest + 1:
        raise ValueError(
            f"length: got {length}, but the longest string has {longest} bits and '='; pass at least {longest + 1}"
        )
    tokens = torch.full((len(examples), length), PADDING)
    for row, example in zip(tokens, examples, strict=True):
        row[: example.n_digits + 1] = torch.tensor([*map(int, example.bits), EQUALS])
    mask = tokens == EQUALS
    labels = torch.full_like(tokens, IGNORED)
    labels[mask] = torch.tensor([example.parity for example in examples])
    return {
        "tokens": tokens,
        "labels": labels,
        "mask": mask,
        "read_step": torch.tensor([example.n_digits for example in examples]),
        "ids": torch.tensor([example.id for example in examples]),
    }


@torch.no_grad()
def accuracy_by_length(
    model: ParityTransformer, examples: Sequence[ParityExample], *, batch_size: int = 256
) -> dict[int, float]:
    """Share of right answers for each length; an answer is the arg max over the whole vocabulary.

    Args:
        model: the model, on any device.
        examples: strings of any lengths.
        batch_size: examples per forward pass, all of one length.

    Returns:
        ``{n_digits: accuracy in 0 .. 1}``, in increasing length.

    Raises:
        TypeError, ValueError: ``batch_size`` is not a positive int.
    """
    batch_size = positive_int("batch_size", batch_size)
    device = next(model.parameters()).device
    by_length: dict[int, list[ParityExample]] = defaultdict(list)
    for example in examples:
        by_length[example.n_digits].append(example)
    accuracy = {}
    for n_digits, group in sorted(by_length.items()):
        right = 0
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            batch = {name: value.to(device) for name, value in collate(part).items()}
            answers = model.answer_logits(batch["tokens"], batch["read_step"]).argmax(-1)
            right += int((answers == batch["labels"][batch["mask"]]).sum())
        accuracy[n_digits] = right / len(group)
    return accuracy


def _number(strings: Iterable[str]) -> list[ParityExample]:
    return [ParityExample(number, bits) for number, bits in enumerate(strings)]


def _distinct_strings(lengths: Iterable[int], per_length: int, seed: int, exclude: frozenset[str]) -> Iterable[str]:
    per_length = positive_int("per_length", per_length)
    generator = torch.Generator().manual_seed(non_negative_int("seed", seed))
    for n_digits in lengths:
        n_digits = positive_int("lengths", n_digits)
        excluded = sum(1 for bits in exclude if len(bits) == n_digits)
        wanted = min(per_length, 2**n_digits - excluded)
        if wanted * 2 >= 2**n_digits - excluded:
            # Most of what there is: shuffle the whole list rather than draw until the last one turns up.
            every = (f"{number:0{n_digits}b}" for number in torch.randperm(2**n_digits, generator=generator).tolist())
            left = [bits for bits in every if bits not in exclude]
            yield from sorted(left[:wanted]) if wanted == 2**n_digits else left[:wanted]
            continue
        found: dict[str, None] = {}
        while len(found) < wanted:
            rows = torch.randint(2, (wanted - len(found), n_digits), generator=generator)
            drawn = ("".join(map(str, row)) for row in rows.tolist())
            found.update((bits, None) for bits in drawn if bits not in exclude)
        yield from found
