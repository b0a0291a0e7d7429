"""Data: masks checked token by token against expectations written by hand, in the templates of the common families.

The tokenizer has one token a character (byte-level BPE without merges, but for those a test adds), so a marked text
such as `user: a⟦b</s>⟧` fixes the mask of every token. Its pad token is its EOS token, as in many released models.
"""

from __future__ import annotations

import itertools
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from data_kit import chat, lines, marked, only, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtune.batches import Capacity, batches, collate, stream
from qtune.data import Example, Record, load_data, read_records, read_template, show_example, tokenize
from qtune.data.records import LEGAL
from qtune.errors import QtuneError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (  # {% generation %} leaves the end of turn outside, as some published templates do
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (  # an answer after the last question gets an empty thought; earlier ones lose theirs
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' + m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TWO = ("system: be kind", "user: a?", "assistant: yes", "user: b?", "assistant: no")
CASES = {
    "chatml": (
        CHATML,
        TWO,
        "<|im_start|>system\nbe kind<|im_end|>\n"
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n",
    ),
    "generation keyword": (
        CHATML_MARKED,
        TWO[1:],
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n",
    ),
    "llama3": (
        LLAMA3,
        TWO[1:],
        "<s><|start_header_id|>user<|end_header_id|>\n\na?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\n"
        "b?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦no<|eot_id|>⟧",
    ),
    "mistral": (MISTRAL, TWO[1:], "<s>[INST] a? [/INST]⟦ yes</s>⟧[INST] b? [/INST]⟦ no</s>⟧"),
    "gemma": (
        GEMMA,
        TWO[1:],
        "<s><start_of_turn>user\na?<end_of_turn>\n<start_of_turn>model\n⟦yes<end_of_turn>⟧\n"
        "<start_of_turn>user\nb?<end_of_turn>\n<start_of_turn>model\n⟦no<end_of_turn>⟧\n",
    ),
    "qwen3": (
        QWEN3,
        TWO[1:],
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nno<|im_end|>⟧\n",
    ),
    "no end of turn": (NO_END, TWO[1:], "user: a?\nassistant: ⟦yes\n⟧user: b?\nassistant: ⟦no\n⟧"),
    "two answers in a row": (
        CHATML,
        ("user: a", "assistant: b", "assistant: c", "user: d"),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n<|im_start|>assistant\n⟦c<|im_end|>⟧\n"
        "<|im_start|>user\nd<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_and_their_end_are_trained(name: str) -> None:
    template, turns, expected = CASES[name]
    tok = tokenizer(template, bos="<s>")
    record = chat(*turns)
    example, report = only(record, tok)
    assert marked(example, tok) == expected
    assert list(example.input_ids) == tok.apply_chat_template(list(record.messages))["input_ids"]  # no second BOS
    assert show_example(example, tok, colour=False).plain == expected
    assert report.trained == sum(len(tok(s.split("⟧")[0])["input_ids"]) - 1 for s in expected.split("⟦")[1:])
    assert report.tokens == len(example.input_ids) == report.longest
    assert ("may not learn to stop" in str(report)) == (name == "no end of turn")


def test_a_token_across_the_edge_of_an_answer() -> None:
    """`:a` is one token here. It holds the first letter of an answer, so it is trained there."""
    tok = tokenizer(NO_END.replace("': '", "':'").replace("assistant: ", "assistant:"), merges=((":", "a"),))
    example, _ = only(chat("user: u", "assistant: ab", "user: a", "assistant: aa"), tok)
    assert [tok.decode([i]) for i in example.input_ids].count(":a") == 3
    assert marked(example, tok) == "user:u\nassistant⟦:ab\n⟧user:a\nassistant⟦:aa\n⟧"


def test_loss_on_all_trains_all_but_the_first() -> None:
    tok = tokenizer(CHATML)
    example, _ = only(chat(*TWO), tok, loss_on="all")
    assert example.trained == b"\0" + b"\1" * (len(example.input_ids) - 1)
    example, _ = only(Record("prompt", "w", "ab", "c"), tok, loss_on="all")
    assert marked(example, tok) == "a⟦bc</s>⟧"


def test_an_answer_that_the_template_shortens() -> None:
    """Qwen3's template leaves the thoughts of earlier answers out: what is left of the answer is trained."""
    tok = tokenizer(QWEN3)
    record = chat("user: a", "assistant: <think>hm</think>yes", "user: b", "assistant: no")
    example, _ = only(record, tok)
    assert marked(example, tok) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nno<|im_end|>⟧\n"
    )


def test_a_template_that_rewrites_an_answer_is_refused() -> None:
    loud = "m['content'] | upper if m['role'] == 'assistant' and not loop.last else m['content']"
    tok = tokenizer(CHATML.replace("m['content']", f"({loud})"))
    record = chat("user: a", "assistant: yes", "user: b", "assistant: no")
    with pytest.raises(
        QtuneError, match=r"t.jsonl, line 1: the chat template renders message 2 .*loss_on: all.*generation"
    ):
        only(record, tok)
    example, _ = only(record, tok, loss_on="all")
    assert "YES" in tok.decode(list(example.input_ids))


def test_templates_that_refuse_name_the_record() -> None:
    with pytest.raises(
        QtuneError, match="line 1: the chat template refuses the conversation: System role not supported"
    ):
        only(chat(*TWO), tokenizer(GEMMA))
    with pytest.raises(QtuneError, match="roles must alternate"):
        only(chat("user: a", "user: b", "assistant: c"), tokenizer(MISTRAL))
    with pytest.raises(QtuneError, match=r"the chat template \(line 2\) refuses .*endif"):
        only(chat(*TWO), tokenizer("{% if messages %}\n{% endfor %}"))
    with pytest.raises(QtuneError, match=r"no chat template; set data.template, or give prompt/completion"):
        only(chat(*TWO), tokenizer(None))


def test_template_of_the_recipe_overrides(tmp_path: Path) -> None:
    tok = tokenizer(CHATML)
    file = tmp_path / "chat template.jinja"
    file.write_text(MISTRAL)
    for template in (MISTRAL, str(file)):
        example, _ = only(chat(*TWO[1:3]), tok, template=template)
        assert marked(example, tok) == "<s>[INST] a? [/INST]⟦ yes</s>⟧"
    with pytest.raises(QtuneError, match=r"data.template 'nowhere.jinja' is neither a template .* nor a readable file"):
        read_template("nowhere.jinja")


def test_tools_reach_the_template() -> None:
    template = "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}" + CHATML
    record = Record("messages", "w", messages=chat("user: a", "assistant: b").messages, tools=({"name": "f"},))
    tok = tokenizer(template)
    example, _ = only(record, tok)
    assert marked(example, tok) == "f;<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"


PLAIN = [
    (None, "Q: 1\nA:", " 2", "Q: 1\nA:⟦ 2</s>⟧"),
    ("<s>", "Q: 1\nA:", " 2", "<s>Q: 1\nA:⟦ 2</s>⟧"),
    ("<s>", "<s>Q", "A", "<s>Q⟦A</s>⟧"),  # BOS stands in the prompt already
    ("</s>", "Q", "A", "</s>Q⟦A</s>⟧"),  # OPT: bos == eos == pad
    (None, "Q", "A</s>", "Q⟦A</s>⟧"),  # EOS stands in the answer already
    (None, "", "abc", "a⟦bc</s>⟧"),  # nothing comes before the first token
    ("<s>", "", "abc", "<s>⟦abc</s>⟧"),
    ("<s>", "a</s>", "b", "<s>a</s>⟦b</s>⟧"),  # an EOS in the context is context
]


@pytest.mark.parametrize(("bos", "prompt", "answer", "expected"), PLAIN)
def test_prompt_and_completion(bos: str | None, prompt: str, answer: str, expected: str) -> None:
    tok = tokenizer(CHATML, bos=bos)  # a chat template plays no part here
    assert marked(only(Record("prompt", "w", prompt, answer), tok)[0], tok) == expected


def test_a_token_across_the_boundary_is_split() -> None:
    tok = tokenizer(merges=(("x", "y"), ("y", "z")))
    example, _ = only(Record("prompt", "w", "ax", "yb"), tok)
    assert [tok.decode([i]) for i in example.input_ids] == ["a", "x", "y", "b", "</s>"]
    example, _ = only(Record("prompt", "w", "axy", "yz"), tok)
    assert [tok.decode([i]) for i in example.input_ids] == ["a", "xy", "yz", "</s>"]
    assert list(example.trained) == [0, 0, 1, 1]


def test_no_space_slips_between_prompt_and_answer() -> None:
    """SentencePiece-style tokenizers put a space before each text they are given."""
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁Aye:s")}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    example, _ = only(Record("prompt", "w", "A:", "yes"), tok)
    assert [tok.convert_ids_to_tokens(i) for i in example.input_ids] == ["▁", "A", ":", "y", "e", "s", "</s>"]
    assert list(example.trained) == [0, 0, 0, 1, 1, 1, 1]
    assert show_example(example, tok, colour=False).plain == "A:⟦yes</s>⟧"


def test_alpaca_prompt(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 {2}", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Yo"},
    ]
    tok = tokenizer(bos="<s>")
    examples, report = load_data(lines(tmp_path, *rows), tok, max_length=500)
    head = "<s>Below is an instruction that describes a task"
    assert marked(examples[0], tok) == (
        f"{head}, paired with an input that provides further context. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n⟦3</s>⟧"
    )
    assert marked(examples[1], tok) == (
        f"{head}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\n⟦Yo</s>⟧"
    )
    assert (report.format, report.records, report.trained) == ("alpaca", 2, 5)


def test_text_and_windows(tmp_path: Path) -> None:
    tok = tokenizer(bos="<s>")
    examples, _ = load_data(lines(tmp_path, {"text": "abc"}), tok, max_length=9)
    assert [marked(e, tok) for e in examples] == ["<s>⟦abc</s>⟧"]
    (tmp_path / "t.txt").write_bytes("\ufeffab\r\ncdefg".encode())
    examples, report = load_data(tmp_path / "t.txt", tok, max_length=5)
    assert [marked(e, tok) for e in examples] == ["<s>⟦ab\nc⟧", "<s>⟦defg⟧", "<s>⟦</s>⟧"]
    assert (report.format, report.records, report.examples, report.truncated) == ("plain text", 1, 3, 0)


def test_eos_is_required() -> None:
    with pytest.raises(QtuneError, match="has no EOS token, so the model could not learn to stop"):
        only(Record("prompt", "w", "a", "b"), tokenizer(eos=None))


def test_truncation_is_counted() -> None:
    tok = tokenizer()
    records = [Record("prompt", "w", "p" * n, "abc") for n in (1, 4, 5, 6, 9)]  # 5, 8, 9, 10, 13 tokens with EOS
    examples, report = tokenize(records, tok, max_length=6, path="t.jsonl")
    assert [marked(e, tok) for e in examples] == ["p⟦abc</s>⟧", "pppp⟦ab⟧", "ppppp⟦a⟧"]
    assert (report.records, report.examples, report.truncated, report.dropped, report.longest) == (5, 3, 4, 2, 13)
    assert (report.tokens, report.trained) == (17, 7)
    text = str(report)
    assert "t.jsonl: 5 records (prompt) -> 3 examples, 17 tokens, 7 trained (41%)" in text
    assert "longest 13; 4 cut at 6 (2 answers lost tokens), 2 dropped" in text
    assert report.cut_answers == 2


def test_all_dropped_is_an_error() -> None:
    records = [Record("prompt", "w", "p" * n, "abc") for n in (9, 7)]
    with pytest.raises(
        QtuneError, match=r"t.jsonl: all 2 .* data.max_length = 7; the shortest prompt needs at least 8"
    ):
        tokenize(records, tokenizer(), max_length=7, path="t.jsonl")
    assert len(tokenize(records, tokenizer(), max_length=8)[0]) == 1
    with pytest.raises(QtuneError, match="no records"):
        tokenize([], tokenizer(), max_length=7)
    with pytest.raises(QtuneError, match="data.max_length is 1; legal: 2 or more"):
        tokenize(records, tokenizer(), max_length=1)
    with pytest.raises(
        QtuneError, match=r"unknown data.loss_on 'answers' \(did you mean 'answer'\?\); legal: all, answer"
    ):
        tokenize(records, tokenizer(), max_length=9, loss_on="answers")


# ---- batches ----


def numbered(*lengths: int) -> list[Example]:
    """Example i holds the id i + 1 throughout, its second half is trained."""
    return [
        Example(array("i", [i + 1] * n), bytes(k >= n / 2 for k in range(n)), f"line {i + 1}")
        for i, n in enumerate(lengths)
    ]


def test_unequal_lengths_are_padded_on_the_right() -> None:
    batch = collate(numbered(2, 4, 3))
    assert batch.input_ids.tolist() == [[1, 1, 0, 0], [2, 2, 2, 2], [3, 3, 3, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [[-100, 1, -100, -100], [-100, -100, 2, 2], [-100, -100, 3, -100]]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert batch.trained == 4
    assert batch.to("meta").labels.is_meta


def test_padding_is_masked_by_position_and_not_by_id() -> None:
    batch = collate([Example(array("i", [0, 0, 0]), b"\0\0\1", ""), Example(array("i", [0, 5]), b"\0\1", "")])
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[-100, -100, 0], [-100, 5, -100]]


def test_pad_equal_to_eos_leaves_eos_trained() -> None:
    tok = tokenizer(CHATML)
    assert tok.pad_token_id == tok.eos_token_id
    examples, _ = tokenize([Record("prompt", "w", "a", "b"), Record("prompt", "w", "a", "bcd")], tok, max_length=9)
    batch = collate(examples)
    assert batch.labels[0, 2] == batch.labels[1, 4] == tok.eos_token_id
    assert (batch.labels == tok.eos_token_id).sum() == 2
    assert (batch.labels[0, 3:] == -100).all()


def order(seed: int | None, epoch: int, count: int = 10, size: int = 4) -> list[list[int]]:
    found = batches(numbered(*[2] * count), Capacity(size), seed=seed, epoch=epoch)
    return [batch.input_ids[:, 0].tolist() for batch in found]


def test_shuffling_is_deterministic_and_differs_by_epoch_and_seed() -> None:
    assert order(None, 0) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    seen = {str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(seen) == 9  # in particular (0, 1) is not (1, 0)
    assert order(0, 0) == order(0, 0) == ORDER_0_0  # the same on every machine and Python
    assert [len(b) for b in order(7, 3)] == [4, 4, 2]
    assert sorted(itertools.chain(*order(7, 3))) == list(range(1, 11))


ORDER_0_0 = [[2, 1, 3, 5], [10, 4, 9, 7], [8, 6]]


def test_stream_goes_on_over_epochs() -> None:
    found = [b.input_ids[:, 0].tolist() for b in itertools.islice(stream(numbered(*[2] * 10), Capacity(4), 5), 7)]
    assert found == (order(5, 0) + order(5, 1) + order(5, 2))[:7]
    with pytest.raises(QtuneError, match="no examples"):
        next(stream([], Capacity(4), 0))


# ---- shown example ----


def test_show_example_colours_and_elides() -> None:
    tok = tokenizer()
    example, _ = only(Record("prompt", "w", "pé", "ñ🙂"), tok)
    text = show_example(example, tok)
    assert text.plain == "péñ🙂</s>"
    assert [(str(s.style), text.plain[s.start : s.end]) for s in text.spans] == [
        ("dim", "pé"),
        ("bold green", "ñ🙂</s>"),
    ]
    example, _ = only(Record("prompt", "w", "p" * 5000, "a"), tok, max_length=9999)
    shown = show_example(example, tok, colour=False, limit=10).plain
    assert shown == "ppppp [... 4,990 characters ...] ppppp⟦a</s>⟧"


# ---- files ----


GOOD = {"prompt": "a", "completion": "b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_formats_are_recognised(tmp_path: Path) -> None:
    rows: list[tuple[dict[str, Any], Record]] = [
        ({"messages": TURNS, "id": 3}, Record("messages", "", messages=tuple(TURNS), ignored=("id",))),
        (GOOD, Record("prompt", "", "a", "b")),
        ({"text": "a\u2028b"}, Record("text", "", answer="a\u2028b")),  # U+2028 is no end of line
    ]
    for row, expected in rows:
        for path in (
            lines(tmp_path, json.dumps(row, ensure_ascii=False), "", " "),
            lines(tmp_path, [row], name="t.json"),
        ):
            (record,) = read_records(path)
            place = "line 1" if path.suffix == ".jsonl" else "record 1"
            assert record == Record(**{**vars(expected), "where": f"{path}, {place}"})


def test_bom_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert [r.where.rpartition(", ")[2] for r in read_records(path)] == ["line 1", "line 3"]


def test_unused_keys_are_reported(tmp_path: Path) -> None:
    path = lines(tmp_path, {**GOOD, "id": 1}, {**GOOD, "source": "x", "id": 2})
    assert "note: keys that are not used: id, source" in str(load_data(path, tokenizer(), max_length=9)[1])


BAD_LINES = {
    "{'prompt': 1}": "not JSON (Expecting property name enclosed in double quotes at column 2): {'prompt': 1}",
    '{"a": ' + "[" * 100_000: "JSON",
    '"a"x': "not JSON (Extra data at column 4)",
    "3": "found 3, not an object",
    "null": "found null, not an object",
    "{}": "of no known format; found an empty object",
    '{"conversations": [], "id": 1}': "'conversations' must be a list of {role, content} objects; found an empty list",
    '{"question": "a", "id": 1}': "of no known format; found an object with the keys question, id; a recipe can say",
    '{"system": "a", "id": 1}': "of no known format",
    '{"chat": "USER: a"}': "has 'chat' but no 'system'",
    '{"prompt": "a", "answer": "b"}': "has 'prompt' but no 'completion'; found an object with the keys prompt, answer",
    '{"output": "a"}': "has 'output' but no 'instruction'",
    '{"prompt": ["a"], "completion": "b"}': "'prompt' must be text; found a list of 1",
    '{"prompt": "a", "completion": 5}': "'completion' must be text; found 5",
    '{"prompt": "a", "completion": " \\n"}': "'completion' is empty: there is nothing to learn",
    '{"prompt": "a", "completion": "\\ud83d"}': "'completion' holds half of a surrogate pair (character 1)",
    '{"text": ""}': "'text' is empty",
    '{"text": null}': "'text' must be text; found null",
    '{"instruction": "", "output": "b"}': "'instruction' is empty",
    '{"instruction": "a", "output": ""}': "'output' is empty",
    '{"instruction": "a", "input": 3, "output": "b"}': "'input' must be text; found 3",
    '{"messages": []}': "'messages' must be a list of {role, content} objects; found an empty list",
    '{"messages": "hi"}': 'found "hi"',
    '{"messages": ["hi"]}': "message 1: must be an object with 'role' and 'content'; found \"hi\"",
    '{"messages": [{"speaker": "human", "text": "a"}]}': "found an object with the keys speaker, text",
    '{"messages": [{"role": "users", "content": "a"}]}': "message 1: unknown role 'users' (did you mean 'user'?)",
    '{"messages": [{"role": "user"}]}': "message 1: has no 'content'; found an object with the keys role",
    '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}': "'content' must be text; found a list of 1",
    '{"messages": [{"role": "user", "content": "a"}]}': "nothing to learn; roles found: user",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "begins with the assistant",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}': "2: 'content' is empty",
    json.dumps({"messages": TURNS, "tools": 1}): "'tools' must be a list of objects; found 1",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_bad_line(tmp_path: Path, line: str) -> None:
    path = lines(tmp_path, "", line)
    with pytest.raises(QtuneError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 1 bad record:\n  line 2: ")
    assert BAD_LINES[line] in message
    assert message.endswith(f"legal records: {LEGAL}")


def test_five_faults_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(QtuneError) as caught:
        read_records(lines(tmp_path, GOOD, *["x"] * 7))
    message = str(caught.value)
    assert "7 bad records" in message
    assert [n for n in range(1, 9) if f"line {n}:" in message] == [2, 3, 4, 5, 6]
    assert "... and 2 more" in message


def test_mixed_formats(tmp_path: Path) -> None:
    with pytest.raises(
        QtuneError, match="line 2: is of the format text, but line 1 is prompt: one file holds one format"
    ):
        read_records(lines(tmp_path, GOOD, {"text": "a"}))


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("t.jsonl", b"", "holds no records"),
    ("t.jsonl", b"\n \n", "holds no records"),
    ("t.json", b"", "holds no records"),
    ("t.json", b"[]", "holds no records"),
    ("t.txt", b" \n", "holds no records"),
    ("t.xls", b"a,b", "unknown kind of data file: {path} ends in '.xls'; legal: .csv, .csv.gz, .json, .json.gz, "),
    ("t.csv", b"prompt,completion", "holds no records"),
    ("t.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: byte 0xff is not UTF-8 text; save the file as UTF-8"),
    ("t.txt", "hi".encode("utf-16"), "is UTF-16 text"),
    (
        "t.jsonl",
        b'[{"text": "a"}]',
        "begins with '[', as a JSON list does, but .jsonl holds one object a line; rename it to .json",
    ),
    ("t.json", b'{"text": "a"}', "holds an object with the keys text, but a .json file must hold a list"),
    ("t.json", b'{"text": "a"}\n{"text": "b"}', "each line is JSON by itself: rename it to .jsonl"),
    (
        "t.json",
        b'[{"text": "a"},\n]',
        "is no JSON list: not JSON (Illegal trailing comma before end of array at line 1",
    ),
    ("t.json", b'[{"text": "a"}, 3]', "record 2: found 3, not an object"),
]


@pytest.mark.parametrize(("name", "data", "expected"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(QtuneError) as caught:
        read_records(path)
    expected = expected.replace("Illegal trailing comma before end of array at line 1", "")  # Python 3.13 words it so
    assert expected.replace("{path}", str(path)) in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(QtuneError, match=r"cannot read the data file .*no.jsonl: No such file"):
        read_records(tmp_path / "no.jsonl")
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(QtuneError, match="cannot read the data file"):
        read_records(tmp_path / "d.txt")
