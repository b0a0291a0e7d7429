"""What torch is told before it uses a device; for CUDA how its allocator takes memory, and how large cuBLAS's
workspaces are.

Expandable segments grow by pages where the default takes a new segment for what fits into none: less is lost between
blocks of unequal steps. The workspace is cuBLAS's own advice for the card (32 MiB from Hopper on, else 4 MiB and some
small ones); torch's default is the same, but changed between its releases (PR 175344), and a plan must know it.
Page-locked host memory comes in powers of two by default, which for packed layers is up to twice what they are; torch
2.13 can be told not to. What the user has set stays. Sources: PyTorch's notes on CUDA, "Optimizing memory usage with
PYTORCH_ALLOC_CONF"; aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize.
"""

from __future__ import annotations

import os
import re
import sys

import torch

from .host import large_pages, small_caches

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.10 and later read both; the first is its name
EXPANDABLE = "expandable_segments:True"
PINNED = "pinned_max_round_threshold_mb"  # beyond so much, blocks of page-locked memory are what was asked for
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
SHORT, LONG = ":4096:2:16:8", ":4096:8"  # KiB and how many of them
HOPPER = (9, 10, 12)  # capabilities from Hopper on, which take the long one


def settle(device: torch.device) -> None:
    """Set what the user has not set, for CUDA or the CPU; before anything is allocated there, or without effect on the
    allocator."""
    if device.type == "cpu":
        large_pages()
        small_caches()
    if device.type != "cuda":
        return
    if _given() is None and expandable() and not torch.cuda.is_initialized():
        settings = ",".join([EXPANDABLE, *([f"{PINNED}:1"] if _knows_pinned() else [])])
        os.environ[ALLOCATOR[0]] = settings
        # a build that has read the variables while it was loaded is told by the call
        if set_now := getattr(torch._C, "_accelerator_setAllocatorSettings", None):
            set_now(settings)
    if WORKSPACE not in os.environ:
        os.environ[WORKSPACE] = workspace_config(torch.cuda.get_device_capability(device))


def _given() -> str | None:
    """What the user says of the allocator; None: nothing."""
    given = [os.environ[name] for name in ALLOCATOR if name in os.environ]
    return ",".join(given) if given else None


def expandable(ours: bool = True) -> bool:
    """Will the allocator have expandable segments? ours: in a run of this project; else as torch has them by default.
    torch has none on Windows."""
    given = _given()
    if given is None:
        return ours and sys.platform != "win32"
    found = re.findall(r"expandable_segments:(\w+)", given.replace(" ", ""), re.IGNORECASE)
    return bool(found) and found[-1].lower() == "true"


def _knows_pinned() -> bool:
    """Can torch be told how to round page-locked memory? Since 2.13."""
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) >= (2, 13)


def pinned_bytes(nbytes: int) -> int:
    """What a block of page-locked host memory takes in a run of this project."""
    given = _given()
    exact = _knows_pinned() if given is None and expandable() else PINNED in (given or "")
    return nbytes if exact or nbytes < 1 else 1 << (nbytes - 1).bit_length()


def workspace_config(capability: tuple[int, int]) -> str:
    """The setting of cuBLAS's workspace for a card."""
    return LONG if capability[0] in HOPPER else SHORT


def workspace_bytes(config: str) -> int | None:
    """Bytes of one workspace, of one handle and stream, under a setting; None: torch does not read it, and takes its
    default."""
    if not re.fullmatch(r"(:\d+:\d+)+", config):
        return None
    numbers = [int(number) for number in config.split(":")[1:]]
    return 1024 * sum(kib * count for kib, count in zip(numbers[::2], numbers[1::2], strict=True))


def workspace_set() -> int | None:
    """Bytes of one workspace, where the variable says it."""
    return workspace_bytes(os.environ.get(WORKSPACE, ""))


def told() -> str:
    """What is in force, for a person."""
    how = "expandable segments" if expandable() else "fixed segments"
    who = "qtune's choice" if _given() is None else f"as set: {_given()}"
    workspace = os.environ.get(WORKSPACE)
    return f"{how} ({who}); cuBLAS workspaces {f'as set: {workspace}' if workspace else 'by the card'}"
