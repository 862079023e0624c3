"""What a measurement is reported with: the machine, the versions, the memory that was used."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import time
from pathlib import Path

import torch

import sdi_kernels
from sdi_kernels import HASH_FORMAT

PACKAGES = ("numpy", "triton", "safetensors", "tqdm", "typer", "plotly", "jinja2", "matplotlib", "transformers")


def versions() -> dict[str, str]:
    """Versions of everything that can change a number or a picture."""
    found = {"python": platform.python_version(), "sdi-kernels": sdi_kernels.__version__}
    found["torch"] = str(torch.__version__)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["hash format"] = HASH_FORMAT
    return found


def machine_facts() -> dict[str, str]:
    """The machine line that measurements are reported with."""
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": cpu_model(),
        "cores": str(_usable_cores()),
        "torch threads": str(torch.get_num_threads()),
    }
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no sysconf for it, or no sysconf at all
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts["memory"] = f"{total / 2**30:.1f} GiB"
    with contextlib.suppress(AttributeError, OSError):
        facts["load"] = f"{os.getloadavg()[0]:.1f} (1 min average, {time.strftime('%Y-%m-%d')})"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.device_count():
        facts["GPU"] = "none that torch can use"
    return facts


def usable_device(asked: str | torch.device) -> torch.device:
    """The device of that name, once it is known that tensors can be on it.

    Raises:
        ValueError: there is no such device, or none here.
    """
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"device: got {asked!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count or (device.index is not None and device.index >= count):
            raise ValueError(f"device: got {str(asked)!r}, but this machine has {count} GPUs that torch can use")
        return device
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:  # of devices that torch was built without
        raise ValueError(f"device: got {str(asked)!r}, which torch cannot use here; use auto, cpu or cuda") from error
    return device


def cpu_model() -> str:
    """The CPU's name as the operating system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


LIMITS = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "SDI_KERNELS_CPU",
    "OMP_NUM_THREADS", "SDI_TEST_THREADS",
)  # fmt: skip
"""Variables that change which instructions or how many threads are used; named where they are set."""


@functools.cache
def arithmetic() -> str:
    """What the last bits of a result depend on, apart from the number of threads: CPU, instructions, versions."""
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ and "THREADS" not in name]
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join(
        [cpu_model(), capability, f"torch {torch.__version__}", f"sdi-kernels {sdi_kernels.__version__}", *limits]
    )


def cpu_flags() -> str:
    """The CPU's vector instructions, as Linux names them; ``n/a`` elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                wanted = ("sse", "ssse", "avx", "fma", "amx", "f16c")
                return " ".join(sorted(f for f in line.partition(":")[2].split() if f.startswith(wanted)))
    return "n/a"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class PeakMemory:
    """The largest resident memory of this process since this object was made.

    Exact on Linux, where the kernel's high-water mark can be reset; elsewhere unknown.
    """

    def __init__(self) -> None:
        self._exact = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._exact = True

    def peak_bytes(self) -> int | None:
        """Bytes, or None where it cannot be told."""
        if not self._exact:
            return None
        with contextlib.suppress(OSError, ValueError):
            for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return None
