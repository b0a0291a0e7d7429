"""The planner's devices: sizes that people type, the catalogue against printed figures, names, the time estimate."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtune.errors import QtuneError
from qtune.planner import devices, roofline
from qtune.planner.devices import GIB, MIB, Device, catalogue, devices_table, find_device, workspace_of, workspaces
from qtune.planner.roofline import Cost, Speed, estimate
from qtune.units import parse_size

# ---- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("7.5gib", 15 * 2**29),
        ("8.7 gB", 8_700_000_000),
        (" 1kb ", 1000),
        ("1 KiB", 1024),
        ("512 B", 512),
        (".5 MiB", 2**19),
        ("2TB", 2 * 10**12),
        ("1.TiB", 2**40),
        ("+3MB", 3 * 10**6),
        ("1.9B", 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["24gbs", "8g", "", "GB", "1e3GB", "inf GB", "nan GB", "1,5GB", "1..5GB", "2 4GB", True]
)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(QtuneError, match=r"budget '.*' (is not a size|has the unknown unit).*kB, MB, GB, TB, KiB, MiB"):
        parse_size(text, "budget")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("8", "no unit"),
        (8, "no unit"),
        ("-3GB", "below one byte"),
        ("0GiB", "below"),
        ("0.2B", "below"),
        ("9" * 40 + "TB", "large"),
    ],
)
def test_sizes_out_of_range(text: Any, why: str) -> None:
    with pytest.raises(QtuneError, match=why):
        parse_size(text)


# ---- the catalogue

# Dense, fp32 sums: fp16 tensor TFLOPS and fp32 TFLOPS as NVIDIA prints them
PRINTED = {
    "rtx2080ti": (53.8, 13.4),  # Turing whitepaper
    "rtx3070": (40.6, 20.3),  # GA102 whitepaper
    "rtx3080": (59.5, 29.8),
    "rtx3090": (71, 35.6),
    "rtx4080": (97.5, 48.7),  # Ada whitepaper
    "rtx4090": (165.2, 82.6),
    "rtx4060ti-8g": (44.1, 22.1),
    "rtx5070": (61.7, 30.9),  # RTX Blackwell whitepaper
    "rtx5070ti": (87.9, 43.9),
    "rtx5080": (112.6, 56.3),
    "rtx5090": (209.5, 104.8),
    "t4": (65, 8.1),  # datasheets from here
    "v100-16g": (125, 15.7),
    "a10": (125, 31.2),
    "a100-80g": (312, 19.5),
    "l4": (121, 30.3),
    "l40s": (362, 91.6),
    "rtxa4000": (76.7, 19.2),
    "rtxa6000": (154.8, 38.7),
    "rtx6000ada": (364.2, 91.1),
    "h100-sxm": (989.4, 66.9),
    "h100-pcie": (756, 51.2),
    "h200": (989.4, 66.9),
    "b200": (2250, 75),
}
NOMINAL = {  # GB that the box says, where the key does not
    key: gb
    for gb, keys in {
        6: "rtx2060",
        8: "rtx3060ti rtx3070 rtx4060",
        10: "rtx3080",
        11: "rtx2080ti",
        12: "rtx3060 rtx4070 rtx5070",
        16: "rtx4070tisuper rtx4080 rtx5070ti rtx5080 t4 rtxa4000",
        24: "rtx3090 rtx3090ti rtx4090 a10 a10g l4 rtxa5000",
        32: "rtx5090",
        48: "l40s rtxa6000 rtx6000ada",
        80: "h100-pcie h100-sxm",
        96: "rtxpro6000",
        141: "h200",
        192: "b200",
    }.items()
    for key in keys.split()
}


@pytest.mark.parametrize("device", catalogue().values(), ids=lambda device: device.key)
def test_entries_are_sane(device: Device) -> None:
    suffix = device.key.rpartition("-")[2]
    nominal = int(suffix[:-1]) if suffix[:-1].isdigit() else NOMINAL[device.key]
    assert 0.9 * nominal * GIB < device.memory <= nominal * GIB
    assert device.kind == "cuda" and device.name.startswith(("NVIDIA ", "Tesla "))
    assert 250e9 < device.bandwidth < 9e12 and 12e9 < device.link < 60e9
    assert set(device.flops) == {"bfloat16", "float16", "float32"}
    assert device.flops["float16"] >= 2 * device.flops["float32"] > 5e12
    assert (device.flops["bfloat16"] == device.flops["float32"]) == (device.capability < (8, 0))
    assert 0.7 < device.flops["float32"] / device.sms / 128 / 2 / 1e9 * (2 if device.capability <= (8, 0) else 1) < 2.7
    assert 100 * MIB < device.context < 700 * MIB and device.context < 0.05 * device.memory
    assert "NVIDIA" in device.source and device.context_source.startswith(("measured: ", "not measured: "))
    assert hash(device) == hash(catalogue()[device.key])


def test_throughput_is_what_nvidia_prints() -> None:
    known = catalogue()
    for key, (half, single) in PRINTED.items():
        assert known[key].flops["float16"] == pytest.approx(half * 1e12, rel=0.01), key
        # Hopper's and B200's fp32 is printed at a higher clock than their tensor throughput
        assert known[key].flops["float32"] == pytest.approx(single * 1e12, rel=0.1), key


def test_contexts() -> None:
    """Measured where it was; else the highest rate per SM of the same capability, or of the nearest one."""
    known = catalogue()
    assert known["t4"].context == int(140.875 * MIB) and known["a100-80g"].context == 414 * MIB
    assert known["rtx3090"].context == pytest.approx(82 * 210 / 48 * MIB, abs=1)
    assert "rtxa4000" in known["rtx3090"].context_source
    assert known["h100-sxm"].context == pytest.approx(132 * 414 / 108 * MIB, abs=1)
    assert "SM 8.0, the nearest" in known["h100-sxm"].context_source
    for key, (mib, _) in devices.MEASURED.items():  # the rate never falls below a measurement of the capability
        rate = devices.context_of("", known[key].capability, known[key].sms)[0]
        assert rate >= int(mib * MIB) - 1, key
    assert devices.context_of("", (6, 1), 28)[0] == devices.context_of("", (7, 5), 28)[0] > 0
    assert devices.context_of("", (13, 0), 100)[0] == devices.context_of("", (12, 0), 100)[0]


def test_workspaces() -> None:
    assert {workspace_of(c) for c in ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9))} == {8_519_680}
    assert {workspace_of(c) for c in ((9, 0), (10, 0), (12, 0))} == {32 * MIB}
    assert workspaces(catalogue()["rtx4090"]) == 2 * 8_519_680  # the caller's thread and autograd's
    assert workspaces(catalogue()["h100-sxm"], threads=1) == 32 * MIB


def test_table() -> None:
    rows = {row["key"]: row for row in devices_table()}
    assert set(rows) == set(catalogue()) and len(rows) >= 32
    assert rows["rtx4090"]["bf16 TFLOPS"] == "165" and rows["rtx4090"]["memory"] == "23.61 GiB"


# ---- names


@pytest.mark.parametrize("device", catalogue().values(), ids=lambda device: device.key)
def test_keys_and_names_are_found(device: Device) -> None:
    for text in (device.key, device.key.upper(), device.key.replace("-", " "), f" {device.key} "):
        assert find_device(text) == device
    same = [other for other in catalogue().values() if other.name == device.name]
    if len(same) == 1:
        assert find_device(device.name) == find_device(device.name.lower()) == device


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("nvidia geforce rtx 4090", "rtx4090"),
        ("GeForce-RTX-4090", "rtx4090"),
        ("3090", "rtx3090"),
        ("3090 Ti", "rtx3090ti"),
        ("rtx 3090ti", "rtx3090ti"),
        ("4060 Ti 16GB", "rtx4060ti-16g"),
        ("4070 ti super", "rtx4070tisuper"),
        ("A100 80GB", "a100-80g"),
        ("a100-40g", "a100-40g"),
        ("V100 32 GB", "v100-32g"),
        ("nvidia t4", "t4"),
        ("A6000", "rtxa6000"),
        ("RTX 6000 Ada", "rtx6000ada"),
        ("RTX PRO 6000 Blackwell", "rtxpro6000"),
        ("H100 SXM", "h100-sxm"),
    ],
)
def test_forgiving_names(text: str, key: str) -> None:
    assert find_device(text).key == key


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("a100", ["a100-40g", "a100-80g"]),
        ("V100", ["v100-16g", "v100-32g"]),
        ("nvidia h100", ["h100-pcie", "h100-sxm"]),
        ("RTX 4060 Ti", ["rtx4060ti-8g", "rtx4060ti-16g"]),
    ],
)
def test_ambiguous_names(text: str, keys: list[str]) -> None:
    with pytest.raises(QtuneError, match="say which: " + " or ".join(repr(key) for key in keys)):
        find_device(text)


@pytest.mark.parametrize("text", ["rtx4091", "gtx 1080", "", " ", "nvidia", "rtx", "l40", "9999ti", "8", "cuda:x", "."])
def test_unknown_names(text: str) -> None:
    with pytest.raises(QtuneError, match="unknown device .*legal: a10, a100-40g.*v100-32g; or cpu, cuda, .* 24GB"):
        find_device(text)


def test_unknown_names_show_the_nearest() -> None:
    with pytest.raises(QtuneError, match="did you mean 'rtx4090'"):
        find_device("rtx4091")
    with pytest.raises(QtuneError, match="device '24gbs' has the unknown unit 'gbs'; .*GiB"):
        find_device("24gbs")
    with pytest.raises(QtuneError, match="device '-8GB' is below"):
        find_device("-8GB")


def test_a_size_is_a_device() -> None:
    device = find_device("8 GiB")
    assert device.kind == "cuda" and device.memory == 8 * GIB and device.capability == (8, 6)
    assert "8.00 GiB" in device.name and "8.6" in device.name
    assert device.context == catalogue()["rtx3070"].context and "rtx3070" in device.context_source
    assert find_device("24GB").memory == 24 * 10**9 and find_device("24GB").context == catalogue()["a10g"].context
    assert device.workspace == 8_519_680 and not device.flops and not device.bandwidth


def test_cpu() -> None:
    device = find_device("CPU")
    assert (device.kind, device.capability, device.context, workspaces(device)) == ("cpu", (0, 0), 0, 0)
    assert device.memory > 2**28 and device.name and not device.flops


def gpus(monkeypatch: pytest.MonkeyPatch, *properties: SimpleNamespace) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(properties))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])


def test_no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch)
    with pytest.raises(QtuneError, match="device 'cuda:0': this machine has no GPU.*rtx4090"):
        find_device("cuda")


def test_gpus_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of the catalogue with its real memory; of two with one name, the one nearest in memory; an unknown one."""
    ti = SimpleNamespace(name="NVIDIA GeForce RTX 4060 Ti", total_memory=15_900 * MIB, major=8, minor=9)
    new = SimpleNamespace(name="NVIDIA X1", total_memory=50 * GIB, major=9, minor=0, multi_processor_count=100)
    gpus(monkeypatch, ti, new)
    device = find_device("cuda")
    assert device.key == "rtx4060ti-16g" and device.memory == 15_900 * MIB and device.flops["bfloat16"] > 44e12
    assert "cuda:0" in device.source and "memory" not in device.source
    device = find_device("CUDA:1")
    assert (device.name, device.memory, device.capability, device.sms) == ("NVIDIA X1", 50 * GIB, (9, 0), 100)
    assert device.context == int(100 * 414 / 108 * MIB) and device.workspace == 32 * MIB and not device.flops
    with pytest.raises(QtuneError, match="device 'cuda:2': this machine has 2 GPUs"):
        find_device("cuda:2")


