"""``sdi init``: a project file that runs as it is."""

from __future__ import annotations

import os
import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from stepinfluence.app.cli._common import console, fail, require_output, shown
from stepinfluence.app.templates import TEMPLATES
from stepinfluence.writers import aside

NAME = "my_project.py"
HELP = (
    """Write a project file: how sdi finds your model and your data.

It is a Python file with a few functions: model(), dataset(split), loss(model, batch), body(model). What is written \
runs as it is; replace its parts by your own.

[bold]Templates[/bold]
"""
    + "".join(f"  [cyan]{name:<8}[/cyan] {what}\n" for name, what in TEMPLATES.items())
    + """
[bold]Examples[/bold]
  [cyan]sdi init my_project.py[/cyan]
  [cyan]sdi init parity.py --template parity[/cyan]
  [cyan]sdi init albert.py --hf albert/albert-base-v2 --data 'data/{split}.jsonl'[/cyan]
"""
)


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path(NAME),
    template: Annotated[
        str | None, typer.Option("--template", "-t", help=f"One of: {', '.join(TEMPLATES)}. \\[default: gpt]")
    ] = None,
    hf: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Instead of a template: a looped model folder, or its name on the Hugging Face hub."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="With --hf: JSON lines, with {split} in the path.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="With --hf: masked-lm, causal-lm or classification. \\[default: by its config]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that exists.")] = False,
) -> None:
    """See :data:`HELP`."""
    if template is not None and template not in TEMPLATES:
        fail(f"template: got {template!r}; use one of {', '.join(TEMPLATES)}")
    if hf is None and (data is not None or task is not None):
        fail(f"{'task' if data is None else 'data'}: goes with --hf, which names a model; leave it out, or add --hf")
    if hf is not None and template is not None:
        fail("template: --hf writes a file of its own, instead of a template; give one of the two")
    if file.suffix != ".py":
        fail(f"{file}: a project file is Python; give it a name that ends in .py")
    text = _template(template or "gpt", file) if hf is None else _pretrained(hf, data, task, file)
    if file.exists() and not force:
        fail(f"{file}: exists; give another name, or --force to write over it")
    file.parent.mkdir(parents=True, exist_ok=True)
    require_output(file, ".py")
    made = aside(file)  # a file that is replaced is lost only once its successor is there
    try:
        made.write_text(text, encoding="utf-8")
        made.replace(file)
    finally:
        made.unlink(missing_ok=True)
    screen = console(json_output=True)
    name = shown(shlex.quote(os.fspath(file)))
    screen.print(f"Wrote {name}. Next:")
    featurize = f"sdi featurize --project {name} --split train --split query"
    lines = (
        f"python {name}   [dim]# train; or leave it out, and --checkpoints too, for random weights[/dim]",
        f"{featurize} --checkpoints 'checkpoints/*.pt' --out run",
    )
    for line in (*(lines if hf is None else (f"{featurize} --out run",)), "sdi query run --row 0"):
        screen.print(f"  [cyan]{line}[/cyan]", soft_wrap=True)


def _template(template: str, file: Path) -> str:
    text = (resources.files("stepinfluence.app.templates") / f"{template}.py").read_text(encoding="utf-8")
    return text.replace(NAME, file.name)


def _pretrained(name: str, data: str | None, task: str | None, file: Path) -> str:
    from stepinfluence.app.templates.project_file import project_file

    if data is None or "{split}" not in data:
        fail(
            f"data: got {data!r}; with --hf, name JSON lines with {{split}} in the path: --data 'data/{{split}}.jsonl'"
        )
    assert data is not None
    return project_file(name, data, task=task, file=file.name)
