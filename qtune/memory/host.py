"""The C library's allocator: what a training step frees stays with the process, for the next step takes it again.

By default glibc gives large blocks back to the system at once, and every page of them costs a fault when it is next
written: a step of SmolLM2-135M on 2 x 512 tokens took 120,000 faults, 0.3 s of CPU time. The peak is what it was.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # the numbers of M_TRIM_THRESHOLD and M_MMAP_MAX in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Never give freed memory back, from now on, and take no block straight from the system. Returns whether the C
    library could be told: only glibc knows these two."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(TRIM_THRESHOLD, -1)) and bool(mallopt(MMAP_MAX, 0))
