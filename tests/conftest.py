"""What every test gets: poisoned memory, its own random stream, torch's global state put back afterwards."""

from __future__ import annotations

import os
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

# Triton decides between compiling and interpreting when a kernel is imported, so the interpreted tests have a
# process of their own: TRITON_INTERPRET=1 python -m pytest tests/triton_interpret
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton_interpret"]

# One, because the tensors are small: a second thread would only be waited for, for very long on a busy machine. The
# variable is for `make test-cpus`, as reductions are split between threads.
THREADS = int(os.environ.get("SDI_TEST_THREADS", "1"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    settings = tempfile.TemporaryDirectory()  # of the user who runs the tests, nothing is read or written
    os.environ["XDG_CONFIG_HOME"] = settings.name
    config.add_cleanup(settings.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("dtype") == torch.float64:
            item.add_marker(pytest.mark.float64)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.detach().fill_(float("nan"))  # detached: a leaf that requires grad refuses to be filled
        return tensor

    return poisoned


# For the whole session, not per test: torch.compile looks torch.empty up once, and would not know a second
# wrapper.
@pytest.fixture(autouse=True, scope="session")
def poison_uninitialized_memory() -> Iterator[None]:
    """Fill what ``empty`` allocates with NaN, so that an output nobody wrote fails the test that reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoned(torch.empty))
        patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        patch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))
        yield


@pytest.fixture(autouse=True)
def reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed by the test's name: the same numbers whichever tests ran before it, and not its neighbours'."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # libraries under test draw from the global stream
    torch.manual_seed(seed)

    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul_precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.set_num_threads(THREADS)


@pytest.fixture
def in_float64(reproducible: None) -> None:
    """What is by definition the same shows in float64, to bounds far above its rounding on any CPU."""
    torch.set_default_dtype(torch.float64)
