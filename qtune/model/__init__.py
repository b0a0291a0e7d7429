"""Models: a checkpoint is read tensor by tensor, packed and dropped, so that the peak is the packed model plus about
two of its tensors."""

from .loading import dense_parameters, load, load_tokenizer, packed_sites
from .saving import save_quantized
from .skeleton import Origin, build

__all__ = ["Origin", "build", "dense_parameters", "load", "load_tokenizer", "packed_sites", "save_quantized"]
