"""Storage formats of frozen weights: a Scheme says how a weight is packed, QuantLinear multiplies with it."""

from .blockwise4 import FP4, NF4
from .int8 import INT8
from .linear import QuantEmbedding, QuantLinear
from .scheme import SCHEMES, Dense, Parts, Scheme, scheme_from

__all__ = ["FP4", "INT8", "NF4", "SCHEMES", "Dense", "Parts", "QuantEmbedding", "QuantLinear", "Scheme", "scheme_from"]
