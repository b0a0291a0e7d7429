"""Products of a packed W that is unpacked a tile of rows at a time: every packed scheme against float64, and what they
take beside their results against torch's allocator and against what is declared."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from qtune import backend
from qtune.loss import cross_entropy_sum
from qtune.ops import packed as packed_ops
from qtune.ops import product
from qtune.ops.registry import SCRATCH
from qtune.quant import QuantLinear, Scheme, scheme_from

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES: list[Any] = [
    "nf4", {"name": "nf4", "block": 32, "double": False}, {"name": "fp4", "block": 4096}, "int8",
    "int4", {"name": "int3", "group": 32}, "nf3", {"name": "nf2", "group": 32, "double": False},
]  # fmt: skip
OPS = {"int8": "int8_matmul", "nf4": "blockwise4_matmul", "fp4": "blockwise4_matmul"}
every = pytest.mark.parametrize("scheme", [scheme_from(s) for s in SCHEMES], ids=str)


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel multiplies without unpacking, and the arena is new."""
    monkeypatch.setattr(packed_ops, "without_unpacking", lambda *_: None)
    monkeypatch.setattr(product, "_arenas", product._Arenas())


def arena_of(dtype: torch.dtype) -> Tensor:
    return product._arenas.buffers[dtype, torch.device("cpu"), 0]


