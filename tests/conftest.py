"""What every test gets: no network, a fixed seed, few threads. `script` imports one of benchmarks/, `poisoned` is for
kernels that must fill a result."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny tensors run slower on many threads; processes that share the tests share the cores, and those that a test starts
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))),
)

import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, alone or in the suite."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries draw from the legacy generator)
    torch.manual_seed(0)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of benchmarks/ by its name, imported as it imports the others."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` returns NaN (or the largest integer): an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill
