"""Does a written checkpoint compute what was trained? Two independent checks, bounded by the rounding of its dtype.

1. Each adapted layer as it lies in the file, against the adapter's own forward over the packed base, on random x.
   Rounding moves a weight by at most eps/2 of itself, so for x of unit variance row i of the output moves by at most
   about eps/2 ||W_i||: that is the bound, and a small delta that was lost or applied twice shows here.
2. The checkpoint as transformers loads it: logits on real prompts against base + adapter in fp32, which catches names,
   transposes, ties and config. Computing in the output dtype already moves the logits of base + adapter (measured in
   the same call); rounding the weights may move them about as much again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from .adapters import Adapted, adapted_sites
from .checkpoint import Piece
from .errors import QtuneError
from .memory.layers import device_of
from .model import names
from .model.skeleton import empty
from .model.source import read_folder
from .quant import QuantEmbedding

PROBES = 16  # random vectors that each written layer is checked with
LOGIT_SLACK = 4.0  # times what computing in the dtype moves the logits; rounded weights move them about as much
FP32_SLACK = (
    1000 * torch.finfo(torch.float32).eps
)  # of the largest logit: fp32 sums in another order, through all layers
FILLER = 1e-5  # relative error of one fp32 product summed in another order


@dataclass(frozen=True)
class Verification:
    """What was compared and what came out.

    layer_error: largest error of a written layer, as a fraction of its bound. logit_error: largest difference of a
    logit; logit_bound: what rounding allows. kl_mean, kl_max: KL(trained || written) per position, in nats. same_top:
    share of positions where both have the same likeliest token. by_codes: the layers are packed, and were compared with
    those in memory bit for bit; layer_error is 0, or infinite.
    """

    layers: int
    layer_error: float
    worst_layer: str
    prompts: int
    positions: int
    logit_error: float
    logit_bound: float
    kl_mean: float
    kl_max: float
    same_top: float
    by_codes: bool = False

    @property
    def passed(self) -> bool:
        """False also where something is NaN or infinite."""
        return self.layer_error <= 1.0 and self.logit_error <= self.logit_bound < float("inf")

    def lines(self) -> list[str]:
        """For a person."""
        source, worst = "packed" if self.by_codes else "trained", f"({self.worst_layer})"
        layers = f"against the adapter's forward: largest error {self.layer_error:.2f} of what rounding allows {worst}"
        if self.by_codes:
            layers = f"are NOT what was packed {worst}" if self.layer_error else "are what was packed, bit for bit"
        logits = f"{self.positions} positions of {self.prompts} prompts: largest difference {self.logit_error:.3g}"
        return [
            f"layers   {self.layers} written layers {layers}",
            f"logits   {logits}, rounding allows {self.logit_bound:.3g}",
            f"         KL({source} || written) mean {self.kl_mean:.2e}, largest {self.kl_max:.2e} nats; "
            f"same first choice at {self.same_top:.1%}",
            f"verdict  {'computes' if self.passed else 'DOES NOT COMPUTE'} what was {source}",
        ]


@dataclass(frozen=True)
class Reference:
    """Logits of base + adapter in fp32 on some prompts; `wander`: how far computing in the output dtype moves them."""

    prompts: list[list[int]]
    logits: list[Tensor]
    wander: float

    @classmethod
    def of(cls, model: Any, prompts: list[list[int]], dtype: torch.dtype) -> Reference:
        """Runs the prompts in fp32 and in `dtype`; the model is afterwards as it was."""
        with in_dtype(model, dtype):
            rounded = logits_of(model, prompts)
        with in_dtype(model, torch.float32):
            exact = logits_of(model, prompts)
        return cls(prompts, exact, max(_distance(a, b) for a, b in zip(rounded, exact, strict=True)))

    def kl(self, others: Sequence[Tensor]) -> Tensor:
        """KL(self || other) per position, nats."""
        pairs = zip(self.logits, others, strict=True)
        return torch.cat([_kl(own, other) for own, other in pairs])


def verify(model: nn.Module, folder: Path, dtype: torch.dtype, reference: Reference) -> Verification:
    """Compare the checkpoint in `folder`, written in `dtype`, with the adapted `model` that it was merged from."""
    error, worst = check_layers(adapted_sites(model), folder, dtype)
    written = logits_of(_load(folder, dtype), reference.prompts)
    return compared(reference, written, len(adapted_sites(model)), error, worst)


def compared(reference: Reference, written: Sequence[Tensor], layers: int, error: float, worst: str) -> Verification:
    """What comes out of a checkpoint's logits, as `logits_of` gives them, and of its layers."""
    kl = reference.kl(written)
    pairs = list(zip(reference.logits, written, strict=True))
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in pairs])
    largest = max(float(a.abs().max()) for a in reference.logits)
    return Verification(
        layers=layers,
        layer_error=error,
        worst_layer=worst,
        prompts=len(pairs),
        positions=len(kl),
        logit_error=max(_distance(a, b) for a, b in pairs),
        logit_bound=LOGIT_SLACK * reference.wander + FP32_SLACK * largest,
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        same_top=float(same.mean()),
    )


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model computing in `dtype` for the moment: all that is not packed is cast, and put back bit for bit after.

    What `dtype` holds exactly is not kept beside: casting it back gives it again.
    """
    tensors = [p for p in model.parameters() if p.is_floating_point()]
    tables = [m for m in model.modules() if isinstance(m, QuantEmbedding)]
    own = [t.dtype for t in tensors], [t.dtype for t in tables]
    kept = [None if torch.promote_types(t.dtype, dtype) == dtype else t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        for table in tables:
            table.dtype = dtype
        yield
    finally:
        for tensor, data, kind in zip(tensors, kept, own[0], strict=True):
            tensor.data = tensor.data.to(kind) if data is None else data
        for table, kind in zip(tables, own[1], strict=True):
            table.dtype = kind


@torch.no_grad()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """fp32 logits [tokens, vocabulary] on the CPU, a prompt at a time."""
    device = device_of(model)
    model.eval()
    rows = [torch.tensor([list(prompt)], device=device) for prompt in prompts]
    return [model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in rows]


def check_layers(sites: dict[str, Adapted], folder: Path, dtype: torch.dtype) -> tuple[float, str]:
    """Largest error of a written layer as a fraction of its bound, and which layer; NaN wins."""
    written = _Written(folder, dtype)

    def error(name: str, site: Adapted, x: Tensor) -> float:
        weight = written(f"{name}.weight")
        bias = None if site.base.bias is None else written(f"{name}.bias")
        return layer_error(site, weight.T if site.base.conv1d else weight, bias, x, dtype)

    return worst_layer(sites, error)


@torch.no_grad()
def worst_layer(sites: dict[str, Adapted], error: Callable[[str, Adapted, Tensor], float]) -> tuple[float, str]:
    """The largest error(name, site, x) of all sites, and which; NaN wins. x: random inputs [PROBES, in], fp32."""
    generator = torch.Generator().manual_seed(0)
    worst, where = 0.0, next(iter(sites), "")
    for name, site in sites.items():
        found = error(name, site, torch.randn(PROBES, site.base.in_features, generator=generator))
        if not found <= worst:
            worst, where = found, name
    return worst, where


class _Written:
    """Tensors of a written checkpoint by their names in the model, in fp32. Where the file has other names, or one
    tensor of what are several layers (experts), the loader finds them."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype, self.found = folder, dtype, dict[str, Piece]()
        handles = [safe_open(str(path), framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self.file_of = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dict)

    def __call__(self, name: str) -> Tensor:
        if name in self.file_of:
            return self.file_of[name].get_tensor(name).float()  # type: ignore[no-any-return]
        if not self.found:
            source = read_folder(self.folder, str(self.folder))
            pieces = names.plan(source, empty(source.config, self.dtype)).pieces
            self.found = {target: piece for piece in pieces for target in piece.targets}
        return self.found[name].read()[name].float()


def layer_error(
    site: Adapted, weight: Tensor, bias: Tensor | None, x: Tensor, dtype: torch.dtype, moved: Tensor | None = None
) -> float:
    """Root mean square error over outputs, as a fraction of the bound. weight [out, in], bias [out], x [probes, in],
    all fp32. moved [out, in]: how far rounding may have moved each weight, where that is not what `dtype` says."""
    want = site(x.to(site.base.device)).cpu()
    half = torch.finfo(dtype).eps / 2
    bound = (
        (half * _rms(weight.norm(dim=1)) if moved is None else _rms(moved.norm(dim=1)))
        + FILLER * _rms(want)
        + torch.finfo(dtype).tiny * half * x.shape[1]
    )
    bound += 0.0 if bias is None else half * _rms(bias)
    return _rms(F.linear(x, weight, bias) - want) / bound


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _kl(p: Tensor, q: Tensor) -> Tensor:
    terms = F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), log_target=True, reduction="none")
    return terms.sum(-1).clamp(min=0)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """The checkpoint through transformers, as its user will load it. Raises QtuneError for any key that does not
    fit."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    faults = [f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])))}" for kind in kinds if info[kind]]
    if faults:
        raise QtuneError("Q803", f"transformers does not load {folder} as written: {'; '.join(faults)}")
    return model
