"""transformers' own warnings and bars, switched off: the command line shows what matters itself."""

from __future__ import annotations

from transformers.utils import logging


def quiet() -> None:
    """Errors only, no progress bars, for this process."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
