"""The torch references of the ops: bit-equal to bitsandbytes, right against float64, safe on odd and on huge shapes.

Oracles: bitsandbytes 0.50 on CPU, but for its `dequantize_4bit` where a row is no whole number of blocks (its AVX512
path reads wrong scales there): its torch implementation is the oracle for those. Products: float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_samples import Packed, same
from torch import Tensor

from qtune import backend, ops, tables

KINDS = ("nf4", "fp4")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
qtune = torch.ops.qtune


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references serve every op."""
    monkeypatch.setattr(backend, "kernel", lambda name, device: None)


# ---- inputs that are easy to get wrong


def midpoints(kind: str) -> Tensor:
    """Exact midpoints between neighbouring codes and the floats beside them, at absmax 1."""
    middle = tables.bounds(kind, CPU)[0]
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    values = torch.cat((middle, middle.nextafter(up), middle.nextafter(down), torch.tensor([1.0, -1.0, 0.0, -0.0])))
    return torch.cat((values, values.flip(0), -values)).repeat(3).view(-1, 7)


INPUTS: dict[str, Callable[[str], Tensor]] = {
    "whole blocks": lambda kind: torch.randn(64, 128),
    "rows of a block and a half": lambda kind: torch.randn(48, 96),
    "odd numel": lambda kind: torch.randn(33, 71),
    "three dimensions": lambda kind: torch.randn(3, 5, 67),
    "one row": lambda kind: torch.randn(1, 4097),
    "one column": lambda kind: torch.randn(131, 1),
    "one element": lambda kind: torch.full((1, 1), -0.3),
    "one zero": lambda kind: torch.zeros(1, 1),
    "zero blocks": lambda kind: torch.cat((torch.zeros(5000), torch.randn(300), torch.zeros(123))).view(-1, 1),
    "zeros": lambda kind: torch.zeros(7, 99),
    "negative zeros": lambda kind: -torch.zeros(2, 64),
    "subnormals": lambda kind: torch.randn(70, 33) * 1e-40,
    "about the floor": lambda kind: torch.randn(70, 33) * torch.logspace(-42, -36, 33),
    "huge ranges": lambda kind: torch.randn(64, 65) * torch.logspace(-30, 38, 65),
    "largest values": lambda kind: torch.full((3, 67), torch.finfo(torch.float32).max) * torch.randn(3, 67).sign(),
    "outliers": lambda kind: torch.randn(40, 50).pow(9),
    "midpoints": midpoints,
}


