"""Scheme: how a frozen weight is stored. A frozen dataclass, so a value: compared, printed and saved as such.

A packed weight is a dict of named parts; in memory they are 64-byte-aligned typed views of ONE flat uint8 tensor, so
that casting a model cannot touch scales, and digest, copy, memory map and sharding are each one operation on one
tensor. A scheme knows nothing of adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import QtuneError, one_of
from ..ops import plus

Parts = dict[str, Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
SCHEMES: dict[str, type[Scheme]] = {}
"""Every storage scheme by its name; `SCHEMES["nf4"](block=128)` makes one with its options."""


class Grid(NamedTuple):
    """What a weight may become: table[code] * scale + shift, for each weight its own. table fp32 [codes], rising;
    scale and shift fp32, broadcast to [out, in]."""

    table: Tensor
    scale: Tensor
    shift: Tensor


ALIGN = 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLOATS = (*DTYPES.values(), torch.float64)  # what a weight to be packed may be


@dataclass(frozen=True)
class Scheme(ABC):
    """How one weight [out, in] becomes parts and back. Subclasses register under their `name`."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__ or cls.name in SCHEMES:
            raise TypeError(
                f"{cls.__qualname__} needs a `name` of its own: an inherited or taken one would replace a scheme"
            )
        if not cls.name.startswith("_"):
            SCHEMES[cls.name] = cls

    @abstractmethod
    def layout(self, shape: Sequence[int]) -> Layout:
        """Part name -> (dtype, shape), in storage order, of a packed weight of `shape`."""

    def identity(self) -> tuple[str, ...]:
        """The parts that a digest covers: those whose every bit is the same on any machine and number of threads."""
        return tuple(self.layout((1, 1)))

    def magnitude(self, parts: Parts) -> float:
        """What scaling the whole weight changes where the identity parts do not; equal to 1e-5 on any machine."""
        return 0.0

    @abstractmethod
    def pack(self, w: Tensor) -> Parts:
        """w [out, in] float -> parts. Rounds to nearest; w must be finite (see `checked_pack`)."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Parts -> a fresh weight [out, in] in `dtype`."""

    @abstractmethod
    def rows(self, ids: Tensor, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """ids int64 [...] -> rows [..., in], without unpacking the others."""

    def matmul(
        self,
        x: Tensor,
        parts: Parts,
        shape: Sequence[int],
        transpose: bool,
        inner: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """x [..., in] -> x W^T, or with `transpose` x [..., out] -> x W. inner [..., r] and factor [out, r] add inner
        factor^T; with `transpose` factor is [r, in], and inner factor is added."""
        w = self.operand(parts, shape, x.dtype)
        return plus(x @ w if transpose else torch.nn.functional.linear(x, w), inner, factor, transpose)

    def operand(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`, to be multiplied with and not written to."""
        return self.unpack(parts, shape, dtype)

    def largest(self) -> float:
        """The largest magnitude that the scheme can store."""
        return torch.finfo(torch.float32).max

    def grid(self, parts: Parts, shape: Sequence[int]) -> Grid | None:
        """The values that each weight could have taken under the scales of `parts`; None: nothing is chosen."""
        return None

    def with_codes(self, parts: Parts, codes: Tensor, shape: Sequence[int]) -> Parts:
        """`parts` with other codes: uint8 [out, in], places in the table of `grid`."""
        raise NotImplementedError

    def of(self, site: str) -> Scheme:
        """The scheme of the layer `site`: this one everywhere (`Mixed` has others)."""
        return self

    def resolve(self, sizes: Mapping[str, int]) -> Scheme:
        """Itself, whatever layers there are (`Mixed` has patterns that must match)."""
        return self

    @property
    def code_bits(self) -> float:
        """Bits of one weight's code, without what scales take."""
        return float(self.name[-1])

    def checked_pack(self, w: Tensor, name: str = "weight") -> Parts:
        """`pack`, with NaN, infinity and what is no plain float refused by the tensor's name."""
        if w.dtype not in FLOATS:
            legal = ", ".join(map(str, FLOATS))
            raise QtuneError("Q311", f"{name} is {w.dtype} and cannot be packed as {self.name}; legal: {legal}")
        w = w.detach()
        if not w.is_meta and w.numel():
            low, high = (float(x) for x in torch.aminmax(w))  # one pass without temporaries; NaN comes through
            if not -self.largest() <= low <= high <= self.largest():
                raise self._fault(w, name)
        return self.pack(w)

    def _fault(self, w: Tensor, name: str) -> QtuneError:
        if bad := int((~torch.isfinite(w)).sum()):
            what = f"{bad} NaN or infinite of {w.numel()} values"
            return QtuneError(
                "Q311", f"{name} has {what} and cannot be packed as {self.name}; is the checkpoint damaged?"
            )
        big = int((w.abs() > self.largest()).sum())
        return QtuneError(
            "Q311", f"{name} has {big} of {w.numel()} values beyond the range of {self} ({self.largest():.5g})"
        )

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of one packed weight in memory, alignment included."""
        return _offsets(self.layout(shape))[1]

    def bits_per_weight(self, shape: Sequence[int] = (4096, 4096)) -> float:
        """Stored bits per weight at `shape`, without alignment."""
        return 8 * sum(_size(dtype, s) for dtype, s in self.layout(shape).values()) / prod(shape)

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., option: value}: `scheme_from` reads it back."""
        return {"name": self.name, **asdict(self)}

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in asdict(self).items())
        return f"{self.name}({options})" if options else self.name


def _size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return dtype.itemsize * prod(shape)


def _offsets(layout: Layout) -> tuple[dict[str, int], int]:
    """Where each part starts in the flat tensor, and the flat tensor's bytes."""
    offsets, end = {}, 0
    for name, (dtype, shape) in layout.items():
        offsets[name] = end
        end += -(-_size(dtype, shape) // ALIGN) * ALIGN
    return offsets, end


def flatten(scheme: Scheme, parts: Parts, shape: Sequence[int]) -> Tensor:
    """Copy parts into one flat uint8 tensor; their names, dtypes and shapes must be the scheme's."""
    layout = scheme.layout(shape)
    faults = [f"no part {name!r}" for name in layout if name not in parts] + [
        f"unknown part {name!r}" for name in parts if name not in layout
    ]
    for name, (dtype, size) in layout.items():
        if name in parts and (parts[name].dtype != dtype or tuple(parts[name].shape) != size):
            faults.append(
                f"{name} is {parts[name].dtype} {tuple(parts[name].shape)}; "
                f"{scheme} of {tuple(shape)} has {dtype} {size}"
            )
    if faults:
        raise QtuneError("Q306", "; ".join(faults))
    device = next(iter(parts.values())).device
    flat = torch.zeros(scheme.nbytes(shape), dtype=torch.uint8, device=device)
    for name, view in views(scheme, flat, shape).items():
        view.copy_(parts[name])
    return flat


def views(scheme: Scheme, flat: Tensor, shape: Sequence[int]) -> Parts:
    """The parts of a flat packed weight, as typed views (no copy)."""
    parts = {}
    for name, start, end, dtype, size in _places(scheme, tuple(shape)):
        part = flat[start:end].view(dtype)
        parts[name] = part if len(size) == 1 else part.view(size)
    return parts


@cache
def _places(scheme: Scheme, shape: tuple[int, ...]) -> list[tuple[str, int, int, torch.dtype, tuple[int, ...]]]:
    """Name, first byte, end, dtype and shape of each part: asked for in every product."""
    layout = scheme.layout(shape)
    offsets, _ = _offsets(layout)
    return [(name, offsets[name], offsets[name] + _size(*part), *part) for name, part in layout.items()]


@dataclass(frozen=True)
class Dense(Scheme):
    """Not quantized: the weight itself, frozen, in `dtype` (bfloat16, float16, float32)."""

    name: ClassVar[str] = "dense"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise one_of("dtype of scheme dense", self.dtype, DTYPES)

    def largest(self) -> float:
        return torch.finfo(DTYPES[self.dtype]).max

    @property
    def code_bits(self) -> float:
        return 8.0 * DTYPES[self.dtype].itemsize

    def layout(self, shape: Sequence[int]) -> Layout:
        return {"weight": (DTYPES[self.dtype], tuple(shape))}

    def pack(self, w: Tensor) -> Parts:
        return {"weight": w.to(DTYPES[self.dtype])}

    def unpack(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return parts["weight"].to(dtype, copy=True)

    def rows(self, ids: Tensor, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.embedding(ids, parts["weight"]).to(dtype)

    def operand(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return parts["weight"].to(dtype)


def scheme_from(value: str | Mapping[str, Any] | Scheme) -> Scheme:
    """A scheme from its name or a mapping {name: nf4, block: 64, ...}; all faults in one error."""
    if isinstance(value, Scheme):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        raise QtuneError(
            "Q108",
            f"a scheme is a name or a mapping with a name, not {value!r}; legal names: {', '.join(sorted(SCHEMES))}",
        )
    name = value["name"]
    if not isinstance(name, str) or name not in SCHEMES:
        raise one_of("scheme", name, SCHEMES)
    legal = {field.name: type(field.default) for field in fields(SCHEMES[name])}
    faults, options = [], {}
    for key, given in value.items():
        if key == "name":
            continue
        if key not in legal:
            faults.append(f"scheme {name} has no option {key!r}; legal: {', '.join(sorted(legal)) or 'none'}")
        elif type(given) is not legal[key]:
            faults.append(f"scheme {name}: {key} must be {legal[key].__name__}, not {given!r}")
        else:
            options[key] = given
    try:
        scheme = SCHEMES[name](**options)
    except QtuneError as fault:  # an illegal value is named together with the other faults
        faults.append(str(fault))
    if faults:
        raise QtuneError("Q108", "; ".join(faults))
    return scheme
