"""What makes big models fit, and what memory costs in time."""

from .host import (
    DEVICE,
    DISK,
    HOST,
    host_empty,
    host_memory,
    keep_freed_memory,
    making,
    mark,
    on_host,
    place_of,
    return_freed_memory,
)

__all__ = [
    "DEVICE", "DISK", "HOST", "host_empty", "host_memory", "keep_freed_memory", "making", "mark", "on_host",
    "place_of", "return_freed_memory",
]  # fmt: skip
