"""What becomes of examples: cut, told, deduplicated, split, drawn by weight; tokens from the cache; the exactness of
encoding many texts at once."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from data_kit import lines, marked, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qtune.cli import main
from qtune.data import Example, Record, load_data, load_held_out, load_sets, load_source, tokens
from qtune.data import encode as encoding
from qtune.data.encode import Encoder
from qtune.data.report import histogram, quantiles
from qtune.errors import QtuneError
from qtune.recipe import Recipe
from qtune.sections import DataKeys, Source

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]


def texts(examples: list[Example]) -> list[str]:
    tok = tokenizer()
    return [marked(example, tok) for example in examples]


# ---- too long


LONG = rows(("p", "abc"), ("pppp", "abc"), ("pppppppp", "abc"))  # 5, 8, 12 tokens


def test_too_long(tmp_path: Path) -> None:
    path = lines(tmp_path, *LONG)
    examples, report = load_data(path, tokenizer(), max_length=6, too_long="drop")
    assert texts(examples) == ["p⟦abc</s>⟧"]
    assert "0 cut at 6, 2 longer than 6 left out, 0 dropped" in str(report)
    with pytest.raises(QtuneError) as caught:
        load_data(path, tokenizer(), max_length=6, too_long="refuse")
    assert "2 examples longer than data.max_length = 6, and data.too_long is refuse: " in str(caught.value)
    assert "line 2 (8), " in str(caught.value) and "a data.max_length of 12 or more" in str(caught.value)
    with pytest.raises(
        QtuneError, match=r"all 3 records are longer than data.max_length = 4, and data.too_long is drop"
    ):
        load_data(path, tokenizer(), max_length=4, too_long="drop")
    with pytest.raises(QtuneError, match="unknown data.too_long 'trim'; legal: cut, drop, refuse"):
        load_data(path, tokenizer(), max_length=4, too_long="trim")


def test_answers_that_lose_tokens_are_counted(tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "bcd")) * 3]
    path = lines(tmp_path, {"messages": turns}, {"messages": turns[:2]})
    tok = tokenizer(CHATML)
    whole = len(tok.apply_chat_template(turns)["input_ids"])
    for lost, expected in ((1, 0), (2, 1), (5, 1), (6, 1), (whole // 3 + 1, 1), (whole // 3 + 2, 2)):
        _, report = load_data(path, tok, max_length=whole - lost)
        assert (report.truncated, report.cut_answers) == (1, expected), lost
    assert "1 cut at" in str(report) and "(2 answers lost tokens)" in str(report)


# ---- duplicates, split, weights


def test_duplicates(tmp_path: Path) -> None:
    path = lines(tmp_path, *rows(("a", "b"), ("c", "d"), ("a", "b"), ("ab", "c"), ("a", "bc")))
    examples, report = load_data(path, tokenizer(), max_length=9, dedupe=True)
    assert texts(examples) == ["a⟦b</s>⟧", "c⟦d</s>⟧", "ab⟦c</s>⟧", "a⟦bc</s>⟧"]
    assert (report.records, report.duplicates) == (5, 1) and "5 records (prompt), 1 duplicate removed -> 4" in str(
        report
    )
    examples, report = load_data(path, tokenizer(), max_length=9)
    assert (len(examples), report.duplicates) == (5, 1)


def many(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return rows(*((f"{draw.randrange(10**6)} ", str(draw.randrange(10**6))) for _ in range(count)))


def keys_of(path: Path, **options: Any) -> DataKeys:
    return DataKeys(train=str(path), max_length=99, **options)


def test_split(tmp_path: Path) -> None:
    data = many(60)
    data += data[:20]  # duplicates, which go to one side
    path = lines(tmp_path, *data)
    sets = load_sets(keys_of(path, split=0.1), tokenizer(), seed=3)
    train, held = texts(sets.train), texts(sets.held_out)
    assert len(set(held)) == 6 and len(train) + len(held) == 80 and not set(train) & set(held)
    assert sets.report.held_out == len(held) and f", {len(held)} held out -> {len(train)} examples" in str(sets.report)
    assert sets.held_out_report is not None and sets.held_out_report.examples == len(held)
    # neither the order of the records nor the tokenizer matters; the seed does, and only it
    random.Random(1).shuffle(data)
    other = load_sets(keys_of(lines(tmp_path, *data), split=0.1), tokenizer(bos="<s>"), seed=3)
    assert {text.removeprefix("<s>") for text in texts(other.held_out)} == set(held)
    assert set(texts(load_sets(keys_of(path, split=0.1), tokenizer(), seed=4).held_out)) != set(held)
    assert set(texts(load_sets(keys_of(path, split=0.1, split_seed=3), tokenizer(), seed=4).held_out)) == set(held)
    examples, report = load_held_out(keys_of(path, split=0.1), tokenizer(), seed=3)
    assert set(texts(examples)) == set(held) and report is not None


def test_a_split_has_something_on_both_sides(tmp_path: Path) -> None:
    for share in (0.01, 0.99):
        sets = load_sets(keys_of(lines(tmp_path, *many(3)), split=share), tokenizer(), seed=0)
        assert sets.train and sets.held_out
    with pytest.raises(
        QtuneError, match=r"holds no two records that differ, so data.split = 0.5 can hold out none; legal: null"
    ):
        load_sets(keys_of(lines(tmp_path, *many(1)), split=0.5), tokenizer(), seed=0)
    (tmp_path / "t.txt").write_text("".join(chr(97 + i % 26) for i in range(100)))
    sets = load_sets(DataKeys(train=str(tmp_path / "t.txt"), max_length=10, split=0.2), tokenizer(), seed=0)
    assert (len(sets.train), len(sets.held_out)) == (9, 2)  # one text is split by window


def test_what_only_became_equal_when_cut_stays_together(tmp_path: Path) -> None:
    data = [{"prompt": "same prompt", "completion": "ab" + str(n)} for n in range(30)]
    path = lines(tmp_path, *data, {"prompt": "x", "completion": "y"})
    for seed in range(4):
        sets = load_sets(DataKeys(train=str(path), max_length=13, split=0.3), tokenizer(), seed=seed)
        assert not set(texts(sets.train)) & set(texts(sets.held_out))


def test_a_text_file_of_several_stays_together(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for letter in "abcdef":
        (folder / f"{letter}.txt").write_text("".join(f"{letter}{n % 10}" for n in range(25)))
    for seed in range(3):
        sets = load_sets(DataKeys(train=str(folder), max_length=10, split=0.3), tokenizer(), seed=seed)
        held, train = (set("abcdef") & set("".join(texts(some))) for some in (sets.held_out, sets.train))
        assert len(held) == 2 and len(train) == 4 and not held & train
        assert not set(texts(sets.held_out)) & set(texts(sets.train))  # a last window of EOS alone is in training only


def test_eval_that_is_in_train_is_told(tmp_path: Path) -> None:
    data = many(10)
    train, held = lines(tmp_path, *data), lines(tmp_path, *data[:2], *many(3, seed=1), name="e.jsonl")
    sets = load_sets(keys_of(train, eval=str(held)), tokenizer(), seed=0)
    assert "note: 2 of the 5 examples of data.eval are in data.train, too" in str(sets.report)
    assert len(sets.held_out) == 5 and load_held_out(keys_of(train), tokenizer(), seed=0) == ([], None)


def test_weights(tmp_path: Path) -> None:
    one, two = lines(tmp_path, *many(10)), lines(tmp_path, *many(6, seed=1), name="two.jsonl")
    given = (Source(str(one), 2.0), Source(str(two), 0.5))
    examples, report = load_source(given, tokenizer(), DataKeys(max_length=99), seed=1)
    first, second = (
        texts(load_data(one, tokenizer(), max_length=99)[0]),
        texts(load_data(two, tokenizer(), max_length=99)[0]),
    )
    drawn = texts(examples)
    assert drawn[:20] == first * 2 and len(drawn) == 23
    assert len(set(drawn[20:])) == 3 and [text for text in second if text in drawn[20:]] == drawn[20:]
    assert texts(load_source(given, tokenizer(), DataKeys(max_length=99), seed=1)[0]) == drawn
    assert any(texts(load_source(given, tokenizer(), DataKeys(max_length=99), seed=s)[0]) != drawn for s in range(2, 6))
    assert f"{one}: 10 records (prompt), 10 examples, drawn 2 times an epoch" in str(report)
    sets = load_sets(
        DataKeys(train=given, max_length=99, split=0.25), tokenizer(), seed=1
    )  # held out before it is drawn
    assert len(sets.held_out) == 4 and not set(texts(sets.train)) & set(texts(sets.held_out))


# ---- encoding many at once


def bpe(kind: str, text: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A trained BPE: of bytes, whose offsets leave leading spaces out; the same with tokens that go over words, so that
    trailing spaces are left out as well; or of characters, with ▁ before each text."""
    text = text or (Path(__file__).parents[1] / "README.md").read_text()[:20_000].split("\n")
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "▁"))
    if kind == "▁":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Replace("▁", " ")
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bytes")
        core.decoder = decoders.ByteLevel()
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = [] if kind == "▁" else pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(text, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize("kind", ["bytes", "bytes over words", "▁"])
def test_many_at_once_is_as_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against parts that are encoded by themselves, as for a tokenizer that knows no characters."""
    tok = bpe(kind)
    draw = random.Random(0)
    words = ["the ", " model", "train", "\n", "\n\n", " ", "  ", "é", "ing", "s", ".", "qtune", " 12", "3", "🙂", "\tx"]

    def some() -> str:
        return "".join(draw.choices(words, k=draw.randint(1, 9))) + draw.choice("abc")

    prompts = [Record("prompt", "w", draw.choice(("", some(), some() + " ")), some()) for _ in range(150)]
    chats = [Record("messages", "w", messages=tuple({"role": r, "content": some()} for r in ("user", "assistant") * 2))
             for _ in range(40)]  # fmt: skip
    fast = [Encoder(tok).encode_many(records) for records in (prompts, chats)]
    monkeypatch.setattr(Encoder, "_clean", lambda *args: None)
    slow = [Encoder(tok).encode_many(records) for records in (prompts, chats)]
    assert fast == slow
    # by hand: the prompt's ids are those of the prompt alone
    for record, (ids, trained) in zip(prompts, slow[0], strict=True):
        count = trained.index(1) if record.prompt else 0
        assert list(ids[:count]) == (Encoder(tok).ids(record.prompt) if record.prompt else [])


@pytest.mark.parametrize("kind", ["bytes", "bytes over words", "▁"])
def test_a_long_text_in_chunks_is_as_in_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = bpe(kind)
    text = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()[:20_000]
    whole = [*Encoder(tok).ids(text), tok.eos_token_id]
    if kind != "bytes over words":  # whose tokens may go over the edge of a chunk: then all of it is encoded in one
        monkeypatch.setattr(Encoder, "ids", lambda self, text: [])
    for size in (1, 100, 3000):
        monkeypatch.setattr(encoding, "CHUNK", size)
        assert list(Encoder(tok).text(text)) == whole


@pytest.mark.parametrize("between", ["\n\n", " \n", "\r\n\r\n"])
def test_paragraphs_in_chunks_are_as_in_one(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty line is one token at the end of a text, and two before the next paragraph."""
    text = between.join((Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()[:5_000].splitlines())
    tok = bpe("bytes", [text, *[f"a{between}"] * 200])
    alone, before = (Encoder(tok).ids(some) for some in (between, f"{between}b"))
    assert before[: len(alone)] != alone, "or it tells nothing"
    whole = [*Encoder(tok).ids(text), tok.eos_token_id]
    monkeypatch.setattr(Encoder, "ids", lambda self, text: [])
    monkeypatch.setattr(encoding, "CHUNK", 100)
    assert list(Encoder(tok).text(text)) == whole


@pytest.mark.parametrize("kind", ["bytes", "bytes over words", "▁"])
def test_a_prompt_has_the_tokens_that_it_has_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones, of which only the lines at the edge are encoded again, with empty lines that are one token at the end
    of a prompt and two before an answer."""
    text, draw = (Path(__file__).parents[1] / "README.md").read_text()[:20_000], random.Random(0)
    tok = bpe(kind, [*text.split("\n"), *["a\n\n", "a \n"] * 50])
    for between in ("\n", "\n\n", " \n", "\n  "):
        whole, records = text.replace("\n", between), []
        for _ in range(60):
            start, length = draw.randrange(len(whole) - 900), draw.randint(2, 900)
            edge = start + draw.randrange(1, length)
            records.append(Record("prompt", "w", whole[start:edge], whole[edge : start + length]))
        made = Encoder(tok).encode_many(records)
        for record, (ids, trained) in zip(records, made, strict=True):
            alone = Encoder(tok).ids(record.prompt)
            assert trained.index(1) == len(alone) and list(ids[: len(alone)]) == alone, record
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "_clean", lambda *args: None)
            assert Encoder(tok).encode_many(records) == made


def test_batches_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path, *many(50))
    before = load_data(path, tokenizer(), max_length=9)
    monkeypatch.setattr(encoding, "AT_ONCE", 3)
    after = load_data(path, tokenizer(), max_length=9)
    assert [vars_of(e) for e in before[0]] == [vars_of(e) for e in after[0]] and before[1] == after[1]


def vars_of(example: Example) -> tuple[Any, ...]:
    return example.input_ids.tobytes(), example.trained, example.where


# ---- the cache


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything is kept, in a folder of the test's own."""
    monkeypatch.setattr(tokens, "KEPT_BYTES", 1)
    monkeypatch.setattr(tokens, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_the_cache_gives_the_same(kept: Path, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "é" * n}], "id": n}
        for n in range(1, 9)
    ]
    (tmp_path / "t.txt").write_text("some words\nand more\n" * 9)
    for path in (lines(tmp_path, *chats), tmp_path / "t.txt"):
        tok = tokenizer(CHATML, bos="<s>")
        first, report = load_data(path, tok, max_length=40)
        again, second = load_data(path, tok, max_length=40)
        assert [vars_of(e) for e in first] == [vars_of(e) for e in again]
        assert set(second.notes) - set(report.notes) == {f"tokens of {path} taken from the cache"}
        cut, _ = load_data(path, tok, max_length=25)  # max_length is no part of what is kept
        assert max(len(e.input_ids) for e in cut) == 25
    assert len(list(kept.iterdir())) == 2


