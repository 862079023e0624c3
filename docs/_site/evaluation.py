"""Write the results in docs/evaluation.md from the files that ``python -m bench.evaluate`` keeps.

python docs/_site/evaluation.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from kept import folded
from stepinfluence.evaluation import Evaluation

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evaluation.md"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
SDI = "SDI, m=2048"


def page(text: str) -> str:
    """The page, every block of results written anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{block(m[2])}{m[3]}", text)


def block(problem: str) -> str:
    """What the page says of one problem."""
    data = json.loads((ROOT / "bench" / "results" / f"evaluate-{problem}.json").read_text(encoding="utf-8"))
    found = Evaluation.from_dict(data)
    text = [_head(found, data), found.markdown(), _differences(found)]
    return f"\n{folded(f'{problem}: all figures', *text)}\n\n"


def _head(found: Evaluation, data: dict[str, Any]) -> str:
    s, facts = data["settings"], data["provenance"]
    version = facts["versions"]
    commit = facts["commit"][:12] + (" with changes" if facts["dirty"] else "")
    return (
        f"**{found.problem}**{f' ({found.about})' if found.about else ''}"
        f"{f', answers right: {found.accuracy}' if found.accuracy else ''}. "
        f"`{facts['command']}`: {s['seeds']} seeds, each with "
        f"{s['subsets']} halves and {s['left_out']} examples left out (repeats: {s['repeats']}; brittleness queries: "
        f"{s['flips']} a method); "
        f"{found.retrainings} models, {found.training_seconds / 60:.0f} minutes of processor time to train. "
        f"{facts['machine']['CPU']} ({facts['torch_cpu_capability']}), shared while measuring (load "
        f"{facts['load_before']} before, {facts['load_after']} after), {facts['machine']['torch threads']} thread; "
        f"torch {version['torch']}, traker {version['traker']}, kronfluence {version['kronfluence']}; {facts['date']}, "
        f"commit {commit}."
    )


def _differences(found: Evaluation) -> str:
    others = [m.method for m in found.merits if m.method not in (SDI, "random")]
    parts = [f"{other} {found.difference('lds', other, SDI)}" for other in others]
    return f"LDS minus that of {SDI}, seed by seed: " + "; ".join(parts) + "."


if __name__ == "__main__":
    new = page(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(new, encoding="utf-8")
    sys.exit(0 if BLOCK.search(new) else f"{PAGE}: no block of results")
