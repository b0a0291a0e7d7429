"""New tokens: only their own rows of table and head are trained, and they come through save, resume, merge, export."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import runs_helper
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.adapter_export import export_peft
from qtune.adapters import AdapterSpec, adapt
from qtune.adapters.files import INFO, TENSORS, adapter_tensors, read_adapter_json
from qtune.batches import Batch
from qtune.cli import main
from qtune.data.words import add_words, split_marks
from qtune.errors import QtuneError
from qtune.evaluate import generate
from qtune.export import merge
from qtune.loss import LossOptions
from qtune.memory.table import table_on_host
from qtune.model import load, load_tokenizer
from qtune.quant import QuantLinear, scheme_from
from qtune.recipe import Recipe
from qtune.resume import base_digest
from qtune.runs import Run, open_run
from qtune.screen import Screen
from qtune.sections import TokenKeys
from qtune.step import LanguageModel
from qtune.trainer import train
from qtune.verify import logits_of
from qtune.vocabulary import HEAD, TABLE, Token, TokenHead, TokenTable, bare, build_rows, give_rows, rows_of, start_rows

QUIET = Screen(quiet=True)
IDS = (5, 129, tiny.VOCAB, tiny.VOCAB + 1)  # one that is used, one in the padded part, two behind the last row
TOKENS = tuple(Token(f"<{id}>", id, id > 100) for id in IDS)


# ---- gradients


def grown(model: Any) -> Any:
    """The same model, dense and with all of it trained, whose table and head hold the rows of `model`."""
    own = rows_of(model)
    assert own is not None
    dense = copy.deepcopy(model)
    for name, module in zip(own.names, (own.table, own.head), strict=True):
        weight = torch.cat((bare(module).weight.detach(), torch.zeros(2, module.shape[1], dtype=torch.float64)))
        weight[module.ids] = module.rows.detach()
        kept = dense.get_submodule(name).base
        kept.weight = nn.Parameter(weight)
        dense.set_submodule(name, kept)
    if len(own.tensors()) == 1:
        dense.get_output_embeddings().weight = dense.get_input_embeddings().weight
    return dense


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt2"])
def test_gradients_are_those_of_a_dense_model(family: str) -> None:
    """By torch's autograd over the whole matrices in float64, in these rows; the loss in several chunks."""
    ours: Any = tiny.model(family, torch.float64).requires_grad_(False)
    give_rows(ours, TOKENS, "mean")
    own = rows_of(ours)
    assert own is not None
    assert (len(own.tensors()) == 1) == ours.config.tie_word_embeddings
    torch.manual_seed(1)
    for rows in own.tensors().values():
        rows.data += 0.1 * torch.randn_like(rows)
    dense = grown(ours)
    ids = tiny.ids()
    ids[:, ::3] = torch.tensor(IDS).repeat(2, 2)
    labels = ids.masked_fill(torch.arange(24) < 5, -100)
    language = LanguageModel(ours, LossOptions(chunk=7))
    loss = language.loss_sum(Batch(ids, torch.ones_like(ids), labels))
    loss.backward()
    logits = LanguageModel(dense).model(ids).logits  # the same norms, which transformers has in fp32
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)  # the sum is fp32
    torch.testing.assert_close(ours(ids).logits, logits, rtol=1e-9, atol=1e-9)
    for module in (own.table, own.head):
        given = dense.get_submodule(own.names[module is own.head]).weight.grad[module.ids]
        assert given.abs().min(1).values.max() > 0
        torch.testing.assert_close(module.rows.grad, given, rtol=1e-9, atol=1e-9)
    hidden = torch.randn(3, own.head.shape[1], dtype=torch.float64, requires_grad=True)
    (given,) = torch.autograd.grad(own.head(hidden).square().sum() + own.head(hidden).sum(), hidden)
    (want,) = torch.autograd.grad(dense.lm_head(hidden).square().sum() + dense.lm_head(hidden).sum(), hidden)
    torch.testing.assert_close(given, want, rtol=1e-9, atol=1e-9)
    assert {n for n, p in ours.named_parameters() if p.grad is not None} <= {f"{n}.rows" for n in own.names}


