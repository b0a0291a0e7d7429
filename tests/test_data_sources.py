"""Where records come from and what they may look like: kinds of files, formats, columns; and how each fault is told."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from data_kit import lines, marked, only, tokenizer

from qtune.data import Record, load_data, load_source, read_records
from qtune.data.formats import FORMATS, MAKERS
from qtune.errors import QtuneError
from qtune.keys import COLUMNS
from qtune.sections import FORMATS as NAMES
from qtune.sections import DataKeys, Source

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": 'c,\n"d"', "completion": "é🙂"}]


def pairs(path: Path | str, **keys: Any) -> list[tuple[str, str]]:
    return [(r.prompt, r.answer) for r in read_records(str(path), DataKeys(**keys) if keys else None)]


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    import csv

    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def zipped(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


# ---- kinds of files


def written(folder: Path, kind: str) -> str:
    """The two rows as a source of that kind."""
    path = folder / f"t.{kind}"
    if kind == "jsonl":
        lines(folder, *ROWS, name=path.name)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind in ("csv", "tsv"):
        table(path, ROWS)
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(ROWS)
        (datasets.DatasetDict({"train": made, "test": made}) if kind == "splits" else made).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "saved", "splits"])
def test_kinds(kind: str, tmp_path: Path) -> None:
    expected = [(row["prompt"], row["completion"]) for row in ROWS]
    name = written(tmp_path, kind)
    assert pairs(name) == expected
    if kind in ("jsonl", "json", "csv", "tsv"):
        assert pairs(zipped(Path(name))) == expected


def test_places(tmp_path: Path) -> None:
    """The line on which a record starts, also where cells hold line breaks."""
    rows = [*ROWS, {"prompt": "e", "completion": ""}, {"prompt": "", "completion": "f"}]
    path = table(tmp_path / "t.csv", rows)
    with pytest.raises(QtuneError, match=r"t.csv: 1 bad record:\n  line 5: 'completion' is empty"):
        read_records(path)
    assert [r.where.rpartition(", ")[2] for r in read_records(table(path, rows[:2]))] == ["line 2", "line 3"]


def test_a_folder_of_texts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in (
        ("b.txt", "bb"),
        ("inner/a.md", "aa"),
        (".git/x.txt", "no"),
        ("empty.txt", " \n"),
        ("c.pdf", "x"),
    ):
        (folder / name).write_text(text)
    zipped(folder / "b.txt")
    records = read_records(folder)
    assert [(r.answer, r.where) for r in records] == [
        ("bb", f"{folder}, b.txt"), ("bb", f"{folder}, b.txt.gz"), ("aa", f"{folder}, inner/a.md"),
    ]  # fmt: skip
    tok = tokenizer()
    examples, report = load_data(folder, tok, max_length=9, dedupe=True)
    assert [marked(e, tok) for e in examples] == ["b⟦b</s>⟧", "a⟦a</s>⟧"]
    assert (report.format, report.records, report.duplicates) == ("plain text", 3, 1)


BAD_TABLES = {
    "a,a\n1,2\n": "line 1: the column 'a' stands twice; legal: once",
    "prompt,completion\nx\n": "line 2: has 1 cells, but the header names 2 columns: prompt, completion",
    "prompt,completion\nx,y,z\nu,v\n,\n": "2 bad records:\n  line 2: has 3 cells",
    'prompt,completion\nx,"y': "line 2: not readable as .csv (unexpected end of data)",
    "question;answer\nx;y\n": "of no known format; found an object with the keys question;answer",
    "prompt,completion\nx,\xff\n": "line 2: byte 0xff is not UTF-8 text; save the file as UTF-8",
    "prompt,history,instruction,output\na,[[1]],b,c\n": "'history' must be a list of [instruction, answer] pairs",
    "messages\nhello\n": "'messages' must be a list of {role, content} objects; found \"hello\"",
}


@pytest.mark.parametrize("text", BAD_TABLES, ids=lambda text: text[:20])
def test_bad_tables(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(QtuneError) as caught:
        read_records(path)
    assert BAD_TABLES[text] in str(caught.value) and str(path) in str(caught.value)


def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = zipped(lines(tmp_path, *ROWS * 500))
    cut.write_bytes(cut.read_bytes()[:-20])
    (tmp_path / "no.jsonl.gz").write_bytes(b"{}")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "none").mkdir()
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.pdf").write_text("x")
    told = {
        str(cut): "is no whole gzip file",
        str(tmp_path / "no.jsonl.gz"): "is no whole gzip file",
        str(tmp_path / "p.parquet"): "is no readable Parquet file",
        str(tmp_path / "p.parquet.gz"): "unknown kind of data file",
        str(tmp_path / "x.gz"): "unknown kind of data file",
        str(tmp_path / "none"): "holds no text files; found nothing; legal: a folder of .txt, .md files",
        str(tmp_path / "pages"): "holds no text files; found .pdf",
        "hf:": "'hf:' is no dataset's name; legal: hf:owner/name, hf:owner/name:split, hf:owner/name:config:split",
        "hf:a/b:c:d:e": "is no dataset's name",
        "hf:qtune/there-is-none:train": "cannot load the dataset hf:qtune/there-is-none:train: ",
    }
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for name, expected in told.items():
        with pytest.raises(QtuneError) as caught:
            read_records(name)
        assert expected in str(caught.value), name


@pytest.mark.parametrize(("name", "package"), [("t.parquet", "pyarrow"), ("hf:a/b", "datasets")])
def test_a_missing_package_is_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(QtuneError, match=rf"{package} is not installed; pip install 'qtune\[data\]'"):
        read_records(name if name.startswith("hf:") else str(tmp_path / name))


def test_large_lists_are_read_item_by_item(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(" [" + ",\n ".join(json.dumps(row) for row in ROWS * 50) + "]\n")
    assert len(read_records(path)) == 100
    for text, expected in (
        ('[{"text": "a"} {"text": "b"}]', "is no JSON list: not JSON"),
        ('[{"text": "a"}', "is no JSON list: not JSON"),
        ('[{"text": "a"}] x', "is no JSON list: not JSON"),
        ("[,]", "is no JSON list: not JSON"),
        ("[" * 100_000, "JSON"),
    ):
        path.write_text(text)
        with pytest.raises(QtuneError) as caught:
            read_records(path)
        assert expected in str(caught.value), text[:30]


# ---- formats


def test_the_lists_of_formats_and_columns_agree() -> None:
    assert tuple(FORMATS) == NAMES == tuple(MAKERS)
    assert {key for must, may in FORMATS.values() for key in (*must, *may)} | {"role", "content"} == set(COLUMNS)


def only_record(folder: Path, row: dict[str, Any], **keys: Any) -> Record:
    (record,) = read_records(lines(folder, row), DataKeys(**keys))
    return record


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object"}}
READ: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [  # a row, and the messages that it becomes
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        [{"role": "system", "content": "s"}, USER, ASSISTANT],
    ),
    ("messages", {"messages": [{"from": "user", "value": "a"}, {"role": "model", "content": "b"}]}, [USER, ASSISTANT]),
    (
        "sharegpt",
        {"conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"}, {"from": "gpt", "value": "b"},
        ], "tools": json.dumps([TOOL])},
        [
            USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "tool_call_id": "call00001", "name": "f"}, ASSISTANT,
        ],
    ),
    (
        "messages",  # OpenAI's: arguments are text, ids their own
        {"messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "r"}, ASSISTANT,
        ], "tools": [{"type": "function", "function": TOOL}]},
        [
            USER, {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "c1"}]},
            {"role": "tool", "content": "r", "tool_call_id": "c1"}, ASSISTANT,
        ],
    ),
    (
        "messages",  # OpenAI's first spelling
        {"messages": [
            USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "r"}, ASSISTANT,
        ], "tools": [TOOL]},
        [
            USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "tool_call_id": "call00001", "name": "f"}, ASSISTANT,
        ],
    ),
    (
        "glaive",
        {
            "system": f"SYSTEM: You may call functions. Use them if required -\n{json.dumps(TOOL, indent=1)}\n",
            "chat": 'USER: a\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{"x": 1}\'} <|endoftext|>\n'
            "\n\nFUNCTION RESPONSE: r\n\n\nASSISTANT: b <|endoftext|>\n",
        },
        [
            {"role": "system", "content": "You may call functions. Use them if required"},
            USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "tool_call_id": "call00001", "name": "f"}, ASSISTANT,
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "messages"), READ, ids=range(len(READ)))
def test_conversations_are_read(name: str, row: dict[str, Any], messages: list[Any], tmp_path: Path) -> None:
    record = only_record(tmp_path, row)
    assert (record.format, list(record.messages)) == (name, messages)
    if any("tool_calls" in message for message in messages):
        assert record.tools == ({"type": "function", "function": TOOL},)


def test_a_parquet_file_pads_with_nulls(tmp_path: Path) -> None:
    """Columns of a table have one type, so a message without a call has a null there."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    row = READ[3][1]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    (record,) = read_records(tmp_path / "t.parquet")
    assert [m["role"] for m in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[0] == USER and record.messages[1]["tool_calls"] == [CALL | {"id": "c1"}]


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"conversations": [{"from": "humna", "value": "a"}]}, "message 1: unknown role 'humna' (did you mean 'human'?)"),
    ({"conversations": [{"from": "human"}]}, "message 1: has no 'content'; found an object with the keys from"),
    ({"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT], "system": "t"}, "legal: one of the two"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(1)"}]},
        "message 2: a function_call must hold {name, arguments} as JSON; not JSON",
    ),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
        "the arguments of the call of 'f' must be a JSON object; found not JSON",
    ),
    ({"messages": [USER, {"role": "assistant", "tool_calls": "f"}]}, "'tool_calls' must be a list of calls"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "an object with 'name' and 'arguments'"),
    ({"messages": [USER, ASSISTANT], "tools": "[{"}, "'tools' is text, but not JSON"),
    ({"system": "SYSTEM: {no", "chat": "USER: a\nASSISTANT: b"}, "'system' lists functions, but that is not JSON"),
    ({"system": "", "chat": "a"}, "'chat' must begin with USER: or ASSISTANT:"),
    ({"system": "", "chat": "USER: a\nASSISTANT: <functioncall> f"}, "a <functioncall> is not JSON"),
    (
        {"instruction": "a", "output": "b", "history": [["x"]]},
        "'history' must be a list of [instruction, answer] pairs",
    ),
    ({"instruction": "a", "output": "b", "system": 5}, "'system' must be text; found 5"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(QtuneError) as caught:
        read_records(lines(tmp_path, row))
    assert expected in str(caught.value) and "line 1: " in str(caught.value)


def test_alpaca_with_history_and_system(tmp_path: Path) -> None:
    row = {"instruction": "c", "output": "d", "input": None, "history": [["a", "b"]], "system": "be kind"}
    record = only_record(tmp_path, row)
    assert record.prompt == (
        "be kind\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n\n### Response:\n"
    )
    assert only_record(tmp_path, {"instruction": "c", "output": "d"}, system="s").prompt.startswith("s\n\n### Inst")


def test_system_of_the_recipe(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, USER, ASSISTANT]
    path = lines(tmp_path, {"messages": [USER, ASSISTANT]}, {"messages": own})
    first, second = read_records(path, DataKeys(system="be kind"))
    assert [m["content"] for m in first.messages] == ["be kind", "a", "b"]
    assert list(second.messages) == own
    with pytest.raises(
        QtuneError, match=r"data.system is set, but .* holds prompt records, which have no place for it"
    ):
        load_data(lines(tmp_path, *ROWS), tokenizer(), max_length=9, system="be kind")


def test_the_format_can_be_forced(tmp_path: Path) -> None:
    row = {"text": "t", "instruction": "i", "output": "o"}
    assert only_record(tmp_path, row).format == "alpaca"
    assert only_record(tmp_path, row, format="text").answer == "t"
    with pytest.raises(
        QtuneError, match="has no 'prompt', which the format prompt needs; found an object with the keys"
    ):
        only_record(tmp_path, row, format="prompt")
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(QtuneError, match="data.format is set, but this is plain text"):
        read_records(tmp_path / "t.txt", DataKeys(format="text"))


def test_columns(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "r", "id": 1, "prompt": "hidden"}
    columns = {"prompt": "question", "completion": "answer"}
    record = only_record(tmp_path, row, columns=columns)
    assert (record.prompt, record.answer, record.ignored) == ("q", "r", ("id",))
    turns = {"dialog": [{"speaker": "user", "said": "a"}, {"speaker": "bot", "said": "b"}]}
    record = only_record(tmp_path, turns, columns={"messages": "dialog", "role": "speaker", "content": "said"})
    assert list(record.messages) == [USER, ASSISTANT]
    told = "has no column 'frage', which data.columns names for prompt; found an object with the keys question, answer"
    with pytest.raises(QtuneError, match=told):
        only_record(tmp_path, row, columns={"prompt": "frage"})
    with pytest.raises(QtuneError, match="no record has the column 'contxt', which data.columns names for input"):
        only_record(tmp_path, {"instruction": "a", "output": "b"}, columns={"input": "contxt"})


def test_a_source_has_keys_of_its_own(tmp_path: Path) -> None:
    one = lines(tmp_path, {"q": "a", "r": "b"}, name="one.jsonl")
    two = lines(tmp_path, *ROWS, name="two.jsonl")
    given = (Source(str(one), columns={"prompt": "q", "completion": "r"}), Source(str(two)))
    tok = tokenizer()
    examples, report = load_source(given, tok, DataKeys(max_length=99))
    assert [marked(e, tok) for e in examples][:2] == ["a⟦b</s>⟧"] * 2
    assert str(report).startswith(f"{one}: 1 records (prompt), 1 examples\n{two}: 2 records (prompt), 2 examples\n")
    assert "1 of the records are equal to an earlier one; data.dedupe: true leaves them out" in str(report)


def test_faults_of_a_template_are_told_together(tmp_path: Path) -> None:
    template = (
        "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}{% for m in messages %}"
        "{{ m['content'] + '</s>' }}{% endfor %}"
    )
    rows = [{"messages": [USER, ASSISTANT] * n} for n in (1, 2, 1, *[2] * 6)]
    with pytest.raises(QtuneError) as caught:
        load_data(lines(tmp_path, *rows), tokenizer(template), max_length=99)
    text = str(caught.value)
    assert "t.jsonl: 7 records cannot be used:" in text and "... and 2 more" in text
    assert [n for n in range(1, 10) if f"line {n}: the chat template refuses" in text] == [2, 4, 5, 6, 7]


def test_what_is_learned_of_glaive(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tok = tokenizer(template)
    record = only_record(tmp_path, READ[-1][1])
    text = marked(only(record, tok)[0], tok)
    assert [part.split("⟧")[0] for part in text.split("⟦")[1:]] == ["f<|im_end|>", "b<|im_end|>"]
