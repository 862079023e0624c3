"""From a clone to an answer about a model of one's own, by what README and tutorial say and nothing else.

    python bench/fresh.py                 # a clone, an environment, everything downloaded: needs git, make, Python
    python bench/fresh.py --reuse         # dependencies of the environment that runs this; only the package is built

Commands and code are taken from the pages: what is wrong there fails here. Needs no package itself.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"<!--- invisible-code-block: python\n(.*?)-->|^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SERVES = "sdi explore"


def code(page: Path) -> str:
    """All Python of a page, as one script."""
    return "\n".join(hidden or shown for hidden, shown in CODE.findall(page.read_text(encoding="utf-8")))


def section(page: Path, title: str) -> str:
    text = page.read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def install_commands(readme: Path) -> list[str]:
    """Of the README; the clone is that of this checkout."""
    lines = [line for block in SHELL.findall(section(readme, "Install")) for line in block.splitlines()]
    assert lines, "README says no command to install with"
    return [line for line in lines if not line.startswith("git clone")]


def run_commands(readme: Path) -> list[str]:
    """From a project file to an answer: the indented lines of the README's section, but for the one that serves."""
    indented = re.findall(r"^    (\S.*)$", section(readme, "From checkpoints to a page"), re.MULTILINE)
    lines = [line.partition("#")[0].strip() for line in indented]
    assert any(line.startswith("sdi query") for line in lines)
    return [line for line in lines if not line.startswith(SERVES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", action="store_true", help="the dependencies of this environment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone, env, work = (Path(folder, name) for name in ("clone", "env", "work"))
        work.mkdir()
        bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        bare["PATH"] = os.pathsep.join([str(env / "bin"), bare["PATH"]])

        def step(command: str, cwd: Path) -> str:
            began = time.perf_counter()
            print(f"$ {command}", flush=True)
            done = subprocess.run(  # noqa: S602  # the README's own lines, which are for a shell
                command,
                shell=True,
                cwd=cwd,
                env=bare,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            print(f"  {time.perf_counter() - began:.0f} s", flush=True)
            if done.returncode:
                print(done.stdout[-4000:])
                raise SystemExit(f"failed: {command}")
            return done.stdout

        step(f"git clone --quiet {ROOT} {clone}", Path(folder))
        step(f"{sys.executable} -m venv {env}", Path(folder))
        if options.reuse:
            [packages] = env.glob("lib/python*/site-packages")
            step(f"{sys.executable} -m build --no-isolation --wheel --outdir dist .", clone)
            step("pip install --quiet --no-deps --no-index dist/*.whl", clone)
            ours = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
            (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in ours))
        else:
            for line in install_commands(clone / "README.md"):
                step(line, clone)
        for page in ("README.md", "docs/tutorial.md"):
            (work / "page.py").write_text(code(clone / page), encoding="utf-8")
            print(f"the code of {page}")
            step("python page.py", work)
        answer = [step(line, work) for line in run_commands(clone / "README.md")][-1]
        print(answer)
        assert "Score:" in answer, "the last command shows no answer"
    print("a fresh machine gets there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