def test_a_head_with_a_bias() -> None:
    """Behind its last id the bias is 0; and a gradient that is given stays as it is."""
    base = nn.Linear(8, tiny.VOCAB).requires_grad_(False)
    head = TokenHead(base, nn.Parameter(torch.randn(4, 8)), TOKENS)
    bias = head.bias(torch.float32)
    x = torch.randn(2, 3, 8, requires_grad=True)
    out = head(x)
    assert bias is not None and bias[tiny.VOCAB :].eq(0).all()
    torch.testing.assert_close(out, nn.functional.linear(x, head.merged(torch.float32), bias))
    given = torch.randn_like(out)
    kept = given.clone()
    out.backward(given)
    assert torch.equal(given, kept) and x.grad is not None
    torch.testing.assert_close(x.grad, given @ head.merged(torch.float32))


def test_many_uses_of_a_token_are_summed_wider_than_bf16() -> None:
    """4,096 equal gradients of a bf16 row: a sum in bf16 would stop growing at 256 of them."""
    table = TokenTable(nn.Embedding(8, 4, dtype=torch.bfloat16), nn.Parameter(torch.zeros(1, 4).bfloat16()), TOKENS[:1])
    out = table(torch.full((4, 1024), IDS[0]))
    out.backward(torch.ones_like(out))
    assert table.rows.grad is not None and table.rows.grad.eq(4096).all()


@pytest.mark.parametrize("embeddings", ["nf4", "int8", "int3"])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_packed_table_and_head_take_rows(family: str, embeddings: str, tmp_path: Path) -> None:
    """Other ids and other logits are bit for bit what they were."""
    tiny.saved(family, tmp_path)
    model = load(tmp_path, scheme_from("nf4"), embeddings=scheme_from(embeddings), dtype=torch.float32)
    text = torch.arange(40, 100)[None]
    before, digest = tiny.logits(model, text), base_digest(model)
    give_rows(model, TOKENS[1:], "mean")
    own: Any = rows_of(model)
    assert len(own.tensors()) == 1 + (family == "llama") and base_digest(model) == digest
    assert model.config.vocab_size == tiny.VOCAB + 2
    model.tie_weights()  # transformers calls it in many places
    after = tiny.logits(model, text)
    others = [i for i in range(tiny.VOCAB) if i not in IDS[1:]]
    assert after.shape[-1] == tiny.VOCAB + 2 and torch.equal(after[..., others], before[..., others])
    merged = own.head.merged(torch.float32)
    assert torch.equal(merged[others], own.head.base.dequantize()[others]) and torch.equal(
        merged[own.head.ids], own.head.rows
    )


@pytest.mark.parametrize("embeddings", [None, "nf4"])
def test_the_table_may_lie_in_host_memory(embeddings: str | None, tmp_path: Path) -> None:
    """Before the rows are put in, as in a run, or after, as in a plan."""
    tiny.saved("llama", tmp_path)
    found = []
    for moves in ((), (True, False), (False, True)):
        scheme = scheme_from(embeddings) if embeddings else None
        model: Any = load(tmp_path, scheme_from("nf4"), embeddings=scheme)
        for rows in moves or (True,):
            if rows:
                give_rows(model, TOKENS, "mean")
            else:
                assert table_on_host(model, "cuda") == ""
        assert type(model.get_input_embeddings().base).__name__.startswith("Hosted") == bool(moves)
        found.append(tiny.logits(model, torch.tensor([[*IDS, 7, 8]])))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ---- first values


