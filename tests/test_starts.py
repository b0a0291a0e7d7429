"""The starts of two-factor methods against float64, the papers' loops written plainly, and PEFT on float layers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

from qtune.adapters import METHODS, Adapted, AdapterSpec, Source, starts
from qtune.adapters.lora import LoRA
from qtune.adapters.sites import begin, distance
from qtune.errors import QtuneError
from qtune.quant import NF4, SCHEMES, Dense, QuantLinear, Scheme

OUT, IN, RANK = 96, 160, 6
PACKED = sorted(set(SCHEMES) - {"dense"})
FP32 = Dense("float32")
# with options: each way a product that is not zero can start
STARTS: list[tuple[str, dict[str, Any]]] = [
    ("loftq", {}),
    ("loftq", {"iterations": 3}),
    ("pissa", {}),
    ("pissa", {"iterations": 3, "refit": True}),
    ("cloq", {}),
    ("lqer", {}),
    ("lqer", {"data": False}),
    ("milora", {}),
    ("olora", {}),
    ("corda", {}),
    ("corda", {"mode": "kpm"}),
]
NAMES = ["-".join([name, *map(str, options.values())]) for name, options in STARTS]
BOUND = [(name, options) for name, options in STARTS if METHODS[name].bound == 1.0]
MOVED = [(name, options) for name, options in STARTS if name in ("pissa", "milora", "olora", "corda")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(out: int = OUT, width: int = IN, seed: int = 0, decay: float = 0.7) -> Tensor:
    """A matrix of Gaussian noise and of a part whose singular values fall as a power, as those of real layers do."""
    size = min(out, width)
    u, v = torch.linalg.qr(random(out, size, seed=seed + 1)).Q, torch.linalg.qr(random(width, size, seed=seed + 2)).Q
    return (u * torch.arange(1, size + 1).pow(-decay)) @ v.T + 0.002 * random(out, width, seed=seed)


def moments(width: int = IN, tokens: int = 400, seed: int = 5) -> Tensor:
    """Of inputs that are correlated, with a few large channels."""
    x = random(tokens, width, seed=seed) @ (random(width, width, seed=seed + 1) / width**0.5 + torch.eye(width))
    x[:, :3] *= 20
    return x.T @ x / tokens


def start(
    w: Tensor,
    method: str,
    scheme: Scheme = FP32,
    gram: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rank: int = RANK,
    **options: Any,
) -> Adapted:
    base = QuantLinear(w.shape[1], w.shape[0], scheme, bias=False, dtype=dtype, name="layer")
    base.set_weight(w)
    base.own = False
    spec = AdapterSpec(method, (), {"rank": rank, **options}).checked()
    site = Adapted(base, METHODS[method](base, **spec.options))
    if "gram" in spec.needs() and gram is None:
        gram = moments(w.shape[1])
    site.start = begin("layer", site, spec, Source(w, gram if "gram" in spec.needs() else None), seed)
    return site


def product(site: Adapted) -> Tensor:
    adapter = site.adapter
    assert isinstance(adapter, LoRA)
    return adapter.scale * adapter.B.detach().double() @ adapter.A.detach().double()


def left(site: Adapted, w: Tensor) -> Tensor:
    """What base and adapter leave of w, float64."""
    return w.double() - site.merged()[0].double()


def norm(error: Tensor, gram: Tensor) -> float:
    return float(((error.double() @ gram.double()) * error.double()).sum().sqrt())


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    error = (a.double() - b.double()).norm() / b.double().norm()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def packed(scheme: Scheme, w: Tensor) -> Tensor:
    return scheme.unpack(scheme.pack(w), tuple(w.shape), torch.float32)


def truncated(m: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


# ---- linear algebra


@pytest.mark.parametrize("right", ["none", "diagonal", "matrix"])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_fast_svd_finds_the_largest_triplets(shape: tuple[int, int], right: str) -> None:
    m = weight(*shape)
    r = {"none": None, "diagonal": random(shape[1]).abs() + 0.1, "matrix": starts.root(moments(shape[1]))}[right]
    whole = m.double() if r is None else m.double() * r if r.dim() == 1 else m.double() @ r.double()
    torch.manual_seed(0)
    u, s, vh = starts.top(m, RANK, "fast", 4, r)
    exact = torch.linalg.svdvals(whole)
    assert (s.double() / exact[:RANK] - 1).abs().max() < 2e-3
    assert (whole - (u * s).double() @ vh.double()).norm() < 1.002 * exact[RANK:].norm()
    for q in (u.T @ u, vh @ vh.T):
        assert (q - torch.eye(RANK)).abs().max() < 1e-5
    full = starts.top(m, RANK, "full", 0, r)
    close((full[0] * full[1]) @ full[2], truncated(whole, RANK), 1e-5)


def test_iterations_sharpen_the_fast_svd() -> None:
    m = weight(decay=0.3)
    best = (m - truncated(m, RANK)).norm()
    excess = []
    for niter in (0, 2, 8):
        torch.manual_seed(0)
        u, s, vh = starts.top(m, RANK, "fast", niter)
        excess.append(float((m - (u * s) @ vh).norm() / best) - 1)
    assert excess[0] > 3 * excess[1] > 9 * excess[2] and excess[2] < 1e-3


def test_bottom_takes_the_smallest_triplets() -> None:
    m, right = weight(), starts.root(moments())
    for r in (None, right):
        whole = m.double() if r is None else m.double() @ r.double()
        u, s, vh = starts.bottom(m, RANK, r)
        close((u * s) @ vh, whole - truncated(whole, OUT - RANK), 1e-2)
        assert s.max() <= torch.linalg.svdvals(whole)[-RANK] * 1.001


def test_fit_is_the_projection_in_the_norm_of_the_gram() -> None:
    error, A, gram = weight(), random(RANK, IN), moments()
    root = torch.linalg.cholesky(gram.double())
    exact = torch.linalg.lstsq((A.double() @ root).T, (error.double() @ root).T).solution.T
    close(starts.fit(error, A, gram), exact, 1e-4)
    A[-1] = A[0]  # nothing is unique now, and nothing may blow up
    found = starts.fit(error, A, gram)
    assert found.isfinite().all() and norm(error - found @ A, gram) <= norm(error, gram)


# ---- the papers' loops


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_is_the_papers_loop(name: str, iterations: int) -> None:
    w, scheme = weight(), SCHEMES[name]()
    correction, found = torch.zeros_like(w), []
    for _ in range(iterations):
        q = packed(scheme, w - correction)
        correction = truncated(w - q, RANK).float()
        found.append(float((w - q - correction).norm()))
    site = start(w, "loftq", scheme, iterations=iterations, svd="full")
    assert float(left(site, w).norm()) == pytest.approx(min(found), rel=2e-3)
    if iterations == 1:
        assert not site.base.own and torch.equal(site.base.dequantize(), q)
        close(product(site), correction, 5e-5)  # both are fp32 decompositions
    else:
        assert site.base.own


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("iterations", [1, 4])
def test_qpissa_is_the_authors_loop(name: str, iterations: int) -> None:
    w, scheme = weight(), SCHEMES[name]()
    rest, found = w, []
    for _ in range(iterations):
        principal = truncated(rest, RANK).float()
        q = packed(scheme, w - principal)
        rest = w - q
        found.append(float((rest - principal).norm()))
    site = start(w, "pissa", scheme, iterations=iterations, svd="full")
    assert site.base.own
    assert float(left(site, w).norm()) == pytest.approx(min(found), rel=2e-3)
    if iterations == 1:
        close(product(site), principal, 1e-5)


@pytest.mark.parametrize("method", ["loftq", "pissa"])
def test_an_iteration_more_never_hurts(method: str) -> None:
    for seed in range(6):
        w = random(48, 64, seed=seed)
        errors = [
            float(left(start(w, method, SCHEMES["int2"](), iterations=t, svd="full", rank=4), w).norm())
            for t in (2, 3, 4, 5, 6)
        ]
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors)), errors


def test_qpissa_leaves_less_than_loftq_and_refit_less_still() -> None:
    w = weight(192, 192)

    def rest(method: str, **options: Any) -> float:
        return float(torch.linalg.svdvals(left(start(w, method, NF4(double=False), iterations=5, **options), w)).sum())

    assert rest("pissa", refit=True) < rest("pissa") < rest("loftq")


# ---- PEFT, on float layers


def in_peft(w: Tensor, kind: str, alpha: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    model[0].weight.data = w.clone()
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["0"], init_lora_weights=kind)
    return get_peft_model(model, config).base_model.model[0]


@pytest.mark.parametrize(
    ("method", "kind", "alpha", "options"),
    [
        ("pissa", "pissa", RANK, {"svd": "full"}),
        ("pissa", "pissa", 3 * RANK, {"svd": "full"}),
        ("pissa", "pissa_niter_16", RANK, {"niter": 16}),
        ("olora", "olora", RANK, {}),
    ],
)
def test_products_and_residuals_are_pefts(method: str, kind: str, alpha: float, options: dict[str, Any]) -> None:
    w = weight()
    torch.manual_seed(1)
    theirs = in_peft(w, kind, alpha)
    ours = start(w, method, alpha=float(alpha), **options)
    close(product(ours), theirs.get_delta_weight("default"), 3e-2 if "niter" in kind else 1e-4)
    close(ours.base.dequantize() + product(ours), w, 1e-6)
    if "niter" not in kind:
        close(ours.base.dequantize(), theirs.get_base_layer().weight, 1e-4)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_papers_decomposition(mode: str) -> None:
    """Their SVD of W C, multiplied by C^-1. PEFT's module for it needs a package that PEFT does not bring."""
    w, gram = weight(), moments()
    c = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(IN)
    u, s, vh = torch.linalg.svd(w.double() @ c, full_matrices=False)
    taken = slice(0, RANK) if mode == "ipm" else slice(OUT - RANK, OUT)
    exact = (u[:, taken] * s[taken]) @ vh[taken] @ torch.linalg.inv(c)
    ours = start(w, "corda", gram=gram, mode=mode, alpha=3.0 * RANK, svd="full")
    close(product(ours), exact, 1e-2 if mode == "kpm" else 1e-4)
    close(ours.base.dequantize(), w - product(ours), 1e-6)


