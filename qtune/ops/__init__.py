"""Custom ops `torch.ops.qtune.*`: each a schema, a torch reference (the truth) and a shape function."""

from .packed import INT8_STEP, arena, block_scales
from .registry import REFERENCES

__all__ = ["INT8_STEP", "REFERENCES", "arena", "block_scales"]