# ---- time

RTX4090 = catalogue()["rtx4090"]


def seconds(costs: list[Cost], device: Device = RTX4090, tokens: int = 1) -> float:
    speed = estimate(costs, device, tokens)
    assert speed.seconds is not None, speed.reason
    return speed.seconds


def test_roofline_laws() -> None:
    mm = Cost("mm", "bfloat16", 10**13, 10**9, 0)
    assert seconds([mm]) == pytest.approx(1e13 / 0.7 / 165.15e12, rel=1e-3)
    assert seconds([replace(mm, flops=2 * mm.flops)]) == pytest.approx(2 * seconds([mm]))
    assert seconds([replace(mm, nbytes=2 * mm.nbytes)]) == seconds([mm])  # bound by compute
    copy = Cost("elementwise", "float32", 10, 10**11, 0)
    assert seconds([copy]) == pytest.approx(1e11 / 0.85 / 1008e9)
    assert seconds([replace(copy, nbytes=2 * copy.nbytes)]) == pytest.approx(2 * seconds([copy]))
    assert seconds([mm, copy]) == pytest.approx(seconds([mm]) + seconds([copy]))
    assert seconds([replace(mm, count=1000)]) - seconds([mm]) == pytest.approx(5e-3)
    assert seconds([Cost("elementwise", "bfloat16", 10**13, 1, 0)]) == pytest.approx(1e13 / RTX4090.flops["float32"])