@pytest.mark.parametrize("iterations", [1, 2])
def test_loftq_is_pefts_loop_over_bitsandbytes(iterations: int) -> None:
    """PEFT's own function runs on CUDA only; its parts run anywhere."""
    w = weight(64, 128)
    parts = {"L": torch.zeros(64, RANK), "R": torch.zeros(RANK, 128)}
    for _ in range(iterations):
        codes, state = bnb.functional.quantize_4bit(w - parts["L"] @ parts["R"], blocksize=64, quant_type="nf4")
        parts = _low_rank_decomposition(w - bnb.functional.dequantize_4bit(codes, state), reduced_rank=RANK)
    ours = start(w, "loftq", NF4(double=False), svd="full", iterations=iterations)
    close(product(ours), parts["L"] @ parts["R"], 1e-4)


def test_eva_finds_the_components_of_pefts_pca() -> None:
    x = random(300, IN, seed=1) @ weight(IN, IN)
    x = torch.cat((x, -x))  # PEFT subtracts the mean
    pca = IncrementalPCA(n_components=RANK).fit(x)
    ours = start(weight(), "eva", gram=x.T @ x / len(x), svd="full")
    assert isinstance(ours.adapter, LoRA)
    agreement = (ours.adapter.A.detach() * pca.components_).sum(dim=1).abs()
    assert agreement.min() > 0.999
    assert not ours.adapter.B.any()