def sample(name: str, kind: str, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return INPUTS[name](kind).clamp(-limit, limit).to(dtype).clamp(-limit, limit)


# ---- 4-bit: packing


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_bitsandbytes(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert same(tables.table(kind, CPU), functional.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INPUTS)
def test_pack_is_bit_equal_to_bitsandbytes(name: str, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    w = sample(name, kind, dtype)
    assert w.isfinite().all()
    for block in (32, 64, 512, 4096):
        codes, absmax = qtune.blockwise4_pack(w, kind, block)
        their_codes, their_absmax = torch.ops.bitsandbytes.quantize_4bit.default(w, block, kind, torch.uint8)
        assert same(codes, their_codes.view(-1)), f"codes, block {block}"
        assert same(absmax, their_absmax), f"absmax, block {block}"


@pytest.mark.parametrize("block", tables.BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_pack_takes_the_nearest_value(kind: str, block: int) -> None:
    """Against an independent search over all 16 values in float64; ties may go either way."""
    w = torch.randn(5, 2 * block + 7)
    codes, absmax = qtune.blockwise4_pack(w, kind, block)
    both = torch.stack((codes >> 4, codes & 15), dim=1).view(-1)[: w.numel()].long()
    scale = absmax.double().repeat_interleave(block)[: w.numel()]
    distance = (w.view(-1, 1).double() - tables.table(kind, CPU).double() * scale[:, None]).abs()
    chosen = distance.gather(1, both[:, None]).squeeze(1)
    assert (chosen <= distance.amin(dim=1) + 1e-6 * scale).all()


# ---- 4-bit: unpacking


def their_unpack(
    codes: Tensor, absmax: Tensor, kind: str, block: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """bitsandbytes' C++ where it is right, else its torch code for other devices (without torch.compile)."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import get_4bit_type

    if shape[-1] % block == 0 and block < 2048:
        return torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, block, kind, shape, dtype)
    return _dequantize_4bit_compute.__wrapped__(codes, absmax, get_4bit_type(kind, device="cpu"), block, shape, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INPUTS)
def test_unpack_agrees_with_bitsandbytes_to_the_last_bit(name: str, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    w = sample(name, kind, torch.float32)
    shape = tuple(w.shape)
    for block in (32, 64, 4096):
        codes, absmax = qtune.blockwise4_pack(w, kind, block)
        ours = qtune.blockwise4_unpack(codes, absmax, None, None, kind, block, shape, dtype)
        theirs = their_unpack(codes, absmax, kind, block, shape, dtype)
        assert same(ours, theirs), f"block {block}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(256, 320), (7, 64), (33, 71), (1, 1), (300, 257)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_unpack_of_double_quantization_agrees_with_bitsandbytes(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(shape), blocksize=64, compress_statistics=True, quant_type=kind
    )
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    offset = state.offset.reshape(1)
    args = (packed.view(-1), state.absmax, state.state2.absmax, offset, kind, 64, shape)
    assert same(ops.block_scales(*args[1:4]), absmax)
    assert same(qtune.blockwise4_unpack(*args, dtype), their_unpack(packed.view(-1), absmax, kind, 64, shape, dtype))


# ---- the signed dynamic 8-bit map


def test_dynamic8_map_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert same(tables.dynamic8(CPU), functional.create_dynamic_map())


def bin_edges() -> Tensor:
    """The edges of all 65536 bins and the floats beside them, in blocks whose absmax is 1 or 0.37."""
    edges = (-1.0 + 2.0 * (torch.arange(65535, dtype=torch.float64) + 0.5) / 65535).float()
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    values = torch.cat((edges, edges.nextafter(up), edges.nextafter(down), edges.nextafter(up).nextafter(up)))
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % 255)).view(-1, 255)
    blocks = torch.cat((torch.ones(blocks.shape[0], 1), blocks), dim=1)
    blocks[1::2] *= 0.37
    return blocks.view(-1)


DYNAMIC8_INPUTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(100_000),
    "one value": lambda: torch.tensor([-0.25]),
    "partial block": lambda: torch.randn(256 * 3 + 17),
    "zero blocks": lambda: torch.cat((torch.zeros(512), torch.randn(256), torch.zeros(300))),
    "centred scales": lambda: (scales := torch.rand(4096) + 0.5) - scales.mean(),
    "many decades": lambda: torch.randn(20_000) * torch.logspace(-12, 12, 20_000)[torch.randperm(20_000)],
    "subnormals": lambda: torch.randn(600) * 1e-40,
    "about the smallest normal": lambda: torch.randn(5000) * torch.logspace(-45, -36, 5000),
    "largest values": lambda: torch.randn(600).sign() * torch.finfo(torch.float32).max,
    "map values": lambda: tables.dynamic8(CPU).clone(),
    "midpoints of the map": lambda: torch.cat(
        ((tables.dynamic8(CPU)[1:] + tables.dynamic8(CPU)[:-1]) / 2, torch.ones(1))
    ),
    "edges of the bins": bin_edges,
}


@pytest.mark.parametrize("name", DYNAMIC8_INPUTS)
def test_dynamic8_pack_is_bit_equal_to_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = DYNAMIC8_INPUTS[name]()
    codes, absmax = qtune.dynamic8_pack(x)
    their_codes, state = functional.quantize_blockwise(x, blocksize=256)
    assert same(absmax, state.absmax)
    wrong = (codes != their_codes).nonzero().view(-1)
    assert not wrong.numel(), f"{wrong.numel()} codes differ, first at {wrong[:5].tolist()}: {x[wrong[:5]].tolist()}"


def test_the_point_of_the_grid_does_not_depend_on_a_fused_multiply_add() -> None:
    """All shares that fp32 can hold: (v + 1) / 2 for v in [-1, 1] is a multiple of 2^-25. fp64 is exact here."""
    for start in range(0, 2**25 + 1, 2**22):
        k = torch.arange(start, min(start + 2**22, 2**25 + 1), dtype=torch.int32)
        exact = k.double() * 2.0**-25
        share = exact.float()
        fused = (share.double() * 65535 + 0.5).float().to(torch.int32)
        held = share.double() == exact
        assert torch.equal((share * 65535 + 0.5).to(torch.int32)[held], fused[held])


def test_tables_do_not_depend_on_the_default_device_or_dtype() -> None:
    """A table is made once and cached: made while a skeleton is built on meta, it must still hold values."""
    functions = (tables.dynamic8, tables.dynamic8_grid)
    before = [f(CPU) for f in functions]
    for f in functions:
        f.cache_clear()
    with torch.device("meta"):
        made = [f(CPU) for f in functions]
    assert all(same(a, b) for a, b in zip(before, made, strict=True))


# ---- int8


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "name", [name for name in INPUTS if name not in ("three dimensions", "subnormals", "about the floor")]
)
def test_int8_pack_is_bit_equal_to_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = sample(name, "nf4", dtype)
    codes, absmax = qtune.int8_pack(w)
    their_codes, their_absmax, _ = functional.int8_vectorwise_quant(w)
    assert same(absmax, their_absmax)
    assert same(codes, their_codes)


def test_int8_pack_of_subnormal_rows_keeps_signs_and_bounds() -> None:
    """127 / absmax overflows: bitsandbytes casts infinity to int8, ours saturates."""
    w = torch.tensor([[1e-40, -1e-40, 0.0], [3e-39, 0.0, -1e-45]])
    codes, absmax = qtune.int8_pack(w)
    assert codes.tolist() == [[127, -127, 0], [127, 0, -127]]
    assert same(absmax, w.abs().amax(dim=1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_unpack_is_the_exact_product_rounded_once(dtype: torch.dtype) -> None:
    codes, absmax = qtune.int8_pack(torch.randn(9, 33))
    exact = (codes.float() * (absmax * ops.INT8_STEP)[:, None]).to(dtype)
    assert same(qtune.int8_unpack(codes, absmax, dtype), exact)
    assert (exact.double() - codes.double() * absmax.double()[:, None] / 127).abs().max() <= 4 * torch.finfo(dtype).eps


# ---- products


FORMS = ("nf4", "fp4", "nf4-double", "fp4-double", "int8")
SHAPES = [
    (64, 128),
    (48, 96),
    (33, 71),
    (1, 257),
    (257, 1),
    (1, 1),
    (130, 64),
    (260, 130),
]  # the last: 529 blocks, 3 nested ones


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of torch in the same dtype, and a few ulps."""
    assert ours.dtype == plain.dtype
    assert ours.shape == exact.shape
    bound = 2 * (plain.double() - exact).abs().max() + 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    assert error <= bound, f"error {error:.3e}, bound {bound:.3e}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poisoned")
def test_matmul(form: str, shape: tuple[int, int], transpose: bool, dtype: torch.dtype) -> None:
    packed = Packed(form, torch.randn(shape) * 0.1)
    w = packed.unpack()
    for lead in ((5,), (2, 3), ()):
        x = torch.randn(*lead, shape[0] if transpose else shape[1]).to(dtype)
        dense = w if transpose else w.T
        ops.arena(w.numel(), dtype, CPU).fill_(torch.nan)  # what an op forgets to write shows
        ours = packed.matmul(x, transpose)
        assert_close(ours, x @ dense.to(dtype), x.double() @ dense.double())
        assert same(ours, packed.matmul(x, transpose)), "the arena's old content must not matter"


def test_int8_matmul_keeps_to_the_range_of_fp16() -> None:
    """Activations of 900 (LLMs have them) times 127 overflow fp16; gradients of 1e-5 times a 127th vanish in it."""
    packed = Packed("int8", torch.randn(32, 256) * 0.05)
    w = packed.unpack()
    x = torch.randn(4, 256).half()
    x[:, 3] = 900
    assert_close(packed.matmul(x, False), x @ w.T.half(), x.double() @ w.T.double())
    dy = (torch.randn(4, 32) * 1e-5).half()
    assert_close(packed.matmul(dy, True) * 2**10, (dy @ w.half()) * 2**10, (dy.double() @ w.double()) * 2**10)
    error = (packed.matmul(dy, True).double() - dy.double() @ w.double()).norm() / (dy.double() @ w.double()).norm()
    assert error < 0.03


def test_products_are_not_the_arena() -> None:
    """A result outlives later calls, also those that grow the arena."""
    small, large = Packed("nf4", torch.randn(8, 64)), Packed("int8", torch.randn(200, 300))
    first = small.matmul(torch.eye(64), False)
    kept = first.clone()
    second = large.matmul(torch.eye(300), False)
    small.matmul(torch.eye(8), True)
    assert same(first, kept)
    assert same(first, small.unpack().T.contiguous())
    assert torch.allclose(second, large.unpack().T, rtol=1e-6)


# ---- rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_equal_the_rows_of_the_unpacked_weight(form: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = Packed(form, torch.randn(shape))
    w = packed.unpack(dtype)
    last = shape[0] - 1
    for ids in (
        torch.arange(shape[0]),
        torch.tensor([[last, 0], [0, last]]),
        torch.tensor(last),
        torch.empty(0, dtype=torch.int64),
    ):
        assert same(packed.rows(ids, dtype), w[ids])
    ids = torch.tensor([last, 0], dtype=torch.int32)
    assert same(packed.rows(ids, dtype), w[ids.long()])


@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
@pytest.mark.parametrize("form", FORMS)
def test_rows_refuse_ids_outside_of_the_table(form: str, wrong: int) -> None:
    """As nn.Embedding does: -100, a label, must not read a row counted from the end."""
    with pytest.raises(IndexError):
        Packed(form, torch.randn(10, 6)).rows(torch.tensor([0, wrong]), torch.float32)


# ---- sizes


@pytest.mark.parametrize("form", FORMS)
def test_chunks_change_no_byte(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, ids = torch.randn(301, 143), torch.randint(0, 301, (4, 700))

    def everything() -> list[Tensor]:
        packed = Packed(form, w)
        tensors = [p for p in packed.parts if isinstance(p, Tensor)]
        x = torch.randn(3, 143, generator=torch.Generator().manual_seed(1))
        return [*tensors, packed.unpack(torch.bfloat16), packed.rows(ids, torch.float16), packed.matmul(x, False)]

    whole = everything()
    monkeypatch.setattr(ops.packed, "CHUNK", 4096)  # 11 chunks, none of which ends with a row
    chunked = everything()
    assert len(whole) == len(chunked)
    assert all(same(a, b) for a, b in zip(whole, chunked, strict=True))


@pytest.mark.parametrize("block", [64, 4096])
def test_chunks_of_odd_ends(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk may be less than a block, and a single value."""
    for n in (4096, 4097, 8192 - 1, 8192 + 1, 8192 + 63):
        w = torch.randn(n)
        monkeypatch.setattr(ops.packed, "CHUNK", 1 << 22)
        whole = qtune.blockwise4_pack(w, "nf4", block)
        out = qtune.blockwise4_unpack(*whole, None, None, "nf4", block, (n,), torch.float32)
        monkeypatch.setattr(ops.packed, "CHUNK", 4096)
        assert all(same(a, b) for a, b in zip(whole, qtune.blockwise4_pack(w, "nf4", block), strict=True))
        assert same(out, qtune.blockwise4_unpack(*whole, None, None, "nf4", block, (n,), torch.float32))


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[Callable[[int, torch.dtype], Tensor]]:
    """Tensors of zeros over files with holes: gigabytes of addresses, and only the touched pages in memory."""

    def make(numel: int, dtype: torch.dtype) -> Tensor:
        path = tmp_path / f"{numel}"
        with path.open("wb") as file:
            file.truncate(numel * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)

    yield make
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rows_beyond_two_to_the_31(index: torch.dtype, sparse: Callable[[int, torch.dtype], Tensor]) -> None:
    rows, width, block = (1 << 17) + 4, 1 << 14, 4096
    codes = sparse(rows * width // 2, torch.uint8)
    absmax = torch.ones(rows * width // block)
    target = (1 << 17) + 2
    place = target * width
    assert place > 2**31
    codes[place // 2 : (place + width) // 2] = torch.arange(width // 2).to(torch.uint8)
    absmax[place // block] = 3.0
    got = qtune.blockwise4_rows(
        torch.tensor([target, 0], dtype=index), codes, absmax, None, None, "nf4", block, (rows, width), torch.float32
    )
    want = tables.pairs("nf4", CPU)[torch.arange(width // 2) % 256].view(-1)
    want[:block] *= 3.0
    assert same(got[0], want)
    assert (got[1] == -1.0).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_int8_rows_beyond_two_to_the_31(index: torch.dtype, sparse: Callable[[int, torch.dtype], Tensor]) -> None:
    rows, width = (1 << 17) + 4, 1 << 14
    codes = sparse(rows * width, torch.int8).view(rows, width)
    codes[rows - 1] = torch.arange(width).remainder(255).sub(127).to(torch.int8)
    got = qtune.int8_rows(torch.tensor([rows - 1], dtype=index), codes, torch.full((rows,), 127.0), torch.float32)
    assert torch.allclose(got[0], codes[rows - 1].float())


# ---- which implementation serves


def test_fp64_is_served_by_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient checks run on any machine: no kernel takes fp64."""
    monkeypatch.setattr(backend, "kernel", lambda name, device: pytest.fail(f"a kernel was asked for {name} in fp64"))
    w = torch.randn(6, 70, dtype=torch.float64)
    codes, absmax = qtune.blockwise4_pack(w, "nf4", 64)
    args = (codes, absmax, None, None, "nf4", 64, (6, 70))
    dense = qtune.blockwise4_unpack(*args, torch.float64)
    x = torch.randn(3, 70, dtype=torch.float64)
    assert torch.allclose(qtune.blockwise4_matmul(x, *args, False), x @ dense.T, rtol=1e-12)
    assert same(qtune.blockwise4_rows(torch.arange(6), *args, torch.float64), dense)


def test_a_kernel_serves_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def kernel(name: str, device: str) -> Callable[..., Any]:
        asked.append((name, device))
        return lambda x: (torch.full_like(x, 7, dtype=torch.uint8), x.new_zeros(1))

    monkeypatch.setattr(backend, "kernel", kernel)
    assert qtune.dynamic8_pack(torch.zeros(3))[0].tolist() == [7, 7, 7]
    assert asked == [("dynamic8_pack", "cpu")]


@pytest.mark.parametrize("form", ["nf4-double", "int8"])
def test_a_product_that_never_unpacks_is_asked_first(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = Packed(form, torch.randn(6, 70)), torch.randn(3, 70)
    plain = packed.matmul(x, False)
    name = "int8_matmul_fused" if form == "int8" else "blockwise4_matmul_fused"
    for answer in (torch.full((3, 6), 7.0), None):  # None: not for that many tokens
        monkeypatch.setattr(backend, "kernel", lambda n, d, a=answer: (lambda *_: a) if n == name else None)
        assert torch.equal(packed.matmul(x, False), plain if answer is None else answer)
