"""Methods that act in time: what they change between steps reaches the optimizer, is saved, resumed and planned.

The laws here hold for every method that has a hook in time; a method of this file's own, whose factors grow, stands for
those that do not exist yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save
from test_laws import IN, OUT, Case, Tiny, inputs, learned, plain
from torch import Tensor, nn
from torch.nn import functional as F

from qtune.adapters import METHODS, Adapter, adapted_sites
from qtune.adapters.base import Change, Changes
from qtune.adapters.files import INFO, TENSORS, adapter_tensors, load_adapter, save_adapter
from qtune.adapters.lora import LoRA
from qtune.errors import QtuneError
from qtune.headroom import at_worst
from qtune.optim import Optimizer
from qtune.optim.rules import RULES

HOOKS = ("before_step", "see_gradients", "after_step")
SHIPPED = sorted(METHODS)
IN_TIME = [name for name in SHIPPED if any(METHODS[name].has_own(hook) for hook in HOOKS)]
STEPS = 12


class Growing(LoRA):
    """Its rank rises by one behind every fourth step; B's new column is zero, so that nothing jumps."""

    grows: ClassVar[Mapping[str, tuple[int, str]]] = {"A": (0, "rank"), "B": (1, "rank")}

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        if step == 1 or (step - 1) % 4:
            return {}
        changes: dict[nn.Parameter, Change] = {}
        for one in adapters.values():
            assert isinstance(one, Growing)
            new = torch.full((1, one.A.shape[1]), 0.01 * step)
            changes[one.A] = Change(lambda a, new=new: torch.cat([a, new.to(a)]), lambda m: F.pad(m, (0, 0, 0, 1)))
            changes[one.B] = Change(lambda b: F.pad(b, (0, 1)), lambda m: F.pad(m, (0, 1)))
        return changes

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        for one in adapters.values():
            one.resize({"rank": one.sizes()["rank"] + (1 if steps is None else (steps - 1) // 4)})


@pytest.fixture(autouse=True)
def _growing_is_a_method() -> Iterator[None]:
    METHODS["growing"], Growing.method = Growing, "growing"
    yield
    METHODS.pop("growing", None)
    METHODS.pop("test_in_time", None)


METHODS.pop("test_in_time", None)


class Run:
    """Training by hand, as TrainStep does it."""

    def __init__(self, case: Case, model: Tiny | None = None, rule: str = "adamw", dtype: Any = torch.float32) -> None:
        self.case, self.rule = case, rule
        self.model = case.model(dtype=dtype) if model is None else model
        self.adapters = {name: site.adapter for name, site in adapted_sites(self.model).items()}
        self.method = METHODS[case.method]
        self.optimizer = Optimizer(learned(self.model).items(), rule, lr=0.01)
        self.biggest = 0

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last + 1):
            factor = self.method.warmth(self.adapters, step, STEPS)
            self.optimizer.follow(self.method.before_step(self.adapters, step, STEPS))
            self.biggest = max(self.biggest, self.nbytes())
            torch.manual_seed(step)
            x = inputs(self.model.gain.dtype, (16, IN)) + 0.1 * torch.randn(16, IN).to(self.model.gain)
            y = self.model(x)
            loss = F.mse_loss(y.float(), torch.ones(16, OUT))
            terms = [term for one in self.adapters.values() if (term := one.penalty()) is not None]
            torch.stack([loss, *terms]).sum().backward()
            self.optimizer.norm(1.0)
            self.method.see_gradients(self.adapters, step, STEPS)
            self.optimizer.step(factor)
            self.optimizer.follow(self.method.after_step(self.adapters, step, STEPS))
            losses.append(loss.item())
        return losses

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in adapter_tensors(self.model).values())

    def copy(self, tmp: Path) -> Run:
        """Saved and loaded, as a resumed run is."""
        save_adapter(self.model, self.case.spec(), tmp, {"model": "tiny"})
        state = {name: v.clone() if isinstance(v, Tensor) else v for name, v in self.optimizer.state().items()}
        model = plain(self.case, self.model)
        load_adapter(model, tmp)
        run = Run(self.case, model, self.rule)
        run.optimizer.restore(state)
        return run


@pytest.mark.parametrize("method", [*IN_TIME, "growing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_bit_for_bit(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(method, "nf4", tmp_path)
    whole, again = Run(case, dtype=dtype), Run(case, dtype=dtype)
    losses = whole.steps(1, STEPS)
    parts = []
    for first, last in ((1, 3), (4, 7), (8, STEPS)):
        parts += again.steps(first, last)
        again = again.copy(tmp_path / str(last))
    assert parts == losses
    other = adapter_tensors(again.model)
    for name, tensor in adapter_tensors(whole.model).items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("method", [*IN_TIME, "growing"])
def test_no_change_between_steps_loses_what_was_learned(method: str, tmp_path: Path) -> None:
    """At least 99 % of the delta is there behind a change: of every site, wherever a method changes something."""
    run = Run(Case(method, "nf4", tmp_path))
    plain_weights = {name: site.base.dequantize() for name, site in adapted_sites(run.model).items()}

    def deltas() -> dict[str, Tensor]:
        return {name: site.merged()[0] - plain_weights[name] for name, site in adapted_sites(run.model).items()}

    for step in range(1, STEPS):
        run.steps(step, step)
        before = deltas()
        changes = METHODS[method].before_step(run.adapters, step + 1, STEPS)
        run.optimizer.follow(changes)
        for name, delta in deltas().items():
            lost = (delta - before[name]).norm() / before[name].norm().clamp(min=1e-12)
            assert lost <= 0.01, f"step {step + 1}: {lost:.1%} of what {name} had learned is gone"


@pytest.mark.parametrize("method", [*IN_TIME, "growing"])
def test_no_step_takes_more_than_the_worst(method: str, tmp_path: Path) -> None:
    case = Case(method, "nf4", tmp_path)
    run, meta = Run(case), Run(case, case.model(device="meta"))
    METHODS[method].worst(meta.adapters, STEPS)
    run.steps(1, STEPS)
    assert run.biggest <= meta.nbytes()


def test_sizes_and_values_are_back_after_the_worst(tmp_path: Path) -> None:
    run = Run(Case("growing", "nf4", tmp_path))
    before = {name: tensor.clone() for name, tensor in adapter_tensors(run.model).items()}
    with at_worst(run.adapters, 9):
        assert run.adapters["up_proj"].sizes() == {"rank": 6}
        assert run.model(inputs()).shape == (5, OUT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(run.model).items())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("host", [False, True])
def test_the_optimizer_follows(rule: str, host: bool) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(96, 64).bfloat16())  # adamw8 serves 4,096 values and more
    optimizer = Optimizer([("layers.0.A", parameter)], rule, lr=0.01, host=host)
    for _ in range(2):
        parameter.grad = torch.randn(96, 64).bfloat16()
        optimizer.step(1.0)
    before = {name: v.clone() if isinstance(v, Tensor) else v for name, v in optimizer.state().items()}
    grown = Change(lambda a: F.pad(a, (0, 0, 0, 4), value=2.0), lambda m: F.pad(m, (0, 0, 0, 4)))
    optimizer.follow({parameter: grown})
    assert parameter.shape == (100, 64) and parameter.dtype == torch.bfloat16
    assert (parameter[96:] == 2).all()
    after = optimizer.state()
    for name, old in before.items():
        kind = name.rpartition("/")[2]
        if isinstance(old, Tensor) and old.shape == (96, 64):
            assert torch.equal(after[name][:96], old), kind
        elif rule in ("adamw8", "adafactor"):
            assert name not in after or kind == "master", "states that do not have the parameter's shape begin anew"
    parameter.grad = torch.randn(100, 64).bfloat16()
    optimizer.step(1.0)
    optimizer.follow({parameter: Change(lambda a: torch.zeros_like(a))})
    assert not parameter.any()
    assert [name for name in optimizer.state() if not name.endswith("/master")] == []


def test_a_file_of_other_sizes_is_refused(tmp_path: Path) -> None:
    run = Run(Case("growing", "nf4", tmp_path))
    run.steps(1, 6)
    save_adapter(run.model, run.case.spec(), tmp_path / "a", {"model": "tiny"})
    tensors = load_file(tmp_path / "a" / TENSORS)
    tensors["up_proj.B"] = tensors["up_proj.B"][:, :-1].contiguous()
    content = save(tensors)
    (tmp_path / "a" / TENSORS).write_bytes(content)
    info = json.loads((tmp_path / "a" / INFO).read_text())
    info |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (tmp_path / "a" / INFO).write_text(json.dumps(info))
    with pytest.raises(QtuneError, match=r"up_proj\.B: \(96, 4\)"):
        load_adapter(plain(run.case, run.model), tmp_path / "a")