# ---- optimal under the gram


def test_cloq_is_the_closed_form_and_nothing_is_better() -> None:
    w, gram, scheme = weight(24, 32), moments(32), SCHEMES["int3"]()
    error = w.double() - packed(scheme, w).double()
    values, vectors = torch.linalg.eigh(gram.double())
    symmetric = (vectors * values.sqrt()) @ vectors.T
    exact = truncated(error @ symmetric, 3) @ torch.linalg.inv(symmetric)
    site = start(w, "cloq", scheme, gram, rank=3, damping=1e-6, svd="full")
    close(product(site), exact, 1e-3)
    mine = norm(left(site, w), gram)
    for seed in range(3):  # alternating least squares, each step exact, from elsewhere
        A = random(3, 32, seed=seed).double()
        for _ in range(200):
            B = error @ gram.double() @ A.T @ torch.linalg.inv(A @ gram.double() @ A.T)
            A = torch.linalg.solve(B.T @ B, B.T @ error)
        assert mine <= norm(error - B @ A, gram) * (1 + 1e-5)


@pytest.mark.parametrize("damping", [0.01, 1e-6])
def test_cloq_beats_the_other_corrections_under_the_gram_in_bf16(damping: float) -> None:
    w, gram = weight(), moments()
    rest = {
        method: norm(left(start(w, method, NF4(), gram, dtype=torch.bfloat16, **options), w), gram)
        for method, options in (("cloq", {"damping": damping}), ("lqer", {}), ("loftq", {}))
    }
    assert rest["cloq"] < rest["lqer"] < rest["loftq"]


