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


RETURN = """
import torch
from qtune.memory import return_freed_memory
assert return_freed_memory()
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = anonymous()
kept, blocks = [], [torch.ones(1 << 20) for _ in range(64)]  # 4 MiB each, small ones between them
while blocks:
    kept.append(torch.ones(16))
    blocks.pop()
print(anonymous() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", RETURN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024, "KiB of the 256 MiB"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_taken_again_without_faults() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    loose, kept = map(int, done.stdout.split())
    assert 3 * kept < loose
