"""Builds a C++ source with the machine's compiler at first use and loads it through ctypes; no torch headers.

The library is kept in the user's cache (QTUNE_CACHE, else the system's usual place) under a hash of source, flags,
machine and compiler, beside a note with its SHA-256: loading a damaged library could crash the process, so it is
compared first. Two processes at once: one builds, the other waits; the library takes its name by a rename, so even
without the lock none would read half a file. What cannot be done comes back as `why`, one sentence for the user. Left
out: MSVC.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qtune.errors import QtuneError
from qtune.safe_io import write_json

FLAGS = ("-O3", "-std=c++17", "-shared", "-ffp-contract=off", "-fvisibility=hidden")
COMPILERS = ("c++", "g++", "clang++")
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
COMPILE_LIMIT = 180.0  # seconds; a lock older than this was left by a process that died


@dataclass(frozen=True)
class Built:
    """A loaded library, or `why` there is none."""

    library: ctypes.CDLL | None = None
    path: Path | None = None
    compiler: str = ""
    why: str = ""


def cache_folder() -> Path:
    """Where built libraries are kept."""
    if own := os.environ.get("QTUNE_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "qtune"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qtune"


def find_compiler() -> tuple[list[str], str]:
    """The compiler's command and version, or no command and why there is none; CXX, if set, is the only candidate."""
    given = os.environ.get("CXX")
    candidates = [[given] if shutil.which(given) else shlex.split(given)] if given else [[name] for name in COMPILERS]
    for command in candidates:
        if not command or not shutil.which(command[0]):
            continue
        try:  # a compiler may speak the user's language in another encoding than Python's
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return command, done.stdout.splitlines()[0].strip()
    if given:
        return [], f"CXX={given} is no compiler that runs here"
    return [], f"no C++ compiler found (looked for {', '.join(COMPILERS)}; CXX names another)"


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def _note(library: Path) -> Path:
    return library.with_suffix(".json")


def _intact(library: Path) -> bool:
    """Is this library the one that its note speaks of?"""
    try:
        note = json.loads(_note(library).read_text("utf-8"))
        return bool(note["sha256"] == _digest(library.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _load(library: Path, check: Callable[[ctypes.CDLL], bool]) -> ctypes.CDLL | None:
    """The library, if it is intact, loads and passes its self-test."""
    if not _intact(library):
        return None
    try:
        loaded = ctypes.CDLL(str(library))
        return loaded if check(loaded) else None
    except (OSError, AttributeError):
        return None


def _alive(process: int) -> bool:
    if sys.platform == "win32":  # there, signal 0 would end the process
        return True
    try:
        os.kill(process, 0)
        return True
    except ProcessLookupError:
        return False
    except OSError:  # it exists, but is somebody else's
        return True


def _abandoned(lock: Path) -> bool:
    try:
        if time.time() - lock.stat().st_mtime > COMPILE_LIMIT + 30:
            return True
        owner = lock.read_text("utf-8").strip()
    except OSError:  # it has just been released
        return False
    return owner.isdigit() and not _alive(int(owner))


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold `lock` (a file with our process id); one that a dead process left is taken over, so every wait ends."""
    while True:
        try:
            with open(lock, "x", encoding="utf-8") as file:
                file.write(str(os.getpid()))
            break
        except FileExistsError:
            if _abandoned(lock):
                lock.unlink(missing_ok=True)
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _compile(command: list[str], source: Path, library: Path) -> str:
    """Compile `source` to `library`, with OpenMP where the compiler has it; returns why that failed, or ''."""
    position = [] if sys.platform == "win32" else ["-fPIC"]
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        for openmp in (["-fopenmp"], []):
            full = [*command, *FLAGS, *position, *openmp, "-o", str(fresh), str(source)]
            try:
                done = subprocess.run(full, capture_output=True, text=True, errors="replace", timeout=COMPILE_LIMIT)
            except subprocess.TimeoutExpired:
                return f"{command[0]} took more than {COMPILE_LIMIT:.0f} s to compile {source.name}"
            if done.returncode == 0 and fresh.is_file():
                digest = _digest(fresh.read_bytes())
                os.replace(fresh, library)
                write_json(_note(library), {"sha256": digest, "command": full})
                return ""
    last = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
    return f"{command[0]} could not compile {source.name}: {last.strip() or f'exit code {done.returncode}'}"


def build(source: Path, headers: tuple[Path, ...], check: Callable[[ctypes.CDLL], bool]) -> Built:
    """Load `source` as a library from the cache, built first if it is not there, or rebuilt once if it is damaged.

    `check` is a self-test of the loaded library. Without a compiler, a library that another one built from the same
    source serves. Never raises for what the machine lacks: `Built.why` says it.
    """
    text = [path.read_bytes() for path in (source, *headers)]
    stem = f"{source.stem}-{_digest(*text, ' '.join(FLAGS).encode(), platform.machine().encode())[:16]}"
    try:
        folder = cache_folder()
    except RuntimeError as error:  # a user without a home, as in some containers
        return Built(why=f"there is no folder for a cache ({error}); QTUNE_CACHE names one")
    try:
        command, version = find_compiler()
        if not command:
            for path in sorted(folder.glob(f"{stem}-*{SUFFIX}")) if folder.is_dir() else []:
                if loaded := _load(path, check):
                    return Built(loaded, path, "none (built earlier)")
            return Built(why=version)
        path = folder / f"{stem}-{_digest(version.encode())[:8]}{SUFFIX}"
        if loaded := _load(path, check):
            return Built(loaded, path, version)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            loaded = _load(path, check)  # another process may have built it while this one waited
            if not loaded:
                if why := _compile(command, source, path):
                    return Built(compiler=version, why=why)
                loaded = _load(path, check)
        if loaded:
            return Built(loaded, path, version)
        return Built(
            compiler=version, why=f"the library built by {version} does not load or fails its self-test: {path}"
        )
    except (OSError, QtuneError) as error:
        return Built(why=f"cannot build into the cache {folder} ({error}); QTUNE_CACHE names another folder")
