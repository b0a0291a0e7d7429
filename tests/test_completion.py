"""Completion in a real bash, by the words that it hands to a completion function; the scripts of the other shells as
text, for these shells may not be there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qtune.adapters import METHODS
from qtune.cli import build_parser, main
from qtune.completion import SHELLS, keys, script
from qtune.recipe import Recipe

BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    return {shell: script(build_parser(), shell) for shell in SHELLS}


def completed(text: str, words: str, folder: Path) -> list[str]:
    """What bash offers behind a line; `=` is a word of its own there, as readline hands it over."""
    assert BASH is not None
    split = words.replace("=", " = ").split() + [""] * (words.endswith(" "))
    array = " ".join(f"'{word}'" for word in split)
    ask = f"COMP_WORDS=({array}); COMP_CWORD={len(split) - 1}\n_qtune qtune\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    return [line for line in bash(f"{text}\n{ask}", folder).splitlines() if line]


def bash(text: str, folder: Path) -> str:
    assert BASH is not None
    done = subprocess.run([BASH, "--norc", "-c", text], cwd=folder, capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(BASH is None, reason="no bash")
def test_bash_completes(scripts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: x\n")
    (tmp_path / "run").mkdir()
    text = scripts["bash"]
    assert "-F _qtune qtune" in bash(f"{text}\ncomplete -p qtune", tmp_path)
    for words, wanted in {
        "qtune tr": ["train"],
        "qtune train my": ["my.yaml"],
        "qtune train my.yaml train.l": ["train.label_smoothing=", "train.log_every=", "train.lr="],
        "qtune train my.yaml train.optimizer=adamw": ["adamw", "adamw8"],
        "qtune train my.yaml train.packing=": ["true", "false"],
        "qtune train --dry": ["--dry-run"],
        "qtune train my.yaml train.lr=1 --over": ["--overwrite"],
        "qtune merge r": ["run"],
        "qtune merge run --codes f": ["feedback"],
        "qtune quantize m --codes f": [],
        "qtune plan --scheme nf": ["nf2", "nf3", "nf4"],
        "qtune plan --device rtx409": ["rtx4090"],
        "qtune completion f": ["fish"],
    }.items():
        assert sorted(completed(text, words, tmp_path)) == sorted(wanted), words
    assert set(completed(text, "qtune plan --method ", tmp_path)) >= {"lora", "qwha"}


def test_every_key_is_completed(scripts: dict[str, str]) -> None:
    found = dict(keys())
    rows = Recipe.keys()
    sections = {row.name for row in rows} - {"adapter", "scheme"}
    assert sections <= set(found) and set(found["adapter.method"]) == set(METHODS)
    assert {"adapter.rank", "scheme.block"} <= set(found)
    for shell, text in scripts.items():
        assert "train.lr=" in text and "data.max_length=" in text and "dry-run" in text, shell
        assert "train.schedule=cosine" in text or shell == "bash"


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_whole(shell: str, scripts: dict[str, str], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    path = tmp_path / "script"
    path.write_text(scripts[shell])
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_command_prints_the_script(scripts: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.strip() == scripts["bash"].strip()