@pytest.mark.parametrize("device", catalogue().values(), ids=lambda device: device.key)
def test_never_faster_than_the_device(device: Device) -> None:
    for op in ("mm", "attention", "unpack", "elementwise", "optimizer"):
        for dtype in ("bfloat16", "float16", "float32"):
            took = seconds([Cost(op, dtype, 10**14, 10**10, 3)], device)
            assert took > 1e14 / max(device.flops.values()) and took > 1e10 / device.bandwidth


def test_what_a_speed_says() -> None:
    costs = [Cost("mm", "bfloat16", 10**14, 10, 2), Cost("elementwise", "bfloat16", 0, 10**11, 5)]
    speed = estimate(costs, RTX4090, 4096, 100)
    assert speed.seconds is not None and speed.run_seconds == 100 * speed.seconds and not speed.reason
    assert speed.tokens_per_second == 4096 / speed.seconds
    assert list(speed.shares) == ["mm", "elementwise"] and sum(speed.shares.values()) == pytest.approx(1)
    assert speed.bound == "compute"
    assert estimate(costs[1:], RTX4090, 1).bound == "memory bandwidth"
    assert estimate([Cost("elementwise", "bfloat16", 0, 10, 10**6)], RTX4090, 1).bound == "launches"
    assert estimate(costs, RTX4090, 1).run_seconds is None
    text = "\n".join(speed.assumptions)
    assert "165.2 TFLOPS in bfloat16" in text and "1008 GB/s" in text and "70%" in text and "85%" in text
    assert "5 us a launch" in text and roofline.ANCHORS in text
    turing = "\n".join(estimate(costs, catalogue()["t4"], 1).assumptions)
    assert "emulated" in turing and "throttles" in turing and "emulated" not in text


