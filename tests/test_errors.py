"""Every error has a code of the table, the table has no code too many, and docs/errors.md is written from it."""

from __future__ import annotations

import argparse
import ast
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtune import cli
from qtune.errors import QtuneError, all_of, listed, one_of, tried
from qtune.explain import KINDS, markdown
from qtune.explain.inputs import INPUTS
from qtune.explain.work import WORK

ROOT = Path(__file__).resolve().parent.parent
FILES = [p for d in ("qtune", "kernels") for p in sorted((ROOT / d).rglob("*.py")) if p.parent.name != "explain"]
CODE = re.compile(r"Q\d{3}")


def made() -> Iterator[tuple[str, ast.Call]]:
    """Every call in our code that makes a QtuneError, or one of its subclasses."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in FILES}
    classes = {"QtuneError", "faults_error"}  # the latter gathers a checkpoint's faults
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in classes for b in node.bases):
                classes.add(node.name)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in classes:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def names_a_code(call: ast.Call) -> bool:
    """A code of the table, the code of another error (`error.code`), or the argument `code` of the function around."""
    first = call.args[0] if len(call.args) == 2 else None
    if isinstance(first, ast.Constant):
        return first.value in KINDS
    return getattr(first, "attr", getattr(first, "id", "")) == "code"


def test_every_error_names_a_code_of_the_table() -> None:
    found = list(made())
    assert len(found) > 250, "the search finds too little"
    wrong = [
        f"{place}: {ast.unparse(call)[:80]}" for place, call in found
        if not names_a_code(call) and ast.unparse(call.func) != "faults_error"
    ]  # fmt: skip
    assert not wrong, "QtuneError(code, text): the first argument is a code of qtune/explain/\n" + "\n".join(wrong)


def test_every_code_is_used_and_known() -> None:
    strings = {
        node.value for path in FILES for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value)
    }  # fmt: skip
    assert strings == set(KINDS)


def test_the_table_is_whole() -> None:
    codes = re.findall(r"^(Q\d{3}) ", INPUTS + WORK, re.M)
    assert len(codes) == len(set(codes)) == len(KINDS), "a code stands twice"
    for kind in KINDS.values():
        assert CODE.fullmatch(kind.code) and kind.title and kind.meaning and kind.advice and kind.family, kind
        assert not kind.title.endswith(".") and kind.meaning.endswith(".") and kind.advice.endswith((".", "NEW.")), kind
        assert ">" not in kind.meaning, kind


def test_the_commands_that_the_table_names_exist() -> None:
    commands = set(re.findall(r"`qtune ([a-z]+)", INPUTS + WORK))
    choices = next(a.choices for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert commands <= set(choices)


def test_the_page_is_written_from_the_table() -> None:
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    assert page == markdown(), "write it anew: qtune explain --markdown > docs/errors.md"
    for code in KINDS:
        assert f'<a id="{code.lower()}"></a>' in page


def test_an_error_keeps_code_and_text_when_pickled() -> None:
    error = one_of("scheme", "nf5", ["nf4", "int8"])
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, str(again)) == ("Q101", str(error)) and type(again) is QtuneError
    assert str(error).startswith("unknown scheme 'nf5' (did you mean 'nf4'?); legal: int8, nf4")


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "q204"]) == 0
    assert KINDS["Q204"].title in (out := capsys.readouterr().out) and KINDS["Q204"].advice in out
    assert cli.main(["explain", "Q204", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["code"] == "Q204"
    assert cli.main(["explain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KINDS)
    assert cli.main(["explain", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown()
    assert cli.main(["explain", "Q999"]) == 1
    assert "error Q101: unknown code of an error 'Q999'" in capsys.readouterr().err


def test_a_program_gets_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "no-such-run", "--json"]) == 1
    out = capsys.readouterr()
    value = json.loads(out.out)
    assert value["code"] == "Q401" and "no-such-run is not a run" in value["error"]
    assert out.err.startswith("error Q401: no-such-run is not a run")


def test_a_bug_shows_its_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: argparse.Namespace) -> None:
        raise KeyError("weights")

    monkeypatch.setitem(cli.COMMANDS, "methods", broken)
    assert cli.main(["methods"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "error Q000: KeyError: 'weights'" in err and "please report it" in err


@pytest.mark.parametrize("source", ["QtuneError('no code')", "QtuneError('Q998', 'x')", "QtuneError(f'Q{1}', 'x')"])
def test_a_call_without_a_code_of_the_table_is_found(source: str) -> None:
    call = ast.parse(source).body[0]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call) and not names_a_code(call.value)


def test_faults_are_gathered_and_one_alone_keeps_its_code() -> None:
    def refuse(code: str, text: str) -> int:
        raise QtuneError(code, text)

    faults: list[QtuneError] = []
    assert tried(lambda: 3, faults) == 3 and not faults
    assert tried(lambda: refuse("Q201", "no file"), faults) is None
    assert tried(lambda: refuse("Q105", ""), faults) is None  # only follows from the one before
    assert all_of(faults, "Q111") is faults[0]
    assert tried(lambda: refuse("Q601", "no card"), faults) is None
    error = all_of(faults, "Q111")
    assert error.code == "Q111" and str(error) == "there are 2 faults:\n  no file\n  no card"


def test_a_list_is_cut_short() -> None:
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7 ..."
    assert listed(["a", "b"], 1, "; ") == "a ..."
