"""The project file that ``sdi init --hf`` writes."""

from __future__ import annotations

TEXT = '''"""{name} for sdi, with data in JSON lines: an object with "text" on each (and "label" or "prompt").

    sdi featurize --project {file} --split train --split query --out run
    sdi query run --row 0

Relative paths are taken from the folder in which sdi is started.
"""

from __future__ import annotations

from stepinfluence.integrations.pretrained import Pretrained

pretrained = Pretrained({arguments})

model, body, loss = pretrained.model, pretrained.body, pretrained.loss
dataset, collate = pretrained.dataset, pretrained.collate
example_id, text = pretrained.example_id, pretrained.text
tokens, token_losses = pretrained.tokens, pretrained.token_losses
metadata, from_json, attach_options = pretrained.metadata, pretrained.from_json, pretrained.attach_options
'''


def project_file(name: str, data: str, *, task: str | None = None, file: str = "my_project.py") -> str:
    """The text of a project file around :class:`~stepinfluence.integrations.pretrained.Pretrained`.

    Args:
        name: model folder, or name on the hub.
        data: path of the data with ``{split}`` in it.
        task: of the model, if its config does not tell.
        file: what the file will be called.
    """
    arguments = [repr(name), f"data={data!r}", *([f"task={task!r}"] if task else [])]
    # The name stands in a docstring: nothing in it may end that.
    shown = name.replace("\\", "/").replace('"', "'")
    return TEXT.format(name=shown, file=file, arguments=", ".join(arguments))