def test_lqer_weighs_channels() -> None:
    """On uncorrelated inputs its diagonal is all there is, and it is CLoQ."""
    w, gram = weight(), torch.diag(random(IN).square() + 0.01)
    options: dict[str, Any] = {"svd": "full"}
    cloq = start(w, "cloq", NF4(), gram, damping=1e-6, **options)
    close(product(start(w, "lqer", NF4(), gram, **options)), product(cloq), 1e-3)
    plain = start(w, "lqer", NF4(), data=False, **options)
    close(product(plain), truncated(w - packed(NF4(), w), RANK), 1e-5)


@pytest.mark.parametrize("method", ["cloq", "lqer"])
def test_b_is_the_best_beside_a_as_it_was_rounded(method: str) -> None:
    w, gram = weight(), moments()
    site = start(w, method, NF4(), gram, dtype=torch.bfloat16, alpha=3.0)
    ga = gram.double() @ site.adapter.A.detach().double().T
    assert (left(site, w) @ ga).norm() < 0.01 * ((w - packed(NF4(), w)).double() @ ga).norm()


# ---- every start


@pytest.mark.parametrize(("method", "options"), STARTS, ids=NAMES)
def test_the_scale_is_folded_in(method: str, options: dict[str, Any]) -> None:
    w, exact = weight(), {"svd": "full"} if "svd" in METHODS[method].options() else {}
    scheme = FP32 if (method, options) in MOVED and options.get("iterations", 1) == 1 else NF4()
    once = start(w, method, scheme, alpha=float(RANK), **options, **exact)
    for other in ({"alpha": 2.0 * RANK}, {"alpha": 4.0, "rslora": True}):
        again = start(w, method, scheme, **other, **options, **exact)
        assert not math.isclose(again.adapter.scale, 1.0)
        if options.get("iterations", 1) == 1:
            close(product(again), product(once), 1e-3)
        close(left(again, w).norm(), left(once, w).norm(), 1e-2 if scheme != FP32 else math.inf)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("data", ["enough", "singular", "none"])
def test_bounds_hold_in_bf16(name: str, data: str) -> None:
    """`begin` raises where a start is farther from the weight than the base; the values here must be below it."""
    gram = {"enough": moments(), "singular": moments(tokens=3), "none": torch.zeros(IN, IN)}[data]
    for w in (weight(), random(OUT, IN).bfloat16()):
        for method, options in BOUND:
            site = start(w, method, SCHEMES[name](), gram, dtype=torch.bfloat16, alpha=4.0 * RANK, **options)
            assert site.adapter.A.dtype == torch.bfloat16 and site.adapter.A.isfinite().all()
            if data == "enough" or not site.start.weighted:
                assert site.start.after < 0.999 * site.start.before


@pytest.mark.parametrize(("method", "options"), MOVED, ids=lambda v: v if isinstance(v, str) else None)
@pytest.mark.parametrize("data", ["enough", "singular", "none"])
def test_a_residual_takes_back_what_rounding_took(method: str, options: dict[str, Any], data: str) -> None:
    gram = {"enough": moments(), "singular": moments(tokens=3), "none": torch.zeros(IN, IN)}[data]
    w = weight()
    site = start(w, method, gram=gram, dtype=torch.bfloat16, **{**options, "alpha": 3.0})
    assert left(site, w).norm() < 1e-6 * w.norm()
    assert product(site).norm() > 1e-4 * w.norm() and site.adapter.A.isfinite().all()


@pytest.mark.parametrize(("method", "options"), [*STARTS, ("eva", {})], ids=[*NAMES, "eva"])
def test_a_seed_gives_the_same_start(method: str, options: dict[str, Any]) -> None:
    w = weight()
    first, again, other = (start(w, method, NF4(), seed=seed, **options) for seed in (3, 3, 4))
    for name, value in first.adapter.state_dict().items():
        assert torch.equal(value, again.adapter.state_dict()[name])
    assert torch.equal(first.base.packed, again.base.packed)
    if "svd" in METHODS[method].options() and options.get("mode") != "kpm":
        assert not torch.equal(first.adapter.A, other.adapter.A)  # else it drew nothing
        close(left(other, w).norm(), left(first, w).norm(), 2e-2)


@pytest.mark.parametrize(("method", "options"), [*STARTS, ("eva", {})], ids=[*NAMES, "eva"])
def test_reset_runs_on_meta(method: str, options: dict[str, Any]) -> None:
    base = QuantLinear(IN, OUT, NF4(), bias=False, dtype=torch.bfloat16, device="meta", name="layer")
    adapter = METHODS[method](base, rank=RANK, **options)
    with torch.no_grad():
        adapter.reset(base, Source(torch.empty(OUT, IN, device="meta"), torch.empty(IN, IN, device="meta")))
    assert adapter.A.shape == (RANK, IN) and adapter.A.is_meta