def test_first_values(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    model: Any = load(tmp_path, scheme_from("nf4"), dtype=torch.float32)
    tokens = (Token("w1", 5, False), Token("<a>", 129, pieces=(7, 9)), Token("<b>", 130))
    for how, second in (("mean", slice(0, 129)), ("text", [7, 9])):
        built = build_rows(model, tokens)
        start_rows(built, how)
        for module in (built.table, built.head):
            weight = module.base.weight
            torch.testing.assert_close(module.rows[0], weight[5], rtol=0, atol=0)
            torch.testing.assert_close(module.rows[1], weight[second].mean(0))
            torch.testing.assert_close(module.rows[2], weight[:129].mean(0))
    assert rows_of(model) is None, "built, not put in"


# ---- a run


def recipe(root: Path, family: str, **changes: Any) -> Recipe:
    """The small task, where each question begins with <q> and each answer ends with <end>."""
    made = runs_helper.recipe(root, family, tokens__add=["<q>", "<end>"], tokens__train=["w5"], **changes)
    for file in (made.data.train, made.data.eval):
        rows = [json.loads(line) for line in Path(str(file)).read_text().splitlines()]
        marked = [{"prompt": f"<q> {row['prompt']}", "completion": f"{row['completion']} <end>"} for row in rows]
        Path(str(file)).write_text("".join(json.dumps(row) + "\n" for row in marked))
    return made


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that learned to end its answers with a new token."""
    root = tmp_path_factory.mktemp(request.param)
    made = recipe(root, request.param, train__steps=40)
    base = load(made.model, made.scheme, dtype=torch.float32)
    digest = base_digest(base)
    folder = train(made, screen=QUIET).folder
    run = open_run(folder, QUIET)
    assert base_digest(run.model) == digest
    return run


def test_a_model_learns_to_say_a_new_token(finished: Run) -> None:
    prompt = finished.tokenizer("<q> w1 w20 w30")["input_ids"]
    assert prompt[0] == tiny.VOCAB
    assert generate(finished.model, finished.tokenizer, prompt, max_new_tokens=8).split() == ["w5", "<end>"]
    info = read_adapter_json(finished.adapter)
    assert info["tokens"] == [{"text": "w5", "id": 9}, {"text": "<q>", "id": 131}, {"text": "<end>", "id": 132}]
    assert info["parameters"] == sum(p.numel() for p in finished.model.parameters() if p.requires_grad)
    own = rows_of(finished.model)
    assert own is not None and own.tensors().items() <= adapter_tensors(finished.model).items()
    assert all((rows[1] - rows[2]).abs().max() > 0.01 for rows in own.tensors().values()), "both began as the mean"


def test_eval_reads_new_tokens_as_training_did(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "eval_loss" in row][-1]
    capsys.readouterr()
    assert main(["eval", str(finished.folder), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)["adapter"]
    assert value["eval_tokens"] == trained["eval_tokens"]
    assert value["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep_base", ["trained", "original"])
def test_merged_it_is_a_plain_checkpoint(finished: Run, keep_base: str, tmp_path: Path) -> None:
    report = merge(finished, tmp_path / "merged", dtype="float32", keep_base=keep_base, screen=QUIET)
    assert report.verification.passed and report.verification.prompts == 5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert plain.config.vocab_size == len(words) == plain.get_output_embeddings().weight.shape[0] == tiny.VOCAB + 2
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == plain.config.tie_word_embeddings == finished.model.config.tie_word_embeddings
    prompt = words("<q> w1 w5 <end>")["input_ids"]
    assert prompt == [131, 5, 9, 132]
    if keep_base == "trained":
        (ours,), theirs = logits_of(finished.model, [prompt]), plain(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    again = load_tokenizer(tmp_path / "merged")
    with pytest.raises(QtuneError, match="'<q>' is a token already"):
        add_words(again, finished.recipe.tokens)


@torch.no_grad()
def test_peft_computes_the_same(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_peft(finished, tmp_path / "peft", Screen(), "trained")
    assert "call model.resize_token_embeddings(133)" in " ".join(capsys.readouterr().out.split())
    base = AutoModelForCausalLM.from_pretrained(finished.recipe.model)
    packed = load(finished.recipe.model, finished.recipe.scheme, dtype=torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            base.get_submodule(name).weight.copy_(module.dequantize())
    base.resize_token_embeddings(133, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    prompt = finished.tokenizer("<q> w1 w5 <end>")["input_ids"]
    (ours,), logits = logits_of(finished.model, [prompt]), theirs(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_first_values_of_an_adapter_leave_the_rows_alone(tmp_path: Path) -> None:
    """On the original weights goes what a PiSSA learned, and the rows as they were trained."""
    pissa = {"method": "pissa", "rank": 4}
    run = open_run(train(recipe(tmp_path, "llama-tied", train__steps=3, adapter=pissa)).folder, QUIET)
    own = rows_of(run.model)
    assert own is not None
    trained = own.table.rows.detach().clone()
    merge(run, tmp_path / "merged", dtype="float32", keep_base="original", screen=QUIET)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain.get_input_embeddings().weight[own.table.ids], trained)
    export_peft(run, tmp_path / "peft", QUIET)


def test_an_adapter_of_another_kind_is_refused_by_peft() -> None:
    from qtune.peft import to_peft

    model: Any = load_tiny("llama", "vera")
    with pytest.raises(QtuneError, match="PEFT trains no rows of tokens beside VERA: merge instead"):
        to_peft(model, AdapterSpec("vera"), Path("nowhere"), "base")


def load_tiny(family: str, method: str) -> Any:
    from qtune.model.skeleton import build

    model = build(tiny.model(family).config, scheme_from("nf4"))
    adapt(model, AdapterSpec(method))
    give_rows(model, TOKENS, "mean")
    return model


def test_without_new_tokens_nothing_is_there(tmp_path: Path) -> None:
    """No module, no key in the file, and the bits of the run before there were rows."""
    run = train(runs_helper.recipe(tmp_path, train__steps=1)).folder
    assert "tokens" not in json.loads((run / INFO).read_text())
    model = open_run(run, QUIET).model
    assert type(model.get_input_embeddings()) is nn.Embedding and type(model.get_output_embeddings()) is nn.Linear
    assert not any(isinstance(m, TokenTable | TokenHead) for m in model.modules())


def test_another_run_takes_the_rows_along(finished: Run, tmp_path: Path) -> None:
    other = replace(
        finished.recipe, output=str(tmp_path / "second"), train=replace(finished.recipe.train, steps=1, lr=1e-9)
    )
    run = open_run(train(other, start_from=finished.folder).folder, QUIET)
    for name in (TABLE, HEAD):
        ours, theirs = (adapter_tensors(one.model).get(name) for one in (finished, run))
        assert (ours is None) == (theirs is None) and (ours is None or torch.allclose(ours, theirs, atol=1e-6))
    fewer = replace(other, tokens=TokenKeys(add=("<q>",)), output=str(tmp_path / "third"))
    with pytest.raises(QtuneError, match=r"tokens are \['<q>'\], those of .* are \['<end>', '<q>', 'w5'\]"):
        train(fewer, start_from=finished.folder)


def test_a_run_goes_on_with_the_same_tokens_only(finished: Run) -> None:
    kept = (finished.folder / TENSORS).read_bytes()
    changed = replace(finished.recipe, tokens=TokenKeys(add=("<q>", "<stop>"), train=("w5",)))
    with pytest.raises(QtuneError, match=r"tokens.add is \['<q>', '<stop>'\], there \['<q>', '<end>'\]"):
        train(changed, resume=True)
    assert (finished.folder / TENSORS).read_bytes() == kept


def test_a_recipe_of_other_tokens_does_not_open_the_run(finished: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished.folder, tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("<end>", "<fin>"))
    with pytest.raises(QtuneError, match=r"rows of other tokens .*'<end>' \(id 132\), '<fin>' \(id 132\)"):
        open_run(tmp_path / "run", QUIET)


# ---- what is refused, what is told


BAD = {
    "tokens.add=[<s>]": "'<s>' is a token already (id 1); tokens.train trains it",
    "tokens.train=[zebra]": "tokens.train: 'zebra' is no token; tokens.add adds it",
    "tokens.add=[<a>, <a>]": "tokens.add is ['<a>', '<a>'] ('<a>' twice); legal: a list of tokens, or a text file",
    "tokens.add=['']": "tokens.add is [''] (one of them is empty)",
    "tokens.add=[7]": "tokens.add is [7] (7 is not text in YAML: put it in quotes)",
    "tokens.add=<tool>": "tokens.add is '<tool>' (no file that can be read: No such file or directory); legal: a list",
    "tokens.special=true": "tokens.special is true, and tokens.add names no new token; legal: false, or give",
    "tokens.start=text": "tokens.start is text, and tokens.add names no new token; legal: mean, or give tokens.add",
    "tokens.start=zero": "tokens.start is 'zero'; legal: mean, text",
}


@pytest.mark.parametrize("change", BAD)
def test_faults_are_told(change: str, tmp_path: Path) -> None:
    plain = runs_helper.recipe(tmp_path)
    with pytest.raises(QtuneError) as caught:
        add_words(load_tokenizer(plain.model), plain.with_([change]).tokens)
    assert BAD[change] in str(caught.value)


def test_more_faults(tmp_path: Path) -> None:
    with pytest.raises(QtuneError, match="'<a>' is in tokens.add and in tokens.train"):
        runs_helper.recipe(tmp_path, tokens__add=["<a>"], tokens__train=["<a>"])
    with pytest.raises(QtuneError, match=r"base.gguf holds its tokenizer itself; legal: the original model"):
        runs_helper.recipe(tmp_path, tokens__add=["<a>"], model="base.gguf")
    model: Any = tiny.model("llama")
    with pytest.raises(QtuneError, match=r"rows for the ids 0 to 130, .* behind them: 131, 132; name these in tokens"):
        build_rows(model, [Token("<a>", 133)])
    adapted: Any = load(write_model(tmp_path / "m"), scheme_from("nf4"), embeddings=scheme_from("nf4"))
    adapt(adapted, AdapterSpec("lora", ("lm_head",)))
    with pytest.raises(QtuneError, match="output head of .* it is adapted: leave it out of adapter.targets"):
        build_rows(adapted, TOKENS)
    give_rows(model, TOKENS, "mean")
    with pytest.raises(QtuneError, match="rows of new tokens already"):
        give_rows(model, TOKENS, "mean")


def write_model(folder: Path) -> Path:
    tiny.saved("llama", folder)
    return folder


def test_a_file_of_tokens_is_read_once_for_all(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("<a>\n\n<b>\n")
    (tmp_path / "r.yaml").write_text("model: m\ntokens: {add: words.txt, start: text}\n")
    made = Recipe.load(tmp_path / "r.yaml", training=False)
    assert made.tokens == TokenKeys(add=("<a>", "<b>"), start="text")
    assert Recipe.load(made.to_yaml(), training=False) == made


def test_a_tokenizer_that_splits_a_new_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.words(tmp_path)
    monkeypatch.setattr(tokenizer, "add_tokens", lambda *_, **__: 0)
    with pytest.raises(QtuneError, match=r"does not read as one token: 'w1 w2' \(2 tokens\)"):
        add_words(tokenizer, TokenKeys(add=("w1 w2",)))


def test_new_tokens_by_a_real_tokenizer(tmp_path: Path) -> None:
    from data_kit import tokenizer

    made = tokenizer()
    size = len(made)
    first, second = add_words(made, TokenKeys(add=("<tool>", "<tool>\n"), special=True))
    assert (first.id, second.id) == (size, size + 1) and len(first.pieces) == 6
    assert made("a<tool>b<tool>\n")["input_ids"][1::2] == [size, size + 1]
    assert made.decode(made("a<tool>b")["input_ids"], skip_special_tokens=True) == "ab"
    made.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("x<tool>")["input_ids"][-1] == size


def test_what_the_user_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = runs_helper.recipe(tmp_path, tokens__add=["<tool>"], train__steps=1, data__eval=None)
    words = tiny.words(Path(made.model))
    words.chat_template = "<|im_start|>{{ messages[0]['content'] }}<s>"
    words.save_pretrained(made.model)
    assert split_marks(words.chat_template, words) == ["<|im_start|>"]
    train(made, screen=Screen())
    told = " ".join(capsys.readouterr().out.split())
    assert "note: no training example holds <tool>" in told
    assert "the chat template writes <|im_start|>, which the tokenizer splits" in told
    assert "tokens 1 new, a row each for input and for output; the vocabulary grows from 131 to 132" in told