def test_no_guessed_speed() -> None:
    costs = [Cost("mm", "bfloat16", 10**12, 10**9, 1)]
    for device in (find_device("8GB"), find_device("cpu"), replace(RTX4090, bandwidth=0.0)):
        speed = estimate(costs, device, 1)
        assert speed == Speed(reason=speed.reason) and device.name in speed.reason and "not known" in speed.reason
    assert "float64 throughput" in estimate([Cost("mm", "float64", 1, 1, 1)], RTX4090, 1).reason
    assert "nothing to compute" in estimate([], RTX4090, 1).reason
    assert "nothing to compute" in estimate(costs, RTX4090, 0).reason


def test_cpu_speed_is_measured() -> None:
    start = time.monotonic()
    device = roofline.measured(find_device("cpu"))
    assert time.monotonic() - start < 5  # about 0.2 s on a quiet machine
    assert 1e8 < device.flops["bfloat16"] < 1e14 and 1e8 < device.bandwidth < 1e12
    speed = estimate([Cost("mm", "bfloat16", 10**9, 10, 0)], device, 1)
    assert speed.seconds == pytest.approx(1e9 / device.flops["bfloat16"])  # measured rates count whole
    assert "measured here and now" in speed.assumptions[0] and roofline.ANCHORS not in speed.assumptions


