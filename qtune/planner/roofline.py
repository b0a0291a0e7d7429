"""How long a step takes: what its ops compute and move, against what a device can do.

An op class takes max(FLOP / (share of the peak), bytes / (share of the bandwidth)) + launches x overhead; the step is
the sum of its classes. The shares and the overhead are the constants below with their sources. They are the same for
every device, and `ANCHORS` says how far off published runs are. What waits in host memory is copied beside the
computation, and mapped files are read and written beside it: a step takes as long as the slowest of the three. Left
out: the data loader, saving, evaluation, clocks below boost, and that a GPU may run one kernel beside another.
A device without known throughput or bandwidth gets no estimate: `Speed.reason` says why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..screen import duration, size
from ..speed import seconds
from .cost import LINK, READ, WRITTEN
from .devices import Device

# Share of the peak by op class; the others compute without tensor cores, at fp32's rate.
# mm: published QLoRA and LoRA steps reach 56-82 % of the peak on GeForce cards (torchtune's README, answer.ai's
# FSDP-QLoRA; 6 FLOP a parameter and token): their middle.
# attention: FlashAttention-2 reaches 50-73 % on an A100 (abstract of arXiv 2307.08691): the middle.
PEAK_SHARE = {"mm": 0.70, "attention": 0.60}
# A plain copy reaches 89 % of an A100's and 92 % of an H100's printed bandwidth (public measurements: 1383 of 1555 and
# 3089 of 3350 GB/s); ops that also compute reach less.
BANDWIDTH_SHARE = 0.85
# Between the 0.9 us of a kernel that waits in a queue and the 6.7 us of one that is waited for (NVIDIA, "Getting
# Started with CUDA Graphs"); eager training is near the second, since torch dispatches every op.
LAUNCH = 5e-6
# Bytes/s of a disk, which nobody asks: of an NVMe SSD behind PCIe 3, whose datasheets say up to 3.5e9 read and 1.5e9 to
# 3e9 written; a SATA SSD moves 0.5e9. Files that the system can keep in free memory are not read from the disk at all.
DISK = 2e9
PACKED = "uint8"  # the dtype of packed weights
ANCHORS = (
    "six published runs of fused stacks (torchtune, Unsloth; 3B to 8B on an RTX 4090 and an A100) come out at 0.74 to "
    "1.27 times their measured tokens per second; stock transformers and PEFT at 1.7 to 2.0 times"
)
THROTTLED = {
    "t4": "a T4 throttles: published 7B QLoRA steps on it (fitcheck-llm, stock stack) took 3 times this estimate"
}


@dataclass(frozen=True)
class Cost:
    """What one op class of one dtype does in a whole step.

    op: "mm", "attention", "unpack", "elementwise", "optimizer" ...; flops: a multiply-add counts 2;
    nbytes: read and written; count: launches.
    """

    op: str
    dtype: str
    flops: int
    nbytes: int
    count: int


@dataclass(frozen=True)
class Speed:
    """An estimate of one optimizer step. `seconds` is None where there is none; `reason` then says why.

    tokens_per_second; run_seconds: of all steps, None if their number is not known; shares: of the time, by op class,
    the largest first; bound: what most of the time goes to: "compute", "memory bandwidth", "launches", or what all else
    waits for: the copies or the disk. read, written: bytes of mapped files.
    """

    seconds: float | None = None
    tokens_per_second: float | None = None
    run_seconds: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    bound: str = ""
    assumptions: list[str] = field(default_factory=list)
    reason: str = ""
    read: int = 0
    written: int = 0


def estimate(
    costs: Sequence[Cost], device: Device, tokens: int, steps: int | None = None, micro_batches: int = 1
) -> Speed:
    """The speed of a step with these costs. tokens: of one step, all its micro-batches; steps: of the run."""
    read, written = (sum(cost.nbytes for cost in costs if cost.op == op) for op in (READ, WRITTEN))
    costs = [cost for cost in costs if cost.op not in (READ, WRITTEN)]
    if reason := _unknown(costs, device, tokens):
        return Speed(reason=reason, read=read, written=written)
    links = [cost for cost in costs if cost.op == LINK and device.link]
    copied = sum(cost.nbytes for cost in links) / (device.link or 1.0)
    weights = sum(cost.nbytes for cost in links if cost.dtype == PACKED) / (device.link or 1.0)
    by_class: dict[str, float] = defaultdict(float)
    by_bound: dict[str, float] = defaultdict(float)
    for cost in (cost for cost in costs if cost.op != LINK or not device.link):
        compute, memory, launches = _parts(cost, device)
        by_class[cost.op] += max(compute, memory) + launches
        by_bound["compute" if compute > memory else "memory bandwidth"] += max(compute, memory)
        by_bound["launches"] += launches
    alone = sum(by_class.values())
    waits = {LINK: copied, "disk": (read + written) / DISK}
    total = max(alone, *waits.values())
    if total > alone:
        slowest = max(waits, key=lambda op: waits[op])
        by_class, by_bound = {slowest: total}, {slowest: total}
    return Speed(
        seconds=total,
        tokens_per_second=tokens / total,
        run_seconds=None if steps is None else steps * total,
        shares={op: by_class[op] / total for op in sorted(by_class, key=lambda op: -by_class[op])},
        bound=max(by_bound, key=lambda bound: by_bound[bound]),
        assumptions=[
            *_assumptions(costs, device), *_copies(device, copied, weights, alone, tokens // micro_batches),
            *_files(read, written, alone),
        ],
        read=read,
        written=written,
    )  # fmt: skip


def _files(read: int, written: int, alone: float) -> list[str]:
    """What mapped files cost beside the computation; bytes and seconds of a step."""
    if not read + written:
        return []
    taken = (read + written) / DISK
    return [
        f"files: {size(read)} read and {size(written)} written a step, {duration(taken)} at {DISK / 1e9:g} GB/s "
        f"(taken, of an NVMe SSD), beside {duration(alone)} of computing; less where free memory holds them"
    ]


def _copies(device: Device, copied: float, weights: float, alone: float, tokens: int) -> list[str]:
    """What copies cost beside the computation, and from which micro-batch on nothing: those of weights take the same
    for any, all else goes with its tokens. Seconds of a step; tokens: of a micro-batch."""
    if not copied:
        return []
    line = (
        f"copies between host and device: {duration(copied)} a step at {device.link / 1e9:.3g} GB/s, beside "
        f"{duration(alone)} of computing"
    )
    others = copied - weights
    if others >= alone:
        return [f"{line}: they take longer for any micro-batch"]
    if not weights:
        return [f"{line}, which hides them"]
    return [
        f"{line}: hidden by it from micro-batches of about {round(tokens * weights / (alone - others)):,} tokens on"
    ]


def _unknown(costs: Sequence[Cost], device: Device, tokens: int) -> str:
    """Why no estimate can be made; empty if it can."""
    if not (device.flops and device.bandwidth > 0):
        return f"the throughput and bandwidth of {device.name} are not known: no time estimate"
    if missing := sorted({c.dtype for c in costs if c.op in PEAK_SHARE and c.dtype not in device.flops}):
        return f"the {' and '.join(missing)} throughput of {device.name} is not known: no time estimate"
    if tokens < 1 or not any(c.flops or c.nbytes or c.count for c in costs):
        return "there is nothing to compute in a step: no time estimate"
    return ""


def _shares(op: str, device: Device) -> tuple[float, float]:
    """Of the peak and of the bandwidth; a CPU's are measured, so the whole of them."""
    return (1.0, 1.0) if device.kind == "cpu" else (PEAK_SHARE.get(op, 1.0), BANDWIDTH_SHARE)


