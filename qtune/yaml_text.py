"""YAML as recipes use it: safe tags only, doubled keys are faults, `2e-4` is a number (in PyYAML it is text)."""

from __future__ import annotations

import re
from typing import Any

import yaml

# numbers whose exponent PyYAML's own pattern misses: those without a dot, or without the exponent's sign
_EXPONENT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that notes doubled keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.doubled: list[str] = []

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[str, int] = {}
        for name, _ in getattr(node, "value", ()):
            line = name.start_mark.line + 1
            if isinstance(name, yaml.ScalarNode) and seen.setdefault(name.value, id(name)) != id(name):
                self.doubled.append(f"line {line}: key {name.value!r} stands twice; legal: once")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number, and repeats values without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load_yaml(text: str, faults: list[str]) -> Any:
    """The value of a YAML text, None where it has none; syntax errors and doubled keys are appended to `faults`."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            faults += loader.doubled
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        faults.append(f"{place}not YAML: {' '.join(str(p) for p in (error.context, error.problem) if p)}")
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, say
        faults.append(f"not YAML: {error}")
    except RecursionError:
        faults.append("not YAML: nested too deep")
    except (LookupError, AttributeError, TypeError):  # how PyYAML says that `!!bool maybe` is none
        faults.append("not YAML: a value is not of the type that its tag (!!int, !!bool ...) gives it")
    return None


def dump_yaml(value: Any) -> str:
    """YAML text that `load_yaml` reads back as an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
