"""Weights: folders of glide-jax, and `.pt` files under OpenAI's parameter names."""

from glide_jax.weights.registry import Model, load_model
from glide_jax.weights.released import (
    abstract_params,
    count_params,
    from_released,
    to_released,
)
from glide_jax.weights.released_clip import clip_from_released, clip_to_released
from glide_jax.weights.store import load_weights, save_weights
from glide_jax.weights.torch_file import read_torch_file
from glide_jax.weights.torch_writer import write_torch_file

__all__ = [
    "Model",
    "abstract_params",
    "clip_from_released",
    "clip_to_released",
    "count_params",
    "from_released",
    "load_model",
    "load_weights",
    "read_torch_file",
    "save_weights",
    "to_released",
    "write_torch_file",
]
