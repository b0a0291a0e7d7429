"""Loss, optimizer, step and trainer: equal to transformers and torch, and safe where a run goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import runs_helper
import tiny
import torch
from cpu_kernels import cpu_kernels
from torch import nn

from qtune import loss as loss_module
from qtune.adapters import AdapterSpec, adapt
from qtune.batches import Capacity, collate, steps_of
from qtune.data import Example, load_data
from qtune.errors import QtuneError
from qtune.evaluate import choices_of, evaluate
from qtune.loss import LossOptions, cross_entropy_sum, logit_transform, loss_options
from qtune.model import load
from qtune.optim import Optimizer, lr_factor
from qtune.quant import NF4, Dense, QuantLinear
from qtune.recipe import Recipe
from qtune.sections import MemoryKeys, TrainKeys
from qtune.step import LanguageModel, NonFinite, TrainStep
from qtune.trainer import Trainer, train


def batch(length: int = 16, rows: int = 2) -> object:
    ids = tiny.ids(length)[:rows]
    labels = ids.clone()
    labels[:, : length // 3] = -100
    mask = torch.ones_like(ids)
    return type("Batch", (), {"input_ids": ids, "attention_mask": mask, "labels": labels})()


# ---- loss ----


@pytest.mark.parametrize("family", tiny.DENSE)
def test_loss_equals_transformers(family: str, tmp_path: Path) -> None:
    own = tiny.saved(family, tmp_path)
    ours = LanguageModel(load(tmp_path, Dense("float32"), dtype=torch.float32))
    ours.check()
    b = batch()
    expected = own(input_ids=b.input_ids, attention_mask=b.attention_mask, labels=b.labels).loss
    assert torch.allclose(ours.loss_sum(b) / (b.labels[:, 1:] != -100).sum(), expected, rtol=1e-5)


def test_a_bf16_head_adapter_loses_no_chunk_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 chunks of equal gradients: in bf16 the sum would stop growing at 256 times one of them."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 1)  # chunks of 16 rows
    head = nn.Linear(8, 5, bias=False, dtype=torch.bfloat16)
    row = torch.randn(1, 1, 8, dtype=torch.bfloat16)
    gradients = []
    for chunks in (1, 1024):
        hidden = row.expand(1, 16 * chunks + 1, 8).clone().requires_grad_()
        loss = cross_entropy_sum(hidden, torch.ones(hidden.shape[:2], dtype=torch.int64), head, 5, lambda x: x)
        gradients += torch.autograd.grad(loss, list(head.parameters()))
    assert torch.allclose(gradients[1].float(), 1024 * gradients[0].float(), rtol=2**-7)


def test_a_head_adapter_that_is_switched_off_gets_no_gradient() -> None:
    class Head(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 5)
            self.unused = nn.Parameter(torch.ones(3))

    head, hidden = Head(), torch.randn(1, 4, 8, requires_grad=True)
    cross_entropy_sum(hidden, torch.ones(1, 4, dtype=torch.int64), head, 5, lambda x: x).backward()
    assert head.unused.grad is None or not head.unused.grad.any()
    assert hidden.grad is not None and hidden.grad.any()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_chunked_gradient_equals_float64(monkeypatch: pytest.MonkeyPatch, cap: float | None) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 1)  # chunks of 16 rows
    head = nn.Linear(24, 37, bias=False)
    hidden = torch.randn(3, 20, 24, requires_grad=True)
    labels = torch.randint(0, 37, (3, 20))
    labels[1, 4:9] = -100
    transform = logit_transform(type("Config", (), {"final_logit_softcapping": cap}))
    got = cross_entropy_sum(hidden, labels, head, 37, transform)
    (2 * got).backward()

    wide, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    logits = wide[:, :-1] @ weight.T
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    expected = nn.functional.cross_entropy(logits.reshape(-1, 37), labels[:, 1:].reshape(-1), reduction="sum")
    (2 * expected).backward()
    assert torch.allclose(got.double(), expected, rtol=1e-6)
    assert torch.allclose(hidden.grad.double(), wide.grad, atol=1e-5)
    assert torch.allclose(head.weight.grad.double(), weight.grad, atol=1e-5), "a trained head gets its gradient too"


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("options", [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3)])
def test_smoothing_and_z_loss_equal_float64(chunk: int | None, options: tuple[float, float]) -> None:
    smoothing, z_loss = options
    head, hidden = nn.Linear(24, 37, bias=False), torch.randn(3, 20, 24, requires_grad=True)
    labels = torch.randint(0, 37, (3, 20))
    labels[1, 4:9] = -100
    transform = logit_transform(type("Config", (), {"final_logit_softcapping": 3.0}))
    got = cross_entropy_sum(hidden, labels, head, 37, transform, LossOptions(chunk, smoothing, z_loss))
    got.backward()
    wide, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double()
    logits, target = (torch.tanh(wide[:, :-1] @ weight.T / 3) * 3).reshape(-1, 37), labels[:, 1:].reshape(-1)
    expected = nn.functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)
    expected = expected + z_loss * logits[target != -100].logsumexp(1).square().sum()
    expected.backward()
    assert torch.allclose(got.double(), expected, rtol=1e-6)
    assert torch.allclose(hidden.grad.double(), wide.grad, atol=1e-5)
    with torch.no_grad():
        again = cross_entropy_sum(hidden, labels, head, 37, transform, LossOptions(chunk, smoothing, z_loss))
    assert torch.allclose(again, got.detach(), rtol=1e-6)


def test_evaluation_knows_no_smoothing_and_keeps_to_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Recipe.load(
        {"model": "x"}, ["train.label_smoothing=0.2", "train.z_loss=1e-3", "memory.loss_chunk=5"], training=False
    )
    options = loss_options(keys.train, keys.memory, "cpu")
    assert options == LossOptions(5, 0.2, 1e-3)
    assert loss_options(TrainKeys(), MemoryKeys(), "cuda").rows(128256) == 512
    model, seen = tiny.model("llama"), []
    plain, smoothed = LanguageModel(model), LanguageModel(model, options)
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    free = [Example(list(range(2, 30 + n)), b"\1" * (28 + n), "") for n in range(3)]
    choice = [Example([2, 3, 4 + n % 2], b"\0\0\1", "") for n in range(4)]
    for examples in (free, choice):
        want, chunks = evaluate(plain, examples, capacity=Capacity(2)), len(seen)
        got = evaluate(smoothed, examples, capacity=Capacity(2))
        assert got.loss == pytest.approx(want.loss, rel=1e-6) and got.accuracy == want.accuracy
        assert max(seen[chunks:]) <= 5
        seen.clear()
    batch = collate(free)
    assert smoothed.loss_sum(batch).item() > 1.001 * plain.loss_sum(batch).item()


@pytest.mark.parametrize("given", ["train.label_smoothing=1", "train.label_smoothing=-0.1", "train.z_loss=-1"])
def test_illegal_options_of_the_loss_are_named(given: str) -> None:
    with pytest.raises(QtuneError, match=r"is -?[0-9.]+; legal: a number >= 0"):
        Recipe.load({"model": "x"}, [given], training=False)


def test_no_trained_position_is_no_loss() -> None:
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    total = cross_entropy_sum(hidden, torch.full((1, 4), -100), nn.Linear(8, 5), 5, lambda x: x)
    total.backward()
    assert total == 0 and not hidden.grad.any()


def test_architecture_that_changes_its_logits_is_refused() -> None:
    model = tiny.model("llama")
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = scaled
    with pytest.raises(QtuneError, match="LlamaForCausalLM changes its logits"):
        LanguageModel(model).check()


# ---- optimizer ----


def test_master_weights_keep_updates_that_bf16_loses() -> None:
    moved = {}
    for master in (True, False):
        weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = Optimizer([("w", weight)], lr=1e-3, master_weights=master)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimizer.step(1.0)
        moved[master] = float((1 - weight.float()).mean())
    assert moved[False] == 0, "an update of 1e-3 of a weight is below bf16's step"
    assert moved[True] == pytest.approx(0.04, rel=0.1)


def test_optimizer_equals_torch_in_fp32() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 9).view(3, 3)) for _ in range(2))
    optimizer = Optimizer([("w", ours)], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    for step in range(5):
        for parameter in (ours, theirs):
            parameter.grad = torch.sin(parameter.detach() + step)
        optimizer.step(1.0)
        reference.step()
    assert torch.equal(ours, theirs) and ours.grad is None


def test_weight_decay_leaves_vectors_at_their_start() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer([("m", matrix), ("v", vector)], lr=1e-2, weight_decay=0.5)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step(1.0)
    assert torch.all(vector == 1) and torch.all(matrix < 1)


def test_scales_are_factors_on_the_learning_rate() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = Optimizer([("a", a), ("b", b)], lr=1e-3, scales={"b": 16.0})
    a.grad = b.grad = torch.ones(1)
    optimizer.step(0.5)
    assert float(b / a) == pytest.approx(16.0, rel=1e-3) and float(a) == pytest.approx(-5e-4, rel=1e-3)


def test_schedules() -> None:
    assert [lr_factor(s, 10, "constant", 0.4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_factor(s, 4, "linear", 0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert lr_factor(5, 10, "cosine", 0) == pytest.approx(0.5) and lr_factor(0, 10, "cosine", 5) == pytest.approx(0.2)


# ---- step ----


def step_of(folder: Path, **options: object) -> tuple[LanguageModel, TrainStep]:
    model = load(folder, NF4(block=32), dtype=torch.float32)
    adapt(model, AdapterSpec("lora", (), {"rank": 4}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()), std=0.1)
    language = LanguageModel(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return language, TrainStep(language, Optimizer(named, lr=1e-3), **{"clip": None} | options)


def test_two_micro_batches_of_one_equal_one_of_two(tmp_path: Path) -> None:
    folder = runs_helper.write_model(tmp_path / "m")
    examples, _ = load_data(runs_helper.write_task(tmp_path), tiny.words(tmp_path), max_length=32, loss_on="all")
    short, long = sorted(examples, key=lambda e: len(e.input_ids))[:: len(examples) - 1]
    assert len(short.input_ids) < len(long.input_ids)
    updated = []
    for micro_batches in ([collate([short, long])], [collate([short]), collate([long])]):
        _, step = step_of(folder)
        done = step(micro_batches, 1, 1, 1.0)
        updated.append((done.loss, [p.detach().clone() for p in step.optimizer.parameters]))
    assert updated[0][0] == pytest.approx(updated[1][0], rel=1e-6)
    for one, two in zip(updated[0][1], updated[1][1], strict=True):
        assert torch.allclose(one, two, atol=2e-5)


def test_clipping_limits_the_norm_that_is_reported(tmp_path: Path) -> None:
    folder = runs_helper.write_model(tmp_path / "m")
    norms = {}
    for clip in (None, 1e-3):
        _, step = step_of(folder, clip=clip)
        seen: list[float] = []
        update = step.optimizer.step

        def spy(factor: float, step: TrainStep = step, seen: list[float] = seen, update: object = update) -> None:
            seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in step.optimizer.parameters)))
            update(factor)

        step.optimizer.step = spy
        norms[clip] = (step([batch()], 1, 1, 1.0).grad_norm, seen[0])
    assert norms[None][0] == pytest.approx(norms[None][1], rel=1e-5)
    assert norms[1e-3][0] == pytest.approx(norms[None][0], rel=1e-5) and norms[1e-3][1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("own", [True, False])
def test_every_attention_is_the_same_attention(
    own: bool, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(runs_helper.write_model(tmp_path / "m", family), Dense("float32"), dtype=torch.float32)
    language, b = LanguageModel(model), batch()
    b.attention_mask[1, 11:] = 0
    b.labels[1, 11:] = -100
    torchs = language.loss_sum(b)
    if own:
        cpu_kernels("attention")
        monkeypatch.setattr("qtune.backend.simd", lambda module: "avx512")
        assert language.choose_attention(1000) == language.choose_attention(12) == "qtune's kernel", "the second time"
        assert model.config._attn_implementation == "qtune"
    else:
        monkeypatch.setattr("qtune.step.use_own_attention", lambda model, device: False)
        assert not language.choose_attention(129) and "128" in language.choose_attention(128)
        assert model.config._attn_implementation == "eager"
    assert torch.allclose(language.loss_sum(b), torchs, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "adamw8"])
def test_every_optimizer_of_a_recipe_learns(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.optim.rules.SMALL", 64)  # so that the states of this tiny adapter are the packed ones
    result = train(runs_helper.recipe(tmp_path, train__steps=40, train__optimizer=optimizer))
    assert result.after.accuracy == 1.0 and result.after.loss < result.before.loss


def test_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    losses = []
    for checkpointing in (True, False):
        recipe = runs_helper.recipe(
            tmp_path, train__checkpointing=checkpointing, train__steps=4, output=str(tmp_path / str(checkpointing))
        )
        losses.append(train(recipe).losses)
    assert losses[0] == losses[1]


def test_nothing_below_the_first_adapter_is_differentiated(tmp_path: Path) -> None:
    model = load(runs_helper.write_model(tmp_path / "m"), NF4(block=32), dtype=torch.float32)
    adapt(model, AdapterSpec("lora", ("model.layers.1.mlp.down_proj",), {"rank": 2}))
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(lambda m, i, o, name=name: seen.append((name, o.requires_grad)))
    LanguageModel(model).loss_sum(batch())
    assert not any(grad for name, grad in seen), "no base product of this model needs a gradient"


# ---- runs ----


def test_a_run_learns_and_leaves_a_whole_folder(tmp_path: Path) -> None:
    recipe = runs_helper.recipe(tmp_path, train__steps=60, train__eval_every=30)
    result = train(recipe)
    assert (
        result.before.accuracy is not None and result.after.accuracy == 1.0 and result.after.loss < result.before.loss
    )
    assert sorted(p.name for p in result.folder.iterdir()) == [
        "adapter.json", "adapter.safetensors", "checkpoints", "metrics.jsonl", "recipe.yaml", "run.json",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 61))
    assert [r["step"] for r in rows if "eval_loss" in r] == [0, 30, 60]
    assert json.loads((result.folder / "adapter.json").read_text())["base"]["step"] == 60


def test_same_seed_same_run(tmp_path: Path) -> None:
    few = {"adapter__dropout": 0.1, "train__steps": 3}
    runs = [train(runs_helper.recipe(tmp_path, output=str(tmp_path / name), **few)) for name in "ab"]
    assert runs[0].losses == runs[1].losses
    other = train(runs_helper.recipe(tmp_path, output=str(tmp_path / "c"), train__seed=1, **few))
    assert other.losses != runs[0].losses


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    recipe = runs_helper.recipe(tmp_path, train__steps=1)
    train(recipe)
    before = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    with pytest.raises(QtuneError, match="already holds a trained adapter; choose another folder"):
        train(recipe)
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == before
    train(recipe, overwrite=True)


def test_start_from_another_run(tmp_path: Path) -> None:
    first = train(runs_helper.recipe(tmp_path, train__steps=6))
    second = train(runs_helper.recipe(tmp_path, train__steps=1, output=str(tmp_path / "two")), start_from=first.folder)
    assert second.before.loss == pytest.approx(first.after.loss, rel=1e-5)


def test_loss_that_is_not_finite_stops_with_step_and_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LanguageModel.loss_sum
    calls = iter(range(100))

    def poisoned(self: LanguageModel, b: object) -> torch.Tensor:
        return real(self, b) * (math.nan if self.model.training and next(calls) == 5 else 1.0)

    monkeypatch.setattr(LanguageModel, "loss_sum", poisoned)
    recipe = runs_helper.recipe(tmp_path, train__save_every=2, train__max_skipped=0)
    with pytest.raises(NonFinite, match=r"step 6: loss is nan.*adapter.safetensors holds the adapter of step 4"):
        train(recipe)
    assert json.loads((tmp_path / "run" / "adapter.json").read_text())["base"]["step"] == 4


def test_a_bad_gradient_changes_no_weight(tmp_path: Path) -> None:
    _, step = step_of(runs_helper.write_model(tmp_path / "m"))
    before = [p.detach().clone() for p in step.optimizer.parameters]
    step.optimizer.parameters[0].register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFinite, match="step 3: .*gradient norm is (nan|inf)"):
        step([batch()], 3, 9, 1.0)
    for old, new in zip(before, step.optimizer.parameters, strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer._log

    def press(self: Trainer, step: int, row: dict[str, object]) -> None:
        real(self, step, row)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_log", press)
    result = train(runs_helper.recipe(tmp_path))
    assert result.interrupted and result.steps == 3 and result.after is None
    assert json.loads((tmp_path / "run" / "adapter.json").read_text())["base"]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(QtuneError, match="WORLD_SIZE is 2: qtune trains on one device"):
        train(runs_helper.recipe(tmp_path))


def test_output_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QtuneError, match="cannot write .*file"):
        train(runs_helper.recipe(tmp_path, output=str(tmp_path / "file" / "run")))


def test_steps_of_epochs(tmp_path: Path) -> None:
    keys = runs_helper.recipe(
        tmp_path, train__steps=None, train__epochs=1.5, train__micro_batch=4, train__accumulate=2
    ).train
    assert steps_of(keys, [7] * 21) == math.ceil(1.5 * 6 / 2)


# ---- evaluation ----


def test_choice_accuracy_equals_likelihood_by_hand(tmp_path: Path) -> None:
    folder = runs_helper.write_model(tmp_path / "m")
    model = load(folder, Dense("float32"), dtype=torch.float32)
    examples, _ = load_data(runs_helper.write_task(tmp_path), tiny.words(tmp_path), max_length=32)
    answers = choices_of(examples)
    assert answers is not None and len(answers) == 2
    right = total = 0.0
    for example in examples:
        start = example.trained.find(1)
        scores = []
        for answer in answers:
            ids = torch.tensor([[*example.input_ids[:start], *answer]])
            logp = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[start - 1 + i, token]) for i, token in enumerate(answer)))
        label = answers.index(tuple(example.input_ids[start:]))
        right += scores.index(max(scores)) == label
        total -= scores[label]
    result = evaluate(LanguageModel(model), examples, capacity=Capacity(5))
    assert result.accuracy == pytest.approx(right / len(examples))
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-4)


def test_open_answers_are_no_choice(tmp_path: Path) -> None:
    path = tmp_path / "open.jsonl"
    rows = [json.dumps({"prompt": "w1 ", "completion": f"w{i} w3"}) for i in range(9)]
    path.write_text("\n".join(rows))
    examples, _ = load_data(path, tiny.words(tmp_path), max_length=32)
    assert choices_of(examples) is None
