"""What the C allocator is told: freed memory stays, and is taken again without a fault."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ASK = """
import resource, torch
from qtune.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.full((48 << 18,), 1.0)  # 48 MiB, above what glibc takes from its own heap
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
loose = faults()
assert keep_freed_memory()
for _ in range(3):
    faults()
print(loose, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_taken_again_without_faults() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    loose, kept = map(int, done.stdout.split())
    assert 3 * kept < loose
