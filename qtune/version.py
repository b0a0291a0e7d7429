"""The versions of qtune and of other packages."""

from __future__ import annotations

import functools


@functools.cache
def version() -> str:
    """The installed version of qtune; in a checkout that is not installed, the one that pyproject.toml states."""
    import re
    from pathlib import Path

    if found := version_of("qtune"):
        return found
    project = Path(__file__).parent.parent / "pyproject.toml"
    stated = re.search(r'^version = "(.+)"$', project.read_text("utf-8"), re.M) if project.is_file() else None
    return stated[1] if stated else "0+unknown"


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
