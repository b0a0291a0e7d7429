"""Mounts the top-level kernels/ folder as the package `qtune.kernels`.

In a checkout or an editable install that is the folder itself, in a wheel `qtune/_kernels`. The folder has no
`__init__.py`, so it can never be found as `kernels`, which is Hugging Face's package.
"""

from __future__ import annotations

from pathlib import Path


def _folder() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "_kernels"
    return installed if installed.is_dir() else package.parent / "kernels"


__path__ = [str(_folder())]
