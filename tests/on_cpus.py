"""The tests whose numbers depend on the CPU, on the instruction sets of other CPUs: ``make test-cpus``.

torch, oneDNN, MKL and the compiled kernels each choose their instructions by themselves, and each has a variable of its
own that limits it (tests/conftest.py has one for threads). Not every combination is run: three configurations limit
everything together, as a CPU of that kind would, the others a part at a time to the least there is, which is where the
order of sums is most unlike this machine's own. oneDNN and MKL are one part: a product is either's, never both's. What
a configuration changes is measured, not assumed: the table names the operations that give other bits than without
limits.

Only files that mark a test as numeric are looked at: importing all the others would take longer than the tests.

    python tests/on_cpus.py [--only NAME ...] [-- arguments for pytest]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SELECTED = ("-m", "numeric and not float64")
# Operations of each kind on fixed inputs (torch's random numbers differ between instruction sets, numpy's do not). Many
# values, as most of them have the same bits on every CPU.
PROBE = """
import hashlib, numpy, torch
from torch.nn import functional as F
from sdi_kernels import TensorSketch, sketch_linear_grads
draw = numpy.random.default_rng(0).standard_normal
x, y, w = (torch.from_numpy(draw(s).astype("float32")) for s in ((37, 300), (300, 53), (16, 16, 3)))
many = torch.from_numpy(draw((200, 1001)).astype("float32"))
tokens = x[:36].view(2, 18, 300)
for name, found in {
    "matmul": x @ y, "bf16 matmul": (many.bfloat16() @ many.T.bfloat16()).float(),
    "convolution": torch.conv1d(x[:32, :80].reshape(2, 16, 80), w), "fft": torch.view_as_real(torch.fft.rfft(many)),
    "tanh": many.tanh(), "exp": many.exp(), "sum": many.sum(1), "softmax": many.softmax(1),
    "layer norm": F.layer_norm(many, (1001,)),
    "sketch": sketch_linear_grads(tokens, tokens, TensorSketch(300, 300, 512), route="fft"),
}.items():
    print(name.replace(" ", "_"), hashlib.sha256(found.numpy().tobytes()).hexdigest())
"""

NO_AVX = {
    "torch": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    # MKL_ENABLE_INSTRUCTIONS does nothing on CPUs that are not Intel's; this does, and means SSE2 on all.
    "MKL": {"MKL_CBWR": "COMPATIBLE"},
    "kernels": {"SDI_KERNELS_CPU": "baseline"},
}
AVX2 = {
    "torch": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "MKL_CBWR": "AVX2"},
    "kernels": {"SDI_KERNELS_CPU": "avx2"},
}
AVX512 = {"torch": {"ATEN_CPU_CAPABILITY": "avx512"}, "kernels": {"SDI_KERNELS_CPU": "avx512"}}


@dataclass(frozen=True)
class Configuration:
    name: str
    variables: dict[str, str]
    threads: int = 1
    needs: str = ""  # what torch.backends.cpu.get_cpu_capability() has to be, at least
    tests: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        # Two workers with two threads each: threads that wait must not keep the others from running.
        threads = {"SDI_TEST_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        return {**os.environ, **threads, **self.variables}


def together(limits: dict[str, dict[str, str]]) -> dict[str, str]:
    return {variable: value for part in limits.values() for variable, value in part.items()}


CONFIGURATIONS = (
    Configuration("no AVX", together(NO_AVX)),
    Configuration("AVX2, 2 threads", together(AVX2), threads=2, needs="AVX2"),
    Configuration("AVX-512, 2 threads", together(AVX512), threads=2, needs="AVX512"),
    Configuration("torch without AVX", NO_AVX["torch"]),
    Configuration("oneDNN and MKL with SSE", {**NO_AVX["oneDNN"], **NO_AVX["MKL"]}),
    Configuration("no compiled kernels", {"SDI_KERNELS_CPU": "none"}),
    Configuration(
        "Triton interpreted, SSE4",
        {"TRITON_INTERPRET": "1", "OPENBLAS_CORETYPE": "Nehalem", **NO_AVX["torch"]},
        tests=("tests/triton_interpret",),
    ),
)
LEVELS = ("DEFAULT", "AVX2", "AVX512")


@dataclass
class Outcome:
    name: str
    status: str
    counts: str = ""
    seconds: str = ""
    differs: str = ""
    failed: list[str] = field(default_factory=list)


def numeric_files() -> list[str]:
    """Where tests are marked as numeric; interpreted kernels have a configuration of their own."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [file for file in files if "mark.numeric" in file.read_text(encoding="utf-8")]
    return [str(file.relative_to(ROOT)) for file in marked if "triton_interpret" not in file.parts]


def probe(environment: dict[str, str]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = (line.split() for line in done.stdout.splitlines())
    return {name.replace("_", " "): digest for name, digest in found}


def run(configuration: Configuration, unlimited: dict[str, str], arguments: list[str]) -> Outcome:
    environment = configuration.environment()
    found = probe(environment)
    differs = ", ".join(name for name, digest in found.items() if digest != unlimited[name]) or "nothing"
    command = [sys.executable, "-m", "pytest", "-q", *SELECTED, *arguments, *(configuration.tests or numeric_files())]
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        sys.stdout.write(line)
    code = process.wait()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    counts = re.findall(r"\d+ (?:passed|failed|errors?)", lines[-1] if lines else "")
    status = "passed" if code == 0 else "FAILED"
    return Outcome(configuration.name, status, ", ".join(counts), f"{time.monotonic() - began:.0f}", differs, failed)


def table(outcomes: list[Outcome]) -> str:
    rows = [("configuration", "result", "tests", "seconds", "other bits than without limits")]
    rows += [(o.name, o.status, o.counts, o.seconds, o.differs) for o in outcomes]
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CONFIGURATIONS], metavar="NAME")
    parser.add_argument("arguments", nargs="*", help="for pytest")
    given = parser.parse_args()
    chosen = [c for c in CONFIGURATIONS if given.only is None or c.name in given.only]
    capability = torch.backends.cpu.get_cpu_capability()
    here = LEVELS.index(capability) if capability in LEVELS else 0
    unlimited = probe({**os.environ})
    outcomes = []
    for configuration in chosen:
        if configuration.needs and LEVELS.index(configuration.needs) > here:
            outcomes.append(Outcome(configuration.name, f"skipped: no {configuration.needs} here"))
            continue
        variables = " ".join(f"{k}={v}" for k, v in configuration.variables.items())
        print(f"\n=== {configuration.name}: {variables} SDI_TEST_THREADS={configuration.threads}", flush=True)
        outcomes.append(run(configuration, unlimited, given.arguments))
    print(f"\ntorch {torch.__version__}, {capability} without limits\n{table(outcomes)}")
    bad = [o for o in outcomes if o.status == "FAILED"]
    for outcome in bad:
        print(f"\nFAILED: {outcome.name}", *outcome.failed, sep="\n  ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
