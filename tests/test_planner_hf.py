"""The stock stack on meta against the real libraries on a CPU, against itself uncut, and against published rows."""

from collections import Counter

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from qtune.errors import QtuneError
from qtune.planner import hf, layers
from qtune.planner.devices import find_device
from qtune.planner.hf_modules import Linear4, Linear8
from qtune.planner.hf_optim import optimizer_of
from qtune.planner.layers import find_layers
from qtune.planner.standins import scratch_on
from qtune.planner.trace import Segment, Tracer, followed, summed_in_place, without_collector
from qtune.recipe import Recipe

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def config(layers=2, vocab=320):
    return transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocab, tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip


def settings(**changes):
    plain = {
        "scheme": "float32", "rank": 4, "targets": QKVO, "rows": 2, "length": 32, "checkpointing": False,
        "attention": "sdpa", "compute": "float32", "optimizer": "adamw", "release": "installed",
    }  # fmt: skip
    return hf.HFSettings(**(plain | changes))


def nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- what is stored


@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_storage_is_that_of_bitsandbytes(nested):
    linear = torch.nn.Linear(192, 320, bias=False)
    codes, state = bnb.functional.quantize_4bit(
        linear.weight.data, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    real = nbytes(codes, state.absmax, state.code)
    if nested:
        real += nbytes(state.state2.absmax, state.state2.code, state.offset)
    made = Linear4(linear, torch.bfloat16, nested)
    assert nbytes(*made.parameters(), *made.buffers()) == real


def test_8_bit_storage_is_that_of_bitsandbytes():
    linear = torch.nn.Linear(192, 320, bias=False)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data.half())
    made = Linear8(linear)
    assert nbytes(*made.parameters(), *made.buffers()) == nbytes(codes, scales)


@pytest.mark.parametrize("targets", [QKVO, ("all-linear",), ("down_proj",)])
def test_trained_parameters_are_pefts(targets):
    real = transformers.AutoModelForCausalLM.from_config(config())
    names = targets[0] if targets == ("all-linear",) else list(targets)
    real = peft.get_peft_model(real, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    expected = sorted(tuple(p.shape) for p in real.parameters() if p.requires_grad)
    for scheme in ("nf4", "int8", "bfloat16"):
        made = hf.hf_model(config(), settings(scheme=scheme, compute="bfloat16", targets=targets))
        trained = [p for p in made.parameters() if p.requires_grad]
        assert sorted(tuple(p.shape) for p in trained) == expected
        assert {p.dtype for p in trained} == {torch.float32}


def test_preparation_makes_all_but_the_packed_fp32():
    made = hf.hf_model(config(), settings(scheme="nf4", compute="bfloat16"))
    assert {p.dtype for p in made.parameters()} == {torch.uint8, torch.float32}
    plain = hf.hf_model(config(), settings(scheme="nf4", compute="bfloat16", prepared=False))
    assert plain.lm_head.weight.dtype == torch.bfloat16


def test_8_bit_adam_has_the_states_of_bitsandbytes():
    shapes = [(64, 96), (17,), (40, 130)]  # below 4,096 values: fp32
    real = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    optimizer = bnb.optim.AdamW8bit(real)
    for index, p in enumerate(real):
        optimizer.init_state(optimizer.param_groups[0], p, 0, index)
    tables = ("qmap1", "qmap2")  # shared by all
    expected = sum(
        nbytes(t) for s in optimizer.state.values() for k, t in s.items() if torch.is_tensor(t) and k not in tables
    )
    made = optimizer_of([torch.nn.Parameter(torch.empty(s, device="meta")) for s in shapes], "adamw8bit", False)
    made.step()
    assert nbytes(*made.states) == expected


def test_paged_states_are_not_the_allocators():
    big = [torch.nn.Parameter(torch.empty(100_000, device="meta"))]
    paged, plain = optimizer_of(big, "paged-adamw8bit", False), optimizer_of(big, "adamw8bit", False)
    paged.step(), plain.step()
    assert nbytes(*plain.states) - nbytes(*paged.states) == 2 * 100_000


# ---- the step


def real_trace(s):
    """Two steps of transformers + PEFT on the CPU."""
    cfg = config()
    cfg._attn_implementation, cfg.use_cache = s.attention, False
    model = transformers.AutoModelForCausalLM.from_config(cfg, dtype=getattr(torch, s.scheme))
    model = peft.get_peft_model(model, peft.LoraConfig(r=s.rank, target_modules=list(s.targets)))
    base = model.get_base_model()
    if s.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model.train()
    device = find_device("cpu")
    tracer = Tracer(("cpu",), scratch=scratch_on(device))
    ids = torch.zeros(s.rows, s.length, dtype=torch.int64)
    with without_collector(), tracer:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tracer.adopt(tensor, "weights", name)
        tracer.adopt(ids, "batch")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        for _ in range(2):
            with followed(tracer, base, find_layers(base)[1]):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            tracer.enter(Segment("update"))
            optimizer.step()
            del loss
            optimizer.zero_grad()
    return tracer.stop()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "attention"),
    [("float32", True, "sdpa"), ("float32", False, "eager"), ("bfloat16", True, "eager"), ("bfloat16", False, "sdpa")]
    + [
        pytest.param(*case, marks=SLOW)
        for case in [("float32", False, "sdpa"), ("float32", True, "eager"), ("bfloat16", False, "eager")]
        + [("bfloat16", True, "sdpa")]
    ],
)
def test_the_trace_is_that_of_the_real_stack(dtype, checkpointing, attention):
    """The peak, and every block of the passes by op and size."""
    s = settings(scheme=dtype, checkpointing=checkpointing, attention=attention)
    planned, real = hf.hf_trace(config(), s, find_device("cpu")), real_trace(s)
    assert planned.peak()[0] == real.peak()[0]
    made = [
        Counter((trace.sizes[i], trace.ops[i].partition(".")[0]) for i, s in enumerate(born(trace)) if s.part in PASSES)
        for trace in (planned, real)
    ]
    assert made[0] == made[1]
    assert made[0].total() > 500


