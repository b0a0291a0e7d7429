"""Devices to plan for: what a GPU has and what a torch process takes of it, and the names that lead to one.

Throughput is SMs x boost clock x FLOP per clock and SM, dense, summed in fp32: on GeForce cards half of the rate that
NVIDIA prints for fp16 sums. SMs, clocks, rates and bandwidth: NVIDIA's whitepapers on V100, Turing, A100, GA102, Ada,
H100 and RTX Blackwell, the datasheets of T4, A10, L4, L40S, H200 and HGX B200, nvidia.com for cards in none of them.
bf16 on SM 7.x is emulated, so it counts at fp32's rate. fp32 is without TF32, torch's default.
Memory is `total_memory` as torch printed it in public logs and issues, the lowest found: up to 9 % below nominal.
Left out: what other processes and a display hold, MIG slices, power limits (a T4 sustains far less than its peak).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..errors import QtuneError, one_of
from ..memory import host_memory
from ..memory.cuda import workspace_bytes, workspace_config, workspace_set
from ..screen import size
from ..units import parse_size

Capability = tuple[int, int]
HERE = "this machine"  # begins the source of a device that is not of the catalogue alone
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Device:
    """A device. 0 and {} stand for unknown.

    key: "rtx4090"; name: as torch prints it; kind: "cuda" or "cpu"; capability: (8, 9), (0, 0) for a CPU.
    memory: bytes in all; bandwidth: bytes/s; flops: FLOP/s by dtype ("bfloat16" ...).
    link: bytes/s between host and device, one direction, from pinned memory; sms: multiprocessors.
    context: bytes of the CUDA context and the kernels that a torch process loaded; context_source: whence.
    workspace: bytes of one cuBLAS workspace, of one handle and stream; see `workspaces`.
    """

    key: str
    name: str
    kind: str
    capability: Capability
    memory: int
    bandwidth: float
    flops: Mapping[str, float] = field(hash=False)
    link: float
    context: int
    workspace: int
    source: str
    context_source: str = ""
    sms: int = 0


# ---- what a process takes

# What one torch process held beside its allocator, MiB: in use - allocated - reserved of an out-of-memory message
# (two decimals of a GiB: +-15 MiB), or measured by the source. With lazy module loading, the default since CUDA 11.7.
MEASURED: dict[str, tuple[float, str]] = {
    "t4": (140.875, "fitcheck-llm 0.3.1, data/measurements: its T4 runs, torch 2.14+cu130"),
    "rtx3070": (179, "meta-llama/codellama#82"),
    "rtxa4000": (210, "DengKaiCQ/VGGT-Long#6"),
    "rtx3080": (257, "bcmi/libcom#54, a card of 9.77 GiB"),
    "rtx4060": (115, "ESRSchao/EdgeRegNet#2"),
    "l4": (235, "ArcInstitute/evo2#190"),
    "rtx6000ada": (426, "unsloth-zoo PR 1053 (torch 2.10+cu130); DINGYANB/MTVCrafter#21 gives 429"),
    "l40s": (419, "stepfun-ai/Step-Video-T2V#8"),
    "rtx4090": (504, "3DTopia/Phidias-Diffusion#8"),
    "a100-40g": (414, "awslabs/keys_values#92, of processes that hold nothing else"),
    "a100-80g": (414, "awslabs/keys_values#92, on the 40 GB card; HiDream-ai/VAREdit#6 gives 409"),
    "rtx5090": (619, "TrajectoryCrafter/TrajectoryCrafter#20; Wan-Video/Wan2.1#465 gives 595"),
}
# Capabilities without a measurement -> the one that is taken: like SM 8.0 they hold 2048 threads an SM
NEAREST: dict[Capability, Capability] = {(7, 0): (8, 0), (9, 0): (8, 0), (10, 0): (8, 0), (10, 3): (8, 0)}


def context_of(key: str, capability: Capability, sms: int) -> tuple[int, str]:
    """Bytes of the context, and whence: this card's measurement, else the highest rate per SM among the measured ones
    of its capability or of the nearest. It grows with the SMs: there is stack memory for every thread they can hold."""
    if key in MEASURED:
        mib, source = MEASURED[key]
        return int(mib * MIB), f"measured: {source}"
    measured = {(row[2], row[3], row[0]) for row in CATALOGUE if row[0] in MEASURED}
    known = {c for c, *_ in measured}
    near = NEAREST.get(capability, capability)
    if near not in known:
        near = max((c for c in known if c <= capability), default=min(known))
    rate, other = max((MEASURED[k][0] / n, k) for c, n, k in measured if c == near)
    of = "" if near == capability else f", SM {near[0]}.{near[1]}, the nearest that is measured"
    return int(rate * sms * MIB), f"not measured: {sms} SMs at the {rate:.2f} MiB an SM of {other}{of}"


def workspace_of(capability: Capability) -> int:
    """Bytes of one cuBLAS workspace, as a run sets it (`memory.cuda`), which is torch's default since PR 175344
    (February 2026); before, torch took the short one on Blackwell."""
    return workspace_bytes(workspace_config(capability)) or 0


def workspaces(device: Device, threads: int = 2) -> int:
    """Bytes of cuBLAS workspaces in the caching allocator, where they stay. CUBLAS_WORKSPACE_CONFIG overrides the
    card's.

    A thread that multiplies has its own handle, and there is one workspace a handle and stream: training has two
    threads, the caller's and autograd's for the device (which also recomputes); without a backward there is one.
    cuBLASLt uses the same buffer (unified workspaces, PRs 168175 and 175879); torch 2.10 keeps 1 MiB more a handle
    for the Lt products, those with a bias.
    """
    given = workspace_set() if device.kind == "cuda" else None
    return threads * (device.workspace if given is None else given)


# ---- the catalogue

Row = tuple[str, str, Capability, int, float, int, int, float, tuple[int, int], str]
LOG = "public logs of torch"
PCIE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}  # bytes/s a lane: 8, 16, 32 GT/s at 128 bits of 130
PCIE_SHARE = 0.88  # 55.7 of 63 GB/s: pinned copies on PCIe 5.0 x16, published by Unsloth with NVIDIA, 2026
ECC = f"{LOG}; 3 GiB less with ECC on"
PRO_6000 = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"

# key, name, capability, SMs, boost GHz, tensor FLOP per clock and SM, MiB, GB/s, PCIe, whence the MiB
# L40S and B200: the clock at which the datasheet's 362 and 2250 TFLOPS are reached
CATALOGUE: tuple[Row, ...] = (
    ("rtx2060", "NVIDIA GeForce RTX 2060", (7, 5), 30, 1.680, 512, 5918, 336, (3, 16), LOG),
    ("rtx2080ti", "NVIDIA GeForce RTX 2080 Ti", (7, 5), 68, 1.545, 512, 11012, 616, (3, 16), LOG),
    ("rtx3060", "NVIDIA GeForce RTX 3060", (8, 6), 28, 1.777, 512, 11931, 360, (4, 16), LOG),
    ("rtx3060ti", "NVIDIA GeForce RTX 3060 Ti", (8, 6), 38, 1.665, 512, 7966, 448, (4, 16), "the RTX 3070's 8 GB"),
    ("rtx3070", "NVIDIA GeForce RTX 3070", (8, 6), 46, 1.725, 512, 7966, 448, (4, 16), "meta-llama/codellama#82"),
    ("rtx3080", "NVIDIA GeForce RTX 3080", (8, 6), 68, 1.710, 512, 10004, 760.3, (4, 16), "bcmi/libcom#54"),
    ("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 1.695, 512, 24259, 936.2, (4, 16), LOG),
    ("rtx3090ti", "NVIDIA GeForce RTX 3090 Ti", (8, 6), 84, 1.860, 512, 24110, 1008, (4, 16), LOG),
    ("rtx4060", "NVIDIA GeForce RTX 4060", (8, 9), 24, 2.460, 512, 7806, 272, (4, 8), "the RTX 4060 Ti's 8 GB"),
    ("rtx4060ti-8g", "NVIDIA GeForce RTX 4060 Ti", (8, 9), 34, 2.535, 512, 7806, 288, (4, 8), LOG),
    ("rtx4060ti-16g", "NVIDIA GeForce RTX 4060 Ti", (8, 9), 34, 2.535, 512, 15945, 288, (4, 8), LOG),
    ("rtx4070", "NVIDIA GeForce RTX 4070", (8, 9), 46, 2.475, 512, 11994, 504.2, (4, 16), LOG),
    ("rtx4070tisuper", "NVIDIA GeForce RTX 4070 Ti SUPER", (8, 9), 66, 2.610, 512, 15934, 672.3, (4, 16), LOG),
    ("rtx4080", "NVIDIA GeForce RTX 4080", (8, 9), 76, 2.505, 512, 16049, 716.8, (4, 16), LOG),
    ("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 2.520, 512, 24177, 1008, (4, 16), LOG),
    ("rtx5060ti-8g", "NVIDIA GeForce RTX 5060 Ti", (12, 0), 36, 2.572, 512, 8192, 448, (5, 8), "nominal"),
    ("rtx5060ti-16g", "NVIDIA GeForce RTX 5060 Ti", (12, 0), 36, 2.572, 512, 15841, 448, (5, 8), LOG),
    ("rtx5070", "NVIDIA GeForce RTX 5070", (12, 0), 48, 2.512, 512, 12288, 672, (5, 16), "nominal"),
    ("rtx5070ti", "NVIDIA GeForce RTX 5070 Ti", (12, 0), 70, 2.452, 512, 15841, 896, (5, 16), "the RTX 5080's 16 GB"),
    ("rtx5080", "NVIDIA GeForce RTX 5080", (12, 0), 84, 2.617, 512, 15841, 960, (5, 16), LOG),
    ("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 2.407, 512, 32112, 1792, (5, 16), "TrajectoryCrafter#20"),
    ("t4", "Tesla T4", (7, 5), 40, 1.590, 1024, 14912, 320, (3, 16), LOG),
    ("v100-16g", "Tesla V100-SXM2-16GB", (7, 0), 80, 1.530, 1024, 16130, 900, (3, 16), LOG),
    ("v100-32g", "Tesla V100-SXM2-32GB", (7, 0), 80, 1.530, 1024, 32494, 900, (3, 16), LOG),
    ("a10", "NVIDIA A10", (8, 6), 72, 1.695, 1024, 22517, 600, (4, 16), "zai-org/CogVLM#236"),
    ("a10g", "NVIDIA A10G", (8, 6), 80, 1.710, 512, 22587, 600, (4, 16), LOG),
    ("a100-40g", "NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.410, 2048, 40326, 1555, (4, 16), LOG),
    ("a100-80g", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.410, 2048, 81039, 2039, (4, 16), "Kwai-Keye/Keye#11"),
    ("l4", "NVIDIA L4", (8, 9), 58, 2.040, 1024, 22558, 300, (4, 16), "ArcInstitute/evo2#190"),
    ("l40s", "NVIDIA L40S", (8, 9), 142, 2.490, 1024, 45486, 864, (4, 16), "stepfun-ai/Step-Video-T2V#8"),
    ("rtxa4000", "NVIDIA RTX A4000", (8, 6), 48, 1.560, 1024, 15984, 448, (4, 16), "DengKaiCQ/VGGT-Long#6"),
    ("rtxa5000", "NVIDIA RTX A5000", (8, 6), 64, 1.695, 1024, 24114, 768, (4, 16), LOG),
    ("rtxa6000", "NVIDIA RTX A6000", (8, 6), 84, 1.800, 1024, 48676, 768, (4, 16), LOG),
    ("rtx6000ada", "NVIDIA RTX 6000 Ada Generation", (8, 9), 142, 2.505, 1024, 48520, 960, (4, 16), ECC),
    ("rtxpro6000", PRO_6000, (12, 0), 188, 2.617, 1024, 97250, 1792, (5, 16), f"{LOG}, of the Server Edition"),
    ("h100-pcie", "NVIDIA H100 PCIe", (9, 0), 114, 1.620, 4096, 81008, 2000, (5, 16), LOG),
    ("h100-sxm", "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.830, 4096, 81082, 3350, (5, 16), LOG),
    ("h200", "NVIDIA H200", (9, 0), 132, 1.830, 4096, 143156, 4800, (5, 16), LOG),
    ("b200", "NVIDIA B200", (10, 0), 148, 1.855, 8192, 182631, 8000, (5, 16), LOG),
)


def _device(row: Row) -> Device:
    key, name, capability, sms, clock, tensor, mib, bandwidth, (generation, lanes), whence = row
    half = sms * clock * 1e9 * tensor
    single = sms * clock * 1e9 * (128 if capability <= (8, 0) else 256)
    context, context_source = context_of(key, capability, sms)
    return Device(
        key=key,
        name=name,
        kind="cuda",
        capability=capability,
        memory=mib * MIB,
        bandwidth=bandwidth * 1e9,
        flops={"bfloat16": half if capability >= (8, 0) else single, "float16": half, "float32": single},
        link=PCIE[generation] * lanes * PCIE_SHARE,
        context=context,
        workspace=workspace_of(capability),
        source=f"{sms} SMs at {clock:.3f} GHz, {bandwidth:g} GB/s: NVIDIA; memory: {whence}",
        context_source=context_source,
        sms=sms,
    )


def catalogue() -> dict[str, Device]:
    """Every GPU that is known, by key."""
    return {row[0]: _device(row) for row in CATALOGUE}


def devices_table() -> list[dict[str, str]]:
    """Rows for listing: key, name, memory, GB/s, bf16 TFLOPS."""
    return [
        {
            "key": d.key,
            "name": d.name,
            "memory": size(d.memory),
            "GB/s": f"{d.bandwidth / 1e9:.0f}",
            "bf16 TFLOPS": f"{d.flops['bfloat16'] / 1e12:.0f}",
        }
        for d in catalogue().values()
    ]


# ---- names


def find_device(name: str) -> Device:
    """The device of a name, forgiving of case, spaces and dashes: a key or a card's name ("RTX 4090", "4090"), "cpu",
    "cuda" or "cuda:1" (this machine's), or a mere size ("8 GB": a GPU with that memory, of which no more is known).

    Raises QtuneError for what is none of them, with the nearest and all keys, and for a name of several cards.
    """
    given = name.strip()
    if given.lower() == "cpu":
        return _cpu()
    if found := re.fullmatch(r"cuda(?::(\d+))?", given.lower()):
        return _here(int(found[1] or 0))
    devices = catalogue()
    if short := _short(given):
        for names in (_keys, _aliases):
            hits = [device for device in devices.values() if short in names(device)]
            if len(hits) > 1:
                several = " or ".join(repr(device.key) for device in hits)
                raise QtuneError("Q601", f"device {given!r} is a name of several; say which: {several}")
            if hits:
                return hits[0]
    if re.fullmatch(r"[-+]?[\d.]+\s*(?:(?:[kmgt]i?)?b\w*|[kmg])", given, re.IGNORECASE):  # 24GB, also 24gbs and 24g
        return _any_gpu(given)
    error = one_of("device", given, devices)
    raise QtuneError(
        "Q601", f"{error}; or cpu, cuda, cuda:N for this machine's, or a size of memory with its unit, such as 24GB"
    )


def _short(name: str) -> str:
    """A name without what people leave out: nvidia-geforce RTX 4090 -> rtx4090, A100 80GB -> a10080g."""
    bare = re.sub(r"nvidia|geforce|tesla|generation|[^a-z0-9]", "", name.lower())
    return re.sub(r"(\d)gi?b", r"\1g", bare)


def _with_and_without_rtx(names: Iterable[str]) -> set[str]:
    return {form for name in names for form in (name, name.removeprefix("rtx"))}


def _keys(device: Device) -> set[str]:
    return _with_and_without_rtx([_short(device.key)])


def _aliases(device: Device) -> set[str]:
    family = device.key.partition("-")[0]
    more = {"rtxpro6000": ["rtxpro6000blackwell"]}.get(device.key, [])
    return _with_and_without_rtx([_short(device.name), _short(family), *more])


def _cpu() -> Device:
    """This machine's CPU; its speed is not known before it is measured (`roofline.measure_cpu`)."""
    memory = host_memory()
    if memory is None:
        raise QtuneError("Q601", "device 'cpu': this system does not tell its memory; give a size, such as 32GB")
    return Device("cpu", _cpu_name(), "cpu", (0, 0), memory, 0.0, {}, 0.0, 0, 0, HERE, "a CPU has none")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "CPU"


def _here(index: int) -> Device:
    """A GPU of this machine: the catalogue's entry of its name with the memory that it really has."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        has = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU that torch can use"
        raise QtuneError(
            "Q601", f"device 'cuda:{index}': this machine has {has}; name the card to plan for, such as rtx4090"
        )
    seen = torch.cuda.get_device_properties(index)
    memory, source = int(seen.total_memory), f"{HERE}'s cuda:{index}"
    named = [device for device in catalogue().values() if device.name == seen.name]
    if named:
        device = min(named, key=lambda device: abs(device.memory - memory))
        return replace(device, memory=memory, source=f"{source}; {device.source.partition('; memory')[0]}")
    capability, sms = (seen.major, seen.minor), int(seen.multi_processor_count)
    context, whence = context_of("", capability, sms)
    workspace = workspace_of(capability)
    return Device("cuda", seen.name, "cuda", capability, memory, 0.0, {}, 0.0, context, workspace, source, whence, sms)


ASSUMED: Capability = (8, 6)  # of a GPU of which only the memory is given


def _any_gpu(text: str) -> Device:
    """A GPU with that much memory, its context that of the SM 8.6 card with the nearest memory."""
    memory = parse_size(text, "device")
    like = min(
        (device for device in catalogue().values() if device.capability == ASSUMED),
        key=lambda device: (abs(device.memory - memory), -device.context),
    )
    name, context = f"a GPU with {size(memory)} (taken for SM {ASSUMED[0]}.{ASSUMED[1]})", like.context
    source, whence = "the size given; its speed is unknown", f"as {like.key}; {like.context_source}"
    return Device(text, name, "cuda", ASSUMED, memory, 0.0, {}, 0.0, context, workspace_of(ASSUMED), source, whence)
