"""Conversion between a noised CLIP's parameter tree and two dictionaries under OpenAI's names.

One table of names is used for both encoders, in both directions, for every size.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from glide_jax.models.clip import NoisedCLIP, init_params
from glide_jax.models.presets import CLIPConfig
from glide_jax.weights.released import assemble, differences
from glide_jax.weights.store import flatten

# Name here -> OpenAI's, within an encoder, and within one of its blocks.
_INPUT = {
    "patch/kernel": "patch_proj",
    "timestep_embedding": "w_t",
    "class_embedding": "pred_state",
    "token_embedding": "w_voc",
    "position_embedding": "w_pos",
}
_ENDS = {"norm_in": "input.ln", "norm_out": "output.ln", "head": "output.f"}
_BLOCK = {
    "norm_1": "f_attn.ln",
    "query": "f_attn.f_q",
    "key": "f_attn.f_k",
    "value": "f_attn.f_v",
    "proj": "f_attn.f_c",
    "norm_2": "f_mlp.ln",
    "fc_1": "f_mlp.f_1",
    "fc_2": "f_mlp.f_2",
}
_NORM_LEAVES = {"scale": "g", "bias": "b"}
_LINEAR_LEAVES = {"kernel": "w", "bias": "b"}


def clip_released_name(path: str) -> str:
    """Return OpenAI's name of a parameter of an encoder.

    For example, that of `block_3/query/kernel` is `blocks.block_3.f_attn.f_q.w`.

    Args:
        path: keys of the encoder's tree, joined by "/".
    """
    if path in _INPUT:
        return f"blocks.input.{_INPUT[path]}"
    module, leaf = path.rsplit("/", 1)
    if m := re.fullmatch(r"(block_\d+)/(.+)", module):
        name = f"{m[1]}.{_BLOCK[m[2]]}"
    else:
        name = _ENDS[module]
    return f"blocks.{name}.{(_NORM_LEAVES if name.endswith('.ln') else _LINEAR_LEAVES)[leaf]}"


def _to_ours(array: np.ndarray, kernel: bool) -> np.ndarray:
    """Change patch projections from OIHW to HWIO, linear layers from (out, in) to (in, out)."""
    if not kernel:
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_theirs(array: np.ndarray, kernel: bool) -> np.ndarray:
    if not kernel:
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def clip_abstract_params(config: CLIPConfig) -> dict[str, Any]:
    """Return the parameter tree of a noised CLIP as `jax.ShapeDtypeStruct`s, without memory."""
    return jax.eval_shape(partial(init_params, NoisedCLIP(config)), jax.random.key(0))


def clip_misfits(flat: Mapping[str, np.ndarray], config: CLIPConfig) -> list[str]:
    """Return the paths that are missing, unexpected or of the wrong shape for a noised CLIP."""
    return differences(flat, clip_abstract_params(config))


def clip_from_released(
    config: CLIPConfig,
    image_state_dict: Mapping[str, np.ndarray],
    text_state_dict: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the parameter tree of a noised CLIP from the arrays of its two files.

    Args:
        image_state_dict, text_state_dict: arrays in torch layout, of any float dtype. There are two
            dictionaries since both files have the name "blocks.input.w_pos", among others.

    Returns:
        Nested dictionaries of float32 numpy arrays for `NoisedCLIP(config).apply`. The files hold
        no scale: a learned one starts at the value of the config.

    Raises:
        GlideError: parameters are missing, unexpected, or of the wrong shape or dtype; the message
            names them.
    """
    abstract, params = clip_abstract_params(config), {}
    shapes = clip_released_shapes(abstract)
    for side, state_dict in (("image", image_state_dict), ("text", text_state_dict)):
        wanted = flatten(abstract[side])
        names = {path: clip_released_name(path) for path in wanted}
        what = f"noised CLIP's {side} encoder"
        params[side] = assemble(wanted, names, shapes[side], state_dict, _to_ours, what)
    if config.learn_logit_scale:
        params["log_scale"] = np.array(math.log(config.logit_scale), np.float32)
    return params


def clip_released_shapes(params: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return OpenAI's name -> shape in torch's layout for the encoders "image" and "text".

    Args:
        params: a parameter tree, which may be abstract.
    """
    return {
        side: {
            # All strides of this view are 0: it needs no memory.
            clip_released_name(path): _to_theirs(
                np.broadcast_to(np.float32(0), leaf.shape), path.endswith("/kernel")
            ).shape
            for path, leaf in flatten(params[side]).items()
        }
        for side in ("image", "text")
    }


def clip_to_released(
    params: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the arrays of both encoders under OpenAI's names: the inverse of `clip_from_released`.

    The first dictionary is that of the image encoder, the second that of the text encoder, both in
    torch layout. A learned scale has no name there, since the original code reads it from a
    configuration file; it is left out.
    """
    image, text = (
        {
            clip_released_name(path): np.ascontiguousarray(
                _to_theirs(np.asarray(array), path.endswith("/kernel"))
            )
            for path, array in flatten(params[side]).items()
        }
        for side in ("image", "text")
    )
    return image, text
