"""`qtune eval`: metrics, data with choices, user metrics, what is refused before the model loads, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_kit
import pytest
import runs_helper
import tiny
import torch

from qtune.batches import Capacity
from qtune.cli import main
from qtune.data import Question, load_data, load_questions
from qtune.errors import QtuneError
from qtune.evaluate import evaluate
from qtune.evaluation import choice, command
from qtune.evaluation.asked import Asked, asked_of
from qtune.evaluation.choice import choose, questions_of
from qtune.evaluation.metrics import exact, text_metrics
from qtune.sections import DataKeys
from qtune.step import LanguageModel

LEGAL = "legal: def metric(prompt: str, answer: str, expected: str) -> float"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has learned its task, with its merged folder."""
    root = tmp_path_factory.mktemp("evaluated")
    (root / "recipe.yaml").write_text(runs_helper.recipe(root, train__steps=40, train__save_every=20).to_yaml())
    assert main(["train", str(root / "recipe.yaml")]) == 0
    assert main(["merge", str(root / "run"), "--dtype", "float32"]) == 0
    rows = [json.loads(line) for line in (root / "task1.jsonl").read_text().splitlines()]
    asked = [
        {"prompt": row["prompt"], "choices": ["w6", "w5", "w7 w8"], "answer": row["completion"] if i % 2 else
         ["w6", "w5"].index(row["completion"])} for i, row in enumerate(rows)
    ]  # fmt: skip
    data_kit.lines(root, *asked, name="asked.jsonl")
    return root


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def loaded(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("qtune.runs.load", loaded)


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["eval", *map(str, argv)]) == code
    out = capsys.readouterr()
    return out.out, out.err


