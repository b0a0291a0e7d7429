"""What the C allocator is told: freed memory stays, and is taken again without a fault. Few products are remembered."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qtune.memory.host import CACHES, small_caches

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
from qtune.memory import keep_freed_memory, return_freed_memory
KEPT_BEFORE
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
@pytest.mark.parametrize("before", ["", "keep_freed_memory()"])
def test_freed_memory_goes_back(before: str) -> None:
    """Also in a process that trained with resident weights before."""
    script = RETURN.replace("KEPT_BEFORE", before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024, "KiB of the 256 MiB"


LARGE = """
import os, torch
from qtune.runs import pick_device
pick_device("cpu")
t = torch.ones(16 << 20)  # 64 MiB
inside, pages = False, []
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        low, high = (int(x, 16) for x in first.split("-"))
        inside = low <= t.data_ptr() < high
    elif inside and first == "AnonHugePages:":
        pages.append(int(line.split()[1]))
print(sum(pages), os.environ["THP_MEM_ALLOC_ENABLE"])
"""


def _huge_pages_can_be_asked_for() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.is_file() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not _huge_pages_can_be_asked_for(), reason="this system has no huge pages on demand")
@pytest.mark.parametrize("asked", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_large_blocks_are_of_huge_pages_unless_the_user_says_no(asked: str) -> None:
    given = {} if asked == "1" else {"THP_MEM_ALLOC_ENABLE": asked}
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | given
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, env=environment)
    huge, setting = done.stdout.split()
    assert setting == asked
    assert asked == "0" or int(huge) >= 32 * 1024, "KiB of the 64 MiB"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_taken_again_without_faults() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    loose, kept = map(int, done.stdout.split())
    assert 3 * kept < loose


SHAPES = """
import sys, torch
from qtune.memory import cuda
if sys.argv[1] == "settled":
    cuda.settle(torch.device("cpu"))
torch.set_num_threads(1)
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
x, w = torch.randn(64, 576, dtype=torch.bfloat16), torch.randn(900, 576, dtype=torch.bfloat16)
torch.nn.functional.linear(x, w)
before = anonymous()
for rows in range(1, 700):
    torch.nn.functional.linear(x, w[:rows])
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of memory")
def test_products_of_many_shapes_are_not_all_remembered() -> None:
    """As ranks that move, or lengths of examples, make them."""
    env = {name: value for name, value in os.environ.items() if name not in CACHES}
    grown = {}
    for how in ("plain", "settled"):
        done = subprocess.run([sys.executable, "-c", SHAPES, how], capture_output=True, text=True, check=True, env=env)
        grown[how] = int(done.stdout)
    if grown["plain"] < 100_000:
        pytest.skip("this processor's products leave nothing behind")
    assert grown["settled"] < grown["plain"] / 3, grown


def test_caches_that_the_user_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = CACHES
    monkeypatch.setenv(ours, "")  # so that what is set here is taken back
    monkeypatch.delenv(ours)
    monkeypatch.setenv(theirs, "700")
    small_caches()
    assert os.environ[ours] == CACHES[ours] and os.environ[theirs] == "700"
