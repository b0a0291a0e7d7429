"""What makes big models fit, and what memory costs in time."""

from .host import keep_freed_memory

__all__ = ["keep_freed_memory"]
