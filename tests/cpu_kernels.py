"""The modules of the CPU kernels, for tests: skipped where there is no compiler, a failure where there is one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from qtune.kernels.cpu.build import find_compiler


def cpu_kernels(name: str) -> Any:
    """kernels/cpu/<name>.py. A kernel that does not build, or whose self-test refuses it, must not look green."""
    module = import_module(f"qtune.kernels.cpu.{name}")
    if why := module.LIBRARY.why_not():
        (pytest.fail if find_compiler()[0] else pytest.skip)(why)
    return module
