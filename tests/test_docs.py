"""The documentation: what the code states is on its pages, links lead somewhere, commands and recipes in it are legal,
tables are those of the results files. The site itself is built where MkDocs is installed (slow)."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import yaml

import qtune
from qtune.adapters import METHODS
from qtune.cli import build_parser, main, parse
from qtune.data.formats import FORMATS, recognised
from qtune.planner.devices import find_device
from qtune.planner.models import find_model
from qtune.planner.plan import HEAP
from qtune.quant import SCHEMES
from qtune.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
Pages = dict[str, str]


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def made() -> Pages:
    """The pages that the code states."""
    return module(DOCS / "generate.py").pages()


@pytest.fixture(scope="module")
def written() -> Pages:
    """The pages that a person wrote."""
    return {path.name: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}


@pytest.fixture(scope="module")
def pages(made: Pages, written: Pages) -> Pages:
    assert not set(made) & set(written), "a page is both written and made from the code"
    return made | written


def blocks(text: str, *languages: str) -> list[str]:
    """What stands between fences that are marked with one of these languages."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S)
    return [body for language, body in found if language in languages]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


# ---- what the code states is on a page


def key_names() -> set[str]:
    rows = Recipe.keys()
    return {row.name for row in rows}


def test_every_key_is_on_the_page_of_keys(made: Pages) -> None:
    page = made["reference/keys.md"]
    missing = [name for name in key_names() if f'<a id="{name}"></a>`{name}`' not in page]
    assert not missing
    assert "| `0.0002` | peak learning rate | a number &gt; 0 |" in page


def subparsers() -> dict[str, Any]:
    return dict(next(action.choices for action in build_parser()._actions if action.dest == "command"))  # type: ignore[arg-type]


def test_every_command_and_option_is_on_the_page_of_commands(made: Pages) -> None:
    sections = re.split(r"^## ", made["reference/commands.md"], flags=re.M)
    by = {section.partition("\n")[0]: section for section in sections[1:]}
    assert list(by) == [f"qtune {name}" for name in subparsers()]
    for name, parser in subparsers().items():
        for action in parser._actions:
            choices = "{" + ",".join(map(str, action.choices or ())) + "}"
            shown = action.option_strings[0] if action.option_strings else str(action.metavar or choices)
            assert shown in by[f"qtune {name}"], f"qtune {name} {shown}"


def test_every_method_scheme_recipe_and_public_name_is_on_its_page(made: Pages) -> None:
    methods, schemes, recipes, api = (
        made[name] for name in ("reference/methods.md", "reference/schemes.md", "recipes.md", "reference/api.md")
    )
    assert not [name for name in METHODS if f"\n## {name}\n" not in methods]
    assert not [name for name in METHODS if f"\n| [`{name}`](#{name}) | " not in methods]
    assert "\n- rotate (its type 6): every chunk is turned" in methods and "\n\nThe code rounds n to" in methods
    assert not [name for name in SCHEMES if f'<a id="{name}"></a>`{name}`' not in schemes]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")]
    assert not [name for name in files if f"\n### {name} " not in recipes]
    assert not [name for name in qtune._PUBLIC if f"\n::: qtune.{name}\n" not in api]


def test_names_of_the_api_page_are_there(made: Pages) -> None:
    for name in re.findall(r"^::: (\S+)$", made["reference/api.md"], re.M):
        room, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(room), attribute).__doc__, name


# ---- navigation and links


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for value in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from leaves(value)


def test_navigation_has_every_page_once(pages: Pages) -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(leaves(settings["nav"])) == sorted(pages)
    assert settings["strict"] and settings["theme"]["font"] is False and "site_url" not in settings
    assert all((ROOT / hook).is_file() for hook in settings["hooks"])
    assert all((DOCS / style).is_file() for style in settings["extra_css"])