PASSES = ("forward", "loss", "backward")


def born(trace):
    return [trace.segments[at] for at in trace.born]


def graph(device):
    """A residual branch, a sum of two products, and a gradient that a view shares."""
    x = torch.zeros(64, 64, requires_grad=True, device=device)
    h = x * 1
    n = h + (h * 2) * (h * 3)
    return (n + (n.view(-1) * 2).view(64, 64)).sum()


def test_gradients_are_summed_where_autograd_sums_them(monkeypatch):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        graph("cpu").backward()
    names = [event.name for event in seen.events()]
    done = []

    def summed(args):
        done.append(summed_in_place(args)) if torch._C._current_graph_task_id() >= 0 else None
        return done[-1] if done else None

    monkeypatch.setattr("qtune.planner.trace.summed_in_place", summed)
    with Tracer(("meta",), scratch=lambda op, args: {}):
        graph("meta").backward()
    done = [made is not None for made in done]
    forward = 2
    assert done.count(True) == names.count("aten::add_") > 0
    assert done.count(False) == names.count("aten::add") - forward


@pytest.mark.parametrize(
    "scheme", ["nf4-double", pytest.param("int8", marks=SLOW), pytest.param("float16", marks=SLOW)]
)
def test_the_extension_is_the_whole_trace(monkeypatch, scheme):
    s = settings(scheme=scheme, compute="float16", checkpointing=True)
    device, find = find_device("t4"), layers.pattern
    cut = hf.hf_trace(config(layers=7), s, device)
    monkeypatch.setattr(layers, "pattern", lambda model: find(model).whole())
    whole = hf.hf_trace(config(layers=7), s, device)
    assert [cut.sizes[e] if e >= 0 else -cut.sizes[~e] for e in cut.events] == [
        whole.sizes[e] if e >= 0 else -whole.sizes[~e] for e in whole.events
    ]
    assert set(cut.names.values()) == set(whole.names.values())


def test_a_kept_output_costs_its_logits():
    """16 against 12 bytes a token and entry of the vocabulary, with an fp32 head."""
    base = settings(scheme="nf4", compute="bfloat16", checkpointing=True)
    vocab, device = 20_000, find_device("rtx4090")
    peaks = {
        release: hf.hf_trace(config(vocab=vocab), settings(**{**vars(base), "release": release}), device).peak()[0]
        for release in hf.RELEASES
    }
    logits = base.rows * base.length * vocab * 4
    assert peaks["published"] - peaks["installed"] == logits
    static = 4 * 2 * vocab * 64
    assert 4 * logits < peaks["published"] - static < 4.1 * logits


def test_states_of_the_second_step_and_nothing_else_stay():
    trace = hf.hf_trace(config(), settings(release="published"), find_device("t4"))
    alive = trace.alive(len(trace.events) - 1)
    trained = sum(trace.sizes[b] for b in alive if trace.kinds[b] == "adapters")
    left = sum(trace.sizes[b] for b in alive if trace.kinds[b] == "")
    assert left == 2 * trained  # AdamW's two moments


# ---- recipes and published rows


def test_settings_of_a_recipe():
    recipe = Recipe.load({"model": "smollm2-135m", "train": {"optimizer": "adamw8"}}, training=False)
    made = hf.hf_settings(recipe, 2, 64)
    assert (made.scheme, made.rank, made.targets, made.optimizer) == ("nf4-double", 16, ("all-linear",), "adamw8bit")
    with pytest.raises(QtuneError, match=r"adapter.method of --stack hf.*lora"):
        hf.hf_settings(recipe.with_({"adapter": "vera"}), 2, 64)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(QtuneError, match=r"match no linear layer"):
        hf.hf_model(config(), settings(targets=("nowhere",)))


@pytest.mark.parametrize(
    "name", [*("S16", "F11e", "F13", "P8"), *(pytest.param(name, marks=SLOW) for name in ("S18", "C2", "F7", "H9"))]
)
def test_published_rows(script, name):
    benchmark = script("published")
    row = next(row for row in benchmark.read_rows() if row["id"] == name)
    assert abs(benchmark.compared(row)["error"]) < 0.01


def test_gradients_are_there_from_the_second_micro_batch_on():
    base = settings(scheme="nf4", compute="bfloat16", checkpointing=True, rank=16)
    once, twice, more = (
        hf.hf_trace(config(), settings(**{**vars(base), "accumulate": n}), find_device("rtx4090")) for n in (1, 2, 5)
    )
    held = sum(once.sizes[block] for block, kind in enumerate(once.kinds) if kind == "gradients") // 2  # of two steps
    assert 0 < twice.peak()[0] - once.peak()[0] <= held and more.peak() == twice.peak()
