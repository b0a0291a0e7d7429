"""Methods of high rank against dense float64 computations written from their papers, and the ranks that these state."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.adapters import METHODS, Adapted, AdapterSpec, Source, adapt
from qtune.adapters.tera import modes
from qtune.errors import QtuneError
from qtune.quant import Dense, QuantLinear

SHAPES = [(24, 24), (33, 76), (76, 33), (29, 31)]  # out, in
FP64 = torch.float64


def layer(out: int, width: int, rank: int | None = None, bias: bool = True) -> QuantLinear:
    """A dense base with a bias; with `rank`, of this rank."""
    base = QuantLinear(width, out, Dense("float32"), bias=bias, dtype=torch.float32, name="layer")
    weight = torch.randn(out, width)
    if rank is not None:
        weight = torch.randn(out, rank) @ torch.randn(rank, width)
    base.set_weight(weight / width**0.5)
    if base.bias is not None:
        base.bias.data.normal_()
    return base


def on(base: QuantLinear, method: str, *, stirred: bool = True, **options: Any) -> Adapted:
    """An adapter on one layer, far from its start."""
    model = nn.Module()
    model.layer = base
    source = Source(base.dequantize())
    site = adapt(model, AdapterSpec(method, ("layer",), options), {"layer": source}, seed=3)["layer"]
    for p in site.adapter.parameters() if stirred else ():
        p.data += torch.randn(p.shape)
    return site


def delta(site: Adapted) -> Tensor:
    """What the adapter adds to the weight, by what the forward does to the identity, in float64."""
    base, adapter = site.base, site.adapter.double()
    eye = torch.eye(base.in_features, dtype=FP64)
    wide = QuantLinear(base.in_features, base.out_features, Dense("float32"), bias=False, dtype=torch.float32)
    wide.set_weight(base.dequantize())
    with torch.no_grad():
        return adapter(eye, wide).T - wide(eye).T


def rank(matrix: Tensor) -> int:
    """The number of singular values above 1e-9 of the largest."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > 1e-9 * values[0]).sum())


def count(site: Adapted) -> int:
    return sum(p.numel() for p in site.adapter.parameters() if p.requires_grad)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))