def anchors(text: str) -> set[str]:
    """What a link may name on a page: headings as Python-Markdown calls them, and ids."""
    found = set(re.findall(r'<a id="([^"]+)">', text)) | set(re.findall(r"^::: (\S+)$", text, re.M))
    for heading in re.findall(r"^#{1,6} (.+)$", prose(text), re.M):
        given = re.search(r"\{: #(\S+) \}$", heading)
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(given[1] if given else re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def test_links_lead_to_pages_and_headings(pages: Pages) -> None:
    wrong = []
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
            file, _, anchor = target.partition("#")
            if re.match(r"https?:", file):
                continue
            name = (Path(page).parent / file).as_posix() if file else page
            parts: list[str] = []
            for part in name.split("/"):
                parts = parts[:-1] if part == ".." else [*parts, part]
            name = "/".join(parts)
            if name in pages:
                wrong += [f"{page}: no heading {target}"] * (bool(anchor) and anchor not in anchors(pages[name]))
            elif not (DOCS / name).is_file():
                wrong.append(f"{page}: no page or file {target}")
    assert not wrong, "\n".join(wrong)


# ---- what a reader copies


def command_lines() -> list[tuple[str, str]]:
    """(where, command) of each line `qtune ...` in a block of the pages, of README and in the headers of recipes."""
    texts = {path.name: path.read_text("utf-8") for path in [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]}
    lines = [
        (name, line) for name, text in texts.items() for body in blocks(text, "", "sh") for line in body.split("\n")
    ]
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        lines += [(path.name, line[1:]) for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    found = [(name, re.match(r"\s*(?:\$ )?(?:\.venv/bin/)?(qtune [a-z].*)$", line)) for name, line in lines]
    # what follows three spaces, or a #, says what the command does
    return [(name, re.split(r"\s{3,}|\s+#", match[1])[0]) for name, match in found if match]


def test_commands_are_legal() -> None:
    lines = command_lines()
    assert len(lines) > 60 and {"index.md", "README.md", "qwha.yaml"} <= {name for name, _ in lines}
    keys = key_names()
    for name, line in lines:
        try:
            args = parse(shlex.split(line)[1:])
        except SystemExit:
            pytest.fail(f"{name}: not a command: {line}")
        for pair in getattr(args, "overrides", []):
            key = pair.partition("=")[0]
            known = key in keys or key.startswith(("adapter.", "scheme."))
            assert "=" in pair and (known or args.command == "quantize"), f"{name}: {pair} in {line}"
        if args.command == "plan":
            assert args.device is None or find_device(args.device), line
            assert args.model in (None, "NAME") or find_model(args.model), line
        for option, legal in (("scheme", SCHEMES), ("method", METHODS)):
            assert getattr(args, option, None) in (None, *legal), line


def test_commands_in_the_text_exist(written: Pages) -> None:
    """In running text a command may be a part of one: its name and its options are looked at."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    parsers = subparsers()
    for name, text in written.items():
        for target in re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.M):
            assert target in targets, f"{name}: make {target}"
        for command, rest in re.findall(r"`qtune ([a-z]+)([^`]*)`", prose(text)):
            assert command in parsers, f"{name}: qtune {command}"
            for option in re.findall(r"--[a-z-]+", rest):
                assert option in parsers[command]._option_string_actions, f"{name}: qtune {command} {option}"


def test_keys_in_the_text_exist(written: Pages) -> None:
    keys = key_names()
    for name, text in written.items():
        for section, key in re.findall(r"`(data|calibrate|train|memory)\.(\w+)", prose(text)):
            assert f"{section}.{key}" in keys or key in ("jsonl", "py"), f"{name}: {section}.{key}"


def test_recipes_in_the_text_are_legal(written: Pages) -> None:
    bodies = [(name, body) for name, text in written.items() for body in blocks(text, "yaml")]
    assert len(bodies) >= 8
    for name, body in bodies:
        tree = yaml.safe_load(body)
        assert Recipe.load({"model": "m", **tree}, training=False), name


def test_records_on_the_page_of_data_are_recognised(written: Pages) -> None:
    sections = re.split(r"^### ", written["data.md"], flags=re.M)
    shown = {section.partition("\n")[0]: blocks(section, "json") for section in sections[1:]}
    assert list(shown) == list(FORMATS)
    for name, (record, *_) in shown.items():
        assert recognised(json.loads(record)) == name


def test_python_on_the_pages_names_what_is_there(pages: Pages) -> None:
    (body,) = blocks(pages["reference/api.md"], "python")
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(importlib.import_module(str(node.module)), alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qtune":
            assert hasattr(qtune, node.attr)


# ---- figures


def test_tables_are_those_of_the_results(script: Callable[[str], Any]) -> None:
    tables = script("tables")
    for page in tables.pages():
        text = page.read_text("utf-8")
        names = re.findall(r"^<!-- (?!end)([\w-]+) -->$", text, re.M)
        assert set(names) <= set(tables.TABLES), page
        for name in filter(tables.has_results, names):
            assert tables.filled(text, name) == text, f"{page.name}, {name}: run make docs-tables"


def test_the_room_that_a_cpu_plan_leaves_covers_what_was_measured(script: Callable[[str], Any]) -> None:
    results = script("results")
    rows = [row["process"] for row in results.read_rows(results.FOLDER / "plan.jsonl") if row["device"] == "cpu"]
    assert rows and max(row["measured"] / row["planned"] for row in rows) < 1 + HEAP


def test_figures_stand_in_tables_alone(written: Pages) -> None:
    """A size or a share in running text would stay when what was measured changes."""
    for name, text in written.items():
        if name == "errors.md":  # messages have sizes in them
            continue
        plain = re.sub(r"<!-- (?!end).*?<!-- end -->", "", prose(text), flags=re.S)
        found = re.search(r"\d[\d,.]* ?(?:MiB|GiB|tokens/s|ms\b|% (?:of|more|less|faster))", plain)
        assert found is None, f"{name}: {found}"


# ---- the site

BUILT = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings"))


@pytest.mark.slow
@pytest.mark.skipif(not BUILT, reason="MkDocs is not installed here: pip install -e '.[docs]'")
def test_site_is_built_and_asks_for_nothing_from_elsewhere(pages: Pages, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for page in pages:
        html = (tmp_path / "site" / page).with_suffix(".html").read_text("utf-8")
        assets = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\s\">]+)", html)
        assets += re.findall(r"<link[^>]* href=\"?([^\s\">]+)", html)
        assert not [asset for asset in assets if re.match(r"(?:https?:)?//", asset)], page
        assert "/" + "tmp/" not in html and str(ROOT) not in html, page
    api = (tmp_path / "site" / "reference" / "api.html").read_text("utf-8")
    assert not [name for name in qtune._PUBLIC if f'id="qtune.{name}"' not in api]
    assert re.search(r"<li>\s*<p>\s*<code>overwrite</code>: replace a run", api), "parameters are a list"


@pytest.mark.slow
def test_the_way_of_getting_started_runs(
    written: Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the first page in their order, in a folder where a tiny model has the name of the page's."""
    monkeypatch.chdir(tmp_path)
    body = next(body for body in blocks(written["index.md"], "yaml") if "model:" in body)
    runs_helper.write_model(tmp_path / yaml.safe_load(body)["model"])
    runs_helper.write_task(tmp_path).rename(tmp_path / "train.jsonl")
    (tmp_path / "recipe.yaml").write_text(body)
    lines = [line for name, line in command_lines() if name == "index.md" and line.split()[1] not in ("doctor", "plan")]
    assert {line.split()[1] for line in lines} >= {"data", "train", "eval", "chat", "merge", "export"}
    for line in lines:
        monkeypatch.setattr("sys.stdin", io.StringIO("w1\n"))
        assert main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (tmp_path / "runs" / "first" / "merged" / "config.json").is_file()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_plans_on_the_pages_run() -> None:
    """Those that need no recipe of the reader; what a results file holds was run by its script."""
    shown = {json.loads(path.read_text())["command"] for path in (ROOT / "benchmarks" / "results").glob("plan-*.json")}
    lines = {
        line for name, line in command_lines() if line.startswith("qtune plan --model ") and "NAME" not in line
    } - shown
    assert lines
    for line in sorted(lines):
        done = subprocess.run([sys.executable, "-m", *shlex.split(line)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "peak" in done.stdout, f"{line}\n{done.stdout}\n{done.stderr}"
