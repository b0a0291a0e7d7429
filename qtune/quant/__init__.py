"""Storage formats of frozen weights: a Scheme says how a weight is packed, QuantLinear multiplies with it."""

from . import blockwise4, int8  # noqa: F401  (registers the schemes)
from .linear import QuantEmbedding, QuantLinear
from .scheme import SCHEMES, Dense, Parts, Scheme, scheme_from

__all__ = ["SCHEMES", "Dense", "Parts", "QuantEmbedding", "QuantLinear", "Scheme", "scheme_from"]
