"""Conversion between parameter trees and flat dictionaries under OpenAI's parameter names.

One table of names is used in both directions, for every variant and size.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.errors import GlideError
from glide_jax.models.presets import ModelConfig
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.weights.store import flatten, unflatten
from glide_jax.weights.torch_pickle import printable

# Name here -> OpenAI's, within a residual, an attention, and a text transformer block.
_RES = {
    "norm_1/norm": "in_layers.0",
    "conv_1": "in_layers.2",
    "emb": "emb_layers.1",
    "norm_2/norm": "out_layers.0",
    "conv_2": "out_layers.3",
    "skip": "skip_connection",
}
_ATTN = {"norm/norm": "norm", "qkv": "qkv", "text_kv": "encoder_kv", "proj": "proj_out"}
_TEXT = {
    "norm_1": "ln_1",
    "qkv": "attn.c_qkv",
    "proj": "attn.c_proj",
    "norm_2": "ln_2",
    "fc_1": "mlp.c_fc",
    "fc_2": "mlp.c_proj",
}
_SINGLE = {
    "unet/time_1": "time_embed.0",
    "unet/time_2": "time_embed.2",
    # These four names are ours: no model of OpenAI's takes the noise level of its low-res image, or
    # the scale of guidance.
    "unet/level_1": "low_res_level.0",
    "unet/level_2": "low_res_level.2",
    "unet/guidance_1": "guidance.0",
    "unet/guidance_2": "guidance.2",
    "unet/down_0": "input_blocks.0.0",
    "unet/head_norm/norm": "out.0",
    "unet/head": "out.2",
    "text/final_norm": "final_ln",
    "text/pooled": "transformer_proj",
}
_TABLES = {
    "text/token_embedding": "token_embedding.weight",
    "text/position_embedding": "positional_embedding",
    "text/padding_embedding": "padding_embedding",
}
_MIDDLE = {"res_1": (0, _RES), "attn": (1, _ATTN), "res_2": (2, _RES)}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def released_name(path: str, paths: set[str]) -> str:
    """Return OpenAI's name of a parameter.

    For example, that of `unet/mid_attn/qkv/kernel` is `middle_block.1.qkv.weight`.

    Args:
        path: keys of the parameter tree, joined by "/".
        paths: all paths of the tree. On a level without attention the number of the resampling
            block is one less.

    Raises:
        KeyError: the networks have no such parameter.
    """
    if path in _TABLES:
        return _TABLES[path]
    module, leaf = path.rsplit("/", 1)
    if module in _SINGLE:
        name = _SINGLE[module]
    elif m := re.fullmatch(r"text/block_(\d+)/(.+)", module):
        name = f"transformer.resblocks.{m[1]}.{_TEXT[m[2]]}"
    elif m := re.fullmatch(r"unet/mid_(res_1|attn|res_2)/(.+)", module):
        index, names = _MIDDLE[m[1]]
        name = f"middle_block.{index}.{names[m[2]]}"
    elif m := re.fullmatch(r"unet/(down|up)_(\d+)_(res|attn)/(.+)", module):
        blocks = "input_blocks" if m[1] == "down" else "output_blocks"
        index, names = (0, _RES) if m[3] == "res" else (1, _ATTN)
        name = f"{blocks}.{m[2]}.{index}.{names[m[4]]}"
    elif m := re.fullmatch(r"unet/down_(\d+)_conv", module):
        name = f"input_blocks.{m[1]}.0.op"
    elif m := re.fullmatch(r"unet/up_(\d+)_(up|conv)(?:/(.+))?", module):
        index = 2 if f"unet/up_{m[1]}_attn/qkv/kernel" in paths else 1
        name = f"output_blocks.{m[1]}.{index}.{_RES[m[3]] if m[3] else 'conv'}"
    else:
        raise KeyError(path)
    return f"{name}.{_LEAVES[leaf]}"


def _to_ours(array: np.ndarray, kernel: bool) -> np.ndarray:
    if not kernel:
        return array
    if array.ndim == 4 and array.shape[2:] != (1, 1):
        return array.transpose(2, 3, 1, 0)
    if array.ndim < 2 or any(n != 1 for n in array.shape[2:]):
        # This fits no kernel. It stays as it is, and its shape is reported as wrong.
        return array
    return array.reshape(array.shape[:2]).T


def _to_theirs(array: np.ndarray, path: str) -> np.ndarray:
    if not path.endswith("/kernel"):
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    array = array.T
    if path.endswith("/skip/kernel"):
        return array[:, :, None, None]
    # In the original code the attention of the UNet consists of 1-D convolutions, that of the text
    # transformer of linear layers.
    return array[:, :, None] if "_attn/" in path else array


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Return the parameter tree of a model as `jax.ShapeDtypeStruct`s, which use no memory."""
    return jax.eval_shape(partial(init_params, GLIDE(config)), jax.random.key(0))