def test_what_the_cache_hangs_on(kept: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = lines(tmp_path, {"messages": turns, "conversations": turns})

    def files(tok: Any = None, **keys: Any) -> int:
        load_data(path, tok or tokenizer(CHATML), max_length=99, **keys)
        return len(list(kept.iterdir()))

    assert files() == 1 and files() == 1
    assert files(loss_on="all") == 2 and files(system="s") == 3 and files(template=CHATML + " ") == 4
    assert files(format="sharegpt") == 5 and files(tokenizer(CHATML, merges=(("a", "b"),))) == 6
    assert files(tokenizer(CHATML, eos="<|im_end|>")) == 7
    path.write_text(path.read_text().replace('"b"', '"c"'))
    assert files() == 8


def test_a_damaged_cache_is_made_anew(kept: Path, tmp_path: Path) -> None:
    path = lines(tmp_path, *many(20))
    first, _ = load_data(path, tokenizer(), max_length=9)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    for damage in (whole[:-9], b"", whole[: len(whole) // 2] + b"\7\7\7\7" + whole[len(whole) // 2 + 4 :], b"x" * 99):
        file.write_bytes(damage)
        again, report = load_data(path, tokenizer(), max_length=9)
        assert [vars_of(e) for e in first] == [vars_of(e) for e in again]
        assert f"what the cache held of {path} is damaged" in str(report) and "tokenized anew" in str(report)
        assert file.read_bytes() == whole  # and is whole again


def test_a_cache_that_cannot_be_written_is_no_fault(kept: Path, tmp_path: Path) -> None:
    kept.write_text("a file in its place")
    _, report = load_data(lines(tmp_path, *many(3)), tokenizer(), max_length=9)
    assert "are not kept for the next time: cannot write" in str(report)


def test_the_cache_stays_small(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LIMIT", 1)
    for seed in range(3):
        load_data(lines(tmp_path, *many(5, seed)), tokenizer(), max_length=9)
    assert len(list(kept.iterdir())) == 1


def test_small_sources_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "cache_folder", lambda: tmp_path / "cache")
    load_data(lines(tmp_path, *many(5)), tokenizer(), max_length=9)
    assert not (tmp_path / "cache").exists()


# ---- the recipe, and `qtune data`


def test_keys_of_the_recipe(tmp_path: Path) -> None:
    path = lines(tmp_path, *many(3))
    (tmp_path / "texts").mkdir()
    tree = {
        "model": "m",
        "output": "o",
        "data": {"train": [str(path), {"file": str(tmp_path / "texts"), "weight": 0.5}]},
    }
    recipe = Recipe.load(tree)
    assert recipe.data.train == (Source(str(path)), Source(str(tmp_path / "texts"), 0.5))
    assert Recipe.load(recipe.to_yaml()) == recipe and Recipe.load(recipe.to_dict()) == recipe
    assert Recipe.load(tree, ["data.split=0.1", "train.eval_every=2"]).data.split == 0.1
    assert Recipe.load(tree, ["data.columns.prompt=q"]).data.columns == {"prompt": "q"}
    assert Recipe.load(tree | {"data": {"train": "hf:a/b"}}).data.train == "hf:a/b"


BAD_KEYS = {
    "data.train=[]": "data.train is []; legal: a .jsonl",
    "data.train=[{weight: 2}]": "(entry 1 names no file); legal:",
    "data.train=[{file: x, wieght: 2}]": "entry 1: unknown key 'wieght' (did you mean 'weight'?)",
    "data.train=[{file: x, weight: 0}]": "entry 1: weight is 0; legal: a number > 0",
    "data.train=[x, {file: 3}]": "entry 2: file is 3",
    "data.train=[nowhere.jsonl]": "data.train is 'nowhere.jsonl': no such file in ",
    "data.eval=[{file: FILE, weight: 2}]": "data.eval gives weights, but each held-out record counts once",
    "data.columns={promt: q}": "unknown column of a record 'promt' (did you mean 'prompt'?)",
    "data.columns={prompt: 3}": "(prompt is 3, not the name of a column)",
    "data.columns=[a]": "data.columns is ['a']; legal: a mapping from messages, conversations",
    "data.format=json": "data.format is 'json'; legal: messages, sharegpt, glaive, prompt, alpaca, text or null",
    "data.too_long=keep": "data.too_long is 'keep'; legal: cut, drop, refuse",
    "data.split=1": "data.split is 1; legal: a number > 0 and < 1 or null",
    "data.split_seed=3": "data.split_seed is 3, but data.split is null; legal: null, or both",
    "data.dedupe=exact": "data.dedupe is 'exact'; legal: true or false",
    "data.loss_on=first": "data.loss_on is 'first'; legal: answer, last, all",
}


@pytest.mark.parametrize("override", BAD_KEYS)
def test_bad_keys(override: str, tmp_path: Path) -> None:
    path = lines(tmp_path, *many(3))
    tree = {"model": "m", "output": "o", "data": {"train": str(path)}}
    with pytest.raises(QtuneError) as caught:
        Recipe.load(tree, [override.replace("FILE", str(path))])
    assert BAD_KEYS[override] in str(caught.value) and "1 fault:" in str(caught.value)


def test_split_and_eval_exclude_each_other(tmp_path: Path) -> None:
    path = str(lines(tmp_path, *many(3)))
    with pytest.raises(QtuneError, match=r"data.split is 0.1, but data.eval says what is held out"):
        Recipe.load({"model": "m", "output": "o", "data": {"train": path, "eval": path, "split": 0.1}})


def test_histogram() -> None:
    assert histogram([5]) == [(5, 5, 1)]
    assert histogram([1, 2, 2, 4]) == [(1, 1, 1), (2, 2, 2), (3, 3, 0), (4, 4, 1)]
    found = histogram(list(range(1, 101)))
    assert len(found) == 10 and sum(count for *_, count in found) == 100 and found[-1] == (91, 100, 10)
    assert quantiles(list(range(101))) == {"50%": 50, "90%": 90, "99%": 99}


def model(folder: Path) -> Path:
    tiny.words(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def data_command(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["data", *map(str, argv)]) == code
    out = capsys.readouterr()
    return out.out if code == 0 else out.err


def test_qtune_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path, *rows(("w1 w2 ", "w3"), ("w1 w2 ", "w3"), ("w1 w2 w3 w4 ", "w5")))
    folder = model(tmp_path / "model")
    text = data_command(capsys, path, "--model", folder, "--show", 1, "data.max_length=5")
    for part in ("3 records (prompt)", "1 cut at 5 (1 answer lost tokens)", " 4 ", "█", "50% up to 4", "w2⟦"):
        assert part in text.replace(" ⟦", "⟦"), part
    value = json.loads(data_command(capsys, path, "--model", folder, "--json"))
    assert (value["train"]["records"], value["train"]["duplicates"], len(value["examples"])) == (3, 1, 2)
    assert value["train"]["lengths"]["histogram"][0] == {"from": 4, "to": 4, "examples": 2}
    text = data_command(capsys, path)
    assert "3 records (prompt), 1 equal to an earlier one" in text and "name a model: --model" in text
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        Recipe.load({"model": str(folder), "output": "o", "data": {"train": str(path), "split": 0.4}}).to_yaml()
    )
    value = json.loads(data_command(capsys, recipe, "--json"))
    assert value["train"]["held_out"] + value["train"]["examples"] == 3 and value["eval"]["examples"] >= 1


def test_qtune_data_tells_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path, {"question": "a"}, "x")
    text = data_command(capsys, path, code=1)
    assert "2 bad records" in text and "data.columns: {prompt: question" in text
    assert "--show is -1" in data_command(capsys, path, "--show=-1", code=1)
    assert "No such file" in data_command(capsys, tmp_path / "no.jsonl", code=1)