def test_difference_is_what_training_changed() -> None:
    A, B, A0, B0 = (random(*shape, seed=i) for i, shape in enumerate([(4, 20), (30, 4), (4, 20), (30, 4)]))
    A2, B2 = starts.difference(A, B, A0, B0)
    assert A2.shape == (8, 20) and B2.shape == (30, 8)
    close(B2.double() @ A2.double(), B.double() @ A.double() - B0.double() @ A0.double(), 1e-14)


# ---- bad input


@pytest.mark.parametrize("method", sorted({name for name, _ in STARTS} | {"eva"}))
def test_a_rank_beyond_the_layer_is_refused_before_any_weight_is_read(method: str) -> None:
    base = QuantLinear(IN, OUT, NF4(), bias=False, dtype=torch.float32, device="meta")
    METHODS[method](base, rank=OUT)
    with pytest.raises(QtuneError, match=rf"adapter.rank {OUT + 1} .* {OUT} x {IN}; legal: 1 to {OUT}"):
        METHODS[method](base, rank=OUT + 1)


def test_a_full_rank_start_is_exact() -> None:
    w = weight(24, 32)
    for method in ("loftq", "pissa", "cloq", "lqer"):
        assert left(start(w, method, NF4(), rank=24, **({"refit": True} if method == "pissa" else {})), w).norm() < 1e-4


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("loftq", {"svd": "slow"}, "svd"),
        ("loftq", {"iterations": 0}, "iterations must be at least 1, not 0"),
        ("pissa", {"niter": -1}, "niter must be at least 0, not -1"),
        ("pissa", {"dropout": 0.1}, "pissa has no option 'dropout'"),
        ("pissa", {"alpha": 0.0}, "alpha must be above 0"),
        ("corda", {"mode": "both"}, "mode.*ipm, kpm"),
        ("cloq", {"damping": 0.0}, "damping must be above 0 and at most 1, not 0.0"),
        ("milora", {"rank": 0}, "rank must be at least 1"),
    ],
)
def test_wrong_options_are_named(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(QtuneError, match=said):
        AdapterSpec(method, (), options).checked()


@pytest.mark.parametrize("method", ["cloq", "corda", "lqer", "eva"])
def test_second_moments_that_are_none_are_refused(method: str) -> None:
    gram = moments()
    gram[3, 4] = math.nan
    with pytest.raises(QtuneError, match="layer: second moments are not finite"):
        start(weight(), method, NF4(), gram)
    site = start(weight(), method, NF4())
    with pytest.raises(QtuneError, match=rf"layer: second moments must be {IN} x {IN}"), torch.no_grad():
        site.adapter.reset(site.base, Source(weight(), moments(IN - 1)))


def test_a_dense_base_has_no_error_to_correct() -> None:
    for method, scheme, refused in (
        ("loftq", FP32, True),
        ("cloq", FP32, True),
        ("lqer", FP32, True),
        ("pissa", FP32, False),
        ("cloq", NF4(), False),
    ):
        assert bool(METHODS[method].refuses(scheme, AdapterSpec(method).resolved())) == refused


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_the_distance_is_one_of_any_size(size: float) -> None:
    """Squares of 1e25 are no fp32 numbers: where they were infinite, every start passed."""
    w, wrong = weight() * size, weight(seed=3) * size
    gram = moments()
    e = (wrong - w).double()
    for source, g in ((Source(w), torch.eye(IN)), (Source(w, gram), gram)):
        true = ((e @ g.double() * e).sum() / (w.double() @ g.double() * w.double()).sum()).sqrt()
        assert distance(source, wrong.clone()) == pytest.approx(float(true), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["qwha", "cloq", "eva"])
def test_second_moments_without_values_are_refused(method: str, bad: float) -> None:
    gram = moments()
    gram[3, 4] = bad
    base = QuantLinear(IN, OUT, NF4(), bias=False, dtype=torch.bfloat16, name="layer")
    base.set_weight(weight())
    spec = AdapterSpec(method, (), {"rank": RANK}).checked()
    site = Adapted(base, METHODS[method](base, **spec.options))
    with pytest.raises(QtuneError, match="layer: second moments are not finite"):
        begin("layer", site, spec, Source(weight(), gram), 0)
