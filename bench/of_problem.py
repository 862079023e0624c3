"""What the commands that retrain a problem of ``stepinfluence.evaluation`` begin with."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench.provenance import Provenance, add_output


def parser_of(
    description: str | None, problems: Iterable[str], *, seeds: int = 5, folder: str
) -> argparse.ArgumentParser:
    """A parser of ``problem``, ``--seeds`` and ``--folder``.

    Args:
        description: the module's docstring.
        problems: that can be named.
        folder: the beginning of its name unless told otherwise; the problem's name is added.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=tuple(problems))
    parser.add_argument("--seeds", type=int, default=5, help="independent runs (5)")
    parser.add_argument("--folder", type=Path, help=f"of finished trainings ({folder}-PROBLEM)")
    return parser


def begun(
    parser: argparse.ArgumentParser, name: Callable[[argparse.Namespace], str], folder: str
) -> tuple[argparse.Namespace, Provenance]:
    """The options, with the folder filled in, one torch thread, and where the result comes from.

    Args:
        name: of the kept result, by the options.
        folder: as for :func:`parser_of`.
    """
    known, _ = parser.parse_known_args()
    add_output(parser, name(known))
    options = parser.parse_args()
    options.folder = options.folder or Path(f"{folder}-{options.problem}")
    torch.set_num_threads(1)  # tensors are small: a second thread only waits
    return options, Provenance()