LLAMA_8B = (32, 4096, 14336, 1024, 128256)  # layers, hidden, MLP, width of k and v, vocabulary
LLAMA_7B = (32, 4096, 11008, 4096, 32000)
LLAMA_3B = (28, 3072, 8192, 1024, 128256)


def by_hand(model: tuple[int, ...], tokens: int, seq: int, adapter: float, *, packed: bool) -> list[Cost]:
    """A step with checkpointing: 6 FLOP a frozen parameter and token (forward, again, gradient of x), 8 an adapter's
    one, 4 the head's; causal attention 6 L s h, half more for the second forward. Fused elementwise kernels move a
    layer's 12.5 h + 3 f values in each of four passes; a packed weight is unpacked three times (0.516 + 2 bytes)."""
    layers, h, f, kv, vocabulary = model
    linear = layers * (2 * h * h + 2 * h * kv + 3 * h * f)
    products = int(tokens * (6 * linear + 4 * vocabulary * h + 8 * adapter))
    moved = int(tokens * layers * 4 * 2 * (12.5 * h + 3 * f))
    return [
        Cost("mm", "bfloat16", products, 0, layers * 7 * 3),
        Cost("attention", "bfloat16", int(tokens * 6 * layers * seq * h * 1.5), 0, layers * 3),
        Cost("elementwise", "bfloat16", 0, moved, layers * 60),
        Cost("unpack", "bfloat16", 0, int(3 * 2.516 * linear) if packed else 0, layers * 7 * 3 * packed),
    ]


# published tokens per second; adapters by their rank on all linear layers
FUSED = [
    ("rtx4090", by_hand(LLAMA_8B, 4096, 2048, 20e6, packed=True), 4096, 2413),  # torchtune README, QLoRA r8
    ("rtx4090", by_hand(LLAMA_8B, 4096, 2048, 20e6, packed=False), 4096, 3083),  # LoRA r8
    ("a100-80g", by_hand(LLAMA_3B, 8192, 4096, 97e6, packed=True), 8192, 8035),  # QLoRA r64
    ("a100-80g", by_hand(LLAMA_3B, 8192, 4096, 97e6, packed=False), 8192, 8210),  # LoRA r64
    ("a100-80g", by_hand(LLAMA_7B, 4096, 1024, 20e6, packed=True), 4096, 3726),  # LLaMA-Factory wiki, Unsloth 4-bit
    ("a100-80g", by_hand(LLAMA_7B, 4096, 1024, 20e6, packed=False), 4096, 4007),  # Unsloth 16-bit
]
STOCK = [
    ("a100-80g", by_hand(LLAMA_7B, 4096, 1024, 20e6, packed=True), 4096, 2415),  # LLaMA-Factory wiki, HF 4-bit
    ("a100-80g", by_hand(LLAMA_7B, 4096, 1024, 20e6, packed=False), 4096, 2954),  # HF + FlashAttention, 16-bit
]


def ratios(runs: list[tuple[str, list[Cost], int, int]]) -> list[float]:
    return [tokens / seconds(costs, catalogue()[key], tokens) / published for key, costs, tokens, published in runs]


def test_published_runs() -> None:
    """The estimate against what others measured; the assumptions state the very range."""
    fused, stock = ratios(FUSED), ratios(STOCK)
    assert f"{min(fused):.2f} to {max(fused):.2f} times" in roofline.ANCHORS
    assert f"{min(stock):.1f} to {max(stock):.1f} times" in roofline.ANCHORS
    assert min(fused) > 0.7 and max(fused) < 1.35, fused
