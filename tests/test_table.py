"""The input table in host memory: the same rows as before, nothing but rows on the device, and so in a plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_planner_trace import bytes_in_order
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtune.errors import QtuneError
from qtune.export import merged_entries
from qtune.memory.host import DEVICE, HOST, making, mark, place_of
from qtune.memory.table import TIED, table_on_host
from qtune.model import build, load
from qtune.planner.trace import Tracer
from qtune.quant import Dense, scheme_from
from qtune.verify import in_dtype

TABLES = [("llama", None), ("llama", "int8"), ("llama", "nf4"), ("gemma2-untied", None), ("gemma2-untied", "nf4")]
IDS = torch.arange(24).view(2, 12)


class TwoDevices(TorchDispatchMode):
    """Stands for a machine with a second memory: what is made under `on_host` is the host's, and only a copy may read
    from both."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = {place_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
        assert len(places) < 2 or "copy" in func.name(), f"{func.name()} mixes memories"
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out) if making() == HOST else ():
            mark(tensor, HOST)
        return out


def of(family: str, scheme: str | None, folder: Path) -> Any:
    untied = {"tie_word_embeddings": False} if family.endswith("-untied") else {}
    tiny.saved(family.removesuffix("-untied"), folder, torch.float32, **untied)
    embeddings = scheme_from(scheme) if scheme else None
    return load(folder, Dense("float32"), embeddings=embeddings, dtype=torch.float32)


@pytest.mark.parametrize(("family", "scheme"), TABLES)
def test_rows_are_gathered_on_the_host_and_nothing_else_is(family: str, scheme: str | None, tmp_path: Path) -> None:
    model = of(family, scheme, tmp_path)
    want, kind = model(IDS).logits, type(model.get_input_embeddings())
    assert table_on_host(model, "cpu") == "" and type(model.get_input_embeddings()) is kind
    assert table_on_host(model, "cuda") == table_on_host(model, "cuda") == ""
    table = model.get_input_embeddings()
    assert isinstance(table, kind) and {place_of(t) for t in table.state_dict().values()} == {HOST}
    with torch.no_grad():
        with TwoDevices(), pytest.raises(AssertionError, match="mixes memories"):
            kind.forward(table, IDS)
        with TwoDevices():
            got = model(IDS).logits
    assert torch.equal(got, want)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, want)


@pytest.mark.parametrize(("family", "scheme"), TABLES)
def test_it_stays_when_the_model_is_moved_and_cast(family: str, scheme: str | None, tmp_path: Path) -> None:
    model = of(family, scheme, tmp_path)
    before = model.get_input_embeddings()(IDS)
    table_on_host(model, "cuda")
    table = model.get_input_embeddings()
    kept = next(table.parameters()).detach().clone()
    model.to("meta")
    assert not any(t.is_meta for t in (*table.parameters(), *table.buffers())), "its rows go there, the table does not"
    assert table(IDS).is_meta and table.rows_go_to == torch.device("meta")
    model = of(family, scheme, tmp_path / "again")
    table_on_host(model, "cuda")
    table = model.get_input_embeddings().to(torch.bfloat16)
    assert table.rows_go_to == torch.device("cpu")
    assert torch.equal(next(table.parameters()), kept if scheme else kept.bfloat16())
    if scheme is None:
        assert torch.allclose(table(IDS).float(), before, rtol=2**-6) and table(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize(("family", "scheme"), TABLES)
def test_merging_reads_it(family: str, scheme: str | None, tmp_path: Path) -> None:
    def tensors(model: Any) -> dict[str, Tensor]:
        return {entry.name: entry.tensor() for entry in merged_entries(model, torch.float32)}

    model = of(family, scheme, tmp_path)
    want = tensors(model)
    table_on_host(model, "cuda")
    got = tensors(model)
    assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)
    with in_dtype(model, torch.bfloat16):
        assert model.get_input_embeddings()(IDS).dtype == torch.bfloat16


def test_a_tied_table_stays_and_the_user_is_told(tmp_path: Path) -> None:
    for number, scheme in enumerate((None, scheme_from("nf4"))):
        tiny.saved("llama-tied", tmp_path / str(number))
        model = load(tmp_path / str(number), Dense("float32"), embeddings=scheme)
        kind = type(model.get_input_embeddings())
        assert table_on_host(model, "cuda") == TIED
        assert type(model.get_input_embeddings()) is kind and place_of(next(model.parameters())) == DEVICE


def test_another_kind_of_table_is_refused_by_name() -> None:
    class Hashed(nn.Module):
        pass

    model = tiny.model("llama")
    model.set_input_embeddings(Hashed())
    with pytest.raises(QtuneError, match="LlamaForCausalLM is Hashed, which cannot lie .* memory.embeddings to device"):
        table_on_host(model, "cuda")


@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_a_plan_counts_the_rows_only(scheme: str | None, tmp_path: Path) -> None:
    """Event by event what the real model does, and less than before by the table."""
    real = of("llama", scheme, tmp_path)
    embeddings = scheme_from(scheme) if scheme else None
    made = [build(real.config, Dense("float32"), embeddings=embeddings, dtype=torch.float32) for _ in range(2)]
    rows = IDS.numel() * 64 * 4
    for model in (real, made[0]):
        assert table_on_host(model, "cuda") == ""
    traces = []
    for model in (real, *made):
        on = next(model.parameters()).device.type
        tracer = Tracer((on,), scratch=lambda op, args: {})
        for parameter in model.parameters():
            tracer.adopt(parameter, "weights")
        ids = IDS.to(on)
        with tracer, torch.no_grad():
            out = model.get_input_embeddings()(ids)
        del out
        traces.append(tracer.stop())
    assert bytes_in_order(traces[0]) == bytes_in_order(traces[1])
    assert traces[0].sizes[-1] == rows
    table = made[1].get_input_embeddings()
    nbytes = sum(p.numel() * p.element_size() for p in table.parameters())
    assert sum(traces[2].sizes) - sum(traces[1].sizes) == nbytes
