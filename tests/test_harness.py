"""Tasks of EleutherAI's lm-eval from local files: the numbers of its own model interface, of base, adapter, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_kit
import pytest
import runs_helper
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.cli import main
from qtune.trainer import train

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'qtune[eval]'")
pytestmark = pytest.mark.slow  # the import alone takes seconds

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT = """\
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" ", "</s>"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned its task, and three tasks in files."""
    root = tmp_path_factory.mktemp("harness")
    train(runs_helper.recipe(root, train__steps=30, data__eval=None))
    rows = [json.loads(line) for line in (root / "task0.jsonl").read_text().splitlines()]
    asked = [
        {"prompt": row["prompt"].strip(), "choices": ["w5", "w6", "w7 w8"], "answer": int(row["completion"] == "w6")}
        for row in rows[:12]
    ]
    data = data_kit.lines(root, *asked, name="asked.jsonl")
    for name, text in (("choice", CHOICE), ("text", TEXT), ("rolling", ROLLING)):
        head = TASK.format(name=f"local_{name}", data=data, cache=root / "cache")
        (root / f"{name}.yaml").write_text(head + text)
    return root


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["eval", *map(str, argv)]) == code
    out = capsys.readouterr()
    return out.out, out.err


def files(root: Path, *names: str) -> str:
    return ",".join(str(root / f"{name}.yaml") for name in names)


def near(one: Any, other: Any) -> bool:
    return one == other if isinstance(other, (str, int)) else one == pytest.approx(other, rel=1e-4)


def test_the_numbers_are_those_of_lm_evals_own_model(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All three kinds of request, on a dense model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = files(root, "choice", "text", "rolling")
    out = tmp_path / "out.jsonl"
    ours = json.loads(run(capsys, root / "model", "--tasks", tasks, "--batch", 5, "--out", out, "--json")[0])["model"]
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(root / "model"), batch_size=5),
        tasks=tasks.split(","), task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    assert set(ours) == {"local_choice", "local_text", "local_rolling"}
    for task, row in ours.items():
        want = theirs["results"][task] | {"n-shot": 0}
        assert set(row) == set(want) - {"alias"}
        assert all(near(value, want[key]) for key, value in row.items()), (task, row, want)
    assert ours["local_rolling"]["word_perplexity,none"] > 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 36 and {row["model"] for row in rows} == {"model"}
    asked = [row for row in rows if row["metric"] == "exact_match"]
    samples = theirs["samples"]["local_text"]
    assert [row["answer"] for row in asked] == [sample["filtered_resps"][0] for sample in samples]
    assert all(row["prompt"].startswith("w") and row["expected"] in ("w5", "w6") for row in asked)


def test_base_adapter_and_merged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = files(root, "choice", "rolling")
    found = json.loads(run(capsys, root / "run", "--base", "--tasks", tasks, "--json")[0])
    assert list(found) == ["base", "adapter"]
    assert found["base"]["local_rolling"] != found["adapter"]["local_rolling"]
    assert main(["merge", str(root / "run"), "--dtype", "float32"]) == 0
    merged = json.loads(run(capsys, root / "run" / "merged", "--tasks", tasks, "--json")[0])["model"]
    for task, row in merged.items():
        assert all(near(value, found["adapter"][task][key]) for key, value in row.items()), task


def test_shots_and_limit_and_what_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, root / "run", "--tasks", files(root, "choice"), "--num-fewshot", 2, "--limit", 3)
    assert "local_choice  acc " in out and "local_choice  acc_norm " in out and "2-shot" in out and " ± " in out


def test_tasks_that_do_not_load_are_told_before_the_model(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.runs.load", lambda *args, **options: pytest.fail("the model was loaded"))
    assert "there is no task file gone.yaml" in run(capsys, root / "run", "--tasks", "gone.yaml", code=1)[1]
    (tmp_path / "bad.yaml").write_text((root / "choice.yaml").read_text().replace("asked.jsonl", "gone.jsonl"))
    err = run(capsys, root / "run", "--tasks", tmp_path / "bad.yaml", code=1)[1]
    assert "lm-eval cannot load" in err and "gone.jsonl" in err and "Traceback" not in err
