"""Features of images, for distances between sets of them, from weight files that the user has.

extractor = open_extractor("pt_inception-2015-12-05-6726825d.pth")
extractor(images)                   # (N, H, W, 3) uint8 -> (N, 2048) float32
"""

from glide_jax.evaluation.extractors.extractor import Extractor
from glide_jax.evaluation.extractors.recognise import open_extractor

__all__ = ["Extractor", "open_extractor"]
