"""Sizes that a person types."""

from ..units import parse_size as parse_size