def parts(size: int, count: int) -> list[slice]:
    """`size` cut into `count` parts, the first ones longer by one."""
    short, longer = divmod(size, count)
    edges = [0]
    for n in range(count):
        edges.append(edges[-1] + short + (n < longer))
    return [slice(a, b) for a, b in pairwise(edges)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(8)


# ---- HyperAdapt


@pytest.mark.parametrize("shape", SHAPES)
def test_hyperadapt_is_two_diagonals(shape: tuple[int, int]) -> None:
    site = on(layer(*shape), "hyperadapt")
    a, b, W = site.adapter.a.double(), site.adapter.b.double(), site.base.dequantize().double()
    same(delta(site), torch.diag(a) @ W @ torch.diag(b) - W)
    assert count(site) == sum(shape)
    assert site.merged()[1].equal(site.base.bias), "the bias is not scaled"


@pytest.mark.parametrize(("of_weight", "expected"), [(1, 2), (5, 10), (None, 29)])
def test_hyperadapts_rank_is_twice_the_weights(of_weight: int | None, expected: int) -> None:
    base = layer(29, 31)
    exact = torch.randn(29, of_weight or 29, dtype=FP64) @ torch.randn(of_weight or 29, 31, dtype=FP64)
    site = on(base, "hyperadapt")
    a, b = site.adapter.a.detach().double(), site.adapter.b.detach().double()
    assert rank(a.unsqueeze(1) * exact * b - exact) == expected
    if of_weight is None:
        assert rank(delta(site)) == expected


def test_hyperadapts_scales_are_finer_than_bf16() -> None:
    site = on(layer(24, 24), "hyperadapt", stirred=False).bfloat16()
    assert {p.dtype for p in METHODS["hyperadapt"](layer(4, 4)).parameters()} == {torch.float32}
    site.adapter.float().a.data += 0.003
    x = torch.ones(1, 24, dtype=torch.bfloat16)
    change = (site(x).double() - site.base(x).double()).abs().sum()
    assert change > 0, "1.003 is 1 in bf16"


# ---- DiaBlo


@pytest.mark.parametrize("blocks", [1, 4, 7, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_diablo_is_a_block_diagonal(shape: tuple[int, int], blocks: int) -> None:
    """Also where nothing divides: each input and each output is in one block."""
    site = on(layer(*shape), "diablo", blocks=blocks)
    out, width = shape
    number = min(blocks, out, width)
    expected = torch.zeros(shape, dtype=FP64)
    sides = zip(parts(out, number), parts(width, number), strict=True)
    for block, (rows, columns) in zip(site.adapter.blocks.double(), sides, strict=True):
        expected[rows, columns] = block[: rows.stop - rows.start, : columns.stop - columns.start]
    same(delta(site), expected)
    assert rank(expected) == sum(min(b - a, d - c) for a, b, c, d in edges(out, width, number))
    if out % number == width % number == 0:
        assert rank(expected) == min(out, width), "full"
        assert count(site) == out * width // number
    assert (expected != 0).any(0).all()
    assert (expected != 0).any(1).all()


def edges(out: int, width: int, number: int) -> list[tuple[int, int, int, int]]:
    sides = zip(parts(out, number), parts(width, number), strict=True)
    return [(r.start, r.stop, c.start, c.stop) for r, c in sides]


def test_diablo_of_64_blocks_has_the_parameters_of_lora_32() -> None:
    base = QuantLinear(4096, 4096, Dense("bfloat16"), bias=False, dtype=torch.bfloat16, device="meta")
    numbers = {m: sum(p.numel() for p in METHODS[m](base, **o).parameters()) for m, o in PAIR.items()}
    assert numbers["diablo"] == numbers["lora"]


PAIR: dict[str, dict[str, Any]] = {"diablo": {"blocks": 64}, "lora": {"rank": 32}}


# ---- ABBA


@pytest.mark.parametrize("shape", SHAPES)
def test_abba_is_the_product_of_two_products(shape: tuple[int, int]) -> None:
    site = on(layer(*shape), "abba", rank=8, alpha=3.0)
    A1, A2, B1, B2 = (p.double() for p in (site.adapter.A1, site.adapter.A2, site.adapter.B1, site.adapter.B2))
    expected = 3.0 * (B1 @ A1) * (B2 @ A2)
    same(delta(site), expected)
    assert count(site) == 8 * sum(shape), "LoRA's of rank 8"


@pytest.mark.parametrize(("total", "expected"), [(2, 1), (4, 4), (8, 16), (12, 29)])
def test_abbas_rank_is_a_quarter_of_the_square(total: int, expected: int) -> None:
    assert rank(delta(on(layer(29, 31), "abba", rank=total))) == expected


def test_abba_starts_from_the_weights_svd() -> None:
    base = layer(33, 76)
    for svd in ("fast", "full"):
        adapter = on(base, "abba", stirred=False, rank=8, svd=svd).adapter
        u, s, vh = torch.linalg.svd(base.dequantize().double())
        best = (u[:, :4] * s[:4]) @ vh[:4]
        torch.testing.assert_close((adapter.B1 @ adapter.A1).double(), best, rtol=0, atol=1e-4)
        torch.testing.assert_close(adapter.B1.norm(dim=0), adapter.A1.norm(dim=1), rtol=1e-4, atol=0)
        assert not adapter.B2.any()
        assert 0.8 < adapter.A2.abs().max() / (6 / 76) ** 0.5 <= 1


def test_abba_keeps_only_its_factors() -> None:
    """Neither the inner factors nor what comes out of them."""
    site, kept = on(layer(33, 76), "abba", rank=16), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        site(torch.randn(200, 76, requires_grad=True))
    assert not [shape for shape in kept if 64 in shape], "8 x 8 is the inner rank"


def test_abba_refuses_odd_ranks_and_too_large_ones() -> None:
    with pytest.raises(QtuneError, match=r"rank of abba must be even.*not 5; adapter\.alpha must be above 0"):
        AdapterSpec("abba", (), {"rank": 5, "alpha": 0.0}).checked()
    with pytest.raises(QtuneError, match=r"svd.*fast, full"):
        AdapterSpec("abba", (), {"svd": "some"}).checked()
    with pytest.raises(QtuneError, match=r"rank.*24 x 24; legal: 1 to 24") as fault:
        METHODS["abba"](layer(24, 24), rank=50)
    assert fault.value.code == "Q107"
    METHODS["abba"](layer(24, 24), rank=48)


# ---- BHRA


@pytest.mark.parametrize(("rank", "blocks"), [(6, 1), (6, 3), (8, 4), (10, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_bhra_is_hira_in_blocks(shape: tuple[int, int], rank: int, blocks: int) -> None:
    """Also where `blocks` divides no side."""
    site = on(layer(*shape), "bhra", rank=rank, blocks=blocks)
    A, B, W = site.adapter.A.double(), site.adapter.B.double(), site.base.dequantize().double()
    each, expected = rank // blocks, torch.empty(shape, dtype=FP64)
    for i, rows in enumerate(parts(shape[0], blocks)):
        for j, columns in enumerate(parts(shape[1], blocks)):
            of_block = B[rows, j * each : (j + 1) * each] @ A[i, :, columns]
            expected[rows, columns] = W[rows, columns] * of_block
    same(delta(site), expected)
    assert count(site) == rank * sum(shape), "LoRA's"


@pytest.mark.parametrize(
    ("blocks", "of_weight", "expected"), [(1, 1, 6), (2, 1, 12), (3, 1, 18), (6, 1, 36), (3, 2, 36)]
)
def test_bhras_rank_is_that_of_hira_times_the_blocks(blocks: int, of_weight: int, expected: int) -> None:
    """b r0 r, for a weight whose blocks have rank r0."""
    base = layer(60, 72)
    site = on(base, "bhra", rank=6, blocks=blocks)
    weight = torch.randn(60, of_weight, dtype=FP64) @ torch.randn(of_weight, 72, dtype=FP64)
    adapter = site.adapter.double()
    with torch.no_grad():
        assert rank(torch.cat(adapter.rows(weight, adapter.A, adapter.B))) == blocks * of_weight * 6


def test_bhra_of_one_block_is_hira() -> None:
    base = layer(33, 76)
    bhra, hira = on(base, "bhra", rank=4, blocks=1), on(base, "hira", rank=4)
    hira.adapter.A.data, hira.adapter.B.data = bhra.adapter.A.data[0], bhra.adapter.B.data
    same(delta(bhra), delta(hira))


def test_bhra_refuses_ranks_that_blocks_do_not_divide() -> None:
    with pytest.raises(QtuneError, match=r"rank of bhra must be a multiple of adapter\.blocks 4 \(4, 8\), not 6"):
        AdapterSpec("bhra", (), {"rank": 6}).checked()
    with pytest.raises(QtuneError, match=r"blocks must be at least 1, not 0"):
        AdapterSpec("bhra", (), {"blocks": 0}).checked()
    with pytest.raises(QtuneError, match=r"blocks 32 is beyond a layer of 29 x 31; legal: 1 to 29"):
        METHODS["bhra"](layer(29, 31), rank=32, blocks=32)


# ---- MoRA


def compressed(x: list[Tensor], size: int) -> list[list[Tensor]]:
    """The inputs in chunks, the last one filled up from the front."""
    filled = x + x[: -len(x) % size]
    return [filled[n : n + size] for n in range(0, len(filled), size)]


@pytest.mark.parametrize("shape", SHAPES)
def test_mora_shares_rows_and_columns(shape: tuple[int, int]) -> None:
    out, width = shape
    site = on(layer(*shape), "mora", rank=2, variant="share")
    n = math.isqrt(2 * sum(shape))
    M = site.adapter.M.double()
    assert count(site) == n * n <= 2 * sum(shape) < (n + 1) ** 2
    sums = torch.stack([sum(c[k] for c in compressed(list(torch.eye(width, dtype=FP64)), n)) for k in range(n)])
    expected = (M @ sums).repeat(-(-out // n), 1)[:out]
    same(delta(site), expected)
    assert rank(expected) == n > 2, "LoRA's is 2"


@pytest.mark.parametrize("shape", [*SHAPES, (76, 24)])
def test_mora_rotates_chunks(shape: tuple[int, int]) -> None:
    """Each pair (k, k + n/2) of chunk c, as a complex number, is turned by c * 10000^(-2k/n)."""
    out, width = shape
    site = on(layer(*shape), "mora", rank=2)
    n = math.isqrt(2 * sum(shape)) // 2 * 2
    M, pieces = site.adapter.M.double(), []
    assert M.shape == (n, n)
    for c, chunk in enumerate(compressed(list(torch.eye(width, dtype=FP64)), n)):
        turned = [torch.empty(0)] * n
        for k in range(n // 2):
            angle = c * 10000 ** (-2 * k / n)
            turned[k] = chunk[k] * math.cos(angle) - chunk[k + n // 2] * math.sin(angle)
            turned[k + n // 2] = chunk[k + n // 2] * math.cos(angle) + chunk[k] * math.sin(angle)
        pieces.append(M @ torch.stack(turned))
    whole = torch.cat(pieces)
    expected = whole.repeat(-(-out // len(whole)), 1)[:out]
    same(delta(site), expected)
    torch.testing.assert_close(site.merged()[0].double() - site.base.dequantize(), expected, rtol=0, atol=1e-5)


def test_moras_rotation_gives_a_full_rank() -> None:
    assert rank(delta(on(layer(72, 72), "mora", rank=4))) == 72
    assert rank(delta(on(layer(72, 72), "mora", rank=4, variant="share"))) == 24


def test_mora_refuses_ranks_whose_matrix_is_beyond_the_layer() -> None:
    with pytest.raises(QtuneError, match=r"rank 16 gives mora a matrix of 41 x 41.*33 x 76; legal: 1 to 9"):
        METHODS["mora"](layer(33, 76), rank=16)
    assert METHODS["mora"](layer(33, 76), rank=9, variant="share").size == 31
    with pytest.raises(QtuneError, match=r"legal: none, leave the layer out"):
        METHODS["mora"](layer(2, 100), rank=1)
    with pytest.raises(QtuneError, match=r"variant.*rotate, share"):
        AdapterSpec("mora", (), {"variant": "6"}).checked()


# ---- KRAdapter


@pytest.mark.parametrize("shape", [*SHAPES, (16, 16), (16, 17)])
def test_kradapter_has_outer_products_in_its_rows(shape: tuple[int, int]) -> None:
    site = on(layer(*shape), "kradapter", alpha=1.5)
    U, V = site.adapter.U.double(), site.adapter.V.double()
    least, most = sorted(shape)
    assert U.shape == (least, math.isqrt(least))
    assert U.shape[1] * (V.shape[1] - 1) < most <= U.shape[1] * V.shape[1]
    rows = 1.5 * torch.stack([torch.outer(v, u).flatten() for u, v in zip(U, V, strict=True)])[:, :most]
    expected = rows if shape[0] == least else rows.T
    same(delta(site), expected)
    assert count(site) == least * (U.shape[1] + V.shape[1])
    assert rank(expected) == least, "full"


def test_kradapter_starts_as_its_code() -> None:
    adapter = on(layer(33, 76), "kradapter", stirred=False).adapter
    assert not adapter.U.any()
    bound = (6 / (1 + 5**2) / adapter.V.shape[1]) ** 0.5
    assert 0.9 * bound < adapter.V.abs().max() <= bound
    with pytest.raises(QtuneError, match=r"alpha must be above 0, not -1"):
        AdapterSpec("kradapter", (), {"alpha": -1}).checked()


def test_the_backward_does_not_multiply_again_in_the_forward() -> None:
    """What is recomputed is dW: three products in all, besides the base's."""
    site, x = on(layer(33, 76), "kradapter"), torch.randn(5, 76, requires_grad=True)
    with Products() as products:
        site.adapter(x, site.base).sum().backward()
    assert sorted(s for s in products.shapes if 5 in s) == sorted([(5, 76, 33)] * 2 + [(5, 33, 76)] * 2 + [(76, 5, 33)])


class Products(TorchDispatchMode):
    """The sizes of all products of two matrices: rows, inner, columns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.shapes.append((*args[0].shape, args[1].shape[1]))
        return func(*args, **(kwargs or {}))


# ---- TeRA


def folded(matrix: Tensor, dim: int) -> Tensor:
    """Side `dim` as two modes, filled up with zeros."""
    first, second = modes(matrix.shape[dim])
    room = first * second - matrix.shape[dim]
    return F.pad(matrix, (0, room) if dim else (0, 0, 0, room)).unflatten(dim, (first, second))


@pytest.mark.parametrize("shape", SHAPES)
def test_tera_is_a_tucker_network(shape: tuple[int, int]) -> None:
    base = layer(*shape)
    site = on(base, "tera", rank=3)
    G, D1, D2, E1, E2 = (tensor.double() for tensor in site.adapter.network(base, FP64))
    (d1, d2), (e1, e2) = site.adapter.d.double(), site.adapter.e.double()
    core = G.view(3, 3, 3, 3)  # outputs' modes, then inputs', second before first
    network = torch.einsum("pa,qb,abdc,ci,dj,a,b,c,d->pqij", E1, E2, core, D1, D2, e1, e2, d1, d2)
    expected = network.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]
    same(delta(site), expected)
    assert count(site) == 4 * 3


@pytest.mark.parametrize(("each", "expected"), [(1, 1), (2, 4), (4, 16), (6, 29)])
def test_teras_rank_is_the_square_of_a_modes(each: int, expected: int) -> None:
    assert rank(delta(on(layer(29, 31), "tera", rank=each))) == expected


def test_teras_core_and_factors_are_shared_and_come_back_from_the_seed() -> None:
    model = nn.Module()
    model.one, model.two = layer(33, 76), layer(76, 24)
    spec = AdapterSpec("tera", ("one", "two"), {"rank": 3})
    sites = adapt(model, spec)
    one, two = (sites[name].adapter for name in ("one", "two"))
    assert one.shared_state is two.shared_state
    assert [name for name in model.state_dict() if "shared" in name or "core" in name] == []
    net = one.shared_state
    assert (len(net.E1), len(net.E2)) == modes(76) == (net.D1.shape[1], net.D2.shape[1])
    again, other = (METHODS["tera"].shared([model.one.base, model.two.base], rank=3, seed=s) for s in (0, 1))
    for name in ("G", "D1", "D2", "E1", "E2"):
        assert torch.equal(getattr(net, name), getattr(again, name))
        assert not torch.equal(getattr(net, name), getattr(other, name))
    with pytest.raises(QtuneError, match=r"seed must be at least 0, not -1"):
        AdapterSpec("tera", (), {"seed": -1}).checked()


def test_teras_network_keeps_the_size_of_what_it_takes() -> None:
    base = layer(200, 190, bias=False)
    site = on(base, "tera", stirred=False, rank=12)
    assert not delta(site).any()
    site.adapter.e.data[:] = 1
    x = torch.randn(400, 190, dtype=FP64)
    assert 0.5 < (x @ delta(site).T).square().mean() < 2


def test_modes_of_a_part_fit_into_those_of_the_whole() -> None:
    sides = [modes(size) for size in range(1, 700)]
    for size, (a, b) in enumerate(sides, 1):
        assert size <= a * b < size + a
        assert abs(a - b) <= 1 or size < 4
    for small, large in pairwise(sides):
        assert small[0] <= large[0]
        assert small[1] <= large[1]


# ---- MiSS


@pytest.mark.parametrize("number", [1, 5, 24])
@pytest.mark.parametrize("shape", SHAPES)
def test_miss_repeats_one_shard(shape: tuple[int, int], number: int) -> None:
    out, width = shape
    site = on(layer(*shape), "miss", rank=number)
    D = site.adapter.D.double()
    expected = torch.stack([D[i % number] for i in range(width)], dim=1)
    same(delta(site), expected)
    assert count(site) == number * out
    assert rank(expected) == min(number, out)


def test_miss_keeps_the_sums_and_not_the_inputs() -> None:
    site, kept = on(layer(33, 76), "miss", rank=4), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        site(torch.randn(200, 76, requires_grad=True))
    assert (200, 4) in kept
    assert (200, 76) not in kept


def test_miss_drops_out_in_training_only_and_refuses_what_does_not_fit() -> None:
    site, x = on(layer(33, 76), "miss", rank=4, dropout=0.5), torch.randn(3, 76)
    assert not torch.equal(site.train()(x), site(x))
    assert torch.equal(site.eval()(x), site(x))
    with pytest.raises(QtuneError, match="rank 77 is beyond a layer of 76 inputs; legal: 1 to"):
        METHODS["miss"](layer(33, 76), rank=77)
    with pytest.raises(QtuneError, match=r"dropout must be at least 0 and below 1, not 1\.0"):
        AdapterSpec("miss", (), {"dropout": 1.0}).checked()
