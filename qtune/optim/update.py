"""Optimizer: the trained parameters in buckets that are updated together, with fp32 masters where they are narrow.

With `host` the masters and states of a bucket (a decoder layer) wait in host memory and come to the device for its
update, the next bucket's while one is at work; the arithmetic is the same, so is every bit of the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Changes, replace_values
from ..errors import QtuneError, listed
from ..memory import HOST, host_empty, mark
from . import rules

NARROW = (torch.bfloat16, torch.float16)
MASTER = "master"
TOGETHER = 1 << 24  # values whose gradients are made fp32 at a time: 64 MiB, where all at once would be a step's peak


@dataclass(frozen=True)
class Rates:
    """What an update is asked for. betas: of the rule; scales: factors on the learning rate by parameter name."""

    rule: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    master_weights: bool
    scales: Mapping[str, float]
    seed: int

    def group_of(self, name: str, parameter: Tensor) -> tuple[str, float, float]:
        """(rule, scale, weight decay) of a parameter. Vectors (magnitudes, scales) rest at a start that is not 0, so
        decay would pull them away from it."""
        rule = rules.rule_of(self.rule, parameter)
        return rule, self.scales.get(name, 1.0), self.weight_decay if parameter.dim() > 1 else 0.0

    def state_bytes(self, wide: Tensor) -> int:
        """Bytes of the states that the rule keeps for a tensor."""
        return rules.state_bytes(rules.rule_of(self.rule, wide), tuple(wide.shape), wide.dtype)

    def master_of(self, parameter: nn.Parameter) -> Tensor:
        """What the rule updates: the parameter itself, or an fp32 copy of it."""
        if rules.rule_of(self.rule, parameter) == "adamw8":  # rounds bf16 itself; fp16 has no range to round in
            wide = parameter.dtype == torch.float16 or not parameter.is_contiguous()
        else:
            wide = parameter.dtype in NARROW and (self.master_weights or self.rule == "adamw8")
        return parameter.detach().float().contiguous() if wide else parameter


@dataclass
class _Waiting:
    """A master or a state in host memory; `put` says what stands for it now."""

    host: Tensor
    put: Callable[[Tensor], None]
    here: Tensor


class Bucket:
    """Parameters that are updated together. members: (place among all, name, parameter); count: of all parameters."""

    def __init__(self, members: Sequence[tuple[int, str, nn.Parameter]], rates: Rates, count: int) -> None:
        self.rates = rates
        self.pairs = [(parameter, rates.master_of(parameter)) for _, _, parameter in members]
        found: dict[str, dict[tuple[float, float], dict[str, Any]]] = {}
        for (place, name, parameter), (_, wide) in zip(members, self.pairs, strict=True):
            rule, scale, decay = rates.group_of(name, parameter)
            empty: dict[str, Any] = {"params": [], "places": [], "scale": scale, "weight_decay": decay}
            group = found.setdefault(rule, {}).setdefault((scale, decay), empty)
            group["params"].append(wide)
            group["places"].append(place)
        self.inner = [
            rules.made(rule, list(groups.values()), rates.lr, rates.betas, rates.seed, count)
            for rule, groups in found.items()
        ]
        self.waiting: dict[tuple[Tensor, str], _Waiting] = {}

    def update(self, factor: float) -> None:
        """One update at lr * factor, then the gradients are released."""
        masters = [pair for pair in self.pairs if pair[0] is not pair[1]]
        for parameter, wide in masters:
            if parameter.grad is not None:
                wide.grad = parameter.grad.float()
                parameter.grad = None
        for inner in self.inner:
            for group in inner.param_groups:
                group["lr"] = self.rates.lr * factor * group["scale"]
            inner.step()
        if masters:
            torch._foreach_copy_([parameter for parameter, _ in masters], [wide for _, wide in masters])
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for parameter, wide in self.pairs:
            parameter.grad = wide.grad = None

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter, _ in self.pairs if parameter.grad is not None]

    def change(self, changes: Changes) -> None:
        """Values, masters and states of parameters become what a method makes of them."""
        for parameter, wide in self.pairs:
            change = changes.get(parameter)
            if change is None:
                continue
            shape = wide.shape
            replace_values(wide, change.values(wide.detach()))
            if wide is not parameter:
                replace_values(parameter, wide.to(parameter.dtype))
            for inner in self.inner:
                states = inner.state.get(wide, {})
                sized = {key: state for key, state in states.items() if isinstance(state, Tensor) and state.dim()}
                if change.moments is None or any(state.shape != shape for state in sized.values()):
                    inner.state.pop(wide, None)
                else:
                    how = {"exp_avg_sq": change.squares or change.moments}
                    states.update({key: how.get(key, change.moments)(state) for key, state in sized.items()})
            self.waiting = {key: one for key, one in self.waiting.items() if key[0] is not wide}

    # ---- saved and restored

    def state(self, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[str, Tensor | int]]:
        """Every master and state under `parameter/state`, as it is, not a copy."""
        for parameter, wide in self.pairs:
            if wide is not parameter:
                yield f"{names[parameter]}/{MASTER}", wide.detach()
            for inner in self.inner:
                for key, value in inner.state.get(wide, {}).items():
                    yield f"{names[parameter]}/{key}", value

    @torch.no_grad()
    def restore(self, names: Mapping[nn.Parameter, str], saved: Mapping[str, Tensor | int], faults: list[str]) -> None:
        """Fill in what `state` gave. A parameter that had no states yet has none again."""
        for inner in self.inner:
            if not inner.state:
                rules.with_states(inner)
        for parameter, wide in self.pairs:
            name = names[parameter]
            if wide is not parameter:
                _fill(f"{name}/{MASTER}", wide, saved, faults)
            for inner in self.inner:
                states = inner.state.get(wide, {})
                if states and not any(f"{name}/{key}" in saved for key in states):
                    inner.state.pop(wide)
                    continue
                for key, value in states.items():
                    if (found := _fill(f"{name}/{key}", value, saved, faults)) is not None:
                        states[key] = found

    # ---- in host memory

    def make_room(self) -> None:
        """Memory on the device for everything that waits."""
        for one in self.waiting.values():
            one.here = torch.empty_like(one.host, device=self.device)
            one.put(one.here)

    def bring(self) -> None:
        """Fill it."""
        for one in self.waiting.values():
            one.here.copy_(one.host, non_blocking=True)

    def give_back(self, stream: Any) -> None:
        """Masters and states to host memory, those too that this update made. stream: on CUDA the one that copies."""
        for key, tensor, put in self._movable():
            one = self.waiting.get(key)
            if one is None:
                host = mark(host_empty(tensor.shape, tensor.dtype, self.device, "set memory.optimizer to device"), HOST)
                one = self.waiting[key] = _Waiting(host, put, host)
            one.host.copy_(tensor, non_blocking=stream is not None)
            if stream is not None:
                tensor.record_stream(stream)
            one.put(one.host)
            one.here = one.host

    @property
    def device(self) -> torch.device:
        return self.pairs[0][0].device

    def _movable(self) -> Iterator[tuple[tuple[Tensor, str], Tensor, Callable[[Tensor], None]]]:
        """Key, tensor and setter of each master and each state of more than one value."""
        for parameter, wide in self.pairs:
            if parameter is not wide:
                yield (wide, "master"), wide.data, partial(setattr, wide, "data")
        for inner in self.inner:
            for tensor, states in inner.state.items():
                for name, state in states.items():
                    if isinstance(state, Tensor) and state.numel() > 1:
                        yield (tensor, name), state, partial(states.__setitem__, name)


def _fill(name: str, here: Tensor | int, saved: Mapping[str, Tensor | int], faults: list[str]) -> Tensor | int | None:
    """What `here` becomes: the same tensor with the saved values, or the saved number; None, and a fault, where there
    is none that fits."""
    found = saved.get(name)
    if isinstance(here, Tensor) and isinstance(found, Tensor):
        if found.shape == here.shape and found.dtype == here.dtype:
            return here.copy_(found)
        wanted = f"{tuple(here.shape)} {here.dtype}"
        faults.append(f"{name} is {tuple(found.shape)} {found.dtype}, the optimizer needs {wanted}")
    elif isinstance(here, int) and isinstance(found, int):
        return found
    else:
        faults.append(f"{name} is missing" if found is None else f"{name} is of another kind")
    return None


class Optimizer:
    """What a step needs of an optimizer, by any of `rules.RULES`, over named parameters.

    betas: empty for the rule's own. weight_decay: of matrices only. master_weights: narrow parameters keep fp32 masters
    (adamw8 needs none). scales: factors on the learning rate by parameter name (LoRA+). seed: of adamw8's rounding.
    host: masters and states wait in host memory. apart: names whose gradient does not come from one decoder layer.
    """

    early = False  # does it update in the backward pass?

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        rule: str = "adamw",
        *,
        lr: float,
        betas: tuple[float, float] | tuple[()] = (),
        weight_decay: float = 0.0,
        master_weights: bool = True,
        scales: Mapping[str, float] | None = None,
        seed: int = 0,
        host: bool = False,
        apart: Collection[str] = (),
    ) -> None:
        named = list(parameters)
        own = rules.BETAS.get(rule, (0.0, 0.0))
        rates = Rates(rule, lr, betas or own, weight_decay, master_weights, scales or {}, seed)
        self.names = {parameter: name for name, parameter in named}
        self.host = host
        parts: dict[str, list[tuple[int, str, nn.Parameter]]] = {}
        values = 0
        for place, (name, parameter) in enumerate(named):
            if host or self.early:
                part = "" if name in apart else layer_of(name)
            else:
                values += parameter.numel()
                part = f"{values // TOGETHER}"
            parts.setdefault(part, []).append((place, name, parameter))
        self.buckets: dict[str, Bucket] = {}
        for layer, members in parts.items():
            bucket = self.buckets[layer] = Bucket(members, rates, len(named))
            if self.early:
                for inner in bucket.inner:
                    rules.with_states(inner)
            if host:
                bucket.give_back(None)
        device = named[0][1].device if named else torch.device("cpu")
        self._stream = torch.cuda.Stream(device) if host and device.type == "cuda" else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self.names)

    def state(self) -> dict[str, Tensor | int]:
        """All that the next update depends on besides the parameters and their gradients: `parameter/master` and
        `parameter/state`, tensors (as they are, not copies) and whole numbers."""
        if self._stream is not None:
            self._stream.synchronize()
        return {name: value for bucket in self.buckets.values() for name, value in bucket.state(self.names)}

    def restore(self, saved: Mapping[str, Tensor | int]) -> None:
        """Go on from what `state` gave, bit for bit. Raises QtuneError with all that does not fit; then the optimizer
        is to be made anew."""
        faults: list[str] = []
        for bucket in self.buckets.values():
            if self.host:
                bucket.make_room()
                bucket.bring()
            bucket.restore(self.names, saved, faults)
            if self.host:
                self._beside(partial(bucket.give_back, self._stream))
        known = set(self.names.values())
        faults += [f"{name} is of no trained parameter" for name in saved if name.rpartition("/")[0] not in known]
        if faults:
            raise QtuneError(
                "Q409",
                f"the optimizer's states do not fit: {listed(faults, between='; ')}",
            )

    def state_bytes(self) -> int:
        """Bytes of `state` once every parameter has been updated, scalars of a few bytes left out."""
        total = 0
        for bucket in self.buckets.values():
            for parameter, wide in bucket.pairs:
                total += (wide.nbytes if wide is not parameter else 0) + bucket.rates.state_bytes(wide)
        return total

    def begin(self, factor: float | None) -> None:
        """A backward follows; factor: that of the update which it may make, None: none."""

    def norm(self, limit: float) -> float:
        """Norm of the step's gradient; where it is beyond `limit`, the gradient is scaled down to that, in place."""
        return float(nn.utils.clip_grad_norm_(self.parameters, limit))

    def drop_gradients(self) -> None:
        """Release all gradients without an update."""
        for bucket in self.buckets.values():
            bucket.drop_gradients()

    @torch.no_grad()
    def follow(self, changes: Changes) -> None:
        """Let parameters change as a method says, with their masters and states."""
        for bucket in self.buckets.values() if changes else ():
            if self.host:
                bucket.make_room()
                bucket.bring()
            bucket.change(changes)
            if self.host:
                self._beside(partial(bucket.give_back, self._stream))

    def step(self, factor: float) -> None:
        """One update at lr * factor, then the gradients are released."""
        self._update(list(self.buckets.values()), factor)

    @torch.no_grad()
    def _update(self, buckets: Sequence[Bucket], factor: float) -> None:
        if not self.host:
            for bucket in buckets:
                bucket.update(factor)
            return
        ready = None
        for index, bucket in enumerate(buckets):
            if index == 0:
                bucket.make_room()
                ready = self._beside(bucket.bring)
            if ready is not None:
                torch.cuda.current_stream(bucket.device).wait_event(ready)
            if index + 1 < len(buckets):  # while this one is updated
                buckets[index + 1].make_room()
                ready = self._beside(buckets[index + 1].bring)
            bucket.update(factor)
            self._beside(partial(bucket.give_back, self._stream))

    def _beside(self, copies: Callable[[], None]) -> Any:
        """Run copies once what was asked for so far is computed, on CUDA beside what comes; returns the event of their
        end there."""
        if self._stream is None:
            copies()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copies()
        return self._stream.record_event()


def layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.down_proj.adapter.A`; nothing for what is in no numbered layer."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found[0] if found else ""
