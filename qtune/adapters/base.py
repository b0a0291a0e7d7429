"""Adapter: the trainable change at one site, written once as `forward(x, base)`, the equation of its paper.

The base is always a QuantLinear, so no method knows a scheme and no scheme knows a method. Merging is derived: the
identity, pushed in blocks through `forward` over the dequantized base, comes out as the merged weight. Saving,
loading, freezing and counting fall out of nn.Module. Convention: parameters are cast to x's dtype in `forward`, so
that the same adapter runs in bf16 in training and in fp32 for the merge.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import QtuneError, one_of
from ..quant import Dense, QuantLinear, Scheme
from ..quant import matches as matches  # for methods, which import no other room
from .peft_names import FromPeft as FromPeft
from .peft_names import PeftNames as PeftNames

METHODS: dict[str, type[Adapter]] = {}
"""Every adapter method by its name, as recipes call it; `METHODS["lora"].options()` has its options."""
ALL_LINEAR = "all-linear"
PROBE_ROWS = 512  # rows of the identity that a merge pushes through at a time


@dataclass
class Source:
    """What is known of a layer before it is packed; lives only while the layer is loaded.

    weight [out, in] as the checkpoint holds it. gram [in, in] fp32: the mean of x x^T over the inputs x of calibration
    text. grad [out, in]: of a loss.
    """

    weight: Tensor
    gram: Tensor | None = None
    grad: Tensor | None = None


@dataclass(frozen=True)
class Start:
    """How far a layer is from its weight W before packing, as a fraction of W: of the base packed plainly, and of base
    and adapter together after the start.

    Norms are Frobenius', or with `weighted` those of the outputs on calibration text, sqrt(tr(E G E^T) / tr(W G W^T)).
    """

    before: float
    after: float
    weighted: bool


@dataclass(frozen=True)
class Change:
    """How a parameter changes between two steps, other than by the optimizer.

    values: old -> new, of the parameter, or of its fp32 master where it has one; the shape may be another. moments: old
    -> new, of each of the optimizer's states that has the parameter's shape; None, or states of other shapes (8-bit
    blocks, Adafactor's rows and columns): they begin anew. squares: of AdamW's mean of squares, where it is another.
    """

    values: Callable[[Tensor], Tensor]
    moments: Callable[[Tensor], Tensor] | None = None
    squares: Callable[[Tensor], Tensor] | None = None


Changes = Mapping[nn.Parameter, Change]


class Adapter(nn.Module):
    """One method at one site. Keyword arguments of `__init__` are the method's options; its file's name is the
    method's name."""

    method: ClassVar[str]
    mergeable: ClassVar[bool] = True  # is x -> forward(x, base) affine in x? a law tests that the flag tells the truth
    exact_gradient: ClassVar[bool] = True  # False: a part counts as constant by design; a law tests this flag too
    # None: starts as the identity. Else: how far from the weight before packing it may start, in distances of the base
    bound: ClassVar[float | None] = None
    targets: ClassVar[tuple[str, ...]] = (ALL_LINEAR,)  # where the method goes by default
    # tensors whose size changes in training: name -> (dimension, what of the site it counts)
    grows: ClassVar[Mapping[str, tuple[int, str]]] = MappingProxyType({})
    peft: ClassVar[PeftNames | None] = None

    def __init_subclass__(cls, *, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if register:  # else: what several methods extend
            cls.method = cls.__module__.rsplit(".", 1)[-1]
            METHODS[cls.method] = cls

    def __init__(self, base: QuantLinear, **options: Any) -> None:
        super().__init__()

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        """What `reset` must be told of a layer with these options (defaults filled in): "weight", "gram", "grad"."""
        return frozenset()

    @classmethod
    def refuses(cls, scheme: Scheme, options: Mapping[str, Any]) -> str:
        """Why the method makes no sense on a base of `scheme`, or nothing."""
        return ""

    def thaw(self) -> None:
        """Everything that is learned asks for a gradient, nothing else does."""
        self.requires_grad_(True)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        """First values, random ones through `draw`; may call base.set_weight. Ends with what `prepare` does.

        `source` has what `needs` names. No value is read (`.item()`), so that it also runs on meta, for the planner.
        """
        raise NotImplementedError

    def prepare(self, base: QuantLinear) -> None:
        """Recompute what is derived from the base and not saved (buffers); called by `reset` and after loading."""

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        """x [..., in] -> [..., out]."""
        raise NotImplementedError

    # ---- derived, overridden rarely ----

    @classmethod
    def check_merges(cls) -> None:
        """Raises QtuneError where what the method does hangs on the input, so that no weight does the same."""
        if not cls.mergeable:
            raise QtuneError(
                "Q421",
                f"adapter method {cls.method} decides by the input what it adds: no weight does the same, so that it "
                "cannot be merged, combined or written as a LoRA; use the run itself, as qtune chat and qtune eval do",
            )

    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        """A [r, in], B [out, r] and s where all that the method does to `base` is to add s B A to its weight."""
        return None

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        """The dense fp32 weight [out, in] and bias [out] that compute the same as `forward`: by `low_rank`, or by
        probing. Other additive methods override it. QtuneError where no weight does (`check_merges`)."""
        self.check_merges()
        if (factors := self.low_rank(base)) is not None:
            A, B, scale = factors
            weight = base.dequantize(torch.float32).addmm_(B.float(), A.float(), alpha=scale)
            return weight, None if base.bias is None else base.bias.float()
        dense = _dense_copy(base)
        like: dict[str, Any] = {"dtype": torch.float32, "device": base.device}
        bias = self(torch.zeros(1, base.in_features, **like), dense)[0]
        weight = torch.empty(base.out_features, base.in_features, **like)
        for start in range(0, base.in_features, PROBE_ROWS):
            rows = min(PROBE_ROWS, base.in_features - start)
            probe = torch.zeros(rows, base.in_features, **like)
            probe[:, start : start + rows].fill_diagonal_(1.0)
            weight[:, start : start + rows] = (self(probe, dense) - bias).T
        return weight, bias if base.bias is not None or bias.any() else None

    def merge_into(self, base: QuantLinear) -> bool:
        """Write the change into the packed parts of `base`, which then computes alone what `forward` did, as exactly
        as the parts' own dtypes can say it. False, and nothing is written: the method has no such form."""
        return False

    def peft_state(self) -> dict[str, Tensor]:
        """The parameters under PEFT's names and in PEFT's shapes."""
        assert self.peft is not None
        return {theirs: self.get_parameter(ours) for ours, theirs in self.peft.tensors.items()}

    def peft_lists(self) -> tuple[str, ...]:
        """Lists of PEFT's config, besides target_modules, that this site must be in."""
        return ()

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        """Keys of PEFT's config that say what the sites came to hold; `adapters` are all of them by site."""
        return {}

    @classmethod
    def from_peft(cls, given: FromPeft) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """The inverse of `peft_state`, `peft_lists` and `peft_config`: options, and by site our tensors of an adapter
        of PEFT's, whose sites have the tensors of the table and no others. Raises QtuneError for what it cannot be."""
        assert cls.peft is not None
        options = {ours: given.value(theirs, cls.options()[ours].default) for ours, theirs in cls.peft.options.items()}
        names = cls.peft.tensors.items()
        return options, {n: {ours: found[theirs] for ours, theirs in names} for n, found in given.sites.items()}

    def penalty(self) -> Tensor | None:
        """A term added to the loss, or None."""
        return None

    def lr_scale(self) -> dict[str, float]:
        """Parameter name -> factor on the learning rate, where it is not 1."""
        return {}

    @classmethod
    def shared(cls, bases: Sequence[QuantLinear], **options: Any) -> nn.Module | None:
        """A module that all sites share; it reaches each adapter as the keyword `shared`."""
        return None

    @classmethod
    def varied(cls, sites: Sequence[str], options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Options that differ from site to site, by the names of all sites in the model's order: site -> {option:
        value}. `options` have the defaults filled in."""
        return {}

    @classmethod
    def taken_over(cls, adapters: Mapping[str, Adapter]) -> None:
        """Called once where a run starts from the adapter of another run, with its values in place."""

    # ---- in time: steps are 1-based, `adapters` are all of them by site; what hangs on values is left out on meta

    @classmethod
    def warmth(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> float:
        """A factor on the schedule's learning rate at a step."""
        return 1.0

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        """Called before the forward of each step, after a step that was skipped too. Returns how parameters change
        now; buffers it changes itself."""
        return {}

    @classmethod
    def see_gradients(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        """Called when a step's gradients are whole (and clipped), before the optimizer takes them."""

    @classmethod
    def after_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        """Called after each optimizer step that was made; returns as `before_step`."""
        return {}

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        """Give what grows the sizes, by `resize`, with which a run of `steps` takes the most memory: what is planned,
        and tried before the first step. None: as many steps as can be."""

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Give the tensors that grow these sizes, by what `grows` counts; one of another size becomes zeros."""
        for name, (dim, what) in self.grows.items():
            tensor = getattr(self, name)
            if what in sizes and tensor.shape[dim] != sizes[what]:
                shape = [*tensor.shape[:dim], sizes[what], *tensor.shape[dim + 1 :]]
                replace_values(tensor, tensor.data.new_zeros(shape))

    def sizes(self) -> dict[str, int]:
        """The sizes of what grows, as `resize` takes them."""
        return {what: getattr(self, name).shape[dim] for name, (dim, what) in self.grows.items()}

    @classmethod
    def has_own(cls, name: str) -> bool:
        """Has the method its own form of what this class leaves empty?"""
        return any(name in one.__dict__ for one in cls.__mro__[: cls.__mro__.index(Adapter)])

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The method's options: keyword-only parameters of `__init__`, `shared` left out."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "shared"}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        """Faults of option values that have the right type (defaults filled in)."""
        rank = options.get("rank", 1)
        return [] if rank >= 1 else [f"adapter.rank must be at least 1, not {rank}"]


def trainable(shape: Sequence[int], base: QuantLinear, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter on the base's device, in the model's compute dtype unless said otherwise."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype or base.dtype, device=base.device))


def replace_values(tensor: Tensor, values: Tensor) -> None:
    """Let a parameter or buffer, which stays the same object, hold `values` of the same dtype and any shape: in its own
    memory where the shape stays, so that each step takes and gives back the same."""
    if values.shape == tensor.shape:
        tensor.data.copy_(values)
        return
    tensor.data = values.new_empty(0, dtype=torch.complex64)  # autograd remembers the shape until the type changes
    tensor.data = values


def draw(values: Tensor, fill: Callable[..., Any], *args: Any) -> None:
    """Fill `values` by fill(tensor, *args) on the CPU: a seed means the same start on every device."""
    drawn = torch.empty(values.shape, dtype=values.dtype, device="cpu")
    fill(drawn, *args)
    with torch.no_grad():
        values.copy_(drawn)


def recompute(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), computed again in the backward: nothing made inside is kept. For what needs a dense W; no
    randomness inside."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _dense_copy(base: QuantLinear) -> QuantLinear:
    """The base in fp32: what a probe runs over."""
    dense = QuantLinear(
        base.in_features, base.out_features, Dense("float32"), bias=base.bias is not None, dtype=torch.float32,
        device=base.device, name=base.name,
    )  # fmt: skip
    dense.set_parts({"weight": base.dequantize(torch.float32)})
    if base.bias is not None and dense.bias is not None:
        dense.bias.data.copy_(base.bias)
    return dense


class Adapted(nn.Module):
    """A base with its adapter: what stands in the model at a site. With `enabled` False it is the base alone."""

    start: Start | None = None

    def __init__(self, base: QuantLinear, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter, self.enabled = base, adapter, True

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, self.base) if self.enabled else self.base(x)

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Dense fp32 weight and bias of base and adapter together, dropout off. QtuneError where there are none."""
        mode = self.adapter.training
        self.adapter.eval()
        try:
            return self.adapter.merged(self.base)
        finally:
            self.adapter.train(mode)


@dataclass(frozen=True)
class AdapterSpec:
    """Which method goes where with which options; what a recipe and adapter.json say."""

    method: str = "lora"
    targets: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """Everything that is wrong with it, each with the legal values."""
        if self.method not in METHODS:
            return [str(one_of("adapter method", self.method, METHODS))]
        legal = METHODS[self.method].options()
        faults = []
        for name, value in self.options.items():
            if name not in legal:
                faults.append(
                    f"adapter method {self.method} has no option {name!r}; legal: {', '.join(sorted(legal)) or 'none'}"
                )
            elif not _fits(value, legal[name].default):
                kind = type(legal[name].default).__name__
                article = "an" if kind[0] in "aeiou" else "a"
                faults.append(f"adapter.{name} must be {article} {kind} like {legal[name].default!r}, not {value!r}")
        return faults or METHODS[self.method].check(self.resolved())

    def resolved(self) -> dict[str, Any]:
        """The options with the method's defaults filled in."""
        return {n: p.default for n, p in METHODS[self.method].options().items()} | dict(self.options)

    def needs(self) -> frozenset[str]:
        """What the start must be told of each layer: "weight", "gram", "grad"."""
        return METHODS[self.method].needs(self.resolved())

    def checked(self) -> AdapterSpec:
        """Itself; raises QtuneError with all faults."""
        faults = self.faults()
        if faults:
            raise QtuneError("Q107", "; ".join(faults))
        return self

    def to_dict(self) -> dict[str, Any]:
        """{"method", "targets", option: value}: plain values for JSON and YAML."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        return {"method": self.method, "targets": list(self.targets), **options}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> AdapterSpec:
        """The inverse of `to_dict`; also takes one target as a string and targets separated by commas."""
        rest = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k not in ("method", "targets")}
        targets = value.get("targets") or ()
        if isinstance(targets, str):
            targets = [t.strip() for t in targets.split(",") if t.strip()]
        return cls(str(value.get("method", "lora")), tuple(targets), rest)


def _fits(value: Any, default: Any) -> bool:
    """Is `value` of the type of an option's default? An int serves where a float is asked for; bool is not an int."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value)
    return isinstance(value, type(default))