def as_json(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    return json.loads(run(capsys, *argv, "--json")[0])


# ---- the command


def test_several_metrics_of_base_and_adapter(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "closeness.py"
    own.write_text(
        "def metric(prompt, answer, expected):\n    print('here')\n    return 0.25 if prompt.startswith('w') else 0.0\n"
    )
    argv = (root / "run", "--base", "--metric", "perplexity", "--metric", "exact-match", "--metric", own)
    argv = (*argv, "--metric", "choice", "--max-new-tokens", 6, "--stop", " ", "--out", tmp_path / "new" / "out.jsonl")
    value = as_json(capsys, *argv)
    assert list(value) == ["base", "adapter"]
    for found in value.values():
        assert found["eval_loss"] > 0 and found["closeness.py"] == 0.25 and found["answers"] == 12
        assert 0 <= found["accuracy_norm"] <= 1
    assert 0.5 < value["adapter"]["exact-match"] <= value["adapter"]["accuracy"] and not value["base"]["exact-match"]
    rows = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 * 12
    assert {(row["model"], row["metric"]) for row in rows} == {
        (model, metric) for model in ("base", "adapter") for metric in ("choice", "exact-match", "closeness.py")
    }
    some = [row for row in rows if row["model"] == "adapter" and row["metric"] == "exact-match"]
    assert sum(row["score"] for row in some) / 12 == value["adapter"]["exact-match"]
    assert all((row["answer"].strip() == row["expected"].strip()) == row["score"] for row in some)
    assert some[0]["prompt"].startswith("w") and some[0]["where"].endswith("line 1")


def test_wrong_answers_are_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = root / "wrong.jsonl"
    data_kit.lines(root, *({"prompt": f"w1 w{20 + i} ", "completion": "w30"} for i in range(5)), name=task.name)
    out, _ = run(capsys, root / "run", "--data", task, "--metric", "exact-match", "--max-new-tokens", 4, "--limit", 4)
    assert "exact match 0.0% (0 of 4), white space around the answers left out" in out
    assert out.count("in place of 'w30'") == 3 and "wrong.jsonl, line 1" in out


def test_the_default_is_what_it_was(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(capsys, root / "run")["adapter"]
    assert set(value) == {
        "eval_loss", "perplexity", "eval_tokens", "eval_examples", "accuracy", "chance", "choices",
    }  # fmt: skip
    chosen = as_json(capsys, root / "run", "--metric", "choice")["adapter"]
    assert chosen["accuracy"] == value["accuracy"] and chosen["questions"] == 12
    alone = as_json(capsys, root / "run", "--metric", "perplexity", "--limit", 3)["adapter"]
    assert alone["eval_examples"] == 3 and "accuracy" not in alone


def test_a_checkpoint_a_model_and_a_merged_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = as_json(capsys, root / "run", "--metric", "perplexity")["adapter"]
    again = as_json(capsys, root / "run" / "checkpoints" / "step-40", "--metric", "perplexity")["adapter"]
    assert again == last
    half = as_json(capsys, root / "run" / "checkpoints" / "step-20", "--metric", "perplexity")["adapter"]
    assert half["eval_loss"] != last["eval_loss"]
    merged = as_json(
        capsys, root / "run" / "merged", "--metric", "perplexity", "--metric", "exact-match", "--stop", " "
    )["model"]
    assert merged["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-3) and merged["exact-match"] > 0.5
    out, _ = run(capsys, root / "model", "--data", root / "task1.jsonl")
    assert "dense" in out and "model " in out
    assert "nf4" in run(capsys, root / "model", "--data", root / "task1.jsonl", "--scheme", "nf4")[0]


def test_questions_with_choices(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(capsys, root / "run", "--data", root / "asked.jsonl")["adapter"]
    assert value["accuracy"] == 1.0 and value["questions"] == 12 and value["eval_examples"] == 12
    value = as_json(capsys, root / "run", "--data", root / "asked.jsonl", "--metric", "exact-match", "--stop", " ")
    assert value["adapter"]["exact-match"] > 0.5
    assert "12 questions with 3 choices" in run(capsys, root / "run", "--data", root / "asked.jsonl")[0]


REFUSED = {
    "--metric rouge": "unknown metric 'rouge'; legal: FILE.py, choice, exact-match, perplexity",
    "--metric exact-mach": "did you mean 'exact-match'?",
    "--metric gone.py": "there is no file gone.py with a metric",
    "--metric exact-match --stop ''": "--stop is empty",
    "--metric exact-match --max-new-tokens 0": "--max-new-tokens is 0; legal: 1 or more",
    "--metric exact-match --temperature -1": "--temperature is -1; legal",
    "--metric exact-match --seed 3": "--seed has no effect on the likeliest tokens",
    "--stop x --max-new-tokens 3": "--max-new-tokens, --stop: no metric looks at generated answers",
    "--limit 0 --batch 0": "--batch is 0; legal: 1 or more\n--limit is 0; legal: 1 or more",
    "--out x.jsonl": "--out writes answers, and none are given",
    "--num-fewshot 2": "--num-fewshot is of --tasks",
    "--tasks a --metric choice": "legal: without --metric and --data",
    "--tasks ,": "--tasks is empty",
    "--scheme nf4": "is a run, whose base is stored as its recipe says",
    "--data TEXT --metric exact-match": "holds text records, in which there is no prompt and no answer",
    "--data OPEN --metric choice": "their answers are not 2 to 8 that each come twice",
}


@pytest.mark.parametrize("argv", REFUSED)
@pytest.mark.usefixtures("unloaded")
def test_refused_before_the_model_loads(root: Path, argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    data_kit.lines(root, *({"text": f"w{i} w9"} for i in range(5)), name="text.jsonl")
    data_kit.lines(root, *({"prompt": "w1 ", "completion": f"w{i}"} for i in range(12)), name="open.jsonl")
    words = [{"''": "", "TEXT": f"{root}/text.jsonl", "OPEN": f"{root}/open.jsonl"}.get(w, w) for w in argv.split()]
    err = run(capsys, root / "run", *words, code=1)[1]
    assert REFUSED[argv] in err and "Traceback" not in err, err


def test_base_needs_a_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run, but a model without adapter" in run(capsys, root / "model", "--base", code=1)[1]
    assert "there is no data; give --data FILE" in run(capsys, root / "model", code=1)[1]


def test_stop_words_are_read_with_their_escapes() -> None:
    assert command._unescaped(r"a\nb\t\\n") == "a\nb\t\\n"


# ---- prompts and answers


def test_the_last_answer_is_asked_for() -> None:
    tokenizer = data_kit.tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    example, _ = data_kit.only(data_kit.chat("user: hi", "assistant: one", "user: and?", "assistant: two"), tokenizer)
    asked = asked_of(example, tokenizer)
    assert asked.expected == "two" and asked.prompt.endswith("assistant\n") and "one" in asked.prompt
    assert tokenizer.decode(asked.ids).endswith("and?<|im_end|>\n<|im_start|>assistant\n")
    assert asked.tokens == 4


def test_exact_match_leaves_white_space_out() -> None:
    asked = Asked("here", (1,), "p", " two words\n", 2)
    assert [exact(asked, text) for text in ("two words", "\ntwo words ", "two  words", "Two words", "")] == [
        1.0, 1.0, 0.0, 0.0, 0.0,
    ]  # fmt: skip


# ---- choices


def test_choices_by_the_models_own_logits(tmp_path: Path) -> None:
    """Sums of log probabilities, and those by characters, against transformers' forward of one text at a time."""
    model, tokenizer = tiny.model("llama"), tiny.words(tmp_path)
    rows = [{"prompt": f"w1 w{20 + i} ", "choices": ["w5", "w6 w7 w8", "w90"], "answer": i % 3} for i in range(8)]
    loaded = load_questions(str(data_kit.lines(tmp_path, *rows)), tokenizer, DataKeys())
    assert loaded is not None
    questions = loaded[0]
    found = choose(LanguageModel(model), questions, capacity=Capacity(5))
    scores = []
    for row in rows:
        each = []
        for text in row["choices"]:
            head = tokenizer(row["prompt"])["input_ids"]
            ids = [*tokenizer(row["prompt"] + text)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            each.append(sum(float(logp[at - 1, ids[at]]) for at in range(len(head), len(ids))))
        scores.append(each)
    assert torch.allclose(torch.tensor(found.scores), torch.tensor(scores), atol=1e-3)
    best = [max(range(3), key=lambda i, row=row: row[i]) for row in scores]
    lengths = [2, 8, 3]
    norm = [max(range(3), key=lambda i, row=row: row[i] / lengths[i]) for row in scores]
    assert found.picked == best and found.picked_norm == norm and best != norm
    assert found.accuracy == sum(b == i % 3 for i, b in enumerate(best)) / 8
    assert found.accuracy_norm == sum(b == i % 3 for i, b in enumerate(norm)) / 8 and found.chance == 3 / 8


def test_few_answers_are_questions_too(tmp_path: Path) -> None:
    model, tokenizer = tiny.model("llama"), tiny.words(tmp_path)
    examples, _ = load_data(runs_helper.write_task(tmp_path), tokenizer, max_length=64)
    questions = questions_of(examples, tokenizer)
    assert len(questions) == 24 and questions[0].texts == ("w5", "w6")
    language = LanguageModel(model)
    assert (
        choose(language, questions, capacity=Capacity(7)).accuracy
        == evaluate(language, examples, capacity=Capacity(4)).accuracy
    )
    assert choice.questions_of(examples[:1], tokenizer) == []


def test_choices_of_conversations_and_by_columns(tmp_path: Path) -> None:
    tokenizer = data_kit.tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "hi"}]
    for rows, keys in (
        ([{"messages": turns, "choices": ["a", "bc"], "answer": 1}], DataKeys()),
        ([{"conversations": [{"from": "human", "value": "hi"}], "choices": ["a", "bc"], "answer": "bc"}], DataKeys()),
    ):
        question = only(tmp_path, rows, tokenizer, keys)
        assert [data_kit.marked(one, tokenizer) for one in question.candidates] == [
            "user: hi</s>assistant: ⟦a</s>⟧", "user: hi</s>assistant: ⟦bc</s>⟧",
        ]  # fmt: skip
        assert question.right == 1 and question.texts == ("a", "bc")
    keys = DataKeys(columns={"prompt": "question", "completion": "gold"})
    question = only(tmp_path, [{"question": "2+2=", "choices": ["3", "4"], "answer": 1}], tokenizer, keys)
    assert data_kit.marked(question.candidates[1], tokenizer) == "2+2=⟦4</s>⟧"
    question = only(tmp_path, [{"instruction": "add", "choices": ["3", "4"], "answer": 0}], tokenizer, DataKeys())
    assert data_kit.marked(question.candidates[0], tokenizer).endswith("### Response:\n⟦3</s>⟧")


def only(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, keys: DataKeys) -> Question:
    loaded = load_questions(str(data_kit.lines(folder, *rows)), tokenizer, keys)
    assert loaded is not None and len(loaded[0]) == 1
    return loaded[0][0]


MALFORMED = {
    '{"prompt": "a", "choices": ["x"], "answer": 0}': "'choices' must be a list of two texts or more",
    '{"prompt": "a", "choices": "xy", "answer": 0}': 'none of them empty; found "xy"',
    '{"prompt": "a", "choices": ["x", " "], "answer": 0}': "found a list of 2",
    '{"prompt": "a", "choices": ["x", "x"], "answer": 0}': "'choices' holds a text twice",
    '{"prompt": "a", "choices": ["x", "y"], "answer": 2}': "'answer' is 2; legal: 0 to 1, or the text of a choice",
    '{"prompt": "a", "choices": ["x", "y"], "answer": true}': "'answer' is true; legal",
    '{"prompt": "a", "choices": ["x", "y"], "answer": "z"}': "'answer' is \"z\"; legal",
    '{"prompt": "a", "choices": ["x", "y"]}': "has no 'answer'; legal: 0 to 1",
    '{"prompt": 3, "choices": ["x", "y"], "answer": 0}': "'prompt' must be text; found 3",
    '{"messages": "hi", "choices": ["x", "y"], "answer": 0}': "'messages' must be a list of messages",
    '{"query": "a", "choices": ["x", "y"], "answer": 0}': "asks nothing; found an object with the keys query",
    '{"prompt": "a", "completion": "x"}': "has no 'choices', which the first record has",
    "{oops": "not JSON",
}


def test_all_malformed_choices_are_told_at_once(tmp_path: Path) -> None:
    good = '{"prompt": "a", "choices": ["x", "y"], "answer": 0}'
    for some in (list(MALFORMED)[:5], list(MALFORMED)[5:10], list(MALFORMED)[10:]):
        path = data_kit.lines(tmp_path, good, *some)
        with pytest.raises(QtuneError) as error:
            load_questions(str(path), data_kit.tokenizer(), DataKeys())
        told = str(error.value)
        for line, row in enumerate(some, 2):
            assert f"line {line}: {MALFORMED[row]}" in told or (f"line {line}: " in told and MALFORMED[row] in told)
        assert f"{len(some)} bad records" in told and 'legal records: {"prompt" or "messages"' in told


def test_questions_that_are_too_long_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * n, "choices": ["x", "yyy"], "answer": 0} for n in (3, 30)]
    path = str(data_kit.lines(tmp_path, *rows))
    loaded = load_questions(path, data_kit.tokenizer(), DataKeys(max_length=12))
    assert loaded is not None and len(loaded[0]) == 1 and "1 longer than 12 tokens left out" in loaded[1]
    with pytest.raises(QtuneError, match="no question is left: 2 of them longer than data.max_length = 4"):
        load_questions(path, data_kit.tokenizer(), DataKeys(max_length=4))
    assert load_questions(str(data_kit.lines(tmp_path, '{"text": "a"}')), data_kit.tokenizer(), DataKeys()) is None


# ---- user metrics

FILES = {
    "def metric(prompt, answer, expected):\n    return answer +\n": "own.py, line 2: cannot be imported: it raised Syn",
    "import math\nmath.nothing\n": "own.py, line 2: cannot be imported: it raised AttributeError: module 'math' has no",
    "import sys\nsys.exit(3)\n": "own.py, line 2: cannot be imported: it raised SystemExit: 3",
    "def score(a, b, c):\n    return 1\n": f"own.py defines no function 'metric'; {LEGAL}",
    "metric = 3\n": "own.py defines no function 'metric'",
    "def metric(answer):\n    return 1\n": f"(answer) does not take a prompt, an answer and what is expected; {LEGAL}",
    "def metric(*, prompt, answer, expected):\n    return 1\n": "does not take a prompt",
}  # fmt: skip


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_a_metric_file_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(QtuneError) as error:
        text_metrics([str(tmp_path / "own.py"), "nothing"])
    assert FILES[text] in str(error.value) and "unknown metric 'nothing'" in str(error.value)


CALLS = {
    "    return helper(answer)\n\ndef helper(x):\n    return x[99]\n": "own.py, line 5: metric raised IndexError: str",
    "    return 'good'\n": "own.py: metric returned 'good' for here (answer 'b', expected 'c'); legal: a finite number",
    "    return None\n": "own.py: metric returned None for here",
    "    return float('nan')\n": "own.py: metric returned nan for here",
}


@pytest.mark.parametrize("body", CALLS, ids=range(len(CALLS)))
def test_faults_of_a_users_metric_are_told_with_the_example(tmp_path: Path, body: str) -> None:
    (tmp_path / "own.py").write_text(f"def metric(prompt, answer, expected):\n{body}")
    (metric,) = text_metrics([str(tmp_path / "own.py")])
    with pytest.raises(QtuneError) as error:
        metric.score(Asked("here", (1,), "a", "c", 1), "b")
    assert CALLS[body] in str(error.value) and "here" in str(error.value)


def test_a_users_metric_gets_text_and_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("def same(a, b):\n    return a == b\n")
    (tmp_path / "own.py").write_text(
        "from beside_it import same\n\ndef metric(prompt, answer, expected, extra=1):\n"
        "    return same((prompt, answer, expected), ('a', 'b', 'c'))\n"
    )
    (metric,) = text_metrics([str(tmp_path / "own.py")])
    assert metric.name == "own.py" and metric.score(Asked("here", (1,), "a", "c", 1), "b") == 1.0


@pytest.mark.usefixtures("unloaded")
def test_a_metric_is_tried_before_the_model_loads(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text("def metric(prompt, answer, expected):\n    return {}[answer.strip()]\n")
    err = run(capsys, root / "run", "--metric", tmp_path / "own.py", code=1)[1]
    assert "own.py, line 2: metric raised KeyError" in err and "task1.jsonl, line 1" in err and "Traceback" not in err
