"""Results files, and what each of their rows says of the machine."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "safetensors")


def machine() -> dict[str, Any]:
    """Date, hardware and versions, for a results file."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def write(path: Path, value: dict[str, Any]) -> None:
    """A results file, indented."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
    print(f"wrote {path}")


def write_rows(path: Path, command: str, rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """A results file of one JSON row a line, each with date, hardware and versions; rows of other devices stay."""
    where = {"command": command, "device": device, **machine()}
    kept = [row for row in read_rows(path) if row["device"] != device] if path.exists() else []
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *(row | where for row in rows)]))
    print(f"wrote {path}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each settings, in the order of the first."""
    return list({json.dumps(row["settings"]): row for row in rows}.values())


def _cpu() -> str:
    try:
        return next(line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