def _parts(cost: Cost, device: Device) -> tuple[float, float, float]:
    """Seconds of computing, of moving bytes, of launching."""
    peak_share, bandwidth_share = _shares(cost.op, device)
    dtype = cost.dtype if cost.op in PEAK_SHARE else "float32"
    peak = device.flops.get(dtype) or max(device.flops.values())
    compute = cost.flops / (peak_share * peak)
    return compute, cost.nbytes / (bandwidth_share * device.bandwidth), cost.count * LAUNCH


def _assumptions(costs: Sequence[Cost], device: Device) -> list[str]:
    dtypes = sorted({cost.dtype for cost in costs if cost.op in PEAK_SHARE})
    rates = ", ".join(f"{device.flops[dtype] / 1e12:.4g} TFLOPS in {dtype}" for dtype in dtypes) or "no products"
    has = f"{device.name}: {rates}, {device.bandwidth / 1e9:.4g} GB/s"
    launch = f"{LAUNCH * 1e6:.0f} us a launch"
    if device.kind == "cpu":
        return [f"{has}, measured here and now by one product and one copy", launch]
    shares = f"products reach {PEAK_SHARE['mm']:.0%} of that, attention {PEAK_SHARE['attention']:.0%}"
    lines = [f"{has} ({device.source})", f"{shares}, memory {BANDWIDTH_SHARE:.0%}; {launch}", ANCHORS]
    if "bfloat16" in dtypes and device.capability < (8, 0):
        major, minor = device.capability
        lines.append(f"SM {major}.{minor} has no bf16 products: they are emulated and counted at fp32's rate")
    if device.key in THROTTLED:
        lines.append(THROTTLED[device.key])
    return lines


# ---- a CPU


def measure_cpu(dtype: torch.dtype = torch.bfloat16) -> tuple[float, float]:
    """(FLOP/s of a product of 256 x 1024 by 1024 x 1024, bytes/s of a copy of 32 MiB), here and now, by all threads
    that torch uses; well below a second."""
    cpu = torch.device("cpu")
    x, w = (torch.ones(n, 1024, dtype=dtype) for n in (256, 1024))
    flops = 2 * 256 * 1024 * 1024 / seconds(lambda: x @ w.T, cpu)
    source = torch.ones(1 << 24, dtype=torch.bfloat16)
    goal = torch.empty_like(source)
    return flops, 2 * source.nbytes / seconds(lambda: goal.copy_(source), cpu)


def measured(device: Device) -> Device:
    """This machine's CPU with its speed as `measure_cpu` finds it, for products in bf16 and fp32."""
    (half, bandwidth), (single, _) = measure_cpu(), measure_cpu(torch.float32)
    return replace(device, flops={"bfloat16": half, "float32": single}, bandwidth=bandwidth)
