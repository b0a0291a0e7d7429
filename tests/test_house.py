"""The laws of the house (ARCHITECTURE.md), read from the source: who imports whom, sizes, packaging, start-up."""

from __future__ import annotations

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import qtune
from qtune.version import version

ROOT = Path(__file__).resolve().parent.parent

# A room imports rooms of earlier lines only; the modules of a package are one room.
ORDER = (
    {"errors", "version"},
    {"units"},
    {"safe_io", "screen", "keys", "yaml_text", "tables"},
    {"explain"},
    {"kernels"},
    {"backend"},
    {"ops"},
    {"quant", "speed"},
    {"vocabulary"},
    {"adapters"},
    {"sections"},
    {"peft", "recipe", "lora_form"},
    {"checkpoint", "gguf"},
    {"bnb"},
    {"loss"},
    {"model", "data"},
    {"batches"},
    {"memory"},
    {"optim"},
    {"starting", "state"},
    {"runs"},
    {"together"},
    {"resume", "peft_import"},
    {"routing"},
    {"step"},
    {"evaluate"},
    {"evaluation"},
    {"verify", "card", "repacking"},
    {"export"},
    {"packed_merge", "adapter_export", "gguf_merge"},
    {"planner"},
    {"headroom"},
    {"report"},
    {"loop"},
    {"combining"},
    {"inspection"},
    {"trainer", "chat", "listing", "doctor", "show_data", "proposal", "completion", "mixing"},
    {"dry_run"},
    {"demo", "commands"},
    {"cli"},
    {"__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Libraries that only some rooms may import; elsewhere in qtune/ and kernels/ they are forbidden.
RESERVED = {
    "transformers": {"model", "starting", "data", "planner", "export", "verify", "evaluate", "evaluation"},
    "lm_eval": {"evaluation"},
    "gguf": {"gguf"},
    "triton": {"_kernels"},
    "peft": set(),
    "bitsandbytes": set(),
    "kernels": set(),  # Hugging Face's package, never our folder
}
# modules of adapters/ that are no methods
SHARED_BY_METHODS = {
    "allocation",
    "base",
    "carried",
    "deltas",
    "factored",
    "files",
    "peft_names",
    "many",
    "mixture",
    "parts",
    "sites",
    "starts",
    "transforms",
}  # no methods


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def where(path: Path, node: ast.AST | int) -> str:
    return f"{path.relative_to(ROOT)}:{node if isinstance(node, int) else node.lineno}"


def room_of(module: str) -> str:
    """`qtune.quant.linear` -> `quant`; a module under kernels/ -> `_kernels`; qtune itself -> ``."""
    return (module.split(".") + [""])[1]


def module_of(path: Path) -> str:
    """The dotted name of a source file: of the package for an `__init__.py`, `qtune._kernels...` for kernels/."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["qtune", "_kernels", *parts[1:]] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every module that a file imports, anywhere in it, by its full name (`from . import ops` -> `qtune.ops`)."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*stem, *([node.module] if node.module else [])])
            whole = node.module is None or base == "qtune"  # `from . import a, b` names modules
            yield from ((node, f"{base}.{alias.name}") for alias in node.names) if whole else iter([(node, base)])


def run(*command: str, cwd: Path = ROOT, **extra: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | extra
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- who imports whom


def edges() -> Iterator[tuple[str, str, str]]:
    for path in sources("qtune", "kernels"):
        room = room_of(module_of(path))
        for node, target in imports(path):
            if target.split(".")[0] == "qtune" and room_of(target) != room:
                yield where(path, node), room, room_of(target)


def test_rooms_import_only_rooms_before_them() -> None:
    public = set(qtune.__all__)
    wrong = []
    for place, room, target in edges():
        if room == "":  # qtune/__init__.py names every public room, lazily
            continue
        if room == "_kernels":
            if target not in {"errors", "safe_io", "tables", "kernels"}:
                wrong.append(f"{place}: a kernel imports qtune.{target}; legal: errors, safe_io, tables, kernels")
        elif target in public or target == "":
            wrong.append(f"{place}: {room} imports qtune.{target} through the package; import it from its room")
        elif missing := {room, target} - set(RANK):
            wrong.append(f"{place}: no place in ORDER for {sorted(missing)}")
        elif RANK[target] >= RANK[room]:
            wrong.append(f"{place}: {room} imports {target}, which is not to its left")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_place_in_the_order() -> None:
    homeless = {room_of(module_of(path)) for path in sources("qtune")} - {"", *RANK}
    assert not homeless, f"rooms without a place in ORDER: {sorted(homeless)}"


def test_reserved_libraries_are_imported_only_where_they_may_be() -> None:
    wrong = [
        f"{where(path, node)}: {target} may be imported only in {sorted(RESERVED[library]) or 'tests and benchmarks'}"
        for path in sources("qtune", "kernels")
        for node, target in imports(path)
        if (library := target.split(".")[0]) in RESERVED and room_of(module_of(path)) not in RESERVED[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_a_method_imports_only_what_a_method_needs() -> None:
    methods = {path.stem for path in sources("qtune/adapters")} - {"__init__", *SHARED_BY_METHODS}
    legal = {f"qtune.adapters.{name}" for name in methods | SHARED_BY_METHODS} | {"qtune.ops", "torch"}
    wrong = []
    for name in sorted(methods):
        path = ROOT / "qtune" / "adapters" / f"{name}.py"
        for node, target in imports(path):
            library = target.split(".")[0]
            if target not in legal and library != "torch" and library not in sys.stdlib_module_names:
                wrong.append(f"{where(path, node)}: a method imports {target}")
    assert not wrong, "\n".join(wrong)


# ---- modules and functions


def test_sizes() -> None:
    wrong = []
    for path in sources("qtune", "kernels"):
        text = path.read_text("utf-8")
        if (lines := text.count("\n")) > 400:
            wrong.append(f"{where(path, 1)}: {lines} lines; at most 400")
        for node in ast.walk(ast.parse(text)):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and (lines := node.end_lineno - node.lineno + 1) > 80:
                wrong.append(f"{where(path, node)}: {node.name} has {lines} lines; at most 80")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is() -> None:
    wrong = []
    for path in sources("qtune", "kernels", "tests", "benchmarks"):
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        if docstring is None or docstring.count("\n") > 14:
            wrong.append(f"{where(path, 1)}: {'no docstring' if docstring is None else 'docstring over 15 lines'}")
    assert not wrong, "\n".join(wrong)


def test_nothing_happens_at_import_but_definitions() -> None:
    wrong = []
    for path in sources("qtune"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in tree.body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            if isinstance(node, ast.Expr | ast.With | ast.While | ast.Delete) and not (is_docstring or is_main):
                wrong.append(f"{where(path, node)}: runs at import: {ast.unparse(node).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def test_files_are_clean() -> None:
    """Nothing is left for later, and nothing of the machine that a file was written on gets into it."""
    later = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    machine = re.compile(r"(?<![\w.~$}/-])/(?:wo" + r"rk|ro" + r"ot|home/\w+|tmp/ba" + r"sh)[/.]")
    wrong = []
    for path in committed():
        if path.suffix not in {"", ".py", ".cpp", ".h", ".md", ".toml", ".yaml", ".yml", ".sh", ".json", ".csv"}:
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            for what, pattern in (("left for later", later), ("a path of one machine", machine)):
                if found := pattern.search(line):
                    wrong.append(f"{where(path, number)}: {what}: {found[0]}")
    assert not wrong, "\n".join(wrong)


def committed() -> list[Path]:
    """The files of the project: what git does not ignore; in an unpacked sdist, all but what is made here."""
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    inside = (path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [p for p in inside if p.relative_to(ROOT).parts[0] not in {".venv", ".git", "build", "dist", "runs"}]


# ---- public names, start-up


def test_public_names() -> None:
    assert set(qtune.__all__) == {*qtune._PUBLIC, "__version__"}
    assert set(qtune.__all__) <= set(dir(qtune))
    tree = ast.parse((ROOT / "qtune" / "__init__.py").read_text("utf-8"))
    (checking,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: f"{node.module}:{alias.name}"
        for node in checking.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == qtune._PUBLIC, "the table for type checkers and the one that is used differ"
    taken = set(qtune._PUBLIC) & {path.stem for path in (ROOT / "qtune").iterdir()}
    assert not taken, f"modules that would shadow public names once imported: {sorted(taken)}"


@pytest.mark.parametrize("name", sorted(qtune._PUBLIC))
def test_public_name_is_there(name: str) -> None:
    assert getattr(qtune, name) is not None


def test_version_is_the_one_in_pyproject() -> None:
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert stated is not None
    assert version() == stated[1]


def test_unknown_public_name_lists_the_legal_ones() -> None:
    with pytest.raises(AttributeError, match="'quantise'; public names: METHODS, SCHEMES"):
        qtune.quantise  # noqa: B018


def test_import_and_help_do_without_torch() -> None:
    heavy = "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    run(sys.executable, "-c", f"import sys, qtune, qtune.errors; {heavy}")
    ask = f"import sys\nfrom qtune.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n{heavy}"
    assert "train" in run(sys.executable, "-c", ask)


def test_help_starts_in_half_a_second() -> None:
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(sys.executable, "-m", "qtune", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5, f"CPU seconds of `qtune --help`: {spent}"


# ---- the kernels/ folder, wheel and sdist


def test_kernels_folder_does_not_shadow_hugging_faces_package() -> None:
    assert not list((ROOT / "kernels").rglob("__init__.py")), "an __init__.py makes our folder shadow `import kernels`"
    ask = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s and s.origin else '')"
    found = run(sys.executable, "-c", ask).strip()
    assert not found or ROOT / "kernels" not in Path(found).resolve().parents
    run(sys.executable, "-c", "import sys, qtune.kernels; assert 'kernels' not in sys.modules")


def test_the_list_of_packages_is_the_tree() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)
    assert listed is not None
    found = {module_of(path) for path in sources("qtune") if path.name == "__init__.py"}
    bare = [where(path, 1) for path in sources("qtune") if not (path.parent / "__init__.py").exists()]
    assert not bare, f"folders without an __init__.py are in no wheel: {bare}"
    assert set(re.findall(r'"(.+?)"', listed[1])) == {*found, "qtune._configs", "qtune._kernels"}


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without what git ignores, so that building leaves no trace in the checkout."""
    target = tmp_path_factory.mktemp("a copy")  # a path with a space
    for path in committed():
        (target / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / path.relative_to(ROOT))
    return target


def expected() -> set[str]:
    """What a wheel must hold, by the names that the files have in the checkout."""
    data = (ROOT / "kernels", ROOT / "configs" / "models")
    files = {path for path in committed() if any(path.is_relative_to(folder) for folder in data)}
    files |= {*sources("qtune"), ROOT / "qtune" / "py.typed", ROOT / "qtune" / "report" / "style.css"}
    files |= set((ROOT / "qtune" / "report").glob("*.html"))
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_is_whole_and_runs(copy: Path, tmp_path: Path) -> None:
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_wheel('out')", cwd=copy)
    (wheel,) = (copy / "out").glob("*.whl")
    held = {re.sub(r"^qtune/_(kernels|configs)/", r"\1/", name) for name in zipfile.ZipFile(wheel).namelist()}
    assert expected() - held == set()
    assert not [name for name in held if re.match(r"kernels/.*__init__|tests/|benchmarks/", name)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    run(*pip, str(wheel), cwd=tmp_path)
    ask = "import qtune, qtune.kernels as k; print(qtune.__file__, qtune.__version__, *k.__path__, sep='\\n')"
    file, version, folder = run(sys.executable, "-c", ask, cwd=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert Path(file) == tmp_path / "qtune" / "__init__.py"
    assert version == qtune.__version__
    assert Path(folder) == tmp_path / "qtune" / "_kernels"
    ask = "from qtune.planner import models as m; print(m.catalogue()['gpt2'], m.find_model('gpt2').parameters)"
    path, parameters = run(sys.executable, "-c", ask, cwd=tmp_path, PYTHONPATH=str(tmp_path)).rsplit(maxsplit=1)
    assert Path(path) == tmp_path / "qtune" / "_configs" / "models" / "gpt2.json" and parameters == "124439808"


def test_sdist_is_whole(copy: Path) -> None:
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('out')", cwd=copy)
    (sdist,) = (copy / "out").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert (expected() | {"pyproject.toml", "README.md", "LICENSE"}) - held == set()


# ---- the README


def test_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    used = set(re.findall(r"(?:^|`|&& )make ([a-z0-9-]+)", readme, re.M))
    assert {"demo", "test"} <= used, "the README must show `make demo` and `make test`"
    assert used <= targets, f"not in the Makefile: {sorted(used - targets)}"
    asked = set(re.findall(r"(?:^\s*(?:\$ )?|`)qtune ([a-z]+)", readme, re.M))
    shown = run(sys.executable, "-m", "qtune", "--help")
    unknown = {command for command in asked if not re.search(rf"\b{command}\b", shown)}
    assert not unknown, f"not a command of qtune: {sorted(unknown)}"