def count_params(config: ModelConfig) -> int:
    """Return the number of parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def misfits(flat: Mapping[str, np.ndarray], config: ModelConfig) -> list[str]:
    """Return the paths that are missing, unexpected or of the wrong shape for a model."""
    return differences(flat, abstract_params(config))


def differences(flat: Mapping[str, np.ndarray], abstract: Mapping[str, Any]) -> list[str]:
    """Return the paths at which flat arrays and an abstract tree differ in shape."""
    wanted = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    shapes = {path: np.shape(array) for path, array in flat.items()}
    return sorted(path for path in wanted | shapes if wanted.get(path) != shapes.get(path))


def from_released(config: ModelConfig, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the parameter tree of a model from arrays under OpenAI's parameter names.

    Args:
        state_dict: arrays in torch layout (convolutions OIHW, linear layers (out, in)), of any
            float dtype.

    Returns:
        Nested dictionaries of float32 numpy arrays for `GLIDE(config).apply`. A float32 array of
        `state_dict` is not copied.

    Raises:
        GlideError: parameters are missing, unexpected, or of the wrong shape or dtype; the message
            names them.
    """
    abstract = abstract_params(config)
    wanted = flatten(abstract)
    names = {path: released_name(path, set(wanted)) for path in wanted}
    return assemble(wanted, names, released_shapes(abstract), state_dict, _to_ours)


def assemble(
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    state_dict: Mapping[str, np.ndarray],
    to_ours: Callable[[np.ndarray, bool], np.ndarray],
    what: str = "model",
) -> dict[str, Any]:
    """Return a parameter tree from arrays under other names.

    Args:
        wanted: the flat tree, abstract.
        names: path -> name in `state_dict`.
        shapes: name -> shape in `state_dict`.
        to_ours: function `(array, is_kernel) -> array`, from torch's layout to that of the tree.
        what: the kind of model, for the error message.

    Raises:
        GlideError: see `from_released`.
    """
    missing = sorted(set(names.values()) - set(state_dict))
    unexpected = sorted(printable(str(name)) for name in set(state_dict) - set(names.values()))
    params, shaped, typed = {}, [], []
    for path, name in names.items():
        if name not in state_dict:
            continue
        theirs = np.asarray(state_dict[name])
        array = to_ours(theirs, path.endswith("/kernel"))
        if not jnp.issubdtype(theirs.dtype, jnp.floating):
            typed.append(f"{name} {theirs.dtype}, not float32")
        elif array.shape != wanted[path].shape:
            shaped.append(f"{name} {theirs.shape}, not {shapes[name]}")
        else:
            # Aligned, but not made contiguous: a mapped array stays in its file until it is used.
            params[path] = np.require(array, np.float32, "A")
    problems = [
        f"{len(arrays)} {kind} ({', '.join(arrays[:5])}{', ...' if len(arrays) > 5 else ''})"
        for kind, arrays in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", shaped),
            ("of the wrong dtype", typed),
        )
        if arrays
    ]
    if problems:
        raise GlideError(f"these weights do not fit the {what}: {'; '.join(problems)}")
    return unflatten(params)


def released_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return OpenAI's name -> shape in torch's layout, for a tree that may be abstract."""
    shapes = {}
    flat = flatten(params)
    for path, leaf in flat.items():
        # All strides of this view are 0: 3.5 billion parameters need no memory.
        shape = _to_theirs(np.broadcast_to(np.float32(0), leaf.shape), path).shape
        shapes[released_name(path, set(flat))] = shape
    return shapes


def to_released(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return arrays in torch layout under OpenAI's names: the inverse of `from_released`."""
    flat = flatten(params)
    return {
        released_name(path, set(flat)): np.ascontiguousarray(_to_theirs(np.asarray(a), path))
        for path, a in flat.items()
    }
