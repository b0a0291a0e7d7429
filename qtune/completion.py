"""`qtune completion SHELL`: a script that completes commands, options, files, names, and the keys of a recipe.

shtab makes it out of the parser; what the parser does not know is added here: which words are files, the names of
methods, schemes and devices, and `train.lr=` with its legal values behind it. The script is static, so a completion
starts no Python.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

SHELLS = ("bash", "zsh", "fish")
KEYS = "_qtune_keys"  # the function that completes KEY=VALUE
FILES = {"FILE", "FILE|RECIPE", "RECIPE", "RUN|MODEL", "MODEL"}  # metavars; a folder is a file as well
FOLDERS = {"RUN", "DIR"}


def options(parser: argparse.ArgumentParser) -> None:
    """The options of `qtune completion`."""
    where = "source it in ~/.bashrc; for zsh: as _qtune in a folder of $fpath; fish: in ~/.config/fish/completions"
    parser.add_argument("shell", choices=SHELLS, help=f"for bash: {where}")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script. parser: of the whole program; it is changed, so it must be good for nothing else."""
    import shtab

    values = {key: list(legal) for key, legal in keys()}
    complete = dict[str, Any](dict.fromkeys(SHELLS, KEYS)) | {"fish": f"({KEYS})", "preamble": _functions(values)}
    names = _names()
    for command, action in _actions(parser):
        if action.dest == "overrides" and action.metavar == "KEY=VALUE":
            action.complete = complete  # type: ignore[attr-defined]
        elif (known := names.get(f"{command} {action.dest}", names.get(action.dest))) and action.choices is None:
            action.choices = known
        elif action.metavar in FILES or action.metavar in FOLDERS:
            action.complete = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    made = str(shtab.complete(parser, shell))
    return made + _BASH if shell == "bash" else made


def _actions(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """Those of all commands, each with its command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from _actions(sub, name)
        else:
            yield command, action


def _names() -> dict[str, list[str]]:
    """What options take, by the name of the option, or by command and name where a command takes something else."""
    from .adapters import METHODS
    from .planner.devices import catalogue
    from .quant import SCHEMES
    from .quant.calibrate import CODES
    from .quant.scheme import DTYPES
    from .repacking import MERGE_CODES

    schemes = sorted(SCHEMES)
    return {
        "method": sorted(METHODS), "scheme": schemes, "embeddings": schemes, "codes": list(CODES),
        "merge codes": list(MERGE_CODES), "dtype": list(DTYPES), "keep_base": ["trained", "original"],
        "device": ["cpu", "cuda", "auto", *catalogue()],
    }  # fmt: skip


def keys() -> Iterator[tuple[str, Iterable[str]]]:
    """Every key of a recipe that is one value, with its legal values where they are a few words."""
    from .adapters import METHODS
    from .quant import SCHEMES
    from .recipe import SECTIONS, Recipe

    for f in fields(Recipe):
        if f.name in SECTIONS:
            yield from ((f"{f.name}.{k.name}", _legal(k.metadata)) for k in fields(SECTIONS[f.name]))
        elif f.name == "embeddings":
            yield "scheme.embeddings", sorted(SCHEMES)
        elif f.name == "adapter":
            yield "adapter", sorted(METHODS)
            yield "adapter.method", sorted(METHODS)
            yield "adapter.targets", ["all-linear"]
            for name in sorted({option for method in METHODS.values() for option in method.options()}):
                yield f"adapter.{name}", ()
        elif f.name == "scheme":
            yield "scheme", sorted(SCHEMES)
            yield "scheme.name", sorted(SCHEMES)
            yield "scheme.block", ()
            yield "scheme.double", ("true", "false")
        else:
            yield f.name, _legal(f.metadata)


def _legal(limits: Mapping[str, Any]) -> list[str]:
    found = {"flag": ["true", "false"], "device": ["auto", "cuda", "mps", "cpu"]}.get(limits["kind"], [])
    found = list(limits.get("legal", found)) if limits["kind"] in ("choice", "flag", "device") else found
    return found + ["null"] * bool(found and limits.get("null"))


def _functions(values: Mapping[str, list[str]]) -> dict[str, str]:
    """The function KEYS in the words of each shell. In bash `=` ends a word, so there values are for `_qtune`."""
    names = [f"{key}=" for key in values]
    pairs = [f"{key}={value}" for key, legal in values.items() for value in legal]
    cases = "\n".join(f"    {key}) echo {shlex.quote(' '.join(legal))};;" for key, legal in values.items() if legal)
    listed, paired = (" ".join(map(shlex.quote, words)) for words in (names, pairs))
    return {
        "bash": f'{KEYS}() {{\n  compgen -W {shlex.quote(" ".join(names))} -- "$1"\n}}\n'
        f'_qtune_values() {{\n  case "$1" in\n{cases}\n  esac\n}}',
        "zsh": f"{KEYS}() {{\n  local -a words\n  if [[ $PREFIX == *=* ]]; then\n    words=({paired})\n"
        f"    compadd -a words\n  else\n    words=({listed})\n    compadd -S '' -a words\n  fi\n}}",
        "fish": f"function {KEYS}\n  if string match -q '*=*' -- (commandline -ct)\n    printf '%s\\n' {paired}\n"
        f"  else\n    printf '%s\\n' {listed}\n  end\nend",
    }


# bash has no space behind KEY=, and knows the values of a key
_BASH = """
_qtune() {
  local word="${COMP_WORDS[COMP_CWORD]}" key=""
  [[ $word == "=" ]] && key="${COMP_WORDS[COMP_CWORD-1]}" word=""
  [[ -z $key && $COMP_CWORD -ge 2 && ${COMP_WORDS[COMP_CWORD-1]} == "=" ]] && key="${COMP_WORDS[COMP_CWORD-2]}"
  if [[ -n $key && $key != -* ]]; then
    COMPREPLY=($(compgen -W "$(_qtune_values "$key")" -- "$word"))
    [[ ${#COMPREPLY[@]} = 0 ]] && compopt -o default 2>/dev/null
    return 0
  fi
  _shtab_qtune "$@"
  [[ ${#COMPREPLY[@]} = 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}

complete -o bashdefault -F _qtune qtune
"""