def lcm_rows(scheme: Scheme, width: int) -> int:
    """Rows at which a block of codes, and one of quantized scales, ends; by counting."""
    block, double = getattr(scheme, "block", None), getattr(scheme, "double", False)
    for rows in range(1, 2000):
        if block is not None and rows * width % (block * (256 if double else 1)) == 0:
            return rows
        if block is None and (not double or rows * -(width // -scheme.group) % 256 == 0):  # type: ignore[attr-defined]
            return rows
    return 2000  # more than there are


@every
@pytest.mark.parametrize("width", [96, 71, 128])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.usefixtures("poisoned")
def test_tiles_are_the_whole(scheme: Scheme, width: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(backend, "kernel", lambda name, device: None)
    height = 1100
    w = torch.randn(height, width) * 0.1
    parts = scheme.pack(w)
    dense = scheme.unpack(parts, (height, width), torch.float32)
    step = 1 if scheme.name == "int8" else lcm_rows(scheme, width)
    monkeypatch.setattr(product, "TILE", 40_000)
    rows = height if step >= height else min(height, max(1, 40_000 // (width * step)) * step)
    for dtype in FLOATS if width == 96 else FLOATS[:2]:
        for transpose in (False, True):
            x = torch.randn(2, 3, height if transpose else width).to(dtype)
            plain, exact = (
                (x.to(t) @ (dense if transpose else dense.T).to(t)).double() for t in (dtype, torch.float64)
            )
            ours = scheme.matmul(x, parts, (height, width), transpose)
            assert ours.dtype == dtype and ours.shape == exact.shape and ours.is_contiguous()
            bound = 2 * (plain - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
            assert (ours.double() - exact).abs().max() <= bound
            assert arena_of(dtype).numel() == rows * width
            arena_of(dtype).fill_(torch.nan)
            assert torch.equal(scheme.matmul(x, parts, (height, width), transpose), ours)
    assert scheme.name == "fp4" or width == 71 or rows < height, "several tiles are meant here"


@every
def test_a_low_rank_part_and_few_rows_of_x_at_a_time(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = 1030, 96
    parts = scheme.pack(torch.randn(shape) * 0.1)
    dense = scheme.unpack(parts, shape, torch.float64)
    monkeypatch.setattr(product, "TILE", 2_000)  # sums of six rows of x at a time
    for transpose in (False, True):
        x, inner = torch.randn(20, shape[not transpose]).bfloat16(), torch.randn(20, 4).bfloat16()
        factor = torch.randn(4, shape[1]).bfloat16() if transpose else torch.randn(shape[0], 4).bfloat16()
        ours = scheme.matmul(x, parts, shape, transpose, inner, factor).double()
        both = dense if transpose else dense.T, (factor if transpose else factor.T)
        exact = x.double() @ both[0].double() + inner.double() @ both[1].double()
        plain = x @ both[0].bfloat16() + inner @ both[1]
        assert (ours - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + 2**-6 * exact.abs().max()


@pytest.mark.parametrize("scheme", [*SCHEMES, "dense"], ids=str)
def test_the_loss_is_taken_in_the_place_of_the_logits(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed head in tiles, as large vocabularies have it: autograd refuses writes to a Function's result where it
    is a view of something else."""
    monkeypatch.setattr(product, "TILE", 4_000)
    found = {}
    for name in (scheme, {"name": "dense", "dtype": "float32"}):
        head = QuantLinear(32, 1030, scheme_from(name), bias=False, dtype=torch.float32)
        weight = torch.randn(1030, 32, generator=torch.Generator().manual_seed(0))
        head.set_weight(weight if name is scheme else found["weight"])
        found["weight"] = head.dequantize(torch.float32)
        hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
        labels = torch.arange(18).view(2, 9)
        loss = cross_entropy_sum(hidden, labels, head, 1030, lambda logits: logits)
        loss.backward()
        found[str(name)] = loss.detach(), hidden.grad
    packed, dense = (found[key] for key in found if key != "weight")
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)


def test_a_sum_over_many_tiles_is_not_rounded_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the product of one tile is rounded too, the error grows as the root of two, however many tiles there are;
    sums in bf16 would be six times as far away."""
    scheme, shape = scheme_from("int8"), (4096, 64)
    parts = scheme.pack(torch.randn(shape))
    dense, x = scheme.unpack(parts, shape, torch.float64), torch.randn(64, 4096).bfloat16()
    exact = x.double() @ dense
    whole = (scheme.matmul(x, parts, shape, True).double() - exact).norm()
    monkeypatch.setattr(product, "TILE", 64 * 64)  # 64 tiles, one row of x less than all at a time
    assert (scheme.matmul(x, parts, shape, True).double() - exact).norm() < 2 * whole


@pytest.mark.parametrize("name", ["nf4", "int8", "nf3"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_product_takes_is_what_it_declares(
    name: str, transpose: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is a tile, not W: a head of many rows costs what a few of them do."""
    monkeypatch.setattr(product, "TILE", 1 << 18)
    monkeypatch.setattr(backend, "scratch", lambda name, device: None)
    scheme, shape = scheme_from(name), (8192, 256)
    parts = scheme.pack(torch.randn(shape))
    x = torch.randn(40, shape[not transpose]).to(dtype)
    declared: list[dict[str, int]] = []
    peak, kept = taken(lambda: scheme.matmul(x, parts, shape, transpose))
    own = SCRATCH[OPS.get(name, "grouped_matmul")]
    arguments = own_arguments(scheme, parts, shape, transpose)
    declared.append(own("cpu", x, *arguments))
    arena, temporary = declared[0][f"arena {dtype}"], declared[0].get("temporary", 0)
    assert arena == (1 << 18) * dtype.itemsize == kept
    result = 40 * shape[transpose] * dtype.itemsize
    assert arena + temporary + result <= peak + 4096  # nothing is declared that is not taken
    scales = 8192 * 4 * 4  # the reference undoes double quantization, or scales rows, a tile at a time
    onednn = arena + 8192 if dtype == torch.bfloat16 else 0  # lays a bf16 operand out anew, whoever multiplies
    assert peak <= arena + temporary + result + scales + onednn
    assert peak < 8192 * 256 * dtype.itemsize


def own_arguments(scheme: Any, parts: dict[str, Tensor], shape: tuple[int, int], transpose: bool) -> tuple[Any, ...]:
    """The arguments of a scheme's op behind x."""
    if scheme.name == "int8":
        return parts["codes"], parts["absmax"], transpose
    rest = scheme._scales(parts) if hasattr(scheme, "_scales") else scheme._parts(parts)
    return (*rest, shape, transpose)


def taken(run: Any) -> tuple[int, int]:
    """Most bytes alive by the allocator's events, and those of the arena, in a thread that has none yet."""
    changes: list[tuple[int, int]] = []

    def work() -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            kept.append(run())
        (buffer,) = product._arenas.buffers.values()
        kept.append(buffer.untyped_storage().nbytes())
        assert seen.profiler is not None and seen.profiler.kineto_results is not None
        events = seen.profiler.kineto_results.events()
        changes.extend((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")

    kept: list[Any] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    live = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        live += nbytes
        peak = max(peak, live)
    return peak, kept[1]
